"""The theorems as checks, one idea a file."""

from tensorattn.testing.checks.check import Check, for_all
from tensorattn.testing.checks.derivatives import check_first_order_law, check_gradients
from tensorattn.testing.checks.exactness import (
    check_equals_flattened,
    check_equals_flattened_on_additive,
    check_equals_reference,
    check_log_sum_exp,
    check_order_one,
)
from tensorattn.testing.checks.multiplicities import check_weights_are_multiplicities
from tensorattn.testing.checks.precision import check_precision
from tensorattn.testing.checks.ranges import check_convex, check_finite, check_zero_scale_mean
from tensorattn.testing.checks.reductions import check_constant_mode, check_invisible_interaction, check_refinement
from tensorattn.testing.checks.suite import CLAIMED, UNIVERSAL, check_operator, checks_of
from tensorattn.testing.checks.symmetries import (
    check_key_shift,
    check_permutation_equivariance,
    check_rotation,
    check_scale_exchange,
    check_value_affine,
)

__all__ = [
    "CLAIMED",
    "UNIVERSAL",
    "Check",
    "check_constant_mode",
    "check_convex",
    "check_equals_flattened",
    "check_equals_flattened_on_additive",
    "check_equals_reference",
    "check_finite",
    "check_first_order_law",
    "check_gradients",
    "check_invisible_interaction",
    "check_key_shift",
    "check_log_sum_exp",
    "check_operator",
    "check_order_one",
    "check_permutation_equivariance",
    "check_precision",
    "check_refinement",
    "check_rotation",
    "check_scale_exchange",
    "check_value_affine",
    "check_weights_are_multiplicities",
    "check_zero_scale_mean",
    "checks_of",
    "for_all",
]
