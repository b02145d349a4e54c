"""Captured mass is what loops over pairs of tokens find, of the patterns that the layers have."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.capture.__main__ import main
from benchmarks.capture.mass import (
    PATTERNS,
    Pattern,
    Setting,
    attention_features,
    captured_mass,
    read_patterns,
)
from sparse_sr_attn import EDSR, ELAN, NLA, CategoryAttention, ConfigError, LCoA, LCoAN, ShapeError
from sparse_sr_attn.data.imresize import matlab_bicubic
from sparse_sr_attn.functional.cluster.order import chain_rank
from sparse_sr_attn.functional.kmeans import hash_directions
from sparse_sr_attn.functional.lsh import initial_hash
from sparse_sr_attn.reference import cluster as slow
from sparse_sr_attn.reference import kmeans as slow_kmeans
from sparse_sr_attn.reference import lsh as slow_lsh
from sparse_sr_attn.reference import window as slow_windows

HEIGHT, WIDTH, DIM = 5, 7, 3
NUM_TOKENS = HEIGHT * WIDTH


def features(seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(DIM, HEIGHT, WIDTH, generator=generator, dtype=torch.float64)


def units() -> Tensor:
    return nn.functional.normalize(features().flatten(1).T, dim=1)


def dense(temperature: float = 10.0) -> Tensor:
    """Dense attention, a row at a time."""
    rows = []
    for query in units():
        powers = torch.stack([(temperature * (query * key).sum()).exp() for key in units()])
        rows.append(powers / powers.sum())
    return torch.stack(rows)


def table(name: str, num_keys: int, *, steps: int = 3, seed: int = 0, trained: Any = None) -> Tensor:
    """Return who sees whom by a pattern."""
    (pattern,) = read_patterns([name], num_keys=num_keys)
    maps = units().T.view(1, DIM, HEIGHT, WIDTH)
    with torch.no_grad():
        return pattern.show(Setting(maps, num_keys, steps, seed, trained))(torch.arange(NUM_TOKENS))


def clustered(assignment: Tensor, chunk_size: int, num_adjacent: int = 1, place: Tensor | None = None) -> Tensor:
    """Return who sees whom in any of the rounds, by loops."""
    pattern = slow.cluster_pattern(assignment, chunk_size=chunk_size, num_adjacent=num_adjacent, place=place)
    return slow.visible_pairs(pattern).any(dim=0)


# ---------------------------------------------------------------------------------------------------------------- mass


def test_a_pattern_made_by_hand() -> None:
    """Token i sees itself and the one after it."""
    number = torch.arange(NUM_TOKENS)
    pairs = (number[:, None] == number) | (number[:, None] + 1 == number)
    pattern = Pattern("by hand", lambda setting: lambda queries: pairs[queries])
    found = captured_mass(features(), [pattern], num_keys=4, temperature=7.0)
    weights = dense(7.0)
    mass = sum(float(weights[i, i] + (weights[i, i + 1] if i + 1 < NUM_TOKENS else 0)) for i in range(NUM_TOKENS))
    best = sum(sum(sorted(row.tolist())[-4:]) for row in weights)
    entropy = -sum(weight * math.log(weight) for row in weights.tolist() for weight in row)
    assert found.patterns["by hand"].mass == pytest.approx(mass / NUM_TOKENS, rel=1e-10)
    assert found.patterns["by hand"].num_keys == pytest.approx(2 - 1 / NUM_TOKENS)
    assert found.best == pytest.approx(best / NUM_TOKENS, rel=1e-10)
    assert found.entropy == pytest.approx(entropy / NUM_TOKENS / math.log(NUM_TOKENS), rel=1e-10)


def test_blocks_of_queries_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    patterns = read_patterns(PATTERNS[:-6], num_keys=18)
    whole = captured_mass(features(), patterns, num_keys=18)
    monkeypatch.setattr("benchmarks.capture.mass._SCORES_PER_BLOCK", 4 * NUM_TOKENS + 1)  # 4 at a time, 3 at the end
    parts = captured_mass(features(), patterns, num_keys=18)
    assert parts.best == pytest.approx(whole.best, rel=1e-12)
    assert parts.entropy == pytest.approx(whole.entropy, rel=1e-12)
    for name, seen in whole.patterns.items():
        assert parts.patterns[name] == pytest.approx(seen, rel=1e-12)


def test_who_sees_all_captures_all() -> None:
    names = [name for name in PATTERNS if name != "trained"]
    num_keys = 9 * NUM_TOKENS  # the most chunks are nine
    found = captured_mass(features(), read_patterns(names, num_keys=num_keys), num_keys=num_keys)
    assert found.best == pytest.approx(1)
    assert set(found.patterns) == set(names)
    for seen in found.patterns.values():
        assert seen == pytest.approx((NUM_TOKENS, 1))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"features": torch.ones(2, 1, 1)}, ShapeError, r"two tokens or more, got shape \(2, 1, 1\)"),
        ({"features": torch.ones(1, 2, 3, 3)}, ShapeError, r"got shape \(1, 2, 3, 3\)"),
        ({"features": torch.full((2, 3, 3), math.nan)}, ValueError, "must be finite"),
        ({"num_keys": 0}, ValueError, "num_keys must be >= 1, .* got num_keys=0"),
        ({"temperature": 0.0}, ValueError, r"temperature=0\.0"),
        ({"temperature": math.inf}, ValueError, "temperature=inf"),
        ({"steps": -1}, ValueError, "steps=-1"),
        ({"patterns": [*read_patterns(["trained"], num_keys=9)]}, ConfigError, "needs features of an LSP"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        captured_mass(**{"features": features(), "patterns": [], **arguments})


# ------------------------------------------------------------------------------------------------------------ patterns


@pytest.mark.parametrize("order", ["index", "chain"])
@pytest.mark.parametrize(("num_adjacent", "chunk_size"), [(0, 12), (1, 4), (2, 2)])
def test_lcoa_is_its_clusters_on_a_ring(num_adjacent: int, chunk_size: int, order: str) -> None:
    """K-means from tokens drawn by the seed; each step moves all centroids to the mean direction.

    The chain is that of the centroids as they are after the last step.
    """
    generator = torch.Generator().manual_seed(3)
    centroids = units()[torch.randperm(NUM_TOKENS, generator=generator)[:5]]
    for _ in range(2):
        nearest = (units() @ centroids.T).argmax(dim=1)
        assert len(nearest.unique()) == 5  # else a dead one would start anew
        centroids = torch.stack([nn.functional.normalize(units()[nearest == k].sum(0), dim=0) for k in range(5)])
    assignment = slow_kmeans.assign(units()[None], centroids)
    place = chain_rank(centroids)[assignment] if order == "chain" else None
    found = table(f"LCoA:num_clusters=5,num_adjacent={num_adjacent},cluster_order={order}", 12, steps=2, seed=3)
    assert torch.equal(found, clustered(assignment, chunk_size, num_adjacent, place))
    if num_adjacent == 1 and order == "index":
        assert torch.equal(table("CategoryAttention:num_clusters=5", 12, steps=2, seed=3), found)


def test_nearest_chunks_are_those_of_similar_features() -> None:
    assignment = slow_kmeans.assign(units()[None], hash_directions(6, DIM, 2).double())
    pattern = slow.cluster_pattern(assignment, chunk_size=4, num_adjacent=1)
    pattern = replace(pattern, neighbors=slow.nearest_chunks(units()[None], pattern))
    name = "LCoA:num_clusters=6,routing=lsh,cluster_order=index"
    found = table(f"{name},neighbors=nearest", 12, seed=2)
    assert torch.equal(found, slow.visible_pairs(pattern)[0])
    assert not torch.equal(found, table(name, 12, seed=2))


@pytest.mark.parametrize("num_rounds", [1, 4])
@pytest.mark.parametrize("max_buckets", [4, 128])
def test_nlsa_is_all_rounds_of_its_hash(num_rounds: int, max_buckets: int) -> None:
    num_keys = 24
    chunk_size = num_keys // 3 // num_rounds
    rotations = initial_hash(num_rounds, max_buckets, DIM, 7).rotations
    num_buckets = slow_lsh.bucket_count(NUM_TOKENS, chunk_size, max_buckets)
    buckets = slow_lsh.hash_tokens(units()[None], rotations.double(), num_buckets)[0]
    name = f"NLSA:num_rounds={num_rounds},max_buckets={max_buckets}"
    assert torch.equal(table(name, num_keys, seed=7), clustered(buckets, chunk_size))
    assert not torch.equal(table(name, num_keys, seed=7), table(name, num_keys, seed=8))


def test_a_hash_of_lcoa_learns_nothing() -> None:
    assignment = slow_kmeans.assign(units()[None], hash_directions(6, DIM, 2).double())
    found = table("LCoA:num_clusters=6,routing=lsh,cluster_order=index", 12, steps=5, seed=2)
    assert torch.equal(found, clustered(assignment, 4))


def test_windows_are_as_large_as_the_keys_allow() -> None:
    assert torch.equal(table("windows", 15), slow_windows.visible_pairs(HEIGHT, WIDTH, 3))


def test_raster_order_is_one_cluster() -> None:
    assert torch.equal(table("raster", 13), clustered(torch.zeros(1, NUM_TOKENS, dtype=torch.int64), 4))


def test_trained_is_the_pattern_of_the_layer_itself() -> None:
    torch.manual_seed(0)
    layer = LCoA(8, num_clusters=5, chunk_size=4, reduction=2, num_rounds=2).double().train()
    x = torch.randn(1, 8, HEIGHT, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        layer(x)  # moves nothing yet, and leaves something pending
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    (embedding,) = attention_features(layer, x).values()
    found = captured_mass(embedding, read_patterns(["trained"], num_keys=24), num_keys=24, trained=layer.lsp)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert layer.training
    assert layer.lsp.training
    with torch.no_grad():
        pattern = layer.eval().attend(x).pattern
    pairs = slow.visible_pairs(pattern).any(dim=0)
    rows = nn.functional.normalize(embedding.flatten(1).T, dim=1)
    mass = float(((10 * rows @ rows.T).softmax(dim=1) * pairs).sum() / NUM_TOKENS)
    assert found.patterns["trained"] == pytest.approx((float(pairs.sum()) / NUM_TOKENS, mass), rel=1e-10)


def test_more_clusters_than_tokens() -> None:
    assert table("LCoA:num_clusters=100", 12).sum(dim=1).max() == 12


@pytest.mark.parametrize(
    ("names", "messages"),
    [
        (["LCoB"], ["LCoB: no such pattern; did you mean 'LCoA'? (known: LCoA, trained, NLSA,"]),
        (["LCoA:num_cluster=4"], ["LCoA:num_cluster=4: num_cluster: unknown; did you mean 'num_clusters'?"]),
        (["LCoA:num_clusters=0"], ["num_clusters: must be >= 1, got 0"]),
        (["LCoA:num_clusters"], ["options must be option=value,option=value, got 'num_clusters'"]),
        (["LCoA:chunk_size=4"], ["chunk_size: follows from the number of keys"]),
        (["NLSA:num_rounds=5"], ["NLSA:num_rounds=5: a token sees 15 chunks, which need as many keys; got 14"]),
        (["windows:shift=true"], ["windows:shift=true: shift: windows has no options"]),
        (["NLSA:num_rounds=0", "LCoA", "x"], ["num_rounds: must be >= 1, got 0", "x: no such pattern"]),
    ],
)
def test_names_that_are_wrong(names: list[str], messages: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        read_patterns(names, num_keys=14)
    assert len(caught.value.problems) == len(messages)
    for message in messages:
        assert message in str(caught.value)


# ------------------------------------------------------------------------------------------------------------ features


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        (
            lambda: EDSR(num_feat=8, num_block=4, img_range=1.0, attention={"type": "LCoA", "every": 1, "share": 2}),
            [(0, 2), (2, 2)],
        ),
        (
            lambda: EDSR(num_feat=8, num_block=4, img_range=1.0, attention={"type": "NLSA", "every": 2}),
            [(0, 2), (1, 2)],
        ),
        (lambda: EDSR(num_feat=8, num_block=4, img_range=1.0, attention={"type": "HSPA", "every": 4}), [(0, 2)]),
        (
            lambda: EDSR(num_feat=8, num_block=4, img_range=1.0, attention={"type": "CategoryAttention", "every": 4}),
            [(0, 8)],
        ),
        (lambda: EDSR(num_feat=8, num_block=4, img_range=1.0, attention={"type": "GMSA", "every": 4}), [(0, 8)]),
    ],
)
def test_features_of_layers_that_compute(model: Callable[[], nn.Module], layers: list[tuple[int, int]]) -> None:
    found = attention_features(model(), torch.rand(3, HEIGHT, WIDTH))
    assert [(int(name.split(".")[1]), len(one)) for name, one in found.items()] == layers
    assert all(one.shape[1:] == (HEIGHT, WIDTH) for one in found.values())


@torch.no_grad()
def test_features_are_the_embedding_or_else_the_input() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), NLA(8), nn.Conv2d(8, 8, 1), CategoryAttention(8), LCoA(8)).train()
    x = torch.rand(1, 3, HEIGHT, WIDTH)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = attention_features(model, x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    model.eval()
    expected = {"1": model[1].embed(model[0](x)), "3": model[:3](x), "4.lsp": model[4].lsp.embed(model[:4](x))}
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value[0])


def test_a_model_without_attention_has_none() -> None:
    with pytest.raises(ValueError, match="Sequential runs none"):
        attention_features(nn.Sequential(nn.Conv2d(3, 3, 1)), torch.rand(3, 4, 4))


# ------------------------------------------------------------------------------------------------------------- command


@pytest.fixture
def here(here: Path) -> Path:
    """A folder with images and weights in it."""
    (here / "photos").mkdir()
    rng = np.random.default_rng(0)
    for name, shape in (("a", (31, 27, 3)), ("b", (40, 40)), ("c", (20, 60, 3))):
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(here / "photos" / f"{name}.png")
    torch.manual_seed(0)
    networks = {
        "net": LCoAN(num_feat=8, num_group=2, num_block=1, upscale=2, num_clusters=5, chunk_size=7),
        "two": EDSR(num_feat=8, num_block=4, upscale=3, attention={"type": "LCoA", "every": 2}),
        "elan": ELAN(num_feat=8, num_block=2, upscale=2, window_sizes=(2, 4)),
        "plain": EDSR(num_feat=8, num_block=2, upscale=2),
    }
    for name, network in networks.items():
        torch.save({"params": network.state_dict()}, here / f"{name}.pth")
    return here


FAST = ["photos", "--weights", "net.pth", "--crop", "12", "--keys", "27"]


def test_table_figures_and_plot(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FAST, "--json", "new/a.json", "--plot", "new/a.png", "--steps", "2"]) == 0
    text = capsys.readouterr().out
    assert "| pattern | keys | captured | of the best possible |" in text
    assert "3 images, at most 12x12; features of body.0.attention.lsp of net.pth." in text
    assert (here / "new/a.png").read_bytes().startswith(b"\x89PNG")
    document = json.loads((here / "new/a.json").read_text())
    assert list(document["images"]) == ["a", "b", "c"]
    assert document["settings"]["keys"] == 27
    mean = document["mean"]
    assert list(mean["patterns"]) == list(PATTERNS)
    for key in ("mass", "num_keys"):
        each = [one["patterns"]["LCoA"][key] for one in document["images"].values()]
        assert mean["patterns"]["LCoA"][key] == pytest.approx(sum(each) / 3)
    seen = mean["patterns"]["trained"]
    share = f"{seen['mass'] / mean['best']:.2f}"
    assert f"| trained | {seen['num_keys']:.0f} | {seen['mass']:.3f} | {share} |" in text
    assert f"| best possible | 27 | {mean['best']:.3f} | 1.00 |" in text
    assert f"its entropy is {mean['entropy']:.3f} of log(n)" in text


def test_features_are_those_of_the_middle_shrunk(here: Path) -> None:
    """By hand: of the second layer of a network for x3, on the second image, which is drawn by its number."""
    command = ["photos", "--weights", "two.pth", "--crop", "9", "--layer", "1", "--limit", "2"]
    command += ["--patterns", "LCoA:num_clusters=6", "--keys", "9", "--temperature", "4", "--json", "a.json"]
    assert main(command) == 0
    document = json.loads(Path("a.json").read_text())
    assert list(document["images"]) == ["a", "b"]
    small = matlab_bicubic(torch.from_numpy(np.array(Image.open("photos/b.png"))), 3)  # 13x13
    image = small[2:11, 2:11].expand(3, -1, -1).float() / 255
    torch.manual_seed(0)
    from sparse_sr_attn import load_model

    found = list(attention_features(load_model("two.pth"), image).values())
    patterns = read_patterns(["LCoA:num_clusters=6"], num_keys=9)
    expected = captured_mass(found[1], patterns, num_keys=9, temperature=4.0, seed=1)
    assert document["images"]["b"]["best"] == pytest.approx(expected.best, rel=1e-5)
    seen = document["images"]["b"]["patterns"]["LCoA:num_clusters=6"]
    assert (seen["num_keys"], seen["mass"]) == pytest.approx(expected.patterns["LCoA:num_clusters=6"], rel=1e-5)


def test_of_a_network_without_clusters(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All but the pattern that was trained, unless it is asked for."""
    command = ["photos/a.png", "--weights", "elan.pth", "--crop", "8", "--keys", "12"]
    assert main([*command, "--layer", "1"]) == 0
    text = capsys.readouterr().out
    assert "| LCoA | 12 |" in text
    assert "trained" not in text
    assert "1 image, at most 8x8; features of body.1.attention.0 of elan.pth." in text
    assert main([*command, "--patterns", "trained"]) == 2
    error = capsys.readouterr().err
    assert (
        error == "sparse-sr: --patterns trained needs a layer with clusters (LCoA), but body.0.attention.0 has none\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keys", "0"], "--keys must be >= 1, got 0"),
        (["--keys", "2"], "--patterns LCoA: a token sees 3 chunks, which need as many keys; got 2"),
        (["--crop", "1"], "--crop must be >= 2, got 1"),
        (["--crop", "513"], "--crop must be <= 512, got 513: all pairs of pixels are compared"),
        (["--steps", "-1"], "--steps must be >= 0, got -1"),
        (["--limit", "0"], "--limit must be >= 1, got 0"),
        (["--layer", "-1"], "--layer must be >= 0, got -1"),
        (["--layer", "1"], "--layer must be from 0 to 0, got 1"),
        (["--temperature", "0"], "--temperature must be > 0 and finite, got 0"),
        (["--temperature", "nan"], "--temperature must be > 0 and finite, got nan"),
        (["--patterns", "LCoA", "LCoB"], "--patterns LCoB: no such pattern; did you mean 'LCoA'?"),
        (["--patterns", "LCoA:num_clusters=-1"], "--patterns LCoA:num_clusters=-1: num_clusters: must be >= 1, got -1"),
        (["--plot", "a.jpg"], "--plot must end in .png, got a.jpg"),
        (["--json", "photos"], "photos cannot be written: Is a directory"),
        (["--plot", "net.pth/a.png"], "net.pth/a.png cannot be written: Not a directory"),
        (["--device", "tpu"], "--device must be one that torch can use here, got 'tpu'"),
    ],
)
def test_a_wrong_command_line(arguments: list[str], message: str, refused: Callable[..., None]) -> None:
    refused([*FAST, *arguments], message, command=main)


def test_what_cannot_be_used(here: Path, refused: Callable[..., None]) -> None:
    (here / "photos/d.png").write_bytes(b"no image")
    refused([*FAST, "--weights", "plain.pth"], "but the EDSR of plain.pth has none", command=main)
    refused([*FAST, "--json", "a.json"], "sparse-sr: photos/d.png: ", 1, command=main)
