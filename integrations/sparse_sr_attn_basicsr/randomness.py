"""Save, restore and temporarily seed the global random states of Python, NumPy and PyTorch."""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """Return the state of every global generator, CUDA's once it is in use, such that `torch.load` reads it as data."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, np.asarray(keys).tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restore every global generator to a state from `random_state`; missing GPUs are skipped."""
    name, keys, *rest = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    for device, generator in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
        torch.cuda.set_rng_state(generator, device)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Restore all global random states on exit."""
    before = random_state()
    try:
        yield
    finally:
        set_random_state(before)


@contextmanager
def seeded(entropy: Sequence[int]) -> Iterator[None]:
    """Seed the random numbers of the CPU from integers >= 0, and restore all random states on exit."""
    seeds = np.random.SeedSequence(entropy).generate_state(3)
    with undisturbed():
        random.seed(int(seeds[0]))
        np.random.seed(seeds[1])
        torch.default_generator.manual_seed(int(seeds[2]))
        yield
