"""Short trainings of a layer, recorded and compared."""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from sparse_sr_attn.testing.conformance.subject import feature_map


def train(chain: nn.Module, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
    """Three training steps, so that buffers are no longer as they were built."""
    history(chain.train(), chain, device, dtype=dtype)


def history(
    module: nn.Module,
    call: Callable[[Tensor], Tensor],
    device: torch.device,
    *,
    num_steps: int = 3,
    batch: int = 2,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Train a few steps and return everything that could differ: outputs, gradients, buffers, parameters."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.02)
    record: dict[str, Tensor] = {}
    for step in range(num_steps):
        x = feature_map(f"step {step}", batch, dtype=dtype, device=device).requires_grad_()
        output = call(x)
        probe = feature_map("probe", batch, output.shape[1], dtype=dtype, device=device)
        optimizer.zero_grad()
        (output * probe).sum().backward()
        record.update({f"{step} {name}": tensor for name, tensor in everything(module, x, output)})
        optimizer.step()
    for name, parameter in module.named_parameters():
        record[f"trained {name}"] = parameter.detach().clone()
    return record


def everything(module: nn.Module, x: Tensor, output: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the output, the gradients and the buffers after a backward, by name."""
    yield "output", output.detach().clone()
    assert x.grad is not None
    yield "gradient of the input", x.grad.clone()
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            yield f"gradient of {name}", parameter.grad.clone()
    for name, buffer in module.named_buffers():
        yield f"buffer {name}", buffer.clone()


def rms(tensor: Tensor) -> float:
    """Return the root mean square of `tensor`, taken in float64."""
    return tensor.detach().double().square().mean().sqrt().item()


def assert_bit_equal(actual: Tensor, expected: Tensor) -> None:
    """Require the same dtype, shape and bits (NaN equals NaN)."""
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=0.0, equal_nan=True)


def assert_same(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, tolerance: float = 0.0) -> None:
    """Compare two histories; a tolerance is one of the largest number of a tensor, by which long sums round.

    For gradients it is that of all gradients of the step: some are 0 but for what is left of sums as long (those of a
    bias before batch normalisation).
    """
    assert actual.keys() == expected.keys()
    largest: dict[str, float] = {}
    for name, tensor in expected.items():
        largest[_kind(name)] = max(largest.get(_kind(name), 1.0), tensor.abs().max().item())
    for name, tensor in actual.items():
        torch.testing.assert_close(
            tensor,
            expected[name],
            rtol=tolerance,
            atol=tolerance * largest[_kind(name)],
            equal_nan=True,
            msg=lambda text, name=name: f"{name}: {text}",  # type: ignore[misc]
        )


def _kind(name: str) -> str:
    """Return what the numbers of an entry of a history are measured with: others of its kind, or only its own."""
    step, _, rest = name.partition(" gradient of ")
    return f"{step} gradient" if rest else name
