"""Clustered attention: full attention to cells of keys, and the second moments inside them.

The record condenses: positions are put into cells, found or fixed (`tensorattn.functional.cells`), their sums become
`Clusters`, means, counts, spreads and two covariances, and queries attend to those by one softmax with two channels
more than keys have: the keys, the spread times half the logarithm of 1 + τ², and the logarithm of the share. Means are
taken off keys and values before, in float64, so that nothing large cancels. What is causal runs the same sums over
frames, which are one more batch dimension then.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from tensorattn.errors import OptionError, check
from tensorattn.functional.additive import ADDITIVE
from tensorattn.functional.causal import Past
from tensorattn.functional.cells import (
    Cells,
    CellSums,
    block_counts,
    block_labels,
    draw_queries,
    metric_of,
    search,
)
from tensorattn.functional.flattened import FLATTENED
from tensorattn.functional.maps import At, Base, weights_of
from tensorattn.functional.operator import (
    SYMMETRIES,
    AttentionResult,
    Claim,
    Operator,
    Shared,
    attention_function,
    run,
)
from tensorattn.functional.softmax import Tokens, TokenSet, attend_tokens, in_chunks
from tensorattn.functional.summary import Needs, Summary
from tensorattn.masks import Part, accumulation_dtype, beside, counting_dtype, nonzero, without_autocast
from tensorattn.modes import check_order, main_effects

__all__ = ["CLUSTERED", "Clusters", "clustered_attention"]

TOKENS = 64


@attention_function
def clustered_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    order: int,
    tokens: int = 64,
    cells: str | Cells = "keys",
    blocks: Sequence[int] | None = None,
    additive_control: bool = False,
    **shared: Unpack[Shared],
) -> Any:
    r"""Attend from each query to cells of keys that look alike to it, with what varies inside the cells.

    Positions are put into n cells. With the weight :math:`W_c`, the mean key and value :math:`k_c, v_c` of each, the
    covariances inside cells :math:`C_{kk} = \mathrm{E}[(k - k_c)(k - k_c)^\top]` and
    :math:`C_{vk} = \mathrm{E}[(v - v_c)(k - k_c)^\top]`, and the spread :math:`a_c` of a cell in units of the mean one,

    .. math:: O(q) = \sum_c p_c v_c + \Big(\sum_c p_c a_c\Big) \frac{s\, C_{vk}\, q}{\sqrt{1 + \tau^2}}, \qquad
        p_c \propto W_c\, (1 + \tau^2)^{a_c / 2}\, e^{s\, q \cdot k_c}, \qquad \tau^2 = s^2 q^\top C_{kk}\, q .

    The error is of second order in the scale, whatever the data and the cells; on recordings, whose keys have few
    directions that count, it is within a percent of full attention with 64 tokens. The accuracy comes from clustering
    and second moments, not from the structure of the tensor. Where logits have a high effective rank (whitened
    features), or attention is sharp, it fails, and ``rho`` of the result tells: the share of the variance of logits
    that is left inside cells. Costs 4nD operations a query, 4D² for the covariances, and 2nD a key for the search.

    Args:
        query: Queries.
        key: Keys.
        value: Values.
        order: Number of modes N.
        tokens: Number of cells n. As many as there are positions make full attention.
        cells: ``"keys"`` to search for cells among the keys, in the metric of the queries; ``"blocks"`` to cut the grid
            into blocks, which needs no search; or `Cells` that were found before by `find_cells`.
        blocks: Into how many blocks each mode is cut, for ``cells="blocks"``; as near to cubes as can be if None.
        additive_control: Whether to add what additive attention has beyond the cells of the additive parts of keys and
            values, as far as the keys in cells vary like their additive parts: exact where keys and values are
            additive over the modes. The modes must not be causal.
        **shared: What all operators share, as told below.

    Any mask, lengths and weights are exact, as if positions were repeated or left out, for as many positions as are
    searched (64 a token, at least 2,048); beyond that other candidates are drawn. ``causal`` needs blocks or cells
    found before: a search would see the future; a block then spans all frames so far. ``bias`` and ``dropout_p`` have
    no meaning here and raise. Cells are constants: gradients flow through the means and covariances. Those of linear
    maps of keys and values are close to the ones of full attention, those of single keys and values are not.

    Returns:
        The output in the type of the query; an `AttentionResult` if more is asked for: ``lse`` is an approximation of
        that of full attention, ``attention`` holds the weights of the cells ``(*batch, *positions, n)`` and the cell of
        each position ``(*batch, n_1, …, n_N)``, without the covariances; ``rho`` is ``(*batch)``, for ``causal``
        ``(*batch, frames)``.

    Examples:
        >>> import torch, tensorattn as ta
        >>> q = torch.randn(7, 8, dtype=torch.float64)
        >>> groups = torch.randn(5, 8, dtype=torch.float64)  # a volume of five kinds of voxels
        >>> volume = groups[torch.randint(5, (6, 7, 8))]
        >>> clustered = ta.clustered_attention(q, volume, volume, order=3, tokens=5)
        >>> torch.allclose(clustered, ta.flattened_attention(q, volume, volume, order=3))
        True

    References:
        Vyas, Katharopoulos and Fleuret, "Fast Transformers with Clustered Attention", 2020; Mitchell and Kersting,
        arXiv 2509.10406, 2025 (k-means and a dipole term, the closest relative); Gonzalez, 1985 (farthest-first).
    """
    check_order(order)
    options = {"tokens": tokens, "cells": cells, "blocks": blocks, "additive_control": additive_control}
    return run(CLUSTERED, query, key, value, order=order, options=options, **shared)


def _needs(
    order: int,
    *,
    tokens: int,
    cells: str | Cells,
    blocks: Sequence[int] | None,
    additive_control: bool,
) -> Needs:
    """All positions; the mode averages too, to control with."""
    check(tokens, "tokens", "integer", least=1)
    if not isinstance(cells, Cells) and cells not in ("keys", "blocks"):
        raise OptionError(f"cells must be 'keys', 'blocks' or Cells, got {cells!r}.")
    if isinstance(cells, Cells) and tokens not in (TOKENS, cells.tokens):
        raise OptionError(f"tokens is {tokens}, but cells has {cells.tokens}.", hint="Leave tokens out.")
    if blocks is not None:
        if cells != "blocks":
            raise OptionError(f"blocks has no meaning with cells={cells!r}: it needs cells='blocks'.")
        if isinstance(blocks, str) or not isinstance(blocks, Sequence):
            raise OptionError(f"blocks must be one count a mode, got {blocks!r}.")
        for mode, count in enumerate(blocks):
            check(count, f"blocks of mode {mode}", "integer", least=1)
        if tokens != TOKENS and math.prod(blocks) > tokens:
            raise OptionError(f"blocks cut the grid into {math.prod(blocks)}, but tokens is {tokens}.")
        block_counts((1,) * order, tokens, blocks)  # refuses another number of modes
    everything = tuple(range(order))
    return Needs((everything, *main_effects(order), ()) if additive_control else (everything,))


def _lacks(*, cells: str | Cells, additive_control: bool, **_: Any) -> dict[str, str]:
    """What has no meaning."""
    found = {
        "bias": "keys of one cell share a logit; what depends on the key alone is a weight",
        "dropout_p": "a cell stands for many positions, which would be dropped together",
    }
    if additive_control:
        found["causal"] = "additive_control takes averages over all frames"
    elif cells == "keys":
        found["causal"] = "the search among keys would see later frames; take cells='blocks', or those of find_cells"
    return found


@dataclass(frozen=True, eq=False)
class Clusters:
    """What queries attend to.

    Attributes:
        batch: Batch dimensions.
        sizes: Sizes of the modes.
        key: Keys of the cells less the mean key, spread and logarithm of the share of each, ``(*batch, n, D + 2)``.
        value: Values and spread, ``(*batch, n, D_v + 1)``.
        covariance: Of values and keys inside cells, ``(*batch, D_v, D)``.
        key_covariance: Of the keys, ``(*batch, D, D)``.
        mean: The mean key ``(*batch, 1, D)``.
        weight: Weight of all positions ``(*batch, 1)``.
        rho: From nothing to the share of the variance of the logits that is left inside cells ``(*batch)``.
        label: From nothing to the cell of each position ``(*batch, n_1, …, n_N)``, where a causal mode has size 1.
        masked: Whether there may be nothing.
        control: With ``additive_control``, the clusters of the additive parts, the mode averages, and how much of
            what they lack is added, ``(*batch)``.
    """

    batch: tuple[int, ...]
    sizes: tuple[int, ...]
    key: Tensor
    value: Tensor
    covariance: Tensor
    key_covariance: Tensor
    mean: Tensor
    weight: Tensor
    rho: Callable[[], Tensor]
    label: Callable[[], Tensor]
    masked: bool
    control: tuple[Clusters, Summary, Tensor] | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """What may be differentiated."""
        return [self.key, self.value, self.covariance, self.key_covariance, self.mean]


def _condense(
    query: Tensor | None,
    summary: Summary,
    shown: Tensor | None = None,
    *,
    tokens: int,
    cells: str | Cells,
    blocks: Sequence[int] | None,
    additive_control: bool,
    causal: int | None = None,
    past: Past | None = None,
    window: int | None = None,
    part: Part | None = None,
) -> tuple[Any, Callable[[], Past] | None]:
    """Put all positions into cells, and add them up.

    Args:
        query: Queries ``(*batch, L, D)`` that the metric is made of, or None.
        summary: The positions.
        shown: Which of the queries take part ``(*batch, L)``, with batch dimensions that may be 1; None for all.
        tokens: As `clustered_attention` tells, as the other options.
        cells: Kind of cells.
        blocks: Blocks a mode.
        additive_control: Whether to control by additive attention.
        causal: The causal mode.
        past: The frames before.
        window: How many frames are seen.
        part: Where the positions stand in a larger grid, all of which is searched and added up.

    Returns:
        Clusters, with the frames as last batch dimension for a causal mode, or the summary itself where each position
        is a cell; and what returns the past of the frames to come.
    """
    order, sizes, batch = summary.order, summary.sizes, len(summary.batch)
    exported = torch.compiler.is_exporting()  # one graph for all sizes has no other way for small ones
    if cells == "keys" and part is None and not exported and tokens >= summary.positions:
        return summary, None
    everything = tuple(range(order))
    rows, weight = summary.tokens({everything: 1}), summary.count(everything)
    key, value, weight = rows.key, rows.value, None if weight is None else weight.flatten(batch)
    if isinstance(cells, Cells):
        cells.check(key.shape[:-2], key.shape[-1])
    spread = None
    found: Cells | Tensor
    with without_autocast(key.device):
        if isinstance(cells, Cells):
            found, count = cells, cells.tokens
        elif cells == "keys":
            with torch.no_grad():
                drawn = (key.new_zeros(*key.shape[:-2], 1, key.shape[-1]), None)
                metric = metric_of(*(drawn if query is None else draw_queries(query, shown)))
                found, spread = search(key, weight, metric, tokens, part)
            count = tokens
        else:
            whole = sizes if part is None else part.sizes
            cut = block_counts(whole, tokens, blocks, causal)
            found, count = block_labels(whole, cut, key.device), math.prod(cut)
            found = found if part is None else part.box(found.reshape(whole)).reshape(-1)
        if causal is not None:
            key, value = (_frames_first(tensor, sizes, causal, 1) for tensor in (key, value))
            weight = None if weight is None else _frames_first(weight, sizes, causal, 0)
            found = found.unsqueeze(-3) if isinstance(found, Cells) else _frames_first(found, sizes, causal, 0)
        if isinstance(found, Cells):
            factor = torch.linalg.cholesky_ex(found.metric.to(counting_dtype(key.device)))[0]
        else:
            factor = torch.eye(key.shape[-1], dtype=counting_dtype(key.device), device=key.device)
        label = functools.partial(_labels, found, key)
        after = None
        if part is None:
            sums = CellSums.of(key, value, weight, label, count, None if spread is not None else factor)
        else:
            sums = _of_all_parts(part, key, value, weight, found, count, factor, causal)
        if causal is not None and part is not None:  # each frame sees those of other parts
            frames = sums.map(functools.partial(part.every, mode=causal, dim=batch))
            sums = _seen(frames, batch, past, window)[0].map(functools.partial(part.own, mode=causal, dim=batch))
        elif causal is not None:
            sums, after = _seen(sums.about_zero(factor), batch, past, window)
        grid = functools.partial(_on_grid, label, key.shape[:-1], sizes, causal)
        dtype, masked = accumulation_dtype(key.dtype), weight is not None
        clusters, moments = _clusters(sums, key.shape[-1], spread, factor, sizes, grid, dtype, masked)
        if additive_control:
            clusters = _controlled(clusters, moments, summary, label(slice(None)), weight, factor)
    return clusters, after


def _of_all_parts(
    part: Part,
    key: Tensor,
    value: Tensor,
    weight: Tensor | None,
    found: Cells | Tensor,
    count: int,
    factor: Tensor,
    causal: int | None,
) -> CellSums:
    """Add up the positions of all parts, or of each frame of all; one that does not count stands in for none."""

    def make() -> list[Tensor]:
        own_key, own_value, label, spoken = key, value, found, weight
        if key.shape[-2] == 0:
            own_key, own_value = (F.pad(each, (0, 0, 0, 1)) for each in (key, value))
            label = found if isinstance(found, Cells) else F.pad(found, (0, 1))
            spoken = key.new_zeros(1)
        labels = functools.partial(_labels, label, own_key)
        return list(CellSums.of(own_key, own_value, spoken, labels, count, factor).about_zero(factor).tensors)

    return CellSums.from_tensors(part.total(make, causal))


def _frames_first(tensor: Tensor, sizes: Sequence[int], mode: int, channels: int) -> Tensor:
    """Bring ``(*, P, …)`` to ``(*, n_mode, P / n_mode, …)``."""
    batch = tensor.dim() - channels - 1
    moved = tensor.unflatten(batch, sizes).movedim(batch + mode, batch)
    others = math.prod([size for place, size in enumerate(sizes) if place != mode])  # there may be no frame
    return moved.reshape(*tensor.shape[:batch], sizes[mode], others, *tensor.shape[batch + 1 :])


def _labels(found: Cells | Tensor, key: Tensor, places: slice) -> Tensor:
    """Return the cells of a range of positions."""
    return found.labels(key[..., places, :]) if isinstance(found, Cells) else found[..., places]


def _on_grid(label: Callable[[slice], Tensor], shape: Sequence[int], sizes: Sequence[int], mode: int | None) -> Tensor:
    """Return the cell of each position over the grid, the frames of a causal mode as batch dimension."""
    sizes = [1 if place == mode else size for place, size in enumerate(sizes)]
    return label(slice(None)).expand(shape).unflatten(-1, sizes)


def _seen(sums: CellSums, batch: int, past: Past | None, window: int | None) -> tuple[CellSums, Callable[[], Past]]:
    """Add up the frames that each frame sees, the last batch dimension; return what later frames need to know too."""
    own = sums.products.count.shape[batch]
    frames = own + (0 if past is None else past.frames)
    weight = sums.products.count.new_ones(1, 0 if window is None else min(window - 1, frames))
    if window is None:
        before = None if past is None else CellSums.from_tensors(past.sums)
        seen = sums.running(batch, before)

        def after() -> Past:
            return Past(frames, weight, sums=seen.map(lambda part: part.select(batch, -1).clone()).tensors)

        return seen, after
    held = sums
    if past is not None:
        earlier = CellSums.from_tensors([part.movedim(1, batch) for part in past.means if part is not None])
        held = CellSums.from_tensors(
            [torch.cat(pair, batch) for pair in zip(earlier.tensors, sums.tensors, strict=True)]
        )
    missing = window - 1 + own - held.products.count.shape[batch]
    padded = held.map(lambda part: F.pad(part, (*(0, 0) * (part.dim() - batch - 1), missing, 0)))

    def last() -> Past:
        kept = held.map(lambda part: part.narrow(batch, part.shape[batch] - weight.shape[1], weight.shape[1]))
        return Past(frames, weight, means=tuple([part.movedim(batch, 1).clone() for part in kept.tensors]))

    return padded.windowed(batch, window), last


class _Moments(NamedTuple):
    """What the cells share, in float64.

    Attributes:
        share: Share of each cell ``(*batch, n, 1)``.
        rows: Keys and values of the cells less their means ``(*batch, n, D + D_v)``.
        mean: Mean keys and values ``(*batch, 1, D + D_v)``.
        spread: Spread of each cell in units of the mean one ``(*batch, n, 1)``.
        within: Covariance of keys and values with keys inside cells ``(*batch, D + D_v, D)``.
    """

    share: Tensor
    rows: Tensor
    mean: Tensor
    spread: Tensor
    within: Tensor


def _clusters(
    sums: CellSums,
    dim: int,
    spread: Tensor | None,
    factor: Tensor,
    sizes: tuple[int, ...],
    label: Callable[[], Tensor],
    dtype: torch.dtype,
    masked: bool,
) -> tuple[Clusters, _Moments]:
    """Make tokens of sums."""
    (count, total), (whole, products) = sums.cells, sums.products
    count, whole, factor, width = count.unsqueeze(-1), whole.unsqueeze(-1), factor.to(total.dtype), products.shape[-2]
    every = nonzero(whole).unsqueeze(-1)
    rows, share = total / nonzero(count), count / every
    mean = (rows[..., :width] * share).sum(-2, keepdim=True)
    centred = (rows[..., :width] - mean) * (count > 0)
    covariance = products / every - mean.mT @ mean[..., :dim]
    within = covariance - (centred * share).mT @ centred[..., :dim]
    if spread is None:
        own = (rows[..., width:] - (rows[..., :dim] @ factor).square().sum(-1, keepdim=True)).clamp_min(0.0)
    else:
        own = spread.unsqueeze(-1).to(rows.dtype)
    typical = (own * share).sum(-2, keepdim=True)
    own = torch.where(typical > 0, own / nonzero(typical), 1.0)
    if sums.origin is not None:
        mean = mean + F.pad(sums.origin.to(mean.dtype), (0, width - dim))

    @torch.no_grad()
    def rho() -> Tensor:
        left, all_of_it = (_trace(each[..., :dim, :], factor) for each in (within, covariance))
        least = torch.finfo(whole.dtype).eps * (all_of_it + (mean[..., :dim] @ factor).square().sum((-2, -1)))
        return (left / nonzero(all_of_it) * (all_of_it > 8 * least)).to(dtype)

    moments, batch = _Moments(share, centred, mean, own, within), tuple(centred.shape[:-2])
    told: dict[str, Any] = {"weight": whole, "rho": rho, "label": label, "masked": masked}
    return Clusters(batch, sizes, **told, **_tokens(moments, dtype)), moments


def _trace(matrix: Tensor, factor: Tensor) -> Tensor:
    """Return the trace of Lᵀ C L, ``(*batch)``."""
    matrix = factor.mT @ matrix @ factor
    return matrix.diagonal(dim1=-2, dim2=-1).sum(-1)


def _tokens(moments: _Moments, dtype: torch.dtype) -> dict[str, Any]:
    """Put together what queries attend to, in the type in which they do."""
    share, rows, mean, spread, within = moments
    dim = within.shape[-1]
    level = share.clamp_min(torch.finfo(share.dtype).tiny).log()  # of an absent cell far below that of any other
    found = {
        "key": torch.cat([rows[..., :dim], spread, level], -1),
        "value": torch.cat([(rows[..., dim:] + mean[..., dim:]) * (share > 0), spread], -1),
        "covariance": within[..., dim:, :],
        "key_covariance": within[..., :dim, :],
        "mean": mean[..., :dim],
    }
    return {name: tensor.to(dtype) for name, tensor in found.items()}


def _controlled(
    clusters: Clusters, moments: _Moments, summary: Summary, label: Tensor, weight: Tensor | None, factor: Tensor
) -> Clusters:
    """Add the clusters of the additive parts of keys and values, known from where cells and indices of modes meet.

    With the effects of a mode, e = mean of its index less the grand mean: ``met`` is the mean of their sum over a cell,
    ``own`` + ``total`` the covariance of the sum over all positions, ``inside`` what of it is inside cells, ``alike``
    that of keys with their additive parts inside cells, and ``part`` the share β of the control, from 0 to 1.
    """
    factor = factor.to(moments.rows.dtype)
    share, rows, mean, spread, within = moments
    sizes, order, tokens, dim = summary.sizes, summary.order, rows.shape[-2], within.shape[-1]
    label = label.expand(*summary.batch, -1)
    met_by_chance = weight is not None  # without weights indices of two modes meet equally often
    weight = rows.new_ones(label.shape[-1]) if weight is None else weight.to(rows.dtype)
    weight = weight / weight.sum(-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    grid = weight.unflatten(-1, sizes)
    means = summary.tokens(dict.fromkeys((*main_effects(order), ()), 1))
    *effects, grand = torch.cat([means.key, means.value], -1).to(rows.dtype).split_with_sizes([*sizes, 1], -2)
    effects = [effect - grand for effect in effects]
    total = mean.new_zeros(())
    own, met = torch.zeros_like(within), torch.zeros_like(rows)
    for mode, effect in enumerate(effects):
        index = torch.arange(sizes[mode], device=rows.device)
        index = beside(index, mode, order).expand(sizes).reshape(-1)
        table = weight.new_zeros(*summary.batch, tokens * sizes[mode])
        table = table.scatter_add(-1, label * sizes[mode] + index, weight.expand(label.shape))
        met = met + table.unflatten(-1, (tokens, sizes[mode])) @ effect
        shares = grid.sum([k - order for k in range(order) if k != mode]) if order > 1 else grid
        own = own + effect.mT @ (shares.unsqueeze(-1) * effect[..., :dim])
        for other in range(mode) if met_by_chance else ():
            pair = grid.sum([k - order for k in range(order) if k not in (mode, other)]) if order > 2 else grid
            cross = effects[other].mT @ pair @ effect
            total = total + cross[..., :dim] + cross.mT[..., :dim]
    met = met / nonzero(share)
    inside = own + total - (met * share).mT @ met[..., :dim]
    alike = _trace((own - (rows * share).mT @ met[..., :dim])[..., :dim, :], factor)
    size = _trace(inside[..., :dim, :], factor)
    least = torch.finfo(rows.dtype).eps * _trace(own[..., :dim, :], factor)
    part = torch.where(size > least, alike / torch.where(size > least, size, 1.0), 0.0).clamp(0.0, 1.0)
    dtype = clusters.key.dtype
    additive = dataclasses.replace(clusters, **_tokens(_Moments(share, met, mean, spread, inside), dtype))
    return dataclasses.replace(clusters, control=(additive, summary, part.to(dtype)))


def _attend(
    query: Tensor,
    summary: Any,
    *,
    scale: float,
    return_lse: bool = False,
    return_attention: bool = False,
    **_: Any,
) -> AttentionResult:
    """Attend to the cells, some of the queries at a time."""
    asked: dict[str, Any] = {"scale": scale, "return_lse": return_lse, "return_attention": return_attention}
    if isinstance(summary, Summary):
        return _attend_to_all(query, summary, **asked)
    batch = len(summary.batch)
    positions = query.shape[batch:-1]
    flat = query.reshape(*query.shape[:batch], math.prod(positions), query.shape[-1])

    def attend(part: slice) -> tuple[Tensor | None, ...]:
        return _from_some(flat[..., part, :], summary, **asked)

    width = math.prod(flat.shape[:batch]) * max(
        flat.shape[-1], summary.key.shape[-2] * (return_lse or return_attention)
    )
    output, lse, attention = in_chunks(attend, flat.shape[-2], width, flat, *summary.tensors)
    assert output is not None
    shape = query.shape[:-1]
    lse = None if lse is None else lse.reshape(shape)
    cells = None if attention is None else (attention.reshape(*shape, attention.shape[-1]), summary.label())
    rho = summary.rho() if return_lse or return_attention else None
    return AttentionResult(output.reshape(*shape, output.shape[-1]), lse, cells, rho)


def _from_some(
    query: Tensor, clusters: Clusters, *, scale: float, return_lse: bool, return_attention: bool
) -> tuple[Tensor | None, ...]:
    """Attend from queries ``(*batch, L, D)``: outputs, log-sum-exps ``(*batch, L, 1)`` and weights of cells."""
    dim, keys = query.shape[-1], clusters.key
    with without_autocast(query.device):
        own = query.to(keys.dtype)
        # One softmax with further channels: s q·k_c, then ½ log(1 + τ²) times a_c, then 1 times the log of the share.
        key = torch.cat([keys[..., :dim] * scale, keys[..., dim:]], -1)
        square = (own @ (clusters.key_covariance * scale * scale) * own).sum(-1, keepdim=True).clamp_min(0.0)
        rows = torch.cat([own, torch.log1p(square) / 2, torch.ones_like(square)], -1)
        tokens = Tokens(key, clusters.value, None, (TokenSet(key.shape[-2]),))
        asked = {"return_lse": return_lse, "return_attention": return_attention}
        found = attend_tokens(rows, tokens, scale=1.0, **asked)
        output, spread = found.output.split([found.output.shape[-1] - 1, 1], -1)
        output = torch.addcmul(output, own @ (clusters.covariance.mT * scale), spread * torch.rsqrt(1 + square))
        lse, attention = found.lse, None if found.attention is None else found.attention[0]
        if lse is not None:
            total = nonzero(clusters.weight).log().unsqueeze(-1).to(own.dtype)
            lse = lse.unsqueeze(-1) + scale * (own @ clusters.mean.mT) + total
        if clusters.control is not None:
            output, lse = _control(query, output, lse, clusters, scale)
        if clusters.masked:
            live = clusters.weight.unsqueeze(-1) > 0
            output, lse = torch.where(live, output, 0.0), None if lse is None else torch.where(live, lse, -math.inf)
            attention = None if attention is None else attention * live
    return output.to(query.dtype), lse, attention


def _control(
    query: Tensor, output: Tensor, lse: Tensor | None, clusters: Clusters, scale: float
) -> tuple[Tensor, Tensor | None]:
    """Add what additive attention has beyond the cells of the additive parts."""
    assert clusters.control is not None
    additive, summary, part = clusters.control
    asked: dict[str, Any] = {"scale": scale, "return_lse": lse is not None}
    cells = _from_some(query, additive, **asked, return_attention=False)
    whole = ADDITIVE.attend(query, summary, **ADDITIVE.options, **asked)
    part = part[..., None, None]
    output = output + part * (whole.output - cells[0])
    if lse is not None:
        lse = lse + part * torch.where(lse > -math.inf, whole.lse.unsqueeze(-1) - cells[1], 0.0)
    return output, lse


def _attend_to_all(query: Tensor, summary: Summary, **asked: Any) -> AttentionResult:
    """Attend to every position as a cell of its own."""
    result = FLATTENED.attend(query, summary, **asked)
    rho = query.new_zeros(summary.batch, dtype=accumulation_dtype(query.dtype))
    if result.attention is None:
        return result._replace(rho=rho)
    label = (
        torch.arange(summary.positions, device=query.device)
        .reshape(summary.sizes)
        .expand(*summary.batch, *summary.sizes)
    )
    return result._replace(attention=(result.attention[0].flatten(-summary.order), label), rho=rho)


def _claims(
    *, tokens: int, cells: str | Cells, blocks: Sequence[int] | None, additive_control: bool
) -> frozenset[Claim]:
    """What holds whatever the cells are."""
    found = frozenset({Claim.KEY_SHIFT, Claim.VALUE_AFFINE, Claim.FIRST_ORDER, Claim.ZERO_SCALE_MEAN})
    found = found if isinstance(cells, Cells) else found | SYMMETRIES
    return found | {Claim.EXACT_ON_ADDITIVE} if additive_control else found


def _spread(attention: Sequence[Tensor], sizes: Sequence[int], at: At | None, base: Base, **_: Any) -> Tensor:
    """What a cell gets, shared by its positions by their weights; covariances inside cells are left out."""
    weights, label = attention
    label = label.flatten(-len(sizes))
    found = weights_of(weights, at, (weights.shape[-1],))
    between = found.dim() - label.dim()
    count = base.weights.flatten(-len(sizes)).expand(label.shape)
    total = count.new_zeros(*label.shape[:-1], weights.shape[-1]).scatter_add(-1, label, count)
    label, count, total = (each[(..., *(None,) * between, slice(None))] for each in (label, count, total))
    each = (found / nonzero(total)).gather(-1, label.expand(*found.shape[:-1], -1)) * count
    return each.unflatten(-1, tuple(sizes))


CLUSTERED = Operator(
    "clustered",
    clustered_attention,
    _needs,
    _attend,
    _claims,
    condense=_condense,
    spread=_spread,
    options={"tokens": TOKENS, "cells": "keys", "blocks": None, "additive_control": False},
    lacks=_lacks,
    by_place=lambda *, cells, **_: cells == "blocks",
)
