"""Attention maps: what the attention weights of an operator say of every position of the grid.

Everywhere `at` tells which query is meant: one index a dimension of its positions.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tensorattn.errors import OptionError, ShapeError, integers, retells
from tensorattn.functional.operator import get_operator
from tensorattn.masks import GivenWeights, Lengths, Mask, Weights, nonzero, read_weights
from tensorattn.modes import GridShape, Kept, check_order

__all__ = [
    "At",
    "Base",
    "attention_map",
    "base_of",
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


@retells
def attention_map(
    attention: Sequence[Any],
    sizes: Sequence[int],
    *,
    operator: str = "additive",
    at: Sequence[int] | None = None,
    weights: GivenWeights = None,
    mask: Mask = None,
    lengths: Lengths = None,
    **options: Any,
) -> Tensor:
    r"""Spread the attention weights of an operator over the grid: one number a position, all summing to one.

    What an operator knows of a position is what its modes say of it, so that the map has the form of the operator:

    - ``additive``: the product of the weights of its modes, :math:`\prod_m p^m[j_m]`, which is the softmax over the
      grid of additive logits; ``truncated``: the product over its subsets, each to the power of its counting number;
    - ``kao_kv``: the weights of each average shared by the positions behind it, so that the output is the mean of the
      values so weighed; ``kao_qkv``: the mean of that over the averaged queries at the place of the query, or with
      ``centered=True`` the product of their weights over those of the mean query to the power N−1;
    - ``kronecker_product``: the product of one row a mode; ``kronecker_sum`` and ``axial``: one row a mode on the
      fibre through the query, each mode counting equally;
    - ``flattened``: its weights.

    Corrections by ``interaction`` and own tokens by ``include_self`` are no part of a map.

    Args:
        attention: What the operator returned as ``attention``.
        sizes: Sizes of the modes of the keys.
        operator: Name of the operator.
        at: The query, one index a dimension of its positions; the map of every query if None, which takes as much
            memory as full attention would. Operators whose queries must be on the grid of the keys need it.
        weights: The weights that the operator was given. What differs between samples must have all batch dimensions
            here, so that dimensions of positions are not taken for one.
        mask: The mask that it was given.
        lengths: The lengths that it was given.
        **options: The options that the operator was given.

    Returns:
        The maps, of the type of the weights: not negative, each with sum one, or zero where nothing takes part.

    Raises:
        OptionError: If the operator has no map or no such option, or ``at`` is missing or out of range.
        ShapeError: If the attention weights, the mask or lengths do not fit the sizes of the modes.
        WeightsError: If the weights of the positions do not.
        DtypeError: If the mask is not bool, or lengths are not integers.

    Shape:
        - result: :math:`(*, n_1, \dots, n_N)` with the batch dimensions, and the positions of the queries if ``at`` is
          None

    Examples:
        >>> import torch, tensorattn as ta
        >>> q, x = torch.randn(7, 8), torch.randn(4, 5, 8)
        >>> rows, columns = ta.additive_attention(q, x, x, order=2, return_attention=True).attention
        >>> map_of_query_3 = ta.attention_map((rows, columns), (4, 5), at=[3])
        >>> torch.allclose(map_of_query_3, torch.outer(rows[3], columns[3]))
        True
    """
    sizes = tuple(sizes)
    check_order(len(sizes), "the number of sizes")
    record = get_operator(operator)
    if record.spread is None:
        raise OptionError(f"operator {operator!r} has no map.")
    options = record.with_defaults(options)
    record.needs(len(sizes), **options)  # refuses values out of range
    if not isinstance(attention, Sequence) or not attention:
        raise OptionError("attention must be what an operator returned as its attention, a tuple.")
    first = attention[0] if isinstance(attention[0], Tensor) else attention[0][0]
    grid = GridShape(tuple(first.shape[: _samples(weights, mask, lengths, len(sizes))]), sizes, 1)
    base = base_of(read_weights(weights, mask, lengths, grid, first, of="sizes"), sizes, first)
    return record.spread(attention, sizes, None if at is None else integers(at, "at"), base, **options)


def base_of(weights: Weights, sizes: Sequence[int], like: Tensor) -> Base:
    """Return how often each position counts, in the type of attention weights.

    Args:
        weights: Checked weights of the positions.
        sizes: Sizes of the modes.
        like: Attention weights.
    """
    counts = weights.over_grid()
    if counts is None:
        return Base(like.new_ones(tuple(sizes)), by_mode=True)
    return Base(counts.to(like).expand(*counts.shape[: -len(sizes)], *sizes), weights.grid is None)


def _samples(weights: GivenWeights, mask: Mask, lengths: Lengths, order: int) -> int:
    """Count the batch dimensions that weights, mask and lengths have."""
    whole = [each for each in (weights, mask) if isinstance(each, Tensor)]
    found = [each.dim() - order for each in whole]
    if not isinstance(weights, Tensor) and weights is not None:
        found += [vector.dim() - 1 for vector in weights if isinstance(vector, Tensor)]
    if isinstance(lengths, Tensor):
        found.append(lengths.dim() - 1)
    elif lengths is not None:
        found += [each.dim() for each in lengths if isinstance(each, Tensor)]
    return max([0, *found])


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
        ratio = _on_grid(weights, kept, order) / nonzero(_sum_of_others(base, kept, order))
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
        _on_grid(vector, (mode,), order) / nonzero(_sum_of_others(base, (mode,), order))
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
    return weights / nonzero(weights.sum(tuple(range(-modes, 0)), keepdim=True))


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


def _log(weights: Tensor) -> Tensor:
    """Logarithm, zero where there is no weight."""
    return nonzero(weights).log()
