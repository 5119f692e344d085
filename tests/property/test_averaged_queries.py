"""The interaction correction of averaged queries is its definition."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from tensorattn import reference
from tensorattn.testing import Subject, cases, resolve
from tensorattn.testing.checks.derivatives import along_queries, marginal_covariance
from tensorattn.testing.definitions import arrays
from tensorattn.testing.tolerances import exact, largest

TOLD = Subject("theorem", lambda: None)  # compares, and tells a failure with its case
close = TOLD.expect_close


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
