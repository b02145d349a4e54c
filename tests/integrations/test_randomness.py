"""Global random numbers, kept and put back."""

import random
from pathlib import Path

import numpy as np
import torch

from sparse_sr_attn_basicsr.randomness import random_state, seeded, set_random_state, undisturbed


def test_random_numbers_go_on_where_they_were(tmp_path: Path) -> None:
    def draw() -> list[float]:
        return [
            random.random(),  # noqa: S311
            float(np.random.rand()),
            float(np.random.randn()),
            float(torch.rand(())),
            random.gauss(),
        ]

    draw()
    torch.save(random_state(), tmp_path / "state")
    expected = draw()
    with undisturbed():
        draw()
    with seeded([1]):
        one = draw()
    later = draw()
    with seeded([1]):
        assert draw() == one
    set_random_state(torch.load(tmp_path / "state", weights_only=True))
    assert draw() == expected
    assert draw() == later
