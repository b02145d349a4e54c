"""Third-party networks behind the interface of ours: any image size, and options stored with their weights."""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_sr_attn.backbones.attach import Attended, is_attended
from sparse_sr_attn.backbones.base import OPTIONS, Network, as_json, encode_options
from sparse_sr_attn.backbones.trunks import copied, evaluating, likely_images
from sparse_sr_attn.errors import CheckpointError

WITH_ATTENTION = "WithAttention"
"""The `type` in the options of a third-party network with attention; `Attended` in older files."""

_MULTIPLES = (*range(1, 65), 96, 128)
_USUAL = 16  # for larger multiples, more sizes are tried
_SHORTEST = 9  # side of an image that any network should take
_SIZES = ((0, 1), (2, 4), (3, 7), (9, 6))


class ForeignNetwork(Network):
    """A third-party network behind the interface of ours. The state dict is that of the network itself.

    Args:
        network: a network for images whose sides are multiples of some number.
        options: options to rebuild it from, including `type`; `None` if they are not known.
        img_range: the range of its images.

    Raises:
        CheckpointError: the network does not accept images.
    """

    def __init__(self, network: nn.Module, options: Mapping[str, Any] | None, *, img_range: float = 1.0) -> None:
        facts = find_facts(network)
        if facts is None:
            raise CheckpointError(f"{type(network).__name__} must accept images and enlarge them by an integer factor")
        same = facts.num_in_ch == facts.num_out_ch
        mean = (0.0,) * facts.num_in_ch if same else None
        super().__init__(facts.num_in_ch, facts.num_out_ch, facts.upscale, img_range, mean)  # type: ignore[arg-type]
        self.network = network
        self._facts = facts
        self._options = None if options is None else as_json(options)

    def forward_body(self, x: Float[Tensor, "b c_in h w"]) -> Float[Tensor, "b c_out H W"]:
        """Run the network on an image, padded if necessary."""
        return run_padded(self.network, x, self._facts)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the state dict of the network itself."""
        return self.network.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load a state dict of the network itself."""
        return self.network.load_state_dict(*args, **kwargs)


def network_name(model: nn.Module) -> str:
    """Return the name of the class of a network, for a third-party one its own.

    Examples:
        >>> network_name(EDSR(num_block=2))
        'EDSR'
    """
    network = model.network if isinstance(model, ForeignNetwork) else model
    return (network._host if isinstance(network, Attended) else type(network)).__name__


@dataclass(frozen=True)
class Facts:
    """Properties of a network that a call reveals.

    Attributes:
        num_in_ch: channels of its input.
        num_out_ch: channels of its output.
        upscale: the upscaling factor.
        multiple: the sides of its input must be multiples of this.
        least: the sides of its input must be at least this.
    """

    num_in_ch: int
    num_out_ch: int
    upscale: int
    multiple: int
    least: int = 1


def find_facts(network: nn.Module) -> Facts | None:
    """Find the properties of a network by calling a copy of it on small black images; `None` if it accepts none."""
    twin = copied(network)  # some networks fuse their weights when they are called
    with evaluating(twin):
        for multiple in _MULTIPLES:
            found = _accepted(twin, multiple, _SHORTEST, _SIZES[: 2 if multiple <= _USUAL else None])
            if found is None:
                continue
            # If it needs a least side, it takes multiples of a smaller number from there on.
            longer = (
                _accepted(twin, smaller, times * (found.least + multiple), _SIZES)
                for smaller in range(1, multiple)
                for times in (1, 2)
            )
            return next((_with_least(twin, each) for each in longer if each), replace(found, least=1))
    return None


def _with_least(network: nn.Module, facts: Facts) -> Facts:
    """Return the facts with the shortest side from which on the network takes all images, at most that in `facts`.

    Some networks refuse a longer side than the first that they take, so all are tried.
    """
    shorter = range(facts.least - facts.multiple, 0, -facts.multiple)
    taken = itertools.takewhile(lambda side: _accepted(network, facts.multiple, side, ((0, 0),)) is not None, shorter)
    return replace(facts, least=min(taken, default=facts.least))


def _accepted(network: nn.Module, multiple: int, least: int, sizes: Sequence[tuple[int, int]]) -> Facts | None:
    """Return the properties of a network if it takes images with sides that are multiples of a number, from `least` on.

    Images of several sizes are tried, in multiples beyond `least`, because one may fit by chance.
    """
    like, widths = likely_images(network)
    least = multiple * -(-least // multiple)
    for channels in widths:
        seen = set()
        for down, right in sizes:
            height, width = least + down * multiple, least + right * multiple
            try:
                output = network(like.new_zeros(1, channels, height, width))
                batch, num_out_ch, *size = output.shape
            except Exception:  # user code can raise anything
                break
            upscale = size[0] // height
            if upscale == 0 or (batch, *size) != (1, upscale * height, upscale * width):
                break
            seen.add((num_out_ch, upscale))
        else:
            if len(seen) == 1:
                return Facts(channels, *seen.pop(), multiple, least)
    return None


def run_padded(
    network: Callable[[Tensor], Tensor], images: Float[Tensor, "b c h w"], facts: Facts | None
) -> Float[Tensor, "b d H W"]:
    """Run a network on images of any size.

    Images are padded at the right and the bottom by reflection (by replication if they are too small for that), and the
    output is cropped.

    Args:
        network: the network.
        images: images of any size.
        facts: which sides the network needs; `None` if it takes any.
    """
    if facts is None or (facts.multiple == 1 and min(images.shape[-2:]) >= facts.least):
        return network(images)
    height, width = images.shape[-2:]
    down, right = (-max(side, facts.least) % facts.multiple + max(side, facts.least) - side for side in (height, width))
    mode = "reflect" if down < height and right < width else "replicate"
    output = network(F.pad(images, (0, right, 0, down), mode))
    factor = output.shape[-1] // (width + right)
    return output[..., : height * factor, : width * factor]


def carry_options(network: nn.Module, options: Mapping[str, Any]) -> None:
    """Add a buffer with options to a network, as ours have. It is in the state dict while the network has attention.

    `load_state_dict` ignores the options in the file, present or not. Options that JSON cannot represent are not
    stored.
    """
    text = as_json(options)
    if text is not None and not hasattr(network, OPTIONS):
        network.register_buffer(OPTIONS, encode_options(json.loads(text)))
        network.register_state_dict_post_hook(_leave_out)
        network.register_load_state_dict_pre_hook(_keep_own)


def _leave_out(network: nn.Module, state: dict[str, Any], prefix: str, _: object) -> None:
    """Remove the options from a state dict if attention was detached from the network."""
    if not is_attended(network):
        state.pop(f"{prefix}{OPTIONS}", None)


def _keep_own(network: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Keep the options that the network was built with, whatever is loaded."""
    state[f"{prefix}{OPTIONS}"] = network.get_buffer(OPTIONS)
