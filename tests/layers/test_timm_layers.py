"""`timm:<name>`: timm's own layers, with our residual; those that do not fit are refused by name."""

import sys
from typing import Any

import pytest
import torch
from tolerances import assert_bit_equal
from torch import nn

from sparse_sr_attn import EDSR, LAYERS, ConfigError, ShapeError, UnknownNameError, build_layer
from sparse_sr_attn.blocks import read_attention
from sparse_sr_attn.layers import find_layer
from sparse_sr_attn.layers.timm_layers import REFUSED, USABLE
from sparse_sr_attn.testing import conformance

pytest.importorskip("sparse_sr_attn_basicsr").apply()  # a torchvision of another build must not stop timm's import
timm = pytest.importorskip("timm")

NEEDED = {"ge": {"use_mlp": False}}  # timm 1.0's own perceptron for it cannot be built
CLAUSES = [
    "forward sets no attribute",
    "evaluation moves nothing",
    "training moves state once a forward",
    "another number of channels is refused",
    "repeated runs are bit equal",
    "strides do not matter",
    "copies go on alike",
    "a sample that is not finite spoils no other",
    "checkpointed is plain",
]
everyone = pytest.mark.parametrize("name", USABLE)


def make(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return build_layer(f"timm:{name}", 8, **NEEDED.get(name, {}), **options)


def features(batch: int = 2, height: int = 5, width: int = 7) -> torch.Tensor:
    return torch.randn(batch, 8, height, width, generator=torch.Generator().manual_seed(0))


@everyone
def test_it_is_timm_s_own_layer(name: str) -> None:
    """To rounding, in training and evaluation; and a half of what that changes at half the scale."""
    layer = make(name)
    torch.manual_seed(0)
    theirs = timm.layers.create_attn(name, 8, **NEEDED.get(name, {}))
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.5)
    layer.attention.load_state_dict(theirs.state_dict())
    x = features()
    for training in (True, True, False):
        torch.testing.assert_close(layer.train(training)(x), theirs.train(training)(x))
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(layer.attention.state_dict()[key], value)
    layer.res_scale = 0.5
    torch.testing.assert_close(layer(x) - x, (theirs(x) - x) / 2)


@everyone
def test_any_size_keeps_its_shape(name: str) -> None:
    layer = make(name)
    for height, width in ((1, 1), (1, 2), (5, 7), (8, 8), (9, 13)):
        x = features(3, height, width)
        for training in (True, False):
            output = layer.train(training)(x)
            assert output.shape == x.shape
            assert torch.isfinite(output).all()
        alone = torch.cat([layer(sample[None]) for sample in x])
        torch.testing.assert_close(output, alone, rtol=1e-4, atol=1e-5)


@everyone
def test_it_can_start_as_the_identity_and_leave_it(name: str) -> None:
    layer = make(name, zero_init=True).train()
    x = features()
    torch.testing.assert_close(layer(x), x, rtol=0, atol=0)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (layer(x) * features(2).flip(0)).sum().backward()
        optimizer.step()
    assert not torch.allclose(layer(x), x, atol=1e-4)
    grads = [parameter.grad for parameter in layer.attention.parameters()]
    assert not grads or any(grad is not None and grad.any() for grad in grads)


@pytest.mark.unhooked
@everyone
def test_clauses_that_hold_for_all(device: torch.device, name: str) -> None:
    """What else the contract asks, about precision above all, is timm's."""
    subject = conformance.Subject(find_layer(f"timm:{name}"), options=NEEDED.get(name, {}))
    for clause in conformance.CLAUSES:
        if clause.name in CLAUSES:
            clause.check(subject, device)


@pytest.mark.slow
@pytest.mark.unhooked
@everyone
def test_they_export(device: torch.device, name: str) -> None:
    subject = conformance.Subject(find_layer(f"timm:{name}"), options=NEEDED.get(name, {}))
    conformance.check_export_with_dynamic_sizes(subject, device)


def test_the_registry_stays_as_it_was() -> None:
    make("eca")
    assert not any(name.startswith("timm") for name in LAYERS)


def test_an_option_file_can_name_it() -> None:
    """With its plain options; the network starts as the one without."""
    option = {"type": "timm:se", "every": 2, "rd_ratio": 0.5, "add_maxpool": True}
    plain, attended = (EDSR(num_feat=8, num_block=4, upscale=2, attention=a) for a in (None, option))
    attended.load_state_dict(plain.state_dict(), strict=False)
    image = torch.rand(1, 3, 6, 7, generator=torch.Generator().manual_seed(0))
    assert_bit_equal(attended.eval()(image), plain.eval()(image))
    assert [type(layer.attention).__name__ for layer in attended.attention] == ["SEModule"] * 2
    assert attended.attention[0].attention.add_maxpool
    with torch.device("meta"):
        EDSR(num_feat=8, num_block=4, upscale=2, attention=option)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            {"type": "timm:ecaa"},
            r"^attention\.type: no layer named 'timm:ecaa'; did you mean 'timm:eca'\? \(known: tim",
        ),
        ({"type": "timm:"}, r"^attention\.type: no layer named 'timm:'"),
        *[
            ({"type": f"timm:{name}"}, rf"^attention\.type: timm:{name} cannot be used here, because")
            for name in REFUSED
        ],
        ({"type": "timm:eca", "kernal_size": 5}, r"^attention\.kernal_size: unknown; did you mean 'kernel_size'\?"),
        ({"type": "timm:se", "rd_ratio": "x"}, r"^attention\.rd_ratio: must be a number, got 'x'"),
        ({"type": "timm:sk", "stride": 2}, r"^attention\.stride: unknown"),
        ({"type": "timm:se", "share": 2}, r"^attention\.share: must be 1, because timm:se has nothing to share, got 2"),
    ],
    ids=str,
)
def test_a_wrong_option_is_explained(option: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_attention({"every": 2, **option}, 4)


def test_wrong_names_are_explained_to_python_too() -> None:
    with pytest.raises(UnknownNameError, match=r"^no layer named 'timm:non_local'; did you mean"):
        build_layer("timm:non_local", 8)
    with pytest.raises(ConfigError, match=r"^timm:halo cannot be used here, because it takes heights and widths"):
        build_layer("timm:halo", 8)
    with pytest.raises(ConfigError, match=r"^embed_dim must be >= 1, got 0$"):
        build_layer("timm:se", 0)


def test_what_timm_itself_refuses_is_passed_on() -> None:
    with pytest.raises(
        ConfigError, match=r"^timm [\d.]+ cannot build timm:lambda for embed_dim=6, num_heads=4: Assert"
    ):
        build_layer("timm:lambda", 6, num_heads=4)
    with pytest.raises(ConfigError, match=r"cannot build timm:se for embed_dim=8, gate_layer='sigmoyd': "):
        make("se", gate_layer="sigmoyd")


def test_a_layer_that_changes_the_size_is_refused() -> None:
    layer = make("splat", kernel_size=4)
    with pytest.raises(
        ShapeError, match=r"SplitAttn returns \(2, 8, 6, 8\) for \(2, 8, 5, 7\); use a kernel of odd size"
    ):
        layer(features())


@pytest.mark.parametrize("problem", [ImportError("No module named 'timm'"), RuntimeError("operator torchvision::nms")])
def test_a_timm_that_cannot_be_imported_is_explained(monkeypatch: pytest.MonkeyPatch, problem: Exception) -> None:
    class Broken:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "timm":
                raise problem

    monkeypatch.delitem(sys.modules, "timm")
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(ConfigError) as caught:
        read_attention({"type": "timm:eca", "every": 2}, 4)
    assert str(caught.value).startswith("attention.type: layers named timm:... need timm")
    assert str(problem) in str(caught.value)
    if isinstance(problem, ImportError):
        assert "pip install timm" in str(caught.value)


def test_a_timm_that_is_too_old_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def get_attn(name: str) -> type[nn.Module]:
        raise AssertionError(f"Invalid attn module ({name})")

    monkeypatch.setattr(timm.layers, "get_attn", get_attn)
    with pytest.raises(
        ConfigError, match=r"^timm:strip: timm [\d.]+ has no layer 'strip'; a newer one has: pip install"
    ):
        build_layer("timm:strip", 8)
