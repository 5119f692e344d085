"""Limits: derivatives by the scale, orders of the error in the scale, many positions, and the frames of the past."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch

from tensorattn.operators.additive import additive_attention
from tensorattn.operators.flattened import flattened_attention
from tensorattn.operators.kao_kv import kao_kv
from tensorattn.operators.truncated import truncated_attention
from tensorattn.stats import TensorNormal
from tensorattn.testing import Case, Subject
from tensorattn.testing.checks.derivatives import along_queries, expect_slope, marginal_covariance
from tensorattn.testing.definitions import attention
from tensorattn.testing.drawing import canonical
from tensorattn.testing.tolerances import exact
from tensorattn.truncation import counting_numbers, kept_family
from tensorattn.verify.statement import Asked, Statement, called, drawn_cases, st

__all__ = ["CAUSAL", "STATEMENTS"]

Function = Callable[..., Any]

SIZES = (5, 4, 3)  # of the tensor on which orders of the error are measured
SCALES = (1e-2, 1e-3)
SLOPE_TOLERANCE = 0.05
GRIDS, REPEATS = (32, 128), 10  # of white noise; a mean over samples
FAR = 1e6  # what later frames hold


def first_orders(subject: Subject, case: Case, draw: Any) -> None:
    """The derivatives of additive, joint and truncated attention by the scale at zero."""
    modes = range(case.order)
    covariances = [marginal_covariance(case, (mode,)) for mode in modes]
    totals = torch.stack([case.mode_weights(mode).sum(-1) for mode in modes])
    parts = (totals / totals.sum(0))[..., None, None]
    family = kept_family(case.order, None, draw(st.integers(1, case.order)))
    counts = counting_numbers(family)
    zero = torch.zeros_like(covariances[0])
    kept = sum((n * marginal_covariance(case, u) for u, n in counts.items() if u and n), zero)
    for function, options, matrix in (
        (additive_attention, {}, sum(covariances, zero)),
        (kao_kv, {}, sum((part * own for part, own in zip(parts, covariances, strict=True)), zero)),
        (truncated_attention, {"kept": family}, kept),
    ):
        operator = dataclasses.replace(subject, name=function.__name__, function=function, options=options)
        statement = "the derivative by the scale at zero must be that of the theory"
        expect_slope(operator, case, along_queries(case, matrix), draw, statement)


def _slope(subject: Subject, seed: int, expected: float, function: Function, **options: Any) -> None:
    """Measure the order of the error in the scale on a random tensor that is not additive."""
    generator = torch.Generator().manual_seed(seed)
    key, value, query = (torch.randn(*n, 4, generator=generator).double() for n in (SIZES, SIZES, (8,)))
    errors = []
    for scale in SCALES:
        how: dict[str, Any] = {"order": len(SIZES), "scale": scale}
        full: Any = flattened_attention(query, key, value, **how)
        errors.append(float((function(query, key, value, **how, **options) - full).norm()))
    found = math.log(errors[0] / errors[1]) / math.log(SCALES[0] / SCALES[1])
    statement = f"the error of {function.__name__} must be of order {expected:g} in the scale"
    _expect_number(subject, seed, found, expected, SLOPE_TOLERANCE, statement)


def first_order_errors(subject: Subject, case: int, draw: Any) -> None:
    """Additive, joint and truncated attention err to first order in the scale; the case is a seed."""
    for function in (additive_attention, kao_kv, truncated_attention):
        _slope(subject, case, 1.0, function)


def second_order_errors(subject: Subject, case: int, draw: Any) -> None:
    """With the interaction term the error is of second order in the scale; the case is a seed."""
    for saturation in (None, 1.0):
        for function in (additive_attention, truncated_attention):
            _slope(subject, case, 2.0, function, interaction="linear", saturation=saturation)


def _noise_errors(seed: int, dtype: torch.dtype, device: str, **options: Any) -> list[float]:
    """Centred relative errors on white noise around an additive mean, small and large grid."""
    errors = []
    for size in GRIDS:
        missed = signal = 0.0
        for repeat in range(REPEATS):
            generator = torch.Generator().manual_seed(seed * REPEATS + repeat)
            rows, columns, query = (
                torch.randn(shape, generator=generator) for shape in ((size, 1, 8), (size, 8), (32, 8))
            )
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed * REPEATS + repeat)
                x = TensorNormal((rows + columns) / 2, [torch.eye(size)] * 2, torch.eye(8)).sample()
            query = query / query.norm(dim=-1, keepdim=True)
            x, query = x.to(device, dtype), query.to(device, dtype)
            output: Any = additive_attention(query, x, x, order=2, scale=1.0, **options)
            full: Any = flattened_attention(exact(query), exact(x), exact(x), order=2, scale=1.0)
            missed += float((exact(output) - full).square().sum())
            signal += float((full - exact(x).mean((0, 1))).square().sum())
        errors.append(math.sqrt(missed / signal))
    return errors


def decay(subject: Subject, case: tuple[int, torch.dtype, str], draw: Any) -> None:
    """Sixteen times the positions, a quarter of the error; the case is a seed, a type and a device."""
    small, large = _noise_errors(*case, interaction="linear", saturation=None)
    statement = "on white noise the error with the interaction term must fall as one over the root of the positions"
    _expect_number(subject, case, large / small, 0.25, 0.1, statement)


def plateau(subject: Subject, case: tuple[int, torch.dtype, str], draw: Any) -> None:
    """Without the interaction term the error stays; the case is a seed, a type and a device."""
    small, large = _noise_errors(*case)
    statement = "on white noise the error without the interaction term must stay"
    _expect_number(subject, case, large / small, 1.0, 0.25, statement)


def _expect_number(subject: Subject, case: Any, found: float, expected: float, tolerance: float, what: str) -> None:
    """Compare two numbers."""
    got, wanted = (torch.tensor(number, dtype=torch.float64) for number in (found, expected))
    subject.expect_close(got, wanted, tolerance, what, case)


def no_leak(subject: Subject, case: Case, draw: Any) -> None:
    """Whatever stands in later frames, earlier outputs are the same to the last bit."""
    causal = draw(st.integers(0, case.order - 1))
    frame = draw(st.integers(0, case.sizes[causal] - 1))
    later = (torch.arange(case.sizes[causal]) > frame).reshape(-1, *(1 for _ in range(case.order - causal)))
    later = later.to(case.key.device)
    case = case.replace(key=canonical(case.key), value=canonical(case.value))  # both are then read alike
    far = min(FAR, torch.finfo(case.dtype).max / 8)
    other = case.replace(key=case.key.masked_fill(later, far), value=case.value.masked_fill(later, -far))
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


def _seed(asked: Asked, subject: Subject) -> int:
    """The only case of a statement of fixed sizes in float64."""
    return asked.seed


def _seed_and_type(asked: Asked, subject: Subject) -> tuple[int, torch.dtype, str]:
    """The only case of a statement of fixed sizes in the type asked for."""
    return asked.seed, asked.dtype, asked.device


FROM_TO = " → ".join(f"{size}²" for size in GRIDS)

STATEMENTS = (
    Statement(
        "on additive data causal additive attention is full attention to the frames so far",
        "A_t[i] = F[i] over j_t ≤ i_t",
        causal_exact,
        drawn_cases(on_grid=True, additive=True, max_positions=32),
    ),
    Statement(
        "to first order in the scale the operators see the covariances of the means that they keep",
        "dA/ds = Σ_m Cov_m q, dJ/ds = Σ_m n_m/S Cov_m q, dA_K/ds = Σ_U c_U Cov_U q",
        first_orders,
        drawn_cases(dtype=torch.float64),
        double=True,
    ),
    Statement(
        "without the interaction term the error is of first order in the scale",
        "|F − A| ~ s¹, measured slope",
        first_order_errors,
        _seed,
        double=True,
        once=True,
    ),
    Statement(
        "with the interaction term the error is of second order in the scale, whatever the data",
        "|F − A − s C_vk q| ~ s², measured slope",
        second_order_errors,
        _seed,
        double=True,
        once=True,
    ),
    Statement(
        "on tensor-normal noise the error with the interaction term falls as one over the root of the positions",
        f"|F − A − s C_vk q| ~ P^(−1/2), {FROM_TO}: ratio 1/4 ± .1",
        decay,
        _seed_and_type,
        once=True,
    ),
    Statement(
        "on tensor-normal noise the error without the interaction term stays",
        f"|F − A| ~ 1, {FROM_TO}: ratio 1 ± .25",
        plateau,
        _seed_and_type,
        once=True,
    ),
)
