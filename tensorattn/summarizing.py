r"""From keys and values to their summary: marginal means on one plan, weights behind them, second moments."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tensorattn.contraction_tree import Family, Kept, main_effects
from tensorattn.errors import ModesError, ShapeError, retells
from tensorattn.execution import absent_as_zero
from tensorattn.modes import GridShape, ModeSpec, grid_shape, mode_subsets
from tensorattn.options import check_switch
from tensorattn.presence import GivenWeights, Lengths, Mask, check_presence
from tensorattn.summary import Means, Summary
from tensorattn.weighing import order_of, position_counts, weighted_means, weighted_means_through
from tensorattn.weights import (
    GridWeights,
    Vector,
    Vectors,
    Weights,
    beside,
    check_floating,
    counting_dtype,
    normalized,
)

__all__ = ["Needs", "attention_summary", "self_summary", "summarize"]

BLOCK = 1 << 18  # elements centred at a time for the second moment


class Needs(NamedTuple):
    """What is wanted of keys and values.

    Attributes:
        kept: Mode subsets whose marginal means are wanted. The subset of all modes is the tensor itself.
        second_moment: Whether second moments are wanted.
        keys: Those of the kept subsets that are wanted of the keys; all if None.
        values: Those of the kept subsets that are wanted of the values; all if None.
        position_weights: Whether the weight of each position is wanted too where it is no product over modes, to
            average queries by it.
    """

    kept: Family
    second_moment: bool = False
    keys: Family | None = None
    values: Family | None = None
    position_weights: bool = False


@retells
def summarize(
    key: Tensor,
    value: Tensor,
    *,
    order: int,
    kept: Iterable[Iterable[int]] | None = None,
    second_moment: bool = False,
    weights: GivenWeights = None,
    mask: Mask = None,
    lengths: Lengths = None,
) -> Summary:
    r"""Summarise keys and values by their marginal means.

    Args:
        key: Keys over the grid.
        value: Values over the grid. Pass the same tensor as ``key`` to read it once.
        order: Number of modes N.
        kept: Mode subsets whose marginal means are wanted; by default the N mode averages and the grand mean.
        second_moment: Whether to hold the central second moments :math:`\mathrm{E}[(v - \bar v)(k - \bar k)^\top]` of
            values and keys, and of the keys alone.
        weights: One non-negative vector a mode or None for equal weights, or one tensor over the grid: multiplicities.
        mask: True where a position takes part. A mask that is no product over modes takes a copy of the tensors.
        lengths: How many leading indices of each mode take part: ``(*batch, N)``, or one entry a mode.

    Returns:
        The summary, in float32 for half precision. Means that nothing stands behind are zero.

    Raises:
        ShapeError: If key and value do not have the same batch dimensions and mode sizes, a mode is empty, or the mask
            or lengths do not fit them.
        DtypeError: If they are not floating point, or of different types, the mask is not bool, or lengths are no
            integers.
        WeightsError: If weights have the wrong length, are negative, not finite, or all zero, or a length is negative
            or longer than its mode.
        ModesError: If ``kept`` holds no subsets, or names a mode that does not exist.
        OptionError: If ``second_moment`` is neither True nor False.

    Shape:
        - key: :math:`(*, n_1, \dots, n_N, D)`, value: :math:`(*, n_1, \dots, n_N, D_v)`

    Examples:
        >>> summary = summarize(torch.ones(2, 4, 5, 8), torch.ones(2, 4, 5, 3), order=2)
        >>> summary.kept, [tuple(mean.shape) for mean in summary.values]
        (((0,), (1,), ()), [(2, 4, 3), (2, 5, 3), (2, 3)])
        >>> x = torch.tensor([[1.0, 2.0], [3.0, torch.nan]])[..., None]
        >>> mask = torch.tensor([[True, True], [True, False]])
        >>> summary = summarize(x, x, order=2, mask=mask)
        >>> summary.key((0,))[:, 0], summary.weights[0]
        (tensor([1.5000, 3.0000]), tensor([2., 1.], dtype=torch.float64))
    """
    check_floating(key=key, value=value)
    grid = grid_shape(key.shape, order, "key")
    values = grid_shape(value.shape, order, "value")
    for mode, (size, second) in enumerate(zip(grid.sizes, values.sizes, strict=True)):
        if size != second:
            raise ShapeError(f"mode {mode} has size {size} in key but {second} in value.")
    if grid.batch != values.batch:
        raise ShapeError(f"batch dimensions are {grid.batch} in key but {values.batch} in value.")
    spec = ModeSpec.parse(order)
    family = (
        (*main_effects(order), ())
        if kept is None
        else tuple(tuple(sorted({spec.index(mode) for mode in subset})) for subset in mode_subsets(kept))
    )
    check_switch(second_moment, "second_moment")
    if not family:
        raise ModesError("kept is empty, but a summary needs at least one subset of modes.")
    present = check_presence(weights, mask, lengths, grid, key)
    return attention_summary(key, value, Needs(family, second_moment), present.weights)


def attention_summary(key: Tensor, value: Tensor, needs: Needs, weights: Weights) -> Summary:
    """Summarise, unchecked.

    Args:
        key: Keys over the grid.
        value: Values over the grid.
        needs: What is wanted.
        weights: Checked weights.
    """
    if value is key:
        return self_summary(key, needs, weights)[0]
    family, of_keys, of_values = _wanted(needs)
    keys = dict(zip(of_keys, weighted_means(key, of_keys, weights), strict=True))
    values = dict(zip(of_values, weighted_means(value, of_values, weights), strict=True))
    held = tuple(map(keys.get, family)), tuple(map(values.get, family))
    return _assemble(key, value, *held, family, needs, weights)


def self_summary(x: Tensor, needs: Needs, weights: Weights) -> tuple[Summary, Tensor]:
    """Summarise a tensor that is both keys and values, unchecked, and pass it through for further use.

    Args:
        x: Keys and values over the grid.
        needs: What is wanted.
        weights: Checked weights.

    Returns:
        The summary, and the tensor; its further derivative joins that of the summary in one pass.
    """
    family, of_keys, of_values = _wanted(needs)
    if needs.keys is None and needs.values is None:
        means, x = weighted_means_through(x, family, weights)
        return _assemble(x, x, means, means, family, needs, weights), x
    both = tuple(kept for kept in family if kept in of_keys or kept in of_values)
    means, x = weighted_means_through(x, both, weights)
    found = dict(zip(both, means, strict=True))
    keys = tuple(found[kept] if kept in of_keys else None for kept in family)
    values = tuple(found[kept] if kept in of_values else None for kept in family)
    return _assemble(x, x, keys, values, family, needs, weights), x


def _wanted(needs: Needs) -> tuple[Family, Family, Family]:
    """Kept subsets that a summary holds, and those that it holds of the keys and of the values."""
    family = needs.kept if not needs.second_moment or () in needs.kept else (*needs.kept, ())
    return family, family if needs.keys is None else needs.keys, family if needs.values is None else needs.values


def _assemble(
    key: Tensor,
    value: Tensor,
    keys: Means,
    values: Means,
    family: Family,
    needs: Needs,
    weights: Weights,
) -> Summary:
    """Put means, second moments and the weights behind them together."""
    order = order_of(weights)
    grid = GridShape(tuple(key.shape[: -order - 1]), tuple(key.shape[-order - 1 : -1]), key.shape[-1])
    covariance = key_covariance = None
    if needs.second_moment:
        shares, place = _shares(weights), family.index(())
        key_mean, value_mean = keys[place], values[place]
        assert key_mean is not None and value_mean is not None
        covariance = _covariance(value, key, value_mean, key_mean, shares, grid)
        key_covariance = covariance if value is key else _covariance(key, key, key_mean, key_mean, shares, grid)
    if not isinstance(weights, GridWeights) and all(vector is None for vector in weights):
        counts: tuple[Tensor | None, ...] = (None,) * len(family)
        return Summary(grid.sizes, family, keys, values, counts, weights, covariance, key_covariance)
    everything = tuple(range(order))
    mode_weights: Vectors | None = None
    if isinstance(weights, GridWeights):
        if needs.position_weights and everything not in family:
            family, keys, values = (*family, everything), (*keys, None), (*values, None)
        counts = position_counts(weights, family)
    else:
        mode_weights = tuple(_with_batch(vector, grid) for vector in weights)
        counts = tuple(_marginal_weight(kept, mode_weights, grid) for kept in family)
    weight = counts[family.index(everything)] if everything in family else None
    if weight is not None:
        place = family.index(everything)
        same = keys[place] is values[place]
        keys = _without_absent(keys, place, weight)
        values = (
            (*values[:place], keys[place], *values[place + 1 :]) if same else _without_absent(values, place, weight)
        )
    return Summary(grid.sizes, family, keys, values, counts, mode_weights, covariance, key_covariance)


def _without_absent(means: Means, place: int, weight: Tensor) -> Means:
    """Make zero of what absent positions hold, at the place of the tensor itself: not even a zero may meet a NaN."""
    tensor = means[place]
    if tensor is None:
        return means
    return *means[:place], absent_as_zero(tensor, [weight.unsqueeze(-1)]), *means[place + 1 :]


def _with_batch(vector: Vector, grid: GridShape) -> Vector:
    """Give weights as many batch dimensions as the tensor has."""
    if vector is None:
        return None
    return vector.reshape(*(1,) * (len(grid.batch) + 1 - vector.dim()), *vector.shape)


def _marginal_weight(kept: Kept, weights: Vectors, grid: GridShape) -> Tensor | None:
    """Weight behind each marginal mean: its indices' own weights times the total weight of every other mode."""
    factors, count = [], 1
    for mode, (weight, size) in enumerate(zip(weights, grid.sizes, strict=True)):
        weight = None if weight is None else weight.to(counting_dtype(weight.device))
        if weight is None:
            count *= 1 if mode in kept else size
        elif mode in kept:
            factors.append(weight.reshape(*weight.shape[:-1], *(size if k == mode else 1 for k in kept)))
        else:
            factors.append(weight.sum(-1).reshape([*weight.shape[:-1], *(1 for _ in kept)]))
    if not factors:
        return None
    product = functools.reduce(torch.mul, factors) * count
    return product.expand([*product.shape[: len(grid.batch)], *(grid.sizes[mode] for mode in kept)])


def _shares(weights: Weights) -> list[Tensor]:
    """Weights that multiply to the share of each position, ``(*batch, n_1 or 1, …, n_N or 1, 1)``."""
    if isinstance(weights, GridWeights):
        total = weights.tensor.sum([mode - weights.order for mode in range(weights.order)], keepdim=True)
        return [(weights.tensor / torch.where(total > 0, total, 1)).unsqueeze(-1)]
    order = len(weights)
    vectors = enumerate(normalized(weights))
    return [beside(vector, mode, order).unsqueeze(-1) for mode, vector in vectors if vector is not None]


def _covariance(
    left: Tensor, right: Tensor, left_mean: Tensor, right_mean: Tensor, shares: Sequence[Tensor], grid: GridShape
) -> Tensor:
    """Second central moment of two tensors over the grid, block by block along the longest mode."""
    batch, order = len(grid.batch), len(grid.sizes)
    if order == 0:  # one position has no spread
        return left_mean.unsqueeze(-1) * right_mean.unsqueeze(-2) * 0
    longest, pieces = 0, [(0, grid.sizes[0])]
    if not torch.compiler.is_compiling():
        longest = grid.sizes.index(max(grid.sizes))
        rest = max(1, max(left.numel(), right.numel()) // grid.sizes[longest])
        step = max(1, BLOCK // rest)
        starts = range(0, grid.sizes[longest], step)
        pieces = [(start, min(step, grid.sizes[longest] - start)) for start in starts]
    along = longest - order - 1
    count = 1
    for mode, size in enumerate(grid.sizes):
        count *= size if all(share.shape[mode - order - 1] == 1 for share in shares) else 1
    total: Tensor | None = None
    for start, length in pieces:
        blocks = []
        for tensor, mean in ((left, left_mean), (right, right_mean)):
            block = tensor.narrow(batch + longest, start, length).to(mean.dtype)
            blocks.append(block - mean.reshape(*mean.shape[:-1], *(1,) * order, mean.shape[-1]))
        parts = [share if share.shape[along] == 1 else share.narrow(along, start, length) for share in shares]
        if parts:
            blocks = [absent_as_zero(block, parts) for block in blocks]
        shared = functools.reduce(torch.mul, parts, blocks[0]) / count
        term = shared.flatten(batch, -2).mT @ blocks[1].flatten(batch, -2)
        total = term if total is None else total + term
    assert total is not None
    return total
