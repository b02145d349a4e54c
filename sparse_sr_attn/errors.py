"""The errors of the library.

Each message says the rule, the values given and the nearest thing that works.
"""

from collections.abc import Iterable
from dataclasses import dataclass


class SparseSRError(Exception):
    """Root of all errors raised on purpose by this library."""


class ShapeError(SparseSRError, ValueError):
    """A tensor, or a state shared between layers, has the wrong size."""


class SharingError(SparseSRError, ValueError):
    """A layer that reads a shared state was given none, or one of another type."""


class BackendError(SparseSRError, ValueError):
    """A backend of an operation was asked for by name and cannot run there."""


FormError = BackendError
"""The old name of `BackendError`."""


class UnknownNameError(SparseSRError, KeyError):
    """A name is not in the registry."""

    def __str__(self) -> str:
        """Return the message itself; `KeyError` would quote it."""
        return str(self.args[0])


class DuplicateNameError(SparseSRError, ValueError):
    """A name is in the registry already."""


class CheckpointError(SparseSRError):
    """Weights cannot be read or do not fit."""


class ImageError(SparseSRError):
    """An image cannot be read, upscaled or written."""


class ExportError(SparseSRError):
    """A network cannot be exported, or what was exported is not the same network."""


class TrainingError(SparseSRError):
    """Training cannot go on; nothing that was learnt is lost."""


class ProcessError(TrainingError):
    """Another process of distributed training ended, or no longer takes part."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with an option: where it stands, and the rule it breaks."""

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


class ConfigError(SparseSRError, ValueError):
    """Options are wrong. All problems are reported at once.

    Attributes:
        problems: each problem with its path (`network_g.attention.chunk_size`).
    """

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def under(self, prefix: str) -> "ConfigError":
        """Return the same problems with `prefix` put before each path."""
        return ConfigError(Problem(f"{prefix}.{p.path}" if p.path else prefix, p.message) for p in self.problems)
