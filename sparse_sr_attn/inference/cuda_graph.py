"""CUDA graphs: a network's kernels for one size of image, recorded once and launched together."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sparse_sr_attn.errors import BackendError, ShapeError

_WARM_UPS = 3  # runs before the recording, in which libraries and kernels set themselves up


def capture_cuda_graph(net: nn.Module, images: Tensor) -> Callable[[Tensor], Tensor]:
    """Return `net` for inference on images of one size, as a CUDA graph.

    A network launches hundreds of small kernels; on small images a GPU waits for Python between them. A graph launches
    all of them at once. It computes what `net` computes, but holds the memory of all its intermediate results.

    Args:
        net: a network in evaluation mode, on the GPU. Its weights may be overwritten in place later, which the graph
            sees, but not moved or replaced.
        images: (b, c, h, w) on the GPU; only its shape, dtype and device matter.

    Returns:
        A function of images of that shape, dtype and device, without gradient. It returns memory of its own.

    Raises:
        BackendError: `images` is not on a CUDA device, or `net` is in training mode (each replay would move its state).
        ShapeError: (when called) the images are not as `images` was.
        RuntimeError: (when called) a weight is no longer where it was.

    Note:
        LCoA, CoA and the networks never wait for the GPU in evaluation mode, which capturing requires. Tiles of one
        size are a use of it: `upscale_tiled(capture(net, tile), image, ...)` for images no smaller than a tile.

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
