"""Tiles put together are the whole image, without seams, whatever their sizes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sparse_sr_attn import EDSR, LCoAN, ShapeError
from sparse_sr_attn.inference.tiling import upscale_tiled, upscaled_strips, with_smaller_tiles

SIZES = st.tuples(*[st.integers(1, 40)] * 2)


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


@given(SIZES, st.integers(1, 20), st.floats(0, 0.99), st.integers(1, 4))
def test_tiles_cover_every_pixel_once(size: tuple[int, int], tile: int, share: float, scale: int) -> None:
    images = torch.arange(2 * size[0] * size[1], dtype=torch.float64).reshape(2, 1, *size)
    most = 0

    def net(part: Tensor) -> Tensor:
        nonlocal most
        most = max(most, *part.shape[2:])
        return nn.functional.interpolate(part, scale_factor=scale)

    tiled = upscale_tiled(net, images, tile, int(share * tile))
    assert torch.equal(tiled, nn.functional.interpolate(images, scale_factor=scale))
    assert most <= tile


@given(SIZES, st.integers(1, 20), st.floats(0, 0.99), st.floats(0, 1), st.integers(1, 4))
def test_shares_of_blended_tiles_add_up_to_one(
    size: tuple[int, int], tile: int, share: float, part: float, scale: int
) -> None:
    overlap = int(share * tile)
    images = noise(2, 3, *size, dtype=torch.float64)
    tiled = upscale_tiled(
        lambda x: nn.functional.interpolate(x, scale_factor=scale), images, tile, overlap, blend=int(part * overlap)
    )
    torch.testing.assert_close(tiled, nn.functional.interpolate(images, scale_factor=scale), rtol=0, atol=1e-12)


@pytest.mark.promise("R24")
@given(SIZES, st.integers(4, 20), st.integers(0, 3), st.integers(0, 12))
def test_a_local_network_gives_the_whole_image_when_the_overlap_covers_its_reach(
    size: tuple[int, int], tile: int, reach: int, blend: int
) -> None:
    overlap = 2 * reach + blend
    tile = max(tile, overlap + 1)
    torch.manual_seed(0)
    net = nn.Conv2d(1, 1, 2 * reach + 1, padding=reach)  # its padding is what tiles must not see inside the image
    images = noise(1, 1, *size)
    with torch.no_grad():
        tiled = upscale_tiled(net, images, tile, overlap, blend=blend)
        torch.testing.assert_close(tiled, net(images), rtol=0, atol=1e-5)


@pytest.mark.promise("R24")
def test_a_network_without_attention_is_the_same_in_tiles() -> None:
    """Reach of this EDSR: one pixel for each of 1 + 2 * 3 + 1 + 1 convolutions, and half of one for the last."""
    torch.manual_seed(0)
    net = EDSR(num_feat=8, num_block=3, upscale=2, img_range=1.0).eval()
    images = noise(1, 3, 61, 47)
    with torch.no_grad():
        whole = net(images)
        for blend in (0, 6):
            tiled = upscale_tiled(net, images, 32, 20 + blend, blend=blend)
            torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-5)
        assert float((upscale_tiled(net, images, 32, 0) - whole).abs().max()) > 1e-3  # the tolerance means something


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize(("blend", "scale"), [(2, 1), (8, 1), (6, 3), (9, 2)])
def test_blending_leaves_no_seam(blend: int, scale: int, axis: int) -> None:
    """A network that gives each tile a shade of its own is the worst: the step between tiles becomes a ramp."""
    images = torch.arange(64.0).expand(1, 1, 40, 64).movedim(-1, axis)

    def shade(part: Tensor) -> Tensor:
        return part.mean().expand(1, 1, part.shape[2] * scale, part.shape[3] * scale)

    def steepest(image: Tensor) -> float:
        return float(image.diff(dim=axis).abs().max())

    sharp = steepest(upscale_tiled(shade, images, 24, 10))
    blended = steepest(upscale_tiled(shade, images, 24, 10, blend=blend))
    assert sharp > 10  # about one stride
    assert blended <= sharp / (blend // 2 * 2 * scale) * 1.001


@pytest.mark.promise("R24")
def test_attention_sees_its_tile_only_and_blending_keeps_close() -> None:
    torch.manual_seed(0)
    net = LCoAN(num_feat=8, num_group=2, num_block=1, num_clusters=4, chunk_size=16, res_scale=1.0).eval()
    images = noise(1, 3, 40, 40)
    with torch.no_grad():
        whole, tiled = net(images), upscale_tiled(net, images, 24, 8, blend=4)
        one_tile = upscale_tiled(net, images, 40, 8, blend=4)
    assert torch.equal(one_tile, whole)
    assert 1e-6 < float((tiled - whole).abs().mean()) < 0.05


def test_strips_come_as_soon_as_they_are_done_and_are_all_of_the_image() -> None:
    images = noise(1, 2, 50, 33, dtype=torch.float64)
    calls = 0

    def net(part: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return nn.functional.interpolate(part, scale_factor=2)

    strips, after = [], []
    for strip in upscaled_strips(net, images, 20, 8, blend=6):
        strips.append(strip)
        after.append(calls)
        assert strip.shape[-2] <= 2 * 20
    assert after == [3, 6, 9, 12]  # three tiles side by side, four below each other
    torch.testing.assert_close(torch.cat(strips, dim=-2), nn.functional.interpolate(images, scale_factor=2))


def test_progress_is_told_after_each_tile() -> None:
    told: list[tuple[int, int]] = []
    upscale_tiled(nn.Identity(), noise(1, 1, 30, 20), 16, 4, progress=lambda *numbers: told.append(numbers))
    assert told == [(number, 6) for number in range(1, 7)]


def test_not_a_number_stays_in_its_tile() -> None:
    """A tile's share outside of what it is used for is nothing, not zero times what it says."""
    images = torch.zeros(1, 1, 1, 30)
    images[..., 0] = 1

    def net(part: Tensor) -> Tensor:
        return torch.full_like(part, float("nan")) if part.max() > 0 else part

    tiled = upscale_tiled(net, images, 10, 4, blend=2)[0, 0, 0]
    assert tiled[:7].isnan().all()  # they meet at 8, one pixel to each side
    assert not tiled[9:].isnan().any()


def upsample(factor: float) -> nn.Module:
    return nn.Upsample(scale_factor=factor)


@pytest.mark.parametrize("net", [
    upsample(0.5),
    upsample(1.5),
    lambda part: upsample(2)(part)[..., 2:-2, 2:-2],  # without padding
    lambda part: upsample(2)(nn.functional.pad(part, (0, -part.shape[-1] % 8, 0, -part.shape[-2] % 8))),
    lambda part: upsample(4 if part.min() else 2)(part),  # the first tile has the 0
    lambda part: upsample(2)(part)[:1],
])  # fmt: skip
def test_networks_that_enlarge_by_no_integer_factor_are_refused(net: Callable[[Tensor], Tensor]) -> None:
    images = torch.arange(2 * 37 * 53.0).view(2, 1, 37, 53)
    with pytest.raises(ShapeError, match=r"net must enlarge each tile by .* factor.*; got \(.*\) for a tile of \(2"):
        upscale_tiled(net, images, 20, 6)


@pytest.mark.parametrize("blend", [0, 4])
def test_integers_are_put_together_but_not_blended(blend: int) -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)

    def net(part: Tensor) -> Tensor:
        return part.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)

    if blend:
        with pytest.raises(TypeError, match=r"net must return floating-point images to blend them, got torch\.uint8"):
            upscale_tiled(net, images, 8, 4, blend=blend)
    else:
        assert torch.equal(upscale_tiled(net, images, 8, 4), net(images))


@pytest.mark.parametrize(
    "arguments", [{"tile": 0}, {"overlap": -1}, {"overlap": 8}, {"blend": 5}, {"blend": -1}], ids=str
)
def test_sizes_out_of_range(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="tiles need tile >= 1, 0 <= overlap < tile and 0 <= blend <= overlap, got"):
        upscale_tiled(nn.Identity(), noise(1, 1, 9, 9), **{"tile": 8, "overlap": 4, **arguments})


# ---------------------------------------------------------------------------------------------------------- memory


def greedy(limit: int, error: Callable[[], Exception]) -> tuple[Callable[[int], int], list[int]]:
    tried: list[int] = []

    def attempt(tile: int) -> int:
        tried.append(tile)
        if tile > limit:
            raise error()
        return tile

    return attempt, tried


@pytest.mark.parametrize(
    "error",
    [
        MemoryError,
        lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        lambda: RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"),
        lambda: RuntimeError("could not create a primitive"),  # oneDNN's way to say it
    ],
    ids=["python", "cuda", "cpu", "oneDNN"],
)
def test_smaller_tiles_answer_a_lack_of_memory(error: Any) -> None:
    told: list[int] = []
    attempt, tried = greedy(100, error)
    assert with_smaller_tiles(attempt, 700, notice=told.append) == 87
    assert tried == [700, 350, 175, 87]
    assert told == [350, 175, 87]


def test_what_torch_says_of_memory_on_this_machine_is_understood() -> None:
    attempt, tried = greedy(100, MemoryError)

    def really(tile: int) -> int:
        if tile > 100:
            torch.empty(1 << 60, dtype=torch.uint8)
        return attempt(tile)

    assert with_smaller_tiles(really, 128) == 64
    assert tried == [64]


def test_memory_that_never_suffices() -> None:
    attempt, tried = greedy(0, lambda: MemoryError("no"))
    with pytest.raises(MemoryError, match="does not suffice even for tiles of 32 pixels: no"):
        with_smaller_tiles(attempt, 100)
    assert tried == [100, 50, 32]


def test_other_errors_pass() -> None:
    attempt, tried = greedy(0, lambda: RuntimeError("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        with_smaller_tiles(attempt, 100)
    assert tried == [100]
