"""A table of the names that an option file may use, and the classes or functions that they build."""

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Generic, TypeVar

from sparse_sr_attn.errors import DuplicateNameError, UnknownNameError

T = TypeVar("T")
B = TypeVar("B", bound=Callable[..., object])


@dataclass(frozen=True)
class Entry(Generic[T]):
    """One row of the table.

    Attributes:
        name: the name that users write.
        kind: what it can be used for; each registry defines its kinds.
        build: the class or function; its signature declares the options (see `sparse_sr_attn.config`).
        source: the paper or code that it follows.
    """

    name: str
    kind: str
    build: Callable[..., T]
    source: str


def suggestion(name: object, known: list[str]) -> str:
    """Return "; did you mean 'X'? (known: ...)" for a name that is not in `known`."""
    close = " or ".join(map(repr, _close(str(name).casefold(), {item.casefold(): item for item in known})))
    hint = f"; did you mean {close}?" if close else ""
    return f"{hint} (known: {', '.join(known)})"


_CLOSE = 0.6  # similarity of a name that is suggested
_SHORTEST = 3  # characters that a name must have in common with one that contains it


def _close(name: str, known: Mapping[str, str]) -> list[str]:
    """Return the names most similar to a name, or else those that contain it or that it contains."""
    ratios = {item: SequenceMatcher(None, item, name).ratio() for item in known}
    best = max(ratios.values(), default=0)
    if best >= _CLOSE:
        return [known[item] for item, ratio in ratios.items() if ratio == best]
    within = [item for item in known if min(len(item), len(name)) >= _SHORTEST and (item in name or name in item)]
    longest = max(map(len, within), default=0)
    return [known[item] for item in within if len(item) == longest]


class Registry(Generic[T]):
    """A table of named builders.

    Args:
        noun: what the entries are called in messages ("layer").
        modules: modules that register the library's own entries; imported before the table is first read.
        kinds: allowed kinds of entries. Default: any.
    """

    def __init__(self, noun: str, modules: Sequence[str] = (), kinds: Sequence[str] = ()) -> None:
        self.noun = noun
        self._kinds = kinds
        self._modules = list(modules)
        self._entries: dict[str, Entry[T]] = {}

    def register(self, name: str, *, kind: str, source: str) -> Callable[[B], B]:
        """Return a decorator that registers a class or a function under `name`.

        Registering the same object again has no effect, so a module may be imported twice.

        Raises:
            DuplicateNameError: `name` is registered for another object.
            ValueError: the table has no such kind.
        """
        if self._kinds and kind not in self._kinds:
            raise ValueError(f"kind of {name} must be one of {', '.join(self._kinds)}, got {kind!r}")

        def enter(build: B) -> B:
            present = self._entries.get(name)
            if present is not None and not _same(present.build, build):
                raise DuplicateNameError(
                    f"a {self.noun} name must be new, got {name!r}, which {_where(present.build)} has already; "
                    f"register {_where(build)} under another name"
                )
            self._entries[name] = Entry(name, kind, build, source)  # type: ignore[arg-type]
            return build

        return enter

    def get(self, name: str) -> Entry[T]:
        """Return the entry called `name`.

        Raises:
            UnknownNameError: there is none; the message suggests the nearest name and lists all.
        """
        try:
            return self._all()[name]
        except (KeyError, TypeError):
            raise UnknownNameError(f"no {self.noun} named {name!r}{suggestion(name, list(self))}") from None

    def __getitem__(self, name: str) -> Callable[..., T]:
        """Return the class or function called `name`; `get` returns its whole entry.

        Raises:
            UnknownNameError: no entry has that name.
        """
        return self.get(name).build

    def __contains__(self, name: object) -> bool:
        return name in self._all()

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._all()))

    def __len__(self) -> int:
        return len(self._all())

    def __repr__(self) -> str:
        return f"Registry({self.noun}: {', '.join(self)})"

    def _all(self) -> dict[str, Entry[T]]:
        while self._modules:
            importlib.import_module(self._modules.pop())
        return self._entries


def _where(build: Callable[..., object]) -> str:
    return f"{build.__module__}.{getattr(build, '__qualname__', build)}"


def _same(one: Callable[..., object], other: Callable[..., object]) -> bool:
    return one is other or (_where(one) == _where(other) and "<" not in _where(one))
