"""Base classes of networks: the mean and range of images, and the options stored with their weights."""

import functools
import inspect
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, ParamSpec, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sparse_sr_attn.blocks.attention_config import AttentionConfig
from sparse_sr_attn.blocks.body import SiteAttention
from sparse_sr_attn.blocks.upsample import Upsample, Upscale
from sparse_sr_attn.config import renamed
from sparse_sr_attn.errors import ConfigError, ShapeError
from sparse_sr_attn.functional.channels_last import channels_last, is_channels_last
from sparse_sr_attn.layers.base import warn_of_range

DIV2K_MEAN = (0.4488, 0.4371, 0.4040)
"""Mean of DIV2K's training images (RGB, 0..1)."""

OPTIONS = "options"
"""Key of the options in the state dict of a network."""

_SCALES = ("img_range", "rgb_mean", "res_scale")
"""Options that scale or shift what all weights see."""

P = ParamSpec("P")


def store_init_args(init: Callable[P, None]) -> Callable[P, None]:
    """Decorate a constructor to record its options, so that they can be stored with the weights."""
    signature = inspect.signature(init)
    family = init.__qualname__.split(".")[0]  # of the class that declares the options, whatever it is called later

    @functools.wraps(init)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
        kwargs = renamed(kwargs, signature.parameters)  # type: ignore[assignment]
        init(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        network, *_ = args
        given = {
            name: value
            for name, value in bound.arguments.items()
            if value is not network and name != "activation_checkpointing"  # of training, not of the network
        }
        network._options = as_json({"type": family, **given})  # type: ignore[attr-defined]
        options = options_of(network)  # type: ignore[arg-type]
        if options is not None and not _is_plain(options):
            network.register_buffer(OPTIONS, encode_options(options))  # type: ignore[attr-defined]

    return wrapper


def encode_options(options: Mapping[str, Any]) -> Tensor:
    """Encode options for a state dict: the bytes of a JSON mapping, each as a float.

    Tools that average, cast or shard weights treat a float buffer like a parameter; the values 0..127 survive that.
    """
    return torch.tensor(list(json.dumps(options).encode()), dtype=torch.float32, device="cpu")


def decode_options(tensor: Tensor) -> dict[str, Any]:
    """Return the options that `encode_options` encoded.

    Raises:
        ValueError: the tensor does not encode a JSON mapping; or TypeError, ArithmeticError or RecursionError.
    """
    return dict(json.loads(bytes(round(value) for value in tensor.tolist())))


def options_of(network: "Network") -> dict[str, Any] | None:
    """Return the type and the options of a network; `None` if JSON cannot represent one of them."""
    return None if network._options is None else dict(json.loads(network._options))


def _is_plain(options: Mapping[str, Any]) -> bool:
    """Return whether shapes identify a network: it is BasicSR's EDSR or RCAN, with BasicSR's range and mean."""
    choices = [options[name] for name in ("attention", "block") if name in options]
    if not choices or any(choices):
        return False
    res_scale = usual_res_scale(options["num_block"], options["num_feat"]) if options["type"] == "EDSR" else 1.0
    mean = DIV2K_MEAN if options["rgb_mean"] is None else options["rgb_mean"]
    usual_mean = len(mean) == 3 and all(abs(a - b) < 1e-6 for a, b in zip(mean, DIV2K_MEAN, strict=True))
    return options["img_range"] == 255 and options["res_scale"] == res_scale and usual_mean


def usual_res_scale(num_block: int, num_feat: int) -> float:
    """Return the `res_scale` of the published EDSR of this size: 0.1 for the large one."""
    return 0.1 if (num_block, num_feat) == (32, 256) else 1.0


def as_json(options: Mapping[str, Any]) -> str | None:
    """Return the options as JSON; `None` if JSON cannot represent one of them."""
    try:
        return json.dumps(options, default=_plain)
    except (TypeError, ValueError):
        return None


def _plain(value: object) -> object:
    """Convert mappings, sequences and numbers of any type to those that JSON can represent."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence):
        return list(value)
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    raise TypeError


class Network(nn.Module):
    r"""Abstract network $y = u((x - m)\,r) / r + m$, with the mean $m$ and the range $r$ of images.

    Subclasses define $u$, `forward_body`. The mean is not in the state dict, and has real values even in a network
    built on the meta device.

    Shapes do not determine all options of attention, nor the range of images. So every network stores its options in a
    buffer (`OPTIONS`) as JSON bytes, except for an EDSR or RCAN with neither attention nor other blocks and with
    BasicSR's range, mean and `res_scale`, whose weights BasicSR reads as its own. `load_model` reads them;
    `load_state_dict` ignores them, present or not, but warns if the range, the mean or `res_scale` differ.

    Args:
        num_in_ch: channels of the input image.
        num_out_ch: channels of the output image.
        upscale: factor, one of 2, 3, 4, 8.
        img_range: internal factor on the image; inputs and outputs are always in 0..1.
        rgb_mean: subtracted from the input and added to the output, one number in 0..1 per channel; `None` for the
            mean of DIV2K with 3 channels in and out, and 0 otherwise.
    """

    mean: Tensor
    _options: str | None = None

    def __init__(
        self,
        num_in_ch: int,
        num_out_ch: int,
        upscale: Upscale,
        img_range: float,
        rgb_mean: Sequence[float] | None,
    ) -> None:
        super().__init__()
        self.num_in_ch = num_in_ch
        self.upscale = upscale
        self.img_range = img_range
        self.rgb_mean = _mean(num_in_ch, num_out_ch, rgb_mean)
        self.register_buffer("mean", self._mean_like(torch.empty(0)), persistent=False)

    def forward_body(self, x: Float[Tensor, "b c_in h w"]) -> Float[Tensor, "b c_out H W"]:
        """Super-resolve an image already centred and scaled to `img_range`."""
        raise TypeError(f"{type(self).__name__} does not define forward_body")

    def forward(self, x: Float[Tensor, "b c_in h w"]) -> Float[Tensor, "b c_out H W"]:
        """Super-resolve images by the factor `upscale`.

        Args:
            x: images in 0..1, of any h, w >= 1.

        Returns:
            Images of size (upscale * h, upscale * w), in about 0..1, not clipped.

        Raises:
            ShapeError: `x` is not a batch of images of `num_in_ch` channels.
        """
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = str(x.dtype) if isinstance(x, Tensor) else f"a {type(x).__name__}"
            raise ShapeError(f"x must be a floating-point tensor of images in about 0..1, got {got}")
        if x.ndim != 4 or x.shape[1] != self.num_in_ch or 0 in x.shape[2:]:
            raise ShapeError(
                f"x must be images (b, {self.num_in_ch}, h >= 1, w >= 1), because num_in_ch is {self.num_in_ch}; "
                f"got shape {tuple(x.shape)}"
            )
        mean = self.mean.to(next(self.parameters(), self.mean).dtype)  # weights may have been put in place without it
        output = self.forward_body((x - mean.to(x.device)) * self.img_range) / self.img_range
        return output + mean.to(output.device)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        self.mean = self._mean_like(self.mean)
        if OPTIONS in self._buffers:  # whole whatever happened to it: a cast, or memory that is not filled yet
            self._buffers[OPTIONS] = self._packed_options()
        return self

    def _mean_like(self, tensor: Tensor) -> Tensor:
        """Return the unrounded mean on the device of `tensor`; on the CPU for the meta device."""
        device = "cpu" if tensor.is_meta else tensor.device
        return torch.tensor(self.rgb_mean, dtype=tensor.dtype, device=device).view(1, -1, 1, 1)

    def _packed_options(self) -> Tensor:
        """Return the encoded options, on the device of the mean."""
        return encode_options(options_of(self) or {}).to(self.mean.device)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        recorded = state_dict.pop(prefix + OPTIONS, None)
        if isinstance(recorded, Tensor) and not recorded.is_meta:
            self._warn_of_other_scales(recorded)
        if OPTIONS in self._buffers:  # those it was built with, whatever the file says
            state_dict[prefix + OPTIONS] = self._packed_options()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _warn_of_other_scales(self, recorded: Tensor) -> None:
        """Warn if the weights were trained with other values of options that change what the network computes."""
        try:
            theirs, ours = decode_options(recorded), options_of(self) or {}
            for options in (theirs, ours):
                options["rgb_mean"] = list(_mean(options["num_in_ch"], options["num_out_ch"], options["rgb_mean"]))
        except (ArithmeticError, KeyError, RuntimeError, TypeError, ValueError):
            return  # nothing that this class wrote
        names = [name for name in _SCALES if name in theirs and name in ours and theirs[name] != ours[name]]
        if names:
            different = ", ".join(f"{name} {theirs[name]}, not {ours[name]}" for name in names)
            warnings.warn(
                f"the weights are of an {theirs.get('type')} with {different}; build the network with these options, "
                "or use load_model, which reads them from the weights",
                stacklevel=2,
            )


class ResidualNetwork(Network):
    r"""Abstract network $\mathrm{last}(\uparrow(\mathrm{conv}(\mathrm{features}(f)) + f)),\; f = \mathrm{first}(x)$.

    Subclasses define `features` (which they build before or after calling this constructor) and are final. State-dict
    keys are BasicSR's: `conv_first`, `conv_after_body`, `upsample`, `conv_last`.

    Args:
        num_in_ch: as in `Network`.
        num_out_ch: as in `Network`.
        num_feat: channels inside.
        upscale: as in `Network`.
        img_range: as in `Network`.
        rgb_mean: as in `Network`.
    """

    def __init__(
        self,
        num_in_ch: int,
        num_out_ch: int,
        num_feat: int,
        upscale: Upscale,
        img_range: float,
        rgb_mean: Sequence[float] | None,
    ) -> None:
        super().__init__(num_in_ch, num_out_ch, upscale, img_range, rgb_mean)
        self.conv_first = nn.Conv2d(num_in_ch, num_feat, 3, padding=1)
        self.conv_after_body = nn.Conv2d(num_feat, num_feat, 3, padding=1)
        self.upsample = Upsample(upscale, num_feat)
        self.conv_last = nn.Conv2d(num_feat, num_out_ch, 3, padding=1)

    def features(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Run the body on the first features."""
        raise TypeError(f"{type(self).__name__} does not define features")

    def forward_body(self, x: Float[Tensor, "b c_in h w"]) -> Float[Tensor, "b c_out H W"]:
        """Super-resolve an image already centred and scaled to `img_range`."""
        first = self.conv_first(x)
        if x.device.type == "cpu":  # there, convolutions and attention are faster in this memory format
            first = channels_last(first)
        deep = self.conv_after_body(self.features(first)) + first
        output = self.conv_last(self.upsample(deep))
        return output if is_channels_last(x) else output.contiguous()


class TrunkNetwork(ResidualNetwork):
    """Abstract residual network with attention between the parts of its trunk, by config.

    Subclasses call `_build_trunk` in their constructor. State-dict keys are BasicSR's plus `attention.<i>.` and
    `options` (see `load_model`). Weights of the plain network load strictly without attention; with attention, the
    output is initially the same.
    """

    def _build_trunk(
        self, parts: Sequence[nn.Module], attention: Sequence[AttentionConfig], *, activation_checkpointing: bool
    ) -> None:
        self.activation_checkpointing = activation_checkpointing
        self.body = nn.Sequential(*parts)
        self.attention = SiteAttention(attention, len(parts), self.conv_first.out_channels)
        warn_of_range(self, self.img_range)

    def features(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Run the trunk with its attention on the first features."""
        return self.attention.run(self.body, x, activation_checkpointing=self.activation_checkpointing)


def _mean(num_in_ch: int, num_out_ch: int, rgb_mean: Sequence[float] | None) -> tuple[float, ...]:
    if rgb_mean is None:
        rgb_mean = DIV2K_MEAN if num_in_ch == num_out_ch == 3 else (0.0,)
    elif not len(rgb_mean) == num_in_ch == num_out_ch:
        raise ConfigError.at(
            "rgb_mean",
            "must have one number per channel, the same number in and out, or be ~; "
            f"got {len(rgb_mean)} numbers with {num_in_ch=}, {num_out_ch=}",
        )
    return tuple(rgb_mean)
