"""Tools for tests, shipped so that layers written elsewhere can be held to the same contract. Needs hypothesis."""

from sparse_sr_attn.testing import conformance, strategies, tolerances

__all__ = ["conformance", "strategies", "tolerances"]
