"""Patches: how a grid of any order is cut into blocks of one size, from sizes alone."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["block_axes", "block_shape", "grid_of"]


def grid_of(sizes: Sequence[int], patch: Sequence[int]) -> tuple[int, ...]:
    """Return how many patches cover each mode, the last one padded where the size is not divisible.

    Args:
        sizes: Sizes of the modes.
        patch: Sizes of a patch.

    Examples:
        >>> grid_of((30, 240, 322), (4, 8, 8))
        (8, 30, 41)
    """
    return tuple(-(-size // part) for size, part in zip(sizes, patch, strict=True))


def block_shape(grid: Sequence[int], patch: Sequence[int]) -> tuple[int, ...]:
    """Return the shape that shows each mode as patches and places within a patch: ``(g_1, p_1, …, g_N, p_N)``.

    Args:
        grid: Number of patches of each mode.
        patch: Sizes of a patch.

    Examples:
        >>> block_shape((8, 30), (4, 2))
        (8, 4, 30, 2)
    """
    return tuple(part for pair in zip(grid, patch, strict=True) for part in pair)


def block_axes(order: int, *, batch: int = 0, inverse: bool = False) -> tuple[int, ...]:
    """Return the permutation from ``(*batch, g_1, p_1, …, g_N, p_N, C)`` to ``(*batch, g_1 … g_N, p_1 … p_N, C)``.

    Args:
        order: Number of modes N.
        batch: Number of batch dimensions.
        inverse: Whether to return the permutation back.

    Examples:
        >>> block_axes(2, batch=1), block_axes(2, batch=1, inverse=True)
        ((0, 1, 3, 2, 4, 5), (0, 1, 3, 2, 4, 5))
        >>> block_axes(3), block_axes(3, inverse=True)
        ((0, 2, 4, 1, 3, 5, 6), (0, 3, 1, 4, 2, 5, 6))
    """
    modes = range(order)
    inner = [part for m in modes for part in (m, order + m)] if inverse else [2 * m + k for k in (0, 1) for m in modes]
    return (*range(batch), *(batch + axis for axis in inner), batch + 2 * order)
