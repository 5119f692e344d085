"""What the softmaxes over averages are: shares, marginals, projections, and a ladder of log-sum-exps."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import torch
from torch import Tensor

from tensorattn.averages import interaction_residual, mode_averages
from tensorattn.operators.additive import additive_attention
from tensorattn.operators.flattened import flattened_attention
from tensorattn.operators.kao_kv import kao_kv
from tensorattn.operators.kao_qkv import kao_qkv
from tensorattn.operators.truncated import truncated_attention
from tensorattn.testing import Case, Subject, allowed
from tensorattn.testing.cases import rows
from tensorattn.testing.definitions import attention
from tensorattn.testing.drawing import generators, numbers
from tensorattn.testing.tolerances import exact, largest
from tensorattn.truncation import counting_numbers, kept_family
from tensorattn.verify.means import at_most, expectation, for_queries, mean, product
from tensorattn.verify.statement import Statement, called, drawn_cases, drawn_orders, st

__all__ = ["STATEMENTS"]

LARGEST_SPREAD = 20.0  # of logits whose weights are compared as logarithms


def counted_once(subject: Subject, case: int, draw: Any) -> None:
    """Over all kept sets that contain a kept one the counting numbers add up to one; the case is the order."""
    family = draw(st.lists(st.sets(st.integers(0, case - 1), min_size=1).map(sorted), min_size=1, max_size=6))
    counts = counting_numbers(kept_family(case, family, None))
    totals = [sum(n for larger, n in counts.items() if set(kept) <= set(larger)) for kept in counts]
    ones = torch.ones(len(totals)).double()
    statement = f"every effect of the family {family} must be counted once"
    subject.expect_close(torch.tensor(totals).double(), ones, 0.0, statement, case)  # type: ignore[arg-type]


def closed_form(subject: Subject, case: int, draw: Any) -> None:
    """All sets of r of N modes: (-1)^(r - |U|) binomial(N - |U| - 1, r - |U|); the case is N."""
    size = draw(st.integers(1, case))
    counts = counting_numbers(kept_family(case, None, size))
    signs = [(-1) ** (size - len(u)) for u in counts]
    ways = [math.comb(case - len(u) - 1, size - len(u)) if len(u) < case else 1 for u in counts]
    told = [sign * way for sign, way in zip(signs, ways, strict=True)]
    got, expected = (torch.tensor(list(numbers)).double() for numbers in (counts.values(), told))
    statement = f"counting numbers of all sets of {size} modes must have their closed form"
    subject.expect_close(got, expected, 0.0, statement, case)  # type: ignore[arg-type]


def outer_sums(subject: Subject, case: Case, draw: Any) -> None:
    """Outputs of averaged queries have no interaction residual."""
    for centered in (False, True):
        output = called(kao_qkv, case, centered=centered)
        residual = interaction_residual(exact(output), order=case.order)
        tolerance = 2 * case.order * allowed("average", case.dtype, magnitude=largest(output))
        statement = "the output of averaged queries must be an outer sum"
        size = largest(output)
        subject.expect_close(residual, torch.zeros_like(residual), tolerance, statement, case, size=size)


def ladder(subject: Subject, case: Case, draw: Any) -> None:
    """From the logit of the mean to the log-sum-exp of all positions, step by step."""
    everything = tuple(range(case.order))
    total = functools.reduce(torch.mul, (case.mode_weights(mode).sum(-1) for mode in everything))
    logit = case.factor * (exact(case.query) * for_queries(mean(case.key, case), case)).sum(-1)
    steps: dict[tuple[int, ...], Tensor] = {(): logit + for_queries(total.log().unsqueeze(-1), case)[..., 0]}
    for size in range(1, case.order + 1):
        for kept in itertools.combinations(everything, size):
            steps[kept] = exact(called(truncated_attention, case, kept=[kept], return_lse=True).lse)
    for kept, larger in itertools.permutations(steps, 2):
        if set(kept) < set(larger):
            drop = (steps[kept] - steps[larger]).clamp(min=0)
            statement = f"the log-sum-exp over {larger} must be at least that over {kept}"
            reach = largest(steps[larger])
            subject.expect_close(drop, torch.zeros_like(drop), case.allowed_lse, statement, case, size=reach)
    last = "the log-sum-exp over all modes must be that of full attention"
    subject.expect_close(steps[everything], attention(case)[1], case.allowed_lse, last, case)


def joint_shares(subject: Subject, case: Case, draw: Any) -> None:
    """Additive attention is the mean value and each mode's effect, the joint softmax a share of each of these."""
    output, _, together = called(kao_kv, case, return_attention=True)
    plain, _, separate = called(additive_attention, case, return_attention=True)
    center = for_queries(mean(case.value, case), case)
    whole = total = center.expand(output.shape)
    shares = []
    for mode, (part, own) in enumerate(zip(together, separate, strict=True)):
        tokens = mean(case.value, case, (mode,))
        effect = expectation(rows(exact(own), len(case.batch)), tokens, case) - center
        shares.append(exact(part).sum(-1, keepdim=True))
        whole, total = whole + effect, total + shares[-1] * effect
    terms = 2 * case.order
    statement = "the joint softmax must be the mean value and a share of each mode's effect"
    subject.expect_close(output, total, terms * case.allowed(), statement, case)
    statement = "additive attention must be the mean value and the effect of each mode"
    subject.expect_close(plain, whole, terms * case.allowed(), statement, case)
    added = torch.stack(shares).sum(0)
    subject.expect_close(added, torch.ones_like(added), case.allowed_lse, "the shares must add up to one", case)


def geometric_marginals(subject: Subject, case: Case, draw: Any) -> None:
    """The weight of an index is the geometric mean of full attention over its slice, made to sum to one."""
    case = at_most(case, LARGEST_SPREAD)
    logs = _log_attention(case).mT.reshape(*case.batch, *case.sizes, -1)
    weights = called(additive_attention, case, return_attention=True).attention
    tolerance = allowed("log-sum-exp", case.dtype, logit=case.logit)
    for mode, own in enumerate(weights):
        marginal = mean(logs, case, (mode,)).reshape(*case.batch, case.sizes[mode], -1).mT
        marginal = torch.softmax(marginal + case.mode_weights(mode).log().unsqueeze(-2), -1)
        statement = f"attention to mode {mode} must be the geometric marginal of full attention"
        subject.expect_close(rows(own, len(case.batch)), marginal, tolerance, statement, case)


def projection(subject: Subject, case: Case, draw: Any) -> None:
    """Pythagoras: full attention, the product of the modes' attention, and any other product have a right angle."""
    case, generator = at_most(case, LARGEST_SPREAD), draw(generators(9))
    own = called(additive_attention, case, return_attention=True).attention
    others = [torch.softmax(numbers(generator, part.shape), -1) for part in own]
    share = case.position_weights().reshape(*case.batch, 1, -1)
    share = share / share.sum(-1, keepdim=True)

    def centred(logs: Tensor) -> Tensor:
        logs = torch.where(share > 0, logs, 0.0)
        return logs - (share * logs).sum(-1, keepdim=True)

    def squared(left: Tensor, right: Tensor) -> Tensor:
        return (share * (left - right).square()).sum(-1)

    # Where no weight is, there is no attention, and no logarithm of it.
    near, other = (centred((product(part, case) / share).log()) for part in (own, others))
    full = centred(_log_attention(case))
    size = 1 + case.logit + largest(other)
    tolerance = 4 * size * allowed("log-sum-exp", case.dtype, logit=size)
    statement = "the product of the modes' attention must be the foot of the perpendicular"
    legs = squared(full, near) + squared(near, other)
    subject.expect_close(squared(full, other), legs, tolerance, statement, case)


def _log_attention(case: Case) -> Tensor:
    """Logarithm of full attention in float64, ``(*batch, L, P)``, with the weight of a position left out."""
    query, key = (rows(exact(tensor), len(case.batch)) for tensor in (case.query, case.key))
    lse = torch.from_numpy(attention(case)[1]).reshape(*query.shape[:-1])
    return case.factor * (query @ key.mT) - lse.unsqueeze(-1)


def arithmetic_marginals(subject: Subject, case: Case, draw: Any) -> None:
    """Full attention is its own marginals on mode averages, less mean values, and its mean of the residual."""
    output, _, (weights,) = called(flattened_attention, case, return_attention=True)
    batch, modes = len(case.batch), range(case.order)
    given = None if case.weights is None else [case.mode_weights(mode) for mode in modes]
    how: dict[str, Any] = {"order": case.order, "weights": given}
    law = rows(exact(weights).flatten(-case.order), batch)
    by_mode = law.unflatten(-1, case.sizes)
    expected = expectation(law, interaction_residual(exact(case.value), **how), case)
    for mode, tokens in enumerate(mode_averages(exact(case.value), **how)):
        others = [batch + 1 + m for m in modes if m != mode]
        expected = expected + expectation(by_mode.sum(others) if others else by_mode, tokens, case)
    expected = expected - (case.order - 1) * for_queries(mean(case.value, case), case)
    statement = "full attention must be its marginals on the averages, and its mean of the interaction residual"
    subject.expect_close(output, expected, 4 * case.order * case.allowed(), statement, case)


def counted_mean(subject: Subject, case: Case, draw: Any) -> None:
    """At scale zero the outer sum as published is N times the mean value."""
    flat = case.replace(scale=0.0)
    center = case.order * for_queries(mean(case.value, case), case)
    output = called(kao_qkv, flat, centered=False)
    statement = "at scale zero averaged queries as published must count the mean value once a mode"
    subject.expect_close(output, center.expand(output.shape), case.order * flat.allowed(), statement, case)


STATEMENTS = (
    Statement(
        "counting numbers of all sets of r modes have a closed form",
        "c_U = (−1)^(r−|U|) C(N−|U|−1, r−|U|)",
        closed_form,
        drawn_orders(1, 6),
        double=True,  # whole numbers
    ),
    Statement(
        "outputs of averaged queries are outer sums, whatever the data",
        "R(O) = 0",
        outer_sums,
        drawn_cases(on_grid=True, max_positions=40),
    ),
    Statement(
        "counting numbers count every kept effect once",
        "Σ_(U'⊇U) c_U' = 1 for every U",
        counted_once,
        drawn_orders(1, 5),
        double=True,
    ),
    Statement(
        "the more modes are kept, the larger the log-sum-exp, up to that of full attention",
        "log(P/n_U) + LSE_U ≤ log(P/n_W) + LSE_W, U ⊂ W",
        ladder,
        drawn_cases(max_positions=40),
    ),
    Statement(
        "additive attention is the mean value and each mode's effect, the joint softmax a share of each",
        "A = v̄ + Σ_m d_m, J = v̄ + Σ_m λ_m d_m, Σ_m λ_m = 1",
        joint_shares,
        drawn_cases(),
    ),
    Statement(
        "attention to a mode is the geometric marginal of full attention, whatever the data",
        "p_m[a] ∝ (Π_(j_m=a) P_j)^(n_m/P)",
        geometric_marginals,
        drawn_cases(),
    ),
    Statement(
        "the product of the modes' attention is the projection of full attention on product laws",
        "|F − G|² = |F − ⊗p_m|² + |⊗p_m − G|² for G = ⊗g_m, centred logs",
        projection,
        drawn_cases(),
    ),
    Statement(
        "full attention is its marginals on the averages and its mean of the interaction residual",
        "F = Σ_m P_m V^m − (N−1)v̄ + E_P[R^v]",
        arithmetic_marginals,
        drawn_cases(),
    ),
    Statement(
        "averaged queries as published count the mean value once a mode",
        "s = 0: O = N v̄",
        counted_mean,
        drawn_cases(on_grid=True, max_positions=40),
    ),
)
