"""Weights and states that are whole at every moment, whenever the process or the machine dies."""

from pathlib import Path
from typing import Any

import torch

from sparse_sr_attn.files import reach_disk, replacing


def write(value: Any, file: Path) -> None:
    """Save `value` with `torch.save`; until that is done, `file` stays what it was.

    Raises:
        OSError: it cannot be written; `file` is what it was.
    """
    try:
        with replacing(file) as stream:
            torch.save(value, stream)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None  # torch, closing its archive, hides why writing failed
        raise


def remove(file: Path) -> None:
    """Remove `file`, if it is there, before anything else is written."""
    if file.exists():
        file.unlink()
        reach_disk(file.parent)
