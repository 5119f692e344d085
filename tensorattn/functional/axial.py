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
from tensorattn.functional.softmax import Attended, Tokens, TokenSet, attend_tokens
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

    Along the causal mode the queries may be those of the last frames alone. Of a part, whole fibres are exchanged.
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
        key, value, count = whole if causal == mode else own
        told: dict[str, Any] = {
            "batch": batch,
            "bias": None if bias is None else bias[mode],
            "causal": causal == mode,
            **settings,
        }
        if part is not None and mode in part.cuts:
            outputs.append(_of_part(part, mode, query, key, value, count, **told))
            continue
        dim = batch + mode
        count = None if count is None else count.movedim(dim, -1)
        found = _along(query.movedim(dim, -2), key.movedim(dim, -2), value.movedim(dim, -2), count, **told)
        outputs.append(found.output.movedim(-2, dim))
        lse = found.lse
        if found.attention is not None:
            attentions.append(found.attention[0].movedim(-2, dim))
    dtype = accumulation_dtype(query.dtype)
    mean = functools.reduce(torch.add, [output.to(dtype) for output in outputs]) / order
    return AttentionResult(mean.to(query.dtype), lse, tuple(attentions) or None)


def _along(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    count: Tensor | None,
    *,
    batch: int,
    bias: Tensor | None,
    causal: bool,
    **settings: Any,
) -> Attended:
    """Attend along whole fibres, the last but one dimension of queries, keys and values, the last one of counts."""
    size, log_weight, lost = key.shape[-2], None, None
    if count is not None:  # of each position, not of its index: a fibre of absent positions has no token at all
        key, value = (torch.where((count > 0).unsqueeze(-1), tensor, 0.0) for tensor in (key, value))
        log_weight = log_weights(count).to(accumulation_dtype(key.dtype))
    if bias is not None:
        bias = bias.reshape(*bias.shape[:-2], *(1,) * (key.dim() - 2 - batch), *bias.shape[-2:])
    if causal:
        key, value, ahead, lost = _without_the_future(key, value, query.shape[-2])
        bias = ahead if bias is None else bias + ahead
    rows = None if bias is None else torch.arange(bias.shape[-2], device=key.device)
    tokens = Tokens(key, value, log_weight, (TokenSet(size, bias=bias, rows=rows),))
    found = attend_tokens(query, tokens, **settings)
    return found if lost is None else found._replace(output=found.output + lost)


def _of_part(
    part: Part, mode: int, query: Tensor, key: Tensor, value: Tensor, count: Tensor | None, *, batch: int, **told: Any
) -> Tensor:
    """Attend along the fibres of a mode of which processes hold parts: queries, keys and values travel together."""
    widths = [tensor.shape[-1] for tensor in (query, key, value)]

    def attend(joint: Tensor, *counts: Tensor) -> Tensor:
        query, key, value = (each.movedim(batch, -2) for each in joint.split(widths, -1))
        count = counts[0].squeeze(-1).movedim(batch, -1) if counts else None
        return _along(query, key, value, count, batch=batch, **told).output.movedim(-2, batch)

    counts = [] if count is None else [count.unsqueeze(-1)]
    return part.along(attend, [torch.cat([query, key, value], -1), *counts], mode, batch)


def _without_the_future(key: Tensor, value: Tensor, frames: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return keys and values that are finite, a bias that hides later frames, and what is lost, as each frame sees it.

    A later frame may hold what is not finite, which must not even meet a zero: what frames up to each of the last ones
    hold of it is added to the output afterwards.
    """
    size = key.shape[-2]
    first = size - frames
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
