"""`python -m benchmarks.neighbors`: masses are those of `benchmarks.capture`, and times relative to the first row."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.capture.__main__ import main
from benchmarks.neighbors import __main__ as neighbors
from benchmarks.neighbors.__main__ import Variant
from sparse_sr_attn import LCoA


def test_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (36, 40, 3), dtype=np.uint8)).save("a.png")
    variants = (Variant("ring", 1, 4, 8), Variant("nearest", 2, 4, 8), Variant("ring", 1, 5, 8))
    monkeypatch.setattr(neighbors, "VARIANTS", variants)
    assert neighbors.main(["a.png", "--size", "12", "--rounds", "2", "--json", "found.json"]) == 0
    rows = json.loads(Path("found.json").read_text())["rows"]
    assert neighbors.markdown(rows) in capsys.readouterr().out
    for row, variant in zip(rows, variants, strict=True):
        keys = ["--keys", str(variant.num_keys), "--patterns", variant.pattern]
        assert main(["a.png", "--weights", "LCoAN-light_x2", *keys, "--json", "one.json"]) == 0
        mean = json.loads(Path("one.json").read_text())["mean"]
        assert {"mass": row["mass"], "num_keys": row["num_keys"]} == mean["patterns"][variant.pattern]
        assert set(row["times"]) == {"forward", "forward+backward"}
    assert all(time["relative"]["median"] == 1 for time in rows[0]["times"].values())
    assert [row["best"] for row in rows] == [rows[0]["best"]] * 3


@pytest.mark.parametrize("training", [False, True])
def test_what_is_timed_is_the_variant(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = []

    def build(*given: int, **options: Any) -> LCoA:
        layers.append(LCoA(*given, **options))
        return layers[-1]

    monkeypatch.setattr(neighbors, "LCoA", build)
    neighbors.call(Variant("nearest", 2, 5, 7), side=12, training=training)()
    (layer,) = layers
    lsp = layer.lsp
    assert (lsp.neighbors, lsp.num_adjacent, lsp.chunk_size, len(lsp.centroids)) == ("nearest", 2, 5, 7)
    assert layer.training == training == (layer.coa.value.weight.grad is not None)
