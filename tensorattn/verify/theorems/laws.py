"""Laws: averages of tensor-normal tensors against dense algebra, and the weights that average best."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from tensorattn.stats import (
    TensorNormal,
    additive_mean_law,
    gls_weights,
    marginal_cross_covariance,
    marginal_mean_law,
)
from tensorattn.testing import Subject, mode_sizes
from tensorattn.testing.drawing import generators, numbers, one_a_mode
from tensorattn.testing.tolerances import largest
from tensorattn.verify.statement import Asked, Statement, st

__all__ = ["STATEMENTS"]

DENSE = 1e-12  # relative to the largest entry, for dense algebra in float64
INVERTED = 1e-10  # the same, where covariances are inverted


def laws_of_averages(subject: Subject, case: tuple[int, ...], draw: Any) -> None:
    """Law and cross-covariance of marginal means against Kronecker products multiplied out; the case is the sizes."""
    generator, order = draw(generators(9)), len(case)
    effects = [numbers(generator, (size, 2)) for size in case]
    first, second = (sorted(draw(st.sets(st.integers(0, order - 1)))) for _ in range(2))
    roots = [numbers(generator, (size, size)) for size in (*case, 2)]
    factors = [root @ root.mT for root in roots]
    weights = [numbers(generator, (size,)).abs() + 0.1 for size in case]
    shares = [weight / weight.sum() for weight in weights]
    loc = numbers(generator, (*case, 2))
    law = TensorNormal(loc, factors[:-1], factors[-1])
    dense = functools.reduce(torch.kron, factors)

    def averaging(kept: list[int]) -> Tensor:
        maps = [torch.eye(n).double() if m in kept else shares[m].unsqueeze(0) for m, n in enumerate(case)]
        return functools.reduce(torch.kron, [*maps, torch.eye(2).double()])

    left, right = averaging(first), averaging(second)
    cross = marginal_cross_covariance(law, first, second, weights=weights).to_dense()
    marginal = marginal_mean_law(law, first, weights=weights)
    for got, expected, what in (
        (cross, left @ dense @ right.mT, f"the covariance of the means of {first} and {second}"),
        (marginal.covariance_matrix, left @ dense @ left.mT, f"the covariance of the mean of {first}"),
        (marginal.mean.flatten(), left @ loc.flatten(), f"the expected mean of {first}"),
        (
            additive_mean_law(effects, first, weights=weights).flatten(),
            left @ one_a_mode(effects).flatten(),
            f"the expected mean of {first} of an additive mean",
        ),
    ):
        tolerance = DENSE * max(1.0, largest(expected))
        statement = f"{what} must be that of dense algebra"
        subject.expect_close(got, expected, tolerance, statement, case)  # type: ignore[arg-type]


def gls_averages(subject: Subject, case: tuple[int, ...], draw: Any) -> None:
    """Averages with these weights project on additive tensors, and what they leave has no covariance with them.

    Where all indices of a mode are alike, they are equal weights.
    """
    generator, order = draw(generators(9)), len(case)
    roots = [numbers(generator, (size, size)) for size in case]
    factors = [root @ root.mT / size + 0.5 * torch.eye(size).double() for root, size in zip(roots, case, strict=True)]
    means = [gls_weights(factor).unsqueeze(0).expand(factor.shape) for factor in factors]
    projector = -(order - 1) * functools.reduce(torch.kron, means)
    for mode, size in enumerate(case):
        kept = [*means[:mode], torch.eye(size).double(), *means[mode + 1 :]]
        projector = projector + functools.reduce(torch.kron, kept)
    additive = one_a_mode([numbers(generator, (size, 1)) for size in case]).flatten()
    left = (torch.eye(additive.numel()).double() - projector) @ functools.reduce(torch.kron, factors) @ projector.mT
    for got, expected, what in (
        (projector @ additive, additive, "additive tensors must stay as they are"),
        (projector @ projector, projector, "the averages must be a projection"),
        (left, torch.zeros_like(left), "what is left must have no covariance with the estimate"),
    ):
        tolerance = INVERTED * max(1.0, largest(expected))
        subject.expect_close(got, expected, tolerance, what, case)  # type: ignore[arg-type]
    for size in case:
        alike = gls_weights(torch.eye(size).double() + draw(st.floats(0, 4)))
        statement = "indices that are alike must have equal weights"
        subject.expect_close(alike, torch.full_like(alike, 1 / size), INVERTED, statement, case)  # type: ignore[arg-type]


def _sizes(asked: Asked, subject: Subject) -> Any:
    """Draw the sizes of a small grid."""
    return mode_sizes(order=asked.order, max_size=4, max_positions=48)


STATEMENTS = (
    Statement(
        "averages of tensor-normal tensors are tensor-normal: laws against dense algebra",
        "Cov(x̄^U, x̄^W) = ⊗_m M_m ⊗ Σ_c",
        laws_of_averages,
        _sizes,
        double=True,
    ),
    Statement(
        "generalised least squares weights make averages the best unbiased estimate of an additive mean",
        "w_m = Σ_m⁻¹1 / 1ᵀΣ_m⁻¹1: Π² = Π, (1 − Π) Σ Πᵀ = 0",
        gls_averages,
        _sizes,
        double=True,
    ),
)
