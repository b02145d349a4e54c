"""spandrel loads our networks, and with it the programs that load models through it, such as chaiNNer and ComfyUI.

One line before the first model is loaded::

    import sparse_sr_attn_spandrel; sparse_sr_attn_spandrel.install()
"""

from sparse_sr_attn_spandrel.architectures import ARCHITECTURES, NetworkArchitecture, install

__all__ = ["ARCHITECTURES", "NetworkArchitecture", "install"]
