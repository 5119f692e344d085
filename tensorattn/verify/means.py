"""Means of cases in float64: what the theorems are written with."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from tensorattn.testing import Case
from tensorattn.testing.cases import rows
from tensorattn.testing.drawing import numbers
from tensorattn.testing.tolerances import exact

__all__ = ["at_most", "expectation", "for_queries", "mean", "product", "residual", "shares", "summed"]


def at_most(case: Case, logit: float) -> Case:
    """Return the case with its scale taken back to where no logit is larger.

    Args:
        case: The case.
        logit: Largest logit.
    """
    return case if case.logit <= logit else case.replace(scale=case.factor * logit / case.logit)


def shares(case: Case) -> list[Tensor]:
    """Return for each mode the share of each index in the weight, ``(*batch, 1, …, n_m, …, 1)``.

    Args:
        case: Weights.
    """
    spread = []
    for mode, size in enumerate(case.sizes):
        weight = case.mode_weights(mode)
        share = weight / weight.sum(-1, keepdim=True)
        spread.append(share.reshape(*case.batch, *(size if m == mode else 1 for m in range(case.order))))
    return spread


def mean(tensor: Tensor, case: Case, kept: Collection[int] = ()) -> Tensor:
    """Return the weighted mean over all modes but the kept ones; averaged modes stay with size 1.

    Args:
        tensor: Tensor ``(*batch, n_1, …, n_N, D)``.
        case: Weights.
        kept: Modes.
    """
    averaged = exact(tensor)
    for mode, share in enumerate(shares(case)):
        if mode not in kept:
            averaged = (averaged * share.unsqueeze(-1)).sum(len(case.batch) + mode, keepdim=True)
    return averaged


def residual(tensor: Tensor, case: Case) -> Tensor:
    """Return the interaction residual, the tensor less its additive part, in float64.

    Args:
        tensor: Tensor ``(*batch, n_1, …, n_N, D)``.
        case: Weights.
    """
    averages = torch.stack([mean(tensor, case, (mode,)).expand(tensor.shape) for mode in range(case.order)])
    return exact(tensor) - averages.sum(0) + (case.order - 1) * mean(tensor, case)


def for_queries(tensor: Tensor, case: Case) -> Tensor:
    """Give ``(*batch, D)``, whatever sizes of 1 it has between, one dimension for each of the query's positions.

    Args:
        tensor: The tensor.
        case: Queries.
    """
    return tensor.reshape(*case.batch, *(1 for _ in case.positions), tensor.shape[-1])


def product(attention: Sequence[Tensor], case: Case) -> Tensor:
    """Return the product of the attention weights of the modes, ``(*batch, L, P)`` in float64.

    Args:
        attention: Attention weights ``(*batch, *positions, n_m)`` of each mode.
        case: Batch and positions.
    """
    parts = [rows(exact(part), len(case.batch)) for part in attention]
    return functools.reduce(lambda left, right: (left.unsqueeze(-1) * right.unsqueeze(-2)).flatten(-2), parts)


def expectation(density: Tensor, tensor: Tensor, case: Case) -> Tensor:
    """Return the mean of a tensor over the grid under a law for each query, ``(*batch, *positions, D)``.

    Args:
        density: Laws ``(*batch, L, P)``.
        tensor: Tensor ``(*batch, n_1, …, n_N, D)``.
        case: Batch and positions.
    """
    found = density @ rows(exact(tensor), len(case.batch))
    return found.reshape(*case.batch, *case.positions, tensor.shape[-1])


def summed(
    groups: Collection[Collection[int]], case: Case, dim: int, generator: torch.Generator, dtype: torch.dtype
) -> Tensor:
    """Return a sum of one term a group of modes, whose terms add up without rounding in half precision.

    Args:
        groups: Groups of modes.
        case: Batch and sizes.
        dim: Channels.
        generator: Source of random numbers.
        dtype: Type of the result.
    """
    total = torch.zeros(*case.batch, *case.sizes, dim, dtype=torch.float64)
    for group in groups:
        shape = [size if mode in group else 1 for mode, size in enumerate(case.sizes)]
        total = total + numbers(generator, (*case.batch, *shape, dim), dtype, addable=True).double()
    assert total.numel() == math.prod([*case.batch, *case.sizes, dim])
    return total.to(case.key.device, dtype)
