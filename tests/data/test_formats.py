"""Every suffix that Pillow writes, with every kind of picture: it comes back the same, or is refused."""

import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from sparse_sr_attn import ImageError
from sparse_sr_attn.data.images import Picture, check_format, read_image, write_image

SUFFIXES = sorted(suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.SAVE)
LOSSY = ("JPEG", "MPO", "AVIF")
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
        assert error.max() <= (16 if image.format in LOSSY else 0)
        assert error.mean() <= 2


def written(suffix: str, picture: Picture, folder: Path) -> bool:
    """Whether the picture was written, and came back; if not, it was refused as it should be."""
    path = folder / f"a{suffix}"
    try:
        check_format(path, picture)
    except ImageError as refusal:
        with pytest.raises(ImageError, match=re.escape(str(refusal))):
            write_image(picture, path)
        assert list(folder.iterdir()) == []
        assert re.search(r"cannot hold this picture \(33x21, .*: .*; \.png.* can$", str(refusal))
        assert "\n" not in str(refusal)
        for other in re.findall(r"(\.\w+)(?=,| can$)", str(refusal).rpartition(";")[2]):  # those that it names
            write_image(picture, folder / f"b{other}")
            assert_same(folder / f"b{other}", picture)
        return False
    write_image(picture, path)
    assert_same(path, picture)
    return True


@pytest.mark.parametrize("kind", PICTURES)
def test_a_picture_comes_back_or_is_refused(kind: str, tmp_path: Path) -> None:
    for suffix in SUFFIXES:
        folder = tmp_path / suffix
        folder.mkdir()
        written(suffix, PICTURES[kind], folder)


@pytest.mark.parametrize(
    ("kind", "suffixes"),
    {
        "grey": {".png", ".jpg", ".tif", ".webp", ".bmp", ".gif", ".pgm", ".jp2", ".tga", ".ico"},
        "16-bit grey": {".png", ".tif", ".jp2", ".pgm"},
        "RGB": {".png", ".jpg", ".tif", ".webp", ".bmp", ".ppm", ".jp2", ".tga", ".ico", ".qoi"},
        "RGBA": {".png", ".tif", ".webp", ".jp2", ".tga", ".ico"},
        "RGB with a profile": {".png", ".jpg", ".tif", ".webp"},
    }.items(),
)
def test_what_formats_can_hold_is_not_refused(kind: str, suffixes: set[str], tmp_path: Path) -> None:
    for suffix in suffixes:
        assert written(suffix, PICTURES[kind], tmp_path)


@pytest.mark.parametrize(
    ("file", "start"),
    [("a.jp2", b"\0\0\0\x0cjP  "), ("a.j2k", b"\xff\x4f\xff\x51"), ("a.jpc", b"\xff\x4f\xff\x51"), ("a.pgm", b"P5")],
)
def test_the_suffix_tells_apart_what_one_writer_writes(file: str, start: bytes, tmp_path: Path) -> None:
    write_image(PICTURES["grey"], tmp_path / file)
    assert (tmp_path / file).read_bytes().startswith(start)


@pytest.mark.parametrize(("suffix", "largest"), [(".webp", 16383), (".jpg", 65500), (".tga", 65535), (".ico", 256)])
@pytest.mark.parametrize("upright", [False, True])
def test_sizes_that_a_format_cannot_hold(
    suffix: str, largest: int, upright: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    def lines(side: int) -> Picture:
        return Picture(np.zeros((side, 1, 3) if upright else (1, side, 3), np.uint8))

    check_format(Path(f"a{suffix}"), lines(largest))
    with pytest.raises(ImageError, match=r"cannot hold this picture .*; \.png, \.tif"):
        check_format(Path(f"a{suffix}"), lines(largest + 1))
    with pytest.raises(ImageError, match="cannot hold this picture"):
        check_format(Path(f"a{suffix}"), lines(largest // 2 + 1), upscale=2)
    assert capfd.readouterr() == ("", "")


def test_files_that_would_become_too_large() -> None:
    picture = Picture(np.broadcast_to(np.zeros((), np.uint8), (30_000, 40_000, 3)))  # of no memory
    check_format(Path("a.png"), picture, upscale=2)
    check_format(Path("a.bmp"), picture)
    with pytest.raises(ImageError, match=r"a\.bmp cannot hold .*80000x60000.*: it is too large"):
        check_format(Path("a.bmp"), picture, upscale=2)


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
