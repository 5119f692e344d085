"""Kronecker-product attention: one attention matrix a mode, applied in turn to the full values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
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
from tensorattn.operators.operator import SYMMETRIES, AttentionResult, Claim, Operator, run
from tensorattn.operators.spreading import At, Base, geometric, place_on, rows_at, scaled_to_one
from tensorattn.presence import GivenWeights, Lengths, Mask
from tensorattn.summarizing import Needs
from tensorattn.summary import Summary

__all__ = ["OPERATOR", "kronecker_product_attention"]


def attend(
    query: Tensor | tuple[Tensor, ...],
    summary: Summary,
    *,
    return_lse: bool,
    return_attention: bool,
    dropout_p: float,
    **settings: Any,
) -> AttentionResult:
    """Apply the attention matrix of each mode in turn; the Kronecker product is never formed."""
    matrices, dropped, lse = mode_matrices(query, summary, dropout_p=dropout_p, return_lse=return_lse, **settings)
    value, weight, batch = summary.value(tuple(range(summary.order))), position_column(summary), len(summary.batch)
    if weight is None:
        output = _product(dropped, value, batch)
    else:
        output = over_present(
            _product(dropped, value * weight.to(value.dtype), batch), _product(matrices, weight, batch)
        )
    return AttentionResult(output, lse, matrices if return_attention else None)


def _product(matrices: tuple[Tensor, ...], tensor: Tensor, batch: int) -> Tensor:
    """Multiply a tensor by one matrix along each mode."""
    for mode, matrix in enumerate(matrices):
        tensor = along_mode(matrix, tensor, mode, batch)
    return tensor


@retells
def kronecker_product_attention(
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
    r"""Attend along every mode at once by the Kronecker product of one attention matrix a mode.

    .. math:: Y = V \times_1 A^1 \times_2 A^2 \cdots \times_N A^N,
        \qquad A^m = \mathrm{softmax}(s\, \bar Q^m \bar K^{m\top})

    with the queries and keys pooled over all modes but m. Values stay at full resolution. Equals flattened attention
    for **any** values where the logits have no cross-mode terms: additive queries and keys whose modes live in
    orthogonal channels. Costs 2SD operations a position for S = n_1 + … + n_N, and at most one more tensor of memory.

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
            One that is no product over modes makes masked averages, and the product of the matrices is made to sum to
            one over the positions present; with ``pool="sum"`` it excludes ``weights``.
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
        >>> ta.kronecker_product_attention(q, k, v, order=2).shape
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
    """A product of softmaxes averages the values with weights that sum to one."""
    indifferent = {Claim.CONSTANT_MODE, Claim.REFINEMENT} if pool == "mean" else set()
    return SYMMETRIES | {Claim.CONVEX, Claim.ZERO_SCALE_MEAN} | indifferent


def spread(attention: Sequence[Tensor], sizes: Sequence[int], at: At | None, base: Base, **_: Any) -> Tensor:
    """A row of the Kronecker product: the outer product of the rows of the modes."""
    rows = rows_at(attention, place_on(sizes, at), sizes)
    product = geometric([((mode,), row, 1) for mode, row in enumerate(rows)], torch.ones_like(base.weights), len(sizes))
    return scaled_to_one(product * base.beside_rows, len(sizes))


OPERATOR = Operator(
    "kronecker_product",
    kronecker_product_attention,
    needs,
    attend,
    claims,
    query="grid",
    takes_means=takes_means,
    counts_indices=counts_indices,
    pools=True,
    options={"pool": "mean"},
    spread=spread,
    lacks={"bias": POOLED, "causal": POOLED, "return_lse": "its logits are sums over pooled queries"},
)
