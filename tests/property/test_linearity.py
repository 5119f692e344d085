"""The adjoint pair, its plan, and summaries: averages are linear, and everything that is linear commutes with them."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import tensorattn as ta
from tensorattn import reference
from tensorattn.testing import Case, Subject, allowed, batch_sizes, cases, mode_sizes, tensors, weights
from tensorattn.testing.definitions import arrays
from tensorattn.testing.tolerances import exact, largest

AVERAGES = Subject("averages", lambda: None)  # compares, and tells a failure with its case


@st.composite
def grids(draw, **how):
    """A case whose key is a tensor with weights; the query is not used."""
    return draw(cases(max_positions=60, **how))


def close(got, expected, tolerance, statement, case):
    AVERAGES.expect_close(got, expected, tolerance, statement, case)


def inner(first, second):
    """The inner product, and the size that its rounding errors are measured by."""
    terms = exact(first) * exact(second)
    return terms.sum(), float(terms.abs().sum())


def subsets(order):
    """Every subset of the modes."""
    return [kept for size in range(order + 1) for kept in itertools.combinations(range(order), size)]


@given(grids())
def test_mode_averages_equal_their_definition(case):
    means = ta.mode_averages(case.key, order=case.order, weights=case.weights)
    expected = reference.mode_averages(**pick(case, "key"))
    for got, mean in zip(means, expected, strict=True):
        close(got, mean, allowed("average", case.dtype, magnitude=largest(case.key)), "a mode average is a mean", case)


def pick(case, name):
    given = arrays(case)
    return {"tensor": given[name], "order": given["order"], "weights": given["weights"]}


@given(grids(), st.data())
def test_averaging_and_its_backward_pass_are_adjoint(case, data):
    """The inner product of averages with anything equals that of the tensor with what the backward pass makes of it."""
    x = case.key.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    means = ta.mode_averages(x, order=case.order, weights=case.weights)
    others = [data.draw(tensors(tuple(mean.shape), stream=9 + m)) for m, mean in enumerate(means)]
    (back,) = torch.autograd.grad(means, x, others)
    pairs = [inner(mean, other) for mean, other in zip(means, others, strict=True)]
    left, (right, size) = sum(value for value, _ in pairs), inner(x, back)
    close(
        left,
        right,
        allowed("average", case.dtype, magnitude=size + sum(s for _, s in pairs)),
        "<Ax, t> = <x, A't>",
        case,
    )


@given(grids(), st.data())
def test_the_backward_pass_of_averaging_is_a_weighted_outer_sum(case, data):
    """The adjoint spreads each average over its slice, with the weights of all other modes."""
    x = case.key.detach().clone().requires_grad_()
    means = ta.mode_averages(x, order=case.order, weights=case.weights)
    others = [data.draw(tensors(tuple(mean.shape), stream=9 + m)) for m, mean in enumerate(means)]
    (back,) = torch.autograd.grad(means, x, others)
    expected = torch.zeros(x.shape, dtype=torch.float64)
    shares = [w / w.sum(-1, keepdim=True) for w in map(case.mode_weights, range(case.order))]
    for mode, other in enumerate(others):
        term = spread(other, mode, case.order)
        for m, share in enumerate(shares):
            if m != mode:
                term = term * spread(share.unsqueeze(-1), m, case.order)
        expected = expected + term
    tolerance = allowed("average", case.dtype, magnitude=sum(map(largest, others)))
    close(back, expected, tolerance, "the adjoint is an outer sum", case)


def spread(vector, mode, order):
    """View ``(*batch, n_m, D)`` as a tensor of all modes."""
    shape = [vector.shape[-2] if m == mode else 1 for m in range(order)]
    return vector.reshape(*vector.shape[:-2], *shape, vector.shape[-1])


@given(grids(weighted=False), st.data())
def test_without_weights_averaging_and_outer_sum_are_adjoint(case, data):
    means = ta.mode_averages(case.key, order=case.order)
    others = [data.draw(tensors(tuple(mean.shape), stream=9 + m)) for m, mean in enumerate(means)]
    positions = math.prod(case.sizes)
    scaled = [other * (other.shape[-2] / positions) for other in others]
    pairs = [inner(mean, other) for mean, other in zip(means, others, strict=True)]
    left, (right, size) = sum(value for value, _ in pairs), inner(case.key, ta.outer_sum(scaled))
    tolerance = allowed("average", case.dtype, magnitude=size + sum(s for _, s in pairs))
    close(left, right, tolerance, "<averages(x), t> = <x, outer_sum(t n / P)>", case)


@given(grids(), st.data())
def test_outer_sum_and_its_backward_pass_are_adjoint(case, data):
    shapes = [(*case.batch, size, case.key.shape[-1]) for size in case.sizes]
    vectors = [data.draw(tensors(shape, stream=9 + m)).requires_grad_() for m, shape in enumerate(shapes)]
    total = ta.outer_sum(vectors)
    expected = reference.outer_sum([v.detach().numpy() for v in vectors])
    close(
        total, expected, allowed("average", case.dtype, magnitude=sum(map(largest, vectors))), "a broadcast sum", case
    )
    back = torch.autograd.grad(total, vectors, case.key)
    left, size = inner(total, case.key)
    pairs = [inner(v, b) for v, b in zip(vectors, back, strict=True)]
    tolerance = allowed("average", case.dtype, magnitude=size + sum(s for _, s in pairs))
    close(left, sum(value for value, _ in pairs), tolerance, "<Bv, x> = <v, B'x>", case)


@given(grids())
def test_the_additive_part_is_a_projection_that_averages_cannot_tell_from_the_tensor(case):
    given = {"order": case.order, "weights": case.weights}
    part, rest = ta.additive_part(case.key, **given), ta.interaction_residual(case.key, **given)
    tolerance = allowed("average", case.dtype, magnitude=2 * case.order * largest(case.key))
    close(part, reference.additive_part(**pick(case, "key")), tolerance, "the additive part is its definition", case)
    close(part + rest, case.key, tolerance, "the additive part and the residual make the tensor", case)
    close(ta.additive_part(part, **given), part, 4 * tolerance, "the additive part of an additive tensor is all", case)
    for mean, whole in zip(ta.mode_averages(part, **given), ta.mode_averages(case.key, **given), strict=True):
        close(mean, whole, tolerance, "the additive part has the averages of the tensor", case)
    for mean in ta.mode_averages(rest, **given):
        close(mean, torch.zeros_like(mean), tolerance, "the residual averages to zero over every slice", case)


@given(grids(), st.data())
def test_projecting_and_averaging_commute(case, data):
    """A linear map of averages is the average of the linear map; so the covariances, likewise."""
    heads = data.draw(st.none() | st.integers(1, 3))
    widths = [(heads or 1) * data.draw(st.integers(1, 3)) for _ in range(2)]
    maps = [
        data.draw(tensors((width, tensor.shape[-1]), stream=9 + n))
        for n, (width, tensor) in enumerate(zip(widths, (case.key, case.value), strict=True))
    ]
    offsets = [data.draw(st.none() | tensors((width,), stream=11 + n)) for n, width in enumerate(widths)]
    kept = data.draw(st.lists(st.sampled_from(subsets(case.order)), min_size=1, unique=True))
    how = {"order": case.order, "kept": kept, "weights": case.weights, "second_moment": True}
    late = ta.summarize(case.key, case.value, **how).project(
        *maps, key_bias=offsets[0], value_bias=offsets[1], num_heads=heads
    )
    mapped = [F.linear(t, w, b) for t, w, b in zip((case.key, case.value), maps, offsets, strict=True)]
    if heads is not None:
        mapped = [t.unflatten(-1, (heads, -1)).movedim(-2, len(case.batch)) for t in mapped]
        if case.weights is not None:
            rows = [w if w is None or w.dim() < 2 else w.unsqueeze(-2) for w in case.weights]
            how["weights"] = rows
    early = ta.summarize(*mapped, **how)
    gain = [float(w.abs().sum(-1).max()) * largest(t) for w, t in zip(maps, (case.key, case.value), strict=True)]
    shifts = [0.0 if b is None else largest(b) for b in offsets]
    sizes = [allowed("average", case.dtype, magnitude=g + b) for g, b in zip(gain, shifts, strict=True)]
    same(late, early, case, *sizes, allowed("average", case.dtype, magnitude=8 * gain[0] * max(gain)))


def same(got, expected, case, key_tolerance, value_tolerance, covariance_tolerance):
    """Compare two summaries."""
    assert (got.sizes, got.kept, got.batch) == (expected.sizes, expected.kept, expected.batch)
    for kept, count in zip(expected.kept, expected.weights, strict=True):
        for name, tolerance in (("key", key_tolerance), ("value", value_tolerance)):
            pair = [exact(getattr(summary, name)(kept)) for summary in (got, expected)]
            if count is not None:  # what stands for no position may be anything
                pair = [mean.masked_fill(count.unsqueeze(-1) == 0, 0.0) for mean in pair]
            close(*pair, tolerance, f"the {name}s of {kept} agree", case)
    for left, right in zip(got.weights, expected.weights, strict=True):
        assert (left is None) == (right is None)
        if left is not None:
            close(*torch.broadcast_tensors(left, right), 1e-13 * largest(right), "the counts agree", case)
    for moment in ("covariance", "key_covariance"):
        pair = getattr(got, moment), getattr(expected, moment)
        assert (pair[0] is None) == (pair[1] is None)
        if pair[0] is not None:
            close(*pair, covariance_tolerance, f"the {moment} agrees", case)


@given(grids(empty=True), st.data())
def test_merging_the_summaries_of_two_parts_gives_that_of_the_whole(case, data):
    """Along any mode, with any weights, also if one part has no position: means, counts and second moments."""
    longest = [mode for mode, size in enumerate(case.sizes) if size > 1]
    if not longest:
        return
    mode = data.draw(st.sampled_from(longest))
    cut = data.draw(st.integers(1, case.sizes[mode] - 1))
    kept = [*data.draw(st.lists(st.sampled_from(subsets(case.order)), unique=True)), ()]
    kept = list(dict.fromkeys(kept))
    how = {"order": case.order, "kept": kept, "second_moment": True}
    dim = len(case.batch) + mode

    def part(start, length):
        given = None
        if case.weights is not None:
            given = [w if w is None or m != mode else w.narrow(-1, start, length) for m, w in enumerate(case.weights)]
        return given, [tensor.narrow(dim, start, length) for tensor in (case.key, case.value)]

    halves = [part(0, cut), part(cut, case.sizes[mode] - cut)]
    if any(w is not None and not w.any() for given, _ in halves for w in given or ()):
        return  # a part without any position is refused, as every tensor without is
    first, second = (ta.summarize(*pair, weights=given, **how) for given, pair in halves)
    whole = ta.summarize(case.key, case.value, weights=case.weights, **how)
    sizes = [largest(case.key), largest(case.value)]
    tolerances = [allowed("average", case.dtype, magnitude=size) for size in (*sizes, 8 * sizes[0] * max(sizes))]
    same(first.merge(second, mode=mode), whole, case, *tolerances)


@given(mode_sizes(), batch_sizes(), st.integers(1, 4), st.data())
def test_a_plan_executed_in_numpy_gives_what_torch_gives(sizes, batch, dim, data):
    order = len(sizes)
    layout = data.draw(st.sampled_from(["channels_last", "channels_first"]))
    kept = data.draw(st.lists(st.sampled_from(subsets(order)), min_size=1, unique=True))
    tensor = data.draw(tensors((*batch, *sizes, dim)))
    drawn = data.draw(weights(sizes))
    given = None if drawn is None else [torch.ones(n) if w is None else w for w, n in zip(drawn, sizes, strict=True)]
    plan = ta.plan(sizes, dim=dim, batch=batch, kept=kept, dtype="float64", layout=layout)
    in_numpy = plan.execute(tensor.numpy(), None if given is None else [w.double().numpy() for w in given])
    summary = ta.summarize(tensor, tensor, order=order, kept=kept, weights=given)
    case = Case(tensor, tensor, tensor, order, weights=drawn)
    tolerance = allowed("average", torch.float64, magnitude=largest(tensor))
    for subset, array in zip(kept, in_numpy, strict=True):
        assert isinstance(array, np.ndarray)
        close(array, summary.key(subset), tolerance, f"NumPy and torch agree on {subset}", case)
        weighted = None if given is None else [w.numpy() for w in given]
        definition = reference.marginal_mean(tensor.numpy(), subset, order=order, weights=weighted)
        close(array, definition, tolerance, f"the mean over all but {subset} is its definition", case)
