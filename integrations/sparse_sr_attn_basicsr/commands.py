"""`sparse-sr train` and `sparse-sr test`: BasicSR's pipelines, from the folder in which the user stands."""

import argparse
import copy
import importlib
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist

from sparse_sr_attn.config import Rule, fields, read
from sparse_sr_attn.errors import (
    CheckpointError,
    ConfigError,
    ImageError,
    Problem,
    ProcessError,
    SparseSRError,
    TrainingError,
)
from sparse_sr_attn.files import replacing
from sparse_sr_attn.inference import is_out_of_memory
from sparse_sr_attn_basicsr import extensions, preflight, processes, resuming, starting
from sparse_sr_attn_basicsr import options as option_files
from sparse_sr_attn_basicsr.loading import PortableDataset, Prefetcher, SeededSampler
from sparse_sr_attn_basicsr.registration import register
from sparse_sr_attn_basicsr.saving import write_image

_LOG = logging.getLogger(__name__)

# What is put in place of parts of BasicSR's training pipeline.
_PARTS = (
    *("load_resume_state", "copy_opt_file", "build_dataset", "EnlargedSampler", "create_train_val_dataloader"),
    "build_model",
)

_Number = Annotated[int, Rule("in [0, 2**62]", lambda value: 0 <= value <= 2**62)]


@dataclass(frozen=True, kw_only=True)
class _Exact:
    """What `SparseSRModel` saves beside BasicSR's state."""

    optimizer: str
    scaler: Mapping[str, Any]
    manual_seed: preflight.Seed | None
    place: Annotated[Sequence[_Number], Rule("of two numbers", lambda value: len(value) == 2)] | None
    random: Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class _State:
    """What a training state must hold."""

    iter: _Number
    epoch: _Number
    optimizers: Sequence[Mapping[str, Any]]
    schedulers: Sequence[Mapping[str, Any]]
    exact: Mapping[str, Any] | None = None


def train(arguments: argparse.Namespace) -> None:
    """Train as the option file says; `experiments/` comes to lie in the working directory.

    Args:
        arguments: `opt`, `force_yml`, `auto_resume`, `debug`, `launcher`, as `sparse-sr train` parses them.

    Raises:
        ConfigError: options are wrong; nothing was loaded or written.
        TrainingError: a number is not finite, an image or the disk cannot be used; the last good state has been saved
            if that is possible, and the message says where.
        ProcessError: another process ended; the message says from which state training can go on.
        CheckpointError: weights or a state cannot be read.
    """
    options = _checked_options(arguments, training=True)
    pipeline = _pipeline("basicsr.train", "train_pipeline", *_PARTS)
    run = _Run(options)
    with _session(arguments, options) as patch:
        patch(pipeline, "load_resume_state", run.resume)
        patch(pipeline, "copy_opt_file", lambda file, folder: _record_options(file, folder, arguments))
        _read_samples_safely(pipeline, patch)
        patch(pipeline, "EnlargedSampler", run.seed_sampler(pipeline.EnlargedSampler))
        patch(pipeline, "create_train_val_dataloader", run.count_epochs(pipeline.create_train_val_dataloader))
        patch(pipeline, "build_model", run.watch_model(pipeline.build_model))
        try:
            with processes.together() if arguments.launcher != "none" else nullcontext():
                pipeline.train_pipeline(str(Path.cwd()))
        except ProcessError as error:
            raise ProcessError(f"{error}\n{run.newest()}") from error
        except BrokenPipeError:
            raise
        except (ImageError, OSError, TrainingError) as error:
            raise TrainingError(f"{_told(error)}\n{run.save(together=isinstance(error, TrainingError))}") from error
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            # Not saved: buffers may have moved in a step that did not end.
            raise TrainingError(
                f"{_told(error)}\nSmaller gt_size or batch_size_per_gpu, or train.accumulate, need less.\n"
                f"What was saved before is in experiments/{options['name']}."
            ) from error


def test(arguments: argparse.Namespace) -> None:
    """Test as the option file says; `results/` comes to lie in the working directory.

    Args:
        arguments: `opt`, `force_yml`, `launcher`, as `sparse-sr test` parses them.

    Raises:
        ConfigError: options are wrong; nothing was loaded or written.
        CheckpointError: weights cannot be read.
        SparseSRError: an image or the disk cannot be used.
    """
    options = _checked_options(arguments, training=False)
    _choose_weights(options)
    pipeline = _pipeline("basicsr.test", "test_pipeline", "build_dataset")
    with _session(arguments, options) as patch:
        _read_samples_safely(pipeline, patch)
        try:
            pipeline.test_pipeline(str(Path.cwd()))
        except BrokenPipeError:
            raise
        except OSError as error:
            raise SparseSRError(_told(error)) from error
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise SparseSRError(f"{_told(error)}\nval.tile, in pixels of the input, needs less.") from error


def _choose_weights(options: dict[str, Any]) -> None:
    """Have the averaged weights tested where a file has them, unless `param_key_g` says otherwise; tell which are.

    Raises:
        CheckpointError: the file cannot be read.
    """
    path = options["path"]
    if file := path.get("pretrain_network_g"):
        try:
            key, remark = starting.entry_to_test(file, path.get("param_key_g"), given="param_key_g" in path)
        except Exception as error:  # a malformed file can make the reader raise anything
            raise CheckpointError(starting.why_unreadable(file, error)) from error
        path["param_key_g"] = key
        _LOG.warning("note: %s", remark)


def _pipeline(module: str, *parts: str) -> Any:
    """Return a pipeline of BasicSR.

    Raises:
        SparseSRError: that of this fork lacks what is put in place here.
    """
    try:
        pipeline = importlib.import_module(module)
    except ImportError as error:
        raise SparseSRError(f"{module} of this BasicSR cannot be imported: {error}") from error
    if missing := [part for part in parts if not hasattr(pipeline, part)]:
        raise SparseSRError(
            f"{pipeline.__file__} must have {', '.join(missing)}, as BasicSR 1.4.2 has; start this fork by its own "
            "script, with sparse_sr_attn_basicsr.register() (docs/basicsr.md)"
        )
    return pipeline


def _read_samples_safely(pipeline: Any, patch: Callable[[Any, str, Any], None]) -> None:
    """Have samples that cannot be read end the run with an error that names the file."""
    build_dataset = pipeline.build_dataset
    patch(pipeline, "build_dataset", lambda opt: PortableDataset(build_dataset(opt)))
    patch(importlib.import_module("basicsr.data.prefetch_dataloader"), "PrefetchGenerator", Prefetcher)


def _told(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"cannot read or write: {error}"
    if isinstance(error, MemoryError | RuntimeError):
        return " ".join(f"memory does not suffice: {error}".partition("\n")[0].split())
    return str(error)


class _Run:
    """One training run: from where it goes on, how far it goes, and what must be known to save it when it fails.

    Its methods stand in for functions of BasicSR's pipeline, or wrap them.

    Args:
        options: the checked ones.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = options
        self.opt: dict[str, Any] = {}  # the same as BasicSR completes them
        self.model: Any = None
        self.sampler: Any = None
        self.start_iteration = self.start_epoch = 0
        self.place = (0, 0)  # an epoch, and how many of its samples were used before

    def resume(self, opt: dict[str, Any]) -> Any:
        """Return the state to go on from, or None to begin; say so if it does not hold all that exactness needs."""
        self.opt = opt
        state = _load_resume_state(opt)
        if state is None:
            return None
        self.start_iteration, self.start_epoch = int(state["iter"]), int(state["epoch"])
        exact = state.get("exact") or {}
        if self.options.get("manual_seed") is None and exact.get("manual_seed") is not None:
            opt["manual_seed"] = exact["manual_seed"]
        if exact.get("place"):
            self.place = tuple(exact["place"])
        for reason in _inexactness(state, opt):
            _LOG.warning("note: training goes on, but not exactly as it would have without the stop: %s", reason)
        return state

    def seed_sampler(self, build: Callable[..., Any]) -> Callable[..., SeededSampler]:
        """Have training samples seeded one by one, and leave out those used before."""

        def built(*args: Any, **kwargs: Any) -> SeededSampler:
            sampler = SeededSampler(build(*args, **kwargs), self.opt["manual_seed"], *self.place)
            self.sampler = sampler
            return sampler

        return built

    def count_epochs(self, create: Callable[..., Any]) -> Callable[..., Any]:
        """Have BasicSR run as many epochs as `total_iter` needs.

        It counts a last batch that is not full, which its loader leaves out, and so may stop too early.
        """

        def created(*args: Any, **kwargs: Any) -> Any:
            loader, sampler, val_loaders, _, total_iters = create(*args, **kwargs)
            if not len(loader):
                ratio = "datasets.train.dataset_enlarge_ratio"
                message = f"an epoch of {len(sampler)} samples must fill a batch of {loader.batch_size}; enlarge it"
                raise ConfigError([Problem(ratio, message)])
            # Loaders draw a number at the start of each epoch; a run resumed in the middle of one would draw once more.
            loader.generator = torch.Generator()
            epoch, used = self.place
            done = used // self.opt["world_size"] // loader.batch_size if epoch == self.start_epoch else 0
            done = min(done, len(loader))  # there may be fewer images now
            num_epochs = math.ceil((total_iters - self.start_iteration + done) / len(loader))
            last_epoch = self.start_epoch + num_epochs - 1  # BasicSR goes up to this one, and through it
            return loader, sampler, val_loaders, last_epoch, total_iters

        return created

    def watch_model(self, build: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.model = build(*args, **kwargs)
            if not hasattr(self.model, "saved_iteration"):  # ours does so itself
                take_up = self.model.resume_training
                self.model.resume_training = partial(self.resume_another, take_up)
            return self.model

        return watched

    def resume_another(self, take_up: Callable[[Mapping[str, Any]], object], state: Mapping[str, Any]) -> None:
        """Have a model of BasicSR take up a state, with the options of the file."""
        try:
            changes = resuming.resume(self.model, state, take_up)
        except Exception as error:  # whatever is wrong in it shows by what is done with it
            reason = str(error).partition("\n")[0]
            raise CheckpointError(
                f"the state of iteration {state['iter']}: does not fit this network and these options: {reason}"
            ) from error
        for change in changes:
            _LOG.warning("note: %s; from here on what the option file says counts", change)

    def save(self, *, together: bool) -> str:
        """Save the state as it is and return a sentence on where.

        Args:
            together: whether all processes do so; one alone would wait for the others.
        """
        model = self.model
        if model is None:
            return "Nothing was trained."
        if not hasattr(model, "saved_iteration") or (model.opt["dist"] and not together):
            return f"What was saved before is in {model.opt['path']['training_states']}."
        states = Path(model.opt["path"]["training_states"])
        if not model.is_healthy():
            return f"It is not saved; the states before it are in {states}."
        file = states / f"{model.iteration}.state"
        if model.saved_iteration != model.iteration:
            model.save(self.sampler.epoch, model.iteration)
        if model.saved_iteration != model.iteration:
            return f"It could not be saved; the states before it are in {states}."
        return (
            f"The state after iteration {model.iteration:,} is saved: {file}\n"
            "Put the cause right and go on from there with --auto_resume."
        )

    def newest(self) -> str:
        """Return a sentence on the newest state saved."""
        folder = self.opt.get("path", {}).get("training_states")
        states = sorted(_states(Path(folder))) if folder else []
        if not states:
            return "No state was saved yet."
        return f"The newest state is {states[-1][1]}; go on from there with --auto_resume."


def _checked_options(arguments: argparse.Namespace, *, training: bool) -> dict[str, Any]:
    """Return the options of the file, overridden and checked."""
    options = option_files.load(arguments.opt)
    options, remarks = option_files.override(options, arguments.force_yml or ())
    try:
        register()
    except ImportError as error:
        raise SparseSRError(f"this BasicSR cannot be imported: {error}") from error
    extensions.load(options.get("custom_imports"))
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
        patch(importlib.import_module("basicsr.models.sr_model"), "imwrite", write_image)
        patch(basicsr_options, "init_dist", processes.initialiser(basicsr_options.init_dist, options))
        patch(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
        stack.callback(torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled())
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

    BasicSR opens one log per process; the file of a first run would take the lines of all later ones. If that file
    cannot be written, this is said once, and not with a traceback for each line.
    """
    initialized = importlib.import_module("basicsr.utils.logger").initialized_logger
    logger = logging.getLogger("basicsr")
    handlers, known = list(logger.handlers), initialized.pop("basicsr", None)
    logger.handlers.clear()
    handle_error, failed = logging.FileHandler.handleError, set()

    def tell_once(handler: logging.FileHandler, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            handle_error(handler, record)
        elif handler not in failed:
            failed.add(handler)
            _LOG.warning("note: the log %s is not whole (%s); the run goes on", handler.baseFilename, error)

    logging.FileHandler.handleError = tell_once  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        logging.FileHandler.handleError = handle_error  # type: ignore[method-assign]
        for handler in logger.handlers:
            with suppress(OSError):  # what is left of a log that could not be written
                handler.close()
        logger.handlers[:] = handlers
        initialized.pop("basicsr", None)
        if known is not None:
            initialized["basicsr"] = known


def _load_resume_state(opt: dict[str, Any]) -> Any:
    """Return the state to resume, on the CPU, or None: the newest whole one for `--auto_resume`, else the one named.

    Raises:
        CheckpointError: the state named in the options, or its weights, cannot be read.
    """
    if opt["auto_resume"]:
        candidates = sorted(_states(Path(opt["path"]["training_states"])), reverse=True)
    else:
        named = opt["path"].get("resume_state")
        candidates = [(-1, Path(named))] if named else []
    for _, file in candidates:
        try:
            state = _read(file)
            _check_state(state, file)
            _read(Path(opt["path"]["models"]) / f"net_g_{state['iter']}.pth")
        except CheckpointError as error:
            if not opt["auto_resume"]:
                raise CheckpointError(f"path.resume_state: {error}") from error
            _LOG.warning("note: %s cannot be resumed (%s); trying the one before", file, error)
            continue
        path = opt["path"]
        path["resume_state"] = str(file)
        importlib.import_module("basicsr.utils").check_resume(opt, state["iter"])
        # These were said of `pretrain_network_g`, in the place of which the weights of the run itself stand now.
        for key in [key for key in opt if key.startswith("network_")]:
            letter = key.removeprefix("network_")
            path |= {f"param_key_{letter}": "params", f"strict_load_{letter}": True}
        return state
    return None


def _check_state(state: Mapping[Any, Any], file: Path) -> None:
    """Refuse a map that is no training state.

    Raises:
        CheckpointError: it is none; with all that is wrong.
    """
    try:
        read(_State, {name: state[name] for name in fields(_State) if name in state})
        if state.get("exact"):
            exact = state["exact"]
            read(_Exact, {name: exact[name] for name in fields(_Exact) if name in exact}, "exact")
    except ConfigError as error:
        raise CheckpointError(f"{file} must hold a training state; {'; '.join(map(str, error.problems))}") from error


def _read(file: Path) -> Any:
    """Return the map that `torch.save` wrote into `file`.

    Raises:
        CheckpointError: there is none that can be read.
    """
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a malformed file can make the reader raise anything
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).partition("\n")[0]
        raise CheckpointError(f"cannot read {file}: {reason}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} must hold a map, got a {type(content).__name__}")
    return content


def _inexactness(state: Mapping[str, Any], opt: Mapping[str, Any]) -> Iterator[str]:
    """Yield why training cannot go on exactly from `state`."""
    exact = state.get("exact")
    if not exact:
        yield "no random numbers and no place in the epoch are in this state, as BasicSR's own models save it"
        return
    if exact["manual_seed"] != opt["manual_seed"]:
        yield f"manual_seed is {opt['manual_seed']}, and was {exact['manual_seed']}"
    if len(exact["random"]) != opt["world_size"]:
        yield f"the number of processes is {opt['world_size']}, and was {len(exact['random'])}"
    if exact["place"] is None and state["iter"]:
        yield "no place in the epoch is in this state, as it was not saved under `sparse-sr train`"


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
    with replacing(Path(folder) / Path(file).name) as stream:  # it may be the very file, when a run is resumed with it
        stream.write(header + text)
