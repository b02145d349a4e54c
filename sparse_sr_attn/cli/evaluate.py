"""`sparse-sr evaluate`: PSNR and SSIM of images against the ground truth, as in papers."""

import argparse
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import get_args

from torch import Tensor

from sparse_sr_attn.backbones.base import Network
from sparse_sr_attn.cli.common import (
    UsageError,
    add_device,
    add_options,
    images_in,
    load,
    name,
    require,
    show,
    table,
    without_results,
)
from sparse_sr_attn.data.images import as_rgb, read_pixels
from sparse_sr_attn.data.imresize import crop_to_multiple
from sparse_sr_attn.data.metrics import Protocol, Score, bicubic_luma, luma, score
from sparse_sr_attn.errors import ImageError, ShapeError, SparseSRError
from sparse_sr_attn.inference.evaluate import attention_off, evaluate, has_attention

DESCRIPTION = """\
Compare upscaled images with the ground truth, or measure networks on test sets: PSNR and SSIM on luma, without the
border.

examples:
  sparse-sr evaluate Set5/HR Set14/HR --weights LCoAN-light_x2 --weights net_g_latest.pth --bicubic       a table
  sparse-sr evaluate Urban100/HR --weights EDSR-LCoA_x2 --without-attention    how much it relies on attention
  sparse-sr evaluate results/ Set5/HR --scale 2
  sparse-sr evaluate results/ Set5/HR --scale 4 --names {}_RCAN {}_HR_x4      baby_RCAN.png belongs to baby_HR_x4.png
  sparse-sr evaluate --bicubic Set14/HR --scale 3 --grey bridge               the row "bicubic" of papers' tables"""
EPILOG = """\
With --weights or --bicubic, folders hold the ground truth only. It is downsampled by MATLAB's bicubic, then upscaled.
Several methods or folders give a table with a column for each folder.

Protocols: basicsr (BasicSR, EDSR and most networks since): luma in floating point, grey images as RGB. matlab (SRCNN,
and papers that copied its figures): luma rounded to 8 bits, grey images as they are, which lowers their PSNR by 1.3 dB.
Set14 has two grey images; published figures of bicubic treat one of them (bridge) as grey, the other as RGB. If both
are stored as RGB, name the grey one with --grey."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add = parser.add_argument
    add("folders", nargs="+", type=Path, metavar="FOLDER", help="results, then ground truth; or test sets, see below")
    add("-w", "--weights", action="append", default=[], metavar="FILE|NAME", help="measure this network; repeatable")
    add("--without-attention", action="store_true", help="measure networks again, their attention switched off")
    add("-s", "--scale", type=int, metavar="N", help="super-resolution factor; needed only without --weights")
    add("--border", type=int, metavar="N", help="pixels of border to leave out (default: the scale)")
    add("--protocol", choices=get_args(Protocol), help="see below (default: basicsr; with --bicubic always matlab)")
    add("--grey", nargs="+", default=[], metavar="NAME", help="RGB images to treat as grey")
    add("--bicubic", action="store_true", help="downsample and upsample the ground truth, as in SRCNN")
    add("--names", nargs=2, default=["{}", "{}"], metavar=("RESULT", "TRUE"), help="file names, {} for the common part")
    add_options(parser)
    add_device(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print a line for each picture and one for their mean, or a table of means; return the exit status."""
    require("PIL", "numpy")
    _check(arguments)
    test_sets = arguments.folders if arguments.weights or arguments.bicubic else arguments.folders[1:]
    arguments.truths = {folder: _truth_pictures(arguments, folder) for folder in test_sets}
    networks = _networks(arguments)
    if arguments.without_attention and not any(map(has_attention, networks.values())):
        raise UsageError(f"--without-attention: none of these networks has attention: {', '.join(map(name, networks))}")
    methods: dict[str, Method] = {"bicubic": partial(_bicubic, arguments)} if arguments.bicubic else {}
    for label, model in networks.items():
        methods[label] = partial(_upscaled, arguments, model)
        if arguments.without_attention and has_attention(model):
            methods[f"{label}, attention off"] = partial(_without_attention, arguments, model)
    if not methods:
        _show_pictures(dict(_results(arguments)))
    elif len(methods) == len(arguments.folders) == 1:
        _show_pictures(dict(next(iter(methods.values()))(arguments.folders[0])))
    else:
        _show_table(arguments, methods)
    return 0


Method = Callable[[Path], Iterator[tuple[str, Score]]]
"""Yields the names and scores of the pictures of a folder."""


def _networks(arguments: argparse.Namespace) -> dict[str, Network]:
    """Return the networks of `--weights` by name, and set the scale if only they say it."""
    networks = {}
    for weights in arguments.weights:
        networks[weights] = load(argparse.Namespace(**{**vars(arguments), "weights": weights}))
        arguments.scale = networks[weights].upscale if arguments.scale is None else arguments.scale
        if networks[weights].upscale != arguments.scale:
            raise UsageError(
                f"all weights must have the same scale, which --scale repeats; {name(weights)} has "
                f"{networks[weights].upscale}, not {arguments.scale}"
            )
    return networks


def _show_pictures(scores: dict[str, Score]) -> None:
    rows = [(name(label), one) for label, one in [*scores.items(), ("mean", _mean(scores.values()))]]
    width = max(len(label) for label, _ in rows)
    for label, one in rows:
        show(f"{label:<{width}}  {one.psnr:6.3f} dB  {one.ssim:.4f}")


def _show_table(arguments: argparse.Namespace, methods: dict[str, Method]) -> None:
    rows = []
    for label, method in methods.items():
        means = [_mean(dict(method(folder)).values()) for folder in arguments.folders]
        rows.append([name(label), *(f"{one.psnr:.2f} / {one.ssim:.4f}" for one in means)])
    show(table([f"×{arguments.scale}", *(name(folder) for folder in arguments.folders)], rows))


def _mean(scores: Collection[Score]) -> Score:
    return Score(*(sum(values) / len(scores) for values in zip(*scores, strict=True)))


def _check(arguments: argparse.Namespace) -> None:
    if not (arguments.bicubic or arguments.weights) and len(arguments.folders) != 2:
        raise UsageError(
            f"without --weights or --bicubic, two folders must be given, results and ground truth; got "
            f"{len(arguments.folders)}"
        )
    if arguments.bicubic and arguments.protocol == "basicsr" and not arguments.weights:
        raise UsageError("--bicubic needs --protocol matlab, which the published figures use")
    if arguments.without_attention and not arguments.weights:
        raise UsageError("--without-attention needs --weights, a network whose attention to switch off")
    if arguments.scale is None and not arguments.weights:
        raise UsageError("--scale must be given, because there are no weights that record it")
    if arguments.scale is not None and arguments.scale < 1:
        raise UsageError(f"--scale must be >= 1, got {arguments.scale}")
    if arguments.border is not None and arguments.border < 0:
        raise UsageError(f"--border must be >= 0, got {arguments.border}")
    for template in arguments.names:
        if template.count("{}") != 1:
            raise UsageError(f"--names must each have one {{}}, got {template}")


def _truth_pictures(arguments: argparse.Namespace, folder: Path) -> dict[str, Path]:
    """Return the pictures of a test set by name."""
    pictures = _pictures(folder, arguments.names[1])
    originals = without_results(list(pictures.values()))
    pictures = {label: path for label, path in pictures.items() if path in originals}
    if unknown := [label for label in arguments.grey if label not in pictures]:
        raise UsageError(f"--grey must name images, got {', '.join(unknown)} (known: {', '.join(pictures)})")
    return pictures


def _truths(arguments: argparse.Namespace, folder: Path) -> Iterator[tuple[str, Path, Tensor]]:
    """Yield the name, the file and the pixels of each picture of a test set."""
    for label, path in arguments.truths[folder].items():
        with _about(path):
            yield label, path, _read(path, grey=label in arguments.grey)


def _bicubic(arguments: argparse.Namespace, folder: Path) -> Iterator[tuple[str, Score]]:
    for label, path, picture in _truths(arguments, folder):
        with _about(path):
            truth, enlarged = bicubic_luma(picture, arguments.scale)
            yield label, score(enlarged, truth, border=_border(arguments))


def _upscaled(arguments: argparse.Namespace, model: Network, folder: Path) -> Iterator[tuple[str, Score]]:
    protocol: Protocol = arguments.protocol or "basicsr"
    for label, path, picture in _truths(arguments, folder):
        with _about(path):
            yield label, evaluate(model, [picture], border=arguments.border, protocol=protocol)[0]


def _without_attention(arguments: argparse.Namespace, model: Network, folder: Path) -> Iterator[tuple[str, Score]]:
    with attention_off(model):
        yield from _upscaled(arguments, model, folder)


def _results(arguments: argparse.Namespace) -> Iterator[tuple[str, Score]]:
    results, truths = _pictures(arguments.folders[0], arguments.names[0]), arguments.truths[arguments.folders[1]]
    if missing := sorted(truths.keys() - results.keys()):
        some = f"{name(next(iter(results.values())).name)}, {name(truths[missing[0]].name)}"
        near = [path.stem.replace(missing[0], "{}", 1) for path in results.values() if missing[0] in path.stem]
        remedy = f"; try --names {name(near[0])} {name(arguments.names[1])}" if near else ""
        raise UsageError(
            f"no result for {', '.join(map(name, missing))} in {name(arguments.folders[0])}; --names gives the file "
            f"names, which are like {some}{remedy}"
        )
    protocol: Protocol = arguments.protocol or "basicsr"
    for label, path in truths.items():
        grey = label in arguments.grey
        with _about(results[label]):
            result = _read(results[label], grey=grey)
        with _about(path):
            truth = crop_to_multiple(_read(path, grey=grey), arguments.scale)
        with _about(results[label]):
            if protocol == "matlab" and truth.dim() != result.dim():  # what a picture is, the true one says
                result = _grey(result) if truth.dim() == 2 else as_rgb(result)
            yield label, score(luma(result, protocol), luma(truth, protocol), border=_border(arguments))


def _border(arguments: argparse.Namespace) -> int:
    return int(arguments.scale if arguments.border is None else arguments.border)


def _pictures(folder: Path, template: str) -> dict[str, Path]:
    """Return the pictures of a folder by the part of their names that matches {}."""
    before, after = template.split("{}")
    found: dict[str, Path] = {}
    for path in images_in(folder):
        if path.stem.startswith(before) and path.stem.endswith(after):
            label = path.stem[len(before) : len(path.stem) - len(after)]
            if label in found:
                raise UsageError(f"{name(path)} and {name(found[label].name)} must have different names")
            found[label] = path
    if not found:
        raise UsageError(f"{name(folder)} must contain images named like {template}, but contains none")
    return found


def _read(path: Path, *, grey: bool) -> Tensor:
    pixels = read_pixels(path)
    return _grey(pixels) if grey and pixels.dim() == 3 else pixels


def _grey(pixels: Tensor) -> Tensor:
    """Return the one channel of an RGB picture without colours."""
    if not bool((pixels == pixels[..., :1]).all()):
        raise ImageError("must be grey, like the ground truth or as --grey says, but has colours")
    return pixels[..., 0]


@contextmanager
def _about(path: Path) -> Iterator[None]:
    """Add the name of the file to an error."""
    try:
        yield
    except (ImageError, ShapeError) as error:
        raise SparseSRError(f"{name(path)}: {error}") from error
