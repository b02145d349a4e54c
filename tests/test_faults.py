"""Seeded faults: each breaks one function in one place, and a named test must notice.

A fault names a function and a change of its syntax tree, never a line of source. The broken module stands in a copy of
the packages; the test runs against that copy and has to fail by an assertion. Run them with
`pytest tests/test_faults.py -m slow`. For changes that nobody thought of, see `make mutants`.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
Nodes = list[ast.AST]
Change = Callable[[ast.FunctionDef], None]

# --- changes ----------------------------------------------------------------------------------------------------------

OPERATORS = {
    "+": ast.Add, "-": ast.Sub, "*": ast.Mult, "/": ast.Div, "//": ast.FloorDiv, "%": ast.Mod, "|": ast.BitOr,
    "&": ast.BitAnd, "<": ast.Lt, "<=": ast.LtE, ">": ast.Gt, ">=": ast.GtE, "==": ast.Eq, "!=": ast.NotEq,
    "and": ast.And, "or": ast.Or,
}  # fmt: skip


def found(function: ast.FunctionDef, at: int, wanted: Callable[[ast.AST], bool]) -> ast.AST:
    """Return the `at`-th node of the function that is wanted, in the order of the source."""
    nodes = [node for node in ast.walk(function) if wanted(node)]
    nodes.sort(key=place)
    if at >= len(nodes):
        raise LookupError(f"{function.name} has {len(nodes)} such places, not {at + 1}")
    return nodes[at]


def place(node: ast.AST) -> tuple[int, int]:
    """Return where a node stands; for an operation, where its operator does."""
    left = getattr(node, "left", None) or getattr(node, "target", None)
    if isinstance(left, ast.expr):
        return left.end_lineno or 0, left.end_col_offset or 0
    return node.lineno, node.col_offset  # type: ignore[attr-defined]


def swap(old: str, new: str, at: int = 0) -> Change:
    """Replace an operator."""

    def change(function: ast.FunctionDef) -> None:
        def wanted(node: ast.AST) -> bool:
            own = [getattr(node, "op", None), *getattr(node, "ops", [])]
            return not isinstance(node, ast.UnaryOp) and any(isinstance(each, OPERATORS[old]) for each in own)

        node = found(function, at, wanted)
        if isinstance(node, ast.Compare):
            node.ops = [OPERATORS[new]() if isinstance(op, OPERATORS[old]) else op for op in node.ops]
        else:
            node.op = OPERATORS[new]()  # type: ignore[attr-defined]

    return change


def constant(old: object, new: object, at: int = 0) -> Change:
    """Replace a number, a text or a truth value."""

    def change(function: ast.FunctionDef) -> None:
        def wanted(node: ast.AST) -> bool:
            return isinstance(node, ast.Constant) and type(node.value) is type(old) and node.value == old

        found(function, at, wanted).value = new  # type: ignore[attr-defined]

    return change


def decide(value: bool, at: int = 0) -> Change:
    """Replace the condition of an `if`, as a statement or in an expression."""

    def change(function: ast.FunctionDef) -> None:
        found(function, at, lambda node: isinstance(node, ast.If | ast.IfExp)).test = ast.Constant(value)  # type: ignore[attr-defined]

    return change


def unsigned(at: int = 0) -> Change:
    """Drop a minus sign or a `not`."""

    def change(function: ast.FunctionDef) -> None:
        node = found(function, at, lambda node: isinstance(node, ast.UnaryOp))
        replace(function, node, node.operand)  # type: ignore[attr-defined]

    return change


def drop(name: str, at: int = 0) -> Change:
    """Replace a call by what it is called on: `x.name(...)` or `name(x, ...)` by `x`."""

    def change(function: ast.FunctionDef) -> None:
        call = found(function, at, lambda node: called(node) == name)
        assert isinstance(call, ast.Call)
        module = isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) in ("torch", "F", "nn", "tl")
        method = isinstance(call.func, ast.Attribute) and not module
        replace(function, call, call.func.value if method else call.args[0])  # type: ignore[attr-defined]

    return change


def turn(name: str, at: int = 0) -> Change:
    """Exchange the last two arguments of a call."""

    def change(function: ast.FunctionDef) -> None:
        call = found(function, at, lambda node: called(node) == name)
        call.args[-2:] = call.args[:-3:-1]  # type: ignore[attr-defined]

    return change


def forget(keyword: str, at: int = 0) -> Change:
    """Leave a keyword argument out of a call."""

    def change(function: ast.FunctionDef) -> None:
        def wanted(node: ast.AST) -> bool:
            return isinstance(node, ast.Call) and any(each.arg == keyword for each in node.keywords)

        call = found(function, at, wanted)
        call.keywords = [each for each in call.keywords if each.arg != keyword]  # type: ignore[attr-defined]

    return change


def called(node: ast.AST) -> str | None:
    return ast.unparse(node.func).rpartition(".")[2] if isinstance(node, ast.Call) else None


def replace(function: ast.FunctionDef, old: ast.AST, new: ast.AST) -> None:
    class Replacing(ast.NodeTransformer):
        def visit(self, node: ast.AST) -> ast.AST:
            return new if node is old else self.generic_visit(node)

    Replacing().visit(function)


# --- the table --------------------------------------------------------------------------------------------------------

PACKAGE, BASICSR = "sparse_sr_attn", "integrations/sparse_sr_attn_basicsr"
MODULES = {
    "layout": f"{PACKAGE}/functional/cluster/layout.py",
    "cluster": f"{PACKAGE}/functional/cluster/__init__.py",
    "eager": f"{PACKAGE}/functional/cluster/eager.py",
    "tiles": f"{PACKAGE}/functional/cluster/tiles.py",
    "kernels": f"{PACKAGE}/functional/cluster/triton_kernels.py",
    "kmeans": f"{PACKAGE}/functional/kmeans.py",
    "lsh": f"{PACKAGE}/functional/lsh.py",
    "precision": f"{PACKAGE}/functional/_torch.py",
    "l2_normalize": f"{PACKAGE}/functional/l2_normalize.py",
    "windows": f"{PACKAGE}/functional/window/tiles.py",
    "grid": f"{PACKAGE}/functional/window/grid.py",
    "shift": f"{PACKAGE}/functional/shift.py",
    "batch_norm": f"{PACKAGE}/functional/batch_norm.py",
    "layer": f"{PACKAGE}/layers/base.py",
    "lcoa": f"{PACKAGE}/layers/lcoa.py",
    "gmsa": f"{PACKAGE}/layers/gmsa.py",
    "norm": f"{PACKAGE}/layers/batch_norm.py",
    "read": f"{PACKAGE}/checkpoints/read.py",
    "layouts": f"{PACKAGE}/checkpoints/layouts.py",
    "data": f"{BASICSR}/data.py",
    "model": f"{BASICSR}/model.py",
    "state": f"{BASICSR}/state.py",
}
TESTS = {
    "cluster": "tests/functional/cluster/test_cluster.py",
    "rounds": "tests/functional/cluster/test_rounds.py",
    "triton": "tests/functional/cluster/test_triton.py",
    "kmeans": "tests/functional/test_kmeans.py",
    "lsh": "tests/functional/test_lsh.py",
    "sizes": "tests/functional/test_sizes.py",
    "window": "tests/functional/window/test_window.py",
    "shift": "tests/functional/test_shift.py",
    "batch_norm": "tests/functional/test_batch_norm.py",
    "contract": "tests/layers/test_conformance.py",
    "one_update": "tests/layers/test_one_update.py",
    "distributed": "tests/layers/test_distributed.py",
    "gmsa": "tests/layers/test_gmsa.py",
    "elan": "tests/backbones/test_elan.py",
    "checkpoints": "tests/checkpoints/test_load.py",
    "model": "tests/integrations/test_model.py",
    "resume": "tests/integrations/test_resume.py",
}
"""Where modules and tests are: the only place to change when they move."""


@dataclass(frozen=True)
class Fault:
    """One change that must not go unnoticed.

    Attributes:
        name: what goes wrong.
        function: `module:function` or `module:Class.method`, with a module of `MODULES`.
        change: what is done to it.
        test: `file:test`, with a file of `TESTS`; all cases of the test, or one.
    """

    name: str
    function: str
    change: Change
    test: str

    @property
    def node(self) -> str:
        file, _, test = self.test.partition(":")
        return f"{TESTS[file]}::{test}"


DENSE = "cluster:test_attention_equals_masked_dense_attention"
LOOPS = "cluster:test_weights_equal_loops"
FAULTS = [
    # --- which keys a token sees
    Fault("padding is visible", "layout:ClusterLayout.visible", swap("<", "<="), DENSE),
    Fault("the first chunk of a ring is unseen", "layout:ClusterLayout.visible", swap(">=", ">"), DENSE),
    Fault("a chunk met twice counts twice", "layout:ClusterLayout.visible", swap("&", "|"), DENSE),
    Fault("published counting hides keys", "layout:ClusterLayout.visible", decide(False), DENSE),
    Fault("padding is visible (tiles)", "layout:ClusterLayout.hidden", decide(False, 4), DENSE),
    Fault("a chunk met twice counts twice (tiles)", "layout:ClusterLayout.hidden", decide(False, 3), DENSE),
    Fault(
        "every chunk hides as much as the last (tiles)", "layout:ClusterLayout.hidden", swap("and", "or", 1),
        "cluster:test_hidden_is_what_is_not_visible",
    ),
    Fault("other tokens fill the last chunk", "layout:ClusterLayout.rank", swap("-", "+", 1), DENSE),
    Fault("neighbours are swapped", "eager:Eager._with_adjacent", unsigned(), LOOPS),
    Fault(
        "tokens of a cluster stand in reverse", "cluster:cluster_pattern", swap("+", "-"),
        "cluster:test_order_sorts_by_cluster_then_position",
    ),
    Fault(
        "the sorting key mixes clusters", "cluster:cluster_pattern", swap("*", "+"),
        "cluster:test_order_sorts_by_cluster_then_position",
    ),
    Fault(
        "chunks of nothing pass", "cluster:cluster_pattern", decide(False, 1),
        "cluster:test_impossible_chunks_are_refused",
    ),
    # --- cluster attention
    Fault("hidden keys are seen", "eager:Eager.scores", drop("masked_fill"), DENSE),
    Fault("results are sorted again instead of back", "eager:Eager.to_tokens", turn("scatter"), DENSE),
    Fault("the scale is dropped (tiles)", "tiles:_Scored.scores", decide(True), DENSE),
    Fault("the scale is dropped in the backward (tiles)", "tiles:_ScoreGrads.add", decide(False), DENSE),
    Fault("empty slots send gradients (tiles)", "tiles:_Sorted.real_chunks", constant(0, 1, 1), DENSE),
    Fault("what is sent back is not transposed (tiles)", "tiles:_Sorted.send_back", drop("transpose"), DENSE),
    Fault("gradients around the ring are subtracted (tiles)", "tiles:_Sorted.halo_to_tokens", swap("+", "-", 4), DENSE),
    Fault("fillers of the last chunk send no gradient (tiles)", "tiles:_Sorted.halo_to_tokens", decide(False), DENSE),
    Fault("the first chunk is left out (tiles)", "tiles:_Sorted.tiles", constant(0, 1), DENSE),
    Fault(
        "keys are not brought to unit length (tiles)", "tiles:_Scored.__init__", decide(False),
        "cluster:test_normalised_keys_are_unit_keys",
    ),
    Fault(
        "the floor of short keys has a gradient", "l2_normalize:l2_normalize_backward", drop("masked_fill_"),
        "cluster:test_normalised_keys_are_unit_keys",
    ),
    Fault(
        "the higher precision multiplies", "precision:lower_precision", swap("<", ">"),
        "cluster:test_weights_and_values_meet_in_the_lower_precision",
    ),
    Fault("the normaliser of a round is wrong (tiles)", "tiles:_Scored.weights", drop("log"), "rounds:"),
    Fault("the normaliser sends no gradient (tiles)", "tiles:_ScoreGrads.add_of_weights", decide(False), "rounds:"),
    Fault("rounds are not weighed", "cluster:cluster_attention_rounds", drop("softmax"), "rounds:"),
    Fault(
        "the kernel does not rescale its running sum", "kernels:forward", swap("*", "+", 3),
        "triton:test_attention_equals_masked_dense_attention",
    ),
    Fault("the normaliser of the kernel is wrong", "kernels:forward", drop("log"), "triton:test_lse_equals_dense"),
    # --- k-means and hashing
    Fault(
        "centroids move in a recomputation", "kmeans:_kmeans_step", decide(False),
        "kmeans:test_nothing_moves_while_a_backward_runs",
    ),
    Fault(
        "centroids move between accumulated steps", "kmeans:_kmeans_step", decide(True, 1),
        "one_update:test_parts_teach_what_the_whole_batch_does",
    ),
    Fault(
        "of accumulated steps only the last counts", "kmeans:_store_pending", decide(False, 4),
        "kmeans:test_accumulated_steps_are_one_step_on_all_their_tokens",
    ),
    Fault(
        "what was applied stays pending", "kmeans:apply_pending", drop("zero_"),
        "one_update:test_parts_teach_what_the_whole_batch_does",
    ),
    Fault("large clusters pull harder", "kmeans:move_centroids", drop("_unit"), "kmeans:test_movement_equals_loops"),
    Fault("centroids lose unit length", "kmeans:move_centroids", drop("_unit", 1), "kmeans:test_movement_equals_loops"),
    Fault("an update is too large", "kmeans:move_centroids", swap("-", "+"), "kmeans:test_movement_equals_loops"),
    Fault(
        "the living are reseeded, not the dead", "kmeans:_apply_pending", swap("<", ">"),
        "kmeans:test_dead_clusters_come_back_to_life",
    ),
    Fault("the decay does not warm up", "kmeans:_apply_pending", constant(10, 1), "kmeans:test_steps_equal_the_twin"),
    Fault("updates are not counted", "kmeans:_apply_pending", drop("add_"), "kmeans:test_steps_equal_the_twin"),
    Fault(
        "NaN gets into the buffers", "kmeans:_store_pending", drop("isfinite"),
        "kmeans:test_a_token_that_is_not_finite_spoils_nothing",
    ),
    Fault(
        "long tokens weigh more", "kmeans:cluster_sums", drop("_unit"), "kmeans:test_length_of_a_token_does_not_matter"
    ),
    Fault(
        "all tokens go to the last cluster", "kmeans:_nearest_by_blocks", drop("mul_"), "kmeans:test_nearest_is_argmax"
    ),
    Fault(
        "processes keep their statistics to themselves", "kmeans:_store_pending", decide(False, 3),
        "distributed:test_two_processes_are_one",
    ),
    Fault(
        "a recomputation draws a new hash", "lsh:_hash_step", decide(True), "lsh:test_a_checkpointed_step_draws_once"
    ),
    Fault("buckets point the other way", "lsh:hash_tokens", swap("<", ">", 1), "lsh:test_buckets_equal_loops"),
    # --- windows
    Fault("pads are visible", "windows:_weights_of", decide(False, 1), "window:test_pads_have_no_weight"),
    Fault("the scale is dropped (windows)", "windows:_weights_of", decide(False), "window:"),
    Fault(
        "shared queries get the gradient of one side", "windows:_scores_backward", drop("transpose"),
        "window:test_queries_may_be_the_keys",
    ),
    Fault("pads are where they were before the shift", "grid:WindowGrid.pixels", swap("+", "-", 1), "window:"),
    Fault("windows do not move", "gmsa:window_shifts", decide(True), "elan:test_equals_released_code"),
    Fault(
        "one convolution for two forgets the mean", "batch_norm:fold", swap("-", "+"),
        "elan:test_folding_is_exact_and_leaves_training_alone",
    ),
    Fault("borders stay where zeros come in", "shift:shift2d", drop("zeros_like"), "shift:test_shift_equals_loops"),
    Fault(
        "statistics move in a recomputation", "batch_norm:move_op", decide(False),
        "batch_norm:test_nothing_moves_while_a_backward_runs",
    ),
    Fault(
        "statistics that are not finite are taken over", "batch_norm:move_op", drop("isfinite"),
        "batch_norm:test_a_batch_that_is_not_finite_moves_nothing",
    ),
    Fault("the variance is the biased one", "batch_norm:move_op", swap("*", "/"), "batch_norm:"),
    # --- layers
    Fault(
        "evaluation moves k-means", "lcoa:LSP.updates_state", swap("and", "or"),
        "contract:test_contract[LSP: evaluation moves nothing]",
    ),
    Fault(
        "a decay of one does not freeze", "lcoa:LSP.updates_state", swap("<", "<="),
        "contract:test_a_decay_of_one_freezes_the_centroids",
    ),
    Fault(
        "res_scale is ignored", "layer:add_rows", forget("alpha"),
        "contract:test_res_scale_is_read_when_it_is_used",
    ),
    Fault(
        "a layer ignores the state that it is given", "lcoa:LCoA.forward", decide(True),
        "contract:test_contract[LCoA sharing: state of another size is refused]",
    ),
    Fault(
        "stored weights have keys of any length", "lcoa:_weights", forget("normalize_keys"),
        "contract:test_contract[LCoA sharing: sharing with oneself changes nothing]",
    ),
    Fault(
        "a map is read by columns", "layer:tokens", constant("b c h w -> b (h w) c", "b c h w -> b (w h) c"),
        "sizes:test_every_size",
    ),
    # --- loading and resuming
    Fault(
        "code in a file runs", "read:read_file", constant(True, False),
        "checkpoints:test_unreadable_files_give_one_clear_error",
    ),
    Fault(
        "weights that repeat one number are taken", "read:_checked", swap(">", "<"),
        "checkpoints:test_bad_contents_give_one_clear_error",
    ),
    Fault(
        "released queries are taken for values", "layouts:_released_elan", constant(1, 0),
        "elan:test_equals_released_code",
    ),
    Fault("the average keeps old buffers", "model:SparseSRModel.model_ema", drop("_foreach_copy_"), "model:"),
    Fault(
        "a resumed epoch starts again", "data:RunSampler.__iter__", swap("==", "!="),
        "resume:test_stopped_at_10_of_20_and_resumed_is_bit_equal",
    ),
    Fault(
        "hostile states are read", "state:_read", constant(True, False),
        "resume:test_a_named_state_that_is_none_is_refused",
    ),
]  # fmt: skip


def broken(fault: Fault) -> str:
    """Return the source of the module with the fault.

    Raises:
        LookupError: there is no such function, or no such place in it.
    """
    module, _, path = fault.function.partition(":")
    tree = ast.parse((ROOT / MODULES[module]).read_text(encoding="utf-8"))
    before = ast.dump(tree)
    node: ast.AST = tree
    for name in path.split("."):
        inside = [n for n in getattr(node, "body", []) if getattr(n, "name", None) == name]
        if not inside:
            raise LookupError(f"{MODULES[module]} has no {path}")
        node = inside[0]
    assert isinstance(node, ast.FunctionDef)
    fault.change(node)
    assert ast.dump(tree) != before
    return ast.unparse(ast.fix_missing_locations(tree))


# --- as tests ---------------------------------------------------------------------------------------------------------


def test_every_fault_can_be_made() -> None:
    """Fails when a function is gone: name the one that does its work now, or take the fault out."""
    for fault in FAULTS:
        compile(broken(fault), fault.function, "exec")
        assert (ROOT / fault.node.partition("::")[0]).is_file(), fault.name


@pytest.mark.promise("R28")
@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault_is_noticed(fault: Fault, tmp_path: Path) -> None:
    for package in ("sparse_sr_attn", "integrations"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    module = MODULES[fault.function.partition(":")[0]]
    (tmp_path / module).write_text(broken(fault), encoding="utf-8")
    report = tmp_path / "report.json"
    command = [sys.executable, __file__, str(tmp_path), str(report), fault.node.removesuffix("::")]
    path = os.pathsep.join([str(tmp_path), str(tmp_path / "integrations")])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert report.exists(), done.stdout[-2000:] + done.stderr[-2000:]
    failure = json.loads(report.read_text())
    assert failure, f"{fault.node} stays green"
    assert failure["assertion"], f"{fault.node} fails, but not by an assertion: {failure['error']}"


# --- in the copy ------------------------------------------------------------------------------------------------------


class Recorder:
    """Remembers why a test failed."""

    def __init__(self) -> None:
        self.failure: dict[str, object] = {}

    def pytest_runtest_makereport(self, call: pytest.CallInfo[None]) -> None:
        if call.excinfo is not None and not call.excinfo.errisinstance(pytest.skip.Exception) and not self.failure:
            wanted = (AssertionError, pytest.fail.Exception)
            assertion = any(isinstance(error, wanted) for error in leaves(call.excinfo.value))
            self.failure = {"assertion": assertion, "error": repr(call.excinfo.value)[:300]}


def leaves(error: BaseException) -> Iterator[BaseException]:
    """Yield the exceptions in a group, or the exception itself."""
    for inner in getattr(error, "exceptions", ()):
        yield from leaves(inner)
    yield error


def main(root: str, report: str, test: str) -> None:
    recorder = Recorder()
    pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-m", "not slow", test], plugins=[recorder])
    import sparse_sr_attn  # not before pytest, which wants to be first where its plugins are concerned

    assert Path(root).resolve() in Path(sparse_sr_attn.__file__).resolve().parents
    Path(report).write_text(json.dumps(recorder.failure), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
