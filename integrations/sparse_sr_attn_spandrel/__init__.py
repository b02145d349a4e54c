"""Let spandrel load our networks, and so the programs that use spandrel, such as chaiNNer and ComfyUI.

Run this line before the first model is loaded::

    import sparse_sr_attn_spandrel; sparse_sr_attn_spandrel.install()
"""

from sparse_sr_attn_spandrel.architectures import ARCHITECTURES, NetworkArchitecture, install

__all__ = ["ARCHITECTURES", "NetworkArchitecture", "install"]
