"""No code of ours runs what a stranger wrote: read from the source."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted([*(ROOT / "sparse_sr_attn").rglob("*.py"), *(ROOT / "integrations").rglob("*.py")])

FORBIDDEN_CALLS = {
    *("eval", "exec", "compile", "__import__", "breakpoint", "builtins.eval", "builtins.exec"),
    *("os.system", "os.popen", "os.execv", "os.execvp", "os.spawnv", "os.startfile"),
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load", "marshal.loads", "shelve.open"),
    *("dill.load", "dill.loads", "cloudpickle.load", "cloudpickle.loads", "joblib.load"),
    *("yaml.unsafe_load", "yaml.full_load", "yaml.unsafe_load_all", "yaml.full_load_all"),
    *("numpy.load", "np.load", "torch.hub.load", "torch.jit.load", "torch.package.PackageImporter"),
    *("tempfile.mktemp", "runpy.run_path", "runpy.run_module"),
}
MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "subprocess", "runpy", "code"}
ALLOWED = {
    # Our own bytes, in the check that a copy of a layer goes on like the layer.
    ("sparse_sr_attn/testing/conformance.py", "pickle.loads(pickle.dumps("),
    ("sparse_sr_attn/testing/conformance.py", "import pickle"),
    # Starts our own module, with a list of words and no shell, in a process with another allocator.
    ("benchmarks/speed/__main__.py", "import subprocess"),
}
"""What is no danger, and why: file, and how the statement begins."""


def findings(source: str) -> Iterator[tuple[int, str]]:
    """Return the lines that could run, or read as code, what somebody else wrote."""
    tree = ast.parse(source)
    known = names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, f"import {alias.name}") for alias in node.names if top(alias.name) in MODULES)
        elif isinstance(node, ast.ImportFrom) and top(node.module or "") in MODULES:
            yield node.lineno, f"from {node.module} import"
        elif isinstance(node, ast.Call):
            called = written(node.func, known)
            keywords = {keyword.arg: keyword.value for keyword in node.keywords}
            if (
                called in FORBIDDEN_CALLS
                or (called == "torch.load" and not is_true(keywords.get("weights_only")))
                or (called in ("yaml.load", "yaml.load_all") and not safe_loader(node, tree))
                or ("shell" in keywords and not is_false(keywords["shell"]))
                or is_true(keywords.get("allow_pickle"))
                or is_true(keywords.get("trust_remote_code"))
            ):
                yield node.lineno, ast.unparse(node)


def top(module: str) -> str:
    return module.partition(".")[0]


def names(tree: ast.AST) -> dict[str, str]:
    """Return what local names stand for: `from torch import load as read` gives read: torch.load."""
    known = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            known |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            known |= {alias.asname: alias.name for alias in node.names if alias.asname}
    return known


def written(function: ast.expr, known: dict[str, str]) -> str:
    first, _, rest = ast.unparse(function).partition(".")
    return ".".join(part for part in (known.get(first, first), rest) if part)


def is_true(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def is_false(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def safe_loader(call: ast.Call, tree: ast.AST) -> bool:
    """Return whether the loader is yaml's safe one or a subclass of it in the same file."""
    loaders = [keyword.value for keyword in call.keywords if keyword.arg == "Loader"] or call.args[1:2]
    ours = {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base).endswith("SafeLoader") for base in node.bases)
    }
    return bool(loaders) and (ast.unparse(loaders[0]).endswith("SafeLoader") or ast.unparse(loaders[0]) in ours)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_runs_what_a_stranger_wrote(path: Path) -> None:
    file = path.relative_to(ROOT).as_posix()
    found = [
        (line, text)
        for line, text in findings(path.read_text(encoding="utf-8"))
        if not any(file == where and text.startswith(begins) for where, begins in ALLOWED)
    ]
    assert found == []


@pytest.mark.parametrize(
    "code",
    [
        "eval('1')",
        "exec(text)",
        "import pickle",
        "from pickle import loads",
        "import pickle as p; p.loads(data)",
        "import os; os.system('x')",
        "from os import system as run; run('x')",
        "import subprocess",
        "run(command, shell=True)",
        "run(command, shell=flag)",
        "import torch; torch.load(path)",
        "import torch; torch.load(path, weights_only=False)",
        "import torch; torch.load(path, weights_only=flag)",
        "from torch import load; load(path)",
        "import yaml; yaml.load(text)",
        "import yaml; yaml.load(text, yaml.Loader)",
        "import yaml; yaml.load(text, Loader=yaml.FullLoader)",
        "import yaml; yaml.unsafe_load(text)",
        "import numpy as np; np.load(path)",
        "f(path, allow_pickle=True)",
        "import torch; torch.hub.load('a', 'b')",
        "f(trust_remote_code=True)",
    ],
)
def test_it_is_noticed(code: str) -> None:
    """Else the test above would prove nothing."""
    assert list(findings(code))


@pytest.mark.parametrize(
    "code",
    [
        "import torch; torch.load(path, weights_only=True)",
        "import yaml; yaml.safe_load(text)",
        "import yaml; yaml.load(text, Loader=yaml.SafeLoader)",
        "import yaml\nclass Mine(yaml.SafeLoader): ...\nyaml.load(text, Mine)",
        "model.eval()",
        "re.compile('x')",
        "torch.compile(f)",
    ],
)
def test_what_is_safe_is_left_alone(code: str) -> None:
    assert not list(findings(code))


def test_what_is_allowed_is_there() -> None:
    """No exception outlives its reason."""
    for file, begins in ALLOWED:
        assert any(text.startswith(begins) for _, text in findings((ROOT / file).read_text(encoding="utf-8"))), file


def test_the_page_for_reports_is_there() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    for promise in ("weights_only=True", "safetensors", "!!python/object/apply", "privately"):
        assert promise in text
