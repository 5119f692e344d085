"""How far operators are from full attention: the bound, where they are exact, and what they are to first order.

Each statement is a test, and each test is seen to fail, at the end, on a formula or an operator with a mistake.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
import warnings

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel

import tensorattn as ta
from tensorattn import truncation
from tensorattn.diagnose import bound as bounding
from tensorattn.stats import TensorNormal
from tensorattn.testing import Case, Subject, allowed, cases, for_all, tensors
from tensorattn.testing.tolerances import largest

TOLD = Subject("theorem", lambda: None)  # compares, and tells a failure with its case
SLACK = 1e-9  # relative, for bounds


def for_each(strategy, share=1.0):
    """Make a test of a statement about one drawn case."""

    def decorate(statement):
        def test():
            for_all(strategy, statement, examples=max(1, round(settings().max_examples * share)))

        test.__name__, test.__doc__ = statement.__name__, statement.__doc__
        return test

    return decorate


def close(got, expected, tolerance, statement, case):
    TOLD.expect_close(got, expected, tolerance, statement, case)


def called(operator, case, **how):
    given = {"order": case.order, "scale": case.scale, "weights": case.weights, **how}
    return operator(case.query, case.key, case.value, **given)


def at_most(case, logit):
    """The case, with its scale taken back to where no logit is larger."""
    return case if case.logit <= logit else case.replace(scale=case.factor * logit / case.logit)


def shares(case):
    """For each mode, the share of each index in the weight, with the dimensions of a tensor without channels."""
    spread = []
    for mode, size in enumerate(case.sizes):
        weight = case.mode_weights(mode)
        share = weight / weight.sum(-1, keepdim=True)
        spread.append(share.reshape(*case.batch, *(size if m == mode else 1 for m in range(case.order))))
    return spread


def mean(tensor, case, kept=()):
    """Weighted mean of ``(*batch, n_1, …, n_N, *rest)`` over all modes but the kept ones, which stay."""
    for mode, share in enumerate(shares(case)):
        if mode not in kept:
            share = share.reshape(*share.shape, *(1 for _ in range(tensor.dim() - share.dim())))
            tensor = (tensor * share).sum(len(case.batch) + mode, keepdim=True)
    return tensor


def for_queries(tensor, case):
    """Give ``(*batch, D)`` a dimension of size 1 for each dimension of the queries."""
    return tensor.reshape(*case.batch, *(1 for _ in case.positions), tensor.shape[-1])


def queries_last(tensor, case):
    """Move ``(*batch, *positions, n_1, …, n_N)`` to ``(*batch, n_1, …, n_N, L)``."""
    batch = len(case.batch)
    rows = tensor.reshape(*case.batch, math.prod(case.positions), *tensor.shape[batch + len(case.positions) :])
    return rows.movedim(batch, -1)


def product(attention, case):
    """The product of the attention weights of the modes, ``(*batch, n_1, …, n_N, L)``."""
    rows = [queries_last(part, case) for part in attention]
    return functools.reduce(
        torch.mul,
        (
            part.reshape(*case.batch, *(part.shape[-2] if m == mode else 1 for m in range(case.order)), part.shape[-1])
            for mode, part in enumerate(rows)
        ),
    )


def expectation(density, values, case):
    """Mean of ``(*batch, n_1, …, n_N, D)`` under ``(*batch, n_1, …, n_N, L)``, as ``(*batch, *positions, D)``."""
    batch, last = len(case.batch), len(case.batch) + case.order - 1
    found = density.flatten(batch, last).mT @ values.flatten(batch, last)
    return found.reshape(*case.batch, *case.positions, values.shape[-1])


# The error bound.


@for_each(cases(empty=True), share=3)
def test_the_error_bound_is_never_violated_on_any_tensors(case, draw):
    """Nor is it ever negative, infinite or NaN, whatever the weights; a cheaper oscillation only makes it larger.

    Nearly additive keys or values leave one of its terms alone.
    """
    near = {}
    for name in ("key", "value"):
        whole = getattr(case, name)
        additive = ta.additive_part(whole, order=case.order)
        near[name] = additive + draw(st.sampled_from([1.0, 1e-2, 1e-5])) * (whole - additive)
    case = case.replace(**near)
    error = (called(ta.flattened_attention, case) - called(ta.additive_attention, case)).norm(dim=-1)
    rounding = case.allowed() * case.value.shape[-1] ** 0.5
    exact, cheap = (called(ta.error_bound, case, oscillation=how) for how in ("exact", "cheap"))
    TOLD.expect(bool(((exact >= 0) & exact.isfinite()).all()), "the bound is a number of at least 0", case)
    excess = (error - exact * (1 + SLACK)).clamp(min=0)
    close(excess, torch.zeros_like(excess), rounding, "the error is at most the bound", case)
    excess = (exact - cheap * (1 + SLACK)).clamp(min=0)
    close(excess, torch.zeros_like(excess), rounding, "the cheap bound is at least the exact one", case)


def written_out(query, key, value, logs):
    """Errors of additive attention and their bounds, from the definitions, with gradients; the diameter is exact.

    Queries ``(L, D)``, keys ``(n_1, …, n_N, D)`` and values; logarithms of weights, one vector a mode.
    """
    order = len(logs)
    view = [[-1 if m == mode else 1 for m in range(order)] for mode in range(order)]
    vectors = [log.softmax(-1) for log in logs]
    uniform = [vector.reshape(*where, 1) for vector, where in zip(vectors, view, strict=True)]

    def average(tensor, kept):
        for mode, share in enumerate(uniform):
            tensor = tensor if mode in kept else (tensor * share).sum(mode, keepdim=True)
        return tensor

    def additive(tensor):
        return sum(average(tensor, (m,)) for m in range(order)) - (order - 1) * average(tensor, ())

    modes = tuple(range(1, order + 1))
    log_share = sum(vector.log().reshape(where) for vector, where in zip(vectors, view, strict=True))
    share = log_share.exp()
    residual = value - additive(value)
    tilt = torch.einsum("ld,...d->l...", query, key - additive(key))
    tilted = torch.einsum("ld,...d->l...", query, key) + log_share
    full = tilted.flatten(1).softmax(-1) @ value.flatten(0, -2)
    straight = (torch.einsum("ld,...d->l...", query, additive(key)) + log_share).flatten(1).softmax(-1)
    error = (full - straight @ (value - residual).flatten(0, -2)).norm(dim=-1)

    density = straight.reshape(tilt.shape) / share
    chi = [((density * share).sum([m for m in modes if m != mode + 1]) ** 2 / vectors[mode]).sum(-1) - 1
           for mode in range(order)]  # fmt: skip
    interaction = functools.reduce(torch.mul, (1 + x for x in chi)) - 1 - sum(chi)
    covariance = torch.einsum("...a,...b,...->ab", residual, residual, share)
    deviation = torch.linalg.matrix_norm(covariance, 2).sqrt()
    remainder = torch.minimum(residual.norm(dim=-1).max(), deviation * interaction.clamp(min=1e-30).sqrt())
    points = value.flatten(0, -2)
    diameter = (points[:, None] - points[None]).square().sum(-1).clamp(min=1e-30).sqrt().max()
    return error, diameter * ((tilt.amax(modes) - tilt.amin(modes)) / 4).tanh() + remainder


def ascend(sizes, dim, value_dim, seed, steps=25):
    """Tensors for which the error is as large a part of its bound as a few steps uphill make it."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, dim), (*sizes, dim), (*sizes, value_dim), *((size,) for size in sizes)]
    leaves = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    climber = torch.optim.Adam(leaves, lr=0.1, maximize=True)
    for _ in range(steps):
        climber.zero_grad()
        error, limit = written_out(*leaves[:3], leaves[3:])
        (error / limit).log().sum().backward()
        climber.step()
    return [leaf.detach() for leaf in leaves]


@pytest.mark.parametrize(
    ("sizes", "dim", "value_dim"),
    [((2, 2), 1, 1), ((2, 2), 2, 2), ((3, 2), 2, 1), ((2, 2, 2), 2, 2), ((4, 3), 3, 2), ((2, 2, 1, 2), 1, 1)],
    ids=str,
)
def test_the_error_bound_is_not_violated_where_an_adversary_looks_for_a_violation(sizes, dim, value_dim):
    """Queries, keys, values and weights move uphill along the gradient of the ratio of error and bound."""
    climbed = []
    for seed in range(2):
        before, after = (ascend(sizes, dim, value_dim, seed, steps) for steps in (0, 25))
        ratios = []
        for query, key, value, *logs in (before, after):
            given = {"order": len(sizes), "scale": 1.0, "weights": [log.exp() for log in logs]}
            error, limit = written_out(query, key, value, logs)
            bound = ta.error_bound(query, key, value, oscillation="exact", **given)
            difference = ta.flattened_attention(query, key, value, **given) - ta.additive_attention(
                query, key, value, **given
            )
            assert torch.allclose(difference.norm(dim=-1), error, rtol=1e-9, atol=1e-13)
            assert (error <= limit * (1 + SLACK)).all() and (limit <= bound * (1 + SLACK)).all()
            if value_dim == 1:  # a range is known exactly
                assert torch.allclose(limit, bound, rtol=1e-9)
            ratios.append((error / limit).min())
        climbed.append(ratios[1] / ratios[0])
    assert max(climbed) > 1.1  # it did look


@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("oscillation", ["exact", "cheap"])
def test_the_error_bound_is_attained_by_the_exclusive_or(order, oscillation):
    """Keys and values that are 1 or -1 by parity, as interactions are: within 0.1 % at an oscillation of 0.1."""
    parity = functools.reduce(
        torch.mul, (torch.tensor([1.0, -1.0]).double().reshape([2] + [1] * mode) for mode in range(order))
    ).unsqueeze(-1)
    for spread, most in ((0.1, 1.001), (1.0, 1.07)):
        query = torch.tensor([spread / 2], dtype=torch.float64)
        given = {"order": order, "scale": 1.0}
        error = ta.flattened_attention(query, parity, parity, **given) - ta.additive_attention(
            query, parity, parity, **given
        )
        ratio = float(ta.error_bound(query, parity, parity, oscillation=oscillation, **given) / error.norm())
        assert 1 - SLACK <= ratio <= most, ratio
        assert ratio == pytest.approx(1 + math.tanh(spread / 4) ** 2, rel=1e-12)


# Counting numbers.


@st.composite
def families(draw):
    order = draw(st.integers(1, 5))
    subsets = st.sets(st.integers(0, order - 1), min_size=1)
    return order, draw(st.lists(subsets, min_size=1, max_size=6))


@for_each(families(), share=5)
def test_counting_numbers_count_every_kept_effect_once(family, draw):
    """The sum of the counting numbers of all kept sets that contain a kept set is one, for each, in whole numbers."""
    order, kept = family
    counts = truncation.counting_numbers(truncation.kept_family(order, kept, None))
    closure = {part for u in kept for size in range(len(u) + 1) for part in itertools.combinations(sorted(u), size)}
    assert set(counts) == closure, f"{family}: a part of a kept set is missing, or one too many is there"
    assert all(type(count) is int for count in counts.values()), f"{family}: {counts}"
    for subset in counts:
        total = sum(count for larger, count in counts.items() if set(subset) <= set(larger))
        assert total == 1, f"{family}: what {subset} stands for is counted {total} times"


@pytest.mark.parametrize(("order", "largest_set"), [(n, r) for n in range(1, 8) for r in range(1, n + 1)])
def test_counting_numbers_of_all_sets_of_some_size_have_a_closed_form(order, largest_set):
    """They are (-1)^(r - |U|) binomial(N - |U| - 1, r - |U|)."""
    counts = truncation.counting_numbers(truncation.kept_family(order, None, largest_set))
    assert counts == {
        subset: closed_form(order, largest_set, size)
        for size in range(largest_set, -1, -1)
        for subset in itertools.combinations(range(order), size)
    }


def closed_form(order, largest_set, size):
    if size == order:
        return 1  # binomial(-1, 0)
    return (-1) ** (largest_set - size) * math.comb(order - size - 1, largest_set - size)


# Additive keys.


@for_each(cases(additive=True))
def test_additive_keys_with_values_of_some_order_need_the_means_up_to_that_order_only(case, draw):
    """F = Σ c_U <⊗ p_m, V^U> over all sets U of at most r modes: the Möbius formula, and truncated attention."""
    degree = draw(st.integers(1, case.order))
    value = torch.zeros_like(case.value)
    for place, subset in enumerate(itertools.combinations(range(case.order), degree)):
        sizes = [size if mode in subset else 1 for mode, size in enumerate(case.sizes)]
        value = value + draw(tensors((*case.batch, *sizes, value.shape[-1]), stream=9 + place))
    case = case.replace(value=value)
    full = called(ta.flattened_attention, case)
    weights = product(called(ta.additive_attention, case, return_attention=True).attention, case)
    formula = torch.zeros_like(full)
    for size in range(degree + 1):
        for subset in itertools.combinations(range(case.order), size):
            marginal = mean(value, case, subset).expand_as(value)
            formula = formula + closed_form(case.order, degree, size) * expectation(weights, marginal, case)
    tolerance = case.allowed(largest(full))
    close(formula, full, tolerance, f"values of order {degree} need their means of that order only", case)
    output = called(ta.truncated_attention, case, interaction_order=degree)
    close(output, full, tolerance, f"truncation at order {degree} is exact for additive keys", case)


@for_each(cases(additive=True))
def test_with_additive_keys_the_error_is_the_mean_interaction_residual_of_the_values(case, draw):
    """F - A = E[R] under the product of the modes' softmaxes, for any values."""
    case = case.replace(value=draw(tensors(case.value.shape, stream=9)))
    output, _, attention = called(ta.additive_attention, case, return_attention=True)
    residual = ta.interaction_residual(case.value, order=case.order, weights=case.weights)
    error = called(ta.flattened_attention, case) - output
    statement = "the error is the mean of the residual of the values"
    close(error, expectation(product(attention, case), residual, case), case.allowed(), statement, case)


# Logits without terms across modes.


@st.composite
def orthogonal_modes(draw):
    """Queries and keys in which each mode has channels of its own, rotated; any values."""
    case = draw(cases(on_grid=True, max_positions=36))
    blocks = [draw(st.integers(1, 3)) for _ in case.sizes]
    dim = sum(blocks)

    def one_block_a_mode(stream):
        parts = []
        for mode, (size, width) in enumerate(zip(case.sizes, blocks, strict=True)):
            shape = [*case.batch, *(size if m == mode else 1 for m in range(case.order)), width]
            parts.append(draw(tensors(shape, stream=stream + mode)).expand(*case.batch, *case.sizes, width))
        return torch.cat(parts, -1)

    rotation = torch.linalg.qr(draw(tensors((dim, dim), stream=30))).Q
    drawn = case.replace(query=one_block_a_mode(10) @ rotation, key=one_block_a_mode(20) @ rotation)
    return at_most(drawn, 1e3)


@for_each(orthogonal_modes())
def test_the_kronecker_product_is_exact_where_modes_live_in_orthogonal_channels(case, draw):
    """For any values: the logits then have no term across modes."""
    full, output = (called(operator, case) for operator in (ta.flattened_attention, ta.kronecker_product_attention))
    close(output, full, case.allowed(), "the product of the modes' attention is full attention", case)


@for_each(orthogonal_modes())
def test_centred_attention_of_averages_is_exact_there_for_additive_values(case, draw):
    terms = [
        draw(tensors((*case.batch, *(n if m == mode else 1 for m, n in enumerate(case.sizes)), 3), stream=40 + mode))
        for mode in range(case.order)
    ]
    case = case.replace(value=sum(terms) + torch.zeros(*case.batch, *case.sizes, 3))
    full, output = called(ta.flattened_attention, case), called(ta.kao_qkv, case, centered=True)
    close(output, full, case.allowed(), "centred attention of averages is full attention", case)


# First order in the scale.


def slope(operator, case, **how):
    """Derivative of the output with respect to the scale at scale zero, by forward differentiation."""

    def scaled(scale):
        return called(operator, case.replace(query=case.query * scale, scale=1.0), **how)

    zero, one = (torch.tensor(number, dtype=torch.float64) for number in (0.0, 1.0))
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.jit.script", DeprecationWarning)  # torch's own, on the first call
        return torch.func.jvp(scaled, (zero,), (one,))[1]


def covariance(case, kept):
    """Weighted covariance of the mean values and keys over all modes but the kept ones, from its definition."""
    batch = len(case.batch)
    left, right = (
        (mean(tensor, case, kept) - mean(tensor, case)).expand_as(tensor).flatten(batch, -2)
        for tensor in (case.value, case.key)
    )
    share = functools.reduce(torch.mul, shares(case)).flatten(batch)
    return (left * share.unsqueeze(-1)).mT @ right


def expect_slope(case, matrix, operator, **how):
    batch = len(case.batch)
    expected = case.query.reshape(*case.batch, math.prod(case.positions), case.query.shape[-1]) @ matrix.mT
    expected = expected.reshape(*case.query.shape[:-1], matrix.shape[-2])
    reach = largest(case.query.reshape(*case.batch, -1).norm(dim=-1)) if batch else float(case.query.norm())
    tolerance = allowed("slope", case.dtype, magnitude=reach * case.magnitude * largest(case.key))
    statement = f"the first order of {operator.__name__}({how}) is that of the theory"
    close(slope(operator, case, **how), expected, tolerance, statement, case)


@for_each(cases(max_positions=24))
def test_to_first_order_full_attention_is_the_covariance_of_values_and_keys(case, draw):
    """dF/ds = C_tot q at scale zero; and so of additive and truncated attention with the interaction term."""
    everything = covariance(case, range(case.order))
    expect_slope(case, everything, ta.flattened_attention)
    for saturation in (None, 1.0):
        how = {"interaction": "linear", "saturation": saturation}
        expect_slope(case, everything, ta.additive_attention, **how)
        how["interaction_order"] = draw(st.integers(1, case.order))
        expect_slope(case, everything, ta.truncated_attention, **how)


@for_each(cases(max_positions=24))
def test_to_first_order_additive_attention_lacks_the_covariance_of_the_interaction_residuals(case, draw):
    """dA/ds = (C_tot - C_vk) q, where C_vk is the covariance of the residuals of values and keys."""
    given = {"order": case.order, "weights": case.weights}
    residual = case.replace(
        key=ta.interaction_residual(case.key, **given), value=ta.interaction_residual(case.value, **given)
    )
    every = range(case.order)
    expect_slope(case, covariance(case, every) - covariance(residual, every), ta.additive_attention)


@for_each(cases(max_positions=24))
def test_to_first_order_the_joint_softmax_weighs_the_covariances_of_modes_by_their_size(case, draw):
    """dJ/ds = Σ n_m/S Cov_m q; with weights, the sum of the weights of a mode is its size."""
    totals = torch.stack([case.mode_weights(mode).sum(-1) for mode in range(case.order)])
    parts = totals / totals.sum(0)
    matrix = sum(parts[mode][..., None, None] * covariance(case, (mode,)) for mode in range(case.order))
    expect_slope(case, matrix, ta.kao_kv)


@for_each(cases(max_positions=24))
def test_to_first_order_truncated_attention_counts_the_covariances_of_the_kept_means(case, draw):
    """The derivative is Σ c_U Cov_U q for any family of kept sets: C_tot less the orders that are not kept."""
    modes = st.sets(st.integers(0, case.order - 1), min_size=1)
    kept = [tuple(sorted(subset)) for subset in draw(st.lists(modes, min_size=1, max_size=4))]
    counts = ta.reference.counting_numbers(kept, case.order)
    matrix = sum(count * covariance(case, subset) for subset, count in counts.items())
    expect_slope(case, matrix, ta.truncated_attention, kept=kept)


# What the attention weights of modes are.


def log_density(weights, case):
    """Logarithm of ``(*batch, n_1, …, n_N, L)`` against the shares of the positions; 0 where none counts."""
    share = functools.reduce(torch.mul, shares(case)).unsqueeze(-1)
    return torch.where(share > 0, weights / torch.where(share > 0, share, 1), 1).log()


@for_each(cases())
def test_the_attention_to_a_mode_is_the_geometric_marginal_of_full_attention(case, draw):
    """On any data: the geometric mean of the attention weights of a slice, made to sum to one."""
    case = at_most(case, 20)
    full, own = (
        called(operator, case, return_attention=True).attention
        for operator in (ta.flattened_attention, ta.additive_attention)
    )
    logs = log_density(queries_last(full[0], case), case)
    for mode, weights in enumerate(own):
        share = shares(case)[mode].unsqueeze(-1)
        marginal = share * mean(logs, case, (mode,)).exp()
        marginal = marginal / marginal.sum(len(case.batch) + mode, keepdim=True)
        marginal = marginal.flatten(len(case.batch), -2)  # of the other modes, one index is left
        tolerance = allowed("log-sum-exp", case.dtype, logit=case.logit)
        statement = f"attention to mode {mode} is a geometric marginal"
        close(queries_last(weights, case), marginal, tolerance, statement, case)


@for_each(cases())
def test_the_product_of_the_modes_attention_is_the_projection_of_full_attention(case, draw):
    """Of all product laws it is the closest to full attention in the Aitchison distance, that of centred logarithms."""
    case = at_most(case, 20)
    full = called(ta.flattened_attention, case, return_attention=True).attention[0]
    own = called(ta.additive_attention, case, return_attention=True).attention
    others = [draw(tensors(part.shape, stream=9 + mode)).softmax(-1) for mode, part in enumerate(own)]
    truth, nearest, other = (
        logs - mean(logs, case)
        for logs in (
            log_density(queries_last(full, case), case),
            log_density(product(own, case), case),
            log_density(product(others, case), case),
        )
    )

    def squared(left, right):
        return mean((left - right).square(), case)

    size = 1 + case.logit + largest(other)
    tolerance = allowed("log-sum-exp", case.dtype, logit=size) * size
    legs = squared(truth, nearest) + squared(nearest, other)
    close(squared(truth, other), legs, tolerance, "the product of the modes is the foot of the perpendicular", case)


@for_each(cases())
def test_log_sum_exps_only_grow_as_more_modes_are_kept(case, draw):
    """Jensen's inequality, step by step from the logit of the mean to the log-sum-exp of all positions."""
    everything = tuple(range(case.order))
    total = functools.reduce(torch.mul, (case.mode_weights(mode).sum(-1) for mode in everything))
    center = for_queries(mean(case.key, case).flatten(len(case.batch), -2).squeeze(-2), case)
    ladder = {(): case.factor * (case.query * center).sum(-1) + for_queries(total.log().unsqueeze(-1), case)[..., 0]}
    for size in range(1, case.order + 1):
        for kept in itertools.combinations(everything, size):
            ladder[kept] = called(ta.truncated_attention, case, kept=[kept], return_lse=True).lse
    for kept, below in ladder.items():
        for larger, above in ladder.items():
            if set(kept) < set(larger):
                drop = (below - above).clamp(min=0)
                close(drop, torch.zeros_like(drop), case.allowed_lse, f"keeping {larger} is above {kept}", case)
    full = called(ta.flattened_attention, case, return_lse=True).lse
    close(ladder[everything], full, case.allowed_lse, "the last step is full attention", case)


# How fast outputs move.


def diameter(rows, present):
    """Largest distance of two of the present rows ``(*batch, S, D)``, with ``(*batch, S)``."""
    pairs = present.unsqueeze(-1) & present.unsqueeze(-2)
    return torch.where(pairs, (rows.unsqueeze(-2) - rows.unsqueeze(-3)).norm(dim=-1), 0.0).amax((-1, -2))


def speed_limits(case):
    """Lipschitz constants in the query of additive attention and of the joint softmax, for each batch entry."""
    given = {"order": case.order, "weights": case.weights}
    keys, values = (ta.mode_averages(tensor, **given) for tensor in (case.key, case.value))
    present = [case.mode_weights(mode) > 0 for mode in range(case.order)]
    additive = sum(diameter(k, p) * diameter(v, p) for k, v, p in zip(keys, values, present, strict=True))
    joint = diameter(torch.cat(keys, -2), torch.cat(present, -1)) * diameter(
        torch.cat(values, -2), torch.cat(present, -1)
    )
    return {ta.additive_attention: case.factor / 4 * additive, ta.kao_kv: case.factor / 4 * joint}


@for_each(cases(), share=2)
def test_outputs_move_no_faster_than_the_diameters_of_their_tokens_allow(case, draw):
    """A quarter of the scale times the diameters of keys and of values, mode by mode, or of all averages together."""
    case = case.replace(query=case.query * 10 ** draw(st.floats(-3, 0)))  # outputs move fastest where logits are small
    step = 10 ** draw(st.floats(-3, 1)) * draw(tensors(case.query.shape, stream=9))
    moved = case.replace(query=case.query + step)
    tolerance = (case.allowed() + moved.allowed()) * case.value.shape[-1] ** 0.5
    for operator, limit in speed_limits(case).items():
        change = (called(operator, moved) - called(operator, case)).norm(dim=-1)
        limit = for_queries(limit.unsqueeze(-1), case)[..., 0] * step.norm(dim=-1)
        excess = (change - limit * (1 + SLACK)).clamp(min=0)
        statement = f"{operator.__name__} moves no faster than its limit"
        close(excess, torch.zeros_like(excess), tolerance, statement, case)


def test_two_opposite_tokens_move_as_fast_as_the_limit():
    """One mode, keys and values 1 and -1: the output is tanh(s q), whose slope at zero is s."""
    token = torch.tensor([[1.0], [-1.0]]).double()
    query = torch.tensor([[-1e-3], [1e-3]], dtype=torch.float64)
    case = Case(query, token, token, 1, scale=0.7)
    for operator, limit in speed_limits(case).items():
        change = called(operator, case).diff(dim=0)
        assert float(change.norm() / (limit * 2e-3)) == pytest.approx(1, abs=1e-6)


# Many positions.


def asymptotic_errors(**options):
    """Centred relative errors at 32 x 32 and 128 x 128 positions, each over ten seeds.

    Keys and values are one sample of a tensor-normal law with independent entries around a random additive mean;
    queries are independent of it, and such that the logits with the noise have variance one.
    """
    errors = []
    for size in (32, 128):
        missed = signal = 0.0
        for seed in range(10):
            generator = torch.Generator().manual_seed(seed)
            rows, columns, query = (
                torch.randn(shape, generator=generator) for shape in ((size, 1, 8), (size, 8), (32, 8))
            )
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                x = TensorNormal((rows + columns) / 2, [torch.eye(size)] * 2, torch.eye(8)).sample()
            query = query / query.norm(dim=-1, keepdim=True)
            full = ta.flattened_attention(query, x, x, order=2, scale=1.0)
            output = ta.additive_attention(query, x, x, order=2, scale=1.0, **options)
            missed += float((output - full).square().sum())
            signal += float((full - x.mean((0, 1))).square().sum())
        errors.append((missed / signal) ** 0.5)
    return errors


def test_on_normal_tensors_the_interaction_term_makes_the_error_fall_with_the_number_of_positions():
    """Like its square root: four times smaller for sixteen times as many; without the term it stays where it is."""
    small, large = asymptotic_errors(interaction="linear", saturation=None)
    assert 0.15 < large / small < 0.45
    assert min(asymptotic_errors()) > 0.4


# Every test above can fail.

settings.register_profile("bounds: find only", settings(), max_examples=100, phases=[Phase.generate])


@pytest.fixture
def finding():
    """A mistake only has to be found, not to be made small."""
    before = settings.get_current_profile_name()
    settings.load_profile("bounds: find only")
    yield
    settings.load_profile(before)


def altered(function, **changes):
    """A function that gets other arguments than it is given."""

    @functools.wraps(function)
    def mutant(*tensors, **given):
        return function(*tensors, **{**given, **{name: change(given.get(name)) for name, change in changes.items()}})

    return mutant


def times(factor, function):
    """A function whose result is too large or too small."""
    return functools.wraps(function)(lambda *arguments, **given: factor * function(*arguments, **given))


def without_weights(function):
    return altered(function, weights=lambda given: None)


def scaled_by(factor, function):
    return altered(function, scale=lambda given: factor * given if given is not None else None)


def infinite_where_nothing_is(query, key, value, **given):
    bound = ERROR_BOUND(query, key, value, **given)
    return torch.where(bound == 0, torch.inf, bound)


def means_of_modes_alike(query, key, value, *, order, **given):
    """The mean of the modes' attention, in place of a joint softmax that favours long modes."""
    attention = ta.additive_attention(query, key, value, order=order, **given)
    average = ta.additive_attention(query, key, value, order=order, **{**given, "scale": 0.0})
    return average + (attention - average) / order


means_of_modes_alike.__name__ = "kao_kv"


def arithmetic_marginals(query, key, value, *, order, **given):
    """Attention weights that are sums of full attention over slices, not geometric means."""
    full = ta.flattened_attention(query, key, value, order=order, **given)
    modes = range(-order, 0)
    marginals = tuple(full.attention[0].sum([m for m in modes if m != mode]) if order > 1 else full.attention[0]
                      for mode in modes)  # fmt: skip
    return full._replace(attention=marginals)


def counted_without_what_is_averaged(query, key, value, *, order, kept=None, **given):
    result = TRUNCATED(query, key, value, order=order, kept=kept, **given)
    others = [m for m in range(order) if m not in kept[0]]
    weights = given.get("weights") or [None] * order
    totals = (torch.tensor(key.shape[m - order - 1]).double() if weights[m] is None else weights[m].sum(-1).double()
              for m in others)  # fmt: skip
    count = functools.reduce(torch.mul, totals, torch.ones(key.shape[: -order - 1]).double())
    return result._replace(lse=result.lse - count.log()[(..., *[None] * (result.lse.dim() - count.dim()))])


def alternating(family):
    return {kept: (-1) ** len(kept) for kept in COUNTING(family)}


def maximal_sets_only(family):
    return {kept: int(kept in family) for kept in COUNTING(family)}


def in_floats(family):
    return {kept: float(count) for kept, count in COUNTING(family).items()}


def ascend_in_vain(sizes, dim, value_dim, seed, steps):
    return ASCEND(sizes, dim, value_dim, seed, 0)


def without_signs(*sizes):
    return abs(CLOSED(*sizes))


ASCEND, CLOSED = ascend, closed_form
HERE, COUNTING = sys.modules[__name__], truncation.counting_numbers
ERROR_BOUND, TRUNCATED = ta.error_bound, ta.truncated_attention

NEVER = test_the_error_bound_is_never_violated_on_any_tensors
ADVERSARY = functools.partial(
    test_the_error_bound_is_not_violated_where_an_adversary_looks_for_a_violation, (2, 2), 1, 1
)
EXCLUSIVE_OR = functools.partial(test_the_error_bound_is_attained_by_the_exclusive_or, 2, "exact")
CLOSED_FORM = functools.partial(test_counting_numbers_of_all_sets_of_some_size_have_a_closed_form, 4, 2)
DEGREES = test_additive_keys_with_values_of_some_order_need_the_means_up_to_that_order_only
RESIDUALS = test_with_additive_keys_the_error_is_the_mean_interaction_residual_of_the_values
FIRST_ORDER = test_to_first_order_full_attention_is_the_covariance_of_values_and_keys
LACKING = test_to_first_order_additive_attention_lacks_the_covariance_of_the_interaction_residuals
JOINT = test_to_first_order_the_joint_softmax_weighs_the_covariances_of_modes_by_their_size
KEPT = test_to_first_order_truncated_attention_counts_the_covariances_of_the_kept_means
MARGINALS = test_the_attention_to_a_mode_is_the_geometric_marginal_of_full_attention
PROJECTION = test_the_product_of_the_modes_attention_is_the_projection_of_full_attention
LADDER = test_log_sum_exps_only_grow_as_more_modes_are_kept
SPEED = test_outputs_move_no_faster_than_the_diameters_of_their_tokens_allow
POSITIONS = test_on_normal_tensors_the_interaction_term_makes_the_error_fall_with_the_number_of_positions

MISTAKES = [
    # what is wrong, the test that sees it, where, the name there, what is put in its place
    ("no diameter term", NEVER, bounding, "_diameter", times(0.0, bounding._diameter)),
    ("no remainder", NEVER, bounding, "_deviation", times(0.0, bounding._deviation)),
    ("no oscillation", NEVER, bounding, "_range", times(0.0, bounding._range)),
    ("weights left out", ADVERSARY, ta, "error_bound", without_weights(ta.error_bound)),
    ("scale left out", NEVER, ta, "error_bound", altered(ta.error_bound, scale=lambda given: 0.1)),
    ("infinite", NEVER, ta, "error_bound", infinite_where_nothing_is),
    ("cheaper than true", NEVER, bounding, "_largest_norm", times(0.4, bounding._largest_norm)),
    ("joint softmax", NEVER, ta, "additive_attention", ta.kao_kv),
    ("excess halved", ADVERSARY, bounding, "_excess", times(0.5, bounding._excess)),
    ("0.1 % less", ADVERSARY, ta, "error_bound", times(0.999, ta.error_bound)),
    ("0.1 % more", ADVERSARY, ta, "error_bound", times(1.001, ta.error_bound)),
    ("does not climb", ADVERSARY, HERE, "ascend", ascend_in_vain),
    ("0.1 % less", EXCLUSIVE_OR, ta, "error_bound", times(0.999, ta.error_bound)),
    ("0.1 % more", EXCLUSIVE_OR, ta, "error_bound", times(1.001, ta.error_bound)),
    ("radius for diameter", EXCLUSIVE_OR, bounding, "_diameter", times(0.5, bounding._diameter)),
    ("signs only", test_counting_numbers_count_every_kept_effect_once, truncation, "counting_numbers", alternating),
    (
        "no corrections",
        test_counting_numbers_count_every_kept_effect_once,
        truncation,
        "counting_numbers",
        maximal_sets_only,
    ),
    ("floats", test_counting_numbers_count_every_kept_effect_once, truncation, "counting_numbers", in_floats),
    ("signs only", CLOSED_FORM, truncation, "counting_numbers", alternating),
    ("no corrections", CLOSED_FORM, truncation, "counting_numbers", maximal_sets_only),
    ("one order less", DEGREES, ta, "truncated_attention",
     altered(ta.truncated_attention, interaction_order=lambda r: max(1, r - 1))),
    ("no signs", DEGREES, HERE, "closed_form", without_signs),
    ("joint softmax", DEGREES, ta, "additive_attention", ta.kao_kv),
    ("weights left out", DEGREES, ta, "truncated_attention", without_weights(ta.truncated_attention)),
    ("weights left out", RESIDUALS, ta, "interaction_residual", without_weights(ta.interaction_residual)),
    ("tensor for residual", RESIDUALS, ta, "interaction_residual", lambda tensor, **given: tensor),
    ("sums for means", test_the_kronecker_product_is_exact_where_modes_live_in_orthogonal_channels, ta,
     "kronecker_product_attention", altered(ta.kronecker_product_attention, pool=lambda given: "sum")),
    ("a sum for the product", test_the_kronecker_product_is_exact_where_modes_live_in_orthogonal_channels, ta,
     "kronecker_product_attention", ta.kronecker_sum_attention),
    ("not centred", test_centred_attention_of_averages_is_exact_there_for_additive_values, ta, "kao_qkv",
     altered(ta.kao_qkv, centered=lambda given: False)),
    ("weights left out", test_centred_attention_of_averages_is_exact_there_for_additive_values, ta, "kao_qkv",
     without_weights(ta.kao_qkv)),
    ("no interaction", FIRST_ORDER, ta, "additive_attention",
     altered(ta.additive_attention, interaction=lambda given: None)),
    ("truncation without it", FIRST_ORDER, ta, "truncated_attention",
     altered(ta.truncated_attention, interaction=lambda given: None)),
    ("weights left out", FIRST_ORDER, ta, "flattened_attention", without_weights(ta.flattened_attention)),
    ("interaction", LACKING, ta, "additive_attention",
     altered(ta.additive_attention, interaction=lambda given: "linear")),
    ("weights left out", LACKING, ta, "interaction_residual", without_weights(ta.interaction_residual)),
    ("modes alike", JOINT, ta, "kao_kv", means_of_modes_alike),
    ("not damped", JOINT, ta, "kao_kv", ta.additive_attention),
    ("all pairs", KEPT, ta, "truncated_attention", altered(ta.truncated_attention, kept=lambda given: None)),
    ("weights left out", KEPT, ta, "truncated_attention", without_weights(ta.truncated_attention)),
    ("arithmetic", MARGINALS, ta, "additive_attention", arithmetic_marginals),
    ("weights left out", MARGINALS, ta, "additive_attention", without_weights(ta.additive_attention)),
    ("arithmetic", PROJECTION, ta, "additive_attention", arithmetic_marginals),
    ("1 % warmer", PROJECTION, ta, "additive_attention", scaled_by(1.01, ta.additive_attention)),
    ("averages not counted", LADDER, ta, "truncated_attention", counted_without_what_is_averaged),
    ("1 % warmer", LADDER, ta, "truncated_attention", scaled_by(1.01, ta.truncated_attention)),
    ("weights left out", LADDER, ta, "truncated_attention", without_weights(ta.truncated_attention)),
    ("too warm", SPEED, ta, "additive_attention", scaled_by(4, ta.additive_attention)),
    ("too warm", SPEED, ta, "kao_kv", scaled_by(4, ta.kao_kv)),
    ("no limit of its own", SPEED, ta, "kao_kv", times(3.0, ta.kao_kv)),
    ("1 % colder", test_two_opposite_tokens_move_as_fast_as_the_limit, ta, "kao_kv", scaled_by(0.99, ta.kao_kv)),
    ("1 % warmer", test_two_opposite_tokens_move_as_fast_as_the_limit, ta, "additive_attention",
     scaled_by(1.01, ta.additive_attention)),
    ("no interaction", POSITIONS, ta, "additive_attention",
     altered(ta.additive_attention, interaction=lambda given: None)),
    ("always interaction", POSITIONS, ta, "additive_attention",
     altered(ta.additive_attention, interaction=lambda given: "linear", saturation=lambda given: None)),
    ("saturated", POSITIONS, ta, "additive_attention",
     altered(ta.additive_attention, saturation=lambda given: 0.5)),
]  # fmt: skip


def named(test):
    return test.func if isinstance(test, functools.partial) else test


@pytest.mark.parametrize(
    ("test", "where", "name", "mistake"),
    [tuple(others) for _, *others in MISTAKES],
    ids=[f"{what}: {named(test).__name__}" for what, test, *_ in MISTAKES],
)
def test_the_test_fails_on_a_mistake(finding, monkeypatch, test, where, name, mistake):
    monkeypatch.setattr(where, name, mistake)
    with pytest.raises(AssertionError):
        test()


def test_every_test_has_a_mistake():
    own = {test for name, test in globals().items() if name.startswith("test_")}
    assert own - {named(test) for _, test, *_ in MISTAKES} == {
        test_the_test_fails_on_a_mistake,
        test_every_test_has_a_mistake,
    }
