"""Use a trained network: whole images in tiles, ONNX, CUDA graphs, and what its attention looks at."""

from sparse_sr_attn.inference.tiling import upscale_tiled

__all__ = ["upscale_tiled"]
