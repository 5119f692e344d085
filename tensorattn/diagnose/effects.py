r"""Effects: a tensor split into its mean, one main effect a mode, and its interaction residual, in float64.

The parts are orthogonal under the weights of the positions, so their variances add up. What is measured here may be
millions of times smaller than the tensor, so it is measured in float64, and from the middle of the range.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tensorattn.contraction import contract
from tensorattn.contraction_tree import main_effects
from tensorattn.modes import GridShape
from tensorattn.weights import Vector, Vectors, check_weights, normalized

__all__ = ["Effects", "Grid", "along_mode", "precise", "read_grid", "split"]


class Grid(NamedTuple):
    """Positions, and how they count.

    Attributes:
        shape: Batch dimensions, mode sizes and channels.
        vectors: For each mode, the share of each index in the weight, ``(*batch, n_m)`` or broadcastable to it; None
            where all have the same.
        present: Which positions count at all, ``(*batch, n_1, …, n_N)``, with fewer batch dimensions or some of size
            1 where they agree; None if all count.
    """

    shape: GridShape
    vectors: Vectors
    present: Tensor | None

    @property
    def modes(self) -> list[int]:
        """Dimensions of the modes in a tensor over the grid."""
        first = len(self.shape.batch)
        return list(range(first, first + len(self.shape.sizes)))

    def present_or(self, tensor: Tensor, fill: float) -> Tensor:
        """Replace what a tensor ``(*batch, n_1, …, n_N, D)`` holds where no position counts."""
        return tensor if self.present is None else tensor.masked_fill(~self.present.unsqueeze(-1), fill)

    def shares(self, like: Tensor) -> tuple[Tensor, ...]:
        """Return the share of each index of each mode, written out, in the type of a tensor."""
        pairs = zip(self.vectors, self.shape.sizes, strict=True)
        return tuple(like.new_full((size,), 1 / size) if vector is None else vector for vector, size in pairs)


class Effects(NamedTuple):
    """Orthogonal parts of a tensor.

    Attributes:
        centred: The tensor less the middle of its range in each channel, zero where no position counts.
        mean: Weighted mean of ``centred``, ``(*batch, D)``.
        main: For each mode, its averages less the mean, ``(*batch, n_m, D)``.
        residual: What is left of the tensor, zero where no position counts.
    """

    centred: Tensor
    mean: Tensor
    main: tuple[Tensor, ...]
    residual: Tensor


def precise(tensor: Tensor) -> Tensor:
    """Return a tensor in float64, where its device has that, without its graph."""
    return tensor.detach().to(torch.float32 if tensor.device.type == "mps" else torch.float64)


def along_mode(vector: Tensor, mode: int, order: int) -> Tensor:
    """View one number an index of a mode, ``(*batch, n_m)``, as a tensor of all modes."""
    return vector.reshape(*vector.shape[:-1], *(-1 if m == mode else 1 for m in range(order)))


def read_grid(tensor: Tensor, shape: GridShape, weights: Sequence[Vector] | None) -> Grid:
    """Check weights, and read them as the operators do, in the type that they accumulate in.

    Args:
        tensor: What is over the grid.
        shape: Its shape, read.
        weights: One vector a mode, or None.

    Raises:
        WeightsError: If weights do not fit the modes.
    """
    checked = [None if vector is None else precise(vector) for vector in check_weights(weights, shape, tensor)]
    flags = [along_mode(v > 0, mode, len(checked)) for mode, v in enumerate(checked) if v is not None]
    present = functools.reduce(torch.logical_and, flags) if flags else None
    if present is not None:
        present = present.expand(*present.shape[: -len(checked)], *shape.sizes)
    return Grid(shape, normalized(tuple(checked)), present)


def split(tensor: Tensor, grid: Grid) -> Effects:
    """Split a tensor into its effects.

    Args:
        tensor: Values ``(*batch, n_1, …, n_N, D)``.
        grid: Its positions.

    Returns:
        The parts. A tensor that is constant over the positions that count is exactly zero in all of them.
    """
    modes, order = grid.modes, len(grid.shape.sizes)
    exact = precise(tensor)
    low = grid.present_or(exact, torch.inf).amin(modes, keepdim=True)
    high = grid.present_or(exact, -torch.inf).amax(modes, keepdim=True)
    middle = torch.where(low <= high, low + (high - low) / 2, 0.0)
    centred = grid.present_or(exact - middle, 0.0)
    *means, mean = contract(centred, (*main_effects(order), ()), grid.vectors)
    main = tuple(each - mean.unsqueeze(-2) for each in means)
    residual = centred - mean.reshape(*mean.shape[:-1], *(1 for _ in modes), mean.shape[-1])
    for mode, effect in enumerate(main):
        sizes = [effect.shape[-2] if m == mode else 1 for m in range(order)]
        residual -= effect.reshape(*grid.shape.batch, *sizes, effect.shape[-1])
    return Effects(centred, mean, main, grid.present_or(residual, 0.0))
