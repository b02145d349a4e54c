"""How sorted tokens fill chunks, and which chunks see which; shared by all backends of cluster attention."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sparse_sr_attn.functional._torch import modulo, smaller
from sparse_sr_attn.states import ClusterPattern


@dataclass(frozen=True)
class ClusterLayout:
    """How `num_tokens` sorted tokens fill chunks, and which chunks see which.

    Attributes:
        num_tokens: tokens per sample.
        chunk_size: slots in a chunk; with `count_keys_once` at most the number of tokens.
        num_chunks: number of chunks needed for all tokens.
        num_adjacent: chunks seen on each side; with `nearest`, half the number of chunks seen besides a chunk's own.
        count_keys_once: whether each key counts once.
        nearest: whether a table (`ClusterPattern.neighbors`) rather than the ring defines the chunks that a chunk sees.
    """

    num_tokens: int
    chunk_size: int
    num_chunks: int
    num_adjacent: int
    count_keys_once: bool
    nearest: bool

    @classmethod
    def of(cls, pattern: ClusterPattern) -> "ClusterLayout":
        """Return the layout of a pattern; sizes may be symbolic."""
        return cls.of_order(
            pattern.order, pattern.neighbors, pattern.chunk_size, pattern.num_adjacent, pattern.count_keys_once
        )

    @classmethod
    def of_order(
        cls,
        order: Int[Tensor, "b n"],
        neighbors: Int[Tensor, "b k m"] | None,
        chunk_size: int,
        num_adjacent: int,
        count_keys_once: bool,
    ) -> "ClusterLayout":
        """Return the layout of a pattern given by its fields, as operators take them."""
        num_tokens = order.shape[1]
        if count_keys_once:
            chunk_size = smaller(chunk_size, num_tokens)
        num_chunks = (num_tokens + chunk_size - 1) // chunk_size
        return cls(num_tokens, chunk_size, num_chunks, num_adjacent, count_keys_once, neighbors is not None)

    @property
    def num_slots(self) -> int:
        """Number of slots in all chunks, including those past the last token."""
        return self.num_chunks * self.chunk_size

    @property
    def num_offsets(self) -> int:
        """Number of chunks that a chunk sees, including itself."""
        return 2 * self.num_adjacent + 1

    @property
    def reach(self) -> tuple[int, int]:
        """How many chunks before and after its own a chunk sees on a ring.

        If each key counts once, of several offsets that lead to the same chunk one is left (see `counted`).
        """
        a, k = self.num_adjacent, self.num_chunks
        return (min(a, (k - 1) // 2), min(a, k // 2)) if self.count_keys_once else (a, a)

    def rank(self, slot: Int[Tensor, "*s"]) -> Int[Tensor, "*s"]:
        """Return the index in `order` of the token at a slot; past the last token, of the one that pads it."""
        if self.count_keys_once:
            # A token of the same chunk: weight 0 hides a number, but not a NaN from a chunk that must not be seen.
            return slot.clamp(max=self.num_tokens - 1)
        repeated = modulo(slot - (self.num_slots - self.num_tokens), self.num_tokens)
        return torch.where(slot >= self.num_tokens, repeated, slot)

    @property
    def counted(self) -> tuple[int, int]:
        """The range of offsets that count among the chunks that a chunk sees, as (first, last + 1).

        On a ring several offsets may lead to the same chunk; those around the middle count. In a table, the first
        entries count.
        """
        first = 0 if self.nearest else self.num_adjacent - (self.num_chunks - 1) // 2
        return first, first + self.num_chunks

    def visible(self, slot: Int[Tensor, "*t j"]) -> Bool[Tensor, "*t j"]:
        """Return a mask of the key slots that count; each row of `slot` lists the keys of a chunk."""
        if not self.count_keys_once:
            return torch.ones_like(slot, dtype=torch.bool)
        # A quotient and not `repeat_interleave`, which ONNX export gets wrong for a number that depends on the image.
        place = torch.arange(self.num_offsets * self.chunk_size, device=slot.device) // self.chunk_size
        first, stop = self.counted
        return (slot < self.num_tokens) & (place >= first) & (place < stop)

    def ring(self, chunk: int) -> list[int]:
        """Return the chunks that a chunk sees on a ring."""
        a = self.num_adjacent
        return [(chunk + offset) % self.num_chunks for offset in range(-a, a + 1)]

    def hidden(self, seen: Sequence[int]) -> list[slice]:
        """Return the keys that do not count for a chunk that sees these chunks, as slices: those not `visible`."""
        if not self.count_keys_once:
            return []
        i, tail = self.chunk_size, self.num_slots - self.num_tokens
        first, stop = self.counted
        tail = tail if self.num_chunks - 1 in seen else 0
        runs: list[slice] = []
        if not tail and first <= 0 and len(seen) <= stop:
            return runs
        for place, chunk in enumerate(seen):
            last = (place + 1) * i
            if not first <= place < stop:
                runs.append(slice(last - i, last))
            elif tail and chunk == self.num_chunks - 1:
                runs.append(slice(last - tail, last))
        return runs
