"""What a clause of the contract is, and the decorator that adds one."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from sparse_sr_attn.testing.conformance.subject import Subject

Check = Callable[[Subject, torch.device], None]


@dataclass(frozen=True)
class Clause:
    """One clause of the contract.

    Attributes:
        name: name for test ids.
        check: function that raises AssertionError, or the layer's own error, if the subject breaks the clause.
        applies: function that returns whether the clause applies to a subject.
        slow: whether it takes more than a few seconds.
    """

    name: str
    check: Check
    applies: Callable[[Subject], bool]
    slow: bool = False

    def __str__(self) -> str:
        return self.name


CLAUSES: list[Clause] = []


def _everyone(_: Subject) -> bool:
    return True


def clause(applies: Callable[[Subject], bool] = _everyone, *, slow: bool = False) -> Callable[[Check], Check]:
    """Return a decorator that adds a function `check_<name>` to `CLAUSES`; see `Clause`."""

    def enter(check: Check) -> Check:
        name = check.__name__.removeprefix("check_").replace("_", " ")
        CLAUSES.append(Clause(name, check, applies, slow))
        return check

    return enter


def alone(subject: Subject) -> bool:
    """Return whether the layer is used without a state."""
    return not subject.shared


def reads_states(subject: Subject) -> bool:
    """Return whether the layer reads a state."""
    return subject.kind == "consumer" or subject.shared


def has_state(subject: Subject) -> bool:
    """Return whether the chain of the layer and its partner has a state."""
    return subject.kind in ("consumer", "provider") or subject.shared


def keeps_shape(subject: Subject) -> bool:
    """Return whether input and output have the same shape."""
    return subject.kind != "operator"
