r"""Cells of positions, found among keys or cut from the grid, and sums over them: what `clustered` attention knows.

Keys are put into n cells so that the keys of one look alike to the queries: distances are those of the metric
:math:`M = \mathrm{E}[q q^\top]`. The search takes the candidate farthest from its centre as a new centre, for all cells
at once, round by round (farthest-first of Gonzalez, 1985), and ends with two steps of k-means. It uses no random
numbers, depends on no scale, and is not differentiated. What is known of the cells is a fold: counts, sums and second
moments, in float64 about zero, so that parts add up, and running sums over frames tell what each frame may know.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tensorattn.errors import DtypeError, OptionError, ShapeError, check, retells
from tensorattn.functional.softmax import CHUNK, in_chunks
from tensorattn.functional.summary import Sums
from tensorattn.masks import (
    GivenWeights,
    Lengths,
    Mask,
    Part,
    accumulation_dtype,
    broadcasts_to,
    check_floating,
    counting_dtype,
    is_recorded,
    is_transformed,
    nonzero,
    read_weights,
    readable,
)
from tensorattn.modes import attention_shape, grid_shape

__all__ = ["CellSums", "Cells", "block_counts", "block_labels", "draw_queries", "find_cells", "metric_of", "search"]

SLAB = 8192  # positions that are added up before their sums are held in float64
QUERIES = 1024  # queries that the metric is made of
CANDIDATES = 64  # keys a token that centres are searched among, for at least 32 tokens
FURTHER_ROUNDS = 10  # beyond those that double the number of centres
LLOYD_STEPS = 2


@dataclass(frozen=True, eq=False)
class Cells:
    """Centres of cells, found once to be used again: a key belongs to the nearest one.

    Attributes:
        centres: ``(*batch, n, D)``, with batch dimensions that broadcast to those of the keys.
        metric: Positive definite matrix of the distances ``(*batch, D, D)``.

    Raises:
        ShapeError: If there are no centres, or the metric is no matrix of their channels.
        DtypeError: If one of both is no tensor, or not floating point.

    Examples:
        >>> import torch, tensorattn as ta
        >>> video = torch.randn(2, 6, 8, 8, 16)
        >>> cells = ta.find_cells(None, video[:, :1], order=3, tokens=8)  # in the first frame
        >>> cells.centres.shape, cells.label(video).shape
        (torch.Size([2, 8, 16]), torch.Size([2, 6, 8, 8]))
    """

    centres: Tensor
    metric: Tensor

    def __post_init__(self) -> None:
        """Check that they are centres and a metric."""
        for name, tensor in (("centres", self.centres), ("metric", self.metric)):
            if not isinstance(tensor, Tensor):
                raise DtypeError(f"{name} of cells must be a torch.Tensor, got {type(tensor).__name__}.")
            if not tensor.is_floating_point():
                raise DtypeError(f"{name} of cells must be floating point, got {tensor.dtype}.")
            if tensor.dim() < 2:
                raise ShapeError(f"{name} of cells has {tensor.dim()} dimensions, but needs at least 2.")
        if self.tokens < 1:
            raise ShapeError("centres of cells has 0 rows, but needs at least 1.")
        dim, shape = self.centres.shape[-1], tuple(self.metric.shape)
        if shape[-2:] != (dim, dim):
            raise ShapeError(f"metric of cells has shape {shape}, but centres of {dim} channels need {(dim, dim)}.")

    @property
    def tokens(self) -> int:
        """Number of cells n."""
        return self.centres.shape[-2]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.tokens} centres of {self.centres.shape[-1]} channels)"

    def to(self, device: torch.device | str) -> Cells:
        """Return them on another device.

        Args:
            device: The device.
        """
        return Cells(self.centres.to(device), self.metric.to(device))

    def unsqueeze(self, dim: int) -> Cells:
        """Return them with one more batch dimension.

        Args:
            dim: Its place; -3 makes it the last.
        """
        return Cells(self.centres.unsqueeze(dim), self.metric.unsqueeze(dim))

    def check(self, batch: Sequence[int], dim: int) -> None:
        """Check that they fit keys.

        Args:
            batch: Batch dimensions of the keys.
            dim: Head size D.

        Raises:
            ShapeError: If they do not.
        """
        for name, tensor, last in (("centres", self.centres, (self.tokens, dim)), ("metric", self.metric, (dim, dim))):
            shape = tuple(tensor.shape)
            if not broadcasts_to(shape[:-2], batch) or shape[-2:] != last:
                raise ShapeError(f"cells have {name} of shape {shape}, which do not broadcast to {(*batch, *last)}.")

    @torch.no_grad()
    def label(self, key: Tensor) -> Tensor:
        """Return the cell of each key.

        Args:
            key: Keys ``(*batch, *positions, D)``, with as many batch dimensions as the centres have, of the same sizes
                or with centres that have size 1 there.

        Returns:
            Indices of cells ``(*batch, *positions)``.

        Raises:
            ShapeError: If batch dimensions or channels do not fit.
        """
        batch = self.centres.dim() - 2
        self.check(key.shape[:batch], key.shape[-1])
        flat = key.reshape(*key.shape[:batch], math.prod(key.shape[batch:-1]), key.shape[-1])
        return self.labels(flat).reshape(key.shape[:-1])

    def labels(self, key: Tensor) -> Tensor:
        """Return the cell of each key, with as many batch dimensions as there are.

        Args:
            key: Keys ``(*batch, T, D)``.
        """
        key = key.detach()
        dtype = torch.promote_types(accumulation_dtype(key.dtype), self.centres.dtype)
        centres, metric = self.centres.detach().to(dtype), self.metric.detach().to(dtype)
        middle = centres.mean(-2, keepdim=True)
        towards = (centres - middle) @ metric
        level = ((centres - middle) * towards).sum(-1) / 2 + (middle * towards).sum(-1)
        place = torch.arange(self.tokens, dtype=dtype, device=key.device).unsqueeze(-1)

        def nearest(part: slice) -> tuple[Tensor]:
            score = (towards @ key[..., part, :].to(dtype).mT).sub_(level.unsqueeze(-1))
            return (_best(score, place)[1].unsqueeze(-1),)

        width = self.tokens * math.prod(key.shape[:-2])
        return in_chunks(nearest, key.shape[-2], width, key)[0].squeeze(-1)  # type: ignore[union-attr]


def _best(score: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest of n scores ``(*, n, T)`` and which it is, and overwrite them.

    It takes half the time of argmax on a CPU.

    Args:
        score: The scores.
        place: The numbers from 0 to n − 1, ``(n, 1)`` in the same type.
    """
    high = score.amax(-2, keepdim=True)
    score = score.sub_(high)
    # torch.vmap knows no rule for ge_.
    best = score.logical_not_() if not is_recorded() and is_transformed(score) else score.ge_(0)
    return high.squeeze(-2), best.mul_(place).amax(-2).long()


class Drawn(NamedTuple):
    """Positions drawn from many, without random numbers.

    Attributes:
        index: Which ones, ``(m,)``, or ``(*batch, m)`` where weights differ.
        weight: How often each counts ``(*batch, m)``; None if all alike.
    """

    index: Tensor  # type: ignore[assignment]  # the index of a tuple is another thing
    weight: Tensor | None

    def of(self, tensor: Tensor) -> Tensor:
        """Return the rows of ``(*batch, T, D)`` that were drawn."""
        if self.index.dim() == 1:
            return tensor.index_select(-2, self.index)
        index = self.index.unsqueeze(-1).expand(*tensor.shape[:-2], self.index.shape[-1], tensor.shape[-1])
        return tensor.gather(-2, index)


def draw(length: int, most: int, weight: Tensor | None, device: torch.device) -> Drawn:
    """Draw positions: all where they are few enough, else one from each of equal parts, at places that vary.

    A plain stride would meet the same column of a grid in each row. Where positions have weights, the parts are of
    equal weight, so that nothing absent is drawn.

    Args:
        length: Number of positions T.
        most: How many to draw at most.
        weight: Weights of the positions ``(*batch, T)``, or None.
        device: Where they are.
    """
    exported = torch.compiler.is_exporting()
    count = most if exported or isinstance(length, Tensor) else torch.sym_min(length, most)  # a tensor in torch.jit
    step = torch.arange(count, device=device, dtype=counting_dtype(device))
    place = step + step * 0.6180339887498949 % 1  # one in each part
    if exported:  # one graph whatever the size: what is too much does not count
        weight = step.new_ones(1, length) if weight is None else weight
    elif weight is None or length <= most:
        return Drawn((place * (length / torch.sym_max(count, 1))).long().clamp(max=length - 1), weight)
    running = weight.to(place.dtype).cumsum(-1)
    total = running[..., -1:]
    index = torch.searchsorted(running, place * (total / torch.sym_max(count, 1)), right=True).clamp(max=length - 1)
    each = (total > 0).expand(index.shape).to(weight.dtype)
    if exported:
        few = torch.full_like(step, length) <= most
        index = torch.where(few, step.long().clamp(max=length - 1), index)
        each = torch.where(few, weight.gather(-1, index.expand(*weight.shape[:-1], most)) * (step < length), each)
    return Drawn(index, each)


def draw_rows(
    tensor: Tensor, weight: Tensor | None, most: int, part: Part | None = None
) -> tuple[Tensor, Tensor | None]:
    """Draw rows of ``(*batch, T, D)`` as `draw` does, and tell how often each counts.

    Args:
        tensor: The rows, one a position.
        weight: Weights of the positions ``(*batch, T)``, or None.
        most: How many to draw at most.
        part: Where the positions stand in a larger grid; all processes then get the same rows, drawn from all of it.
    """
    if part is None:
        drawn = draw(tensor.shape[-2], most, weight, tensor.device)
        return drawn.of(tensor), drawn.weight
    if weight is not None:
        weight = part.whole(weight.unflatten(-1, part.lengths).unsqueeze(-1), weight.dim() - 1).squeeze(-1)
        weight = weight.flatten(weight.dim() - len(part.sizes))
    length = math.prod(part.sizes)
    drawn = draw(length, most, weight, tensor.device)
    inside, place, further = torch.ones_like(drawn.index, dtype=torch.bool), torch.zeros_like(drawn.index), length
    for size, start, own in zip(part.sizes, part.start, part.lengths, strict=True):
        further //= size
        index = drawn.index // further % size - start
        inside, place = inside & (index >= 0) & (index < own), place * own + index
    own_rows = tensor if tensor.shape[-2] else tensor.new_zeros(*tensor.shape[:-2], 1, tensor.shape[-1])
    found = Drawn(torch.where(inside, place, 0), None).of(own_rows)
    (rows,) = part.total(lambda: [torch.where(inside.unsqueeze(-1), found, 0.0)], None)  # each is held by one process
    return rows, drawn.weight


def metric_of(query: Tensor, weight: Tensor | None) -> Tensor:
    """Return the mean of q qᵀ over some queries ``(*batch, L, D)``, scaled to a mean diagonal of one.

    Args:
        query: The queries.
        weight: How often each counts ``(*batch, L)``, or None. A query that is not finite does not count.
    """
    query = query.to(counting_dtype(query.device))
    finite = query.isfinite().all(-1, keepdim=True)
    query = torch.where(finite if weight is None else finite & (weight > 0).unsqueeze(-1), query, 0.0)
    moment, unit = query.mT @ query, torch.eye(query.shape[-1], dtype=query.dtype, device=query.device)
    trace = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    return torch.where(trace > 0, moment / nonzero(trace), unit) + 1e-4 * unit


def search(
    key: Tensor, weight: Tensor | None, metric: Tensor, tokens: int, part: Part | None = None
) -> tuple[Cells, Tensor]:
    """Search for centres of cells.

    Args:
        key: Keys ``(*batch, T, D)``, zero where they are absent.
        weight: Their weights ``(*batch, T)``, or None.
        metric: Matrix of the distances ``(*batch, D, D)``.
        tokens: How many n.
        part: Where the keys stand in a larger grid, in all of which is searched.

    Returns:
        The cells, and the mean square of the distances in each, ``(*batch, n)``. Where there are fewer distinct keys
        than tokens, the first centre is there several times.
    """
    rows, weight = draw_rows(key, weight, CANDIDATES * max(tokens, 32), part)
    rows = rows.to(accumulation_dtype(key.dtype))
    (*batch, count, dim), entries = rows.shape, math.prod(rows.shape[:-2])
    if weight is None:
        share = rows.new_ones(count)
    else:  # relative to the largest, in its own type
        top = weight.amax(-1, keepdim=True)
        share = torch.where(top > 0, weight / nonzero(top), 0.0).to(rows.dtype)
    share = share.expand(*batch, count).reshape(entries, count)
    share = share / share.sum(-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    rows = rows.reshape(entries, count, dim)
    wide = metric.expand(*batch, dim, dim).reshape(entries, dim, dim)
    factor = torch.linalg.cholesky_ex(wide)[0].to(rows.dtype)
    middle = share.unsqueeze(-2) @ rows
    points = (rows - middle) @ factor
    half = points.square().sum(-1, keepdim=True) / 2
    ends, points = torch.cat([points, half], -1), torch.cat([points, -torch.ones_like(half)], -1).mT  # z·c − c·c / 2
    half = half.squeeze(-1)
    # Points that are closer than rounding are one, and absent ones are never far from a centre.
    reach = torch.where(share > 0, half - 8 * torch.finfo(rows.dtype).eps * half.amax(-1, keepdim=True), -math.inf)
    first = torch.sub(reach, half, alpha=2).argmax(-1, keepdim=True)  # the one nearest the mean
    # The last one takes what finds no place; centres that were not found are at infinity.
    centres = ends.new_full((ends.shape[0], tokens + 1, ends.shape[-1]), math.inf)
    centres[:, :, :-1] = _rows(ends, first)[..., :-1]
    centres[:, 0] = _rows(ends, first).squeeze(-2)
    filled, number, index = torch.ones_like(first), *(torch.arange(n, device=ends.device) for n in (tokens, count))
    place, nowhere = number.to(rows.dtype).unsqueeze(-1), number.new_full((), tokens)
    for doubled in range(math.ceil(math.log2(tokens)) + FURTHER_ROUNDS if tokens > 1 else 0):
        width = min(tokens, 1 << doubled)
        high, label = _best(centres[:, :width] @ points, place[:width])
        # Bits of numbers that are not negative are in their order: distance in front, position behind, in one integer.
        bits = (reach - high).clamp(min=0).float().view(torch.int32).long()
        packed = torch.add(index, bits, alpha=1 << 32)
        packed = packed.new_zeros(packed.shape[0], width).scatter_reduce(-1, label, packed, "amax")
        packed = packed.sort(-1, descending=True).values  # the farthest point of each cell, farthest first
        found = packed >= 1 << 32
        slot = torch.where(found, filled + number[:width], nowhere).clamp(max=tokens)
        farthest = _rows(ends, packed & 0xFFFFFFFF)
        centres = centres.scatter(-2, slot.unsqueeze(-1).expand(farthest.shape), farthest)
        filled = filled + found.sum(-1, keepdim=True)
        if filled.device.type == "cpu" and readable(filled) and bool((filled >= tokens).all()):
            break  # mostly after half of the rounds; elsewhere a look would cost more than them
    centres = centres[:, :tokens]
    for _ in range(LLOYD_STEPS):
        _, label = _best(centres @ points, place)
        mean, there = _per_cell(label, ends[..., :-1], share, tokens)
        mean = torch.cat([mean, mean.square().sum(-1, keepdim=True) / 2], -1)
        centres = torch.where(there, mean, centres)
    high, label = _best(centres @ points, place)
    spread, _ = _per_cell(label, 2 * (half - high).unsqueeze(-1), share, tokens)
    centres, spread = centres[..., :-1], spread.clamp_min(0)
    found_at = middle + torch.linalg.solve_triangular(factor, centres, upper=False, left=False)
    cells = Cells(found_at.reshape(*batch, tokens, dim), metric)
    return cells, spread.reshape(*batch, tokens)


def _rows(points: Tensor, index: Tensor) -> Tensor:
    """Return rows ``(R, n, D)`` of points ``(R, m, D)``."""
    return points.gather(-2, index.unsqueeze(-1).expand(-1, -1, points.shape[-1]))


def _per_cell(label: Tensor, rows: Tensor, share: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Return the weighted mean of rows ``(R, m, D)`` in each cell, ``(R, n, D)``, and where there are any."""
    member = label.unsqueeze(-2) == torch.arange(tokens, device=label.device).unsqueeze(-1)
    weight = member * share.unsqueeze(-2)
    total = weight.sum(-1, keepdim=True)
    return weight @ rows / total.clamp_min(torch.finfo(rows.dtype).tiny), total > 0


@dataclass(frozen=True, eq=False)
class CellSums:
    """Sums over the positions of each cell: the fold. About zero they add up, and run over frames.

    Attributes:
        cells: Weights of the cells ``(*batch, n)``, and weighted sums of keys, values and, if wanted, the squares of
            keys behind each other ``(*batch, n, D + D_v + 1)``, in float64.
        products: The weight of all positions ``(*batch)``, and weighted sums of the outer products of keys, and of
            values, with keys, below each other ``(*batch, D + D_v, D)``, in float64.
        origin: What was taken off the keys ``(*batch, 1, D)``; None for nothing.
    """

    cells: Sums
    products: Sums
    origin: Tensor | None = None

    def __add__(self, other: CellSums) -> CellSums:
        """Return the sums over the positions of both, about the same origin."""
        assert self.origin is other.origin
        return CellSums(self.cells + other.cells, self.products + other.products, self.origin)

    @classmethod
    def of(
        cls,
        key: Tensor,
        value: Tensor,
        weight: Tensor | None,
        label: Callable[[slice], Tensor],
        tokens: int,
        factor: Tensor | None = None,
    ) -> CellSums:
        """Add up keys and values ``(*batch, T, D)``, about a rough mean of the keys.

        On a CPU, where nothing is differentiated, a slab of positions at a time.

        Args:
            key: Keys, zero where they are absent.
            value: Values, likewise.
            weight: Weights ``(*batch, T)``, or None.
            label: From a range of positions to the cell of each, ``(*batch, T)`` or broadcastable to it.
            tokens: Number of cells.
            factor: L of the squares (k L) · (k L) that are wanted too, ``(*batch, D, D)``; None for none.
        """
        origin = key.detach().mean(-2, keepdim=True, dtype=accumulation_dtype(key.dtype))

        def part(places: slice) -> CellSums:
            own = None if weight is None else weight[..., places]
            return _sums(key[..., places, :], value[..., places, :], own, label(places), tokens, factor, origin)

        length, rows = key.shape[-2], math.prod(key.shape[:-2])
        step = max(64, CHUNK // max(1, rows * max(tokens, key.shape[-1] + value.shape[-1])))
        if is_recorded() or key.device.type != "cpu" or is_transformed(key, value) or step >= length:
            return part(slice(None))
        return functools.reduce(operator.add, [part(slice(start, start + step)) for start in range(0, length, step)])

    def about_zero(self, factor: Tensor | None = None) -> CellSums:
        """Return the sums of what the keys were.

        Args:
            factor: L of the squares, if there are any.
        """
        if self.origin is None:
            return self
        about, dim = self.origin.to(self.products.total.dtype), self.origin.shape[-1]
        count, rows, width = self.cells.count.unsqueeze(-1), self.cells.total, self.products.total.shape[-2]
        far = torch.nn.functional.pad(about, (0, width - dim))
        keys = rows[..., :dim]
        moved = rows[..., :width] + count * far
        products = self.products.total + moved.sum(-2).unsqueeze(-1) @ about + far.mT @ keys.sum(-2, keepdim=True)
        if factor is not None:
            factor = factor.to(rows.dtype)
            apart = about @ factor
            square = apart.square().sum(-1, keepdim=True)
            squares = rows[..., width:] + 2 * (keys @ factor) @ apart.mT + count * square
            moved = torch.cat([moved, squares], -1)
        return CellSums(Sums(self.cells.count, moved), Sums(self.products.count, products))

    def running(self, dim: int, before: CellSums | None = None) -> CellSums:
        """Return the sums up to each index of a dimension, after those of what came before."""
        cells, products = (None, None) if before is None else (before.cells, before.products)
        return CellSums(self.cells.running(dim, cells), self.products.running(dim, products))

    def windowed(self, dim: int, window: int) -> CellSums:
        """Return the sums over each window of consecutive indices of a dimension."""
        return CellSums(self.cells.windowed(dim, window), self.products.windowed(dim, window))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors of sums about zero, as `from_tensors` takes them."""
        return (*self.cells, *self.products)

    @classmethod
    def from_tensors(cls, tensors: Sequence[Any]) -> CellSums:
        """Put together what `tensors` are."""
        return cls(Sums(*tensors[:2]), Sums(*tensors[2:]))

    def map(self, function: Callable[[Tensor], Tensor]) -> CellSums:
        """Apply a function to every tensor."""
        return self.from_tensors([function(tensor) for tensor in self.tensors])


def _sums(
    key: Tensor,
    value: Tensor,
    weight: Tensor | None,
    label: Tensor,
    tokens: int,
    factor: Tensor | None,
    origin: Tensor,
) -> CellSums:
    """Add up all positions at once: a slab in the type of the origin, all slabs in float64."""
    dtype, wide = origin.dtype, counting_dtype(key.device)
    batch, length = key.shape[:-2], key.shape[-2]
    key = key - origin
    rows = torch.cat([key, value.to(dtype)], -1)
    others = [] if factor is None else [(key @ factor.to(dtype)).square().sum(-1, keepdim=True)]
    if weight is None:
        top, share = None, rows.new_ones(1, 1).expand(*batch, length, 1)
    else:  # in float64, and relative to the largest in their own type
        top = weight.to(wide).amax(-1, keepdim=True).clamp_min(torch.finfo(wide).tiny).unsqueeze(-1)
        share = (weight.to(wide).unsqueeze(-1) / top).to(dtype).expand(*batch, length, 1)
        rows, others = rows * share, [other * share for other in others]
    count, slabs = math.prod(batch), (length + SLAB - 1) // SLAB + is_recorded()  # a graph for all sizes has several
    first = torch.arange(count, device=key.device).unsqueeze(-1) * slabs
    slab = first + torch.arange(length, device=key.device) // SLAB
    place = (label.expand(*batch, length).reshape(count, length) + slab * tokens).reshape(-1, 1)

    def added(rows: Tensor) -> Tensor:
        """Add up ``(*batch, T, W)`` in each cell of each slab, then the slabs."""
        rows = rows.reshape(count * length, rows.shape[-1])
        total = rows.new_zeros(count * slabs * tokens, rows.shape[-1]).scatter_add(0, place.expand(rows.shape), rows)
        return total.reshape(*batch, slabs, tokens, rows.shape[-1]).sum(-3, dtype=wide)

    products, total = _products(rows, key, slabs), added(rows)
    others = list(added(torch.cat([*others, share], -1) if others else share).split(1, -1))
    if top is not None:
        total, products, others = total * top, products * top, [other * top for other in others]
    counts = others.pop().squeeze(-1)
    cells = torch.cat([total, *others], -1) if others else total
    return CellSums(Sums(counts, cells), Sums(counts.sum(-1), products), origin)


def _products(rows: Tensor, key: Tensor, slabs: int) -> Tensor:
    """Return the sum over positions of the products of rows ``(*, T, *)`` with keys, of each slab in their type."""
    length, wide = key.shape[-2], counting_dtype(key.device)
    if not is_recorded() and slabs == 1:
        return (rows.mT @ key).to(wide)
    side = (length + slabs - 1) // slabs
    left = slabs * side - length
    if is_recorded() or left > 0:
        rows, key = (torch.nn.functional.pad(each, (0, 0, 0, left)) for each in (rows, key))
    rows, key = (each.unflatten(-2, (slabs, side)) for each in (rows, key))
    return (rows.mT @ key).sum(-3, dtype=wide)


def block_counts(
    sizes: Sequence[int], tokens: int, blocks: Sequence[int] | None = None, causal: int | None = None
) -> tuple[int, ...]:
    """Return how many blocks each mode is cut into: as near to cubes as can be, at most as many as there are tokens.

    Args:
        sizes: Sizes of the modes.
        tokens: Number of tokens n.
        blocks: Counts that were asked for, or None.
        causal: A mode that is not cut, because a block spans all frames so far.

    Raises:
        OptionError: If the counts are not one positive integer a mode, or cut the causal mode.

    Examples:
        >>> block_counts((15, 120, 160), 64), block_counts((15, 120, 160), 48, causal=1)
        ((1, 8, 8), (2, 1, 24))
    """
    if blocks is None:
        found = [1] * len(sizes)
        for more in (lambda count: 2 * count, lambda count: count + 1):  # halve the longest blocks while tokens last
            while True:
                wider = [[*found[:m], min(more(found[m]), n), *found[m + 1 :]] for m, n in enumerate(sizes)]
                fits = [
                    m for m, each in enumerate(wider) if m != causal and found != each and math.prod(each) <= tokens
                ]
                if not fits:
                    break
                longest = fits[0]
                for m in fits[1:]:
                    longest = m if sizes[m] * found[longest] > sizes[longest] * found[m] else longest
                found = wider[longest]
        return tuple(found)
    if len(blocks) != len(sizes):
        raise OptionError(f"blocks has {len(blocks)} counts, but order {len(sizes)} needs one a mode.")
    if causal is not None and blocks[causal] != 1:
        raise OptionError(
            f"blocks cuts mode {causal} into {blocks[causal]}, but it is causal: a block spans all frames so far."
        )
    return tuple([min(count, size) for count, size in zip(blocks, sizes, strict=True)])


def block_labels(sizes: Sequence[int], counts: Sequence[int], device: torch.device) -> Tensor:
    """Return the block of each position ``(P,)``; the last block of a mode may be shorter.

    Args:
        sizes: Sizes of the modes.
        counts: Number of blocks of each mode.
        device: Where they are wanted.

    Examples:
        >>> block_labels((2, 5), (1, 2), torch.device("cpu"))
        tensor([0, 0, 0, 1, 1, 0, 0, 0, 1, 1])
    """
    label = torch.zeros((), dtype=torch.int64, device=device)
    for size, count in zip(sizes, counts, strict=True):
        side = (size + count - 1) // count
        label = label.unsqueeze(-1) * count + torch.arange(size, device=device) // side
    return label.reshape(-1)


@retells
def find_cells(
    query: Tensor | None,
    key: Tensor,
    *,
    order: int,
    tokens: int = 64,
    weights: GivenWeights = None,
    mask: Mask = None,
    lengths: Lengths = None,
) -> Cells:
    """Find cells of keys that look alike to the queries, to be used again in `clustered_attention`.

    Nothing is differentiated. With cells that were found before, on a calibration clip or the first frame, every
    statistic is a sum over fixed cells, so that attention may be causal, streamed and merged.

    Args:
        query: Queries ``(*batch, *positions, D)``, or None where they are not known: all directions then count alike.
        key: Keys over the grid ``(*batch, n_1, …, n_N, D)``.
        order: Number of modes N.
        tokens: How many cells n.
        weights: Weights of the positions, as all operators take them.
        mask: Mask of the positions, likewise.
        lengths: Lengths of the modes, likewise.

    Returns:
        The cells. Where there are fewer distinct keys than tokens some are there several times.

    Raises:
        ShapeError: If shapes disagree.
        DtypeError: If a tensor is not floating point, or the types differ.
        WeightsError: If weights are refused.
        OptionError: If tokens is not a positive integer.

    Examples:
        >>> import torch, tensorattn as ta
        >>> q, k, v = torch.randn(3, 2, 30, 40, 8).unbind(0)
        >>> cells = ta.find_cells(q, k, order=2, tokens=16)
        >>> ta.clustered_attention(q, k, v, order=2, cells=cells).shape
        torch.Size([2, 30, 40, 8])
    """
    check(tokens, "tokens", "integer", least=1)
    check_floating(**({} if query is None else {"query": query}), key=key)
    grid = grid_shape(key.shape, order, "key")
    if query is not None:
        grid = attention_shape(query.shape, key.shape, key.shape, order)
    spoken = read_weights(weights, mask, lengths, grid, key)
    counts, batch = spoken.over_grid(), len(grid.batch)
    flat, weight = key.flatten(batch, -2), None
    if counts is not None:
        counts = counts.expand(*counts.shape[: counts.dim() - order], *grid.sizes)
        weight = counts[(None,) * (batch + order - counts.dim())].flatten(batch)
        flat = torch.where((weight > 0).unsqueeze(-1), flat, 0.0)
    with torch.no_grad():
        if query is None:
            metric = metric_of(flat.new_zeros(*grid.batch, 1, grid.dim), None)
        else:
            seen = weight if tuple(query.shape[batch:-1]) == grid.sizes else None
            metric = metric_of(*draw_queries(query.flatten(batch, -2), seen))
        return search(flat, weight, metric, tokens)[0]


def draw_queries(query: Tensor, weight: Tensor | None, part: Part | None = None) -> tuple[Tensor, Tensor | None]:
    """Draw queries for a metric, from ``(*batch, L, D)`` and where they take part ``(*batch, L)``."""
    return draw_rows(query, weight, QUERIES, part)
