"""What is made of times; never the times themselves."""

import pytest
import torch

from benchmarks.speed.floor import Cost, Rates, yardsticks
from benchmarks.speed.methods import LAYER_METHODS
from benchmarks.speed.settings import Settings
from benchmarks.speed.timing import Sample, Spread, alternate, exponent, ratio

CPU = torch.device("cpu")


def test_ratios_are_of_the_same_round() -> None:
    """The machine is twice as slow in the second round: ratios do not see it, ratios of medians would."""
    slow = [Sample(4.0, 9.0), Sample(8.0, 9.0), Sample(6.0, 9.0)]
    fast = [Sample(1.0, 9.0), Sample(2.0, 9.0), Sample(3.0, 9.0)]
    assert ratio(slow, fast) == Spread(median=4.0, q1=3.0, q3=4.0)


def test_exponent_of_a_power() -> None:
    seconds = {n: 3e-6 * n**1.25 for n in (96**2, 128**2, 256**2)}
    assert exponent(seconds, 96**2, 256**2) == pytest.approx(1.25)
    assert exponent({10: 2.0, 1000: 200.0}, 10, 1000) == pytest.approx(1.0)
    assert exponent({10: 2.0, 20: 2.0}, 10, 20) == 0.0


def test_calls_alternate_and_each_comes_first_in_turn() -> None:
    made: list[str] = []
    calls = {name: lambda name=name: made.append(name) for name in "abc"}
    samples = alternate(calls, CPU, rounds=4, shortest=0.0)
    assert "".join(made) == "aabbcc" + "abc" + "bca" + "cab" + "abc"  # two calls of each to warm up
    assert {name: len(taken) for name, taken in samples.items()} == {"a": 4, "b": 4, "c": 4}


def test_the_floor_is_a_sum() -> None:
    rates = Rates(flop=10.0, exp=2.0, bytes=5.0, half_flop=40.0)
    assert rates.floor(Cost(20.0, 3.0, 10.0)) == 2.0 + 1.5 + 2.0
    assert rates.floor(Cost(20.0, 3.0, 10.0, half_flop=20.0)) == 2.0 + 1.5 + 2.0 + 0.5


def test_yardsticks_do_what_they_count() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    sticks = yardsticks(CPU, torch.float32, chunk_size=8, width=6)
    assert {stick.rate for stick in sticks.values()} == {"flop", "exp", "bytes", "half_flop"}
    for name, stick in sticks.items():
        with FlopCounterMode(display=False) as counter:
            stick.call()
        assert counter.get_total_flops() == (stick.amount if "flop" in name else 0)


def test_the_arithmetic_of_lcoa_by_hand() -> None:
    """At 64 channels, queries of 16, 128 clusters, 432 keys: multiply-adds of each token, one product after another."""
    cost = LAYER_METHODS["LCoA"].cost
    assert cost is not None
    counted = cost(Settings(), 1000)
    embedding, value, clusters = 9 * 64 * 16, 64 * 64, 128 * 16
    scores, gathered = 432 * 16, 432 * 64
    assert counted.flop == 2 * 1000 * (embedding + value + clusters + scores + gathered)
    assert counted.exp == 432 * 1000


# Products of ours are inside operators, those of dense attention are padded; each has a stand-in with the same formula.
COUNTED = [name for name, method in LAYER_METHODS.items() if name.startswith("plain-") and method.cost]


@pytest.mark.parametrize("name", [*COUNTED, "ENLA"])
def test_products_are_as_many_as_torch_counts(name: str) -> None:
    """torch's own counter sees products and convolutions, if not those inside our operators."""
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks.speed.run import _built, _input

    method = LAYER_METHODS[name]
    assert method.cost is not None
    settings = Settings(embed_dim=60)
    subject = _built(method, settings, CPU)
    x = _input(settings, CPU, 48, batch=1)
    state = subject.state(x)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        subject.module.eval()(x, *state)
    shift = 2 * 48 * 48 * 9 * 60 if "Shift" in name else 0  # the depthwise convolution is a cost of the stand-in alone
    assert counter.get_total_flops() == method.cost(settings, 48 * 48).flop + shift
