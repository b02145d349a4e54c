"""Every suffix that is written, with every kind of picture: it comes back the same, or is refused."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from sparse_sr_attn import ImageError
from sparse_sr_attn.data.images import FORMATS, Picture, check_format, read_image, write_image

HEIGHT, WIDTH = 21, 33  # of no width that formats pad to
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def ramps(peak: int = 255) -> np.ndarray:
    """Four planes with more colours than a palette has, every alpha among them."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH] / [[[HEIGHT - 1]], [[WIDTH - 1]]]
    return (np.stack([x, y, (x + y) / 2, (1 + x - y) / 2], axis=-1) * peak).astype(
        np.uint16 if peak > 255 else np.uint8
    )


PICTURES = {
    "grey": Picture(ramps()[..., 0]),
    "grey with alpha": Picture(ramps()[..., 0], ramps()[..., 3]),
    "16-bit grey": Picture(ramps(65535)[..., 2]),
    "RGB": Picture(ramps()[..., :3]),
    "RGBA": Picture(ramps()[..., :3], ramps()[..., 3]),
    "RGB with a profile": Picture(ramps()[..., :3], None, PROFILE),
}


def assert_same(path: Path, picture: Picture) -> None:
    """The file holds the picture, as Pillow alone reads it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(path) as image:
            image.load()
    assert image.size == (WIDTH, HEIGHT)
    assert image.info.get("icc_profile") == picture.icc_profile
    assert image.has_transparency_data == (picture.alpha is not None)
    if picture.pixels.dtype == np.uint16:
        found = np.asarray(image).astype(int)  # Pillow has several modes for it
    else:
        assert image.mode in ("L", "LA", "P", "RGB", "RGBA")
        found = np.asarray(image.convert("RGBA")).astype(int)
    wanted = picture.pixels if picture.pixels.dtype == np.uint16 else np.broadcast_to(
        np.atleast_3d(picture.pixels), (HEIGHT, WIDTH, 3)
    )  # fmt: skip
    colours = found if found.ndim == 2 else found[..., :3]
    alpha = 255 if picture.alpha is None else picture.alpha.astype(int)
    errors = [np.abs(colours - wanted) * (1 if found.ndim == 2 else np.atleast_3d(alpha) / 255)]
    if found.ndim == 3:
        errors.append(np.abs(found[..., 3] - alpha))
    for error in errors:
        assert error.max() <= (16 if image.format == "JPEG" else 0)
        assert error.mean() <= 2


REFUSED = {"16-bit grey": {".webp", ".jpg", ".jpeg"}, "RGBA": {".jpg", ".jpeg"}, "grey with alpha": {".jpg", ".jpeg"}}


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("kind", PICTURES)
def test_a_picture_comes_back_or_is_refused(kind: str, suffix: str, tmp_path: Path) -> None:
    path, picture, refused = tmp_path / f"a{suffix}", PICTURES[kind], REFUSED.get(kind, set())
    if suffix not in refused:
        write_image(picture, path)
        assert_same(path, picture)
        return
    others = ", ".join(other for other in FORMATS if other not in refused)
    for call in (check_format, lambda path, picture: write_image(picture, path)):
        with pytest.raises(ImageError, match=rf"cannot hold this picture of 33x21 pixels: .*; {others} can$"):
            call(path, picture)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file", ["a", "a.gif", "a.txt"])
def test_other_suffixes_are_refused(file: str) -> None:
    with pytest.raises(ImageError, match=rf"{file} must have one of the suffixes \.png, "):
        check_format(Path(file), PICTURES["RGB"])


@pytest.mark.parametrize(("suffix", "largest"), [(".webp", 16383), (".jpg", 65500)])
@pytest.mark.parametrize("upright", [False, True])
def test_sizes_that_a_format_cannot_hold(
    suffix: str, largest: int, upright: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    def lines(side: int) -> Picture:
        return Picture(np.zeros((side, 1, 3) if upright else (1, side, 3), np.uint8))

    check_format(Path(f"a{suffix}"), lines(largest))
    with pytest.raises(ImageError, match=r"sides must be at most .*; \.png, \.tif"):
        check_format(Path(f"a{suffix}"), lines(largest + 1))
    with pytest.raises(ImageError, match="cannot hold this picture"):
        check_format(Path(f"a{suffix}"), lines(largest // 2 + 1), upscale=2)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("suffix", ["png", "tif", "ppm"])
def test_lost_bits_are_told(suffix: str, tmp_path: Path) -> None:
    """Files that Pillow cannot write itself: colours of more than 8 bits."""
    cv2 = pytest.importorskip("cv2")
    pixels = np.random.default_rng(0).integers(0, 65536, (64, 70, 3), dtype=np.uint16)
    for deep in (False, True):
        file = tmp_path / f"{deep}.{suffix}"
        cv2.imwrite(str(file), pixels if deep else pixels.astype(np.uint8))
        picture = read_image(file)
        assert picture.pixels.dtype == np.uint8
        assert picture.reduced == deep
    cv2.imwrite(str(tmp_path / "grey.png"), pixels[..., 0])
    assert not read_image(tmp_path / "grey.png").reduced  # all 16 are there
