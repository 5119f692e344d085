"""Flattened attention: every query attends to every position. The truth that the other operators are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tensorattn.errors import retells
from tensorattn.operators.operator import AttentionResult, Claim, Operator, attend_positions, run
from tensorattn.operators.position import Bias, biased
from tensorattn.operators.spreading import At, Base, weights_of
from tensorattn.presence import GivenWeights, Lengths, Mask
from tensorattn.summarizing import Needs
from tensorattn.summary import Summary

__all__ = ["OPERATOR", "flattened_attention"]


def attend(query: Tensor, summary: Summary, *, bias: Bias | None = None, **settings: Any) -> AttentionResult:
    """Attend to all positions as one set of tokens."""
    everything = tuple(range(summary.order))
    positions = query.shape[len(summary.batch) : -1]
    tokens = biased(summary.tokens(everything), everything, bias, positions, summary.sizes)
    output, lse, attention = attend_positions(query, summary, [tokens], **settings)
    if attention is not None:
        attention = (attention[0].unflatten(-1, summary.sizes),)
    return AttentionResult(output, lse, attention)


@retells
def flattened_attention(
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
    r"""Attend from each query to every position of the grid: full softmax attention.

    .. math:: F(q) = \sum_j \frac{w_j e^{s\, q \cdot k_j}}{\sum_i w_i e^{s\, q \cdot k_i}}\, v_j,
        \qquad w_j = \prod_m w^m[j_m]

    Costs 4PD operations a query for P positions.

    Args:
        query: Queries: the grid of the keys, another grid, or a list of tokens.
        key: Keys over the grid.
        value: Values over the grid; their head size may differ.
        order: Number of modes N.
        scale: Factor of the logits; 1/√D if None.
        weights: One non-negative vector a mode or None for equal weights, or one tensor over the grid: multiplicities,
            so 2 counts an index, or a position, as if it were repeated, and 0 as if it were absent.
        mask: True where a position takes part, ``(*batch, n_1, …, n_N)`` or broadcastable in the batch.
            Any mask is exact.
        lengths: How many leading indices of each mode take part, a mask that is a product over modes: integers
            ``(*batch, N)``, or one entry a mode, None for all.
        bias: One tensor ``(P_m, n_m)`` or ``(*batch, P_m, n_m)`` a mode, or None for no bias: added to the logits of a
            query at place :math:`i_m` of mode m for the indices of that mode. Minus infinity hides an index.
            The biases of the modes add up.
        causal: A mode whose frames a query sees up to its own only, whatever the data; the query is then on a grid with
            the frames of the keys.
        dropout_p: Probability of dropping an attention weight, whenever it is not 0.
        return_lse: Whether to return the log-sum-exp too.
        return_attention: Whether to return the attention weights too.

    Returns:
        The output in the type of the query; an `AttentionResult` if more is asked for, whose ``attention`` holds one
        tensor ``(*batch, *positions, n_1, …, n_N)``.

    Raises:
        ShapeError: If batch dimensions, mode sizes or head sizes disagree, a mode is empty, or the mask or lengths do
            not fit the grid.
        DtypeError: If a tensor is not floating point, the types differ, the mask is not bool, or lengths are not
            integers.
        WeightsError: If weights have the wrong length, are negative, not finite, or all zero, or a length is negative
            or longer than its mode.
        OptionError: If an argument is out of its range or has no meaning here.

    Shape:
        - query: :math:`(*, P_1, \dots, P_M, D)` with any number M of position dimensions
        - key: :math:`(*, n_1, \dots, n_N, D)`, value: :math:`(*, n_1, \dots, n_N, D_v)`
        - output: :math:`(*, P_1, \dots, P_M, D_v)`

    Examples:
        >>> import torch, tensorattn as ta
        >>> q, k, v = torch.randn(3, 2, 4, 5, 8).unbind(0)
        >>> ta.flattened_attention(q, k, v, order=2).shape
        torch.Size([2, 4, 5, 8])

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
    """All but blindness to interactions."""
    return frozenset(Claim) - {Claim.INVISIBLE_INTERACTION}


def spread(attention: Sequence[Tensor], sizes: Sequence[int], at: At | None, base: Base) -> Tensor:
    """The weights themselves."""
    return weights_of(attention[0], at, sizes)


OPERATOR = Operator("flattened", flattened_attention, needs, attend, claims, spread=spread)
