"""`sparse-sr prepare`: pairs for training and validation from photographs."""

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from sparse_sr_attn.cli.common import (
    UsageError,
    all_images,
    check_new,
    distinct_names,
    name,
    require,
    say,
    show,
    some,
)
from sparse_sr_attn.data.images import as_rgb, read_pixels
from sparse_sr_attn.data.pairs import write_pairs
from sparse_sr_attn.errors import ImageError

DESCRIPTION = """\
Make pairs of high- and low-resolution images from photographs. Downsampling equals MATLAB's bicubic imresize to the
last bit, as papers use for training and testing ("BI").

examples:
  sparse-sr prepare DIV2K/ --scale 2 --tile 480 --crop 96 -o datasets/DIV2K_x2     to train with gt_size: 96
  sparse-sr prepare DIV2K/ --scale 2 --crop 96 -o datasets/DIV2K_x2                for CachedPairedImageDataset
  sparse-sr prepare Set5/ --scale 2 -o datasets/Set5_x2                            to validate

In the option file, set dataroot_gt to FOLDER/HR, dataroot_lq to FOLDER/LR_xN, and filename_tmpl to '{}'."""
EPILOG = """\
Sides are cropped to a multiple of the scale. Grey becomes three equal channels, alpha is dropped. Pairs are named after
their images; if two names would be equal, they keep the suffix or get the folder as well. The output appears only when
all pairs are complete.

Exit status: 0 success; 1 an image cannot be read or the output cannot be written; 2 wrong command line."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "input", type=Path, nargs="+", metavar="IMAGE|FOLDER", help="high-resolution images; subfolders are skipped"
    )
    parser.add_argument("-s", "--scale", type=int, required=True, metavar="N", help="super-resolution factor")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FOLDER", help="folder to write HR and LR_xN to"
    )
    parser.add_argument(
        "--tile",
        type=int,
        default=0,
        metavar="N",
        help="cut images into tiles of this side, so that training decodes less (default: 0, whole images)",
    )
    parser.add_argument(
        "--crop",
        type=int,
        default=0,
        metavar="N",
        help="gt_size of the training: smaller images are skipped, and tiles overlap by it (default: 0)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing HR and LR_xN")


def run(arguments: argparse.Namespace) -> int:
    """Make the pairs; return the exit status."""
    require("PIL", "numpy")
    scale, tile, crop, output = arguments.scale, arguments.tile, arguments.crop, arguments.output
    if scale < 1:
        raise UsageError(f"--scale must be >= 1, got {scale}")
    if tile < 0 or tile % scale:
        raise UsageError(f"--tile must be a multiple of the scale, {scale}, got {tile}")
    if crop < 0 or crop % scale:
        raise UsageError(f"--crop must be a multiple of the scale, {scale}, got {crop}")
    if tile and crop >= tile:
        raise UsageError(f"--crop must be smaller than --tile, {tile}, got {crop}")
    files = all_images(arguments.input)
    named = dict(zip(distinct_names(files), files, strict=True))
    for part in (output / "HR", output / f"LR_x{scale}"):
        check_new(part, arguments)
    small: list[Path] = []
    count = write_pairs(_read(named, max(crop, scale), small), output, scale, tile=tile, crop=crop)
    if small:
        shorter = f"with a side shorter than {max(crop, scale)}"
        say(f"note: {len(small)} of {len(files)} images skipped, {shorter}: {some(small)}")
    show(f"{count} pairs from {len(files) - len(small)} images -> {name(output)}")
    return 0


def _read(files: Mapping[str, Path], smallest: int, small: list[Path]) -> Iterator[tuple[str, Tensor]]:
    """Yield names and pictures; add those that are too small to `small`."""
    for label, file in files.items():
        try:
            pixels = read_pixels(file)
        except ImageError as error:
            raise ImageError(f"{name(file)}: {error}") from error
        if min(pixels.shape[:2]) < smallest:
            small.append(file)
            continue
        yield label, as_rgb(pixels)
