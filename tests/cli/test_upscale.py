"""`sparse-sr upscale`: awkward images give the right result or one line, and nothing is ever half-written."""

import os
import platform
import signal
import stat
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from torch import Tensor, nn

from sparse_sr_attn import EDSR, ImageError
from sparse_sr_attn.cli.main import main
from sparse_sr_attn.data.images import read_image

Array = Any


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, nn.Module]]:
    """A network of one channel and one of three, x2, as files and as they are."""
    folder = tmp_path_factory.mktemp("weights")
    made = {}
    for channels in (1, 3):
        torch.manual_seed(channels)
        model = EDSR(channels, channels, num_feat=4, num_block=1, upscale=2).eval()
        with torch.no_grad():  # images like the input, not grey
            model.conv_last.weight.mul_(3)
        torch.save({"params": model.state_dict()}, folder / f"{channels}.pth")
        made[channels] = (folder / f"{channels}.pth", model)
    return made


@pytest.fixture
def upscale(
    here: Path, nets: dict[int, tuple[Path, nn.Module]], capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: object, channels: int = 3) -> tuple[int, str, str]:
        status = main(["upscale", "--device", "cpu", "--weights", str(nets[channels][0]), *map(str, arguments)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def opened(path: str) -> Image.Image:
    """An image and no open file."""
    with Image.open(path) as image:
        image.load()
        return image.copy()


def noise(*shape: int, peak: int = 255) -> Array:
    return np.random.default_rng(0).integers(0, peak + 1, shape, dtype=np.uint16 if peak > 255 else np.uint8)


def expected(model: nn.Module, pixels: Array, peak: int = 255) -> Array:
    """What the whole image should become, by way of floats and rounding, pixel formats aside."""
    planes = [
        torch.from_numpy(plane.astype(np.float64) / peak).float() for plane in np.moveaxis(np.atleast_3d(pixels), 2, 0)
    ]
    with torch.no_grad():
        if model.num_in_ch == 1:
            high = torch.cat([model(plane[None, None]) for plane in planes], dim=1)
        else:
            high = model(torch.stack(planes * (3 // len(planes)))[None])
    if len(planes) == 1 and model.num_in_ch == 3:
        red, green, blue = high[0]
        high = (0.299 * red + 0.587 * green + 0.114 * blue)[None, None]
    result = np.clip(np.rint(high[0].double().numpy() * peak), 0, peak).astype(pixels.dtype)
    return np.moveaxis(result, 0, 2) if pixels.ndim == 3 else result[0]


def close(image: Image.Image, array: Array, mode: str) -> None:
    """Equal, but for the few that round the other way."""
    assert image.mode == mode
    found = np.asarray(image)
    assert found.dtype == array.dtype
    assert found.shape == array.shape
    off = np.abs(found.astype(int) - array.astype(int))
    assert int(off.max()) <= 1
    assert int(off.sum()) <= max(1, off.size // 50)


# ------------------------------------------------------------------------------------------------ kinds of pixels


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(1, 1), (1, 2000), (2000, 1), (7, 5), (530, 9)], ids=str)
def test_sizes_and_channels(upscale: Any, nets: Any, size: tuple[int, int], channels: int) -> None:
    pixels = noise(*size, 3)
    Image.fromarray(pixels).save("photo.png")
    assert upscale("photo.png", "--overlap", 64, channels=channels) == (0, "photo.png -> photo_x2.png\n", "")
    close(opened("photo_x2.png"), expected(nets[channels][1], pixels), "RGB")
    assert sorted(os.listdir()) == ["photo.png", "photo_x2.png"]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "pgm", "webp"])
def test_grey_stays_grey(upscale: Any, nets: Any, suffix: str, channels: int) -> None:
    pixels = noise(9, 6)
    Image.fromarray(pixels).save(f"grey.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    assert upscale(f"grey.{suffix}", channels=channels)[0] == 0
    result = opened("grey_x2.png")
    if suffix == "webp":  # it knows colours only
        close(result, expected(nets[channels][1], np.dstack([pixels] * 3)), "RGB")
    else:
        close(result, expected(nets[channels][1], pixels), "L")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bits_stay(upscale: Any, nets: Any, suffix: str, channels: int) -> None:
    pixels = noise(9, 6, peak=65535)
    Image.fromarray(pixels).save(f"deep.{suffix}")
    assert upscale(f"deep.{suffix}", channels=channels)[0] == 0
    result = np.asarray(opened("deep_x2.png"))
    want = expected(nets[channels][1], pixels, peak=65535)
    assert result.dtype == np.uint16
    assert int(np.abs(result.astype(int) - want.astype(int)).max()) <= 1
    assert len(set((result % 257).flatten().tolist())) > 50  # not eight bits, stretched


def png16(array: Array) -> bytes:
    """A 16-bit PNG of as many channels as the array has, which Pillow cannot write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, channels = array.shape
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("channels", "mode"), [(2, "LA"), (3, "RGB"), (4, "RGBA")])
def test_sixteen_bit_colours_are_what_pillow_makes_of_them(upscale: Any, nets: Any, channels: int, mode: str) -> None:
    deep = noise(5, 6, channels, peak=65535)
    if channels != 3:
        deep[..., -1] |= 0x4000  # all is visible
    Path("deep.png").write_bytes(png16(deep))
    status, _, err = upscale("deep.png")
    assert (status, err) == (
        0,
        "sparse-sr: note: deep.png: Pillow reads only 8 bits per channel of it, and the result has 8\n",
    )
    result = opened("deep_x2.png")
    assert result.mode == mode
    colours = (deep[..., :3] if channels > 2 else deep[..., 0]) >> 8
    found = np.asarray(result)
    found = found[..., :3] if channels > 2 else found[..., 0]
    assert int(np.abs(found.astype(int) - expected(nets[3][1], colours.astype(np.uint8)).astype(int)).max()) <= 1


def bicubic(alpha: Array) -> Array:
    """Twice as large by Keys' kernel with a = -1/2, edges renormalised; rows first, and bytes between, as in Pillow."""

    def weights(n: int) -> Array:
        at = (np.arange(2 * n) + 0.5) / 2 - 0.5
        t = np.abs(at[:, None] - np.arange(n)[None])
        near, far = 1.5 * t**3 - 2.5 * t**2 + 1, -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
        matrix = np.where(t <= 1, near, np.where(t < 2, far, 0))
        return matrix / matrix.sum(axis=1, keepdims=True)

    rows = np.clip(alpha @ weights(alpha.shape[1]).T, 0, 255).round()
    return np.clip(weights(alpha.shape[0]) @ rows, 0, 255)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_alpha_is_bicubic_and_kept(upscale: Any, nets: Any, mode: str, channels: int) -> None:
    pixels = noise(8, 7, len(mode))
    pixels[..., -1] |= 0x40  # all is visible
    Image.fromarray(pixels).save("clear.png")
    assert upscale("clear.png", channels=channels)[0] == 0
    result = np.asarray(opened("clear_x2.png"))
    assert opened("clear_x2.png").mode == mode
    colours = pixels[..., 0] if mode == "LA" else pixels[..., :3]
    found = result[..., 0] if mode == "LA" else result[..., :3]
    assert int(np.abs(found.astype(int) - expected(nets[channels][1], colours).astype(int)).max()) <= 1
    assert float(np.abs(result[..., -1] - bicubic(pixels[..., -1])).max()) <= 1.5


HIDDEN: dict[str, tuple[Callable[[int], Image.Image], dict[str, Any]]] = {
    "RGBA": (lambda grey: Image.fromarray(disc([grey, grey, 0], [250, 240, 230])), {}),
    "LA": (lambda grey: Image.fromarray(disc([grey], [250])), {}),
    "a colour": (
        lambda grey: Image.fromarray(disc([grey, 7, 0], [250, 240, 230])[..., :3]),
        {"transparency": (1, 7, 0)},
    ),
    "a grey": (lambda grey: Image.fromarray(disc([grey], [250])[..., 0]), {"transparency": 1}),
}
"""A light disc on a ground that alpha hides, whatever its colour is."""


def disc(ground: list[int], light: list[int]) -> Array:
    y, x = np.mgrid[0:40, 0:40] - 19.5
    inside = (x**2 + y**2 < 150)[..., None]
    return np.where(inside, [*light, 255], [*ground, 0]).astype(np.uint8)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("channels", [1, 3])
def test_hidden_colours_never_matter(upscale: Any, mode: str, channels: int) -> None:
    picture, _ = HIDDEN[mode]
    for grey in (0, 255):
        picture(grey).save(f"{grey}.png")
        assert upscale(f"{grey}.png", channels=channels)[0] == 0
    assert np.array_equal(np.asarray(opened("0_x2.png")), np.asarray(opened("255_x2.png")))


@pytest.mark.parametrize("kind", HIDDEN)
def test_no_rim_around_what_is_visible(here: Path, kind: str) -> None:
    """Over its own colour a disc of one colour has no edge that anybody could see."""
    picture, options = HIDDEN[kind]
    picture(1).save("a.png", **options)
    assert main(["upscale", "a.png"]) == 0
    result = np.asarray(opened("a_x2.png").convert("RGBA")).astype(float)
    light = np.array([250, 240, 230] if kind in ("RGBA", "a colour") else [250, 250, 250])
    alpha = result[..., 3:] / 255
    over = alpha * result[..., :3] + (1 - alpha) * light
    assert float(np.abs(over - light).max()) <= 6  # 94 without


def coloured(mode: str) -> Image.Image:
    image = Image.fromarray(noise(6, 5, 3))
    if mode == "1":
        return Image.fromarray(noise(6, 5)).convert("1")
    return image.quantize(7) if mode == "P" else image.convert(mode)


@pytest.mark.parametrize(
    ("mode", "file", "options", "result"),
    [
        ("P", "a.png", {}, "RGB"),
        ("P", "a.gif", {}, "RGB"),
        ("P", "a.png", {"transparency": 2}, "RGBA"),
        ("P", "a.png", {"transparency": bytes([0, 128, 255, 7, 8, 9, 10])}, "RGBA"),
        ("RGB", "a.png", {"transparency": (1, 2, 3)}, "RGBA"),
        ("L", "a.png", {"transparency": 3}, "LA"),
        ("1", "a.png", {}, "L"),
        ("CMYK", "a.tif", {}, "RGB"),
        ("CMYK", "a.jpg", {}, "RGB"),
        ("YCbCr", "a.jpg", {}, "RGB"),
        ("L", "a.jpg", {}, "L"),
    ],
)
def test_other_modes(upscale: Any, nets: Any, mode: str, file: str, options: Any, result: str) -> None:
    coloured(mode).save(file, **options)
    assert upscale(file) == (0, f"{file} -> a_x2.png\n", "")
    found, plain = opened("a_x2.png"), opened(file).convert(result)
    assert found.mode == result
    if result.endswith("A") and np.asarray(plain.getchannel("A")).min() < 16:
        return  # hidden colours are not looked at
    colours = np.asarray(plain)
    if result.endswith("A"):
        colours = colours[..., 0] if result == "LA" else colours[..., :3]
        close(found.getchannel("A"), np.asarray(plain.getchannel("A").resize((10, 12), Image.Resampling.BICUBIC)), "L")
        found = found.getchannel(0) if result == "LA" else Image.merge("RGB", found.split()[:3])
    close(found, expected(nets[3][1], colours), result.removesuffix("A"))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_rotation_by_exif(upscale: Any, nets: Any, orientation: int) -> None:
    """The first row of the file lies where the tag says, in Exif 2.3, 4.6.4."""
    pixels = noise(6, 9, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save("turned.png", exif=exif)
    upright = {
        1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1],
        5: pixels.transpose(1, 0, 2), 6: np.rot90(pixels, -1), 7: pixels[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(pixels),
    }[orientation]  # fmt: skip
    assert upscale("turned.png")[0] == 0
    close(opened("turned_x2.png"), expected(nets[3][1], np.ascontiguousarray(upright)), "RGB")
    assert opened("turned_x2.png").getexif().get(0x0112, 1) == 1
    Image.fromarray(noise(6, 9, peak=65535)).save("deep.png", exif=exif)
    assert upscale("deep.png")[0] == 0
    assert opened("deep_x2.png").size == opened("turned_x2.png").size


def test_colour_profile_is_kept_but_not_that_of_cmyk(upscale: Any) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(noise(5, 5, 3)).save("rgb.png", icc_profile=profile)
    coloured("CMYK").save("cmyk.tif", icc_profile=profile)
    assert upscale("rgb.png")[0] == upscale("cmyk.tif")[0] == 0
    assert opened("rgb_x2.png").info["icc_profile"] == profile
    assert "icc_profile" not in opened("cmyk_x2.png").info


# ------------------------------------------------------------------------------------------------------- bad files


def photo(file: str = "good.png") -> None:
    Image.fromarray(noise(6, 5, 3)).save(file)


def cut(file: str, share: float) -> None:
    Image.fromarray(noise(200, 200, 3)).save(file)
    data = Path(file).read_bytes()
    Path(file).write_bytes(data[: int(share * len(data))])


def animated(file: str) -> None:
    frames = [Image.fromarray(noise(6, 5, 3) // (1 + i)) for i in range(3)]
    frames[0].save(file, save_all=True, append_images=frames[1:])


def bomb(file: str) -> None:
    """A PNG whose header promises 60,000 x 60,000."""
    data = bytearray(png16(noise(1, 1, 3, peak=65535)))
    data[16:24] = struct.pack(">II", 60_000, 60_000)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    Path(file).write_bytes(bytes(data))


BAD: dict[str, tuple[Callable[[str], object], str]] = {
    "cut.png": (lambda f: cut(f, 0.5), "cannot be read: image file is truncated"),
    "cut.jpg": (lambda f: cut(f, 0.5), "cannot be read: image file is truncated"),
    "cut.webp": (lambda f: cut(f, 0.5), "cannot be read: "),
    "head.png": (lambda f: cut(f, 0.0002), "cannot be read: Truncated File Read"),
    "empty.png": (lambda f: Path(f).touch(), "is not an image that Pillow can read"),
    "text.jpg": (lambda f: Path(f).write_text("hello"), "is not an image that Pillow can read"),
    "moves.gif": (animated, "must be a single picture, got 3 frames"),
    "moves.webp": (animated, "must be a single picture, got 3 frames"),
    "pages.tif": (animated, "must be a single picture, got 3 frames"),
    "moves.png": (animated, "must be a single picture, got 3 frames"),
    "bomb.png": (bomb, "must have at most 178,956,970 pixels (--max-pixels), got 3,600,000,000"),
    "float.tif": (
        lambda f: Image.fromarray(noise(4, 4).astype(np.float32)).save(f),
        "has floating-point pixels of unknown range",
    ),
    "wide.tif": (
        lambda f: Image.fromarray(np.full((4, 4), 70_000, np.int32)).save(f),
        "must have values in 0..65535, got 70000..70000",
    ),
}


@pytest.mark.parametrize("file", BAD)
def test_a_bad_file_is_one_line(upscale: Any, file: str) -> None:
    make, message = BAD[file]
    make(file)
    status, out, err = upscale(file)
    assert (status, out) == (1, "")
    assert err.startswith(f"sparse-sr: {file}: {message}"), err
    assert err.count("\n") == 1
    assert os.listdir() == [file]


@pytest.mark.parametrize(
    "suffix", ["png", "jpg", "gif", "tif", "webp", "bmp", "pgm", "ico", "tga", "pcx", "sgi", "jp2", "psd"]
)
def test_damaged_files_are_read_or_refused(here: Path, suffix: str) -> None:
    """Whatever decoders raise over a few wrong bytes, it is an ImageError."""
    file = Path(f"a.{suffix}")
    if suffix == "psd":  # Pillow does not write it: 5 x 6 grey, 8 bits, nothing else, raw
        whole = b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 1, 6, 5, 8, 1) + bytes(14) + bytes(30)
    else:
        Image.fromarray(noise(40, 30)).save(file)
        whole = file.read_bytes()
    random = np.random.default_rng(1)
    refused = 0
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(random.integers(1, 6)):
            damaged[int(len(damaged) * random.random() ** 3)] = random.integers(0, 256)
        file.write_bytes(damaged[: random.integers(1, 2 * len(damaged))])
        try:
            picture = read_image(file, max_pixels=100_000)
        except ImageError as error:
            assert "\n" not in str(error)
            refused += 1
        else:
            assert picture.pixels.size
    assert refused


@pytest.mark.parametrize(
    ("owner", "name", "error", "status", "message"),
    [
        (Image, "open", PermissionError(13, "Permission denied"), 1, "good.png: cannot be read: Permission denied"),
        (
            EDSR,
            "forward",
            RuntimeError("something with a kernel\nand how to debug"),
            1,
            "good.png: something with a kernel",
        ),
        (EDSR, "forward", KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_fails_is_one_line(
    upscale: Any,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    error: BaseException,
    status: int,
    message: str,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    photo()
    monkeypatch.setattr(owner, name, fail)
    assert upscale("good.png") == (status, "", f"sparse-sr: {message}\n")
    assert os.listdir() == ["good.png"]


def test_large_images_are_refused_or_allowed_as_asked(upscale: Any) -> None:
    photo("photo.png")  # 30 pixels
    assert upscale("photo.png", "--max-pixels", 29)[0] == 1
    assert not Path("photo_x2.png").exists()
    before = Image.MAX_IMAGE_PIXELS
    assert upscale("photo.png", "--max-pixels", 30)[0] == 0
    assert before == Image.MAX_IMAGE_PIXELS


def test_a_result_that_fits_into_no_memory(upscale: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    photo()
    real = np.empty

    def empty(shape: Any, *rest: Any, **options: Any) -> Any:
        if shape == (12, 10, 3):
            raise MemoryError
        return real(shape, *rest, **options)

    monkeypatch.setattr(np, "empty", empty)
    status, _, err = upscale("good.png")
    assert (status, err) == (1, "sparse-sr: good.png: becomes 10x12, which does not fit in memory\n")


def test_numbers_that_are_not_finite(upscale: Any, nets: Any, here: Path) -> None:
    photo()
    model = EDSR(num_feat=4, num_block=1, upscale=2)
    with torch.no_grad():
        model.conv_first.weight.fill_(3e38)
    torch.save(model.state_dict(), "wild.pth")
    status, _, err = upscale("good.png", "--weights", "wild.pth")
    assert (status, err) == (1, "sparse-sr: good.png: the output of the network is not finite\n")
    assert sorted(os.listdir()) == ["good.png", "wild.pth"]


# ----------------------------------------------------------------------------------------------------- several files


def test_a_folder_with_other_things_in_it(upscale: Any, nets: Any) -> None:
    folder = Path("photos")
    folder.mkdir()
    photo("photos/a.png")
    photo("photos/größe 大.jpg")
    cut("photos/broken.png", 0.5)
    (folder / "notes.txt").write_text("hello")
    (folder / ".hidden.png").write_text("hello")
    (folder / "inner.png").mkdir()
    status, out, err = upscale("photos")
    assert status == 1
    assert out.splitlines() == [
        "photos/a.png -> photos_x2/a_x2.png",
        "photos/größe 大.jpg -> photos_x2/größe 大_x2.png",
    ]
    assert err.splitlines()[0].startswith("sparse-sr: photos/broken.png: cannot be read: image file is truncated")
    assert err.splitlines()[1:] == ["sparse-sr: 1 of 3 images failed"]
    assert sorted(os.listdir("photos_x2")) == ["a_x2.png", "größe 大_x2.png"]
    close(opened("photos_x2/a_x2.png"), expected(nets[3][1], np.asarray(opened("photos/a.png"))), "RGB")


def test_the_same_stem_twice(upscale: Any, nets: Any) -> None:
    Path("in").mkdir()
    Image.fromarray(noise(6, 5, 3)).save("in/a.png")
    Image.fromarray(noise(4, 3, 3)).save("in/A.bmp")
    photo("in/b.png")
    assert upscale("in", "--output", "out")[0] == 0
    assert sorted(os.listdir("out")) == ["A.bmp_x2.png", "a.png_x2.png", "b_x2.png"]
    assert opened("out/A.bmp_x2.png").size == (6, 8)
    assert opened("out/a.png_x2.png").size == (10, 12)


def test_names_that_only_folders_tell_apart(upscale: Any) -> None:
    for folder in ("in", "other"):
        Path(folder).mkdir()
        for file in ("a.png", "a.bmp", "a.png.png"):
            photo(f"{folder}/{file}")
    assert upscale("in", "other")[0] == 0
    for folder in ("in", "other"):
        assert sorted(os.listdir(f"{folder}_x2")) == ["a.bmp_x2.png", "a.png.png_x2.png", f"{folder}_a.png_x2.png"]
    assert upscale("in", "other", "--output", "all")[0] == 0
    assert len(os.listdir("all")) == 6


def test_names_that_nothing_tells_apart(upscale: Any) -> None:
    for folder in ("one/in", "two/in"):
        Path(folder).mkdir(parents=True)
        photo(f"{folder}/a.png")
    status, out, err = upscale("one/in", "two/in", "--output", "all")
    assert (status, out) == (2, "")
    assert (
        err
        == "sparse-sr: one/in/a.png and two/in/a.png would get the same name; process them in two runs, or rename one\n"
    )
    assert sorted(os.listdir()) == ["one", "two"]


@pytest.mark.skipif(os.name != "posix", reason="such names exist on POSIX only")
@pytest.mark.parametrize("file", ["line\nbreak.png", os.fsdecode(b"byte\xff.png"), "-x.png"], ids=ascii)
def test_strange_names(upscale: Any, file: str) -> None:
    photo(f"./{file}")
    status, out, err = upscale(f"./{file}")
    assert (status, err, out.count("\n")) == (0, "", 1)
    assert Path(f"./{Path(file).stem}_x2.png").exists()
    Path(f"./{file}").write_bytes(b"")
    status, _, err = upscale(f"./{file}", "--overwrite")
    assert (status, err.count("\n")) == (1, 1)


# --------------------------------------------------------------------------------------------------- where results go


def test_what_is_there_stays_unless_asked(upscale: Any) -> None:
    photo()
    Path("good_x2.png").write_text("mine")
    status, out, err = upscale("good.png")
    assert (status, out) == (2, "")
    assert err == "sparse-sr: good.png: good_x2.png already exists; use --overwrite or another --output\n"
    assert Path("good_x2.png").read_text() == "mine"
    assert upscale("good.png", "--overwrite")[0] == 0
    assert opened("good_x2.png").size == (10, 12)
    before = Path("good.png").read_bytes()
    status, _, err = upscale("good.png", "--output", "good.png", "--overwrite")
    assert status == 2
    assert "would be replaced by its own result" in err
    assert Path("good.png").read_bytes() == before


def test_what_comes_meanwhile_stays_too(upscale: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    photo()
    real = os.fsync

    def slow(handle: int) -> None:
        real(handle)
        Path("good_x2.png").write_text("mine")

    monkeypatch.setattr(os, "fsync", slow)
    status, _, err = upscale("good.png")
    assert (status, err.count("already exists")) == (1, 1)
    assert Path("good_x2.png").read_text() == "mine"
    assert sorted(os.listdir()) == ["good.png", "good_x2.png"]


@pytest.mark.parametrize(
    ("make", "output", "message"),
    [
        (
            lambda: Image.fromarray(noise(5, 5, 4)).save("a.png"),
            "a.jpg",
            "JPEG has no transparency; .png, .tif, .tiff, .webp can",
        ),
        (lambda: photo("a.png"), "a.gif", "must have one of the suffixes .png, .tif, "),
        (lambda: Image.fromarray(noise(5, 5, peak=65535)).save("a.png"), "a.webp", "WEBP has no 16 bits; .png"),
        (
            lambda: Image.fromarray(noise(2, 8200)).save("a.png"),
            "a.webp",
            "16400x4 pixels: sides must be at most 16,383",
        ),
        (lambda: photo("a.png"), f"{'n' * 254}.png", "File name too long"),
        (lambda: (photo("a.png"), Path("file").touch()), "file/inner/b.png", "Not a directory"),
        (lambda: (photo("a.png"), Path("file").touch()), "file/b.png", "Not a directory"),
        (lambda: (photo("a.png"), Path("there.png").mkdir(), photo("there.png/a_x2.png")), "there.png", "exists"),
        (lambda: (photo("a.png"), Path("there_x2.png").mkdir()), "there_x2.png/", None),
    ],
)
def test_a_result_that_cannot_be_written_is_refused_before_the_work(
    upscale: Any, make: Any, output: str, message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    make()
    if message is None:
        assert upscale("a.png", "--output", output)[0] == 0
        return
    before = sorted(Path().rglob("*"))

    def work(*_: object) -> Tensor:
        raise AssertionError("the network was run")

    monkeypatch.setattr(EDSR, "forward", work)
    status, out, err = upscale("a.png", "--output", output)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert sorted(Path().rglob("*")) == before


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission_to_write(upscale: Any) -> None:
    photo()
    Path("there").mkdir(mode=0o555)
    status, _, err = upscale("good.png", "--output", "there/")
    assert (status, err) == (2, "sparse-sr: there cannot be written to: Permission denied; try another --output\n")


@pytest.mark.parametrize(
    ("inputs", "output", "made"),
    [
        (["a.png"], "results/v1.2/", ["results/v1.2/a_x2.png"]),
        (["a.png"], "new.png/", ["new.png/a_x2.png"]),
        (["a.png"], "new", ["new/a_x2.png"]),
        (["a.png"], "in", ["in/a_x2.png"]),
        (["a.png"], "big.jpg", ["big.jpg"]),
        (["a.png", "b.png"], "v1.2", ["v1.2/a_x2.png", "v1.2/b_x2.png"]),
        (["in"], "v1.2", ["v1.2/c_x2.png"]),
        (["in"], "out.png/", ["out.png/c_x2.png"]),
        (["a.png", "in", "b.png"], None, ["a_x2.png", "b_x2.png", "in_x2/c_x2.png"]),
        (["a.png", "./a.png", "a.png"], None, ["a_x2.png"]),
        (["a.png"], "a.tiff", ["a.tiff"]),
        (["in/c.png"], ".", ["c_x2.png"]),
        (["in/"], None, ["in_x2/c_x2.png"]),
    ],
)
def test_what_is_a_file_and_what_a_folder(upscale: Any, inputs: list[str], output: str | None, made: list[str]) -> None:
    Path("in").mkdir()
    for file in ("a.png", "b.png", "in/c.png"):
        photo(file)
    before = set(Path().rglob("*"))
    status, out, err = upscale(*inputs, *([] if output is None else ["--output", output]))
    assert (status, err, out.count("\n")) == (0, "", len(made))
    assert {str(file) for file in set(Path().rglob("*")) - before if file.is_file()} == set(made)
    assert opened(made[0]).size == (10, 12)


def test_results_are_named_as_the_folder_was(upscale: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    here = Path.cwd()
    Path("in/deep").mkdir(parents=True)
    photo("in/a.png")
    Path("link").symlink_to("in")
    monkeypatch.chdir("in/deep")
    for given, named in (
        ("../../in", "../../in_x2"),
        (f"{here}/in", f"{here}/in_x2"),
        ("..", f"{here}/in_x2"),
        ("../../link", "../../link_x2"),
    ):
        assert upscale(given, "--overwrite")[1] == f"{given}/a.png -> {named}/a_x2.png\n"


def test_a_second_run_does_what_is_left(upscale: Any) -> None:
    Path("in").mkdir()
    for file in "abc":
        photo(f"in/{file}.png")
    assert upscale("in")[0] == 0
    first = Path("in_x2/a_x2.png").stat().st_mtime_ns
    Path("in_x2/b_x2.png").unlink()
    status, out, err = upscale("in")
    assert (status, out) == (0, "in/b.png -> in_x2/b_x2.png\n")
    assert err == (
        "sparse-sr: note: 2 of 3 results exist, perhaps from other weights, and are skipped: "
        "in_x2/a_x2.png, in_x2/c_x2.png; use --overwrite or another --output\n"
    )
    assert upscale("in")[0:2] == (0, "")  # nothing is left
    assert Path("in_x2/a_x2.png").stat().st_mtime_ns == first
    status, out, err = upscale("in", "--overwrite")
    assert (status, out.count("\n"), err) == (0, 3, "")
    assert Path("in_x2/a_x2.png").stat().st_mtime_ns > first


def test_results_beside_their_images_are_not_enlarged_again(upscale: Any) -> None:
    Path("in").mkdir()
    for file in "ab":
        photo(f"in/{file}.png")
    for _ in range(2):
        assert upscale("in", "--output", "in")[0] == 0
        assert upscale(*sorted(Path("in").glob("*.png")), "--overwrite")[0] == 0
    assert sorted(os.listdir("in")) == ["a.png", "a_x2.png", "b.png", "b_x2.png"]


@pytest.mark.parametrize("as_folder", [True, False], ids=["folder", "files"])
def test_results_of_other_runs_are_not_enlarged(upscale: Any, as_folder: bool) -> None:
    Path("in").mkdir()
    results = ["a_x2.png", "a_x4.png", "a_x4_x2.png", "b.jpg_x2.png", "b_x3.png", "B_clusters.png"]
    images = ["a.jpg", "b.jpg", "b.bmp", "alone_x2.png", "a_x2.jpg", "a_small.png", "ax2.png"]
    for file in [*results, *images]:
        photo(f"in/{file}")
    status, out, err = upscale(*(["in"] if as_folder else sorted(Path("in").iterdir())), "--output", "out")
    assert (status, sorted(line.partition(" -> ")[0] for line in out.splitlines())) == (
        0,
        sorted(f"in/{file}" for file in images),
    )
    assert err == (
        "sparse-sr: note: 6 of 13 images are results next to their originals and are skipped: "
        "in/B_clusters.png, in/a_x2.png, in/a_x4.png, ...\n"
    )
    assert upscale("in/a_x2.png", "--output", "alone/")[0] == 0


def run_command(arguments: list[str], data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "sparse_sr_attn", "upscale", *arguments], input=data, capture_output=True, check=False
    )


@pytest.mark.skipif(os.name != "posix", reason="needs a shell")
@pytest.mark.parametrize(
    ("arguments", "redirection", "message"),
    [
        ("-", "<&-", "standard input must be an image, and is closed or a terminal"),
        ("a.png -o -", ">&-", "standard output is closed or a terminal; name a file with --output"),
    ],
)
def test_closed_streams(here: Path, nets: Any, arguments: str, redirection: str, message: str) -> None:
    photo("a.png")
    command = f"'{sys.executable}' -m sparse_sr_attn upscale {arguments} --weights '{nets[3][0]}' {redirection}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, f"sparse-sr: {message}\n")


def test_a_reader_of_standard_output_that_stops_early(here: Path, nets: Any) -> None:
    Image.fromarray(noise(200, 200, 3)).save("a.png")
    command = [sys.executable, "-m", "sparse_sr_attn", "upscale", "a.png", "-o", "-", "--weights", str(nets[3][0])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_standard_input_and_output(here: Path, nets: Any) -> None:
    pixels = noise(6, 5, 3)
    Image.fromarray(pixels).save("a.bmp")
    data, weights = Path("a.bmp").read_bytes(), ["--weights", str(nets[3][0])]
    for arguments, given in ((["-"], data), (["-", "-o", "-"], data), (["a.bmp", "-o", "-"], b"")):
        done = run_command([*arguments, *weights], given)
        assert (done.returncode, done.stderr) == (0, b"")
        Path("out.png").write_bytes(done.stdout)
        close(opened("out.png"), expected(nets[3][1], pixels), "RGB")
    for output, file in (("b.png", "b.png"), ("there/", "there/stdin_x2.png")):
        done = run_command(["-", "-o", output, *weights], data)
        assert (done.returncode, done.stdout) == (0, f"- -> {file}\n".encode())
        close(opened(file), expected(nets[3][1], pixels), "RGB")


@pytest.mark.parametrize(
    ("arguments", "data", "status", "message"),
    [
        (["-"], b"", 1, b"-: is not an image that Pillow can read"),
        (["-"], b"no image", 1, b"-: is not an image that Pillow can read"),
        (["-", "a.png"], b"", 2, b"standard input, -, must be the only input"),
        (["a.png", "b.png", "-o", "-"], b"", 2, b"--output - takes one image, and there are several"),
    ],
)
def test_streams_that_cannot_be(
    here: Path, nets: Any, arguments: list[str], data: bytes, status: int, message: bytes
) -> None:
    photo("a.png")
    photo("b.png")
    done = run_command([*arguments, "--weights", str(nets[3][0])], data)
    assert (done.returncode, done.stdout) == (status, b"")
    assert message in done.stderr
    assert done.stderr.count(b"\n") == 1
    assert sorted(os.listdir()) == ["a.png", "b.png"]


def run_in_process(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_a_full_disk_leaves_nothing(here: Path, nets: Any) -> None:
    Image.fromarray(noise(60, 60, 3)).save("a.png")
    done = run_in_process(
        "import resource, sys; from sparse_sr_attn.cli.main import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))\n"
        f"sys.exit(main(['upscale', 'a.png', '--weights', {str(nets[3][0])!r}]))"
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "sparse-sr: a.png: a_x2.png cannot be written: File too large\n"
    assert os.listdir() == ["a.png"]


@pytest.mark.parametrize("moment", ["os.fsync", "os.replace"])
def test_killed_while_it_writes(here: Path, nets: Any, moment: str) -> None:
    """Under the name of the result there is the old file, or the whole new one."""
    photo("a.png")
    Path("a_x2.png").write_text("mine")
    done = run_in_process(
        "import os, signal, sys; from sparse_sr_attn.cli.main import main\n"
        f"{moment} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"sys.exit(main(['upscale', 'a.png', '--overwrite', '--weights', {str(nets[3][0])!r}]))"
    )
    assert done.returncode == -signal.SIGKILL
    assert Path("a_x2.png").read_bytes() == b"mine"
    assert main(["upscale", "a.png", "--overwrite", "--weights", str(nets[3][0])]) == 0  # what it left is no obstacle
    assert sorted(os.listdir()) == ["a.png", "a_x2.png"]
    assert opened("a_x2.png").size == (10, 12)


# -------------------------------------------------------------------------------------------------- tiles and memory


def test_memory_that_runs_out_is_answered_by_smaller_tiles(
    upscale: Any, nets: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = noise(70, 90, 3)
    Image.fromarray(pixels).save("a.png")
    real, seen = EDSR.forward, []

    def forward(self: EDSR, x: Tensor) -> Tensor:
        seen.append(max(x.shape[2:]))
        if seen[-1] > 50:
            raise torch.OutOfMemoryError("CUDA out of memory.\nMore lines.")
        return real(self, x)

    monkeypatch.setattr(EDSR, "forward", forward)
    status, _, err = upscale("a.png", "--tile", 0, "--overlap", 20)
    assert status == 0
    assert err == "sparse-sr: a.png: memory ran out; trying tiles of 45 pixels\n"
    assert seen[0] == 90
    assert set(seen[1:]) == {45}
    monkeypatch.setattr(EDSR, "forward", real)
    close(opened("a_x2.png"), expected(nets[3][1], pixels), "RGB")


@pytest.mark.slow
def test_freed_memory_is_kept_unless_the_user_says_how(here: Path, nets: Any) -> None:
    """Fewer pages are asked of the system; counted, not timed."""
    Image.fromarray(noise(300, 300, 3)).save("a.png")
    code = (
        "import resource, sys; from sparse_sr_attn.cli.main import main\n"
        "main(['upscale', 'a.png', '--overwrite', '--device', 'cpu', '--weights', 'LCoAN-light_x2'])\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "main(['upscale', 'a.png', '--overwrite', '--device', 'cpu', '--weights', 'LCoAN-light_x2'])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"
    )

    def faults(**settings: str) -> int:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, **settings}
        )
        return int(done.stdout.splitlines()[-1])

    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        pytest.skip("mallopt is glibc's")
    assert 4 * faults() < faults(MALLOC_TOP_PAD_="0")


# --------------------------------------------------------------------------------------------------------- wrong usage


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.png"], "nowhere.png: no such image or folder"),
        (["empty"], "empty contains no images: it is empty"),
        (["good.png", "--tile", "-1"], "--tile must be >= 1, or 0 for the whole image, got -1"),
        (["good.png", "--tile", "8", "--overlap", "8"], "--overlap must be >= 0 and smaller than the tile, 8, got 8"),
        (["good.png", "--device", "abacus"], "--device must be one that torch can use here, got 'abacus'"),
        (
            ["good.png", "--output", "big.xyz"],
            "--output big.xyz must have one of the suffixes .png, .tif, .tiff, .webp, .jpg, .jpeg",
        ),
        (["full", "--output", "good.png"], "--output must be a folder, and good.png is a file"),
        (["full", "--output", "one.png"], "must be a folder for several images; one.png/ is one, one.png a file"),
        (["good.png", "full/a.png", "-o", "one.JPG"], "must be a folder for several images; one.JPG/ is one"),
        (["good.png", "--output", "good.png/"], "--output must be a folder, and good.png is a file"),
        (
            ["good.png", "--output", "v1.2"],
            "--output v1.2 must have one of the suffixes .png, .tif, .tiff, .webp, .jpg, .jpeg; v1.2/",
        ),
        (["good.png", "--output", ""], "--output must name a file or a folder, got ''"),
        (["good.png", "nowhere"], "nowhere: no such image or folder"),
        ([], "required: IMAGE|FOLDER"),
        (["good.png", "--set", "img_rang=1"], "img_rang: unknown; did you mean 'img_range'?"),
        (["good.png", "--max-pixels", "0"], "--max-pixels must be >= 1, got 0"),
        (["good.png", "--tile", "many"], "invalid int value: 'many'"),
    ],
)
def test_wrong_usage(upscale: Any, arguments: list[str], message: str) -> None:
    photo()
    Path("empty").mkdir()
    Path("full").mkdir()
    photo("full/a.png")
    status, out, err = upscale(*arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert sorted(os.listdir()) == ["empty", "full", "good.png"]


def test_networks_of_other_channels(upscale: Any) -> None:
    photo()
    torch.save(EDSR(4, 4, num_feat=4, num_block=1, upscale=2).state_dict(), "four.pth")
    torch.save(EDSR(3, 1, num_feat=4, num_block=1, upscale=2).state_dict(), "fewer.pth")
    for file in ("four.pth", "fewer.pth"):
        assert main(["upscale", "good.png", "--weights", file]) == 1
    assert not Path("good_x2.png").exists()


def test_without_pillow_it_says_what_to_install(nets: Any) -> None:
    done = run_in_process(
        "import sys; sys.modules['PIL'] = None\n"
        f"from sparse_sr_attn.cli.main import main; sys.exit(main(['upscale', 'x', '--weights', {str(nets[3][0])!r}]))"
    )
    assert done.returncode == 1
    assert done.stderr == "sparse-sr: pillow must be installed: python -m pip install pillow\n"


def test_the_result_is_as_readable_as_other_files(upscale: Any) -> None:
    photo()
    upscale("good.png")
    assert stat.S_IMODE(os.stat("good_x2.png").st_mode) == stat.S_IMODE(os.stat("good.png").st_mode)
