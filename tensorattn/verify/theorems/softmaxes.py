"""What the softmaxes over averages are: shares, geometric marginals, a ladder of log-sum-exps, and a bound."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import torch
from torch import Tensor

from tensorattn.averages import interaction_residual
from tensorattn.diagnose import error_bound
from tensorattn.operators.additive import additive_attention
from tensorattn.operators.flattened import flattened_attention
from tensorattn.operators.kao_kv import kao_kv
from tensorattn.operators.kao_qkv import kao_qkv
from tensorattn.operators.truncated import truncated_attention
from tensorattn.testing import Case, Subject, allowed
from tensorattn.testing.cases import rows
from tensorattn.testing.definitions import attention
from tensorattn.testing.tolerances import exact, largest
from tensorattn.truncation import counting_numbers, kept_family
from tensorattn.verify.means import at_most, expectation, for_queries, mean
from tensorattn.verify.statement import Asked, Statement, called, drawn_cases, st

__all__ = ["STATEMENTS"]

SLACK = 1e-9  # relative, for bounds


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
        subject.expect_close(residual, torch.zeros_like(residual), tolerance, statement, case)


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
            subject.expect_close(drop, torch.zeros_like(drop), case.allowed_lse, statement, case)
    last = "the log-sum-exp over all modes must be that of full attention"
    subject.expect_close(steps[everything], attention(case)[1], case.allowed_lse, last, case)


def joint_shares(subject: Subject, case: Case, draw: Any) -> None:
    """The joint softmax is the mean value plus a share of each mode's effect."""
    output, _, together = called(kao_kv, case, return_attention=True)
    separate = called(additive_attention, case, return_attention=True).attention
    center = for_queries(mean(case.value, case), case)
    total = center.expand(output.shape)
    for mode, (part, own) in enumerate(zip(together, separate, strict=True)):
        tokens = mean(case.value, case, (mode,))
        effect = expectation(rows(exact(own), len(case.batch)), tokens, case) - center
        total = total + exact(part).sum(-1, keepdim=True) * effect
    statement = "the joint softmax must be the mean value and a share of each mode's effect"
    subject.expect_close(output, total, 2 * case.order * case.allowed(), statement, case)


def geometric_marginals(subject: Subject, case: Case, draw: Any) -> None:
    """The weight of an index is the geometric mean of full attention over its slice, made to sum to one."""
    case = at_most(case, 20.0)
    batch = len(case.batch)
    query, key = rows(exact(case.query), batch), rows(exact(case.key), batch)
    lse = torch.from_numpy(attention(case)[1]).reshape(*query.shape[:-1])
    logs = (case.factor * (key @ query.mT) - lse.unsqueeze(-2)).reshape(*case.batch, *case.sizes, query.shape[-2])
    weights = called(additive_attention, case, return_attention=True).attention
    tolerance = allowed("log-sum-exp", case.dtype, logit=case.logit)
    for mode, own in enumerate(weights):
        marginal = mean(logs, case, (mode,)).reshape(*case.batch, case.sizes[mode], -1).mT
        marginal = torch.softmax(marginal + case.mode_weights(mode).log().unsqueeze(-2), -1)
        statement = f"attention to mode {mode} must be the geometric marginal of full attention"
        subject.expect_close(rows(own, batch), marginal, tolerance, statement, case)


def bounded(subject: Subject, case: Case, draw: Any) -> None:
    """The distance of additive from full attention is at most its bound, and the cheap bound is the larger."""
    full = exact(called(flattened_attention, case))
    error = (full - exact(called(additive_attention, case))).norm(dim=-1)
    rounding = case.allowed() * case.value.shape[-1] ** 0.5
    near, cheap = (exact(called(error_bound, case, oscillation=how)) for how in ("exact", "cheap"))
    subject.expect(bool(((near >= 0) & near.isfinite()).all()), "the bound must be a number of at least 0", case)
    for left, right, statement in (
        (error, near, "the error must be at most its bound"),
        (near, cheap, "the cheap bound must be at least the exact one"),
    ):
        excess = (left - right * (1 + SLACK)).clamp(min=0)
        subject.expect_close(excess, torch.zeros_like(excess), rounding, statement, case)


def exclusive_or(subject: Subject, case: int, draw: Any) -> None:
    """Keys and values that are 1 or -1 by parity: bound over error is 1 + tanh²(Δ/4); the case is the order."""
    sides = (torch.tensor([1.0, -1.0]).double().reshape([2] + [1] * mode) for mode in range(case))
    parity = functools.reduce(torch.mul, sides).unsqueeze(-1)
    for spread in (0.1, 1.0):
        query = torch.tensor([spread / 2], dtype=torch.float64)
        how: dict[str, Any] = {"order": case, "scale": 1.0}
        full: Any = flattened_attention(query, parity, parity, **how)
        error = (full - additive_attention(query, parity, parity, **how)).norm()
        ratio = error_bound(query, parity, parity, oscillation="exact", **how) / error
        expected = 1 + torch.tensor(spread / 4, dtype=torch.float64).tanh() ** 2
        statement = f"the bound must be attained at an oscillation of {spread}"
        subject.expect_close(ratio, expected, 1e-12, statement, case)  # type: ignore[arg-type]


def _orders(least: int, most: int) -> Any:
    """Return where cases come from that are just a number of modes."""

    def strategy(asked: Asked, subject: Subject) -> Any:
        return st.integers(least, most) if asked.order is None else st.just(max(least, asked.order))

    return strategy


STATEMENTS = (
    Statement(
        "counting numbers of all sets of r modes have a closed form",
        "c_U = (−1)^(r−|U|) C(N−|U|−1, r−|U|)",
        closed_form,
        _orders(1, 6),
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
        _orders(1, 5),
    ),
    Statement(
        "the more modes are kept, the larger the log-sum-exp, up to that of full attention",
        "log(P/n_U) + LSE_U ≤ log(P/n_W) + LSE_W, U ⊂ W",
        ladder,
        drawn_cases(max_positions=40),
    ),
    Statement(
        "the joint softmax is the mean value and a share of each mode's effect",
        "J = v̄ + Σ_m λ_m d_m, λ_m = Z_m / ΣZ",
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
        "the error of additive attention is at most its bound, whatever the data",
        "|F − A| ≤ D_v tanh(Δ/4) + min(max|R^v|, σ_v √χ)",
        bounded,
        drawn_cases(empty=True),
    ),
    Statement(
        "the bound is attained by the exclusive or",
        "bound / |F − A| = 1 + tanh²(Δ/4)",
        exclusive_or,
        _orders(2, 4),
        share=0.2,
        double=True,
    ),
)
