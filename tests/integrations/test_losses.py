"""The loss on Fourier transforms; and losses that a fork adds to its SRModel, which SparseSRModel keeps."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from basicsr.losses import build_loss
from basicsr.models import build_model
from basicsr.models.sr_model import SRModel
from torch import Tensor, nn

from sparse_sr_attn.errors import ConfigError, TrainingError
from sparse_sr_attn_basicsr.losses import FFTLoss
from sparse_sr_attn_basicsr.model import SparseSRModel

Options = Callable[..., dict[str, Any]]
FFT = {"type": "FFTLoss", "loss_weight": 0.05, "reduction": "mean"}  # as in SMFANet's option files
PLAIN = {"network_g.attention": None, "train.ema_decay": 0, "train.optim_g": {"type": "SGD", "lr": 0.1}}


def batch(iteration: int) -> dict[str, Any]:
    lq = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(iteration))
    return {"lq": lq, "gt": nn.functional.interpolate(lq, scale_factor=2), "lq_path": ["a.png"] * 4}


def step(model: Any, iteration: int) -> None:
    model.feed_data(batch(iteration))
    model.optimize_parameters(iteration)


def fresh(build: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    return build()


def weights(model: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.net_g.named_parameters()}


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 8, 8), (3, 4, 7, 9)])
@pytest.mark.parametrize(("reduction", "weight"), [("mean", 1.0), ("sum", 0.05), ("mean", 0)])
def test_the_fft_loss_is_l1_of_the_transforms(shape: tuple[int, ...], reduction: str, weight: float) -> None:
    rng = np.random.default_rng(0)
    pred, target = rng.random(shape), rng.random(shape)
    difference = np.fft.rfft2(pred) - np.fft.rfft2(target)
    values = np.abs(np.stack([difference.real, difference.imag]))
    loss = build_loss({"type": "FFTLoss", "loss_weight": weight, "reduction": reduction})
    assert float(loss(torch.tensor(pred), torch.tensor(target))) == pytest.approx(
        weight * (values.mean() if reduction == "mean" else values.sum()), rel=1e-12
    )


@pytest.mark.parametrize("parts", [1, 2])
def test_it_joins_the_losses_of_the_host(options: Options, parts: int) -> None:
    """The step is along the gradient of the sum, computed here by hand; the image of each part counts by its share."""
    model = fresh(lambda: build_model(options({**PLAIN, "train.fft_opt": FFT, "train.accumulate": parts})))
    alone, data = copy.deepcopy(model.net_g), batch(1)
    output = alone(data["lq"])
    pixels, frequencies = (output - data["gt"]).abs().mean(), FFTLoss(0.05)(output, data["gt"])
    (pixels + frequencies).backward()
    step(model, 1)
    assert model.log_dict == pytest.approx({"l_pix": pixels.item(), "l_fft": frequencies.item()}, rel=1e-5)
    for (name, one), other in zip(model.net_g.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(one, other - 0.1 * other.grad, rtol=1e-5, atol=1e-7, msg=name)


# --- forks


class ForkModel(SRModel):  # type: ignore[misc]
    """An SRModel as forks have it: a loss more, a decay of their own, and clipping."""

    def init_training_settings(self) -> None:
        super().init_training_settings()
        train_opt = self.opt["train"]
        self.cri_freq = build_loss(train_opt["freq_opt"]).to(self.device) if train_opt.get("freq_opt") else None

    def get_optimizer(self, optim_type: str, params: Any, lr: float, **kwargs: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=lr, **kwargs)

    def optimize_parameters(self, current_iter: int) -> None:
        self.optimizer_g.zero_grad()
        self.output = self.net_g(self.lq)
        losses = {"l_pix": self.cri_pix(self.output, self.gt)}
        if self.cri_freq:
            losses["l_freq"] = self.cri_freq(self.output, self.gt)
        sum(losses.values()).backward()
        if self.opt["train"].get("use_grad_clip"):
            nn.utils.clip_grad_norm_(self.net_g.parameters(), 0.01)
        self.optimizer_g.step()
        self.log_dict = self.reduce_loss_dict(losses)
        if self.ema_decay > 0:
            self.model_ema(decay=self.ema_decay / 2)


class SparseForkModel(SparseSRModel, ForkModel):
    """What SparseSRModel is in that fork."""


@pytest.mark.parametrize("clip", [False, True])
def test_the_losses_of_a_fork_are_kept(options: Options, clip: bool) -> None:
    opt = options({**PLAIN, "train.ema_decay": 0.9})
    opt["train"] |= {"freq_opt": FFT, "use_grad_clip": clip}
    ours, theirs = (fresh(lambda b=build: b(copy.deepcopy(opt))) for build in (SparseForkModel, ForkModel))
    for iteration in (1, 2, 3):
        step(ours, iteration)
        step(theirs, iteration)
    assert ours.log_dict == pytest.approx(theirs.log_dict)
    assert set(ours.log_dict) == {"l_pix", "l_freq"}
    assert distance(weights(ours), weights(theirs)) == 0
    for one, other in zip(ours.net_g_ema.parameters(), theirs.net_g_ema.parameters(), strict=True):
        assert torch.equal(one, other)
    without = fresh(
        lambda: ForkModel({**copy.deepcopy(opt), "train": {**copy.deepcopy(opt["train"]), "freq_opt": None}})
    )
    for iteration in (1, 2, 3):
        step(without, iteration)
    assert distance(weights(ours), weights(without)) > 1e-4


@pytest.mark.parametrize("parts", [1, 4])
def test_the_losses_of_a_fork_count_by_parts_too(options: Options, parts: int) -> None:
    opt = options(PLAIN)
    opt["train"]["freq_opt"] = FFT
    whole = fresh(lambda: ForkModel(copy.deepcopy(opt)))
    opt["train"]["accumulate"] = parts
    model = fresh(lambda: SparseForkModel(opt))
    for iteration in (1, 2):
        step(whole, iteration)
        step(model, iteration)
    for (name, one), other in zip(model.net_g.named_parameters(), whole.net_g.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6, msg=name)
    assert model.log_dict == pytest.approx(whole.log_dict, rel=1e-5)


class TwiceModel(SRModel):  # type: ignore[misc]
    def optimize_parameters(self, current_iter: int) -> None:
        super().optimize_parameters(current_iter)
        self.optimizer_g.step()


def test_a_host_that_steps_twice_is_told_so_and_nothing_has_changed(options: Options) -> None:
    model = type("SparseTwiceModel", (SparseSRModel, TwiceModel), {})(options(PLAIN))
    before = weights(model)
    with pytest.raises(TrainingError, match="steps an optimizer more than once per iteration"):
        step(model, 1)
    assert distance(weights(model), before) == 0
    assert isinstance(model.optimizer_g, torch.optim.SGD)
    assert isinstance(model.net_g, nn.Module)


def test_what_a_model_reads_is_found_in_its_source(
    remarks: Callable[..., list[str]], problem: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from basicsr.utils.registry import MODEL_REGISTRY

    monkeypatch.setitem(MODEL_REGISTRY._obj_map, "SparseForkModel", SparseForkModel)
    changes = {"model_type": "SparseForkModel", "train.freq_opt": FFT, "train.use_grad_clip": True}
    assert remarks(changes) == []
    assert "train.use_grad_cilp: unknown; did you mean 'use_grad_clip'?" in problem(
        {**changes, "train.use_grad_cilp": True}
    )
    with pytest.raises(ConfigError, match=r"train\.freq_opt: unknown to SparseSRModel"):
        remarks({**changes, "model_type": "SparseSRModel"})


class OwnFFTModel(ForkModel):
    """Has `fft_opt` in its own code, as SAFMN's copy of BasicSR."""

    def init_training_settings(self) -> None:
        super().init_training_settings()
        self.cri_freq = build_loss(self.opt["train"]["fft_opt"]).to(self.device)


def test_a_forks_own_fft_opt_counts_once(options: Options) -> None:
    model = type("SparseOwnFFTModel", (SparseSRModel, OwnFFTModel), {})(options({**PLAIN, "train.fft_opt": FFT}))
    step(model, 1)
    assert set(model.log_dict) == {"l_pix", "l_freq"}
