"""Where pixels attend is what dense attention says; the overlap of layers is what it should be."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from sparse_sr_attn import EDSR, ELAN, GMSA, LSP, AttentionLayer, CoA, LCoA, LCoAN, ShapeError
from sparse_sr_attn.cli.main import main
from sparse_sr_attn.functional.kmeans import initial_state
from sparse_sr_attn.inference.visualize import (
    attention_entropy,
    attention_map_of,
    attention_overlap,
    attention_states,
    heatmap,
)
from sparse_sr_attn.reference import cluster as reference
from sparse_sr_attn.reference import window as slow_windows

SIZE = (6, 9)


def features(height: int = 6, width: int = 9) -> Tensor:
    return torch.randn(1, 8, height, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def picture(height: int = 6, width: int = 9) -> Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(1))


def lsp(**options: Any) -> LSP:
    torch.manual_seed(0)
    return LSP(8, **{"num_clusters": 5, "chunk_size": 7, "reduction": 2, **options}).double().eval()


def network(share: int) -> EDSR:
    torch.manual_seed(0)
    attention = {"type": "LCoA", "every": 1, "share": share, "num_clusters": 5, "chunk_size": 7}
    model = EDSR(num_feat=8, num_block=4, upscale=2, img_range=1.0, attention=attention).eval()
    for seed, pattern in enumerate(module for module in model.modules() if isinstance(module, LSP)):
        pattern.centroids.copy_(initial_state(5, 2, seed).centroids)  # they start alike in all layers
    return model


# ------------------------------------------------------------------------------------------------- where a pixel looks


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_adjacent": 0},
        {"num_adjacent": 2},
        {"count_keys_once": False},
        {"chunk_size": 100},
        {"neighbors": "nearest", "chunk_size": 4},
        {"neighbors": "nearest", "chunk_size": 20, "num_adjacent": 2},
    ],
    ids=str,
)
def test_is_the_row_of_dense_attention(options: dict[str, Any]) -> None:
    pattern = lsp(**options)
    with torch.no_grad():
        query, who = pattern.route(features())
        maps = attention_map_of(pattern(features()), torch.arange(54))
    key = torch.nn.functional.normalize(query, dim=-1)
    dense = reference.cluster_attention(query, key, torch.eye(54, dtype=torch.float64)[None], who)[0]
    assert maps.shape == (54, *SIZE)
    torch.testing.assert_close(maps.flatten(1), dense, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shift", [False, True])
def test_in_windows_is_the_mean_row_of_dense_attention(shift: bool) -> None:
    """Of each group by loops over its windows, padded and odd ones too."""
    torch.manual_seed(0)
    layer = GMSA(8, window_sizes=(2, 3, 4), shift=shift).double().eval()
    with torch.no_grad():
        state = layer.attend(features())
        maps = attention_map_of(state, torch.arange(54)).flatten(1)
    same = torch.eye(54, dtype=torch.float64).view(1, 54, *SIZE)  # what each pixel gathers are the numbers of its keys
    groups = [
        slow_windows.apply_window_weights(weights, same, window_size=size, shift=size // 2 if shift else 0)
        for weights, size in zip(state.weights, (2, 3, 4), strict=True)
    ]
    torch.testing.assert_close(maps, sum(groups)[0].flatten(1).T / 3, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_in_windows_whose_weights_are_made_again() -> None:
    """Of windows so large that a state keeps their queries."""
    torch.manual_seed(0)
    layer = GMSA(8, window_sizes=(17,), shift=True).double().eval()
    state = layer.attend(features())
    assert state.weights == (None,)
    with torch.enable_grad():
        kept = layer.attend(features())
    torch.testing.assert_close(
        attention_map_of(state, torch.arange(54)),
        attention_map_of(kept, torch.arange(54)).detach(),
        rtol=1e-10,
        atol=1e-10,
    )
    torch.testing.assert_close(attention_overlap([state, state]), torch.ones(2, 2, dtype=torch.float64))


def test_of_several_rounds_is_their_sum() -> None:
    pattern = lsp(num_rounds=2)
    with torch.no_grad():
        state = pattern(features())
        maps = attention_map_of(state, torch.tensor([53, 0, 20])).flatten(1)
    same = torch.eye(54, dtype=torch.float64).expand(2, -1, -1)
    by_round = reference.apply_cluster_weights(state.weights, same, state.pattern)
    torch.testing.assert_close(maps, by_round.sum(dim=0)[[53, 0, 20]], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(maps.sum(dim=1), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("state", "tokens", "error", "message"),
    [
        (lambda: lsp()(features()), [54], ShapeError, "numbers from 0 to 53, got"),
        (lambda: lsp()(features()), [-1], ShapeError, "numbers from 0 to 53, got"),
        (lambda: lsp()(features().expand(2, -1, -1, -1)), [0], ShapeError, "one image, got one of 2"),
        (lambda: "state", [0], TypeError, "must be a ClusterAttention or a WindowAttention, got a str"),
    ],
)
def test_wrong_arguments(state: Callable[[], Any], tokens: list[int], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        attention_map_of(state(), torch.tensor(tokens))


# ------------------------------------------------------------------------------------------------------- all layers


@pytest.mark.parametrize("share", [1, 2, 4])
def test_states_are_those_that_layers_use(share: int) -> None:
    """Put each state in, in place of computing: the image stays what it was."""
    model = network(share)
    states = attention_states(model, picture())
    assert list(states) == [f"attention.{index}" for index in range(4)]
    assert len({id(state) for state in states.values()}) == 4 // share
    with torch.no_grad():
        expected = model(picture()[None])
        layers = [model.get_submodule(name) for name in states]
        hooks = [
            layer.register_forward_pre_hook(lambda _, args, state=state: (args[0], state))
            for layer, state in zip(layers, states.values(), strict=True)
        ]
        torch.testing.assert_close(model(picture()[None]), expected)
        for hook in hooks:
            hook.remove()


def test_of_lcoan_and_of_a_model_of_ones_own() -> None:
    torch.manual_seed(0)
    model = LCoAN(num_feat=8, num_group=3, num_block=1, num_clusters=5, chunk_size=7)
    assert list(attention_states(model, picture())) == [f"body.{index}.attention" for index in range(3)]
    own = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(LCoA(8)), LCoA(8))
    assert list(attention_states(own, picture())) == ["1.0", "2"]


def test_a_layer_within_a_layer_without_a_state() -> None:
    class Around(AttentionLayer):
        def __init__(self) -> None:
            super().__init__()
            self.inner = LCoA(3)

        def forward(self, x: Tensor, state: Any = None) -> Tensor:
            return self.inner(x)

    assert list(attention_states(nn.Sequential(Around(), LCoA(3)), picture())) == ["0.inner", "1"]


def test_without_attention_there_is_nothing_to_show() -> None:
    with pytest.raises(ValueError, match=r"layers with a state \(LCoA, GMSA, .*\), and EDSR runs none"):
        attention_states(EDSR(num_feat=8, num_block=1), picture())


# ---------------------------------------------------------------------------------------------------------- entropy


def test_entropy_is_that_of_the_weights() -> None:
    layer = lsp()
    x = features()
    state = layer(x)
    weights = attention_map_of(state, torch.arange(x.shape[2] * x.shape[3])).flatten(1).detach()
    shares = []
    for row in weights.tolist():
        seen = [weight for weight in row if weight > 0]
        shares.append(-sum(weight * math.log(weight) for weight in seen) / math.log(len(seen)))
    assert attention_entropy(state, num_tokens=10_000) == pytest.approx(sum(shares) / len(shares), abs=1e-6)


# ---------------------------------------------------------------------------------------------------------- overlap


def test_overlap_is_the_common_share_of_dense_attention() -> None:
    states = [lsp(chunk_size=size)(features()) for size in (7, 11, 54)]
    same = torch.eye(54, dtype=torch.float64)[None]
    dense = [reference.apply_cluster_weights(state.weights.detach(), same, state.pattern)[0] for state in states]
    with torch.no_grad():
        overlap = attention_overlap(states)
    for a in range(3):
        for b in range(3):
            common = sum(min(dense[a][i, j].item(), dense[b][i, j].item()) for i in range(54) for j in range(54)) / 54
            assert overlap[a, b].item() == pytest.approx(common, abs=1e-9)


def test_nothing_in_common_and_a_few_pixels() -> None:
    """With one key a query, two patterns that put each pixel with another have an overlap of 0."""
    alone = lsp(chunk_size=1, num_adjacent=0)(features())  # every pixel sees itself
    with torch.no_grad():
        itself = attention_map_of(alone, torch.tensor([0, 33]))
    assert itself.flatten(1).argmax(dim=1).tolist() == [0, 33]
    other = alone._replace(weights=torch.zeros_like(alone.weights))
    with torch.no_grad():
        overlap = attention_overlap([alone, other], num_tokens=5)
    assert overlap.tolist() == [[1.0, 0.0], [0.0, 0.0]]


def test_overlap_of_maps_of_several_sizes() -> None:
    with pytest.raises(ShapeError, match=r"one size, got \[\(5, 4\), \(6, 9\)\]"):
        attention_overlap([lsp()(features()), lsp()(features(5, 4))])
    with pytest.raises(ShapeError, match="got no layer"):
        attention_overlap([])


def test_heat() -> None:
    colours = heatmap(torch.tensor([[0.0, 1.0], [2.0, 3.0]]))
    assert colours.tolist() == [[[0, 0, 0], [255, 0, 0]], [[255, 255, 0], [255, 255, 255]]]
    assert heatmap(torch.zeros(2, 3)).sum() == 0


# ------------------------------------------------------------------------------------------------------ the command


@pytest.fixture
def here(here: Path) -> Path:
    torch.save({"params": network(2).state_dict()}, "net.pth")
    Image.fromarray((picture(40, 60).permute(1, 2, 0) * 255).byte().numpy()).save("photo.png")
    return here


def drawn(file: str) -> np.ndarray:
    with Image.open(file) as image:
        assert image.mode == "RGB"
        return np.asarray(image)


def test_clusters(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One colour a cluster, at each pixel where the layer itself has that cluster."""
    assert main(["inspect", "clusters", "photo.png", "--weights", "net.pth", "--layer", "2"]) == 0
    out = capsys.readouterr().out
    image = drawn("photo_clusters.png")
    factor = image.shape[1] // 60
    assert image.shape == (40 * factor, 60 * factor, 3)
    assert image.shape[1] >= 512
    pixels = image[::factor, ::factor].reshape(-1, 3)
    assert np.array_equal(np.kron(pixels.reshape(40, 60, 3), np.ones((factor, factor, 1), np.uint8)), image)
    low = torch.from_numpy(drawn("photo.png").astype(np.float32) / 255).permute(2, 0, 1)
    assignment = attention_states(network(2), low)["attention.2"].pattern.assignment[0]
    pairs = {(int(cluster), tuple(pixel)) for cluster, pixel in zip(assignment, pixels.tolist(), strict=True)}
    clusters = set(assignment.tolist())
    assert len(pairs) == len(clusters) == len({colour for _, colour in pairs})
    assert out.startswith(f"{len(clusters)} clusters in use")


def test_attention_of_a_pixel(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "attention", "photo.png", "--weights", "net.pth", "--pixel", "7", "30"]) == 0
    weight, _, _, x, y = capsys.readouterr().out.splitlines()[0].split()
    image = drawn("photo_attention.png")
    factor = image.shape[1] // 60
    assert tuple(image[30 * factor, 7 * factor]) == (0, 255, 0)
    low = torch.from_numpy(drawn("photo.png").astype(np.float32) / 255).permute(2, 0, 1)
    (weights,) = attention_map_of(attention_states(network(2), low)["attention.0"], torch.tensor([30 * 60 + 7]))
    assert float(weights[int(y), int(x)]) == float(weights.max()) == pytest.approx(float(weight), abs=1e-4)
    bright = image[::factor, ::factor, 0] > 100  # red beyond what the photograph behind has
    bright[30, 7] = bool(weights[30, 7] > 0)
    strong = (weights / weights.max()).sqrt().numpy() * 3 * 255 > 101
    assert np.array_equal(bright[strong], np.ones(strong.sum(), bool))
    assert not bright[weights.numpy() == 0].any()


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["attention", "photo.png", "--pixel", "60", "0"], 2, "--pixel must lie in the image, 0..59 and 0..39"),
        (["clusters", "photo.png", "--layer", "4"], 2, "--layer must be from 0 to 3, got 4"),
        (["clusters", "no.png"], 2, "no.png: no such image"),
        (["clusters", "photo.png", "-o", "x.gif"], 2, "--output x.gif must have one of the suffixes .png, .tif"),
        (["clusters", "photo.png", "-o", "net.png"], 2, "net.png already exists; use --overwrite"),
        (["clusters", "photo.png", "-o", "net.png", "--pixel", "60", "0"], 2, "--pixel must lie in the image"),
        (["clusters", "photo.png", "-o", "net.png", "--set", "chunk_size"], 2, "--set needs NAME=VALUE"),
        (["clusters", "net.pth"], 1, "net.pth: is not an image that Pillow can read"),
    ],
)
def test_one_line_errors(arguments: list[str], status: int, message: str, refused: Callable[..., None]) -> None:
    Path("net.png").touch()
    refused(["inspect", *arguments, "--weights", "net.pth"], f"sparse-sr: {message}", status)


def test_windows_of_a_network_that_pads(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The picture is that of the image, whatever the network works on."""
    torch.manual_seed(0)
    torch.save(ELAN(num_feat=6, num_block=2, share=2).state_dict(), "elan.pth")
    assert main(["inspect", "attention", "photo.png", "--weights", "elan.pth", "--pixel", "59", "39"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[:5]]
    assert all(int(x) < 60 and int(y) < 40 for *_, x, y in lines)
    assert sum(float(weight) for weight, *_ in lines) > 0.2  # the rest may lie where the network pads
    image = drawn("photo_attention.png")
    assert image.shape[0] * 60 == image.shape[1] * 40
    assert main(["inspect", "clusters", "photo.png", "--weights", "elan.pth"]) == 2
    assert "only LCoA and CoA have clusters, but body.0.attention.0 has windows" in capsys.readouterr().err


def test_weights_without_attention(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(EDSR(num_feat=8, num_block=1).state_dict(), "plain.pth")
    assert main(["inspect", "attention", "photo.png", "--weights", "plain.pth"]) == 2
    expected = "--weights must be of a network with attention, but the EDSR of plain.pth has none"
    assert capsys.readouterr().err == f"sparse-sr: {expected}\n"
    torch.save(
        EDSR(num_feat=8, num_block=1, img_range=1.0, attention={"type": "NLA", "every": 1}).state_dict(), "dense.pth"
    )
    assert main(["inspect", "attention", "photo.png", "--weights", "dense.pth"]) == 1
    assert capsys.readouterr().err.startswith("sparse-sr: dense.pth: attention can be shown for layers with a state")


def test_a_network_of_one_channel_sees_brightness(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    attention = {"type": "LCoA", "every": 1, "num_clusters": 5, "chunk_size": 7}
    torch.save(EDSR(1, 1, num_feat=8, num_block=1, upscale=2, attention=attention).state_dict(), "one.pth")
    deep = (drawn("photo.png").astype(np.uint16) @ np.array([299, 587, 114])) * 65535 // 255_000
    Image.fromarray(deep.astype(np.uint16)).save("deep.png")
    for file in ("photo.png", "deep.png"):  # the same picture in colour, and grey with 16 bits
        assert main(["inspect", "attention", file, "-w", "one.pth", "--pixel", "3", "4", "-o", f"map_{file}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == lines[7]
    off = np.abs(drawn("map_photo.png").astype(int) - drawn("map_deep.png").astype(int))
    assert int(off.max()) <= 2


def test_a_consumer_has_the_clusters_of_its_provider(here: Path) -> None:
    for layer in ("0", "1"):
        assert main(["inspect", "clusters", "photo.png", "-w", "net.pth", "--layer", layer, "-o", f"{layer}.png"]) == 0
    assert isinstance(network(2).attention[1], CoA)
    first, second = ([tuple(p) for p in drawn(f"{layer}.png").reshape(-1, 3).tolist()] for layer in "01")
    assert len(set(first)) == len(set(second)) == len(set(zip(first, second, strict=True)))
