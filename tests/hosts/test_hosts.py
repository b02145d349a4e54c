"""Each recipe of docs/recipes.md in the real code base, unchanged but for what it demands of the machine.

It trains, resumes, and starts from trained weights without attention. Set SPARSE_SR_HOSTS to a folder that holds the
checkouts by name; each test works on a copy. What is trained on is one image that no flip or rotation changes, as large
as a patch. So all batches are the same, and a resumed training must end where an uninterrupted one does.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from pages import recipe
from PIL import Image
from safetensors.torch import load_file

import sparse_sr_attn
from sparse_sr_attn.backbones.attach import SLOT, is_record

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(1800)]

REPOSITORY = Path(sparse_sr_attn.__file__).parents[1]
SCALE, SIDE = 4, 8  # of the small image
LAUNCH = """
import runpy, sys
from sparse_sr_attn_basicsr.shims import torchvision_operators
torchvision_operators()  # torchvision may be built for another torch
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
State = dict[str, Any]


@pytest.fixture
def host(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of the code base that the test names."""
    folder = os.environ.get("SPARSE_SR_HOSTS")
    if not folder or not (Path(folder) / request.param).is_dir():
        pytest.skip(f"needs SPARSE_SR_HOSTS, a folder with a checkout {request.param}")
    copy = tmp_path / request.param
    shutil.copytree(Path(folder) / request.param, copy, ignore=shutil.ignore_patterns(".git", "docs", "*.pth"))
    small = symmetric(SIDE)
    for name, pixels in (("HR", np.kron(small, np.ones((SCALE, SCALE, 1)))), ("LR", small)):
        (tmp_path / name).mkdir()
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / name / "1.png")
    return copy


def on(name: str) -> Callable[[Any], Any]:
    return pytest.mark.parametrize("host", [name], indirect=True)


def symmetric(side: int) -> Any:
    """Return an image that no flip or rotation changes."""
    pixels = np.random.default_rng(0).uniform(0, 255, (side, side, 3))
    pixels = np.mean([np.rot90(pixels, turns) for turns in range(4)], axis=0)
    return np.round((pixels + pixels[::-1]) / 2)


def edit(path: Path, old: str, new: str) -> None:
    """Replace a text that must be there."""
    text = path.read_text()
    assert old in text, f"{path.name} has no {old!r}"
    path.write_text(text.replace(old, new))


def insert(path: Path, code: str, anchor: str, *, after: bool = False) -> None:
    """Insert lines before a line, or after it and its block, indented like it."""
    lines = path.read_text().splitlines(keepends=True)
    (place,) = (number for number, line in enumerate(lines) if line.strip() == anchor)
    indent = re.match(" *", lines[place])[0]  # type: ignore[index]
    if after:
        place = next(n for n in range(place + 1, len(lines)) if not lines[n].startswith(f"{indent} "))
    lines.insert(place, textwrap.indent(code, indent))
    path.write_text("".join(lines))


def run(folder: Path, *arguments: object) -> str:
    """Run a script of a host in a fresh interpreter; return what it wrote."""
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "integrations")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    command = [sys.executable, "-c", LAUNCH, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    return done.stdout + done.stderr


def attention_of(state: State) -> State:
    return {key: value for key, value in state.items() if SLOT in key.split(".")}


def assert_trained(state: State, kinds: list[str]) -> None:
    """The attention has a record with these layers, its weights are no longer zero, and k-means has moved."""
    (record,) = (json.loads(bytes(int(byte) for byte in value)) for key, value in state.items() if is_record(key))
    assert [attention["type"] for attention in record["attention"]] == kinds
    attention = attention_of(state)
    assert attention
    assert any(key.endswith("num_updates") and value > 0 for key, value in attention.items())
    assert all(value.any() for key, value in attention.items() if key.endswith(".weight"))


def assert_equal(one: State, other: State) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key]), key


def assert_started(state: State, trained: State) -> None:
    """A training with a learning rate of zero has the trained weights, and attention besides."""
    own = {key: value for key, value in state.items() if key not in attention_of(state)}
    assert len(own) < len(state)
    assert_equal(own, trained)


# --- KAIR -------------------------------------------------------------------------------------------------------------


def kair(folder: Path, name: str, iterations: int, network: State, **train: Any) -> State:
    """Train until there are so many iterations; return the weights."""
    text = (folder / "options/train_rrdb_psnr.json").read_text()
    options = json.loads(re.sub(r"//.*", "", text))
    options.update(task=name, gpu_ids=[], datasets={"train": options["datasets"]["train"]})
    options["datasets"]["train"].update(
        {"dataroot_H": str(folder.parent / "HR"), "dataroot_L": str(folder.parent / "LR"), "H_size": SCALE * SIDE},
        dataloader_batch_size=1,
        dataloader_num_workers=0,
    )
    options["netG"].update(network)
    options["train"].update(
        {"manual_seed": 0, "checkpoint_save": iterations, "G_optimizer_reuse": True, "E_decay": 0, **train}
    )
    (folder / f"{name}.json").write_text(json.dumps(options))
    models = folder / "superresolution" / name / "models"
    done = max((int(path.name.split("_")[0]) for path in models.glob("*_G.pth")), default=0)
    os.environ["EPOCHS"] = str(iterations - done)  # of one image
    run(folder, "main_train_psnr.py", "--opt", f"{name}.json")
    return torch.load(models / f"{iterations}_G.pth")


@on("KAIR")
@pytest.mark.parametrize("averaged", [False, True])
def test_kair(host: Path, averaged: bool) -> None:
    edit(host / "main_train_psnr.py", "range(1000000)", "range(int(os.environ['EPOCHS']))")  # it never ends
    base = host / "models/model_base.py"
    edit(base, "'cuda' if opt['gpu_ids'] is not None else 'cpu'", "'cpu'")
    edit(base, "storage.cuda(torch.cuda.current_device())", "storage")
    trained = kair(host, "plain", 1, {"net_type": "rrdb"})

    insert(host / "models/select_network.py", recipe("KAIR"), "return netG")
    options = json.loads(f"{{{recipe('KAIR', 'json')}}}")["netG"]
    scratch = {key: value for key, value in options.items() if key != "pretrained"}
    training: State = {"E_decay": 0.9} if averaged else {}
    if averaged:
        code = recipe("KAIR", number=1)
        insert(base, code, "for k in netG_params.keys():", after=True)
    whole = kair(host, "whole", 4, scratch, **training)
    assert_trained(whole, ["LCoA"])
    kair(host, "resumed", 2, scratch, **training)
    assert_equal(kair(host, "resumed", 4, scratch, **training), whole)
    if averaged:
        models = host / "superresolution"
        ours, other = (torch.load(models / name / "models/4_E.pth") for name in ("whole", "resumed"))
        assert_equal(ours, other)
        buffers = {key for key in attention_of(whole) if "centroids" in key or "num_updates" in key}
        assert len(buffers) > 1
        assert_equal({key: ours[key] for key in buffers}, {key: whole[key] for key in buffers})

    (host / "model_zoo").mkdir(exist_ok=True)
    torch.save(trained, host / options["pretrained"])
    assert_started(kair(host, "started", 2, options, G_optimizer_lr=0, **training), trained)


# --- EDSR-PyTorch -----------------------------------------------------------------------------------------------------


def edsr_pytorch(folder: Path, name: str, epochs: int, *options: object) -> State:
    """Train for epochs of one iteration; return the weights."""
    shape = ["--scale", SCALE, "--patch_size", SCALE * SIDE, "--batch_size", 1, "--test_every", 1]
    data = ["--dir_data", folder.parent, "--ext", "img", "--data_range", "1-1/1-1", "--n_threads", 0]
    training = ["--epochs", epochs + 1, "--decay", 1000, "--cpu", "--save_models"]  # the last epoch is not trained
    run(folder / "src", "main.py", *shape, *data, *training, *options)
    return torch.load(folder / "experiment" / name / f"model/model_{epochs}.pt")


@on("EDSR-PyTorch")
def test_edsr_pytorch(host: Path) -> None:
    images = host.parent / "DIV2K"
    (images / "DIV2K_train_LR_bicubic/X4").mkdir(parents=True)
    (images / "DIV2K_train_HR").mkdir()
    shutil.copy(host.parent / "HR/1.png", images / "DIV2K_train_HR/1.png")
    shutil.copy(host.parent / "LR/1.png", images / "DIV2K_train_LR_bicubic/X4/1x4.png")
    trained = edsr_pytorch(host, "plain", 1, "--save", "plain")

    line = "self.model = module.make_model(args).to(self.device)"
    insert(host / "src/model/__init__.py", recipe("EDSR-PyTorch"), line, after=True)
    whole = edsr_pytorch(host, "whole", 4, "--save", "whole")
    assert_trained(whole, ["LCoA"])
    edsr_pytorch(host, "resumed", 2, "--save", "resumed")
    assert_equal(edsr_pytorch(host, "resumed", 4, "--load", "resumed", "--resume", -1), whole)
    file = host / "experiment/plain/model/model_1.pt"
    assert_started(edsr_pytorch(host, "started", 2, "--save", "started", "--pre_train", file, "--lr", 0), trained)


# --- traiNNer-redux ---------------------------------------------------------------------------------------------------


def trainner(folder: Path, name: str, iterations: int, network: State, lr: float = 1e-4, **path: Any) -> State:
    """Train until there are so many iterations; return the weights."""
    options = {
        **{"name": name, "scale": SCALE, "num_gpu": 0, "manual_seed": 1, "use_amp": False},
        "datasets": {
            "train": {
                **{"name": "one", "type": "pairedimagedataset", "lq_size": SIDE},
                **{"dataroot_gt": [str(folder.parent / "HR")], "dataroot_lq": [str(folder.parent / "LR")]},
                **{"num_worker_per_gpu": 1, "batch_size_per_gpu": 1},
            }
        },
        **network,
        "path": path,
        "train": {
            **{"total_iter": iterations, "ema_decay": 0.9},
            "optim_g": {"type": "AdamW", "lr": lr, "weight_decay": 0},
            "losses": [{"type": "charbonnierloss", "loss_weight": 1.0}],
        },
        "logger": {
            "print_freq": 1,
            "use_tb_logger": False,
            "save_checkpoint_freq": iterations,
            "save_checkpoint_format": "safetensors",
        },
    }
    (folder / f"{name}.yml").write_text(yaml.safe_dump(options))
    run(folder, "train.py", "-opt", f"{name}.yml", "--auto_resume")
    return load_file(folder / f"experiments/{name}/models/resume_models/net_g_{iterations}.safetensors")


@on("traiNNer-redux")
def test_trainner_redux(host: Path) -> None:
    edit(host / "train.py", "not torch.cuda.is_available()", "False")
    edit(host / "train.py", "torch.cuda.set_per_process_memory_fraction(fraction=1.0)", "pass")
    edit(host / "train.py", "logger.info(get_env_info())", "pass")  # which describes the GPU
    trained = trainner(host, "plain", 1, {"network_g": {"type": "esrgan"}})

    (host / "traiNNer/archs/attended_arch.py").write_text(recipe("traiNNer-redux"))
    options = yaml.safe_load(recipe("traiNNer-redux", "yaml"))
    whole = trainner(host, "whole", 4, options)
    assert_trained(whole, ["LCoA"])
    trainner(host, "resumed", 2, options)
    assert_equal(trainner(host, "resumed", 4, options), whole)
    averages = [load_file(host / f"experiments/{name}/models/net_g_ema_4.safetensors") for name in ("whole", "resumed")]
    assert_equal(*averages)
    for key, value in attention_of(whole).items():
        if is_record(key):
            assert torch.equal(averages[0][key], value)
        elif key.endswith(".num_updates"):  # integers keep their first value, all else lags behind
            assert averages[0][key] < value
        elif key.endswith((".centroids", ".weight")):
            assert not torch.equal(averages[0][key], value)

    file = host / "experiments/plain/models/resume_models/net_g_1.safetensors"
    started = trainner(host, "started", 2, options, lr=0.0, pretrain_network_g=str(file), strict_load_g=False)
    assert_started(started, trained)


# --- neosr ------------------------------------------------------------------------------------------------------------


def neosr(folder: Path, name: str, iterations: int, network: str, *, ema: float = -1, lr: float = 1e-4) -> State:
    """Train until there are so many iterations; return the weights."""
    options = f"""
name = "{name}"
model_type = "image"
scale = {SCALE}
num_gpu = 0
manual_seed = 1
[datasets.train]
type = "paired"
dataroot_gt = "{folder.parent / "HR"}"
dataroot_lq = "{folder.parent / "LR"}"
patch_size = {SIDE}
batch_size = 1
num_worker_per_gpu = 1
[train]
ema = {ema}
[train.optim_g]
type = "adamw"
lr = {lr}
weight_decay = 0
[train.pixel_opt]
type = "L1Loss"
[logger]
total_iter = {iterations}
save_checkpoint_freq = {iterations}
use_tb_logger = false
"""
    (folder / f"{name}.toml").write_text(options + network)
    run(folder, "train.py", "-opt", f"{name}.toml", "--auto_resume")
    state: State = torch.load(folder / f"experiments/{name}/models/net_g_{iterations}.pth")
    (state,) = state.values()
    return state


def on_cpu(folder: Path) -> None:
    """Change where neosr demands a GPU and Python 3.12."""
    for path in (folder / "train.py", *(folder / "neosr").glob("*/*.py")):
        path.write_text(path.read_text().replace('"cuda"', '"cpu"'))
    train, prefetch = folder / "train.py", folder / "neosr/data/prefetch_dataloader.py"
    edit(train, "sys.version_info.minor != 12", "False")
    edit(train, "not torch.cuda.is_available()", "False")
    edit(train, "torch.cuda.get_device_name()", "None")
    edit(train, "torch.cuda.get_device_capability()", "(8, 0)")
    edit(prefetch, "torch.cuda.Stream()", "None")
    edit(prefetch, "with torch.cuda.stream(self.stream):", "if True:")
    edit(prefetch, "torch.cuda.current_stream().wait_stream(self.stream)", "pass")


@on("neosr")
def test_neosr(host: Path) -> None:
    on_cpu(host)
    trained = neosr(host, "plain", 1, '[path]\n[network_g]\ntype = "esrgan"')

    (host / "neosr/archs/attended_arch.py").write_text(recipe("neosr"))
    network = recipe("neosr", "toml")
    whole = neosr(host, "whole", 4, network)
    assert_trained(whole, ["LCoA"])
    neosr(host, "resumed", 2, network)
    assert_equal(neosr(host, "resumed", 4, network), whole)
    averaged = neosr(host, "averaged", 4, network, ema=0.9)
    assert averaged.keys() == whole.keys()
    for key in whole:
        assert not key.endswith((".centroids", ".num_updates")) or torch.equal(averaged[key], whole[key]), key

    file = host / "experiments/plain/models/net_g_1.pth"
    path = f'[path]\npretrain_network_g = "{file}"\nstrict_load_g = false\n'
    assert_started(neosr(host, "started", 2, path + network, lr=0), trained)
