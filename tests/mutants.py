"""Mutation testing: make one small change to the code and see whether a test fails.

    python tests/mutants.py                     run the sample, or go on where it stopped; then report
    python tests/mutants.py --known OTHER.jsonl try first the test that killed a mutant in another run

The changes are cosmic-ray's operators. Its own runner knows one test command for all mutants, which would take
minutes each; here the tests of a mutant are those of its module (`tests_of`), cut off after `SECONDS`. Results go to
build/mutants.jsonl, which is not kept under version control.

The sample is a seeded one of places, not of changes: `+` has a dozen replacements and `not` has one, so each place
gets one of its replacements.
"""

import argparse
import ast
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")  # as tests/conftest.py has it; triton asks when it is imported

import pytest
import torch
import torch._dynamo  # before the forks, for speed
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

ROOT = Path(__file__).resolve().parents[1]
PARTS = {
    "functional": ("sparse_sr_attn/functional", "tests/functional"),
    "layers": ("sparse_sr_attn/layers", "tests/layers"),
    "integrations": ("integrations/sparse_sr_attn_basicsr", "tests/integrations"),
}
"""Parts of the code that mutants are drawn from, and the tests of each."""
CONTRACT = "tests/layers/test_conformance.py"
SECONDS = 20
"""CPU time that the tests of one mutant take at most; what would fail later counts as survived."""
SEED = 7
UNUSED = ("core/VariableReplacer", "core/VariableInserter")  # they must be told which variables


@dataclass(frozen=True)
class Mutant:
    """One change: the `occurrence`-th place in `file` that `operator` can change."""

    part: str
    file: str
    line: int
    operator: str
    occurrence: int

    def source(self, root: Path = ROOT) -> str:
        """Return the file with the change."""
        code = mutate_code(
            (root / self.file).read_text(encoding="utf-8"), get_operator(self.operator)(), self.occurrence
        )
        assert code is not None, self
        return str(code)


def annotations(tree: ast.Module) -> set[int]:
    """Return the lines of annotations with nothing else on them, and of what only type checkers see."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            lines |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        elif isinstance(node, ast.FunctionDef):
            heads = [argument.lineno for argument in [*node.args.args, *node.args.kwonlyargs] if argument.annotation]
            defaults = {default.lineno for default in [*node.args.defaults, *node.args.kw_defaults] if default}
            lines |= set(heads) - defaults
        elif isinstance(node, ast.AnnAssign) and node.value is None:
            lines.add(node.lineno)
    return lines


def sample(size: int, seed: int = SEED) -> list[Mutant]:
    """Return so many mutants of each part, the parts in turn."""
    dice = random.Random(seed)  # noqa: S311
    drawn: list[list[Mutant]] = []
    for part, (folder, _) in PARTS.items():
        places: dict[tuple[str, str, int, int], list[Mutant]] = defaultdict(list)
        for path in sorted((ROOT / folder).rglob("*.py")):
            file, source = path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
            skipped, nodes = annotations(ast.parse(source)), list(ast_nodes(get_ast(source)))
            for name in sorted(operator_names()):
                if name.startswith(UNUSED):
                    continue
                operator, kind = get_operator(name)(), name.split("_")[0]
                positions = [start for node in nodes for start, _ in operator.mutation_positions(node)]
                for occurrence, (line, column) in enumerate(positions):
                    if line not in skipped:
                        places[kind, file, line, column].append(Mutant(part, file, line, name, occurrence))
        order = list(places.values())
        dice.shuffle(order)
        chosen = [dice.choice(alternatives) for alternatives in order[: 2 * size]]
        drawn.append([mutant for mutant in chosen if compiles(mutant)][:size])
    return [mutant for turn in zip(*drawn, strict=True) for mutant in turn]


def compiles(mutant: Mutant) -> bool:
    """Return whether the change is Python: the star before keyword-only arguments is no multiplication."""
    try:
        ast.parse(mutant.source())
    except SyntaxError:
        return False
    return True


def tests_of(mutant: Mutant) -> list[str]:
    """Return the test files for a mutant: named after its module first, then small ones."""
    files = sorted((ROOT / PARTS[mutant.part][1]).rglob("test_*.py"), key=lambda file: file.stat().st_size)
    words = set(Path(mutant.file).stem.split("_"))
    files.sort(key=lambda file: -len(words & set(file.stem.split("_")[1:])))
    names = [file.relative_to(ROOT).as_posix() for file in files]
    if mutant.part == "layers":  # the contract knows every layer
        named = sum(bool(words & set(file.stem.split("_")[1:])) for file in files)
        names.remove(CONTRACT)
        names.insert(named, CONTRACT)
    return names


def _cpu() -> float:
    return sum(os.times()[:4])


class Recorder:
    """Stops at the deadline and remembers what failed."""

    def __init__(self) -> None:
        self.end = _cpu() + SECONDS
        self.ran = 0
        self.failure: dict[str, str] = {}

    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> None:
        self.ran += call.when == "call"
        skipped = call.excinfo is not None and call.excinfo.errisinstance(pytest.skip.Exception)
        if call.excinfo is not None and not skipped and not self.failure:
            assertion = call.excinfo.errisinstance(AssertionError)
            self.failure = {"by": item.nodeid, "kind": "assertion" if assertion else "error"}
        if _cpu() > self.end:
            item.session.shouldstop = "out of time"

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and not self.failure:
            self.failure = {"by": report.nodeid, "kind": "import"}


def tested(tree: Path, tests: list[str], outcome: Path) -> None:
    """Run the tests against the packages in `tree`; in a fork, which ends here."""
    os.setsid()
    paths = [str(tree), str(tree / "integrations")]
    sys.path[:0] = paths
    sys.dont_write_bytecode = True
    os.environ |= {"PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    log = os.open(outcome.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1), os.dup2(log, 2)
    recorder = Recorder()
    options = ["-q", "-x", "-p", "no:cacheprovider", "--hypothesis-profile=brief", "-m", "not slow", "--tb=short"]
    pytest.main([*options, *tests], plugins=[recorder])
    import sparse_sr_attn  # not before pytest, which wants to be first where its plugins are concerned

    inside = tree in Path(sparse_sr_attn.__file__).resolve().parents if sparse_sr_attn.__file__ else False
    outcome.write_text(json.dumps({"inside": inside, "ran": recorder.ran, **recorder.failure}))


def result_of(tree: Path, tests: list[str]) -> dict[str, Any]:
    """Run the tests against `tree` in a fork and return what came of it."""
    outcome = tree.parent / "outcome.json"
    outcome.unlink(missing_ok=True)
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            tested(tree, tests, outcome)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(0)
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        if time.monotonic() - start > 20 * SECONDS:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return {"kind": "timeout"}
        time.sleep(0.05)
    result: dict[str, Any] = json.loads(outcome.read_text()) if outcome.exists() else {"kind": "crash"}
    return result | {"seconds": round(time.monotonic() - start, 1)}


def run(results: Path, size: int, minutes: float, known: dict[str, str]) -> None:
    """Run the sample, but for the mutants that have a result."""
    done = {json.dumps(line["mutant"]) for line in read(results)}
    folder = results.parent / results.stem
    tree = folder / "tree"
    shutil.rmtree(folder, ignore_errors=True)
    for package in ("sparse_sr_attn", "integrations"):
        shutil.copytree(ROOT / package, tree / package, ignore=shutil.ignore_patterns("__pycache__"))
    os.chdir(ROOT)
    torch.set_num_threads(1)
    for file in ("functional/test_kmeans.py", "functional/test_cluster_triton.py", "integrations/test_options.py"):
        untouched = result_of(tree, [f"tests/{file}"])
        assert untouched.get("inside"), untouched
        assert "kind" not in untouched, f"tests fail without a mutant: {untouched}"
    end = time.monotonic() + 60 * minutes
    for mutant in sample(size):
        key = json.dumps(asdict(mutant))
        if key in done or time.monotonic() > end:
            continue
        file = tree / mutant.file
        before, after = file.read_text(encoding="utf-8"), mutant.source()
        file.write_text(after, encoding="utf-8")
        killer, result = known.get(key), {}
        if killer and (ROOT / killer.partition("::")[0]).exists():
            result = result_of(tree, [killer])
            if result.get("by", "").partition("[")[0] != killer.partition("[")[0]:  # gone, or it passes
                result = {}
        if "kind" not in result:
            result = result_of(tree, tests_of(mutant))
        file.write_text(before, encoding="utf-8")
        lines = zip(before.splitlines(), after.splitlines(), strict=False)
        change = next(([one.strip(), other.strip()] for one, other in lines if one != other), ["", ""])
        with results.open("a", encoding="utf-8") as output:
            output.write(json.dumps({"mutant": asdict(mutant), "change": change, **result}) + "\n")
        print(
            f"{result.get('kind', 'SURVIVED'):9}  {result.get('seconds', 0):5}  {mutant.file}:{mutant.line}", flush=True
        )


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def report(results: list[dict[str, Any]]) -> None:
    """Print the share killed and the survivors."""
    for part in PARTS:
        own = [result for result in results if result["mutant"]["part"] == part]
        killed = sum("kind" in result for result in own)
        print(f"{part}: {killed} of {len(own)} killed")
    for result in results:
        if "kind" not in result:
            print(f"{result['mutant']['file']}:{result['mutant']['line']}", *result["change"], sep="\n    ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "mutants.jsonl")
    parser.add_argument("--size", type=int, default=60, help="mutants of each part (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=1e6, help="start no mutant after so many")
    parser.add_argument("--known", type=Path, help="results of another run")
    arguments = parser.parse_args()
    known = {json.dumps(r["mutant"]): r["by"] for r in read(arguments.known) if "by" in r} if arguments.known else {}
    arguments.results.parent.mkdir(exist_ok=True, parents=True)
    run(arguments.results.resolve(), arguments.size, arguments.minutes, known)
    report(read(arguments.results))


if __name__ == "__main__":
    main()
