"""How alike two pictures are, counted as super-resolution papers count it: PSNR and SSIM of the luma, borders left out.

Papers differ in small things, which change a mean by up to 0.2 dB. They have names here, so that somebody's published
figure can be had again from his pictures (`Protocol`).
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
"""How luma is taken from a picture.

- "basicsr": as BasicSR and EDSR do, in floating point; a grey picture counts as three equal channels, hence as
  16..235.
- "matlab": as `rgb2ycbcr` does with uint8, rounded; a grey picture is luma already and counts as 0..255. Its PSNR is
  1.3 dB lower for the same picture.
"""


class Score(NamedTuple):
    """How alike two pictures are, or the pictures of a set in the mean.

    Attributes:
        psnr: in dB.
        ssim: at most 1.
    """

    psnr: float
    ssim: float


_WEIGHTS = (65.481, 128.553, 24.966)  # ITU-R BT.601, to 16..235
_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def luma(picture: UInt8[Tensor, "h w *c"], protocol: Protocol = "basicsr") -> Float[Tensor, "h w"]:
    r"""Return $Y = 16 + (65.481 R + 128.553 G + 24.966 B) / 255$ of a picture, in float64.

    Args:
        picture: grey `(h, w)` or RGB `(h, w, 3)`, uint8.
        protocol: what is rounded, and what grey is; see `Protocol`.

    Raises:
        ShapeError: the picture is neither grey nor RGB.
        TypeError: it is not uint8.
        ValueError: there is no such protocol.

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
    r"""Return $10 \log_{10}(255^2 / \mathrm{mean}((a - b)^2))$ in dB; infinite for equal pictures.

    Args:
        one: luma, 0..255.
        other: of the same size.
        border: pixels left out on each side, >= 0; papers leave out as many as the factor.

    Raises:
        ShapeError: the sizes differ, or nothing is left within the border.
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

    Gaussian windows of 11 pixels, $\sigma = 1.5$, wherever one fits in whole; $K_1 = 0.01$, $K_2 = 0.03$, peak 255.

    Args:
        one: as in `psnr`.
        other: as in `psnr`.
        border: as in `psnr`.

    Raises:
        ShapeError: the sizes differ, or no window fits within the border.
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
    """Return what papers' tables have of two pictures: `psnr` and `ssim`.

    Args:
        one: as in `psnr`.
        other: as in `psnr`.
        border: as in `psnr`.

    Raises:
        ShapeError: as in `ssim`.
        ValueError: `border < 0`.

    Examples:
        >>> one = luma(torch.randint(256, (32, 32, 3)).byte())
        >>> score(one, one, border=2)
        Score(psnr=inf, ssim=1.0)
    """
    return Score(psnr(one, other, border=border), ssim(one, other, border=border))


def bicubic_luma(picture: UInt8[Tensor, "h w *c"], upscale: int) -> tuple[Float[Tensor, "h w"], Float[Tensor, "h w"]]:
    """Return the luma of a picture, and what is left of it when it is shrunk and enlarged: papers' row "bicubic".

    That row comes from SRCNN's code and has been copied since. There luma is taken first ("matlab"), cut to a multiple
    of the factor, shrunk and enlarged without rounding between, and rounded at the end. No 8-bit small picture exists,
    unlike the one that networks are given; enlarging that gives 0.01 to 0.03 dB less.

    Args:
        picture: the high resolution, grey `(h, w)` or RGB `(h, w, 3)`, uint8.
        upscale: the factor, >= 1.

    Returns:
        The luma and the enlarged luma, both whole numbers in float64 and of one size.

    Raises:
        ShapeError: the picture is neither grey nor RGB, or a side is shorter than `upscale`.
        TypeError: it is not uint8.
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
    """Return `one` without its border."""
    if border < 0:
        raise ValueError(f"border must be >= 0, got {border}")
    if one.shape != other.shape:
        raise ShapeError(f"pictures must be of one size, got {tuple(one.shape)} and {tuple(other.shape)}")
    if min(one.shape) < 2 * border + least:
        raise ShapeError(
            f"both sides must be >= {2 * border + least} with a border of {border}, got {one.shape[0]}x{one.shape[1]}"
        )
    return one[border : one.shape[0] - border, border : one.shape[1] - border].to(torch.float64)
