"""The steps that move whole tensors: averages, outer sums, elementwise functions, and slabs of positions."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

from tensorattn import slabs
from tensorattn.contraction_tree import Family, Kept, main_effects
from tensorattn.cost.case import Case
from tensorattn.cost.tape import BACKWARD, FORWARD, RECOMPUTED, Part, Step, Tape, Value
from tensorattn.planning import Plan

__all__ = ["accumulate", "averages", "elementwise", "outer_sum", "slab_by_slab"]


def averages(tape: Tape, case: Case, tensor: Value, family: Family) -> dict[Kept, Value]:
    """Add the planned means of a family; the backward pass writes the whole gradient once.

    Args:
        tape: Where to add the step.
        case: Sizes and memory order.
        tensor: What is averaged.
        family: Kept mode subsets.

    Returns:
        The means of each kept subset; where it keeps all modes, the tensor itself.
    """
    everything = tuple(range(case.order))
    smaller = tuple(kept for kept in family if kept != everything)
    if not smaller:
        return dict.fromkeys(family, tensor)
    plan = case.plan(smaller)
    means = {kept: Value(case.batch * case.dim * case.tokens((kept,)), case.accumulated) for kept in smaller}
    read, written = plan.read * case.itemsize, plan.written * case.accumulated
    scratch = _converted(case, tensor) + max(0, written - sum(mean.bytes for mean in means.values()))
    tape.steps.append(
        Step(
            (tensor,),
            tuple(means.values()),
            (Part("averages", FORWARD, plan.flops, read, written),),
            (Part("averages", BACKWARD, _expand_flops(plan), written, tensor.bytes),),
            joins=(tensor,),
            scratch=scratch,
            saving_scratch=scratch,
            backward_scratch=scratch,
        )
    )
    return {kept: means.get(kept, tensor) for kept in family}


def _converted(case: Case, tensor: Value) -> int:
    """Bytes of the part of a half-precision tensor that is held in float32 at a time."""
    return min(slabs.ELEMENTS, tensor.elements) * case.accumulated if case.itemsize < case.accumulated else 0


def _expand_flops(plan: Plan) -> int:
    """Operations of the transpose of a plan: a scaling for each step, and an addition for each that meets another."""
    leaving = Counter(step.source for step in plan.steps)
    sizes = {step.source: step.read for step in plan.steps}
    return sum(sizes[node] * (count - 1) for node, count in leaving.items()) + plan.written


def outer_sum(tape: Tape, case: Case, vectors: Sequence[Value], *, skip: Value | None, out: bool) -> Value:
    """Add the broadcast sum of one vector a mode, and of a skip connection.

    Args:
        tape: Where to add the step.
        case: Sizes and memory order.
        vectors: One vector a mode.
        skip: What is added in the same pass.
        out: Whether the result is held by the caller.

    Returns:
        The result.
    """
    result, plan = Value(case.elements, case.itemsize, held=out), case.plan(main_effects(case.order))
    passed = () if skip is None else (skip,)
    reads = sum(value.bytes for value in (*vectors, *passed))
    flops = (case.order - 1 + len(passed)) * result.elements
    read, written = plan.read * case.itemsize, plan.written * case.accumulated
    tape.steps.append(
        Step(
            (*vectors, *passed),
            (result,),
            (Part("outer sum", FORWARD, flops, reads, result.bytes),),
            (Part("outer sum", BACKWARD, plan.flops, read, written),),
            passes=passed,
            scratch=_converted(case, result),
            saving_scratch=_converted(case, result),
            backward_scratch=_converted(case, result),
        )
    )
    return result


def elementwise(
    tape: Tape,
    *values: Value,
    flops: int = 1,
    keeps: Sequence[Value] = (),
    held: bool = False,
    scratch: int = 0,
) -> Value:
    """Add an elementwise function of values, of the size of the first.

    Args:
        tape: Where to add the step.
        *values: What it reads.
        flops: Operations an element.
        keeps: What its backward pass needs; it is a sum where that is nothing.
        held: Whether the caller holds the result.
        scratch: Bytes that it holds on the way.

    Returns:
        The result.
    """
    first, *_ = values
    result = Value(first.elements, first.itemsize, held=held)
    read, count = sum(value.bytes for value in values), flops * first.elements
    backward = Part("elementwise", BACKWARD, count, read + first.bytes, read)
    tape.steps.append(
        Step(
            tuple(dict.fromkeys(values)),
            (result,),
            (Part("elementwise", FORWARD, count, read, first.bytes),),
            (backward,) if keeps else (),
            keeps=tuple(keeps),
            passes=() if keeps else values,
            scratch=scratch,
        )
    )
    return result


def accumulate(tape: Tape, total: Value, part: Value) -> None:
    """Add a value to another one in its place; as that is a view, both gradients are written anew.

    Args:
        tape: Where to add the step.
        total: What is added to.
        part: What is added.
    """
    moved = 2 * total.bytes
    tape.steps.append(
        Step(
            (total, part),
            (total,),
            (Part("elementwise", FORWARD, total.elements, moved, total.bytes),),
            (Part("elementwise", BACKWARD, 0, moved, moved),),
        )
    )


def slab_by_slab(tape: Tape, whole: tuple[Tape, Value], slab: tuple[Tape, Value], result: Value) -> None:
    """Add a tape that runs slab by slab of positions, and again for its backward pass.

    Args:
        tape: Where to add the step.
        whole: The tape of all slabs with its result, for its work.
        slab: The tape of one slab with its result, for its memory.
        result: Where the slabs are put together.
    """
    parts, given = whole[0].parts(whole[1], backward=True), whole[0].given(whole[1])
    forward = tuple(part for part in parts if part.phase == FORWARD)
    backward = tuple(part for part in parts if part.phase == BACKWARD)
    tape.steps.append(
        Step(
            given,
            (result,),
            forward,
            (*(dataclasses.replace(part, phase=RECOMPUTED) for part in forward), *backward),
            keeps=given,
            hands_over=True,
            scratch=slab[0].peak(slab[1], backward=False),
            backward_scratch=slab[0].peak(slab[1], backward=True),
        )
    )
