"""The table of known layouts: how each code base names the weights of a network, and the options that shapes show."""

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparse_sr_attn.backbones.base import Network, usual_res_scale
from sparse_sr_attn.backbones.edsr import EDSR
from sparse_sr_attn.backbones.elan import ELAN
from sparse_sr_attn.backbones.lcoan import LCoAN
from sparse_sr_attn.backbones.rcan import RCAN
from sparse_sr_attn.errors import CheckpointError
from sparse_sr_attn.functional.shift import shift_kernels
from sparse_sr_attn.functional.window.grid import group_widths

State = Mapping[str, Tensor]
Options = dict[str, Any]


@dataclass(frozen=True)
class Layout:
    r"""The names that a code base gives to the weights of a network.

    In patterns of keys, `<g>` matches a number and `*` a last part such as `weight`.

    Attributes:
        name: name for messages.
        build: our network class.
        signature: pattern of keys that no other layout has.
        shapes: function that reads options from the shapes of the (renamed) weights.
        names: patterns of keys and our names for them, `None` for keys to drop. The first match counts; other keys keep
            their names.
        convert: conversion before renaming, given the caller's options.
        defaults: options that shapes do not show, from the unconverted weights and the options that shapes show; the
            constructor's defaults apply to the rest.
        required: options that the caller must give, each with the prefix of the keys that make it necessary.
        may_be_missing: regular expression of our keys that may be missing.
        inverse: inverse of `convert`, applied after renaming back.
        extra_keys: function that returns further weights that the code base expects; `None` if unknown.
    """

    name: str
    build: Callable[..., Network]
    signature: str
    shapes: Callable[[State], Options]
    names: Mapping[str, str | None] = field(default_factory=dict)
    convert: Callable[[State, Options], State] = lambda state, options: state
    defaults: Callable[[State, Options], Options] = lambda state, shapes: {}
    required: Mapping[str, str] = field(default_factory=dict)
    may_be_missing: str = "(?!)"
    inverse: Callable[[State, Network], State] = lambda state, model: state
    extra_keys: Callable[[Network], dict[str, Tensor]] | None = None

    def our_key(self, key: str) -> str | None:
        """Return our name of a key; `None` for keys to drop."""
        for pattern, ours in self.names.items():
            if found := key_pattern(pattern).fullmatch(key):
                return ours and re.sub(r"<(\w)>|\*", lambda part: found[part[1] or "rest"], ours)
        return key

    def recognises(self, state: Iterable[str]) -> bool:
        """Return whether the keys are of this layout."""
        return any(key_pattern(self.signature).fullmatch(key) for key in state)


@functools.cache
def key_pattern(pattern: str) -> re.Pattern[str]:
    """Return the regular expression of a pattern of keys, with groups `g`, ..., and `rest`."""
    return re.compile(re.sub(r"<(\w)>", r"(?P<\1>\\d+)", re.escape(pattern).replace(r"\*", r"(?P<rest>\w+)")))


def _size(state: State, key: str) -> torch.Size:
    if key not in state:
        raise CheckpointError(f"must have the key {key!r} (our name), which is missing")
    if state[key].ndim != 4 or 0 in state[key].shape:
        raise CheckpointError(f"{key} (our name) must be weights of a convolution, got {tuple(state[key].shape)}")
    return state[key].shape


def _count(state: State, pattern: str) -> int:
    """Count the different numbers at the group of `pattern` in the keys."""
    return len({found[1] for key in state if (found := re.match(pattern, key))})


def _ends(state: State) -> Options:
    """Return the options that the first and last convolutions show."""
    num_feat, num_in_ch = _size(state, "conv_first.weight")[:2]
    widths = [_size(state, key)[0] for key in state if re.fullmatch(r"upsample\.\d+\.weight", key)]
    upscales = {(4 * num_feat,) * n: 2**n for n in (1, 2, 3)} | {(9 * num_feat,): 3}
    if tuple(widths) not in upscales:
        raise CheckpointError(
            f"upsample must have one to three convolutions to 4 * num_feat channels (x2, x4, x8) or one to "
            f"9 * num_feat (x3), with num_feat {num_feat}; got {widths}"
        )
    num_out_ch = _size(state, "conv_last.weight")[0]
    upscale = upscales[tuple(widths)]
    return {"num_in_ch": num_in_ch, "num_out_ch": num_out_ch, "num_feat": num_feat, "upscale": upscale}


def _edsr(state: State) -> Options:
    return {**_ends(state), "num_block": _count(state, r"body\.(\d+)\.")}


def _rcan(state: State) -> Options:
    options = {
        **_ends(state),
        "num_group": _count(state, r"body\.(\d+)\."),
        "num_block": _count(state, r"body\.0\.residual_group\.(\d+)\."),
    }
    if any(".rcab." in key for key in state):  # its own blocks, not those of the option `block`
        squeezed = _size(state, "body.0.residual_group.0.rcab.3.attention.1.weight")[0]
        options["squeeze_factor"] = max(1, options["num_feat"] // squeezed)
    return options


def _elan(state: State) -> Options:
    num_feat, num_in_ch = _size(state, "conv_first.weight")[:2]
    width = _size(state, "body.0.lfe.0.conv1.weight")[0]
    last = _size(state, "conv_last.weight")[0]
    upscale = next((factor for factor in (2, 3, 4, 8) if last == num_in_ch * factor**2), None)
    upscale = upscale or next((factor for factor in (2, 3, 4, 8) if last % factor**2 == 0), None)
    if upscale is None:
        raise CheckpointError(f"conv_last must have channels for x2, x3, x4 or x8, got {last}")
    return {
        "num_in_ch": num_in_ch,
        "num_feat": num_feat,
        "num_block": _count(state, r"body\.(\d+)\."),
        "share": _count(state, r"body\.0\.lfe\.(\d+)\."),
        "expansion": max(1, width // num_feat),
        "upscale": upscale,
    }


def _elan_channels(state: State, shapes: Options) -> Options:
    """Return the output channels, which shapes show only as a product with the factor."""
    key = next(key for key in ("conv_last.weight", "tail.0.weight") if key in state)
    return {"num_out_ch": len(state[key]) // shapes["upscale"] ** 2}


def _released_elan(state: State, options: Options) -> State:
    """Split each projection of a provider into query and value, and drop the masked pixels of shift convolutions."""
    num_groups = len(options.get("window_sizes", (4, 8, 16)))
    converted: dict[str, Tensor] = {}
    for key, value in state.items():
        if found := re.fullmatch(r"(body\.\d+\.modules_gmsa\.gmsa_0\.project)_inp(\..+)", key):
            parts = (value, value)
            if value.ndim:
                widths = [width for group in group_widths(len(value) // 2, num_groups) for width in (group, group)]
                if sum(widths) != len(value):
                    raise CheckpointError(f"{key} must have an even number of rows, got {len(value)}")
                rows = value.split(widths)
                parts = (torch.cat(rows[::2]), torch.cat(rows[1::2]))
            for name, part in zip(("query", "value"), parts, strict=True):
                converted[f"{found[1]}_{name}{found[2]}"] = part
        elif (found := re.fullmatch(r"(.+\.shift_conv)\.w", key)) and value.ndim == 4 and value.shape[2:] == (3, 3):
            converted[f"{found[1]}.conv1x1.weight"] = (value * shift_kernels(value)).sum(dim=(2, 3), keepdim=True)
        else:
            converted[key] = value
    return converted


def _lcoan(state: State) -> Options:
    options = {
        **_ends(state),
        "num_group": _count(state, r"body\.(\d+)\."),
        "num_block": _count(state, r"body\.0\.blocks\.(\d+)\."),
    }
    query_dim = _size(state, "body.0.attention.lsp.embed.weight")[0]
    options["reduction"] = max(1, options["num_feat"] // query_dim)
    providers = sorted(
        {int(found[1]) for key in state if (found := re.match(r"body\.(\d{1,9})\.attention\.lsp\.", key))}
    )
    options["share"] = providers[1] if len(providers) > 1 else None
    options["num_rounds"] = 1 + _count(state, r"body\.0\.attention\.lsp\.further_rounds\.(\d+)\.")
    centroids = state.get("body.0.attention.lsp.centroids")
    if centroids is not None and centroids.ndim > 0:
        options["num_clusters"] = len(centroids)
    return options


def _usual_edsr(state: State, shapes: Options) -> Options:
    return {"res_scale": usual_res_scale(shapes["num_block"], shapes["num_feat"])}


def _mean_shift(state: State, img_range: float) -> Options:
    """Return the mean that a fixed first convolution, `sub_mean`, subtracts, and the range that it implies."""
    bias, weight = (
        state[key].detach().cpu().double().flatten() if key in state else None
        for key in ("sub_mean.bias", "sub_mean.weight")
    )
    if weight is not None and not torch.equal(weight, torch.eye(3).double().flatten()):
        raise CheckpointError("sub_mean.weight must be the identity; our networks divide by no standard deviation")
    if bias is None or not bias.any():
        return {"img_range": img_range}
    img_range = 255.0 if bias.abs().max() > 1 else 1.0
    return {"img_range": img_range, "rgb_mean": (-bias / img_range).tolist()}


def _joined_projections(state: State, model: Network) -> State:
    """Join query and value of each provider, group by group."""
    num_groups = len(model.body[0].attention[0].window_sizes)  # type: ignore[index,union-attr]
    joined: dict[str, Tensor] = {}
    for key, query in state.items():
        if ".project_query." in key:
            value = state[key.replace(".project_query.", ".project_value.")]
            name = key.replace(".project_query.", ".project_inp.")
            if query.ndim:
                widths = group_widths(len(query), num_groups)
                pairs = zip(query.split(widths), value.split(widths), strict=True)
                joined[name] = torch.cat([part for pair in pairs for part in pair])
            else:
                joined[name] = query
        elif ".project_value." not in key:
            joined[key] = query
    return joined


def _one_hot_kernels(model: Network) -> dict[str, Tensor]:
    """Return the fixed weights of the released ELAN: the kernels of its shifts, and its mean."""
    if model.conv_last.out_channels != 3 * model.upscale**2:  # type: ignore[union-attr]
        raise CheckpointError("this layout needs images of 3 channels, and the network has others")
    kept = _mean_convolutions(model)
    for key, weight in model.state_dict().items():
        if found := re.fullmatch(r"body\.(\d+)\.lfe\.(\d+)\.conv([12])\.weight", key):
            block, pair, turn = map(int, found.groups())
            kept[f"body.{block}.modules_lfe.lfe_{pair}.conv{turn - 1}.shift_conv.weight"] = shift_kernels(weight)[
                :, None
            ]
    return kept


def _mean_convolutions(model: Network) -> dict[str, Tensor]:
    """Return the fixed convolutions that subtract and add the mean."""
    mean = model.mean.detach().cpu().flatten() * model.img_range
    if len(mean) != 3 or model.num_in_ch != 3:
        raise CheckpointError(f"this layout needs a mean of 3 channels, and the network has {model.num_in_ch}")
    same = torch.eye(3).view(3, 3, 1, 1)
    return {
        "sub_mean.weight": same,
        "sub_mean.bias": -mean,
        "add_mean.weight": same.clone(),
        "add_mean.bias": mean,
    }


def _dead_weights(model: Network) -> dict[str, Tensor]:
    """Return the unused weights of the released LCoAN: queries and k-means of all groups but the first."""
    state = model.state_dict()
    weight, bias, means = (
        state[f"body.0.attention.lsp.{name}"] for name in ("embed.weight", "embed.bias", "centroids")
    )
    unused: dict[str, Tensor] = {"a": torch.zeros(1), **_mean_convolutions(model)}
    for group in range(_count(state, r"body\.(\d+)\.")):
        start = f"body.{group}.attention.0"
        unused[f"{start}.kmeans.initted"] = torch.tensor(1.0)
        if group:
            unused[f"{start}.conv_match.0.weight"] = torch.zeros_like(weight)
            unused[f"{start}.conv_match.0.bias"] = torch.zeros_like(bias)
            unused[f"{start}.kmeans.means"] = means[None].clone()
    return unused


_MEAN_SHIFT = {"sub_mean.*": None, "add_mean.*": None}
_HEAD_AND_TAIL = {
    **_MEAN_SHIFT,
    "head.0.*": "conv_first.*",
    "tail.0.<k>.*": "upsample.<k>.*",
    "tail.1.*": "conv_last.*",
}
LAYOUTS = (
    Layout(
        "our LCoAN",
        LCoAN,
        signature="body.<g>.blocks.<b>.conv1.*",
        shapes=_lcoan,
        required={"chunk_size": "", "res_scale": ""},
    ),
    Layout(
        "the released LCoAN",
        LCoAN,
        signature="body.<g>.local_body.<b>.body.0.*",
        shapes=_lcoan,
        names={
            **_HEAD_AND_TAIL,
            "a": None,
            "m_conv.0.*": "conv_after_body.*",
            "body.<g>.local_body.<b>.body.0.*": "body.<g>.blocks.<b>.conv1.*",
            "body.<g>.local_body.<b>.body.2.*": "body.<g>.blocks.<b>.conv2.*",
            "body.<g>.m_conv.0.*": "body.<g>.conv.*",
            "body.0.attention.0.conv_match.0.*": "body.0.attention.lsp.embed.*",
            "body.0.attention.0.conv_assembly.0.*": "body.0.attention.coa.value.*",
            "body.0.attention.0.kmeans.means": "body.0.attention.lsp.centroids",
            "body.<g>.attention.0.conv_assembly.0.*": "body.<g>.attention.value.*",
            "body.<g>.attention.0.conv_match.0.*": None,  # there, and never used
            "body.<g>.attention.0.kmeans.*": None,
        },
        defaults=lambda state, shapes: {
            **_mean_shift(state, 1.0),
            "chunk_size": 384,
            "res_scale": 0.1,
            "count_keys_once": False,
        },
        may_be_missing=r"body\.0\.attention\.lsp\.(?!embed\.|centroids$).*",
        extra_keys=_dead_weights,
    ),
    Layout(
        "our ELAN",
        ELAN,
        signature="body.<b>.lfe.<j>.conv1.*",
        shapes=_elan,
        defaults=_elan_channels,
        required={"window_sizes": ""},
    ),
    Layout(
        "the released ELAN",
        ELAN,
        signature="body.<b>.modules_gmsa.gmsa_<j>.project_inp.0.*",
        shapes=_elan,
        names={
            **_MEAN_SHIFT,
            "head.0.*": "conv_first.*",
            "tail.0.*": "conv_last.*",
            "body.<b>.modules_lfe.lfe_<j>.conv0.shift_conv.conv1x1.*": "body.<b>.lfe.<j>.conv1.*",
            "body.<b>.modules_lfe.lfe_<j>.conv1.shift_conv.conv1x1.*": "body.<b>.lfe.<j>.conv2.*",
            "body.<b>.modules_lfe.lfe_<j>.conv0.shift_conv.b": "body.<b>.lfe.<j>.conv1.bias",
            "body.<b>.modules_lfe.lfe_<j>.conv1.shift_conv.b": "body.<b>.lfe.<j>.conv2.bias",
            "body.<b>.modules_lfe.lfe_<j>.conv<k>.shift_conv.*": None,  # its one-hot kernels or its mask
            "body.<b>.modules_gmsa.gmsa_0.project_query.0.*": "body.<b>.attention.0.query.conv.*",
            "body.<b>.modules_gmsa.gmsa_0.project_query.1.*": "body.<b>.attention.0.query.norm.*",
            "body.<b>.modules_gmsa.gmsa_0.project_value.0.*": "body.<b>.attention.0.shared.value.conv.*",
            "body.<b>.modules_gmsa.gmsa_0.project_value.1.*": "body.<b>.attention.0.shared.value.norm.*",
            "body.<b>.modules_gmsa.gmsa_0.project_out.*": "body.<b>.attention.0.shared.output.*",
            "body.<b>.modules_gmsa.gmsa_<j>.project_inp.0.*": "body.<b>.attention.<j>.value.conv.*",
            "body.<b>.modules_gmsa.gmsa_<j>.project_inp.1.*": "body.<b>.attention.<j>.value.norm.*",
            "body.<b>.modules_gmsa.gmsa_<j>.project_out.*": "body.<b>.attention.<j>.output.*",
        },
        convert=_released_elan,
        inverse=_joined_projections,
        extra_keys=_one_hot_kernels,
        defaults=lambda state, shapes: {
            **_elan_channels(state, shapes),
            **_mean_shift(state, 255.0),
            "exact_shift": False,
        },
    ),
    Layout(
        "EDSR (ours and BasicSR's)",
        EDSR,
        signature="body.<b>.conv1.*",
        shapes=_edsr,
        defaults=_usual_edsr,
        required={"attention": "attention."},
    ),
    Layout(
        "EDSR of EDSR-PyTorch",
        EDSR,
        signature="body.<b>.body.0.*",
        shapes=_edsr,
        names={
            **_HEAD_AND_TAIL,
            "body.<b>.body.0.*": "body.<b>.conv1.*",
            "body.<b>.body.2.*": "body.<b>.conv2.*",
            "body.<b>.*": "conv_after_body.*",
        },
        defaults=lambda state, shapes: {**_usual_edsr(state, shapes), **_mean_shift(state, 255.0)},
        extra_keys=_mean_convolutions,
    ),
    Layout(
        "RCAN (ours and BasicSR's)",
        RCAN,
        signature="body.<g>.residual_group.<b>.rcab.0.*",
        shapes=_rcan,
        required={"attention": "attention."},
    ),
    Layout(
        "RCAN of EDSR-PyTorch and of its authors",
        RCAN,
        signature="body.<g>.body.<b>.body.0.*",
        shapes=_rcan,
        names={
            **_HEAD_AND_TAIL,
            "body.<g>.body.<b>.body.0.*": "body.<g>.residual_group.<b>.rcab.0.*",
            "body.<g>.body.<b>.body.2.*": "body.<g>.residual_group.<b>.rcab.2.*",
            "body.<g>.body.<b>.body.3.conv_du.0.*": "body.<g>.residual_group.<b>.rcab.3.attention.1.*",
            "body.<g>.body.<b>.body.3.conv_du.2.*": "body.<g>.residual_group.<b>.rcab.3.attention.3.*",
            "body.<g>.body.<b>.*": "body.<g>.conv.*",
            "body.<g>.*": "conv_after_body.*",
        },
        defaults=lambda state, shapes: _mean_shift(state, 255.0),
        extra_keys=_mean_convolutions,
    ),
)
"""The layouts that `load_model` tries, in this order."""
