"""Patches: a grid of any order cut into blocks, one vector of numbers a block."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tensorattn.errors import OptionError
from tensorattn.patching import block_axes, block_shape, grid_of

__all__ = ["choose_patch", "parse_patch", "patch_rows", "patchify"]

ROW_ELEMENTS = 2**22  # elements cut at a time, so that a long recording is never held twice


def parse_patch(text: str, sizes: Sequence[int]) -> tuple[int, ...]:
    """Read the sizes of a patch: one number for every mode, or one a mode.

    Args:
        text: ``"4"`` or ``"1,8,8"``.
        sizes: Sizes of the modes. A patch larger than a mode is cut to the mode.

    Returns:
        Sizes of the patch, one a mode.

    Raises:
        OptionError: If it does not hold positive whole numbers, one or one a mode.

    Examples:
        >>> parse_patch("8", (30, 240, 320)), parse_patch("1,8,8", (30, 240, 320)), parse_patch("8", (4, 64))
        ((8, 8, 8), (1, 8, 8), (4, 8))
    """
    parts = text.replace(",", " ").split()
    if not parts or not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise OptionError(f"--patch must be positive whole numbers, one or one a mode, got {text!r}.")
    if len(parts) not in (1, len(sizes)):
        raise OptionError(f"--patch has {len(parts)} numbers, but there are {len(sizes)} modes: {text!r}.")
    numbers = [int(part) for part in parts] * (len(sizes) if len(parts) == 1 else 1)
    return tuple(min(patch, size) for patch, size in zip(numbers, sizes, strict=True))


def choose_patch(sizes: Sequence[int], max_positions: int) -> tuple[int, ...]:
    """Choose the finest patch of powers of two that leaves few enough positions.

    The mode with the most positions is halved again and again: short modes stay whole.

    Args:
        sizes: Sizes of the modes.
        max_positions: Largest number of patches wanted.

    Returns:
        Sizes of the patch, one a mode.

    Examples:
        >>> choose_patch((30, 240, 320), 600_000), choose_patch((128, 96, 24), 40_000), choose_patch((5,), 100)
        ((1, 2, 2), (4, 2, 1), (1,))
    """
    patch = [1] * len(sizes)
    while math.prod(grid := grid_of(sizes, patch)) > max_positions:
        patch[grid.index(max(grid))] *= 2
    return tuple(patch)


def patchify(array: np.ndarray[Any, Any], patch: Sequence[int]) -> np.ndarray[Any, Any]:
    """Cut an array into patches. Sizes that are not divisible are padded at the end with the last entries.

    Args:
        array: Values ``(n_1, …, n_N, C)``.
        patch: Sizes of a patch, one a mode.

    Returns:
        One vector a patch, ``(g_1, …, g_N, F)`` with ``F`` = channels times elements of a patch.

    Examples:
        >>> patchify(np.arange(5)[:, None], (2,)).tolist()
        [[0, 1], [2, 3], [4, 4]]
        >>> patchify(np.zeros((30, 241, 320, 3)), (1, 2, 2)).shape
        (30, 121, 160, 12)
    """
    sizes, order = array.shape[:-1], len(patch)
    grid = grid_of(sizes, patch)
    missing = [(0, g * p - n) for g, p, n in zip(grid, patch, sizes, strict=True)]
    if any(after for _, after in missing):
        array = np.pad(array, [*missing, (0, 0)], mode="edge")
    blocks = array.reshape(*block_shape(grid, patch), array.shape[-1])
    return blocks.transpose(block_axes(order)).reshape(*grid, -1)


def patch_rows(
    array: np.ndarray[Any, Any], patch: Sequence[int], *, elements: int = ROW_ELEMENTS
) -> Iterator[tuple[slice, np.ndarray[Any, Any]]]:
    """Cut an array into patches, some rows of the first mode at a time.

    Args:
        array: Values ``(n_1, …, n_N, C)``.
        patch: Sizes of a patch, one a mode.
        elements: About how many elements to cut at a time.

    Yields:
        The rows of the first mode of the grid, and their patches as float64.
    """
    rows = grid_of(array.shape[:-1], patch)[0]
    step = max(1, elements * rows // max(1, array.size))
    for start in range(0, rows, step):
        block = array[start * patch[0] : (start + step) * patch[0]]
        yield slice(start, min(start + step, rows)), patchify(block, patch).astype(np.float64, copy=False)
