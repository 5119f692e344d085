"""What softmaxes over averages are: counts of effects, marginals of full attention, a projection of it."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tensorattn.testing.check import Comparison, Comparisons, Draw, law
from tensorattn.testing.laws import full_attention
from tensorattn.testing.strategies import Case, allowed, exact, generators, largest, numbers, rows
from tensorattn.testing.theorems.common import called, expectation, mean_of, orders, product_of, vanishes

__all__ = [
    "arithmetic_marginals",
    "counted_once",
    "geometric_marginals",
    "joint_shares",
    "ladder",
    "outer_sums",
    "projection",
]

LARGEST_SPREAD = 20.0  # of logits whose weights are compared as logarithms


@law("counting numbers count every kept effect once, and have a closed form for all sets of r modes",
     "Σ_(U'⊇U) c_U' = 1; c_U = (−1)^(r−|U|) C(N−|U|−1, r−|U|)", strategy=orders(1, 5), double=True)  # fmt: skip
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
        output = called(ta.kao_qkv, case, centered=centered)
        residual = ta.interaction_residual(exact(output), order=case.order)
        tolerance = 2 * case.order * allowed("average", case.dtype, magnitude=largest(output))
        yield vanishes("the output of averaged queries must be an outer sum", residual, tolerance, largest(output))
    flat = case.replace(scale=0.0)
    output = called(ta.kao_qkv, flat, centered=False)
    center = (case.order * case.for_queries(mean_of(case.value, case))).expand(output.shape)
    told = "at scale zero averaged queries as published must count the mean value once a mode"
    yield Comparison(told, output, center, case.order * flat.allowed())


@law("the more modes are kept, the larger the log-sum-exp, up to that of full attention",
     "log(P/n_U) + LSE_U ≤ log(P/n_W) + LSE_W, U ⊂ W", max_positions=40)  # fmt: skip
def ladder(ta: Any, case: Case, draw: Draw) -> Comparisons:
    """From the logit of the mean to the log-sum-exp of all positions, step by step."""
    everything = tuple(range(case.order))
    total = case.position_weights().flatten(len(case.batch)).sum(-1, keepdim=True).log()
    logit = case.factor * (exact(case.query) * case.for_queries(mean_of(case.key, case))).sum(-1)
    steps: dict[tuple[int, ...], Tensor] = {(): logit + case.for_queries(total).squeeze(-1)}
    for size in range(1, case.order + 1):
        for kept in itertools.combinations(everything, size):
            steps[kept] = exact(called(ta.truncated_attention, case, kept=[kept], return_lse=True).lse)
    for kept, larger in itertools.permutations(steps, 2):
        if set(kept) < set(larger):
            told = f"the log-sum-exp over {larger} must be at least that over {kept}"
            drop = (steps[kept] - steps[larger]).clamp(min=0)
            yield vanishes(told, drop, case.allowed_lse, largest(steps[larger]))
    told = "the log-sum-exp over all modes must be that of full attention"
    yield Comparison(told, steps[everything], full_attention(case)[1], case.allowed_lse)


@law("additive attention is the mean value and each mode's effect, the joint softmax a share of each",
     "A = v̄ + Σ_m d_m, J = v̄ + Σ_m λ_m d_m, Σ_m λ_m = 1")  # fmt: skip
def joint_shares(ta: Any, case: Case, draw: Draw) -> Comparisons:
    """Additive attention is the mean value and each mode's effect, the joint softmax a share of each of these."""
    output, _, together, _ = called(ta.kao_kv, case, return_attention=True)
    plain, _, separate, _ = called(ta.additive_attention, case, return_attention=True)
    center = case.for_queries(mean_of(case.value, case))
    whole = total = center.expand(output.shape)
    added = torch.zeros(*case.batch, *case.positions, 1)
    for mode, (part, own) in enumerate(zip(together, separate, strict=True)):
        tokens = mean_of(case.value, case, (mode,))
        effect = expectation(rows(exact(own), len(case.batch)), tokens, case) - center
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
    for mode, own in enumerate(called(ta.additive_attention, case, return_attention=True).attention):
        marginal = mean_of(logs, case, (mode,)).reshape(*case.batch, case.sizes[mode], -1).mT
        marginal = torch.softmax(marginal + case.mode_weights(mode).log().unsqueeze(-2), -1)
        told = f"attention to mode {mode} must be the geometric marginal of full attention"
        yield Comparison(told, rows(own, len(case.batch)), marginal, tolerance)


@law("the product of the modes' attention is the projection of full attention on product laws",
     "|F − G|² = |F − ⊗p_m|² + |⊗p_m − G|² for G = ⊗g_m, centred logs")  # fmt: skip
def projection(ta: Any, case: Case, draw: Draw) -> Comparisons:
    """Pythagoras: full attention, the product of the modes' attention, and any other product have a right angle."""
    case, generator = case.at_most(LARGEST_SPREAD), draw(generators(9))
    own = called(ta.additive_attention, case, return_attention=True).attention
    others = [torch.softmax(numbers(generator, part.shape), -1) for part in own]
    share = case.position_weights().reshape(*case.batch, 1, -1)
    share = share / share.sum(-1, keepdim=True)

    def centred(logs: Tensor) -> Tensor:
        logs = torch.where(share > 0, logs, 0.0)  # where no weight is, there is no attention, and no logarithm of it
        return logs - (share * logs).sum(-1, keepdim=True)

    def squared(left: Tensor, right: Tensor) -> Tensor:
        return (share * (left - right).square()).sum(-1)

    near, other = (centred((product_of(part, case) / share).log()) for part in (own, others))
    full = centred(_log_attention(case))
    size = 1 + case.logit + largest(other)
    legs = squared(full, near) + squared(near, other)
    told = "the product of the modes' attention must be the foot of the perpendicular"
    yield Comparison(told, squared(full, other), legs, 4 * size * allowed("log-sum-exp", case.dtype, logit=size))


@law("full attention is its marginals on the averages and its mean of the interaction residual",
     "F = Σ_m P_m V^m − (N−1)v̄ + E_P[R^v]")  # fmt: skip
def arithmetic_marginals(ta: Any, case: Case, draw: Draw) -> Comparisons:
    """Full attention is its own marginals on mode averages, less mean values, and its mean of the residual."""
    output, _, (attention,), _ = called(ta.flattened_attention, case, return_attention=True)
    batch, how = len(case.batch), {"order": case.order, "weights": case.all_weights()}
    density = rows(exact(attention).flatten(-case.order), batch)
    by_mode = density.unflatten(-1, case.sizes)
    expected = expectation(density, ta.interaction_residual(exact(case.value), **how), case)
    for mode, tokens in enumerate(ta.mode_averages(exact(case.value), **how)):
        others = [batch + 1 + m for m in range(case.order) if m != mode]
        expected = expected + expectation(by_mode.sum(others) if others else by_mode, tokens, case)
    expected = expected - (case.order - 1) * case.for_queries(mean_of(case.value, case))
    told = "full attention must be its marginals on the averages, and its mean of the interaction residual"
    yield Comparison(told, output, expected, 4 * case.order * case.allowed())
