"""Slabs: parts of a grid that are worked on one after the other, so that what is computed on the way stays small."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

__all__ = ["CACHED", "ELEMENTS", "POSITIONS", "SMALL", "positions_at_a_time", "slabs_of", "steps_of"]

SMALL = 1 << 15  # elements of a tensor that takes less time to be read several times than a plan does
ELEMENTS = 1 << 19  # elements that are read or written more than once, so that they stay in the cache
CACHED = 1 << 25  # bytes of a tensor that is read as a whole, however often: it may stay in the last-level cache
POSITIONS = 1 << 12  # that are projected, attended from and projected back at a time, of all batch entries together


def steps_of(shape: Sequence[int], elements: int) -> list[int]:
    """Cut a grid into slabs of about the same size, of at most a number of elements, along its outermost dimensions.

    Args:
        shape: Sizes, the outermost in memory first.
        elements: Number of elements.

    Returns:
        For each dimension that is cut, how many of its indices a slab has.

    Examples:
        >>> steps_of((4, 10, 6), 18), steps_of((4, 10, 6), 240)
        ([1, 3], [])
    """
    inner, steps = math.prod(shape), []
    for size in shape:
        if inner <= elements:
            break
        inner //= size
        pieces = math.ceil(size / max(1, elements // inner))
        steps.append(math.ceil(size / pieces))
    return steps


def slabs_of(shape: Sequence[int], elements: int) -> Iterator[tuple[slice, ...]]:
    """Cut a grid into slabs as `steps_of` does.

    Args:
        shape: Sizes, the outermost in memory first.
        elements: Number of elements.

    Returns:
        The slices of each slab.
    """
    steps = steps_of(shape, elements)
    yield from itertools.product(
        *(
            [slice(start, start + step) for start in range(0, size, step)]
            for size, step in zip(shape, steps, strict=False)
        )
    )


def positions_at_a_time(batch: int, positions: int) -> int:
    """Choose how many positions of each batch entry are worked on at a time.

    Fewer of a small grid, so that what they take is a small part of it; never so few that calls cost more than they do.

    Args:
        batch: Number of batch entries.
        positions: Positions of each.
    """
    together = min(POSITIONS, max(POSITIONS // 2, batch * positions // 96))
    return max(1, together // max(1, batch))
