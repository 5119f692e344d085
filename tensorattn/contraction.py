r"""The adjoint pair: marginal means read a tensor, broadcast sums write one.

`contract` averages a tensor over modes along the tree of a plan; `expand` is its transpose along the same tree, run
backwards. Each is therefore the backward pass of the other, and nothing of the size of the tensor is kept between
them. While `torch.compile` or `torch.export` traces, and where gradients of the weights are asked for, the same
means are written as plain operations.

Weights are multiplicities :math:`w^m \ge 0` of the indices of a mode. Averages use them normalised,
:math:`u^m = w^m / \sum_a w^m_a`, so the marginal mean over the modes outside a kept subset :math:`U` is

.. math:: \bar x^U[a_U] = \sum_{j : j_U = a_U} \Big(\prod_{m \notin U} u^m[j_m]\Big) x_j .
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tensorattn.modes import GridShape
from tensorattn.planning import Family, Kept, Plan, make_plan, primitive_for
from tensorattn.weights import Vector, Vectors, accumulation_dtype

__all__ = ["contract", "expand"]

SLAB = 1 << 18  # elements copied at a time where a tensor cannot be read in place: 1 MB in float32


def contract(tensor: Tensor, family: Family, vectors: Vectors) -> tuple[Tensor, ...]:
    """Compute the marginal means of a family, unchecked.

    Args:
        tensor: Values ``(*batch, n_1, …, n_N, D)``.
        family: Kept mode subsets.
        vectors: Normalised weights of each mode, or None for equal weights.

    Returns:
        One tensor ``(*batch, *kept sizes, D)`` for each kept subset, in float32 for half precision.
    """
    everything = tuple(range(len(vectors)))
    smaller = tuple(kept for kept in family if kept != everything)
    if torch.compiler.is_compiling() or any(v is not None and v.requires_grad for v in vectors):
        means = _contract_plainly(tensor, smaller, vectors)
    else:
        means = _Contract.apply(tensor, smaller, True, *vectors) if smaller else ()
    found = dict(zip(smaller, means, strict=True))
    return tuple(tensor if kept == everything else found[kept] for kept in family)


def expand(parts: Sequence[Tensor], family: Family, grid: GridShape) -> Tensor:
    """Broadcast one part for each kept subset to the whole grid, and add them, unchecked.

    Args:
        parts: One tensor ``(*batch, *kept sizes, D)`` for each kept subset.
        family: Kept mode subsets.
        grid: Shape of the result.

    Returns:
        The tensor ``(*batch, n_1, …, n_N, D)``, contiguous, in the type of the parts.
    """
    if torch.compiler.is_compiling():
        return _expand_plainly(parts, family, grid)
    memory = tuple(range(len(grid.batch) + len(grid.sizes) + 1))
    vectors = (None,) * len(grid.sizes)
    return _Expand.apply(family, grid, memory, parts[0].dtype, False, *vectors, *parts)


class _Contract(torch.autograd.Function):
    """Marginal means, or plain sums, as a linear function of the tensor; the weights are constants."""

    @staticmethod
    def forward(tensor: Tensor, family: Family, mean: bool, *vectors: Vector) -> tuple[Tensor, ...]:
        grid = GridShape(*_split(tensor, len(vectors)))
        plan = make_plan(*grid, _memory_order(tensor), tensor.dtype.itemsize, family)
        return _run(plan, tensor, vectors, mean)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        tensor, ctx.family, ctx.mean, *ctx.vectors = inputs
        ctx.grid = GridShape(*_split(tensor, len(ctx.vectors)))
        ctx.memory, ctx.dtype = _memory_order(tensor), tensor.dtype

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        grad = _Expand.apply(ctx.family, ctx.grid, ctx.memory, ctx.dtype, ctx.mean, *ctx.vectors, *grads)
        return grad, None, None, *(None for _ in ctx.vectors)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> tuple[Tensor, ...]:
        return _Contract.apply(tangent, ctx.family, ctx.mean, *ctx.vectors)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], tensor: Tensor, family: Family, mean: bool, *vectors: Vector) -> Any:
        tensor = _to_front(tensor, in_dims[0], info.batch_size)
        batch_dims = tensor.dim() - len(vectors) - 2
        moved = _vectors_to_front(vectors, in_dims[3:], batch_dims)
        return _Contract.apply(tensor, family, mean, *moved), (0,) * len(family)


class _Expand(torch.autograd.Function):
    """The transpose of `_Contract`, as a linear function of its parts; the weights are constants."""

    @staticmethod
    def forward(
        family: Family,
        grid: GridShape,
        memory: tuple[int, ...],
        dtype: torch.dtype,
        mean: bool,
        *tensors: Any,
    ) -> Tensor:
        order = len(grid.sizes)
        plan = make_plan(*grid, memory, dtype.itemsize, family)
        return _run_backwards(plan, tensors[order:], tensors[:order], mean, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.family, ctx.grid, ctx.memory, ctx.dtype, ctx.mean, *tensors = inputs
        order = len(ctx.grid.sizes)
        ctx.vectors, ctx.part_dtype = tuple(tensors[:order]), tensors[order].dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        means = _Contract.apply(grad, ctx.family, ctx.mean, *ctx.vectors)
        return *(None for _ in range(5 + len(ctx.vectors))), *(mean.to(ctx.part_dtype) for mean in means)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        parts = tangents[5 + len(ctx.vectors) :]
        return _Expand.apply(ctx.family, ctx.grid, ctx.memory, ctx.dtype, ctx.mean, *ctx.vectors, *parts)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        family: Family,
        grid: GridShape,
        memory: tuple[int, ...],
        dtype: torch.dtype,
        mean: bool,
        *tensors: Any,
    ) -> Any:
        order, places = len(grid.sizes), in_dims[5:]
        vectors = _vectors_to_front(tensors[:order], places[:order], len(grid.batch))
        pairs = zip(tensors[order:], places[order:], strict=True)
        parts = [_to_front(part, place, info.batch_size) for part, place in pairs]
        grid = GridShape((info.batch_size, *grid.batch), grid.sizes, grid.dim)
        memory = (0, *(d + 1 for d in memory))
        return _Expand.apply(family, grid, memory, dtype, mean, *vectors, *parts), 0


def _to_front(tensor: Tensor, place: int | None, size: int) -> Tensor:
    """Make the dimension that `vmap` maps over the first batch dimension."""
    return tensor.expand(size, *tensor.shape) if place is None else tensor.movedim(place, 0)


def _vectors_to_front(vectors: Sequence[Vector], places: Sequence[int | None], batch_dims: int) -> list[Vector]:
    """Do the same for weights: mapped ones get all batch dimensions, the others broadcast as they are."""
    moved: list[Vector] = []
    for vector, place in zip(vectors, places, strict=True):
        if vector is not None and place is not None:
            vector = vector.movedim(place, 0)
            vector = vector.reshape(vector.shape[0], *(1,) * (batch_dims + 2 - vector.dim()), *vector.shape[1:])
        moved.append(vector)
    return moved


def _split(tensor: Tensor, order: int) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Split a shape into batch, mode sizes and channels, unchecked."""
    shape = tuple(tensor.shape)
    return shape[: -order - 1], shape[-order - 1 : -1], shape[-1]


def _memory_order(tensor: Tensor) -> tuple[int, ...]:
    """Return dimensions from the outermost to the innermost in memory; expanded ones count as outermost."""
    strides = tensor.stride()
    if 0 not in strides and all(a >= b for a, b in itertools.pairwise(strides)):
        return tuple(range(len(strides)))
    return tuple(sorted(range(len(strides)), key=lambda d: (strides[d] != 0, -strides[d], d)))


def _run(plan: Plan, tensor: Tensor, vectors: Sequence[Vector], mean: bool) -> tuple[Tensor, ...]:
    """Execute a plan: in place where the tensor is dense, else slab by slab through a small dense copy.

    The copy also converts half precision to float32, and bounds what weights that differ between samples cost.
    """
    memory = tensor.permute(plan.permutation)
    dtype = accumulation_dtype(tensor.dtype)
    aligned = [_aligned(vector, plan, mode) for mode, vector in enumerate(vectors)]
    shared = all(vector is None or vector.numel() == vector.shape[-1] for vector in vectors)
    if shared and tensor.dtype == dtype and memory.is_contiguous():
        nodes = _reduce(plan, memory, aligned, mean)
    else:
        shapes = {kept: _kept_shape(plan, kept, memory.shape) for kept in plan.family}
        nodes = {kept: tensor.new_zeros(shape, dtype=dtype) for kept, shape in shapes.items()}
        for slab in _slabs(memory.shape):
            block = memory[slab].to(dtype, memory_format=torch.contiguous_format, copy=True)
            pieces = [None if vector is None else vector[_within(slab, vector)] for vector in aligned]
            for kept, part in _reduce(plan, block, pieces, mean).items():
                if kept in nodes:
                    nodes[kept][_within(slab, nodes[kept])].add_(part)
    return tuple(_to_logical(nodes[kept], plan, kept) for kept in plan.family)


def _reduce(plan: Plan, root: Tensor, aligned: Sequence[Vector], mean: bool) -> dict[Kept, Tensor]:
    """Execute the steps on a dense tensor in memory order; reduced modes stay as dimensions of size 1."""
    axes = plan.mode_axes
    nodes = {tuple(range(len(axes))): root}
    for step in plan.steps:
        node, places = nodes[step.source], [axes[mode] for mode in step.reduced]
        plain = [mode for mode in step.reduced if aligned[mode] is None]
        factor = 1 / math.prod(plan.sizes[mode] for mode in plain) if mean else 1.0
        weights = [w for mode in step.reduced if (w := aligned[mode]) is not None]
        nodes[step.target] = _reduce_group(node, places, weights, factor)
    return nodes


def _reduce_group(node: Tensor, places: list[int], weights: list[Tensor], factor: float) -> Tensor:
    """Reduce one group of adjacent axes with a view and one primitive."""
    first, last = min(places), max(places) + 1
    shape = node.shape
    left, group, right = math.prod(shape[:first]), math.prod(shape[first:last]), math.prod(shape[last:])
    reduced = [1 if axis in places else size for axis, size in enumerate(shape)]
    if any(weight.numel() > math.prod(weight.shape[axis] for axis in places) for weight in weights):
        product = functools.reduce(torch.mul, weights, node)  # weights differ between samples
        return (product * factor).sum(places, keepdim=True)
    primitive = primitive_for(left, group, right)
    if not weights and primitive == "view":
        return node * factor if factor != 1 else node
    if not weights and primitive == "sum":
        return node.reshape(left, group, right).sum(1).mul_(factor).reshape(reduced)
    if weights:
        vector = functools.reduce(torch.mul, weights) * factor
        vector = vector.expand(*(shape[axis] if axis in places else 1 for axis in range(len(shape)))).reshape(-1)
    else:
        vector = node.new_full((group,), factor)
    if right == 1:
        return torch.mv(node.reshape(left, group), vector).reshape(reduced)
    if left == 1:
        return torch.mv(node.reshape(group, right).t(), vector).reshape(reduced)
    return torch.matmul(vector.expand(left, 1, group), node.reshape(left, group, right)).reshape(reduced)


def _run_backwards(
    plan: Plan, parts: Sequence[Tensor], vectors: Sequence[Vector], mean: bool, dtype: torch.dtype
) -> Tensor:
    """Execute the transpose of a plan: from the leaves of its tree to the root, which is written once."""
    axes = plan.mode_axes
    aligned = [_aligned(vector, plan, mode) for mode, vector in enumerate(vectors)]
    shape = [(*plan.batch, *plan.sizes, plan.dim)[d] for d in plan.permutation]
    root = tuple(range(len(axes)))
    terms: dict[Kept, list[tuple[Tensor, Tensor | None]]] = {}
    for kept, part in zip(plan.family, parts, strict=True):
        terms.setdefault(kept, []).append((_to_memory(part, plan, kept), None))
    for step in reversed(plan.steps):
        plain = [mode for mode in step.reduced if aligned[mode] is None]
        factor = 1 / math.prod(plan.sizes[mode] for mode in plain) if mean else 1.0
        weights = [w for mode in step.reduced if (w := aligned[mode]) is not None]
        grad = _add_up(terms[step.target])
        scaled = grad if factor == 1 else grad * factor
        weight = functools.reduce(torch.mul, weights) if weights else None
        terms.setdefault(step.source, []).append((scaled, weight))
    result = _write(terms[root], shape, dtype)
    return result.permute([plan.permutation.index(d) for d in range(len(shape))])


def _add_up(terms: list[tuple[Tensor, Tensor | None]]) -> Tensor:
    """Add weighted terms that broadcast against each other, all small."""
    return functools.reduce(torch.add, (part if weight is None else part * weight for part, weight in terms))


def _write(terms: list[tuple[Tensor, Tensor | None]], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Write the sum of broadcast terms into a fresh tensor: two terms in the first pass, one in each further pass."""
    plain = [part for part, weight in terms if weight is None]
    weighted = [(part, weight) for part, weight in terms if weight is not None]
    if len(plain) > 1 and not weighted:
        first, second, *plain = plain
        if first.dtype == dtype and torch.broadcast_shapes(first.shape, second.shape) == tuple(shape):
            result = torch.add(first, second)
        else:
            result = torch.add(first.expand(shape), second, out=first.new_empty(shape, dtype=dtype))
    elif weighted:
        part, weight = weighted.pop()
        result = (part * weight).expand(shape).contiguous()
    else:
        result = plain.pop().expand(shape).to(dtype, memory_format=torch.contiguous_format, copy=True)
    for part in plain:
        result.add_(part)
    for part, weight in weighted:
        result.addcmul_(part, weight)
    return result.to(dtype)


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
    node = node.permute([plan.permutation.index(d) for d in range(node.dim())])
    return node.squeeze([len(plan.batch) + mode for mode in range(len(plan.sizes)) if mode not in kept])


def _to_memory(part: Tensor, plan: Plan, kept: Kept) -> Tensor:
    """Bring ``(*batch, *kept sizes, D)`` to memory order, with reduced modes of size 1."""
    for mode in range(len(plan.sizes)):
        if mode not in kept:
            part = part.unsqueeze(len(plan.batch) + mode)
    return part.permute(plan.permutation).contiguous()


def _slabs(shape: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """Cut a tensor in memory order into slabs of at most `SLAB` elements."""
    inner = math.prod(shape)
    ranges: list[list[slice]] = []
    for size in shape:
        if inner <= SLAB:
            break
        inner //= size
        step = max(1, SLAB // inner)
        ranges.append([slice(start, start + step) for start in range(0, size, step)])
    yield from itertools.product(*ranges)


def _within(slab: tuple[slice, ...], tensor: Tensor) -> tuple[slice, ...]:
    """Restrict a slab to a tensor that broadcasts: dimensions of size 1 are taken whole."""
    pairs = zip(slab, tensor.shape, strict=False)
    return tuple(slice(None) if size == 1 else part for part, size in pairs)


def _contract_plainly(tensor: Tensor, family: Family, vectors: Vectors) -> tuple[Tensor, ...]:
    """Compute marginal means by plain operations in an order that depends on the number of modes alone."""
    order = len(vectors)
    found: dict[Kept, Tensor] = {}

    def average(node: Tensor, reduced: Kept) -> Tensor:
        dims = [mode - order - 1 for mode in reduced if vectors[mode] is None]
        for mode in reduced:
            vector = vectors[mode]
            if vector is not None:
                vector = vector.reshape(*vector.shape, *(1,) * (order - mode))
                aligned = vector.reshape(
                    *vector.shape[: vector.dim() - order + mode - 1],
                    *(1,) * mode,
                    *vector.shape[vector.dim() - order + mode - 1 :],
                )
                node = (node * aligned).sum(mode - order - 1, keepdim=True)
        return node.mean(dims, keepdim=True) if dims else node

    def descend(node: Tensor, present: Kept, wanted: Family) -> None:
        half = len(present) // 2
        sides = [(present[:half], present[half:]), (present[half:], present[:half])]
        for kept in wanted:
            if kept == present:
                found[kept] = node
            elif not any(set(kept) <= set(side) for side, _ in sides if side != present):
                found[kept] = average(node, tuple(mode for mode in present if mode not in kept))
        for side, other in sides:
            below = tuple(kept for kept in wanted if set(kept) <= set(side) and kept not in found)
            if below and other:
                descend(average(node, other), side, below)

    descend(tensor.to(accumulation_dtype(tensor.dtype)), tuple(range(order)), family)
    gone = {kept: [mode - order - 1 for mode in range(order) if mode not in kept] for kept in family}
    return tuple(found[kept].squeeze(gone[kept]) for kept in family)


def _expand_plainly(parts: Sequence[Tensor], family: Family, grid: GridShape) -> Tensor:
    """Broadcast and add by plain operations."""
    total = None
    for kept, part in zip(family, parts, strict=True):
        for mode in range(len(grid.sizes)):
            if mode not in kept:
                part = part.unsqueeze(len(grid.batch) + mode)
        total = part if total is None else total + part
    assert total is not None
    return total.expand(*grid.batch, *grid.sizes, grid.dim)
