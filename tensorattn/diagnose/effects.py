r"""Effects: a tensor split into its mean, one main effect a mode, and its interaction residual, in float64.

The parts are orthogonal under the weights of the positions, so their variances add up. What is measured here may be
millions of times smaller than the tensor, so it is measured in float64, and from the middle of the range.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tensorattn.averages import mode_averages, outer_sum
from tensorattn.errors import WeightsError
from tensorattn.functional.summary import summarize
from tensorattn.masks import beside, counting_dtype, nonzero
from tensorattn.modes import GridShape, mode_parts

__all__ = ["Effects", "precise", "scaled_queries", "shares_of", "split"]


class Effects(NamedTuple):
    """Orthogonal parts of a tensor over P positions, and how those count.

    Attributes:
        shares: For each mode, the share of each index in the weight, ``(*batch, n_m)`` or broadcastable to it.
        present: Which positions count at all, ``(*batch, P)`` or broadcastable to it.
        centred: The tensor less the middle of its range in each channel, ``(*batch, P, D)``, zero where no position
            counts.
        mean: Weighted mean of ``centred``, ``(*batch, D)``.
        main: For each mode, its averages less the mean, ``(*batch, n_m, D)``.
        residual: What is left of the tensor, ``(*batch, P, D)``, zero where no position counts.
    """

    shares: tuple[Tensor, ...]
    present: Tensor
    centred: Tensor
    mean: Tensor
    main: tuple[Tensor, ...]
    residual: Tensor

    def rows(self) -> list[Tensor]:
        """Return each effect as rows whose sum of squares is its variance, ``(*batch, rows, D)``; the residual last."""
        roots = [share.sqrt() for share in self.shares]
        main = [effect * root.unsqueeze(-1) for effect, root in zip(self.main, roots, strict=True)]
        return [*main, self.residual * _over_positions(torch.mul, roots).unsqueeze(-1)]


def precise(tensor: Tensor) -> Tensor:
    """Return a tensor in float64, where its device has that, without its graph."""
    return tensor.detach().to(counting_dtype(tensor.device))


def scaled_queries(query: Tensor, grid: GridShape, scale: float | None) -> Tensor:
    """Return all queries in a list, ``(*batch, L, D)``, times the scale of their logits."""
    count = query.shape[len(grid.batch) : -1].numel()
    factor = max(1, grid.dim) ** -0.5 if scale is None else scale
    return precise(query).reshape(*grid.batch, count, grid.dim) * factor


def shares_of(tensor: Tensor, order: int, weights: Sequence[Tensor | None] | None) -> tuple[Tensor, ...]:
    """Read weights, and return for each mode the share of each index, ``(*batch, n_m)`` or broadcastable to it.

    Each mode is summarised apart: products of the weights of all modes may leave the range of float64.
    """
    given = (None,) * order if weights is None else mode_parts(weights, order, "weights", "vectors", WeightsError)
    nothing, shares = precise(tensor[..., :0]), []
    for mode, (vector, size) in enumerate(zip(given, tensor.shape[-order - 1 : -1], strict=True)):
        counts: Tensor | None = nothing.new_ones(size)
        if vector is not None:
            alone = [vector if m == mode else None for m in range(order)]
            (counts,) = summarize(nothing, nothing, order=order, kept=[(mode,)], weights=alone).weights
        assert counts is not None
        shares.append(precise(counts / nonzero(counts.sum(-1, keepdim=True))))
    return tuple(shares)


def split(tensor: Tensor, shares: Sequence[Tensor]) -> Effects:
    """Split a tensor ``(*batch, n_1, …, n_N, D)`` into its effects under shares of the weight.

    A tensor that is constant over the positions that count is exactly zero in all of them.
    """
    order = len(shares)
    present = _over_positions(torch.logical_and, [share > 0 for share in shares])
    here, exact = present.unsqueeze(-1), precise(tensor).flatten(-order - 1, -2)
    low = torch.where(here, exact, torch.inf).amin(-2, keepdim=True)
    high = torch.where(here, exact, -torch.inf).amax(-2, keepdim=True)
    middle = torch.where(low <= high, low + (high - low) / 2, 0.0)
    centred = torch.where(here, exact - middle, 0.0)
    means = mode_averages(centred.reshape(tensor.shape), order=order, weights=shares)
    mean = (means[0] * shares[0].unsqueeze(-1)).sum(-2)
    main = tuple(each - mean.unsqueeze(-2) for each in means)
    residual = centred - mean.unsqueeze(-2) - outer_sum(main).flatten(-order - 1, -2)
    return Effects(tuple(shares), present, centred, mean, main, torch.where(here, residual, 0.0))


def _over_positions(combine: Callable[[Tensor, Tensor], Tensor], vectors: Sequence[Tensor]) -> Tensor:
    """Combine one vector ``(*batch, n_m)`` a mode into one entry a position, ``(*batch, P)``."""
    order = len(vectors)
    return functools.reduce(combine, [beside(v, mode, order) for mode, v in enumerate(vectors)]).flatten(-order)
