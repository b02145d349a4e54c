"""Modules under their old names: importing one gives a FutureWarning. They are removed in the next release."""

import importlib
import sys
import warnings
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "attachment": "backbones.attach",
    "conversion": "checkpoints.convert",
    "degradation": "data.imresize",
    "evaluation": "data.metrics",
    "export": "inference.onnx",
    "graphs": "inference.cuda_graph",
    "hub": "checkpoints.hub",
    "images": "data.images",
    "pairs": "data.pairs",
    "visualize": "inference.visualize",
}
_ALSO = {"images": "inference.upscale"}  # a part of the old module that is now elsewhere


class OldNames:
    """Finds and loads the old modules; the last entry of `sys.meta_path`."""

    def find_spec(self, name: str, *paths: object) -> ModuleSpec | None:
        """Return how to load an old module; `None` for any other."""
        package, _, old = name.rpartition(".")
        return ModuleSpec(name, self) if package == __package__ and old in MOVED else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> None:
        """Leave the creation to Python."""

    def exec_module(self, module: ModuleType) -> None:
        """Fill the module with the public names of the one that replaces it."""
        old = module.__name__.rpartition(".")[2]
        new = f"{__package__}.{MOVED[old]}"
        warnings.warn(f"{module.__name__} is {new} now", FutureWarning, stacklevel=2)
        for source in filter(None, (_ALSO.get(old), MOVED[old])):
            found = vars(importlib.import_module(f"{__package__}.{source}"))
            vars(module).update({name: value for name, value in found.items() if not name.startswith("_")})


sys.meta_path.append(OldNames())
