"""The code of LCoAN's authors (arXiv 2404.04922), from a folder where you cloned it.

    git clone https://github.com/YigangZhao/LCoAN
    python -m benchmarks.speed --methods LCoA --peer "benchmarks/peers/lcoan.py:LCoA:folder='LCoAN'"
    python -m benchmarks.speed --methods CoA --peer "benchmarks/peers/lcoan.py:CoA:folder='LCoAN'"

Their repository has no licence: you may run it, but not copy from it.
"""

from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from benchmarks.peers.clone import load_from_clone


class LCoA(nn.Module):
    """Their attention with a pattern of its own: a learnable sparse pattern (LSP) applied to a value.

    Args:
        channels: of the feature map.
        folder: of their repository.
        reduction: ratio of `channels` to the channels of queries.
        num_clusters: number of centroids.
        chunk_size: tokens in a chunk.
    """

    def __init__(
        self, channels: int, folder: str, reduction: int = 4, num_clusters: int = 128, chunk_size: int = 144
    ) -> None:
        super().__init__()
        theirs = load_from_clone(Path(folder) / "src", "model.kmeans_attention")
        self.layer = theirs.RecurrentNonLocalKmeansAttention(
            channels, reduction=reduction, n_clusters=num_clusters, window_size=chunk_size
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the map plus its attention."""
        return cast(Tensor, self.layer((x, None, None, None))[0])


class CoA(LCoA):
    """Their attention with the pattern and the weights of an earlier one, which are computed once for each size of map.

    It computes the queries again, which it does not use, as in the authors' network. For the arguments, see `LCoA`.
    """

    def __init__(
        self, channels: int, folder: str, reduction: int = 4, num_clusters: int = 128, chunk_size: int = 144
    ) -> None:
        super().__init__(channels, folder, reduction, num_clusters, chunk_size)
        self.earlier: dict[torch.Size, tuple[Tensor, ...]] = {}

    def forward(self, x: Tensor) -> Tensor:
        """Return the map plus its attention."""
        if x.shape not in self.earlier:
            with torch.no_grad():
                self.earlier[x.shape] = self.layer((x, None, None, None))[1:]
        return cast(Tensor, self.layer((x, *self.earlier[x.shape]))[0])
