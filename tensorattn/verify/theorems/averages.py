"""Averages: an adjoint pair, summaries that merge and project, and plans in NumPy."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tensorattn.averages import mode_averages, outer_sum
from tensorattn.planning import plan
from tensorattn.summarizing import summarize
from tensorattn.summary import Summary
from tensorattn.testing import Case, Subject, allowed
from tensorattn.testing.drawing import generators, numbers
from tensorattn.testing.tolerances import exact, largest
from tensorattn.verify.means import mean
from tensorattn.verify.statement import Statement, drawn_cases, st

__all__ = ["STATEMENTS"]


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
    cuts = [(mode, cut) for mode, size in enumerate(case.sizes) for cut in range(1, size) if _parts(case, mode, cut)]
    if not cuts:
        return
    mode, cut = draw(st.sampled_from(cuts))
    kept = [u for size in range(case.order + 1) for u in itertools.combinations(range(case.order), size)]
    how: dict[str, Any] = {"order": case.order, "kept": kept, "second_moment": True}
    dim, parts = len(case.batch) + mode, []
    for start, length in ((0, cut), (cut, case.sizes[mode] - cut)):
        given = None
        if case.weights is not None:
            given = [w if w is None or m != mode else w.narrow(-1, start, length) for m, w in enumerate(case.weights)]
        pair = (tensor.narrow(dim, start, length) for tensor in (case.key, case.value))
        parts.append(summarize(*pair, weights=given, **how))
    merged, whole = parts[0].merge(parts[1], mode=mode), summarize(case.key, case.value, weights=case.weights, **how)
    _same(subject, merged, whole, [largest(case.key), largest(case.value)], "merge", case)


def _parts(case: Case, mode: int, cut: int) -> bool:
    """Whether both parts have a position: one without any is refused, as every tensor without is."""
    given = None if case.weights is None else case.weights[mode]
    return given is None or bool(given[..., :cut].any() and given[..., cut:].any())


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


def projecting(subject: Subject, case: Case, draw: Any) -> None:
    """Averages and covariances of what a linear map makes of a tensor are those that it makes of the summary."""
    generator, heads = draw(generators(9)), draw(st.none() | st.integers(1, 3))
    kept = [u for size in range(case.order + 1) for u in itertools.combinations(range(case.order), size)]
    grids, maps, offsets, mapped = [exact(case.key), exact(case.value)], [], [], []
    for tensor in grids:
        width = (heads or 1) * draw(st.integers(1, 3))
        maps.append(numbers(generator, (width, tensor.shape[-1])))
        offsets.append(numbers(generator, (width,)))
        grown = F.linear(tensor, maps[-1], offsets[-1])
        mapped.append(grown if heads is None else grown.unflatten(-1, (heads, -1)).movedim(-2, len(case.batch)))
    weights = None if case.weights is None else [case.mode_weights(mode) for mode in range(case.order)]
    how: dict[str, Any] = {"order": case.order, "kept": kept, "second_moment": True}
    late = summarize(*grids, weights=weights, **how)
    late = late.project(*maps, key_bias=offsets[0], value_bias=offsets[1], num_heads=heads)
    if weights is not None and heads is not None:
        weights = [weight.unsqueeze(-2) for weight in weights]
    early = summarize(*mapped, weights=weights, **how)
    sizes = [
        float(a.abs().sum(-1).max()) * largest(t) + largest(b) for a, t, b in zip(maps, grids, offsets, strict=True)
    ]
    _same(subject, late, early, sizes, "be projected", case)


def _same(subject: Subject, got: Summary, expected: Summary, sizes: list[float], verb: str, case: Case) -> None:
    """Compare two summaries whose means are at most of the given sizes."""
    for subset, count in zip(expected.kept, expected.weights, strict=True):
        for name, size in zip(("key", "value"), sizes, strict=True):
            left, right = (exact(getattr(summary, name)(subset)) for summary in (got, expected))
            if count is not None:  # what stands for no position may be anything
                absent = exact(count).unsqueeze(-1) == 0
                left, right = left.masked_fill(absent, 0.0), right.masked_fill(absent, 0.0)
            tolerance = allowed("average", case.dtype, magnitude=size)
            subject.expect_close(left, right, tolerance, f"the {name} means of {subset} must {verb}", case)
    for subset, told, count in zip(expected.kept, got.weights, expected.weights, strict=True):
        if told is not None and count is not None:
            left, right = torch.broadcast_tensors(exact(told), exact(count))
            tolerance = allowed("average", told.dtype, magnitude=largest(right))
            subject.expect_close(left, right, tolerance, f"the weights of {subset} must {verb}", case)
    tolerance = allowed("average", case.dtype, magnitude=8 * sizes[0] * max(sizes))
    for moment in ("covariance", "key_covariance"):
        subject.expect_close(
            getattr(got, moment), getattr(expected, moment), tolerance, f"the {moment} must {verb}", case
        )


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
        drawn_cases(empty=True, max_positions=40, wide=1),
    ),
    Statement(
        "a plan executed in NumPy gives the averages that torch gives",
        "plan(x) = x̄^U for every U",
        plans,
        drawn_cases(dtype=torch.float64),
        double=True,
    ),
    Statement(
        "averages and covariances of a linear map are the linear map of averages and covariances",
        "S(x W + b) = S(x) W + b",
        projecting,
        drawn_cases(dtype=torch.float64, max_positions=40),
        double=True,
    ),
)
