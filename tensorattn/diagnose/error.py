r"""How far an operator is from full attention: estimated on sampled queries, and bounded by theorem.

The estimate is for real data: full attention of 64 queries costs as much as 64 rows of the attention matrix, and gives
the centred relative error to about 3 %. The bound is many times too large there. It tests a claim: it is zero for
additive tensors, goes to zero with the interaction residuals and with the scale, and is attained by the exclusive-or of
two modes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tensorattn.diagnose.effects import Effects, precise, scaled_queries, shares_of, split
from tensorattn.errors import OptionError, ShapeError, check, is_integer, retells
from tensorattn.functional import AttentionResult, Operator, get_operator
from tensorattn.functional.cells import Cells
from tensorattn.functional.summary import summarize
from tensorattn.masks import check_floating
from tensorattn.modes import attention_shape

__all__ = [
    "ErrorEstimate",
    "TokenChoice",
    "centred_error",
    "choose_tokens",
    "error_bound",
    "error_estimate",
    "sample_positions",
    "takes_any_positions",
]

MEANINGLESS = {  # arguments of operators, and why an estimate takes none of them
    "causal": "sampled queries have no frames",
    "bias": "sampled queries have no place on the grid",
    "return_lse": "only outputs are compared",
    "return_attention": "only outputs are compared",
}
FEWEST_TOKENS = 8  # that are tried
ROUNDING = 4  # units in the last place by which outputs that are equal may differ
CHUNK = 1 << 20  # logits that the bound holds at a time: 8 MB in float64


@dataclass(frozen=True)
class ErrorEstimate:
    r"""An estimated centred relative error :math:`\|O - F\| / \|F - \bar v\|`.

    Attributes:
        error: The estimate: 0 is exact, 1 is as far from full attention as the plain mean of the values.
        standard_error: How far the estimate is, typically, from the error over all queries.
        n_queries: Number of queries that it rests on.
        rho: Of `clustered_attention`, the share of the variance of the logits that is left inside cells, the largest
            over batch and heads: a warning that needs no full attention. None of other operators.

    Examples:
        >>> print(ErrorEstimate(0.5731, 0.0124, 64))
        0.573 ± 0.012 (64 queries)
        >>> print(ErrorEstimate(0.0042, 0.0003, 64, rho=0.0125))
        0.004 ± 0.000 (64 queries), rho 0.013
    """

    error: float
    standard_error: float
    n_queries: int
    rho: float | None = None

    def __str__(self) -> str:
        rho = "" if self.rho is None else f", rho {self.rho:.3f}"
        return f"{self.error:.3f} ± {self.standard_error:.3f} ({self.n_queries} queries){rho}"


@dataclass(frozen=True)
class TokenChoice:
    """The least number of tokens whose error is below a wish, and what was tried.

    Attributes:
        tokens: The number; None where none of those tried is enough.
        wish: The error that was wished for.
        tried: The estimate of each number that was tried, from few to many.

    Examples:
        >>> print(TokenChoice(None, 0.02, {8: ErrorEstimate(0.11, 0.01, 64, 0.2)}))
        no number of tokens up to 8 has an error below 0.02
          8: 0.110 ± 0.010 (64 queries), rho 0.200
    """

    tokens: int | None
    wish: float
    tried: Mapping[int, ErrorEstimate]

    def __str__(self) -> str:
        found = f"{self.tokens} tokens have" if self.tokens else f"no number of tokens up to {max(self.tried)} has"
        lines = [f"  {tokens}: {estimate}" for tokens, estimate in self.tried.items()]
        return "\n".join([f"{found} an error below {self.wish:g}", *lines])


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
    weights: Sequence[Tensor | None] | Tensor | None = None,
    mask: Tensor | None = None,
    lengths: Any = None,
    generator: torch.Generator | None = None,
    **options: Any,
) -> ErrorEstimate:
    r"""Estimate how far an operator is from full attention, on sampled queries.

    .. math:: \frac{\|O - F\|}{\|F - \bar v\|}

    O is the output, F flattened attention, and :math:`\bar v` the weighted mean of the values. The norms run over all
    batch dimensions, sampled queries and channels. Positions are drawn without replacement, the same ones for every
    batch index. It is a ratio estimator, and its standard error is the jackknife over the sampled positions: see
    `centred_error`. Costs 4PD operations a sampled query for P positions of the keys, plus the operator: on the
    sampled queries alone where it takes any positions, on all queries where it needs their grid, or makes cells for
    all of them. Of `clustered_attention` it tells ``rho`` too.

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
        The error, its standard error, the number of queries, and ``rho`` where there is one.

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
    _refuse_meaningless(options)
    record = get_operator(operator) if isinstance(operator, str) else None
    if record is not None:
        record.with_defaults(options)
    present = _present(order, weights, mask, lengths)
    truth = _truth(query, key, value, n_queries, generator, scale=scale, **present)
    function: Any = operator if record is None else record.function
    settings = {"scale": scale, **present, **options}
    if record is not None and record.condense is not None:
        settings["return_lse"] = True  # rho comes with it
    alone = record is not None and takes_any_positions(record, options)
    return truth.error(function(truth.query if alone else query, key, value, **settings))


@retells
@torch.no_grad()
def choose_tokens(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    order: int,
    error: float = 0.02,
    most: int = 1024,
    n_queries: int = 64,
    scale: float | None = None,
    weights: Sequence[Tensor | None] | Tensor | None = None,
    mask: Tensor | None = None,
    lengths: Any = None,
    generator: torch.Generator | None = None,
    **options: Any,
) -> TokenChoice:
    r"""Find the least number of tokens whose `clustered_attention` has a centred error below a wish.

    Powers of two are tried, from 8 up to the number of positions or ``most``, until one is enough. All are compared
    with full attention on the same sampled queries, which is computed once; each costs a call on all queries. So do it
    once, on data like those to come, not in every step: 64 queries predict the error of others within a factor of two.

    Args:
        query: Queries: the grid of the keys, another grid, or a list of tokens.
        key: Keys over the grid.
        value: Values over the grid.
        order: Number of modes N.
        error: The wish.
        most: The largest number of tokens that may be tried, at least 8.
        n_queries: Number of positions drawn; all of them where there are fewer.
        scale: Factor of the logits; 1/√D if None.
        weights: Weights of the positions, as `error_estimate` takes them.
        mask: Mask of the positions, likewise.
        lengths: Lengths of the modes, likewise.
        generator: Source of randomness.
        **options: Options of `clustered_attention` but ``tokens``.

    Returns:
        The number of tokens, None if no number tried is enough, and the estimate of each.

    Raises:
        OptionError: If there is no such option, ``tokens`` is among them or fixed by another one, ``error`` is
            negative, ``most`` is less than 8, ``n_queries`` is less than 2, or something is asked for that has no
            meaning for sampled queries.
        ShapeError: If shapes disagree.
        DtypeError: If a tensor is not floating point, or the types differ.
        WeightsError: If weights do not fit the modes.

    Shape:
        - query: :math:`(*, P_1, \dots, P_M, D)`, key: :math:`(*, n_1, \dots, n_N, D)`
        - value: :math:`(*, n_1, \dots, n_N, D_v)`

    Examples:
        >>> x = torch.randn(20, 8)[torch.randint(20, (6, 7, 9))]  # a volume of twenty kinds of voxels
        >>> choose_tokens(x, x, x, order=3, error=1e-5).tokens
        32
        >>> noise = torch.randn(6, 7, 9, 8)
        >>> print(choose_tokens(noise, noise, noise, order=3, most=16))  # doctest: +ELLIPSIS
        no number of tokens up to 16 has an error below 0.02
          8: ... (64 queries), rho ...
          16: ... (64 queries), rho ...
    """
    check(error, "error", "number", least=0)
    check(most, "most", "integer", least=FEWEST_TOKENS)
    _refuse_meaningless(options)
    if "tokens" in options:
        raise OptionError("tokens is what is chosen; most tells how many may be tried.")
    for name, fixed in (("cells", isinstance(options.get("cells"), Cells)), ("blocks", options.get("blocks"))):
        if fixed:
            raise OptionError(f"{name} says how many tokens there are, so that there is no number to choose.")
    record = get_operator("clustered")
    record.with_defaults(options)
    present = _present(order, weights, mask, lengths)
    truth = _truth(query, key, value, n_queries, generator, scale=scale, **present)
    settings = {"scale": scale, **present, **options}
    tried: dict[int, ErrorEstimate] = {}
    tokens = FEWEST_TOKENS
    while not tried or tokens <= min(most, math.prod(key.shape[-order - 1 : -1])):
        tried[tokens] = truth.error(record.function(query, key, value, tokens=tokens, return_lse=True, **settings))
        if tried[tokens].error < error:
            return TokenChoice(tokens, error, tried)
        tokens *= 2
    return TokenChoice(None, error, tried)


def _refuse_meaningless(options: dict[str, Any]) -> None:
    """Refuse what has no meaning for sampled queries, and take out what is not asked for."""
    for name, reason in MEANINGLESS.items():
        asked = options.pop(name, None)
        if asked is not None and asked is not False:
            raise OptionError(f"{name} has no meaning for an estimate: {reason}.")


def _present(order: int, weights: Any, mask: Tensor | None, lengths: Any) -> dict[str, Any]:
    """Put together what tells which positions take part; a function need not know of masks and lengths."""
    given = {"mask": mask, "lengths": lengths}
    return {"order": order, "weights": weights, **{name: each for name, each in given.items() if each is not None}}


class _Truth(NamedTuple):
    """Full attention on sampled queries.

    Attributes:
        positions: Which queries were drawn ``(L,)``.
        query: The queries ``(*batch, L, D)``.
        exact: Full attention on them ``(*batch, L, D_v)``.
        mean: Mean of the values ``(*batch, D_v)``.
        population: Number of queries that they were drawn from.
    """

    positions: Tensor
    query: Tensor
    exact: Tensor
    mean: Tensor
    population: int

    def error(self, result: Tensor | AttentionResult) -> ErrorEstimate:
        """Compare what an operator returned, for the sampled queries or for all, with full attention."""
        output, rho = (result.output, result.rho) if isinstance(result, AttentionResult) else (result, None)
        if output.shape != self.exact.shape:
            batch = self.exact.shape[:-2]
            output = output.reshape(*batch, self.population, output.shape[-1])[..., self.positions, :]
        estimate = centred_error(output, self.exact, self.mean, population=self.population)
        return estimate if rho is None else replace(estimate, rho=float(rho.amax()))


def _truth(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    n_queries: int,
    generator: torch.Generator | None,
    *,
    scale: float | None,
    **present: Any,
) -> _Truth:
    """Draw queries, and compute full attention on them."""
    check_floating(query=query, key=key, value=value)
    batch = attention_shape(query.shape, key.shape, value.shape, present["order"]).batch
    count = math.prod(query.shape[len(batch) : -1])
    if count == 0:
        raise ShapeError("query has 0 positions, but an estimate needs at least 1.")
    positions = sample_positions(count, n_queries, generator).to(query.device)
    sampled = query.reshape(*batch, count, query.shape[-1])[..., positions, :]
    exact = get_operator("flattened").function(sampled, key, value, scale=scale, **present)
    return _Truth(positions, sampled, exact, summarize(value, value, kept=[()], **present).value(()), count)


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
        The estimate. Where full attention is the mean itself, up to rounding, the error is 0 if the outputs agree, else
        infinite.

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
    missed, signal = _energy(output - exact), _energy(exact - mean.unsqueeze(-2))
    rounding = ROUNDING * torch.finfo(torch.promote_types(output.dtype, exact.dtype)).eps
    noise = rounding**2 * _energy(exact).sum()
    error = float(_root_ratio(missed.sum(), signal.sum(), noise))
    if n_queries < 2:
        return ErrorEstimate(error, math.nan, n_queries)
    left_out = _root_ratio(missed.sum() - missed, signal.sum() - signal, noise)
    unseen = 1.0 if population is None else 1 - n_queries / population
    variance = left_out.var(correction=0) * (n_queries - 1) * unseen
    return ErrorEstimate(error, float(variance.sqrt()), n_queries)


def _energy(difference: Tensor) -> Tensor:
    """Squared norm of every query, over batch dimensions and channels, in float64."""
    energy = precise(difference).square().sum(dim=-1)
    return energy.reshape(-1, energy.shape[-1]).sum(dim=0)


def _root_ratio(above: Tensor, below: Tensor, noise: Tensor) -> Tensor:
    """Root of a ratio of sums of squares, which are 0 up to noise: 0 where both are, NaN where one is no number."""
    above, below = (each.masked_fill(each <= noise, 0) for each in (above, below))
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
        options: Its options. With ``include_self`` a query must be at a position of the grid; where ``cells`` are
            searched for among the keys, they are made for all queries together.

    Returns:
        Whether it does.

    Examples:
        >>> [takes_any_positions(get_operator(name), {}) for name in ("additive", "axial", "clustered")]
        [True, False, False]
    """
    every = operator.with_defaults(options)
    return operator.query == "positions" and not every.get("include_self") and every.get("cells") != "keys"


@retells
@torch.no_grad()
def error_bound(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    order: int,
    scale: float | None = None,
    weights: Sequence[Tensor | None] | None = None,
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
    grid = attention_shape(query.shape, key.shape, value.shape, order)
    shares = shares_of(key, order, weights)
    queries = scaled_queries(query, grid, scale)
    keys, values = split(key, shares), split(value, shares)
    diameter, deviation = _diameter(values).unsqueeze(-1), _deviation(values).unsqueeze(-1)
    largest_key, largest_value = (_largest_norm(part.residual).unsqueeze(-1) for part in (keys, values))
    width = math.prod(grid.batch) * (sum(grid.sizes) if oscillation == "cheap" else math.prod(grid.sizes))
    bounds = []
    for part in queries.split(max(1, CHUNK // max(1, width)), -2):
        oscillates = 2 * part.norm(dim=-1) * largest_key if oscillation == "cheap" else _range(part, keys)
        # Where there is no residual of the values, an overflowing excess times no deviation is no number.
        remainder = torch.fmin(largest_value, deviation * _excess(part, keys).sqrt())
        bounds.append(diameter * (oscillates / 4).tanh() + remainder)
    return torch.cat(bounds, -1).reshape(query.shape[:-1])


def _largest_norm(tensor: Tensor) -> Tensor:
    """Largest norm of a position of ``(*batch, P, D)``; those that do not count are zero."""
    return tensor.norm(dim=-1).amax(-1)


def _diameter(values: Effects) -> Tensor:
    """At least the largest distance of two values: twice the largest distance from some centre."""
    around_mean = (values.centred - values.mean.unsqueeze(-2)).masked_fill(~values.present.unsqueeze(-1), 0.0)
    return 2 * torch.minimum(_largest_norm(values.centred), _largest_norm(around_mean))


def _deviation(values: Effects) -> Tensor:
    """Largest standard deviation of the residual in any direction of its channels."""
    rows = values.rows()[-1]
    covariance = rows.mT @ rows
    finite = covariance.isfinite().all(-1).all(-1)
    eigenvalues = torch.linalg.eigvalsh(covariance.masked_fill(~finite[..., None, None], 0.0))
    # A zero before them, for values without channels and for eigenvalues that rounding makes negative.
    return F.pad(eigenvalues, (1, 0)).amax(-1).sqrt().masked_fill(~finite, torch.nan)


def _excess(queries: Tensor, keys: Effects) -> Tensor:
    """Chi-squared of the product of the modes' softmaxes, less that of its factors: the sum of all their products."""
    first = higher = queries.new_zeros(queries.shape[:-1])
    for effect, share in zip(keys.main, keys.shares, strict=True):
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


def _range(queries: Tensor, keys: Effects) -> Tensor:
    """Range of the logits with the residual of the keys, over the positions that count."""
    logits, absent = queries @ keys.residual.mT, ~keys.present.unsqueeze(-2)
    high, low = logits.masked_fill(absent, -torch.inf).amax(-1), logits.masked_fill(absent, torch.inf).amin(-1)
    return (high - low).clamp(min=0)
