"""The contract of attention layers, clause by clause, for your own layer or a registry of layers.

    from sparse_sr_attn.testing import conformance

    def test_my_layer():
        conformance.check_layer(MyLayer)

    @pytest.mark.parametrize(("subject", "clause"), conformance.matrix(LAYERS), ids=str)
    def test_contract(subject, clause):
        clause.check(subject, torch.device("cpu"))

A layer is built with small options (those of `SMALL` in its signature, unless you pass your own), and a consumer or
provider is combined with the first matching partner in the registry.
"""

import inspect
import itertools
import traceback
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from sparse_sr_attn.layers import LAYERS
from sparse_sr_attn.registry import Registry
from sparse_sr_attn.testing.conformance import clauses, compiled
from sparse_sr_attn.testing.conformance.clause import CLAUSES, Clause
from sparse_sr_attn.testing.conformance.compiled import check_export_with_dynamic_sizes
from sparse_sr_attn.testing.conformance.subject import CHANNELS, SMALL, Chain, Subject, feature_map, subjects

__all__ = [
    "CHANNELS",
    "CLAUSES",
    "SMALL",
    "Chain",
    "Clause",
    "Subject",
    "check_export_with_dynamic_sizes",
    "check_layer",
    "clauses",
    "compiled",
    "feature_map",
    "matrix",
    "subjects",
]


def matrix(registry: Registry[nn.Module]) -> list[tuple[Subject, Clause]]:
    """Return every layer with every clause that applies to it."""
    everyone = subjects(registry)
    return [(subject, clause) for clause in CLAUSES for subject in everyone if clause.applies(subject)]


def check_layer(
    build: Callable[..., nn.Module],
    *,
    kind: str | None = None,
    partner: Callable[..., nn.Module] | None = None,
    device: torch.device | str = "cpu",
    slow: bool = False,
    leave_out: Collection[str] = (),
    **options: object,
) -> None:
    """Check your own layer, registered or not, against the whole contract.

    Args:
        build: the layer, called as `build(embed_dim, **options)`.
        kind: layer, consumer, provider or operator. Default: that under which `build` is registered; of a class that is
            not, consumer if it only `requires` a state, else layer.
        partner: for a consumer, a layer that provides its state; for a provider, a consumer.
        device: device to check on.
        slow: whether to include the slow clauses, which take minutes with a compiler.
        leave_out: names of clauses to skip.
        **options: options of the layer, in addition to the small ones (`SMALL`).

    Raises:
        AssertionError: the layer breaks clauses; names all of them with the reasons and lines of the layer.
        ValueError: a name in `leave_out` is not a clause.
        LookupError: a consumer or provider has no matching partner.
    """
    known = {clause.name for clause in CLAUSES}
    if set(leave_out) - known:
        raise ValueError(f"leave_out must name clauses, got {sorted(set(leave_out) - known)}; known: {sorted(known)}")
    registry: Registry[nn.Module] = Registry("layer")
    name = getattr(build, "__name__", repr(build))
    kind = kind or _kind_of(build)
    registry.register(name, kind=kind, source="")(build)
    if partner is not None:
        other = "consumer" if kind == "provider" else "provider" if not hasattr(partner, "provides") else "layer"
        registry.register(f"partner of {name}", kind=other, source="")(partner)
    broken = []
    wanted = [clause for clause in CLAUSES if clause.name not in leave_out and (slow or not clause.slow)]
    own = [replace(subject, options=options) for subject in subjects(registry) if subject.entry.name == name]
    for subject, clause in itertools.product(own, wanted):
        try:
            if clause.applies(subject):
                clause.check(subject, torch.device(device))
        except Exception as problem:
            reason = str(problem)[:500] or f"must hold: {inspect.getdoc(clause.check)}"
            broken.append(f"{subject}: {clause}: {type(problem).__name__}: {reason}{_place(problem, build)}")
    if broken:
        raise AssertionError("\n".join(broken))


def _kind_of(build: Callable[..., nn.Module]) -> str:
    for entry in map(LAYERS.get, LAYERS):
        if entry.build is build:
            return entry.kind
    reads = getattr(build, "requires", None) is not None and getattr(build, "provides", None) is None
    return "consumer" if reads else "layer"


def _place(problem: Exception, build: Callable[..., nn.Module]) -> str:
    """Return the last line of the layer's own file that ran, if any did."""
    try:
        file = inspect.getsourcefile(build)
    except TypeError:  # neither a class nor a function
        return ""
    lines = [frame.lineno for frame in traceback.extract_tb(problem.__traceback__) if frame.filename == file]
    return f" ({Path(file).name}:{lines[-1]})" if file and lines else ""
