"""Where operators equal full attention: on independent groups of modes, additive data, orthogonal channels."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tensorattn.testing import reference
from tensorattn.testing.check import Asked, Comparison, Comparisons, Draw, law
from tensorattn.testing.laws import full_attention
from tensorattn.testing.strategies import (
    LARGEST_LOGIT,
    Case,
    allowed,
    biases,
    cases,
    exact,
    generators,
    largest,
    mode_partitions,
    numbers,
    one_a_mode,
    tensor_normals,
)
from tensorattn.testing.theorems.common import called, expectation, mean_of, product_of

__all__ = [
    "additive_keys",
    "all_modes",
    "causal_exact",
    "decomposed_bias",
    "degenerate_laws",
    "groups_as_modes",
    "independent_groups",
    "missing_interaction",
    "orthogonal_channels",
    "orthogonal_outer_sums",
    "overlapping_groups",
    "symmetric_modes",
]

SYMMETRIC = 36  # positions of a grid whose modes are all of one size


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


@law("truncation to kept groups of modes is exact where the groups are independent",
     "A_K = F, LSE_K = LSE where k, v = Σ_g a^g[j_g], g ∈ K", max_positions=40, empty=True)  # fmt: skip
def independent_groups(ta: Any, case: Case, draw: Draw) -> Comparisons:
    """Keys and values are sums of one term a group of modes; the truncation keeps the groups, or all sets as large."""
    groups = draw(mode_partitions(case.order))
    case = _summed(groups, case, draw, 9, "key", "value")
    expected, expected_lse = full_attention(case)
    terms, size = 2**case.order, max(map(len, groups))  # as many terms as there are subsets cancel
    for what, how in ((f"to the groups {groups}", {"kept": groups}), (f"at {size}", {"interaction_order": size})):
        output, lse, *_ = called(ta.truncated_attention, case, return_lse=True, **how)
        told = f"truncation {what} must"
        yield Comparison(f"{told} equal full attention", output, expected, terms * case.allowed())
        yield Comparison(f"{told} have its log-sum-exp", lse, expected_lse, terms * case.allowed_lse)


@law("truncation at all modes is full attention, whatever the data", "A_r = F, r = N", weighted=False)
def all_modes(ta: Any, case: Case, draw: Draw) -> Comparisons:
    """Truncation at as many modes as there are, each of two indices, as fewer have no interaction."""
    generator, grid = draw(generators(9)), (*case.batch, *[2] * case.order)
    key, value = (numbers(generator, (*grid, t.shape[-1]), case.dtype).to(t.device) for t in (case.key, case.value))
    case = case.replace(key=key, value=value).at_most(LARGEST_LOGIT.get(case.dtype, 1.0))
    output = called(ta.truncated_attention, case, interaction_order=case.order)
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
    output, lse, *_ = called(ta.additive_attention, fewer, return_lse=True)
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
        output, lse, *_ = called(ta.additive_attention, slice_of, return_lse=True)
        parts.append((exact(output), exact(lse) + case.for_queries(weight.log().unsqueeze(-1)).squeeze(-1)))
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
    yield Comparison(told, called(ta.truncated_attention, case, interaction_order=degree), expected, tolerance)
    density = product_of(called(ta.additive_attention, case, return_attention=True).attention, case)
    formula = torch.zeros_like(expected)
    for kept, count in reference.counting_numbers(subsets, case.order).items():
        formula = formula + count * expectation(density, mean_of(case.value, case, kept).expand(case.value.shape), case)
    told = f"means of the values of at most {degree} modes must do under the product of softmaxes"
    yield Comparison(told, formula, expected, tolerance)


@law("with additive keys, what additive attention lacks is the mean interaction residual of the values",
     "F − A = ⟨⊗p_m, R^v⟩", additive=True, max_positions=40)  # fmt: skip
def missing_interaction(ta: Any, case: Case, draw: Draw) -> Comparisons:
    """Additive keys, any values: full less additive attention is the mean residual under the product of softmaxes."""
    case = case.replace(value=numbers(draw(generators(9)), case.value.shape, case.dtype).to(case.value.device))
    output, _, attention, _ = called(ta.additive_attention, case, return_attention=True)
    residual = ta.interaction_residual(exact(case.value), order=case.order, weights=case.all_weights())
    expected = expectation(product_of(attention, case), residual, case)
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
    yield Comparison(told, called(ta.additive_attention, case), full_attention(case)[0], tolerance)


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
    yield Comparison(told, called(ta.kronecker_product_attention, case), full_attention(case)[0], tolerance)


@law("centred averaged queries are exact where modes live in orthogonal channels, for additive values",
     "Σ_m A(Q^m) − (N−1) A(q̄) = F", on_grid=True, max_positions=36)  # fmt: skip
def orthogonal_outer_sums(ta: Any, case: Case, draw: Draw) -> Comparisons:
    """The same queries and keys, and additive values: averaged queries do, with one softmax a mode."""
    case, logit = _in_own_channels(case, draw)
    case = _summed([(mode,) for mode in range(case.order)], case, draw, 10, "value")
    tolerance = (2 * case.order - 1) * allowed("output", case.dtype, logit=logit, magnitude=case.magnitude)
    told = "where modes live in orthogonal channels centred outer sums must be full attention to additive values"
    yield Comparison(told, called(ta.kao_qkv, case, centered=True), full_attention(case)[0], tolerance)


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
        output = called(getattr(ta, name), alike)
        tolerance = 2**case.order * alike.allowed(largest(output))
        for mode in range(batch, batch + case.order - 1):
            told = f"{name} of tensors that are symmetric in all modes must be symmetric"
            yield Comparison(told, output, output.transpose(mode, mode + 1), tolerance)


@law("on additive data a bias that is a sum over modes is exact: tables, windows, boxes",
     "A_b = F_b where b(i, j) = Σ_m b_m[i_m, j_m]", on_grid=True, additive=True, max_positions=32)  # fmt: skip
def decomposed_bias(ta: Any, case: Case, draw: Draw) -> Comparisons:
    """Tables, windows and boxes: what is added to the logits is one term a mode, as additive logits are."""
    bias = draw(biases(case.sizes, case.positions, batch=case.batch, dtype=case.dtype, device=case.key.device))
    output, lse, *_ = called(ta.additive_attention, case, bias=bias, return_lse=True)
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
    output, lse, *_ = called(ta.additive_attention, case, causal=causal, return_lse=True)
    full, full_lse = full_attention(case, causal=causal)
    told = f"attention that is causal along mode {causal} must be full attention to the frames so far"
    yield Comparison(told, output, full, case.allowed())
    yield Comparison(f"{told} in its log-sum-exp", lse, full_lse, case.allowed_lse)
