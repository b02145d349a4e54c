"""Attention of all tokens to all tokens."""

from contextlib import nullcontext

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparse_sr_attn.functional._torch import is_transformed, without_autocast, working_precision


def dense_attention(
    query: Float[Tensor, "b n d"], key: Float[Tensor, "b m d"], value: Float[Tensor, "b m e"], *, scale: float = 1.0
) -> Float[Tensor, "b n e"]:
    r"""Return $\mathrm{softmax}(\mathrm{scale} \cdot Q K^\top) V$.

    Args:
        query: one row per token.
        key: one row per token attended to; normalise the rows first for cosine scores.
        value: one row per token attended to.
        scale: factor on the dot products, dimensionless.

    Returns:
        One row per query, in the dtype of `value`; scores and softmax are computed in float32 or higher.

    Note:
        Time grows as `n * m`; memory as `n + m` if torch has a fused kernel for the device.

    Examples:
        >>> query, key, value = torch.rand(1, 16, 8), torch.rand(1, 20, 8), torch.rand(1, 20, 32)
        >>> dense_attention(query, key, value, scale=8**-0.5).shape
        torch.Size([1, 16, 32])
    """
    dtype = working_precision(query)
    # The fused kernels want rows of one width (zeros change no dot product) that are contiguous.
    width = max(query.shape[-1], value.shape[-1])
    padded = (F.pad(rows.to(dtype), (0, width - rows.shape[-1])) for rows in (query, key, value))
    q, k, v = (rows.contiguous()[:, None] for rows in padded)
    # The fused kernels have no forward-mode derivatives, and no second ones.
    kernels = sdpa_kernel(SDPBackend.MATH) if is_transformed() else nullcontext()
    with without_autocast(query), kernels:
        attended = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return attended[:, 0, :, : value.shape[-1]].to(value.dtype)
