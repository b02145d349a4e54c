"""Training states: written completely or not at all, read as data, and checked before a run resumes."""

import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import cv2
import torch

from sparse_sr_attn.config import Rule, fields, read
from sparse_sr_attn.data.atomic import atomic_write, fsync_dir
from sparse_sr_attn.errors import CheckpointError, ConfigError, first_line
from sparse_sr_attn_basicsr.schema import Seed

_Number = Annotated[int, Rule("in [0, 2**62]", lambda value: 0 <= value <= 2**62)]


@dataclass(frozen=True, kw_only=True)
class _Exact:
    """What `SparseSRModel` saves in addition to BasicSR's state."""

    optimizer: str
    scaler: Mapping[str, Any]
    manual_seed: Seed | None
    place: Annotated[Sequence[_Number], Rule("of two numbers", lambda value: len(value) == 2)] | None
    random: Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class _State:
    """What every training state holds."""

    iter: _Number
    epoch: _Number
    optimizers: Sequence[Mapping[str, Any]]
    schedulers: Sequence[Mapping[str, Any]]
    exact: Mapping[str, Any] | None = None


def write(value: Any, file: Path) -> None:
    """Save `value` with `torch.save`; until this is complete, `file` is unchanged.

    Raises:
        OSError: it cannot be written; `file` is unchanged.
    """
    try:
        with atomic_write(file) as stream:
            torch.save(value, stream)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None  # torch, closing its archive, hides why writing failed
        raise


def write_image(image: Any, file: Path) -> None:
    """Save an OpenCV image (BGR or grey) as BasicSR's `imwrite` does, but completely or not at all.

    Raises:
        OSError: it cannot be written; `file` is unchanged.
    """
    encoded = cv2.imencode(file.suffix, image)[1]
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as stream:
        stream.write(encoded.tobytes())


def remove(file: Path) -> None:
    """Remove `file`, if it exists, before anything else is written."""
    if file.exists():
        file.unlink()
        fsync_dir(file.parent)


def list_states(folder: Path) -> list[Path]:
    """Return the states in a folder, the oldest first."""
    return sorted((file for file in folder.glob("*.state") if file.stem.isdecimal()), key=lambda file: int(file.stem))


def find_state(opt: dict[str, Any], notes: list[str]) -> dict[str, Any] | None:
    """Return the state to resume from, on the CPU: the newest complete one with `--auto_resume`, else the named one.

    Args:
        opt: complete options. `path` in them is set to the weights that belong to the state.
        notes: gets a line for each damaged state that was skipped.

    Returns:
        `None` to begin.

    Raises:
        CheckpointError: the state named in the options, or its weights, cannot be read.
    """
    path = opt["path"]
    if opt["auto_resume"]:
        candidates = list_states(Path(path["training_states"]))[::-1]
    else:
        candidates = [Path(path["resume_state"])] if path.get("resume_state") else []
    for file in candidates:
        try:
            state = _read(file)
            _check(state, file)
            _read(Path(path["models"]) / f"net_g_{state['iter']}.pth")
        except CheckpointError as error:
            if not opt["auto_resume"]:
                raise CheckpointError(f"path.resume_state: {error}") from error
            notes.append(f"{file} cannot be resumed ({error}); trying the one before")
            continue
        path["resume_state"] = str(file)
        importlib.import_module("basicsr.utils").check_resume(opt, state["iter"])
        # The options below describe `pretrain_network_g`, which the weights of the run itself have replaced.
        for network in [key.removeprefix("network_") for key in opt if key.startswith("network_")]:
            path |= {f"param_key_{network}": "params", f"strict_load_{network}": True}
        return state
    return None


def inexactness(state: Mapping[str, Any], opt: Mapping[str, Any]) -> Iterator[str]:
    """Yield why training cannot resume exactly from `state`."""
    exact = state.get("exact")
    if not exact:
        yield "this state, of one of BasicSR's own models, has no random states and no position in the epoch"
        return
    if exact["manual_seed"] != opt["manual_seed"]:
        yield f"manual_seed is {opt['manual_seed']}, and was {exact['manual_seed']}"
    if len(exact["random"]) != opt["world_size"]:
        yield f"the number of processes is {opt['world_size']}, and was {len(exact['random'])}"
    if exact["place"] is None and state["iter"]:
        yield "this state, which was not saved by `sparse-sr train`, has no position in the epoch"


def _check(state: Mapping[Any, Any], file: Path) -> None:
    """Raise CheckpointError, with all that is wrong, unless a mapping is a training state."""
    try:
        read(_State, {name: state[name] for name in fields(_State) if name in state})
        if exact := state.get("exact"):
            read(_Exact, {name: exact[name] for name in fields(_Exact) if name in exact}, "exact")
    except ConfigError as error:
        raise CheckpointError(f"{file} must hold a training state; {'; '.join(map(str, error.problems))}") from error


def _read(file: Path) -> dict[str, Any]:
    """Return the mapping in a file of `torch.save`, or raise CheckpointError."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a malformed file can make the reader raise anything
        reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        raise CheckpointError(f"cannot read {file}: {reason}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} must hold a mapping, got a {type(content).__name__}")
    return content
