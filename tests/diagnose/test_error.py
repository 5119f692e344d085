"""Errors are those of their formulas, a standard error is honest, and no tensors violate the bound."""

from __future__ import annotations

import functools
import itertools
import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tensorattn as ta
from tensorattn.diagnose import ErrorEstimate, centred_error, error_bound, error_estimate, sample_positions
from tensorattn.errors import OptionError, ShapeError, WeightsError

QUICK = ("additive", "kao_qkv")
SLACK = 1e-9  # relative, for bounds
every_operator = pytest.mark.parametrize(
    "operator", [pytest.param(name, marks=() if name in QUICK else pytest.mark.thorough) for name in ta.OPERATORS]
)


def tokens(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values that are random, with a mean that is not zero."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(3, *shape, generator=generator, dtype=dtype) + 0.3)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def whole_error(output: torch.Tensor, exact: torch.Tensor, value: torch.Tensor) -> float:
    """The centred error over all queries of two modes, by its formula."""
    return float((output - exact).norm() / (exact - value.mean(dim=(1, 2), keepdim=True)).norm())


# ---- the estimate --------------------------------------------------------------------------------------------


@every_operator
def test_all_queries_give_the_error_itself(operator: str) -> None:
    q, k, v = tokens(2, 4, 5, 8)
    estimate = error_estimate(operator, q, k, v, order=2, n_queries=1000)
    output = ta.get_operator(operator).function(q, k, v, order=2)
    exact = torch.softmax(q.flatten(1, 2) @ k.flatten(1, 2).mT / math.sqrt(8), -1) @ v.flatten(1, 2)
    assert estimate.n_queries == 20
    assert estimate.error == pytest.approx(whole_error(output, exact.reshape(v.shape), v), abs=1e-12)
    assert estimate.standard_error == pytest.approx(0, abs=1e-9)  # nothing is left unseen


@every_operator
def test_the_standard_error_is_how_far_estimates_scatter(operator: str) -> None:
    q, k, v = tokens(2, 12, 15, 8)
    output, exact = ta.get_operator(operator).function(q, k, v, order=2), ta.flattened_attention(q, k, v, order=2)
    truth = whole_error(output, exact, v)
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


@pytest.mark.parametrize("cells", ["keys", "blocks"])
def test_the_largest_rho_of_batch_and_heads_is_told(cells: str) -> None:
    q, k, v = tokens(2, 3, 6, 7, 8)
    settings: dict[str, Any] = {"order": 2, "tokens": 6, "cells": cells}
    estimate = error_estimate("clustered", q, k, v, n_queries=10, generator=seeded(), **settings)
    result = ta.clustered_attention(q, k, v, return_lse=True, **settings)
    assert estimate.rho == pytest.approx(float(result.rho.max())) and result.rho.min() < result.rho.max()
    whole = error_estimate("clustered", q, k, v, n_queries=99, **settings)
    exact = ta.flattened_attention(q, k, v, order=2)
    missed = (result.output - exact).norm() / (exact - v.mean(dim=(2, 3), keepdim=True)).norm()
    assert whole.error == pytest.approx(float(missed))  # with the cells of all queries, not of the sampled ones
    assert str(estimate).endswith(f"(10 queries), rho {estimate.rho:.3f}")
    assert error_estimate("additive", q, k, v, order=2).rho is None


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
    assert estimate.error == pytest.approx(whole_error(output, ta.flattened_attention(q, k, v, order=2), v))


def test_the_mean_of_the_values_scores_one() -> None:
    q, k, v = tokens(2, 4, 5, 8)

    def mean(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: object) -> torch.Tensor:
        return value.mean(dim=(1, 2), keepdim=True).expand_as(value)

    estimate = error_estimate(mean, q, k, v, order=2, n_queries=7)
    assert estimate.error == pytest.approx(1.0) and estimate.standard_error == pytest.approx(0.0, abs=1e-12)


def test_weights_count_as_repetition() -> None:
    q, k, v = tokens(2, 4, 5, 8)
    repeats = torch.tensor([1, 2, 0, 3])
    weighted = error_estimate("additive", q, k, v, order=2, n_queries=99, weights=[repeats.double(), None])
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


@pytest.mark.parametrize("operator", ["additive", ta.kao_kv])
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
    assert masked.error != pytest.approx(error_estimate(operator, q, k, v, **grid).error)


def test_a_mask_that_is_no_product_over_modes_reaches_both_sides_and_the_mean() -> None:
    q, k, v = tokens(2, 4, 5, 8)
    mask = torch.rand(2, 4, 5, generator=seeded()) > 0.3
    estimate = error_estimate("additive", q, k, v, order=2, n_queries=99, mask=mask)
    output, exact = (f(q, k, v, order=2, mask=mask) for f in (ta.additive_attention, ta.flattened_attention))
    mean = (v * mask[..., None]).sum((1, 2), keepdim=True) / mask.sum((1, 2))[:, None, None, None]
    assert estimate.error == pytest.approx(float((output - exact).norm() / (exact - mean).norm()))
    empty = error_estimate("additive", q, k, v, order=2, mask=torch.zeros(2, 4, 5, dtype=torch.bool))
    assert empty.error == 0  # both attend to nothing


def test_one_position_is_exact_and_what_is_absent_shows_nowhere() -> None:
    q, k, v = tokens(2, 1, 1, 8)
    assert error_estimate("kao_kv", q, k, v, order=2).error == 0
    q, k, v = tokens(2, 4, 5, 8)
    mask = torch.rand(2, 4, 5, generator=seeded()) > 0.3
    plain = error_estimate("additive", q, k, v, order=2, n_queries=99, mask=mask)
    k, v = (each.masked_fill(~mask[..., None], math.nan) for each in (k, v))
    assert error_estimate("additive", q, k, v, order=2, n_queries=99, mask=mask).error == pytest.approx(plain.error)
    assert math.isnan(error_estimate("additive", q, k, v, order=2, n_queries=99).error)


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
    exact, mean = torch.ones(2, 5, 3), torch.ones(2, 3)
    assert centred_error(exact, exact, mean).error == 0
    assert centred_error(exact + 1, exact, mean).error == math.inf


def test_one_position_is_its_own_mean():
    """Rounding is no error: full attention is the mean there, and so is every operator of one position."""
    only = torch.randn(2, 1, 1, 8, generator=torch.Generator().manual_seed(0))
    for operator in ("clustered", "additive"):
        assert error_estimate(operator, only, only, only, order=2).error == 0
    assert ta.choose_tokens(only, only, only, order=2).tokens == 8
    few = torch.randn(2, 3, 1, 8, generator=torch.Generator().manual_seed(0))
    assert error_estimate("additive", few, few, torch.full_like(few, 0.1), order=2).error == 0


def test_no_number_is_not_exact() -> None:
    exact, mean = torch.ones(3, 2), torch.zeros(2)
    for output, full in ((exact * math.nan, exact), (exact, exact * math.nan), (exact * math.nan, exact * math.nan)):
        assert math.isnan(centred_error(output, full, mean).error)
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


# ---- the number of tokens ------------------------------------------------------------------------------------


def kinds(count: int) -> torch.Tensor:
    """A grid of 160 positions of a few kinds."""
    which = torch.randint(count, (10, 16), generator=seeded())
    return torch.randn(count, 4, generator=seeded(), dtype=torch.float64)[which]


@pytest.mark.parametrize(("count", "found"), [(5, 8), (12, 16), (40, 64)])
def test_the_least_number_of_tokens_that_is_enough(count: int, found: int) -> None:
    x = kinds(count)
    choice = ta.choose_tokens(x, x, x, order=2, error=1e-9)
    assert choice.tokens == found and list(choice.tried) == [8 << i for i in range(len(choice.tried))]
    *before, last = choice.tried.values()
    assert last.error < 1e-9 and all(estimate.error >= 1e-9 for estimate in before)
    assert str(choice).startswith(f"{found} tokens have an error below 1e-09\n  8: ")


def test_the_estimates_of_the_tokens_tried_are_those_of_each() -> None:
    q, k, v = tokens(2, 10, 16, 4)
    mask = torch.rand(2, 10, 16, generator=seeded()) > 0.3
    settings: dict[str, Any] = {"order": 2, "scale": 0.4, "mask": mask, "n_queries": 20, "cells": "blocks"}
    choice = ta.choose_tokens(q, k, v, error=0, most=40, generator=seeded(), **settings)
    assert choice.tokens is None and list(choice.tried) == [8, 16, 32]
    assert str(choice).startswith("no number of tokens up to 32 has an error below 0\n  8: ")
    for number, estimate in choice.tried.items():
        alone = error_estimate("clustered", q, k, v, tokens=number, generator=seeded(), **settings)
        assert (estimate.error, estimate.rho) == pytest.approx((alone.error, alone.rho))


def test_no_more_tokens_than_positions_are_tried() -> None:
    q, k, v = tokens(10, 2, 4)
    assert list(ta.choose_tokens(q, k, v, order=2, error=0).tried) == [8, 16]
    assert ta.choose_tokens(q[:1, :1], k[:1], v[:1], order=2).tokens == 8  # two positions


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"error": -1}, "error must be at least 0, got -1."),
        ({"most": 4}, "most must be at least 8, got 4."),
        ({"tokens": 16}, "tokens is what is chosen; most tells how many may be tried."),
        (
            {"blocks": (2, 2), "cells": "blocks"},
            "blocks says how many tokens there are, so that there is no number to choose.",
        ),
        (
            {"cells": ta.Cells(torch.zeros(3, 8), torch.eye(8))},
            "cells says how many tokens there are, so that there is no number to choose.",
        ),
        ({"kept": 1}, "operator 'clustered' has no option 'kept'; its options are: "),
        ({"causal": 0}, "causal has no meaning for an estimate: sampled queries have no frames."),
        ({"n_queries": 1}, "n_queries must be an integer of at least 2, got 1."),
    ],
)
def test_what_tokens_cannot_be_chosen_by(options: dict[str, Any], rule: str) -> None:
    with pytest.raises(OptionError, match=f"^{re.escape('choose_tokens: ' + rule)}"):
        ta.choose_tokens(*tokens(4, 5, 8), order=2, **options)


def test_no_queries_have_no_estimate() -> None:
    q, k, v = tokens(4, 5, 8)
    rule = re.escape("query has 0 positions, but an estimate needs at least 1.")
    with pytest.raises(ShapeError, match=f"^choose_tokens: {rule}"):
        ta.choose_tokens(q[:, :0], k, v, order=2)
    with pytest.raises(ShapeError, match=f"^error_estimate: {rule}"):
        error_estimate("kao_kv", q[:, :0], k, v, order=2)


# ---- messages of the estimate --------------------------------------------------------------------------------

READING = """
  modes    0 1
  key      (2, 4, 5, 8)   batch=(2,) 0=4 1=5 D=8
  value    (2, 4, 5, 8)   batch=(2,) 0=4 1=5 D=8
  query    (2, 4, 5, 8)   batch=(2,) positions=(4, 5) D=8"""


@pytest.mark.parametrize("n_queries", [1, True, 2.0])
def test_too_few_queries(n_queries: Any) -> None:
    with pytest.raises(OptionError) as caught:
        error_estimate("additive", *tokens(2, 4, 5, 8), order=2, n_queries=n_queries)
    rule = f"error_estimate: n_queries must be an integer of at least 2, got {n_queries!r}."
    assert sorted(str(caught.value).splitlines()) == sorted((rule + READING).splitlines())


@pytest.mark.parametrize(
    ("operator", "options", "rule"),
    [
        ("no_such", {}, "there is no operator 'no_such'; the operators are: "),
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
    with pytest.raises(OptionError, match=f"^{re.escape('error_estimate: ' + rule)}"):
        error_estimate(operator, *tokens(2, 4, 5, 8), order=2, **options)


def test_what_is_not_asked_for_may_be_said() -> None:
    q, k, v = tokens(2, 4, 5, 8)
    said = error_estimate("additive", q, k, v, order=2, generator=seeded(), causal=None, bias=None, return_lse=False)
    assert said == error_estimate("additive", q, k, v, order=2, generator=seeded())


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


def additive(tensor: torch.Tensor, shares: list[torch.Tensor]) -> torch.Tensor:
    """Additive part of a tensor ``(n_1, …, n_N, D)``, average by average."""
    order = len(shares)
    views = [share.reshape([-1 if m == mode else 1 for m in range(order)] + [1]) for mode, share in enumerate(shares)]

    def average(kept: tuple[int, ...]) -> torch.Tensor:
        found = tensor
        for mode, share in enumerate(views):
            found = found if mode in kept else (found * share).sum(mode, keepdim=True)
        return found

    return sum((average((m,)) for m in range(order)), start=-(order - 1) * average(()))


def bound_by_definition(q, k, v, *, scale, weights, oscillation):
    """Bound of one query without batch, position by position; the diameter is twice the distance from a centre."""
    order = k.dim() - 1
    w = [torch.ones(n).double() if each is None else each for each, n in zip(weights, k.shape[:-1], strict=True)]
    shares = [each / each.sum() for each in w]
    residuals = [t - additive(t, shares) for t in (k, v)]
    share = functools.reduce(lambda left, right: left[..., None] * right, shares)
    here = share > 0
    logits = scale * residuals[0][here] @ q
    spread = logits.max() - logits.min()
    if oscillation == "cheap":
        spread = 2 * scale * q.norm() * residuals[0][here].norm(dim=-1).max()
    present = v[here]
    centres = (share[here] @ present, (present.amax(0) + present.amin(0)) / 2)
    diameter = 2 * min((present - centre).norm(dim=-1).max() for centre in centres)
    chi = []
    for mode, u in enumerate(shares):
        others = [(m, s) for m, s in reversed(list(enumerate(shares))) if m != mode]
        mean = functools.reduce(lambda t, other: torch.tensordot(other[1], t, dims=([0], [other[0]])), others, k)
        p = u[u > 0] * (scale * (mean[u > 0] - mean[u > 0][0]) @ q).exp()
        chi.append(((p / p.sum()) ** 2 / u[u > 0]).sum() - 1)
    sets = (c for size in range(2, order + 1) for c in itertools.combinations(chi, size))
    deviation = torch.linalg.matrix_norm(residuals[1][here] * share[here].sqrt()[:, None], 2)
    excess = sum(math.prod(c) for c in sets)
    largest = residuals[1][here].norm(dim=-1).max()
    return diameter * (spread / 4).tanh() + torch.minimum(largest, deviation * excess**0.5)


@pytest.mark.parametrize("weights", WEIGHTS, ids=["equal", "weights", "batched"])
@pytest.mark.parametrize("oscillation", ["cheap", "exact"])
@pytest.mark.parametrize("scale", [None, 0.01, pytest.param(3.0, marks=pytest.mark.thorough)])
def test_the_bound_is_its_formula(weights: Any, oscillation: str, scale: float | None) -> None:
    q, k, v = tokens(2, 4, 2, 3, 5)
    found = error_bound(q, k, v, order=3, weights=weights, scale=scale, oscillation=oscillation)
    assert found.shape == (2, 4, 2, 3) and found.dtype == torch.float64
    for index in [(0, 0, 0, 0), (0, 3, 1, 2), (1, 1, 0, 1), (1, 2, 1, 0)]:
        own = [None if w is None else w[index[0]] if w.dim() > 1 else w for w in weights or [None] * 3]
        given = {"scale": 5**-0.5 if scale is None else scale, "weights": own, "oscillation": oscillation}
        assert float(found[index]) == pytest.approx(
            float(bound_by_definition(q[index], k[index[0]], v[index[0]], **given)), rel=1e-9
        )


def test_the_diameter_of_one_channel_is_its_range() -> None:
    """Additive values far from their mean, 2, and keys that tilt as far as can be."""
    values = torch.tensor([0.0, 0.0, 0.0, 8.0]).double().view(4, 1, 1).expand(4, 2, 1)
    keys = torch.tensor([[1.0, -1.0], [-1.0, 1.0]] * 2).double().unsqueeze(-1)
    assert float(error_bound(torch.tensor([1e3]).double(), keys, values, order=2)) == 8


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
            assert torch.equal(error_bound(q, k, v, **given), error_bound(q, k_filled, v_filled, **given))
    cropped = (t[1:, [0, 2, 3], 1:] for t in (k, v))
    own = error_bound(q[1:], *cropped, order=2, weights=[weights[0][[0, 2, 3]], None])
    assert torch.allclose(error_bound(q, k, v, order=2, weights=weights)[1], own[0], rtol=1e-12)


@pytest.mark.parametrize("oscillation", ["cheap", "exact"])
def test_weights_of_the_bound_count_as_repetition(oscillation: str) -> None:
    q, k, v = tokens(2, 4, 5, 3)
    repeats = torch.tensor([1, 2, 0, 3])
    weighted = error_bound(q, k, v, order=2, weights=[repeats, None], oscillation=oscillation)
    k, v = (each.repeat_interleave(repeats, dim=1) for each in (k, v))
    assert torch.allclose(weighted, error_bound(q, k, v, order=2, oscillation=oscillation), rtol=1e-12)


@pytest.mark.parametrize("oscillation", ["cheap", "exact"])
def test_a_sample_without_any_position_has_the_bound_zero(oscillation: str) -> None:
    q, k, v = tokens(2, 4, 5, 3)
    weights = [torch.tensor([[0.0] * 4, [1.0] * 4]), None]
    found = error_bound(q, k, v, order=2, weights=weights, oscillation=oscillation)
    assert found[0].eq(0).all() and found[1].gt(0).all()


@pytest.mark.parametrize("oscillation", ["cheap", "exact"])
def test_a_nan_shows_in_the_bounds_that_it_takes_part_in_alone(oscillation: str) -> None:
    for place in range(3):
        given = [t.clone() for t in tokens(2, 4, 5, 3)]
        plain = error_bound(*given, order=2, oscillation=oscillation)
        given[place][0, 1, 1, 1] = math.nan
        found = error_bound(*given, order=2, oscillation=oscillation)
        assert torch.equal(found[1], plain[1])
        assert found[0].isnan().all() if place else found[0].isnan().nonzero().tolist() == [[1, 1]]


def test_small_logits_do_not_cancel() -> None:
    """Keys that are additive leave the term of the values, which for two modes is quadratic in the scale."""
    rows, columns = ((64 * t).round() / 64 for t in (tokens(2, 8, 1, 4)[0], tokens(2, 1, 4, 4)[1]))
    q, v = tokens(2, 3, 4)[2], tokens(2, 8, 4, 3)[0]
    x = rows + columns  # additive to the last bit
    spreads = [(mean @ q.mT).var(dim=1, correction=0) for mean in ta.mode_averages(x, order=2)]
    residual = ta.interaction_residual(v, order=2).flatten(1, -2)
    deviation = torch.linalg.matrix_norm(residual.mT @ residual / 32, 2).sqrt()
    for scale in (1e-4, 1e-7, 1e-10, 1e-14):
        expected = deviation[:, None] * (spreads[0] * spreads[1]).sqrt() * scale**2
        found = error_bound(q, x, v, order=2, scale=scale)
        assert torch.allclose(found, expected, rtol=1e-2 * (scale / 1e-4) + 1e-9, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_bound_is_computed_in_float64(dtype: torch.dtype) -> None:
    q, k, v = tokens(2, 4, 5, 8, dtype=dtype)
    found = error_bound(q, k, v, order=2, oscillation="exact")
    assert torch.equal(found, error_bound(q.double(), k.double(), v.double(), order=2, oscillation="exact"))


@pytest.mark.parametrize("factor", [1e4, -1e4, 1e-30])
def test_far_and_near_logits_have_finite_bounds(factor: float) -> None:
    q, k, v = tokens(2, 4, 5, 8)
    weights = [
        torch.tensor([1e-300, 1.0, 1.0, 1e-12], dtype=torch.float64),
        torch.full((5,), 1e-300, dtype=torch.float64),
    ]
    for oscillation in ("cheap", "exact"):
        found = error_bound(q, k, v, order=2, scale=factor, weights=weights, oscillation=oscillation)
        assert found.isfinite().all() and found.gt(0).all()
        constant = error_bound(q, k, torch.ones_like(v), order=2, scale=factor, weights=weights)
        assert constant.eq(0).all()


def test_the_bound_does_not_depend_on_how_many_queries_there_are() -> None:
    _, k, v = tokens(4, 5, 8)
    query = torch.randn(60_000, 8, dtype=torch.float64)  # their logits are not held all at a time
    whole = error_bound(query, k, v, order=2, oscillation="exact")
    parts = [error_bound(part, k, v, order=2, oscillation="exact") for part in query.split(17_000)]
    assert torch.allclose(torch.cat(parts), whole, rtol=1e-12)


def test_the_bound_takes_any_positions_and_keeps_no_graph() -> None:
    _, k, v = (each.requires_grad_() for each in tokens(2, 4, 5, 8))
    for positions in ((7,), (3, 3, 2), (), (0,)):
        query = torch.randn(2, *positions, 8, dtype=torch.float64, requires_grad=True)
        for oscillation in ("cheap", "exact"):
            found = error_bound(query, k, v, order=2, oscillation=oscillation)
            assert found.shape == (2, *positions) and not found.requires_grad
    assert error_bound(torch.randn(8).double(), k[0], v[0], order=2).shape == ()
    assert error_bound(k, k, v[..., :0], order=2).eq(0).all()  # values without channels


def test_messages_of_the_bound() -> None:
    q, k, v = tokens(2, 4, 5, 8)
    with pytest.raises(OptionError) as caught:
        error_bound(q, k, v, order=2, oscillation="tight")
    assert str(caught.value).splitlines()[0] == "error_bound: oscillation must be 'cheap' or 'exact', got 'tight'."
    with pytest.raises(ShapeError, match=r"^error_bound: mode 1 has size 5 in key but 4 in value\."):
        error_bound(q, k, v[:, :, :4], order=2)
    for weights, rule in (
        ([torch.ones(3), None], "weights of mode 0 have length 3, but the mode has size 4."),
        ([None], "weights has 1 entries, but order 2 needs 2 vectors, one a mode."),
    ):
        with pytest.raises(WeightsError, match=f"^{re.escape('error_bound: ' + rule)}"):
            error_bound(q, k, v, order=2, weights=weights)


# ---- where an adversary looks for a violation ----------------------------------------------------------------


def written_out(query, key, value, logs):
    """Errors of additive attention and their bounds, from the definitions, with gradients; the diameter is exact.

    Queries ``(L, D)``, keys ``(n_1, …, n_N, D)`` and values; logarithms of weights, one vector a mode.
    """
    order = len(logs)
    view = [[-1 if m == mode else 1 for m in range(order)] for mode in range(order)]
    shares = [log.softmax(-1) for log in logs]
    modes = tuple(range(1, order + 1))
    log_share = sum(share.log().reshape(where) for share, where in zip(shares, view, strict=True))
    share = log_share.exp()
    residual = value - additive(value, shares)
    tilt = torch.einsum("ld,...d->l...", query, key - additive(key, shares))
    tilted = torch.einsum("ld,...d->l...", query, key) + log_share
    full = tilted.flatten(1).softmax(-1) @ value.flatten(0, -2)
    straight = (torch.einsum("ld,...d->l...", query, additive(key, shares)) + log_share).flatten(1).softmax(-1)
    error = (full - straight @ (value - residual).flatten(0, -2)).norm(dim=-1)

    density = straight.reshape(tilt.shape) / share
    chi = [
        ((density * share).sum([m for m in modes if m != mode + 1]) ** 2 / shares[mode]).sum(-1) - 1
        for mode in range(order)
    ]
    interaction = functools.reduce(torch.mul, (1 + x for x in chi)) - 1 - sum(chi)
    covariance = torch.einsum("...a,...b,...->ab", residual, residual, share)
    deviation = torch.linalg.matrix_norm(covariance, 2).sqrt()
    remainder = torch.minimum(residual.norm(dim=-1).max(), deviation * interaction.clamp(min=1e-30).sqrt())
    points = value.flatten(0, -2)
    diameter = (points[:, None] - points[None]).square().sum(-1).clamp(min=1e-30).sqrt().max()
    return error, diameter * ((tilt.amax(modes) - tilt.amin(modes)) / 4).tanh() + remainder


def ascend(sizes, dim, value_dim, seed, steps):
    """Tensors for which the error is as large a part of its bound as a few steps uphill make it."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, dim), (*sizes, dim), (*sizes, value_dim), *((size,) for size in sizes)]
    leaves = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    climber = torch.optim.Adam(leaves, lr=0.1, maximize=True)
    for _ in range(steps):
        climber.zero_grad()
        error, limit = written_out(*leaves[:3], leaves[3:])
        (error / limit).log().sum().backward()
        climber.step()
    return [leaf.detach() for leaf in leaves]


def look_for_a_violation(sizes, dim, value_dim, bound_of=error_bound, steps=25):
    """Queries, keys, values and weights move uphill along the gradient of the ratio of error and bound."""
    climbed = []
    for seed in range(2):
        ratios = []
        for query, key, value, *logs in (ascend(sizes, dim, value_dim, seed, many) for many in (0, steps)):
            given = {"order": len(sizes), "scale": 1.0, "weights": [log.exp() for log in logs]}
            error, limit = written_out(query, key, value, logs)
            bound = bound_of(query, key, value, oscillation="exact", **given)
            full, added = (f(query, key, value, **given) for f in (ta.flattened_attention, ta.additive_attention))
            assert torch.allclose((full - added).norm(dim=-1), error, rtol=1e-9, atol=1e-13)
            assert (error <= limit * (1 + SLACK)).all() and (limit <= bound * (1 + SLACK)).all()
            if value_dim == 1:  # a range is known exactly
                assert torch.allclose(limit, bound, rtol=1e-9)
            ratios.append((error / limit).min())
        climbed.append(ratios[1] / ratios[0])
    assert max(climbed) > 1.1  # it did look


@pytest.mark.parametrize(
    "case",
    [
        ((2, 2), 1, 1),
        pytest.param(((2, 2), 2, 2), marks=pytest.mark.thorough),
        pytest.param(((3, 2), 2, 1), marks=pytest.mark.thorough),
        pytest.param(((2, 2, 2), 2, 2), marks=pytest.mark.thorough),
        pytest.param(((4, 3), 3, 2), marks=pytest.mark.thorough),
        pytest.param(((2, 2, 1, 2), 1, 1), marks=pytest.mark.thorough),
    ],
    ids=str,
)
def test_the_error_bound_is_not_violated_where_an_adversary_looks_for_a_violation(case) -> None:
    look_for_a_violation(*case)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "mistake",
    [
        {"bound_of": lambda *tensors, **given: error_bound(*tensors, **{**given, "weights": None})},
        {"bound_of": lambda *tensors, **given: 0.999 * error_bound(*tensors, **given)},
        {"bound_of": lambda *tensors, **given: 1.001 * error_bound(*tensors, **given)},
        {"steps": 0},
    ],
    ids=["weights left out", "0.1 % less", "0.1 % more", "does not climb"],
)
def test_the_adversary_notices_a_mistake(mistake) -> None:
    with pytest.raises(AssertionError):
        look_for_a_violation((2, 2), 1, 1, **mistake)


def test_two_opposite_tokens_move_as_fast_as_the_limit() -> None:
    """One mode, keys and values 1 and -1: the output is tanh(s q), whose slope at zero is s = s/4 · 2 · 2."""
    token = torch.tensor([[1.0], [-1.0]]).double()
    query = torch.tensor([[-1e-3], [1e-3]], dtype=torch.float64)
    for operator in (ta.additive_attention, ta.kao_kv):
        change = operator(query, token, token, order=1, scale=0.7).diff(dim=0)
        assert float(change.norm() / (0.7 * 2e-3)) == pytest.approx(1, abs=1e-6)
