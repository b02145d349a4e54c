"""Several forwards that make one update of k-means, as accumulated gradients make one step."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerances import assert_bit_equal
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparse_sr_attn import EDSR, LSP, CategoryAttention, LCoA, one_kmeans_update
from sparse_sr_attn.errors import ShapeError
from sparse_sr_attn.layers.running_state import KMeansModule

pytestmark = pytest.mark.promise("R20")

CHANNELS = 8
KMEANS: dict[str, Any] = {"num_clusters": 7, "chunk_size": 9, "reduction": 2, "ema_decay": 0.6, "reseed_threshold": 0.5}
MODELS: dict[str, Callable[..., nn.Module]] = {
    "LSP": lambda **options: LSP(CHANNELS, **{**KMEANS, **options}),
    "LCoA, two rounds": lambda **options: LCoA(CHANNELS, num_rounds=2, **{**KMEANS, **options}),
    "CategoryAttention": lambda **options: CategoryAttention(CHANNELS, categories="kmeans", **{**KMEANS, **options}),
}
every_model = pytest.mark.parametrize("name", MODELS)


def made(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name](**options).train()


def batch(step: int) -> Tensor:
    return torch.randn(4, CHANNELS, 5, 6, generator=torch.Generator().manual_seed(step))


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_same(model: nn.Module, expected: dict[str, Tensor]) -> None:
    for name, buffer in model.named_buffers():
        assert_bit_equal(buffer, expected[name])


def updates(model: nn.Module) -> set[int]:
    return {int(state.num_updates) for m in model.modules() if isinstance(m, KMeansModule) for state in m.states()}


@pytest.mark.parametrize("sizes", [(4,), (2, 2), (1, 2, 1)], ids=str)
@every_model
def test_parts_teach_what_the_whole_batch_does(name: str, sizes: tuple[int, ...]) -> None:
    parted, whole = made(name), made(name)
    start = buffers(whole)
    for step in range(4):
        with one_kmeans_update(parted):
            for part in batch(step).split(sizes):
                parted(part)
        whole(batch(step))
        assert updates(parted) == updates(whole) == {step}
        for key, buffer in whole.named_buffers():
            torch.testing.assert_close(parted.get_buffer(key), buffer, rtol=1e-6, atol=1e-6, msg=f"{step}: {key}")
    moved = [key for key, buffer in whole.named_buffers() if (buffer - start[key]).abs().max() > 0.1]
    assert any(key.endswith("centroids") for key in moved)


def test_outside_each_forward_makes_its_own() -> None:
    layer = made("LSP")
    for step in range(3):
        layer(batch(step))
    with one_kmeans_update(layer):
        assert updates(layer) == {3}  # by what was left
        with one_kmeans_update(layer):  # of the same layers: changes nothing
            layer(batch(3))
        layer(batch(4))
    assert updates(layer) == {3}
    layer(batch(5))
    layer(batch(6))
    assert updates(layer) == {5}


def test_an_error_inside_ends_it() -> None:
    layer = made("LSP")
    with pytest.raises(ShapeError), one_kmeans_update(layer):
        layer(batch(0)[:, :3])
    layer(batch(0))
    layer(batch(1))
    layer(batch(2))
    assert updates(layer) == {2}


@pytest.mark.parametrize("options", [{"ema_decay": 1.0}, {"routing": "lsh"}, None], ids=str)
def test_what_does_not_learn_does_not_move(options: dict[str, Any] | None) -> None:
    layer = made("LSP", **(options or {}))
    layer(batch(0))
    if options is None:
        layer.eval()
    before = buffers(layer)
    with one_kmeans_update(layer):
        layer(batch(1))
    assert_same(layer, before)


def trained(
    model: nn.Module, call: Callable[[Tensor], Tensor], together: bool
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Make two updates of two forwards each; return all gradients, and the buffers.

    Args:
        model: whose layers they are.
        call: the model, in some form.
        together: whether both forwards go before the one backward.
    """
    gradients = []
    for step in range(2):
        model.zero_grad()
        with one_kmeans_update(model):
            outputs = []
            for part in batch(step).split(2):
                outputs.append(call(part.requires_grad_()).square().mean())
                if not together:
                    outputs.pop().backward()
            if together:
                torch.stack(outputs).sum().backward()
        gradients += [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    return gradients, buffers(model)


def compiled(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return torch.compile(model, fullgraph=True, backend="aot_eager")


def checkpointed(call: Callable[[Tensor], Tensor], use_reentrant: bool = False) -> Callable[[Tensor], Tensor]:
    return lambda x: checkpoint(call, x, use_reentrant=use_reentrant)


FORMS: dict[str, Callable[[nn.Module], Callable[[Tensor], Tensor]]] = {
    "checkpointed": checkpointed,
    "checkpointed reentrantly": lambda model: checkpointed(model, use_reentrant=True),
    "compiled": compiled,
    "compiled and checkpointed": lambda model: checkpointed(compiled(model)),
}


@pytest.mark.unhooked
@pytest.mark.parametrize("together", [False, True], ids=["a backward each", "one backward"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["LCoA, two rounds", "CategoryAttention"])
def test_every_form_is_plain_to_the_bit(name: str, form: str, together: bool) -> None:
    """Also where several forwards go before one backward: all were computed with the same centroids."""
    torch._dynamo.reset()
    plain, other = made(name), made(name)
    expected, expected_buffers = trained(plain, plain, together)
    actual, actual_buffers = trained(other, FORMS[form](other), together)
    assert len(actual) == len(expected) > 0
    for mine, then in zip(actual, expected, strict=True):
        assert_bit_equal(mine, then)
    for key, buffer in expected_buffers.items():
        assert_bit_equal(actual_buffers[key], buffer)
    assert updates(plain) == {1}


def test_a_state_dict_between_updates_is_all_that_going_on_needs() -> None:
    attention = {"type": "LCoA", "every": 1, "share": 2, "num_clusters": 5, "chunk_size": 7, "zero_init": False}
    model, resumed = (EDSR(num_feat=8, num_block=2, upscale=2, img_range=1.0, attention=attention) for _ in range(2))
    images = torch.rand(6, 4, 3, 6, 7, generator=torch.Generator().manual_seed(0))

    def go_on(model: nn.Module, steps: range) -> None:
        for step in steps:
            with one_kmeans_update(model):
                for part in images[step].split(2):
                    model(part)

    go_on(model, range(3))
    resumed.load_state_dict(model.state_dict())
    go_on(model, range(3, 6))
    go_on(resumed, range(3, 6))
    assert_same(resumed, buffers(model))
    assert updates(model) == {5}
