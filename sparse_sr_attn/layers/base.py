"""The contract of attention layers, and the table of all layers.

Kinds: a *layer* is drop-in, `(b, c, h, w) -> (b, c, h, w)`, residual included; a *consumer* is the same with a state
that must be given; a *provider* makes a state; an *operator* is a building stone without residual.
"""

from typing import Any, ClassVar, Protocol, TypeVar, cast

from jaxtyping import Float
from torch import Tensor, nn

from sparse_sr_attn.errors import ShapeError, SharingError
from sparse_sr_attn.registry import Registry

LAYERS: Registry[nn.Module] = Registry("layer")


class State(Protocol):
    """What every state that layers share can tell."""

    @property
    def made_for(self) -> tuple[int, int, int]:
        """Number of maps, their height and width."""


S = TypeVar("S", bound=State)


class AttentionLayer(nn.Module):
    """A layer or a consumer. Subclasses are final: nobody inherits from them.

    A layer that provides a state has `attend` and `make_consumer`; one that requires a state can do nothing without.

    Attributes:
        provides: the type of the state that `attend` makes; `None` for a layer that shares nothing.
        requires: the type of the state that `forward` must be given; `None` for a drop-in layer.
    """

    provides: ClassVar[type | None] = None
    requires: ClassVar[type | None] = None

    def attend(self, x: Float[Tensor, "b c h w"]) -> Any:
        """Return the state of `x` that later layers may read; differentiable.

        Raises:
            SharingError: this layer provides no state.
        """
        raise SharingError(f"attend needs a layer that provides a state, got {type(self).__name__}, which does not")

    def forward(self, x: Float[Tensor, "b c h w"], state: Any = None) -> Float[Tensor, "b c h w"]:
        """Return `x` plus what it attends to; with `state`, by the state of another layer or of `attend`."""
        raise TypeError(f"{type(self).__name__} does not define forward")

    def make_consumer(self) -> "AttentionLayer":
        """Return a fresh consumer of this layer's states, of its width and options.

        Raises:
            SharingError: this layer provides no state.
        """
        raise SharingError(
            f"make_consumer needs a layer that provides a state, got {type(self).__name__}, which does not"
        )


def build_layer(name: str, embed_dim: int, **options: Any) -> AttentionLayer:
    """Return the layer registered as `name`, for feature maps of `embed_dim` channels.

    Raises:
        UnknownNameError: no layer has that name.
        ConfigError: an option breaks a rule.
    """
    return cast(AttentionLayer, LAYERS.get(name).build(embed_dim, **options))


def check_map(x: Tensor, embed_dim: int, name: str = "embed_dim") -> None:
    """Refuse what is no feature map of so many channels.

    Raises:
        ShapeError: it is none; `name` is what the number is called.
    """
    if x.ndim != 4 or x.shape[1] != embed_dim or 0 in x.shape[2:]:
        raise ShapeError(
            f"x must be a feature map (b, {embed_dim}, h >= 1, w >= 1), because {name} is {embed_dim}; "
            f"got shape {tuple(x.shape)}"
        )


def fitting(state: object, wanted: type[S], x: Tensor, hint: str) -> S:
    """Return the state, if it is of the wanted type and was made for maps of the size of `x`.

    Raises:
        SharingError: it is none, or of another type; `hint` says how to get one.
        ShapeError: it was made for another size.
    """
    if not isinstance(state, wanted):
        got = "none" if state is None else f"a {type(state).__name__}"
        raise SharingError(f"this layer needs the state of another one, a {wanted.__name__}, got {got}; {hint}")
    made_for = state.made_for
    if made_for != (x.shape[0], *x.shape[2:]):
        b, h, w = made_for
        raise ShapeError(
            f"a state fits maps of the size it was made for: it was made for {b} of {h}x{w}, "
            f"got {x.shape[0]} of {x.shape[2]}x{x.shape[3]}"
        )
    return state
