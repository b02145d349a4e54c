"""The code in docs/recipes.md and docs/attach.md runs as it stands there, at the interfaces of the hosts it is for."""

import importlib
import json
import re
import sys
import textwrap
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from basicsr.archs.rrdbnet_arch import RRDBNet
from pages import DOCS, blocks, recipe
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sparse_sr_attn import CoA, LCoA
from sparse_sr_attn.backbones.attach import is_record
from sparse_sr_attn.config import read
from sparse_sr_attn_basicsr.with_attention import WithAttention


def run(code: str, **scope: Any) -> dict[str, Any]:
    exec(compile(textwrap.dedent(code), "recipes.md", "exec"), scope)  # noqa: S102  (the documentation is ours)
    return scope


def image(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def train(model: nn.Module, steps: int = 2) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        model(image(2, 3, 8, 8)).square().mean().backward()
        optimizer.step()


def assert_attended(model: nn.Module, plain: nn.Module, trunk: str, kinds: list[type]) -> None:
    """Old names and the old image, by the old weights; two steps later all of the attention has learnt."""
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert unexpected == []
    assert {key.split(".sparse_sr_attn.")[0] for key in missing if not is_record(key)} == {trunk}
    assert [type(layer) for layer in model.get_submodule(f"{trunk}.sparse_sr_attn")] == kinds
    assert torch.equal(model(image(1, 3, 8, 8)), plain(image(1, 3, 8, 8)))
    train(model)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert ".sparse_sr_attn." not in name or parameter.grad.any(), name


def assert_averaged(averaged: nn.Module, trained: nn.Module) -> None:
    """Centroids and their statistics are those of the trained network, and have moved."""
    buffers = dict(trained.named_buffers())
    assert any(key.endswith("num_updates") and value > 0 for key, value in buffers.items())
    for key, value in averaged.named_buffers():
        assert torch.equal(value, buffers[key]), key


class Registry:
    """A table of names as both forks have it; traiNNer-redux writes names small, neosr does not."""

    def __init__(self, fold: Callable[[str], str] = str) -> None:
        self.entries: dict[str, Any] = {}
        self.fold = fold

    def register(self) -> Callable[[Any], Any]:
        def enter(build: Any) -> Any:
            assert self.fold(build.__name__) not in self.entries
            return self.entries.setdefault(self.fold(build.__name__), build)

        return enter

    def get(self, name: str) -> Any:
        return self.entries[self.fold(name)]

    def __contains__(self, name: str) -> bool:
        return self.fold(name) in self.entries


def install(monkeypatch: pytest.MonkeyPatch, package: str, **registries: Registry) -> None:
    """Make `<package>.utils.registry` importable."""
    for name in (package, f"{package}.utils", f"{package}.utils.registry"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    vars(sys.modules[f"{package}.utils.registry"]).update(registries)


def spandrel_rrdbnet() -> Any:
    pytest.importorskip("spandrel")
    return importlib.import_module("spandrel.architectures.ESRGAN.__arch.RRDB").RRDBNet


@pytest.mark.usefixtures("spandrel_registry")
def test_trainner_redux(monkeypatch: pytest.MonkeyPatch) -> None:
    rrdbnet = spandrel_rrdbnet()
    ours, spandrels = Registry(str.lower), Registry(str.lower)

    @spandrels.register()
    def ESRGAN(scale: int = 4, **options: Any) -> Any:  # noqa: N802
        return rrdbnet(scale=scale, num_filters=8, num_blocks=18, **options)

    install(monkeypatch, "traiNNer", ARCH_REGISTRY=ours, SPANDREL_REGISTRY=spandrels)
    run(recipe("traiNNer-redux"))
    opt = {"scale": 2, **yaml.safe_load(recipe("traiNNer-redux", "yaml"))}

    def build_network(opt: dict[str, Any]) -> Any:
        opt = deepcopy(opt)
        network_type = opt.pop("type")
        return (spandrels if network_type in spandrels else ours).get(network_type)(**opt)

    model = build_network({**opt["network_g"], "scale": opt["scale"]})
    assert model(image(1, 3, 8, 8)).shape == (1, 3, 16, 16)
    plain = build_network({**opt["network_g"]["network"], "scale": opt["scale"]})
    assert_attended(model, plain, "model.1.sub", [LCoA, CoA, CoA])

    resumed = importlib.import_module("spandrel").ModelLoader().load_from_state_dict(model.state_dict()).model
    again = build_network({**opt["network_g"], "scale": opt["scale"]})
    again.load_state_dict(resumed.state_dict(), strict=True)  # as traiNNer-redux reads the weights of an esrgan
    assert torch.equal(again.eval()(image(1, 3, 8, 8)), model.eval()(image(1, 3, 8, 8)))

    averaged = AveragedModel(build_network({**opt["network_g"], "scale": 2}), multi_avg_fn=get_ema_multi_avg_fn(0.9))
    averaged.update_parameters(model)
    assert_averaged(averaged.module, model)


def test_neosr(monkeypatch: pytest.MonkeyPatch) -> None:
    tomllib = pytest.importorskip("tomllib")
    registry = Registry()

    @registry.register()
    class esrgan(RRDBNet):  # type: ignore[misc]  # noqa: N801
        def __init__(self, num_in_ch: int = 3, num_out_ch: int = 3, scale: int = 2) -> None:
            super().__init__(num_in_ch, num_out_ch, scale, num_feat=8, num_block=18, num_grow_ch=4)

    install(monkeypatch, "neosr", ARCH_REGISTRY=registry)
    run(recipe("neosr"))
    opt = tomllib.loads(recipe("neosr", "toml"))["network_g"]
    model = registry.get(opt.pop("type"))(**opt)
    assert_attended(model, esrgan(), "body", [LCoA, CoA, CoA])
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    train(model)
    averaged.update_parameters(model)
    assert_averaged(averaged.module, model)


def initialised(model: nn.Module) -> None:
    """As KAIR's `init_weights`: every convolution by the name of its class, whatever it was."""
    for module in model.modules():
        if "Conv" in type(module).__name__:
            nn.init.orthogonal_(module.weight, gain=0.2)
            nn.init.zeros_(module.bias)


class NoneDict(dict[str, Any]):
    def __missing__(self, key: str) -> None:
        return None


@pytest.mark.parametrize("attention", [True, False])
def test_kair(attention: bool, tmp_path: Path) -> None:
    rrdbnet = spandrel_rrdbnet()
    opt_net = NoneDict(json.loads(f"{{{recipe('KAIR', 'json')}}}")["netG"])
    opt_net["attention"] = NoneDict(opt_net["attention"]) if attention else None
    opt_net["pretrained"] = None
    lines = [
        "def define_G(opt_net):",
        "netG = build()",
        "initialised(netG)",
        *recipe("KAIR").splitlines(),
        "return netG",
    ]
    define_g = "\n    ".join(lines)

    def build() -> Any:
        torch.manual_seed(0)
        return rrdbnet(scale=2, num_filters=8, num_blocks=18)

    define = run(define_g, build=build, initialised=initialised, torch=torch)["define_G"]
    model, plain = define(opt_net), build()
    initialised(plain)
    if not attention:
        assert model.state_dict().keys() == plain.state_dict().keys()
        return
    assert torch.equal(model(image(1, 3, 8, 8)), plain(image(1, 3, 8, 8)))
    assert_attended(model, plain, "model.1.sub", [LCoA, CoA, CoA])
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.mul_(1.01)
    opt_net["pretrained"] = str(tmp_path / "RRDB.pth")
    torch.save(plain.state_dict(), opt_net["pretrained"])
    assert torch.equal(define(opt_net)(image(1, 3, 8, 8)), plain(image(1, 3, 8, 8)))
    host = SimpleNamespace(netE=define(opt_net), netG=nn.DataParallel(model))
    run(recipe("KAIR", number=1), self=host)
    assert_averaged(host.netE, model)


class Model(nn.Module):
    """EDSR-PyTorch's EDSR, in its layout and with its way to load weights."""

    def __init__(self, num_blocks: int = 16) -> None:
        super().__init__()

        def conv() -> nn.Conv2d:
            return nn.Conv2d(8, 8, 3, padding=1)

        self.head = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1))
        self.body = nn.Sequential(*(nn.Sequential(conv(), nn.ReLU(True), conv()) for _ in range(num_blocks)), conv())
        self.tail = nn.Sequential(nn.Sequential(nn.Conv2d(8, 32, 3, padding=1), nn.PixelShuffle(2)), nn.Conv2d(8, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(x)
        res = self.body(x)
        res += x
        return self.tail(res)

    def load_state_dict(self, state_dict: Any, strict: bool = True) -> Any:  # type: ignore[override]
        own = self.state_dict()
        for name, value in state_dict.items():
            if name in own:
                own[name].copy_(value)
            elif strict:
                raise KeyError(name)
        return [key for key in own if key not in state_dict], []


def test_edsr_pytorch() -> None:
    host = SimpleNamespace(model=Model())
    run(recipe("EDSR-PyTorch"), self=host)
    assert_attended(host.model, Model(), "body", [LCoA, CoA, CoA, CoA])
    again = SimpleNamespace(model=Model())
    run(recipe("EDSR-PyTorch"), self=again)
    again.model.load_state_dict(host.model.state_dict())
    assert torch.equal(again.model.eval()(image(1, 3, 8, 8)), host.model.eval()(image(1, 3, 8, 8)))


def test_the_page_on_attach_runs() -> None:
    page = (DOCS / "attach.md").read_text()
    scope: dict[str, Any] = {}
    for code in re.findall(r"^```python\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE):
        scope = run(code, **scope)
    (option,) = (yaml.safe_load(text) for text in blocks("attach.md", "By option file", "yaml")[:1])
    assert option["network_g"].pop("type") == "WithAttention"
    options = read(WithAttention, option["network_g"])
    options["network"] = {**options["network"], "num_feat": 8, "num_grow_ch": 4}
    assert [type(layer) for layer in WithAttention(**options).body.attention] == [LCoA, CoA, CoA]


def test_each_host_has_its_recipe() -> None:
    text = (DOCS / "recipes.md").read_text()
    assert re.findall(r"^## (.*)$", text, flags=re.MULTILINE) == [
        *("traiNNer-redux", "neosr", "KAIR", "EDSR-PyTorch"),
        "What was run, and what was not",
    ]
