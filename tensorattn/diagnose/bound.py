r"""The error bound: how far flattened attention can be from additive attention, by theorem.

It is zero for additive tensors, goes to zero with the interaction residuals and with the scale, and is attained by the
exclusive-or of two modes. On real data it is many times too large: it tests a claim, it does not estimate an error.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tensorattn.diagnose.effects import Effects, Grid, along_mode, precise, read_grid, split
from tensorattn.errors import OptionError, retells
from tensorattn.modes import attention_shapes
from tensorattn.operators.operator import default_scale
from tensorattn.weights import Vector, check_floating

__all__ = ["error_bound"]

CHUNK = 1 << 20  # logits held at a time: 8 MB in float64


@retells
@torch.no_grad()
def error_bound(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    order: int,
    scale: float | None = None,
    weights: Sequence[Vector] | None = None,
    oscillation: str = "cheap",
) -> Tensor:
    r"""Bound the distance of flattened attention from additive attention, for each query and any tensors.

    .. math:: \|F(q) - A(q)\| \le D_v \tanh \tfrac{\Delta(q)}{4} + \min\Big(\max_j \|R^v_j\|,\;
        \sigma_v \sqrt{\textstyle\prod_m (1 + \chi_m^2(q)) - 1 - \sum_m \chi_m^2(q)}\Big)

    with the interaction residuals :math:`R^k, R^v` of keys and values, and over the positions of positive weight
    :math:`\Delta` the range of :math:`s\, q \cdot R^k_j` and :math:`D_v` the diameter of the values.
    :math:`\sigma_v^2` is the largest eigenvalue of :math:`\sum_j u_j R^v_j R^{v\top}_j` for the shares
    :math:`u_j = \prod_m u^m[j_m]` of the weight, and :math:`\chi_m^2 = \sum_a p^m_a(q)^2 / u^m[a] - 1` for the softmax
    :math:`p^m` of additive attention along mode m.

    The product of the :math:`p^m` is the softmax P of the additive part of the keys, weights included, so
    :math:`A = \mathrm E_P[v - R^v]`; full attention is P tilted by :math:`e^{s q \cdot R^k}`. Such a tilt has a total
    variation of at most :math:`\tanh(\Delta/4)`, and moves a mean by at most that times the diameter. The rest,
    :math:`\mathrm E_P[R^v]`, is a mean of residuals, and the inner product of :math:`R^v` with the interaction part of
    the density of P, as :math:`R^v` is orthogonal to additive functions under u: hence Cauchy-Schwarz.

    Args:
        query: Queries: the grid of the keys, another grid, or a list of tokens.
        key: Keys over the grid.
        value: Values over the grid; their head size may differ.
        order: Number of modes N.
        scale: Factor of the logits; 1/√D if None.
        weights: One non-negative vector a mode, or None for equal weights; multiplicities.
        oscillation: ``"exact"`` for the range :math:`\Delta` itself, at 2PD operations a query as for full attention,
            or ``"cheap"`` for :math:`2 |s| \|q\| \max_j \|R^k_j\|`, at 2SD for S = n_1 + … + n_N averages.

    Returns:
        The bound, computed in float64 and not rounded to the type of the query, for outputs without rounding errors.
        Of the diameter it knows at most twice the distance from the mean or from the middle of the range, which is
        exact for one channel.

    Raises:
        ShapeError: If batch dimensions, mode sizes or head sizes disagree, or a mode is empty.
        DtypeError: If a tensor is not floating point, or the types differ.
        WeightsError: If weights have the wrong length, are negative, not finite, or all zero.
        OptionError: If ``oscillation`` is neither of the two.

    Shape:
        - query: :math:`(*, P_1, \dots, P_M, D)` with any number M of position dimensions
        - key: :math:`(*, n_1, \dots, n_N, D)`, value: :math:`(*, n_1, \dots, n_N, D_v)`
        - bound: :math:`(*, P_1, \dots, P_M)`

    Examples:
        >>> import tensorattn as ta
        >>> x = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])[..., None]  # exclusive or: nothing is additive
        >>> q = torch.tensor([[0.05]])
        >>> error = ta.flattened_attention(q, x, x, order=2) - ta.additive_attention(q, x, x, order=2)
        >>> [round(float(number), 4) for number in (error, error_bound(q, x, x, order=2))]
        [0.05, 0.05]
    """
    if oscillation not in ("cheap", "exact"):
        raise OptionError(f"oscillation must be 'cheap' or 'exact', got {oscillation!r}.")
    check_floating(query=query, key=key, value=value)
    shape, _ = attention_shapes(query.shape, key.shape, value.shape, order)
    grid = read_grid(key, shape, weights)
    factor = default_scale(shape.dim) if scale is None else scale
    positions = query.shape[len(shape.batch) : -1]
    queries = precise(query).reshape(*shape.batch, positions.numel(), shape.dim) * factor
    keys, values = split(key, grid), split(value, grid)
    largest_residual = _largest_norm(values.residual, grid)
    deviation = _deviation(values, grid)
    excess = _in_chunks(functools.partial(_excess, keys=keys, grid=grid), queries, sum(shape.sizes))
    # Where there is no residual of the values, an overflowing excess times no deviation is no number.
    remainder = torch.fmin(largest_residual.unsqueeze(-1), deviation.unsqueeze(-1) * excess.sqrt())
    if oscillation == "cheap":
        tilt = 2 * queries.norm(dim=-1) * _largest_norm(keys.residual, grid).unsqueeze(-1)
    else:
        tilt = _in_chunks(functools.partial(_range, keys=keys, grid=grid), queries, math.prod(shape.sizes))
    bound = _diameter(values, grid).unsqueeze(-1) * (tilt / 4).tanh() + remainder
    return bound.reshape(query.shape[:-1])


def _in_chunks(function: functools.partial[Tensor], queries: Tensor, width: int) -> Tensor:
    """Apply a function with ``width`` intermediate numbers a query to ``(*batch, L, D)``, some queries at a time."""
    step = max(1, CHUNK // max(1, math.prod(queries.shape[:-2]) * width))
    return torch.cat([function(part) for part in queries.split(step, -2)], -1)


def _largest_norm(tensor: Tensor, grid: Grid) -> Tensor:
    """Largest norm of a position; those that do not count are zero."""
    return tensor.norm(dim=-1).amax(grid.modes)


def _diameter(values: Effects, grid: Grid) -> Tensor:
    """At least the largest distance of two values: twice the largest distance from some centre."""
    mean = values.mean.reshape(*values.mean.shape[:-1], *(1 for _ in grid.modes), values.mean.shape[-1])
    around_mean = _largest_norm(grid.present_or(values.centred - mean, 0.0), grid)
    return 2 * torch.minimum(_largest_norm(values.centred, grid), around_mean)


def _deviation(values: Effects, grid: Grid) -> Tensor:
    """Largest standard deviation of the residual in any direction of its channels."""
    weighed = values.residual
    for mode, share in enumerate(grid.shares(weighed)):
        weighed = weighed * along_mode(share, mode, len(grid.modes)).unsqueeze(-1)
    batch = len(grid.shape.batch)
    covariance = weighed.flatten(batch, -2).mT @ values.residual.flatten(batch, -2)
    # A zero before them, for values without channels and for eigenvalues that rounding makes negative.
    return F.pad(torch.linalg.eigvalsh(covariance), (1, 0)).amax(-1).sqrt()


def _excess(queries: Tensor, keys: Effects, grid: Grid) -> Tensor:
    """Chi-squared of the product of the modes' softmaxes, less that of its factors: the sum of all their products."""
    first = higher = queries.new_zeros(queries.shape[:-1])
    for effect, share in zip(keys.main, grid.shares(queries), strict=True):
        chi = _chi_squared(queries @ effect.mT, share.unsqueeze(-2))
        higher = higher + chi * (first + higher)
        first = first + chi
    return higher


def _chi_squared(logits: Tensor, shares: Tensor) -> Tensor:
    """Weighted mean square of ``p / share - 1`` for the weighted softmax p, without cancellation for small logits."""
    below = logits - logits.masked_fill(shares == 0, -torch.inf).amax(-1, keepdim=True)
    less = (shares * below.clamp(max=0).expm1()).sum(-1, keepdim=True)
    log_mean = torch.where(less < -0.5, (shares * below.clamp(max=0).exp()).sum(-1, keepdim=True).log(), less.log1p())
    deviation = (below - log_mean).expm1()
    return (shares * deviation.square().masked_fill(shares == 0, 0.0)).sum(-1)


def _range(queries: Tensor, keys: Effects, grid: Grid) -> Tensor:
    """Range of the logits with the residual of the keys, over the positions that count."""
    batch = len(grid.shape.batch)
    logits = queries @ keys.residual.flatten(batch, -2).mT
    if grid.present is None:
        return logits.amax(-1) - logits.amin(-1)
    absent = ~grid.present.flatten(-len(grid.modes)).unsqueeze(-2)
    high, low = logits.masked_fill(absent, -torch.inf).amax(-1), logits.masked_fill(absent, torch.inf).amin(-1)
    return (high - low).clamp(min=0)
