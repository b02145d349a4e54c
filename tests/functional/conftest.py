"""Tensor cores for kernels that run in Triton's interpreter."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray


def _tf32(numbers: NDArray[np.float32]) -> NDArray[np.float32]:
    """Round to the 10 fraction bits of TF32, ties away from zero, as `cvt.rna.tf32.f32` does."""
    return ((numbers.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


@pytest.fixture
def tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter multiply float32 as tensor cores do. By itself, it ignores the precision of products."""
    builder = pytest.importorskip("triton.runtime.interpreter").InterpreterBuilder
    plain = builder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, imprecise: Any) -> Any:
        name = str(input_precision).rpartition(".")[2].lower()
        if a.data.dtype != np.float32 or name == "ieee":
            return plain(self, a, b, d, input_precision, imprecise)
        assert name in ("tf32", "tf32x3"), name
        big = [_tf32(each.data) for each in (a, b)]
        small = [_tf32(each.data - rounded) for each, rounded in zip((a, b), big, strict=True)]
        pairs = [(big[0], big[1])]
        if name == "tf32x3":
            pairs = [(small[0], big[1]), (big[0], small[1]), *pairs]
        total = d.data
        for left, right in pairs:
            total = np.matmul(left, right, dtype=d.data.dtype) + total
        return type(a)(total, d.dtype.scalar)

    monkeypatch.setattr(builder, "create_dot", create_dot)
