"""Tools for tests, included so that third-party layers can be checked against the same contract. Needs hypothesis."""

from sparse_sr_attn.testing import conformance, strategies, tolerances

__all__ = ["conformance", "strategies", "tolerances"]
