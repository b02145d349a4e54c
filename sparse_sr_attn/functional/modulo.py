"""The remainder of a division, written so that programs for images of any size can be exported."""

from jaxtyping import Int
from torch import Tensor


def modulo(numbers: Int[Tensor, "*s"], divisor: int) -> Int[Tensor, "*s"]:
    """Return `numbers % divisor`, which ONNX export cannot translate for a divisor that depends on the image."""
    return numbers - numbers // divisor * divisor
