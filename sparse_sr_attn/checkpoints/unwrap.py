"""Find the weights of a network in a checkpoint: their containers, and the prefix of their keys.

Training code wraps networks (`DataParallel`, `torch.compile`, `AveragedModel`, a `LightningModule`, ...) and state
dicts (`{"params_ema": ...}`, `{"state_dict": ...}`, ...) in many ways. No list of names is complete, so nothing is
looked up by name: a network is wherever the keys behind a common prefix are recognised.
"""

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sparse_sr_attn.errors import CheckpointError

Recognises = Callable[[Mapping[Any, Any]], bool]

_ANCHORS = re.compile(r"(?:.*\.)?(?=(?:conv_first\.weight|head\.0\.weight|options)$)", re.DOTALL)
# Wrappers inside a network stand inside the keys; the second pattern is tried where the first finds nothing.
_INSIDE = (
    re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."),
    re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.|(?<=\.)module\."),
)
_AVERAGED = re.compile(
    r"(?<![A-Za-z])(?:ema|swa|avg|averaged?|shadow)(?![a-z])|E(?:MA|ma)(?![a-z])|SWA|Averaged?(?![a-z])"
)
_PRESENT = re.compile(r"(?<![A-Za-z])(?:current|online|raw)(?![a-z])")
_NO_WEIGHTS = re.compile(r"optim|exp_avg|grad", re.IGNORECASE)
_DEPTH = 6  # containers around a container
_MOST_PREFIXES = 32


@dataclass(frozen=True, eq=False)
class Candidate:
    """One network in a checkpoint.

    Attributes:
        name: its location, for messages: containers, then the prefix of its keys.
        state: its entries, without that prefix.
        averaged: whether they are averaged weights.
    """

    name: str
    state: dict[Any, Any]
    averaged: bool


@dataclass(frozen=True, eq=False)
class Found:
    """The network to load.

    Attributes:
        chosen: the network.
        beside: the network before averaging if `chosen` is averaged, because averages may lack buffers.
        others: names of the networks that were not chosen.
    """

    chosen: Candidate
    beside: Mapping[Any, Any]
    others: tuple[str, ...]


def find(content: object, recognises: Recognises, anchor: str | None = None) -> Found | None:
    """Return the network in a checkpoint; `None` if there is none.

    Averaged weights take precedence over those that they average.

    Args:
        content: nested mappings and lists with tensors anywhere in them.
        recognises: function that returns whether entries are of a known network.
        anchor: a key of the network; by default, keys of known networks.

    Raises:
        CheckpointError: there are several networks; names them.
    """
    anchors = _ANCHORS if anchor is None else re.compile(rf"(?:.*\.)?(?={re.escape(anchor)}$)", re.DOTALL)
    candidates = list(_distinct(_candidates(content, recognises, anchors)))
    if not candidates:
        return None
    averaged = [candidate for candidate in candidates if candidate.averaged]
    plain = [candidate for candidate in candidates if not candidate.averaged]
    if len(plain) > 1:
        plain = [candidate for candidate in plain if not _PRESENT.search(candidate.name)] or plain
    chosen, *more = averaged or plain
    if more:
        names = [candidate.name for candidate in (chosen, *more)]
        raise CheckpointError(
            f"must hold one network, or one average of it, got {len(names)}: {', '.join(names)}; take the entries of "
            "one of them, without the prefix of its keys, and pass those to load_model"
        )
    if not averaged:
        _warn_of_averages(content, chosen)
    beside = plain[0].state if chosen.averaged and len(plain) == 1 else {}
    return Found(chosen, beside, tuple(other.name for other in candidates if other is not chosen))


def _candidates(content: object, recognises: Recognises, keys: re.Pattern[str]) -> Iterator[Candidate]:
    for path, container in containers(content):
        for inside in _INSIDE:
            state = _without(inside, container)
            found = list(_in_one_state(path, state, recognises, keys))
            yield from found
            if found:
                break


def _in_one_state(
    path: tuple[str, ...], state: Mapping[Any, Any], recognises: Recognises, keys: re.Pattern[str]
) -> Iterator[Candidate]:
    anchors = (keys.match(key) for key, value in state.items() if isinstance(key, str) and isinstance(value, Tensor))
    prefixes = sorted(
        {"", *(anchor[0] for anchor in anchors if anchor)}, key=lambda prefix: (prefix.count("."), prefix)
    )
    for prefix in prefixes[:_MOST_PREFIXES]:
        inside = {key[len(prefix) :]: v for key, v in state.items() if isinstance(key, str) and key.startswith(prefix)}
        own = inside if prefix else dict(state)
        if recognises({key: value for key, value in own.items() if isinstance(key, str) and isinstance(value, Tensor)}):
            name = "/".join(path) + (f" {prefix}*" if prefix else "")
            counted = any(f"{outer}n_averaged" in state for outer in _outer(prefix))
            yield Candidate(name.strip() or "the top", own, counted or bool(_AVERAGED.search(name)))


def containers(content: object) -> Iterator[tuple[tuple[str, ...], Mapping[Any, Any]]]:
    """Yield the mappings that hold tensors, each with the names of its containers."""
    for path, value in _walk(content):
        if isinstance(value, Mapping) and any(isinstance(entry, Tensor) for entry in value.values()):
            yield path, value


def _walk(content: object) -> Iterator[tuple[tuple[str, ...], object]]:
    """Yield tensors and containers, except those of optimizers, with the names of the containers around them."""
    seen: set[int] = set()
    level: list[tuple[tuple[str, ...], object]] = [((), content)]
    for _ in range(_DEPTH):
        inner: list[tuple[tuple[str, ...], object]] = []
        for path, value in level:
            if id(value) in seen or not isinstance(value, (Mapping, list, tuple, Tensor)):
                continue
            seen.add(id(value))
            yield path, value
            if not isinstance(value, Tensor):
                entries: Iterable[Any] = value.items() if isinstance(value, Mapping) else enumerate(value)
                inner += [((*path, str(key)), entry) for key, entry in entries if not _NO_WEIGHTS.search(str(key))]
        level = inner


def _without(pattern: re.Pattern[str], state: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """Return the entries with a pattern removed from their keys, unless two keys would become equal."""
    renamed = {pattern.sub("", key) if isinstance(key, str) else key: value for key, value in state.items()}
    return renamed if len(renamed) == len(state) else state


def _outer(prefix: str) -> Iterator[str]:
    """Yield the prefixes of the modules around the one with this prefix."""
    while prefix:
        prefix = prefix[: prefix[:-1].rfind(".") + 1]
        yield prefix


def _distinct(candidates: Iterable[Candidate]) -> Iterator[Candidate]:
    """Drop networks whose tensors are those of another under a different name."""
    kept: list[Candidate] = []
    for candidate in candidates:
        if not any(_same(candidate.state, other.state) for other in kept):
            kept.append(candidate)
            yield candidate


def _same(one: Mapping[Any, Any], other: Mapping[Any, Any]) -> bool:
    return one.keys() == other.keys() and all(
        value is other[key]
        or (isinstance(value, Tensor) and isinstance(other[key], Tensor) and _equal(value, other[key]))
        for key, value in one.items()
    )


def _equal(one: Tensor, other: Tensor) -> bool:
    try:
        return one.dtype == other.dtype and one.shape == other.shape and bool((one == other).all())
    except (RuntimeError, NotImplementedError):  # of sparse, quantised and meta tensors
        return False


def _warn_of_averages(content: object, chosen: Candidate) -> None:
    """Warn of averages that are ignored because their keys are missing or unknown."""
    size = sum(value.numel() for value in chosen.state.values() if isinstance(value, Tensor))
    totals: dict[str, int] = {}
    for path, value in _walk(content):
        found = next((name.partition(".")[0] for name in path if _AVERAGED.search(name)), None)
        if found is not None and isinstance(value, Tensor):
            totals[found] = totals.get(found, 0) + value.numel()
    for name, total in totals.items():
        if 2 * total > size:
            warnings.warn(
                f"the averages under {name!r} have no keys that are known, so they are not used; "
                f"the weights are those of {chosen.name}",
                stacklevel=2,
            )
            return
