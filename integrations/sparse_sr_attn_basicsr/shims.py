"""Small repairs with which the published BasicSR can be imported with current libraries.

Each is applied only if needed, and none changes a file. `apply` applies all; call it before the first
`import basicsr`.
"""

import importlib
import logging
import sys
import warnings
from types import ModuleType

import torch

_LOG = logging.getLogger(__name__)

# Operators vanish with the library object that defines them, so it stays referenced here.
_TORCHVISION_OPERATORS: list[torch.library.Library] = []


def apply() -> None:
    """Apply every repair that is needed. Calling it again has no effect."""
    torchvision_operators()
    functional_tensor()
    ndimage_filters()


def torchvision_operators() -> None:
    """Let a torchvision built for CUDA import beside a torch built without.

    Such a torchvision cannot load its compiled operators, and its import fails because two of them are not declared.
    With the declarations, everything works except what calls the compiled code: `ops.nms`, `ops.deform_conv2d` and
    `io.decode_png`. A line in the log says so.
    """
    try:
        importlib.import_module("torchvision")
        return
    except ModuleNotFoundError:
        return  # BasicSR's own import names what to install
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _TORCHVISION_OPERATORS.append(library)
    for name in [name for name in sys.modules if name == "torchvision" or name.startswith("torchvision.")]:
        del sys.modules[name]
    importlib.import_module("torchvision")
    _LOG.warning(
        "torchvision's compiled operators do not match torch %s: all but ops.nms, ops.deform_conv2d and "
        "io.decode_png works. Super-resolution needs none of the three.",
        torch.__version__,
    )


def functional_tensor() -> None:
    """Alias `torchvision.transforms.functional_tensor`, removed in torchvision 0.17, to its public successor."""
    name = "torchvision.transforms.functional_tensor"
    if _missing(name) and not _missing("torchvision"):
        _alias(name, importlib.import_module("torchvision.transforms.functional"))


def ndimage_filters() -> None:
    """Alias `scipy.ndimage.filters`, deprecated in SciPy 1.8, to its public successor."""
    name = "scipy.ndimage.filters"
    if not _missing("scipy.ndimage") and (_missing(name) or _deprecated(name, "convolve")):
        _alias(name, importlib.import_module("scipy.ndimage"))


def _missing(name: str) -> bool:
    if sys.modules.get(name) is not None:
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # BasicSR's users need no deprecation warnings
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            return True
    return False


def _deprecated(name: str, attribute: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        try:
            getattr(importlib.import_module(name), attribute)
        except (DeprecationWarning, AttributeError):
            return True
    return False


def _alias(name: str, module: ModuleType) -> None:
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    setattr(sys.modules[parent], child, module)
