"""Kronecker attention with averaged queries too: mode averages attend to each other, an outer sum joins the modes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tensorattn.errors import OptionError, retells
from tensorattn.operators import additive
from tensorattn.operators.kao_kv import joint_set
from tensorattn.operators.operator import SYMMETRIES, AttentionResult, Claim, Needs, Operator, run
from tensorattn.planning import main_effects
from tensorattn.softmax import attend_tokens, join_tokens
from tensorattn.summary import Summary
from tensorattn.weights import Vector

__all__ = ["OPERATOR", "kao_qkv"]


def attend(
    query: tuple[Tensor, ...],
    summary: Summary,
    *,
    centered: bool,
    return_lse: bool,
    return_attention: bool,
    **settings: Any,
) -> AttentionResult:
    """Attend from the mean queries of each mode; return one output a mode, whose outer sum is the result."""
    order = summary.order
    tokens = join_tokens([*query[:order], query[order].unsqueeze(-2)] if centered else query[:order])
    sets = additive.token_sets(summary) if centered else [joint_set(summary)]
    output, lse, attention = attend_tokens(
        tokens, sets, return_lse=return_lse, return_attention=return_attention, **settings
    )
    sizes = [*summary.sizes, 1] if centered else summary.sizes
    outputs, lses = list(output.split(sizes, -2)), None if lse is None else list(lse.split(sizes, -1))
    if centered:
        outputs[0] = outputs[0] - (order - 1) * outputs.pop()
        if lses is not None:
            lses[0] = lses[0] - (order - 1) * lses.pop()
    weights = None
    if attention is not None:
        columns = attention[:order] if centered else attention[0].split(summary.sizes, -1)
        rows = [column.split(sizes, -2) for column in columns]
        weights = tuple(tuple(row[mode] for row in rows) for mode in range(order))
    return AttentionResult(tuple(outputs), None if lses is None else tuple(lses), weights)


@retells
def kao_qkv(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    order: int,
    scale: float | None = None,
    weights: Sequence[Vector] | None = None,
    centered: bool = False,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    return_attention: bool = False,
) -> Tensor | AttentionResult:
    r"""Attend from the averages of each mode to the averages of all modes, and add up the modes.

    As published (``centered=False``), with `kao_kv` as :math:`J` and the mean queries :math:`\bar q^m`,

    .. math:: O_j = \sum_m J(\bar q^m[j_m]) .

    It is not an approximation of attention: each of the N terms carries the mean value, so the output is about
    :math:`N \bar v`. With ``centered=True``, and `additive_attention` as :math:`A`,

    .. math:: O_j = \sum_m A(\bar q^m[j_m]) - (N - 1)\, A(\bar q),

    whose mean is right, and which equals flattened attention for additive values where modes live in orthogonal
    channels of queries and keys. Either way the output is an outer sum: no query sees what is peculiar to its
    position. Costs 4S²D operations in all for S = n_1 + … + n_N averages.

    Args:
        query: Queries, on the grid of the keys.
        key: Keys over the grid.
        value: Values over the grid; their head size may differ.
        order: Number of modes N.
        scale: Factor of the logits; 1/√D if None.
        weights: One non-negative vector a mode, or None for equal weights: multiplicities, so 2 counts an index as
            if it were repeated, and 0 as if it were absent.
            They weigh the averages of the queries too.
        centered: Whether to take one softmax a mode and count the mean once.
        dropout_p: Probability of dropping an attention weight, whenever it is not 0.
        return_lse: Whether to return the outer sum of log-sum-exps too; only ``centered=True`` has one, or order 1.
        return_attention: Whether to return the attention weights too.

    Returns:
        The output in the type of the query; an `AttentionResult` if more is asked for, whose ``attention[m][l]``,
        ``(*batch, n_m, n_l)``, tells how the averages of mode m attend to those of mode l.

    Raises:
        ShapeError: If batch dimensions, mode sizes or head sizes disagree, or a mode is empty.
        DtypeError: If a tensor is not floating point, or the types differ.
        WeightsError: If weights have the wrong length, are negative, not finite, or all zero.
        OptionError: If an option is out of its range.

    Shape:
        - query and key: :math:`(*, n_1, \dots, n_N, D)`
        - value and output: :math:`(*, n_1, \dots, n_N, D_v)`

    Examples:
        >>> import torch, tensorattn as ta
        >>> q, k, v = torch.randn(3, 2, 4, 5, 8, dtype=torch.float64).unbind(0)
        >>> interaction = ta.interaction_residual(ta.kao_qkv(q, k, v, order=2), order=2)
        >>> bool(interaction.abs().max() < 1e-12)
        True

    References:
        Gao, Wang and Ji, "Kronecker Attention Networks", KDD 2020, arXiv 2007.08442.
    """
    if return_lse and not centered and order > 1:
        raise OptionError(
            f"return_lse has no meaning for centered=False at order {order}: {order} softmaxes added are not one.",
            hint="Pass centered=True, or use additive_attention.",
        )
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
        centered=centered,
    )


def needs(order: int, *, centered: bool) -> Needs:
    """The mode averages and the grand mean."""
    return Needs((*main_effects(order), ()))


def claims(*, centered: bool) -> frozenset[Claim]:
    """Uncentred, the values are counted N times; centred, the symmetries of the additive operator."""
    common = frozenset({Claim.KEY_SHIFT, Claim.ROTATION})
    if not centered:
        return common
    return SYMMETRIES | {Claim.CONSTANT_MODE, Claim.REFINEMENT, Claim.ZERO_SCALE_MEAN}


OPERATOR = Operator("kao_qkv", kao_qkv, needs, attend, claims, query="means", options={"centered": False})
