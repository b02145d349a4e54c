"""A whole run, small: what it finds, what it refuses, what it writes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.speed import run as bench
from benchmarks.speed.methods import LAYER_METHODS, NETWORK_METHODS, Method, Subject
from benchmarks.speed.report import markdown
from benchmarks.speed.run import Run, run
from benchmarks.speed.settings import Settings
from sparse_sr_attn.errors import ConfigError

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


def test_which_form_ran_is_seen(found: Run) -> None:
    (row,) = [row for row in found.rows if (row.method, row.passed, row.side) == ("LCoA", "forward", 16)]
    assert "sparse_sr_attn::cluster_attention" in row.operators
    assert all(operator.startswith("sparse_sr_attn::") for operator in row.operators)
    assert "`sparse_sr_attn::cluster_attention`" in markdown(found)


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


def test_growth_is_between_the_first_and_the_last_size(found: Run) -> None:
    assert found.exponent_sides == (8, 16)
    times = {row.side: row.busy.median for row in found.rows if (row.method, row.passed) == ("LCoA", "forward")}
    assert 4 ** found.exponents["forward"]["LCoA"] == pytest.approx(times[16] / times[8])


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


def broken(name: str) -> Method:
    """The method with an output that is wrong by a thousandth of what attention adds."""
    method = LAYER_METHODS[name]

    def build(settings: Settings) -> Subject:
        subject = method.build(settings)
        module: Any = subject.module
        forward = module.forward
        module.forward = lambda x, *state: x + 1.001 * (forward(x, *state) - x)
        return subject

    return replace(method, build=build)


def cell(text: str, row: str) -> str:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {row} |")]
    return line


@pytest.mark.parametrize("name", ["LCoA", "plain-LCoA"])
def test_no_speed_up_for_an_output_that_is_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "methods_of", lambda settings: {**LAYER_METHODS, name: broken(name)})
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


def test_an_output_that_is_wrong_at_the_size_that_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(settings: Settings) -> Subject:
        subject = LAYER_METHODS["ENLA"].build(settings)
        module: Any = subject.module
        forward = module.forward
        module.forward = lambda x: forward(x) / (x.shape[-1] != 16)  # inf at 16x16
        return subject

    monkeypatch.setattr(
        bench, "methods_of", lambda settings: {**LAYER_METHODS, "ENLA": replace(LAYER_METHODS["ENLA"], build=build)}
    )
    found = run(replace(SMALL, methods=("LCoA", "ENLA"), passes=("forward",)))
    assert found.checks["ENLA"].status == "wrong"
    assert found.checks["ENLA"].reason == "at 16x16, its output is not finite"
    assert all(speedup.ratio is None for speedup in found.speedups)


def test_a_wrong_number_at_the_size_that_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(settings: Settings) -> Subject:
        subject = LAYER_METHODS["LCoA"].build(settings)
        module: Any = subject.module
        forward = module.forward
        module.forward = lambda x: forward(x) + (x.shape[-1] == 16) * 0.8 * (forward(x) - x)
        return subject

    wrong = replace(LAYER_METHODS["LCoA"], build=build)
    monkeypatch.setattr(bench, "methods_of", lambda settings: {**LAYER_METHODS, "LCoA": wrong})
    found = run(replace(SMALL, methods=("LCoA", "plain-LCoA"), passes=("forward",)))
    assert found.checks["LCoA"].status == "wrong"
    assert found.checks["LCoA"].reason == "at 16x16, it differs from plain-LCoA"
    assert found.checks["LCoA"].error == pytest.approx(0.8, abs=0.1)
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


def test_stacks_are_as_valid_as_what_they_are_made_of() -> None:
    for methods in (LAYER_METHODS, NETWORK_METHODS):
        for name, method in methods.items():
            assert set(method.valid_as) <= {n for n, m in LAYER_METHODS.items() if m.author_ratio}, name
            assert set(method.rivals) <= set(methods), name
            assert method.kind != "ours" or name == "LCoA-x10" or method.rivals, name


def test_what_takes_too_long_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(replace(SMALL, methods=("ShiftConv2d", "ENLA"), passes=("forward",), limit=1e-9))
    assert found.rows == []
    assert len(found.notes) == 2
    assert "ENLA would take longer than 1e-09 s at 8x8 (forward)" in found.notes[1]
    assert "| ENLA | – | – | – |" in markdown(found)


def test_what_will_take_too_long_is_not_even_tried(found: Run) -> None:
    first, last = (
        replace(row, side=side, busy=replace(row.busy, median=ms))
        for row, side, ms in zip(found.rows, (10, 20), (100.0, 1600.0), strict=False)
    )
    rows = [replace(row, method="ENLA", passed="forward") for row in (first, last)]
    assert bench._expected(replace(found, rows=rows), "ENLA", "forward", 40) == pytest.approx(25.6)
    assert bench._expected(replace(found, rows=rows[:1]), "ENLA", "forward", 40) == 0


def test_a_stand_in_that_fails_at_a_size_is_a_note() -> None:
    found = run(replace(SMALL, methods=("GMSA", "plain-GMSA"), sizes=(16, 24), passes=("forward",)))
    assert {(row.method, row.side) for row in found.rows} == {("GMSA", 16), ("GMSA", 24), ("plain-GMSA", 16)}
    assert found.notes[0].startswith("plain-GMSA fails at 24x24 (forward): ")


def test_code_from_outside(tmp_path: Path) -> None:
    """It may need whole windows, and is compared with its namesake of ours."""
    (tmp_path / "windows.py").write_text("""
from torch import nn

class GMSA(nn.Module):
    def forward(self, x):
        return nn.functional.pixel_shuffle(nn.functional.pixel_unshuffle(x, 16), 16)

class Windows(GMSA):
    pass
""")
    peers = tuple(f"{tmp_path}/windows.py:{name}" for name in ("GMSA", "Windows"))
    methods = ("GMSA", "ShiftConv2d")
    found = run(replace(SMALL, methods=methods, sizes=(16, 24), passes=("forward",), peers=peers))
    assert [row.side for row in found.rows if row.method == "windows.GMSA"] == [16]
    assert found.notes[0].startswith("windows.GMSA fails at 24x24 (forward): ")
    assert {(speedup.ours, speedup.rival) for speedup in found.speedups} == {
        ("GMSA", "windows.GMSA"),
        ("GMSA", "windows.Windows"),
        ("ShiftConv2d", "windows.Windows"),
    }


def test_unknown_methods_are_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="no method named 'LCoB'; did you mean 'LCoA'"):
        run(replace(SMALL, methods=("LCoB",)))


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


@pytest.mark.slow
@pytest.mark.unhooked
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own, when it compiles
def test_compiled() -> None:
    found = run(replace(SMALL, methods=("LCoA",), sizes=(8,), passes=("forward",), rounds=1, compile=True))
    assert found.checks["LCoA compiled"].status == "correct"
    assert [row.method for row in found.rows] == ["LCoA", "LCoA compiled"]
    assert [(s.ours, s.rival) for s in found.speedups] == [("LCoA compiled", "LCoA")]


def test_ten_layers() -> None:
    methods = ("LCoA-x10", "plain-LCoA-x10", "plain-NLSA-x10")
    found = run(replace(SMALL, methods=methods, sizes=(16,), passes=("forward",), rounds=1))
    assert {row.method for row in found.rows} == set(methods)
    assert [s.rival for s in found.speedups] == ["plain-NLSA-x10", "plain-LCoA-x10"]


def test_layers_that_others_register_can_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.speed import methods
    from sparse_sr_attn.layers.base import AttentionLayer
    from sparse_sr_attn.registry import Registry

    other: Registry[AttentionLayer] = Registry("layer")

    @other.register("Mine", kind="layer", source="nobody, 2026")
    class Mine(AttentionLayer):
        def __init__(self, embed_dim: int) -> None:
            super().__init__()

        def forward(self, x: Tensor, state: object = None) -> Tensor:
            return x + 1

    monkeypatch.setattr(methods, "LAYERS", other)
    monkeypatch.setattr(methods, "build_layer", lambda name, embed_dim: other.get(name).build(embed_dim))
    found = run(replace(SMALL, methods=("Mine",), sizes=(8,), passes=("forward",)))
    assert found.checks["Mine"].status == "not checked"
    assert len(found.rows) == 1


def test_features_are_uneven_and_normalised() -> None:
    x = bench.features(2, 12, 32)
    assert x.shape == (2, 12, 32, 32)
    assert x.std().item() == pytest.approx(1.0)
    assert torch.equal(x, bench.features(2, 12, 32))
    neighbours = (x[..., 1:] * x[..., :-1]).mean().item()
    assert neighbours > 0.5  # as in natural images


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    run(replace(SMALL, methods=("ShiftConv2d",), sizes=(8,), passes=("forward",), threads=2))
    assert torch.get_num_threads() == before


@pytest.mark.cuda
def test_on_a_gpu() -> None:
    found = run(replace(SMALL, device="cuda"))
    assert found.wrong() == []
    assert "gpu" in found.environment
    assert all(row.busy.median > 0 and row.memory.peak > 0 for row in found.rows)
