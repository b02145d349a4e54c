"""Folders and repositories of the Hugging Face hub hold a network whole; bad ones are refused with one clear error."""

import base64
import hashlib
import importlib
import json
import os
import pickle
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from hostile import Payload
from safetensors.torch import load_file, save_file
from torch import nn

from sparse_sr_attn import EDSR, LAYERS, AttentionLayer, CheckpointError, ConfigError, LCoAN, load_model
from sparse_sr_attn.backbones.base import Network
from sparse_sr_attn.checkpoints import hub

FILES = {"README.md", "config.json", "model.safetensors"}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this process does reaches no network; who tries fails."""

    def refuse(*address: object) -> None:
        pytest.fail(f"nothing may be fetched, but {address} was asked")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def plain(**options: Any) -> EDSR:
    torch.manual_seed(0)
    return EDSR(**{"num_feat": 8, "num_block": 2, "upscale": 2, "img_range": 1.0, **options}).eval()


def assert_same(one: nn.Module, other: nn.Module) -> None:
    x = torch.rand(2, 3, 9, 10, generator=torch.Generator().manual_seed(0))
    assert type(one) is type(other)
    assert not one.training
    assert torch.equal(one(x), other(x))
    expected = other.state_dict()
    assert set(one.state_dict()) == set(expected)
    for key, value in one.state_dict().items():
        assert torch.equal(value, expected[key]), key


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --------------------------------------------------------------------------------------------------- there and back


def test_a_network_comes_back_from_its_folder(trained: Network, tmp_path: Path) -> None:
    hub.save_pretrained(trained, tmp_path / "deep" / "folder")
    assert {path.name for path in (tmp_path / "deep" / "folder").iterdir()} == FILES
    assert_same(hub.from_pretrained(tmp_path / "deep" / "folder"), trained)


@pytest.mark.parametrize("options", [{}, {"img_range": 255.0, "res_scale": 0.3}, {"rgb_mean": (0.1, 0.2, 0.3)}])
def test_a_network_without_attention_comes_back_with_all_its_options(options: dict[str, Any], tmp_path: Path) -> None:
    """Also if its weights do not record them: `config.json` does."""
    hub.save_pretrained(plain(**options), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("options", None)
    save_file(weights, tmp_path / "model.safetensors")
    assert_same(hub.from_pretrained(str(tmp_path)), plain(**options))


def test_weights_and_config_are_for_others_too(trained: Network, tmp_path: Path) -> None:
    """The weights load without this module, and the config can be read by people."""
    hub.save_pretrained(trained, tmp_path)
    assert_same(load_model(tmp_path / "model.safetensors"), trained)
    text = (tmp_path / "config.json").read_text(encoding="utf-8")
    config = json.loads(text)
    assert config.pop("type") == type(trained).__name__
    assert type(trained)(**config).state_dict().keys() == trained.state_dict().keys()
    assert '\n  "num_feat": ' in text
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: sparse_sr_attn\n")
    assert f"# {type(trained).__name__} ×{trained.upscale}\n" in card
    assert f'hub.from_pretrained("{tmp_path.name}")' in card
    scope: dict[str, object] = {}
    exec(re.findall(r"^from .* import .*$", card, flags=re.MULTILINE)[0], scope)  # noqa: S102  (the card is ours)
    assert scope["hub"] is hub


def test_subclasses_and_memory_formats(tmp_path: Path) -> None:
    """BasicSR's registry holds a subclass under another name."""

    class SparseEDSR(EDSR):
        pass

    model = SparseEDSR(num_feat=8, num_block=2, upscale=2, img_range=1.0).to(memory_format=torch.channels_last)
    hub.save_pretrained(model, tmp_path)
    again = hub.from_pretrained(tmp_path)
    assert type(again) is EDSR
    for key, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key


def test_overrides_go_before_the_config_and_that_before_the_weights(tmp_path: Path) -> None:
    model = LCoAN(num_feat=8, num_group=2, num_block=1, chunk_size=9, num_clusters=4)
    hub.save_pretrained(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "chunk_size": 5}))

    def chunk_size(**overrides: Any) -> int:
        return int(hub.from_pretrained(tmp_path, **overrides).body[0].attention.lsp.chunk_size)

    assert (chunk_size(), chunk_size(chunk_size=3)) == (5, 3)
    (tmp_path / "config.json").unlink()
    assert chunk_size() == 9
    again = hub.from_pretrained(tmp_path, upscale=4, allow_tail_reinit=True)
    assert again.upscale == 4
    with pytest.raises(ConfigError, match="chunk_sise: unknown; did you mean 'chunk_size'"):
        hub.from_pretrained(tmp_path, chunk_sise=3)


def test_a_folder_of_weights_alone_is_enough(tmp_path: Path) -> None:
    save_file(plain(img_range=255.0).state_dict(), tmp_path / "model.safetensors")
    assert_same(hub.from_pretrained(tmp_path), plain(img_range=255.0))


# ----------------------------------------------------------------------------------------------- what is there stays


def test_saving_again_replaces_all_but_the_readme(tmp_path: Path) -> None:
    hub.save_pretrained(plain(), tmp_path)
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "notes.txt").write_text("mine, too")
    hub.save_pretrained(plain(res_scale=0.5), tmp_path)
    assert_same(hub.from_pretrained(tmp_path), plain(res_scale=0.5))
    files = contents(tmp_path)
    assert files.keys() == FILES | {"notes.txt"}
    assert files["README.md"] == b"mine"


def full_disk(weights: object, path: Path) -> None:
    path.write_bytes(b"half of it")
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("reason", ["a full disk", "options without a word in JSON", "a wrapper"])
def test_what_cannot_be_saved_changes_nothing(reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Scaled(AttentionLayer):
        def __init__(self, embed_dim: int, *, how: Any = None) -> None:
            super().__init__()

    monkeypatch.setattr(LAYERS, "_entries", dict(LAYERS._entries))
    LAYERS.register("Scaled", kind="layer", source="this test")(Scaled)
    hub.save_pretrained(plain(), tmp_path)
    before = contents(tmp_path)
    if reason == "a full disk":
        monkeypatch.setattr(hub, "save_file", full_disk)
        with pytest.raises(OSError, match="No space left"):
            hub.save_pretrained(plain(res_scale=0.5), tmp_path)
    elif reason == "a wrapper":
        with pytest.raises(CheckpointError, match="a network of sparse_sr_attn, without a wrapper, got a DataParallel"):
            hub.save_pretrained(nn.DataParallel(plain()), tmp_path)  # type: ignore[arg-type]
    else:
        model = plain(attention={"type": "Scaled", "every": 1, "how": torch.relu})
        with pytest.raises(CheckpointError, match="all options of the EDSR must be such that JSON can write them"):
            hub.save_pretrained(model, tmp_path)
    assert contents(tmp_path) == before


# --------------------------------------------------------------------------------------------------- what is refused


def with_config(change: dict[str, Any] | bytes) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = folder / "config.json"
        whole = change if isinstance(change, bytes) else json.dumps({**json.loads(file.read_text()), **change}).encode()
        file.write_bytes(whole)

    return apply


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(folder / "ran")))
    (folder / "model.safetensors").write_bytes(pickle.dumps(Payload(folder / "ran")))


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


UNREADABLE = "must be a folder here or a repository of the hub, with model.safetensors and config.json that can be read"
BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "no weights": (without_weights, UNREADABLE),
    "cut weights": (cut, UNREADABLE),
    "pickled weights": (pickled, UNREADABLE),
    "a config that is no JSON": (with_config(b"{"), UNREADABLE),
    "a config that is a list": (with_config(b"[]"), UNREADABLE),
    "a config without end": (with_config(b"[" * 99_999), UNREADABLE),
    "a config of another network": (with_config({"type": "LCoAN"}), "must have the key 'body.0.attention.lsp"),
    "a config with an unknown option": (with_config({"model_type": "bert"}), "model_type: unknown"),
    "a config of a giant": (with_config({"num_block": 10**9}), "the options say num_block 1000000000, but the weights"),
    "a config that does not fit": (with_config({"num_feat": 9}), "the options say num_feat 9, but the weights have 8"),
}


@pytest.mark.promise("R21")
@pytest.mark.parametrize("name", BAD)
def test_bad_folders_give_one_clear_error(name: str, tmp_path: Path) -> None:
    """And nothing that is in them runs."""
    hub.save_pretrained(plain(), tmp_path)
    spoil, message = BAD[name]
    spoil(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        hub.from_pretrained(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}: ")
    assert message in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("source", ["nobody/nothing", "no/such/folder", "./nowhere"])
def test_what_is_neither_here_nor_there(source: str) -> None:
    with pytest.raises(CheckpointError, match=f"^{re.escape(source)}: {UNREADABLE}; got "):
        hub.from_pretrained(source)


def test_the_package_does_without_huggingface_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.delitem(sys.modules, "sparse_sr_attn.checkpoints.hub")
    with pytest.raises(ImportError, match="needs huggingface_hub: pip install huggingface_hub$"):
        importlib.import_module("sparse_sr_attn.checkpoints.hub")


# ---------------------------------------------------------------------------------- publishing, to a hub of our own


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's protocol as it takes to make a repository, to commit files to it and to fetch them."""

    files: dict[str, bytes]
    asked: list[str]
    revision = "0" * 40

    def log_message(self, format: str, *args: object) -> None:
        pass

    def answer(self, body: object, status: int = 200, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.asked.append(f"POST {self.path} {self.headers['Authorization']}")
        if self.path == "/api/repos/create":
            self.asked.append(body.decode())
            self.answer({"url": f"http://{self.headers['Host']}/me/tiny"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif self.path == "/api/models/me/tiny/preupload/main":
            paths = [file["path"] for file in json.loads(body)["files"]]
            self.answer({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]})
        elif self.path.startswith("/api/models/me/tiny/commit/main"):
            for item in map(json.loads, body.splitlines()):
                if item["key"] == "file":
                    self.files[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
            self.answer({"commitUrl": f"http://{self.headers['Host']}/me/tiny/commit/1", "commitOid": self.revision})
        else:
            self.answer({}, status=404)

    def do_GET(self) -> None:
        self.asked.append(f"{self.command} {self.path}")
        name = self.path.removeprefix("/me/tiny/resolve/main/")
        if name in self.files:
            etag = hashlib.sha256(self.files[name]).hexdigest()
            self.answer(self.files[name], ETag=f'"{etag}"', X_Repo_Commit=self.revision)
        else:
            self.answer({}, status=404, X_Error_Code="EntryNotFound" if "/me/tiny/" in self.path else "RepoNotFound")

    do_HEAD = do_GET  # noqa: N815


@pytest.fixture
def own_hub() -> Iterator[tuple[str, type[Hub]]]:
    handler = type("OwnHub", (Hub,), {"files": {}, "asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", handler
        server.shutdown()


PUBLISH = """
import sys
import torch
from sparse_sr_attn import CheckpointError, load_model
from sparse_sr_attn.checkpoints import hub
model = load_model(sys.argv[1])
print(hub.push_to_hub(model, "me/tiny", private=True))
x = torch.rand(1, 3, 9, 10)
for options in ({}, {"local_files_only": True}):
    assert torch.equal(hub.from_pretrained("me/tiny", **options)(x), model(x))
for source in ("me/other", "me/tiny"):
    try:
        hub.from_pretrained(source, force_download=True, revision="main" if source == "me/other" else "none")
    except CheckpointError as error:
        print(error)
"""


def test_a_published_network_comes_back(own_hub: tuple[str, type[Hub]], tmp_path: Path) -> None:
    """In a process of its own, because huggingface_hub reads its environment when it is imported."""
    address, handler = own_hub
    model = LCoAN(num_feat=8, num_group=2, num_block=1, chunk_size=9, num_clusters=4).eval()
    torch.save(model.state_dict(), tmp_path / "net.pth")
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "cache"), "HF_TOKEN": "hf_ours"}
    environment |= {"HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-c", PUBLISH, str(tmp_path / "net.pth")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    commit, no_repository, no_revision = done.stdout.splitlines()
    assert commit.startswith(f"{address}/me/tiny/")
    assert no_repository.startswith(f"me/other: {UNREADABLE}; got ")
    assert no_revision.startswith(f"me/tiny: {UNREADABLE}; got ")
    assert handler.files.keys() == FILES
    assert b'hub.from_pretrained("me/tiny")' in handler.files["README.md"]
    assert json.loads(handler.files["config.json"])["chunk_size"] == 9
    assert "POST /api/repos/create Bearer hf_ours" in handler.asked
    assert any("private" in asked for asked in handler.asked)
    assert handler.asked.count("GET /me/tiny/resolve/main/model.safetensors") == 1  # the second came from the cache


def test_weights_that_were_saved_inside_a_wrapper_are_those_of_config_json(tmp_path: Path) -> None:
    model = plain(res_scale=0.5)
    hub.save_pretrained(model, tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({f"model.{key}": value for key, value in load_file(file).items()}, file)
    assert_same(hub.from_pretrained(tmp_path), model)
