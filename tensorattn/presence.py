"""Which positions take part, and how often each counts: mask, lengths and weights, checked and brought together here.

All three say the same kind of thing, a multiplicity of every position, so they multiply: a mask is a weight of 0 or 1,
and lengths are a mask that is a product over modes. Whatever is a product over modes is kept as one vector a mode,
since averages are exact and fast with it; a mask is looked at for that, where its values can be read.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tensorattn.errors import DtypeError, ShapeError, WeightsError
from tensorattn.modes import GridShape, ModeSpec, mode_parts
from tensorattn.weights import (
    GridWeights,
    Vector,
    Vectors,
    Weights,
    accumulation_dtype,
    beside,
    broadcasts_to,
    check_weight_values,
    check_weights,
    real_tensor,
)

__all__ = ["GivenWeights", "Lengths", "Mask", "Presence", "check_presence"]

GivenWeights = Sequence[Vector] | Tensor | None  # one vector a mode, or a tensor over the grid
Mask = Tensor | None
Lengths = Tensor | Sequence[Tensor | Sequence[int] | int | None] | None


class Presence(NamedTuple):
    """What was said of the positions of a grid.

    Attributes:
        weights: How often each counts.
        present: Where positions take part, bool and broadcastable to ``(*batch, n_1, …, n_N)``; None if neither a mask
            nor lengths were given.
        indices: Whether the weights tell how often the indices of each mode count, not those of positions alone: they
            are vectors, or a mask.
    """

    weights: Weights
    present: Tensor | None
    indices: bool


def check_presence(
    weights: GivenWeights,
    mask: Mask,
    lengths: Lengths,
    grid: GridShape,
    like: Tensor,
    modes: ModeSpec | None = None,
    *,
    of: str = "key",
    part_of: int | None = None,
) -> Presence:
    """Check weights, a mask and lengths, and bring them together.

    Args:
        weights: One vector a mode, or a tensor over the grid, or None.
        mask: Bool over the grid, True where a position takes part, with batch dimensions that broadcast; or None.
        lengths: How many leading indices of each mode take part: integers ``(*batch, N)``, or one entry a mode, an
            integer or one for each sample or None for all; or None.
        grid: Shape of the tensor that they speak of.
        like: A tensor of the type and device wanted.
        modes: What the modes are called.
        of: Name of that tensor, for messages.
        part_of: A mode of which the tensor is a part, whose weights may all be zero here.

    Returns:
        What they say together.

    Raises:
        WeightsError: If weights are refused, or lengths are negative or longer than their mode.
        DtypeError: If the mask is not bool, or lengths are no integers.
        ShapeError: If the mask or lengths do not fit the grid.
    """
    order = len(grid.sizes)
    if weights is None and mask is None and lengths is None:
        return Presence((None,) * order, None, True)
    spec = ModeSpec.parse(order) if modes is None else modes
    shown = None if mask is None else _check_mask(mask, grid, like, spec, of)
    seen: Sequence[Vector] = [None] * order if lengths is None else _check_lengths(lengths, grid, like, spec)
    whole: Tensor | None = None
    vectors: Sequence[Vector] = [None] * order
    if isinstance(weights, Tensor) or hasattr(weights, "ndim"):
        whole = _check_whole_weights(weights, grid, like, spec, of)
    else:
        vectors = check_weights(weights, grid, like, spec, part_of=part_of)
    indices = whole is None
    if shown is not None:
        product = _separated(shown, order)
        if product is None:
            indices = indices and all(vector is None for vector in vectors)
            whole = shown.to(accumulation_dtype(like.dtype)) if whole is None else whole * shown
        else:
            vectors = [_times(vector, part) for vector, part in zip(vectors, product, strict=True)]
    dtype = accumulation_dtype(like.dtype)
    vectors = [_times(vector, part) for vector, part in zip(vectors, seen, strict=True)]
    present = [beside(part, mode, order) for mode, part in enumerate(seen) if part is not None]
    present = present if shown is None else [shown, *present]
    return Presence(
        _together(vectors, whole, grid, dtype, binary=weights is None),
        functools.reduce(torch.logical_and, present) if present else None,
        indices,
    )


def _together(
    vectors: Sequence[Vector], whole: Tensor | None, grid: GridShape, dtype: torch.dtype, *, binary: bool
) -> Weights:
    """Multiply weights of modes and of positions; at order 1 they are the same."""
    order = len(vectors)
    held: Vectors = tuple(None if vector is None else vector.to(dtype) for vector in vectors)
    if whole is None:
        return held
    for mode, vector in enumerate(held):
        whole = whole if vector is None else whole * beside(vector, mode, order)
    whole = whole.to(dtype)
    if order == 1:
        return (whole,)
    missing = len(grid.batch) + order - whole.dim()
    return GridWeights(whole.reshape(*(1,) * missing, *whole.shape), order, binary)


def _times(vector: Vector, part: Vector) -> Vector:
    """Multiply weights with a part of a mask."""
    if vector is None or part is None:
        return part if vector is None else vector
    return vector * part


def _check_over_grid(tensor: Tensor, what: str, grid: GridShape, modes: ModeSpec, of: str, kind: Any) -> None:
    """Check that a tensor has one entry a position."""
    order = len(grid.sizes)
    if tensor.dim() < order:
        raise kind(f"{what} has {tensor.dim()} dimensions, but order {order} needs at least {order}.")
    for mode, (size, own) in enumerate(zip(grid.sizes, tensor.shape[tensor.dim() - order :], strict=True)):
        if size != own:
            raise kind(f"mode {modes.label(mode)} has size {own} in {what} but {size} in {of}.")
    batch = tuple(tensor.shape[: tensor.dim() - order])
    if not broadcasts_to(batch, grid.batch):
        raise kind(f"{what} has batch dimensions {batch}, which do not broadcast to {grid.batch}.")


def _check_whole_weights(weights: Any, grid: GridShape, like: Tensor, modes: ModeSpec, of: str) -> Tensor:
    """Check weights given as one tensor over the grid."""
    tensor = real_tensor(weights, "weights", like, WeightsError)
    _check_over_grid(tensor, "weights", grid, modes, of, WeightsError)
    tensor = tensor.to(accumulation_dtype(like.dtype))
    check_weight_values(tensor, "weights", "position", may_vanish=False)
    return tensor


def _check_mask(mask: Any, grid: GridShape, like: Tensor, modes: ModeSpec, of: str) -> Tensor:
    """Check a mask."""
    if not isinstance(mask, Tensor):
        try:
            mask = torch.as_tensor(mask)
        except (TypeError, ValueError, RuntimeError):
            raise DtypeError(f"mask must be a tensor of bool, got {mask!r}.") from None
    if mask.dtype != torch.bool:
        raise DtypeError(
            f"mask must be bool, True where a position takes part, but has the type {mask.dtype}.",
            hint="Numbers that say how much a position counts are weights: give them as weights.",
        )
    _check_over_grid(mask, "mask", grid, modes, of, ShapeError)
    return mask.to(like.device)


def _check_lengths(lengths: Any, grid: GridShape, like: Tensor, modes: ModeSpec) -> list[Vector]:
    """Check lengths, and turn them into a mask a mode."""
    order = len(grid.sizes)
    if getattr(lengths, "ndim", 0):
        if lengths.shape[-1] != order:
            raise ShapeError(f"lengths has {lengths.shape[-1]} columns, but order {order} needs one a mode.")
        lengths = [lengths[..., mode] for mode in range(order)]
    parts = mode_parts(lengths, order, "lengths", "entries", ShapeError)
    return [
        None if given is None else _check_length(given, size, modes.label(mode), grid, like)
        for mode, (given, size) in enumerate(zip(parts, grid.sizes, strict=True))
    ]


def _check_length(given: Any, size: int, mode: str, grid: GridShape, like: Tensor) -> Tensor:
    """Check the lengths of one mode."""
    what = f"lengths of mode {mode}"
    try:
        length = given if isinstance(given, Tensor) else torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError):
        raise DtypeError(f"{what} must be integers, got {given!r}.") from None
    if length.dtype == torch.bool or length.is_floating_point() or length.is_complex():
        raise DtypeError(f"{what} must be integers, but have the type {length.dtype}.")
    if not broadcasts_to(length.shape, grid.batch):
        raise ShapeError(f"{what} have the shape {tuple(length.shape)}, which does not broadcast to {grid.batch}.")
    if not torch.compiler.is_compiling() and not length.is_meta and length.numel():
        try:
            lowest, highest = (bound.item() for bound in torch.aminmax(length))
        except RuntimeError:  # under vmap, and for fake tensors, no value can be read
            lowest, highest = 0, size
        for number in (lowest, highest):
            if not 0 <= number <= size:
                raise WeightsError(f"{what} must be from 0 to its size {size}, got {number}.")
    return torch.arange(size, device=like.device) < length.to(like.device).unsqueeze(-1)


def _separated(mask: Tensor, order: int) -> tuple[Tensor, ...] | None:
    """Return the projections of a mask on its modes if it is their product, in every sample; None if not, or unknown.

    Where values cannot be read a mask stays whole, which gives the same numbers.
    """
    if order == 1:
        return (mask,)
    if torch.compiler.is_compiling() or mask.is_meta:
        return None
    projections = []
    for mode in range(order):
        others = [k - order for k in range(order) if k != mode]
        projections.append(mask.any(others))
    product = functools.reduce(torch.logical_and, (beside(part, k, order) for k, part in enumerate(projections)))
    try:
        return tuple(projections) if torch.equal(product, mask) else None
    except RuntimeError:  # under vmap, and for fake tensors
        return None
