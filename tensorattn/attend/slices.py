"""Slices: which planes of a grid to draw through a query, and how one plane lies on the paper."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Plane", "display_values", "frame_indices", "planes_through"]

CARTESIAN = ("x", "y", "z")  # drawn as in a graph: the first to the right, the second upwards
DARK = 0.6  # colours whose 99.5th percentile is below this share of white are brightened
LARGEST_STRETCH = 2.0  # a panel is at most this much longer than wide


@dataclass(frozen=True)
class Plane:
    """Two modes of a grid that are drawn, the others held at the query.

    Attributes:
        across: Mode drawn from left to right.
        along: Mode drawn from top to bottom, or upwards where ``upwards``.
        upwards: Whether the second mode grows upwards.
    """

    across: int
    along: int
    upwards: bool

    def cut(self, array: np.ndarray[Any, Any], position: Sequence[int]) -> np.ndarray[Any, Any]:
        """Return the slice of an array through a position, ``(along, across, ...)``.

        Args:
            array: Values ``(n_1, …, n_N)`` or ``(n_1, …, n_N, C)``.
            position: One index a mode.
        """
        index: list[int | slice] = [int(i) for i in position]
        index[self.across] = index[self.along] = slice(None)
        plane = array[tuple(index)]
        return plane if self.along < self.across else plane.swapaxes(0, 1)

    def width(self, sizes: Sequence[int]) -> float:
        """Return the width of the panel, for a height of one; long and narrow slices are stretched.

        Args:
            sizes: Sizes of all modes.
        """
        ratio = sizes[self.across] / sizes[self.along]
        return min(LARGEST_STRETCH, max(1 / LARGEST_STRETCH, ratio))


def planes_through(sizes: Sequence[int], names: Sequence[str], *, largest: int = 3) -> tuple[Plane, ...]:
    """Choose the planes to draw: the largest one without time ``t``, then the largest others, at most three.

    Args:
        sizes: Sizes of the modes.
        names: Names of the modes. Modes called x, y, z are drawn as in a graph, others as in an image.
        largest: How many planes.

    Returns:
        The planes; none where there is one mode.

    Examples:
        >>> [(names.along, names.across) for names in planes_through((30, 240, 320), ("t", "h", "w"))]
        [(1, 2), (0, 2), (0, 1)]
    """
    pairs = itertools.combinations(range(len(sizes)), 2)
    ranked = sorted(pairs, key=lambda pair: -math.prod(sizes[mode] for mode in pair))
    still = next((pair for pair in ranked if all(names[mode] != "t" for mode in pair)), None)
    ranked.sort(key=lambda pair: pair != still)
    chosen = []
    for first, second in ranked[:largest]:
        graph = names[first] in CARTESIAN and names[second] in CARTESIAN
        chosen.append(Plane(first, second, True) if graph else Plane(second, first, False))
    return tuple(chosen)


def frame_indices(size: int, shown: int, include: int) -> tuple[int, ...]:
    """Choose evenly spaced indices of a mode, one of which is a given one, as far apart as they can be.

    Args:
        size: Size of the mode.
        shown: How many to choose, at most.
        include: Index that is one of them.

    Returns:
        The indices, ascending.

    Examples:
        >>> frame_indices(30, 6, 15), frame_indices(2, 6, 0)
        ((0, 5, 10, 15, 20, 25), (0, 1))
    """
    count = min(shown, size)
    behind = size - 1 - include
    step = next(s for s in range(size, 0, -1) if include // s + behind // s + 1 >= count)
    before = range(max(0, count - 1 - behind // step), min(include // step, count - 1) + 1)  # how many before it
    first = min((include - n * step for n in before), key=lambda start: abs(2 * start + (count - 1) * step - size + 1))
    return tuple(range(first, first + count * step, step))


def display_values(array: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], str]:
    """Turn the values of a recording into what is drawn: grey or colours between 0 and 1.

    Args:
        array: Values ``(n_1, …, n_N, C)``, finite.

    Returns:
        Values ``(n_1, …, n_N)`` or ``(n_1, …, n_N, 3)``, and in words what they show.
    """
    channels = array.shape[-1]
    if channels in (3, 4) and array.dtype == np.uint8:
        colours = array[..., :3]
        white = np.percentile(colours.reshape(-1)[:: max(1, colours.size // 10**6)], 99.5)
        if not 0 < white < DARK * 255:
            return colours, "colours as stored"
        brightened = np.minimum(colours.astype(np.float32) / white, 1)
        return brightened, f"colours {255 / white:.1f} times as bright, the 99.5th percentile is white"
    if channels == 1:
        grey, words = array[..., 0], "grey from the 0.5th to the 99.5th percentile"
    else:
        grey = array.mean(axis=-1, dtype=np.float64)
        words = f"mean of {channels} channels, grey from the 0.5th to the 99.5th percentile"
    step = max(1, grey.size // 10**6)
    low, high = np.percentile(grey.reshape(-1)[::step].astype(np.float64), (0.5, 99.5))
    span = high - low if high > low else 1.0
    return np.clip((grey.astype(np.float32) - low) / span, 0, 1), words
