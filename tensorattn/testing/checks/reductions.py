"""Reductions: larger tensors that must act like smaller ones."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from hypothesis import strategies as st
from torch import Tensor

from tensorattn import reference
from tensorattn.operators import Claim
from tensorattn.testing.cases import Case
from tensorattn.testing.checks.check import Draw, check
from tensorattn.testing.definitions import arrays
from tensorattn.testing.drawing import generators, numbers
from tensorattn.testing.subject import Subject
from tensorattn.testing.tolerances import exact, largest
from tensorattn.testing.weighing import weights

__all__ = ["check_constant_mode", "check_invisible_interaction", "check_refinement"]


@check(Claim.CONSTANT_MODE, max_positions=24)
def check_constant_mode(subject: Subject, case: Case, draw: Draw) -> None:
    """Check that a mode along which keys and values are constant, of size one or more, can be left out.

    It may be weighted. The log-sum-exp, if claimed, counts its positions. Queries on the grid are constant along it.

    Examples:
        >>> check_constant_mode("additive", examples=5)
        >>> check_constant_mode("kao_kv")
        Traceback (most recent call last):
        AssertionError: kao_kv: a mode along which keys and values are constant must have no effect, but there is ...
    """
    mode, size = draw(st.integers(0, case.order)), draw(st.integers(1, 4))
    dim = len(case.batch) + mode
    extra = draw(weights((size,), device=case.key.device))
    given = case.weights
    if extra is not None:
        given = given or (None,) * case.order
    wider = None if given is None else (*given[:mode], None if extra is None else extra[0], *given[mode:])

    def stretched(tensor: Tensor) -> Tensor:
        return tensor.unsqueeze(dim).expand(*tensor.shape[:dim], size, *tensor.shape[dim:])

    larger = case.replace(
        query=stretched(case.query) if case.on_grid else case.query,
        key=stretched(case.key),
        value=stretched(case.value),
        order=case.order + 1,
        weights=wider,
    )
    count = size if extra is None or extra[0] is None else float(extra[0].double().sum())
    statement = "a mode along which keys and values are constant must have no effect"
    _same(subject, case, larger, stretched, math.log(count), statement)


@check(Claim.REFINEMENT, max_positions=24)
def check_refinement(subject: Subject, case: Case, draw: Draw) -> None:
    """Check that repeating every index of one mode equally often changes nothing but the number of positions.

    Examples:
        >>> check_refinement("flattened", examples=5)
    """
    mode, times = draw(st.integers(0, case.order - 1)), draw(st.integers(2, 3))

    def repeated(tensor: Tensor) -> Tensor:
        return tensor.repeat_interleave(times, dim=len(case.batch) + mode)

    finer = None
    if case.weights is not None:
        finer = tuple(
            w.repeat_interleave(times, dim=-1) if w is not None and m == mode else w for m, w in enumerate(case.weights)
        )
    larger = case.replace(
        query=repeated(case.query) if case.on_grid else case.query,
        key=repeated(case.key),
        value=repeated(case.value),
        weights=finer,
    )
    statement = "repeating every index of a mode equally often must have no effect"
    _same(subject, case, larger, repeated, math.log(times), statement)


def _same(
    subject: Subject,
    case: Case,
    larger: Case,
    enlarge: Callable[[Tensor], Tensor],
    log_count: float,
    statement: str,
) -> None:
    """Compare a larger tensor with the smaller one that it stands for."""
    if Claim.LOG_SUM_EXP in subject.claims and not case.on_grid:
        (before, lse), (after, moved) = subject.with_lse(case), subject.with_lse(larger)
        told = f"{statement} but to count the positions in the log-sum-exp"
        subject.expect_close(moved, exact(lse) + log_count, case.allowed_lse, told, larger)
    else:
        before, after = subject.output(case), subject.output(larger)
    expected = enlarge(before) if case.on_grid else before
    subject.expect_close(after, expected, case.allowed(largest(before)), statement, larger)


@check(Claim.INVISIBLE_INTERACTION)
def check_invisible_interaction(subject: Subject, case: Case, draw: Draw) -> None:
    """Check that adding an interaction, whose mean over every slice is zero, to keys and values changes nothing.

    Queries are left as they are.

    Examples:
        >>> check_invisible_interaction("additive", examples=5)
    """
    generator, given = draw(generators(3)), arrays(case)

    def disturbed(tensor: Tensor) -> Tensor:
        noise = 3 * numbers(generator, tensor.shape)
        additive = reference.additive_part(noise, order=case.order, weights=given["weights"])
        return (exact(tensor) + noise - torch.from_numpy(additive)).to(tensor)

    with_interaction = case.replace(key=disturbed(case.key), value=disturbed(case.value))
    before, after = subject.output(case), subject.output(with_interaction)
    tolerance = max(case.allowed(), with_interaction.allowed())
    statement = "the interaction residual of keys and values must have no effect"
    subject.expect_close(after, before, tolerance, statement, case)
