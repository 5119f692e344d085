"""Every operator has what it claims, and what every operator has: one test a statement, named after it.

An operator that is registered is checked here without being named: what it claims is what is tested.
"""

from __future__ import annotations

import math

import pytest
import torch

from tensorattn.operators import Claim
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
    checks_of,
)
from tensorattn.testing.checks import multiplicities
from tensorattn.testing.variants import variants

VARIANTS = variants()

HALF = (torch.bfloat16, torch.float16)
TESTED = set()


def theorem(check):
    """Test a check on every operator that has to pass it, as it claims it or as every operator does."""
    TESTED.add(check)
    having = [variant for variant in VARIANTS if check in checks_of(variant.name, **variant.options)]
    return pytest.mark.parametrize("variant", having, ids=str)


def run(check, variant, **how):
    check(variant.name, **how, **variant.options)


# What every operator has.


@theorem(check_equals_reference)
def test_the_output_equals_the_definition_in_numpy(variant):
    run(check_equals_reference, variant)


@theorem(check_order_one)
def test_with_a_single_mode_every_operator_is_attention(variant):
    run(check_order_one, variant)


@theorem(check_weights_are_multiplicities)
def test_weights_repeat_and_crop(variant):
    run(check_weights_are_multiplicities, variant)


@pytest.mark.parametrize("anything", [math.nan, math.inf])
@theorem(check_weights_are_multiplicities)
def test_absent_positions_may_hold_anything(variant, anything, monkeypatch):
    monkeypatch.setattr(multiplicities, "POISON", anything)
    run(check_weights_are_multiplicities, variant, examples=6)


@theorem(check_permutation_equivariance)
def test_permuting_indices_modes_batch_entries_or_queries_only_permutes(variant):
    run(check_permutation_equivariance, variant)


@theorem(check_scale_exchange)
def test_queries_and_scale_only_enter_as_their_product(variant):
    run(check_scale_exchange, variant)


@theorem(check_gradients)
def test_first_and_second_derivatives_are_those_of_the_output(variant):
    run(check_gradients, variant)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@theorem(check_precision)
def test_no_type_loses_more_than_written_out_attention_does(variant, dtype):
    run(check_precision, variant, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@theorem(check_finite)
def test_far_logits_and_large_values_give_finite_outputs_and_gradients(variant, dtype):
    run(check_finite, variant, dtype=dtype)


# What some claim.


@theorem(check_equals_flattened)
def test_exact_operators_equal_flattened_attention_on_any_data(variant):
    run(check_equals_flattened, variant)


@theorem(check_first_order_law)
def test_the_derivative_by_the_scale_at_zero_is_the_covariance_of_values_and_keys(variant):
    run(check_first_order_law, variant)


@theorem(check_equals_flattened_on_additive)
def test_on_additive_keys_and_values_the_output_equals_flattened_attention(variant):
    run(check_equals_flattened_on_additive, variant)


@theorem(check_key_shift)
def test_adding_a_constant_to_all_keys_changes_nothing(variant):
    run(check_key_shift, variant)


@theorem(check_value_affine)
def test_an_affine_map_of_the_values_is_the_same_map_of_the_output(variant):
    run(check_value_affine, variant)


@theorem(check_rotation)
def test_rotating_queries_and_keys_together_changes_nothing(variant):
    run(check_rotation, variant)


@theorem(check_constant_mode)
def test_a_mode_along_which_keys_and_values_are_constant_can_be_left_out(variant):
    run(check_constant_mode, variant)


@theorem(check_refinement)
def test_repeating_every_index_of_a_mode_equally_often_changes_nothing(variant):
    run(check_refinement, variant)


@theorem(check_invisible_interaction)
def test_the_interaction_residual_of_keys_and_values_has_no_effect(variant):
    run(check_invisible_interaction, variant)


@theorem(check_convex)
def test_the_output_lies_within_the_range_of_the_values(variant):
    run(check_convex, variant)


@theorem(check_zero_scale_mean)
def test_at_scale_zero_the_output_is_the_mean_value(variant):
    run(check_zero_scale_mean, variant)


@theorem(check_log_sum_exp)
def test_the_log_sum_exp_merges_the_output_with_other_token_sets(variant):
    run(check_log_sum_exp, variant)


# All of it, in the types that users train in.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_what_is_claimed_holds_in_other_types(variant, dtype):
    skip = (check_gradients, check_precision, check_finite)
    check_operator(variant.name, dtype=dtype, examples=3, skip=skip, **variant.options)


# Nothing is forgotten.


def test_every_claim_has_a_check():
    assert set(CLAIMED) == set(Claim), "give each new claim its check in the table CLAIMED of tensorattn.testing"


def test_every_check_is_tested_here():
    assert {check_equals_reference, *UNIVERSAL, *CLAIMED.values()} == TESTED
