"""Exactness: where an operator equals its definition, or full attention."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from tensorattn import reference
from tensorattn.operators import Claim
from tensorattn.testing.cases import Case
from tensorattn.testing.checks.check import Draw, check
from tensorattn.testing.definitions import Array, arrays, as_array, attention, with_own_token
from tensorattn.testing.strategies import tensors
from tensorattn.testing.subject import Subject

__all__ = [
    "check_equals_flattened",
    "check_equals_flattened_on_additive",
    "check_equals_reference",
    "check_log_sum_exp",
    "check_order_one",
]


@check("equals its definition, written in NumPy and float64, one query at a time", empty=True)
def check_equals_reference(subject: Subject, case: Case, draw: Draw) -> None:
    """Check that an operator of this package equals its definition in `tensorattn.reference`.

    On any data and with any weights; a batch entry without any position gives zeros. The log-sum-exp is compared
    wherever the definition has one.

    Examples:
        >>> check_equals_reference("additive", examples=5)
    """
    if subject.definition is None:
        raise AssertionError(f"{subject.name}: there is no definition in NumPy to compare with.")
    expected, expected_lse = subject.definition(case)
    if expected_lse is None:
        output = subject.output(case)
    else:
        output, lse = subject.with_lse(case)
        subject.expect_close(lse, expected_lse, case.allowed_lse, "the log-sum-exp must equal its definition", case)
    tolerance = case.allowed(float(np.abs(expected).max(initial=0.0)))
    subject.expect_close(output, expected, tolerance, "the output must equal its definition", case)


@check(Claim.EXACT, empty=True)
def check_equals_flattened(subject: Subject, case: Case, draw: Draw) -> None:
    """Check that an operator equals full attention on any data.

    Examples:
        >>> check_equals_flattened("flattened", examples=5)
    """
    _equals_flattened(subject, case, "the output must equal flattened attention")


@check(Claim.EXACT_ON_ADDITIVE, additive=True)
def check_equals_flattened_on_additive(subject: Subject, case: Case, draw: Draw) -> None:
    r"""Check that an operator equals full attention on keys and values that are sums of one term a mode.

    For every query, on the grid or not, with position weights that are products over modes, and including the
    log-sum-exp if the operator claims one. The logits are then additive, so the softmax over the grid is the product of
    softmaxes over modes, and the mean of additive values under a product is the sum of means under its factors.

    Examples:
        >>> check_equals_flattened_on_additive("additive", examples=5)
        >>> check_equals_flattened_on_additive("kao_kv", order=2)
        Traceback (most recent call last):
        AssertionError: kao_kv: on additive keys and values the output must equal flattened attention, but there is ...
    """
    _equals_flattened(subject, case, "on additive keys and values the output must equal flattened attention")


@check("is attention where there is a single mode", order=1, empty=True)
def check_order_one(subject: Subject, case: Case, draw: Draw) -> None:
    """Check that an operator is plain attention, on any data, where there is a single mode.

    With the token at the query's own position once more, if it has an option for that.

    Examples:
        >>> check_order_one("kao_qkv", examples=5)
    """
    _equals_flattened(subject, case, "at order 1 the output must equal attention")


def _equals_flattened(subject: Subject, case: Case, statement: str) -> None:
    """Compare with full attention, and the log-sum-exps if the subject claims one."""
    expected, expected_lse = attention(case)
    if subject.own_token and case.order == 1:
        expected, expected_lse = with_own_token(case, expected, expected_lse)
    if Claim.LOG_SUM_EXP in subject.claims:
        output, lse = subject.with_lse(case)
        subject.expect_close(lse, expected_lse, case.allowed_lse, f"{statement} in its log-sum-exp", case)
    else:
        output = subject.output(case)
    subject.expect_close(output, expected, case.allowed(), statement, case)


@check(Claim.LOG_SUM_EXP, additive=True, empty=True)
def check_log_sum_exp(subject: Subject, case: Case, draw: Draw) -> None:
    r"""Check that the log-sum-exp is :math:`\log \sum_j w_j e^{s\, q \cdot k_j}` on additive keys.

    Output and log-sum-exp then merge with attention to any other set of tokens into attention to the union of both,
    which is checked for none to three more tokens a batch entry.

    Examples:
        >>> check_log_sum_exp("additive", examples=5)
    """
    given = arrays(case)
    output, lse = subject.with_lse(case)
    expected_lse = attention(case)[1]
    subject.expect_close(lse, expected_lse, case.allowed_lse, "the log-sum-exp must be that of the logits", case)

    count = draw(st.integers(0, 3))
    key, value = (
        draw(tensors((*case.batch, count, full.shape[-1]), dtype=case.dtype, device=full.device, stream=stream))
        for stream, full in ((3, case.key), (4, case.value))
    )
    more = case.replace(key=key, value=value, order=1, weights=None)
    union = {
        "order": 1,
        "key": _joined(given["key"], key),
        "value": _joined(given["value"], value),
        "weights": [_joined(case.position_weights().unsqueeze(-1), torch.ones(*case.batch, count, 1))[..., 0]],
    }
    expected, _ = reference.flattened_attention(**{**given, **union})
    parts = [(as_array(output), as_array(lse)), attention(more)]
    # An error of one log-sum-exp moves the share of its part, and so the output by its multiple of the values.
    tolerance = max(case.allowed(more.magnitude), more.allowed(case.magnitude))
    tolerance += max(case.allowed_lse, more.allowed_lse) * (case.magnitude + more.magnitude)
    statement = "the output must merge with other token sets"
    subject.expect_close(reference.merge_attention(parts)[0], expected, tolerance, statement, case)


def _joined(grid: Tensor | Array, tokens: Tensor | Array) -> Array:
    """Put the positions of a grid and some tokens ``(*batch, T, D)`` in one row."""
    first, second = as_array(grid), as_array(tokens)
    return np.concatenate([first.reshape(*second.shape[:-2], -1, second.shape[-1]), second], -2)
