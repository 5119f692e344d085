"""The oracle, and theorems as reusable checks with the strategies that draw tensors for them, which need Hypothesis.

A user's own operator gets all that it claims in three lines::

    import tensorattn
    from tensorattn.testing import check_operator
    check_operator(tensorattn.register_operator(MY_OPERATOR))

and every single law is a function of an operator that raises `AssertionError` with a sentence and the smallest
counterexample::

    check_key_shift("additive", dtype=torch.float32, device="cuda", examples=1000)
"""

from typing import NoReturn

try:
    from tensorattn.testing.check import Law, Subject, again, resolve
    from tensorattn.testing.laws import (
        CLAIMED,
        UNIVERSAL,
        check_causal,
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
        check_masks,
        check_operator,
        check_order_one,
        check_permutation_equivariance,
        check_positions,
        check_precision,
        check_refinement,
        check_rotation,
        check_scale_exchange,
        check_value_affine,
        check_weights_are_multiplicities,
        check_zero_scale_mean,
        checks_of,
    )
    from tensorattn.testing.strategies import (
        ALLOWED,
        Case,
        additive_tensors,
        allowed,
        batch_sizes,
        biases,
        cases,
        masks,
        mode_partitions,
        mode_sizes,
        queries,
        tensor_normals,
        tensors,
        weights,
    )
except ModuleNotFoundError as _cause:  # the oracle needs no Hypothesis
    if _cause.name != "hypothesis":
        raise

    def __getattr__(name: str) -> NoReturn:
        if name in __all__:
            raise ImportError("tensorattn.testing needs Hypothesis; install it by: pip install hypothesis")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "ALLOWED",
    "CLAIMED",
    "UNIVERSAL",
    "Case",
    "Law",
    "Subject",
    "additive_tensors",
    "again",
    "allowed",
    "batch_sizes",
    "biases",
    "cases",
    "check_causal",
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
    "check_masks",
    "check_operator",
    "check_order_one",
    "check_permutation_equivariance",
    "check_positions",
    "check_precision",
    "check_refinement",
    "check_rotation",
    "check_scale_exchange",
    "check_value_affine",
    "check_weights_are_multiplicities",
    "check_zero_scale_mean",
    "checks_of",
    "masks",
    "mode_partitions",
    "mode_sizes",
    "queries",
    "resolve",
    "tensor_normals",
    "tensors",
    "weights",
]
