"""Properties of image files as BasicSR reads them, without decoding if the header is enough."""

import importlib
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path

from PIL import ExifTags, Image

from sparse_sr_attn.data.images import is_reduced, read_image
from sparse_sr_attn.errors import ImageError
from sparse_sr_attn_basicsr.preflight.findings import without_warnings

_HEAD_ERRORS = (OSError, SyntaxError, ValueError)


def files_in(folder: Path) -> set[str]:
    """Return the names of the files in a folder, except hidden ones."""
    return {file.name for file in folder.iterdir() if file.is_file() and not file.name.startswith(".")}


def size_of(image: Path) -> tuple[int, int] | None:
    """Return (width, height) as BasicSR reads the image; `None` if the file does not say."""
    try:
        with Image.open(image) as opened:
            if opened.getexif().get(ExifTags.Base.Orientation, 1) not in (5, 6, 7, 8):
                return opened.size
        # Turned sideways: which EXIF is followed depends on OpenCV's version.
        pixels = importlib.import_module("basicsr.utils").imfrombytes(image.read_bytes())
    except _HEAD_ERRORS:
        return None
    return None if pixels is None else (pixels.shape[1], pixels.shape[0])


def is_deep(image: Path) -> bool:
    """Return whether a file has more than 8 bits per channel, according to its header."""
    try:
        with Image.open(image) as opened:
            return opened.mode.startswith(("I", "F")) or is_reduced(opened)
    except _HEAD_ERRORS:
        return False


def is_image(file: Path) -> bool:
    """Return whether BasicSR can decode a file."""
    with without_warnings(), suppress(ImageError):
        read_image(file)
        return True
    if file.suffix.lower() in Image.registered_extensions():
        return False
    try:  # OpenCV knows formats that Pillow does not
        importlib.import_module("basicsr.utils").imfrombytes(file.read_bytes(), float32=True)
    except Exception:  # its decoders raise anything
        return False
    return True


def shown_size(size: tuple[int, int]) -> str:
    """Return a size as messages show it."""
    return f"{size[0]}x{size[1]}"


def similar_file(wanted: Path) -> str:
    """Return a suggestion of a file or folder with a similar name for a missing one."""
    parent = wanted.parent
    beside = {entry.name.casefold(): entry.name for entry in parent.iterdir()} if parent.is_dir() else {}
    close = get_close_matches(wanted.name.casefold(), beside, n=1)
    return f"; did you mean {str(parent / beside[close[0]])!r}?" if close else ""
