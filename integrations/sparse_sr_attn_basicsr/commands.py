"""`sparse-sr train` and `sparse-sr test`: BasicSR's pipelines, from the folder in which the user stands."""

import argparse
import copy
import importlib
import logging
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import Dataset

from sparse_sr_attn.errors import CheckpointError, TrainingError
from sparse_sr_attn_basicsr import options as option_files
from sparse_sr_attn_basicsr import preflight
from sparse_sr_attn_basicsr.registration import register

_LOG = logging.getLogger(__name__)


def train(arguments: argparse.Namespace) -> None:
    """Train as the option file says; `experiments/` comes to lie in the working directory.

    Args:
        arguments: `opt`, `force_yml`, `auto_resume`, `debug`, `launcher`, as `sparse-sr train` parses them.

    Raises:
        ConfigError: options are wrong; nothing was loaded or written.
        TrainingError: a number is not finite; the last good state has been saved, and the message says where.
        CheckpointError: weights or a state cannot be read.
    """
    options = _checked_options(arguments, training=True)
    pipeline = importlib.import_module("basicsr.train")
    build_dataset = pipeline.build_dataset
    run = _Run()
    with _session(arguments, options) as patch:
        patch(pipeline, "load_resume_state", _load_resume_state)
        patch(pipeline, "copy_opt_file", lambda file, folder: _record_options(file, folder, arguments))
        patch(pipeline, "build_dataset", lambda opt: PortableDataset(build_dataset(opt)))
        patch(pipeline, "build_model", run.watch_model(pipeline.build_model))
        patch(pipeline, "create_train_val_dataloader", run.watch_loaders(pipeline.create_train_val_dataloader))
        try:
            pipeline.train_pipeline(str(Path.cwd()))
        except TrainingError as error:
            raise TrainingError(f"{error}\n{run.save()}") from error


def test(arguments: argparse.Namespace) -> None:
    """Test as the option file says; `results/` comes to lie in the working directory.

    Args:
        arguments: `opt`, `force_yml`, `launcher`, as `sparse-sr test` parses them.

    Raises:
        ConfigError: options are wrong; nothing was loaded or written.
        CheckpointError: weights cannot be read.
    """
    options = _checked_options(arguments, training=False)
    with _session(arguments, options):
        importlib.import_module("basicsr.test").test_pipeline(str(Path.cwd()))


class PortableDataset(Dataset[Any]):
    """A data set that repairs BasicSR's imports in the process to which it is sent.

    Loader processes are forked or spawned, as the system and BasicSR's launcher have it. A spawned one imports BasicSR
    afresh when it unpickles the data set, and there nobody else has made the repairs.

    Args:
        dataset: one of BasicSR's.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    def __getattr__(self, name: str) -> Any:
        """Pass on what BasicSR asks of its data sets."""
        return getattr(self.__dict__["dataset"], name)

    def __reduce__(self) -> tuple[Callable[[bytes], "PortableDataset"], tuple[bytes]]:
        """Pack the data set such that the repairs come before it is unpacked."""
        return _unpack, (pickle.dumps(self.dataset),)


def _unpack(packed: bytes) -> PortableDataset:
    register()
    return PortableDataset(pickle.loads(packed))  # noqa: S301  (this process packed it)


class _Run:
    """What must be known of a training run to save it when it fails."""

    def __init__(self) -> None:
        self.model: Any = None
        self.sampler: Any = None

    def watch_model(self, build: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.model = build(*args, **kwargs)
            return self.model

        return watched

    def watch_loaders(self, create: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            created = create(*args, **kwargs)
            self.sampler = created[1]
            return created

        return watched

    def save(self) -> str:
        """Save the state as it is and return a sentence on where."""
        model = self.model
        states = Path(model.opt["path"]["training_states"])
        if not model.is_healthy():
            return f"It is not saved; the states before it are in {states}."
        file = states / f"{model.iteration}.state"
        if model.saved_iteration != model.iteration:
            model.save(getattr(self.sampler, "epoch", 0), model.iteration)
        return (
            f"The state after iteration {model.iteration:,} is saved: {file}\n"
            "Put the cause right and go on from there with --auto_resume."
        )


def _checked_options(arguments: argparse.Namespace, *, training: bool) -> dict[str, Any]:
    """Return the options of the file, overridden and checked."""
    options = option_files.load(arguments.opt)
    options, remarks = option_files.override(options, arguments.force_yml or ())
    register()
    options, more = preflight.check(options, training=training, launcher=arguments.launcher)
    for remark in [*remarks, *more]:
        _LOG.warning("note: %s", remark)
    return options


@contextmanager
def _session(arguments: argparse.Namespace, options: Mapping[str, Any]) -> Iterator[Callable[[Any, str, Any], None]]:
    """Have BasicSR take `options`, and put everything back afterwards, so that one process can run several commands.

    BasicSR reads the command line itself, and opens the option file with a loader that runs code. Here it finds a
    command line without overrides (they are in the options already) and a loader that yields the checked options.
    """
    basicsr_options = importlib.import_module("basicsr.utils.options")
    command_line = ["sparse-sr", "-opt", str(arguments.opt), "--launcher", arguments.launcher]
    command_line += ["--auto_resume"] if arguments.auto_resume else []
    command_line += ["--debug"] if arguments.debug else []
    had_group = dist.is_available() and dist.is_initialized()
    with ExitStack() as stack:

        def patch(owner: Any, name: str, value: Any) -> None:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)

        patch(sys, "argv", command_line)
        patch(basicsr_options, "ordered_yaml", lambda: (_loader_of(options), None))
        patch(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
        stack.enter_context(own_log())
        try:
            yield patch
        finally:
            if dist.is_available() and dist.is_initialized() and not had_group:
                dist.destroy_process_group()


def _loader_of(options: Mapping[str, Any]) -> type:
    """Return what looks like a YAML loader and yields `options`, whatever the stream."""

    class Loader:
        def __init__(self, stream: object) -> None:
            """Leave the stream alone: the file was read before."""

        def get_single_data(self) -> Mapping[str, Any]:
            return copy.deepcopy(options)

        def dispose(self) -> None:
            """Nothing is held."""

    return Loader


@contextmanager
def own_log() -> Iterator[None]:
    """Give BasicSR a log of its own inside, closed at the end.

    BasicSR opens one log per process; the file of a first run would take the lines of all later ones.
    """
    initialized = importlib.import_module("basicsr.utils.logger").initialized_logger
    logger = logging.getLogger("basicsr")
    handlers, known = list(logger.handlers), initialized.pop("basicsr", None)
    logger.handlers.clear()
    try:
        yield
    finally:
        for handler in logger.handlers:
            handler.close()
        logger.handlers[:] = handlers
        initialized.pop("basicsr", None)
        if known is not None:
            initialized["basicsr"] = known


def _load_resume_state(opt: dict[str, Any]) -> Any:
    """Return the state to resume, on the CPU, or None: the newest whole one for `--auto_resume`, else the one named.

    Raises:
        CheckpointError: the state named in the options cannot be read.
    """
    if opt["auto_resume"]:
        candidates = sorted(_states(Path(opt["path"]["training_states"])), reverse=True)
    else:
        named = opt["path"].get("resume_state")
        candidates = [(-1, Path(named))] if named else []
    for _, file in candidates:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            if not opt["auto_resume"]:
                raise CheckpointError(f"path.resume_state: cannot read {file}: {error}") from error
            _LOG.warning("note: %s cannot be read (%s); trying the one before", file, str(error).partition("\n")[0])
            continue
        weights = Path(opt["path"]["models"]) / f"net_g_{state['iter']}.pth"
        if opt["auto_resume"] and not weights.is_file():
            _LOG.warning("note: %s has no weights (%s is missing); trying the one before", file, weights)
            continue
        opt["path"]["resume_state"] = str(file)
        importlib.import_module("basicsr.utils").check_resume(opt, state["iter"])
        return state
    return None


def _states(folder: Path) -> Iterator[tuple[int, Path]]:
    for file in folder.glob("*.state"):
        if file.stem.isdecimal():
            yield int(file.stem), file


def _record_options(file: str, folder: str, arguments: argparse.Namespace) -> None:
    """Copy the option file to the experiment, headed by the command line; also when it lies there already."""
    if int(os.environ.get("RANK", "0")) != 0:
        return
    command = ["sparse-sr train -opt", str(arguments.opt)]
    command += ["--auto_resume"] if arguments.auto_resume else []
    command += ["--debug"] if arguments.debug else []
    command += ["--force_yml", *arguments.force_yml] if arguments.force_yml else []
    text = Path(file).read_bytes()
    header = f"# {time.asctime()}\n# {' '.join(command)}\n\n".encode()
    (Path(folder) / Path(file).name).write_bytes(header + text)
