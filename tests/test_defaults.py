"""Defaults are part of what users rely on: one that changes makes other networks of the same option files.

When a change is meant, note it in the CHANGELOG and run `python tests/test_defaults.py`, which writes defaults.json.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.speed.settings import Settings
from sparse_sr_attn import EDSR, ELAN, LAYERS, PRESETS, RCAN, ConfigError, LCoAN
from sparse_sr_attn.config import fields

RECORD = Path(__file__).with_name("defaults.json")
BUILDS = {name: LAYERS.get(name).build for name in LAYERS} | {
    build.__name__: build for build in (EDSR, ELAN, LCoAN, RCAN)
}


def defaults() -> dict[str, Any]:
    """Return the default of every option of every layer and network, and what presets say."""
    found = {
        name: {option: field.default for option, field in fields(build).items() if field.default is not field.empty}
        for name, build in {**BUILDS, "bench": Settings}.items()
    }
    found |= {f"preset {name}": dict(preset.options) for name, preset in PRESETS.items()}
    return dict(json.loads(json.dumps(found)))


def test_defaults_are_those_on_record() -> None:
    assert defaults() == json.loads(RECORD.read_text()), "if you meant it, run python tests/test_defaults.py"


@pytest.mark.parametrize("name", [name for name in BUILDS if not name.startswith("timm:")])
def test_constructors_check_their_options(name: str) -> None:
    first = next(iter(fields(BUILDS[name])))  # a number of channels, of all of them
    with pytest.raises(ConfigError, match=rf"{first} must be >= 1, got 0"):
        BUILDS[name](
            **{
                option: 0 if option == first else 1
                for option, field in fields(BUILDS[name]).items()
                if option == first or field.default is field.empty
            }
        )


@pytest.mark.parametrize(("embed_dim", "reduction", "width"), [(1, 4, 1), (3, 4, 1), (9, 4, 2), (8, 1, 8)])
@pytest.mark.parametrize("name", ["NLA", "NLSA", "ENLA", "LCoA"])
def test_queries_are_shorter_by_the_reduction_but_never_empty(
    name: str, embed_dim: int, reduction: int, width: int
) -> None:
    layer = BUILDS[name](embed_dim, reduction=reduction)
    widths = [
        value.shape[0] for key, value in layer.named_parameters() if key.endswith(("embed.weight", "query.weight"))
    ]
    assert widths == [width]


if __name__ == "__main__":
    RECORD.write_text(json.dumps(defaults(), indent=1) + "\n")
