"""The states that attention layers share. They are passed as arguments, never as attributes.

They are named tuples, which all tools that traverse the inputs and outputs of modules support.
"""

from typing import NamedTuple, cast

from jaxtyping import Float, Int
from torch import Tensor


def _summary(state: NamedTuple) -> str:
    """Return what a state is built of, with the dtype and shape of each tensor in place of its values."""
    return f"{type(state).__name__}({', '.join(f'{name}={_short(value)}' for name, value in state._asdict().items())})"


def _short(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if type(value) is tuple:
        return f"({', '.join(map(_short, value))}{',' * (len(value) == 1)})"
    return repr(value)


class ClusterPattern(NamedTuple):
    """Which tokens attend to which: tokens sorted by cluster and cut into chunks.

    Attributes:
        order: the token at each slot, sorted by cluster, in image order within a cluster. No gradient.
        assignment: the cluster of each token, in image order. No gradient.
        chunk_size: slots in a chunk, >= 1.
        num_adjacent: neighbouring chunks that a chunk sees on each side (circularly), >= 0; with `neighbors`, half the
            number of chunks that it sees besides itself.
        count_keys_once: whether every key counts once; `False` counts as published (`docs/deviations.md`, 5).
        neighbors: the `m = 2 * num_adjacent + 1` chunks that each chunk sees, itself first. With fewer than `m` chunks,
            each counts once and the rest of a row is ignored. `None` for a ring. No gradient.

    Examples:
        >>> pattern = LSP(64, chunk_size=36)(torch.rand(1, 64, 12, 12)).pattern
        >>> pattern.order.shape, pattern.chunk_size
        (torch.Size([1, 144]), 36)
    """

    order: Int[Tensor, "b n"]
    assignment: Int[Tensor, "b n"]
    chunk_size: int
    num_adjacent: int
    count_keys_once: bool
    neighbors: Int[Tensor, "b k m"] | None = None

    def __repr__(self) -> str:
        return _summary(self)

    @property
    def exact_keys(self) -> bool:
        """The old name of `count_keys_once`."""
        return self.count_keys_once


class ClusterAttention(NamedTuple):
    """A pattern with the softmax weights of an embedding: the output of LSP and the input of CoA.

    It stores the weights, or the embedding from which each reader recomputes them.

    Attributes:
        pattern: the pattern of the map; with several rounds, those of a sample follow each other.
        height: height of the map in pixels.
        width: width of the map in pixels.
        num_rounds: patterns per sample, >= 1.
        weights: weights of each slot of `k` chunks of `i` slots over the `j = (2 * num_adjacent + 1) * i` slots that it
            sees; the rows of a token sum to 1 over the rounds. Carries gradient to the provider.
        embedding: query and, scaled to unit length, key of each token, in image order. Carries gradient to the
            provider.

    Examples:
        >>> state = LCoA(64, chunk_size=36).attend(torch.rand(2, 64, 12, 12))
        >>> state.map_size(), state.weights.shape
        ((2, 12, 12), torch.Size([2, 4, 36, 108]))
    """

    pattern: ClusterPattern
    height: int
    width: int
    num_rounds: int
    weights: Float[Tensor, "br k i j"] | None = None
    embedding: Float[Tensor, "b n d"] | None = None

    def __repr__(self) -> str:
        return _summary(self)

    def map_size(self) -> tuple[int, int, int]:
        """Return batch size, height and width of the maps."""
        return self.pattern.order.shape[0] // self.num_rounds, self.height, self.width


class WindowAttention(NamedTuple):
    """The softmax weights of groups of channels, each in windows of its own size: the output and input of GMSA.

    Attributes:
        weights: for each group, weights from every pixel of `k` windows to the `i` pixels of its window; rows of pixels
            sum to 1. `None` if recomputing them from `query` costs less than storing them. Carries gradient to the
            provider.
        query: queries of all groups, from whose products missing weights are recomputed; `None` if no weights are
            missing. Carries gradient to the provider.
        window_sizes: side of the windows of each group in pixels.
        shift: whether the windows are shifted by half their size.
        exact_shift: whether the result is shifted back by the same amount; `False` as published (`docs/deviations.md`).
        height: height of the map in pixels.
        width: width of the map in pixels.

    Examples:
        >>> state = GMSA(60, window_sizes=(4, 8, 12)).attend(torch.rand(2, 60, 24, 24))
        >>> state.map_size(), state.weights[0].shape  # 36 windows of 16 pixels
        ((2, 24, 24), torch.Size([2, 36, 16, 16]))
    """

    weights: tuple[Float[Tensor, "b _ _ _"] | None, ...]
    query: Float[Tensor, "b c h w"] | None
    window_sizes: tuple[int, ...]
    shift: bool
    exact_shift: bool
    height: int
    width: int

    def __repr__(self) -> str:
        return _summary(self)

    def map_size(self) -> tuple[int, int, int]:
        """Return batch size, height and width of the maps."""
        first = cast(Tensor, self.query if self.weights[0] is None else self.weights[0])
        return first.shape[0], self.height, self.width
