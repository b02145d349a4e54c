"""One run: check all outputs, measure the floor, then time and memory of all methods at all sizes."""

import math
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sparse_sr_attn
from benchmarks.speed import oracles
from benchmarks.speed.floor import Cost, Rates, Yardstick, rates_of, yardsticks
from benchmarks.speed.methods import Method, Subject, compiled, methods_of
from benchmarks.speed.oracles import Check
from benchmarks.speed.peers import FACTORS, WIDTHS, build_peer, label
from benchmarks.speed.settings import DTYPES, Pass, Settings
from benchmarks.speed.timing import Sample, Spread, alternate, exponent, ratio, sample
from sparse_sr_attn.errors import ConfigError, Problem
from sparse_sr_attn.registry import suggestion
from sparse_sr_attn.testing.memory import NewMemory, in_maps, new_memory

SCHEMA = 1
"""Version of the JSON that a run becomes."""

ALLOWED_AT_SIZE = 0.1
"""How far a method of ours may lie from its stand-in at a size that is timed, as a fraction of what attention adds,
where both count keys in the same way.
"""

VALID_SIDE = 96
"""Side of the map at which stand-ins are held against their authors' figures."""

VALID_UP_TO = 1.1
"""How much longer, over dense SDPA, a valid stand-in may take than the authors' code."""

_ENVIRONMENT = ("THP_MEM_ALLOC_ENABLE", "OMP_WAIT_POLICY", "OMP_NUM_THREADS", "LD_PRELOAD", "PYTORCH_CUDA_ALLOC_CONF")

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Row:
    """One method at one size.

    Attributes:
        method: its name.
        passed: what was timed.
        side: of the map or image.
        tokens: pixels of all maps of the batch.
        busy: milliseconds of processor time.
        wall: milliseconds by the clock.
        samples: seconds, in the order of the rounds.
        memory: bytes.
        maps: peak of new memory in feature maps.
        largest_maps: largest tensor in feature maps.
        cost: arithmetic, if counted.
        floor: milliseconds that the arithmetic takes at the rates of this run.
        operators: what ran, beyond torch's plain operators.
    """

    method: str
    passed: Pass
    side: int
    tokens: int
    busy: Spread
    wall: Spread
    samples: list[Sample]
    memory: NewMemory
    maps: float
    largest_maps: float
    cost: Cost | None
    floor: float | None
    operators: tuple[str, ...]

    @property
    def share(self) -> float | None:
        """Return the share of the floor that the method reaches."""
        return None if self.floor is None else self.floor / self.busy.median


@dataclass(frozen=True)
class Speedup:
    """How many times longer a rival takes than one of our methods.

    Attributes:
        ours: our method.
        rival: the other.
        passed: what was timed.
        side: of the map or image.
        ratio: of the same round; `None` where none is given.
        refused: why none is given.
    """

    ours: str
    rival: str
    passed: Pass
    side: int
    ratio: Spread | None
    refused: str = ""


@dataclass(frozen=True)
class Validity:
    """Whether a stand-in is as fast as its original.

    Attributes:
        ratio: its time over dense SDPA.
        allowed: up to which it is valid.
    """

    ratio: float
    allowed: float

    @property
    def valid(self) -> bool:
        """Return whether it is."""
        return self.ratio <= self.allowed


@dataclass(frozen=True)
class Run:
    """All that a run has found.

    Attributes:
        settings: what was asked.
        environment: where and with what it ran.
        kinds: of the methods, by name.
        checks: of outputs, by name.
        validity: of stand-ins that could be held against their authors' figures, by name.
        rates: of which floors are made, from the same rounds as the times, by pass and side.
        rows: methods, passes and sizes.
        speedups: of ours over others.
        exponents: growth of the time with the number of tokens, by pass and name, and between which sides.
        notes: what was left out.
    """

    settings: Settings
    environment: dict[str, str]
    kinds: dict[str, str]
    checks: dict[str, Check]
    validity: dict[str, Validity]
    rates: dict[str, dict[int, Rates]] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    speedups: list[Speedup] = field(default_factory=list)
    exponents: dict[str, dict[str, float]] = field(default_factory=dict)
    exponent_sides: tuple[int, int] | None = None
    notes: list[str] = field(default_factory=list)

    def wrong(self) -> list[str]:
        """Return the methods whose output is wrong."""
        return [name for name, check in self.checks.items() if check.status == "wrong"]

    def as_json(self) -> dict[str, Any]:
        """Return all as JSON can write it."""
        document = {"schema": SCHEMA, **asdict(self)}
        for written, row in zip(document["rows"], self.rows, strict=True):
            written["share"] = row.share
            del written["memory"]["operators"]  # most are torch's own
        for name, validity in self.validity.items():
            document["validity"][name]["valid"] = validity.valid
        return document


def run(settings: Settings, progress: Progress = lambda text: None) -> Run:
    """Measure what `settings` ask for.

    Args:
        settings: see there.
        progress: is told what is being done.

    Raises:
        ConfigError: a method or a peer is unknown.
        PeerError: code from outside fails.
    """
    methods = _chosen(settings)
    device = torch.device(settings.device)
    with threads(settings.threads), _whole_float32():
        subjects = {name: _built(method, settings, device) for name, method in methods.items()}
        checks = {}
        for name, subject in subjects.items():
            progress(f"checking {name}")
            checks[name] = _checked(name, methods[name], subject, settings, device)
        sticks = yardsticks(device, DTYPES[settings.dtype], chunk_size=settings.chunk_size, width=settings.embed_dim)
        validity = _validity(methods, settings, progress)
        found = Run(settings, environment(device), {n: m.kind for n, m in methods.items()}, checks, validity)
        for passed in settings.passes:
            _measure(found, methods, subjects, sticks, passed, device, progress)
    found.speedups.extend(_speedups(found, methods))
    return _with_exponents(found)


# --- what is measured -------------------------------------------------------------------------------------------------


def features(batch: int, channels: int, side: int, *, seed: int = 0, height: int | None = None) -> Tensor:
    """Return maps like those inside a network: few patterns mixed into all channels, amplitudes falling as 1 / f.

    Args:
        batch: maps.
        channels: of each.
        side: width, and height if that is not given.
        seed: of the numbers.
        height: of each map.

    Returns:
        Float32 of mean 0 and variance 1.
    """
    generator = torch.Generator().manual_seed(seed)
    height = side if height is None else height
    frequency = (torch.fft.fftfreq(height)[:, None].square() + torch.fft.rfftfreq(side).square()).sqrt()
    noise = torch.randn(batch, 8, height, side, generator=generator)
    patterns = torch.fft.irfft2(torch.fft.rfft2(noise) / frequency.clamp(min=1 / max(height, side)), s=(height, side))
    mixed = torch.einsum("bphw,pc->bchw", patterns, torch.randn(8, channels, generator=generator))
    mixed = mixed / mixed.std() + 0.1 * torch.randn(batch, channels, height, side, generator=generator)
    return (mixed - mixed.mean()) / mixed.std()


def images(batch: int, side: int, *, height: int | None = None) -> Tensor:
    """Return images in 0..1, like natural ones in their frequencies."""
    return (0.5 + 0.2 * features(batch, 3, side, height=height)).clamp(0, 1)


def _input(settings: Settings, device: torch.device, side: int, *, batch: int, height: int | None = None) -> Tensor:
    if settings.what == "networks":
        x = images(batch, side, height=height)
    else:
        x = features(batch, settings.embed_dim, side, height=height)
    layout = torch.channels_last if settings.channels_last else torch.contiguous_format
    return x.to(device, DTYPES[settings.dtype]).contiguous(memory_format=layout)


def _chosen(settings: Settings) -> dict[str, Method]:
    """Return the methods of a run by name, peers from outside last."""
    known = methods_of(settings)
    problems = [
        Problem("--methods", f"no method named {name!r}{suggestion(name, sorted(known))}")
        for name in settings.methods
        if name not in known
    ]
    if problems:
        raise ConfigError(problems)
    chosen = {name: known[name] for name in settings.methods}
    if settings.compile:
        chosen |= {
            f"{name} compiled": compiled(name, method) for name, method in chosen.items() if method.kind == "ours"
        }
    for spec in settings.peers:
        name, count = label(spec), 1
        while name in chosen:
            count += 1
            name = f"{label(spec)}-{count}"
        chosen[name] = Method("outside", _outside(spec))
    return chosen


def _outside(spec: str) -> Callable[[Settings], Subject]:
    def build(settings: Settings) -> Subject:
        if settings.what == "networks":
            return Subject(build_peer(spec, FACTORS, settings.upscale))
        return Subject(build_peer(spec, WIDTHS, settings.embed_dim))

    return build


def _built(method: Method, settings: Settings, device: torch.device) -> Subject:
    subject = method.build(settings)
    for module in subject.modules():
        module.to(device, DTYPES[settings.dtype])
    return subject


def _call(subject: Subject, x: Tensor, passed: Pass, output_shape: Sequence[int]) -> Callable[[], Tensor]:
    """Return what is timed: a call that leaves nothing behind."""
    training = passed == "forward+backward"
    for module in subject.modules():
        module.train(training)
    state, function = subject.state(x), subject.function
    if not training:

        def infer() -> Tensor:
            with torch.no_grad():
                return function(x, *state)

        return infer
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    leaves = [x, *subject.module.parameters(), *_leaves(state)]
    probe = torch.randn(*output_shape, device=x.device, dtype=x.dtype)

    def step() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        output = function(x, *state)
        output.backward(probe)
        return output

    return step


def _leaves(state: tuple[Any, ...]) -> list[Tensor]:
    found = [leaf for leaf in torch.utils._pytree.tree_leaves(state) if isinstance(leaf, Tensor)]
    return [leaf for leaf in found if leaf.requires_grad]


# --- is it right, is it valid -----------------------------------------------------------------------------------------


def _checked(name: str, method: Method, subject: Subject, settings: Settings, device: torch.device) -> Check:
    backward = "forward+backward" in settings.passes
    height, width = _check_size(method, settings)
    x = _input(settings, device, width, batch=1, height=height)
    if method.kind == "outside":
        return _shaped(subject, x, settings)
    # A state is made from the same map, and no gradient goes into it, as in what is timed.
    return oracles.check(subject.module, subject.provider, subject.apply, x, backward=backward, allowed=method.allowed)


def _check_size(method: Method, settings: Settings) -> tuple[int, int]:
    """Return a small map of some chunks, the last of them not full; for code that may need it, of whole windows."""
    if settings.what == "networks":
        return (40, 32)
    if method.whole_windows or method.kind == "outside":
        return (32, 48)
    height = math.ceil(5 * settings.chunk_size / 32)
    return (height + (height * 32 % settings.chunk_size == 0), 32)


def _shaped(subject: Subject, x: Tensor, settings: Settings) -> Check:
    """Return whether code from outside returns finite numbers of the right shape; nothing else is known of it."""
    wanted = _output_shape(x, settings)
    for module in subject.modules():
        module.eval()
    with torch.no_grad():
        output = subject.apply(x)
    return _plausible(output, wanted) or Check("not checked", reason="code from outside")


def _output_shape(x: Tensor, settings: Settings) -> tuple[int, ...]:
    factor = settings.upscale if settings.what == "networks" else 1
    return (*x.shape[:2], factor * x.shape[2], factor * x.shape[3])


def _plausible(output: Tensor, wanted: Sequence[int]) -> Check | None:
    if tuple(output.shape) != tuple(wanted):
        return Check("wrong", reason=f"its shape is {tuple(output.shape)}, not {tuple(wanted)}")
    if not bool(torch.isfinite(output).all()):
        return Check("wrong", reason="its output is not finite")
    return None


def _validity(methods: dict[str, Method], settings: Settings, progress: Progress) -> dict[str, Validity]:
    """Time stand-ins and dense SDPA as their authors' figures were taken: on a CPU, by the published settings."""
    known = methods_of(replace(settings, what="layers"))
    names = {name for name, method in methods.items() if method.author_ratio is not None}
    names |= {name for method in methods.values() for name in method.valid_as}
    if not names or not settings.validity or settings.device != "cpu":
        return {}
    progress("checking stand-ins against their authors' figures")
    published = Settings(rounds=settings.rounds, shortest=settings.shortest)
    device = torch.device("cpu")
    x = _input(published, device, VALID_SIDE, batch=1)
    calls = {
        name: _call(_built(known[name], published, device), x, "forward", x.shape) for name in ("SDPA", *sorted(names))
    }
    samples = alternate(calls, device, rounds=settings.rounds, shortest=settings.shortest)
    found = {}
    for name in sorted(names):
        author = known[name].author_ratio or math.inf
        found[name] = Validity(ratio(samples[name], samples["SDPA"]).median, VALID_UP_TO * author)
    return found


# --- measuring --------------------------------------------------------------------------------------------------------


def _measure(
    found: Run,
    methods: dict[str, Method],
    subjects: dict[str, Subject],
    sticks: dict[str, Yardstick],
    passed: Pass,
    device: torch.device,
    progress: Progress,
) -> None:
    settings = found.settings
    left = dict(subjects)
    for side in sorted(set(settings.sizes)):
        x = _input(settings, device, side, batch=settings.batch)
        wanted = _output_shape(x, settings)
        calls, memories = {}, {}
        for name, subject in list(left.items()):
            progress(f"{passed}, {side}x{side}: {name}")
            if _expected(found, name, passed, side) > settings.limit:
                _leave_out(found, name, passed, side, left)
                continue
            try:
                call = _call(subject, x, passed, wanted)
                if subject.compiled:
                    call()  # compiles
                memory, seconds = _first(call, device)
            except Exception as error:
                if methods[name].kind not in ("stand-in", "outside"):
                    raise
                # Released codes do fail: at maps that are not made of whole windows, or smaller than a chunk.
                found.notes.append(f"{name} fails at {side}x{side} ({passed}): {error}")
                continue
            if seconds > settings.limit:
                _leave_out(found, name, passed, side, left)
                continue
            bad = _plausible(call(), wanted)
            if bad and found.checks[name].status != "wrong":
                found.checks[name] = replace(bad, reason=f"at {side}x{side}, {bad.reason}")
            calls[name], memories[name] = call, memory
        for name, call in calls.items():
            other = calls.get(f"plain-{name}")
            if other is not None and methods[name].kind == "ours" and passed == "forward":
                _compare(found, name, call(), other(), x)
        progress(f"{passed}, {side}x{side}: timing")
        sticks_by_call = {f"rate of {name}": stick for name, stick in sticks.items()}
        everything = {**calls, **{name: stick.call for name, stick in sticks_by_call.items()}}
        samples = alternate(everything, device, rounds=settings.rounds, shortest=settings.shortest)
        rates = rates_of(sticks_by_call, samples)
        found.rates.setdefault(passed, {})[side] = rates
        for name in calls:
            found.rows.append(
                _row(settings, rates, name, methods[name], passed, side, x, samples[name], memories[name])
            )


def _compare(found: Run, name: str, output: Tensor, other: Tensor, x: Tensor) -> None:
    """Note a method as wrong that is another function than its stand-in at a size that is timed.

    Both may be right and differ: in the first chunk and the last two they count keys differently, and between clusters
    that are equally near rounding decides.
    """
    residual = x if x.shape == other.shape else torch.zeros_like(other)
    error = ((output - other).double().norm() / (other - residual).double().norm()).item()
    counted_differently = 3 * found.settings.chunk_size / (x.shape[-2] * x.shape[-1])
    allowed = max(ALLOWED_AT_SIZE, 2 * oracles.ALLOWED[x.dtype]) + math.sqrt(counted_differently)
    if not error <= allowed and found.checks[name].status != "wrong":
        reason = f"at {x.shape[-2]}x{x.shape[-1]}, it differs from plain-{name}"
        found.checks[name] = Check("wrong", error, allowed, reason)


def _expected(found: Run, name: str, passed: Pass, side: int) -> float:
    """Return the seconds that a method will take if its time grows as between the last two sizes; 0 if unknown."""
    rows = [row for row in found.rows if (row.method, row.passed) == (name, passed)][-2:]
    if len(rows) < 2:
        return 0.0
    times = {row.side**2: row.busy.median / 1000 for row in rows}
    first, last = times
    return times[last] * (side**2 / last) ** exponent(times, first, last)


def _leave_out(found: Run, name: str, passed: Pass, side: int, left: dict[str, Subject]) -> None:
    del left[name]
    found.notes.append(
        f"{name} would take longer than {found.settings.limit:g} s at {side}x{side} ({passed}); it was left out there "
        "and at larger sizes"
    )


def _first(call: Callable[[], Tensor], device: torch.device) -> tuple[NewMemory, float]:
    """Return the memory of the first call and its seconds, measurement included."""
    memories: list[NewMemory] = []
    seconds = sample(lambda: memories.append(new_memory(call, device)), device).wall
    return memories[0], seconds


def _row(
    settings: Settings,
    rates: Rates,
    name: str,
    method: Method,
    passed: Pass,
    side: int,
    x: Tensor,
    samples: list[Sample],
    memory: NewMemory,
) -> Row:
    tokens = x.shape[0] * side * side
    cost = None if method.cost is None else method.cost(settings, side * side).times(x.shape[0])
    if cost is not None and passed == "forward+backward":
        cost = replace(cost.times(3), exp=cost.exp)
    return Row(
        name,
        passed,
        side,
        tokens,
        Spread.of([1000 * taken.busy for taken in samples]),
        Spread.of([1000 * taken.wall for taken in samples]),
        samples,
        memory,
        in_maps(memory.peak, x),
        in_maps(memory.largest, x),
        cost,
        None if cost is None else 1000 * rates.floor(cost),
        tuple(operator for operator in memory.operators if _telling(operator)),
    )


def _telling(operator: str) -> bool:
    """Return whether the name of an operator tells which form or backend ran."""
    return operator.startswith(("sparse_sr_attn::", "triton")) or ("::" in operator and "attention" in operator)


# --- what follows from it ---------------------------------------------------------------------------------------------


def _speedups(found: Run, methods: dict[str, Method]) -> list[Speedup]:
    rows = {(row.method, row.passed, row.side): row for row in found.rows}
    outside = {name: name.rpartition(".")[2] for name, method in methods.items() if method.kind == "outside"}
    speedups = []
    for (name, passed, side), mine in rows.items():
        if methods[name].kind != "ours":
            continue
        # `lcoan.CoA` is compared with our CoA alone, code of an unknown name with all that is ours.
        comparable = [peer for peer, original in outside.items() if original == name or original not in methods]
        for rival in (*methods[name].rivals, *comparable):
            other = rows.get((rival, passed, side))
            if other is None:
                continue
            refused = refusal(found, name, methods) or refusal(found, rival, methods)
            value = None if refused else ratio(other.samples, mine.samples)
            speedups.append(Speedup(name, rival, passed, side, value, refused))
    return speedups


def refusal(found: Run, name: str, methods: dict[str, Method]) -> str:
    """Return why nothing may be compared with a method; empty if it may."""
    check = found.checks[name]
    if check.status == "wrong":
        return f"{name} is wrong: {check.reason}"
    for stand_in in (name, *methods[name].valid_as):
        validity = found.validity.get(stand_in)
        if validity is not None and not validity.valid:
            return (
                f"{stand_in} is no valid stand-in: {validity.ratio:.3f} of dense SDPA's time, "
                f"at most {validity.allowed:.3f} would be"
            )
    return ""


def _with_exponents(found: Run) -> Run:
    """Return the run with growth from 96 (or the smallest size, where that is not among them) to the largest."""
    sides = sorted(found.settings.sizes)
    first, last = (VALID_SIDE if VALID_SIDE in sides[:-1] else sides[0]), sides[-1]
    if first == last:
        return found
    for passed in found.settings.passes:
        growth = {}
        for name in found.kinds:
            times = {r.side**2: r.busy.median for r in found.rows if (r.method, r.passed) == (name, passed)}
            if first**2 in times and last**2 in times:
                growth[name] = exponent(times, first**2, last**2)
        found.exponents[passed] = growth
    return replace(found, exponent_sides=(first, last))


# --- where ------------------------------------------------------------------------------------------------------------


def environment(device: torch.device) -> dict[str, str]:
    """Return where and with what a run runs, and the settings of the allocator and of OpenMP."""
    names = sorted({*_ENVIRONMENT, *(name for name in os.environ if name.startswith("MALLOC_"))})
    known = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": _processor(),
        "system": f"{platform.system()}, {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sparse_sr_attn": sparse_sr_attn.__version__,
        "threads": str(torch.get_num_threads()),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        **{name: os.environ.get(name, "not set") for name in names},
    }
    if device.type == "cuda":
        known["gpu"] = torch.cuda.get_device_name(device)
        known["cuda"] = str(torch.version.cuda)
    return known


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    values = dict(line.split(":", 1) for line in lines if ":" in line)
    stripped = {name.strip(): value.strip() for name, value in values.items()}
    detail = ", ".join(f"{name} {stripped[name]}" for name in ("cpu family", "model") if name in stripped)
    model = stripped.get("model name", platform.processor() or platform.machine())
    return f"{model} ({detail}), {os.cpu_count()} cores"


@contextmanager
def _whole_float32() -> Iterator[None]:
    """Have convolutions of float32 not rounded to TF32 on GPUs, as products are not by default."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Have torch compute with so many threads on the CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
