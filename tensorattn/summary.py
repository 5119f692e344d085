r"""What operators know of keys and values: marginal means, the weight behind each, and second moments.

A summary is a set of sufficient statistics of the tensor-normal model behind Kronecker attention. Because its parts are
sums over positions, it commutes with linear maps (`Summary.project`) and adds up over parts of a tensor
(`Summary.merge`): a summary of a projected tensor is the projected summary, and the summary of a whole is that of its
parts merged.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tensorattn.contraction_tree import Family, Kept, main_effects
from tensorattn.errors import DtypeError, OptionError, ShapeError, retells
from tensorattn.modes import ModeSpec
from tensorattn.options import check_count
from tensorattn.softmax import TokenSet
from tensorattn.tokens import Row, join_tokens, split_tokens
from tensorattn.weights import GridWeights, Vector, Vectors, Weights, counting_dtype, log_weights

__all__ = [
    "Means",
    "Summary",
    "apply_linear",
    "joined_linear",
    "picked",
    "projected",
    "projected_with_queries",
    "split_heads",
]

Means = Sequence[Tensor | None]  # one a kept subset, or None where it is not held
Map = tuple[Tensor, Tensor | None]  # the matrix of a linear map, and its bias


@dataclass(frozen=True, eq=False)
class Summary:
    """Marginal means of keys and values over a grid, with their weights.

    Attributes:
        sizes: Sizes of the modes.
        kept: Mode subsets whose marginal means are held.
        keys: For each kept subset U, the mean keys ``(*batch, *n_U, D)``, or None where they were not asked for.
        values: For each kept subset U, the mean values ``(*batch, *n_U, D_v)``, or None likewise.
        weights: For each kept subset U, how many positions stand behind each mean, ``(*batch, *n_U)`` with batch
            dimensions that may be 1; None if all positions count once.
        mode_weights: Weights of the indices of each mode, ``(*batch, n_m)`` with batch dimensions that may be 1, or
            None for a mode whose indices all count once. None altogether where the weights of positions are no
            product over modes.
        covariance: Second central moment of values and keys, ``(*batch, D_v, D)``, if asked for.
        key_covariance: Second central moment of the keys, ``(*batch, D, D)``, if asked for.
    """

    sizes: tuple[int, ...]
    kept: Family
    keys: Means
    values: Means
    weights: tuple[Tensor | None, ...]
    mode_weights: Vectors | None
    covariance: Tensor | None = None
    key_covariance: Tensor | None = None

    @property
    def order(self) -> int:
        """Number of modes N."""
        return len(self.sizes)

    @property
    def batch(self) -> tuple[int, ...]:
        """Batch dimensions."""
        mean, modes = self._any_mean()
        return tuple(mean.shape[: -modes - 1])

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors that it holds."""
        return self._tensors()

    def _tensors(self) -> tuple[Tensor, ...]:
        """List them; a kind of summary may hold more."""
        of_modes = () if self.mode_weights is None else self.mode_weights
        keys, values = ((side.whole,) if type(side) is Row else side for side in (self.keys, self.values))
        parts = (*keys, *values, *self.weights, *of_modes, self.covariance, self.key_covariance)
        return tuple([part for part in parts if part is not None])

    def with_tensors(self, tensors: Sequence[Tensor]) -> Summary:
        """Return the same summary with other tensors in place of its own.

        Args:
            tensors: One for each of `tensors`, in their order.
        """
        given = iter(tensors)

        def replaced(parts: Means) -> tuple[Tensor | None, ...]:
            return tuple([None if part is None else next(given) for part in parts])

        keys, values = (
            Row(next(given), side.lengths) if type(side) is Row else replaced(side) for side in (self.keys, self.values)
        )
        weights = replaced(self.weights)
        mode_weights = None if self.mode_weights is None else replaced(self.mode_weights)
        moments = replaced((self.covariance, self.key_covariance))
        return Summary(self.sizes, self.kept, keys, values, weights, mode_weights, *moments)

    def _any_mean(self) -> tuple[Tensor, int]:
        """Return a mean that is held, and the number of modes that it keeps: one where means lie in a row."""
        for side in (self.keys, self.values):
            if type(side) is Row:
                return side.whole, 1
            for kept, mean in zip(self.kept, side, strict=True):
                if mean is not None:
                    return mean, len(kept)
        raise OptionError("the summary holds no means.")

    @property
    def positions(self) -> int:
        """Number of positions P, present or not."""
        return math.prod(self.sizes)

    def place(self, kept: Kept) -> int:
        """Return the place of a kept subset among those held.

        Args:
            kept: Modes, ascending.

        Raises:
            OptionError: If its means are not held.
        """
        if kept not in self.kept:
            raise OptionError(f"the summary holds the kept modes {self.kept}, but not {kept}.")
        return self.kept.index(kept)

    def key(self, kept: Kept) -> Tensor:
        """Return the mean keys of one kept subset.

        Args:
            kept: Modes, ascending.

        Raises:
            OptionError: If they are not held.
        """
        mean = self.keys[self.place(kept)]
        if mean is None:
            raise OptionError(f"the summary does not hold the mean keys of the kept modes {kept}.")
        return mean

    def value(self, kept: Kept) -> Tensor:
        """Return the mean values of one kept subset.

        Args:
            kept: Modes, ascending.

        Raises:
            OptionError: If they are not held.
        """
        mean = self.values[self.place(kept)]
        if mean is None:
            raise OptionError(f"the summary does not hold the mean values of the kept modes {kept}.")
        return mean

    def of_modes(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Return the mean keys and the mean values of every mode.

        Raises:
            OptionError: If some are not held.
        """
        effects = main_effects(self.order)
        return picked(self.keys, self.kept, effects), picked(self.values, self.kept, effects)

    def tokens(self, kept: Kept, coefficient: int = 1) -> TokenSet:
        """Return the means of one kept subset as a set of tokens.

        Args:
            kept: Modes, ascending.
            coefficient: How often the set enters a sum over sets.
        """
        place = self.place(kept)
        key, value, weight = self.key(kept), self.value(kept), self.weights[place]
        batch = key.dim() - len(kept) - 1
        if weight is not None:
            weight = log_weights(weight.flatten(batch) if kept else weight.unsqueeze(-1)).to(key.dtype)
        outside = [size for mode, size in enumerate(self.sizes) if mode not in kept]
        return TokenSet(_in_a_row(key, batch), _in_a_row(value, batch), weight, math.prod(outside), coefficient)

    def mode_log_weight(self, mode: int) -> Tensor | None:
        """Return the logarithm of the weights of the indices of a mode; of zeros where no position is present.

        Where the weights of positions are no product over modes, an index counts in proportion to the positions present
        in its slice, and all indices with a position present count together as often as there are of them: once each
        where the positions present are a product over modes after all. None if all positions count once.

        Args:
            mode: Index of the mode.
        """
        total = self._total()
        if total is None:
            return None
        if self.mode_weights is None:
            count = self.slice_count(mode)
            present = (count > 0).sum(-1, keepdim=True)
            return log_weights(count * present / torch.where(present > 0, count.sum(-1, keepdim=True), 1))
        weight = self.mode_weights[mode]
        if weight is None:
            weight = total.new_ones([1] * len(self.batch) + [self.sizes[mode]])
        return log_weights(torch.where(total.unsqueeze(-1) > 0, weight, 0.0))

    def position_weights(self) -> Weights:
        """Return the weights that the means were made with, to average queries by them; held if they were asked for."""
        if self.mode_weights is not None:
            return self.mode_weights
        weight = self.weights[self.place(tuple(range(self.order)))]
        assert weight is not None
        return GridWeights(weight.to(self._any_mean()[0].dtype), self.order)

    def slice_count(self, mode: int) -> Tensor:
        """Return the weight of the positions in each slice of a mode, ``(*batch, n_mode)``, where weights are held.

        Args:
            mode: Index of the mode.
        """
        count = self.weights[self.place((mode,))]
        assert count is not None
        return count

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
        self._check_projectable(key_weight, value_weight, key_bias, value_bias, num_heads)
        found = projected(self, (key_weight, key_bias), (value_weight, value_bias), num_heads)
        return dataclasses.replace(found, keys=tuple(found.keys), values=tuple(found.values))

    def _check_projectable(
        self,
        key_weight: Tensor,
        value_weight: Tensor,
        key_bias: Tensor | None,
        value_bias: Tensor | None,
        num_heads: int | None,
    ) -> None:
        """Check that linear maps fit the means, and that heads divide what they map to."""
        if num_heads is not None:
            check_count(num_heads, "num_heads")
            if num_heads < 1:
                raise OptionError(f"num_heads must be at least 1, got {num_heads}.")
        sides = (("key", self.keys, key_weight, key_bias), ("value", self.values, value_weight, value_bias))
        for side, means, weight, bias in sides:
            for name, tensor, dims in (("weight", weight, 2), ("bias", bias, 1)):
                if tensor is None and name == "bias":
                    continue
                if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                    got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                    raise DtypeError(f"{side}_{name} must be a floating-point tensor, got {got}.")
                if tensor.dim() != dims:
                    raise ShapeError(f"{side}_{name} has {tensor.dim()} dimensions, but needs {dims}.")
            held = next((mean.shape[-1] for mean in means if mean is not None), None)
            if held is not None and weight.shape[1] != held:
                raise ShapeError(f"{side}_weight has {weight.shape[1]} columns, but the {side}s have head size {held}.")
            if bias is not None and len(bias) != len(weight):
                raise ShapeError(f"{side}_bias has {len(bias)} entries, but {side}_weight has {len(weight)} rows.")
            if num_heads is not None and len(weight) % num_heads:
                raise ShapeError(f"{side}_weight has {len(weight)} rows, which num_heads={num_heads} does not divide.")

    @retells
    def merge(self, other: Summary, *, mode: int) -> Summary:
        """Return the summary of two parts of a tensor put together along a mode.

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
        self._check_mergeable(other, mode)
        first, second = self, other
        if self.weights[0] is not None or other.weights[0] is not None:
            first, second = self._written_out(), other._written_out()
        batch = len(self.batch)
        keys, values, weights = [], [], []
        for place, kept in enumerate(self.kept):
            if mode in kept:
                join = functools.partial(_cat, dim=batch + kept.index(mode))
                weights.append(join(first.weights[place], second.weights[place]))
            else:
                share = _share(first, second, place)
                join = functools.partial(_mix, share=share.unsqueeze(-1) if isinstance(share, Tensor) else share)
                weights.append(_sum(first.weights[place], second.weights[place]))
            keys.append(join(first.keys[place], second.keys[place]))
            values.append(join(first.values[place], second.values[place]))
        share = _share(first, second)
        of_mode = share.unsqueeze(-1) if isinstance(share, Tensor) else share
        mode_weights: Vectors | None = None
        if first.mode_weights is not None and second.mode_weights is not None:
            mode_weights = tuple(
                _cat(one, two, batch) if k == mode else _mix(one, two, of_mode)
                for k, (one, two) in enumerate(zip(first.mode_weights, second.mode_weights, strict=True))
            )
        merged = Summary(
            tuple(size + (k == mode) * other.sizes[k] for k, size in enumerate(self.sizes)),
            self.kept,
            tuple(keys),
            tuple(values),
            tuple(weights),
            mode_weights,
        )
        if self.covariance is None or self.key_covariance is None:
            return merged
        shift_of_keys, shift_of_values = other.key(()) - self.key(()), other.value(()) - self.value(())
        between = share * (1 - share)
        spread = share[..., None, None] if isinstance(share, Tensor) else share
        outer = functools.partial(_outer, factor=between)
        return dataclasses.replace(
            merged,
            covariance=_sum(_mix(self.covariance, other.covariance, spread), outer(shift_of_values, shift_of_keys)),
            key_covariance=_sum(
                _mix(self.key_covariance, other.key_covariance, spread), outer(shift_of_keys, shift_of_keys)
            ),
        )

    def _check_mergeable(self, other: Summary, mode: int) -> None:
        """Check that two parts fit together along a mode."""
        if self.order != other.order:
            raise ShapeError(f"the summaries have different orders: {self.order} and {other.order}.")
        if self.kept != other.kept:
            raise ShapeError(f"the summaries hold different kept modes: {self.kept} and {other.kept}.")
        if self.batch != other.batch:
            raise ShapeError(f"the summaries have different batch dimensions: {self.batch} and {other.batch}.")
        for k, (size, second) in enumerate(zip(self.sizes, other.sizes, strict=True)):
            if k != mode and size != second:
                raise ShapeError(f"mode {k} has size {size} in one summary but {second} in the other.")
        for side, means, others in (("keys", self.keys, other.keys), ("values", self.values, other.values)):
            for kept, one, two in zip(self.kept, means, others, strict=True):
                if (one is None) != (two is None):
                    raise ShapeError(f"only one of the summaries holds the mean {side} of the kept modes {kept}.")
                if one is None or two is None:
                    continue
                if one.shape[-1] != two.shape[-1]:
                    raise ShapeError(
                        f"the {side} have head size {one.shape[-1]} in one summary but {two.shape[-1]} in the other."
                    )
                for what in ("dtype", "device"):
                    first, second = getattr(one, what), getattr(two, what)
                    if first != second:
                        word = "type" if what == "dtype" else what
                        raise DtypeError(
                            f"the {word} of the {side} is {first} in one summary but {second} in the other."
                        )
        moments = [summary.covariance is not None for summary in (self, other)]
        if moments[0] != moments[1] or (moments[0] and () not in self.kept):
            raise ShapeError("second moments merge only if both summaries hold them, and their grand means.")

    def _total(self) -> Tensor | None:
        """Weight of all positions together, ``(*batch,)`` with dimensions that may be 1; None if all count once."""
        weight = self.weights[0]
        if weight is None:
            return None
        return weight.flatten(len(self.batch)).sum(-1) if self.kept[0] else weight

    def _written_out(self) -> Summary:
        """Return the same summary with weights as tensors."""
        if self.weights[0] is not None:
            ones = [1] * len(self.batch)
            like = self.weights[0]
            if self.mode_weights is None:
                return self
            written = [
                like.new_ones([*ones, n]) if w is None else w
                for w, n in zip(self.mode_weights, self.sizes, strict=True)
            ]
            return dataclasses.replace(self, mode_weights=tuple(written))
        ones, (like, _) = [1] * len(self.batch), self._any_mean()
        counting = counting_dtype(like.device)
        grids = [[self.sizes[mode] for mode in kept] for kept in self.kept]
        return dataclasses.replace(
            self,
            weights=tuple(
                like.new_full([*ones, *grid], self.positions / math.prod(grid), dtype=counting) for grid in grids
            ),
            mode_weights=tuple(like.new_ones([*ones, size]) for size in self.sizes),
        )


def picked(means: Means, held: Family, kept: Family) -> Sequence[Tensor]:
    """Return the means of some kept subsets; those in a row stay in it where they are all there are.

    Args:
        means: One mean for each kept subset that is held, or None.
        held: These subsets.
        kept: The subsets that are wanted.

    Raises:
        OptionError: If one is not held.
    """
    if type(means) is Row and held == kept:
        return means
    found = dict(zip(held, means, strict=True))
    wanted = [mean for subset in kept if (mean := found.get(subset)) is not None]
    if len(wanted) < len(kept):
        raise OptionError(f"the summary does not hold all means of the kept modes {kept}.")
    return wanted


def projected(summary: Summary, of_keys: Map, of_values: Map, num_heads: int | None) -> Summary:
    """Project a summary as `Summary.project` does, unchecked.

    Args:
        summary: The summary.
        of_keys: Linear map of the keys.
        of_values: Linear map of the values.
        num_heads: Heads that they are split into, or None.
    """
    return projected_with_queries(summary, (), of_keys, of_values, num_heads)[0]


def projected_with_queries(
    summary: Summary, of_queries: Sequence[Map], of_keys: Map, of_values: Map, num_heads: int | None
) -> tuple[Summary, Means]:
    """Project a summary, and its mean keys to mean queries too, unchecked.

    Args:
        summary: The summary.
        of_queries: Linear map of the queries, if any.
        of_keys: Linear map of the keys.
        of_values: Linear map of the values.
        num_heads: Heads that they are split into, or None.

    Returns:
        The projected summary, and the mean queries of each kept subset; nothing without a map of theirs.
    """
    if all([key is value for key, value in zip(summary.keys, summary.values, strict=True)]):
        keys, values, *queries = _map_means(summary, summary.keys, (of_keys, of_values, *of_queries), num_heads)
    else:
        keys, *queries = _map_means(summary, summary.keys, (of_keys, *of_queries), num_heads)
        (values,) = _map_means(summary, summary.values, (of_values,), num_heads)
    weights, mode_weights = summary.weights, summary.mode_weights
    if num_heads is not None and weights[0] is not None:
        batch = len(summary.batch)
        weights = tuple(None if w is None else w.unsqueeze(batch) for w in weights)
        if mode_weights is not None:
            mode_weights = tuple(None if w is None else w.unsqueeze(batch) for w in mode_weights)
    covariance, key_covariance = summary.covariance, summary.key_covariance
    if covariance is not None:
        covariance = _map_moment(covariance, of_values[0], of_keys[0], num_heads)
    if key_covariance is not None:
        key_covariance = _map_moment(key_covariance, of_keys[0], of_keys[0], num_heads)
    found = Summary(summary.sizes, summary.kept, keys, values, weights, mode_weights, covariance, key_covariance)
    return found, queries[0] if queries else ()


def _map_means(summary: Summary, means: Means, maps: Sequence[Map], num_heads: int | None) -> Sequence[Means]:
    """Map all means of keys or values in one product a map, but the tensor itself, which nothing is joined to."""
    batch, order = len(summary.batch), summary.order
    pairs = list(zip(means, summary.kept, strict=True))
    held = [mean for mean, kept in pairs if mean is not None and len(kept) < order]
    mapped = joined_linear(held, batch, maps, num_heads) if held else [()] * len(maps)
    if len(held) == len(means):
        return mapped
    return [
        tuple(
            None if mean is None else next(rows) if len(kept) < order else _to_heads(mean, batch, to, num_heads)
            for mean, kept in pairs
        )
        for to, rows in zip(maps, map(iter, mapped), strict=True)
    ]


def _map_moment(moment: Tensor, left: Tensor, right: Tensor, num_heads: int | None) -> Tensor:
    """Map both sides of a second moment."""
    left, right = left.to(moment.dtype), right.to(moment.dtype)
    if num_heads is not None:
        left, right = left.unflatten(0, (num_heads, -1)), right.unflatten(0, (num_heads, -1))
        moment = moment.unsqueeze(-3)
    return left @ moment @ right.mT


def split_heads(tensor: Tensor, num_heads: int, batch: int) -> Tensor:
    """Split channels into heads, the last batch dimension: ``(*batch, *, C)`` to ``(*batch, H, *, D)``.

    Args:
        tensor: Projected tensor.
        num_heads: Heads H.
        batch: Number of batch dimensions.
    """
    *places, channels = tensor.shape
    heads = tensor.view(*places, num_heads, channels // num_heads)
    return heads.transpose(batch, -2) if len(places) == batch + 1 else heads.movedim(-2, batch)


def apply_linear(mean: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply a linear map to averages in their own type.

    Args:
        mean: Averages.
        weight: Its matrix.
        bias: Its bias, or None.
    """
    dtype = mean.dtype
    if weight.dtype != dtype or (bias is not None and bias.dtype != dtype):
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    return F.linear(mean, weight, bias)


def _to_heads(mean: Tensor, batch: int, to: Map, num_heads: int | None) -> Tensor:
    """Apply a linear map, and split what it gives into heads if there are any."""
    mapped = apply_linear(mean, *to)
    return mapped if num_heads is None else split_heads(mapped, num_heads, batch)


def joined_linear(
    means: Sequence[Tensor], batch: int, maps: Sequence[Map], num_heads: int | None
) -> list[Sequence[Tensor]]:
    """Apply linear maps to several means, each in one product.

    Args:
        means: Tensors ``(*batch, *sizes, D)``.
        batch: Number of batch dimensions.
        maps: The maps.
        num_heads: Heads that the channels are split into, as the last batch dimension; or None.

    Returns:
        For each map what it makes of each mean.
    """
    tokens = [_in_a_row(mean, batch) for mean in means]
    joined, lengths = join_tokens(tokens), [part.shape[-2] for part in tokens]
    mapped = [split_tokens(_to_heads(joined, batch, to, num_heads), lengths) for to in maps]
    if all([mean is row for mean, row in zip(means, tokens, strict=True)]):
        return mapped
    return [
        tuple(
            part if mean is row else part.reshape(*part.shape[:-2], *mean.shape[batch:-1], part.shape[-1])
            for part, mean, row in zip(parts, means, tokens, strict=True)
        )
        for parts in mapped
    ]


def _in_a_row(mean: Tensor, batch: int) -> Tensor:
    """View means ``(*batch, *sizes, D)`` as tokens ``(*batch, S, D)``."""
    further = mean.dim() - batch - 1
    return mean if further == 1 else mean.flatten(batch, -2) if further else mean.unsqueeze(-2)


def _share(first: Summary, second: Summary, place: int | None = None) -> Tensor | float:
    """Share of the second part in the weight behind the means of a kept subset, or in all.

    Means that nothing stands behind have the share of all; where there is nothing at all, a half.
    """
    weights = [part._total() if place is None else part.weights[place] for part in (first, second)]
    if weights[0] is None or weights[1] is None:
        return second.positions / (first.positions + second.positions)
    total = weights[0] + weights[1]
    fallback: Tensor | float = 0.5
    if place is not None:
        fallback = _share(first, second)
        if isinstance(fallback, Tensor):
            fallback = fallback.reshape([*fallback.shape, *(1 for _ in first.kept[place])])
    share = torch.where(total > 0, weights[1] / torch.where(total > 0, total, 1), fallback)
    return share.to(first._any_mean()[0].dtype)


def _sum(first: Vector, second: Vector) -> Vector:
    """Sum of two tensors, None if they are not held."""
    return None if first is None or second is None else first + second


def _mix(first: Vector, second: Vector, share: Tensor | float) -> Vector:
    """Mean of two tensors, the second with a given share; None if they are not held."""
    return None if first is None or second is None else first * (1 - share) + second * share


def _cat(first: Vector, second: Vector, dim: int) -> Vector:
    """Concatenate two tensors whose other dimensions may be 1; None if they are not held."""
    if first is None or second is None:
        return None
    shapes = [[*part.shape[:dim], 1, *part.shape[dim + 1 :]] for part in (first, second)]
    common = torch.broadcast_shapes(*shapes)
    return torch.cat([part.expand(*common[:dim], -1, *common[dim + 1 :]) for part in (first, second)], dim)


def _outer(left: Tensor, right: Tensor, factor: Tensor | float) -> Tensor:
    """Outer product of the last dimensions, with a factor a batch entry."""
    return (
        left.unsqueeze(-1) * right.unsqueeze(-2) * (factor[..., None, None] if isinstance(factor, Tensor) else factor)
    )
