"""The option files that come with the package: each builds, trains and tests as it stands, but for data and length."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from basicsr.utils import options as basicsr_options
from skimage import data, io

from sparse_sr_attn import EDSR, PRESETS, LCoAN
from sparse_sr_attn.blocks import SiteAttention
from sparse_sr_attn.cli.main import main
from sparse_sr_attn.config import fields
from sparse_sr_attn.layers import LSP
from sparse_sr_attn_basicsr.option_file import load
from sparse_sr_attn_basicsr.options import OPTIONS
from sparse_sr_attn_basicsr.registration import NETWORKS

FILES = sorted(OPTIONS.rglob("*.yml"))
SCALES = (2, 3, 4)
NETWORK = {network.__name__: network for network in NETWORKS}
OF_OWN_PHOTOGRAPHS = ("teach_LCoAN_light_x2", "finetune_LCoAN_light_x2", "finetune_LCoAN_light_x4")
"""The recipe of the shipped weights, for folders that `sparse-sr prepare` makes."""


def by_speed(files: list[Path]) -> list[Any]:
    """A network of each kind runs always, the others with the slow tests."""
    quick = {"teach_LCoAN_light_x2", "train_ELAN_light_x2", "train_SparseRCAN_LCoA_x2", "finetune_SparseEDSR_LCoA_x2"}
    assert quick <= {file.stem for file in files}
    return [pytest.param(f, id=f.stem, marks=() if f.stem in quick else pytest.mark.slow) for f in files]


def network_of(file: Path) -> dict[str, Any]:
    options = load(file)["network_g"]
    assert isinstance(options, dict)
    return options


@pytest.fixture
def photographs_for(here: Path) -> Any:
    """Write a pair of photographs for a scale into the working directory, and return the overrides that name them."""

    def write(scale: int) -> dict[str, list[str]]:
        side = 24 * scale
        crop = data.astronaut()[100 : 100 + side, 200 : 200 + side]
        low = crop.reshape(24, scale, 24, scale, 3).mean(axis=(1, 3)).round().astype(np.uint8)
        folder = here / f"pairs_x{scale}"
        for quality, picture in {"HR": crop, "LR": low}.items():
            (folder / quality).mkdir(parents=True)
            io.imsave(folder / quality / "0.png", picture, check_contrast=False)
        return {
            phase: [f"datasets:{phase}:dataroot_gt={folder}/HR", f"datasets:{phase}:dataroot_lq={folder}/LR"]
            for phase in ("train", "val", "test_1", "test_2")
        }

    return write


def test_basicsrs_own_loader_reads_the_same_numbers() -> None:
    """So the files serve in a fork too, whose start script knows nothing of ours."""
    for file in FILES:
        theirs = yaml.load(file.read_text(), Loader=basicsr_options.ordered_yaml()[0])  # noqa: S506
        assert theirs == load(file), file


def test_scale_stands_where_it_should() -> None:
    for file in FILES:
        options = load(file)
        scale = options["scale"]
        assert file.stem.endswith(f"_x{scale}")
        network = options["network_g"].get("network", options["network_g"])
        assert network.get("upscale", network.get("scale")) == scale, file
        assert all(metric["crop_border"] == scale for metric in options["val"]["metrics"].values()), file
        assert all(f"x{scale}" in dataset["dataroot_lq"].lower() for dataset in options["datasets"].values()), file
        if "train" in options["datasets"] and options["network_g"]["type"] != "ELAN":
            side = 64 if file.stem in OF_OWN_PHOTOGRAPHS else 48
            assert options["datasets"]["train"]["gt_size"] == side * scale, file


def test_each_tests_what_was_trained() -> None:
    for file in (OPTIONS / "test").rglob("*.yml"):
        train, test = load(OPTIONS / "train" / file.parent.name / file.name.replace("test_", "train_")), load(file)
        assert train["network_g"] == test["network_g"], file
        assert test["path"]["pretrain_network_g"].split("/")[1] == train["name"]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", ["LCoAN", "LCoAN-light", "ELAN", "ELAN-light"])
def test_networks_of_papers_are_the_presets(name: str, scale: int) -> None:
    """And what a file spells out beyond that is the default, which the golden tests and parameter counts hold."""
    preset, network = PRESETS[name], name.partition("-")[0]
    options = network_of(OPTIONS / "train" / network / f"train_{name.replace('-', '_')}_x{scale}.yml")
    assert (options.pop("type"), options.pop("upscale")) == (network, scale)
    published = {key: field.default for key, field in fields(preset.build).items()} | dict(preset.options)
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    assert given == {key: published[key] for key in given}
    assert given.keys() >= preset.options.keys()


@pytest.mark.parametrize(
    ("name", "shared"),
    [
        ("EDSR/train_SparseEDSR_LCoA_x2", 4),
        ("RCAN/train_SparseRCAN_LCoA_x2", 2),
        ("RRDBNet/train_WithAttention_RRDBNet_LCoA_x4", 3),
    ],
)
def test_one_computes_and_the_others_share(name: str, shared: int) -> None:
    options = network_of(OPTIONS / "train" / f"{name}.yml")
    net = NETWORK[options.pop("type")](**options)
    (attention,) = (module for module in net.modules() if isinstance(module, SiteAttention))
    assert len(attention) == shared
    assert sum(isinstance(module, LSP) for module in net.modules()) == 1


@pytest.mark.parametrize("file", by_speed([f for f in FILES if not f.stem.startswith("test_")]))
def test_it_makes_a_training_step_and_tests(
    file: Path,
    here: Path,
    photographs_for: Any,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    scale = load(file)["scale"]
    overrides = photographs_for(scale)
    common = ["name=shipped", "num_gpu=0"]
    train = [*common, *overrides["train"], *overrides["val"], "train:total_iter=1"]
    if file.stem in OF_OWN_PHOTOGRAPHS:
        trained = LCoAN(**PRESETS["LCoAN-light"].options, upscale=2)
        train += [overrides["train"][0].replace("dataroot_gt", "dataroot_teacher")] if "teach" in file.stem else []
    else:
        trained = EDSR(upscale=scale)
    if file.stem.startswith("finetune_"):
        torch.save({"params": trained.state_dict(), "params_ema": trained.state_dict()}, here / "trained.pth")
        train += ["path:pretrain_network_g=trained.pth"]
    else:
        train += ["path:pretrain_network_g=none"]
    train += [f"datasets:train:gt_size={12 * scale}", "datasets:train:batch_size_per_gpu=1"]
    train += ["datasets:train:num_worker_per_gpu=0"]
    assert main(["train", "-opt", str(file), "--force_yml", *train]) == 0
    assert "note:" not in caplog.text  # no remark on files of ours
    assert "iter:       1" in capsys.readouterr().err
    pretrained = "path:pretrain_network_g=experiments/shipped/models/net_g_latest.pth"
    test = [*common, *overrides["test_1"], *overrides["test_2"], pretrained]
    twin = OPTIONS / "test" / file.parent.name / re.sub("^(train|finetune|teach)_", "test_", file.name)
    assert main(["test", "-opt", str(twin), "--force_yml", *test]) == 0
    (log,) = (here / "results" / "shipped").glob("*.log")
    assert log.read_text().count("# psnr:") == 2
