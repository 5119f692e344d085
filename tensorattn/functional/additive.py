r"""Additive and truncated attention: softmaxes over marginal means, counted by inclusion and exclusion.

Additive attention is the truncation to one mode. Both may add what marginal means cannot see, to first order in the
scale: the derivative of attention at scale zero is the covariance of values and keys applied to the query, of which the
means of a family account for the part that they have among themselves. What is missing is

.. math:: C_{vk} = C^{\mathrm{tot}}_{vk} - \sum_U c_U\, \mathrm{Cov}(\bar v^U, \bar k^U),

so adding :math:`s\, C_{vk}\, q` makes the operator agree with flattened attention to first order for every tensor.
Where the interaction residual is Gaussian noise this is the whole correction; real residuals saturate, so it is
divided by :math:`\sqrt{1 + \tau^2 / \ell^2}` with :math:`\tau^2 = s^2 q^\top C_{kk}\, q`, which keeps the first order.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from tensorattn.errors import ModesError, OptionError, ShapeError, check, is_integer
from tensorattn.functional.maps import At, Base, geometric, weights_of
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
)
from tensorattn.functional.softmax import merge_attention
from tensorattn.functional.summary import Needs, Summary
from tensorattn.masks import accumulation_dtype, matmul
from tensorattn.modes import Family, Kept, ModeSpec, check_order, mode_parts, mode_subsets

__all__ = [
    "ADDITIVE",
    "TRUNCATED",
    "additive_attention",
    "check_interaction",
    "counting_numbers",
    "kept_family",
    "missing_covariance",
    "saturated",
    "truncated_attention",
]

KeptModes = Iterable[Iterable[int]] | None

DEFAULT_SATURATION = 1.0  # of every operator that has an interaction


@attention_function
def additive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    order: int,
    interaction: str | None = None,
    saturation: float | None = 1.0,
    include_self: bool = False,
    **shared: Unpack[Shared],
) -> Any:
    r"""Attend from each query to the averages of each mode, one softmax a mode.

    .. math:: A(q) = \sum_m \sum_a p^m_a(q)\, \bar v^m[a] - (N - 1)\, \bar v,
        \qquad p^m_a(q) \propto w^m[a]\, e^{s\, q \cdot \bar k^m[a]}

    Equals flattened attention, its log-sum-exp included, for **every** query where keys and values are additive over
    the modes, that is a sum of one term a mode: the logits are then additive, so the softmax over the grid is the
    product of the softmaxes over its modes, and the mean of an additive value under a product is the sum of the means
    under its factors. On other data it is blind to the interactions of keys and values, unless ``interaction`` asks
    for their covariance. Costs 4SD operations a query for S = n_1 + … + n_N averages, and 4D² with the correction.

    Args:
        query: Queries.
        key: Keys.
        value: Values.
        order: Number of modes N.
        interaction: ``"linear"`` to add the covariance of the interaction residual, :math:`s\, C_{vk}\, q`, and
            :math:`\tau^2 / 2` to the log-sum-exp, with :math:`\tau^2 = s^2 q^\top C_{kk}\, q`. The result then agrees
            with flattened attention to first order in the scale for every tensor.
        saturation: The :math:`\ell` in :math:`s\, C_{vk}\, q / \sqrt{1 + \tau^2 / \ell^2}`, which bounds the term;
            None leaves it unbounded, as is right for Gaussian residuals only. To be left out without ``interaction``.
        include_self: Whether to merge the key and value at each query's own position as one more token; the query is
            then on the grid of the keys. It counts once, whatever ``weights`` say of the position, but not where a mask
            or lengths leave it out.
        **shared: What all operators share, as told below.

    A mask that is no product over modes makes masked averages, with the logarithm of the positions present behind each
    in the logits: an approximation, exact where the mask is a product.

    Returns:
        The output in the type of the query; an `AttentionResult` if more is asked for, whose ``attention`` holds one
        tensor ``(*batch, *positions, n_m)`` a mode, each summing to one. With ``include_self`` these are the weights
        among the averages, before the own token joins.

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
    options = {"interaction": interaction, "saturation": saturation, "include_self": include_self}
    return run(ADDITIVE, query, key, value, order=order, options=options, **shared)


@attention_function
def truncated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    order: int,
    kept: KeptModes = None,
    interaction_order: int | None = None,
    interaction: str | None = None,
    saturation: float | None = 1.0,
    include_self: bool = False,
    **shared: Unpack[Shared],
) -> Any:
    r"""Attend from each query to the marginal means of kept mode subsets, by inclusion and exclusion.

    .. math:: A_{\mathcal K}(q) = \sum_{U \in \mathcal K} c_U \sum_{a} p^U_a(q)\, \bar v^U[a],
        \qquad p^U_a(q) \propto w^U[a]\, e^{s\, q \cdot \bar k^U[a]}, \qquad \sum_{U' \supseteq U} c_{U'} = 1

    for all :math:`U` in the family :math:`\mathcal K`, which is closed downward. The counting numbers :math:`c_U` are
    integers. ``interaction_order=1`` is `additive_attention`, ``interaction_order=N`` flattened attention. Exact where
    the modes fall into independent groups that are kept; on data with overlapping interactions of the kept orders it
    agrees with flattened attention to first order in the scale. Costs 4D operations a query for every kept mean.

    Args:
        query: Queries.
        key: Keys.
        value: Values.
        order: Number of modes N.
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
        **shared: What all operators share, as told below.

    A mask that is no product over modes makes masked averages, with the logarithm of the positions present behind each
    in the logits: an approximation, exact where the mask is a product.
    A subset has the sum of the biases of its modes.

    Returns:
        The output in the type of the query; an `AttentionResult` if more is asked for, whose ``attention`` holds one
        tensor ``(*batch, *positions, *n_U)`` for each subset that counts, largest first.

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
    if shared.get("bias") is not None:
        bias = mode_parts(shared["bias"], order, "bias", "tensors", ShapeError)
        covered = {mode for subset in kept_family(order, kept, interaction_order) for mode in subset}
        for mode, part in enumerate(bias):
            if part is not None and mode not in covered:
                raise OptionError(f"bias of mode {mode} has no effect, as no subset in kept has the mode.")
    options = {
        "kept": kept,
        "interaction_order": interaction_order,
        "interaction": interaction,
        "saturation": saturation,
        "include_self": include_self,
    }
    return run(TRUNCATED, query, key, value, order=order, options=options, **shared)


def kept_family(order: int, kept: Iterable[Iterable[int]] | None, interaction_order: int | None) -> Family:
    """Return the mode subsets that a truncation keeps, as they were asked for.

    Args:
        order: Number of modes N.
        kept: Mode subsets, or None.
        interaction_order: Largest number of modes in a subset, or None.

    Returns:
        Subsets, each ascending, not yet closed downward. All pairs, if nothing is asked for.

    Raises:
        OptionError: If both are given, or the interaction order is not between 1 and N.
        ModesError: If a subset is empty, or names a mode that does not exist or twice the same.

    Examples:
        >>> kept_family(3, None, 2), kept_family(3, [(0,), (2, 1)], None)
        (((0, 1), (0, 2), (1, 2)), ((0,), (1, 2)))
    """
    if kept is not None and interaction_order is not None:
        raise OptionError("kept and interaction_order exclude each other, but both are given.")
    if kept is None:
        size = min(2, order) if interaction_order is None else interaction_order
        if not is_integer(size) or not 1 <= size <= order:
            raise OptionError(f"interaction_order must be an integer between 1 and order {order}, got {size!r}.")
        return tuple(itertools.combinations(range(order), size))
    spec = ModeSpec.parse(order)
    family = []
    for subset in mode_subsets(kept):
        modes = [spec.index(mode) for mode in subset]
        if not modes or len(set(modes)) < len(modes):
            raise ModesError(f"each subset in kept must name modes, none of them twice, got {tuple(modes)}.")
        family.append(tuple(sorted(modes)))
    if not family:
        raise ModesError("kept is empty, but at least one subset of modes must be kept.")
    return tuple(dict.fromkeys(family))


def counting_numbers(family: Family) -> dict[Kept, int]:
    r"""Return the counting number of every subset in the downward closure of a family.

    They are the integers with :math:`\sum_{U' \supseteq U} c_{U'} = 1` for every :math:`U` of the closure, so each
    effect that is kept counts exactly once.

    Args:
        family: Mode subsets, each ascending.

    Returns:
        Counting numbers by subset, larger subsets first; some may be zero.

    Examples:
        >>> counting_numbers(((0,), (1,), (2,)))
        {(0,): 1, (1,): 1, (2,): 1, (): -2}
        >>> counting_numbers(((0, 1), (1, 2)))
        {(0, 1): 1, (1, 2): 1, (0,): 0, (1,): -1, (2,): 0, (): 0}
    """
    closure = {part for kept in family for size in range(len(kept) + 1) for part in itertools.combinations(kept, size)}
    counts: dict[Kept, int] = {}
    for kept in sorted(closure, key=lambda part: (-len(part), part)):
        counts[kept] = 1 - sum(count for larger, count in counts.items() if set(kept) < set(larger))
    return counts


def check_interaction(interaction: str | None, saturation: float | None) -> None:
    """Check the options of the interaction correction.

    Args:
        interaction: None or ``"linear"``.
        saturation: Positive, or None for no saturation; without an interaction, left at its default.

    Raises:
        OptionError: If one has another value, or a saturation is given to no interaction.
    """
    if interaction not in (None, "linear"):
        raise OptionError(f"interaction must be None or 'linear', got {interaction!r}.")
    if saturation is not None:
        check(saturation, "saturation", "number", rule="positive or None")
        if not saturation > 0:
            raise OptionError(f"saturation must be positive or None, got {saturation!r}.")
    if interaction is None and saturation != DEFAULT_SATURATION:
        hint = "Give interaction='linear' too, or leave saturation out."
        raise OptionError(f"saturation has no effect without interaction, got {saturation!r}.", hint=hint)


def _needs(
    order: int,
    *,
    interaction: str | None,
    saturation: float | None,
    include_self: bool,
    kept: KeptModes = None,
    interaction_order: int | None = 1,
) -> Needs:
    """The means of every kept subset that counts."""
    check_interaction(interaction, saturation)
    counts = counting_numbers(kept_family(order, kept, interaction_order))
    return Needs(tuple([subset for subset, count in counts.items() if count]), second_moment=interaction is not None)


def _attend(
    query: Tensor,
    summary: Summary,
    *,
    scale: float,
    interaction: str | None,
    saturation: float | None,
    include_self: bool,
    kept: KeptModes = None,
    interaction_order: int | None = 1,
    return_lse: bool = False,
    return_attention: bool = False,
    bias: Bias | None = None,
    own: tuple[Tensor, ...] | None = None,
    gain: Tensor | None = None,
    **settings: Any,
) -> AttentionResult:
    """Attend to the means of each kept subset by a softmax of its own, each counted by its counting number."""
    batch, positions = len(summary.batch), query.shape[len(summary.batch) : -1]
    counts = counting_numbers(kept_family(summary.order, kept, interaction_order))
    counts = {subset: count for subset, count in counts.items() if count}
    tokens = summary.tokens(counts)
    if bias is not None:
        pairs = zip(tokens.sets, counts, strict=True)
        tokens = tokens._replace(sets=tuple([biased(each, u, bias, positions, summary.sizes) for each, u in pairs]))
    settings.update(scale=scale, return_lse=return_lse or include_self, return_attention=return_attention)
    output, lse, attention, alive = attend_positions(query, tokens, batch, **settings)
    if interaction is not None:
        output, lse = _correct(query, output, lse, summary, counts, scale=scale, saturation=saturation, gain=gain)
        if alive is not None:  # a query that sees nothing gives zero, whatever the option
            output = torch.where(alive.unsqueeze(-1), output, 0.0)
            lse = None if lse is None else torch.where(alive, lse, -math.inf)
    if own is not None and lse is not None:
        own_key, own_value, *hidden = own
        logit = scale * (query.to(lse.dtype) * own_key.to(lse.dtype)).sum(-1)
        for column in hidden:
            logit = torch.where(column.squeeze(-1) < 0, -math.inf, logit)
        output, lse = merge_attention([(output, lse), (own_value, logit)])
    if attention is not None:
        shown = [(subset, part) for subset, part in zip(counts, attention, strict=True) if subset]
        attention = tuple([part.unflatten(-1, [summary.sizes[mode] for mode in subset]) for subset, part in shown])
    return AttentionResult(output, lse if return_lse else None, attention)


def _marginal_covariance(summary: Summary, kept: Kept, of_keys: bool) -> Tensor:
    """Return the covariance that the means of one kept subset have among themselves, of values and keys or of keys."""
    tokens, grand = summary.tokens({kept: 1}), summary.tokens({(): 1})
    dtype = accumulation_dtype(tokens.key.dtype)
    key = tokens.key.to(dtype) - grand.key
    left = key if of_keys else tokens.value.to(dtype) - grand.value
    if tokens.log_weight is None:
        return matmul(left.mT, key) / key.shape[-2]
    present = tokens.log_weight.amax(-1, keepdim=True) > -math.inf
    share = torch.softmax(torch.where(present, tokens.log_weight, 0.0), -1) * present
    return matmul((left * share.unsqueeze(-1)).mT, key)


def missing_covariance(summary: Summary, counts: Mapping[Kept, int], of_keys: bool) -> Tensor:
    """Return the covariance that the means of a family do not account for.

    Args:
        summary: Summary with second moments.
        counts: How often each kept subset counts.
        of_keys: Whether to return that of the keys, not that of values and keys.
    """
    total = summary.key_covariance if of_keys else summary.covariance
    assert total is not None
    for kept, count in counts.items():
        if kept and count:
            total = total - count * _marginal_covariance(summary, kept, of_keys)
    return total


def saturated(square: Tensor, saturation: float) -> Tensor:
    """Return what bounds the correction, as a column: 1 in the first order of the scale.

    Where the weights of positions are no product over modes, main effects overlap and τ² may be negative: its size
    counts.

    Args:
        square: τ² of each query.
        saturation: The ℓ.
    """
    size = torch.where(square < 0, -square, square)  # not abs, whose second derivatives at zero are lost
    return (1 + size / saturation**2).sqrt().unsqueeze(-1)


def _correct(
    query: Tensor,
    output: Tensor,
    lse: Tensor | None,
    summary: Summary,
    counts: Mapping[Kept, int],
    *,
    scale: float,
    saturation: float | None,
    gain: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Add the correction to an output, times a gain a batch entry, and half of τ² to its log-sum-exp."""
    batch, shape = len(summary.batch), query.shape
    flat = query.reshape(*shape[:batch], math.prod(shape[batch:-1]), shape[-1]).to(accumulation_dtype(query.dtype))
    term = scale * matmul(flat, missing_covariance(summary, counts, of_keys=False).to(flat.dtype).mT)
    square = None
    if saturation is not None or lse is not None:
        keys = missing_covariance(summary, counts, of_keys=True).to(flat.dtype)
        square = scale * scale * (matmul(flat, keys) * flat).sum(-1)
    if saturation is not None and square is not None:
        term = term / saturated(square, saturation)
    if gain is not None:
        term = term * gain[..., None, None]
    output = (output.to(term.dtype) + term.reshape(output.shape)).to(output.dtype)
    if lse is not None and square is not None:
        lse = lse + square.reshape(lse.shape) / 2
    return output, lse


def _claims(
    *,
    interaction: str | None,
    saturation: float | None,
    include_self: bool,
    kept: KeptModes = None,
    interaction_order: int | None = 1,
) -> frozenset[Claim]:
    """What holds for sums of softmaxes over means, whichever are kept; exactness asks for all modes to be kept.

    So does leaving out a constant mode: sets of modes by name would not be the same sets afterwards. Single modes do
    not see interactions.
    """
    if include_self:
        claimed = SYMMETRIES
    else:
        claimed = frozenset(Claim) - {Claim.EXACT, Claim.CONVEX, Claim.FIRST_ORDER, Claim.INVISIBLE_INTERACTION}
        claimed = claimed | {Claim.FIRST_ORDER} if interaction is not None else claimed
    if kept is not None:
        return claimed - {Claim.EXACT_ON_ADDITIVE, Claim.LOG_SUM_EXP, Claim.CONSTANT_MODE}
    blind = interaction_order == 1 and interaction is None and not include_self
    return claimed | {Claim.INVISIBLE_INTERACTION} if blind else claimed


def _spread(
    attention: Sequence[Tensor],
    sizes: Sequence[int],
    at: At | None,
    base: Base,
    *,
    kept: KeptModes = None,
    interaction_order: int | None = 1,
    **_: Any,
) -> Tensor:
    """The product of the weights of the subsets, each to the power of its counting number: logits add up likewise."""
    counts = {u: c for u, c in counting_numbers(kept_family(len(sizes), kept, interaction_order)).items() if u and c}
    parts = zip(counts.items(), attention, strict=True)
    factors = [(u, weights_of(part, at, [sizes[mode] for mode in u]), count) for (u, count), part in parts]
    return geometric(factors, base.weights, len(sizes))


OWN_OPTIONS = {"interaction": None, "saturation": DEFAULT_SATURATION, "include_self": False}

ADDITIVE = Operator("additive", additive_attention, _needs, _attend, _claims, options=OWN_OPTIONS, spread=_spread)

TRUNCATED = Operator(
    "truncated",
    truncated_attention,
    _needs,
    _attend,
    _claims,
    options={"kept": None, "interaction_order": None, **OWN_OPTIONS},
    spread=_spread,
)
