"""The tensor-normal law and the laws of its averages against dense Kronecker algebra, orders 0 to 4."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.distributions import MultivariateNormal

from tensorattn.diagnose.tensor_normal import (
    TensorNormal,
    additive_mean_law,
    gls_weights,
    marginal_cross_covariance,
    marginal_mean_law,
)
from tensorattn.errors import OptionError

EXACT = 1e-12  # relative to the largest entry, float64


class Case(NamedTuple):
    """A law, and the numbers it was made from."""

    law: TensorNormal
    loc: torch.Tensor
    factors: list[torch.Tensor]  # with the channels last, if any
    order: int
    generator: torch.Generator


def gaussian(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def make_factor(kind, batch, size, generator):
    """A covariance of a given kind; all but the first are singular from size 2 on."""
    if kind == "definite":
        root = gaussian(generator, *batch, size, size)
        return root @ root.mT / size + 0.5 * torch.eye(size, dtype=torch.float64)
    if kind == "ones":
        return torch.rand(*batch, 1, 1, generator=generator, dtype=torch.float64).expand(*batch, size, size) + 0.1
    root = gaussian(generator, *batch, size, {"rank 1": 1, "rank 2": 2, "zero": 0}[kind])
    return root @ root.mT


@st.composite
def cases(draw, kinds=("definite", "rank 1", "rank 2", "ones", "zero"), least_order=0):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    order = draw(st.integers(least_order, 4))
    sizes = draw(st.lists(st.integers(1, 4), min_size=order, max_size=order))
    channels = draw(st.lists(st.integers(1, 3), min_size=order == 0, max_size=1))
    assume(math.prod([*sizes, *channels]) <= 144)
    batch = draw(st.sampled_from([(), (1,), (2,), (2, 3)]))
    batches = st.sampled_from([batch, batch[1:], (1,) * len(batch)])
    factors = [
        make_factor(draw(st.sampled_from(kinds)), draw(batches), size, generator) for size in [*sizes, *channels]
    ]
    loc = gaussian(generator, *draw(batches), *sizes, *channels)
    modes, channel = factors[:order], factors[order] if channels else None
    if kinds == ("definite",) and draw(st.booleans()):
        roots = [torch.linalg.cholesky(factor) for factor in factors]
        channel_root = roots[order] if channels else None
        law = TensorNormal(loc, mode_scale_trils=roots[:order], channel_scale_tril=channel_root)
    else:
        law = TensorNormal(loc, modes, channel)
    return Case(law, loc, factors, order, generator)


definite = functools.partial(cases, kinds=("definite",))


def dense(matrices, batch):
    """Multiply a Kronecker product out by NumPy, one batch element at a time."""
    spread = [m.expand(*batch, *m.shape[-2:]).reshape(-1, *m.shape[-2:]).numpy() for m in matrices]
    products = [functools.reduce(np.kron, element) for element in zip(*spread, strict=True)]
    return torch.from_numpy(np.stack(products)).reshape(*batch, *products[0].shape)


def flat_loc(case):
    """The mean of a case as a vector, with every batch dimension."""
    return case.loc.expand(case.law.batch_shape + case.law.event_shape).flatten(-len(case.law.event_shape))


def assert_close(found, expected, tolerance=EXACT):
    assert found.shape == expected.shape
    scale = max(1.0, float(expected.abs().max()))
    assert float((found - expected).abs().max()) <= tolerance * scale


@given(cases())
def test_covariance_and_variance_are_the_dense_kronecker_product(case):
    expected = dense(case.factors, case.law.batch_shape)
    assert_close(case.law.covariance_matrix, expected)
    event_dims = len(case.law.event_shape)
    assert_close(case.law.variance.flatten(-event_dims), expected.diagonal(dim1=-2, dim2=-1))
    assert_close(case.law.mean.flatten(-event_dims), flat_loc(case))


@given(cases())
def test_the_linear_map_of_rsample_is_a_root_of_the_covariance(case):
    """Basis vectors for noise: sample r is then loc plus column r of R, and R Rᵀ is the covariance."""
    law, shapes = case.law, []

    def basis(shape, **options):
        shapes.append(tuple(shape))
        ranks = shape[1 + len(law.batch_shape) :]
        count = math.prod(ranks)
        columns = torch.eye(count, **options).reshape(count, *[1] * len(law.batch_shape), *ranks)
        return columns.expand(count, *law.batch_shape, *ranks)

    with mock.patch("torch.randn", basis):
        samples = law.rsample((1,))
    assert len(shapes) == 1
    columns = (samples - law.loc).flatten(-len(law.event_shape))  # (rank, *batch, P)
    root = columns.movedim(0, -1)
    assert root.shape[-1] <= root.shape[-2]  # never more noise than entries
    assert_close(root @ root.mT, dense(case.factors, law.batch_shape))


@given(definite())
def test_density_and_entropy_are_those_of_the_dense_normal(case):
    law = case.law
    oracle = MultivariateNormal(flat_loc(case), dense(case.factors, law.batch_shape))
    value = gaussian(case.generator, 5, *law.batch_shape, *law.event_shape)
    assert_close(law.log_prob(value), oracle.log_prob(value.flatten(-len(law.event_shape))), 1e-11)
    assert_close(law.entropy(), oracle.entropy(), 1e-11)


@given(definite())
def test_a_value_without_batch_dimensions_meets_every_law_of_the_batch(case):
    law = case.law
    value = gaussian(case.generator, *law.event_shape)
    assert_close(law.log_prob(value), law.log_prob(value.expand(law.batch_shape + law.event_shape)))


@given(definite())
def test_expanding_repeats_the_law(case):
    law = case.law
    wide = law.expand((2, *law.batch_shape))
    value = gaussian(case.generator, *wide.batch_shape, *wide.event_shape)
    assert wide.batch_shape == (2, *law.batch_shape)
    assert wide.event_shape == law.event_shape
    assert wide.sample((3,)).shape == (3, *wide.batch_shape, *wide.event_shape)
    assert_close(wide.log_prob(value), law.log_prob(value))  # two samples of the one are a batch of the other
    assert_close(wide.entropy(), law.entropy().expand(wide.batch_shape))
    assert_close(wide.covariance_matrix, law.covariance_matrix.expand(*wide.batch_shape, -1, -1))


@given(cases(kinds=("rank 1", "ones", "zero"), least_order=1))
def test_singular_factors_are_sampled_but_have_no_density(case):
    assume(any(factor.shape[-1] > 1 or bool((factor == 0).any()) for factor in case.factors))
    sample = case.law.rsample()
    assert bool(sample.isfinite().all())
    with pytest.raises(OptionError, match="is singular: its eigenvalues run from"):
        case.law.log_prob(sample)
    with pytest.raises(OptionError, match="is singular: its eigenvalues run from"):
        case.law.entropy()


@given(st.integers(2, 4), st.data())
def test_with_all_ones_factors_in_all_modes_but_one_samples_are_additive(order, data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=order, max_size=order))
    free = data.draw(st.integers(0, order - 1))
    effects = [gaussian(generator, size, 2) for size in sizes]
    loc = sum(e.reshape(*[1] * m, -1, *[1] * (order - 1 - m), 2) for m, e in enumerate(effects))
    kinds = ["definite" if mode == free else "ones" for mode in range(order)]
    factors = [make_factor(kind, (), size, generator) for kind, size in zip(kinds, sizes, strict=True)]
    sample = TensorNormal(loc, factors, make_factor("definite", (), 2, generator)).sample((3,))
    modes = set(range(1, order + 1))
    averages = [sample.mean(dim=tuple(modes - {mode}), keepdim=True) for mode in sorted(modes)]
    grand = sample.mean(dim=tuple(modes), keepdim=True)
    residual = sample - (sum(averages) - (order - 1) * grand)
    assert float(residual.abs().max()) <= 1e-14 * (1 + float(sample.abs().max()))


def draw_weights(data, case):
    """One vector a mode or None, some with negative entries, some with batch dimensions."""
    weights = []
    for size in case.law.event_shape[: case.order]:
        kind = data.draw(st.sampled_from(["equal", "positive", "signed", "batch"]))
        batch = case.law.batch_shape if kind == "batch" else ()
        vector = torch.rand(*batch, size, generator=case.generator, dtype=torch.float64) + 0.1
        if kind == "signed":
            vector[0] = -0.05
            vector = vector if size > 1 else -vector
        weights.append(None if kind == "equal" else vector)
    return weights


def averaging(case, kept, weights):
    """The dense matrix that maps a flattened tensor to the flattened marginal mean."""
    matrices = []
    for mode, size in enumerate(case.law.event_shape):
        if mode in kept or mode == case.order:
            matrices.append(torch.eye(size, dtype=torch.float64))
        else:
            vector = weights[mode]
            vector = torch.full((size,), 1 / size, dtype=torch.float64) if vector is None else vector
            matrices.append((vector / vector.sum(-1, keepdim=True)).unsqueeze(-2))
    return dense(matrices, case.law.batch_shape)


subsets = st.sets(st.integers(0, 3))


@given(cases(), subsets, st.data())
def test_the_law_of_a_marginal_mean_is_that_of_a_linear_map(case, subset, data):
    kept = [mode for mode in subset if mode < case.order]
    weights = draw_weights(data, case)
    law = marginal_mean_law(case.law, data.draw(st.permutations(kept)), weights=weights)
    linear = averaging(case, kept, weights)
    sizes = [size for mode, size in enumerate(case.law.event_shape) if mode in kept or mode == case.order]
    assert law.event_shape == (*sizes,) if sizes else (1,)
    assert_close(law.covariance_matrix, linear @ dense(case.factors, case.law.batch_shape) @ linear.mT)
    assert_close(law.mean.flatten(-len(law.event_shape)), (linear @ flat_loc(case)[..., None])[..., 0])


@given(cases(), subsets, subsets, st.data())
def test_the_cross_covariance_of_marginal_means_is_that_of_two_linear_maps(case, subset_a, subset_b, data):
    kept_a, kept_b = ([mode for mode in subset if mode < case.order] for subset in (subset_a, subset_b))
    weights = draw_weights(data, case)
    found = marginal_cross_covariance(case.law, kept_a, kept_b, weights=weights).to_dense()
    left, right = averaging(case, kept_a, weights), averaging(case, kept_b, weights)
    expected = left @ dense(case.factors, case.law.batch_shape) @ right.mT
    assert_close(found.expand(expected.shape), expected)


@given(cases(least_order=1), subsets, st.data())
def test_the_mean_of_an_average_of_an_additive_mean(case, subset, data):
    kept = [mode for mode in subset if mode < case.order]
    weights = draw_weights(data, case)
    sizes, order = case.law.event_shape[: case.order], case.order
    effects = [gaussian(case.generator, *case.law.batch_shape, size, 2) for size in sizes]
    loc = sum(
        e.reshape(*case.law.batch_shape, *[1] * m, sizes[m], *[1] * (order - 1 - m), 2) for m, e in enumerate(effects)
    )
    law = TensorNormal(loc, [torch.eye(size, dtype=torch.float64) for size in sizes], torch.eye(2, dtype=torch.float64))
    assert_close(additive_mean_law(effects, kept, weights=weights), marginal_mean_law(law, kept, weights=weights).mean)


@given(definite(least_order=1))
def test_gls_weighted_averages_project_orthogonally_in_the_inverse_covariance(case):
    """The map Σ_m I ⊗ P_{-m} − (N−1) ⊗ P_m fixes additive tensors, is idempotent, and Π Σ is symmetric."""
    modes, batch = case.factors[: case.order], case.law.batch_shape
    weights = [gls_weights(factor) for factor in modes]
    for factor, vector in zip(modes, weights, strict=True):
        assert_close(vector.sum(-1), torch.ones_like(vector[..., 0]))
        variances = (factor @ vector[..., None])[..., 0]  # Σ w is constant exactly at the least variance
        assert_close(variances, variances[..., :1].expand_as(variances))
    identities = [torch.eye(factor.shape[-1], dtype=torch.float64) for factor in modes]
    means = [vector.unsqueeze(-2).expand_as(factor) for factor, vector in zip(modes, weights, strict=True)]
    projector = -(case.order - 1) * dense(means, batch)
    for mode in range(case.order):
        projector = projector + dense([*means[:mode], identities[mode], *means[mode + 1 :]], batch)
    covariance = dense(modes, batch)
    assert_close(projector @ projector, projector, 1e-10)
    assert_close(projector @ covariance, (projector @ covariance).mT, 1e-10)


@given(definite())
def test_single_precision_agrees_with_double(case):
    law, count = case.law, case.law.event_shape.numel()
    single = TensorNormal(
        law.loc.float(),
        [c.float() for c in law.mode_covariances],
        None if law.channel_covariance is None else law.channel_covariance.float(),
    )
    value = gaussian(case.generator, *law.event_shape)
    found = single.log_prob(value.float())
    assert found.dtype == single.sample().dtype == torch.float32
    expected = law.log_prob(value)
    assert bool(((found - expected).abs() <= 1e-4 * (count + expected.abs())).all())
