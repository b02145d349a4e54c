"""The contract of attention layers, and the table of all layers.

Kinds: a *layer* is drop-in, `(b, c, h, w) -> (b, c, h, w)`, residual included; a *consumer* is the same with a state
that must be given; a *provider* makes a state; an *operator* is a building stone without residual.
"""

from typing import Any, ClassVar, cast

from jaxtyping import Float
from torch import Tensor, nn

from sparse_sr_attn.errors import SharingError
from sparse_sr_attn.registry import Registry

LAYERS: Registry[nn.Module] = Registry("layer")


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
