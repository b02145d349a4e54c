"""`sparse-sr list` names what there is, and counts what is there."""

import json
import subprocess
import sys

import pytest

from sparse_sr_attn import EDSR, LAYERS, PRESETS, RCAN, AttentionLayer, LCoAN, create_model
from sparse_sr_attn.cli.main import main
from sparse_sr_attn.layers.base import Registry


def tables(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, list[dict[str, object]]]:
    assert main(["list", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_json_has_all(capsys: pytest.CaptureFixture[str]) -> None:
    found = tables(capsys)
    assert set(found) == {"layers", "networks", "presets", "weights"}
    assert {row["name"] for row in found["layers"]} == set(LAYERS)
    assert {row["name"] for row in found["presets"]} == set(PRESETS)
    assert {"EDSR", "LCoAN", "RCAN"} <= {row["name"] for row in found["networks"]}
    for rows in found.values():
        for row in rows:
            assert set(row) >= {"name", "source", "about", "parameters", "options"}
            assert row["source"], row["name"]
            assert not {"Examples:", ">>>"} & set(row["source"].split()), row["name"]


def test_parameters_are_those_of_the_real_thing(capsys: pytest.CaptureFixture[str]) -> None:
    found = tables(capsys)
    networks = {row["name"]: row["parameters"] for row in found["networks"]}
    for build in (EDSR, RCAN, LCoAN):
        assert networks[build.__name__] == sum(p.numel() for p in build().parameters())
    presets = {row["name"]: row["parameters"] for row in found["presets"]}
    assert presets["LCoAN"] == 14_340_227  # of the paper
    assert presets["LCoAN-light"] == sum(p.numel() for p in create_model("LCoAN-light").parameters())
    layers = {row["name"]: row["parameters"] for row in found["layers"]}
    assert layers["CoA"] == 64 * 64 + 64


def test_options_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = tables(capsys, "LCoA")["layers"]
    assert row["kind"] == "layer"
    assert row["source"] == "Zhao et al., arXiv 2404.04922"
    options = row["options"]
    assert isinstance(options, dict)
    assert {"num_clusters": 128, "chunk_size": 144, "routing": "kmeans", "res_scale": 0.1}.items() <= options.items()
    assert "embed_dim" not in options


def test_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    titles = [line.partition(", with parameters")[:2] for line in lines if line and not line.startswith(" ")]
    assert titles == [(title, ", with parameters") for title in ("layers", "networks", "presets", "weights")]
    assert any(line.split()[:2] == ["LCoAN", "14,340,228"] and "arXiv 2404.04922 and" in line for line in lines)
    assert max(map(len, lines)) <= 120
    assert main(["list", "EDSR"]) == 0
    text = capsys.readouterr().out
    assert "num_block=16" in text
    assert "LCoAN" not in text


def test_unknown_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "LCoB"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("sparse-sr: no layer, network, preset or weights named LCoB; did you mean 'LCoA'? (known: ")
    assert {"CoA", "EDSR", "LCoAN-light"} <= set(err.partition("known: ")[2].partition(")")[0].split(", "))


def test_layers_of_others_are_listed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    other: Registry[AttentionLayer] = Registry("layer")

    @other.register("Mine", kind="layer", source="nobody, 2026")
    class Mine(AttentionLayer):
        """Does nothing."""

        def __init__(self, embed_dim: int, depth: int, width: float = 2.5) -> None:
            super().__init__()

    monkeypatch.setattr("sparse_sr_attn.cli.list.LAYERS", other)
    (row,) = tables(capsys)["layers"]
    assert row["about"] == "Does nothing."
    assert row["options"] == {"depth": None, "width": 2.5}
    assert row["parameters"] is None  # nobody knows the depth


def test_a_reader_that_stops_early_is_no_error() -> None:
    code = "from sparse_sr_attn.cli.main import main; import sys; sys.exit(main(['list', '--json']))"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        run.stdout.close()
        assert run.stderr.read() == ""
    assert run.returncode == 1
