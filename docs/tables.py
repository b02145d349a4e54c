"""Write the tables of docs/modules.md from the registry, and that of docs/choose.md from measurements.

python docs/tables.py
"""

import contextlib
import io
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from sparse_sr_attn import LAYERS
from sparse_sr_attn.cli.common import table
from sparse_sr_attn.cli.main import main as sparse_sr

DOCS = Path(__file__).parent
sys.path.append(str(DOCS.parent))  # for benchmarks/, which is not installed
from benchmarks.cost.__main__ import markdown  # noqa: E402
from benchmarks.results.__main__ import FOLDER, RUNS, command  # noqa: E402

BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"


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


def tables() -> str:
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
"""Rows of docs/assets/capture.json; the windows there are one size of GMSA's."""


GAINS = {
    "LCoA": "LCoA, k-means",
    "NLSA": "NLSA (LSH, 4 rounds)",
    "ENLA": "ENLA (random features)",
    "NLA": "NLA (dense)",
}
"""Rows of docs/assets/paper-lcoa-3.json for layers."""


def gain(layer: str) -> str:
    """What a layer gains in the comparison lcoa-3 of `benchmarks.paper`: mean and deviation over seeds."""
    results = json.loads((DOCS / "assets" / "paper-lcoa-3.json").read_text())["results"]
    if layer not in GAINS:
        return "–"
    plain = results["no attention"]
    gains = [run["psnr"] - plain[seed]["psnr"] for seed, run in results[GAINS[layer]].items()]
    return f"{statistics.mean(gains):+.3f} ± {statistics.stdev(gains):.3f}"


def costs() -> str:
    """What each attention costs an EDSR and gives it: cost, captured mass, gain after a short training."""
    networks = json.loads((DOCS / "assets" / "cost.json").read_text())["networks"]
    capture = json.loads((DOCS / "assets" / "capture.json").read_text())["10"]
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
        record = json.loads(file.read_text())
        machine = record["machine"]
        text += [f"{machine['processor']}, torch {machine['torch']}, {machine['date']}:", markdown(record["networks"])]
    return "\n\n".join(text)


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


PAGES = {"modules.md": tables, "choose.md": costs, "benchmarks.md": networks, "benchmarks-cpu.md": results}


def filled(name: str, old: str) -> str:
    """The page with new tables."""
    before, _, rest = old.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{PAGES[name]()}\n\n{END}{rest.partition(END)[2]}"


def main() -> None:
    for name in PAGES:
        page = DOCS / name
        old = page.read_text(encoding="utf-8")
        if BEGIN not in old or END not in old:
            sys.exit(f"{page} must have the lines {BEGIN} and {END}")
        page.write_text(filled(name, old), encoding="utf-8")
        print(f"written: {page}")


if __name__ == "__main__":
    main()
