"""What a run is asked to measure."""

from dataclasses import dataclass
from typing import Literal

import torch

from sparse_sr_attn.blocks.upsample import Upscale
from sparse_sr_attn.config import NonNegative, Positive, PositiveInt

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
"""Precisions by name."""

Pass = Literal["forward", "forward+backward"]
"""What is timed: inference without gradients, or a step of training but for the optimiser."""

DEFAULT_LAYERS = (
    *(
        "LCoA",
        "CoA",
        "CoA-bf16",
        "GMSA",
        "SharedGMSA",
        "ShiftConv2d",
        "NLSA",
        "ENLA",
        "HSPA",
        "CategoryAttention",
        "SDPA",
    ),
    *("plain-NLSA", "plain-LCoA", "plain-CoA", "plain-GMSA", "plain-SharedGMSA", "plain-ShiftConv2d"),
)
DEFAULT_NETWORKS = ("LCoAN-light", "plain-LCoAN-light", "plain-NLSA-LCoAN-light", "ELAN-light", "plain-ELAN-light")


@dataclass(frozen=True)
class Settings:
    """One run. All methods are equal in width.

    Attributes:
        what: whether methods are layers or networks.
        methods: their names.
        peers: code from outside (`benchmarks.speed.peers`).
        sizes: sides of the square maps, or of the images that networks are given.
        embed_dim: channels of maps.
        batch: maps.
        passes: what is timed.
        device: where.
        dtype: name of the precision of weights and maps.
        threads: that torch may use on the CPU.
        channels_last: whether maps have their channels next to each other in memory.
        chunk_size: of LCoA, CoA and their stand-ins; the others keep their published ones.
        num_clusters: the same.
        reduction: the same.
        upscale: factor of networks.
        rounds: samples of each method.
        limit: seconds; a method whose call takes longer takes no part at this size and larger ones.
        shortest: seconds of a sample at least; faster calls are repeated.
        compile: whether ours are measured compiled by `torch.compile`, too.
        validity: whether stand-ins are held against their authors' figures.
    """

    what: Literal["layers", "networks"] = "layers"
    methods: tuple[str, ...] = DEFAULT_LAYERS
    peers: tuple[str, ...] = ()
    sizes: tuple[PositiveInt, ...] = (48, 96, 128, 256)
    embed_dim: PositiveInt = 64
    batch: PositiveInt = 1
    passes: tuple[Pass, ...] = ("forward",)
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    threads: PositiveInt = 1
    channels_last: bool = False
    chunk_size: PositiveInt = 144
    num_clusters: PositiveInt = 128
    reduction: PositiveInt = 4
    upscale: Upscale = 4
    rounds: PositiveInt = 9
    limit: Positive = 10.0
    shortest: NonNegative = 0.02
    compile: bool = False
    validity: bool = True

    @property
    def query_dim(self) -> int:
        """Length of queries and keys of LCoA."""
        return max(1, self.embed_dim // self.reduction)
