"""Networks built on the meta device and filled from a file, by torch and by accelerate."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sparse_sr_attn import EDSR, ELAN, LCoAN, load_model

ATTENTION = {"type": "LCoA", "every": 1, "share": 2, "num_clusters": 4, "chunk_size": 8}
SMALL: dict[str, Any] = {"num_feat": 10, "num_block": 2, "img_range": 1.0}
NETWORKS: dict[str, Any] = {
    "EDSR": lambda: EDSR(**SMALL),
    "EDSR with attention": lambda: EDSR(**SMALL, attention=ATTENTION),
    "LCoAN": lambda: LCoAN(num_feat=8, num_group=2, num_block=1, num_clusters=4, chunk_size=8),
    "LCoAN of two rounds": lambda: LCoAN(
        num_feat=8, num_group=2, num_block=1, num_clusters=4, chunk_size=8, num_rounds=2
    ),
    "ELAN": lambda: ELAN(num_feat=10, num_block=2, window_sizes=(2, 4)),
}
IMAGE = torch.rand(1, 3, 9, 11, generator=torch.Generator().manual_seed(0))


def trained(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    network: torch.nn.Module = NETWORKS[name]()
    network(IMAGE)
    return network.eval()


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_load_state_dict_assign(name: str) -> None:
    network = trained(name)
    with torch.device("meta"):
        empty = NETWORKS[name]()
        assert empty(IMAGE.to("meta")).shape == (1, 3, *(factor * empty.upscale for factor in (9, 11)))
    empty.load_state_dict(network.state_dict(), assign=True)
    assert torch.equal(empty.eval()(IMAGE), network(IMAGE))


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_weights_of_another_precision_are_put_in_place(name: str, tmp_path: Path) -> None:
    """By torch and by accelerate, which change weights only: the mean that an image of that precision meets follows."""
    import accelerate

    low = trained(name).half()
    save_file({key: value.contiguous() for key, value in low.state_dict().items()}, tmp_path / "weights.safetensors")
    with torch.device("meta"):
        empty, other = NETWORKS[name](), NETWORKS[name]()
    empty.load_state_dict(low.state_dict(), assign=True)
    other = accelerate.load_checkpoint_and_dispatch(
        other, str(tmp_path / "weights.safetensors"), device_map={"": "cpu"}, dtype=torch.float16
    )
    for network in (empty, other):
        assert torch.equal(network.eval()(IMAGE.half()), low(IMAGE.half()))


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_to_empty(name: str) -> None:
    """The weights come from the file, the mean and the options from the network, not from what the memory held."""
    torch.use_deterministic_algorithms(True)  # memory that is not filled holds NaN
    network = trained(name)
    empty = NETWORKS[name]().to("meta").to_empty(device="cpu")
    empty.load_state_dict(network.state_dict())
    assert torch.equal(empty.eval()(IMAGE), network(IMAGE))
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in empty.state_dict().items())


@torch.no_grad()
def test_options_in_memory_that_is_filled_by_a_file() -> None:
    """`load_state_dict` restores options that were overwritten."""
    network = NETWORKS["LCoAN"]()
    before = network.options.clone()
    network.options.fill_(7)
    network.load_state_dict(network.state_dict())
    assert torch.equal(network.options, before)


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_accelerate(name: str, tmp_path: Path) -> None:
    import accelerate

    network = trained(name)
    file = tmp_path / "weights.safetensors"
    save_file({key: value.contiguous() for key, value in network.state_dict().items()}, file)
    for build in (torch.device("meta"), accelerate.init_empty_weights()):
        with build:
            empty = NETWORKS[name]()
        loaded = accelerate.load_checkpoint_and_dispatch(empty, str(file), device_map={"": "cpu"})
        assert torch.equal(loaded.eval()(IMAGE), network(IMAGE))


@pytest.mark.parametrize("offload_buffers", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_accelerate_cpu_offload(name: str, offload_buffers: bool) -> None:
    """Weights, and buffers if asked, are on the meta device but while their module is called."""
    import accelerate

    network = trained(name)
    expected = network(IMAGE)
    offloaded = accelerate.cpu_offload(network, execution_device=torch.device("cpu"), offload_buffers=offload_buffers)
    assert any(parameter.is_meta for parameter in offloaded.parameters())
    torch.testing.assert_close(offloaded(IMAGE), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["EDSR with attention", "LCoAN", "ELAN"])
@torch.no_grad()
def test_averages_and_casts_keep_the_options(name: str, tmp_path: Path) -> None:
    """Whatever treats buffers like weights leaves the options readable."""
    network = trained(name)
    average = torch.optim.swa_utils.AveragedModel(
        network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999), use_buffers=True
    )
    for _ in range(3):
        average.update_parameters(network)
    for state in (average.module.state_dict(), network.half().state_dict(), network.bfloat16().state_dict()):
        torch.save(state, tmp_path / "weights.pth")
        assert type(load_model(tmp_path / "weights.pth")) is type(network)
