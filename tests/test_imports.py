"""Imports point one way, and importing the package needs and costs little."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import sparse_sr_attn

ROOT = Path(sparse_sr_attn.__file__).parent

# Who may import whom, inside the package. CONTRIBUTING.md draws the same arrows.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "registry": {"errors"},
    "config": {"errors", "registry"},
    "states": {"errors"},
    "reference": set(),
    "degradation": {"errors"},
    "evaluation": {"errors", "degradation"},
    "functional": {"errors", "states"},
    "layers": {"errors", "states", "registry", "config", "functional"},
    "blocks": {"errors", "states", "registry", "config", "functional", "layers"},
    "attachment": {"errors", "registry", "config", "layers", "blocks"},
    "backbones": {"errors", "states", "registry", "config", "functional", "layers", "blocks"},
    "files": set(),
    "pairs": {"errors", "files", "degradation"},
    "inference": set(),
    "graphs": {"errors"},
    "images": {"errors", "files", "inference"},
    "unwrapping": {"errors"},
    "foreign": {"errors", "attachment", "backbones"},
    "checkpoints": {"errors", "registry", "unwrapping", "foreign", "config", "functional", "layers", "backbones"},
    "conversion": {"errors", "files", "backbones", "checkpoints"},
    "export": {"errors", "files", "functional", "layers", "backbones"},
    "hub": {"errors", "unwrapping", "backbones", "checkpoints"},
    "visualize": {"errors", "states", "registry", "config", "functional", "layers", "blocks", "backbones"},
    "capture": {"errors", "states", "config", "registry", "functional", "layers"},
    "testing": {"errors", "states", "registry", "config", "functional", "layers", "reference"},
    "bench": {"errors", "registry", "config", "files", "layers", "blocks", "backbones", "reference"},
    "paper": {
        *("errors", "config", "files", "functional", "layers", "blocks", "backbones", "visualize", "images"),
        *("degradation", "evaluation", "bench"),
    },
    "commands": {
        *("errors", "states", "config", "files", "layers", "backbones", "checkpoints", "conversion", "export"),
        *("images", "inference", "visualize", "degradation", "evaluation", "bench", "paper", "pairs"),
        "capture",
    },
    "cli": {"errors", "commands"},  # and the integrations, lazily
    "__main__": {"cli"},
}


def part(path: Path) -> str:
    relative = path.relative_to(ROOT)
    return relative.parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Return the modules that a file imports, as written, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            if module == "sparse_sr_attn":
                names |= {f"sparse_sr_attn.{alias.name}" for alias in node.names}
            else:
                names.add(module)
    return names


FILES = [path for path in sorted(ROOT.rglob("*.py")) if path != ROOT / "__init__.py"]


def test_imports_point_one_way() -> None:
    for path in FILES:
        own = part(path)
        assert own in MAY_IMPORT, f"{own} is new: say in MAY_IMPORT and CONTRIBUTING.md what it may import"
        for name in imported(path):
            if name.startswith("sparse_sr_attn."):
                target = name.split(".")[1]
                assert target == own or target in MAY_IMPORT[own], f"{path} must not import {name}"


def test_the_slow_twins_share_no_code() -> None:
    """They import torch and the standard library, and each other."""
    for path in sorted((ROOT / "reference").glob("*.py")):
        for name in imported(path):
            known = name.split(".")[0] in {"torch", *sys.stdlib_module_names}
            assert known or name.startswith("sparse_sr_attn.reference"), f"{path}: {name}"


COLD = """
import sys
allowed = {"torch", "einops", "jaxtyping"}
import torch, einops, jaxtyping
before = {name.split(".")[0] for name in sys.modules}
import sparse_sr_attn
optional = {"basicsr", "timm", "torchvision", "spandrel", "huggingface_hub", "safetensors"}
for name in {*optional, "numpy.testing", "skimage", "yaml", "tqdm", "matplotlib"}:
    assert name in before or name not in sys.modules, name
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
    assert new == {"sparse_sr_attn"}


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
    parts = sorted({part(path) for path in FILES} - {"__main__"})
    done = subprocess.run([sys.executable, "-c", FIRST, *parts], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
