"""Statements about operators: what each claims, and what every operator has, with the formula of each."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tensorattn.testing import (
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
    check_order_one,
    check_permutation_equivariance,
    check_precision,
    check_refinement,
    check_rotation,
    check_scale_exchange,
    check_value_affine,
    check_weights_are_multiplicities,
    check_zero_scale_mean,
)
from tensorattn.verify.statement import Statement, drawn_cases

__all__ = ["CHECKS", "OTHER_ORDERS", "statement_of"]

CHECKS: tuple[Check, ...] = (check_equals_reference, *CLAIMED.values(), *UNIVERSAL)

OTHER_ORDERS = (check_order_one, check_constant_mode)  # what is said of tensors of another order than asked for

FORMULAS: Mapping[Check, str] = {
    check_equals_reference: "torch = NumPy in float64, q by q",
    check_equals_flattened: "O = F = Σ_j softmax_j(s q·k_j) v_j",
    check_equals_flattened_on_additive: "Σ_m Attn_m − (N−1)v̄ = F where k_j = Σ_m κ^m[j_m], v_j = Σ_m ν^m[j_m]",
    check_key_shift: "O(k + c) = O(k), LSE + s q·c",
    check_value_affine: "O(v W + b) = O(v) W + b",
    check_rotation: "O(q R, k R) = O(q, k), R Rᵀ = 1",
    check_first_order_law: "dO/ds at s = 0 is C_vk q = dF/ds",
    check_constant_mode: "O(k ⊗ 1, v ⊗ 1) = O(k, v)",
    check_refinement: "each index r times: O same, LSE + log r",
    check_invisible_interaction: "O(k + R) = O(k) if all slice means of R are 0",
    check_convex: "min_j v_j ≤ O ≤ max_j v_j",
    check_zero_scale_mean: "s = 0: O = v̄",
    check_log_sum_exp: "log Σ_j e^(s q·k_j) = Σ_m LSE_m − (N−1) s q·k̄",
    check_order_one: "N = 1: O = F",
    check_weights_are_multiplicities: "O(w) = O(j repeated w_j times)",
    check_permutation_equivariance: "O(π x) = π O(x)",
    check_scale_exchange: "O(c q, s / c) = O(q, s)",
    check_gradients: "∂O, ∂²O = finite differences",
    check_precision: "|O − O_64| ≤ 2 |F − F_64| + floor",
    check_finite: "|O|, |∂O| < ∞ at logits of 10⁴",
}


def statement_of(check: Check) -> Statement:
    """Return a check as a statement.

    Args:
        check: The check.
    """
    return Statement(
        words=check.statement,
        formula=FORMULAS.get(check, ""),
        law=check.law,
        strategy=drawn_cases(**check.drawn),
        share=check.share,
        dtypes=_narrower if check is check_precision else lambda dtype: (dtype,),
        double="dtype" in check.drawn,
    )


def _narrower(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """Types that precision is measured in: in float64 nothing is left to compare with."""
    return (torch.float32, torch.bfloat16, torch.float16) if dtype is torch.float64 else (dtype,)
