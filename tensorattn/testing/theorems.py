"""The theorems behind the laws: what the operators, averages, summaries and laws of this package are made of.

Each is tried on a namespace with the names of the package, by default the package itself: ``ta`` below.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from tensorattn.testing import reference
from tensorattn.testing.check import Asked, Comparison, Draw, Law, holds, law
from tensorattn.testing.clusters import THEOREMS_OF_CLUSTERS
from tensorattn.testing.laws import along_queries, full_attention, marginal_covariance, slope
from tensorattn.testing.strategies import (
    LARGEST_LOGIT,
    Case,
    additive_tensors,
    allowed,
    biases,
    cases,
    epsilon,
    exact,
    generators,
    largest,
    mode_partitions,
    mode_sizes,
    numbers,
    one_a_mode,
    rows,
    tensor_normals,
)

__all__ = ["THEOREMS"]

Comparisons = Iterator[Comparison]

SYMMETRIC = 36  # positions of a grid whose modes are all of one size
SLACK = 1e-9  # relative, for bounds
LARGEST_SPREAD = 20.0  # of logits whose weights are compared as logarithms
DENSE, INVERTED = 1e-12, 1e-10  # relative to the largest entry: dense algebra in float64, and inverted covariances
SIZES = (5, 4, 3)  # of the tensor on which orders of the error are measured
SCALES = (1e-2, 1e-3)
LEAST_GAP = 200.0  # of logits, as e^-200 is nothing beside 1
GRIDS, REPEATS = (32, 128), 10  # of white noise; a mean over samples
PLATEAU = 0.4  # below the error that additive attention keeps there
FROM_TO = " → ".join(f"{size}²" for size in GRIDS)


def _called(function: Callable[..., Any], case: Case, **how: Any) -> Any:
    """Call a function with the signature of an operator."""
    tensors, named = case.given(**how)
    return function(*tensors, **named)


def _mean(tensor: Tensor, case: Case, kept: Collection[int] = ()) -> Tensor:
    """The weighted mean over all modes but the kept ones, in float64; averaged modes stay with size 1."""
    told: dict[str, Any] = {"order": case.order, "weights": case.all_weights()}
    means = reference.marginal_mean(exact(tensor), tuple(sorted(kept)), **told)
    shape = [size if mode in kept else 1 for mode, size in enumerate(case.sizes)]
    return means.reshape(*case.batch, *shape, tensor.shape[-1])


def _residual(tensor: Tensor, case: Case) -> Tensor:
    """The interaction residual, the tensor less its additive part, in float64."""
    return exact(tensor) - reference.additive_part(exact(tensor), order=case.order, weights=case.all_weights())


def _for_queries(tensor: Tensor, case: Case) -> Tensor:
    """Give ``(*batch, D)``, whatever sizes of 1 it has between, one dimension for each of the query's positions."""
    return tensor.reshape(*case.batch, *(1 for _ in case.positions), tensor.shape[-1])


def _product(attention: Sequence[Tensor], case: Case) -> Tensor:
    """The product of the attention weights ``(*batch, *positions, n_m)`` of the modes, ``(*batch, L, P)``."""
    parts = [rows(exact(part), len(case.batch)) for part in attention]
    return functools.reduce(lambda left, right: (left.unsqueeze(-1) * right.unsqueeze(-2)).flatten(-2), parts)


def _expectation(density: Tensor, tensor: Tensor, case: Case) -> Tensor:
    """The mean of a tensor over the grid under a law ``(*batch, L, P)`` for each query."""
    found = density @ rows(exact(tensor), len(case.batch))
    return found.reshape(*case.batch, *case.positions, tensor.shape[-1])


def _summed(groups: Collection[Collection[int]], case: Case, draw: Draw, stream: int, *names: str) -> Case:
    """Put sums of one term a group of modes, which add up without rounding in half precision, into a case."""
    generator, changes = draw(generators(stream)), {}
    for name in names:
        tensor = getattr(case, name)
        total = torch.zeros(tensor.shape, dtype=torch.float64)
        for group in groups:
            shape = [size if mode in group else 1 for mode, size in enumerate(case.sizes)]
            drawn = numbers(generator, (*case.batch, *shape, tensor.shape[-1]), case.dtype, addable=True)
            total = total + drawn.double()
        changes[name] = total.to(tensor.device, case.dtype)
    return case.replace(**changes)


def _zero(told: str, found: Tensor, tolerance: float, size: float) -> Comparison:
    """Compare with zero."""
    return Comparison(told, found, torch.zeros_like(found), tolerance, size)


def _at_most(told: str, found: Tensor, limit: Tensor, rounding: float) -> Comparison:
    """Compare numbers with what they must not exceed."""
    return _zero(told, (found - limit * (1 + SLACK)).clamp(min=0), rounding, largest(found, limit))


# Where operators equal full attention.


@law("truncation to kept groups of modes is exact where the groups are independent",
     "A_K = F, LSE_K = LSE where k, v = Σ_g a^g[j_g], g ∈ K", max_positions=40, empty=True)  # fmt: skip
def independent_groups(ta: Any, case: Case, draw: Draw) -> Comparisons:
    """Keys and values are sums of one term a group of modes; the truncation keeps the groups, or all sets as large."""
    groups = draw(mode_partitions(case.order))
    case = _summed(groups, case, draw, 9, "key", "value")
    expected, expected_lse = full_attention(case)
    terms, size = 2**case.order, max(map(len, groups))  # as many terms as there are subsets cancel
    for what, how in ((f"to the groups {groups}", {"kept": groups}), (f"at {size}", {"interaction_order": size})):
        output, lse, *_ = _called(ta.truncated_attention, case, return_lse=True, **how)
        told = f"truncation {what} must"
        yield Comparison(f"{told} equal full attention", output, expected, terms * case.allowed())
        yield Comparison(f"{told} have its log-sum-exp", lse, expected_lse, terms * case.allowed_lse)


@law("truncation at all modes is full attention, whatever the data", "A_r = F, r = N", weighted=False)
def all_modes(ta: Any, case: Case, draw: Draw) -> Comparisons:
    """Truncation at as many modes as there are, each of two indices, as fewer have no interaction."""
    generator, grid = draw(generators(9)), (*case.batch, *[2] * case.order)
    key, value = (numbers(generator, (*grid, t.shape[-1]), case.dtype).to(t.device) for t in (case.key, case.value))
    case = case.replace(key=key, value=value).at_most(LARGEST_LOGIT.get(case.dtype, 1.0))
    output = _called(ta.truncated_attention, case, interaction_order=case.order)
    told, tolerance = "truncation at all modes must equal full attention", 2**case.order * case.allowed()
    yield Comparison(told, output, full_attention(case)[0], tolerance)


@law("additive attention is exact with independent groups of modes as its modes",
     "A over groups = F where k, v = Σ_g a^g[j_g]", max_positions=40)  # fmt: skip
def groups_as_modes(ta: Any, case: Case, draw: Draw) -> Comparisons:
    """Keys and values are sums of one term a group of modes, and each group is flattened to one mode."""
    groups, batch = draw(mode_partitions(case.order)), len(case.batch)
    case = _summed(groups, case, draw, 9, "key", "value")
    dims = [*range(batch), *(batch + mode for group in groups for mode in group), batch + case.order]
    sizes = [math.prod(case.sizes[mode] for mode in group) for group in groups]
    key, value = (t.permute(dims).reshape(*case.batch, *sizes, t.shape[-1]) for t in (case.key, case.value))
    given = None
    if case.weights is not None:
        wide = torch.float32 if case.key.device.type == "mps" else torch.float64
        parts = ([case.mode_weights(mode).unsqueeze(-1) for mode in group] for group in groups)
        given = tuple(one_a_mode(part, torch.mul).flatten(batch).to(case.key.device, wide) for part in parts)
    fewer = case.replace(key=key, value=value, order=len(groups), weights=given)
    output, lse, *_ = _called(ta.additive_attention, fewer, return_lse=True)
    expected, expected_lse = full_attention(case)
    told = f"with the groups {groups} as modes additive attention must be full attention"
    yield Comparison(told, output, expected, case.allowed())
    yield Comparison(f"{told} in its log-sum-exp", lse, expected_lse, case.allowed_lse)


def _two_modes_at_least(**supposed: Any) -> Callable[[Asked, Any], Any]:
    """Return where cases come from that have two modes or more, whatever the user asks for."""

    def strategy(asked: Asked, subject: Any) -> Any:
        order = None if asked.order is None else max(2, asked.order)
        return cases(dtype=asked.dtype, device=asked.device, order=order, min_order=2, **supposed)

    return strategy


@law("where pairs of modes share one, additive attention at each of its indices merges to full attention",
     "F = Σ_a P(a) A(q; k[a], v[a]), P(a) ∝ e^(LSE_a), k, v = Σ_m a^m[j_0, j_m]",
     strategy=_two_modes_at_least(max_positions=40))  # fmt: skip
def overlapping_groups(ta: Any, case: Case, draw: Draw) -> Comparisons:
    """Pairs of modes that share the first: additive attention at each index of it, merged by log-sum-exps.

    Of the means alone no formula is exact there, since the log-sum-exp of a mean is not its mean.
    """
    case = _summed([(0, mode) for mode in range(1, case.order)], case, draw, 9, "key", "value")
    given = None if case.weights is None else case.weights[1:]
    parts = []
    for index, weight in enumerate(case.mode_weights(0).unbind(-1)):
        key, value = (t.select(len(case.batch), index) for t in (case.key, case.value))
        slice_of = case.replace(key=key, value=value, order=case.order - 1, weights=given)
        output, lse, *_ = _called(ta.additive_attention, slice_of, return_lse=True)
        parts.append((exact(output), exact(lse) + _for_queries(weight.log().unsqueeze(-1), case).squeeze(-1)))
    merged, lse = reference.merge_attention(parts)
    expected, expected_lse = full_attention(case)
    told = "additive attention at each index of the shared mode, merged, must be full attention"
    # A share errs by as much as its log-sum-exp.
    yield Comparison(told, merged, expected, case.allowed() + 2 * case.allowed_lse * case.magnitude)
    yield Comparison(f"{told} in its log-sum-exp", lse, expected_lse, case.allowed_lse)


@law("additive keys need the means up to the order of the values only", "F = Σ_(|U|≤r) c_U ⟨⊗p_m, V^U⟩",
     additive=True, max_positions=40)  # fmt: skip
def additive_keys(ta: Any, case: Case, draw: Draw) -> Comparisons:
    """Additive keys, and values of interactions of at most r modes: truncation at r, and its formula in softmaxes."""
    degree = draw(st.integers(1, case.order))
    subsets = tuple(itertools.combinations(range(case.order), degree))
    case = _summed(subsets, case, draw, 9, "value")
    expected, tolerance = full_attention(case)[0], 2**case.order * case.allowed()
    told = f"truncation at {degree} must be exact for additive keys and values of that order"
    yield Comparison(told, _called(ta.truncated_attention, case, interaction_order=degree), expected, tolerance)
    density = _product(_called(ta.additive_attention, case, return_attention=True).attention, case)
    formula = torch.zeros_like(expected)
    for kept, count in reference.counting_numbers(subsets, case.order).items():
        formula = formula + count * _expectation(density, _mean(case.value, case, kept).expand(case.value.shape), case)
    told = f"means of the values of at most {degree} modes must do under the product of softmaxes"
    yield Comparison(told, formula, expected, tolerance)


@law("with additive keys, what additive attention lacks is the mean interaction residual of the values",
     "F − A = ⟨⊗p_m, R^v⟩", additive=True, max_positions=40)  # fmt: skip
def missing_interaction(ta: Any, case: Case, draw: Draw) -> Comparisons:
    """Additive keys, any values: full less additive attention is the mean residual under the product of softmaxes."""
    case = case.replace(value=numbers(draw(generators(9)), case.value.shape, case.dtype).to(case.value.device))
    output, _, attention, _ = _called(ta.additive_attention, case, return_attention=True)
    residual = ta.interaction_residual(exact(case.value), order=case.order, weights=case.all_weights())
    expected = _expectation(_product(attention, case), residual, case)
    told = "with additive keys the error must be the mean interaction residual of the values"
    # Both are differences of outputs, which are as large as values.
    found, tolerance = full_attention(case)[0] - exact(output), 4 * case.order * case.allowed()
    yield Comparison(told, found, expected, tolerance, case.magnitude)


@law("additive attention is exact on samples of tensor-normal laws with all-ones covariances but one",
     "Σ_l = 11ᵀ for l ≠ m: A = F", max_positions=40)  # fmt: skip
def degenerate_laws(ta: Any, case: Case, draw: Draw) -> Comparisons:
    """Keys and values from sums of tensor-normal laws whose covariances but one are all ones."""
    wide = torch.float32 if case.dtype is torch.float32 else torch.float64
    key, value = (
        draw(tensor_normals(case.sizes, batch=case.batch, dim=t.shape[-1], dtype=wide, stream=stream)).to(t)
        for stream, t in ((1, case.key), (2, case.value))
    )
    case = case.replace(key=key, value=value, scale=min(abs(case.factor), 1.0))
    # Samples are additive before they are rounded, which moves a logit by a part of |q| |k|.
    bound = case.factor * largest(exact(case.query).norm(dim=-1)) * largest(exact(case.key).norm(dim=-1))
    tolerance = allowed("output", case.dtype, logit=bound, magnitude=case.magnitude)
    told = "on samples of degenerate tensor-normal laws additive attention must be full attention"
    yield Comparison(told, _called(ta.additive_attention, case), full_attention(case)[0], tolerance)


def _in_own_channels(case: Case, draw: Draw) -> tuple[Case, float]:
    """Give each mode channels of its own in queries and keys, then rotate, with a logit that bounds what is rounded."""
    generator, widths = draw(generators(9)), [draw(st.integers(1, 3)) for _ in case.sizes]

    def blocks() -> Tensor:
        parts = []
        for mode, (size, width) in enumerate(zip(case.sizes, widths, strict=True)):
            shape = [*case.batch, *(size if m == mode else 1 for m in range(case.order)), width]
            parts.append(numbers(generator, shape).expand(*case.batch, *case.sizes, width))
        return torch.cat(parts, -1)

    rotation = torch.linalg.qr(numbers(generator, (sum(widths), sum(widths)))).Q
    query, key = ((blocks() @ rotation).to(case.key) for _ in range(2))
    case = case.replace(query=query, key=key, scale=min(abs(case.factor), 1.0))
    return case, case.factor * largest(exact(query).norm(dim=-1)) * largest(exact(key).norm(dim=-1))


@law("the Kronecker product is exact where modes live in orthogonal channels, for any values",
     "α^l·κ^m = 0 for l ≠ m: A¹⊗…⊗A^N v = F", on_grid=True, max_positions=36)  # fmt: skip
def orthogonal_channels(ta: Any, case: Case, draw: Draw) -> Comparisons:
    """Queries and keys in which each mode has channels of its own, then rotated; any values."""
    case, logit = _in_own_channels(case, draw)
    tolerance = allowed("output", case.dtype, logit=logit, magnitude=case.magnitude)
    told = "where modes live in orthogonal channels the Kronecker product must be full attention"
    yield Comparison(told, _called(ta.kronecker_product_attention, case), full_attention(case)[0], tolerance)


@law("centred averaged queries are exact where modes live in orthogonal channels, for additive values",
     "Σ_m A(Q^m) − (N−1) A(q̄) = F", on_grid=True, max_positions=36)  # fmt: skip
def orthogonal_outer_sums(ta: Any, case: Case, draw: Draw) -> Comparisons:
    """The same queries and keys, and additive values: averaged queries do, with one softmax a mode."""
    case, logit = _in_own_channels(case, draw)
    case = _summed([(mode,) for mode in range(case.order)], case, draw, 10, "value")
    tolerance = (2 * case.order - 1) * allowed("output", case.dtype, logit=logit, magnitude=case.magnitude)
    told = "where modes live in orthogonal channels centred outer sums must be full attention to additive values"
    yield Comparison(told, _called(ta.kao_qkv, case, centered=True), full_attention(case)[0], tolerance)


@law("tensors that are symmetric in all modes have symmetric outputs", "x[π j] = x[j]: O[π j] = O[j]",
     strategy=_two_modes_at_least(on_grid=True, max_positions=36, weighted=False))  # fmt: skip
def symmetric_modes(ta: Any, case: Case, draw: Draw) -> Comparisons:
    """Tensors that do not change when modes are swapped, and operators that treat all modes alike."""
    widest = next((size for size in range(6, 2, -1) if size**case.order <= SYMMETRIC), 2)
    size, generator, batch = draw(st.integers(2, widest)), draw(generators(9)), len(case.batch)
    # Every index in ascending order: what is read there is the same for all orders of an index.
    index = torch.cartesian_prod(*[torch.arange(size)] * case.order).sort(-1).values
    place = (index * size ** torch.arange(case.order)).sum(-1)

    def symmetric(tensor: Tensor) -> Tensor:
        drawn = numbers(generator, (*case.batch, len(place), tensor.shape[-1]), case.dtype)
        return drawn[..., place, :].reshape(*case.batch, *[size] * case.order, tensor.shape[-1]).to(case.key.device)

    alike = case.replace(query=symmetric(case.query), key=symmetric(case.key), value=symmetric(case.value))
    alike = alike.at_most(LARGEST_LOGIT.get(case.dtype, 1.0))
    for name in ("additive_attention", "kao_kv", "kao_qkv", "truncated_attention", "kronecker_product_attention"):
        output = _called(getattr(ta, name), alike)
        tolerance = 2**case.order * alike.allowed(largest(output))
        for mode in range(batch, batch + case.order - 1):
            told = f"{name} of tensors that are symmetric in all modes must be symmetric"
            yield Comparison(told, output, output.transpose(mode, mode + 1), tolerance)


# Where a query stands.


@law("on additive data a bias that is a sum over modes is exact: tables, windows, boxes",
     "A_b = F_b where b(i, j) = Σ_m b_m[i_m, j_m]", on_grid=True, additive=True, max_positions=32)  # fmt: skip
def decomposed_bias(ta: Any, case: Case, draw: Draw) -> Comparisons:
    """Tables, windows and boxes: what is added to the logits is one term a mode, as additive logits are."""
    bias = draw(biases(case.sizes, case.positions, batch=case.batch, dtype=case.dtype, device=case.key.device))
    output, lse, *_ = _called(ta.additive_attention, case, bias=bias, return_lse=True)
    full, full_lse = full_attention(case, bias=bias)
    more = 1 + sum(largest(part) for part in bias if part is not None)
    told = "with a bias that is a sum over modes additive attention must be full attention"
    yield Comparison(told, output, full, case.allowed() * more)
    yield Comparison(f"{told} in its log-sum-exp", lse, full_lse, case.allowed_lse * more)


@law("on additive data causal additive attention is full attention to the frames so far",
     "A_t[i] = F[i] over j_t ≤ i_t", on_grid=True, additive=True, max_positions=32)  # fmt: skip
def causal_exact(ta: Any, case: Case, draw: Draw) -> Comparisons:
    """On additive tensors causal additive attention is full attention to the frames so far, with its log-sum-exp."""
    causal = draw(st.integers(0, case.order - 1))
    output, lse, *_ = _called(ta.additive_attention, case, causal=causal, return_lse=True)
    full, full_lse = full_attention(case, causal=causal)
    told = f"attention that is causal along mode {causal} must be full attention to the frames so far"
    yield Comparison(told, output, full, case.allowed())
    yield Comparison(f"{told} in its log-sum-exp", lse, full_lse, case.allowed_lse)


# What softmaxes over averages are.


def _orders(least: int, most: int) -> Callable[[Asked, Any], Any]:
    """Return where cases come from that are just a number of modes."""
    return lambda asked, _: st.integers(least, most) if asked.order is None else st.just(max(least, asked.order))


@law("counting numbers count every kept effect once, and have a closed form for all sets of r modes",
     "Σ_(U'⊇U) c_U' = 1; c_U = (−1)^(r−|U|) C(N−|U|−1, r−|U|)", strategy=_orders(1, 5), double=True)  # fmt: skip
def counted_once(ta: Any, case: int, draw: Draw) -> Comparisons:
    """A family of kept sets and all their parts; all sets of r of N modes; the case is N."""
    subsets = st.sets(st.integers(0, case - 1), min_size=1).map(sorted)
    family, of = draw(st.lists(subsets, min_size=1, max_size=6)), ta.functional.additive
    counts = of.counting_numbers(of.kept_family(case, family, None))
    totals = torch.tensor([sum(n for more, n in counts.items() if {*kept} <= {*more}) for kept in counts]).double()
    yield Comparison(f"every effect of the family {family} must be counted once", totals, torch.ones_like(totals))
    size = draw(st.integers(1, case))
    counts = of.counting_numbers(of.kept_family(case, None, size))
    ways = [math.comb(case - len(u) - 1, size - len(u)) if len(u) < case else 1 for u in counts]
    expected = torch.tensor([(-1) ** (size - len(u)) * way for u, way in zip(counts, ways, strict=True)]).double()
    told = f"counting numbers of all sets of {size} modes must have their closed form"
    yield Comparison(told, torch.tensor([*counts.values()]).double(), expected)


@law("outputs of averaged queries are outer sums; as published they count the mean value once a mode",
     "R(O) = 0; s = 0: O = N v̄", on_grid=True, max_positions=40)  # fmt: skip
def outer_sums(ta: Any, case: Case, draw: Draw) -> Comparisons:
    """Outputs of averaged queries have no interaction residual, whatever the data."""
    for centered in (False, True):
        output = _called(ta.kao_qkv, case, centered=centered)
        residual = ta.interaction_residual(exact(output), order=case.order)
        tolerance = 2 * case.order * allowed("average", case.dtype, magnitude=largest(output))
        yield _zero("the output of averaged queries must be an outer sum", residual, tolerance, largest(output))
    flat = case.replace(scale=0.0)
    output = _called(ta.kao_qkv, flat, centered=False)
    center = (case.order * _for_queries(_mean(case.value, case), case)).expand(output.shape)
    told = "at scale zero averaged queries as published must count the mean value once a mode"
    yield Comparison(told, output, center, case.order * flat.allowed())


@law("the more modes are kept, the larger the log-sum-exp, up to that of full attention",
     "log(P/n_U) + LSE_U ≤ log(P/n_W) + LSE_W, U ⊂ W", max_positions=40)  # fmt: skip
def ladder(ta: Any, case: Case, draw: Draw) -> Comparisons:
    """From the logit of the mean to the log-sum-exp of all positions, step by step."""
    everything = tuple(range(case.order))
    total = case.position_weights().flatten(len(case.batch)).sum(-1, keepdim=True).log()
    logit = case.factor * (exact(case.query) * _for_queries(_mean(case.key, case), case)).sum(-1)
    steps: dict[tuple[int, ...], Tensor] = {(): logit + _for_queries(total, case).squeeze(-1)}
    for size in range(1, case.order + 1):
        for kept in itertools.combinations(everything, size):
            steps[kept] = exact(_called(ta.truncated_attention, case, kept=[kept], return_lse=True).lse)
    for kept, larger in itertools.permutations(steps, 2):
        if set(kept) < set(larger):
            told = f"the log-sum-exp over {larger} must be at least that over {kept}"
            drop = (steps[kept] - steps[larger]).clamp(min=0)
            yield _zero(told, drop, case.allowed_lse, largest(steps[larger]))
    told = "the log-sum-exp over all modes must be that of full attention"
    yield Comparison(told, steps[everything], full_attention(case)[1], case.allowed_lse)


@law("additive attention is the mean value and each mode's effect, the joint softmax a share of each",
     "A = v̄ + Σ_m d_m, J = v̄ + Σ_m λ_m d_m, Σ_m λ_m = 1")  # fmt: skip
def joint_shares(ta: Any, case: Case, draw: Draw) -> Comparisons:
    """Additive attention is the mean value and each mode's effect, the joint softmax a share of each of these."""
    output, _, together, _ = _called(ta.kao_kv, case, return_attention=True)
    plain, _, separate, _ = _called(ta.additive_attention, case, return_attention=True)
    center = _for_queries(_mean(case.value, case), case)
    whole = total = center.expand(output.shape)
    added = torch.zeros(*case.batch, *case.positions, 1)
    for mode, (part, own) in enumerate(zip(together, separate, strict=True)):
        tokens = _mean(case.value, case, (mode,))
        effect = _expectation(rows(exact(own), len(case.batch)), tokens, case) - center
        share = exact(part).sum(-1, keepdim=True)
        whole, total, added = whole + effect, total + share * effect, added + share
    tolerance = 2 * case.order * case.allowed()
    yield Comparison("the joint softmax must be the mean value and a share of each effect", output, total, tolerance)
    yield Comparison("additive attention must be the mean value and the effect of each mode", plain, whole, tolerance)
    yield Comparison("the shares must add up to one", added, torch.ones_like(added), case.allowed_lse)


def _log_attention(case: Case) -> Tensor:
    """Logarithm of full attention in float64, ``(*batch, L, P)``, with the weight of a position left out."""
    query, key = (rows(exact(tensor), len(case.batch)) for tensor in (case.query, case.key))
    return case.factor * (query @ key.mT) - full_attention(case)[1].reshape(*query.shape[:-1], 1)


@law("attention to a mode is the geometric marginal of full attention, whatever the data",
     "p_m[a] ∝ (Π_(j_m=a) P_j)^(n_m/P)")  # fmt: skip
def geometric_marginals(ta: Any, case: Case, draw: Draw) -> Comparisons:
    """The weight of an index is the geometric mean of full attention over its slice, made to sum to one."""
    case = case.at_most(LARGEST_SPREAD)
    logs = _log_attention(case).mT.reshape(*case.batch, *case.sizes, -1)
    tolerance = allowed("log-sum-exp", case.dtype, logit=case.logit)
    for mode, own in enumerate(_called(ta.additive_attention, case, return_attention=True).attention):
        marginal = _mean(logs, case, (mode,)).reshape(*case.batch, case.sizes[mode], -1).mT
        marginal = torch.softmax(marginal + case.mode_weights(mode).log().unsqueeze(-2), -1)
        told = f"attention to mode {mode} must be the geometric marginal of full attention"
        yield Comparison(told, rows(own, len(case.batch)), marginal, tolerance)


@law("the product of the modes' attention is the projection of full attention on product laws",
     "|F − G|² = |F − ⊗p_m|² + |⊗p_m − G|² for G = ⊗g_m, centred logs")  # fmt: skip
def projection(ta: Any, case: Case, draw: Draw) -> Comparisons:
    """Pythagoras: full attention, the product of the modes' attention, and any other product have a right angle."""
    case, generator = case.at_most(LARGEST_SPREAD), draw(generators(9))
    own = _called(ta.additive_attention, case, return_attention=True).attention
    others = [torch.softmax(numbers(generator, part.shape), -1) for part in own]
    share = case.position_weights().reshape(*case.batch, 1, -1)
    share = share / share.sum(-1, keepdim=True)

    def centred(logs: Tensor) -> Tensor:
        logs = torch.where(share > 0, logs, 0.0)  # where no weight is, there is no attention, and no logarithm of it
        return logs - (share * logs).sum(-1, keepdim=True)

    def squared(left: Tensor, right: Tensor) -> Tensor:
        return (share * (left - right).square()).sum(-1)

    near, other = (centred((_product(part, case) / share).log()) for part in (own, others))
    full = centred(_log_attention(case))
    size = 1 + case.logit + largest(other)
    legs = squared(full, near) + squared(near, other)
    told = "the product of the modes' attention must be the foot of the perpendicular"
    yield Comparison(told, squared(full, other), legs, 4 * size * allowed("log-sum-exp", case.dtype, logit=size))


@law("full attention is its marginals on the averages and its mean of the interaction residual",
     "F = Σ_m P_m V^m − (N−1)v̄ + E_P[R^v]")  # fmt: skip
def arithmetic_marginals(ta: Any, case: Case, draw: Draw) -> Comparisons:
    """Full attention is its own marginals on mode averages, less mean values, and its mean of the residual."""
    output, _, (attention,), _ = _called(ta.flattened_attention, case, return_attention=True)
    batch, how = len(case.batch), {"order": case.order, "weights": case.all_weights()}
    density = rows(exact(attention).flatten(-case.order), batch)
    by_mode = density.unflatten(-1, case.sizes)
    expected = _expectation(density, ta.interaction_residual(exact(case.value), **how), case)
    for mode, tokens in enumerate(ta.mode_averages(exact(case.value), **how)):
        others = [batch + 1 + m for m in range(case.order) if m != mode]
        expected = expected + _expectation(by_mode.sum(others) if others else by_mode, tokens, case)
    expected = expected - (case.order - 1) * _for_queries(_mean(case.value, case), case)
    told = "full attention must be its marginals on the averages, and its mean of the interaction residual"
    yield Comparison(told, output, expected, 4 * case.order * case.allowed())


# Bounds.


def _tokens(case: Case, kept: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean keys and values over all modes but the kept ones, ``(*batch, T, D)``, and which stand for any position."""
    batch = len(case.batch)
    key, value = (rows(_mean(tensor, case, kept), batch) for tensor in (case.key, case.value))
    dropped = [batch + mode for mode in range(case.order) if mode not in kept]
    weight = case.position_weights()
    return key, value, (weight.sum(dropped) if dropped else weight).reshape(*case.batch, -1) > 0


def _diameter(tokens: Tensor, present: Tensor) -> Tensor:
    """Largest distance of two present ones of ``(*batch, T, D)``."""
    pairs = present.unsqueeze(-1) & present.unsqueeze(-2)
    distances = (tokens.unsqueeze(-2) - tokens.unsqueeze(-3)).norm(dim=-1)
    return torch.where(pairs, distances, 0.0).amax((-1, -2))


def _of_each_query(number: Tensor, case: Case) -> Tensor:
    """Give a number a batch entry one dimension for each of the query's positions."""
    return _for_queries(number.unsqueeze(-1), case).squeeze(-1)


def _moved(case: Case, draw: Draw) -> tuple[Case, Tensor]:
    """Move the queries, by steps of any length that their type can make; the case after, and the step in float64."""
    step = 10 ** draw(st.floats(-3, 1)) * numbers(draw(generators(9)), case.query.shape)
    moved = case.replace(query=(exact(case.query) + step).to(case.query))
    return moved, exact(moved.query) - exact(case.query)


@law("the error of additive attention is at most its bound, whatever the data",
     "|F − A| ≤ D_v tanh(Δ/4) + min(max|R^v|, σ_v √χ)", empty=True)  # fmt: skip
def bounded(ta: Any, case: Case, draw: Draw) -> Comparisons:
    """The distance of additive from full attention is at most its bound, and the cheap bound is the larger.

    Nearly additive keys or values leave one of its terms alone.
    """
    near, plain = {}, case.replace(weights=None)
    for name in ("key", "value"):
        tensor, kept = getattr(case, name), draw(st.sampled_from([1.0, 1e-2, 1e-5]))
        near[name] = (exact(tensor) - (1 - kept) * _residual(tensor, plain)).to(tensor)
    case = case.replace(**near)
    error = (full_attention(case)[0] - exact(_called(ta.additive_attention, case))).norm(dim=-1)
    rounding = case.allowed() * case.value.shape[-1] ** 0.5
    bound, cheap = (exact(_called(ta.error_bound, case, oscillation=how)) for how in ("exact", "cheap"))
    yield holds("the bound must be a number of at least 0", bool(((bound >= 0) & bound.isfinite()).all()))
    yield _at_most("the error must be at most its bound", error, bound, rounding)
    yield _at_most("the cheap bound must be at least the exact one", bound, cheap, rounding)


@law("the bound is attained by the exclusive or", "bound / |F − A| = 1 + tanh²(Δ/4)",
     strategy=_orders(2, 4), share=0.2, double=True)  # fmt: skip
def exclusive_or(ta: Any, case: int, draw: Draw) -> Comparisons:
    """Keys and values that are 1 or -1 by parity: bound over error is 1 + tanh²(Δ/4); the case is the order."""
    parity = one_a_mode([torch.tensor([[1.0], [-1.0]], dtype=torch.float64)] * case, torch.mul)
    for spread in (0.1, 1.0):
        query, how = torch.tensor([spread / 2], dtype=torch.float64), {"order": case, "scale": 1.0}
        full = ta.flattened_attention(query, parity, parity, **how)
        error = (full - ta.additive_attention(query, parity, parity, **how)).norm()
        expected = 1 + torch.tensor(spread / 4, dtype=torch.float64).tanh() ** 2
        for oscillation in ("exact", "cheap"):
            ratio = ta.error_bound(query, parity, parity, oscillation=oscillation, **how) / error
            yield Comparison(f"the {oscillation} bound must be attained at {spread}", ratio, expected, 1e-12)


@law("the error with the interaction term is at most its bound of second order, whatever the data",
     "|F − A − s C_vk q| ≤ (D_v Δ² + Σ_m D_(V^m) Δ_m²) / 8", max_positions=40, wide=2)  # fmt: skip
def second_order_bound(ta: Any, case: Case, draw: Draw) -> Comparisons:
    """What the interaction term leaves is at most an eighth of diameters times squared ranges of the logits."""
    # The bound falls by the square of the logits, and mistakes by the first power: where logits are small, it is close.
    reaches = [math.inf, epsilon(case.dtype) ** 0.1, epsilon(case.dtype) ** 0.2]
    case = case.at_most(draw(st.sampled_from(reaches)))
    output = _called(ta.additive_attention, case, interaction="linear", saturation=None)
    error = (full_attention(case)[0] - exact(output)).norm(dim=-1)
    query, limit = case.factor * rows(exact(case.query), len(case.batch)), torch.zeros_like(error)
    for kept in (tuple(range(case.order)), *((mode,) for mode in range(case.order))):
        key, value, present = _tokens(case, kept)
        logits = query @ key.mT
        low, high = (logits.masked_fill(~present.unsqueeze(-2), far) for far in (math.inf, -math.inf))
        spread = (high.amax(-1) - low.amin(-1)).reshape(error.shape)
        limit = limit + _of_each_query(_diameter(value, present), case) * spread.square() / 8
    rounding = case.allowed(largest(output)) * (1 + case.logit) * case.value.shape[-1] ** 0.5
    yield _at_most(
        "the error with the interaction term must be at most its bound of second order", error, limit, rounding
    )


@law("the interaction term is bounded by its saturation, and one channel attains the bound",
     "|corr| ≤ τ σ_v / √(1 + τ²/ℓ²) ≤ min(τ, ℓ) σ_v", max_positions=40)  # fmt: skip
def saturated(ta: Any, case: Case, draw: Draw) -> Comparisons:
    """The norm of the interaction term is below its bound, and attains it where keys and values are one channel."""
    saturation = draw(st.sampled_from([0.5, 1.0, 3.0]))
    case = case.replace(value=case.key) if case.key.shape[-1] == 1 else case
    output = exact(_called(ta.additive_attention, case, interaction="linear", saturation=saturation))
    norm = (output - exact(_called(ta.additive_attention, case))).norm(dim=-1)
    share = case.position_weights().reshape(*case.batch, -1, 1)
    share = share / share.sum(-2, keepdim=True)
    residuals = [rows(_residual(tensor, case), len(case.batch)) for tensor in (case.key, case.value)]
    of_keys, of_values = ((share * part).mT @ part for part in residuals)
    spread = torch.linalg.eigvalsh(of_values)[..., -1:].clamp(min=0).sqrt()
    query = case.factor * rows(exact(case.query), len(case.batch))
    square = ((query @ of_keys) * query).sum(-1).clamp(min=0)
    reach = ((square / (1 + square / saturation**2)).sqrt() * spread).reshape(norm.shape)
    tolerance = case.allowed(largest(output)) * (1 + case.logit) * case.value.shape[-1] ** 0.5
    yield _at_most("the interaction term must be within the bound of its saturation", norm, reach, tolerance)
    if case.value is case.key:
        yield Comparison("one channel must attain the bound of the saturation", norm, reach, tolerance)


@law("outputs move no faster with the query than the diameters of their tokens allow",
     "|ΔA| ≤ s/4 Σ_m D(K^m) D(V^m) |Δq|, |ΔJ| ≤ s/4 D(K) D(V) |Δq|")  # fmt: skip
def speed(ta: Any, case: Case, draw: Draw) -> Comparisons:
    """A quarter of the scale times diameters of keys and of values: additive, joint, with the interaction term."""
    case = case.replace(query=case.query * 10 ** draw(st.floats(-3, 0)))  # outputs move fastest at small logits
    moved, step = _moved(case, draw)
    sets = [_tokens(case, (mode,)) for mode in range(case.order)]
    key, value, present = (torch.cat(parts, -2 + (k > 1)) for k, parts in enumerate(zip(*sets, strict=True)))
    additive = (
        torch.stack([_diameter(keys, there) * _diameter(values, there) for keys, values, there in sets]).sum(0) / 4
    )
    joint = _diameter(key, present) * _diameter(value, present) / 4
    missing = marginal_covariance(case, range(case.order))
    missing = missing - torch.stack([marginal_covariance(case, (mode,)) for mode in range(case.order)]).sum(0)
    linear = {"interaction": "linear", "saturation": None}
    for name, limit, options in (
        ("additive_attention", additive, {}),
        ("kao_kv", joint, {}),
        ("additive_attention", additive + torch.linalg.matrix_norm(missing, 2), linear),
    ):
        before, after = (_called(getattr(ta, name), each, **options) for each in (case, moved))
        size = largest(before, after)
        rounding = (case.allowed(size) + moved.allowed(size)) * case.value.shape[-1] ** 0.5
        rounding *= 1 + case.logit + moved.logit if options else 1
        reach = case.factor * _of_each_query(limit, case) * step.norm(dim=-1)
        change = (exact(after) - exact(before)).norm(dim=-1)
        yield _at_most(f"{name} must not move faster than its limit", change, reach, rounding)


@law("Kronecker products and sums move no faster than their mean queries allow",
     "|ΔO| ≤ s/4 D(v) Σ_m D(K^m) |ΔQ^m|", on_grid=True, max_positions=36)  # fmt: skip
def speed_of_products(ta: Any, case: Case, draw: Draw) -> Comparisons:
    """The attention of each mode moves with its mean query, and moves the mean of all values that it weighs."""
    moved, step = _moved(case, draw)
    _, values, present = _tokens(case, tuple(range(case.order)))
    pace = torch.zeros(*case.batch, *case.sizes, dtype=torch.float64)
    for mode in range(case.order):
        key, _, there = _tokens(case, (mode,))
        pace = pace + _of_each_query(_diameter(key, there), case) * _mean(step, case, (mode,)).norm(dim=-1)
    reach = case.factor / 4 * pace * _of_each_query(_diameter(values, present), case)
    for name in ("kronecker_product_attention", "kronecker_sum_attention"):
        before, after = (exact(_called(getattr(ta, name), each)) for each in (case, moved))
        rounding = case.order * (case.allowed() + moved.allowed()) * case.value.shape[-1] ** 0.5
        told = f"{name} must not move faster than the mean queries allow"
        yield _at_most(told, (after - before).norm(dim=-1), reach, rounding)


@law("additive attention lies in the sum of the ranges of its modes",
     "Σ_m min V^m − (N−1)v̄ ≤ A ≤ Σ_m max V^m − (N−1)v̄")  # fmt: skip
def box(ta: Any, case: Case, draw: Draw) -> Comparisons:
    """Additive attention lies in the sum of the ranges of the modes' averages, less N - 1 mean values."""
    output = exact(_called(ta.additive_attention, case))
    low = high = -(case.order - 1) * _for_queries(_mean(case.value, case), case)
    for mode in range(case.order):
        _, value, present = _tokens(case, (mode,))
        low = low + _for_queries(value.masked_fill(~present.unsqueeze(-1), math.inf).amin(-2), case)
        high = high + _for_queries(value.masked_fill(~present.unsqueeze(-1), -math.inf).amax(-2), case)
    told, tolerance = "additive attention must lie in the box of its modes", (2 * case.order - 1) * case.allowed()
    yield Comparison(told, output, output.clamp(low, high), tolerance)


@law("less the mean value, outputs have at most the rank of the effects of the modes",
     "rank(A − v̄), rank(J − v̄) ≤ Σ_m (n_m − 1)", max_positions=24)  # fmt: skip
def rank(ta: Any, case: Case, draw: Draw) -> Comparisons:
    """Less the mean value, outputs of many queries in many channels span no more than the effects of the modes."""
    generator, effects = draw(generators(9)), sum(size - 1 for size in case.sizes)
    dim = effects + 2
    shapes = ((*case.batch, dim, dim), *[(*case.batch, *case.sizes, dim)] * 2)
    query, key, value = (numbers(generator, shape, case.dtype).to(case.key.device) for shape in shapes)
    case = case.replace(query=query, key=key, value=value).at_most(LARGEST_LOGIT.get(case.dtype, 1.0))
    center = _mean(case.value, case).reshape(*case.batch, 1, dim)
    for name in ("additive_attention", "kao_kv"):
        deviation = exact(_called(getattr(ta, name), case)) - center
        told = f"{name} less the mean value must have a rank of at most {effects}"
        # By Weyl, an error moves a singular value by at most its Frobenius norm.
        beyond, size = torch.linalg.svdvals(deviation)[..., effects:], largest(deviation)
        yield _zero(told, beyond, case.allowed(size) * dim, size)


# Gradients.


def _gradients(function: Callable[..., Any], case: Case, cotangent: Tensor) -> tuple[Tensor, ...]:
    """Gradients of query, key and value."""
    query, key, value = leaves = [t.detach().clone().requires_grad_() for t in (case.query, case.key, case.value)]
    output = _called(function, case.replace(query=query, key=key, value=value))
    return torch.autograd.grad(output, leaves, cotangent)


def _arriving(case: Case, draw: Draw) -> tuple[Tensor, float]:
    """The gradient that arrives at the output, and the most that does at those of a batch entry."""
    shape = (*case.query.shape[:-1], case.value.shape[-1])
    cotangent = numbers(draw(generators(5)), shape, case.dtype).to(case.value.device)
    return cotangent, float(exact(cotangent).abs().flatten(len(case.batch)).sum(-1).max())


@law("gradients of keys and values through averages are additive, whatever the data", "R(∂L/∂k) = R(∂L/∂v) = 0",
     weighted=False)  # fmt: skip
def additive_gradients(ta: Any, case: Case, draw: Draw) -> Comparisons:
    """The gradient of keys and of values is a sum of one term a mode; without weights, since they weigh it too."""
    cotangent, _ = _arriving(case, draw)
    for function in ("additive_attention", "kao_kv"):
        _, *gradients = _gradients(getattr(ta, function), case, cotangent)
        for name, gradient in zip(("keys", "values"), gradients, strict=True):
            tolerance = 2 * case.order * allowed("average", case.dtype, magnitude=largest(gradient))
            told = f"the gradient that {function} gives the {name} must be additive"
            yield _zero(told, _residual(gradient, case), tolerance, largest(gradient))


@law("gradients keep mass: of keys they add up to zero, of values to that of the output",
     "Σ_j ∂L/∂k_j = 0, Σ_j ∂L/∂v_j = Σ_i ∂L/∂O_i")  # fmt: skip
def mass(ta: Any, case: Case, draw: Draw) -> Comparisons:
    """Over all positions, gradients of the keys add up to zero, and those of the values to that of the output."""
    cotangent, size = _arriving(case, draw)
    batch = len(case.batch)
    modes, arriving = range(batch, batch + case.order), rows(exact(cotangent), batch).sum(-2)
    magnitude = size * case.order * (1 + case.magnitude)
    for name in ("additive_attention", "kao_kv", "clustered_attention", "flattened_attention"):
        attention = getattr(ta, name)
        attention = functools.partial(attention, tokens=3) if name == "clustered_attention" else attention
        _, of_keys, of_values = (exact(gradient) for gradient in _gradients(attention, case, cotangent))
        tolerance = allowed("gradient", case.dtype, logit=case.logit, magnitude=magnitude)
        told = f"the gradients that {name} gives the values must add up to that of its output"
        yield Comparison(told, of_values.sum([*modes]), arriving, tolerance)
        tolerance *= max(1.0, abs(case.factor) * largest(case.query))
        told = f"the gradients that {name} gives the keys must add up to zero"
        yield _zero(told, of_keys.sum([*modes]), tolerance, largest(of_keys))


@law("on additive data gradients are those of full attention, less interactions of keys and values",
     "∂A/∂q = ∂F/∂q, ∂A/∂k = (1 − R) ∂F/∂k", additive=True, weighted=False)  # fmt: skip
def projected_gradients(ta: Any, case: Case, draw: Draw) -> Comparisons:
    """On additive data the gradient of the query is that of full attention, of keys and values its additive part."""
    cotangent, size = _arriving(case, draw)
    query, *ours = _gradients(ta.additive_attention, case, cotangent)
    full_query, *theirs = _gradients(ta.flattened_attention, case, cotangent)
    size *= (1 + abs(case.factor) * (largest(case.query) + largest(case.key))) * (1 + case.magnitude)
    tolerance = allowed("gradient", case.dtype, logit=case.logit, magnitude=size)
    told = "on additive data the gradient of the query must be that of full attention"
    yield Comparison(told, query, full_query, tolerance)
    for left, right in zip(ours, theirs, strict=True):
        told = "on additive data gradients of keys and values must be the additive part of those of full attention"
        yield Comparison(told, left, exact(right) - _residual(right, case), tolerance)


@law("on an additive input a layer is full self-attention, and so are the gradients of its parameters",
     "∂A/∂W = ∂F/∂W for W_q, W_k, W_v, W_o and biases",
     double=True, dtype=torch.float64, max_positions=24)  # fmt: skip
def layers(ta: Any, case: Case, draw: Draw) -> Comparisons:
    """Self-attention of an additive input with heads and biased projections: outputs, gradients of parameters.

    The gradient of the input is that of full attention along additive tensors, which its slice means are.
    """
    heads, generator = draw(st.integers(1, 3)), draw(generators(7))
    channels, first = heads * draw(st.integers(1, 3)), draw(st.booleans())
    x = draw(additive_tensors(case.sizes, batch=(math.prod(case.batch),), dim=channels, stream=8))
    given = case.all_weights()
    given = None if given is None else [w.reshape(-1, w.shape[-1]) for w in given]
    how: dict[str, Any] = {"modes": case.order, "channels_first": first, "dtype": torch.float64}
    made = [ta.TensorAttention(channels, heads, operator=name, **how) for name in ("additive", "flattened")]
    with torch.no_grad():
        for parameter in made[0].parameters():
            parameter.copy_(numbers(generator, parameter.shape) / math.sqrt(channels))
    made[1].load_state_dict(made[0].state_dict())
    q, k, v = (getattr(made[0], name)(x).detach() for name in ("q_proj", "k_proj", "v_proj"))
    logit = largest(q.norm(dim=-1)) * largest(k.norm(dim=-1))
    size = (1 + channels * largest(*made[0].parameters())) ** 2 * (1 + largest(v)) * (1 + largest(x))
    leaves = [(x.movedim(-1, 1) if first else x).detach().clone().requires_grad_() for _ in made]
    ours, full = outputs = [module(leaf, weights=given) for module, leaf in zip(made, leaves, strict=True)]
    tolerance = case.order * allowed("output", torch.float64, logit=logit, magnitude=size)
    yield Comparison("a layer on an additive input must be full self-attention", ours, full, tolerance)
    cotangent = numbers(generator, full.shape)
    for output in outputs:
        output.backward(cotangent)
    size *= 1 + max(largest(leaf.grad) for leaf in (*made[1].parameters(), leaves[1]) if leaf.grad is not None)
    tolerance = case.order * allowed("gradient", torch.float64, logit=logit, magnitude=size)
    for (name, parameter), other in zip(made[0].named_parameters(), made[1].parameters(), strict=True):
        told = f"on an additive input the gradient of {name} must be that of full attention"
        yield Comparison(told, parameter.grad, other.grad, tolerance)
    axes = [mode + (2 if first else 1) for mode in range(case.order)]
    for mode, axis in enumerate(axes):
        others = [other for other in axes if other != axis]
        left, right = (leaf.grad.sum(others) if others else leaf.grad for leaf in leaves if leaf.grad is not None)
        told = f"on an additive input the gradient of the effect of mode {mode} must be that of full attention"
        yield Comparison(told, left, right, tolerance * math.prod(case.sizes))


# Limits.


@law("to first order in the scale the operators see the covariances of the means that they keep",
     "dA/ds = Σ_m Cov_m q, dJ/ds = Σ_m n_m/S Cov_m q, dA_K/ds = Σ_U c_U Cov_U q",
     double=True, dtype=torch.float64)  # fmt: skip
def first_orders(ta: Any, case: Case, draw: Draw) -> Comparisons:
    """The derivatives of additive, joint and truncated attention by the scale at zero."""
    modes = range(case.order)
    own = torch.stack([marginal_covariance(case, (mode,)) for mode in modes])
    rest = case.replace(key=_residual(case.key, case), value=_residual(case.value, case))
    told = "the covariance must be those of the mode averages and that of the interaction residuals"
    tolerance = allowed("average", case.dtype, magnitude=8 * case.order**2 * largest(case.key) * case.magnitude)
    yield Comparison(told, marginal_covariance(case, modes) - own.sum(0), marginal_covariance(rest, modes), tolerance)
    totals = torch.stack([case.mode_weights(mode).sum(-1) for mode in modes])
    parts = (totals / totals.sum(0))[..., None, None]
    family = tuple(itertools.combinations(modes, draw(st.integers(1, case.order))))
    counts = reference.counting_numbers(family, case.order)
    kept = torch.stack([n * marginal_covariance(case, u) for u, n in counts.items() if u]).sum(0)
    trials: tuple[tuple[str, dict[str, Any], Tensor], ...] = (
        ("additive_attention", {}, own.sum(0)),
        ("kao_kv", {}, (parts * own).sum(0)),
        ("truncated_attention", {"kept": family}, kept),
    )
    for name, options, matrix in trials:
        output = functools.partial(_called, getattr(ta, name), **options)
        told = f"the derivative of {name} by the scale at zero must be that of the theory"
        yield slope(case, along_queries(case, matrix), draw, told, output)


def _seed(asked: Asked, subject: Any) -> tuple[int, torch.dtype, Any]:
    """The only case of a law of fixed sizes: a seed, a type and a device."""
    return asked.seed or 0, asked.dtype, asked.device


@law("the error is of first order in the scale; of second with the interaction term, or truncated at the order of data",
     "|F − A| ~ s¹, |F − A − s C_vk q| ~ s², |F − A_r| ~ s² for k, v of order r, measured slopes",
     strategy=_seed, double=True, once=True)  # fmt: skip
def orders_of_the_error(ta: Any, case: tuple[int, torch.dtype, Any], draw: Draw) -> Comparisons:
    """Measured on a random tensor; what pairs of modes have together is not exact under truncation at pairs."""
    generator = torch.Generator().manual_seed(case[0])
    drawn = [torch.randn(*n, 4, generator=generator).double() for n in (SIZES, SIZES, (8,))]
    trials: list[tuple[float, int, str, dict[str, Any]]] = [
        (1.0, len(SIZES), name, {}) for name in ("additive_attention", "kao_kv", "truncated_attention")
    ]
    trials.append((2.0, 2, "truncated_attention", {"interaction_order": 2}))
    for saturation, name in itertools.product((None, 1.0), ("additive_attention", "truncated_attention")):
        trials.append((2.0, len(SIZES), name, {"interaction": "linear", "saturation": saturation}))
    for expected, together, name, options in trials:
        subsets = [*itertools.combinations(range(len(SIZES)), len(SIZES) - together)]
        key, value = (
            sum(t.mean(u, keepdim=True) if u else t for u in subsets) + torch.zeros_like(t) for t in drawn[:2]
        )
        errors = []
        for scale in SCALES:
            how = {"order": len(SIZES), "scale": scale}
            full = ta.flattened_attention(drawn[2], key, value, **how)
            errors.append((getattr(ta, name)(drawn[2], key, value, **how, **options) - full).norm())
        found = (errors[0] / errors[1]).log() / math.log(SCALES[0] / SCALES[1])
        told = f"the error of {name} with {options} must be of order {expected:g} in the scale"
        yield Comparison(told, found, torch.tensor(expected), 0.05, 1.0)


@law("on tensor-normal noise the error with the interaction term falls by the root of the positions, without it stays",
     f"|F − A − s C_vk q| ~ P^(−1/2), |F − A| / |F − v̄| > {PLATEAU}, {FROM_TO}: ratios 1/4 ± .1 and 1 ± .25",
     strategy=_seed, once=True)  # fmt: skip
def decay(ta: Any, case: tuple[int, torch.dtype, Any], draw: Draw) -> Comparisons:
    """Centred relative errors on white noise around an additive mean, on a small and a large grid."""
    number, dtype, device = case
    errors: list[list[float]] = [[], []]
    for size in GRIDS:
        missed, signal = [0.0, 0.0], 0.0
        for repeat in range(REPEATS):
            generator = torch.Generator().manual_seed(number * REPEATS + repeat)
            lines, columns, query = (torch.randn(n, generator=generator) for n in ((size, 1, 8), (size, 8), (32, 8)))
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(number * REPEATS + repeat)
                x = ta.TensorNormal((lines + columns) / 2, [torch.eye(size)] * 2, torch.eye(8)).sample()
            query = (query / query.norm(dim=-1, keepdim=True)).to(device, dtype)
            x, how = x.to(device, dtype), {"order": 2, "scale": 1.0}
            full = ta.flattened_attention(exact(query), exact(x), exact(x), **how)
            signal += float((full - exact(x).mean((0, 1))).square().sum())
            for place, options in enumerate(({"interaction": "linear", "saturation": None}, {})):
                output = ta.additive_attention(query, x, x, **how, **options)
                missed[place] += float((exact(output) - full).square().sum())
        for found, total in zip(errors, missed, strict=True):
            found.append(math.sqrt(total / signal))
    (small, large), (first, last) = errors
    told = "on white noise the error with the interaction term must fall as one over the root of the positions"
    yield Comparison(told, torch.tensor(large / small), torch.tensor(0.25), 0.1, 1.0)
    told = "on white noise the error without the interaction term must stay"
    yield Comparison(told, torch.tensor(last / first), torch.tensor(1.0), 0.25, 1.0)
    told = f"on white noise the error without the interaction term must be above {PLATEAU}"
    yield holds(told, min(first, last) > PLATEAU, f"it is {min(first, last):.3f}")


@law("noise of one law at every position tilts attention by its tilted mean, whatever the law",
     f"F → A + E[ξ e^(s q·ξ)] / E[e^(s q·ξ)] − E[ξ], {FROM_TO}: ratio 1/4 ± .15",
     strategy=_seed, double=True, once=True)  # fmt: skip
def homogeneous_noise(ta: Any, case: tuple[int, torch.dtype, Any], draw: Draw) -> Comparisons:
    """Exponential noise, the same at every position: its tilted mean is known, and no Gaussian one.

    Queries are so small that the variance of what is averaged has a variance itself.
    """
    errors = []
    for size in GRIDS:
        squares = 0.0
        for repeat in range(REPEATS):
            generator = torch.Generator().manual_seed(case[0] * REPEATS + repeat)
            lines, columns = numbers(generator, (size, 1, 4)), numbers(generator, (size, 4))
            uniform = torch.rand(size, size, 4, generator=generator, dtype=torch.float64)
            x = (lines + columns) / 2 - uniform.log()
            query = 0.25 * (2 * torch.rand(64, 4, generator=generator, dtype=torch.float64) - 1)
            tilt = 1 / (1 - query) - 1  # exponential noise of rate 1 that is tilted by t has a rate of 1 - t
            ours, full = (
                function(query, x, x, order=2, scale=1.0)
                for function in (ta.additive_attention, ta.flattened_attention)
            )
            squares += float((ours + tilt - full).square().mean())
        errors.append(math.sqrt(squares / REPEATS))
    told = "additive attention and the tilted mean of the noise must be the limit of full attention"
    yield Comparison(told, torch.tensor(errors[1] / errors[0]), torch.tensor(0.25), 0.15, 1.0)


def _best(query: Tensor, key: Tensor, value: Tensor, weight: Tensor) -> tuple[float, Tensor]:
    """The smallest gap between the best and the second logit of any query, and the values of the best."""
    logits = (query @ key.mT).masked_fill((weight == 0).unsqueeze(-2), -math.inf)
    top = logits.topk(min(2, logits.shape[-1])).values
    gap = float((top[..., 0] - top[..., -1]).min()) if top.shape[-1] > 1 else math.inf
    index = logits.argmax(-1, keepdim=True).expand(*logits.shape[:-1], value.shape[-1])
    return gap, torch.take_along_dim(value, index, -2)


@law("at a large scale each softmax attends to its best token alone",
     "s → ∞: A = Σ_m V^m[a*_m] − (N−1)v̄, J = V[a*]", wide=1)  # fmt: skip
def far_away(ta: Any, case: Case, draw: Draw) -> Comparisons:
    """At a scale so large that the best token of each set leaves no weight to the second.

    Keys lie on a line, each mode's in steps of its own, with little noise or more; some queries look for the one end
    of the line, some for the other.
    """
    generator, noise = draw(generators(9)), draw(st.sampled_from([0.0, 0.01, 1.0]))
    line = torch.where(numbers(generator, case.key.shape[-1:]) > 0, 1.0, -1.0)
    key = noise * exact(case.key)
    for mode, size in enumerate(case.sizes):
        steps = torch.randperm(size, generator=generator) * (1 + mode / case.order)
        key = key + steps.reshape(size, *[1] * (case.order - mode)) * line
    away = numbers(generator, (*case.query.shape[:-1], 1)) > 0
    query = torch.where(away, line, -line) + noise * exact(case.query)
    case = case.replace(query=query.to(case.query), key=key.to(case.key))
    batch, modes = len(case.batch), range(case.order)
    asking = exact(rows(case.query, batch))
    sets = [(*_tokens(case, (mode,))[:2], case.mode_weights(mode)) for mode in modes]
    together = tuple(torch.cat(parts, -2 + (k > 1)) for k, parts in enumerate(zip(*sets, strict=True)))
    gaps, chosen = zip(*(_best(asking, *tokens) for tokens in (*sets, together)), strict=True)
    # Both logits of a gap err by the rounding of averages; the logarithms of the weights are small beside the rest.
    gap = min(gaps) - 4 * allowed("average", case.dtype, magnitude=largest(asking.abs().sum(-1)) * largest(case.key))
    if gap <= 0:
        return
    far = case.replace(scale=max(1.0, LEAST_GAP / gap))
    center = _mean(case.value, case).reshape(*case.batch, 1, -1)
    additive = torch.stack(chosen[:-1]).sum(0) - (case.order - 1) * center
    for name, expected in (("additive_attention", additive), ("kao_kv", chosen[-1])):
        # Of the logits only the order counts: averages of values and their sums are all that is rounded.
        tolerance = (2 * case.order - 1) * allowed("output", case.dtype, magnitude=case.magnitude)
        told = f"at a large scale {name} must attend to the best token alone"
        yield Comparison(told, rows(_called(getattr(ta, name), far), batch), expected, tolerance)


# Averages, summaries, and laws of averages.


def _inner(first: Tensor, second: Tensor) -> tuple[Tensor, float]:
    """The inner product, and the size that its rounding errors are measured by."""
    terms = exact(first) * exact(second)
    return terms.sum(), float(terms.abs().sum())


@law("averages are means; averaging and its backward pass are adjoint, and so are outer sums up to the weights",
     "A x = x̄^m, ⟨A x, t⟩ = ⟨x, Aᵀ t⟩")  # fmt: skip
def adjoint(ta: Any, case: Case, draw: Draw) -> Comparisons:
    """Averages and outer sums are their definitions; without weights, the one is backwards what the other is."""
    generator, leaf = draw(generators(9)), case.key.detach().clone().requires_grad_()
    means = ta.mode_averages(leaf, order=case.order, weights=case.weights)
    defined = reference.mode_averages(exact(case.key), order=case.order, weights=case.all_weights())
    tolerance = allowed("average", case.dtype, magnitude=largest(case.key))
    for mode, (found, expected) in enumerate(zip(means, defined, strict=True)):
        yield Comparison(f"averages of mode {mode} must be means", found, expected, tolerance)
    others = [numbers(generator, mean.shape, case.dtype).to(mean.device).requires_grad_() for mean in means]
    total = ta.outer_sum(others)
    tolerance = allowed("average", case.dtype, magnitude=sum(map(largest, others)))
    expected = reference.outer_sum([exact(other) for other in others])
    yield Comparison("an outer sum must be a broadcast sum", total, expected, tolerance)
    (back,) = torch.autograd.grad(means, leaf, [other.detach() for other in others])
    pairs: list[tuple[str, Sequence[Tensor], Sequence[Tensor], Tensor, Tensor]]
    pairs = [("averaging", means, others, back, case.key)]
    pairs.append(("an outer sum", others, torch.autograd.grad(total, others, case.key), total, case.key))
    for what, left, right, one, other in pairs:
        products = [_inner(*pair) for pair in (*zip(left, right, strict=True), (one, other))]
        tolerance = allowed("average", case.dtype, magnitude=sum(size for _, size in products))
        found = torch.stack([value for value, _ in products[:-1]]).sum()
        yield Comparison(f"{what} must have its adjoint backwards", found, products[-1][0], tolerance)
    if case.weights is None:
        scaled = [(exact(other) * other.shape[-2] / math.prod(case.sizes)).to(other) for other in others]
        tolerance = allowed("average", case.dtype, magnitude=sum(map(largest, others)))
        yield Comparison("averaging must have an outer sum backwards", back, ta.outer_sum(scaled), tolerance)


@law("the additive part has the averages of the tensor, and nothing else", "x = a + R, R̄^m = 0, a = Σ_m x̄^m − (N−1)x̄")
def additive_parts(ta: Any, case: Case, draw: Draw) -> Comparisons:
    """The additive part is its definition, and a projection that averages cannot tell from the tensor."""
    how = {"order": case.order, "weights": case.weights}
    part, rest = ta.additive_part(case.key, **how), ta.interaction_residual(case.key, **how)
    tolerance = allowed("average", case.dtype, magnitude=2 * case.order * largest(case.key))
    yield Comparison(
        "the additive part must be its definition", exact(case.key) - part, _residual(case.key, case), tolerance
    )
    yield Comparison("the additive part and the residual must make the tensor", part + rest, case.key, tolerance)
    yield Comparison("the additive part must stay as it is", ta.additive_part(part, **how), part, 4 * tolerance)
    for mean in ta.mode_averages(rest, **how):
        yield _zero("the residual must average to zero over every slice", mean, tolerance, largest(case.key))


@law("repeating the indices of all modes equally often only counts the tokens of the joint softmax",
     "J same, LSE + log r", max_positions=16)  # fmt: skip
def joint_repetition(ta: Any, case: Case, draw: Draw) -> Comparisons:
    """Every token of the one softmax is there as many times; repeating those of one mode alone would move weight."""
    times, key, value = draw(st.integers(2, 3)), case.key, case.value
    for mode in range(len(case.batch), len(case.batch) + case.order):
        key, value = (tensor.repeat_interleave(times, mode) for tensor in (key, value))
    given = case.weights and tuple(None if w is None else w.repeat_interleave(times, -1) for w in case.weights)
    finer = case.replace(key=key, value=value, weights=given)
    (before, lse, *_), (after, moved, *_) = (_called(ta.kao_kv, each, return_lse=True) for each in (case, finer))
    yield Comparison("repeating all indices must have no effect", after, before, case.allowed())
    told = "repeating all indices must count the tokens in the log-sum-exp"
    yield Comparison(told, moved, exact(lse) + math.log(times), case.allowed_lse)


def _all_subsets(order: int) -> list[tuple[int, ...]]:
    """All subsets of the modes."""
    return [u for size in range(order + 1) for u in itertools.combinations(range(order), size)]


def _alike(case: Case, got: Any, expected: Any, sizes: Sequence[float], verb: str) -> Comparisons:
    """Compare two summaries whose means are at most of the given sizes."""
    for subset, told, count in zip(expected.kept, got.weights, expected.weights, strict=True):
        for name, size in zip(("key", "value"), sizes, strict=True):
            left, right = (exact(getattr(summary, name)(subset)) for summary in (got, expected))
            if count is not None:  # what stands for no position may be anything
                absent = exact(count).unsqueeze(-1) == 0
                left, right = left.masked_fill(absent, 0.0), right.masked_fill(absent, 0.0)
            tolerance = allowed("average", case.dtype, magnitude=size)
            yield Comparison(f"the {name} means of {subset} must {verb}", left, right, tolerance)
        if told is not None and count is not None:
            left, right = torch.broadcast_tensors(exact(told), exact(count))
            tolerance = allowed("average", told.dtype, magnitude=largest(right))
            yield Comparison(f"the weights of {subset} must {verb}", left, right, tolerance)
    tolerance = allowed("average", case.dtype, magnitude=8 * sizes[0] * max(sizes))
    for moment in ("covariance", "key_covariance"):
        yield Comparison(f"the {moment} must {verb}", getattr(got, moment), getattr(expected, moment), tolerance)


@law("the summaries of two parts merge to that of the whole", "S(x ∪ y) = S(x) + S(y)",
     empty=True, max_positions=40, wide=1)  # fmt: skip
def merging(ta: Any, case: Case, draw: Draw) -> Comparisons:
    """The summaries of two parts along a mode merge to that of the whole: means, counts, covariances."""

    def parted(mode: int, start: int, length: int) -> list[Tensor | None] | None:
        if case.weights is None:
            return None
        return [w if w is None or m != mode else w.narrow(-1, start, length) for m, w in enumerate(case.weights)]

    def there(mode: int, start: int, length: int) -> bool:
        given = parted(mode, start, length)
        return given is None or all(w is None or bool(w.any()) for w in given)

    cuts = [(mode, cut) for mode, size in enumerate(case.sizes) for cut in range(1, size)
            if there(mode, 0, cut) and there(mode, cut, size - cut)]  # fmt: skip
    if not cuts:
        return
    mode, cut = draw(st.sampled_from(cuts))
    how: dict[str, Any] = {"order": case.order, "kept": _all_subsets(case.order), "second_moment": True}
    parts = []
    for start, length in ((0, cut), (cut, case.sizes[mode] - cut)):
        pair = (tensor.narrow(len(case.batch) + mode, start, length) for tensor in (case.key, case.value))
        parts.append(ta.summarize(*pair, weights=parted(mode, start, length), **how))
    whole = ta.summarize(case.key, case.value, weights=case.weights, **how)
    sizes = [largest(case.key), largest(case.value)]
    yield from _alike(case, parts[0].merge(parts[1], mode=mode), whole, sizes, "merge")


@law("averages and covariances of a linear map are the linear map of averages and covariances",
     "S(x W + b) = S(x) W + b", double=True, dtype=torch.float64, max_positions=40)  # fmt: skip
def projecting(ta: Any, case: Case, draw: Draw) -> Comparisons:
    """Averages and covariances of what a linear map makes of a tensor are those that it makes of the summary."""
    generator, heads = draw(generators(9)), draw(st.none() | st.integers(1, 3))
    grids, maps, offsets, mapped = [exact(case.key), exact(case.value)], [], [], []
    for tensor in grids:
        width = (heads or 1) * draw(st.integers(1, 3))
        maps.append(numbers(generator, (width, tensor.shape[-1])))
        offsets.append(numbers(generator, (width,)))
        grown = F.linear(tensor, maps[-1], offsets[-1])
        mapped.append(grown if heads is None else grown.unflatten(-1, (heads, -1)).movedim(-2, len(case.batch)))
    given = case.all_weights()
    how: dict[str, Any] = {"order": case.order, "kept": _all_subsets(case.order), "second_moment": True}
    late = ta.summarize(*grids, weights=given, **how)
    late = late.project(*maps, key_bias=offsets[0], value_bias=offsets[1], num_heads=heads)
    given = given if given is None or heads is None else [weight.unsqueeze(-2) for weight in given]
    early = ta.summarize(*mapped, weights=given, **how)
    sizes = [
        float(a.abs().sum(-1).max()) * largest(t) + largest(b) for a, t, b in zip(maps, grids, offsets, strict=True)
    ]
    yield from _alike(case, late, early, sizes, "be projected")


def _small_grids(asked: Asked, subject: Any) -> Any:
    """Draw the sizes of a small grid."""
    return mode_sizes(order=asked.order, max_size=4, max_positions=48)


@law("averages of tensor-normal tensors are tensor-normal: laws against dense algebra",
     "Cov(x̄^U, x̄^W) = ⊗_m M_m ⊗ Σ_c", strategy=_small_grids, double=True)  # fmt: skip
def laws_of_averages(ta: Any, case: tuple[int, ...], draw: Draw) -> Comparisons:
    """Law and cross-covariance of marginal means against Kronecker products multiplied out; the case is the sizes."""
    generator, order = draw(generators(9)), len(case)
    effects = [numbers(generator, (size, 2)) for size in case]
    first, second = (sorted(draw(st.sets(st.integers(0, order - 1)))) for _ in range(2))
    roots = [numbers(generator, (size, size)) for size in (*case, 2)]
    factors = [root @ root.mT for root in roots]
    given = [numbers(generator, (size,)).abs() + 0.1 for size in case]
    loc = numbers(generator, (*case, 2))
    normal = ta.TensorNormal(loc, factors[:-1], factors[-1])
    dense = functools.reduce(torch.kron, factors)

    def averaging(kept: list[int]) -> Tensor:
        maps = [torch.eye(n).double() if m in kept else (given[m] / given[m].sum())[None] for m, n in enumerate(case)]
        return functools.reduce(torch.kron, [*maps, torch.eye(2).double()])

    left, right = averaging(first), averaging(second)
    marginal = ta.marginal_mean_law(normal, first, weights=given)
    cross = ta.marginal_cross_covariance(normal, first, second, weights=given).to_dense()
    additive = ta.additive_mean_law(effects, first, weights=given).flatten()
    for found, expected, what in (
        (cross, left @ dense @ right.mT, f"the covariance of the means of {first} and {second}"),
        (marginal.covariance_matrix, left @ dense @ left.mT, f"the covariance of the mean of {first}"),
        (marginal.mean.flatten(), left @ loc.flatten(), f"the expected mean of {first}"),
        (additive, left @ one_a_mode(effects).flatten(), f"the expected mean of {first} of an additive mean"),
    ):
        yield Comparison(f"{what} must be that of dense algebra", found, expected, DENSE * max(1.0, largest(expected)))


@law("generalised least squares weights make averages the best unbiased estimate of an additive mean",
     "w_m = Σ_m⁻¹1 / 1ᵀΣ_m⁻¹1: Π² = Π, (1 − Π) Σ Πᵀ = 0", strategy=_small_grids, double=True)  # fmt: skip
def gls_averages(ta: Any, case: tuple[int, ...], draw: Draw) -> Comparisons:
    """Averages with these weights project on additive tensors, and what they leave has no covariance with them.

    Where all indices of a mode are alike, they are equal weights.
    """
    generator, order = draw(generators(9)), len(case)
    roots = [numbers(generator, (size, size)) for size in case]
    factors = [root @ root.mT / size + 0.5 * torch.eye(size).double() for root, size in zip(roots, case, strict=True)]
    means = [ta.gls_weights(factor).unsqueeze(0).expand(factor.shape) for factor in factors]
    projector = -(order - 1) * functools.reduce(torch.kron, means)
    for mode, size in enumerate(case):
        kept = [*means[:mode], torch.eye(size).double(), *means[mode + 1 :]]
        projector = projector + functools.reduce(torch.kron, kept)
    additive = one_a_mode([numbers(generator, (size, 1)) for size in case]).flatten()
    left = (torch.eye(additive.numel()).double() - projector) @ functools.reduce(torch.kron, factors) @ projector.mT
    for found, expected, told in (
        (projector @ additive, additive, "additive tensors must stay as they are"),
        (projector @ projector, projector, "the averages must be a projection"),
        (left, torch.zeros_like(left), "what is left must have no covariance with the estimate"),
    ):
        yield Comparison(told, found, expected, INVERTED * max(1.0, largest(expected)))
    for size in case:
        alike = ta.gls_weights(torch.eye(size).double() + draw(st.floats(0, 4)))
        told = "indices that are alike must have equal weights"
        yield Comparison(told, alike, torch.full_like(alike, 1 / size), INVERTED)


THEOREMS: tuple[Law, ...] = (
    *(value for value in list(globals().values()) if isinstance(value, Law)),
    *THEOREMS_OF_CLUSTERS,
)
