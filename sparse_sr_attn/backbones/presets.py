"""Named configurations, each with its source."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from sparse_sr_attn.backbones.elan import ELAN
from sparse_sr_attn.backbones.lcoan import LCoAN
from sparse_sr_attn.config import read
from sparse_sr_attn.errors import UnknownNameError
from sparse_sr_attn.registry import suggestion


@dataclass(frozen=True)
class Preset:
    """A network class with options.

    Attributes:
        build: the network class.
        options: options that differ from the defaults.
        source: origin of the options.

    Examples:
        >>> preset = PRESETS["LCoAN-light"]
        >>> preset.build.__name__, preset.options["num_feat"]
        ('LCoAN', 48)
    """

    build: Callable[..., nn.Module]
    options: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""


PRESETS: Mapping[str, Preset] = {
    "LCoAN": Preset(
        LCoAN,
        {"similarity": "dot", "cluster_order": "index", "zero_init": False},
        "Zhao et al., arXiv 2404.04922, released configuration",
    ),
    "LCoAN-light": Preset(
        LCoAN,
        {
            "num_feat": 48,
            "num_group": 4,
            "num_block": 2,
            "res_scale": 1.0,
            "num_clusters": 64,
            "chunk_size": 64,
            "reduction": 3,
            "ema_decay": 0.99,
        },
        "this library: under 1 M parameters, for small machines",
    ),
    "ELAN": Preset(ELAN, {}, "Zhang et al., arXiv 2203.06697, released configuration"),
    "ELAN-light": Preset(
        ELAN,
        {"num_feat": 60, "num_block": 12, "share": 2},
        "Zhang et al., arXiv 2203.06697, released configuration",
    ),
}


def create_model(name: str, **options: Any) -> nn.Module:
    """Create the network called `name`, untrained; `options` override those of the preset.

    Raises:
        UnknownNameError: there is no such preset.
        ConfigError: options are invalid; names all of them.

    Examples:
        >>> model = create_model("LCoAN-light", upscale=4)
        >>> model(torch.rand(1, 3, 12, 12)).shape
        torch.Size([1, 3, 48, 48])
    """
    if name not in PRESETS:
        raise UnknownNameError(f"no preset named {name!r}{suggestion(name, sorted(PRESETS))}")
    preset = PRESETS[name]
    return preset.build(**read(preset.build, {**preset.options, **options}))
