"""Operators that are wrong in one way each, made of a plain right one: attention, written out."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import tensorattn as ta


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
    output, lse, _ = ta.additive_attention(query, key, value, order=order, return_lse=True, **others)
    return (output, lse + (order - 1)) if return_lse else output
