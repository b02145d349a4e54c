"""Several processes: on the CPU, which BasicSR does not know, and what is said when one of them is gone."""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sparse_sr_attn.errors import ProcessError


def on_cpu(options: Mapping[str, Any]) -> bool:
    """Return whether what the options say runs on the CPU."""
    return options.get("num_gpu") == 0 or not torch.cuda.is_available()


def initialiser(theirs: Callable[..., None], options: Mapping[str, Any]) -> Callable[..., None]:
    """Return what stands in for `theirs`, BasicSR's `init_dist`: gloo on the CPU, else `dist_params.backend`.

    BasicSR reads `dist_params` for slurm only, and takes a GPU in any case.
    """
    backend = (options.get("dist_params") or {}).get("backend") or "nccl"

    def init_dist(launcher: str, **given: Any) -> None:
        if not on_cpu(options):
            theirs(launcher, **{"backend": backend, **given})
            return
        if mp.get_start_method(allow_none=True) is None:
            mp.set_start_method("spawn")  # as BasicSR does: threads that talk to other processes do not survive a fork
        dist.init_process_group("gloo")

    return init_dist


@contextmanager
def together() -> Iterator[None]:
    """Have the end of another process, and the signal by which a launcher then ends this one, raise `ProcessError`.

    After that the signal is ignored: it may come while this process still says what happened, and then it ends anyway.

    Raises:
        ProcessError: another process ended or did not answer in time, or this one was told to end.
    """

    def stop(number: int, _: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise ProcessError(f"{_who()}: told to end ({signal.Signals(number).name}), as torchrun does when one ends")

    in_main = threading.current_thread() is threading.main_thread()
    after = signal.signal(signal.SIGTERM, stop) if in_main else None
    try:
        yield
    except (RuntimeError, ProcessError) as error:
        if isinstance(error, RuntimeError) and not _from_another_process(error):
            raise
        after = signal.SIG_IGN
        if isinstance(error, ProcessError):
            raise
        raise ProcessError(
            f"{_who()}: another process of this run ended, or did not answer in time; see what it says itself ({error})"
        ) from error
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, after)


def _from_another_process(error: RuntimeError) -> bool:
    # gloo has no class for its errors, but names its source file in them.
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def _who() -> str:
    return f"process {os.environ.get('RANK', '?')} of {os.environ.get('WORLD_SIZE', '?')}"
