"""Tests of the laws that `verify` tries: each is seen to fail on mistakes in the functions that it is made of."""

from __future__ import annotations

import dataclasses

import pytest
from test_laws import LAWS, attempt
from wrong_functions import (
    a_little_more,
    altered,
    bounded_by,
    equal_weights,
    half_way_to_full_attention,
    instead,
    merges_nothing,
    not_counting_what_is_averaged,
    of_means_of_all_modes_alike,
    of_the_mode_before,
    only_the_output_rescaled,
    plans_too_much,
    rescaled,
    reverses_the_last_mode,
    sees_everything,
    signs_only,
    that_learns_no_queries,
    times,
    with_arithmetic_marginals,
    with_half_the_gradient_of_the_query,
    with_one_softmax,
    without,
    without_offsets,
    without_the_mean,
    wrong_backwards,
)

import tensorattn as ta
from tensorattn.operators import OPERATORS
from tensorattn.verify import work
from tensorattn.verify.statement import Asked
from tensorattn.verify.theorems import averages, bounds, exactness, gradients, laws, limits, positions, softmaxes
from tensorattn.verify.theorems.positions import CAUSAL

# For each law: what is wrong, the module and the name of a function there, and what is made of it.
MISTAKES = [
    ("independent_groups", "another scale", exactness, "truncated_attention", rescaled),
    ("independent_groups", "weights left out", exactness, "truncated_attention", without("weights")),
    ("groups_as_modes", "another scale", exactness, "additive_attention", rescaled),
    ("groups_as_modes", "weights left out", exactness, "additive_attention", without("weights")),
    ("groups_as_modes", "one softmax", exactness, "additive_attention", instead(ta.kao_kv)),
    ("overlapping_groups", "another scale", exactness, "additive_attention", rescaled),
    ("overlapping_groups", "weights left out", exactness, "additive_attention", without("weights")),
    ("all_modes", "pairs only", exactness, "truncated_attention", without("interaction_order")),
    ("additive_keys", "another scale", exactness, "truncated_attention", rescaled),
    ("additive_keys", "signs only", exactness, "counting_numbers", signs_only),
    ("missing_interaction", "another scale", exactness, "additive_attention", rescaled),
    ("missing_interaction", "weights left out", exactness, "interaction_residual", without("weights")),
    ("degenerate_laws", "another scale", exactness, "additive_attention", rescaled),
    ("degenerate_laws", "one softmax", exactness, "additive_attention", instead(ta.kao_kv)),
    ("orthogonal_channels", "another scale", exactness, "kronecker_product_attention", rescaled),
    ("orthogonal_channels", "sums", exactness, "kronecker_product_attention", altered(pool="sum")),
    ("orthogonal_channels", "a sum", exactness, "kronecker_product_attention", instead(ta.kronecker_sum_attention)),
    ("orthogonal_outer_sums", "as published", exactness, "kao_qkv", altered(centered=False)),
    ("orthogonal_outer_sums", "weights left out", exactness, "kao_qkv", without("weights")),
    ("symmetric_modes", "modes differ", exactness, "kao_qkv", reverses_the_last_mode),
    ("symmetric_modes", "modes differ", exactness, "kronecker_product_attention", reverses_the_last_mode),
    ("decomposed_bias", "left out", positions, "additive_attention", without("bias")),
    ("decomposed_bias", "of another place", positions, "additive_attention", of_the_mode_before),
    ("causal_exact", "sees everything", positions, "additive_attention", sees_everything),
    ("counted_once", "signs only", softmaxes, "counting_numbers", signs_only),
    ("closed_form", "signs only", softmaxes, "counting_numbers", signs_only),
    ("outer_sums", "full attention", softmaxes, "kao_qkv", instead(ta.flattened_attention)),
    ("ladder", "a little more", softmaxes, "truncated_attention", a_little_more),
    ("ladder", "averages not counted", softmaxes, "truncated_attention", not_counting_what_is_averaged),
    ("joint_shares", "another scale", softmaxes, "kao_kv", rescaled),
    ("joint_shares", "a little more", softmaxes, "additive_attention", a_little_more),
    ("geometric_marginals", "another scale", softmaxes, "additive_attention", rescaled),
    ("geometric_marginals", "arithmetic", softmaxes, "additive_attention", with_arithmetic_marginals),
    ("projection", "another scale", softmaxes, "additive_attention", rescaled),
    ("projection", "arithmetic", softmaxes, "additive_attention", with_arithmetic_marginals),
    ("arithmetic_marginals", "weights left out", softmaxes, "interaction_residual", without("weights")),
    ("arithmetic_marginals", "another scale", softmaxes, "flattened_attention", only_the_output_rescaled),
    ("counted_mean", "counted once", softmaxes, "kao_qkv", altered(centered=True)),
    ("bounded", "a little more", bounds, "additive_attention", a_little_more),
    ("bounded", "a fifth", bounds, "error_bound", times(0.2)),
    ("bounded", "one softmax", bounds, "additive_attention", instead(ta.kao_kv)),
    ("exclusive_or", "half", bounds, "error_bound", times(0.5)),
    ("exclusive_or", "0.1 % more", bounds, "error_bound", times(1.001)),
    ("second_order_bound", "no interaction", bounds, "additive_attention", without("interaction", "saturation")),
    ("second_order_bound", "another scale", bounds, "additive_attention", rescaled),
    ("saturated", "another saturation", bounds, "additive_attention", bounded_by(4.0)),
    ("saturated", "a little more", bounds, "additive_attention", a_little_more),
    ("speed", "four times", bounds, "additive_attention", times(4.0)),
    ("speed", "four times", bounds, "kao_kv", times(4.0)),
    ("speed_of_products", "sums", bounds, "kronecker_product_attention", altered(pool="sum")),
    ("speed_of_products", "sums", bounds, "kronecker_sum_attention", altered(pool="sum")),
    ("box", "counted twice", bounds, "additive_attention", times(2.0)),
    ("box", "no mean taken off", bounds, "additive_attention", without_the_mean),
    ("rank", "full attention", bounds, "additive_attention", instead(ta.flattened_attention)),
    ("rank", "full attention", bounds, "kao_kv", instead(ta.flattened_attention)),
    ("additive_gradients", "full attention", gradients, "additive_attention", instead(ta.flattened_attention)),
    ("additive_gradients", "an interaction", gradients, "kao_kv", wrong_backwards),
    ("mass", "some lost", gradients, "additive_attention", wrong_backwards),
    ("mass", "some lost", gradients, "flattened_attention", wrong_backwards),
    ("projected_gradients", "one softmax", gradients, "additive_attention", instead(ta.kao_kv)),
    ("projected_gradients", "half", gradients, "additive_attention", with_half_the_gradient_of_the_query),
    ("layers", "nothing learnt", gradients, "TensorAttention", that_learns_no_queries),
    ("layers", "one softmax", gradients, "TensorAttention", with_one_softmax),
    ("first_orders", "a little more", limits, "kao_kv", a_little_more),
    ("first_orders", "modes alike", limits, "kao_kv", of_means_of_all_modes_alike),
    ("first_orders", "interaction", limits, "additive_attention", altered(interaction="linear")),
    ("first_orders", "all pairs", limits, "truncated_attention", without("kept")),
    ("first_order_errors", "a little more", limits, "additive_attention", a_little_more),
    ("second_order_errors", "no interaction", limits, "additive_attention", without("interaction", "saturation")),
    ("truncated_errors", "single modes", limits, "truncated_attention", altered(interaction_order=1)),
    ("decay", "no interaction", limits, "additive_attention", without("interaction", "saturation")),
    ("decay", "saturated", limits, "additive_attention", bounded_by(0.5)),
    ("plateau", "interaction", limits, "additive_attention", altered(interaction="linear", saturation=None)),
    ("plateau", "half of it", limits, "additive_attention", half_way_to_full_attention),
    ("homogeneous_noise", "another scale", limits, "additive_attention", altered(scale=1.5)),
    ("homogeneous_noise", "tilted twice", limits, "additive_attention", altered(interaction="linear")),
    ("far_away", "one softmax", limits, "additive_attention", instead(ta.kao_kv)),
    ("far_away", "not far", limits, "kao_kv", altered(scale=0.5)),
    ("adjoint", "a little more", averages, "outer_sum", a_little_more),
    ("adjoint", "a wrong gradient", averages, "mode_averages", wrong_backwards),
    ("merging", "nothing merged", averages, "summarize", merges_nothing),
    ("plans", "a little more", averages, "plan", plans_too_much),
    (
        "projecting",
        "offset left out",
        averages,
        "summarize",
        without_offsets,
    ),
    ("laws_of_averages", "weights left out", laws, "marginal_mean_law", without("weights")),
    ("laws_of_averages", "weights left out", laws, "marginal_cross_covariance", without("weights")),
    ("laws_of_averages", "weights left out", laws, "additive_mean_law", without("weights")),
    ("gls_averages", "equal weights", laws, "gls_weights", lambda function: equal_weights),
]


@pytest.mark.parametrize(
    ("law", "module", "name", "mistake"),
    [(law, *others) for law, _, *others in MISTAKES],
    ids=[f"{law}: {what} in {name}" for law, what, _, name, _ in MISTAKES],
)
def test_it_fails_on_a_mistake(monkeypatch, law, module, name, mistake):
    monkeypatch.setattr(module, name, mistake(getattr(module, name)))
    failure = attempt(work.Trial(LAWS[law], None, Asked(examples=60)), shrink=False)
    assert failure is not None, "no case shows the mistake"
    assert " must " in failure.message, failure.message  # it is the statement that fails, not the mistake that raises


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("law", ["second_order_bound", "symmetric_modes", "merging", "far_away"])
def test_as_many_cases_as_verify_tries_show_each_mistake(monkeypatch, law, seed):
    """Laws that say nothing of many a case are tried on those of which they say something."""
    mistakes = [others for known, _, *others in MISTAKES if known == law]
    for module, name, mistake in mistakes:
        with monkeypatch.context() as patched:
            patched.setattr(module, name, mistake(getattr(module, name)))
            failure = attempt(work.Trial(LAWS[law], None, Asked(seed=seed)), shrink=False)
            assert failure is not None and " must " in failure.message, name
    assert mistakes


def test_what_sees_later_frames_is_found(monkeypatch):
    record = OPERATORS["kao_kv"]

    def sees_everything(*tensors, causal, **given):
        return record.function(*tensors, **given)

    monkeypatch.setitem(OPERATORS, "kao_kv", dataclasses.replace(record, function=sees_everything))
    (trial,) = (trial for trial in work.trials(Asked(examples=60), "kao_kv") if trial.statement is CAUSAL)
    failure = attempt(trial, shrink=False)
    assert failure is not None and "nothing may leak" in failure.message


def test_every_theorem_has_a_mistake():
    assert {law for law, *_ in MISTAKES} == set(LAWS)
    assert len(LAWS) == len(work.THEOREMS)  # names are unique
