"""The suite: which checks an operator has to pass, by what it claims."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any

import torch

from tensorattn.operators import Claim
from tensorattn.testing.checks.check import Check
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
from tensorattn.testing.checks.symmetries import (
    check_key_shift,
    check_permutation_equivariance,
    check_rotation,
    check_scale_exchange,
    check_value_affine,
)
from tensorattn.testing.subject import Checkable, resolve

__all__ = ["CLAIMED", "UNIVERSAL", "check_operator", "checks_of"]

# What every operator has by construction.
UNIVERSAL: tuple[Check, ...] = (
    check_order_one,
    check_weights_are_multiplicities,
    check_permutation_equivariance,
    check_scale_exchange,
    check_gradients,
    check_precision,
    check_finite,
)

# What an operator has if it claims it.
CLAIMED: Mapping[Claim, Check] = MappingProxyType(
    {
        Claim.EXACT: check_equals_flattened,
        Claim.EXACT_ON_ADDITIVE: check_equals_flattened_on_additive,
        Claim.KEY_SHIFT: check_key_shift,
        Claim.VALUE_AFFINE: check_value_affine,
        Claim.ROTATION: check_rotation,
        Claim.FIRST_ORDER: check_first_order_law,
        Claim.CONSTANT_MODE: check_constant_mode,
        Claim.REFINEMENT: check_refinement,
        Claim.INVISIBLE_INTERACTION: check_invisible_interaction,
        Claim.CONVEX: check_convex,
        Claim.ZERO_SCALE_MEAN: check_zero_scale_mean,
        Claim.LOG_SUM_EXP: check_log_sum_exp,
    }
)

OTHER = (check_order_one, check_constant_mode)  # what is said of tensors of another order

NARROWER = (torch.float32, torch.bfloat16, torch.float16)  # what float64 is narrowed to


def checks_of(operator: Checkable, **options: Any) -> tuple[Check, ...]:
    """List the checks that an operator has to pass.

    Args:
        operator: Name in the registry, an `Operator`, or a function with the signature of `additive_attention`; a
            function that is not registered claims nothing.
        **options: Options of the operator.

    Returns:
        The checks: its definition, if it has one in `tensorattn.reference`; what every operator has; what it claims.

    Examples:
        >>> [check.__name__ for check in checks_of("kao_kv")][-3:]
        ['check_invisible_interaction', 'check_convex', 'check_zero_scale_mean']
    """
    subject = resolve(operator, options)
    defined = (check_equals_reference,) if subject.definition is not None else ()
    claimed = [CLAIMED[claim] for claim in Claim if claim in subject.claims]
    return tuple(check for check in (*defined, *UNIVERSAL, *claimed) if subject.least_order == 1 or check not in OTHER)


def check_operator(
    operator: Checkable,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    examples: int | None = None,
    order: int | None = None,
    on_grid: bool | None = None,
    skip: Collection[Check] = (),
    report: Callable[[str, str], None] | None = None,
    **options: Any,
) -> None:
    """Check everything that an operator claims, and what every operator has by construction.

    In float64, precision and finiteness are checked in float32 and half precision too.

    Args:
        operator: Name in the registry, an `Operator`, or a function with the signature of `additive_attention`.
        dtype: Type of the tensors. Gradients are checked in float64 whatever it is.
        device: Device of the tensors.
        examples: Number of cases tried in each check; by default as the Hypothesis profile says.
        order: Number of modes N; by default drawn, from 1 to 4. With a given number, what is said of tensors of
            another order is not checked.
        on_grid: Whether queries must lie on the grid of the keys; by default as the operator says.
        skip: Checks to leave out.
        report: Called with the name of the operator and the statement of each check after it has passed.
        **options: Options of the operator.

    Raises:
        AssertionError: If a statement is broken: a sentence, and the smallest case that was found.

    Examples:
        A new operator gets all that it claims once it is registered.

        >>> check_operator("kao_kv", examples=2, report=lambda name, statement: print(statement))
        equals its definition, written in NumPy and float64, one query at a time
        is attention where there is a single mode
        ...
        at scale zero the output is the mean value
    """
    subject = resolve(operator, options)
    given: dict[str, Any] = {"device": device, "examples": examples, "order": order, "on_grid": on_grid, **options}
    for check in checks_of(operator, **options):
        if check in skip or (order is not None and check in OTHER):
            continue
        for narrow in _dtypes(check, dtype):
            check(operator, dtype=narrow, **given)
        if report is not None:
            report(subject.name, check.statement)


def _dtypes(check: Check, dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """Types that a check is made in."""
    if dtype is torch.float64 and check is check_precision:
        return NARROWER
    return (dtype, *NARROWER) if dtype is torch.float64 and check is check_finite else (dtype,)
