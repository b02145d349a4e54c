"""Spherical k-means against its slow twin: the pieces, whole steps, and what must not move."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import Case, cases
from tolerances import assert_bit_equal, assert_values_close
from torch import Tensor, nn

from sparse_sr_attn.functional import kmeans as fast
from sparse_sr_attn.reference import kmeans as slow

WIDTH = 3
DECAYS = st.sampled_from((0.0, 0.05, 0.5, 0.9, 0.999))
THRESHOLDS = st.sampled_from((0.0, 0.11, 0.53, 0.87))  # no share of a few tokens, which rounding would decide

MORE_CLUSTERS_THAN_TOKENS = Case(num_tokens=2, num_clusters=9)
ONE_TOKEN = Case(num_tokens=1, num_clusters=1)
CROWDED = Case(batch=3, num_tokens=17, num_clusters=2, seed=1)


def state_of(case: Case, device: torch.device, dtype: torch.dtype = torch.float64) -> fast.KMeansState:
    """A state before training with centroids of the case's own."""
    centroids = case.centroids(WIDTH, device=device).to(dtype)
    start = slow.KMeansState.start(centroids)
    counters = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
    return fast.KMeansState(
        centroids, start.usage, start.pending_sums, start.pending_counts, start.pending_seeds, *counters
    )


def twin_of(state: fast.KMeansState) -> slow.KMeansState:
    tensors = [tensor.clone() for tensor in state[:5]]
    return slow.KMeansState(*tensors, num_updates=int(state.num_updates), num_skipped=int(state.num_skipped))


def copy_of(state: fast.KMeansState) -> fast.KMeansState:
    return fast.KMeansState(*(tensor.clone() for tensor in state))


def assert_unmoved(state: fast.KMeansState, before: fast.KMeansState) -> None:
    for now, then in zip(state, before, strict=True):
        assert_bit_equal(now, then)


def assert_agrees(state: fast.KMeansState, twin: slow.KMeansState) -> None:
    for name in ("centroids", "usage", "pending_sums", "pending_counts", "pending_seeds"):
        assert_values_close(getattr(state, name), getattr(twin, name))
    assert int(state.num_updates) == twin.num_updates
    assert int(state.num_skipped) == twin.num_skipped


def tied(points: Tensor, centroids: Tensor) -> bool:
    """Whether some token is as close to a second centroid as rounding can tell."""
    if len(centroids) == 1:
        return False
    units = torch.nn.functional.normalize(points, dim=-1)
    best = (units @ centroids.T).topk(2, dim=-1).values
    margin = best[..., 0] - best[..., 1]
    return bool(((margin < 1e-9) & units.any(dim=-1)).any())


@given(case=cases())
@example(case=MORE_CLUSTERS_THAN_TOKENS)
@example(case=ONE_TOKEN)
def test_assignment_equals_loops(device: torch.device, case: Case) -> None:
    points, centroids = case.tokens("points", WIDTH, device=device), case.centroids(WIDTH, device=device)
    actual = fast.assign(points, centroids)
    assert actual.dtype == torch.int64
    assert_bit_equal(actual, slow.assign(points, centroids))


@pytest.mark.parametrize(
    "products", [1, 7, 2**17, None], ids=["a point a block", "several blocks", "one block", "as exported"]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@given(case=cases(), copies=st.integers(1, 3))
@example(case=ONE_TOKEN, copies=1)
@example(case=CROWDED, copies=3)
@example(case=MORE_CLUSTERS_THAN_TOKENS, copies=2)
def test_nearest_is_argmax(
    device: torch.device, products: int | None, dtype: torch.dtype, case: Case, copies: int
) -> None:
    """The first of equals, whole duplicates and -0.0 included; more clusters than fit a block, too."""
    points = case.integers("points", 5, case.batch, case.num_tokens, WIDTH, device=device) - 2
    points = torch.where(points == 0, -0.0, points.to(dtype))
    axes = torch.eye(WIDTH, dtype=torch.float32, device=device)
    centroids = torch.cat([axes, -axes])[case.integers("axes", 2 * WIDTH, case.num_clusters, device=device)]
    centroids = centroids.repeat(copies, 1)
    with pytest.MonkeyPatch.context() as patch:
        if products is None:
            patch.setattr(torch.compiler, "_is_exporting_flag", True)
        else:
            patch.setattr(fast, "_PRODUCTS_PER_BLOCK", products)
        best, index = fast._nearest(points, centroids)
    expected = slow.assign(points.double(), centroids.double())
    assert index.dtype == torch.int64
    assert best.dtype == torch.promote_types(dtype, torch.float32)
    assert_bit_equal(index, expected)
    assert_bit_equal(best.double(), (points.double() * centroids.double()[expected]).sum(dim=-1))


@pytest.mark.parametrize("num_clusters", [1, 2, 9])
@pytest.mark.parametrize("odd", [float("nan"), float("inf"), float("-inf")])
def test_a_point_that_is_no_number_goes_somewhere(device: torch.device, odd: float, num_clusters: int) -> None:
    """To a cluster that is there; and others go where they would without it."""
    case = Case(num_tokens=11, num_clusters=num_clusters)
    points, centroids = case.tokens("points", WIDTH, device=device), case.centroids(WIDTH, device=device)
    expected = fast.assign(points, centroids)
    points[0, 4] = odd
    points[0, 5, 1] = odd
    actual = fast.assign(points, centroids)
    assert ((actual >= 0) & (actual < num_clusters)).all()
    others = [t for t in range(11) if t not in (4, 5)]
    assert_bit_equal(actual[:, others], expected[:, others])


@given(case=cases(), factor=st.sampled_from((1e-3, 0.5, 7.0, 1e4)))
def test_length_of_a_token_does_not_matter(device: torch.device, case: Case, factor: float) -> None:
    points, centroids = case.tokens("points", WIDTH, device=device), case.centroids(WIDTH, device=device)
    assignment = fast.assign(points, centroids)
    assert_bit_equal(fast.assign(factor * points, centroids), assignment)
    sums, counts = fast.cluster_sums(points, assignment, case.num_clusters)
    longer = fast.cluster_sums(factor * points, assignment, case.num_clusters)
    assert_values_close(longer[0], sums)
    assert_bit_equal(longer[1], counts)


@given(case=cases())
@example(case=MORE_CLUSTERS_THAN_TOKENS)
def test_sums_equal_loops(device: torch.device, case: Case) -> None:
    points, assignment = case.tokens("points", WIDTH, device=device), case.assignment(device=device)
    points[0, 0] = 0
    actual = fast.cluster_sums(points, assignment, case.num_clusters)
    expected = slow.cluster_sums(points, assignment, case.num_clusters)
    assert_values_close(actual[0], expected[0])
    assert_values_close(actual[1], expected[1])
    assert actual[1].sum() == case.batch * case.num_tokens


@given(case=cases(), ema_decay=st.sampled_from((0.0, 0.3, 0.999, 1.0)))
@example(case=MORE_CLUSTERS_THAN_TOKENS, ema_decay=0.3)
@example(case=MORE_CLUSTERS_THAN_TOKENS, ema_decay=0.0)
def test_movement_equals_loops(device: torch.device, case: Case, ema_decay: float) -> None:
    """Also where clusters are empty, and where sums cancel out."""
    points, assignment = case.tokens("points", WIDTH, device=device), case.assignment(device=device)
    centroids = case.centroids(WIDTH, device=device)
    sums, counts = slow.cluster_sums(points, assignment, case.num_clusters)
    sums[case.integers("cancelled", case.num_clusters, 1)] = 0
    actual = fast.move_centroids(centroids, sums, counts, ema_decay)
    assert_values_close(actual, slow.move_centroids(centroids, sums, counts, ema_decay))
    assert_values_close(actual.norm(dim=-1), torch.ones_like(counts))
    still = counts == 0
    assert_bit_equal(actual[still], centroids[still])


def test_a_cluster_whose_mean_is_opposite_keeps_its_centroid(device: torch.device) -> None:
    """Half of one and half of its opposite is no direction."""
    centroids = torch.eye(2, dtype=torch.float64, device=device)
    sums = torch.tensor([[-3.0, 0.0], [0.0, 2.0]], dtype=torch.float64, device=device)
    counts = torch.tensor([3.0, 2.0], dtype=torch.float64, device=device)
    assert_bit_equal(fast.move_centroids(centroids, sums, counts, 0.5), centroids)
    assert_bit_equal(slow.move_centroids(centroids, sums, counts, 0.5), centroids)


@given(case=cases(), num=st.integers(1, 20), levels=st.sampled_from((2, 1000)))
@example(case=ONE_TOKEN, num=5, levels=2)
@example(case=CROWDED, num=20, levels=2)
def test_seeds_equal_sorting(device: torch.device, case: Case, num: int, levels: int) -> None:
    """With few levels there are ties, which go by sample and position."""
    points = case.tokens("points", WIDTH, device=device)
    similarity = case.integers("similarity", levels, case.batch, case.num_tokens, device=device).double() / levels
    assert_values_close(fast.least_similar(points, similarity, num), slow.least_similar(points, similarity, num))


@given(case=cases(), ema_decay=DECAYS, reseed_threshold=THRESHOLDS, num_steps=st.integers(1, 5))
@example(case=MORE_CLUSTERS_THAN_TOKENS, ema_decay=0.05, reseed_threshold=0.9, num_steps=4)
@example(case=CROWDED.but(num_clusters=9), ema_decay=0.05, reseed_threshold=0.9, num_steps=5)
@example(case=CROWDED, ema_decay=0.999, reseed_threshold=0.0, num_steps=5)
def test_steps_equal_the_twin(
    device: torch.device, case: Case, ema_decay: float, reseed_threshold: float, num_steps: int
) -> None:
    """Every buffer after every step, dead clusters and empty ones included."""
    state = state_of(case, device)
    twin = twin_of(state)
    for step in range(num_steps):
        points = case.tokens(f"points {step}", WIDTH, device=device) + 2  # huddled: some clusters get nothing
        if step == 1:
            points[0, 0] = 0  # a token without direction is no seed
        assignment = fast.kmeans_step(points, state, ema_decay=ema_decay, reseed_threshold=reseed_threshold)
        twin, expected = slow.kmeans_step(points, twin, ema_decay=ema_decay, reseed_threshold=reseed_threshold)
        assert int(state.num_updates) == twin.num_updates == step
        assert_values_close(state.centroids, twin.centroids)
        assert_values_close(state.usage, twin.usage)
        if tied(points, twin.centroids):
            return  # a centroid reseeded on the only token of another: rounding decides, and all that follows differs
        assert_bit_equal(assignment, expected)
        assert_agrees(state, twin)


@pytest.mark.promise("R20")
@given(case=cases(), ema_decay=DECAYS, reseed_threshold=THRESHOLDS, num_parts=st.integers(1, 4))
@example(case=MORE_CLUSTERS_THAN_TOKENS, ema_decay=0.05, reseed_threshold=0.87, num_parts=3)
@example(case=CROWDED.but(num_clusters=9), ema_decay=0.05, reseed_threshold=0.87, num_parts=2)
@example(case=Case(num_tokens=40, num_clusters=3), ema_decay=0.5, reseed_threshold=0.87, num_parts=4)
def test_accumulated_steps_are_one_step_on_all_their_tokens(
    device: torch.device, case: Case, ema_decay: float, reseed_threshold: float, num_parts: int
) -> None:
    """As the twin makes it; a part that is not finite is left out and counted, and the others are not."""
    state = state_of(case, device)
    twin = twin_of(state)
    options = {"ema_decay": ema_decay, "reseed_threshold": reseed_threshold}
    for update in range(3):
        parts = [case.tokens(f"points {update} {part}", WIDTH, device=device) + 2 for part in range(num_parts)]
        parts[0][0, 0] = 0
        fast.apply_pending(state, **options)
        assert not any(pending.any() for pending in state[2:5])
        begun = state.centroids.clone()
        if update == 1:
            fast.kmeans_step(torch.full_like(parts[0], float("nan")), state, accumulate=True, **options)
        codes = [fast.kmeans_step(part, state, accumulate=True, **options) for part in parts]
        assert_bit_equal(state.centroids, begun)
        twin, expected = slow.kmeans_step(torch.cat(parts), twin, **options)
        assert int(state.num_updates) == twin.num_updates == update
        assert int(state.num_skipped) == (update >= 1)
        assert_values_close(state.centroids, twin.centroids)
        assert_values_close(state.usage, twin.usage)
        if tied(torch.cat(parts), twin.centroids):
            return
        assert_bit_equal(torch.cat(codes), expected)
        assert_values_close(state.pending_sums, twin.pending_sums)
        assert_bit_equal(state.pending_counts, twin.pending_counts)
        assert_values_close(state.pending_seeds, twin.pending_seeds)


def test_dead_clusters_come_back_to_life(device: torch.device) -> None:
    """Two clusters far from all tokens take the directions of the least similar ones."""
    axes = torch.eye(4, dtype=torch.float64, device=device)
    case = Case(num_clusters=4)
    state = state_of(case, device)._replace(centroids=torch.stack([axes[0], axes[1], -axes[0], -axes[1]])[:, :WIDTH])
    near = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64, device=device)
    odd = torch.tensor([[0.6, 0.0, 0.8], [0.0, 0.8, -0.6]], dtype=torch.float64, device=device)
    points = torch.cat([near, near, odd])[None]
    before = fast.kmeans_step(points, state, ema_decay=0.5, reseed_threshold=0.95)
    assert before.unique().tolist() == [0, 1]
    after = fast.kmeans_step(points, state, ema_decay=0.5, reseed_threshold=0.95)
    assert after.unique().tolist() == [0, 1, 2, 3]
    assert_values_close(state.centroids[2:], odd)
    assert_values_close(state.usage[2:], torch.full_like(state.usage[2:], 0.25))


NORMAL = Case(batch=2, num_tokens=6, seed=3).tokens("points", WIDTH)
DEGENERATE = {
    "more clusters than tokens": NORMAL[:1, :2],
    "one token": NORMAL[:1, :1],
    "all equal": torch.ones_like(NORMAL),
    "all zero": torch.zeros_like(NORMAL),
    "outlier": NORMAL.index_fill(1, torch.tensor([4]), 1e4),
    "duplicates": NORMAL[:, :2].repeat(1, 3, 1),
    "opposites": torch.cat([NORMAL, -NORMAL], dim=1),
    "almost zero": 1e-30 * NORMAL,
}


@pytest.mark.promise("R7")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("points", list(DEGENERATE.values()), ids=list(DEGENERATE))
def test_degenerate_tokens_are_finite_and_deterministic(
    device: torch.device, points: Tensor, dtype: torch.dtype
) -> None:
    points = points.to(device, dtype)
    case = Case(num_clusters=5, seed=2)

    def run() -> tuple[fast.KMeansState, list[Tensor]]:
        state = state_of(case, device, torch.promote_types(dtype, torch.float32))
        steps = [fast.kmeans_step(points, state, ema_decay=0.5, reseed_threshold=0.9) for _ in range(4)]
        return state, steps

    state, steps = run()
    for name, tensor in state._asdict().items():
        assert torch.isfinite(tensor).all(), name
    lengths = state.centroids.norm(dim=-1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=1e-5, atol=1e-5)
    assert int(state.num_skipped) == 0
    again, same_steps = run()
    assert_unmoved(again, state)
    for one, other in zip(steps, same_steps, strict=True):
        assert_bit_equal(one, other)
        assert ((one >= 0) & (one < case.num_clusters)).all()


@pytest.mark.promise("R8")
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@given(case=cases())
@example(case=CROWDED)
@example(case=ONE_TOKEN)
def test_a_token_that_is_not_finite_spoils_nothing(device: torch.device, poison: float, case: Case) -> None:
    """No buffer ever holds it, the step is counted, and training goes on as if that step had not been."""
    state = state_of(case, device)
    twin = twin_of(state)
    for step in range(4):
        points = case.tokens(f"points {step}", WIDTH, device=device)
        if step == 1:
            points[-1, -1, 0] = poison
        fast.kmeans_step(points, state, ema_decay=0.9, reseed_threshold=0.5)
        twin, _ = slow.kmeans_step(points, twin, ema_decay=0.9, reseed_threshold=0.5)
        for name, tensor in state._asdict().items():
            assert torch.isfinite(tensor).all(), f"{name} after step {step}"
        assert_agrees(state, twin)
    assert int(state.num_skipped) == 1
    assert int(state.num_updates) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@given(case=cases())
@example(case=CROWDED)
def test_half_tokens_are_clustered_in_float32(device: torch.device, dtype: torch.dtype, case: Case) -> None:
    """State and assignment are those of the same numbers given in float32."""
    states = [state_of(case, device, torch.float32) for _ in range(2)]
    for step in range(3):
        points = case.tokens(f"points {step}", WIDTH, dtype=dtype, device=device)
        low = fast.kmeans_step(points, states[0], ema_decay=0.9, reseed_threshold=0.5)
        high = fast.kmeans_step(points.float(), states[1], ema_decay=0.9, reseed_threshold=0.5)
        assert_bit_equal(low, high)
    assert_unmoved(states[0], states[1])
    assert states[0].centroids.dtype == torch.float32


@given(case=cases())
@example(case=CROWDED.but(num_clusters=9))
def test_autocast_does_not_reach_k_means(device: torch.device, case: Case) -> None:
    """Not a bit changes under bfloat16 autocast, in a step or in an assignment alone."""
    states = [state_of(case, device, torch.float32) for _ in range(2)]
    for step in range(3):
        points = case.tokens(f"points {step}", WIDTH, dtype=torch.float32, device=device)
        expected = fast.kmeans_step(points, states[1], ema_decay=0.9, reseed_threshold=0.5)
        with torch.autocast(device.type, torch.bfloat16):
            assert_bit_equal(fast.kmeans_step(points, states[0], ema_decay=0.9, reseed_threshold=0.5), expected)
            assert_bit_equal(fast.assign(points, states[0].centroids), expected)
    assert_unmoved(states[0], states[1])


@given(case=cases(), where=st.sampled_from(("hook", "custom function")))
@example(case=CROWDED, where="hook")
@example(case=CROWDED, where="custom function")
def test_nothing_moves_while_a_backward_runs(device: torch.device, case: Case, where: str) -> None:
    """A step that a backward calls gives the assignment of the forward and leaves every buffer as it was."""
    state = state_of(case, device)
    points = case.tokens("points", WIDTH, device=device)
    for _ in range(2):
        forward = fast.kmeans_step(points, state, ema_decay=0.5, reseed_threshold=0.9)
    before = copy_of(state)
    recomputed = []

    def recompute(grad: Tensor) -> Tensor:
        recomputed.append(fast.kmeans_step(points, state, ema_decay=0.5, reseed_threshold=0.9))
        return grad

    class Through(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            return recompute(grad)

    x = torch.ones((), device=device, requires_grad=True)
    if where == "hook":
        y = 2 * x
        y.register_hook(recompute)
    else:
        y = Through.apply(x)
    y.backward()
    assert len(recomputed) == 1
    assert_bit_equal(recomputed[0], forward)
    assert_unmoved(state, before)


def test_no_gradient_flows_through_k_means(device: torch.device) -> None:
    case = CROWDED
    points = nn.Parameter(case.tokens("points", WIDTH, device=device))
    state = state_of(case, device)
    for _ in range(3):
        assert not fast.kmeans_step(points, state, ema_decay=0.5, reseed_threshold=0.5).requires_grad
    assert not fast.assign(points, state.centroids).requires_grad
    for tensor in state:
        assert not tensor.requires_grad


@given(case=cases(), seed=st.integers(0, 1000))
def test_first_centroids_are_unit_vectors_set_by_the_seed(case: Case, seed: int) -> None:
    before = torch.random.get_rng_state()
    state = fast.initial_state(case.num_clusters, WIDTH, seed)
    assert_bit_equal(torch.random.get_rng_state(), before)
    torch.testing.assert_close(state.centroids.norm(dim=-1), torch.ones(case.num_clusters))
    assert_unmoved(fast.initial_state(case.num_clusters, WIDTH, seed), state)
    assert (fast.initial_state(case.num_clusters, WIDTH, seed + 1).centroids != state.centroids).any()
    assert_bit_equal(state.usage, torch.full((case.num_clusters,), 1 / case.num_clusters))
