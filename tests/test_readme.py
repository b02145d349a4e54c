"""What the README tells users to type works."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from sparse_sr_attn import EDSR
from sparse_sr_attn.config import read

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.split("\n")[-2][:40])
def test_python_runs(code: str) -> None:
    exec(compile(code, "README.md", "exec"), {})  # noqa: S102  (the README is ours)


def test_one_layer_keeps_the_size() -> None:
    scope: dict[str, Any] = {}
    exec(compile(blocks("python")[0], "README.md", "exec"), scope)  # noqa: S102
    assert scope["y"].shape == scope["x"].shape
    assert not torch.equal(scope["y"], scope["x"])


def test_option_file_builds() -> None:
    (option,) = (yaml.safe_load(text) for text in blocks("yaml"))
    network = option["network_g"]
    assert network.pop("type") == "SparseEDSR"
    model = EDSR(**read(EDSR, network, "network_g"))
    assert [type(layer).__name__ for layer in model.attention] == ["LCoA", "CoA", "CoA", "CoA"]


def test_files_and_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\S+)", "\n".join(blocks("bash")), flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    for path in re.findall(r"-opt (\S+)", README) + re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / path).exists(), path
