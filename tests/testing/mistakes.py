"""Operators and functions that are wrong in one way each, made of right ones: what laws are there to notice."""

from __future__ import annotations

import functools
import types

import torch
import torch.nn.functional as F

import tensorattn as ta
from tensorattn.functional import clustered
from tensorattn.functional.cells import Drawn

# Operators, made of attention written out.


def parts(query, key, value, order, weights):
    """Query, key and value as rows, and how often each position counts."""
    batch = key.dim() - order - 1
    counts = key.new_ones(key.shape[:-1])
    for mode, w in enumerate(weights or ()):
        if w is not None:
            w = w.to(key)
            counts = counts * w.reshape(*w.shape[:-1], *(w.shape[-1] if m == mode else 1 for m in range(order)))
    rows = query.reshape(*query.shape[:batch], -1, query.shape[-1])
    return rows, key.flatten(batch, -2), value.flatten(batch, -2), counts.flatten(batch)


def soft(logits, counts):
    """The softmax with counts, zero for a batch entry that has none."""
    bias = counts.log().unsqueeze(-2)
    alive = (counts > 0).any(-1)[..., None, None]
    return torch.softmax(logits + torch.where(alive, bias, 0.0), -1) * alive


def attention(
    query, key, value, *, order, scale=None, weights=None, return_lse=False, softmax=soft, log_of_counts=None
):
    q, k, v, counts = parts(query, key, value, order, weights)
    logits = q @ k.mT * (key.shape[-1] ** -0.5 if scale is None else scale)
    output = (softmax(logits, counts) @ v).reshape(*query.shape[:-1], value.shape[-1])
    if not return_lse:
        return output
    total = counts if log_of_counts is None else log_of_counts(counts)
    lse = torch.logsumexp(logits + total.log().unsqueeze(-2), -1)
    return output, lse.reshape(query.shape[:-1])


def changed(**changes):
    """Attention on arguments that were tampered with: a function of all arguments for each that is replaced."""

    def mutant(query, key, value, *, order, **others):
        given = {"query": query, "key": key, "value": value, **others}
        for name, change in changes.items():
            given[name] = change({"query": query, "key": key, "value": value, "order": order, **others})
        return attention(order=order, **given)

    return mutant


def without_grand_mean(query, key, value, *, order, return_lse=False, **others):
    mean = value.mean(list(range(key.dim() - order - 1, key.dim() - 1)))
    batch = key.dim() - order - 1
    mean = mean.reshape(*mean.shape[:batch], *(1 for _ in query.shape[batch:-1]), -1)
    result = ta.additive_attention(query, key, value, order=order, return_lse=True, **others)
    result = result._replace(output=result.output + (order - 1) * mean)
    return result if return_lse else result.output


def values_out_of_step(given):
    return given["value"].roll(1, -2)


def ignores_weights(given):
    return None


def only_masks(given):
    return None if given["weights"] is None else [None if w is None else (w > 0).to(w.dtype) for w in given["weights"]]


def weighs_the_first_mode_only(given):
    return None if given["weights"] is None else [given["weights"][0], *[None] * (given["order"] - 1)]


def averages_over_absent(query, key, value, *, order, weights=None, **others):
    """Masked softmax, but averages that count everything: what is absent leaks."""
    if order < 2:
        return attention(query, key, value, order=order, weights=weights, **others)
    weights = (None,) * order if weights is None else weights
    batch = key.dim() - order - 1
    key, value = (tensor.mean(batch + 1, keepdim=True) for tensor in (key, value))
    return attention(query, key, value, order=order, weights=[weights[0], None, *weights[2:]], **others)


def prefers_later_indices(query, key, value, *, order, **others):
    ramp = torch.arange(key.shape[-2]).to(key)
    return attention(query, key + ramp[:, None], value, order=order, **others)


def normalizes_along_the_last_mode(given):
    return given["key"] - given["key"].mean(-2, keepdim=True)


def mixes_the_batch(given):
    return (
        given["key"] - given["key"].mean(0, keepdim=True) if given["key"].dim() > given["order"] + 1 else given["key"]
    )


def centers_the_queries(given):
    query, batch = given["query"], given["key"].dim() - given["order"] - 1
    return query - query.mean(list(range(batch, query.dim() - 1)), keepdim=True) if query.dim() > batch + 1 else query


def unnormalized(logits, counts):
    return logits.exp() * counts.unsqueeze(-2)


def overflowing(logits, counts):
    weights = logits.exp() * counts.unsqueeze(-2)
    return weights / weights.sum(-1, keepdim=True)


def linear(logits, counts):
    weights = (F.elu(logits) + 1) * counts.unsqueeze(-2)
    return weights / weights.sum(-1, keepdim=True)


def dividing_by_nothing(logits, counts):
    return torch.softmax(logits + counts.log().unsqueeze(-2), -1)


def in_half(logits, counts):
    weights = soft(logits, counts)
    return weights if weights.dtype == torch.float64 else weights.to(torch.float16).to(weights.dtype)


def scale_unless_zero(given):
    return given["scale"] or None


def added_up_in_their_type(query, key, value, *, order, **others):
    """The mean comes from a sum, one addition at a time, in the type of the input."""
    batch = key.dim() - order - 1
    rows = value.flatten(batch, -2)
    total = torch.zeros_like(rows[..., 0, :])
    for row in rows.unbind(-2):
        total = total + row
    error = total / rows.shape[-2] - rows.float().mean(-2).to(value.dtype)
    output = attention(query, key, value, order=order, **others)
    return output + error.reshape(*error.shape[:-1], *(1 for _ in query.shape[batch:-1]), -1)


class Halved(torch.autograd.Function):
    """The identity, with half its gradient."""

    @staticmethod
    def forward(ctx, tensor):
        return tensor.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad / 2


class Frozen(torch.autograd.Function):
    """The square, whose gradient has a wrong gradient."""

    @staticmethod
    def forward(ctx, tensor):
        ctx.save_for_backward(tensor)
        return tensor**2

    @staticmethod
    def backward(ctx, grad):
        (tensor,) = ctx.saved_tensors
        return grad * 2 * tensor.detach()


def changes_its_argument(query, key, value, *, order, **others):
    output = attention(query, key, value, order=order, **others)
    value.mul_(1.0)
    return output


def of_chance(query, key, value, *, order, **others):
    return F.dropout(attention(query, key, value, order=order, **others), 0.5)


def nan_in_a_corner(query, key, value, *, order, **others):
    output = attention(query, key, value, order=order, **others).clone()
    output.view(-1)[-1] = torch.nan
    return output


def in_single_precision(query, key, value, *, order, **others):
    return attention(query.float(), key.float(), value.float(), order=order, **others).to(query.dtype)


def in_bfloat16(query, key, value, *, order, **others):
    coarse = torch.promote_types(query.dtype, torch.bfloat16) if query.dtype != torch.float16 else torch.bfloat16
    return attention(query.to(coarse), key.to(coarse), value.to(coarse), order=order, **others).to(query.dtype)


def one_dimension_more(query, key, value, *, order, **others):
    return attention(query, key, value, order=order, **others).unsqueeze(0)


def in_another_type(query, key, value, *, order, **others):
    return attention(query, key, value, order=order, **others).float()


def additive_lse_of_keys_alone(query, key, value, *, order, return_lse=False, **others):
    """Additive attention that forgets what the logits of the mean have to be taken off."""
    output, lse, *_ = ta.additive_attention(query, key, value, order=order, return_lse=True, **others)
    return (output, lse + (order - 1)) if return_lse else output


# Functions of the package, and its layers.


def a_little_more(function):
    """A function whose results are all a little too large."""

    def larger(thing):
        if isinstance(thing, torch.Tensor):
            return thing * 1.01 if thing.is_floating_point() else thing
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


def reads_what_is_masked(query, key, value, *, mask=None, **given):
    """Masked logits, but products with values that are not hidden."""
    output = ta.additive_attention(query, key, value, mask=mask, **given)
    if mask is None:
        return output
    leak = value.flatten(key.dim() - given["order"] - 1, -2).sum(-2) * 0.0
    return output + leak.reshape(*leak.shape[:-1], *(1 for _ in query.shape[leak.dim() - 1 : -1]), leak.shape[-1])


def patched(module, **changes):
    """A function of the package during whose calls names of a module mean something else."""

    def decorate(function):
        @functools.wraps(function)
        def mutant(*tensors, **given):
            before = {name: getattr(module, name) for name in changes}
            try:
                for name, change in changes.items():
                    setattr(module, name, change(before[name]) if callable(change) else change)
                return function(*tensors, **given)
            finally:
                for name, was in before.items():
                    setattr(module, name, was)

        return mutant

    return decorate


def with_moments(**changes):
    """Clustered attention that makes something else of what the cells share."""

    def altered(tokens):
        return lambda moments, dtype: tokens(
            moments._replace(**{name: change(moments) for name, change in changes.items()}), dtype
        )

    return patched(clustered, _tokens=altered)


def with_a_stride(draw):
    """Candidates at equal distances, always at the same place of each row of a grid."""

    def strided(length, most, weight, device):
        return Drawn(torch.arange(min(length, most), device=device) * max(1, length // most), weight)

    return strided
