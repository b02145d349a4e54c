"""Read option files as data, and complete them as BasicSR expects.

BasicSR's loader runs Python code from a file. This one runs nothing, reads `1e-4` as a number, and names the line of
every error.
"""

import argparse
import copy
import importlib
import os
import re
from collections.abc import Hashable, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import yaml

from sparse_sr_attn.errors import ConfigError, Problem
from sparse_sr_attn_basicsr.options import OPTIONS


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, with tuples and with YAML 1.2's floats; an option given twice is refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        if isinstance(node, yaml.MappingNode):
            first: dict[str, int] = {}
            for key, _ in node.value:
                line = key.start_mark.line + 1
                if isinstance(key, yaml.ScalarNode) and first.setdefault(key.value, line) != line:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{key.value!r} is given twice, first on line {first[key.value]}", key.start_mark
                    )
        return super().construct_mapping(node, deep=deep)

    def construct_python_tuple(self, node: yaml.SequenceNode) -> tuple[Any, ...]:
        return tuple(self.construct_sequence(node, deep=True))


_Loader.add_constructor("tag:yaml.org,2002:python/tuple", _Loader.construct_python_tuple)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def load(file: str | Path) -> dict[str, Any]:
    """Return the options in a YAML file.

    Args:
        file: its path. Tags other than YAML's own and `!!python/tuple` are errors: nothing in the file is executed.

    Raises:
        ConfigError: there is no such file, or it is not a YAML mapping of names to values; with the line if known.
    """
    path = Path(file).expanduser()
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ConfigError.at(str(file), _unreadable(path, error)) from None
    options = parse(text, str(file))
    if not isinstance(options, dict) or not all(isinstance(key, str) for key in options):
        found = "nothing" if options is None else f"a {type(options).__name__}"
        raise ConfigError.at(str(file), f"must hold a mapping from option names to values, got {found}")
    return options


def parse(text: str | bytes, where: str) -> Any:
    """Return the YAML value in `text`; `where` begins the message of the `ConfigError` that this may raise."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506  (a SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{where}, line {mark.line + 1}, column {mark.column + 1}" if mark else where
        raise ConfigError.at(place, _explain(error)) from None
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        raise ConfigError.at(where, f"is not YAML: {error}") from None


def override(options: dict[str, Any], entries: Iterable[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the options with `a:b:c=value` entries (`--force_yml`) applied, and remarks on new names.

    Values are YAML, so `1e-4`, `true`, `~` and `[1, 2]` mean the same as in an option file; `none` is `~`.

    Raises:
        ConfigError: names every entry without `=`, with an invalid value, or with a path through something that is
            not a mapping.
    """
    result = _copy(options)
    problems: list[Problem] = []
    remarks: list[str] = []
    for entry in entries:
        where = f"--force_yml {entry}"
        keys, equals, text = entry.partition("=")
        path = [key.strip() for key in keys.split(":")]
        if not equals or not all(path):
            problems.append(Problem(where, "must be name=value or outer:inner=value, e.g. train:total_iter=1000"))
            continue
        try:
            value = None if text.strip().casefold() == "none" else parse(text, where)
        except ConfigError as error:
            problems.extend(error.problems)
            continue
        target: Any = result
        for depth, key in enumerate(path[:-1]):
            target = target.get(key)
            if not isinstance(target, dict):
                problems.append(
                    Problem(where, f"there is no mapping '{':'.join(path[: depth + 1])}' in the option file")
                )
                break
        else:
            if path[-1] not in target and target:
                close = get_close_matches(path[-1], list(map(str, target)), n=1)
                hint = f" (did you mean {close[0]!r}?)" if close else ""
                remarks.append(f"{where}: {path[-1]!r} is new, the option file has no such name{hint}")
            target[path[-1]] = value
    if problems:
        raise ConfigError(problems)
    return result, remarks


def complete(options: Mapping[str, Any], arguments: argparse.Namespace, *, training: bool) -> dict[str, Any]:
    """Return checked options with everything else that BasicSR looks up, as its `parse_options` does.

    Args:
        options: options of the whole file, from `preflight.check`.
        arguments: of the command: `launcher`, `auto_resume`, and `debug`, which logs every iteration, and saves and
            validates every 8.
        training: whether the options are for training or for testing.
    """
    rank, world_size = importlib.import_module("basicsr.utils.dist_util").get_dist_info()
    opt = copy.deepcopy(dict(options))
    opt |= {"dist": arguments.launcher != "none", "rank": rank, "world_size": world_size, "is_train": training}
    opt |= {"auto_resume": arguments.auto_resume, "root_path": os.getcwd(), "manual_seed": opt.get("manual_seed")}
    if arguments.debug and not opt["name"].startswith("debug"):
        opt["name"] = f"debug_{opt['name']}"
    if opt["num_gpu"] == "auto":
        opt["num_gpu"] = torch.cuda.device_count()
    for phase, dataset in opt["datasets"].items():
        dataset |= {"phase": phase.split("_")[0], "scale": opt["scale"]}
        _expand_user(dataset, ("dataroot_gt", "dataroot_lq"))
    path = opt["path"]
    _expand_user(path, [name for name in path if "resume_state" in name or "pretrain_network" in name])
    root = str(Path("experiments" if training else "results").absolute() / opt["name"])
    path |= {"log": root, "visualization": f"{root}/visualization"}
    if not training:
        return opt | {"path": path | {"results_root": root}}
    path |= {"experiments_root": root, "models": f"{root}/models", "training_states": f"{root}/training_states"}
    if "debug" in opt["name"]:
        opt["logger"] |= {"print_freq": 1, "save_checkpoint_freq": 8}
        if opt.get("val"):
            opt["val"]["val_freq"] = 8
    return opt


def _expand_user(options: dict[str, Any], names: Iterable[str]) -> None:
    for name in names:
        if options.get(name) is not None:
            options[name] = os.path.expanduser(options[name])


def _copy(value: Any) -> Any:
    """Copy mappings and lists, so that YAML aliases become independent mappings."""
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_copy(item) for item in value]
    return value


def _explain(error: yaml.MarkedYAMLError) -> str:
    text = str(error.problem)
    tag = re.search(r"could not determine a constructor for the tag '(?:tag:yaml.org,2002:)?([^']*)'", text)
    if tag:
        name = tag[1] if tag[1].startswith("!") else f"!!{tag[1]}"
        return f"{name} is refused: option files are read as data and run no code; !!python/tuple is the one extra tag"
    if "\\t" in text:
        text += "; indent with spaces"
    return f"{text} ({error.context})" if error.context else text


def _unreadable(path: Path, error: OSError) -> str:
    if not isinstance(error, FileNotFoundError):
        return f"cannot be read: {error.strerror}"
    folder = path.resolve().parent
    beside = [file.name for file in folder.glob("*.y*ml")] if folder.is_dir() else []
    close = get_close_matches(path.name, beside, n=1)
    hint = f"; did you mean {str(path.parent / close[0])!r}?" if close else ""
    shipped = next(OPTIONS.rglob(path.name), None)
    if not hint and shipped:
        hint = f"; one of that name comes with the package: {shipped}"
    return f"no such option file (in {folder}){hint}"
