"""Bounds: of errors, of corrections, of how fast outputs move, of where they lie and of the rank that they have."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from tensorattn.diagnose import error_bound
from tensorattn.operators.additive import additive_attention
from tensorattn.operators.flattened import flattened_attention
from tensorattn.operators.kao_kv import kao_kv
from tensorattn.operators.kronecker_product import kronecker_product_attention
from tensorattn.operators.kronecker_sum import kronecker_sum_attention
from tensorattn.testing import Case, Subject
from tensorattn.testing.cases import rows
from tensorattn.testing.checks.derivatives import marginal_covariance
from tensorattn.testing.definitions import attention
from tensorattn.testing.drawing import generators, numbers
from tensorattn.testing.tolerances import LARGEST_LOGIT, epsilon, exact, largest
from tensorattn.verify.means import at_most, for_queries, mean, residual
from tensorattn.verify.statement import Statement, called, drawn_cases, drawn_orders, st

__all__ = ["STATEMENTS"]

SLACK = 1e-9  # relative, for bounds


def bounded(subject: Subject, case: Case, draw: Any) -> None:
    """The distance of additive from full attention is at most its bound, and the cheap bound is the larger.

    Nearly additive keys or values leave one of its terms alone.
    """
    near = {}
    for name in ("key", "value"):
        tensor, kept = getattr(case, name), draw(st.sampled_from([1.0, 1e-2, 1e-5]))
        near[name] = (exact(tensor) - (1 - kept) * residual(tensor, case.replace(weights=None))).to(tensor)
    case = case.replace(**near)
    full = exact(called(flattened_attention, case))
    error = (full - exact(called(additive_attention, case))).norm(dim=-1)
    rounding = case.allowed() * case.value.shape[-1] ** 0.5
    bound, cheap = (exact(called(error_bound, case, oscillation=how)) for how in ("exact", "cheap"))
    subject.expect(bool(((bound >= 0) & bound.isfinite()).all()), "the bound must be a number of at least 0", case)
    for left, right, statement in (
        (error, bound, "the error must be at most its bound"),
        (bound, cheap, "the cheap bound must be at least the exact one"),
    ):
        _at_most(subject, left, right, rounding, statement, case)


def exclusive_or(subject: Subject, case: int, draw: Any) -> None:
    """Keys and values that are 1 or -1 by parity: bound over error is 1 + tanh²(Δ/4); the case is the order."""
    sides = (torch.tensor([1.0, -1.0]).double().reshape([2] + [1] * mode) for mode in range(case))
    parity = functools.reduce(torch.mul, sides).unsqueeze(-1)
    for spread in (0.1, 1.0):
        query = torch.tensor([spread / 2], dtype=torch.float64)
        how: dict[str, Any] = {"order": case, "scale": 1.0}
        full: Any = flattened_attention(query, parity, parity, **how)
        error = (full - additive_attention(query, parity, parity, **how)).norm()
        expected = 1 + torch.tensor(spread / 4, dtype=torch.float64).tanh() ** 2
        for oscillation in ("exact", "cheap"):
            ratio = error_bound(query, parity, parity, oscillation=oscillation, **how) / error
            statement = f"the {oscillation} bound must be attained at an oscillation of {spread}"
            subject.expect_close(ratio, expected, 1e-12, statement, case)  # type: ignore[arg-type]


def second_order_bound(subject: Subject, case: Case, draw: Any) -> None:
    """What the interaction term leaves is at most an eighth of diameters times squared ranges of the logits."""
    # The bound falls by the square of the logits, and mistakes by the first power: where logits are small, it is close.
    reaches = [math.inf, epsilon(case.dtype) ** 0.1, epsilon(case.dtype) ** 0.2]
    case = at_most(case, draw(st.sampled_from(reaches)))
    output = called(additive_attention, case, interaction="linear", saturation=None)
    error = (torch.from_numpy(attention(case)[0]) - exact(output)).norm(dim=-1)
    queries = case.factor * rows(exact(case.query), len(case.batch))
    limit = torch.zeros_like(error)
    for kept in (tuple(range(case.order)), *((mode,) for mode in range(case.order))):
        tokens, present = _tokens(case, kept)
        logits = queries @ tokens["key"].mT
        low, high = (logits.masked_fill(~present.unsqueeze(-2), far) for far in (math.inf, -math.inf))
        spread = (high.amax(-1) - low.amin(-1)).reshape(error.shape)
        limit = limit + _for_each_query(_diameter(tokens["value"], present), case) * spread.square() / 8
    statement = "the error with the interaction term must be at most its bound of second order"
    rounding = case.allowed(largest(output)) * (1 + case.logit) * case.value.shape[-1] ** 0.5
    _at_most(subject, error, limit, rounding, statement, case)


def saturated(subject: Subject, case: Case, draw: Any) -> None:
    """The norm of the interaction term is below its bound, and attains it where keys and values are one channel."""
    saturation = draw(st.sampled_from([0.5, 1.0, 3.0]))
    if case.key.shape[-1] == 1:
        case = case.replace(value=case.key)
    plain = called(additive_attention, case)
    bounded = called(additive_attention, case, interaction="linear", saturation=saturation)
    norm = (exact(bounded) - exact(plain)).norm(dim=-1)
    share = case.position_weights().reshape(*case.batch, -1, 1)
    share = share / share.sum(-2, keepdim=True)
    residuals = [rows(residual(tensor, case), len(case.batch)) for tensor in (case.key, case.value)]
    of_keys, of_values = ((share * part).mT @ part for part in residuals)
    spread = torch.linalg.eigvalsh(of_values)[..., -1:].clamp(min=0).sqrt()
    query = case.factor * rows(exact(case.query), len(case.batch))
    square = ((query @ of_keys) * query).sum(-1).clamp(min=0)
    reach = (square / (1 + square / saturation**2)).sqrt() * spread
    reach = reach.reshape(norm.shape)
    tolerance = case.allowed(largest(bounded)) * (1 + case.logit) * case.value.shape[-1] ** 0.5
    statement = "the interaction term must be within the bound of its saturation"
    _at_most(subject, norm, reach, tolerance, statement, case)
    if case.value is case.key:
        subject.expect_close(norm, reach, tolerance, "one channel must attain the bound of the saturation", case)


def speed(subject: Subject, case: Case, draw: Any) -> None:
    """A quarter of the scale times diameters of keys and of values: additive, joint, with the interaction term."""
    case = case.replace(query=case.query * 10 ** draw(st.floats(-3, 0)))  # outputs move fastest at small logits
    moved, step = _moved(case, draw)
    sets = [_tokens(case, (mode,)) for mode in range(case.order)]
    separate = [_diameter(tokens["key"], here) * _diameter(tokens["value"], here) for tokens, here in sets]
    present = torch.cat([here for _, here in sets], -1)
    together = [torch.cat([tokens[name] for tokens, _ in sets], -2) for name in ("key", "value")]
    additive = torch.stack(separate).sum(0) / 4
    joint = torch.stack([_diameter(part, present) for part in together]).prod(0) / 4
    missing = marginal_covariance(case, range(case.order))
    missing = missing - torch.stack([marginal_covariance(case, (mode,)) for mode in range(case.order)]).sum(0)
    corrected = additive + torch.linalg.matrix_norm(missing, 2)
    linear = {"interaction": "linear", "saturation": None}
    for function, limit, options in (
        (additive_attention, additive, {}),
        (kao_kv, joint, {}),
        (additive_attention, corrected, linear),
    ):
        before, after = (called(function, each, **options) for each in (case, moved))
        size = largest(before, after)
        rounding = (case.allowed(size) + moved.allowed(size)) * case.value.shape[-1] ** 0.5
        rounding *= 1 + case.logit + moved.logit if options else 1
        reach = case.factor * _for_each_query(limit, case) * step.norm(dim=-1)
        change = (exact(after) - exact(before)).norm(dim=-1)
        _at_most(subject, change, reach, rounding, f"{function.__name__} must not move faster than its limit", case)


def speed_of_products(subject: Subject, case: Case, draw: Any) -> None:
    """The attention of each mode moves with its mean query, and moves the mean of all values that it weighs."""
    moved, step = _moved(case, draw)
    present = case.position_weights().reshape(*case.batch, -1) > 0
    values = _diameter(rows(exact(case.value), len(case.batch)), present)
    pace = torch.zeros(*case.batch, *case.sizes, dtype=torch.float64)
    for mode in range(case.order):
        tokens, here = _tokens(case, (mode,))
        limit = _diameter(tokens["key"], here).reshape(*case.batch, *(1 for _ in case.sizes))
        pace = pace + limit * mean(step, case, (mode,)).norm(dim=-1)
    reach = case.factor / 4 * pace * values.reshape(*case.batch, *(1 for _ in case.sizes))
    for function in (kronecker_product_attention, kronecker_sum_attention):
        before, after = (exact(called(function, each)) for each in (case, moved))
        rounding = case.order * (case.allowed() + moved.allowed()) * case.value.shape[-1] ** 0.5
        statement = f"{function.__name__} must not move faster than the mean queries allow"
        _at_most(subject, (after - before).norm(dim=-1), reach, rounding, statement, case)


def box(subject: Subject, case: Case, draw: Any) -> None:
    """Additive attention lies in the sum of the ranges of the modes' averages, less N - 1 mean values."""
    output = exact(called(additive_attention, case))
    low = high = -(case.order - 1) * for_queries(mean(case.value, case), case)
    for mode in range(case.order):
        tokens, present = _tokens(case, (mode,))
        absent = ~present.unsqueeze(-1)
        low = low + for_queries(tokens["value"].masked_fill(absent, math.inf).amin(-2), case)
        high = high + for_queries(tokens["value"].masked_fill(absent, -math.inf).amax(-2), case)
    inside = output.clamp(low.expand(output.shape), high.expand(output.shape))
    statement = "additive attention must lie in the box of its modes"
    subject.expect_close(output, inside, (2 * case.order - 1) * case.allowed(), statement, case)


def rank(subject: Subject, case: Case, draw: Any) -> None:
    """Less the mean value, outputs of many queries in many channels span no more than the effects of the modes."""
    generator, effects = draw(generators(9)), sum(size - 1 for size in case.sizes)
    dim = effects + 2
    query = numbers(generator, (*case.batch, dim, dim), case.dtype)
    key, value = (numbers(generator, (*case.batch, *case.sizes, dim), case.dtype) for _ in range(2))
    tensors = {"query": query, "key": key, "value": value}
    case = case.replace(**{name: tensor.to(case.key.device) for name, tensor in tensors.items()})
    case = at_most(case, LARGEST_LOGIT.get(case.dtype, 1.0))
    center = mean(case.value, case).reshape(*case.batch, 1, dim)
    for function in (additive_attention, kao_kv):
        deviation = exact(called(function, case)) - center
        beyond = torch.linalg.svdvals(deviation)[..., effects:]
        # By Weyl, an error moves a singular value by at most its Frobenius norm.
        tolerance = case.allowed(largest(deviation)) * dim
        statement = f"{function.__name__} less the mean value must have a rank of at most {effects}"
        size = largest(deviation)
        subject.expect_close(beyond, torch.zeros_like(beyond), tolerance, statement, case, size=size)


def _moved(case: Case, draw: Any) -> tuple[Case, Tensor]:
    """Move the queries, by steps of any length that their type can make; the case after, and the step in float64."""
    step = 10 ** draw(st.floats(-3, 1)) * numbers(draw(generators(9)), case.query.shape)
    moved = case.replace(query=(exact(case.query) + step).to(case.query))
    return moved, exact(moved.query) - exact(case.query)


def _tokens(case: Case, kept: tuple[int, ...]) -> tuple[dict[str, Tensor], Tensor]:
    """Mean keys and values over all modes but the kept ones, ``(*batch, T, D)``, and which stand for any position."""
    batch = len(case.batch)
    tokens = {name: rows(mean(getattr(case, name), case, kept), batch) for name in ("key", "value")}
    dropped = [batch + mode for mode in range(case.order) if mode not in kept]
    weight = case.position_weights()
    return tokens, (weight.sum(dropped) if dropped else weight).reshape(*case.batch, -1) > 0


def _diameter(tokens: Tensor, present: Tensor) -> Tensor:
    """Largest distance of two present ones of ``(*batch, T, D)``."""
    pairs = present.unsqueeze(-1) & present.unsqueeze(-2)
    distances = (tokens.unsqueeze(-2) - tokens.unsqueeze(-3)).norm(dim=-1)
    return torch.where(pairs, distances, 0.0).amax((-1, -2))


def _for_each_query(number: Tensor, case: Case) -> Tensor:
    """Give a number a batch entry one dimension for each of the query's positions."""
    return for_queries(number.unsqueeze(-1), case).squeeze(-1)


def _at_most(subject: Subject, found: Tensor, limit: Tensor, rounding: float, statement: str, case: Case) -> None:
    """Compare numbers with what they must not exceed."""
    excess = (found - limit * (1 + SLACK)).clamp(min=0)
    subject.expect_close(excess, torch.zeros_like(excess), rounding, statement, case, size=largest(found, limit))


STATEMENTS = (
    Statement(
        "the error of additive attention is at most its bound, whatever the data",
        "|F − A| ≤ D_v tanh(Δ/4) + min(max|R^v|, σ_v √χ)",
        bounded,
        drawn_cases(empty=True),
    ),
    Statement(
        "the bound is attained by the exclusive or",
        "bound / |F − A| = 1 + tanh²(Δ/4)",
        exclusive_or,
        drawn_orders(2, 4),
        share=0.2,
        double=True,
    ),
    Statement(
        "the error with the interaction term is at most its bound of second order, whatever the data",
        "|F − A − s C_vk q| ≤ (D_v Δ² + Σ_m D_(V^m) Δ_m²) / 8",
        second_order_bound,
        drawn_cases(max_positions=40, wide=2),
    ),
    Statement(
        "the interaction term is bounded by its saturation, and one channel attains the bound",
        "|corr| ≤ τ σ_v / √(1 + τ²/ℓ²) ≤ min(τ, ℓ) σ_v",
        saturated,
        drawn_cases(max_positions=40),
    ),
    Statement(
        "outputs move no faster with the query than the diameters of their tokens allow",
        "|ΔA| ≤ s/4 Σ_m D(K^m) D(V^m) |Δq|, |ΔJ| ≤ s/4 D(K) D(V) |Δq|",
        speed,
        drawn_cases(),
    ),
    Statement(
        "Kronecker products and sums move no faster than their mean queries allow",
        "|ΔO| ≤ s/4 D(v) Σ_m D(K^m) |ΔQ^m|",
        speed_of_products,
        drawn_cases(on_grid=True, max_positions=36),
    ),
    Statement(
        "additive attention lies in the sum of the ranges of its modes",
        "Σ_m min V^m − (N−1)v̄ ≤ A ≤ Σ_m max V^m − (N−1)v̄",
        box,
        drawn_cases(),
    ),
    Statement(
        "less the mean value, outputs have at most the rank of the effects of the modes",
        "rank(A − v̄), rank(J − v̄) ≤ Σ_m (n_m − 1)",
        rank,
        drawn_cases(max_positions=24),
    ),
)
