"""Mistakes that theorems are there to notice: for each law, functions that it is made of, put wrong in one way each."""

from __future__ import annotations

import functools
import types

import numpy as np
import torch

import tensorattn as ta
from tensorattn.verify.theorems import averages, bounds, exactness, gradients, laws, limits, positions, softmaxes


def a_little_more(function):
    """A function whose results are all a little too large."""

    def larger(thing):
        if isinstance(thing, torch.Tensor):
            return thing * 1.01 if thing.is_floating_point() else thing
        if isinstance(thing, np.ndarray):
            return thing * 1.01
        if isinstance(thing, list) or type(thing) is tuple:
            return type(thing)(larger(part) for part in thing)
        if isinstance(thing, ta.AttentionResult):
            return ta.AttentionResult(*(larger(part) for part in thing))
        return thing

    return functools.wraps(function)(lambda *given, **options: larger(function(*given, **options)))


def rescaled(function):
    """An operator that takes another scale where it is told one."""

    def mutant(*tensors, **given):
        return function(*tensors, **{**given, "scale": 1.01 * given["scale"] if given.get("scale") else 0.3})

    return functools.wraps(function)(mutant)


def sees_everything(function):
    def mutant(*tensors, causal=None, **given):
        return function(*tensors, **given)

    return functools.wraps(function)(mutant)


def without(option):
    def decorate(function):
        def mutant(*tensors, **given):
            return function(*tensors, **{key: value for key, value in given.items() if key != option})

        return functools.wraps(function)(mutant)

    return decorate


def merges_nothing(function):
    def mutant(*given, **options):
        summary = function(*given, **options)
        return types.SimpleNamespace(
            **{name: getattr(summary, name) for name in ("kept", "weights", "key", "value", "covariance")},
            key_covariance=summary.key_covariance,
            merge=lambda other, mode: summary,
        )

    return mutant


def plans_too_much(function):
    def mutant(*given, **options):
        made = function(*given, **options)
        return types.SimpleNamespace(execute=lambda *arrays: a_little_more(made.execute)(*arrays))

    return mutant


def signs_only(function):
    return lambda family: {kept: (-1) ** len(kept) for kept in function(family)}


def altered(**changes):
    """A function that gets other arguments than it is given: those that are named, by name, if it takes them."""

    def decorate(function):
        def mutant(*tensors, **given):
            return function(*tensors, **{**given, **changes})

        return functools.wraps(function)(mutant)

    return decorate


def instead(other):
    """Another operator in place of the right one, without the options that it does not have."""

    def decorate(function):
        known = other.__wrapped__.__kwdefaults__ or {} if hasattr(other, "__wrapped__") else {}
        known = {"order", "scale", "weights", "return_lse", "return_attention", *known}

        def mutant(*tensors, **given):
            return other(*tensors, **{name: value for name, value in given.items() if name in known})

        return functools.wraps(function)(mutant)

    return decorate


def times(factor):
    """A function whose result is too large or too small."""
    return lambda function: functools.wraps(function)(lambda *given, **options: factor * function(*given, **options))


def of_the_mode_before(function):
    """A bias by position that reaches the query one place further on."""

    def mutant(*tensors, bias=None, **given):
        shifted = bias and [None if part is None else part.roll(1, -2) for part in bias]
        return function(*tensors, bias=shifted, **given)

    return functools.wraps(function)(mutant)


def reverses_the_last_mode(function):
    """Something that depends on the order of the modes."""

    def mutant(query, key, value, *, order, **given):
        ramp = torch.arange(key.shape[-2]).to(key)
        query, key = (tensor * (1 + ramp[:, None]) for tensor in (query, key))
        return function(query, key, value, order=order, **given)

    return functools.wraps(function)(mutant)


def with_arithmetic_marginals(function):
    """Attention weights that are sums of full attention over slices, not geometric means."""

    def mutant(query, key, value, *, order, **given):
        full = ta.flattened_attention(query, key, value, order=order, **given)
        modes = range(-order, 0)
        sums = ([m for m in modes if m != mode] for mode in modes)
        marginals = tuple(full.attention[0].sum(others) if others else full.attention[0] for others in sums)
        return full._replace(attention=marginals)

    return functools.wraps(function)(mutant)


def not_counting_what_is_averaged(function):
    """The log-sum-exp of the kept means alone."""

    def mutant(query, key, value, *, order, kept, weights=None, **given):
        result = function(query, key, value, order=order, kept=kept, weights=weights, **given)
        count = torch.ones(key.shape[: -order - 1]).double()
        for mode in set(range(order)) - set(kept[0]):
            weight = None if weights is None else weights[mode]
            count = count * (key.shape[mode - order - 1] if weight is None else weight.sum(-1).double())
        places = [None] * (result.lse.dim() - count.dim())
        return result._replace(lse=result.lse - count.log()[(..., *places)])

    return functools.wraps(function)(mutant)


def of_means_of_all_modes_alike(function):
    """The mean of the modes' attention, in place of a joint softmax that favours long modes."""

    def mutant(query, key, value, *, order, **given):
        attention = ta.additive_attention(query, key, value, order=order, **given)
        average = ta.additive_attention(query, key, value, order=order, **{**given, "scale": 0.0})
        return average + (attention - average) / order

    return functools.wraps(function)(mutant)


class Weighing(torch.autograd.Function):
    """The identity, whose gradient is an interaction too large."""

    @staticmethod
    def forward(ctx, tensor):
        return tensor.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * torch.linspace(0.9, 1.1, grad.numel()).to(grad).reshape(grad.shape)


def with_a_wrong_gradient(function):
    def mutant(query, key, value, **given):
        return function(query, Weighing.apply(key), Weighing.apply(value), **given)

    return functools.wraps(function)(mutant)


def with_half_the_gradient_of_the_query(function):
    def mutant(query, key, value, **given):
        return function((query + query.detach()) / 2, key, value, **given)

    return functools.wraps(function)(mutant)


def that_learns_no_queries(layer):
    """A layer whose parameters of the queries learn nothing."""

    def made(*arguments, operator, **options):
        mutant = layer(*arguments, operator=operator, **options)
        if operator == "additive":
            mutant.q_proj.weight.register_hook(torch.zeros_like)
        return mutant

    return made


class Shifted:
    """A summary whose maps leave out what is added."""

    def __init__(self, summary):
        self.summary = summary

    def __getattr__(self, name):
        return getattr(self.summary, name)

    def project(self, *maps, key_bias, value_bias, num_heads):
        return self.summary.project(*maps, key_bias=None, value_bias=value_bias, num_heads=num_heads)


def without_offsets(function):
    return lambda *tensors, **how: Shifted(function(*tensors, **how))


def equal_weights(covariance):
    return torch.full(covariance.shape[:-1], 1 / covariance.shape[-1], dtype=covariance.dtype)


def only_the_output_rescaled(function):
    """Another output than the attention weights make."""

    def mutant(*tensors, **given):
        return function(*tensors, **given)._replace(output=rescaled(function)(*tensors, **given).output)

    return functools.wraps(function)(mutant)


def without_the_mean(function):
    """Additive attention that does not take N - 1 mean values off."""

    def mutant(query, key, value, *, order, weights=None, **given):
        batch = key.dim() - order - 1
        mean = ta.summarize(value, value, order=order, kept=[()], weights=weights).value(())
        mean = mean.reshape(*mean.shape[:batch], *(1 for _ in query.shape[batch:-1]), -1)
        return function(query, key, value, order=order, weights=weights, **given) + (order - 1) * mean

    return functools.wraps(function)(mutant)


def with_one_softmax(layer):
    """A layer of another operator."""
    others = {"additive": "kao_kv", "flattened": "flattened"}
    return lambda *arguments, operator, **options: layer(*arguments, operator=others[operator], **options)


def wrong_backwards(function):
    """A function of one or more tensors whose gradients are wrong."""

    def mutant(given, **options):
        wrong = Weighing.apply(given) if isinstance(given, torch.Tensor) else [Weighing.apply(part) for part in given]
        return function(wrong, **options)

    return functools.wraps(function)(mutant)


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
    ("second_order_bound", "no interaction", bounds, "additive_attention", without("interaction")),
    ("second_order_bound", "another scale", bounds, "additive_attention", rescaled),
    ("saturated", "another saturation", bounds, "additive_attention", altered(saturation=4.0)),
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
    ("additive_gradients", "an interaction", gradients, "kao_kv", with_a_wrong_gradient),
    ("mass", "some lost", gradients, "additive_attention", with_a_wrong_gradient),
    ("mass", "some lost", gradients, "flattened_attention", with_a_wrong_gradient),
    ("projected_gradients", "one softmax", gradients, "additive_attention", instead(ta.kao_kv)),
    ("projected_gradients", "half", gradients, "additive_attention", with_half_the_gradient_of_the_query),
    ("layers", "nothing learnt", gradients, "TensorAttention", that_learns_no_queries),
    ("layers", "one softmax", gradients, "TensorAttention", with_one_softmax),
    ("first_orders", "a little more", limits, "kao_kv", a_little_more),
    ("first_orders", "modes alike", limits, "kao_kv", of_means_of_all_modes_alike),
    ("first_orders", "interaction", limits, "additive_attention", altered(interaction="linear")),
    ("first_orders", "all pairs", limits, "truncated_attention", without("kept")),
    ("first_order_errors", "a little more", limits, "additive_attention", a_little_more),
    ("second_order_errors", "no interaction", limits, "additive_attention", without("interaction")),
    ("truncated_errors", "single modes", limits, "truncated_attention", altered(interaction_order=1)),
    ("decay", "no interaction", limits, "additive_attention", without("interaction")),
    ("decay", "saturated", limits, "additive_attention", altered(saturation=0.5)),
    ("plateau", "interaction", limits, "additive_attention", altered(interaction="linear", saturation=None)),
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
