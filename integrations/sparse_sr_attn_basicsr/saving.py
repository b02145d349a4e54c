"""Files that are whole at every moment, whenever the process or the machine dies."""

import os
from pathlib import Path
from typing import Any

import torch


def write(value: Any, file: Path) -> None:
    """Save `value` with `torch.save`; until that is done, `file` stays what it was.

    Raises:
        OSError: it cannot be written; `file` is what it was.
    """
    temporary = file.with_name(f"{file.name}.tmp")
    try:
        with temporary.open("wb") as stream:
            torch.save(value, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
            raise error.__context__ from None  # torch, closing its archive, hides why writing failed
        raise
    _reach_disk(file.parent)


def remove(file: Path) -> None:
    """Remove `file`, if it is there, before anything else is written."""
    if file.exists():
        file.unlink()
        _reach_disk(file.parent)


def _reach_disk(folder: Path) -> None:
    """Wait until the names in `folder` are on the disk, where the system can tell."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
