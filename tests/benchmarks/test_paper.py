"""The papers' experiments: fair comparisons, results that are kept, figures that are what they say."""

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.paper import __main__ as command
from benchmarks.paper import training
from benchmarks.paper.__main__ import main
from benchmarks.paper.cost import costs, growth
from benchmarks.paper.figures import FIGURES, SCALES, SMALL, overlap
from benchmarks.paper.pictures import Pair, patches
from benchmarks.paper.report import differences, fill, markdown, section, stands_out
from benchmarks.paper.training import Budget, Trainer, Variant, count_parameters, fit, validate
from benchmarks.paper.variants import (
    StandardWindowAttention,
    with_plain_convolutions,
    without_attention,
)
from sparse_sr_attn import EDSR, ELAB, ELAN, CoA, LCoAN, SharedGMSA
from sparse_sr_attn.backbones.base import Network
from sparse_sr_attn.data.imresize import matlab_bicubic
from sparse_sr_attn.data.metrics import luma, psnr
from sparse_sr_attn.layers.base import AttentionLayer

CPU = torch.device("cpu")
DOCS = Path(__file__).parents[2] / "docs"
BUDGET = Budget(iterations=2, batch=2, patch=8, crop=None)
PLAIN = {"num_feat": 6, "num_block": 2, "img_range": 1.0}
ATTENTION = {"type": "LCoA", "every": 1, "share": 2, "num_clusters": 4, "chunk_size": 8, "reduction": 2}
TINY = replace(
    SMALL,
    budget=Budget(iterations=1, batch=1, patch=8, crop=16),
    width=5,
    blocks=2,
    every=1,
    clusters=3,
    chunk=8,
    all_clusters=(2, 3),
    all_chunks=(4, 8),
    elan_width=6,
    elan_pairs=2,
    elan_shares=(1, 2),
    cost_side=8,
    sides=(8, 12),
    step_sides=(8,),
    stack=2,
)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def pair(height: int = 16, width: int = 20, seed: int = 0) -> Pair:
    high = noise(2 * height, 2 * width, 3, seed=seed)
    return Pair(f"picture{seed}", high, matlab_bicubic(high, 2))


def saved(folder: Path, name: str, picture: Tensor) -> None:
    folder.mkdir(exist_ok=True)
    Image.fromarray(picture.numpy()).save(folder / name)


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_patches_show_the_same_place_in_both_sizes() -> None:
    """Each pixel of these pictures is its own place, so that a patch tells where it comes from."""
    places = torch.stack(torch.meshgrid(torch.arange(13), torch.arange(11), indexing="ij"), dim=-1)
    low = torch.cat([places, torch.full((13, 11, 1), 3)], dim=-1).to(torch.uint8)
    high = low.repeat_interleave(2, 0).repeat_interleave(2, 1)
    stream = patches([Pair("places", high, low)], side=4, batch=64, seed=0)
    lows, highs = next(stream)
    assert torch.equal(F.interpolate(lows, scale_factor=2.0, mode="nearest"), highs)
    rows, columns = (lows[:, channel] * 255 for channel in (0, 1))
    slopes = torch.stack([one[:, i, j] - one[:, 0, 0] for one in (rows, columns) for i, j in ((1, 0), (0, 1))], dim=1)
    assert len({tuple(slope) for slope in slopes.round().tolist()}) == 8  # turned and mirrored in all ways
    assert int(rows.max()) == 12  # the last row and column take part
    assert int(columns.max()) == 10
    assert int(rows.min()) == int(columns.min()) == 0


# --- fairness ---------------------------------------------------------------------------------------------------------


def seen_by(variant: Variant, seed: int) -> list[Tensor]:
    model = variant.build(2, seed)
    inputs: list[Tensor] = []
    model.register_forward_pre_hook(lambda _, args: inputs.append(args[0].clone()))
    fit(model, [pair(seed=0), pair(seed=1)], BUDGET, seed, CPU)
    return inputs


def test_all_variants_get_the_same_patches() -> None:
    """Also where a network draws random numbers of its own while it trains."""
    hashing = {"type": "NLSA", "every": 1, "chunk_size": 8}
    first, *others = (
        seen_by(Variant(EDSR, {**PLAIN, "attention": attention}), seed=3) for attention in (None, ATTENTION, hashing)
    )
    assert len(first) == BUDGET.iterations
    for other in others:
        assert all(torch.equal(one, two) for one, two in zip(first, other, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], seen_by(Variant(EDSR, PLAIN), seed=4)[0])


def test_all_variants_start_from_the_same_network() -> None:
    plain = Variant(EDSR, PLAIN).build(2, 5).state_dict()
    attended = Variant(EDSR, {**PLAIN, "attention": ATTENTION}).build(2, 5)
    assert all(torch.equal(value, attended.state_dict()[name]) for name, value in plain.items() if name != "options")
    x = torch.rand(1, 3, 8, 8)
    model = Variant(EDSR, PLAIN).build(2, 5)
    assert torch.allclose(model(x), attended(x), atol=1e-6)  # attention starts as the identity
    other = Variant(EDSR, PLAIN).build(2, 6).state_dict()
    assert not torch.equal(plain["conv_first.weight"], other["conv_first.weight"])


class Nearest(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2.0, mode="nearest")


def test_validation_is_psnr_on_luma_without_a_border_of_the_factor() -> None:
    one = pair()
    enlarged = one.low.repeat_interleave(2, 0).repeat_interleave(2, 1)
    expected = psnr(luma(enlarged), luma(one.high), border=2)
    assert validate(Nearest(), [one], 2, CPU) == {"picture0": pytest.approx(expected, abs=1e-12)}


# --- results that are kept --------------------------------------------------------------------------------------------


def trainer(folder: Path, budget: Budget = BUDGET, *, seed: int = 0) -> Trainer:
    return Trainer(budget, [pair(seed=seed)], [pair(seed=7)], folder)


def test_a_result_is_kept_and_another_budget_is_another_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variant = Variant(EDSR, PLAIN)
    first = trainer(tmp_path).result(variant, 0)
    assert first.psnr == pytest.approx(first.each["picture7"])
    trained: list[int] = []
    monkeypatch.setattr(training, "fit", lambda *_: trained.append(len(list(tmp_path.iterdir()))))
    assert trainer(tmp_path).result(variant, 0) == first
    assert trained == []
    trainer(tmp_path).result(variant, 1)
    trainer(tmp_path, replace(BUDGET, iterations=3)).result(variant, 0)
    trainer(tmp_path, seed=1).result(variant, 0)
    trainer(tmp_path).result(Variant(EDSR, {**PLAIN, "num_feat": 4}), 0)
    trainer(tmp_path).result(Variant(EDSR, PLAIN, changes=unchanged), 0)
    trainer(tmp_path).result(Variant(EDSR, PLAIN, look=lambda model, pairs: len(pairs)), 0)
    assert trained == [1, 2, 3, 4, 5, 6]  # each finds the results of all before, and none that is its own


def unchanged(model: Network) -> None:
    """Do nothing; another name makes another variant."""


# --- variants ---------------------------------------------------------------------------------------------------------


def elan(**options: Any) -> Network:
    torch.manual_seed(0)
    return ELAN(num_feat=10, num_block=2, **options)


def reach(lfe: nn.Module) -> set[tuple[int, int]]:
    """Return the offsets of the pixels that an LFE sees."""
    x = torch.rand(1, 10, 9, 9, requires_grad=True)
    lfe(x)[0, :, 4, 4].abs().sum().backward()
    return {(int(i) - 4, int(j) - 4) for i, j in x.grad.abs().sum(dim=(0, 1)).nonzero()}


@pytest.mark.parametrize(("kernel_size", "farthest"), [(1, 0), (3, 2)])
def test_plain_convolutions(kernel_size: int, farthest: int) -> None:
    model, shifted = elan(share=2), elan(share=2)
    with_plain_convolutions(model, kernel_size=kernel_size)
    first, ours = (net.body[0].lfe[0] for net in (model, shifted))
    assert reach(first) == {(i, j) for i in range(-farthest, farthest + 1) for j in range(-farthest, farthest + 1)}
    assert reach(ours) == {(i, j) for i in range(-2, 3) for j in range(-2, 3) if abs(i) + abs(j) <= 2}
    weights = 4 * 2 * 10 * 20  # four LFEs, of two convolutions each
    assert count_parameters(model) - count_parameters(shifted) == weights * (kernel_size**2 - 1)


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_standard_attention_is_scaled_dot_product_attention(norm: Any) -> None:
    """One group whose window holds the whole map."""
    torch.manual_seed(0)
    layer = StandardWindowAttention(6, window_sizes=(8,), norm=norm).double().eval()
    x = torch.rand(2, 6, 5, 7, dtype=torch.float64)
    entering = x if layer.norm is None else F.layer_norm(x.movedim(1, -1), (6,)).movedim(-1, 1)
    q, k, v = (
        project(entering).flatten(2).transpose(1, 2)[:, None] for project in (layer.query, layer.key, layer.value)
    )
    attended = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).unflatten(2, (5, 7))
    expected = x + layer.output(attended)
    assert (layer(x) - expected).abs().max() <= 1e-10


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (LCoAN, {"num_feat": 8, "num_group": 3, "num_block": 1, "share": 2, "chunk_size": 9}),
        (ELAN, {"num_feat": 10, "num_block": 2, "share": 2, "window_sizes": (2, 4)}),
    ],
)
def test_without_attention_is_attention_that_adds_nothing(
    kind: type[ELAN] | type[LCoAN], options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    model = kind(**options, **({"zero_init": False} if kind is LCoAN else {})).double().eval()
    silent = copy.deepcopy(model)
    for module in silent.modules():
        if isinstance(module, CoA):
            module.res_scale = 0.0
        elif isinstance(module, SharedGMSA):
            for parameter in module.output.parameters():
                nn.init.zeros_(parameter)
    x = torch.rand(1, 3, 9, 8, dtype=torch.float64)
    assert (silent(x) - model(x)).abs().max() > 1e-6
    without_attention(model)
    assert (silent(x) - model(x)).abs().max() <= 1e-12
    assert not [key for key, _ in model.named_parameters() if ".attention." in key]


# --- figures ----------------------------------------------------------------------------------------------------------


def sites(model: nn.Module) -> int:
    return sum(isinstance(layer, AttentionLayer) for layer in getattr(model, "attention", ()))


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_networks_of_a_figure_differ_in_what_is_asked_only(scale: Any) -> None:
    for label in ("lcoa-2", "lcoa-3", "lcoa-4"):
        figure = FIGURES[label](scale)
        numbers = {name: sites(variant.build(2)) for name, variant in figure.variants.items()}
        wanted = scale.stack if label == "lcoa-2" else scale.sites
        assert {number for name, number in numbers.items() if name != "no attention"} == {wanted}
        assert numbers.get("no attention", 0) == 0
        assert figure.baseline in figure.variants
    for label in ("elan-lfe", "elan-windows", "elan-share", "elan-asa"):
        figure = FIGURES[label](scale)
        assert figure.baseline in figure.variants
        for variant in figure.variants.values():
            if label == "elan-share" and scale.elan_pairs % variant.options["share"]:
                pytest.fail(f"{variant.options['share']} does not divide {scale.elan_pairs}")
            model = variant.build(2)
            assert sum(len(module.lfe) for module in model.modules() if isinstance(module, ELAB)) == scale.elan_pairs


def test_layers_that_share_overlap_whole_and_other_pictures_less() -> None:
    model = Variant(EDSR, {**PLAIN, "attention": {**ATTENTION, "zero_init": False}}).build(2)
    for parameter in model.attention[0].lsp.parameters():
        parameter.data.mul_(20)  # sharp attention
    seen = overlap(model, [pair(seed=1), pair(seed=2)])
    assert torch.tensor(seen["same"]) == pytest.approx(torch.ones(2, 2).numpy(), abs=1e-5)
    assert 0 <= max(max(row) for row in seen["other"]) < 0.9


# --- costs ------------------------------------------------------------------------------------------------------------


def test_costs_of_training_hold_the_activations() -> None:
    models = {"one": Variant(EDSR, PLAIN).build(2), "deep": Variant(EDSR, {**PLAIN, "num_block": 12}).build(2)}
    x = torch.rand(1, 3, 16, 16)
    options = {"device": CPU, "rounds": 2, "limit": 60.0}
    infers = costs(models, x, passed="forward", times=True, **options)
    learns = costs(models, x, passed="forward+backward", times=False, **options)
    kept = 10 * 2 * 4 * PLAIN["num_feat"] * 16**2  # of 10 blocks more, the maps that their two convolutions read
    assert learns["deep"].bytes - learns["one"].bytes >= kept
    assert infers["deep"].bytes == infers["one"].bytes
    assert infers["one"].milliseconds is not None
    assert infers["one"].milliseconds.median > 0
    assert learns["one"].milliseconds is None
    assert costs(models, x, passed="forward", times=False, **{**options, "limit": 0.0}) == {}


def test_growth_is_the_exponent_over_pixels() -> None:
    assert growth({10: 5.0, 20: 20.0}) == pytest.approx(1.0)
    assert growth({10: 1.0, 20: 7.0, 30: 81.0}) == pytest.approx(2.0)


# --- reports ----------------------------------------------------------------------------------------------------------


def test_student_t_as_scipy_has_it() -> None:
    from scipy import stats

    generator = np.random.default_rng(0)
    told = 0
    for _ in range(300):
        numbers = generator.normal(0.5, 1, generator.integers(2, 11)).tolist()
        p = stats.ttest_1samp(numbers, 0.0).pvalue
        if abs(p - 0.05) > 1e-3:  # our quantiles have three figures
            assert stands_out(numbers) == (p < 0.05)
            told += stands_out(numbers)
    assert 10 < told < 290
    assert not stands_out([5.0])


def document(psnrs: dict[str, Sequence[float]]) -> dict[str, Any]:
    number = len(next(iter(psnrs.values())))
    return {
        "budget": {"upscale": 2, "iterations": 300, "batch": 4, "patch": 24, "learning_rate": 1e-3},
        "seeds": list(range(number)),
        "pictures": {"train": 10, "validation": 2},
        "bicubic": 30.125,
        "results": {
            name: {str(seed): {"psnr": value} for seed, value in enumerate(values)} for name, values in psnrs.items()
        },
    }


def test_differences_are_of_the_same_seed() -> None:
    """Two networks that differ by less than seeds do, and yet always."""
    figure = FIGURES["elan-lfe"](SMALL)
    found = document({"1×1": [30.0, 31.0, 32.0], "shift-conv": [30.1, 31.11, 32.09], "3×3": [30.5, 30.6, 32.3]})
    assert differences(found, "shift-conv", "1×1") == pytest.approx([0.1, 0.11, 0.09])
    text = markdown(figure, found)
    assert "| shift-conv | 31.100 ± 0.995 | +0.100 ± 0.010 |" in text
    assert "| 1×1 | 31.000 ± 1.000 | – |" in text
    assert "| bicubic interpolation | 30.12 |" in text
    assert "(Student's t of the differences, 5 %): shift-conv. More seeds would detect smaller" in text
    assert "3 seeds, with the same initial weights, patches and steps." in text
    alone = markdown(figure, document({"1×1": [30.0], "shift-conv": [30.1], "3×3": [30.5]}))
    assert "With one seed, no difference can be called significant." in alone


@pytest.mark.parametrize("label", FIGURES)
def test_the_page_says_what_is_on_record(label: str) -> None:
    """`python -m benchmarks.paper page --page docs/paper.md` writes both."""
    page = (DOCS / "paper.md").read_text(encoding="utf-8")
    record = DOCS / "assets" / f"paper-{label}.json"
    figure = FIGURES[label](SMALL)
    assert f": {figure.title}\n\n<!-- paper {label} -->\n" in page
    said = section(figure, label, json.loads(record.read_text())) if record.exists() else ""
    assert fill(page, label, said) == page


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    for index in range(2):
        saved(tmp_path / "train", f"{index}.png", noise(40, 36, 3, seed=index))
        saved(tmp_path / "val", f"{index}.png", noise(36, 40, 3, seed=9 + index))
    monkeypatch.setitem(command.SCALES, "small", TINY)
    monkeypatch.setattr("benchmarks.paper.experiment._ROUNDS", 1)
    return ["--data", str(tmp_path / "train"), "--val", str(tmp_path / "val"), "--output", str(tmp_path / "out")]


SOME = ("lcoa-2", "lcoa-3", "lcoa-5", "elan-asa")


def test_figures_from_pictures_to_page(
    folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SOME, *folders, "--seeds", "0", "1", "--costs", "memory"]) == 0
    text = capsys.readouterr().out
    for label in SOME:
        assert f"## {FIGURES[label](TINY).title}\n" in text
    monkeypatch.setattr(training, "fit", lambda *_: pytest.fail("what is there is trained again"))
    assert main(["lcoa-3", *folders, "--seeds", "1", "0", "--costs", "none"]) == 0
    again = capsys.readouterr().out
    assert " MiB |" in again  # costs of the run before are kept
    page = tmp_path / "page.md"
    page.write_text("".join(f"<!-- paper {label} -->\n<!-- end {label} -->\n" for label in FIGURES))
    assert main(["page", "--output", folders[-1], "--page", str(page)]) == 0
    filled = page.read_text()
    assert "<!-- paper elan-lfe -->\n<!-- end elan-lfe -->\n" in filled  # of which there is nothing
    assert "elan-lfe: no results in" in capsys.readouterr().err
    for label in SOME:
        assert f"](assets/paper-{label}.png)" in filled
        assert (tmp_path / "assets" / f"paper-{label}.png").read_bytes().startswith(b"\x89PNG")
        kept = (tmp_path / "assets" / f"paper-{label}.json").read_bytes()
        assert kept == (tmp_path / "out" / f"{label}.json").read_bytes()
    found = json.loads((tmp_path / "out" / "lcoa-3.json").read_text())
    mean = sum(one["psnr"] for one in found["results"]["no attention"].values()) / 2
    assert f"| no attention | {mean:.3f} ± " in filled
    assert main(["page", "--output", folders[-1], "--page", str(page)]) == 0
    assert page.read_text() == filled
