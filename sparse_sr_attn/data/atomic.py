"""Atomic writes: files are complete even if the process or the machine dies."""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from sparse_sr_attn.errors import SparseSRError, first_line


@contextmanager
def atomic_write(file: Path, *, overwrite: bool = True) -> Iterator[BinaryIO]:
    """Yield a stream whose content replaces `file` when the block ends, atomically.

    Until then `file` is unchanged. If the block raises, the new content is removed.

    Args:
        file: a path in an existing folder.
        overwrite: whether to replace an existing file.

    Raises:
        FileExistsError: `file` exists and `overwrite` is `False`.
        OSError: the file cannot be written.
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
    fsync_dir(file.parent)


def write_json(file: Path, document: Any) -> None:
    """Write a document as JSON by `atomic_write`.

    Raises:
        TypeError: JSON cannot represent the document.
        OSError: the file cannot be written.
    """
    with atomic_write(file) as stream:
        stream.write(json.dumps(document, indent=1).encode() + b"\n")


@contextmanager
def written(file: Path, error: type[SparseSRError], *, overwrite: bool) -> Iterator[BinaryIO]:
    """Yield the stream of `atomic_write`; whatever goes wrong with the file is raised as `error`, with the reason."""
    try:
        with atomic_write(file, overwrite=overwrite) as stream:
            yield stream
    except FileExistsError as exists:
        raise error(f"{file} already exists; use --overwrite") from exists
    except (OSError, RuntimeError, ValueError, MemoryError) as failure:
        # torch, closing its archive, hides why writing failed
        cause = failure.__context__ if isinstance(failure.__context__, OSError) else failure
        reason = getattr(cause, "strerror", None) or first_line(cause) or type(cause).__name__
        raise error(f"{file} cannot be written: {reason}") from failure


def check_writable(file: Path) -> None:
    """Raise the error that writing `file` would raise. No file is changed or left behind.

    Args:
        file: a path; missing folders are created and removed again.

    Raises:
        OSError: the file cannot be written.
    """
    if os.path.isdir(file):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(file))
    if os.path.lexists(file.parent) and not os.path.isdir(file.parent):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(file.parent))
    made = [folder for folder in file.parents if not os.path.lexists(folder)]
    trial = file.with_name(f"{file.name}.try")  # as long a name as `atomic_write` needs
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with trial.open("xb"):
            pass
        trial.unlink()
    except FileExistsError:
        if not os.path.isfile(trial):  # else somebody else tries at this moment
            raise
    finally:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()


def fsync_dir(folder: Path) -> None:
    """Flush the entries of `folder` to disk, if the system supports it."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _check_free(file: Path, overwrite: bool) -> None:
    if not overwrite and os.path.lexists(file):
        raise FileExistsError(f"{file} already exists")
