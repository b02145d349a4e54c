"""The comparison with the slow twins: it passes what is right and refuses what is wrong, values and gradients."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.speed.methods import LAYER_METHODS, NETWORK_METHODS, Method
from benchmarks.speed.oracles import Check, check, seen
from benchmarks.speed.run import _built, _check_size, _input
from benchmarks.speed.settings import Settings
from sparse_sr_attn.reference import cluster

SMALL = Settings(embed_dim=12, chunk_size=20, num_clusters=6, reduction=3, sizes=(16,), threads=1)
KNOWN = [name for name in LAYER_METHODS if name != "plain-NLSA-x10"]  # a stack of NLSA is not checked
CPU = torch.device("cpu")


def checked(
    name: str,
    settings: Settings = SMALL,
    change: Callable[[Any], object] | None = None,
    methods: Mapping[str, Method] = LAYER_METHODS,
) -> Check:
    method = methods[name]
    subject = _built(method, settings, CPU)
    if change:
        change(subject.module)
    height, width = _check_size(method, settings)
    x = _input(settings, CPU, width, batch=1, height=height)
    backward = "forward+backward" in settings.passes
    return check(subject.module, subject.provider, subject.apply, x, backward=backward, allowed=method.allowed)


@pytest.mark.parametrize("name", KNOWN)
def test_every_layer_is_known_and_correct(name: str) -> None:
    assert checked(name, replace(SMALL, dtype="float64", passes=("forward+backward",))).status == "correct"


@pytest.mark.parametrize("name", ["LCoAN-light", "plain-LCoAN-light", "ELAN-light", "plain-ELAN-light"])
def test_networks(name: str) -> None:
    settings = replace(SMALL, what="networks", passes=("forward+backward",))
    assert checked(name, settings, methods=NETWORK_METHODS).status == "correct"


@pytest.mark.parametrize(("name", "layer"), [("LCoAN-light", "body.2.attention"), ("ELAN-light", "body.3.lfe.0")])
def test_a_layer_deep_in_a_network_that_is_wrong(name: str, layer: str) -> None:
    def change(module: Any) -> None:
        wrong = module.get_submodule(layer)
        forward = wrong.forward
        wrong.forward = lambda *inputs: 1.5 * forward(*inputs)

    result = checked(name, replace(SMALL, what="networks"), change, NETWORK_METHODS)
    assert result.status == "wrong", result


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["LCoA", "CoA", "GMSA", "NLSA", "plain-LCoA", "plain-CoA", "plain-NLSA"])
def test_in_other_precisions(name: str, dtype: Any) -> None:
    result = checked(name, replace(SMALL, dtype=dtype, passes=("forward+backward",)))
    assert result.status == "correct", result


@pytest.mark.parametrize("name", ["LCoA", "CoA", "ENLA", "SharedGMSA", "plain-NLSA"])
def test_a_small_error_is_wrong(name: str) -> None:
    def change(module: Any) -> None:
        forward = module.forward
        module.forward = lambda x, *state: x + 1.001 * (forward(x, *state) - x)

    result = checked(name, change=change)
    assert result.status == "wrong"
    assert result.error == pytest.approx(1e-3, rel=0.01)
    assert "its output is not what the reference returns" in result.reason


def test_a_wrong_gradient_is_wrong() -> None:
    def change(module: Any) -> None:
        forward = module.forward

        def halved(x: Tensor) -> Tensor:
            y = forward(x)
            return y.detach() + 0.5 * (y - y.detach())

        module.forward = halved

    assert checked("LCoA", change=change).status == "correct"  # the value is
    result = checked("LCoA", replace(SMALL, passes=("forward+backward",)), change)
    assert result.status == "wrong"
    assert "its gradient of" in result.reason


def test_tokens_in_a_cluster_that_is_not_the_nearest_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """All is consistent with the assignment, which is wrong itself."""
    from sparse_sr_attn.layers import running_state

    nearest = running_state.assign
    monkeypatch.setattr(running_state, "assign", lambda points, centroids: nearest(-points, centroids))
    result = checked("LCoA")
    assert result.status == "wrong"
    assert "not the nearest" in result.reason


@pytest.mark.parametrize(
    "case", [(7, 3, 1, True), (7, 3, 1, False), (6, 3, 1, False), (4, 9, 2, True), (11, 2, 0, True)]
)
def test_counting_is_that_of_the_reference(case: tuple[int, int, int, bool]) -> None:
    num_tokens, chunk_size, num_adjacent, count_keys_once = case
    where = torch.randint(3, (2, num_tokens), generator=torch.Generator().manual_seed(0))
    options = {"chunk_size": chunk_size, "num_adjacent": num_adjacent, "count_keys_once": count_keys_once}
    expected = cluster.multiplicity(cluster.cluster_pattern(where, **options))
    assert torch.equal(seen(where, **options).long(), expected)
