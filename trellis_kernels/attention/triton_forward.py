# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
"""Attention forward: one program per tile of queries and head, an online softmax over tiles of keys."""

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


@triton.jit
def _fold(
    q, q_tail, out, out_tail, highest, total,
    key, value, order, start, end, keys, key_row, value_row, scale,
    GATHERED: tl.constexpr, MASK: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_K: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Take one tile of keys into the running maximum, sum and weighted values."""
    positions = start + tl.arange(0, BLOCK_K)
    rows, inside = rows_at(order, positions, end, keys, GATHERED)
    k, k_tail = load_rows(key, rows, inside, key_row, D, HEAD, TAIL, MASK)
    v, v_tail = load_rows(value, rows, inside, value_row, D, HEAD, TAIL, MASK)
    logits = inner_products(q, q_tail, k, k_tail, TAIL, WIDEN)
    if MASK:
        logits = tl.where((positions < end)[None, :], logits, float("-inf"))
    higher = tl.maximum(highest, tl.max(logits, 1) * scale)
    probability = tl.exp2(logits * scale - higher[:, None])
    correction = tl.exp2(highest - higher)
    total = total * correction + tl.sum(probability, 1)
    probability = probability.to(v.dtype)
    out = add_product(probability, v, out * correction[:, None], WIDEN)
    if TAIL > 0:
        out_tail = add_product(probability, v_tail, out_tail * correction[:, None], WIDEN)
    return out, out_tail, higher, total


@triton.jit(do_not_specialize=["rows", "keys", "sequences", "search_steps", "slots"])
def attention_forward(
    query, key, value, order, query_offsets, key_offsets, out, logsumexp,
    rows, keys, sequences, search_steps, slots, heads, scale,
    query_row, query_head, key_row, key_head, value_row, value_head,
    GATHERED: tl.constexpr, SPLIT: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    sequence, first, end, head = find_program(
        query_offsets, sequences, search_steps, rows, heads, slots, BLOCK_Q, GATHERED
    )
    if first >= end:
        return
    row, inside = rows_at(order, first + tl.arange(0, BLOCK_Q), end, rows, GATHERED)
    q, q_tail = load_rows(query + head * query_head, row, inside, query_row, D, HEAD, TAIL)
    key += head * key_head
    value += head * value_head
    begin_key, end_key = sequence_range(key_offsets, sequence, keys)

    sums = tl.zeros([BLOCK_Q, HEAD], tl.float32)
    sums_tail = tl.zeros([BLOCK_Q, TAIL if TAIL > 0 else 16], tl.float32)
    highest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    scale *= 1.4426950408889634  # log2(e): powers of two are what the hardware computes
    if SPLIT:  # tiles that are whole need no mask
        whole = end_key - (end_key - begin_key) % BLOCK_K
        for start in tl.range(begin_key, whole, BLOCK_K):
            sums, sums_tail, highest, total = _fold(
                q, q_tail, sums, sums_tail, highest, total, key, value, order, start, end_key, keys, key_row, value_row,
                scale, GATHERED, False, D, HEAD, TAIL, BLOCK_K, WIDEN,
            )  # fmt: skip
        if whole < end_key:
            sums, sums_tail, highest, total = _fold(
                q, q_tail, sums, sums_tail, highest, total, key, value, order, whole, end_key, keys, key_row, value_row,
                scale, GATHERED, True, D, HEAD, TAIL, BLOCK_K, WIDEN,
            )  # fmt: skip
    else:
        for start in tl.range(begin_key, end_key, BLOCK_K):
            sums, sums_tail, highest, total = _fold(
                q, q_tail, sums, sums_tail, highest, total, key, value, order, start, end_key, keys, key_row, value_row,
                scale, GATHERED, True, D, HEAD, TAIL, BLOCK_K, WIDEN,
            )  # fmt: skip
    total = tl.where(begin_key < end_key, total, 1.0)  # no keys: zeros, and the logarithm of zero
    inverse = (1.0 / total)[:, None]
    store_rows(out + head * D, row, inside, heads * D, sums * inverse, sums_tail * inverse, D, HEAD, TAIL)
    natural = (highest + tl.log2(total)) * 0.6931471805599453
    tl.store(logsumexp + row * heads + head, natural, mask=inside)
