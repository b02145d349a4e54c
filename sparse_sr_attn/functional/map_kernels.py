"""Triton kernels for feature maps, each in place of several small ones of torch; this module needs triton."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["numel", "channels", "height", "width", "group"])
def shift(
    x,
    sign,
    output,
    numel,
    channels,
    height,
    width,
    group,
    STEP: tl.constexpr,
    RELU: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Shift four groups of channels by STEP pixels (-1 for the transpose): BLOCK elements of a map in memory order.

    If RELU, negative numbers become 0 before they are shifted; in the transpose, numbers become 0 after it where `sign`
    is not positive. If LAST, the channels of a pixel are adjacent in memory; otherwise, the pixels of a channel are.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < numel
    if LAST:
        channel, pixel, stride = at % channels, at // channels, channels
    else:
        channel, pixel, stride = at // (width * height) % channels, at, 1
    column, row = pixel % width, pixel // width % height
    turn = tl.where(channel < 4 * group, channel // tl.maximum(group, 1), 4)
    right = STEP * ((turn == 0).to(tl.int32) - (turn == 1).to(tl.int32))
    down = STEP * ((turn == 2).to(tl.int32) - (turn == 3).to(tl.int32))
    column, row = column + right, row + down
    mask_read = mask & (column >= 0) & (column < width) & (row >= 0) & (row < height)
    read = tl.load(x + at + (down * width + right) * stride, mask=mask_read, other=0.0)
    if RELU:
        negative = read < 0 if STEP > 0 else tl.load(sign + at, mask=mask, other=0.0) <= 0
        read = tl.where(negative, 0.0, read)
    tl.store(output + at, read, mask=mask)


@triton.jit(do_not_specialize=["count", "channels"])
def move_statistics(
    mean,
    inverse_std,
    running_mean,
    running_var,
    num_batches,
    count,
    channels,
    MOMENTUM: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Move the running statistics of batch normalisation by a batch of `count` values; one program, BLOCK channels.

    Nothing moves unless all results are finite.
    """
    channel = tl.arange(0, BLOCK)
    mask = channel < channels
    old_mean = tl.load(running_mean + channel, mask=mask, other=0.0)
    old_var = tl.load(running_var + channel, mask=mask, other=0.0)
    inverse = tl.load(inverse_std + channel, mask=mask, other=1.0)
    bessel = count.to(inverse.dtype) / (count - 1).to(inverse.dtype)
    eps = tl.full([BLOCK], EPS, inverse.dtype)  # a number by itself would be float32
    momentum = tl.full([BLOCK], MOMENTUM, old_mean.dtype)
    variance = (tl.maximum(1.0 / (inverse * inverse) - eps, 0.0) * bessel).to(old_var.dtype)
    batch_mean = tl.load(mean + channel, mask=mask, other=0.0).to(old_mean.dtype)
    new_mean = old_mean + momentum * (batch_mean - old_mean)
    new_var = old_var + momentum * (variance - old_var)
    wrong = ~((tl.abs(new_mean) < float("inf")) & (tl.abs(new_var) < float("inf")))
    if tl.max((wrong & mask).to(tl.int32), 0) == 0:
        tl.store(running_mean + channel, new_mean.to(old_mean.dtype), mask=mask)
        tl.store(running_var + channel, new_var.to(old_var.dtype), mask=mask)
        tl.store(num_batches, tl.load(num_batches) + 1)


@triton.jit(do_not_specialize=["width"])
def fold(
    weight,
    bias,
    mean,
    variance,
    scale,
    offset,
    folded_weight,
    folded_bias,
    width,
    EPS: tl.constexpr,
    WORK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Multiply a row of `width` weights by the factor of a normalisation, and compute its bias."""
    row = tl.program_id(0)
    eps = tl.full([], EPS, WORK)  # a number by itself would be float32
    factor = tl.load(scale + row).to(WORK) / tl.sqrt(tl.load(variance + row).to(WORK) + eps)
    difference = tl.load(bias + row).to(WORK) - tl.load(mean + row).to(WORK)
    tl.store(folded_bias + row, (difference * factor + tl.load(offset + row).to(WORK)).to(bias.dtype.element_ty))
    for begin in range(0, width, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        at, mask = row * width + column, column < width
        read = tl.load(weight + at, mask=mask, other=0.0).to(WORK)
        tl.store(folded_weight + at, (read * factor).to(weight.dtype.element_ty), mask=mask)


@triton.jit
def _rows(pointer, row, mask, width, BLOCK: tl.constexpr):
    """Return the addresses of rows of `width` columns, and a mask of the columns that exist."""
    column = tl.arange(0, BLOCK)
    return pointer + row[:, None] * width + column[None, :], mask[:, None] & (column < width)[None, :]


@triton.jit(do_not_specialize=["num_rows", "width"])
def normalize(
    rows, output, num_rows, width, FLOOR: tl.constexpr, WORK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Scale ROWS rows to unit length; lengths are clamped to at least FLOOR."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at, mask = _rows(rows, row, row < num_rows, width, BLOCK)
    x = tl.load(at, mask=mask, other=0.0).to(WORK)
    floor = tl.full([ROWS], FLOOR, WORK)  # a number by itself would be float32
    length = tl.maximum(tl.sqrt(tl.sum(x * x, 1)), floor)
    to, _ = _rows(output, row, row < num_rows, width, BLOCK)
    tl.store(to, x / length[:, None], mask=mask)


@triton.jit(do_not_specialize=["num_rows", "width"])
def normalize_backward(
    grad,
    rows,
    output,
    num_rows,
    width,
    FLOOR: tl.constexpr,
    WORK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute the gradient of ROWS rows from that of `normalize`; below FLOOR a length is a constant."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at, mask = _rows(rows, row, row < num_rows, width, BLOCK)
    x = tl.load(at, mask=mask, other=0.0).to(WORK)
    sent, _ = _rows(grad, row, row < num_rows, width, BLOCK)
    g = tl.load(sent, mask=mask, other=0.0).to(WORK)
    length = tl.sqrt(tl.sum(x * x, 1))
    floor = tl.full([ROWS], FLOOR, WORK)
    clamped = tl.maximum(length, floor)
    unit = x / clamped[:, None]
    along = tl.where(length < floor, 0.0, tl.sum(unit * g, 1))
    to, _ = _rows(output, row, row < num_rows, width, BLOCK)
    tl.store(to, ((g - along[:, None] * unit) / clamped[:, None]).to(output.dtype.element_ty), mask=mask)
