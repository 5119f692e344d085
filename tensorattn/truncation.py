r"""Families of kept mode subsets and their counting numbers: inclusion–exclusion over marginal means."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from tensorattn.contraction_tree import Family, Kept
from tensorattn.errors import ModesError, OptionError
from tensorattn.modes import ModeSpec, is_integer, mode_subsets

__all__ = ["counting_numbers", "kept_family"]


def kept_family(order: int, kept: Iterable[Iterable[int]] | None, interaction_order: int | None) -> Family:
    """Return the mode subsets that a truncation keeps, as they were asked for.

    Args:
        order: Number of modes N.
        kept: Mode subsets, or None.
        interaction_order: Largest number of modes in a subset, or None.

    Returns:
        Subsets, each ascending, not yet closed downward. All pairs, if nothing is asked for.

    Raises:
        OptionError: If both are given, or the interaction order is not between 1 and N.
        ModesError: If a subset is empty, or names a mode that does not exist or twice the same.

    Examples:
        >>> kept_family(3, None, 2), kept_family(3, [(0,), (2, 1)], None)
        (((0, 1), (0, 2), (1, 2)), ((0,), (1, 2)))
    """
    if kept is not None and interaction_order is not None:
        raise OptionError("kept and interaction_order exclude each other, but both are given.")
    if kept is None:
        size = min(2, order) if interaction_order is None else interaction_order
        if not is_integer(size) or not 1 <= size <= order:
            raise OptionError(f"interaction_order must be an integer between 1 and order {order}, got {size!r}.")
        return tuple(itertools.combinations(range(order), size))
    spec = ModeSpec.parse(order)
    family = []
    for subset in mode_subsets(kept):
        modes = [spec.index(mode) for mode in subset]
        if not modes or len(set(modes)) < len(modes):
            raise ModesError(f"each subset in kept must name modes, none of them twice, got {tuple(modes)}.")
        family.append(tuple(sorted(modes)))
    if not family:
        raise ModesError("kept is empty, but at least one subset of modes must be kept.")
    return tuple(dict.fromkeys(family))


def counting_numbers(family: Family) -> dict[Kept, int]:
    r"""Return the counting number of every subset in the downward closure of a family.

    They are the integers with :math:`\sum_{U' \supseteq U} c_{U'} = 1` for every :math:`U` of the closure, so each
    effect that is kept counts exactly once.

    Args:
        family: Mode subsets, each ascending.

    Returns:
        Counting numbers by subset, larger subsets first; some may be zero.

    Examples:
        >>> counting_numbers(((0,), (1,), (2,)))
        {(0,): 1, (1,): 1, (2,): 1, (): -2}
        >>> counting_numbers(((0, 1), (1, 2)))
        {(0, 1): 1, (1, 2): 1, (0,): 0, (1,): -1, (2,): 0, (): 0}
    """
    closure = {part for kept in family for size in range(len(kept) + 1) for part in itertools.combinations(kept, size)}
    counts: dict[Kept, int] = {}
    for kept in sorted(closure, key=lambda part: (-len(part), part)):
        counts[kept] = 1 - sum(count for larger, count in counts.items() if set(kept) < set(larger))
    return counts
