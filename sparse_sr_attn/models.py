"""Networks by name: presets, each with its source, and the trained weights included in the library."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

from torch import nn

from sparse_sr_attn.backbones.edsr import EDSR
from sparse_sr_attn.backbones.elan import ELAN
from sparse_sr_attn.backbones.lcoan import LCoAN
from sparse_sr_attn.backbones.rcan import RCAN
from sparse_sr_attn.checkpoints.load import load_model
from sparse_sr_attn.checkpoints.read import trained_weights
from sparse_sr_attn.config import fields, read
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


_LIGHT_LCOA = {"res_scale": 1.0, "num_clusters": 64, "chunk_size": 64, "reduction": 3, "ema_decay": 0.99}

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
            **_LIGHT_LCOA,
        },
        "this library: under 1 M parameters, for small machines",
    ),
    "ELAN": Preset(ELAN, {}, "Zhang et al., arXiv 2203.06697, released configuration"),
    "ELAN-light": Preset(
        ELAN,
        {"num_feat": 60, "num_block": 12, "share": 2},
        "Zhang et al., arXiv 2203.06697, released configuration",
    ),
    "EDSR-LCoA": Preset(
        EDSR,
        {
            "num_feat": 48,
            "num_block": 10,
            "img_range": 1.0,
            "attention": {"type": "LCoA", "every": 2, "share": 5, **_LIGHT_LCOA},
        },
        "this library: an EDSR of the size of LCoAN-light with its attention",
    ),
    "EDSR-baseline": Preset(EDSR, {}, "Lim et al., CVPRW 2017, the baseline network"),
    "EDSR": Preset(
        EDSR,
        {"num_feat": 256, "num_block": 32, "res_scale": 0.1},
        "Lim et al., CVPRW 2017, the network of the tables",
    ),
    "RCAN": Preset(RCAN, {}, "Zhang et al., ECCV 2018"),
}


def list_models(pattern: str = "*", *, pretrained: bool = False) -> list[str]:
    """Return the names that `create_model` knows, or those of the included weights, which `load_model` takes.

    Args:
        pattern: shell-style pattern that the names match.
        pretrained: list trained weights instead of presets.

    Examples:
        >>> list_models("*-light")
        ['ELAN-light', 'LCoAN-light']
        >>> list_models("LCoAN*", pretrained=True)
        ['LCoAN-light_x2', 'LCoAN-light_x3', 'LCoAN-light_x4']
    """
    return sorted(name for name in (trained_weights() if pretrained else PRESETS) if fnmatch(name, pattern))


def create_model(name: str, *, pretrained: bool = False, **options: Any) -> nn.Module:
    """Create the network called `name`.

    Args:
        name: a preset; see `list_models`.
        pretrained: load the included weights for `upscale` and set evaluation mode; options that the weights record
            take precedence over those of the preset. Otherwise the network is untrained and in training mode.
        options: options of the network that override those of the preset.

    Raises:
        UnknownNameError: there is no such preset, or the library includes no weights for it and `upscale`.
        ConfigError: options are invalid; the message names all of them.

    Examples:
        >>> model = create_model("LCoAN-light", upscale=4)
        >>> model(torch.rand(1, 3, 12, 12)).shape
        torch.Size([1, 3, 48, 48])
        >>> create_model("LCoAN-light", pretrained=True, upscale=2).training
        False
    """
    if name not in PRESETS:
        raise UnknownNameError(f"no preset named {name!r}{_remedy(name)}")
    preset = PRESETS[name]
    chosen = read(preset.build, {**preset.options, **options})
    if not pretrained:
        return preset.build(**chosen)
    weights = f"{name}_x{chosen.get('upscale', fields(preset.build)['upscale'].default)}"
    if weights not in trained_weights():
        raise UnknownNameError(
            f"no weights named {weights!r} are included (known: {', '.join(trained_weights())}); train the network, or "
            "load weights from a file with load_model"
        )
    return load_model(weights, **options)


def _remedy(name: object) -> str:
    preset, _, upscale = str(name).rpartition("_x")
    if name in trained_weights():
        return f", which are trained weights: load_model({name!r})"
    if preset in PRESETS and upscale.isdecimal():
        return f"; the factor is an option: create_model({preset!r}, upscale={upscale})"
    return suggestion(name, sorted(PRESETS))
