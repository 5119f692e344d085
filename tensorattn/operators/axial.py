"""Axial attention: every position attends along each of the N fibres through it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tensorattn.errors import retells
from tensorattn.operators.operator import SYMMETRIES, AttentionResult, Claim, Operator, run
from tensorattn.operators.position import Bias
from tensorattn.operators.spreading import At, Base, fibres, place_on, weights_of
from tensorattn.presence import GivenWeights, Lengths, Mask
from tensorattn.softmax import TokenSet, attend_tokens
from tensorattn.summarizing import Needs
from tensorattn.summary import Summary
from tensorattn.weights import accumulation_dtype, log_weights

__all__ = ["OPERATOR", "axial_attention"]


def attend(
    query: Tensor, summary: Summary, *, bias: Bias | None = None, causal: int | None = None, **settings: Any
) -> AttentionResult:
    """Attend along each mode with all other modes as batch, and take the mean over modes.

    Along the causal mode the queries may be those of the last frames alone.
    """
    order, batch = summary.order, len(summary.batch)
    everything = tuple(range(order))
    whole = summary.key(everything), summary.value(everything), summary.weights[0]
    own = whole if causal is None else tuple(map(_last_frames(query, batch + causal), whole))
    outputs, attentions, lse = [], [], None
    for mode, size in enumerate(summary.sizes):
        dim = batch + mode
        key, value, weight = whole if causal == mode else own
        assert key is not None and value is not None
        # The weight of a whole position, not of its index: a fibre of absent positions then has no token at all.
        log_weight = None if weight is None else log_weights(weight).to(key.dtype).movedim(dim, -1)
        fibres = TokenSet(key.movedim(dim, -2), value.movedim(dim, -2), log_weight)
        along = None if bias is None else bias[mode]
        if along is not None:
            along = along.reshape(*along.shape[:-2], *(1,) * (order - 1), size, size)
            fibres = fibres._replace(bias=along, rows=torch.arange(size, device=key.device))
        attend_fibres = _attend_to_the_past if causal == mode else attend_tokens
        output, lse, attention = attend_fibres(query.movedim(dim, -2), [fibres], **settings)
        outputs.append(output.movedim(-2, dim))
        if attention is not None:
            attentions.append(attention[0].movedim(-2, dim))
    dtype = accumulation_dtype(query.dtype)
    mean = functools.reduce(torch.add, (output.to(dtype) for output in outputs)) / order
    return AttentionResult(mean.to(query.dtype), lse, tuple(attentions) or None)


def _last_frames(query: Tensor, dim: int) -> Callable[[Tensor | None], Tensor | None]:
    """Return what takes as many frames from the end of a tensor as the queries have."""
    frames = query.shape[dim]
    return lambda tensor: None if tensor is None else tensor.narrow(dim, tensor.shape[dim] - frames, frames)


def _attend_to_the_past(
    query: Tensor, sets: list[TokenSet], **settings: Any
) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...] | None]:
    """Attend from each frame to those up to its own, which alone are looked at: a later one may hold NaN."""
    (tokens,), frames, size = sets, query.shape[-2], sets[0].key.shape[-2]
    outputs, lses, attentions = [], [], []
    for place, frame in enumerate(range(size - frames, size)):
        past = TokenSet(
            tokens.key[..., : frame + 1, :],
            tokens.value[..., : frame + 1, :],
            None if tokens.log_weight is None else tokens.log_weight[..., : frame + 1],
        )
        if tokens.bias is not None and tokens.rows is not None:
            past = past._replace(bias=tokens.bias[..., frame : frame + 1, : frame + 1], rows=tokens.rows[:1])
        output, lse, attention = attend_tokens(query[..., place : place + 1, :], [past], **settings)
        outputs.append(output)
        if lse is not None:
            lses.append(lse)
        if attention is not None:
            attentions.append(F.pad(attention[0], (0, size - frame - 1)))
    return (
        torch.cat(outputs, -2),
        torch.cat(lses, -1) if lses else None,
        (torch.cat(attentions, -2),) if attentions else None,
    )


@retells
def axial_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    order: int,
    scale: float | None = None,
    weights: GivenWeights = None,
    mask: Mask = None,
    lengths: Lengths = None,
    bias: Sequence[Tensor | None] | None = None,
    causal: int | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    return_attention: bool = False,
) -> Tensor | AttentionResult:
    r"""Attend from each position along each fibre through it, and take the mean over modes.

    .. math:: X_j = \frac{1}{N} \sum_m \sum_a p^m_a(q_j)\, v_{j : j_m = a},
        \qquad p^m_a(q_j) \propto w^m[a]\, e^{s\, q_j \cdot k_{j : j_m = a}}

    It keeps the values at full resolution but sees only positions that differ in one index. Equals flattened attention
    at order 1. Costs 4SD operations a query for S = n_1 + … + n_N.

    Args:
        query: Queries, on the grid of the keys.
        key: Keys over the grid.
        value: Values over the grid; their head size may differ.
        order: Number of modes N.
        scale: Factor of the logits; 1/√D if None.
        weights: One non-negative vector a mode or None for equal weights, or one tensor over the grid: multiplicities,
            so 2 counts an index, or a position, as if it were repeated, and 0 as if it were absent.
        mask: True where a position takes part, ``(*batch, n_1, …, n_N)`` or broadcastable in the batch.
            It speaks of the queries too: where a position takes no part, the output is zero.
            Any mask is exact.
        lengths: How many leading indices of each mode take part, a mask that is a product over modes: integers
            ``(*batch, N)``, or one entry a mode, None for all.
        bias: One tensor ``(P_m, n_m)`` or ``(*batch, P_m, n_m)`` a mode, or None for no bias: added to the logits of a
            query at place :math:`i_m` of mode m for the indices of that mode. Minus infinity hides an index.
        causal: A mode whose frames a query sees up to its own only, whatever the data; the query is then on a grid with
            the frames of the keys.
        dropout_p: Probability of dropping an attention weight, whenever it is not 0.
        return_lse: Whether to return the log-sum-exp too; only order 1 has one.
        return_attention: Whether to return the attention weights too.

    Returns:
        The output in the type of the query; an `AttentionResult` if more is asked for, whose ``attention`` holds one
        tensor ``(*batch, n_1, …, n_N, n_m)`` a mode, each summing to one.

    Raises:
        ShapeError: If batch dimensions, mode sizes or head sizes disagree, a mode is empty, or the mask or lengths do
            not fit the grid.
        DtypeError: If a tensor is not floating point, the types differ, the mask is not bool, or lengths are not
            integers.
        WeightsError: If weights have the wrong length, are negative, not finite, or all zero, or a length is negative
            or longer than its mode.
        OptionError: If an argument is out of its range or has no meaning here.

    Shape:
        - query and key: :math:`(*, n_1, \dots, n_N, D)`
        - value and output: :math:`(*, n_1, \dots, n_N, D_v)`

    Examples:
        >>> import torch, tensorattn as ta
        >>> q, k, v = torch.randn(3, 2, 4, 5, 8).unbind(0)
        >>> ta.axial_attention(q, k, v, order=2).shape
        torch.Size([2, 4, 5, 8])

    References:
        Ho, Kalchbrenner, Weissenborn and Salimans, "Axial Attention in Multidimensional Transformers", 2019,
        arXiv 1912.12180.
    """
    return run(
        OPERATOR,
        query,
        key,
        value,
        order=order,
        scale=scale,
        weights=weights,
        mask=mask,
        lengths=lengths,
        bias=bias,
        causal=causal,
        dropout_p=dropout_p,
        return_lse=return_lse,
        return_attention=return_attention,
    )


def needs(order: int) -> Needs:
    """Keys and values themselves: the means that keep all modes."""
    return Needs((tuple(range(order)),))


def claims() -> frozenset[Claim]:
    """The symmetries of a softmax along each fibre; no exactness, as most positions are never seen."""
    return SYMMETRIES | {Claim.REFINEMENT, Claim.CONVEX}


def spread(attention: Sequence[Tensor], sizes: Sequence[int], at: At | None, base: Base) -> Tensor:
    """The weights along each fibre through the query, each mode counting equally."""
    place = place_on(sizes, at)
    return fibres([weights_of(part, place, (size,)) for part, size in zip(attention, sizes, strict=True)], place)


OPERATOR = Operator(
    "axial",
    axial_attention,
    needs,
    attend,
    claims,
    query="grid",
    spread=spread,
    lacks={"return_lse": "a mean of several softmaxes is not a softmax"},
)
