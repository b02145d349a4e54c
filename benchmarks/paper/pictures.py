"""Pictures to train and validate on: pairs in memory, and patches that are the same for all who are compared."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from sparse_sr_attn.data.images import as_rgb, read_pixels
from sparse_sr_attn.data.imresize import crop_to_multiple, matlab_bicubic
from sparse_sr_attn.errors import ImageError


@dataclass(frozen=True, eq=False)
class Pair:
    """A picture and what bicubic shrinking leaves of it, uint8.

    Attributes:
        name: of its file, without suffix.
        high: RGB, (h * upscale, w * upscale, 3).
        low: RGB, (h, w, 3).
    """

    name: str
    high: UInt8[Tensor, "H W 3"]
    low: UInt8[Tensor, "h w 3"]


def read_pairs(paths: Sequence[Path], upscale: int, *, smallest: int, crop: int | None = None) -> list[Pair]:
    """Read pictures, grey ones as RGB, and shrink them by `upscale`.

    Args:
        paths: of pictures of high resolution.
        upscale: the factor.
        smallest: pictures whose shrunk sides are shorter are left out.
        crop: shrunk pictures are no larger than this: the middle of larger ones is taken, before shrinking.

    Raises:
        ImageError: a picture cannot be read, or none is large enough.
    """
    pairs = []
    for path in paths:
        try:
            high = as_rgb(read_pixels(path))
        except ImageError as error:
            raise ImageError(f"{path} {error}") from error
        if min(high.shape[:2]) < smallest * upscale:
            continue
        if crop is not None:
            high = _middle(high, crop * upscale)
        high = crop_to_multiple(high, upscale).contiguous()
        pairs.append(Pair(path.stem, high, matlab_bicubic(high, upscale)))
    if not pairs:
        raise ImageError(
            f"a picture must have at least {smallest * upscale} pixels a side, and none of {len(paths)} has"
        )
    return pairs


def digest(pairs: Iterable[Pair]) -> str:
    """Return a short text that other pictures do not have."""
    found = hashlib.sha256()
    for pair in pairs:
        found.update(str(tuple(pair.high.shape)).encode())
        found.update(pair.high.numpy().tobytes())
    return found.hexdigest()[:12]


def patches(
    pairs: Sequence[Pair], *, side: int, batch: int, seed: int
) -> Iterator[tuple[Float[Tensor, "b 3 h w"], Float[Tensor, "b 3 H W"]]]:
    """Yield batches without end, low and high in 0..1: places and flips hang on `seed` alone, not on who trains.

    Args:
        pairs: large enough, see `read_pairs`.
        side: of a low-resolution patch.
        batch: patches at a time.
        seed: of the draws.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(below: int) -> int:
        return int(torch.randint(below, (), generator=generator))

    while True:
        lows, highs = [], []
        for _ in range(batch):
            pair = pairs[draw(len(pairs))]
            top, left = (draw(size - side + 1) for size in pair.low.shape[:2])
            upscale = pair.high.shape[0] // pair.low.shape[0]
            turn = draw(8)
            lows.append(_turned(pair.low[top : top + side, left : left + side], turn))
            top, left, length = top * upscale, left * upscale, side * upscale
            highs.append(_turned(pair.high[top : top + length, left : left + length], turn))
        yield as_input(torch.stack(lows)), as_input(torch.stack(highs))


def as_input(pictures: UInt8[Tensor, "*b h w 3"]) -> Float[Tensor, "*b 3 h w"]:
    """Return pictures as networks take them, in 0..1."""
    return pictures.movedim(-1, -3).float() / 255


def as_picture(image: Float[Tensor, "3 h w"]) -> UInt8[Tensor, "h w 3"]:
    """Return what a network makes as a picture: rounded and clipped."""
    return image.mul(255).round().clamp(0, 255).to(torch.uint8).movedim(0, -1).contiguous()


def _turned(picture: Tensor, turn: int) -> Tensor:
    """Return one of the eight pictures that flips and a transposition make."""
    picture = picture.flip([axis for axis in (0, 1) if turn >> axis & 1])
    return picture.transpose(0, 1) if turn & 4 else picture


def _middle(picture: Tensor, side: int) -> Tensor:
    for axis in (0, 1):
        length = min(side, picture.shape[axis])
        picture = picture.narrow(axis, (picture.shape[axis] - length) // 2, length)
    return picture
