"""What the library promises; tests that keep a promise are marked with its number, and a run of them writes the page.

    @pytest.mark.promise("R6", "clusters")  # the promise, and what of it the test shows
    def test_padding_is_neutral(...): ...

`make promises` runs the marked tests with `--promises docs/reliability.md`. Tests report figures by pytest's own
`record_property(name, number)`: of the numbers of one name the page shows the largest, of one that begins with "least"
the smallest, of one that begins with "total" the sum.
"""

import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Promise:
    """One promise.

    Attributes:
        promise: in a few words.
        promised: its figure.
        missing: what is not reached, and why.
    """

    promise: str
    promised: str
    missing: str = ""


PROMISES = {
    "R1": Promise(
        "property tests",
        "at least 48 hypothesis properties, 100 examples each in CI (derandomised), 1000 nightly",
    ),
    "R2": Promise(
        "equals dense attention (both under one pattern)",
        "float64 1e-10; lower precisions: error against float64 at most 2x dense's own (outputs), 3x (gradients)",
        "On CUDA the same tests run with `pytest --device cuda`; this run had no GPU.",
    ),
    "R3": Promise(
        "dtypes",
        "fp64, fp32, bf16, fp16 x CPU, CUDA when present x train, eval",
        "On CUDA the same tests run with `pytest --device cuda`; this run had no GPU.",
    ),
    "R4": Promise(
        "gradcheck",
        "every layer and the shared path, float64; every parameter receives a gradient",
    ),
    "R5": Promise(
        "any size",
        "all 289 sizes in [1, 17]x[1, 17], 1x257, 257x1, 31x33, 64x65; batch 1-3; channels from 1; no padding "
        "when divisible",
    ),
    "R6": Promise(
        "padding is neutral",
        "filling padded tokens with 0, 1e4 or NaN changes no bit of the output; also under fill_uninitialized_memory",
    ),
    "R7": Promise(
        "degenerate k-means",
        "more clusters than tokens, one token, all equal, all zero, an outlier of 1e4, duplicates: finite, "
        "deterministic",
    ),
    "R8": Promise(
        "non-finite input",
        "eval: only its own sample is affected; training: no buffer ever becomes non-finite; skipped updates "
        "are counted in a buffer and reported by SparseSRModel at its log step",
    ),
    "R9": Promise(
        "batch independence in eval",
        "same assignment; 1e-10 fp64, 1e-5 fp32; trained or not",
    ),
    "R10": Promise(
        "eval is pure",
        "state_dict and global RNG state unchanged",
    ),
    "R11": Promise(
        "deterministic",
        "two runs bit-equal on CPU, in eval and over 10 training steps; use_deterministic_algorithms(True) accepted",
    ),
    "R12": Promise(
        "round trips",
        "weights_only load, safetensors, pickle, deepcopy: bit-equal; all state is in state_dict",
    ),
    "R13": Promise(
        "resume",
        "10 + 10 steps through save and load = 20 steps, bit-equal on CPU, through our BasicSR command too",
    ),
    "R14": Promise(
        "compile",
        "fullgraph, no break, at most one recompile over five sizes of at least three chunks",
    ),
    "R15": Promise(
        "export",
        "torch.export and ONNX with dynamic H, W; onnxruntime at three other sizes within 1e-4",
    ),
    "R16": Promise(
        "DDP",
        "gloo, 2 processes: centroids bit-equal on ranks, within 1e-6 of one process on the joined batch; no "
        "unused parameters; uneven batch sizes work, uneven batch counts end in a clear error, never a hang",
        "Running statistics of BatchNorm are joined as well; it normalises by the batch of its own process. "
        "Uneven batch counts: on all processes at once with `model.join(throw_on_early_termination=True)`; "
        "without it, on the one that goes on when the other ends, or else at the timeout of the process "
        "group. nccl needs GPUs.",
    ),
    "R17": Promise(
        "DataParallel",
        "eval equals plain; what is lost in training is documented and warned of",
        "In training k-means and BatchNorm learn from the first device's part of a batch only; use "
        "DistributedDataParallel, which joins the parts. A warning says so once. PyTorch's DataParallel "
        "itself needs GPUs: here its replicas are made by hand, on the CPU.",
    ),
    "R18": Promise(
        "AMP",
        "bf16 and fp16 finite for activations up to 1e4; PSNR moves at most 0.02 dB",
    ),
    "R19": Promise(
        "activation checkpointing",
        "gradients equal, state bit-equal, non-reentrant; the reentrant variant equal or refused with a clear error",
    ),
    "R20": Promise(
        "gradient accumulation, several forwards a step",
        "documented and tested: one k-means update a forward, or one an optimizer step when asked",
    ),
    "R21": Promise(
        "hostile checkpoints",
        "at least 15 kinds: one CheckpointError with names; no code runs; x2 -> x4 only on request",
    ),
    "R22": Promise(
        "malformed options",
        "at least 30 kinds: ConfigError with key, value, what is allowed; every accepted option changes "
        "something; our commands load YAML safely (`!!python/tuple` stays allowed)",
    ),
    "R23": Promise(
        "registration",
        "twice is once; without basicsr, with a broken one, inside a fork",
    ),
    "R24": Promise(
        "tiling",
        "local layers: tiled = full within 1e-5; global layers: the deviation is measured and said",
    ),
    "R25": Promise(
        "memory",
        "sparse path at 256x256x64: at most 8 feature maps, no tensor over 4·N·3w bytes",
    ),
    "R26": Promise(
        "metric and degradation",
        "bicubic's published PSNR within 0.01 dB; MATLAB LR files to the last bit",
        "The published PSNR needs Set5's images, which cannot be shipped or fetched by a test; no file that "
        "MATLAB wrote is at hand either, so the formulae are held to BasicSR's (one grey level) and to taps "
        "worked out by hand.",
    ),
    "R28": Promise(
        "seeded faults",
        "each of some 60 faults in functions that carry meaning turns the test that is named for it red",
        "`make mutants` measures more, with changes that nobody chose; its results are not kept under version control.",
    ),
    "R29": Promise(
        "platforms",
        "what can be installed here is run here; the rest (Python 3.10-3.13, oldest torch, numpy 1.26) stands "
        "in the CI workflow and is marked unverified",
        "Unverified: all of `.github/workflows/ci.yml`. Verified is the environment named above. Besides, "
        "layers were compiled and exported with torch 2.11 on the CPU, and most tests ran with it on an H100 "
        "(docs/backends.md).",
    ),
    "R30": Promise(
        "security",
        "SECURITY.md; weights_only everywhere; no eval, exec or pickle in our code",
        "Ruff's rules S (`make lint`) look for eval, exec, pickle, unsafe YAML and shells.",
    ),
}
"""By number; no promise ever had the number 27."""


@dataclass
class Reached:
    """How many cases of a test ended how, and the figures that they reported."""

    outcomes: dict[str, int] = field(default_factory=dict)
    figures: dict[str, list[float]] = field(default_factory=dict)
    tests: set[str] = field(default_factory=set)

    def __str__(self) -> str:
        passed, failed, skipped = (self.outcomes.get(kind, 0) for kind in ("passed", "failed", "skipped"))
        text = f"{passed}" + (f", **{failed} failed**" if failed else "") + (f", {skipped} skipped" if skipped else "")
        figures = ", ".join(f"{name} {summary(name, values):.3g}" for name, values in sorted(self.figures.items()))
        return f"{text} ({figures})" if figures else text


def summary(name: str, values: Sequence[float]) -> float:
    if name.startswith("total "):
        return sum(values)
    return min(values) if name.startswith("least ") else max(values)


class Page:
    """Gathers what marked tests reached; pytest-xdist's reports carry the marks, too, as properties."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.reached: dict[tuple[str, str], Reached] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and not report.failed and not report.skipped:
            return
        figures = [(str(name), value) for name, value in report.user_properties if name != "promise"]
        for name, value in report.user_properties:
            if name == "promise":
                number, what = value  # type: ignore[misc]
                reached = self.reached.setdefault((number, what), Reached())
                reached.outcomes[report.outcome] = reached.outcomes.get(report.outcome, 0) + 1
                reached.tests.add(report.nodeid.partition("[")[0])
                for figure, number_reached in figures:
                    reached.figures.setdefault(figure, []).append(float(number_reached))  # type: ignore[arg-type]

    def pytest_sessionfinish(self) -> None:
        self.path.write_text(self.text(), encoding="utf-8")

    def text(self) -> str:
        lines = [
            "# Reliability",
            "",
            "What the library promises, and what the tests reached; written by `make promises` from a run of them.",
            "A count is of cases that passed. Environment of the run:",
            f"{environment()}.",
            "",
        ]
        for number, promise in PROMISES.items():
            own = {what: reached for (of, what), reached in sorted(self.reached.items()) if of == number}
            lines += [f"## {number}: {promise.promise}", "", f"Promised: {promise.promised}.", ""]
            lines += [f"- {what}: {reached}" for what, reached in own.items()] or ["- not run"]
            lines += ["", f"*{promise.missing}*"] if promise.missing else []
            tests = sorted({test for reached in own.values() for test in reached.tests})
            names = [f"<code>{escape(test.rpartition('/')[2])}</code>" for test in shortened(tests)]
            lines += ["", "<details><summary>the tests</summary>", "<br>\n".join(names), "</details>", ""]
        return "\n".join(lines).rstrip("\n") + "\n"


def shortened(tests: Sequence[str]) -> list[str]:
    """Return the names of tests, or of their files where there are many."""
    return list(tests) if len(tests) <= 12 else sorted({test.partition("::")[0] for test in tests})


def environment() -> str:
    import numpy
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, numpy {numpy.__version__}"
    return f"{versions}, machine {platform.machine()}, GPU {gpu}"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--promises", type=Path, help="write the page of promises to this file, from marked tests")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--promises")
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Page(path))


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("promise"):
        number, what = mark.args
        assert number in PROMISES, f"there is no promise {number}"
        item.user_properties.append(("promise", (number, what)))
