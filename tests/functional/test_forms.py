"""Which form runs where, and what is said when one that was asked for cannot."""

import pytest
import torch

from sparse_sr_attn.errors import FormError
from sparse_sr_attn.functional import backend as forms
from sparse_sr_attn.functional import cluster, kmeans
from sparse_sr_attn.functional.cluster import Form, resolve_form
from sparse_sr_attn.testing.strategies import Case


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `resolve_form` asks torch about a GPU, answered as for an H200."""
    monkeypatch.setattr(forms, "HAS_TRITON", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))


@pytest.mark.parametrize(
    ("device", "form"), [("cpu", "tiles"), ("cuda", "triton"), ("cuda:1", "triton"), ("mps", "oneshot")]
)
@pytest.mark.usefixtures("gpu")
def test_auto_takes_the_best_form(device: str, form: Form) -> None:
    assert resolve_form("auto", device) == form
    assert resolve_form("auto", torch.device(device)) == form


@pytest.mark.usefixtures("gpu")
def test_auto_does_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is not installed, and on GPUs too old for it."""
    monkeypatch.setattr(forms, "HAS_TRITON", False)
    assert resolve_form("auto", "cuda") == "oneshot"
    monkeypatch.setattr(forms, "HAS_TRITON", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert resolve_form("auto", "cuda") == "oneshot"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.usefixtures("gpu")
def test_auto_exports_oneshot(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "_is_exporting_flag", True)
    assert resolve_form("auto", device) == "oneshot"


@pytest.mark.parametrize("form", ["oneshot", "tiles", "flex", "triton"])
@pytest.mark.usefixtures("gpu")
def test_a_form_asked_for_stays(form: Form) -> None:
    assert resolve_form(form, "cuda") == form


def test_a_form_that_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "HAS_TRITON", False)
    with pytest.raises(FormError, match="needs the package triton, which is not installed; 'oneshot' works on any"):
        resolve_form("triton", "cuda")
    monkeypatch.setattr(forms, "HAS_TRITON", True)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(FormError, match="'triton' runs on GPUs, got tensors on 'cpu'; 'oneshot' works on any device"):
        resolve_form("triton", "cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve_form("triton", "cpu") == "triton"
    with pytest.raises(FormError, match="form 'flex' runs on 'cpu' and 'cuda', got tensors on 'mps'"):
        resolve_form("flex", "mps")


@pytest.mark.unhooked
def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(FormError, match="must be one of 'auto', 'oneshot', 'tiles', 'flex', 'triton', got 'fast'"):
        resolve_form("fast", "cpu")


@pytest.mark.parametrize("form", ["flex", "triton"])
def test_forms_that_store_no_weights_say_so(form: Form) -> None:
    case = Case(num_tokens=4)
    rows = case.tokens("rows", 3)
    pattern = cluster.cluster_pattern(case.assignment(), chunk_size=2)
    weights = cluster.cluster_weights(rows, rows, pattern)
    message = f"form '{form}' stores no weights, and weights were asked for; 'oneshot' works on any device"
    with pytest.raises(FormError, match=message):
        cluster.cluster_weights(rows, rows, pattern, form=form)
    with pytest.raises(FormError, match=message):
        cluster.apply_cluster_weights(weights, rows, pattern, form=form)


@pytest.mark.unhooked  # triton reads the source of what it compiles
def test_auto_takes_what_is_called(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Attention, its lse and the assignment go where `resolve_form` says; too wide for triton is left to oneshot."""
    pytest.importorskip("triton", reason="needs triton")
    called = []

    def recorded(module: object, name: str) -> None:
        true = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: called.append(name) or true(*args))

    recorded(cluster.triton, "attention_op")
    recorded(kmeans, "nearest_op")
    monkeypatch.setattr(forms, "_best_form", lambda _: "triton")
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
