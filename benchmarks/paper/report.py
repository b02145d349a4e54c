"""What an experiment has found, as tables and plots, and as sections of a page."""

import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.paper.cost import PASSES, growth
from benchmarks.paper.experiment import described
from benchmarks.paper.figures import Figure
from benchmarks.paper.training import Budget
from benchmarks.speed.timing import Spread
from sparse_sr_attn.cli.common import table
from sparse_sr_attn.data.atomic import atomic_write
from sparse_sr_attn.errors import SparseSRError

_NAMES = {"forward": "inference", "forward+backward": "training step"}
_MIB = 2**20
_STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
"""Standard errors beyond which the mean of 2, 3, ... numbers of mean 0 lies in 5 of 100 cases (Student's t)."""


def markdown(figure: Figure, document: Mapping[str, Any]) -> str:
    """Return what was found in tables and sentences."""
    parts = [figure.question]
    if "results" in document:
        parts.append(_budget(document))
        parts.append(_overlap_table(document) if figure.kind == "overlap" else _quality_table(figure, document))
    if "passes" in document and figure.kind != "overlap":
        parts += [_cost_line(figure, document), *(_growth_tables(figure, document) if figure.kind == "growth" else [])]
    if "results" in document and figure.kind == "quality":
        parts.append(_told_apart(figure, document))
    return "\n\n".join([*parts, *([figure.caution] if figure.caution else [])])


def section(figure: Figure, label: str, document: Mapping[str, Any]) -> str:
    """Return what a page says of a figure: tables, sentences, and the plot that lies in its folder assets/."""
    return f"{markdown(figure, document)}\n\n![{figure.title}](assets/paper-{label}.png)"


def differences(document: Mapping[str, Any], name: str, baseline: str) -> list[float]:
    """Return by how much a network is better than the baseline, in dB, seed by seed."""
    results = document["results"]
    return [results[name][seed]["psnr"] - results[baseline][seed]["psnr"] for seed in results[name]]


def stands_out(numbers: Sequence[float]) -> bool:
    """Return whether the mean of some differences is further from 0 than chance brings it in 19 of 20 cases."""
    if len(numbers) < 2:
        return False
    quantile = _STUDENT[min(len(numbers) - 2, len(_STUDENT) - 1)]
    return bool(abs(statistics.mean(numbers)) > quantile * statistics.stdev(numbers) / len(numbers) ** 0.5)


def fill(page: str, name: str, text: str) -> str:
    """Return a page with `text` between the marks `<!-- paper NAME -->` and `<!-- end NAME -->`.

    Raises:
        SparseSRError: the page has not exactly one such pair of marks.
    """
    marks = re.compile(rf"(<!-- paper {re.escape(name)} -->\n).*?(<!-- end {re.escape(name)} -->)", re.DOTALL)
    if len(marks.findall(page)) != 1:
        raise SparseSRError(f"the page must have one `<!-- paper {name} -->` and after it `<!-- end {name} -->`")
    inside = f"\n{text}\n\n" if text else ""
    return marks.sub(lambda found: f"{found[1]}{inside}{found[2]}", page)


# --- tables -----------------------------------------------------------------------------------------------------------


def _budget(document: Mapping[str, Any]) -> str:
    number, seeds = document["pictures"], len(document["seeds"])
    return (
        f"{described(Budget(**document['budget']))}; {number['train']} training and {number['validation']} validation "
        f"images; {seeds} {'seed' if seeds == 1 else 'seeds'}, with the same initial weights, patches and steps."
    )


def _quality_table(figure: Figure, document: Mapping[str, Any]) -> str:
    head = ["network", "PSNR (dB)", f"against “{figure.baseline}”"]
    measured = _at_one_size(document)
    head += ["parameters"] if "parameters" in document else []
    head += [f"{_NAMES[passed]}" for passed in measured]
    body = [["bicubic interpolation", f"{document['bicubic']:.2f}", *[""] * (len(head) - 2)]]
    for name, by_seed in document["results"].items():
        row = [name, _mean([one["psnr"] for one in by_seed.values()])]
        row.append("–" if name == figure.baseline else _mean(differences(document, name, figure.baseline), sign=True))
        row += [f"{document['parameters'][name]:,}"] if "parameters" in document else []
        row += [_cost(costs.get(name)) for costs in measured.values()]
        body.append(row)
    return table(head, body)


def _told_apart(figure: Figure, document: Mapping[str, Any]) -> str:
    others = [name for name in document["results"] if name != figure.baseline]
    clear = [name for name in others if stands_out(differences(document, name, figure.baseline))]
    if len(document["seeds"]) < 2:
        return "With one seed, no difference can be called significant."
    listed = "; ".join(clear) if clear else "none"
    return (
        f"± is the standard deviation over seeds, of the PSNR and of its difference with the same seed. Significantly "
        f"different from “{figure.baseline}” (Student's t of the differences, 5 %): {listed}. More seeds would detect "
        "smaller differences."
    )


def _cost_line(figure: Figure, document: Mapping[str, Any]) -> str:
    where = document["environment"]
    machine = where.get("gpu", where["processor"])
    sizes = []
    for passed, by_side in document["passes"].items():
        sides = "/".join(f"{side}²" for side in by_side)
        batch = next(iter(by_side.values()))["batch"]
        what = "a map" if figure.kind == "growth" else "an image" if batch == 1 else f"{batch} images"
        sizes.append(f"{_NAMES[passed]} on {what} of {sides} pixels")
    return (
        f"Costs: {', '.join(sizes)}; process time as the median of alternating rounds (quartiles in brackets), if "
        f"measured, and peak new memory. {machine}, threads: {where['threads']}, torch {where['torch']}, "
        f"{where['date']}."
    )


def _growth_tables(figure: Figure, document: Mapping[str, Any]) -> list[str]:
    found = []
    for passed in PASSES:
        by_side = document["passes"][passed]
        for what, unit in (("milliseconds", "ms"), ("bytes", "MiB")):
            rows = []
            for name in figure.variants:
                values = _series(by_side, name, what)
                if values:
                    cells = [_figures(values[int(s)]) if int(s) in values else "skipped" for s in by_side]
                    power = f"{growth(values):.2f}" if len(values) > 1 else "–"
                    rows.append([name, *cells, power])
            if rows:
                heads = [f"{_NAMES[passed]}, {unit}", *(f"{side}²" for side in by_side), "growth"]
                found.append(table(heads, rows))
    return [
        *found,
        "Growth is the exponent of a cost as a power of the number of pixels, from the first to the last size.",
    ]


def _overlap_table(document: Mapping[str, Any]) -> str:
    same, other = _overlaps(document)
    layers = range(len(same))
    rows = []
    for apart in layers[1:]:
        pairs = [(a, a + apart) for a in layers if a + apart < len(same)]
        means = (statistics.mean(matrix[a][b] for a, b in pairs) for matrix in (same, other))
        rows.append([str(apart), *(f"{mean:.3f}" for mean in means)])
    return table(["layers apart", "overlap", "with another image's attention"], rows)


def _overlaps(document: Mapping[str, Any]) -> tuple[list[list[float]], list[list[float]]]:
    """Return the overlap of layers and that with another picture's, means over seeds."""
    (by_seed,) = document["results"].values()
    seen = [one["seen"] for one in by_seed.values()]
    size = range(len(seen[0]["same"]))
    same, other = (
        [[sum(one[what][a][b] for one in seen) / len(seen) for b in size] for a in size] for what in ("same", "other")
    )
    return same, other


def _at_one_size(document: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the costs of each pass, by name."""
    return {passed: next(iter(by_side.values()))["costs"] for passed, by_side in document.get("passes", {}).items()}


def _series(by_side: Mapping[str, Any], name: str, what: str) -> dict[int, float]:
    """Return a cost by side: milliseconds, or bytes as MiB."""
    found = {}
    for side, measured in by_side.items():
        cost = measured["costs"].get(name)
        if cost is not None and cost[what] is not None:
            found[int(side)] = cost[what] / _MIB if what == "bytes" else cost[what]["median"]
    return found


def _cost(cost: Mapping[str, Any] | None) -> str:
    if cost is None:
        return "left out"
    memory = f"{_figures(cost['bytes'] / _MIB)} MiB"
    if cost["milliseconds"] is None:
        return memory
    time = Spread(**cost["milliseconds"])
    return f"{_figures(time.median)} ms ({_figures(time.q1)}–{_figures(time.q3)}), {memory}"


def _mean(numbers: Sequence[float], *, sign: bool = False) -> str:
    mean = f"{statistics.mean(numbers):{'+' if sign else ''}.3f}"
    return f"{mean} ± {statistics.stdev(numbers):.3f}" if len(numbers) > 1 else mean


def _figures(value: float) -> str:
    """Return a number with three figures that count."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


# --- plots ------------------------------------------------------------------------------------------------------------


def write_plot(figure: Figure, document: Mapping[str, Any], path: Path) -> None:
    """Draw what was found; needs matplotlib."""
    from matplotlib.figure import Figure as Canvas  # noqa: PLC0415  an extra

    canvas = Canvas(layout="constrained")
    if figure.kind == "growth":
        _draw_growth(canvas, figure, document)
    elif figure.kind == "overlap":
        _draw_overlap(canvas, document)
    else:
        _draw_quality(canvas, figure, document)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as unfinished:
        canvas.savefig(unfinished, dpi=100, format="png")


def _draw_quality(canvas: Any, figure: Figure, document: Mapping[str, Any]) -> None:
    names = list(document["results"])
    places = [-place for place in range(len(names))]
    panels: list[tuple[str, dict[str, float]]] = []
    for passed, costs in _at_one_size(document).items():
        for what, unit in (("milliseconds", "ms"), ("bytes", "MiB")):
            series = {name: values[0] for name in names if (values := _series({"0": {"costs": costs}}, name, what))}
            if series:
                panels.append((f"{_NAMES[passed]}, {unit}", series))
    canvas.set_size_inches(5.6 + 1.8 * len(panels), 1.5 + 0.36 * len(names))
    axes = canvas.subplots(1, 1 + len(panels), width_ratios=[2.6, *[1] * len(panels)], squeeze=False)[0]
    for place, name in zip(places, names, strict=True):
        each = differences(document, name, figure.baseline)
        axes[0].plot(each, [place] * len(each), "o", color="C0", alpha=0.6, markersize=5)
        axes[0].plot(statistics.mean(each), place, "|", color="black", markersize=16, markeredgewidth=2)
    axes[0].axvline(0, color="grey", linewidth=0.8, linestyle=":")
    label = f"dB against “{figure.baseline}”\neach seed, and the mean"
    axes[0].set(yticks=places, yticklabels=names, xlabel=label)
    axes[0].grid(axis="x", alpha=0.3)
    axes[0].margins(y=0.12)
    for axis, (label, series) in zip(axes[1:], panels, strict=True):
        shown = [series.get(name, 0.0) for name in names]
        axis.barh(places, shown, height=0.6, color="C1" if "ms" in label else "C2")
        axis.set(yticks=[], xlabel=label, ylim=axes[0].get_ylim())
        axis.locator_params(axis="x", nbins=4)


def _draw_growth(canvas: Any, figure: Figure, document: Mapping[str, Any]) -> None:
    drawn = {"milliseconds": "process time (ms)", "bytes": "memory (MiB)"}
    if not any(_series(document["passes"]["forward"], name, "milliseconds") for name in figure.variants):
        del drawn["milliseconds"]
    canvas.set_size_inches(1 + 5 * len(drawn), 7.5)
    axes = canvas.subplots(2, len(drawn), squeeze=False)
    for row, passed in zip(axes, PASSES, strict=True):
        by_side = document["passes"][passed]
        for axis, (what, unit) in zip(row, drawn.items(), strict=True):
            for index, name in enumerate(figure.variants):
                values = _series(by_side, name, what)
                axis.plot(list(values), list(values.values()), "o-", color=f"C{index}", label=name, markersize=4)
            sides = [int(side) for side in by_side]
            axis.set(xscale="log", yscale="log", title=f"{_NAMES[passed]}, {unit}", xlabel="side of the map (pixels)")
            axis.set_xticks(sides, [str(side) for side in sides])
            axis.set_xticks([], minor=True)
            axis.grid(alpha=0.3)
    canvas.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(drawn) + 1, fontsize="small"
    )


def _draw_overlap(canvas: Any, document: Mapping[str, Any]) -> None:
    same, other = _overlaps(document)
    canvas.set_size_inches(9, 4.4)
    axes = canvas.subplots(1, 2)
    titles = ("overlap of layers", "with the attention of another picture")
    for axis, matrix, title in zip(axes, (same, other), titles, strict=True):
        shown = axis.imshow(matrix, vmin=0, vmax=1, cmap="Blues")
        for a, row in enumerate(matrix):
            for b, value in enumerate(row):
                axis.text(b, a, f"{value:.2f}", ha="center", va="center", color="white" if value > 0.6 else "black")
        ticks = range(len(matrix))
        axis.set(xticks=ticks, yticks=ticks, xlabel="layer", ylabel="layer", title=title)
    canvas.colorbar(shown, ax=axes, shrink=0.8)
