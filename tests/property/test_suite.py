"""The checks as a user meets them: on an operator of one's own, on another type, on a plain function."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re

import pytest
import torch
from hypothesis import strategies as st

import tensorattn as ta
from tensorattn.errors import OptionError
from tensorattn.operators import OPERATORS, Claim
from tensorattn.testing import (
    UNIVERSAL,
    check_constant_mode,
    check_equals_flattened,
    check_equals_flattened_on_additive,
    check_equals_reference,
    check_gradients,
    check_key_shift,
    check_operator,
    check_order_one,
    check_permutation_equivariance,
    check_precision,
    checks_of,
    for_all,
    resolve,
)

QUICK = {"examples": 3, "skip": (check_gradients,)}


@pytest.fixture
def registry():
    before = dict(OPERATORS)
    yield OPERATORS
    OPERATORS.clear()
    OPERATORS.update(before)


def test_an_operator_of_ones_own_gets_all_that_it_claims_in_three_lines(registry):
    def doubled_softmax(query, key, value, *, order, **others):
        return ta.additive_attention(query, key, value, order=order, **others)

    mine = dataclasses.replace(OPERATORS["additive"], name="mine", function=doubled_softmax)
    passed = []
    check_operator(ta.register_operator(mine), report=lambda name, statement: passed.append((name, statement)), **QUICK)
    claimed = [check.statement for check in checks_of("mine") if check is not check_gradients]
    assert passed == [("mine", statement) for statement in claimed]
    assert check_equals_reference not in checks_of("mine")  # the definition in NumPy is of our operators only
    assert check_equals_flattened_on_additive in checks_of("mine")


def test_a_plain_function_claims_nothing_and_gets_what_all_operators_have():
    def mine(query, key, value, *, order, scale=None, weights=None):
        return ta.kao_kv(query, key, value, order=order, scale=scale, weights=weights)

    assert checks_of(mine) == UNIVERSAL
    check_operator(mine, **QUICK)
    check_key_shift(mine, examples=3)


def test_the_function_of_an_operator_stands_for_it():
    assert (
        resolve(ta.kao_kv, {}) == resolve("kao_kv", {}) or resolve(ta.kao_kv, {}).claims == resolve("kao_kv", {}).claims
    )
    assert checks_of(ta.additive_attention) == checks_of("additive") == checks_of(OPERATORS["additive"])


def test_options_change_what_is_claimed():
    assert Claim.VALUE_AFFINE not in resolve("kao_qkv", {}).claims
    assert Claim.VALUE_AFFINE in resolve("kao_qkv", {"centered": True}).claims
    assert resolve("kao_qkv", {}).on_grid
    with pytest.raises(OptionError, match=r"operator 'kao_kv' has no option 'centered'"):
        check_key_shift("kao_kv", centered=True)
    with pytest.raises(OptionError, match=r"there is no operator 'dense'"):
        check_key_shift("dense")


def spy(calls):
    def operator(query, key, value, *, order, **others):
        calls.append((query, key, order))
        return ta.flattened_attention(query, key, value, order=order, **others)

    return operator


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtype_examples_order_and_grid_are_what_is_asked_for(dtype):
    calls = []
    check_equals_flattened(spy(calls), dtype=dtype, examples=7, order=3, on_grid=True, device="cpu")
    assert len(calls) == 7
    assert {query.dtype for query, _, _ in calls} == {dtype}
    assert {order for _, _, order in calls} == {3}
    assert all(query.shape[:-1] == key.shape[:-1] for query, key, _ in calls)


def test_with_a_given_order_no_other_order_is_tried():
    calls = []
    check_operator(spy(calls), order=2, examples=2)
    assert {order for _, _, order in calls} == {2}
    assert {check_order_one, check_constant_mode} <= {*UNIVERSAL, *checks_of("additive")}


def test_precision_is_checked_in_all_narrower_types():
    calls = []
    check_operator(spy(calls), examples=2, skip=[check for check in UNIVERSAL if check is not check_precision])
    assert {torch.float32, torch.bfloat16, torch.float16} <= {query.dtype for query, _, _ in calls}


@pytest.mark.parametrize("check", checks_of("flattened"), ids=lambda check: check.__name__)
def test_every_check_has_the_same_signature_and_says_what_it_checks(check):
    assert inspect.signature(check) == inspect.signature(check_permutation_equivariance) or check is check_precision
    assert check.statement[0].islower() and not check.statement.endswith(".")
    assert check.__doc__.startswith("Check ") and "AssertionError" in check.__doc__


def test_a_partial_function_is_named_after_what_it_is_part_of():
    assert resolve(functools.partial(ta.kao_kv, scale=1.0), {}).name == "kao_kv"


# ---- what a failure tells ------------------------------------------------------------------------------------------


def note_of(check, operator, **how):
    with pytest.raises(AssertionError) as told:
        check(operator, **how)
    (note,) = told.value.__notes__
    return str(told.value), note


def test_the_note_of_a_failure_is_python_that_fails_in_the_same_way():
    message, note = note_of(check_key_shift, wrong_by_the_first_key)
    assert note.startswith("operator = ...  # what was checked: wrong_by_the_first_key\n")
    lines = note.partition("\n")[2]
    with pytest.raises(AssertionError, match=re.escape(message)):
        exec(lines, {"operator": wrong_by_the_first_key})
    exec(lines, {"operator": ta.kao_kv})  # the case is what is wrong for the wrong operator only


def wrong_by_the_first_key(query, key, value, *, order, **others):
    return ta.kao_kv(query, key, value, order=order, **others) + key.flatten()[0]


def test_the_note_of_a_registered_operator_needs_nothing_filled_in(registry):
    message, note = note_of(check_equals_flattened, "truncated", interaction_order=1)
    assert note.startswith("import torch\n") and "resolve('truncated', {'interaction_order': 1}, on_grid=False)" in note
    with pytest.raises(AssertionError, match=re.escape(message)):
        exec(note, {})


def test_the_note_tells_what_was_drawn_and_keeps_the_notes_of_the_law():
    def law(case, draw):
        other = draw(st.integers(0, 9))
        if case + other > 5:
            cause = AssertionError("too much")
            cause.add_note("of the law")
            raise cause

    with pytest.raises(AssertionError, match="too much") as told:
        for_all(st.integers(0, 9), law, examples=100)
    own, note = told.value.__notes__
    found = {}
    exec(note, found)
    assert own == "of the law" and found["case"] + sum(found["drawn"]) == 6
