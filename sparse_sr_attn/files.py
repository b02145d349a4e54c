"""Files that are whole at every moment, whenever the process or the machine dies."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(file: Path, *, overwrite: bool = True) -> Iterator[BinaryIO]:
    """Yield a stream; what is written into it becomes `file` when the block ends, all at once.

    Until then `file` stays what it was, also when the block raises; then nothing of the new one is left.

    Args:
        file: in a folder that exists.
        overwrite: whether a file that is there may be replaced.

    Raises:
        FileExistsError: `file` is there and `overwrite` is off.
        OSError: it cannot be written.
    """
    temporary = file.with_name(f"{file.name}.tmp")
    _check_free(file, overwrite)
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        _check_free(file, overwrite)  # it may have come meanwhile
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    reach_disk(file.parent)


def reach_disk(folder: Path) -> None:
    """Wait until the names in `folder` are on the disk, where the system can tell."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _check_free(file: Path, overwrite: bool) -> None:
    if not overwrite and os.path.lexists(file):
        raise FileExistsError(f"{file} is there already")
