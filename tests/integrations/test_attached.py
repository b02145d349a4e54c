"""Attention in BasicSR's own networks: by hand, and by option file through `WithAttention`."""

import copy
import pickle
import re
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from basicsr_runs import GAN
from PIL import Image
from torch import Tensor, nn

from sparse_sr_attn import LAYERS, CheckpointError, CoA, ConfigError, LCoA, attach, detach, load_model
from sparse_sr_attn.backbones.attach import is_record, without_records
from sparse_sr_attn.backbones.base import encode_options
from sparse_sr_attn.checkpoints.read import carried_options
from sparse_sr_attn.cli.main import main
from sparse_sr_attn_basicsr import preflight, register
from sparse_sr_attn_basicsr.option_file import load

Write = Callable[..., str]

SMALL = {"num_in_ch": 3, "num_out_ch": 3, "num_feat": 8, "num_block": 4}
RRDB = {"type": "RRDBNet", **SMALL, "num_grow_ch": 4, "scale": 2}
BODIES: dict[str, dict[str, Any]] = {
    "EDSR": {"type": "EDSR", **SMALL, "upscale": 2, "img_range": 1.0},
    "RCAN": {
        "type": "RCAN",
        **SMALL,
        "num_group": 4,
        "num_block": 1,
        "squeeze_factor": 4,
        "upscale": 2,
        "img_range": 1.0,
    },
    "MSRResNet": {"type": "MSRResNet", **SMALL, "upscale": 2},
    "RRDBNet": RRDB,
}
SWINIR = {"type": "SwinIR", "upscale": 2, "img_size": 8, "embed_dim": 12, "window_size": 4}
SWINIR |= {"depths": [2], "num_heads": [2]}
OPTIONS: dict[str, Any] = {"every": 2, "share": 2, "num_clusters": 8, "chunk_size": 16}
WITH_ATTENTION = {"type": "WithAttention", "network": RRDB, "attention": {"type": "LCoA", **OPTIONS}}

old_meshgrid = pytest.mark.filterwarnings("ignore:torch.meshgrid")  # of SwinIR


def image(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def built(options: dict[str, Any]) -> Any:
    register()  # before basicsr is imported, in a process of its own too
    from basicsr.archs import build_network

    torch.manual_seed(0)
    return build_network(options)


def train(model: nn.Module, steps: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for step in range(steps):
        optimizer.zero_grad()
        model(image(2, 3, 8, 8, seed=step)).square().mean().backward()
        optimizer.step()


# --- by hand ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", BODIES.values(), ids=BODIES)
def test_networks_of_basicsr_take_attention_and_give_it_back(options: dict[str, Any]) -> None:
    plain, model = built(options), built(options)
    x = image(2, 3, 6, 10)
    attach(model, **OPTIONS)
    assert len(model.body.attention) == 2
    assert torch.equal(model(x), plain(x))
    train(model, 2)
    for name, parameter in model.named_parameters():
        if name.startswith("body.sparse_sr_attn."):
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name
    twin = copy.deepcopy(model)
    assert torch.equal(twin.eval()(x), model.eval()(x))
    assert not torch.equal(model(x), plain(x))
    detach(model).load_state_dict(plain.state_dict(), strict=True)
    assert torch.equal(model(x), plain(x))


@old_meshgrid
def test_swinir_runs_its_blocks_itself() -> None:
    model = built({**SWINIR, "depths": [2, 2], "num_heads": [2, 2], "upsampler": "pixelshuffle"})
    x, before = image(1, 3, 8, 8), model.state_dict().keys()
    expected = model.eval()(x)
    attach(model, "layers.*.conv", every=1, share=1, num_clusters=4, chunk_size=16)
    assert torch.equal(model(x), expected)
    new = {key.rpartition("sparse_sr_attn.")[0] for key in model.state_dict().keys() - before if not is_record(key)}
    assert new == {"layers.0.conv.", "layers.1.conv."}
    for body in ("layers", None):
        attach(detach(model), body, every=1, num_clusters=4, chunk_size=16)
        assert torch.equal(model(x), expected)
        assert [type(layer) for layer in model.sparse_sr_attn] == [LCoA, CoA]
    train(model.train(), 2)
    assert all(
        p.grad.any()
        for name, p in model.named_parameters()
        if ".sparse_sr_attn." in name or name.startswith("sparse_sr_attn.")
    )
    assert detach(model).state_dict().keys() == before


# --- by option file ---------------------------------------------------------------------------------------------------


def test_attended_is_the_network_itself_with_more_in_it() -> None:
    plain = built(RRDB)
    options = OrderedDict(WITH_ATTENTION, network=OrderedDict(RRDB), attention=OrderedDict(WITH_ATTENTION["attention"]))
    model = built(options)
    assert type(model) is type(plain)
    assert options["network"]["type"] == "RRDBNet"
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert unexpected == []
    assert missing
    assert all(key.startswith("body.sparse_sr_attn.") for key in missing if not is_record(key))
    assert torch.equal(model(image(1, 3, 8, 6)), plain(image(1, 3, 8, 6)))


TEN_LINES = """\
import torch
from sparse_sr_attn import LAYERS, AttentionLayer

@LAYERS.register("Gain", kind="layer", source="ten lines of a test")
class Gain(AttentionLayer):
    def __init__(self, embed_dim: int, start: float = 1.0) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.full((embed_dim, 1, 1), start))
    def forward(self, x, state=None):
        return x * self.gain
"""


# --- trained, and then used -------------------------------------------------------------------------------------------


def trained_weights(training: Write, here: Path, changes: dict[str, Any]) -> Path:
    """Train for a few iterations and return the file with the weights and their average."""
    assert main(["train", "-opt", training({"val": ..., "train.optim_g.lr": 1e-4, **changes})]) == 0
    return here / "experiments/tiny/models/net_g_latest.pth"


USED: dict[str, dict[str, Any]] = {
    "RRDBNet, which needs even sides": WITH_ATTENTION,
    "EDSR": {"type": "WithAttention", "network": BODIES["EDSR"], "attention": [{"type": "LCoA", **OPTIONS}]},
    "MSRResNet, a layer by name": {"type": "WithAttention", "network": BODIES["MSRResNet"], "attention": "LCoA"},
    "RCAN, its trunk named, with GMSA": {
        "type": "WithAttention",
        "network": BODIES["RCAN"],
        "attention": {"type": "GMSA", "every": 2, "share": 2, "window_sizes": [2, 4]},
        "body": "body",
    },
    "SwinIR, which needs multiples of 4": {
        "type": "WithAttention",
        "network": {**SWINIR, "upsampler": "pixelshuffle"},
        "attention": {"type": "LCoA", "every": 1, "num_clusters": 4, "chunk_size": 16},
        "body": "layers.*.conv",
    },
}


@old_meshgrid
@pytest.mark.parametrize("network", USED.values(), ids=USED)
def test_what_was_trained_attended_comes_back_from_its_weights_alone(
    network: dict[str, Any], training: Write, here: Path
) -> None:
    """The average, in any file and for any size of image."""
    file = trained_weights(training, here, {"network_g": network, "datasets.train.gt_size": 32})
    saved = torch.load(file, weights_only=True)
    assert "options" in saved["params_ema"]
    expected = built(network)
    expected.load_state_dict(saved["params_ema"], strict=True)
    model = load_model(file)
    x = image(1, 3, 12, 8)
    assert torch.equal(model(x), expected.eval()(x))
    assert model.state_dict().keys() == expected.state_dict().keys()
    assert model(image(1, 3, 9, 7)).shape == (1, 3, 18, 14)
    assert model.upscale == 2
    assert main(["convert", str(file), "-o", "net.safetensors"]) == 0
    assert torch.equal(load_model("net.safetensors")(x), model(x))
    twin = copy.deepcopy(model)
    assert torch.equal(load_model(torch.optim.swa_utils.AveragedModel(twin.network).state_dict())(x), model(x))


def test_what_was_trained_attended_upscales_and_is_looked_into(
    training: Write, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(trained_weights(training, here, {"network_g": WITH_ATTENTION}))
    picture = "datasets/val/LR/0.png"
    capsys.readouterr()
    assert main(["upscale", picture, "-w", file, "-o", "big.png", "--tile", "17"]) == 0
    assert main(["inspect", "clusters", picture, "-w", file, "-o", "clusters.png"]) == 0
    assert main(["inspect", "attention", picture, "-w", file, "-o", "attention.png"]) == 0
    assert "Network [" not in "".join(capsys.readouterr())
    with Image.open(here / "big.png") as big, Image.open(here / picture) as small:
        assert big.size == (2 * small.width, 2 * small.height)


def test_without_attention_it_is_basicsrs_own_network_and_carries_nothing() -> None:
    assert "options" not in built({**WITH_ATTENTION, "attention": None}).state_dict()
    model = built(WITH_ATTENTION)
    assert "options" in model.state_dict()
    assert "options" not in detach(model).state_dict()
    assert "net.options" in nn.ModuleDict({"net": built(WITH_ATTENTION)}).state_dict()


def test_copies_and_pickles_carry_the_options_too() -> None:
    model = built(WITH_ATTENTION)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301  (our own bytes)
        assert torch.equal(twin.state_dict()["options"], model.state_dict()["options"])
        twin.load_state_dict(model.state_dict(), strict=True)
        x = image(1, 3, 8, 8)
        assert torch.equal(load_model(twin.state_dict())(x), model.eval()(x))


def altered(change: Callable[[dict[str, Any]], Any]) -> dict[str, Tensor]:
    state = dict(built(WITH_ATTENTION).state_dict())
    options = carried_options(state["options"])
    change(options)
    return {**without_records(state), "options": encode_options(options)}  # as written before there were records


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a file": (
        lambda options: options.update(network={"type": "SpyNet", "load_path": "/etc/passwd"}),
        r"network\.load_path: names a file, '/etc/passwd', which is never read on behalf of weights",
    ),
    "another network": (
        lambda options: options["network"].update(type="RRDBNett"),
        r"network\.type: BasicSR has no network named 'RRDBNett'\n.*--import FILE\.py",
    ),
    "another layer": (
        lambda options: options["attention"].update(type="Gone"),
        r"attention\.type: no layer named 'Gone'.*\n.*--import FILE\.py does that",
    ),
    "a giant": (lambda options: options["network"].update(num_block=10**9), r"the options say num_block 1000000000"),
    "a wide one": (
        lambda options: options["network"].update(num_feat=10**5),
        r"num_feat 100000|far larger network than a file",
    ),
    "another size": (lambda options: options["network"].update(num_feat=12), r"of wrong size: conv_first\.weight"),
    "no map": (lambda options: options.update(network=3), r"network: must be a mapping, got 3"),
    "nonsense": (lambda options: options["network"].update(num_feat="x"), r"cannot be used here:\nTypeError"),
    "no network": (lambda options: options.pop("network"), r"network: missing"),
}


def test_the_old_name_works_with_a_notice(training: Write, problem: Write) -> None:
    old, new = {**WITH_ATTENTION, "type": "Attended"}, built(WITH_ATTENTION)
    with pytest.warns(FutureWarning, match="type: Attended is type: WithAttention now"):
        network = built(old)
    assert network.state_dict().keys() == new.state_dict().keys()
    assert carried_options(network.options)["type"] == "WithAttention"
    seen = preflight.check(load(training({"network_g": old})), training=True)[0]["network_g"]
    assert seen["num_grow_ch"] == RRDB["num_grow_ch"]
    wrong = {"network_g": {**old, "attention": {**WITH_ATTENTION["attention"], "chunk_size": 0}}}
    assert "network_g.attention.chunk_size: must be >= 1, got 0" in problem(wrong)
    state = new.state_dict()
    state["options"] = encode_options({**carried_options(state["options"]), "type": "Attended"})
    x = image(1, 3, 6, 8)
    assert torch.equal(load_model(state)(x), new.eval()(x))


@pytest.mark.parametrize("what", HOSTILE)
def test_options_that_cannot_be_used_give_one_clear_error(what: str) -> None:
    change, message = HOSTILE[what]
    with pytest.raises(CheckpointError, match=message):
        load_model(altered(change))


def test_options_of_an_attended_network_can_be_overridden() -> None:
    state = built(WITH_ATTENTION).state_dict()
    other = load_model(state, attention={**WITH_ATTENTION["attention"], "chunk_size": 4})
    assert other.network.body.attention[0].lsp.chunk_size == 4
    with pytest.raises(ConfigError, match=r"attentio: unknown; did you mean 'attention'\?"):
        load_model(state, attentio={})
    with pytest.raises(ConfigError, match=r"attention\.chunk_size: must be >= 1, got 0"):
        load_model(state, attention={**WITH_ATTENTION["attention"], "chunk_size": 0})


@pytest.mark.slow  # many processes
@pytest.mark.parametrize(
    ("network", "commands"),
    [
        (
            {"type": "SparseEDSR", "num_feat": 8, "num_block": 4, "upscale": 2, "img_range": 1.0},
            [["convert", "{file}", "-o", "net.safetensors"], ["list", "Gain"]],
        ),
        (
            {"type": "WithAttention", "network": BODIES["EDSR"]},
            [["upscale", "datasets/val/LR/0.png", "-w", "{file}", "-o", "big.png"]],
        ),
    ],
    ids=["SparseEDSR", "WithAttention"],
)
@pytest.mark.filterwarnings("ignore:Gain has no option zero_init")
def test_a_layer_of_the_users_own_is_imported_by_every_command(
    network: dict[str, Any], commands: list[list[str]], training: Write, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each in a process of its own, which knows nothing of the layer."""
    (here / "gain.py").write_text(TEN_LINES)
    network = {**network, "attention": {"type": "Gain", "every": 1, "start": 0.5}}
    try:
        file = str(trained_weights(training, here, {"custom_imports": ["gain.py"], "network_g": network}))
    finally:
        LAYERS._entries.pop("Gain", None)
    for command in commands:
        run = [sys.executable, "-m", "sparse_sr_attn", *(word.format(file=file) for word in command)]
        plain = subprocess.run(run, check=False, capture_output=True, text=True)
        assert plain.returncode in (1, 2), command
        assert "Traceback" not in plain.stderr
        assert "--import" in plain.stderr
        imported = subprocess.run([*run, "--import", "gain.py"], check=False, capture_output=True, text=True)
        assert imported.returncode == 0, imported.stderr
    for entry, message in {
        "gone.py": "gone.py cannot be imported: FileNotFoundError",
        "broken.py": "broken.py cannot be imported: SyntaxError",
    }.items():
        (here / "broken.py").write_text("def")
        capsys.readouterr()
        assert main(["convert", file, "-o", "other.pth", "--import", entry]) == 2
        assert re.fullmatch(f"sparse-sr: --import.*{message}.*\n", capsys.readouterr().err)


# --- networks that need multiples, and models that read their options -------------------------------------------------

FIVE = {**SWINIR, "img_size": 10, "window_size": 5, "upsampler": "pixelshuffle"}
IN_FIVES = {
    "type": "WithAttention",
    "network": FIVE,
    "attention": {"type": "LCoA", "every": 1, "num_clusters": 4, "chunk_size": 16},
    "body": "layers.*.conv",
}
SMALLEST: dict[str, Any] = {
    "datasets.train.gt_size": 30,
    "val.val_freq": 1,
    "train.total_iter": 1,
    "val.save_img": True,
}


@old_meshgrid
@pytest.mark.parametrize("model", ["SparseSRModel", "SwinIRModel"])
@pytest.mark.parametrize("network", [IN_FIVES, FIVE], ids=["WithAttention", "SwinIR"])
@pytest.mark.parametrize("said", [True, False])
def test_validation_pads_where_the_network_needs_it(
    said: bool, network: dict[str, Any], model: str, training: Write, here: Path
) -> None:
    """Images of 32 pixels go through windows of 5, or of 7 by default; the model finds that in the network inside."""
    changes = {**SMALLEST, "network_g": copy.deepcopy(network), "model_type": model}
    if model == "SwinIRModel":
        changes["train.ema_decay"] = 0  # it would leave the centroids of the average untrained
    if not said:
        inner = changes["network_g"].get("network", changes["network_g"])
        del inner["window_size"]
        inner["img_size"], changes["datasets.train.gt_size"] = 14, 28
    assert main(["train", "-opt", training(changes)]) == 0
    pictures = list((here / "experiments/tiny/visualization").rglob("*.png"))
    assert len(pictures) == 3
    for picture in pictures:
        with Image.open(picture) as opened:
            assert opened.size == (64, 64)


@old_meshgrid
def test_our_padding_is_that_of_swinir(training: Write, here: Path) -> None:
    logs = {}
    for model in ("SparseSRModel", "SwinIRModel"):
        changes = {**SMALLEST, "network_g": IN_FIVES, "model_type": model, "name": model, "train.optim_g.lr": 1e-12}
        changes["train.ema_decay"] = 0  # SwinIRModel would leave the centroids of the average untrained
        assert main(["train", "-opt", training(changes)]) == 0
        logs[model] = "".join(path.read_text() for path in (here / "experiments" / model).glob("*.log"))
    first, second = (re.findall(r"# psnr: (\S+)", log)[0] for log in logs.values())
    assert first == second


@old_meshgrid
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "SRModel"}, r"model_type: must be one that pads images, because network_g needs sides that"),
        ({**GAN, "model_type": "SRGANModel"}, r"model_type: must be one that pads images"),
        ({"datasets.train.gt_size": 32}, r"datasets\.train\.gt_size: must be a multiple of 10, because .* got 32"),
    ],
)
def test_a_network_that_needs_multiples_is_seen_before_the_start(
    changes: dict[str, Any], message: str, problem: Write
) -> None:
    assert re.search(message, problem({**SMALLEST, "network_g": IN_FIVES, "train.ema_decay": 0, **changes}))


def test_an_option_that_a_model_reads_is_looked_for_before_the_start(
    problem: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    from basicsr.models.sr_model import SRModel
    from basicsr.utils.registry import MODEL_REGISTRY

    class Reader(SRModel):  # type: ignore[misc]
        def test(self) -> None:
            self.width = self.opt["network_g"]["num_feat"], self.opt["network_g"]["blocks"]

    monkeypatch.setitem(MODEL_REGISTRY._obj_map, "Reader", Reader)
    told = problem({"network_g": WITH_ATTENTION, "model_type": "Reader", "train.ema_decay": 0})
    assert "network_g.blocks: missing; Reader reads it" in told


def test_look_ups_go_on_to_the_network_inside_and_the_map_stays_what_it_was(training: Write) -> None:
    options, _ = preflight.check(load(training({"network_g": WITH_ATTENTION})), training=True)
    twin = pickle.loads(pickle.dumps(options))  # noqa: S301  (our own bytes)
    for seen in (options["network_g"], copy.deepcopy(options)["network_g"], twin["network_g"]):
        assert dict(**seen) == WITH_ATTENTION
        assert seen["num_feat"] == seen.get("num_feat") == 8
        assert seen["num_grow_ch"] == 4
        assert "num_feat" in seen
        assert seen["type"] == "WithAttention"
        assert seen.get("gone") is None
        assert "gone" not in seen
        with pytest.raises(KeyError):
            seen["gone"]


# --- a wrong option ---------------------------------------------------------------------------------------------------

NET = "network_g"
MALFORMED = [
    ({f"{NET}.network": ...}, r"network_g\.network: missing"),
    ({f"{NET}.network": 3}, r"network_g\.network: must be a mapping, got 3"),
    ({f"{NET}.network.type": ...}, r"network_g\.network\.type: missing"),
    ({f"{NET}.network.type": "RRDBnet"}, r"network_g\.network\.type: BasicSR has no network named .*'RRDBNet'\?"),
    ({f"{NET}.network.num_feats": 8}, r"network_g\.network\.num_feats: unknown to RRDBNet; did you mean 'num_feat'\?"),
    ({f"{NET}.network.num_in_ch": ...}, r"network_g\.network\.num_in_ch: missing; RRDBNet needs it"),
    ({f"{NET}.attention": ...}, r"network_g\.attention: missing"),
    ({f"{NET}.attention": 3}, r"network_g\.attention: must be a string or a mapping or a list or ~ \(nothing\), got 3"),
    ({f"{NET}.attention.type": "LCAo"}, r"network_g\.attention\.type: no layer named 'LCAo'; did you mean 'LCoA'\?"),
    ({f"{NET}.body": "trunk"}, r"network_g\.body: must be the path of a module, got 'trunk' \(known: body, "),
    ({f"{NET}.body": "conv_first"}, r"network_g\.attention\.every: must hit at least one of the 1 blocks"),
    ({f"{NET}.body": "body.*.rdb9"}, r"network_g\.body: .*'body\.\*\.rdb9' names nothing in RRDBNet"),
    (  # without building it: one convolution between a hundred thousand channels would need 360 GB
        {f"{NET}.network.num_feat": 100_000, f"{NET}.attention": {"type": "LCoA"}},
        r"network_g\.attention: must have one of 'every' and 'after'",
    ),
    (
        {NET: {"type": "RRDBNet", **SMALL, "attention": {}}},
        r"network_g\.attention: unknown to RRDBNet; wrap the network: \{type: WithAttention, network: \{type: RRDBNet",
    ),
]


@pytest.mark.parametrize(("changes", "message"), MALFORMED)
def test_a_wrong_option_is_explained(changes: dict[str, Any], message: str, problem: Write) -> None:
    assert re.search(message, problem({NET: WITH_ATTENTION, **changes}))


@pytest.mark.parametrize("attention", [WITH_ATTENTION["attention"], [WITH_ATTENTION["attention"]], "LCoA", None])
def test_the_well_formed_file_passes(attention: object, remarks: Write) -> None:
    options = {**WITH_ATTENTION, "attention": attention}
    assert remarks({NET: options}) == []
    assert hasattr(built(options).body, "attention") == (attention is not None)


@pytest.mark.parametrize(
    ("network", "remark"),
    [
        ({"type": "EDSR", **SMALL, "upscale": 2}, r"network_g\.network\.img_range: 255 \(the default"),
        ({**BODIES["EDSR"], "img_range": 100.0}, r"network_g\.network\.img_range: 100 makes raw queries so long"),
    ],
)
def test_a_range_that_saturates_is_remarked_on(network: dict[str, Any], remark: str, remarks: Write) -> None:
    raw = {**WITH_ATTENTION, "attention": {**WITH_ATTENTION["attention"], "similarity": "dot"}, "network": network}
    (found,) = remarks({NET: raw})
    assert re.search(remark, found)
    assert remarks({NET: {**WITH_ATTENTION, "network": network}}) == []


@old_meshgrid
def test_a_network_that_the_meta_device_forbids_is_built(remarks: Write) -> None:
    """SwinIR reads a number from a tensor while it is built."""
    network = {"type": "WithAttention", "network": SWINIR, "body": "layers.*.conv"}
    attention = {"type": "LCoA", "every": 1, "num_clusters": 4}
    assert remarks({NET: {**network, "attention": attention}}) == []


def test_load_model_says_what_it_needs_for_what_was_attached_by_hand() -> None:
    with pytest.raises(CheckpointError, match=r"to 'body' of a third-party .*RRDBNet\).*model=.*--host"):
        load_model(attach(built(RRDB), **OPTIONS).state_dict())
