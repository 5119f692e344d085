"""Bounds: of the error, of the interaction term, of how fast outputs move, and of where they lie."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tensorattn.testing.check import Comparison, Comparisons, Draw, holds, law
from tensorattn.testing.laws import full_attention, marginal_covariance
from tensorattn.testing.strategies import (
    LARGEST_LOGIT,
    Case,
    epsilon,
    exact,
    generators,
    largest,
    numbers,
    one_a_mode,
    rows,
)
from tensorattn.testing.theorems.common import called, mean_of, orders, residual_of, tokens_of, vanishes

__all__ = ["bounded", "box", "exclusive_or", "rank", "saturated", "second_order_bound", "speed", "speed_of_products"]

SLACK = 1e-9  # relative, for bounds


def _at_most(told: str, found: Tensor, limit: Tensor, rounding: float) -> Comparison:
    """Compare numbers with what they must not exceed."""
    return vanishes(told, (found - limit * (1 + SLACK)).clamp(min=0), rounding, largest(found, limit))


def _diameter(tokens: Tensor, present: Tensor) -> Tensor:
    """Largest distance of two present ones of ``(*batch, T, D)``."""
    pairs = present.unsqueeze(-1) & present.unsqueeze(-2)
    distances = (tokens.unsqueeze(-2) - tokens.unsqueeze(-3)).norm(dim=-1)
    return torch.where(pairs, distances, 0.0).amax((-1, -2))


def _of_each_query(number: Tensor, case: Case) -> Tensor:
    """Give a number a batch entry one dimension for each of the query's positions."""
    return case.for_queries(number.unsqueeze(-1)).squeeze(-1)


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
        near[name] = (exact(tensor) - (1 - kept) * residual_of(tensor, plain)).to(tensor)
    case = case.replace(**near)
    error = (full_attention(case)[0] - exact(called(ta.additive_attention, case))).norm(dim=-1)
    rounding = case.allowed() * case.value.shape[-1] ** 0.5
    bound, cheap = (exact(called(ta.error_bound, case, oscillation=how)) for how in ("exact", "cheap"))
    yield holds("the bound must be a number of at least 0", bool(((bound >= 0) & bound.isfinite()).all()))
    yield _at_most("the error must be at most its bound", error, bound, rounding)
    yield _at_most("the cheap bound must be at least the exact one", bound, cheap, rounding)


@law("the bound is attained by the exclusive or", "bound / |F − A| = 1 + tanh²(Δ/4)",
     strategy=orders(2, 4), share=0.2, double=True)  # fmt: skip
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
    output = called(ta.additive_attention, case, interaction="linear", saturation=None)
    error = (full_attention(case)[0] - exact(output)).norm(dim=-1)
    query, limit = case.factor * rows(exact(case.query), len(case.batch)), torch.zeros_like(error)
    for kept in (tuple(range(case.order)), *((mode,) for mode in range(case.order))):
        key, value, present = tokens_of(case, kept)
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
    output = exact(called(ta.additive_attention, case, interaction="linear", saturation=saturation))
    norm = (output - exact(called(ta.additive_attention, case))).norm(dim=-1)
    share = case.position_weights().reshape(*case.batch, -1, 1)
    share = share / share.sum(-2, keepdim=True)
    residuals = [rows(residual_of(tensor, case), len(case.batch)) for tensor in (case.key, case.value)]
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
    sets = [tokens_of(case, (mode,)) for mode in range(case.order)]
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
        before, after = (called(getattr(ta, name), each, **options) for each in (case, moved))
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
    _, values, present = tokens_of(case, tuple(range(case.order)))
    pace = torch.zeros(*case.batch, *case.sizes, dtype=torch.float64)
    for mode in range(case.order):
        key, _, there = tokens_of(case, (mode,))
        pace = pace + _of_each_query(_diameter(key, there), case) * mean_of(step, case, (mode,)).norm(dim=-1)
    reach = case.factor / 4 * pace * _of_each_query(_diameter(values, present), case)
    for name in ("kronecker_product_attention", "kronecker_sum_attention"):
        before, after = (exact(called(getattr(ta, name), each)) for each in (case, moved))
        rounding = case.order * (case.allowed() + moved.allowed()) * case.value.shape[-1] ** 0.5
        told = f"{name} must not move faster than the mean queries allow"
        yield _at_most(told, (after - before).norm(dim=-1), reach, rounding)


@law("additive attention lies in the sum of the ranges of its modes",
     "Σ_m min V^m − (N−1)v̄ ≤ A ≤ Σ_m max V^m − (N−1)v̄")  # fmt: skip
def box(ta: Any, case: Case, draw: Draw) -> Comparisons:
    """Additive attention lies in the sum of the ranges of the modes' averages, less N - 1 mean values."""
    output = exact(called(ta.additive_attention, case))
    low = high = -(case.order - 1) * case.for_queries(mean_of(case.value, case))
    for mode in range(case.order):
        _, value, present = tokens_of(case, (mode,))
        low = low + case.for_queries(value.masked_fill(~present.unsqueeze(-1), math.inf).amin(-2))
        high = high + case.for_queries(value.masked_fill(~present.unsqueeze(-1), -math.inf).amax(-2))
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
    center = mean_of(case.value, case).reshape(*case.batch, 1, dim)
    for name in ("additive_attention", "kao_kv"):
        deviation = exact(called(getattr(ta, name), case)) - center
        told = f"{name} less the mean value must have a rank of at most {effects}"
        # By Weyl, an error moves a singular value by at most its Frobenius norm.
        beyond, size = torch.linalg.svdvals(deviation)[..., effects:], largest(deviation)
        yield vanishes(told, beyond, case.allowed(size) * dim, size)
