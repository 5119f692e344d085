"""Kronecker attention with averaged keys and values: every query attends to all mode averages in one softmax."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tensorattn.contraction_tree import main_effects
from tensorattn.errors import retells
from tensorattn.operators.interaction import adds_softmaxes
from tensorattn.operators.operator import SYMMETRIES, AttentionResult, Claim, Operator, attend_positions, run
from tensorattn.operators.position import Bias, biased
from tensorattn.operators.spreading import At, Base, mixture, weights_of
from tensorattn.presence import GivenWeights, Lengths, Mask
from tensorattn.softmax import TokenSet, join_sets
from tensorattn.summarizing import Needs
from tensorattn.summary import Summary
from tensorattn.tokens import join_tokens

__all__ = ["OPERATOR", "joint_set", "kao_kv"]


def joint_set(summary: Summary, bias: Bias | None = None, positions: Sequence[int] = ()) -> TokenSet:
    """Return the averages of all modes as one set of tokens, each counted as often as its index."""
    order = summary.order
    effects, log_weights = main_effects(order), [summary.mode_log_weight(mode) for mode in range(order)]
    keys, values = summary.of_modes()
    if bias is None and all([log_weight is None for log_weight in log_weights]):
        return TokenSet(join_tokens(keys), join_tokens(values))
    sets = zip(effects, map(TokenSet, keys, values, log_weights), strict=True)
    return join_sets([biased(tokens, kept, bias, positions, summary.sizes) for kept, tokens in sets])


def attend(query: Tensor, summary: Summary, *, bias: Bias | None = None, **settings: Any) -> AttentionResult:
    """Attend to all averages together."""
    tokens = joint_set(summary, bias, query.shape[len(summary.batch) : -1])
    output, lse, attention = attend_positions(query, summary, [tokens], **settings)
    return AttentionResult(output, lse, None if attention is None else attention[0].split(summary.sizes, -1))


@retells
def kao_kv(
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
    r"""Attend from each query to the averages of all modes in one joint softmax, as published.

    .. math:: J(q) = \frac{\sum_m \sum_a w^m[a]\, e^{s\, q \cdot \bar k^m[a]}\, \bar v^m[a]}
        {\sum_m \sum_a w^m[a]\, e^{s\, q \cdot \bar k^m[a]}}
        = \bar v + \sum_m \lambda_m(q) \Big( \sum_a p^m_a(q)\, \bar v^m[a] - \bar v \Big)

    The modes compete for the one softmax: mode m enters with its share :math:`\lambda_m` of the normaliser, which
    damps the result about N-fold, and short modes more, where `additive_attention` gives each mode its full effect.
    Equals flattened attention at order 1 only. Costs 4SD operations a query for S = n_1 + … + n_N averages.

    Args:
        query: Queries: the grid of the keys, another grid, or a list of tokens.
        key: Keys over the grid.
        value: Values over the grid; their head size may differ.
        order: Number of modes N.
        scale: Factor of the logits; 1/√D if None.
        weights: One non-negative vector a mode or None for equal weights, or one tensor over the grid: multiplicities,
            so 2 counts an index, or a position, as if it were repeated, and 0 as if it were absent.
        mask: True where a position takes part, ``(*batch, n_1, …, n_N)`` or broadcastable in the batch.
            One that is no product over modes makes masked averages, each counted in proportion to the positions
            present, those of a mode together as often as there are of them; it excludes ``weights``.
        lengths: How many leading indices of each mode take part, a mask that is a product over modes: integers
            ``(*batch, N)``, or one entry a mode, None for all.
        bias: One tensor ``(P_m, n_m)`` or ``(*batch, P_m, n_m)`` a mode, or None for no bias: added to the logits of a
            query at place :math:`i_m` of mode m for the indices of that mode. Minus infinity hides an index.
        causal: A mode whose frames a query sees up to its own only, whatever the data; the query is then on a grid with
            the frames of the keys.
        dropout_p: Probability of dropping an attention weight, whenever it is not 0.
        return_lse: Whether to return the log-sum-exp too: that over the S averages, not over all positions.
        return_attention: Whether to return the attention weights too.

    Returns:
        The output in the type of the query; an `AttentionResult` if more is asked for, whose ``attention`` holds one
        tensor ``(*batch, *positions, n_m)`` a mode; all together sum to one.

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
        >>> rows, columns = ta.kao_kv(q, k, v, order=2, return_attention=True).attention
        >>> torch.allclose(rows.sum(-1) + columns.sum(-1), torch.ones(2, 4, 5))
        True

    References:
        Gao, Wang and Ji, "Kronecker Attention Networks", KDD 2020, arXiv 2007.08442.
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
    """The mode averages."""
    return Needs(main_effects(order))


def claims() -> frozenset[Claim]:
    """The symmetries of a softmax over averages; neither exactness nor indifference to added modes."""
    return SYMMETRIES | {Claim.INVISIBLE_INTERACTION, Claim.CONVEX, Claim.ZERO_SCALE_MEAN}


def spread(attention: Sequence[Tensor], sizes: Sequence[int], at: At | None, base: Base) -> Tensor:
    """What each average gets, shared by the positions behind it: the output is the mean of the values so weighed."""
    return mixture([weights_of(part, at, (size,)) for part, size in zip(attention, sizes, strict=True)], base.weights)


def counts_indices() -> bool:
    """Its one softmax counts the indices of all modes."""
    return True


OPERATOR = Operator(
    "kao_kv",
    kao_kv,
    needs,
    attend,
    claims,
    spread=spread,
    counts_indices=counts_indices,
    absorbs=adds_softmaxes,
)
