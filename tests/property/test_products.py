"""Where modes live in orthogonal channels, logits have no terms across modes, and products of softmaxes are exact."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from tensorattn import reference
from tensorattn.testing import Subject, additive_tensors, cases, resolve
from tensorattn.testing.checks.derivatives import along_queries, marginal_covariance
from tensorattn.testing.definitions import arrays, attention
from tensorattn.testing.drawing import generators, numbers, one_a_mode
from tensorattn.testing.tolerances import allowed, exact, largest

TOLD = Subject("theorem", lambda: None)  # compares, and tells a failure with its case
close = TOLD.expect_close


@st.composite
def orthogonal_cases(draw):
    """Queries and keys with one term a mode, each in channels of its own, all rotated together; any values."""
    case = draw(cases(on_grid=True, max_positions=32))
    width = draw(st.integers(1, 2))
    generator = draw(generators(40))
    dim = width * case.order
    rotation = torch.linalg.qr(numbers(generator, (dim, dim))).Q

    def in_own_channels():
        terms = []
        for mode, size in enumerate(case.sizes):
            term = torch.zeros(*case.batch, size, dim, dtype=torch.float64)
            term[..., mode * width : (mode + 1) * width] = numbers(generator, (*case.batch, size, width))
            terms.append(term)
        return one_a_mode(terms) @ rotation

    scale = None if case.scale is None else min(case.scale, 10.0)
    return case.replace(query=in_own_channels(), key=in_own_channels(), scale=scale)


def bound(case):
    """A logit that no rounding of rotated channels exceeds."""
    return abs(case.factor) * largest(case.query.norm(dim=-1)) * largest(case.key.norm(dim=-1))


@given(orthogonal_cases())
def test_without_terms_across_modes_the_kronecker_product_is_full_attention_for_any_values(case):
    output = resolve("kronecker_product", {}).output(case)
    tolerance = allowed("output", case.dtype, logit=bound(case), magnitude=case.magnitude)
    close(output, attention(case)[0], tolerance, "the Kronecker product equals flattened attention", case)


@given(orthogonal_cases(), st.data())
def test_without_terms_across_modes_averaged_queries_attend_fully_to_additive_values(case, data):
    value = data.draw(additive_tensors(case.sizes, batch=case.batch, dim=case.value.shape[-1], stream=9))
    case = case.replace(value=value)
    output = resolve("kao_qkv", {"centered": True}).output(case)
    tolerance = case.order * allowed("output", case.dtype, logit=bound(case), magnitude=case.magnitude)
    close(output, attention(case)[0], tolerance, "centered outer sums equal flattened attention", case)


@given(cases(on_grid=True, max_positions=32), st.sampled_from([None, 0.5, 1.0]))
def test_the_correction_of_averaged_queries_is_its_definition(case, saturation):
    """All of the covariance for the interaction of the query, what the modes miss of it for the rest."""
    options = {"centered": True, "interaction": "linear", "saturation": saturation}
    output = resolve("kao_qkv", options).output(case)
    plain = resolve("kao_qkv", {"centered": True}).output(case)
    query = exact(case.query)
    given_arrays = arrays(case)
    additive = torch.from_numpy(
        reference.additive_part(given_arrays["query"], order=case.order, weights=given_arrays["weights"])
    )
    parts = [case.replace(query=query - additive), case.replace(query=additive)]

    def applied(value):
        of = case.replace(value=value)
        total = marginal_covariance(of, range(case.order))
        missing = total - sum(marginal_covariance(of, (mode,)) for mode in range(case.order))
        return [along_queries(part, matrix) for part, matrix in zip(parts, (total, missing), strict=True)]

    term = case.factor * sum(applied(case.value))
    if saturation is not None:
        squares = [(a * part.query).sum(-1) for a, part in zip(applied(case.key), parts, strict=True)]
        term = term / (1 + case.factor**2 * sum(squares).clamp(min=0) / saturation**2).sqrt().unsqueeze(-1)
    tolerance = case.allowed(largest(term, plain)) * (1 + case.logit)
    close(output, exact(plain) + term, tolerance, "the correction is its definition", case)
