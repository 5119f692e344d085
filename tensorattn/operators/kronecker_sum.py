"""Kronecker-sum attention: one attention matrix a mode, each applied to the full values, and added up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tensorattn.errors import retells
from tensorattn.operators.mode_matrices import (
    POOLED,
    along_mode,
    counts_indices,
    matrices_needs,
    mode_matrices,
    over_present,
    position_column,
    takes_means,
)
from tensorattn.operators.operator import AttentionResult, Claim, Operator, run
from tensorattn.operators.spreading import At, Base, fibre_of, fibres, place_on, rows_at, scaled_to_one
from tensorattn.presence import GivenWeights, Lengths, Mask
from tensorattn.summarizing import Needs
from tensorattn.summary import Summary

__all__ = ["OPERATOR", "kronecker_sum_attention"]


def attend(
    query: Tensor | tuple[Tensor, ...],
    summary: Summary,
    *,
    return_lse: bool,
    return_attention: bool,
    dropout_p: float,
    **settings: Any,
) -> AttentionResult:
    """Apply the attention matrix of each mode to the values and add up."""
    matrices, dropped, lse = mode_matrices(query, summary, dropout_p=dropout_p, return_lse=return_lse, **settings)
    everything = tuple(range(summary.order))
    value, weight, batch = summary.value(everything), summary.weights[summary.place(everything)], len(summary.batch)
    column = position_column(summary)
    if column is not None:
        value = value * column.to(value.dtype)
    elif weight is not None:
        value = value * (weight > 0).unsqueeze(-1)  # a fibre of absent positions adds nothing
    output: Tensor | None = None
    for mode in range(summary.order):
        part = along_mode(dropped[mode], value, mode, batch)
        if column is not None:
            part = over_present(part, along_mode(matrices[mode], column, mode, batch))
        output = part if output is None else output.add_(part)
    return AttentionResult(output, lse, matrices if return_attention else None)


@retells
def kronecker_sum_attention(
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
    pool: str = "mean",
    dropout_p: float = 0.0,
    return_lse: bool = False,
    return_attention: bool = False,
) -> Tensor | AttentionResult:
    r"""Attend along each mode by an attention matrix of its own, and add up the modes.

    .. math:: Y = \sum_m V \times_m A^m, \qquad A^m = \mathrm{softmax}(s\, \bar Q^m \bar K^{m\top})

    with the queries and keys pooled over all modes but m: the Kronecker sum of the matrices, applied to the values. Its
    weights sum to N, as published. Costs 2SD operations a position for S = n_1 + … + n_N.

    Args:
        query: Queries, on the grid of the keys.
        key: Keys over the grid.
        value: Values over the grid; their head size may differ.
        order: Number of modes N.
        scale: Factor of the logits; 1/√D if None.
        weights: One non-negative vector a mode or None for equal weights, or one tensor over the grid: multiplicities,
            so 2 counts an index, or a position, as if it were repeated, and 0 as if it were absent.
            They weigh the pooled queries too.
        mask: True where a position takes part, ``(*batch, n_1, …, n_N)`` or broadcastable in the batch.
            It speaks of the queries too: where a position takes no part, the output is zero.
            One that is no product over modes makes masked averages, and the attention along each fibre is made to sum
            to one over the positions present; with ``pool="sum"`` it excludes ``weights``.
        lengths: How many leading indices of each mode take part, a mask that is a product over modes: integers
            ``(*batch, N)``, or one entry a mode, None for all.
        bias: Has no meaning here and raises.
        causal: Has no meaning here and raises.
        pool: Whether queries and keys are pooled over the other modes by their ``"mean"`` or by their ``"sum"``.
        dropout_p: Probability of dropping an attention weight, whenever it is not 0.
        return_lse: Whether to return the log-sum-exp too; only order 1 has one.
        return_attention: Whether to return the attention weights too.

    Returns:
        The output in the type of the query; an `AttentionResult` if more is asked for, whose ``attention`` holds one
        matrix ``(*batch, n_m, n_m)`` a mode.

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
        >>> ta.kronecker_sum_attention(q, k, v, order=2).shape
        torch.Size([2, 4, 5, 8])

    References:
        Omranpour, Rabusseau and Rabbany, "Higher-Order Transformers", 2024, arXiv 2412.02919.
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
        pool=pool,
    )


def needs(order: int, *, pool: str) -> Needs:
    """Mean keys a mode, and the values themselves."""
    return matrices_needs(order, pool)


def claims(*, pool: str) -> frozenset[Claim]:
    """The symmetries of a softmax, but for the values, which are counted N times."""
    return frozenset({Claim.KEY_SHIFT, Claim.ROTATION} | ({Claim.REFINEMENT} if pool == "mean" else set()))


def spread(attention: Sequence[Tensor], sizes: Sequence[int], at: At | None, base: Base, **_: Any) -> Tensor:
    """The row of each mode on the fibre through the query, divided by the N times that values are counted."""
    place = place_on(sizes, at)
    along = [base.beside_rows[fibre_of(place, mode)] for mode in range(len(sizes))]
    rows = [row * counts for row, counts in zip(rows_at(attention, place, sizes), along, strict=True)]
    return fibres(rows if base.by_mode else [scaled_to_one(row, 1) for row in rows], place)


OPERATOR = Operator(
    "kronecker_sum",
    kronecker_sum_attention,
    needs,
    attend,
    claims,
    query="grid",
    takes_means=takes_means,
    counts_indices=counts_indices,
    pools=True,
    options={"pool": "mean"},
    spread=spread,
    lacks={"bias": POOLED, "causal": POOLED, "return_lse": "a sum of several softmaxes is not a softmax"},
)
