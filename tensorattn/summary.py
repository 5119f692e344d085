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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tensorattn.contraction import contract
from tensorattn.errors import ModesError, OptionError, ShapeError, retells
from tensorattn.modes import GridShape, ModeSpec, grid_shape
from tensorattn.planning import Family, Kept, main_effects
from tensorattn.softmax import TokenSet
from tensorattn.weights import Vector, Vectors, check_floating, check_weights, normalized

__all__ = ["Summary", "attention_summary", "summarize"]

BLOCK = 1 << 18  # elements centred at a time for the second moment


@dataclass(frozen=True, eq=False)
class Summary:
    """Marginal means of keys and values over a grid, with their weights.

    Attributes:
        sizes: Sizes of the modes.
        kept: Mode subsets whose marginal means are held.
        keys: For each kept subset U, the mean keys ``(*batch, *n_U, D)``.
        values: For each kept subset U, the mean values ``(*batch, *n_U, D_v)``.
        weights: For each kept subset U, how many positions stand behind each mean, ``(*batch, *n_U)`` with batch
            dimensions that may be 1; None if all positions count once.
        mode_weights: Weights of the indices of each mode, ``(*batch, n_m)`` with batch dimensions that may be 1;
            None if all count once.
        covariance: Second central moment of values and keys, ``(*batch, D_v, D)``, if asked for.
    """

    sizes: tuple[int, ...]
    kept: Family
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    weights: tuple[Tensor | None, ...]
    mode_weights: Vectors
    covariance: Tensor | None = None

    @property
    def order(self) -> int:
        """Number of modes N."""
        return len(self.sizes)

    @property
    def batch(self) -> tuple[int, ...]:
        """Batch dimensions."""
        return tuple(self.keys[0].shape[: -len(self.kept[0]) - 1])

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

    def tokens(self, kept: Kept, coefficient: int = 1) -> TokenSet:
        """Return the means of one kept subset as a set of tokens.

        Args:
            kept: Modes, ascending.
            coefficient: How often the set enters a sum over sets.
        """
        place = self.place(kept)
        batch, weight = len(self.batch), self.weights[place]
        key, value = self.keys[place], self.values[place]
        if not kept:
            key, value = key.unsqueeze(-2), value.unsqueeze(-2)
            weight = None if weight is None else weight.unsqueeze(-1)
        outside = [size for mode, size in enumerate(self.sizes) if mode not in kept]
        return TokenSet(
            key.flatten(batch, -2),
            value.flatten(batch, -2),
            None if weight is None else weight.flatten(batch).log(),
            math.prod(outside),
            coefficient,
        )

    def mode_log_weight(self, mode: int) -> Tensor | None:
        """Return the logarithm of the weights of the indices of a mode; of zeros where no position is present.

        None if all positions count once.

        Args:
            mode: Index of the mode.
        """
        total = self._total()
        if not isinstance(total, Tensor):
            return None
        weight = self.mode_weights[mode]
        if weight is None:
            weight = total.new_ones([1] * len(self.batch) + [self.sizes[mode]])
        return torch.where(total.unsqueeze(-1) > 0, weight, 0.0).log()

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

        Examples:
            >>> x, w = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
            >>> early, late = summarize(x @ w.T, x @ w.T, order=2), summarize(x, x, order=2).project(w, w)
            >>> torch.allclose(early.keys[0], late.keys[0])
            True
        """
        batch = len(self.batch)

        def linear(mean: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            bias = None if bias is None else bias.to(mean.dtype)
            mean = F.linear(mean, weight.to(mean.dtype), bias)
            return mean if num_heads is None else mean.unflatten(-1, (num_heads, -1)).movedim(-2, batch)

        keys = tuple(linear(mean, key_weight, key_bias) for mean in self.keys)
        values = tuple(linear(mean, value_weight, value_bias) for mean in self.values)
        weights, mode_weights, covariance = self.weights, self.mode_weights, self.covariance
        if covariance is not None:
            of_values, of_keys = value_weight.to(covariance.dtype), key_weight.to(covariance.dtype)
            if num_heads is not None:
                of_values, of_keys = (w.unflatten(0, (num_heads, -1)) for w in (of_values, of_keys))
                covariance = covariance.unsqueeze(-3)
            covariance = of_values @ covariance @ of_keys.mT
        if num_heads is not None:
            weights = tuple(None if w is None else w.unsqueeze(batch) for w in weights)
            mode_weights = tuple(None if w is None else w.unsqueeze(batch) for w in mode_weights)
        return dataclasses.replace(
            self, keys=keys, values=values, weights=weights, mode_weights=mode_weights, covariance=covariance
        )

    def merge(self, other: Summary, *, mode: int) -> Summary:
        """Return the summary of two parts of a tensor put together along a mode.

        Args:
            other: Summary of the second part, with the same kept subsets.
            mode: Index of the mode along which the parts follow each other.

        Returns:
            The summary of the whole: exact, as all its parts are sums over positions.

        Raises:
            ShapeError: If another mode differs in size, or kept subsets or batch dimensions differ.
            ModesError: If there is no such mode.

        Examples:
            >>> x = torch.randn(5, 3, 4, dtype=torch.float64)
            >>> first, second = (summarize(part, part, order=2) for part in x.split([2, 3]))
            >>> whole = summarize(x, x, order=2)
            >>> torch.allclose(first.merge(second, mode=0).keys[1], whole.keys[1])
            True
        """
        mode = ModeSpec.parse(self.order).index(mode)
        self._check_mergeable(other, mode)
        batch = len(self.batch)
        totals = self._total(), other._total()
        keys, values, weights = [], [], []
        for place, kept in enumerate(self.kept):
            pair = self._counts(place, other), other._counts(place, self)
            if mode in kept:
                dim = batch + kept.index(mode)
                keys.append(torch.cat([self.keys[place], other.keys[place]], dim))
                values.append(torch.cat([self.values[place], other.values[place]], dim))
                weights.append(None if pair[0] is None or pair[1] is None else _cat(pair[0], pair[1], dim))
            else:
                share = _share(*((s.positions for s in (self, other)) if pair[0] is None else pair))
                share = share.unsqueeze(-1) if isinstance(share, Tensor) else share
                keys.append(_mix(self.keys[place], other.keys[place], share))
                values.append(_mix(self.values[place], other.values[place], share))
                weights.append(None if pair[0] is None or pair[1] is None else pair[0] + pair[1])
        share = _share(*totals)
        return Summary(
            tuple(size + (k == mode) * other.sizes[k] for k, size in enumerate(self.sizes)),
            self.kept,
            tuple(keys),
            tuple(values),
            tuple(weights),
            tuple(self._merge_mode_weights(other, k, mode, share) for k in range(self.order)),
            self._merge_covariance(other, share),
        )

    def _check_mergeable(self, other: Summary, mode: int) -> None:
        """Check that two parts fit together along a mode."""
        if self.kept != other.kept:
            raise ShapeError(f"the summaries hold different kept modes: {self.kept} and {other.kept}.")
        if self.batch != other.batch:
            raise ShapeError(f"the summaries have different batch dimensions: {self.batch} and {other.batch}.")
        for k, (size, second) in enumerate(zip(self.sizes, other.sizes, strict=True)):
            if k != mode and size != second:
                raise ShapeError(f"mode {k} has size {size} in one summary but {second} in the other.")
        if (self.covariance is None) != (other.covariance is None) or (
            self.covariance is not None and () not in self.kept
        ):
            raise ShapeError("second moments merge only if both summaries hold them, and their grand means.")

    def _counts(self, place: int, other: Summary) -> Tensor | None:
        """Weights behind the means of one kept subset, written out if the other summary has any."""
        if self.weights[place] is not None or other.weights[place] is None:
            return self.weights[place]
        kept = self.kept[place]
        shape = [1] * len(self.batch) + [self.sizes[mode] for mode in kept]
        return self.keys[place].new_full(shape, self.positions / math.prod([self.sizes[mode] for mode in kept]))

    def _total(self) -> Tensor | float:
        """Weight of all positions together: ``(*batch,)`` with dimensions that may be 1, or a number."""
        weight = self.weights[0]
        if weight is None:
            return float(self.positions)
        return weight.flatten(len(self.batch)).sum(-1) if self.kept[0] else weight

    def _merge_mode_weights(self, other: Summary, k: int, mode: int, share: Tensor | float) -> Vector:
        """Weights of the indices of one mode: side by side along the merged mode, else their mean by total weight."""
        first, second = self.mode_weights[k], other.mode_weights[k]
        if first is None and second is None:
            return None
        like = self.keys[0]
        ones = [like.new_ones([1] * len(self.batch) + [part.sizes[k]]) for part in (self, other)]
        first, second = ones[0] if first is None else first, ones[1] if second is None else second
        if k == mode:
            return _cat(first, second, len(self.batch))
        return _mix(first, second, share.unsqueeze(-1) if isinstance(share, Tensor) else share)

    def _merge_covariance(self, other: Summary, share: Tensor | float) -> Tensor | None:
        """Second central moment of the whole: that within the parts, and that between their means."""
        if self.covariance is None or other.covariance is None:
            return None
        place = self.place(())
        key = other.keys[place] - self.keys[place]
        value = other.values[place] - self.values[place]
        share = share[..., None, None] if isinstance(share, Tensor) else share
        between = value.unsqueeze(-1) * key.unsqueeze(-2) * (share * (1 - share))
        return _mix(self.covariance, other.covariance, share) + between


def _share(first: Tensor | float, second: Tensor | float) -> Tensor | float:
    """Share of the second part in the total weight; a half where there is none."""
    total = first + second
    if isinstance(total, Tensor):
        return torch.where(total > 0, second / torch.where(total > 0, total, 1), 0.5)
    return second / total


def _mix(first: Tensor, second: Tensor, share: Tensor | float) -> Tensor:
    """Mean of two tensors, the second with a given share."""
    return first * (1 - share) + second * share


def _cat(first: Tensor, second: Tensor, dim: int) -> Tensor:
    """Concatenate two tensors whose other dimensions may be 1."""
    shapes = [list(part.shape) for part in (first, second)]
    common = list(torch.broadcast_shapes(*([*s[:dim], 1, *s[dim + 1 :]] for s in shapes)))
    return torch.cat([part.expand(*common[:dim], -1, *common[dim + 1 :]) for part in (first, second)], dim)


@retells
def summarize(
    key: Tensor,
    value: Tensor,
    *,
    order: int,
    kept: Iterable[Iterable[int]] | None = None,
    second_moment: bool = False,
    weights: Sequence[Vector] | None = None,
) -> Summary:
    r"""Summarise keys and values by their marginal means.

    Args:
        key: Keys over the grid.
        value: Values over the grid. Pass the same tensor as ``key`` to read it once.
        order: Number of modes N.
        kept: Mode subsets whose marginal means are wanted; by default the N mode averages and the grand mean.
        second_moment: Whether to hold the central second moment :math:`\mathrm{E}[(v - \bar v)(k - \bar k)^\top]`.
        weights: One non-negative vector a mode, or None for equal weights; multiplicities.

    Returns:
        The summary, in float32 for half precision.

    Raises:
        ShapeError: If key and value do not have the same batch dimensions and mode sizes, or a mode is empty.
        DtypeError: If they are not floating point, or of different types.
        WeightsError: If weights have the wrong length, are negative, not finite, or all zero.
        ModesError: If ``kept`` names a mode that does not exist.

    Shape:
        - key: :math:`(*, n_1, \dots, n_N, D)`, value: :math:`(*, n_1, \dots, n_N, D_v)`

    Examples:
        >>> summary = summarize(torch.ones(2, 4, 5, 8), torch.ones(2, 4, 5, 3), order=2)
        >>> summary.kept, [tuple(mean.shape) for mean in summary.values]
        (((0,), (1,), ()), [(2, 4, 3), (2, 5, 3), (2, 3)])
    """
    check_floating(key=key, value=value)
    grid = grid_shape(key.shape, order, "key")
    values = grid_shape(value.shape, order, "value")
    for mode, (size, second) in enumerate(zip(grid.sizes, values.sizes, strict=True)):
        if size != second:
            raise ShapeError(f"mode {mode} has size {size} in key but {second} in value.")
    if grid.batch != values.batch:
        raise ShapeError(f"batch dimensions are {grid.batch} in key but {values.batch} in value.")
    spec = ModeSpec.parse(order)
    family = (
        (*main_effects(order), ()) if kept is None else tuple(tuple(sorted({spec.index(m) for m in u})) for u in kept)
    )
    if not family:
        raise ModesError("kept is empty, but a summary needs at least one subset of modes.")
    return attention_summary(key, value, family, check_weights(weights, grid, key), second_moment)


def attention_summary(key: Tensor, value: Tensor, family: Family, weights: Vectors, second_moment: bool) -> Summary:
    """Summarise, unchecked.

    Args:
        key: Keys over the grid.
        value: Values over the grid.
        family: Kept mode subsets.
        weights: Checked weights of each mode, or None.
        second_moment: Whether to hold the central second moment.
    """
    order = len(weights)
    grid = GridShape(tuple(key.shape[: -order - 1]), tuple(key.shape[-order - 1 : -1]), key.shape[-1])
    vectors = normalized(weights)
    wanted = family if not second_moment or () in family else (*family, ())
    keys = contract(key, wanted, vectors)
    values = keys if value is key else contract(value, wanted, vectors)
    covariance = (
        _covariance(key, value, keys[wanted.index(())], values[wanted.index(())], vectors, grid)
        if second_moment
        else None
    )
    full = tuple(_with_batch(vector, grid) for vector in weights)
    counts = tuple(_marginal_weight(kept, full, grid) for kept in wanted)
    return Summary(grid.sizes, wanted, keys, values, counts, full, covariance)


def _with_batch(vector: Vector, grid: GridShape) -> Vector:
    """Give weights as many batch dimensions as the tensor has."""
    if vector is None:
        return None
    return vector.reshape(*(1,) * (len(grid.batch) + 1 - vector.dim()), *vector.shape)


def _marginal_weight(kept: Kept, weights: Vectors, grid: GridShape) -> Tensor | None:
    """Weight behind each marginal mean: its indices' own weights times the total weight of every other mode."""
    factors, count = [], 1
    for mode, (weight, size) in enumerate(zip(weights, grid.sizes, strict=True)):
        if weight is None:
            count *= 1 if mode in kept else size
        elif mode in kept:
            factors.append(weight.reshape(*weight.shape[:-1], *(-1 if k == mode else 1 for k in kept)))
        else:
            factors.append(weight.sum(-1).reshape([*weight.shape[:-1], *(1 for _ in kept)]))
    if not factors:
        return None
    product = functools.reduce(torch.mul, factors) * count
    return product.expand([*product.shape[: len(grid.batch)], *(grid.sizes[mode] for mode in kept)])


def _covariance(
    key: Tensor, value: Tensor, mean_key: Tensor, mean_value: Tensor, vectors: Vectors, grid: GridShape
) -> Tensor:
    """Second central moment of values and keys, block by block along the longest mode."""
    batch, order = len(grid.batch), len(grid.sizes)
    longest = max(range(order), key=lambda mode: grid.sizes[mode])
    rest = max(1, key.numel() // max(1, grid.sizes[longest]))
    step = grid.sizes[longest] if torch.compiler.is_compiling() else max(1, BLOCK // rest)
    spread = [1] * order
    total: Tensor | None = None
    for start in range(0, grid.sizes[longest], step):
        length = min(step, grid.sizes[longest] - start)
        parts = []
        for tensor, mean in ((key, mean_key), (value, mean_value)):
            block = tensor.narrow(batch + longest, start, length).to(mean.dtype)
            parts.append(block - mean.reshape(*grid.batch, *spread, -1))
        centred_key, centred_value = parts
        for mode, vector in enumerate(vectors):
            if vector is None:
                centred_value = centred_value / grid.sizes[mode]
                continue
            part = vector.narrow(-1, start, length) if mode == longest else vector
            shape = [-1 if k == mode else 1 for k in range(order)]
            centred_value = centred_value * part.reshape(*part.shape[:-1], *shape, 1)
        term = centred_value.flatten(batch, -2).mT @ centred_key.flatten(batch, -2)
        total = term if total is None else total + term
    assert total is not None
    return total
