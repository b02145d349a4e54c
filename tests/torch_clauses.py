"""What PyTorch's own tools do with our layers: hooks, replaced parts, reparametrisation, function transforms, tracing.

More clauses of the contract, for layers with operators of their own; a plain module keeps them by itself. Importing
this module adds them to `CLAUSES`.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from sparse_sr_attn.testing.conformance import Chain, Subject, feature_map
from sparse_sr_attn.testing.conformance.clause import clause
from sparse_sr_attn.testing.conformance.training import rms


@clause()
def check_every_part_is_called(subject: Subject, device: torch.device) -> None:
    """Hooks on each submodule with parameters of its own run in a forward, and what they return counts."""
    for training in (True, False):
        chain = subject.chain().to(device).train(training)
        x = feature_map("x", device=device)
        plain = chain(x)
        for name, module in _parts(chain.layer):
            handle = module.register_forward_hook(lambda *args: args[-1] * 2 + 1)
            hooked = chain(x)
            handle.remove()
            assert not torch.equal(hooked, plain), f"{name} is not called when {training=}; its hooks are passed over"


@clause()
def check_parts_can_be_replaced(subject: Subject, device: torch.device) -> None:
    """Convolutions and linear layers are only called, because quantisation, offloading and fusion replace them."""
    for training in (True, False):
        chain = subject.chain().to(device).train(training)
        x = feature_map("x", device=device)
        expected = chain(x)
        replaced = subject.chain().to(device).train(training)
        for path, part in list(replaced.named_modules()):
            if isinstance(part, (nn.Conv2d, nn.Linear)):
                owner, _, name = path.rpartition(".")
                setattr(replaced.get_submodule(owner), name, _ReplacedPart(part))
        torch.testing.assert_close(replaced(x), expected, rtol=1e-5, atol=1e-6)


@clause()
def check_compiled_with_other_forwards(subject: Subject, device: torch.device) -> None:
    """Compilers see hooks on all modules at once, and forwards that were replaced, of every part with parameters."""
    x = feature_map("x", device=device)
    with torch.no_grad():
        for watch in (_replace_forwards, _hook_all):
            chain = subject.chain().to(device).eval()
            undo = watch(chain)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of what torch itself does
                    expected, found = chain(x), torch.compile(chain, backend="eager")(x)
            finally:
                undo()
                torch.compiler.reset()
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


class _ReplacedPart(nn.Module):
    """A module that behaves like another and has none of its attributes."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.call = module.__call__

    def forward(self, *args: Tensor) -> Tensor:
        """Return the output of the other module."""
        return self.call(*args)


def _doubled(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args: 2 * forward(*args) + 1


def _replace_forwards(chain: Chain) -> Callable[[], None]:
    for _, part in _parts(chain.layer):
        part.forward = _doubled(part.forward)
    return lambda: None


def _hook_all(chain: Chain) -> Callable[[], None]:
    parts = {part for _, part in _parts(chain.layer)}
    handle = register_module_forward_hook(lambda module, _, output: 2 * output + 1 if module in parts else None)
    return handle.remove


@clause()
def check_reparametrised_weights_learn(subject: Subject, device: torch.device) -> None:
    """Weight and spectral normalisation (old and new), and pruning: they train, and the result is that of the weights.

    After training, a layer whose reparametrisation is folded into its weights gives the same output.
    """
    for name, (wrap, unwrap) in _reparametrisations().items():
        chain = subject.chain().double().to(device).train()
        parts = [module for _, module in _parts(chain.layer) if getattr(module, "weight", torch.empty(0)).ndim > 1]
        for module in parts:
            wrap(module)
        optimizer = torch.optim.SGD(chain.parameters(), lr=0.1)
        for step in range(3):
            output = chain(feature_map(f"x{step}", dtype=torch.float64, device=device))
            optimizer.zero_grad()
            probe = feature_map("probe", channels=output.shape[1], dtype=torch.float64, device=device)
            (output * probe).sum().backward()
            optimizer.step()
        for path, parameter in chain.layer.named_parameters():
            assert parameter.grad is not None, f"{name}: {path} gets no gradient"
            # A bias may have none by nature, before a softmax say.
            assert parameter.grad.any() or path.endswith("bias"), f"{name}: the gradient of {path} is zero"
        x = feature_map("x", dtype=torch.float64, device=device)
        wrapped = chain.eval()(x)
        for module in parts:
            unwrap(module)
        torch.testing.assert_close(chain(x), wrapped, rtol=1e-9, atol=1e-9)


def _parts(layer: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the submodules, the layer among them, that have parameters of their own."""
    return [(path, part) for path, part in layer.named_modules() if any(True for _ in part.parameters(recurse=False))]


def _reparametrisations() -> dict[str, tuple[Callable[[nn.Module], object], Callable[[nn.Module], object]]]:
    """Return ways to reparametrise the weight of a module, each with the way to fold it into the weight."""
    from torch.nn.utils import parametrizations, parametrize, prune

    def old_weight_norm(module: nn.Module) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            nn.utils.weight_norm(module)

    def fold(module: nn.Module) -> None:
        parametrize.remove_parametrizations(module, "weight")

    return {
        "torch.nn.utils.weight_norm": (old_weight_norm, nn.utils.remove_weight_norm),
        "parametrizations.weight_norm": (parametrizations.weight_norm, fold),
        "torch.nn.utils.spectral_norm": (nn.utils.spectral_norm, nn.utils.remove_spectral_norm),
        "parametrizations.spectral_norm": (parametrizations.spectral_norm, fold),
        "prune": (
            lambda module: prune.l1_unstructured(module, "weight", 0.25),
            lambda module: prune.remove(module, "weight"),
        ),
    }


@clause()
def check_transforms(subject: Subject, device: torch.device) -> None:
    """`torch.func.grad`, `jacrev`, `jacfwd` (hence `jvp`), `hessian` and `vmap` give what backwards and calls give."""
    chain = subject.chain().double().to(device).eval()
    x = feature_map("x", batch=1, height=2, width=3, dtype=torch.float64, device=device)
    probe = feature_map("probe", batch=1, channels=chain(x).shape[1], height=2, width=3, dtype=x.dtype, device=device)

    def loss(x: Tensor) -> Tensor:
        return (chain(x) * probe).square().sum()

    def gradient(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(loss(x), x)[0]

    torch.testing.assert_close(torch.func.grad(loss)(x), gradient(x), rtol=1e-9, atol=1e-9)
    jacobian = torch.func.jacrev(chain)(x)
    torch.testing.assert_close(torch.einsum("bchwBCHW,bchw->BCHW", jacobian, 2 * chain(x) * probe**2), gradient(x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch's own use of TorchScript
        torch.testing.assert_close(torch.func.jacfwd(chain)(x), jacobian)
        curvature = torch.einsum("bchwBCHW,BCHW->bchw", torch.func.hessian(loss)(x), probe)
    step = 1e-6
    expected = (gradient(x + step * probe) - gradient(x - step * probe)) / (2 * step)
    torch.testing.assert_close(curvature, expected, rtol=1e-4, atol=1e-5)
    images = torch.stack([x, -x])
    for learns in (True, False):
        with torch.set_grad_enabled(learns):
            torch.testing.assert_close(torch.func.vmap(chain)(images), torch.stack([chain(image) for image in images]))


@clause()
def check_compiled_forward_mode(subject: Subject, device: torch.device) -> None:
    """`torch.func.jvp` of a compiled module, and compiled itself, gives all of the derivative."""
    chain = subject.chain().to(device).eval()
    x, direction = (feature_map(name, device=device) for name in ("x", "direction"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what torch itself does
        expected = torch.func.jvp(chain, (x,), (direction,))[1]
        compiled = torch.compile(chain, backend="eager")
        compiled(x)  # what was compiled before must not be used
        inside = torch.compile(lambda x, direction: torch.func.jvp(chain, (x,), (direction,))[1], backend="eager")
        for derivative in (torch.func.jvp(compiled, (x,), (direction,))[1], inside(x, direction)):
            torch.testing.assert_close(derivative, expected, rtol=1e-4, atol=1e-5)
    torch.compiler.reset()


@clause()
def check_traced(subject: Subject, device: torch.device) -> None:
    """`torch.jit.trace` records a program that gives the same for other images of that size."""
    chain = subject.chain().to(device).eval()
    x = feature_map("x", device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of constants in the trace, and that TorchScript is deprecated
        traced = torch.jit.trace(chain, x, check_trace=False)
    for name in ("x", "y"):
        image = feature_map(name, device=device)
        torch.testing.assert_close(traced(image), chain(image), rtol=1e-5, atol=1e-6)


@clause(lambda subject: subject.shared)
def check_the_fused_path_scores_in_float32_too(subject: Subject, device: torch.device) -> None:
    """For half inputs the layer alone agrees with its own float32 weights to the rounding of the values."""
    for dtype in (torch.bfloat16, torch.float16):
        chain = subject.chain(res_scale=1.0).to(device, dtype).eval()
        x = 30 * feature_map("x", dtype=dtype, device=device)
        stored, fused = chain(x), chain.layer(x)
        assert rms(fused.double() - stored.double()) <= torch.finfo(dtype).eps * rms(stored)
