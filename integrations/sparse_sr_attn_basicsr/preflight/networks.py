"""Checks of `network_*`: options, the size of the output, and options that the model reads."""

import copy
import importlib
import inspect
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sparse_sr_attn import attach
from sparse_sr_attn.checkpoints.foreign import find_facts
from sparse_sr_attn.config import fields, read
from sparse_sr_attn.errors import ConfigError
from sparse_sr_attn.layers.base import SATURATING_RANGE, raw_queries_in
from sparse_sr_attn.registry import suggestion
from sparse_sr_attn_basicsr import option_names, registration
from sparse_sr_attn_basicsr.preflight.findings import MODEL, Findings, bases, nested, without_warnings
from sparse_sr_attn_basicsr.preflight.signatures import check_names
from sparse_sr_attn_basicsr.with_attention import WithAttention, is_with_attention

_READ_BY_MODELS = r"""opt\[["'](network_\w+)["']\]\[["'](\w+)["']\]"""
# Buffers of layers in the words of users, by the end of their names.
_BUFFERS = {"centroids": "k-means centroids", "running_mean": "BatchNorm statistics"}


class SeenThrough(dict[str, Any]):
    """Options of a network; missing keys are looked up in the wrapped network and its defaults.

    Models of BasicSR read options of their network, such as `opt['network_g']['window_size']`. Iterating, copying and
    unpacking give the given options only.

    Args:
        options: the given options.
        inside: what is looked up otherwise.
    """

    def __init__(self, options: Mapping[str, Any], inside: Mapping[str, Any]) -> None:
        super().__init__(options)
        self.inside = dict(inside)

    def __missing__(self, key: str) -> Any:
        return self.inside[key]

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or key in self.inside

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value for `key`."""
        return super().get(key, self.inside.get(key, default))


def check(findings: Findings) -> int:
    """Check every network; return the number whose multiples `network_g` needs as sides of images."""
    multiple = 1
    for key in [key for key in findings.options if key.startswith("network_")]:
        found = _check_network(findings, key, findings.options[key])
        multiple = found if key == "network_g" else multiple
    return multiple


def _check_network(findings: Findings, path: str, options: object) -> int:
    """Check a network; return the number whose multiples it needs as sides of images."""
    if not isinstance(options, Mapping):
        if path != "network_g":  # else already reported for the section
            findings.mapping(path, options)
        return 1
    rest = {key: value for key, value in options.items() if key != "type"}
    ours = findings.networks.get(str(options.get("type")))
    if is_with_attention(ours):
        return _check_attended(findings, path, rest)
    if ours is not None:
        _check_ours(findings, path, ours, rest)
    elif (build := findings.by_type("ARCH", path, options, "the network, e.g. SparseEDSR")) is not None:
        _check_theirs(findings, path, str(options["type"]), build, rest)
    return 1


def _check_ours(findings: Findings, path: str, build: registration.Build, options: Mapping[str, Any]) -> None:
    right = read(build, options, path, problems=findings.problems)
    defaults = {name: option.default for name, option in fields(build).items()}
    upscale, scale = {**defaults, **right}.get("upscale"), findings.scale
    if scale is not None and upscale != scale and ("upscale" in right or "upscale" not in options):
        default = "" if "upscale" in options else " (its default)"
        findings.add(f"{path}.upscale", f"must be {scale}, the option 'scale', got {upscale}{default}")
    try:
        # Rules that join several options are the constructor's own. The meta device allocates nothing.
        with torch.device("meta"), without_warnings():  # remarks say the same
            network = build(**right)
    except ConfigError as error:
        findings.add_all(error.under(path))
    else:
        _check_attention(findings, path, network, options)


def _check_attention(findings: Findings, path: str, network: nn.Module, options: Mapping[str, Any]) -> None:
    """Check options against the attention and the buffers of a network."""
    img_range = getattr(network, "img_range", 1.0)
    raw = raw_queries_in(network)
    if raw and img_range > SATURATING_RANGE:
        default = "" if "img_range" in options else " (the default of this network)"
        findings.remarks.append(
            f"{path}.img_range: {img_range:g}{default} makes raw queries so long that the softmax of "
            f"{', '.join(raw)} saturates; use img_range: 1, or similarity: cosine where the layer has it."
        )
    buffers = [name for name, _ in network.named_buffers()]
    kept = [words for end, words in _BUFFERS.items() if any(name.endswith(end) for name in buffers)]
    averages = findings.training and nested(findings.options, "train", "ema_decay")
    if not (averages and kept) or findings.model is None or findings.is_ours():
        return
    if not re.search(r"buffers\(|state_dict\(", option_names.source_of(getattr(findings.model, "model_ema", None))):
        findings.add(
            "train.ema_decay",
            f"must be 0 with {findings.options['model_type']}, which leaves {' and '.join(kept)} of the averaged "
            f"network untrained; model_type: {findings.counterpart()} does not",
        )


def _check_attended(findings: Findings, path: str, options: Mapping[str, Any]) -> int:
    """Check a network of BasicSR by itself, and then whether it can hold attention."""
    before = len(findings.problems)
    right = read(WithAttention, options, path, problems=findings.problems)
    if "network" in right:
        _check_network(findings, f"{path}.network", right["network"])
    if len(findings.problems) > before or right["attention"] is None:
        return 1
    network = _built(findings, f"{path}.network", right["network"])
    if network is None:
        return 1
    facts = find_facts(network)
    try:
        with without_warnings():
            attach(network, right.get("body"), right["attention"])
    except ConfigError as error:
        findings.add_all(error.under(path))
    else:
        _check_attention(findings, f"{path}.network", network, right["network"])
    return facts.multiple if facts is not None else 1


def _check_theirs(findings: Findings, path: str, name: str, build: Any, options: Mapping[str, Any]) -> None:
    """Check a network of BasicSR or of the user."""

    def hint(key: str, known: list[str]) -> str:
        better = findings.networks.get(f"Sparse{name}")
        if better is not None and key in fields(better):
            return f"; type: Sparse{name} has it"
        if key == "attention":
            return f"; wrap the network: {{type: WithAttention, network: {{type: {name}, ...}}, attention: ...}}"
        return suggestion(key, known)

    before = len(findings.problems)
    check_names(findings.problems, build, options, path, hint=hint)
    if len(findings.problems) == before:
        network = _built(findings, path, {"type": name, **options})
        facts = find_facts(network) if network is not None and path == "network_g" else None
        if facts is not None and findings.scale not in (None, facts.upscale):
            findings.add(path, f"must upscale by {findings.scale}, the option 'scale', but does so by {facts.upscale}")


def _built(findings: Findings, path: str, options: Mapping[str, Any]) -> nn.Module | None:
    """Build a network of BasicSR's registry, on the meta device if possible, else on the CPU."""
    build = findings.registered("ARCH", options["type"])
    failure: Exception | None = None
    for device in ("meta", "cpu"):
        rest = {key: copy.deepcopy(value) for key, value in options.items() if key != "type"}
        try:
            with torch.device(device), without_warnings():
                network: nn.Module = build(**rest)
                return network
        except Exception as error:  # user code can raise anything
            failure = error
    findings.add(path, f"{options['type']} cannot be built with these options: {type(failure).__name__}: {failure}")
    return None


def check_model_lookups(findings: Findings, multiple: int) -> None:
    """Check that the options that the model reads of its networks exist, and make them available.

    Models read options such as `opt['network_g']['window_size']` when they first validate. They get those of the
    network inside `WithAttention`, and defaults that the file omits.

    Args:
        findings: the check of the file.
        multiple: `network_g` needs multiples of it as sides of images.
    """
    options = findings.options
    for key in [key for key in options if key.startswith("network_")]:
        if isinstance(given := options[key], Mapping):
            wrapped = is_with_attention(findings.networks.get(str(given.get("type"))))
            inner = given.get("network") if wrapped else given
            inner = inner if isinstance(inner, Mapping) else {}
            build = findings.registered("ARCH", inner.get("type"))
            parameters = inspect.signature(build).parameters if build is not None else {}
            defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
            options[key] = SeenThrough(given, {**defaults, **inner})
    for cls in bases(findings.model):
        for key, option in re.findall(_READ_BY_MODELS, option_names.source_of(cls)):
            if isinstance(options.get(key), Mapping) and option not in options[key]:
                findings.add(f"{key}.{option}", f"missing; {options['model_type']} reads it")
    if multiple > 1:
        _check_padding(findings, multiple)


def _check_padding(findings: Findings, multiple: int) -> None:
    """Check the options of a network that needs images with sides that are multiples of a number."""
    why = f"because network_g needs sides that are multiples of {multiple}"
    theirs = importlib.import_module("basicsr.models.sr_model").SRModel
    if getattr(findings.model, "test", None) is theirs.test:
        name = findings.options.get("model_type")
        findings.add("model_type", f"must be one that pads images, {why}, got {name}; {MODEL} does")
    gt_size, scale = nested(findings.options, "datasets", "train", "gt_size"), findings.scale
    if isinstance(gt_size, int) and scale is not None and gt_size % (scale * multiple):
        findings.add("datasets.train.gt_size", f"must be a multiple of {scale * multiple}, {why}, got {gt_size}")
