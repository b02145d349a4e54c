"""Tools for tests, included so that third-party layers can be checked against the same contract. Needs hypothesis."""

import importlib
from types import ModuleType

__all__ = ["conformance", "strategies", "tolerances"]


def __getattr__(name: str) -> ModuleType:
    """Import a module on first use: only some need hypothesis."""
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
