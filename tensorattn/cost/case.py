"""A case: the sizes, the type and the memory order that a cost is asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tensorattn.absorbing import absorbing_pays
from tensorattn.contraction_tree import Family
from tensorattn.planning import Plan, make_plan

__all__ = ["Case"]


@dataclass(frozen=True)
class Case:
    """What the cost of an operator depends on.

    Attributes:
        sizes: Sizes of the modes.
        batch: Batch entries.
        dim: Channels, all heads together.
        heads: Number of heads.
        itemsize: Bytes an element.
        channels_first: Whether channels lie before the modes in memory.
        module: Whether it is the module that attends to its input; if not, the functional form.
        queries: Queries of a batch entry, in the functional form.
        skip: Whether the module adds a skip connection.
        out: Whether the module writes into a tensor that the caller holds.
        mode_projections: Whether the module has linear maps of its own for each mode.
        backward: Whether the backward pass is part of it.
        options: Options of the operator, complete.
    """

    sizes: tuple[int, ...]
    batch: int
    dim: int
    heads: int
    itemsize: int
    channels_first: bool
    module: bool
    queries: int
    skip: bool
    out: bool
    mode_projections: bool
    backward: bool
    options: Mapping[str, Any]

    @property
    def order(self) -> int:
        """Number of modes N."""
        return len(self.sizes)

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.dim // self.heads

    @property
    def positions(self) -> int:
        """Number of positions P."""
        return math.prod(self.sizes)

    @property
    def elements(self) -> int:
        """Elements of a whole tensor."""
        return self.batch * self.positions * self.dim

    @property
    def accumulated(self) -> int:
        """Bytes an element of an average: float32 for half precision."""
        return max(4, self.itemsize)

    @property
    def heads_interleaved(self) -> bool:
        """Whether heads lie beside each other at each position, as in the module."""
        return self.module and self.heads > 1

    def absorbs(self, family: Family) -> bool:
        """Tell whether the module absorbs its maps, which have biases: in one head, without gradients.

        Args:
            family: Kept mode subsets that it attends to.
        """
        one_head = self.module and self.heads == 1 and not self.backward and tuple(range(self.order)) not in family
        return one_head and absorbing_pays(self.positions, self.tokens(family), self.dim, biased=True)

    @property
    def scattered(self) -> bool:
        """Whether the channels of a head do not lie together: given so in the functional form."""
        return self.channels_first and not self.module

    def tokens(self, family: Family) -> int:
        """Count the means of a family, one batch entry and channel.

        Args:
            family: Kept mode subsets.
        """
        return sum(math.prod(self.sizes[mode] for mode in kept) for kept in family)

    def plan(self, family: Family) -> Plan:
        """Plan the means of a family of the input: of all channels in the module, of each head otherwise.

        Args:
            family: Kept mode subsets.
        """
        batch, dim = ((self.batch,), self.dim) if self.module else ((self.batch, self.heads), self.head_dim)
        dims = tuple(range(len(batch) + self.order + 1))
        memory = (*dims[: len(batch)], dims[-1], *dims[len(batch) : -1]) if self.channels_first else dims
        return make_plan(batch, self.sizes, dim, memory, self.itemsize, family)
