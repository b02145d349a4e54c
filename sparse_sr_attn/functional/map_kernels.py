"""Triton kernels for feature maps, each in place of several small ones of torch; this module needs triton."""

import triton
import triton.language as tl

# Sizes that change from image to image. Kernels are not specialised to their divisibility by 16.
of_maps = triton.jit(do_not_specialize=["num_pixels", "height", "width", "num_programs"])


@triton.jit
def place(pixel, channel, channels, area, LAST: tl.constexpr):
    """Return where channels (a row) of pixels (a column) are in a map, in channels-last memory or not."""
    if LAST:
        return pixel * channels + channel
    return (pixel // area * channels + channel) * area + pixel % area


@triton.jit
def read_map(pointer, pixel, channel, num_pixels, channels, area, LAST: tl.constexpr):
    """Load some channels of some pixels of a map; masked elements are 0."""
    mask = (pixel < num_pixels)[:, None] & (channel < channels)[None, :]
    return tl.load(pointer + place(pixel[:, None], channel[None, :], channels, area, LAST), mask=mask, other=0.0)


@triton.jit
def write_map(pointer, values, pixel, channel, num_pixels, channels, area, LAST: tl.constexpr):
    """Store some channels of some pixels of a map, in its dtype."""
    mask = (pixel < num_pixels)[:, None] & (channel < channels)[None, :]
    at = place(pixel[:, None], channel[None, :], channels, area, LAST)
    tl.store(pointer + at, values.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def read_weight(weight, feature, channel, features, channels):
    """Load the weights of some channels (columns) in some features (rows); masked elements are 0."""
    mask = (feature < features)[:, None] & (channel < channels)[None, :]
    return tl.load(weight + feature[:, None] * channels + channel[None, :], mask=mask, other=0.0)


@triton.jit
def _sources(pixel, channel, channels, height, width, SHIFT: tl.constexpr):
    """Return the pixels that each channel is read from, wrapped around the map, and a mask of those inside."""
    source, inside = pixel[:, None], (pixel >= 0)[:, None]
    if SHIFT:
        group = channels // 5
        turn = tl.where(channel < 4 * group, channel // tl.maximum(group, 1), 4)[None, :]
        column = (pixel % width)[:, None] + (turn == 0).to(tl.int32) - (turn == 1).to(tl.int32)
        row = (pixel // width % height)[:, None] + (turn == 2).to(tl.int32) - (turn == 3).to(tl.int32)
        inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
        column, row = (column + width) % width, (row + height) % height
        source = (pixel // (height * width))[:, None] * height * width + row * width + column
    return source, inside


@triton.jit
def _inputs(
    x,
    pixel,
    channel,
    num_pixels,
    channels,
    height,
    width,
    SHIFT: tl.constexpr,
    RELU: tl.constexpr,
    LAST: tl.constexpr,
):
    """Return the channels of pixels, after the ReLU and the shift if there are such."""
    source, inside = _sources(pixel, channel, channels, height, width, SHIFT)
    mask = inside & (pixel < num_pixels)[:, None] & (channel < channels)[None, :]
    at = place(source, channel[None, :], channels, height * width, LAST)
    read = tl.load(x + at, mask=mask, other=0.0)
    if RELU:
        read = tl.where(read < 0, 0.0, read)
    return read


@triton.jit
def products(
    x,
    weight,
    pixel,
    feature,
    sizes,
    SHIFT: tl.constexpr,
    RELU: tl.constexpr,
    LAST: tl.constexpr,
    WORK: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """Return FEATURES channels of the convolution, without bias, at PIXELS pixels; read CHANNELS channels at a time."""
    num_pixels, height, width, channels, features = sizes
    acc = tl.zeros([PIXELS, FEATURES], WORK)
    for begin in range(0, channels, CHANNELS):
        channel = begin + tl.arange(0, CHANNELS)
        read = _inputs(x, pixel, channel, num_pixels, channels, height, width, SHIFT, RELU, LAST)
        mask = (channel < channels)[:, None] & (feature < features)[None, :]
        w = tl.load(weight + feature[None, :] * channels + channel[:, None], mask=mask, other=0.0)
        acc += tl.dot(read.to(DOT), w.to(DOT), out_dtype=WORK, input_precision=PRECISION)
    return acc


@of_maps
def conv(
    x,
    weight,
    bias,
    residual,
    output,
    num_pixels,
    height,
    width,
    channels,
    features,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    RELU: tl.constexpr,
    LAST: tl.constexpr,
    WORK: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """Compute FEATURES channels of the convolution at PIXELS pixels, times SCALE if there is a residual."""
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    feature = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    sizes = (num_pixels, height, width, channels, features)
    acc = products(
        x, weight, pixel, feature, sizes, SHIFT, RELU, LAST, WORK, DOT, PRECISION, PIXELS, CHANNELS, FEATURES
    )
    acc += tl.load(bias + feature, mask=feature < features, other=0.0).to(WORK)[None, :]
    if residual is not None:
        kept = read_map(residual, pixel, feature, num_pixels, features, height * width, LAST).to(WORK)
        acc = kept + acc * tl.full([1, 1], SCALE, WORK)
    write_map(output, acc, pixel, feature, num_pixels, features, height * width, LAST)


@triton.jit
def _input_gradient(
    grad,
    x,
    weight,
    output,
    program,
    sizes,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    RELU: tl.constexpr,
    LAST: tl.constexpr,
    WORK: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    READ: tl.constexpr,
):
    """Compute the gradient of CHANNELS channels of the input, written where PIXELS pixels read them.

    Reading wraps around the map, so that each pixel is written once; what comes from outside is 0.
    """
    num_pixels, height, width, channels, features = sizes
    columns = tl.cdiv(channels, CHANNELS)
    pixel = (program // columns).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    channel = program % columns * CHANNELS + tl.arange(0, CHANNELS)
    acc = tl.zeros([PIXELS, CHANNELS], WORK)
    for begin in range(0, features, READ):
        feature = begin + tl.arange(0, READ)
        g = read_map(grad, pixel, feature, num_pixels, features, height * width, LAST)
        w = read_weight(weight, feature, channel, features, channels)
        acc += tl.dot(g.to(DOT), w.to(DOT), out_dtype=WORK, input_precision=PRECISION)
    source, inside = _sources(pixel, channel, channels, height, width, SHIFT)
    at = place(source, channel[None, :], channels, height * width, LAST)
    mask = (pixel < num_pixels)[:, None] & (channel < channels)[None, :]
    if RELU:
        inside = inside & (tl.load(x + at, mask=mask, other=0.0) > 0)
    acc *= tl.full([1, 1], SCALE, WORK)
    tl.store(output + at, tl.where(inside, acc, 0.0).to(output.dtype.element_ty), mask=mask)


@triton.jit
def _weight_gradient(
    grad,
    x,
    partial,
    program,
    sizes,
    share,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    RELU: tl.constexpr,
    LAST: tl.constexpr,
    WORK: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    CHANNELS: tl.constexpr,
    FEATURES: tl.constexpr,
    READ: tl.constexpr,
):
    """Compute a part of the gradients of weight and bias: that of `share` pixels."""
    num_pixels, height, width, channels, features = sizes
    num_parts, columns = tl.cdiv(num_pixels, share).to(tl.int32), tl.cdiv(channels, CHANNELS)
    part, column = (program % num_parts).to(tl.int64), program // num_parts % columns
    feature = program // (num_parts * columns) * FEATURES + tl.arange(0, FEATURES)
    channel = column * CHANNELS + tl.arange(0, CHANNELS)
    acc = tl.zeros([FEATURES, CHANNELS], WORK)
    total = tl.zeros([FEATURES], WORK)
    for begin in range(0, share, READ):
        pixel = part * share + begin + tl.arange(0, READ)
        g = read_map(grad, pixel, feature, num_pixels, features, height * width, LAST)
        read = _inputs(x, pixel, channel, num_pixels, channels, height, width, SHIFT, RELU, LAST)
        acc += tl.dot(tl.trans(g).to(DOT), read.to(DOT), out_dtype=WORK, input_precision=PRECISION)
        total += tl.sum(g.to(WORK), 0)
    scale = tl.full([FEATURES], SCALE, WORK)
    own = partial + part * (features * channels + features)
    mask = (feature < features)[:, None] & (channel < channels)[None, :]
    tl.store(own + feature[:, None] * channels + channel[None, :], acc * scale[:, None], mask=mask)
    if column == 0:
        tl.store(own + features * channels + feature, total * scale, mask=feature < features)


@of_maps
def conv_backward(
    grad,
    x,
    weight,
    output,
    partial,
    num_pixels,
    height,
    width,
    channels,
    features,
    share,
    num_programs,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    RELU: tl.constexpr,
    LAST: tl.constexpr,
    WORK: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    FEATURES: tl.constexpr,
    READ: tl.constexpr,
):
    """Compute gradients times SCALE: the first `num_programs` programs those of the weights, the others of the input.

    Parts of the gradients of weights are summed afterwards.
    """
    program = tl.program_id(0)
    sizes = (num_pixels, height, width, channels, features)
    if program < num_programs:
        _weight_gradient(
            grad,
            x,
            partial,
            program,
            sizes,
            share,
            SCALE,
            SHIFT,
            RELU,
            LAST,
            WORK,
            DOT,
            PRECISION,
            CHANNELS,
            FEATURES,
            READ,
        )
    else:
        program -= num_programs
        _input_gradient(
            grad,
            x,
            weight,
            output,
            program,
            sizes,
            SCALE,
            SHIFT,
            RELU,
            LAST,
            WORK,
            DOT,
            PRECISION,
            PIXELS,
            CHANNELS,
            READ,
        )


@triton.jit
def move_running(mean, variance, running_mean, running_var, num_batches, channel, mask, count, MOMENTUM: tl.constexpr):
    """Move the running statistics of these channels, which are all, by those of a batch of `count` values.

    Nothing moves unless all results are finite.
    """
    old_mean = tl.load(running_mean + channel, mask=mask, other=0.0)
    old_var = tl.load(running_var + channel, mask=mask, other=0.0)
    momentum = tl.full(channel.shape, MOMENTUM, old_mean.dtype)  # a number by itself would be float32
    unbiased = variance * (count.to(variance.dtype) / (count - 1).to(variance.dtype))
    new_mean = old_mean + momentum * (mean.to(old_mean.dtype) - old_mean)
    new_var = old_var + momentum * (unbiased.to(old_var.dtype) - old_var)
    wrong = ~((tl.abs(new_mean) < float("inf")) & (tl.abs(new_var) < float("inf")))
    if tl.max((wrong & mask).to(tl.int32), 0) == 0:
        tl.store(running_mean + channel, new_mean.to(old_mean.dtype), mask=mask)
        tl.store(running_var + channel, new_var.to(old_var.dtype), mask=mask)
        tl.store(num_batches, tl.load(num_batches) + 1)


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
    """Do `move_running` in one program, for as many as BLOCK channels."""
    channel = tl.arange(0, BLOCK)
    mask = channel < channels
    inverse = tl.load(inverse_std + channel, mask=mask, other=1.0)
    eps = tl.full([BLOCK], EPS, inverse.dtype)  # a number by itself would be float32
    variance = tl.maximum(1.0 / (inverse * inverse) - eps, 0.0)
    batch_mean = tl.load(mean + channel, mask=mask, other=0.0)
    move_running(batch_mean, variance, running_mean, running_var, num_batches, channel, mask, count, MOMENTUM)


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
