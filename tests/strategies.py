"""Hypothesis strategies that draw sizes and a seed, never elements.

A failure then shrinks to the smallest sizes and prints as one line that can be pasted as an `@example`. Its numbers
come from a generator of its own; no global state is used.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from sparse_sr_attn.functional.cluster import cluster_pattern, with_nearest_chunks
from sparse_sr_attn.states import ClusterPattern
from sparse_sr_attn.testing.conformance.subject import generator


@dataclass(frozen=True)
class Case:
    """Sizes of a cluster attention problem, and the seed of its numbers.

    Attributes:
        batch: samples.
        num_tokens: tokens in each.
        num_clusters: clusters they are drawn from; may exceed the tokens, and some may stay empty.
        chunk_size: slots in a chunk; may exceed the tokens.
        num_adjacent: neighbouring chunks seen on each side.
        count_keys_once: each key counts once, or as published.
        seed: seed of all numbers.
        nearest: neighbours are the most similar chunks, not those of a ring; only with `count_keys_once`.
    """

    batch: int = 1
    num_tokens: int = 5
    num_clusters: int = 2
    chunk_size: int = 3
    num_adjacent: int = 1
    count_keys_once: bool = True
    seed: int = 0
    nearest: bool = False

    def tensor(
        self, name: str, *shape: int, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Return normal numbers of the given shape; the same `name` gives the same numbers, on every device."""
        numbers = torch.randn(shape, generator=generator(self.seed, name), dtype=torch.float64)
        return numbers.to(device=device, dtype=dtype)

    def tokens(
        self, name: str, width: int, *, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Return normal numbers `(batch, num_tokens, width)`."""
        return self.tensor(name, self.batch, self.num_tokens, width, dtype=dtype, device=device)

    def integers(self, name: str, high: int, *shape: int, device: torch.device | str = "cpu") -> Tensor:
        """Return integers in `[0, high)`."""
        return torch.randint(high, shape, generator=generator(self.seed, name)).to(device)

    def assignment(self, *, device: torch.device | str = "cpu") -> Tensor:
        """Return a cluster for each token, `(batch, num_tokens)`."""
        return self.integers("assignment", self.num_clusters, self.batch, self.num_tokens, device=device)

    def pattern(self, *, device: torch.device | str = "cpu") -> ClusterPattern:
        """Return the pattern of the assignment; with `nearest`, tokens "routing" choose the neighbours."""
        pattern = cluster_pattern(
            self.assignment(device=device),
            chunk_size=self.chunk_size,
            num_adjacent=self.num_adjacent,
            count_keys_once=self.count_keys_once,
        )
        return with_nearest_chunks(pattern, self.tokens("routing", 3, device=device)) if self.nearest else pattern

    def centroids(self, width: int, *, device: torch.device | str = "cpu") -> Tensor:
        """Return unit vectors `(num_clusters, width)`."""
        rows = self.tensor("centroids", self.num_clusters, width, device=device)
        return torch.nn.functional.normalize(rows, dim=-1)

    def but(self, **changes: Any) -> "Case":
        """Return the same case with some sizes changed."""
        return replace(self, **changes)


def cases(
    *,
    max_batch: int = 3,
    min_tokens: int = 1,
    max_tokens: int = 17,
    max_clusters: int = 9,
    max_chunk_size: int = 9,
    max_adjacent: int = 2,
    count_keys_once: bool | None = None,
    nearest: bool | None = None,
) -> st.SearchStrategy[Case]:
    """Return a strategy of cases within the given limits; None draws both values of an option."""
    drawn = st.builds(
        Case,
        batch=st.integers(1, max_batch),
        num_tokens=st.integers(min_tokens, max_tokens),
        num_clusters=st.integers(1, max_clusters),
        chunk_size=st.integers(1, max_chunk_size),
        num_adjacent=st.integers(0, max_adjacent),
        count_keys_once=st.booleans() if count_keys_once is None else st.just(count_keys_once),
        seed=st.integers(0, 2**16),
        nearest=st.booleans() if nearest is None else st.just(nearest),
    )
    return drawn.map(lambda case: case if case.count_keys_once else case.but(nearest=False))
