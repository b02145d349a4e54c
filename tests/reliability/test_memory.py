"""How much memory sparse attention takes, counted by PyTorch's profiler, allocation by allocation."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from sparse_sr_attn import LCoA

SIDE, CHANNELS = 256, 64
MAP = 4 * CHANNELS * SIDE**2


def allocated(call: Callable[[], object], folder: Path) -> tuple[int, int]:
    """Return the peak of what a call holds at once, and its largest tensor, in bytes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    file = folder / "trace.json"
    profiler.export_chrome_trace(str(file))
    events = [event["args"] for event in json.loads(file.read_text())["traceEvents"] if event["name"] == "[memory]"]
    held, peak = 0, 0
    for event in events:
        held += event["Bytes"]
        peak = max(peak, held)
    return peak, max(event["Bytes"] for event in events)


def test_the_count_counts(tmp_path: Path) -> None:
    def call() -> None:
        first = torch.ones(1000)
        second = first + 1
        del first
        torch.ones(500) + second[:500]

    peak, largest = allocated(call, tmp_path)
    assert largest == 4000
    assert 8000 <= peak <= 8200


def test_a_layer_alone_stores_no_weights(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """At 256x256x64: at most 8 feature maps at once, and no tensor as large as the weights, 4 * N * 3w bytes."""
    layer = LCoA(CHANNELS).eval()
    x = torch.rand(1, CHANNELS, SIDE, SIDE)
    with torch.no_grad():
        peak, largest = allocated(lambda: layer(x), tmp_path)
    weights = 4 * SIDE**2 * 3 * layer.lsp.chunk_size
    record_property("feature maps", peak / MAP)
    record_property("largest tensor over weights", largest / weights)
    assert peak <= 8 * MAP
    assert largest < weights
