"""LCoAN against the released code and the published parameter counts."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sparse_sr_attn import ConfigError, LCoAN, ShapeError, create_model, load_model
from sparse_sr_attn.checkpoints.layouts import LAYOUTS

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "lcoan_index.json").read_text())
RELEASED = next(layout for layout in LAYOUTS if layout.name == "the released LCoAN")


@pytest.mark.parametrize("name", sorted(CASES))
def test_equals_released_code(name: str) -> None:
    """Same weights, same image, same gradients; the default where no key counts twice."""
    case, tensors = CASES[name], load_file(GOLDEN / f"{name}.safetensors")
    model = load_model(
        {key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")},
        res_scale=case["res_scale"],
        chunk_size=case["window_size"],
        **({"count_keys_once": True} if name.endswith("_exact") else {}),
    )
    assert type(model) is LCoAN
    assert not model.training

    output = model(tensors["input"])
    torch.testing.assert_close(output, tensors["output"], rtol=0, atol=2e-6)

    (output * tensors["probe"]).sum().backward()
    names = {key: RELEASED.our_key(key.removeprefix("grad.")) for key in tensors if key.startswith("grad.")}
    expected = {ours: tensors[key] for key, ours in names.items() if ours}
    parameters = dict(model.named_parameters())
    assert set(expected) == set(parameters)
    for key, gradient in expected.items():
        actual = parameters[key].grad
        assert actual is not None
        error = (actual - gradient).abs().max() / gradient.abs().max()
        assert error <= 5e-5, f"{key}: {error:.1e}"


@pytest.mark.parametrize(("upscale", "effective", "released"), [
    (2, 14_340_227, 15_668_508),
    (3, 15_078_147, 16_406_428),
    (4, 14_930_563, 16_258_844),
])  # fmt: skip
def test_has_the_published_size(upscale: int, effective: int, released: int) -> None:
    """The released network has nine query convolutions, fixed mean shifts and a scalar that do nothing."""
    with torch.device("meta"):
        model = create_model("LCoAN", upscale=upscale)
    count = sum(p.numel() for p in model.parameters())
    assert count == effective
    dead = 9 * (128 * 128 * 9 + 128) + 2 * (3 * 3 + 3) + 1
    assert count + dead == released


@pytest.mark.parametrize("upscale", [2, 3, 4, 8])
def test_light_is_under_a_million(upscale: int) -> None:
    assert sum(p.numel() for p in create_model("LCoAN-light", upscale=upscale).parameters()) < 1_000_000


def test_wrong_channels_name_the_rule() -> None:
    model = LCoAN(1, 1, num_feat=8, num_group=1, num_block=1)
    with pytest.raises(ShapeError, match=r"x must be images \(b, 1, .*got shape \(1, 3, 4, 4\)"):
        model(torch.rand(1, 3, 4, 4))


def test_mean_needs_a_number_a_channel() -> None:
    with pytest.raises(ConfigError, match="rgb_mean: must have one number per channel"):
        LCoAN(1, 1, num_feat=8, num_group=1, num_block=1, rgb_mean=[0.1, 0.2, 0.3])


@pytest.mark.parametrize(("share", "providers"), [(None, [0]), (1, [0, 1, 2, 3]), (2, [0, 2]), (3, [0, 3])])
def test_who_shares(share: int | None, providers: list[int]) -> None:
    """`share` groups use one pattern; all their parameters receive gradients."""
    model = LCoAN(num_feat=8, num_group=4, num_block=1, share=share, chunk_size=10, num_clusters=4, zero_init=False)
    assert [i for i, group in enumerate(model.body) if hasattr(group.attention, "lsp")] == providers
    model(torch.rand(1, 3, 6, 7)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
