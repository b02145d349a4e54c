"""Compile Triton kernels for GPUs, down to machine code, which needs no GPU.

The interpreter, in which tests run, forgives types, sizes and spilled registers. Compiling needs a process without it.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

NAMES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
"""What Triton calls the dtypes of torch."""

_SHARED_MEMORY = 99 * 1024  # that a multiprocessor of the smallest GPUs gives a program


class Usage(NamedTuple):
    """What a kernel needs: bytes of shared memory, and bytes of registers spilled to memory."""

    shared: int
    spilled: int


def run(script: str, capability: str, cache: os.PathLike[str]) -> None:
    """Run a script that compiles for the compute capability in `sys.argv[1]`, and require that it succeeds."""
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": path}
    command = [sys.executable, "-c", script, capability]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def usage(
    kernel: Any, options: Mapping[str, Any], sizes: Collection[str], kind: Callable[[str], str | tuple[str, ...]]
) -> Usage:
    """Compile a kernel.

    Args:
        kernel: of Triton.
        options: its compile-time constants, `num_warps` and `num_stages`.
        sizes: names of its arguments that are integers.
        kind: returns the type of what another argument points to; several types for a tuple of pointers.
    """
    import triton
    from triton.backends import nvidia
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in options:
            signature[name], constants[(place,)] = "constexpr", options[name]
        else:
            found = "i32" if name in sizes else kind(name)
            several = isinstance(found, tuple)
            signature[name] = (
                tuple(f"*{each}" for each in found) if several else found if name in sizes else f"*{found}"
            )
            if name not in sizes:  # as a launch finds of torch's memory, for wide loads
                places = [(place, each) for each in range(len(found))] if several else [(place,)]
                attributes |= {each: [["tt.divisibility", 16]] for each in places}
    target = GPUTarget("cuda", int(sys.argv[1]), 32)
    source = ASTSource(kernel, signature, constants, attributes)
    launch = {name: options[name] for name in ("num_warps", "num_stages")}
    compiled = triton.compile(source, target=target, options=launch)
    cuobjdump = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        told = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = Usage(compiled.metadata.shared, max(int(number) for number in re.findall(r"STACK:(\d+)", told)))
    assert found.shared <= _SHARED_MEMORY, (
        "more shared memory than a multiprocessor of the smallest GPUs gives a program"
    )
    return found
