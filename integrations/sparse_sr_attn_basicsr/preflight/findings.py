"""The data that the checks of an option file share: options, problems, and what this BasicSR has registered."""

import importlib
import importlib.util
import inspect
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from sparse_sr_attn.config import ProblemList, fields, join_path, read
from sparse_sr_attn.errors import ConfigError
from sparse_sr_attn.registry import suggestion
from sparse_sr_attn_basicsr import option_names, registration, schema

MODEL = "SparseSRModel"
_READERS = ("basicsr.train", "basicsr.test", "basicsr.utils.options", "basicsr.utils.logger", "basicsr.utils.misc")
_NO_FOLDERS = ("strict_load", "pretrain_network", "resume", "param_key")  # BasicSR makes folders of other options


class Findings:
    """The check of one file: the options, converted as far as they are valid, and the problems found.

    Args:
        options: options of a whole option file.
        training: whether they are for training or for testing.

    Attributes:
        problems: the problems found.
        names: what the code reads beyond the options of `schema`, which belong to their sections.
        remarks: what is valid but probably a mistake.
        scale: `scale`, if it is valid.
        model: the class that `model_type` names, or `None`.
        networks: our networks by their names in this BasicSR.
    """

    def __init__(self, options: Mapping[str, Any], training: bool) -> None:
        self.options = dict(options)
        self.training = training
        self.problems = ProblemList()
        self.remarks: list[str] = []
        self.scale: int | None = None
        self._registries = importlib.import_module("basicsr.utils.registry")
        self.networks = registration.names()
        self.model = self.registered("MODEL", options.get("model_type"))
        modules = [importlib.import_module(name) for name in _READERS if importlib.util.find_spec(name)]
        modules.append(importlib.import_module("basicsr.data"))
        usual = option_names.names_in(*modules, *bases(self.registered("MODEL", "SRModel")))
        theirs = [cls for cls in bases(self.model) if not cls.__module__.startswith("sparse_sr_attn")]
        self.names = (usual - schema.NAMES) | (option_names.names_in(*theirs) - usual)

    def add(self, path: str, message: str) -> None:
        """Add a problem."""
        self.problems.add(path, message)

    def add_all(self, error: ConfigError) -> None:
        """Add the problems of an error."""
        for problem in error.problems:
            self.problems.add(problem.path, problem.message)

    def section(self, declared: type, values: Any, path: str, *, whole: bool = True) -> dict[str, Any]:
        """Check the options of a section, convert its numbers in place, and return those that are right.

        Args:
            declared: a class of `schema`.
            values: the section.
            path: where it stands.
            whole: whether `declared` lists all options; a name close to one of them is then misspelt.
        """
        known = fields(declared)
        if whole:
            self.unread(path, values, [*known, *self.names])
        given = {name: values[name] for name in known if name in values}
        right = read(declared, given, path, problems=self.problems)
        for name, value in right.items():
            if known[name].annotation in (schema.Count, schema.WholeNumber):
                values[name] = int(value)
            elif isinstance(value, float) and isinstance(values[name], str):
                values[name] = value
        return right

    def unread(self, path: str, values: Mapping[str, Any], known: Iterable[str]) -> None:
        """Add a problem for names similar to a known one, and a remark for others that nothing reads."""
        known = list(known)
        for name, value in values.items():
            if name in known or (path == "train" and str(name).endswith("_opt")):  # a loss, checked as such
                continue
            if str(name).startswith(("network_", "optim_")) and self.training and path in ("", "train"):
                if self.model is not None:
                    self.add(join_path(path, name), f"unknown to {self.options['model_type']}")
                continue
            close = get_close_matches(str(name), known, n=1, cutoff=0.8)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            if close and value is not None:
                self.add(join_path(path, name), f"unknown{hint}")
            elif path == "path" and not any(part in str(name) for part in _NO_FOLDERS):
                self.add(join_path(path, name), f"unknown, and BasicSR would create a folder for it{hint}")
            else:
                self.remarks.append(f"{join_path(path, name)}: nothing reads this option{hint}")

    def registered(self, registry: str, name: object) -> Any:
        """Return what BasicSR has registered under a name; `None` if there is nothing.

        `registry` is `ARCH`, `DATASET`, `LOSS`, `METRIC` or `MODEL`.
        """
        table = getattr(self._registries, f"{registry}_REGISTRY")
        names = (name, f"{name}_basicsr") if isinstance(name, str) else ()
        return next((table.get(key) for key in names if key in table), None)

    def by_type(self, registry: str, path: str, options: Mapping[str, Any], example: str) -> Any:
        """Return what the option `type` names in a registry; `None` and a problem for a missing or unknown name."""
        name = options.get("type")
        if not isinstance(name, str):
            self.add(f"{path}.type", f"missing; it names {example}")
            return None
        return self.by_name(registry, f"{path}.type", name)

    def by_name(self, registry: str, path: str, name: str) -> Any:
        """Return what BasicSR has registered under a name; `None` and a problem for an unknown one."""
        found = self.registered(registry, name)
        if found is None:
            table = getattr(self._registries, f"{registry}_REGISTRY")
            known = sorted({str(key).removesuffix("_basicsr") for key in table.keys()})  # noqa: SIM118
            noun = "network" if registry == "ARCH" else registry.lower()
            self.add(path, f"BasicSR has no {noun} named {name!r}{suggestion(name, known)}")
        return found

    def mapping(self, path: str, value: object) -> dict[str, Any] | None:
        """Return a copy of a mapping; `None` and a problem for any other value."""
        if isinstance(value, Mapping):
            return dict(value)
        self.add(path, f"must be a mapping with a key 'type', got {value!r}")
        return None

    def is_ours(self) -> bool:
        """Return whether the model is ours."""
        ours = self.registered("MODEL", MODEL)
        return inspect.isclass(self.model) and inspect.isclass(ours) and issubclass(self.model, ours)

    def counterpart(self) -> str:
        """Return our model to use instead of the given one."""
        name = f"Sparse{self.options.get('model_type')}"
        return MODEL if self.registered("MODEL", name) is None else name


def bases(cls: Any) -> tuple[type, ...]:
    """Return a class and its bases, the nearest first; nothing for anything else."""
    return cls.__mro__ if inspect.isclass(cls) else ()


def nested(options: object, *names: str) -> Any:
    """Return the value at a path of keys, or `None` if the path does not exist."""
    for name in names:
        options = options.get(name) if isinstance(options, Mapping) else None
    return options


def similar_file(wanted: Path) -> str:
    """Return a suggestion of a file or folder with a similar name for a missing one."""
    parent = wanted.parent
    beside = {entry.name.casefold(): entry.name for entry in parent.iterdir()} if parent.is_dir() else {}
    close = get_close_matches(wanted.name.casefold(), beside, n=1)
    return f"; did you mean {str(parent / beside[close[0]])!r}?" if close else ""


@contextmanager
def without_warnings() -> Iterator[None]:
    """Ignore warnings inside."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
