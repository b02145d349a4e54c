"""Maps that chunks or windows divide are not padded, and others no further than to the next whole one."""

import pytest
import torch

from sparse_sr_attn.functional.cluster import cluster_pattern
from sparse_sr_attn.functional.cluster.layout import ClusterLayout
from sparse_sr_attn.functional.window.grid import WindowGrid


@pytest.mark.parametrize("num_tokens", range(1, 50))
@pytest.mark.parametrize("chunk_size", [1, 3, 7, 48])
def test_chunks_are_padded_by_less_than_one(num_tokens: int, chunk_size: int) -> None:
    layout = ClusterLayout.of(cluster_pattern(torch.zeros(1, num_tokens, dtype=torch.long), chunk_size=chunk_size))
    size = min(chunk_size, num_tokens)
    assert layout.num_slots == -(-num_tokens // size) * size


@pytest.mark.parametrize("height", range(1, 18))
@pytest.mark.parametrize("window_size", [1, 2, 4, 5])
def test_windows_are_padded_by_less_than_one(height: int, window_size: int) -> None:
    for width in range(1, 18):
        grid = WindowGrid(height, width, window_size)
        for shift in (0, window_size // 2):
            real = grid.is_real(shift, torch.device("cpu"))
            assert real.sum() == height * width
            assert real.numel() == (-(-height // window_size)) * (-(-width // window_size)) * window_size**2
        assert grid.is_whole == (height % window_size == 0 and width % window_size == 0)
