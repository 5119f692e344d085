r"""Running summaries: what a query in one frame may know of the frames up to its own.

Frames are the indices of one mode, time as a rule. The summary of all positions up to frame i is a running sum of the
summaries of the frames, so one pass over the tensor gives all of them: marginal means that do not keep the causal mode
become running means, and those that keep it become one token a frame, absent while it lies ahead. Nothing that is known
at frame i depends on a later frame, whatever the data. The means that keep the causal mode are therefore held once for
each of T frames that may see them: T² of them for each index of the other kept modes.

The sums may start from those of frames that came before, a `Past`, and end in one: a tensor that is fed frame by frame
is summarised as the whole tensor is, whose past is empty.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tensorattn.contraction_tree import Family, Kept
from tensorattn.summarizing import Needs, attention_summary
from tensorattn.summary import Summary
from tensorattn.weights import Vector, Vectors, accumulation_dtype

__all__ = [
    "Past",
    "Time",
    "continued_frames",
    "continued_summary",
    "running_family",
    "running_summary",
    "within_frames",
]


@dataclass(frozen=True, eq=False)
class Past:
    """What later frames need to know of the frames before them.

    Attributes:
        frames: Number of frames so far.
        weight: Weights of the frames whose means are held, the last ones, ``(*batch, held)`` with batch dimensions that
            may be 1.
        total: Weight of all frames so far, ``(*batch,)`` likewise; None with a window.
        sums: For each kept subset of a frame, the weighted sum of its means over all frames ``(*batch, *n_U, D)``, or
            None where it is not needed.
        means: For each kept subset of a frame, its means in every frame held ``(*batch, held, *n_U, D)``, or None where
            they are not needed.
        moments: With second moments, a mean ``(*batch, D)`` that all others are taken relative to, the weighted sum of
            the frame means relative to it, and that of the second moments ``(*batch, D, D)``; with a window, the
            central second moments of every frame held, ``(*batch, held, D, D)``.
        mode_weights: Weights of the indices of the other modes, the same for all frames; None for the causal mode.
    """

    frames: int
    weight: Tensor
    total: Tensor | None
    sums: tuple[Tensor | None, ...]
    means: tuple[Tensor | None, ...]
    moments: tuple[Tensor, ...]
    mode_weights: Vectors

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors that it holds, by name."""
        named: dict[str, Tensor | None] = {"weight": self.weight, "total": self.total}
        for name in ("sums", "means", "moments", "mode_weights"):
            named.update({f"{name}.{place}": part for place, part in enumerate(getattr(self, name))})
        return {name: part for name, part in named.items() if part is not None}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Past:
        """Return the same past with other tensors in place of its own.

        Args:
            tensors: One for each of `tensors`, by name.
        """
        parts = functools.partial(_numbered, tensors)
        return dataclasses.replace(
            self,
            weight=tensors["weight"],
            total=tensors.get("total"),
            sums=parts("sums", len(self.sums)),
            means=parts("means", len(self.means)),
            moments=tuple(part for part in parts("moments", len(self.moments)) if part is not None),
            mode_weights=parts("mode_weights", len(self.mode_weights)),
        )


def running_summary(key: Tensor, value: Tensor, needs: Needs, weights: Vectors, mode: int) -> Summary:
    """Summarise keys and values up to each frame, unchecked.

    Args:
        key: Keys over the grid ``(*batch, n_1, …, n_N, D)``.
        value: Values over the grid.
        needs: What is wanted.
        weights: Checked weights of each mode, or None.
        mode: The causal mode, whose indices are the frames.

    Returns:
        A summary with the frames as last batch dimension: ``(*batch, n_mode)``.
    """
    return _summarized(key, value, needs, weights, mode)[0]


def continued_summary(
    x: Tensor, needs: Needs, weights: Vectors, mode: int, *, past: Past | None, window: int | None
) -> tuple[Summary, Past]:
    """Summarise a tensor that is both keys and values up to each frame, after the frames before it, unchecked.

    Args:
        x: Keys and values over the grid.
        needs: What is wanted.
        weights: Checked weights of each mode, or None.
        mode: The causal mode.
        past: The frames before, or None for none.
        window: How many frames are seen, the own one included; None for all.

    Returns:
        A summary with the frames of ``x`` as last batch dimension, whose causal mode has all frames that are seen; and
        the past of the frames to come.
    """
    summary, time, per_frame, within = _summarized(x, x, needs, weights, mode, past, window)
    family = running_family(needs)
    sums: list[Tensor | None] = []
    means: list[Tensor | None] = []
    for place, kept in enumerate(per_frame.kept):
        mean, before = per_frame.key(kept), None if past is None else past.sums[place]
        outside = tuple(k + (k >= mode) for k in kept)
        summed, held = outside in family, tuple(sorted((*outside, mode))) in family
        sums.append(time.sums(mean, before).select(time.batch, -1).clone() if summed and window is None else None)
        means.append(time.held(mean, _held(past, place)) if held or window is not None else None)
    moments: tuple[Tensor, ...] = ()
    if within is not None and window is not None:
        moments = (time.held(within, None if past is None else past.moments[0]),)
    elif within is not None:
        grand = per_frame.key(())
        origin, shift, _, second = time.second_moments(within, grand, grand)
        moments = (origin.clone(), *(part.select(time.batch, -1).clone() for part in (shift, second)))
    return summary, time.past(sums, means, moments, weights)


def continued_frames(
    x: Tensor, weights: Vectors, mode: int, *, past: Past | None, window: int | None
) -> tuple[Tensor, Vectors, Past]:
    """Put a tensor beside the frames before it that its frames see, unchecked.

    Args:
        x: Tensor over the grid.
        weights: Checked weights of each mode, or None.
        mode: The causal mode.
        past: The frames before, or None for none.
        window: How many frames are seen, the own one included; None for all. With a window, one frame at a time.

    Returns:
        The frames seen, the weights of each mode over them, and the past of the frames to come.
    """
    batch = x.dim() - len(weights) - 1
    time = Time.of(x, weights[mode], mode, batch, past, window)
    moved, held = x.movedim(batch + mode, batch), _held(past, 0)
    seen = moved if held is None else torch.cat([held.to(x.dtype), moved], batch)
    vectors = tuple(time.all_weights if k == mode else weight for k, weight in enumerate(weights))
    if past is None and weights[mode] is None:
        vectors = weights
    return seen.movedim(batch, batch + mode), vectors, time.past([None], [time.held(moved, held)], (), weights)


def _summarized(
    key: Tensor,
    value: Tensor,
    needs: Needs,
    weights: Vectors,
    mode: int,
    past: Past | None = None,
    window: int | None = None,
) -> tuple[Summary, Time, Summary, Tensor | None]:
    """Return the running summary, the time it ran over, and what it was made of: summaries of the frames."""
    order = len(weights)
    batch = key.dim() - order - 1
    others = [k for k in range(order) if k != mode]
    family = running_family(needs)
    of_frames = Needs(
        within_frames(family, others),
        needs.second_moment,
        None if needs.keys is None else within_frames(needs.keys, others),
        None if needs.values is None else within_frames(needs.values, others),
    )
    moved = key.movedim(batch + mode, batch)
    moved_value = moved if value is key else value.movedim(batch + mode, batch)
    per_frame = attention_summary(moved, moved_value, of_frames, tuple(_for_frames(weights[k]) for k in others))
    time = Time.of(key, weights[mode], mode, batch, past, window)
    per_frame = time.present(per_frame)

    keys: list[Tensor | None] = []
    values: list[Tensor | None] = []
    counts = []
    for kept in family:
        place = per_frame.place(within_frames((kept,), others)[0])
        mean, second = per_frame.keys[place], per_frame.values[place]
        keys.append(time.means(mean, kept, past, place))
        values.append(keys[-1] if second is mean else time.means(second, kept, past, place))
        count = per_frame.weights[place]
        if count is None:
            grid = [key.shape[batch + k] for k in kept if k != mode]
            count = time.weight.new_full([1] * (batch + 1) + grid, per_frame.positions / math.prod(grid))
        counts.append(time.counts(count, kept))
    mode_weights: list[Vector] = []
    for k, weight in enumerate(weights):
        if k != mode and weight is not None:
            weight = weight.reshape(*(1,) * (batch + 1 - weight.dim()), *weight.shape).unsqueeze(-2)
        mode_weights.append(time.visible if k == mode else weight)
    covariance = key_covariance = None
    if per_frame.covariance is not None and per_frame.key_covariance is not None:
        mean_key, mean_value = per_frame.key(()), per_frame.value(())
        place = per_frame.place(())
        key_covariance = time.covariance(per_frame.key_covariance, mean_key, mean_key, past, place)
        covariance = key_covariance
        if value is not key:
            covariance = time.covariance(per_frame.covariance, mean_value, mean_key, past, place)
    sizes = list(key.shape[batch:-1])
    sizes[mode] = time.visible.shape[-1]
    parts = (tuple(keys), tuple(values), tuple(counts), tuple(mode_weights), covariance, key_covariance)
    return Summary(tuple(sizes), family, *parts), time, per_frame, per_frame.key_covariance


def running_family(needs: Needs) -> Family:
    """Return the kept subsets that a running summary holds: with second moments, the grand mean too.

    Args:
        needs: What is wanted.
    """
    return needs.kept if () in needs.kept or not needs.second_moment else (*needs.kept, ())


def within_frames(family: Family, others: list[int]) -> Family:
    """Return the kept subsets of a frame: the causal mode left out, the others renumbered, each once.

    Args:
        family: Kept subsets.
        others: The modes but the causal one.
    """
    renumbered = (tuple(others.index(k) for k in kept if k in others) for kept in family)
    return tuple(dict.fromkeys(renumbered))


def _for_frames(weight: Vector) -> Vector:
    """Let weights with batch dimensions be the same for all frames."""
    return weight if weight is None or weight.dim() == 1 else weight.unsqueeze(-2)


def _held(past: Past | None, place: int) -> Tensor | None:
    """Means of a kept subset in the frames before, if there are any."""
    return None if past is None else past.means[place]


def _numbered(tensors: Mapping[str, Tensor], name: str, count: int) -> tuple[Tensor | None, ...]:
    """Tensors of one name with numbers, None for those that are missing."""
    return tuple(tensors.get(f"{name}.{place}") for place in range(count))


@dataclass(frozen=True, eq=False)
class Time:
    """Sums over the frames so far.

    Attributes:
        mode: The causal mode.
        batch: Number of batch dimensions, without the frames.
        weight: Weight of each frame, ``(*batch, frames)`` with batch dimensions that may be 1.
        weighted: Whether these weights were given; else all are 1.
        before: The frames before, or None for none.
        window: How many frames are seen, or None for all.
    """

    mode: int
    batch: int
    weight: Tensor
    weighted: bool
    before: Past | None
    window: int | None

    @classmethod
    def of(cls, tensor: Tensor, weight: Vector, mode: int, batch: int, before: Past | None, window: int | None) -> Time:
        """Return the time that the frames of a tensor run over."""
        weighted = weight is not None
        if weight is None:
            weight = tensor.new_ones(tensor.shape[batch + mode], dtype=accumulation_dtype(tensor.dtype))
        weight = weight.reshape(*(1,) * (batch + 1 - weight.dim()), *weight.shape)
        return cls(mode, batch, weight, weighted, before, window)

    @property
    def total(self) -> Tensor:
        """Weight of all frames so far, or in the window of each."""
        if self.window is not None:
            return self.visible.sum(-1)
        total = self.weight.cumsum(-1)
        if self.before is None or self.before.total is None:
            return total
        return total + self.before.total.to(total.dtype).unsqueeze(-1)

    @property
    def visible(self) -> Tensor:
        """Weight of each frame as each frame sees it, ``(*batch, frames, seen)``: zero while it lies ahead."""
        frames = self.weight.shape[-1]
        if self.window is not None:
            missing = self.window - 1 + frames - self.all_weights.shape[-1]
            return F.pad(self.all_weights, (missing, 0)).unfold(-1, self.window, 1)
        seen = self.all_weights.shape[-1]
        return self.all_weights.unsqueeze(-2) * self.weight.new_ones(frames, seen).tril(seen - frames)

    @property
    def all_weights(self) -> Tensor:
        """Weights of the frames held and of the own frames, beside each other."""
        if self.before is None:
            return self.weight
        parts = [self.before.weight.to(self.weight.dtype), self.weight]
        common = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
        return torch.cat([part.expand(*common, -1) for part in parts], -1)

    def present(self, per_frame: Summary) -> Summary:
        """Return the summaries of the frames, zero in absent ones: zero times NaN would be NaN."""
        if not self.weighted:
            return per_frame

        def there(tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            shape = [*self.weight.shape, *(1,) * (tensor.dim() - self.batch - 1)]
            return torch.where(self.weight.reshape(shape) > 0, tensor, 0.0)

        keys = tuple(map(there, per_frame.keys))
        pairs = zip(per_frame.keys, keys, per_frame.values, strict=True)
        values = tuple(done if value is key else there(value) for key, done, value in pairs)
        moments = there(per_frame.covariance), there(per_frame.key_covariance)
        return dataclasses.replace(
            per_frame, keys=keys, values=values, covariance=moments[0], key_covariance=moments[1]
        )

    def means(self, mean: Tensor | None, kept: Kept, past: Past | None, place: int) -> Tensor | None:
        """Turn frame means ``(*batch, frames, *others, D)`` into running means, or into tokens beside each other."""
        if mean is None:
            return None
        held = _held(past, place)
        if self.mode in kept:
            return self.tokens(mean, held, kept)
        if self.window is not None:
            return self.windowed(mean, held)
        return self.divided(self.sums(mean, None if past is None else past.sums[place]))

    def tokens(self, mean: Tensor, held: Tensor | None, kept: Kept) -> Tensor:
        """Put the means of all frames that are seen beside each other, for each frame that sees them."""
        place = self.batch + 1 + kept.index(self.mode)
        if self.window is not None:
            return self.windows(mean, held).movedim(-1, place)
        seen, frames = self.beside(mean, held), mean.shape[self.batch]
        tokens = seen.movedim(self.batch, place - 1).unsqueeze(self.batch)
        if frames == 1:
            return tokens
        size = seen.shape[self.batch]
        past = torch.ones(frames, size, dtype=torch.bool, device=mean.device).tril(size - frames)
        past = past.reshape(frames, *(size if k == self.mode else 1 for k in kept), 1)
        return torch.where(past, tokens, 0.0)  # a later frame must not even multiply a zero: it may hold NaN

    def counts(self, count: Tensor, kept: Kept) -> Tensor:
        """Turn the weights behind frame means into those behind running means, or behind tokens."""
        if self.mode in kept:
            visible = self.visible
            tokens = (visible.shape[-1] if k == self.mode else 1 for k in kept)
            return count.unsqueeze(self.batch + 1 + kept.index(self.mode)) * visible.reshape(
                *visible.shape[:-1], *tokens
            )
        total = self.total
        return count * total.reshape([*total.shape, *(1 for _ in kept)])

    def beside(self, of_frames: Tensor, held: Tensor | None) -> Tensor:
        """Put what is known of each frame beside what is held of those before."""
        return of_frames if held is None else torch.cat([held.to(of_frames.dtype), of_frames], self.batch)

    def windows(self, of_frames: Tensor, held: Tensor | None) -> Tensor:
        """Show each frame what is known of the frames of its window, as last dimension."""
        assert self.window is not None
        seen, frames = self.beside(of_frames, held), of_frames.shape[self.batch]
        missing = self.window - 1 + frames - seen.shape[self.batch]
        further = seen.dim() - self.batch - 1
        return F.pad(seen, (*(0, 0) * further, missing, 0)).unfold(self.batch, self.window, 1)

    def windowed(self, of_frames: Tensor, held: Tensor | None) -> Tensor:
        """Average over the window of each frame."""
        shown, visible = self.windows(of_frames, held), self.visible
        further = shown.dim() - self.batch - 2
        visible = visible.reshape(*visible.shape[:-1], *(1,) * further, visible.shape[-1])
        return self.divided((shown * visible).sum(-1))

    def sums(self, of_frames: Tensor, before: Tensor | None) -> Tensor:
        """Weighted sum over the frames so far."""
        weight = self.weight.reshape(*self.weight.shape, *(1,) * (of_frames.dim() - self.batch - 1))
        sums = (of_frames * weight).cumsum(self.batch)
        return sums if before is None else sums + before.to(sums.dtype).unsqueeze(self.batch)

    def divided(self, sums: Tensor) -> Tensor:
        """Divide sums by the weight of the frames so far; zero while there is none."""
        total = self.total.reshape(*self.total.shape, *(1,) * (sums.dim() - self.batch - 1))
        return sums / torch.where(total > 0, total, 1)

    def covariance(self, within: Tensor, left: Tensor, right: Tensor, past: Past | None, place: int) -> Tensor:
        """Second central moment over the frames so far: within frames, and between their means."""
        if self.window is not None:
            held, visible = _held(past, place), self.visible.unsqueeze(-1)
            shifted = (self.windows(m, held).mT - self.windowed(m, held).unsqueeze(-2) for m in (left, right))
            left, right = (torch.where(visible > 0, m, 0.0) for m in shifted)
            between = self.divided((left * visible).mT @ right)
            return self.windowed(within, None if past is None else past.moments[0]) + between
        _, shift_left, shift_right, moments = self.second_moments(within, left, right)
        outer = self.divided(shift_left).unsqueeze(-1) * self.divided(shift_right).unsqueeze(-2)
        return self.divided(moments) - outer

    def second_moments(self, within: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sums of first and second moments relative to the first frame that is present, which all later ones know."""
        first = (self.weight > 0).to(torch.uint8).argmax(-1, keepdim=True).unsqueeze(-1)
        origins = [m.gather(-2, first.expand(*m.shape[:-2], 1, m.shape[-1])).squeeze(-2) for m in (left, right)]
        before: tuple[Tensor | None, ...] = (None, None, None)
        if self.before is not None and self.before.total is not None:
            origin, *_ = before = self.before.moments
            earlier = self.before.total.unsqueeze(-1) > 0
            origins = [torch.where(earlier, origin.to(own.dtype), own) for own in origins]
        known = (self.total > 0).unsqueeze(-1)  # before the first frame that is present there is nothing to know
        left, right = (
            torch.where(known, m - origin.unsqueeze(-2), 0.0) for m, origin in zip((left, right), origins, strict=True)
        )
        moments = self.sums(within + left.unsqueeze(-1) * right.unsqueeze(-2), before[2])
        return origins[1], self.sums(left, before[1]), self.sums(right, before[1]), moments

    def held(self, of_frames: Tensor, held: Tensor | None) -> Tensor:
        """Return what is known of the frames that later ones see, in memory of its own."""
        seen = self.beside(of_frames, held)
        if self.window is None:
            return seen.clone() if held is None else seen
        return self._last(seen, self.batch)

    def _last(self, seen: Tensor, dim: int) -> Tensor:
        """Return the part of the last frames, all but one of a window, in memory of its own."""
        assert self.window is not None
        count = min(self.window - 1, seen.shape[dim])
        return seen.narrow(dim, seen.shape[dim] - count, count).clone()

    def past(
        self,
        sums: list[Tensor | None],
        means: list[Tensor | None],
        moments: tuple[Tensor, ...],
        weights: Vectors,
    ) -> Past:
        """Put together what later frames need to know."""
        frames = self.weight.shape[-1] + (0 if self.before is None else self.before.frames)
        weight = self.all_weights.clone() if self.window is None else self._last(self.all_weights, -1)
        total = self.total[..., -1].clone() if self.window is None else None
        others = tuple(None if k == self.mode or w is None else w.clone() for k, w in enumerate(weights))
        return Past(frames, weight, total, tuple(sums), tuple(means), moments, others)
