"""The trunk of a network by config: its blocks, the attention layers after them, and which of these share states."""

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparse_sr_attn.blocks.attention_config import AttentionConfig, build_numbered
from sparse_sr_attn.layers.base import AttentionLayer
from sparse_sr_attn.layers.build import find_layer


@dataclass(frozen=True)
class _Step:
    """The layer at a site and the state that it uses.

    Attributes:
        layer: index of the layer in the list.
        provider: index of the layer whose state it uses; `None` if it uses no state.
        last: whether no later layer uses that state.
    """

    layer: int
    provider: int | None
    last: bool


def maybe_checkpoint(part: Callable[..., Any], *inputs: Any, enabled: bool, **options: Any) -> Any:
    """Return `part(*inputs, **options)`, with activation checkpointing if `enabled`; gradients flow into `inputs`."""
    return checkpoint(part, *inputs, use_reentrant=False, **options) if enabled else part(*inputs, **options)


class SiteAttention(nn.ModuleList):
    """The attention layers of a trunk, which follow its blocks and share states.

    The constructor decides which layer reads which state; a state is freed after its last reader. Layers are numbered
    from input to output, several after one block in the order of the mappings. So their parameters have a prefix of
    their own in a network, and the names of the blocks do not change.

    Args:
        configs: from `read_attention`, for the same number of blocks.
        num_blocks: number of blocks of the trunk.
        embed_dim: channels of the trunk, or of each block's output.
        shapes: the shape of each block's output, if they differ: only blocks of one shape share states.

    Examples:
        >>> from sparse_sr_attn.blocks import read_attention
        >>> attention = SiteAttention(read_attention({"type": "LCoA", "every": 2}, 4), num_blocks=4, embed_dim=8)
        >>> trunk = [torch.nn.Conv2d(8, 8, 3, padding=1) for _ in range(4)]
        >>> attention.run(trunk, torch.rand(1, 8, 12, 12)).shape
        torch.Size([1, 8, 12, 12])
    """

    def __init__(
        self,
        configs: Sequence[AttentionConfig],
        num_blocks: int,
        embed_dim: int | Sequence[int],
        shapes: Sequence[Hashable] | None = None,
    ) -> None:
        super().__init__()
        widths = [embed_dim] * num_blocks if isinstance(embed_dim, int) else embed_dim
        sites = sorted(
            (block, number, shape, turn)
            for number, attention in enumerate(configs)
            for shape, alike in enumerate(_alike(attention.sites(num_blocks), shapes))
            for turn, block in enumerate(alike)
        )
        index_of = {(number, shape, turn): index for index, (_, number, shape, turn) in enumerate(sites)}
        built: Counter[int] = Counter()
        self._steps: dict[int, list[_Step]] = defaultdict(list)
        for index, (block, number, shape, turn) in enumerate(sites):
            attention = configs[number]
            place = turn % attention.share
            first = index_of[number, shape, turn - place]
            if place == 0:
                entry = find_layer(attention.type)
                layer = build_numbered(entry, widths[block], attention.options, built[number], attention.path)
                built[number] += 1
            else:
                layer = cast(AttentionLayer, self[first]).make_consumer()
            self.append(layer)
            following = (number, shape, turn + 1) in index_of and place + 1 < attention.share
            shared = place > 0 or following
            self._steps[block].append(_Step(index, first if shared else None, not following))

    def at(self, block: int) -> list[AttentionLayer]:
        """Return the layers after a block."""
        return [cast(AttentionLayer, self[step.layer]) for step in self._steps.get(block, ())]

    @property
    def shares(self) -> bool:
        """Whether a layer uses the state of another."""
        return any(step.provider not in (None, step.layer) for steps in self._steps.values() for step in steps)

    def after(self, block: int, x: Tensor, states: Mapping[int, Any]) -> tuple[Tensor, dict[int, Any]]:
        """Run the layers after a block on its output.

        Return the features, and the states to pass to the call for the next block; the first gets none.
        """
        states = dict(states)
        for step in self._steps.get(block, ()):
            layer = cast(AttentionLayer, self[step.layer])
            if step.provider is None:
                x = layer(x)
                continue
            if step.provider == step.layer:
                states[step.provider] = layer.attend(x)
            x = layer(x, states[step.provider])
            if step.last:
                del states[step.provider]
        return x, states

    def run(
        self, trunk: Iterable[nn.Module], x: Float[Tensor, "b c h w"], *, activation_checkpointing: bool = False
    ) -> Float[Tensor, "b c h w"]:
        """Run the blocks of `trunk` and the layers between them on `x`.

        Args:
            trunk: `num_blocks` blocks.
            x: input features.
            activation_checkpointing: in training, store only the features between blocks, and recompute the rest in the
                backward.
        """
        states: dict[int, Any] = {}
        again = activation_checkpointing and self.training
        for number, block in enumerate(trunk):
            x, states = maybe_checkpoint(self._segment, number, block, x, states, enabled=again)
        return x

    def _segment(
        self, number: int, block: nn.Module, x: Tensor, states: Mapping[int, Any]
    ) -> tuple[Tensor, dict[int, Any]]:
        """Run one block and the layers after it; return the features and the states that later layers need."""
        return self.after(number, block(x), states)


def _alike(blocks: Sequence[int], shapes: Sequence[Hashable] | None) -> list[list[int]]:
    """Return the blocks, grouped by shape."""
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for block in blocks:
        groups[shapes[block] if shapes else None].append(block)
    return list(groups.values())
