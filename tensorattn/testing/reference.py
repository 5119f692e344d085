r"""Reference: every operator written straight from its definition, in float64, at chosen queries.

This is the oracle that the fast code is compared with, outputs and derivatives. It imports nothing of the package,
plans nothing and projects nothing early, so it is slow.

Conventions, the same as in the fast functions:

- ``key`` is :math:`(*, n_1, \dots, n_N, D)`, ``value`` :math:`(*, n_1, \dots, n_N, D_v)` and ``query``
  :math:`(*, P_1, \dots, P_M, D)` with the same batch :math:`*`.
- ``weights`` are multiplicities: 2 is as if something were repeated twice, 0 as if it were absent. One vector a mode,
  :math:`(n_m)` or broadcastable to :math:`(*, n_m)`, or None for ones, so that a position counts
  :math:`w_j = \prod_m w_m[j_m]` times; or one tensor over the grid, broadcastable to :math:`(*, n_1, \dots, n_N)`.
- ``mask`` is True where a position takes part, ``lengths`` says how many leading indices of each mode do: integers
  :math:`(*, N)`, or one entry a mode, or None for all.
- Below :math:`s` is the scale, by default :math:`1/\sqrt D`, :math:`K^U, V^U` are the means of key and value over the
  modes outside :math:`U`, and :math:`w^U[a]` is the weight of the positions behind one of them.

With the bias :math:`b_m`, the operators are

- flattened: :math:`F = \sum_j p_j v_j` with :math:`p_j \propto w_j e^{s\, q \cdot k_j + \sum_m b_m[i_m, j_m]}`.
- truncated: :math:`\sum_U c_U A^U` with the :func:`counting_numbers` :math:`c_U` of the kept subsets, where
  :math:`A^U = \sum_a p^U_a V^U[a]` and :math:`p^U_a \propto w^U[a]\, e^{s\, q \cdot K^U[a] + \sum_{m \in U} b_m}`.
- additive: the same with single modes kept, :math:`A = \sum_m A^m - (N - 1)\, \bar v`.
- ``interaction="linear"`` adds :math:`s\, C_{vk}\, q / \sqrt{1 + |\tau^2| / \ell^2}` to both, and :math:`\tau^2 / 2` to
  the log-sum-exp, with :math:`\tau^2 = s^2 q^T C_{kk}\, q` and :math:`C` the covariance of the positions less
  :math:`\sum_U c_U` times those of the means.
- kao_kv: one softmax J over the averages of all modes together, each counted as its index.
- kao_qkv: :math:`\sum_m J(Q^m[i_m])`; centred, :math:`\sum_m A(Q^m[i_m]) - (N - 1) A(\bar q)`; with the interaction,
  :math:`s\, (C^\text{tot}_{vk} r + C_{vk} a)` for a query of additive part a and rest r, likewise bounded.
- kronecker_product: :math:`\sum_j p_j v_j` with :math:`p_j \propto w_j \prod_m e^{s\, Q^m[i_m] \cdot K^m[j_m]}`.
- kronecker_sum: :math:`\sum_m` of the averages along the fibre of mode m through the query, with the factor of that
  mode alone; pooled by ``"mean"`` or ``"sum"``.
- axial: the mean over modes of attention along the fibre of that mode through the query.
- clustered: with the shares :math:`p_c \propto W_c (1 + \tau^2)^{a_c/2} e^{s\, q \cdot k_c}` of cells,
  :math:`\sum_c p_c v_c + (\sum_c p_c a_c)\, s\, C_{vk}\, q / \sqrt{1 + \tau^2}`, C the covariances inside cells and
  :math:`a_c` the mean square of k − k_c in a cell over that of all; cells are blocks of the grid, or given by labels.
  With ``additive_control``, :math:`\beta` times additive attention less the same of the additive parts is added.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator as op
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "OPERATORS",
    "additive_part",
    "attention",
    "counting_numbers",
    "layer",
    "marginal_mean",
    "merge_attention",
    "mode_averages",
    "outer_sum",
]

Subset = tuple[int, ...]
Weights = Sequence[Any] | Tensor | None  # one vector a mode, or a tensor over the grid
Given = Sequence[Any] | Tensor | None
Both = tuple[Tensor, Tensor]  # output and log-sum-exp
Result = tuple[Tensor, Tensor | None]


def marginal_mean(
    tensor: Any, kept: Subset, *, order: int, weights: Weights = None, mask: Any = None, lengths: Given = None
) -> Tensor:
    r"""Average a tensor over every mode that is not kept.

    Of one vector a mode only those of the averaged modes matter. A mean over no position is zero.

    Args:
        tensor: Values to average, :math:`(*, n_1, \dots, n_N, D)`.
        kept: Modes to keep, ascending, none (the grand mean) to all (the tensor itself).
        order: Number of modes N.
        weights: Multiplicities.
        mask: True where a position takes part.
        lengths: How many leading indices of each mode take part.

    Returns:
        The means, :math:`(*, n_{k_1}, n_{k_2}, \dots, D)`.

    Examples:
        >>> tensor = [[[1.0], [2.0], [6.0]], [[3.0], [4.0], [8.0]]]
        >>> marginal_mean(tensor, (0,), order=2, weights=[None, [1, 1, 0]]).ravel().tolist()
        [1.5, 3.5]
        >>> marginal_mean(tensor, (), order=2).tolist()
        [4.0]
    """
    tensor = _exact(tensor)
    return _mean(tensor, kept, _read_counts(tensor, order, weights, mask, lengths))


def mode_averages(tensor: Any, *, order: int, weights: Weights = None, **told: Any) -> list[Tensor]:
    r"""Average a tensor over all modes but one, for every mode.

    Args:
        tensor: Values to average, :math:`(*, n_1, \dots, n_N, D)`.
        order: Number of modes N.
        weights: Multiplicities.
        **told: Mask and lengths.

    Returns:
        N tensors in mode order, number k of shape :math:`(*, n_k, D)`.

    Examples:
        >>> rows, columns = mode_averages([[[1.0], [2.0], [6.0]], [[3.0], [4.0], [8.0]]], order=2)
        >>> rows.ravel().tolist(), columns.ravel().tolist()
        ([3.0, 5.0], [2.0, 3.0, 7.0])
    """
    return [marginal_mean(tensor, (mode,), order=order, weights=weights, **told) for mode in range(order)]


def outer_sum(vectors: Sequence[Any]) -> Tensor:
    r"""Write a tensor as the sum of one vector a mode.

    .. math:: x_j = \sum_m \text{vectors}_m[j_m]

    Args:
        vectors: N tensors, number k of shape :math:`(*, n_k, D)`.

    Returns:
        The tensor, :math:`(*, n_1, \dots, n_N, D)`.

    Examples:
        >>> outer_sum([[[1.0], [2.0]], [[10.0], [20.0], [30.0]]])[..., 0].tolist()
        [[11.0, 21.0, 31.0], [12.0, 22.0, 32.0]]
    """
    return _over_grid([_exact(vector).movedim(-1, 0) for vector in vectors], op.add).movedim(0, -1)


def additive_part(tensor: Any, *, order: int, weights: Weights = None, **told: Any) -> Tensor:
    r"""Return the additive tensor that has the same mode averages.

    It is the sum of the mode averages less :math:`N - 1` grand means; the rest of the tensor is its interaction
    residual.

    Args:
        tensor: Values, :math:`(*, n_1, \dots, n_N, D)`.
        order: Number of modes N.
        weights: Multiplicities.
        **told: Mask and lengths.

    Returns:
        A tensor of the same shape.

    Examples:
        >>> additive_part([[[0.0], [0.0]], [[0.0], [4.0]]], order=2)[..., 0].tolist()
        [[-1.0, 1.0], [1.0, 3.0]]
    """
    first, *others = mode_averages(tensor, order=order, weights=weights, **told)
    grand = marginal_mean(tensor, (), order=order, weights=weights, **told)
    return outer_sum([first - (order - 1) * grand.unsqueeze(-2), *others])


def counting_numbers(kept: Iterable[Subset], order: int) -> dict[Subset, int]:
    r"""Count how often each subset of modes enters so that every kept effect is counted exactly once.

    .. math:: \sum_{U' \supseteq U} c_{U'} = 1 \quad\text{for } U \text{ a kept subset or a part of one}

    Args:
        kept: Subsets of modes.
        order: Number of modes N.

    Returns:
        The number of each kept subset and of all their subsets, small ones first.

    Raises:
        ValueError: If nothing is kept, or a mode is not among the N.

    Examples:
        >>> counting_numbers([(0,), (1,), (2,)], 3)
        {(): -2, (0,): 1, (1,): 1, (2,): 1}
        >>> counting_numbers([(0, 1), (2,)], 3)
        {(): -1, (0,): 0, (1,): 0, (2,): 1, (0, 1): 1}
    """
    subsets = {tuple(sorted(set(subset))) for subset in kept}
    if not subsets or not set().union(*subsets) <= set(range(order)):
        raise ValueError(f"kept must be subsets of the modes 0 to {order - 1}, got {sorted(subsets)}.")
    closure = {u for s in subsets for size in range(len(s) + 1) for u in itertools.combinations(s, size)}
    counts: dict[Subset, int] = {}
    for subset in sorted(closure, key=len, reverse=True):
        counts[subset] = 1 - sum(count for larger, count in counts.items() if set(subset) < set(larger))
    return {subset: counts[subset] for subset in sorted(closure, key=lambda u: (len(u), u))}


def merge_attention(parts: Sequence[tuple[Any, Any]]) -> Both:
    r"""Merge the attention of the same queries to several sets of tokens into that to their union.

    .. math:: \frac{\sum_p e^{L_p} o_p}{\sum_p e^{L_p}}, \qquad L = \log \sum_p e^{L_p}

    Args:
        parts: Output :math:`o_p` and log-sum-exp :math:`L_p` of each set.

    Returns:
        The output and the log-sum-exp of the union.

    Examples:
        >>> output, lse = merge_attention([([2.0], math.log(3)), ([6.0], 0.0), ([0.0], -math.inf)])
        >>> output.tolist(), round(lse.exp().item(), 12)
        ([3.0], 4.0)
    """
    outputs, lses = (torch.stack([_exact(part) for part in each]) for each in zip(*parts, strict=True))
    logits = lses.movedim(0, -1).unsqueeze(-2)
    output, lse = _softmax(logits, torch.ones_like(logits), outputs.movedim(0, -2))
    return output.squeeze(-2), lse.squeeze(-1)


def attention(
    name: str,
    query: Any,
    key: Any,
    value: Any,
    *,
    order: int,
    at: Any = None,
    scale: float | None = None,
    weights: Weights = None,
    mask: Any = None,
    lengths: Given = None,
    bias: Sequence[Any] | None = None,
    causal: int | None = None,
    include_self: bool = False,
    **options: Any,
) -> Result:
    r"""Attend by the definition of an operator.

    Args:
        name: One of `OPERATORS`.
        query: Queries; over the grid of the keys for operators that pool them, for axial attention, and with
            ``include_self``; over N modes with ``bias`` and ``causal``.
        key: Keys.
        value: Values.
        order: Number of modes N.
        at: Places of the queries whose outputs are wanted, integers :math:`(L, M)`; None for all.
        scale: Factor of the logits.
        weights: Multiplicities.
        mask: True where a position takes part. What pools queries, or has them on the grid, gives zero elsewhere.
        lengths: How many leading indices of each mode take part.
        bias: For each mode, terms :math:`b_m` added to the logits, broadcastable to :math:`(*, P_m, n_m)`, or None.
        causal: Mode t along which a query at :math:`i_t` sees only the tensor cropped to :math:`j_t \le i_t`.
        include_self: Whether the token at each query's own position is merged, once, where it takes part.
        **options: ``kept``, ``interaction_order``, ``interaction``, ``saturation``, ``centered``, ``pool``; and
            ``gain``, a factor of the correction, broadcastable to the batch.

    Returns:
        The output :math:`(*, P_1, \dots, P_M, D_v)`, or :math:`(*, L, D_v)`; and the log-sum-exp, or None where the
        operator has none. A query for which nothing is present gets zeros and :math:`-\infty`.

    Raises:
        ValueError: If there is no such operator, or the shapes do not fit what is asked.

    Examples:
        >>> x = outer_sum([[[0.0], [1.0]], [[0.0], [2.0], [5.0]]])
        >>> full, ours = (attention(name, [0.7], x, x, order=2) for name in ("flattened", "additive"))
        >>> torch.allclose(full[0], ours[0]), torch.allclose(full[1], ours[1])
        (True, True)
        >>> attention("axial", x, x, x, order=2, scale=0.0, at=[(0, 0), (1, 2)])[0].flatten().round(decimals=3).tolist()
        [1.417, 4.417]
    """
    if name not in OPERATORS:
        raise ValueError(f"there is no operator {name!r}; the operators are: {', '.join(OPERATORS)}.")
    query, key, value = _exact(query), _exact(key), _exact(value)
    counts = _read_counts(key, order, weights, mask, lengths)
    batch, sizes = key.dim() - order - 1, tuple(key.shape[-order - 1 : -1])
    positions, on_grid = tuple(query.shape[batch:-1]), tuple(query.shape[:-1]) == tuple(key.shape[:-1])
    if value.shape[:-1] != key.shape[:-1] or query.shape[:batch] != key.shape[:batch]:
        raise ValueError(f"query, key and value do not fit: {[tuple(t.shape) for t in (query, key, value)]}.")
    if (name in GRID or include_self) and not on_grid:
        raise ValueError(f"query must be on the grid {sizes} of key, got {positions}.")
    if (causal is not None or bias is not None) and (len(positions) != order or name in POOLED):
        raise ValueError(f"{name} with {positions} queries takes neither causal nor bias.")
    if name == "clustered" and causal is not None:
        options["uncut"] = causal
    places = torch.ones(positions).nonzero() if at is None else torch.as_tensor(at, device="cpu")
    if name in GRID and (mask is not None or lengths is not None):
        query = torch.where(counts.present.unsqueeze(-1), query, 0.0)
    every = query * (max(1, query.shape[-1]) ** -0.5 if scale is None else scale)
    own = _at(every, places, batch)
    tables = [None] * order if bias is None else [None if part is None else _exact(part) for part in bias]
    rows = [
        torch.zeros(len(places), size) if table is None else table.index_select(-2, places[:, mode])
        for mode, (table, size) in enumerate(zip(tables, sizes, strict=True))
    ]
    seen = _Seen(own, every, places, key, value, counts, rows)
    if causal is None:
        output, lse = OPERATORS[name](seen, **options)
    else:
        output, lse = _frame_by_frame(functools.partial(OPERATORS[name], **options), seen, causal)
    present = _at(counts.present, places, batch) if on_grid else None
    if name in GRID and present is not None:
        output = torch.where(present.unsqueeze(-1), output, 0.0)
        lse = None if lse is None else torch.where(present, lse, -math.inf)
    if include_self:
        own_key, own_value = (_at(torch.where(counts.present[..., None], t, 0.0), places, batch) for t in (key, value))
        logit = torch.where(_at(counts.present, places, batch), (own * own_key).sum(-1), -math.inf)
        output, lse = merge_attention([(output, lse), (own_value, logit)])
    if at is None:
        output = output.unflatten(-2, positions) if positions else output.squeeze(-2)
        lse = None if lse is None else lse.unflatten(-1, positions) if positions else lse.squeeze(-1)
    return output, lse


def layer(
    module: Any,
    x: Tensor,
    context: Any = None,
    *,
    at: Any = None,
    cells: Sequence[Mapping[str, Any]] | None = None,
    **told: Any,
) -> Tensor:
    """Compute the output of an attention layer: call its projections on all positions, attend by definition, call back.

    Args:
        module: A `TensorAttention` in evaluation.
        x: Input, channels last ``(B, n_1, …, n_N, C)``.
        context: What keys and values are made of, or a pair; the input itself if None.
        at: Places where the output is wanted, ``(L, N)``; None for all.
        cells: Of clustered attention among keys, the ``labels`` and ``spread`` of the cells of each head.
        **told: Weights, mask and lengths of the input, or of the context.

    Returns:
        Output ``(B, n_1, …, n_N, C)``, or ``(B, L, C)``.

    Raises:
        ValueError: If the layer turns or projects pooled queries by mode, or has norms or fewer heads of keys.
    """
    of_keys, of_values = context if isinstance(context, tuple) else (context, context)
    of_keys, of_values = (x if source is None else source for source in (of_keys, of_values))
    order, heads = of_keys.dim() - 2, module.num_heads
    present = _read_counts(of_keys, order, told.get("weights"), told.get("mask"), told.get("lengths")).present
    of_keys, of_values = (torch.where(present.unsqueeze(-1), source, 0.0) for source in (of_keys, of_values))
    of_queries = of_keys if context is None else x
    maps = ((module.q_proj, of_queries), (module.k_proj, of_keys), (module.v_proj, of_values))
    query, key, value = (project(source).unflatten(-1, (heads, -1)).movedim(-2, 1) for project, source in maps)
    turned = module.rotary is not None and module.operator in POOLED
    if module.mode_projections or module.q_norm is not None or turned:
        raise ValueError("pooled queries with maps, norms or turns of their own are not defined here.")
    if module.num_kv_heads != heads:
        raise ValueError("heads of keys that serve several of queries are not defined here.")
    if module.rotary is not None:
        query, key = module.rotary(query), module.rotary(key)
    tables = None if module.position_bias is None else module.position_bias(x.shape[1:-1])
    outputs = []
    for head in range(heads):
        options = {"causal": module.causal, "scale": module.scale, **module.options, **told}
        options |= {} if cells is None else cells[head]
        if module.interaction_gain is not None:
            options["gain"] = module.interaction_gain[head]
        if tables is not None:
            options["bias"] = [t if t is None else t[head % len(t)] for t in tables]
        parts = (query[:, head], key[:, head], value[:, head])
        outputs.append(attention(module.operator, *parts, order=order, at=at, **options)[0])
    output = module.out_proj(torch.cat(outputs, -1).to(x.dtype))
    if context is None and at is None:
        output = torch.where(present.unsqueeze(-1), output, 0.0)
    elif context is None:
        output = torch.where(_at(present, torch.as_tensor(at), 1).unsqueeze(-1), output, 0.0)
    return output


class _Counts(NamedTuple):
    """How often each position counts; where that is a product over modes, its factors too; and which take part."""

    order: int
    grid: Tensor  # (*batch, n_1, …, n_N)
    factors: list[Tensor] | None  # N of (*batch, n_m)
    present: Tensor  # (*batch, n_1, …, n_N), what mask and lengths leave in

    def cropped(self, mode: int, end: int) -> _Counts:
        """Those of the leading indices of a mode."""
        grid, present = (tensor.narrow(mode - self.order, 0, end) for tensor in (self.grid, self.present))
        if self.factors is None:
            return _Counts(self.order, grid, None, present)
        factors = [w[..., :end] if k == mode else w for k, w in enumerate(self.factors)]
        return _Counts(self.order, grid, factors, present)

    def in_means(self, kept: Subset) -> Tensor:
        """Weight of each position in the means over the modes that are not kept."""
        if self.factors is None:
            return self.grid
        return _over_grid([torch.ones_like(w) if k in kept else w for k, w in enumerate(self.factors)], op.mul)

    def behind(self, kept: Subset) -> Tensor:
        """Weight of all positions behind each of these means, (*batch, n_k1, n_k2, …)."""
        return _total(self.grid, [k - self.order for k in range(self.order) if k not in kept])

    def of_indices(self) -> list[Tensor]:
        """How often each index of a mode counts; without factors, by the positions in its slice, one in the mean."""
        if self.factors is not None:
            return self.factors
        slices = [self.behind((mode,)) for mode in range(self.order)]
        return [_divided(n * (n > 0).sum(-1, keepdim=True), n.sum(-1, keepdim=True)) for n in slices]


class _Seen(NamedTuple):
    """What queries see."""

    query: Tensor  # (*batch, L, D), times the scale
    every: Tensor  # all of them, (*batch, P_1, …, P_M, D), for what pools queries
    places: Tensor  # (L, M)
    key: Tensor  # (*batch, n_1, …, n_N, D)
    value: Tensor  # (*batch, n_1, …, n_N, D_v)
    counts: _Counts
    bias: list[Tensor]  # N of (…, L, n_m)

    @property
    def order(self) -> int:
        """Number of modes."""
        return self.counts.order

    @property
    def batch(self) -> int:
        """Number of batch dimensions."""
        return self.query.dim() - 2

    def means(self, kept: Subset) -> tuple[Tensor, Tensor, Tensor]:
        """Means of keys and of values, (*batch, n_U, D), and the weight behind each."""
        key, value = (_mean(tensor, kept, self.counts) for tensor in (self.key, self.value))
        columns = key, value, self.counts.behind(kept).unsqueeze(-1)
        key, value, count = (part.reshape(*part.shape[: self.batch], -1, part.shape[-1]) for part in columns)
        return key, value, count.squeeze(-1)

    def attend_means(self, kept: Subset) -> Both:
        """Attend to the means over the modes that are not kept."""
        terms = [self.bias[mode] for mode in kept]
        bias = _over_grid(terms, op.add).flatten(-len(kept)) if kept else torch.zeros(1)
        return _attend(self.query, *self.means(kept), bias)

    def along(self, mode: int, logits: Tensor | None = None) -> Both:
        """Attend to the fibre of a mode through each query, by its keys or by logits (*batch, L, n)."""
        numbers = torch.arange(self.key.shape[self.batch + mode]).unsqueeze(0)
        fibre = [numbers if k == mode else self.places[:, k, None] for k in range(self.order)]
        key, value, count = (
            tensor[(slice(None),) * self.batch + tuple(fibre)] for tensor in (self.key, self.value, self.counts.grid)
        )
        query, bias = self.query.unsqueeze(-2), self.bias[mode] if logits is None else logits
        if logits is not None:
            query, key = torch.zeros_like(query), torch.zeros_like(key)
        output, lse = _attend(query, key, value, count, bias.unsqueeze(-2))
        return output.squeeze(-2), lse.squeeze(-1)

    def pooled_queries(self, kept: Subset) -> Tensor:
        """Mean queries at the place of each query, (*batch, L, D)."""
        return _at(_mean(self.every, kept, self.counts), self.places[:, list(kept)], self.batch)

    def covariance(self, left: int, kept: Subset) -> Tensor:
        """Covariance of keys (0) or values (1) with keys, among the means over the modes that are not kept."""
        tokens, grand = self.means(kept), self.means(())
        share = _divided(tokens[2], tokens[2].sum(-1, keepdim=True)).unsqueeze(-1)
        there = share > 0
        of_left, of_key = (torch.where(there, tokens[k] - grand[k], 0.0) for k in (left, 0))
        return (share * of_left).mT @ of_key

    def missing(self, left: int, counts: Mapping[Subset, int]) -> Tensor:
        """Covariance of the positions, less that of the means, each counted."""
        total = self.covariance(left, tuple(range(self.order)))
        return functools.reduce(op.sub, (c * self.covariance(left, kept) for kept, c in counts.items() if c), total)


def _flattened(seen: _Seen) -> Both:
    return seen.attend_means(tuple(range(seen.order)))


def _axial(seen: _Seen) -> Result:
    outputs, lses = zip(*(seen.along(mode) for mode in range(seen.order)), strict=True)
    return sum(outputs) / seen.order, lses[0] if seen.order == 1 else None


def _counted(
    seen: _Seen,
    counts: Mapping[Subset, int],
    interaction: str | None = None,
    saturation: float | None = 1.0,
    gain: Any = 1.0,
) -> Both:
    """Attend to means, each kept subset counted; a query that sees none of those of some subset sees nothing."""
    output = lse = seen.query.new_zeros(())
    sees = torch.ones((), dtype=torch.bool)
    for kept, count in counts.items():
        if count:
            part, part_lse = seen.attend_means(kept)
            sees = sees & (part_lse > -math.inf)
            output, lse = output + count * part, lse + count * torch.where(sees, part_lse, 0.0)
    if interaction is not None:
        term, square = _correction(seen, [(seen.query, counts)], saturation, gain)
        output, lse = output + term, lse + square / 2
    return torch.where(sees.unsqueeze(-1), output, 0.0), torch.where(sees, lse, -math.inf)


def _correction(
    seen: _Seen, sides: Sequence[tuple[Tensor, Mapping[Subset, int]]], saturation: float | None, gain: Any
) -> Both:
    """What the interaction adds for a sum of queries that see different means, and its τ²."""
    term, square = torch.zeros(1, 1), torch.zeros(1)
    for query, counts in sides:
        term = term + query @ seen.missing(1, counts).mT
        square = square + ((query @ seen.missing(0, counts)) * query).sum(-1)
    size = torch.where(square < 0, -square, square)
    bound = torch.ones_like(size) if saturation is None else (1 + size / saturation**2).sqrt()
    return _exact(gain)[..., None, None] * term / bound.unsqueeze(-1), square


def _modes(order: int) -> dict[Subset, int]:
    """Counting numbers of the additive operator."""
    return counting_numbers([(mode,) for mode in range(order)], order)


def _additive(seen: _Seen, **options: Any) -> Both:
    return _counted(seen, _modes(seen.order), **options)


def _truncated(
    seen: _Seen, kept: Iterable[Subset] | None = None, interaction_order: int | None = None, **options: Any
) -> Both:
    size = min(2, seen.order) if interaction_order is None else interaction_order
    subsets = itertools.combinations(range(seen.order), size) if kept is None else kept
    return _counted(seen, counting_numbers(subsets, seen.order), **options)


def _kao_kv(seen: _Seen) -> Both:
    means = [seen.means((mode,)) for mode in range(seen.order)]
    keys, values = (torch.cat([mean[k] for mean in means], -2) for k in (0, 1))
    bias = torch.cat([t.expand(*seen.query.shape[:-1], -1) for t in seen.bias], -1)
    counts = torch.cat(seen.counts.of_indices(), -1) * (seen.counts.behind(()).unsqueeze(-1) > 0)
    return _attend(seen.query, keys, values, counts, bias)


def _kao_qkv(
    seen: _Seen,
    centered: bool = False,
    interaction: str | None = None,
    saturation: float | None = 1.0,
    gain: Any = 1.0,
) -> Result:
    attend, order = _additive if centered else _kao_kv, seen.order
    queries = [seen.pooled_queries((mode,)) for mode in range(order)]
    outputs, lses = zip(*(attend(seen._replace(query=query)) for query in queries), strict=True)
    output, lse = sum(outputs), sum(lses)
    if not centered:
        return output, lse if order == 1 else None
    grand = seen.pooled_queries(())
    mean, mean_lse = _additive(seen._replace(query=grand))
    output, lse = output - (order - 1) * mean, torch.where(mean_lse > -math.inf, lse - (order - 1) * mean_lse, mean_lse)
    if interaction is None:
        return output, lse
    additive = sum(queries) - (order - 1) * grand
    sides: list[tuple[Tensor, Mapping[Subset, int]]] = [(seen.query - additive, {}), (additive, _modes(order))]
    return output + _correction(seen, sides, saturation, gain)[0], lse if order == 1 else None


def _mode_logits(seen: _Seen, mode: int, pool: str) -> Tensor:
    """Logits of one mode, from pooled queries to pooled keys, (*batch, L, n_m)."""
    query, key = seen.pooled_queries((mode,)), _mean(seen.key, (mode,), seen.counts)
    if pool == "sum":
        others = [k - seen.order for k in range(seen.order) if k != mode]
        size = _total(seen.counts.in_means((mode,)), others).unsqueeze(-1)
        query, key = query * _at(size, seen.places[:, [mode]], seen.batch), key * size
    key = torch.where(seen.counts.behind((mode,)).unsqueeze(-1) > 0, key, 0.0)
    return query @ key.mT


def _kronecker_product(seen: _Seen, pool: str = "mean") -> Result:
    logits = _over_grid([_mode_logits(seen, mode, pool) for mode in range(seen.order)], op.add).flatten(-seen.order)
    _, value, count = seen.means(tuple(range(seen.order)))
    value = torch.where(count.unsqueeze(-1) > 0, value, 0.0)
    output, lse = _softmax(logits, count.unsqueeze(-2), value)
    return output, lse if seen.order == 1 else None


def _kronecker_sum(seen: _Seen, pool: str = "mean") -> Result:
    parts = [seen.along(mode, _mode_logits(seen, mode, pool)) for mode in range(seen.order)]
    outputs, lses = zip(*parts, strict=True)
    return sum(outputs), lses[0] if seen.order == 1 else None


def _clustered(
    seen: _Seen,
    tokens: int = 64,
    cells: Any = "keys",
    blocks: Sequence[int] | None = None,
    additive_control: bool = False,
    labels: Any = None,
    spread: Any = None,
    uncut: int | None = None,
) -> Both:
    """Attend to cells: blocks of the grid, each position by itself, or what labels say."""
    sizes = tuple(seen.key.shape[seen.batch : -1])
    if labels is not None:
        label = torch.as_tensor(labels).flatten(-seen.order)
    elif cells == "blocks":
        counts = (
            _halved(sizes, tokens, uncut) if blocks is None else [min(b, n) for b, n in zip(blocks, sizes, strict=True)]
        )
        parts = [torch.arange(n) // -(-n // count) for n, count in zip(sizes, counts, strict=True)]
        label = functools.reduce(lambda one, part: one[..., None] * (part.max() + 1) + part, parts).flatten()
    elif tokens >= math.prod(sizes):
        label = torch.arange(math.prod(sizes))
    else:
        raise ValueError("cells of keys are defined by labels.")
    key, value = (t.flatten(seen.batch, -2) for t in (seen.key, seen.value))
    weight = seen.counts.grid.expand(seen.key.shape[:-1]).flatten(seen.batch)
    there = weight > 0
    key, value = (torch.where(there[..., None], t, 0.0) for t in (key, value))
    count = int(label.max()) + 1 if spread is None else spread.shape[-1]
    member = (label[..., None, :] == torch.arange(count)[:, None]) * weight[..., None, :]
    found = _attend_cells(seen.query, key, value, member, spread)
    if not additive_control:
        return found[0]
    means = [seen.means((mode,)) for mode in range(seen.order)]
    grand = seen.means(())
    index = torch.ones(sizes).nonzero()
    parts = [
        grand[t] + sum(mean[t][..., index[:, mode], :] - grand[t] for mode, mean in enumerate(means)) for t in (0, 1)
    ]
    parts = [torch.where(there[..., None], part, 0.0) for part in parts]
    (output, lse), rest, own = found
    (plain, plain_lse), rest_of_parts, _ = _attend_cells(seen.query, parts[0], parts[1], member, own)
    alike, size = ((weight * (one * rest_of_parts).sum(-1)).sum(-1) for one in (rest, rest_of_parts))
    share = torch.where(size > 1e-15 * weight.sum(-1), _divided(alike, size), 0.0).clamp(0, 1)
    additive, additive_lse = _additive(seen)
    sees = lse > -math.inf
    lse = torch.where(sees, lse + share[..., None] * torch.where(sees, additive_lse - plain_lse, 0.0), lse)
    return output + share[..., None, None] * (additive - plain), lse


def _attend_cells(
    query: Tensor, key: Tensor, value: Tensor, member: Tensor, spread: Any
) -> tuple[Both, Tensor, Tensor]:
    """Attend to cells with members (*batch, n, P); return what is left of keys, and the spread of cells, too."""
    count = member.sum(-1)
    keys, values = (_divided(member @ tensor, count[..., None]) for tensor in (key, value))
    rest, rest_of_values = (t - (member > 0).to(t.dtype).mT @ mean for t, mean in ((key, keys), (value, values)))
    weight = member.sum(-2)
    whole = weight.sum(-1)
    moments = [_divided((weight[..., None] * t).mT @ rest, whole[..., None, None]) for t in (rest, rest_of_values)]
    if spread is None:
        own = _divided(member @ rest.square().sum(-1, keepdim=True), count[..., None]).squeeze(-1)
        typical = _divided((own * count).sum(-1), whole)[..., None]
        spread = torch.where(typical > 1e-30, _divided(own, typical), 1.0)
    square = ((query @ moments[0]) * query).sum(-1)
    logits = query @ keys.mT + _exact(spread)[..., None, :] * square[..., None].log1p() / 2
    extended = torch.cat([values, _exact(spread)[..., None].expand(*values.shape[:-1], 1)], -1)
    output, lse = _softmax(logits, count.unsqueeze(-2).expand(logits.shape), extended)
    term = query @ moments[1].mT / (1 + square[..., None]).sqrt()
    return (output[..., :-1] + output[..., -1:] * term, lse), rest, spread


def _halved(sizes: Sequence[int], tokens: int, uncut: int | None) -> list[int]:
    """Cut the mode of the longest blocks in two, while there are tokens; then into one more."""
    counts = [1] * len(sizes)
    for step in (lambda count: 2 * count, lambda count: count + 1):
        going = True
        while going:
            going = False
            for mode in sorted(range(len(sizes)), key=lambda m: (-sizes[m] / counts[m], m)):
                more = min(step(counts[mode]), sizes[mode])
                if mode != uncut and more > counts[mode] and math.prod(counts) // counts[mode] * more <= tokens:
                    counts[mode], going = more, True
                    break
    return counts


OPERATORS: dict[str, Callable[..., Result]] = {
    "additive": _additive,
    "truncated": _truncated,
    "kao_kv": _kao_kv,
    "kao_qkv": _kao_qkv,
    "kronecker_product": _kronecker_product,
    "kronecker_sum": _kronecker_sum,
    "axial": _axial,
    "clustered": _clustered,
    "flattened": _flattened,
}
POOLED = frozenset({"kao_qkv", "kronecker_product", "kronecker_sum"})
GRID = POOLED | {"axial"}


def _frame_by_frame(attend: Callable[[_Seen], Result], seen: _Seen, mode: int) -> Result:
    """Let each query see the tensor cropped to its frames up to its own."""
    rows, found = [], []
    for frame in range(seen.key.shape[seen.batch + mode]):
        row = (seen.places[:, mode] == frame).nonzero().squeeze(-1)
        if len(row):
            key, value = (tensor.narrow(seen.batch + mode, 0, frame + 1) for tensor in (seen.key, seen.value))
            bias = [terms.index_select(-2, row) for terms in seen.bias]
            bias[mode] = bias[mode][..., : frame + 1]
            query, counts = seen.query.index_select(-2, row), seen.counts.cropped(mode, frame + 1)
            found.append(attend(_Seen(query, seen.every, seen.places[row], key, value, counts, bias)))
            rows.append(row)
    back = torch.cat(rows).argsort()
    outputs, lses = zip(*found, strict=True)
    return torch.cat(outputs, -2)[..., back, :], None if lses[0] is None else torch.cat(lses, -1)[..., back]


def _attend(query: Tensor, key: Tensor, value: Tensor, count: Tensor, bias: Tensor) -> Both:
    """Attend from (…, L, D) to n tokens with counts (…, n) and terms of the logits (…, L, n)."""
    key, value = (torch.where(count.unsqueeze(-1) > 0, tensor, 0.0) for tensor in (key, value))
    return _softmax(query @ key.mT + bias, count.unsqueeze(-2), value)


def _softmax(logits: Tensor, count: Tensor, value: Tensor) -> Both:
    """Average of values (…, n, D) by count · exp(logits), and the logarithm of the sum of these.

    Where nothing counts: zero, and minus infinity.
    """
    counted = count > 0
    logits = torch.where(counted, logits + torch.where(counted, count, 1.0).log(), -math.inf)
    something = (logits > -math.inf).any(-1, keepdim=True)
    logits = torch.where(something, logits, 0.0)
    output = torch.where(something, torch.softmax(logits, -1) @ value, 0.0)
    return output, torch.where(something.squeeze(-1), torch.logsumexp(logits, -1), -math.inf)


def _mean(tensor: Tensor, kept: Subset, counts: _Counts) -> Tensor:
    """Weighted mean over the modes that are not kept; zero over no position."""
    weight, dropped = counts.in_means(kept), [k - counts.order for k in range(counts.order) if k not in kept]
    if not dropped:
        return tensor
    there = torch.where(weight.unsqueeze(-1) > 0, tensor, 0.0) * weight.unsqueeze(-1)
    return _divided(_total(there, [dim - 1 for dim in dropped]), _total(weight, dropped).unsqueeze(-1))


def _read_counts(tensor: Tensor, order: int, weights: Weights, mask: Any, lengths: Given) -> _Counts:
    """Bring together what is said of the positions of a tensor (*batch, n_1, …, n_N, D)."""
    if order < 1 or tensor.dim() < order + 1:
        raise ValueError(f"a tensor of {order} modes cannot have the shape {tuple(tensor.shape)}.")
    shape, sizes = tensor.shape[:-1], tensor.shape[-order - 1 : -1]
    whole, present = None, torch.ones(shape, dtype=torch.bool)
    vectors = [weights] if isinstance(weights, Tensor) and order == 1 else weights
    if isinstance(vectors, Tensor):
        vectors, whole = None, _exact(vectors)
    vectors = [None] * order if vectors is None else vectors
    factors = [torch.ones(n).double() if w is None else _exact(w) for w, n in zip(vectors, sizes, strict=True)]
    if lengths is not None:
        parts = lengths.unbind(-1) if isinstance(lengths, Tensor) else lengths
        ends = [n if part is None else torch.as_tensor(part) for part, n in zip(parts, sizes, strict=True)]
        shown = [torch.arange(n) < torch.as_tensor(end).unsqueeze(-1) for end, n in zip(ends, sizes, strict=True)]
        factors = [w * seen for w, seen in zip(factors, shown, strict=True)]
        present = present & _over_grid([seen.expand(*shape[:-order], -1) for seen in shown], op.and_)
    if mask is not None:
        mask = torch.as_tensor(mask, device="cpu")
        dims = range(-order, 0)
        shown = [mask.any([k for k in dims if k != dim]) if order > 1 else mask for dim in dims]
        if torch.equal(_over_grid(shown, op.and_), mask):
            factors = [w * seen for w, seen in zip(factors, shown, strict=True)]
        else:
            whole = mask.double() if whole is None else whole * mask
        present = present & mask
    factors = [w.expand(*shape[:-order], -1) for w in factors]
    grid = _over_grid(factors, op.mul)
    if (grid < 0).any() or (whole is not None and (whole < 0).any()):
        raise ValueError("weights must not be negative.")
    return _Counts(order, grid, factors, present) if whole is None else _Counts(order, grid * whole, None, present)


def _over_grid(parts: Sequence[Tensor], join: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Join one vector a mode, (…, n_m), to a tensor over the grid, (…, n_1, …, n_N)."""

    def beside(mode: int, part: Tensor) -> Tensor:
        return part.reshape(*part.shape[:-1], *(part.shape[-1] if k == mode else 1 for k in range(len(parts))))

    return functools.reduce(join, itertools.starmap(beside, enumerate(parts)))


def _at(tensor: Tensor, places: Tensor, start: int) -> Tensor:
    """Take a tensor at places (L, M) of M dimensions that start somewhere; one place without dimensions."""
    if places.shape[-1] == 0:
        return tensor.unsqueeze(start)
    return tensor[(slice(None),) * start + places.unbind(-1)]


def _total(tensor: Tensor, dims: Sequence[int]) -> Tensor:
    """Sum over dimensions, if any."""
    return tensor.sum(list(dims)) if dims else tensor


def _divided(total: Tensor, count: Tensor) -> Tensor:
    """Divide by counts; zero where they are."""
    return torch.where(count > 0, total / torch.where(count > 0, count, 1.0), 0.0)


def _exact(values: Any) -> Tensor:
    """Return values as a float64 tensor on the CPU, through which derivatives pass."""
    return torch.as_tensor(values, dtype=torch.float64, device="cpu")
