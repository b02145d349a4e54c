"""The clauses on compilers, export and activation checkpointing."""

import copy
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sparse_sr_attn.testing.conformance.clause import clause
from sparse_sr_attn.testing.conformance.subject import CHANNELS, HEIGHT, WIDTH, Subject, feature_map
from sparse_sr_attn.testing.conformance.training import assert_same, history, train


@clause()
def check_compiled_is_eager(subject: Subject, device: torch.device) -> None:
    """One graph without a break; values, gradients and buffers over three steps, and evaluation at several sizes."""
    _check_compiled(subject, device, "aot_eager")


@clause()
def check_sizes_do_not_recompile(subject: Subject, device: torch.device) -> None:
    """One graph for the first size and one for all others that have at least three chunks."""
    from torch._dynamo.testing import CompileCounterWithBackend  # noqa: PLC0415  imports torch's compiler

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    chain = subject.chain().to(device).eval()
    compiled = torch.compile(chain, fullgraph=True, backend=counter)
    with torch.no_grad():
        for height, width in ((5, 7), (8, 6), (9, 11), (6, 6), (13, 4)):
            compiled(feature_map("x", height=height, width=width, device=device))
    assert counter.frame_count <= 2, f"{counter.frame_count} graphs for five sizes"


@clause(slow=True)
def check_compiled_by_inductor_is_eager(subject: Subject, device: torch.device) -> None:
    """The same with the default backend."""
    _check_compiled(subject, device, "inductor")


def _check_compiled(subject: Subject, device: torch.device, backend: str) -> None:
    torch._dynamo.reset()
    plain, chain = subject.chain().to(device), subject.chain().to(device)
    compiled = torch.compile(chain, fullgraph=True, backend=backend)
    assert_same(
        history(chain, compiled, device),
        history(plain, plain, device),
        tolerance=0.0 if backend == "aot_eager" else 1e-5,
    )
    # A batch of one, whose strides are ambiguous, and sizes of one.
    assert_same(
        history(chain, compiled, device, num_steps=1, batch=1),
        history(plain, plain, device, num_steps=1, batch=1),
        tolerance=1e-5,
    )
    plain.eval(), chain.eval()
    with torch.no_grad():
        for batch, height, width in ((2, 5, 7), (2, 8, 6), (2, 9, 11), (2, 1, 1), (1, 5, 7), (1, 2, 1)):
            x = feature_map("x", batch, height=height, width=width, device=device)
            torch.testing.assert_close(compiled(x), plain(x), rtol=1e-5, atol=1e-5)


@clause()
def check_export_with_dynamic_sizes(subject: Subject, device: torch.device) -> None:
    """torch.export at one size, run at others, smaller than a chunk and larger than several."""
    chain = subject.chain().to(device).eval()
    train(chain, device)
    chain.eval()
    dynamic = ({2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(chain, (feature_map("x", device=device),), dynamic_shapes=dynamic)
    exported = program.module()
    for height, width in ((HEIGHT, WIDTH), (WIDTH, HEIGHT), (2, 3), (4, 2), (13, 9), (6, 12)):
        x = feature_map("y", height=height, width=width, device=device)
        torch.testing.assert_close(exported(x), chain(x), rtol=1e-5, atol=1e-5)


@clause()
def check_checkpointed_is_plain(subject: Subject, device: torch.device) -> None:
    """`checkpoint(nn.Sequential(block, layer, block))` in training: output, gradients and buffers to the bit.

    With `use_reentrant=True`, too, which runs the forward without a graph first.
    """
    for reentrant in (False, True):
        plain, again = _body(subject, device), _body(subject, device)
        call = partial(checkpoint, again, use_reentrant=reentrant)
        assert_same(history(again, call, device), history(plain, plain, device))


@clause()
def check_checkpointed_and_compiled_is_plain(subject: Subject, device: torch.device) -> None:
    """Checkpointing inside the compiled graph, and a compiled module under eager checkpointing: to the bit."""
    _check_checkpointed_and_compiled(subject, device, "aot_eager")


@clause(slow=True)
def check_checkpointed_and_compiled_by_inductor_is_plain(subject: Subject, device: torch.device) -> None:
    """The same with the default backend, to its rounding."""
    _check_checkpointed_and_compiled(subject, device, "inductor")


def _check_checkpointed_and_compiled(subject: Subject, device: torch.device, backend: str) -> None:
    for inside in (True, False):
        torch._dynamo.reset()
        plain, again = _body(subject, device), _body(subject, device)
        compiled = partial(torch.compile, fullgraph=True, backend=backend)
        checkpointed = partial(checkpoint, again if inside else compiled(again), use_reentrant=False)
        call = compiled(checkpointed) if inside else checkpointed
        tolerance = 0.0 if backend == "aot_eager" else 1e-5
        assert_same(history(again, call, device), history(plain, plain, device), tolerance=tolerance)


def _body(subject: Subject, device: torch.device) -> nn.Sequential:
    """A user's body: a block, the layer, a block."""
    chain = subject.chain()
    with torch.no_grad():
        channels = copy.deepcopy(chain)(torch.zeros(1, CHANNELS, 2, 2)).shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        first = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.ReLU())
        last = nn.Sequential(nn.Conv2d(channels, CHANNELS, 3, padding=1), nn.ReLU())
    return nn.Sequential(first, chain, last).to(device).train()
