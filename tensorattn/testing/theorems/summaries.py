"""Summaries: merged from parts, and mapped by linear maps."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from tensorattn.testing.check import Comparison, Comparisons, Draw, law
from tensorattn.testing.strategies import Case, allowed, exact, generators, largest, numbers

__all__ = ["merging", "projecting"]


def _all_subsets(order: int) -> list[tuple[int, ...]]:
    """All subsets of the modes."""
    return [u for size in range(order + 1) for u in itertools.combinations(range(order), size)]


def _alike(case: Case, got: Any, expected: Any, sizes: Sequence[float], verb: str) -> Comparisons:
    """Compare two summaries whose means are at most of the given sizes."""
    for subset, told, count in zip(expected.kept, got.weights, expected.weights, strict=True):
        for name, size in zip(("key", "value"), sizes, strict=True):
            left, right = (exact(getattr(summary, name)(subset)) for summary in (got, expected))
            if count is not None:  # what stands for no position may be anything
                absent = exact(count).unsqueeze(-1) == 0
                left, right = left.masked_fill(absent, 0.0), right.masked_fill(absent, 0.0)
            tolerance = allowed("average", case.dtype, magnitude=size)
            yield Comparison(f"the {name} means of {subset} must {verb}", left, right, tolerance)
        if told is not None and count is not None:
            left, right = torch.broadcast_tensors(exact(told), exact(count))
            tolerance = allowed("average", told.dtype, magnitude=largest(right))
            yield Comparison(f"the weights of {subset} must {verb}", left, right, tolerance)
    tolerance = allowed("average", case.dtype, magnitude=8 * sizes[0] * max(sizes))
    for moment in ("covariance", "key_covariance"):
        yield Comparison(f"the {moment} must {verb}", getattr(got, moment), getattr(expected, moment), tolerance)


@law("the summaries of two parts merge to that of the whole", "S(x ∪ y) = S(x) + S(y)",
     empty=True, max_positions=40, wide=1)  # fmt: skip
def merging(ta: Any, case: Case, draw: Draw) -> Comparisons:
    """The summaries of two parts along a mode merge to that of the whole: means, counts, covariances."""

    def parted(mode: int, start: int, length: int) -> list[Tensor | None] | None:
        if case.weights is None:
            return None
        return [w if w is None or m != mode else w.narrow(-1, start, length) for m, w in enumerate(case.weights)]

    def there(mode: int, start: int, length: int) -> bool:
        given = parted(mode, start, length)
        return given is None or all(w is None or bool(w.any()) for w in given)

    cuts = [(mode, cut) for mode, size in enumerate(case.sizes) for cut in range(1, size)
            if there(mode, 0, cut) and there(mode, cut, size - cut)]  # fmt: skip
    if not cuts:
        return
    mode, cut = draw(st.sampled_from(cuts))
    how: dict[str, Any] = {"order": case.order, "kept": _all_subsets(case.order), "second_moment": True}
    parts = []
    for start, length in ((0, cut), (cut, case.sizes[mode] - cut)):
        pair = (tensor.narrow(len(case.batch) + mode, start, length) for tensor in (case.key, case.value))
        parts.append(ta.summarize(*pair, weights=parted(mode, start, length), **how))
    whole = ta.summarize(case.key, case.value, weights=case.weights, **how)
    sizes = [largest(case.key), largest(case.value)]
    yield from _alike(case, parts[0].merge(parts[1], mode=mode), whole, sizes, "merge")


@law("averages and covariances of a linear map are the linear map of averages and covariances",
     "S(x W + b) = S(x) W + b", double=True, dtype=torch.float64, max_positions=40)  # fmt: skip
def projecting(ta: Any, case: Case, draw: Draw) -> Comparisons:
    """Averages and covariances of what a linear map makes of a tensor are those that it makes of the summary."""
    generator, heads = draw(generators(9)), draw(st.none() | st.integers(1, 3))
    grids, maps, offsets, mapped = [exact(case.key), exact(case.value)], [], [], []
    for tensor in grids:
        width = (heads or 1) * draw(st.integers(1, 3))
        maps.append(numbers(generator, (width, tensor.shape[-1])))
        offsets.append(numbers(generator, (width,)))
        grown = F.linear(tensor, maps[-1], offsets[-1])
        mapped.append(grown if heads is None else grown.unflatten(-1, (heads, -1)).movedim(-2, len(case.batch)))
    given = case.all_weights()
    how: dict[str, Any] = {"order": case.order, "kept": _all_subsets(case.order), "second_moment": True}
    late = ta.summarize(*grids, weights=given, **how)
    late = late.project(*maps, key_bias=offsets[0], value_bias=offsets[1], num_heads=heads)
    given = given if given is None or heads is None else [weight.unsqueeze(-2) for weight in given]
    early = ta.summarize(*mapped, weights=given, **how)
    sizes = [
        float(a.abs().sum(-1).max()) * largest(t) + largest(b) for a, t, b in zip(maps, grids, offsets, strict=True)
    ]
    yield from _alike(case, late, early, sizes, "be projected")
