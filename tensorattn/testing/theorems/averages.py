"""Averages of tensors, and what repeating indices does to them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tensorattn.testing import reference
from tensorattn.testing.check import Comparison, Comparisons, Draw, law
from tensorattn.testing.strategies import Case, allowed, exact, generators, largest, numbers
from tensorattn.testing.theorems.common import called, residual_of, vanishes

__all__ = ["additive_parts", "adjoint", "joint_repetition"]


def _inner(first: Tensor, second: Tensor) -> tuple[Tensor, float]:
    """The inner product, and the size that its rounding errors are measured by."""
    terms = exact(first) * exact(second)
    return terms.sum(), float(terms.abs().sum())


@law("averages are means; averaging and its backward pass are adjoint, and so are outer sums up to the weights",
     "A x = x̄^m, ⟨A x, t⟩ = ⟨x, Aᵀ t⟩")  # fmt: skip
def adjoint(ta: Any, case: Case, draw: Draw) -> Comparisons:
    """Averages and outer sums are their definitions; without weights, the one is backwards what the other is."""
    generator, leaf = draw(generators(9)), case.key.detach().clone().requires_grad_()
    means = ta.mode_averages(leaf, order=case.order, weights=case.weights)
    defined = reference.mode_averages(exact(case.key), order=case.order, weights=case.all_weights())
    tolerance = allowed("average", case.dtype, magnitude=largest(case.key))
    for mode, (found, expected) in enumerate(zip(means, defined, strict=True)):
        yield Comparison(f"averages of mode {mode} must be means", found, expected, tolerance)
    others = [numbers(generator, mean.shape, case.dtype).to(mean.device).requires_grad_() for mean in means]
    total = ta.outer_sum(others)
    tolerance = allowed("average", case.dtype, magnitude=sum(map(largest, others)))
    expected = reference.outer_sum([exact(other) for other in others])
    yield Comparison("an outer sum must be a broadcast sum", total, expected, tolerance)
    (back,) = torch.autograd.grad(means, leaf, [other.detach() for other in others])
    pairs: list[tuple[str, Sequence[Tensor], Sequence[Tensor], Tensor, Tensor]]
    pairs = [("averaging", means, others, back, case.key)]
    pairs.append(("an outer sum", others, torch.autograd.grad(total, others, case.key), total, case.key))
    for what, left, right, one, other in pairs:
        products = [_inner(*pair) for pair in (*zip(left, right, strict=True), (one, other))]
        tolerance = allowed("average", case.dtype, magnitude=sum(size for _, size in products))
        found = torch.stack([value for value, _ in products[:-1]]).sum()
        yield Comparison(f"{what} must have its adjoint backwards", found, products[-1][0], tolerance)
    if case.weights is None:
        scaled = [(exact(other) * other.shape[-2] / math.prod(case.sizes)).to(other) for other in others]
        tolerance = allowed("average", case.dtype, magnitude=sum(map(largest, others)))
        yield Comparison("averaging must have an outer sum backwards", back, ta.outer_sum(scaled), tolerance)


@law("the additive part has the averages of the tensor, and nothing else", "x = a + R, R̄^m = 0, a = Σ_m x̄^m − (N−1)x̄")
def additive_parts(ta: Any, case: Case, draw: Draw) -> Comparisons:
    """The additive part is its definition, and a projection that averages cannot tell from the tensor."""
    how = {"order": case.order, "weights": case.weights}
    part, rest = ta.additive_part(case.key, **how), ta.interaction_residual(case.key, **how)
    tolerance = allowed("average", case.dtype, magnitude=2 * case.order * largest(case.key))
    yield Comparison(
        "the additive part must be its definition", exact(case.key) - part, residual_of(case.key, case), tolerance
    )
    yield Comparison("the additive part and the residual must make the tensor", part + rest, case.key, tolerance)
    yield Comparison("the additive part must stay as it is", ta.additive_part(part, **how), part, 4 * tolerance)
    for mean in ta.mode_averages(rest, **how):
        yield vanishes("the residual must average to zero over every slice", mean, tolerance, largest(case.key))


@law("repeating the indices of all modes equally often only counts the tokens of the joint softmax",
     "J same, LSE + log r", max_positions=16)  # fmt: skip
def joint_repetition(ta: Any, case: Case, draw: Draw) -> Comparisons:
    """Every token of the one softmax is there as many times; repeating those of one mode alone would move weight."""
    times, key, value = draw(st.integers(2, 3)), case.key, case.value
    for mode in range(len(case.batch), len(case.batch) + case.order):
        key, value = (tensor.repeat_interleave(times, mode) for tensor in (key, value))
    given = case.weights and tuple(None if w is None else w.repeat_interleave(times, -1) for w in case.weights)
    finer = case.replace(key=key, value=value, weights=given)
    (before, lse, *_), (after, moved, *_) = (called(ta.kao_kv, each, return_lse=True) for each in (case, finer))
    yield Comparison("repeating all indices must have no effect", after, before, case.allowed())
    told = "repeating all indices must count the tokens in the log-sum-exp"
    yield Comparison(told, moved, exact(lse) + math.log(times), case.allowed_lse)
