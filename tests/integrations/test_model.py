"""SparseSRModel: a whole EMA network, and no step on numbers that are not finite."""

import copy
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from basicsr.models import build_model
from safetensors.torch import save_file
from torch import Tensor, nn

from sparse_sr_attn import EDSR
from sparse_sr_attn.backbones.base import OPTIONS
from sparse_sr_attn.errors import CheckpointError, ConfigError, TrainingError
from sparse_sr_attn.layers import LSP
from sparse_sr_attn_basicsr.preflight.training_options import OPTIMIZERS

Options = Callable[..., dict[str, Any]]


def batch(seed: int = 0, scale: int = 2) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(seed)
    lq = torch.rand(2, 3, 16, 16, generator=rng)
    return {
        "lq": lq,
        "gt": nn.functional.interpolate(lq, scale_factor=scale),
        "lq_path": ["a/first.png", "a/second.png"],
    }


def step(model: Any, iteration: int) -> None:
    model.feed_data(batch(iteration))
    model.optimize_parameters(iteration)


def snapshot(model: Any) -> dict[str, Any]:
    """Everything a step may change, copied."""
    return copy.deepcopy(
        {
            "net_g": dict(model.net_g.state_dict()),
            "net_g_ema": dict(model.net_g_ema.state_dict()),
            "optimizer": model.optimizer_g.state_dict(),
        }
    )


def assert_same(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def moving(net: nn.Module) -> Tensor:
    """Return a buffer that training moves: centroids of k-means or a running mean of BatchNorm."""
    return next(buffer for name, buffer in net.named_buffers() if name.endswith(("centroids", "running_mean")))


def test_ema_network_starts_as_a_copy_and_gets_every_buffer(options: Options, network: dict[str, Any]) -> None:
    model = build_model(options({"network_g": network}))
    assert_same(dict(model.net_g.state_dict()), dict(model.net_g_ema.state_dict()))
    start = moving(model.net_g).clone()
    for iteration in range(1, 5):
        step(model, iteration)
    assert not torch.equal(moving(model.net_g), start)
    assert_same(dict(model.net_g.named_buffers()), dict(model.net_g_ema.named_buffers()))
    parameters = dict(model.net_g.named_parameters())
    for name, p in model.net_g_ema.named_parameters():
        if not name.endswith(".conv.bias"):  # in front of BatchNorm, which takes it out again: its gradient is zero
            assert not torch.equal(p, parameters[name]), name


def test_ema_averages_parameters_with_its_decay(options: Options) -> None:
    model = build_model(options({"train.ema_decay": 0.75}))
    before = {name: p.clone() for name, p in model.net_g_ema.named_parameters()}
    step(model, 1)
    for name, p in model.net_g.named_parameters():
        torch.testing.assert_close(dict(model.net_g_ema.named_parameters())[name], 0.75 * before[name] + 0.25 * p)


def _edsr_checkpoint(options: Options, file: Path, keys: tuple[str, ...]) -> dict[str, dict[str, Tensor]]:
    """Save BasicSR's EDSR of the same size, one per key, as BasicSR saves it."""
    size = {"num_in_ch": 3, "num_out_ch": 3, "num_feat": 8, "num_block": 4, "upscale": 2, "img_range": 1.0}
    saved = {}
    for key in keys:
        opt = options({"network_g": {"type": "EDSR", **size}, "model_type": "SRModel"})
        saved[key] = {name: value.clone() for name, value in build_model(opt).net_g.state_dict().items()}
    torch.save(saved, file)
    return saved


@pytest.mark.parametrize("keys", [("params",), ("params", "params_ema")])
def test_new_attention_starts_alike_on_a_pretrained_edsr(options: Options, here: Path, keys: tuple[str, ...]) -> None:
    saved = _edsr_checkpoint(options, here / "edsr.pth", keys)
    # Without zero_init, so that a difference would show in the values.
    opt = options(
        {
            "path": {"pretrain_network_g": "edsr.pth", "strict_load_g": False},
            "network_g.attention": {"type": "LCoA", "every": 2, "share": 2, "zero_init": False},
        }
    )
    model = build_model(opt)
    trained, averaged = model.net_g.state_dict(), model.net_g_ema.state_dict()
    new = [name for name in trained if name.startswith("attention.")]
    assert any(name.endswith("value.weight") for name in new)
    assert any(name.endswith("embed.weight") for name in new)
    for name in trained.keys() - {OPTIONS}:
        if name in new:
            assert torch.equal(averaged[name], trained[name]), name
        else:
            assert torch.equal(trained[name], saved["params"][name]), name
            assert torch.equal(averaged[name], saved[keys[-1]][name]), name


def test_weights_without_the_attention_say_how_to_load_them(options: Options, here: Path) -> None:
    _edsr_checkpoint(options, here / "edsr.pth", ("params",))
    with pytest.raises(CheckpointError) as caught:
        build_model(options({"path": {"pretrain_network_g": "edsr.pth"}}))
    message = str(caught.value)
    assert message.startswith("edsr.pth: does not fit the network.")
    assert "not in the file, of attention: attention.0." in message
    assert "write strict_load_g: false" in message


def test_a_bare_state_dict_is_no_basicsr_checkpoint(options: Options, here: Path) -> None:
    torch.save(build_model(options()).net_g.state_dict(), here / "bare.pth")
    with pytest.raises(CheckpointError, match="must hold the weights under 'params'.*param_key_g: ~"):
        build_model(options({"path": {"pretrain_network_g": "bare.pth"}}))
    path = {"pretrain_network_g": "bare.pth", "param_key_g": None}
    model = build_model(options({"path": path, "train.ema_decay": 0.9}))
    for network in (model.net_g, model.net_g_ema):
        assert_same(network.state_dict(), torch.load("bare.pth", weights_only=True))


# --- weights to start from


def start_from(options: Options, file: str, **changes: Any) -> Any:
    """Build a model that starts from a file which need not have all of the network."""
    path = {"pretrain_network_g": file, "strict_load_g": False}
    return build_model(options({"path": path, **changes}))


@pytest.mark.parametrize("prefix", ["", "module."])
def test_safetensors_are_weights_to_start_from(options: Options, here: Path, prefix: str) -> None:
    state = {
        key: value + 0.01 if value.is_floating_point() and key != OPTIONS else value
        for key, value in build_model(options()).net_g.state_dict().items()
    }
    save_file({f"{prefix}{key}": value for key, value in state.items()}, here / "net.safetensors")
    model = build_model(options({"path": {"pretrain_network_g": "net.safetensors"}}))
    for net in (model.net_g, model.net_g_ema):
        assert_same(dict(net.state_dict()), state)
    with pytest.raises(ConfigError, match=r"path\.pretrain_network_g: SRModel reads files of torch\.save only"):
        options({"path": {"pretrain_network_g": "net.safetensors"}, "model_type": "SRModel", "train.ema_decay": 0})


def messages(caplog: pytest.LogCaptureFixture, level: int = logging.INFO) -> str:
    return "\n".join(record.message for record in caplog.records if record.levelno >= level)


def test_missing_entries_are_told_once_and_those_outside_attention_stand_out(
    options: Options, here: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved = _edsr_checkpoint(options, here / "edsr.pth", ("params", "params_ema"))
    caplog.clear()
    logging.getLogger("basicsr").setLevel(logging.INFO)
    start_from(options, "edsr.pth")
    assert messages(caplog).count("not in the file, of attention: attention.0.") == 1
    assert "untrained" not in messages(caplog)
    for state in saved.values():
        del state["conv_after_body.weight"], state["body.2.conv1.bias"]
        state["conv_last.bias"] = torch.zeros(5)
        state["extra"] = torch.zeros(1)
    torch.save(saved, here / "edsr.pth")
    caplog.clear()
    start_from(options, "edsr.pth")
    warned = messages(caplog, logging.WARNING)
    assert warned.count("not in the file, outside attention: conv_after_body.weight, body.2.conv1.bias\n") == 1
    assert warned.count("of another size: conv_last.bias (5,) instead of (3,)\n") == 1
    assert warned.count("in the file only: extra\n") == 1
    assert warned.count("3 entries outside attention are NOT in edsr.pth: they start untrained.") == 1


def test_a_file_of_which_nothing_fits_is_no_start(options: Options, here: Path) -> None:
    state = _edsr_checkpoint(options, here / "edsr.pth", ("params",))["params"]
    torch.save({"params": {f"head.{key}": value for key, value in state.items()}}, here / "other.pth")
    with pytest.raises(CheckpointError, match=r"other\.pth: no entry of it is one of the network's, got head\.conv_"):
        start_from(options, "other.pth")


def test_strict_loading_does_not_advise_to_leave_the_body_untrained(options: Options, here: Path) -> None:
    state = _edsr_checkpoint(options, here / "edsr.pth", ("params",))["params"]
    del state["conv_after_body.weight"]
    torch.save({"params": state}, here / "edsr.pth")
    with pytest.raises(CheckpointError, match="outside attention: conv_after_body.weight") as caught:
        build_model(options({"path": {"pretrain_network_g": "edsr.pth"}}))
    assert "strict_load_g" not in str(caught.value)


def trained_edsr(img_range: float) -> EDSR:
    """An EDSR that has learnt, in a few steps on waves and noise, to enlarge."""
    torch.manual_seed(0)
    net = EDSR(num_feat=8, num_block=4, upscale=2, img_range=img_range)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(150):
        high = nn.functional.interpolate(torch.rand(4, 3, 6, 6), size=24, mode="bicubic").clamp(0, 1)
        optimizer.zero_grad()
        (net(nn.functional.avg_pool2d(high, 2)) - high).abs().mean().backward()
        optimizer.step()
    return net


@pytest.mark.parametrize(("was", "told"), [(255.0, "refused"), (1.0, "silent")])
def test_a_range_that_the_weights_show_to_be_wrong_is_refused(
    was: float, told: str, options: Options, here: Path, caplog: pytest.LogCaptureFixture
) -> None:
    net = trained_edsr(was)
    torch.save({"params": net.state_dict()}, here / "edsr.pth")
    if told == "silent":
        caplog.clear()
        start_from(options, "edsr.pth")
        assert "img_range" not in messages(caplog)
        return
    with pytest.raises(CheckpointError, match="was trained with img_range 255, but network_g.img_range is 1; write"):
        start_from(options, "edsr.pth")
    start_from(options, "edsr.pth", **{"network_g.img_range": 255.0})
    model = start_from(options, "edsr.pth", **{"train.pretrain_img_range": 255.0})
    x = torch.rand(1, 3, 9, 8)
    torch.testing.assert_close(model.net_g.eval()(x), net.eval()(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("damage", [None, "conv_after_body.weight"])
def test_a_range_that_cannot_be_told_is_asked_for(
    damage: str | None, options: Options, here: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of weights that were hardly trained, or that are not all of the network."""
    state = _edsr_checkpoint(options, here / "edsr.pth", ("params",))["params"]
    if damage:
        state = trained_edsr(1.0).state_dict()
        del state[damage], state["options"]
        torch.save({"params": state}, here / "edsr.pth")
    caplog.clear()
    start_from(options, "edsr.pth")
    assert messages(caplog).count("note: edsr.pth does not record the img_range of its training") == 1


def test_the_range_that_weights_carry_counts(options: Options, here: Path) -> None:
    torch.manual_seed(0)
    theirs = build_model(options({"network_g.img_range": 100.0})).net_g
    torch.save({"params": theirs.state_dict()}, here / "edsr.pth")
    with pytest.raises(CheckpointError, match="was trained with img_range 100, but network_g.img_range is 1;"):
        start_from(options, "edsr.pth")
    start_from(options, "edsr.pth", **{"network_g.img_range": 100.0})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("key", ["lq", "gt"])
def test_an_image_that_is_not_finite_is_named_and_changes_nothing(options: Options, key: str, value: float) -> None:
    model = build_model(options())
    step(model, 1)
    before = snapshot(model)
    data = batch(2)
    data[key][1, 2, 3, 4] = value
    with pytest.raises(TrainingError) as caught:
        model.feed_data(data)
    message = str(caught.value)
    assert message.startswith("after iteration 1: pixels must be finite, but NaN or infinity is in these images:")
    assert "a/second.png" in message
    assert "a/first.png" not in message
    assert_same(snapshot(model), before)
    step(model, 2)  # and training can go on


@pytest.mark.parametrize("names", [[], ["a.png"], ["a.png", "b.png", "c.png"]], ids=len)
def test_without_a_name_for_each_image_its_place_is_told(options: Options, names: list[str]) -> None:
    data = {**batch(), "lq_path": names}
    data["lq"][1, 0, 0, 0] = float("nan")
    with pytest.raises(TrainingError, match="in these images:\n  sample 1 of the batch\n"):
        build_model(options()).feed_data(data)


# Finite pixels, but their features, or the sum over them, are not; in the second case the gradient is finite.
@pytest.mark.parametrize("key", ["lq", "gt"])
def test_a_loss_that_is_not_finite_stops_before_the_step(options: Options, network: dict[str, Any], key: str) -> None:
    model = build_model(options({"network_g": network, "train.optim_g.lr": 2e-3}))
    for iteration in (1, 2):
        step(model, iteration)
    before = snapshot(model)
    data = batch(3)
    data[key] = torch.full_like(data[key], 3e38)
    model.feed_data(data)
    with pytest.raises(TrainingError) as caught:
        model.optimize_parameters(3)
    message = str(caught.value)
    assert re.match(
        r"iteration 3: the loss must be finite, got (nan|inf) \(l_pix (nan|inf); learning rate 0\.002\)", message
    )
    assert "a/first.png" in message
    assert "a/second.png" in message
    assert "finite and as they were before this step" in message
    assert_same(snapshot(model), before)
    assert model.iteration == 2
    assert all(parameter.grad is None for parameter in model.net_g.parameters())


def test_a_gradient_that_is_not_finite_stops_before_the_step(options: Options) -> None:
    # sqrt has no slope at 0: the loss is 0 and its gradient is NaN.
    changes = {"network_g.attention": None, "train.pixel_opt": {"type": "CharbonnierLoss", "eps": 0.0}}
    model = build_model(options(changes))
    before = snapshot(model)
    data = batch()
    with torch.no_grad():
        data["gt"] = model.net_g(data["lq"])
    model.feed_data(data)
    with pytest.raises(TrainingError, match=r"iteration 1: the gradient must be finite.* \(the loss was 0\)"):
        model.optimize_parameters(1)
    assert_same(snapshot(model), before)


def test_weights_that_were_broken_before_are_not_called_whole(options: Options) -> None:
    model = build_model(options())
    with torch.no_grad():
        model.net_g.conv_last.bias[0] = float("nan")
    with pytest.raises(TrainingError, match="were not finite before this step"):
        step(model, 1)
    assert not model.is_healthy()


@pytest.mark.promise("R8")
def test_skipped_kmeans_updates_are_reported(options: Options) -> None:
    model = build_model(options())
    step(model, 1)
    assert list(model.get_current_log()) == ["l_pix"]
    lsp = next(module for module in model.net_g.modules() if isinstance(module, LSP))
    broken = torch.full((1, lsp.embed_dim, 8, 8), float("nan"))
    lsp(broken)
    lsp(broken)
    assert model.get_current_log() == {"l_pix": model.log_dict["l_pix"], "kmeans_skipped": 2.0}


# --- options of our own


PLAIN = {"network_g.attention": None}
ADAM = {"type": "Adam", "lr": 1e-3}


def weights_after(options: Options, changes: dict[str, Any], steps: int = 2) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = build_model(options(changes))
    for iteration in range(1, steps + 1):
        step(model, iteration)
    return {name: value.detach().clone() for name, value in model.net_g.named_parameters()}


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[name] - other[name]).detach().abs().max()) for name in one)


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - {"Adam"}))
def test_every_optimizer_trains_in_its_own_way(options: Options, name: str) -> None:
    start = weights_after(options, PLAIN, steps=0)
    optimizer = {"type": name, "lr": 1e-3} | ({} if name == "Rprop" else {"weight_decay": 0.5})
    trained = weights_after(options, {**PLAIN, "train.optim_g": optimizer})
    assert distance(trained, start) > 0
    assert distance(trained, weights_after(options, {**PLAIN, "train.optim_g": ADAM})) > 0


def test_clipping_shortens_the_gradient_and_leaves_short_ones(options: Options) -> None:
    changes = {**PLAIN, "train.optim_g": {"type": "SGD", "lr": 1.0}, "train.ema_decay": 0}
    start, free = (weights_after(options, changes, steps) for steps in (0, 1))

    def length(trained: dict[str, Tensor]) -> float:
        return float(torch.cat([(trained[name] - start[name]).flatten() for name in start]).norm())

    norm = length(free)
    clipped = weights_after(options, {**changes, "train.grad_clip": norm / 4}, 1)
    assert length(clipped) == pytest.approx(norm / 4, rel=1e-4)
    for name in start:
        torch.testing.assert_close(clipped[name] - start[name], (free[name] - start[name]) / 4, rtol=1e-3, atol=1e-7)
    assert distance(weights_after(options, {**changes, "train.grad_clip": 2 * norm}, 1), free) == 0


def sizes_seen(model: Any) -> list[int]:
    """Collect the batch sizes that the network gets."""
    sizes: list[int] = []
    model.net_g.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    return sizes


@pytest.mark.promise("R20")
def test_accumulation_is_one_step_on_the_mean_gradient(options: Options) -> None:
    # Plain SGD: Adam would magnify what rounding leaves of a zero gradient.
    changes = {**PLAIN, "train.optim_g": {"type": "SGD", "lr": 0.1}}
    whole, parts = (build_model(options({**changes, "train.accumulate": parts})) for parts in (1, 2))
    parts.net_g.load_state_dict(whole.net_g.state_dict())
    sizes = sizes_seen(parts)
    for iteration in (1, 2):
        step(whole, iteration)
        step(parts, iteration)
    assert sizes == [1, 1, 1, 1]
    for (name, one), (_, other) in zip(whole.net_g.named_parameters(), parts.net_g.named_parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7, msg=name)
    assert float(whole.log_dict["l_pix"]) == pytest.approx(float(parts.log_dict["l_pix"]))


@pytest.mark.promise("R20")
def test_under_accumulation_kmeans_moves_once_a_forward(options: Options) -> None:
    model = build_model(options({"train.accumulate": 2}))
    for iteration in (1, 2, 3):
        step(model, iteration)
    assert next(m for m in model.net_g.modules() if isinstance(m, LSP)).num_updates == 5  # the sixth is pending


@pytest.mark.promise("R20")
def test_under_accumulation_kmeans_moves_once_a_step_when_asked(options: Options) -> None:
    """And as it does by the whole batch."""
    changes = {"train.optim_g": {"type": "SGD", "lr": 0.1}}
    whole = build_model(options(changes))
    parts = build_model(options({**changes, "train.accumulate": 2, "train.one_kmeans_update": True}))
    parts.net_g.load_state_dict(whole.net_g.state_dict())
    start = moving(whole.net_g).clone()
    for iteration in (1, 2, 3):
        step(whole, iteration)
        step(parts, iteration)
    assert next(m for m in parts.net_g.modules() if isinstance(m, LSP)).num_updates == 2  # the third is pending
    assert (moving(whole.net_g) - start).abs().max() > 0.01
    for name, buffer in whole.net_g.named_buffers():
        torch.testing.assert_close(parts.net_g.get_buffer(name), buffer, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.promise("R20")
def test_under_accumulation_batch_norm_sees_each_part_by_itself(options: Options, elan: dict[str, Any]) -> None:
    """So statistics move once a part, and the step is that of a network which gets the parts one by one."""
    torch.manual_seed(0)
    changes = {"network_g": elan, "train.accumulate": 2, "train.ema_decay": 0}
    model = build_model(options({**changes, "train.optim_g": {"type": "SGD", "lr": 0.1}}))
    alone = copy.deepcopy(model.net_g)
    data = batch(1)
    for low, high in zip(data["lq"].split(1), data["gt"].split(1), strict=True):
        (0.5 * (alone(low) - high).abs().mean()).backward()
    step(model, 1)
    assert_same(dict(model.net_g.named_buffers()), dict(alone.named_buffers()))
    for (name, one), (_, other) in zip(model.net_g.named_parameters(), alone.named_parameters(), strict=True):
        torch.testing.assert_close(one, other - 0.1 * other.grad, rtol=1e-5, atol=1e-7, msg=name)
    step(model, 2)
    assert {int(value) for name, value in model.net_g.named_buffers() if name.endswith("num_batches_tracked")} == {4}


@pytest.mark.parametrize("one_update", [False, True])
def test_an_accumulated_step_that_fails_is_undone_whole(
    options: Options, network: dict[str, Any], one_update: bool
) -> None:
    changes = {"network_g": network, "train.accumulate": 2, "train.one_kmeans_update": one_update}
    model = build_model(options(changes))
    step(model, 1)
    before = snapshot(model)
    data = batch(2)
    data["lq"][1] = 3e38  # the first part is sound, and has moved the buffers
    model.feed_data(data)
    with pytest.raises(TrainingError, match="iteration 2: the loss must be finite"):
        model.optimize_parameters(2)
    assert_same(snapshot(model), before)


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ({}, False),
        ({"train.autocast": "bf16"}, True),
        ({"train.autocast": "bf16", "train.channels_last": False}, False),
        ({"train.channels_last": True}, True),
    ],
)
def test_channels_last_is_another_memory_and_the_same_training(
    options: Options, train: dict[str, Any], expected: bool
) -> None:
    seen = []
    model = build_model(options(train))
    handle = model.net_g.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    step(model, 1)
    handle.remove()
    assert seen[0].is_contiguous(memory_format=torch.channels_last) == expected
    assert model.net_g.conv_first.weight.is_contiguous(memory_format=torch.channels_last) == expected
    if "train.autocast" not in train:
        plain = {"train.optim_g": {"type": "SGD", "lr": 0.1}}
        after = weights_after(options, {**plain, "train.channels_last": True})
        assert 0 <= distance(after, weights_after(options, plain)) < 1e-5


def test_autocast_computes_in_bf16_and_keeps_float32(options: Options, network: dict[str, Any]) -> None:
    model = build_model(options({"network_g": network, "train.autocast": "bf16"}))
    seen: dict[str, set[torch.dtype]] = {}
    for name, net in (("trained", model.net_g), ("validated", model.net_g_ema)):
        net.conv_last.register_forward_hook(lambda _, __, out, n=name: seen.setdefault(n, set()).add(out.dtype))
    step(model, 1)
    model.test()
    assert seen == {"trained": {torch.bfloat16}, "validated": {torch.float32}}
    assert {value.dtype for value in model.net_g.state_dict().values() if value.is_floating_point()} == {torch.float32}
    assert model.output.dtype == torch.float32
    full = weights_after(options, {"network_g": network})
    assert 0 < distance(weights_after(options, {"network_g": network, "train.autocast": "bf16"}), full) < 0.01


@pytest.fixture
def half(options: Options) -> Any:
    """A model in fp16. The preflight wants a GPU for it; PyTorch can do it here too, slowly."""
    opt = options(PLAIN)
    opt["train"]["autocast"] = "fp16"
    return build_model(opt)


def test_fp16_leaves_out_steps_that_overflow_and_goes_on(half: Any) -> None:
    half._scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-15)
    before = {name: p.detach().clone() for name, p in half.net_g.named_parameters()}
    step(half, 1)
    assert distance(dict(half.net_g.named_parameters()), before) == 0
    assert half._scaler.get_scale() == 2.0**25
    step(half, 2)
    step(half, 3)
    assert half._scaler.get_scale() == 2.0**10
    assert half.get_current_log()["steps_skipped"] == 2
    assert distance(dict(half.net_g.named_parameters()), before) > 0
    assert all(p.isfinite().all() for p in half.net_g.parameters())


def test_fp16_stops_when_no_factor_helps(half: Any) -> None:
    half._scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    before = snapshot(half)
    hook = half.net_g.conv_last.weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(TrainingError, match="iteration 1: the gradient must be finite"):
        step(half, 1)
    assert_same(snapshot(half), before)
    assert half._scaler.get_scale() == 1
    hook.remove()
    step(half, 1)  # and training can go on
    assert half.iteration == 1


def test_the_factor_of_fp16_is_saved(half: Any, options: Options, here: Path) -> None:
    half._scaler = torch.amp.GradScaler("cpu", init_scale=2.0**7)
    step(half, 1)
    half.save(0, 1)
    state = torch.load(here / "training_states/1.state", weights_only=True)
    opt = options(PLAIN)
    opt["train"]["autocast"] = "fp16"
    again = build_model(opt)
    again.resume_training(state)
    assert again._scaler.state_dict() == half._scaler.state_dict()
    assert again._scaler.get_scale() == 2.0**7


def test_deterministic_is_pytorchs_switch(options: Options) -> None:
    try:
        torch.backends.cudnn.benchmark = True
        build_model(options())
        assert (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark) == (False, True)
        build_model(options({"train.deterministic": True}))
        assert (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark) == (True, False)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = False


def picture(height: int, width: int) -> dict[str, Any]:
    lq = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    return {"lq": lq, "lq_path": ["a.png"]}


@pytest.mark.parametrize("ema", [0.9, 0])
def test_validation_in_tiles(options: Options, ema: float) -> None:
    """A pixel of this EDSR sees 12 others on each side: beyond that, tiles make no difference."""
    outputs = {}
    for tile, overlap in ((None, None), (32, 24), (16, 0)):
        changes = {**PLAIN, "train.ema_decay": ema, "val.tile": tile, "val.tile_overlap": overlap}
        torch.manual_seed(0)
        model = build_model(options(changes))
        shapes = set()
        net = model.net_g_ema if ema else model.net_g
        net.register_forward_hook(lambda _, inputs, __, seen=shapes: seen.add(tuple(inputs[0].shape[2:])))
        model.feed_data(picture(50, 37))
        model.test()
        assert model.net_g.training
        assert shapes == ({(50, 37)} if tile is None else {(tile, tile)})
        assert not model.output.requires_grad
        outputs[tile] = model.output
    torch.testing.assert_close(outputs[32], outputs[None], rtol=0, atol=1e-5)
    assert float((outputs[16] - outputs[None]).abs().max()) > 1e-3
