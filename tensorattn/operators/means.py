"""Softmax attention to marginal means, counted by inclusion and exclusion: what additive and truncated share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tensorattn.contraction_tree import Family, Kept
from tensorattn.operators.interaction import check_interaction, correct
from tensorattn.operators.operator import AttentionResult, Claim, attend_positions
from tensorattn.operators.position import Bias, biased
from tensorattn.softmax import merge_attention
from tensorattn.summarizing import Needs
from tensorattn.summary import Summary

__all__ = ["attend_to_means", "means_claims", "means_needs"]


def means_needs(counts: Mapping[Kept, int], interaction: str | None, saturation: float | None) -> Needs:
    """Return the means that count; with the correction, the grand mean and second moments too.

    Args:
        counts: Counting number of each kept subset.
        interaction: None or ``"linear"``.
        saturation: Bound of the correction, or None.
    """
    check_interaction(interaction, saturation)
    kept = tuple(kept for kept, count in counts.items() if count)
    if interaction is not None and () not in kept:
        kept = (*kept, ())
    return Needs(kept, second_moment=interaction is not None)


def means_claims(interaction: str | None, include_self: bool) -> frozenset[Claim]:
    """Return the properties of a sum of softmaxes over means.

    Args:
        interaction: None or ``"linear"``.
        include_self: Whether the own token of each query is merged.
    """
    if include_self:
        return frozenset({Claim.KEY_SHIFT, Claim.VALUE_AFFINE, Claim.ROTATION})
    common = frozenset(Claim) - {Claim.EXACT, Claim.CONVEX, Claim.FIRST_ORDER, Claim.INVISIBLE_INTERACTION}
    return common | {Claim.FIRST_ORDER} if interaction is not None else common


def attend_to_means(
    query: Tensor,
    summary: Summary,
    counts: Mapping[Kept, int],
    *,
    shown: Family,
    scale: float,
    interaction: str | None,
    saturation: float | None,
    include_self: bool,
    return_lse: bool,
    return_attention: bool,
    bias: Bias | None = None,
    own: tuple[Tensor, ...] | None = None,
    gain: Tensor | None = None,
    **settings: Any,
) -> AttentionResult:
    """Attend to the means of every subset that counts.

    Args:
        query: Queries ``(*batch, *positions, D)``.
        summary: Summary of keys and values.
        counts: Counting number of each kept subset.
        shown: Subsets whose attention weights are returned.
        scale: Factor of the logits.
        interaction: None or ``"linear"``.
        saturation: Bound of the correction, or None.
        include_self: Whether the own token of each query is merged.
        return_lse: Whether to return the log-sum-exp.
        return_attention: Whether to return the attention weights.
        bias: Position bias, or None.
        own: Key and value at the position of each query, with ``include_self``, and a column that is added to their
            logits if some are absent.
        gain: Factor of the correction a batch entry, or None.
        **settings: Dropout.
    """
    positions = query.shape[len(summary.batch) : -1]
    kept = [subset for subset, count in counts.items() if count]
    sets = [biased(summary.tokens(subset, counts[subset]), subset, bias, positions, summary.sizes) for subset in kept]
    output, lse, attention = attend_positions(
        query,
        summary,
        sets,
        scale=scale,
        return_lse=return_lse or include_self,
        return_attention=return_attention,
        **settings,
    )
    if interaction is not None:
        output, lse = correct(query, output, lse, summary, counts, scale=scale, saturation=saturation, gain=gain)
    if own is not None and lse is not None:
        own_key, own_value, *hidden = own
        logit = scale * (query.to(lse.dtype) * own_key.to(lse.dtype)).sum(-1)
        for column in hidden:
            logit = torch.where(column.squeeze(-1) < 0, -math.inf, logit)
        output, lse = merge_attention([(output, lse), (own_value, logit)])
    if attention is not None:
        by_subset = dict(zip(kept, attention, strict=True))
        grids = {subset: [summary.sizes[mode] for mode in subset] for subset in shown}
        attention = tuple(by_subset[subset].unflatten(-1, grids[subset]) for subset in shown)
    return AttentionResult(output, lse if return_lse else None, attention)
