# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
"""What the attention kernels share: which tile a program works on, its rows, reading them, products.

A head of D columns is held in two parts of HEAD and TAIL columns, powers of two, so that 80 = 64 + 16 costs no more
than 80. TAIL = 0: there is no second part, and what stands for it is never used.
"""

import triton
import triton.language as tl


@triton.jit
def find_program(offsets, sequences, search_steps, rows, heads, slots, BLOCK: tl.constexpr, GATHERED: tl.constexpr):
    """The sequence, the first and the last-but-one position and the head of this program; nothing if first >= end.

    Sequence s owns the slots from ``offsets[s] // BLOCK + s`` on, which are enough for its tiles:
    ceil((b - a) / BLOCK) <= b // BLOCK - a // BLOCK + 1. So neither the host nor a prefix sum has to count tiles.
    """
    program = tl.program_id(0)
    if GATHERED:  # neighboring programs read neighboring columns of the same scattered rows
        head = program % heads
        slot = program // heads
    else:  # neighboring programs share the keys of a head
        head = program // slots
        slot = program % slots
    sequence = 0
    above = sequences
    for _ in range(search_steps):
        middle = (sequence + above) // 2
        found = tl.load(offsets + middle) // BLOCK + middle <= slot
        sequence = tl.where(found, middle, sequence)
        above = tl.where(found, above, middle)
    begin, end = sequence_range(offsets, sequence, rows)
    first = tl.maximum(begin + (slot - begin // BLOCK - sequence) * BLOCK, begin)
    return sequence, first, end, head


@triton.jit
def sequence_range(offsets, sequence, rows):
    """Where a sequence begins and ends: inside the tensor whatever `offsets` holds."""
    begin = tl.minimum(tl.maximum(tl.load(offsets + sequence), 0), rows)
    end = tl.minimum(tl.maximum(tl.load(offsets + sequence + 1), begin), rows)
    return begin, end


@triton.jit
def rows_at(order, positions, end, rows, GATHERED: tl.constexpr):
    """Row numbers, as int64, at `positions` of a sequence, and which of them there are."""
    inside = positions < end
    found = positions
    if GATHERED:
        found = tl.load(order + positions, mask=inside, other=0)
        inside = inside & (found >= 0) & (found < rows)  # nothing checked `order`: that would wait for the GPU
    return found.to(tl.int64), inside


@triton.jit
def load_part(base, rows, inside, stride, D: tl.constexpr, FROM: tl.constexpr, WIDTH: tl.constexpr, MASK: tl.constexpr):
    """``[len(rows), WIDTH]``: columns FROM on of the rows, zeros outside."""
    columns = FROM + tl.arange(0, WIDTH)
    pointers = base + rows[:, None] * stride + columns[None, :]
    if FROM + WIDTH > D:
        part = tl.load(pointers, mask=inside[:, None] & (columns < D)[None, :], other=0.0)
    elif MASK:
        part = tl.load(pointers, mask=inside[:, None], other=0.0)
    else:
        part = tl.load(pointers)
    return part


@triton.jit
def load_rows(
    base, rows, inside, stride, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, MASK: tl.constexpr = True
):
    """Both parts of the rows of one head."""
    part = load_part(base, rows, inside, stride, D, 0, HEAD, MASK)
    tail = part
    if TAIL > 0:
        tail = load_part(base, rows, inside, stride, D, HEAD, TAIL, MASK)
    return part, tail


@triton.jit
def store_part(base, rows, inside, stride, part, D: tl.constexpr, FROM: tl.constexpr, WIDTH: tl.constexpr):
    columns = FROM + tl.arange(0, WIDTH)
    mask = inside[:, None]
    if FROM + WIDTH > D:
        mask = mask & (columns < D)[None, :]
    tl.store(base + rows[:, None] * stride + columns[None, :], part.to(base.dtype.element_ty), mask=mask)


@triton.jit
def store_rows(base, rows, inside, stride, part, tail, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """Write both parts of the rows of one head, rounded to the dtype of the memory."""
    store_part(base, rows, inside, stride, part, D, 0, HEAD)
    if TAIL > 0:
        store_part(base, rows, inside, stride, tail, D, HEAD, TAIL)


@triton.jit
def add_product(a, b, total, WIDEN: tl.constexpr):
    """``total + a b`` in float32; WIDEN because the interpreter's products of half precision are not the GPU's."""
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def inner_products(a, a_tail, b, b_tail, TAIL: tl.constexpr, WIDEN: tl.constexpr):
    """``[rows of a, rows of b]`` float32: each row of a with each row of b."""
    total = add_product(a, tl.trans(b), tl.zeros([a.shape[0], b.shape[0]], tl.float32), WIDEN)
    if TAIL > 0:
        total = add_product(a_tail, tl.trans(b_tail), total, WIDEN)
    return total
