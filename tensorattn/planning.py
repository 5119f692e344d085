"""Plans: in which order a tensor is averaged when several of its marginal means are wanted at once.

All marginal means of a tensor share partial averages. A plan is a tree: the root is the tensor, a node is the
tensor averaged over some of its modes, and a step averages one group of modes, adjacent in memory, out of a node.
Every tree reads the tensor at least twice, since no single partial average serves all modes; a good tree reads it
no more often, and never reduces modes that are apart in memory, which would cost several reads.

A plan knows sizes, memory order and element size, and no tensor. opt_einsum supplies the equations, counts
the operations, and executes the plan on NumPy and JAX arrays; `tensorattn.averages` executes it on PyTorch tensors.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import opt_einsum
from opt_einsum.helpers import flop_count

from tensorattn.contraction_tree import ContractionTree, Family, Kept, main_effects, primitive_for
from tensorattn.errors import OptionError, ShapeError, retells
from tensorattn.modes import ModeSpec, check_order

__all__ = ["Plan", "Step", "make_plan", "plan"]

ITEM_SIZES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}  # bytes


@dataclass(frozen=True)
class Step:
    """One contraction of a plan: a node of the tree with one group of modes averaged out.

    Attributes:
        source: Modes that the node read still has.
        target: Modes that the node written still has.
        reduced: Modes averaged out, in memory order.
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
    equation: str
    read: int
    written: int
    flops: int
    primitive: str


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

    @property
    def mode_axes(self) -> tuple[int, ...]:
        """Position in memory order of each mode."""
        return tuple(self.permutation.index(len(self.batch) + mode) for mode in range(len(self.sizes)))

    def execute(self, array: Any, weights: Sequence[Any] | None = None) -> tuple[Any, ...]:
        """Compute the marginal means of an array of any library that opt_einsum dispatches to.

        Args:
            array: Array ``(*batch, n_1, …, n_N, D)`` of NumPy, JAX or PyTorch.
            weights: One non-negative vector ``(n_k,)`` a mode, of the same library; without them, plain means.

        Returns:
            One array for each kept subset of the family, ``(*batch, *kept sizes, D)``.

        Raises:
            ShapeError: If the array does not have the shape that the plan was made for.

        Examples:
            >>> import numpy as np
            >>> rows, columns = plan((2, 3), dim=1).execute(np.arange(6.0).reshape(2, 3, 1))
            >>> rows[:, 0], columns[:, 0]
            (array([1., 4.]), array([1.5, 2.5, 3.5]))
        """
        shape = (*self.batch, *self.sizes, self.dim)
        if tuple(array.shape) != shape:
            raise ShapeError(f"the array has shape {tuple(array.shape)}, but the plan is for {shape}.")
        vectors = None if weights is None else [w / w.sum() for w in weights]
        symbols = _symbols(self)
        nodes = {tuple(range(len(self.sizes))): opt_einsum.contract(
            f"{''.join(symbols[d] for d in range(len(shape)))}->{''.join(symbols[d] for d in self.permutation)}", array
        )}  # fmt: skip
        for step in self.steps:
            inputs, output = step.equation.split("->")
            if vectors is None:
                factor = 1 / math.prod(self.sizes[mode] for mode in step.reduced)
                nodes[step.target] = opt_einsum.contract(step.equation, nodes[step.source]) * factor
            else:
                letters = ",".join([inputs, *(symbols[len(self.batch) + mode] for mode in step.reduced)])
                operands = [vectors[mode] for mode in step.reduced]
                nodes[step.target] = opt_einsum.contract(f"{letters}->{output}", nodes[step.source], *operands)
        results = []
        for kept in self.family:
            dims = [d for d in range(len(shape)) if not 0 <= d - len(self.batch) < len(self.sizes)]
            dims = sorted([*dims, *(len(self.batch) + mode for mode in kept)])
            inputs = "".join(symbols[d] for d in self.permutation if d in dims)
            output = "".join(symbols[d] for d in dims)
            results.append(opt_einsum.contract(f"{inputs}->{output}", nodes[kept]))
        return tuple(results)

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
    layout: str = "channels_last",
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
            ``(*batch, D, n_1, …, n_N)``.
        modes: Names of the modes, for the printed table.

    Returns:
        The plan. Equal arguments give the same, cached plan.

    Raises:
        OptionError: If ``dtype`` or ``layout`` is unknown, or a size is not positive.
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
    for argument, numbers in (("sizes", sizes), ("batch", batch), ("dim", (dim,))):
        if not isinstance(numbers, Sequence) or not all(isinstance(n, int) for n in numbers):
            raise OptionError(f"{argument} must be integers, got {numbers!r}.")
    if min((dim, *batch)) < 0:
        raise OptionError(f"dim and batch must not be negative, got {dim} and {tuple(batch)}.")
    check_order(len(sizes), "the number of sizes")
    spec = ModeSpec.parse(len(sizes) if modes is None else modes)
    if spec.order != len(sizes):
        raise OptionError(f"modes names {spec.order} modes, but sizes has {len(sizes)}.")
    for name, size in zip(spec.names, sizes, strict=True):
        if size < 1:
            raise OptionError(f"mode {name} has size {size} in sizes, but every mode needs at least 1 index.")
    if dtype not in ITEM_SIZES:
        raise OptionError(f"dtype must be one of {', '.join(ITEM_SIZES)}, got {dtype!r}.")
    if layout not in ("channels_last", "channels_first"):
        raise OptionError(f"layout must be 'channels_last' or 'channels_first', got {layout!r}.")
    dims = tuple(range(len(batch) + len(sizes) + 1))
    order = dims if layout == "channels_last" else (*dims[: len(batch)], dims[-1], *dims[len(batch) : -1])
    if kept is None:
        family = main_effects(spec.order)
    else:
        subsets = [
            subset if isinstance(subset, Iterable) and not isinstance(subset, str) else (subset,) for subset in kept
        ]
        family = tuple(tuple(sorted({spec.index(mode) for mode in subset})) for subset in subsets)
    return make_plan(tuple(batch), tuple(sizes), dim, order, ITEM_SIZES[dtype], family, spec.names)


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
        steps.append(
            Step(
                source,
                target,
                reduced,
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
