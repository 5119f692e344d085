"""Kronecker-sum attention: one attention matrix a mode, each applied to the full values, and added up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tensorattn.errors import retells
from tensorattn.operators.mode_matrices import POOLED, along_mode, matrices_needs, mode_matrices, takes_means
from tensorattn.operators.operator import AttentionResult, Claim, Operator, run
from tensorattn.operators.spreading import At, fibres, place_on, rows_at
from tensorattn.summarizing import Needs
from tensorattn.summary import Summary
from tensorattn.weights import Vector

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
    if weight is not None:
        value = value * (weight > 0).unsqueeze(-1)  # a fibre of absent positions adds nothing
    output = along_mode(dropped[0], value, 0, batch)
    for mode in range(1, summary.order):
        output = output.add_(along_mode(dropped[mode], value, mode, batch))
    return AttentionResult(output, lse, matrices if return_attention else None)


@retells
def kronecker_sum_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    order: int,
    scale: float | None = None,
    weights: Sequence[Vector] | None = None,
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
        weights: One non-negative vector a mode, or None for equal weights: multiplicities, so 2 counts an index as if
            it were repeated, and 0 as if it were absent.
            They weigh the pooled queries too.
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
        ShapeError: If batch dimensions, mode sizes or head sizes disagree, or a mode is empty.
        DtypeError: If a tensor is not floating point, or the types differ.
        WeightsError: If weights have the wrong length, are negative, not finite, or all zero.
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


def spread(attention: Sequence[Tensor], sizes: Sequence[int], at: At | None, base: Tensor, **_: Any) -> Tensor:
    """The row of each mode on the fibre through the query, divided by the N times that values are counted."""
    place = place_on(sizes, at)
    return fibres(rows_at(attention, place, sizes), place)


OPERATOR = Operator(
    "kronecker_sum",
    kronecker_sum_attention,
    needs,
    attend,
    claims,
    query="grid",
    takes_means=takes_means,
    pools=True,
    options={"pool": "mean"},
    spread=spread,
    lacks={"bias": POOLED, "causal": POOLED, "return_lse": "a sum of several softmaxes is not a softmax"},
)
