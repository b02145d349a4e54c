"""Weights of attended models rebuild themselves in the plain model, and are never read without their attention."""

import copy
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import sparse_sr_attn_basicsr
from sparse_sr_attn import EDSR, LAYERS, CheckpointError, ConfigError, attach, load_model
from sparse_sr_attn.backbones.attach import is_attended, is_record, reattach, without_attention
from sparse_sr_attn.backbones.base import encode_options
from sparse_sr_attn.checkpoints.read import carried_options, records_in
from sparse_sr_attn.cli.main import main

OPTIONS: dict[str, Any] = {
    "num_clusters": 5,
    "chunk_size": 12,
    "reduction": 2,
    "every": 1,
    "share": 2,
    "zero_init": False,
}

HOST = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
    def forward(self, x):
        return x + self.conv(x)

class Looped(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.head, self.tail = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 12, 3, padding=1)
        self.B1, self.B2, self.B3, self.B4 = (Block(width) for _ in range(4))
    def forward(self, x):
        x = self.head(x)
        return nn.functional.pixel_shuffle(self.tail(self.B4(self.B3(self.B2(self.B1(x))))), 2)

class Whole(Looped):
    def __init__(self, width=8):
        super().__init__(width)
        self.trunk = nn.Sequential(self.B1, self.B2, self.B3, self.B4)
        del self.B1, self.B2, self.B3, self.B4
    def forward(self, x):
        return nn.functional.pixel_shuffle(self.tail(self.trunk(self.head(x))), 2)

def broken():
    raise ValueError("no weights")
"""
SCOPE: dict[str, Any] = {"__name__": "hosts"}
exec(HOST, SCOPE)  # noqa: S102  (also a file for the command line)
LOOPED, WHOLE = SCOPE["Looped"], SCOPE["Whole"]
ATTACHED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "looped": (LOOPED, {"body": "B*"}),
    "a sequential": (WHOLE, {"body": "trunk"}),
    "each of its own": (LOOPED, {"body": "B*", "share": 1}),
    "shifted windows": (LOOPED, {"body": "B*", "attention": {"type": "GMSA", "every": 1, "window_sizes": [2, 4]}}),
}
attached = pytest.mark.parametrize("name", ATTACHED)


def image(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def trained(name: str) -> Any:
    """Attend a host, with weights that change its image."""
    torch.manual_seed(0)
    build, options = ATTACHED[name]
    model = attach(build(), **(options if "attention" in options else {**OPTIONS, **options}))
    for key, parameter in model.named_parameters():
        if "sparse_sr_attn" in key:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


@attached
@pytest.mark.parametrize(
    "nest",
    [
        lambda state: state,
        lambda state: {"params": {key: value + 1 for key, value in state.items()}, "params_ema": state},
        lambda state: {"epoch": 3, "state_dict": {f"module.{key}": value for key, value in state.items()}},
    ],
    ids=["bare", "averaged", "wrapped"],
)
def test_a_file_rebuilds_its_attention_in_the_plain_network(name: str, nest: Any, tmp_path: Path) -> None:
    model = trained(name)
    torch.save(nest(model.state_dict()), tmp_path / "net.pth")
    loaded = load_model(tmp_path / "net.pth", model=ATTACHED[name][0]())
    assert loaded.upscale == 2
    assert torch.equal(loaded(image(1, 3, 9, 8)), model(image(1, 3, 9, 8)))
    save_file(loaded.state_dict(), tmp_path / "net.safetensors")
    again = load_model(tmp_path / "net.safetensors", model=ATTACHED[name][0]())
    assert torch.equal(again(image(1, 3, 9, 8)), model(image(1, 3, 9, 8)))


@attached
def test_nobody_reads_it_without_its_attention(name: str) -> None:
    model = trained(name)
    state = model.state_dict()
    with pytest.raises(RuntimeError, match=r"Unexpected key.*sparse_sr_attn"):
        ATTACHED[name][0]().load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"sparse_sr_attn attached .*of a third-party network \(hosts\..*--host"):
        load_model(state)
    plain = ATTACHED[name][0]()
    assert without_attention(state).keys() == plain.state_dict().keys()
    loaded = load_model(plain.state_dict(), model=copy.deepcopy(plain))
    assert torch.equal(loaded(image(1, 3, 8, 8)), plain.eval()(image(1, 3, 8, 8)))


def test_every_layer_is_recorded_with_all_its_options() -> None:
    """So a later change of a default does not change what old weights mean."""
    for name in sorted(LAYERS):
        if LAYERS.get(name).kind != "layer":
            continue
        torch.manual_seed(0)
        model = attach(LOOPED(16), "B*", {"type": name, "every": 1})
        twin = reattach(LOOPED(16), records_in(model.state_dict()))
        assert repr(twin) == repr(model), name
        twin.load_state_dict(model.state_dict(), strict=True)
        assert torch.equal(twin.eval()(image(1, 3, 16, 16)), model.eval()(image(1, 3, 16, 16))), name


def before_records(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights as they were written before there were records."""
    return {key.replace("sparse_sr_attn.", "attention."): value for key, value in state.items() if not is_record(key)}


@pytest.mark.parametrize("name", ["a sequential", "each of its own"])
def test_weights_without_records_load_into_the_attended_model(name: str) -> None:
    model, other = trained(name), trained(name)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(before_records(model.state_dict()), strict=True)
    assert torch.equal(other(image(1, 3, 8, 8)), model(image(1, 3, 8, 8)))


def test_an_attended_edsr_of_basicsr_is_ours() -> None:
    sparse_sr_attn_basicsr.apply()  # BasicSR imports
    from basicsr.archs.edsr_arch import EDSR as THEIRS

    theirs = attach(THEIRS(3, 3, num_feat=8, num_block=4, upscale=2, img_range=1.0), "body", **OPTIONS).eval()
    for parameter in theirs.body.attention.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = load_model(theirs.state_dict(), img_range=1.0)
    assert type(ours) is EDSR
    torch.testing.assert_close(ours(image(1, 3, 8, 8)), theirs(image(1, 3, 8, 8)))


def altered(**changes: Any) -> dict[str, Tensor]:
    state = dict(trained("looped").state_dict())
    (key,) = filter(is_record, state)
    return {**state, key: encode_options({**carried_options(state[key]), **changes})}


LAYER = {"type": "LCoA", "after": [0]}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "another layer": ({"attention": [{**LAYER, "type": "Gone"}]}, r"no layer named 'Gone'(.|\n)*--import FILE\.py"),
    "no layers": ({"attention": None}, "must hold a record of attention that can be attached again"),
    "another place": ({"sites": ["B7", "B2", "B3", "B4"]}, "must have a module 'B7'"),
    "another kind": ({"kind": "Module"}, "KeyError"),
    "a giant": ({"widths": [10**6] * 4}, "far larger network than a file|widths"),
    "nothing": ({"shapes": None, "widths": None}, "TypeError"),
    "another width": ({"widths": [6] * 4}, "of wrong size"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_record_that_cannot_be_used_changes_nothing(what: str) -> None:
    changes, message = WRONG[what]
    host = LOOPED()
    before = copy.deepcopy(host.state_dict())
    with pytest.raises(CheckpointError, match=message):
        load_model(altered(**changes), model=host)
    assert not is_attended(host)
    assert host.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in host.state_dict().items())


def test_a_model_of_another_size_or_with_attention_is_refused() -> None:
    state = trained("looped").state_dict()
    with pytest.raises(CheckpointError, match=r"of wrong size: .*head\.weight must be \(6, 3, 3, 3\), got \(8"):
        load_model(state, model=LOOPED(6))
    with pytest.raises(ConfigError, match="must have no attention yet"):
        load_model(state, model=trained("looped"))
    with pytest.raises(ConfigError, match="scale: unknown; with model=..., only img_range can be given"):
        load_model(state, model=LOOPED(), scale=2)
    with pytest.raises(ConfigError, match=r"model: must be a network, .* such as Net\(\.\.\.\), got the class Looped"):
        load_model(state, model=LOOPED)
    with pytest.raises(ConfigError, match="got a dict"):
        load_model(state, model={})


# --- on the command line ----------------------------------------------------------------------------------------------


@pytest.fixture
def here(here: Path) -> Path:
    (here / "hosts.py").write_text(HOST)
    torch.save({"params": trained("looped").state_dict()}, here / "net.pth")
    Image.effect_noise((20, 18), 60).convert("RGB").save(here / "small.png")
    return here


def test_commands_take_weights_and_their_host(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    host = ["--host", "hosts.py:Looped", "--set", "width=8"]
    assert main(["upscale", "small.png", "-w", "net.pth", "-o", "big.png", *host]) == 0
    with Image.open("big.png") as big:
        assert big.size == (40, 36)
    assert main(["inspect", "clusters", "small.png", "-w", "net.pth", "-o", "clusters.png", *host]) == 0
    assert main(["convert", "net.pth", "-o", "net.safetensors", *host]) == 0
    assert "net.pth -> net.safetensors: Looped, " in capsys.readouterr().out
    assert main(["upscale", "small.png", "-w", "net.safetensors", "-o", "again.png", *host]) == 0
    assert Path("again.png").read_bytes() == Path("big.png").read_bytes()
    Path("truth").mkdir()
    Path("big.png").rename("truth/big.png")
    assert main(["evaluate", "truth", "-w", "net.pth", *host]) == 0


def test_a_host_may_import_basicsr(here: Path) -> None:
    """The published BasicSR cannot be imported with a current torchvision, unless it is repaired first."""
    if importlib.util.find_spec("basicsr") is None:
        pytest.skip("needs BasicSR")
    Path("hosts.py").write_text(f"from basicsr.utils.registry import ARCH_REGISTRY\n{HOST}")
    command = [sys.executable, "-m", "sparse_sr_attn", "upscale", "small.png", "-w", "net.pth", "-o", "big.png"]
    command += ["--host", "hosts.py:Looped", "--set", "width=8"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("host", "message"),
    [
        (None, "--host FILE.py:NAME"),
        ("hosts.py", "--host needs FILE.py:NAME or MODULE:NAME, got 'hosts.py'"),
        ("gone.py:Looped", "--host gone.py:Looped cannot be built: FileNotFoundError"),
        ("hosts.py:Gone", "--host hosts.py:Gone cannot be built: AttributeError"),
        ("hosts.py:broken", "--host hosts.py:broken cannot be built: ValueError: no weights"),
        ("hosts.py:nn", "--host hosts.py:nn cannot be built: TypeError"),
        ("json:dumps", "--host json:dumps cannot be built: TypeError"),
        ("hosts.py:Looped --set widht=8", "--host hosts.py:Looped has no option 'widht'; did you mean 'width'?"),
    ],
)
def test_a_wrong_host_is_one_line(host: str | None, message: str, refused: Callable[..., None]) -> None:
    given = [] if host is None else ["--host", *host.split()]
    refused(["upscale", "small.png", "-w", "net.pth", "-o", "big.png", *given], message, 1 if host is None else 2)


def test_a_plain_module_is_exported(here: Path) -> None:
    pytest.importorskip("onnxruntime")
    from sparse_sr_attn.inference.onnx import export_onnx

    for name in ("a sequential", "looped"):
        assert all(
            deviation.good for deviation in export_onnx(trained(name), here / f"{len(name)}.onnx", sizes=[(11, 8)])
        )
    assert json.dumps(sorted(path.name for path in here.glob("*.onnx"))) == '["12.onnx", "6.onnx"]'
