r"""Mode averages and outer sum, the adjoint pair that every operator stands on; the additive part of a tensor.

`marginal_means` averages a tensor along the tree of `tensorattn.averages.plan`, `broadcast_sum` is its transpose: each
is the backward pass of the other, and nothing of the size of the tensor is kept between them. While `torch.compile` or
`torch.export` records a graph the same steps are plain operations.

Weights are multiplicities :math:`w^m \ge 0` of the indices of a mode. Averages use them normalised,
:math:`u^m = w^m / \sum_a w^m_a`, so the marginal mean over the modes outside a kept subset :math:`U` is

.. math:: \bar x^U[a_U] = \sum_{j : j_U = a_U} \Big(\prod_{m \notin U} u^m[j_m]\Big) x_j .

With a weight :math:`w_j` for each position it is the weighted mean of the slice, and zero where nothing is in it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tensorattn.averages.plan import memory_order, tree
from tensorattn.errors import DtypeError, OptionError, ShapeError, retells
from tensorattn.masks import (
    GivenWeights,
    Lengths,
    Mask,
    Vector,
    Weights,
    accumulation_dtype,
    beside,
    check_floating,
    counting_dtype,
    is_recorded,
    is_transformed,
    nonzero,
    read_weights,
    without_absent,
)
from tensorattn.modes import Family, Kept, grid_shape, main_effects, positions_behind

__all__ = [
    "additive_part",
    "broadcast_sum",
    "check_same_shape",
    "interaction_residual",
    "marginal_means",
    "mode_averages",
    "outer_sum",
    "position_counts",
]

_tree = functools.lru_cache(maxsize=1024)(tree)


def marginal_means(tensor: Tensor, family: Family, weights: Weights) -> tuple[Tensor, ...]:
    """Compute the marginal means of a family, unchecked.

    Args:
        tensor: Values ``(*batch, n_1, …, n_N, D)``.
        family: Kept mode subsets.
        weights: Weights of the positions.

    Returns:
        One tensor ``(*batch, *kept sizes, D)`` for each kept subset, in float32 for half precision; the tensor itself
        for that of all modes.
    """
    whole, everything = tensor, tuple(range(weights.order))
    smaller = tuple([kept for kept in family if kept != everything])
    if not smaller:
        return (tensor,) * len(family)
    if weights.grid is not None:
        means = _means_over_positions(tensor, smaller, weights)
    elif weights.plain and is_transformed(tensor) and not is_recorded():
        means = _Means.apply(tensor, smaller, weights.order)
    else:
        shown = weights.shown()
        if shown is not None:  # zero times what is absent might be NaN
            tensor = torch.where(shown.unsqueeze(-1) | tensor.isfinite(), tensor, 0.0)
        means = _walk(tensor, smaller, weights.vectors)
    found = dict(zip(smaller, means, strict=True))
    return tuple([found.get(kept, whole) for kept in family])


def _walk(tensor: Tensor, family: Family, vectors: Sequence[Vector]) -> tuple[Tensor, ...]:
    """Walk the tree from a tensor to its marginal means; modes averaged out stay as dimensions of size 1."""
    order, dtype = len(vectors), accumulation_dtype(tensor.dtype)
    first = tensor.dim() - order - 1
    if is_recorded():  # a graph should not depend on sizes
        edges = tree(tuple(range(order)), family)
    else:
        modes = tuple([dim - first for dim in memory_order(tensor.stride()) if first <= dim < first + order])
        edges = _tree(modes, family, tuple(tensor.shape[first:-1]))
    nodes = {tuple(range(order)): tensor}
    for source, group in edges:
        given = [(mode, vector) for mode, vector in enumerate(vectors) if mode in group and vector is not None]
        node = nodes[source]
        if given:
            shares = functools.reduce(torch.mul, [beside(_shares(vector), mode, order) for mode, vector in given])
            node = (node * shares.unsqueeze(-1)).sum([mode - order - 1 for mode, _ in given], keepdim=True)
        dims = [first + mode for mode in group if vectors[mode] is None]
        nodes[tuple([mode for mode in source if mode not in group])] = (
            node.mean(dims, True, dtype=dtype) if dims else node
        )
    return tuple([_without_modes(nodes[kept], kept, order) for kept in family])


def _shares(vector: Tensor) -> Tensor:
    """Divide weights by their sum; where all are zero they stay so."""
    return vector / nonzero(vector.sum(-1, keepdim=True))


def _without_modes(node: Tensor, kept: Kept, order: int) -> Tensor:
    """Remove the dimensions of size 1 of modes that are averaged out."""
    return node.squeeze([mode - order - 1 for mode in range(order) if mode not in kept])


def _means_over_positions(tensor: Tensor, family: Family, weights: Weights) -> tuple[Tensor, ...]:
    """Average a tensor multiplied by the weight of each position, and divide by the average weight."""
    order, weight = weights.order, weights.over_grid()
    assert weight is not None
    weights = dataclasses.replace(weights, grid=weight)  # a factor of all weights leaves means as they are
    weighed = without_absent(tensor, weight > 0)
    if not weights.binary:
        weighed = weighed.to(accumulation_dtype(tensor.dtype)) * weight.unsqueeze(-1)
    means = marginal_means(weighed, family, Weights((None,) * order))
    sizes, found = tensor.shape[tensor.dim() - order - 1 : -1], []
    for kept, mean, count in zip(family, means, position_counts(weights, sizes, family), strict=True):
        factor = torch.where(count > 0, positions_behind(sizes, kept) / nonzero(count), 0.0)
        found.append(mean * factor.to(mean.dtype).unsqueeze(-1))
    return tuple(found)


def position_counts(weights: Weights, sizes: Sequence[int], family: Family) -> tuple[Tensor, ...]:
    """Add up the weights of the positions behind each marginal mean.

    Args:
        weights: Weights that are not plain.
        sizes: Sizes of the modes.
        family: Kept mode subsets.

    Returns:
        One tensor ``(*batch, *kept sizes)`` for each, with batch dimensions that may be fewer or 1.
    """
    order, grid = weights.order, weights.grid
    if grid is not None:
        counted = grid.to(counting_dtype(grid.device))
        gone = [[mode - order for mode in range(order) if mode not in kept] for kept in family]
        return tuple([counted.sum(dims) if dims else counted for dims in gone])
    vectors = [None if v is None else v.to(counting_dtype(v.device)) for v in weights.vectors]
    like = next(vector for vector in vectors if vector is not None)
    return tuple([_product_count(vectors, sizes, kept, like) for kept in family])


def _product_count(vectors: Sequence[Vector], sizes: Sequence[int], kept: Kept, like: Tensor) -> Tensor:
    """Multiply the weights of the indices of the kept modes, and the total weights of the others."""
    factors = [like.new_ones([sizes[mode] for mode in kept])]
    for mode, (vector, size) in enumerate(zip(vectors, sizes, strict=True)):
        if vector is None:
            factors[0] = factors[0] if mode in kept else factors[0] * size
        elif mode in kept:
            factors.append(beside(vector, kept.index(mode), len(kept)))
        else:
            factors.append(vector.sum(-1)[(..., *(None,) * len(kept))])
    return functools.reduce(torch.mul, factors)


class _Means(torch.autograd.Function):
    """Marginal means of equal weights, as a linear function of a tensor."""

    generate_vmap_rule = True

    @staticmethod
    def forward(tensor: Tensor, family: Family, order: int) -> tuple[Tensor, ...]:
        return _walk(tensor, family, (None,) * order)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        tensor, ctx.family, ctx.order = inputs
        ctx.shape, ctx.dtype, ctx.memory = tuple(tensor.shape), tensor.dtype, memory_order(tensor.stride())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        sizes = ctx.shape[len(ctx.shape) - ctx.order - 1 : -1]
        parts = [grad / positions_behind(sizes, kept) for grad, kept in zip(grads, ctx.family, strict=True)]
        return broadcast_sum(parts, ctx.family, ctx.shape, ctx.memory).to(ctx.dtype), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> tuple[Tensor, ...]:
        return marginal_means(tangent, ctx.family, Weights((None,) * ctx.order))


class _BroadcastSum(torch.autograd.Function):
    """The transpose of `_Means` but for its factors: a linear function of parts."""

    generate_vmap_rule = True

    @staticmethod
    def forward(family: Family, shape: tuple[int, ...], memory: tuple[int, ...], *parts: Tensor) -> Tensor:
        return _add_up(parts, family, shape, memory)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.family, ctx.shape, ctx.memory, *parts = inputs
        ctx.dtype = parts[0].dtype
        ctx.order = len(ctx.shape) - 1 - (parts[0].dim() - 1 - len(ctx.family[0]))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        means = marginal_means(grad, ctx.family, Weights((None,) * ctx.order))
        sizes = ctx.shape[len(ctx.shape) - ctx.order - 1 : -1]
        counts = [positions_behind(sizes, kept) for kept in ctx.family]
        return None, None, None, *[(mean * count).to(ctx.dtype) for mean, count in zip(means, counts, strict=True)]

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return _BroadcastSum.apply(ctx.family, ctx.shape, ctx.memory, *tangents[3:])


def broadcast_sum(
    parts: Sequence[Tensor], family: Family, shape: Sequence[int], memory: Sequence[int] | None = None
) -> Tensor:
    """Broadcast one part for each kept subset to the whole grid, and add them, unchecked.

    Args:
        parts: One tensor ``(*batch, *kept sizes, D)`` for each kept subset.
        family: Kept mode subsets.
        shape: Shape of the result ``(*batch, n_1, …, n_N, D)``.
        memory: Dimensions of the result from the outermost to the innermost in memory; in their order if None.

    Returns:
        The tensor, of the type of the parts and with memory of its own.
    """
    shape, memory = tuple(shape), tuple(range(len(shape)) if memory is None else memory)
    if is_recorded() or 0 in shape or not is_transformed(*parts):  # a part of a grid may be empty: no means of nothing
        return _add_up(parts, family, shape, memory)
    return _BroadcastSum.apply(family, shape, memory, *parts)


def _add_up(parts: Sequence[Tensor], family: Family, shape: tuple[int, ...], memory: tuple[int, ...]) -> Tensor:
    """Add parts in the order of memory, the outermost modes first, so that one sum is as large as the result."""
    batch = parts[0].dim() - len(family[0]) - 1
    order, in_order = len(shape) - batch - 1, list(memory) == list(range(len(shape)))
    viewed = {}
    for kept, part in zip(family, parts, strict=True):
        places = [batch + mode for mode in range(order) if mode not in kept]
        for place in places:
            part = part.unsqueeze(place)
        innermost = max([memory.index(batch + mode) for mode in kept], default=-1)
        viewed[innermost, kept] = part if in_order else part.permute(memory).contiguous()
    total = functools.reduce(torch.add, [viewed[key] for key in sorted(viewed)])
    whole = [shape[dim] for dim in memory]
    if len(parts) == 1 or list(total.shape) != whole:
        total = total.expand(whole).clone(memory_format=torch.contiguous_format)
    return total if in_order else total.permute([memory.index(dim) for dim in range(len(shape))])


@retells
def mode_averages(
    tensor: Tensor,
    *,
    order: int,
    weights: GivenWeights = None,
    mask: Mask = None,
    lengths: Lengths = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    r"""Average a tensor over all modes but one, for every mode.

    The N results are the main effects of the tensor plus its mean,
    :math:`\bar x^m[a] = \sum_{j : j_m = a} \prod_{l \ne m} u^l[j_l]\, x_j`, with equal weights
    :math:`u^l = 1/n_l` or the normalised ``weights``. Half precision is accumulated in float32. The tensor is read
    where it is, whatever its strides.

    Args:
        tensor: Values to average. Floating point.
        order: Number of modes N.
        weights: One non-negative vector a mode or None for equal weights, or one tensor over the grid: multiplicities,
            so 2 counts an index or a position twice and 0 leaves it out.
        mask: True where a position takes part. One that is no product over modes takes a copy of the tensor; the
            average over no position is then zero.
        lengths: How many leading indices of each mode take part: ``(*batch, N)``, or one entry a mode.
        dtype: Type of the results; that of ``tensor`` by default.

    Returns:
        One tensor a mode, in mode order.

    Raises:
        ShapeError: If ``tensor`` has fewer than ``order + 1`` dimensions or an empty mode, or the mask or lengths do
            not fit it.
        DtypeError: If ``tensor`` is not of a floating-point type, the mask is not bool, or lengths are not integers.
        WeightsError: If weights have the wrong length, are negative, not finite, or all zero, or a length is negative
            or longer than its mode.

    Shape:
        - tensor: :math:`(*, n_1, \dots, n_N, D)`
        - weights: :math:`(n_m)` or :math:`(*, n_m)` a mode, or :math:`(*, n_1, \dots, n_N)` as the mask
        - result m: :math:`(*, n_m, D)`

    Examples:
        >>> rows, columns = mode_averages(torch.arange(6.0).view(2, 3, 1), order=2)
        >>> rows[:, 0], columns[:, 0]
        (tensor([1., 4.]), tensor([1.5000, 2.5000, 3.5000]))
        >>> rows, columns = mode_averages(torch.arange(6.0).view(2, 3, 1), order=2, lengths=[2, 2])
        >>> rows[:, 0]
        tensor([0.5000, 3.5000])
    """
    check_floating(tensor=tensor)
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise DtypeError(f"dtype must be a torch.dtype such as torch.float32, got {dtype!r}.")
    if dtype is not None and not dtype.is_floating_point:
        raise DtypeError(f"dtype must be floating point, got {dtype}.")
    grid = grid_shape(tensor.shape, order, "tensor")
    given = read_weights(weights, mask, lengths, grid, tensor, of="tensor")
    means = marginal_means(tensor, main_effects(order), given)
    wanted = tensor.dtype if dtype is None else dtype
    return tuple(mean.to(wanted, copy=mean is tensor) for mean in means)


@retells
def outer_sum(vectors: Sequence[Tensor], *, skip: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    r"""Add one vector a mode into a tensor: the broadcast sum.

    :math:`y_{j} = \sum_m v^m[j_m]`. It is the transpose of summing a tensor over all modes but one, so
    :math:`\langle \mathrm{outer\_sum}(v), x \rangle = \sum_m \langle v^m, \tfrac{P}{n_m} \bar x^m \rangle`.

    Args:
        vectors: One tensor a mode, all with the same batch dimensions, channels and type.
        skip: A tensor of the shape of the result that is added in the same pass over memory, and read there alone.
        out: Where to write the result: a tensor of its shape and type, any strides. No derivative goes through it.

    Returns:
        The tensor :math:`(*, n_1, \dots, n_N, D)`: ``out`` where it is given, else a new one, which lies in memory
        as ``skip`` does.

    Raises:
        ShapeError: If there is no vector, batch dimensions or channels disagree, or ``skip`` or ``out`` has not the
            shape of the result.
        DtypeError: If a tensor is not of a floating-point type, or the types differ.
        OptionError: If ``out`` is given where derivatives are asked for.

    Shape:
        - vectors[m]: :math:`(*, n_m, D)`
        - result: :math:`(*, n_1, \dots, n_N, D)`

    Examples:
        >>> rows, columns = torch.tensor([[10.0], [20.0]]), torch.tensor([[1.0], [2.0], [3.0]])
        >>> outer_sum([rows, columns])[..., 0]
        tensor([[11., 12., 13.],
                [21., 22., 23.]])
    """
    if not isinstance(vectors, (Sequence, Tensor)):
        raise ShapeError(f"vectors must hold one tensor a mode, got {vectors!r}.")
    if len(vectors) == 0:
        raise ShapeError("vectors is empty, but every mode needs one.")
    named = {f"vectors[{mode}]": vector for mode, vector in enumerate(vectors)}
    check_floating(**named)
    first = grid_shape(vectors[0].shape, 1, "vectors[0]")
    for name, vector in named.items():
        grid = grid_shape(vector.shape, 1, name)
        if grid.batch != first.batch:
            raise ShapeError(f"batch dimensions are {first.batch} in vectors[0] but {grid.batch} in {name}.")
        if grid.dim != first.dim:
            raise ShapeError(f"channels are {first.dim} in vectors[0] but {grid.dim} in {name}.")
    sizes = tuple(vector.shape[-2] for vector in vectors)
    shape = (*first.batch, *sizes, first.dim)
    for name, tensor in (("skip", skip), ("out", out)):
        if tensor is not None:
            check_same_shape(name, tensor, shape, vectors[0])
    if out is not None:
        _check_out(out, vectors, skip)
    like = out if skip is None else skip
    total = broadcast_sum(vectors, main_effects(len(sizes)), shape, None if like is None else _memory_of(like))
    total = total if skip is None else total + skip
    return total if out is None else out.copy_(total)


def _memory_of(tensor: Tensor) -> tuple[int, ...] | None:
    """Return how what is like a tensor should lie in memory; None for the order of dimensions, as in a graph."""
    return None if torch.compiler.is_compiling() or 0 in tensor.stride() else memory_order(tensor.stride())


def check_same_shape(name: str, tensor: Any, shape: Sequence[int], like: Tensor) -> None:
    """Check that a tensor can be added to a result.

    Args:
        name: Name of the argument.
        tensor: What was given.
        shape: Shape of the result.
        like: A tensor of the type and device of the result.

    Raises:
        ShapeError: If it has another shape.
        DtypeError: If it is not of that type, or elsewhere.
    """
    check_floating(**{"the result": like, name: tensor})
    if tuple(tensor.shape) != tuple(shape):
        raise ShapeError(f"{name} has shape {tuple(tensor.shape)}, but the result has {tuple(shape)}.")


def _check_out(out: Tensor, vectors: Sequence[Tensor], skip: Tensor | None) -> None:
    """Refuse to write where derivatives are asked for, or where something is still to be read."""
    if is_transformed(out, *vectors, *(() if skip is None else (skip,))):
        raise OptionError(
            "out is given where derivatives are asked for, but none goes through it.",
            hint="Use torch.no_grad(), or leave out.",
        )
    named = {f"vectors[{mode}]": vector for mode, vector in enumerate(vectors)}
    same = skip is not None and (skip.data_ptr(), skip.stride()) == (out.data_ptr(), out.stride())
    for name, read in {**named, **({} if skip is None or same else {"skip": skip})}.items():
        if _extent(out)[0] < _extent(read)[1] and _extent(read)[0] < _extent(out)[1]:
            raise OptionError(f"out overlaps with {name} in memory.", hint="Give a tensor with memory of its own.")
    if any(size > 1 and stride == 0 for size, stride in zip(out.shape, out.stride(), strict=True)):
        raise OptionError("out is expanded: several of its elements are one in memory.")


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Return the addresses between which a tensor lies; none on a device without memory."""
    if tensor.is_meta or not tensor.numel():
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


@retells
def additive_part(tensor: Tensor, *, order: int, weights: Sequence[Vector] | None = None) -> Tensor:
    r"""Project a tensor on the additive ones: the sum of its mode averages less N−1 times its mean.

    :math:`\sum_m \bar x^m[j_m] - (N-1) \bar x` is the tensor closest to ``tensor``, in the weighted squared
    distance, among all that are a sum of one term a mode.

    Args:
        tensor: Values. Floating point.
        order: Number of modes N.
        weights: One non-negative vector a mode, or None for equal weights.

    Returns:
        The additive part, of the shape and type of ``tensor``.

    Raises:
        ShapeError: If ``tensor`` has fewer than ``order + 1`` dimensions or an empty mode.
        DtypeError: If ``tensor`` is not of a floating-point type.
        WeightsError: If weights have the wrong length, are negative, not finite, or all zero.

    Shape:
        - tensor and result: :math:`(*, n_1, \dots, n_N, D)`

    Examples:
        >>> additive_part(torch.tensor([[0.0, 1.0], [1.0, 4.0]])[..., None], order=2)[..., 0]
        tensor([[-0.5000,  1.5000],
                [ 1.5000,  3.5000]])
    """
    check_floating(tensor=tensor)
    grid = grid_shape(tensor.shape, order, "tensor")
    given = read_weights(weights, None, None, grid, tensor)
    *means, grand = marginal_means(tensor, (*main_effects(order), ()), given)
    means[0] = means[0] - (order - 1) * grand.unsqueeze(-2)
    return broadcast_sum(means, main_effects(order), tensor.shape, _memory_of(tensor)).to(tensor.dtype)


@retells
def interaction_residual(tensor: Tensor, *, order: int, weights: Sequence[Vector] | None = None) -> Tensor:
    r"""Subtract the additive part: what no sum of one term a mode can express.

    The residual averages to zero over every slice :math:`\{j : j_m = a\}`.

    Args:
        tensor: Values. Floating point.
        order: Number of modes N.
        weights: One non-negative vector a mode, or None for equal weights.

    Returns:
        ``tensor - additive_part(tensor)``.

    Raises:
        ShapeError: If ``tensor`` has fewer than ``order + 1`` dimensions or an empty mode.
        DtypeError: If ``tensor`` is not of a floating-point type.
        WeightsError: If weights have the wrong length, are negative, not finite, or all zero.

    Shape:
        - tensor and result: :math:`(*, n_1, \dots, n_N, D)`

    Examples:
        >>> interaction_residual(torch.tensor([[0.0, 1.0], [1.0, 4.0]])[..., None], order=2)[..., 0]
        tensor([[ 0.5000, -0.5000],
                [-0.5000,  0.5000]])
    """
    return tensor - additive_part(tensor, order=order, weights=weights)
