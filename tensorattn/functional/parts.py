r"""The summary of a grid of which each process, or each step of a loop, holds a part: sums that add up over the parts.

Whatever a part knows of keys and values is put at its place in the whole and added up with what the others know, once:
marginal sums, weights, second moments about zero. A process adds by one all-reduce (`tensorattn.sharding`), a loop over
the chunks of a file by a running sum (`tensorattn.blockwise`). The summary that comes of it is that of the whole.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tensorattn.averages.means import marginal_means, position_counts
from tensorattn.functional.summary import Means, Needs, Summary, Sums, make_summary
from tensorattn.masks import Part, Vectors, Weights, accumulation_dtype, counting_dtype
from tensorattn.modes import Family, Kept, positions_behind

__all__ = ["means_of_parts", "summary_of_parts"]


def summary_of_parts(key: Tensor, value: Tensor, needs: Needs, weights: Weights) -> Summary:
    """Summarise the whole grid of which keys and values are a part, or all, unchecked.

    Args:
        key: Keys of the part ``(*batch, l_1, …, l_N, D)``; it may have no positions.
        value: Values of the part; the same tensor is read once.
        needs: What is wanted. Where it is every position, the parts are gathered.
        weights: Checked weights of the part.
    """
    part = weights.part
    if part is None:
        return make_summary(key, value, needs, weights)
    family, same, batch = tuple(dict.fromkeys(needs.held)), value is key, key.dim() - weights.order - 1
    if tuple(range(weights.order)) in family:
        whole = part.whole(key, batch)
        whole_value = whole if same else part.whole(value, batch)
        return make_summary(whole, whole_value, needs, _gathered(weights, part))
    of_keys, of_values = (family if given is None else given for given in (needs.keys, needs.values))
    both = tuple([kept for kept in family if kept in of_keys or kept in of_values])
    sides = [(key, both)] if same else [(key, of_keys), (value, of_values)]
    sums = _Sums(part, weights, family, batch, key)

    def make() -> list[Tensor]:
        found = [each for tensor, wanted in sides for each in sums.of(tensor, wanted)]
        moments = [sums.products(left, key) for left in ([key] if same else [value, key]) if needs.second_moment]
        return [*found, *sums.of_weights(), *moments]

    added: Sequence[Tensor] = part.total(make, None)
    totals: list[dict[Kept, Tensor]] = []
    for _, wanted in sides:
        totals.append(dict(zip(wanted, added[: len(wanted)], strict=True)))
        added = added[len(wanted) :]
    behind, added = sums.behind(added)
    dtype, wide = accumulation_dtype(key.dtype), counting_dtype(key.device)

    def means(total: Mapping[Kept, Tensor], wanted: Family) -> Means:
        return Means.of(part.sizes, {kept: behind.mean(total[kept], kept).to(dtype) for kept in wanted}, batch)

    keys = means(totals[0], of_keys)
    values = keys if same and of_keys == of_values else means(totals[-1], of_values)
    counts = None
    if behind.counts is not None:
        found = {kept: count[(None,) * (batch + len(kept) - count.dim())] for kept, count in behind.counts.items()}
        counts = Means.of(part.sizes, {kept: count.unsqueeze(-1) for kept, count in found.items()}, batch)
    covariances = []
    if needs.second_moment:
        key_mean, value_mean = (behind.mean(total[()].to(wide), ()) for total in (totals[0], totals[-1]))
        for products, left in zip(added, (key_mean,) if same else (value_mean, key_mean), strict=True):
            mean = behind.mean(products.to(wide), (), further=1)
            covariances.append((mean - left.unsqueeze(-1) * key_mean.unsqueeze(-2)).to(dtype))
    first, last = (covariances[0], covariances[-1]) if covariances else (None, None)
    return Summary(part.sizes, family, keys, values, counts, behind.vectors, first, last, weights.indices)


def means_of_parts(tensor: Tensor, family: Family, weights: Weights) -> tuple[Tensor, ...]:
    """Compute the marginal means of the whole of which a tensor is a part, unchecked.

    For all modes they are the part itself; at order 1, where they are the mode averages too, all positions.

    Args:
        tensor: Values of the part ``(*batch, l_1, …, l_N, D)``.
        family: Kept mode subsets.
        weights: Weights of the part.
    """
    part, everything = weights.part, tuple(range(weights.order))
    if part is None:
        return marginal_means(tensor, family, weights)
    smaller, batch = tuple([kept for kept in family if kept != everything]), tensor.dim() - weights.order - 1
    sums = _Sums(part, weights, smaller, batch, tensor)
    added = part.total(lambda: [*sums.of(tensor, smaller), *sums.of_weights()], None)
    behind, _ = sums.behind(added[len(smaller) :])
    dtype = accumulation_dtype(tensor.dtype)
    found = {kept: behind.mean(total, kept).to(dtype) for kept, total in zip(smaller, added, strict=False)}
    positions = part.every(tensor, 0, batch) if weights.order == 1 else tensor
    return tuple([found.get(kept, positions) for kept in family])


@dataclasses.dataclass(frozen=True, eq=False)
class _Behind:
    """What stands behind the means of the whole.

    Attributes:
        sizes: Sizes of the modes.
        vectors: Weights of the indices of each mode; None where the weights of positions are no product over modes.
        counts: The weight behind each mean ``(*batch, *n_U)``; None if all positions count once: sums are then means.
    """

    sizes: tuple[int, ...]
    vectors: Vectors | None
    counts: dict[Kept, Tensor] | None

    def mean(self, total: Tensor, kept: Kept, further: int = 0) -> Tensor:
        """Divide sums by what stands behind them."""
        if self.counts is None:
            return total
        if self.vectors is None:
            count = self.counts[kept]
        else:  # by the weights of the other modes: an index of no weight has a mean all the same
            count = _outside(self.vectors, self.sizes, kept)
        count = count[(..., *(None,) * further)]
        return Sums(count, total.to(count.dtype)).mean(count.dtype)


class _Sums:
    """Sums over the positions of a part, each at its place in the whole."""

    def __init__(self, part: Part, weights: Weights, family: Family, batch: int, like: Tensor) -> None:
        self.part, self.weights, self.family, self.batch = part, weights, family, batch
        self.own = dataclasses.replace(weights, part=None)
        self.lengths, self.wide = part.lengths, counting_dtype(like.device)

    def of(self, tensor: Tensor, family: Family) -> list[Tensor]:
        """Add up a tensor for each kept subset; without weights divide by the number of positions of the whole."""
        batch, sizes = tensor.shape[: self.batch], self.part.sizes
        if 0 in self.lengths:
            dtype = accumulation_dtype(tensor.dtype) if self.weights.plain else self.wide  # as other parts have it
            nothing = tensor.sum(dtype=dtype)  # zero, with its place in the graph
            return [nothing.expand(*batch, *[sizes[m] for m in kept], tensor.shape[-1]) for kept in family]
        found = []
        counts = None if self.weights.grid is None else position_counts(self.own, self.lengths, family)
        for place, (kept, mean) in enumerate(zip(family, marginal_means(tensor, family, self.own), strict=True)):
            if self.weights.plain:
                total = mean * (positions_behind(self.lengths, kept) / positions_behind(sizes, kept))
            else:
                count = _outside(self.weights.vectors, self.lengths, kept) if counts is None else counts[place]
                total = mean.to(self.wide) * count.unsqueeze(-1)
            found.append(self._placed(total, kept, 1))
        return found

    def products(self, left: Tensor, right: Tensor) -> Tensor:
        """Add up the outer products of two tensors ``(*batch, D_l, D_r)``, about zero, in float64."""
        if 0 in self.lengths:
            nothing = left.sum(dtype=self.wide) + right.sum(dtype=self.wide)
            return nothing.expand(*left.shape[: self.batch], left.shape[-1], right.shape[-1])
        needs = Needs(((),), second_moment=True)
        found = make_summary(right, left, needs, self.own)
        assert found.covariance is not None
        first, second = found.value(()).to(self.wide), found.key(()).to(self.wide)
        about_zero = found.covariance.to(self.wide) + first.unsqueeze(-1) * second.unsqueeze(-2)
        if self.weights.plain:
            return about_zero * (math.prod(self.lengths) / math.prod(self.part.sizes))
        count = found.count(())
        assert count is not None
        return about_zero * count[..., None, None]

    def of_weights(self) -> list[Tensor]:
        """Return the weights of the modes, each of one part of those with the same indices; or those of positions."""
        if self.weights.grid is not None:
            counts = position_counts(self.own, self.lengths, self.family)
            return [self._placed(count, kept, 0) for kept, count in zip(self.family, counts, strict=True)]
        found = []
        for mode, vector in enumerate(self.weights.vectors):
            if vector is not None:
                others = [k for k in range(len(self.lengths)) if k != mode]
                first = all([self.part.start[k] == 0 and self.lengths[k] > 0 for k in others])
                found.append(self._placed(vector.to(self.wide) * first, (mode,), 0))
        return found

    def behind(self, added: Sequence[Tensor]) -> tuple[_Behind, Sequence[Tensor]]:
        """Read what `of_weights` became, and return what is left."""
        sizes = self.part.sizes
        if self.weights.grid is not None:
            count = len(self.family)
            found = {kept: each.to(self.wide) for kept, each in zip(self.family, added, strict=False)}
            return _Behind(sizes, None, found), added[count:]
        if self.weights.plain:
            return _Behind(sizes, (None,) * len(sizes), None), added
        rest, vectors = list(added), []
        for vector in self.weights.vectors:
            whole = None if vector is None else rest.pop(0)
            vectors.append(None if whole is None else whole[(None,) * (self.batch + 1 - whole.dim())])
        counts = position_counts(Weights(tuple(vectors)), sizes, self.family)
        told = tuple(
            [
                None if v is None or w is None else v.to(w.dtype)
                for v, w in zip(vectors, self.weights.vectors, strict=True)
            ]
        )
        return _Behind(sizes, told, dict(zip(self.family, counts, strict=True))), rest

    def _placed(self, tensor: Tensor, kept: Kept, further: int) -> Tensor:
        """Put what belongs to the indices of kept modes at their places among all of them, zeros elsewhere."""
        pads = [0, 0] * further
        for mode in reversed(kept):
            start, length = self.part.start[mode], self.lengths[mode]
            pads += [start, self.part.sizes[mode] - start - length]
        return F.pad(tensor, pads) if any(pads) else tensor


def _outside(vectors: Vectors, sizes: Sequence[int], kept: Kept) -> Tensor:
    """Multiply the weights of all indices of the modes that are not kept, ``(*batch, *1)``, in float64."""
    device = next(vector.device for vector in vectors if vector is not None)
    factor = torch.ones((), dtype=counting_dtype(device), device=device)
    for mode, (vector, size) in enumerate(zip(vectors, sizes, strict=True)):
        if mode not in kept:
            factor = factor * (size if vector is None else vector.to(factor.dtype).sum(-1))
    return factor[(..., *(None,) * len(kept))]


def _gathered(weights: Weights, part: Part) -> Weights:
    """Return the weights of all positions of the whole."""
    vectors = tuple([None if v is None else part.every(v, mode, -1) for mode, v in enumerate(weights.vectors)])
    grid, order = weights.grid, weights.order
    if grid is not None:
        batch = grid.dim() - order
        grid = part.whole(grid.expand(*grid.shape[:batch], *part.lengths).unsqueeze(-1), batch).squeeze(-1)
    return Weights(vectors, grid, None, weights.binary, weights.indices)
