"""Triton kernels of 1x1 convolutions of one map that are normalised by their batch; this module needs triton.

A tuple of tensors holds one for each convolution. Parts of sums are added afterwards, in order: results are
deterministic.
"""

import triton
import triton.language as tl

from sparse_sr_attn.functional.map_kernels import move_running, of_maps, products, read_map, read_weight, write_map


@triton.jit
def _own(pointers, index):
    """Return the pointer of this index, which need not be a constant."""
    chosen = pointers[0]
    for other in tl.static_range(1, len(pointers)):
        if index == other:
            chosen = pointers[other]
    return chosen


@of_maps
def conv_norm(
    x,
    weights,
    biases,
    means,
    variances,
    scales,
    offsets,
    outputs,
    num_pixels,
    height,
    width,
    channels,
    features,
    EPS: tl.constexpr,
    LAST: tl.constexpr,
    WORK: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """Compute FEATURES channels of a normalised convolution at PIXELS pixels.

    Program ids are (block of pixels, block of features, convolution).
    """
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    feature = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    conv = tl.program_id(2)
    sizes = (num_pixels, height, width, channels, features)
    weight = _own(weights, conv)
    acc = products(
        x, weight, pixel, feature, sizes, False, False, LAST, WORK, DOT, PRECISION, PIXELS, CHANNELS, FEATURES
    )
    exists = feature < features
    eps = tl.full([FEATURES], EPS, WORK)  # a number by itself would be float32
    spread = tl.sqrt(tl.load(_own(variances, conv) + feature, mask=exists, other=1.0).to(WORK) + eps)
    scale = tl.load(_own(scales, conv) + feature, mask=exists, other=0.0).to(WORK) / spread
    shift = tl.load(_own(biases, conv) + feature, mask=exists, other=0.0).to(WORK)
    shift -= tl.load(_own(means, conv) + feature, mask=exists, other=0.0).to(WORK)
    acc = (acc + shift[None, :]) * scale[None, :]
    acc += tl.load(_own(offsets, conv) + feature, mask=exists, other=0.0).to(WORK)[None, :]
    write_map(_own(outputs, conv), acc, pixel, feature, num_pixels, features, height * width, LAST)


@of_maps
def partial_statistics(
    x,
    weights,
    partial,
    num_pixels,
    height,
    width,
    channels,
    features,
    share,
    LAST: tl.constexpr,
    WORK: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """Compute mean and sum of squared deviations of FEATURES channels of a convolution without bias at `share` pixels.

    Program ids are (part, block of features, convolution). Blocks of PIXELS pixels are joined as one by one by Chan et
    al., so that a large mean does no harm.
    """
    part = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    conv = tl.program_id(2)
    sizes = (num_pixels, height, width, channels, features)
    weight = _own(weights, conv)
    mean = tl.zeros([FEATURES], WORK)
    squares = tl.zeros([FEATURES], WORK)
    own_pixels = tl.minimum(num_pixels - tl.program_id(0) * share, share)
    for begin in range(0, own_pixels, PIXELS):
        pixel = part * share + begin + tl.arange(0, PIXELS)
        real = (pixel < num_pixels)[:, None]
        y = products(
            x, weight, pixel, feature, sizes, False, False, LAST, WORK, DOT, PRECISION, PIXELS, CHANNELS, FEATURES
        )
        number = tl.minimum(own_pixels - begin, PIXELS).to(WORK)
        weight_of_block = number / (number + begin)
        delta = tl.sum(y, 0) / number - mean  # products are 0 where there is no pixel
        away = tl.where(real, y - (mean + delta)[None, :], 0.0)
        squares += tl.sum(away * away, 0) + delta * delta * (weight_of_block * begin)
        mean += delta * weight_of_block
    rows = partial + (conv * tl.num_programs(0) + part) * 2 * features
    tl.store(rows + feature, mean, mask=feature < features)
    tl.store(rows + features + feature, squares, mask=feature < features)


@triton.jit
def _means(begin, num_parts, share, num_pixels, feature, features, WORK: tl.constexpr, PARTS: tl.constexpr):
    """Return the numbers of pixels of PARTS parts, where their means are, and a mask of those that exist."""
    part = begin + tl.arange(0, PARTS)
    number = tl.maximum(tl.minimum(num_pixels - part * share, share), 0).to(WORK)
    mask = (part < num_parts)[:, None] & (feature < features)[None, :]
    return number[:, None], part[:, None] * 2 * features + feature[None, :], mask


@triton.jit(do_not_specialize=["num_pixels", "share", "num_parts", "features"])
def batch_statistics(
    partial,
    biases,
    running_means,
    running_vars,
    nums_batches,
    statistics,
    num_pixels,
    share,
    num_parts,
    features,
    MOMENTUM: tl.constexpr,
    MOVES: tl.constexpr,
    WORK: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Join PARTS parts at a time to mean and variance of a convolution; a program for each.

    The parts are those without bias. If MOVES, also move the running statistics.
    """
    conv = tl.program_id(0)
    feature = tl.arange(0, BLOCK)
    exists = feature < features
    rows = partial + conv * num_parts * 2 * features
    count = tl.full([1], 0, WORK) + num_pixels.to(WORK)
    sums = tl.zeros([PARTS, BLOCK], WORK)
    for begin in range(0, num_parts, PARTS):
        number, at, mask = _means(begin, num_parts, share, num_pixels, feature, features, WORK, PARTS)
        sums += number * tl.load(rows + at, mask=mask, other=0.0)
    mean = tl.sum(sums, 0) / count
    sums = tl.zeros([PARTS, BLOCK], WORK)
    for begin in range(0, num_parts, PARTS):
        number, at, mask = _means(begin, num_parts, share, num_pixels, feature, features, WORK, PARTS)
        delta = tl.load(rows + at, mask=mask, other=0.0) - mean[None, :]
        sums += tl.load(rows + features + at, mask=mask, other=0.0) + number * delta * delta
    variance = tl.sum(sums, 0) / count
    mean += tl.load(_own(biases, conv) + feature, mask=exists, other=0.0).to(WORK)
    tl.store(statistics + conv * 2 * features + feature, mean, mask=exists)
    tl.store(statistics + (conv * 2 + 1) * features + feature, variance, mask=exists)
    if MOVES:
        move_running(
            mean,
            variance,
            _own(running_means, conv),
            _own(running_vars, conv),
            _own(nums_batches, conv),
            feature,
            exists,
            num_pixels,
            MOMENTUM,
        )


@of_maps
def partial_moments(
    x,
    maps,
    offsets,
    partial,
    deviations,
    num_pixels,
    height,
    width,
    channels,
    features,
    share,
    LAST: tl.constexpr,
    WORK: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    CHANNELS: tl.constexpr,
    FEATURES: tl.constexpr,
    READ: tl.constexpr,
):
    """Sum a map, and its products with `x`, over `share` pixels; maps are gradients and, less their offset, outputs.

    Program ids are (part, block of features and channels, map). Deviations of `x` from about its mean are multiplied,
    so that a large mean does no harm; their sums are stored too.
    """
    part = tl.program_id(0).to(tl.int64)
    columns = tl.cdiv(channels, CHANNELS)
    feature = tl.program_id(1) // columns * FEATURES + tl.arange(0, FEATURES)
    channel = tl.program_id(1) % columns * CHANNELS + tl.arange(0, CHANNELS)
    index = tl.program_id(2)
    y_map, area = _own(maps, index), height * width
    offset = tl.zeros([FEATURES], WORK)
    if index >= len(offsets):
        own = _own(offsets, index - len(offsets))
        offset = tl.load(own + feature, mask=feature < features, other=0.0).to(WORK)
    # The same pixels in all programs, spread over the map.
    pixel = tl.arange(0, READ).to(tl.int64) * tl.maximum(num_pixels // READ, 1)
    sample = read_map(x, pixel, channel, num_pixels, channels, area, LAST).to(WORK)
    centre = tl.sum(sample, 0) / tl.sum((pixel < num_pixels).to(WORK), 0)

    acc = tl.zeros([FEATURES, CHANNELS], WORK)
    total = tl.zeros([FEATURES], WORK)
    deviation = tl.zeros([CHANNELS], WORK)
    for begin in range(0, share, READ):
        pixel = part * share + begin + tl.arange(0, READ)
        real = (pixel < num_pixels)[:, None]
        y = read_map(y_map, pixel, feature, num_pixels, features, area, LAST).to(WORK)
        y = tl.where(real, y - offset[None, :], 0.0)
        away = read_map(x, pixel, channel, num_pixels, channels, area, LAST).to(WORK)
        away = tl.where(real, away - centre[None, :], 0.0)
        acc += tl.dot(tl.trans(y).to(DOT), away.to(DOT), out_dtype=WORK, input_precision=PRECISION)
        total += tl.sum(y, 0)
        deviation += tl.sum(away, 0)
    rows = partial + (index * tl.num_programs(0) + part) * (features * channels + features)
    mask = (feature < features)[:, None] & (channel < channels)[None, :]
    tl.store(rows + feature[:, None] * channels + channel[None, :], acc, mask=mask)
    tl.store(rows + features * channels + feature, total, mask=feature < features)
    tl.store(deviations + part * channels + channel, deviation, mask=channel < channels)


@triton.jit(do_not_specialize=["num_pixels", "num_parts", "channels", "features"])
def parameter_gradients(
    partial,
    deviations,
    weights,
    scales,
    offsets,
    statistics,
    gradients,
    coefficients,
    num_pixels,
    num_parts,
    channels,
    features,
    EPS: tl.constexpr,
    WORK: tl.constexpr,
    DOT: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    r"""Compute the gradients of one feature of one convolution from parts, PARTS at a time; its row has BLOCK channels.

    With $g$ the gradient of the output $y$ and $\beta$ the offset, that of the convolution is
    $a (g - \bar g) + b (y - \beta)$. The coefficients that are stored are $a$, $\bar g$, $b$, $\beta$. Gradients are
    those of all weights, biases (0, because the mean is subtracted), scales and offsets.
    """
    feature = tl.program_id(0)
    conv = tl.program_id(1)
    channel = tl.arange(0, BLOCK)
    size = features * channels + features
    of_grads = partial + conv * num_parts * size
    of_outputs = partial + (conv + tl.num_programs(1)) * num_parts * size
    grad_sums, output_sums, deviation_sums, totals = (
        tl.zeros([PARTS, BLOCK], WORK),
        tl.zeros([PARTS, BLOCK], WORK),
        tl.zeros([PARTS, BLOCK], WORK),
        tl.zeros([PARTS], WORK),
    )
    for begin in range(0, num_parts, PARTS):
        part = begin + tl.arange(0, PARTS)
        mask = (part < num_parts)[:, None] & (channel < channels)[None, :]
        at = part[:, None] * size + feature * channels + channel[None, :]
        grad_sums += tl.load(of_grads + at, mask=mask, other=0.0)
        output_sums += tl.load(of_outputs + at, mask=mask, other=0.0)
        deviation_sums += tl.load(deviations + part[:, None] * channels + channel[None, :], mask=mask, other=0.0)
        totals += tl.load(of_grads + part * size + features * channels + feature, mask=part < num_parts, other=0.0)
    count = num_pixels.to(WORK)
    total = tl.sum(totals, 0)
    mean = total / count
    from_grads = tl.sum(grad_sums, 0) - mean * tl.sum(deviation_sums, 0)
    weight = tl.load(_own(weights, conv) + feature * channels + channel, mask=channel < channels, other=0.0)
    variance = tl.load(statistics + (conv * 2 + 1) * features + feature)
    inverse = 1.0 / tl.sqrt(variance + tl.full([], EPS, WORK))
    of_scale = inverse * tl.sum(weight.to(DOT).to(WORK) * from_grads, 0)
    of_grad = tl.load(_own(scales, conv) + feature).to(WORK) * inverse
    of_output = -of_scale / count * inverse
    of_weight = of_grad * from_grads + of_output * tl.sum(output_sums, 0)
    own = gradients + conv * (size + 2 * features)
    tl.store(own + feature * channels + channel, of_weight, mask=channel < channels)
    own += features * channels + feature
    tl.store(own, tl.full([], 0.0, WORK))
    tl.store(own + features, of_scale)
    tl.store(own + 2 * features, total)
    own = coefficients + conv * 4 * features + feature
    tl.store(own, of_grad)
    tl.store(own + features, mean)
    tl.store(own + 2 * features, of_output)
    tl.store(own + 3 * features, tl.load(_own(offsets, conv) + feature).to(WORK))


@of_maps
def input_gradient(
    grads,
    outputs,
    weights,
    coefficients,
    output,
    num_pixels,
    height,
    width,
    channels,
    features,
    LAST: tl.constexpr,
    WORK: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    READ: tl.constexpr,
):
    """Compute the gradient of CHANNELS channels of the input at PIXELS pixels, from all convolutions.

    The gradients of convolutions are computed where they are read, from the coefficients of `parameter_gradients`.
    """
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    area = height * width
    acc = tl.zeros([PIXELS, CHANNELS], WORK)
    for conv in tl.static_range(len(weights)):
        for begin in range(0, features, READ):
            feature = begin + tl.arange(0, READ)
            exists = feature < features
            at = coefficients + conv * 4 * features + feature
            of_grad = tl.load(at, mask=exists, other=0.0)[None, :]
            mean = tl.load(at + features, mask=exists, other=0.0)[None, :]
            of_output = tl.load(at + 2 * features, mask=exists, other=0.0)[None, :]
            offset = tl.load(at + 3 * features, mask=exists, other=0.0)[None, :]
            g = read_map(grads[conv], pixel, feature, num_pixels, features, area, LAST).to(WORK)
            y = read_map(outputs[conv], pixel, feature, num_pixels, features, area, LAST).to(WORK)
            g = of_grad * (g - mean) + of_output * (y - offset)
            w = read_weight(weights[conv], feature, channel, features, channels)
            acc += tl.dot(g.to(DOT), w.to(DOT), out_dtype=WORK, input_precision=PRECISION)
    write_map(output, acc, pixel, channel, num_pixels, channels, area, LAST)
