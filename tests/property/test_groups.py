"""Truncation: groups of modes, counting numbers, and what the means over larger and larger subsets know."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

import tensorattn as ta
from tensorattn import reference
from tensorattn.testing import Subject, additive_tensors, cases, mode_partitions, resolve, tensors
from tensorattn.testing.cases import rows
from tensorattn.testing.definitions import attention
from tensorattn.testing.tolerances import exact, largest
from tensorattn.truncation import counting_numbers

TOLD = Subject("theorem", lambda: None)  # compares, and tells a failure with its case
close = TOLD.expect_close


def subsets(modes):
    return [u for size in range(len(modes) + 1) for u in itertools.combinations(modes, size)]


def marginal(case, tensor, kept):
    """The mean over all modes but the kept ones, with all dimensions, the others of size 1."""
    summary = ta.summarize(tensor, tensor, order=case.order, kept=[kept], weights=case.weights)
    shape = [size if mode in kept else 1 for mode, size in enumerate(case.sizes)]
    return summary.value(kept).reshape(*case.batch, *shape, tensor.shape[-1])


# Groups.


@st.composite
def grouped_cases(draw):
    """Keys and values that are sums of one term a group of modes, and the groups."""
    case = draw(cases(max_positions=40))
    groups = draw(mode_partitions(case.order))

    def summed(dim, stream):
        total = torch.zeros(*case.batch, *case.sizes, dim, dtype=case.dtype)
        for number, group in enumerate(groups):
            shape = [size if mode in group else 1 for mode, size in enumerate(case.sizes)]
            total = total + draw(tensors((*case.batch, *shape, dim), stream=stream + number))
        return total

    return case.replace(key=summed(case.key.shape[-1], 10), value=summed(case.value.shape[-1], 20)), groups


@given(grouped_cases())
def test_independent_groups_that_are_kept_are_attended_to_exactly(drawn):
    """So does keeping all subsets as large as the largest group; with any separable weights, log-sum-exp included."""
    case, groups = drawn
    expected, expected_lse = attention(case)
    for options in ({"kept": groups}, {"interaction_order": max(map(len, groups))}):
        output, lse = resolve("truncated", options).with_lse(case)
        # Counting numbers alternate in sign: as many terms as there are subsets cancel.
        terms = 2**case.order
        close(output, expected, terms * case.allowed(), f"{options} equals flattened attention", case)
        close(lse, expected_lse, terms * case.allowed_lse, f"{options} has its log-sum-exp", case)


@given(grouped_cases())
def test_groups_may_be_made_modes(drawn):
    """With the modes of each group flattened to one, additive attention is exact."""
    case, groups = drawn
    batch = len(case.batch)
    order = [mode for group in groups for mode in group]
    sizes = [math.prod(case.sizes[mode] for mode in group) for group in groups]

    def joined(tensor):
        dims = [*range(batch), *(batch + mode for mode in order), batch + case.order]
        return tensor.permute(dims).reshape(*case.batch, *sizes, tensor.shape[-1])

    weights = [
        torch.stack([math_product(w) for w in itertools.product(*(case.mode_weights(m).unbind(-1) for m in group))], -1)
        for group in groups
    ]
    fewer = case.replace(key=joined(case.key), value=joined(case.value), order=len(groups), weights=tuple(weights))
    close(resolve("additive", {}).output(fewer), attention(case)[0], case.allowed(), "groups are modes", case)


def math_product(factors):
    total = factors[0]
    for factor in factors[1:]:
        total = total * factor
    return total


# Counting numbers.


@given(st.integers(1, 5), st.data())
def test_every_kept_effect_is_counted_once(order, data):
    """Over all subsets that contain a kept one, or a part of one, the counting numbers add up to one."""
    family = data.draw(st.lists(st.sampled_from(subsets(range(order))[1:]), min_size=1, max_size=6, unique=True))
    counts = counting_numbers(tuple(family))
    closure = {u for subset in family for u in subsets(subset)}
    assert set(counts) == closure
    for kept in closure:
        assert sum(count for larger, count in counts.items() if set(kept) <= set(larger)) == 1
    assert counts == reference.counting_numbers(family, order)


@given(st.integers(1, 6), st.data())
def test_all_subsets_of_a_size_have_the_closed_form(order, data):
    """With r of N modes kept together, c_U = (-1)^(r - |U|) C(N - |U| - 1, r - |U|), and C(-1, 0) = 1."""
    size = data.draw(st.integers(1, order))
    counts = counting_numbers(tuple(itertools.combinations(range(order), size)))
    for kept, count in counts.items():
        top, bottom = order - len(kept) - 1, size - len(kept)
        assert count == (-1) ** bottom * (math.comb(top, bottom) if top >= 0 else 1)


# Additive keys.


@given(cases(max_positions=40), st.data())
def test_additive_keys_need_the_order_of_the_values_only(case, data):
    """Additive keys, values of interactions of at most r modes: truncation at r is exact."""
    size = data.draw(st.integers(1, case.order))
    key = data.draw(additive_tensors(case.sizes, batch=case.batch, dim=case.key.shape[-1], stream=9))
    value = sum(
        marginal(case.replace(weights=None), case.value, u) for u in itertools.combinations(range(case.order), size)
    )
    value = value.expand(case.value.shape)
    given_case = case.replace(key=key, value=value)
    output = resolve("truncated", {"interaction_order": size}).output(given_case)
    tolerance = 2**case.order * given_case.allowed()
    close(output, attention(given_case)[0], tolerance, f"truncation at {size} is exact", given_case)


@given(cases(max_positions=40), st.data())
def test_on_additive_keys_what_is_missing_is_the_expected_interaction(case, data):
    """Full less additive attention is the mean of the values' interaction under the product of the modes' attention."""
    key = data.draw(additive_tensors(case.sizes, batch=case.batch, dim=case.key.shape[-1], stream=9))
    case = case.replace(key=key)
    how = {"order": case.order, "scale": case.scale, "weights": case.weights, "return_attention": True}
    output, _, shares = ta.additive_attention(case.query, case.key, case.value, **how)
    residual = ta.interaction_residual(case.value, order=case.order, weights=case.weights)
    product = torch.ones(*case.query.shape[:-1], 1, dtype=torch.float64)
    for share in shares:
        product = (product.unsqueeze(-1) * share.unsqueeze(-2)).flatten(-2)
    batch = len(case.batch)
    expected = (rows(product, batch) @ rows(residual, batch)).reshape(output.shape)
    missing = torch.from_numpy(attention(case)[0]) - output
    close(missing, expected, 4 * case.order * case.allowed(), "what is missing is the expected interaction", case)


# The ladder.


@given(cases(max_positions=40), st.data())
def test_the_log_sum_exp_grows_with_the_modes_that_are_kept(case, data):
    """Jensen: over means of ever more modes, times the positions behind each, it rises to that of full attention."""
    chain = data.draw(st.permutations(range(case.order)))
    lower = None
    for size in range(case.order + 1):
        kept = tuple(sorted(chain[:size]))
        key = marginal(case, case.key, kept)
        weights = [case.mode_weights(mode) if mode in kept else None for mode in range(case.order)]
        behind = math_product([torch.ones(case.batch).double(), *(case.mode_weights(m).sum(-1) for m in chain[size:])])
        how = {"order": case.order, "scale": case.scale, "weights": weights, "return_lse": True}
        lse = ta.flattened_attention(case.query, key, key, **how).lse
        lse = lse + behind.log().reshape(*case.batch, *(1 for _ in case.positions))
        if lower is not None:
            close(lse.clamp(min=lower), lse, case.allowed_lse, f"the log-sum-exp over {kept} is the larger", case)
        lower = lse
    close(lower, attention(case)[1], case.allowed_lse, "the last is that of full attention", case)


# The correction.


@given(cases(weighted=False, max_positions=40), st.sampled_from([0.5, 1.0, 3.0]))
def test_the_correction_is_bounded_by_its_saturation(case, saturation):
    """Its norm is at most τ σ_v / √(1 + τ²/ℓ²), less than min(τ, ℓ) σ_v, and just that if keys and values are one."""
    if case.key.shape[-1] == 1:
        case = case.replace(value=case.key)
    how = {"order": case.order, "scale": case.scale}
    plain = ta.additive_attention(case.query, case.key, case.value, **how)
    bounded = ta.additive_attention(
        case.query, case.key, case.value, interaction="linear", saturation=saturation, **how
    )
    residuals = [rows(ta.interaction_residual(t, order=case.order), len(case.batch)) for t in (case.key, case.value)]
    of_keys, of_values = (r.mT @ r / r.shape[-2] for r in residuals)
    spread = torch.linalg.eigvalsh(of_values)[..., -1].clamp(min=0).sqrt()
    query = case.factor * rows(case.query, len(case.batch))
    tau = ((query @ of_keys) * query).sum(-1).clamp(min=0).sqrt()
    reach = tau / (1 + tau.square() / saturation**2).sqrt() * spread.unsqueeze(-1)
    reach = reach.reshape(case.query.shape[:-1])
    norm = exact(bounded - plain).norm(dim=-1)
    tolerance = case.allowed(largest(bounded)) * (1 + case.logit)
    close(norm.clamp(max=reach), norm, tolerance, "the correction is bounded", case)
    if case.value is case.key:
        close(norm, reach, tolerance, "one channel that is key and value attains the bound", case)


def test_asymptotically_the_correction_finds_the_rest_of_white_noise():
    """White noise on a grid of 32 and of 128: the error falls as one over the root of the positions, fourfold.

    Additive attention alone keeps its error. Root mean squares over eight seeds, relative to the deviation of full
    attention from the mean value.
    """
    errors = {32: [], 128: []}
    alone = {32: [], 128: []}
    for size, seed in itertools.product(errors, range(8)):
        generator = torch.Generator().manual_seed(seed)
        x, query = torch.randn(size, size, 8, generator=generator), torch.randn(64, 8, generator=generator)
        how = {"order": 2, "scale": 0.3}
        full = ta.flattened_attention(query, x, x, **how)
        deviation = (full - x.mean((0, 1))).norm()
        corrected = ta.additive_attention(query, x, x, interaction="linear", saturation=None, **how)
        errors[size].append(float((corrected - full).norm() / deviation))
        alone[size].append(float((ta.additive_attention(query, x, x, **how) - full).norm() / deviation))
    root = {size: float(np.sqrt(np.mean(np.square(e)))) for size, e in errors.items()}
    assert 0.15 <= root[128] / root[32] <= 0.45
    assert min(np.mean(e) for e in alone.values()) > 0.4
