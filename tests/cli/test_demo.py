"""The web page of `sparse-sr demo`: what it computes, through its server, and in a browser where there is one."""

import importlib.util
import json
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from skimage import data

from sparse_sr_attn import EDSR, load_model
from sparse_sr_attn.cli.demo import attend, enlarge
from sparse_sr_attn.data.imresize import imresize

pytestmark = pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="needs gradio")
CAT = np.ascontiguousarray(data.chelsea()[60:124, 80:160])


def test_an_image_is_enlarged_by_both() -> None:
    model = load_model("LCoAN-light_x2")
    bicubic, result = enlarge(model, CAT)
    assert np.array_equal(bicubic, imresize(torch.from_numpy(CAT.copy()), size=(128, 160)).numpy())
    with torch.no_grad():
        expected = model(torch.from_numpy(CAT.copy()).permute(2, 0, 1)[None] / 255)
    assert np.array_equal(result, (expected[0] * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy())


@pytest.mark.parametrize(("x", "y"), [(0, 0), (399, 299), (170, 210)])
def test_attention_is_that_around_the_pixel(x: int, y: int) -> None:
    pixels = np.ascontiguousarray(data.chelsea()[:300, :400])
    shown = attend(load_model("LCoAN-light_x2"), pixels, x, y)
    assert shown.shape == (160, 160, 3)
    (place,) = np.argwhere((shown == (0, 255, 0)).all(axis=-1))
    top, left = (min(max(0, at - 80), side - 160) for at, side in ((y, 300), (x, 400)))
    assert tuple(place) == (y - top, x - left)


@pytest.fixture
def url() -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "sparse_sr_attn", "demo", "--no-browser", "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        assert server.stdout is not None
        said = []
        for line in server.stdout:
            said.append(line)
            if "http" in line:
                break
        assert server.poll() is None, "".join(said)
        yield f"http://127.0.0.1:{port}"
        server.send_signal(signal.SIGINT)
        server.communicate(timeout=30)


@pytest.mark.slow
def test_the_command_serves_the_page(url: str) -> None:
    with urllib.request.urlopen(url, timeout=30) as answer:  # noqa: S310  (of this machine)
        text = answer.read().decode()
    config = json.loads(re.findall(r"window.gradio_config = (\{.*?\});</script>", text, re.DOTALL)[0])
    assert config["title"] == "sparse_sr_attn"
    assert any("EDSR-LCoA_x2, ×2" in str(part["props"].get("value")) for part in config["components"])
    (attention,) = (part["props"] for part in config["components"] if "attends" in str(part["props"].get("label")))
    assert "share" not in attention["buttons"]  # it would upload the picture


def test_a_network_without_attention_says_so() -> None:
    plain = EDSR(num_feat=8, num_block=1, upscale=2, img_range=1.0).eval()
    assert enlarge(plain, CAT)[1].shape == (128, 160, 3)
    with pytest.raises(ValueError, match="EDSR runs none"):
        attend(plain, CAT, 3, 4)
