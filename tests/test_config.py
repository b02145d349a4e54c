"""Options are declared once, in signatures; everything wrong is said at once, with its path."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_sr_attn import EDSR, LSP, NLA, NLSA, LCoA, LCoAN, attach, create_model, load_model
from sparse_sr_attn.backbones.base import encode_options, options_of
from sparse_sr_attn.checkpoints.read import carried_options
from sparse_sr_attn.config import (
    Positive,
    PositiveInt,
    ProblemList,
    RenamedOptionWarning,
    UnitInterval,
    checked,
    fields,
    read,
    takes_options_of,
)
from sparse_sr_attn.errors import ConfigError, Problem
from sparse_sr_attn.functional.cluster import cluster_pattern

pytestmark = pytest.mark.promise("R1")


def build(
    width: PositiveInt,
    *,
    decay: UnitInterval = 0.5,
    rate: Positive = 1e-4,
    names: Sequence[str] = (),
    mode: Literal["a", "b"] = "a",
    extra: Mapping[str, Any] | None = None,
    flag: bool = False,
    anything: Any = None,
    unsaid=None,
) -> None:
    """Declare one option of each kind."""


def problems(mapping: Mapping[str, object], path: str = "") -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read(build, mapping, path)
    return [str(problem) for problem in caught.value.problems]


def test_values_come_converted() -> None:
    values = read(build, {"width": 3, "rate": "1e-4", "decay": 1, "names": ["x"], "mode": "b", "extra": {"k": 1}})
    assert values == {"width": 3, "rate": 1e-4, "decay": 1.0, "names": ("x",), "mode": "b", "extra": {"k": 1}}
    assert type(values["rate"]) is type(values["decay"]) is float


def test_no_defaults_are_filled_in() -> None:
    assert read(build, {"width": 1}) == {"width": 1}
    assert read(build, {}, given=1) == {}


@pytest.mark.parametrize(("mapping", "expected"), [
    ({}, "width: missing; it has no default"),
    ({"width": 0}, "width: must be >= 1, got 0"),
    ({"width": "3"}, "width: must be an integer >= 1, got '3'"),
    ({"width": True}, "width: must be an integer >= 1, got True"),
    ({"width": None}, "width: must be an integer >= 1, got None"),
    ({"width": 1, "decay": "x"}, "decay: must be a number in [0, 1], got 'x'"),
    ({"width": 1, "decay": -0.1}, "decay: must be in [0, 1], got -0.1"),
    ({"width": 1, "rate": float("inf")}, "rate: must be > 0 and finite, got inf"),
    ({"width": 1, "names": "abc"}, "names: must be a list, got 'abc'"),
    ({"width": 1, "names": [1]}, "names: must be a string, got [1]"),
    ({"width": 1, "mode": "c"}, "mode: must be one of 'a', 'b', got 'c'"),
    ({"width": 1, "extra": 3}, "extra: must be a mapping or ~ (nothing), got 3"),
    ({"width": 1, "flag": 1}, "flag: must be true or false, got 1"),
])  # fmt: skip
def test_each_rule_has_its_words(mapping: Mapping[str, object], expected: str) -> None:
    assert problems(mapping) == [expected]


def test_all_problems_with_paths_and_suggestions() -> None:
    assert problems({"widht": 3, "decay": 2}, "network_g.attention") == [
        "network_g.attention.widht: unknown; did you mean 'width'? "
        "(known: width, decay, rate, names, mode, extra, flag, anything, unsaid)",
        "network_g.attention.decay: must be in [0, 1], got 2",
        "network_g.attention.width: missing; it has no default",
    ]


def test_problems_can_be_gathered_beside_what_is_right() -> None:
    found = ProblemList()
    assert read(build, {"width": "4 px", "rate": "1e-3", "nam": 1}, "net", problems=found) == {"rate": 1e-3}
    assert read(build, {"width": 2}, "other", problems=found) == {"width": 2}
    with pytest.raises(ConfigError) as caught:
        found.raise_if_any()
    assert [problem.path for problem in caught.value.problems] == ["net.width", "net.nam"]


def test_checked_holds_direct_callers_to_the_same_rules() -> None:
    called = checked(build)
    with pytest.raises(ConfigError, match=r"^width must be >= 1, got 0\ndecay must be in \[0, 1\], got 7$"):
        called(0, decay=7)
    with pytest.raises(ConfigError, match="dekay: unknown; did you mean 'decay'"):
        called(1, dekay=7)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'width'"):
        called()


def test_checked_leaves_open_what_a_function_leaves_open() -> None:
    def opened(width: PositiveInt, **rest: int) -> tuple[int, dict[str, int]]:
        return width, rest

    assert checked(opened)(1, other=2) == (1, {"other": 2})
    with pytest.raises(ConfigError, match=r"^width must be >= 1, got 0$"):
        checked(opened)(0, other=2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LCoA(64, 128), r"^LCoA\.__init__\(\) takes 2 positional arguments but 3 were given"),
        (LCoA, r"^LCoA\.__init__\(\) missing 1 required positional argument: 'embed_dim'"),
        (attach, r"^attach\(\) missing 1 required positional argument: 'model'"),
    ],
)
def test_wrong_positions_give_pythons_own_error(call: Callable[[], object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()


class Inner:
    @checked
    def __init__(self, width: PositiveInt, *, size: PositiveInt = 3, name: str = "a") -> None:
        self.given = (width, size, name)


class Outer:
    @checked
    @takes_options_of(Inner)
    def __init__(self, width: PositiveInt, *, name: str = "b", **options: Any) -> None:
        self.inner = Inner(width, name=name, **options)


def test_options_of_another_class_are_declared_there() -> None:
    """All but those that a constructor names itself, whose default is its own."""
    assert {name: option.default for name, option in list(fields(Outer).items())[1:]} == {"size": 3, "name": "b"}
    assert Outer(1).inner.given == (1, 3, "b")
    assert Outer(1, size=2, name="c").inner.given == (1, 2, "c")
    with pytest.raises(ConfigError, match=r"^size must be >= 1, got 0$"):
        Outer(1, size=0)
    with pytest.raises(ConfigError, match="sized: unknown; did you mean 'size'"):
        Outer(1, sized=3)
    with pytest.raises(TypeError, match=r"Outer.__init__\(\) takes 2 positional arguments but 3 were given"):
        Outer(1, 2)


def test_under_moves_every_path() -> None:
    error = ConfigError([Problem("a", "is wrong"), Problem("", "so is all of it")]).under("top")
    assert str(error) == "top.a: is wrong\ntop: so is all of it"


@given(st.dictionaries(st.text(max_size=8), st.none() | st.integers() | st.text() | st.lists(st.integers())))
def test_any_mapping_is_read_or_explained(mapping: dict[str, object]) -> None:
    """Whatever an option file holds, the answer is values or a ConfigError that names each bad key."""
    try:
        values = read(build, mapping)
    except ConfigError as error:
        assert {p.path for p in error.problems} <= {*mapping, "width"}
        assert error.problems
    else:
        assert values.keys() == mapping.keys()


# --- old names --------------------------------------------------------------------------------------------------------

OLD = {"exact_keys": False, "half_weights": True}
NEW = {"count_keys_once": False, "weights_dtype": "bfloat16"}


def small(**options: Any) -> LCoAN:
    return LCoAN(num_feat=8, num_group=1, num_block=1, num_clusters=4, **options)


def test_old_names_work_everywhere_with_a_notice() -> None:
    builds: list[tuple[Callable[..., Any], Callable[[Any], object]]] = [
        (lambda **options: LSP(8, **options), lambda lsp: lsp),
        (lambda **options: LCoA(8, **options), lambda lcoa: lcoa.lsp),
        (small, lambda model: model.body[0].attention.lsp),
        (
            lambda **options: EDSR(num_feat=8, num_block=1, attention={"type": "LCoA", "every": 1, **options}),
            lambda model: model.attention[0].lsp,
        ),
        (lambda **options: create_model("LCoAN-light", **options), lambda model: model.body[0].attention.lsp),
        (lambda **options: read(LSP, options, given=1), lambda given: SimpleNamespace(**given)),
    ]
    for build, lsp_of in builds:
        with pytest.warns(FutureWarning) as warned:
            found: Any = lsp_of(build(**OLD))
        assert {name: getattr(found, name) for name in NEW} == NEW
        texts = sorted({str(each.message) for each in warned if each.category is RenamedOptionWarning})
        assert texts == [
            f"the option {old} is {new} now; the old name still works" for old, new in zip(OLD, NEW, strict=True)
        ]
    with pytest.warns(FutureWarning, match="the option exact_keys is count_keys_once now"):
        assert not NLSA(8, exact_keys=False).count_keys_once


def test_an_option_by_both_names_is_a_mistake() -> None:
    message = "exact_keys: is the old name of count_keys_once, which is given too"
    for build in (lambda **options: LSP(8, **options), lambda **options: read(LSP, options, "here", given=1)):
        with pytest.raises(ConfigError, match=message):
            build(exact_keys=True, count_keys_once=True)
    with pytest.raises(ConfigError, match=r"exact_keys: unknown"):
        read(NLA, {"exact_keys": True}, given=1)


def test_a_layer_may_have_an_option_by_an_old_name() -> None:
    @checked
    def build(exact_keys: bool, *, count_keys_once: bool = True) -> tuple[bool, bool]:
        return exact_keys, count_keys_once

    assert build(exact_keys=False) == (False, True)
    assert read(build, {"exact_keys": False}) == {"exact_keys": False}


def test_weights_with_old_names_load_without_a_notice() -> None:
    model = small(**NEW)
    state = model.state_dict()
    options = carried_options(state["options"])
    old = {name: value for name, value in options.items() if name not in NEW}
    state["options"] = encode_options({**old, **OLD})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = load_model(state)
        assert load_model(state, count_keys_once=True).body[0].attention.lsp.count_keys_once
    assert options_of(again) == options_of(model)
    with pytest.warns(FutureWarning, match="exact_keys is count_keys_once now"):
        assert load_model(state, exact_keys=True).body[0].attention.lsp.count_keys_once


def test_the_old_keyword_of_a_pattern() -> None:
    assignment = torch.tensor([[0, 1, 0, 1, 0]])
    with pytest.warns(FutureWarning, match="exact_keys is count_keys_once now"):
        pattern = cluster_pattern(assignment, chunk_size=2, exact_keys=False)
    assert not pattern.count_keys_once
    assert not pattern.exact_keys
