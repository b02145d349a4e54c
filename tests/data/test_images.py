"""Image files as tensors of 8 bits. What upscaling does with all other kinds stands in test_cli_upscale.py."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sparse_sr_attn import ImageError
from sparse_sr_attn.data.images import as_rgb, read_pixels


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize(("mode", "kept"), [("L", ()), ("LA", ()), ("RGB", (3,)), ("RGBA", (3,))])
def test_pixels_are_those_of_the_file_without_alpha(mode: str, kept: tuple[int, ...], tmp_path: Path) -> None:
    pixels = noise(6, 5, len(mode))
    Image.fromarray(pixels.squeeze()).save(tmp_path / "a.png")
    found = read_pixels(tmp_path / "a.png")
    assert found.dtype == torch.uint8
    assert found.shape == (6, 5, *kept)
    assert np.array_equal(found.reshape(6, 5, -1), pixels[..., : len(mode.removesuffix("A"))])
    found.zero_()  # memory of its own, which may be written to


def test_sixteen_bits_are_refused(tmp_path: Path) -> None:
    Image.fromarray(noise(6, 5).astype(np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ImageError, match="^must have 8 bits per channel, got 16; save it with 8 bits$"):
        read_pixels(tmp_path / "deep.png")


def test_grey_becomes_three_equal_channels_and_colours_stay() -> None:
    grey, colours = torch.from_numpy(noise(6, 5)), torch.from_numpy(noise(6, 5, 3))
    assert torch.equal(as_rgb(grey), torch.stack([grey, grey, grey], dim=-1))
    assert torch.equal(as_rgb(colours), colours)
