"""Tolerances for comparing two results, in one place.

In float64 they agree up to rounding. In lower precisions there is no right fixed number: the error of an operation may
be at most a given multiple of that of plain dense attention in the same precision, against the same float64 reference.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_sr_attn.testing.conformance.training import assert_bit_equal, rms

__all__ = ["assert_bit_equal", "rms"]

FLOAT64_VALUES = 1e-10
FLOAT64_GRADIENTS = 1e-9


@dataclass(frozen=True)
class Budget:
    """The error allowed in a low precision, as a multiple of that of dense attention."""

    values: float = 2.0
    gradients: float = 3.0


LOW_PRECISION = Budget()


def assert_values_close(actual: Tensor, expected: Tensor) -> None:
    """Require float64 results to agree to `FLOAT64_VALUES`, relative and absolute."""
    torch.testing.assert_close(actual, expected, rtol=FLOAT64_VALUES, atol=FLOAT64_VALUES)


def assert_gradients_close(actual: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> None:
    """Require float64 gradients to agree to `FLOAT64_GRADIENTS`; None (an unused input) counts as zero."""
    assert len(actual) == len(expected), f"{len(actual)} gradients against {len(expected)}"
    for mine, other in zip(actual, expected, strict=True):
        if mine is None or other is None:
            present = mine if mine is not None else other
            assert present is None or not present.any(), "a gradient is missing"
        else:
            torch.testing.assert_close(mine, other, rtol=FLOAT64_GRADIENTS, atol=FLOAT64_GRADIENTS)


def gradients(output: Tensor, inputs: Sequence[Tensor], probe: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of `sum(output * probe)` in `inputs`, keeping the graph; zero where an input is unused."""
    loss = (output * probe.to(output.dtype)).sum()
    return torch.autograd.grad(loss, tuple(inputs), retain_graph=True, materialize_grads=True)


def assert_no_worse(actual: Tensor, peer: Tensor, oracle: Tensor, *, factor: float) -> None:
    """Require the error of `actual` against `oracle` to be at most `factor` times that of `peer` (root mean squares).

    One last rounding of a perfect result to the precision of `actual` is always allowed.
    """
    error, allowed = rms(actual.double() - oracle), factor * rms(peer.double() - oracle)
    rounding = rms(oracle.to(actual.dtype).double() - oracle)
    assert error <= allowed + rounding, f"error {error:.3g}, but {factor:g} x dense's own is {allowed:.3g}"
