"""The repairs: made where needed, and only there."""

import importlib
import subprocess
import sys
import types

import pytest

from sparse_sr_attn_basicsr import shims

pytestmark = pytest.mark.promise("R23")


def _python(code: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True, check=False)


def test_basicsr_imports_with_warnings_as_errors() -> None:
    done = _python("from sparse_sr_attn_basicsr import apply; apply(); import basicsr", "-W", "error")
    assert done.returncode == 0, done.stderr


def test_the_torchvision_repair_speaks_once_and_only_if_it_was_needed() -> None:
    broken = _python("import torchvision").returncode != 0
    done = _python("from sparse_sr_attn_basicsr import apply; apply(); apply(); import torchvision.transforms")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("compiled operators do not match") == int(broken)


def test_what_is_aliased_works() -> None:
    shims.apply()
    functional_tensor = importlib.import_module("torchvision.transforms.functional_tensor")
    filters = importlib.import_module("scipy.ndimage.filters")
    assert callable(functional_tensor.rgb_to_grayscale)
    assert callable(filters.convolve)


@pytest.mark.parametrize(
    ("repair", "name", "attribute"),
    [
        (shims.functional_tensor, "torchvision.transforms.functional_tensor", "rgb_to_grayscale"),
        (shims.ndimage_filters, "scipy.ndimage.filters", "convolve"),
    ],
)
def test_what_is_there_stays(
    repair: types.FunctionType, name: str, attribute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    present = types.ModuleType(name)
    setattr(present, attribute, object())
    monkeypatch.setitem(sys.modules, name, present)
    repair()
    assert sys.modules[name] is present


def test_nothing_is_repaired_where_torchvision_is_not_installed() -> None:
    done = _python(
        "import sys; sys.modules['torchvision'] = None; from sparse_sr_attn_basicsr import apply; apply();"
        "assert 'torchvision.transforms.functional_tensor' not in sys.modules"
    )
    assert done.returncode == 0, done.stderr


def test_another_fault_of_torchvision_is_not_hidden(tmp_path: object) -> None:
    done = _python(
        f"import sys, os; os.makedirs(r'{tmp_path}/torchvision'); "
        f"open(r'{tmp_path}/torchvision/__init__.py', 'w').write(\"raise RuntimeError('disk on fire')\"); "
        f"sys.path.insert(0, r'{tmp_path}'); from sparse_sr_attn_basicsr import apply; apply()"
    )
    assert done.returncode == 1
    assert "RuntimeError: disk on fire" in done.stderr
