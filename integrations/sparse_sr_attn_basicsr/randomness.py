"""The global random numbers of Python, NumPy and PyTorch: kept, put back, set for a moment."""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """Return the state of every global generator; CUDA's too, once CUDA is in use.

    Returns:
        Numbers, strings, tuples, lists and tensors on the CPU only: `torch.load(..., weights_only=True)` reads them.
    """
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, np.asarray(keys).tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put every global generator back to where `random_state` found it; GPUs that are not there are left out."""
    name, keys, *rest = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    for device, generator in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
        torch.cuda.set_rng_state(generator, device)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Whatever is drawn inside, go on outside as if nothing had been drawn."""
    before = random_state()
    try:
        yield
    finally:
        set_random_state(before)


@contextmanager
def seeded(entropy: Sequence[int]) -> Iterator[None]:
    """Inside, the random numbers of the CPU follow from `entropy` alone; outside they go on undisturbed.

    Args:
        entropy: integers >= 0; other integers give other random numbers.
    """
    seeds = np.random.SeedSequence(entropy).generate_state(3)
    with undisturbed():
        random.seed(int(seeds[0]))
        np.random.seed(seeds[1])
        torch.default_generator.manual_seed(int(seeds[2]))
        yield
