"""What the commands share: messages, common arguments, loading weights, missing packages."""

import argparse
import importlib
import importlib.util
import inspect
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from sparse_sr_attn.errors import CheckpointError, ConfigError, ProcessError, SparseSRError, first_line
from sparse_sr_attn.registry import suggestion

if TYPE_CHECKING:
    import torch
    from torch import nn

    from sparse_sr_attn.backbones.base import Network

_PACKAGES = {"PIL": "pillow"}
"""Packages whose name differs from that of their module."""
_NAMED = 3
"""Files named in a note before it stops."""


DEFAULT_WEIGHTS = {2: "EDSR-LCoA_x2", 3: "LCoAN-light_x3", 4: "LCoAN-light_x4"}
"""The weights of a command without `--weights`, by factor: the best of those included."""


class UsageError(SparseSRError):
    """The command line is wrong; nothing was done."""


def say(text: str, *, everywhere: bool = False) -> None:
    """Print an error or a note, in the first process only unless `everywhere`."""
    if everywhere or os.environ.get("RANK", "0") == "0":
        show(f"sparse-sr: {text}", sys.stderr)


def exit_status(run: Callable[[], int], *, options: str = "--set", interrupted: str = "interrupted") -> int:
    """Return the result of `run`, or the exit status for an error after printing its message.

    Args:
        run: the command.
        options: source of the options, for the message of a `ConfigError`.
        interrupted: message if the user interrupts.
    """
    try:
        return run()
    except ConfigError as error:
        problems = [str(problem).replace("\n", "\n    ") for problem in error.problems]
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        say(f"{count} in {options}; nothing was run\n  " + "\n  ".join(problems))
        return 2
    except SparseSRError as error:
        say(str(error), everywhere=isinstance(error, ProcessError))  # the first may be the one that is gone
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        say(interrupted)
        return 130
    except BrokenPipeError:  # the reader of the output has closed it
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (else Python complains when it ends)
        return 1


def show(text: str, stream: TextIO | None = None) -> None:
    """Print a line, even if a file name in it cannot be encoded."""
    stream = stream or sys.stdout
    encoding = stream.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream)


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in body)])


def name(path: Path | str) -> str:
    """Return a path on one line."""
    return "".join(part if part.isprintable() else ascii(part)[1:-1] for part in str(path))


def require(*modules: str) -> None:
    """Raise an error that says what to install if a package is missing.

    Raises:
        SparseSRError: one of `modules` is missing.
    """
    missing = [_PACKAGES.get(module, module) for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise SparseSRError(f"{', '.join(missing)} must be installed: python -m pip install {' '.join(missing)}")


def images_in(path: Path) -> list[Path]:
    """Return the images in a folder, sorted, without hidden files; or a single image.

    Raises:
        UsageError: the path does not exist, or the folder has no images.
    """
    if not os.path.lexists(path):
        raise UsageError(f"{name(path)}: no such image or folder")
    if not os.path.isdir(path):
        return [path]
    try:
        files = sorted(file for file in path.iterdir() if not file.is_dir())
    except OSError as error:
        raise UsageError(f"{name(path)}: {error.strerror}") from error
    from sparse_sr_attn.data.images import looks_like_image  # noqa: PLC0415

    images = [file for file in files if looks_like_image(file) and not file.name.startswith(".")]
    if not images:
        found = f"none of its {len(files)} files has the suffix of one" if files else "it is empty"
        raise UsageError(f"{name(path)} contains no images: {found}")
    return images


def all_images(paths: Sequence[Path]) -> list[Path]:
    """Return the images that are named or in named folders, each once, without results of earlier commands.

    Raises:
        UsageError: a path does not exist, or a folder has no images.
    """
    return without_results(list({file.absolute(): file for path in paths for file in images_in(path)}.values()))


def without_results(images: Sequence[Path]) -> list[Path]:
    """Leave out, with a note, results of earlier commands next to their originals: photo_x2.png next to photo.jpg."""
    originals = {(image.parent, part.casefold()) for image in images for part in (image.stem, image.name)}
    results = []
    for image in images:
        original = re.fullmatch(r"(.+)_(x\d+|clusters|attention|overlap)\.png", image.name, re.DOTALL)
        if original and (image.parent, original[1].casefold()) in originals:
            results.append(image)
    if results:
        say(
            f"note: {len(results)} of {len(images)} images are results next to their originals and are skipped: "
            f"{some(results)}"
        )
    return [image for image in images if image not in results]


def some(files: Sequence[Path]) -> str:
    """Return the names of the first files."""
    return ", ".join(map(name, files[:_NAMED])) + (", ..." if len(files) > _NAMED else "")


def distinct_names(files: Sequence[Path]) -> list[str]:
    """Return a unique name for each file: its stem if unique, else its file name, else with its folder's name.

    Names that differ only in case count as one.

    Raises:
        UsageError: two files still have the same name.
    """
    choices = [(file.stem, file.name, f"{file.resolve().parent.name}_{file.name}") for file in files]
    chosen = [0] * len(files)
    while True:
        names = [choice[level] for choice, level in zip(choices, chosen, strict=True)]
        times = Counter(one.casefold() for one in names)
        twice = [index for index, one in enumerate(names) if times[one.casefold()] > 1]
        if not twice:
            return names
        for index in twice:
            chosen[index] += 1
        if max(chosen) == 3:
            same = [name(files[index]) for index in twice if names[index].casefold() == names[twice[0]].casefold()]
            raise UsageError(f"{' and '.join(same)} would get the same name; process them in two runs, or rename one")


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add the argument that `find_device` reads."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps, ... (default: the GPU if there is one, else the CPU)")


def add_output(parser: argparse.ArgumentParser, text: str) -> None:
    """Add the file that a command must write."""
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", required=True, help=text)


def check_suffix(output: Path, *suffixes: str) -> None:
    """Raise an error unless the file to write has one of the suffixes.

    Raises:
        UsageError: it has another.
    """
    if output.suffix not in suffixes:
        raise UsageError(f"--output must end in {', '.join(suffixes)}, got {name(output)}")


def check_new(output: Path, arguments: argparse.Namespace) -> None:
    """Refuse to replace a file without `--overwrite`, before any work but after the checks of all other arguments.

    Raises:
        UsageError: the file exists.
    """
    if os.path.lexists(output) and not arguments.overwrite:
        raise UsageError(f"{name(output)} already exists; use --overwrite")


def add_weights(parser: argparse.ArgumentParser, *, default: bool = True) -> None:
    """Add the arguments that `load` reads; without `default`, the command chooses the weights if none are given."""
    parser.add_argument(
        "-w",
        "--weights",
        default=DEFAULT_WEIGHTS[2] if default else None,
        type=Path,
        metavar="FILE|NAME",
        help=".pth or .safetensors, ours or from another codebase, or weights included in the library "
        f"(`sparse-sr list`); they determine the network "
        f"(default: {DEFAULT_WEIGHTS[2] if default else 'included weights for --scale'})",
    )
    add_options(parser)
    add_device(parser)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the argument for options that weights do not record."""
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="options of the network that the weights do not record, e.g. img_range=1.0; values as in JSON",
    )
    parser.add_argument(
        "--host",
        metavar="FILE.py:NAME",
        help="for weights of a third-party network, with or without attention from `attach`: a function or class that "
        "builds the network without what `attach` added, in a file or a module (PACKAGE.MODULE:NAME); --set gives its "
        "options",
    )
    add_imports(parser)


def add_imports(parser: argparse.ArgumentParser) -> None:
    """Add the argument for modules of the user's own."""
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE|FILE.py",
        help="import this code first, for the layers and networks that it registers (`custom_imports` in option "
        "files); can be given several times",
    )


def import_modules(arguments: argparse.Namespace) -> None:
    """Import the modules of `--import`.

    Raises:
        UsageError: a module cannot be imported.
    """
    if not arguments.imports:
        return
    _let_code_import_basicsr()
    try:
        importlib.import_module("sparse_sr_attn_basicsr.extensions").load(arguments.imports)
    except ConfigError as error:
        raise UsageError("--import: " + "; ".join(problem.message for problem in error.problems)) from error


def _let_code_import_basicsr() -> None:
    if importlib.util.find_spec("basicsr") is not None:
        importlib.import_module("sparse_sr_attn_basicsr").apply()


def build_host(arguments: argparse.Namespace, given: dict[str, Any]) -> "nn.Module | None":
    """Build the network of `--host`.

    Raises:
        UsageError: it cannot be imported or built.
    """
    if arguments.host is None:
        return None
    file, colon, wanted = arguments.host.rpartition(":")
    if not (colon and file and wanted.isidentifier()):
        raise UsageError(f"--host needs FILE.py:NAME or MODULE:NAME, got {arguments.host!r}")
    from torch import nn  # noqa: PLC0415

    _let_code_import_basicsr()
    extensions = importlib.import_module("sparse_sr_attn_basicsr.extensions")
    try:
        module = extensions.import_entry(file)
        if not hasattr(module, wanted):
            known = [key for key, value in vars(module).items() if callable(value)]
            raise AttributeError(f"{file} has no {wanted!r}{suggestion(wanted, known)}")
        build = getattr(module, wanted)
        takes = inspect.signature(build).parameters
        unknown = [key for key in given if key not in takes]
        if unknown and not any(each.kind is each.VAR_KEYWORD for each in takes.values()):
            raise UsageError(
                f"--host {arguments.host} has no option {unknown[0]!r}{suggestion(unknown[0], list(takes))}"
            )
        model = build(**given)
    except UsageError:
        raise
    except Exception as error:  # user code can raise anything
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UsageError(f"--host {arguments.host} cannot be built: {reason}") from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"--host must build a torch.nn.Module, but {wanted} returns a {type(model).__name__}")
    return model


def options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options given by `--set`.

    Raises:
        UsageError: an option does not have the form NAME=VALUE.
    """
    given = {}
    for item in arguments.set:
        key, equals, value = item.partition("=")
        if not equals or not key.isidentifier():
            raise UsageError(f"--set needs NAME=VALUE, got {item!r}")
        try:
            given[key] = json.loads(value)
        except ValueError:
            given[key] = value
    return given


def load(arguments: argparse.Namespace) -> "Network":
    """Load the network of `--weights` and `--set`, on `--device` if the command has that argument.

    Raises:
        UsageError: the weights do not exist, the device is not available, or `--set` is invalid.
        CheckpointError: the weights cannot be read.
        ConfigError: an option is invalid.
    """
    from sparse_sr_attn.checkpoints.load import load_and_tell  # noqa: PLC0415
    from sparse_sr_attn.checkpoints.read import find_file  # noqa: PLC0415

    try:
        find_file(arguments.weights)
    except CheckpointError as error:
        raise UsageError(f"{name(arguments.weights)}: {error}") from error
    device = find_device(getattr(arguments, "device", "cpu"))
    import_modules(arguments)
    given = options(arguments)
    host = build_host(arguments, {key: value for key, value in given.items() if key != "img_range"})
    if host is not None:
        given = {key: value for key, value in given.items() if key == "img_range"}
    model, told = load_and_tell(arguments.weights, given, model=host)
    if told:
        say(f"note: {name(arguments.weights)}: {told}")
    return model.to(device)


def load_with_attention(arguments: argparse.Namespace) -> "Network":
    """Load like `load` a network with attention.

    Raises:
        UsageError: the network has none.
    """
    from sparse_sr_attn.checkpoints.foreign import network_name  # noqa: PLC0415
    from sparse_sr_attn.inference.evaluate import has_attention  # noqa: PLC0415

    model = load(arguments)
    if not has_attention(model):
        what = f"the {network_name(model)} of {name(arguments.weights)}"
        raise UsageError(f"--weights must be of a network with attention, but {what} has none")
    return model


def find_device(asked: str | None) -> "torch.device":
    """Return a device by name; by default, the GPU if torch can use one.

    Raises:
        UsageError: torch cannot use the device.
    """
    import torch  # noqa: PLC0415

    if asked is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(asked)
        torch.empty(1, device=device).add(1)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"--device must be one that torch can use here, got {asked!r}: {first_line(error)}") from error
    return device
