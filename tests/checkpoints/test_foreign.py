"""Networks of others: which images they take, found by calling them, and their weights."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_sr_attn import attach, load_model
from sparse_sr_attn.checkpoints.foreign import Facts, find_facts, run_padded


class Host(nn.Module):
    """A network with demands on the sides of its images."""

    def __init__(self, multiple: int = 1, least: int = 1) -> None:
        super().__init__()
        self.multiple, self.least = multiple, least
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(4)))
        self.last = nn.Conv2d(8, 12, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        for side in x.shape[-2:]:
            if side % self.multiple or side < self.least:
                raise RuntimeError(f"a side of {side}")
        return F.pixel_shuffle(self.last(self.body(self.first(x))), 2)


@pytest.mark.parametrize(
    ("multiple", "least", "told"),
    [(1, 1, 1), (1, 13, 13), (1, 50, 50), (4, 1, 1), (8, 9, 1), (5, 33, 35), (64, 1, 1)],
)
def test_multiples_are_told_from_a_least_side(multiple: int, least: int, told: int) -> None:
    """With (8, 9), images of 16 pixels fit anyway."""
    assert find_facts(Host(multiple, least)) == Facts(3, 3, 2, multiple, told)


class ByChance(Host):
    """Pads sides to multiples of 24 inside, but only by a little."""

    def forward(self, x: Tensor) -> Tensor:
        if any(-side % 24 > 5 for side in x.shape[-2:]):
            raise RuntimeError
        return super().forward(x)


def test_a_size_that_fits_by_chance_is_no_multiple() -> None:
    facts = find_facts(ByChance())
    assert facts is not None
    assert facts.multiple == 24


class Windows(Host):
    """Needs a longer side in one direction than in the other, and refuses a side beyond that (FSANet)."""

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        if height < 21 or width < 22 or 26 in (height, width):
            raise RuntimeError
        return super().forward(x)


def test_from_the_least_side_on_all_images_run() -> None:
    host = Windows()
    facts = find_facts(host)
    assert facts == Facts(3, 3, 2, 1, 27)
    for side in (20, 21, 22, 26, 27):
        assert run_padded(host, torch.rand(1, 3, side, side), facts).shape == (1, 3, 2 * side, 2 * side)


@pytest.mark.parametrize("size", [(13, 40), (40, 12), (5, 3), (31, 17)])
@pytest.mark.parametrize(("multiple", "least"), [(1, 13), (4, 1), (5, 33)])
def test_images_of_any_size_run_and_those_that_fit_are_not_padded(
    multiple: int, least: int, size: tuple[int, int]
) -> None:
    host = Host(multiple, least).eval()
    facts, seen = find_facts(host), []
    host.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[-2:])))
    image = torch.rand(1, 3, *size)
    output = run_padded(host, image, facts)
    assert output.shape == (1, 3, 2 * size[0], 2 * size[1])
    assert seen == [tuple(-(-max(side, least) // multiple) * multiple for side in size)]
    centre = (..., slice(0, 2 * size[0] - 16), slice(0, 2 * size[1] - 16))  # what is padded is out of reach
    host.multiple = host.least = 1
    torch.testing.assert_close(output[centre], host(image)[centre])


class Fusing(Host):
    """Fuses its weights when it is first called for evaluation, and has others then."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and hasattr(self, "scale"):
            self.first.weight.data *= self.scale.data
            del self.scale
        return super().forward(x)

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(8, 1, 1, 1))


@pytest.mark.parametrize("attended", [False, True])
def test_weights_are_loaded_before_a_network_fuses_them(attended: bool) -> None:
    trained = Fusing()
    if attended:
        attach(trained, "body", num_clusters=5, chunk_size=12)
    image = torch.rand(1, 3, 16, 16)
    expected = copy.deepcopy(trained).eval()(image)
    torch.testing.assert_close(load_model(trained.state_dict(), model=Fusing())(image), expected)
