"""`python -m benchmarks.capture`: the share of dense attention that the keys of sparse patterns capture."""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from torch import Tensor

from benchmarks.capture.mass import PATTERNS, Capture, Pattern, attention_features, captured_mass, read_patterns
from benchmarks.command import make_parser, run_command
from sparse_sr_attn.backbones.base import Network
from sparse_sr_attn.cli.common import (
    UsageError,
    add_weights,
    all_images,
    distinct_names,
    load_with_attention,
    name,
    require,
    show,
    table,
)
from sparse_sr_attn.data.atomic import atomic_write, check_writable, write_json
from sparse_sr_attn.data.images import Picture, as_rgb, read_pixels
from sparse_sr_attn.data.imresize import matlab_bicubic
from sparse_sr_attn.errors import ConfigError, ImageError, ShapeError, SparseSRError
from sparse_sr_attn.inference.upscale import network_input
from sparse_sr_attn.layers.lcoa import LSP

DESCRIPTION = """\
Measure how much of dense attention's softmax mass falls on the keys that sparse patterns show to each query, compared
with the best possible choice of --keys keys. The features are those of an attention layer of a trained network on your
images.

examples:
  python -m benchmarks.capture photos/
  python -m benchmarks.capture photos/ --weights net_g_latest.pth --layer 1 --temperature 30
  python -m benchmarks.capture photos/ --patterns LCoA LCoA:num_clusters=64,num_adjacent=4 NLSA:num_rounds=4

Give high-resolution images: they are downsampled as by MATLAB's bicubic, and the network gets the central crop. Dense
attention is the softmax of temperature * cosine."""
EPILOG = f"""\
patterns, each alone or as PATTERN:option=value,option=value with options of its layer:
  LCoA               clusters of k-means, fitted to the image; chunks see their neighbours on a ring or, with
                     neighbors=nearest, the most similar ones
  trained            the same with the centroids and options of the network, if its layer is an LCoA
  NLSA               buckets of a locality-sensitive hash
  CategoryAttention  its attention between tokens; its attention to the categories does not count
  windows            squares, as large as the keys allow
  raster             chunks in image order
All see at most the same number of keys, counted over all rounds; chunks are as large as that allows. Default:
  {(chr(10) + "  ").join(PATTERNS)}"""

_BEST = "best possible"
_LARGEST = 512
"""Side of the largest crop."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add = parser.add_argument
    add("input", type=Path, nargs="+", metavar="IMAGE|FOLDER", help="high-resolution images; subfolders are skipped")
    add_weights(parser)
    add("--layer", type=int, default=0, metavar="N", help="layer that computes attention, from 0 (default: 0)")
    add("--patterns", nargs="+", metavar="PATTERN", help="patterns to compare; see below")
    add("--keys", type=int, default=432, metavar="N", help="keys that a token sees (default: %(default)s)")
    add(
        "--temperature",
        type=float,
        default=10.0,
        metavar="X",
        help="temperature of dense attention (default: %(default)g)",
    )
    add("--steps", type=int, default=10, metavar="N", help="k-means steps on each image (default: %(default)s)")
    add(
        "--crop",
        type=int,
        default=96,
        metavar="N",
        help="side of the crop in pixels of the input (default: %(default)s)",
    )
    add("--limit", type=int, metavar="N", help="use only the first N images")
    add("--json", type=Path, metavar="FILE", help="write all results, also of each image")
    add("--plot", type=Path, metavar="FILE", help="draw the table (.png; needs matplotlib)")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print the table and save it; return the exit status.

    Raises:
        UsageError: the arguments are invalid.
        SparseSRError: images or weights cannot be used, there is no attention, or a file cannot be written.
    """
    document = measure(arguments)
    show(_report(document))
    try:
        if arguments.json:
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            write_json(arguments.json, document)
        if arguments.plot:
            _plot(document, arguments.plot)
    except OSError as error:
        raise SparseSRError(f"cannot write: {error}") from error
    return 0


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return all results, means and single images, for JSON.

    Raises:
        UsageError: the arguments are invalid.
        SparseSRError: images or weights cannot be used, or there is no attention.
    """
    patterns = _checked(arguments)
    files = all_images(arguments.input)[: arguments.limit]
    model = load_with_attention(arguments)
    layer, captures = "", {}
    for number, (label, file) in enumerate(zip(distinct_names(files), files, strict=True)):
        _progress(f"{number + 1}/{len(files)} {name(file.name)}")
        try:
            image = _input(file, model, arguments.crop)
            layer, captures[label] = _captured(model, image, patterns, number, arguments)
        except (ImageError, ShapeError) as error:
            raise ImageError(f"{name(file)}: {error}") from error
    _progress("")
    return _document(arguments, layer, captures)


def _checked(arguments: argparse.Namespace) -> list[Pattern]:
    """Return the patterns after checking all arguments and that the output can be written."""
    for option, least in (("keys", 1), ("steps", 0), ("crop", 2), ("limit", 1), ("layer", 0)):
        value = getattr(arguments, option)
        if value is not None and value < least:
            raise UsageError(f"--{option} must be >= {least}, got {value}")
    if arguments.crop > _LARGEST:
        raise UsageError(
            f"--crop must be <= {_LARGEST}, got {arguments.crop}: all pairs of pixels are compared, so twice the side "
            f"takes 16 times as long, and {_LARGEST} about an hour an image"
        )
    if not 0 < arguments.temperature < math.inf:
        raise UsageError(f"--temperature must be > 0 and finite, got {arguments.temperature:g}")
    if arguments.plot:
        if arguments.plot.suffix != ".png":
            raise UsageError(f"--plot must end in .png, got {name(arguments.plot)}")
        require("matplotlib")
    for file in filter(None, (arguments.json, arguments.plot)):
        try:
            check_writable(file)
        except OSError as error:
            raise UsageError(f"{name(file)} cannot be written: {error.strerror}") from error
    try:
        return read_patterns(arguments.patterns or PATTERNS, num_keys=arguments.keys)
    except ConfigError as error:
        raise UsageError("; ".join(f"--patterns {problem}" for problem in error.problems)) from error


def _input(file: Path, model: Network, side: int) -> Tensor:
    """Return the downscaled centre of an image as input of the network."""
    small = matlab_bicubic(as_rgb(read_pixels(file)), model.upscale)
    for axis in (0, 1):
        length = min(side, small.shape[axis])
        small = small.narrow(axis, (small.shape[axis] - length) // 2, length)
    return network_input(Picture(small.numpy()), model.num_in_ch)


def _captured(
    model: Network, image: Tensor, patterns: list[Pattern], number: int, arguments: argparse.Namespace
) -> tuple[str, Capture]:
    """Return the name of the layer, and the results for the patterns on an image."""
    try:
        features = attention_features(model, image.to(model.mean.device))
    except ShapeError:
        raise
    except ValueError as error:
        raise SparseSRError(f"{name(arguments.weights)}: {error}") from error
    if arguments.layer >= len(features):
        raise UsageError(f"--layer must be from 0 to {len(features) - 1}, got {arguments.layer}")
    layer = list(features)[arguments.layer]
    module = model.get_submodule(layer)
    trained = module if isinstance(module, LSP) else None
    if trained is None:
        if "trained" in (arguments.patterns or ()):
            raise UsageError(f"--patterns trained needs a layer with clusters (LCoA), but {layer} has none")
        patterns = [pattern for pattern in patterns if pattern.name != "trained"]
    try:
        found = captured_mass(
            features[layer],
            patterns,
            num_keys=arguments.keys,
            temperature=arguments.temperature,
            steps=arguments.steps,
            seed=number,
            trained=trained,
        )
    except ConfigError as error:
        raise UsageError(f"--keys: {error}") from error
    return layer, found


def _document(arguments: argparse.Namespace, layer: str, captures: dict[str, Capture]) -> dict[str, Any]:
    """Return all results, means and single images."""
    each = {
        file: {
            "entropy": one.entropy,
            "best": one.best,
            "patterns": {pattern: seen._asdict() for pattern, seen in one.patterns.items()},
        }
        for file, one in captures.items()
    }
    found = list(captures.values())
    return {
        "settings": {
            "weights": str(arguments.weights),
            "layer": layer,
            **{key: getattr(arguments, key) for key in ("keys", "temperature", "steps", "crop")},
        },
        "num_images": len(each),
        "mean": {
            "entropy": mean(one.entropy for one in found),
            "best": mean(one.best for one in found),
            "patterns": {
                pattern: {
                    key: mean(getattr(one.patterns[pattern], key) for one in found) for key in ("num_keys", "mass")
                }
                for pattern in found[0].patterns
            },
        },
        "images": each,
    }


def _report(document: dict[str, Any]) -> str:
    settings, found = document["settings"], document["mean"]
    rows = [[_BEST, str(settings["keys"]), f"{found['best']:.3f}", "1.00"]]
    rows += [
        [pattern, f"{seen['num_keys']:.0f}", f"{seen['mass']:.3f}", f"{seen['mass'] / found['best']:.2f}"]
        for pattern, seen in found["patterns"].items()
    ]
    images = document["images"]
    return (
        f"{table(['pattern', 'keys', 'captured', 'of the best possible'], rows)}\n\n"
        f"{len(images)} image{'s' * (len(images) > 1)}, at most {settings['crop']}x{settings['crop']}; features of "
        f"{settings['layer']} of {name(settings['weights'])}.\n"
        f"Dense attention at temperature {settings['temperature']:g}; its entropy is {found['entropy']:.3f} of log(n)."
    )


def _plot(document: dict[str, Any], path: Path) -> None:
    """Plot the results: the mean as a bar, each image as a dot; needs matplotlib."""
    from matplotlib.figure import Figure  # noqa: PLC0415  an extra

    found, images = document["mean"], document["images"].values()
    names = list(found["patterns"])
    figure = Figure(figsize=(8, 1.4 + 0.34 * len(names)), layout="constrained")
    axes = figure.subplots()
    for place, pattern in enumerate(names):
        axes.barh(-place, found["patterns"][pattern]["mass"], color="C0", alpha=0.6)
        axes.plot([one["patterns"][pattern]["mass"] for one in images], [-place] * len(images), ".", color="C0")
    axes.axvline(found["best"], color="black", linestyle=":", label=_BEST)
    settings = document["settings"]
    axes.set_yticks([-place for place in range(len(names))], names)
    axes.set(xlabel=f"mass of dense attention on {settings['keys']} keys, temperature {settings['temperature']:g}")
    axes.set_xlim(0, 1)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as unfinished:
        figure.savefig(unfinished, dpi=110, format="png")


def _progress(text: str) -> None:
    """Show progress on one line if the output is a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    return make_parser("capture", DESCRIPTION, EPILOG, add_arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    return run_command(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
