"""Attention of queries over sets of tokens, one softmax a set, with its log-sum-exp. It has never heard of modes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tensorattn.weights import accumulation_dtype

__all__ = ["TokenSet", "attend_tokens", "join_sets", "join_tokens"]

CHUNK = 1 << 19  # logits held at a time by the explicit path: 2 MB in float32


class TokenSet(NamedTuple):
    """Tokens that share one softmax.

    Attributes:
        key: ``(*batch, S, D)``.
        value: ``(*batch, S, D_v)``.
        log_weight: Logarithm of how often each token counts, ``(*batch, S)`` or broadcastable to it, minus infinity
            for an absent token. None if all tokens count alike.
        multiplicity: How often each token counts where all count alike. It moves the log-sum-exp alone.
        coefficient: How often the softmax of this set enters the sum over sets.
    """

    key: Tensor
    value: Tensor
    log_weight: Tensor | None = None
    multiplicity: int = 1
    coefficient: int = 1


def attend_tokens(
    query: Tensor,
    sets: Sequence[TokenSet],
    *,
    scale: float,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    return_attention: bool = False,
) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...] | None]:
    """Add up softmax attention over several sets of tokens, each with its own softmax and coefficient.

    A single set goes through `scaled_dot_product_attention`. Everything else is written out, in chunks of queries,
    with all sets in one product; half precision is then computed in float32. A batch entry whose tokens are all
    absent gives zeros and a log-sum-exp of minus infinity.

    Args:
        query: ``(*batch, L, D)``.
        sets: The token sets, with the batch dimensions of the query.
        scale: Factor of the logits.
        dropout_p: Probability of dropping an attention weight; sets of one token are constants and never dropped.
        return_lse: Whether to return the log-sum-exp.
        return_attention: Whether to return the attention weights.

    Returns:
        The output ``(*batch, L, D_v)`` in the type of the query; if asked for, the sum over sets of coefficient
        times log-sum-exp ``(*batch, L)``; and the attention weights ``(*batch, L, S)`` of each set.
    """
    alive = _alive(sets)
    explicit = return_lse or return_attention or len(sets) > 1 or query.shape[-1] != sets[0].value.shape[-1]
    attend = _explicit if explicit or sets[0].coefficient != 1 else _fused
    length, tokens = query.shape[-2], sum(tokens.key.shape[-2] for tokens in sets)
    step = length
    if not torch.compiler.is_compiling() and (attend is _explicit or query.stride(-1) != 1):
        step = max(64, CHUNK // max(1, math.prod(query.shape[:-2]) * tokens))
    pieces = [
        attend(chunk, sets, scale, dropout_p, return_lse, return_attention, alive)
        for chunk in (query.split(step, -2) if step < length else (query,))
    ]
    outputs, lses, attentions = zip(*pieces, strict=True)
    joined = None
    if return_attention:
        joined = tuple(torch.cat(parts, -2) for parts in zip(*attentions, strict=True))
    return (
        torch.cat(outputs, -2) if len(pieces) > 1 else outputs[0],
        torch.cat(lses, -1) if return_lse else None,
        joined,
    )


def _alive(sets: Sequence[TokenSet]) -> Tensor | None:
    """Tell which batch entries have any token, ``(*batch, 1, 1)``; None if all have."""
    weighted = [tokens.log_weight for tokens in sets if tokens.log_weight is not None]
    if not weighted:
        return None
    alive = (weighted[0] > -math.inf).any(-1)
    for log_weight in weighted[1:]:
        alive = alive & (log_weight > -math.inf).any(-1)
    return alive[..., None, None]


def _bias(tokens: TokenSet, alive: Tensor | None) -> Tensor | None:
    """Log weights of one set as ``(*batch, 1, S)``, made harmless where no token is alive."""
    if tokens.log_weight is None:
        return None
    bias = tokens.log_weight.unsqueeze(-2)
    return bias if alive is None else torch.where(alive, bias, 0.0)


def _fused(
    query: Tensor,
    sets: Sequence[TokenSet],
    scale: float,
    dropout_p: float,
    return_lse: bool,
    return_attention: bool,
    alive: Tensor | None,
) -> tuple[Tensor, None, None]:
    """Attend to one set by the fused kernel, which takes exactly two batch dimensions."""
    (tokens,) = sets
    batch = query.shape[:-2]
    bias = _bias(tokens, alive)

    def four(tensor: Tensor) -> Tensor:
        tensor = tensor.to(query.dtype)
        if len(batch) > 2:
            return tensor.expand(*batch, *tensor.shape[-2:]).flatten(0, -4)
        return tensor.reshape(*(1,) * (2 - len(batch)), *tensor.shape)

    output = F.scaled_dot_product_attention(
        four(query if query.stride(-1) == 1 else query.contiguous()),
        four(tokens.key),
        four(tokens.value),
        attn_mask=None if bias is None else four(bias),
        dropout_p=dropout_p,
        scale=scale,
    ).reshape(*batch, query.shape[-2], tokens.value.shape[-1])
    return output if alive is None else output * alive, None, None


def _explicit(
    query: Tensor,
    sets: Sequence[TokenSet],
    scale: float,
    dropout_p: float,
    return_lse: bool,
    return_attention: bool,
    alive: Tensor | None,
) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...] | None]:
    """Attend to several sets by one product with all keys and one with all values."""
    dtype = accumulation_dtype(query.dtype)
    key = torch.cat([tokens.key for tokens in sets], -2).to(dtype)
    value = torch.cat([tokens.value for tokens in sets], -2).to(dtype)
    logits = torch.matmul(query.to(dtype) * scale, key.mT)
    weights, lse = [], None
    for tokens, part in zip(sets, logits.split([tokens.key.shape[-2] for tokens in sets], -1), strict=True):
        bias = _bias(tokens, alive)
        part = part if bias is None else part + bias
        weights.append(torch.softmax(part, -1))
        if return_lse:
            term = torch.logsumexp(part, -1)
            if tokens.log_weight is None:
                term = term + term.new_full((), tokens.multiplicity).log()
            lse = term * tokens.coefficient if lse is None else lse + term * tokens.coefficient
    dropped = [F.dropout(weight, dropout_p) if dropout_p > 0 and weight.shape[-1] > 1 else weight for weight in weights]
    signed = [w if t.coefficient == 1 else w * t.coefficient for t, w in zip(sets, dropped, strict=True)]
    output = torch.matmul(torch.cat(signed, -1) if len(signed) > 1 else signed[0], value)
    if alive is not None:
        output = output * alive
        lse = None if lse is None else torch.where(alive.squeeze(-1), lse, -math.inf)
        weights = [weight * alive for weight in weights]
    return output.to(query.dtype), lse, tuple(weights) if return_attention else None


def join_tokens(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate tokens ``(*batch, S_i, D)``.

    Args:
        parts: Tokens.
    """
    return torch.cat(list(parts), -2)


def join_sets(sets: Sequence[TokenSet]) -> TokenSet:
    """Join several sets into one that shares a softmax.

    Args:
        sets: Token sets with coefficient 1, either all or none of them with log weights.

    Returns:
        The joint set. Without log weights, all parts must have the same multiplicity.
    """
    key, value = join_tokens([part.key for part in sets]), join_tokens([part.value for part in sets])
    log_weights = [part.log_weight for part in sets if part.log_weight is not None]
    if not log_weights:
        return TokenSet(key, value, multiplicity=sets[0].multiplicity)
    batch = torch.broadcast_shapes(*(log_weight.shape[:-1] for log_weight in log_weights))
    return TokenSet(key, value, torch.cat([log_weight.expand(*batch, -1) for log_weight in log_weights], -1))
