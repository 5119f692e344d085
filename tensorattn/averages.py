r"""Mode averages and outer sum, the adjoint pair that every operator stands on; the additive part of a tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tensorattn.contraction import contract, expand
from tensorattn.contraction_tree import main_effects
from tensorattn.errors import DtypeError, OptionError, ShapeError, retells
from tensorattn.fused import is_differentiated
from tensorattn.modes import GridShape, grid_shape
from tensorattn.presence import GivenWeights, Lengths, Mask, check_presence
from tensorattn.weighing import weighted_means
from tensorattn.weights import Vector, check_floating, check_weights, normalized

__all__ = ["additive_part", "check_whole", "interaction_residual", "mode_averages", "outer_sum"]


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
    given = check_presence(weights, mask, lengths, grid, tensor, of="tensor")
    means = weighted_means(tensor, main_effects(order), given.weights)
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
    check_whole((*first.batch, *sizes, first.dim), vectors, skip, out)
    return expand(vectors, main_effects(len(sizes)), GridShape(first.batch, sizes, first.dim), skip=skip, out=out)


def check_whole(shape: Sequence[int], sources: Sequence[Tensor], skip: Tensor | None, out: Tensor | None) -> None:
    """Check a tensor that is added to a result, and one that the result is written to.

    Args:
        shape: Shape of the result.
        sources: What the result is computed from.
        skip: What is added to it, or None.
        out: Where it is written, or None.

    Raises:
        ShapeError: If one has another shape.
        DtypeError: If one is not of the type of the sources.
        OptionError: If ``out`` is given where derivatives are asked for.
    """
    whole = {name: tensor for name, tensor in (("skip", skip), ("out", out)) if tensor is not None}
    check_floating(**{"the result": sources[0]}, **whole)
    for name, tensor in whole.items():
        if tuple(tensor.shape) != tuple(shape):
            raise ShapeError(f"{name} has shape {tuple(tensor.shape)}, but the result has {tuple(shape)}.")
    if out is not None and is_differentiated(*sources, *whole.values()):
        raise OptionError(
            "out is given where derivatives are asked for, but none goes through it.",
            hint="Use torch.no_grad(), or leave out.",
        )


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
    vectors = normalized(check_weights(weights, grid, tensor))
    *means, grand = contract(tensor, (*main_effects(order), ()), vectors)
    means[0] = means[0] - (order - 1) * grand.unsqueeze(-2)
    return expand(means, main_effects(order), grid, dtype=tensor.dtype)


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
