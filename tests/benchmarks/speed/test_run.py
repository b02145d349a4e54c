"""A whole run, small: what it finds, what it refuses, what it writes."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

from benchmarks.speed import run as bench
from benchmarks.speed.methods import LAYER_METHODS, Subject
from benchmarks.speed.report import markdown
from benchmarks.speed.run import Run, run
from benchmarks.speed.settings import Settings

SMALL = Settings(
    methods=("LCoA", "CoA", "ShiftConv2d", "plain-LCoA", "plain-CoA", "ENLA"),
    sizes=(16, 8),
    embed_dim=12,
    passes=("forward", "forward+backward"),
    chunk_size=10,
    num_clusters=6,
    rounds=3,
    shortest=0.0,
    validity=False,
)


@pytest.fixture(scope="module")
def found() -> Run:
    return run(SMALL)


def test_every_method_at_every_size_in_every_pass(found: Run) -> None:
    assert {(row.method, row.passed, row.side) for row in found.rows} == {
        (name, passed, side) for name in SMALL.methods for passed in SMALL.passes for side in SMALL.sizes
    }
    assert all(row.tokens == row.side**2 and len(row.samples) == 3 for row in found.rows)
    assert all(row.busy.q1 <= row.busy.median <= row.busy.q3 for row in found.rows)
    assert all(check.status == "correct" for check in found.checks.values())
    assert found.wrong() == []
    assert found.notes == []


def test_memory_is_in_maps(found: Run) -> None:
    rows = {(row.method, row.side): row for row in found.rows if row.passed == "forward"}
    shift = rows["ShiftConv2d", 16]
    assert shift.maps == shift.memory.peak / (4 * 12 * 16 * 16)
    assert shift.maps == 2.0  # the moved map, and the output
    assert shift.largest_maps == 1.0
    assert rows["plain-LCoA", 16].maps > rows["LCoA", 16].maps / 2 > 0


def test_speed_ups_are_of_ours_over_their_rivals(found: Run) -> None:
    pairs = {(s.ours, s.rival) for s in found.speedups}
    assert pairs == {("LCoA", "plain-LCoA"), ("LCoA", "ENLA"), ("CoA", "plain-CoA"), ("CoA", "LCoA")}
    assert len(found.speedups) == 4 * 2 * 2
    rows = {(row.method, row.passed, row.side): row for row in found.rows}
    for speedup in found.speedups:
        mine, other = (rows[name, speedup.passed, speedup.side] for name in (speedup.ours, speedup.rival))
        each = sorted(b.busy / a.busy for a, b in zip(mine.samples, other.samples, strict=True))
        assert speedup.ratio is not None
        assert speedup.ratio.median == pytest.approx(each[1])


def test_the_floor(found: Run) -> None:
    for row in found.rows:
        assert row.cost is not None
        rates = found.rates[row.passed][row.side]
        assert row.floor == pytest.approx(1000 * rates.floor(row.cost))
        assert row.share == pytest.approx(row.floor / row.busy.median)
    forward, both = (
        next(row.cost for row in found.rows if (row.method, row.passed, row.side) == ("LCoA", passed, 16))
        for passed in SMALL.passes
    )
    assert (both.flop, both.exp) == (3 * forward.flop, forward.exp)


# --- refusals ---------------------------------------------------------------------------------------------------------


def spoil(monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Have the method return what `change` makes of its input and its output."""
    method = LAYER_METHODS[name]

    def build(settings: Settings) -> Subject:
        subject = method.build(settings)
        module: Any = subject.module
        forward = module.forward
        module.forward = lambda x, *state: change(x, forward(x, *state))
        return subject

    monkeypatch.setattr(bench, "methods_of", lambda _: {**LAYER_METHODS, name: replace(method, build=build)})


@pytest.mark.parametrize("name", ["LCoA", "plain-LCoA"])
def test_no_speed_up_for_an_output_that_is_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, name, lambda x, y: x + 1.001 * (y - x))
    settings = replace(SMALL, methods=("LCoA", "plain-LCoA", "ENLA"), sizes=(8,), passes=("forward",))
    found = run(settings)
    assert found.wrong() == [name]
    given = {s.rival: s.ratio for s in found.speedups}
    assert given["plain-LCoA"] is None
    assert (given["ENLA"] is None) == (name == "LCoA")
    text = markdown(found)
    assert "| LCoA against plain-LCoA | refused |" in text
    assert "**WRONG**: its output is not what the reference returns, error 1e-03 of at most 1e-04" in text
    assert f"no speed-up is given where {name} is wrong" in text


@pytest.mark.parametrize(
    ("name", "rival", "change", "reason"),
    [
        ("ENLA", "LCoA", lambda x, y: y / (x.shape[-1] != 16), "its output is not finite"),
        ("LCoA", "plain-LCoA", lambda x, y: y + (x.shape[-1] == 16) * 0.8 * (y - x), "it differs from plain-LCoA"),
    ],
)
def test_an_output_that_is_wrong_at_the_size_that_is_timed(
    name: str, rival: str, change: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, name, change)
    found = run(replace(SMALL, methods=("LCoA", rival, name), passes=("forward",)))
    assert (found.checks[name].status, found.checks[name].reason) == ("wrong", f"at 16x16, {reason}")
    assert all(speedup.ratio is None for speedup in found.speedups)


@pytest.mark.parametrize("allowed", [1e-6, 1e6])
def test_a_stand_in_must_be_as_fast_as_its_original(allowed: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "VALID_SIDE", 16)
    method = replace(LAYER_METHODS["plain-LCoA"], author_ratio=allowed)
    monkeypatch.setattr(bench, "methods_of", lambda settings: {**LAYER_METHODS, "plain-LCoA": method})
    found = run(replace(SMALL, methods=("LCoA", "plain-LCoA", "ENLA"), sizes=(8,), passes=("forward",), validity=True))
    assert found.validity["plain-LCoA"].allowed == pytest.approx(1.1 * allowed)
    given = {s.rival: s.ratio for s in found.speedups}
    assert given["ENLA"] is not None
    assert (given["plain-LCoA"] is None) == (allowed < 1)
    assert ("**NOT VALID**" in markdown(found)) == (allowed < 1)
    assert found.as_json()["validity"]["plain-LCoA"]["valid"] == (allowed > 1)


# --- other runs -------------------------------------------------------------------------------------------------------


def test_networks() -> None:
    methods = ("ELAN-light", "plain-ELAN-light", "LCoAN-light", "plain-LCoAN-light", "plain-NLSA-LCoAN-light")
    found = run(replace(SMALL, what="networks", methods=methods, sizes=(16,), passes=("forward",), rounds=1))
    assert {row.method for row in found.rows} == set(methods)
    assert found.checks["ELAN-light"].status == "correct"
    assert {(s.ours, s.rival) for s in found.speedups} == {
        ("ELAN-light", "plain-ELAN-light"),
        ("LCoAN-light", "plain-LCoAN-light"),
        ("LCoAN-light", "plain-NLSA-LCoAN-light"),
    }


@pytest.mark.cuda
def test_on_a_gpu() -> None:
    found = run(replace(SMALL, device="cuda"))
    assert found.wrong() == []
    assert "gpu" in found.environment
    assert all(row.busy.median > 0 and row.memory.peak > 0 for row in found.rows)
