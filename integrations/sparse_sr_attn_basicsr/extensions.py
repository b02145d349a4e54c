"""Import the user's modules, which an option file lists under `custom_imports`: layers, networks, losses, data sets.

They are imported before options are checked, so option files can use what they register.
"""

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from sparse_sr_attn.config import ProblemList, read


@dataclass(frozen=True)
class _Options:
    custom_imports: Sequence[str] | None = None


def load(entries: object) -> None:
    """Import the modules that an option file lists.

    Args:
        entries: `None`, or a list of module names (`my_project.layers`, also searched in the working directory) and
            Python files (`layers/mine.py`, relative to the working directory). Each is imported once.

    Raises:
        ConfigError: names each entry that cannot be imported, and why.
    """
    problems = ProblemList()
    for index, entry in enumerate(read(_Options, {"custom_imports": entries})["custom_imports"] or ()):
        try:
            import_entry(entry)
        except Exception as error:  # user code can raise anything
            problems.add(f"custom_imports.{index}", f"{entry} cannot be imported: {type(error).__name__}: {error}")
    problems.raise_if_any()


def import_entry(entry: str) -> ModuleType:
    """Return the module that the name of a module or a Python file stands for.

    A module is also looked for in the working directory; a file can import its neighbours.

    Raises:
        Exception: whatever importing it leads to.
    """
    file = Path(entry).expanduser().resolve() if entry.endswith(".py") else None
    if file is not None and not file.is_file():
        raise FileNotFoundError(f"there is no file {str(file)!r}")
    folder = str(Path.cwd() if file is None else file.parent)
    sys.path.append(folder)
    try:
        return importlib.import_module(entry) if file is None else _import_file(file)
    finally:
        sys.path.remove(folder)


def _import_file(file: Path) -> ModuleType:
    name = f"sparse_sr_attn_custom_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError("it is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
