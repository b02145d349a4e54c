"""Wrong options are explained before anything is loaded or written, all at once, each with its path."""

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from skimage import io

from sparse_sr_attn.cli import main
from sparse_sr_attn.errors import ConfigError
from sparse_sr_attn_basicsr import preflight
from sparse_sr_attn_basicsr.options import load

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
NET = "network_g"

MALFORMED = [
    # our networks
    ({f"{NET}.type": "SparseEDRS"}, r"network_g\.type: BasicSR has no network named 'SparseEDRS'; .*'SparseEDSR'\?"),
    ({f"{NET}.type": "edsr"}, r"network_g\.type: BasicSR has no network named 'edsr'; did you mean 'EDSR'\?"),
    ({f"{NET}.type": ...}, r"network_g\.type: missing"),
    ({NET: ...}, r"network_g: missing"),
    ({NET: [1]}, r"network_g: must be a mapping, got \[1\]"),
    ({f"{NET}.num_feats": 8}, r"network_g\.num_feats: unknown; did you mean 'num_feat'\?"),
    ({f"{NET}.num_feat": 0}, r"network_g\.num_feat: must be >= 1, got 0"),
    ({f"{NET}.num_feat": "many"}, r"network_g\.num_feat: must be an integer >= 1, got 'many'"),
    ({f"{NET}.img_range": 0}, r"network_g\.img_range: must be > 0 and finite, got 0"),
    ({f"{NET}.rgb_mean": [0.5]}, r"network_g\.rgb_mean: must have one number for each channel"),
    ({f"{NET}.upscale": 5, "scale": 5}, r"network_g\.upscale: must be one of 2, 3, 4, 8, got 5"),
    ({f"{NET}.upscale": 4}, r"network_g\.upscale: must be 2, the option 'scale', got 4"),
    ({f"{NET}.upscale": ...}, r"network_g\.upscale: must be 2, the option 'scale', got 4 \(its default\)"),
    # attention
    ({f"{NET}.attention.n_cluster": 4}, r"network_g\.attention\.n_cluster: unknown; did you mean 'num_clusters'\?"),
    ({f"{NET}.attention.chunk_size": 0}, r"network_g\.attention\.chunk_size: must be >= 1, got 0"),
    ({f"{NET}.attention.type": "LCOAA"}, r"network_g\.attention\.type: no layer named 'LCOAA'; did you mean 'LCoA'\?"),
    ({f"{NET}.attention.type": "CoA"}, r"network_g\.attention\.type: must be a drop-in layer, got 'CoA', a consumer"),
    ({f"{NET}.attention.type": ...}, r"network_g\.attention\.type: missing"),
    ({f"{NET}.attention.every": 5}, r"network_g\.attention\.every: must hit at least one of the 4 blocks, got 5"),
    ({f"{NET}.attention.share": 0}, r"network_g\.attention\.share: must be >= 1, got 0"),
    ({f"{NET}.attention.after": [0]}, r"network_g\.attention: must have one of 'every' and 'after'.*got both"),
    ({f"{NET}.attention": 3}, r"network_g\.attention: must be a name, .*got 3"),
    ({f"{NET}.attention": [{"type": "LCoA", "every": 1}, 3]}, r"network_g\.attention\.1: must be a map"),
    # ELAN's parts
    ({NET: {"type": "ELAN", "num_blocks": 3}}, r"network_g\.num_blocks: unknown; did you mean 'num_block'\?"),
    ({NET: {"type": "ELAN", "window_sizes": [4, 0]}}, r"network_g\.window_sizes: must be in \[1, 1024\], got \[4, 0\]"),
    (
        {NET: {"type": "ELAN", "window_sizes": [4, 100_000_000]}},
        r"network_g\.window_sizes: must be in \[1, 1024\], got \[4, 100000000\]",
    ),
    ({f"{NET}.attention.seed": 2**64}, r"network_g\.attention\.seed: must be an integer of 64 bits, got 18446744073"),
    ({f"{NET}.block": {"type": "SharedGMSA"}}, r"network_g\.block\.type: .*, a consumer; use GMSA instead$"),
    ({"manual_seed": 2**32}, r"manual_seed: must be in \[0, 2\*\*32\) or ~ \(nothing\), got 4294967296"),
    ({"name": ["x" * 10_000]}, r"name: must be a string, got \['x{198}\.\.\. \(10004 characters\)$"),
    ({NET: {"type": "ELAN", "share": 0}}, r"network_g\.share: must be >= 1, got 0"),
    ({NET: {"type": "ELNA"}}, r"network_g\.type: BasicSR has no network named 'ELNA'; did you mean 'ELAN'\?"),
    (
        {f"{NET}.attention": {"type": "GMSA", "every": 2, "window_size": [4]}},
        r"network_g\.attention\.window_size: unknown; did you mean 'window_sizes'\?",
    ),
    (
        {f"{NET}.attention": {"type": "GMSA", "every": 2, "shift": "often"}},
        r"network_g\.attention\.shift: must be true or false, got 'often'",
    ),
    (
        {f"{NET}.attention": [{"type": "LCoA", "every": 2}, {"type": "SharedGMSA", "every": 2}]},
        r"network_g\.attention\.1\.type: must be a drop-in layer, got 'SharedGMSA', a consumer; use GMSA with share: n",
    ),
    (
        {f"{NET}.attention": {"type": "ELAB", "every": 5}},
        r"network_g\.attention\.every: must hit at least one of the 4 blocks, got 5",
    ),
    # rules that a layer's constructor knows, not its signature
    (
        {f"{NET}.attention": {"type": "GMSA", "every": 2, "window_sizes": []}},
        r"network_g\.attention\.window_sizes: must name at least one window size",
    ),
    (
        {f"{NET}.attention": [{"type": "LCoA", "every": 2}, {"type": "GMSA", "every": 2, "window_sizes": []}]},
        r"network_g\.attention\.1\.window_sizes: must name at least one window size",
    ),
    (
        {f"{NET}.block": {"type": "GMSA", "window_sizes": []}},
        r"network_g\.block\.window_sizes: must name at least one window size",
    ),
    ({f"{NET}.block": {"type": "ELABB"}}, r"network_g\.block\.type: no layer named 'ELABB'; did you mean 'ELAB'\?"),
    ({f"{NET}.block": {"type": "ELAB", "shar": 2}}, r"network_g\.block\.shar: unknown; did you mean 'share'\?"),
    ({f"{NET}.block": {"type": "ELAB", "expansion": 0}}, r"network_g\.block\.expansion: must be >= 1, got 0"),
    ({f"{NET}.block": {"share": 2}}, r"network_g\.block\.type: missing"),
    ({f"{NET}.block": "ELAB"}, r"network_g\.block: must be a map with a key 'type' or ~ .*, got 'ELAB'"),
    (
        {f"{NET}.block": {"type": "ELAB"}, "train.pretrain_img_range": 255.0},
        r"train\.pretrain_img_range: must be ~ unless .* without block, .* it is SparseEDSR with block",
    ),
    # BasicSR's networks
    (
        {NET: {"type": "EDSR", "num_in_ch": 3, "num_out_ch": 3, "upscale": 2, "attention": {}}},
        r"network_g\.attention: unknown to EDSR; type: SparseEDSR has it",
    ),
    (
        {NET: {"type": "SRVGGNetCompact", "num_feats": 3}},
        r"network_g\.num_feats: unknown to SRVGGNetCompact; .*'num_feat'",
    ),
    ({"network_d": {"type": "UNetDiscriminatorN"}}, r"network_d\.type: BasicSR has no network named"),
    ({"network_d": 3}, r"network_d: must be a map"),
    # model, machine, general
    ({"model_type": "SparseSRMode"}, r"model_type: BasicSR has no model named 'SparseSRMode'; .*'SparseSRModel'\?"),
    ({"model_type": ...}, r"model_type: missing"),
    ({"name": ...}, r"name: missing"),
    ({"name": 3}, r"name: must be a string, got 3"),
    ({"scale": ...}, r"scale: missing"),
    ({"scale": "x2"}, r"scale: must be an integer >= 1, got 'x2'"),
    ({"num_gpu": "all"}, r"num_gpu: must be .*'auto', got 'all'"),
    ({"num_gpu": -1}, r"num_gpu: must be .*got -1"),
    pytest.param(
        {"num_gpu": 1},
        r"num_gpu: must be at most the number of CUDA GPUs, .* sees 0, got 1; .*0 is the CPU",
        marks=no_gpu,
    ),
    ({"manual_seed": ..., "manual_sed": 1}, r"manual_sed: unknown; did you mean 'manual_seed'\?"),
    # data
    (
        {"datasets.train.dataroot_gt": "datasets/trian/HR"},
        r"datasets\.train\.dataroot_gt: there is no folder 'datasets/trian/HR'.*working directory: /",
    ),
    (
        {"datasets.val.dataroot_lq": "datasets/val/lr_"},
        r"datasets\.val\.dataroot_lq: there is no folder 'datasets/val/lr_'; did you mean 'datasets/val/LR'\?",
    ),
    ({"datasets.train.dataroot_lq": ...}, r"datasets\.train\.dataroot_lq: missing; PairedImageDataset needs it"),
    (
        {"datasets.train.dataroot_lq": "datasets"},
        r"datasets\.train\.dataroot_lq: there is no image in the folder 'datasets'",
    ),
    (
        {"datasets.train.dataroot_lq": "datasets/val/LR"},
        r"datasets\.train\.dataroot_lq: must hold one file for each of the 6",
    ),
    (
        {"datasets.train.filename_tmpl": "{}x2"},
        r"datasets\.train\.dataroot_lq: .*'0\.png' has no '0x2\.png' \(filename_tmpl",
    ),
    ({"datasets.train.gt_size": 33}, r"datasets\.train\.gt_size: must be a multiple of scale 2, got 33; nearest: 32"),
    (
        {"datasets.train.gt_size": 66},
        r"datasets\.train\.gt_size: must be at most the size of every image, got 66, and '.*/HR/0\.png' is 64x64",
    ),
    (
        {"datasets.train.dataroot_gt": "datasets/train/LR"},
        r"datasets\.train\.dataroot_lq: must hold images of 1/2 the size .* '.*/LR/0\.png' is 32x32 and '.*' is 32x32",
    ),
    (
        {"datasets.val.dataroot_gt": "datasets/val/LR"},
        r"datasets\.val\.dataroot_lq: must hold images of 1/2 the size \(the option 'scale'\)",
    ),
    (
        {"scale": 4, "network_g.upscale": 4},
        r"datasets\.train\.dataroot_lq: must hold images of 1/4 the size \(the option 'scale'\)",
    ),
    ({"datasets.train.gt_size": ...}, r"datasets\.train\.gt_size: missing; PairedImageDataset needs it"),
    (
        {"datasets.train.batch_size_per_gp": 2, "datasets.train.batch_size_per_gpu": ...},
        r"datasets\.train\.batch_size_per_gp: unknown; did you mean 'batch_size_per_gpu'\?",
    ),
    (
        {"datasets.train.batch_size_per_gpu": 64},
        r"dataset_enlarge_ratio: must be at least 11, got 10: .* trains on nothing",
    ),
    (
        {"datasets.train.type": "PairedImageDatset"},
        r"datasets\.train\.type: BasicSR has no dataset named .*'PairedImageDataset'\?",
    ),
    ({"datasets.train.io_backend": ...}, r"datasets\.train\.io_backend: missing"),
    pytest.param(
        {"datasets.train.prefetch_mode": "cuda"}, r"prefetch_mode: must be cpu or ~ without a CUDA GPU", marks=no_gpu
    ),
    ({"datasets.vol": {}}, r"datasets\.vol: data sets must be named train and val, val_2, \.\.\., got 'vol'"),
    ({"datasets.train": ...}, r"datasets\.train: missing; training needs images"),
    ({"datasets.val": None}, r"datasets\.val: must be a map, got None"),
    ({"datasets": ...}, r"datasets: missing"),
    # training
    ({"train": ...}, r"train: missing"),
    ({"train.total_iter": ..., "train.total_iters": 9}, r"train\.total_iters: unknown; did you mean 'total_iter'\?"),
    ({"train.total_iter": 0}, r"train\.total_iter: must be whole and >= 1, got 0"),
    ({"train.total_iter": 2.5}, r"train\.total_iter: must be whole and >= 1, got 2\.5"),
    ({"train.ema_deacy": 0.9, "train.ema_decay": ...}, r"train\.ema_deacy: unknown; did you mean 'ema_decay'\?"),
    ({"train.ema_decay": 1.5}, r"train\.ema_decay: must be in \[0, 1\], got 1\.5"),
    ({"train.optim_g.lr": "fast"}, r"train\.optim_g\.lr: must be a number > 0 and finite, got 'fast'"),
    ({"train.optim_g.lr": -1}, r"train\.optim_g\.lr: must be > 0 and finite, got -1"),
    ({"train.optim_g.lr": ...}, r"train\.optim_g\.lr: missing"),
    ({"train.optim_g": ...}, r"train\.optim_g: missing"),
    ({"train.scheduler.type": ...}, r"train\.scheduler\.type: missing"),
    ({"train.pixel_opt": ...}, r"train\.pixel_opt: missing; training needs a loss"),
    (
        {"train.pixel_opt.type": "L1Los"},
        r"train\.pixel_opt\.type: BasicSR has no loss named 'L1Los'; did you mean 'L1Loss'\?",
    ),
    ({"train.optim_g.type": "AdmaW"}, r"train\.optim_g\.type: there is no optimizer 'AdmaW'; did you mean 'AdamW'\?"),
    ({"train.optim_g.type": "LBFGS"}, r"train\.optim_g\.type: there is no optimizer 'LBFGS'"),
    (
        {"train.optim_g.type": "AdamW", "model_type": "SRModel"},
        r"train\.optim_g\.type: SRModel knows Adam only, got 'AdamW'; model_type: SparseSRModel knows more",
    ),
    (
        {"train.optim_g": {"type": "SGD", "lr": 0.1, "momentm": 0.9}},
        r"train\.optim_g: SGD refuses these options: .*'momentm'.* \(known: lr, momentum, ",
    ),
    ({"train.optim_g.betas": [0.9]}, r"train\.optim_g\.betas: must be two numbers, got \[0\.9\]"),
    (
        {"train.optim_g.betas": [0.9, 1]},
        r"train\.optim_g: Adam refuses these options: Invalid beta parameter at index 1",
    ),
    ({"train.optim_g.betas": [0.9, 2]}, r"train\.optim_g\.betas: must be in \[0, 1\], got \[0\.9, 2\]"),
    ({"train.scheduler.type": "CosineLR"}, r"train\.scheduler\.type: BasicSR has no scheduler 'CosineLR'"),
    ({"train.scheduler.milestones": ...}, r"train\.scheduler: MultiStepLR refuses these options: .*'milestones'"),
    ({"train.scheduler.gama": 0.1}, r"train\.scheduler: MultiStepLR refuses these options: .*'gama'"),
    (
        {"train.scheduler": {"type": "CosineAnnealingRestartLR", "periods": [1, 1], "restart_weights": [1, 1]}},
        r"train\.scheduler\.periods: must add up to total_iter 4, got 2: BasicSR fails after the last",
    ),
    (
        {"train.scheduler": {"type": "CosineAnnealingRestartLR", "periods": [2, 2]}},
        r"train\.scheduler: CosineAnnealingRestartLR refuses these options: periods and restart_weights should have",
    ),
    ({"train.grad_clip": 0}, r"train\.grad_clip: must be .*> 0 and finite or ~ \(nothing\), got 0"),
    ({"train.grad_clip": "tight"}, r"train\.grad_clip: must be a number > 0 .*got 'tight'"),
    ({"train.grad_clp": 1}, r"train\.grad_clp: unknown; did you mean 'grad_clip'\?"),
    ({"train.accumulate": 0}, r"train\.accumulate: must be >= 1, got 0"),
    ({"train.accumulate": 1.5}, r"train\.accumulate: must be an integer >= 1, got 1\.5"),
    ({"train.accumulate": 3}, r"train\.accumulate: must divide batch_size_per_gpu 2, .*, got 3"),
    (
        {"train.accumulate": 2, "train.pixel_opt.reduction": "sum"},
        r"train\.pixel_opt\.reduction: must be mean with accumulate 2, .*, got 'sum'",
    ),
    ({"train.autocast": "bf61"}, r"train\.autocast: must be one of 'bf16', 'fp16' or ~ \(nothing\), got 'bf61'"),
    ({"train.autocast": True}, r"train\.autocast: must be one of 'bf16', 'fp16' or ~ \(nothing\), got True"),
    ({"train.autocast": "fp16"}, r"train\.autocast: must be bf16 or ~ on the CPU, got 'fp16'"),
    ({"train.deterministic": 1}, r"train\.deterministic: must be true or false, got 1"),
    (
        {"model_type": "SRModel", "train.accumulate": 2},
        r"train\.accumulate: unknown to SRModel; model_type: SparseSRModel has it",
    ),
    ({"model_type": "SRModel", "val.tile": 8}, r"val\.tile: unknown to SRModel; model_type: SparseSRModel has it"),
    ({"val.tile": 0}, r"val\.tile: must be >= 1 or ~ \(nothing\), got 0"),
    ({"val.tile": 8, "val.tile_overlap": -1}, r"val\.tile_overlap: must be >= 0 or ~ \(nothing\), got -1"),
    ({"val.tile": 8, "val.tile_overlap": 8}, r"val\.tile_overlap: must be less than val\.tile, got 8 with tile 8"),
    ({"val.tile_overlap": 8}, r"val\.tile_overlap: must be less than val\.tile, got 8 with tile ~"),
    ({"val.tile_overlp": 8}, r"val\.tile_overlp: unknown; did you mean 'tile_overlap'\?"),
    ({"logger": ...}, r"logger: missing"),
    ({"logger.print_freq": 0}, r"logger\.print_freq: must be whole and >= 1, got 0"),
    ({"val.val_frq": 1, "val.val_freq": ...}, r"val\.val_frq: unknown; did you mean 'val_freq'\?"),
    (
        {"val.metrics.psnr.type": "psnr"},
        r"val\.metrics\.psnr\.type: BasicSR has no metric named 'psnr'.*calculate_psnr",
    ),
    ({"path.pretrain_network_g": "nowhere.pth"}, r"path\.pretrain_network_g: there is no file 'nowhere\.pth'"),
    ({"path.resume_state": "nowhere.state"}, r"path\.resume_state: there is no file 'nowhere\.state'"),
]


@pytest.mark.parametrize(("changes", "message"), MALFORMED)
def test_a_wrong_option_is_explained_and_nothing_is_written(
    changes: dict[str, Any],
    message: str,
    training: Callable[..., str],
    here: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = training(changes)
    before = sorted(here.iterdir())
    assert main(["train", "-opt", file]) == 2
    captured = capsys.readouterr()
    assert re.search(message, captured.err), captured.err
    assert "Traceback" not in captured.err
    assert captured.err.startswith("sparse-sr: ")
    assert f"in {file}; nothing was run\n" in captured.err
    assert sorted(here.iterdir()) == before


def test_the_well_formed_file_passes(training: Callable[..., str], network: dict[str, Any]) -> None:
    options, remarks = preflight.check(load(training({"network_g": network})), training=True)
    assert remarks == []
    assert options["logger"]["use_tb_logger"] is False


def test_all_problems_are_reported_at_once(training: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    changes = {
        "network_g.attention.n_cluster": 4,
        "network_g.attention.share": 0,
        "network_g.block": {"type": "ELAB", "expansion": 0},
        "network_g.num_feat": -3,
        "scale": 3,
        "datasets.val.dataroot_gt": "nowhere",
        "train.optim_g.lr": None,
        "model_type": "Model",
    }
    assert main(["train", "-opt", training(changes), "--force_yml", "logger:print_freq=0"]) == 2
    lines = capsys.readouterr().err.splitlines()
    paths = [line.strip().partition(":")[0] for line in lines[1:]]
    assert sorted(paths) == sorted(
        [
            "network_g.attention.n_cluster",
            "network_g.attention.share",
            "network_g.block.expansion",
            "network_g.num_feat",
            "network_g.upscale",
            "datasets.train.gt_size",
            "datasets.train.dataroot_lq",
            "datasets.val.dataroot_gt",
            "train.optim_g.lr",
            "model_type",
            "logger.print_freq",
        ]
    )
    assert lines[0] == "sparse-sr: 11 problems in train.yml; nothing was run"


def test_validation_may_have_images_that_basicsr_cuts(training: Callable[..., str], here: Path) -> None:
    """BasicSR crops them to `scale` times the small ones; in training it does not."""
    changes = {"datasets.val.dataroot_gt": "datasets/train/HR", "datasets.val.dataroot_lq": "quarters"}
    (here / "quarters").mkdir()
    for number in range(6):
        image = io.imread(here / "datasets/train/LR" / f"{number}.png")
        io.imsave(here / "quarters" / f"{number}.png", image[:30, :31], check_contrast=False)
    preflight.check(load(training(changes)), training=True)


def test_a_file_that_is_no_image_is_not_measured(training: Callable[..., str], here: Path) -> None:
    for quality in ("HR", "LR"):
        (here / quality).mkdir()
        (here / quality / "0.png").write_bytes(b"")
    preflight.check(load(training({"datasets.val.dataroot_gt": "HR", "datasets.val.dataroot_lq": "LR"})), training=True)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "avif"])
@pytest.mark.parametrize("orientation", [1, 3, 5, 6, 7, 8])
@pytest.mark.parametrize("turned", ["HR", "LR", "HR LR"])
def test_sizes_are_those_that_basicsr_reads(
    training: Callable[..., str], here: Path, suffix: str, orientation: int, turned: str
) -> None:
    """EXIF may turn one picture of a pair, the other or both, in files of every kind."""
    from basicsr.utils import imfrombytes

    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    read = {}
    for quality, size in (("HR", (80, 64)), ("LR", (40, 32))):
        (here / quality).mkdir()
        file = here / quality / f"0.{suffix}"
        options = {"exif": exif} if quality in turned else {}
        Image.new("RGB", size, (10, 200, 30)).save(file, **options)
        read[quality] = imfrombytes(file.read_bytes()).shape[:2]
    option_file = training({"datasets.train.dataroot_gt": "HR", "datasets.train.dataroot_lq": "LR"})
    if read["HR"] == tuple(2 * side for side in read["LR"]):
        preflight.check(load(option_file), training=True)
    else:
        with pytest.raises(ConfigError, match=r"datasets\.train\.dataroot_lq: must hold images of 1/2 the size"):
            preflight.check(load(option_file), training=True)


@pytest.mark.parametrize("name", ["gt", "lq"])
@pytest.mark.parametrize("suffix", ["png", "tif", "jp2"])
@pytest.mark.parametrize("channels", [1, 3])
def test_bits_that_basicsr_does_not_read_are_remarked_on(
    training: Callable[..., str], here: Path, name: str, suffix: str, channels: int
) -> None:
    import cv2

    for quality, side in (("gt", 128), ("lq", 64)):
        (here / quality).mkdir()
        kind = np.uint16 if quality == name else np.uint8
        pixels = np.random.default_rng(0).integers(0, np.iinfo(kind).max + 1, (side, side, channels), dtype=kind)
        for number in range(2):
            cv2.imwrite(str(here / quality / f"{number}.{suffix}"), pixels if number else pixels.astype(np.uint8))
    (here / "meta.txt").write_text(f"0.{suffix} (128,128,3)\n1.{suffix} (128,128,3)\n")
    changes = {
        "datasets.train.dataroot_gt": "gt",
        "datasets.train.dataroot_lq": "lq",
        "datasets.train.meta_info_file": "meta.txt",
        "datasets.val.dataroot_gt": "gt",
        "datasets.val.dataroot_lq": "lq",
    }
    _, remarks = preflight.check(load(training(changes)), training=True)
    assert remarks == [
        f"datasets.{part}.dataroot_{name}: BasicSR reads 8 bits a channel, and '1.{suffix}' has more; its lower "
        "bits are lost (as in 1 of the first 2 images)"
        for part in ("train", "val")
    ]


@pytest.mark.parametrize("name", sorted(preflight._OPTIMIZERS))
def test_every_optimizer_is_accepted(name: str, training: Callable[..., str]) -> None:
    preflight.check(load(training({"train.optim_g.type": name})), training=True)


def test_numbers_given_as_text_become_numbers(training: Callable[..., str]) -> None:
    changes = {
        "train.optim_g.lr": "1e-4",
        "train.total_iter": "2e1",
        "val.val_freq": 5e3,
        "train.optim_g.weight_decay": 0,
        "network_g.res_scale": "1e-1",
    }
    options, _ = preflight.check(load(training(changes)), training=True)
    assert options["train"]["optim_g"] == {"type": "Adam", "lr": 1e-4, "weight_decay": 0}
    assert (options["train"]["total_iter"], options["val"]["val_freq"]) == (20, 5000)
    assert all(isinstance(number, int) for number in (options["train"]["total_iter"], options["val"]["val_freq"]))


@pytest.mark.parametrize(
    ("changes", "remark"),
    [
        ({"network_g.img_range": 255.0}, r"network_g\.img_range: 255 makes queries so long"),
        ({"network_g.img_range": ...}, r"network_g\.img_range: 255 \(the default of this network\)"),
        (
            {"datasets.train.prefetch_mode": "cpu"},
            r"datasets\.train\.num_worker_per_gpu: 0 with prefetch_mode cpu reads",
        ),
        ({"model_type": "SRModel"}, r"model_type: SRModel leaves k-means centroids out of the EMA network"),
        (
            {"model_type": "SRModel", "train.ema_decay": 0, "train.warmup_itr": 3},
            r"train\.warmup_itr: BasicSR knows no such option",
        ),
    ],
)
def test_what_is_legal_but_hardly_meant_is_remarked_on(
    changes: dict[str, Any], remark: str, training: Callable[..., str]
) -> None:
    _, remarks = preflight.check(load(training(changes)), training=True)
    assert len(remarks) == 1
    assert re.search(remark, remarks[0]), remarks


LCOA = {"type": "LCoA", "every": 2}
GMSA = {"type": "GMSA", "every": 2}
ELAN = {"type": "ELAN", "num_feat": 12, "num_block": 1, "upscale": 2}


@pytest.mark.parametrize(
    ("changes", "buffers"),
    [
        ({"network_g.attention": LCOA}, "k-means centroids"),
        ({"network_g.attention": GMSA}, "BatchNorm statistics"),
        ({"network_g.attention": None, "network_g.block": {"type": "ELAB"}}, "BatchNorm statistics"),
        ({"network_g": ELAN}, "BatchNorm statistics"),
        ({"network_g.attention": [GMSA, LCOA]}, "k-means centroids and BatchNorm statistics"),
        ({"network_g.attention": None}, None),
    ],
)
def test_what_the_ema_network_of_srmodel_lacks_is_said(
    changes: dict[str, Any], buffers: str | None, training: Callable[..., str]
) -> None:
    _, remarks = preflight.check(load(training({**changes, "model_type": "SRModel"})), training=True)
    expected = f"model_type: SRModel leaves {buffers} out of the EMA network; prefer SparseSRModel"
    assert remarks == ([] if buffers is None else [expected])


@pytest.mark.parametrize("attention", [GMSA, None])
def test_window_attention_may_have_any_range(attention: object, training: Callable[..., str]) -> None:
    """BatchNorm keeps its queries short."""
    changes = {"network_g.img_range": 255.0, "network_g.attention": attention, "network_g.block": {"type": "ELAB"}}
    assert preflight.check(load(training(changes)), training=True)[1] == []


def test_a_plain_edsr_may_have_any_range(training: Callable[..., str]) -> None:
    _, remarks = preflight.check(
        load(training({"network_g.img_range": 255.0, "network_g.attention": None})), training=True
    )
    assert remarks == []


def test_a_remark_is_printed_and_training_goes_on(
    training: Callable[..., str], here: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert main(["train", "-opt", training({"network_g.img_range": 255.0, "train.total_iter": 1})]) == 0
    assert "note: network_g.img_range: 255" in caplog.text
    assert (here / "experiments" / "tiny" / "models" / "net_g_latest.pth").is_file()


def test_processes_without_a_common_seed_are_remarked_on(training: Callable[..., str]) -> None:
    for changes, number in (({}, 0), ({"manual_seed": ...}, 1)):
        check = preflight._Preflight(load(training(changes)), training=True)
        check.processes("pytorch")
        assert len(check.remarks) == number
    assert check.remarks[0].startswith("manual_seed: with --launcher each process draws its own")


@pytest.mark.parametrize(
    ("launcher", "changes", "message"),
    [
        ("slurm", {}, "--launcher slurm: needs CUDA GPUs; on the CPU start torchrun with --launcher pytorch"),
        ("pytorch", {"model_type": "SRModel"}, "model_type: must be SparseSRModel for several processes on the CPU"),
        (
            "pytorch",
            {"dist_params": {"backend": "ncc"}},
            "dist_params.backend: must be one of 'nccl', 'gloo', got 'ncc'",
        ),
        ("pytorch", None, "--launcher pytorch: needs what torchrun tells each process"),
    ],
)
def test_what_a_launcher_needs(
    launcher: str,
    changes: dict[str, Any] | None,
    message: str,
    training: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if changes is not None:
        monkeypatch.setenv("RANK", "0")
    assert main(["train", "-opt", training(changes), "--launcher", launcher]) == 2
    errors = capsys.readouterr().err
    assert "1 problem in" in errors
    assert message in errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"val": ...}, r"val: missing"),
        ({"datasets": {}}, r"datasets: must hold at least one data set"),
        ({"datasets.train": {}}, r"datasets\.train: data sets must be named val, val_2, \.\.\. and test, test_2"),
        ({"datasets.test_1.dataroot_gt": "x"}, r"datasets\.test_1\.dataroot_gt: there is no folder 'x'"),
        ({"path.pretrain_network_g": "experiments/net.pth"}, r"there is no file 'experiments/net\.pth'"),
    ],
)
def test_a_wrong_test_file_is_explained(
    changes: dict[str, Any],
    message: str,
    testing: Callable[..., str],
    here: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["test", "-opt", testing(changes)]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (here / "results").exists()


def test_an_untrained_network_is_remarked_on(testing: Callable[..., str]) -> None:
    _, remarks = preflight.check(load(testing({"path": None})), training=False)
    assert remarks == ["path.pretrain_network_g: nothing given, so an untrained network is tested"]


def test_a_large_network_is_checked_without_building_it(training: Callable[..., str]) -> None:
    """One convolution between a hundred thousand channels would need 360 GB."""
    changes = {"network_g.num_feat": 100_000, "network_g.attention.every": 5}
    with pytest.raises(ConfigError, match=r"network_g\.attention\.every: must hit") as caught:
        preflight.check(load(training(changes)), training=True)
    assert len(caught.value.problems) == 1
