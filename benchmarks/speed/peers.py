"""Code from outside: a class in a Python file, held against ours.

`file.py:Class` or `file.py:Class:name=value,name=value`, with Python's values. The class is called with these
arguments and the number of channels, by the first of the names in `WIDTHS` that its constructor has; it gives a module
that maps (b, c, h, w) to the same size. A network is called with the factor by a name in `FACTORS` instead. If a module
returns a tuple, its first item counts.
"""

import ast
import importlib.util
import inspect
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sparse_sr_attn.errors import ConfigError, Problem, SparseSRError

WIDTHS = ("embed_dim", "channels", "in_channels", "channel", "dim", "num_feat", "n_feats")
"""What a constructor may call the number of channels, in the order in which the names are looked for."""

FACTORS = ("upscale", "scale", "upscale_factor")
"""What a network's constructor may call the factor."""

_FORM = re.compile(r"(?P<file>.+\.py):(?P<name>[A-Za-z_]\w*)(:(?P<arguments>.*))?")


class PeerError(SparseSRError):
    """Code from outside fails."""


class Peer(nn.Module):
    """A module from outside, made into one from tensor to tensor.

    Args:
        spec: where it came from, for messages.
        module: what was built.
    """

    def __init__(self, spec: str, module: nn.Module) -> None:
        super().__init__()
        self.spec = spec
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        """Return what the module makes of `x`.

        Raises:
            PeerError: it fails, or returns no tensor.
        """
        try:
            output = self.module(x)
        except Exception as error:  # whatever somebody else's code raises
            shape = tuple(x.shape)
            raise PeerError(f"{self.spec} fails on a map of shape {shape}: {type(error).__name__}: {error}") from error
        first = output[0] if isinstance(output, tuple | list) and output else output
        if not isinstance(first, Tensor):
            raise PeerError(
                f"{self.spec} must return a tensor, or a tuple that begins with one; got {type(output).__name__}"
            )
        return first


def label(spec: str) -> str:
    """Return the name of a peer in tables: its file and class, such as `elan.GMSA`."""
    form = _FORM.fullmatch(spec)
    return f"{Path(form['file']).stem}.{form['name']}" if form else spec


def build_peer(spec: str, names: Sequence[str], value: int) -> Peer:
    """Return the module that `spec` names.

    Args:
        spec: `file.py:Class` or `file.py:Class:name=value,...`.
        names: what the constructor may call the one argument that the benchmark gives.
        value: of that argument.

    Raises:
        ConfigError: the text is not of this form, or there is no such file or class.
        PeerError: the file or the class fails.
    """
    form = _FORM.fullmatch(spec)
    if form is None:
        raise _wrong(spec, "must be FILE.py:Class or FILE.py:Class:name=value,name=value")
    arguments = _arguments(spec, form["arguments"] or "")
    build = _class(spec, Path(form["file"]), form["name"])
    try:
        parameters = dict(inspect.signature(build).parameters)
    except (TypeError, ValueError):  # it is none of Python's own
        parameters = {}
    for name in names:
        if name in parameters and not arguments.keys() & set(names):
            arguments[name] = value
            break
    try:
        module = build(**arguments)
    except Exception as error:  # whatever somebody else's code raises
        given = ", ".join(f"{name}={number!r}" for name, number in arguments.items())
        takes = ", ".join(map(str, parameters.values()))
        raise PeerError(
            f"{form['name']}({given}) fails: {type(error).__name__}: {error}; its constructor takes ({takes}). Give "
            f"what is missing as {form['file']}:{form['name']}:name=value,..."
        ) from error
    if not isinstance(module, nn.Module):
        raise PeerError(f"{spec} must give a torch.nn.Module, got {type(module).__name__}")
    return Peer(spec, module)


def _wrong(spec: str, message: str) -> ConfigError:
    return ConfigError([Problem("--peer", f"{message}, got {spec!r}")])


def _arguments(spec: str, text: str) -> dict[str, Any]:
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(keyword.arg is None for keyword in call.keywords):
            raise ValueError("only name=value")
        return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise _wrong(spec, "arguments must be name=value,name=value with values as Python writes them") from error


def _class(spec: str, file: Path, name: str) -> Any:
    if not file.is_file():
        raise _wrong(spec, f"there must be a file {file}")
    module_name = f"sparse_sr_attn_peer_{file.stem}"
    found = importlib.util.spec_from_file_location(module_name, file)
    if found is None or found.loader is None:
        raise _wrong(spec, f"{file} must be a Python file")
    module = importlib.util.module_from_spec(found)
    folder = str(file.resolve().parent)
    sys.modules[module_name] = module  # dataclasses and pickle look there
    sys.path.insert(0, folder)  # for modules in the same folder
    try:
        found.loader.exec_module(module)
    except Exception as error:  # whatever somebody else's code raises
        raise PeerError(f"{file} cannot be imported: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(folder)
    if not hasattr(module, name):
        classes = [
            key for key, item in vars(module).items() if inspect.isclass(item) and item.__module__ == module_name
        ]
        raise _wrong(spec, f"{file} must have a class {name} (it has: {', '.join(sorted(classes)) or 'none'})")
    return getattr(module, name)
