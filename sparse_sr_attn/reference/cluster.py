"""Cluster attention by loops over chunks, and as dense attention with a count for each pair of tokens."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class PatternLike(Protocol):
    """The attributes of a pattern that these functions read; the library's own `ClusterPattern` has them."""

    @property
    def order(self) -> Tensor:
        """Token at each slot, `(b, n)`."""

    @property
    def chunk_size(self) -> int:
        """Requested slots in a chunk."""

    @property
    def num_adjacent(self) -> int:
        """Neighbouring chunks seen on each side."""

    @property
    def count_keys_once(self) -> bool:
        """Whether each key counts once, or as often as the published code counts it."""

    @property
    def neighbors(self) -> Tensor | None:
        """Chunks that each chunk sees, `(b, k, m)`; `None` for a ring."""


@dataclass(frozen=True, eq=False)
class ClusterPattern:
    """The order of the tokens, and how it is cut into chunks."""

    order: Tensor
    assignment: Tensor
    chunk_size: int
    num_adjacent: int
    count_keys_once: bool
    neighbors: Tensor | None = None


def cluster_pattern(
    assignment: Tensor,
    *,
    chunk_size: int,
    num_adjacent: int = 1,
    count_keys_once: bool = True,
    place: Tensor | None = None,
) -> ClusterPattern:
    """Sort the tokens of each sample by the rank `place` of their cluster (its index by default), then by position."""
    order = [
        [position for _, position in sorted((cluster, position) for position, cluster in enumerate(row))]
        for row in (assignment if place is None else place).tolist()
    ]
    return ClusterPattern(
        torch.tensor(order, dtype=torch.int64, device=assignment.device).reshape(assignment.shape),
        assignment,
        chunk_size,
        num_adjacent,
        count_keys_once,
    )


def nearest_chunks(key: Tensor, pattern: PatternLike) -> Tensor:
    """Return the chunks that each chunk sees by content: itself, then those of the most similar mean unit-length key.

    Products are compared in steps of 2**-20, the lower chunk wins a tie, and the own chunk fills the rest if there are
    too few.
    """
    num_seen = 2 * pattern.num_adjacent + 1
    samples = []
    for b, order in enumerate(pattern.order.tolist()):
        means = []
        for chunk in slot_tokens(order, pattern.chunk_size, True):
            rows = [key[b, token].detach() for token in chunk if token is not None]
            means.append(sum(row / row.norm().clamp(min=5e-5) for row in rows) / len(rows))
        table = []
        for t, mean in enumerate(means):
            steps = [round(float((mean * other).sum().nan_to_num()) * 2**20) for other in means]
            others = sorted((s for s in range(len(means)) if s != t), key=lambda s: (-steps[s], s))
            seen = [t, *others][:num_seen]
            table.append(seen + [t] * (num_seen - len(seen)))
        samples.append(table)
    return torch.tensor(samples, dtype=torch.int64, device=key.device)


def slot_tokens(order: list[int], chunk_size: int, count_keys_once: bool) -> list[list[int | None]]:
    """Cut one sample's slots into chunks of equal length: the token at each slot, None where a slot is empty.

    With `count_keys_once` a chunk is at most as long as the sample, and the last chunk ends in empty slots. Without,
    the tokens of the last slots are repeated, several times if necessary, to fill the last chunk.
    """
    num_tokens = len(order)
    length = min(chunk_size, num_tokens) if count_keys_once else chunk_size
    num_chunks = (num_tokens + length - 1) // length
    num_padding = num_chunks * length - num_tokens
    filling = (order[(slot - num_padding) % num_tokens] for slot in range(num_tokens, num_chunks * length))
    slots: list[int | None] = [*order, *(None if count_keys_once else token for token in filling)]
    return [slots[start : start + length] for start in range(0, num_chunks * length, length)]


def seen_tokens(
    chunks: list[list[int | None]], num_adjacent: int, count_keys_once: bool, neighbors: Tensor | None = None
) -> list[list[int | None]]:
    """Return the tokens each chunk sees in the order of axis `j`: offset by offset, None where nothing is seen.

    Chunks form a ring. If the ring is so short that a chunk appears at two offsets, then with `count_keys_once` it is
    seen only at the one closest to 0 (the positive one on a tie), else at both. A table of neighbours replaces the
    ring; its first columns count, at most one per chunk.
    """
    num_chunks = len(chunks)
    first, last = -((num_chunks - 1) // 2), num_chunks // 2
    seen: list[list[int | None]] = []
    for t in range(num_chunks):
        row: list[int | None] = []
        if neighbors is not None:
            for place, chunk in enumerate(neighbors[t].tolist()):
                row += [token if place < num_chunks else None for token in chunks[chunk]]
            seen.append(row)
            continue
        for offset in range(-num_adjacent, num_adjacent + 1):
            shown = first <= offset <= last or not count_keys_once
            row += [token if shown else None for token in chunks[(t + offset) % num_chunks]]
        seen.append(row)
    return seen


def _seen_tokens(chunks: list[list[int | None]], pattern: PatternLike, sample: int) -> list[list[int | None]]:
    neighbors = None if pattern.neighbors is None else pattern.neighbors[sample]
    return seen_tokens(chunks, pattern.num_adjacent, pattern.count_keys_once, neighbors)


def multiplicity(pattern: PatternLike) -> Tensor:
    """Return how often query token l sees key token m, `(b, l, m)` in image order.

    Counts are 0 or 1 with `count_keys_once`, else what the published code counts.
    """
    batch, num_tokens = pattern.order.shape
    counts = torch.zeros(batch, num_tokens, num_tokens, dtype=torch.int64)
    for b, order in enumerate(pattern.order.tolist()):
        chunks = slot_tokens(order, pattern.chunk_size, pattern.count_keys_once)
        seen = _seen_tokens(chunks, pattern, b)
        for slot, query in enumerate(order):
            for key in seen[slot // len(chunks[0])]:
                if key is not None:
                    counts[b, query, key] += 1
    return counts.to(pattern.order.device)


def visible_pairs(pattern: PatternLike) -> Tensor:
    """Return whether query token l sees key token m, `(b, l, m)` in image order."""
    return multiplicity(pattern) > 0


def dense_attention(query: Tensor, key: Tensor, value: Tensor, counts: Tensor, *, scale: float = 1.0) -> Tensor:
    """Softmax attention over all pairs of tokens, weighted by how often query l sees key m, `(b, n, n)`."""
    scores = scale * torch.einsum("bld,bmd->blm", query, key)
    scores = scores.masked_fill(counts == 0, float("-inf"))
    largest = scores.detach().amax(dim=-1, keepdim=True)
    powers = counts * torch.exp(scores - largest)
    weights = powers / powers.sum(dim=-1, keepdim=True)
    return torch.einsum("blm,bme->ble", weights.to(value.dtype), value)


def cluster_attention(query: Tensor, key: Tensor, value: Tensor, pattern: PatternLike, *, scale: float = 1.0) -> Tensor:
    """Cluster attention as dense attention with the counts of the pattern."""
    return dense_attention(query, key, value, multiplicity(pattern), scale=scale)


def cluster_weights(query: Tensor, key: Tensor, pattern: PatternLike, *, scale: float = 1.0) -> Tensor:
    """Softmax weights by chunks, one query at a time: `(b, k, i, j)` for chunk, slot in the chunk, slot seen.

    Slots that are not seen have weight 0, and so have the rows of slots past the last token.
    """
    samples = []
    for b, order in enumerate(pattern.order.tolist()):
        chunks = slot_tokens(order, pattern.chunk_size, pattern.count_keys_once)
        seen = _seen_tokens(chunks, pattern, b)
        length, num_seen = len(chunks[0]), len(seen[0])
        rows = []
        for slot in range(len(chunks) * length):
            row = query.new_zeros(num_seen)
            if slot < len(order):
                tokens = seen[slot // length]
                places = [place for place, token in enumerate(tokens) if token is not None]
                keys = torch.stack([key[b, token] for token in tokens if token is not None])
                scores = scale * (keys * query[b, order[slot]]).sum(dim=-1)
                powers = torch.exp(scores - scores.detach().max())
                row = row.index_add(0, torch.tensor(places, device=row.device), powers / powers.sum())
            rows.append(row)
        samples.append(torch.stack(rows).reshape(len(chunks), length, num_seen))
    return torch.stack(samples)


def apply_cluster_weights(weights: Tensor, value: Tensor, pattern: PatternLike) -> Tensor:
    """Weighted sum of values, one query at a time."""
    samples = []
    for b, order in enumerate(pattern.order.tolist()):
        chunks = slot_tokens(order, pattern.chunk_size, pattern.count_keys_once)
        seen = _seen_tokens(chunks, pattern, b)
        results: list[Tensor] = [value[b, 0]] * len(order)
        for slot, query in enumerate(order):
            chunk, row = divmod(slot, len(chunks[0]))
            places = [place for place, token in enumerate(seen[chunk]) if token is not None]
            tokens = [token for token in seen[chunk] if token is not None]
            results[query] = (weights[b, chunk, row, places, None] * value[b, tokens]).sum(dim=0)
        samples.append(torch.stack(results))
    return torch.stack(samples)


def cluster_lse(query: Tensor, key: Tensor, pattern: PatternLike, *, scale: float = 1.0) -> Tensor:
    """Logarithm of the summed exponentials of the scores that a token sees, one query at a time."""
    counts = multiplicity(pattern)
    samples = []
    for b in range(len(query)):
        row = []
        for n in range(query.shape[1]):
            scores = scale * (key[b] * query[b, n]).sum(dim=-1)
            largest = scores.detach().max()
            row.append(largest + torch.log((counts[b, n] * torch.exp(scores - largest)).sum()))
        samples.append(torch.stack(row))
    return torch.stack(samples)


def cluster_attention_rounds(
    query: Tensor, key: Tensor, value: Tensor, pattern: PatternLike, num_rounds: int, *, scale: float = 1.0
) -> Tensor:
    """Dense attention in which a key counts once for each time that a round shows it."""
    counts = multiplicity(pattern)
    totals = [counts[b * num_rounds : (b + 1) * num_rounds].sum(dim=0) for b in range(len(query))]
    return dense_attention(query, key, value, torch.stack(totals), scale=scale)
