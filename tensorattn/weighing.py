r"""Marginal means under weights of every kind: one vector a mode, or one weight a position.

With a weight :math:`w_j` for each position the mean over the modes outside a kept subset :math:`U` is

.. math:: \bar x^U[a_U] = \frac{1}{c^U[a_U]} \sum_{j : j_U = a_U} w_j x_j,
    \qquad c^U[a_U] = \sum_{j : j_U = a_U} w_j,

and zero where its count :math:`c^U` is zero. Where the weights are a product over modes the count cancels, all but the
weights of the modes averaged over, so those averages are made without a copy of the tensor; these take one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tensorattn.contraction import contract, contract_through
from tensorattn.contraction_tree import Family
from tensorattn.weights import GridWeights, Weights, accumulation_dtype, counting_dtype, normalized, without_absent

__all__ = ["order_of", "position_counts", "weighted_means", "weighted_means_through"]


def order_of(weights: Weights) -> int:
    """Return the number of modes N that weights are for.

    Args:
        weights: Checked weights.
    """
    return weights.order if isinstance(weights, GridWeights) else len(weights)


def weighted_means(tensor: Tensor, family: Family, weights: Weights) -> tuple[Tensor, ...]:
    """Compute the marginal means of a family, unchecked.

    Args:
        tensor: Values ``(*batch, n_1, …, n_N, D)``.
        family: Kept mode subsets.
        weights: Checked weights.

    Returns:
        One tensor ``(*batch, *kept sizes, D)`` for each kept subset; the tensor itself for that of all modes.
    """
    if isinstance(weights, GridWeights):
        return _means_over_positions(tensor, family, weights)
    return contract(tensor, family, normalized(weights))


def weighted_means_through(tensor: Tensor, family: Family, weights: Weights) -> tuple[tuple[Tensor, ...], Tensor]:
    """Compute the same, and pass the tensor through for further use, whose derivative joins that of the means.

    Args:
        tensor: Values ``(*batch, n_1, …, n_N, D)``.
        family: Kept mode subsets.
        weights: Checked weights.

    Returns:
        The means, and the tensor.
    """
    if isinstance(weights, GridWeights):
        return _means_over_positions(tensor, family, weights), tensor
    return contract_through(tensor, family, normalized(weights))


def position_counts(weights: GridWeights, family: Family) -> tuple[Tensor, ...]:
    """Add up the weights of the positions behind each marginal mean.

    Args:
        weights: Weights of positions.
        family: Kept mode subsets.

    Returns:
        One tensor ``(*batch, *kept sizes)`` for each, with batch dimensions that may be 1.
    """
    counted = weights.tensor.to(counting_dtype(weights.tensor.device))
    gone = ([mode - weights.order for mode in range(weights.order) if mode not in kept] for kept in family)
    return tuple(counted.sum(dims) if dims else counted for dims in gone)


def _means_over_positions(tensor: Tensor, family: Family, weights: GridWeights) -> tuple[Tensor, ...]:
    """Average a tensor multiplied by its weights, and divide by their average."""
    order, weight = weights.order, weights.tensor
    everything = tuple(range(order))
    smaller = tuple(kept for kept in family if kept != everything)
    if not smaller:
        return tuple(tensor for _ in family)
    present = without_absent(tensor, weight > 0)
    if not weights.binary:
        present = present.to(accumulation_dtype(tensor.dtype)) * weight.unsqueeze(-1)
    plain = contract(present, smaller, (None,) * order)
    sizes = weight.shape[weight.dim() - order :]
    found = {everything: tensor}
    for kept, mean, count in zip(smaller, plain, position_counts(weights, smaller), strict=True):
        outside = math.prod([size for mode, size in enumerate(sizes) if mode not in kept])
        factor = torch.where(count > 0, outside / torch.where(count > 0, count, 1), 0.0)
        found[kept] = mean * factor.to(mean.dtype).unsqueeze(-1)
    return tuple(found[kept] for kept in family)
