"""The paper's ablations are plain options: each changes what it says, and nothing else."""

from typing import Any

import pytest
import torch

from sparse_sr_attn import CoA, ConfigError, LCoA, LCoAN

SMALL: dict[str, Any] = {"num_clusters": 6, "chunk_size": 7, "reduction": 2, "res_scale": 1.0}


def features(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 8, 6, 5, generator=torch.Generator().manual_seed(seed))


def layer(**options: Any) -> LCoA:
    torch.manual_seed(0)
    return LCoA(8, **{**SMALL, **options})


@pytest.mark.parametrize("num_rounds", [1, 3])
def test_a_hash_never_learns(num_rounds: int) -> None:
    hashed = layer(routing="lsh", num_rounds=num_rounds).train()
    before = {name: buffer.clone() for name, buffer in hashed.named_buffers()}
    for seed in range(3):
        hashed(features(seed))
    assert all(torch.equal(buffer, before[name]) for name, buffer in hashed.named_buffers())


def test_every_round_has_a_hash_of_its_own() -> None:
    hashed = layer(routing="lsh", num_rounds=3)
    directions = [hashed.lsp.centroids, *(module.centroids for module in hashed.lsp.further_rounds)]
    assert not any(torch.equal(directions[i], directions[j]) for i in range(3) for j in range(i))


def test_every_round_learns_its_own_clusters() -> None:
    rounds = layer(num_rounds=3).train()
    for seed in range(3):
        rounds(features(seed))
    centroids = [rounds.lsp.centroids, *(module.centroids for module in rounds.lsp.further_rounds)]
    assert all(module.num_updates == 2 for module in (rounds.lsp, *rounds.lsp.further_rounds))
    assert not any(torch.equal(centroids[i], centroids[j]) for i in range(3) for j in range(i))


@pytest.mark.parametrize("options", [{"num_rounds": 3}, {"routing": "lsh", "num_rounds": 2}], ids=str)
def test_sharing_is_the_same_with_rounds(options: dict[str, Any]) -> None:
    """Alone and through its state a layer does the same, and a consumer with its value convolution too."""
    first = layer(**options).eval()
    later = CoA(8, res_scale=1.0)
    later.load_state_dict(first.coa.state_dict())
    x = features()
    shared = first.attend(x)
    assert shared.weights.shape[0] == 2 * options["num_rounds"]
    torch.testing.assert_close(first(x, shared), first(x))
    torch.testing.assert_close(later(x, shared), first(x))


def test_the_published_counting_needs_a_ring() -> None:
    rule = r"neighbors: must be 'ring' with count_keys_once=False, because that counting needs a ring, got 'nearest'"
    for build in (layer, lambda **options: LCoAN(num_feat=8, num_group=1, num_block=1, **options)):
        with pytest.raises(ConfigError, match=rule):
            build(neighbors="nearest", count_keys_once=False)
