"""SparseSRGANModel and its kin: GAN training in which the EMA network is whole and nothing is lost to a NaN."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from basicsr.models import build_model
from basicsr_runs import GAN
from torch import Tensor, nn

from sparse_sr_attn.cli.main import main
from sparse_sr_attn.errors import TrainingError

Options = Callable[..., dict[str, Any]]

GMSA = {"type": "SparseEDSR", "num_feat": 8, "num_block": 2, "upscale": 2, "img_range": 1.0}
LCOA = {**GMSA, "attention": {"type": "LCoA", "every": 1, "share": 2, "num_clusters": 8, "chunk_size": 16}}
GMSA["attention"] = {"type": "GMSA", "every": 1, "share": 2, "window_sizes": [2, 4]}

both = pytest.mark.parametrize("kind", ["SRGANModel", "ESRGANModel"])


@pytest.fixture(params=[GMSA, LCOA], ids=["GMSA", "LCoA"])
def attended(request: pytest.FixtureRequest) -> dict[str, Any]:
    return copy.deepcopy(request.param)


@pytest.fixture
def options(options: Options) -> Options:
    """Options of a GAN as BasicSR hands them to a model."""

    def make(kind: str, changes: dict[str, Any] | None = None) -> dict[str, Any]:
        return options({**copy.deepcopy(GAN), "model_type": f"Sparse{kind}", **(changes or {})})

    return make


def step(model: Any, iteration: int) -> None:
    rng = torch.Generator().manual_seed(iteration)
    lq = torch.rand(2, 3, 16, 16, generator=rng)
    model.feed_data({"lq": lq, "gt": nn.functional.interpolate(lq, scale_factor=2), "lq_path": ["a.png", "b.png"]})
    model.optimize_parameters(iteration)


def trained(opt: dict[str, Any], steps: int) -> Any:
    torch.manual_seed(0)
    model = build_model(copy.deepcopy(opt))
    for iteration in range(1, steps + 1):
        step(model, iteration)
    return model


def state(model: Any) -> dict[str, Any]:
    """Everything a step may change, copied."""
    names = ("net_g", "net_d", "net_g_ema", "optimizer_g", "optimizer_d")
    return copy.deepcopy({name: dict(getattr(model, name).state_dict()) for name in names if hasattr(model, name)})


def assert_same(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@both
@pytest.mark.parametrize("extra", [{}, {"train.net_d_iters": 2, "train.net_d_init_iters": 1}])
def test_without_options_of_ours_it_trains_as_the_hosts_model_does(
    options: Options, kind: str, extra: dict[str, Any]
) -> None:
    opt = options(kind, {"network_g.attention": None, **extra})
    ours, theirs = trained(opt, 4), trained({**opt, "model_type": kind}, 4)
    assert type(theirs).__name__ == kind
    assert_same(state(ours), state(theirs))
    assert ours.log_dict == pytest.approx(theirs.log_dict)
    assert list(ours.log_dict) == list(theirs.log_dict)


@both
def test_the_ema_network_gets_every_buffer(options: Options, kind: str, attended: dict[str, Any]) -> None:
    """Also while the discriminator trains alone: the network of the image computes then too."""
    opt = options(kind, {"network_g": attended, "train.net_d_init_iters": 1})
    model = trained(opt, 4)
    buffers = dict(model.net_g.named_buffers())
    start = dict(trained(opt, 0).net_g.named_buffers())
    assert any(not torch.equal(value, start[name]) for name, value in buffers.items())
    assert_same(buffers, dict(model.net_g_ema.named_buffers()))
    theirs = dict(trained({**opt, "model_type": kind}, 4).net_g_ema.named_buffers())
    assert any(not torch.equal(value, theirs[name]) for name, value in buffers.items())
    weights = dict(model.net_g.named_parameters())
    assert any(not torch.equal(value, weights[name]) for name, value in model.net_g_ema.named_parameters())


@both
def test_clipping_shortens_the_gradient_of_the_image_network_alone(options: Options, kind: str) -> None:
    plain = {"network_g.attention": None, "train.ema_decay": 0, "train.optim_g": {"type": "SGD", "lr": 1.0}}
    start, free = (trained(options(kind, plain), steps) for steps in (0, 1))
    clipped = trained(options(kind, {**plain, "train.grad_clip": 1e-3}), 1)

    def moved(model: Any) -> Tensor:
        pairs = zip(model.net_g.parameters(), start.net_g.parameters(), strict=True)
        return torch.cat([(one - other).detach().flatten() for one, other in pairs])

    assert float(moved(free).norm()) > 1e-2
    assert float(moved(clipped).norm()) == pytest.approx(1e-3, rel=1e-3)
    assert clipped.log_dict["grad_norm"] == pytest.approx(float(moved(free).norm()), rel=1e-3)
    assert_same(dict(clipped.net_d.state_dict()), dict(free.net_d.state_dict()))


@both
@pytest.mark.parametrize("name", ["net_g", "net_d"])
def test_a_gradient_that_is_not_finite_changes_nothing(
    options: Options, kind: str, name: str, attended: dict[str, Any]
) -> None:
    model = trained(options(kind, {"network_g": attended}), 2)
    before = state(model)
    weight = next(getattr(model, name).parameters())
    handle = weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(TrainingError, match="iteration 3: the gradient must be finite"):
        step(model, 3)
    assert_same(state(model), before)
    handle.remove()
    step(model, 3)  # and training can go on
    assert model.is_healthy()
    with torch.no_grad():
        next(getattr(model, name).parameters()).fill_(float("nan"))
    assert not model.is_healthy()


@both
def test_autocast_and_fft_loss_join_in(options: Options, kind: str) -> None:
    changes = {"train.autocast": "bf16", "train.fft_opt": {"type": "FFTLoss", "loss_weight": 0.05}}
    model = trained(options(kind, changes), 2)
    assert "l_fft" in model.log_dict
    assert model.log_dict["l_fft"] > 0
    assert model.output.dtype == torch.float32
    silent = trained(options(kind, {**changes, "train.net_d_init_iters": 9}), 2)
    assert not {"l_fft", "l_g_pix"} & set(silent.log_dict)  # neither is trained by


def test_a_state_of_another_optimizer_of_the_discriminator_is_refused(
    training: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {**GAN, "model_type": "SparseSRGANModel", "logger.save_checkpoint_freq": 2}
    assert main(["train", "-opt", training({**changes, "train.total_iter": 2})]) == 0
    assert main(["train", "-opt", training({**changes, "train.optim_d.type": "AdamW"}), "--auto_resume"]) == 1
    assert "must be Adam, Adam, with which it was saved, got Adam, AdamW" in capsys.readouterr().err


REAL = {"high_order_degradation": False, "l1_gt_usm": True, "percep_gt_usm": True, "gan_gt_usm": False, "gt_usm": True}


@pytest.mark.parametrize("kind", ["RealESRNetModel", "RealESRGANModel"])
def test_the_models_of_real_esrgan_have_counterparts(
    kind: str, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On pairs. Their code says `.cuda()` without being asked; here that stays on the CPU, where JPEG cannot follow."""
    for owner in (Tensor, nn.Module):
        monkeypatch.setattr(owner, "cuda", lambda self, *_: self)
    opt = options("SRGANModel", {"network_g": GMSA, "train.grad_clip": 1.0})
    model = build_model({**opt, **REAL, "model_type": f"Sparse{kind}"})
    start = state(model)
    for iteration in (1, 2, 3):
        step(model, iteration)
    assert model.log_dict["grad_norm"] > 0
    assert_same(dict(model.net_g.named_buffers()), dict(model.net_g_ema.named_buffers()))
    for name, before in start.items():
        if name.startswith("net"):
            after = getattr(model, name).state_dict()
            assert any(not torch.equal(value, before[key]) for key, value in after.items()), name
