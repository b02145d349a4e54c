"""What the README and the documentation tell readers to type works.

A page is a session in a new folder: its blocks run from top to bottom, Python in one scope, a block with a title is a
file of that name, and `sparse-sr` is run. What a reader brings along (weights, a photograph) is there. Commands that
would take hours are parsed, or run for a few iterations. A block under `<!-- not run: REASON -->` is compiled only.
"""

import ast
import copy
import importlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Set
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from skimage import data

from sparse_sr_attn import EDSR, LAYERS, LCoAN
from sparse_sr_attn.checkpoints.convert import convert_weights
from sparse_sr_attn.cli import main as cli
from sparse_sr_attn_basicsr import preflight, register
from sparse_sr_attn_basicsr.option_file import parse
from sparse_sr_attn_basicsr.options import OPTIONS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
ELSEWHERE = {"recipes.md"}  # tests/integrations/test_recipes.py runs these blocks, inside their hosts
PAGES = [ROOT / "README.md", *sorted(page for page in DOCS.rglob("*.md") if page.name not in ELSEWHERE)]
SLOW = {"own-layer.md", "gpus.md"}  # the whole contract, and processes that train together
LANGUAGES = {"python", "bash", "yaml", "text", "json", "toml"}
TINY = {"num_feat": 8, "num_group": 2, "num_block": 1, "num_clusters": 8, "chunk_size": 16, "reduction": 2}
SHORT = ("train:total_iter=2", "num_gpu=0", "datasets:train:gt_size=32", "datasets:train:batch_size_per_gpu=2")

register()


@dataclass(frozen=True)
class Block:
    """A fenced block: where it stands, in which language, and what was said about it."""

    page: str
    line: int
    language: str
    title: str | None
    left_out: str | None
    code: str


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in re.finditer(
        r"^(?:<!-- not run: ([^\n]*) -->\n\n?)?```(\w*)(?: title=\"([^\"]+)\")?\n(.*?)^```$",
        text,
        re.DOTALL | re.MULTILINE,
    ):
        reason, language, title, code = match.groups()
        line = text.count("\n", 0, match.start(4)) + 1
        found.append(Block(page.name, line, language, title, reason, code))
    return found


def paths(pages: list[Path], slow: Set[str] = frozenset()) -> list[Any]:
    return [
        pytest.param(page, id=str(page.relative_to(ROOT)), marks=pytest.mark.slow if page.name in slow else ())
        for page in pages
    ]


# ---------------------------------------------------------------------------------------------------- what a reader has


@pytest.fixture(scope="module")
def belongings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs and weights under the names that pages use, all small."""
    home = tmp_path_factory.mktemp("belongings")
    cat = data.chelsea()
    for folder, count in (("photos", 3), ("photos_held_out", 1), ("DIV2K_train_HR", 1), ("Set5", 1)):
        (home / folder).mkdir()
        for index in range(count):
            crop = cat[60 * index : 60 * index + 100, 90 * index : 90 * index + 100]
            Image.fromarray(np.ascontiguousarray(crop)).save(home / folder / f"{index}.png")
    for file in ("photo.jpg", "photo.png", "a.jpg", "b.jpg"):
        Image.fromarray(cat[:60, :80]).save(home / file)
    for part, upscale, count in (("train", 2, 4), ("val", 2, 1), ("train_x4", 4, 4), ("val_x4", 4, 1)):
        for folder, side in (("HR", 48), (f"LR_x{upscale}", 48 // upscale)):
            (home / "datasets" / part / folder).mkdir(parents=True)
            for index in range(count):
                Image.fromarray(cat[:side, index : index + side]).save(
                    home / "datasets" / part / folder / f"{index}.png"
                )

    torch.manual_seed(0)
    network = LCoAN(upscale=2, similarity="dot", cluster_order="index", **TINY)
    lcoan = network.state_dict()
    torch.save({"params": lcoan, "params_ema": lcoan}, home / "net_g_latest.pth")
    torch.save({"params": lcoan}, home / "lcoan_x2.pth")
    torch.save(convert_weights(network, "released"), home / "lcoan_x2.pt")
    for name, upscale, changes in (
        ("EDSR_Mx2.pth", 2, {"num_feat": 64, "num_block": 16}),
        ("EDSR_Mx4.pth", 4, {}),
        ("my_edsr.pth", 2, {}),
    ):
        edsr = EDSR(upscale=upscale, **{"num_feat": 8, "num_block": 4, **changes})
        torch.save({"params": edsr.state_dict()}, home / name)
    torch.save(convert_weights(edsr, "released"), home / "edsr_baseline_x2.pt")
    return home


@pytest.fixture
def here(belongings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the reader stands."""
    shutil.copytree(belongings, tmp_path, copy_function=os.link, dirs_exist_ok=True)
    (tmp_path / "options").symlink_to(OPTIONS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(LAYERS, "_entries", {name: LAYERS.get(name) for name in LAYERS})  # a page may register layers
    return tmp_path


# -------------------------------------------------------------------------------------------------------- how it is run


def run_python(block: Block, scope: dict[str, Any]) -> None:
    # Padded, so that a traceback shows the line of the page.
    exec(compile("\n" * (block.line - 1) + block.code, block.page, "exec"), scope)  # noqa: S102  (the pages are ours)


def commands(block: Block) -> list[list[str]]:
    lines = [shlex.split(line, comments=True) for line in block.code.replace("\\\n", " ").splitlines()]
    return [part for line in lines for part in split(line, "&&") if part]


def split(words: list[str], at: str) -> list[list[str]]:
    parts: list[list[str]] = [[]]
    for word in words:
        if word == at:
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


def run_command(words: list[str], here: Path) -> None:
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # settings of the environment
        words = words[1:]
    RUNNERS[words[0]](words, here)


def run_sparse_sr(words: list[str], here: Path) -> None:
    name, arguments = words[1], words[1:]
    if "<" in arguments:  # from one file into another
        *arguments, _, source, _, target = arguments
        with open(here / source, "rb") as given, open(here / target, "wb") as made:
            command = [sys.executable, "-m", "sparse_sr_attn", *arguments]
            subprocess.run(command, cwd=here, check=True, env=environment(), stdin=given, stdout=made)
        assert (here / target).stat().st_size
    elif name in {"train", "test"}:
        run_basicsr(arguments, here)
    else:
        assert cli.main(arguments) == 0, words


def run_basicsr(arguments: list[str], here: Path) -> None:
    """A file of the package is only looked for (tests/integrations/test_options.py); one of the page is run."""
    parsed = cli._parsers(arguments)[0].parse_args(arguments)
    file = here / parsed.opt if (here / parsed.opt).exists() else ROOT / parsed.opt
    assert file.is_file(), parsed.opt
    if file.resolve().is_relative_to(OPTIONS):
        return
    short = SHORT if arguments[0] == "train" else ("num_gpu=0",)
    assert cli.main([*arguments, "--force_yml", *short]) == 0, arguments


def run_python_command(words: list[str], here: Path) -> None:
    """Of a benchmark, which takes minutes, only the arguments are looked at; tests/benchmarks runs them."""
    if words[1] == "-m" and words[2].startswith("benchmarks."):
        importlib.import_module(f"{words[2]}.__main__").parser().parse_args(words[3:])
        return
    if words[1:3] == ["-m", "venv"]:  # the tests run in one
        return
    subprocess.run([sys.executable, *words[1:]], cwd=here, check=True, env=environment(), stdout=subprocess.DEVNULL)


def run_torchrun(words: list[str], here: Path) -> None:
    """Of a training only the arguments are looked at; tests/integrations/test_distributed.py trains."""
    if "-m" in words:
        module = words.index("-m") + 1
        assert words[module] == "sparse_sr_attn"
        run_basicsr(words[module + 1 :], here)
    else:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", *words[1:]]
        done = subprocess.run(launcher, cwd=here, check=False, env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def environment() -> dict[str, str]:
    packages = os.pathsep.join([str(ROOT), str(ROOT / "integrations"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": packages}


def check_pip(words: list[str], here: Path) -> None:
    """What is to be installed is a dependency, or this package with extras that it has."""
    project = (ROOT / "pyproject.toml").read_text()
    optional = project.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    extras = set(re.findall(r"^(\w+) = \[", optional, flags=re.MULTILINE))
    known = set(re.findall(r'"([\w-]+)', optional)) | {"torch"}
    known |= {"torchvision", "setuptools", "wheel"}
    assert words[1] == "install"
    wanted = [word for before, word in pairwise(words[1:]) if word[0] != "-" and before != "-c"]
    for word in wanted:
        if word.startswith(("http", "PATH")):
            continue
        name, _, asked = word.removesuffix("]").partition("[")
        assert name == "." or re.split("[=<>]", name)[0] in known, word
        assert set(asked.split(",")) - {""} <= extras, word


def check_make(words: list[str], here: Path) -> None:
    assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE), words


def nothing(words: list[str], here: Path) -> None:
    """A clone cannot be made here, nor entered."""


RUNNERS: dict[str, Callable[[list[str], Path], None]] = {
    "sparse-sr": run_sparse_sr,
    "python": run_python_command,
    "torchrun": run_torchrun,
    "pip": check_pip,
    "make": check_make,
    "git": nothing,
    "cd": nothing,
    ".": nothing,
}

BASE: dict[str, Any] = yaml.safe_load(
    (OPTIONS / "train/LCoAN/train_LCoAN_light_x2.yml").read_text().replace("!!float ", "")
)


def check_options(block: Block) -> None:
    """A part of an option file, put into a whole one, is what BasicSR and our networks take."""
    part = parse(block.code, block.page)
    if {"attention", "block"} & part.keys():  # of a network
        part = {
            "network_g": {"type": "SparseEDSR", "num_feat": 64, "num_block": 16, "upscale": 2, "img_range": 1.0, **part}
        }
    options = merged(BASE, part)
    network = options["network_g"]
    options |= {"num_gpu": 0, "scale": network["network"]["scale"] if "network" in network else network["upscale"]}
    for part, data_set in options["datasets"].items():
        folder = part if options["scale"] == 2 else f"{part}_x{options['scale']}"
        low = f"datasets/{folder}/LR_x{options['scale']}"
        data_set |= {"dataroot_gt": f"datasets/{folder}/HR", "dataroot_lq": low}
    options["datasets"]["train"]["gt_size"] = 32
    if weights := options["path"].get("pretrain_network_g"):
        Path(weights).parent.mkdir(parents=True, exist_ok=True)
        torch.save({"params": {}}, weights)
    preflight.check(options, training=True)


def merged(base: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """`part` over `base`; a map that names its type replaces the one before."""
    both = copy.deepcopy(base)
    for key, value in part.items():
        inside = isinstance(value, dict) and isinstance(base.get(key), dict) and "type" not in value
        both[key] = merged(base[key], value) if inside else value
    return both


# ------------------------------------------------------------------------------------------------------------ the tests


@pytest.mark.usefixtures("spandrel_registry")
@pytest.mark.parametrize("page", paths([page for page in PAGES if blocks(page)], SLOW))
def test_every_block_works(page: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page.name == "train.md":  # it makes them
        shutil.rmtree(here / "datasets")
    scope: dict[str, Any] = {}
    for block in blocks(page):
        where = f"{block.page}:{block.line}"
        if block.left_out is not None:
            if block.language == "python":
                ast.parse(block.code, where)
            continue
        if block.title is not None:
            file = here / block.title
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.code, encoding="utf-8")
        elif block.language == "python":
            if page.name == "README.md":  # there each stands for itself
                scope = {}
            run_python(block, scope)
        elif block.language == "bash":
            for words in commands(block):
                run_command(words, here)
        elif block.language == "yaml":
            check_options(block)
    for name in set(sys.modules) & {Path(block.title).stem for block in blocks(page) if block.title}:
        monkeypatch.delitem(sys.modules, name)


def test_every_block_says_its_language() -> None:
    for page in [*PAGES, DOCS / "recipes.md"]:
        text = page.read_text(encoding="utf-8")
        assert text.count("\n```") % 2 == 0, page
        assert {block.language for block in blocks(page)} <= LANGUAGES, page
        without = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
        outside = re.sub(r"^( *[-*\d].*\n)(.+\n)*", "", without, flags=re.MULTILINE)
        assert page.name == "CONTRIBUTING.md" or not re.search(r"\n\n    \S", outside), f"{page}: indented code"


@pytest.mark.parametrize("page", paths([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]))
def test_links_and_files_of_the_repository_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for path in re.findall(r"\]\((?!http)([^)#]+)", text) + re.findall(r"-opt (\S+)", text):
        assert (ROOT / path).exists(), path


def test_pages_are_in_the_navigation() -> None:
    listed = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text()))
    assert listed == {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}


def test_every_command_has_its_place() -> None:
    page = (DOCS / "commands.md").read_text()
    for name in cli.COMMANDS:
        assert f"| `sparse-sr {name}` |" in page


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_those_of_the_registry_and_of_measurements() -> None:
    tables = script("tables")
    filled = set()
    for file in DOCS.glob("*.md"):
        page = file.read_text(encoding="utf-8")
        assert tables.filled(page) == page, "run: python docs/tables.py"
        filled |= {block[1] for block in tables.BLOCK.finditer(page)}
    assert filled == tables.TABLES.keys()
    page = (DOCS / "modules.md").read_text(encoding="utf-8")
    reference = (DOCS / "reference" / "layers.md").read_text(encoding="utf-8")
    for name in LAYERS:
        assert f"| [`{name}`](#{name.lower()}) | {LAYERS.get(name).kind} |" in page
        assert re.search(rf"\b{name}\b", reference), f"docs/reference/layers.md lacks {name}"


@pytest.mark.slow
def test_the_pictures_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = script("draw")
    monkeypatch.setattr(sys, "argv", ["draw.py", "--out", str(tmp_path)])
    draw.main()
    drawn = {file.name for file in tmp_path.iterdir()}
    assert drawn == {file.name for file in (DOCS / "assets" / "pictures").iterdir()}
    pages = (DOCS / "concepts.md").read_text() + (ROOT / "README.md").read_text()
    used = set(re.findall(r"assets/pictures/(\S+?)\)", pages))
    assert drawn == used


def test_the_first_example_of_the_readme_keeps_the_size() -> None:
    scope: dict[str, Any] = {}
    run_python(next(block for block in blocks(ROOT / "README.md") if block.language == "python"), scope)
    assert scope["x"].shape == (1, 64, 48, 48)
    assert scope["state"].map_size() == (1, 48, 48)


@pytest.mark.slow
def test_the_site_builds(tmp_path: Path) -> None:
    """Every link and every anchor leads somewhere, and every name of the reference is there."""
    pytest.importorskip("mkdocs")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(
        build, cwd=ROOT, env=environment() | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "concepts.html").is_file()


def test_the_readme_has_the_costs_on_record() -> None:
    text = (ROOT / "README.md").read_text()
    record = json.loads((DOCS / "assets" / "cost-networks.json").read_text())["networks"]
    rows = {
        1: "EDSR, 64 channels, 16 blocks, LCoA every 4, share 4",
        2: "the same with GMSA",
        5: "EDSR, 48 channels, 10 blocks, LCoA every 2, share 5 (the one above)",
        9: "EDSR, 32 channels, 6 blocks, LCoA every 2, share 3",
    }
    for index, label in rows.items():
        cells = [f"{time['median']:.2f}" for time in record[index]["times"].values()]
        assert f"| {label} | {' | '.join(cells)} |" in text
