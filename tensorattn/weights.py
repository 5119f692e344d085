"""Position weights: how often each index of a mode counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tensorattn.errors import DtypeError, TensorAttentionError, WeightsError
from tensorattn.modes import GridShape, ModeSpec, mode_parts

__all__ = [
    "GridWeights",
    "Vector",
    "Vectors",
    "Weights",
    "accumulation_dtype",
    "beside",
    "broadcasts_to",
    "check_floating",
    "check_weight_values",
    "check_weights",
    "counting_dtype",
    "in_autocast",
    "in_type",
    "log_weights",
    "normalized",
    "real_tensor",
    "without_absent",
]

Vector = Tensor | None  # weights of one mode, ``(n_m,)`` or ``(*batch, n_m)``; None stands for equal weights
Vectors = tuple[Vector, ...]


@dataclass(frozen=True, eq=False)
class GridWeights:
    """Weights of positions that are no product of weights of modes.

    Attributes:
        tensor: One non-negative weight a position, ``(*batch, n_1, …, n_N)`` with batch dimensions that may be 1.
        order: Number of modes N.
        binary: Whether each is known to be 0 or 1, so that nothing need be multiplied by it.
    """

    tensor: Tensor
    order: int
    binary: bool = False


Weights = Vectors | GridWeights  # what every position counts: one vector a mode, or a tensor over the grid


def check_floating(**tensors: Tensor) -> None:
    """Check that tensors are of one floating-point type, and on one device.

    Args:
        **tensors: Tensors by the name of their argument.

    Raises:
        DtypeError: If one is not floating point, or two types or devices differ.
    """
    (first, reference), *_ = tensors.items()
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise DtypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}.")
        if not tensor.is_floating_point():
            raise DtypeError(f"{name} must be floating point, got {tensor.dtype}.")
        if tensor.dtype != reference.dtype:
            raise DtypeError(f"the type is {reference.dtype} in {first} but {tensor.dtype} in {name}.")
        if tensor.device != reference.device:
            raise DtypeError(f"the device is {reference.device} in {first} but {tensor.device} in {name}.")


def check_weights(
    weights: Sequence[Vector] | None,
    grid: GridShape,
    like: Tensor,
    modes: ModeSpec | None = None,
    *,
    part_of: int | None = None,
) -> Vectors:
    """Check position weights and bring them to the type that averages are accumulated in.

    Values are only looked at where they can be: not while tracing, under ``vmap`` or on the meta device.

    Args:
        weights: One vector a mode or None for equal weights; None for all modes.
        grid: Shape of the tensor that they weigh.
        like: A tensor of the type and device wanted.
        modes: What the modes are called.
        part_of: A mode of which the tensor is a part, whose weights may all be zero here.

    Returns:
        One vector or None a mode.

    Raises:
        WeightsError: If there are not N vectors, or one is no vector of real numbers, or has the wrong length, batch
            dimensions that do not broadcast, negative or infinite entries, or only zeros.
    """
    order = len(grid.sizes)
    if weights is None:
        return (None,) * order
    vectors = mode_parts(weights, order, "weights", "vectors", WeightsError)
    spec = ModeSpec.parse(order) if modes is None else modes
    checked: list[Vector] = []
    for index, (vector, size) in enumerate(zip(vectors, grid.sizes, strict=True)):
        if vector is not None:
            mode = spec.label(index)
            vector = real_tensor(vector, f"weights of mode {mode}", like, WeightsError)
            if vector.dim() == 0 or vector.shape[-1] != size:
                got = vector.shape[-1] if vector.dim() else "no dimension"
                raise WeightsError(f"weights of mode {mode} have length {got}, but the mode has size {size}.")
            if not broadcasts_to(vector.shape[:-1], grid.batch):
                raise WeightsError(
                    f"weights of mode {mode} have batch dimensions {tuple(vector.shape[:-1])}, "
                    f"which do not broadcast to {grid.batch}."
                )
            vector = vector.to(accumulation_dtype(like.dtype))
            check_weight_values(vector, f"weights of mode {mode}", "index", may_vanish=index == part_of)
        checked.append(vector)
    return tuple(checked)


def broadcasts_to(shape: Sequence[int], batch: Sequence[int]) -> bool:
    """Tell whether a shape broadcasts to the batch dimensions without adding to them.

    Args:
        shape: The shape.
        batch: The batch dimensions.
    """
    pairs = zip(reversed(shape), reversed(batch), strict=False)
    return len(shape) <= len(batch) and all(size in (1, other) for size, other in pairs)


def real_tensor(given: Any, what: str, like: Tensor, kind: type[TensorAttentionError]) -> Tensor:
    """Return real numbers, given as a tensor, an array or nested lists, as a tensor on a device.

    Args:
        given: The numbers.
        what: What they are, for messages.
        like: A tensor on the device wanted; lists become its accumulation type.
        kind: Class of the error.

    Returns:
        The tensor; one that was given keeps its type.

    Raises:
        TensorAttentionError: If they are no real numbers, of the class ``kind``.
    """
    if not isinstance(given, Tensor):
        try:
            given = torch.as_tensor(given, dtype=accumulation_dtype(like.dtype))
        except (TypeError, ValueError, RuntimeError):
            raise kind(f"{what} must be a tensor or numbers, got {given!r}.") from None
    if given.is_complex():
        raise kind(f"{what} must be real, got {given.dtype}.")
    return given.to(like.device)


def check_weight_values(weights: Tensor, what: str, noun: str, *, may_vanish: bool) -> None:
    """Refuse negative, infinite and all-zero weights, where values can be read.

    Args:
        weights: The weights.
        what: What they are called.
        noun: What each of them weighs.
        may_vanish: Whether they may all be zero.

    Raises:
        WeightsError: If they are refused.
    """
    if torch.compiler.is_compiling() or weights.is_meta or weights.numel() == 0:
        return
    try:
        lowest, highest = (bound.item() for bound in torch.aminmax(weights.detach()))
    except RuntimeError:  # under vmap, and for fake tensors, no value can be read
        return
    if not math.isfinite(lowest) or not math.isfinite(highest):
        raise WeightsError(f"{what} must be finite, got {lowest:g} to {highest:g}.")
    if lowest < 0:
        raise WeightsError(f"{what} must not be negative, got {lowest:g}.")
    if highest == 0 and not may_vanish:
        raise WeightsError(f"{what} are all zero, so no {noun} takes part.")


def in_type(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Bring a tensor to a type, at no cost where it has it: `Tensor.to` takes its time to find that out.

    Args:
        tensor: The tensor.
        dtype: The type.
    """
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def in_autocast(device: torch.device) -> bool:
    """Tell whether linear maps on a device choose a type of their own now.

    Args:
        device: The device.
    """
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)  # not on meta


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which averages of a type are accumulated: float32 for half precision."""
    return torch.float32 if dtype.itemsize < 4 else dtype


def counting_dtype(device: torch.device) -> torch.dtype:
    """Return the type in which weights of modes are multiplied, where products may be very large or small.

    Args:
        device: Device of the weights: MPS has no float64.
    """
    return torch.float32 if device.type == "mps" else torch.float64


def log_weights(weights: Tensor) -> Tensor:
    """Return logarithms of weights: minus infinity for absent indices, to which no gradient flows.

    Args:
        weights: Non-negative weights.
    """
    return torch.where(weights > 0, weights, 1.0).log().masked_fill(weights <= 0, -math.inf)


def normalized(weights: Vectors) -> Vectors:
    """Divide the weights of each mode by their sum; weights that sum to zero stay zero."""
    vectors: list[Vector] = []
    for vector in weights:
        if vector is not None:
            total = vector.sum(-1, keepdim=True)
            vector = vector / torch.where(total > 0, total, 1)
        vectors.append(vector)
    return tuple(vectors)


def beside(vector: Tensor, mode: int, order: int) -> Tensor:
    """View what belongs to the indices of a mode so that it broadcasts to the grid.

    Args:
        vector: ``(*batch, n_mode)``.
        mode: The mode.
        order: Number of modes N.

    Returns:
        The view ``(*batch, 1, …, n_mode, …, 1)``.
    """
    return vector.reshape(*vector.shape[:-1], *(vector.shape[-1] if k == mode else 1 for k in range(order)))


def without_absent(tensor: Tensor, present: Tensor) -> Tensor:
    """Return a tensor with zeros at absent positions, whatever it holds there; no gradient flows to them.

    Args:
        tensor: Values ``(*batch, n_1, …, n_N, D)``.
        present: Where positions take part, broadcastable to ``(*batch, n_1, …, n_N)``.
    """
    return torch.where(present.unsqueeze(-1), tensor, torch.zeros((), dtype=tensor.dtype, device=tensor.device))
