"""Weights of all layouts become the networks they were; bad files are refused, each with one clear error."""

import copy
import json
import pickle
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from edsr_pytorch import Theirs
from hostile import Payload
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from sparse_sr_attn import EDSR, ELAN, LAYERS, RCAN, AttentionLayer, CheckpointError, ConfigError, LCoAN, load_model
from sparse_sr_attn.backbones.base import DIV2K_MEAN, Network, encode_options, options_of
from sparse_sr_attn.checkpoints.layouts import LAYOUTS

GOLDEN = Path(__file__).parents[1] / "golden" / "lcoan_small_x2_13x17_repeat.safetensors"
GOLDEN_ELAN = Path(__file__).parents[1] / "golden" / "elan_narrow_train_step.safetensors"
LCOA: dict[str, Any] = {"type": "LCoA", "num_clusters": 5, "chunk_size": 7, "reduction": 3, "zero_init": False}

OURS: dict[str, Callable[[], nn.Module]] = {
    "LCoAN": lambda: LCoAN(num_feat=8, num_group=2, num_block=1, chunk_size=9, num_clusters=5, res_scale=0.7),
    "LCoAN x3, one in two shares": lambda: LCoAN(
        1,
        1,
        num_feat=8,
        num_group=4,
        num_block=2,
        upscale=3,
        share=2,
        reduction=3,
        num_adjacent=0,
        count_keys_once=False,
    ),
    "LCoAN x8, ablated": lambda: LCoAN(
        num_feat=6, num_group=2, num_block=1, upscale=8, share=1, routing="lsh", num_rounds=2, num_clusters=4
    ),
    "EDSR": lambda: EDSR(
        num_feat=8,
        num_block=4,
        upscale=2,
        img_range=1.0,
        res_scale=0.3,
        rgb_mean=(0.1, 0.2, 0.3),
        attention=[{**LCOA, "every": 2, "share": 2}, {**LCOA, "after": [1], "res_scale": 0.5}],
    ),
    "RCAN": lambda: RCAN(
        4, 4, num_feat=9, num_group=3, num_block=2, squeeze_factor=4, img_range=1.0, attention={**LCOA, "every": 1}
    ),
    "ELAN": lambda: ELAN(num_feat=8, num_block=2, share=2, window_sizes=(3, 5), expansion=3, img_range=1.0),
    "ELAN x3, grey to colour": lambda: ELAN(1, 3, num_feat=7, num_block=1, upscale=3, exact_shift=False),
    "EDSR of ELABs, with GMSA": lambda: EDSR(
        num_feat=8,
        num_block=4,
        upscale=2,
        attention={"type": "GMSA", "every": 2, "share": 2, "window_sizes": [2, 3], "zero_init": False},
        block={"type": "ELAB", "share": 2, "window_sizes": [4]},
    ),
    "RCAN of LCoAs": lambda: RCAN(num_feat=8, num_group=2, num_block=2, block={"type": "LCoA", "chunk_size": 9}),
}


def image(channels: int = 3) -> Tensor:
    return torch.rand(2, channels, 6, 7, generator=torch.Generator().manual_seed(0))


def trained(name: str) -> nn.Module:
    """One of ours after two forwards in training, so that its k-means state has moved."""
    torch.manual_seed(0)
    model = OURS[name]()
    for _ in range(2):
        model(image(model.num_in_ch))
    return model.eval()


def plain_edsr(**options: Any) -> EDSR:
    torch.manual_seed(0)
    return EDSR(**{"num_feat": 8, "num_block": 3, "upscale": 2, **options}).eval()


def without_options(model: nn.Module) -> dict[str, Tensor]:
    return {key: value for key, value in model.state_dict().items() if key != "options"}


def assert_same(one: nn.Module, other: nn.Module) -> None:
    assert not one.training
    assert torch.equal(one(image(other.num_in_ch)), other(image(other.num_in_ch)))
    expected = other.state_dict()
    assert set(one.state_dict()) == set(expected)
    for key, value in one.state_dict().items():
        assert torch.equal(value, expected[key]), key


# ---------------------------------------------------------------------------------------------------------- ours


@pytest.mark.promise("R12")
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", OURS)
def test_ours_come_back_with_nothing_told(name: str, suffix: str, tmp_path: Path) -> None:
    model = trained(name)
    path = tmp_path / f"net{suffix}"
    if suffix == ".pth":
        torch.save(model.state_dict(), path)
    else:
        save_file(model.state_dict(), path)
    again = load_model(path)
    assert type(again) is type(model)
    assert_same(again, model)


class Wrapped(nn.Module):
    """A network as somebody's training code holds it, beside what else it has."""

    def __init__(self, name: str, network: nn.Module) -> None:
        super().__init__()
        self.add_module(name, network)
        self.loss = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.register_buffer("step", torch.tensor(3))


def lightning(network: nn.Module) -> dict[str, Any]:
    """Return what Lightning's trainer saves of a module that holds a network as `net`."""
    module = Wrapped("net", network)
    optimizer = torch.optim.Adam(module.parameters(), lr=0)
    module.net(image(network.num_in_ch)).mean().backward()  # type: ignore[operator,attr-defined,arg-type]
    optimizer.step()
    return {
        "epoch": 3,
        "global_step": 100,
        "pytorch-lightning_version": "2.2.0",
        "state_dict": module.state_dict(),
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(31.0)}},
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [],
        "hyper_parameters": {"lr": 1e-4},
    }


def under(prefix: str) -> Callable[[nn.Module], Any]:
    return lambda model: {f"{prefix}{key}": value for key, value in model.state_dict().items()}


def compiled_inside(model: nn.Module) -> Any:
    """Return the weights of a network part of which is compiled, and another checkpointed, as FSDP names them."""
    return {
        key.replace("body.0.", "body.0._orig_mod.").replace("body.1.", "body._checkpoint_wrapped_module.1."): value
        for key, value in model.state_dict().items()
    }


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "AveragedModel": lambda model: AveragedModel(model).state_dict(),
    "AveragedModel of a compiled one": lambda model: AveragedModel(torch.compile(model, backend="eager")).state_dict(),
    "DataParallel of an AveragedModel": lambda model: nn.DataParallel(AveragedModel(model)).state_dict(),
    "a compiled DataParallel": lambda model: torch.compile(nn.DataParallel(model), backend="eager").state_dict(),
    "parts compiled and checkpointed": compiled_inside,
    "net.": under("net."),
    "model.": under("model."),
    "generator.": under("generator."),
    "netG.": under("netG."),
    "network.": under("network."),
    "a name that nobody has thought of": under("the_network_of.2024."),
    "a module that calls it body": under("body."),
    "module.net.module.": under("module.net.module."),
    "nn.Sequential": lambda model: nn.Sequential(model).state_dict(),
    "nn.ModuleDict": lambda model: nn.ModuleDict({"sr": model, "head": nn.Linear(2, 2)}).state_dict(),
    "a module with a loss": lambda model: Wrapped("generator", model).state_dict(),
    "Lightning": lightning,
    "params": lambda model: {"params": model.state_dict()},
    "params_ema": lambda model: {"params_ema": model.state_dict()},
    "ema": lambda model: {"ema": model.state_dict()},
    "state_dict": lambda model: {"state_dict": model.state_dict()},
    "parameters": lambda model: {
        key: nn.Parameter(value, requires_grad=False) for key, value in model.state_dict().items()
    },
    "model_state_dict": lambda model: {"model_state_dict": model.state_dict(), "loss": torch.tensor(0.1), "epoch": 3},
    "net_g beside net_d": lambda model: {"net_g": model.state_dict(), "net_d": nn.Conv2d(3, 4, 3).state_dict()},
    "generator. beside discriminator.": lambda model: {
        **under("generator.")(model),
        **{f"discriminator.{key}": value for key, value in nn.Conv2d(3, 4, 3).state_dict().items()},
    },
    "a network and an optimizer in a tuple": lambda model: (model.state_dict(), {"state": {}, "param_groups": []}),
    "containers in containers": lambda model: {"checkpoint": {"model": {"weights": [under("module.")(model)]}}},
    "an epoch among the weights": lambda model: {"epoch": 3, "name": "best", "config": {}, **model.state_dict()},
    "two names for the same": lambda model: {"net": model.state_dict(), "model": copy.deepcopy(model.state_dict())},
}


def read_back(content: Any, folder: Path) -> nn.Module:
    """Return what `load_model` makes of a file with this content."""
    torch.save(content, folder / "net.pth")
    return load_model(folder / "net.pth")


@pytest.mark.parametrize("name", ["EDSR", "RCAN of LCoAs", "plain", "released"])
def test_a_network_is_found_in_whatever_it_is_wrapped(name: str, tmp_path: Path) -> None:
    """With options and without, with keys of ours and of others."""
    if name == "released":
        original = theirs("RCAN")
        model = load_model(original.state_dict())
    else:
        model = original = plain_edsr() if name == "plain" else trained(name)
    for way, wrap in WRAPPERS.items():
        if way != "Lightning" or name != "released":  # it runs the network
            print(way)
            assert_same(read_back(wrap(copy.deepcopy(original)), tmp_path), model)


def shifted(model: nn.Module) -> dict[str, Tensor]:
    """Return other weights of the same network."""
    return {key: value + 1 if value.is_floating_point() else value for key, value in model.state_dict().items()}


def shadow(model: nn.Module) -> dict[str, Tensor]:
    """Return averages as they are usually written by hand: of the parameters only."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


AVERAGES: dict[str, Callable[[nn.Module], Any]] = {
    "params_ema before params": lambda model: {"params_ema": model.state_dict(), "params": shifted(model)},
    "params_ema after params": lambda model: {"params": shifted(model), "params_ema": model.state_dict()},
    "ema beside model": lambda model: {"model": shifted(model), "ema": model.state_dict()},
    "state_dict_ema": lambda model: {"state_dict": shifted(model), "state_dict_ema": model.state_dict()},
    "net_g_ema": lambda model: {"net_g": shifted(model), "net_g_ema": model.state_dict()},
    "netG_EMA": lambda model: {"netG": shifted(model), "netG_EMA": model.state_dict()},
    "modelEma": lambda model: {"model": shifted(model), "modelEma": model.state_dict()},
    "swa": lambda model: {"model": shifted(model), "swa": AveragedModel(model).state_dict()},
    "n_averaged says it": lambda model: {"a": shifted(model), "b": AveragedModel(model).state_dict()},
    "Lightning, net. beside ema.module.": lambda model: {
        "state_dict": {
            **{f"net.{key}": value for key, value in shifted(model).items()},
            **{f"ema.{key}": value for key, value in AveragedModel(model).state_dict().items()},
        }
    },
    "Lightning's WeightAveraging": lambda model: {
        "state_dict": {f"net.{key}": value for key, value in model.state_dict().items()},
        "current_model_state": {f"net.{key}": value for key, value in shifted(model).items()},
    },
    "online_model. beside ema_model.": lambda model: {
        "initted": torch.tensor(True),
        "step": torch.tensor(4),
        **{f"online_model.{key}": value for key, value in shifted(model).items()},
        **{f"ema_model.{key}": value for key, value in model.state_dict().items()},
    },
    "a shadow of the parameters": lambda model: {
        "model": {**model.state_dict(), **{name: value + 1 for name, value in shadow(model).items()}},
        "ema": {"decay": 0.999, "shadow": shadow(model)},
    },
}


@pytest.mark.parametrize("nest", AVERAGES.values(), ids=AVERAGES)
def test_averages_go_before_what_they_are_averages_of(nest: Callable[[nn.Module], Any]) -> None:
    for model in (plain_edsr(), trained("EDSR")):
        assert_same(load_model(nest(model)), model)


@pytest.mark.parametrize("with_keys", [False, True])
def test_averages_without_known_keys_are_not_passed_over_in_silence(with_keys: bool) -> None:
    model = plain_edsr()
    source: dict[str, Any] = {"model": model.state_dict(), "ema": {"shadow_params": list(shadow(model).values())}}
    if with_keys:  # in one state with the weights, without dots, as some write them
        averages = {f"ema.{key.replace('.', '')}": value for key, value in shadow(model).items()}
        source = {"state_dict": {**{f"model.{key}": value for key, value in model.state_dict().items()}, **averages}}
    with pytest.warns(UserWarning, match="averages under 'ema' have no keys that are known.*those of .*model"):
        assert_same(load_model(source), model)


@pytest.mark.parametrize(("source", "names"), [
    ({"model": {"a": 1}, "first": "state", "second": "other"}, "first, second"),
    ({"state_dict": {"student.": "state", "teacher.": "other"}}, r"state_dict student\.\*, state_dict teacher\.\*"),
    ({"ema_slow": "state", "ema_fast": "other", "model": "plain"}, "ema_slow, ema_fast"),
    ({"": "state", "teacher.": "other"}, r"the top, teacher\.\*"),
    (["state", "other"], "0, 1"),
])  # fmt: skip
def test_of_several_networks_none_is_taken(source: Any, names: str, tmp_path: Path) -> None:
    states = {"state": plain_edsr().state_dict(), "other": shifted(plain_edsr()), "plain": shifted(plain_edsr())}

    def filled_in(value: Any) -> Any:
        if isinstance(value, list):
            return [states[name] for name in value]
        flat: dict[str, Any] = {}
        for key, inner in value.items():
            if isinstance(inner, dict):
                flat[key] = filled_in(inner)
            elif inner in states and (key == "" or key.endswith(".")):
                flat |= {f"{key}{name}": tensor for name, tensor in states[inner].items()}
            else:
                flat[key] = states.get(inner, inner)
        return flat

    with pytest.raises(CheckpointError, match=rf"must hold one network, or one average of it, got 2: {names}; take"):
        read_back(filled_in(source), tmp_path)


def test_a_damaged_average_is_not_replaced_by_the_weights() -> None:
    model = plain_edsr()
    damaged = {key: value for key, value in model.state_dict().items() if key != "body.1.conv2.bias"}
    with pytest.raises(CheckpointError, match=r"missing: body\.1\.conv2\.bias"):
        load_model({"params": model.state_dict(), "params_ema": damaged})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(dtype: torch.dtype) -> None:
    """The bytes of the options survive a cast of everything, too."""
    model = trained("EDSR")
    cast = {key: value.to(dtype) if value.is_floating_point() else value for key, value in model.state_dict().items()}
    again = load_model(cast)
    assert {parameter.dtype for parameter in again.parameters()} == {torch.float32}
    for key, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[key].to(dtype).to(value.dtype)), key


def test_files_of_ours_without_options_need_to_be_told() -> None:
    for name, told in {
        "LCoAN": {"chunk_size": 9, "res_scale": 0.7},
        "RCAN": {"img_range": 1.0, "attention": {**LCOA, "every": 1}},
    }.items():
        model = trained(name)
        assert_same(load_model(without_options(model), **told), model)
        with pytest.raises(CheckpointError, match=r"not recorded in weights of .*; pass .* when loading: load_model\("):
            load_model(without_options(model))


def before_cosines(model: nn.Module, options: dict[str, Any]) -> dict[str, Any]:
    """The weights of a published attention as they were written before there was another: without its options."""
    told = {key: value for key, value in options.items() if key not in ("similarity", "logit_scale", "cluster_order")}
    for name in ("attention", "block"):
        if isinstance(told.get(name), dict):
            told[name] = {k: v for k, v in told[name].items() if k not in ("similarity", "cluster_order")}
    state = model.state_dict()
    assert not any("scale_logits" in key or key.endswith(".rank") for key in state)
    return {**state, "options": encode_options(told)}


PUBLISHED: dict[str, Any] = {"similarity": "dot", "cluster_order": "index"}


@pytest.mark.parametrize(
    "build",
    [
        lambda: LCoAN(num_feat=8, num_group=2, num_block=1, num_clusters=4, chunk_size=9, **PUBLISHED),
        lambda: EDSR(num_feat=8, num_block=2, img_range=1.0, attention={**LCOA, "every": 1, **PUBLISHED}),
        lambda: EDSR(num_feat=8, num_block=2, img_range=1.0, attention=[{**LCOA, "every": 2, **PUBLISHED}]),
        lambda: EDSR(num_feat=8, num_block=2, img_range=1.0, block={"type": "LCoA", "num_clusters": 3, **PUBLISHED}),
    ],
    ids=["LCoAN", "EDSR", "a list", "blocks"],
)
def test_weights_of_before_cosines_are_published_attention(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = build()
    model(image())
    model.eval()
    assert_same(load_model(before_cosines(model, options_of(model) or {})), model)


def test_overrides_go_before_what_the_weights_carry() -> None:
    model = trained("LCoAN")
    with torch.no_grad():
        for parameter in model.body[0].attention.coa.parameters():
            parameter.normal_()
    other = load_model(model.state_dict(), chunk_size=3)
    assert other.body[0].attention.lsp.chunk_size == 3
    assert not torch.equal(other(image()), model(image()))


# ------------------------------------------------------------------------------------- options in the state dict


@pytest.mark.parametrize("name", OURS)
def test_carried_options_disturb_nobody(name: str) -> None:
    """deepcopy, pickle, wrappers, averaging, functional_call, strict loads with and without them."""
    model = trained(name)
    state = model.state_dict()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301  (our own bytes)
        assert_same(twin, model)
    other = OURS[name]()
    other.load_state_dict(state)
    other.load_state_dict(without_options(model))
    assert_same(other.eval(), model)
    wrapped = nn.Sequential(OURS[name]())
    wrapped.load_state_dict(nn.Sequential(model).state_dict())
    assert_same(wrapped[0].eval(), model)
    averaged = AveragedModel(model)
    averaged.load_state_dict(averaged.state_dict())
    x = image(model.num_in_ch)
    assert torch.equal(torch.func.functional_call(model, state, x), model(x))
    assert_same(load_model({f"module.{key}": value for key, value in state.items()}), model)
    assert_same(load_model(torch.compile(model, backend="eager").state_dict()), model)
    assert "options" in dict(model.named_buffers())


def test_load_state_dict_keeps_the_options_of_the_network() -> None:
    """Weights of a network with another chunk size load; only `load_model` reads the options they carry."""
    model = trained("LCoAN")
    other = LCoAN(num_feat=8, num_group=2, num_block=1, chunk_size=3, num_clusters=5, res_scale=0.7)
    other.load_state_dict(model.state_dict())
    assert json.loads(bytes(other.state_dict()["options"].byte().tolist()))["chunk_size"] == 3
    assert other.body[0].attention.lsp.chunk_size == 3


@pytest.mark.parametrize("option", [{"img_range": 1.0}, {"res_scale": 0.1}, {"rgb_mean": (0.1, 0.2, 0.3)}])
@pytest.mark.parametrize("build", [EDSR, partial(RCAN, num_group=1, squeeze_factor=2)])
def test_networks_unlike_basicsrs_carry_their_options(build: Callable[..., Network], option: dict[str, Any]) -> None:
    """Without them, weights of the baseline that attention is compared with would be loaded for another range."""
    model = build(num_feat=8, num_block=2, upscale=2, **option).eval()
    state = model.state_dict()
    assert_same(load_model(state), model)
    other, (name, value) = build(num_feat=8, num_block=2, upscale=2), *option.items()
    with pytest.warns(UserWarning, match=rf"the weights are of an .* with {name} .*, not .*; build the network with"):
        other.load_state_dict(state)
    assert getattr(other, name, None) != value  # the options stay its own
    model.load_state_dict(without_options(model))


@pytest.mark.parametrize("options", [encode_options({"img_range": None}), torch.full((9,), 1e9), torch.zeros(2, 3)])
def test_equal_scales_in_other_words_and_options_of_others_are_no_reason_to_warn(options: Tensor) -> None:
    def build(**scales: Any) -> nn.Module:
        return nn.Sequential(EDSR(num_feat=8, num_block=2, upscale=2, attention={**LCOA, "every": 1}, **scales))

    model = build(img_range=1, rgb_mean=DIV2K_MEAN)
    model.load_state_dict(build(img_range=1.0).state_dict())
    model.load_state_dict({**model.state_dict(), "0.options": options})


def test_networks_like_basicsrs_carry_nothing() -> None:
    assert "options" not in plain_edsr(attention=[]).state_dict()
    assert "options" not in RCAN(num_feat=8, num_group=1, num_block=1, squeeze_factor=2).state_dict()
    assert "options" in trained("RCAN of LCoAs").state_dict()


def test_options_may_be_any_kind_of_map_list_and_number(monkeypatch: pytest.MonkeyPatch) -> None:
    class Odd(Mapping[str, Any]):
        def __getitem__(self, key: str) -> Any:
            return {"type": "LCoA", "after": range(1, 3), "num_clusters": torch.tensor(3).numpy()[()]}[key]

        def __iter__(self) -> Any:
            return iter(["type", "after", "num_clusters"])

        def __len__(self) -> int:
            return 3

    model = plain_edsr(attention=Odd(), res_scale=torch.tensor(0.5).numpy()[()])
    assert_same(load_model(model.state_dict()), model)

    class Scaled(AttentionLayer):
        def __init__(self, embed_dim: int, *, how: Any = None) -> None:
            super().__init__()

        def forward(self, x: Tensor, state: None = None) -> Tensor:
            return 2 * x

    monkeypatch.setattr(LAYERS, "_entries", dict(LAYERS._entries))
    LAYERS.register("Scaled", kind="layer", source="this test")(Scaled)
    assert "options" in plain_edsr(attention={"type": "Scaled", "every": 1, "how": "so"}).state_dict()
    assert "options" not in plain_edsr(attention={"type": "Scaled", "every": 1, "how": torch.relu}).state_dict()


# ---------------------------------------------------------------------------------------------- other code bases


def released(prefix: str = "state.") -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in load_file(GOLDEN).items() if key.startswith(prefix)}


def test_released_lcoan_is_as_published_by_default(tmp_path: Path) -> None:
    save_file(released(), tmp_path / "lcoan.safetensors")
    model = load_model(tmp_path / "lcoan.safetensors")
    layer = model.body[0].attention
    assert (layer.lsp.chunk_size, layer.lsp.count_keys_once, layer.coa.res_scale, model.body[0].res_scale) == (
        384,
        False,
        0.1,
        0.1,
    )
    assert (model.img_range, model.upscale, len(layer.lsp.centroids)) == (1.0, 2, 16)


def released_elan() -> dict[str, Tensor]:
    found = load_file(GOLDEN_ELAN)
    return {key.removeprefix("state_dict."): value for key, value in found.items() if key.startswith("state_dict.")}


def test_released_elan_is_as_published_by_default() -> None:
    """Its files carry a prefix; range and mean come from its mean shift."""
    model = load_model({"model_state_dict": {f"module.{key}": value for key, value in released_elan().items()}})
    provider = model.body[1].attention[0]
    assert (provider.window_sizes, provider.shift, provider.exact_shift) == ((4, 8, 16), True, False)
    assert (model.img_range, model.upscale, len(model.body), len(model.body[0].lfe)) == (255.0, 2, 2, 2)
    assert torch.allclose(model.mean.flatten(), torch.tensor([0.4488, 0.4371, 0.4040]))
    other = load_model(released_elan(), window_sizes=[2, 3], img_range=1.0, exact_shift=True)
    provider = other.body[1].attention[0]
    assert (provider.window_sizes, provider.exact_shift, other.img_range) == ((2, 3), True, 1.0)


def test_query_and_value_of_released_elan_lie_group_by_group() -> None:
    """Of 24 rows each third is one group's: four of the query, then four of the value; with two windows, each half."""
    state = released_elan()
    weight = state["body.0.modules_gmsa.gmsa_0.project_inp.0.weight"]
    for sizes, rows in (
        ([4, 8, 16], [0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19]),
        ([4, 8], [*range(6), *range(12, 18)]),
    ):
        provider = load_model(state, window_sizes=sizes).body[0].attention[0]
        assert torch.equal(provider.query.conv.weight, weight[rows])
        assert torch.equal(provider.shared.value.conv.weight, weight[[row for row in range(24) if row not in rows]])


def test_masked_shift_convolutions_of_released_elan_load_too() -> None:
    """Its second form has 3x3 kernels of which one tap a channel counts; what lies under the mask is arbitrary."""
    state = released_elan()
    model = load_model(state)
    names = [key.removesuffix(".conv1x1.weight") for key in state if key.endswith(".conv1x1.weight")]
    for name in names:
        kernel, hot = state.pop(f"{name}.conv1x1.weight"), state.pop(f"{name}.weight")
        state[f"{name}.b"] = state.pop(f"{name}.conv1x1.bias")
        state[f"{name}.m"] = hot.transpose(0, 1)
        state[f"{name}.w"] = torch.where(state[f"{name}.m"] > 0, kernel, torch.full_like(kernel, 7.0))
    assert_same(load_model(state), model)


def theirs(kind: str, upscale: int = 2, **options: Any) -> Theirs:
    torch.manual_seed(upscale)
    return Theirs(upscale, **({"groups": 2, "blocks": 2} if kind == "RCAN" else {}), **options)


def released_by(kind: str) -> dict[str, Tensor]:
    return theirs(kind).state_dict()


@pytest.mark.parametrize("upscale", [2, 3, 4, 8])
@pytest.mark.parametrize(("kind", "res_scale"), [("EDSR", 1.0), ("EDSR", 0.1), ("RCAN", 1.0)])
@torch.no_grad()
def test_edsr_pytorch_gives_the_same_image(kind: str, res_scale: float, upscale: int, tmp_path: Path) -> None:
    """Theirs work on 0..255, ours on 0..1, and inside both on 0..255."""
    network = theirs(kind, upscale, res_scale=res_scale)
    state = network.state_dict()
    torch.save(state, tmp_path / "net.pt", _use_new_zipfile_serialization=upscale > 2)  # theirs are of both kinds
    model = load_model(tmp_path / "net.pt", **({"res_scale": res_scale} if res_scale != 1 else {}))
    assert type(model) is {"EDSR": EDSR, "RCAN": RCAN}[kind]
    torch.testing.assert_close(model(image()), network(255 * image()) / 255, rtol=0, atol=1e-5)
    without_mean = {key: value for key, value in state.items() if "_mean" not in key}
    torch.testing.assert_close(load_model(without_mean, res_scale=res_scale)(image()), model(image()))


@pytest.mark.parametrize("kind", ["EDSR", "RCAN"])
@torch.no_grad()
def test_the_mean_shift_tells_range_and_mean(kind: str) -> None:
    """A network of EDSR-PyTorch that was trained on images in 0..1, with a mean of its own."""
    network = theirs(kind, rgb_range=1.0)
    network.sub_mean.bias.copy_(-torch.tensor([0.2, 0.3, 0.4]))
    network.add_mean.bias.copy_(torch.tensor([0.2, 0.3, 0.4]))
    model = load_model(network.state_dict())
    assert model.img_range == 1.0
    torch.testing.assert_close(model(image()), network(image()), rtol=0, atol=1e-6)
    state = {**network.state_dict(), "sub_mean.bias": torch.zeros(3), "add_mean.bias": torch.zeros(3)}
    assert load_model(state).img_range == 255.0


def test_the_large_edsr_scales_its_branches() -> None:
    """32 blocks of 256 channels were published with 0.1, all others with 1."""
    with torch.device("meta"):
        shapes = {
            key: value.shape
            for key, value in EDSR(num_feat=256, num_block=32, upscale=3, res_scale=0.1).state_dict().items()
        }
    state = {key: torch.zeros(shape) for key, shape in shapes.items()}
    assert load_model(state).body[0].res_scale == 0.1
    assert load_model(plain_edsr().state_dict()).body[0].res_scale == 1.0


# ------------------------------------------------------------------------------------------------------ overrides


def test_attention_for_weights_without_it_starts_as_the_identity() -> None:
    plain = plain_edsr(img_range=1.0)
    attention = {"type": "LCoA", "every": 1, "num_clusters": 4}
    model = load_model(plain.state_dict(), img_range=1.0, attention=attention)
    assert len(model.attention) == 3
    assert torch.equal(model(image()), plain(image()))


@pytest.mark.promise("R21")
def test_another_upscale_keeps_the_body_only_on_request() -> None:
    model = trained("EDSR")
    with pytest.raises(CheckpointError, match=r"upscale must be 2, that of the weights, got 4; allow_tail_reinit=True"):
        load_model(model.state_dict(), upscale=4)
    other = load_model(model.state_dict(), upscale=4, allow_tail_reinit=True)
    assert other(image()).shape == (2, 3, 24, 28)
    for key, value in other.state_dict().items():
        if key != "options" and not key.startswith(("upsample.", "conv_last.")):
            assert torch.equal(value, model.state_dict()[key]), key
    assert not torch.equal(other.conv_last.weight, model.conv_last.weight)
    assert_same(load_model(model.state_dict(), upscale=2, allow_tail_reinit=True), model)


@pytest.mark.parametrize(("overrides", "message"), [
    ({"chunk_sise": 4}, "chunk_sise: unknown (known: allow_tail_reinit"),
    ({"num_fet": 4}, "num_fet: unknown; did you mean 'num_feat'?"),
    ({"allow_tail_reinitt": True}, "allow_tail_reinitt: unknown; did you mean 'allow_tail_reinit'?"),
    ({"res_scale": "much"}, "res_scale: must be a number other than inf and nan, got 'much'"),
    ({"attention": {"type": "LCoA", "every": 4}}, "attention.every: must hit at least one of the 3 blocks, got 4"),
    ({"rgb_mean": [0.5]}, "rgb_mean: must have one number per channel"),
])  # fmt: skip
def test_wrong_overrides_are_explained(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_model(plain_edsr().state_dict(), **overrides)
    assert str(caught.value).startswith(message)


# ------------------------------------------------------------------------------------------------------------ bad


def edsr(**changes: Any) -> dict[str, Any]:
    """A small EDSR's weights, changed; a value of `...` takes a key away, `__` stands for a dot."""
    state: dict[str, Any] = plain_edsr().state_dict() | {k.replace("__", "."): v for k, v in changes.items()}
    return {key: value for key, value in state.items() if value is not ...}


def with_options(options: object) -> dict[str, Tensor]:
    text = options if isinstance(options, bytes) else json.dumps(options).encode()
    return {**trained("EDSR").state_dict(), "options": torch.tensor(list(text), dtype=torch.uint8)}


def filled(value: float) -> Tensor:
    tensor = torch.zeros(8, 8, 3, 3)
    tensor[1, 2, 0, 0] = value
    return tensor


def looped() -> dict[str, Any]:
    loop: dict[str, Any] = {}
    loop["params"] = loop
    return loop


WEIGHT = torch.zeros(8, 8, 3, 3)
CARRIED = json.loads(bytes(OURS["EDSR"]().state_dict()["options"].byte().tolist()))

CONTENTS: dict[str, tuple[Any, str]] = {
    "a list": ([torch.zeros(3)], "must hold a state dict, a mapping from keys to tensors, got a list"),
    "a tensor": (torch.zeros(3), "must hold a state dict, a mapping from keys to tensors, got a Tensor"),
    "nothing": (None, "got a NoneType"),
    "an empty map": ({}, "must hold weights, got an empty mapping"),
    "empty params": ({"params": {}}, "got 'params': dict, or such a mapping inside"),
    "a map that holds itself": (looped(), "must hold a mapping from keys to dense tensors, got 'params': dict"),
    "a training state": (
        {"epoch": 1, "iter": 9, "optimizers": []},
        "got 'epoch': int, 'iter': int, 'optimizers': list; this looks like a training state",
    ),
    "texts": ({"conv_first.weight": "zeros"}, "got 'conv_first.weight': str, or such a mapping inside"),
    "keys that are numbers": ({0: WEIGHT}, "got 0: Tensor"),
    "a sparse tensor": (edsr(conv_first__bias=torch.zeros(8).to_sparse()), "got 'conv_first.bias': Tensor"),
    "a tensor without values": (edsr(conv_first__bias=torch.zeros(8, device="meta")), "got 'conv_first.bias': Tensor"),
    "another network": (
        {"layers.0.attn.weight": WEIGHT, "norm.bias": torch.zeros(8)},
        "EDSR of EDSR-PyTorch, with keys like body.<b>.body.0.*\n  RCAN (ours and BasicSR's), with keys like "
        "body.<g>.residual_group.<b>.rcab.0.*\n  RCAN of EDSR-PyTorch and of its authors, with keys like "
        "body.<g>.body.<b>.body.0.*\nGot 2 keys: layers.0.attn.weight (8, 8, 3, 3), norm.bias (8,)",
    ),
    "half of the keys under module.": (
        {f"module.{key}" if "body" in key else key: value for key, value in edsr().items()},
        "must be of a known layout. Tried:\n  our LCoAN, with keys like body.<g>.blocks.<b>.conv1.*\n",
    ),
    "a missing key": (edsr(body__1__conv2__bias=...), "fit EDSR (our names):\n  missing: body.1.conv2.bias"),
    "no first convolution": (edsr(conv_first__weight=...), "must have the key 'conv_first.weight' (our name)"),
    "a key too much": (edsr(body__1__bn__weight=WEIGHT), "does not fit EDSR (our names):\n  unexpected: body.1.bn."),
    "a block far away": (
        {**edsr(), "body.999999999.conv1.weight": WEIGHT},
        "missing: body.3.conv1.weight, body.3.conv1.bias, body.3.conv2.weight, body.3.conv2.bias\n"
        "  unexpected: body.999999999.conv1.weight",
    ),
    "a wrong size": (
        edsr(body__0__conv1__weight=torch.zeros(8, 4, 3, 3)),
        "does not fit EDSR (our names):\n  of wrong size: body.0.conv1.weight must be (8, 8, 3, 3), got (8, 4, 3, 3)",
    ),
    "a first convolution that is none": (
        edsr(conv_first__weight=torch.zeros(8)),
        "conv_first.weight (our name) must be weights of a convolution, got (8,)",
    ),
    "no channels": (edsr(conv_first__weight=torch.zeros(0, 3, 3, 3)), "of a convolution, got (0, 3, 3, 3)"),
    "an odd tail": (
        edsr(upsample__0__weight=torch.zeros(40, 8, 3, 3)),
        "upsample must have one to three convolutions to 4 * num_feat channels (x2, x4, x8) or one to 9 * num_feat (x3)"
        ", with num_feat 8; got [40]",
    ),
    "NaN": (edsr(body__2__conv1__weight=filled(float("nan"))), "not finite: body.2.conv1.weight"),
    "infinity": (edsr(body__2__conv2__weight=filled(float("-inf"))), "not finite: body.2.conv2.weight"),
    "integers": (edsr(body__0__conv1__weight=WEIGHT.long()), "body.0.conv1.weight must be float32, got int64"),
    "complex numbers": (edsr(body__0__conv1__weight=WEIGHT.to(torch.complex64)), "must be float32, got complex64"),
    "quantised numbers": (edsr(body__0__conv1__weight=WEIGHT.to(torch.float8_e4m3fn)), "must be float32, got float8"),
    "a counter that is no integer": (
        {**trained("EDSR").state_dict(), "attention.0.lsp.num_updates": torch.tensor(1.0)},
        "of wrong type: attention.0.lsp.num_updates must be int64, got float32",
    ),
    "attention that nobody placed": (
        without_options(trained("EDSR")),
        "attention is not recorded in weights of EDSR (ours and BasicSR's); pass it when loading: load_model(..., "
        "attention={'type': 'LCoA', 'every': 4, 'share': 4, 'chunk_size': 144}), or on the command line --set "
        """'attention={"type": "LCoA", "every": 4, "share": 4, "chunk_size": 144}'""",
    ),
    "an LCoAN of unknown chunks": (
        without_options(trained("LCoAN")),
        "chunk_size and res_scale are not recorded in weights of our LCoAN; pass them when loading: "
        "load_model(..., chunk_size=384, res_scale=0.1), or on the command line --set chunk_size=384 res_scale=0.1",
    ),
    "an ELAN of ours that says nothing": (
        without_options(trained("ELAN")),
        "window_sizes is not recorded in weights of our ELAN; pass it when loading: "
        "load_model(..., window_sizes=[4, 8, 16])",
    ),
    "a released ELAN with odd projections": (
        {key: value[:-1] if key.endswith("gmsa_0.project_inp.0.weight") else value
         for key, value in released_elan().items()},
        "project_inp.0.weight must have an even number of rows, got 23",
    ),
    "options that are no text": (with_options(b"\xff\xfe"), "the key 'options' must hold the bytes of a JSON mapping"),
    "options that are no map": (with_options([1]), "the key 'options' must hold the bytes of a JSON mapping"),
    "options without end": (with_options(b"[" * 99_999), "the key 'options' must hold the bytes of a JSON mapping"),
    "options that are no numbers": (
        {**trained("EDSR").state_dict(), "options": torch.full((3,), float("inf"))},
        "the key 'options' must hold the bytes of a JSON mapping",
    ),
    "options of a megabyte": (with_options(b" " * 2**20 + b"{}"), "must hold the bytes of a JSON mapping (got 1048578"),
    "weights that repeat one number": (
        {**plain_edsr().state_dict(), "conv_first.weight": torch.zeros(1).expand(8, 3, 3, 3)},
        "must store every element of its weights, got expanded or overlapping tensors",
    ),
    "blocks that share their weights": (
        {**plain_edsr().state_dict(), **dict.fromkeys(["body.3.conv1.weight", "body.4.conv1.weight"], WEIGHT)},
        "must store every element of its weights, got expanded or overlapping tensors",
    ),
    "centroids without a dimension": (
        {**trained("LCoAN").state_dict(), "body.0.attention.lsp.centroids": torch.tensor(1.0)},
        "of wrong size: body.0.attention.lsp.centroids must be (5, 8), got ()",
    ),
    "an option of the future": (with_options({**CARRIED, "magic": 1}), "cannot be used here:\nmagic: unknown"),
    "a layer that is not registered": (
        with_options({**CARRIED, "attention": {"type": "Theirs", "every": 1}}),
        "cannot be used here:\nattention.type: no layer named 'Theirs'",
    ),
    "options of a giant": (with_options({**CARRIED, "num_block": 10**9}), "1000000000, but the weights have 4"),
    "options of giant attention": (
        with_options({**CARRIED, "attention": {**LCOA, "every": 2, "num_clusters": 10**12}}),
        "the options say num_clusters 1000000000000, but there are only",
    ),
    "options of endless rounds": (
        with_options({**CARRIED, "attention": {**LCOA, "every": 2, "num_rounds": 10**12}}),
        "the options say num_rounds 1000000000000, but there are only",
    ),
    "options that do not fit the weights": (
        with_options({**CARRIED, "attention": {**LCOA, "every": 2, "num_clusters": 9}}),
        "attention.0.lsp.centroids must be (9, 2), got (5, 2)",
    ),
    "two keys for one": (
        {**released_by("EDSR"), "body.9.weight": WEIGHT},
        "keys of EDSR of EDSR-PyTorch must be distinct, but 'body.9.weight' is a second 'conv_after_body.weight'",
    ),
    "deviations": (
        {**released_by("RCAN"), "sub_mean.weight": 0.5 * torch.eye(3).view(3, 3, 1, 1)},
        "sub_mean.weight must be the identity; our networks divide by no standard deviation",
    ),
    "a mean of two": (
        {**released_by("RCAN"), "sub_mean.bias": torch.tensor([-0.5, -0.5])},
        "cannot be used here:\nrgb_mean: must have one number per channel",
    ),
    "batch normalisation": (
        {**released_by("EDSR"), "body.0.body.1.running_mean": torch.zeros(8)},
        "unexpected: body.0.body.1.running_mean",
    ),
    "channel attention without a squeeze": (
        {key: value for key, value in released_by("RCAN").items() if "conv_du.0" not in key},
        "must have the key 'body.0.residual_group.0.rcab.3.attention.1.weight' (our name)",
    ),
    "several rounds": (
        {**released(), "body.0.attention.0.kmeans.means": torch.zeros(2, 16, 16)},
        "of wrong size: body.0.attention.lsp.centroids must be (2, 16), got (2, 16, 16)",
    ),
    "no pattern": (
        {key: value for key, value in released().items() if "conv_match" not in key},
        "must have the key 'body.0.attention.lsp.embed.weight' (our name)",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("extra", "listed"), [(6, "extra.5$"), (7, r"extra.5, \.\.\. \(7\)$")])
def test_long_lists_of_keys_are_cut_and_counted(extra: int, listed: str) -> None:
    state = EDSR(num_feat=4, num_block=1).state_dict()
    with pytest.raises(CheckpointError, match=rf"unexpected: extra\.0, .*{listed}"):
        load_model({**state, **{f"extra.{index}": torch.zeros(1) for index in range(extra)}}, img_range=1.0)


@pytest.mark.promise("R21")
@pytest.mark.parametrize("content", CONTENTS)
def test_bad_contents_give_one_clear_error(content: str, tmp_path: Path) -> None:
    found, message = CONTENTS[content]
    path = tmp_path / "net.pth"
    torch.save(found, path)
    with pytest.raises(CheckpointError) as caught:
        load_model(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert message in text
    assert len(text) < 1000
    if isinstance(found, dict):
        with pytest.raises(CheckpointError) as caught:
            load_model(found)
        assert str(caught.value) == text.replace(str(path), "the state dict")


def half(path: Path) -> Path:
    """Cut a file in two."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def bad_files(folder: Path) -> dict[str, tuple[object, str]]:
    """Return sources that cannot even be read, each with what is said."""
    state = plain_edsr().state_dict()
    torch.save(state, folder / "cut.pth")
    save_file(state, folder / "cut.safetensors")
    (folder / "empty.pth").touch()
    (folder / "empty.safetensors").touch()
    (folder / "page.pth").write_text("<!DOCTYPE html><html>Not found</html>")
    torch.save({"params": state, "extra": Payload(folder / "ran")}, folder / "payload.pth")
    (folder / "bare.pth").write_bytes(pickle.dumps(Payload(folder / "ran")))
    torch.save(plain_edsr(), folder / "module.pth")
    unreadable = "must be weights that can be read as data"
    return {
        "no such file": (folder / "nothing.pth", "there is no such file"),
        "a folder": (folder, "there is no such file"),
        "a list": ([state], "source must be a file or a state dict, got a list"),
        "an empty file": (folder / "empty.pth", unreadable),
        "an empty safetensors": (folder / "empty.safetensors", unreadable),
        "a cut file": (half(folder / "cut.pth"), unreadable),
        "a cut safetensors": (half(folder / "cut.safetensors"), unreadable),
        "a web page": (folder / "page.pth", unreadable),
        "a payload": (folder / "payload.pth", unreadable),
        "a bare payload": (folder / "bare.pth", unreadable),
        "a whole module": (folder / "module.pth", unreadable),
    }


@pytest.mark.promise("R21")
def test_unreadable_files_give_one_clear_error(tmp_path: Path) -> None:
    """And nothing that is in them runs."""
    for source, message in bad_files(tmp_path).values():
        with pytest.raises(CheckpointError) as caught:
            load_model(source)  # type: ignore[arg-type]
        assert str(caught.value).startswith(f"{source}: {message}")
        assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "payload.pth", weights_only=False)
    assert (tmp_path / "ran").exists()  # or what is above would prove nothing


def test_safetensors_is_asked_for_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(plain_edsr().state_dict(), tmp_path / "net.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(CheckpointError, match="reading .safetensors needs safetensors: pip install safetensors"):
        load_model(tmp_path / "net.safetensors")


def test_layouts_tell_each_other_apart() -> None:
    """No weights are recognised by two rows of the table, and each row is met."""
    samples = [
        *(trained(name).state_dict() for name in OURS if " of " not in name),
        plain_edsr().state_dict(),
        released(),
        released_elan(),
        released_by("EDSR"),
        released_by("RCAN"),
    ]
    met = [[layout.name for layout in LAYOUTS if layout.recognises(sample)] for sample in samples]
    assert all(len(names) == 1 for names in met), met
    assert {name for names in met for name in names} == {layout.name for layout in LAYOUTS}


def test_the_family_is_carried_where_keys_do_not_tell_it() -> None:
    """An RCAN whose blocks are of another layer has no key in common with BasicSR's blocks."""
    state = trained("RCAN of LCoAs").state_dict()
    assert not [layout for layout in LAYOUTS if layout.recognises(state)]
    assert type(load_model(state)) is RCAN
    del state["options"]
    with pytest.raises(CheckpointError, match="must be of a known layout"):
        load_model(state)


GIANTS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "blocks of another layer": (
        OURS["EDSR of ELABs, with GMSA"],
        {"block": {"type": "ELAB", "share": 2, "expansion": 10**8}},
    ),
    "pairs that share": (lambda: ELAN(num_feat=10, num_block=1, window_sizes=(2,)), {"share": 10**8}),
    "channels inside": (lambda: ELAN(num_feat=10, num_block=1, window_sizes=(2,)), {"expansion": 10**8}),
    "rounds of clusters": (
        OURS["EDSR"],
        {"attention": {"type": "LCoA", "every": 1, "num_clusters": 300, "num_rounds": 5000}},
    ),
}


@pytest.mark.promise("R21")
@pytest.mark.parametrize("name", GIANTS)
def test_options_that_ask_for_too_much_together_are_refused_while_it_is_built(name: str) -> None:
    build, change = GIANTS[name]
    model = build()
    state = {**model.state_dict(), "options": encode_options({**(options_of(model) or {}), **change})}
    with pytest.raises(
        CheckpointError, match=r"the options ask for a far larger network than a file of \d+ numbers can hold"
    ):
        load_model(state)
    assert torch.is_grad_enabled()


def test_wrappers_around_wrappers_do_not_take_forever() -> None:
    model = plain_edsr()
    assert_same(load_model({"module." * 10_000 + key: value for key, value in model.state_dict().items()}), model)
