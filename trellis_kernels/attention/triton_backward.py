# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
"""Attention backward, without atomics: a program owns the rows it writes, so the sums have one order.

    p = exp(q . k scale - logsumexp)      dv = p^T dout      ds = p (dout . v - dout . out)
    dq = scale ds k                       dk = scale ds^T q

Full attention: one kernel for dq, which leaves ``dout . out`` behind, then one for dk and dv. Windows: one kernel for
all three, because what it reads for the one is still in the cache for the others.
"""

import triton
import triton.language as tl

from trellis_kernels.attention.triton_tiles import (
    add_product,
    find_program,
    inner_products,
    load_rows,
    rows_at,
    sequence_range,
    store_rows,
)

LOG2_E = tl.constexpr(1.4426950408889634)  # powers of two are what the hardware computes


@triton.jit
def _row_products(a, a_tail, b, b_tail, TAIL: tl.constexpr):
    """The inner product of each row of a with the same row of b, in float32."""
    total = tl.sum(a.to(tl.float32) * b.to(tl.float32), 1)
    if TAIL > 0:
        total += tl.sum(a_tail.to(tl.float32) * b_tail.to(tl.float32), 1)
    return total


@triton.jit
def _fold_keys(
    gradient, gradient_tail, q, q_tail, upstream, upstream_tail, logsumexp, inner,
    key, value, order, start, end, keys, key_row, value_row, scale,
    GATHERED: tl.constexpr, MASK: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_K: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Add what one tile of keys gives to the gradient of a tile of queries."""
    positions = start + tl.arange(0, BLOCK_K)
    rows, inside = rows_at(order, positions, end, keys, GATHERED)
    k, k_tail = load_rows(key, rows, inside, key_row, D, HEAD, TAIL, MASK)
    v, v_tail = load_rows(value, rows, inside, value_row, D, HEAD, TAIL, MASK)
    logits = inner_products(q, q_tail, k, k_tail, TAIL, WIDEN)
    probability = tl.exp2(logits * (scale * LOG2_E) - logsumexp[:, None])
    if MASK:
        probability = tl.where((positions < end)[None, :], probability, 0.0)
    change = inner_products(upstream, upstream_tail, v, v_tail, TAIL, WIDEN)
    logits_gradient = (probability * (change - inner[:, None])).to(k.dtype)
    gradient = add_product(logits_gradient, k, gradient, WIDEN)
    if TAIL > 0:
        gradient_tail = add_product(logits_gradient, k_tail, gradient_tail, WIDEN)
    return gradient, gradient_tail


@triton.jit
def _fold_queries(
    key_sum, key_sum_tail, value_sum, value_sum_tail, k, k_tail, v, v_tail,
    query, upstream, out, logsumexp, inner, order, start, end, rows, heads, query_row, upstream_row, scale,
    GATHERED: tl.constexpr, MASK: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_Q: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Add what one tile of queries gives to the gradients of a tile of keys and values.

    Queries past the end are zeros with zeros from upstream: they add nothing.
    """
    row, inside = rows_at(order, start + tl.arange(0, BLOCK_Q), end, rows, GATHERED)
    q, q_tail = load_rows(query, row, inside, query_row, D, HEAD, TAIL, MASK)
    u, u_tail = load_rows(upstream, row, inside, upstream_row, D, HEAD, TAIL, MASK)
    if GATHERED:  # one to three tiles: cheaper than a kernel of its own
        o, o_tail = load_rows(out, row, inside, heads * D, D, HEAD, TAIL, MASK)
        inner_of_row = _row_products(u, u_tail, o, o_tail, TAIL)
    else:
        inner_of_row = tl.load(inner + row * heads, mask=inside, other=0.0)
    logsumexp_of_row = tl.load(logsumexp + row * heads, mask=inside, other=0.0) * LOG2_E
    logits = inner_products(k, k_tail, q, q_tail, TAIL, WIDEN)  # keys by queries
    probability = tl.exp2(logits * (scale * LOG2_E) - logsumexp_of_row[None, :])
    rounded = probability.to(u.dtype)
    value_sum = add_product(rounded, u, value_sum, WIDEN)
    change = inner_products(v, v_tail, u, u_tail, TAIL, WIDEN)
    logits_gradient = (probability * (change - inner_of_row[None, :])).to(q.dtype)
    key_sum = add_product(logits_gradient, q, key_sum, WIDEN)
    if TAIL > 0:
        value_sum_tail = add_product(rounded, u_tail, value_sum_tail, WIDEN)
        key_sum_tail = add_product(logits_gradient, q_tail, key_sum_tail, WIDEN)
    return key_sum, key_sum_tail, value_sum, value_sum_tail


@triton.jit
def _query_gradient(
    upstream, query, key, value, out, logsumexp, order, row, inside, begin, end, keys, heads, scale,
    upstream_row, query_row, key_row, value_row,
    GATHERED: tl.constexpr, SPLIT: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of queries, in both parts, and ``dout . out`` of its rows. Pointers are at the head."""
    q, q_tail = load_rows(query, row, inside, query_row, D, HEAD, TAIL)
    u, u_tail = load_rows(upstream, row, inside, upstream_row, D, HEAD, TAIL)
    o, o_tail = load_rows(out, row, inside, heads * D, D, HEAD, TAIL)
    logarithm = tl.load(logsumexp + row * heads, mask=inside, other=0.0) * LOG2_E
    inner = _row_products(u, u_tail, o, o_tail, TAIL)
    gradient = tl.zeros([BLOCK_Q, HEAD], tl.float32)
    gradient_tail = tl.zeros([BLOCK_Q, TAIL if TAIL > 0 else 16], tl.float32)
    if SPLIT:  # tiles that are whole need no mask
        whole = end - (end - begin) % BLOCK_K
        for start in tl.range(begin, whole, BLOCK_K):
            gradient, gradient_tail = _fold_keys(
                gradient, gradient_tail, q, q_tail, u, u_tail, logarithm, inner, key, value, order, start, end, keys,
                key_row, value_row, scale, GATHERED, False, D, HEAD, TAIL, BLOCK_K, WIDEN,
            )  # fmt: skip
        if whole < end:
            gradient, gradient_tail = _fold_keys(
                gradient, gradient_tail, q, q_tail, u, u_tail, logarithm, inner, key, value, order, whole, end, keys,
                key_row, value_row, scale, GATHERED, True, D, HEAD, TAIL, BLOCK_K, WIDEN,
            )  # fmt: skip
    else:
        for start in tl.range(begin, end, BLOCK_K):
            gradient, gradient_tail = _fold_keys(
                gradient, gradient_tail, q, q_tail, u, u_tail, logarithm, inner, key, value, order, start, end, keys,
                key_row, value_row, scale, GATHERED, True, D, HEAD, TAIL, BLOCK_K, WIDEN,
            )  # fmt: skip
    return gradient * scale, gradient_tail * scale, inner


@triton.jit
def _key_gradients(
    upstream, query, key, value, out, logsumexp, inner, order, row, inside, begin, end, rows, heads, scale,
    upstream_row, query_row, key_row, value_row,
    GATHERED: tl.constexpr, SPLIT: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """The gradients of a tile of keys and of its values, each in both parts. Pointers are at the head."""
    k, k_tail = load_rows(key, row, inside, key_row, D, HEAD, TAIL)
    v, v_tail = load_rows(value, row, inside, value_row, D, HEAD, TAIL)
    dk = tl.zeros([BLOCK_K, HEAD], tl.float32)
    dv = tl.zeros([BLOCK_K, HEAD], tl.float32)
    dk_tail = tl.zeros([BLOCK_K, TAIL if TAIL > 0 else 16], tl.float32)
    dv_tail = tl.zeros([BLOCK_K, TAIL if TAIL > 0 else 16], tl.float32)
    if SPLIT:
        whole = end - (end - begin) % BLOCK_Q
        for start in tl.range(begin, whole, BLOCK_Q):
            dk, dk_tail, dv, dv_tail = _fold_queries(
                dk, dk_tail, dv, dv_tail, k, k_tail, v, v_tail, query, upstream, out, logsumexp, inner, order, start,
                end, rows, heads, query_row, upstream_row, scale, GATHERED, False, D, HEAD, TAIL, BLOCK_Q, WIDEN,
            )  # fmt: skip
        if whole < end:
            dk, dk_tail, dv, dv_tail = _fold_queries(
                dk, dk_tail, dv, dv_tail, k, k_tail, v, v_tail, query, upstream, out, logsumexp, inner, order, whole,
                end, rows, heads, query_row, upstream_row, scale, GATHERED, True, D, HEAD, TAIL, BLOCK_Q, WIDEN,
            )  # fmt: skip
    else:
        for start in tl.range(begin, end, BLOCK_Q):
            dk, dk_tail, dv, dv_tail = _fold_queries(
                dk, dk_tail, dv, dv_tail, k, k_tail, v, v_tail, query, upstream, out, logsumexp, inner, order, start,
                end, rows, heads, query_row, upstream_row, scale, GATHERED, True, D, HEAD, TAIL, BLOCK_Q, WIDEN,
            )  # fmt: skip
    return dk * scale, dk_tail * scale, dv, dv_tail


@triton.jit(do_not_specialize=["rows", "keys", "sequences", "search_steps", "slots"])
def query_gradient(
    upstream, query, key, value, out, logsumexp, query_offsets, key_offsets, dq, inner,
    rows, keys, sequences, search_steps, slots, heads, scale,
    upstream_row, upstream_head, query_row, query_head, key_row, key_head, value_row, value_head,
    SPLIT: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    sequence, first, end, head = find_program(
        query_offsets, sequences, search_steps, rows, heads, slots, BLOCK_Q, False
    )
    if first >= end:
        return
    row, inside = rows_at(query_offsets, first + tl.arange(0, BLOCK_Q), end, rows, False)
    begin_key, end_key = sequence_range(key_offsets, sequence, keys)
    gradient, gradient_tail, products = _query_gradient(
        upstream + head * upstream_head, query + head * query_head, key + head * key_head, value + head * value_head,
        out + head * D, logsumexp + head, query_offsets, row, inside, begin_key, end_key, keys, heads, scale,
        upstream_row, query_row, key_row, value_row, False, SPLIT, D, HEAD, TAIL, BLOCK_Q, BLOCK_K, WIDEN,
    )  # fmt: skip
    store_rows(dq + head * D, row, inside, heads * D, gradient, gradient_tail, D, HEAD, TAIL)
    tl.store(inner + row * heads + head, products, mask=inside)


@triton.jit(do_not_specialize=["rows", "keys", "sequences", "search_steps", "slots"])
def key_gradients(
    upstream, query, key, value, logsumexp, inner, query_offsets, key_offsets, dk, dv,
    rows, keys, sequences, search_steps, slots, heads, scale,
    upstream_row, upstream_head, query_row, query_head, key_row, key_head, value_row, value_head,
    SPLIT: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    sequence, first, end, head = find_program(key_offsets, sequences, search_steps, keys, heads, slots, BLOCK_K, False)
    if first >= end:
        return
    row, inside = rows_at(key_offsets, first + tl.arange(0, BLOCK_K), end, keys, False)
    begin_row, end_row = sequence_range(query_offsets, sequence, rows)
    of_key, of_key_tail, of_value, of_value_tail = _key_gradients(
        upstream + head * upstream_head, query + head * query_head, key + head * key_head, value + head * value_head,
        upstream, logsumexp + head, inner + head, key_offsets, row, inside, begin_row, end_row, rows, heads, scale,
        upstream_row, query_row, key_row, value_row, False, SPLIT, D, HEAD, TAIL, BLOCK_Q, BLOCK_K, WIDEN,
    )  # fmt: skip
    store_rows(dk + head * D, row, inside, heads * D, of_key, of_key_tail, D, HEAD, TAIL)
    store_rows(dv + head * D, row, inside, heads * D, of_value, of_value_tail, D, HEAD, TAIL)


@triton.jit(do_not_specialize=["rows", "sequences", "search_steps", "slots"])
def window_gradients(
    upstream, qkv, out, logsumexp, order, offsets, gradient,
    rows, sequences, search_steps, slots, heads, scale,
    upstream_row, upstream_head, row_stride, part_stride, head_stride,
    D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """``gradient [N, 3, H, D]`` of a tile of rows as queries, then of the same rows as keys and values."""
    sequence, first, end, head = find_program(offsets, sequences, search_steps, rows, heads, slots, BLOCK, True)
    if first >= end:
        return
    row, inside = rows_at(order, first + tl.arange(0, BLOCK), end, rows, True)
    begin, end = sequence_range(offsets, sequence, rows)
    upstream += head * upstream_head
    query = qkv + head * head_stride
    key = query + part_stride
    value = key + part_stride
    out += head * D
    logsumexp += head
    gradient += head * D
    of_query, of_query_tail, _ = _query_gradient(
        upstream, query, key, value, out, logsumexp, order, row, inside, begin, end, rows, heads, scale,
        upstream_row, row_stride, row_stride, row_stride, True, False, D, HEAD, TAIL, BLOCK, BLOCK, WIDEN,
    )  # fmt: skip
    store_rows(gradient, row, inside, 3 * heads * D, of_query, of_query_tail, D, HEAD, TAIL)
    of_key, of_key_tail, of_value, of_value_tail = _key_gradients(
        upstream, query, key, value, out, logsumexp, logsumexp, order, row, inside, begin, end, rows, heads, scale,
        upstream_row, row_stride, row_stride, row_stride, True, False, D, HEAD, TAIL, BLOCK, BLOCK, WIDEN,
    )  # fmt: skip
    store_rows(gradient + heads * D, row, inside, 3 * heads * D, of_key, of_key_tail, D, HEAD, TAIL)
    store_rows(gradient + 2 * heads * D, row, inside, 3 * heads * D, of_value, of_value_tail, D, HEAD, TAIL)
