"""Import modules of a repository that the user cloned, without a trace in the imports of this process."""

import importlib
import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


def load_from_clone(
    folder: str | Path, name: str, stand_ins: Mapping[str, types.ModuleType] | None = None
) -> types.ModuleType:
    """Return a module of a repository.

    Args:
        folder: the one that imports start from.
        name: of the module, such as `"models.elan_block"`.
        stand_ins: modules that its imports get instead of installed ones.

    Raises:
        ValueError: `folder` has no such module.
    """
    file = Path(*name.split(".")).with_suffix(".py")
    if not (Path(folder) / file).is_file():
        raise ValueError(
            f"folder must hold {file.as_posix()}, as a clone of the authors' repository does, got {str(folder)!r}"
        )
    with _imports_from(Path(folder).resolve(), {name.partition(".")[0]}, stand_ins or {}):
        return importlib.import_module(name)


@contextmanager
def _imports_from(folder: Path, packages: set[str], stand_ins: Mapping[str, types.ModuleType]) -> Iterator[None]:
    """Let imports find `packages` in `folder`, and `stand_ins`; afterwards all is as before."""

    def theirs() -> list[str]:
        return [name for name in sys.modules if name.partition(".")[0] in packages | {*stand_ins}]

    replaced = {name: sys.modules.pop(name) for name in theirs()}
    sys.modules.update(stand_ins)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in theirs():
            del sys.modules[name]
        sys.modules.update(replaced)
