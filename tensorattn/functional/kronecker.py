"""Kronecker attention of values at full resolution: one attention matrix a mode, from pooled queries and keys.

The matrices are applied in turn (their Kronecker product, which is never formed), or each by itself and added up (their
Kronecker sum).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from tensorattn.errors import OptionError
from tensorattn.functional.maps import At, Base, fibre_of, fibres, geometric, place_on, rows_at, scaled_to_one
from tensorattn.functional.operator import (
    SYMMETRIES,
    AttentionResult,
    Claim,
    Operator,
    Shared,
    attention_function,
    run,
)
from tensorattn.functional.summary import Means, Needs, Summary
from tensorattn.masks import Part, accumulation_dtype, log_weights, matmul, nonzero, relative
from tensorattn.modes import main_effects, positions_behind

__all__ = ["KRONECKER_PRODUCT", "KRONECKER_SUM", "kronecker_product_attention", "kronecker_sum_attention"]

POOLED = "its queries are pooled over positions"

Norm = Callable[[Tensor, int], Tensor] | None  # of pooled queries or keys of a mode


@attention_function
def kronecker_product_attention(
    query: Tensor, key: Tensor, value: Tensor, *, order: int, pool: str = "mean", **shared: Unpack[Shared]
) -> Any:
    r"""Attend along every mode at once by the Kronecker product of one attention matrix a mode.

    .. math:: Y = V \times_1 A^1 \times_2 A^2 \cdots \times_N A^N,
        \qquad A^m = \mathrm{softmax}(s\, \bar Q^m \bar K^{m\top})

    with the queries and keys pooled over all modes but m. Values stay at full resolution. Equals flattened attention
    for **any** values where the logits have no cross-mode terms: additive queries and keys whose modes live in
    orthogonal channels. Costs 2SD operations a position for S = n_1 + … + n_N, and at most one more tensor of memory.

    Args:
        query: Queries.
        key: Keys.
        value: Values.
        order: Number of modes N.
        pool: Whether queries and keys are pooled over the other modes by their ``"mean"`` or by their ``"sum"``.
        **shared: What all operators share, as told below.

    Weights weigh the pooled queries too. A mask that is no product over modes makes masked averages, and the product of
    the matrices is made to sum to one over the positions present; with ``pool="sum"`` it excludes ``weights``. ``bias``
    and ``causal`` have no meaning here and raise, and so does ``return_lse`` but at order 1.

    Returns:
        The output in the type of the query; an `AttentionResult` if more is asked for, whose ``attention`` holds one
        matrix ``(*batch, n_m, n_m)`` a mode.

    Examples:
        >>> import torch, tensorattn as ta
        >>> q, k, v = torch.randn(3, 2, 4, 5, 8).unbind(0)
        >>> ta.kronecker_product_attention(q, k, v, order=2).shape
        torch.Size([2, 4, 5, 8])

    References:
        Omranpour, Rabusseau and Rabbany, "Higher-Order Transformers", 2024, arXiv 2412.02919.
    """
    return run(KRONECKER_PRODUCT, query, key, value, order=order, options={"pool": pool}, **shared)


@attention_function
def kronecker_sum_attention(
    query: Tensor, key: Tensor, value: Tensor, *, order: int, pool: str = "mean", **shared: Unpack[Shared]
) -> Any:
    r"""Attend along each mode by an attention matrix of its own, and add up the modes.

    .. math:: Y = \sum_m V \times_m A^m, \qquad A^m = \mathrm{softmax}(s\, \bar Q^m \bar K^{m\top})

    with the queries and keys pooled over all modes but m: the Kronecker sum of the matrices, applied to the values. Its
    weights sum to N, as published. Costs 2SD operations a position for S = n_1 + … + n_N.

    Args:
        query: Queries.
        key: Keys.
        value: Values.
        order: Number of modes N.
        pool: Whether queries and keys are pooled over the other modes by their ``"mean"`` or by their ``"sum"``.
        **shared: What all operators share, as told below.

    Weights weigh the pooled queries too. A mask that is no product over modes makes masked averages, and the attention
    along each fibre is made to sum to one over the positions present; with ``pool="sum"`` it excludes ``weights``.
    ``bias`` and ``causal`` have no meaning here and raise, and so does ``return_lse`` but at order 1.

    Returns:
        The output in the type of the query; an `AttentionResult` if more is asked for, whose ``attention`` holds one
        matrix ``(*batch, n_m, n_m)`` a mode.

    Examples:
        >>> import torch, tensorattn as ta
        >>> q, k, v = torch.randn(3, 2, 4, 5, 8).unbind(0)
        >>> ta.kronecker_sum_attention(q, k, v, order=2).shape
        torch.Size([2, 4, 5, 8])

    References:
        Omranpour, Rabusseau and Rabbany, "Higher-Order Transformers", 2024, arXiv 2412.02919.
    """
    return run(KRONECKER_SUM, query, key, value, order=order, options={"pool": pool}, **shared)


def _needs(order: int, *, pool: str) -> Needs:
    """Mean queries and keys a mode, and the values themselves."""
    if pool not in ("mean", "sum"):
        raise OptionError(f"pool must be 'mean' or 'sum', got {pool!r}.")
    everything, effects = tuple(range(order)), main_effects(order)
    kept = tuple(dict.fromkeys((*effects, everything)))
    return Needs(kept, keys=effects, values=(everything,), queries=effects, indices=pool == "sum")


Own = tuple[Part, Tensor, Tensor | None]  # where positions stand in the whole, their values, and weights of their own


def _attend(
    queries: Means,
    summary: Summary,
    *,
    apart: bool,
    return_lse: bool,
    return_attention: bool,
    dropout_p: float,
    own: Own | None = None,
    **settings: Any,
) -> AttentionResult:
    """Apply the attention matrix of each mode to the values: in turn, or apart, and add up."""
    matrices, dropped, lse = _matrices(queries, summary, dropout_p=dropout_p, return_lse=return_lse, **settings)
    part, value, column = (None, _values(summary), _position_column(summary)) if own is None else own
    batch, modes = len(summary.batch), range(summary.order)
    terms = []
    for turn in [(mode,) for mode in modes] if apart else [tuple(modes)]:
        if column is None:
            terms.append(_in_turn(dropped, value, turn, batch, part))
        else:
            weighed = _in_turn(dropped, value * column, turn, batch, part)
            share = _in_turn(matrices, column, turn, batch, part)
            terms.append(_over_present(weighed, share).to(value.dtype))
    return AttentionResult(functools.reduce(torch.add, terms), lse, matrices if return_attention else None)


def _matrices(
    queries: Means,
    summary: Summary,
    *,
    scale: float,
    pool: str,
    dropout_p: float,
    return_lse: bool,
    query_norm: Norm = None,
    key_norm: Norm = None,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor | None]:
    """Return the attention matrix of each mode, ``(*batch, n_m, n_m)``; the same with dropout; and a log-sum-exp.

    Where the weights of positions are no product over modes, an index only has to have a position present: weights then
    meet the values, position by position. Rows of absent batch entries are zero.
    """
    matrices, lse = [], None
    for mode in range(summary.order):
        query, key = queries.get((mode,)), summary.key((mode,))
        dtype = accumulation_dtype(query.dtype)
        if pool == "sum":
            others = _others(summary, mode)
            query, key = query.to(dtype) * others, key.to(dtype) * others
        count = summary.count((mode,))
        if count is not None:  # an absent index may hold so much that its logits overflow
            key = torch.where((count > 0).unsqueeze(-1), key, 0.0)
        query = (query if query_norm is None else query_norm(query, mode)).to(dtype)
        key = (key if key_norm is None else key_norm(key, mode)).to(dtype)
        logits, present = matmul(query * scale, key.mT), None
        if count is not None:
            weight = (
                log_weights((count > 0).to(dtype)) if summary.mode_weights is None else summary.mode_log_weight(mode)
            )
            logits = logits + weight.unsqueeze(-2).to(dtype)
            present = weight.amax(-1, keepdim=True).unsqueeze(-1) > -math.inf
            logits = torch.where(present, logits, 0.0)
        matrix = torch.softmax(logits, -1)
        matrices.append(matrix if present is None else matrix * present)
        if return_lse:
            lse = torch.logsumexp(logits, -1)
            lse = lse if present is None else torch.where(present.squeeze(-1), lse, -math.inf)
    dropped = tuple([F.dropout(matrix, dropout_p) if dropout_p > 0 else matrix for matrix in matrices])
    return tuple(matrices), dropped, lse


def _others(summary: Summary, mode: int) -> Tensor | int:
    """Count the positions that share an index of a mode, by weight: ``(*batch, 1 or n_mode, 1)``, or a number."""
    count = summary.count((mode,))
    if count is None:
        return positions_behind(summary.sizes, (mode,))
    if summary.mode_weights is None:
        return count.unsqueeze(-1).to(accumulation_dtype(summary.key((mode,)).dtype))
    totals = [
        size if weight is None else weight.sum(-1)[..., None, None]
        for k, (weight, size) in enumerate(zip(summary.mode_weights, summary.sizes, strict=True))
        if k != mode
    ]
    return math.prod(totals)


def _values(summary: Summary) -> Tensor:
    """Return the values of all positions; zero where none is."""
    everything = tuple(range(summary.order))
    value, count = summary.value(everything), summary.count(everything)
    return value if count is None else torch.where((count > 0).unsqueeze(-1), value, 0.0)


def _position_column(summary: Summary) -> Tensor | None:
    """Return relative weights of positions, ``(*batch, n_1, …, n_N, 1)``, where they are no product over modes."""
    if summary.counts is None or summary.mode_weights is not None:
        return None
    column = relative(summary.counts.get(tuple(range(summary.order))), summary.order + 1)
    return column.expand(*summary.batch, *summary.sizes, 1).to(
        accumulation_dtype(summary.value_means.blocks[0][1].dtype)
    )


def _over_present(weighed: Tensor, share: Tensor) -> Tensor:
    """Divide sums over the positions present by the attention that they got; zero where there is none.

    Attention to a grid with gaps is attention to the whole grid, times the weights, made to sum to one again: full
    attention under a mask is nothing else.
    """
    return weighed / nonzero(share)


def _in_turn(matrices: Sequence[Tensor], tensor: Tensor, turn: Sequence[int], batch: int, part: Part | None) -> Tensor:
    """Multiply a tensor by the matrices of some modes, one along each."""
    for mode in turn:
        tensor = _along_mode(matrices[mode], tensor, mode, batch, part)
    return tensor


def _along_mode(matrix: Tensor, tensor: Tensor, mode: int, batch: int, part: Part | None) -> Tensor:
    """Multiply a tensor ``(*batch, n_1, …, n_N, D)`` by a matrix ``(*batch, n, n_mode)``: the mode-k product.

    Of a part, whole fibres are exchanged.
    """

    def product(fibres: Tensor) -> Tensor:
        return matmul(matrix.to(tensor.dtype), fibres.flatten(batch + 1)).unflatten(-1, fibres.shape[batch + 1 :])

    if part is not None and mode in part.cuts:
        return part.along(product, [tensor], mode, batch)
    return product(tensor.movedim(batch + mode, batch)).movedim(batch, batch + mode)


def _claims_of_product(*, pool: str) -> frozenset[Claim]:
    """A product of softmaxes averages the values with weights that sum to one."""
    indifferent = {Claim.CONSTANT_MODE, Claim.REFINEMENT} if pool == "mean" else set()
    return SYMMETRIES | {Claim.CONVEX, Claim.ZERO_SCALE_MEAN} | indifferent


def _claims_of_sum(*, pool: str) -> frozenset[Claim]:
    """The symmetries of a softmax, but for the values, which are counted N times."""
    return frozenset({Claim.KEY_SHIFT, Claim.ROTATION} | ({Claim.REFINEMENT} if pool == "mean" else set()))


def _spread_product(attention: Sequence[Tensor], sizes: Sequence[int], at: At | None, base: Base, **_: Any) -> Tensor:
    """A row of the Kronecker product: the outer product of the rows of the modes."""
    rows = rows_at(attention, place_on(sizes, at), sizes)
    product = geometric([((mode,), row, 1) for mode, row in enumerate(rows)], torch.ones_like(base.weights), len(sizes))
    return scaled_to_one(product * base.beside_rows, len(sizes))


def _spread_sum(attention: Sequence[Tensor], sizes: Sequence[int], at: At | None, base: Base, **_: Any) -> Tensor:
    """The row of each mode on the fibre through the query, divided by the N times that values are counted."""
    place = place_on(sizes, at)
    along = [base.beside_rows[fibre_of(place, mode)] for mode in range(len(sizes))]
    rows = [row * counts for row, counts in zip(rows_at(attention, place, sizes), along, strict=True)]
    return fibres(rows if base.by_mode else [scaled_to_one(row, 1) for row in rows], place)


KRONECKER_PRODUCT = Operator(
    "kronecker_product",
    kronecker_product_attention,
    _needs,
    functools.partial(_attend, apart=False),
    _claims_of_product,
    query="grid",
    pools=True,
    options={"pool": "mean"},
    spread=_spread_product,
    gathers=True,
    lacks={"bias": POOLED, "causal": POOLED, "return_lse": "its logits are sums over pooled queries"},
)

KRONECKER_SUM = Operator(
    "kronecker_sum",
    kronecker_sum_attention,
    _needs,
    functools.partial(_attend, apart=True),
    _claims_of_sum,
    query="grid",
    pools=True,
    options={"pool": "mean"},
    spread=_spread_sum,
    gathers=True,
    lacks={"bias": POOLED, "causal": POOLED, "return_lse": "a sum of several softmaxes is not a softmax"},
)
