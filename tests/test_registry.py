"""The registry is a name table: unknown names get a suggestion, taken ones are refused, nothing else happens."""

import pytest

from sparse_sr_attn import DuplicateNameError, UnknownNameError
from sparse_sr_attn.registry import Registry, suggestion


def one() -> int:
    return 1


def two() -> int:
    return 2


def table() -> Registry[int]:
    registry: Registry[int] = Registry("number")
    registry.register("One", kind="odd", source="Peano")(one)
    return registry


def test_entries_come_back_whole() -> None:
    entry = table().get("One")
    assert (entry.name, entry.kind, entry.build, entry.source) == ("One", "odd", one, "Peano")
    assert entry.build() == 1
    assert table()["One"] is one
    assert repr(table()) == "Registry(number: One)"


def test_unknown_name_suggests() -> None:
    with pytest.raises(UnknownNameError) as caught:
        table().get("oen")
    assert str(caught.value) == "no number named 'oen'; did you mean 'One'? (known: One)"
    with pytest.raises(UnknownNameError, match=r"no number named \['One'\]"):
        table().get(["One"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "known", "hint"),
    [
        ("SparseNet", ["Net", "Other"], "; did you mean 'Net'? "),
        ("net", ["LongestOfNets", "Other"], "; did you mean 'LongestOfNets'? "),
        ("net_x", ["net_1", "net_2", "other"], "; did you mean 'net_1' or 'net_2'? "),
        ("Netb-of-parts", ["Net", "Netb"], "; did you mean 'Netb'? "),
        ("xo", ["One", "xoxoxoxo"], " "),
        ("else", ["One"], " "),
        ("else", [], " "),
    ],
)
def test_suggestions_are_similar_names_or_those_that_contain_it(name: str, known: list[str], hint: str) -> None:
    assert suggestion(name, known) == f"{hint}(known: {', '.join(known)})"


def test_taken_name_is_refused_and_nothing_changes() -> None:
    registry = table()
    with pytest.raises(DuplicateNameError, match=r"'One', which .*\.one has already; register .*\.two under another"):
        registry.register("One", kind="even", source="x")(two)
    assert registry.get("One").build is one


@pytest.mark.promise("R23")
def test_same_again_is_once() -> None:
    registry = table()
    registry.register("One", kind="odd", source="Peano")(one)
    assert list(registry) == ["One"]
    assert len(registry) == 1
    assert "One" in registry
    assert "Two" not in registry


def test_a_kind_that_the_table_does_not_have() -> None:
    registry: Registry[int] = Registry("number", kinds=("even", "odd"))
    with pytest.raises(ValueError, match="kind of One must be one of even, odd, got 'od'"):
        registry.register("One", kind="od", source="Peano")
    assert "One" not in registry
