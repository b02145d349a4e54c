"""What a run has found, as a table, a plot and a file."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.speed.run import Row, Run
from benchmarks.speed.settings import Pass
from benchmarks.speed.timing import Spread
from sparse_sr_attn.cli.common import table
from sparse_sr_attn.data.atomic import atomic_write


def markdown(found: Run) -> str:
    """Return all tables of a run."""
    return "\n\n".join([_where(found), _method_table(found), *_passes(found), *_notes(found)])


def write_markdown(found: Run, path: Path) -> None:
    """Write all tables of a run into a file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as unfinished:
        unfinished.write(markdown(found).encode() + b"\n")


def write_json(documents: Sequence[dict[str, Any]], path: Path) -> None:
    """Write runs (`Run.as_json`) into a file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as unfinished:
        unfinished.write(json.dumps({"runs": documents}, indent=1, default=str).encode() + b"\n")


def write_plot(found: Run, path: Path) -> None:
    """Draw time and memory against size, both logarithmic, with the floors of our methods; needs matplotlib."""
    from matplotlib.figure import Figure  # noqa: PLC0415  an extra

    passes, sides = found.settings.passes, sorted(found.settings.sizes)
    figure = Figure(figsize=(13, 5.5 * len(passes)), layout="constrained")
    axes = figure.subplots(len(passes), 2, squeeze=False)
    for (time, memory), passed in zip(axes, passes, strict=True):
        for index, name in enumerate(found.kinds):
            _draw(time, memory, _rows(found, passed, name), index, found.kinds[name])
        for axis, label in ((time, _clock(found)), (memory, "peak new memory (MiB)")):
            axis.set(xscale="log", yscale="log", xlabel="side (pixels)", ylabel=label, title=passed)
            axis.set_xticks(sides, [str(side) for side in sides])
            axis.set_xticks([], minor=True)
            axis.grid(alpha=0.3)
        memory.plot([], [], color="black", linestyle=":", label="floor of ours")
    figure.legend(*axes[0, 1].get_legend_handles_labels(), loc="outside right center", fontsize="small")
    environment = found.environment
    figure.suptitle(
        f"{environment.get('gpu', environment['processor'])}; threads: {environment['threads']}, "
        f"torch {environment['torch']}, {found.settings.dtype}, {environment['date']}"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as unfinished:
        figure.savefig(unfinished, dpi=110, format="png")


_STYLES: dict[str, dict[str, Any]] = {
    "ours": {"linewidth": 2.5},
    "peer": {"linewidth": 1.0},
    "stand-in": {"linewidth": 1.0, "linestyle": "--"},
    "outside": {"linewidth": 2.0, "linestyle": "-."},
}


def _draw(time: Any, memory: Any, rows: list[Row], index: int, kind: str) -> None:
    if not rows:
        return
    sides, color = [row.side for row in rows], f"C{index % 10}"
    style = {"color": color, "marker": "o^s"[index // 10 % 3], "markersize": 4, **_STYLES[kind]}
    time.plot(sides, [row.busy.median for row in rows], **style)
    memory.plot(sides, [row.memory.peak / 2**20 for row in rows], label=rows[0].method, **style)
    floors = [row.floor for row in rows if row.floor is not None]
    if floors and kind == "ours":
        time.plot(sides, floors, color=color, linestyle=":")


# --- tables -----------------------------------------------------------------------------------------------------------


def _where(found: Run) -> str:
    settings = found.settings
    size = (
        f"images for x{settings.upscale}" if settings.what == "networks" else f"maps of {settings.embed_dim} channels"
    )
    chunks = (
        f"; chunk {settings.chunk_size}, {settings.num_clusters} clusters, query dim {settings.query_dim}"
        if settings.what == "layers"
        else ""
    )
    layout = ", channels last" if settings.channels_last else ""
    lines = [f"- {name}: {value}" for name, value in found.environment.items()]
    lines += [
        f"- {settings.batch} x {size}{chunks}; {settings.dtype}{layout} on {settings.device}; "
        f"medians of {settings.rounds} alternating rounds (quartiles in brackets)",
        f"- rates of the floor, in a second of {_clock(found, short=True)}, medians over sizes: "
        f"{_rate(found, 'flop'):.0f} GFLOP ({_rate(found, 'half_flop'):.0f} of bfloat16), "
        f"{_rate(found, 'exp'):.2f} G exponentials, {_rate(found, 'bytes'):.1f} GB read and written",
    ]
    return "\n".join(lines)


def _rate(found: Run, name: str) -> float:
    """Return a rate in billions a second."""
    each = [getattr(rates, name) for by_side in found.rates.values() for rates in by_side.values()]
    return Spread.of(each).median / 1e9


def _clock(found: Run, *, short: bool = False) -> str:
    name = "GPU time" if found.settings.device.startswith("cuda") else "process time"
    return name if short else f"{name} (ms)"


def _method_table(found: Run) -> str:
    body = []
    for name, kind in found.kinds.items():
        check = found.checks[name]
        error = "" if check.error is None else f", error {check.error:.0e} of at most {check.allowed:.0e}"
        reason = f": {check.reason}" if check.reason else ""
        status = f"**WRONG**{reason}{error}" if check.status == "wrong" else f"{check.status}{reason}{error}"
        ran = sorted({operator for row in found.rows if row.method == name for operator in row.operators})
        body.append([name, kind, status, _valid(found, name, kind), ", ".join(f"`{one}`" for one in ran) or "–"])
    return table(["method", "is", "output", "stand-in: time over dense SDPA at 96²", "operators that ran"], body)


def _valid(found: Run, name: str, kind: str) -> str:
    validity = found.validity.get(name)
    if validity is not None:
        word = "valid" if validity.valid else "**NOT VALID**"
        return f"{word}: {validity.ratio:.3f}, at most {validity.allowed:.3f}"
    return "not checked" if kind == "stand-in" else "–"


def _passes(found: Run) -> Iterator[str]:
    for passed in found.settings.passes:
        sides = sorted(found.settings.sizes)
        heads = [f"{side}²" for side in sides]
        growth = found.exponents.get(passed, {})
        ends = "" if found.exponent_sides is None else "growth {}² to {}²".format(*found.exponent_sides)
        times, walls, maps, shares = [], [], [], []
        for name in found.kinds:
            by_side = {row.side: row for row in _rows(found, passed, name)}
            rows = [by_side.get(side) for side in sides]
            times.append([name, *_cells(rows, lambda r: _spread(r.busy)), _number(growth.get(name))])
            walls.append([name, *_cells(rows, lambda r: _figures(r.wall.median))])
            maps.append([name, *_cells(rows, lambda r: f"{r.maps:.2f} ({r.largest_maps:.2f})")])
            if any(row and row.share for row in rows):
                shares.append([name, *_cells(rows, lambda r: f"{r.share:.0%}, {_figures(r.floor or 0)}")])
        yield f"### {passed}: {_clock(found)}\n\n" + table(["", *heads, ends], times)
        if speedups := _speedups(found, passed, sides):
            yield f"### {passed}: how many times longer the other takes\n\n" + table(["", *heads], speedups)
        unit = "input images" if found.settings.what == "networks" else "feature maps"
        yield f"### {passed}: peak new memory in {unit} (largest tensor)\n\n" + table(["", *heads], maps)
        if shares:
            yield f"### {passed}: share of the floor reached, and the floor in ms\n\n" + table(["", *heads], shares)
        yield f"### {passed}: by the clock (ms)\n\n" + table(["", *heads], walls)


def _speedups(found: Run, passed: Pass, sides: Sequence[int]) -> list[list[str]]:
    pairs: dict[tuple[str, str], dict[int, str]] = {}
    for speedup in found.speedups:
        if speedup.passed == passed:
            cell = "refused" if speedup.ratio is None else f"{_spread(speedup.ratio)}×"
            pairs.setdefault((speedup.ours, speedup.rival), {})[speedup.side] = cell
    return [
        [f"{ours} against {rival}", *(cells.get(side, "–") for side in sides)] for (ours, rival), cells in pairs.items()
    ]


def _notes(found: Run) -> list[str]:
    reasons = dict.fromkeys(f"no speed-up is given where {s.refused}" for s in found.speedups if s.refused)
    lines = [f"- {note}" for note in [*found.notes, *reasons]]
    return ["### Notes\n\n" + "\n".join(lines)] if lines else []


def _rows(found: Run, passed: Pass, name: str) -> list[Row]:
    return [row for row in found.rows if row.method == name and row.passed == passed]


def _cells(rows: Sequence[Row | None], show: Callable[[Row], str]) -> list[str]:
    return ["–" if row is None else show(row) for row in rows]


def _spread(spread: Spread) -> str:
    return f"{_figures(spread.median)} ({_figures(spread.q1)}–{_figures(spread.q3)})"


def _figures(number: float) -> str:
    """Return a number with three figures, never as a power of ten."""
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def _number(number: float | None) -> str:
    return "–" if number is None else f"{number:.2f}"
