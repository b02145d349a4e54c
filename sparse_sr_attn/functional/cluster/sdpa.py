"""Cluster attention by torch's scaled_dot_product_attention: sorted rows, in which each chunk sees one run of slots.

Keys and values are sorted together. The last chunks are repeated before the first one and the first ones after the
last, so that the run of slots that a chunk sees is a view. What depends on sizes only is kept.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from sparse_sr_attn.functional._torch import kept_on_device, may_keep, without_autocast, working_precision
from sparse_sr_attn.functional.cluster.layout import ClusterLayout
from sparse_sr_attn.states import ClusterPattern

_Fixed = tuple[Int[Tensor, "s"], Float[Tensor, "1 k 1 j"] | None]


def cluster_attention(
    query: Float[Tensor, "b n d"],
    key: Float[Tensor, "b n d"],
    value: Float[Tensor, "b n e"],
    pattern: ClusterPattern,
    scale: float,
) -> Float[Tensor, "b n e"]:
    """Return `cluster.cluster_attention` on a ring of chunks, computed in float32 or higher."""
    layout = ClusterLayout.of(pattern)
    i, (behind, ahead) = layout.chunk_size, layout.reach
    order, hidden = pattern.order, None
    with without_autocast(query):
        rows = torch.cat([key.to(working_precision(key)), value], dim=-1)
        if layout.num_slots > layout.num_tokens:
            rank, hidden = _fixed_on(layout, rows.dtype, rows.device)
            order = order.index_select(1, rank)
        queries, rows = (each.gather(1, order[..., None].expand(-1, -1, each.shape[-1])) for each in (query, rows))
        seen = _with_halo(rows, behind * i, ahead * i).unfold(1, (behind + 1 + ahead) * i, i).transpose(2, 3)
        keys, values = seen.split([key.shape[-1], value.shape[-1]], dim=-1)
        chunks = queries.to(rows.dtype).unflatten(1, (layout.num_chunks, i))
        output = F.scaled_dot_product_attention(chunks, keys, values, attn_mask=hidden, scale=scale)
        slots = output.flatten(1, 2)[:, : layout.num_tokens].to(value.dtype)
    return torch.empty_like(slots).scatter(1, pattern.order[..., None].expand_as(slots), slots)


def _with_halo(rows: Float[Tensor, "b s c"], behind: int, ahead: int) -> Float[Tensor, "b _ c"]:
    """Return rows on a ring with the last `behind` of them repeated before them, and the first `ahead` after them."""
    num_rows = rows.shape[1]
    turns = [rows] * (behind // num_rows + 1 + ahead // num_rows)
    return torch.cat([rows[:, num_rows - behind % num_rows :], *turns, rows[:, : ahead % num_rows]], dim=1)


def _fixed_on(layout: ClusterLayout, dtype: torch.dtype, device: torch.device) -> _Fixed:
    """Return the rank of each slot, and what to add to scores: -inf where a key does not count; `None` if all count."""
    rank, hidden = (_kept if may_keep(device) else _fixed)(layout, dtype, device)
    return rank, hidden


def _fixed(layout: ClusterLayout, dtype: torch.dtype, device: torch.device) -> _Fixed:
    slot = torch.arange(layout.num_slots, device=device)
    rank = layout.rank(slot)
    if not layout.count_keys_once:
        return rank, None
    (behind, ahead), i = layout.reach, layout.chunk_size
    padding = torch.zeros(layout.num_slots, dtype=dtype, device=device)
    padding = padding.masked_fill_(slot >= layout.num_tokens, float("-inf"))
    seen = _with_halo(padding[None, :, None], behind * i, ahead * i)
    return rank, seen[..., 0].unfold(1, (behind + 1 + ahead) * i, i)[:, :, None].contiguous()


_kept = kept_on_device(_fixed)
