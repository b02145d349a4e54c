"""Write the tables of the pages from the registry and from the results of measurements.

    python docs/tables.py

The function NAME below makes the text after `<!-- tables: NAME -->`, up to `<!-- tables: end -->`.
"""

import contextlib
import io
import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparse_sr_attn import LAYERS
from sparse_sr_attn.cli.common import table
from sparse_sr_attn.cli.main import main as sparse_sr

DOCS = Path(__file__).parent
sys.path.append(str(DOCS.parent))  # for benchmarks/, which is not installed
from benchmarks.cost.__main__ import markdown as costs_of  # noqa: E402
from benchmarks.neighbors.__main__ import markdown as neighbors_of  # noqa: E402
from benchmarks.results.__main__ import FOLDER, RUNS, command  # noqa: E402

BLOCK = re.compile(r"<!-- tables: (?!end)(\w+) -->\n.*?\n<!-- tables: end -->", re.DOTALL)


def asset(name: str) -> Any:
    """The results in docs/assets/NAME.json."""
    return json.loads((DOCS / "assets" / f"{name}.json").read_text(encoding="utf-8"))


def listed() -> dict[str, list[dict[str, Any]]]:
    """What `sparse-sr list --json` prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        sparse_sr(["list", "--json"])
    tables: dict[str, list[dict[str, Any]]] = json.loads(printed.getvalue())
    return tables


def linked(source: str) -> str:
    """The source with its arXiv numbers as links."""
    one_line = " ".join(source.split())
    return re.sub(r"(?:arXiv )?(\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", one_line)


def count(number: int | None) -> str:
    return "–" if number is None else f"{number:,}"


def sharing(name: str) -> str:
    """Which state a layer provides or requires."""
    build: Any = LAYERS.get(name).build
    provides, requires = getattr(build, "provides", None), getattr(build, "requires", None)
    return f"provides `{provides.__name__}`" if provides else f"requires `{requires.__name__}`" if requires else ""


def reference(name: str) -> str:
    """The place of the layer's docstring."""
    build: Any = LAYERS.get(name).build
    return f"reference/layers.md#{build.__module__}.{build.__qualname__}"


def modules() -> str:
    found = listed()
    text = ["## Layers", "", "| layer | kind | paper | parameters at 64 channels |", "|---|---|---|---|"]
    for row in found["layers"]:
        link = f"[`{row['name']}`](#{row['name'].lower()})"
        text.append(f"| {link} | {row['kind']} | {linked(row['source'])} | {count(row['parameters'])} |")
    for row in found["layers"]:
        options = ", ".join(f"`{option}`" for option in row["options"]) or "none"
        state = f"It {sharing(row['name'])}. " if sharing(row["name"]) else ""
        text += ["", f"### {row['name']}", "", row["about"], ""]
        text += [f"{state}Options, explained in the [reference]({reference(row['name'])}): {options}."]
    text += ["", "## Networks", "", "| network | parameters | source |", "|---|---|---|"]
    text += [f"| `{row['name']}` | {count(row['parameters'])} | {linked(row['source'])} |" for row in found["networks"]]
    text += [
        "",
        "## Presets",
        "",
        "For `create_model`.",
        "",
        "| preset | parameters | what differs from the defaults | source |",
    ]
    text += ["|---|---|---|---|"]
    for row in found["presets"]:
        differs = ", ".join(f"`{name}={value}`" for name, value in row["options"].items()) or "nothing"
        text.append(
            f"| `{row['name']}` | {count(row['parameters'])} | {row['about']}: {differs} | {linked(row['source'])} |"
        )
    return "\n".join(text)


CAPTURED = {"LCoA": "LCoA", "NLSA": "NLSA:num_rounds=4", "CategoryAttention": "CategoryAttention", "GMSA": "windows"}
"""Rows of docs/assets/capture-10.json; the windows there are one size of GMSA's."""


GAINS = {
    "LCoA": "LCoA, k-means",
    "NLSA": "NLSA (LSH, 4 rounds)",
    "ENLA": "ENLA (random features)",
    "NLA": "NLA (dense)",
}
"""Rows of docs/assets/paper-lcoa-3.json for layers."""


def gain(layer: str) -> str:
    """What a layer gains in the comparison lcoa-3 of `benchmarks.paper`: mean and deviation over seeds."""
    results = asset("paper-lcoa-3")["results"]
    if layer not in GAINS:
        return "–"
    plain = results["no attention"]
    gains = [run["psnr"] - plain[seed]["psnr"] for seed, run in results[GAINS[layer]].items()]
    return f"{statistics.mean(gains):+.3f} ± {statistics.stdev(gains):.3f}"


def costs() -> str:
    """What each attention costs an EDSR and gives it: cost, captured mass, gain after a short training."""
    networks = asset("cost")["networks"]
    capture = asset("capture-10")["mean"]
    plain = networks[0]
    training = [case for case in plain["memory"] if case.startswith("training") and case.endswith("float32")]
    body = []
    for row in networks:
        of_time, of_memory = ("{:.0f} ms", "{:.0f} MiB") if row is plain else ("{:.2f}×", "{:.2f}×")
        cells = [of_time.format(time["median"]) for time in row["times"].values()]
        cells += [of_memory.format(row["memory"][case]) for case in training]
        if row is plain:
            body.append(["no attention", count(row["parameters"]), *cells, "", ""])
            continue
        pattern = CAPTURED.get(row["name"].split()[1])
        captured = f"{capture['patterns'][pattern]['mass'] / capture['best']:.2f}" if pattern else "–"
        more = f"+{row['parameters'] - plain['parameters']:,}"
        body.append([row["name"].removeprefix("+ "), more, *cells, captured, gain(row["name"].split()[1])])
    heads = [*plain["times"], *("memory, " + case for case in training)]
    return table([plain["name"], "parameters", *heads, "captured", "gain, dB"], body)


def networks() -> str:
    """What attention costs a network, from the files of `benchmarks.cost`, one for each machine."""
    text = []
    for file in sorted((DOCS / "assets").glob("cost-networks*.json")):
        record = asset(file.stem)
        text += [f"{on(record['machine'])}:", costs_of(record["networks"])]
    return "\n\n".join(text)


def on(machine: dict[str, str]) -> str:
    return f"{machine['processor']}, torch {machine['torch']}, {machine['date']}"


def captured() -> str:
    """What patterns capture, at both temperatures."""
    records = [asset("capture-10"), asset("capture-30")]
    means = [record["mean"] for record in records]
    settings = records[0]["settings"]
    head = ["pattern", "keys"]
    best = ["best possible", str(settings["keys"])]
    for record in records:
        head += [f"captured, $\\tau$ = {record['settings']['temperature']:g}", "of the best"]
        best += [f"{record['mean']['best']:.3f}", "1.00"]
    body = [best]
    for name, pattern in means[0]["patterns"].items():
        body.append([f"`{name}`", f"{pattern['num_keys']:.0f}"])
        for mean in means:
            mass = mean["patterns"][name]["mass"]
            body[-1] += [f"{mass:.3f}", f"{mass / mean['best']:.2f}"]
    return (
        f"{table(head, body)}\n\n{records[0]['num_images']} images; features of {settings['weights']}. The entropy of "
        f"dense attention is {means[0]['entropy']:.3f} of $\\log n$ at temperature 10, {means[1]['entropy']:.3f} at 30."
    )


def neighbors() -> str:
    """What chunks on a ring and the nearest chunks capture, and their times."""
    record = asset("neighbors")
    rows = record["rows"]
    forward, backward = (time["ms"]["median"] for time in rows[0]["times"].values())
    return (
        f"{neighbors_of(rows)}\n\n{rows[0]['images']} images; `of the best` is relative to the best "
        f"{rows[0]['num_keys']:.0f} keys, {rows[0]['best']:.3f}. The first row took {forward:.1f} ms forward, "
        f"{backward:.1f} ms forward and backward: {on(record['machine'])}."
    )


def in_milliseconds(found: dict[str, dict[str, float]]) -> str:
    """A table with the columns of its first row."""
    columns = next(iter(found.values()))

    def shown(time: float | None) -> str:
        return "" if time is None else f"{time:.{1 if time >= 10 else 2}f}"

    return table(
        ["", *columns], [[name, *(shown(row.get(column)) for column in columns)] for name, row in found.items()]
    )


def gpu_times() -> str:
    return in_milliseconds(asset("gpu")["milliseconds"])


def gpu_graphs() -> str:
    return in_milliseconds(asset("gpu")["graphs"])


def gpu_speed_ups() -> str:
    found = asset("gpu")["speed_ups"]
    body = [
        [name, *(f"{each['median']:.3g} ({each['q1']:.3g}–{each['q3']:.3g})×" for each in row.values())]
        for name, row in found.items()
    ]
    return table(["", "96²", "256²"], body)


def finetuned() -> str:
    """What fine-tuning gave a network that was already well trained."""
    rows = asset("finetune")["networks"]
    body = [
        [
            row["network"],
            count(row["parameters"]),
            *(f"{each['psnr']:.2f} / {each['ssim']:.4f}" for each in row["sets"].values()),
        ]
        for row in rows
    ]
    return table(["×2, luma, PSNR in dB / SSIM", "parameters", *rows[0]["sets"]], body)


LEFT_OUT = ("by the clock (ms)", "share of the floor reached, and the floor in ms")
"""Ends of the headings of tables that the page of results does not show."""


def results() -> str:
    """The tables of `benchmarks.results`, with what differs from the run before in where and how it was measured."""
    text: list[str] = []
    told: list[str] = []
    for name, (title, _) in RUNS.items():
        head, *parts = (FOLDER / f"{name}.md").read_text(encoding="utf-8").strip().split("\n\n### ")
        where = head.partition("\n\n")[0].splitlines()
        new = "\n".join(line for line in where if line not in told and ": not set" not in line)
        told = where
        shown = [f"### {part}" for part in parts if not part.partition("\n")[0].endswith(LEFT_OUT)]
        text += [f"## {title}", f"```bash\n{command(name)}\n```", new, *shown]
    return "\n\n".join(text)


MAKERS: tuple[Callable[[], str], ...] = (
    modules,
    costs,
    networks,
    results,
    captured,
    neighbors,
    gpu_times,
    gpu_speed_ups,
    gpu_graphs,
    finetuned,
)
TABLES = {make.__name__: make for make in MAKERS}


def filled(page: str) -> str:
    """The text of a page with new tables."""
    return BLOCK.sub(lambda block: f"<!-- tables: {block[1]} -->\n\n{TABLES[block[1]]()}\n\n<!-- tables: end -->", page)


def main() -> None:
    for page in sorted(DOCS.glob("*.md")):
        old = page.read_text(encoding="utf-8")
        if BLOCK.search(old):
            page.write_text(filled(old), encoding="utf-8")
            print(f"written: {page}")


if __name__ == "__main__":
    main()
