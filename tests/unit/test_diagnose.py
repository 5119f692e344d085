"""Diagnose: errors, bounds and fractions are those of their formulas, and a standard error is honest."""

from __future__ import annotations

import functools
import itertools
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tensorattn as ta
from tensorattn import reference
from tensorattn.attend.report import error_in_words
from tensorattn.diagnose import (
    AdditiveFraction,
    ErrorEstimate,
    additive_fraction,
    bound,
    centred_error,
    error_bound,
    error_estimate,
    sample_positions,
)
from tensorattn.errors import OptionError, ShapeError, WeightsError


def tokens(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values that are random, with a mean that is not zero."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(3, *shape, generator=generator, dtype=dtype) + 0.3)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def whole_error(operator: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, order: int) -> float:
    """The centred error over all queries, by its formula."""
    output = ta.get_operator(operator).function(q, k, v, order=order)
    exact = ta.flattened_attention(q, k, v, order=order)
    mean = v.mean(dim=tuple(range(-order - 1, -1)), keepdim=True)
    return float((output - exact).norm() / (exact - mean).norm())


@pytest.mark.parametrize("operator", list(ta.OPERATORS))
def test_all_queries_give_the_error_itself(operator: str) -> None:
    q, k, v = tokens(2, 4, 5, 8)
    estimate = error_estimate(operator, q, k, v, order=2, n_queries=1000)
    assert estimate.n_queries == 20
    assert estimate.error == pytest.approx(whole_error(operator, q, k, v, 2), abs=1e-12)
    assert estimate.standard_error == pytest.approx(0, abs=1e-9)  # nothing is left unseen


@pytest.mark.parametrize("operator", list(ta.OPERATORS))
def test_the_standard_error_is_how_far_estimates_scatter(operator: str) -> None:
    q, k, v = tokens(2, 12, 15, 8)
    truth = whole_error(operator, q, k, v, 2)
    estimates = [error_estimate(operator, q, k, v, order=2, n_queries=30, generator=seeded(seed)) for seed in range(60)]
    errors = torch.tensor([estimate.error for estimate in estimates])
    if truth < 1e-12:  # exact here
        assert errors.max() < 1e-12
        return
    claimed = torch.tensor([estimate.standard_error for estimate in estimates]).mean()
    assert 0.7 < claimed / errors.std() < 1.4  # sixty estimates know their scatter to about 9 %
    assert abs(errors.mean() - truth) < 5 * errors.std() / math.sqrt(60) + 0.02 * truth


def test_a_function_is_taken_as_an_operator() -> None:
    q, k, v = tokens(2, 4, 5, 8)
    named = error_estimate("kao_kv", q, k, v, order=2, n_queries=6, generator=seeded())
    called = error_estimate(ta.kao_kv, q, k, v, order=2, n_queries=6, generator=seeded())
    assert named.error == pytest.approx(called.error)
    assert named.standard_error == pytest.approx(called.standard_error)


def test_options_reach_the_operator() -> None:
    q, k, v = tokens(2, 4, 5, 8)
    plain, centred = (
        error_estimate("kao_qkv", q, k, v, order=2, generator=seeded(), centered=centered) for centered in (False, True)
    )
    assert centred.error < plain.error


def test_operators_that_merge_the_own_token_see_the_whole_grid() -> None:
    q, k, v = tokens(2, 4, 5, 8)
    estimate = error_estimate("additive", q, k, v, order=2, n_queries=99, include_self=True)
    output = ta.additive_attention(q, k, v, order=2, include_self=True)
    exact = ta.flattened_attention(q, k, v, order=2)
    expected = (output - exact).norm() / (exact - v.mean(dim=(1, 2), keepdim=True)).norm()
    assert estimate.error == pytest.approx(float(expected))


def test_the_mean_of_the_values_scores_one() -> None:
    q, k, v = tokens(2, 4, 5, 8)

    def mean(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: object) -> torch.Tensor:
        return value.mean(dim=(1, 2), keepdim=True).expand_as(value)

    estimate = error_estimate(mean, q, k, v, order=2, n_queries=7)
    assert estimate.error == pytest.approx(1.0) and estimate.standard_error == pytest.approx(0.0, abs=1e-12)


def test_weights_count_as_repetition() -> None:
    q, k, v = tokens(2, 4, 5, 8)
    repeats = torch.tensor([1, 2, 0, 3])
    weights = [repeats.double(), None]
    weighted = error_estimate("additive", q, k, v, order=2, n_queries=99, weights=weights)
    k, v = (each.repeat_interleave(repeats, dim=1) for each in (k, v))
    repeated = error_estimate("additive", q, k, v, order=2, n_queries=99)
    assert weighted.error == pytest.approx(repeated.error)


def test_scale_reaches_both_sides() -> None:
    q, k, v = tokens(2, 4, 5, 8)
    scaled = error_estimate("additive", q, k, v, order=2, scale=0.1, generator=seeded())
    spelled = error_estimate("additive", q * 0.1, k, v, order=2, scale=1.0, generator=seeded())
    assert scaled.error == pytest.approx(spelled.error)


def test_queries_may_be_a_list_or_another_grid_or_one() -> None:
    _, k, v = tokens(2, 4, 5, 8)
    for positions in ((7,), (3, 3, 2), ()):
        query = torch.randn(2, *positions, 8, dtype=torch.float64)
        estimate = error_estimate("additive", query, k, v, order=2)
        assert estimate.n_queries == math.prod(positions) and math.isfinite(estimate.error)
    assert math.isnan(estimate.standard_error)  # one query has none


def test_no_gradient_is_kept() -> None:
    q, k, v = (each.requires_grad_() for each in tokens(1, 3, 4, 2))
    assert isinstance(error_estimate("additive", q, k, v, order=2).error, float)


# ---- the ratio estimator -------------------------------------------------------------------------------------


@given(st.integers(2, 12), st.integers(0, 10**6))
def test_the_jackknife_is_the_one_of_the_textbook(count: int, seed: int) -> None:
    output, exact = torch.randn(2, 3, count, 4, generator=seeded(seed), dtype=torch.float64)
    mean = exact.mean(dim=1)
    estimate = centred_error(output, exact, mean)

    def ratio(kept: list[int]) -> float:
        return float((output - exact)[:, kept].norm() / (exact - mean[:, None])[:, kept].norm())

    left_out = [ratio([j for j in range(count) if j != i]) for i in range(count)]
    centre = sum(left_out) / count
    variance = (count - 1) / count * sum((each - centre) ** 2 for each in left_out)
    assert estimate.error == pytest.approx(ratio(list(range(count))))
    assert estimate.standard_error == pytest.approx(math.sqrt(variance), rel=1e-6, abs=1e-9)
    of_many = centred_error(output, exact, mean, population=4 * count)
    assert of_many.standard_error == pytest.approx(math.sqrt(0.75 * variance), rel=1e-6, abs=1e-9)


def test_an_exact_mean_has_no_signal() -> None:
    exact = torch.ones(2, 5, 3)
    mean = torch.ones(2, 3)
    assert centred_error(exact, exact, mean).error == 0
    assert centred_error(exact + 1, exact, mean).error == math.inf


def test_no_number_is_not_exact():
    exact, mean = torch.ones(3, 2), torch.zeros(2)
    for output, full in ((exact * math.nan, exact), (exact, exact * math.nan), (exact * math.nan, exact * math.nan)):
        estimate = centred_error(output, full, mean)
        assert math.isnan(estimate.error)
        assert error_in_words(estimate) == "not a number"
    one = exact.clone()
    one[1, 1] = math.nan
    assert math.isnan(centred_error(one, exact, mean).error)


def test_an_estimate_prints_itself() -> None:
    assert str(ErrorEstimate(0.25, 0.0312, 64)) == "0.250 ± 0.031 (64 queries)"


@given(st.integers(1, 200), st.integers(2, 80), st.integers(0, 10**6))
def test_positions_are_drawn_without_replacement(count: int, wanted: int, seed: int) -> None:
    drawn = sample_positions(count, wanted, seeded(seed)).tolist()
    assert len(drawn) == len(set(drawn)) == min(count, wanted)
    assert drawn == sorted(drawn) and set(drawn) <= set(range(count))
    assert drawn == sample_positions(count, wanted, seeded(seed)).tolist()


# ---- messages ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_queries", [1, 0, -3, True, 2.0, "64"])
def test_too_few_queries(n_queries: object) -> None:
    q, k, v = tokens(2, 4, 5, 8)
    with pytest.raises(OptionError) as caught:
        error_estimate("additive", q, k, v, order=2, n_queries=n_queries)  # type: ignore[arg-type]
    assert str(caught.value).splitlines()[0] == (
        f"error_estimate: n_queries must be an integer of at least 2, got {n_queries!r}."
    )


def test_an_unknown_operator() -> None:
    q, k, v = tokens(2, 4, 5, 8)
    with pytest.raises(OptionError, match=r"^error_estimate: there is no operator 'no_such'; the operators are: "):
        error_estimate("no_such", q, k, v, order=2)


@pytest.mark.parametrize(
    ("operator", "options", "rule"),
    [
        (
            "additive",
            {"foo": 1},
            "operator 'additive' has no option 'foo'; its options are: interaction, saturation, include_self.",
        ),
        ("kao_kv", {"interaction": "linear"}, "operator 'kao_kv' has no option 'interaction'; its options are: none."),
        ("kao_qkv", {"dropout_p": 0.1}, "operator 'kao_qkv' has no option 'dropout_p'; its options are: "),
        ("additive", {"return_lse": True}, "return_lse has no meaning for an estimate: only outputs are compared."),
        (ta.kao_kv, {"return_attention": True}, "return_attention has no meaning for an estimate: only outputs are"),
        ("additive", {"causal": 0}, "causal has no meaning for an estimate: sampled queries have no frames."),
        (ta.kao_kv, {"causal": 1}, "causal has no meaning for an estimate: sampled queries have no frames."),
        ("additive", {"bias": [None, None]}, "bias has no meaning for an estimate: sampled queries have no place on"),
    ],
)
def test_options_without_a_meaning(operator: Any, options: dict[str, Any], rule: str) -> None:
    q, k, v = tokens(2, 4, 5, 8)
    with pytest.raises(OptionError, match=f"^{re.escape('error_estimate: ' + rule)}"):
        error_estimate(operator, q, k, v, order=2, **options)


def test_what_is_not_asked_for_may_be_said() -> None:
    q, k, v = tokens(2, 4, 5, 8)
    said = error_estimate("additive", q, k, v, order=2, generator=seeded(), causal=None, bias=None, return_lse=False)
    assert said == error_estimate("additive", q, k, v, order=2, generator=seeded())


@pytest.mark.parametrize("operator", ["additive", "flattened", ta.kao_kv])
def test_masks_and_lengths_crop_the_operator_and_full_attention(operator: Any) -> None:
    q, k, v = tokens(2, 4, 5, 8)
    grid: dict[str, Any] = {"order": 2, "n_queries": 99}
    cropped = torch.zeros(2, 4, 5, dtype=torch.bool)
    cropped[:, :3, :4] = True
    masked = error_estimate(operator, q, k, v, mask=cropped, **grid)
    short = error_estimate(operator, q, k, v, lengths=(3, 4), **grid)
    weighed = [torch.tensor([1.0, 1, 1, 0]), torch.tensor([1.0, 1, 1, 1, 0])]
    weighted = error_estimate(operator, q, k, v, weights=weighed, **grid)
    assert masked.error == pytest.approx(short.error) == pytest.approx(weighted.error)
    assert operator == "flattened" or masked.error != pytest.approx(error_estimate(operator, q, k, v, **grid).error)


def test_a_mask_that_is_no_product_over_modes_reaches_both_sides_and_the_mean() -> None:
    q, k, v = tokens(2, 4, 5, 8)
    mask = torch.rand(2, 4, 5, generator=seeded()) > 0.3
    estimate = error_estimate("additive", q, k, v, order=2, n_queries=99, mask=mask)
    output, exact = (f(q, k, v, order=2, mask=mask) for f in (ta.additive_attention, ta.flattened_attention))
    mean = (v * mask[..., None]).sum((1, 2), keepdim=True) / mask.sum((1, 2))[:, None, None, None]
    assert estimate.error == pytest.approx(float((output - exact).norm() / (exact - mean).norm()))


def test_shapes_that_disagree() -> None:
    q, k, v = tokens(2, 4, 5, 8)
    with pytest.raises(ShapeError, match=r"^error_estimate: mode 1 has size 5 in key but 4 in value\."):
        error_estimate("additive", q, k, v[:, :, :4], order=2)
    with pytest.raises(ShapeError, match=r"^output has shape \(2, 3\), but exact has \(2, 4\)\."):
        centred_error(torch.ones(2, 3), torch.ones(2, 4), torch.ones(4))


# ---- the error bound -----------------------------------------------------------------------------------------

WEIGHTS = [
    None,
    [torch.tensor([1.0, 0.0, 2.0, 0.5]).double(), None, torch.tensor([3.0, 1.0, 0.0]).double()],
    [None, torch.tensor([[0.0, 1.0], [1.0, 2.0]]).double(), None],  # they differ between samples
]


def bound_by_definition(q, k, v, *, scale, weights, oscillation):
    """Bound of one query without batch, position by position; the diameter is twice the distance from a centre."""
    order = k.ndim - 1
    w = [np.ones(n) if each is None else each for each, n in zip(weights, k.shape[:-1], strict=True)]
    residuals = [t - reference.additive_part(t, order=order, weights=w) for t in (k, v)]
    share = functools.reduce(np.multiply.outer, [each / each.sum() for each in w])
    here = share > 0
    logits = scale * residuals[0][here] @ q
    spread = logits.max() - logits.min()
    if oscillation == "cheap":
        spread = 2 * scale * np.linalg.norm(q) * np.linalg.norm(residuals[0][here], axis=-1).max()
    present = v[here]
    centres = (share[here] @ present, (present.max(0) + present.min(0)) / 2)
    diameter = 2 * min(np.linalg.norm(present - centre, axis=-1).max() for centre in centres)
    chi = []
    for each, mean in zip(w, reference.mode_averages(k, order=order, weights=w), strict=True):
        u = each[each > 0] / each.sum()
        p = u * np.exp(scale * (mean[each > 0] - mean[each > 0][0]) @ q)
        chi.append(((p / p.sum()) ** 2 / u).sum() - 1)
    sets = (c for size in range(2, order + 1) for c in itertools.combinations(chi, size))
    deviation = np.linalg.norm(residuals[1][here] * np.sqrt(share[here])[:, None], 2)
    largest = np.linalg.norm(residuals[1][here], axis=-1).max()
    remainder = min(largest, deviation * np.sqrt(sum(np.prod(c) for c in sets)))
    return diameter * np.tanh(spread / 4) + remainder


@pytest.mark.parametrize("weights", WEIGHTS, ids=["equal", "weights", "batched"])
@pytest.mark.parametrize("oscillation", ["cheap", "exact"])
@pytest.mark.parametrize("scale", [None, 0.01, 3.0])
def test_the_bound_is_its_formula(weights: object, oscillation: str, scale: float | None) -> None:
    q, k, v = tokens(2, 4, 2, 3, 5)
    found = error_bound(q, k, v, order=3, weights=weights, scale=scale, oscillation=oscillation)
    assert found.shape == (2, 4, 2, 3) and found.dtype == torch.float64
    for index in np.ndindex(*found.shape):
        own = [None if w is None else w[index[0]].numpy() if w.dim() > 1 else w.numpy() for w in weights or [None] * 3]
        expected = bound_by_definition(
            q[index].numpy(),
            k[index[0]].numpy(),
            v[index[0]].numpy(),
            scale=5**-0.5 if scale is None else scale,
            weights=own,
            oscillation=oscillation,
        )
        assert float(found[index]) == pytest.approx(expected, rel=1e-9)


def test_the_diameter_of_one_channel_is_its_range() -> None:
    values = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 8.0]]).double().unsqueeze(-1)  # far from its mean, 4/3
    grid = bound.read_grid(values, ta.modes.GridShape((), (2, 3), 1), None)
    assert float(bound._diameter(bound.split(values, grid), grid)) == 8


def test_the_bound_is_zero_where_there_is_one_mode() -> None:
    q, k, v = tokens(2, 6, 5)
    assert error_bound(q, k, v, order=1).eq(0).all() and error_bound(q, k, v, order=1, oscillation="exact").eq(0).all()


def test_the_bound_of_additive_tensors_is_rounding() -> None:
    rows, columns = tokens(2, 6, 1, 4)[0], tokens(2, 1, 5, 4)[1]
    q, x = tokens(2, 3, 4)[2], rows + columns
    assert error_bound(q, x, x, order=2).max() < 1e-13


def test_positions_of_weight_zero_do_not_count() -> None:
    q, k, v = tokens(2, 4, 5, 3)
    weights = [torch.tensor([1.0, 0.0, 2.0, 1.0]), torch.tensor([[1.0, 1.0, 0.0, 1.0, 3.0], [0.0, 1.0, 1.0, 1.0, 1.0]])]
    absent = torch.einsum("a,bc->bac", *weights) == 0
    for fill in (1e6, math.nan, -math.inf):
        k_filled, v_filled = (t.masked_fill(absent[..., None], fill) for t in (k, v))
        for oscillation in ("cheap", "exact"):
            given = {"order": 2, "weights": weights, "oscillation": oscillation}
            plain, filled = error_bound(q, k, v, **given), error_bound(q, k_filled, v_filled, **given)
            assert torch.equal(plain, filled)
        measured = [additive_fraction(t, order=2, weights=weights, query=q) for t in (k, k_filled)]
        assert torch.equal(measured[0].modes, measured[1].modes)
    cropped = error_bound(q[1:], k[1:, [0, 2, 3], 1:], v[1:, [0, 2, 3], 1:], order=2, weights=[
        weights[0][[0, 2, 3]], None
    ])  # fmt: skip
    assert torch.allclose(error_bound(q, k, v, order=2, weights=weights)[1], cropped[0], rtol=1e-12)


@pytest.mark.parametrize("oscillation", ["cheap", "exact"])
def test_weights_of_the_bound_count_as_repetition(oscillation: str) -> None:
    q, k, v = tokens(2, 4, 5, 3)
    repeats = torch.tensor([1, 2, 0, 3])
    weighted = error_bound(q, k, v, order=2, weights=[repeats, None], oscillation=oscillation)
    k, v = (each.repeat_interleave(repeats, dim=1) for each in (k, v))
    assert torch.allclose(weighted, error_bound(q, k, v, order=2, oscillation=oscillation), rtol=1e-12)


def test_a_sample_without_any_position_has_the_bound_zero() -> None:
    q, k, v = tokens(2, 4, 5, 3)
    weights = [torch.tensor([[0.0] * 4, [1.0] * 4]), None]
    for oscillation in ("cheap", "exact"):
        found = error_bound(q, k, v, order=2, weights=weights, oscillation=oscillation)
        assert found[0].eq(0).all() and found[1].gt(0).all()


def test_small_logits_do_not_cancel() -> None:
    """Keys that are additive leave the term of the values, which for two modes is quadratic in the scale."""
    rows, columns = tokens(2, 6, 1, 4)[0], tokens(2, 1, 5, 4)[1]
    q, v = tokens(2, 3, 4)[2], tokens(2, 6, 5, 3)[0]
    x = rows + columns
    spreads = [(mean @ q.mT).var(dim=1, correction=0) for mean in ta.mode_averages(x, order=2)]
    residual = ta.interaction_residual(v, order=2).flatten(1, -2)
    deviation = torch.linalg.matrix_norm(residual.mT @ residual / 30, 2).sqrt()
    for scale in (1e-4, 1e-7, 1e-10, 1e-14):
        found = bound._excess(q * scale, bound.split(x, grid := bound.read_grid(x, GRID, None)), grid)
        assert torch.allclose(found / scale**4, spreads[0] * spreads[1], rtol=1e-2 * (scale / 1e-4) + 1e-9)
        total = error_bound(q, x, v, order=2, scale=scale)
        expected = deviation[:, None] * (spreads[0] * spreads[1]).sqrt() * scale**2
        assert (total >= expected * (1 - 10 * scale)).all()


GRID = ta.modes.GridShape((2,), (6, 5), 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_bound_is_computed_in_float64(dtype: torch.dtype) -> None:
    q, k, v = tokens(2, 4, 5, 8, dtype=dtype)
    found = error_bound(q, k, v, order=2, oscillation="exact")
    assert torch.equal(found, error_bound(q.double(), k.double(), v.double(), order=2, oscillation="exact"))


@pytest.mark.parametrize("factor", [1e4, -1e4, 1e-30])
def test_far_and_near_logits_have_finite_bounds(factor: float) -> None:
    q, k, v = tokens(2, 4, 5, 8)
    weights = [torch.tensor([1e-300, 1.0, 1.0, 1e-12], dtype=torch.float64), None]
    for oscillation in ("cheap", "exact"):
        found = error_bound(q, k, v, order=2, scale=factor, weights=weights, oscillation=oscillation)
        assert found.isfinite().all() and found.ge(0).all()
        constant = error_bound(q, k, torch.ones_like(v), order=2, scale=factor, weights=weights)
        assert constant.eq(0).all()


def test_the_bound_does_not_depend_on_how_many_queries_are_taken_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = tokens(2, 4, 5, 8)
    whole = error_bound(q, k, v, order=2, oscillation="exact")
    monkeypatch.setattr(bound, "CHUNK", 100)
    assert torch.allclose(error_bound(q, k, v, order=2, oscillation="exact"), whole, rtol=1e-14)


def test_the_bound_takes_any_positions_and_keeps_no_graph() -> None:
    _, k, v = (each.requires_grad_() for each in tokens(2, 4, 5, 8))
    for positions in ((7,), (3, 3, 2), (), (0,)):
        query = torch.randn(2, *positions, 8, dtype=torch.float64, requires_grad=True)
        for oscillation in ("cheap", "exact"):
            found = error_bound(query, k, v, order=2, oscillation=oscillation)
            assert found.shape == (2, *positions) and not found.requires_grad
    _, k, v = tokens(4, 5, 8)
    assert error_bound(torch.randn(8).double(), k, v, order=2).shape == ()


def test_a_mistyped_oscillation() -> None:
    q, k, v = tokens(2, 4, 5, 8)
    with pytest.raises(OptionError) as caught:
        error_bound(q, k, v, order=2, oscillation="tight")
    assert str(caught.value).splitlines()[0] == "error_bound: oscillation must be 'cheap' or 'exact', got 'tight'."
    with pytest.raises(ShapeError, match=r"^error_bound: mode 1 has size 5 in key but 4 in value\."):
        error_bound(q, k, v[:, :, :4], order=2)
    with pytest.raises(WeightsError, match=r"^error_bound: weights of mode 0 have length 3, but the mode has size 4\."):
        error_bound(q, k, v, order=2, weights=[torch.ones(3), None])


# ---- the additive fraction -----------------------------------------------------------------------------------


def variances_by_definition(x: np.ndarray, w: list[np.ndarray]) -> list[float]:
    """Variance of each main effect and of the residual of one tensor, summed over channels."""
    order = x.ndim - 1
    mean = reference.marginal_mean(x, (), order=order, weights=w)
    main = reference.mode_averages(x, order=order, weights=w)
    residual = x - reference.additive_part(x, order=order, weights=w)
    parts = [((effect - mean) ** 2).sum(-1) @ (each / each.sum()) for effect, each in zip(main, w, strict=True)]
    share = functools.reduce(np.multiply.outer, [each / each.sum() for each in w])
    return [*parts, float(((residual**2).sum(-1) * share).sum())]


@pytest.mark.parametrize("weights", WEIGHTS, ids=["equal", "weights", "batched"])
def test_fractions_are_their_formula_and_add_up(weights: object) -> None:
    x = tokens(2, 4, 2, 3, 5)[0]
    found = additive_fraction(x, order=3, weights=weights)
    assert found.modes.shape == (2, 3) and found.interaction.shape == found.variance.shape == (2,)
    assert torch.allclose(found.modes.sum(-1) + found.interaction, torch.ones(2).double(), atol=1e-14)
    assert torch.allclose(found.additive, found.modes.sum(-1), atol=1e-14)
    for b in range(2):
        own = [np.ones(n) if w is None else w[b].numpy() if w.dim() > 1 else w.numpy()
               for w, n in zip(weights or [None] * 3, (4, 2, 3), strict=True)]  # fmt: skip
        parts = variances_by_definition(x[b].numpy(), own)
        share = functools.reduce(np.multiply.outer, [each / each.sum() for each in own])
        centred = x[b].numpy() - reference.marginal_mean(x[b], (), order=3, weights=own)
        assert sum(parts) == pytest.approx(((centred**2).sum(-1) * share).sum())
        assert float(found.variance[b]) == pytest.approx(sum(parts))
        assert [*found.modes[b].tolist(), float(found.interaction[b])] == pytest.approx(np.array(parts) / sum(parts))


@pytest.mark.parametrize("weights", WEIGHTS, ids=["equal", "weights", "batched"])
@pytest.mark.parametrize("dim", [2, 30])  # fewer and more channels than positions
def test_fractions_of_logits_are_those_of_the_logits_written_out(weights: object, dim: int) -> None:
    keys, query = tokens(2, 4, 2, 3, dim)[0], tokens(2, 7, 5, dim, seed=1)[0]
    found = additive_fraction(keys, order=3, weights=weights, query=query, scale=0.3)
    assert found.modes.shape == (2, 7, 5, 3) and found.interaction.shape == found.variance.shape == (2, 7, 5)
    logits = 0.3 * torch.einsum("bxyd,bijkd->bxyijk", query, keys).unsqueeze(-1)
    for x, y in ((0, 0), (6, 4)):
        expected = additive_fraction(logits[:, x, y], order=3, weights=weights)
        for name in ("modes", "interaction", "variance"):
            assert torch.allclose(getattr(found, name)[:, x, y], getattr(expected, name), rtol=1e-10, atol=1e-14)


def test_the_scale_changes_the_variance_of_logits_alone() -> None:
    q, k, _ = tokens(2, 4, 5, 16)
    plain, far = (additive_fraction(k, order=2, query=q, scale=scale) for scale in (None, 2.5))
    assert torch.allclose(plain.modes, far.modes) and torch.allclose(plain.interaction, far.interaction)
    assert torch.allclose(plain.variance * 100, far.variance)


def test_pooled_fractions_are_weighted_by_variance() -> None:
    x = tokens(3, 4, 5, 6)[0] * torch.tensor([0.1, 1.0, 3.0]).reshape(3, 1, 1, 1)
    apart = additive_fraction(x, order=2)
    together = apart.pooled()
    assert together.modes.shape == (2,) and together.interaction.shape == ()
    expected = (apart.modes * apart.variance[:, None]).sum(0) / apart.variance.sum()
    assert torch.allclose(together.modes, expected) and torch.allclose(together.variance, apart.variance.mean())
    # Samples are put together as channels are, each with a mean of its own.
    channels = additive_fraction(x.movedim(0, -1).flatten(-2), order=2)
    assert torch.allclose(channels.modes, together.modes) and torch.allclose(channels.interaction, together.interaction)
    assert torch.allclose(channels.pooled().interaction, channels.interaction)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_constant_tensor_has_nothing_to_share(dtype: torch.dtype) -> None:
    x = torch.tensor([0.1, -1e4, 0.0], dtype=dtype).expand(2, 7, 5, 3)
    query = torch.randn(2, 4, 3, generator=seeded()).to(dtype)
    weights = [torch.tensor([1.0, 0.0] + [1.0] * 5), None]
    varied = x.clone()
    varied[:, 1] = torch.arange(5, dtype=dtype)[:, None]  # where no position counts
    for found in (
        additive_fraction(x, order=2),
        additive_fraction(x, order=2, query=query),
        additive_fraction(varied, order=2, weights=weights),
        additive_fraction(varied, order=2, query=query, weights=weights),
        additive_fraction(tokens(2, 3, 4, 5)[0], order=2, weights=[torch.tensor([[0.0] * 3, [0.0] * 2 + [1.0]]), None],
                          query=torch.zeros(2, 6, 5).double()),
    ):  # fmt: skip
        for part in (found.modes, found.interaction, found.variance, found.pooled().modes, found.pooled().variance):
            assert part.eq(0).all()
        assert found.additive.eq(1).all()


def test_logits_that_vary_by_rounding_are_constant() -> None:
    """Keys vary along one direction, the query is orthogonal to it."""
    generator = seeded()
    direction, query = torch.randn(2, 16, generator=generator, dtype=torch.float64)
    query -= (query @ direction) / (direction @ direction) * direction
    keys = torch.randn(4, 5, 1, generator=generator, dtype=torch.float64) * direction
    blind = additive_fraction(keys, order=2, query=query)
    assert blind.modes.eq(0).all() and blind.interaction.eq(0) and blind.variance.eq(0)
    seeing = additive_fraction(keys, order=2, query=query + 1e-6 * direction)
    assert torch.allclose(seeing.interaction, additive_fraction(keys, order=2).interaction)


def test_a_large_mean_hides_no_effect() -> None:
    rows, columns = ((part * 1024).round() / 1024 for part in (tokens(6, 1, 4)[0], tokens(1, 5, 4)[1]))
    x = rows + columns  # additive to the last bit, also after a shift
    plain, far = additive_fraction(x, order=2), additive_fraction(x + 2.0**40, order=2)
    assert torch.allclose(plain.modes, far.modes, rtol=1e-9) and far.interaction < 1e-20


def test_size_one_modes_have_no_share_and_one_mode_has_no_interaction() -> None:
    x = tokens(4, 1, 5, 3)[0]
    assert float(additive_fraction(x, order=3).modes[1]) < 1e-30
    assert additive_fraction(x, order=1).interaction.eq(0).all()
    assert torch.allclose(additive_fraction(x, order=1).modes, torch.ones(4, 1, 1).double())


def test_fractions_print_what_is_pooled() -> None:
    shares = AdditiveFraction(
        torch.tensor([[0.25, 0.5], [0.0, 0.0]]), torch.tensor([0.25, 0.0]), torch.tensor([8.0, 0.0])
    )
    assert str(shares) == "mode 0: 0.250, mode 1: 0.500, interaction: 0.250"


def test_messages_of_the_fraction() -> None:
    q, k, _ = tokens(2, 4, 5, 8)
    with pytest.raises(OptionError, match=r"^additive_fraction: scale is a factor of logits, but there is no query\."):
        additive_fraction(k, order=2, scale=0.5)
    with pytest.raises(ShapeError, match=r"^additive_fraction: head size is 7 in query but 8 in tensor\."):
        additive_fraction(k, order=2, query=q[..., :7])
    with pytest.raises(
        ShapeError, match=r"^additive_fraction: batch dimensions are \(1,\) in query but \(2,\) in tensor"
    ):
        additive_fraction(k, order=2, query=q[:1])
    with pytest.raises(ShapeError, match=r"^additive_fraction: query has 1 dimensions, but needs at least 2\."):
        additive_fraction(k, order=2, query=q[0, 0, 0])
    with pytest.raises(
        ShapeError, match=r"^additive_fraction: tensor has 4 dimensions, but order 4 needs at least 5\."
    ):
        additive_fraction(k, order=4)
