"""Theorems as reusable checks, and the strategies that draw tensors for them. Needs Hypothesis.

A user's own operator gets all that it claims in three lines::

    import tensorattn
    from tensorattn.testing import check_operator
    check_operator(tensorattn.register_operator(MY_OPERATOR))

and every single theorem is a function of an operator that raises `AssertionError` with a sentence and the smallest
counterexample::

    check_key_shift("additive", dtype=torch.float32, device="cuda", examples=1000)
"""

try:
    import hypothesis as _hypothesis  # noqa: F401
except ImportError as _cause:
    raise ImportError("tensorattn.testing needs Hypothesis; install it by: pip install hypothesis") from _cause

from tensorattn.testing.biasing import biases
from tensorattn.testing.cases import Case, cases
from tensorattn.testing.checks import (
    CLAIMED,
    UNIVERSAL,
    Check,
    check_constant_mode,
    check_convex,
    check_equals_flattened,
    check_equals_flattened_on_additive,
    check_equals_reference,
    check_finite,
    check_first_order_law,
    check_gradients,
    check_invisible_interaction,
    check_key_shift,
    check_log_sum_exp,
    check_operator,
    check_order_one,
    check_permutation_equivariance,
    check_precision,
    check_refinement,
    check_rotation,
    check_scale_exchange,
    check_value_affine,
    check_weights_are_multiplicities,
    check_zero_scale_mean,
    checks_of,
    for_all,
)
from tensorattn.testing.strategies import (
    additive_tensors,
    batch_sizes,
    mode_partitions,
    mode_sizes,
    queries,
    tensor_normals,
    tensors,
)
from tensorattn.testing.subject import Subject, resolve
from tensorattn.testing.tolerances import ALLOWED, allowed
from tensorattn.testing.weighing import weights

__all__ = [
    "ALLOWED",
    "CLAIMED",
    "UNIVERSAL",
    "Case",
    "Check",
    "Subject",
    "additive_tensors",
    "allowed",
    "batch_sizes",
    "biases",
    "cases",
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
    "mode_partitions",
    "mode_sizes",
    "queries",
    "resolve",
    "tensor_normals",
    "tensors",
    "weights",
]
