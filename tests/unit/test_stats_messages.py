"""Every message of the statistics, whole: the argument, the mode and both numbers."""

from __future__ import annotations

import pytest
import torch

from tensorattn.errors import DtypeError, ModesError, OptionError, ShapeError, TensorAttentionError, WeightsError
from tensorattn.stats import (
    TensorNormal,
    additive_mean_law,
    gls_weights,
    marginal_cross_covariance,
    marginal_mean_law,
)

ROWS = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
COLUMNS = torch.diag(torch.tensor([1.0, 2.0, 1.5], dtype=torch.float64))
CHANNELS = torch.tensor([[0.7, 0.1], [0.1, 0.3]], dtype=torch.float64)
SINGULAR = torch.diag(torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64))
ONES = torch.ones(3, 3, dtype=torch.float64)


def eye(size):
    return torch.eye(size, dtype=torch.float64)


def zeros(*shape):
    return torch.zeros(*shape, dtype=torch.float64)


@pytest.fixture
def law():
    return TensorNormal(zeros(4, 2, 3, 2), [ROWS, COLUMNS], CHANNELS)


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
