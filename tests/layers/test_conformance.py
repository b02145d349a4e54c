"""Every registered layer against every clause of the layer contract."""

from dataclasses import replace

import pytest
import torch
import torch_clauses  # noqa: F401  (adds clauses)
from tolerances import assert_bit_equal

from sparse_sr_attn import LAYERS, LSP, CoA, LCoA
from sparse_sr_attn.errors import ShapeError, SharingError
from sparse_sr_attn.layers import AttentionLayer, build_layer
from sparse_sr_attn.testing import conformance
from sparse_sr_attn.testing.conformance import Clause, Subject

PROMISES = {
    "precisions": ("R3",),
    "gradients are derivatives": ("R4",),
    "every parameter learns": ("R4",),
    "every size": ("R5",),
    "any size": ("R5",),
    "deterministic mode changes nothing": ("R6", "R11"),
    "degenerate maps are finite and repeatable": ("R7",),
    "a sample that is not finite spoils no other": ("R8",),
    "evaluation does not mix samples": ("R9",),
    "assignments do not depend on the batch": ("R9",),
    "evaluation moves nothing": ("R10",),
    "repeated runs are bit equal": ("R11",),
    "copies go on alike": ("R12", "R13"),
    "compiled is eager": ("R14",),
    "sizes do not recompile": ("R14",),
    "compiled by inductor is eager": ("R14",),
    "export with dynamic sizes": ("R15",),
    "loud half inputs stay finite": ("R18",),
    "autocast": ("R18",),
    "checkpointed is plain": ("R19",),
    "checkpointed and compiled is plain": ("R19",),
    "training moves state once a forward": ("R20",),
}
"""Which promises of docs/reliability.md a clause keeps."""

COMPILERS = {
    "compiled is eager",
    "compiled forward mode",
    "compiled with other forwards",
    "checkpointed and compiled is plain",
    "export with dynamic sizes",
    "sizes do not recompile",
}
"""Clauses that take seconds, most of them a compiler's; the slow tests hold all layers to them, the others a few."""
QUICK = {"LCoA", "GMSA"}

UNHOOKED = COMPILERS | {
    "a foreign state is refused",
    "checkpointed and compiled by inductor is plain",
    "compiled by inductor is eager",
    "evaluation moves nothing",
}
"""Clauses that jaxtyping's import hook spoils: it changes compilers, Python's random state and errors."""


def _param(subject: Subject, clause: Clause, suffix: str = "") -> object:
    # Inductor's own imports use what Python 3.14 will drop.
    slow = clause.slow or (clause.name in COMPILERS and str(subject) not in QUICK)
    marks = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")] if slow else []
    marks += [pytest.mark.unhooked] if clause.name in UNHOOKED else []
    marks += [pytest.mark.promise(number) for number in PROMISES.get(clause.name, [])]
    return pytest.param(subject, clause, id=f"{subject}{suffix}: {clause}", marks=marks)


@pytest.mark.parametrize(("subject", "clause"), [_param(*pair) for pair in conformance.matrix(LAYERS)])
def test_contract(device: torch.device, subject: Subject, clause: Clause) -> None:
    clause.check(subject, device)


NEAREST = {"neighbors": "nearest", "chunk_size": 3}
"""So that a map of 5x7 has more chunks than one sees."""


@pytest.mark.parametrize(
    ("subject", "clause"),
    [
        _param(replace(subject, options=NEAREST), clause, " nearest")
        for subject, clause in conformance.matrix(LAYERS)
        if subject.entry.name == "LCoA"
    ],
)
def test_contract_of_nearest_chunks(device: torch.device, subject: Subject, clause: Clause) -> None:
    clause.check(subject, device)


def test_every_layer_is_held_to_the_contract() -> None:
    named = {subject.entry.name for subject in conformance.subjects(LAYERS)}
    assert named == set(LAYERS)
    assert {"LCoA", "CoA", "LSP"} <= named


def test_kinds_are_the_four() -> None:
    assert {LAYERS.get(name).kind for name in LAYERS} <= {"layer", "consumer", "provider", "operator"}
    for name in LAYERS:
        entry = LAYERS.get(name)
        if entry.kind in ("layer", "consumer"):
            assert issubclass(entry.build, AttentionLayer)
            assert (entry.build.requires is not None) == (entry.kind == "consumer")


@pytest.mark.parametrize("build", [LSP, LCoA])
def test_centroids_move_in_training(device: torch.device, build: type[LSP | LCoA]) -> None:
    """Else every clause about state would hold for a layer that has none."""
    layer = build(8, num_clusters=5, chunk_size=4, ema_decay=0.9).to(device).train()
    buffers = dict(layer.named_buffers())
    centroids = next(buffer for name, buffer in buffers.items() if name.endswith("centroids"))
    for step in range(3):
        before = centroids.clone()
        layer(conformance.feature_map(f"x{step}", device=device))
        assert (centroids != before).any() == (step > 0)
    lengths = centroids.norm(dim=-1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths))


@pytest.mark.parametrize("build", [LSP, LCoA])
def test_a_decay_of_one_freezes_the_centroids(device: torch.device, build: type[LSP | LCoA]) -> None:
    """As published."""
    layer = build(8, num_clusters=5, chunk_size=4, ema_decay=1.0, reseed_threshold=0.9).to(device).train()
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    for step in range(4):
        layer(conformance.feature_map(f"x{step}", device=device))
    for name, buffer in layer.named_buffers():
        if name.endswith("centroids"):
            assert_bit_equal(buffer, before[name])


def test_one_provider_serves_many(device: torch.device) -> None:
    """The loop that users write: two producers and their readers, checkpointed or not, are told apart."""
    torch.manual_seed(0)
    first, second = (LCoA(8, num_clusters=5, chunk_size=4, seed=seed).to(device).eval() for seed in (1, 2))
    reader = CoA(8, res_scale=0.5).to(device)
    x = conformance.feature_map("x", device=device)
    one, two = first.attend(x), second.attend(x)
    outputs = [reader(x, state) for state in (one, two, one)]
    assert_bit_equal(outputs[0], outputs[2])
    assert (outputs[0] != outputs[1]).any()


@pytest.mark.parametrize("scale", [0.0, 0.25])
def test_res_scale_is_read_when_it_is_used(device: torch.device, scale: float) -> None:
    """Setting it on trained weights switches the attention off, or turns it down."""
    layer = LCoA(8, num_clusters=5, chunk_size=4, res_scale=1.0).double().to(device).eval()
    x = conformance.feature_map("x", dtype=torch.float64, device=device)
    branch = layer(x) - x
    for path in (lambda: layer(x), lambda: layer(x, layer.attend(x))):
        layer.coa.res_scale = scale
        torch.testing.assert_close(path() - x, scale * branch, rtol=1e-10, atol=1e-10)


def test_a_consumer_provides_nothing() -> None:
    reader = CoA(8)
    with pytest.raises(SharingError, match="CoA"):
        reader.attend(torch.zeros(1, 8, 2, 2))
    with pytest.raises(SharingError, match="CoA"):
        reader.make_consumer()


def test_make_consumer_passes_the_options_on() -> None:
    reader = LCoA(6, res_scale=0.3, zero_init=True, num_clusters=3).make_consumer()
    assert isinstance(reader, CoA)
    assert reader.res_scale == 0.3
    assert reader.value.weight.shape == (6, 6, 1, 1)
    assert not reader.value.weight.any()
    assert LCoA(6, zero_init=False).make_consumer().value.weight.any()


@pytest.mark.unhooked
@pytest.mark.parametrize("name", [name for name in LAYERS if LAYERS.get(name).kind == "layer"])
def test_what_is_no_dense_map_of_floating_point_is_refused(name: str) -> None:
    layer = build_layer(name, 6)
    x = torch.rand(1, 6, 4, 4)
    for wrong in (x.long(), x.bool(), x.to(torch.complex64), x.to_sparse(), None, [1], "x", x.numpy()):
        with pytest.raises(ShapeError, match=r"^x must be a feature map \(b, 6, .*\), a dense floating-point tensor"):
            layer(wrong)
    for wrong in (torch.tensor(1.0), x[0, :, 0, 0], x[0], x[None], x[:, 1:], x[:, :, :0]):
        with pytest.raises(ShapeError, match=r"^x must be a feature map .*because embed_dim is 6; got shape \("):
            layer(wrong)
