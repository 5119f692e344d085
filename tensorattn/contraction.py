r"""The adjoint pair: marginal means read a tensor, broadcast sums write one.

`contract` averages a tensor over modes along the tree of a plan; `expand` is its transpose along the same tree, run
backwards. Each is therefore the backward pass of the other, and nothing of the size of the tensor is kept between
them. While `torch.compile` or `torch.export` traces, where gradients of the weights are asked for, and where there are
few elements, the same means are written as plain operations.

Weights are multiplicities :math:`w^m \ge 0` of the indices of a mode. Averages use them normalised,
:math:`u^m = w^m / \sum_a w^m_a`, so the marginal mean over the modes outside a kept subset :math:`U` is

.. math:: \bar x^U[a_U] = \sum_{j : j_U = a_U} \Big(\prod_{m \notin U} u^m[j_m]\Big) x_j .
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tensorattn import slabs
from tensorattn.contraction_tree import Family, Kept
from tensorattn.execution import absent_as_zero, memory_order, run, run_backwards, split_shape
from tensorattn.fused import is_differentiated, is_transformed, positional
from tensorattn.handover import take_over
from tensorattn.modes import GridShape
from tensorattn.planning import make_plan
from tensorattn.weights import Vector, Vectors, accumulation_dtype, in_type

__all__ = ["contract", "contract_through", "expand"]


def contract(tensor: Tensor, family: Family, vectors: Vectors) -> tuple[Tensor, ...]:
    """Compute the marginal means of a family, unchecked.

    Args:
        tensor: Values ``(*batch, n_1, …, n_N, D)``.
        family: Kept mode subsets.
        vectors: Normalised weights of each mode, or None for equal weights.

    Returns:
        One tensor ``(*batch, *kept sizes, D)`` for each kept subset, in float32 for half precision.
    """
    return contract_through(tensor, family, vectors)[0]


def contract_through(tensor: Tensor, family: Family, vectors: Vectors) -> tuple[tuple[Tensor, ...], Tensor]:
    """Compute marginal means, unchecked, and pass the tensor through for further use.

    The derivative of what is done with the tensor that is passed through joins that of the means in one pass.

    Args:
        tensor: Values ``(*batch, n_1, …, n_N, D)``.
        family: Kept mode subsets.
        vectors: Normalised weights of each mode, or None for equal weights.

    Returns:
        The means as `contract` gives them, and the tensor.
    """
    everything = tuple(range(len(vectors)))
    smaller = tuple(kept for kept in family if kept != everything) if everything in family else family
    passed = tensor
    if torch.compiler.is_compiling() or any(v is not None and is_differentiated(v) for v in vectors):
        means = _contract_plainly(tensor, smaller, vectors)
    elif not smaller:
        means = ()
    elif tensor.numel() <= slabs.SMALL and all([v is None for v in vectors]) and _needs_no_function(tensor):
        means = _contract_at_once(tensor, smaller, len(vectors))
    elif is_transformed(tensor):
        *means, passed = _Contract.apply(tensor, smaller, True, *vectors)
    else:
        grid, memory = split_shape(tensor, len(vectors)), memory_order(tensor)
        means = run(make_plan(*grid, memory, tensor.dtype.itemsize, smaller), tensor, vectors, True)
    if smaller is family:
        return tuple(means), passed
    found = dict(zip(smaller, means, strict=True))
    return tuple(passed if kept == everything else found[kept] for kept in family), passed


def expand(
    parts: Sequence[Tensor],
    family: Family,
    grid: GridShape,
    *,
    dtype: torch.dtype | None = None,
    skip: Tensor | None = None,
    out: Tensor | None = None,
    like: Tensor | None = None,
) -> Tensor:
    """Broadcast one part for each kept subset to the whole grid, and add them, unchecked.

    Args:
        parts: One tensor ``(*batch, *kept sizes, D)`` for each kept subset.
        family: Kept mode subsets.
        grid: Shape of the result.
        dtype: Type of the result; that of the parts by default.
        skip: A tensor of the shape of the result that is added in the same pass.
        out: Where to write the result, without derivatives.
        like: A tensor of the shape of the result whose order in memory the result takes; ``skip`` by default.

    Returns:
        The tensor ``(*batch, n_1, …, n_N, D)``: ``out``, or a new one, contiguous if there is nothing like it.
    """
    dtype = parts[0].dtype if dtype is None else dtype
    if torch.compiler.is_compiling():
        total = _expand_plainly(parts, family, grid)
        total = (total if skip is None else total + skip).to(dtype)
        return total if out is None else out.copy_(total)
    memory = tuple(range(len(grid.batch) + len(grid.sizes) + 1))
    like = out if out is not None else skip if like is None else like
    if like is not None and 0 not in like.stride():
        memory = memory_order(like)
    if out is not None:  # what is read is not to be written over
        memory_of_out = out.untyped_storage().data_ptr()
        parts = [part.clone() if part.untyped_storage().data_ptr() == memory_of_out else part for part in parts]
    if math.prod(grid.batch) * math.prod(grid.sizes) * grid.dim <= slabs.SMALL:
        return _expand_at_once(parts, family, grid, memory, dtype, skip, out)
    vectors = (None,) * len(grid.sizes)
    if out is None and is_transformed(*parts, *(() if skip is None else (skip,))):
        return _Expand.apply(family, grid, memory, dtype, False, skip, *vectors, *parts)
    plan = make_plan(*grid, memory, dtype.itemsize, family)
    return run_backwards(plan, parts, vectors, False, dtype, skip, out)


class _Contract(torch.autograd.Function):
    """Marginal means, or plain sums, as a linear function of the tensor, and the tensor; the weights are constants."""

    @staticmethod
    @positional
    def forward(tensor: Tensor, family: Family, mean: bool, *vectors: Vector) -> tuple[Tensor, ...]:
        grid = GridShape(*split_shape(tensor, len(vectors)))
        plan = make_plan(*grid, memory_order(tensor), tensor.dtype.itemsize, family)
        return *run(plan, tensor, vectors, mean), tensor.view_as(tensor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        tensor, ctx.family, ctx.mean, *ctx.vectors = inputs
        ctx.grid = GridShape(*split_shape(tensor, len(ctx.vectors)))
        ctx.memory, ctx.dtype = memory_order(tensor), tensor.dtype
        ctx.means = [(mean.shape, mean.dtype, mean.device) for mean in output[:-1]]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        *of_means, passed = grads
        parts = [
            torch.zeros(shape, dtype=dtype, device=device) if grad is None else grad
            for grad, (shape, dtype, device) in zip(of_means, ctx.means, strict=True)
        ]
        if passed is not None and passed.dtype == ctx.dtype and take_over(passed) and not torch.is_grad_enabled():
            plan = make_plan(*ctx.grid, ctx.memory, ctx.dtype.itemsize, ctx.family)
            run_backwards(plan, parts, ctx.vectors, ctx.mean, ctx.dtype, passed, passed)
            return passed, None, None, *(None for _ in ctx.vectors)
        grad = _Expand.apply(ctx.family, ctx.grid, ctx.memory, ctx.dtype, ctx.mean, passed, *ctx.vectors, *parts)
        return grad, None, None, *(None for _ in ctx.vectors)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> tuple[Tensor, ...]:
        return _Contract.apply(tangent, ctx.family, ctx.mean, *ctx.vectors)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], tensor: Tensor, family: Family, mean: bool, *vectors: Vector) -> Any:
        tensor = _to_front(tensor, in_dims[0], info.batch_size)
        batch_dims = tensor.dim() - len(vectors) - 2
        moved = _vectors_to_front(vectors, in_dims[3:], batch_dims)
        return _Contract.apply(tensor, family, mean, *moved), (0,) * (len(family) + 1)


class _Expand(torch.autograd.Function):
    """The transpose of `_Contract`, as a linear function of its parts and of `skip`; the weights are constants."""

    @staticmethod
    @positional
    def forward(
        family: Family,
        grid: GridShape,
        memory: tuple[int, ...],
        dtype: torch.dtype,
        mean: bool,
        skip: Tensor | None,
        *tensors: Any,
    ) -> Tensor:
        order = len(grid.sizes)
        plan = make_plan(*grid, memory, dtype.itemsize, family)
        return run_backwards(plan, tensors[order:], tensors[:order], mean, dtype, skip)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.family, ctx.grid, ctx.memory, ctx.dtype, ctx.mean, skip, *tensors = inputs
        order = len(ctx.grid.sizes)
        ctx.vectors, ctx.part_dtype = tuple(tensors[:order]), tensors[order].dtype
        ctx.skip_dtype = None if skip is None else skip.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        *means, passed = _Contract.apply(grad, ctx.family, ctx.mean, *ctx.vectors)
        skip = None if ctx.skip_dtype is None else passed.to(ctx.skip_dtype)
        nothing = (None for _ in ctx.vectors)
        return None, None, None, None, None, skip, *nothing, *(mean.to(ctx.part_dtype) for mean in means)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        skip, parts = tangents[5], tangents[6 + len(ctx.vectors) :]
        return _Expand.apply(ctx.family, ctx.grid, ctx.memory, ctx.dtype, ctx.mean, skip, *ctx.vectors, *parts)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        family: Family,
        grid: GridShape,
        memory: tuple[int, ...],
        dtype: torch.dtype,
        mean: bool,
        skip: Tensor | None,
        *tensors: Any,
    ) -> Any:
        order, places = len(grid.sizes), in_dims[6:]
        vectors = _vectors_to_front(tensors[:order], places[:order], len(grid.batch))
        pairs = zip(tensors[order:], places[order:], strict=True)
        parts = [_to_front(part, place, info.batch_size) for part, place in pairs]
        skip = None if skip is None else _to_front(skip, in_dims[5], info.batch_size)
        grid = GridShape((info.batch_size, *grid.batch), grid.sizes, grid.dim)
        memory = (0, *(d + 1 for d in memory))
        return _Expand.apply(family, grid, memory, dtype, mean, skip, *vectors, *parts), 0


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


def _contract_plainly(tensor: Tensor, family: Family, vectors: Vectors) -> tuple[Tensor, ...]:
    """Compute marginal means by plain operations in an order that depends on the number of modes alone."""
    order = len(vectors)
    found: dict[Kept, Tensor] = {}
    aligned = {mode: _beside(vector, mode, order) for mode, vector in enumerate(vectors) if vector is not None}

    def average(node: Tensor, reduced: Kept) -> Tensor:
        for mode in reduced:
            if mode in aligned:
                node = (node * aligned[mode]).sum(mode - order - 1, keepdim=True)
        dims = [mode - order - 1 for mode in reduced if mode not in aligned]
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

    root = tensor.to(accumulation_dtype(tensor.dtype))
    descend(absent_as_zero(root, list(aligned.values())) if aligned else root, tuple(range(order)), family)
    gone = {kept: [mode - order - 1 for mode in range(order) if mode not in kept] for kept in family}
    return tuple(found[kept].squeeze(gone[kept]) for kept in family)


def _needs_no_function(tensor: Tensor) -> bool:
    """Tell whether plain operations do what `_Contract` does: derivatives are rounded once, and lie as the tensor."""
    wide = tensor.dtype == accumulation_dtype(tensor.dtype)
    return (wide and tensor.is_contiguous()) or not is_transformed(tensor)


def _contract_at_once(tensor: Tensor, family: Family, order: int) -> tuple[Tensor, ...]:
    """Compute plain marginal means of few elements, each by itself, which takes fewer calls than sharing work."""
    dtype, batch = accumulation_dtype(tensor.dtype), tensor.dim() - order - 1
    gone = [tuple([batch + mode for mode in range(order) if mode not in kept]) for kept in family]
    return tuple([tensor.mean(dims, dtype=dtype) for dims in gone])


def _beside(vector: Tensor, mode: int, order: int) -> Tensor:
    """View weights ``(*batch, n_mode)`` so that they broadcast to ``(*batch, n_1, …, n_N, D)``."""
    batch, size = vector.shape[:-1], vector.shape[-1]
    return vector.reshape(*batch, *(size if k == mode else 1 for k in range(order)), 1)


def _expand_at_once(
    parts: Sequence[Tensor],
    family: Family,
    grid: GridShape,
    memory: tuple[int, ...],
    dtype: torch.dtype,
    skip: Tensor | None,
    out: Tensor | None,
) -> Tensor:
    """Broadcast and add few elements by plain operations, into their order in memory."""
    wide = [in_type(part, accumulation_dtype(part.dtype)) for part in parts]  # sums of small parts are not rounded
    *others, last = _side_by_side(wide, family, grid) + ([] if skip is None else [skip])
    if not others:  # what is returned shares no memory with what is given
        others = [torch.zeros_like(last)]
    total, shape, dims = functools.reduce(torch.add, others), (*grid.batch, *grid.sizes, grid.dim), range(len(memory))
    if out is None and memory == tuple(dims):
        return in_type(total + last, dtype).expand(shape).contiguous()
    inverse = [memory.index(dim) for dim in dims]
    if out is None and is_transformed(total, last):
        return in_type(total + last, dtype).expand(shape).permute(memory).contiguous().permute(inverse)
    if out is None:
        out = parts[0].new_empty([shape[dim] for dim in memory], dtype=dtype).permute(inverse)
    return torch.add(total, last.expand(shape), out=out)


def _side_by_side(parts: Sequence[Tensor], family: Family, grid: GridShape) -> list[Tensor]:
    """View parts so that they broadcast against each other."""
    batch, viewed = len(grid.batch), []
    for kept, part in zip(family, parts, strict=True):
        for mode in range(len(grid.sizes)):
            if mode not in kept:
                part = part.unsqueeze(batch + mode)
        viewed.append(part)
    return viewed


def _expand_plainly(parts: Sequence[Tensor], family: Family, grid: GridShape) -> Tensor:
    """Broadcast and add by plain operations."""
    total = functools.reduce(torch.add, _side_by_side(parts, family, grid))
    return total.expand(*grid.batch, *grid.sizes, grid.dim)
