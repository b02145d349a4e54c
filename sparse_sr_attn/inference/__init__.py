"""Use a trained network: tiled inference, ONNX, CUDA graphs, and visualisations of its attention."""

from sparse_sr_attn.inference.tiling import upscale_tiled

__all__ = ["upscale_tiled"]
