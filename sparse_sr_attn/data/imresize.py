"""Bicubic resampling like MATLAB's `imresize`, the degradation used by super-resolution papers.

Functions take and return tensors; use `torch.from_numpy(picture)` for a NumPy array.
"""

import math

import torch
from jaxtyping import Float, Int, Shaped, UInt8
from torch import Tensor

from sparse_sr_attn.errors import ShapeError

_SUPPORT = 4  # the cubic kernel is zero beyond two samples on each side


def crop_to_multiple(image: Shaped[Tensor, "h w *c"], multiple: int) -> Shaped[Tensor, "h2 w2 *c"]:
    """Crop the last rows and columns so that both sides are multiples of `multiple`.

    Args:
        image: any picture whose first two axes are rows and columns.
        multiple: divisor of both sides, `>= 1`.

    Returns:
        A view of `image`, smaller by at most `multiple - 1` pixels along each axis.

    Raises:
        ValueError: `multiple < 1`.
        ShapeError: nothing would be left.

    Examples:
        >>> crop_to_multiple(torch.zeros(50, 71, 3, dtype=torch.uint8), 4).shape
        torch.Size([48, 68, 3])
    """
    if multiple < 1:
        raise ValueError(f"multiple must be >= 1, got {multiple}")
    height, width = (size - size % multiple for size in image.shape[:2])
    if height == 0 or width == 0:
        raise ShapeError(f"both sides must be >= {multiple} to be cropped to a multiple of it, got {_sides(image)}")
    return image[:height, :width]


def matlab_bicubic(image: UInt8[Tensor, "h w *c"], upscale: int) -> UInt8[Tensor, "h2 w2 *c"]:
    """Return the low-resolution version of `image`: cropped to a multiple of `upscale`, then downscaled by it.

    Bit-identical to MATLAB's `imresize(modcrop(image, upscale), 1 / upscale)`, the degradation called "bicubic" or "BI"
    in papers.

    Args:
        image: grey `(h, w)` or with channels last `(h, w, c)`, uint8.
        upscale: the super-resolution factor, `>= 1`.

    Returns:
        A uint8 picture of `h // upscale` by `w // upscale` pixels.

    Raises:
        ValueError: `upscale < 1`.
        ShapeError: a side is shorter than `upscale`, or the picture has neither 2 nor 3 axes.
        TypeError: the picture is not uint8.

    Examples:
        >>> matlab_bicubic(torch.zeros(50, 71, 3, dtype=torch.uint8), upscale=4).shape
        torch.Size([12, 17, 3])
    """
    if upscale < 1:
        raise ValueError(f"upscale must be >= 1, got {upscale}")
    image = crop_to_multiple(_checked(image, torch.uint8), upscale)
    return imresize(image, size=(image.shape[0] // upscale, image.shape[1] // upscale))


def imresize(
    image: Shaped[Tensor, "h w *c"], *, scale: float | None = None, size: tuple[int, int] | None = None
) -> Shaped[Tensor, "h2 w2 *c"]:
    r"""Resize a picture like MATLAB's bicubic `imresize`; bit-identical for uint8.

    Each axis is resampled separately, $y_o = \sum_i w_{oi} x_i$ with $w_{oi} \propto k(s\,(u_o - i))$, where
    $s = \min(1, \text{factor})$ widens the kernel in downscaling (antialiasing), $u_o$ is the position of output pixel
    $o$ on the input's axis (pixel centres at half-integers), and $k$ is Keys' cubic with $a = -1/2$. Beyond the border
    the picture is mirrored, including the border pixel. The axis with the smaller factor comes first, rows before
    columns if they are equal. For uint8, the result is rounded (halves up) and clipped to 0..255 *after each axis*.

    Args:
        image: grey `(h, w)` or with channels last `(h, w, c)`, uint8 or float64.
        scale: factor for both sides, `> 0`; the new sides are rounded up.
        size: the new height and width in pixels, `>= 1`; instead of `scale`.

    Returns:
        A picture with the channels and the dtype of `image`.

    Raises:
        ValueError: both or neither of `scale` and `size` are given, or the given one is not positive.
        ShapeError: the picture is empty, or has neither 2 nor 3 axes.
        TypeError: the picture is neither uint8 nor float64.

    Note:
        Computed in float64 on the device of `image`. Differentiable for float64.

    Source:
        R. Keys, "Cubic convolution interpolation for digital image processing", 1981; the documented
        behaviour of MATLAB's `imresize` (antialiasing on, method bicubic).

    Examples:
        >>> image = torch.tensor([[0, 100, 200, 100]], dtype=torch.uint8)
        >>> imresize(image, size=(1, 2))
        tensor([[ 55, 145]], dtype=torch.uint8)
    """
    _checked(image, torch.uint8, torch.float64)
    sides = (image.shape[0], image.shape[1])
    if (scale is None) == (size is None):
        raise ValueError(f"give either scale or size, got {scale=} and {size=}")
    if size is not None:
        if min(size) < 1:
            raise ValueError(f"size must be >= 1 on both axes, got {size}")
        factors = (size[0] / sides[0], size[1] / sides[1])
    elif scale is not None:
        if not 0 < scale < math.inf:
            raise ValueError(f"scale must be a finite number > 0, got {scale}")
        size = (math.ceil(sides[0] * scale), math.ceil(sides[1] * scale))
        factors = (scale, scale)
    for axis in sorted((0, 1), key=lambda axis: factors[axis]):
        image = _resample(image, axis, size[axis], factors[axis])  # type: ignore[index]
    return image


def _resample(image: Tensor, axis: int, size: int, factor: float) -> Tensor:
    """Resample one axis, with rounding and clipping for uint8."""
    taps, weights = _contributions(image.shape[axis], size, factor)
    taps, weights = taps.to(image.device), weights.to(image.device)
    samples = image.to(torch.float64)
    shape = [1] * image.dim()
    shape[axis] = size
    total = torch.zeros((), dtype=torch.float64, device=image.device)
    for tap, weight in zip(taps.unbind(1), weights.unbind(1), strict=True):  # a dozen taps at most, always in one order
        total = total + weight.view(shape) * samples.index_select(axis, tap)
    return total if image.dtype == torch.float64 else (total + 0.5).floor().clamp(0, 255).to(torch.uint8)


def _contributions(length: int, size: int, factor: float) -> tuple[Int[Tensor, "o t"], Float[Tensor, "o t"]]:
    """Return the input pixels of each output pixel, and their weights; every row of weights sums to 1."""
    squeeze = min(factor, 1.0)
    width = _SUPPORT / squeeze
    # Counted from 1, as MATLAB does: the roundings of the places, too, shall be the same.
    centre = torch.arange(1, size + 1, dtype=torch.float64) / factor + 0.5 * (1 - 1 / factor)
    first = (centre - width / 2).floor()
    taps = first[:, None] + torch.arange(math.ceil(width) + 2, dtype=torch.float64)
    weights = _cubic(squeeze * (centre[:, None] - taps))
    weights = weights / weights.sum(dim=1, keepdim=True)
    mirrored = (taps.to(torch.int64) - 1) % (2 * length)
    return torch.where(mirrored < length, mirrored, 2 * length - 1 - mirrored), weights


def _cubic(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Keys' cubic with a = -1/2."""
    x = x.abs()
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return torch.where(x <= 1, near, torch.where(x <= 2, far, torch.zeros_like(x)))


def _checked(image: Tensor, *dtypes: torch.dtype) -> Tensor:
    if image.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"the picture must be {wanted} (0..255), got {image.dtype}; round and clip it first")
    if image.dim() not in (2, 3) or 0 in image.shape:
        raise ShapeError(f"the picture must be (h, w) or (h, w, c) with no empty axis, got {tuple(image.shape)}")
    return image


def _sides(image: Tensor) -> str:
    return f"{image.shape[0]}x{image.shape[1]}"
