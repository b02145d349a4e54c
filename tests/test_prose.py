"""Figures in the prose of the pages are those of the committed results; tables are compared in tests/test_docs.py."""

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from benchmarks.results.__main__ import FOLDER
from benchmarks.weights import recipe

ROOT = Path(__file__).parents[1]
SETS = ("Set5", "Set14", "Urban25")
LONG, SHORT = "15,000 × 8 × 48²", recipe.PARTS


@cache
def asset(name: str) -> Any:
    return json.loads((ROOT / "docs" / "assets" / f"{name}.json").read_text())


def listed(numbers: list[float], sign: str = "") -> str:
    """As "0.15, 0.08 and 0.20"."""
    first = [f"{number:{sign}.2f}" for number in numbers]
    return f"{', '.join(first[:-1])} and {first[-1]}"


def between(numbers: list[float], digits: int = 2) -> str:
    """As "1.19 to 1.46"."""
    return f"{min(numbers):.{digits}f} to {max(numbers):.{digits}f}"


# --- benchmarks.weights -----------------------------------------------------------------------------------------------


def figure(network: str, budget: str, place: str, upscale: int = 2) -> recipe.Figure:
    (found,) = (one for one in recipe.recorded() if one.key == (network, upscale, budget, place))
    return found


def gains(
    better: tuple[str, str], worse: tuple[str, str], upscale: int = 2, sets: tuple[str, ...] = SETS
) -> list[float]:
    """How much higher the PSNR of the first is, in dB; each is a network and a budget."""
    return [figure(*better, place, upscale).psnr - figure(*worse, place, upscale).psnr for place in sets]


def lost(network: str, budget: str, sets: tuple[str, ...] = SETS) -> list[float]:
    """What switching attention off costs, in dB."""
    found = [figure(network, budget, place) for place in sets]
    return [one.psnr - one.psnr_without_attention for one in found if one.psnr_without_attention is not None]


# --- benchmarks.cost and benchmarks.speed -----------------------------------------------------------------------------


def costs(*names: str, machines: tuple[str, ...] = ("cost-networks", "cost-networks-zen4")) -> list[float]:
    """The times of networks relative to those without attention, in all cases."""
    rows = [row for machine in machines for row in asset(machine)["networks"] if row["name"] in names]
    return [time["median"] for row in rows for time in row["times"].values()]


def cells(run: str, row: str, heading: str = "how many times longer the other takes") -> list[str]:
    """A row of a run of `benchmarks.results`, by size."""
    part = (FOLDER / f"{run}.md").read_text().partition(heading)[2]
    line = re.search(rf"^\| {re.escape(row)} \|(.*)\|$", part, re.MULTILINE)
    assert line is not None, row
    return [cell.strip() for cell in line[1].split("|")]


def times(row: str, *columns: int, runs: tuple[str, ...] = ("layers",)) -> list[float]:
    return [float(cells(run, row)[column].split()[0]) for run in runs for column in columns]


def against(ours: str, theirs: str, runs: tuple[str, ...]) -> str:
    """As "1.9 to 2.0 and 4.2 to 4.9", at 96² and 256²."""
    return " and ".join(between(times(f"{ours} against {theirs}", column, runs=runs), 1) for column in (1, 3))


def shares(*rows: str) -> list[float]:
    """The shares of the floor that layers reach."""
    heading = "share of the floor reached"
    found = [cell for run in LAYERS for row in rows for cell in cells(run, row, heading)]
    return [float(cell.partition("%")[0]) / 100 for cell in found]


LAYERS, WINDOWS = ("layers", "layers-channels-last"), ("windows", "windows-channels-last")


# --- benchmarks.paper -------------------------------------------------------------------------------------------------


def each(name: str, better: str, worse: str) -> list[float]:
    """Differences in PSNR, for each seed."""
    results = asset(f"paper-{name}")["results"]
    return [run["psnr"] - results[worse][seed]["psnr"] for seed, run in results[better].items()]


def ten_layers(name: str, cost: str) -> float:
    found = asset("paper-lcoa-2")["passes"]["forward"]["128"]["costs"][name]
    return float(found["bytes"] if cost == "bytes" else found["milliseconds"]["median"])


def overlap(images: str, distance: int) -> float:
    runs = asset("paper-lcoa-5")["results"]["dense attention after every block"].values()
    tables = [run["seen"][images] for run in runs]
    size = len(tables[0])
    return mean(table[a][b] for table in tables for a in range(size) for b in range(size) if abs(a - b) == distance)


# --- the sentences ----------------------------------------------------------------------------------------------------

LCOA, WIDER, DEEPER = ("EDSR-LCoA", LONG), ("EDSR-wider", LONG), ("EDSR-deeper", LONG)
SECOND = ("EDSR-LCoA, seed 1", LONG), ("EDSR-wider, seed 1", LONG)


def readme() -> Iterator[str]:
    yield f"With a second seed, attention gains {listed(gains(*SECOND))} dB"
    three = costs("+ LCoA every 4, share 4", "+ GMSA every 4, share 4", "EDSR-LCoA", machines=("cost-networks-zen4",))
    yield f"the first three rows are {between(three)}."
    yield f"Dense attention takes {times('LCoA against SDPA', 1)[0]:.0f} times as long as one LCoA at 96×96"


def choose() -> Iterator[str]:
    a, b, c = (between(list(pair)) for pair in zip(gains(LCOA, WIDER), gains(*SECOND), strict=True))
    yield f"LCoA gained {a} dB on Set5, {b} on Set14 and {c} on buildings, with two seeds"
    assert min(costs("+ LCoA every 2, share 3")) > 2
    yield "three LCoAs [more than double the time]"


def benchmarks() -> Iterator[str]:
    more = [100 * (time - 1) for time in costs("+ LCoA every 4, share 4", "+ GMSA every 4, share 4")]
    yield f"four LCoAs or GMSAs add {between(more, 0)} % to the time of an EDSR of 64 channels"
    narrow = costs("+ LCoA every 2, share 3")
    yield f"with three LCoAs, an EDSR of 32 channels and 6 blocks takes {between(narrow, 1)} times as long"
    small, large = times("LCoA against SDPA", 1, 2)
    yield f"it takes {small:.0f} times as long as LCoA at 96×96, and {large:.0f} times at 128×128"
    yield f"LCoA is {against('LCoA', 'lcoan.LCoA', LAYERS)} times as fast"
    yield f"CoA {against('CoA', 'lcoan.CoA', LAYERS)} times"
    yield f"GMSA {against('GMSA', 'elan.GMSA', WINDOWS)} times"
    elan = times("ELAN-light against elan.ELAN", 0, 1, runs=("elan-light", "elan-light-bfloat16"))
    yield f"ELAN-light {between(elan, 1)} times (64×64 and 128×128)"
    gpu = asset("gpu")
    slower = 1 / gpu["speed_ups"]["GMSA against plain-GMSA, float32"]["96²"]["median"]
    yield f"an older version of GMSA took {slower:.1f} times as long as its plain form"
    graphs = gpu["graphs"]["ELAN-light ×2"]
    small, large = (graphs[f"{side}² eager"] / graphs[f"{side}² in a graph"] for side in (128, 256))
    yield f"in a graph, ELAN-light runs {small:.0f} times as fast at 128×128 and {large:.0f} times at 256×256"
    yield f"would take {100 * gpu['lcoa_floor_share']:.0f} % of the time"
    yield "ShiftConv2d ({ours} against {plain} ms)".format(**gpu["shift_conv2d_milliseconds"])
    yield "LCoA {LCoA} feature maps, plain-LCoA {plain-LCoA}, SDPA {SDPA}".format(**gpu["feature_maps"])
    yield "at 256×256 they took {GMSA} and {ENLA} ms".format(**gpu["milliseconds_256_before"])
    (least, most), (elan,) = gpu["training_step_milliseconds"].values()
    yield f"took {least} to {most} ms while other jobs trained on the same GPU; a step of ELAN-light took {elan} ms"
    floors = [1 / share for share in shares("LCoA", "CoA")]
    yield f"LCoA and CoA take {between(floors, 1)} times as long as their arithmetic alone"
    enla = [1 / time for time in times("LCoA against ENLA", 0, 1)]
    assert min(enla) > 1 > 1 / times("LCoA against ENLA", 3)[0]
    yield f"it is faster up to 96×96 ({between(enla, 1)} times), and LCoA at 256×256"
    gmsa = times("GMSA against elan.GMSA", 0, runs=("windows",))[0]
    yield f"On maps of 48×48 GMSA is slower than the authors' code ({gmsa:.2f} times as fast)"


def captured() -> Iterator[str]:
    for temperature in (10, 30):
        mass = {name: seen["mass"] for name, seen in asset(f"capture-{temperature}")["mean"]["patterns"].items()}
        assert mass["LCoA"] > 1.2 * mass["LCoA:cluster_order=index"]
        assert mass["LCoA:num_clusters=32"] == pytest.approx(mass["LCoA:num_clusters=64"], rel=0.1)
        assert mass["LCoA:num_clusters=64,num_adjacent=4"] == pytest.approx(mass["LCoA:num_clusters=64"], rel=0.03)
        assert max(mass, key=lambda name: mass[name]) == "LCoA:neighbors=nearest,num_adjacent=4"
        less = mass["NLSA:num_rounds=4"] / mass["NLSA:num_rounds=1"]
        assert less < 1 if temperature == 10 else 1 < less < 1.05
        assert mass["CategoryAttention"] == pytest.approx(mass["LCoA:num_clusters=64,cluster_order=index"], rel=0.01)
    yield "On the chain, the number of clusters hardly matters."
    yield "Four rounds of NLSA capture less than one round at temperature 10 and hardly more at 30"
    ring, _, larger, nearest, *_ = asset("neighbors")["rows"]
    assert nearest["mass"] == pytest.approx(ring["mass"], rel=0.03)
    assert larger["mass"] > ring["mass"]
    yield f"as much with {nearest['num_keys']:.0f} keys as the ring with {ring['num_keys']:.0f}"


def weights() -> Iterator[str]:
    signs = [f"{gain:+.2f}" for gain in gains(LCOA, WIDER)]
    yield f"| seed 0 | {' | '.join(signs)} |"
    signs = [f"{gain:+.2f}" for gain in gains(*SECOND)]
    yield f"| seed 1 | {' | '.join(signs)} |"
    yield f"with attention switched off it loses {listed(lost(*LCOA))} dB (seed 0)"
    yield f"Attention costs [{between(costs('EDSR-LCoA'))} times the time]"
    parameters = [figure(*network, "Set5").parameters or 0 for network in (DEEPER, ("EDSR-LCoA", LONG))]
    more = 100 * (parameters[0] / parameters[1] - 1)
    deeper = costs("EDSR, 48 channels, 16 blocks")
    yield f"costs about as much, {between(deeper)} times, and has {more:.0f} % more parameters"
    yield f"it is {listed(gains(LCOA, DEEPER))} dB below EDSR-LCoA with that seed"
    yield f"and {listed(gains(SECOND[0], DEEPER))} dB below EDSR-LCoA with the other"
    yield f"EDSR-wider costs {between(costs('EDSR, 49 channels, 10 blocks'))} times as much"
    yield f"loses less without it: {listed(lost('LCoAN-light', LONG))} dB"
    x4 = gains(
        ("LCoAN-light", "5,000 × 8 × 48², after LCoAN-light_x2"), ("LCoAN-light", "3,000 × 16 × 48²"), 4, SETS[:2]
    )
    yield f"It is {x4[0]:.2f} dB on Set5 and {x4[1]:.2f} dB on Set14 above the weights of 3,000 steps"
    budget = "2,000 × 8 × 48², after"
    x3 = gains(("LCoAN-light", f"{budget} LCoAN-light_x2"), ("EDSR-wider", f"{budget} EDSR-wider_x2_seed1"), 3)
    yield f"It is {listed(x3)} dB above EDSR-wider"
    budget = "5,000 × 8 × 48², after"
    x4 = gains(("LCoAN-light", f"{budget} LCoAN-light_x2"), ("EDSR-wider", f"{budget} EDSR-wider_x2_seed1"), 4)
    yield f"and {listed(x4)} dB above EDSR-wider"
    a, b, c = gains(("ELAN-light", "5,000 × 8 × 32²"), ("EDSR-wider", "5,000 × 8 × 32²"))
    yield f"It is {a:.2f} and {b:.2f} dB above EDSR-wider of the same budget on Set5 and Set14, and {-c:.2f} dB below"


def parts() -> Iterator[str]:
    kinds = ["EDSR-published", "EDSR-LCoA", "EDSR-hash", "EDSR-index"]
    found = [gains((kind, SHORT), ("EDSR-wider", SHORT)) for kind in kinds]
    set5, urban = ([gain[place] for gain in found] for place in (0, 2))
    yield f"Attention of any kind gives {between(set5)} dB on Set5 and {between(urban)} on Urban25"
    yield f"EDSR-LCoA gains {set5[1]:.2f} and {urban[1]:.2f}; after 15,000 steps, {gains(LCOA, WIDER)[0]:.2f} and"
    published, *sharp = (lost(kind, SHORT, ("Urban25",))[0] for kind in kinds)
    yield f"the network of the published form loses {published:.2f} dB on Urban25, the sharp ones {between(sharp)} dB"
    entropy = figure("EDSR-published", SHORT, "Urban25").entropy
    yield f"the weights stay uniform (entropy {entropy:.2f})"
    yield f"A hash is even {between(gains(('EDSR-hash', SHORT), ('EDSR-LCoA', SHORT)))} dB better than k-means"
    index = [abs(gain) for gain in gains(("EDSR-index", SHORT), ("EDSR-LCoA", SHORT))]
    yield f"index order equals the chain within {max(index):.2f} dB"
    budget = "3,000 × 8 × 32²"
    level = listed(gains(("EDSR-LCoA", budget), ("EDSR-wider", budget))).replace("-0.00", "0.00").replace("-", "−")
    yield f"EDSR-LCoA is level with EDSR-wider ({level} dB)"
    above, below = gains(("EDSR-dense", budget), ("EDSR-wider", budget), sets=SETS[:2])
    yield f"it is {above:.2f} dB above EDSR-wider on Set5 and {-below:.2f} dB below it on Set14"


def runs() -> Iterator[str]:
    budget = "3,000 × 16 × 48²"
    yield f"LCoA added {gains(('EDSR-LCoA', budget), ('EDSR', budget), sets=SETS[:1])[0]:.2f} dB to the EDSR"
    both = [*gains(LCOA, WIDER), *gains(*SECOND)]
    yield f"15,000 steps it adds {between(both)} dB to one with as many parameters, with two seeds"
    a, b = gains(("EDSR", "3,000 × 8 × 32²"), ("ELAN-light", "3,000 × 8 × 32²"), sets=SETS[:2])
    yield f"of 3,000 steps is {a:.2f} dB (Set5) and {b:.2f} dB (Set14) worse at ×2 than the EDSR"
    published = gains(("EDSR-published", SHORT), ("EDSR-wider", SHORT), sets=SETS[:1])
    yield f"with 16 patches a step, and {published[0]:.2f} dB to the wider one with 8"


def paper() -> Iterator[str]:
    dense, lsp, both = (
        ten_layers(name, "time")
        for name in ("neither: dense, in every layer", "LSP alone: sparse, in every layer", "LSP and CoA")
    )
    yield f"takes {dense / lsp:.0f} times as long when they are dense as with LSP, and {dense / both:.0f} times as long"
    memory = ten_layers("LSP and CoA", "bytes") / ten_layers("LSP alone: sparse, in every layer", "bytes")
    yield f"CoA costs memory, {memory:.1f} times that of LSP alone"
    kmeans, lsh = (mean(each("lcoa-3", f"LCoA, {how}", "no attention")) for how in ("k-means", "LSH"))
    assert f"{kmeans:.2f}" == f"{lsh:.2f}"
    yield f"LCoA gains {kmeans:.2f} dB from the start"
    others = [mean(each("lcoa-3", f"{kind}", "no attention")) for kind in OTHERS]
    yield f"those of the other layers ({between(others)} dB) are not"
    differences = [
        f"{difference:.2f}".replace("-0.00", "0.00") for difference in each("lcoa-3", "LCoA, k-means", "LCoA, LSH")
    ]
    yield f"do not differ yet ({', '.join(differences[:-1])} and {differences[-1]} dB)".replace("-", "−")
    shared = mean(each("lcoa-3", "LCoA, k-means", "LCoA, k-means, nobody shares"))
    yield f"A layer that shares one state is {shared:.2f} dB better than layers with a state each"
    near, far = overlap("same", 1), overlap("same", 3)
    yield f"adjacent layers share {near:.2f} of their attention, layers three blocks apart {far:.2f}"
    yield f"layers on two different images {between([overlap('other', distance) for distance in range(4)])}"
    windows = mean(each("elan-windows", "4 8", "8"))
    yield f"Windows of 4 and 8 pixels together are {windows:.2f} dB better than windows of 8 alone"
    yield f"instead of shift convolutions are {listed(each('elan-lfe', '3×3', 'shift-conv'))} dB better"
    light = {name: mean(each("light", name, "EDSR")) for name in asset("paper-light")["results"]}
    without = -light["ELAN-light without attention"]
    yield f"ELAN-light is {-light['ELAN-light']:.2f} dB below it after 500 steps, and {without:.2f} dB without"
    assert f"{light['LCoAN-light']:.2f}" == f"{light['LCoAN-light without attention']:.2f}"
    yield f"LCoAN-light is {light['LCoAN-light']:.2f} dB above the EDSR, with its attention and without"


OTHERS = ("NLA (dense)", "NLSA (LSH, 4 rounds)", "ENLA (random features)")


def finetuned() -> Iterator[str]:
    first, plain, *others = (
        [one["psnr"] for one in row["sets"].values()]
        for row in asset("finetune")["networks"]
        if "frozen" not in row["network"]
    )
    losses = [before - after for row in (plain, *others) for before, after in zip(first, row, strict=True)]
    yield f"Fine-tuning loses {between(losses)} dB with and without attention"
    recovered = max(one - other for row in others for one, other in zip(row, plain, strict=True))
    yield f"attention recovers {recovered:.2f} dB at most"
    without, with_attention = asset("finetune")["seconds_of_a_step"].values()
    yield f"A step took {without} s without LCoA and {with_attention} s with it"
    least, most = asset("finetune")["value_weights"]
    yield f"the weights of its value convolutions were still {least} to {most}"


PAGES = {
    "README.md": [readme],
    "docs/choose.md": [choose],
    "docs/benchmarks.md": [benchmarks, captured],
    "docs/weights.md": [weights, parts, runs],
    "docs/paper.md": [paper],
    "docs/finetune.md": [finetuned],
}


@pytest.mark.parametrize("page", PAGES)
def test_sentences_have_the_figures_on_record(page: str) -> None:
    text = " ".join((ROOT / page).read_text(encoding="utf-8").replace("**", "").split())
    missing = [sentence for make in PAGES[page] for sentence in make() if sentence not in text]
    assert not missing
