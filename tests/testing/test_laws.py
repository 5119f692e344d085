"""Every law is seen to fail on an operator or a function that is wrong in the way that it is there to notice."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
import re
import types

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, settings
from mistakes import (
    Frozen,
    Halved,
    a_little_more,
    added_up_in_their_type,
    additive_lse_of_keys_alone,
    altered,
    attention,
    averages_over_absent,
    bounded_by,
    centers_the_queries,
    changed,
    changes_its_argument,
    counts_the_first_index_twice,
    dividing_by_nothing,
    equal_weights,
    half_way_to_full_attention,
    ignores_weights,
    in_another_type,
    in_bfloat16,
    in_half,
    in_single_precision,
    instead,
    linear,
    merges_nothing,
    mixes_the_batch,
    nan_in_a_corner,
    normalizes_along_the_last_mode,
    not_counting_what_is_averaged,
    of_chance,
    of_means_of_all_modes_alike,
    of_the_mode_before,
    one_dimension_more,
    only_masks,
    only_the_output_rescaled,
    overflowing,
    patched,
    prefers_later_indices,
    reads_what_is_masked,
    rescaled,
    reverses_the_last_mode,
    scale_unless_zero,
    sees_everything,
    signs_only,
    that_learns_no_queries,
    times,
    unnormalized,
    values_out_of_step,
    weighs_the_first_mode_only,
    with_a_stride,
    with_arithmetic_marginals,
    with_half_the_gradient_of_the_query,
    with_moments,
    with_one_softmax,
    without,
    without_grand_mean,
    without_offsets,
    without_the_mean,
    wrong_backwards,
)

import tensorattn as ta
from tensorattn.functional import OPERATORS, cells
from tensorattn.testing import check_operator, laws, theorems
from tensorattn.testing.check import Asked, Law
from tensorattn.testing.theorems import clusters

settings.register_profile("no shrinking", settings(), max_examples=100, phases=[Phase.generate])


@pytest.fixture(autouse=True)
def without_shrinking():
    """A mistake only has to be found, not to be made small."""
    before = settings.get_current_profile_name()
    settings.load_profile("no shrinking")
    yield
    settings.load_profile(before)


def some(mistakes, names, default):
    """All mistakes as parameters of a test: those of the laws named by default, the others where all is tried."""
    made = []
    for number, (law, wrong, *others) in enumerate(mistakes):
        mark = () if number % default == 0 else pytest.mark.thorough
        made.append(pytest.param(law, *others, id=f"{names(law)}: {wrong}", marks=mark))
    return made


def softmaxes(softmax):
    return functools.partial(attention, softmax=softmax)


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


DEFINITION, POSITIONS, HALF = "must equal its definition", "must equal its definition", {"dtype": torch.float16}
BLOCKS = {"cells": "blocks", "tokens": 4}


def clustered_with(**changes):
    """The record of clustered attention with something else in what its cells share."""
    record = OPERATORS["clustered"]
    return dataclasses.replace(record, function=with_moments(**changes)(record.function))


# A check, what is wrong, the operator, part of the sentence, how it is called.
OF_OPERATORS = [
    (laws.check_equals_flattened, "joint softmax", ta.kao_kv, "the output must equal flattened attention", {}),
    (laws.check_equals_flattened, "values out of step", changed(value=values_out_of_step), "equal flattened", {}),
    (laws.check_equals_flattened, "float32 in float64", in_single_precision, "where rounding allows", {}),
    (laws.check_equals_flattened, "NaN", nan_in_a_corner, "there is nan instead of", {}),
    (laws.check_equals_flattened, "one dimension more", one_dimension_more, "the output must be a tensor", {}),
    (laws.check_equals_flattened, "another type", in_another_type, "of torch.float64", {}),
    (laws.check_equals_flattened, "in place", changes_its_argument, "no argument may be changed in place", {}),
    (laws.check_equals_flattened, "chance", of_chance, "equal flattened|equal arguments do not always", {}),
    (laws.check_equals_flattened_on_additive, "joint softmax", ta.kao_kv, "on additive keys and values", {}),
    (laws.check_equals_flattened_on_additive, "no grand mean", without_grand_mean, "on additive keys and values", {}),
    (laws.check_equals_flattened_on_additive, "no weights", changed(weights=ignores_weights), "on additive", {}),
    (laws.check_order_one, "scale squared", changed(scale=lambda g: 0.3), "at order 1", {}),
    (laws.check_order_one, "unnormalized", softmaxes(unnormalized), "at order 1", {}),
    (laws.check_order_one, "key shift by channel", changed(key=lambda g: g["key"].relu()), "at order 1", {}),
    (
        laws.check_log_sum_exp,
        "normalized weights",
        functools.partial(attention, log_of_counts=lambda counts: counts / counts.sum(-1, keepdim=True)),
        "the log-sum-exp must be that of the logits",
        {},
    ),
    (laws.check_log_sum_exp, "mean not taken off", additive_lse_of_keys_alone, "that of the logits", {}),
    (laws.check_log_sum_exp, "output of others", changed(value=values_out_of_step), "merge with other token sets", {}),
    (laws.check_log_sum_exp, "joint softmax", ta.kao_kv, "that of the logits", {}),
    (laws.check_weights_are_multiplicities, "no weights", changed(weights=ignores_weights), "repetition", {}),
    (laws.check_weights_are_multiplicities, "masks only", changed(weights=only_masks), "repetition", {}),
    (laws.check_weights_are_multiplicities, "one mode", changed(weights=weighs_the_first_mode_only), "repetition", {}),
    (laws.check_weights_are_multiplicities, "leaking averages", averages_over_absent, "repetition and cropping", {}),
    (laws.check_permutation_equivariance, "recency", prefers_later_indices, "permuting the indices|reordering", {}),
    (laws.check_permutation_equivariance, "last mode", changed(key=normalizes_along_the_last_mode), "reordering", {}),
    (laws.check_permutation_equivariance, "batch", changed(key=mixes_the_batch), "batch entries must not see", {}),
    (laws.check_permutation_equivariance, "queries", changed(query=centers_the_queries), "queries must not see", {}),
    (laws.check_key_shift, "unnormalized", softmaxes(unnormalized), "constant to all keys", {}),
    (laws.check_key_shift, "linear attention", softmaxes(linear), "constant to all keys", {}),
    (laws.check_key_shift, "normalized keys", changed(key=lambda g: F.normalize(g["key"], dim=-1)), "all keys", {}),
    (laws.check_value_affine, "no grand mean", without_grand_mean, "an affine map of the values", {}),
    (laws.check_value_affine, "positive values", changed(value=lambda g: g["value"].relu()), "an affine map", {}),
    (laws.check_rotation, "positive keys", changed(key=lambda g: g["key"].relu()), "rotating the channels", {}),
    (laws.check_scale_exchange, "unit queries", changed(query=lambda g: F.normalize(g["query"], dim=-1)), "up", {}),
    (laws.check_scale_exchange, "scale left out", changed(scale=lambda g: None), "scaling the queries up", {}),
    (laws.check_constant_mode, "joint softmax", ta.kao_kv, "keys and values are constant", {}),
    (laws.check_constant_mode, "sum over modes", without_grand_mean, "keys and values are constant", {}),
    (laws.check_refinement, "joint softmax", ta.kao_kv, "repeating every index", {}),
    (laws.check_refinement, "unnormalized", softmaxes(unnormalized), "repeating every index", {}),
    (laws.check_invisible_interaction, "flattened", ta.flattened_attention, "the interaction residual", {}),
    (laws.check_convex, "additive", ta.additive_attention, "within the range of the values", {}),
    (laws.check_convex, "NaN", nan_in_a_corner, "within the range of the values", {}),
    (laws.check_zero_scale_mean, "scale or default", changed(scale=scale_unless_zero), "at scale zero", {}),
    (laws.check_zero_scale_mean, "counted twice", without_grand_mean, "at scale zero", {}),
    (laws.check_finite, "exp overflows", softmaxes(overflowing), "must be finite", {}),
    (laws.check_finite, "nothing present", softmaxes(dividing_by_nothing), "must be finite", {}),
    (laws.check_finite, "sums in float16", added_up_in_their_type, "must be finite", HALF),
    (laws.check_first_order_law, "additive", ta.additive_attention, "the derivative by the scale", {}),
    (laws.check_first_order_law, "joint softmax", ta.kao_kv, "the derivative by the scale", {}),
    (laws.check_gradients, "half of it", changed(key=lambda g: Halved.apply(g["key"])), "the gradient must be", {}),
    (laws.check_gradients, "cut off", changed(value=lambda g: g["value"].detach()), "the gradient must be", {}),
    (laws.check_gradients, "second", changed(query=lambda g: Frozen.apply(g["query"])), "the second derivative", {}),
    (laws.check_precision, "weights in float16", softmaxes(in_half), "error in torch.float32", {}),
    (laws.check_precision, "coarser inside", in_bfloat16, "error in torch.float16", HALF),
    (laws.check_equals_reference, "no grand mean", mutilated("additive", without_grand_mean), DEFINITION, {}),
    (laws.check_equals_reference, "values", mutilated("additive", changed(value=values_out_of_step)), DEFINITION, {}),
    (laws.check_equals_reference, "lse", mutilated("additive", with_a_slightly_wrong_log_sum_exp), "log-sum-exp", {}),
    (laws.check_equals_reference, "nothing", mutilated("flattened", softmaxes(dividing_by_nothing)), DEFINITION, {}),
    (laws.check_causal, "sees everything", mutilated("kao_kv", sees_everything(ta.kao_kv)), "nothing must leak", {}),
    (laws.check_masks, "reads it", mutilated("additive", reads_what_is_masked), "no absent position must reach", {}),
    (laws.check_masks, "no mask", mutilated("kao_kv", without("mask")(ta.kao_kv)), "absent position|definition", {}),
    (
        laws.check_equals_reference,
        "one spread",
        clustered_with(spread=lambda m: torch.ones_like(m.spread)),
        DEFINITION,
        BLOCKS,
    ),
    (laws.check_first_order_law, "no moments", clustered_with(within=lambda m: 0 * m.within), "derivative by", BLOCKS),
    (
        laws.check_zero_scale_mean,
        "no counts",
        clustered_with(share=lambda m: torch.ones_like(m.share)),
        "at scale",
        BLOCKS,
    ),
    (laws.check_positions, "another", mutilated("kao_kv", of_the_mode_before(ta.kao_kv)), POSITIONS, {}),
    (laws.check_positions, "no past", mutilated("axial", sees_everything(ta.axial_attention)), POSITIONS, {}),
]


@pytest.mark.parametrize(
    ("check", "mutant", "sentence", "how"), some(OF_OPERATORS, lambda check: check.__name__, default=6)
)
def test_a_check_fails_on_a_mistake(check, mutant, sentence, how):
    with pytest.raises(AssertionError, match=sentence):
        check(mutant, **how)


RIGHT = {laws.check_constant_mode: ta.additive_attention, laws.check_invisible_interaction: ta.additive_attention}


@pytest.mark.thorough
@pytest.mark.parametrize("check", [*laws.UNIVERSAL, *laws.CLAIMED.values()], ids=lambda check: check.__name__)
def test_a_check_passes_on_what_the_mistakes_are_made_of(check):
    check(RIGHT.get(check, attention), examples=10)


# A theorem, what is wrong, the name of a function, and what is made of it.
OF_THEOREMS = [
    (theorems.independent_groups, "another scale", "truncated_attention", rescaled),
    (theorems.independent_groups, "weights left out", "truncated_attention", without("weights")),
    (theorems.all_modes, "pairs only", "truncated_attention", without("interaction_order")),
    (theorems.groups_as_modes, "another scale", "additive_attention", rescaled),
    (theorems.groups_as_modes, "weights left out", "additive_attention", without("weights")),
    (theorems.groups_as_modes, "one softmax", "additive_attention", instead(ta.kao_kv)),
    (theorems.overlapping_groups, "another scale", "additive_attention", rescaled),
    (theorems.overlapping_groups, "weights left out", "additive_attention", without("weights")),
    (theorems.additive_keys, "another scale", "truncated_attention", rescaled),
    (theorems.additive_keys, "another softmax", "additive_attention", rescaled),
    (theorems.missing_interaction, "another scale", "additive_attention", rescaled),
    (theorems.missing_interaction, "weights left out", "interaction_residual", without("weights")),
    (theorems.degenerate_laws, "another scale", "additive_attention", rescaled),
    (theorems.degenerate_laws, "one softmax", "additive_attention", instead(ta.kao_kv)),
    (theorems.orthogonal_channels, "another scale", "kronecker_product_attention", rescaled),
    (theorems.orthogonal_channels, "sums", "kronecker_product_attention", altered(pool="sum")),
    (theorems.orthogonal_channels, "a sum", "kronecker_product_attention", instead(ta.kronecker_sum_attention)),
    (theorems.orthogonal_outer_sums, "as published", "kao_qkv", altered(centered=False)),
    (theorems.orthogonal_outer_sums, "weights left out", "kao_qkv", without("weights")),
    (theorems.symmetric_modes, "modes differ", "kao_qkv", reverses_the_last_mode),
    (theorems.symmetric_modes, "modes differ", "kronecker_product_attention", reverses_the_last_mode),
    (theorems.decomposed_bias, "left out", "additive_attention", without("bias")),
    (theorems.decomposed_bias, "of another place", "additive_attention", of_the_mode_before),
    (theorems.causal_exact, "sees everything", "additive_attention", sees_everything),
    (theorems.counted_once, "signs only", "counting_numbers", signs_only),
    (theorems.outer_sums, "full attention", "kao_qkv", instead(ta.flattened_attention)),
    (theorems.outer_sums, "counted once", "kao_qkv", altered(centered=True)),
    (theorems.ladder, "a little more", "truncated_attention", a_little_more),
    (theorems.ladder, "averages not counted", "truncated_attention", not_counting_what_is_averaged),
    (theorems.joint_shares, "another scale", "kao_kv", rescaled),
    (theorems.joint_shares, "a little more", "additive_attention", a_little_more),
    (theorems.geometric_marginals, "another scale", "additive_attention", rescaled),
    (theorems.geometric_marginals, "arithmetic", "additive_attention", with_arithmetic_marginals),
    (theorems.projection, "another scale", "additive_attention", rescaled),
    (theorems.projection, "arithmetic", "additive_attention", with_arithmetic_marginals),
    (theorems.arithmetic_marginals, "weights left out", "interaction_residual", without("weights")),
    (theorems.arithmetic_marginals, "another scale", "flattened_attention", only_the_output_rescaled),
    (theorems.bounded, "a little more", "additive_attention", a_little_more),
    (theorems.bounded, "a fifth", "error_bound", times(0.2)),
    (theorems.bounded, "one softmax", "additive_attention", instead(ta.kao_kv)),
    (theorems.exclusive_or, "half", "error_bound", times(0.5)),
    (theorems.exclusive_or, "0.1 % more", "error_bound", times(1.001)),
    (theorems.second_order_bound, "no interaction", "additive_attention", without("interaction", "saturation")),
    (theorems.second_order_bound, "another scale", "additive_attention", rescaled),
    (theorems.saturated, "another saturation", "additive_attention", bounded_by(4.0)),
    (theorems.saturated, "a little more", "additive_attention", a_little_more),
    (theorems.speed, "four times", "additive_attention", times(4.0)),
    (theorems.speed, "four times", "kao_kv", times(4.0)),
    (theorems.speed_of_products, "sums", "kronecker_product_attention", altered(pool="sum")),
    (theorems.speed_of_products, "sums", "kronecker_sum_attention", altered(pool="sum")),
    (theorems.box, "counted twice", "additive_attention", times(2.0)),
    (theorems.box, "no mean taken off", "additive_attention", without_the_mean),
    (theorems.rank, "full attention", "additive_attention", instead(ta.flattened_attention)),
    (theorems.rank, "full attention", "kao_kv", instead(ta.flattened_attention)),
    (theorems.additive_gradients, "full attention", "additive_attention", instead(ta.flattened_attention)),
    (theorems.additive_gradients, "an interaction", "kao_kv", wrong_backwards),
    (theorems.mass, "some lost", "additive_attention", wrong_backwards),
    (theorems.mass, "some lost", "flattened_attention", wrong_backwards),
    (theorems.mass, "some lost", "clustered_attention", wrong_backwards),
    (theorems.projected_gradients, "one softmax", "additive_attention", instead(ta.kao_kv)),
    (theorems.projected_gradients, "half", "additive_attention", with_half_the_gradient_of_the_query),
    (theorems.layers, "nothing learnt", "TensorAttention", that_learns_no_queries),
    (theorems.layers, "one softmax", "TensorAttention", with_one_softmax),
    (theorems.first_orders, "a little more", "kao_kv", a_little_more),
    (theorems.first_orders, "modes alike", "kao_kv", of_means_of_all_modes_alike),
    (theorems.first_orders, "interaction", "additive_attention", altered(interaction="linear")),
    (theorems.first_orders, "all pairs", "truncated_attention", without("kept")),
    (theorems.orders_of_the_error, "a little more", "additive_attention", a_little_more),
    (theorems.orders_of_the_error, "no interaction", "additive_attention", without("interaction", "saturation")),
    (theorems.orders_of_the_error, "single modes", "truncated_attention", altered(interaction_order=1)),
    (theorems.decay, "no interaction", "additive_attention", without("interaction", "saturation")),
    (theorems.decay, "saturated", "additive_attention", bounded_by(0.5)),
    (theorems.decay, "interaction", "additive_attention", altered(interaction="linear", saturation=None)),
    (theorems.decay, "half of it", "additive_attention", half_way_to_full_attention),
    (theorems.homogeneous_noise, "another scale", "additive_attention", altered(scale=1.5)),
    (theorems.homogeneous_noise, "tilted twice", "additive_attention", altered(interaction="linear")),
    (theorems.far_away, "one softmax", "additive_attention", instead(ta.kao_kv)),
    (theorems.far_away, "not far", "kao_kv", altered(scale=0.5)),
    (theorems.adjoint, "a little more", "outer_sum", a_little_more),
    (theorems.adjoint, "a wrong gradient", "mode_averages", wrong_backwards),
    (theorems.adjoint, "weights left out", "mode_averages", without("weights")),
    (theorems.adjoint, "a wrong gradient", "outer_sum", wrong_backwards),
    (theorems.additive_parts, "a little more", "additive_part", a_little_more),
    (theorems.additive_parts, "weights left out", "interaction_residual", without("weights")),
    (theorems.joint_repetition, "the first counts twice", "kao_kv", counts_the_first_index_twice),
    (theorems.merging, "nothing merged", "summarize", merges_nothing),
    (theorems.projecting, "offset left out", "summarize", without_offsets),
    (theorems.laws_of_averages, "weights left out", "marginal_mean_law", without("weights")),
    (theorems.laws_of_averages, "weights left out", "marginal_cross_covariance", without("weights")),
    (theorems.laws_of_averages, "weights left out", "additive_mean_law", without("weights")),
    (theorems.gls_averages, "equal weights", "gls_weights", lambda function: equal_weights),
    (clusters.distinct_keys, "one token", "clustered_attention", altered(tokens=1)),
    (
        clusters.distinct_keys,
        "no counts",
        "clustered_attention",
        with_moments(share=lambda m: torch.ones_like(m.share)),
    ),
    (clusters.cropping, "mask left out", "clustered_attention", without("mask")),
    (clusters.all_columns, "a stride", "clustered_attention", patched(cells, draw=with_a_stride)),
    (clusters.large_cells, "one plain sum", "clustered_attention", patched(cells, SLAB=1 << 40)),
]


def mistaken(name, mistake):
    """The package with a mistake in one function."""
    names = dict(vars(ta))
    if name in names:
        names[name] = mistake(names[name])
    else:
        below = dict(vars(ta.functional.additive))
        additive = types.SimpleNamespace(**{**below, name: mistake(below[name])})
        names["functional"] = types.SimpleNamespace(additive=additive)
    return types.SimpleNamespace(**names)


@pytest.mark.parametrize(("law", "name", "mistake"), some(OF_THEOREMS, lambda law: law.__name__, default=9))
def test_a_theorem_fails_on_a_mistake(law, name, mistake):
    failure = law.tried(mistaken(name, mistake), Asked(examples=60), shrink=False).failure
    assert failure is not None, "no case shows the mistake"
    assert " must " in failure.message, failure.message  # it is the statement that fails, not the mistake that raises


@pytest.mark.thorough
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "law",
    [theorems.second_order_bound, theorems.symmetric_modes, theorems.merging, theorems.far_away],
    ids=lambda law: law.__name__,
)
def test_as_many_cases_as_verify_tries_show_each_mistake(law, seed):
    """Laws that say nothing of many a case are tried on those of which they say something."""
    for _, _, name, mistake in (entry for entry in OF_THEOREMS if entry[0] is law):
        failure = law.tried(mistaken(name, mistake), Asked(seed=seed), shrink=False).failure
        assert failure is not None and " must " in failure.message, name


def test_every_law_has_a_mistake():
    assert {law for law, *_ in OF_OPERATORS} == set(laws.LAWS)
    assert {law for law, *_ in OF_THEOREMS} == set(theorems.THEOREMS)
    files = [
        importlib.import_module(f"{theorems.__name__}.{each.name}") for each in pkgutil.iter_modules(theorems.__path__)
    ]
    assert {law for file in files for law in vars(file).values() if isinstance(law, Law)} == set(theorems.THEOREMS)
    every = [*laws.LAWS, *theorems.THEOREMS]
    assert len({law.words for law in every}) == len(every) and all(law.formula and law.__doc__ for law in every)


# All of it, and what a failure reads like.


@pytest.mark.thorough
def test_an_operator_that_claims_too_much_is_found_out():
    boaster = dataclasses.replace(OPERATORS["kao_kv"], claims=lambda: frozenset(ta.Claim))
    with pytest.raises(AssertionError, match=r"^kao_kv: "):
        check_operator(boaster, examples=15, skip=(laws.check_gradients, laws.check_precision))


def test_what_has_no_definition_cannot_be_compared_with_it():
    with pytest.raises(AssertionError, match="there is no definition to compare with"):
        laws.check_equals_reference(attention)


def test_a_failure_is_a_sentence_with_the_smallest_case():
    settings.load_profile("default")
    with pytest.raises(AssertionError) as told:
        laws.check_zero_scale_mean("kao_qkv")
    number = r"-?\d[\w.+-]*"
    sentence = (
        rf"kao_qkv: at scale zero the output must be the mean value, but there is {number} instead of {number} at "
        rf"\(0, 0, 0\), a difference of {number} where rounding allows {number}\.\n"
    )
    case = (
        r"  Case\(batch=\(\), sizes=\(1, 1\), positions=\(1, 1\), D=1, D_v=1, scale=None, weights=None, "
        r"torch\.float64\)"
    )
    assert re.fullmatch(sentence + case, str(told.value))


@pytest.mark.parametrize("order", [5, 6])
def test_means_that_cancel_may_err_each_on_its_own(order):
    """The most modes that the command takes: 49 means of six modes are added up with signs."""
    laws.check_zero_scale_mean("truncated", order=order, examples=5)
