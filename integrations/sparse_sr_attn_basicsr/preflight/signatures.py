"""Check options against the signature of the code that they configure."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import make_dataclass
from difflib import get_close_matches
from typing import Annotated, Any, Literal, get_origin, get_type_hints

from sparse_sr_attn.config import Finite, ProblemList, join_path, read
from sparse_sr_attn.registry import suggestion


def check_names(
    problems: ProblemList,
    build: Callable[..., object],
    options: Mapping[str, Any],
    path: str,
    given: Sequence[str] = (),
    *,
    hint: Callable[[str, list[str]], str] = suggestion,
) -> dict[str, inspect.Parameter]:
    """Add problems for unknown options and missing parameters of a signature; return the parameters.

    A signature with `**kwargs` allows any option, except one whose name is close to that of a parameter.

    Args:
        problems: gets the problems.
        build: a class or a function.
        options: the options that it will get in addition to `given`.
        path: position of the options, for messages.
        given: parameters that are not options.
        hint: returns the end of the message for an unknown option and the known ones.
    """
    name = getattr(build, "__name__", str(build))
    parameters = inspect.signature(build).parameters.values()
    known = {p.name: p for p in parameters if p.name not in given and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for key in options:
        if key not in known and not (takes_any and not get_close_matches(key, known, cutoff=0.8)):
            problems.add(join_path(path, key), f"unknown to {name}{hint(key, list(known))}")
    for key, parameter in known.items():
        if parameter.default is parameter.empty and key not in options:
            problems.add(join_path(path, key), f"missing; {name} needs it")
    return known


def check_arguments(
    problems: ProblemList,
    build: Callable[..., object],
    options: dict[str, Any],
    path: str,
    given: Sequence[str] = (),
) -> None:
    """Check names as `check_names` does, and types; convert numbers given as text in place.

    Types come from annotations, or from defaults if a parameter has no annotation.
    """
    known = check_names(problems, build, options, path, given)
    typed = {key: _annotation(build, known[key]) for key in options if key in known}
    declared = make_dataclass("Options", typed.items())
    right = read(declared, {key: options[key] for key in typed}, path, problems=problems)
    options |= {key: value for key, value in right.items() if isinstance(options[key], str)}


def reason(error: Exception) -> str:
    """Return the message of an error on one line."""
    text = " ".join(str(error).split())
    if isinstance(error, AssertionError | ValueError | NotImplementedError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _annotation(build: Callable[..., object], parameter: inspect.Parameter) -> Any:
    hints: dict[str, Any] = {}
    with suppress(Exception):  # hints may name what is not there
        hints = get_type_hints(build.__init__ if inspect.isclass(build) else build, include_extras=True)
    hint = hints.get(parameter.name)
    if hint in (bool, int, float, str) or get_origin(hint) in (Annotated, Literal):
        return hint
    default = parameter.default
    if isinstance(default, bool | str):
        return type(default)
    if isinstance(default, int | float):
        return Finite
    return Sequence if isinstance(default, tuple | list) else Any
