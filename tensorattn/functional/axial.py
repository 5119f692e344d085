"""Axial attention: every position attends along each of the N fibres through it."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from tensorattn.functional.maps import At, Base, fibres, place_on, weights_of
from tensorattn.functional.operator import (
    SYMMETRIES,
    AttentionResult,
    Bias,
    Claim,
    Operator,
    Shared,
    attention_function,
    run,
)
from tensorattn.functional.softmax import Tokens, TokenSet, attend_tokens
from tensorattn.functional.summary import Needs, Summary
from tensorattn.masks import Part, accumulation_dtype, log_weights

__all__ = ["AXIAL", "axial_attention"]


@attention_function
def axial_attention(query: Tensor, key: Tensor, value: Tensor, *, order: int, **shared: Unpack[Shared]) -> Any:
    r"""Attend from each position along each fibre through it, and take the mean over modes.

    .. math:: X_j = \frac{1}{N} \sum_m \sum_a p^m_a(q_j)\, v_{j : j_m = a},
        \qquad p^m_a(q_j) \propto w^m[a]\, e^{s\, q_j \cdot k_{j : j_m = a}}

    It keeps the values at full resolution but sees only positions that differ in one index. Equals flattened attention
    at order 1. Costs 4SD operations a query for S = n_1 + … + n_N.

    Args:
        query: Queries.
        key: Keys.
        value: Values.
        order: Number of modes N.
        **shared: What all operators share, as told below.

    Any mask is exact. ``return_lse`` has no meaning but at order 1.

    Returns:
        The output in the type of the query; an `AttentionResult` if more is asked for, whose ``attention`` holds one
        tensor ``(*batch, n_1, …, n_N, n_m)`` a mode, each summing to one.

    Examples:
        >>> import torch, tensorattn as ta
        >>> q, k, v = torch.randn(3, 2, 4, 5, 8).unbind(0)
        >>> ta.axial_attention(q, k, v, order=2).shape
        torch.Size([2, 4, 5, 8])

    References:
        Ho, Kalchbrenner, Weissenborn and Salimans, "Axial Attention in Multidimensional Transformers", 2019,
        arXiv 1912.12180.
    """
    return run(AXIAL, query, key, value, order=order, options={}, **shared)


def _attend(
    query: Tensor,
    summary: Summary,
    *,
    bias: Bias | None = None,
    causal: int | None = None,
    part: Part | None = None,
    **settings: Any,
) -> AttentionResult:
    """Attend along each mode with all other modes as batch, and take the mean over modes.

    Along the causal mode the queries may be those of the last frames alone. Of a part, fibres are gathered.
    """
    order, batch, everything = summary.order, len(summary.batch), tuple(range(summary.order))
    whole = summary.key(everything), summary.value(everything), summary.count(everything)
    own = whole
    if causal is not None:
        dim, frames = batch + causal, query.shape[batch + causal]
        key, value, count = whole
        key, value = (t.narrow(dim, t.shape[dim] - frames, frames) for t in (key, value))
        own = key, value, None if count is None else count.narrow(dim, count.shape[dim] - frames, frames)
    outputs, attentions, lse = [], [], None
    for mode in range(order):
        dim = batch + mode
        key, value, count = whole if causal == mode else own
        if part is not None:
            key, value = part.every(key, mode, dim), part.every(value, mode, dim)
            count = None if count is None else part.every(count, mode, dim)
        key, value, size = key.movedim(dim, -2), value.movedim(dim, -2), key.shape[dim]
        log_weight = None
        if count is not None:  # of each position, not of its index: a fibre of absent positions has no token at all
            count = count.movedim(dim, -1)
            key, value = (torch.where((count > 0).unsqueeze(-1), tensor, 0.0) for tensor in (key, value))
            log_weight = log_weights(count).to(accumulation_dtype(key.dtype))
        added = None if bias is None else bias[mode]
        if added is not None:
            added = added.reshape(*added.shape[:-2], *(1,) * (order - 1), *added.shape[-2:])
        lost = None
        if causal == mode:
            frames = query.shape[dim]
            first = size - frames if part is None else part.start[mode]
            key, value, ahead, lost = _without_the_future(key, value, frames, first)
            added = ahead if added is None else added + ahead
        rows = None if added is None else torch.arange(added.shape[-2], device=key.device)
        tokens = Tokens(key, value, log_weight, (TokenSet(size, bias=added, rows=rows),))
        found = attend_tokens(query.movedim(dim, -2), tokens, **settings)
        output, lse = found.output if lost is None else found.output + lost, found.lse
        outputs.append(output.movedim(-2, dim))
        if found.attention is not None:
            attentions.append(found.attention[0].movedim(-2, dim))
    dtype = accumulation_dtype(query.dtype)
    mean = functools.reduce(torch.add, [output.to(dtype) for output in outputs]) / order
    return AttentionResult(mean.to(query.dtype), lse, tuple(attentions) or None)


def _without_the_future(key: Tensor, value: Tensor, frames: int, first: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return keys and values that are finite, a bias that hides later frames, and what is lost, as each frame sees it.

    A later frame may hold what is not finite, which must not even meet a zero: what frames up to each of those from
    the first on hold of it is added to the output afterwards.
    """
    size = key.shape[-2]
    ahead = torch.full((frames, size), -math.inf, device=key.device, dtype=accumulation_dtype(key.dtype))
    ahead = ahead.triu(first + 1)
    finite = key.isfinite().all(-1, keepdim=True)
    lost = torch.where(value.isfinite(), 0.0, value) + torch.where(finite, 0.0, math.nan).to(value.dtype)
    lost = lost.detach().cumsum(-2)[..., first : first + frames, :]
    return torch.where(finite, key, 0.0), torch.where(value.isfinite(), value, 0.0), ahead, lost


def _spread(attention: Sequence[Tensor], sizes: Sequence[int], at: At | None, base: Base) -> Tensor:
    """The weights along each fibre through the query, each mode counting equally."""
    place = place_on(sizes, at)
    return fibres([weights_of(part, place, (size,)) for part, size in zip(attention, sizes, strict=True)], place)


AXIAL = Operator(
    "axial",
    axial_attention,
    lambda order: Needs((tuple(range(order)),)),
    _attend,
    lambda: SYMMETRIES | {Claim.REFINEMENT, Claim.CONVEX},
    query="grid",
    spread=_spread,
    lacks={"return_lse": "a mean of several softmaxes is not a softmax"},
    gathers=True,
)
