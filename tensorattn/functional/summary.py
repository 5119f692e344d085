r"""What operators know of keys and values: marginal means, the weight behind each, and second moments.

A summary is a set of sufficient statistics of the tensor-normal model behind Kronecker attention: sums over positions,
with counts. It therefore commutes with linear maps, and adds up. Two summaries of parts of a tensor make that of the
whole (`Summary.merge`), and a running sum over the frames of a mode makes what each frame may know of those before it
(`tensorattn.functional.causal`); both are the one fold of this file, `Sums`, added up in float64. Means are views.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tensorattn.averages.means import marginal_means, position_counts
from tensorattn.errors import DtypeError, ModesError, OptionError, ShapeError, check, retells
from tensorattn.functional.softmax import Tokens, TokenSet
from tensorattn.masks import (
    GivenWeights,
    Lengths,
    Mask,
    Vector,
    Vectors,
    Weights,
    accumulation_dtype,
    check_floating,
    counting_dtype,
    log_weights,
    matmul,
    nonzero,
    read_weights,
    readable,
)
from tensorattn.modes import Family, Kept, ModeSpec, key_shape, main_effects, mode_subsets, positions_behind

__all__ = ["Means", "Moments", "Needs", "Summary", "Sums", "make_summary", "summarize"]


class Needs(NamedTuple):
    """What an operator needs to know of queries, keys and values.

    Attributes:
        kept: Mode subsets whose marginal means are wanted. The subset of all modes is the tensor itself.
        second_moment: Whether second moments are wanted.
        keys: Those that are wanted of the keys; all if None.
        values: Those that are wanted of the values; all if None.
        queries: Those that are wanted of the queries, which then stand on the grid of the keys; None where each query
            attends by itself.
        indices: Whether it counts how often each index of a mode is there, in a softmax over modes or a sum over
            positions, which weights of whole positions do not tell.

    Examples:
        >>> import tensorattn as ta
        >>> additive = ta.get_operator("additive")
        >>> additive.needs(2, **additive.options).kept  # means of the rows and of the columns, and the grand mean
        ((0,), (1,), ())
    """

    kept: Family
    second_moment: bool = False
    keys: Family | None = None
    values: Family | None = None
    queries: Family | None = None
    indices: bool = False

    @property
    def held(self) -> Family:
        """Kept subsets that a summary holds: with second moments, the grand mean too."""
        return self.kept if () in self.kept or not self.second_moment else (*self.kept, ())

    def averages_keys(self, order: int) -> bool:
        """Tell whether keys are wanted as averages over some modes, beside their mean over all.

        Args:
            order: Number of modes N.
        """
        return {kept for kept in (self.kept if self.keys is None else self.keys) if kept} != {tuple(range(order))}


class Sums(NamedTuple):
    """Weighted sums over positions, with the weights: the fold. They add up, and run over a dimension.

    Attributes:
        count: Weight of the positions, in float64.
        total: Weighted sum of what is there, in float64, with more dimensions behind.
    """

    count: Tensor  # type: ignore[assignment]  # the count of a tuple is another thing
    total: Tensor

    @classmethod
    def of(cls, mean: Tensor, count: Tensor) -> Sums:
        """Return the sums of which there are a mean ``(*, D)`` and a count ``(*)``, or broadcastable to it."""
        wide = counting_dtype(mean.device)
        count = count.to(wide)
        present = _beside(count > 0, mean)
        return cls(count, torch.where(present, mean, 0.0).to(wide) * _beside(count, mean))

    def __add__(self, other: Sums) -> Sums:  # type: ignore[override]
        """Return the sums over the positions of both."""
        return Sums(self.count + other.count, self.total + other.total)

    def running(self, dim: int, before: Sums | None = None) -> Sums:
        """Return the sums up to each index of a dimension, after those of what came before."""
        after = Sums(self.count.cumsum(dim), self.total.cumsum(dim))
        return after if before is None else before.unsqueeze(dim) + after

    def windowed(self, dim: int, window: int) -> Sums:
        """Return the sums over each window of consecutive indices of a dimension."""
        return Sums(*(part.unfold(dim, window, 1).sum(-1) for part in self))

    def unsqueeze(self, dim: int) -> Sums:
        """Return them with one more dimension."""
        return Sums(self.count.unsqueeze(dim), self.total.unsqueeze(dim))

    def mean(self, dtype: torch.dtype) -> Tensor:
        """Return the mean; zero where nothing is."""
        return (self.total / _beside(nonzero(self.count), self.total)).to(dtype)


def _beside(count: Tensor, tensor: Tensor) -> Tensor:
    """View counts so that they broadcast to what has more dimensions behind."""
    return count[(..., *(None,) * (tensor.dim() - count.dim()))]


class Moments(NamedTuple):
    """Weighted first and second moments of values and keys about an origin: the fold of covariances.

    Attributes:
        origins: What values and keys are taken relative to, ``(*, D_v)`` and ``(*, D)``.
        values: Sums of the values ``(*, D_v)``.
        keys: Sums of the keys ``(*, D)``.
        products: Sums of their outer products ``(*, D_v, D)``.
    """

    origins: tuple[Tensor, Tensor]
    values: Sums
    keys: Sums
    products: Sums

    @classmethod
    def of(
        cls, covariance: Tensor, value: Tensor, key: Tensor, count: Tensor, origins: tuple[Tensor, Tensor]
    ) -> Moments:
        """Return the moments of which there are a covariance, both means and a count, about an origin."""
        present = (count > 0).unsqueeze(-1)
        value, key = (torch.where(present, mean - at, 0.0) for mean, at in zip((value, key), origins, strict=True))
        products = covariance + value.unsqueeze(-1) * key.unsqueeze(-2)
        return cls(origins, Sums.of(value, count), Sums.of(key, count), Sums.of(products, count))

    def __add__(self, other: Moments) -> Moments:  # type: ignore[override]
        """Return the moments of both, which have one origin."""
        return Moments(self.origins, self.values + other.values, self.keys + other.keys, self.products + other.products)

    def running(self, dim: int, before: Moments | None = None) -> Moments:
        """Return the moments up to each index of a dimension, after those of what came before."""
        sums = (self.values, self.keys, self.products)
        befores = (None,) * 3 if before is None else before[1:]
        return Moments(self.origins, *(each.running(dim, first) for each, first in zip(sums, befores, strict=True)))

    def windowed(self, dim: int, window: int) -> Moments:
        """Return the moments over each window of consecutive indices of a dimension."""
        return Moments(self.origins, *(each.windowed(dim, window) for each in self[1:]))

    def covariance(self, dtype: torch.dtype) -> Tensor:
        """Return the central second moment; zero where nothing is."""
        wide = self.products.total.dtype
        value, key, product = (each.mean(wide) for each in self[1:])
        return (product - value.unsqueeze(-1) * key.unsqueeze(-2)).to(dtype)


@dataclass(frozen=True, eq=False)
class Means:
    """Marginal means of one tensor, one behind the other.

    Attributes:
        sizes: Sizes of the modes.
        blocks: Kept subsets, and their means ``(*batch, S, D)`` with S the sum of the numbers of their indices. Batch
            dimensions of blocks broadcast against each other.
    """

    sizes: tuple[int, ...]
    blocks: tuple[tuple[Family, Tensor], ...]

    @classmethod
    def of(cls, sizes: Sequence[int], found: Mapping[Kept, Tensor], batch: int) -> Means:
        """Put means ``(*batch, *n_U, D)`` of kept subsets behind each other; the tensor itself stays by itself."""
        rows = {kept: mean.flatten(batch, -2) if kept else mean.unsqueeze(-2) for kept, mean in found.items()}
        whole = [((kept,), row) for kept, row in rows.items() if len(kept) == len(sizes) and len(rows) > 1]
        small = {kept: row for kept, row in rows.items() if len(kept) < len(sizes) or len(rows) == 1}
        parts = list(small.values())
        return cls(tuple(sizes), ((tuple(small), parts[0] if len(parts) == 1 else torch.cat(parts, -2)), *whole))

    @property
    def family(self) -> Family:
        """Kept subsets that are held."""
        return tuple([kept for family, _ in self.blocks for kept in family])

    def length(self, kept: Kept) -> int:
        """Number of means of a kept subset."""
        return math.prod([self.sizes[mode] for mode in kept])

    def rows(self, kept: Kept) -> Tensor:
        """Return the means of one kept subset as rows ``(*batch, S_U, D)``."""
        for family, rows in self.blocks:
            if kept in family:
                if len(family) == 1:
                    return rows
                start = sum([self.length(before) for before in family[: family.index(kept)]])
                return rows.narrow(-2, start, self.length(kept))
        raise OptionError(f"the summary does not hold the means of the kept modes {kept}.")

    def get(self, kept: Kept) -> Tensor:
        """Return the means of one kept subset over its modes, ``(*batch, *n_U, D)``."""
        rows = self.rows(kept)
        return rows.squeeze(-2) if not kept else rows.unflatten(-2, [self.sizes[mode] for mode in kept])

    def joined(self, family: Family) -> Tensor:
        """Return the means of some kept subsets one behind the other; no copy where they lie so."""
        for held, rows in self.blocks:
            if held[: len(family)] == family:
                return rows if len(held) == len(family) else rows[..., : sum(map(self.length, family)), :]
        parts = [self.rows(kept) for kept in family]
        batch = torch.broadcast_shapes(*[part.shape[:-2] for part in parts])
        return torch.cat([part.expand(*batch, *part.shape[-2:]) for part in parts], -2)

    def map(self, function: Callable[[Tensor], Tensor]) -> Means:
        """Apply a function of rows to all blocks."""
        return Means(self.sizes, tuple([(family, function(rows)) for family, rows in self.blocks]))

    def project(self, module: Callable[[Tensor], Tensor], num_heads: int | None) -> Means:
        """Call a linear map with all rows at once, and split what it gives into heads, the last batch dimension.

        Args:
            module: The map, from ``(B, S, C)`` to ``(B, S, E)``.
            num_heads: Number of heads H, or None for no such dimension.
        """
        flat = [rows.flatten(1, -2) if rows.dim() > 3 else rows for _, rows in self.blocks]
        mapped = module(flat[0] if len(flat) == 1 else torch.cat(flat, 1))
        parts = [mapped] if len(flat) == 1 else mapped.split_with_sizes([rows.shape[1] for rows in flat], 1)
        blocks = []
        for (family, rows), part in zip(self.blocks, parts, strict=True):
            part = part if rows.dim() == 3 else part.unflatten(1, rows.shape[1:-1])
            if num_heads is not None:
                part = part.unflatten(-1, (num_heads, -1)).transpose(-3, -2)
            blocks.append((family, part))
        return Means(self.sizes, tuple(blocks))


@dataclass(frozen=True, eq=False)
class Summary:
    """Marginal means of keys and values over a grid, with their weights.

    Attributes:
        sizes: Sizes of the modes.
        kept: Mode subsets whose marginal means are held.
        key_means: Means of the keys.
        value_means: Means of the values.
        counts: How many positions stand behind each mean, as means with one channel, with batch dimensions that may be
            1; None if all positions count once.
        mode_weights: Weights of the indices of each mode, ``(*batch, n_m)`` with batch dimensions that may be 1, or
            None for a mode whose indices all count once. None altogether where the weights of positions are no
            product over modes.
        covariance: Second central moment of values and keys, ``(*batch, D_v, D)``, if asked for.
        key_covariance: Second central moment of the keys, ``(*batch, D, D)``, if asked for.
        indices: Whether it is known how often the indices of each mode count.

    Examples:
        >>> import torch, tensorattn as ta
        >>> video = torch.randn(2, 6, 14, 14, 32)
        >>> summary = ta.summarize(video, video, order=3)
        >>> [tuple(mean.shape) for mean in summary.values]
        [(2, 6, 32), (2, 14, 32), (2, 14, 32), (2, 32)]
    """

    sizes: tuple[int, ...]
    kept: Family
    key_means: Means
    value_means: Means
    counts: Means | None = None
    mode_weights: Vectors | None = None
    covariance: Tensor | None = None
    key_covariance: Tensor | None = None
    indices: bool = True

    @property
    def order(self) -> int:
        """Number of modes N."""
        return len(self.sizes)

    @property
    def batch(self) -> tuple[int, ...]:
        """Batch dimensions."""
        return tuple(self.key_means.blocks[0][1].shape[:-2])

    @property
    def positions(self) -> int:
        """Number of positions P, present or not."""
        return math.prod(self.sizes)

    @property
    def keys(self) -> tuple[Tensor | None, ...]:
        """For each kept subset U, the mean keys ``(*batch, *n_U, D)``, or None where they were not asked for."""
        return tuple([self.key_means.get(kept) if kept in self.key_means.family else None for kept in self.kept])

    @property
    def values(self) -> tuple[Tensor | None, ...]:
        """For each kept subset U, the mean values ``(*batch, *n_U, D_v)``, or None where they were not asked for."""
        return tuple([self.value_means.get(kept) if kept in self.value_means.family else None for kept in self.kept])

    @property
    def weights(self) -> tuple[Tensor | None, ...]:
        """For each kept subset U, how many positions stand behind each mean, ``(*batch, *n_U)``; None if all once."""
        return tuple([self.count(kept) for kept in self.kept])

    def key(self, kept: Kept) -> Tensor:
        """Return the mean keys of one kept subset.

        Args:
            kept: Modes, ascending.

        Raises:
            OptionError: If they are not held.
        """
        return self.key_means.get(kept)

    def value(self, kept: Kept) -> Tensor:
        """Return the mean values of one kept subset.

        Args:
            kept: Modes, ascending.

        Raises:
            OptionError: If they are not held.
        """
        return self.value_means.get(kept)

    def count(self, kept: Kept) -> Tensor | None:
        """Return how many positions stand behind each mean of one kept subset; None if all positions count once.

        Args:
            kept: Modes, ascending.
        """
        return None if self.counts is None else self.counts.get(kept).squeeze(-1)

    def tokens(self, coefficients: Mapping[Kept, int]) -> Tokens:
        """Return the means of some kept subsets as tokens, one softmax a subset.

        Args:
            coefficients: How often each subset enters the sum.
        """
        family = tuple(coefficients)
        sets = []
        for kept, coefficient in coefficients.items():
            length, behind = self.key_means.length(kept), positions_behind(self.sizes, kept)
            sets.append(TokenSet(length, coefficient, behind, constant=not kept))
        key, value, log_weight = self.key_means.joined(family), self.value_means.joined(family), None
        if self.counts is not None:
            count = self.counts.joined(family)
            key, value = (torch.where(count > 0, tensor, 0.0) for tensor in (key, value))
            log_weight = log_weights(count.squeeze(-1)).to(accumulation_dtype(key.dtype))
        return Tokens(key, value, log_weight, tuple(sets))

    def mode_tokens(self) -> Tokens:
        """Return the averages of all modes as one set of tokens, each counted as often as its index."""
        family = main_effects(self.order)
        tokens = self.tokens(dict.fromkeys(family, 1))
        length = sum([each.length for each in tokens.sets])
        log_weight = None
        if self.counts is not None:
            parts = [self.mode_log_weight(mode) for mode in range(self.order)]
            batch = torch.broadcast_shapes(*[part.shape[:-1] for part in parts])
            log_weight = torch.cat([part.expand(*batch, -1) for part in parts], -1)
            log_weight = log_weight.to(accumulation_dtype(tokens.key.dtype))
        return Tokens(tokens.key, tokens.value, log_weight, (TokenSet(length),))

    def mode_log_weight(self, mode: int) -> Tensor:
        """Return the logarithm of the weights of the indices of a mode; of zeros where no position is present.

        Where the weights of positions are no product over modes, an index counts in proportion to the positions present
        in its slice, and all indices with a position present count together as often as there are of them: once each
        where the positions present are a product over modes after all.

        Args:
            mode: Index of the mode.
        """
        count = self.count((mode,))
        assert count is not None
        total = count.sum(-1, keepdim=True)
        if self.mode_weights is None:
            present = (count > 0).sum(-1, keepdim=True)
            return log_weights(count * present / nonzero(total))
        weight = self.mode_weights[mode]
        return log_weights(
            torch.where(total > 0, 1.0 if weight is None else weight.to(total.dtype), 0.0).expand_as(count)
        )

    def in_type(self, dtype: torch.dtype) -> Summary:
        """Return the same summary with means of another type.

        Args:
            dtype: The type.
        """
        return self.with_means(lambda means: means.map(lambda rows: rows.to(dtype)))

    def with_means(self, function: Callable[[Means], Means]) -> Summary:
        """Return the same summary with other means, which are made once where those of keys and values are one.

        Args:
            function: From means to means.
        """
        keys = function(self.key_means)
        values = keys if self.value_means is self.key_means else function(self.value_means)
        return dataclasses.replace(self, key_means=keys, value_means=values)

    def with_heads(self) -> Summary:
        """Return the same weights for means that have heads as their last batch dimension."""
        counts = None if self.counts is None else self.counts.map(lambda rows: rows.unsqueeze(-3))
        vectors = self.mode_weights and tuple([None if v is None else v.unsqueeze(-2) for v in self.mode_weights])
        return dataclasses.replace(self, counts=counts, mode_weights=vectors)

    @retells
    def project(
        self,
        key_weight: Tensor,
        value_weight: Tensor,
        *,
        key_bias: Tensor | None = None,
        value_bias: Tensor | None = None,
        num_heads: int | None = None,
    ) -> Summary:
        """Return the summary of ``key @ key_weight.T + key_bias`` and of the values likewise.

        Averages of a linear map are the linear map of the averages, so this costs one product with each mean
        instead of one with each position.

        Args:
            key_weight: ``(E, D)``, as in ``torch.nn.Linear``.
            value_weight: ``(E_v, D_v)``.
            key_bias: ``(E,)``.
            value_bias: ``(E_v,)``.
            num_heads: Number of heads H that E and E_v are split into. They become the last batch dimension.

        Returns:
            The summary of the projected tensors.

        Raises:
            ShapeError: If a weight or bias does not fit the means, or ``num_heads`` does not divide the rows.
            DtypeError: If one is not a floating-point tensor.
            OptionError: If ``num_heads`` is not a positive integer.

        Examples:
            >>> import torch, tensorattn as ta
            >>> x, w = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
            >>> early, late = ta.summarize(x @ w.T, x @ w.T, order=2), ta.summarize(x, x, order=2).project(w, w)
            >>> torch.allclose(early.keys[0], late.keys[0])
            True
        """
        if num_heads is not None:
            check(num_heads, "num_heads", "integer", least=1)
        _check_map("key", self.key_means, key_weight, key_bias, num_heads)
        _check_map("value", self.value_means, value_weight, value_bias, num_heads)

        def mapped(means: Means, weight: Tensor, bias: Tensor | None) -> Means:
            def apply(rows: Tensor) -> Tensor:
                row = torch.nn.functional.linear(
                    rows, weight.to(rows.dtype), None if bias is None else bias.to(rows.dtype)
                )
                return row if num_heads is None else row.unflatten(-1, (num_heads, -1)).transpose(-3, -2)

            return means.map(apply)

        def moment(tensor: Tensor | None, left: Tensor, right: Tensor) -> Tensor | None:
            if tensor is None:
                return None
            left, right = left.to(tensor.dtype), right.to(tensor.dtype)
            if num_heads is not None:
                left, right, tensor = (
                    left.unflatten(0, (num_heads, -1)),
                    right.unflatten(0, (num_heads, -1)),
                    tensor.unsqueeze(-3),
                )
            return matmul(matmul(left, tensor), right.mT)

        return dataclasses.replace(
            self if num_heads is None else self.with_heads(),
            key_means=mapped(self.key_means, key_weight, key_bias),
            value_means=mapped(self.value_means, value_weight, value_bias),
            covariance=moment(self.covariance, value_weight, key_weight),
            key_covariance=moment(self.key_covariance, key_weight, key_weight),
        )

    @retells
    def merge(self, other: Summary, *, mode: int) -> Summary:
        """Return the summary of two parts of a tensor put together along a mode.

        It is held in float64, so that many parts add up without loss.

        Args:
            other: Summary of the second part, with the same kept subsets.
            mode: Index of the mode along which the parts follow each other.

        Returns:
            The summary of the whole: exact, as all its parts are sums over positions.

        Raises:
            ShapeError: If another mode differs in size, or orders, kept subsets, batch dimensions or head sizes
                differ, or one holds means that the other does not.
            DtypeError: If the types or devices differ.
            OptionError: If ``other`` is no summary.
            ModesError: If there is no such mode.

        Examples:
            >>> import torch, tensorattn as ta
            >>> x = torch.randn(5, 3, 4, dtype=torch.float64)
            >>> first, second = (ta.summarize(part, part, order=2) for part in x.split([2, 3]))
            >>> whole = ta.summarize(x, x, order=2)
            >>> torch.allclose(first.merge(second, mode=0).keys[1], whole.keys[1])
            True
        """
        if not isinstance(other, Summary):
            raise OptionError(f"other must be a Summary, got {type(other).__name__}.")
        mode = ModeSpec.parse(self.order).index(mode)
        _check_mergeable(self, other, mode)
        sizes = tuple([size + (k == mode) * other.sizes[k] for k, size in enumerate(self.sizes)])
        plain = self.counts is None and other.counts is None
        first, second, batch = self._written_out(), other._written_out(), len(self.batch)
        count_of_one, count_of_two = first.counts, second.counts
        assert count_of_one is not None and count_of_two is not None

        def merged(one: Means, two: Means) -> Means:
            """Add means up where they do not keep the mode; put them behind each other where they do."""
            found = {}
            for kept in one.family:
                pair = one.get(kept), two.get(kept)
                if mode in kept:
                    found[kept] = _cat(*pair, dim=batch + kept.index(mode))
                else:
                    counts = (counts_of.get(kept).squeeze(-1) for counts_of in (count_of_one, count_of_two))
                    one_sum, two_sum = (Sums.of(mean, count) for mean, count in zip(pair, counts, strict=True))
                    found[kept] = (one_sum + two_sum).mean(one_sum.total.dtype)
            return Means.of(sizes, found, batch)

        keys = merged(first.key_means, second.key_means)
        same = self.value_means is self.key_means and other.value_means is other.key_means
        values = keys if same else merged(first.value_means, second.value_means)
        count_of = {}
        for kept in count_of_one.family:
            one, two = count_of_one.get(kept), count_of_two.get(kept)
            count_of[kept] = _cat(one, two, dim=batch + kept.index(mode)) if mode in kept else one + two
        counts = Means.of(sizes, count_of, batch)
        result = Summary(sizes, self.kept, keys, values, indices=self.indices and other.indices)
        if self.covariance is not None and other.covariance is not None:
            covariance, key_covariance = _merged_covariances(first, second)
            result = dataclasses.replace(result, covariance=covariance, key_covariance=key_covariance)
        if plain:
            return dataclasses.replace(result, mode_weights=(None,) * self.order)
        return dataclasses.replace(result, counts=counts, mode_weights=_merged_vectors(first, second, mode, batch))

    def _written_out(self) -> Summary:
        """Return the same summary with counts as tensors."""
        if self.counts is not None:
            return self
        like = self.key_means.blocks[0][1]
        ones, wide = (1,) * len(self.batch), counting_dtype(like.device)
        found = {}
        for kept in self.kept:
            shape, count = (*ones, *[self.sizes[mode] for mode in kept], 1), positions_behind(self.sizes, kept)
            found[kept] = torch.full(shape, count, dtype=wide, device=like.device)
        return dataclasses.replace(self, counts=Means.of(self.sizes, found, len(ones)))


def _merged_covariances(first: Summary, second: Summary) -> tuple[Tensor, Tensor]:
    """Add up the second moments of two parts about the grand mean of the first."""
    found = []
    for of_keys in (False, True):
        parts: list[Moments] = []
        for part in (first, second):
            covariance, count = part.key_covariance if of_keys else part.covariance, part.count(())
            assert covariance is not None and count is not None
            wide = counting_dtype(covariance.device)
            value, key = (
                (part.key if of_keys or name == "key" else part.value)(()).to(wide) for name in ("value", "key")
            )
            origins = parts[0].origins if parts else (value, key)
            parts.append(Moments.of(covariance.to(wide), value, key, count, origins))
        found.append((parts[0] + parts[1]).covariance(parts[0].products.total.dtype))
    return found[0], found[1]


def _merged_vectors(first: Summary, second: Summary, mode: int, batch: int) -> Vectors | None:
    """Return weights of modes of two parts, where the weights of the whole are known to be their product."""
    if first.mode_weights is None or second.mode_weights is None:
        return None
    vectors: list[Vector] = []
    for k, (one, two) in enumerate(zip(first.mode_weights, second.mode_weights, strict=True)):
        if k == mode:
            like = next((v for v in (one, two) if v is not None), None)
            if like is not None:
                ones = [like.new_ones((*(1,) * batch, part.sizes[k])) for part in (first, second)]
                one, two = (own if v is None else v for v, own in zip((one, two), ones, strict=True))
                one = _cat(one, two, dim=batch)
        elif one is not two and (one is None or two is None or not _equal(one, two)):
            return None
        vectors.append(one)
    return tuple(vectors)


def _equal(one: Tensor, two: Tensor) -> bool:
    """Tell whether two vectors of weights are known to be the same."""
    return readable(one) and readable(two) and one.shape == two.shape and torch.equal(one, two)


def _cat(one: Tensor, two: Tensor, dim: int) -> Tensor:
    """Concatenate two tensors whose other dimensions may be 1."""
    shapes = [[*part.shape[:dim], 1, *part.shape[dim + 1 :]] for part in (one, two)]
    common = torch.broadcast_shapes(*shapes)
    dtype = torch.promote_types(one.dtype, two.dtype)
    return torch.cat([part.expand(*common[:dim], -1, *common[dim + 1 :]).to(dtype) for part in (one, two)], dim)


def _check_map(side: str, means: Means, weight: Tensor, bias: Tensor | None, num_heads: int | None) -> None:
    """Check that a linear map fits means, and that heads divide what it maps to."""
    for name, tensor, dims in (("weight", weight, 2), ("bias", bias, 1)):
        if tensor is None and name == "bias":
            continue
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise DtypeError(f"{side}_{name} must be a floating-point tensor, got {got}.")
        if tensor.dim() != dims:
            raise ShapeError(f"{side}_{name} has {tensor.dim()} dimensions, but needs {dims}.")
    held = means.blocks[0][1].shape[-1]
    if weight.shape[1] != held:
        raise ShapeError(f"{side}_weight has {weight.shape[1]} columns, but the {side}s have head size {held}.")
    if bias is not None and len(bias) != len(weight):
        raise ShapeError(f"{side}_bias has {len(bias)} entries, but {side}_weight has {len(weight)} rows.")
    if num_heads is not None and len(weight) % num_heads:
        raise ShapeError(f"{side}_weight has {len(weight)} rows, which num_heads={num_heads} does not divide.")


def _check_mergeable(first: Summary, second: Summary, mode: int) -> None:
    """Check that two parts fit together along a mode."""
    if first.order != second.order:
        raise ShapeError(f"the summaries have different orders: {first.order} and {second.order}.")
    if first.kept != second.kept:
        raise ShapeError(f"the summaries hold different kept modes: {first.kept} and {second.kept}.")
    if first.batch != second.batch:
        raise ShapeError(f"the summaries have different batch dimensions: {first.batch} and {second.batch}.")
    for k, (size, other) in enumerate(zip(first.sizes, second.sizes, strict=True)):
        if k != mode and size != other:
            raise ShapeError(f"mode {k} has size {size} in one summary but {other} in the other.")
    for side, means, others in (
        ("keys", first.key_means, second.key_means),
        ("values", first.value_means, second.value_means),
    ):
        for kept in first.kept:
            if (kept in means.family) != (kept in others.family):
                raise ShapeError(f"only one of the summaries holds the mean {side} of the kept modes {kept}.")
        one, two = means.blocks[0][1], others.blocks[0][1]
        if one.shape[-1] != two.shape[-1]:
            raise ShapeError(
                f"the {side} have head size {one.shape[-1]} in one summary but {two.shape[-1]} in the other."
            )
        if one.dtype != two.dtype and torch.float64 not in (one.dtype, two.dtype):
            raise DtypeError(f"the type of the {side} is {one.dtype} in one summary but {two.dtype} in the other.")
        if one.device != two.device:
            raise DtypeError(f"the device of the {side} is {one.device} in one summary but {two.device} in the other.")
    moments = [summary.covariance is not None for summary in (first, second)]
    if moments[0] != moments[1] or (moments[0] and () not in first.kept):
        raise ShapeError("second moments merge only if both summaries hold them, and their grand means.")


@retells
def summarize(
    key: Tensor,
    value: Tensor,
    *,
    order: int,
    kept: Iterable[Iterable[int]] | None = None,
    second_moment: bool = False,
    weights: GivenWeights = None,
    mask: Mask = None,
    lengths: Lengths = None,
) -> Summary:
    r"""Summarise keys and values by their marginal means.

    Args:
        key: Keys over the grid.
        value: Values over the grid. Pass the same tensor as ``key`` to read it once.
        order: Number of modes N.
        kept: Mode subsets whose marginal means are wanted; by default the N mode averages and the grand mean.
        second_moment: Whether to hold the central second moments :math:`\mathrm{E}[(v - \bar v)(k - \bar k)^\top]` of
            values and keys, and of the keys alone.
        weights: One non-negative vector a mode or None for equal weights, or one tensor over the grid: multiplicities.
        mask: True where a position takes part. A mask that is no product over modes takes a copy of the tensors.
        lengths: How many leading indices of each mode take part: ``(*batch, N)``, or one entry a mode.

    Returns:
        The summary, in float32 for half precision. Means that nothing stands behind are zero.

    Raises:
        ShapeError: If key and value do not have the same batch dimensions and mode sizes, a mode is empty, or the mask
            or lengths do not fit them.
        DtypeError: If they are not floating point, or of different types, the mask is not bool, or lengths are no
            integers.
        WeightsError: If weights have the wrong length, are negative, not finite, or all zero, or a length is negative
            or longer than its mode.
        ModesError: If ``kept`` holds no subsets, or names a mode that does not exist.
        OptionError: If ``second_moment`` is neither True nor False.

    Shape:
        - key: :math:`(*, n_1, \dots, n_N, D)`, value: :math:`(*, n_1, \dots, n_N, D_v)`

    Examples:
        >>> summary = summarize(torch.ones(2, 4, 5, 8), torch.ones(2, 4, 5, 3), order=2)
        >>> summary.kept, [tuple(mean.shape) for mean in summary.values]
        (((0,), (1,), ()), [(2, 4, 3), (2, 5, 3), (2, 3)])
        >>> x = torch.tensor([[1.0, 2.0], [3.0, torch.nan]])[..., None]
        >>> mask = torch.tensor([[True, True], [True, False]])
        >>> summary = summarize(x, x, order=2, mask=mask)
        >>> summary.key((0,))[:, 0], summary.weights[0]
        (tensor([1.5000, 3.0000]), tensor([2., 1.], dtype=torch.float64))
    """
    check_floating(key=key, value=value)
    grid = key_shape(key.shape, value.shape, order)
    spec, family = ModeSpec.parse(order), (*main_effects(order), ())
    if kept is not None:
        family = tuple(tuple(sorted({spec.index(mode) for mode in subset})) for subset in mode_subsets(kept))
    check(second_moment, "second_moment", "switch")
    if not family:
        raise ModesError("kept is empty, but a summary needs at least one subset of modes.")
    return make_summary(key, value, Needs(family, second_moment), read_weights(weights, mask, lengths, grid, key))


def make_summary(key: Tensor, value: Tensor, needs: Needs, weights: Weights) -> Summary:
    """Summarise, unchecked.

    Args:
        key: Keys over the grid.
        value: Values over the grid; the same tensor is read once.
        needs: What is wanted.
        weights: Checked weights.
    """
    order = weights.order
    batch, sizes = key.dim() - order - 1, tuple(key.shape[key.dim() - order - 1 : -1])
    family = tuple(dict.fromkeys(needs.held))
    of_keys = family if needs.keys is None else needs.keys
    of_values = family if needs.values is None else needs.values

    def means_of(tensor: Tensor, wanted: Family) -> Means:
        return Means.of(sizes, dict(zip(wanted, marginal_means(tensor, wanted, weights), strict=True)), batch)

    if value is key and of_keys != of_values:
        both = tuple([kept for kept in family if kept in of_keys or kept in of_values])
        found = dict(zip(both, marginal_means(key, both, weights), strict=True))
        keys, values = (Means.of(sizes, {k: found[k] for k in wanted}, batch) for wanted in (of_keys, of_values))
    else:
        keys = means_of(key, of_keys)
        values = keys if value is key else means_of(value, of_values)
    covariance = key_covariance = None
    if needs.second_moment:
        share = weights.over_grid()
        key_mean, value_mean = keys.get(()), values.get(())
        key_covariance = _covariance(key, key, key_mean, key_mean, share, order)
        covariance = key_covariance if value is key else _covariance(value, key, value_mean, key_mean, share, order)
    counts, vectors = None, weights.vectors if weights.grid is None else None
    if not weights.plain:
        found = dict(zip(family, position_counts(weights, sizes, family), strict=True))
        counts = Means.of(
            sizes, {kept: _with_batch(count, batch + len(kept)).unsqueeze(-1) for kept, count in found.items()}, batch
        )
        vectors = vectors and tuple([None if v is None else _with_batch(v, batch + 1) for v in vectors])
    return Summary(sizes, family, keys, values, counts, vectors, covariance, key_covariance, weights.indices)


def _with_batch(tensor: Tensor, dims: int) -> Tensor:
    """Give a tensor as many dimensions, with batch dimensions of size 1 in front."""
    return tensor[(None,) * (dims - tensor.dim())]


def _covariance(
    left: Tensor, right: Tensor, left_mean: Tensor, right_mean: Tensor, share: Tensor | None, order: int
) -> Tensor:
    """Second central moment of two tensors over the grid."""
    if order == 0:  # one position has no spread
        return left_mean.new_zeros((*left_mean.shape, right_mean.shape[-1]))
    first, modes = left.dim() - order - 1, (None,) * order
    right_centred = right.to(right_mean.dtype) - right_mean[(..., *modes, slice(None))]
    left_centred = right_centred if left is right else left.to(left_mean.dtype) - left_mean[(..., *modes, slice(None))]
    count: Tensor | int = math.prod(left.shape[first:-1])
    if share is not None:
        present = (share > 0).unsqueeze(-1)
        share = share.to(right_mean.dtype).expand(*share.shape[: share.dim() - order], *left.shape[first:-1])
        right_centred = torch.where(present, right_centred, 0.0)
        left_centred = torch.where(present, left_centred, 0.0) * share.unsqueeze(-1)
        count = nonzero(share.sum(list(range(-order, 0))))[..., None, None]
    return matmul(left_centred.flatten(first, -2).mT, right_centred.flatten(first, -2)) / count
