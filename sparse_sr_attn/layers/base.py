"""The contract of attention layers, and the table of all layers.

Kinds: a *layer* is drop-in, `(b, c, h, w) -> (b, c, h, w)`, including the residual; a *consumer* is the same but
requires a state; a *provider* computes a state; an *operator* is a building block without residual.
"""

import math
import warnings
from typing import Any, ClassVar, Literal, Protocol, TypeVar, cast, runtime_checkable

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.module import _has_any_global_hook

from sparse_sr_attn.errors import ShapeError, SharingError
from sparse_sr_attn.functional._torch import (
    autocast_is_on,
    conv_precision,
    is_transformed,
    without_autocast,
    working_precision,
)
from sparse_sr_attn.functional.backend import runs_kernels
from sparse_sr_attn.functional.channels_last import channels_last, in_format_of, pointwise_conv2d
from sparse_sr_attn.functional.conv_triton import conv1x1
from sparse_sr_attn.functional.l2_normalize import MAX_LOGIT_SCALE, scale_rows
from sparse_sr_attn.registry import Registry

LAYERS: Registry[nn.Module] = Registry(
    "layer",
    ["sparse_sr_attn.layers", "sparse_sr_attn.blocks"],
    kinds=("layer", "consumer", "provider", "operator"),
)
SATURATING_RANGE = 16.0
"""`img_range` above which the softmax of raw queries picks a single token."""


@runtime_checkable
class State(Protocol):
    """Interface of all states that layers share."""

    def map_size(self) -> tuple[int, int, int]:
        """Return batch size, height and width of the maps."""
        ...


S = TypeVar("S", bound=State)


class AttentionLayer(nn.Module):
    """Base class of layers and consumers. Subclasses are final.

    A layer that provides a state has `attend` and `make_consumer`; one that requires a state cannot run without it.

    Attributes:
        provides: the type of the state that `attend` returns; `None` for a layer that shares nothing.
        requires: the type of the state that `forward` requires; `None` for a drop-in layer.

    Examples:
        >>> layer = LCoA(8, chunk_size=16)
        >>> layer.provides.__name__, type(layer.make_consumer()).__name__
        ('ClusterAttention', 'CoA')
    """

    provides: ClassVar[type | None] = None
    requires: ClassVar[type | None] = None

    def attend(self, x: Float[Tensor, "b c h w"]) -> Any:
        """Compute the state of `x` for later layers; differentiable.

        Raises:
            SharingError: this layer provides no state.
        """
        raise self._shares_nothing("attend")

    def attend_and_apply(self, x: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b c h w"], Any]:
        """Return `x` plus its attention, and the state that `attend` computes; layers may do both at once.

        Raises:
            SharingError: this layer provides no state.
        """
        state = self.attend(x)
        return self(x, state), state

    def forward(self, x: Float[Tensor, "b c h w"], state: Any = None) -> Float[Tensor, "b c h w"]:
        """Return `x` plus its attention; `state` is that of another layer or of `attend`."""
        raise TypeError(f"{type(self).__name__} does not define forward")

    def make_consumer(self) -> "AttentionLayer":
        """Create a consumer of this layer's states, with the same width and options.

        Raises:
            SharingError: this layer provides no state.
        """
        raise self._shares_nothing("make_consumer")

    def _shares_nothing(self, method: str) -> SharingError:
        name = type(self).__name__
        if self.provides is not None:
            return SharingError(f"a layer that sets `provides` must define {method}, got {name}, which does not")
        return SharingError(f"{method} needs a layer that provides a state, got {name}, which does not")


def check_map(x: Tensor, embed_dim: int, name: str = "embed_dim") -> None:
    """Raise ShapeError unless `x` is a float (b, embed_dim, h, w) tensor.

    Args:
        x: the argument to check.
        embed_dim: the required number of channels.
        name: the option that sets this number, for the message.

    Raises:
        ShapeError: `x` is not such a tensor.
    """
    wanted = f"x must be a feature map (b, {embed_dim}, h >= 1, w >= 1)"
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.layout != torch.strided:
        got = f"a {x.layout} tensor of {x.dtype}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise ShapeError(f"{wanted}, a dense floating-point tensor, got {got}")
    if x.ndim != 4 or x.shape[1] != embed_dim or 0 in x.shape[2:]:
        raise ShapeError(f"{wanted}, because {name} is {embed_dim}; got shape {tuple(x.shape)}")


def check_state(state: object, wanted: type[S], x: Tensor, hint: str) -> S:
    """Return `state` after checking that it is of the wanted type and fits maps of the size of `x`.

    Raises:
        SharingError: the state is missing or of another type; `hint` says how to get one.
        ShapeError: the state was computed for another size.
    """
    if not isinstance(state, wanted):
        got = "none" if state is None else f"a {type(state).__name__}"
        raise SharingError(f"this layer needs the state of another layer, a {wanted.__name__}, got {got}; {hint}")
    map_size = state.map_size()
    if map_size != (x.shape[0], *x.shape[2:]):
        b, h, w = map_size
        raise ShapeError(
            f"a state only fits maps of the size it was computed for, {b} of {h}x{w}, "
            f"got {x.shape[0]} of {x.shape[2]}x{x.shape[3]}"
        )
    return state


def reject_state(layer: AttentionLayer, state: object) -> None:
    """Raise SharingError if a state is given to a layer that shares nothing.

    Raises:
        SharingError: `state` is not `None`.
    """
    if state is not None:
        raise SharingError(f"{type(layer).__name__} takes no state, got a {type(state).__name__}")


def tokens(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n c"]:
    """Return the pixels of a map as rows, in raster order."""
    return rearrange(x, "b c h w -> b (h w) c")


def feature_map(rows: Float[Tensor, "b n c"], x: Float[Tensor, "b _ h w"]) -> Float[Tensor, "b c h w"]:
    """Return rows as a map of the height and width of `x`."""
    return rearrange(rows, "b (h w) c -> b c h w", h=x.shape[-2])


def add_rows(
    x: Float[Tensor, "b c h w"], rows: Float[Tensor, "b n c"], *, alpha: float = 1.0
) -> Float[Tensor, "b c h w"]:
    """Return `x + alpha * feature_map(rows, x)`; without gradients, faster for contiguous maps."""
    if runs_kernels(x.device) and torch.is_grad_enabled():
        return cast(Tensor, _AddRows.apply(x, rows, alpha))  # type: ignore[no-untyped-call]
    if not _adds_in_blocks(x, rows):
        return torch.add(x, feature_map(rows, x), alpha=alpha)
    out = torch.empty_like(x)
    for channels, sample in zip(out.flatten(2), rows, strict=True):
        channels.copy_(sample.t())  # torch transposes a single matrix in blocks, several times as fast
    return torch.add(x, out, alpha=alpha, out=out)


def _adds_in_blocks(x: Tensor, rows: Tensor) -> bool:
    if torch.compiler.is_compiling() or is_transformed() or torch.is_grad_enabled():
        return False
    return x.device.type == "cpu" and x.is_contiguous() and x.dtype == rows.dtype


class _AddRows(torch.autograd.Function):
    """`add_rows`, whose backward writes the gradient of the rows as rows, in one kernel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, alpha: float) -> Tensor:
        ctx.alpha, ctx.dtype = alpha, rows.dtype
        return torch.add(x, feature_map(rows, x), alpha=alpha)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        read = tokens(grad)
        rows = torch.empty(read.shape, dtype=ctx.dtype, device=grad.device)
        return grad, torch.mul(read, ctx.alpha, out=rows), None


def in_own_precision(module: nn.Module, x: Float[Tensor, "b c h w"]) -> Tensor:
    """Return `module(x)`, computed in the precision of its weights even under autocast."""
    weight = next(module.parameters(), x)
    if not autocast_is_on(x) or not weight.is_floating_point():
        return cast(Tensor, module(x))
    with without_autocast(x):
        return cast(Tensor, module(x.to(weight.dtype)))


def stored_precision(x: Float[Tensor, "b c h w"]) -> torch.dtype | None:
    """Return the dtype in which a state of `x` stores its weights; `None` for float32 or higher.

    Readers multiply weights in the precision of their values. If that is bfloat16, it loses nothing to store them so.
    """
    return torch.bfloat16 if conv_precision(x) == torch.bfloat16 else None


class PointwiseConv2d(nn.Conv2d):
    """`nn.Conv2d`, computed as a matrix product of pixels if the kernel is 1x1.

    The constructor is that of `nn.Conv2d`, so that adapters and wrappers can create copies. With a bias, the output is
    in channels-last memory format.

    Examples:
        >>> PointwiseConv2d(8, 16, 1)(torch.rand(2, 8, 6, 7)).shape
        torch.Size([2, 16, 6, 7])
    """

    def forward(self, x: Float[Tensor, "b c_in h w"]) -> Float[Tensor, "b c_out _ _"]:
        """Return the convolution of `x`."""
        if (
            x.ndim == 4
            and self.kernel_size == self.stride == (1, 1)
            and self.padding in ((0, 0), "same", "valid")
            and self.groups == 1
        ):
            return pointwise_conv2d(x, self.weight, self.bias)
        return super().forward(x)


Similarity = Literal["cosine", "dot"]
"""How queries and keys are compared: by cosines with a learnt scale, or by products of raw queries and unit keys."""


class ScaledCosine(nn.Module):
    r"""Scales rows to length $\tau$, so that products with unit keys are $\tau$ times the cosine; $\tau$ is learnt.

    Args:
        logit_scale: initial $\tau$, > 0. The parameter is its logarithm; $\tau$ is at most 100.

    Source:
        Scaled cosine attention of Swin Transformer V2 (Liu et al., arXiv 2111.09883), with its upper limit.

    Examples:
        >>> rows = ScaledCosine(10.0)(torch.rand(1, 16, 8))
        >>> rows.shape, torch.allclose(rows.norm(dim=-1), torch.tensor(10.0))
        (torch.Size([1, 16, 8]), True)
    """

    def __init__(self, logit_scale: float) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor([math.log(logit_scale)]))

    def extra_repr(self) -> str:
        """Return the scale."""
        return f"scale={self.scale().item():.4g}"

    def scale(self) -> Float[Tensor, "1"]:
        r"""Return $\tau$."""
        return self.logit_scale.to(working_precision(self.logit_scale)).clamp(max=MAX_LOGIT_SCALE).exp()

    def forward(self, rows: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Return the rows scaled to length `scale()`, in float32 or higher; norms are clamped to at least 5e-5."""
        return scale_rows(rows, self.logit_scale)


def raw_queries_in(model: nn.Module) -> list[str]:
    """Return the types of the layers in a model that use unscaled features as queries."""
    names = {type(module).__name__ for module in model.modules() if getattr(module, "has_raw_queries", False)}
    return sorted(names - {"LSP"} if "LCoA" in names else names)  # it is a part of the other


def warn_of_range(model: nn.Module, img_range: float) -> None:
    """Warn if layers use unscaled features as queries and `img_range` is so large that this saturates the softmax."""
    names = raw_queries_in(model)
    if names and img_range > SATURATING_RANGE:
        warnings.warn(
            f"img_range {img_range:g} makes raw queries so long that the softmax of {', '.join(names)} picks one "
            "token; use img_range 1, or similarity='cosine' if the layer has it",
            stacklevel=3,
        )


def is_unmodified(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether calling `module` runs the forward of `kind` and nothing else.

    `False` with hooks (hence also with pruning and `torch.nn.utils.weight_norm`), parametrisations, adapters, or a
    replaced forward (offloading). Only if it is `True` may the weights be used without calling the module.
    """
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if type(module) is not kind or any(hooks):
        return False
    return "forward" not in module.__dict__ and not _has_any_global_hook()


def add_conv(
    x: Float[Tensor, "b o h w"], conv: PointwiseConv2d, inner: Float[Tensor, "b c h w"], scale: float
) -> Float[Tensor, "b o h w"]:
    """Return `x + scale * conv(inner)` in the memory format of `x`; `inner` is in channels-last memory format."""
    if runs_kernels(x.device) and is_unmodified(conv, PointwiseConv2d) and conv.bias is not None:
        return in_format_of(conv1x1(inner, conv.weight, conv.bias, residual=channels_last(x), scale=scale), x)
    added = conv(inner)
    rows = tokens(added)
    if _adds_in_blocks(x, rows):
        return add_rows(x, rows, alpha=scale)
    return in_format_of(torch.add(channels_last(x), added, alpha=scale), x)


def output_proj(embed_dim: int, *, zero_init: bool) -> PointwiseConv2d:
    """Create the last 1x1 convolution of a branch; `zero_init` sets its weights to 0."""
    conv = PointwiseConv2d(embed_dim, embed_dim, 1)
    if zero_init:
        nn.init.zeros_(conv.weight)
        nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv
