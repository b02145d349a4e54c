"""Cluster attention on whole tensors, without loops or branches: for export and devices without a faster backend."""

import torch
from jaxtyping import Float
from torch import Tensor

from sparse_sr_attn.functional.cluster.layout import ClusterLayout
from sparse_sr_attn.states import ClusterPattern


class Eager:
    """Cluster attention on whole tensors with one pattern."""

    def __init__(self, pattern: ClusterPattern) -> None:
        self.order, self.neighbors = pattern.order, pattern.neighbors
        self.layout = layout = ClusterLayout.of(pattern)
        slot = torch.arange(layout.num_slots, device=self.order.device)
        self.token = self.order[:, layout.rank(slot)]
        keys = self._with_adjacent(slot.view(1, layout.num_chunks, layout.chunk_size, 1))[..., 0]
        self.visible = layout.visible(keys)

    def scores(self, query: Float[Tensor, "b n d"], key: Float[Tensor, "b n d"], scale: float) -> Tensor:
        """Return the scores `(b, k, i, j)` of each slot, -inf where a key is not seen."""
        scores = scale * self.chunks(query) @ self._with_adjacent(self.chunks(key)).transpose(-1, -2)
        return scores.masked_fill(~self.visible[..., None, :], float("-inf"))

    def apply(self, weights: Float[Tensor, "b k i j"], value: Float[Tensor, "b n e"]) -> Float[Tensor, "b n e"]:
        """Return the weighted sums of values, in image order."""
        return self.to_tokens(weights @ self._with_adjacent(self.chunks(value)))

    def lse(self, scores: Float[Tensor, "b k i j"]) -> Float[Tensor, "b n"]:
        """Return the logsumexp of the scores of each token, in image order."""
        return self.to_tokens(scores.logsumexp(dim=-1)[..., None])[..., 0]

    def to_tokens(self, chunks: Float[Tensor, "b k i c"]) -> Float[Tensor, "b n c"]:
        """Return the row of each token, in image order."""
        # By the slot of each token: strides of a slice to the tokens would tell export whether the last chunk is full.
        slot = torch.arange(self.layout.num_tokens, device=self.order.device).expand_as(self.order)
        inverse = torch.empty_like(self.order).scatter(1, self.order, slot)
        return chunks.flatten(1, 2).gather(1, inverse[..., None].expand(-1, -1, chunks.shape[-1]))

    def chunks(self, rows: Float[Tensor, "b n c"]) -> Float[Tensor, "b k i c"]:
        """Return the row at each slot; slots past the last token repeat a token."""
        index = self.token[..., None].expand(-1, -1, rows.shape[-1])
        of_slots = rows.gather(1, index)
        return of_slots.view(rows.shape[0], self.layout.num_chunks, self.layout.chunk_size, rows.shape[-1])

    def _with_adjacent(self, chunks: Tensor) -> Tensor:
        if self.neighbors is None:
            a = self.layout.num_adjacent
            return torch.cat([chunks.roll(-offset, dims=1) for offset in range(-a, a + 1)], dim=2)
        # An index and not `gather`, whose gradient depends on the run where a row is read twice, on GPUs.
        batch, num_chunks, _ = self.neighbors.shape
        sample = torch.arange(batch, device=chunks.device)[:, None]
        seen = chunks.expand(batch, -1, -1, -1)[sample, self.neighbors.flatten(1)]
        return seen.view(batch, num_chunks, self.layout.num_offsets * self.layout.chunk_size, chunks.shape[-1])
