"""Fractions are those of their formula, add up, and never mistake rounding or what is absent for an effect."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import tensorattn as ta
from tensorattn.diagnose import AdditiveFraction, additive_fraction
from tensorattn.errors import OptionError, ShapeError, WeightsError


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.3


WEIGHTS = [
    None,
    [torch.tensor([1.0, 0.0, 2.0, 0.5]).double(), None, torch.tensor([3.0, 1.0, 0.0]).double()],
    [None, torch.tensor([[0.0, 1.0], [1.0, 2.0]]).double(), None],  # they differ between samples
]
weighted = pytest.mark.parametrize("weights", WEIGHTS, ids=["equal", "weights", "batched"])


def variances_by_definition(x: torch.Tensor, weights: list[torch.Tensor | None]) -> list[float]:
    """Variance of each of three main effects and of the residual of one tensor, summed over channels."""
    a, b, c = (
        torch.full((n,), 1 / n, dtype=torch.float64) if w is None else w / w.sum()
        for w, n in zip(weights, x.shape, strict=False)
    )
    mean = torch.einsum("ijkd,i,j,k->d", x, a, b, c)
    effects = [torch.einsum("ijkd,j,k->id", x, b, c), torch.einsum("ijkd,i,k->jd", x, a, c)]
    first, second, third = (e - mean for e in (*effects, torch.einsum("ijkd,i,j->kd", x, a, b)))
    residual = x - mean - first[:, None, None] - second[None, :, None] - third[None, None]
    parts = [share @ effect.square().sum(-1) for share, effect in ((a, first), (b, second), (c, third))]
    return [*map(float, parts), float(torch.einsum("ijkd,i,j,k->", residual.square(), a, b, c))]


@weighted
def test_fractions_are_their_formula_and_add_up(weights: Any) -> None:
    x = draw(2, 4, 2, 3, 5)
    found = additive_fraction(x, order=3, weights=weights)
    assert found.modes.shape == (2, 3) and found.interaction.shape == found.variance.shape == (2,)
    assert torch.allclose(found.modes.sum(-1) + found.interaction, torch.ones(2).double(), atol=1e-14)
    assert torch.allclose(found.additive, found.modes.sum(-1), atol=1e-14)
    for b in range(2):
        own = [None if w is None else w[b] if w.dim() > 1 else w for w in weights or [None] * 3]
        parts = variances_by_definition(x[b], own)
        assert float(found.variance[b]) == pytest.approx(sum(parts))
        shares = [part / sum(parts) for part in parts]
        assert [*found.modes[b].tolist(), float(found.interaction[b])] == pytest.approx(shares)


@weighted
@pytest.mark.parametrize("dim", [2, 30])  # fewer and more channels than positions
def test_fractions_of_logits_are_those_of_the_logits_written_out(weights: Any, dim: int) -> None:
    keys, query = draw(2, 4, 2, 3, dim), draw(2, 7, 5, dim, seed=1)
    found = additive_fraction(keys, order=3, weights=weights, query=query, scale=0.3)
    assert found.modes.shape == (2, 7, 5, 3) and found.interaction.shape == found.variance.shape == (2, 7, 5)
    logits = 0.3 * torch.einsum("bxyd,bijkd->bxyijk", query, keys).unsqueeze(-1)
    for x, y in ((0, 0), (6, 4)):
        expected = additive_fraction(logits[:, x, y], order=3, weights=weights)
        for name in ("modes", "interaction", "variance"):
            assert torch.allclose(getattr(found, name)[:, x, y], getattr(expected, name), rtol=1e-10, atol=1e-14)


def test_weights_count_as_repetition() -> None:
    x, repeats = draw(2, 4, 5, 3), torch.tensor([1, 2, 0, 3])
    weighed = additive_fraction(x, order=2, weights=[repeats, None])
    repeated = additive_fraction(x.repeat_interleave(repeats, dim=1), order=2)
    assert torch.allclose(weighed.modes, repeated.modes) and torch.allclose(weighed.variance, repeated.variance)


def test_the_scale_changes_the_variance_of_logits_alone() -> None:
    q, k = draw(2, 4, 5, 16), draw(2, 4, 5, 16, seed=1)
    plain, far = (additive_fraction(k, order=2, query=q, scale=scale) for scale in (None, 2.5))
    assert torch.allclose(plain.modes, far.modes) and torch.allclose(plain.interaction, far.interaction)
    assert torch.allclose(plain.variance * 100, far.variance)


def test_pooled_fractions_are_weighted_by_variance() -> None:
    x = draw(3, 4, 5, 6) * torch.tensor([0.1, 1.0, 3.0]).reshape(3, 1, 1, 1)
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
    query = draw(2, 4, 3).to(dtype)
    weights = [torch.tensor([1.0, 0.0] + [1.0] * 5), None]
    varied = x.clone()
    varied[:, 1] = torch.arange(5, dtype=dtype)[:, None]  # where no position counts
    few = [torch.tensor([[0.0] * 3, [0.0] * 2 + [1.0]]), None]  # no position in one sample, one index in the other
    for found in (
        additive_fraction(x, order=2),
        additive_fraction(x, order=2, query=query),
        additive_fraction(varied, order=2, weights=weights),
        additive_fraction(varied, order=2, query=query, weights=weights),
        additive_fraction(draw(2, 3, 4, 5), order=2, weights=few, query=torch.zeros(2, 6, 5).double()),
        additive_fraction(x[:, :1, :1], order=2),  # one position
    ):
        for part in (found.modes, found.interaction, found.variance, found.pooled().modes, found.pooled().variance):
            assert part.eq(0).all()
        assert found.additive.eq(1).all()


def test_logits_that_vary_by_rounding_are_constant() -> None:
    """Keys vary along one direction, the query is orthogonal to it."""
    direction, query = draw(2, 16)
    query -= (query @ direction) / (direction @ direction) * direction
    keys = draw(4, 5, 1, seed=1) * direction
    blind = additive_fraction(keys, order=2, query=query)
    assert blind.modes.eq(0).all() and blind.interaction.eq(0) and blind.variance.eq(0)
    seeing = additive_fraction(keys, order=2, query=query + 1e-6 * direction)
    assert torch.allclose(seeing.interaction, additive_fraction(keys, order=2).interaction)


def test_a_large_mean_hides_no_effect() -> None:
    x = (draw(6, 1, 4) * 1024).round() / 1024 + (draw(1, 5, 4, seed=1) * 1024).round() / 1024
    plain, far = additive_fraction(x, order=2), additive_fraction(x + 2.0**40, order=2)  # additive to the last bit
    assert torch.allclose(plain.modes, far.modes, rtol=1e-9) and far.interaction < 1e-20


def test_size_one_modes_have_no_share_and_one_mode_has_no_interaction() -> None:
    x = draw(4, 1, 5, 3)
    assert float(additive_fraction(x, order=3).modes[1]) < 1e-30
    assert additive_fraction(x, order=1).interaction.eq(0).all()
    assert torch.allclose(additive_fraction(x, order=1).modes, torch.ones(4, 1, 1).double())


def test_a_nan_shows_where_it_takes_part_and_nowhere_else() -> None:
    x, query = draw(2, 4, 5, 3), draw(2, 6, 3, seed=1)
    broken, weights = x.clone(), [torch.tensor([1.0, 0.0, 1.0, 1.0]), None]
    broken[0, 1, 2, 0] = math.nan
    for given in ({}, {"query": query}):
        found, plain = (additive_fraction(t, order=2, **given) for t in (broken, x))
        assert found.modes[0].isnan().all() and found.interaction[0].isnan().all()
        assert torch.equal(found.modes[1], plain.modes[1])
        found, plain = (additive_fraction(t, order=2, weights=weights, **given) for t in (broken, x))
        assert torch.equal(found.modes, plain.modes) and torch.equal(found.variance, plain.variance)


def test_fractions_print_what_is_pooled() -> None:
    shares = AdditiveFraction(
        torch.tensor([[0.25, 0.5], [0.0, 0.0]]), torch.tensor([0.25, 0.0]), torch.tensor([8.0, 0.0])
    )
    assert str(shares) == "mode 0: 0.250, mode 1: 0.500, interaction: 0.250"


READING = """
  modes    0 1
  tensor   (2, 4, 5, 8)   batch=(2,) 0=4 1=5 D=8
  query    (2, 4, 5, 7)   batch=(2,) positions=(4, 5) D=7"""


def test_messages() -> None:
    q, k = draw(2, 4, 5, 8), draw(2, 4, 5, 8)
    with pytest.raises(ShapeError) as caught:
        additive_fraction(k, order=2, query=q[..., :7])
    assert str(caught.value) == "additive_fraction: head size is 7 in query but 8 in tensor." + READING
    with pytest.raises(OptionError, match=r"^additive_fraction: scale is a factor of logits, but there is no query\."):
        additive_fraction(k, order=2, scale=0.5)
    with pytest.raises(ShapeError, match=r"^additive_fraction: batch dimensions are \(1,\) in query but \(2,\) in ten"):
        additive_fraction(k, order=2, query=q[:1])
    with pytest.raises(ShapeError, match=r"^additive_fraction: query has 1 dimensions, but needs at least 2\."):
        additive_fraction(k, order=2, query=q[0, 0, 0])
    with pytest.raises(ShapeError, match=r"^additive_fraction: tensor has 4 dimensions, but order 4 needs at least 5"):
        additive_fraction(k, order=4)
    with pytest.raises(WeightsError, match=r"^additive_fraction: weights of mode 1 are all zero, so no index takes"):
        additive_fraction(k, order=2, weights=[None, torch.zeros(5)])


def test_the_residual_that_is_measured_is_the_one_that_is_published() -> None:
    x = draw(2, 4, 5, 3)
    residual = ta.interaction_residual(x, order=2).square().sum(-1).mean((1, 2))
    found = additive_fraction(x, order=2)
    assert torch.allclose(found.interaction * found.variance, residual)
