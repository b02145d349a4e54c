"""What a layer should return: by the slow twins of `reference`, in float64, with the layer's own weights.

Only who is in which cluster is taken from the layer itself, because between two clusters that are equally near rounding
decides; `check` requires that each token is in the nearest cluster but for that.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.speed import standins
from benchmarks.speed.methods import Stack
from sparse_sr_attn.backbones.elan import ELAN
from sparse_sr_attn.backbones.lcoan import LCoAN
from sparse_sr_attn.functional.window.grid import group_widths
from sparse_sr_attn.layers.base import tokens
from sparse_sr_attn.layers.category import CategoryAttention
from sparse_sr_attn.layers.enla import ENLA
from sparse_sr_attn.layers.gmsa import GMSA, SharedGMSA, window_shifts
from sparse_sr_attn.layers.hspa import HSPA
from sparse_sr_attn.layers.lcoa import CoA, LCoA
from sparse_sr_attn.layers.nla import NLA
from sparse_sr_attn.layers.nlsa import NLSA
from sparse_sr_attn.layers.shift_conv import ShiftConv2d
from sparse_sr_attn.reference import cluster, dense, lsh, shift, sparsemax, window
from sparse_sr_attn.reference import random_features as kernel

ALLOWED = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 0.04, torch.bfloat16: 0.25}
"""Error of an output or gradient, as a fraction of what attention adds, up to which it counts as correct.

Attention adds a twentieth, so in half precision the roundings of the sums alone come near to these fractions; dense
attention has half of them.
"""


@dataclass(frozen=True)
class Check:
    """What became of a comparison.

    Attributes:
        status: "correct", "wrong" or "not checked".
        error: largest of the errors found, as a fraction of what attention adds; root mean squares.
        allowed: up to which it is correct.
        reason: why it is wrong or not checked.
    """

    status: str
    error: float | None = None
    allowed: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Given:
    """What a twin gets in addition to its input.

    Attributes:
        provider: in float64; makes the state of a consumer.
        assignment: of each token to its cluster, as the timed layer has it; `None` where there are none.
    """

    provider: Any
    assignment: Tensor | None


# --- who is where -----------------------------------------------------------------------------------------------------


def assignment(module: nn.Module, provider: nn.Module | None, x: Tensor) -> Tensor | None:  # noqa: PLR0911
    """Return the clusters into which a layer puts the tokens of `x`, `(b * rounds, n)`; `None` if it has none.

    Of a stack they are those of the first layer, of a network those of the first group.
    """
    if isinstance(module, LCoAN):
        return assignment(cast(Any, module.body)[0].attention, None, _entering(module, x))
    source: Any = _source(module, provider)
    if isinstance(source, LCoA):
        return source.attend(x).pattern.assignment
    if isinstance(source, standins.PlainLCoA):
        return source.assign(tokens(source.embed(x)))
    if isinstance(source, NLSA):
        return source._hash(tokens(source.embed(x))).flatten(0, 1)
    if isinstance(source, standins.PlainNLSA):
        hashes = source.hashes(tokens(source.embed(x)))
        return (hashes % _num_buckets(source, hashes.shape[-1])).flatten(0, 1)
    if isinstance(source, CategoryAttention):
        keys = tokens(source.key(x))
        return source._assign(_unit(keys.to(torch.promote_types(keys.dtype, torch.float32))))
    return None


def _source(module: nn.Module, provider: nn.Module | None) -> nn.Module:
    """Return the layer that puts tokens into clusters."""
    if isinstance(module, Stack):
        return module.layers[0]
    return module if provider is None else provider


def _entering(network: LCoAN, x: Tensor) -> Tensor:
    """Return the map that the attention of the first group is given."""
    first = network.conv_first((x - network.mean) * network.img_range)
    return cast(Any, network.body)[0].blocks(first)


def misplaced(twin: Any, given: Given, x: Tensor) -> float:
    """Return how much nearer, at most, another cluster is than that of a token: a difference of cosines."""
    if isinstance(twin, LCoAN):
        x, twin = _entering(twin, x), cast(Any, twin.body)[0].attention
    source: Any = _source(twin, given.provider)
    if given.assignment is None:
        return 0.0
    if isinstance(source, NLSA | standins.PlainNLSA):
        half = _num_buckets(source, x.shape[-1] * x.shape[-2]) // 2
        directions = torch.cat([source.rotations[:, :half], -source.rotations[:, :half]], dim=1)
        cosines = torch.einsum("bnd,rmd->brnm", _unit(_rows(source.embed(x))), directions)
        cosines = (cosines / directions.norm(dim=-1).amax()).flatten(0, 1)
    else:
        embed = source.key if isinstance(source, CategoryAttention) else getattr(source, "lsp", source).embed
        centroids = getattr(source, "lsp", source).centroids
        cosines = _unit(_rows(embed(x))) @ _unit(centroids).mT
    chosen = cosines.gather(-1, given.assignment[..., None])[..., 0]
    return (cosines.amax(dim=-1) - chosen).max().item()


def _num_buckets(layer: Any, num_tokens: int) -> int:
    return lsh.bucket_count(num_tokens, layer.chunk_size, 2 * layer.rotations.shape[1])


# --- the twins --------------------------------------------------------------------------------------------------------


def _rows(x: Tensor) -> Tensor:
    return x.flatten(2).mT


def _unit(rows: Tensor) -> Tensor:
    return F.normalize(rows, dim=-1, eps=5e-5)


def _added(x: Tensor, scale: float, attended: Tensor) -> Tensor:
    return x + scale * attended.mT.reshape(x.shape)


def seen(
    assignment: Tensor,
    chunk_size: int,
    *,
    num_adjacent: int = 1,
    count_keys_once: bool = True,
    rank: Tensor | None = None,
) -> Tensor:
    """Return how often each token sees each other one: `reference.cluster.multiplicity`, a chunk at a time."""
    pattern = cluster.cluster_pattern(
        assignment,
        chunk_size=chunk_size,
        num_adjacent=num_adjacent,
        count_keys_once=count_keys_once,
        place=None if rank is None else rank[assignment],
    )
    samples, num_tokens = assignment.shape
    counts = torch.zeros(samples, num_tokens, num_tokens, dtype=torch.float64)
    for sample, order in zip(counts, pattern.order.tolist(), strict=True):
        chunks = cluster.slot_tokens(order, chunk_size, count_keys_once)
        visible = cluster.seen_tokens(chunks, num_adjacent, count_keys_once)
        for start, keys in zip(range(0, num_tokens, len(chunks[0])), visible, strict=True):
            own = torch.tensor(order[start : start + len(chunks[0])])
            others = torch.tensor([key for key in keys if key is not None])
            sample.index_put_((own[:, None], others), torch.ones(()).double(), accumulate=True)
    return counts


def _attended(layer: Any, given: Given, query: Tensor, key: Tensor, value: Tensor, *, rounds: int = 1) -> Tensor:
    """Return cluster attention as dense attention, by the chunks and the counting of a layer."""
    assert given.assignment is not None  # noqa: S101  of these layers there always is one
    counts = seen(
        given.assignment,
        layer.chunk_size,
        num_adjacent=getattr(layer, "num_adjacent", 1),
        count_keys_once=getattr(
            layer, "count_keys_once", isinstance(layer, CategoryAttention)
        ),  # stand-ins count as published
        rank=getattr(layer, "rank", None),
    )
    return cluster.dense_attention(query, key, value, counts.unflatten(0, (-1, rounds)).sum(dim=1))


class _Dense(nn.Module):
    """LCoA, CoA or a stand-in for one, as dense attention; it replaces them in a network.

    Args:
        layer: in float64.
        given: the clusters of the layer that makes the state.
    """

    def __init__(self, layer: Any, given: Given) -> None:
        super().__init__()
        self.layer = layer
        self.given = given

    def attend(self, x: Tensor) -> tuple[Any, Tensor]:
        """Return the layer with the chunks, and the queries."""
        lsp = getattr(self.layer, "lsp", self.layer)
        query = _rows(lsp.embed(x))
        if getattr(lsp, "similarity", "dot") == "cosine":
            query = lsp.scale_logits.logit_scale.exp() * _unit(query)
        return lsp, query

    def forward(self, x: Tensor, state: tuple[Any, Tensor] | None = None) -> Tensor:
        """Return `x` plus what it attends to."""
        lsp, query = self.attend(x) if state is None else state
        coa = getattr(self.layer, "coa", self.layer)
        return _added(x, coa.res_scale, _attended(lsp, self.given, query, _unit(query), _rows(coa.value(x))))


def _collaborative(twin: Any, given: Given, x: Tensor) -> Tensor:
    state = None if given.provider is None else _Dense(given.provider, given).attend(x.detach())
    return _Dense(twin, given)(x, state)


def _stack(twin: Stack, given: Given, x: Tensor) -> Tensor:
    twin.layers = nn.ModuleList(_Dense(layer, given) for layer in twin.layers)
    return twin.forward(x)


def _lcoan(twin: LCoAN, given: Given, x: Tensor) -> Tensor:
    for group in cast(Any, twin.body):
        group.attention = _Dense(group.attention, given)
    return twin(x)


def _nlsa(twin: Any, given: Given, x: Tensor) -> Tensor:
    query = _rows(twin.embed(x))
    rounds = twin.rotations.shape[0]
    return _added(x, twin.res_scale, _attended(twin, given, query, _unit(query), _rows(twin.value(x)), rounds=rounds))


def _dense(twin: Any, given: Given, x: Tensor) -> Tensor:
    query = _rows(twin.embed(x))
    return _added(x, twin.res_scale, dense.dense_attention(query, _unit(query), _rows(twin.value(x))))


def _hspa(twin: HSPA, given: Given, x: Tensor) -> Tensor:
    query = _rows(twin.embed(x))
    attended = sparsemax.sparsemax_attention(query, _unit(query), _rows(twin.value(x)), scale=twin.scale)
    return _added(x, twin.res_scale, attended)


def _enla(twin: ENLA, given: Given, x: Tensor) -> Tensor:
    length = math.sqrt(twin.amplification)
    query, key = (length * _unit(_rows(conv(x))) for conv in (twin.query, twin.key))
    return _added(x, twin.res_scale, kernel.kernel_attention(query, key, _rows(twin.value(x)), twin.directions))


def _category(twin: CategoryAttention, given: Given, x: Tensor) -> Tensor:
    query, key, value = _rows(twin.query(x)), _unit(_rows(twin.key(x))), _rows(twin.value(x))
    within = _attended(twin, given, query, key, value)
    categories = _unit(twin.centroids).expand(len(x), -1, -1)
    among = dense.dense_attention(query, categories, categories @ twin.category_value.weight.T)
    branch: Tensor = twin.output((within + among).mT.reshape(x.shape))
    return x + twin.res_scale * branch


def _normalised(layer: Any, x: Tensor) -> Tensor:
    norm = layer.norm
    return F.batch_norm(
        layer.conv(x), norm.running_mean, norm.running_var, norm.weight, norm.bias, training=False, eps=norm.eps
    )


def _windows(
    query: Tensor, value: Tensor, window_sizes: tuple[int, ...], shift_windows: bool, exact: bool = True
) -> Tensor:
    widths = group_widths(query.shape[1], len(window_sizes))
    attended = []
    for q, v, size in zip(query.split(widths, dim=1), value.split(widths, dim=1), window_sizes, strict=True):
        moved, back = window_shifts(size, shift_windows, exact)
        attended.append(window.window_attention(q, q, v, window_size=size, shift=moved, unshift=back))
    return torch.cat(attended, dim=1)


def _gmsa(twin: GMSA, given: Given, x: Tensor) -> Tensor:
    query, value = _normalised(twin.query, x), _normalised(twin.shared.value, x)
    attended = _windows(query, value, twin.window_sizes, twin.shift, twin.exact_shift)
    branch: Tensor = twin.shared.output(attended)
    return x + twin.shared.res_scale * branch


def _shared_gmsa(twin: SharedGMSA, given: Given, x: Tensor) -> Tensor:
    gmsa = given.provider
    query = _normalised(gmsa.query, x.detach())
    attended = _windows(query, _normalised(twin.value, x), gmsa.window_sizes, gmsa.shift, gmsa.exact_shift)
    branch: Tensor = twin.output(attended)
    return x + twin.res_scale * branch


def _plain_groups(gmsa: standins.PlainGMSA, x: Tensor) -> tuple[Tensor, Tensor]:
    groups = gmsa.project(x).split([2 * width for width in gmsa.widths], dim=1)
    query, value = zip(*(group.chunk(2, dim=1) for group in groups), strict=True)
    return torch.cat(query, dim=1), torch.cat(value, dim=1)


def _plain_gmsa(twin: standins.PlainGMSA, given: Given, x: Tensor) -> Tensor:
    attended = _windows(*_plain_groups(twin, x), twin.window_sizes, twin.shift)
    branch: Tensor = twin.output(attended)
    return x + twin.res_scale * branch


def _plain_shared_gmsa(twin: standins.PlainSharedGMSA, given: Given, x: Tensor) -> Tensor:
    query, _ = _plain_groups(given.provider, x.detach())
    attended = _windows(query, twin.project(x), twin.window_sizes, twin.shift)
    branch: Tensor = twin.output(attended)
    return x + twin.res_scale * branch


def _shift_conv(twin: ShiftConv2d, given: Given, x: Tensor) -> Tensor:
    return shift.shift_conv2d(x, twin.weight, twin.bias)


def _plain_shift_conv(twin: standins.PlainShiftConv2d, given: Given, x: Tensor) -> Tensor:
    return shift.shift_conv2d(x, twin.conv.weight, twin.conv.bias)


def _elan(twin: ELAN, given: Given, x: Tensor) -> Tensor:
    return standins.PlainELAN(twin).to(x.dtype).eval()(x)


def _plain_elan(twin: standins.PlainELAN, given: Given, x: Tensor) -> Tensor:
    return twin(x)  # ours, next to it in the table, is held against it


TWINS: dict[type, Callable[[Any, Given, Tensor], Tensor]] = {
    LCoA: _collaborative,
    CoA: _collaborative,
    NLSA: _nlsa,
    NLA: _dense,
    HSPA: _hspa,
    ENLA: _enla,
    CategoryAttention: _category,
    GMSA: _gmsa,
    SharedGMSA: _shared_gmsa,
    ShiftConv2d: _shift_conv,
    Stack: _stack,
    LCoAN: _lcoan,
    ELAN: _elan,
    standins.PlainELAN: _plain_elan,
    standins.DenseSDPA: _dense,
    standins.PlainLCoA: _collaborative,
    standins.PlainCoA: _collaborative,
    standins.PlainNLSA: _nlsa,
    standins.PlainGMSA: _plain_gmsa,
    standins.PlainSharedGMSA: _plain_shared_gmsa,
    standins.PlainShiftConv2d: _plain_shift_conv,
}
"""What each type of layer should return."""


# --- the comparison ---------------------------------------------------------------------------------------------------


def check(
    module: nn.Module,
    provider: nn.Module | None,
    call: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    backward: bool,
    allowed: float = 0.0,
) -> Check:
    """Compare what a layer returns, and its gradients, with what it should return; in evaluation mode.

    Args:
        module: the layer, whose type says what it should do.
        provider: of its state; `None` for a layer that stands alone.
        call: from the map to the output, as it will be timed.
        x: the map, in the dtype that is timed.
        backward: whether gradients of the map and of all parameters are compared, too.
        allowed: error that the layer may have beyond that of the precision of `x`.

    Returns:
        "not checked" for a type that nobody knows here.
    """
    twin_of = TWINS.get(type(module))
    if twin_of is None or not _one_pattern(module):
        return Check("not checked", reason="no reference is known for it")
    modules = [m for m in (module, provider) if m is not None]
    with _evaluating(modules):
        x = x.detach().requires_grad_(backward)
        with torch.no_grad():
            where = assignment(module, provider, x)
        actual = call(x)
        twin, twin_provider = (copy.deepcopy(m).to("cpu", torch.float64) if m else None for m in (module, provider))
        x64 = x.detach().to("cpu", torch.float64).requires_grad_(backward)
        given = Given(twin_provider, None if where is None else where.cpu())
        with torch.no_grad():
            gap = misplaced(twin, given, x64)
        with torch.set_grad_enabled(backward):
            expected = twin_of(twin, given, x64)
    allowed = max(allowed, ALLOWED[x.dtype])
    if actual.shape != expected.shape:
        return Check("wrong", reason=f"its shape is {tuple(actual.shape)}, not {tuple(expected.shape)}")
    if gap > allowed:
        return Check("wrong", gap, allowed, "tokens are in clusters that are not the nearest")
    errors = {"output": _error(actual, expected, x64)}
    if backward:
        probe = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        both = [
            (actual, [x, *_trained(module)], probe.to(actual.device, actual.dtype)),
            (expected, [x64, *_trained(twin)], probe),
        ]
        mine, others = (
            torch.autograd.grad(output, inputs, seed, materialize_grads=True) for output, inputs, seed in both
        )
        errors["gradient of the map"] = _error(mine[0], others[0], probe)
        if len(mine) > 1:
            ours, theirs = (torch.cat([grad.flatten() for grad in grads[1:]]) for grads in (mine, others))
            errors["gradient of parameters"] = _error(ours, theirs, torch.zeros_like(theirs))
    worst = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
    if errors[worst] <= allowed:
        return Check("correct", errors[worst], allowed)
    return Check("wrong", errors[worst], allowed, f"its {worst} is not what the reference returns")


def _one_pattern(module: nn.Module) -> bool:
    """Return whether all attention of a stack or a network reads the state of its first layer."""
    if isinstance(module, LCoAN):
        first, *others = (group.attention for group in cast(Any, module.body))
    elif isinstance(module, Stack):
        first, *others = module.layers
    else:
        return True
    return isinstance(first, LCoA | standins.PlainLCoA) and all(isinstance(o, CoA | standins.PlainCoA) for o in others)


def _trained(module: nn.Module | None) -> list[nn.Parameter]:
    """Return the parameters whose gradients are compared; of ELAN, whose twin has copies, none."""
    if module is None or isinstance(module, ELAN | standins.PlainELAN):
        return []
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _error(actual: Tensor, expected: Tensor, residual: Tensor) -> float:
    """Return the error as a fraction of what attention adds to the residual, or of an image of another size.

    What the last rounding to the precision of `actual` takes from a perfect result is no error.
    """
    expected = expected.detach()
    rounding = (expected.to(actual.dtype).double() - expected).norm().item()
    actual = actual.detach().cpu().double()
    scale = expected.norm().item()
    if residual.shape == expected.shape:
        scale = min(scale, (expected - residual.detach()).norm().item())
    distance = (actual - expected).norm().item()
    return distance if math.isnan(distance) else max(0.0, distance - rounding) / max(scale, 1e-30)


@contextmanager
def _evaluating(modules: list[nn.Module]) -> Iterator[None]:
    """Let modules evaluate, and hash by the hashes that they have."""
    before = [(m, m.training, getattr(m, "redraw", None)) for m in modules]
    for m in modules:
        m.eval()
        if isinstance(m, standins.PlainNLSA):
            m.redraw = False
    try:
        yield
    finally:
        for m, training, redraw in before:
            m.train(training)
            if isinstance(m, standins.PlainNLSA):
                m.redraw = bool(redraw)
