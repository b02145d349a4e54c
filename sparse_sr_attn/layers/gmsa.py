"""GMSA: window attention with different window sizes for groups of channels, and layers that share its weights.

Zhang et al., "Efficient Long-Range Attention Network for Image Super-resolution", ECCV 2022, arXiv 2203.06697. Written
from the paper and the behaviour of the released code; deviations are listed in `docs/deviations.md`.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor

from sparse_sr_attn.config import Finite, PositiveInt, WindowSize, checked
from sparse_sr_attn.errors import ConfigError, Problem
from sparse_sr_attn.functional._torch import is_exporting, working_precision
from sparse_sr_attn.functional.channels_last import channels_last
from sparse_sr_attn.functional.window import (
    apply_window_weights,
    fuses_groups,
    grouped_window_attention,
    split_groups,
    window_attention,
    window_weights,
)
from sparse_sr_attn.layers.base import (
    LAYERS,
    AttentionLayer,
    add_conv,
    check_map,
    check_state,
    is_unmodified,
    output_proj,
    stored_precision,
)
from sparse_sr_attn.layers.batch_norm import ConvNorm, conv_norms
from sparse_sr_attn.states import WindowAttention

_SOURCE = "Zhang et al., arXiv 2203.06697"
_LARGEST_KEPT = 16
"""Side of the largest windows whose weights a state keeps without gradients. Larger ones have more weights per pixel,
which take more memory and cost more to write and read."""
_HINT = "call shared = GMSA(...).attend(x) and pass it: later(x, shared)"


@LAYERS.register("SharedGMSA", kind="consumer", source=_SOURCE)
class SharedGMSA(AttentionLayer):
    r"""Shared attention of ELAN: $x + \rho\,\mathrm{conv}([P_1 V_1, \dots, P_n V_n])$ with the weights of a GMSA.

    $V$ is a normalised 1x1 convolution of $x$; its channels are split into as many groups as there are weights.

    Args:
        embed_dim: channels of the feature map, >= 1; that of the provider may differ.
        res_scale: $\rho$, factor on the attention; 0 disables it.
        zero_init: initialise the output convolution with zeros, so that the layer starts as the identity.

    Raises:
        ConfigError: options are invalid; the message names all of them.

    Note:
        Gradients flow into the state, hence into the query convolution of the provider.

    Source:
        The accelerated self-attention of arXiv 2203.06697 with the weights of another layer.

    Examples:
        >>> first, later, x = GMSA(60), SharedGMSA(60), torch.rand(1, 60, 24, 24)
        >>> shared = first.attend(x)
        >>> later(first(x, shared), shared).shape
        torch.Size([1, 60, 24, 24])
    """

    requires: ClassVar[type | None] = WindowAttention

    @checked
    def __init__(self, embed_dim: PositiveInt, *, res_scale: Finite = 1.0, zero_init: bool = False) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.res_scale = res_scale
        self.value = ConvNorm(embed_dim, embed_dim)
        self.output = output_proj(embed_dim, zero_init=zero_init)

    def extra_repr(self) -> str:
        """Return the options that are not visible from shapes."""
        return f"res_scale={self.res_scale}"

    def forward(self, x: Float[Tensor, "b c h w"], state: WindowAttention | None = None) -> Float[Tensor, "b c h w"]:
        """Return `x` plus its values weighted by the state.

        Raises:
            SharingError: `state` is not a WindowAttention.
            ShapeError: `x` is not a map of `embed_dim` channels, or the state was computed for another size.
        """
        check_map(x, self.embed_dim)
        state = check_state(state, WindowAttention, x, _HINT)
        return self._add_to(x, self._attended(self.value(channels_last(x)), state))

    def _add_to(self, x: Tensor, attended: Tensor) -> Tensor:
        return add_conv(x, self.output, attended, self.res_scale)

    def _attended(self, value: Tensor, state: WindowAttention) -> Tensor:
        sizes = state.window_sizes
        moves = [window_shifts(size, state.shift, state.exact_shift) for size in sizes]
        shifts, unshifts = zip(*moves, strict=True)
        if all(weights is None for weights in state.weights):
            query = cast(Tensor, state.query)
            return grouped_window_attention(query, value, window_sizes=sizes, shifts=shifts, unshifts=unshifts)
        values = split_groups(value, len(sizes))
        outputs = []
        for weights, own, group, size, (shift, unshift) in zip(
            state.weights, group_queries(state), values, sizes, moves, strict=False
        ):
            options: dict[str, Any] = {"window_size": size, "shift": shift, "unshift": unshift}
            outputs.append(
                window_attention(cast(Tensor, own), None, group, **options)
                if weights is None
                else apply_window_weights(weights, group, **options)
            )
        return torch.cat(outputs, dim=1)


@LAYERS.register("GMSA", kind="layer", source=_SOURCE)
class GMSA(AttentionLayer):
    r"""Group-wise multi-scale self-attention: each group of channels attends inside windows of its own size.

    $$P_g = \mathrm{softmax}(Q_g Q_g^\top), \quad y = x + \rho\,\mathrm{conv}([P_1 V_1, \dots, P_n V_n])$$

    $Q$ and $V$ are normalised 1x1 convolutions of $x$. There is no key and no factor on the scores.

    Args:
        embed_dim: channels of the feature map, >= 1, split as evenly as possible, larger groups first (64 = 22 + 21 +
            21); empty groups are dropped.
        window_sizes: side of the windows of each group in pixels, in [1, 1024]. Windows may be larger than the map.
        shift: shift all windows cyclically by half their size, rounded down.
        exact_shift: shift the result back by the same amount. With `False`, as published, windows of odd size are
            shifted back one pixel less, which displaces the result.
        res_scale: $\rho$, factor on the attention; 0 disables it.
        zero_init: initialise the output convolution with zeros, so that the layer starts as the identity.

    Raises:
        ConfigError: options are invalid; the message names all of them.

    Note:
        In training, normalisation uses the statistics of the batch, without padding. A state holds `window_size**2`
        numbers per pixel and group.

    Source:
        GMSA of arXiv 2203.06697. Deviations 11-15 of `docs/deviations.md`.

    Examples:
        >>> GMSA(60, window_sizes=(4, 8, 12))(torch.rand(1, 60, 24, 24)).shape
        torch.Size([1, 60, 24, 24])
    """

    provides: ClassVar[type | None] = WindowAttention

    @checked
    def __init__(
        self,
        embed_dim: PositiveInt,
        *,
        window_sizes: Sequence[WindowSize] = (4, 8, 16),
        shift: bool = False,
        exact_shift: bool = True,
        res_scale: Finite = 1.0,
        zero_init: bool = False,
    ) -> None:
        super().__init__()
        if not window_sizes:
            raise ConfigError([Problem("window_sizes", "must name at least one window size, got none")])
        self.embed_dim = embed_dim
        self.window_sizes = tuple(window_sizes)[:embed_dim]
        self.shift = shift
        self.exact_shift = exact_shift
        self.zero_init = zero_init
        self.query = ConvNorm(embed_dim, embed_dim)
        self.shared = SharedGMSA(embed_dim, res_scale=res_scale, zero_init=zero_init)

    def extra_repr(self) -> str:
        """Return the options that are not visible from shapes."""
        return f"window_sizes={self.window_sizes}, shift={self.shift}, exact_shift={self.exact_shift}"

    def attend(self, x: Float[Tensor, "b c h w"]) -> WindowAttention:
        """Compute the attention weights of `x`, for any h, w >= 1.

        Raises:
            ShapeError: `x` is not a map of `embed_dim` channels.
        """
        check_map(x, self.embed_dim)
        query = self.query(channels_last(x))
        num_groups = len(self.window_sizes)
        if fuses_groups(query, num_groups):
            return self._state_of(query, x)
        keeps_all = torch.is_grad_enabled() or is_exporting()
        weights: list[Tensor | None] = []
        for group, size in zip(split_groups(query, num_groups), self.window_sizes, strict=True):
            kept = None
            if keeps_all or size <= _LARGEST_KEPT:
                shift, _ = window_shifts(size, self.shift, self.exact_shift)
                kept = window_weights(group, window_size=size, shift=shift, dtype=stored_precision(query))
            weights.append(kept)
        needs_query = any(kept is None for kept in weights)
        return self._state(weights, query.to(working_precision(query)) if needs_query else None, x)

    def forward(self, x: Float[Tensor, "b c h w"], state: WindowAttention | None = None) -> Float[Tensor, "b c h w"]:
        """Return `x` plus its attention, with the weights of `state` if given, else its own.

        Raises:
            SharingError: `state` is not a WindowAttention.
            ShapeError: `x` is not a map of `embed_dim` channels, or the state was computed for another size.
        """
        if state is not None:
            return self.shared(x, state)
        check_map(x, self.embed_dim)
        if not is_unmodified(self.shared, SharedGMSA):
            return self.shared(x, self._state_of(self.query(channels_last(x)), x))
        return self.shared._add_to(x, self._attended(x)[0])  # frees the state first

    def attend_and_apply(self, x: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b c h w"], WindowAttention]:
        """Return `forward(x)` and `attend(x)`; on GPUs with Triton, queries and values are computed together.

        Raises:
            ShapeError: `x` is not a map of `embed_dim` channels.
        """
        check_map(x, self.embed_dim)
        fuses = fuses_groups(x, len(self.window_sizes))
        if not fuses or not is_unmodified(self, GMSA) or not is_unmodified(self.shared, SharedGMSA):
            return super().attend_and_apply(x)
        attended, state = self._attended(x)
        return self.shared._add_to(x, attended), state

    def _attended(self, x: Tensor) -> tuple[Tensor, WindowAttention]:
        """Return the values weighted by the attention, and a state that has no weights."""
        query, value = self._query_and_value(channels_last(x))
        state = self._state_of(query, x)
        return self.shared._attended(value, state), state

    def _query_and_value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return conv_norms(x, self.query, self.shared.value) or (self.query(x), self.shared.value(x))

    def _state_of(self, query: Tensor, x: Tensor) -> WindowAttention:
        return self._state([None] * len(self.window_sizes), query, x)

    def _state(self, weights: Sequence[Tensor | None], query: Tensor | None, x: Tensor) -> WindowAttention:
        return WindowAttention(tuple(weights), query, self.window_sizes, self.shift, self.exact_shift, *x.shape[-2:])

    def make_consumer(self) -> SharedGMSA:
        """Create a `SharedGMSA` with the width, `res_scale` and `zero_init` of this layer."""
        return SharedGMSA(self.embed_dim, res_scale=self.shared.res_scale, zero_init=self.zero_init)


def group_queries(state: WindowAttention) -> Sequence[Float[Tensor, "b _ h w"] | None]:
    """Return the queries of each group; `None` where the state has the weights of all groups."""
    num_groups = len(state.window_sizes)
    return [None] * num_groups if state.query is None else split_groups(state.query, num_groups)


def window_shifts(window_size: int, shift: bool, exact: bool) -> tuple[int, int]:
    """Return the pixels by which windows of this size are shifted, and shifted back."""
    if not shift:
        return 0, 0
    return (window_size // 2 if exact else -(-window_size // 2)), window_size // 2
