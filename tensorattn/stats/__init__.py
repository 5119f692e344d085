"""Statistics of tensors: the tensor-normal law, and the laws of its averages."""

from tensorattn.stats.averages import (
    CrossCovariance,
    additive_mean_law,
    gls_weights,
    marginal_cross_covariance,
    marginal_mean_law,
)
from tensorattn.stats.tensor_normal import TensorNormal

__all__ = [
    "CrossCovariance",
    "TensorNormal",
    "additive_mean_law",
    "gls_weights",
    "marginal_cross_covariance",
    "marginal_mean_law",
]
