"""Attention layers of timm by name: `timm:eca` works like a layer registered here.

timm (`pip install timm`) is imported when the first of them is requested.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, Union, get_args, get_type_hints

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sparse_sr_attn.config import Finite, PositiveInt, checked
from sparse_sr_attn.errors import ConfigError, ShapeError, UnknownNameError
from sparse_sr_attn.layers.base import AttentionLayer, check_map, reject_state
from sparse_sr_attn.layers.batch_norm import BatchNorm2d
from sparse_sr_attn.registry import Entry, suggestion

# What `timm.layers.create_attn` knows by name; timm itself keeps no list.
USABLE = (
    *("se", "ese", "eca", "ecam", "ceca", "ge", "gc", "gca", "cbam", "lcbam", "coord", "scoord", "ela", "strip"),
    *("sk", "splat", "lambda", "nl"),
)
REFUSED = {
    "bottleneck": "its position embedding is for one height and width",
    "halo": "it takes heights and widths that are multiples of its block size only",
    "bat": "it takes heights and widths that are multiples of its block size only",
}

# Options that would change the size of the map, or need to know it beforehand.
_HIDDEN = {"out_channels", "dim_out", "stride", "padding", "dilation", "feat_size", "extra_params", "avg_down"}
_PLAIN = (bool, int, float, str)


class TimmLayer(AttentionLayer):
    r"""A layer of timm as a drop-in layer: $y = x + \rho\,g\,(\mathrm{timm}(x) - x)$ with a learnt $g$ per channel.

    By default, $\rho = g = 1$ initially, which is timm's layer itself, whether a gate or a residual sum.

    Args:
        attention: timm's layer, for maps of `embed_dim` channels; its batch normalisation is replaced by
            `layers.batch_norm.BatchNorm2d`.
        embed_dim: channels of the feature map, >= 1.
        res_scale: $\rho$, factor on the change by timm's layer; 0 disables it.
        zero_init: start with $g = 0$, the identity; with $g = 1$ if timm's layer itself starts as the identity.

    Note:
        The rest is timm's code, which computes in the precision of the input.
    """

    def __init__(
        self, attention: nn.Module, embed_dim: int, *, res_scale: float = 1.0, zero_init: bool = False
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.res_scale = res_scale
        self.attention = _with_our_norms(attention)
        # Two factors that are both 0 would get no gradient, ever.
        starts_at_zero = zero_init and not _is_identity(attention, embed_dim)
        self.gain = nn.Parameter(torch.full((embed_dim, 1, 1), 0.0 if starts_at_zero else 1.0))

    def extra_repr(self) -> str:
        """Return the options that are not visible from shapes."""
        return f"res_scale={self.res_scale}"

    def forward(self, x: Float[Tensor, "b c h w"], state: object = None) -> Float[Tensor, "b c h w"]:
        """Return `x` after timm's layer.

        Raises:
            SharingError: `state` is given.
            ShapeError: `x` is not a map of `embed_dim` channels, or timm's layer changes its size.
        """
        reject_state(self, state)
        check_map(x, self.embed_dim)
        changed = self.attention(x)
        if changed.shape != x.shape:
            raise ShapeError(
                f"a layer must keep the size of its map, but with these options timm's {type(self.attention).__name__} "
                f"returns {tuple(changed.shape)} for {tuple(x.shape)}; use a kernel of odd size"
            )
        return x + self.res_scale * self.gain * (changed - x)


class _NormAct(BatchNorm2d):
    """`BatchNorm2d` with the weights of another, and with the activation that timm's norm may include."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__(norm.num_features, eps=norm.eps, momentum=norm.momentum)
        self.load_state_dict(norm.state_dict())
        self.drop = getattr(norm, "drop", nn.Identity())
        self.act = getattr(norm, "act", nn.Identity())

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Return the normalised and activated map."""
        return self.act(self.drop(super().forward(x)))


def _with_our_norms(module: nn.Module) -> nn.Module:
    for name, child in module.named_children():
        setattr(module, name, _NormAct(child) if isinstance(child, nn.BatchNorm2d) else _with_our_norms(child))
    return module


def timm_entry(name: str) -> Entry[nn.Module]:
    """Return a registry entry for a layer of timm.

    Args:
        name: `timm:<name>`, with a name known to `timm.layers.create_attn`.

    Returns:
        The entry. Its `build` takes `embed_dim`, the plain options of timm's layer, `res_scale` (1) and `zero_init`.

    Raises:
        UnknownNameError: timm has no attention layer of that name.
        ConfigError: timm is not installed, or its layer cannot take maps of any size.
    """
    short = name.removeprefix("timm:")
    if short in REFUSED:
        raise ConfigError.at("", f"{name} cannot be used here, because {REFUSED[short]}")
    if short not in USABLE:
        raise UnknownNameError(f"no layer named {name!r}{suggestion(name, [f'timm:{known}' for known in USABLE])}")
    return Entry(name, "layer", _builder(name, _timm_class(name, short)), f"timm {_timm().__version__}")


def _timm() -> Any:
    try:
        import timm  # noqa: PLC0415  optional
    except ImportError as error:
        raise ConfigError.at("", f"layers named timm:... need timm: pip install timm ({error})") from error
    except RuntimeError as error:  # torchvision's, when it was built for another torch
        raise ConfigError.at("", f"layers named timm:... need timm, whose import fails: {error}") from error
    return timm


def _timm_class(name: str, short: str) -> Callable[..., nn.Module]:
    from_name = _timm().layers.get_attn
    try:
        return from_name(short)
    except AssertionError:
        message = f"timm {_timm().__version__} has no layer {short!r}; a newer one has: pip install --upgrade timm"
        raise ConfigError.at("", f"{name}: {message}") from None


def _builder(name: str, timm_class: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Return a function that builds the layer; its signature declares the options, as `config` requires."""

    def build(embed_dim: int, *, res_scale: float = 1.0, zero_init: bool = False, **options: Any) -> nn.Module:
        try:
            attention = timm_class(embed_dim, **options)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".rstrip(": ")
            given = "".join(f", {option}={value!r}" for option, value in options.items())
            raise ConfigError.at(
                "", f"timm {_timm().__version__} cannot build {name} for embed_dim={embed_dim}{given}: {reason}"
            ) from error
        return TimmLayer(attention, embed_dim, res_scale=res_scale, zero_init=zero_init)

    own = list(inspect.signature(build).parameters.values())[:-1]
    own = [p.replace(annotation=a) for p, a in zip(own, (PositiveInt, Finite, bool), strict=True)]
    parameters = [own[0], *_plain_options(timm_class), *own[1:]]
    build.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    build.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return checked(build)


def _plain_options(timm_class: Callable[..., nn.Module]) -> list[inspect.Parameter]:
    """Return timm's options that an option file can express: numbers, strings and booleans."""
    fixed: set[str] = set()
    if isinstance(timm_class, functools.partial):
        fixed, timm_class = set(timm_class.keywords), timm_class.func
    hints = get_type_hints(timm_class.__init__)
    options = []
    for parameter in list(inspect.signature(timm_class).parameters.values())[1:]:
        if parameter.kind is parameter.VAR_KEYWORD or parameter.name in fixed | _HIDDEN:
            continue
        annotation = hints.get(parameter.name, type(parameter.default))
        plain = [member for member in get_args(annotation) or (annotation,) if member in _PLAIN]
        if not plain:
            continue
        if parameter.default is None:
            plain.append(type(None))
        options.append(parameter.replace(annotation=Union[tuple(plain)], kind=parameter.KEYWORD_ONLY))  # noqa: UP007
    return options


def _is_identity(attention: nn.Module, embed_dim: int) -> bool:
    """Return whether a newly built layer is the identity."""
    probe = torch.linspace(-1, 1, embed_dim * 12).view(1, embed_dim, 3, 4)
    attention.eval()
    with torch.no_grad():
        changed = attention(probe.clone())
    attention.train()
    return not changed.is_meta and torch.equal(changed, probe)
