"""Export networks to ONNX for images of any size; checked against the network before writing."""

import io
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparse_sr_attn.backbones.base import Network
from sparse_sr_attn.checkpoints.foreign import ForeignNetwork, network_name
from sparse_sr_attn.data.atomic import written
from sparse_sr_attn.errors import CheckpointError, ExportError, first_line
from sparse_sr_attn.functional.cluster import mean_keys
from sparse_sr_attn.layers.lcoa import LSP, Choice
from sparse_sr_attn.states import ClusterPattern

if TYPE_CHECKING:
    import onnx

TOLERANCE = 1e-4
"""Largest allowed difference between images (0..1) from onnxruntime and the network under one pattern."""

_TIE = 1e-4  # of a token's length: how far its cluster may be from the nearest one to count as a tie


@dataclass(frozen=True)
class Deviation:
    """The difference between onnxruntime and PyTorch on one image.

    Attributes:
        height: height of the image in pixels.
        width: width of the image in pixels.
        as_is: largest difference of the two results, in 0..1.
        under_one_pattern: the same if the network uses the clusters and neighbours that onnxruntime found.
        num_moved: number of tokens in different clusters; rounding may decide ties either way.
        num_tokens: number of tokens in all patterns of the network.
        margin: largest distance of these from a tie, relative to the norm of the token (or to 1 for neighbours).
    """

    height: int
    width: int
    as_is: float
    under_one_pattern: float
    num_moved: int
    num_tokens: int
    margin: float

    @property
    def good(self) -> bool:
        """Whether the differences are only rounding."""
        return self.under_one_pattern <= TOLERANCE and self.margin <= _TIE


def export_onnx(
    model: nn.Module, file: str | Path, *, overwrite: bool = False, sizes: Sequence[tuple[int, int]] | None = None
) -> list[Deviation]:
    """Export `model` to ONNX for any height and width, and check with onnxruntime at several sizes before writing.

    Args:
        model: in evaluation mode, on the CPU, in float32. A third-party network must take images in 0..1.
        file: path ending in `.onnx`. The input is `image`, (1, c, h, w) in 0..1, the output that of `forward_body`;
            metadata contain `upscale`, `channels` and the network.
        overwrite: whether to replace an existing file.
        sizes: (h, w) of the images to compare; by default four sizes other than that of the export.

    Returns:
        The deviation at each size; all are good.

    Raises:
        ExportError: the network cannot be exported, or onnxruntime gives other images (nothing is written), or `file`
            cannot be written.

    Note:
        k-means assigns a token to the most similar centroid. If two are equally similar up to rounding, onnxruntime may
        choose the other one, which changes the image there. So the check has two parts: reassigned tokens must have
        been ties, and the image must agree under the clusters that onnxruntime found. The same applies to neighbouring
        chunks chosen by similarity.

    Examples:
        >>> deviations = export_onnx(load_model("LCoAN-light_x2"), "net.onnx")  # doctest: +SKIP
        >>> all(deviation.good for deviation in deviations)  # doctest: +SKIP
        True
    """
    file = Path(file)
    if file.suffix != ".onnx":
        raise ExportError(f"{file} must end in .onnx")
    if model.training:
        raise ExportError("the network must be in evaluation mode; call .eval()")
    if not isinstance(model, Network):
        try:
            model = ForeignNetwork(model, None).eval()
        except CheckpointError as error:
            raise ExportError(str(error)) from error
    proto = _exported(model)
    found = [compare(model, proto, size) for size in sizes or _sizes(model)]
    if bad := [deviation for deviation in found if not deviation.good]:
        worst = bad[0]
        where = f"{worst.height}x{worst.width}"
        raise ExportError(
            f"onnxruntime must give the same image within {TOLERANCE}, and does not at {where}: off by "
            f"{worst.under_one_pattern:.1e} under one pattern, {worst.num_moved} of {worst.num_tokens} tokens in "
            f"other clusters, by up to {worst.margin:.1e} of their length; nothing was written"
        )
    del proto.graph.output[1:]  # what the patterns chose, which only the check needs
    with written(file, ExportError, overwrite=overwrite) as stream:
        stream.write(proto.SerializeToString())
    return found


def compare(model: Network, proto: "onnx.ModelProto", size: tuple[int, int]) -> Deviation:
    """Compare onnxruntime and the network on an image of `size` (h, w).

    Args:
        model: as it was exported.
        proto: as `export_onnx` makes it: its outputs are the image and what was chosen for each pattern, its clusters
            and, where they are chosen, its neighbours.
        size: (h, w).

    Examples:
        >>> compare(load_model("LCoAN-light_x2"), onnx.load("net.onnx"), (40, 56)).good  # doctest: +SKIP
        True
    """
    import onnxruntime  # noqa: PLC0415

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    image = _image(model.num_in_ch, size)
    try:
        session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        outputs = session.run(None, {"image": image.numpy()})
    except Exception as error:  # its exceptions have no common root
        raise ExportError(f"onnxruntime fails for {size[0]}x{size[1]}: {first_line(error)}") from error
    result, *choices = (torch.from_numpy(output) for output in outputs)
    with torch.no_grad(), _watched(model) as watched:
        as_is = model(image)
    with torch.no_grad(), _watched(model, choices) as forced:
        under_one_pattern = model(image)
    if result.shape != as_is.shape:
        raise ExportError(f"onnxruntime must return shape {tuple(as_is.shape)}, got {tuple(result.shape)}")
    return Deviation(
        *size,
        float((result - as_is).abs().max()),
        float((result - under_one_pattern).abs().max()),
        sum(int((one != other).sum()) for one, other in zip(watched.choices, choices, strict=True) if one.ndim == 2),
        sum(one.numel() for one in choices if one.ndim == 2),
        forced.margin,
    )


class _Watch:
    """Records the clusters and neighbours that the patterns of a network choose, or replaces them by given ones.

    Attributes:
        choices: the choices of each pattern, in the order in which they run: clusters (b, n) and neighbours (b, k, m).
        margin: largest distance of a given choice from the best one, relative to the norm of the token.
    """

    def __init__(self, given: Sequence[Tensor] | None) -> None:
        self.choices: list[Tensor] = []
        self.margin = 0.0
        self._given = given

    def hook(self, choice: nn.Module, reasons: tuple[Any, ...], found: Tensor) -> Tensor:
        """Record a choice; return the given one instead, if any, after measuring how good it is."""
        if self._given is not None:
            given = self._given[len(self.choices)]
            margin = (
                _cluster_margin(given, *reasons[1:])
                if given.ndim == 2
                else _neighbor_margin(given, found, *reasons[1:])
            )
            self.margin, found = max(self.margin, margin), given
        self.choices.append(found)
        return found


def _cluster_margin(given: Tensor, points: Tensor, centroids: Tensor) -> float:
    """Return by how much the given clusters are less similar than the nearest, relative to the norm of the token."""
    scores = points @ centroids.T
    short = scores.amax(dim=-1) - scores.gather(-1, given[..., None])[..., 0]
    return float((short / points.norm(dim=-1).clamp(min=1e-12)).max())


def _neighbor_margin(given: Tensor, found: Tensor, pattern: ClusterPattern, keys: Tensor) -> float:
    """Return the largest difference in similarity between the given and the nearest neighbours."""
    means = mean_keys(pattern, keys)
    best, taken = ((means @ means.mT).gather(2, neighbors) for neighbors in (found, given))
    return float((best - taken).abs().max())


@contextmanager
def _watched(model: nn.Module, given: Sequence[Tensor] | None = None) -> Iterator[_Watch]:
    watch = _Watch(given)
    hooks = [module.register_forward_hook(watch.hook) for module in model.modules() if isinstance(module, Choice)]
    try:
        yield watch
    finally:
        for hook in hooks:
            hook.remove()


class _WithClusters(nn.Module):
    """The network, which also returns the choices of its patterns."""

    def __init__(self, model: Network) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        with _watched(self.model) as watch:
            upscaled = self.model(image)
        return (upscaled, *watch.choices)


def _exported(model: Network) -> "onnx.ModelProto":
    sides = {2: torch.export.Dim("height", min=2), 3: torch.export.Dim("width", min=2)}
    low = _image(model.num_in_ch, _export_size(model))
    with torch.no_grad(), _watched(model) as watch:
        model(low)
    names = [f"choices_{number}" for number in range(len(watch.choices))]
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):  # what the exporter says is for its authors
            warnings.simplefilter("ignore")
            program: Any = torch.onnx.export(
                _WithClusters(model),
                (low,),
                dynamo=True,
                dynamic_shapes=(sides,),
                input_names=["image"],
                output_names=["upscaled", *names],
                verbose=False,
            )
    except Exception as error:  # whatever export or translation meets
        while error.__cause__ is not None:  # the exporter wraps it in advice for its authors
            error = error.__cause__  # type: ignore[assignment]
        raise ExportError(
            f"{network_name(model)} cannot be exported: {type(error).__name__}: {first_line(error)}"
        ) from error
    finally:
        log.setLevel(level)
    proto: onnx.ModelProto = program.model_proto
    facts = {"upscale": model.upscale, "channels": model.num_in_ch, "network": network_name(model)}
    for key, value in facts.items():
        proto.metadata_props.add(key=key, value=str(value))
    return proto


def _image(num_channels: int, size: tuple[int, int]) -> Tensor:
    """Return a fixed image with smooth parts and edges."""
    generator = torch.Generator().manual_seed(size[0] * 10_007 + size[1])
    coarse = torch.rand(1, num_channels, max(2, size[0] // 6), max(2, size[1] // 6), generator=generator)
    image = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic")
    edges = torch.rand(1, num_channels, *size, generator=generator) > 0.97
    return torch.where(edges, 1 - image, image).clamp(0, 1)


def _export_size(model: nn.Module) -> tuple[int, int]:
    """Return a size with at least three chunks; with one chunk, export would specialise on a dimension of 1."""
    chunk_size = max([module.chunk_size for module in model.modules() if isinstance(module, LSP)], default=1)
    side = max(12, math.isqrt(3 * chunk_size) + 1)
    return side, side + 2


def _sizes(model: nn.Module) -> list[tuple[int, int]]:
    """Return four sizes: within one chunk if there are chunks, odd, wide, and larger than that of the export."""
    height, width = _export_size(model)
    return [
        (3, 5),
        (height + 1, width - 5),
        (height // 2, 2 * width + 1),
        (max(2 * height - 1, 64), max(width + 9, 81)),
    ]
