"""Checks of `val`: tiles and metrics."""

import copy
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from sparse_sr_attn.config import read
from sparse_sr_attn_basicsr import schema
from sparse_sr_attn_basicsr.preflight.findings import Findings, without_warnings
from sparse_sr_attn_basicsr.preflight.signatures import check_arguments, reason
from sparse_sr_attn_basicsr.randomness import undisturbed

Metrics = Mapping[str, tuple[Callable[..., Any], Mapping[str, Any]]]
"""Metrics by their path in the file, with their options."""


def check(findings: Findings) -> Metrics:
    """Check the section `val`; return the metrics with valid options, to try them on the sizes of images."""
    val = findings.options.get("val")
    if not isinstance(val, dict):
        return {}
    val.setdefault("save_img", False)
    val.setdefault("suffix", None)
    tile, overlap = val.get("tile"), val.get("tile_overlap")
    if isinstance(overlap, int) and overlap and (tile is None or (isinstance(tile, int) and overlap >= tile)):
        findings.add("val.tile_overlap", f"must be less than val.tile, got {overlap} with tile {tile or '~'}")
    metrics: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {}
    if isinstance(val.get("metrics"), Mapping):
        val["metrics"] = dict(val["metrics"])
        for key, given in val["metrics"].items():
            path, before = f"val.metrics.{key}", len(findings.problems)
            if (options := findings.mapping(path, given)) is None:
                continue
            val["metrics"][key] = options
            build = findings.by_type("METRIC", path, options, "the metric, e.g. calculate_psnr")
            if build is not None:
                rest = {name: value for name, value in options.items() if name not in ("type", "better")}
                check_arguments(findings.problems, build, rest, path, ("img", "img2"))
                read(schema.Metric, {"better": options.get("better", "higher")}, path, problems=findings.problems)
                options |= rest
                if len(findings.problems) == before:
                    metrics[path] = (build, rest)
    return metrics


def try_metrics(findings: Findings, metrics: Metrics, path: str, kind: object, sample: Mapping[str, Any]) -> None:
    """Compute the metrics of noise as large as the first sample of the data set at `path`, which is of type `kind`."""
    image = sample.get("gt", sample.get("lq"))
    if not isinstance(image, torch.Tensor) or image.ndim != 3:
        return
    channels, height, width = image.shape
    draw = np.random.default_rng(0)
    for metric, (build, options) in metrics.items():
        names = [name for name in ("img", "img2") if name in inspect.signature(build).parameters]
        if "gt" not in sample and "img2" in names:
            findings.add(f"{path}.type", f"{kind} has no image to compare with, which {metric} needs")
            continue
        # BasicSR's models pass images of shape (h, w) or (h, w, 3) to metrics.
        shape = (height, width) if channels == 1 else (height, width, 3)
        images = {name: draw.integers(0, 256, shape).astype(np.uint8) for name in names}
        try:
            with without_warnings(), undisturbed():
                value = float(build(**images, **copy.deepcopy(dict(options))))
        except Exception as error:  # user code can raise anything
            fault = f"fails ({reason(error)})"
        else:
            fault = "" if math.isfinite(value) else f"gives {value}"
        if fault:
            border = f"; crop_border is {options['crop_border']}" if options.get("crop_border") else ""
            findings.add(metric, f"{build.__name__} {fault} on an image of {width}x{height}{border}")
