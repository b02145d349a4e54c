"""PSNR and SSIM as in super-resolution papers: on luma, without the borders.

Papers differ in details that change a mean by up to 0.2 dB. `Protocol` names them, so that published figures can be
reproduced from the images.
"""

import math
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from sparse_sr_attn.data.imresize import crop_to_multiple, imresize
from sparse_sr_attn.errors import ShapeError

Protocol = Literal["basicsr", "matlab"]
"""How luma is computed from a picture.

- "basicsr": in floating point, as in BasicSR and EDSR; a grey picture is treated as three equal channels, hence with a
  range of 16..235.
- "matlab": rounded, as by `rgb2ycbcr` for uint8; a grey picture is taken as luma with a range of 0..255, which lowers
  its PSNR by 1.3 dB.
"""


class Score(NamedTuple):
    """The metrics of a pair of pictures, or their means over a set.

    Attributes:
        psnr: PSNR in dB.
        ssim: SSIM, at most 1.
    """

    psnr: float
    ssim: float


_WEIGHTS = (65.481, 128.553, 24.966)  # ITU-R BT.601, to 16..235
_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def luma(picture: UInt8[Tensor, "h w *c"], protocol: Protocol = "basicsr") -> Float[Tensor, "h w"]:
    r"""Return the luma $Y = 16 + (65.481 R + 128.553 G + 24.966 B) / 255$ of a picture, in float64.

    Args:
        picture: grey `(h, w)` or RGB `(h, w, 3)`, uint8.
        protocol: treatment of rounding and of grey pictures; see `Protocol`.

    Raises:
        ShapeError: the picture is neither grey nor RGB.
        TypeError: the picture is not uint8.
        ValueError: `protocol` is unknown.

    Examples:
        >>> luma(torch.tensor([[[255, 255, 255], [0, 0, 0]]], dtype=torch.uint8))
        tensor([[235.,  16.]], dtype=torch.float64)
    """
    if picture.dtype != torch.uint8:
        raise TypeError(f"the picture must be uint8 (0..255), got {picture.dtype}; round and clip it first")
    if picture.dim() != 2 and not (picture.dim() == 3 and picture.shape[2] == 3):
        raise ShapeError(f"the picture must be grey (h, w) or RGB (h, w, 3), got {tuple(picture.shape)}")
    if protocol not in get_args(Protocol):
        raise ValueError(f"protocol must be one of {', '.join(get_args(Protocol))}, got {protocol!r}")
    values = picture.to(torch.float64)
    if picture.dim() == 2:
        if protocol == "matlab":
            return values
        values = values[..., None].expand(-1, -1, 3)
    y = 16 + (values * values.new_tensor(_WEIGHTS)).sum(dim=2) / 255
    return _rounded(y) if protocol == "matlab" else y


def psnr(one: Float[Tensor, "h w"], other: Float[Tensor, "h w"], *, border: int) -> float:
    r"""Return the PSNR $10 \log_{10}(255^2 / \mathrm{mean}((a - b)^2))$ in dB; infinite for equal pictures.

    Args:
        one: luma, 0..255.
        other: of the same size.
        border: pixels to crop on each side, >= 0; papers crop as many as the upscaling factor.

    Raises:
        ShapeError: the sizes differ, or nothing is left after cropping.
        ValueError: `border < 0`.

    Examples:
        >>> one, other = torch.zeros(16, 16), torch.full((16, 16), 255.0)
        >>> psnr(one, other, border=2), psnr(one, one, border=2)
        (0.0, inf)
    """
    error = float((_inner(one, other, border, 1) - _inner(other, one, border, 1)).square().mean())
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def ssim(one: Float[Tensor, "h w"], other: Float[Tensor, "h w"], *, border: int) -> float:
    r"""Return the mean structural similarity, 1 for equal pictures.

    Uses Gaussian windows of 11 pixels with $\sigma = 1.5$, without padding; $K_1 = 0.01$, $K_2 = 0.03$, peak 255.

    Args:
        one: as in `psnr`.
        other: as in `psnr`.
        border: as in `psnr`.

    Raises:
        ShapeError: the sizes differ, or the pictures are smaller than a window after cropping.
        ValueError: `border < 0`.

    Source:
        Wang et al., "Image quality assessment: from error visibility to structural similarity", 2004.

    Examples:
        >>> one = luma(torch.randint(256, (32, 32, 3)).byte())
        >>> round(ssim(one, one, border=2), 3)
        1.0
    """
    a, b = _inner(one, other, border, _WINDOW), _inner(other, one, border, _WINDOW)
    maps = torch.stack([a, b, a * a, b * b, a * b])[:, None]
    place = torch.arange(_WINDOW, dtype=torch.float64, device=a.device) - _WINDOW // 2
    line = torch.exp(-place.square() / (2 * _SIGMA**2))
    line = line / line.sum()
    maps = F.conv2d(F.conv2d(maps, line.view(1, 1, -1, 1)), line.view(1, 1, 1, -1))[:, 0]
    mean_a, mean_b, square_a, square_b, product = maps
    covariance = product - mean_a * mean_b
    variances = (square_a - mean_a.square()) + (square_b - mean_b.square())  # so that equal pictures have 1 to the bit
    similarity = (2 * mean_a * mean_b + _C1) * (2 * covariance + _C2)
    return float((similarity / ((mean_a.square() + mean_b.square() + _C1) * (variances + _C2))).mean())


def score(one: Float[Tensor, "h w"], other: Float[Tensor, "h w"], *, border: int) -> Score:
    """Return `psnr` and `ssim` of two pictures, with the same arguments.

    Examples:
        >>> one = luma(torch.randint(256, (32, 32, 3)).byte())
        >>> score(one, one, border=2)
        Score(psnr=inf, ssim=1.0)
    """
    return Score(psnr(one, other, border=border), ssim(one, other, border=border))


def bicubic_luma(picture: UInt8[Tensor, "h w *c"], upscale: int) -> tuple[Float[Tensor, "h w"], Float[Tensor, "h w"]]:
    """Return the luma of a picture, and the same after bicubic down- and upscaling: the row "bicubic" in papers.

    That row goes back to SRCNN's code, which takes luma first ("matlab"), crops it to a multiple of the factor,
    downscales and upscales it without rounding in between, and rounds at the end. Upscaling the 8-bit image that
    networks get would give 0.01 to 0.03 dB less.

    Args:
        picture: the high-resolution picture, grey `(h, w)` or RGB `(h, w, 3)`, uint8.
        upscale: the upscaling factor, >= 1.

    Returns:
        The luma and the upscaled luma, integers in float64, of equal size.

    Raises:
        ShapeError: the picture is neither grey nor RGB, or a side is shorter than `upscale`.
        TypeError: the picture is not uint8.
        ValueError: `upscale < 1`.

    Source:
        Dong et al., "Learning a deep convolutional network for image super-resolution", ECCV 2014.

    Examples:
        >>> y, bicubic = bicubic_luma(torch.randint(256, (33, 48, 3)).byte(), upscale=4)
        >>> y.shape, bicubic.shape
        (torch.Size([32, 48]), torch.Size([32, 48]))
    """
    y = crop_to_multiple(luma(picture, "matlab"), upscale)
    small = imresize(y, size=(y.shape[0] // upscale, y.shape[1] // upscale))
    return y, _rounded(imresize(small, size=(y.shape[0], y.shape[1])))


def _rounded(y: Tensor) -> Tensor:
    return (y + 0.5).floor().clamp(0, 255)


def _inner(one: Tensor, other: Tensor, border: int, least: int) -> Tensor:
    """Return `one` without its border, after checking the sizes."""
    if border < 0:
        raise ValueError(f"border must be >= 0, got {border}")
    if one.shape != other.shape:
        raise ShapeError(f"pictures must have the same size, got {tuple(one.shape)} and {tuple(other.shape)}")
    if min(one.shape) < 2 * border + least:
        raise ShapeError(
            f"both sides must be >= {2 * border + least} with a border of {border}, got {one.shape[0]}x{one.shape[1]}"
        )
    return one[border : one.shape[0] - border, border : one.shape[1] - border].to(torch.float64)
