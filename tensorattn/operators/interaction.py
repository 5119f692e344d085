r"""The interaction correction: what the marginal means of a family cannot see, to first order in the logit scale.

The derivative of attention at scale zero is the covariance of values and keys applied to the query. Marginal means
account for the covariance that they have among themselves; what is missing is

.. math:: C_{vk} = C^{\mathrm{tot}}_{vk} - \sum_U c_U\, \mathrm{Cov}(\bar v^U, \bar k^U),

so adding :math:`s\, C_{vk}\, q` makes the operator agree with flattened attention to first order for every tensor.
Where the interaction residual is Gaussian noise this is the whole correction; real residuals saturate, so it is
divided by :math:`\sqrt{1 + \tau^2 / \ell^2}` with :math:`\tau^2 = s^2 q^\top C_{kk}\, q`, which keeps the first order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tensorattn.contraction_tree import Kept
from tensorattn.errors import OptionError
from tensorattn.options import check_number
from tensorattn.summary import Summary
from tensorattn.weights import accumulation_dtype

__all__ = ["adds_softmaxes", "check_interaction", "correct", "marginal_covariance", "missing_covariance", "saturated"]

DEFAULT_SATURATION = 1.0  # of every operator that has an interaction


def adds_softmaxes(*, interaction: str | None = None, include_self: bool = False, **_: Any) -> bool:
    """Tell whether an operator is a sum of softmaxes over its tokens: without a correction, and without own tokens.

    Args:
        interaction: As in the operator.
        include_self: As in the operator.
    """
    return interaction is None and not include_self


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
        check_number(saturation, "saturation", "positive or None")
        if not saturation > 0:
            raise OptionError(f"saturation must be positive or None, got {saturation!r}.")
    if interaction is None and saturation != DEFAULT_SATURATION:
        hint = "Give interaction='linear' too, or leave saturation out."
        raise OptionError(f"saturation has no effect without interaction, got {saturation!r}.", hint=hint)


def marginal_covariance(summary: Summary, kept: Kept, of_keys: bool) -> Tensor:
    """Return the covariance that the means of one kept subset have among themselves.

    Args:
        summary: Summary that holds them and the grand mean.
        kept: Modes, ascending.
        of_keys: Whether to return that of the keys, ``(*batch, D, D)``, not that of values and keys.
    """
    tokens, grand = summary.tokens(kept), summary.tokens(())
    key = tokens.key - grand.key
    left = key if of_keys else tokens.value - grand.value
    if tokens.log_weight is None:
        return left.mT @ key / key.shape[-2]
    present = tokens.log_weight.amax(-1, keepdim=True) > -math.inf
    share = torch.softmax(torch.where(present, tokens.log_weight, 0.0), -1) * present
    return (left * share.unsqueeze(-1)).mT @ key


def missing_covariance(summary: Summary, counts: Mapping[Kept, int], of_keys: bool) -> Tensor:
    """Return the covariance that the means of a family do not account for.

    Args:
        summary: Summary with second moments.
        counts: How often each kept subset counts.
        of_keys: Whether to return that of the keys.
    """
    total = summary.key_covariance if of_keys else summary.covariance
    assert total is not None
    for kept, count in counts.items():
        if kept and count:
            total = total - count * marginal_covariance(summary, kept, of_keys)
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


def correct(
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
    """Add the correction to an output, and half of τ² to its log-sum-exp.

    Args:
        query: Queries ``(*batch, *positions, D)``.
        output: Output of the operator.
        lse: Its log-sum-exp, or None.
        summary: Summary with second moments.
        counts: How often each kept subset counts.
        scale: Factor of the logits.
        saturation: The ℓ that bounds the correction, or None.
        gain: Factor of the correction, broadcastable to the batch dimensions, or None.
    """
    batch = len(summary.batch)
    shape = query.shape
    flat = query.reshape(*shape[:batch], math.prod(shape[batch:-1]), shape[-1]).to(accumulation_dtype(query.dtype))
    term = scale * (flat @ missing_covariance(summary, counts, of_keys=False).mT)
    square = None
    if saturation is not None or lse is not None:
        keys = missing_covariance(summary, counts, of_keys=True)
        square = scale * scale * ((flat @ keys) * flat).sum(-1)
    if saturation is not None and square is not None:
        term = term / saturated(square, saturation)
    if gain is not None:
        term = term * gain[..., None, None]
    output = (output.to(term.dtype) + term.reshape(output.shape)).to(output.dtype)
    if lse is not None and square is not None:
        lse = lse + square.reshape(lse.shape) / 2
    return output, lse
