"""Plans: in which order a tensor is averaged when several of its marginal means are wanted at once.

All marginal means of a tensor share partial averages. A plan is a tree: the root is the tensor, a node is the
tensor averaged over some of its modes, and a step averages one group of modes, adjacent in memory, out of a node.
Every tree reads the tensor at least twice, since no single partial average serves all modes; a good tree reads it
no more often, and never reduces modes that are apart in memory, which would cost several reads. A tensor that is larger
than the caches is read slab by slab, by all steps at its root in turn: from memory once, and from the cache after that.

A plan knows sizes, memory order and element size, and no tensor. opt_einsum supplies the equations, counts
the operations, and executes the plan on NumPy and JAX arrays; `tensorattn.averages` executes it on PyTorch tensors.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import opt_einsum
from opt_einsum.helpers import flop_count

from tensorattn.contraction_tree import ContractionTree, Family, Kept, main_effects, primitive_for
from tensorattn.errors import DtypeError, OptionError, ShapeError, WeightsError, retells
from tensorattn.modes import ModeSpec, check_order, is_integer, mode_parts, mode_subsets

__all__ = ["Plan", "Step", "make_plan", "order_of_strides", "plan"]

ITEM_SIZES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}  # bytes


@dataclass(frozen=True)
class Step:
    """One contraction of a plan: a node of the tree with one group of modes averaged out.

    Attributes:
        source: Modes that the node read still has.
        target: Modes that the node written still has.
        reduced: Modes averaged out, in memory order.
        axes: First of their axes in memory order, and the one behind the last.
        count: Elements that are averaged to one.
        equation: The contraction over all axes in memory order, as opt_einsum writes it.
        read: Elements read.
        written: Elements written.
        flops: Multiplications and additions, counted by opt_einsum.
        primitive: The operation that executes it on a PyTorch tensor: a matrix–vector product (``mv``), a batched
            product with a row of weights (``matmul``), a sum over contiguous elements (``sum``), or a ``view``.
    """

    source: Kept
    target: Kept
    reduced: Kept
    axes: tuple[int, int]
    count: int
    equation: str
    read: int
    written: int
    flops: int
    primitive: str


class _Weights(NamedTuple):
    """Normalised weights of one mode: the letters of the batch dimensions that they have, and the array."""

    letters: str
    values: Any


@dataclass(frozen=True)
class Plan:
    """A joint plan for all marginal means of a family. Frozen and hashable; printing it shows a table.

    Attributes:
        batch: Batch dimensions of the tensor.
        sizes: Sizes of its modes.
        dim: Channels.
        permutation: Dimensions of the tensor from the outermost to the innermost in memory.
        itemsize: Bytes an element.
        family: Marginal means that the plan computes.
        steps: The contractions, each after the one that writes what it reads.
        names: Names of the modes, for printing.
    """

    batch: tuple[int, ...]
    sizes: tuple[int, ...]
    dim: int
    permutation: tuple[int, ...]
    itemsize: int
    family: Family
    steps: tuple[Step, ...]
    names: tuple[str, ...]

    @property
    def elements(self) -> int:
        """Number of elements of the tensor."""
        return math.prod(self.batch) * math.prod(self.sizes) * self.dim

    @property
    def read(self) -> int:
        """Elements read in all steps."""
        return sum(step.read for step in self.steps if step.primitive != "view")

    @property
    def written(self) -> int:
        """Elements written in all steps."""
        return sum(step.written for step in self.steps if step.primitive != "view")

    @property
    def flops(self) -> int:
        """Multiplications and additions in all steps."""
        return sum(step.flops for step in self.steps if step.primitive != "view")

    @property
    def passes(self) -> float:
        """Elements read and written, as a multiple of one read of the tensor."""
        return (self.read + self.written) / max(1, self.elements)

    @functools.cached_property
    def mode_axes(self) -> tuple[int, ...]:
        """Position in memory order of each mode."""
        return tuple(self.permutation.index(len(self.batch) + mode) for mode in range(len(self.sizes)))

    @functools.cached_property
    def everything(self) -> Kept:
        """All modes: what the root of the tree keeps."""
        return tuple(range(len(self.sizes)))

    @functools.cached_property
    def in_order(self) -> bool:
        """Whether the dimensions of the tensor lie in memory in their own order."""
        return self.permutation == tuple(range(len(self.permutation)))

    @functools.cached_property
    def inverse(self) -> tuple[int, ...]:
        """Position in memory order of each dimension of the tensor."""
        return tuple(self.permutation.index(d) for d in range(len(self.permutation)))

    @functools.cached_property
    def memory_shape(self) -> tuple[int, ...]:
        """Shape of the tensor in memory order."""
        shape = (*self.batch, *self.sizes, self.dim)
        return tuple(shape[d] for d in self.permutation)

    @functools.cached_property
    def missing(self) -> dict[Kept, tuple[int, ...]]:
        """For each kept subset of the family, the dimensions of the tensor that its mean does not have."""
        batch, modes = len(self.batch), self.everything
        return {kept: tuple(batch + mode for mode in modes if mode not in kept) for kept in self.family}

    @functools.cached_property
    def first(self) -> tuple[Step, ...]:
        """Steps that read the tensor itself; the one that reads the longest stretches of memory comes first."""

        def behind(step: Step) -> int:
            return math.prod(self.memory_shape[step.axes[1] :])

        found = [step for step in self.steps if step.source == self.everything]
        return tuple(sorted(found, key=lambda step: (behind(step) > 1, -behind(step))))

    @functools.cached_property
    def further(self) -> tuple[Step, ...]:
        """Steps that read what others made."""
        return tuple(step for step in self.steps if step.source != self.everything)

    @retells
    def execute(self, array: Any, weights: Sequence[Any] | None = None) -> tuple[Any, ...]:
        """Compute the marginal means of an array of any library that opt_einsum dispatches to.

        Half precision is accumulated in float32, as by `mode_averages`. Unlike there, what stands behind a zero weight
        must be finite, since it is multiplied by zero here.

        Args:
            array: Array ``(*batch, n_1, …, n_N, D)`` of NumPy, JAX or PyTorch. Floating point.
            weights: One non-negative vector a mode, ``(n_k,)`` or ``(*batch, n_k)`` with batch dimensions that may be
                1, or None for equal weights: multiplicities. Lists are taken too.

        Returns:
            One array for each kept subset of the family, ``(*batch, *kept sizes, D)``, of the type of the array.

        Raises:
            ShapeError: If the array does not have the shape that the plan was made for.
            DtypeError: If it is no floating-point array.
            WeightsError: If weights have the wrong length, batch dimensions that do not broadcast, or are negative, not
                finite, or all zero.

        Examples:
            >>> import numpy as np
            >>> rows, columns = plan((2, 3), dim=1).execute(np.arange(6.0).reshape(2, 3, 1))
            >>> rows[:, 0], columns[:, 0]
            (array([1., 4.]), array([1.5, 2.5, 3.5]))
        """
        shape = (*self.batch, *self.sizes, self.dim)
        if not hasattr(array, "dtype") or not hasattr(array, "shape"):
            raise DtypeError(f"array must be an array of NumPy, JAX or PyTorch, got {type(array).__name__}.")
        if tuple(array.shape) != shape:
            raise ShapeError(f"the array has shape {tuple(array.shape)}, but the plan is for {shape}.")
        name = str(array.dtype).removeprefix("torch.")
        if not name.startswith(("float", "bfloat")):
            raise DtypeError(f"array must be floating point, got {name}.")
        wide = array.dtype.itemsize >= ITEM_SIZES["float32"]
        source = array if wide else _single(array)
        vectors = self._vectors(weights, source)
        symbols = _symbols(self)
        nodes = {tuple(range(len(self.sizes))): opt_einsum.contract(
            f"{''.join(symbols[d] for d in range(len(shape)))}->{''.join(symbols[d] for d in self.permutation)}", source
        )}  # fmt: skip
        for step in self.steps:
            inputs, output = step.equation.split("->")
            given = {mode: vector for mode in step.reduced if (vector := vectors[mode]) is not None}
            letters = [f"{vector.letters}{symbols[len(self.batch) + mode]}" for mode, vector in given.items()]
            operands = [vector.values for vector in given.values()]
            result = opt_einsum.contract(f"{','.join([inputs, *letters])}->{output}", nodes[step.source], *operands)
            factor = 1 / math.prod(self.sizes[mode] for mode in step.reduced if mode not in given)
            nodes[step.target] = result if factor == 1 else result * factor
        results = []
        for kept in self.family:
            dims = [d for d in range(len(shape)) if not 0 <= d - len(self.batch) < len(self.sizes)]
            dims = sorted([*dims, *(len(self.batch) + mode for mode in kept)])
            inputs = "".join(symbols[d] for d in self.permutation if d in dims)
            output = "".join(symbols[d] for d in dims)
            result = opt_einsum.contract(f"{inputs}->{output}", nodes[kept])
            results.append(result if wide else _cast(result, array.dtype))
        return tuple(results)

    def _vectors(self, weights: Sequence[Any] | None, source: Any) -> tuple[_Weights | None, ...]:
        """Check weights and normalise them, as arrays of the library and type of the array."""
        order = len(self.sizes)
        if weights is None:
            return (None,) * order
        symbols = _symbols(self)
        vectors: list[_Weights | None] = []
        for mode, vector in enumerate(mode_parts(weights, order, "weights", "vectors", WeightsError)):
            if vector is None:
                vectors.append(None)
                continue
            name = self.names[mode]
            told = f"weights of mode {name if name.isdigit() else repr(name)}"
            vector = _as_array(vector, source, told)
            shape, size = tuple(vector.shape), self.sizes[mode]
            if not shape or shape[-1] != size:
                got = shape[-1] if shape else "no dimension"
                raise WeightsError(f"{told} have length {got}, but the mode has size {size}.")
            missing = len(self.batch) - len(shape) + 1
            if missing < 0 or any(n not in (1, m) for n, m in zip(shape[:-1], self.batch[missing:], strict=True)):
                raise WeightsError(
                    f"{told} have batch dimensions {shape[:-1]}, which do not broadcast to {self.batch}."
                )
            _check_values(vector, told)
            vector = _cast(vector, source.dtype)
            total = vector.sum(-1, keepdims=True)
            present = [place for place, n in enumerate(shape[:-1]) if n > 1]
            vector = (vector / (total + (total == 0))).reshape([*(shape[place] for place in present), size])
            vectors.append(_Weights("".join(symbols[missing + place] for place in present), vector))
        return tuple(vectors)

    def __str__(self) -> str:
        grid = " ".join(f"{name}={size}" for name, size in zip(self.names, self.sizes, strict=True))
        memory = self.elements * self.itemsize
        head = ("from", "to", "equation", "read", "written", "primitive")
        rows = [
            (
                _kept_names(step.source, self.names),
                _kept_names(step.target, self.names),
                step.equation,
                f"{step.read:,}",
                f"{step.written:,}",
                step.primitive,
            )
            for step in self.steps
        ]
        widths = [max(len(row[c]) for row in (head, *rows)) for c in range(len(head))]
        lines = [f"plan for batch={self.batch} {grid} D={self.dim}: {self.elements:,} elements, {memory / 1e6:.1f} MB"]
        for row in (head, *rows):
            cells = [
                cell.rjust(width) if c in (3, 4) else cell.ljust(width)
                for c, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append(("  " + "   ".join(cells)).rstrip())
        lines.append(
            f"total: {self.read:,} elements read and {self.written:,} written, "
            f"{self.passes:.2f} times one read of the tensor"
        )
        return "\n".join(lines)


@retells
def plan(
    sizes: Sequence[int],
    *,
    dim: int = 1,
    batch: Sequence[int] = (),
    kept: Iterable[Iterable[int]] | None = None,
    dtype: str = "float32",
    layout: str | Sequence[int] = "channels_last",
    modes: int | str | Sequence[str] | None = None,
) -> Plan:
    """Plan the marginal means of a tensor, without having one.

    Args:
        sizes: Sizes of the modes ``(n_1, …, n_N)``.
        dim: Channels D.
        batch: Batch dimensions.
        kept: Mode subsets whose marginal means are wanted; without it the N mode averages.
        dtype: Type of the elements: ``"float64"``, ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        layout: ``"channels_last"`` for ``(*batch, n_1, …, n_N, D)`` in memory, or ``"channels_first"`` for
            ``(*batch, D, n_1, …, n_N)``; or the strides of a tensor ``(*batch, n_1, …, n_N, D)``, in elements and one a
            dimension, 0 where it is expanded: those of a PyTorch tensor are ``x.stride()``.
        modes: Names of the modes, for the printed table.

    Returns:
        The plan. Equal arguments give the same, cached plan.

    Raises:
        OptionError: If ``dtype`` or ``layout`` is unknown, there is not one stride a dimension, or a size is not
            positive.
        ModesError: If ``kept`` names a mode that does not exist, or ``modes`` does not fit ``sizes``.

    Examples:
        >>> print(plan((16, 56, 56), dim=96, modes="t h w"))
        plan for batch=() t=16 h=56 w=56 D=96: 4,816,896 elements, 19.3 MB
          from    to    equation         read   written   primitive
          t h w   t w   abcd->acd   4,816,896    86,016   matmul
          t w     t     acd->ad        86,016     1,536   sum
          t w     w     acd->cd        86,016     5,376   mv
          t h w   h w   abcd->bcd   4,816,896   301,056   mv
          h w     h     bcd->bd       301,056     5,376   sum
        total: 10,106,880 elements read and 399,360 written, 2.18 times one read of the tensor
    """
    sizes, batch = _integers(sizes, "sizes"), _integers(batch, "batch")
    (dim,) = _integers((dim,), "dim")
    if min((dim, *batch)) < 0:
        raise OptionError(f"dim and batch must not be negative, got {dim} and {batch}.")
    check_order(len(sizes), "the number of sizes")
    spec = ModeSpec.parse(len(sizes) if modes is None else modes)
    if spec.order != len(sizes):
        raise OptionError(f"modes names {spec.order} modes, but sizes has {len(sizes)}.")
    for mode, size in enumerate(sizes):
        if size < 1:
            raise OptionError(
                f"mode {spec.label(mode)} has size {size} in sizes, but every mode needs at least 1 index."
            )
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        hint = "" if isinstance(dtype, str) else "Write the name of the type, such as 'float32'."
        raise OptionError(f"dtype must be one of {', '.join(ITEM_SIZES)}, got {dtype!r}.", hint=hint)
    order = _permutation(layout, len(batch), len(sizes))
    if kept is None:
        family = main_effects(spec.order)
    else:
        if isinstance(kept, Iterable) and not isinstance(kept, str):
            kept = [(each,) if isinstance(each, str) or not isinstance(each, Iterable) else each for each in kept]
        family = tuple(tuple(sorted({spec.index(mode) for mode in subset})) for subset in mode_subsets(kept))
    return make_plan(batch, sizes, dim, order, ITEM_SIZES[dtype], family, spec.names)


@functools.lru_cache(maxsize=4096)
def order_of_strides(strides: tuple[int, ...]) -> tuple[int, ...]:
    """Return dimensions from the outermost to the innermost in memory; expanded ones count as outermost.

    Args:
        strides: Strides of a tensor, one a dimension; 0 where it is expanded.

    Examples:
        >>> order_of_strides((12, 4, 1)), order_of_strides((12, 1, 3)), order_of_strides((4, 0, 1))
        ((0, 1, 2), (0, 2, 1), (1, 0, 2))
    """
    if 0 not in strides and all(a >= b for a, b in itertools.pairwise(strides)):
        return tuple(range(len(strides)))
    return tuple(sorted(range(len(strides)), key=lambda d: (strides[d] != 0, -strides[d], d)))


def _permutation(layout: str | Sequence[int], batch: int, order: int) -> tuple[int, ...]:
    """Return dimensions from the outermost to the innermost in memory, for a layout by name or by strides."""
    dims = tuple(range(batch + order + 1))
    named = {"channels_last": dims, "channels_first": (*dims[:batch], dims[-1], *dims[batch:-1])}
    if isinstance(layout, str) and layout in named:
        return named[layout]
    if isinstance(layout, str) or not isinstance(layout, Iterable):
        raise OptionError(f"layout must be 'channels_last', 'channels_first' or strides, got {layout!r}.")
    strides = _integers(layout, "the strides in layout")
    if len(strides) != len(dims):
        raise OptionError(f"layout has {len(strides)} strides, but the tensor has {len(dims)} dimensions.")
    if min(strides) < 0:
        raise OptionError(f"the strides in layout must not be negative, got {strides}.")
    return order_of_strides(strides)


def _integers(numbers: Any, argument: str) -> tuple[int, ...]:
    """Read integers, of Python or of NumPy."""
    found = tuple(numbers) if isinstance(numbers, Iterable) and not isinstance(numbers, str) else (numbers,)
    if not isinstance(numbers, Iterable) or not all(map(is_integer, found)):
        raise OptionError(f"{argument} must be integers, got {numbers!r}.")
    return tuple(map(int, found))


@functools.lru_cache(maxsize=4096)
def make_plan(
    batch: tuple[int, ...],
    sizes: tuple[int, ...],
    dim: int,
    permutation: tuple[int, ...],
    itemsize: int,
    family: Family,
    names: tuple[str, ...] | None = None,
) -> Plan:
    """Plan for a memory order; arguments as the attributes of `Plan`, all hashable."""
    names = tuple(str(k) for k in range(len(sizes))) if names is None else names
    shape = (*batch, *sizes, dim)
    memory = [(d - len(batch) if 0 <= d - len(batch) < len(sizes) else None, shape[d]) for d in permutation]
    tree = ContractionTree(memory, itemsize)
    root = tuple(range(len(sizes)))
    edges = tree.best(root, frozenset(family))[1]
    empty = Plan(batch, sizes, dim, permutation, itemsize, family, (), names)
    symbols = _symbols(empty)
    steps = []
    for source, reduced in edges:
        target = tuple(mode for mode in source if mode not in reduced)
        left, group, right = tree.extents(source, reduced)
        inputs, output = (
            "".join(symbols[d] for d in permutation if not (0 <= d - len(batch) < len(sizes)) or d - len(batch) in node)
            for node in (source, target)
        )
        extent = {symbols[d]: size for d, size in enumerate(shape)}
        axes = [empty.mode_axes[mode] for mode in reduced]
        steps.append(
            Step(
                source,
                target,
                reduced,
                (min(axes), max(axes) + 1),
                group,
                f"{inputs}->{output}",
                left * group * right,
                left * right,
                flop_count(inputs, len(output) < len(inputs), 1, extent),
                primitive_for(left, group, right),
            )
        )
    return Plan(batch, sizes, dim, permutation, itemsize, family, tuple(steps), names)


def _symbols(plan: Plan) -> list[str]:
    """Letter of each dimension of the tensor."""
    return [opt_einsum.get_symbol(d) for d in range(len(plan.permutation))]


def _kept_names(kept: Kept, names: Sequence[str]) -> str:
    """Name a node by the modes it has left."""
    return " ".join(names[mode] for mode in kept) or "()"


def _single(array: Any) -> Any:
    """Return an array of half precision as float32, in its own library."""
    return array.astype("float32") if hasattr(array, "astype") else array.float()


def _cast(array: Any, dtype: Any) -> Any:
    """Return an array in another type of its own library."""
    return array.astype(dtype) if hasattr(array, "astype") else array.to(dtype)


def _library(array: Any) -> str:
    """Return the name of the library of an array."""
    library = type(array).__module__.partition(".")[0]
    return "jax" if library == "jaxlib" else library


def _as_array(vector: Any, like: Any, told: str) -> Any:
    """Return weights as an array of the library of another one; one that already is stays what it is."""
    own = hasattr(vector, "dtype") and _library(vector) == _library(like)
    if not own:
        try:
            vector = np.asarray(vector, dtype=None if hasattr(vector, "dtype") else np.float64)
        except (TypeError, ValueError, RuntimeError):
            raise WeightsError(f"{told} must be an array or numbers, got {vector!r}.") from None
    if "complex" in (kind := str(vector.dtype)):
        raise WeightsError(f"{told} must be real, got {kind}.")
    return vector if own or _library(like) != "torch" else like.new_tensor(vector)


def _check_values(vector: Any, told: str) -> None:
    """Refuse negative, infinite and all-zero weights, where values can be read."""
    if 0 in vector.shape:
        return
    values = vector.detach() if hasattr(vector, "detach") else vector
    try:
        lowest, highest = float(values.min()), float(values.max())
    except (TypeError, RuntimeError):  # while a graph is recorded, and on the meta device, no value can be read
        return
    if not math.isfinite(lowest) or not math.isfinite(highest):
        raise WeightsError(f"{told} must be finite, got {lowest:g} to {highest:g}.")
    if lowest < 0:
        raise WeightsError(f"{told} must not be negative, got {lowest:g}.")
    if highest == 0:
        raise WeightsError(f"{told} are all zero, so no index takes part.")
