"""The options `attention` and `block` of a network: how they are checked, and the layers that they describe."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from torch import nn

from sparse_sr_attn.config import NonNegativeInt, PositiveInt, ProblemList, fields, join_path, read
from sparse_sr_attn.errors import ConfigError, UnknownNameError
from sparse_sr_attn.layers.base import LAYERS
from sparse_sr_attn.layers.build import build_layer, find_layer
from sparse_sr_attn.registry import Entry


@dataclass(frozen=True)
class AttentionConfig:
    """One mapping of the option `attention`.

    Attributes:
        type: name of a registered layer, or `timm:<name>`.
        every: a layer after every `every` blocks: 4 means after blocks 3, 7, 11, ...
        after: a layer after each of these blocks, counted from 0; instead of `every`.
        share: one layer computes a state and the next `share - 1` sites reuse it; 1 disables sharing. If the layer has
            an option `share` of its own, this is passed to it and sites share nothing.
        options: checked options of the layer.
        path: position of the mapping, for messages.

    Examples:
        >>> (config,) = read_attention({"type": "LCoA", "every": 4, "share": 2, "num_clusters": 32}, num_blocks=16)
        >>> config.sites(16), config.options["num_clusters"]
        ((3, 7, 11, 15), 32)
    """

    type: str
    every: PositiveInt | None = None
    after: Sequence[NonNegativeInt] | None = None
    share: PositiveInt = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    path: str = "attention"

    def sites(self, num_blocks: int) -> tuple[int, ...]:
        """Return the indices of the blocks, of `num_blocks`, that are followed by a layer."""
        if self.after is not None:
            return tuple(self.after)
        every = cast(int, self.every)
        return tuple(range(every - 1, num_blocks, every))


def read_attention(attention: object, num_blocks: int, path: str = "attention") -> tuple[AttentionConfig, ...]:
    """Read the option `attention` of a network.

    Args:
        attention: `None`, a mapping or a list of mappings, each with the keys of `AttentionConfig` and the options of
            the layer; or the name of a layer, short for `default_config(name)`.
        num_blocks: number of blocks of the trunk.
        path: position of the option, for messages.

    Returns:
        The checked mappings. Layers with an option `zero_init` start as the identity unless it is given.

    Raises:
        ConfigError: options are invalid; names all problems with their paths.

    Examples:
        >>> configs = read_attention([{"type": "GMSA", "every": 8}, {"type": "LCoA", "every": 4}], num_blocks=16)
        >>> [(config.type, config.sites(16)) for config in configs]
        [('GMSA', (7, 15)), ('LCoA', (3, 7, 11, 15))]
    """
    if attention is None:
        return ()
    if isinstance(attention, str):
        attention = default_config(attention)
    alone = isinstance(attention, Mapping)
    if not alone and not isinstance(attention, Sequence):
        message = f"must be a name, a mapping, a list of mappings or ~ (no attention), got {attention!r}"
        raise ConfigError.at(path, message)
    configs: list[AttentionConfig] = []
    problems = ProblemList()
    for index, item in enumerate([attention] if alone else cast(Sequence[object], attention)):
        with problems.gathered():
            configs.append(_read_config(item, num_blocks, path if alone else f"{path}.{index}"))
    problems.raise_if_any()
    return tuple(configs)


def full_options(attention: AttentionConfig, index: int | None = None) -> dict[str, Any]:
    """Return all options of a layer, with those that were not given; `index` is its number among those of its type.

    Examples:
        >>> (config,) = read_attention({"type": "LCoA", "every": 4, "num_clusters": 32}, num_blocks=16)
        >>> full_options(config)["num_clusters"], full_options(config)["reduction"]
        (32, 4)
    """
    entry = find_layer(attention.type)
    known = list(fields(entry.build).items())[1:]
    defaults = {name: option.default for name, option in known if option.default is not option.empty}
    if _shifts(entry):
        del defaults["shift"]
    options = attention.options if index is None else _shifted(entry, attention.options, index)
    return {**defaults, **options}


def default_config(name: str, *, shares: bool = True) -> dict[str, Any]:
    """Return the mapping for the name of a layer alone: after every 4th block, 4 sites sharing a state if possible.

    Examples:
        >>> default_config("LCoA")
        {'type': 'LCoA', 'every': 4, 'share': 4}
    """
    provides = name in LAYERS and getattr(LAYERS.get(name).build, "provides", None) is not None
    return {"type": name, "every": 4, "share": 4 if shares and provides else 1}


def _read_config(item: object, num_blocks: int, path: str) -> AttentionConfig:
    if not isinstance(item, Mapping):
        raise ConfigError.at(path, f"must be a mapping with a key 'type', got {item!r}")
    own = ["type", "every", "after", *([] if _shares_inside(item.get("type")) else ["share"])]
    problems = ProblemList()
    entry = None
    options: dict[str, Any] = {}
    values: dict[str, Any] = {}
    with problems.gathered():
        values = read(AttentionConfig, {name: value for name, value in item.items() if name in own}, path)
    if isinstance(item.get("type"), str):
        with problems.gathered():
            entry, options = _read_layer(item, path, own)
            if "zero_init" in fields(entry.build):
                options.setdefault("zero_init", True)
    if values.get("share", 1) > 1 and entry is not None and getattr(entry.build, "provides", None) is None:
        problems.add(
            join_path(path, "share"), f"must be 1, because {entry.name} has nothing to share, got {values['share']}"
        )
    if (item.get("every") is None) == (item.get("after") is None):
        got = "neither" if item.get("every") is None else "both"
        problems.add(path, f"must have one of 'every' and 'after', which place the attention, got {got}")
    problems.raise_if_any()
    result = AttentionConfig(**values, options=options, path=path)
    _check_sites(result, num_blocks, path)
    return result


def read_block(block: object, path: str = "block") -> Callable[[int, int], nn.Module] | None:
    """Read the option `block` of a network, which replaces each of its blocks by a layer.

    Args:
        block: `None`, or a mapping with the `type` and the options of a layer.
        path: position of the option, for messages.

    Returns:
        A function that builds the block for an index and a number of channels; `None` for the network's own blocks.

    Raises:
        ConfigError: options are invalid; names all problems with their paths.

    Examples:
        >>> build = read_block({"type": "ELAB", "window_sizes": [4, 8]})
        >>> build(0, 60)(torch.rand(1, 60, 16, 16)).shape  # block 0, 60 channels
        torch.Size([1, 60, 16, 16])
    """
    if block is None:
        return None
    if not isinstance(block, Mapping):
        raise ConfigError.at(
            path, f"must be a mapping with a key 'type' or ~ (the network's own blocks), got {block!r}"
        )
    entry, options = _read_layer(block, path, ["type"])
    return lambda index, embed_dim: build_numbered(entry, embed_dim, options, index, path)


def read_trunk(
    block: object, attention: object, num_sites: int
) -> tuple[Callable[[int, int], nn.Module] | None, tuple[AttentionConfig, ...]]:
    """Read the options `block` and `attention` of a network; see `read_block` and `read_attention`.

    Raises:
        ConfigError: options are invalid; names all problems of both.

    Examples:
        >>> build, configs = read_trunk(None, "LCoA", num_sites=16)
        >>> build is None, [config.sites(16) for config in configs]
        (True, [(3, 7, 11, 15)])
    """
    problems = ProblemList()
    build: Callable[[int, int], nn.Module] | None = None
    configs: tuple[AttentionConfig, ...] = ()
    with problems.gathered():
        build = read_block(block)
    with problems.gathered():
        configs = read_attention(attention, num_sites)
    problems.raise_if_any()
    return build, configs


def _shares_inside(name: object) -> bool:
    """Return whether `name` is a layer with an option `share` of its own."""
    return isinstance(name, str) and name in LAYERS and "share" in fields(LAYERS.get(name).build)


def _read_layer(item: Mapping[str, object], path: str, own: Sequence[str]) -> tuple[Entry[nn.Module], dict[str, Any]]:
    """Return the layer that a mapping names and its checked options, all keys except those in `own`.

    `shift: auto`, the default, is dropped; `build_numbered` then shifts every second layer.
    """
    name = item.get("type")
    if not isinstance(name, str):
        got = f"must be a string, got {name!r}" if "type" in item else "missing; it has no default"
        raise ConfigError.at(join_path(path, "type"), got)
    entry = _drop_in(name, join_path(path, "type"))
    rest = {key: value for key, value in item.items() if key not in own}
    if rest.get("shift") == "auto" and _shifts(entry):
        del rest["shift"]
    return entry, read(entry.build, rest, path, given=1, siblings=own)


def _shifted(entry: Entry[nn.Module], options: Mapping[str, Any], index: int) -> Mapping[str, Any]:
    """Return the options of the `index`-th layer of its type: every second one shifts by default."""
    return {"shift": index % 2 == 1, **options} if _shifts(entry) else options


def build_numbered(
    entry: Entry[nn.Module], embed_dim: int, options: Mapping[str, Any], index: int, path: str
) -> nn.Module:
    """Build the `index`-th layer of its type.

    Raises:
        ConfigError: options contradict each other or the width.
    """
    try:
        return build_layer(entry.name, embed_dim, **_shifted(entry, options, index))
    except ConfigError as error:
        raise error.under(path) from None


def _shifts(entry: Entry[nn.Module]) -> bool:
    """Return whether a layer has a boolean option `shift`."""
    return "shift" in fields(entry.build) and fields(entry.build)["shift"].annotation is bool


def _drop_in(name: str, path: str) -> Entry[nn.Module]:
    try:
        entry = find_layer(name)
    except UnknownNameError as error:
        raise ConfigError.at(path, str(error)) from None
    except ConfigError as error:
        raise error.under(path) from None
    if entry.kind != "layer":
        required = getattr(entry.build, "requires", None)
        drop_ins = [LAYERS.get(other) for other in LAYERS if LAYERS.get(other).kind == "layer"]
        names = [e.name for e in drop_ins if required is None or getattr(e.build, "provides", None) is required]
        at_sites = entry.kind == "consumer" and not path.endswith("block.type")
        hint = "with share: n, whose later sites use it" if at_sites else "instead"
        kind = f"an {entry.kind}" if entry.kind == "operator" else f"a {entry.kind}"
        message = f"must be a drop-in layer, got {name!r}, {kind}; use {' or '.join(names)} {hint}"
        raise ConfigError.at(path, message)
    return entry


def _check_sites(attention: AttentionConfig, num_blocks: int, path: str) -> None:
    """Raise ConfigError if a mapping selects no block, one that does not exist, or one twice."""
    sites = attention.sites(num_blocks)
    name = "every" if attention.after is None else "after"
    value = attention.every if attention.after is None else list(attention.after)
    rule = None
    if not sites:
        rule = f"must hit at least one of the {num_blocks} blocks"
    elif max(sites) >= num_blocks:
        rule = f"must be blocks from 0 to {num_blocks - 1}"
    elif len(set(sites)) < len(sites) or list(sites) != sorted(sites):
        rule = "must be in increasing order, each block once"
    if rule:
        raise ConfigError.at(join_path(path, name), f"{rule}, got {value}")
