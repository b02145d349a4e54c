"""Cluster attention by torch's FlexAttention: sorted rows under a block mask.

Queries are in slot order. So are keys, but the last chunks are repeated before the first one and the first ones after
the last, so that each chunk sees one contiguous run of slots. The kernel is compiled once per chunk size for all image
sizes (and once more for the second size, from which torch learns what varies). If a table lists the neighbours of each
chunk, keys are not repeated and the table becomes the mask.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparse_sr_attn.errors import BackendError
from sparse_sr_attn.functional._torch import modulo, without_autocast, working_precision
from sparse_sr_attn.functional.cluster.layout import ClusterLayout
from sparse_sr_attn.states import ClusterPattern

_GPU_BLOCK = 128  # slots in a block of the mask on GPUs, whose kernels do not take any number; elsewhere, a chunk

_compiled: Callable[..., Any] | None = None


def cluster_attention(
    query: Tensor, key: Tensor, value: Tensor, pattern: ClusterPattern, scale: float, *, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Return `cluster.cluster_attention`, computed in float32, and, if `with_lse`, `cluster.cluster_lse`.

    Raises:
        BackendError: an input is float64, a gradient or the logsumexp is needed on the CPU, or torch cannot build the
            kernel.
    """
    _check(query, key, value)
    request = {}
    if with_lse:
        if query.device.type == "cpu":
            raise BackendError("backend 'flex' has no logsumexp on 'cpu'; 'tiles' and 'eager' work there")
        from torch.nn.attention.flex_attention import AuxRequest  # noqa: PLC0415

        request["return_aux"] = AuxRequest(lse=True)
    layout = ClusterLayout.of(pattern)
    slot = torch.arange(layout.num_slots, device=query.device)
    seen, block_mask = _seen(pattern, _GPU_BLOCK if query.is_cuda else layout.chunk_size)
    # Rows of the whole batch: to take them by one number is many times faster than `gather`.
    token = pattern.order + torch.arange(len(query), device=query.device)[:, None] * layout.num_tokens
    with without_autocast(query):
        queries = _rows(query, token[:, layout.rank(slot)])
        keys, values = (_rows(rows, token[:, layout.rank(seen)]) for rows in (key, value))
        result = _run(queries, keys, values, block_mask=block_mask, scale=scale, **request)

    def by_token(slots: Tensor) -> Tensor:
        rows = slots[:, 0, : layout.num_tokens].flatten(0, 1)
        return torch.empty_like(rows).index_copy(0, token.flatten(), rows).view(*pattern.order.shape, *rows.shape[1:])

    output, lse = (result[0], by_token(result[1].lse)) if with_lse else (result, None)
    return by_token(output).to(value.dtype), lse


def _rows(rows: Tensor, token: Tensor) -> Tensor:
    """Return the rows of tokens (b, s) of the whole batch in float32, for one head: (b, 1, s, c)."""
    return rows.reshape(-1, rows.shape[-1])[token].float()[:, None]


def _seen(pattern: ClusterPattern, block: int) -> tuple[Tensor, Any]:
    """Return the slot of each key, and the block mask for blocks of `block` queries and keys."""
    layout, device = ClusterLayout.of(pattern), pattern.order.device
    if pattern.neighbors is not None:
        return torch.arange(layout.num_slots, device=device), _table_mask(layout, pattern.neighbors, block)
    reach = layout.num_adjacent * layout.chunk_size
    seen = modulo(torch.arange(-reach, layout.num_slots + reach, device=device), layout.num_slots)
    return seen, _block_mask(layout, seen, block)


def _table_mask(layout: ClusterLayout, neighbors: Tensor, block: int) -> Any:
    """Return the block mask for a table of the chunks that each chunk sees."""
    from torch.nn.attention.flex_attention import BlockMask  # noqa: PLC0415

    i, k, device = layout.chunk_size, layout.num_chunks, neighbors.device
    sees = torch.zeros(len(neighbors), k, k, dtype=torch.bool, device=device).scatter_(2, neighbors, True)
    length, real, last = (torch.full((), number, device=device) for number in (i, layout.num_tokens, k - 1))

    def mask(sample: Tensor, _h: Tensor, query: Tensor, place: Tensor) -> Tensor:
        visible = place < real
        if block == i:  # as on the ring
            return visible
        return visible & sees[sample, (query // length).minimum(last), (place // length).minimum(last)]

    num_blocks = -(-layout.num_slots // block)
    begin = torch.arange(num_blocks, device=device)[:, None] * block
    # The chunks in each block, the last one again where there are fewer than in others.
    chunk = begin // i + torch.arange((block - 2) // i + 2, device=device)
    chunk = chunk.minimum(((begin + block).clamp(max=layout.num_slots) - 1) // i)
    pairs = sees[:, chunk][..., chunk]  # of blocks and of chunks in them: (b, blocks, chunks, blocks, chunks)
    some = pairs.any(dim=4).any(dim=2)
    whole = pairs.all(dim=4).all(dim=2) & ((begin + block)[:, 0] <= layout.num_tokens)
    return BlockMask.from_kv_blocks(
        *_listed(some & ~whole),
        *_listed(some & whole),
        BLOCK_SIZE=(block, block),
        mask_mod=mask,
        seq_lengths=(layout.num_slots, layout.num_slots),
        compute_q_blocks=neighbors.is_cuda,  # for the backward
    )


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of chosen columns in each row of tables (b, r, c), and their indices, for all heads."""
    front = chosen.int().argsort(dim=2, descending=True, stable=True)
    return chosen.sum(dim=2, dtype=torch.int32)[:, None], front.int()[:, None]


def _block_mask(layout: ClusterLayout, seen: Tensor, block: int) -> Any:
    """Return the block mask for a ring of chunks.

    Args:
        layout: layout of the pattern.
        seen: the slot of each key.
        block: slots in a block.
    """
    from torch.nn.attention.flex_attention import BlockMask  # noqa: PLC0415

    i, a = layout.chunk_size, layout.num_adjacent
    # A chunk sees those `behind` to `ahead` of the chunk that stands at its own number (which is `a` chunks before it).
    behind, ahead = a - layout.reach[0], a + layout.reach[1]
    num_real = layout.num_tokens if layout.count_keys_once else layout.num_slots
    # As tensors, which are inputs of the compiled kernel and no part of it.
    numbers = (i, behind, ahead, -a * i % layout.num_slots, layout.num_slots, num_real)
    length, least, most, begins, slots, real = (torch.full((), number, device=seen.device) for number in numbers)

    def mask(_b: Tensor, _h: Tensor, query: Tensor, place: Tensor) -> Tensor:
        visible = (place + begins) % slots < real
        if block == i:  # and blocks say all else (the CPU's kernel cannot be built from a question about queries)
            return visible
        offset = place // length - query // length
        return visible & (offset >= least) & (offset <= most)

    num_query_blocks, num_key_blocks = -(-layout.num_slots // block), -(-len(seen) // block)
    begin = torch.arange(num_query_blocks, device=seen.device) * block
    first, last = begin // i, ((begin + block).clamp(max=layout.num_slots) - 1) // i  # chunks in a block of queries
    widest = -(-((block - 2) // i + 2 + ahead - behind) * i // block) + 1  # blocks that a block of queries may see
    column = (first + behind) * i // block
    number = column[:, None] + torch.arange(min(widest, num_key_blocks), device=seen.device)
    start, stop = number * block, (number + 1) * block
    some = (start < ((last + ahead + 1) * i)[:, None]) & (number < num_key_blocks)
    hidden = torch.nn.functional.pad(seen >= num_real, (0, num_key_blocks * block - len(seen)), value=True)
    whole = ~hidden.view(num_key_blocks, block).any(dim=1)[number.clamp(max=num_key_blocks - 1)]
    whole &= (start >= ((last + behind) * i)[:, None]) & (stop <= ((first + ahead + 1) * i)[:, None])

    def listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
        front = number.clamp(max=num_key_blocks - 1).gather(
            1, chosen.int().argsort(dim=1, descending=True, stable=True)
        )
        indices = torch.nn.functional.pad(front, (0, num_key_blocks - front.shape[1]))
        return chosen.sum(dim=1, dtype=torch.int32)[None, None], indices.int()[None, None]

    return BlockMask.from_kv_blocks(
        *listed(some & ~whole),
        *listed(some & whole),
        BLOCK_SIZE=(block, block),
        mask_mod=mask,
        seq_lengths=(layout.num_slots, len(seen)),
        compute_q_blocks=seen.is_cuda,  # for the backward
    )


def _check(*rows: Tensor) -> None:
    wide = [tensor.dtype for tensor in rows if working_precision(tensor) != torch.float32]
    if wide:
        raise BackendError(f"backend 'flex' computes in float32, got {wide[0]}; 'tiles' and 'eager' compute in it")
    if rows[0].device.type == "cpu" and torch.is_grad_enabled() and any(tensor.requires_grad for tensor in rows):
        raise BackendError(
            "backend 'flex' has no gradient on 'cpu', and an input requires one; 'tiles' and 'eager' have, or use "
            "torch.no_grad()"
        )


def _run(*rows: Tensor, **options: Any) -> Any:
    from torch.nn.attention.flex_attention import flex_attention  # noqa: PLC0415

    attention: Callable[..., Any] = flex_attention
    if torch.compiler.is_compiling():
        return attention(*rows, **options)
    global _compiled  # noqa: PLW0603  (compiled code belongs to the process)
    if _compiled is None:
        _compiled = torch.compile(attention, dynamic=True)
    try:
        return _compiled(*rows, **options)
    except Exception as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise BackendError(
            f"backend 'flex' needs torch.compile, which cannot build its kernel here: {reason}; "
            "'tiles' and 'eager' need no compiler"
        ) from error
