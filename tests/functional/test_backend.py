"""Which backend runs where, and what is said when one that was asked for cannot."""

import pytest
import torch
from strategies import Case

from sparse_sr_attn.errors import BackendError
from sparse_sr_attn.functional import backend as backends
from sparse_sr_attn.functional import cluster, kmeans
from sparse_sr_attn.functional.cluster import Backend, resolve_backend


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `resolve_backend` asks torch about a GPU, answered as for an H200."""
    monkeypatch.setattr(backends, "HAS_TRITON", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))


@pytest.mark.parametrize(
    ("device", "backend"), [("cpu", "tiles"), ("cuda", "triton"), ("cuda:1", "triton"), ("mps", "eager")]
)
@pytest.mark.usefixtures("gpu")
def test_auto_takes_the_best_backend(device: str, backend: Backend) -> None:
    assert resolve_backend("auto", device) == backend
    assert resolve_backend("auto", torch.device(device)) == backend


@pytest.mark.usefixtures("gpu")
def test_auto_does_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is not installed, and on GPUs too old for it."""
    monkeypatch.setattr(backends, "HAS_TRITON", False)
    assert resolve_backend("auto", "cuda") == "sdpa"
    monkeypatch.setattr(backends, "HAS_TRITON", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert resolve_backend("auto", "cuda") == "sdpa"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.usefixtures("gpu")
def test_auto_exports_oneshot(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "_is_exporting_flag", True)
    assert resolve_backend("auto", device) == "eager"


@pytest.mark.parametrize("backend", ["eager", "tiles", "flex", "sdpa", "triton"])
@pytest.mark.usefixtures("gpu")
def test_a_form_asked_for_stays(backend: Backend) -> None:
    assert resolve_backend(backend, "cuda") == backend


def test_a_form_that_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "HAS_TRITON", False)
    with pytest.raises(BackendError, match="needs the package triton, which is not installed; 'eager' works on any"):
        resolve_backend("triton", "cuda")
    monkeypatch.setattr(backends, "HAS_TRITON", True)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(BackendError, match="'triton' runs on GPUs, got tensors on 'cpu'; 'eager' works on any device"):
        resolve_backend("triton", "cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve_backend("triton", "cpu") == "triton"
    with pytest.raises(BackendError, match="backend 'flex' runs on 'cpu' and 'cuda', got tensors on 'mps'"):
        resolve_backend("flex", "mps")


@pytest.mark.unhooked
def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(
        BackendError, match="must be one of 'auto', 'eager', 'tiles', 'flex', 'sdpa', 'triton', got 'fast'"
    ):
        resolve_backend("fast", "cpu")


@pytest.mark.parametrize("backend", ["flex", "sdpa", "triton"])
def test_forms_that_store_no_weights_say_so(backend: Backend) -> None:
    case = Case(num_tokens=4)
    rows = case.tokens("rows", 3)
    pattern = cluster.cluster_pattern(case.assignment(), chunk_size=2)
    weights = cluster.cluster_weights(rows, rows, pattern)
    message = f"this operation stores weights, which backend '{backend}' cannot; 'eager' works on any device"
    with pytest.raises(BackendError, match=message):
        cluster.cluster_weights(rows, rows, pattern, backend=backend)
    with pytest.raises(BackendError, match=message):
        cluster.apply_cluster_weights(weights, rows, pattern, backend=backend)


@pytest.mark.unhooked  # triton reads the source of what it compiles
def test_auto_takes_what_is_called(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Attention, its lse and the assignment go where `resolve_backend` says; too wide for triton is left to eager."""
    pytest.importorskip("triton", reason="needs triton")
    called = []

    def recorded(module: object, name: str) -> None:
        true = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: called.append(name) or true(*args))

    recorded(cluster.triton, "attention_op")
    recorded(kmeans, "nearest_op")
    monkeypatch.setattr(backends, "_best_backend", lambda _: "triton")
    case = Case(num_tokens=5)
    rows, wide = (case.tokens("rows", width, dtype=torch.float32, device=device) for width in (3, 257))
    pattern = cluster.cluster_pattern(case.assignment(device=device), chunk_size=2)
    cluster.cluster_attention(rows, rows, rows, pattern)
    cluster.cluster_lse(rows, rows, pattern)
    kmeans.assign(rows, case.centroids(3, device=device).float())
    assert called == ["attention_op", "attention_op", "nearest_op"]
    cluster.cluster_attention(wide, wide, rows, pattern)
    cluster.cluster_lse(wide, wide, pattern)
    kmeans.assign(wide, case.centroids(257, device=device).float())
    assert len(called) == 3
