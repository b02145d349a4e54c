"""What several tests of training with BasicSR share: run the command, and read what it has written."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sparse_sr_attn.cli.main import main

GAN: dict[str, Any] = {
    "network_d": {"type": "UNetDiscriminatorSN", "num_in_ch": 3, "num_feat": 4},
    "train.optim_d": {"type": "Adam", "lr": 1e-3},
    "train.gan_opt": {"type": "GANLoss", "gan_type": "vanilla", "loss_weight": 5e-3},
}
"""What a training with a discriminator has besides."""


def train(file: str, *options: str, total: int, name: str = "tiny") -> int:
    """Train up to an iteration, from the newest state if there is one."""
    return main(
        ["train", "-opt", file, "--auto_resume", "--force_yml", f"name={name}", f"train:total_iter={total}", *options]
    )


def saved(here: Path, name: str, iteration: int) -> dict[str, Any]:
    """Everything that a run has saved of an iteration: weights, EMA, buffers, optimizer, schedule, random numbers."""
    folder = here / "experiments" / name
    files = {
        "weights": folder / f"models/net_g_{iteration}.pth",
        "state": folder / f"training_states/{iteration}.state",
    }
    files |= {path.name: path for path in folder.glob(f"models/net_d_{iteration}.pth")}
    assert all(file.is_file() for file in files.values()), f"iteration {iteration} was not saved"
    return {key: torch.load(file, map_location="cpu", weights_only=True) for key, file in files.items()}


def logs(here: Path, name: str = "tiny") -> list[Path]:
    """The logs of a run, the oldest first."""
    return sorted((here / "experiments" / name).glob("*.log"), key=lambda file: file.stat().st_mtime_ns)


def told_at_the_end(capsys: pytest.CaptureFixture[str]) -> str:
    """The last message of the command."""
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.rpartition("sparse-sr: ")[2]
