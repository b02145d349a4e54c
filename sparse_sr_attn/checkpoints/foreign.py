"""Networks that somebody else wrote, used as ours are: any image size, and options in their weights."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_sr_attn.backbones.attach import evaluating, is_attended
from sparse_sr_attn.backbones.base import OPTIONS, Network, as_json, encode_options
from sparse_sr_attn.errors import CheckpointError

ATTENDED = "Attended"
"""The `type` in the options of a network into which attention was put."""

_MULTIPLES = (*range(1, 65), 96, 128)
_SHORTEST = 9  # side of an image that any network should take


class ForeignNetwork(Network):
    """Somebody else's network behind the interface of ours; its state dict is that of the network itself.

    Args:
        network: takes images in 0..1 whose sides are multiples of some number.
        options: what it can be rebuilt from, with `type`.

    Raises:
        CheckpointError: the network takes no image.
    """

    def __init__(self, network: nn.Module, options: Mapping[str, Any]) -> None:
        facts = find_facts(network)
        if facts is None:
            raise CheckpointError(f"{type(network).__name__} must take images, and enlarge them by a whole factor")
        same = facts.num_in_ch == facts.num_out_ch
        mean = (0.0,) * facts.num_in_ch if same else None
        super().__init__(facts.num_in_ch, facts.num_out_ch, facts.upscale, 1.0, mean)  # type: ignore[arg-type]
        self.network = network
        self.multiple = facts.multiple
        self._options = as_json(options)

    def forward_body(self, x: Float[Tensor, "b c_in h w"]) -> Float[Tensor, "b c_out H W"]:
        """Return what the network makes of an image, which is padded if need be."""
        return run_padded(self.network, x, self.multiple)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the state dict of the network itself."""
        return self.network.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load a state dict of the network itself."""
        return self.network.load_state_dict(*args, **kwargs)


@dataclass(frozen=True)
class Facts:
    """What a call of a network tells.

    Attributes:
        num_in_ch: channels of its input.
        num_out_ch: channels of its output.
        upscale: factor.
        multiple: of what the sides of its input must be multiples.
    """

    num_in_ch: int
    num_out_ch: int
    upscale: int
    multiple: int


def find_facts(network: nn.Module) -> Facts | None:
    """Return what calls of a network with small black images tell; `None` if it takes none.

    The network is called as in evaluation, and is left as it was.
    """
    weight = next((p for p in network.parameters() if p.is_floating_point()), torch.empty(0))
    first = next((module.in_channels for module in network.modules() if isinstance(module, nn.Conv2d)), 3)
    with evaluating(network):
        for multiple in _MULTIPLES:
            # Two neighbouring multiples have no other number in common that divides both.
            height = multiple * -(-_SHORTEST // multiple)
            for channels in dict.fromkeys((first, 3, 1)):
                image = weight.new_zeros(1, channels, height, height + multiple)
                try:
                    output = network(image)
                    batch, num_out_ch, *size = output.shape
                    upscale, rest = divmod(size[0], height)
                except Exception:  # noqa: S112  (somebody else's code can raise anything)
                    continue
                if rest == 0 and upscale and (batch, *size) == (1, upscale * height, upscale * (height + multiple)):
                    return Facts(channels, num_out_ch, upscale, multiple)
    return None


def run_padded(
    network: Callable[[Tensor], Tensor], images: Float[Tensor, "b c h w"], multiple: int
) -> Float[Tensor, "b d H W"]:
    """Return what a network makes of images whose sides are no multiples of what it needs.

    They are padded at the right and at the bottom by their reflection (by their last pixels where they are too small
    for that), and the result is cut.
    """
    if multiple == 1:
        return network(images)
    height, width = images.shape[-2:]
    down, right = -height % multiple, -width % multiple
    mode = "reflect" if down < height and right < width else "replicate"
    output = network(F.pad(images, (0, right, 0, down), mode))
    factor = output.shape[-1] // (width + right)
    return output[..., : height * factor, : width * factor]


def carry_options(network: nn.Module, options: Mapping[str, Any]) -> None:
    """Give a network a buffer with options, as ours have; its state dict has it while there is attention in it.

    `load_state_dict` ignores those of the file, there or not. Options for which JSON has no word are not carried.
    """
    text = as_json(options)
    if text is not None and not hasattr(network, OPTIONS):
        network.register_buffer(OPTIONS, encode_options(json.loads(text)))
        network.register_state_dict_post_hook(_leave_out)
        network.register_load_state_dict_pre_hook(_keep_own)


def _leave_out(network: nn.Module, state: dict[str, Any], prefix: str, _: object) -> None:
    """Leave the options out of a state dict, if attention was taken out of the network."""
    if not is_attended(network):
        state.pop(f"{prefix}{OPTIONS}", None)


def _keep_own(network: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Have the network keep the options it was built with, whatever is loaded."""
    state[f"{prefix}{OPTIONS}"] = network.get_buffer(OPTIONS)
