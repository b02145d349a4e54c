"""Under DataParallel evaluation is that of one device, and only the first part of a batch teaches, with a warning.

PyTorch makes replicas on GPUs only. They are made here as it makes them: what is not a parameter or a buffer is shared,
parameters are non-leaf copies, and buffers are copies on all devices but the first, where they are the module's own.
"""

import copy
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from sparse_sr_attn import EDSR, GMSA, LSP, CategoryAttention, CoA, LCoA
from sparse_sr_attn.layers import running_state as learners

pytestmark = pytest.mark.promise("R17")

ATTENTION = {"type": "LCoA", "every": 1, "share": 2, "num_clusters": 5, "chunk_size": 7, "zero_init": False}


def replicas(network: nn.Module, num: int) -> list[nn.Module]:
    made = []
    for rank in range(num):
        copies = {module: module._replicate_for_data_parallel() for module in network.modules()}
        for module, replica in copies.items():
            for name, child in module._modules.items():
                setattr(replica, name, copies[child])
            for name, parameter in module._parameters.items():
                setattr(replica, name, parameter if parameter is None else parameter.clone())
            for name, buffer in module._buffers.items():
                replica._buffers[name] = buffer if rank == 0 or buffer is None else buffer.clone()
        made.append(copies[network])
    return made


def data_parallel(network: nn.Module, x: Tensor, num: int = 2) -> Tensor:
    parts = x.chunk(num)
    return torch.cat([replica(part) for replica, part in zip(replicas(network, num), parts, strict=True)])


def built() -> EDSR:
    torch.manual_seed(0)
    return EDSR(num_feat=8, num_block=2, upscale=2, img_range=1.0, attention=ATTENTION)


def images(seed: int, batch: int = 4) -> Tensor:
    return torch.rand(batch, 3, 6, 7, generator=torch.Generator().manual_seed(seed))


def test_evaluation_is_that_of_one_device() -> None:
    network = built()
    network.train()(images(0))
    network.eval()
    torch.testing.assert_close(data_parallel(network, images(1)), network(images(1)), rtol=1e-5, atol=1e-6)


def test_gradients_reach_the_parameters() -> None:
    network = built().eval()
    data_parallel(network, images(1)).mean().backward()
    parts = {name: parameter.grad.clone() for name, parameter in network.named_parameters()}  # type: ignore[union-attr]
    network.zero_grad()
    network(images(1)).mean().backward()
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parts[name], parameter.grad, rtol=1e-4, atol=1e-7, msg=name)


def test_in_training_k_means_learns_from_the_first_part_of_a_batch() -> None:
    """As `docs/reliability.md` says: use DistributedDataParallel, which joins the parts."""
    network, first_part_only = built().train(), built().train()
    for step in range(4):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data_parallel(network, images(step))
        first_part_only(images(step)[:2])
    moved, expected = (next(m for m in n.modules() if isinstance(m, LSP)) for n in (network, first_part_only))
    assert int(moved.num_updates) == 3
    torch.testing.assert_close(moved.centroids, expected.centroids)
    whole = built().train()
    for step in range(4):
        whole(images(step))
    assert (next(m for m in whole.modules() if isinstance(m, LSP)).centroids - moved.centroids).abs().max() > 1e-3


@pytest.fixture
def unwarned() -> Iterator[None]:
    """As in a process that has not warned yet; and the next test finds it so, too."""
    learners._warn_of_replicas.cache_clear()
    yield
    learners._warn_of_replicas.cache_clear()


LEARNING: dict[str, Callable[[], nn.Module]] = {
    "LSP": lambda: LSP(8),
    "CategoryAttention": lambda: CategoryAttention(8, categories="kmeans"),
    "GMSA": lambda: GMSA(8, window_sizes=(2, 4)),
    "EDSR": built,
}
STILL: dict[str, Callable[[], nn.Module]] = {
    "in evaluation": lambda: built().eval(),
    "frozen k-means": lambda: LSP(8, ema_decay=1.0),
    "a hash": lambda: LSP(8, routing="lsh"),
    "learnt categories": lambda: CategoryAttention(8, categories="learnt"),
    "no state": lambda: CoA(8),
}


@pytest.mark.usefixtures("unwarned")
@pytest.mark.parametrize("build", LEARNING.values(), ids=LEARNING)
def test_what_is_lost_in_training_is_warned_of_once(build: Callable[[], nn.Module]) -> None:
    with pytest.warns(UserWarning, match="first device's part of each batch only; .*DistributedDataParallel joins"):
        replicas(build().train(), 2)
    replicas(build().train(), 2)  # a second warning would be an error


@pytest.mark.usefixtures("unwarned")
@pytest.mark.parametrize("build", STILL.values(), ids=STILL)
def test_where_nothing_is_lost_nothing_is_said(build: Callable[[], nn.Module]) -> None:
    replicas(build(), 2)


@pytest.mark.cuda
def test_on_two_gpus() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    layer = LCoA(8, num_clusters=5, chunk_size=7).cuda().eval()
    x = torch.rand(4, 8, 6, 7, device="cuda")
    torch.testing.assert_close(nn.DataParallel(copy.deepcopy(layer))(x), layer(x), rtol=1e-4, atol=1e-5)
