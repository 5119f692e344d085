"""Limits: derivatives by the scale at zero, orders of the error in the scale, and many positions."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tensorattn.operators.additive import additive_attention
from tensorattn.operators.flattened import flattened_attention
from tensorattn.operators.kao_kv import kao_kv
from tensorattn.operators.truncated import truncated_attention
from tensorattn.stats import TensorNormal
from tensorattn.testing import Case, Subject, allowed
from tensorattn.testing.cases import rows
from tensorattn.testing.checks.derivatives import along_queries, expect_slope, marginal_covariance
from tensorattn.testing.drawing import generators, numbers
from tensorattn.testing.tolerances import exact, largest
from tensorattn.truncation import counting_numbers, kept_family
from tensorattn.verify.means import mean, residual
from tensorattn.verify.statement import Asked, Statement, called, drawn_cases, st

__all__ = ["STATEMENTS"]

Function = Callable[..., Any]

SIZES = (5, 4, 3)  # of the tensor on which orders of the error are measured
SCALES = (1e-2, 1e-3)
SLOPE_TOLERANCE = 0.05
LEAST_GAP = 200.0  # of logits, as e^-200 is nothing beside 1
GRIDS, REPEATS = (32, 128), 10  # of white noise; a mean over samples
PLATEAU = 0.4  # below the error that additive attention keeps there


def first_orders(subject: Subject, case: Case, draw: Any) -> None:
    """The derivatives of additive, joint and truncated attention by the scale at zero."""
    modes = range(case.order)
    covariances = [marginal_covariance(case, (mode,)) for mode in modes]
    rest = case.replace(key=residual(case.key, case), value=residual(case.value, case))
    whole, missing = (marginal_covariance(each, modes) for each in (case, rest))
    statement = "the covariance must be those of the mode averages and that of the interaction residuals"
    tolerance = allowed("average", case.dtype, magnitude=8 * case.order**2 * largest(case.key) * case.magnitude)
    subject.expect_close(whole - torch.stack(covariances).sum(0), missing, tolerance, statement, case)
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


def _slope(
    subject: Subject, seed: int, expected: float, function: Function, together: int = len(SIZES), **options: Any
) -> None:
    """Measure the order of the error in the scale on a random tensor of interactions of some modes together."""
    generator = torch.Generator().manual_seed(seed)
    key, value, query = (torch.randn(*n, 4, generator=generator).double() for n in (SIZES, SIZES, (8,)))
    key, value = (_of_order(together, tensor) for tensor in (key, value))
    errors = []
    for scale in SCALES:
        how: dict[str, Any] = {"order": len(SIZES), "scale": scale}
        full: Any = flattened_attention(query, key, value, **how)
        errors.append(float((function(query, key, value, **how, **options) - full).norm()))
    found = math.log(errors[0] / errors[1]) / math.log(SCALES[0] / SCALES[1])
    statement = f"the error of {function.__name__} must be of order {expected:g} in the scale"
    _expect_number(subject, seed, found, expected, SLOPE_TOLERANCE, statement)


def _of_order(together: int, tensor: Tensor) -> Tensor:
    """The sum of the means of a tensor over all modes but some that stay together."""
    modes = range(len(SIZES))
    kept = itertools.combinations(modes, together)
    dropped = ([mode for mode in modes if mode not in subset] for subset in kept)
    return sum((tensor.mean(modes, keepdim=True) if modes else tensor for modes in dropped), torch.zeros(()).double())


def truncated_errors(subject: Subject, case: int, draw: Any) -> None:
    """Pairs that overlap are not exact under truncation at pairs, but to first order; the case is a seed."""
    _slope(subject, case, 2.0, truncated_attention, together=2, interaction_order=2)


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
    statement = f"on white noise the error without the interaction term must be above {PLATEAU}"
    subject.expect(min(small, large) > PLATEAU, statement, case, f"it is {min(small, large):.3f}")  # type: ignore[arg-type]


def homogeneous_noise(subject: Subject, case: int, draw: Any) -> None:
    """Exponential noise, the same at every position: its tilted mean is known, and no Gaussian one; a seed."""
    small, large = (_tilt_error(case, size) for size in GRIDS)
    statement = "additive attention and the tilted mean of the noise must be the limit of full attention"
    _expect_number(subject, case, large / small, 0.25, 0.15, statement)


def _tilt_error(seed: int, size: int) -> float:
    """Root mean square over samples of the error of additive attention and the tilted mean of its noise.

    Queries are so small that the variance of what is averaged has a variance itself.
    """
    squares = []
    for repeat in range(REPEATS):
        generator = torch.Generator().manual_seed(seed * REPEATS + repeat)
        rows, columns = numbers(generator, (size, 1, 4)), numbers(generator, (size, 4))
        uniform = torch.rand(size, size, 4, generator=generator, dtype=torch.float64)
        x = (rows + columns) / 2 - uniform.log()
        query = 0.25 * (2 * torch.rand(64, 4, generator=generator, dtype=torch.float64) - 1)
        tilt = 1 / (1 - query) - 1  # exponential noise of rate 1 that is tilted by t has a rate of 1 - t
        output: Any = additive_attention(query, x, x, order=2, scale=1.0)
        full: Any = flattened_attention(query, x, x, order=2, scale=1.0)
        squares.append(float((output + tilt - full).square().mean()))
    return math.sqrt(sum(squares) / REPEATS)


def far_away(subject: Subject, case: Case, draw: Any) -> None:
    """At a scale so large that the best token of each set leaves no weight to the second."""
    case = _spread_out(case, draw)
    batch, modes = len(case.batch), range(case.order)
    query = exact(rows(case.query, batch))
    keys, values = ([rows(mean(tensor, case, (m,)), batch) for m in modes] for tensor in (case.key, case.value))
    weights = [case.mode_weights(mode) for mode in modes]
    sets = [*zip(keys, values, weights, strict=True)]
    together = (torch.cat(keys, -2), torch.cat(values, -2), torch.cat(weights, -1))
    gaps, chosen = zip(*(_best(query, *tokens) for tokens in (*sets, together)), strict=True)
    # Both logits of a gap err by the rounding of averages; the logarithms of the weights are small beside the rest.
    reach = largest(query.abs().sum(-1)) * largest(case.key)
    gap = min(gaps) - 4 * allowed("average", case.dtype, magnitude=reach)
    if gap <= 0:
        return
    far = case.replace(scale=max(1.0, LEAST_GAP / gap))
    center = mean(case.value, case).reshape(*case.batch, 1, -1)
    additive = torch.stack(chosen[:-1]).sum(0) - (case.order - 1) * center
    for function, expected in ((additive_attention, additive), (kao_kv, chosen[-1])):
        # Of the logits only the order counts: averages of values and their sums are all that is rounded.
        tolerance = (2 * case.order - 1) * allowed("output", case.dtype, magnitude=case.magnitude)
        statement = f"at a large scale {function.__name__} must attend to the best token alone"
        subject.expect_close(rows(called(function, far), batch), expected, tolerance, statement, far)


def _spread_out(case: Case, draw: Any) -> Case:
    """Put the keys of a case on a line, each mode's in steps of its own, with little noise or more.

    Some queries look for the one end of the line, some for the other.
    """
    generator, noise = draw(generators(9)), draw(st.sampled_from([0.0, 0.01, 1.0]))
    line = torch.where(numbers(generator, case.key.shape[-1:]) > 0, 1.0, -1.0)
    key = noise * exact(case.key)
    for mode, size in enumerate(case.sizes):
        steps = torch.randperm(size, generator=generator) * (1 + mode / case.order)
        key = key + steps.reshape(size, *[1] * (case.order - mode)) * line
    away = numbers(generator, (*case.query.shape[:-1], 1)) > 0
    query = torch.where(away, line, -line) + noise * exact(case.query)
    return case.replace(query=query.to(case.query), key=key.to(case.key))


def _best(query: Tensor, key: Tensor, value: Tensor, weight: Tensor) -> tuple[float, Tensor]:
    """The smallest gap between the best and the second logit of any query, and the values of the best."""
    logits = (query @ key.mT).masked_fill((weight == 0).unsqueeze(-2), -math.inf)
    top = logits.topk(min(2, logits.shape[-1])).values
    gap = float((top[..., 0] - top[..., -1]).min()) if top.shape[-1] > 1 else math.inf
    index = logits.argmax(-1, keepdim=True).expand(*logits.shape[:-1], value.shape[-1])
    return gap, torch.take_along_dim(value, index, -2)


def _expect_number(subject: Subject, case: Any, found: float, expected: float, tolerance: float, what: str) -> None:
    """Compare two numbers."""
    got, wanted = (torch.tensor(number, dtype=torch.float64) for number in (found, expected))
    subject.expect_close(got, wanted, tolerance, what, case, size=1.0)  # as told apart from 0, 1 and 2


def _seed(asked: Asked, subject: Subject) -> int:
    """The only case of a statement of fixed sizes in float64."""
    return asked.seed


def _seed_and_type(asked: Asked, subject: Subject) -> tuple[int, torch.dtype, str]:
    """The only case of a statement of fixed sizes in the type asked for."""
    return asked.seed, asked.dtype, asked.device


FROM_TO = " → ".join(f"{size}²" for size in GRIDS)

STATEMENTS = (
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
        "truncation at the order of the data errs to second order in the scale",
        "|F − A_r| ~ s² for k, v of order r, measured slope",
        truncated_errors,
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
        f"|F − A| / |F − v̄| > {PLATEAU}, {FROM_TO}: ratio 1 ± .25",
        plateau,
        _seed_and_type,
        once=True,
    ),
    Statement(
        "noise of one law at every position tilts attention by its tilted mean, whatever the law",
        f"F → A + E[ξ e^(s q·ξ)] / E[e^(s q·ξ)] − E[ξ], {FROM_TO}: ratio 1/4 ± .15",
        homogeneous_noise,
        _seed,
        double=True,
        once=True,
    ),
    Statement(
        "at a large scale each softmax attends to its best token alone",
        "s → ∞: A = Σ_m V^m[a*_m] − (N−1)v̄, J = V[a*]",
        far_away,
        drawn_cases(wide=1),
    ),
)
