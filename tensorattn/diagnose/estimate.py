r"""The error estimate: how far an operator is from full attention, on given queries, keys and values.

No bound on the error is useful on real data (the provable one is many times too large), but the error itself is cheap
to estimate: full attention of 64 queries costs as much as 64 rows of the attention matrix, and gives the centred
relative error to about 3 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from tensorattn.diagnose.effects import precise
from tensorattn.errors import OptionError, ShapeError, retells
from tensorattn.modes import attention_shapes, is_integer
from tensorattn.operators import Operator, get_operator
from tensorattn.operators.flattened import flattened_attention
from tensorattn.presence import GivenWeights, Lengths, Mask
from tensorattn.summarizing import summarize
from tensorattn.weights import check_floating

__all__ = ["ErrorEstimate", "centred_error", "error_estimate", "sample_positions", "takes_any_positions"]

MEANINGLESS = {  # arguments of operators, and why an estimate takes none of them
    "causal": "sampled queries have no frames",
    "bias": "sampled queries have no place on the grid",
    "return_lse": "only outputs are compared",
    "return_attention": "only outputs are compared",
}


@dataclass(frozen=True)
class ErrorEstimate:
    r"""An estimated centred relative error :math:`\|O - F\| / \|F - \bar v\|`.

    Attributes:
        error: The estimate: 0 is exact, 1 is as far from full attention as the plain mean of the values.
        standard_error: How far the estimate is, typically, from the error over all queries.
        n_queries: Number of queries that it rests on.

    Examples:
        >>> print(ErrorEstimate(0.5731, 0.0124, 64))
        0.573 ± 0.012 (64 queries)
    """

    error: float
    standard_error: float
    n_queries: int

    def __str__(self) -> str:
        return f"{self.error:.3f} ± {self.standard_error:.3f} ({self.n_queries} queries)"


def centred_error(output: Tensor, exact: Tensor, mean: Tensor, *, population: int | None = None) -> ErrorEstimate:
    r"""Compare outputs with full attention on the same sampled queries.

    The estimate is the ratio estimator :math:`\sqrt{\sum_i a_i / \sum_i b_i}` over the sampled queries i, with
    :math:`a_i = \|O_i - F_i\|^2` and :math:`b_i = \|F_i - \bar v\|^2` summed over batch dimensions and channels. Its
    standard error is the jackknife over queries (each left out once), times :math:`\sqrt{1 - n/P}` where the n
    queries are drawn without replacement from ``population`` = P.

    Args:
        output: Output of an operator ``(*batch, L, D)``.
        exact: Output of full attention on the same queries.
        mean: Mean of the values ``(*batch, D)``, weighted as the operators were.
        population: Number of queries that the L were drawn from; without it, infinitely many.

    Returns:
        The estimate. Where full attention is the mean itself, the error is 0 if the outputs agree, else infinite.

    Raises:
        ShapeError: If output and exact differ in shape.

    Examples:
        >>> exact = torch.randn(4, 64, 16)
        >>> mean = exact.mean(dim=1)
        >>> centred_error(mean[:, None].expand_as(exact), exact, mean).error
        1.0
    """
    if output.shape != exact.shape:
        raise ShapeError(f"output has shape {tuple(output.shape)}, but exact has {tuple(exact.shape)}.")
    n_queries = exact.shape[-2]
    missed = _energy(output - exact)
    signal = _energy(exact - mean.unsqueeze(-2))
    error = _root_ratio(missed.sum(), signal.sum())
    if n_queries < 2:
        return ErrorEstimate(float(error), math.nan, n_queries)
    left_out = _root_ratio(missed.sum() - missed, signal.sum() - signal)
    variance = (left_out - left_out.mean()).square().sum() * (n_queries - 1) / n_queries
    unseen = 1.0 if population is None else 1 - n_queries / population
    return ErrorEstimate(float(error), float((unseen * variance).sqrt()), n_queries)


def _energy(difference: Tensor) -> Tensor:
    """Return the squared norm of every query, over batch dimensions and channels, in float64."""
    per_query = precise(difference).square().sum(dim=-1)
    return per_query.reshape(-1, per_query.shape[-1]).sum(dim=0)


def _root_ratio(above: Tensor, below: Tensor) -> Tensor:
    """Return the root of a ratio of sums of squares: 0 where both are 0, NaN where one is no number."""
    above, below = above.clamp(min=0), below.clamp(min=0)
    return torch.where((above == 0) & (below == 0), 0.0, (above / below).sqrt())


def sample_positions(count: int, n_queries: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw positions without replacement, all of them where there are too few.

    Args:
        count: Number of positions.
        n_queries: How many to draw.
        generator: Source of randomness.

    Returns:
        Indices in ascending order.

    Raises:
        OptionError: If fewer than two queries are asked for: one has no standard error.

    Examples:
        >>> sample_positions(4, 64)
        tensor([0, 1, 2, 3])
    """
    if not is_integer(n_queries) or n_queries < 2:
        raise OptionError(f"n_queries must be an integer of at least 2, got {n_queries!r}.")
    device = "cpu" if generator is None else generator.device
    return torch.randperm(count, generator=generator, device=device)[:n_queries].sort().values


def takes_any_positions(operator: Operator, options: Mapping[str, Any]) -> bool:
    """Tell whether an operator takes any list of queries, so that sampled queries can be evaluated alone.

    Args:
        operator: The operator.
        options: Its options. With ``include_self`` a query must be at a position of the grid.

    Returns:
        Whether it does.

    Examples:
        >>> [takes_any_positions(get_operator(name), {}) for name in ("additive", "axial")]
        [True, False]
    """
    return operator.query == "positions" and not options.get("include_self", False)


@retells
@torch.no_grad()
def error_estimate(
    operator: str | Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    order: int,
    n_queries: int = 64,
    scale: float | None = None,
    weights: GivenWeights = None,
    mask: Mask = None,
    lengths: Lengths = None,
    generator: torch.Generator | None = None,
    **options: Any,
) -> ErrorEstimate:
    r"""Estimate how far an operator is from full attention, on sampled queries.

    .. math:: \frac{\|O - F\|}{\|F - \bar v\|}

    O is the output, F flattened attention, and :math:`\bar v` the weighted mean of the values. The norms run over all
    batch dimensions, sampled queries and channels. Positions are drawn without replacement, the same ones for every
    batch index. It is a ratio estimator, and its standard error is the jackknife over the sampled positions: see
    `centred_error`. Costs 4PD operations a sampled query for P positions of the keys, plus the operator: on the
    sampled queries alone where it takes any positions, on all queries where it needs their grid.

    Args:
        operator: Name in the registry, or a function with the signature of `additive_attention`; a function is called
            on all queries.
        query: Queries, on the grid of the keys where the operator needs that.
        key: Keys over the grid.
        value: Values over the grid.
        order: Number of modes N.
        n_queries: Number of positions drawn; all of them where there are fewer.
        scale: Factor of the logits; 1/√D if None.
        weights: One non-negative vector a mode or None for equal weights, or one tensor over the grid: for the
            operator, for full attention and for the mean.
        mask: True where a position takes part.
        lengths: How many leading indices of each mode take part.
        generator: Source of randomness.
        **options: Options of the operator.

    Returns:
        The error, its standard error, and the number of queries.

    Raises:
        OptionError: If there is no such operator or option, ``n_queries`` is less than 2, or something is asked for
            that has no meaning for sampled queries: ``causal``, ``bias``, ``return_lse`` or ``return_attention``.
        ShapeError: If shapes disagree.
        DtypeError: If a tensor is not floating point, or the types differ.
        WeightsError: If weights do not fit the modes.

    Shape:
        - query: :math:`(*, P_1, \dots, P_M, D)`, key: :math:`(*, n_1, \dots, n_N, D)`
        - value: :math:`(*, n_1, \dots, n_N, D_v)`

    Examples:
        >>> rows, columns = torch.randn(2, 9, 1, 8).unbind(0)
        >>> x = rows + columns.transpose(0, 1)  # additive over two modes: additive attention is exact
        >>> error_estimate("additive", x, x, x, order=2, n_queries=16).error < 1e-4
        True
        >>> error_estimate("kao_kv", x, x, x, order=2, n_queries=16).error > 0.1
        True
    """
    for name, reason in MEANINGLESS.items():
        asked = options.pop(name, None)
        if asked is not None and asked is not False:
            raise OptionError(f"{name} has no meaning for an estimate: {reason}.")
    record = get_operator(operator) if isinstance(operator, str) else None
    if record is not None:
        record.with_defaults(options)
    check_floating(query=query, key=key, value=value)
    grid, _ = attention_shapes(query.shape, key.shape, value.shape, order)
    batch = grid.batch
    count = math.prod(query.shape[len(batch) : -1])
    positions = sample_positions(count, n_queries, generator).to(query.device)
    sampled = query.reshape(*batch, count, query.shape[-1])[..., positions, :]
    present: dict[str, Any] = {
        name: given for name, given in (("mask", mask), ("lengths", lengths)) if given is not None
    }
    settings: dict[str, Any] = {"order": order, "scale": scale, "weights": weights, **present}
    exact = cast(Tensor, flattened_attention(sampled, key, value, **settings))
    mean = summarize(value, value, order=order, kept=[()], weights=weights, **present).value(())
    if record is not None and takes_any_positions(record, options):
        output = record.function(sampled, key, value, **settings, **options)
    else:
        function: Any = operator if record is None else record.function
        everywhere = function(query, key, value, **settings, **options)
        output = everywhere.reshape(*batch, count, everywhere.shape[-1])[..., positions, :]
    return centred_error(output, exact, mean, population=count)
