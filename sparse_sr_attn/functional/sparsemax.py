r"""Sparsemax, and attention with it in place of the softmax.

$$\mathrm{sparsemax}(z) = \arg\min_{p \ge 0,\ \sum p = 1} \lVert p - z \rVert^2 = \max(z - \tau(z), 0)$$

Martins and Astudillo, "From Softmax to Sparsemax", ICML 2016. Attention has two backends with equal results: *eager*,
on whole tensors, for export; and *tiles*, a custom operator that holds the scores of a few queries at a time, so that
its memory does not grow with the square of the number of tokens.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sparse_sr_attn.functional._operators import operator
from sparse_sr_attn.functional._torch import without_autocast, working_precision
from sparse_sr_attn.functional.backend import uses_operator

Backend = Literal["auto", "eager", "tiles"]
"""How attention with sparsemax is computed."""

_SCORES_PER_TILE = 2**20
_FIXED_ONE = 2**40  # numbers in fixed point: steps of 1e-12, and no overflow below four million scores
_FIRST_GUESS = 64  # of how many scores are not zero afterwards; more are looked at where that is too few


def sparsemax(scores: Float[Tensor, "*r n"]) -> Float[Tensor, "*r n"]:
    """Return the point of the probability simplex that is closest to each row.

    Args:
        scores: any numbers; adding a constant to a row has no effect.

    Returns:
        Rows that are >= 0 and sum to 1; entries whose score is 1 or more below the largest are exactly 0.

    Note:
        Differentiable: the gradient is centred on the support and 0 elsewhere.

    Examples:
        >>> sparsemax(torch.tensor([[0.0, 0.5, 1.0, -3.0]]))
        tensor([[0.0000, 0.2500, 0.7500, 0.0000]])
    """
    scores = scores - scores.detach().amax(dim=-1, keepdim=True)
    support = scores.detach() > _threshold(scores.detach(), scores.shape[-1])[0]
    total = torch.where(support, scores, 0).sum(dim=-1, keepdim=True)
    threshold = (total - 1) / support.sum(dim=-1, keepdim=True)
    return torch.where(support, scores - threshold, 0)


def sparsemax_attention(
    query: Float[Tensor, "b n d"],
    key: Float[Tensor, "b m d"],
    value: Float[Tensor, "b m e"],
    *,
    scale: float = 1.0,
    backend: Backend = "auto",
) -> Float[Tensor, "b n e"]:
    r"""Return $\mathrm{sparsemax}(\mathrm{scale} \cdot Q K^\top) V$.

    Args:
        query: one row per token.
        key: one row per token attended to.
        value: one row per token attended to.
        scale: factor on the dot products, dimensionless; larger values give sparser weights.
        backend: "eager", "tiles", or "auto" for tiles except in export.

    Returns:
        One row per query, in the dtype of `value`; scores and weights are computed in float32 or higher.

    Raises:
        BackendError: `backend` is unknown or cannot run here.

    Note:
        Time grows as `n * m`. Tiles recompute the weights in the backward.

    Examples:
        >>> query, key, value = torch.rand(1, 16, 8), torch.rand(1, 20, 8), torch.rand(1, 20, 32)
        >>> sparsemax_attention(query, key, value, scale=4.0).shape
        torch.Size([1, 16, 32])
    """
    if uses_operator(backend, "tiles"):
        return _attention_op(query, key, value, scale)
    dtype = working_precision(query)
    with without_autocast(query):
        weights = sparsemax(scale * query.to(dtype) @ key.to(dtype).transpose(-1, -2))
        return weights.to(value.dtype) @ value


def _threshold(scores: Tensor, num_largest: int) -> tuple[Tensor, Tensor]:
    """Return the threshold of each row and the number of scores above it, from its `num_largest` largest scores.

    The largest score must be 0, so that nothing below -1 counts. The scores that count are found in integers, because
    torch has no deterministic cumulative sum of floats on a GPU.
    """
    largest = scores.topk(num_largest, dim=-1).values
    rank = torch.arange(1, num_largest + 1, device=scores.device)
    fixed = (largest.clamp(min=-1) * _FIXED_ONE).long()
    size = (rank * fixed > fixed.cumsum(dim=-1) - _FIXED_ONE).sum(dim=-1, keepdim=True).clamp(min=1)
    total = torch.where(rank <= size, largest, 0).sum(dim=-1, keepdim=True)
    return (total - 1) / size, size


def _weights(scores: Tensor) -> Tensor:
    """Return the sparsemax without gradient, from as few of the scores as suffice for an exact result."""
    scores = scores - scores.amax(dim=-1, keepdim=True)
    num_scores = scores.shape[-1]
    num_largest = min(_FIRST_GUESS, num_scores)
    threshold, size = _threshold(scores, num_largest)
    while num_largest < num_scores and bool((size == num_largest).any()):
        num_largest = min(4 * num_largest, num_scores)
        threshold, size = _threshold(scores, num_largest)
    return (scores - threshold).clamp(min=0)


def _tiles(query: Tensor, key: Tensor) -> Iterator[tuple[int, slice]]:
    """Yield (sample, slice of queries) for all samples."""
    step = max(1, _SCORES_PER_TILE // key.shape[1])
    for sample in range(len(query)):
        for start in range(0, query.shape[1], step):
            yield sample, slice(start, start + step)


@operator("sparsemax_attention")
def _attention_op(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    dtype = working_precision(query)
    with without_autocast(query):
        q, k = query.to(dtype), key.to(dtype)
        out = value.new_empty(*query.shape[:2], value.shape[-1])
        for sample, rows in _tiles(query, key):
            weights = _weights(scale * q[sample, rows] @ k[sample].T)
            out[sample, rows] = weights.to(value.dtype) @ value[sample]
        return out


@_attention_op.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    return value.new_empty(*query.shape[:2], value.shape[-1])


@operator("sparsemax_attention_backward")
def _attention_backward_op(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = working_precision(query)
    with without_autocast(query):
        q, k = query.to(dtype), key.to(dtype)
        grad_query, grad_key = q.new_empty(q.shape), k.new_zeros(k.shape)
        grad_value = value.new_zeros(value.shape, dtype=working_precision(value))
        for sample, rows in _tiles(query, key):
            weights = _weights(scale * q[sample, rows] @ k[sample].T)
            grad_weights = (grad[sample, rows] @ value[sample].T).to(dtype)
            support = weights > 0
            mean = (grad_weights * support).sum(dim=-1, keepdim=True) / support.sum(dim=-1, keepdim=True)
            grad_scores = scale * ((grad_weights - mean) * support)
            grad_query[sample, rows] = grad_scores @ k[sample]
            grad_key[sample] += grad_scores.T @ q[sample, rows]
            grad_value[sample] += (weights.to(value.dtype).T @ grad[sample, rows]).to(grad_value.dtype)
        return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype)


@_attention_backward_op.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *rows, ctx.scale = inputs
    ctx.save_for_backward(*rows)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_attention_backward_op(grad, *ctx.saved_tensors, ctx.scale), None)


_attention_op.register_autograd(_backward, setup_context=_context)
