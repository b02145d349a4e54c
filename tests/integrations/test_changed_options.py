"""Options of the optimizer and the schedule that change between a stop and its resume."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from basicsr_runs import GAN, logs, saved, train

Write = Callable[..., str]


def rates(log: Path) -> list[float]:
    return [float(rate) for rate in re.findall(r"lr:\((\S+),\)", log.read_text())]


def noted(here: Path, name: str = "tiny") -> list[str]:
    """Return the lines of the last log on changed options."""
    lines = logs(here, name)[-1].read_text().splitlines()
    return [line.partition("note: ")[2] for line in lines if "the value in the option file applies" in line]


COSINE = {"type": "CosineAnnealingRestartLR", "periods": [12], "eta_min": 1e-6}
MULTISTEP = {"type": "MultiStepLR", "milestones": [3, 7, 9], "gamma": 0.5}

CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "the learning rate": ({}, {"train.optim_g.lr": 5e-4}, ["train.optim_g.lr is 0.0005, and was 0.001"]),
    "the learning rate of a cosine": (
        {"train.scheduler": COSINE},
        {"train.optim_g.lr": 5e-4},
        ["train.optim_g.lr is 0.0005, and was 0.001"],
    ),
    "milestones, one of them passed": (
        {},
        {"train.scheduler.milestones": [2, 8]},
        ["train.scheduler.milestones is [2, 8], and was [3, 7, 9]"],
    ),
    "a longer cosine": (
        {"train.scheduler": {**COSINE, "periods": [5]}, "train.total_iter": 5},
        {"train.scheduler": COSINE},
        ["train.scheduler.periods is [12], and was [5]"],
    ),
    "more periods": (
        {"train.scheduler": {**COSINE, "periods": [5]}, "train.total_iter": 5},
        {"train.scheduler": {**COSINE, "periods": [4, 8], "restart_weights": [1, 0.5]}},
        ["train.scheduler.periods is [4, 8], and was [5]", "train.scheduler.restart_weights is [1, 0.5], and was [1]"],
    ),
    "a cosine in place of steps": (
        {},
        {"train.scheduler": COSINE},
        ["train.scheduler.type: there was a schedule with gamma, milestones, restart_weights, restarts, now eta_min"],
    ),
    "warm-up": ({"train.warmup_iter": 8}, {"train.warmup_iter": 6}, ["train.warmup_iter is 6, and was 8"]),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_schedule_goes_on_where_it_would_be(what: str, training: Write, here: Path) -> None:
    """The learning rates are those of a run that had it from the beginning, and a line tells each change."""
    first, then, told = CHANGES[what]
    base = {"val": ..., "network_g.attention": None, "train.scheduler": MULTISTEP}
    base |= {"logger.save_checkpoint_freq": 5, "train.ema_decay": 0}
    after = {**base, **{key: value for key, value in first.items() if key != "train.total_iter"}, **then}
    assert train(training(after), total=10, name="whole") == 0
    expected = rates(logs(here, "whole")[-1])[5:]
    for model in ("SparseSRModel", "SRModel"):
        if model == "SRModel" and "warm-up" in what:
            continue  # its states do not tell the warm-up
        kind = {"model_type": model}
        assert train(training({**base, **first, **kind}), total=5, name=model) == 0
        assert train(training({**after, **kind}), total=10, name=model) == 0
        notes = noted(here, model)
        assert len(notes) == len(told), notes
        for note, message in zip(notes, told, strict=True):
            assert message in note
        assert rates(logs(here, model)[-1]) == expected
        assert train(training({**after, **kind}), total=11, name=model) == 0  # taken up as it is now
        assert noted(here, model) == []


@pytest.mark.parametrize(
    ("optimizer", "option", "value"),
    [
        ("Adam", "weight_decay", 0.1),
        ("Adam", "betas", [0.5, 0.9]),
        ("AdamW", "eps", 1e-3),
        ("SGD", "momentum", 0.9),
        ("RMSprop", "alpha", 0.5),
    ],
)
def test_a_changed_option_of_the_optimizer_counts_and_is_told(
    optimizer: str, option: str, value: object, training: Write, here: Path
) -> None:
    base = {"val": ..., "train.optim_g": {"type": optimizer, "lr": 1e-3}}
    assert train(training(base), total=4) == 0
    assert train(training({**base, "train.optim_g": {"type": optimizer, "lr": 1e-3, option: value}}), total=8) == 0
    (note,) = noted(here)
    assert note.startswith(f"train.optim_g.{option} is ")
    (group,) = saved(here, "tiny", 8)["state"]["optimizers"][0]["param_groups"]
    assert (list(group[option]) if isinstance(value, list) else group[option]) == value


def test_both_optimizers_of_a_gan_are_looked_at(training: Write, here: Path) -> None:
    gan = {**GAN, "model_type": "SRGANModel", "network_g.attention": None, "train.ema_decay": 0, "val": ...}
    assert train(training(gan), total=4) == 0
    assert train(training({**gan, "train.optim_d.lr": 1e-4, "train.optim_g.weight_decay": 0.1}), total=5) == 0
    notes = noted(here)
    assert [note.split(";")[0] for note in notes] == [
        "train.optim_g.weight_decay is 0.1, and was 0",
        "train.optim_d.lr is 0.0001, and was 0.001",
    ]
