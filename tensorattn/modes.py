"""Modes: what the axes of a grid are called, and how the shape of an argument reads through them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tensorattn.errors import ModesError, ShapeError, TensorAttentionError, check, is_integer

__all__ = [
    "Family",
    "GridShape",
    "Kept",
    "ModeSpec",
    "attention_shape",
    "check_order",
    "grid_shape",
    "key_shape",
    "main_effects",
    "mode_parts",
    "mode_subsets",
    "positions_behind",
]

Kept = tuple[int, ...]  # modes that a marginal mean keeps, ascending; the empty tuple is the grand mean
Family = tuple[Kept, ...]  # marginal means that are wanted together


@dataclass(frozen=True)
class ModeSpec:
    """Names and order of the modes of a tensor.

    Attributes:
        names: One name a mode. Modes given as a number are named by their index.
        named: Whether the user chose the names.

    Examples:
        >>> ModeSpec.parse("t h w")
        ModeSpec(names=('t', 'h', 'w'), named=True)
        >>> ModeSpec.parse("t h w").index("h"), ModeSpec.parse(3).index(-1)
        (1, 2)
    """

    names: tuple[str, ...]
    named: bool = True

    @classmethod
    def parse(cls, modes: int | str | Sequence[str] | None) -> ModeSpec:
        """Read an order (``3``) or names (``"t h w"`` or ``("t", "h", "w")``).

        Args:
            modes: Number of modes, or their names; None where they were left out.

        Raises:
            ModesError: If they were left out, there is no mode, or a name is empty, repeated or not an identifier.
        """
        if modes is None:
            hint = 'Give their names, as in modes="t h w", or their number, as in modes=3.'
            raise ModesError("modes is missing.", hint=hint)
        if is_integer(modes):
            check_order(modes, "modes")
            return cls(tuple(str(k) for k in range(modes)), named=False)
        if not isinstance(modes, (str, Sequence)):
            raise ModesError(f"modes must be a number or names, got {modes!r}.")
        names = tuple(modes.split()) if isinstance(modes, str) else tuple(modes)
        if not names:
            raise ModesError(f"modes must name at least one mode, got {modes!r}.")
        for name in names:
            if not (isinstance(name, str) and name.isidentifier()):
                raise ModesError(f"mode names must be words of letters, digits and underscores, got {name!r}.")
            if names.count(name) > 1:
                raise ModesError(
                    f"mode names must differ, but {name!r} appears {names.count(name)} times in {' '.join(names)!r}."
                )
        return cls(names)

    @property
    def order(self) -> int:
        """Number of modes N."""
        return len(self.names)

    def index(self, mode: int | str) -> int:
        """Return the index of a mode given by its name or by its index (negative counts from the end).

        Args:
            mode: Name or index.

        Raises:
            ModesError: If there is no such mode.
        """
        if isinstance(mode, str) and mode in self.names:
            return self.names.index(mode)
        if is_integer(mode) and -self.order <= mode < self.order:
            return int(mode) % self.order
        raise ModesError(f"there is no mode {mode!r} among {' '.join(self.names)!r} (order {self.order}).")

    def label(self, mode: int) -> str:
        """Return how messages call a mode: by its name in quotes where the user chose it, else by its index.

        Args:
            mode: Index of the mode.

        Examples:
            >>> ModeSpec.parse("t h w").label(0), ModeSpec.parse(3).label(0)
            ("'t'", '0')
        """
        return repr(self.names[mode]) if self.named else self.names[mode]

    def __str__(self) -> str:
        return " ".join(self.names)


class GridShape(NamedTuple):
    """Shape of a tensor over a grid: ``(*batch, *sizes, dim)``."""

    batch: tuple[int, ...]
    sizes: tuple[int, ...]
    dim: int


def main_effects(order: int) -> Family:
    """Return the family of the N mode averages: one kept mode each.

    Args:
        order: Number of modes N.
    """
    return tuple([(mode,) for mode in range(order)])


def positions_behind(sizes: Sequence[int], kept: Kept) -> int:
    """Return how many positions a marginal mean is the mean of: the product of the sizes of the modes not kept.

    Args:
        sizes: Sizes of the modes.
        kept: Modes that it keeps.
    """
    return math.prod([size for mode, size in enumerate(sizes) if mode not in kept])


def mode_parts(given: Any, order: int, argument: str, noun: str, kind: type[TensorAttentionError]) -> tuple[Any, ...]:
    """Read an argument that holds one part a mode.

    Args:
        given: A sequence of N parts.
        order: Number of modes N.
        argument: Name of the argument, for messages.
        noun: What its parts are called.
        kind: Class of the error.

    Returns:
        The parts.

    Raises:
        TensorAttentionError: If there are not N of them, of the class ``kind``.

    Examples:
        >>> mode_parts([None, 2.0], 2, "weights", "vectors", ShapeError)
        (None, 2.0)
    """
    needs = f"order {order} needs {order} {noun}, one a mode"
    if getattr(given, "ndim", 0):
        raise kind(f"{argument} has a single tensor, but {needs}.")
    if isinstance(given, (str, Mapping)) or not isinstance(given, Iterable) or hasattr(given, "ndim"):
        raise kind(f"{argument} is {given!r}, but {needs}.")
    parts = tuple(given)
    if len(parts) != order:
        raise kind(f"{argument} has {len(parts)} entries, but {needs}.")
    return parts


def mode_subsets(kept: Any) -> tuple[tuple[Any, ...], ...]:
    """Read an argument ``kept``: mode subsets, whose modes are still to be looked up.

    Args:
        kept: Mode subsets.

    Raises:
        ModesError: If it does not hold subsets.

    Examples:
        >>> mode_subsets([(0,), [1, 2]])
        ((0,), (1, 2))
    """
    hint = "Write [(0,), (1, 2)] for the modes 0, 1 and 2, the last two together."
    if isinstance(kept, str) or not isinstance(kept, Iterable):
        raise ModesError(f"kept must hold subsets of modes, got {kept!r}.", hint=hint)
    subsets = tuple(kept)
    for subset in subsets:
        if isinstance(subset, str) or not isinstance(subset, Iterable):
            raise ModesError(f"each subset in kept must be a sequence of modes, got {subset!r}.", hint=hint)
    return tuple(tuple(subset) for subset in subsets)


def check_order(order: int, argument: str = "order") -> None:
    """Check that an order is an integer of at least one.

    Args:
        order: Number of modes.
        argument: What the user calls it.

    Raises:
        OptionError: If it is not.
    """
    check(order, argument, "integer", least=1)


def grid_shape(shape: Sequence[int], modes: int | ModeSpec, argument: str) -> GridShape:
    """Split a shape into batch, mode sizes and channels.

    Args:
        shape: Shape of the argument.
        modes: The modes, or their number N.
        argument: Name of the argument, for messages.

    Returns:
        The three parts.

    Raises:
        ShapeError: If there are fewer than ``order + 1`` dimensions, or a mode is empty.

    Examples:
        >>> grid_shape((2, 4, 16, 56, 56, 24), 3, "key")
        GridShape(batch=(2, 4), sizes=(16, 56, 56), dim=24)
    """
    if not isinstance(modes, ModeSpec):
        check_order(modes)
        modes = ModeSpec.parse(modes)
    order = modes.order
    if len(shape) < order + 1:
        raise ShapeError(
            f"{argument} has {len(shape)} dimensions, but order {order} needs at least {order + 1}.",
            hint="The layout is (*batch, n_1, ..., n_N, D).",
        )
    batch, sizes, dim = tuple(shape[: -order - 1]), tuple(shape[-order - 1 : -1]), shape[-1]
    for mode, size in enumerate(sizes):
        if size == 0:
            raise ShapeError(
                f"mode {modes.label(mode)} has size 0 in {argument}, but every mode needs at least 1 index."
            )
    return GridShape(batch, sizes, dim)


def key_shape(key: Sequence[int], value: Sequence[int], order: int) -> GridShape:
    """Check that key and value are over one grid.

    Args:
        key: Shape ``(*batch, n_1, …, n_N, D)``.
        value: Shape ``(*batch, n_1, …, n_N, D_v)``.
        order: Number of modes N.

    Returns:
        The shape of the key, read.

    Raises:
        ShapeError: If batch dimensions or mode sizes disagree.
    """
    grid, values = grid_shape(key, order, "key"), grid_shape(value, order, "value")
    for mode, (size, other) in enumerate(zip(grid.sizes, values.sizes, strict=True)):
        if size != other:
            raise ShapeError(f"mode {mode} has size {size} in key but {other} in value.")
    if grid.batch != values.batch:
        raise ShapeError(f"batch dimensions are {grid.batch} in key but {values.batch} in value.")
    return grid


def attention_shape(query: Sequence[int], key: Sequence[int], value: Sequence[int], order: int) -> GridShape:
    """Check that query, key and value belong together.

    Args:
        query: Shape ``(*batch, *positions, D)``.
        key: Shape ``(*batch, n_1, …, n_N, D)``.
        value: Shape ``(*batch, n_1, …, n_N, D_v)``.
        order: Number of modes N.

    Returns:
        The shape of the key, read.

    Raises:
        ShapeError: If batch dimensions, mode sizes or head sizes disagree.
    """
    grid = key_shape(key, value, order)
    if len(query) < len(grid.batch) + 1:
        raise ShapeError(
            f"query has {len(query)} dimensions, but key has {len(grid.batch)} batch dimensions, "
            f"so query needs at least {len(grid.batch) + 1}."
        )
    if tuple(query[: len(grid.batch)]) != grid.batch:
        raise ShapeError(f"batch dimensions are {tuple(query[: len(grid.batch)])} in query but {grid.batch} in key.")
    if query[-1] != grid.dim:
        raise ShapeError(f"head size is {query[-1]} in query but {grid.dim} in key.")
    return grid
