"""Find the trunk of a model: call the model once, and see which modules return feature maps of one size and width."""

import copy
import inspect
import itertools
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparse_sr_attn.errors import ConfigError

_SIDES = (16, 32, 35, 48, 64, 128)  # of images that a model should take; 35 is for windows of 5 and 7
_FACTORS = (2, 3, 4)  # values for a second argument of `forward`, which is a scale

_LONGEST = 60  # characters of a name that is offered
_BATCH = 2  # what a module computes for all images at once, such as a table of biases, has another first axis

Inputs = tuple[Any, ...]


@dataclass(frozen=True)
class Site:
    """A module that returns a feature map once per forward pass.

    Attributes:
        path: its path in the model.
        caller: path of the module whose `forward` calls it.
        shape: channels, height and width of its output, for the image that was tried.
    """

    path: str
    caller: str
    shape: tuple[int, int, int]


@dataclass(frozen=True)
class Trunk:
    """Modules that return feature maps of one size and width, in the order in which they run.

    Attributes:
        name: what to pass to `attach` as `body`.
        sites: the modules.
        num_parameters: number of parameters in them.
    """

    name: str
    sites: tuple[Site, ...]
    num_parameters: int

    def __str__(self) -> str:
        return f"{self.name!r} ({len(self.sites)} of {self.sites[0].shape[0]} channels)"


@dataclass
class Calls:
    """The modules that one forward pass of a model called.

    Attributes:
        sites: the modules that returned one feature map and were called once, by path, in the order of their returns.
        called: paths of all modules that were called.
        faults: by path, why a module that was called is no site.
        inputs: what the model accepted; with noise in place of images that were guessed.
    """

    sites: Mapping[str, Site]
    called: frozenset[str]
    faults: Mapping[str, str]
    inputs: Inputs = ()


class Probe(nn.Module):
    """A placeholder for the attention of a trunk: passes features on, and records after which blocks.

    Args:
        num_blocks: number of blocks that should run.
    """

    shares = True  # blocks must run as often as those of attention that shares states

    def __init__(self, num_blocks: int) -> None:
        super().__init__()
        self.missing = set(range(num_blocks))

    def after(self, block: int, x: Tensor, states: Mapping[int, Any]) -> tuple[Tensor, dict[int, Any]]:
        """Record a block, and return its output."""
        self.missing.discard(block)
        return x, dict(states)

    def run(self, trunk: Iterable[nn.Module], x: Tensor) -> Tensor:
        """Run the blocks of an `nn.Sequential`."""
        for number, block in enumerate(trunk):
            x, _ = self.after(number, block(x), {})
        return x


def watch_calls(model: nn.Module, example: Tensor | Inputs | None) -> Calls:
    """Call a copy of a model in evaluation and in training mode.

    A module counts only if it is called in both modes, its channels do not depend on the size of the image, and the
    output depends on it. Some models have other weights for evaluation, which are not trained.

    Args:
        model: any module. It is not called itself.
        example: images, or a tuple with all arguments of `forward`.

    Raises:
        ConfigError: the model cannot be copied, or accepts none of the inputs that we guess.
        Exception: whatever the model raises for `example`.
    """
    given = None if example is None else example if isinstance(example, tuple) else (example,)
    twin = copied(model)
    if twin is model:
        raise ConfigError.at("", f"copy.deepcopy cannot copy {type(model).__name__}, and attention is tried on a copy")
    devices = list({p.device for p in model.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices):
        return _watch(model, twin, given)


def _watch(model: nn.Module, twin: nn.Module, given: Inputs | None) -> Calls:
    for inputs in guesses(model) if given is None else [given]:
        try:
            with evaluating(twin):
                calls, _ = _watched(twin, inputs)
        except Exception:  # the model may want other images than these
            if given is not None:
                raise
            continue
        found = _also_in_training(twin, inputs, calls)
        found.inputs = inputs if given is not None else tuple(map(_noise, inputs))
        return found
    message = f"{type(model).__name__} accepts none of the images that were tried"
    raise ConfigError.at("", f"{message}; pass example=..., images or a tuple of arguments that it accepts")


def difference(model: nn.Module, inputs: Inputs, give: Callable[[nn.Module], Sequence[Probe]]) -> str | None:
    """Return what is wrong with a model that has probes in place of attention; `None` if it computes the same.

    Args:
        model: the model, of which copies are called in evaluation and in training mode.
        inputs: of the model.
        give: puts probes into a copy of the model, and returns them.
    """
    name = type(model).__name__
    with torch.random.fork_rng(list({p.device for p in model.parameters() if p.is_cuda})):
        for training in (False, True):
            try:
                expected = _outputs(copied(model), inputs, training)
            except Exception:  # noqa: S112  (the forward may not normalise a single value in training)
                continue
            twin = copied(model)
            probes = give(twin)
            try:
                actual = _outputs(twin, inputs, training)
            except Exception as error:  # of the model or of a layer
                return f"{name} with attention raises {type(error).__name__}: {error}"
            when = " in training" if training else ""
            if any(probe.missing for probe in probes):
                return (
                    f"{name} does not run it{when}, because it runs its blocks by other references than their names, "
                    "or looks at their classes"
                )
            if not _same(expected, actual) and _same(expected, _outputs(copied(model), inputs, training)):
                return f"{name} computes something else with it{when}, because it looks at the classes of its modules"
    return None


def _outputs(twin: nn.Module, inputs: Inputs, training: bool) -> list[Tensor]:
    """Return the outputs of a copy of a model."""
    for module in twin.modules():
        module.training = training
    torch.manual_seed(0)
    with torch.set_grad_enabled(training), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [output.detach() for output in _flat(twin(*copy.deepcopy(inputs)))]


def _same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Return whether outputs are equal, NaNs included."""
    if [x.shape for x in one] != [x.shape for x in other]:
        return False
    return all(x.is_meta or torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(one, other, strict=True))


def _noise(value: object) -> object:
    """Return random values in 0..1 for images; other values unchanged."""
    if not isinstance(value, Tensor) or value.ndim != 4:
        return value
    return torch.rand(value.shape, generator=torch.Generator().manual_seed(0)).to(value)


def likely_images(model: nn.Module) -> tuple[Tensor, list[int]]:
    """Return a tensor of the dtype and device of images for a model, and numbers of channels that they may have."""
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    first = next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), 3)
    return like, list(dict.fromkeys((first, 3, 1)))


def guesses(model: nn.Module) -> Iterator[Inputs]:
    """Yield inputs that the model might accept: black images, and a scale for each further argument."""
    like, widths = likely_images(model)
    required = [
        parameter
        for parameter in inspect.signature(model.forward).parameters.values()
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    rest = [(factor,) * (len(required) - 1) for factor in _FACTORS] if len(required) > 1 else [()]
    for batch, side, channels, more in itertools.product((_BATCH, 1), _SIDES, widths, rest):
        yield (like.new_zeros(batch, channels, side, side), *more)


def find_trunks(model: nn.Module, calls: Calls, within: str = "") -> list[Trunk]:
    """Return the trunks of a model: the longest first, but last all with less than half the parameters of another.

    Args:
        model: the model that was called.
        calls: from `watch_calls`.
        within: path of the module to search in.
    """
    inside = [site for site in calls.sites.values() if not within or site.path.startswith(f"{within}.")]
    inside = [site for site in inside if site.shape[1:] != (1, 1)]  # pooled
    groups: dict[tuple[str, tuple[int, int, int]], list[Site]] = defaultdict(list)
    for site in inside:
        for pattern in _patterns(site.path):
            groups[pattern, site.shape].append(site)
    modules = dict(model.named_modules())
    sizes = {site.path: sum(p.numel() for p in modules[site.path].parameters()) for site in inside}
    found = [
        Trunk(pattern, tuple(sites), sum(sizes[site.path] for site in sites))
        for (pattern, _), sites in groups.items()
        if len(sites) > 1 and any(sizes[site.path] for site in sites)
    ]
    several = [trunk for trunk in found if sum(sizes[site.path] > 0 for site in trunk.sites) > 1]
    found = several or found  # a convolution and its activation are hardly a trunk
    most = max((trunk.num_parameters for trunk in found), default=0)
    found.sort(
        key=lambda trunk: (
            2 * trunk.num_parameters < most,
            -len(trunk.sites),
            -trunk.num_parameters,
            trunk.name.count("."),
        )
    )
    return [Trunk(_name(trunk, modules, calls), trunk.sites, trunk.num_parameters) for trunk in found]


def besides(chosen: Trunk, trunks: Iterable[Trunk]) -> list[Trunk]:
    """Return the trunks that have no module in common with the chosen one and a short name."""
    taken = [chosen]
    for trunk in trunks:
        if len(trunk.name) <= _LONGEST and not any(_overlap(trunk, other) for other in taken):
            taken.append(trunk)
    return taken[1:]


def matching(pattern: str, paths: Iterable[str]) -> list[str]:
    """Return the paths that match a pattern, in which `*` stands for any part of a name."""
    regex = re.compile(re.escape(pattern).replace(r"\*", r"[^.]+"))
    return [path for path in paths if regex.fullmatch(path)]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode without gradients inside, and restore the mode of every submodule afterwards."""
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:  # not by `eval`, which some models use to fuse their weights
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _overlap(one: Trunk, other: Trunk) -> bool:
    pairs = itertools.product(one.sites, other.sites)
    return any(f"{a.path}.".startswith(f"{b.path}.") or f"{b.path}.".startswith(f"{a.path}.") for a, b in pairs)


def _patterns(path: str) -> Iterator[str]:
    """Yield the path with one of its numbers replaced by `*`."""
    for number in re.finditer(r"\d+", path):
        yield f"{path[: number.start()]}*{path[number.end() :]}"


def _name(trunk: Trunk, modules: Mapping[str, nn.Module], calls: Calls) -> str:
    """Return what names the trunk in the model: a container if the trunk is all in it, else a pattern, else paths."""
    paths = [site.path for site in trunk.sites]
    container, _, last = trunk.name.rpartition(".")
    if last == "*" and isinstance(modules.get(container), (nn.Sequential, nn.ModuleList)):
        children = [path for path in calls.sites if path.rpartition(".")[0] == container]
        widest = Counter(calls.sites[path].shape for path in children).most_common(1)[0][0]
        if widest == trunk.sites[0].shape:
            return container
    return trunk.name if set(matching(trunk.name, calls.called)) == set(paths) else ", ".join(paths)


def copied(model: nn.Module) -> nn.Module:
    """Return a copy of a model; the model itself if it cannot be copied."""
    # Such as weights that `weight_norm` computed: PyTorch refuses to copy them.
    computed = [
        value
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    ]
    try:
        return copy.deepcopy(model, {id(value): value.detach().clone() for value in computed})
    except Exception:  # the model may hold what cannot be copied
        return model


def _also_in_training(twin: nn.Module, inputs: Inputs, calls: Calls) -> Calls:
    """Drop modules that are not called in training, or on which the output does not depend then."""
    for module in twin.modules():
        module.training = True
    try:
        with torch.enable_grad():
            trained, outputs = _watched(twin, tuple(map(_taller, inputs)), keep=True)
            depends = _reached(outputs)
    except Exception:  # such as batch normalisation of a single value
        return calls
    faults = dict(calls.faults)
    for path, site in calls.sites.items():
        if path not in trained.called:
            faults[path] = "is not called in training"
        elif path not in depends:
            faults[path] = "has no effect on the output in training"
        elif path in trained.faults or trained.sites[path].shape[0] != site.shape[0]:
            faults[path] = "returns maps whose channels depend on the size of the image"
    sites = {path: site for path, site in calls.sites.items() if path not in faults}
    return Calls(sites, calls.called & trained.called, faults)


def _taller(value: object) -> object:
    """Return images of twice the height, which may have gradients; other values unchanged."""
    if not isinstance(value, Tensor) or value.ndim != 4 or not value.is_floating_point():
        return value
    return torch.cat([value, value], 2).requires_grad_() * 1  # no leaf, which must not be changed in place


def _reached(outputs: Mapping[str, Tensor]) -> set[str]:
    """Return the paths of the modules that the output of the model, `outputs[""]`, depends on."""
    paths = [path for path in outputs if path and outputs[path].requires_grad]
    total = outputs[""].float().sum()
    grads = torch.autograd.grad(total, [outputs[path] for path in paths], allow_unused=True)
    return {path for path, grad in zip(paths, grads, strict=True) if grad is not None}


def _watched(model: nn.Module, inputs: Inputs, *, keep: bool = False) -> tuple[Calls, dict[str, Tensor]]:
    """Call a model; return the calls and, with `keep`, the feature maps and images by path."""
    stack: list[str] = []
    returned: list[tuple[str, str, tuple[int, ...]]] = []
    outputs: dict[str, Tensor] = {}

    def enter(path: str) -> None:
        stack.append(path)

    def leave(path: str, output: object) -> None:
        stack.pop()
        shape = tuple(output.shape) if isinstance(output, Tensor) else ()
        returned.append((path, stack[-1] if stack else "", shape))
        if keep:
            maps = [value for value in _flat(output) if value.requires_grad]
            if maps:
                outputs[path] = maps[0] if path else torch.stack([value.float().sum() for value in maps])

    hooks = []
    for path, module in model.named_modules():  # by path, because what runs may be a view of the module
        hooks.append(module.register_forward_pre_hook(lambda _, __, path=path: enter(path)))
        hooks.append(module.register_forward_hook(lambda _, __, output, path=path: leave(path, output)))
    try:
        model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    times = Counter(path for path, _, _ in returned)
    sites: dict[str, Site] = {}
    faults: dict[str, str] = {}
    batch = next((len(value) for value in inputs if isinstance(value, Tensor) and value.ndim), 1)
    for path, caller, shape in returned:
        if times[path] > 1:
            faults[path] = f"is called {times[path]} times"
        elif len(shape) != 4:
            faults[path] = f"returns {shape}, not a feature map (b, c, h, w)" if shape else "returns no feature map"
        elif shape[0] != batch:
            faults[path] = f"returns {shape} for {batch} images"
        elif path:
            sites[path] = Site(path, caller, (shape[1], shape[2], shape[3]))
    return Calls(sites, frozenset(times), faults), outputs


def _flat(output: object) -> Iterator[Tensor]:
    """Yield the tensors in an output."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from itertools.chain.from_iterable(map(_flat, output.values()))
    elif isinstance(output, Sequence) and not isinstance(output, str):
        yield from itertools.chain.from_iterable(map(_flat, output))
