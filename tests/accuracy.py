"""Comparisons of operations in low precision with plain dense attention."""

from collections.abc import Callable, Sequence

from strategies import Case
from tolerances import LOW_PRECISION, Budget, assert_no_worse, gradients
from torch import Tensor


def assert_as_accurate(
    fast: Callable[..., Tensor],
    slow: Callable[..., Tensor],
    leaves: Sequence[Tensor],
    *,
    budget: Budget = LOW_PRECISION,
) -> None:
    """Require `fast` to err little more than `slow` on the same leaves, in values and gradients.

    Args:
        fast: the operation.
        slow: plain dense attention.
        leaves: their inputs in low precision, which require gradients.
        budget: how much more; errors are those against `slow` in float64.
    """
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    actual, peer, oracle = fast(*leaves), slow(*leaves), slow(*exact)
    assert actual.dtype == peer.dtype
    assert_no_worse(actual, peer, oracle, factor=budget.values)
    probe = Case().tensor("probe", *actual.shape, dtype=actual.dtype, device=actual.device)
    results = (gradients(actual, leaves, probe), gradients(peer, leaves, probe), gradients(oracle, exact, probe))
    for mine, other, true in zip(*results, strict=True):
        assert mine.dtype == other.dtype
        assert_no_worse(mine, other, true, factor=budget.gradients)
