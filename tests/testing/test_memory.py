"""New memory of a call, on cases that can be counted by hand."""

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_sr_attn.testing.memory import NewMemory, in_maps, new_memory


def test_a_case_counted_by_hand() -> None:
    def call() -> Tensor:
        first = torch.empty(1000)  # 4000 bytes held
        second = torch.empty(3000, dtype=torch.float64)  # 28,000
        del first  # 24,000
        third = torch.empty(700, dtype=torch.uint8)  # 24,700
        del second  # 700
        fourth = torch.empty(2500)  # 10,700
        del third
        return fourth

    assert new_memory(call) == NewMemory(peak=28_000, kept=10_000, largest=24_000)


def test_what_an_earlier_measurement_has_seen_is_not_counted_either() -> None:
    kept: list[Tensor] = []
    assert new_memory(lambda: kept.append(torch.empty(5000))) == NewMemory(peak=20_000, kept=20_000, largest=20_000)

    def call() -> Tensor:
        kept.clear()
        return torch.empty(100)

    assert new_memory(call) == NewMemory(peak=400, kept=400, largest=400)


def test_what_is_kept_counts_until_the_end() -> None:
    cache: list[Tensor] = []

    def call() -> None:
        for _ in range(3):
            cache.append(torch.empty(250))  # noqa: PERF401  three allocations, one after the other

    assert new_memory(call) == NewMemory(peak=3000, kept=3000, largest=1000)


def test_backward_counts() -> None:
    x = torch.rand(100, requires_grad=True)
    probe = torch.ones(100)

    def call() -> None:
        F.relu(x).backward(probe)

    memory = new_memory(call)
    assert memory.kept == 400  # the gradient
    assert memory.peak >= 800  # the result, which the backward reads, and the gradient


def test_in_maps() -> None:
    assert in_maps(2 * 3 * 5 * 7 * 4 * 6, torch.empty(2, 3, 5, 7)) == 6.0
    assert in_maps(420, torch.empty(1, 3, 5, 7, dtype=torch.bfloat16)) == 1.0  # the map is of float32, whatever x is
