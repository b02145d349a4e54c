"""Insert attention into third-party models, and remove it again."""

import itertools
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sparse_sr_attn.blocks.attention_config import AttentionConfig, default_config, read_attention
from sparse_sr_attn.blocks.body import SiteAttention
from sparse_sr_attn.config import checked, join_path
from sparse_sr_attn.errors import ConfigError, Problem
from sparse_sr_attn.layers.base import warn_of_range
from sparse_sr_attn.registry import suggestion

_SIDE = 16  # of an image that any model should take


class AttendedSequential(nn.Sequential):
    """The class that `attach` gives to an `nn.Sequential`: the same object with attention between its children.

    Length, iteration, indexing and slicing cover only the children, not the attention.
    """

    attention: SiteAttention

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Run the children and the attention between them."""
        return self.attention.run(self, x)

    def _children(self) -> list[tuple[str, nn.Module]]:
        return [(name, module) for name, module in self._modules.items() if name != "attention"]

    def __len__(self) -> int:
        return len(self._children())

    def __iter__(self) -> Iterator[nn.Module]:
        return iter([module for _, module in self._children()])

    def __getitem__(self, index: Any) -> Any:
        found = self._children()[index]
        return nn.Sequential(OrderedDict(found)) if isinstance(found, list) else found[1]

    def __setitem__(self, index: int, module: nn.Module) -> None:
        setattr(self, self._children()[index][0], module)

    def _refuse(self, *_: object) -> NoReturn:
        raise TypeError("attention was placed for these children: detach, change them, and attach again")

    append = insert = extend = pop = __delitem__ = __iadd__ = __imul__ = _refuse  # type: ignore[assignment]


class AttendedConv2d(nn.Conv2d):
    """The class that `attach` gives to a convolution: the same object with attention after it."""

    attention: nn.ModuleList

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h2 w2"]:
        """Run the convolution and its attention."""
        x = super().forward(x)
        for layer in self.attention:
            x = layer(x)
        return x


_ATTENDED: dict[type[nn.Module], type[nn.Module]] = {nn.Sequential: AttendedSequential, nn.Conv2d: AttendedConv2d}


@checked
def attach(
    model: nn.Module,
    body: str | None = None,
    attention: str | Mapping[str, Any] | Sequence[Any] = "LCoA",
    every: int | None = None,
    share: int | None = None,
    *,
    example: Tensor | None = None,
    **options: Any,
) -> nn.Module:
    """Insert attention into the trunk of a model, an `nn.Sequential` that the model calls as a whole.

    The model is changed in place. Its parameters keep their names; new ones are under `<body>.attention.<i>.`. Its
    output is bit-identical as long as the layers are the identity (`zero_init`, the default for layers that have it).
    Attach before `DistributedDataParallel`, before `torch.compile` and before creating the optimizer.

    Args:
        model: any module.
        body: path of the trunk, as in `state_dict` (`"body"`, `"net.trunk"`). If omitted, the only trunk is used. A
            path with `*` (`"layers.*.conv"`) selects convolutions instead, each followed by attention of its own, for
            models that run their blocks one by one.
        attention: name of a registered layer, a mapping, or a list of mappings, as in the option `attention` of `EDSR`.
        every: a layer after every `every` children of the trunk: 4 (default) means after children 3, 7, 11, ...,
            counted from 0. Alternatively, list the children in `after=[...]`.
        share: one layer computes a state and the next `share - 1` reuse it. Default: 4 if possible, else 1.
        example: images that the model accepts. The model is run on them once, in evaluation mode without gradients, to
            check that it calls the trunk and to find the trunk's width. Default: black images of 16x16. If the model
            does not accept them, the width is read from the convolutions of the trunk, and the call is not checked.
        options: options of the layer; only if `attention` is a name.

    Returns:
        The same model.

    Raises:
        ConfigError: there is no such trunk, it cannot hold attention, or an option is invalid; says what would work.
            The model is unchanged.

    Note:
        States are passed as arguments inside the trunk, so copies, threads, activation checkpointing around the trunk,
        `DistributedDataParallel` and `torch.compile` work as before. `docs/attach.md` lists the models that fit.

    Examples:
        >>> body = torch.nn.Sequential(*(torch.nn.Conv2d(16, 16, 3, padding=1) for _ in range(4)))
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3, padding=1), body)
        >>> model = attach(model, "1", "LCoA", every=2, share=2, num_clusters=32)
        >>> model(torch.rand(1, 3, 12, 12)).shape, len(body.attention)
        (torch.Size([1, 16, 12, 12]), 2)
    """
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise _refusal("model", "must not be in DistributedDataParallel yet, which would miss the new parameters")
    if body is not None and "*" in body:
        convolutions = _convolutions(model, body)
        maps = read_attention(_as_maps(attention, every, share, options, shares=False), len(convolutions))
        placed = _after_each(convolutions, maps)
    else:
        body, trunk = _trunk(model, body)
        width = _width(model, trunk, body, example)
        maps = read_attention(_as_maps(attention, every, share, options), len(trunk))
        placed = [(trunk, _layers(maps, len(trunk), width, trunk))]
    for module, layers in placed:
        module.attention = layers
        module.__class__ = _ATTENDED[type(module)]
    warn_of_range(model, _range_of(model))
    return model


def detach(model: nn.Module) -> nn.Module:
    """Remove all attention that `attach` inserted into a model.

    Args:
        model: the model, changed in place. Its own weights keep what they learnt meanwhile.

    Returns:
        The same model.

    Raises:
        ConfigError: the model has no attached attention.

    Examples:
        >>> body = torch.nn.Sequential(*(torch.nn.Conv2d(16, 16, 3, padding=1) for _ in range(4)))
        >>> model = attach(torch.nn.Sequential(torch.nn.Conv2d(3, 16, 1), body), "1", "LCoA")
        >>> is_attended(model), is_attended(detach(model))
        (True, False)
    """
    plain = {attended: original for original, attended in _ATTENDED.items()}
    found = [module for module in model.modules() if type(module) in plain]
    if not found:
        raise _refusal("model", f"must have attention from attach, but {type(model).__name__} has none")
    for module in found:
        del module.attention
        module.__class__ = plain[type(module)]
    return model


def is_attended(model: nn.Module) -> bool:
    """Return whether a model has attention from `attach`.

    Examples:
        >>> is_attended(EDSR(num_block=4, attention="LCoA"))  # attention of its own, not attached
        False
    """
    return any(type(module) in _ATTENDED.values() for module in model.modules())


def _range_of(model: nn.Module) -> float:
    """Return the image range of a model if it has one of the attributes of EDSR, RCAN or SwinIR; else 1."""
    named = (getattr(module, name, 1) for module in model.modules() for name in ("img_range", "rgb_range"))
    return max((float(value) for value in named if isinstance(value, (int, float))), default=1.0)


# --- what goes where --------------------------------------------------------------------------------------------------


def _as_maps(
    attention: object, every: int | None, share: int | None, options: Mapping[str, Any], *, shares: bool = True
) -> object:
    """Return the mapping for a name and keywords; mappings unchanged."""
    if not isinstance(attention, str):
        if not attention:
            raise _refusal("attention", f"must be a name, a mapping or a list of mappings, got {attention!r}")
        given = {"every": every, "share": share, **options}
        extra = [name for name, value in given.items() if value is not None]
        if extra:
            raise _refusal(extra[0], "must be in the mapping that attention is")
        return attention
    found = default_config(attention, shares=shares)
    if every is None and "after" in options:
        del found["every"]
    given = {"every": every, "share": share}
    return {**found, **{name: value for name, value in given.items() if value is not None}, **options}


def _layers(maps: Sequence[AttentionConfig], num_blocks: int, width: int, beside: nn.Module) -> SiteAttention:
    """Return the layers, with the device and dtype of the parameters of `beside`."""
    layers = SiteAttention(maps, num_blocks, width)
    weight = next((p for p in beside.parameters() if p.is_floating_point()), None)
    if weight is not None:
        layers.to(weight.device, weight.dtype)
    return layers.train(beside.training)


def _after_each(
    convolutions: Sequence[nn.Conv2d], maps: Sequence[AttentionConfig]
) -> list[tuple[nn.Module, nn.ModuleList]]:
    """Return the convolutions that get attention, each with its layers."""
    for attention in maps:
        if attention.share > 1:
            message = "must be 1, because the model calls each convolution itself and no state can pass"
            raise _refusal("attention.share", f"{message}, got {attention.share}")
    widths = sorted({convolution.out_channels for convolution in convolutions})
    if len(widths) != 1:
        raise _refusal("body", f"must name convolutions of one width, got {widths} channels; narrow the path")
    layers = _layers(maps, len(convolutions), widths[0], convolutions[0])
    here = [(convolution, nn.ModuleList(layers.at(index))) for index, convolution in enumerate(convolutions)]
    return [(convolution, own.train(convolution.training)) for convolution, own in here if own]


# --- where it can go --------------------------------------------------------------------------------------------------


def _trunk(model: nn.Module, path: str | None) -> tuple[str, nn.Sequential]:
    """Return the trunk and its path: the one named, or the only one."""
    candidates = _candidates(model)
    if path is None:
        if len(candidates) != 1:
            name = type(model).__name__
            found = f"{name} has {', '.join(map(repr, candidates))}" if candidates else f"{name} has none{_hint(model)}"
            rule = "must be named" if candidates else "must be an nn.Sequential whose children keep their width"
            raise _refusal("body", f"{rule}; {found}")
        path = candidates[0]
    modules = dict(model.named_modules(remove_duplicate=False))
    if path not in modules:
        known = candidates or [name for name, _ in model.named_children()]
        raise _refusal("body", f"must be the path of a module, got {path!r}{suggestion(path, known)}")
    trunk = modules[path]
    if type(trunk) in _ATTENDED.values():
        raise _refusal("body", f"must have no attention yet, got {path!r}; detach, or attach a list of mappings")
    if type(trunk) is not nn.Sequential:
        kind = f"a {type(trunk).__name__}" + ", which may run them in another way" * isinstance(trunk, nn.Sequential)
        raise _refusal("body", f"must be an nn.Sequential and run its children, got {path!r}, {kind}{_hint(model)}")
    if hasattr(trunk, "attention"):
        raise _refusal("body", f"must not have a child 'attention', the name of what attach adds, got {path!r}")
    return path, trunk


def _candidates(model: nn.Module) -> list[str]:
    """Return the paths of possible trunks, none of them inside another."""
    found: list[str] = []
    for path, module in model.named_modules():
        if type(module) is nn.Sequential and not any(path.startswith(join_path(outer, "")) for outer in found):
            blocks = [channels for channels in map(_channels, module) if channels]
            if len(blocks) > 1 and len(set(itertools.chain(*blocks))) == 1 and not hasattr(module, "attention"):
                found.append(path)
    return found


def _hint(model: nn.Module) -> str:
    """Return advice for a model that runs the blocks of a list one by one, if each has a suitable convolution."""
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module):
            names = [
                {n for n, m in block.named_children() if type(m) is nn.Conv2d and m.in_channels == m.out_channels}
                for block in module
            ]
            for name in sorted(set.intersection(*names)):
                return (
                    f"; {type(model).__name__} runs the blocks of {path!r} itself, so no state can pass between "
                    f"them, but each can have attention of its own: body='{path}.*.{name}', share=1"
                )
    return ""


def _convolutions(model: nn.Module, pattern: str) -> list[nn.Conv2d]:
    """Return the convolutions that match a path with `*`."""
    regex = re.compile(re.escape(pattern).replace(r"\*", r"[^.]+"))
    found = {path: module for path, module in model.named_modules() if regex.fullmatch(path)}
    if not found:
        raise _refusal("body", f"must name convolutions, but {pattern!r} names nothing in {type(model).__name__}")
    for path, module in found.items():
        if type(module) is AttendedConv2d:
            raise _refusal("body", f"must have no attention yet, got {path!r}; detach, or attach a list of mappings")
        if type(module) is not nn.Conv2d:
            raise _refusal("body", f"must name convolutions (nn.Conv2d), got {path!r}, a {type(module).__name__}")
    return [module for module in found.values() if isinstance(module, nn.Conv2d)]


# --- how wide it is ---------------------------------------------------------------------------------------------------


def _channels(block: nn.Module) -> tuple[int, int] | None:
    """Return the channels in and out of a block, read from its first and its last convolution."""
    convolutions = [module for module in block.modules() if isinstance(module, nn.Conv2d)]
    return (convolutions[0].in_channels, convolutions[-1].out_channels) if convolutions else None


def _width(model: nn.Module, trunk: nn.Sequential, path: str, example: Tensor | None) -> int:
    """Return the width of the maps between the children, from a call or, if none succeeds, from the weights."""
    for images in _guesses(model) if example is None else [example]:
        try:
            return _seen_width(model, trunk, path, images)
        except ConfigError:
            raise
        except Exception:  # somebody else's forward may want other images than we guess
            if example is not None:
                raise
    return _told_width(trunk, path)


def _guesses(model: nn.Module) -> Iterator[Tensor]:
    """Yield images that the model might accept."""
    weight = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    first = next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), 3)
    for channels in dict.fromkeys((first, 3, 1)):
        yield weight.new_zeros(1, channels, _SIDE, _SIDE)


def _seen_width(model: nn.Module, trunk: nn.Sequential, path: str, images: Tensor) -> int:
    calls: list[nn.Module] = []
    shapes: list[tuple[int, ...]] = []

    def note(_: nn.Module, __: object, output: object) -> None:
        shapes.append(tuple(getattr(output, "shape", ())))

    hooks = [trunk.register_forward_hook(lambda module, *_: calls.append(module))]
    hooks += [child.register_forward_hook(note) for child in trunk]
    try:
        with evaluating(model):
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    name = type(model).__name__
    if not calls:
        how = f"{name} runs its children itself, which skips attention" if shapes else f"{name} did not use it"
        raise _refusal("body", f"must be a trunk that the model calls, got {path!r}, but {how}{_hint(model)}")
    for shape in shapes:
        if len(shape) != 4:
            raise _refusal("body", f"must pass feature maps (b, c, h, w) on, but {path!r} passes {shape}{_hint(model)}")
    widths = sorted({shape[1] for shape in shapes})
    if len(widths) != 1:
        raise _refusal("body", f"must keep its width, but the children of {path!r} have {widths} channels")
    return widths[0]


def _told_width(trunk: nn.Sequential, path: str) -> int:
    blocks = {index: channels for index, channels in enumerate(map(_channels, trunk)) if channels}
    example = "pass example=..., images that the model accepts, to find it by a call"
    if not blocks:
        raise _refusal("body", f"must have convolutions that show its width, but {path!r} has none; {example}")
    width = blocks[min(blocks)][0]
    for index, (before, after) in blocks.items():
        if (before, after) != (width, width):
            raise _refusal(
                "body",
                f"must keep its width, {width} channels, from child to child, but child {index} of {path!r} seems to "
                f"go from {before} to {after}; if it does not, {example}",
            )
    return width


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode without gradients inside, and restore the mode of every submodule afterwards."""
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:  # not by `eval`, which some models use to fuse their weights
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _refusal(path: str, message: str) -> ConfigError:
    return ConfigError([Problem(path, message)])
