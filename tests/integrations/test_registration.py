"""Our names in the registries of BasicSR and of its forks."""

import importlib.util
import inspect
import os
import shutil
import subprocess
import sys
import textwrap
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from basicsr.archs import build_network
from basicsr.models.sr_model import SRModel
from basicsr.utils.registry import ARCH_REGISTRY, MODEL_REGISTRY, Registry
from torch import nn

from sparse_sr_attn import EDSR, ELAN, DuplicateNameError, LCoAN
from sparse_sr_attn_basicsr import SparseEDSR, register
from sparse_sr_attn_basicsr.model import SparseSRModel
from sparse_sr_attn_basicsr.with_attention import WithAttention

pytestmark = pytest.mark.promise("R23")


def test_registering_twice_is_registering_once() -> None:
    register()
    before = list(ARCH_REGISTRY), list(MODEL_REGISTRY)
    register()
    assert (list(ARCH_REGISTRY), list(MODEL_REGISTRY)) == before
    assert ARCH_REGISTRY.get("LCoAN") is LCoAN
    assert ARCH_REGISTRY.get("ELAN") is ELAN
    assert ARCH_REGISTRY.get("SparseEDSR") is SparseEDSR
    assert ARCH_REGISTRY.get("WithAttention") is WithAttention
    assert MODEL_REGISTRY.get("SparseSRModel") is SparseSRModel
    assert issubclass(SparseEDSR, EDSR)
    assert issubclass(SparseSRModel, SRModel)
    assert ARCH_REGISTRY.get("EDSR").__module__ == "basicsr.archs.edsr_arch"


def test_basicsr_builds_our_networks_from_its_nested_options(network: dict[str, object]) -> None:
    options = OrderedDict(
        (key, OrderedDict(value) if isinstance(value, dict) else value) for key, value in network.items()
    )
    net = build_network(options)
    assert type(net).__name__ == network["type"]
    assert net(torch.rand(1, 3, 5, 7)).shape == (1, 3, 10, 14)


@pytest.mark.parametrize("name", ["Attended", "ELAN", "LCoAN", "SparseEDSR", "SparseRCAN", "WithAttention"])
def test_a_network_of_our_name_stays_and_ours_gets_another(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stranger = type(name, (nn.Module,), {"__module__": "their.package"})
    crowded = Registry("arch")
    crowded.register(stranger)
    monkeypatch.setattr("basicsr.utils.registry.ARCH_REGISTRY", crowded)
    register()
    register()
    assert crowded.get(name) is stranger
    ours = crowded.get(f"{name}_sparse_sr_attn")
    assert ours.__module__.startswith("sparse_sr_attn_basicsr.")
    assert inspect.signature(ours) == inspect.signature(ARCH_REGISTRY.get(name))
    ours_too = {"Attended", "ELAN", "LCoAN", "SparseEDSR", "SparseRCAN", "WithAttention", f"{name}_sparse_sr_attn"}
    assert sorted(crowded.keys()) == sorted(ours_too)
    assert f"this BasicSR has a {name} of its own; ours is {name}_sparse_sr_attn" in caplog.text
    assert caplog.text.count("of its own") == 1


def test_a_model_of_our_name_is_not_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    stranger = type("SparseSRModel", (nn.Module,), {"__module__": "their.package"})
    crowded = Registry("model")
    crowded.register(stranger)
    monkeypatch.setattr("basicsr.utils.registry.MODEL_REGISTRY", crowded)
    with pytest.raises(
        DuplicateNameError, match=r"name 'SparseSRModel' must be free, but their\.package\.Sparse.* has it"
    ):
        register()
    assert crowded.get("SparseSRModel") is stranger


def _fork(folder: Path, drop_ins: dict[str, str]) -> None:
    """Copy BasicSR as a fork would vendor it: without the networks it does not need, with a line of ours."""
    origin = Path(importlib.util.find_spec("basicsr").origin).parent
    shutil.copytree(origin, folder / "basicsr", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("edsr_arch.py", "rcan_arch.py"):
        (folder / "basicsr" / "archs" / name).unlink()
    for file, text in drop_ins.items():
        (folder / "basicsr" / file).write_text(text)


@pytest.mark.parametrize("file", ["archs/sparse_sr_attn_arch.py", "models/sparse_sr_attn_model.py"])
def test_one_line_in_a_fork_is_enough(file: str, tmp_path: Path) -> None:
    _fork(tmp_path, {file: "import sparse_sr_attn_basicsr; sparse_sr_attn_basicsr.register()\n"})
    code = f"""
        import sparse_sr_attn_basicsr; sparse_sr_attn_basicsr.apply()
        import basicsr
        assert basicsr.__file__.startswith({str(tmp_path)!r}), basicsr.__file__
        from basicsr.archs import build_network
        from basicsr.models import build_model
        from basicsr.utils.registry import ARCH_REGISTRY
        assert "EDSR" not in ARCH_REGISTRY
        net = {{"type": "SparseEDSR", "num_feat": 4, "num_block": 1, "upscale": 2}}
        build_network(net)
        rrdbnet = {{"type": "RRDBNet", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 4, "num_block": 3}}
        attention = {{"type": "LCoA", "every": 1}}
        attended = build_network({{"type": "WithAttention", "network": rrdbnet, "attention": attention}})
        assert len(attended.body.attention) == 3
        opt = {{"model_type": "SparseSRModel", "num_gpu": 0, "is_train": False, "dist": False, "path": {{}}}}
        model = build_model({{**opt, "network_g": net}})
        assert type(model).__name__ == "SparseSRModel", type(model)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_importing_the_integration_does_not_import_basicsr() -> None:
    code = "import sys, sparse_sr_attn_basicsr as ours; assert not any(m.startswith('basicsr') for m in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
