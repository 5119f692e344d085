"""Diagnose: the error is the one of its formula, and its standard error is honest."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tensorattn as ta
from tensorattn.diagnose import ErrorEstimate, centred_error, error_estimate, sample_positions
from tensorattn.errors import OptionError, ShapeError


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


def test_shapes_that_disagree() -> None:
    q, k, v = tokens(2, 4, 5, 8)
    with pytest.raises(ShapeError, match=r"^error_estimate: mode 1 has size 5 in key but 4 in value\."):
        error_estimate("additive", q, k, v[:, :, :4], order=2)
    with pytest.raises(ShapeError, match=r"^output has shape \(2, 3\), but exact has \(2, 4\)\."):
        centred_error(torch.ones(2, 3), torch.ones(2, 4), torch.ones(4))
