"""What depends on where a query stands, a bias by position or causality along a mode, is what its definition says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tensorattn as ta
from tensorattn import reference
from tensorattn.testing import Subject, biases, cases, check_equals_reference, check_operator
from tensorattn.testing.definitions import arrays, as_array
from tensorattn.testing.tolerances import largest

TOLD = Subject("theorem", lambda: None)  # compares, and tells a failure with its case
close = TOLD.expect_close


@pytest.mark.parametrize("name", ["additive", "truncated", "flattened", "kao_kv", "axial"])
@given(cases(on_grid=True, max_positions=32), st.data())
def test_a_bias_by_position_is_added_as_the_definition_says(name, case, data):
    bias = data.draw(biases(case.sizes, case.positions, batch=case.batch))
    options = {"interaction_order": 1} if name == "truncated" else {}
    operator = {
        "additive": ta.additive_attention,
        "truncated": ta.truncated_attention,
        "flattened": ta.flattened_attention,
        "kao_kv": ta.kao_kv,
        "axial": ta.axial_attention,
    }
    told = name != "axial" or case.order == 1
    how = {"order": case.order, "scale": case.scale, "weights": case.weights, "return_lse": told}
    result = operator[name](case.query, case.key, case.value, bias=bias, **options, **how)
    output, lse = (result.output, result.lse) if told else (result, None)
    definition = getattr(reference, operator[name].__name__)
    tables = [None if part is None else as_array(part) for part in bias]
    expected, expected_lse = definition(**arrays(case), bias=tables, **options)
    more = 1 + sum(largest(part) for part in bias if part is not None)
    close(
        output, expected, case.allowed(float(np.abs(expected).max())) * more, "the output equals its definition", case
    )
    if told:
        close(lse, expected_lse, case.allowed_lse * more, "the log-sum-exp equals its definition", case)


@pytest.mark.parametrize("name", ["additive", "kao_kv", "truncated", "flattened", "axial"])
@pytest.mark.parametrize(("order", "causal"), [(1, 0), (2, 0), (2, 1), (3, 1)])
def test_causal_operators_equal_their_definition(name, order, causal):
    check_equals_reference(name, order=order, causal=causal)


@pytest.mark.parametrize("interaction", ["linear"])
@pytest.mark.parametrize(("order", "causal"), [(2, 0), (3, 2)])
def test_causal_corrections_equal_their_definition(order, causal, interaction):
    check_equals_reference("additive", order=order, causal=causal, interaction=interaction)


def test_what_has_no_meaning_for_an_operator_is_not_checked_but_refused():
    with pytest.raises(ta.OptionError, match=r"causal has no meaning for this operator"):
        check_operator("kao_qkv", causal=0, order=2, examples=1)
