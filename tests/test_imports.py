"""Imports point one way, and importing the package needs and costs little."""

import ast
import importlib
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import sparse_sr_attn
from sparse_sr_attn._moved import MOVED

ROOT = Path(sparse_sr_attn.__file__).parent
CLONE = Path(__file__).resolve().parents[1]

# Who may import whom; docs/architecture.md draws the same arrows.
_OPTIONS = {"errors", "registry", "config"}
_NETWORKS = {*_OPTIONS, "states", "functional", "layers", "blocks", "backbones"}
_TOOLS = {*_NETWORKS, "checkpoints", "models", "data", "inference", "cli"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "registry": {"errors"},
    "config": {"errors", "registry"},
    "states": set(),
    "reference": set(),
    "functional": {"errors", "states"},
    "layers": {*_OPTIONS, "states", "functional"},
    "blocks": {*_OPTIONS, "states", "functional", "layers"},
    "backbones": {*_OPTIONS, "states", "functional", "layers", "blocks"},
    "data": {"errors"},
    "checkpoints": {*_NETWORKS, "data"},
    "models": {*_NETWORKS, "checkpoints"},
    "inference": {*_NETWORKS, "data", "checkpoints"},
    "testing": {*_OPTIONS, "states", "functional", "layers", "reference"},
    "cli": {*_NETWORKS, "checkpoints", "models", "data", "inference", "sparse_sr_attn"},
    "__main__": {"cli"},
    "_moved": set(),
    "sparse_sr_attn_basicsr": {*_TOOLS, "sparse_sr_attn"},
    "sparse_sr_attn_spandrel": {*_OPTIONS, "backbones", "checkpoints"},
    "benchmarks": {*_TOOLS, "testing", "reference", "sparse_sr_attn"},
}


def files() -> dict[str, Path]:
    """Return the files of all packages by the name that they are imported by."""
    found = {}
    for parent, package in (
        (CLONE, "sparse_sr_attn"),
        (CLONE, "benchmarks"),
        (CLONE / "integrations", "sparse_sr_attn_basicsr"),
        (CLONE / "integrations", "sparse_sr_attn_spandrel"),
    ):
        for file in sorted((parent / package).rglob("*.py")):
            found[".".join(file.relative_to(parent).with_suffix("").parts).removesuffix(".__init__")] = file
    return found


FILES = files()


def room(module: str) -> str:
    """Return the folder or file of the package in which a module is, or the name of another package."""
    package, _, rest = module.partition(".")
    return rest.partition(".")[0] or package if package == "sparse_sr_attn" else package


def imported(path: Path) -> set[str]:
    """Return the modules that a file imports, wherever in the file, but for type checkers alone."""
    names = set()
    nodes = list(ast.walk(ast.parse(path.read_text())))
    unseen = {
        id(inner)
        for node in nodes
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in nodes:
        if id(node) in unseen:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {part if part in FILES else str(node.module) for part in parts}
    return names


def test_rooms_import_only_what_is_below_them() -> None:
    for module, file in FILES.items():
        own = room(module)
        if module == "sparse_sr_attn":
            continue
        assert own in MAY_IMPORT, f"{own} is new: say in MAY_IMPORT and docs/architecture.md what it may import"
        for name in imported(file) & FILES.keys():
            assert room(name) in {own, *MAY_IMPORT[own]}, f"{module} must not import {name}"


def test_no_files_import_each_other_in_a_circle() -> None:
    graph = {module: (imported(file) & FILES.keys()) - {module} for module, file in FILES.items()}
    assert list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def test_the_root_of_the_package_holds_few_modules() -> None:
    assert len([file for file in ROOT.glob("*.py") if not file.name.startswith("__")]) <= 8


def test_the_slow_twins_share_no_code() -> None:
    """They import torch and the standard library, and each other."""
    for path in sorted((ROOT / "reference").glob("*.py")):
        for name in imported(path):
            known = name.split(".")[0] in {"torch", *sys.stdlib_module_names}
            assert known or name.startswith("sparse_sr_attn.reference"), f"{path}: {name}"


def test_modules_that_moved_can_be_imported_by_their_old_names() -> None:
    for name in MOVED:
        with pytest.warns(FutureWarning, match=f"^sparse_sr_attn.{name} is sparse_sr_attn\\.") as warned:
            old = importlib.import_module(f"sparse_sr_attn.{name}")
        new = importlib.import_module(str(warned[0].message).split()[2])
        names = [name for name in vars(new) if not name.startswith("_")]
        assert all(getattr(old, name) is getattr(new, name) for name in names)
    from sparse_sr_attn.images import network_input, read_image

    assert network_input.__module__ == "sparse_sr_attn.inference.upscale"
    assert read_image.__module__ == "sparse_sr_attn.data.images"


COLD = """
import sys
allowed = {"torch", "einops", "jaxtyping"}
import torch, einops, jaxtyping
before = {name.split(".")[0] for name in sys.modules}
import sparse_sr_attn
optional = {"basicsr", "timm", "torchvision", "spandrel", "huggingface_hub", "safetensors"}
for name in {*optional, "numpy.testing", "skimage", "yaml", "tqdm", "matplotlib"}:
    assert name in before or name not in sys.modules, name
assert all(hasattr(sparse_sr_attn, name) for name in sparse_sr_attn.__all__)
new = {name.split(".")[0] for name in sys.modules} - before - set(sys.stdlib_module_names)
assert new <= {"sparse_sr_attn"}, new
assert sparse_sr_attn.LCoA(8)(torch.rand(1, 8, 3, 3)).shape == (1, 8, 3, 3)
"""


def test_import_brings_nothing_but_its_dependencies() -> None:
    subprocess.run([sys.executable, "-c", COLD], check=True)


def test_the_package_alone_imports_nothing() -> None:
    code = "import sys; before = set(sys.modules); import sparse_sr_attn; print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    new = {name for name in done.stdout.split() if name.partition(".")[0] not in sys.stdlib_module_names}
    assert new == {"sparse_sr_attn", "sparse_sr_attn._moved"}


def test_public_names_exist() -> None:
    assert sorted(sparse_sr_attn.__all__) == sorted(set(sparse_sr_attn.__all__))
    for name in sparse_sr_attn.__all__:
        assert hasattr(sparse_sr_attn, name)
    assert set(dir(sparse_sr_attn)) >= set(sparse_sr_attn.__all__)


def test_names_that_do_not_exist() -> None:
    with pytest.raises(AttributeError, match="module 'sparse_sr_attn' has no attribute 'LCoB'"):
        sparse_sr_attn.LCoB  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'LCoB' from 'sparse_sr_attn'"):
        from sparse_sr_attn import LCoB  # noqa: F401


@pytest.mark.parametrize(
    "code",
    [
        "from sparse_sr_attn import build_layer; build_layer('ELAB', 12)",
        "from sparse_sr_attn.layers.base import LAYERS; assert {'ELAB', 'LCoA', 'LFE', 'NLSA'} <= set(LAYERS)",
        "from sparse_sr_attn.layers.base import LAYERS; assert 'ELAB' in LAYERS and len(LAYERS) > 10",
        "import sparse_sr_attn; assert sparse_sr_attn.layers.LCoA is sparse_sr_attn.LCoA",
        "import sparse_sr_attn; assert sparse_sr_attn.functional.kmeans",
        "import sparse_sr_attn; assert sparse_sr_attn.blocks.ELAB",
        "from sparse_sr_attn import *; assert LCoA and load_model and __version__",
    ],
)
def test_names_bring_what_they_need(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True)


FIRST = """
import importlib, os, sys
import torch, einops, jaxtyping
for module in sys.argv[1:]:
    if not (child := os.fork()):
        importlib.import_module(f"sparse_sr_attn.{module}")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, module
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="takes a process for each")
def test_every_part_can_be_imported_first() -> None:
    parts = sorted({room(name) for name in FILES if name.startswith("sparse_sr_attn.")} - {"__main__"})
    done = subprocess.run([sys.executable, "-c", FIRST, *parts], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
