"""Additive attention: one softmax a mode over its averages, less N−1 times the mean value. The default."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tensorattn.errors import retells
from tensorattn.operators.operator import AttentionResult, Claim, Needs, Operator, attend_positions, run
from tensorattn.planning import main_effects
from tensorattn.softmax import TokenSet
from tensorattn.summary import Summary
from tensorattn.weights import Vector

__all__ = ["OPERATOR", "additive_attention", "token_sets"]


def token_sets(summary: Summary) -> list[TokenSet]:
    """Return the averages of each mode as a set of tokens, and the grand mean counted 1−N times."""
    sets = [summary.tokens(kept) for kept in main_effects(summary.order)]
    return sets if summary.order == 1 else [*sets, summary.tokens((), 1 - summary.order)]


def attend(query: Tensor, summary: Summary, **settings: Any) -> AttentionResult:
    """Attend to each mode's averages by a softmax of its own."""
    output, lse, attention = attend_positions(query, summary, token_sets(summary), **settings)
    return AttentionResult(output, lse, None if attention is None else attention[: summary.order])


@retells
def additive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    order: int,
    scale: float | None = None,
    weights: Sequence[Vector] | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    return_attention: bool = False,
) -> Tensor | AttentionResult:
    r"""Attend from each query to the averages of each mode, one softmax a mode.

    .. math:: A(q) = \sum_m \sum_a p^m_a(q)\, \bar v^m[a] - (N - 1)\, \bar v,
        \qquad p^m_a(q) \propto w^m[a]\, e^{s\, q \cdot \bar k^m[a]}

    Equals flattened attention, its log-sum-exp included, for **every** query where keys and values are additive over
    the modes, that is a sum of one term a mode: the logits are then additive, so the softmax over the grid is the
    product of the softmaxes over its modes, and the mean of an additive value under a product is the sum of the means
    under its factors. On other data it is blind to the interactions of keys and values. Costs 4SD operations a query
    for S = n_1 + … + n_N averages.

    Args:
        query: Queries: the grid of the keys, another grid, or a list of tokens.
        key: Keys over the grid.
        value: Values over the grid; their head size may differ.
        order: Number of modes N.
        scale: Factor of the logits; 1/√D if None.
        weights: One non-negative vector a mode, or None for equal weights: multiplicities, so 2 counts an index as
            if it were repeated, and 0 as if it were absent.
        dropout_p: Probability of dropping an attention weight, whenever it is not 0.
        return_lse: Whether to return the log-sum-exp too: that of all logits, where keys are additive.
        return_attention: Whether to return the attention weights too.

    Returns:
        The output in the type of the query; an `AttentionResult` if more is asked for, whose ``attention`` holds one
        tensor ``(*batch, *positions, n_m)`` a mode, each summing to one.

    Raises:
        ShapeError: If batch dimensions, mode sizes or head sizes disagree, or a mode is empty.
        DtypeError: If a tensor is not floating point, or the types differ.
        WeightsError: If weights have the wrong length, are negative, not finite, or all zero.
        OptionError: If an option is out of its range.

    Shape:
        - query: :math:`(*, P_1, \dots, P_M, D)` with any number M of position dimensions
        - key: :math:`(*, n_1, \dots, n_N, D)`, value: :math:`(*, n_1, \dots, n_N, D_v)`
        - output: :math:`(*, P_1, \dots, P_M, D_v)`

    Examples:
        >>> import torch, tensorattn as ta
        >>> rows, columns = torch.randn(4, 1, 8, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
        >>> x, q = rows + columns, torch.randn(7, 8, dtype=torch.float64)
        >>> torch.allclose(ta.additive_attention(q, x, x, order=2), ta.flattened_attention(q, x, x, order=2))
        True

    References:
        Gao, Wang and Ji, "Kronecker Attention Networks", KDD 2020, arXiv 2007.08442.
        It has one softmax for all modes; `kao_kv` computes that form.
    """
    return run(
        OPERATOR,
        query,
        key,
        value,
        order=order,
        scale=scale,
        weights=weights,
        dropout_p=dropout_p,
        return_lse=return_lse,
        return_attention=return_attention,
    )


def needs(order: int) -> Needs:
    """The mode averages and the grand mean."""
    return Needs((*main_effects(order), ()))


def claims() -> frozenset[Claim]:
    """All but exactness on any data and convexity: a sum of softmaxes can leave the range of the values."""
    return frozenset(Claim) - {Claim.EXACT, Claim.CONVEX}


OPERATOR = Operator("additive", additive_attention, needs, attend, claims)
