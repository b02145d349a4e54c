"""`sparse-sr train` and `sparse-sr test`: check the options, run, and report errors."""

import argparse
import importlib
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sparse_sr_attn.data.atomic import atomic_write
from sparse_sr_attn.errors import ImageError, ProcessError, SparseSRError, TrainingError
from sparse_sr_attn.inference.tiling import is_out_of_memory
from sparse_sr_attn_basicsr import distributed, extensions, option_file, preflight, pretrained
from sparse_sr_attn_basicsr.registration import register

_LOG = logging.getLogger(__name__)


def train(arguments: argparse.Namespace) -> None:
    """Train as the option file says; `experiments/` is written to the working directory.

    Args:
        arguments: `opt`, `force_yml`, `auto_resume`, `debug`, `launcher`, as `sparse-sr train` parses them.

    Raises:
        ConfigError: options are invalid; nothing was loaded or written.
        TrainingError: a value is not finite, or an image or the disk cannot be used; the last good state has been
            saved if possible, and the message says where.
        ProcessError: another process ended; the message says from which state training can resume.
        CheckpointError: weights or a state cannot be read.
    """
    options = _checked_options(arguments, training=True)
    loop = _import("sparse_sr_attn_basicsr.train")
    with distributed.process_group(arguments.launcher, options), _torch_settings():
        run = loop.Run(option_file.complete(options, arguments, training=True))
        try:
            with distributed.peer_errors(arguments.launcher):
                run.train(lambda folder: _record_options(folder, arguments))
        except ProcessError as error:
            raise ProcessError(f"{error}\n{run.newest_state()}") from error
        except BrokenPipeError:
            raise
        except (ImageError, OSError, TrainingError) as error:
            raise TrainingError(f"{_reason(error)}\n{run.save(together=isinstance(error, TrainingError))}") from error
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            # Not saved: buffers may have changed in an incomplete step.
            raise TrainingError(
                f"{_reason(error)}\nReduce gt_size or batch_size_per_gpu, or set train.accumulate.\n"
                f"Earlier files are in experiments/{options['name']}."
            ) from error


def test(arguments: argparse.Namespace) -> None:
    """Test as the option file says; `results/` is written to the working directory.

    Args:
        arguments: `opt`, `force_yml`, `debug`, `launcher`, as `sparse-sr test` parses them.

    Raises:
        ConfigError: options are invalid; nothing was loaded or written.
        CheckpointError: weights cannot be read.
        SparseSRError: an image or the disk cannot be used.
    """
    options = _checked_options(arguments, training=False)
    _choose_weights(options["path"])
    run = _import("sparse_sr_attn_basicsr.test").test
    with distributed.process_group(arguments.launcher, options), _torch_settings():
        try:
            with distributed.peer_errors(arguments.launcher):
                run(option_file.complete(options, arguments, training=False))
        except BrokenPipeError:
            raise
        except OSError as error:
            raise SparseSRError(_reason(error)) from error
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise SparseSRError(
                f"{_reason(error)}\nSet val.tile, in pixels of the input, to use less memory."
            ) from error


def _checked_options(arguments: argparse.Namespace, *, training: bool) -> dict[str, Any]:
    """Return the options of the file, with overrides, checked."""
    options = option_file.load(arguments.opt)
    options, remarks = option_file.override(options, arguments.force_yml or ())
    try:
        register()
    except ImportError as error:
        raise SparseSRError(f"this BasicSR cannot be imported: {error}") from error
    extensions.load(options.get("custom_imports"))
    options, more = preflight.check(options, training=training, launcher=arguments.launcher)
    for remark in [*remarks, *more]:
        _LOG.warning("note: %s", remark)
    return options


def _import(module: str) -> Any:
    """Import a module that uses BasicSR's public parts.

    Raises:
        SparseSRError: this BasicSR, a fork, lacks one of them.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SparseSRError(
            f"this BasicSR lacks a part of BasicSR 1.4.2: {error}; start this fork with its own script and "
            "sparse_sr_attn_basicsr.register() (docs/basicsr.md)"
        ) from error


def _choose_weights(path: dict[str, Any]) -> None:
    """Select the averaged weights of a file, unless `param_key_g` says otherwise, and log the choice.

    Raises:
        CheckpointError: the file cannot be read.
    """
    if file := path.get("pretrain_network_g"):
        path["param_key_g"], remark = pretrained.entry_to_test(
            file, path.get("param_key_g"), given="param_key_g" in path
        )
        _LOG.warning("note: %s", remark)


@contextmanager
def _torch_settings() -> Iterator[None]:
    """Let cuDNN choose its fastest algorithms, as BasicSR does; restore PyTorch's settings on exit."""
    benchmark, deterministic = torch.backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled()
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = benchmark
        torch.use_deterministic_algorithms(deterministic)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"cannot read or write: {error}"
    if isinstance(error, MemoryError | RuntimeError):
        return " ".join(f"out of memory: {error}".partition("\n")[0].split())
    return str(error)


def _record_options(folder: Path, arguments: argparse.Namespace) -> None:
    """Copy the option file to the experiment, with the command line as its header."""
    command = ["sparse-sr train -opt", str(arguments.opt)]
    command += ["--auto_resume"] if arguments.auto_resume else []
    command += ["--debug"] if arguments.debug else []
    command += ["--force_yml", *arguments.force_yml] if arguments.force_yml else []
    file = Path(arguments.opt).expanduser()
    text = file.read_bytes()
    header = f"# {time.asctime()}\n# {' '.join(command)}\n\n".encode()
    with atomic_write(folder / file.name) as stream:  # it may be the same file, if a run is resumed with it
        stream.write(header + text)
