"""`python -m benchmarks.cost`: every network is timed against its own kind, in every precision."""

from typing import Any

import pytest
import torch

from benchmarks.cost import __main__ as cost
from benchmarks.speed.timing import Sample
from sparse_sr_attn import EDSR

FAST = ["--size", "12", "--patch", "8", "--batch", "2", "--rounds", "2", "--device", "cpu"]


def small(attention: dict[str, Any] | None = None) -> EDSR:
    return EDSR(num_feat=8, num_block=2, upscale=2, img_range=1.0, attention=attention)


def test_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    networks = {"plain": (small, None), "more": (lambda: small({"type": "LCoA", "every": 1}), "plain")}
    monkeypatch.setattr(cost, "NETWORKS", networks)
    assert cost.main(FAST) == 0
    times, memory = capsys.readouterr().out.split("peak of new memory")
    lines = [line for line in times.splitlines() if line.startswith("|")]
    assert lines[0] == (
        "|  | forward, 12², float32 | forward, 12², bfloat16 | training step, 2 × 8², float32 "
        "| training step, 2 × 8², bfloat16 |"
    )
    assert [line.split("|")[1].strip() for line in lines[2:4]] == ["plain", "more"]
    assert lines[2].count(" ms |") == 4
    assert lines[3].count(")× |") == 4
    plain, more = (line for line in memory.splitlines() if line.startswith(("| plain", "| more")))
    assert plain.count(" MiB |") == 4
    assert all(float(cell.strip().removesuffix("×")) > 1 for cell in more.split("|")[2:-1])  # its weights


def test_times_and_memory_are_relative_to_the_network_without_attention() -> None:
    case = cost.Case(training=False, half=False, batch=1, side=12)
    seconds = {
        name: 0.3 if without else 0.1 * (1 + index) for index, (name, (_, without)) in enumerate(cost.NETWORKS.items())
    }
    costs = {name: {case: cost.Cost([Sample(each, 0.0)] * 3, int(each * 2**20))} for name, each in seconds.items()}
    rows = cost.record(cost.NETWORKS, costs)
    assert rows[1]["memory"][str(case)] == pytest.approx(3, rel=1e-4)
    assert rows[1]["parameters"] > rows[0]["parameters"] == 1_369_859
    table = cost.markdown(rows)
    assert [row.split("|")[2].strip() for row in table.splitlines()[2:]] == [
        "100 ms", "3.00 (3.00–3.00)×", "3.00 (3.00–3.00)×", "400 ms", *["0.75 (0.75–0.75)×"] * 4,
        "900 ms", "0.33 (0.33–0.33)×",
    ]  # fmt: skip


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_what_is_timed_runs_in_its_precision(half: bool, training: bool) -> None:
    network, seen = small(), []
    network.body[0].conv1.register_forward_hook(
        lambda _, given, output: seen.append((output.dtype, output.requires_grad))
    )
    cost.Case(training, half, batch=2, side=8).call(lambda: network, torch.device("cpu"))()
    assert seen == [(torch.bfloat16 if half else torch.float32, training)]
    assert network.training == training
    assert (network.conv_first.weight.grad is not None) == training


def test_every_network_has_the_size_of_the_one_that_it_is_compared_with() -> None:
    """All convolutions of the plain network are in the one with attention, too."""
    for name, (build, without) in cost.NETWORKS.items():
        if without is not None and not name.startswith("EDSR, "):
            plain, other = (
                sum(p.numel() for p in network.parameters() if p.ndim == 4 and p.shape[-1] == 3)
                for network in (cost.NETWORKS[without][0](), build())
            )
            assert plain <= other <= 1.2 * plain
