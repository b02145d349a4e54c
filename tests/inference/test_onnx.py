"""ONNX files give the network's images at sizes they have not seen; the check notices when they do not."""

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from sparse_sr_attn import EDSR, ELAN, RCAN, ExportError, LCoAN
from sparse_sr_attn.cli.main import main
from sparse_sr_attn.functional.cluster import with_nearest_chunks
from sparse_sr_attn.inference import onnx as module
from sparse_sr_attn.inference.onnx import TOLERANCE, compare, export_onnx

OTHER_SIZES = [(17, 23), (5, 40), (30, 31), (1, 60), (1, 1), (48, 80)]


def low(size: tuple[int, int], channels: int = 3) -> Tensor:
    return torch.rand(1, channels, *size, generator=torch.Generator().manual_seed(sum(size)))


def attending(**options: Any) -> EDSR:
    """One layer computes, one reuses, and their attention is most of the image."""
    torch.manual_seed(0)
    layer = {"type": "LCoA", "every": 1, "share": 2, "chunk_size": 16, "num_clusters": 4, "zero_init": False}
    # Raw queries and clusters in the order of their index: who is in which matters much.
    attention = {**layer, "similarity": "dot", "cluster_order": "index", "res_scale": 2.0, **options}
    return EDSR(num_feat=8, num_block=2, upscale=2, img_range=1.0, attention=attention).eval()


def plain() -> EDSR:
    torch.manual_seed(0)
    return EDSR(1, 1, num_feat=4, num_block=1, upscale=3).eval()


def run(file: Path, image: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {"image": image.numpy()})
    return torch.from_numpy(result)


def same_at_other_sizes(model: nn.Module, file: Path) -> None:
    for size in OTHER_SIZES:
        with torch.no_grad():
            expected = model(low(size, model.num_in_ch))
        torch.testing.assert_close(run(file, low(size, model.num_in_ch)), expected, rtol=0, atol=TOLERANCE)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[EDSR, onnx.ModelProto, Path]:
    """A network with attention, as it is exported with its clusters, and the file without them."""
    model = attending()
    with pytest.MonkeyPatch.context() as patch:
        made: list[onnx.ModelProto] = []
        real = module._exported

        def noted(model: Any) -> onnx.ModelProto:
            proto = real(model)
            made.append(copy.deepcopy(proto))
            return proto

        patch.setattr(module, "_exported", noted)
        file = tmp_path_factory.mktemp("onnx") / "net.onnx"
        deviations = export_onnx(model, file)
    assert len(deviations) == 4
    assert all(deviation.good for deviation in deviations)
    return model, made[0], file


@pytest.mark.promise("R15")
def test_attention_at_other_sizes(exported: tuple[EDSR, onnx.ModelProto, Path]) -> None:
    model, _, file = exported
    same_at_other_sizes(model, file)
    off = copy.deepcopy(model)
    off.attention[0].coa.res_scale = off.attention[1].res_scale = 0.0
    with torch.no_grad():  # attention matters here, so it was compared
        assert float((off(low((17, 23))) - model(low((17, 23)))).abs().max()) > 100 * TOLERANCE


def test_what_the_file_says(exported: tuple[EDSR, onnx.ModelProto, Path]) -> None:
    proto = onnx.load(exported[2])
    onnx.checker.check_model(proto, full_check=True)
    sides = [dim.dim_param or dim.dim_value for dim in proto.graph.input[0].type.tensor_type.shape.dim]
    assert sides == [1, 3, "height", "width"]
    assert [value.name for value in (*proto.graph.input, *proto.graph.output)] == ["image", "upscaled"]
    assert {entry.key: entry.value for entry in proto.metadata_props} == {
        "upscale": "2",
        "channels": "3",
        "network": "EDSR",
    }


def test_the_check_leaves_the_network_alone(exported: tuple[EDSR, onnx.ModelProto, Path]) -> None:
    model, proto, _ = exported
    before = {key: value.clone() for key, value in model.state_dict().items()}
    compare(model, proto, (9, 9))
    assert not any(part._forward_hooks for part in model.modules())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_the_check_notices_another_image(exported: tuple[EDSR, onnx.ModelProto, Path]) -> None:
    model, proto, _ = exported
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.conv_last.bias += 2 * TOLERANCE
    found = compare(other, proto, (20, 20))
    assert not found.good
    assert found.num_moved == 0
    assert 1.5 * TOLERANCE < found.under_one_pattern < 3 * TOLERANCE


def test_cosines_and_chains_go_to_onnx(tmp_path: Path) -> None:
    model = attending(similarity="cosine", cluster_order="chain", num_clusters=20)
    with torch.no_grad():
        model.train()(low((20, 20)))
    model.eval()
    assert all(deviation.good for deviation in export_onnx(model, tmp_path / "net.onnx"))
    same_at_other_sizes(model, tmp_path / "net.onnx")


def test_nearest_chunks_go_to_onnx(tmp_path: Path) -> None:
    """Maps of fewer chunks than a token sees, too; and other neighbours than the network's are noticed."""
    model = attending(neighbors="nearest", chunk_size=9, num_adjacent=2, num_clusters=12)
    assert all(deviation.good for deviation in export_onnx(model, tmp_path / "net.onnx"))
    same_at_other_sizes(model, tmp_path / "net.onnx")
    proto, lsp = module._exported(model), model.attention[0].lsp

    def other(choice: nn.Module, reasons: tuple[Any, ...], found: Tensor) -> Tensor:
        _, pattern, keys = reasons
        return with_nearest_chunks(pattern, keys.flip(1)).neighbors

    with lsp.neighbor_choice.register_forward_hook(other):
        found = compare(model, proto, (20, 20))
    assert found.num_moved == 0
    assert found.under_one_pattern <= TOLERANCE
    assert not found.good


def test_the_check_notices_other_clusters(exported: tuple[EDSR, onnx.ModelProto, Path]) -> None:
    """Under one pattern the image is the same; but these were no ties."""
    model, proto, _ = exported
    other = copy.deepcopy(model)
    other.attention[0].lsp.centroids.copy_(other.attention[0].lsp.centroids.roll(1, dims=0))
    found = compare(other, proto, (20, 20))
    assert found.num_moved > 100
    assert found.under_one_pattern <= TOLERANCE < found.as_is
    assert found.margin > 0.01
    assert not found.good


def test_ties_may_fall_either_way(exported: tuple[EDSR, onnx.ModelProto, Path]) -> None:
    """The first centroid and the last are one but for rounding, and the two programs choose differently."""
    model, proto, _ = exported
    model, proto = copy.deepcopy(model), copy.deepcopy(proto)
    centroids = model.attention[0].lsp.centroids
    (held,) = (w for w in proto.graph.initializer if np.array_equal(onnx.numpy_helper.to_array(w), centroids.numpy().T))
    centroids[-1] = centroids[0]
    theirs = centroids.clone()
    centroids[-1] *= 1 + 3e-6
    theirs[0] *= 1 + 3e-6
    held.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(theirs.numpy().T), held.name))
    found = compare(model, proto, (20, 20))
    assert found.num_moved > 20
    assert found.as_is > TOLERANCE
    assert found.good


def test_nothing_is_written_when_the_check_fails(
    exported: tuple[EDSR, onnx.ModelProto, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, proto, _ = exported
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.conv_last.bias += 1e-3
    monkeypatch.setattr(module, "_exported", lambda _: copy.deepcopy(proto))
    with pytest.raises(ExportError, match=r"same image within 0.0001, and does not at 3x5: off by 1.0e-03 under one"):
        export_onnx(other, tmp_path / "net.onnx")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------ the command


def test_command(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"params": plain().state_dict()}, "net.pth")
    assert main(["export", "net.pth", "-o", "net.onnx", "--size", "9", "7", "--size", "1", "1"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = captured.out.splitlines()
    assert [line.split()[:3] for line in lines[:2]] == [["9", "x", "7"], ["1", "x", "1"]]
    assert lines[2] == "net.pth -> net.onnx"
    same_at_other_sizes(plain(), here / "net.onnx")
    assert main(["export", "net.pth", "-o", "net.onnx"]) == 2
    assert "net.onnx already exists; use --overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["net.pth", "-o", "net.pt"], "--output must end in .onnx, got net.pt"),
        (["net.pth", "-o", "net.pth"], "--output must end in .onnx, got net.pth"),
        (["net.pth", "-o", "net.onnx", "--size", "0", "3"], "--size must be HEIGHT and WIDTH, each >= 1"),
        (["no.pth", "-o", "net.onnx"], "no.pth: there is no such file"),
    ],
)
def test_one_line_errors(arguments: list[str], message: str, refused: Callable[..., None]) -> None:
    torch.save(plain().state_dict(), "net.pth")
    refused(["export", *arguments], f"sparse-sr: {message}\n")


def test_training_mode_and_suffix_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"evaluation mode; call \.eval\(\)"):
        export_onnx(plain().train(), tmp_path / "net.onnx")
    with pytest.raises(ExportError, match=r"must end in \.onnx"):
        export_onnx(plain(), tmp_path / "net.pth")


def test_without_the_packages_it_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['onnxruntime'] = sys.modules['onnxscript'] = None\n"
        "from sparse_sr_attn.cli.main import main; sys.exit(main(['export', 'a.pth', '-o', 'a.onnx']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == (
        "sparse-sr: onnxruntime, onnxscript must be installed: python -m pip install onnxruntime onnxscript\n"
    )


# ----------------------------------------------------------------------------------------------------- more networks


NETWORKS = {
    "LCoAN": lambda: LCoAN(num_feat=8, num_group=3, num_block=1, chunk_size=20, num_clusters=5, res_scale=1.0),
    "LCoAN x4, nobody shares": lambda: LCoAN(
        num_feat=8, num_group=2, num_block=1, upscale=4, share=1, chunk_size=20, num_clusters=5, res_scale=1.0
    ),
    "LCoAN, published counting": lambda: LCoAN(
        num_feat=8, num_group=2, num_block=1, chunk_size=20, num_clusters=5, res_scale=1.0, count_keys_once=False
    ),
    "rounds of hashes": lambda: attending(num_rounds=2, routing="lsh", share=1),
    "no neighbours": lambda: attending(num_adjacent=0),
    "nearest chunks in rounds": lambda: attending(
        neighbors="nearest", chunk_size=9, num_adjacent=2, num_rounds=2, reuse="pattern"
    ),
    "states of patterns": lambda: attending(reuse="pattern"),
    "ELAN": lambda: ELAN(num_feat=12, num_block=2, upscale=2, window_sizes=(2, 4, 8), img_range=1.0),
    "RCAN x8": lambda: RCAN(num_feat=8, num_group=2, num_block=1, squeeze_factor=4, upscale=8),
}


@pytest.mark.promise("R15")
@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = NETWORKS[name]().eval()
    assert all(deviation.good for deviation in export_onnx(model, tmp_path / "net.onnx"))
    same_at_other_sizes(model, tmp_path / "net.onnx")
