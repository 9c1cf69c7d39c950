"""The form of a plan: how many orders of rows it has, and what they are orders of."""

from __future__ import annotations

WIDEST_MASK = 27  # taps a word of a plan has room for, beside the number of a block of rows
PARTS = 3  # the planes of a 3x3x3 kernel


def plan_parts(rows: int, taps: int) -> int:
    """How many groups of taps have an order of rows of their own, besides the order for all taps.

    The fewer rows there are, the fewer of them agree in all 27 taps; in the 9 of one plane many still do.
    """
    return PARTS if taps == 27 and rows <= 100_000 else 1


def plan_orders(rows: int, taps: int) -> int:
    """How many orders of rows a plan has: for all taps, then for each of several parts; none for wide kernels."""
    parts = plan_parts(rows, taps)
    return 0 if taps > WIDEST_MASK else 1 if parts == 1 else 1 + parts


def locality(rows: int) -> int:
    """log2 of how many successive rows are ordered among themselves: so few that caches hold their features.

    2^18 at least, where order costs no more taps than without; at most 16 such blocks have room in a word.
    """
    return max(18, max(rows - 1, 0).bit_length() - 4)
