"""What depends on where a query stands: biases that are sums over modes, boxes, and causality along a mode."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tensorattn as ta
from tensorattn import reference
from tensorattn.testing import Subject, cases, check_equals_reference, check_operator
from tensorattn.testing.definitions import arrays, as_array
from tensorattn.testing.drawing import canonical, generators, numbers
from tensorattn.testing.tolerances import largest

TOLD = Subject("theorem", lambda: None)  # compares, and tells a failure with its case
close = TOLD.expect_close
CAUSAL = {
    "additive": {},
    "additive linear": {"interaction": "linear"},
    "additive own": {"include_self": True},
    "truncated": {"interaction_order": 1},
    "kao_kv": {},
    "axial": {},
    "flattened": {},
}


@st.composite
def biases(draw, case):
    """For each mode none, or terms for each place of the query and index; minus infinity hides, at times all."""
    found = []
    for mode, size in enumerate(case.sizes):
        kind = draw(st.sampled_from(["none", "table", "window", "batched"]))
        if kind == "none":
            found.append(None)
            continue
        batch = case.batch if kind == "batched" else ()
        table = numbers(draw(generators(30 + mode)), (*batch, case.positions[mode], size))
        if kind == "window":
            distance = torch.arange(case.positions[mode])[:, None] - torch.arange(size)
            table = table.masked_fill(distance.abs() > draw(st.integers(-1, size)), -math.inf)
        found.append(table)
    return found


def bias_size(bias):
    return sum(largest(part) for part in bias if part is not None)


@pytest.mark.parametrize("name", ["additive", "truncated", "flattened", "kao_kv", "axial"])
@given(cases(on_grid=True, max_positions=32), st.data())
def test_a_bias_by_position_is_added_as_the_definition_says(name, case, data):
    bias = data.draw(biases(case))
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
    more = 1 + bias_size(bias)
    close(
        output, expected, case.allowed(float(np.abs(expected).max())) * more, "the output equals its definition", case
    )
    if told:
        close(lse, expected_lse, case.allowed_lse * more, "the log-sum-exp equals its definition", case)


@given(cases(on_grid=True, additive=True, max_positions=32), st.data())
def test_on_additive_data_a_bias_that_is_a_sum_over_modes_is_exact(case, data):
    """Relative tables, windows and boxes: what is added to the logits is one term a mode, as the logits are."""
    bias = data.draw(biases(case))
    how = {"order": case.order, "scale": case.scale, "weights": case.weights, "bias": bias, "return_lse": True}
    output, lse, _ = ta.additive_attention(case.query, case.key, case.value, **how)
    full, full_lse, _ = ta.flattened_attention(case.query, case.key, case.value, **how)
    more = 1 + bias_size(bias)
    close(output, full, case.allowed() * more, "the output equals flattened attention", case)
    close(lse, full_lse, case.allowed_lse * more, "the log-sum-exp equals that of flattened attention", case)


@pytest.mark.parametrize("name", ["additive", "kao_kv", "truncated", "flattened", "axial"])
@pytest.mark.parametrize(("order", "causal"), [(1, 0), (2, 0), (2, 1), (3, 1)])
def test_causal_operators_equal_their_definition(name, order, causal):
    check_equals_reference(name, order=order, causal=causal)


@pytest.mark.parametrize("interaction", ["linear"])
@pytest.mark.parametrize(("order", "causal"), [(2, 0), (3, 2)])
def test_causal_corrections_equal_their_definition(order, causal, interaction):
    check_equals_reference("additive", order=order, causal=causal, interaction=interaction)


@given(cases(on_grid=True, additive=True, max_positions=32), st.data())
def test_on_additive_data_causal_attention_is_exact(case, data):
    causal = data.draw(st.integers(0, case.order - 1))
    how = {"order": case.order, "scale": case.scale, "weights": case.weights, "causal": causal, "return_lse": True}
    output, lse, _ = ta.additive_attention(case.query, case.key, case.value, **how)
    full, full_lse, _ = ta.flattened_attention(case.query, case.key, case.value, **how)
    close(output, full, case.allowed(), "the output equals causal flattened attention", case)
    close(lse, full_lse, case.allowed_lse, "the log-sum-exp equals that of flattened attention", case)


@pytest.mark.parametrize("name", CAUSAL)
@given(cases(on_grid=True, max_positions=32), st.data())
def test_nothing_leaks_from_later_frames(name, case, data):
    """On any data, whatever stands in later frames, earlier outputs are the same to the last bit."""
    causal = data.draw(st.integers(0, case.order - 1))
    frame = data.draw(st.integers(0, case.sizes[causal] - 1))
    dim = len(case.batch) + causal
    later = torch.arange(case.sizes[causal]) > frame
    mask = later.reshape(-1, *(1 for _ in range(case.order - causal)))
    case = case.replace(key=canonical(case.key), value=canonical(case.value))  # both are then read alike
    anything = data.draw(st.sampled_from([1e6, math.inf, math.nan]))
    other = case.replace(key=case.key.masked_fill(mask, anything), value=case.value.masked_fill(mask, -anything))
    operator = ta.get_operator(name.split()[0])
    how = {"order": case.order, "scale": case.scale, "weights": case.weights, "causal": causal, **CAUSAL[name]}
    before, after = (operator.function(c.query, c.key, c.value, **how).narrow(dim, 0, frame + 1) for c in (case, other))
    assert torch.equal(before, after), (case, causal, frame)


def test_what_has_no_meaning_for_an_operator_is_not_checked_but_refused():
    with pytest.raises(ta.OptionError, match=r"causal has no meaning for this operator"):
        check_operator("kao_qkv", causal=0, order=2, examples=1)
