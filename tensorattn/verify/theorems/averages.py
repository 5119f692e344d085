"""Averages: an adjoint pair, summaries that merge, plans in NumPy, and the laws of averages of normal tensors."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import torch
from torch import Tensor

from tensorattn.averages import mode_averages, outer_sum
from tensorattn.planning import plan
from tensorattn.stats import TensorNormal, marginal_cross_covariance, marginal_mean_law
from tensorattn.summarizing import summarize
from tensorattn.testing import Case, Subject, allowed, mode_sizes
from tensorattn.testing.drawing import generators, numbers
from tensorattn.testing.tolerances import exact, largest
from tensorattn.verify.means import mean
from tensorattn.verify.statement import Asked, Statement, drawn_cases, st

__all__ = ["STATEMENTS"]

DENSE = 1e-12  # relative to the largest entry, for dense algebra in float64


def adjoint(subject: Subject, case: Case, draw: Any) -> None:
    """Averaging and its backward pass are adjoint; without weights, that pass is an outer sum."""
    generator = draw(generators(9))
    leaf = case.key.detach().clone().requires_grad_()
    means = mode_averages(leaf, order=case.order, weights=case.weights)
    others = [numbers(generator, mean.shape, case.dtype).to(mean.device) for mean in means]
    (back,) = torch.autograd.grad(means, leaf, others)
    pairs = [_inner(mean, other) for mean, other in zip(means, others, strict=True)]
    left, size = torch.stack([value for value, _ in pairs]).sum(), sum(size for _, size in pairs)
    right, more = _inner(case.key, back)
    tolerance = allowed("average", case.dtype, magnitude=size + more)
    subject.expect_close(right, left, tolerance, "averaging must have its adjoint backwards", case)
    if case.weights is None:
        positions = math.prod(case.sizes)
        scaled = [(exact(other) * other.shape[-2] / positions).to(other) for other in others]
        right, more = _inner(case.key, outer_sum(scaled))
        tolerance = allowed("average", case.dtype, magnitude=size + more)
        subject.expect_close(right, left, tolerance, "outer sums must be adjoint to averages", case)


def _inner(first: Tensor, second: Tensor) -> tuple[Tensor, float]:
    """The inner product, and the size that its rounding errors are measured by."""
    terms = exact(first) * exact(second)
    return terms.sum(), float(terms.abs().sum())


def merging(subject: Subject, case: Case, draw: Any) -> None:
    """The summaries of two parts along a mode merge to that of the whole: means, counts, covariances."""
    mode = draw(st.integers(0, case.order - 1))
    if case.sizes[mode] == 1:
        return
    cut = draw(st.integers(1, case.sizes[mode] - 1))
    kept = [u for size in range(case.order + 1) for u in itertools.combinations(range(case.order), size)]
    how: dict[str, Any] = {"order": case.order, "kept": kept, "second_moment": True}
    dim, parts = len(case.batch) + mode, []
    for start, length in ((0, cut), (cut, case.sizes[mode] - cut)):
        given = None
        if case.weights is not None:
            given = [w if w is None or m != mode else w.narrow(-1, start, length) for m, w in enumerate(case.weights)]
            if any(w is not None and not bool(w.any()) for w in given):
                return  # a part without any position is refused, as every tensor without is
        pair = (tensor.narrow(dim, start, length) for tensor in (case.key, case.value))
        parts.append(summarize(*pair, weights=given, **how))
    merged, whole = parts[0].merge(parts[1], mode=mode), summarize(case.key, case.value, weights=case.weights, **how)
    sizes = [largest(case.key), largest(case.value)]
    for subset, count in zip(whole.kept, whole.weights, strict=True):
        for name, size in zip(("key", "value"), sizes, strict=True):
            got, expected = (exact(getattr(summary, name)(subset)) for summary in (merged, whole))
            if count is not None:  # what stands for no position may be anything
                absent = exact(count).unsqueeze(-1) == 0
                got, expected = got.masked_fill(absent, 0.0), expected.masked_fill(absent, 0.0)
            tolerance = allowed("average", case.dtype, magnitude=size)
            subject.expect_close(got, expected, tolerance, f"the {name} means of {subset} must merge", case)
    tolerance = allowed("average", case.dtype, magnitude=8 * sizes[0] * max(sizes))
    for moment in ("covariance", "key_covariance"):
        got, expected = getattr(merged, moment), getattr(whole, moment)
        subject.expect_close(got, expected, tolerance, f"the {moment} must merge", case)


def plans(subject: Subject, case: Case, draw: Any) -> None:
    """A plan executed in NumPy, by opt_einsum, gives the weighted means that their definition gives."""
    kept = [u for size in range(case.order + 1) for u in itertools.combinations(range(case.order), size)]
    dim, array = case.key.shape[-1], exact(case.key).numpy()
    if case.weights is not None and any(w is not None and w.dim() > 1 for w in case.weights):
        case = case.replace(weights=None)  # a plan has one vector a mode
    modes = range(case.order)
    weights = None if case.weights is None else [_vector(case, mode).numpy() for mode in modes]
    found = plan(case.sizes, dim=dim, batch=case.batch, kept=kept, dtype="float64").execute(array, weights)
    tolerance = allowed("average", torch.float64, magnitude=largest(case.key))
    summary = summarize(exact(case.key), exact(case.key), order=case.order, kept=kept, weights=_given(case))
    for subset, means in zip(kept, found, strict=True):
        subject.expect_close(means, summary.key(subset), tolerance, f"NumPy and torch must agree on {subset}", case)
        definition = mean(case.key, case, subset).reshape(means.shape)
        subject.expect_close(means, definition, tolerance, f"the mean that keeps {subset} must be a mean", case)


def _vector(case: Case, mode: int) -> Tensor:
    """The weights of a mode without batch dimensions."""
    given = None if case.weights is None else case.weights[mode]
    return torch.ones(case.sizes[mode]).double() if given is None else exact(given)


def _given(case: Case) -> list[Tensor] | None:
    """The weights of all modes in float64, or None."""
    return None if case.weights is None else [_vector(case, mode) for mode in range(case.order)]


def laws_of_averages(subject: Subject, case: tuple[int, ...], draw: Any) -> None:
    """Law and cross-covariance of marginal means against Kronecker products multiplied out; the case is the sizes."""
    generator, order = draw(generators(9)), len(case)
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
    ):
        tolerance = DENSE * max(1.0, largest(expected))
        statement = f"{what} must be that of dense algebra"
        subject.expect_close(got, expected, tolerance, statement, case)  # type: ignore[arg-type]


def _sizes(asked: Asked, subject: Subject) -> Any:
    """Draw the sizes of a small grid."""
    return mode_sizes(order=asked.order, max_size=4, max_positions=48)


STATEMENTS = (
    Statement(
        "averaging and its backward pass are adjoint, and so are outer sums up to the weights",
        "⟨A x, t⟩ = ⟨x, Aᵀ t⟩",
        adjoint,
        drawn_cases(),
    ),
    Statement(
        "the summaries of two parts merge to that of the whole",
        "S(x ∪ y) = S(x) + S(y)",
        merging,
        drawn_cases(max_positions=40),
    ),
    Statement(
        "a plan executed in NumPy gives the averages that torch gives",
        "plan(x) = x̄^U for every U",
        plans,
        drawn_cases(dtype=torch.float64),
        double=True,
    ),
    Statement(
        "averages of tensor-normal tensors are tensor-normal: laws against dense algebra",
        "Cov(x̄^U, x̄^W) = ⊗_m M_m ⊗ Σ_c",
        laws_of_averages,
        _sizes,
        double=True,
    ),
)
