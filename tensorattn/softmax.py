"""Attention of queries over sets of tokens, one softmax a set, with its log-sum-exp. It has never heard of modes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tensorattn.errors import ShapeError, retells
from tensorattn.fused import fused_attention, is_differentiated
from tensorattn.tokens import join_tokens
from tensorattn.weights import accumulation_dtype, in_type

__all__ = ["TokenSet", "attend_tokens", "join_sets", "merge_attention"]

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
        bias: Added to the logits, ``(*batch, R, S)`` or broadcastable to it; minus infinity hides a token.
        rows: For each query, its row of ``bias``, ``(L,)``.
    """

    key: Tensor
    value: Tensor
    log_weight: Tensor | None = None
    multiplicity: int = 1
    coefficient: int = 1
    bias: Tensor | None = None
    rows: Tensor | None = None


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

    Each set goes through the fused kernel, unless log-sum-exps, attention weights, dropout or a bias a query are asked
    for: then logits are written out, in chunks of queries, with all sets in one product. Half precision is computed in
    float32 wherever several sets add up. A batch entry whose tokens are all absent gives zeros and a log-sum-exp of
    minus infinity.

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
    *batch, length, dim = query.shape
    fused = not (return_lse or return_attention or dropout_p > 0)
    fused = fused and all([tokens.bias is None and dim == tokens.value.shape[-1] for tokens in sets])
    step = length
    if not torch.compiler.is_compiling() and not query.is_meta:
        held = dim if fused else sum([tokens.key.shape[-2] for tokens in sets])
        most = max(64, CHUNK // max(1, math.prod(batch) * held))
        step = length if length <= most or (fused and _runs_whole(query, sets)) else most
    if fused and step == length:
        return _fused(query, sets, scale), None, None

    def attend(start: int) -> tuple[Tensor, ...]:
        """Attend from one chunk; output, log-sum-exp and attention weights as far as they are asked for."""
        chunk = query if step >= length else query[..., start : start + step, :]
        if fused:
            return (_fused(chunk, sets, scale),)
        output, lse, weights = _explicit(chunk, sets, start, scale, dropout_p, return_lse)
        return output, *(() if lse is None else (lse,)), *(weights if return_attention else ())

    results = _in_chunks(attend, length, step)
    lse = results[1].squeeze(-1) if return_lse else None
    return results[0], lse, tuple(results[1 + return_lse :]) if return_attention else None


def _runs_whole(query: Tensor, sets: Sequence[TokenSet]) -> bool:
    """Tell whether the kernel needs nothing of the size of the queries but them, or has to keep it for derivatives."""
    in_place = len(sets) == 1 and sets[0].coefficient == 1 and query.stride(-1) == 1
    return in_place or is_differentiated(query, *(tokens.key for tokens in sets), *(tokens.value for tokens in sets))


def _in_chunks(attend: Callable[[int], tuple[Tensor, ...]], length: int, step: int) -> list[Tensor]:
    """Attend chunk by chunk along the second dimension from the end, and put the chunks together."""
    first = attend(0)
    if step >= length:
        return list(first)
    if torch.is_grad_enabled() and any(part.requires_grad for part in first):
        chunks = [first, *(attend(start) for start in range(step, length, step))]
        return [torch.cat(parts, -2) for parts in zip(*chunks, strict=True)]
    whole = [part.new_empty(*part.shape[:-2], length, part.shape[-1]) for part in first]
    for start in range(0, length, step):
        parts = attend(start) if start else first
        for target, part in zip(whole, parts, strict=True):
            target[..., start : start + step, :] = part
    return whole


def _fused(query: Tensor, sets: Sequence[TokenSet], scale: float) -> Tensor:
    """Add up what the fused kernel gives for each set."""
    dtype = query.dtype if len(sets) == 1 else accumulation_dtype(query.dtype)
    queries, total = in_type(query, dtype), None
    choices = sum([tokens.key.shape[-2] > 1 for tokens in sets])
    if choices > 1 and queries.stride(-1) != 1:
        queries = queries.contiguous()  # at once, and not for every set again
    for tokens in sets:
        key, value, bias = in_type(tokens.key, dtype), in_type(tokens.value, dtype), None
        if tokens.log_weight is not None:
            bias = tokens.log_weight.unsqueeze(-2).to(dtype)
            alive = bias.amax(-1, keepdim=True) > -math.inf
            bias = torch.where(alive, bias, 0.0)  # a softmax over nothing would be NaN: here over zeros
            value = torch.where(alive, value, 0.0)
        if key.shape[-2] == 1 and choices:
            part = value  # whatever the query, which other sets lead to
        else:
            part = fused_attention(queries, key, value, bias, scale)
        if total is None:
            total = part if tokens.coefficient == 1 else part * tokens.coefficient
        else:
            total = total.add(part, alpha=tokens.coefficient)
    assert total is not None
    return in_type(total, query.dtype)


def _explicit(
    query: Tensor, sets: Sequence[TokenSet], start: int, scale: float, dropout_p: float, return_lse: bool
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Attend to several sets by one product with all keys and one with all values."""
    dtype = accumulation_dtype(query.dtype)
    key = join_tokens([tokens.key for tokens in sets]).to(dtype)
    value = join_tokens([tokens.value for tokens in sets]).to(dtype)
    logits = torch.matmul(query.to(dtype) * scale, key.mT)
    weights, terms, alive = [], [], None
    for tokens, part in zip(sets, logits.split([tokens.key.shape[-2] for tokens in sets], -1), strict=True):
        if tokens.log_weight is not None:
            part = part + tokens.log_weight.unsqueeze(-2).to(dtype)
        if tokens.bias is not None and tokens.rows is not None:
            part = part + tokens.bias.index_select(-2, tokens.rows[start : start + query.shape[-2]])
        if tokens.log_weight is not None or tokens.bias is not None:
            present = part.amax(-1, keepdim=True) > -math.inf
            alive = present if alive is None else alive & present
            part = torch.where(present, part, 0.0)  # a softmax over nothing would be NaN
        weights.append(torch.softmax(part, -1))
        if return_lse:
            term = torch.logsumexp(part, -1, keepdim=True)
            if tokens.log_weight is None:
                term = term + term.new_full((), tokens.multiplicity).log()
            terms.append(term * tokens.coefficient)
    dropped = [F.dropout(weight, dropout_p) if dropout_p > 0 and weight.shape[-1] > 1 else weight for weight in weights]
    signed = [w if t.coefficient == 1 else w * t.coefficient for t, w in zip(sets, dropped, strict=True)]
    output = torch.matmul(signed[0] if len(signed) == 1 else torch.cat(signed, -1), value)
    lse = functools.reduce(torch.add, terms) if return_lse else None
    if alive is not None:
        output = output * alive
        lse = None if lse is None else torch.where(alive, lse, -math.inf)
        weights = [weight * alive for weight in weights]
    return output.to(query.dtype), lse, weights


def join_sets(sets: Sequence[TokenSet]) -> TokenSet:
    """Join several sets into one that shares a softmax.

    Args:
        sets: Token sets with coefficient 1, either all or none of them with log weights.

    Returns:
        The joint set. Without log weights, all parts must have the same multiplicity.
    """
    key, value = join_tokens([part.key for part in sets]), join_tokens([part.value for part in sets])
    log_weights = [part.log_weight for part in sets if part.log_weight is not None]
    joint = TokenSet(key, value, multiplicity=sets[0].multiplicity)
    if log_weights:
        batch = torch.broadcast_shapes(*(log_weight.shape[:-1] for log_weight in log_weights))
        joint = TokenSet(key, value, torch.cat([log_weight.expand(*batch, -1) for log_weight in log_weights], -1))
    return joint if all(part.bias is None for part in sets) else _join_biases(joint, sets)


def _join_biases(joint: TokenSet, sets: Sequence[TokenSet]) -> TokenSet:
    """Give a joint set one row of bias for each query; parts without a bias have zeros."""
    parts = []
    for part in sets:
        if part.bias is None or part.rows is None:
            parts.append(part.key.new_zeros(1, part.key.shape[-2]))
        else:
            parts.append(part.bias.index_select(-2, part.rows))
    batch = torch.broadcast_shapes(*(part.shape[:-2] for part in parts))
    length = max(part.shape[-2] for part in parts)
    bias = torch.cat([part.expand(*batch, length, part.shape[-1]) for part in parts], -1)
    return joint._replace(bias=bias, rows=torch.arange(length, device=bias.device))


@retells
def merge_attention(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    r"""Join the attention of the same queries to several sets of tokens, exactly.

    .. math:: o = \sum_p e^{L_p - L} o_p, \qquad L = \log \sum_p e^{L_p}

    is attention to all sets together, where :math:`o_p` and :math:`L_p` are output and log-sum-exp of each: class and
    register tokens, a second tensor, memory. Where all parts are empty, the output is zero.

    Args:
        parts: Output and log-sum-exp of each set, pairs or results of an operator with ``return_lse=True``.

    Returns:
        Output, in the type of the first, and log-sum-exp of the union.

    Raises:
        ShapeError: If there is no part, or shapes disagree.

    Shape:
        - outputs: :math:`(*, D_v)`, log-sum-exps: :math:`(*)`

    Examples:
        >>> import torch, tensorattn as ta
        >>> q, k = torch.randn(5, 8, dtype=torch.float64), torch.randn(6, 8, dtype=torch.float64)
        >>> halves = [ta.flattened_attention(q, part, part, order=1, return_lse=True) for part in k.split(3)]
        >>> output, lse = ta.merge_attention([(half.output, half.lse) for half in halves])
        >>> torch.allclose(output, ta.flattened_attention(q, k, k, order=1))
        True
    """
    pairs = [(part[0], part[1]) for part in parts]
    if not pairs:
        raise ShapeError("parts is empty, but at least one output with its log-sum-exp is needed.")
    for place, (output, lse) in enumerate(pairs):
        if output.shape != pairs[0][0].shape:
            shapes = tuple(pairs[0][0].shape), tuple(output.shape)
            raise ShapeError(f"outputs have shape {shapes[0]} in parts[0] but {shapes[1]} in parts[{place}].")
        if output.shape[:-1] != lse.shape:
            shapes = tuple(output.shape), tuple(lse.shape)
            raise ShapeError(f"parts[{place}] has output {shapes[0]} but log-sum-exp {shapes[1]}.")
    lses = torch.stack([lse for _, lse in pairs], -1)
    present = lses.amax(-1, keepdim=True) > -math.inf
    safe = torch.where(present, lses, 0.0)
    shares = torch.softmax(safe, -1) * present
    output = functools.reduce(torch.add, (o.to(lses.dtype) * shares[..., p, None] for p, (o, _) in enumerate(pairs)))
    lse = torch.where(present.squeeze(-1), torch.logsumexp(safe, -1), -math.inf)
    return output.to(pairs[0][0].dtype), lse
