"""States print what they are built of, not their values."""

import torch

from sparse_sr_attn import GMSA, LCoA


def test_states_print_dtypes_and_shapes() -> None:
    state = LCoA(16, chunk_size=36).attend(torch.rand(2, 16, 12, 12))
    assert repr(state) == (
        "ClusterAttention(pattern=ClusterPattern(order=int64[2, 144], assignment=int64[2, 144], chunk_size=36, "
        "num_adjacent=1, count_keys_once=True, neighbors=None), height=12, width=12, num_rounds=1, "
        "weights=float32[2, 4, 36, 108], embedding=None)"
    )
    assert repr(GMSA(12, window_sizes=(4,)).attend(torch.rand(1, 12, 8, 8))) == (
        "WindowAttention(weights=(float32[1, 4, 16, 16],), query=None, window_sizes=(4,), shift=False, "
        "exact_shift=True, height=8, width=8)"
    )
