r"""Attention by positive random features: the softmax kernel as an expectation, at linear cost.

$$\exp\langle q, k \rangle = \mathbb{E}_w[\phi_w(q)\,\phi_w(k)], \quad \phi_w(u) = \exp(\langle w, u \rangle - \lVert u
\rVert^2 / 2), \quad w \sim \mathcal{N}(0, I)$$

Choromanski et al., "Rethinking Attention with Performers", ICLR 2021; used for super-resolution by ENLA (Xia et al.,
AAAI 2022).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from sparse_sr_attn.errors import ShapeError
from sparse_sr_attn.functional._torch import without_autocast, working_precision


def random_directions(num_features: int, dim: int, seed: int = 0) -> Float[Tensor, "m d"]:
    """Return normally distributed vectors that are orthogonal in groups of `dim` and depend only on `seed`.

    Each vector on its own is distributed like one of independent normal numbers; orthogonal vectors estimate the kernel
    with less variance.

    Examples:
        >>> random_directions(num_features=32, dim=8).shape
        torch.Size([32, 8])
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (2, -(-num_features // dim), dim, dim)
    numbers, others = torch.randn(shape, generator=generator, device="cpu", dtype=torch.float64)
    rotations, triangles = torch.linalg.qr(numbers)
    # Without the signs, not every rotation is equally likely.
    rotations = rotations * triangles.diagonal(dim1=-2, dim2=-1).sign()[:, None]
    lengths = others.norm(dim=-1, keepdim=True)
    directions: Tensor = (lengths * rotations.transpose(-1, -2)).flatten(0, 1)
    return directions[:num_features].float()


def kernel_attention(
    query: Float[Tensor, "b n d"],
    key: Float[Tensor, "b k d"],
    value: Float[Tensor, "b k e"],
    directions: Float[Tensor, "m d"],
) -> Float[Tensor, "b n e"]:
    r"""Return $\sum_j \kappa(q, k_j)\,v_j / \sum_j \kappa(q, k_j)$ with $\kappa(q, k) = \sum_w \phi_w(q)\,\phi_w(k)$.

    It is computed as two softmaxes, which is mathematically the same: each feature averages the values of the keys, and
    each query averages the features. No exponential can overflow and no denominator can vanish.

    Args:
        query: one row per token.
        key: one row per token attended to.
        value: one row per token attended to.
        directions: $w$, one row per feature. With more features the result approaches softmax attention with scale 1,
            the faster the shorter queries and keys are.

    Returns:
        One row per query, in the dtype of `value`; computed in float32 or higher.

    Note:
        Time and memory grow as `(n + k) * m`. The factor $\exp(-\lVert q \rVert^2 / 2)$ of a query cancels.

    Examples:
        >>> query, key, value = torch.rand(1, 16, 8), torch.rand(1, 20, 8), torch.rand(1, 20, 32)
        >>> kernel_attention(query, key, value, random_directions(num_features=32, dim=8)).shape
        torch.Size([1, 16, 32])
    """
    dtype = working_precision(query)
    with without_autocast(query):
        query, key, directions = (rows.to(dtype) for rows in (query, key, directions))
        # One row a feature: GPUs reduce along rows many times faster than across them.
        of_keys = directions @ key.transpose(-1, -2) - key.square().sum(dim=-1)[:, None] / 2
        gathered = of_keys.softmax(dim=-1) @ value.to(dtype)
        of_queries = query @ directions.T + of_keys.logsumexp(dim=-1)[:, None]
        return (of_queries.softmax(dim=-1) @ gathered).to(value.dtype)


def contrastive_loss(
    query: Float[Tensor, "b n d"],
    key: Float[Tensor, "b k d"],
    *,
    num_queries: int = 256,
    positive: float = 0.02,
    negative: float = 0.08,
    seed: int = 0,
) -> Float[Tensor, ""]:
    r"""Return ENLCA's contrastive loss: log-sum-exp of mid-ranked minus top-ranked scores, averaged over queries.

    $$\frac{1}{S} \sum_{s=1}^{S} \log \sum_{j = n_2 N}^{(n_1 + n_2) N} \exp T_{s,j} - \log \sum_{j=1}^{n_1 N} \exp
    T_{s,j}$$

    over $S$ queries drawn from each sample, where $T_s$ are the dot products of a query with all $N$ keys, descending.

    Args:
        query: one row per token.
        key: one row per token.
        num_queries: $S$, >= 1; at most all queries are used.
        positive: $n_1$, fraction of the keys that are positives; at least one is.
        negative: $n_2$, rank of the first negative as a fraction of the keys; there are as many as positives.
        seed: seed for drawing queries; pass the step number to draw others in each step.

    Returns:
        A scalar, < 0 if positives have higher scores than negatives.

    Raises:
        ShapeError: there are fewer than two keys.

    Note:
        Time and memory grow as `S * N`, not as the square of `N`.

    Source:
        ENLCA (Xia et al., AAAI 2022). Deviations: the original uses all queries, hence $N^2$, and adds a constant
        margin, which changes no gradient.

    Examples:
        >>> rows = torch.eye(4).repeat(1, 25, 1)  # 100 tokens of 4 kinds
        >>> bool(contrastive_loss(rows, rows, positive=0.25, negative=0.5) < 0)
        True
    """
    num_keys = key.shape[1]
    if num_keys < 2:
        raise ShapeError(f"the contrastive loss compares keys, so there must be at least 2 of them, got {num_keys}")
    count = max(1, round(positive * num_keys))
    first = min(max(count, round(negative * num_keys)), num_keys - 1)
    last = min(first + count, num_keys)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(query.shape[1], generator=generator, device="cpu")[:num_queries].to(query.device)
    dtype = working_precision(query)
    with without_autocast(query):
        scores = query[:, chosen].to(dtype) @ key.to(dtype).transpose(-1, -2)
        ranked = scores.topk(last, dim=-1).values
        return (ranked[..., first:].logsumexp(dim=-1) - ranked[..., :count].logsumexp(dim=-1)).mean()
