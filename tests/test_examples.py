"""The examples in docstrings run, and everything public has one.

An example may use torch, what `sparse_sr_attn` names, and the names of the module it stands in.
"""

import doctest
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import sparse_sr_attn
from sparse_sr_attn.layers import LAYERS

ROOT = Path(sparse_sr_attn.__file__).parent
NAMES = {name: getattr(sparse_sr_attn, name) for name in sparse_sr_attn.__all__}
NOT_RUN = {"capture_cuda_graph", "compare", "export_onnx", "from_pretrained", "interpreting"}
"""Their examples need a GPU, minutes, the network, or an interpreter that was started for them."""


def module_names(*patterns: str, containing: str = "") -> list[str]:
    """Return the modules of the package whose files match patterns, all by default, and contain a text."""
    files = {file for pattern in patterns or ("**/*.py",) for file in ROOT.glob(pattern)}
    paths = [file.relative_to(ROOT.parent).with_suffix("") for file in files if containing in file.read_text()]
    return sorted(".".join(path.parts).removesuffix(".__init__") for path in paths)


def own(module: ModuleType) -> Iterator[tuple[str, object]]:
    """Yield the functions and classes that a module defines."""
    for name, value in vars(module).items():
        if (inspect.isroutine(value) or inspect.isclass(value)) and value.__module__ == module.__name__:
            yield name, inspect.unwrap(value)


def examples(module: ModuleType, name: str, value: object) -> list[doctest.DocTest]:
    """Return the examples in the docstrings of a function or a class, and of its methods."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = finder.find(value, f"{module.__name__}.{name}", module, {**NAMES, **vars(module), "torch": torch})
    return [test for test in found if test.examples]


def public() -> dict[str, object]:
    """Return what readers call: what packages name, all layers, and the functions of the modules that are tools."""
    found = {entry.name: entry.build for entry in map(LAYERS.get, LAYERS)}
    for package in ("", "backbones", "blocks", "checkpoints", "layers"):
        module = importlib.import_module(f"sparse_sr_attn.{package}".rstrip("."))
        found |= {name: getattr(module, name) for name in module.__all__}
    tools = (
        "functional/[!_]*.py",
        "functional/*/__init__.py",
        "inference/[!_]*.py",
        "data/imresize.py",
        "data/metrics.py",
    )
    for name in module_names(*tools):
        found |= {key: value for key, value in own(importlib.import_module(name)) if inspect.isfunction(value)}
    return {
        name: value
        for name, value in found.items()
        if not name.startswith("_")
        and callable(value)
        and not (inspect.isclass(value) and issubclass(value, Exception))
    }


@pytest.mark.parametrize("name", module_names(containing=">>> "))
def test_examples_run(name: str) -> None:
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.FAIL_FAST)
    failures: list[str] = []
    for label, value in own(module):
        for test in examples(module, label, value):
            torch.manual_seed(0)
            runner.run(test, out=failures.append)
    assert not failures, "".join(failures)
    assert runner.tries or name.endswith((".onnx", ".cuda_graph", ".hub"))


@pytest.mark.parametrize("name", sorted(public()))
def test_everything_public_has_an_example(name: str) -> None:
    value = inspect.unwrap(public()[name])
    module = importlib.import_module(value.__module__)
    found = [example for test in examples(module, name, value) for example in test.examples]
    assert found, f"{value.__module__}.{name} must have a section `Examples:` with `>>>` lines in its docstring"
    run = [example for example in found if not example.options.get(doctest.SKIP)]
    assert bool(run) != (name in NOT_RUN)
