"""A plan executed on PyTorch tensors, forwards and backwards: views, and one primitive a step."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tensorattn import slabs
from tensorattn.contraction_tree import LONG, Kept, folding, primitive_for
from tensorattn.planning import Plan, Step, order_of_strides
from tensorattn.slabs import steps_of
from tensorattn.weights import Vector, accumulation_dtype, in_type

__all__ = ["absent_as_zero", "memory_order", "run", "run_backwards", "split_shape"]

Term = tuple[Tensor, Tensor | None]  # a part of a sum, and its weight
Aligned = Sequence[Vector] | None  # weights of each mode, beside the tensor in memory order; None where none has any


def split_shape(tensor: Tensor, order: int) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Split a shape into batch, mode sizes and channels, unchecked."""
    shape = tuple(tensor.shape)
    return shape[: -order - 1], shape[-order - 1 : -1], shape[-1]


def memory_order(tensor: Tensor) -> tuple[int, ...]:
    """Return dimensions from the outermost to the innermost in memory; expanded ones count as outermost."""
    return order_of_strides(tensor.stride())


def run(plan: Plan, tensor: Tensor, vectors: Sequence[Vector], mean: bool) -> tuple[Tensor, ...]:
    """Execute a plan: at once where the tensor is small, else slab by slab, each read from memory once.

    A tensor that is not dense, or in half precision, is read through a small dense copy in float32, which also takes
    away what is not finite where a weight is zero.
    """
    memory = tensor if plan.in_order else tensor.permute(plan.permutation)
    dtype, everything = accumulation_dtype(tensor.dtype), plan.everything
    aligned = _all_aligned(vectors, plan)
    weighted = aligned is not None
    dense = tensor.dtype == dtype and memory.is_contiguous()
    nodes: dict[Kept, Tensor] | None = None
    if dense and (_reads_in_place(plan, vectors) if weighted else not _reads_again(plan, tensor)):
        nodes = _reduce(plan, {everything: memory}, plan.steps, aligned, mean)
        if weighted and not _finite(nodes):
            nodes = None
    if nodes is None:
        try:
            nodes = _run_by_slabs(plan, memory, aligned, mean, copied=weighted or not dense)
        except RuntimeError:  # a batched backward pass, whose slabs do not go into nodes that are not batched
            if weighted or not dense:
                raise
            nodes = _reduce(plan, {everything: memory}, plan.steps, aligned, mean)
    if everything in plan.family:
        nodes[everything] = memory.to(dtype)
    return tuple(_to_logical(nodes[kept], plan, kept) for kept in plan.family)


def _reads_again(plan: Plan, tensor: Tensor) -> bool:
    """Tell whether a tensor is read from memory more than once, unless it is read slab by slab."""
    large = tensor.numel() * tensor.element_size() > slabs.CACHED
    return large and not tensor.is_meta and len(plan.first) > 1


def _reads_in_place(plan: Plan, vectors: Sequence[Vector]) -> bool:
    """Tell whether no step needs a temporary: weights that differ between samples need the batch outermost."""
    batch = len(plan.batch)
    return plan.permutation[:batch] == tuple(range(batch)) or all(v is None or v.dim() == 1 for v in vectors)


def _run_by_slabs(plan: Plan, memory: Tensor, aligned: Aligned, mean: bool, *, copied: bool) -> dict[Kept, Tensor]:
    """Execute a plan slab by slab, where all but the first reader of a slab find it in the cache.

    The tensor itself is only averaged into the first nodes of the tree, which add up over slabs; the rest of the tree
    is made of those.
    """
    dtype, shape = accumulation_dtype(memory.dtype), memory.shape
    nodes = {step.target: memory.new_zeros(_kept_shape(plan, step.target, shape), dtype=dtype) for step in plan.first}
    cuts = steps_of(shape, slabs.ELEMENTS)
    parts, *into = (_pieces(tensor, shape, cuts) for tensor in (memory, *nodes.values()))
    given = [None if vector is None else _pieces(vector, shape, cuts) for vector in aligned or ()]
    gone = cuts.count(1)
    axes = [tuple(range(max(0, first - gone), max(0, last - gone))) for first, last in (s.axes for s in plan.first)]
    factors = [1 / step.count if mean else 1.0 for step in plan.first]
    cut = [step.axes[0] < len(cuts) for step in plan.first]
    scratch = memory.new_empty(parts[0].numel() if copied else 0, dtype=dtype)
    for place, (part, *targets) in enumerate(zip(parts, *into, strict=True)):
        block = scratch[: part.numel()].view(part.shape).copy_(part) if copied else part
        if aligned is not None:
            weights = [None if pieces is None else pieces[place][(None,) * gone] for pieces in given]
            _add_weighted(targets, plan, block[(None,) * gone], weights, mean)
            continue
        for summed, factor, adds_up, target in zip(axes, factors, cut, targets, strict=True):
            if adds_up:
                _add_sum(target, block, summed, factor)
            else:
                (torch.mean if mean else torch.sum)(block, summed, keepdim=True, out=target)
    return _reduce(plan, nodes, plan.further, aligned, mean)


def _add_sum(target: Tensor, block: Tensor, axes: tuple[int, ...], factor: float) -> None:
    """Add a multiple of the sum of a slab over some of its first axes to what is there.

    Sums of slabs are made by themselves, so that there is no long run of additions to one total.
    """
    if not axes:
        target.add_(block, alpha=factor)
        return
    left, group, right, _, _ = _around(block.shape, axes[0], axes[-1] + 1)
    if left == 1 and right >= LONG:  # row by row: rows that lie a multiple of 4 KB apart would share cache lines
        target.add_(torch.mv(block.view(group, right).t(), block.new_full((group,), factor)).view(target.shape))
    else:
        target.add_(block.sum(axes, keepdim=True), alpha=factor)


def _add_weighted(targets: Sequence[Tensor], plan: Plan, block: Tensor, weights: Sequence[Vector], mean: bool) -> None:
    """Add the weighted sums of a slab to what is there."""
    found = _reduce(plan, {plan.everything: block}, plan.first, weights, mean)
    if not _finite(found):
        block = absent_as_zero(block, [weight for weight in weights if weight is not None])
        found = _reduce(plan, {plan.everything: block}, plan.first, weights, mean)
    for target, term in zip(targets, found.values(), strict=True):
        target.add_(term.view(target.shape))


def _finite(nodes: dict[Kept, Tensor]) -> bool:
    """Tell whether all means are finite; of tensors without values, assume so."""
    try:
        return all(bool(node.isfinite().all()) for node in nodes.values())
    except RuntimeError:
        return True


def absent_as_zero(tensor: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Replace what is not finite by zero where a weight is zero, since zero times it would be NaN.

    Args:
        tensor: Values.
        weights: Weights that broadcast to them.

    Returns:
        Values that can be multiplied by the weights.
    """
    present = functools.reduce(torch.logical_and, (weight > 0 for weight in weights))
    return torch.where(present | tensor.isfinite(), tensor, 0.0)


def _reduce(
    plan: Plan, nodes: dict[Kept, Tensor], steps: Sequence[Step], aligned: Aligned, mean: bool
) -> dict[Kept, Tensor]:
    """Execute steps on dense nodes in memory order, where reduced modes stay as dimensions of size 1.

    Returns the nodes given and made, but the tensor itself.
    """
    nodes = dict(nodes)
    for step in steps:
        node = nodes[step.source]
        weights, factor = _weights(plan, step, aligned, mean)
        if weights:
            nodes[step.target] = _reduce_by_weights(node, *step.axes, weights, factor)
        else:
            nodes[step.target] = _reduce_plainly(node, *step.axes, factor)
    nodes.pop(plan.everything, None)
    return nodes


def _weights(plan: Plan, step: Step, aligned: Aligned, mean: bool) -> tuple[Sequence[Tensor], float]:
    """Weights of the modes of a step, and what makes a mean of a sum over its other modes."""
    if aligned is None:
        return (), 1 / step.count if mean else 1.0
    plain = math.prod([plan.sizes[mode] for mode in step.reduced if aligned[mode] is None])
    return [w for mode in step.reduced if (w := aligned[mode]) is not None], 1 / plain if mean else 1.0


def _reduce_plainly(node: Tensor, first: int, last: int, factor: float) -> Tensor:
    """Sum the axes from one up to another, and multiply by a factor, with a view and one primitive."""
    left, group, right, reduced, primitive = _around(node.shape, first, last)
    if primitive == "view":
        return node if factor == 1 else node * factor
    if primitive == "sum":
        axes = tuple(range(first, last))
        if factor == 1 / group:
            return node.mean(axes, True)
        total = node.sum(axes, True)
        return total if factor == 1 else total.mul_(factor)
    if primitive == "mv":
        matrix = node.view(left, group) if right == 1 else node.view(group, right).t()
        return torch.mv(matrix, node.new_full((group,), factor)).view(reduced)
    rows, fold = node.view(left, group, right), folding(group, right)
    whole = group - group % fold
    folded = rows[:, :whole].view(left, whole // fold, fold * right)
    result = torch.bmm(node.new_full((1, 1, whole // fold), factor).expand(left, -1, -1), folded)
    if fold > 1:
        result = result.view(left, fold, right).sum(1)
    if whole < group:
        result.add_(rows[:, whole:].sum(1), alpha=factor)
    return result.view(reduced)


@functools.lru_cache(maxsize=4096)
def _around(shape: Sequence[int], first: int, last: int) -> tuple[int, int, int, tuple[int, ...], str]:
    """See a shape as ``(left, group, right)`` around some axes; also the shape without them, and the primitive."""
    left, group, right = math.prod(shape[:first]), math.prod(shape[first:last]), math.prod(shape[last:])
    reduced = (*shape[:first], *(1,) * (last - first), *shape[last:])
    return left, group, right, reduced, primitive_for(left, group, right)


def _reduce_by_weights(node: Tensor, first: int, last: int, weights: Sequence[Tensor], factor: float) -> Tensor:
    """Sum the axes from one up to another, each index with its weight, with a view and one product."""
    shape, places = node.shape, range(first, last)
    left, group, right, reduced, _ = _around(shape, first, last)
    if any(weight.numel() != math.prod(weight.shape[first:last]) for weight in weights):
        return _reduce_by_sample(node, places, weights, factor).reshape(reduced)
    vector = functools.reduce(torch.mul, weights) * factor
    vector = vector.expand(*(shape[axis] if axis in places else 1 for axis in range(len(shape)))).reshape(-1)
    if right == 1:
        return torch.mv(node.view(left, group), vector).view(reduced)
    if left == 1:
        return torch.mv(node.view(group, right).t(), vector).view(reduced)
    return torch.bmm(vector.expand(left, 1, group), node.view(left, group, right)).view(reduced)


def _reduce_by_sample(node: Tensor, places: range, weights: Sequence[Tensor], factor: float) -> Tensor:
    """Reduce adjacent axes by weights that differ between samples."""
    first, last, shape = places.start, places.stop, node.shape
    varying = [axis for axis in range(len(shape)) if axis not in places and any(w.shape[axis] != 1 for w in weights)]
    batch = varying[-1] + 1
    entries = math.prod(shape[:batch])
    if batch > first or entries == 0:
        return (functools.reduce(torch.mul, weights, node) * factor).sum(tuple(places), keepdim=True)
    left, group, right = (math.prod(shape[start:end]) for start, end in ((batch, first), (first, last), (last, None)))
    vector = functools.reduce(torch.mul, weights) * factor
    grid = (shape[axis] if axis < batch or axis in places else 1 for axis in range(len(shape)))
    vector = vector.expand(*grid).reshape(entries, group)
    if right == 1:
        return torch.bmm(node.reshape(entries, left, group), vector.unsqueeze(-1))
    if left == 1:
        return torch.bmm(vector.unsqueeze(1), node.reshape(entries, group, right))
    return torch.matmul(vector[:, None, None], node.reshape(entries, left, group, right))


def run_backwards(
    plan: Plan,
    parts: Sequence[Tensor],
    vectors: Sequence[Vector],
    mean: bool,
    dtype: torch.dtype,
    skip: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Execute the transpose of a plan: from the leaves of its tree to the root, which is written once.

    What is to be added on top (`skip`) joins in the same pass, and the result goes to `out` where it is given.
    """
    aligned = _all_aligned(vectors, plan)
    shape, root = plan.memory_shape, plan.everything
    terms: dict[Kept, list[Term]] = {}
    for kept, part in zip(plan.family, parts, strict=True):
        part = in_type(part, accumulation_dtype(part.dtype))  # sums of small parts are not rounded
        part = _to_memory(part, plan, kept)
        terms.setdefault(kept, []).append((part, None))
    for step in reversed(plan.steps):
        weights, factor = _weights(plan, step, aligned, mean)
        grad = _add_up(terms[step.target])
        scaled = grad if factor == 1 else grad * factor
        weight = functools.reduce(torch.mul, weights) if weights else None
        terms.setdefault(step.source, []).append((scaled, weight))
    if skip is not None:
        # first among those of its size: it may be what is written to, and is read before that
        terms[root].insert(0, (skip.permute(plan.permutation), None))
    if out is not None:
        result = out.permute(plan.permutation)
        _write(terms[root], result)
        return out
    result = parts[0].new_empty(shape, dtype=dtype)
    try:
        _write(terms[root], result)
    except RuntimeError:  # a batched backward pass, where some terms are batched and the result is not
        result = _add_up(terms[root]).expand(shape).to(dtype)
    return result if plan.in_order else result.permute(plan.inverse)


def _add_up(terms: Sequence[Term]) -> Tensor:
    """Add weighted terms that broadcast against each other."""
    if len(terms) == 1 and terms[0][1] is None:
        return terms[0][0]
    return functools.reduce(torch.add, (part if weight is None else part * weight for part, weight in terms))


def _write(terms: Sequence[Term], result: Tensor) -> None:
    """Write a sum of broadcast terms: one pass over memory, the rest within the cache."""
    if all(weight is None and part.dtype == result.dtype for part, weight in terms):
        _write_plainly([part for part, _ in terms], result)
        return
    steps = steps_of(result.shape, slabs.ELEMENTS)
    dtype = accumulation_dtype(result.dtype)
    tensors = (result, *(tensor for term in terms for tensor in term if tensor is not None))
    for target, *pieces in zip(*(_pieces(tensor, result.shape, steps) for tensor in tensors), strict=True):
        rest, total = iter(pieces), target.new_zeros(target.shape, dtype=dtype)
        for _, weight in terms:
            if weight is None:
                total.add_(next(rest))
            else:
                total.addcmul_(next(rest), next(rest))
        target.copy_(total)


def _write_plainly(parts: Sequence[Tensor], result: Tensor) -> None:
    """Write a sum of broadcast tensors of its type, the full-sized ones first."""
    first, *others = sorted(parts, key=lambda part: -part.numel())
    first = first.expand(result.shape)
    if len(others) < 2:
        torch.add(first, others[0], out=result) if others else result.copy_(first)
        return
    steps = [] if result.is_meta else steps_of(result.shape, slabs.ELEMENTS)
    tensors = (result, first, *others)
    for target, one, two, *rest in zip(*(_pieces(tensor, result.shape, steps) for tensor in tensors), strict=True):
        torch.add(one, two, out=target)
        for part in rest:
            target.add_(part)


def _pieces(tensor: Tensor, shape: Sequence[int], steps: Sequence[int]) -> list[Tensor]:
    """Cut a tensor that broadcasts to a shape into the slabs of that shape; dimensions of size 1 are taken whole.

    Dimensions of which a slab has one index only are gone.
    """
    pieces = [tensor]
    for size, step in zip(shape, steps, strict=False):  # all steps but the last are 1: what is cut is first
        if step == 1:
            pieces = [part for piece in pieces for part in _single(piece, size)]
        elif pieces[0].shape[0] == 1:
            pieces = [piece for piece in pieces for _ in range(0, size, step)]
        else:
            pieces = [part for piece in pieces for part in piece.split(step)]
    return pieces


def _single(piece: Tensor, size: int) -> Sequence[Tensor]:
    """Take the indices of the first dimension one by one; of one index, as often as there should be."""
    parts = piece.unbind()
    return parts if len(parts) == size else parts * size


def _all_aligned(vectors: Sequence[Vector], plan: Plan) -> Aligned:
    """View the weights of all modes so; nothing where none has any."""
    if all([vector is None for vector in vectors]):
        return None
    return [_aligned(vector, plan, mode) for mode, vector in enumerate(vectors)]


def _aligned(vector: Vector, plan: Plan, mode: int) -> Vector:
    """View the weights of a mode with one dimension for each of the tensor's, in memory order."""
    if vector is None:
        return None
    missing = len(plan.batch) - (vector.dim() - 1)
    shape = [1] * missing + list(vector.shape[:-1]) + [1] * (len(plan.sizes) + 1)
    shape[len(plan.batch) + mode] = vector.shape[-1]
    return vector.reshape(shape).permute(plan.permutation)


def _kept_shape(plan: Plan, kept: Kept, shape: Sequence[int]) -> list[int]:
    """Shape of a node in memory order, with reduced modes of size 1."""
    reduced = {axis for mode, axis in enumerate(plan.mode_axes) if mode not in kept}
    return [1 if axis in reduced else size for axis, size in enumerate(shape)]


def _to_logical(node: Tensor, plan: Plan, kept: Kept) -> Tensor:
    """Bring a node from memory order to ``(*batch, *kept sizes, D)``."""
    return (node if plan.in_order else node.permute(plan.inverse)).squeeze(plan.missing[kept])


def _to_memory(part: Tensor, plan: Plan, kept: Kept) -> Tensor:
    """Bring ``(*batch, *kept sizes, D)`` to memory order, with reduced modes of size 1."""
    for dim in plan.missing[kept]:
        part = part.unsqueeze(dim)
    return (part if plan.in_order else part.permute(plan.permutation)).contiguous()
