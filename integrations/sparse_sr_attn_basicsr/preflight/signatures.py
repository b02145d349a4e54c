"""Try losses, metrics and data sets once, to find the options that their code rejects."""

import copy
import dis
import importlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import make_dataclass
from typing import Annotated, Any, Literal, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor, nn

from sparse_sr_attn.config import Finite, NonNegative, NonNegativeInt, ProblemList, join_path, read
from sparse_sr_attn.errors import ConfigError, Problem
from sparse_sr_attn.registry import suggestion
from sparse_sr_attn_basicsr import option_names
from sparse_sr_attn_basicsr.data import PortableDataset, SampleError
from sparse_sr_attn_basicsr.preflight.findings import without_warnings
from sparse_sr_attn_basicsr.randomness import undisturbed

# Rules that defaults do not show.
_RULES: dict[str, Any] = {
    "crop_border": NonNegativeInt,
    "loss_weight": NonNegative,
    "perceptual_weight": NonNegative,
    "style_weight": NonNegative,
    "input_order": Literal["HWC"],  # the order in which BasicSR's models hand images to metrics
}
_PLAIN = (bool, int, float, str)

# Losses that BasicSR calls with an image and its target.
_COMPARING = ("pixel_opt", "fft_opt", "ldl_opt")


def check_names(
    problems: ProblemList,
    build: Callable[..., object],
    options: Mapping[str, Any],
    path: str,
    given: Sequence[str] = (),
    *,
    hint: Callable[[str, list[str]], str] = suggestion,
    lenient: bool = False,
) -> dict[str, inspect.Parameter]:
    """Add problems for unknown options and missing parameters of a signature; return the parameters.

    Args:
        problems: gets the problems.
        build: a class or a function.
        options: the options that it will get in addition to `given`.
        path: position of the options, for messages.
        given: parameters that are not options.
        hint: returns the end of the message for an unknown option and the known ones.
        lenient: allow any option if the signature takes any, even if the code ignores it.
    """
    name = getattr(build, "__name__", str(build))
    parameters = inspect.signature(build).parameters.values()
    known = {p.name: p for p in parameters if p.name not in given and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters) and (lenient or _uses_keywords(build))
    for key in options:
        if key not in known and not takes_any:
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


def try_loss(build: type, options: Mapping[str, Any], key: str) -> str | None:
    """Build a loss and compute it on small images; return what is wrong, or `None`.

    BasicSR's perceptual loss is not built, because it would load or download the weights of its VGG.

    Args:
        build: the class of the loss.
        options: its options.
        key: name of the loss in the option file, e.g. `pixel_opt`.
    """
    if build is getattr(importlib.import_module("basicsr.losses.basic_loss"), "PerceptualLoss", None):
        return _fault_of_perceptual_loss(options, key)
    name = build.__name__
    with without_warnings(), undisturbed():
        try:
            criterion = _criterion(build, options)
        except Exception as error:  # somebody else's code can raise anything
            return f"{name} rejects these options: {reason(error)}"
        try:
            return _fault_of_loss(name, criterion, key)
        except Exception as error:
            return f"{name} cannot be used here: {reason(error)}"


def try_metric(build: Callable[..., Any], options: Mapping[str, Any], shape: Sequence[int]) -> str | None:
    """Compute a metric of two images of noise; return what is wrong, or `None`.

    Args:
        build: the metric.
        options: its options.
        shape: shape of the images that BasicSR's models pass to metrics: (height, width) or (height, width, 3).
    """
    draw = np.random.default_rng(0)
    images = {
        name: draw.integers(0, 256, shape).astype(np.uint8)
        for name in ("img", "img2")
        if name in inspect.signature(build).parameters
    }
    with without_warnings(), undisturbed():
        try:
            value = float(build(**images, **copy.deepcopy(dict(options))))
        except Exception as error:  # somebody else's code can raise anything
            return f"fails ({reason(error)})"
    return None if math.isfinite(value) else f"gives {value}"


def first_sample(build: type, options: Mapping[str, Any], path: str) -> tuple[int, list[str], dict[str, Any]]:
    """Build a data set and read its first sample.

    Args:
        build: the class of the data set.
        options: its options, as BasicSR passes them.
        path: position of the options, for messages.

    Returns:
        The number of samples, the files of the first ones if they are known, and the first sample.

    Raises:
        ConfigError: there is no sample, or it cannot be read.
    """
    dataset: Any = None
    try:
        with without_warnings(), undisturbed():
            dataset = build(copy.deepcopy(dict(options)))
            if not len(dataset):
                raise ConfigError([Problem(path, f"must hold at least one image; {build.__name__} finds none")])
            return len(dataset), _files(dataset), PortableDataset(dataset)[0]
    except ConfigError:
        raise
    except Exception as error:  # somebody else's code can raise anything
        raise ConfigError([_why_not_read(build, error, path)]) from None
    finally:
        # A database cannot be opened a second time while it is open.
        client = getattr(getattr(dataset, "file_client", None), "client", None)
        environments = getattr(client, "_client", None)
        for environment in environments.values() if isinstance(environments, dict) else ():
            with suppress(Exception):
                environment.close()


def reason(error: Exception) -> str:
    """Return the message of an error on one line."""
    text = " ".join(str(error).split())
    if isinstance(error, AssertionError | ValueError | NotImplementedError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _fault_of_perceptual_loss(options: Mapping[str, Any], key: str) -> str | None:
    if key != "perceptual_opt":
        return "PerceptualLoss must return one number, returns a tuple; it belongs under perceptual_opt"
    vgg, criterion = options.get("vgg_type", "vgg19"), options.get("criterion", "l1")
    arch = importlib.import_module("basicsr.archs.vgg_arch")
    if (plain := vgg.removesuffix("_bn")) not in arch.NAMES:
        return f"vgg_type must be one of {', '.join(arch.NAMES)}, or one of these with _bn, got {vgg!r}"
    layers = arch.NAMES[plain] if plain == vgg else arch.insert_bn(arch.NAMES[plain])
    if unknown := [name for name in options["layer_weights"] if name not in layers]:
        return f"layer_weights must name layers of {vgg}, e.g. conv5_4, got {unknown[0]!r}"
    if criterion not in ("l1", "fro"):  # the code for l2 misspells its class
        return f"criterion must be 'l1' or 'fro', got {criterion!r}"
    if not (options.get("perceptual_weight", 1) or options.get("style_weight", 0)):
        return "PerceptualLoss has no effect: perceptual_weight and style_weight are both 0"
    return None


def _criterion(build: type, options: Mapping[str, Any]) -> Any:
    # The meta device allocates nothing; a loss without weights is then built where it can be computed.
    with suppress(Exception), torch.device("meta"):
        criterion = build(**copy.deepcopy(dict(options)))
        if any(True for _ in criterion.parameters()):
            return criterion
    return build(**copy.deepcopy(dict(options)))


def _fault_of_loss(name: str, criterion: Any, key: str) -> str | None:
    weight = next(criterion.parameters(), None) if isinstance(criterion, nn.Module) else None
    device = "cpu" if weight is None else weight.device
    if weight is not None:
        criterion.to(device)  # with its constants
    output = torch.rand(1, 3, 32, 32, device=device, requires_grad=True)
    target = torch.rand(1, 3, 32, 32, device=device)
    if key == "gan_opt":
        values = [criterion(output, real, is_disc=disc) for real in (True, False) for disc in (True, False)]
    elif key == "perceptual_opt":
        pair = criterion(output, target)
        if not isinstance(pair, tuple) or len(pair) != 2:
            return f"{name} is not a perceptual loss, which must return two numbers, for content and for style"
        values = [value for value in pair if value is not None]
        if not values:
            return f"{name} has no effect: perceptual_weight and style_weight are both 0"
    elif key in _COMPARING:
        second = list(inspect.signature(criterion.forward).parameters.values())[1:2]
        if not second or second[0].default is not inspect.Parameter.empty:
            return f"{name} is not a {key.removesuffix('_opt')} loss: it does not compare two images"
        values = [criterion(output, target)]
    else:
        values = []
    return next((fault for value in values if (fault := _fault_of_number(name, value))), None)


def _fault_of_number(name: str, value: object) -> str | None:
    if not isinstance(value, Tensor):
        return f"{name} must return one number, returns a {type(value).__name__}"
    if value.ndim:
        return f"{name} must return one number, returns {tuple(value.shape)} of them"
    if value.device.type != "meta" and not math.isfinite(float(value)):
        return f"{name} must return a finite number, returns {float(value)}"
    return None


def _annotation(build: Callable[..., object], parameter: inspect.Parameter) -> Any:
    if parameter.name in _RULES:
        return _RULES[parameter.name]
    hints: dict[str, Any] = {}
    with suppress(Exception):  # hints may name what is not there
        hints = get_type_hints(build.__init__ if inspect.isclass(build) else build, include_extras=True)
    hint = hints.get(parameter.name)
    if hint in _PLAIN or get_origin(hint) in (Annotated, Literal):
        return hint
    default = parameter.default
    if isinstance(default, bool | str):
        return type(default)
    if isinstance(default, int | float):
        return Finite
    return Sequence if isinstance(default, tuple | list) else Any


def _uses_keywords(build: Callable[..., object]) -> bool:
    """Return whether a function uses its `**kwargs`; most of BasicSR's metrics ignore them."""
    function: Any = inspect.unwrap(build.__init__ if inspect.isclass(build) else build)
    keywords = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.VAR_KEYWORD]
    code = getattr(function, "__code__", None)
    if not keywords or code is None:
        return bool(keywords)
    return any(step.argval == keywords[0] and "LOAD" in step.opname for step in dis.get_instructions(code))


def _files(dataset: Any) -> list[str]:
    """Return the files of the first samples of a data set that reads files."""
    paths = getattr(dataset, "paths", None)
    if getattr(dataset, "io_backend_opt", {}).get("type") != "disk" or not isinstance(paths, list):
        return []
    entries = [list(entry.values()) if isinstance(entry, dict) else [entry] for entry in paths[:10]]
    return [file for entry in entries for file in entry if isinstance(file, str)]


def _why_not_read(build: type, error: Exception, path: str) -> Problem:
    cause = error.__cause__ if isinstance(error, SampleError) else error
    if isinstance(cause, KeyError) and cause.args[0] in option_names.names_in(*build.__mro__):
        return Problem(join_path(path, cause.args[0]), f"missing; {build.__name__} needs it")
    if isinstance(error, SampleError):
        return Problem(path, f"the first sample cannot be read: {error}")
    return Problem(path, f"{build.__name__} rejects these options: {reason(error)}")
