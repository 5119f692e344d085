"""Precision: what an operator loses in float32 and in half precision."""

from __future__ import annotations

import torch
from torch import Tensor

from tensorattn.testing.cases import Case, rows
from tensorattn.testing.checks.check import Draw, check
from tensorattn.testing.subject import Subject
from tensorattn.testing.tolerances import epsilon, exact, largest

__all__ = ["check_precision"]

FLOOR = 8  # units of the type that is accumulated in; 1.4 were reached


@check("is as precise as attention written out in the same type", default=torch.float32, share=0.5, max_positions=64)
def check_precision(subject: Subject, case: Case, draw: Draw) -> None:
    r"""Check that the error is at most twice that of attention written out in the same type, plus a floor.

    Both errors are against float64 on the same numbers: that of the operator against its definition in NumPy, or
    against itself in float64 where it has none; that of full attention, by its formula, against the same formula in
    float64. The floor is one unit of half precision for the rounding of the result, and eight units
    :math:`\varepsilon\, (1 + L)\, M` of the type that half precision is accumulated in, float32.

    Examples:
        >>> check_precision("additive", dtype=torch.bfloat16, examples=5)
    """
    double = case.replace(query=exact(case.query), key=exact(case.key), value=exact(case.value))
    if subject.definition is None:
        truth = subject.output(double)
    else:
        truth = torch.from_numpy(subject.definition(case)[0])
    yardstick = largest(exact(dense(case)) - dense(double))
    magnitude = max(case.magnitude, largest(truth))
    accumulated = torch.float32 if case.dtype.itemsize < 4 else case.dtype
    floor = FLOOR * epsilon(accumulated) * (1 + case.logit) * magnitude
    if accumulated is not case.dtype:
        floor += epsilon(case.dtype) * magnitude
    statement = f"the error in {case.dtype} must be at most twice that of attention written out"
    subject.expect_close(subject.output(case), truth, 2 * yardstick + floor, statement, case)


def dense(case: Case) -> Tensor:
    """Return full attention in the type of a case, by the formula: softmax of the logits, times the values."""
    batch = len(case.batch)
    query, key, value = (rows(tensor, batch) for tensor in (case.query, case.key, case.value))
    bias = case.position_weights().flatten(batch).log()
    logits = query @ key.mT * case.factor + bias.to(query).unsqueeze(-2)
    return (torch.softmax(logits, -1) @ value).reshape(*case.query.shape[:-1], -1)
