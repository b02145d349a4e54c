"""Triton kernels for feature maps, each in place of several small ones of torch; this module needs triton."""

import triton
import triton.language as tl

# Sizes that change from image to image. Kernels are not specialised to their divisibility by 16.
_of_maps = triton.jit(do_not_specialize=["num_pixels", "height", "width"])


@triton.jit
def _place(pixel, channel, channels, area, LAST: tl.constexpr):
    """Return where channels (a row) of pixels (a column) are in a map, in channels-last memory or not."""
    if LAST:
        return pixel * channels + channel
    return (pixel // area * channels + channel) * area + pixel % area


@triton.jit
def _read(pointer, pixel, channel, num_pixels, channels, area, LAST: tl.constexpr):
    """Load some channels of some pixels of a map; masked elements are 0."""
    mask = (pixel < num_pixels)[:, None] & (channel < channels)[None, :]
    return tl.load(pointer + _place(pixel[:, None], channel[None, :], channels, area, LAST), mask=mask, other=0.0)


@triton.jit
def _sources(pixel, channel, channels, height, width):
    """Return the pixels that the shift reads each channel from, wrapped around the map, and a mask of those inside."""
    group = channels // 5
    turn = tl.where(channel < 4 * group, channel // tl.maximum(group, 1), 4)[None, :]
    column = (pixel % width)[:, None] + (turn == 0).to(tl.int32) - (turn == 1).to(tl.int32)
    row = (pixel // width % height)[:, None] + (turn == 2).to(tl.int32) - (turn == 3).to(tl.int32)
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    column, row = (column + width) % width, (row + height) % height
    return (pixel // (height * width))[:, None] * height * width + row * width + column, inside


@triton.jit
def _shifted(x, pixel, channel, num_pixels, channels, height, width, RELU: tl.constexpr, LAST: tl.constexpr):
    """Return the shifted channels of pixels, after the ReLU if there is one."""
    source, inside = _sources(pixel, channel, channels, height, width)
    mask = inside & (pixel < num_pixels)[:, None] & (channel < channels)[None, :]
    at = _place(source, channel[None, :], channels, height * width, LAST)
    read = tl.load(x + at, mask=mask, other=0.0)
    if RELU:
        read = tl.where(read < 0, 0.0, read)
    return read


@_of_maps
def shift_conv(
    x,
    weight,
    bias,
    output,
    num_pixels,
    height,
    width,
    channels,
    features,
    RELU: tl.constexpr,
    LAST: tl.constexpr,
    WORK: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """Compute FEATURES channels of the shift convolution at PIXELS pixels, reading CHANNELS channels at a time."""
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    feature = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    acc = tl.zeros([PIXELS, FEATURES], WORK)
    for begin in range(0, channels, CHANNELS):
        channel = begin + tl.arange(0, CHANNELS)
        read = _shifted(x, pixel, channel, num_pixels, channels, height, width, RELU, LAST)
        mask = (channel < channels)[:, None] & (feature < features)[None, :]
        w = tl.load(weight + feature[None, :] * channels + channel[:, None], mask=mask, other=0.0)
        acc += tl.dot(read.to(DOT), w.to(DOT), out_dtype=WORK, input_precision=PRECISION)
    acc += tl.load(bias + feature, mask=feature < features, other=0.0).to(WORK)[None, :]
    at = _place(pixel[:, None], feature[None, :], features, height * width, LAST)
    mask = (pixel < num_pixels)[:, None] & (feature < features)[None, :]
    tl.store(output + at, acc.to(output.dtype.element_ty), mask=mask)


@_of_maps
def shift_conv_input(
    grad,
    x,
    weight,
    output,
    num_pixels,
    height,
    width,
    channels,
    features,
    RELU: tl.constexpr,
    LAST: tl.constexpr,
    WORK: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """Compute the gradient of CHANNELS channels of the input, written where PIXELS pixels read them.

    Reading wraps around the map, so that each pixel is written once; what comes from outside is 0.
    """
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    acc = tl.zeros([PIXELS, CHANNELS], WORK)
    for begin in range(0, features, FEATURES):
        feature = begin + tl.arange(0, FEATURES)
        mask = (pixel < num_pixels)[:, None] & (feature < features)[None, :]
        g = tl.load(
            grad + _place(pixel[:, None], feature[None, :], features, height * width, LAST), mask=mask, other=0.0
        )
        mask = (feature < features)[:, None] & (channel < channels)[None, :]
        w = tl.load(weight + feature[:, None] * channels + channel[None, :], mask=mask, other=0.0)
        acc += tl.dot(g.to(DOT), w.to(DOT), out_dtype=WORK, input_precision=PRECISION)
    source, inside = _sources(pixel, channel, channels, height, width)
    at = _place(source, channel[None, :], channels, height * width, LAST)
    mask = (pixel < num_pixels)[:, None] & (channel < channels)[None, :]
    if RELU:
        inside = inside & (tl.load(x + at, mask=mask, other=0.0) > 0)
    tl.store(output + at, tl.where(inside, acc, 0.0).to(output.dtype.element_ty), mask=mask)


@_of_maps
def shift_conv_weight(
    grad,
    x,
    partial,
    num_pixels,
    height,
    width,
    channels,
    features,
    share,
    RELU: tl.constexpr,
    LAST: tl.constexpr,
    WORK: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """Compute a part of the gradients of weight and bias, of `share` pixels; the parts are summed afterwards."""
    part = tl.program_id(0)
    feature = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    acc = tl.zeros([FEATURES, CHANNELS], WORK)
    total = tl.zeros([FEATURES], WORK)
    for begin in range(0, share, PIXELS):
        pixel = part.to(tl.int64) * share + begin + tl.arange(0, PIXELS)
        mask = (pixel < num_pixels)[:, None] & (feature < features)[None, :]
        g = tl.load(
            grad + _place(pixel[:, None], feature[None, :], features, height * width, LAST), mask=mask, other=0.0
        )
        read = _shifted(x, pixel, channel, num_pixels, channels, height, width, RELU, LAST)
        acc += tl.dot(tl.trans(g).to(DOT), read.to(DOT), out_dtype=WORK, input_precision=PRECISION)
        total += tl.sum(g.to(WORK), 0)
    own = partial + part.to(tl.int64) * (features * channels + features)
    mask = (feature < features)[:, None] & (channel < channels)[None, :]
    tl.store(own + feature[:, None] * channels + channel[None, :], acc, mask=mask)
    if tl.program_id(2) == 0:
        tl.store(own + features * channels + feature, total, mask=feature < features)


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
def _of_rows(
    pointer, num_tokens, width, sample_stride, row_stride, column_stride, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Return the addresses of the rows of a program, ROWS of a sample, and a mask of the numbers that exist."""
    blocks = tl.cdiv(num_tokens, ROWS)
    row = (tl.program_id(0) % blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    at = (tl.program_id(0) // blocks).to(tl.int64) * sample_stride + row[:, None] * row_stride
    return pointer + at + column[None, :] * column_stride, (row < num_tokens)[:, None] & (column < width)[None, :]


@triton.jit
def _length(logit_scale, MOST: tl.constexpr, SCALED: tl.constexpr, WORK: tl.constexpr):
    """Return the length that rows are scaled to, and whether it is below the limit."""
    if SCALED:
        logit, most = tl.load(logit_scale).to(WORK), tl.full([], MOST, WORK)  # a number by itself would be float32
        return tl.exp(tl.where(logit > most, most, logit)), logit <= most
    return tl.full([], 1.0, WORK), True


@triton.jit(do_not_specialize=["num_tokens", "width"])
def normalize(
    rows,
    logit_scale,
    output,
    num_tokens,
    width,
    sample_stride,
    row_stride,
    column_stride,
    FLOOR: tl.constexpr,
    MOST: tl.constexpr,
    SCALED: tl.constexpr,
    WORK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Scale ROWS rows to unit length or, if SCALED, to that of `logit_scale`; lengths are clamped to at least FLOOR."""
    at, mask = _of_rows(rows, num_tokens, width, sample_stride, row_stride, column_stride, ROWS, BLOCK)
    x = tl.load(at, mask=mask, other=0.0).to(WORK)
    clamped = tl.maximum(tl.sqrt(tl.sum(x * x, 1)), tl.full([ROWS], FLOOR, WORK))
    scale, _ = _length(logit_scale, MOST, SCALED, WORK)
    to, _ = _of_rows(output, num_tokens, width, num_tokens.to(tl.int64) * width, width, 1, ROWS, BLOCK)
    tl.store(to, scale * (x / clamped[:, None]), mask=mask)


@triton.jit(do_not_specialize=["num_tokens", "width"])
def normalize_backward(
    grad,
    rows,
    logit_scale,
    output,
    parts,
    num_tokens,
    width,
    grad_sample_stride,
    grad_row_stride,
    grad_column_stride,
    sample_stride,
    row_stride,
    column_stride,
    output_sample_stride,
    output_row_stride,
    output_column_stride,
    FLOOR: tl.constexpr,
    MOST: tl.constexpr,
    SCALED: tl.constexpr,
    WORK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute the gradient of ROWS rows from that of `normalize`; below FLOOR a length is a constant.

    If SCALED, also a part of the gradient of `logit_scale`; the parts are summed afterwards.
    """
    at, mask = _of_rows(rows, num_tokens, width, sample_stride, row_stride, column_stride, ROWS, BLOCK)
    x = tl.load(at, mask=mask, other=0.0).to(WORK)
    sent, _ = _of_rows(grad, num_tokens, width, grad_sample_stride, grad_row_stride, grad_column_stride, ROWS, BLOCK)
    scale, moves = _length(logit_scale, MOST, SCALED, WORK)
    g = scale * tl.load(sent, mask=mask, other=0.0).to(WORK)
    length = tl.sqrt(tl.sum(x * x, 1))
    floor = tl.full([ROWS], FLOOR, WORK)
    clamped = tl.maximum(length, floor)
    unit = x / clamped[:, None]
    along = tl.sum(unit * g, 1)
    if SCALED:
        tl.store(parts + tl.program_id(0), tl.where(moves, tl.sum(along, 0), 0.0))
    along = tl.where(length < floor, 0.0, along)
    to, _ = _of_rows(
        output, num_tokens, width, output_sample_stride, output_row_stride, output_column_stride, ROWS, BLOCK
    )
    tl.store(to, ((g - along[:, None] * unit) / clamped[:, None]).to(output.dtype.element_ty), mask=mask)
