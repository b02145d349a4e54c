"""The contract holds a good layer of a third party to be good, and each bad one to be bad, for the right reason."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_clauses  # noqa: F401  (adds clauses)
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_sr_attn import LSP, CoA, ShapeError
from sparse_sr_attn.layers import AttentionLayer
from sparse_sr_attn.registry import Entry
from sparse_sr_attn.testing import conformance

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler


class Gate(AttentionLayer):
    """A map times a gate made of its own brightness: small, and by the book. The bad ones below each change a part."""

    def __init__(self, embed_dim: int, *, zero_init: bool = False) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.key = nn.Conv2d(embed_dim, 1, 1)
        self.value = nn.Conv2d(embed_dim, embed_dim, 1)
        if zero_init:
            nn.init.zeros_(self.value.weight)
            nn.init.zeros_(self.value.bias)

    def forward(self, x: Tensor, state: Any = None) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.embed_dim:
            raise ShapeError(f"x must be (b, {self.embed_dim}, h, w), got {tuple(x.shape)}")
        return x + self.gate(x) * self.value(x)

    def gate(self, x: Tensor) -> Tensor:
        scores = self.key(x).flatten(2)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        return scores.softmax(dim=-1).to(x.dtype).unflatten(2, x.shape[2:])


def gated(gate: Callable[[Any, Callable[[Tensor], Tensor], Tensor], Tensor]) -> type[Gate]:
    """Return a layer with another gate, which is made of the layer, its good gate and the map."""

    class Bad(Gate):
        def gate(self, x: Tensor) -> Tensor:
            return gate(self, super().gate, x)

    return Bad


class MixesSamples(Gate):
    def gate(self, x: Tensor) -> Tensor:
        return super().gate(x - x.mean(dim=0, keepdim=True))


class WantsEvenSizes(Gate):
    def gate(self, x: Tensor) -> Tensor:
        return F.interpolate(F.avg_pool2d(super().gate(x), 2), scale_factor=2)


class SetsAnAttribute(Gate):
    def gate(self, x: Tensor) -> Tensor:
        self.last_size = x.shape[2:]
        return super().gate(x)


class Counts(Gate):
    def __init__(self, embed_dim: int, *, zero_init: bool = False) -> None:
        super().__init__(embed_dim, zero_init=zero_init)
        self.register_buffer("level", torch.zeros(()))


class MovesInEvaluation(Counts):
    def gate(self, x: Tensor) -> Tensor:
        self.level.add_(x.detach().mean())
        return super().gate(x)


class MovesWhenRecomputed(Counts):
    def gate(self, x: Tensor) -> Tensor:
        if self.training:
            self.level.mul_(0.5).add_(x.detach().mean())
        return super().gate(x) + self.level


class KeepsNotANumber(Counts):
    def gate(self, x: Tensor) -> Tensor:
        if self.training:
            self.level.mul_(0.5).add_(x.detach().mean())
        return super().gate(x)


class ForgetsItsState(Gate):
    def __init__(self, embed_dim: int, *, zero_init: bool = False) -> None:
        super().__init__(embed_dim, zero_init=zero_init)
        self.register_buffer("level", torch.zeros(()), persistent=False)

    def gate(self, x: Tensor) -> Tensor:
        if self.training:
            self.level.add_(1)
        return super().gate(x) + self.level


class HasAnIdleParameter(Gate):
    def __init__(self, embed_dim: int, *, zero_init: bool = False) -> None:
        super().__init__(embed_dim, zero_init=zero_init)
        self.idle = nn.Parameter(torch.ones(3))


class SumsInHalf(Gate):
    def gate(self, x: Tensor) -> Tensor:
        scores = self.key(x).flatten(2)
        return (scores.exp() / scores.exp().sum(-1, keepdim=True)).to(x.dtype).unflatten(2, x.shape[2:])


class IsNoIdentityAtFirst(Gate):
    def gate(self, x: Tensor) -> Tensor:
        return super().gate(x) + (self.value.weight == 0).all() / self.value(x).exp()

    def forward(self, x: Tensor, state: Any = None) -> Tensor:
        return super().forward(x) + 1e-6


class TakesAnyWidth(Gate):
    def forward(self, x: Tensor, state: Any = None) -> Tensor:
        return x + super().forward(x[:, : self.embed_dim]).mean(dim=1, keepdim=True)


class SilentAboutTheWidth(Gate):
    def forward(self, x: Tensor, state: Any = None) -> Tensor:
        if x.shape[1] != self.embed_dim:
            raise ShapeError("wrong shape")
        return super().forward(x)


class ReadsAWeight(Gate):
    def gate(self, x: Tensor) -> Tensor:
        scores = F.conv2d(x, self.key.weight, self.key.bias).flatten(2)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        return scores.softmax(dim=-1).to(x.dtype).unflatten(2, x.shape[2:])


BAD: dict[str, Callable[..., nn.Module]] = {
    "any size": WantsEvenSizes,
    "every size": gated(lambda layer, gate, x: gate(x).expand(-1, -1, -1, x.shape[3] + (x.shape[2] == 11))),
    "forward sets no attribute": SetsAnAttribute,
    "evaluation moves nothing": MovesInEvaluation,
    "evaluation moves nothing, dice": gated(lambda layer, gate, x: gate(x) + torch.rand(())),
    "repeated runs are bit equal": gated(lambda layer, gate, x: F.dropout(gate(x), training=layer.training)),
    "every parameter learns": HasAnIdleParameter,
    "another number of channels is refused": TakesAnyWidth,
    "another number of channels is refused, silently": SilentAboutTheWidth,
    "evaluation does not mix samples": MixesSamples,
    "a sample that is not finite spoils no other": KeepsNotANumber,
    "degenerate maps are finite and repeatable": gated(
        lambda layer, gate, x: gate(x / x.std((2, 3), keepdim=True, correction=0))
    ),
    "deterministic mode changes nothing": gated(lambda layer, gate, x: gate(x) + 0 * torch.empty_like(x[:, :1])),
    "strides do not matter": gated(lambda layer, gate, x: gate(x.as_strided(x.shape, torch.empty(x.shape).stride()))),
    "precisions": gated(lambda layer, gate, x: gate(x).float()),
    "loud half inputs stay finite": SumsInHalf,
    "copies go on alike": ForgetsItsState,
    "zero init is the identity": IsNoIdentityAtFirst,
    "gradients are derivatives": gated(lambda layer, gate, x: gate(x) + 0.5 * layer.value(x).detach()[:, :1]),
    "compiled is eager": gated(lambda layer, gate, x: gate(x) if x.mean() > 0 else gate(-x)),
    "every part is called": ReadsAWeight,
    "reparametrised weights learn": ReadsAWeight,
    "transforms": gated(lambda layer, gate, x: gate(x.detach())),
    "traced": gated(lambda layer, gate, x: gate(x) * float(x.flatten()[0])),
    "sizes do not recompile": gated(
        lambda layer, gate, x: torch.cat([layer.key(row).sigmoid() for row in x.split(1, 2)], 2)
    ),
    "checkpointed is plain": MovesWhenRecomputed,
}
CLAUSES = {clause.name: clause for clause in conformance.CLAUSES}
CPU = torch.device("cpu")


def subject(build: Callable[..., nn.Module]) -> conformance.Subject:
    return conformance.Subject(Entry(build.__name__, "layer", build, ""))


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_layer_is_caught(reason: str) -> None:
    """And a good one passes the same clause."""
    clause = CLAUSES[reason.partition(", ")[0]]
    clause.check(subject(Gate), CPU)
    with pytest.raises(Exception):  # noqa: B017, PT011  a clause passes the layer's own error on
        clause.check(subject(BAD[reason]), CPU)


def test_most_clauses_are_seen_red() -> None:
    for_all = {clause.name for clause in conformance.CLAUSES if clause.applies(subject(Gate)) and not clause.slow}
    same_by_other_means = {  # as "checkpointed is plain", "compiled is eager", "any size", "every part is called"
        "compiled forward mode",
        "compiled with other forwards",
        "parts can be replaced",
        "checkpointed and compiled is plain",
        "export with dynamic sizes",
        "training moves state once a forward",
        "autocast",
    }
    assert for_all - {reason.partition(", ")[0] for reason in BAD} == same_by_other_means


def test_a_good_layer_passes_in_one_line() -> None:
    conformance.check_layer(Gate)


def test_all_broken_clauses_are_named() -> None:
    class Bad(MixesSamples, HasAnIdleParameter):
        pass

    others = set(CLAUSES) - {"evaluation does not mix samples", "every parameter learns", "strides do not matter"}
    with pytest.raises(AssertionError) as caught:
        conformance.check_layer(Bad, leave_out=others)
    lines = str(caught.value).splitlines()
    assert any(line.startswith("Bad: evaluation does not mix samples: AssertionError: ") for line in lines)
    assert "Bad: every parameter learns: AssertionError: idle gets no gradient" in lines
    assert not any("strides" in line for line in lines)


def test_a_failure_inside_the_layer_names_its_line() -> None:
    with pytest.raises(AssertionError, match=r"any size: .*\(test_toy_layers\.py:\d+\)$"):
        conformance.check_layer(WantsEvenSizes, leave_out=set(CLAUSES) - {"any size"})


def test_consumers_and_providers_bring_a_partner() -> None:
    others = set(CLAUSES) - {"evaluation moves nothing", "state of another size is refused"}
    conformance.check_layer(CoA, partner=LSP, leave_out=others)
    conformance.check_layer(LSP, partner=CoA, leave_out=others, num_clusters=3)
    with pytest.raises(LookupError, match="a consumer needs a partner in the registry, CoA has none"):
        conformance.check_layer(CoA)


def test_a_reader_that_is_not_registered_is_a_consumer() -> None:
    class Reader(CoA):
        pass

    with pytest.raises(LookupError, match="a consumer needs a partner in the registry, Reader has none"):
        conformance.check_layer(Reader)


class Forgetful(Gate):
    provides = tuple


def test_a_clause_without_a_message_says_what_must_hold() -> None:
    clause = "loud half inputs stay finite"
    loud = gated(lambda self, good, x: good(x) * torch.inf)
    with pytest.raises(AssertionError, match=f"{clause}: AssertionError: must hold: "):
        conformance.check_layer(loud, leave_out=set(CLAUSES) - {clause})


def test_a_layer_that_provides_a_state_must_define_attend() -> None:
    clause = "assignments do not depend on the batch"
    with pytest.raises(AssertionError, match="a layer that sets `provides` must define attend, got Forgetful"):
        conformance.check_layer(Forgetful, leave_out=set(CLAUSES) - {clause})


def test_a_clause_that_does_not_exist_cannot_be_left_out() -> None:
    with pytest.raises(ValueError, match=r"leave_out must name clauses, got \['compile'\]; known: \['a foreign state"):
        conformance.check_layer(Gate, leave_out=["compile"])
