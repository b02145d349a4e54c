"""The degradation: against BasicSR's own `imresize`, kernels computed by hand, and what any resampling must satisfy."""

import pytest
import torch
from torch import Tensor

from sparse_sr_attn.data.imresize import crop_to_multiple, imresize, matlab_bicubic
from sparse_sr_attn.errors import ShapeError

pytestmark = pytest.mark.promise("R26")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def smooth(height: int, width: int, seed: int = 0) -> Tensor:
    """A colour picture without sharp edges, where rounding between the passes is the only difference to BasicSR."""
    coarse = torch.rand(1, 3, 6, 7, generator=torch.Generator().manual_seed(seed)) * 200 + 25
    fine = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=True)
    return fine[0].permute(1, 2, 0).round().to(torch.uint8)


@pytest.mark.parametrize("upscale", [2, 3, 4])
def test_agrees_with_basicsr_within_one_grey_level(upscale: int) -> None:
    """BasicSR's `imresize` is an independent implementation; it does not round between the passes."""
    from sparse_sr_attn_basicsr import shims

    shims.apply()
    from basicsr.utils.matlab_functions import imresize as basicsr_imresize

    image = smooth(48, 60)
    for actual, factor in (
        (matlab_bicubic(image, upscale), 1 / upscale),
        (imresize(image, scale=upscale), float(upscale)),
    ):
        expected = torch.from_numpy(basicsr_imresize(image.numpy().astype("float32") / 255, factor)).mul(255)
        assert actual.shape == expected.shape
        # Half a level for our last rounding; half a level, damped or amplified little, for the one between.
        assert (actual.double() - expected.double()).abs().max() <= 1.2
        levels = expected.add(0.5).floor().clamp(0, 255)
        assert (actual.double() - levels.double()).abs().max() <= 1
        assert (actual.double() != levels.double()).float().mean() < 0.4


@pytest.mark.parametrize("factor", [0.5, 1 / 3, 4.0])
def test_floating_point_is_not_rounded(factor: float) -> None:
    """As MATLAB has it, and BasicSR, which computes in float32."""
    from sparse_sr_attn_basicsr import shims

    shims.apply()
    from basicsr.utils.matlab_functions import imresize as basicsr_imresize

    image = noise(24, 30, 3).double()
    expected = torch.from_numpy(basicsr_imresize(image.numpy().astype("float32"), factor)).double()
    actual = imresize(image, scale=factor)
    assert actual.dtype == torch.float64
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= 1e-3
    assert (actual < 0).any() or (actual > 255).any() or factor < 1  # nor clipped


def test_halving_uses_the_eight_taps_of_the_widened_kernel() -> None:
    """Distances 1/4, 3/4, 5/4, 7/4 of Keys' cubic: 111/128, 29/128, -9/128, -3/128; halved, as they sum to 2."""
    taps = torch.tensor([-3, -9, 29, 111, 111, 29, -9, -3], dtype=torch.float64) / 256
    row = noise(1, 16)
    expected = [(taps @ row[0, 2 * o - 3 : 2 * o + 5].double()).add(0.5).floor().clamp(0, 255) for o in range(2, 6)]
    assert imresize(row, size=(1, 8))[0, 2:6].tolist() == torch.stack(expected).tolist()


def test_rounds_and_clips_between_the_passes() -> None:
    """The result is that of two one-axis calls; without rounding and clipping between them it would not be."""
    image = noise(24, 24)
    columns_after_rows = imresize(imresize(image, size=(12, 24)), size=(12, 12))
    assert torch.equal(matlab_bicubic(image, 2), columns_after_rows)
    taps = torch.tensor([-3, -9, 29, 111, 111, 29, -9, -3], dtype=torch.float64) / 256
    kernel = torch.outer(taps, taps)[None, None]
    unrounded = torch.nn.functional.conv2d(image.double()[None, None], kernel, stride=2)[0, 0]
    unrounded = unrounded.add(0.5).floor().clamp(0, 255).to(torch.uint8)
    inner = matlab_bicubic(image, 2)[2:-2, 2:-2]
    inner = inner[: unrounded.shape[0], : unrounded.shape[1]]
    assert not torch.equal(inner, unrounded[: inner.shape[0], : inner.shape[1]])


def test_halves_are_rounded_up() -> None:
    """In the middle of a step from 10 to 11 the taps give 10.5 exactly: 11 in MATLAB, not the even 10."""
    step = torch.tensor([[10] * 7 + [11] * 9], dtype=torch.uint8)
    assert imresize(step, size=(1, 8))[0, 3] == 11
    assert imresize(step + 1, size=(1, 8))[0, 3] == 12
    assert imresize(step.flip(1), size=(1, 8))[0, 4] == 11


def test_the_same_size_is_the_same_picture() -> None:
    image = noise(9, 7, 3)
    assert torch.equal(imresize(image, scale=1.0), image)
    assert torch.equal(imresize(image, size=(9, 7)), image)


def test_axis_with_the_smaller_factor_comes_first() -> None:
    """MATLAB sorts the axes by their factor: here the columns shrink before the rows grow."""
    image = noise(6, 24)
    expected = imresize(imresize(image, size=(6, 12)), size=(12, 12))
    assert torch.equal(imresize(image, size=(12, 12)), expected)
    assert not torch.equal(imresize(imresize(image, size=(12, 24)), size=(12, 12)), expected)


def test_crops_to_a_multiple() -> None:
    image = noise(11, 10, 3)
    assert torch.equal(crop_to_multiple(image, 4), image[:8, :8])
    assert torch.equal(matlab_bicubic(image, 4), matlab_bicubic(image[:8, :8], 4))
    assert matlab_bicubic(image, 3).shape == (3, 3, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: matlab_bicubic(noise(8, 8).float(), 2), TypeError, "must be uint8.*got torch.float32"),
        (lambda: matlab_bicubic(noise(8), 2), ShapeError, r"must be \(h, w\) or \(h, w, c\).*got \(8,\)"),
        (lambda: imresize(noise(0, 8), scale=2), ShapeError, r"no empty axis, got \(0, 8\)"),
        (lambda: matlab_bicubic(noise(8, 8), 0), ValueError, "upscale must be >= 1, got 0"),
        (lambda: matlab_bicubic(noise(8, 3), 4), ShapeError, "both sides must be >= 4.*got 8x3"),
        (lambda: crop_to_multiple(noise(8, 8), 0), ValueError, "multiple must be >= 1, got 0"),
        (lambda: imresize(noise(8, 8)), ValueError, "either scale or size, got scale=None and size=None"),
        (lambda: imresize(noise(8, 8), scale=2, size=(4, 4)), ValueError, "either scale or size"),
        (lambda: imresize(noise(8, 8), scale=0.0), ValueError, "scale must be a finite number > 0, got 0.0"),
        (lambda: imresize(noise(8, 8), size=(4, 0)), ValueError, r"size must be >= 1 on both axes, got \(4, 0\)"),
    ],
)
def test_wrong_input_is_explained(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
