"""`python -m benchmarks.launches`: layers and networks launch no more kernels on a GPU than they did."""

from functools import partial

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")
from benchmarks.launches import __main__ as launches
from benchmarks.launches.counter import counted
from sparse_sr_attn.functional import cluster, window
from sparse_sr_attn.functional.shift import shift_conv2d

pytestmark = pytest.mark.unhooked

# What is reached now, at 96x96: evaluation, forward in training, backward. Lower a limit when fewer are needed.
LIMITS = {
    "LCoA": (9, 26, 13),
    "CoA": (3, 3, 7),
    "GMSA": (3, 5, 7),
    "GMSA, shifted": (3, 5, 7),
    "LFE": (2, 2, 4),
    "LCoAN-light": (94, 111, 133),
    "ELAN-light": (133, 181, 313),
}


@pytest.mark.parametrize("name", launches.SUBJECTS)
def test_no_more_than_before(name: str) -> None:
    found = launches.count(launches.SUBJECTS[name], 96)
    counts = (found.evaluation, found.forward, found.backward)
    for now, limit in zip(counts, LIMITS[name], strict=True):
        assert now <= limit, (counts, found.operators)
        assert now >= 0.9 * limit, f"lower the limits to {counts}"


def count(call: object) -> int:
    with counted() as counts:
        call()  # type: ignore[operator]
    return sum(counts.values())


def test_what_counts() -> None:
    """Views and empty memory launch nothing; a bias, a sort and the inside of our operators count."""
    x, weight, bias = (torch.empty(shape, device="meta") for shape in ((1, 5, 8, 8), (5, 5, 3, 3), (5,)))
    keys = torch.empty(1, 9216, dtype=torch.int64, device="meta")
    assert count(lambda: x.flatten(2).transpose(1, 2)[..., 1:].expand(2, -1, -1)) == 0
    assert count(lambda: torch.empty_like(x)) == 0
    assert count(lambda: x + x) == 1
    assert count(lambda: torch.conv2d(x, weight)) == 1
    assert count(lambda: torch.conv2d(x, weight, bias)) == 2
    assert count(lambda: keys.sort(stable=True)) == 14
    assert count(lambda: keys.to(torch.uint8).sort(stable=True)) == 1 + 7
    assert count(lambda: keys.topk(5)) == 4
    assert count(lambda: torch.nn.functional.pad(x, (1, 0))) == 2
    assert count(lambda: torch.baddbmm(bias, x.flatten(2).transpose(1, 2), weight[:, :, 0, 0].T[None])) == 2
    assert count(lambda: x.scatter(1, keys[:, :1, None, None], x)) == 2
    wanted = x.clone().requires_grad_()
    parts = wanted[:, 1:], wanted[..., 0]
    assert [count(partial(torch.autograd.grad, part, wanted, part)) for part in parts] == [2, 2]
    assert count(lambda: shift_conv2d(x, torch.empty(5, 5, 1, 1, device="meta"), bias)) == 1
    assert count(lambda: window.window_attention(x, None, x, window_size=4)) == 6


@pytest.mark.parametrize(("num_tokens", "most"), [(9216, 10), (9217, 11)], ids=["whole", "padded"])
def test_few_launches_without_triton(num_tokens: int, most: int) -> None:
    """Of attention under one pattern, where torch's fused attention, one launch, stands for the parts counted here."""
    query, key, value = (torch.empty(1, num_tokens, width, device="meta") for width in (16, 16, 64))
    pattern = cluster.cluster_pattern(torch.empty(1, num_tokens, dtype=torch.int64, device="meta"), chunk_size=144)

    def attend() -> object:
        return cluster.cluster_attention(query, key, value, pattern, normalize_keys=True)

    with counted("sdpa"):
        attend()  # what is computed once and kept does not count
    with counted("sdpa") as counts:
        attend()
    parts = {name: counts.pop(name) for name in ("mul", "bmm", "add", "_safe_softmax") if name in counts}
    assert parts["bmm"] == 2
    assert 1 + sum(counts.values()) == most, counts
    with counted("eager") as eager:
        attend()
    assert sum(eager.values()) > 3 * most
