"""Checks as a user meets them: on an operator of one's own, in another type, on a function; what a failure tells."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import re

import hypothesis.strategies as st
import pytest
import torch

import tensorattn as ta
from tensorattn.errors import OptionError
from tensorattn.functional import OPERATORS, Claim
from tensorattn.testing import (
    CLAIMED,
    UNIVERSAL,
    Case,
    check_constant_mode,
    check_equals_flattened,
    check_equals_flattened_on_additive,
    check_equals_reference,
    check_gradients,
    check_key_shift,
    check_operator,
    check_order_one,
    check_precision,
    check_scale_exchange,
    check_zero_scale_mean,
    checks_of,
    resolve,
)
from tensorattn.testing.check import Asked, Comparison, Failure, Found, Law, again, holds, law, literal, search
from tensorattn.testing.theorems import THEOREMS
from tensorattn.testing.variants import variants

QUICK = {"examples": 2, "skip": (check_gradients, check_precision)}


def test_an_operator_of_ones_own_gets_all_that_it_claims_in_three_lines(registry):
    def mine(query, key, value, *, order, **others):
        return ta.additive_attention(query, key, value, order=order, **others)

    passed = []
    record = dataclasses.replace(OPERATORS["additive"], name="mine", function=mine)
    check_operator(ta.register_operator(record), report=lambda name, words: passed.append((name, words)), **QUICK)
    assert passed == [("mine", check.words) for check in checks_of("mine") if check not in QUICK["skip"]]
    assert check_equals_reference not in checks_of("mine")  # the definitions are of our operators only
    assert check_equals_flattened_on_additive in checks_of("mine")


def test_a_plain_function_claims_nothing_and_gets_what_all_operators_have():
    def mine(query, key, value, *, order, scale=None, weights=None):
        return ta.kao_kv(query, key, value, order=order, scale=scale, weights=weights)

    assert checks_of(mine) == UNIVERSAL
    check_operator(mine, **QUICK)
    check_key_shift(mine, examples=3)
    assert resolve(functools.partial(ta.kao_kv, scale=1.0), {}).name == "kao_kv"


def test_the_function_of_an_operator_stands_for_it_and_options_change_what_is_claimed():
    assert checks_of(ta.additive_attention) == checks_of("additive") == checks_of(OPERATORS["additive"])
    assert Claim.VALUE_AFFINE not in resolve("kao_qkv", {}).claims
    assert Claim.VALUE_AFFINE in resolve("kao_qkv", {"centered": True}).claims
    assert resolve("kao_qkv", {}).on_grid
    with pytest.raises(OptionError, match=r"operator 'kao_kv' has no option 'centered'"):
        check_key_shift("kao_kv", centered=True)
    with pytest.raises(OptionError, match=r"there is no operator 'dense'"):
        check_key_shift("dense")


def test_what_an_operator_claims_it_claims_without_a_bias_or_a_past():
    assert checks_of("axial", causal=1) == (check_equals_reference, *(c for c in checks_of("axial", causal=1)[1:]))
    assert not resolve("additive", {"causal": 0}).claims and resolve("additive", {"causal": 0}).on_grid
    check_equals_reference("additive", causal=0, examples=3)


def spy(calls):
    def operator(query, key, value, *, order, **others):
        calls.append((query, key, order))
        return ta.flattened_attention(query, key, value, order=order, **others)

    return operator


def test_dtype_examples_order_and_grid_are_what_is_asked_for():
    calls = []
    check_equals_flattened(spy(calls), dtype=torch.bfloat16, examples=7, order=3, on_grid=True, device="cpu")
    assert len(calls) == 7
    assert {(query.dtype, order) for query, _, order in calls} == {(torch.bfloat16, 3)}
    assert all(query.shape[:-1] == key.shape[:-1] for query, key, _ in calls)


def test_with_a_given_order_no_other_order_is_tried_and_precision_is_in_all_narrower_types():
    calls = []
    skip = [check for check in UNIVERSAL if check not in (check_precision, check_scale_exchange)]
    check_operator(spy(calls), order=2, examples=2, skip=skip)
    assert {order for _, _, order in calls} == {2}
    assert {torch.float32, torch.bfloat16, torch.float16} <= {query.dtype for query, _, _ in calls}
    assert {check_order_one, check_constant_mode} <= {*UNIVERSAL, *checks_of("additive")}


def test_every_claim_has_a_check_and_every_check_says_what_it_checks():
    assert set(CLAIMED) == set(Claim), "give each new claim its check in the table CLAIMED of tensorattn.testing"
    for check in (*UNIVERSAL, *CLAIMED.values()):
        assert check.words[0].islower() and not check.words.endswith(".") and check.__doc__.startswith("Check ")
        assert "operator" in inspect.signature(check).parameters


def test_every_operator_is_tried_with_every_option():
    tried = variants()
    assert {name for name, _ in tried} == set(OPERATORS)
    for name, operator in OPERATORS.items():
        one_order = {"blocks"}  # counts of modes
        assert set(operator.options) - one_order == {
            option for known, options in tried if known == name for option in options
        }


# ---- what a failure tells ------------------------------------------------------------------------------------------


def wrong_by_the_first_key(query, key, value, *, order, **others):
    return ta.kao_kv(query, key, value, order=order, **others) + key.flatten()[0]


def note_of(check, operator, **how):
    with pytest.raises(AssertionError) as told:
        check(operator, **how)
    (note,) = told.value.__notes__
    return str(told.value), note


def test_the_note_of_a_failure_is_python_that_fails_in_the_same_way():
    message, note = note_of(check_key_shift, wrong_by_the_first_key)
    first, _, lines = note.partition("\n")
    assert first == "operator = ...  # what was checked"
    with pytest.raises(AssertionError, match=re.escape(message)):
        exec(lines, {"operator": wrong_by_the_first_key})
    exec(lines, {"operator": ta.kao_kv})  # the case is what is wrong for the wrong operator only


def test_the_note_of_a_registered_operator_needs_nothing_filled_in():
    message, note = note_of(check_zero_scale_mean, "kao_qkv", centered=False, examples=5)
    assert note.endswith("again(check_zero_scale_mean, case, drawn, 'kao_qkv', centered=False)")
    with pytest.raises(AssertionError, match=re.escape(message)):
        exec(note, {})


def test_an_operator_that_raises_has_not_kept_its_word():
    def raising(query, key, value, *, order, **others):
        raise RuntimeError("no channels, please")

    with pytest.raises(AssertionError, match="RuntimeError: no channels, please"):
        check_scale_exchange(raising)


@pytest.mark.thorough
@pytest.mark.parametrize("theorem", THEOREMS, ids=lambda theorem: theorem.__name__)
def test_every_theorem_can_be_reproduced(theorem):
    """What a law draws is written out, and runs again from what is written."""
    seen = []

    def keeping(ta, case, draw):
        drawn = []
        yield from theorem.compare(ta, case, lambda strategy: drawn.append(draw(strategy)) or drawn[-1])
        seen.append((case, drawn))

    kept = dataclasses.replace(theorem, compare=functools.wraps(theorem.compare)(keeping))
    found = kept.tried(ta, Asked(examples=2, seed=1))
    assert found.failure is None and found.cases > 0
    exec(Failure("", *seen[-1]).python(theorem), {})


# ---- how a law is tried --------------------------------------------------------------------------------------------


def tried(compare, strategy, examples=20, seed=0):
    made = Law("it holds", "", compare, lambda asked, subject: strategy)
    return search(made, ta, strategy, examples, seed)


def small(subject, case, draw):
    yield holds("it must be small", case + draw(st.integers(0, 5)) < 7)


def even_only(subject, case, draw):
    if case % 2 == 0:
        yield Comparison("it must be one", torch.ones(1), torch.ones(1))


def test_a_broken_law_is_found_and_made_small():
    found = tried(small, st.integers(0, 100), 100)
    assert found.cases > 1 and found.failure.case + sum(found.failure.drawn) == 7
    assert found.failure.message.startswith("theorem: it must be small, but it is not.\n")
    assert tried(small, st.integers(0, 1), 10).failure is None


def test_cases_on_which_nothing_is_compared_are_not_counted():
    found = tried(even_only, st.integers(0, 1000))
    assert found.cases == 20 and found.skipped > 0 and found.failure is None
    none = tried(even_only, st.just(1))
    assert none.cases == 0 and none.skipped > 0 and none.failure is None


def test_the_seed_moves_the_cases_and_a_law_of_chance_is_told_as_such():
    def cases(seed):
        found = []
        tried(
            lambda subject, case, draw: [holds("it must be kept", found.append(case) is None)], st.integers(), 10, seed
        )
        return found

    assert cases(0) == cases(0) != cases(1)
    outcomes = iter([False] + [True] * 1000)
    failure = tried(lambda subject, case, draw: [holds("it must hold", next(outcomes))], st.integers()).failure
    assert failure.message.startswith("equal arguments do not always give equal results")


def test_errors_are_counted_in_units_of_the_tolerance_and_nothing_is_no_comparison():
    found = Found()
    made = functools.partial(Comparison, "it must be close")

    def attempt(*comparisons):
        return found.attempt(Law("", "", lambda *_: iter(comparisons), {}), ta, None, None)

    assert attempt(made(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5]), 2.0))
    assert (found.worst, found.shares) == (0.25, [0.8])
    assert attempt(made(torch.zeros(2), torch.zeros(2), 2.0, 4.0))
    assert (found.worst, found.shares) == (0.25, [0.8, 0.5])
    assert not attempt(made(torch.zeros(0), torch.zeros(0), 1.0))
    with pytest.raises(AssertionError, match="there is nan instead of 1"):
        attempt(made(torch.tensor([torch.nan]), torch.tensor([1.0]), 2.0))
    assert found.worst == math.inf
    with pytest.raises(AssertionError, match=re.escape("but the shapes are (2,) and (1,)")):
        attempt(made(torch.zeros(2), torch.zeros(1)))


def test_a_law_is_made_of_a_function():
    @law("sums are sums", "a + b", order=2, share=0.5)
    def sums(subject, case, draw):
        """Sums."""

    assert (sums.__name__, sums.__doc__, sums.share, dict(sums.supposed)) == ("sums", "Sums.", 0.5, {"order": 2})


def test_values_are_written_as_python():
    strided = torch.arange(6.0).reshape(2, 3).mT
    case = Case(strided, torch.ones(1, 2), torch.tensor([[float("nan")]]), 1, 0.5, (torch.tensor([True]), None), True)
    known = {"torch": torch, "Case": Case, "nan": float("nan")}
    same = eval(literal(case), known)
    assert same.query.equal(strided) and same.query.stride() == (1, 3)
    assert same.weights[0].dtype == torch.bool and same.weights[1] is None
    assert (same.scale, same.order, same.on_grid) == (0.5, 1, True)
    assert same.value.isnan().all()
    odd = torch.empty_strided((1, 1, 2), (5, 9, 1)).fill_(3.0)  # contiguous, says torch
    assert eval(literal(odd), known).stride() == (5, 9, 1)
    assert eval(literal(dataclasses.replace(case, pooled=True)), known).pooled and not same.pooled
    for value in (1, (2,), (1, (3, 4)), [1.5, None], "text", torch.float32, {1, 2}):
        assert eval(literal(value), known) == value
    generator = torch.Generator().manual_seed(5)
    torch.rand(3, generator=generator)
    assert eval(literal(generator), known).initial_seed() == 5


def test_trying_again_takes_what_was_drawn():
    ones = torch.ones(1, 2, 1)
    again(check_scale_exchange, Case(ones, ones, ones, 2), [3], "additive")
    with pytest.raises(IndexError):
        again(check_scale_exchange, Case(ones, ones, ones, 2), [], "additive")
