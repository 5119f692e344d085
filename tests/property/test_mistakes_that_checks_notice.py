"""Tests of the tests: every check is seen to fail on an operator that is wrong in the way it is there to notice."""

from __future__ import annotations

import dataclasses
import functools
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, settings
from wrong_operators import (
    Frozen,
    Halved,
    added_up_in_their_type,
    additive_lse_of_keys_alone,
    attention,
    averages_over_absent,
    centers_the_queries,
    changed,
    changes_its_argument,
    dividing_by_nothing,
    ignores_weights,
    in_another_type,
    in_bfloat16,
    in_half,
    in_single_precision,
    linear,
    mixes_the_batch,
    nan_in_a_corner,
    normalizes_along_the_last_mode,
    of_chance,
    one_dimension_more,
    only_masks,
    overflowing,
    prefers_later_indices,
    scale_unless_zero,
    unnormalized,
    values_out_of_step,
    weighs_the_first_mode_only,
    without_grand_mean,
)

import tensorattn as ta
from tensorattn.operators import OPERATORS
from tensorattn.testing import (
    CLAIMED,
    UNIVERSAL,
    check_constant_mode,
    check_convex,
    check_equals_flattened,
    check_equals_flattened_on_additive,
    check_equals_reference,
    check_finite,
    check_first_order_law,
    check_gradients,
    check_invisible_interaction,
    check_key_shift,
    check_log_sum_exp,
    check_operator,
    check_order_one,
    check_permutation_equivariance,
    check_precision,
    check_refinement,
    check_rotation,
    check_scale_exchange,
    check_value_affine,
    check_weights_are_multiplicities,
    check_zero_scale_mean,
)

settings.register_profile("no shrinking", settings(), max_examples=100, phases=[Phase.generate])


@pytest.fixture(autouse=True)
def without_shrinking():
    """A mutant only has to be found, not to be made small."""
    before = settings.get_current_profile_name()
    settings.load_profile("no shrinking")
    yield
    settings.load_profile(before)


MUTANTS = [
    # check, what is wrong, the operator, part of the sentence, how it is called
    (check_equals_flattened, "joint softmax", ta.kao_kv, "the output must equal flattened attention", {}),
    (check_equals_flattened, "values out of step", changed(value=values_out_of_step), "must equal flattened", {}),
    (check_equals_flattened, "float32 in float64", in_single_precision, "where rounding allows", {}),
    (check_equals_flattened, "NaN", nan_in_a_corner, "there is nan instead of", {}),
    (check_equals_flattened, "one dimension more", one_dimension_more, "the output must be a tensor", {}),
    (check_equals_flattened, "another type", in_another_type, "of torch.float64", {}),
    (check_equals_flattened, "in place", changes_its_argument, "no argument may be changed in place", {}),
    (check_equals_flattened, "chance", of_chance, "equal flattened|equal arguments do not always", {}),
    (check_equals_flattened_on_additive, "joint softmax", ta.kao_kv, "on additive keys and values", {}),
    (check_equals_flattened_on_additive, "no grand mean", without_grand_mean, "on additive keys and values", {}),
    (check_equals_flattened_on_additive, "no weights", changed(weights=ignores_weights), "on additive", {}),
    (check_order_one, "scale squared", changed(scale=lambda g: 0.3), "at order 1", {}),
    (check_order_one, "unnormalized", functools.partial(attention, softmax=unnormalized), "at order 1", {}),
    (check_order_one, "key shift by channel", changed(key=lambda g: g["key"].relu()), "at order 1", {}),
    (
        check_log_sum_exp,
        "normalized weights",
        functools.partial(attention, log_of_counts=lambda counts: counts / counts.sum(-1, keepdim=True)),
        "the log-sum-exp must be that of the logits",
        {},
    ),
    (check_log_sum_exp, "mean not taken off", additive_lse_of_keys_alone, "that of the logits", {}),
    (check_log_sum_exp, "output of others", changed(value=values_out_of_step), "merge with other token sets", {}),
    (check_log_sum_exp, "joint softmax", ta.kao_kv, "that of the logits", {}),
    (check_weights_are_multiplicities, "no weights", changed(weights=ignores_weights), "repetition and cropping", {}),
    (check_weights_are_multiplicities, "masks only", changed(weights=only_masks), "repetition and cropping", {}),
    (check_weights_are_multiplicities, "one mode", changed(weights=weighs_the_first_mode_only), "repetition", {}),
    (check_weights_are_multiplicities, "leaking averages", averages_over_absent, "repetition and cropping", {}),
    (check_permutation_equivariance, "recency", prefers_later_indices, "permuting the indices|reordering", {}),
    (
        check_permutation_equivariance,
        "last mode normalized",
        changed(key=normalizes_along_the_last_mode),
        "reordering the modes",
        {},
    ),
    (check_permutation_equivariance, "batch", changed(key=mixes_the_batch), "batch entries must not see", {}),
    (check_permutation_equivariance, "queries", changed(query=centers_the_queries), "queries must not see", {}),
    (check_key_shift, "unnormalized", functools.partial(attention, softmax=unnormalized), "constant to all keys", {}),
    (check_key_shift, "linear attention", functools.partial(attention, softmax=linear), "constant to all keys", {}),
    (check_key_shift, "normalized keys", changed(key=lambda g: F.normalize(g["key"], dim=-1)), "to all keys", {}),
    (check_value_affine, "no grand mean", without_grand_mean, "an affine map of the values", {}),
    (check_value_affine, "positive values", changed(value=lambda g: g["value"].relu()), "an affine map", {}),
    (check_rotation, "positive keys", changed(key=lambda g: g["key"].relu()), "rotating the channels", {}),
    (check_scale_exchange, "normalized queries", changed(query=lambda g: F.normalize(g["query"], dim=-1)), "up", {}),
    (check_scale_exchange, "scale left out", changed(scale=lambda g: None), "scaling the queries up", {}),
    (check_constant_mode, "joint softmax", ta.kao_kv, "keys and values are constant", {}),
    (check_constant_mode, "sum over modes", without_grand_mean, "keys and values are constant", {}),
    (check_refinement, "joint softmax", ta.kao_kv, "repeating every index", {}),
    (check_refinement, "unnormalized", functools.partial(attention, softmax=unnormalized), "repeating every index", {}),
    (check_invisible_interaction, "flattened", ta.flattened_attention, "the interaction residual", {}),
    (check_convex, "additive", ta.additive_attention, "within the range of the values", {}),
    (check_convex, "NaN", nan_in_a_corner, "within the range of the values", {}),
    (check_zero_scale_mean, "scale or default", changed(scale=scale_unless_zero), "at scale zero", {}),
    (check_zero_scale_mean, "counted twice", without_grand_mean, "at scale zero", {}),
    (check_finite, "exp overflows", functools.partial(attention, softmax=overflowing), "must be finite", {}),
    (check_finite, "nothing present", functools.partial(attention, softmax=dividing_by_nothing), "must be finite", {}),
    (check_finite, "sums in float16", added_up_in_their_type, "must be finite", {"dtype": torch.float16}),
    (check_first_order_law, "additive", ta.additive_attention, "the derivative by the scale", {}),
    (check_first_order_law, "joint softmax", ta.kao_kv, "the derivative by the scale", {}),
    (check_gradients, "half of it", changed(key=lambda g: Halved.apply(g["key"])), "the gradient must be", {}),
    (check_gradients, "cut off", changed(value=lambda g: g["value"].detach()), "the gradient must be", {}),
    (
        check_gradients,
        "of the gradient",
        changed(query=lambda g: Frozen.apply(g["query"])),
        "the second derivative must be",
        {},
    ),
    (
        check_precision,
        "weights in float16",
        functools.partial(attention, softmax=in_half),
        "error in torch.float32",
        {},
    ),
    (check_precision, "coarser inside", in_bfloat16, "error in torch.float16", {"dtype": torch.float16}),
]


@pytest.mark.parametrize(
    ("check", "mutant", "sentence", "how"),
    [(check, mutant, sentence, how) for check, _, mutant, sentence, how in MUTANTS],
    ids=[f"{check.__name__}: {wrong}" for check, wrong, *_ in MUTANTS],
)
def test_the_check_fails(check, mutant, sentence, how):
    with pytest.raises(AssertionError, match=sentence):
        check(mutant, **how)


RIGHT = {
    check_constant_mode: ta.additive_attention,
    check_invisible_interaction: ta.additive_attention,
    check_equals_reference: ta.additive_attention,
}


@pytest.mark.parametrize("check", [*UNIVERSAL, *CLAIMED.values()], ids=lambda c: c.__name__)
def test_the_check_passes_on_what_the_mutants_are_made_of(check):
    check(RIGHT.get(check, attention), examples=10)


@pytest.mark.parametrize("order", [2, 3])
def test_a_few_cases_show_that_sums_over_modes_leave_the_range_of_the_values(order):
    with pytest.raises(AssertionError, match="within the range of the values"):
        check_convex(ta.additive_attention, order=order, examples=15)


def test_every_check_has_a_mutant():
    every = {*UNIVERSAL, *CLAIMED.values()}
    assert every == {check for check, *_ in MUTANTS}


# The definition, which only operators of the package have.


def mutilated(name, function):
    """The record of an operator with another function under its name."""
    record = OPERATORS[name]

    @functools.wraps(record.function)
    def mutant(*tensors, **given):
        return function(*tensors, **{key: value for key, value in given.items() if key not in record.options})

    return dataclasses.replace(record, function=mutant)


def with_a_slightly_wrong_log_sum_exp(query, key, value, *, order, return_lse=False, **others):
    result = ta.additive_attention(query, key, value, order=order, return_lse=True, **others)
    return result._replace(lse=result.lse + 1e-9) if return_lse else result.output


@pytest.mark.parametrize(
    ("name", "function", "sentence"),
    [
        ("additive", without_grand_mean, "the output must equal its definition"),
        ("additive", changed(value=values_out_of_step), "must equal its definition"),
        ("additive", with_a_slightly_wrong_log_sum_exp, "the log-sum-exp must equal its definition"),
        ("flattened", functools.partial(attention, softmax=dividing_by_nothing), "must equal its definition"),
        ("flattened", changed(scale=scale_unless_zero, weights=only_masks), "must equal its definition"),
    ],
)
def test_the_comparison_with_the_definition_fails(name, function, sentence):
    with pytest.raises(AssertionError, match=sentence):
        check_equals_reference(mutilated(name, function))


def test_an_operator_without_a_definition_cannot_be_compared_with_it():
    with pytest.raises(AssertionError, match="there is no definition in NumPy"):
        check_equals_reference(attention)


# The suite, and what a failure reads like.


def test_an_operator_that_claims_too_much_is_found_out():
    boaster = dataclasses.replace(OPERATORS["kao_kv"], claims=lambda: frozenset(ta.Claim))
    with pytest.raises(AssertionError, match=r"^kao_kv: "):
        check_operator(boaster, examples=15, skip=(check_gradients, check_precision))


def test_a_failure_is_a_sentence_with_the_smallest_case():
    settings.load_profile("default")
    with pytest.raises(AssertionError) as told:
        check_zero_scale_mean("kao_qkv")
    message = str(told.value)
    number = r"-?\d[\w.+-]*"
    sentence = (
        rf"kao_qkv: at scale zero the output must be the mean value, but there is {number} instead of {number} at "
        rf"\(0, 0, 0\), a difference of {number} where rounding allows {number}\.\n"
    )
    case = (
        r"  Case\(batch=\(\), sizes=\(1, 1\), positions=\(1, 1\), D=1, D_v=1, scale=0, weights=None, torch\.float64\)"
    )
    assert re.fullmatch(sentence + case, message)
