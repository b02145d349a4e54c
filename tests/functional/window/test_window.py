"""Window attention against its slow twins: maps of any size, windows of any size, shifted and displaced."""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from accuracy import assert_as_accurate
from hypothesis import assume, example, given
from hypothesis import strategies as st
from strategies import Case
from tolerances import (
    Budget,
    assert_bit_equal,
    assert_gradients_close,
    assert_values_close,
    gradients,
)
from torch import Tensor
from torch.nn import functional as F

from sparse_sr_attn.errors import ShapeError
from sparse_sr_attn.functional import _torch
from sparse_sr_attn.functional import window as fast
from sparse_sr_attn.functional.window import tiles
from sparse_sr_attn.reference import window as slow

WIDTH, VALUE_WIDTH = 4, 3
LONGEST = 17

half_precisions = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
BACKENDS: tuple[fast.Backend, ...] = ("eager", "operator")


@dataclass(frozen=True)
class Map:
    """Sizes of a map and of its windows, and the seed of its numbers."""

    batch: int = 1
    height: int = 5
    width: int = 6
    window_size: int = 3
    shift: int = 0
    unshift: int | None = None
    seed: int = 0

    @property
    def windows(self) -> dict[str, Any]:
        """What `window_weights` is told; a shift of 0 by its default."""
        return {"window_size": self.window_size} | ({"shift": self.shift} if self.shift else {})

    @property
    def displaced(self) -> dict[str, Any]:
        """What `window_attention` and `apply_window_weights` are told."""
        return {**self.windows, "unshift": self.unshift}

    @property
    def padding(self) -> tuple[int, int, int, int]:
        """Columns and rows to whole windows, as `F.pad` wants them."""
        return 0, -self.width % self.window_size, 0, -self.height % self.window_size

    @property
    def weights_shape(self) -> tuple[int, int, int, int]:
        number = math.ceil(self.height / self.window_size) * math.ceil(self.width / self.window_size)
        return self.batch, number, self.window_size**2, self.window_size**2

    def but(self, **changes: Any) -> "Map":
        return replace(self, **changes)

    def tensor(
        self, name: str, *shape: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float64
    ) -> Tensor:
        return Case(seed=self.seed).tensor(name, *shape, dtype=dtype, device=device)

    def map(self, name: str, channels: int, device: torch.device | str, dtype: torch.dtype = torch.float64) -> Tensor:
        shape = (self.batch, channels, self.height, self.width)
        return self.tensor(name, *shape, device=device, dtype=dtype).requires_grad_()

    def inputs(self, device: torch.device | str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
        query, key = (self.map(name, WIDTH, device, dtype) for name in ("query", "key"))
        return query, key, self.map("value", VALUE_WIDTH, device, dtype)

    def real(self, device: torch.device) -> Tensor:
        """Which pixels of the windows are no pads, `(k, i)`."""
        windows = slow.windows_of(self.height, self.width, self.window_size, self.shift)
        return torch.tensor([[pixel is not None for pixel in window] for window in windows], device=device)

    def meant(self, device: torch.device) -> Tensor:
        """Which pixels of the result are not rows of pads, `(h, w)`; all unless it is displaced."""
        unshift = self.shift if self.unshift is None else self.unshift
        source = slow.sources(self.height, self.width, self.window_size, self.shift, unshift)
        return (source >= 0).view(self.height, self.width).to(device)


@st.composite
def maps(
    draw: st.DrawFn,
    *,
    max_batch: int = 3,
    shortest: int = 1,
    longest: int = LONGEST,
    largest: int = 19,
    displaced: bool = False,
) -> Map:
    """Maps up to `longest` with windows up to `largest`, which may exceed them; if displaced, not all out of sight."""
    window_size = draw(st.integers(1, largest))
    shifts = st.integers(0, window_size - 1)
    case = Map(
        batch=draw(st.integers(1, max_batch)),
        height=draw(st.integers(shortest, longest)),
        width=draw(st.integers(shortest, longest)),
        window_size=window_size,
        shift=draw(shifts),
        unshift=draw(st.none() | shifts) if displaced else None,
        seed=draw(st.integers(0, 2**16)),
    )
    assume(case.meant(torch.device("cpu")).any())
    return case


# Shapes at which code like this breaks; run before anything that is drawn.
ONE_PIXEL = Map(height=1, width=1, window_size=1)
WHOLE = Map(batch=2, height=4, width=8, window_size=4, shift=2, seed=1)
PADDED = Map(batch=2, height=5, width=7, window_size=4, shift=2, seed=2)
ODD = Map(batch=2, height=7, width=10, window_size=5, shift=2, seed=3)
WINDOW_OVER_THE_MAP = Map(batch=2, height=2, width=3, window_size=5, shift=4, seed=4)
FULL_OF_PADS = Map(height=4, width=4, window_size=3, shift=1, seed=5)
PUBLISHED = Map(batch=2, height=6, width=9, window_size=3, shift=2, unshift=1, seed=6)
PUBLISHED_PADDED = Map(height=7, width=7, window_size=5, shift=3, unshift=2, seed=7)
FAR_APART = Map(height=5, width=4, window_size=4, shift=0, unshift=3, seed=8)


# --- cutting and joining


def test_a_shifted_window_begins_further_on(device: torch.device) -> None:
    """The same with pads, which are zeros; what a window loses at one border it finds at the other."""
    picture = torch.arange(1, 13, device=device).view(1, 1, 3, 4)
    expected = [
        [6, 7, 10, 11],
        [8, 5, 12, 9],
        [0, 0, 2, 3],
        [0, 0, 4, 1],
    ]
    windows = fast.partition(picture.double(), 2, 1)
    assert_bit_equal(windows[0, :, :, 0], torch.tensor(expected, dtype=torch.float64, device=device))


@given(case=maps())
@example(case=ONE_PIXEL)
@example(case=WHOLE)
@example(case=PADDED)
@example(case=WINDOW_OVER_THE_MAP)
def test_partition_equals_loops_and_merge_inverts_it(device: torch.device, case: Map) -> None:
    x = case.map("x", WIDTH, device)
    windows = fast.partition(x, case.window_size, case.shift)
    expected = slow.partition(x, case.window_size, case.shift)
    assert_bit_equal(windows, expected)
    assert_bit_equal(fast.merge(windows, case.height, case.width, case.shift), x)
    probe = case.tensor("probe", *windows.shape, device=device)
    assert_bit_equal(*(gradients(result, (x,), probe)[0] for result in (windows, expected)))


@given(case=maps())
@example(case=ONE_PIXEL)
@example(case=WHOLE)
@example(case=PADDED)
@example(case=WINDOW_OVER_THE_MAP)
def test_merge_equals_loops_and_partition_inverts_it(device: torch.device, case: Map) -> None:
    """But for what stood in the pads, which is lost."""
    windows = case.tensor("windows", *case.weights_shape[:3], WIDTH, device=device).requires_grad_()
    x = fast.merge(windows, case.height, case.width, case.shift)
    expected = slow.merge(windows, case.height, case.width, case.window_size, case.shift)
    assert_bit_equal(x, expected)
    kept = windows.where(case.real(device)[:, :, None], 0.0)
    assert_bit_equal(fast.partition(x, case.window_size, case.shift), kept)
    probe = case.tensor("probe", *x.shape, device=device)
    assert_bit_equal(*(gradients(result, (windows,), probe)[0] for result in (x, expected)))


# --- values and gradients


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=maps(max_batch=2), scale=st.sampled_from((1.0, 0.5, 3.0)))
@example(case=ONE_PIXEL, scale=1.0)
@example(case=WHOLE, scale=1.0)
@example(case=PADDED, scale=0.5)
@example(case=ODD, scale=1.0)
@example(case=WINDOW_OVER_THE_MAP, scale=1.0)
@example(case=FULL_OF_PADS, scale=0.5)
def test_weights_equal_loops(device: torch.device, backend: fast.Backend, case: Map, scale: float) -> None:
    query, key, _ = case.inputs(device)
    weights = fast.window_weights(query, key, **case.windows, scale=scale, backend=backend)
    assert weights.shape == case.weights_shape
    assert weights.isfinite().all(), "in the rows of pads too"
    rows = case.real(device)
    actual, expected = weights[:, rows], slow.window_weights(query, key, **case.windows, scale=scale)[:, rows]
    assert_values_close(actual, expected)
    probe = case.tensor("probe", *actual.shape, device=device)
    assert_gradients_close(gradients(actual, (query, key), probe), gradients(expected, (query, key), probe))


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=maps(max_batch=2, displaced=True))
@example(case=ONE_PIXEL)
@example(case=WHOLE)
@example(case=PADDED)
@example(case=ODD)
@example(case=WINDOW_OVER_THE_MAP)
@example(case=PUBLISHED)
@example(case=PUBLISHED_PADDED)
@example(case=FAR_APART)
def test_application_equals_loops(device: torch.device, backend: fast.Backend, case: Map) -> None:
    """For any weights, not only those of a softmax."""
    value = case.map("value", VALUE_WIDTH, device)
    weights = case.tensor("weights", *case.weights_shape, device=device).requires_grad_()
    output = fast.apply_window_weights(weights, value, **case.displaced, backend=backend)
    assert output.shape == value.shape
    pixels = case.meant(device)
    expected = slow.apply_window_weights(weights, value, **case.displaced)[:, :, pixels]
    actual = output[:, :, pixels]
    assert_values_close(actual, expected)
    probe = case.tensor("probe", *actual.shape, device=device)
    assert_gradients_close(gradients(actual, (weights, value), probe), gradients(expected, (weights, value), probe))


@pytest.mark.promise("R2")
@pytest.mark.parametrize("backend", BACKENDS)
@given(case=maps(displaced=True), scale=st.sampled_from((1.0, 0.5, 3.0)))
@example(case=ONE_PIXEL, scale=1.0)
@example(case=WHOLE, scale=1.0)
@example(case=PADDED, scale=0.5)
@example(case=ODD, scale=1.0)
@example(case=WINDOW_OVER_THE_MAP, scale=1.0)
@example(case=FULL_OF_PADS, scale=1.0)
@example(case=PUBLISHED, scale=1.0)
@example(case=PUBLISHED_PADDED, scale=1.0)
@example(case=FAR_APART, scale=1.0)
def test_attention_equals_masked_dense_attention(
    device: torch.device, backend: fast.Backend, case: Map, scale: float
) -> None:
    query, key, value = leaves = case.inputs(device)
    output = fast.window_attention(query, key, value, **case.displaced, scale=scale, backend=backend)
    assert output.shape == value.shape
    assert output.isfinite().all(), "also for pixels whose result comes from padding"
    pixels = case.meant(device)
    actual = output[:, :, pixels]
    expected = slow.window_attention(query, key, value, **case.displaced, scale=scale)[:, :, pixels]
    assert_values_close(actual, expected)
    probe = case.tensor("probe", *actual.shape, device=device)
    assert_gradients_close(gradients(actual, leaves, probe), gradients(expected, leaves, probe))


@given(case=maps(max_batch=2, displaced=True))
@example(case=ONE_PIXEL)
@example(case=WHOLE)
@example(case=PADDED)
@example(case=FULL_OF_PADS)
@example(case=PUBLISHED_PADDED)
@example(case=FAR_APART)
def test_windows_are_the_same_by_an_index(device: torch.device, case: Map) -> None:
    """As GPUs cut and join them."""
    leaves = case.inputs(device)
    probe = case.tensor("probe", case.batch, VALUE_WIDTH, case.height, case.width, device=device)
    meant = case.meant(device)
    found = []
    for by_index in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tiles, "_by_index", lambda x, chosen=by_index: chosen)
            output = fast.window_attention(*leaves, **case.displaced)
            weights = fast.window_weights(*leaves[:2], **case.windows)
            applied = fast.apply_window_weights(weights, leaves[2], **case.displaced)
            values = [part * meant for part in (output, applied)]
            found.append((values, [grad for part in values for grad in gradients(part, leaves, probe)]))
    for block, index in zip(*(values for values, _ in found), strict=True):
        assert_values_close(block, index)
    assert_gradients_close(*(grads for _, grads in found))


@pytest.mark.promise("R5")
@pytest.mark.parametrize("height", range(1, LONGEST + 1))
def test_every_size(device: torch.device, height: int) -> None:
    """All windows that divide, cover, or fit badly, not shifted and shifted both ways."""
    for width in range(1, LONGEST + 1):
        for window_size in (1, 2, 3, 4, 7, 8, 16, 18):
            for shift, unshift in {
                (0, 0),
                (window_size // 2, window_size // 2),
                ((window_size + 1) // 2, window_size // 2),
            }:
                case = Map(1, height, width, window_size, shift, unshift)
                query, key, value = (leaf.detach() for leaf in case.inputs(device))
                pixels = case.meant(device)
                actual = fast.window_attention(query, key, value, **case.displaced)
                expected = slow.window_attention(query, key, value, **case.displaced)
                assert_values_close(actual[:, :, pixels], expected[:, :, pixels])


@given(case=maps(), excess=st.integers(0, 3))
@example(case=ONE_PIXEL, excess=0)
@example(case=WINDOW_OVER_THE_MAP, excess=2)
@example(case=Map(height=6, width=6, shift=3), excess=0)
def test_a_window_of_the_whole_map_is_plain_attention(device: torch.device, case: Map, excess: int) -> None:
    """Torch's own, unscaled; wherever the window begins."""
    case = case.but(window_size=max(case.height, case.width) + excess)
    leaves = case.inputs(device)
    actual = fast.window_attention(*leaves, **case.windows)
    rows = (leaf.flatten(2).mT for leaf in leaves)
    expected = F.scaled_dot_product_attention(*rows, scale=1.0).mT.view_as(actual)
    assert_values_close(actual, expected)
    probe = case.tensor("probe", *actual.shape, device=device)
    assert_gradients_close(gradients(actual, leaves, probe), gradients(expected, leaves, probe))


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=maps(max_batch=2, longest=9, largest=10, displaced=True), scale=st.sampled_from((1.0, 0.5)))
@example(case=WHOLE, scale=0.5)
@example(case=PUBLISHED_PADDED, scale=1.0)
def test_queries_may_be_the_keys(device: torch.device, backend: fast.Backend, case: Map, scale: float) -> None:
    """One map given once is as good as given twice: weights, attention and both gradients."""
    query, _, value = case.inputs(device)
    weights = fast.window_weights(query, **case.windows, scale=scale, backend=backend)
    rows = case.real(device)
    actual = weights[:, rows]
    expected = slow.window_weights(query, query, **case.windows, scale=scale)[:, rows]
    assert_values_close(actual, expected)
    probe = case.tensor("probe", *actual.shape, device=device)
    assert_gradients_close(gradients(actual, (query,), probe), gradients(expected, (query,), probe))
    pixels = case.meant(device)
    output = fast.window_attention(query, None, value, **case.displaced, scale=scale, backend=backend)[:, :, pixels]
    wanted = slow.window_attention(query, query, value, **case.displaced, scale=scale)[:, :, pixels]
    assert_values_close(output, wanted)
    probe = case.tensor("probe", *output.shape, device=device)
    assert_gradients_close(gradients(output, (query, value), probe), gradients(wanted, (query, value), probe))


# --- what can and what cannot matter


@given(case=maps(), loud=st.sampled_from((1.0, 1e3)))
@example(case=PADDED, loud=1.0)
@example(case=PADDED, loud=1e3)
@example(case=FULL_OF_PADS, loud=1.0)
@example(case=WINDOW_OVER_THE_MAP, loud=1e3)
def test_pads_have_no_weight(device: torch.device, case: Map, loud: float) -> None:
    """Exactly none; the real ones have all, also when scores would overflow an exponential, or lie far below 0."""
    query, key, _ = case.inputs(device)
    real = case.real(device)
    seen = real[:, None, :].expand(*case.weights_shape[1:])[real]  # for each real pixel, the places of its window
    for other in (key, -query):
        weights = fast.window_weights(loud * query, other, **case.windows)[:, real]
        assert not weights[:, ~seen].any()
        assert (weights >= 0).all()
        assert_values_close(weights.sum(dim=-1), torch.ones_like(weights[..., 0]))
    even = fast.window_weights(0 * query, key, **case.windows)[:, real]
    assert_values_close(even, (seen.double() / seen.sum(dim=-1, keepdim=True)).expand_as(even))


@pytest.mark.promise("R6")
@given(case=maps(), filling=st.sampled_from((0.0, 1e4, float("nan"))))
@example(case=PADDED, filling=float("nan"))
@example(case=WINDOW_OVER_THE_MAP, filling=float("nan"))
def test_the_rows_of_pads_cannot_matter(device: torch.device, case: Map, filling: float) -> None:
    """Whatever stands in them, no bit of the output depends on it."""
    query, key, value = (leaf.detach() for leaf in case.inputs(device))
    weights = fast.window_weights(query, key, **case.windows)
    before = fast.apply_window_weights(weights, value, **case.windows)
    weights[:, ~case.real(device)] = filling
    assert_bit_equal(fast.apply_window_weights(weights, value, **case.windows), before)


@given(case=maps(), filling=st.sampled_from((0.0, 1e4, float("nan"))))
@example(case=WHOLE, filling=float("nan"))
@example(case=PADDED, filling=float("nan"))
@example(case=ODD, filling=float("nan"))
def test_an_unseen_pixel_cannot_matter(device: torch.device, case: Map, filling: float) -> None:
    """Another key and value of a pixel changes no bit for the pixels outside its window."""
    query, key, value = (leaf.detach() for leaf in case.inputs(device))
    before = fast.window_attention(query, key, value, **case.windows)
    pixel = int(Case(seed=case.seed).integers("pixel", case.height * case.width, 1))
    table = slow.visible_pairs(case.height, case.width, case.window_size, case.shift).to(device)
    blind = ~table[:, pixel].view(case.height, case.width)
    for leaf in (key, value):
        leaf[:, :, pixel // case.width, pixel % case.width] = filling
    after = fast.window_attention(query, key, value, **case.windows)
    assert_bit_equal(after[:, :, blind], before[:, :, blind])
    # A query is nobody's business but its own.
    query[:, :, pixel // case.width, pixel % case.width] = filling
    after = fast.window_attention(query, key, value, **case.windows)
    assert_bit_equal(after[:, :, blind], before[:, :, blind])


@given(case=maps())
@example(case=PADDED)
@example(case=WHOLE)
def test_strides_do_not_matter(device: torch.device, case: Map) -> None:
    """Channels-last maps, and groups of channels cut from a larger map, are the same maps."""
    leaves = [leaf.detach() for leaf in case.inputs(device)]
    expected = fast.window_attention(*leaves, **case.windows)
    last = [leaf.contiguous(memory_format=torch.channels_last) for leaf in leaves]
    assert_values_close(fast.window_attention(*last, **case.windows), expected)
    groups = torch.cat(leaves, dim=1).split([leaf.shape[1] for leaf in leaves], dim=1)
    assert_values_close(fast.window_attention(*groups, **case.windows), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=maps(max_batch=2, longest=9, largest=10, displaced=True), channels=st.tuples(*[st.integers(2, 5)] * 2))
@example(case=PADDED, channels=(5, 2))
@example(case=PUBLISHED_PADDED, channels=(3, 4))
def test_groups_are_attended_one_by_one(
    device: torch.device, backend: fast.Backend, case: Map, channels: tuple[int, int]
) -> None:
    """The first group in windows of 2, the second in those of the case."""
    query, value = leaves = [case.map(name, dim, device) for name, dim in zip(("q", "v"), channels, strict=True)]
    sizes, shifts = {"window_sizes": (2, case.window_size), "shifts": (1, case.shift)}, (1, case.unshift or case.shift)
    actual = fast.grouped_window_attention(query, value, **sizes, unshifts=shifts, backend=backend)
    half, value_half = -(-channels[0] // 2), -(-channels[1] // 2)
    parts = [(query[:, :half], value[:, :value_half], Map(window_size=2, shift=1))]
    parts.append((query[:, half:], value[:, value_half:], case.but(unshift=shifts[1])))
    expected = torch.cat([slow.window_attention(q, q, v, **each.displaced) for q, v, each in parts], dim=1)
    pixels = case.but(unshift=shifts[1]).meant(device)
    assert_values_close(actual[:, :, pixels], expected[:, :, pixels])
    probe = case.tensor("probe", *expected[:, :, pixels].shape, device=device)
    results = (gradients(each[:, :, pixels], leaves, probe) for each in (actual, expected))
    assert_gradients_close(*results)


# --- precision


@pytest.mark.promise("R2")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@given(case=maps(max_batch=2, shortest=5))
@example(case=WHOLE)
@example(case=PADDED)
def test_low_precision_errs_no_more_than_dense_attention(device: torch.device, dtype: torch.dtype, case: Map) -> None:
    """Against the float64 result of the same rounded numbers, under the same table of pairs.

    On enough numbers, lest chance decide.
    """
    low = [case.map(name, 16, device, dtype) for name in ("query", "key", "value")]
    assert_as_accurate(
        partial(fast.window_attention, **case.windows), partial(slow.window_attention, **case.windows), low
    )


@pytest.mark.parametrize("multiplied", [True, False], ids=["in bfloat16", "in float32"])
@given(case=maps(max_batch=2, shortest=5))
@example(case=WHOLE)
@example(case=PADDED)
def test_stored_weights_of_bfloat16_values_err_no_more_than_dense_attention(
    device: torch.device, multiplied: bool, case: Map
) -> None:
    """All in bfloat16, on a machine that multiplies it and on one that does not, against dense attention in it."""
    low = [case.map(name, 16, device, torch.bfloat16) for name in ("query", "key", "value")]

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        weights = fast.window_weights(query, key, dtype=torch.bfloat16, **case.windows)
        return fast.apply_window_weights(weights, value, **case.windows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_torch, "_multiplies_bfloat16", lambda: multiplied)
        assert_as_accurate(
            attend, partial(slow.window_attention, **case.windows), low, budget=Budget(2.0, gradients=2.0)
        )


@half_precisions
@given(case=maps(), backend=st.sampled_from(BACKENDS))
@example(case=WHOLE, backend="operator")
@example(case=PADDED, backend="eager")
def test_weights_of_lower_precision_are_rounded(
    device: torch.device, dtype: torch.dtype, case: Map, backend: str
) -> None:
    """To the bit."""
    query, key, _ = case.inputs(device, torch.float32)
    whole, rounded = (
        fast.window_weights(query, key, dtype=to, backend=backend, **case.windows) for to in (None, dtype)
    )
    assert (whole.dtype, rounded.dtype) == (torch.float32, dtype)
    rows = case.real(device)
    assert_bit_equal(rounded[:, rows], whole[:, rows].to(dtype))


@half_precisions
@given(case=maps())
@example(case=WHOLE)
@example(case=PADDED)
def test_scores_and_softmax_of_half_inputs_are_float32(device: torch.device, dtype: torch.dtype, case: Map) -> None:
    """The weights come back in float32, and are those of the same numbers given in float32."""
    query, key, value = case.inputs(device, dtype)
    query = 20 * query
    weights = fast.window_weights(query, key, **case.windows)
    assert weights.dtype == torch.float32
    wide = fast.window_weights(query.float(), key.float(), **case.windows)
    rows = case.real(device)
    torch.testing.assert_close(weights[:, rows], wide[:, rows], rtol=1e-5, atol=1e-6)
    assert fast.apply_window_weights(weights, value, **case.windows).dtype == dtype


@given(case=maps(displaced=True))
@example(case=WHOLE)
@example(case=PADDED)
def test_autocast_does_not_reach_the_scores(device: torch.device, case: Map) -> None:
    """Not a bit changes under bfloat16 autocast, forward or backward."""
    query, key, value = leaves = case.inputs(device, torch.float32)

    def results() -> list[Tensor]:
        fused = fast.window_attention(query, key, value, **case.displaced)
        weights = fast.window_weights(query, key, **case.windows)
        return [fused, weights, fast.apply_window_weights(weights, value, **case.displaced)]

    expected = results()
    with torch.autocast(device.type, torch.bfloat16):
        actual = results()
    for mine, other in zip(actual, expected, strict=True):
        assert_bit_equal(mine, other)
        probe = case.tensor("probe", *mine.shape, device=device)
        for grad, true in zip(gradients(mine, leaves, probe), gradients(other, leaves, probe), strict=True):
            assert_bit_equal(grad, true)


@pytest.mark.unhooked
def test_an_unknown_form_is_explained(device: torch.device) -> None:
    query, key, _ = WHOLE.inputs(device)
    with pytest.raises(ValueError, match=r"^backend must be 'auto', 'eager' or 'operator', got 'fast'$"):
        fast.window_weights(query, key, window_size=4, backend="fast")  # type: ignore[arg-type]


# --- what is refused


@pytest.mark.parametrize(
    ("number", "places", "height", "width", "rule"),
    [
        (4, 9, 6, 7, "6 windows of 3x3"),
        (4, 9, 3, 6, "2 windows of 3x3"),
        (3, 9, 6, 6, "4 windows of 3x3"),
        (4, 9, 2, 18, "6 windows of 3x3"),
        (1, 3, 1, 1, "1 windows of 1x1"),
        (1, 8, 2, 2, "1 windows of 2x2"),
    ],
)
def test_windows_of_another_map_are_not_joined(number: int, places: int, height: int, width: int, rule: str) -> None:
    message = f"a map of {height}x{width} must have {rule}, got {number} of {places} slots"
    with pytest.raises(ShapeError, match=message):
        fast.merge(torch.zeros(2, number, places, 3), height, width)


@pytest.mark.unhooked
def test_queries_and_keys_of_different_maps_are_refused() -> None:
    query, key = torch.zeros(1, 4, 5, 6), torch.zeros(1, 4, 6, 5)
    for call in (fast.window_weights, lambda *leaves, **sizes: fast.window_attention(*leaves, query, **sizes)):
        with pytest.raises(ShapeError, match=r"one size, got \(1, 4, 5, 6\) and \(1, 4, 6, 5\)"):
            call(query, key, window_size=3)


@pytest.mark.unhooked
def test_weights_of_other_windows_or_batches_are_refused() -> None:
    value = torch.zeros(2, 3, 5, 6)
    weights = fast.window_weights(value, value, window_size=3)
    with pytest.raises(ShapeError, match=r"of shape \(2, 4, 16, 16\), got \(2, 4, 9, 9\)"):
        fast.apply_window_weights(weights, value, window_size=4)
    with pytest.raises(ShapeError, match=r"of shape \(1, 4, 9, 9\), got \(2, 4, 9, 9\)"):
        fast.apply_window_weights(weights, value[:1], window_size=3)


@pytest.mark.parametrize("window_size", [0, -2])
def test_windows_have_a_size(window_size: int) -> None:
    x = torch.zeros(1, 2, 4, 4)
    for call in (
        lambda: fast.window_weights(x, x, window_size=window_size),
        lambda: fast.window_attention(x, x, x, window_size=window_size),
        lambda: fast.apply_window_weights(torch.zeros(1, 1, 4, 4), x, window_size=window_size),
        lambda: fast.partition(x, window_size),
    ):
        with pytest.raises(ValueError, match=rf"window_size must be >= 1, got {window_size}"):
            call()
