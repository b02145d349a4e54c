"""The memory that a call allocates: every allocation of torch, as recorded by its profiler.

Memory that libraries allocate without torch's allocator is not included. Figures do not depend on the load of the
machine, so tests may assert them:

    x = torch.rand(1, 64, 128, 128)
    assert in_maps(new_memory(lambda: layer(x)).peak, x) <= 3.5
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

if TYPE_CHECKING:
    from torch._C._profiler import _ProfilerEvent as _Event


@dataclass(frozen=True)
class NewMemory:
    """The memory of a call in bytes.

    Attributes:
        peak: peak memory beyond what was allocated before, including the result.
        kept: memory still allocated on return: the result, a graph, gradients, caches.
        largest: the largest single allocation, that of the largest tensor.
        operators: names of the torch operators that ran, each once.
    """

    peak: int
    kept: int
    largest: int
    operators: tuple[str, ...] = field(default=(), compare=False)


def new_memory(call: Callable[[], object], device: torch.device | str = "cpu") -> NewMemory:
    """Measure the memory that `call` allocates on a device.

    Args:
        call: function to run once. Caches of a first call count; to exclude them, call it before.
        device: device whose memory is counted.

    Note:
        On the CPU, figures are exact; freeing earlier memory is not counted. A GPU rounds allocations up to 512 bytes,
        and its first matrix product allocates a permanent workspace.
    """
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    with profile(activities=activities, profile_memory=True) as seen:
        result = call()
        if on_gpu:
            torch.cuda.synchronize(device)
    recorded: Any = seen.profiler
    events = list(_flat(recorded.kineto_results.experimental_event_tree()))
    memory = replace(_walked(_allocations(events, device)), operators=_operators(events))
    if on_gpu:
        peak = torch.cuda.max_memory_allocated(device) - before
        memory = replace(memory, peak=peak, kept=torch.cuda.memory_allocated(device) - before)
    del result  # not before: what is returned counts
    return memory


def in_maps(num_bytes: int, x: Tensor) -> float:
    """Convert bytes to feature maps; one is as many float32 numbers as `x` has elements."""
    return num_bytes / (4 * x.numel())


def _allocations(events: "list[_Event]", device: torch.device) -> list[tuple[int, int]]:
    """Return (address, bytes) of each allocation and (address, -bytes) of each deallocation, in order."""
    found = [
        (event.start_time_ns, fields.ptr, fields.alloc_size)
        for event in events
        if isinstance(fields := event.extra_fields, torch._C._profiler._ExtraFields_Allocation)
        and fields.device.type == device.type
    ]
    return [(address, size) for _, address, size in sorted(found, key=lambda item: item[0])]


def _operators(events: "list[_Event]") -> tuple[str, ...]:
    operator = torch._C._profiler._EventType.TorchOp
    return tuple(sorted({event.name for event in events if event.tag == operator}))


def _flat(events: "list[_Event]") -> "Iterator[_Event]":
    waiting = list(events)
    while waiting:
        event = waiting.pop()
        yield event
        waiting += event.children


def _walked(allocations: list[tuple[int, int]]) -> NewMemory:
    held: dict[int, int] = {}
    now = peak = largest = 0
    for address, size in allocations:
        if size > 0:
            held[address] = size
            now += size
            peak, largest = max(peak, now), max(largest, size)
        else:
            now -= held.pop(address, 0)  # 0: of what was there before
    return NewMemory(peak, now, largest)
