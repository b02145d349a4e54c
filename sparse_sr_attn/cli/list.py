"""`sparse-sr list`: the names for option files and code."""

import argparse
import inspect
import json
import textwrap
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from sparse_sr_attn.checkpoints.layouts import LAYOUTS
from sparse_sr_attn.checkpoints.load import load_model
from sparse_sr_attn.checkpoints.read import trained_weights
from sparse_sr_attn.cli.common import UsageError, add_imports, import_modules, show
from sparse_sr_attn.config import fields
from sparse_sr_attn.errors import SparseSRError
from sparse_sr_attn.layers.base import LAYERS
from sparse_sr_attn.models import PRESETS
from sparse_sr_attn.registry import suggestion

DESCRIPTION = """\
List attention layers (for `attention: {type: NAME}`), networks, presets (networks with options), and the included
trained weights (for --weights and load_model).

examples:
  sparse-sr list                  one line each
  sparse-sr list LCoA EDSR        with options and defaults
  sparse-sr list --json           everything, for programs"""
EPILOG = """\
The number is that of parameters: of layers at 64 channels; of networks and presets at their default scale, which is 4
for EDSR and RCAN and 2 for LCoAN and ELAN; of weights at the scale in their name."""

_TITLES = {
    "layers": "layers, with parameters at 64 channels",
    "networks": "networks, with parameters of the default options",
    "presets": "presets, with parameters at the default scale",
    "weights": "weights, with parameters",
}

_LAYER_WIDTH = 64
_INDENT = " " * 6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("names", nargs="*", metavar="NAME", help="show these with all options")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_imports(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the tables; return the exit status."""
    import_modules(arguments)
    tables = {"layers": _layers(), "networks": _networks(), "presets": _presets(), "weights": _weights()}
    if arguments.names:
        known = {row["name"] for table in tables.values() for row in table}
        if unknown := [name for name in arguments.names if name not in known]:
            raise UsageError(
                f"no layer, network, preset or weights named {unknown[0]}{suggestion(unknown[0], sorted(known))}; "
                "--import FILE.py adds what a file of yours registers"
            )
        tables = {title: [row for row in table if row["name"] in arguments.names] for title, table in tables.items()}
    if arguments.json:
        show(json.dumps(tables, indent=2, default=str))
        return 0
    show("\n\n".join(_text(title, table, bool(arguments.names)) for title, table in tables.items() if table))
    return 0


def _layers() -> list[dict[str, Any]]:
    rows = []
    for name in LAYERS:
        entry = LAYERS.get(name)
        options = dict(list(_options(entry.build).items())[1:])  # without the width, which the network says
        build = partial(entry.build, _LAYER_WIDTH)
        rows.append({"kind": entry.kind, **_row(name, build, entry.source, _about(entry.build), options)})
    return rows


def _networks() -> list[dict[str, Any]]:
    builds = {layout.build.__name__: layout.build for layout in LAYOUTS}
    return [
        _row(name, build, _source(build) or _about(build), _about(build), _options(build))
        for name, build in sorted(builds.items())
    ]


def _presets() -> list[dict[str, Any]]:
    return [
        _row(name, partial(preset.build, **preset.options), preset.source, preset.build.__name__, preset.options)
        for name, preset in PRESETS.items()
    ]


def _weights() -> list[dict[str, Any]]:
    source = "trained for this library, at bicubic degradation"
    return [
        _row(name, partial(load_model, name), source, f"load_model({name!r}), --weights {name}", {})
        for name in trained_weights()
    ]


def _row(
    name: str, build: Callable[[], nn.Module], source: str, about: str, options: Mapping[str, Any]
) -> dict[str, Any]:
    parameters = _num_parameters(build)
    return {"name": name, "source": source, "about": about, "parameters": parameters, "options": dict(options)}


def _about(build: Callable[..., object]) -> str:
    return inspect.cleandoc(build.__doc__ or "").partition("\n")[0]


def _source(build: Callable[..., object]) -> str:
    """Return the section `Source` of a docstring."""
    section = inspect.cleandoc(build.__doc__ or "").partition("Source:\n")[2].partition("\n\n")[0]
    return " ".join(section.split())


def _options(build: Callable[..., object]) -> dict[str, Any]:
    return {name: None if field.default is field.empty else field.default for name, field in fields(build).items()}


def _num_parameters(build: Callable[[], nn.Module]) -> int | None:
    try:
        return sum(parameter.numel() for parameter in build().parameters())
    except (TypeError, SparseSRError):  # there are options without a default, or a package is not there
        return None


def _text(title: str, table: list[dict[str, Any]], full: bool) -> str:
    width = max(len(row["name"]) for row in table)
    lines = [_TITLES[title]]
    for row in table:
        kind = f"{row['kind']:<9} " if "kind" in row else ""
        count = "?" if row["parameters"] is None else f"{row['parameters']:,}"
        head = f"  {row['name']:<{width}}  {kind}{count:>11}  "
        lines.append(head + textwrap.shorten(row["source"], 118 - len(head)))
        if full:
            for text in dict.fromkeys((row["about"], row["source"])):
                lines += textwrap.wrap(text, 110, initial_indent=_INDENT, subsequent_indent=_INDENT)
            lines += [f"{_INDENT}{name}={value!r}" for name, value in row["options"].items()]
    return "\n".join(lines)
