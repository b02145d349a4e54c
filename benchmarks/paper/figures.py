"""The figures and ablations of the two papers, and one of ours: which networks are compared, and what that can show."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch

from benchmarks.paper.pictures import Pair, as_input
from benchmarks.paper.training import Budget, Variant
from benchmarks.paper.variants import with_plain_convolutions, with_standard_attention, without_attention
from sparse_sr_attn.backbones import EDSR, ELAN, LCoAN
from sparse_sr_attn.backbones.base import Network
from sparse_sr_attn.inference.visualize import attention_overlap, attention_states
from sparse_sr_attn.models import PRESETS

WHOLE = 10**9
"""A chunk that holds all tokens of any map: then cluster attention is dense attention."""

LIGHT_EDSR: Mapping[str, Any] = {"num_feat": 48, "num_block": 10, "res_scale": 1, "img_range": 1.0}
"""Options of an EDSR with about as many parameters as LCoAN-light."""

LIGHT_LCOA: Mapping[str, Any] = {
    name: value for name, value in PRESETS["EDSR-LCoA"].options["attention"].items() if name != "res_scale"
}
"""The attention of the preset EDSR-LCoA with the default `res_scale`: it starts as the identity."""

_LOOKS = 3
_LOOK_SIDE = 32


@dataclass(frozen=True)
class Scale:
    """How large networks are and how long they are trained.

    Attributes:
        budget: of training.
        width: channels of the EDSR that attention is put into.
        blocks: of it.
        every: attention stands after every so many.
        clusters: of LCoA.
        chunk: tokens that attend to each other, in LCoA and NLSA.
        all_clusters: numbers of clusters that are compared.
        all_chunks: lengths of chunks that are compared.
        elan_width: channels of ELAN.
        elan_pairs: pairs of LFE and attention in ELAN, with any sharing.
        elan_shares: numbers of attentions with one set of weights that are compared.
        cost_side: side of the images on which time and memory are measured.
        sides: the same, where growth is looked at.
        step_sides: the same, for a step of training.
        stack: layers of attention where growth is looked at.
    """

    budget: Budget
    width: int
    blocks: int
    every: int
    clusters: int
    chunk: int
    all_clusters: tuple[int, ...]
    all_chunks: tuple[int, ...]
    elan_width: int
    elan_pairs: int
    elan_shares: tuple[int, ...]
    cost_side: int
    sides: tuple[int, ...]
    step_sides: tuple[int, ...]
    stack: int = 10

    @property
    def sites(self) -> int:
        """Layers of attention in the EDSR."""
        return self.blocks // self.every


SMALL = Scale(
    budget=Budget(iterations=500, batch=2, patch=32, learning_rate=2e-3),
    width=24,
    blocks=4,
    every=2,
    clusters=32,
    chunk=64,
    all_clusters=(1, 8, 32, 128),
    all_chunks=(16, 32, 64, 128),
    elan_width=24,
    elan_pairs=4,
    elan_shares=(1, 2, 4),
    cost_side=64,
    sides=(32, 48, 64, 96, 128),
    step_sides=(24, 32, 48, 64),
)
"""For two cores: some minutes a figure."""

FULL = Scale(
    budget=Budget(iterations=100_000, batch=16, patch=48, learning_rate=2e-4, warmup=0.0, crop=128),
    width=64,
    blocks=16,
    every=4,
    clusters=128,
    chunk=144,
    all_clusters=(16, 32, 64, 128, 256),
    all_chunks=(48, 96, 144, 192, 384),
    elan_width=60,
    elan_pairs=24,
    elan_shares=(1, 2, 3, 4),
    cost_side=128,
    sides=(48, 64, 96, 128, 192, 256),
    step_sides=(48, 64, 96, 128),
)
"""For a GPU: widths and patches of the light networks of papers, about an hour a network and seed."""

SCALES: Mapping[str, Scale] = {"small": SMALL, "full": FULL}


@dataclass(frozen=True)
class Figure:
    """One comparison.

    Attributes:
        title: what is compared.
        question: what the paper asks, and with which figure or table.
        variants: what is compared, by the name that tables give it.
        baseline: the variant that differences refer to.
        caution: what this figure cannot show here.
        kind: what is drawn: quality with cost; growth of the cost of bodies with the map, without training; overlap of
            attention.
        channels: of the maps that bodies are given.
    """

    title: str
    question: str
    variants: Mapping[str, Variant]
    baseline: str
    caution: str = ""
    kind: Literal["quality", "growth", "overlap"] = "quality"
    channels: int = FULL.width


def lcoa_2(scale: Scale) -> Figure:
    """Memory and time with and without LSP and CoA."""
    options = {"num_feat": FULL.width, "num_block": scale.stack, "img_range": 1.0}
    dense = {"type": "LCoA", "num_clusters": 1, "chunk_size": WHOLE, "reuse": "weights"}
    sparse = {"type": "LCoA", "num_clusters": FULL.clusters, "chunk_size": FULL.chunk, "reuse": "weights"}

    def network(attention: Mapping[str, Any] | None, **more: Any) -> Variant:
        return Variant(EDSR, {**options, "attention": attention and {**attention, "every": 1, **more}})

    return Figure(
        "Memory and time, with and without LSP and CoA",
        "LCoA's figure 2: what does the learnt sparse pattern (LSP) save, what does reusing its weights in later "
        "layers (CoA) save, and how do the costs grow with the image?",
        {
            "no attention": network(None),
            "neither: dense, in every layer": network({"type": "NLA"}),
            "CoA alone: dense, weights reused": network(dense, share=scale.stack),
            "LSP alone: sparse, in every layer": network(sparse),
            "LSP and CoA": network(sparse, share=scale.stack),
        },
        "no attention",
        f"The body of an EDSR of {scale.stack} blocks and {FULL.width} channels with attention after every block, on "
        f"feature maps; {FULL.clusters} clusters, chunks of {FULL.chunk}. Dense attention uses fused kernels, which "
        "store no weights; CoA alone must store them. The paper's own figures are from its authors' code on a GPU.",
        "growth",
    )


def lcoa_3(scale: Scale) -> Figure:
    """K-means against hashing, and attention layers against each other."""
    ours = _lcoa(scale)
    return Figure(
        "k-means against LSH, and attentions in quality and cost",
        "LCoA's figure 3: are learnt clusters better than those of a hash, and what do other attention layers gain "
        "and cost in the same network?",
        {
            "no attention": _edsr(scale, None),
            "NLA (dense)": _edsr(scale, {"type": "NLA"}),
            "NLSA (LSH, 4 rounds)": _edsr(scale, {"type": "NLSA", "chunk_size": scale.chunk}),
            "ENLA (random features)": _edsr(scale, {"type": "ENLA"}),
            "LCoA, LSH": _edsr(scale, {**ours, "routing": "lsh"}),
            "LCoA, k-means": _edsr(scale, ours),
            "LCoA, k-means, nobody shares": _edsr(scale, {**ours, "share": 1}),
        },
        "no attention",
    )


def lcoa_4(scale: Scale) -> Figure:
    """Numbers of clusters, and sizes of chunks."""
    ours = _lcoa(scale)
    clusters = {
        f"{number} cluster{'s' * (number > 1)}, chunks of {scale.chunk}": _edsr(scale, {**ours, "num_clusters": number})
        for number in scale.all_clusters
    }
    chunks = {
        f"{scale.clusters} clusters, chunks of {length}": _edsr(scale, {**ours, "chunk_size": length})
        for length in scale.all_chunks
    }
    return Figure(
        "Number of clusters, and size of chunks",
        "LCoA's figure 4: how many clusters, and how many tokens per chunk?",
        {**clusters, **chunks},
        f"{scale.clusters} clusters, chunks of {scale.chunk}",
    )


def lcoa_5(scale: Scale) -> Figure:
    """Overlap of shallow and deep attention maps."""
    dense = {"type": "LCoA", "num_clusters": 1, "chunk_size": WHOLE, "every": 1, "res_scale": 1.0}
    trained = replace(_edsr(scale, dense), look=overlap)
    return Figure(
        "Overlap of shallow and deep attention",
        "LCoA's figure 5: do deep layers attend where shallow ones do? If so, later layers can reuse the weights of "
        "the first.",
        {"dense attention after every block": trained},
        "dense attention after every block",
        "Here every layer learns its own attention, without sharing. The last column is the overlap with the attention "
        "on another image: what two unrelated maps have in common.",
        "overlap",
    )


def elan_lfe(scale: Scale) -> Figure:
    """Shift convolutions against ordinary ones."""
    return Figure(
        "Shift-conv against 1×1 and 3×3",
        "ELAN's ablation of local feature extraction: is a shift convolution as good as a 3×3 convolution, at the cost "
        "of a 1×1 convolution?",
        {
            "1×1": replace(_elan(scale), changes=partial(with_plain_convolutions, kernel_size=1)),
            "shift-conv": _elan(scale),
            "3×3": replace(_elan(scale), changes=partial(with_plain_convolutions, kernel_size=3)),
        },
        "1×1",
    )


def elan_windows(scale: Scale) -> Figure:
    """Sizes of windows."""
    sizes = [(4,), (8,), (16,), (4, 8), (8, 16), (4, 8, 16)]
    return Figure(
        "Window sizes",
        "ELAN's ablation of group-wise multi-scale attention: one window size for all channels, or several?",
        {" ".join(map(str, some)): _elan(scale, window_sizes=some) for some in sizes},
        "8",
    )


def elan_share(scale: Scale) -> Figure:
    """How many attention layers share one set of weights."""
    return Figure(
        "Number of sharing blocks",
        "ELAN's ablation of shared attention: how many attention layers can use one set of weights? All networks have "
        f"{scale.elan_pairs} pairs of LFE and attention.",
        {
            f"{share} of {scale.elan_pairs} share" if share > 1 else "nobody shares": _elan(scale, share=share)
            for share in scale.elan_shares
        },
        "nobody shares",
    )


def elan_asa(scale: Scale) -> Figure:
    """Accelerated self-attention, step by step."""
    alone = _elan(scale, share=1)
    return Figure(
        "Accelerated self-attention, step by step",
        "ELAN's ablation of its attention: from three projections with layer normalisation, to batch normalisation, to "
        "a query that is its own key, to weights that several layers share.",
        {
            "standard": replace(alone, changes=partial(with_standard_attention, norm="layer")),
            "batch instead of layer normalisation": replace(
                alone, changes=partial(with_standard_attention, norm="batch")
            ),
            "query is key, no scaling": alone,
            "2 share: accelerated": _elan(scale, share=2),
        },
        "standard",
        "Windows and groups are the same in all. The standard attention here has neither SwinIR's position bias nor "
        "its mask at shifted borders.",
    )


def light(scale: Scale) -> Figure:
    """The light networks with and without their attention."""
    lcoan, elan = (
        Variant(network, PRESETS[name].options) for network, name in ((LCoAN, "LCoAN-light"), (ELAN, "ELAN-light"))
    )
    return Figure(
        "The light networks with and without their attention",
        "An ablation of the networks whose trained weights come with the library: what does their attention "
        "contribute, and what the rest of the network?",
        {
            "EDSR": Variant(EDSR, LIGHT_EDSR),
            "EDSR with LCoA": Variant(EDSR, {**LIGHT_EDSR, "attention": LIGHT_LCOA}),
            "LCoAN-light": lcoan,
            "LCoAN-light without attention": replace(lcoan, changes=without_attention),
            "ELAN-light": elan,
            "ELAN-light without attention": replace(elan, changes=without_attention),
        },
        "EDSR",
        "The networks have the same sizes with both budgets; the EDSR has 10 blocks of 48 channels.",
    )


FIGURES: Mapping[str, Callable[[Scale], Figure]] = {
    "lcoa-2": lcoa_2,
    "lcoa-3": lcoa_3,
    "lcoa-4": lcoa_4,
    "lcoa-5": lcoa_5,
    "elan-lfe": elan_lfe,
    "elan-windows": elan_windows,
    "elan-share": elan_share,
    "elan-asa": elan_asa,
    "light": light,
}
"""By the name that the command line gives them."""


def overlap(model: Network, pairs: Sequence[Pair]) -> dict[str, Any]:
    """Return how much of their attention the layers of a network have in common, in the middle of some pictures.

    Args:
        model: a network with layers that have a state.
        pairs: of which the first few are looked at.

    Returns:
        `same`: the mean of `attention_overlap` over pictures; `other`: the same, of each layer on one picture with each
        layer on the next.
    """
    device = next(model.parameters()).device
    states = []
    for pair in pairs[:_LOOKS]:
        top, left = (max(0, (size - _LOOK_SIDE) // 2) for size in pair.low.shape[:2])
        low = pair.low[top : top + _LOOK_SIDE, left : left + _LOOK_SIDE]
        states.append(list(attention_states(model, as_input(low)[None].to(device)).values()))
    num_layers = len(states[0])
    same = torch.stack([attention_overlap(some) for some in states]).mean(dim=0)
    crossed = [
        attention_overlap([*some, *others])[:num_layers, num_layers:]
        for some, others in zip(states, [*states[1:], states[0]], strict=True)
    ]
    return {"same": same.tolist(), "other": torch.stack(crossed).mean(dim=0).tolist()}


def _edsr(scale: Scale, attention: Mapping[str, Any] | None) -> Variant:
    options: dict[str, Any] = {"num_feat": scale.width, "num_block": scale.blocks, "img_range": 1.0}
    if attention is not None:
        options["attention"] = {"every": scale.every, "res_scale": 1.0, **attention}
    return Variant(EDSR, options)


def _lcoa(scale: Scale) -> dict[str, Any]:
    return {
        "type": "LCoA",
        "share": scale.sites,
        "num_clusters": scale.clusters,
        "chunk_size": scale.chunk,
        "ema_decay": 0.99,
    }


def _elan(scale: Scale, *, share: int = 2, window_sizes: Sequence[int] = (4, 8, 16)) -> Variant:
    options = {"num_feat": scale.elan_width, "num_block": scale.elan_pairs // share, "share": share}
    return Variant(ELAN, {**options, "window_sizes": list(window_sizes)})
