"""Triton kernels of attention in windows of several sizes, one for each group of channels; this module needs triton.

The slots of a group are those of its windows, one window after the other; a program handles a block of them, which may
begin and end inside a window. Padding, shifts and groups are arithmetic on indices: nothing is copied into windows.
Queries are the keys. Each row of each result is written by one program, without atomics, so results are deterministic.
"""

import triton
import triton.language as tl

# Sizes that change from image to image. Kernels are not specialised to their divisibility by 16.
_kernel = triton.jit(do_not_specialize=["num_groups", "num_slots", "height", "width", "query_dim", "value_dim"])


@triton.jit
def _group(groups, num_groups, GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    """Return the numbers of the group of this program, and its first slot within the group.

    The numbers are those of `triton.group_table`, after the first: the number of blocks in the groups before.
    """
    index = tl.arange(0, GROUPS)
    first = tl.load(groups + index * 11, mask=index < num_groups, other=2**31 - 1)
    block = tl.program_id(0)
    entry = groups + (tl.sum((first <= block).to(tl.int32), 0) - 1) * 11
    begin = (block - tl.load(entry)) * BLOCK
    windows = (tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3))  # size, rows, columns
    shifts = (tl.load(entry + 4), tl.load(entry + 5))
    query_columns = (tl.load(entry + 6), tl.load(entry + 7))  # first, number
    value_columns = (tl.load(entry + 8), tl.load(entry + 9))
    return begin, windows, shifts, query_columns, value_columns, tl.load(entry + 10)


@triton.jit
def _windows_of(begin, windows, BLOCK: tl.constexpr):
    """Return the first slot of the windows to which BLOCK slots from `begin` on belong, and the end of the last one."""
    size, rows, columns = windows
    area = size * size
    return begin // area * area, tl.minimum((begin + BLOCK - 1) // area + 1, rows * columns) * area


@triton.jit
def _pixels(slot, windows, shift, height, width):
    """Return the pixel in each slot of the map rolled by `shift`, and a mask of the slots that hold one."""
    size, rows, columns = windows
    window, place = slot // (size * size), slot % (size * size)
    y = (window // columns * size + place // size + shift) % (rows * size)
    x = (window % columns * size + place % size + shift) % (columns * size)
    real = (window < rows * columns) & (y < height) & (x < width)
    return tl.program_id(1).to(tl.int64) * height * width + y * width + x, real


@triton.jit
def _targets(slot, windows, unshift, height, width, pixel, is_real, EXACT: tl.constexpr):
    """Return the pixel that each slot is written to, and a mask of the slots that have one."""
    if not EXACT:
        pixel, is_real = _pixels(slot, windows, unshift, height, width)
    return pixel, is_real


@triton.jit
def _rows(pointer, pixel, mask, dim, columns, BLOCK: tl.constexpr):
    """Return the columns of a group of the rows of pixels; 0 where `mask` is False or past the end of the group."""
    start, number = columns
    column = tl.arange(0, BLOCK)
    at = pointer + pixel[:, None] * dim + start + column[None, :]
    return tl.load(at, mask=mask[:, None] & (column < number)[None, :], other=0.0)


@triton.jit
def _put(pointer, pixel, mask, rows, dim, columns, BLOCK: tl.constexpr):
    """Write the columns of a group of the rows of pixels."""
    start, number = columns
    column = tl.arange(0, BLOCK)
    at = pointer + pixel[:, None] * dim + start + column[None, :]
    tl.store(at, rows.to(pointer.dtype.element_ty), mask=mask[:, None] & (column < number)[None, :])


@_kernel
def forward(
    groups,
    query,
    value,
    output,
    maximum,
    inverse,
    num_groups,
    num_slots,
    height,
    width,
    query_dim,
    value_dim,
    GROUPS: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    WORK: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attend from BLOCK_I slots of a group; program ids are (block of all groups, sample).

    `num_slots` is the number of slots of all groups, for each of which `maximum` and `inverse` hold the largest score
    and 1 / the sum of exponentials. If EXACT, slots are written to the pixels that they are read from.
    """
    begin, windows, shifts, query_columns, value_columns, first_slot = _group(groups, num_groups, GROUPS, BLOCK_I)
    shift, unshift = shifts
    size, rows, columns = windows
    area = size * size
    slot = begin + tl.arange(0, BLOCK_I)
    pixel, is_query = _pixels(slot, windows, shift, height, width)
    q = _rows(query, pixel, is_query, query_dim, query_columns, BLOCK_D).to(WORK)

    m_i = tl.full([BLOCK_I], float("-inf"), WORK)
    l_i = tl.zeros([BLOCK_I], WORK)
    acc = tl.zeros([BLOCK_I, BLOCK_E], WORK)
    first_key, end = _windows_of(begin, windows, BLOCK_I)
    for start in range(first_key, end, BLOCK_J):
        key_slot = start + tl.arange(0, BLOCK_J)
        key_pixel, is_key = _pixels(key_slot, windows, shift, height, width)
        k = _rows(query, key_pixel, is_key, query_dim, query_columns, BLOCK_D).to(WORK)
        v = _rows(value, key_pixel, is_key, value_dim, value_columns, BLOCK_E)
        seen = is_key[None, :] & ((slot // area)[:, None] == (key_slot // area)[None, :])
        scores = tl.dot(q, tl.trans(k), out_dtype=WORK, input_precision=PRECISION)
        scores = tl.where(seen, scores, float("-inf"))
        larger = tl.maximum(m_i, tl.max(scores, 1))
        base = tl.where(larger == float("-inf"), 0.0, larger)  # no key of this window yet
        rescale = tl.exp(m_i - base)
        p = tl.exp(scores - base[:, None])
        l_i = l_i * rescale + tl.sum(p, 1)
        acc = acc * rescale[:, None]
        acc += tl.dot(p.to(v.dtype).to(DOT), v.to(DOT), out_dtype=WORK, input_precision=PRECISION)
        m_i = larger
    is_slot = slot < rows * columns * area
    l_i = tl.where(is_slot, l_i, 1.0)
    to_pixel, is_output = _targets(slot, windows, unshift, height, width, pixel, is_query, EXACT)
    _put(output, to_pixel, is_output, acc / l_i[:, None], value_dim, value_columns, BLOCK_E)
    statistics = tl.program_id(1).to(tl.int64) * num_slots + first_slot + slot
    tl.store(maximum + statistics, m_i, mask=is_slot)
    tl.store(inverse + statistics, 1.0 / l_i, mask=is_slot)


@_kernel
def backward(
    groups,
    grad_output,
    query,
    value,
    output,
    maximum,
    inverse,
    grad_query,
    grad_value,
    num_groups,
    num_slots,
    height,
    width,
    query_dim,
    value_dim,
    GROUPS: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    WORK: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute the gradients of BLOCK_I slots of a group, each as a query and as a key; programs are those of `forward`.

    The gradient of a score is its weight times the difference between the gradient of the weight and `delta`, the
    product of the query's output and its gradient.
    """
    begin, windows, shifts, query_columns, value_columns, first_slot = _group(groups, num_groups, GROUPS, BLOCK_I)
    shift, unshift = shifts
    size, rows, columns = windows
    area = size * size
    first_statistic = tl.program_id(1).to(tl.int64) * num_slots + first_slot
    slot = begin + tl.arange(0, BLOCK_I)
    is_slot = slot < rows * columns * area
    pixel, is_real = _pixels(slot, windows, shift, height, width)
    to_pixel, is_output = _targets(slot, windows, unshift, height, width, pixel, is_real, EXACT)
    q_i = _rows(query, pixel, is_real, query_dim, query_columns, BLOCK_D).to(WORK)
    v_i = _rows(value, pixel, is_real, value_dim, value_columns, BLOCK_E).to(DOT)
    g_i = _rows(grad_output, to_pixel, is_output, value_dim, value_columns, BLOCK_E)
    o_i = _rows(output, to_pixel, is_output, value_dim, value_columns, BLOCK_E)
    delta_i = tl.sum(g_i.to(WORK) * o_i.to(WORK), 1)
    g_i = g_i.to(DOT)
    m_i = tl.load(maximum + first_statistic + slot, mask=is_slot, other=0.0)
    inverse_i = tl.load(inverse + first_statistic + slot, mask=is_slot, other=0.0)

    to_query = tl.zeros([BLOCK_I, BLOCK_D], WORK)
    to_value = tl.zeros([BLOCK_I, BLOCK_E], WORK)
    first_other, end = _windows_of(begin, windows, BLOCK_I)
    for start in range(first_other, end, BLOCK_J):
        other = start + tl.arange(0, BLOCK_J)
        is_other = other < end
        other_pixel, is_other_real = _pixels(other, windows, shift, height, width)
        other_to, is_other_output = _targets(other, windows, unshift, height, width, other_pixel, is_other_real, EXACT)
        q_j = _rows(query, other_pixel, is_other_real, query_dim, query_columns, BLOCK_D).to(WORK)
        v_j = _rows(value, other_pixel, is_other_real, value_dim, value_columns, BLOCK_E).to(DOT)
        g_j = _rows(grad_output, other_to, is_other_output, value_dim, value_columns, BLOCK_E)
        o_j = _rows(output, other_to, is_other_output, value_dim, value_columns, BLOCK_E)
        delta_j = tl.sum(g_j.to(WORK) * o_j.to(WORK), 1)
        g_j = g_j.to(DOT)
        m_j = tl.load(maximum + first_statistic + other, mask=is_other, other=0.0)
        inverse_j = tl.load(inverse + first_statistic + other, mask=is_other, other=0.0)

        near = (slot // area)[:, None] == (other // area)[None, :]
        scores = tl.dot(q_i, tl.trans(q_j), out_dtype=WORK, input_precision=PRECISION)
        seen = near & is_other_real[None, :]
        weights = tl.exp(tl.where(seen, scores - m_i[:, None], float("-inf"))) * inverse_i[:, None]
        grad = tl.dot(g_i, tl.trans(v_j), out_dtype=WORK, input_precision=PRECISION)
        grad_scores = weights * (grad - delta_i[:, None])
        # The other way round: from query j to key i.
        seen = near & is_real[:, None] & is_other[None, :]
        weights = tl.exp(tl.where(seen, scores - m_j[None, :], float("-inf"))) * inverse_j[None, :]
        grad = tl.dot(v_i, tl.trans(g_j), out_dtype=WORK, input_precision=PRECISION)
        grad_scores += weights * (grad - delta_j[None, :])
        to_query += tl.dot(grad_scores, q_j, out_dtype=WORK, input_precision=PRECISION)
        to_value += tl.dot(weights.to(value.dtype.element_ty).to(DOT), g_j, out_dtype=WORK, input_precision=PRECISION)
    _put(grad_query, pixel, is_real, to_query, query_dim, query_columns, BLOCK_D)
    _put(grad_value, pixel, is_real, to_value, value_dim, value_columns, BLOCK_E)
