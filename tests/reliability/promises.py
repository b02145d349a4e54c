"""What the library promises, which tests keep each promise, and the page that says what they reached.

    python tests/reliability/promises.py run [-n 2] [-m "not slow"] [files]   runs them, notes what they reached
    python tests/reliability/promises.py page                                  writes docs/reliability.md from the notes

Tests report figures by pytest's own `record_property(name, number)`: of the numbers of one name the page shows the
largest, of one that begins with "least" the smallest, of one that begins with "total" the sum. Runs may be partial:
each replaces the notes of the tests that it ran.
"""

import argparse
import ast
import json
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTES = ROOT / "docs" / "reliability.json"
PAGE = ROOT / "docs" / "reliability.md"

CONTRACT = "tests/layers/test_conformance.py::test_contract"
NETWORKS = "tests/reliability/test_networks.py"
TRAINING = "tests/integrations/test_train.py"
RESUME = "tests/integrations/test_resume.py"
PRETRAINED = "tests/integrations/test_pretrained.py"
OPTION_FILE = "tests/integrations/test_option_file.py"
MODEL = "tests/integrations/test_model.py"
CHECKPOINTS = "tests/test_checkpoints.py"


def clause(name: str) -> str:
    """Return the pattern of a clause of the contract, over the whole registry."""
    return f"{CONTRACT}[: {name}]"


@dataclass(frozen=True)
class Row:
    """One promise.

    Attributes:
        number: R1, R2, ...
        promise: in a few words.
        promised: its figure.
        tests: what is tested, in a few words, and the tests: a file, `file::test`, or `file::test[end]` for those cases
            whose id ends so.
        missing: what is not reached, and why.
    """

    number: str
    promise: str
    promised: str
    tests: Mapping[str, str] = field(default_factory=dict)
    missing: str = ""


NO_GPU = "On CUDA the same tests run with `pytest --device cuda`; this run had no GPU."

ROWS = [
    Row(
        "R1",
        "property tests",
        "at least 48 hypothesis properties, 100 examples each in CI (derandomised), 1000 nightly",
        {"properties of operations": "tests/functional", "of options": "tests/test_config.py"},
    ),
    Row(
        "R2",
        "equals dense attention (both under one pattern)",
        "float64 1e-10; lower precisions: error against float64 at most 2x dense's own (outputs), 3x (gradients)",
        {
            "clusters": "tests/functional/test_cluster.py::test_attention_equals_masked_dense_attention",
            "windows": "tests/functional/test_window.py::test_attention_equals_masked_dense_attention",
            "rounds": "tests/functional/test_rounds.py::test_rounds_are_dense_attention_over_what_any_round_sees",
            "clusters, low precision": "tests/functional/test_cluster.py::"
            "test_low_precision_errs_no_more_than_dense_attention",
            "windows, low precision": "tests/functional/test_window.py::"
            "test_low_precision_errs_no_more_than_dense_attention",
        },
        NO_GPU,
    ),
    Row(
        "R3",
        "dtypes",
        "fp64, fp32, bf16, fp16 x CPU, CUDA when present x train, eval",
        {"layers": clause("precisions"), "networks": f"{NETWORKS}::test_precisions"},
        NO_GPU,
    ),
    Row(
        "R4",
        "gradcheck",
        "every layer and the shared path, float64; every parameter receives a gradient",
        {
            "layers": clause("gradients are derivatives"),
            "parameters learn": clause("every parameter learns"),
            "networks": f"{NETWORKS}::test_every_parameter_learns",
        },
    ),
    Row(
        "R5",
        "any size",
        "all 289 sizes in [1, 17]x[1, 17], 1x257, 257x1, 31x33, 64x65; batch 1-3; channels from 1; no padding when "
        "divisible",
        {
            "layers, all sizes": clause("every size"),
            "layers, channels": clause("any size"),
            "LCoA equals its twin": "tests/functional/test_sizes.py",
            "windows equal their twin": "tests/functional/test_window.py::test_every_size",
            "no padding when divisible": "tests/reliability/test_padding.py",
            "networks": f"{NETWORKS}::test_every_size",
        },
    ),
    Row(
        "R6",
        "padding is neutral",
        "filling padded tokens with 0, 1e4 or NaN changes no bit of the output; also under fill_uninitialized_memory",
        {
            "clusters": "tests/functional/test_cluster.py::test_padding_is_neutral",
            "values in windows": "tests/functional/test_window.py::test_the_values_of_pads_cannot_matter",
            "rows in windows": "tests/functional/test_window.py::test_the_rows_of_pads_cannot_matter",
            "unwritten memory": clause("deterministic mode changes nothing"),
        },
    ),
    Row(
        "R7",
        "degenerate k-means",
        "more clusters than tokens, one token, all equal, all zero, an outlier of 1e4, duplicates: finite, "
        "deterministic",
        {
            "k-means": "tests/functional/test_kmeans.py::test_degenerate_tokens_are_finite_and_deterministic",
            "layers": clause("degenerate maps are finite and repeatable"),
        },
    ),
    Row(
        "R8",
        "non-finite input",
        "eval: only its own sample is affected; training: no buffer ever becomes non-finite; skipped updates are "
        "counted in a buffer and reported by SparseSRModel at its log step",
        {
            "layers": clause("a sample that is not finite spoils no other"),
            "k-means counts": "tests/functional/test_kmeans.py::test_a_token_that_is_not_finite_spoils_nothing",
            "batch normalisation": "tests/functional/test_batch_norm.py::test_a_batch_that_is_not_finite_moves_nothing",
            "reported": f"{MODEL}::test_skipped_kmeans_updates_are_reported",
            "networks": f"{NETWORKS}::test_a_sample_that_is_not_finite_spoils_no_other",
        },
    ),
    Row(
        "R9",
        "batch independence in eval",
        "same assignment; 1e-10 fp64, 1e-5 fp32; trained or not",
        {
            "layers": clause("evaluation does not mix samples"),
            "assignment": clause("assignments do not depend on the batch"),
            "networks": f"{NETWORKS}::test_evaluation_does_not_mix_samples",
        },
    ),
    Row(
        "R10",
        "eval is pure",
        "state_dict and global RNG state unchanged",
        {"layers": clause("evaluation moves nothing"), "networks": f"{NETWORKS}::test_evaluation_moves_nothing"},
    ),
    Row(
        "R11",
        "deterministic",
        "two runs bit-equal on CPU, in eval and over 10 training steps; use_deterministic_algorithms(True) accepted",
        {
            "layers, twice": clause("repeated runs are bit equal"),
            "layers, PyTorch's switch": clause("deterministic mode changes nothing"),
            "networks": f"{NETWORKS}::test_two_runs_are_bit_equal",
        },
    ),
    Row(
        "R12",
        "round trips",
        "weights_only load, safetensors, pickle, deepcopy: bit-equal; all state is in state_dict",
        {
            "layers": clause("copies go on alike"),
            "networks": f"{NETWORKS}::test_copies_go_on_alike",
            "files": f"{CHECKPOINTS}::test_ours_come_back_with_nothing_told",
        },
    ),
    Row(
        "R13",
        "resume",
        "10 + 10 steps through save and load = 20 steps, bit-equal on CPU, through our BasicSR command too",
        {
            "our command": f"{RESUME}::test_stopped_at_10_of_20_and_resumed_is_bit_equal",
            "killed 2 and 20 times": (
                "tests/integrations/test_state.py::test_killed_while_saving_and_resumed_is_bit_equal"
            ),
            "twice": f"{RESUME}::test_stopped_twice_and_resumed_twice_is_bit_equal",
            "layers": clause("copies go on alike"),
        },
    ),
    Row(
        "R14",
        "compile",
        "fullgraph, no break, at most one recompile over five sizes of at least three chunks",
        {
            "layers": clause("compiled is eager"),
            "sizes": clause("sizes do not recompile"),
            "inductor": clause("compiled by inductor is eager"),
            "networks": "tests/backbones/test_compile.py::test_one_recompile_for_all_sizes",
        },
    ),
    Row(
        "R15",
        "export",
        "torch.export and ONNX with dynamic H, W; onnxruntime at three other sizes within 1e-4",
        {
            "torch.export, layers": clause("export with dynamic sizes"),
            "torch.export, networks": "tests/backbones/test_compile.py::test_exports_with_dynamic_sizes",
            "onnxruntime, layers": "tests/test_export.py::test_attention_at_other_sizes",
            "onnxruntime, networks": "tests/test_export.py::test_networks",
        },
    ),
    Row(
        "R16",
        "DDP",
        "gloo, 2 processes: centroids bit-equal on ranks, within 1e-6 of one process on the joined batch; no unused "
        "parameters; uneven batch sizes work, uneven batch counts end in a clear error, never a hang",
        {
            "layers, uneven batches": "tests/layers/test_distributed.py::test_two_processes_are_one",
            "uneven batch counts": "tests/layers/test_distributed.py::test_uneven_numbers_of_batches_end_in_an_error",
            "torchrun and our command": "tests/integrations/test_distributed.py::"
            "test_two_processes_train_as_one_does_on_the_batch_of_both",
            "one is killed": "tests/integrations/test_distributed.py::"
            "test_a_killed_process_ends_the_run_which_can_be_resumed_exactly",
            "attached": "tests/test_attachment.py::test_two_processes_are_one",
            "BasicSR's networks": "tests/integrations/test_attached.py::test_two_processes_train_them_alike",
            "trainers stop together": "tests/integrations/test_distributed.py::test_all_trainers_stop_together",
        },
        "Running statistics of BatchNorm are joined as well; it normalises by the batch of its own process. Uneven "
        "batch counts: on all processes at once with `model.join(throw_on_early_termination=True)`; without it, on the "
        "one that goes on when the other ends, or else at the timeout of the process group. nccl needs GPUs.",
    ),
    Row(
        "R17",
        "DataParallel",
        "eval equals plain; what is lost in training is documented and warned of",
        {"replicas": "tests/reliability/test_data_parallel.py"},
        "In training k-means and BatchNorm learn from the first device's part of a batch only; use "
        "DistributedDataParallel, which joins the parts. A warning says so once. PyTorch's DataParallel "
        "itself needs GPUs: here its replicas are made by hand, on the CPU.",
    ),
    Row(
        "R18",
        "AMP",
        "bf16 and fp16 finite for activations up to 1e4; PSNR moves at most 0.02 dB",
        {
            "finite": clause("loud half inputs stay finite"),
            "close": clause("autocast"),
            "PSNR": f"{NETWORKS}::test_autocast_keeps_the_psnr",
        },
    ),
    Row(
        "R19",
        "activation checkpointing",
        "gradients equal, state bit-equal, non-reentrant; the reentrant variant equal or refused with a clear error",
        {
            "layers": clause("checkpointed is plain"),
            "layers, reentrant": clause("reentrantly checkpointed is plain"),
            "compiled": clause("checkpointed and compiled is plain"),
            "LCoAN": "tests/backbones/test_lcoan.py::test_activation_checkpointing_changes_nothing",
            "ELAN": "tests/backbones/test_elan.py::test_activation_checkpointing_changes_nothing",
            "EDSR": "tests/backbones/test_edsr.py::test_activation_checkpointing_changes_nothing",
            "RCAN": "tests/backbones/test_rcan.py::test_activation_checkpointing_changes_nothing",
        },
    ),
    Row(
        "R20",
        "gradient accumulation, several forwards a step",
        "documented and tested: one k-means update a forward, or one an optimizer step when asked",
        {
            "once a forward": clause("training moves state once a forward"),
            "k-means": f"{MODEL}::test_under_accumulation_kmeans_moves_once_a_forward",
            "k-means when asked, layers": "tests/layers/test_one_update.py",
            "k-means when asked, our model": f"{MODEL}::test_under_accumulation_kmeans_moves_once_a_step_when_asked",
            "k-means when asked, operation": "tests/functional/test_kmeans.py::"
            "test_accumulated_steps_are_one_step_on_all_their_tokens",
            "batch normalisation": f"{MODEL}::test_under_accumulation_batch_norm_sees_each_part_by_itself",
            "one mean gradient": f"{MODEL}::test_accumulation_is_one_step_on_the_mean_gradient",
        },
    ),
    Row(
        "R21",
        "hostile checkpoints",
        "at least 15 kinds: one CheckpointError with names; no code runs; x2 -> x4 only on request",
        {
            "bad contents": f"{CHECKPOINTS}::test_bad_contents_give_one_clear_error",
            "unreadable files": f"{CHECKPOINTS}::test_unreadable_files_give_one_clear_error",
            "giants": f"{CHECKPOINTS}::test_options_that_ask_for_too_much_together_are_refused_while_it_is_built",
            "folders of the hub": "tests/test_hub.py::test_bad_folders_give_one_clear_error",
            "another upscale": f"{CHECKPOINTS}::test_another_upscale_keeps_the_body_only_on_request",
            "in spandrel": "tests/integrations/test_spandrel.py::test_code_in_a_file_does_not_run",
            "training states": f"{RESUME}::test_a_named_state_that_is_none_is_refused",
            "values in training states": (
                f"{RESUME}::test_a_state_with_a_hostile_value_is_refused_before_anything_is_trained"
            ),
            "weights of a run": f"{PRETRAINED}::test_what_are_no_weights_is_told_in_a_few_lines_and_not_taken_up",
        },
    ),
    Row(
        "R22",
        "malformed options",
        "at least 30 kinds: ConfigError with key, value, what is allowed; every accepted option changes something; our "
        "commands load YAML safely (`!!python/tuple` stays allowed)",
        {
            "malformed, training": "tests/integrations/test_preflight.py::"
            "test_a_wrong_option_is_explained_and_nothing_is_written",
            "malformed, testing": "tests/integrations/test_preflight.py::test_a_wrong_test_file_is_explained",
            "options that change something": "tests/reliability/test_options_matter.py::test_it_changes_something",
            "every option has a case": "tests/reliability/test_options_matter.py::test_every_option_has_a_case",
            "code in a file": f"{OPTION_FILE}::test_code_in_an_option_file_is_refused_and_not_run",
            "values": f"{OPTION_FILE}::test_values_are_what_they_look_like",
        },
    ),
    Row(
        "R23",
        "registration",
        "twice is once; without basicsr, with a broken one, inside a fork",
        {
            "BasicSR": "tests/integrations/test_registration.py",
            "repairs": "tests/integrations/test_shims.py",
            "ours": "tests/test_registry.py::test_same_again_is_once",
            "without basicsr": "tests/test_cli.py::"
            "test_without_basicsr_the_help_works_and_a_command_says_what_to_install",
        },
    ),
    Row(
        "R24",
        "tiling",
        "local layers: tiled = full within 1e-5; global layers: the deviation is measured and said",
        {
            "local": "tests/test_inference.py::"
            "test_a_local_network_gives_the_whole_image_when_the_overlap_covers_its_reach",
            "without attention": "tests/test_inference.py::test_a_network_without_attention_is_the_same_in_tiles",
            "global": "tests/test_inference.py::test_attention_sees_its_tile_only_and_blending_keeps_close",
        },
    ),
    Row(
        "R25",
        "memory",
        "sparse path at 256x256x64: at most 8 feature maps, no tensor over 4·N·3w bytes",
        {"LCoA alone": "tests/reliability/test_memory.py"},
    ),
    Row(
        "R26",
        "metric and degradation",
        "bicubic's published PSNR within 0.01 dB; MATLAB LR files to the last bit",
        {
            "degradation": "tests/test_degradation.py",
            "demo": "tests/test_demo.py::test_low_resolution_is_what_matlab_would_make",
        },
        "The published PSNR needs Set5's images, which cannot be shipped or fetched by a test; no file that MATLAB "
        "wrote is at hand either, so the formulae are held to BasicSR's (one grey level) and to taps worked out by "
        "hand.",
    ),
    Row(
        "R28",
        "mutation testing",
        "a seeded sample of at least 300 mutants: 85 % killed in functional and layers, 70 % elsewhere, with the "
        "interval; at most 5 % excused as equivalent, each with its reason",
        {"the sample and its figures": "tests/mutants/test_mutants.py"},
        "See [the report](mutants.md).",
    ),
    Row(
        "R29",
        "platforms",
        "what can be installed here is run here; the rest (Python 3.10-3.13, oldest torch, numpy 1.26) stands in the "
        "CI workflow and is marked unverified",
        {"the workflow": "tests/reliability/test_workflow.py"},
        "Unverified: all of `.github/workflows/ci.yml`. Verified is the environment named above. Besides, layers were "
        "compiled and exported with torch 2.11 on the CPU, and most tests ran with it on an H100 (docs/backends.md).",
    ),
    Row(
        "R30",
        "security",
        "SECURITY.md, weights_only everywhere, no eval, exec or pickle in our code (an AST test)",
        {"our code": "tests/reliability/test_security.py"},
    ),
]

NUMBERS = [f"R{n}" for n in range(1, 31) if n != 27]
"""All rows that there are: no promise ever had the number 27."""


def matches(pattern: str, nodeid: str) -> bool:
    """Return whether a test is meant by a pattern (see `Row`)."""
    test, _, case = nodeid.partition("[")
    wanted, _, end = pattern.partition("[")
    if "::" not in wanted:
        return test.startswith((f"{wanted}::", f"{wanted}/"))
    return test == wanted and (not end or case.endswith(end))


def unknown(patterns: Iterable[str]) -> list[str]:
    """Return the patterns that name no test of the source."""
    missing = []
    for pattern in patterns:
        file, _, test = pattern.partition("[")[0].partition("::")
        path = ROOT / file
        if path.is_dir() and not test:
            continue
        names = (
            {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}
            if (path.is_file())
            else set()
        )
        if not path.is_file() or (test and test not in names):
            missing.append(pattern)
    return missing


# --- a run ------------------------------------------------------------------------------------------------------------


class Notes:
    """Gathers what tests reached; works with pytest-xdist, whose reports carry the properties."""

    def __init__(self) -> None:
        self.tests: dict[str, str] = {}
        self.figures: dict[str, list[tuple[str, float]]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.failed or report.skipped:
            self.tests[report.nodeid] = report.outcome
            self.figures[report.nodeid] = [(str(name), float(value)) for name, value in report.user_properties]

    def reached(self) -> dict[str, dict[str, Any]]:
        """Return, for each test (of the contract for each clause), how many cases passed and the figures."""
        found: dict[str, dict[str, Any]] = {}
        for nodeid, outcome in sorted(self.tests.items()):
            note = found.setdefault(_name(nodeid), {})
            note[outcome] = note.get(outcome, 0) + 1
            for figure, value in self.figures[nodeid]:
                note.setdefault("figures", {}).setdefault(figure, []).append(value)
        for note in found.values():
            if "figures" in note:
                note["figures"] = {figure: _summary(figure, values) for figure, values in note["figures"].items()}
        return found


def _name(nodeid: str) -> str:
    test, _, case = nodeid.partition("[")
    return f"{test}[: {case.rpartition(': ')[2]}" if test == CONTRACT else test


def gathered(tests: Mapping[str, Mapping[str, Any]], pattern: str) -> dict[str, Any]:
    """Return what all tests meant by a pattern reached together; empty if none ran."""
    notes = [note for name, note in tests.items() if matches(pattern, name)]
    total: dict[str, Any] = {}
    figures: dict[str, list[float]] = {}
    for note in notes:
        for kind in ("passed", "failed", "skipped"):
            if kind in note:
                total[kind] = total.get(kind, 0) + note[kind]
        for figure, value in note.get("figures", {}).items():
            figures.setdefault(figure, []).append(value)
    if total:
        total["figures"] = {figure: _summary(figure, values) for figure, values in sorted(figures.items())}
    return total


def _summary(name: str, values: Sequence[float]) -> float:
    if name.startswith("total "):
        return sum(values)
    return min(values) if name.startswith("least ") else max(values)


def run(arguments: Sequence[str]) -> int:
    """Run the tests of all rows and note what they reached; return pytest's exit code."""
    files = sorted({pattern.partition("[")[0] for row in ROWS for pattern in row.tests.values()})
    chosen = [argument for argument in arguments if argument.startswith("tests/")]
    options = [argument for argument in arguments if argument not in chosen]
    if chosen:
        files = [file for file in files if file.startswith(tuple(chosen))]
    notes = Notes()
    code = pytest.main(["-q", "--hypothesis-profile=ci", *options, *files], plugins=[notes])
    import numpy
    import torch

    before = json.loads(NOTES.read_text())["tests"] if NOTES.exists() else {}
    wanted = {pattern for row in ROWS for pattern in row.tests.values()}
    tests = {
        name: note
        for name, note in sorted({**before, **notes.reached()}.items())
        if any(matches(pattern, name) for pattern in wanted) and not unknown([name])
    }
    environment = {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "machine": platform.machine(),
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }
    content = {"environment": environment, "tests": tests}
    NOTES.write_text(json.dumps(content, indent=1) + "\n")
    return int(code)


# --- the page ---------------------------------------------------------------------------------------------------------


def page(notes: Mapping[str, Any]) -> str:
    """Return the page made of the notes of a run."""
    environment = ", ".join(f"{name} {value}" for name, value in notes["environment"].items())
    lines = [
        "# Reliability",
        "",
        "What the library promises, and what the tests reached: made by `make promises` from a run of the tests,",
        "noted in `docs/reliability.json`, not by hand. A count is of cases that passed. Environment of the run:",
        f"{environment}.",
        "",
    ]
    for row in ROWS:
        lines += [f"## {row.number}: {row.promise}", "", f"Promised: {row.promised}.", ""]
        lines += [f"- {_reached(name, gathered(notes['tests'], pattern))}" for name, pattern in row.tests.items()]
        if row.missing:
            lines += ["", f"*{row.missing}*"]
        tests = dict.fromkeys(f"<code>{escape(_short(pattern))}</code>" for pattern in row.tests.values())
        lines += ["", "<details><summary>the tests</summary>", "<br>\n".join(tests), "</details>", ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def _reached(name: str, note: Mapping[str, Any]) -> str:
    if not note:
        return f"{name}: not run"
    passed, failed, skipped = (note.get(kind, 0) for kind in ("passed", "failed", "skipped"))
    text = (
        f"{name}: {passed}" + (f", **{failed} failed**" if failed else "") + (f", {skipped} skipped" if skipped else "")
    )
    figures = ", ".join(f"{figure} {value:.3g}" for figure, value in note["figures"].items())
    return f"{text} ({figures})" if figures else text


def _short(pattern: str) -> str:
    file, _, test = pattern.partition("::")
    return f"{Path(file).name}::{test}" if test else file


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("run", "page"))
    known, rest = parser.parse_known_args()
    if known.command == "run":
        return run(rest)
    PAGE.write_text(page(json.loads(NOTES.read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
