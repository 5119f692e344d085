"""Plans: in which order a tensor is averaged when several of its marginal means are wanted at once.

All marginal means of a tensor share partial averages. A plan is a tree: the root is the tensor, a node is the tensor
averaged over some of its modes, and a step averages one group of modes, adjacent in memory, out of a node. Every tree
reads the tensor at least twice, since no single partial average serves all modes; a good tree reads it no more often,
and never averages modes that are apart in memory at once, which would cost several reads. How many steps there are
depends on the modes alone, and not on their sizes.

A plan knows sizes and the order of dimensions in memory, and no tensor. opt_einsum supplies the equations and counts
the operations; `tensorattn.averages.means` takes the steps.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import opt_einsum
from opt_einsum.helpers import flop_count

from tensorattn.errors import OptionError, integers, retells
from tensorattn.modes import Family, Kept, ModeSpec, check_order, main_effects, mode_subsets

__all__ = ["Edge", "Plan", "Step", "make_plan", "memory_order", "plan", "tree"]

ITEM_SIZES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}  # bytes

Edge = tuple[Kept, Kept]  # a node of the tree, and the modes that a step averages out of it


def tree(order: Sequence[int], family: Family, sizes: Sequence[int] | None = None) -> tuple[Edge, ...]:
    """Plan the steps from a tensor to its marginal means.

    Modes that lie side by side in memory are split in two, each half is averaged over the other, and so on within each
    half; every mean that is wanted is then made from the smallest node that has its modes, one group of adjacent modes
    at a time.

    Args:
        order: The modes, from the outermost to the innermost in memory.
        family: Kept subsets of the means that are wanted.
        sizes: Sizes of the modes, to split where the fewest elements are read; split in the middle if they are unknown.

    Returns:
        The steps, each after the one that makes what it reads.

    Examples:
        >>> tree((0, 1, 2), ((0,), (1,), (2,)), (16, 56, 56))
        (((0, 1, 2), (2,)), ((0, 1), (1,)), ((0, 1), (0,)), ((0, 1, 2), (0, 1)))
    """
    root = tuple(sorted(order))
    edges: dict[Kept, Edge] = {}

    def elements(node: Kept) -> int:
        return math.prod(sizes[mode] for mode in node) if sizes is not None else len(node)

    def make(target: Kept) -> None:
        """Average the smallest node with the modes of a target down to it."""
        source = root
        for node in edges:
            source = node if set(target) <= set(node) and elements(node) < elements(source) else source
        while source != target:
            *_, group = _runs([None if mode in target else mode for mode in order if mode in source])
            rest = tuple(mode for mode in source if mode not in group)
            edges[rest] = (source, tuple(sorted(group)))
            source = rest

    def split(block: Sequence[int], wanted: list[Kept]) -> None:
        """Make the means that are wanted of a block of modes adjacent in memory, whose mean is there."""
        wanted = [kept for kept in wanted if len(kept) < len(block)]
        if len(block) < 3 or len(wanted) < 2:
            return
        cuts = range(1, len(block)) if sizes is not None else [len(block) // 2]

        def cost(cut: int) -> int:
            sides = (tuple(side) for side in (block[:cut], block[cut:]))
            return sum(elements(side) for side in sides if len(side) > 1)

        cut = min(cuts, key=cost)
        for side in (block[:cut], block[cut:]):
            inside = [kept for kept in wanted if set(kept) <= set(side)]
            if len(side) > 1 and len(inside) > 1:
                if tuple(sorted(side)) not in edges:
                    make(tuple(sorted(side)))
                split(side, inside)

    smaller = sorted((kept for kept in dict.fromkeys(family) if kept != root), key=lambda kept: (-len(kept), kept))
    split(order, smaller)
    for kept in smaller:
        if kept not in edges:
            make(kept)
    needed, steps = set(smaller), []
    for node, edge in list(edges.items())[::-1]:  # a half that no mean was made from after all is not made either
        if node in needed:
            needed.add(edge[0])
            steps.append(edge)
    return tuple(steps[::-1])


def _runs(items: Iterable[int | None]) -> Iterator[Kept]:
    """Split at every None into runs of modes."""
    for absent, run in itertools.groupby(items, key=lambda item: item is None):
        if not absent:
            yield tuple(run)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Step:
    """One contraction of a plan: a node of the tree with one group of modes averaged out.

    Attributes:
        source: Modes that the node read still has.
        target: Modes that the node written still has.
        equation: The contraction over all axes in memory order, as opt_einsum writes it.
        read: Elements read.
        written: Elements written.
        flops: Additions and multiplications, counted by opt_einsum.
    """

    source: Kept
    target: Kept
    equation: str
    read: int
    written: int
    flops: int


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

    Examples:
        >>> import tensorattn as ta
        >>> plan = ta.plan((30, 240, 320), dim=16, modes="t h w")
        >>> round(plan.read / plan.elements, 2), len(plan.steps)
        (2.01, 4)
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
        return sum(step.read for step in self.steps)

    @property
    def written(self) -> int:
        """Elements written in all steps."""
        return sum(step.written for step in self.steps)

    @property
    def flops(self) -> int:
        """Multiplications and additions in all steps."""
        return sum(step.flops for step in self.steps)

    @property
    def passes(self) -> float:
        """Elements read and written, as a multiple of one read of the tensor."""
        return (self.read + self.written) / max(1, self.elements)

    def __str__(self) -> str:
        grid = " ".join(f"{name}={size}" for name, size in zip(self.names, self.sizes, strict=True))
        memory = self.elements * self.itemsize
        named = {
            step: [" ".join(self.names[m] for m in kept) or "()" for kept in (step.source, step.target)]
            for step in self.steps
        }
        rows = [["from", "to", "equation", "read", "written"]]
        rows += [[*named[step], step.equation, f"{step.read:,}", f"{step.written:,}"] for step in self.steps]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [f"plan for batch={self.batch} {grid} D={self.dim}: {self.elements:,} elements, {memory / 1e6:.1f} MB"]
        for row in rows:
            cells = [
                cell.rjust(w) if c > 2 else cell.ljust(w) for c, (cell, w) in enumerate(zip(row, widths, strict=True))
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
          from    to    equation         read   written
          t h w   t h   abcd->abd   4,816,896    86,016
          t h     t     abd->ad        86,016     1,536
          t h     h     abd->bd        86,016     5,376
          t h w   w     abcd->cd    4,816,896     5,376
        total: 9,805,824 elements read and 98,304 written, 2.06 times one read of the tensor
    """
    sizes, batch = integers(sizes, "sizes"), integers(batch, "batch")
    (dim,) = integers((dim,), "dim")
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
def memory_order(strides: tuple[int, ...]) -> tuple[int, ...]:
    """Return dimensions from the outermost to the innermost in memory; expanded ones count as outermost.

    Args:
        strides: Strides of a tensor, one a dimension; 0 where it is expanded.

    Examples:
        >>> memory_order((12, 4, 1)), memory_order((12, 1, 3)), memory_order((4, 0, 1))
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
    strides = integers(layout, "the strides in layout")
    if len(strides) != len(dims):
        raise OptionError(f"layout has {len(strides)} strides, but the tensor has {len(dims)} dimensions.")
    if min(strides) < 0:
        raise OptionError(f"the strides in layout must not be negative, got {strides}.")
    return memory_order(strides)


@functools.lru_cache(maxsize=1024)
def make_plan(
    batch: tuple[int, ...],
    sizes: tuple[int, ...],
    dim: int,
    permutation: tuple[int, ...],
    itemsize: int,
    family: Family,
    names: tuple[str, ...],
) -> Plan:
    """Plan for an order in memory; arguments as the attributes of `Plan`, all hashable."""
    modes = range(len(batch), len(batch) + len(sizes))
    extent = {opt_einsum.get_symbol(dim_): size for dim_, size in enumerate((*batch, *sizes, dim))}

    def letters(node: Kept) -> str:
        held = (d for d in permutation if d not in modes or d - len(batch) in node)
        return "".join(opt_einsum.get_symbol(d) for d in held)

    steps = []
    for source, reduced in tree([d - len(batch) for d in permutation if d in modes], family, sizes):
        target = tuple(mode for mode in source if mode not in reduced)
        inputs, output = letters(source), letters(target)
        read, written = (math.prod(extent[letter] for letter in each) for each in (inputs, output))
        flops = flop_count(inputs, len(output) < len(inputs), 1, extent)
        steps.append(Step(source, target, f"{inputs}->{output}", read, written, flops))
    return Plan(batch, sizes, dim, permutation, itemsize, family, tuple(steps), names)
