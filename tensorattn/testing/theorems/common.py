"""What several theorems need: calls, means and products of a case, and where cases come from."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tensorattn.testing import reference
from tensorattn.testing.check import Asked, Comparison
from tensorattn.testing.strategies import Case, exact, rows

__all__ = [
    "called",
    "expectation",
    "mean_of",
    "only_case",
    "orders",
    "product_of",
    "residual_of",
    "tokens_of",
    "vanishes",
]


def called(function: Callable[..., Any], case: Case, **how: Any) -> Any:
    """Call a function with the signature of an operator."""
    tensors, named = case.given(**how)
    return function(*tensors, **named)


def mean_of(tensor: Tensor, case: Case, kept: Collection[int] = ()) -> Tensor:
    """The weighted mean over all modes but the kept ones, in float64; averaged modes stay with size 1."""
    told: dict[str, Any] = {"order": case.order, "weights": case.all_weights()}
    means = reference.marginal_mean(exact(tensor), tuple(sorted(kept)), **told)
    shape = [size if mode in kept else 1 for mode, size in enumerate(case.sizes)]
    return means.reshape(*case.batch, *shape, tensor.shape[-1])


def residual_of(tensor: Tensor, case: Case) -> Tensor:
    """The interaction residual, the tensor less its additive part, in float64."""
    return exact(tensor) - reference.additive_part(exact(tensor), order=case.order, weights=case.all_weights())


def product_of(attention: Sequence[Tensor], case: Case) -> Tensor:
    """The product of the attention weights ``(*batch, *positions, n_m)`` of the modes, ``(*batch, L, P)``."""
    parts = [rows(exact(part), len(case.batch)) for part in attention]
    return functools.reduce(lambda left, right: (left.unsqueeze(-1) * right.unsqueeze(-2)).flatten(-2), parts)


def expectation(density: Tensor, tensor: Tensor, case: Case) -> Tensor:
    """The mean of a tensor over the grid under a law ``(*batch, L, P)`` for each query."""
    found = density @ rows(exact(tensor), len(case.batch))
    return found.reshape(*case.batch, *case.positions, tensor.shape[-1])


def tokens_of(case: Case, kept: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean keys and values over all modes but the kept ones, ``(*batch, T, D)``, and which stand for any position."""
    batch = len(case.batch)
    key, value = (rows(mean_of(tensor, case, kept), batch) for tensor in (case.key, case.value))
    dropped = [batch + mode for mode in range(case.order) if mode not in kept]
    weight = case.position_weights()
    return key, value, (weight.sum(dropped) if dropped else weight).reshape(*case.batch, -1) > 0


def vanishes(told: str, found: Tensor, tolerance: float, size: float) -> Comparison:
    """Compare with zero."""
    return Comparison(told, found, torch.zeros_like(found), tolerance, size)


def orders(least: int, most: int) -> Callable[[Asked, Any], Any]:
    """Return where cases come from that are just a number of modes."""
    return lambda asked, _: st.integers(least, most) if asked.order is None else st.just(max(least, asked.order))


def only_case(asked: Asked, subject: Any) -> tuple[int, torch.dtype, Any]:
    """The only case of a law of fixed sizes: a seed, a type and a device."""
    return asked.seed or 0, asked.dtype, asked.device
