"""The search for a plan: which groups of modes to average out, and in which order, so that means share the work."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from tensorattn import slabs
from tensorattn.slabs import steps_of

__all__ = ["ContractionTree", "Family", "Kept", "folding", "main_effects", "primitive_for"]

Kept = tuple[int, ...]  # modes that a marginal mean keeps, ascending; the empty tuple is the grand mean
Family = tuple[Kept, ...]  # marginal means that are wanted together

LONG = 2048  # elements of a row that a product reads at full speed
LONG_ENOUGH = 512  # elements of a row that a product reads no slower than a sum
ADDED = 4.0  # reads that it takes to add a slab to a sum of its size, which lies in memory
LITTLE = 1 << 15  # elements that any operation reads in less time than it takes to call it
EFFECTS = tuple(tuple((mode,) for mode in range(order)) for order in range(17))  # the mode averages, by order


def main_effects(order: int) -> Family:
    """Return the family of the N mode averages: one kept mode each.

    Args:
        order: Number of modes N.
    """
    return EFFECTS[order] if order < len(EFFECTS) else tuple((mode,) for mode in range(order))


def primitive_for(left: int, group: int, right: int) -> str:
    """Choose the operation that reduces the middle axis of ``(left, group, right)`` fastest.

    Measured: a product with a vector of weights reads at full speed where rows are long, either the rows that it
    reduces or those that it keeps, which `folding` lengthens; a sum does where rows are short, and costs the fewest
    calls where there is little to read.

    Args:
        left: Product of the sizes before the axis.
        group: Size of the axis.
        right: Product of the sizes behind it.
    """
    if group == 1:
        return "view"
    if right == 1:
        return "mv" if group >= 4096 and left >= 8 else "sum"
    if right * folding(group, right) < LONG_ENOUGH or left * group * right < LITTLE:
        return "sum"
    return "mv" if left == 1 else "matmul"


def folding(group: int, right: int) -> int:
    """Choose how many rows are read as one where the middle axis of ``(left, group, right)`` is reduced by a product.

    Rows that lie k apart are added up in one long row, and its k parts among each other afterwards, which is worth it
    where there are many rows for each.

    Args:
        group: Number of rows.
        right: Length of a row.
    """
    fold = math.ceil(LONG / max(1, right))
    if right >= LONG_ENOUGH:
        return max(1, min(fold, group // 8))
    return fold if group // fold >= (16 if right >= 64 else 32) else 1


def slowness(left: int, group: int, right: int) -> float:
    """Time of the contraction of the middle axis, in reads of its operand by one sum; a fit to measured times.

    Args:
        left: Product of the sizes before the axis.
        group: Size of the axis.
        right: Product of the sizes behind it.
    """
    primitive = primitive_for(left, group, right)
    if primitive == "view":
        return 0.0
    if right == 1:
        return 0.9 if primitive == "mv" else 1 + 16 / group
    if primitive == "sum":
        return (2.0 if right < 8 else 1.0 if right < 48 else 1.4) + 8 / group
    fold = folding(group, right)
    return 0.85 + 300 / (fold * right) + fold / group


class ContractionTree:
    """Search for the cheapest tree of contractions over one memory order."""

    def __init__(self, memory: Sequence[tuple[int | None, int]], itemsize: int) -> None:
        self.memory = [axis for axis in memory if axis[0] is not None or axis[1] != 1]
        sizes = [size for _, size in self.memory]
        whole = itemsize >= 4 and math.prod(sizes) * itemsize <= slabs.CACHED  # half precision is copied slab by slab
        cuts = [] if whole else steps_of(sizes, slabs.ELEMENTS)
        self.slab = [(mode, step) for (mode, _), step in zip(self.memory, (*cuts, *sizes[len(cuts) :]), strict=True)]
        self.order = sum(mode is not None for mode, _ in memory)
        self.itemsize = itemsize
        self.found: dict[tuple[Kept, frozenset[Kept]], tuple[float, tuple[tuple[Kept, Kept], ...]]] = {}

    def best(self, node: Kept, wanted: frozenset[Kept]) -> tuple[float, tuple[tuple[Kept, Kept], ...]]:
        """Return the seconds and the (source, reduced) edges that make all wanted descendants of a node.

        The first wanted subset is reached by every group that can be averaged out on the way to it; whatever else
        lies below the new node is made from there, as it is smaller; the rest starts again from this node.
        """
        wanted = wanted - {node}
        if not wanted:
            return 0.0, ()
        known = self.found.get((node, wanted))
        if known is None:
            first = max(wanted, key=lambda kept: (len(kept), tuple(-mode for mode in kept)))
            known = min(self._choices(node, first, wanted), key=lambda choice: choice[0])
            self.found[node, wanted] = known
        return known

    def _choices(
        self, node: Kept, first: Kept, wanted: frozenset[Kept]
    ) -> Iterator[tuple[float, tuple[tuple[Kept, Kept], ...]]]:
        for reduced in self._groups(node, first):
            child = tuple(mode for mode in node if mode not in reduced)
            below = frozenset(kept for kept in wanted if set(kept) <= set(child))
            cost_below, edges_below = self.best(child, below)
            cost_rest, edges_rest = self.best(node, wanted - below)
            cost = self._seconds(node, reduced) + cost_below + cost_rest
            yield cost, ((node, reduced), *edges_below, *edges_rest)

    def _groups(self, node: Kept, first: Kept) -> set[Kept]:
        """Groups adjacent in memory whose removal keeps a wanted subset: whole gaps; of the whole tensor, ends too."""
        modes = (mode if mode in node else None for mode, _ in self.memory if mode is None or mode in node)
        gaps = [gap for run in _runs(modes) for gap in _runs(None if mode in first else mode for mode in run)]
        if len(node) < self.order:
            return set(gaps)
        return {part for gap in gaps for cut in range(len(gap)) for part in (gap[cut:], gap[: len(gap) - cut])}

    def extents(self, node: Kept, reduced: Kept) -> tuple[int, int, int]:
        """Sizes of a node seen as ``(left, group, right)`` around the group that is averaged out."""
        return _around(self.memory, node, reduced)

    def _seconds(self, node: Kept, reduced: Kept) -> float:
        """Model the time of one contraction: bytes over bandwidth, and how much slower than one read it is."""
        left, group, right = self.extents(node, reduced)
        slow = slowness(left, group, right)
        if len(node) == self.order and self.slab != self.memory:
            left_of_slab, group_of_slab, right_of_slab = _around(self.slab, node, reduced)
            slow = slowness(left_of_slab, group_of_slab, right_of_slab) + ADDED / group_of_slab
        if slow == 0:
            return 0.0
        traffic = (left * group * right + left * right) * self.itemsize
        bandwidth = 12e9 if traffic > 32e6 else 25e9  # memory, last-level cache
        return 6e-6 + slow * traffic / bandwidth


def _around(memory: Sequence[tuple[int | None, int]], node: Kept, reduced: Kept) -> tuple[int, int, int]:
    """Sizes of axes in memory seen as ``(left, group, right)`` around the modes that are averaged out of a node."""
    axes = [(mode, size) for mode, size in memory if mode is None or mode in node]
    places = [place for place, (mode, _) in enumerate(axes) if mode in reduced]
    sizes = [size for _, size in axes]
    parts = sizes[: places[0]], sizes[places[0] : places[-1] + 1], sizes[places[-1] + 1 :]
    left, group, right = map(math.prod, parts)
    return left, group, right


def _runs(items: Iterable[int | None]) -> Iterator[Kept]:
    """Split at every None into runs of modes."""
    run: list[int] = []
    for item in (*items, None):
        if item is None and run:
            yield tuple(run)
            run = []
        elif item is not None:
            run.append(item)
