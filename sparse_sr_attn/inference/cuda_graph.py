"""CUDA graphs: the kernels of a network for one image size, recorded once and launched together."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sparse_sr_attn.errors import BackendError, ShapeError

_WARM_UPS = 3  # runs before the recording, in which libraries and kernels set themselves up


def capture_cuda_graph(net: nn.Module, images: Tensor) -> Callable[[Tensor], Tensor]:
    """Capture `net` as a CUDA graph for inference on images of one size.

    A network launches hundreds of small kernels, and on small images the GPU waits for Python between them. A graph
    launches all of them at once. Its results are those of `net`, but it keeps the memory of all intermediate results.

    Args:
        net: a network in evaluation mode, on the GPU. Weights may later be changed in place, which affects the graph,
            but not moved or replaced.
        images: (b, c, h, w) on the GPU; only shape, dtype and device matter.

    Returns:
        A function of images of that shape, dtype and device, without gradient. It returns a new tensor.

    Raises:
        BackendError: `images` is not on a CUDA device, or `net` is in training mode (replays would update its state).
        ShapeError: (when called) shape, dtype or device differ from those of `images`.
        RuntimeError: (when called) a weight has been moved.

    Note:
        LCoA, CoA and the networks do not synchronise with the GPU in evaluation mode, as capturing requires. For tiles
        of one size, use `upscale_tiled(capture_cuda_graph(net, tile), image, ...)` with images no smaller than a tile.

    Examples:
        >>> net = create_model("LCoAN-light").cuda().eval()  # doctest: +SKIP
        >>> fast = capture_cuda_graph(net, torch.rand(1, 3, 64, 64, device="cuda"))  # doctest: +SKIP
        >>> fast(torch.rand(1, 3, 64, 64, device="cuda")).shape  # doctest: +SKIP
        torch.Size([1, 3, 128, 128])
    """
    if not images.is_cuda:
        raise BackendError(
            f"a CUDA graph needs a network and images on a CUDA device, got images on {images.device.type!r}; "
            "there, call the network itself"
        )
    if net.training:
        raise BackendError(
            "a CUDA graph records a network in evaluation mode, got one in training mode; call net.eval()"
        )
    weights = [*net.parameters(), *net.buffers()]
    held = [weight.detach() for weight in weights]  # what the graph reads lives as long as the graph
    source = images.detach().clone()
    with torch.cuda.device(images.device), torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                net(source)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = net(source)

    def replay(images: Tensor) -> Tensor:
        given, wanted = ((t.dtype, tuple(t.shape), str(t.device)) for t in (images, source))
        if given != wanted:
            raise ShapeError(f"this CUDA graph takes images of {wanted}, got {given}; capture one for them")
        if any(weight.data_ptr() != old.data_ptr() for weight, old in zip(weights, held, strict=True)):
            raise RuntimeError("weights have been moved since the CUDA graph was captured; capture another one")
        with torch.cuda.device(source.device), torch.no_grad():
            source.copy_(images)
            graph.replay()
            copy: Tensor = result.clone()
        return copy

    return replay
