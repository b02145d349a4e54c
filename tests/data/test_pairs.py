"""Pairs of high and low resolution: every crop has its tile, every tile is a piece of the picture shrunk as a whole."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from sparse_sr_attn.data.imresize import matlab_bicubic
from sparse_sr_attn.data.pairs import tiles, write_pairs
from sparse_sr_attn.errors import ImageError, ShapeError


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    return torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def place(name: str) -> tuple[int, int]:
    return int(name[2:6]), int(name[8:])


@given(
    upscale=st.integers(1, 4),
    crop=st.integers(0, 4),
    more=st.integers(1, 5),
    height=st.integers(1, 60),
    width=st.integers(1, 60),
)
def test_every_crop_lies_in_a_tile(upscale: int, crop: int, more: int, height: int, width: int) -> None:
    crop, tile = crop * upscale, (crop + more) * upscale
    high = picture(height, width)
    if min(height, width) < upscale or min(height, width) // upscale * upscale < crop:
        with pytest.raises(ShapeError):
            list(tiles(high, upscale, tile=tile, crop=crop))
        return
    low = matlab_bicubic(high, upscale)
    seen = torch.zeros(low.shape[0] * upscale, low.shape[1] * upscale, dtype=torch.int)
    covered = torch.zeros_like(seen, dtype=torch.bool)  # where a crop may begin
    for name, large, small in tiles(high, upscale, tile=tile, crop=crop):
        top, left = place(name)
        assert torch.equal(large, high[top : top + large.shape[0], left : left + large.shape[1]])
        y, x = top // upscale, left // upscale
        assert torch.equal(small, low[y : y + small.shape[0], x : x + small.shape[1]])
        assert large.shape[:2] == (small.shape[0] * upscale, small.shape[1] * upscale)
        assert max(large.shape[:2]) <= tile
        seen[top : top + large.shape[0], left : left + large.shape[1]] += 1
        covered[top : top + large.shape[0] - crop + 1, left : left + large.shape[1] - crop + 1] = True
    assert seen.min() >= 1
    ends = [side - crop + 1 for side in seen.shape]
    assert covered[: ends[0] : upscale, : ends[1] : upscale].all()


def test_whole_without_a_tile() -> None:
    high = picture(11, 7)
    ((name, large, small),) = tiles(high, 3)
    assert name == ""
    assert torch.equal(large, high[:9, :6])
    assert torch.equal(small, matlab_bicubic(high, 3))


@pytest.mark.parametrize(("tile", "crop"), [(7, 0), (8, 3), (8, 8), (-2, 0), (8, -2), (0, -2)])
def test_tiles_that_cannot_be_are_refused(tile: int, crop: int) -> None:
    with pytest.raises(ValueError, match=r"must be .*got"):
        list(tiles(picture(16, 16), 2, tile=tile, crop=crop))


def read(file: Path) -> Tensor:
    with Image.open(file) as image:
        return torch.from_numpy(np.array(image))


def test_files_replace_what_was_there_only_when_all_are_written(tmp_path: Path) -> None:
    high = picture(12, 10)
    assert write_pairs([("a", high)], tmp_path, 2) == 1
    assert torch.equal(read(tmp_path / "HR/a.png"), high)
    assert torch.equal(read(tmp_path / "LR_x2/a.png"), matlab_bicubic(high, 2))

    def fails():  # type: ignore[no-untyped-def]
        yield "b", picture(12, 10, 1)
        raise ImageError("no more")

    with pytest.raises(ImageError, match="no more"):
        write_pairs(fails(), tmp_path, 2)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["HR", "LR_x2", "a.png", "a.png"]

    assert write_pairs([("b", high), ("c", high)], tmp_path, 2) == 2
    assert sorted(path.name for path in (tmp_path / "HR").iterdir()) == ["b.png", "c.png"]


def test_two_pictures_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="a is the name of two pictures"):
        write_pairs([("a", picture(4, 4)), ("a", picture(4, 4))], tmp_path, 2)
    assert not list(tmp_path.iterdir())
