"""Which positions take part, and how often each counts: weights, a mask and lengths, brought together in one object.

All three say the same kind of thing, a multiplicity of every position, so they multiply: a mask is a weight of 0 or 1,
and lengths are a mask that is a product over modes. Whatever is a product over modes is kept as one vector a mode,
since averages are exact with it; a mask is looked at for that, where its values can be read. All that is asked of
values is read from the device at once.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tensorattn.errors import DtypeError, ModesError, ShapeError, TensorAttentionError, WeightsError
from tensorattn.modes import GridShape, ModeSpec, mode_parts

__all__ = [
    "GivenWeights",
    "Lengths",
    "Mask",
    "Part",
    "Vector",
    "Vectors",
    "Weights",
    "accumulation_dtype",
    "beside",
    "beside_others",
    "broadcasts_to",
    "check_floating",
    "counting_dtype",
    "in_autocast",
    "is_recorded",
    "is_transformed",
    "log_weights",
    "matmul",
    "nonzero",
    "one_a_mode",
    "read_weights",
    "readable",
    "real_tensor",
    "relative",
    "without_absent",
    "without_autocast",
]

Vector = Tensor | None  # weights of one mode, ``(n_m,)`` or ``(*batch, n_m)``; None stands for ones
Vectors = tuple[Vector, ...]
GivenWeights = Sequence[Any] | Tensor | None  # one vector a mode, or a tensor over the grid
Mask = Tensor | None
Lengths = Tensor | Sequence[Any] | Mapping[Any, Any] | None


@dataclass(frozen=True, eq=False)
class Part:
    """Where a tensor stands in a larger one, of which each process or each step holds a part: a box of its grid.

    Attributes:
        sizes: Sizes of the modes of the whole.
        start: The first index of the part in each mode.
        lengths: Number of indices of the part in each mode.
        total: From what makes sums over the positions of the part to the sums over all parts; or, told a mode, over
            those that differ in others alone.
        gather: From a tensor, a mode and its dimension to the tensor with the indices of all parts along that mode, or,
            told so, with the one index that each part has; None where no part sees another.
        exchange: From a tensor, a mode and its dimension to the tensor with the indices of all parts along that mode,
            of which the next dimension is cut; or, told its length, back.
        cuts: From each mode of which processes hold parts to the number of indices of each of them.
    """

    sizes: tuple[int, ...]
    start: tuple[int, ...]
    lengths: tuple[int, ...]
    total: Callable[[Callable[[], list[Tensor]], int | None], list[Tensor]]
    gather: Callable[[Tensor, int, int, bool], Tensor] | None = None
    exchange: Callable[[Tensor, int, int, int | None], Tensor] | None = None
    cuts: Mapping[int, Sequence[int]] = field(default_factory=dict)

    def without(self, mode: int) -> Part:
        """Return the same part of the other modes, where the indices of one are a batch dimension."""
        others = [k for k in range(len(self.sizes)) if k != mode]
        sizes, start, lengths = (tuple([each[k] for k in others]) for each in (self.sizes, self.start, self.lengths))
        total, gather = self.total, self.gather
        return Part(
            sizes,
            start,
            lengths,
            lambda make, _: total(make, mode),
            gather and (lambda tensor, k, dim, one: gather(tensor, others[k], dim, one)),
        )

    def every(self, tensor: Tensor, mode: int, dim: int) -> Tensor:
        """Return a tensor of the part with the indices of all parts along a mode."""
        return tensor if self.gather is None else self.gather(tensor, mode, dim, False)

    def along(self, function: Callable[..., Tensor], tensors: Sequence[Tensor], mode: int, batch: int) -> Tensor:
        """Call a function of whole fibres of a mode on tensors of the part; what it returns is of the part again.

        Args:
            function: From tensors ``(*batch, n_mode, columns, D)`` to one with other channels. Columns are some of the
                places in the other modes.
            tensors: Each ``(*batch, l_1, …, l_N, D)``.
            mode: The mode.
            batch: Number of batch dimensions.
        """
        moved = [tensor.movedim(batch + mode, batch) for tensor in tensors]
        others, exchange = moved[0].shape[batch + 1 : -1], self.exchange
        assert exchange is not None
        flat = [each.reshape(*each.shape[: batch + 1], math.prod(others), each.shape[-1]) for each in moved]
        found = function(*[exchange(each, mode, batch, None) for each in flat])
        found = exchange(found, mode, batch, math.prod(others))
        return found.reshape(*found.shape[: batch + 1], *others, found.shape[-1]).movedim(batch, batch + mode)

    def whole(self, tensor: Tensor, batch: int) -> Tensor:
        """Gather a tensor of the part ``(*batch, l_1, …, l_N, D)``."""
        assert self.gather is not None  # what needs every position is refused before
        for mode in range(len(self.sizes)):
            tensor = self.gather(tensor, mode, batch + mode, False)
        return tensor

    def own(self, tensor: Tensor, mode: int, dim: int) -> Tensor:
        """Return what of a tensor over all indices of a mode is of the part; what is of it already as it is."""
        length = self.lengths[mode]
        return tensor if length == tensor.shape[dim] else tensor.narrow(dim, self.start[mode], length)

    def box(self, tensor: Tensor, first: int = 0) -> Tensor:
        """Return what of a tensor over the whole grid, whose dimensions start at one of its own, is of the part."""
        for mode in range(len(self.sizes)):
            tensor = self.own(tensor, mode, first + mode)
        return tensor


@dataclass(frozen=True, eq=False)
class Weights:
    """How often each position of a grid counts.

    Attributes:
        vectors: One vector a mode or None, whose product the weights are.
        grid: One weight a position, ``(*batch, n_1, …, n_N)`` with batch dimensions that may be 1, where they are no
            product over modes; the vectors are then None.
        present: Where positions take part, bool and broadcastable to ``(*batch, n_1, …, n_N)``; None if neither a mask
            nor lengths were given.
        binary: Whether each weight is known to be 0 or 1.
        indices: Whether they tell how often the indices of each mode count, not those of positions alone.
        part: Where the grid stands in a larger one, of which it is a part; None where it is the whole.
    """

    vectors: Vectors
    grid: Tensor | None = None
    present: Tensor | None = None
    binary: bool = True
    indices: bool = True
    part: Part | None = None

    @property
    def order(self) -> int:
        """Number of modes N."""
        return len(self.vectors)

    @property
    def plain(self) -> bool:
        """Whether every position is known to count once."""
        return self.grid is None and all([vector is None for vector in self.vectors])

    def over_grid(self) -> Tensor | None:
        """Return one weight a position up to a factor a sample, broadcastable to the grid; None where each counts once.

        The factor keeps products of many large or small weights within the range of their type.
        """
        if self.grid is not None:
            return self.grid if self.binary else relative(self.grid, self.order)
        found = beside_others([None if vector is None else relative(vector, 1) for vector in self.vectors])
        return functools.reduce(torch.mul, found) if found else None

    def shown(self) -> Tensor | None:
        """Return where positions have a weight that is not zero, broadcastable to the grid; None where all have."""
        if self.grid is not None:
            return self.grid > 0
        found = beside_others([None if vector is None else vector > 0 for vector in self.vectors])
        return functools.reduce(torch.logical_and, found) if found else None

    def with_vector(self, mode: int, vector: Tensor) -> Weights:
        """Return weights of which those of a mode are others."""
        return dataclasses.replace(self, vectors=(*self.vectors[:mode], vector, *self.vectors[mode + 1 :]))


def read_weights(
    weights: GivenWeights,
    mask: Mask,
    lengths: Lengths,
    grid: GridShape,
    like: Tensor,
    modes: ModeSpec | None = None,
    *,
    of: str = "key",
    part_of: Collection[int] = (),
    part: Part | None = None,
) -> Weights:
    """Check weights, a mask and lengths, and bring them together.

    Args:
        weights: One vector a mode, or a tensor over the grid, or None.
        mask: Bool over the grid, True where a position takes part, with batch dimensions that broadcast; or None.
        lengths: How many leading indices of each mode take part: integers ``(*batch, N)``, or one entry a mode, an
            integer or one for each sample or None for all, or a mapping from modes; or None.
        grid: Shape of the tensor that they speak of.
        like: A tensor of the type and device wanted.
        modes: What the modes are called.
        of: Name of that tensor, for messages.
        part_of: Modes of which the tensor is a part, whose weights may all be zero here. A mask stays whole then, as
            whether it is a product is for all parts to tell.
        part: Where the tensor stands in a larger one, all modes of which it is a part of; lengths are those of the
            larger one then.

    Returns:
        What they say together.

    Raises:
        WeightsError: If weights are refused, or lengths are negative or longer than their mode.
        DtypeError: If the mask is not bool, or lengths are no integers.
        ShapeError: If the mask or lengths do not fit the grid.
        ModesError: If lengths name a mode that does not exist.
    """
    order = len(grid.sizes)
    if weights is None and mask is None and lengths is None:
        return Weights((None,) * order, part=part)
    reader = _Reader(grid, like, ModeSpec.parse(order) if modes is None else modes, of)
    part_of = part_of if part is None else range(order)
    dtype = accumulation_dtype(like.dtype)
    shown = None if mask is None else reader.mask(mask)
    seen = (None,) * order if lengths is None else reader.lengths(lengths, part)
    whole = reader.whole(weights, bool(part_of)) if isinstance(weights, Tensor) or hasattr(weights, "ndim") else None
    vectors: Vectors = (None,) * order
    if whole is None and weights is not None:
        vectors = reader.vectors(weights, part_of)
    projections = None if shown is None or (part_of and order > 1) else reader.projections(shown)
    is_product = reader.answers()
    indices = whole is None
    if shown is not None:
        if projections is not None and (order == 1 or is_product):
            vectors = tuple(map(_times, vectors, projections))
        else:
            indices = indices and all(vector is None for vector in vectors)
            whole = shown.to(dtype) if whole is None else whole * shown
    vectors = tuple(None if v is None else v.to(dtype) for v in map(_times, vectors, seen))
    present = [*([] if shown is None else [shown]), *beside_others(seen)]
    if whole is not None:
        whole = functools.reduce(torch.mul, beside_others(vectors), whole)
        missing = len(grid.batch) + order - whole.dim()
        whole = whole.to(dtype).reshape(*(1,) * missing, *whole.shape)
        vectors = (whole,) if order == 1 else (None,) * order
    return Weights(
        vectors,
        whole if order > 1 else None,
        functools.reduce(torch.logical_and, present) if present else None,
        weights is None,
        indices,
        part,
    )


class _Reader:
    """Checks of what is said of the positions of one grid; what is asked of values is answered at the end, at once."""

    def __init__(self, grid: GridShape, like: Tensor, modes: ModeSpec, of: str) -> None:
        self.grid, self.like, self.modes, self.of = grid, like, modes, of
        self.order = len(grid.sizes)
        self.asked: list[tuple[Tensor, Callable[[float, float], None]]] = []
        self.product: Tensor | None = None

    def answers(self) -> bool:
        """Read all values that were asked for, raise what they call for, and tell whether the mask is a product."""
        dtype = counting_dtype(self.like.device)
        asked = [torch.stack(torch.aminmax(t.detach().to(self.like.device, dtype))) for t, _ in self.asked]
        if self.product is not None:
            asked.append(self.product.to(dtype).expand(2))
        if not asked:
            return False
        answers = torch.cat(asked).tolist()  # the only values that are read from the device
        for place, (_, judge) in enumerate(self.asked):
            judge(*answers[2 * place : 2 * place + 2])
        return self.product is not None and bool(answers[-1])

    def ask(self, tensor: Tensor, judge: Callable[[float, float], None]) -> None:
        """Have the least and the largest value of a tensor judged, where they can be read."""
        if readable(tensor) and not self.like.is_meta and tensor.numel():
            self.asked.append((tensor, judge))

    def vectors(self, given: Any, part_of: Collection[int]) -> Vectors:
        """Check one vector of weights a mode."""
        parts = mode_parts(given, self.order, "weights", "vectors", WeightsError)
        return tuple(
            None if part is None else self._vector(part, mode, mode in part_of) for mode, part in enumerate(parts)
        )

    def _vector(self, given: Any, mode: int, may_vanish: bool) -> Tensor:
        """Check the weights of one mode."""
        what, size = f"weights of mode {self.modes.label(mode)}", self.grid.sizes[mode]
        vector = real_tensor(given, what, self.like, WeightsError)
        if vector.dim() == 0 or vector.shape[-1] != size:
            got = vector.shape[-1] if vector.dim() else "no dimension"
            raise WeightsError(f"{what} have length {got}, but the mode has size {size}.")
        self._check_batch(tuple(vector.shape[:-1]), what, WeightsError)
        self.ask(vector, functools.partial(_judge_weights, what, "index", may_vanish))
        return vector.to(accumulation_dtype(self.like.dtype))

    def whole(self, given: Any, may_vanish: bool) -> Tensor:
        """Check weights given as one tensor over the grid."""
        tensor = real_tensor(given, "weights", self.like, WeightsError)
        self._check_over_grid(tensor, "weights", WeightsError)
        self.ask(tensor, functools.partial(_judge_weights, "weights", "position", may_vanish))
        return tensor.to(accumulation_dtype(self.like.dtype))

    def mask(self, mask: Any) -> Tensor:
        """Check a mask."""
        mask = _as_tensor(mask, "mask must be a tensor of bool", DtypeError)
        if mask.dtype != torch.bool:
            raise DtypeError(
                f"mask must be bool, True where a position takes part, but has the type {mask.dtype}.",
                hint="Numbers that say how much a position counts are weights: give them as weights.",
            )
        self._check_over_grid(mask, "mask", ShapeError)
        return mask.to(self.like.device)

    def projections(self, mask: Tensor) -> Vectors | None:
        """Project a mask on its modes, and ask whether it is their product; None where that cannot be known.

        Where values cannot be read a mask stays whole, which gives the same numbers.
        """
        if self.order == 1:
            return (mask,)
        if not readable(mask):
            return None
        parts = [mask.any([k - self.order for k in range(self.order) if k != mode]) for mode in range(self.order)]
        self.product = (functools.reduce(torch.logical_and, beside_others(parts)) == mask).all()
        return tuple(parts)

    def lengths(self, lengths: Any, part: Part | None) -> Vectors:
        """Check lengths, and turn them into a mask a mode; those of a larger grid into that of its part."""
        if isinstance(lengths, Mapping):
            lengths = one_a_mode(self.modes, lengths, "lengths")
        if getattr(lengths, "ndim", 0):
            if lengths.shape[-1] != self.order:
                raise ShapeError(f"lengths has {lengths.shape[-1]} columns, but order {self.order} needs one a mode.")
            lengths = [lengths[..., mode] for mode in range(self.order)]
        parts = mode_parts(lengths, self.order, "lengths", "entries", ShapeError)
        found = [
            None if given is None else self._length(given, mode, (self.grid if part is None else part).sizes[mode])
            for mode, given in enumerate(parts)
        ]
        if part is not None:
            found = [None if v is None else part.own(v, mode, -1) for mode, v in enumerate(found)]
        return tuple(found)

    def _length(self, given: Any, mode: int, size: int) -> Tensor:
        """Check the lengths of one mode."""
        what = f"lengths of mode {self.modes.label(mode)}"
        length = _as_tensor(given, f"{what} must be integers", DtypeError)
        if length.dtype == torch.bool or length.is_floating_point() or length.is_complex():
            raise DtypeError(f"{what} must be integers, but have the type {length.dtype}.")
        if not broadcasts_to(length.shape, self.grid.batch):
            raise ShapeError(
                f"{what} have the shape {tuple(length.shape)}, which does not broadcast to {self.grid.batch}."
            )

        def judge(lowest: float, highest: float) -> None:
            for number in (lowest, highest):
                if not 0 <= number <= size:
                    raise WeightsError(f"{what} must be from 0 to its size {size}, got {int(number)}.")

        self.ask(length, judge)
        return torch.arange(size, device=self.like.device) < length.to(self.like.device, torch.int64).unsqueeze(-1)

    def _check_over_grid(self, tensor: Tensor, what: str, kind: type[TensorAttentionError]) -> None:
        """Check that a tensor has one entry a position."""
        if tensor.dim() < self.order:
            raise kind(f"{what} has {tensor.dim()} dimensions, but order {self.order} needs at least {self.order}.")
        own_sizes = tensor.shape[tensor.dim() - self.order :]
        for mode, (size, own) in enumerate(zip(self.grid.sizes, own_sizes, strict=True)):
            if size != own:
                raise kind(f"mode {self.modes.label(mode)} has size {own} in {what} but {size} in {self.of}.")
        batch = tuple(tensor.shape[: tensor.dim() - self.order])
        if not broadcasts_to(batch, self.grid.batch):
            raise kind(f"{what} has batch dimensions {batch}, which do not broadcast to {self.grid.batch}.")

    def _check_batch(self, batch: tuple[int, ...], what: str, kind: type[TensorAttentionError]) -> None:
        """Check that batch dimensions broadcast to those of the grid."""
        if not broadcasts_to(batch, self.grid.batch):
            raise kind(f"{what} have batch dimensions {batch}, which do not broadcast to {self.grid.batch}.")


def _judge_weights(what: str, noun: str, may_vanish: bool, lowest: float, highest: float) -> None:
    """Refuse negative, infinite and all-zero weights."""
    if not math.isfinite(lowest) or not math.isfinite(highest):
        raise WeightsError(f"{what} must be finite, got {lowest:g} to {highest:g}.")
    if lowest < 0:
        raise WeightsError(f"{what} must not be negative, got {lowest:g}.")
    if highest == 0 and not may_vanish:
        raise WeightsError(f"{what} are all zero, so no {noun} takes part.")


def _times(vector: Vector, part: Vector) -> Vector:
    """Multiply weights with a part of a mask."""
    if vector is None or part is None:
        return part if vector is None else vector
    return vector * part


def is_recorded() -> bool:
    """Tell whether a graph is recorded: what is in it is then plain operations, and depends on no size."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]


def readable(tensor: Tensor) -> bool:
    """Tell whether values of a tensor can be read: not while a graph is recorded, under a transform, or on meta.

    Args:
        tensor: The tensor.
    """
    if is_recorded() or tensor.is_meta or type(tensor) not in (Tensor, nn.Parameter):
        return False
    return not _is_functorch_active()


def _is_functorch_active() -> bool:
    """Tell whether `torch.func` transforms what is called. Where torch does not tell, assume so."""
    active = getattr(torch._C, "_are_functorch_transforms_active", None)
    return active is None or active()


def is_transformed(*tensors: Tensor) -> bool:
    """Tell whether a function of some tensors is differentiated, or transformed by `torch.func`.

    Args:
        *tensors: The tensors.
    """
    if torch.is_grad_enabled() and any([tensor.requires_grad for tensor in tensors]):
        return True
    dual = torch.autograd.forward_ad._current_level >= 0
    return dual or _is_functorch_active()


def check_floating(**tensors: Tensor) -> None:
    """Check that tensors are of one floating-point type, and on one device.

    Args:
        **tensors: Tensors by the name of their argument.

    Raises:
        DtypeError: If one is not dense or not floating point, or two types or devices differ.
    """
    (first, reference), *_ = tensors.items()
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise DtypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}.")
        if tensor.layout != torch.strided:
            raise DtypeError(f"{name} must be a dense tensor, got the layout {tensor.layout}.")
        if not tensor.is_floating_point():
            raise DtypeError(f"{name} must be floating point, got {tensor.dtype}.")
        if tensor.dtype != reference.dtype:
            raise DtypeError(f"the type is {reference.dtype} in {first} but {tensor.dtype} in {name}.")
        if tensor.device != reference.device:
            raise DtypeError(f"the device is {reference.device} in {first} but {tensor.device} in {name}.")


def one_a_mode(modes: ModeSpec, given: Any, argument: str) -> list[Any]:
    """Spell out what was given for some modes or for all: by mode, one a mode, or one thing for every mode.

    Args:
        modes: The modes.
        given: A mapping from names or indices of modes, a sequence of N things, or one thing.
        argument: Its name, for messages.

    Returns:
        A list of N things, None for modes that a mapping leaves out.

    Raises:
        ModesError: If a mapping names a mode that does not exist, or one mode twice, or a sequence is too short or
            too long.

    Examples:
        >>> one_a_mode(ModeSpec.parse("t h w"), {"w": 3}, "patch"), one_a_mode(ModeSpec.parse(2), 3, "patch")
        ([None, None, 3], [3, 3])
    """
    if isinstance(given, Mapping):
        found: dict[int, Any] = {}
        for mode, thing in given.items():
            index = modes.index(mode)
            if index in found:
                raise ModesError(f"{argument} names mode {modes.names[index]!r} twice.")
            found[index] = thing
        return [found.get(index) for index in range(modes.order)]
    if isinstance(given, Sequence) and not isinstance(given, str):
        if len(given) != modes.order:
            raise ModesError(f"{argument} has {len(given)} entries, but order {modes.order} needs one a mode.")
        return list(given)
    return [given] * modes.order


def broadcasts_to(shape: Sequence[int], batch: Sequence[int]) -> bool:
    """Tell whether a shape broadcasts to the batch dimensions without adding to them.

    Args:
        shape: The shape.
        batch: The batch dimensions.
    """
    pairs = zip(reversed(shape), reversed(batch), strict=False)
    return len(shape) <= len(batch) and all(size in (1, other) for size, other in pairs)


def real_tensor(given: Any, what: str, like: Tensor, kind: type[TensorAttentionError]) -> Tensor:
    """Return real numbers, given as a tensor, an array of any strides or nested lists, as a tensor on a device.

    Args:
        given: The numbers.
        what: What they are, for messages.
        like: A tensor on the device wanted; what is no tensor becomes its accumulation type.
        kind: Class of the error.

    Returns:
        The tensor; one that was given keeps its type.

    Raises:
        TensorAttentionError: If they are no real numbers, of the class ``kind``.
    """
    given = _as_tensor(given, f"{what} must be a tensor or numbers", kind, accumulation_dtype(like.dtype))
    if given.is_complex():
        raise kind(f"{what} must be real, got {given.dtype}.")
    return given.to(like.device)


def _as_tensor(given: Any, rule: str, kind: type[TensorAttentionError], dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor, or what an array of any strides or nested lists hold as a tensor of a type."""
    if isinstance(given, Tensor):
        return given
    if isinstance(given, np.ndarray) and not torch.compiler.is_compiling():  # torch does not read all that there are
        given = given.copy() if given.dtype.isnative else given.astype(given.dtype.newbyteorder(), order="C")
    try:
        return torch.as_tensor(given, dtype=dtype)
    except (TypeError, ValueError, RuntimeError):
        raise kind(f"{rule}, got {given!r}.") from None


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return what leaves all types as they are.

    Args:
        device: Where is worked.
    """
    known = torch.amp.is_autocast_available(device.type)  # not on meta
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


def in_autocast(device: torch.device) -> bool:
    """Tell whether linear maps on a device choose a type of their own now.

    Args:
        device: The device.
    """
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)  # not on meta


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """Multiply matrices in the type that they have, whatever autocast says: sums may be too large for half precision.

    Args:
        left: ``(*, L, D)``.
        right: ``(*, D, S)``.
    """
    if not in_autocast(left.device):
        return left @ right
    with torch.autocast(left.device.type, enabled=False):
        return left @ right


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which averages of a type are accumulated: float32 for half precision.

    Args:
        dtype: The type.
    """
    return torch.float32 if dtype.itemsize < 4 else dtype


def counting_dtype(device: torch.device) -> torch.dtype:
    """Return the type in which positions are counted and many parts are added up.

    Args:
        device: Device of the numbers: MPS has no float64.
    """
    return torch.float32 if device.type == "mps" else torch.float64


def relative(weights: Tensor, modes: int) -> Tensor:
    """Divide weights by the largest of each sample, so that products with them stay within the range of their type.

    Args:
        weights: Non-negative weights ``(*batch, n_1, …)``.
        modes: How many dimensions are modes.
    """
    largest = weights.amax(list(range(-modes, 0)), keepdim=True)
    return weights / nonzero(largest)


def nonzero(counts: Tensor) -> Tensor:
    """Return counts that may be divided by, and differentiated: one in place of what is not positive.

    Args:
        counts: Weights, or sums of them.
    """
    return torch.where(counts > 0, counts, 1)


def log_weights(weights: Tensor) -> Tensor:
    """Return logarithms of weights: minus infinity for absent indices, to which no gradient flows.

    Args:
        weights: Non-negative weights.
    """
    return nonzero(weights).log().masked_fill(weights <= 0, -math.inf)


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


def beside_others(vectors: Sequence[Vector]) -> list[Tensor]:
    """View one vector a mode so that they broadcast to the grid; those that are None are left out.

    Args:
        vectors: For each mode ``(*batch, n_m)``, or None.
    """
    return [beside(vector, mode, len(vectors)) for mode, vector in enumerate(vectors) if vector is not None]


def without_absent(tensor: Tensor, present: Tensor | None) -> Tensor:
    """Return a tensor with zeros at absent positions, whatever it holds there; no gradient flows to them.

    Args:
        tensor: Values ``(*batch, n_1, …, n_N, D)``.
        present: Where positions take part, broadcastable to ``(*batch, n_1, …, n_N)``; None if all do.
    """
    return tensor if present is None else torch.where(present.unsqueeze(-1), tensor, 0.0)
