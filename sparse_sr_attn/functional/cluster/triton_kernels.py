"""Triton kernels of cluster attention and of the assignment to centroids; this module needs triton.

Chunks form a ring of slots, so the keys that a chunk sees are one run of slots from `first` on, which may wrap around
the end of the ring; a run longer than the ring contains keys twice, as in the published counting. The same is true of
the queries that see a key. Without a ring (NEAREST), lists name the chunks that a chunk sees, and those that see it.
Rows are read by token; nothing is copied into slot order. Each row of each result is written by one program, without
atomics, so results are deterministic.
"""

import triton
import triton.language as tl

# Sizes that change from image to image. Kernels are not specialised to their divisibility by 16.
_SIZES = [
    "num_tokens",
    "chunk_size",
    "num_slots",
    "first",
    "num_seen",
    "fill",
    "num_repeats",
    "num_points",
    "num_clusters",
    "every",
    "width",
    "num_parts",
    "num_chosen",
    "num_ranks",
    "share",
]
_kernel = triton.jit(do_not_specialize=_SIZES)


@triton.jit
def _rows(pointer, token, mask, width: tl.constexpr, start: tl.constexpr, BLOCK: tl.constexpr):
    """Return BLOCK columns from `start` of the rows of tokens; 0 where `mask` is False or past the end of a row."""
    column = start + tl.arange(0, BLOCK)
    return tl.load(
        pointer + token[:, None] * width + column[None, :], mask=mask[:, None] & (column < width)[None, :], other=0.0
    )


@triton.jit
def _put(pointer, token, mask, rows, width: tl.constexpr, start: tl.constexpr, BLOCK: tl.constexpr):
    """Write BLOCK columns from `start` of the rows of tokens."""
    column = start + tl.arange(0, BLOCK)
    at = pointer + token[:, None] * width + column[None, :]
    tl.store(at, rows.to(pointer.dtype.element_ty), mask=mask[:, None] & (column < width)[None, :])


@triton.jit
def _tokens(order, slot, mask, num_tokens, fill, EXACT: tl.constexpr):
    """Return the row of the token at a slot of this sample."""
    if not EXACT:
        slot = tl.where(slot < num_tokens, slot, (slot + fill) % num_tokens)
    return tl.program_id(2).to(tl.int64) * num_tokens + tl.load(order + slot, mask=mask, other=0)


@triton.jit
def _own(order, chunk_size, num_tokens, BLOCK: tl.constexpr):
    """Return the slots of a program, the rows of their tokens, and a mask of the slots that hold one."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.program_id(1) * chunk_size + i
    mask = (i < chunk_size) & (slot < num_tokens)
    return slot, _tokens(order, slot, mask, num_tokens, 0, True), mask


@triton.jit
def _listed(starts, chunk, chunk_size):
    """Return where the list of a chunk of this sample begins, and the number of slots of its chunks."""
    starts += tl.program_id(2).to(tl.int64) * (tl.num_programs(1) + 1) + chunk
    begin = tl.load(starts)
    return begin, (tl.load(starts + 1) - begin).to(tl.int32) * chunk_size


@triton.jit
def _seen(
    order,
    num_tokens,
    chunk_size,
    num_slots,
    fill,
    chunks,
    start,
    begin,
    num_seen,
    EXACT: tl.constexpr,
    ONCE: tl.constexpr,
    NEAREST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return the rows of BLOCK seen tokens, from `begin` on, and a mask of those that count.

    The seen tokens begin at slot `start` or, if NEAREST, are those of the chunks listed from `start` on. If EXACT,
    slots past the last token do not count. If ONCE, there are at most as many seen slots as slots.
    """
    j = begin + tl.arange(0, BLOCK)
    mask = j < num_seen
    if NEAREST:
        slot = tl.load(chunks + start + j // chunk_size, mask=mask, other=0) * chunk_size + j % chunk_size
    elif ONCE:
        # Modulo takes twenty instructions, for each slot; here for the first one only.
        slot = start % num_slots + j
        slot = tl.where(slot < num_slots, slot, slot - num_slots)
    else:
        slot = (start + j) % num_slots
    if EXACT:
        mask = mask & (slot < num_tokens)
    return _tokens(order, slot, mask, num_tokens, fill, EXACT), mask


@triton.jit
def _lengths(rows, FLOOR: tl.constexpr, BLOCK: tl.constexpr):
    """Return the lengths of BLOCK rows, at least FLOOR, and which are shorter."""
    length = tl.sqrt(tl.sum(rows * rows, 1))
    floor = tl.full([BLOCK], FLOOR, rows.dtype)  # a number by itself would be float32
    return tl.maximum(length, floor), length < floor


@_kernel
def forward(
    query,
    key,
    value,
    order,
    chunks,
    starts,
    output,
    lse,
    maximum,
    inverse,
    num_tokens,
    chunk_size,
    num_slots,
    first,
    num_seen,
    fill,
    SCALE: tl.constexpr,
    EXACT: tl.constexpr,
    NEAREST: tl.constexpr,
    UNIT: tl.constexpr,
    FLOOR: tl.constexpr,
    QUERY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    START: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    WORK: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attend from BLOCK_I queries of a chunk; program ids are (block of queries, chunk, sample).

    `first` is the first slot that chunk 0 sees, in [0, num_slots), and `num_seen` the number of slots that it sees; if
    NEAREST, chunk t of sample b sees instead the `chunks` from `starts[b, t]` up to `starts[b, t + 1]`.
    `fill` is the offset, modulo the number of tokens, from a slot past the last token to the slot whose token it
    repeats. SCALE multiplies scores. BLOCK_E columns of the values are gathered, from column START on. If UNIT, keys
    are brought to unit length; lengths are clamped to at least FLOOR.
    """
    order += tl.program_id(2).to(tl.int64) * num_tokens
    _, query_token, is_query = _own(order, chunk_size, num_tokens, BLOCK_I)
    q = _rows(query, query_token, is_query, QUERY_DIM, 0, BLOCK_D).to(WORK)

    m_i = tl.full([BLOCK_I], float("-inf"), WORK)
    l_i = tl.zeros([BLOCK_I], WORK)
    acc = tl.zeros([BLOCK_I, BLOCK_E], WORK)
    if NEAREST:
        first, num_seen = _listed(starts, tl.program_id(1), chunk_size)
    else:
        first = first + tl.program_id(1) * chunk_size
    for begin in range(0, num_seen, BLOCK_J):
        token, is_key = _seen(
            order,
            num_tokens,
            chunk_size,
            num_slots,
            fill,
            chunks,
            first,
            begin,
            num_seen,
            EXACT,
            EXACT,
            NEAREST,
            BLOCK_J,
        )
        k = _rows(key, token, is_key, QUERY_DIM, 0, BLOCK_D).to(WORK)
        if UNIT:
            k = k / _lengths(k, FLOOR, BLOCK_J)[0][:, None]
        v = _rows(value, token, is_key, VALUE_DIM, START, BLOCK_E)
        scores = SCALE * tl.dot(q, tl.trans(k), out_dtype=WORK, input_precision=PRECISION)
        scores = tl.where(is_key[None, :], scores, float("-inf"))
        # The first block holds a key, as every chunk does: from then on `m_i` is finite.
        larger = tl.maximum(m_i, tl.max(scores, 1))
        rescale = tl.exp(m_i - larger)
        p = tl.exp(scores - larger[:, None])
        l_i = l_i * rescale + tl.sum(p, 1)
        acc = acc * rescale[:, None]
        acc += tl.dot(p.to(v.dtype).to(DOT), v.to(DOT), out_dtype=WORK, input_precision=PRECISION)
        m_i = larger
    _put(output, query_token, is_query, acc / l_i[:, None], VALUE_DIM, START, BLOCK_E)
    tl.store(lse + query_token, m_i + tl.log(l_i), mask=is_query)
    tl.store(maximum + query_token, m_i, mask=is_query)
    tl.store(inverse + query_token, 1.0 / l_i, mask=is_query)


@_kernel
def backward_query(
    grad_output,
    grad_lse,
    query,
    key,
    value,
    order,
    chunks,
    starts,
    maximum,
    inverse,
    grad_query,
    delta,
    num_tokens,
    chunk_size,
    num_slots,
    first,
    num_seen,
    fill,
    SCALE: tl.constexpr,
    EXACT: tl.constexpr,
    NEAREST: tl.constexpr,
    UNIT: tl.constexpr,
    FLOOR: tl.constexpr,
    QUERY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    LSE: tl.constexpr,
    START: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    WORK: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute the gradients of BLOCK_I queries of a chunk; programs and sizes are those of `forward`.

    Also writes `delta`, which is subtracted from the gradient of each weight of a query: the weighted mean of these
    gradients minus the gradient of the lse (which counts once, with the first columns). It is known only after all keys
    have been read, so the mean key is accumulated separately, and `delta` times it is subtracted from the result.
    """
    order += tl.program_id(2).to(tl.int64) * num_tokens
    _, query_token, is_query = _own(order, chunk_size, num_tokens, BLOCK_I)
    q = _rows(query, query_token, is_query, QUERY_DIM, 0, BLOCK_D).to(WORK)
    grad = _rows(grad_output, query_token, is_query, VALUE_DIM, START, BLOCK_E)
    m_i = tl.load(maximum + query_token, mask=is_query, other=0.0)
    inverse_l = tl.load(inverse + query_token, mask=is_query, other=0.0)

    delta_i = tl.zeros([BLOCK_I], WORK)
    result = tl.zeros([BLOCK_I, BLOCK_D], WORK)
    mean_key = tl.zeros([BLOCK_I, BLOCK_D], WORK)
    if NEAREST:
        first, num_seen = _listed(starts, tl.program_id(1), chunk_size)
    else:
        first = first + tl.program_id(1) * chunk_size
    for begin in range(0, num_seen, BLOCK_J):
        token, is_key = _seen(
            order,
            num_tokens,
            chunk_size,
            num_slots,
            fill,
            chunks,
            first,
            begin,
            num_seen,
            EXACT,
            EXACT,
            NEAREST,
            BLOCK_J,
        )
        k = _rows(key, token, is_key, QUERY_DIM, 0, BLOCK_D).to(WORK)
        if UNIT:
            k = k / _lengths(k, FLOOR, BLOCK_J)[0][:, None]
        v = _rows(value, token, is_key, VALUE_DIM, START, BLOCK_E)
        scores = SCALE * tl.dot(q, tl.trans(k), out_dtype=WORK, input_precision=PRECISION)
        weights = tl.where(is_key[None, :], tl.exp(scores - m_i[:, None]) * inverse_l[:, None], 0.0)
        grad_weights = tl.dot(grad.to(DOT), tl.trans(v.to(DOT)), out_dtype=WORK, input_precision=PRECISION)
        contributions = weights * grad_weights
        delta_i += tl.sum(contributions, 1)
        result += tl.dot(contributions, k, out_dtype=WORK, input_precision=PRECISION)
        mean_key += tl.dot(weights, k, out_dtype=WORK, input_precision=PRECISION)
    if START == 0 and LSE:
        delta_i -= tl.load(grad_lse + query_token, mask=is_query, other=0.0)
    tl.store(delta + query_token, delta_i, mask=is_query)
    _put(grad_query, query_token, is_query, SCALE * (result - delta_i[:, None] * mean_key), QUERY_DIM, 0, BLOCK_D)


@_kernel
def backward_key(
    grad_output,
    query,
    key,
    value,
    order,
    chunks,
    starts,
    maximum,
    inverse,
    delta,
    grad_key,
    grad_value,
    num_tokens,
    chunk_size,
    num_slots,
    first,
    num_seen,
    fill,
    num_repeats,
    SCALE: tl.constexpr,
    EXACT: tl.constexpr,
    NEAREST: tl.constexpr,
    UNIT: tl.constexpr,
    FLOOR: tl.constexpr,
    QUERY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    START: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    WORK: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute the gradients of BLOCK_I keys and values of a chunk; program ids are (block of keys, chunk, sample).

    `first` is the first slot that sees chunk 0, and `num_seen` the number of slots that do; if NEAREST, chunk t of
    sample b is seen by the `chunks` from `starts[b, t]` up to `starts[b, t + 1]`. The token of a slot may be repeated
    in up to `num_repeats` slots past the last token, all in the last chunk; queries that see that chunk see it there
    as well. If UNIT, the gradient of keys is added to what `grad_key` holds, that of queries, which are the same rows.
    """
    order += tl.program_id(2).to(tl.int64) * num_tokens
    key_slot, key_token, is_key = _own(order, chunk_size, num_tokens, BLOCK_I)
    k = _rows(key, key_token, is_key, QUERY_DIM, 0, BLOCK_D).to(WORK)
    if UNIT:
        length, short = _lengths(k, FLOOR, BLOCK_I)
        k = k / length[:, None]
    v = _rows(value, key_token, is_key, VALUE_DIM, START, BLOCK_E)

    to_key = tl.zeros([BLOCK_I, BLOCK_D], WORK)
    to_value = tl.zeros([BLOCK_I, BLOCK_E], WORK)
    turns = 1
    if not EXACT:
        # The first slot past the last token that repeats this one: `fill` takes it back to `key_slot`.
        repeat = num_tokens + (key_slot + num_tokens - fill) % num_tokens
        if tl.max((is_key & (repeat < num_slots)).to(tl.int32), 0) > 0:
            turns += num_repeats
    for turn in range(0, turns):
        is_shown, chunk = is_key, tl.program_id(1)
        if not EXACT:
            is_shown = is_key & ((turn == 0) | (repeat + (turn - 1) * num_tokens < num_slots))
            chunk = tl.where(turn == 0, chunk, tl.num_programs(1) - 1)
        start = first + chunk * chunk_size
        if NEAREST:
            start, num_seen = _listed(starts, chunk, chunk_size)
        for begin in range(0, num_seen, BLOCK_J):
            token, is_query = _seen(
                order,
                num_tokens,
                chunk_size,
                num_slots,
                fill,
                chunks,
                start,
                begin,
                num_seen,
                True,
                EXACT,
                NEAREST,
                BLOCK_J,
            )
            q = _rows(query, token, is_query, QUERY_DIM, 0, BLOCK_D).to(WORK)
            grad = _rows(grad_output, token, is_query, VALUE_DIM, START, BLOCK_E)
            m_i = tl.load(maximum + token, mask=is_query, other=0.0)
            inverse_l = tl.load(inverse + token, mask=is_query, other=0.0)
            delta_i = tl.load(delta + token, mask=is_query, other=0.0)
            scores = SCALE * tl.dot(k, tl.trans(q), out_dtype=WORK, input_precision=PRECISION)
            # What is no query has `inverse_l` 0 and, as its row is 0, a finite score; what is no key is not written.
            weights = tl.exp(scores - m_i[None, :]) * inverse_l[None, :]
            if not EXACT:
                weights = tl.where(is_shown[:, None], weights, 0.0)
            grad_weights = tl.dot(v.to(DOT), tl.trans(grad.to(DOT)), out_dtype=WORK, input_precision=PRECISION)
            grad_scores = weights * (grad_weights - delta_i[None, :])
            to_value += tl.dot(weights.to(grad.dtype).to(DOT), grad.to(DOT), out_dtype=WORK, input_precision=PRECISION)
            to_key += tl.dot(grad_scores, q, out_dtype=WORK, input_precision=PRECISION)
    to_key = SCALE * to_key
    if UNIT:
        along = tl.where(short, 0.0, tl.sum(k * to_key, 1))
        to_key = (to_key - along[:, None] * k) / length[:, None]
        to_key += _rows(grad_key, key_token, is_key, QUERY_DIM, 0, BLOCK_D)
    _put(grad_key, key_token, is_key, to_key, QUERY_DIM, 0, BLOCK_D)
    _put(grad_value, key_token, is_key, to_value, VALUE_DIM, START, BLOCK_E)


@_kernel
def nearest(
    points,
    centroids,
    best,
    index,
    num_points,
    num_clusters,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    WORK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Find the centroid with the largest dot product for BLOCK_I points; the lowest index wins a tie."""
    point = tl.program_id(0).to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I)
    is_point = point < num_points
    p = _rows(points, point, is_point, WIDTH, 0, BLOCK_D).to(WORK)
    m_i = tl.full([BLOCK_I], float("-inf"), WORK)
    winner = tl.zeros([BLOCK_I], tl.int32)
    for begin in range(0, num_clusters, BLOCK_J):
        cluster = begin + tl.arange(0, BLOCK_J)
        is_cluster = cluster < num_clusters
        c = _rows(centroids, cluster, is_cluster, WIDTH, 0, BLOCK_D).to(WORK)
        scores = tl.dot(p, tl.trans(c), out_dtype=WORK, input_precision=PRECISION)
        scores = tl.where(is_cluster[None, :], scores, float("-inf"))
        larger = tl.max(scores, 1)
        lowest = tl.min(tl.where(scores == larger[:, None], cluster[None, :], num_clusters), 1)
        winner = tl.where(larger > m_i, lowest, winner)
        m_i = tl.maximum(m_i, larger)
    tl.store(best + point, m_i, mask=is_point)
    tl.store(index + point, winner, mask=is_point)


@_kernel
def chain(similarity, num_updates, rank, num_clusters, every, BLOCK: tl.constexpr):
    """Compute the greedy path from cluster 0 to the most similar remaining cluster; the lowest index wins a tie."""
    updates = tl.load(num_updates)
    if ((updates & (updates - 1)) == 0) | (updates % every == 0):
        cluster = tl.arange(0, BLOCK)
        left = cluster < num_clusters
        here = 0
        for place in range(num_clusters):
            tl.store(rank + here, place)
            left = left & (cluster != here)
            row = tl.load(similarity + here * num_clusters + cluster, mask=left, other=-(2**30))
            here = tl.min(tl.where(left & (row == tl.max(row, 0)), cluster, BLOCK), 0)
            here = tl.minimum(here, num_clusters - 1)


@_kernel
def apply_pending(
    centroids,
    usage,
    sums,
    counts,
    seeds,
    num_updates,
    num_clusters,
    width,
    DECAY: tl.constexpr,
    THRESHOLD: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Apply the pending update of k-means, as `kmeans.apply_pending`; one program."""
    cluster, column = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    real = cluster < num_clusters
    mask = real[:, None] & (column < width)[None, :]
    at = cluster[:, None] * width + column[None, :]
    count = tl.load(counts + cluster, mask=real, other=0.0)
    total = tl.sum(count, 0)
    if total > 0:
        old = tl.load(centroids + at, mask=mask, other=0.0)
        used = tl.load(usage + cluster, mask=real, other=0.0)
        # Numbers by themselves would be float32.
        eps, updates = tl.full([BLOCK_K], EPS, used.dtype), tl.load(num_updates)
        decay = (1 + updates).to(used.dtype) / (10 + updates).to(used.dtype)
        decay = tl.minimum(decay, tl.full([], DECAY, used.dtype))
        added = tl.load(sums + at, mask=mask, other=0.0)
        length = tl.sqrt(tl.sum(added * added, 1))
        moved = decay * old + (1 - decay) * (added / tl.maximum(length, eps)[:, None])
        moved_length = tl.sqrt(tl.sum(moved * moved, 1))
        keeps = (count == 0) | (length <= eps) | (moved_length <= eps)
        new = tl.where(keeps[:, None], old, moved / tl.maximum(moved_length, eps)[:, None])
        used = decay * used + (1 - decay) * (count / total)

        seed = tl.load(seeds + at, mask=mask, other=0.0)
        num_seeds = tl.sum((tl.sum(seed * seed, 1) > 0.25).to(tl.int32), 0)
        dead = real & (used * num_clusters < tl.full([BLOCK_K], THRESHOLD, used.dtype))
        turn = tl.cumsum(dead.to(tl.int32), 0) - 1
        dead = dead & (turn < num_seeds)
        taken = seeds + turn[:, None] * width + column[None, :]
        new = tl.where(dead[:, None], tl.load(taken, mask=mask & dead[:, None], other=0.0), new)
        used = tl.where(dead, tl.full([BLOCK_K], 1.0, used.dtype) / num_clusters, used)
        tl.store(centroids + at, new, mask=mask)
        tl.store(usage + cluster, used, mask=real)
        tl.store(num_updates, updates + 1)


@triton.jit
def _units(points, point, is_point, WIDTH: tl.constexpr, EPS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr):
    """Return BLOCK points at unit length in float32, and their lengths."""
    p = _rows(points, point, is_point, WIDTH, 0, BLOCK_D).to(tl.float32)
    length = tl.sqrt(tl.sum(p * p, 1))
    return p / tl.maximum(length, tl.full([BLOCK], EPS, tl.float32))[:, None], length


@_kernel
def sum_points(
    points,
    best,
    assignment,
    part_sums,
    part_counts,
    keys,
    num_points,
    num_clusters,
    share,
    WIDTH: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Sum and count the unit vectors of `share` points for BLOCK_K clusters; program ids are (part, block of clusters).

    A point that is not finite spoils the sums of its part for all clusters. Also writes a key of each point: keys rise
    with the similarity to the centroid, then with the index. A point without direction comes last, and NaN after it.
    """
    part, cluster = tl.program_id(0), tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    sums, counts = tl.zeros([BLOCK_K, BLOCK_D], tl.float32), tl.zeros([BLOCK_K], tl.int32)
    for begin in range(0, share, BLOCK_I):
        point = part.to(tl.int64) * share + begin + tl.arange(0, BLOCK_I)
        is_point = point < num_points
        unit, length = _units(points, point, is_point, WIDTH, EPS, BLOCK_D, BLOCK_I)
        own = tl.load(assignment + point, mask=is_point, other=-1)
        member = own[None, :] == cluster[:, None]
        sums += tl.dot(member.to(tl.float32), unit, input_precision="ieee")
        counts += tl.sum(member.to(tl.int32), 1)
        if tl.program_id(1) == 0:
            directed = length > tl.full([BLOCK_I], EPS, tl.float32)
            similarity = tl.load(best + point, mask=is_point, other=0.0) / tl.where(directed, length, 1.0)
            similarity = tl.where(directed, similarity, float("inf"))
            similarity = tl.where(similarity == 0, 0.0, similarity)  # -0.0 is equal
            bits = similarity.to(tl.int32, bitcast=True)
            bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
            bits = tl.where(tl.abs(similarity) >= 0, bits, 0x7FFFFFFF)
            tl.store(keys + point, (bits.to(tl.int64) << 32) | point, mask=is_point)
    column = tl.arange(0, BLOCK_D)
    row = part.to(tl.int64) * num_clusters + cluster
    mask = cluster < num_clusters
    tl.store(part_sums + row[:, None] * WIDTH + column[None, :], sums, mask=mask[:, None] & (column < WIDTH)[None, :])
    tl.store(part_counts + row, counts, mask=mask)


@_kernel
def store_pending(
    points,
    part_sums,
    part_counts,
    chosen,
    sums,
    counts,
    seeds,
    num_skipped,
    num_clusters,
    num_parts,
    num_chosen,
    WIDTH: tl.constexpr,
    EPS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum the parts of `sum_points` for BLOCK_K clusters, and write as many seeds, the points with the chosen keys.

    If ACCUMULATE, add to `sums` and `counts`. All is 0 if a point is not finite; then a skipped step is counted.
    """
    cluster, column = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    is_cluster = cluster < num_clusters
    mask = is_cluster[:, None] & (column < WIDTH)[None, :]
    at = cluster[:, None] * WIDTH + column[None, :]
    total, count = tl.zeros([BLOCK_K, BLOCK_D], tl.float32), tl.zeros([BLOCK_K], tl.int64)
    for _ in range(num_parts):
        total += tl.load(part_sums + at, mask=mask, other=0.0)
        count += tl.load(part_counts + cluster, mask=is_cluster, other=0)
        part_sums += num_clusters * WIDTH
        part_counts += num_clusters
    # Each program sees each point that is not finite: it is in the sums of all clusters.
    finite = tl.max((~(tl.abs(total) < float("inf"))).to(tl.int32)) == 0
    total, added = tl.where(finite, total, 0.0), tl.where(finite, count, 0).to(tl.float32)
    if ACCUMULATE:
        total += tl.load(sums + at, mask=mask, other=0.0)
        added += tl.load(counts + cluster, mask=is_cluster, other=0.0)
    tl.store(sums + at, total, mask=mask)
    tl.store(counts + cluster, added, mask=is_cluster)
    is_seed = (cluster < num_chosen) & finite
    point = tl.load(chosen + cluster, mask=is_seed, other=0) & 0xFFFFFFFF
    unit, _ = _units(points, point, is_seed, WIDTH, EPS, BLOCK_D, BLOCK_K)
    tl.store(seeds + at, unit, mask=mask)
    if tl.program_id(0) == 0:
        tl.store(num_skipped, tl.load(num_skipped) + (1 - finite.to(tl.int32)))


@triton.jit
def _members(
    assignment, rank, begin, num_tokens, num_clusters, num_ranks, BLOCK_I: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Return BLOCK_I tokens of a sample, from `begin` on, and for each whether its cluster is at each place."""
    token = begin + tl.arange(0, BLOCK_I)
    mask = token < num_tokens
    sample = tl.program_id(1)
    cluster = tl.load(assignment + sample.to(tl.int64) * num_tokens + token, mask=mask, other=0)
    place = tl.load(rank + sample % num_ranks * num_clusters + cluster, mask=mask, other=-1)
    return token, (place[:, None] == tl.arange(0, BLOCK_K)[None, :]).to(tl.int32)


@_kernel
def count_places(
    assignment,
    rank,
    counts,
    num_tokens,
    num_clusters,
    num_ranks,
    share,
    BLOCK_I: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Count the tokens at each place among `share` tokens; program ids are (part, sample)."""
    count = tl.zeros([BLOCK_K], tl.int32)
    begin = tl.program_id(0) * share
    for start in range(0, share, BLOCK_I):
        _, member = _members(assignment, rank, begin + start, num_tokens, num_clusters, num_ranks, BLOCK_I, BLOCK_K)
        count += tl.sum(member, 0)
    row = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    tl.store(counts + row * BLOCK_K + tl.arange(0, BLOCK_K), count)


@_kernel
def sort_tokens(
    assignment,
    rank,
    counts,
    order,
    num_tokens,
    num_clusters,
    num_ranks,
    share,
    BLOCK_I: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Write `share` tokens in the order of the places of their clusters, then of tokens; programs as `count_places`."""
    sample, place = tl.program_id(1).to(tl.int64), tl.arange(0, BLOCK_K)
    counts += sample * tl.num_programs(0) * BLOCK_K
    total, before = tl.zeros([BLOCK_K], tl.int32), tl.zeros([BLOCK_K], tl.int32)
    for start in range(0, tl.num_programs(0), BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)
        is_part = (part < tl.num_programs(0))[:, None]
        count = tl.load(counts + part[:, None] * BLOCK_K + place[None, :], mask=is_part, other=0)
        total += tl.sum(count, 0)
        before += tl.sum(tl.where((part < tl.program_id(0))[:, None], count, 0), 0)
    slot = tl.cumsum(total, 0) - total + before
    begin = tl.program_id(0) * share
    for start in range(0, share, BLOCK_I):
        token, member = _members(assignment, rank, begin + start, num_tokens, num_clusters, num_ranks, BLOCK_I, BLOCK_K)
        own = tl.sum(member * (slot[None, :] + tl.cumsum(member, 0) - 1), 1)
        tl.store(order + sample * num_tokens + own, token.to(tl.int64), mask=token < num_tokens)
        slot += tl.sum(member, 0)
