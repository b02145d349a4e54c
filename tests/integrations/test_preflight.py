"""Wrong options are explained before anything is loaded or written, all at once, each with its path."""

import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import basicsr_runs
import pytest
import torch
from skimage import io

from sparse_sr_attn.cli.main import main
from sparse_sr_attn.errors import ConfigError
from sparse_sr_attn_basicsr import preflight
from sparse_sr_attn_basicsr.option_file import load
from sparse_sr_attn_basicsr.randomness import random_state

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
NET = "network_g"
PSNR = "val.metrics.psnr"
REQUIRED = [
    f"{NET}.type",
    NET,
    "model_type",
    "name",
    "scale",
    "logger",
    "datasets",
    "datasets.train.io_backend",
    "train",
]
REQUIRED += ["train.optim_g", "train.optim_g.lr", "train.scheduler.type"]
GAN: dict[str, Any] = {"model_type": "SparseSRGANModel", **basicsr_runs.GAN}
VGG: dict[str, Any] = {"type": "PerceptualLoss", "layer_weights": {"conv5_4": 1}}
EDSR = {"type": "EDSR", "num_in_ch": 3, "num_out_ch": 3, "upscale": 2}
COSINE = {"type": "CosineAnnealingRestartLR", "periods": [2, 2]}
SINGLE = {
    "name": "single",
    "type": "SingleImageDataset",
    "dataroot_lq": "datasets/val/LR",
    "io_backend": {"type": "disk"},
}

MALFORMED = [
    *(({path: ...}, rf"{re.escape(path)}: missing") for path in REQUIRED),
    # our networks
    ({f"{NET}.type": "SparseEDRS"}, r"network_g\.type: BasicSR has no network named 'SparseEDRS'; .*'SparseEDSR'\?"),
    ({f"{NET}.num_feats": 8}, r"network_g\.num_feats: unknown; did you mean 'num_feat'\?"),
    ({f"{NET}.rgb_mean": [0.5]}, r"network_g\.rgb_mean: must have one number per channel"),
    ({f"{NET}.upscale": 4}, r"network_g\.upscale: must be 2, the option 'scale', got 4"),
    ({f"{NET}.upscale": ...}, r"network_g\.upscale: must be 2, the option 'scale', got 4 \(its default\)"),
    # attention
    ({f"{NET}.attention.n_cluster": 4}, r"network_g\.attention\.n_cluster: unknown; did you mean 'num_clusters'\?"),
    ({NET: {"type": "ELAN", "window_sizes": [4, 100_000_000]}}, r"window_sizes: must be in \[1, 1024\], got \[4, 1"),
    ({f"{NET}.attention.seed": 2**64}, r"network_g\.attention\.seed: must be an integer of 64 bits, got 18446744073"),
    ({"manual_seed": 2**32}, r"manual_seed: must be in \[0, 2\*\*32\) or ~ \(nothing\), got 4294967296"),
    ({"name": ["x" * 10_000]}, r"name: must be a string, got \['x{198}\.\.\. \(10004 characters\)$"),
    # rules that a layer's constructor knows, not its signature
    (
        {f"{NET}.attention": [{"type": "LCoA", "every": 2}, {"type": "GMSA", "every": 2, "window_sizes": []}]},
        r"network_g\.attention\.1\.window_sizes: must name at least one window size",
    ),
    (
        {f"{NET}.block": {"type": "ELAB"}, "train.pretrain_img_range": 255.0},
        r"train\.pretrain_img_range: must be ~ unless .* without block, .* got SparseEDSR with block",
    ),
    # BasicSR's networks
    ({NET: {**EDSR, "attention": {}}}, r"network_g\.attention: unknown to EDSR; type: SparseEDSR has it"),
    ({NET: {"type": "SRVGGNetCompact", "num_feats": 3}}, r"num_feats: unknown to SRVGGNetCompact; .*'num_feat'"),
    ({"network_d": {"type": "UNetDiscriminatorN"}}, r"network_d\.type: BasicSR has no network named"),
    ({"network_d": 3}, r"network_d: must be a map"),
    (
        {NET: {"type": "LCoAN", "upscale": 2}, "train.pretrain_img_range": 255.0},
        r"train\.pretrain_img_range: must be ~ unless network_g is a SparseEDSR without block, .* got LCoAN",
    ),
    ({"network_d": GAN["network_d"]}, r"network_d: unknown to SparseSRModel"),
    ({"train.optim_d": GAN["train.optim_d"]}, r"train\.optim_d: unknown to SparseSRModel"),
    # model, machine, general
    ({"model_type": "SparseSRMode"}, r"model_type: BasicSR has no model named 'SparseSRMode'; .*'SparseSRModel'\?"),
    ({"scale": -1}, r"scale: must be >= 1, got -1"),
    ({"path.weights": "x"}, r"path\.weights: unknown, and BasicSR would create a folder for it"),
    ({"train.total_iter": 10**30}, r"train\.total_iter: must be below 2\*\*31, got 1000000"),
    ({"num_gpu": "all"}, r"num_gpu: must be .*'auto', got 'all'"),
    pytest.param(
        {"num_gpu": 1},
        r"num_gpu: must be at most 0, the number of CUDA GPUs that this PyTorch sees, got 1; .*0 is the CPU",
        marks=no_gpu,
    ),
    ({"manual_seed": ..., "manual_sed": 1}, r"manual_sed: unknown; did you mean 'manual_seed'\?"),
    # data
    (
        {"datasets.train.dataroot_gt": "datasets/trian/HR"},
        r"there is no folder 'datasets/trian/HR'.*working directory: /",
    ),
    ({"datasets.val.dataroot_lq": "datasets/val/lr_"}, r"there is no folder .*; did you mean 'datasets/val/LR'\?"),
    ({"datasets.train.dataroot_lq": ...}, r"datasets\.train\.dataroot_lq: missing; PairedImageDataset needs it"),
    ({"datasets.train.dataroot_lq": "datasets"}, r"datasets\.train: PairedImageDataset .* number of images: 0, 6"),
    ({"datasets.train.dataroot_lq": "datasets/val/LR"}, r"train: PairedImageDataset .* number of images: 3, 6"),
    ({"datasets.train.filename_tmpl": "{}x2"}, r"datasets\.train: .* \dx2\.png is not in lq_paths\. filename_tmpl"),
    ({"datasets.train.gt_size": 33}, r"datasets\.train\.gt_size: must be a multiple of scale 2, got 33; nearest: 32"),
    ({"datasets.train.gt_size": 66}, r"datasets\.train: .* LQ \(32, 32\) is smaller than patch size \(33, 33\)"),
    ({"datasets.train.dataroot_gt": "datasets/train/LR"}, r"LR/\d\.png: .*GT \(32, 32\) is not 2x .* LQ \(32, 32\)"),
    ({"datasets.val.dataroot_gt": "datasets/val/LR"}, r"datasets\.val\.dataroot_lq: must hold images of 1/2"),
    ({"scale": 4, "network_g.upscale": 4}, r"val\.dataroot_lq: must hold images of 1/4 the size .* 64x64 and 32x32"),
    ({"datasets.train.gt_size": ...}, r"datasets\.train\.gt_size: missing; PairedImageDataset needs it"),
    ({"datasets.train.batch_size_per_gpu": 64}, r"dataset_enlarge_ratio: must be at least 11, got 10: .* no batch"),
    ({"datasets.train.type": "PairedImageDatset"}, r"BasicSR has no dataset named .*'PairedImageDataset'\?"),
    pytest.param(
        {"datasets.train.prefetch_mode": "cuda"}, r"prefetch_mode: must be cpu or ~ without a CUDA GPU", marks=no_gpu
    ),
    ({"datasets.vol": {}}, r"datasets\.vol: data sets must be named train and val, val_2, \.\.\., got 'vol'"),
    ({"datasets.train": ...}, r"datasets\.train: missing; training needs images"),
    ({"datasets.val": None}, r"datasets\.val: must be a mapping, got None"),
    # training
    ({"train.total_iter": ..., "train.total_iters": 9}, r"train\.total_iters: unknown; did you mean 'total_iter'\?"),
    ({"train.total_iter": 0}, r"train\.total_iter: must be whole and >= 1, got 0"),
    ({"train.ema_decay": 1}, r"train\.ema_decay: must be in \[0, 1\), got 1"),
    ({"train.optim_g.lr": "fast"}, r"train\.optim_g\.lr: must be a number > 0 and finite, got 'fast'"),
    ({"train.pixel_opt": ...}, r"train\.pixel_opt: missing; training needs a loss"),
    ({"train.pixel_opt.type": "L1Los"}, r"BasicSR has no loss named 'L1Los'; did you mean 'L1Loss'\?"),
    ({"train.optim_g.type": "AdmaW"}, r"train\.optim_g\.type: there is no optimizer 'AdmaW'; did you mean 'AdamW'\?"),
    ({"train.optim_g.type": "LBFGS"}, r"train\.optim_g\.type: there is no optimizer 'LBFGS'"),
    (
        {"train.optim_g": {"type": "SGD", "lr": 0.1, "momentm": 1}},
        r"unknown to SGD; did you mean 'momentum'\? \(known: lr,",
    ),
    ({"train.optim_g.betas": [0.9]}, r"train\.optim_g: Adam rejects these options: "),
    ({"train.optim_g.betas": [0.9, 1]}, r"train\.optim_g: Adam rejects these options: Invalid beta"),
    ({"train.optim_g.betas": [0.9, 2]}, r"train\.optim_g\.betas: must be in \[0, 1\], got \[0\.9, 2\]"),
    ({"train.scheduler.type": "CosineLR"}, r"train\.scheduler\.type: BasicSR has no scheduler 'CosineLR'"),
    ({"train.scheduler.milestones": ...}, r"train\.scheduler\.milestones: missing; MultiStepRestartLR needs it"),
    ({"train.scheduler.gama": 0.1}, r"train\.scheduler\.gama: unknown to MultiStepRestartLR; did you mean 'gamma'"),
    ({"train.scheduler": {**COSINE, "periods": [1], "restart_weights": [1]}}, r"must add up to total_iter 4, got 1: "),
    ({"train.scheduler": COSINE}, r"scheduler: CosineAnnealingRestartLR rejects these options: periods and restart"),
    ({"train.grad_clip": 0}, r"train\.grad_clip: must be .*> 0 and finite or ~ \(nothing\), got 0"),
    ({"train.accumulate": 3}, r"train\.accumulate: must divide batch_size_per_gpu 2 into equal parts, got 3"),
    (
        {"train.accumulate": 2, "train.pixel_opt.reduction": "sum"},
        r"reduction: must be mean with accumulate 2, .*'sum'",
    ),
    ({"train.autocast": "bf61"}, r"train\.autocast: must be one of 'bf16', 'fp16' or ~ \(nothing\), got 'bf61'"),
    ({"train.autocast": "fp16"}, r"train\.autocast: must be bf16 or ~ on the CPU, got 'fp16'"),
    ({"train.cuda_graph": True}, r"train\.cuda_graph: must be false on the CPU, got true, which needs a CUDA GPU"),
    ({"train.cuda_graph": True, "train.accumulate": 2}, r"train\.accumulate: must be 1 with cuda_graph: true, got 2"),
    ({"model_type": "SRModel", "train.accumulate": 2}, r"unknown to SRModel; model_type: SparseSRModel has it"),
    ({"model_type": "SRModel", "val.tile": 8}, r"val\.tile: unknown to SRModel; model_type: SparseSRModel has it"),
    ({"val.tile_overlap": 8}, r"val\.tile_overlap: must be less than val\.tile, got 8 with tile ~"),
    ({"val.tile": 8, "val.tile_overlap": 8}, r"val\.tile_overlap: must be less than val\.tile, got 8 with tile 8"),
    ({"val.val_frq": 1, "val.val_freq": ...}, r"val\.val_frq: unknown; did you mean 'val_freq'\?"),
    ({"val.metrics.psnr.type": "psnr"}, r"psnr\.type: BasicSR has no metric named 'psnr'.*calculate_psnr"),
    # metrics
    ({PSNR: 3}, r"val\.metrics\.psnr: must be a mapping with a key 'type', got 3"),
    ({PSNR: 3, "val.metrics.n": {"type": "calculate_niqe"}}, r"metrics\.n\.crop_border: missing; calculate_niqe needs"),
    ({"val.metrics": ["psnr"]}, r"val\.metrics: must be a mapping or ~ \(nothing\), got \['psnr'\]"),
    ({f"{PSNR}.type": ...}, r"psnr\.type: missing; it names the metric, e\.g\. calculate_psnr"),
    ({f"{PSNR}.crop_border": ...}, r"psnr\.crop_border: missing; calculate_psnr needs it"),
    ({f"{PSNR}.crop_border": "2"}, r"psnr: calculate_psnr fails \(TypeError"),
    ({f"{PSNR}.crop_border": -1}, r"psnr: calculate_psnr gives nan on an image of 64x64; crop_border is -1"),
    ({"val.metrics.n": {"type": "calculate_niqe", "crop_border": 0}}, r"metrics\.n: calculate_niqe fails \(.*64x64"),
    ({f"{PSNR}.test_y_chanel": True}, r"test_y_chanel: unknown to calculate_psnr; did you mean 'test_y_channel'\?"),
    ({f"{PSNR}.test_y_channel": "false"}, r"psnr\.test_y_channel: must be true or false, got 'false'"),
    ({f"{PSNR}.better": "lowr"}, r"psnr\.better: must be one of 'higher', 'lower', got 'lowr'"),
    ({f"{PSNR}.type": "calculate_psnr_pt"}, r"psnr: calculate_psnr_pt fails \(IndexError: .*\) on an image"),
    # losses
    ({"train.pixel_opt": "L1Loss"}, r"train\.pixel_opt: must be a mapping with a key 'type', got 'L1Loss'"),
    ({"train.pixel_opt": {}}, r"train\.pixel_opt\.type: missing; it names the loss, e\.g\. L1Loss"),
    ({"train.pixel_opt.loss_weigth": 1}, r"pixel_opt\.loss_weigth: unknown to L1Loss; did you mean 'loss_weight'\?"),
    ({"train.pixel_opt.loss_weight": "big"}, r"pixel_opt\.loss_weight: must be a number .*, got 'big'"),
    ({"train.pixel_opt.loss_weight": float("nan")}, r"pixel_opt\.loss_weight: must be other than inf and nan, got nan"),
    ({"train.pixel_opt.reduction": "avg"}, r"pixel_opt: L1Loss rejects these options: .*avg.*'none', 'mean', 'sum'"),
    ({"train.pixel_opt.type": "GANLoss"}, r"pixel_opt\.gan_type: missing; GANLoss needs it"),
    ({"train.pixl_opt": {"type": "L1Loss"}}, r"pixl_opt: unknown to SparseSRModel; did you mean 'pixel_opt'\?"),
    ({"train.gan_opt": {"type": "GANLoss", "gan_type": "vanilla"}}, r"gan_opt: unknown to SparseSRModel \(known: "),
    ({"train.l_opt": {"type": "L1Loss"}, "model_type": "SRModel", "train.ema_decay": 0}, r"l_opt: unknown to SRModel"),
    ({"train.perceptual_opt": {"type": "PerceptualLoss"}}, r"perceptual_opt\.layer_weights: missing; PerceptualLoss"),
    ({"train.perceptual_opt": {**VGG, "range_norm": "no"}}, r"range_norm: must be true or false, got 'no'"),
    ({"train.fft_opt": {"type": "FFTLoss", "reduction": "none"}}, r"fft_opt\.reduction: must be one of 'mean', 'sum'"),
    ({"train.fft_opt": {"type": "FFTLoss"}, "train.pixel_opt": ...}, r"pixel_opt: missing; training needs a loss"),
    (
        {"train.fft_opt": {"type": "FFTLoss"}, "model_type": "SRModel", "train.ema_decay": 0},
        r"train\.fft_opt: unknown to SRModel; model_type: SparseSRModel has it",
    ),
    # GAN models
    ({**GAN, "train.gan_opt": None}, r"train\.gan_opt: missing; SparseSRGANModel needs it"),
    ({**GAN, "train.gan_opt.gan_type": "vanila"}, r"GANLoss rejects these options: GAN type vanila is not impl"),
    (
        {"model_type": "SparseSRGANModel", "network_d": GAN["network_d"], "train.gan_opt": GAN["train.gan_opt"]},
        r"optim_d: miss",
    ),
    (
        {"model_type": "SparseESRGANModel", "train.optim_d": GAN["train.optim_d"]},
        r"network_d: missing; SparseESRGANModel needs",
    ),
    ({**GAN, "network_d.num_in_ch": ...}, r"network_d\.num_in_ch: missing; UNetDiscriminatorSN needs it"),
    ({**GAN, "train.optim_d.lr": 0}, r"train\.optim_d\.lr: must be > 0 and finite, got 0"),
    ({**GAN, "train.optim_g": 3, "train.optim_d.lr": 0}, r"train\.optim_d\.lr: must be > 0 and finite, got 0"),
    ({**GAN, "train.net_d_iters": 0}, r"train\.net_d_iters: must be whole and >= 1, got 0"),
    ({**GAN, "train.net_d_init_iter": 1}, r"train\.net_d_init_iter: unknown; did you mean 'net_d_init_iters'\?"),
    ({**GAN, "train.accumulate": 2}, r"train\.accumulate: must be 1 with SparseSRGANModel, whose discriminator"),
    *[
        (
            {**GAN, "network_g.attention": None, "model_type": f"{kind}GANModel", key: value},
            rf"unknown to {kind}GANModel; "
            rf"model_type: Sparse{kind}GANModel has it",
        )
        for kind in ("SR", "ESR")
        for key, value in (("train.grad_clip", 1), ("val.tile", 16), ("train.deterministic", True))
    ],
    # what the data sets themselves refuse
    ({"datasets.val": SINGLE}, r"SingleImageDataset has no image to compare with, which val\.metrics\.psnr needs"),
    ({"datasets.val": SINGLE, "datasets.val.dataroot_lq": ...}, r"dataroot_lq: missing; SingleImageDataset"),
    ({"datasets.train.io_backend": {}}, r"io_backend\.type: missing; it names where images are read from, e\.g\. disk"),
    ({"datasets.train.io_backend": {"type": "dsik"}}, r"datasets\.train: .* Backend dsik is not supported"),
    ({"datasets.train.io_backend": {"type": "disk", "db": 1}}, r"the first sample cannot be read: .*TypeErr"),
    ({"datasets.train.io_backend": {"type": "lmdb"}}, r"datasets\.train: .* should both in lmdb formats"),
    ({"datasets.train.meta_info_file": "no.txt"}, r"datasets\.train: .*No such file or directory: 'no\.txt'"),
    ({"datasets.train.filename_tmpl": "{}_{}"}, r"PairedImageDataset rejects these options: IndexError"),
    ({"datasets.train.mean": [0, 0, 0], "datasets.train.std": [0, 0, 0]}, r"first sample .*division by zero"),
    ({"datasets.train.color": "Y"}, r"color: must be one of 'y', 'rgb' or ~ \(nothing\), got 'Y'"),
    ({"datasets.train.use_hflip": "yes"}, r"use_hflip: must be true or false or ~ \(nothing\), got 'yes'"),
    ({"datasets.train.use_hflp": True}, r"datasets\.train\.use_hflp: unknown; did you mean 'use_hflip'\?"),
    ({"datasets.train.type": "REDSDataset"}, r"datasets\.train\.dataroot_flow: missing; REDSDataset needs it"),
    # top level, logger
    ({"manual_sed": 1}, r"manual_sed: unknown; did you mean 'manual_seed'\?"),
    (
        {"manual_sed": 1, "model_type": "SRModel", "train.ema_decay": 0},
        r"manual_sed: unknown; did you mean 'manual_seed'\?",
    ),
    ({"name": "a/b"}, r"name: must be fit for the name of a folder, got 'a/b'"),
    ({"path": 3}, r"path: must be a mapping or ~ \(nothing\), got 3"),
    ({"path.strict_load": False}, r"path\.strict_load: unknown; did you mean 'strict_load_g'\?"),
    ({"logger.wandb": {"project": "p"}}, r"logger\.use_tb_logger: must be true with logger\.wandb\.project"),
    ({"logger.wandb": {"project": "p"}}, r"logger\.wandb\.project: needs wandb: pip install wandb"),
    ({"train.optim_g.amsgrad": "yes"}, r"train\.optim_g\.amsgrad: must be true or false, got 'yes'"),
    # without building it: one convolution between a hundred thousand channels would need 360 GB
    ({f"{NET}.num_feat": 100_000, f"{NET}.attention.every": 5}, r"network_g\.attention\.every: must hit"),
    # networks of BasicSR
    ({NET: {"type": "EDSR", "num_in_ch": 3, "upscale": 2}}, r"network_g\.num_out_ch: missing; EDSR needs it"),
    ({NET: {**EDSR, "upscale": 4}}, r"network_g: must upscale by 2, the option 'scale', but does so by 4"),
    ({NET: {"type": "MSRResNet", "num_feat": "many"}}, r"network_g: MSRResNet cannot be built with these options: "),
    ({"path.pretrain_network_g": "nowhere.pth"}, r"path\.pretrain_network_g: there is no file 'nowhere\.pth'"),
    ({"path.resume_state": "nowhere.state"}, r"path\.resume_state: there is no file 'nowhere\.state'"),
]


@pytest.mark.promise("R22")
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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"datasets\.{}: must hold at least one image; PairedImageDataset finds none"),
        ("9.png (64,64,3)\n", r"datasets\.{}: the first sample cannot be read: datasets/{}/LR/9\.png: .*No such file"),
    ],
)
@pytest.mark.parametrize("part", ["train", "val"])
def test_a_list_of_images_that_leads_nowhere(
    content: str, message: str, part: str, problem: Callable[..., str], here: Path
) -> None:
    (here / "meta.txt").write_text(content)
    assert re.search(message.format(part, part), problem({f"datasets.{part}.meta_info_file": "meta.txt"}))


@pytest.mark.parametrize(("part", "quality", "content"), [("train", "HR", b"hello"), ("val", "LR", b"")])
def test_a_file_that_is_no_image_is_named(
    part: str, quality: str, content: bytes, training: Callable[..., str], here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for each in ("HR", "LR"):
        shutil.copytree(here / "datasets" / part / each, here / each)
    for file in (here / quality).iterdir():
        file.write_bytes(content)
    options = training({f"datasets.{part}.dataroot_gt": "HR", f"datasets.{part}.dataroot_lq": "LR"})
    assert main(["train", "-opt", options]) == 2
    errors = capfd.readouterr().err
    assert re.search(rf"datasets\.{part}: .*{quality}/\d\.png\b", errors), errors
    assert "1 problem in" in errors
    assert not (here / "experiments").exists()


def test_an_empty_folder_of_single_images(problem: Callable[..., str], here: Path) -> None:
    (here / "none").mkdir()
    changes = {"datasets.val": {**SINGLE, "dataroot_lq": "none"}, "val.metrics": ...}
    assert "datasets.val: must hold at least one image; SingleImageDataset finds none" in problem(changes)


def test_metrics_that_look_at_what_else_they_get_may_have_more_options(
    remarks: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from basicsr.utils.registry import METRIC_REGISTRY

    def calculate_mine(img: Any, img2: Any, **kwargs: Any) -> float:
        return float(abs(img.astype(float) - img2).mean() ** kwargs.get("power", 1))

    monkeypatch.setitem(METRIC_REGISTRY._obj_map, "calculate_mine", calculate_mine)
    assert remarks({"val.metrics.mine": {"type": "calculate_mine", "power": 2, "better": "lower"}}) == []


def test_checks_draw_no_random_numbers(remarks: Callable[..., list[str]]) -> None:
    before = random_state()
    remarks({**GAN, "train.perceptual_opt": VGG})
    after = random_state()
    assert all(torch.equal(after[key], before[key]) if key == "torch" else after[key] == before[key] for key in before)


PASS: dict[str, dict[str, Any]] = {
    "BasicSR's single images": {"datasets.val": SINGLE, "val.metrics": ...},
    "a debug run, which starts no wandb": {"name": "debug_tiny", "logger.wandb": {"project": "p"}},
    "an average of enough iterations": {"train.ema_decay": 0.999, "train.total_iter": 3000},
    "no raw queries, so any range": {f"{NET}.img_range": 255.0, f"{NET}.attention": None},
    "windows, which BatchNorm keeps short": {
        f"{NET}.img_range": 255.0,
        f"{NET}.attention": {"type": "GMSA", "every": 2},
        f"{NET}.block": {"type": "ELAB"},
    },
    # files of BasicSR itself
    "EDSR": {
        "model_type": "SRModel",
        NET: {"type": "EDSR", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 8, "num_block": 2, "upscale": 2,
              "res_scale": 1, "img_range": 255.0, "rgb_mean": [0.4488, 0.4371, 0.4040]},
        "datasets.train.use_shuffle": True,
        "datasets.train.prefetch_mode": None,
        "manual_seed": 2**32 - 1,
        "logger.use_tb_logger": True,
        "logger.wandb": {"project": None, "resume_id": None},
        "dist_params": {"backend": "nccl", "port": 29500},
        "path": {"pretrain_network_g": None, "strict_load_g": False, "resume_state": None},
        "val.save_img": False,
        "val.metrics.psnr.better": "higher",
        "val.pbar": False,
    },
    "RCAN": {
        "model_type": "SRModel",
        NET: {"type": "RCAN", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 16, "num_group": 1, "num_block": 1,
              "squeeze_factor": 16, "upscale": 2, "res_scale": 1, "img_range": 255.0},
        "train.scheduler": {"type": "MultiStepLR", "milestones": [200000], "gamma": 0.5},
        "train.pixel_opt": {"type": "L1Loss", "loss_weight": 1.0, "reduction": "mean"},
        "train.warmup_iter": -1,
    },
    "ESRGAN": {
        **GAN,
        "model_type": "ESRGANModel",
        NET: {"type": "MSRResNet", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 8, "num_block": 2, "upscale": 2},
        "train.perceptual_opt": {**VGG, "vgg_type": "vgg19", "use_input_norm": True, "range_norm": False,
                                 "perceptual_weight": 1.0, "style_weight": 0, "criterion": "l1"},
        "train.gan_opt": {"type": "GANLoss", "gan_type": "vanilla", "real_label_val": 1.0, "fake_label_val": 0.0,
                          "loss_weight": "5e-3"},
        "train.net_d_iters": 1,
        "train.net_d_init_iters": 0,
    },
    "SwinIR": {
        "model_type": "SwinIRModel",
        NET: {"type": "SwinIR", "upscale": 2, "in_chans": 3, "img_size": 16, "window_size": 8, "img_range": 1.0,
              "depths": [2], "embed_dim": 12, "num_heads": [2], "mlp_ratio": 2, "upsampler": "pixelshuffle",
              "resi_connection": "1conv"},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PASS)
def test_right_files_pass_without_a_word(name: str, remarks: Callable[..., list[str]]) -> None:
    assert remarks(PASS[name]) == []


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
            "datasets.val.dataroot_gt",
            "train.optim_g.lr",
            "model_type",
            "logger.print_freq",
        ]
    )
    assert lines[0] == "sparse-sr: 10 problems in train.yml; nothing was run"


def test_validation_may_have_images_that_basicsr_cuts(remarks: Callable[..., list[str]], here: Path) -> None:
    """BasicSR crops them to `scale` times the small ones; in training it does not."""
    changes = {"datasets.val.dataroot_gt": "datasets/train/HR", "datasets.val.dataroot_lq": "quarters"}
    (here / "quarters").mkdir()
    for number in range(6):
        image = io.imread(here / "datasets/train/LR" / f"{number}.png")
        io.imsave(here / "quarters" / f"{number}.png", image[:30, :31], check_contrast=False)
    assert remarks(changes) == []


def test_a_model_of_a_fork_may_read_a_known_name_elsewhere(
    remarks: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As HAT's model reads `tile` at the top level; with other models it is nowhere but in `val`."""
    from basicsr.models.sr_model import SRModel
    from basicsr.utils.registry import MODEL_REGISTRY

    class Tiles(SRModel):  # type: ignore[misc]
        def test(self) -> None:
            self.side = self.opt["tile"]["tile_size"]

    monkeypatch.setitem(MODEL_REGISTRY._obj_map, "Tiles", Tiles)
    assert remarks({"model_type": "Tiles", "train.ema_decay": 0, "tile": {"tile_size": 32}}) == []


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


RAW = {"network_g.attention.similarity": "dot"}


@pytest.mark.parametrize(
    ("changes", "remark"),
    [
        ({**RAW, "network_g.img_range": 255.0}, r"network_g\.img_range: 255 makes raw queries so long"),
        ({**RAW, "network_g.img_range": ...}, r"network_g\.img_range: 255 \(the default of this network\)"),
        ({"val": ...}, r"datasets\.val: nothing is validated without the section val"),
        ({"datasets.val": ...}, r"val: nothing is validated without a data set in datasets\.val"),
        ({"train.flavour": 3}, r"train\.flavour: nothing reads this option$"),
        ({"tile": {"tile_size": 32}}, r"^tile: nothing reads this option$"),
        (
            {"train.ema_decay": 0.999, "train.total_iter": 2000},
            r"train\.ema_decay: .* still contain 14% of those at the start after 2000 .* got 0\.999; 0\.9977 leaves 1%",
        ),
        ({"path.param_key": None}, r"path\.param_key: nothing reads this option; did you mean 'param_key_g'\?"),
        ({"model_type": "SRModel", "train.ema_decay": 0, "val.colour": 3}, r"val\.colour: nothing reads this option$"),
    ],
)
def test_what_is_legal_but_hardly_meant_is_remarked_on(
    changes: dict[str, Any], remark: str, remarks: Callable[..., list[str]]
) -> None:
    (found,) = remarks(changes)
    assert re.search(remark, found), found


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
def test_an_ema_network_whose_buffers_stay_untrained_is_refused(
    changes: dict[str, Any], buffers: str | None, remarks: Callable[..., list[str]], problem: Callable[..., str]
) -> None:
    for model in ("SRModel", "SRGANModel", "ESRGANModel"):
        of_model = {**(GAN if "GAN" in model else {}), **changes, "model_type": model}
        if buffers is None:
            assert remarks(of_model) == []
            continue
        assert problem(of_model).startswith(
            f"train.ema_decay: must be 0 with {model}, which leaves {buffers} of the averaged network untrained; "
            f"model_type: Sparse{model} does not"
        )
        remarks({**of_model, "train.ema_decay": 0})


def test_a_model_without_a_counterpart_of_ours_is_refused_too(training: Callable[..., str]) -> None:
    """And it reads the window size of its network."""
    with pytest.raises(ConfigError) as caught:
        preflight.check(load(training({"model_type": "SwinIRModel"})), training=True)
    assert [str(problem) for problem in caught.value.problems] == [
        "train.ema_decay: must be 0 with SwinIRModel, which leaves k-means centroids of the averaged network "
        "untrained; model_type: SparseSRModel does not",
        "network_g.window_size: missing; SwinIRModel reads it",
    ]


def test_a_remark_is_printed_and_training_goes_on(
    training: Callable[..., str], here: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert main(["train", "-opt", training({"train.flavour": 3, "train.total_iter": 1})]) == 0
    assert "note: train.flavour: nothing reads this option" in caplog.text
    assert (here / "experiments" / "tiny" / "models" / "net_g_latest.pth").is_file()


def test_processes_without_a_common_seed_are_remarked_on(
    training: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    for changes, number in (({}, 0), ({"manual_seed": ...}, 1)):
        _, remarks = preflight.check(load(training(changes)), training=True, launcher="pytorch")
        assert len(remarks) == number
    assert remarks[0].startswith("manual_seed: with --launcher and without a seed, each process draws its own")


@pytest.mark.parametrize(
    ("launcher", "changes", "message"),
    [
        ("pytorch", {"model_type": "SRModel", "train.ema_decay": 0}, "model_type: must be SparseSRModel for several"),
        ("pytorch", {"dist_params": {"backend": "ncc"}}, "dist_params.backend: must be one of 'nccl', 'gloo'"),
        ("pytorch", None, "--launcher pytorch: needs the environment variables of torchrun"),
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


@pytest.mark.promise("R22")
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
