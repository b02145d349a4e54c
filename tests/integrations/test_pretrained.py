"""Weights that a run starts from."""

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from basicsr.models import build_model
from basicsr_runs import told_at_the_end
from hostile import Payload

from sparse_sr_attn.cli.main import main
from sparse_sr_attn.errors import CheckpointError

Write = Callable[..., str]


def packed(value: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def each(change: Callable[[torch.Tensor], object]) -> Callable[[dict[str, Any]], bytes]:
    """Return what changes every weight of floating point."""

    def changed(weights: dict[str, Any]) -> bytes:
        return packed({"params": {k: change(v) if v.is_floating_point() else v for k, v in weights.items()}})

    return changed


READ = "must be weights that can be read as data, from a .safetensors or a whole torch.save file without code; got "
HOLD = "must hold weights, got "

HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], bytes], str]] = {
    "empty": (lambda _: b"", READ + "EOFError"),
    "one byte": (lambda _: b"\x80", READ + "IndexError: index out of range"),
    "half": (lambda weights: packed({"params": weights})[:30000], READ),
    "but the last byte": (lambda weights: packed({"params": weights})[:-1], READ),
    "code": (lambda _: packed({"params": Payload(Path("evil"))}), READ + "UnpicklingError: Weights only load failed"),
    "old code": (lambda _: pickle.dumps({"params": Payload(Path("evil"))}, protocol=2), READ + "UnpicklingError"),
    "a list": (lambda _: packed([1, 2]), HOLD + "TypeError"),
    "nothing": (lambda _: packed(None), HOLD + "TypeError"),
    "a tensor": (lambda _: packed(torch.zeros(3)), HOLD + "RuntimeError"),
    "text": (lambda _: packed({"params": "abc"}), HOLD + "AttributeError"),
    "numbered": (lambda _: packed({"params": {1: torch.zeros(1)}}), HOLD + "AttributeError"),
    "other entries": (lambda weights: packed({"weights": weights}), "must hold the weights under 'params'"),
    "NaN": (each(lambda v: v * float("nan")), "does not fit the network.\n  not finite: "),
    "infinity": (each(lambda v: v + float("inf")), "does not fit the network.\n  not finite: "),
    "integers": (each(lambda v: v.long()), "does not fit the network.\n  of wrong type: .*must be float32, got int64"),
    "complex": (each(lambda v: v.to(torch.complex64)), "does not fit the network.\n  of wrong type: "),
    "meta": (each(lambda v: v.to("meta")), "does not fit the network.\n  of wrong type: .* got meta float32"),
    "sparse": (each(lambda v: v.to_sparse()), "does not fit the network.\n  of wrong type: .* got torch.sparse_coo"),
    "numbers": (each(lambda v: 1.0), "does not fit the network.\n  of wrong type: .* must be float32, got float"),
    "no sizes": (
        each(lambda v: torch.zeros(())),
        r"does not fit the network\.\n  of another size: conv_first\.weight \(\) instead of",
    ),
    "too few": (
        lambda w: packed({"params": dict(list(w.items())[3:])}),
        r"does not fit the network\.\n  not in the file, outside attention: conv_first\.weight",
    ),
}


@pytest.mark.promise("R21")
def test_what_are_no_weights_is_told_in_a_few_lines_and_not_taken_up(
    options: Callable[..., dict[str, Any]], here: Path
) -> None:
    model = build_model(options())
    before = {name: value.clone() for name, value in model.net_g.state_dict().items()}
    file = here / "weights.pth"
    for name, (content, message) in HOSTILE.items():
        file.write_bytes(content(before))
        with pytest.raises(CheckpointError, match=rf"(?s)^{file}: {message}") as caught:
            model.load_network(model.net_g, str(file))
        told = str(caught.value)
        assert len(told.splitlines()) <= 10, name
        assert "PosixPath" not in told
        torch.testing.assert_close(dict(model.net_g.state_dict()), before, rtol=0, atol=0, msg=name)
    assert not (here / "evil").exists()
    file.write_bytes(each(lambda v: v.half())(before))  # which is what it was, but for rounding
    model.load_network(model.net_g, str(file))


def test_weights_that_are_none_end_the_command(training: Write, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "weights.pth").write_bytes(b"\x80")
    assert main(["train", "-opt", training({"path.pretrain_network_g": "weights.pth"})]) == 1
    assert told_at_the_end(capsys) == f"weights.pth: {READ}IndexError: index out of range\n"
