"""How sorted tokens fill chunks, and which chunks see which: what all forms of cluster attention agree on."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sparse_sr_attn.functional.exporting import smaller
from sparse_sr_attn.functional.modulo import modulo
from sparse_sr_attn.states import ClusterPattern


@dataclass(frozen=True)
class ClusterLayout:
    """How `num_tokens` sorted tokens fill chunks, and which chunks see which.

    Attributes:
        num_tokens: tokens of a sample.
        chunk_size: slots in a chunk; with exact keys cut to the number of tokens.
        num_chunks: enough for all tokens.
        num_adjacent: chunks seen on each side.
        exact_keys: whether each key counts once.
    """

    num_tokens: int
    chunk_size: int
    num_chunks: int
    num_adjacent: int
    exact_keys: bool

    @classmethod
    def of(cls, pattern: ClusterPattern) -> "ClusterLayout":
        """Return the layout of a pattern; sizes may be symbolic."""
        num_tokens = pattern.order.shape[1]
        chunk_size = pattern.chunk_size
        if pattern.exact_keys:
            chunk_size = smaller(chunk_size, num_tokens)
        num_chunks = (num_tokens + chunk_size - 1) // chunk_size
        return cls(num_tokens, chunk_size, num_chunks, pattern.num_adjacent, pattern.exact_keys)

    @property
    def num_slots(self) -> int:
        """Places in all chunks, those past the last token too."""
        return self.num_chunks * self.chunk_size

    @property
    def num_offsets(self) -> int:
        """Chunks that a chunk sees, itself included."""
        return 2 * self.num_adjacent + 1

    def rank(self, slot: Int[Tensor, "*s"]) -> Int[Tensor, "*s"]:
        """Return which of the sorted tokens stands at a slot; past the last token, the one that fills it."""
        if self.exact_keys:
            # A token of the same chunk: weight 0 hides a number, but not a NaN from a chunk that must not be seen.
            return slot.clamp(max=self.num_tokens - 1)
        repeated = modulo(slot - (self.num_slots - self.num_tokens), self.num_tokens)
        return torch.where(slot >= self.num_tokens, repeated, slot)

    def visible(self, slot: Int[Tensor, "t j"]) -> Bool[Tensor, "t j"]:
        """Return which key slots of chunks (`t` rows of `slot`, their keys) count.

        Of the offsets that lead to the same chunk one counts: those from `-(k - 1) // 2` to `k // 2`.
        """
        if not self.exact_keys:
            return torch.ones_like(slot, dtype=torch.bool)
        a, k = self.num_adjacent, self.num_chunks
        # A quotient and not `repeat_interleave`, which ONNX export gets wrong for a number that depends on the image.
        offset = torch.arange(self.num_offsets * self.chunk_size, device=slot.device) // self.chunk_size - a
        met_once = (offset >= -((k - 1) // 2)) & (offset <= k // 2)
        return (slot < self.num_tokens) & met_once

    def hidden(self, chunk: int) -> list[slice]:
        """Return which keys of a chunk do not count, as runs of them: all that are not `visible`."""
        if not self.exact_keys:
            return []
        a, i, k = self.num_adjacent, self.chunk_size, self.num_chunks
        runs = []
        for offset in range(-a, a + 1):
            first, last = (offset + a) * i, (offset + a + 1) * i
            if not -((k - 1) // 2) <= offset <= k // 2:
                runs.append(slice(first, last))
            elif (chunk + offset) % k == k - 1 and self.num_slots > self.num_tokens:
                runs.append(slice(last - (self.num_slots - self.num_tokens), last))
        return runs
