"""Checkpoints: recognise a layout, build its network, load, convert and share weights."""

from sparse_sr_attn.checkpoints.load import load_model

__all__ = ["load_model"]
