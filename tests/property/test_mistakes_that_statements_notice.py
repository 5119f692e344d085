"""Tests of the plain tests, behind which no check or law of `verify` stands: each is seen to fail on a mistake."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import test_averaged_queries
import test_joint_softmax
import test_linearity
import test_positions
import test_tensor_normal
import torch
from hypothesis import Phase, settings
from test_averaged_queries import test_the_correction_of_averaged_queries_is_its_definition as _correction
from test_joint_softmax import (
    test_repeating_the_indices_of_all_modes_equally_often_only_counts_tokens as _repetition,
)
from test_positions import test_a_bias_by_position_is_added_as_the_definition_says as _bias
from test_positions import test_causal_corrections_equal_their_definition as _causal_correction
from test_positions import test_causal_operators_equal_their_definition as _causal
from wrong_functions import (
    a_little_more,
    bounded_by,
    counts_the_first_index_twice,
    equal_weights,
    of_the_mode_before,
    sees_everything,
    without,
    wrong_backwards,
)

import tensorattn as ta
from tensorattn.operators import OPERATORS
from tensorattn.stats import TensorNormal

LINEAR, NORMAL = vars(test_linearity), vars(test_tensor_normal)


def of(record, mistake):
    """An operator whose function is wrong."""
    return dataclasses.replace(record, function=mistake(record.function))


def more(function):
    """A number that is a little too large."""
    return lambda law, *given: function(law, *given) + 0.01


def more_in_single_precision(function):
    return lambda law, value: function(law, value) * (1.001 if value.dtype is torch.float32 else 1)


def more_without_batch(function):
    return lambda law, value: function(law, value) + (value.dim() == len(law.event_shape)) * 0.01


def of_twice_the_spread(function):
    return lambda law, *shape: law.loc + 2 * (function(law, *shape) - law.loc)


def with_an_interaction(function):
    def mutant(law, *shape):
        sample = function(law, *shape)
        return sample + torch.linspace(0, 1, sample.numel()).square().reshape(sample.shape)

    return mutant


def without_a_check(function):
    return lambda law, *value: torch.zeros(law.batch_shape)


def about_another_mean(function):
    def mutant(law, shape):
        wide = function(law, shape)
        return TensorNormal(wide.loc + 1, wide.mode_covariances, wide.channel_covariance)

    return mutant


def larger_property(entry):
    return property(lambda law: entry.fget(law) * 1.01)


DEFINED = [
    ("test_mode_averages_equal_their_definition", "mode_averages", without("weights")),
    ("test_the_backward_pass_of_averaging_is_a_weighted_outer_sum", "mode_averages", wrong_backwards),
    ("test_outer_sum_and_its_backward_pass_are_adjoint", "outer_sum", a_little_more),
    ("test_outer_sum_and_its_backward_pass_are_adjoint", "outer_sum", wrong_backwards),
    (
        "test_the_additive_part_is_a_projection_that_averages_cannot_tell_from_the_tensor",
        "additive_part",
        a_little_more,
    ),
    (
        "test_the_additive_part_is_a_projection_that_averages_cannot_tell_from_the_tensor",
        "interaction_residual",
        without("weights"),
    ),
]
LAW = [
    ("test_covariance_and_variance_are_the_dense_kronecker_product", "covariance_matrix", larger_property),
    ("test_covariance_and_variance_are_the_dense_kronecker_product", "variance", larger_property),
    ("test_the_linear_map_of_rsample_is_a_root_of_the_covariance", "rsample", of_twice_the_spread),
    ("test_density_and_entropy_are_those_of_the_dense_normal", "log_prob", more),
    ("test_density_and_entropy_are_those_of_the_dense_normal", "entropy", more),
    ("test_a_value_without_batch_dimensions_meets_every_law_of_the_batch", "log_prob", more_without_batch),
    ("test_expanding_repeats_the_law", "expand", about_another_mean),
    ("test_singular_factors_are_sampled_but_have_no_density", "log_prob", without_a_check),
    ("test_singular_factors_are_sampled_but_have_no_density", "entropy", without_a_check),
    ("test_with_all_ones_factors_in_all_modes_but_one_samples_are_additive", "rsample", with_an_interaction),
    ("test_single_precision_agrees_with_double", "log_prob", more_in_single_precision),
]
AVERAGES = [
    ("test_the_law_of_a_marginal_mean_is_that_of_a_linear_map", "marginal_mean_law", without("weights")),
    (
        "test_the_cross_covariance_of_marginal_means_is_that_of_two_linear_maps",
        "marginal_cross_covariance",
        without("weights"),
    ),
    ("test_the_mean_of_an_average_of_an_additive_mean", "additive_mean_law", without("weights")),
    (
        "test_gls_weighted_averages_project_orthogonally_in_the_inverse_covariance",
        "gls_weights",
        lambda function: equal_weights,
    ),
]
MISTAKES = [
    # the test, where, the name there, what is put in its place
    *((LINEAR[test], ta, name, mistake(getattr(ta, name))) for test, name, mistake in DEFINED),
    *((NORMAL[test], TensorNormal, name, mistake(vars(TensorNormal)[name])) for test, name, mistake in LAW),
    *((NORMAL[test], test_tensor_normal, name, mistake(NORMAL[name])) for test, name, mistake in AVERAGES),
    (_correction, OPERATORS, "kao_qkv", of(OPERATORS["kao_qkv"], bounded_by(0.7))),
    (_repetition, ta, "kao_kv", counts_the_first_index_twice(ta.kao_kv)),
    (functools.partial(_bias, name="additive"), ta, "additive_attention", of_the_mode_before(ta.additive_attention)),
    (
        functools.partial(_causal, name="additive", order=2, causal=0),
        OPERATORS,
        "additive",
        of(OPERATORS["additive"], sees_everything),
    ),
    (
        functools.partial(_causal_correction, interaction="linear", order=2, causal=0),
        OPERATORS,
        "additive",
        of(OPERATORS["additive"], without("interaction", "saturation")),
    ),
]


QUICK = settings(max_examples=100, phases=[Phase.generate])  # a mistake only has to be found, not to be made small


def named(test):
    return test.func if isinstance(test, functools.partial) else test


@pytest.mark.parametrize(
    ("test", "where", "name", "mistake"),
    MISTAKES,
    ids=[f"{named(test).__name__.removeprefix('test_')}: {name}" for test, _, name, _ in MISTAKES],
)
def test_the_test_fails_on_a_mistake(monkeypatch, test, where, name, mistake):
    monkeypatch.setattr(named(test), "_hypothesis_internal_use_settings", QUICK, raising=False)
    (monkeypatch.setitem if isinstance(where, dict) else monkeypatch.setattr)(where, name, mistake)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        test()


def test_every_test_has_a_mistake():
    modules = (test_averaged_queries, test_joint_softmax, test_linearity, test_positions, test_tensor_normal)
    tests = {test for module in modules for name, test in vars(module).items() if name.startswith("test_")}
    tests -= {test_positions.test_what_has_no_meaning_for_an_operator_is_not_checked_but_refused}
    assert tests == {named(test) for test, *_ in MISTAKES}
