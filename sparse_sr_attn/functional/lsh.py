r"""Locality-sensitive hashing of tokens: similar directions fall into the same bucket.

The bucket of $x$ is $\arg\max([Rx, -Rx])$ with a Gaussian $R$ (Andoni et al., NeurIPS 2015). NLSA (Mei et al., CVPR
2021) draws a new $R$ in every forward pass; here only training does, from a seed and the number of draws so far.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparse_sr_attn.functional._operators import operator
from sparse_sr_attn.functional._torch import backward_is_running, larger, smaller, without_autocast, working_precision
from sparse_sr_attn.functional.flops import teach_flop_counters


class HashState(NamedTuple):
    """The state of hashing between steps; `hash_step` updates it in place.

    Attributes:
        rotations: $R$ of each round.
        num_draws: number of draws in training so far.
    """

    rotations: Float[Tensor, "r m d"]
    num_draws: Int[Tensor, ""]


def initial_hash(num_rounds: int, max_buckets: int, dim: int, seed: int = 0) -> HashState:
    """Return the initial state, which depends only on `seed`: `max_buckets // 2` directions per round.

    Examples:
        >>> initial_hash(num_rounds=4, max_buckets=16, dim=8).rotations.shape
        torch.Size([4, 8, 8])
    """
    return HashState(_draw((num_rounds, max_buckets // 2, dim), seed, 0), torch.zeros((), dtype=torch.int64))


def bucket_count(num_tokens: int, chunk_size: int, max_buckets: int) -> int:
    """Return the number of buckets for a map: the number of full chunks, made even, from 2 to `max_buckets`.

    Source:
        NLSA. Deviation: the original fails for maps smaller than a chunk.

    Examples:
        >>> bucket_count(num_tokens=48 * 48, chunk_size=144, max_buckets=128)
        16
    """
    chunks = num_tokens // chunk_size
    return larger(2, smaller(chunks + chunks % 2, max_buckets))


def hash_tokens(
    points: Float[Tensor, "b n d"], rotations: Float[Tensor, "r m d"], num_buckets: int
) -> Int[Tensor, "b r n"]:
    r"""Return the bucket of each point in each round, from 0 to `num_buckets - 1`.

    Args:
        points: one row per token, of any norm; no gradient flows back.
        rotations: $R$ of each round; the first `num_buckets // 2` rows are used.
        num_buckets: even, from 2 to twice the number of rows.

    Returns:
        The $j$ of largest $|\langle R_j, x \rangle|$, plus `num_buckets // 2` if the product is negative; the lowest
        index wins a tie.

    Examples:
        >>> state = initial_hash(num_rounds=4, max_buckets=16, dim=8)
        >>> hash_tokens(torch.rand(2, 36, 8), state.rotations, num_buckets=6).shape
        torch.Size([2, 4, 36])
    """
    points = points.detach()
    points = points.to(working_precision(points))
    half = num_buckets // 2
    with without_autocast(points):
        along = torch.einsum("bnd,rmd->brnm", points, rotations.to(points.dtype))
        used = torch.arange(along.shape[-1], device=along.device) < half
        index = along.abs().masked_fill(~used, -1).argmax(dim=-1, keepdim=True)
        # Chosen, not multiplied: ONNX export cannot multiply a truth value by a size.
        return torch.where(along.gather(-1, index) < 0, index + half, index)[..., 0]


def hash_step(points: Float[Tensor, "b n d"], state: HashState, num_buckets: int, *, seed: int) -> Int[Tensor, "b r n"]:
    """Draw new rotations and hash the points with them in a training step; updates `state` in place, once.

    A recomputation of this forward during its backward draws nothing, and so finds the same buckets. Draws depend only
    on `seed` and their number, so they are the same on all processes and in resumed training.

    Args:
        points: as in `hash_tokens`.
        state: updated in place.
        num_buckets: as in `hash_tokens`.
        seed: seed of all draws.

    Returns:
        The buckets, as from `hash_tokens` with the new rotations.

    Note:
        Rotations are drawn on the CPU; a GPU waits for them.

    Examples:
        >>> state = initial_hash(num_rounds=4, max_buckets=16, dim=8)
        >>> buckets = hash_step(torch.rand(2, 36, 8), state, num_buckets=6, seed=0)
        >>> buckets.shape, int(state.num_draws)
        (torch.Size([2, 4, 36]), 1)
    """
    teach_flop_counters()
    return _hash_step(points.detach(), *state, num_buckets, seed)


@operator("hash_step", mutates_args=("rotations", "num_draws"))
def _hash_step(points: Tensor, rotations: Tensor, num_draws: Tensor, num_buckets: int, seed: int) -> Tensor:
    if not backward_is_running():
        num_draws.add_(1)
        rotations.copy_(_draw(rotations.shape, seed, int(num_draws)))
    return hash_tokens(points, rotations, num_buckets)


@_hash_step.register_fake
def _(points: Tensor, rotations: Tensor, num_draws: Tensor, num_buckets: int, seed: int) -> Tensor:
    return points.new_empty((points.shape[0], rotations.shape[0], points.shape[1]), dtype=torch.int64)


def _draw(shape: tuple[int, ...], seed: int, turn: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    # The seeds of the turns start at a random number, so that those of two seeds do not overlap.
    generator.manual_seed(turn + int(torch.randint(2**62, (), generator=generator, device="cpu")))
    return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)
