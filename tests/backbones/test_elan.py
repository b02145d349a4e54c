"""ELAN against the released code and the published parameter counts, and at any size."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sparse_sr_attn import ELAN, create_model, load_model
from sparse_sr_attn.backbones.base import DIV2K_MEAN
from sparse_sr_attn.backbones.elan import _cut, _padded, _reflected
from sparse_sr_attn.checkpoints.layouts import LAYOUTS
from sparse_sr_attn.layers.batch_norm import ConvNorm

GOLDEN = Path(__file__).parents[1] / "golden"
CASES: dict[str, Any] = json.loads((GOLDEN / "elan_index.json").read_text())
STEP = "elan_narrow_train_step"
RELEASED = next(layout for layout in LAYOUTS if layout.name == "the released ELAN")
SMALL: dict[str, Any] = {"num_feat": 8, "num_block": 2, "share": 2, "window_sizes": (2, 3, 4)}


def picture(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def in_our_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    named = {RELEASED.our_key(key): value for key, value in RELEASED.convert(tensors, {}).items()}
    return {key: value for key, value in named.items() if key is not None}


@pytest.mark.parametrize("name", sorted(set(CASES) - {STEP}))
def test_equals_released_code(name: str) -> None:
    """Same weights, same image; the released code works in 0..255."""
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    model = load_model(under("sd.", tensors), window_sizes=CASES[name]["config"]["window_sizes"])
    assert type(model) is ELAN
    with torch.no_grad():
        single = 255 * model(tensors["input"] / 255)
        double = 255 * model.double()(tensors["input"].double() / 255)
    torch.testing.assert_close(single, tensors["output"], rtol=0, atol=2e-4)
    torch.testing.assert_close(double, tensors["output_fp64"], rtol=0, atol=1e-9)


@pytest.mark.parametrize(("suffix", "tolerance"), [("", 2e-4), ("_fp64", 1e-9)])
def test_equals_a_released_training_step(suffix: str, tolerance: float) -> None:
    """Output, loss, every gradient and every buffer of BatchNorm after one step in training mode."""
    tensors = load_file(GOLDEN / f"{STEP}.safetensors")
    model = load_model(under("state_dict.", tensors)).train()
    model = model.double() if suffix else model
    output = 255 * model(tensors["input"].to(model.mean.dtype) / 255)
    loss = (output - tensors["target"]).abs().mean()
    loss.backward()
    torch.testing.assert_close(output, tensors[f"output{suffix}"], rtol=0, atol=tolerance)
    assert float(loss.detach()) == pytest.approx(float(tensors[f"loss{suffix}"]), rel=1e-6)

    gradients = in_our_names(under(f"grads{suffix}.", tensors))
    parameters = dict(model.named_parameters())
    assert set(gradients) == set(parameters)
    for key, expected in gradients.items():
        actual = parameters[key].grad
        assert actual is not None
        # A bias before BatchNorm has no gradient; what is there is rounding.
        size = max(float(expected.abs().max()), 1e-4)
        assert (actual - expected).abs().max() <= tolerance * size, key

    buffers = dict(model.named_buffers())
    after = in_our_names(under(f"state_after{suffix}.", tensors))
    assert after.keys() == {key for key in buffers if "norm" in key}
    for key, expected in after.items():
        torch.testing.assert_close(buffers[key], expected, rtol=tolerance, atol=tolerance, msg=key)


@pytest.mark.parametrize(("name", "upscale", "count"), [
    ("ELAN-light", 2, 582_012),
    ("ELAN-light", 3, 590_127),
    ("ELAN-light", 4, 601_488),
    ("ELAN", 2, 8_254_092),
    ("ELAN", 3, 8_278_407),
    ("ELAN", 4, 8_312_448),
])  # fmt: skip
def test_has_the_published_size(name: str, upscale: int, count: int) -> None:
    with torch.device("meta"):
        model = create_model(name, upscale=upscale)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_reflection_goes_to_and_fro() -> None:
    """As numpy does it, for any number of reflections."""
    for side in range(1, 20):
        for multiple in (1, 4, 16, 105):
            x = picture(2, 1, side, 3)
            expected = np.pad(x.numpy(), ((0, 0), (0, 0), (0, -side % multiple), (0, 0)), mode="reflect")
            assert torch.equal(_reflected(x, 2, multiple), torch.from_numpy(expected))


@pytest.mark.parametrize("size", [(16, 32), (9, 32), (16, 31), (17, 40), (8, 9), (1, 1)], ids=str)
@pytest.mark.parametrize("learns", [False, True])
def test_padding_equals_that_for_compilers(size: tuple[int, int], learns: bool) -> None:
    """To the bit, also where maps are smaller than their padding; and so does what is cut off."""
    x = picture(2, 3, *size).requires_grad_(learns)
    expected = _reflected(_reflected(x, 2, 16), 3, 16)
    padded = _padded(x, 16)
    assert torch.equal(padded, expected)
    if learns:
        probe = picture(*padded.shape, seed=1)
        assert torch.equal(*(torch.autograd.grad(each, x, probe)[0] for each in (padded, expected)))
    cut = _cut(expected.detach().contiguous(memory_format=torch.channels_last), *size)
    assert torch.equal(cut, x)
    assert cut.is_contiguous()


def calibrated(**options: Any) -> ELAN:
    """A network whose statistics are those of its activations, as after training."""
    torch.manual_seed(0)
    model = ELAN(**{**SMALL, **options}).train()
    with torch.no_grad():
        for seed in range(60):
            model(picture(2, 3, 12, 12, seed=seed))
    return model.eval()


def test_folding_is_exact_and_leaves_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolution and normalisation one after the other, as torch has them, give the same image."""
    model = calibrated(num_block=4)
    x = picture(2, 3, 12, 24, seed=99)
    folded = model(x)
    twin = copy.deepcopy(model).train()
    trained = twin(x)
    monkeypatch.setattr(ConvNorm, "forward", lambda self, x: torch.nn.BatchNorm2d.forward(self.norm, self.conv(x)))
    torch.testing.assert_close(folded, model(x), rtol=0, atol=1e-5)
    # The same statistics, and the same image in training.
    other = copy.deepcopy(model).train()
    torch.testing.assert_close(trained, other(x), rtol=0, atol=1e-5)
    for (key, one), two in zip(twin.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4, msg=key)


def test_evaluation_follows_its_weights() -> None:
    """Nothing folded is kept: weights and statistics that change later count."""
    model = calibrated()
    x = picture(1, 3, 12, 12)
    before = model(x)
    with torch.no_grad():
        model.body[0].attention[0].query.norm.running_mean += 1
    assert not torch.equal(model(x), before)


def test_the_mean_is_exact_in_every_precision() -> None:
    model = ELAN(**SMALL)
    for dtype in (torch.float64, torch.float32, torch.float64):
        assert torch.equal(model.to(dtype).mean.flatten(), torch.tensor(DIV2K_MEAN, dtype=dtype))
    with torch.device("meta"):
        empty = ELAN(**SMALL)
    assert torch.equal(empty.to_empty(device="cpu").mean.flatten(), torch.tensor(DIV2K_MEAN))
