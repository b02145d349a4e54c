"""The peers: each is its formula, by the slow twins; options do what they say; randomness is seeded and kept."""

import math
from typing import Any

import pytest
import torch
from tolerances import assert_bit_equal
from torch import Tensor, nn
from torch.nn.functional import normalize

from sparse_sr_attn import (
    ENLA,
    HSPA,
    LAYERS,
    NLA,
    NLSA,
    CategoryAttention,
    SharingError,
    build_layer,
)
from sparse_sr_attn.errors import ShapeError
from sparse_sr_attn.reference import cluster, dense, kmeans, lsh, sparsemax
from sparse_sr_attn.reference import random_features as kernel
from sparse_sr_attn.testing import conformance

PEERS = ("CategoryAttention", "ENLA", "HSPA", "NLA", "NLSA")
SMALL: dict[str, dict[str, Any]] = {
    "CategoryAttention": {"num_clusters": 5, "chunk_size": 4},
    "ENLA": {"num_features": 12},
    "HSPA": {},
    "NLA": {},
    "NLSA": {"chunk_size": 4, "num_rounds": 2},
}


def make(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return build_layer(name, 8, **{"res_scale": 0.5, "reduction": 2, **SMALL[name], **options}).double()


def features(seed: int = 0, height: int = 5, width: int = 6) -> Tensor:
    return torch.randn(2, 8, height, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows(conv: nn.Module, x: Tensor) -> Tensor:
    return conv(x).flatten(2).mT


def unit(tensor: Tensor) -> Tensor:
    return normalize(tensor, dim=-1, eps=5e-5)


def as_map(attended: Tensor, x: Tensor) -> Tensor:
    return attended.mT.reshape(x.shape)


def branch_by_twins(layer: Any, x: Tensor) -> Tensor:
    """What the layer adds to `x`, over `res_scale`, from loops and dense matrices."""
    if isinstance(layer, NLA):
        query = rows(layer.embed, x)
        return as_map(dense.dense_attention(query, unit(query), rows(layer.value, x)), x)
    if isinstance(layer, HSPA):
        query = rows(layer.embed, x)
        return as_map(sparsemax.sparsemax_attention(query, unit(query), rows(layer.value, x), scale=layer.scale), x)
    if isinstance(layer, ENLA):
        length = math.sqrt(layer.amplification)
        query, key = (length * unit(rows(conv, x)) for conv in (layer.query, layer.key))
        return as_map(kernel.kernel_attention(query, key, rows(layer.value, x), layer.directions), x)
    if isinstance(layer, NLSA):
        query = rows(layer.embed, x)
        num_rounds, half, _ = layer.rotations.shape
        num_buckets = lsh.bucket_count(query.shape[1], layer.chunk_size, 2 * half)
        pattern = cluster.cluster_pattern(
            lsh.hash_tokens(query, layer.rotations, num_buckets).flatten(0, 1),
            chunk_size=layer.chunk_size,
            num_adjacent=layer.num_adjacent,
            count_keys_once=layer.count_keys_once,
        )
        values = rows(layer.value, x)
        return as_map(cluster.cluster_attention_rounds(query, unit(query), values, pattern, num_rounds), x)
    assert isinstance(layer, CategoryAttention)
    query, key, value = rows(layer.query, x), unit(rows(layer.key, x)), rows(layer.value, x)
    categories = unit(layer.centroids)
    assignment = kmeans.assign(key, categories)
    pattern = cluster.cluster_pattern(assignment, chunk_size=layer.chunk_size, num_adjacent=layer.num_adjacent)
    within = cluster.cluster_attention(query, key, value, pattern)
    known = categories.expand(len(x), -1, -1)
    among = dense.dense_attention(query, known, known @ layer.category_value.weight.T)
    return layer.output(as_map(within + among, x))


VARIANTS = [
    ("NLA", {}),
    ("NLA", {"reduction": 8}),
    ("HSPA", {}),
    ("HSPA", {"scale": 4.0}),
    ("ENLA", {}),
    ("ENLA", {"amplification": 2.0, "seed": 3}),
    ("NLSA", {}),
    ("NLSA", {"num_rounds": 3, "max_buckets": 4, "num_adjacent": 0}),
    ("NLSA", {"count_keys_once": False, "chunk_size": 7}),
    ("CategoryAttention", {}),
    ("CategoryAttention", {"categories": "learnt", "num_adjacent": 2}),
]


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
def test_it_is_its_formula(name: str, options: dict[str, Any]) -> None:
    """Output and all gradients, in evaluation."""
    layer = make(name, **options).eval()
    for size in ((5, 6), (1, 1), (1, 7)):
        x = features(0, *size).requires_grad_()
        probe = features(1, *size)
        leaves = {"x": x, **dict(layer.named_parameters())}
        results = []
        for output in (layer(x), x + layer.res_scale * branch_by_twins(layer, x)):
            grads = torch.autograd.grad((output * probe).sum(), list(leaves.values()), materialize_grads=True)
            results.append((output, dict(zip(leaves, grads, strict=True))))
        torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-10, atol=1e-10)
        for leaf in leaves:
            torch.testing.assert_close(results[0][1][leaf], results[1][1][leaf], rtol=1e-9, atol=1e-9, msg=leaf)


@pytest.mark.parametrize("name", PEERS)
def test_a_state_is_refused(name: str) -> None:
    layer = make(name)
    with pytest.raises(SharingError, match=rf"^{name} takes no state, got a dict$"):
        layer(features(), {})
    with pytest.raises(SharingError, match="needs a layer that provides a state"):
        layer.attend(features())


# --- NLA and HSPA -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"chunk_size": 30}, {"chunk_size": 1000}, {"chunk_size": 10}], ids=str)
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("name", ["NLSA", "LCoA"])
def test_sparse_attention_that_sees_all_is_dense(name: str, similarity: str, options: dict[str, Any]) -> None:
    """One chunk that holds every token, or three that see each other."""
    common: dict[str, Any] = {"reduction": 2, "res_scale": 1.0, "similarity": similarity, "logit_scale": 5.0}
    nla = NLA(8, **common).double().eval()
    sparse: Any = build_layer(name, 8, num_rounds=3 if name == "NLSA" else 1, **common, **options)
    sparse = sparse.double().eval()
    embed, value = (sparse.embed, sparse.value) if name == "NLSA" else (sparse.lsp.embed, sparse.coa.value)
    embed.load_state_dict(nla.embed.state_dict())
    value.load_state_dict(nla.value.state_dict())
    x = features()
    torch.testing.assert_close(sparse(x), nla(x), rtol=1e-10, atol=1e-10)


# --- NLSA -------------------------------------------------------------------------------------------------------------


def test_nlsa_draws_in_training_only_and_evaluates_by_what_it_drew_last() -> None:
    layer = make("NLSA").train()
    rotations = [layer.rotations.clone()]
    for step in range(3):
        layer(features(step))
        rotations.append(layer.rotations.clone())
    assert not any(torch.equal(rotations[i], rotations[j]) for i in range(4) for j in range(i))
    output = layer.eval()(features())
    assert_bit_equal(layer.rotations, rotations[-1])
    assert layer.num_draws == 3
    fresh = make("NLSA").eval()
    assert not torch.equal(fresh(features()), output)
    fresh.load_state_dict(layer.state_dict())
    assert_bit_equal(fresh(features()), output)


def test_nlsa_without_redraw_keeps_its_hash() -> None:
    layer = make("NLSA", redraw=False).train()
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    for step in range(3):
        layer(features(step))
    for name, buffer in layer.named_buffers():
        assert_bit_equal(buffer, before[name])


def test_nlsa_rounds_hash_differently() -> None:
    rotations = make("NLSA", num_rounds=3).rotations
    assert not any(torch.equal(rotations[i], rotations[j]) for i in range(3) for j in range(i))


# --- ENLA -------------------------------------------------------------------------------------------------------------


def test_enla_s_contrastive_loss_trains_queries_and_keys() -> None:
    layer = make("ENLA").train()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    losses = []
    for step in range(30):
        optimizer.zero_grad()
        loss = layer.contrastive_loss(features(), num_queries=8, seed=step)
        loss.backward()
        for part in (layer.query, layer.key):
            assert part.weight.grad is not None
            assert part.weight.grad.any()
        assert layer.value.weight.grad is None
        optimizer.step()
        losses.append(layer.contrastive_loss(features()).item())
    assert losses[-1] < losses[0] - 0.1
    length = math.sqrt(layer.amplification)
    query, key = (length * unit(rows(conv, features())) for conv in (layer.query, layer.key))
    expected = kernel.contrastive_loss(query, key, positive=0.02, negative=0.08)
    torch.testing.assert_close(layer.contrastive_loss(features()), expected, rtol=1e-10, atol=1e-10)
    with pytest.raises(ShapeError, match="embed_dim is 8"):
        layer.contrastive_loss(features()[:, :4])


# --- category attention -----------------------------------------------------------------------------------------------


def test_learnt_categories_are_a_parameter() -> None:
    layer = make("CategoryAttention", categories="learnt")
    assert isinstance(layer.centroids, nn.Parameter)
    assert not list(layer.buffers())


def test_two_forwards_before_a_backward() -> None:
    """The second moves the centroids that the first has used; gradients are those of one after the other."""
    layer, other = make("CategoryAttention").train(), make("CategoryAttention").train()
    probe = features(9)
    losses = [(layer(features(seed)) * probe).sum() for seed in range(3)]
    sum(losses).backward()
    for seed in range(3):
        (other(features(seed)) * probe).sum().backward()
    for one, two in zip(layer.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)


SUBJECTS = [
    conformance.Subject(LAYERS.get("CategoryAttention"), options={"categories": "learnt"}),
    conformance.Subject(LAYERS.get("NLSA"), options={"redraw": False, "count_keys_once": False}),
]
EXTRA = [
    "every parameter learns",
    "evaluation does not mix samples",
    "precisions",
    "gradients are derivatives",
    "compiled is eager",
    "export with dynamic sizes",
    "checkpointed is plain",
]


@pytest.mark.slow
@pytest.mark.unhooked
@pytest.mark.parametrize("subject", SUBJECTS, ids=["learnt categories", "published NLSA keys"])
@pytest.mark.parametrize("clause", [c for c in conformance.CLAUSES if c.name in EXTRA], ids=str)
def test_contract_with_other_options(
    device: torch.device, subject: conformance.Subject, clause: conformance.Clause
) -> None:
    clause.check(subject, device)
