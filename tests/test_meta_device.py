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
def test_to_empty(name: str) -> None:
    network = trained(name)
    empty = NETWORKS[name]().to("meta").to_empty(device="cpu")
    empty.load_state_dict(network.state_dict())
    assert torch.equal(empty.eval()(IMAGE), network(IMAGE))


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


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_accelerate_cpu_offload(name: str) -> None:
    """Weights are on the meta device but while their module is called."""
    import accelerate

    network = trained(name)
    expected = network(IMAGE)
    offloaded = accelerate.cpu_offload(network, execution_device=torch.device("cpu"))
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
