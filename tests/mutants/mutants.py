"""Mutation testing: change the code in one small place, and see whether a test turns red.

    python tests/mutants/mutants.py run [--jobs 2] [--minutes 60]     goes on where it stopped
    python tests/mutants/mutants.py report                            writes docs/mutants.json and docs/mutants.md

The changes are cosmic-ray's operators. Its runner is not used: it knows one test command for all mutants, while the
whole suite takes minutes a mutant; mutmut, which does select tests, leaves out all that is decorated, here the
constructors and the operators. So the suite runs once under coverage, and each mutant is met by the tests that reach
its statement, the fastest first, in a fork of a process that has imported torch already.

The sample is a seeded one of places, not of changes: an operator such as `+` has a dozen replacements and a `not` has
one, so each place gets one of its replacements, drawn too. Mutants are met in the order of the draw, so that a run that
stops early is a sample all the same.
"""

import argparse
import ast
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "docs" / "mutants.json"
PAGE = ROOT / "docs" / "mutants.md"
PACKAGES = ("sparse_sr_attn", "sparse_sr_attn_basicsr", "sparse_sr_attn_spandrel")
STRATA = {"functional and layers": 85.0, "elsewhere": 70.0}
"""Parts of the code, and the share of mutants in percent that must be killed in each."""

EQUIVALENT: dict[tuple[str, str], str] = {
    (
        "sparse_sr_attn/functional/kmeans.py",
        "keeps = (counts == 0) | (sums.norm(dim=-1) <= _EPS) + (moved.norm(dim=-1) <= _EPS)",
    ): "the sum of two conditions is their union",
    (
        "sparse_sr_attn/functional/cluster/flex.py",
        "return visible & (offset >= least) * (offset <= most)",
    ): "the product of two conditions is their intersection",
    (
        "sparse_sr_attn/layers/category.py",
        'if self.categories == "kmeans" and self.training and self.ema_decay != 1:',
    ): "a decay is at most 1",
    (
        "sparse_sr_attn/functional/cluster/tiles.py",
        "return slots.view(-1, self.layout.chunk_size, slots.shape[1])",
    ): "slots have two axes",
    (
        "sparse_sr_attn/functional/window/tiles.py",
        "if scale != 0:",
    ): "a factor of 1 may be multiplied by or not",
    (
        "benchmarks/speed/timing.py",
        "start = turn % max( 0, len(names))",
    ): "something is always timed",
}
"""Mutants that no test can kill, by file and changed line, each with the reason; they count as neither."""

SAMPLE = 200
SEED = 7
TEST_SECONDS = 60.0
"""How long the tests of one mutant take together, at most; those beyond are left out, which can only spare mutants."""

CORE = ("sparse_sr_attn/functional/", "sparse_sr_attn/layers/")
CORE_TESTS = ("tests/functional/", "tests/layers/")
NO_MUTANTS = re.compile(r"core/(VariableReplacer|VariableInserter)")  # they want to be told which variables


@dataclass(frozen=True)
class Mutant:
    """One change.

    Attributes:
        file: relative to the repository.
        line: where, from 1.
        operator: of cosmic-ray.
        occurrence: which of the places in the file that the operator can change.
        stratum: part of the code, a key of `STRATA`.
    """

    file: str
    line: int
    operator: str
    occurrence: int
    stratum: str


# --- the sample -------------------------------------------------------------------------------------------------------


def family(operator: str) -> str:
    """Return an operator's name without what it replaces by what."""
    return operator.removeprefix("core/").split("_")[0]


def stratum_of(file: str) -> str:
    return "functional and layers" if file.startswith(CORE) else "elsewhere"


def sources(root: Path) -> list[str]:
    files = [*(root / "sparse_sr_attn").rglob("*.py"), *(root / "integrations").rglob("*.py")]
    return sorted(file.relative_to(root).as_posix() for file in files)


def without_effect(tree: ast.Module) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Return where nothing runs: annotations, and what only a type checker sees."""
    found: list[ast.AST] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
            found.append(node.annotation)
        elif isinstance(node, ast.FunctionDef) and node.returns is not None:
            found.append(node.returns)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            found += node.body
    return [((n.lineno, n.col_offset), (n.end_lineno, n.end_col_offset)) for n in found]  # type: ignore[attr-defined]


def places(root: Path, file: str) -> dict[tuple[str, int, int], list[Mutant]]:
    """Return all mutants of a file, by place: what kind of change, line, column."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator, operator_names

    source = (root / file).read_text(encoding="utf-8")
    idle = without_effect(ast.parse(source))
    nodes = list(ast_nodes(get_ast(source)))
    found: dict[tuple[str, int, int], list[Mutant]] = defaultdict(list)
    for name in sorted(operator_names()):
        if NO_MUTANTS.match(name):
            continue
        operator = get_operator(name)()
        occurrence = 0
        for node in nodes:
            for (line, column), _ in operator.mutation_positions(node):
                if not any(start <= (line, column) < stop for start, stop in idle):
                    mutant = Mutant(file, line, name, occurrence, stratum_of(file))
                    found[family(name), line, column].append(mutant)
                occurrence += 1
    return found


def sample(root: Path, size: int = SAMPLE, seed: int = SEED) -> list[Mutant]:
    """Return so many mutants of each stratum, in the order of the draw, the strata in turn."""
    by_stratum: dict[str, list[list[Mutant]]] = {name: [] for name in STRATA}
    for file in sources(root):
        for alternatives in places(root, file).values():
            by_stratum[stratum_of(file)].append(alternatives)
    dice = random.Random(seed)  # noqa: S311
    drawn: list[list[Mutant]] = []
    for everywhere in by_stratum.values():
        dice.shuffle(everywhere)
        one_each = (dice.choice(alternatives) for alternatives in everywhere)
        drawn.append(list(islice((mutant for mutant in one_each if is_python(root, mutant)), size)))
    return [mutant for turn in zip_longest(*drawn) for mutant in turn if mutant is not None]


def is_python(root: Path, mutant: Mutant) -> bool:
    """Return whether the change can be compiled: the star of keyword-only arguments is no multiplication."""
    try:
        ast.parse(mutated((root / mutant.file).read_text(encoding="utf-8"), mutant))
    except SyntaxError:
        return False
    return True


def mutated(source: str, mutant: Mutant) -> str:
    """Return the source with the change."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    code = mutate_code(source, get_operator(mutant.operator)(), mutant.occurrence)
    assert code is not None, mutant
    return str(code)


# --- which tests reach a line -----------------------------------------------------------------------------------------


class Recorder:
    """Remembers how long each test took and why one failed."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.failure: dict[str, str] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
        report: pytest.TestReport = yield  # type: ignore[assignment,misc]
        self.seconds[item.nodeid] += report.duration
        if report.failed and not self.failure:
            kind = "assertion" if call.excinfo is not None and call.excinfo.errisinstance(AssertionError) else "error"
            self.failure = {"by": item.nodeid, "kind": kind}
        return report  # type: ignore[return-value]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and not self.failure:
            self.failure = {"by": report.nodeid, "kind": "import"}


PYTEST = ["-q", "-x", "-p", "no:cacheprovider", "--hypothesis-profile=brief", "-m", "not slow"]
NOT_MAPPED = "compil or inductor or export or graph"
"""Names of tests that meet no mutant: PyTorch's compilers take minutes under coverage. This can only spare mutants."""


def environment(tree: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": f"{tree}{os.pathsep}{tree / 'integrations'}",
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }


def copied(root: Path, folder: Path) -> Path:
    """Copy what git knows of a repository, or all of a folder that is none."""
    shutil.rmtree(folder, ignore_errors=True)
    if not (root / ".git").exists():
        return Path(shutil.copytree(root, folder))
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True)
    for name in listed.stdout.splitlines():
        if (root / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, folder / name)
    return folder


def map_file(tree: Path, test_file: str, report: Path) -> None:
    """Run one file of tests under coverage and note which test reached which line; in a process of its own."""
    data = report.with_suffix(".coverage")
    os.environ["COVERAGE_FILE"] = str(data)
    sys.path[:0] = [str(tree), str(tree / "integrations")]
    recorder = Recorder()
    watched = [f"--cov={name}" for name in PACKAGES]
    options = [option for option in PYTEST if option != "-x"] + ["-k", f"not ({NOT_MAPPED})"]
    pytest.main([test_file, *options, *watched, "--cov-context=test", "--cov-report="], plugins=[recorder])
    from coverage import CoverageData

    covered = CoverageData(str(data))
    covered.read()
    names = sorted(recorder.seconds)
    number = {name: index for index, name in enumerate(names)}
    lines: dict[str, dict[int, list[int]]] = {}
    for path in covered.measured_files():
        try:
            file = Path(path).relative_to(tree).as_posix()
        except ValueError:
            continue
        lines[file] = {
            line: sorted({number[c.split("|")[0]] for c in contexts if c.split("|")[0] in number})
            for line, contexts in covered.contexts_by_lineno(path).items()
        }
    report.write_text(json.dumps({"tests": [[name, recorder.seconds[name]] for name in names], "lines": lines}))


class Reach:
    """Which tests reach which line of a tree."""

    def __init__(self, tree: Path, reports: Sequence[Path]) -> None:
        self.tree = tree
        self.seconds: dict[str, float] = {}
        self.lines: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
        for report in reports:
            data = json.loads(report.read_text())
            names = [name for name, _ in data["tests"]]
            self.seconds.update(dict(data["tests"]))
            for file, lines in data["lines"].items():
                for line, numbers in lines.items():
                    self.lines[file][int(line)] |= {names[n] for n in numbers}

    def tests(self, mutant: Mutant) -> list[str]:
        """Return the tests that run the changed statement, or, if it runs at import, what stands around it."""
        reached: set[str] = set()
        for lines in enclosing(ast.parse((self.tree / mutant.file).read_text(encoding="utf-8")), mutant.line):
            reached = set().union(*(self.lines[mutant.file].get(line, set()) for line in lines))
            if reached:
                break
        chosen: list[str] = []
        total = 0.0
        for name in sorted(reached, key=lambda name: (self.seconds[name], name)):
            total += self.seconds[name]
            if chosen and total > TEST_SECONDS:
                break
            chosen.append(name)
        return chosen


def enclosing(tree: ast.Module, line: int) -> list[range]:
    """Return the lines of the statement at `line` (of one with a body, its head), then of what it stands in."""
    chain: list[ast.stmt] = []
    body: Any = tree
    while True:
        inside = [
            node
            for node in ast.iter_child_nodes(body)
            if isinstance(node, ast.stmt | ast.excepthandler | ast.match_case)
            and first_line(node) <= line <= (getattr(node, "end_lineno", None) or node.body[-1].end_lineno)  # type: ignore[union-attr]
        ]
        if not inside:
            break
        body = inside[0]
        chain.append(body)
    if not chain:
        return []
    own = chain[-1]
    inner = getattr(own, "body", None)
    stop = first_line(inner[0]) - 1 if isinstance(inner, list) and inner else own.end_lineno
    ranges = [range(first_line(own), max(stop or 0, line) + 1)]
    definitions = [node for node in chain if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    # The head of a definition runs at import: its default values and decorators show when the body runs.
    ranges += [range(node.body[0].lineno, (node.end_lineno or 0) + 1) for node in reversed(definitions)]
    return [*ranges, range(1, tree.body[-1].end_lineno + 1)]  # type: ignore[operator]


def first_line(node: Any) -> int:
    decorators = getattr(node, "decorator_list", [])
    if isinstance(node, ast.match_case):
        return int(node.pattern.lineno)
    return min([node.lineno, *(decorator.lineno for decorator in decorators)])


# --- running ----------------------------------------------------------------------------------------------------------


def map_all(tree: Path, folder: Path, jobs: int, strata: Sequence[str]) -> list[Path]:
    """Run the files of tests once under coverage, several at a time; those done before are not run again."""
    folder.mkdir(parents=True, exist_ok=True)
    tests = [path.relative_to(tree).as_posix() for path in sorted((tree / "tests").rglob("test_*.py"))]
    if list(strata) == ["functional and layers"]:
        tests = [test for test in tests if test.startswith(CORE_TESTS)]
    tests = [test for test in tests if not test.startswith(("tests/faults/", "tests/mutants/"))]
    reports = {test: folder / (test.replace("/", "-").removesuffix(".py") + ".json") for test in tests}
    todo = [test for test in tests if not reports[test].exists()]
    running: list[tuple[str, subprocess.Popen[bytes]]] = []
    while todo or running:
        while todo and len(running) < jobs:
            test = todo.pop(0)
            command = [sys.executable, str(Path(__file__)), "map-file", str(tree), test, str(reports[test])]
            with reports[test].with_suffix(".log").open("wb") as log:
                process = subprocess.Popen(command, cwd=tree, env=environment(tree), stdout=log, stderr=log)
            running.append((test, process))
        for test, process in [pair for pair in running if pair[1].poll() is not None]:
            running.remove((test, process))
            print(f"mapped {test}{'' if reports[test].exists() else ': FAILED'}", flush=True)
        time.sleep(0.2)
    return [report for report in reports.values() if report.exists()]


def meet(tests: list[str], tree: Path, outcome: Path) -> None:
    """Run the tests in a tree; in a fork, which ends here."""
    os.setsid()
    os.chdir(tree)
    os.environ.update(environment(tree))
    sys.path[:0] = [str(tree), str(tree / "integrations")]
    sys.dont_write_bytecode = True
    log = os.open(outcome.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1), os.dup2(log, 2)
    recorder = Recorder()
    code = pytest.main([*tests, *PYTEST], plugins=[recorder])
    if code not in (0, 1) and not recorder.failure:
        recorder.failure = {"by": tests[0], "kind": "import"}
    outcome.write_text(json.dumps({"ran": len(recorder.seconds), **recorder.failure}))
    os._exit(0)


class Fork:
    """A mutant that is being met, in a process of its own and a copy of the repository; `None` is the code as it is."""

    def __init__(self, mutant: Mutant | None, tests: list[str], tree: Path, worker: Path, allowed: float) -> None:
        self.mutant, self.worker, self.allowed = mutant, worker, allowed
        self.source = self.changed = ""
        if mutant is not None:
            self.source = (tree / mutant.file).read_text(encoding="utf-8")
            self.changed = mutated(self.source, mutant)
            (worker / mutant.file).write_text(self.changed, encoding="utf-8")
        self.outcome = worker / "outcome.json"
        self.outcome.unlink(missing_ok=True)
        self.start = time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                meet(tests, worker, self.outcome)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(1)

    def answer(self) -> dict[str, Any] | None:
        """Return what came of it, and undo the change; `None` while it runs."""
        answer: dict[str, Any]
        ended, status = os.waitpid(self.pid, os.WNOHANG)
        if ended and os.WIFSIGNALED(status):
            answer = {"kind": "crash"}
        elif ended and not self.outcome.exists():
            raise RuntimeError(f"pytest could not run; see {self.outcome.with_suffix('.log')}")
        elif ended:
            answer = json.loads(self.outcome.read_text())
        elif time.monotonic() - self.start > self.allowed:
            os.killpg(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            answer = {"kind": "timeout"}
        else:
            return None
        if self.mutant is not None:
            (self.worker / self.mutant.file).write_text(self.source, encoding="utf-8")
        answer["status"] = "killed" if "kind" in answer else "survived"
        answer["seconds"] = round(time.monotonic() - self.start, 1)
        return answer | {"change": change(self.source, self.changed)}


def control(reach: Reach, tree: Path, worker: Path) -> None:
    """Run fast tests on code that is not changed: a runner under which they fail would kill everything.

    Raises:
        RuntimeError: they fail.
    """
    tests = sorted(reach.seconds, key=lambda name: (reach.seconds[name], name))[:200]
    fork = Fork(None, tests, tree, worker, allowed=600)
    while (answer := fork.answer()) is None:
        time.sleep(0.1)
    if answer["status"] != "survived" or answer["ran"] != len(tests):
        raise RuntimeError(f"tests fail without a mutant: {answer}; see {fork.outcome.with_suffix('.log')}")


def run(folder: Path, jobs: int, minutes: float, size: int, strata: Sequence[str]) -> None:
    """Meet all mutants of the sample that have no result yet."""
    tree = folder / "tree"
    if not tree.exists():
        copied(ROOT, tree)
    mutants = [mutant for mutant in sample(tree, size) if mutant.stratum in strata]
    results = folder / "results.jsonl"
    done = {json.dumps(line["mutant"]) for line in read_results(results)}
    todo = [mutant for mutant in mutants if json.dumps(asdict(mutant)) not in done]
    reach = Reach(tree, map_all(tree, folder / "map", jobs, strata))
    print(f"{len(mutants)} mutants, {len(todo)} to do", flush=True)

    import torch  # before the forks; nothing that pytest wants to be the first to import
    import torch._dynamo

    torch.set_num_threads(1)
    end = time.monotonic() + 60 * minutes
    free = [copied(tree, folder / f"worker{number}") for number in range(jobs)]
    control(reach, tree, free[0])
    running: list[Fork] = []
    while running or (todo and time.monotonic() < end):
        while todo and free and time.monotonic() < end:
            mutant = todo.pop(0)
            tests = reach.tests(mutant)
            if tests:
                allowed = 60 + 5 * sum(reach.seconds[test] for test in tests)
                running.append(Fork(mutant, tests, tree, free.pop(), allowed))
            else:
                source = (tree / mutant.file).read_text(encoding="utf-8")
                note(
                    results, mutant, {"status": "survived", "ran": 0, "change": change(source, mutated(source, mutant))}
                )
        time.sleep(0.1)
        for fork in list(running):
            answer = fork.answer()
            if answer is not None:
                running.remove(fork)
                free.append(fork.worker)
                note(results, fork.mutant, answer)


def note(results: Path, mutant: Mutant, answer: Mapping[str, Any]) -> None:
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"mutant": asdict(mutant), **answer}) + "\n")
    print(
        f"{answer['status']:8}  {answer.get('kind', ''):9}  {mutant.file}:{mutant.line}  {family(mutant.operator)}",
        flush=True,
    )


def read_results(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def change(source: str, changed: str) -> list[str]:
    """Return the first line that differs, before and after."""
    pairs = zip(source.splitlines(), changed.splitlines(), strict=False)
    return next(([one.strip(), other.strip()] for one, other in pairs if one != other), ["", ""])


# --- the report -------------------------------------------------------------------------------------------------------


def wilson(killed: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Return the 95 % interval of a share, in percent (Wilson 1927)."""
    if total == 0:
        return 0.0, 100.0
    share = killed / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return 100 * (middle - half), 100 * (middle + half)


def excuse(result: Mapping[str, Any]) -> str | None:
    """Return why a mutant that survived is no mistake, if it is none."""
    return EQUIVALENT.get((result["mutant"]["file"], result["change"][1])) if result["status"] == "survived" else None


def page(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the page made of the results."""
    lines = [
        "# Mutation testing",
        "",
        "The code is changed in one small place, and a test must turn red. Made by `make mutants`, not by hand; the",
        f"sample (seed {SEED}), the operators (cosmic-ray's) and the choice of tests are explained in",
        "`tests/mutants/mutants.py`.",
        "A mutant is met by the tests that reach its statement, those of up to a minute together, properties with ten",
        "examples, without those that compile or export: the whole suite would kill more. Survivors stay listed when a",
        "test was written for them later, so that the share stays an estimate of what the tests would notice.",
        "",
        "| part of the code | mutants | killed | by an assertion | by another error | at import | by time | equivalent "
        "| share killed | 95 % interval | promised |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for stratum, promised in STRATA.items():
        own = [result for result in results if result["mutant"]["stratum"] == stratum]
        kinds = [result.get("kind") for result in own if result["status"] == "killed"]
        equivalent = sum(excuse(result) is not None for result in own)
        total = len(own) - equivalent
        low, high = wilson(len(kinds), total)
        cells = [
            stratum, len(own), len(kinds), kinds.count("assertion"), kinds.count("error") + kinds.count("crash"),
            kinds.count("import"), kinds.count("timeout"), equivalent,
            f"{100 * len(kinds) / total:.1f} %" if total else "-", f"{low:.1f} to {high:.1f} %", f"{promised:g} %",
        ]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    if len(results) < 300:
        lines += ["", f"*The sample promised has at least 300 mutants; {len(results)} were met so far.*"]
    survivors = [result for result in results if result["status"] == "survived"]
    lines += ["", "## Survivors", "", "| where | before | after | tests | excused |", "|---|---|---|---|---|"]
    for result in sorted(survivors, key=lambda result: (result["mutant"]["file"], result["mutant"]["line"])):
        where = f"{result['mutant']['file']}:{result['mutant']['line']}"
        before, after = (f"`{text}`".replace("|", "\\|") if text else "–" for text in result["change"])
        lines.append(f"| {where} | {before} | {after} | {result['ran']} | {excuse(result) or ''} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="meet the mutants of the sample, going on where it stopped")
    runner.add_argument("--folder", type=Path, default=ROOT / "build" / "mutants")
    runner.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    runner.add_argument("--minutes", type=float, default=1e6, help="start no mutant after so many")
    runner.add_argument("--size", type=int, default=SAMPLE, help="mutants of each part of the code")
    runner.add_argument("--only", choices=STRATA, help="mutants of this part of the code")
    reporter = commands.add_parser("report", help="write docs/mutants.json and docs/mutants.md")
    reporter.add_argument("--folder", type=Path, default=ROOT / "build" / "mutants")
    mapper = commands.add_parser("map-file", help="(for run)")
    mapper.add_argument("tree", type=Path)
    mapper.add_argument("test")
    mapper.add_argument("report", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "map-file":
        map_file(arguments.tree, arguments.test, arguments.report)
    elif arguments.command == "run":
        strata = [arguments.only] if arguments.only else list(STRATA)
        run(arguments.folder.resolve(), arguments.jobs, arguments.minutes, arguments.size, strata)
    else:
        results = read_results(arguments.folder / "results.jsonl")
        if not results:
            reporter.error(f"{arguments.folder} must hold the results of a run, and holds none; the record stays")
        RECORD.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(page(results), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
