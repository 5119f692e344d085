"""Diagnose: how additive a tensor is, how far an operator is from full attention on it, and a law to draw it from."""

from tensorattn.diagnose.cost import Cost, cost
from tensorattn.diagnose.error import (
    ErrorEstimate,
    TokenChoice,
    centred_error,
    choose_tokens,
    error_bound,
    error_estimate,
    sample_positions,
    takes_any_positions,
)
from tensorattn.diagnose.fraction import AdditiveFraction, additive_fraction
from tensorattn.diagnose.tensor_normal import (
    CrossCovariance,
    TensorNormal,
    additive_mean_law,
    gls_weights,
    marginal_cross_covariance,
    marginal_mean_law,
)

__all__ = [
    "AdditiveFraction",
    "Cost",
    "CrossCovariance",
    "ErrorEstimate",
    "TensorNormal",
    "TokenChoice",
    "additive_fraction",
    "additive_mean_law",
    "centred_error",
    "choose_tokens",
    "cost",
    "error_bound",
    "error_estimate",
    "gls_weights",
    "marginal_cross_covariance",
    "marginal_mean_law",
    "sample_positions",
    "takes_any_positions",
]
