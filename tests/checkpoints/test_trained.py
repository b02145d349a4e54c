"""Trained weights that come with the library: they load by name, are small, and are better than interpolation."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from benchmarks.weights import recipe
from sparse_sr_attn import PRESETS, CheckpointError, load_model
from sparse_sr_attn.backbones.base import options_of
from sparse_sr_attn.checkpoints.read import trained_weights
from sparse_sr_attn.cli.common import DEFAULT_WEIGHTS
from sparse_sr_attn.cli.main import main
from sparse_sr_attn.data.images import Picture
from sparse_sr_attn.data.imresize import crop_to_multiple, imresize, matlab_bicubic
from sparse_sr_attn.data.metrics import luma, psnr
from sparse_sr_attn.inference.upscale import upscale_image

ROOT = Path(__file__).resolve().parents[2]
NAMES = list(trained_weights())


def parts(name: str) -> tuple[str, int]:
    preset, _, upscale = name.rpartition("_x")
    return preset, int(upscale)


def test_the_default_is_there() -> None:
    assert set(DEFAULT_WEIGHTS.values()) <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_they_are_a_preset_and_small(name: str) -> None:
    preset, upscale = parts(name)
    model = load_model(name)
    assert not model.training
    assert model.upscale == upscale
    assert isinstance(model, PRESETS[preset].build)  # type: ignore[arg-type]
    options = json.loads(json.dumps(options_of(model)))
    assert {key: options[key] for key in PRESETS[preset].options} == PRESETS[preset].options
    assert trained_weights()[name].stat().st_size < 4e6


@pytest.mark.parametrize("name", NAMES)
def test_they_are_better_than_interpolation(name: str) -> None:
    """On photographs that none of them was trained on."""
    _, upscale = parts(name)
    model = load_model(name)
    gains = []
    for photograph in (data.chelsea()[60:252, 100:292], data.astronaut()[:192, 130:322]):
        high = crop_to_multiple(torch.from_numpy(photograph.copy()), upscale)
        low = matlab_bicubic(high, upscale)
        ours = torch.from_numpy(upscale_image(model, Picture(low.numpy()), tile=512, overlap=0).pixels)
        bicubic = imresize(low, size=(high.shape[0], high.shape[1]))
        found = [psnr(luma(picture), luma(high), border=upscale) for picture in (ours, bicubic)]
        gains.append(found[0] - found[1])
    assert min(gains) > 0.5, gains


def test_a_file_of_that_name_goes_first(here: Path) -> None:
    Path("LCoAN-light_x2").write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match="must be weights that can be read"):
        load_model("LCoAN-light_x2")


@pytest.fixture
def photo(here: Path) -> np.ndarray:
    """photo.png, where we stand."""
    pixels = data.chelsea()[60:92, 100:140].copy()
    Image.fromarray(pixels).save("photo.png")
    return pixels


def test_upscale_takes_them_unasked(photo: np.ndarray) -> None:
    assert main(["upscale", "photo.png", "--device", "cpu"]) == 0
    with Image.open("photo_x2.png") as image:
        found = np.asarray(image)
    expected = upscale_image(load_model(DEFAULT_WEIGHTS[2]), Picture(photo), tile=512, overlap=0)
    assert np.array_equal(found, expected.pixels)


@pytest.mark.parametrize("upscale", DEFAULT_WEIGHTS)
def test_upscale_by_a_scale(upscale: int, photo: np.ndarray) -> None:
    assert main(["upscale", "photo.png", "--scale", str(upscale), "--device", "cpu"]) == 0
    with Image.open(f"photo_x{upscale}.png") as image:
        assert image.size == (40 * upscale, 32 * upscale)


@pytest.mark.usefixtures("photo")
def test_a_scale_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["upscale", "photo.png", "--scale", "7"]) == 2
    assert f"--scale must be one of {sorted(DEFAULT_WEIGHTS)} with the included" in capsys.readouterr().err


@pytest.mark.usefixtures("photo")
@pytest.mark.parametrize("name", NAMES)
def test_a_scale_may_repeat_that_of_the_weights(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Also if they are the default at another scale."""
    scale = parts(name)[1]
    for wrong in {0, 2, 4, 5} - {scale}:
        assert main(["upscale", "photo.png", "--scale", str(wrong), "--weights", name]) == 2
        expected = f"sparse-sr: --scale must be {scale}, that of {name}, or omitted; got {wrong}\n"
        assert capsys.readouterr().err == expected
    assert main(["upscale", "photo.png", "--scale", str(scale), "--weights", name]) == 0
    assert Path(f"photo_x{scale}.png").exists()


def test_the_page_has_the_figures_on_record() -> None:
    figures = recipe.recorded()
    page = recipe.PAGE.read_text()
    for shown in (figures, recipe.included(figures)):
        assert f" -->\n{recipe.table(shown)}<!-- end of figures" in page
    included = {f"{figure.network}_x{figure.upscale}" for figure in figures if figure.included}
    assert included == set(trained_weights())
    measured = {f"{figure.network}_x{figure.upscale}" for figure in figures}
    assert set(NAMES) <= measured


def test_the_readme_has_the_figures_on_record() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    budgets = {"", "15,000 × 8 × 48²"}
    figures = [one for one in recipe.recorded() if one.upscale == 2 and one.trained_on in budgets]
    rows = {
        "bicubic": "bicubic",
        "EDSR-LCoA": "**EDSR with LCoA**, 0.54 M parameters, weights included",
        "EDSR-wider": "EDSR without attention, as many parameters, same steps and patches",
        "EDSR-deeper": "EDSR without attention, about the same time, 0.77 M parameters, one seed",
    }
    for network, label in rows.items():
        own = {one.photographs: one for one in figures if one.network == network}
        cells = [f"{own[name].psnr:.2f} / {own[name].ssim:.4f}" for name in ("Set5", "Set14", "Urban25")]
        assert f"| {label} | {' | '.join(cells)} |" in text
        off = [own[name].psnr_without_attention for name in ("Set5", "Set14", "Urban25")]
        if network == "EDSR-LCoA":
            assert f"| the same weights, attention switched off | {' | '.join(f'{psnr:.2f}' for psnr in off)} |" in text
