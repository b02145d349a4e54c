"""Options, profiles and the numerical house rules of the whole suite."""

import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from sparse_sr_attn.backbones.base import Network

# For benchmarks/, which is not installed; behind all else, so that seeded faults can put a copy of the packages first.
sys.path.append(str(Path(__file__).resolve().parents[1]))

if not torch.cuda.is_available():
    # Triton's kernels run in its interpreter, which it must know when it is imported; nothing else here looks at this.
    os.environ.setdefault("TRITON_INTERPRET", "1")

_RELAXED = (HealthCheck.too_slow, HealthCheck.data_too_large)
# `make test` tries the same examples every time, `make test-all` others each time.
settings.register_profile("dev", max_examples=50, deadline=None, derandomize=True, suppress_health_check=_RELAXED)
settings.register_profile("explore", max_examples=50, deadline=None, print_blob=True, suppress_health_check=_RELAXED)
settings.register_profile(
    "ci",
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    print_blob=True,
    suppress_health_check=_RELAXED,
)
settings.register_profile(  # for `make mutants`
    "brief", max_examples=10, deadline=None, derandomize=True, database=None, suppress_health_check=_RELAXED
)
settings.register_profile("nightly", max_examples=1000, deadline=None, suppress_health_check=_RELAXED)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where the device-independent tests run")
    parser.addoption(
        "--jaxtyping",
        action="store_true",
        help="check every shape annotation while the tests run (needs beartype; tests marked `unhooked` are skipped)",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "unhooked: does what jaxtyping's import hook disturbs (see --jaxtyping)")
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda needs a GPU that torch can use; this torch sees none")
    # float32 shall be float32: cuDNN's convolutions round to TF32 unless told not to.
    torch.backends.cudnn.allow_tf32 = False
    if config.getoption("--jaxtyping"):
        if importlib.util.find_spec("beartype") is None:
            raise pytest.UsageError("--jaxtyping needs beartype (pip install beartype)")
        from jaxtyping import install_import_hook

        install_import_hook(
            ["sparse_sr_attn.functional", "sparse_sr_attn.layers", "sparse_sr_attn.states"], "beartype.beartype"
        )
    # torch's own tracing log would bury every failure of a test that compiles.
    logging.getLogger("torch.__trace").propagate = False
    # Small tensors: threads cost more than they give, and one thread adds in one order.
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # the same in the processes that tests start


@pytest.hookimpl(tryfirst=True)  # before `-m promise` selects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    no_gpu = pytest.mark.skip(reason="needs a GPU that torch can use")
    hooked = pytest.mark.skip(
        reason="compiles, watches random state or passes wrong types, which jaxtyping's hook disturbs"
    )
    for item in items:
        if getattr(getattr(item, "obj", None), "is_hypothesis_test", False):
            item.add_marker(pytest.mark.promise("R1"))
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if config.getoption("--jaxtyping") and item.get_closest_marker("unhooked"):
            item.add_marker(hooked)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the test should run; `--device cuda` moves every test that takes it."""
    return torch.device(request.config.getoption("--device"))


LCOA = {"type": "LCoA", "every": 1, "num_clusters": 5, "chunk_size": 7, "reduction": 3}
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "LCoAN": ("LCoAN", {"num_feat": 8, "num_group": 3, "num_block": 1, "upscale": 3, "share": 2, "chunk_size": 9}),
    "ELAN": ("ELAN", {"num_feat": 10, "num_block": 2, "share": 2, "window_sizes": (2, 4), "exact_shift": False}),
    "EDSR": ("EDSR", {"num_feat": 8, "num_block": 4, "img_range": 1.0, "attention": {**LCOA, "every": 2, "share": 2}}),
    "EDSR of ELABs": ("EDSR", {"num_feat": 10, "num_block": 2, "block": {"type": "ELAB", "window_sizes": (2, 3)}}),
    "RCAN": ("RCAN", {"num_feat": 9, "num_group": 2, "num_block": 1, "squeeze_factor": 3, "attention": [LCOA]}),
}
"""Each of our networks with attention, tiny."""


@pytest.fixture(params=NETWORKS)
def build_tiny(request: pytest.FixtureRequest) -> "Callable[[], Network]":
    """Build one of our networks, tiny, with the same weights each time."""
    import sparse_sr_attn

    name, options = NETWORKS[request.param]

    def build() -> "Network":
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network: Network = getattr(sparse_sr_attn, name)(**options)
        return network

    return build


@pytest.fixture(params=NETWORKS)
def trained(request: pytest.FixtureRequest) -> "Network":
    """A network after three steps of training, in evaluation mode."""
    import sparse_sr_attn  # not before jaxtyping's hook

    torch.manual_seed(0)
    name, options = NETWORKS[request.param]
    network = getattr(sparse_sr_attn, name)(**options)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(3):
        network(torch.rand(2, 3, 8, 7)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return network.eval()


@pytest.fixture(autouse=True)
def _strict(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For operations and layers: no nondeterministic kernel; unwritten memory is NaN; small inputs have many tiles."""
    strict = {"functional", "layers"} & set(request.path.parts)
    if strict:
        monkeypatch.setattr("sparse_sr_attn.functional.cluster.tiles._SCORES_PER_TILE", 64)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(bool(strict) or before)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, a new folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refused(here: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Run a command that must end with one line that holds a message, and write nothing."""
    from sparse_sr_attn.cli.main import main

    def run(arguments: list[str], message: str, status: int = 2, command: Callable[[list[str]], int] = main) -> None:
        before = {path for path in here.rglob("*") if path.is_file()}
        capsys.readouterr()
        assert command(arguments) == status
        output, errors = capsys.readouterr()
        assert message in errors
        assert (output, errors.count("\n") - errors.startswith("sparse-sr: 1 problem in")) == ("", 1), errors
        assert {path for path in here.rglob("*") if path.is_file()} == before

    return run


@pytest.fixture
def spandrel_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have what a test adds to spandrel's registry, which cannot be taken out again, gone after it."""
    from spandrel import MAIN_REGISTRY

    for name, value in vars(MAIN_REGISTRY).items():
        monkeypatch.setattr(MAIN_REGISTRY, name, value)
