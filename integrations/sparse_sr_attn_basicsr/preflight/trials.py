"""Losses, metrics and data sets, tried once before a run, so that what their code refuses is known before it begins."""

import copy
import dis
import importlib
import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_origin, get_type_hints

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from sparse_sr_attn.config import Finite, NonNegative, NonNegativeInt, ProblemList, join_path, read
from sparse_sr_attn.errors import ConfigError, ImageError, Problem
from sparse_sr_attn.images import read_image
from sparse_sr_attn.registry import suggestion
from sparse_sr_attn_basicsr import option_lookups
from sparse_sr_attn_basicsr.data import PortableDataset, SampleError
from sparse_sr_attn_basicsr.randomness import undisturbed

# What no default shows.
_RULES: dict[str, Any] = {
    "crop_border": NonNegativeInt,
    "loss_weight": NonNegative,
    "perceptual_weight": NonNegative,
    "style_weight": NonNegative,
    "input_order": Literal["HWC"],  # the order in which BasicSR's models hand images to metrics
}
_PLAIN = (bool, int, float, str)

# Losses of which it is known how BasicSR calls them.
_COMPARING = ("pixel_opt", "fft_opt", "ldl_opt")


def arguments(build: Callable[..., object], options: dict[str, Any], path: str, given: Sequence[str] = ()) -> None:
    """Check options against the signature that takes them; convert numbers given as text in place.

    Args:
        build: a class or a function. Types come from annotations, or from defaults if a parameter has no annotation.
        options: all that it will be given beside `given`.
        path: where they stand, for messages.
        given: parameters that are no options.

    Raises:
        ConfigError: names every option that is unknown, missing or of the wrong type.
    """
    name = getattr(build, "__name__", str(build))
    signature = inspect.signature(build).parameters
    known = {
        key: parameter
        for key, parameter in signature.items()
        if key not in given and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    }
    problems = ProblemList()
    for key, value in list(options.items()):
        if key not in known:
            if not _uses_keywords(build):
                problems.add(join_path(path, key), f"unknown to {name}{suggestion(key, list(known))}")
            continue
        with problems.gathered():
            fitted = read(make_dataclass("One", [(key, _annotation(build, known[key]))]), {key: value}, path)[key]
            if isinstance(value, str) and isinstance(fitted, float):
                options[key] = fitted
    for key, parameter in known.items():
        if parameter.default is parameter.empty and key not in options:
            problems.add(join_path(path, key), f"missing; {name} needs it")
    problems.raise_if_any()


def loss(build: type, options: Mapping[str, Any], key: str) -> str | None:
    """Build a loss and take it of small images; return what is wrong with it, if anything is.

    Weights that it would load are neither loaded nor downloaded.

    Args:
        build: its class.
        options: for the class.
        key: under which the loss stands in the options, e.g. `pixel_opt`.
    """
    name = build.__name__
    with warnings.catch_warnings(), undisturbed():
        warnings.simplefilter("ignore")
        try:
            criterion = _criterion(build, options)
        except Exception as error:  # somebody else's code can raise anything
            return f"{name} refuses these options: {told(error)}"
        try:
            return _fault_of_loss(name, criterion, key)
        except Exception as error:
            return f"{name} cannot be used here: {told(error)}"


def metric(build: Callable[..., Any], options: Mapping[str, Any], shape: Sequence[int]) -> str | None:
    """Take a metric of two images of noise; return what is wrong with it, if anything is.

    Args:
        build: the function.
        options: for it.
        shape: of the images, as BasicSR's models hand them to metrics: (height, width) or (height, width, 3).
    """
    draw = np.random.default_rng(0)
    images = {
        name: draw.integers(0, 256, shape).astype(np.uint8)
        for name in ("img", "img2")
        if name in inspect.signature(build).parameters
    }
    with warnings.catch_warnings(), undisturbed():
        warnings.simplefilter("ignore")
        try:
            value = float(build(**images, **copy.deepcopy(dict(options))))
        except Exception as error:  # somebody else's code can raise anything
            return f"fails ({told(error)})"
    return None if math.isfinite(value) else f"gives {value}"


def first_sample(build: type, options: Mapping[str, Any], path: str) -> tuple[int, list[str], dict[str, Any]]:
    """Build a data set and read its first sample.

    Args:
        build: its class.
        options: as BasicSR hands them to the class.
        path: where they stand, for messages.

    Returns:
        The number of samples, the files of the first of them where they are known, and the sample.

    Raises:
        ConfigError: there is no sample, or it cannot be read.
    """
    dataset: Any = None
    try:
        with warnings.catch_warnings(), undisturbed():
            warnings.simplefilter("ignore")
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


def is_image(file: Path) -> bool:
    """Return whether BasicSR can decode a file."""
    with warnings.catch_warnings(), suppress(ImageError):
        warnings.simplefilter("ignore")
        read_image(file)
        return True
    if file.suffix.lower() in Image.registered_extensions():
        return False
    try:  # OpenCV knows formats that Pillow does not
        importlib.import_module("basicsr.utils").imfrombytes(file.read_bytes(), float32=True)
    except Exception:  # its decoders raise anything
        return False
    return True


def told(error: Exception) -> str:
    """Return what an error says, on one line."""
    text = " ".join(str(error).split())
    if isinstance(error, AssertionError | ValueError | NotImplementedError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _criterion(build: type, options: Mapping[str, Any]) -> Any:
    with _no_weights():
        # The meta device allocates nothing; what has no weights is then built where it can be computed with.
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
            return f"{name} is no perceptual loss: it must give two numbers, of content and of style"
        values = [value for value in pair if value is not None]
        if not values:
            return f"{name} gives nothing: perceptual_weight and style_weight are both 0"
    elif key in _COMPARING:
        second = list(inspect.signature(criterion.forward).parameters.values())[1:2]
        if not second or second[0].default is not inspect.Parameter.empty:
            return f"{name} is no {key.removesuffix('_opt')} loss: it does not compare the image with another"
        values = [criterion(output, target)]
    else:
        values = []
    return next((fault for value in values if (fault := _fault_of_number(name, value))), None)


def _fault_of_number(name: str, value: object) -> str | None:
    if not isinstance(value, Tensor):
        return f"{name} must give one number, gives a {type(value).__name__}"
    if value.ndim:
        return f"{name} must give one number, gives {tuple(value.shape)} of them"
    if value.device.type != "meta" and not math.isfinite(float(value)):
        return f"{name} must give a finite number, gives {float(value)}"
    return None


@contextmanager
def _no_weights() -> Iterator[None]:
    """Networks of torchvision come without their weights inside, and nothing is downloaded."""
    with ExitStack() as stack:

        def replace(owner: Any, name: str, value: object) -> None:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)

        for module in ("torch.hub", "torchvision.models._api"):
            with suppress(ImportError, AttributeError):
                replace(importlib.import_module(module), "load_state_dict_from_url", lambda *_, **__: {})
        replace(nn.Module, "load_state_dict", lambda *_, **__: None)
        yield


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
    """Return whether what is given beyond the parameters is looked at; most of BasicSR's metrics ignore it."""
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
    options = option_lookups.of(*build.__mro__).names.get("", set())
    if isinstance(cause, KeyError) and cause.args and cause.args[0] in options:
        return Problem(join_path(path, cause.args[0]), f"missing; {build.__name__} needs it")
    if isinstance(error, SampleError):
        return Problem(path, f"the first sample cannot be read: {error}")
    return Problem(path, f"{build.__name__} refuses these options: {told(error)}")
