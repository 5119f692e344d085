"""The products that operators are made of, each with its work and memory forwards and backwards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from tensorattn.cost.case import Case
from tensorattn.cost.tape import BACKWARD, FORWARD, Part, Step, Tape, Value

__all__ = ["LOGITS", "Tokens", "along_mode", "attention", "joined_linear", "linear", "product"]

LOGITS = 1 << 19  # elements that attention holds at a time where it is not one call of a fused kernel
SOFTMAX_FLOPS = 5  # an element: maximum, difference, exponential, sum, quotient


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
    return _multiply(tape, (value, weight), result, 2 * rows * weight.elements, "projections", copied=copied)


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


def along_mode(tape: Tape, case: Case, tensor: Value, matrix: Value, mode: int, *, copied: bool) -> Value:
    """Add the product of a tensor with a matrix along one mode.

    Behind an outer mode it is a batch of products with one matrix, each of which has its gradient of the matrix.

    Args:
        tape: Where to add the step.
        case: Sizes and heads.
        tensor: Values over the grid.
        matrix: Attention matrices of the mode.
        mode: The mode.
        copied: Whether the tensor is copied first, as its heads do not lie apart.

    Returns:
        The result.
    """
    size, outer = case.sizes[mode], math.prod(case.sizes[:mode])
    result = Value(tensor.elements, tensor.itemsize)
    batched = result.bytes if outer > 1 else 0
    gradients = outer * matrix.bytes if outer > 1 else 0
    return _multiply(
        tape,
        (tensor, matrix),
        result,
        2 * tensor.elements * size,
        "attention",
        copied=copied,
        saving_scratch=batched,
        backward_scratch=max(batched, gradients),
    )


def product(tape: Tape, operands: Sequence[Value], flops: int, elements: int, name: str, *, saved: int = 0) -> Value:
    """Add any other matrix product.

    Args:
        tape: Where to add the step.
        operands: What it reads.
        flops: Operations.
        elements: Elements of the result.
        name: Row of the table that it belongs to.
        saved: Bytes that it saves for its backward pass beside what it reads.

    Returns:
        The result.
    """
    result = Value(elements, operands[0].itemsize)
    saves = (Value(saved, 1),) if saved else ()
    return _multiply(tape, operands, result, flops, name, saves=saves)


def _multiply(
    tape: Tape,
    operands: Sequence[Value],
    result: Value,
    flops: int,
    name: str,
    *,
    copied: bool = False,
    saves: tuple[Value, ...] = (),
    saving_scratch: int = 0,
    backward_scratch: int = 0,
) -> Value:
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
            saves=(*copy, *saves),
            scratch=sum(value.bytes for value in copy),
            saving_scratch=saving_scratch,
            backward_scratch=backward_scratch,
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


def attention(
    tape: Tape,
    query: Value,
    groups: Sequence[Tokens],
    head_dim: int,
    *,
    written_out: bool = False,
    copies: int = 0,
    chunked: bool = False,
) -> Value:
    """Add softmax attention, or a sum of several over the same queries.

    Args:
        tape: Where to add the step.
        query: Queries, all heads together.
        groups: The tokens of each softmax.
        head_dim: Channels of a head.
        written_out: Whether logits are written out, some queries at a time. A fused kernel keeps them in the cache,
            and the value of a single token is taken as it is beside others.
        copies: Bytes that are copied first, as channels or batch dimensions do not lie together.
        chunked: Whether queries come some at a time, unless there is a backward pass.

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
    memory = _written_out(query, rows, tokens) if written_out else _fused(result, copies, groups, chunked)
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
            keeps=tuple(operands),
            saves=tuple(Value(count, 1) for count in memory.saved),
            lasting=True,
            scratch=memory.scratch,
            saving_scratch=memory.saving_scratch,
            backward_scratch=memory.backward_scratch,
        )
    )
    return result


class _Memory(NamedTuple):
    """Bytes that attention saves, and that it holds while it runs."""

    saved: tuple[int, ...]
    scratch: int
    saving_scratch: int
    backward_scratch: int


def _fused(result: Value, copies: int, groups: Sequence[Tokens], chunked: bool) -> _Memory:
    """Memory of the fused kernel: each softmax saves its output; what was copied is saved once."""
    saved = (copies, *(result.bytes for group in groups if group.size > 1))
    chunk = min(result.bytes, LOGITS * result.itemsize)
    if len(groups) == 1:
        return _Memory(saved, 4 * chunk if chunked else max(copies, result.bytes), 0, 2 * result.bytes)
    return _Memory(saved, 5 * chunk, 2 * result.bytes, 3 * result.bytes)


def _written_out(query: Value, rows: int, tokens: int) -> _Memory:
    """Memory of attention written out: some logits at a time, all of them saved."""
    itemsize = max(4, query.itemsize)
    chunk = min(rows * tokens, LOGITS) * itemsize
    return _Memory((2 * rows * tokens * itemsize,), 4 * chunk, query.bytes, rows * tokens * itemsize)
