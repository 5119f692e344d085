"""The steps that operators are made of, each with its work forwards and backwards."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from tensorattn.contraction_tree import Family, Kept, main_effects
from tensorattn.cost.case import Case
from tensorattn.cost.tape import BACKWARD, FORWARD, RECOMPUTED, Part, Step, Tape, Value
from tensorattn.planning import Plan

__all__ = ["Tokens", "along_mode", "attention", "averages", "elementwise", "linear", "outer_sum", "product", "slabs"]

SLAB = 1 << 19  # elements that averages and outer sums of half precision hold in float32 at a time
LOGITS = 1 << 19  # logits held at a time where they are written out
SOFTMAX_FLOPS = 5  # an element: maximum, difference, exponential, sum, quotient


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
            scratch=scratch,
            backward_scratch=scratch,
        )
    )
    return {kept: means.get(kept, tensor) for kept in family}


def _converted(case: Case, tensor: Value) -> int:
    """Bytes of the part of a half-precision tensor that is held in float32 at a time."""
    return min(SLAB, tensor.elements) * case.accumulated if case.itemsize < case.accumulated else 0


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
            backward_scratch=_converted(case, result),
        )
    )
    return result


def linear(tape: Tape, value: Value, weight: Value, fan_in: int, *, copied: bool = False) -> Value:
    """Add a linear map of the channels.

    Args:
        tape: Where to add the step.
        value: What is mapped.
        weight: The matrix.
        fan_in: Channels before.
        copied: Whether the rows are copied first, as their channels do not lie together.

    Returns:
        The result.
    """
    rows, fan_out = value.elements // fan_in, weight.elements // fan_in
    result = Value(rows * fan_out, value.itemsize)
    return _multiply(tape, (value, weight), result, 2 * rows * weight.elements, "projections", copied)


def joined_linear(tape: Tape, values: Sequence[Value], weight: Value, fan_in: int) -> tuple[Value, ...]:
    """Add a linear map of the channels of several values in one product.

    Args:
        tape: Where to add the step.
        values: What is mapped.
        weight: The matrix.
        fan_in: Channels before.

    Returns:
        The results.
    """
    fan_out = weight.elements // fan_in
    results = tuple(Value(value.elements // fan_in * fan_out, value.itemsize) for value in values)
    flops = sum(2 * value.elements // fan_in * weight.elements for value in values)
    read, written = sum(value.bytes for value in (*values, weight)), sum(result.bytes for result in results)
    forward = Part("projections", FORWARD, flops, read, written)
    backward = Part("projections", BACKWARD, 2 * flops, read + 2 * written, read)
    tape.steps.append(Step((*values, weight), results, (forward,), (backward,), keeps=(*values, weight)))
    return results


def along_mode(tape: Tape, tensor: Value, matrix: Value, size: int, *, copied: bool) -> Value:
    """Add the product of a tensor with a matrix along one mode.

    Args:
        tape: Where to add the step.
        tensor: Values over the grid.
        matrix: Attention matrices of the mode.
        size: Size of the mode.
        copied: Whether the tensor is copied first, as its heads do not lie apart.

    Returns:
        The result.
    """
    result = Value(tensor.elements, tensor.itemsize)
    return _multiply(tape, (tensor, matrix), result, 2 * tensor.elements * size, "attention", copied)


def product(tape: Tape, operands: Sequence[Value], flops: int, elements: int, name: str) -> Value:
    """Add any other matrix product.

    Args:
        tape: Where to add the step.
        operands: What it reads.
        flops: Operations.
        elements: Elements of the result.
        name: Row of the table that it belongs to.

    Returns:
        The result.
    """
    return _multiply(tape, operands, Value(elements, operands[0].itemsize), flops, name, False)


def _multiply(tape: Tape, operands: Sequence[Value], result: Value, flops: int, name: str, copied: bool) -> Value:
    """Add a product; its backward pass is one product for each of two operands."""
    first, *others = operands
    copy = (Value(first.elements, first.itemsize),) if copied else ()
    read = sum(value.bytes for value in operands)
    tape.steps.append(
        Step(
            tuple(dict.fromkeys(operands)),
            (result,),
            (Part(name, FORWARD, flops, read, result.bytes),),
            (Part(name, BACKWARD, 2 * flops, read + 2 * result.bytes, read),),
            keeps=tuple(others) if copied else tuple(operands),
            saves=copy,
            scratch=sum(value.bytes for value in copy),
        )
    )
    return result


class Tokens(NamedTuple):
    """Tokens that share one softmax.

    Attributes:
        size: How many there are.
        keys: Their keys, in one piece or several.
        values: Their values.
    """

    size: int
    keys: tuple[Value, ...]
    values: tuple[Value, ...]


def attention(tape: Tape, query: Value, groups: Sequence[Tokens], head_dim: int, *, written_out: bool = False) -> Value:
    """Add softmax attention, or a sum of several over the same queries.

    Args:
        tape: Where to add the step.
        query: Queries, all heads together.
        groups: The tokens of each softmax.
        head_dim: Channels of a head.
        written_out: Whether logits are written out, some queries at a time. A fused kernel keeps them in the cache,
            and the value of a single token is taken as it is beside others.

    Returns:
        The output.
    """
    result, rows = Value(query.elements, query.itemsize), query.elements // head_dim
    all_alike = all(group.size == 1 for group in groups)
    softmaxes = [group for group in groups if group.size > 1 or written_out or all_alike]
    tokens = sum(group.size for group in softmaxes)
    operands = [query] if softmaxes else []
    operands += [value for group in softmaxes for value in (*group.keys, *group.values)]
    operands += [value for group in groups if group not in softmaxes for value in group.values]
    products, softmax = 4 * rows * tokens * head_dim, SOFTMAX_FLOPS * rows * tokens
    read = sum(value.bytes for value in operands)
    added_up = len(groups) > 1 and not written_out
    tape.steps.append(
        Step(
            tuple(operands),
            (result,),
            (
                Part("attention", FORWARD, products, read, result.bytes),
                Part("softmax", FORWARD, softmax, 0, 0),
            ),
            (
                Part("attention", BACKWARD, 2 * products, read + 2 * result.bytes, read),
                Part("softmax", BACKWARD, softmax, 0, 0),
            ),
            keeps=(*operands, *(() if added_up else (result,))),
            saves=tuple(Value(result.elements, result.itemsize) for _ in softmaxes) if added_up else (),
            scratch=2 * LOGITS * max(4, query.itemsize) if written_out else 0,
            backward_scratch=result.bytes if added_up else 0,
        )
    )
    return result


def elementwise(tape: Tape, *values: Value, flops: int = 1, keeps: bool = False, held: bool = False) -> Value:
    """Add an elementwise function of values, of the size of the first.

    Args:
        tape: Where to add the step.
        *values: What it reads.
        flops: Operations an element.
        keeps: Whether its backward pass needs what it read; it is a sum otherwise.
        held: Whether the caller holds the result.

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
            keeps=values if keeps else (),
            passes=() if keeps else values,
        )
    )
    return result


def slabs(tape: Tape, whole: tuple[Tape, Value], slab: tuple[Tape, Value], result: Value) -> None:
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
            scratch=slab[0].peak(slab[1], backward=False),
            backward_scratch=slab[0].peak(slab[1], backward=True),
        )
    )
