"""Kronecker attention with averaged queries too: mode averages attend to each other, an outer sum joins the modes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tensorattn.contraction import expand
from tensorattn.contraction_tree import Family, main_effects
from tensorattn.errors import OptionError, ShapeError, retells
from tensorattn.modes import GridShape, check_order
from tensorattn.operators.interaction import check_interaction, missing_covariance, saturated
from tensorattn.operators.kao_kv import joint_set
from tensorattn.operators.operator import SYMMETRIES, AttentionResult, Claim, Operator, run
from tensorattn.operators.spreading import At, Base, geometric, mixture, place_on, weights_of
from tensorattn.presence import GivenWeights, Lengths, Mask
from tensorattn.softmax import attend_tokens
from tensorattn.summarizing import Needs
from tensorattn.summary import Summary
from tensorattn.tokens import join_tokens, split_tokens
from tensorattn.truncation import counting_numbers
from tensorattn.weighing import weighted_means

__all__ = ["OPERATOR", "kao_qkv"]

Query = Tensor | Sequence[Tensor]


def attend(
    query: Query,
    summary: Summary,
    *,
    centered: bool,
    interaction: str | None,
    saturation: float | None,
    scale: float,
    gain: Tensor | None = None,
    **settings: Any,
) -> AttentionResult:
    """Attend from the mean queries of each mode; given means, return one output a mode for an outer sum."""
    if not isinstance(query, Tensor):
        return _attend_from_means(query, summary, centered, scale=scale, **settings)
    order, batch = summary.order, summary.batch
    means = weighted_means(query, _family(order, centered), summary.position_weights())
    parts = _attend_from_means(means, summary, centered, scale=scale, **settings)
    output = expand(parts.output, main_effects(order), GridShape(batch, summary.sizes, parts.output[0].shape[-1]))
    lse = None
    if parts.lse is not None:
        column = GridShape(batch, summary.sizes, 1)
        lse = expand([part.unsqueeze(-1) for part in parts.lse], main_effects(order), column).squeeze(-1)
    if interaction is not None:
        output = output + _correction(query, means, summary, scale, saturation, gain)
    return AttentionResult(output.to(query.dtype), lse, parts.attention)


def _attend_from_means(
    means: Sequence[Tensor], summary: Summary, centered: bool, *, return_attention: bool, **settings: Any
) -> AttentionResult:
    """Attend from the mean queries ``(*batch, n_m, D)`` of each mode and the grand mean ``(*batch, D)``."""
    order = summary.order
    if centered:
        counts = counting_numbers(main_effects(order))
        sets = [summary.tokens(kept, count) for kept, count in counts.items() if count]
        queries, sizes = join_tokens([*means[:order], means[order].unsqueeze(-2)]), (*summary.sizes, 1)
    else:
        sets, queries, sizes = [joint_set(summary)], join_tokens(means), summary.sizes
    output, lse, attention = attend_tokens(queries, sets, return_attention=return_attention, **settings)
    outputs, lses = split_tokens(output, sizes), None if lse is None else lse.split(sizes, -1)
    if centered:
        outputs, lses = _less_grand_mean(outputs), None if lses is None else _less_grand_mean(lses)
    weights = None
    if attention is not None:
        columns = attention[:order] if centered else attention[0].split(summary.sizes, -1)
        rows = [column.split(sizes, -2) for column in columns]
        weights = tuple(tuple(row[place] for row in rows) for place in range(len(sizes)))
    return AttentionResult(outputs, lses, weights)


def _less_grand_mean(parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Take what the grand mean gives N−1 times from what one of the N modes gives."""
    first, *others, grand = parts
    return first - len(others) * grand, *others


def _correction(
    query: Tensor,
    means: tuple[Tensor, ...],
    summary: Summary,
    scale: float,
    saturation: float | None,
    gain: Tensor | None,
) -> Tensor:
    """First order of what is missing: all of the covariance for the interaction of the query, part for the rest."""
    order, batch = summary.order, len(summary.batch)
    counts = counting_numbers(main_effects(order))
    vectors = [means[0] - (order - 1) * means[order].unsqueeze(-2), *means[1:order]]
    additive = expand(vectors, main_effects(order), GridShape(summary.batch, summary.sizes, query.shape[-1]))
    own = query.to(additive.dtype) - additive

    def applied(to: Tensor, matrix: Tensor) -> Tensor:
        return (to.flatten(batch, -2) @ matrix.mT).unflatten(-2, summary.sizes)

    assert summary.covariance is not None and summary.key_covariance is not None
    rest = missing_covariance(summary, counts, of_keys=False)
    term = scale * (applied(own, summary.covariance) + applied(additive, rest))
    if saturation is not None:
        rest = missing_covariance(summary, counts, of_keys=True)
        square = (applied(own, summary.key_covariance) * own).sum(-1) + (applied(additive, rest) * additive).sum(-1)
        term = term / saturated(scale * scale * square, saturation)
    return term if gain is None else term * gain.reshape(*gain.shape, *(1 for _ in summary.sizes), 1)


@retells
def kao_qkv(
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
    centered: bool = False,
    interaction: str | None = None,
    saturation: float | None = 1.0,
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
    position. ``interaction="linear"`` adds the first order of what is missing,
    :math:`s\, (C^{\mathrm{tot}}_{vk} r_j + C_{vk} a_j)` for a query :math:`a_j + r_j` of additive part :math:`a_j`.
    Costs 4S²D operations in all for S = n_1 + … + n_N averages, and 4D² a query for the correction.

    Args:
        query: Queries, on the grid of the keys.
        key: Keys over the grid.
        value: Values over the grid; their head size may differ.
        order: Number of modes N.
        scale: Factor of the logits; 1/√D if None.
        weights: One non-negative vector a mode or None for equal weights, or one tensor over the grid: multiplicities,
            so 2 counts an index, or a position, as if it were repeated, and 0 as if it were absent.
            They weigh the averages of the queries too.
        mask: True where a position takes part, ``(*batch, n_1, …, n_N)`` or broadcastable in the batch.
            It speaks of the queries too: where a position takes no part, the output is zero.
            One that is no product over modes makes masked averages, with the logarithm of the positions present behind
            each in the logits: an approximation, exact where the mask is a product.
        lengths: How many leading indices of each mode take part, a mask that is a product over modes: integers
            ``(*batch, N)``, or one entry a mode, None for all.
        bias: Has no meaning here and raises.
        causal: Has no meaning here and raises.
        centered: Whether to take one softmax a mode and count the mean once.
        interaction: ``"linear"`` to agree with flattened attention to first order in the scale, for every tensor; needs
            ``centered=True``.
        saturation: Bounds the correction as in `additive_attention`; None leaves it unbounded. To be left
            out without ``interaction``.
        dropout_p: Probability of dropping an attention weight, whenever it is not 0.
        return_lse: Whether to return the outer sum of log-sum-exps too; only ``centered=True`` has one, or order 1.
        return_attention: Whether to return the attention weights too.

    Returns:
        The output in the type of the query; an `AttentionResult` if more is asked for, whose ``attention`` is such
        that ``attention[m][l]``, ``(*batch, n_m, n_l)``, tells how the averages of mode m attend to those of mode l;
        with ``centered=True``, ``attention[N][l]``, ``(*batch, 1, n_l)``, how the mean query does.

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
        >>> q, k, v = torch.randn(3, 2, 4, 5, 8, dtype=torch.float64).unbind(0)
        >>> interaction = ta.interaction_residual(ta.kao_qkv(q, k, v, order=2), order=2)
        >>> bool(interaction.abs().max() < 1e-12)
        True

    References:
        Gao, Wang and Ji, "Kronecker Attention Networks", KDD 2020, arXiv 2007.08442.
    """
    check_order(order)
    if return_lse and order > 1 and (not centered or interaction is not None):
        raise OptionError(
            "return_lse needs centered=True without interaction: otherwise the output is not that of one softmax.",
            hint="Use additive_attention.",
        )
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
        centered=centered,
        interaction=interaction,
        saturation=saturation,
    )


def needs(order: int, *, centered: bool, interaction: str | None, saturation: float | None) -> Needs:
    """The mode averages; centred, the grand mean too."""
    check_interaction(interaction, saturation)
    if interaction is not None and not centered:
        raise OptionError("interaction needs centered=True: the published form has no first order to correct.")
    return Needs(_family(order, centered), second_moment=interaction is not None, position_weights=True)


def _family(order: int, centered: bool) -> Family:
    """The mode averages; the grand mean where it counts."""
    return (*main_effects(order), ()) if centered else main_effects(order)


def claims(*, centered: bool, interaction: str | None, saturation: float | None) -> frozenset[Claim]:
    """Uncentred, the values are counted N times; centred, the symmetries of the additive operator.

    Of keys and values it knows the mode averages, in which no interaction is, unless it corrects for them.
    """
    if not centered:
        return frozenset({Claim.KEY_SHIFT, Claim.ROTATION, Claim.INVISIBLE_INTERACTION})
    own = Claim.INVISIBLE_INTERACTION if interaction is None else Claim.FIRST_ORDER
    return SYMMETRIES | {Claim.CONSTANT_MODE, Claim.REFINEMENT, Claim.ZERO_SCALE_MEAN, own}


def counts_indices(*, centered: bool, **_: Any) -> bool:
    """The published form has one softmax for the indices of all modes."""
    return not centered


def takes_means(*, interaction: str | None, **_: Any) -> bool:
    """Without the correction, averages of the queries are all that it needs."""
    return interaction is None


AVERAGED = "its queries are averages over positions"


def spread(
    attention: Sequence[Sequence[Tensor]],
    sizes: Sequence[int],
    at: At | None,
    base: Base,
    *,
    centered: bool,
    **_: Any,
) -> Tensor:
    """What the mean queries at the place of a query attend to.

    Published, the mean over modes of what `kao_kv` spreads; centred, the product of the weights of all modes and mean
    queries, those of the grand mean to the power 1−N: the softmax of additive logits of the additive part of a query.
    """
    order, place = len(sizes), place_on(sizes, at)
    if len(attention) != order + centered:
        raise ShapeError(f"attention has {len(attention)} entries, but {order + centered} are needed.")
    queries = [
        [weights_of(part, None, (sizes[mode], size))[..., index, :] for part, size in zip(row, sizes, strict=True)]
        for mode, (row, index) in enumerate(zip(attention, place, strict=False))
    ]
    if not centered:
        return functools.reduce(torch.add, (mixture(row, base.weights) for row in queries)) / order
    factors = [((mode,), part, 1) for row in queries for mode, part in enumerate(row)]
    factors += [((mode,), part[..., 0, :], 1 - order) for mode, part in enumerate(attention[order])]
    return geometric(factors, base.weights, order)


OPERATOR = Operator(
    "kao_qkv",
    kao_qkv,
    needs,
    attend,
    claims,
    query="grid",
    takes_means=takes_means,
    spread=spread,
    counts_indices=counts_indices,
    options={"centered": False, "interaction": None, "saturation": 1.0},
    lacks={"bias": AVERAGED, "causal": AVERAGED},
)
