r"""Reference: every operator written straight from its definition, in NumPy and float64, one query at a time.

This is the oracle that the fast code is compared with. It imports nothing of the package, plans nothing and
shares nothing between queries, so it is slow: use it for a few hundred positions.

Conventions, the same as in the fast functions:

- ``key`` is :math:`(*, n_1, \dots, n_N, D)`, ``value`` :math:`(*, n_1, \dots, n_N, D_v)` and ``query``
  :math:`(*, \text{positions}, D)` with the same batch :math:`*` and any number of position dimensions.
- ``weights`` holds, for each mode, multiplicities :math:`w_m \ge 0` of shape :math:`(n_m)`, or broadcastable
  to :math:`(*, n_m)`, or None for ones: 2 is as if the index were repeated twice, 0 as if it were absent.
  A position counts :math:`\prod_m w_m[j_m]` times. Averages are normalised, log-sum-exps count. One array of
  shape :math:`(n_1, \dots, n_N)`, or broadcastable to :math:`(*, n_1, \dots, n_N)`, says of each position how
  often it counts; a mean over no position is zero.
- ``scale=None`` is :math:`1/\sqrt D`. Below :math:`s` is the scale and :math:`K^U, V^U` are the means of key
  and value over the modes outside :math:`U`.
- An attention function returns ``(output, lse)``: the output :math:`(*, \text{positions}, D_v)` and the
  log-sum-exp :math:`(*, \text{positions})`, or None where the operator has none. A query for which nothing is
  present gets zeros and :math:`-\infty`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import reduce
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = [
    "additive_attention",
    "additive_part",
    "axial_attention",
    "counting_numbers",
    "flattened_attention",
    "kao_kv",
    "kao_qkv",
    "kronecker_product_attention",
    "kronecker_sum_attention",
    "marginal_mean",
    "merge_attention",
    "mode_averages",
    "outer_sum",
    "truncated_attention",
]

ArrayLike = npt.ArrayLike
Array = npt.NDArray[np.float64]
PerMode = Sequence[ArrayLike | None] | Array | None  # one a mode, or an array over the grid
Scale = float | None
Subset = tuple[int, ...]
Pool = Literal["mean", "sum"]


def mode_averages(tensor: ArrayLike, *, order: int, weights: PerMode = None) -> list[Array]:
    r"""Average a tensor over all modes but one, for every mode.

    Args:
        tensor: Values to average, :math:`(*, n_1, \dots, n_N, D)`.
        order: Number of modes N.
        weights: Multiplicities of the indices of each mode.

    Returns:
        N arrays in mode order, number k of shape :math:`(*, n_k, D)`.

    Examples:
        >>> rows, columns = mode_averages([[[1.0], [2.0], [6.0]], [[3.0], [4.0], [8.0]]], order=2)
        >>> rows.ravel().tolist(), columns.ravel().tolist()
        ([3.0, 5.0], [2.0, 3.0, 7.0])
    """
    return [marginal_mean(tensor, (mode,), order=order, weights=weights) for mode in range(order)]


def marginal_mean(tensor: ArrayLike, kept: Subset, *, order: int, weights: PerMode = None) -> Array:
    r"""Average a tensor over every mode that is not kept.

    Only the weights of the averaged modes matter. If they are all zero in some mode, the mean is zero.

    Args:
        tensor: Values to average, :math:`(*, n_1, \dots, n_N, D)`.
        kept: Modes to keep, none (the grand mean) to all (the tensor itself).
        order: Number of modes N.
        weights: Multiplicities of the indices of each mode.

    Returns:
        The means, :math:`(*, n_{k_1}, n_{k_2}, \dots, D)` with the kept modes in increasing order.

    Examples:
        >>> tensor = [[[1.0], [2.0], [6.0]], [[3.0], [4.0], [8.0]]]
        >>> marginal_mean(tensor, (0,), order=2, weights=[None, [1, 1, 0]]).ravel().tolist()
        [1.5, 3.5]
        >>> marginal_mean(tensor, (), order=2).tolist()
        [4.0]
    """
    values = _floats(tensor)
    batch, sizes = _grid(values, order)
    per_mode = _read_weights(values, order, weights)
    result = np.zeros((*batch, *(sizes[mode] for mode in sorted(kept)), values.shape[-1]))
    for b in np.ndindex(batch):
        if isinstance(weights, np.ndarray):
            result[b] = _mean_of_positions(values[b], kept, _read_positions(values, order, weights)[b])
        else:
            result[b] = _mean(values[b], kept, [w[b] for w in per_mode])
    return result


def outer_sum(vectors: Sequence[ArrayLike]) -> Array:
    r"""Write a tensor as the sum of one vector a mode.

    .. math:: x_j = \sum_m \text{vectors}_m[j_m]

    Args:
        vectors: N arrays, number k of shape :math:`(*, n_k, D)`.

    Returns:
        The tensor, :math:`(*, n_1, \dots, n_N, D)`.

    Examples:
        >>> outer_sum([[[1.0], [2.0]], [[10.0], [20.0], [30.0]]])[..., 0].tolist()
        [[11.0, 21.0, 31.0], [12.0, 22.0, 32.0]]
    """
    arrays = [_floats(vector) for vector in vectors]
    sizes = [array.shape[-2] for array in arrays]
    result = np.zeros((*arrays[0].shape[:-2], *sizes, arrays[0].shape[-1]))
    for j in np.ndindex(*sizes):
        for array, index in zip(arrays, j, strict=True):
            result[(..., *j, slice(None))] += array[..., index, :]
    return result


def additive_part(tensor: ArrayLike, *, order: int, weights: PerMode = None) -> Array:
    r"""Return the additive tensor that has the same mode averages.

    It is the sum of the mode averages minus :math:`N - 1` grand means; the rest of the tensor is its
    interaction residual.

    Args:
        tensor: Values, :math:`(*, n_1, \dots, n_N, D)`.
        order: Number of modes N.
        weights: Multiplicities of the indices of each mode.

    Returns:
        An array of the shape of ``tensor``.

    Examples:
        >>> additive_part([[[0.0], [0.0]], [[0.0], [4.0]]], order=2)[..., 0].tolist()
        [[-1.0, 1.0], [1.0, 3.0]]
    """
    grand_mean = marginal_mean(tensor, (), order=order, weights=weights)
    total = outer_sum(mode_averages(tensor, order=order, weights=weights))
    return total - (order - 1) * np.expand_dims(grand_mean, tuple(range(-order - 1, -1)))


def flattened_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    order: int,
    weights: PerMode = None,
    scale: Scale = None,
    causal: int | None = None,
    bias: PerMode = None,
) -> tuple[Array, Array]:
    r"""Attend to every position: full attention, the truth that every operator is compared with.

    .. math:: \sum_j \frac{w_j e^{\ell_j}}{\sum_{j'} w_{j'} e^{\ell_{j'}}} v_j,
              \qquad \ell_j = s\, q \cdot k_j + \sum_m b_m[i_m, j_m]

    Args:
        query: Queries.
        key: Keys.
        value: Values.
        order: Number of modes N.
        weights: Multiplicities of the indices of each mode.
        scale: Factor of the logits.
        causal: Mode t along which a query at :math:`i_t` sees only :math:`j_t \le i_t`. The query then has N
            position dimensions, as it has with ``bias``.
        bias: For each mode, terms :math:`b_m` added to the logits, broadcastable to
            :math:`(*, n^\text{query}_m, n_m)`, or None.

    Returns:
        The output, and the log-sum-exp :math:`\log \sum_j w_j e^{\ell_j}`.

    Examples:
        >>> output, lse = flattened_attention([[0.0], [0.0]], [[1.0], [1.0]], [[2.0], [4.0]], order=1)
        >>> output.ravel().tolist(), np.exp(lse).round(12).tolist()
        ([3.0, 3.0], [2.0, 2.0])
        >>> flattened_attention([[0.0], [0.0]], [[1.0], [1.0]], [[2.0], [4.0]], order=1, causal=0)[0].tolist()
        [[2.0], [3.0]]
    """

    def attend(q: Array, seen: _Seen) -> tuple[Array, float]:
        logits = seen.key @ q + reduce(np.add.outer, seen.bias)
        return _softmax(logits, seen.value, seen.weight)

    return _each_query(attend, query, key, value, order, weights, scale, causal, bias)


def axial_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    order: int,
    weights: PerMode = None,
    scale: Scale = None,
    causal: int | None = None,
    bias: PerMode = None,
) -> tuple[Array, Array | None]:
    r"""Average, over the modes, attention along the fibre of that mode through the query's position.

    A fibre through an absent index of another mode holds no position, so it adds nothing.

    Args:
        query: Queries on the grid of ``key``.
        key: Keys.
        value: Values.
        order: Number of modes N.
        weights: Multiplicities of the indices of each mode.
        scale: Factor of the logits.
        causal: Mode t along whose fibre a query at :math:`i_t` sees only :math:`j_t \le i_t`.
        bias: For each mode, terms :math:`b_m` added to the logits along its fibre, or None.

    Returns:
        The output, and the log-sum-exp at order 1, else None.

    Raises:
        ValueError: If ``query`` is not on the grid of ``key``.

    Examples:
        >>> value = [[[0.0], [2.0]], [[4.0], [8.0]]]
        >>> axial_attention(value, value, value, order=2, scale=0.0)[0][..., 0].tolist()
        [[1.5, 3.0], [4.0, 5.5]]
    """
    queries, keys, values = _scaled(query, scale), _floats(key), _floats(value)
    if queries.shape != keys.shape:
        raise ValueError(f"query must be on the grid of key, got {queries.shape} and {keys.shape}.")
    positions, tables = _read_positions(keys, order, weights), _read_bias(keys, order, bias)
    output = np.zeros((*keys.shape[:-1], values.shape[-1]))
    lse = np.full(keys.shape[:-1], -np.inf)
    for index in np.ndindex(keys.shape[:-1]):
        b, i = index[:-order], index[-order:]
        for mode, fibre in _fibres(index, order):
            weight = positions[fibre]
            table = tables[mode]
            terms = np.zeros(len(weight)) if table is None else table[b][i[mode]]
            seen = np.arange(len(weight)) <= i[mode] if mode == causal else True
            present = (weight > 0) & seen & np.isfinite(terms)
            if present.any():
                logits = keys[fibre][present] @ queries[index] + terms[present]
                along, lse[index] = _softmax(logits, values[fibre][present], weight[present])
                output[index] += along / order
    return output, lse if order == 1 else None


def kao_kv(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    order: int,
    weights: PerMode = None,
    scale: Scale = None,
    causal: int | None = None,
    bias: PerMode = None,
) -> tuple[Array, Array]:
    r"""Attend to all mode averages at once, in one joint softmax over :math:`S = \sum_m n_m` tokens.

    .. math:: \frac{\sum_m \sum_a w_m[a]\, e^{s\, q \cdot K^m[a]}\, V^m[a]}
                   {\sum_m \sum_a w_m[a]\, e^{s\, q \cdot K^m[a]}}

    An array of weights over the grid must be a mask of 0 and 1. An index then counts in proportion to the positions
    present in its slice, :math:`w_m[a] = c_m[a] / \bar c_m` with the mean over the slices that are not empty.

    Args:
        query: Queries.
        key: Keys.
        value: Values.
        order: Number of modes N.
        weights: Multiplicities of the indices of each mode.
        scale: Factor of the logits.
        causal: Mode t along which a query at :math:`i_t` sees only the tensor cropped to :math:`j_t \le i_t`.
        bias: For each mode, terms added to the logits of its averages, or None.

    Returns:
        The output, and the logarithm of the denominator.

    Examples:
        >>> output, lse = kao_kv([0.0], np.zeros((1, 3, 1)), [[[1.0], [2.0], [6.0]]], order=2)
        >>> output.tolist(), round(float(np.exp(lse)), 12)
        ([3.0], 4.0)

    References:
        Gao, Wang and Ji, Kronecker Attention Networks, KDD 2020, arXiv 2007.08442.
    """

    def attend(q: Array, seen: _Seen) -> tuple[Array, float]:
        keys = np.concatenate([_mean_of_positions(seen.key, (mode,), seen.weight) for mode in range(order)])
        values = np.concatenate([_mean_of_positions(seen.value, (mode,), seen.weight) for mode in range(order)])
        return _softmax(keys @ q + np.concatenate(seen.bias), values, np.concatenate(seen.weights))

    return _each_query(attend, query, key, value, order, weights, scale, causal, bias, any)


def kao_qkv(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    order: int,
    weights: PerMode = None,
    scale: Scale = None,
    centered: bool = False,
    interaction: Literal["linear"] | None = None,
    saturation: float | None = 1.0,
) -> tuple[Array, None]:
    r"""Let the mode averages of the query attend to those of key and value; write their outer sum.

    With J for :func:`kao_kv` and A for :func:`additive_attention`, the output at position i is

    .. math:: \sum_m J(Q^m[i_m]) \quad\text{or, centered,}\quad \sum_m A(Q^m[i_m]) - (N - 1) A(\bar q)

    Args:
        query: Queries on a grid of N modes, averaged with the same ``weights`` as the keys.
        key: Keys.
        value: Values.
        order: Number of modes N.
        weights: Multiplicities of the indices of each mode.
        scale: Factor of the logits.
        centered: Use one softmax a mode, and count the mean once instead of N times.
        interaction: "linear" adds :math:`s\, (C^\text{tot}_{vk} r + C_{vk} a) / \sqrt{1 + \tau^2 / \ell^2}` for a query
            of additive part a and interaction residual r, with
            :math:`\tau^2 = s^2 (r^T C^\text{tot}_{kk} r + a^T C_{kk} a)`, the covariance :math:`C^\text{tot}` of the
            positions and C as in :func:`additive_attention`.
        saturation: The :math:`\ell > 0` above; None is infinity.

    Returns:
        The output on the grid of ``query``, and None.

    Examples:
        >>> ones = np.ones((1, 2, 1))
        >>> [kao_qkv(ones, ones, ones, order=2, centered=c)[0].ravel().tolist() for c in (False, True)]
        [[2.0, 2.0], [1.0, 1.0]]

    References:
        Gao, Wang and Ji, Kronecker Attention Networks, KDD 2020, arXiv 2007.08442 (``centered=False``).
    """
    operator = additive_attention if centered else kao_kv
    tokens = mode_averages(query, order=order, weights=weights)
    attended = [operator(t, key, value, order=order, weights=weights, scale=scale)[0] for t in tokens]
    output = outer_sum(attended)
    if centered:
        mean = marginal_mean(query, (), order=order, weights=weights)
        central = additive_attention(mean, key, value, order=order, weights=weights, scale=scale)[0]
        output -= (order - 1) * np.expand_dims(central, tuple(range(-order - 1, -1)))
    if interaction is None:
        return output, None
    straight = additive_part(query, order=order, weights=weights)
    own = _floats(query) - straight
    modes: dict[Subset, int] = {(mode,): 1 for mode in range(order)}

    def second(tensor: ArrayLike, counts: dict[Subset, int]) -> tuple[Array, Array]:
        def attend(q: Array, seen: _Seen) -> tuple[Array, float]:
            return _correct(q, seen, counts, interaction, None)

        return _each_query(attend, tensor, key, value, order, weights, scale)

    (rest, rest_shift), (part, part_shift) = second(own, {}), second(straight, modes)
    tau_squared = np.nan_to_num(2 * (rest_shift + part_shift), neginf=0.0)
    damping = np.ones_like(tau_squared) if saturation is None else np.sqrt(1.0 + np.abs(tau_squared) / saturation**2)
    return output + (rest + part) / damping[..., None], None


def additive_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    order: int,
    weights: PerMode = None,
    scale: Scale = None,
    causal: int | None = None,
    bias: PerMode = None,
    interaction: Literal["linear"] | None = None,
    saturation: float | None = 1.0,
) -> tuple[Array, Array]:
    r"""Attend to the averages of each mode in a softmax of its own; add up, counting the mean once.

    .. math:: \sum_m \sum_a p_m[a] V^m[a] - (N - 1)\, \bar v, \qquad
              p_m[a] \propto w_m[a] e^{s\, q \cdot K^m[a] + b_m[i_m, a]}

    Equal to full attention, log-sum-exp included, when keys and values are additive over the modes. The
    linear interaction adds :math:`s\, C_{vk}\, q / \sqrt{1 + |\tau^2| / \ell^2}` to the output and
    :math:`\tau^2 / 2` to the log-sum-exp, with :math:`\tau^2 = s^2 q^T C_{kk} q` and :math:`C` the weighted
    covariance of the positions minus those of the mode averages. The output then agrees with full attention
    to first order in s for every tensor, and the log-sum-exp to second. When causal, mode t has one average a
    frame and the other modes have running averages.

    Args:
        query: Queries.
        key: Keys.
        value: Values.
        order: Number of modes N.
        weights: Multiplicities of the indices of each mode.
        scale: Factor of the logits.
        causal: Mode t along which a query at :math:`i_t` sees only the tensor cropped to :math:`j_t \le i_t`.
        bias: For each mode, terms :math:`b_m` added to its logits, broadcastable to
            :math:`(*, n^\text{query}_m, n_m)`, or None. They weigh neither averages nor covariances.
        interaction: "linear" adds the covariance of the interaction residual.
        saturation: The :math:`\ell > 0` above; None is infinity.

    Returns:
        The output, and the log-sum-exp :math:`\sum_m L_m - (N - 1)\, s\, q \cdot \bar k` with that of mode m,
        :math:`L_m`.

    Examples:
        >>> tensor = outer_sum([[[0.0], [1.0]], [[0.0], [2.0], [5.0]]])
        >>> output, _ = additive_attention([0.7], tensor, tensor, order=2)
        >>> np.allclose(output, flattened_attention([0.7], tensor, tensor, order=2)[0])
        True
    """
    modes: dict[Subset, int] = {(mode,): 1 for mode in range(order)}

    def attend(q: Array, seen: _Seen) -> tuple[Array, float]:
        outputs, lses = zip(*(_attend_means(q, seen, mode) for mode in modes), strict=True)
        mean, mean_lse = _attend_means(q, seen, ())
        output = sum(outputs) - (order - 1) * mean
        lse = sum(lses) - (order - 1) * mean_lse
        correction, shift = _correct(q, seen, modes, interaction, saturation)
        return output + correction, lse + shift

    return _each_query(attend, query, key, value, order, weights, scale, causal, bias)


def truncated_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    order: int,
    kept: Iterable[Subset] | None = None,
    interaction_order: int | None = None,
    weights: PerMode = None,
    scale: Scale = None,
    causal: int | None = None,
    bias: PerMode = None,
    interaction: Literal["linear"] | None = None,
    saturation: float | None = 1.0,
) -> tuple[Array, Array]:
    r"""Attend to the marginal means over kept subsets of modes, combined by inclusion and exclusion.

    .. math:: \sum_U c_U\, \text{Attention}(q; K^U, V^U)

    over the kept subsets and all their subsets, with the :func:`counting_numbers` :math:`c_U`. Interaction
    order 1 is :func:`additive_attention`, N is :func:`flattened_attention`. Equal to full attention if the
    modes fall into groups, each inside a kept subset, and keys and values are additive over the groups.

    Args:
        query: Queries.
        key: Keys.
        value: Values.
        order: Number of modes N.
        kept: Subsets of modes to keep. Give either this or ``interaction_order``.
        interaction_order: Keep all subsets of this many modes.
        weights: Multiplicities of the indices of each mode.
        scale: Factor of the logits.
        causal: Mode t along which a query at :math:`i_t` sees only the tensor cropped to :math:`j_t \le i_t`.
        bias: As in :func:`additive_attention`; a subset adds up the terms of its modes.
        interaction: As in :func:`additive_attention`, with :math:`C` the weighted covariance of the positions
            minus :math:`\sum_U c_U` times those of the marginal means.
        saturation: As in :func:`additive_attention`.

    Returns:
        The output, and the log-sum-exp :math:`\sum_U c_U L_U` plus, for a mode m in no kept subset,
        :math:`\log \sum_a w_m[a] e^{b_m[i_m, a]}`, so that its positions are counted.

    Raises:
        ValueError: If not exactly one of ``kept`` and ``interaction_order`` is given.

    Examples:
        >>> tensor = np.arange(8.0).reshape(2, 2, 2, 1) ** 2
        >>> options = dict(order=3, scale=0.1)
        >>> output = truncated_attention([0.7], tensor, tensor, interaction_order=3, **options)[0]
        >>> np.allclose(output, flattened_attention([0.7], tensor, tensor, **options)[0])
        True
    """
    if (kept is None) == (interaction_order is None):
        raise ValueError("exactly one of kept and interaction_order must be given.")
    subsets = itertools.combinations(range(order), interaction_order or 0) if kept is None else kept
    counts = counting_numbers(subsets, order)
    averaged_out = [mode for mode in range(order) if not any(mode in subset for subset in counts)]

    def attend(q: Array, seen: _Seen) -> tuple[Array, float]:
        output = np.zeros(seen.value.shape[-1])
        shares = {m: seen.weights[m] / seen.weights[m].sum() for m in averaged_out}
        lse = sum(float(np.logaddexp.reduce(np.log(shares[m]) + seen.bias[m])) for m in averaged_out)
        for subset, count in counts.items():
            part, part_lse = _attend_means(q, seen, subset)
            output, lse = output + count * part, lse + count * part_lse
        correction, shift = _correct(q, seen, counts, interaction, saturation)
        return output + correction, lse + shift

    return _each_query(attend, query, key, value, order, weights, scale, causal, bias)


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


def kronecker_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    order: int,
    weights: PerMode = None,
    scale: Scale = None,
    pool: Pool = "mean",
) -> tuple[Array, None]:
    r"""Attend to every position with the product of one attention matrix a mode.

    .. math:: \sum_j \Big(\prod_m A^m[i_m, j_m]\Big) v_j, \qquad
              A^m[i, a] \propto w_m[a]\, e^{s\, Q^m[i] \cdot K^m[a]}

    Equal to full attention for all values if the logits have no terms across modes.

    Args:
        query: Queries on a grid of N modes, averaged with the same ``weights`` as the keys.
        key: Keys.
        value: Values.
        order: Number of modes N.
        weights: Multiplicities of the indices of each mode.
        scale: Factor of the logits.
        pool: "mean" for mode averages of query and key, "sum" for their sums over the other modes.

    Returns:
        The output on the grid of ``query``, and None.

    Examples:
        >>> value = [[[0.0], [2.0]], [[4.0], [8.0]]]
        >>> kronecker_product_attention(value, value, value, order=2, scale=0.0)[0][..., 0].tolist()
        [[3.5, 3.5], [3.5, 3.5]]

    References:
        Omranpour, Rabusseau and Rabbany, Higher-Order Transformers With Kronecker-Structured Attention, TMLR
        2025, arXiv 2412.02919. There a layer normalisation follows the sums, so that sums and means agree.
    """
    queries, values = _floats(query), _floats(value)
    batch, _ = _grid(values, order)
    matrices = _mode_attention(query, key, order, weights, scale, pool)
    positions = _read_positions(values, order, weights)
    output = np.zeros((*queries.shape[:-1], values.shape[-1]))
    for index in np.ndindex(queries.shape[:-1]):
        b, i = index[: len(batch)], index[len(batch) :]
        share = reduce(np.multiply.outer, [matrix[b][row] for matrix, row in zip(matrices, i, strict=True)])
        if isinstance(weights, np.ndarray) and order > 1:
            share = share * positions[b]
            share = share / share.sum() if share.sum() > 0 else share
        output[index] = share[share > 0] @ values[b][share > 0]
    return output, None


def kronecker_sum_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    order: int,
    weights: PerMode = None,
    scale: Scale = None,
    pool: Pool = "mean",
) -> tuple[Array, None]:
    r"""Attend along each mode with its own attention matrix, and add the N results up.

    .. math:: \sum_m \sum_a A^m[i_m, a]\, v_{i_1 \dots a \dots i_N}

    with the matrices of :func:`kronecker_product_attention`: the Kronecker sum of the matrices, a sum as in
    the paper and not a mean. A fibre through an absent index of another mode adds nothing. With an array of weights
    over the grid, each row is multiplied by the weights along its fibre and divided by its sum.

    Args:
        query: Queries on the grid of ``key``, averaged with the same ``weights`` as the keys.
        key: Keys.
        value: Values.
        order: Number of modes N.
        weights: Multiplicities of the indices of each mode.
        scale: Factor of the logits.
        pool: "mean" for mode averages of query and key, "sum" for their sums over the other modes.

    Returns:
        The output, and None.

    Raises:
        ValueError: If ``query`` is not on the grid of ``key``.

    Examples:
        >>> value = [[[0.0], [2.0]], [[4.0], [8.0]]]
        >>> kronecker_sum_attention(value, value, value, order=2, scale=0.0)[0][..., 0].tolist()
        [[3.0, 6.0], [8.0, 11.0]]

    References:
        Omranpour, Rabusseau and Rabbany, Higher-Order Transformers With Kronecker-Structured Attention, TMLR
        2025, arXiv 2412.02919.
    """
    queries, keys, values = _floats(query), _floats(key), _floats(value)
    if queries.shape != keys.shape:
        raise ValueError(f"query must be on the grid of key, got {queries.shape} and {keys.shape}.")
    positions = _read_positions(keys, order, weights)
    matrices = _mode_attention(query, key, order, weights, scale, pool)
    output = np.zeros((*keys.shape[:-1], values.shape[-1]))
    for index in np.ndindex(keys.shape[:-1]):
        for mode, fibre in _fibres(index, order):
            row, weight = matrices[mode][(*index[:-order], index[mode - order])], positions[fibre]
            if isinstance(weights, np.ndarray) and order > 1:
                row = row * weight
                row = row / row.sum() if row.sum() > 0 else row
            output[index] += row[weight > 0] @ values[fibre][weight > 0]
    return output, None


def merge_attention(parts: Sequence[tuple[ArrayLike, ArrayLike]]) -> tuple[Array, Array]:
    r"""Merge the attention of the same queries to several sets of tokens into that to their union.

    .. math:: \frac{\sum_p e^{L_p} o_p}{\sum_p e^{L_p}}, \qquad L = \log \sum_p e^{L_p}

    Args:
        parts: Output :math:`o_p` and log-sum-exp :math:`L_p` of each set.

    Returns:
        The output and the log-sum-exp of the union.

    Examples:
        >>> output, lse = merge_attention([([2.0], np.log(3.0)), ([6.0], np.log(1.0)), ([0.0], -np.inf)])
        >>> output.tolist(), round(float(np.exp(lse)), 12)
        ([3.0], 4.0)
    """
    outputs = np.stack([_floats(output) for output, _ in parts])
    lses = np.stack([_floats(lse) for _, lse in parts])
    merged, merged_lse = np.zeros(outputs.shape[1:]), np.full(lses.shape[1:], -np.inf)
    for index in np.ndindex(merged_lse.shape):
        logits = lses[(slice(None), *index)]
        if np.isfinite(logits).any():
            tokens = outputs[(slice(None), *index)]
            merged[index], merged_lse[index] = _softmax(logits, tokens, np.ones(len(parts)))
    return merged, merged_lse


class _Seen(NamedTuple):
    """What one query sees: the present part of one tensor, its weights, and the logit terms of its modes."""

    key: Array  # (n_1, …, n_N, D)
    value: Array  # (n_1, …, n_N, Dv)
    weights: list[Array]  # N of (n_m), all positive
    bias: list[Array]  # N of (n_m)
    weight: Array  # (n_1, …, n_N)


def _each_query(
    attend: Callable[[Array, _Seen], tuple[Array, float]],
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    order: int,
    weights: PerMode,
    scale: Scale,
    causal: int | None = None,
    bias: PerMode = None,
    required: Callable[[Iterable[bool]], bool] = all,
) -> tuple[Array, Array]:
    """Call ``attend`` for every query, times the scale, with what it sees, if all (or any) modes show a token."""
    queries, keys, values = _scaled(query, scale), _floats(key), _floats(value)
    batch, sizes = _grid(keys, order)
    if values.shape[:-1] != keys.shape[:-1] or queries.shape[: len(batch)] != batch:
        raise ValueError(f"query, key and value do not fit: {queries.shape}, {keys.shape}, {values.shape}.")
    if (causal is not None or bias is not None) and queries.ndim != keys.ndim:
        raise ValueError(f"causal and bias need a query on {order} modes, got the shape {queries.shape}.")
    if causal is not None and causal not in range(order):
        raise ValueError(f"causal must be one of the modes 0 to {order - 1}, got {causal}.")
    per_mode, positions = _read_weights(keys, order, weights), _read_positions(keys, order, weights)
    tables = _read_bias(keys, order, bias)
    output = np.zeros((*queries.shape[:-1], values.shape[-1]))
    lse = np.full(queries.shape[:-1], -np.inf)
    for index in np.ndindex(queries.shape[:-1]):
        b, i = index[: len(batch)], index[len(batch) :]
        seen_weights, seen_bias, present = [], [], []
        for mode, (size, table) in enumerate(zip(sizes, tables, strict=True)):
            last = size if mode != causal else i[mode] + 1
            indices = [a for a in range(size) if per_mode[mode][b][a] > 0 and a < last]
            terms = np.zeros(size) if table is None else table[b][i[mode]]
            present.append(indices)
            seen_weights.append(per_mode[mode][b][indices])
            seen_bias.append(terms[indices])
        grid = np.ix_(*present)
        if all(present) and required(bool(np.isfinite(terms).any()) for terms in seen_bias):
            weight = positions[b][grid]
            there = weight[..., None] > 0
            shown_key, shown_value = (np.where(there, tensor[b][grid], 0.0) for tensor in (keys, values))
            seen = _Seen(shown_key, shown_value, seen_weights, seen_bias, weight)
            output[index], lse[index] = attend(queries[index], seen)
    return output, lse


def _softmax(logits: Array, value: Array, weight: Array) -> tuple[Array, float]:
    """Attend to a grid of tokens: average of the values by softmax, and log-sum-exp."""
    peak = logits.max()
    mass = weight * np.exp(logits - peak)
    output = np.tensordot(mass, value, axes=mass.ndim) / mass.sum()
    return output, peak + np.log(mass.sum())


def _fibres(index: tuple[int, ...], order: int) -> Iterator[tuple[int, tuple[int | slice, ...]]]:
    """Yield each mode and the index of its fibre through a position."""
    b, i = index[:-order], index[-order:]
    for mode in range(order):
        yield mode, (*b, *i[:mode], slice(None), *i[mode + 1 :])


def _mean(tensor: Array, kept: Subset, weights: Sequence[Array]) -> Array:
    """Average one tensor over the modes that are not kept, skipping absent indices."""
    dropped = tuple(mode for mode in range(len(weights)) if mode not in kept)
    ones = [np.ones_like(w) if mode in kept else w for mode, w in enumerate(weights)]
    weight = reduce(np.multiply.outer, [w[w > 0] for w in ones])
    total = math.prod(weights[mode].sum() for mode in dropped)
    present = tensor[np.ix_(*(w > 0 for w in ones))]
    summed: Array = (weight[..., None] * present).sum(dropped)
    return summed / total if total > 0 else summed


def _mean_of_positions(tensor: Array, kept: Subset, weight: Array) -> Array:
    """Average one tensor over the modes that are not kept, by the weight of each position; zero over no position."""
    dropped = tuple(mode for mode in range(weight.ndim) if mode not in kept)
    present = np.where(weight[..., None] > 0, tensor, 0.0)
    summed, total = (weight[..., None] * present).sum(dropped), weight.sum(dropped)[..., None]
    return np.divide(summed, total, out=np.zeros_like(summed), where=total > 0)


def _attend_means(q: Array, seen: _Seen, kept: Subset) -> tuple[Array, float]:
    """Attend to the marginal means over the kept modes, each counted as often as the positions behind it."""
    count = np.asarray(seen.weight.sum(tuple(mode for mode in range(seen.weight.ndim) if mode not in kept)))
    bias = reduce(np.add.outer, [seen.bias[mode] for mode in kept], np.zeros(()))
    key, value = (_mean_of_positions(tensor, kept, seen.weight) for tensor in (seen.key, seen.value))
    return _softmax(key @ q + bias, value, count)


def _covariance(left: Array, right: Array, kept: Subset, weight: Array) -> Array:
    """Return the weighted covariance, left by right, of the marginal means over the kept modes."""
    share = weight.sum(tuple(mode for mode in range(weight.ndim) if mode not in kept)) / weight.sum()
    a, b = (_mean_of_positions(t, kept, weight) - _mean_of_positions(t, (), weight) for t in (left, right))
    return (share.reshape(-1, 1) * a.reshape(-1, a.shape[-1])).T @ b.reshape(-1, b.shape[-1])


def _correct(
    q: Array, seen: _Seen, counts: dict[Subset, int], interaction: str | None, saturation: float | None
) -> tuple[Array, float]:
    """Return what the interaction adds to the output and to the log-sum-exp."""
    if interaction is None:
        return np.zeros(seen.value.shape[-1]), 0.0
    if interaction != "linear":
        raise ValueError(f"interaction must be None or 'linear', got {interaction!r}.")
    every = tuple(range(len(seen.weights)))
    c_vk, c_kk = (
        _covariance(left, seen.key, every, seen.weight)
        - sum(count * _covariance(left, seen.key, u, seen.weight) for u, count in counts.items())
        for left in (seen.value, seen.key)
    )
    tau_squared = float(q @ c_kk @ q)
    damping = 1.0 if saturation is None else math.sqrt(1.0 + abs(tau_squared) / saturation**2)
    return c_vk @ q / damping, tau_squared / 2


def _mode_attention(
    query: ArrayLike, key: ArrayLike, order: int, weights: PerMode, scale: Scale, pool: Pool
) -> list[Array]:
    """Return the attention matrix of each mode, (*batch, n_m of the query, n_m): attention to unit vectors."""
    if pool not in ("mean", "sum"):
        raise ValueError(f"pool must be 'mean' or 'sum', got {pool!r}.")
    pooled: list[list[Array]] = []
    for tensor in (_floats(query), _floats(key)):
        means = mode_averages(tensor, order=order, weights=weights)
        if isinstance(weights, np.ndarray) and order > 1:
            slices = _slice_counts(tensor, order, weights)
            pooled.append(means if pool == "mean" else [m * n[..., None] for m, n in zip(means, slices, strict=True)])
            continue
        totals = [w.sum(-1)[..., None, None] for w in _read_weights(tensor, order, weights)]
        sizes = [math.prod(totals[:mode] + totals[mode + 1 :]) for mode in range(order)]
        pooled.append(means if pool == "mean" else [m * n for m, n in zip(means, sizes, strict=True)])
    matrices = []
    for mode, (q, k) in enumerate(zip(*pooled, strict=True)):
        units = np.broadcast_to(np.eye(k.shape[-2]), (*k.shape[:-1], k.shape[-2]))
        mode_weights = [_mode_columns(key, order, weights)[mode]]
        matrices.append(flattened_attention(q, k, units, order=1, weights=mode_weights, scale=scale)[0])
    return matrices


def _floats(values: ArrayLike) -> Array:
    """Return the values as a float64 array."""
    return np.asarray(values, dtype=np.float64)


def _scaled(query: ArrayLike, scale: Scale) -> Array:
    """Return the queries times the scale."""
    queries = _floats(query)
    return queries * (queries.shape[-1] ** -0.5 if scale is None else scale)


def _grid(tensor: Array, order: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the batch dimensions and the mode sizes of a tensor."""
    if order < 1 or tensor.ndim < order + 1:
        raise ValueError(f"a tensor of {order} modes cannot have the shape {tensor.shape}.")
    return tensor.shape[: -order - 1], tensor.shape[-order - 1 : -1]


def _read_weights(tensor: Array, order: int, weights: PerMode) -> list[Array]:
    """Return the weights of every mode, (*batch, n_m); given over the grid, how often each index counts for them."""
    batch, sizes = _grid(tensor, order)
    if isinstance(weights, np.ndarray) and order > 1:
        counts = _slice_counts(tensor, order, weights)
        present = [(count > 0).sum(-1, keepdims=True) for count in counts]
        totals = [np.maximum(count.sum(-1, keepdims=True), 1e-300) for count in counts]
        return [c * p / t for c, p, t in zip(counts, present, totals, strict=True)]
    given = [1.0 if w is None else w for w in _one_a_mode(order, weights)]
    result = [np.broadcast_to(_floats(w), (*batch, n)) for w, n in zip(given, sizes, strict=True)]
    if any((w < 0).any() for w in result):
        raise ValueError("weights must not be negative.")
    return result


def _one_a_mode(order: int, weights: PerMode) -> Sequence[ArrayLike | None]:
    """Return what was given for each mode; at order 1 an array over the grid is one."""
    if weights is None:
        return [None] * order
    return [weights] if isinstance(weights, np.ndarray) and order == 1 else list(weights)


def _read_positions(tensor: Array, order: int, weights: PerMode) -> Array:
    """Return the weight of every position, (*batch, n_1, …, n_N)."""
    batch, sizes = _grid(tensor, order)
    if isinstance(weights, np.ndarray) and order > 1:
        if (weights < 0).any():
            raise ValueError("weights must not be negative.")
        return np.broadcast_to(_floats(weights), (*batch, *sizes))
    per_mode = _read_weights(tensor, order, weights)
    result = np.ones((*batch, *sizes))
    for b in np.ndindex(batch):
        result[b] = reduce(np.multiply.outer, [w[b] for w in per_mode])
    return result


def _slice_counts(tensor: Array, order: int, weights: Array) -> list[Array]:
    """Return the weight of the positions in each slice of every mode, (*batch, n_m)."""
    positions = _read_positions(tensor, order, weights)
    dims = range(-order, 0)
    return [positions.sum(tuple(dim for dim in dims if dim != mode)) for mode in dims]


def _mode_columns(tensor: ArrayLike, order: int, weights: PerMode) -> Sequence[ArrayLike | None]:
    """Return how often each column of an attention matrix counts; given over the grid, whether its slice is empty."""
    if isinstance(weights, np.ndarray) and order > 1:
        return [(count > 0).astype(np.float64) for count in _slice_counts(_floats(tensor), order, weights)]
    return _one_a_mode(order, weights)


def _read_bias(tensor: Array, order: int, bias: PerMode) -> list[Array | None]:
    """Return the logit terms of every mode, (*batch, n_m of the query, n_m), or None."""
    batch, _ = _grid(tensor, order)
    given = [None] * order if bias is None else [None if t is None else _floats(t) for t in bias]
    return [None if t is None else np.broadcast_to(t, (*batch, *t.shape[-2:])) for t in given]
