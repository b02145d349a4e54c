"""`custom_imports`: what a user's own file registers can be named in his option file."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sparse_sr_attn import LAYERS, UnknownNameError
from sparse_sr_attn.cli.main import main
from sparse_sr_attn_basicsr.extensions import import_entry

Write = Callable[..., str]

LAYER = """
import torch
from torch import nn
from sparse_sr_attn import LAYERS, AttentionLayer
from sparse_sr_attn.config import PositiveInt, checked

@LAYERS.register("{name}", kind="layer", source="a test")
class Gain(AttentionLayer):
    @checked
    def __init__(self, embed_dim: PositiveInt, *, steps: PositiveInt = 1) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(embed_dim, 1, 1))

    def forward(self, x, state=None):
        return x * self.gain
"""


def attention(name: str, **options: object) -> dict[str, object]:
    return {"network_g.attention": {"type": name, "every": 2, **options}}


@pytest.mark.parametrize(("entry", "name"), [("gain_file.py", "GainFile"), ("gain_module", "GainModule")])
def test_a_layer_of_the_users_own_trains(entry: str, name: str, training: Write, here: Path) -> None:
    (here / entry).with_suffix(".py").write_text(LAYER.format(name=name))
    with pytest.raises(UnknownNameError):
        LAYERS.get(name)
    try:
        assert main(["train", "-opt", training({"custom_imports": [entry], **attention(name), "val": ...})]) == 0
        # Again in the same process: it is not imported twice.
        assert main(["train", "-opt", training({"custom_imports": [entry], **attention(name), "val": ...})]) == 0
    finally:
        LAYERS._entries.pop(name, None)
    assert (here / "experiments" / "tiny" / "models" / "net_g_latest.pth").is_file()


def test_its_options_are_checked_like_ours(training: Write, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "gain_options.py").write_text(LAYER.format(name="GainOptions"))
    try:
        file = training({"custom_imports": ["gain_options.py"], **attention("GainOptions", step=0)})
        assert main(["train", "-opt", file]) == 2
    finally:
        LAYERS._entries.pop("GainOptions", None)
    assert "network_g.attention.step: unknown; did you mean 'steps'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("layers.py", "custom_imports: must be a list or ~ (nothing), got 'layers.py'"),
        (["nowhere.py"], "custom_imports.0: nowhere.py cannot be imported: FileNotFoundError: there is no file"),
        (["no_such_module"], "custom_imports.0: no_such_module cannot be imported: ModuleNotFoundError"),
        (["broken.py"], "custom_imports.0: broken.py cannot be imported: ZeroDivisionError: division by zero"),
        ([3], "custom_imports: must be a string or ~ (nothing), got [3]"),
    ],
)
def test_what_cannot_be_imported_is_explained(
    value: object, message: str, training: Write, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "broken.py").write_text("1 / 0")
    assert main(["train", "-opt", training({"custom_imports": value})]) == 2
    assert message in capsys.readouterr().err
    assert not (here / "experiments").exists()


def test_a_file_can_import_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "my_blocks_beside.py").write_text("WIDTH = 7\n")
    (tmp_path / "my_net.py").write_text("from my_blocks_beside import WIDTH\n")
    before = [*sys.path]
    assert import_entry(str(tmp_path / "my_net.py")).WIDTH == 7
    assert sys.path == before


def test_a_host_of_another_name_is_suggested(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "my_host.py").write_text("from torch.nn import Module\n\nclass TinySR(Module):\n    pass\n")
    host = f"{tmp_path / 'my_host.py'}:TinySr"
    assert main(["upscale", __file__, "--weights", "LCoAN-light_x2", "--host", host]) == 2
    assert "my_host.py has no 'TinySr'; did you mean 'TinySR'? (known: Module, TinySR)" in capsys.readouterr().err
