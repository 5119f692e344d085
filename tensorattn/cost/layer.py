"""A layer as operators see it: what they attend with, be it given or projected from the input of the module."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from tensorattn.contraction_tree import Family, Kept
from tensorattn.cost.case import Case
from tensorattn.cost.products import Tokens, joined_linear, linear, product
from tensorattn.cost.steps import averages, elementwise, outer_sum, slab_by_slab
from tensorattn.cost.tape import Tape, Value
from tensorattn.slabs import positions_at_a_time, slabs_of

__all__ = ["Layer", "Means"]

Attend = Callable[[Tape, Sequence[Value], int], Value]  # of queries, with own key and value, in so many slabs


class Means(NamedTuple):
    """What a summary holds.

    Attributes:
        given: Means of the input, in the module.
        keys: Mean keys of each kept subset.
        values: Mean values of each kept subset.
        moments: Second moments of values and keys, and of keys, if asked for.
    """

    given: dict[Kept, Value]
    keys: dict[Kept, Value]
    values: dict[Kept, Value]
    moments: tuple[Value, ...] = ()

    def tokens(self, case: Case, family: Family) -> Tokens:
        """Return the means of some subsets as tokens that share one softmax."""
        return Tokens(case.tokens(family), tuple(self.keys[u] for u in family), tuple(self.values[u] for u in family))


class Layer:
    """The steps of a layer, and the values that they work on.

    In the module, queries, keys and values are linear maps of the input; in the functional form they are given.
    """

    def __init__(self, case: Case) -> None:
        self.case, self.tape = case, Tape()
        self.query = Value(case.batch * case.queries * case.dim, case.itemsize, held=True)
        self.key = self.query if case.module else Value(case.elements, case.itemsize, held=True)
        self.value = self.query if case.module else Value(case.elements, case.itemsize, held=True)

    @property
    def given_bytes(self) -> int:
        """Bytes of all that has a gradient: the input and the matrices, or queries, keys and values."""
        maps = 4 + 2 * (self.case.order - 1) * self.case.mode_projections
        matrices = maps * self.case.dim**2 * self.case.itemsize
        return self.query.bytes + (matrices if self.case.module else self.key.bytes + self.value.bytes)

    def _weight(self) -> Value:
        """The matrix of a linear map, which the module holds."""
        return Value(self.case.dim**2, self.case.itemsize, held=True)

    def projected(self, value: Value, tape: Tape | None = None) -> Value:
        """Map what is not averaged by one of the linear maps of the module, or take what is given as it is."""
        if not self.case.module:
            return value
        tape = self.tape if tape is None else tape
        return linear(
            tape, value, self._weight(), self.case.dim, copied=self.case.channels_first and self.case.batch > 1
        )

    def mapped(self, means: dict[Kept, Value]) -> dict[Kept, Value]:
        """Map means of the input by one of the linear maps of the module."""
        return {
            kept: self.projected(mean) if mean is self.query else linear(self.tape, mean, self._weight(), self.case.dim)
            for kept, mean in means.items()
        }

    def projected_means(self, means: dict[Kept, Value]) -> dict[Kept, Value]:
        """Map means of the input by one of the linear maps of the module, all in one product but the input itself."""
        joined = {kept: mean for kept, mean in means.items() if mean is not self.query}
        mapped = joined_linear(self.tape, tuple(joined.values()), self._weight(), self.case.dim) if joined else ()
        found = dict(zip(joined, mapped, strict=True))
        return {kept: found[kept] if kept in found else self.projected(mean) for kept, mean in means.items()}

    def summary(self, family: Family, *, second_moment: bool = False) -> Means:
        """Take the means of keys and values, and second moments if asked for."""
        case, tape = self.case, self.tape
        if not case.module:
            keys, values = (averages(tape, case, each, family) for each in (self.key, self.value))
            pairs = ((self.value, self.key), (self.key,)) if second_moment else ()
            return Means({}, keys, values, tuple(self._moment(pair) for pair in pairs))
        means = averages(tape, case, self.key, family)
        moment = self._moment((self.key,)) if second_moment else None
        moments = () if moment is None else tuple(self._projected_moment(moment) for _ in range(2))
        return Means(means, self.projected_means(means), self.projected_means(means), moments)

    def absorbed(self, means: Means) -> Means:
        """Absorb the maps of queries and outputs in the means of one head."""
        return means._replace(keys=self.projected_means(means.keys), values=self.projected_means(means.values))

    def _moment(self, tensors: tuple[Value, ...]) -> Value:
        """Take the second moment of two tensors, or of one with itself, in each head of the functional form."""
        case = self.case
        heads = 1 if case.module else case.heads
        size = case.batch * heads * (case.dim // heads) ** 2
        centred = 2 * self.key.bytes  # both sides, less their means
        return product(self.tape, tensors, 2 * case.positions * size, size, "moments", saved=centred)

    def _projected_moment(self, moment: Value) -> Value:
        """Project a second moment of the input to that of each head."""
        case = self.case
        flops = 2 * case.batch * (case.dim**3 + case.dim**2 * case.head_dim)
        return product(self.tape, (moment,), flops, case.batch * case.dim * case.head_dim, "projections")

    def pooled(self, family: Family) -> tuple[dict[Kept, Value], dict[Kept, Value]]:
        """Take the means of queries and keys alone; in the module each mode may have linear maps of its own."""
        case, tape = self.case, self.tape
        if not case.module:
            return averages(tape, case, self.query, family), averages(tape, case, self.key, family)
        means = averages(tape, case, self.key, family)
        keys, others = self.projected_means(means), {kept: means[kept] for kept in family[1:] if case.mode_projections}
        return self.mapped(means), {**keys, **self.mapped(others)}

    def attended(self, attend: Attend, *, with_own_token: bool = False, absorbed: bool = False) -> Value:
        """Attend from every query; the module projects, attends and projects back a slab of positions at a time.

        Args:
            attend: Adds the steps from queries to output.
            with_own_token: Whether key and value at the position of each query are needed too.
            absorbed: Whether the module attends from its input itself, and adds a bias to what comes out.
        """
        case = self.case
        maps = 0 if absorbed else 3 if with_own_token else 1
        if not case.module:
            return attend(self.tape, (self.query, self.key, self.value)[:maps], 1)
        size, count = _largest_slab(case)
        if count == 1 and not case.out:
            return self._position_by_position(self.tape, self.query, attend, maps, 1)
        whole, slab = Tape(), Tape()
        part = Value(case.batch * size * case.dim, case.itemsize, held=True)
        of_all = self._position_by_position(whole, self.query, attend, maps, count)
        of_one = self._position_by_position(slab, part, attend, maps, 1)
        result = Value(case.elements, case.itemsize, held=case.out)
        slab_by_slab(self.tape, (whole, of_all), (slab, of_one), result)
        return result

    def _position_by_position(self, tape: Tape, part: Value, attend: Attend, maps: int, count: int) -> Value:
        """Project some positions, attend, project back, and add the skip connection."""
        positions = [self.projected(part, tape) for _ in range(maps)]
        output = attend(tape, positions or [part], count)
        output = linear(tape, output, self._weight(), self.case.dim) if maps else elementwise(tape, output)
        return elementwise(tape, output, part) if self.case.skip else output

    def finished(self, output: Value, *, joined: bool) -> Value:
        """Join heads, project back and add the skip connection, where it is the module.

        Args:
            output: Output of all heads.
            joined: Whether the heads lie together already.
        """
        case, tape = self.case, self.tape
        if not case.module:
            return output
        output = linear(tape, output, self._weight(), case.dim, copied=not joined)
        if not case.skip and not case.out:
            return output
        return elementwise(tape, output, *((self.query,) if case.skip else ()), held=case.out)

    def summed(self, vectors: Sequence[Value]) -> Value:
        """Add one vector a mode into the result, with the skip connection of the module.

        Args:
            vectors: Output of each mode.
        """
        case = self.case
        if not case.module:
            return outer_sum(self.tape, case, vectors, skip=None, out=False)
        mapped = [linear(self.tape, vector, self._weight(), case.dim) for vector in vectors]
        return outer_sum(self.tape, case, mapped, skip=self.query if case.skip else None, out=case.out)


def _largest_slab(case: Case) -> tuple[int, int]:
    """Positions of the first slab of a batch entry, which is the largest, and the number of slabs."""
    first, *others = slabs_of(case.sizes, positions_at_a_time(case.batch, case.positions))
    ranges = [range(size)[part] for size, part in zip(case.sizes, first, strict=False)]
    return math.prod(map(len, ranges)) * math.prod(case.sizes[len(first) :]), 1 + len(others)
