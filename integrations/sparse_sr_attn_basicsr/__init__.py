"""`sparse_sr_attn` in BasicSR: its networks, its model, and the commands `sparse-sr train` and `sparse-sr test`.

In a host of your own, one line before the first network is built::

    import sparse_sr_attn_basicsr; sparse_sr_attn_basicsr.register()
"""

from sparse_sr_attn_basicsr.registration import SparseEDSR, SparseRCAN, register
from sparse_sr_attn_basicsr.shims import apply

__all__ = ["SparseEDSR", "SparseRCAN", "apply", "register"]
