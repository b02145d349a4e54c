"""The wheel holds all packages, the option files and the command; nothing else."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def needed(extra: str = "") -> set[str]:
    """The packages that a plain install brings, or one with an extra, ours resolved."""
    project = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"].get(extra, ())]
    found = set()
    for requirement in map(Requirement, lines):
        if requirement.name == project["name"]:
            found |= set().union(*(needed(other) for other in requirement.extras))
        else:
            found.add(requirement.name)
    return found


def test_a_plain_install_loads_weights_and_each_extra_that_runs_networks_upscales() -> None:
    assert needed() == {"torch", "einops", "jaxtyping", "safetensors"}
    for extra in ("cli", "basicsr", "demo"):
        assert needed(extra) >= {"safetensors", "pillow", "numpy", "tqdm"}


@pytest.mark.slow
def test_wheel(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
        (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
        assert "sparse-sr = sparse_sr_attn.cli.main:main" in archive.read(entry_points).decode()
    homes = {"sparse_sr_attn": ROOT} | {path.name: path.parent for path in (ROOT / "integrations").iterdir()}
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == set(homes)
    for folder, home in homes.items():
        expected = {
            str(path.relative_to(home))
            for path in (home / folder).rglob("*")
            if path.suffix in {".py", ".yml", ".typed", ".safetensors"}
        }
        assert expected == {name for name in names if name.startswith(f"{folder}/")}

    code = (
        "import sparse_sr_attn, sparse_sr_attn_basicsr; print(sparse_sr_attn.__file__, sparse_sr_attn_basicsr.__file__)"
    )
    output = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        cwd=tmp_path / "site",
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    assert output.count(str(tmp_path / "site")) == 2
