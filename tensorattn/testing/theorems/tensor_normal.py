"""Laws of averages of tensor-normal tensors, against dense algebra."""

from __future__ import annotations

import functools
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tensorattn.testing.check import Asked, Comparison, Comparisons, Draw, law
from tensorattn.testing.strategies import generators, largest, mode_sizes, numbers, one_a_mode

__all__ = ["gls_averages", "laws_of_averages"]

DENSE, INVERTED = 1e-12, 1e-10  # relative to the largest entry: dense algebra in float64, and inverted covariances


def _small_grids(asked: Asked, subject: Any) -> Any:
    """Draw the sizes of a small grid."""
    return mode_sizes(order=asked.order, max_size=4, max_positions=48)


@law("averages of tensor-normal tensors are tensor-normal: laws against dense algebra",
     "Cov(x̄^U, x̄^W) = ⊗_m M_m ⊗ Σ_c", strategy=_small_grids, double=True)  # fmt: skip
def laws_of_averages(ta: Any, case: tuple[int, ...], draw: Draw) -> Comparisons:
    """Law and cross-covariance of marginal means against Kronecker products multiplied out; the case is the sizes."""
    generator, order = draw(generators(9)), len(case)
    effects = [numbers(generator, (size, 2)) for size in case]
    first, second = (sorted(draw(st.sets(st.integers(0, order - 1)))) for _ in range(2))
    roots = [numbers(generator, (size, size)) for size in (*case, 2)]
    factors = [root @ root.mT for root in roots]
    given = [numbers(generator, (size,)).abs() + 0.1 for size in case]
    loc = numbers(generator, (*case, 2))
    normal = ta.TensorNormal(loc, factors[:-1], factors[-1])
    dense = functools.reduce(torch.kron, factors)

    def averaging(kept: list[int]) -> Tensor:
        maps = [torch.eye(n).double() if m in kept else (given[m] / given[m].sum())[None] for m, n in enumerate(case)]
        return functools.reduce(torch.kron, [*maps, torch.eye(2).double()])

    left, right = averaging(first), averaging(second)
    marginal = ta.marginal_mean_law(normal, first, weights=given)
    cross = ta.marginal_cross_covariance(normal, first, second, weights=given).to_dense()
    additive = ta.additive_mean_law(effects, first, weights=given).flatten()
    for found, expected, what in (
        (cross, left @ dense @ right.mT, f"the covariance of the means of {first} and {second}"),
        (marginal.covariance_matrix, left @ dense @ left.mT, f"the covariance of the mean of {first}"),
        (marginal.mean.flatten(), left @ loc.flatten(), f"the expected mean of {first}"),
        (additive, left @ one_a_mode(effects).flatten(), f"the expected mean of {first} of an additive mean"),
    ):
        yield Comparison(f"{what} must be that of dense algebra", found, expected, DENSE * max(1.0, largest(expected)))


@law("generalised least squares weights make averages the best unbiased estimate of an additive mean",
     "w_m = Σ_m⁻¹1 / 1ᵀΣ_m⁻¹1: Π² = Π, (1 − Π) Σ Πᵀ = 0", strategy=_small_grids, double=True)  # fmt: skip
def gls_averages(ta: Any, case: tuple[int, ...], draw: Draw) -> Comparisons:
    """Averages with these weights project on additive tensors, and what they leave has no covariance with them.

    Where all indices of a mode are alike, they are equal weights.
    """
    generator, order = draw(generators(9)), len(case)
    roots = [numbers(generator, (size, size)) for size in case]
    factors = [root @ root.mT / size + 0.5 * torch.eye(size).double() for root, size in zip(roots, case, strict=True)]
    means = [ta.gls_weights(factor).unsqueeze(0).expand(factor.shape) for factor in factors]
    projector = -(order - 1) * functools.reduce(torch.kron, means)
    for mode, size in enumerate(case):
        kept = [*means[:mode], torch.eye(size).double(), *means[mode + 1 :]]
        projector = projector + functools.reduce(torch.kron, kept)
    additive = one_a_mode([numbers(generator, (size, 1)) for size in case]).flatten()
    left = (torch.eye(additive.numel()).double() - projector) @ functools.reduce(torch.kron, factors) @ projector.mT
    for found, expected, told in (
        (projector @ additive, additive, "additive tensors must stay as they are"),
        (projector @ projector, projector, "the averages must be a projection"),
        (left, torch.zeros_like(left), "what is left must have no covariance with the estimate"),
    ):
        yield Comparison(told, found, expected, INVERTED * max(1.0, largest(expected)))
    for size in case:
        alike = ta.gls_weights(torch.eye(size).double() + draw(st.floats(0, 4)))
        told = "indices that are alike must have equal weights"
        yield Comparison(told, alike, torch.full_like(alike, 1 / size), INVERTED)
