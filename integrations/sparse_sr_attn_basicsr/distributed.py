"""Training in several processes, also on the CPU, and a clear error when one of them ends."""

import importlib
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sparse_sr_attn.errors import ProcessError


def on_cpu(options: Mapping[str, Any]) -> bool:
    """Return whether these options run on the CPU."""
    return options.get("num_gpu") == 0 or not torch.cuda.is_available()


@contextmanager
def process_group(launcher: str, options: Mapping[str, Any]) -> Iterator[None]:
    """Initialise the process group of the launcher: with gloo on the CPU, else with `dist_params.backend`.

    Args:
        launcher: `none` (one process), `pytorch` or `slurm`.
        options: of the option file. BasicSR reads `dist_params` for slurm only.
    """
    if launcher == "none":
        yield
        return
    if on_cpu(options):
        if mp.get_start_method(allow_none=True) is None:
            mp.set_start_method("spawn")  # as BasicSR does: communication threads do not survive a fork
        dist.init_process_group("gloo")
    else:
        given = options.get("dist_params") or {}
        port = {"port": given.get("port")} if launcher == "slurm" else {}
        init_dist = importlib.import_module("basicsr.utils.dist_util").init_dist
        init_dist(launcher, backend=given.get("backend") or "nccl", **port)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def peer_errors(launcher: str) -> Iterator[None]:
    """Raise `ProcessError` when another process ends, or when the launcher ends this one (SIGTERM).

    The signal is ignored from then on, because it may arrive while this process reports the error.

    Raises:
        ProcessError: another process ended or did not answer in time, or this one received SIGTERM.
    """
    if launcher == "none":
        yield
        return

    def stop(number: int, _: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise ProcessError(
            f"{_who()}: received {signal.Signals(number).name}, which torchrun sends when another process ends"
        )

    in_main = threading.current_thread() is threading.main_thread()
    after = signal.signal(signal.SIGTERM, stop) if in_main else None
    try:
        yield
    except ProcessError:
        after = signal.SIG_IGN
        raise
    except RuntimeError as error:
        if not _from_another_process(error):
            raise
        after = signal.SIG_IGN
        raise ProcessError(
            f"{_who()}: another process of this run ended, or did not answer in time; see its own message ({error})"
        ) from error
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, after)


def _from_another_process(error: RuntimeError) -> bool:
    # gloo has no error class of its own, but its messages name its source file.
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def _who() -> str:
    return f"process {os.environ.get('RANK', '?')} of {os.environ.get('WORLD_SIZE', '?')}"
