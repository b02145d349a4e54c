"""Every option of every layer and network changes something that can be observed: none is accepted and ignored."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from strategies import generator
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import sparse_sr_attn
from sparse_sr_attn import LAYERS
from sparse_sr_attn.backbones.base import Network
from sparse_sr_attn.config import fields
from sparse_sr_attn.testing import conformance

Observation = dict[str, Any]

VALUES: dict[str, tuple[object, object]] = {
    "amplification": (1.0, 2.0),
    "categories": ("kmeans", "learnt"),
    "chunk_size": (4, 7),
    "ema_decay": (0.9, 0.05),  # the first steps keep less than they are told: the decay warms up
    "count_keys_once": (True, False),
    "exact_shift": (True, False),
    "expansion": (2, 3),
    "form": ("slices", "masked"),
    "weights_dtype": (None, "bfloat16"),
    "max_buckets": (128, 2),
    "neighbors": ("ring", "nearest"),
    "num_adjacent": (1, 0),
    "num_clusters": (5, 3),
    "num_features": (16, 13),
    "num_rounds": (1, 3),
    "out_channels": (None, 5),
    "redraw": (True, False),
    "reduction": (2, 4),
    "res_scale": (0.5, 0.25),
    "reseed_threshold": (0.0, 0.9),
    "reuse": ("weights", "pattern"),
    "routing": ("kmeans", "lsh"),
    "scale": (1.0, 3.0),
    "seed": (0, 1),
    "similarity": ("cosine", "dot"),
    "logit_scale": (10.0, 3.0),
    "cluster_order": ("chain", "index"),
    "share": (1, 2),
    "shift": (False, True),
    "window_sizes": ((2, 3, 4), (4, 2, 3)),
    "zero_init": (False, True),
    # of networks
    "activation_checkpointing": (False, True),
    "attention": (None, {"type": "LCoA", "every": 1, "num_clusters": 5, "chunk_size": 7, "zero_init": False}),
    "block": (None, {"type": "LCoA", "num_clusters": 5, "chunk_size": 7}),
    "img_range": (1.0, 2.0),
    "num_block": (1, 2),
    "num_feat": (8, 10),
    "num_group": (2, 3),
    "num_in_ch": (3, 1),
    "num_out_ch": (3, 1),
    "rgb_mean": (None, (0.2, 0.3, 0.4)),
    "squeeze_factor": (2, 4),
    "upscale": (2, 3),
}
"""Two values of each option."""

BESIDE: dict[str, dict[str, object]] = {
    "exact_shift": {"shift": True, "window_sizes": (3, 5)},  # windows of even size go back where they were anyway
    "weights_dtype": {"reuse": "weights"},
    "reseed_threshold": {"ema_decay": 0.3, "num_clusters": 30},  # so that clusters die within a few steps
    "redraw": {"num_rounds": 1},
    "logit_scale": {"similarity": "cosine"},
    "cluster_order": {"num_clusters": 20, "chunk_size": 3},
}
"""What must hold for an option to have a say."""

NETWORKS: dict[str, dict[str, Any]] = {
    "LCoAN": {"num_feat": 8, "num_group": 2, "num_block": 1, "num_clusters": 5, "chunk_size": 4, "res_scale": 0.5},
    "ELAN": {"num_feat": 8, "num_block": 2, "window_sizes": (2, 3, 4), "img_range": 1.0},
    "EDSR": {"num_feat": 8, "num_block": 1, "upscale": 2, "img_range": 1.0},
    "RCAN": {"num_feat": 8, "num_group": 2, "num_block": 1, "squeeze_factor": 2, "upscale": 2, "img_range": 1.0},
}

OPTIONS = {name: list(fields(LAYERS.get(name).build))[1:] for name in LAYERS} | {
    name: list(fields(getattr(sparse_sr_attn, name))) for name in NETWORKS
}


def observe(module: nn.Module, channels: int, state: Callable[[Tensor], object] | None = None) -> Observation:
    """Train a few steps; return outputs, gradients, parameters and buffers, and how much is kept for the backward.

    Not the repr: a layer that shows an option need not use it.
    """
    seen: Observation = {}
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel() * tensor.element_size())
        return tensor

    optimizer = torch.optim.Adam(module.train().parameters(), lr=0.01)
    for step in range(6):
        x = torch.rand(2, channels, 6, 7, generator=generator(step, "x")).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = module(x)
        optimizer.zero_grad()
        (output * torch.randn(output.shape, generator=generator(step, "probe"))).sum().backward()
        seen |= {f"{step} output": output.detach().clone(), f"{step} gradient": x.grad.clone()}  # type: ignore[union-attr]
        optimizer.step()
    seen |= {f"after {name}": value.clone() for name, value in module.state_dict().items() if name != "options"}
    module.eval()
    seen["evaluation"] = module(x).detach()
    assert torch.isfinite(seen["evaluation"]).all(), "NaN differs from itself"
    seen["bytes kept"] = sum(kept)
    if state is not None:
        leaves = [leaf for leaf in pytree.tree_leaves(state(x)) if isinstance(leaf, Tensor)]
        seen["state"] = [(tuple(leaf.shape), leaf.dtype) for leaf in leaves]
    return seen


def differ(one: Observation, other: Observation) -> Iterator[str]:
    """Return the names of what is not the same."""
    for name in one.keys() | other.keys():
        a, b = one.get(name), other.get(name)
        if type(a) is not type(b):
            yield name
        elif isinstance(a, Tensor) and isinstance(b, Tensor):
            if a.shape != b.shape or a.dtype != b.dtype or not torch.equal(a, b):
                yield name
        elif a != b:
            yield name


def observed(name: str, options: dict[str, object]) -> Observation:
    if name in LAYERS:
        subject = next(subject for subject in conformance.subjects(LAYERS) if subject.entry.name == name)
        chain = subject.chain(**{option: value for option, value in options.items() if subject.takes(option)})
        provides = subject.kind == "provider" or getattr(subject.entry.build, "provides", None) is not None
        return observe(chain, conformance.CHANNELS, chain.state if provides else None)
    build = getattr(sparse_sr_attn, name)
    known = {option: value for option, value in options.items() if option in fields(build)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build(**{**NETWORKS[name], **known})
    return observe(network, network.num_in_ch)


@pytest.mark.promise("R22")
@pytest.mark.parametrize("name", OPTIONS)
def test_each_option_changes_something(name: str) -> None:
    """And the same twice differs in nothing, else a difference would prove nothing."""
    assert list(differ(observed(name, {}), observed(name, {}))) == []
    ignored = []
    for option in OPTIONS[name]:
        one, other = (observed(name, {**BESIDE.get(option, {}), option: value}) for value in VALUES[option])
        if not list(differ(one, other)):
            ignored.append(option)
    assert ignored == []


@pytest.mark.promise("R22")
def test_every_option_has_a_case() -> None:
    """A new option needs two values here."""
    assert {option for options in OPTIONS.values() for option in options} == set(VALUES)
    networks = {entry for entry in sparse_sr_attn.__all__ if is_network(entry)}
    assert networks == set(NETWORKS)


def is_network(name: str) -> bool:
    value = getattr(sparse_sr_attn, name)
    return isinstance(value, type) and issubclass(value, Network)
