"""Weights and states that are whole at every moment, whenever the process or the machine dies."""

from pathlib import Path
from typing import Any

import cv2
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


def write_image(image: Any, file: str) -> None:
    """Save an image as BasicSR's `imwrite` does, but whole or not at all, and with the reason if it cannot be.

    Args:
        image: (h, w, 3) in BGR or (h, w), as OpenCV has it.
        file: its suffix says the format; folders are made.

    Raises:
        OSError: it cannot be written; what was there before is as it was.
    """
    target = Path(file)
    encoded = cv2.imencode(target.suffix, image)[1]
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as stream:
        stream.write(encoded.tobytes())


def remove(file: Path) -> None:
    """Remove `file`, if it is there, before anything else is written."""
    if file.exists():
        file.unlink()
        reach_disk(file.parent)
