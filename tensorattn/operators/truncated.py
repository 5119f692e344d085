"""Truncated attention: inclusion–exclusion over the marginal means of kept mode subsets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from tensorattn.errors import OptionError, ShapeError, retells
from tensorattn.modes import check_order, mode_parts, mode_subsets
from tensorattn.operators.interaction import adds_softmaxes
from tensorattn.operators.means import attend_to_means, means_claims, means_needs
from tensorattn.operators.operator import AttentionResult, Claim, Operator, run
from tensorattn.operators.spreading import At, Base, geometric, weights_of
from tensorattn.presence import GivenWeights, Lengths, Mask
from tensorattn.summarizing import Needs
from tensorattn.summary import Summary
from tensorattn.truncation import counting_numbers, kept_family

__all__ = ["OPERATOR", "truncated_attention"]

KeptModes = Iterable[Iterable[int]] | None


def attend(
    query: Tensor, summary: Summary, *, kept: KeptModes, interaction_order: int | None, **settings: Any
) -> AttentionResult:
    """Attend to the means of each kept subset by a softmax of its own, each counted by its counting number."""
    counts = counting_numbers(kept_family(summary.order, kept, interaction_order))
    return attend_to_means(query, summary, counts, shown=tuple(u for u, c in counts.items() if u and c), **settings)


@retells
def truncated_attention(
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
    kept: KeptModes = None,
    interaction_order: int | None = None,
    interaction: str | None = None,
    saturation: float | None = 1.0,
    include_self: bool = False,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    return_attention: bool = False,
) -> Tensor | AttentionResult:
    r"""Attend from each query to the marginal means of kept mode subsets, by inclusion and exclusion.

    .. math:: A_{\mathcal K}(q) = \sum_{U \in \mathcal K} c_U \sum_{a} p^U_a(q)\, \bar v^U[a],
        \qquad p^U_a(q) \propto w^U[a]\, e^{s\, q \cdot \bar k^U[a]}, \qquad \sum_{U' \supseteq U} c_{U'} = 1

    for all :math:`U` in the family :math:`\mathcal K`, which is closed downward. The counting numbers :math:`c_U` are
    integers. ``interaction_order=1`` is `additive_attention`, ``interaction_order=N`` flattened attention. Exact where
    the modes fall into independent groups that are kept; on data with overlapping interactions of the kept orders it
    agrees with flattened attention to first order in the scale. Costs 4D operations a query for every kept mean.

    Args:
        query: Queries: the grid of the keys, another grid, or a list of tokens.
        key: Keys over the grid.
        value: Values over the grid; their head size may differ.
        order: Number of modes N.
        scale: Factor of the logits; 1/√D if None.
        weights: One non-negative vector a mode or None for equal weights, or one tensor over the grid: multiplicities,
            so 2 counts an index, or a position, as if it were repeated, and 0 as if it were absent.
        mask: True where a position takes part, ``(*batch, n_1, …, n_N)`` or broadcastable in the batch.
            One that is no product over modes makes masked averages, with the logarithm of the positions present behind
            each in the logits: an approximation, exact where the mask is a product.
        lengths: How many leading indices of each mode take part, a mask that is a product over modes: integers
            ``(*batch, N)``, or one entry a mode, None for all.
        bias: One tensor ``(P_m, n_m)`` or ``(*batch, P_m, n_m)`` a mode, or None for no bias: added to the logits of a
            query at place :math:`i_m` of mode m for the indices of that mode. Minus infinity hides an index.
            A subset has the sum of the biases of its modes.
        causal: A mode whose frames a query sees up to its own only, whatever the data; the query is then on a grid with
            the frames of the keys.
        kept: Mode subsets to keep, such as ``[(0,), (1, 2)]``; all their subsets are kept too.
        interaction_order: Keep all subsets of at most this many modes, in place of ``kept``. By default two, or all
            modes where there are fewer.
        interaction: ``"linear"`` to add the covariance of the interaction residual, :math:`s\, C_{vk}\, q`, and
            :math:`\tau^2 / 2` to the log-sum-exp, with :math:`\tau^2 = s^2 q^\top C_{kk}\, q`. The result then agrees
            with flattened attention to first order in the scale for every tensor.
        saturation: The :math:`\ell` in :math:`s\, C_{vk}\, q / \sqrt{1 + \tau^2 / \ell^2}`, which bounds the term;
            None leaves it unbounded, as is right for Gaussian residuals only. To be left out without ``interaction``.
        include_self: Whether to merge the key and value at each query's own position as one more token; the query is
            then on the grid of the keys. It counts once, whatever ``weights`` say of the position, but not where a mask
            or lengths leave it out.
        dropout_p: Probability of dropping an attention weight, whenever it is not 0.
        return_lse: Whether to return the log-sum-exp too, :math:`\sum_U c_U \mathrm{LSE}_U`.
        return_attention: Whether to return the attention weights too.

    Returns:
        The output in the type of the query; an `AttentionResult` if more is asked for, whose ``attention`` holds one
        tensor ``(*batch, *positions, *n_U)`` for each subset that counts, largest first.

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
        >>> groups = torch.randn(3, 4, 1, 8, dtype=torch.float64) + torch.randn(5, 8, dtype=torch.float64)
        >>> q = torch.randn(7, 8, dtype=torch.float64)
        >>> exact = ta.flattened_attention(q, groups, groups, order=3)
        >>> torch.allclose(ta.truncated_attention(q, groups, groups, order=3, kept=[(0, 1), (2,)]), exact)
        True

    """
    check_order(order)
    kept = None if kept is None else mode_subsets(kept)
    if bias is not None:
        bias = mode_parts(bias, order, "bias", "tensors", ShapeError)
        covered = {mode for subset in kept_family(order, kept, interaction_order) for mode in subset}
        for mode, part in enumerate(bias):
            if part is not None and mode not in covered:
                raise OptionError(f"bias of mode {mode} has no effect, as no subset in kept has the mode.")
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
        kept=kept,
        interaction_order=interaction_order,
        interaction=interaction,
        saturation=saturation,
        include_self=include_self,
    )


def needs(
    order: int,
    *,
    kept: KeptModes,
    interaction_order: int | None,
    interaction: str | None,
    saturation: float | None,
    include_self: bool,
) -> Needs:
    """The means of every kept subset that counts."""
    counts = counting_numbers(kept_family(order, kept, interaction_order))
    return means_needs(counts, interaction, saturation)


def claims(
    *,
    kept: KeptModes,
    interaction_order: int | None,
    interaction: str | None,
    saturation: float | None,
    include_self: bool,
) -> frozenset[Claim]:
    """What holds for sums of softmaxes over means, whichever are kept; exactness asks for all modes to be kept.

    So does leaving out a constant mode: sets of modes by name would not be the same sets afterwards. Of single modes
    it is the additive operator, which does not see interactions.
    """
    claimed = means_claims(interaction, include_self)
    if kept is not None:
        return claimed - {Claim.EXACT_ON_ADDITIVE, Claim.LOG_SUM_EXP, Claim.CONSTANT_MODE}
    blind = interaction_order == 1 and interaction is None and not include_self
    return claimed | {Claim.INVISIBLE_INTERACTION} if blind else claimed


def spread(
    attention: Sequence[Tensor],
    sizes: Sequence[int],
    at: At | None,
    base: Base,
    *,
    kept: KeptModes,
    interaction_order: int | None,
    **_: Any,
) -> Tensor:
    """The product of the weights of the subsets, each to the power of its counting number: logits add up likewise."""
    counts = {u: c for u, c in counting_numbers(kept_family(len(sizes), kept, interaction_order)).items() if u and c}
    parts = zip(counts.items(), attention, strict=True)
    factors = [(u, weights_of(part, at, [sizes[mode] for mode in u]), count) for (u, count), part in parts]
    return geometric(factors, base.weights, len(sizes))


OPERATOR = Operator(
    "truncated",
    truncated_attention,
    needs,
    attend,
    claims,
    options={"kept": None, "interaction_order": None, "interaction": None, "saturation": 1.0, "include_self": False},
    spread=spread,
    absorbs=adds_softmaxes,
)
