"""Limits: at small scales, at large ones, and over many positions of noise."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tensorattn.testing import reference
from tensorattn.testing.check import Comparison, Comparisons, Draw, holds, law
from tensorattn.testing.laws import along_queries, marginal_covariance, slope
from tensorattn.testing.strategies import Case, allowed, exact, generators, largest, numbers, rows
from tensorattn.testing.theorems.common import called, mean_of, only_case, residual_of, tokens_of

__all__ = ["decay", "far_away", "first_orders", "homogeneous_noise", "orders_of_the_error"]

SIZES = (5, 4, 3)  # of the tensor on which orders of the error are measured
SCALES = (1e-2, 1e-3)
LEAST_GAP = 200.0  # of logits, as e^-200 is nothing beside 1
GRIDS, REPEATS = (32, 128), 10  # of white noise; a mean over samples
PLATEAU = 0.4  # below the error that additive attention keeps there
FROM_TO = " → ".join(f"{size}²" for size in GRIDS)


@law("to first order in the scale the operators see the covariances of the means that they keep",
     "dA/ds = Σ_m Cov_m q, dJ/ds = Σ_m n_m/S Cov_m q, dA_K/ds = Σ_U c_U Cov_U q",
     double=True, dtype=torch.float64)  # fmt: skip
def first_orders(ta: Any, case: Case, draw: Draw) -> Comparisons:
    """The derivatives of additive, joint and truncated attention by the scale at zero."""
    modes = range(case.order)
    own = torch.stack([marginal_covariance(case, (mode,)) for mode in modes])
    rest = case.replace(key=residual_of(case.key, case), value=residual_of(case.value, case))
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
        output = functools.partial(called, getattr(ta, name), **options)
        told = f"the derivative of {name} by the scale at zero must be that of the theory"
        yield slope(case, along_queries(case, matrix), draw, told, output)


@law("the error is of first order in the scale; of second with the interaction term, or truncated at the order of data",
     "|F − A| ~ s¹, |F − A − s C_vk q| ~ s², |F − A_r| ~ s² for k, v of order r, measured slopes",
     strategy=only_case, double=True, once=True)  # fmt: skip
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
     strategy=only_case, once=True)  # fmt: skip
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
     strategy=only_case, double=True, once=True)  # fmt: skip
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
    sets = [(*tokens_of(case, (mode,))[:2], case.mode_weights(mode)) for mode in modes]
    together = tuple(torch.cat(parts, -2 + (k > 1)) for k, parts in enumerate(zip(*sets, strict=True)))
    gaps, chosen = zip(*(_best(asking, *tokens) for tokens in (*sets, together)), strict=True)
    # Both logits of a gap err by the rounding of averages; the logarithms of the weights are small beside the rest.
    gap = min(gaps) - 4 * allowed("average", case.dtype, magnitude=largest(asking.abs().sum(-1)) * largest(case.key))
    if gap <= 0:
        return
    far = case.replace(scale=max(1.0, LEAST_GAP / gap))
    center = mean_of(case.value, case).reshape(*case.batch, 1, -1)
    additive = torch.stack(chosen[:-1]).sum(0) - (case.order - 1) * center
    for name, expected in (("additive_attention", additive), ("kao_kv", chosen[-1])):
        # Of the logits only the order counts: averages of values and their sums are all that is rounded.
        tolerance = (2 * case.order - 1) * allowed("output", case.dtype, magnitude=case.magnitude)
        told = f"at a large scale {name} must attend to the best token alone"
        yield Comparison(told, rows(called(getattr(ta, name), far), batch), expected, tolerance)
