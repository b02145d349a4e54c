"""The errors of the library.

Each message states the rule, the value given and what would work.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass


class SparseSRError(Exception):
    """Base class of all errors that this library raises."""


class ShapeError(SparseSRError, ValueError):
    """A tensor, or a state shared between layers, has the wrong size."""


class SharingError(SparseSRError, ValueError):
    """A layer that requires a shared state got none, or one of another type."""


class BackendError(SparseSRError, ValueError):
    """A backend was requested by name and cannot run here."""


FormError = BackendError
"""The old name of `BackendError`."""


class UnknownNameError(SparseSRError, KeyError):
    """A name is not in the registry."""

    def __str__(self) -> str:
        """Return the message without the quotes that `KeyError` adds."""
        return str(self.args[0])


class DuplicateNameError(SparseSRError, ValueError):
    """A name is already in the registry."""


class CheckpointError(SparseSRError):
    """Weights cannot be read or do not fit the network."""


class ImageError(SparseSRError):
    """An image cannot be read, upscaled or written."""


class ExportError(SparseSRError):
    """A network cannot be exported, or the export gives other results."""


class TrainingError(SparseSRError):
    """Training cannot continue; no progress is lost."""


class ProcessError(TrainingError):
    """Another process of distributed training ended or stopped taking part."""


@dataclass(frozen=True)
class Problem:
    """A problem with one option: its path, and the rule that it breaks."""

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


class ConfigError(SparseSRError, ValueError):
    """Options are invalid. All problems are reported together.

    Attributes:
        problems: each problem with its path (`network_g.attention.chunk_size`).
    """

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    @classmethod
    def at(cls, path: str, message: str) -> "ConfigError":
        """Return an error with one problem."""
        return cls([Problem(path, message)])

    def under(self, prefix: str) -> "ConfigError":
        """Return the same problems with `prefix` prepended to each path."""
        return ConfigError(Problem(f"{prefix}.{p.path}" if p.path else prefix, p.message) for p in self.problems)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, without the codes that colour it in a terminal."""
    return re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", str(error)).strip().partition("\n")[0]
