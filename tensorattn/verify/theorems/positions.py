"""Positions: what depends on where a query stands, as a bias that is a sum over modes, and causality along a mode."""

from __future__ import annotations

import math
from typing import Any

import torch

from tensorattn.operators.additive import additive_attention
from tensorattn.testing import Case, Subject, biases
from tensorattn.testing.definitions import attention
from tensorattn.testing.drawing import canonical
from tensorattn.testing.tolerances import largest
from tensorattn.verify.statement import Statement, called, drawn_cases, st

__all__ = ["CAUSAL", "STATEMENTS"]

FAR = 1e6  # what later frames hold, or infinities or no numbers


def decomposed_bias(subject: Subject, case: Case, draw: Any) -> None:
    """Tables, windows and boxes: what is added to the logits is one term a mode, as additive logits are."""
    bias = draw(biases(case.sizes, case.positions, batch=case.batch, dtype=case.dtype, device=case.key.device))
    output, lse, _ = called(additive_attention, case, bias=bias, return_lse=True)
    full, full_lse = attention(case, bias)
    more = 1 + sum(largest(part) for part in bias if part is not None)
    statement = "with a bias that is a sum over modes additive attention must be full attention"
    subject.expect_close(output, full, case.allowed() * more, statement, case)
    subject.expect_close(lse, full_lse, case.allowed_lse * more, f"{statement} in its log-sum-exp", case)


def no_leak(subject: Subject, case: Case, draw: Any) -> None:
    """Whatever stands in later frames, earlier outputs are the same to the last bit."""
    causal = draw(st.integers(0, case.order - 1))
    frame = draw(st.integers(0, case.sizes[causal] - 1))
    later = (torch.arange(case.sizes[causal]) > frame).reshape(-1, *(1 for _ in range(case.order - causal)))
    later = later.to(case.key.device)
    case = case.replace(key=canonical(case.key), value=canonical(case.value))  # both are then read alike
    anything = draw(st.sampled_from([min(FAR, torch.finfo(case.dtype).max / 8), math.inf, math.nan]))
    other = case.replace(key=case.key.masked_fill(later, anything), value=case.value.masked_fill(later, -anything))
    before, after = (
        called(subject.function, each, causal=causal, **subject.options).narrow(len(case.batch) + causal, 0, frame + 1)
        for each in (case, other)
    )
    subject.expect_close(after, before, 0.0, f"nothing may leak from frames of mode {causal} after {frame}", case)


def causal_exact(subject: Subject, case: Case, draw: Any) -> None:
    """On additive tensors causal additive attention is full attention to the frames so far, with its log-sum-exp."""
    causal = draw(st.integers(0, case.order - 1))
    output, lse, _ = called(additive_attention, case, causal=causal, return_lse=True)
    dim, weight = len(case.batch) + causal, case.mode_weights(causal)
    for frame in range(case.sizes[causal]):
        seen = [case.mode_weights(m) if m != causal else weight.narrow(-1, 0, frame + 1) for m in range(case.order)]
        if not bool((seen[causal].sum(-1) > 0).any()):
            continue
        past = case.replace(
            query=case.query.narrow(dim, frame, 1),
            key=case.key.narrow(dim, 0, frame + 1),
            value=case.value.narrow(dim, 0, frame + 1),
            weights=tuple(seen),
        )
        full, full_lse = attention(past)
        statement = f"causal attention must be full attention up to frame {frame} of mode {causal}"
        subject.expect_close(output.narrow(dim, frame, 1), full, case.allowed(), statement, case)
        told = f"{statement} in its log-sum-exp"
        subject.expect_close(lse.narrow(dim, frame, 1), full_lse, case.allowed_lse, told, case)


CAUSAL = Statement(  # of every operator that can be causal
    "causal attention sees nothing of later frames, whatever the data",
    "∂O[i] / ∂x_j = 0 for j_t > i_t, to the last bit",
    no_leak,
    drawn_cases(on_grid=True, max_positions=32),
)


STATEMENTS = (
    Statement(
        "on additive data a bias that is a sum over modes is exact: tables, windows, boxes",
        "A_b = F_b where b(i, j) = Σ_m b_m[i_m, j_m]",
        decomposed_bias,
        drawn_cases(on_grid=True, additive=True, max_positions=32),
    ),
    Statement(
        "on additive data causal additive attention is full attention to the frames so far",
        "A_t[i] = F[i] over j_t ≤ i_t",
        causal_exact,
        drawn_cases(on_grid=True, additive=True, max_positions=32),
    ),
)
