"""The tensor-normal law as a torch.distributions user meets it: neighbours, singular factors, gradients, averages."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import scipy.stats
import torch
from torch.distributions import AffineTransform, Distribution, MultivariateNormal, TransformedDistribution

from tensorattn.diagnose import (
    TensorNormal,
    additive_mean_law,
    gls_weights,
    marginal_cross_covariance,
    marginal_mean_law,
)
from tensorattn.errors import DtypeError, ModesError, OptionError, ShapeError, TensorAttentionError, WeightsError

ROWS = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
COLUMNS = torch.tensor([[1.0, 0.2, -0.3], [0.2, 2.0, 0.4], [-0.3, 0.4, 1.5]], dtype=torch.float64)
CHANNELS = torch.tensor([[0.7, 0.1], [0.1, 0.3]], dtype=torch.float64)
SINGULAR = torch.diag(torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64))
ONES = torch.ones(3, 3, dtype=torch.float64)


def eye(size):
    return torch.eye(size, dtype=torch.float64)


def zeros(*shape):
    return torch.zeros(*shape, dtype=torch.float64)


@pytest.fixture(autouse=True)
def validating():
    """Values are checked by default, whatever other tests left behind: torch.compile turns that off."""
    Distribution.set_default_validate_args(True)


@pytest.fixture
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture
def law(seeded):
    return TensorNormal(torch.randn(4, 2, 3, 2, dtype=torch.float64), [ROWS, COLUMNS], CHANNELS)


class TestNeighbours:
    def test_order_one_without_channels_is_the_multivariate_normal(self, seeded):
        loc = torch.randn(5, 3, dtype=torch.float64)
        ours, theirs = TensorNormal(loc, [COLUMNS]), MultivariateNormal(loc, COLUMNS)
        assert (ours.batch_shape, ours.event_shape) == (theirs.batch_shape, theirs.event_shape)
        torch.manual_seed(1)
        sample = ours.sample((7,))
        torch.manual_seed(1)
        torch.testing.assert_close(sample, theirs.sample((7,)), rtol=1e-14, atol=1e-14)  # the same noise, even
        for name in ("mean", "mode", "variance", "stddev", "covariance_matrix"):
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-13, atol=1e-14)
        torch.testing.assert_close(ours.mode_scale_trils[0], theirs.scale_tril, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(ours.log_prob(sample), theirs.log_prob(sample), rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(ours.entropy(), theirs.entropy(), rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(ours.perplexity(), theirs.perplexity(), rtol=1e-13, atol=1e-13)

    def test_order_two_without_channels_is_the_matrix_normal(self, seeded):
        loc, value = torch.randn(2, 2, 3, dtype=torch.float64)
        ours = TensorNormal(loc, [ROWS, COLUMNS])
        theirs = scipy.stats.matrix_normal(loc.numpy(), rowcov=ROWS.numpy(), colcov=COLUMNS.numpy())
        np.testing.assert_allclose(ours.log_prob(value).item(), theirs.logpdf(value.numpy()), rtol=1e-13)
        np.testing.assert_allclose(ours.entropy().item(), theirs.entropy(), rtol=1e-13)

    def test_the_channels_are_the_last_factor(self):
        law = TensorNormal(zeros(2, 3, 2), [ROWS, COLUMNS], CHANNELS)
        expected = torch.kron(torch.kron(ROWS, COLUMNS), CHANNELS)
        torch.testing.assert_close(law.covariance_matrix, expected, rtol=1e-15, atol=0)

    def test_without_modes_the_law_is_that_of_the_channels(self):
        law = TensorNormal(zeros(5, 2), [], CHANNELS)
        assert (law.order, law.batch_shape, law.event_shape) == (0, (5,), (2,))
        torch.testing.assert_close(law.entropy()[0], MultivariateNormal(zeros(2), CHANNELS).entropy())

    def test_covariances_and_cholesky_factors_make_the_same_law(self, law):
        roots = [torch.linalg.cholesky(c) for c in (ROWS, COLUMNS, CHANNELS)]
        rooted = TensorNormal(law.loc, mode_scale_trils=roots[:2], channel_scale_tril=roots[2])
        value = law.sample()
        torch.testing.assert_close(rooted.log_prob(value), law.log_prob(value))
        torch.testing.assert_close(rooted.covariance_matrix, law.covariance_matrix)
        torch.testing.assert_close(rooted.channel_scale_tril, law.channel_scale_tril)

    def test_it_transforms(self, law):
        scaled = TransformedDistribution(law, AffineTransform(0.0, 2.0, event_dim=3))
        value = law.sample()
        expected = law.log_prob(value) - 12 * np.log(2)
        torch.testing.assert_close(scaled.log_prob(2 * value), expected)

    def test_one_slow_look_at_samples(self):
        """100,000 draws; the largest of 90 standardised moments stays below 5 (false alarm 5e-5)."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(20240607)
            law = TensorNormal(torch.arange(12.0, dtype=torch.float64).view(2, 3, 2), [ROWS, COLUMNS], CHANNELS)
            count = 100_000
            draws = law.sample((count,)).flatten(1)
        exact = law.covariance_matrix
        scale = exact.diagonal().sqrt()
        mean_z = (draws.mean(0) - law.mean.flatten()) / scale * count**0.5
        noise = (exact.square() + torch.outer(exact.diagonal(), exact.diagonal())).sqrt()
        covariance_z = (torch.cov(draws.T) - exact) / noise * count**0.5
        assert float(mean_z.abs().max()) < 5
        assert float(covariance_z.abs().max()) < 5


class TestSingularFactors:
    @pytest.mark.parametrize("scale", [1.0, 0.3, 1e-8, 7e11])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_along_a_mode_of_all_ones_samples_are_constant_to_the_bit(self, scale, dtype, seeded):
        law = TensorNormal(zeros(2, 3, 2).to(dtype), [ROWS.to(dtype), scale * ONES.to(dtype)], CHANNELS.to(dtype))
        sample = law.sample((50,))
        assert torch.equal(sample, sample[:, :, :1].expand_as(sample))
        assert float(sample.var()) > 0

    def test_a_mixed_batch_is_rooted_element_by_element(self, seeded):
        v = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64)
        law = TensorNormal(zeros(4, 3), [torch.stack([0.7 * ONES, COLUMNS, 0 * ONES, 1e12 * torch.outer(v, v)])])
        samples = law.sample((20,))
        assert torch.equal(samples[:, 0], samples[:, 0, :1].expand(20, 3))
        assert torch.equal(samples[:, 2], zeros(20, 3))
        assert bool((samples[:, 1].std(0) > 0.1).all())
        torch.testing.assert_close(samples[:, 3] / v, samples[:, 3, :1] / v[0].expand(20, 3), rtol=1e-14, atol=0)

    def test_badly_scaled_is_not_singular(self):
        law = TensorNormal(zeros(2), [torch.diag(torch.tensor([1.0, 1e-30], dtype=torch.float64))])
        torch.testing.assert_close(law.log_prob(zeros(2)).exp(), torch.tensor(1e15 / (2 * np.pi), dtype=torch.float64))

    def test_strongly_correlated_is_not_singular(self):
        correlated = torch.tensor([[1.0, 1 - 1e-9], [1 - 1e-9, 1.0]], dtype=torch.float64)
        law, oracle = TensorNormal(zeros(2), [correlated]), MultivariateNormal(zeros(2), correlated)
        torch.testing.assert_close(law.log_prob(zeros(2)), oracle.log_prob(zeros(2)))

    def test_a_singular_cholesky_factor(self, seeded):
        root = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
        law = TensorNormal(zeros(2), mode_scale_trils=[root])
        sample = law.sample()
        assert sample[0] == sample[1]
        assert torch.equal(law.mode_scale_trils[0], root)
        with pytest.raises(OptionError, match=r"entropy: mode_scale_trils\[0\] is singular"):
            law.entropy()

    def test_gradients_reach_a_factor_of_rank_one(self, seeded):
        """With Σ = v vᵀ a sample is v z, so its derivative in v is z."""
        v = torch.tensor([0.5, -2.0, 1.0], dtype=torch.float64, requires_grad=True)
        sample = TensorNormal(zeros(3), [torch.outer(v, v)]).rsample()
        (gradient,) = torch.autograd.grad(sample.sum(), v)
        z = (sample / v).detach()
        torch.testing.assert_close(gradient, z)

    def test_nan_without_validation_is_seen_in_the_samples(self):
        broken = TensorNormal(zeros(3), [ONES * float("nan")], validate_args=False)
        assert bool(broken.sample().isnan().all())


class TestGradients:
    def test_of_the_density_in_value_mean_and_every_factor(self, seeded):
        def density(value, loc, rows, columns, channels):
            return TensorNormal(loc, mode_scale_trils=[rows, columns], channel_scale_tril=channels).log_prob(value)

        roots = [torch.linalg.cholesky(c) for c in (ROWS, COLUMNS, CHANNELS)]
        inputs = [torch.randn(2, 3, 2, dtype=torch.float64), torch.randn(2, 3, 2, dtype=torch.float64), *roots]
        mask = [torch.ones_like(t) if k < 2 else torch.ones_like(t).tril() for k, t in enumerate(inputs)]
        leaves = [t.clone().requires_grad_() for t in inputs]
        assert torch.autograd.gradcheck(
            lambda *args: density(*(a * m for a, m in zip(args, mask, strict=True))), leaves
        )

    def test_of_the_density_and_entropy_in_covariances(self, seeded):
        def both(rows, columns):
            law = TensorNormal(zeros(2, 3), [rows @ rows.mT + eye(2), columns @ columns.mT + eye(3)])
            return law.log_prob(torch.ones(2, 3, dtype=torch.float64)), law.entropy()

        leaves = [torch.randn(n, n, dtype=torch.float64, requires_grad=True) for n in (2, 3)]
        assert torch.autograd.gradcheck(both, leaves)

    def test_of_samples(self, law):
        loc = law.loc.clone().requires_grad_()
        rows = ROWS.clone().requires_grad_()
        sample = TensorNormal(loc, [rows, COLUMNS], CHANNELS).rsample((5,))
        loc_gradient, rows_gradient = torch.autograd.grad(sample.sum(), [loc, rows])
        torch.testing.assert_close(loc_gradient, torch.full_like(loc, 5.0))
        assert float(rows_gradient.abs().min()) > 0
        assert not law.sample().requires_grad


class TestDistribution:
    def test_shapes(self, law):
        assert (law.order, law.batch_shape, law.event_shape) == (2, (4,), (2, 3, 2))
        assert law.has_rsample
        assert law.sample((5, 6)).shape == law.rsample([5, 6]).shape == (5, 6, 4, 2, 3, 2)
        assert law.log_prob(law.sample((5,))).shape == (5, 4)
        assert law.entropy().shape == (4,)
        assert law.variance.shape == law.stddev.shape == (4, 2, 3, 2)
        assert [c.shape for c in law.mode_covariances] == [(4, 2, 2), (4, 3, 3)]
        assert law.channel_covariance.shape == (4, 2, 2)
        assert law.covariance_matrix.shape == (4, 12, 12)
        assert repr(law) == "TensorNormal(batch=(4,), modes=(2, 3), channels=2)"

    def test_batch_shapes_of_mean_and_factors_broadcast(self):
        law = TensorNormal(zeros(5, 1, 2, 3), [ROWS.expand(4, 2, 2), COLUMNS.expand(5, 1, 3, 3)])
        assert law.batch_shape == (5, 4)
        assert law.mean.shape == law.sample().shape == (5, 4, 2, 3)
        assert law.channel_covariance is law.channel_scale_tril is None

    def test_every_argument_satisfies_its_constraint(self, law):
        singular = TensorNormal(zeros(3, 3), [ONES, 0.3 * ONES], validate_args=True)
        rooted = TensorNormal(zeros(2, 3), mode_scale_trils=[ROWS.tril()], channel_scale_tril=SINGULAR)
        names = [{"loc", "mode_covariances", "channel_covariance"}, {"loc", "mode_covariances"}]
        names.append({"loc", "mode_scale_trils", "channel_scale_tril"})
        for distribution, expected in zip((law, singular, rooted), names, strict=True):
            constraints = distribution.arg_constraints
            assert set(constraints) == expected
            assert all(bool(c.check(getattr(distribution, name)).all()) for name, c in constraints.items())
        assert repr(law.arg_constraints["mode_covariances"]) == "Each(PositiveSemidefinite())"
        assert law.support.event_dim == 3
        assert not bool(law.arg_constraints["mode_covariances"].check([ROWS, -COLUMNS]))
        assert not bool(law.arg_constraints["channel_covariance"].check(CHANNELS * float("nan")))

    def test_a_covariance_symmetric_to_rounding_is_made_symmetric(self):
        crooked = COLUMNS + 1e-9 * torch.ones_like(COLUMNS).triu(1)
        law = TensorNormal(zeros(3), [crooked])
        expected = COLUMNS + 5e-10 * (1 - eye(3))
        torch.testing.assert_close(law.covariance_matrix, expected, rtol=0, atol=1e-15)
        root = law.mode_scale_trils[0]
        torch.testing.assert_close(root @ root.mT, expected, rtol=0, atol=1e-15)

    def test_pickle_and_copy(self, law):
        value = law.sample()
        buffer = io.BytesIO(pickle.dumps(law))
        for twin in (pickle.load(buffer), copy.deepcopy(law)):
            assert torch.equal(twin.log_prob(value), law.log_prob(value))
            assert repr(twin) == repr(law)

    def test_a_subclass_expands_to_itself_only_with_its_own_expand(self, law):
        class Other(TensorNormal):
            def __init__(self, loc):
                super().__init__(loc, [ROWS, COLUMNS])

        with pytest.raises(NotImplementedError, match=r"must also define a custom \.expand"):
            Other(zeros(2, 3)).expand((4,))
        with pytest.raises(ShapeError, match=r"^Other: mode 1 has size 2 in loc"):
            Other(zeros(2, 2))

    def test_validation_can_be_turned_off(self):
        assert Distribution._validate_args
        crooked = torch.tensor([[1.0, 0.0], [0.5, 1.0]], dtype=torch.float64)
        unchecked = TensorNormal(zeros(2), [crooked], validate_args=False).expand((3,))
        assert bool(unchecked.log_prob(zeros(2) / 0).isnan().all())
        with pytest.raises(OptionError, match=r"^TensorNormal.log_prob: mode_covariances\[0\] is singular"):
            TensorNormal(zeros(2), [torch.tensor([[1.0, 2.0], [2.0, 1.0]]).double()], validate_args=False).log_prob(
                zeros(2)
            )
        Distribution.set_default_validate_args(False)
        try:
            TensorNormal(zeros(2), [crooked])
        finally:
            Distribution.set_default_validate_args(True)
        with pytest.raises(OptionError):
            TensorNormal(zeros(2), [crooked])

    def test_nothing_of_the_size_of_the_covariance_is_needed(self):
        law = TensorNormal(torch.zeros(40, 50, 60, 8), [torch.eye(40), torch.ones(50, 50), torch.eye(60)], torch.eye(8))
        assert law.sample().shape == (40, 50, 60, 8)
        assert law.variance.shape == (40, 50, 60, 8)
        with pytest.raises(ShapeError) as error:
            _ = law.covariance_matrix
        assert str(error.value) == (
            "TensorNormal.covariance_matrix: the dense matrix would be 960000 by 960000, in all 921600000000 entries, "
            "more than the 16777216 that are allowed.\n  Its factors are small: work with those."
        )


class TestAverages:
    def test_multiplicities_are_normalised(self, law):
        """Weight 2 counts an index twice, whatever the type it is given in."""
        counted = marginal_mean_law(law, (0,), weights=[None, torch.tensor([2, 0, 1])])
        expected = (2 * law.mean[:, :, 0] + law.mean[:, :, 2]) / 3
        torch.testing.assert_close(counted.mean, expected)

    def test_the_mode_average_of_order_two_in_closed_form(self, law):
        rows = marginal_mean_law(law, (0,))
        torch.testing.assert_close(rows.mode_covariances[0][0], ROWS * COLUMNS.sum() / 9)
        torch.testing.assert_close(rows.channel_covariance[0], CHANNELS)
        both = marginal_cross_covariance(law, (0,), (1,))
        torch.testing.assert_close(both.mode_factors[0], ROWS.mean(1, keepdim=True))
        torch.testing.assert_close(both.mode_factors[1], COLUMNS.mean(0, keepdim=True))

    def test_the_grand_mean(self, law):
        grand = marginal_mean_law(law, ())
        assert (grand.order, grand.event_shape) == (0, (2,))
        torch.testing.assert_close(grand.channel_covariance[0], CHANNELS * ROWS.mean() * COLUMNS.mean())
        bare = marginal_mean_law(TensorNormal(zeros(2, 3), [ROWS, COLUMNS]), ())
        assert (bare.order, bare.event_shape) == (1, (1,))
        torch.testing.assert_close(bare.variance[0], ROWS.mean() * COLUMNS.mean())

    def test_all_modes_kept_is_the_law_itself(self, law):
        same = marginal_mean_law(law, (1, 0))
        assert torch.equal(same.mean, law.mean)
        assert torch.equal(same.covariance_matrix, law.covariance_matrix)

    def test_a_contrast_that_a_factor_does_not_have_averages_to_a_constant(self):
        """With weights in the null space of a factor the average has no variance; rounding makes none negative."""
        direction = torch.tensor([0.9, 0.7], dtype=torch.float64)
        law = TensorNormal(zeros(2, 3), [torch.outer(direction, direction), COLUMNS])
        flat = marginal_mean_law(law, (1,), weights=[torch.stack([-direction[1], direction[0]]), None])
        assert float(flat.variance.abs().max()) < 1e-15

    def test_gls_weights_of_equal_row_sums_are_equal(self):
        compound = 0.5 * eye(4) + 0.5
        torch.testing.assert_close(gls_weights(compound), torch.full((4,), 0.25, dtype=torch.float64))
        circulant = torch.tensor([[2.0, 1.0, 0.0, 1.0]], dtype=torch.float64)
        circulant = torch.cat([circulant.roll(k, 1) for k in range(4)]) + eye(4)
        torch.testing.assert_close(gls_weights(circulant), torch.full((4,), 0.25, dtype=torch.float64))

    def test_gls_weights_have_the_least_variance_and_can_be_negative(self, seeded):
        covariance = torch.tensor([[1.0, 1.8], [1.8, 4.0]], dtype=torch.float64)
        best = gls_weights(covariance)
        assert float(best[1]) < 0
        law = TensorNormal(zeros(2, 1), [covariance], eye(1))
        least = marginal_mean_law(law, (), weights=[best]).variance
        torch.testing.assert_close(least[0], 1 / torch.linalg.inv(covariance).sum())
        for other in torch.rand(20, 2, dtype=torch.float64):
            assert float(marginal_mean_law(law, (), weights=[other]).variance) >= float(least)

    def test_gls_weights_have_gradients(self):
        root = torch.tensor([[1.0, 0.2], [0.4, 1.5]], dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda r: gls_weights(r @ r.mT), root)


# ---- messages, whole -----------------------------------------------------------------------------------------------


def refused(make, kind, message):
    with pytest.raises(kind) as error:
        make()
    assert str(error.value) == message
    assert isinstance(error.value, TensorAttentionError)


def refusal(kind, message, *args, **options):
    return pytest.param(kind, message, args, options, id=message)


@pytest.mark.parametrize(
    ("kind", "message", "args", "options"),
    [
        refusal(
            ShapeError,
            "mode 1 has size 4 in loc but 3 in mode_covariances[1].\n"
            "  Without a channel factor the event is (n_1, ..., n_N): the last dimension is a mode.",
            zeros(2, 4),
            [ROWS, COLUMNS],
        ),
        refusal(
            ShapeError,
            "mode 1 has size 4 in loc but 3 in mode_covariances[1].",
            zeros(2, 4, 2),
            [ROWS, COLUMNS],
            CHANNELS,
        ),
        refusal(ShapeError, "the channels have size 4 in loc but 2 in channel_covariance.", zeros(2, 4), [ROWS], ROWS),
        refusal(
            ShapeError,
            "loc has 1 dimensions, but 2 are needed: 1 modes and 1 for channels.",
            zeros(3),
            [ROWS],
            ROWS,
        ),
        refusal(
            ShapeError,
            "mode_covariances[0] has shape (3, 2), but (*batch, n, n) is needed.",
            zeros(3),
            [zeros(3, 2)],
        ),
        refusal(
            ShapeError,
            "mode_covariances[0] has size 0, but every factor needs at least 1.",
            zeros(3),
            [zeros(0, 0)],
        ),
        refusal(
            ShapeError,
            "batch dimensions are (5,) in loc but (4,) in mode_covariances[1], which do not broadcast.",
            zeros(5, 2, 3),
            [ROWS, COLUMNS.expand(4, 3, 3)],
        ),
        refusal(DtypeError, "loc is torch.float64 but mode_covariances[0] is torch.float32.", zeros(2), [ROWS.float()]),
        refusal(
            DtypeError,
            "loc is torch.float16, but torch.float32 or torch.float64 is needed.",
            zeros(2).half(),
            [ROWS],
        ),
        refusal(DtypeError, "loc is a float, but a tensor is needed.", 0.0, [ROWS]),
        refusal(OptionError, "mode_covariances and mode_scale_trils are both missing, but one is needed.", zeros(2)),
        refusal(
            OptionError,
            "mode_covariances and mode_scale_trils are both given, but one says it all.",
            zeros(2),
            [ROWS],
            mode_scale_trils=[ROWS],
        ),
        refusal(
            OptionError,
            "channel_covariance and channel_scale_tril are both given, but one says it all.",
            zeros(2),
            [],
            CHANNELS,
            channel_scale_tril=CHANNELS,
        ),
        refusal(
            OptionError,
            "mode_covariances is one tensor of shape (2, 2), but a sequence of one matrix a mode is needed.",
            zeros(2),
            ROWS,
        ),
        refusal(
            ModesError,
            "mode_covariances is empty and there are no channels, so the event has no dimension.",
            zeros(2),
            [],
        ),
        refusal(OptionError, "loc has a NaN.", zeros(2) * float("nan"), [ROWS]),
        refusal(OptionError, "mode_covariances[1] has an entry that is not finite.", zeros(2, 3), [ROWS, ONES / 0]),
        refusal(
            OptionError,
            "mode_covariances[1] is not symmetric: entry (0, 1) is 1 but entry (1, 0) is 0.",
            zeros(2, 3),
            [ROWS, ONES.triu()],
        ),
        refusal(
            OptionError,
            "mode_covariances[1] is not positive semidefinite: its eigenvalues run from -0.5 to 1.5.",
            zeros(2, 3),
            [ROWS, torch.stack([eye(3), SINGULAR - 0.5 * eye(3)])],
        ),
        refusal(
            OptionError,
            "mode_covariances[1] is not positive semidefinite: its eigenvalues run from -1 to -1.",
            zeros(2, 3),
            [ROWS, torch.stack([eye(3), -eye(3)])],
        ),
        refusal(
            OptionError,
            "mode_scale_trils[0] is not lower triangular: entry (0, 1) is 0.5.",
            zeros(2),
            mode_scale_trils=[ROWS],
        ),
        refusal(
            OptionError,
            "channel_scale_tril is not of non-negative diagonal: entry (0, 0) is -1.",
            zeros(2),
            [],
            channel_scale_tril=-eye(2),
        ),
    ],
)
def test_of_the_constructor(kind, message, args, options):
    refused(lambda: TensorNormal(*args, **options), kind, f"TensorNormal: {message}")


@pytest.mark.parametrize(
    ("kind", "message", "args", "options"),
    [
        refusal(ShapeError, "mode 1 has size 4 in value but 3 in loc.", zeros(2, 4, 2)),
        refusal(ShapeError, "the channels have size 1 in value but 2 in loc.", zeros(2, 3, 1)),
        refusal(ShapeError, "value has 2 dimensions, but 3 are needed: 2 modes and 1 for channels.", zeros(3, 2)),
        refusal(
            ShapeError,
            "batch dimensions are (3,) in value but (4,) in loc, which do not broadcast.",
            zeros(3, 2, 3, 2),
        ),
        refusal(OptionError, "value has a NaN.", zeros(2, 3, 2) / 0),
        refusal(DtypeError, "value is a NoneType, but a tensor is needed.", None),
    ],
)
def test_of_the_density(law, kind, message, args, options):
    refused(lambda: law.log_prob(*args, **options), kind, f"TensorNormal.log_prob: {message}")


def test_of_a_wider_value():
    single = TensorNormal(torch.zeros(2), [torch.eye(2)])
    message = "TensorNormal.log_prob: value is torch.float64 but loc is torch.float32."
    refused(lambda: single.log_prob(zeros(2)), DtypeError, message)


def test_of_singular_factors():
    law = TensorNormal(zeros(2, 3, 2), [ROWS, SINGULAR], CHANNELS)
    why = "mode_covariances[1] is singular: its eigenvalues run from 0 to 2, so"
    refused(lambda: law.log_prob(zeros(2, 3, 2)), OptionError, f"TensorNormal.log_prob: {why} the law has no density.")
    refused(law.entropy, OptionError, f"TensorNormal.entropy: {why} the law has no density.")
    refused(
        lambda: law.mode_scale_trils,
        OptionError,
        f"TensorNormal.mode_scale_trils: {why} it has no unique Cholesky factor.",
    )


def test_of_expand(law):
    refused(
        lambda: law.expand((5, 4)).log_prob(zeros(2, 3, 2) / 0), OptionError, "TensorNormal.log_prob: value has a NaN."
    )
    refused(
        lambda: law.expand((3,)),
        ShapeError,
        "TensorNormal.expand: batch_shape is (3,), but (4,) does not expand to it.",
    )


@pytest.mark.parametrize(
    ("kind", "message", "args", "options"),
    [
        refusal(ModesError, "kept has mode 2, but there are 2 modes.", (2,)),
        refusal(ModesError, "kept has mode 't', but there are 2 modes.", "t"),
        refusal(ModesError, "kept is 1, but a sequence of modes is needed.", 1),
        refusal(ModesError, "kept has mode 0 2 times, but once is enough.", (0, -2)),
        refusal(WeightsError, "weights has 1 vectors, but there are 2 modes.", (), weights=[None]),
        refusal(WeightsError, "weights[1] has shape (2,), but mode 1 has size 3.", (), weights=[None, zeros(2)]),
        refusal(WeightsError, "weights[1] sums to 0, so it has no average.", (), weights=[None, zeros(3)]),
        refusal(WeightsError, "weights[0] has an entry that is not finite.", (), weights=[zeros(2) / 0, None]),
        refusal(
            ShapeError,
            "batch dimensions are (4,) in loc but (3,) in weights[1], which do not broadcast.",
            (),
            weights=[None, ONES],
        ),
    ],
)
def test_of_the_laws(law, kind, message, args, options):
    refused(lambda: marginal_mean_law(law, *args, **options), kind, f"marginal_mean_law: {message}")
    cross = f"marginal_cross_covariance: {message.replace('kept', 'kept_b')}"
    refused(lambda: marginal_cross_covariance(law, (1,), *args, **options), kind, cross)


@pytest.mark.parametrize(
    ("kind", "message", "args", "options"),
    [
        refusal(ShapeError, "effects is empty, but every mode needs one.", []),
        refusal(ShapeError, "effects[0] has shape (3,), but (*batch, n_0, D) is needed.", [zeros(3)]),
        refusal(ShapeError, "channels are 2 in effects[0] but 1 in effects[1].", [zeros(3, 2), zeros(4, 1)]),
        refusal(DtypeError, "effects[0] is torch.float64 but effects[1] is torch.float32.", [ROWS, torch.ones(4, 2)]),
        refusal(
            ShapeError,
            "batch dimensions are (5,) in effects[0] but (6,) in effects[1], which do not broadcast.",
            [zeros(5, 3, 2), zeros(6, 4, 2)],
        ),
    ],
)
def test_of_additive_means(kind, message, args, options):
    refused(lambda: additive_mean_law(*args, (), **options), kind, f"additive_mean_law: {message}")


@pytest.mark.parametrize(
    ("kind", "message", "args", "options"),
    [
        refusal(ShapeError, "covariance has shape (3,), but (*batch, n, n) is needed.", zeros(3)),
        refusal(
            OptionError, "covariance is singular: its eigenvalues run from 0 to 2, so it has no inverse.", SINGULAR
        ),
        refusal(
            OptionError, "covariance is singular: its eigenvalues run from 0 to 0, so it has no inverse.", -zeros(2, 2)
        ),
        refusal(OptionError, "covariance is not positive semidefinite: its eigenvalues run from -2 to 0.", -SINGULAR),
    ],
)
def test_of_gls_weights(kind, message, args, options):
    refused(lambda: gls_weights(*args, **options), kind, f"gls_weights: {message}")
