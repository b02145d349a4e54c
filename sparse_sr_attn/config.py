"""Options: declared once, in the signature of what they build, and checked here. All problems are reported together.

A constructor's annotations carry the rules::

    @checked
    def __init__(self, embed_dim: PositiveInt, *, ema_decay: UnitInterval = 0.999) -> None: ...

`read` checks a mapping from an option file against these rules and returns keyword arguments; `checked` applies the
same rules to direct calls. Modules never see a mapping.
"""

import functools
import inspect
import types
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

from sparse_sr_attn.errors import ConfigError, Problem
from sparse_sr_attn.registry import suggestion

_SHOWN = 200  # characters of a value that a message shows

RENAMED: Mapping[str, tuple[str, Mapping[object, object]]] = {
    "exact_keys": ("count_keys_once", {}),
    "half_weights": ("weights_dtype", {True: "bfloat16", False: None}),
}
"""Old names of options, with the new names, and the new values where they differ."""

P = ParamSpec("P")
R = TypeVar("R")


class RenamedOptionWarning(FutureWarning):
    """An option is given by its old name."""


@dataclass(frozen=True)
class Rule:
    """A condition on a value beyond its type; `text` completes "<name> must be ..."."""

    text: str
    holds: Callable[[Any], bool]


PositiveInt = Annotated[int, Rule(">= 1", lambda value: value >= 1)]
NonNegativeInt = Annotated[int, Rule(">= 0", lambda value: value >= 0)]
NonNegative = Annotated[float, Rule(">= 0 and finite", lambda value: 0 <= value < float("inf"))]
Positive = Annotated[float, Rule("> 0 and finite", lambda value: 0 < value < float("inf"))]
Finite = Annotated[float, Rule("other than inf and nan", lambda value: abs(value) < float("inf"))]
WindowSize = Annotated[int, Rule("in [1, 1024]", lambda value: 1 <= value <= 1024)]  # padded to, whatever the map
UnitInterval = Annotated[float, Rule("in [0, 1]", lambda value: 0 <= value <= 1)]


class _Unfit(Exception):  # noqa: N818  (internal: a value that does not fit its annotation)
    """Carries the text that completes "must be ..."."""


class ProblemList:
    """Collects the problems of several checks and raises them as one error."""

    def __init__(self) -> None:
        self._found: list[Problem] = []

    def __len__(self) -> int:
        return len(self._found)

    def add(self, path: str, message: str) -> None:
        """Add a problem."""
        self._found.append(Problem(path, message))

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Collect the problems of a ConfigError raised inside and suppress it."""
        try:
            yield
        except ConfigError as error:
            self._found += error.problems

    def raise_if_any(self) -> None:
        """Raise all problems as one error, if there are any.

        Raises:
            ConfigError: there are problems.
        """
        if self._found:
            raise ConfigError(self._found)


def shown(value: object) -> str:
    """Return a value as text for messages, truncated if it is long."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text)} characters)"


def join_path(path: str, name: object) -> str:
    """Return `path.name`, or `name` if `path` is empty."""
    return f"{path}.{name}" if path else str(name)


def renamed(mapping: Mapping[str, Any], known: Collection[str], path: str = "") -> dict[str, Any]:
    """Return options with new names in place of old ones, with a warning for each.

    Args:
        mapping: names and values.
        known: names of the options of what is built. A layer may have an option of its own by an old name.
        path: position of the mapping in an option file, for messages.

    Raises:
        ConfigError: an option is given by both names.

    Examples:
        >>> renamed({"exact_keys": False}, known=["exact_keys"])  # an option of that name
        {'exact_keys': False}
    """
    options: dict[str, Any] = {}
    for name, value in mapping.items():
        new, values = RENAMED.get(name, (name, {}))
        if new == name or name in known or new not in known:
            options[name] = value
            continue
        if new in mapping:
            raise ConfigError.at(join_path(path, name), f"is the old name of {new}, which is given too")
        warnings.warn(f"the option {name} is {new} now; the old name still works", RenamedOptionWarning, stacklevel=1)
        options[new] = values.get(value, value) if isinstance(value, bool) else value
    return options


@contextmanager
def old_names_allowed() -> Iterator[None]:
    """Accept old names of options inside without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RenamedOptionWarning)
        yield


def read(
    build: Callable[..., object],
    mapping: Mapping[str, object],
    path: str = "",
    *,
    given: int = 0,
    siblings: Sequence[str] = (),
    problems: ProblemList | None = None,
) -> dict[str, Any]:
    """Check `mapping` against the signature of `build` and return keyword arguments for it.

    Args:
        build: a class or a function whose signature declares the options.
        mapping: names and values from an option file.
        path: position of the mapping in the file, for messages (`network_g.attention`).
        given: number of leading parameters that the caller passes itself; these are not options.
        siblings: other valid names next to these options, to suggest for misspelt ones.
        problems: collects problems instead of raising an error; valid values are still returned.

    Returns:
        The given values, converted to the declared types (`"1e-4"`, a string for PyYAML, to a float). Defaults are
        left to `build`.

    Raises:
        ConfigError: options are unknown, missing or invalid; the message names all of them.
    """
    options = dict(list(fields(build).items())[given:])
    found = ProblemList() if problems is None else problems
    values: dict[str, Any] = {}
    with found.gathered():
        mapping = renamed(mapping, options, path)
    for name, value in mapping.items():
        if name not in options:
            found.add(join_path(path, name), f"unknown{suggestion(name, [*siblings, *options])}")
            continue
        try:
            values[name] = _fit(value, options[name].annotation)
        except _Unfit as unfit:
            found.add(join_path(path, name), f"must be {unfit}, got {shown(value)}")
    for name, field in options.items():
        if field.default is field.empty and name not in mapping:
            found.add(join_path(path, name), "missing; it has no default")
    if problems is None:
        found.raise_if_any()
    return values


def checked(init: Callable[P, R]) -> Callable[P, R]:
    """Decorate a constructor so that calls are checked against its annotations; all problems are reported together."""
    signature = inspect.signature(init)
    takes_any = {name for name, p in signature.parameters.items() if p.kind is inspect.Parameter.VAR_KEYWORD}
    hints: dict[str, Any] = {}

    @functools.wraps(init)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        if not hints:
            hints.update(get_type_hints(init, include_extras=True))
        problems = ProblemList()
        kwargs = renamed(kwargs, signature.parameters)  # type: ignore[assignment]
        for name in () if takes_any else kwargs.keys() - signature.parameters.keys():
            problems.add(name, f"unknown{suggestion(name, list(signature.parameters)[1:])}")
        problems.raise_if_any()
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return init(*args, **kwargs)  # Python's own error names the function and the arguments
        for name, value in bound.arguments.items():
            if name in hints and name not in takes_any:
                try:
                    bound.arguments[name] = _fit(value, hints[name])
                except _Unfit as unfit:
                    problems.add("", f"{name} must be {unfit}, got {shown(value)}")
        problems.raise_if_any()
        return init(*bound.args, **bound.kwargs)

    return wrapper


def takes_options_of(build: type) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a constructor that forwards its `**options` to `build`, which declares them.

    For `checked` and `fields`, its signature then contains the keyword options of `build` that it does not name itself.
    """

    def decorate(init: Callable[P, R]) -> Callable[P, R]:
        own = inspect.signature(init)
        taken = [
            option
            for name, option in fields(build).items()
            if option.kind is option.KEYWORD_ONLY and name not in own.parameters
        ]
        named = [parameter for parameter in own.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD]
        by_place = [parameter for parameter in named if parameter.kind is not parameter.KEYWORD_ONLY]
        by_name = [parameter for parameter in named if parameter.kind is parameter.KEYWORD_ONLY]
        init.__signature__ = own.replace(parameters=[*by_place, *taken, *by_name])  # type: ignore[attr-defined]
        init.__annotations__ = {**init.__annotations__, **{option.name: option.annotation for option in taken}}
        return init

    return decorate


def fields(build: Callable[..., object]) -> dict[str, inspect.Parameter]:
    """Return the parameters of a class or function by name, annotations resolved."""
    function = build.__init__ if inspect.isclass(build) else build
    hints = get_type_hints(function, include_extras=True)
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {
        name: parameter.replace(annotation=hints.get(name, Any))
        for name, parameter in inspect.signature(build).parameters.items()
        if parameter.kind not in variadic
    }


def _fit(value: object, annotation: Any) -> Any:
    """Return `value` converted to the annotation, or raise `_Unfit` with what it must be."""
    if annotation is Any:
        return value
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        base, *rules = arguments
        rules = [rule for rule in rules if isinstance(rule, Rule)]
        try:
            fitted = _fit(value, base)
        except _Unfit as unfit:
            raise _Unfit(" ".join([str(unfit), *(rule.text for rule in rules)])) from None
        for rule in rules:
            if not rule.holds(fitted):
                raise _Unfit(rule.text)
        return fitted
    if origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in arguments):
            return value
        raise _Unfit("one of " + ", ".join(map(repr, arguments)))
    if origin in (Union, types.UnionType):
        texts = []
        for member in arguments:
            try:
                return _fit(value, member)
            except _Unfit as unfit:
                texts.append(str(unfit))
        raise _Unfit(" or ".join(texts))
    return _fit_plain(value, origin or annotation, arguments)


def _fit_plain(value: object, base: Any, arguments: tuple[Any, ...]) -> Any:  # noqa: PLR0911, PLR0912
    if base in (None, type(None)):
        if value is None:
            return None
        raise _Unfit("~ (nothing)")
    if base in (bool, str):
        if isinstance(value, base):
            return value
        raise _Unfit("true or false" if base is bool else "a string")
    if base is int:
        if isinstance(value, Integral) and not isinstance(value, bool):
            if -(2**63) <= int(value) < 2**63:
                return int(value)
            raise _Unfit("an integer of 64 bits")
        raise _Unfit("an integer")
    if base is float:
        return _fit_float(value)
    if isinstance(base, type) and issubclass(base, Sequence):
        if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
            raise _Unfit("a list")
        return tuple(_fit(item, arguments[0] if arguments else Any) for item in value)
    if isinstance(base, type) and issubclass(base, Mapping):
        if not isinstance(value, Mapping):
            raise _Unfit("a mapping")
        return value
    if isinstance(value, base):
        return value
    raise _Unfit(f"a {base.__name__}")


def _fit_float(value: object) -> float:
    if isinstance(value, Real) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            pass
    raise _Unfit("a number")
