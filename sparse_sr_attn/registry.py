"""A table of the names that an option file may use, and the classes or functions that they build."""

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
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
    folded = {item.casefold(): item for item in known}
    close = get_close_matches(str(name).casefold(), folded, n=1)
    hint = f"; did you mean {folded[close[0]]!r}?" if close else ""
    return f"{hint} (known: {', '.join(known)})"


class Registry(Generic[T]):
    """A table of named builders.

    Args:
        noun: what the entries are called in messages ("layer").
        modules: modules that register the library's own entries; imported before the table is first read.
    """

    def __init__(self, noun: str, modules: Sequence[str] = ()) -> None:
        self.noun = noun
        self._modules = list(modules)
        self._entries: dict[str, Entry[T]] = {}

    def register(self, name: str, *, kind: str, source: str) -> Callable[[B], B]:
        """Return a decorator that registers a class or a function under `name`.

        Registering the same object again has no effect, so a module may be imported twice.

        Raises:
            DuplicateNameError: `name` is registered for another object.
        """

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
