"""`sparse-sr upscale`: images through a network, one by one, whatever is wrong with some of them."""

import argparse
import os
import sys
from collections import Counter
from pathlib import Path

from sparse_sr_attn.backbones.base import Network
from sparse_sr_attn.checkpoints import trained_weights
from sparse_sr_attn.commands.common import (
    NETWORK,
    UsageError,
    add_weights,
    images_in,
    load,
    name,
    require,
    say,
    show,
)
from sparse_sr_attn.errors import ImageError, ShapeError
from sparse_sr_attn.images import (
    MAX_PIXELS,
    Picture,
    format_of,
    read_image,
    upscale_image,
    write_image,
)
from sparse_sr_attn.inference import with_smaller_tiles

HELP = "enlarge an image, or all images of a folder"
DESCRIPTION = """\
Enlarge an image, or all images of a folder, with the network that the weights belong to.

  sparse-sr upscale photo.jpg                                           writes photo_x2.png beside it
  sparse-sr upscale photo.jpg --scale 4                                 likewise photo_x4.png
  sparse-sr upscale photos/ --weights net_g_latest.pth                  writes photos_x2/*.png
  sparse-sr upscale scan.tif --weights w.pth --output big.tif --tile 256

Any image that Pillow reads: grey stays grey, 16-bit grey stays 16-bit, alpha and the colour profile are kept, and EXIF
rotation is applied. An image that cannot be read is reported in one line, and the others go on."""
EPILOG = """\
Images are cut into tiles, and where tiles meet one passes into the other. Attention sees its own tile only: smaller
tiles need less memory and give attention less to look at (docs/upscale.md has figures). When memory runs out, the image
is done again in smaller tiles.

Exit status: 0 all images are done; 1 some are not; 2 the command line is wrong, and nothing was done."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("input", type=Path, metavar="IMAGE|FOLDER", help="what to enlarge; folders are not descended")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("-s", "--scale", type=int, metavar="N", help=f"take the library's weights {NETWORK}_xN")
    add_weights(parser, weights)
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE|FOLDER",
        help="where to: a file, whose suffix says the format, or a folder, which gets NAME_xN.png",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there already")
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
        help="refuse larger images, which may be attacks on memory (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Upscale what the command line names; return the exit status.

    Raises:
        UsageError: nothing can be done as it was asked.
        CheckpointError: the weights cannot be read.
    """
    require("PIL", "numpy", "tqdm")
    _check(arguments)
    found = images_in(arguments.input)
    model = load(arguments)
    failed = 0
    jobs = _targets(arguments, found, model.upscale)
    for number, (source, target) in enumerate(jobs, 1):
        label = f"[{number}/{len(jobs)}] {name(source.name)}" if len(jobs) > 1 else name(source.name)
        try:
            _one(arguments, model, source, target, label)
        except ImageError as error:
            say(f"{name(source)}: {' '.join(str(error).split())}")
            failed += 1
        else:
            show(f"{name(source)} -> {name(target)}")
    if failed and len(jobs) > 1:
        say(f"{failed} of {len(jobs)} images failed")
    return 1 if failed else 0


def _check(arguments: argparse.Namespace) -> None:
    if arguments.tile < 0:
        raise UsageError(f"--tile must be >= 1, or 0 for the whole image, got {arguments.tile}")
    if arguments.scale is not None:
        _choose(arguments)
    if arguments.max_pixels < 1:
        raise UsageError(f"--max-pixels must be >= 1, got {arguments.max_pixels}")
    overlap = arguments.overlap
    if overlap is not None and (overlap < 0 or 0 < arguments.tile <= overlap):
        raise UsageError(f"--overlap must be >= 0 and smaller than the tile, {arguments.tile}, got {overlap}")
    output = arguments.output
    if output is not None and os.path.isdir(arguments.input) and os.path.isfile(output):
        raise UsageError(f"--output must be a folder for a folder of images, and {name(output)} is a file")
    if output is not None and not os.path.isdir(arguments.input) and not _is_folder(output):
        try:
            format_of(output)
        except ImageError as error:
            raise UsageError(f"--output {error}") from error


def _choose(arguments: argparse.Namespace) -> None:
    """Take the weights of `--scale`."""
    known = trained_weights()
    scales = [scale for scale in range(1, 17) if f"{NETWORK}_x{scale}" in known]
    if arguments.scale not in scales:
        raise UsageError(f"--scale must be one of {scales}, got {arguments.scale}")
    arguments.weights = Path(f"{NETWORK}_x{arguments.scale}")


def _is_folder(output: Path) -> bool:
    return os.path.isdir(output) or (not os.path.exists(output) and not output.suffix)


def _targets(arguments: argparse.Namespace, images: list[Path], upscale: int) -> list[tuple[Path, Path]]:
    """Return each image with the file it becomes; where two would become one, their suffixes tell them apart."""
    output = arguments.output
    if output is not None and not os.path.isdir(arguments.input) and not _is_folder(output):
        return [(images[0], output)]
    beside = arguments.input.resolve()
    folder = output or (
        beside.with_name(f"{beside.name}_x{upscale}") if os.path.isdir(beside) else arguments.input.parent
    )
    stems = Counter(image.stem.casefold() for image in images)
    names = [
        f"{image.stem}_x{upscale}.png" if stems[image.stem.casefold()] == 1 else f"{image.name}_x{upscale}.png"
        for image in images
    ]
    if twice := [file for file, times in Counter(names).items() if times > 1]:
        raise UsageError(f"{name(arguments.input)} has several images that would become {name(twice[0])}")
    return [(image, folder / file) for image, file in zip(images, names, strict=True)]


def _one(arguments: argparse.Namespace, model: Network, source: Path, target: Path, label: str) -> None:
    from tqdm import tqdm  # noqa: PLC0415

    if not arguments.overwrite and os.path.lexists(target):
        raise ImageError(f"{name(target)} is there already, and stays; --overwrite replaces it")
    if os.path.exists(target) and target.samefile(source):
        raise ImageError("would be replaced by its own result; give another --output")
    picture = read_image(source, max_pixels=arguments.max_pixels)

    def attempt(tile: int) -> Picture:
        overlap = min(64, tile // 4) if arguments.overlap is None else min(arguments.overlap, tile - 1)
        with tqdm(desc=label, unit="tile", disable=None, leave=False, file=sys.stderr) as bar:

            def progress(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            return upscale_image(
                model, picture, tile=tile, overlap=overlap, blend=min(16, overlap // 2), progress=progress
            )

    def notice(tile: int) -> None:
        say(f"{name(source)}: memory ran out; trying tiles of {tile} pixels")

    try:
        large = with_smaller_tiles(attempt, arguments.tile or max(picture.pixels.shape[:2]), notice=notice)
    except (MemoryError, ShapeError, RuntimeError) as error:  # torch's own are RuntimeErrors
        raise ImageError(str(error).partition("\n")[0]) from error
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ImageError(f"{name(target.parent)} cannot be made: {error.strerror}") from error
    write_image(large, target, overwrite=arguments.overwrite)
