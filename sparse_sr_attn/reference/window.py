"""Window attention by loops over windows and pixels, and as dense attention with a mask of visible pairs."""

import torch
from torch import Tensor

from sparse_sr_attn.reference.cluster import dense_attention

Pixel = tuple[int, int]
"""Row and column."""


def whole(length: int, window_size: int) -> int:
    """Return `length` rounded up to whole windows."""
    return (length + window_size - 1) // window_size * window_size


def windows_of(height: int, width: int, window_size: int, shift: int = 0) -> list[list[Pixel | None]]:
    """List the pixels of each window, windows and pixels in raster order; None for padding.

    The windows cover the map padded to whole windows. They begin `shift` rows and columns further on and wrap around
    its borders.
    """
    padded_height, padded_width = whole(height, window_size), whole(width, window_size)
    windows: list[list[Pixel | None]] = []
    for top in range(0, padded_height, window_size):
        for left in range(0, padded_width, window_size):
            window: list[Pixel | None] = []
            for row in range(top, top + window_size):
                for column in range(left, left + window_size):
                    y, x = (row + shift) % padded_height, (column + shift) % padded_width
                    window.append((y, x) if y < height and x < width else None)
            windows.append(window)
    return windows


def partition(x: Tensor, window_size: int, shift: int = 0) -> Tensor:
    """Cut a map into windows `(b, k, i, c)`, one pixel at a time; zero for padding."""
    pad = torch.zeros_like(x[:, :, 0, 0])
    windows = [
        torch.stack([pad if pixel is None else x[:, :, pixel[0], pixel[1]] for pixel in window], dim=1)
        for window in windows_of(x.shape[2], x.shape[3], window_size, shift)
    ]
    return torch.stack(windows, dim=1)


def merge(windows: Tensor, height: int, width: int, window_size: int, shift: int = 0) -> Tensor:
    """Look up each pixel of a map in its window."""
    padded_height, padded_width = whole(height, window_size), whole(width, window_size)
    pixels = []
    for row in range(height):
        for column in range(width):
            y, x = (row - shift) % padded_height, (column - shift) % padded_width
            window = y // window_size * (padded_width // window_size) + x // window_size
            pixels.append(windows[:, window, y % window_size * window_size + x % window_size])
    return torch.stack(pixels, dim=-1).reshape(windows.shape[0], windows.shape[3], height, width)


def window_weights(query: Tensor, key: Tensor, *, window_size: int, shift: int = 0, scale: float = 1.0) -> Tensor:
    """Softmax weights by windows, one query at a time: `(b, k, i, i)` for window, pixel, pixel seen.

    Padding has weight 0, and so have its own rows.
    """
    windows = windows_of(query.shape[2], query.shape[3], window_size, shift)
    rows = []
    for b in range(query.shape[0]):
        for window in windows:
            places = [place for place, pixel in enumerate(window) if pixel is not None]
            keys = torch.stack([key[b, :, pixel[0], pixel[1]] for pixel in window if pixel is not None])
            for pixel in window:
                row = query.new_zeros(len(window))
                if pixel is not None:
                    scores = scale * (keys * query[b, :, pixel[0], pixel[1]]).sum(dim=-1)
                    powers = torch.exp(scores - scores.detach().max())
                    row = row.index_add(0, torch.tensor(places, device=row.device), powers / powers.sum())
                rows.append(row)
    return torch.stack(rows).reshape(query.shape[0], len(windows), window_size**2, window_size**2)


def apply_window_weights(
    weights: Tensor, value: Tensor, *, window_size: int, shift: int = 0, unshift: int | None = None
) -> Tensor:
    """Weighted sum of values, one query at a time; zero for pixels that come from padding.

    Results are shifted back by `unshift` rows and columns, by default `shift`.
    """
    batch, _, height, width = value.shape
    padded_height, padded_width = whole(height, window_size), whole(width, window_size)
    unshift = shift if unshift is None else unshift
    samples = []
    for b in range(batch):
        results = [torch.zeros_like(value[b, :, 0, 0])] * (height * width)
        for number, window in enumerate(windows_of(height, width, window_size, shift)):
            top, left = divmod(number, padded_width // window_size)
            places = [place for place, pixel in enumerate(window) if pixel is not None]
            values = torch.stack([value[b, :, pixel[0], pixel[1]] for pixel in window if pixel is not None])
            rows = weights[b, number][:, places]
            for place in places:
                y = (top * window_size + place // window_size + unshift) % padded_height
                x = (left * window_size + place % window_size + unshift) % padded_width
                if y < height and x < width:
                    results[y * width + x] = (rows[place, :, None] * values).sum(dim=0)
        samples.append(torch.stack(results, dim=-1).reshape(-1, height, width))
    return torch.stack(samples)


def visible_pairs(height: int, width: int, window_size: int, shift: int = 0) -> Tensor:
    """Return whether pixel l sees pixel m, `(h * w, h * w)` in raster order.

    Two pixels see each other if their rows and columns, counted cyclically from the start of the windows, are in the
    same window.
    """
    rows, columns = (
        (torch.arange(length) - shift) % whole(length, window_size) // window_size for length in (height, width)
    )
    same_rows, same_columns = rows[:, None] == rows, columns[:, None] == columns
    table = same_rows[:, None, :, None] & same_columns[None, :, None, :]
    return table.reshape(height * width, height * width)


def sources(height: int, width: int, window_size: int, shift: int, unshift: int) -> Tensor:
    """Return the index of the pixel whose row ends up at each pixel, `(h * w,)`, -1 for padding.

    With `unshift` equal to `shift`, it is the pixel itself.
    """
    rows, columns = (
        (torch.arange(length) - unshift + shift) % whole(length, window_size) for length in (height, width)
    )
    real = (rows < height)[:, None] & (columns < width)
    return torch.where(real, rows[:, None] * width + columns, -1).flatten()


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window_size: int,
    shift: int = 0,
    unshift: int | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Window attention as dense attention with a mask of visible pairs; zero for pixels that come from padding."""
    batch, _, height, width = query.shape
    table = visible_pairs(height, width, window_size, shift).expand(batch, -1, -1).to(query.device)
    queries, keys, values = (x.flatten(2).mT for x in (query, key, value))
    rows = dense_attention(queries, keys, values, table, scale=scale)
    source = sources(height, width, window_size, shift, shift if unshift is None else unshift).to(query.device)
    moved = rows[:, source.clamp(min=0)] * (source >= 0)[:, None]
    return moved.mT.reshape(batch, -1, height, width)
