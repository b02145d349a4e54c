"""Networks are found, created and loaded by name."""

import pytest
import torch
from tolerances import assert_bit_equal

from sparse_sr_attn import (
    LAYERS,
    LSP,
    PRESETS,
    CheckpointError,
    ConfigError,
    UnknownNameError,
    build_layer,
    create_model,
    list_layers,
    list_models,
    load_model,
)
from sparse_sr_attn.checkpoints.read import trained_weights


def test_what_is_listed_can_be_created() -> None:
    assert set(list_models()) == set(PRESETS)
    for name in list_models():
        with torch.device("meta"):
            assert isinstance(create_model(name), PRESETS[name].build)  # type: ignore[arg-type]
    assert list_layers() == sorted(LAYERS)
    for name in list_layers():
        assert isinstance(build_layer(name, 8), LAYERS[name])  # type: ignore[arg-type]


def test_patterns_choose() -> None:
    assert list_models("*-light") == ["ELAN-light", "LCoAN-light"]
    assert list_models("none") == []
    assert list_layers("*CoA") == ["CoA", "LCoA"]


@pytest.mark.parametrize("weights", list_models(pretrained=True))
def test_pretrained_is_load_model(weights: str) -> None:
    assert weights in trained_weights()
    name, _, upscale = weights.rpartition("_x")
    created, loaded = create_model(name, pretrained=True, upscale=int(upscale)), load_model(weights)
    assert not created.training
    for key, value in loaded.state_dict().items():
        assert_bit_equal(created.state_dict()[key], value)
    assert create_model(name, upscale=int(upscale)).training


def test_pretrained_takes_the_default_factor_and_other_options() -> None:
    model = create_model("LCoAN-light", pretrained=True, reuse="pattern")
    assert model.upscale == 2
    assert {layer.reuse for layer in model.modules() if isinstance(layer, LSP)} == {"pattern"}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("LCoAN-light_x2", {}, r"which are trained weights: load_model\('LCoAN-light_x2'\)"),
        ("EDSR_x3", {}, r"the factor is an option: create_model\('EDSR', upscale=3\)"),
        ("edsr", {}, r"did you mean 'EDSR'\?"),
        ("SparseEDSR", {}, r"did you mean 'EDSR'\?"),
        ("EDSR-base", {}, r"did you mean 'EDSR-baseline'\?"),
        ("LCoAN", {"pretrained": True, "upscale": 3}, r"no weights named 'LCoAN_x3' are included .*from a file with"),
    ],
)
def test_names_that_lead_elsewhere(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(UnknownNameError, match=message):
        create_model(name, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "close"),
    [
        ("LCoAN-light", "'LCoAN-light_x2' or 'LCoAN-light_x3' or 'LCoAN-light_x4'"),
        ("ELAN-light", "'ELAN-light_x2' or 'ELAN-light_x3' or 'ELAN-light_x4'"),
        ("EDSR-LCoA_x3", "'EDSR-LCoA_x2'"),
        ("edsr-lcoa-x2", "'EDSR-LCoA_x2'"),
    ],
)
def test_load_model_suggests_weights_and_points_to_create_model(name: str, close: str) -> None:
    with pytest.raises(CheckpointError, match=f"did you mean {close}") as caught:
        load_model(name)
    assert ("create_model builds an untrained network by name" in str(caught.value)) == (name[-3:] != "_x3")


def test_pretrained_refuses_options_that_do_not_exist() -> None:
    with pytest.raises(ConfigError, match="num_feats"):
        create_model("LCoAN-light", pretrained=True, num_feats=3)
