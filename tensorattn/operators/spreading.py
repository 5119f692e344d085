"""From the attention weights of an operator to weights over the whole grid: the ways that operators share.

Everywhere `at` tells which query is meant: one index a dimension of its positions.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tensorattn.contraction_tree import Kept
from tensorattn.errors import OptionError, ShapeError

__all__ = [
    "At",
    "Base",
    "fibre_of",
    "fibres",
    "geometric",
    "mixture",
    "place_on",
    "rows_at",
    "scaled_to_one",
    "weights_of",
]

At = tuple[int, ...]


class Base(NamedTuple):
    """How often each position counts.

    Attributes:
        weights: One number a position, ``(n_1, …, n_N)`` or ``(*batch, n_1, …, n_N)``.
        by_mode: Whether they are a product of weights of modes, which attention along a mode then holds.
    """

    weights: Tensor
    by_mode: bool

    @property
    def beside_rows(self) -> Tensor:
        """What attention along the modes does not hold of them."""
        return (self.weights > 0).to(self.weights.dtype) if self.by_mode else self.weights


def weights_of(attention: Tensor, at: At | None, sizes: Sequence[int]) -> Tensor:
    """Take the weights ``(*batch, *n_U)`` of one query out of ``(*batch, *positions, *n_U)``; all, if none is named.

    Args:
        attention: Weights over some modes.
        at: The query, or None.
        sizes: Sizes of those modes.

    Raises:
        ShapeError: If the weights have other sizes.
        OptionError: If there are more indices than dimensions, or one is out of range.
    """
    modes = len(sizes)
    if attention.dim() < modes or tuple(attention.shape[attention.dim() - modes :]) != tuple(sizes):
        raise ShapeError(f"attention has shape {tuple(attention.shape)}, but its last sizes must be {tuple(sizes)}.")
    if at is None:
        return attention
    before = attention.dim() - modes - len(at)
    if before < 0:
        dims = attention.dim() - modes
        raise OptionError(f"at has {len(at)} indices, but the weights have {dims} dimensions of batch and positions.")
    index: tuple[Any, ...] = (..., *_checked(at, attention.shape[before : before + len(at)]), *(slice(None),) * modes)
    return attention[index]


def rows_at(matrices: Sequence[Tensor], at: At, sizes: Sequence[int]) -> list[Tensor]:
    """Take the row of the query out of a matrix ``(*, n_m, n_m)`` a mode.

    Args:
        matrices: The matrices.
        at: The query, one index a mode.
        sizes: Sizes of the modes.

    Raises:
        ShapeError: If a matrix has other sizes.
    """
    pairs = zip(matrices, at, sizes, strict=True)
    return [weights_of(matrix, None, (size, size))[..., index, :] for matrix, index, size in pairs]


def place_on(sizes: Sequence[int], at: At | None) -> At:
    """Check the query of an operator whose weights are spread by where it stands.

    Args:
        sizes: Sizes of the modes.
        at: The query.

    Raises:
        OptionError: If it is missing, does not have one index a mode, or one is out of range.
    """
    if at is None:
        raise OptionError("at is missing: the weights of this operator are spread by where the query stands.")
    if len(at) != len(sizes):
        raise OptionError(f"at has {len(at)} indices, but there are {len(sizes)} modes.")
    return _checked(at, sizes)


def _checked(at: At, sizes: Sequence[int]) -> At:
    """Check indices against sizes; negative ones count from the end."""
    for place, (index, size) in enumerate(zip(at, sizes, strict=True)):
        if not -size <= index < size:
            raise OptionError(f"at has index {index} at place {place}, but the size there is {size}.")
    return tuple(index % size for index, size in zip(at, sizes, strict=True))


def geometric(factors: Sequence[tuple[Kept, Tensor, int]], base: Tensor, order: int) -> Tensor:
    r"""Multiply weights over mode subsets, each to the power of its count, into weights over the grid that sum to one.

    .. math:: P_j \propto w_j \prod_U \Big(\frac{p^U[j_U]}{w^U[j_U]}\Big)^{c_U}

    with the weights w of positions and their sums :math:`w^U`: the softmax over the grid of the sum of the logits that
    the subsets have. A position with no weight in one of them has none.

    Args:
        factors: Subsets, the weights ``(*, *n_U)`` over each, and counts.
        base: Weights of the positions.
        order: Number of modes.
    """
    first, some, _ = factors[0]
    base = _beside(base, some.dim() - len(first), order)
    logits, present = _log(base), base > 0
    for kept, weights, count in factors:
        ratio = _on_grid(weights, kept, order) / _nonzero(_sum_of_others(base, kept, order))
        present = present & (ratio > 0)
        logits = logits + count * _log(ratio)
    flat = torch.where(present, logits, -torch.inf).flatten(-order)
    any_present = present.flatten(-order).any(-1, keepdim=True)
    return (torch.softmax(torch.where(any_present, flat, 0.0), -1) * any_present).unflatten(-1, logits.shape[-order:])


def mixture(vectors: Sequence[Tensor], base: Tensor) -> Tensor:
    """Spread weights along each mode evenly over all other modes, and add up the modes.

    Args:
        vectors: For each mode the weights ``(*, n_m)``, which sum to one together.
        base: Weights of the positions.
    """
    order = len(vectors)
    base = _beside(base, vectors[0].dim() - 1, order)
    shares = (
        _on_grid(vector, (mode,), order) / _nonzero(_sum_of_others(base, (mode,), order))
        for mode, vector in enumerate(vectors)
    )
    return base * functools.reduce(torch.add, shares)


def fibres(vectors: Sequence[Tensor], at: At) -> Tensor:
    """Put weights along each mode on the fibre through the query, and take the mean over modes.

    Args:
        vectors: For each mode the weights ``(*, n_m)``.
        at: The query, one index a mode.
    """
    sizes = [vector.shape[-1] for vector in vectors]
    total = vectors[0].new_zeros(*torch.broadcast_shapes(*(vector.shape[:-1] for vector in vectors)), *sizes)
    for mode, vector in enumerate(vectors):
        total[fibre_of(at, mode)] += vector / len(sizes)
    return total


def fibre_of(at: At, mode: int) -> tuple[Any, ...]:
    """Return the index of the fibre through a query along a mode.

    Args:
        at: The query, one index a mode.
        mode: The mode.
    """
    return (..., *at[:mode], slice(None), *at[mode + 1 :])


def scaled_to_one(weights: Tensor, modes: int) -> Tensor:
    """Divide weights over some modes by their sum; where that is zero they stay zero.

    Args:
        weights: Weights whose last dimensions are the modes.
        modes: Number of modes.
    """
    return weights / _nonzero(weights.sum(tuple(range(-modes, 0)), keepdim=True))


def _beside(base: Tensor, lead: int, order: int) -> Tensor:
    """View weights of positions that differ between samples with a dimension for each of the queries' too."""
    samples = base.dim() - order
    ones = (1,) * (lead - samples) if samples else ()
    return base.reshape(*base.shape[:samples], *ones, *base.shape[samples:])


def _on_grid(weights: Tensor, kept: Kept, order: int) -> Tensor:
    """View weights ``(*, *n_U)`` with one dimension a mode, of size 1 where they have none."""
    lead, sizes = weights.shape[: weights.dim() - len(kept)], weights.shape[weights.dim() - len(kept) :]
    known = dict(zip(kept, sizes, strict=True))
    return weights.reshape(*lead, *(known.get(mode, 1) for mode in range(order)))


def _sum_of_others(base: Tensor, kept: Kept, order: int) -> Tensor:
    """Sum weights of positions over all modes outside a subset, which stay as dimensions of size 1."""
    others = [mode - order for mode in range(order) if mode not in kept]
    return base.sum(others, keepdim=True) if others else base


def _nonzero(count: Tensor) -> Tensor:
    """Replace zeros, which nothing is divided by, by ones."""
    return torch.where(count > 0, count, 1.0)


def _log(weights: Tensor) -> Tensor:
    """Logarithm, zero where there is no weight."""
    return torch.where(weights > 0, weights, 1.0).log()
