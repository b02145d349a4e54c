"""Floating-point operations of our operators, for `torch.utils.flop_counter`.

As in torch's own formulas, only matrix products count, with a multiplication and an addition per term. Slots that pad
the last chunk or window count like others, because they are computed; so do scores that a backward recomputes.
"""

import sys
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch

Shape = tuple[int, ...]
"""The shape of a tensor, which `torch.utils.flop_counter` passes to formulas in its place (`None` for `None`)."""


def _scores(order: Shape, _neighbors: Shape | None, chunk_size: int, num_adjacent: int, exact_keys: bool) -> int:
    """Return the number of scores of a pattern: slots times keys per slot."""
    b, n = order
    chunk_size = min(chunk_size, n) if exact_keys else chunk_size
    return b * -(-n // chunk_size) * (2 * num_adjacent + 1) * chunk_size**2


def _cluster_attention(query: Shape, key: Shape, value: Shape, order: Shape, *options: Any, **_: Any) -> int:
    return 2 * _scores(order, *options[:4]) * (query[-1] + value[-1])


def _cluster_attention_backward(
    grad: Shape, _lse: Shape, query: Shape, key: Shape, value: Shape, order: Shape, *options: Any, **_: Any
) -> int:
    return 2 * _scores(order, *options[:4]) * (3 * query[-1] + 2 * value[-1])


def _triton_backward(
    grad: Shape,
    _lse: Shape,
    query: Shape,
    key: Shape,
    value: Shape,
    order: Shape,
    neighbors: Shape | None,
    _largest: Shape,
    _inverse: Shape,
    *options: Any,
    **_: Any,
) -> int:
    # Two kernels, each of which computes scores and gradients of weights.
    return 2 * _scores(order, neighbors, *options[:3]) * (5 * query[-1] + 3 * value[-1])


def _cluster_weights(query: Shape, key: Shape, order: Shape, *options: Any, **_: Any) -> int:
    return 2 * _scores(order, *options[:4]) * query[-1]


def _cluster_weights_backward(grad: Shape, _lse: Shape, weights: Shape, query: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(weights) * 2 * query[-1]


def _cluster_lse_backward(grad: Shape, query: Shape, key: Shape, order: Shape, *options: Any, **_: Any) -> int:
    return 2 * _scores(order, *options[:4]) * 3 * query[-1]


def _apply_cluster_weights(weights: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(weights) * value[-1]


def _apply_backward(grad: Shape, weights: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(weights) * 2 * (value[1] if len(value) == 4 else value[-1])


def _window_scores(like: Shape, window_size: int) -> int:
    b, _, h, w = like
    return b * -(-h // window_size) * -(-w // window_size) * window_size**4


def _window_weights(query: Shape, key: Shape | None, window_size: int, *_: Any, **__: Any) -> int:
    return 2 * _window_scores(query, window_size) * query[1]


def _window_weights_backward(grad: Shape, weights: Shape, query: Shape, key: Shape | None, *_: Any, **__: Any) -> int:
    return 2 * prod(weights) * (1 if key is None else 2) * query[1]


def _apply_window_weights(weights: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(weights) * value[1]


def _in_groups(like: Shape, groups: Sequence[Sequence[int]], query_products: int, value_products: int) -> int:
    sizes, _, _, query_widths, value_widths = groups
    return sum(
        2 * _window_scores(like, size) * (query_products * query + value_products * value)
        for size, query, value in zip(sizes, query_widths, value_widths, strict=False)
    )


def _window_attention(query: Shape, key: Shape | None, value: Shape, *groups: Any, **_: Any) -> int:
    return _in_groups(value, groups[:5], 1, 1)


def _window_attention_backward(
    grad: Shape, query: Shape, key: Shape | None, value: Shape, *groups: Any, **_: Any
) -> int:
    return _in_groups(grad, groups[:5], 2 if key is None else 3, 2)


def _grouped_window_attention(query: Shape, value: Shape, *groups: Sequence[int], **_: Any) -> int:
    return _in_groups(value, groups, 1, 1)


def _grouped_window_attention_backward(grad: Shape, *maps_and_groups: Any, **_: Any) -> int:
    return _in_groups(grad, maps_and_groups[-5:], 2, 3)


def _sparsemax(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return 2 * query[0] * query[1] * key[1] * (query[-1] + value[-1])


def _sparsemax_backward(grad: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return 2 * query[0] * query[1] * key[1] * (3 * query[-1] + 2 * value[-1])


def _nearest_rows(rows: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(rows) * rows[1]


def _nearest(points: Shape, centroids: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(points) * centroids[0]


def _hash(points: Shape, rotations: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(points) * rotations[0] * rotations[1]


def _pointwise(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(x) * weight[0]


def _pointwise_backward(grad: Shape, x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * 2 * prod(x) * weight[0]


def _conv1x1_backward(grad: Shape, x: Shape, weight: Shape, *options: Any, **_: Any) -> int:
    return 2 * prod(grad) * x[1] * sum(options[-2:])  # which gradients are wanted


def _conv1x1_norm(x: Shape, weights: Sequence[Shape], *_: Any, **__: Any) -> int:
    return sum(_pointwise(x, weight) for weight in weights)


def _conv1x1_batch_norm_backward(
    grads: Sequence[Shape], outputs: Sequence[Shape], x: Shape, weights: Sequence[Shape], *options: Any, **_: Any
) -> int:
    return (2 + options[-1]) * _conv1x1_norm(x, weights)  # of gradients and outputs with the input; that of the input


_FORMULAS: dict[str, Callable[..., int]] = {
    "cluster_attention": _cluster_attention,
    "cluster_attention_backward": _cluster_attention_backward,
    "cluster_attention_triton": _cluster_attention,
    "cluster_attention_triton_backward": _triton_backward,
    "cluster_weights": _cluster_weights,
    "cluster_weights_backward": _cluster_weights_backward,
    "cluster_lse": _cluster_weights,
    "cluster_lse_backward": _cluster_lse_backward,
    "apply_cluster_weights": _apply_cluster_weights,
    "apply_cluster_weights_backward": _apply_backward,
    "window_weights": _window_weights,
    "window_weights_backward": _window_weights_backward,
    "apply_window_weights": _apply_window_weights,
    "apply_window_weights_backward": _apply_backward,
    "window_attention": _window_attention,
    "window_attention_backward": _window_attention_backward,
    "grouped_window_attention": _grouped_window_attention,
    "grouped_window_attention_backward": _grouped_window_attention_backward,
    "sparsemax_attention": _sparsemax,
    "sparsemax_attention_backward": _sparsemax_backward,
    "nearest": _nearest,
    "nearest_rows": _nearest_rows,
    "nearest_centroid_triton": _nearest,
    "kmeans_step": _nearest,
    "hash_step": _hash,
    "pointwise_conv2d": _pointwise,
    "pointwise_conv2d_backward": _pointwise_backward,
    "conv1x1": _pointwise,
    "conv1x1_norm": _conv1x1_norm,
    "conv1x1_statistics": _conv1x1_norm,
    "conv1x1_batch_norm_backward": _conv1x1_batch_norm_backward,
    "conv1x1_backward": _conv1x1_backward,
}


def teach_flop_counters() -> None:
    """Register the formulas with `torch.utils.flop_counter` and with the counters that are active now.

    Layers call this; it does nothing until `torch.utils.flop_counter` has been imported elsewhere, because that imports
    triton, which takes longer than all of this package. Counters copy the registered formulas when they are created,
    which may be earlier.

    Examples:
        >>> from torch.utils.flop_counter import FlopCounterMode
        >>> teach_flop_counters()
        >>> with FlopCounterMode(display=False) as counter:
        ...     _ = LCoA(8, chunk_size=4)(torch.rand(1, 8, 6, 6))
        >>> counter.get_total_flops() > 0
        True
    """
    counting = sys.modules.get("torch.utils.flop_counter")
    if counting is None or torch.compiler.is_compiling() or not torch._C._len_torch_dispatch_stack():
        return
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack  # noqa: PLC0415

    operators = {
        getattr(torch.ops.sparse_sr_attn, name): formula
        for name, formula in _FORMULAS.items()
        if hasattr(torch.ops.sparse_sr_attn, name)
    }
    for operator, formula in operators.items():
        if operator not in counting.flop_registry:
            counting.register_flop_formula(operator)(formula)
    for mode in _get_current_dispatch_mode_stack():
        counter = getattr(mode, "counter", None)
        if isinstance(counter, counting.FlopCounterMode):
            counter.flop_registry |= {operator: counting.flop_registry[operator] for operator in operators}
