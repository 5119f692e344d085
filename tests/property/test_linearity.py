"""The adjoint pair by its definitions: averages, outer sums, their backward passes, and the additive part."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

import tensorattn as ta
from tensorattn import reference
from tensorattn.testing import Subject, allowed, cases, tensors
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
