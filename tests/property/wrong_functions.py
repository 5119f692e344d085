"""Functions that are wrong in one way each, made of a right one: what laws and statements are there to notice."""

from __future__ import annotations

import functools
import types

import numpy as np
import torch

import tensorattn as ta


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


def without(*options):
    def decorate(function):
        def mutant(*tensors, **given):
            return function(*tensors, **{key: value for key, value in given.items() if key not in options})

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


def bounded_by(saturation):
    """An operator whose interaction term has another bound."""

    def decorate(function):
        def mutant(*tensors, **given):
            return function(*tensors, **({**given, "saturation": saturation} if given.get("interaction") else given))

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
    """A function of tensors, or lists of them, whose gradients are wrong."""

    def weighed(given):
        return Weighing.apply(given) if isinstance(given, torch.Tensor) else [Weighing.apply(part) for part in given]

    return functools.wraps(function)(lambda *given, **options: function(*map(weighed, given), **options))


def half_way_to_full_attention(function):
    """Additive attention that errs half as much as it does."""

    def mutant(*tensors, interaction=None, saturation=1.0, **given):
        return (function(*tensors, **given) + ta.flattened_attention(*tensors, **given)) / 2

    return functools.wraps(function)(mutant)


def counts_the_first_index_twice(function):
    def mutant(query, key, value, *, order, weights=None, **given):
        weights = [None] * order if weights is None else list(weights)
        first = torch.ones(key.shape[-order - 1]).double() if weights[0] is None else weights[0].double()
        weights[0] = torch.cat([2 * first[..., :1], first[..., 1:]], -1)
        return function(query, key, value, order=order, weights=weights, **given)

    return functools.wraps(function)(mutant)
