"""Options of the optimizer and the schedule that changed between a stop and its resume.

A training state contains the old ones. BasicSR restores them, so new values in the option file are ignored silently,
and a schedule of another type fails later. Here the option file takes precedence, and every change is reported.
"""

import copy
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

_SCHEDULED = ("lr", "initial_lr", "params")  # in a group of weights: set by the schedule, or no option


def restore_with_new_options(model: Any, state: Mapping[str, Any]) -> list[str]:
    """Restore a training state, keep the options that the model was built with, and return what differs.

    If the schedule has changed, the learning rate is that of the new schedule at this iteration.

    Args:
        model: a new model of BasicSR.
        state: the training state, with `optimizers`, `schedulers`, `iter`, ...

    Raises:
        ValueError: an entry of `schedulers` is not the state of a schedule, or a step from there would not leave finite
            weights and a finite learning rate.
        Exception: anything that a state of another model leads to.
    """
    groups = [[dict(group, params=None) for group in optimizer.param_groups] for optimizer in model.optimizers]
    schedules = [copy.deepcopy(scheduler.state_dict()) for scheduler in model.schedulers]
    names = [_name(model, optimizer) for optimizer in model.optimizers]
    saved = list(state["schedulers"])
    changes: list[str] = []
    scheduled = False  # whether the learning rate is another
    if warmup := _changed_warmup(model, state):
        changes.append(warmup)
        scheduled = True
    for number, (before, now) in enumerate(zip(saved, schedules, strict=False)):
        if changed := list(_changed_schedule(before, now)):
            if not isinstance(before.get("last_epoch"), int):
                raise ValueError(f"the state of schedule {number} has no last_epoch")
            changes += changed
            scheduled = True
            saved[number] = copy.deepcopy(now)
    model.resume_training({**state, "schedulers": saved})
    for name, optimizer, fresh in zip(names, model.optimizers, groups, strict=True):
        for group, new in zip(optimizer.param_groups, fresh, strict=True):
            if "initial_lr" in new and group.get("initial_lr") != new["initial_lr"]:
                changes.append(_change(f"{name}.lr", new["initial_lr"], group.get("initial_lr")))
                scheduled = True
            for option, value in new.items():
                if option not in _SCHEDULED and option in group and _plain(group[option]) != _plain(value):
                    changes.append(_change(f"{name}.{option}", value, group[option]))
                    group[option] = value
    if scheduled:
        _follow(model, groups, schedules, int(state["iter"]))
    for optimizer, scheduler in zip(model.optimizers, model.schedulers, strict=True):
        _try_step(optimizer, scheduler)
    return list(dict.fromkeys(changes))


def warmup_of(model: Any) -> int:
    """Return `train.warmup_iter`."""
    return int((model.opt.get("train") or {}).get("warmup_iter", -1))


def _changed_warmup(model: Any, state: Mapping[str, Any]) -> str | None:
    before, now = (state.get("exact") or {}).get("warmup_iter"), warmup_of(model)
    return None if before in (None, now) else _change("train.warmup_iter", now, before)


def _changed_schedule(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Yield how the settings of a schedule differ, except for counters and learning rates."""
    old, new = _settings(before), _settings(now)
    if old.keys() != new.keys():
        yield f"train.scheduler.type: there was a schedule with {', '.join(sorted(old))}, now {', '.join(sorted(new))}"
        return
    for name in new:
        if old[name] != new[name]:
            yield _change(f"train.scheduler.{name}", new[name], old[name])


def _settings(schedule: Mapping[str, Any]) -> dict[str, Any]:
    counted = ("last_epoch", "verbose", "base_lrs", "optimizer", "cumulative_period")
    return {str(k): _plain(v) for k, v in schedule.items() if not str(k).startswith("_") and k not in counted}


def _follow(model: Any, groups: list[Any], schedules: list[Any], iteration: int) -> None:
    """Step the schedule to an iteration, as training would have."""
    for optimizer, fresh in zip(model.optimizers, groups, strict=True):
        for group, new in zip(optimizer.param_groups, fresh, strict=True):
            group.update({name: new[name] for name in ("lr", "initial_lr") if name in new})
    for scheduler, start in zip(model.schedulers, schedules, strict=True):
        scheduler.load_state_dict(start)
    total = int(model.opt["train"]["total_iter"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch misses the steps of the optimizer, which were made before the stop
        for number in range(1, min(iteration, total) + 1):
            model.update_learning_rate(number, warmup_iter=warmup_of(model))


def _try_step(optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    """Make a step with copies of both, so that errors in their states show before anything is trained."""
    trial = copy.deepcopy(optimizer)
    weights = [weight for group in trial.param_groups for weight in group["params"]]
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    schedule = copy.copy(scheduler)
    vars(schedule).update(
        {name: copy.deepcopy(value) for name, value in vars(scheduler).items() if name != "optimizer"}, optimizer=trial
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the copies do not know of each other
        schedule.step()
        trial.step()
    finite = all(bool(weight.isfinite().all()) for weight in weights)
    if not (finite and all(math.isfinite(group["lr"]) for group in trial.param_groups)):
        raise ValueError("a step of the optimizer must leave finite weights and a finite learning rate")


def _name(model: Any, optimizer: Any) -> str:
    """Return the section of an optimizer's options."""
    found = (name for name, value in vars(model).items() if name.startswith("optimizer_") and value is optimizer)
    return f"train.optim_{next(found, 'optimizer_g').removeprefix('optimizer_')}"


def _plain(value: Any) -> Any:
    """Return a value in which equal lists, tuples and counts compare equal."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in sorted(value.items(), key=str)}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value


def _change(option: str, now: object, before: object) -> str:
    return f"{option} is {_shown(now)}, and was {_shown(before)}"


def _shown(value: Any) -> str:
    value = _plain(value)
    if isinstance(value, dict) and all(count == 1 for count in value.values()):
        return f"[{', '.join(value)}]"
    return f"{value:g}" if isinstance(value, float) else str(value)
