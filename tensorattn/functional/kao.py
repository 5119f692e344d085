"""Kronecker attention as published: queries, or their averages, attend to the averages of all modes together."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from tensorattn.averages.means import broadcast_sum
from tensorattn.errors import OptionError, ShapeError
from tensorattn.functional.additive import (
    DEFAULT_SATURATION,
    check_interaction,
    counting_numbers,
    missing_covariance,
    saturated,
)
from tensorattn.functional.maps import At, Base, geometric, mixture, place_on, weights_of
from tensorattn.functional.operator import (
    SYMMETRIES,
    AttentionResult,
    Bias,
    Claim,
    Operator,
    Shared,
    attend_positions,
    attention_function,
    biased,
    run,
    spread_parts,
)
from tensorattn.functional.softmax import Tokens, TokenSet, attend_tokens
from tensorattn.functional.summary import Means, Needs, Summary
from tensorattn.masks import Part, accumulation_dtype, matmul, nonzero
from tensorattn.modes import Family, check_order, main_effects

__all__ = ["KAO_KV", "KAO_QKV", "kao_kv", "kao_qkv"]

AVERAGED = "its queries are averages over positions"


@attention_function
def kao_kv(query: Tensor, key: Tensor, value: Tensor, *, order: int, **shared: Unpack[Shared]) -> Any:
    r"""Attend from each query to the averages of all modes in one joint softmax, as published.

    .. math:: J(q) = \frac{\sum_m \sum_a w^m[a]\, e^{s\, q \cdot \bar k^m[a]}\, \bar v^m[a]}
        {\sum_m \sum_a w^m[a]\, e^{s\, q \cdot \bar k^m[a]}}
        = \bar v + \sum_m \lambda_m(q) \Big( \sum_a p^m_a(q)\, \bar v^m[a] - \bar v \Big)

    The modes compete for the one softmax: mode m enters with its share :math:`\lambda_m` of the normaliser, which
    damps the result about N-fold, and short modes more, where `additive_attention` gives each mode its full effect.
    Equals flattened attention at order 1 only. Costs 4SD operations a query for S = n_1 + … + n_N averages.

    Args:
        query: Queries.
        key: Keys.
        value: Values.
        order: Number of modes N.
        **shared: What all operators share, as told below.

    A mask that is no product over modes makes masked averages, each counted in proportion to the positions present,
    those of a mode together as often as there are of them; it excludes ``weights``.

    Returns:
        The output in the type of the query; an `AttentionResult` if more is asked for, whose ``attention`` holds one
        tensor ``(*batch, *positions, n_m)`` a mode; all together sum to one.

    Examples:
        >>> import torch, tensorattn as ta
        >>> q, k, v = torch.randn(3, 2, 4, 5, 8).unbind(0)
        >>> rows, columns = ta.kao_kv(q, k, v, order=2, return_attention=True).attention
        >>> torch.allclose(rows.sum(-1) + columns.sum(-1), torch.ones(2, 4, 5))
        True

    References:
        Gao, Wang and Ji, "Kronecker Attention Networks", KDD 2020, arXiv 2007.08442.
    """
    return run(KAO_KV, query, key, value, order=order, options={}, **shared)


def _attend_from_positions(
    query: Tensor,
    summary: Summary,
    *,
    bias: Bias | None = None,
    prefix: tuple[Tensor, Tensor] | None = None,
    **settings: Any,
) -> AttentionResult:
    """Attend to all averages together, and to the tokens of a prefix, S of which weigh what P positions do."""
    batch, positions, tokens = len(summary.batch), query.shape[len(summary.batch) : -1], summary.mode_tokens()
    if bias is not None:
        parts = []
        for mode, size in enumerate(summary.sizes):
            own = biased(TokenSet(size), (mode,), bias, positions, summary.sizes)
            none = tokens.key.new_zeros(1, size, dtype=accumulation_dtype(tokens.key.dtype))
            parts.append(none if own.bias is None or own.rows is None else own.bias.index_select(-2, own.rows))
        shared = torch.broadcast_shapes(*[part.shape[:-1] for part in parts])
        joint = torch.cat([part.expand(*shared, -1) for part in parts], -1)
        rows = torch.arange(joint.shape[-2], device=joint.device)
        tokens = tokens._replace(sets=(tokens.sets[0]._replace(bias=joint, rows=rows),))
    if prefix is not None:
        tokens = tokens.beside(*prefix, _share_of_tokens(summary, tokens))
    output, lse, attention, _ = attend_positions(query, tokens, batch, **settings)
    if attention is not None:
        attention = attention[0][..., : sum(summary.sizes)].split_with_sizes(summary.sizes, -1)
    return AttentionResult(output, lse, attention)


def _share_of_tokens(summary: Summary, tokens: Tokens) -> Tensor:
    """Return log(S / P), by weight: what a token of its own counts beside averages that each count once."""
    count, weight = summary.count((0,)), tokens.log_weight
    if count is None or weight is None:
        logarithm = math.log(sum(summary.sizes) / summary.positions)
        return tokens.key.new_full((1,), logarithm, dtype=accumulation_dtype(tokens.key.dtype))
    total = count.sum(-1, keepdim=True)
    averages = weight.exp().sum(-1, keepdim=True)
    share = torch.where(total > 0, averages / nonzero(total).to(averages.dtype), 1.0)
    return share.log()


def _spread_of_positions(attention: Sequence[Tensor], sizes: Sequence[int], at: At | None, base: Base) -> Tensor:
    """What each average gets, shared by the positions behind it: the output is the mean of the values so weighed."""
    return mixture([weights_of(part, at, (size,)) for part, size in zip(attention, sizes, strict=True)], base.weights)


KAO_KV = Operator(
    "kao_kv",
    kao_kv,
    lambda order: Needs(main_effects(order), indices=True),
    _attend_from_positions,
    lambda: SYMMETRIES | {Claim.INVISIBLE_INTERACTION, Claim.CONVEX, Claim.ZERO_SCALE_MEAN},
    spread=_spread_of_positions,
    joins=True,
)


@attention_function
def kao_qkv(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    order: int,
    centered: bool = False,
    interaction: str | None = None,
    saturation: float | None = 1.0,
    **shared: Unpack[Shared],
) -> Any:
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
        query: Queries.
        key: Keys.
        value: Values.
        order: Number of modes N.
        centered: Whether to take one softmax a mode and count the mean once.
        interaction: ``"linear"`` to agree with flattened attention to first order in the scale, for every tensor; needs
            ``centered=True``.
        saturation: Bounds the correction as in `additive_attention`; None leaves it unbounded. To be left
            out without ``interaction``.
        **shared: What all operators share, as told below.

    Weights weigh the averages of the queries too. A mask that is no product over modes makes masked averages, with the
    logarithm of the positions present behind each in the logits: an approximation, exact where the mask is a product.
    ``bias`` and ``causal`` have no meaning here and raise; so does ``return_lse`` unless ``centered=True`` without
    interaction, or order 1.

    Returns:
        The output in the type of the query; an `AttentionResult` if more is asked for, whose ``attention`` is such
        that ``attention[m][l]``, ``(*batch, n_m, n_l)``, tells how the averages of mode m attend to those of mode l;
        with ``centered=True``, ``attention[N][l]``, ``(*batch, 1, n_l)``, how the mean query does.

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
    if shared.get("return_lse") and order > 1 and (not centered or interaction is not None):
        raise OptionError(
            "return_lse needs centered=True without interaction: otherwise the output is not that of one softmax.",
            hint="Use additive_attention.",
        )
    options = {"centered": centered, "interaction": interaction, "saturation": saturation}
    return run(KAO_QKV, query, key, value, order=order, options=options, **shared)


def _needs(order: int, *, centered: bool, interaction: str | None, saturation: float | None) -> Needs:
    """The mode averages of queries, keys and values; centred, the grand means too; the queries to correct all of."""
    check_interaction(interaction, saturation)
    if interaction is not None and not centered:
        raise OptionError("interaction needs centered=True: the published form has no first order to correct.")
    family: Family = (*main_effects(order), ()) if centered else main_effects(order)
    queries = family if interaction is None else tuple(dict.fromkeys((*family, tuple(range(order)))))
    return Needs(family, second_moment=interaction is not None, queries=queries, indices=not centered)


def _attend_from_averages(
    queries: Means,
    summary: Summary,
    *,
    centered: bool,
    interaction: str | None,
    saturation: float | None,
    scale: float,
    return_attention: bool = False,
    gain: Tensor | None = None,
    part: Part | None = None,
    **settings: Any,
) -> AttentionResult:
    """Attend from the mean queries of each mode: one part a mode, for an outer sum, or where it stands in a whole."""
    order, sizes = summary.order, summary.sizes
    counts = counting_numbers(main_effects(order)) if centered else {}
    tokens = summary.tokens(counts) if centered else summary.mode_tokens()
    rows = queries.joined((*main_effects(order), ()) if centered else main_effects(order))
    settings.update(scale=scale, return_attention=return_attention)
    output, lse, attention, _ = attend_tokens(rows, tokens, **settings)
    lengths = (*sizes, 1) if centered else sizes
    outputs = output.split_with_sizes(lengths, -2)
    lses = None if lse is None else lse.split_with_sizes(lengths, -1)
    if centered:
        if lses is not None:  # of a sample without any position all are minus infinity, which is taken off once
            lses = _less_grand_mean((*lses[:-1], lses[-1].masked_fill(lses[-1] == -math.inf, 0.0)))
        outputs = _less_grand_mean(outputs)
    weights = None
    if attention is not None:
        columns = attention[:order] if centered else attention[0].split_with_sizes(sizes, -1)
        parts = [column.split_with_sizes(lengths, -2) for column in columns]
        weights = tuple([tuple([row[place] for row in parts]) for place in range(len(lengths))])
    result = AttentionResult(tuple(outputs), lses, weights)
    if interaction is None:
        return result
    each, dim = queries.rows(tuple(range(order))), len(summary.batch)
    means, own = [queries.get((mode,)) for mode in range(order)], sizes
    if part is not None:
        own = part.lengths
        means = [part.own(mean, mode, dim) for mode, mean in enumerate(means)]
        result = result._replace(output=[part.own(mean, mode, dim) for mode, mean in enumerate(outputs)])
        each = each if order > 1 else part.own(each, 0, dim)
    each = each.unflatten(-2, own)
    result = spread_parts(result, (*summary.batch, *own), accumulation_dtype(each.dtype), None)
    output = result.output + _correction(each, [*means, queries.rows(())], summary, scale, saturation, gain)
    grand = summary.count(())
    if grand is not None:  # where no position is present there is nothing to correct
        output = torch.where((grand > 0)[(..., *(None,) * (order + 1))], output, 0.0)
    return result._replace(output=output.to(each.dtype))


def _less_grand_mean(parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Take what the grand mean gives N−1 times from what one of the N modes gives."""
    first, *others, grand = parts
    return (torch.sub(first, grand, alpha=len(others)), *others) if others else (first,)


def _correction(
    query: Tensor,
    means: Sequence[Tensor],
    summary: Summary,
    scale: float,
    saturation: float | None,
    gain: Tensor | None,
) -> Tensor:
    """First order of what is missing: all of the covariance for the interaction of the query, part for the rest."""
    order, batch, dtype = summary.order, len(summary.batch), accumulation_dtype(query.dtype)
    counts = counting_numbers(main_effects(order))
    vectors = _less_grand_mean([mean.to(dtype) for mean in means])
    additive = broadcast_sum(vectors, main_effects(order), query.shape)
    own = query.to(dtype) - additive

    def applied(to: Tensor, matrix: Tensor) -> Tensor:
        return matmul(to.flatten(batch, -2), matrix.to(dtype).mT).unflatten(-2, query.shape[batch:-1])

    assert summary.covariance is not None and summary.key_covariance is not None
    rest = missing_covariance(summary, counts, of_keys=False)
    term = scale * (applied(own, summary.covariance) + applied(additive, rest))
    if saturation is not None:
        rest = missing_covariance(summary, counts, of_keys=True)
        square = (applied(own, summary.key_covariance) * own).sum(-1) + (applied(additive, rest) * additive).sum(-1)
        term = term / saturated(scale * scale * square, saturation)
    return term if gain is None else term * gain[(..., *(None,) * (order + 1))]


def _claims(*, centered: bool, interaction: str | None, saturation: float | None) -> frozenset[Claim]:
    """Uncentred, the values are counted N times; centred, the symmetries of the additive operator.

    Of keys and values it knows the mode averages, in which no interaction is, unless it corrects for them.
    """
    if not centered:
        return frozenset({Claim.KEY_SHIFT, Claim.ROTATION, Claim.INVISIBLE_INTERACTION})
    own = Claim.INVISIBLE_INTERACTION if interaction is None else Claim.FIRST_ORDER
    return SYMMETRIES | {Claim.CONSTANT_MODE, Claim.REFINEMENT, Claim.ZERO_SCALE_MEAN, own}


def _spread_of_averages(
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


KAO_QKV = Operator(
    "kao_qkv",
    kao_qkv,
    _needs,
    _attend_from_averages,
    _claims,
    query="grid",
    spread=_spread_of_averages,
    options={"centered": False, "interaction": None, "saturation": DEFAULT_SATURATION},
    lacks={"bias": AVERAGED, "causal": AVERAGED},
)
