"""`sparse-sr upscale`: images through a network, one by one; the failure of one does not stop the others."""

import argparse
import ctypes
import io
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from sparse_sr_attn.backbones.base import Network
from sparse_sr_attn.cli.common import (
    DEFAULT_WEIGHTS,
    UsageError,
    add_weights,
    distinct_names,
    images_in,
    load,
    name,
    require,
    say,
    show,
    some,
    without_results,
)
from sparse_sr_attn.data.atomic import check_writable
from sparse_sr_attn.data.images import (
    MAX_PIXELS,
    Picture,
    check_format,
    format_of,
    looks_like_image,
    read_image,
    write_image,
)
from sparse_sr_attn.errors import ImageError, ShapeError, first_line
from sparse_sr_attn.inference.tiling import num_tiles, with_smaller_tiles
from sparse_sr_attn.inference.upscale import upscale_image

DESCRIPTION = """\
Upscale images, or all images in folders.

examples:
  sparse-sr upscale photo.jpg                                           writes photo_x2.png next to it
  sparse-sr upscale photo.jpg --scale 4                                 writes photo_x4.png
  sparse-sr upscale a.jpg b.jpg --output results/                       writes results/a_x2.png and b_x2.png
  sparse-sr upscale photos/ --weights net_g_latest.pth                  writes photos_x2/*.png
  sparse-sr upscale scan.tif --weights w.pth --output big.tif --tile 256
  sparse-sr upscale - < photo.jpg > large.png                           standard input and output

Reads any image that Pillow reads. Grey stays grey, 16-bit grey stays 16-bit, alpha and the colour profile are kept, and
EXIF rotation is applied. An image that cannot be read is reported in one line, and the others continue. With several
images, those with an existing result are skipped, so you can repeat a run that was stopped. Results next to their
originals (photo_x2.png, if photo.jpg is there) are skipped, too."""
EPILOG = """\
Images are cut into overlapping tiles, which are blended. Attention sees only its own tile: smaller tiles need less
memory, but show it less of the image. When memory runs out, the image is processed again in smaller tiles.

Exit status: 0 all images are done; 1 some failed; 2 wrong command line, nothing was done."""

STREAM = Path("-")
"""Standard input or output."""

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


class _Job(NamedTuple):
    """An image and its output file; either may be `STREAM`."""

    source: Path
    target: Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "input",
        type=Path,
        nargs="+",
        metavar="IMAGE|FOLDER",
        help="what to upscale; subfolders are skipped; - is standard input",
    )
    parser.add_argument(
        "-s", "--scale", type=int, metavar="N", help="super-resolution factor; chooses among the included weights"
    )
    add_weights(parser, default=False)
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE|FOLDER",
        help="a file, in the format of its suffix; or a folder for NAME_xN.png, if it exists, ends with / or there are "
        "several images; - is standard output, as PNG",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing results")
    parser.add_argument(
        "--tile",
        type=int,
        default=512,
        metavar="N",
        help="side of the tiles in pixels of the input; 0 for the whole image at once (default: %(default)s)",
    )
    parser.add_argument(
        "--overlap",
        type=int,
        metavar="N",
        help="pixels that neighbouring tiles share (default: 64, and at most a quarter of the tile)",
    )
    parser.add_argument(
        "--max-pixels",
        type=int,
        default=MAX_PIXELS,
        metavar="N",
        help="refuse larger images, which may exhaust memory (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Upscale the images of the command line; return the exit status."""
    require("PIL", "numpy", "tqdm")
    _check(arguments)
    sources = _sources(arguments)
    several = len(sources) > 1 or any(os.path.isdir(path) for path in arguments.input)
    sources = {image: sources[image] for image in without_results(list(sources))}
    if arguments.output not in (None, "-"):
        _folder(arguments, several=several)  # raises before the weights are read
    model = load(arguments)
    if arguments.scale not in (None, model.upscale):
        raise UsageError(
            f"--scale must be {model.upscale}, that of {name(arguments.weights)}, or omitted; got {arguments.scale}"
        )
    if next(model.parameters()).device.type == "cpu":
        keep_freed_memory()
    jobs = _jobs(arguments, sources, model.upscale, several=several)
    if several:
        jobs = _unfinished(jobs, arguments)
    _check_folders(jobs)
    failed = 0
    for number, job in enumerate(jobs, 1):
        label = (f"[{number}/{len(jobs)}] " if len(jobs) > 1 else "") + name(job.source.name)
        try:
            picture = _read(job.source, arguments)
            try:
                _check_target(job, picture, model.upscale, arguments)
            except ImageError as error:
                if several:
                    raise
                raise UsageError(f"{name(job.source)}: {' '.join(str(error).split())}") from error
            if picture.reduced:
                say(f"note: {name(job.source)}: Pillow reads only 8 bits per channel of it, and the result has 8")
            large = _enlarged(arguments, model, picture, label)
            _write(large, job.target, arguments)
        except ImageError as error:
            say(f"{name(job.source)}: {' '.join(str(error).split())}")
            failed += 1
        else:
            if job.target != STREAM:
                show(f"{name(job.source)} -> {name(job.target)}")
    if failed and len(jobs) > 1:
        say(f"{failed} of {len(jobs)} images failed")
    return 1 if failed else 0


def keep_freed_memory(keep: bool = True) -> None:
    """Make glibc keep freed memory for later layers, or restore its default.

    By default it returns large blocks to the system, which then zeroes new ones, page by page, in every layer. User
    settings (`MALLOC_...`, `GLIBC_TUNABLES`) take precedence; other C libraries are not affected.
    """
    if any(variable.startswith(("MALLOC_", "GLIBC_TUNABLES")) for variable in os.environ) or sys.platform != "linux":
        return
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0 if keep else 65536)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1 if keep else 128 << 10)
        if not keep:
            libc.malloc_trim(0)


def _check(arguments: argparse.Namespace) -> None:
    if arguments.tile < 0:
        raise UsageError(f"--tile must be >= 1, or 0 for the whole image, got {arguments.tile}")
    if arguments.weights is None:
        _choose(arguments)
    if arguments.max_pixels < 1:
        raise UsageError(f"--max-pixels must be >= 1, got {arguments.max_pixels}")
    overlap = arguments.overlap
    if overlap is not None and (overlap < 0 or 0 < arguments.tile <= overlap):
        raise UsageError(f"--overlap must be >= 0 and smaller than the tile, {arguments.tile}, got {overlap}")
    if arguments.output == "":
        raise UsageError("--output must name a file or a folder, got ''")
    if STREAM in arguments.input and len(arguments.input) > 1:
        raise UsageError("standard input, -, must be the only input")
    if arguments.input == [STREAM] and (sys.stdin is None or sys.stdin.isatty()):
        raise UsageError("standard input must be an image, and is closed or a terminal")
    if _to_stdout(arguments) and (sys.stdout is None or sys.stdout.isatty()):
        raise UsageError("standard output is closed or a terminal; name a file with --output")


def _choose(arguments: argparse.Namespace) -> None:
    """Choose the weights of `--scale`."""
    scale = 2 if arguments.scale is None else arguments.scale
    if scale not in DEFAULT_WEIGHTS:
        raise UsageError(
            f"--scale must be one of {sorted(DEFAULT_WEIGHTS)} with the included weights, got {scale}; for another, "
            "pass --weights"
        )
    arguments.weights = Path(DEFAULT_WEIGHTS[scale])


def _to_stdout(arguments: argparse.Namespace) -> bool:
    return arguments.output == "-" or (arguments.output is None and arguments.input == [STREAM])


def _sources(arguments: argparse.Namespace) -> dict[Path, Path]:
    """Return each image once, with the input that it comes from."""
    found: dict[Path, Path] = {}
    seen: set[Path] = set()
    for path in arguments.input:
        for image in [STREAM] if path == STREAM else images_in(path):
            if image.absolute() not in seen:
                seen.add(image.absolute())
                found[image] = path
    return found


def _folder(arguments: argparse.Namespace, *, several: bool) -> Path | None:
    """Return the folder that `--output` names; `None` if it names a file.

    Raises:
        UsageError: `--output` is not a valid file or folder.
    """
    output, path = arguments.output, Path(arguments.output)
    ends_so = output.endswith((os.sep, os.altsep or os.sep))
    if os.path.isdir(path):
        return path
    if (ends_so or several) and os.path.lexists(path):
        raise UsageError(f"--output must be a folder, and {name(path)} is a file")
    if several and not ends_so and looks_like_image(path):
        raise UsageError(f"--output must be a folder for several images; {name(path)}/ is one, {name(path)} a file")
    if ends_so or several or not (path.suffix or os.path.lexists(path)):
        return path
    try:
        format_of(path)
    except ImageError as error:
        remedy = "" if os.path.lexists(path) else f"; {name(path)}/ is a folder"
        raise UsageError(f"--output {error}{remedy}") from error
    return None


def _jobs(arguments: argparse.Namespace, sources: dict[Path, Path], upscale: int, *, several: bool) -> list[_Job]:
    """Return each image with its output file."""
    if _to_stdout(arguments):
        if several:
            raise UsageError("--output - takes one image, and there are several")
        return [_Job(source, STREAM) for source in sources]
    output = None if arguments.output is None else _folder(arguments, several=several)
    if arguments.output is not None and output is None:
        return [_Job(source, Path(arguments.output)) for source in sources]
    folders: dict[Path, list[Path]] = {}
    for source, given in sources.items():
        beside = given if given.name not in ("", "..") else given.resolve()  # of `.` and `..` the name is not known
        default = beside.with_name(f"{beside.name}_x{upscale}") if os.path.isdir(given) else source.parent
        folders.setdefault(output or default, []).append(source)
    return [
        _Job(source, folder / f"{'stdin' if source == STREAM else label}_x{upscale}.png")
        for folder, members in folders.items()
        for source, label in zip(members, distinct_names(members), strict=True)
    ]


def _check_folders(jobs: list[_Job]) -> None:
    for folder in dict.fromkeys(job.target.parent for job in jobs if job.target != STREAM):
        try:
            check_writable(folder / "x.png")
        except OSError as error:
            raise UsageError(f"{name(folder)} cannot be written to: {error.strerror}; try another --output") from error


def _unfinished(jobs: list[_Job], arguments: argparse.Namespace) -> list[_Job]:
    """Skip existing results, with a note."""
    there = [] if arguments.overwrite else [job for job in jobs if os.path.isfile(job.target)]
    if there:
        say(
            f"note: {len(there)} of {len(jobs)} results exist, perhaps from other weights, and are skipped: "
            f"{some([job.target for job in there])}; use --overwrite or another --output"
        )
    return [job for job in jobs if job not in there]


def _read(source: Path, arguments: argparse.Namespace) -> Picture:
    stream = io.BytesIO(sys.stdin.buffer.read()) if source == STREAM else source
    return read_image(stream, max_pixels=arguments.max_pixels)


def _check_target(job: _Job, picture: Picture, upscale: int, arguments: argparse.Namespace) -> None:
    """Check that the result can be written before computing it."""
    target = job.target
    if target == STREAM:
        return
    if os.path.exists(target) and job.source != STREAM and target.samefile(job.source):
        raise ImageError("would be replaced by its own result; give another --output")
    if not arguments.overwrite and os.path.lexists(target):
        raise ImageError(f"{name(target)} already exists; use --overwrite or another --output")
    try:
        check_writable(target)
    except OSError as error:
        raise ImageError(f"{name(target)} cannot be written: {error.strerror}") from error
    check_format(target, picture, upscale=upscale)


def _enlarged(arguments: argparse.Namespace, model: Network, picture: Picture, label: str) -> Picture:
    from tqdm import tqdm  # noqa: PLC0415

    height, width = picture.pixels.shape[:2]

    def attempt(tile: int) -> Picture:
        overlap = min(64, tile // 4) if arguments.overlap is None else min(arguments.overlap, tile - 1)
        # Without a terminal, the bar is not shown.
        with tqdm(total=num_tiles(height, width, tile, overlap), desc=label, disable=None, leave=False) as bar:
            return upscale_image(
                model,
                picture,
                tile=tile,
                overlap=overlap,
                blend=min(16, overlap // 2),
                progress=lambda done, _: bar.update(done - bar.n),
            )

    def notice(tile: int) -> None:
        keep_freed_memory(False)
        say(f"{label}: memory ran out; trying tiles of {tile} pixels")

    try:
        return with_smaller_tiles(attempt, arguments.tile or max(height, width), notice=notice)
    except (MemoryError, ShapeError, RuntimeError) as error:  # torch's own are RuntimeErrors
        raise ImageError(first_line(error)) from error


def _write(picture: Picture, target: Path, arguments: argparse.Namespace) -> None:
    if target == STREAM:
        whole = io.BytesIO()
        write_image(picture, whole)
        sys.stdout.buffer.write(whole.getbuffer())
        sys.stdout.buffer.flush()
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ImageError(f"{name(target.parent)} cannot be made: {error.strerror}") from error
    write_image(picture, target, overwrite=arguments.overwrite)
