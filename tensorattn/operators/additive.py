"""Additive attention: one softmax a mode over its averages, less N−1 times the mean value. The default."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tensorattn.contraction_tree import main_effects
from tensorattn.errors import retells
from tensorattn.operators.interaction import adds_softmaxes
from tensorattn.operators.means import attend_to_means, means_claims, means_needs
from tensorattn.operators.operator import AttentionResult, Claim, Operator, run
from tensorattn.operators.spreading import At, Base, geometric, weights_of
from tensorattn.presence import GivenWeights, Lengths, Mask
from tensorattn.summarizing import Needs
from tensorattn.summary import Summary
from tensorattn.truncation import counting_numbers

__all__ = ["OPERATOR", "additive_attention"]


def attend(query: Tensor, summary: Summary, **settings: Any) -> AttentionResult:
    """Attend to each mode's averages by a softmax of its own, and count the grand mean 1−N times."""
    counts = counting_numbers(main_effects(summary.order))
    return attend_to_means(query, summary, counts, shown=main_effects(summary.order), **settings)


@retells
def additive_attention(
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
    interaction: str | None = None,
    saturation: float | None = 1.0,
    include_self: bool = False,
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
    under its factors. On other data it is blind to the interactions of keys and values, unless ``interaction`` asks
    for their covariance. Costs 4SD operations a query for S = n_1 + … + n_N averages, and 4D² with the correction.

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
            Exact where keys and values are additive.
        causal: A mode whose frames a query sees up to its own only, whatever the data; the query is then on a grid with
            the frames of the keys.
        interaction: ``"linear"`` to add the covariance of the interaction residual, :math:`s\, C_{vk}\, q`, and
            :math:`\tau^2 / 2` to the log-sum-exp, with :math:`\tau^2 = s^2 q^\top C_{kk}\, q`. The result then agrees
            with flattened attention to first order in the scale for every tensor.
        saturation: The :math:`\ell` in :math:`s\, C_{vk}\, q / \sqrt{1 + \tau^2 / \ell^2}`, which bounds the term;
            None leaves it unbounded, as is right for Gaussian residuals only. To be left out without ``interaction``.
        include_self: Whether to merge the key and value at each query's own position as one more token; the query is
            then on the grid of the keys. It counts once, whatever ``weights`` say of the position, but not where a mask
            or lengths leave it out.
        dropout_p: Probability of dropping an attention weight, whenever it is not 0.
        return_lse: Whether to return the log-sum-exp too: that of all logits, where keys are additive.
        return_attention: Whether to return the attention weights too.

    Returns:
        The output in the type of the query; an `AttentionResult` if more is asked for, whose ``attention`` holds one
        tensor ``(*batch, *positions, n_m)`` a mode, each summing to one. With ``include_self`` these are the weights
        among the averages, before the own token joins.

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
        >>> rows, columns = torch.randn(4, 1, 8, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
        >>> x, q = rows + columns, torch.randn(7, 8, dtype=torch.float64)
        >>> torch.allclose(ta.additive_attention(q, x, x, order=2), ta.flattened_attention(q, x, x, order=2))
        True
        >>> padded, mask = torch.randn(1, 4, 5, 8), torch.ones(1, 4, 5, dtype=torch.bool)
        >>> mask[:, 3:], mask[:, :, 2:], padded[:, 3:] = False, False, float("nan")
        >>> cropped = ta.additive_attention(padded[:, :3, :2], padded[:, :3, :2], padded[:, :3, :2], order=2)
        >>> masked = ta.additive_attention(padded[:, :3, :2], padded, padded, order=2, mask=mask)
        >>> torch.allclose(masked, cropped, atol=1e-6)
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
        mask=mask,
        lengths=lengths,
        bias=bias,
        causal=causal,
        dropout_p=dropout_p,
        return_lse=return_lse,
        return_attention=return_attention,
        interaction=interaction,
        saturation=saturation,
        include_self=include_self,
    )


def needs(order: int, *, interaction: str | None, saturation: float | None, include_self: bool) -> Needs:
    """The mode averages and the grand mean."""
    return means_needs(counting_numbers(main_effects(order)), interaction, saturation)


def claims(*, interaction: str | None, saturation: float | None, include_self: bool) -> frozenset[Claim]:
    """What holds for sums of softmaxes over means."""
    blind = interaction is None and not include_self
    return means_claims(interaction, include_self) | ({Claim.INVISIBLE_INTERACTION} if blind else frozenset())


def spread(attention: Sequence[Tensor], sizes: Sequence[int], at: At | None, base: Base, **_: Any) -> Tensor:
    """The product of the weights of the modes: the softmax of additive logits."""
    parts = enumerate(zip(attention, sizes, strict=True))
    factors = [((mode,), weights_of(part, at, (size,)), 1) for mode, (part, size) in parts]
    return geometric(factors, base.weights, len(sizes))


OPERATOR = Operator(
    "additive",
    additive_attention,
    needs,
    attend,
    claims,
    options={"interaction": None, "saturation": 1.0, "include_self": False},
    spread=spread,
    absorbs=adds_softmaxes,
)
