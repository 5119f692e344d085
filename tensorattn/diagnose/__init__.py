"""Diagnose: how additive a tensor is, and how far an operator is from full attention on it."""

from tensorattn.diagnose.bound import error_bound
from tensorattn.diagnose.estimate import (
    ErrorEstimate,
    centred_error,
    error_estimate,
    sample_positions,
    takes_any_positions,
)
from tensorattn.diagnose.fraction import AdditiveFraction, additive_fraction

__all__ = [
    "AdditiveFraction",
    "ErrorEstimate",
    "additive_fraction",
    "centred_error",
    "error_bound",
    "error_estimate",
    "sample_positions",
    "takes_any_positions",
]
