r"""Causality along one mode: what a query in one frame may know of the frames up to its own.

Frames are the indices of one mode, time as a rule. The summary of all positions up to frame i is a running sum of the
summaries of the frames, so one pass over the tensor gives all of them: marginal means that do not keep the causal mode
become running means, and those that keep it become one token a frame, absent while it lies ahead. Nothing that is known
at frame i depends on a later frame, whatever the data.

The sums may start from those of frames that came before, a `Past`, and end in one: a tensor that is fed frame by frame
is summarised as the whole tensor is, whose past is empty. With a window they run over the last frames alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tensorattn.functional.parts import summary_of_parts
from tensorattn.functional.summary import Means, Moments, Needs, Summary, Sums, make_summary
from tensorattn.masks import Vectors, Weights, accumulation_dtype, counting_dtype, without_absent
from tensorattn.modes import Family, Kept, positions_behind

__all__ = ["Past", "causal_summary", "frames_beside", "frames_first", "frames_last"]


@dataclass(frozen=True, eq=False)
class Past:
    """What later frames need to know of the frames before them.

    Attributes:
        frames: Number of frames so far.
        weight: Weights of the frames that are held, the last ones, ``(*batch, held)`` with batch dimensions that may be
            1.
        total: Weight of all frames so far, ``(*batch,)`` likewise; None with a window.
        sums: For each kept subset of a frame, the weighted sum of its means over all frames ``(*batch, *n_U, D)``, or
            None where it is not needed; of an operator that condenses, its own sums, as ``means`` with a window.
        means: For each kept subset of a frame, its means in every frame held ``(*batch, held, *n_U, D)``, or None where
            they are not needed.
        moments: With second moments, the origin ``(*batch, D)`` that they are taken about, and the sums of first and
            second moments ``(*batch, D)`` and ``(*batch, D, D)``; with a window, the central second moments of every
            frame held, ``(*batch, held, D, D)``.
        mode_weights: Weights of the indices of the other modes, the same for all frames; None for the causal mode.
    """

    frames: int
    weight: Tensor
    total: Tensor | None = None
    sums: tuple[Tensor | None, ...] = ()
    means: tuple[Tensor | None, ...] = ()
    moments: tuple[Tensor, ...] = ()
    mode_weights: Vectors = ()

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

        def parts(name: str) -> tuple[Tensor | None, ...]:
            return tuple([tensors.get(f"{name}.{place}") for place in range(len(getattr(self, name)))])

        return dataclasses.replace(
            self,
            weight=tensors["weight"],
            total=tensors.get("total"),
            sums=parts("sums"),
            means=parts("means"),
            moments=tuple([part for part in parts("moments") if part is not None]),
            mode_weights=parts("mode_weights"),
        )


def causal_summary(
    key: Tensor,
    value: Tensor,
    needs: Needs,
    weights: Weights,
    mode: int,
    *,
    past: Past | None = None,
    window: int | None = None,
) -> tuple[Summary, Callable[[], Past]]:
    """Summarise keys and values up to each frame, after the frames before them, unchecked.

    Args:
        key: Keys over the grid ``(*batch, n_1, …, n_N, D)``.
        value: Values over the grid.
        needs: What is wanted.
        weights: Checked weights; with a past, a product over modes.
        mode: The causal mode, whose indices are the frames.
        past: The frames before, or None for none; with one, keys and values are the same tensor.
        window: How many frames are seen, the own one included; None for all.

    Returns:
        A summary with the frames of the tensors as last batch dimension, ``(*batch, n_mode)``, whose causal mode has
        all frames that are seen; and what returns the past of the frames to come.
    """
    order, batch, family = weights.order, key.dim() - weights.order - 1, needs.held
    others = [k for k in range(order) if k != mode]
    shown, same = weights.shown(), value is key
    key = without_absent(key, shown)  # zero times what is absent might be NaN
    value = key if same else without_absent(value, shown)
    frames = key.movedim(batch + mode, batch)
    frame_values = frames if same else value.movedim(batch + mode, batch)
    within = {kept: tuple([others.index(k) for k in kept if k != mode]) for kept in family}
    per_frame = summary_of_parts(frames, frame_values, _within(needs, within), _of_others(weights, mode, batch))
    part = weights.part if weights.part is not None and mode in weights.part.cuts else None
    time = so_far = _Time(per_frame, weights, mode, batch, past, window)
    if part is not None:  # of frames that others hold, sums of those before, and what is known of each alone
        so_far = _Time(*_after_earlier(per_frame, weights, mode, batch), mode, batch, None, None)
        alone = tuple(dict.fromkeys([within[kept] for kept in family if mode in kept])) or per_frame.kept[:1]
        time = _Time(
            *_of_all_frames(_of_family(per_frame, alone, batch), weights, mode, batch), mode, batch, None, None
        )
    sizes = (*per_frame.sizes[:mode], time.seen, *per_frame.sizes[mode:])

    def put_together(wanted: Family, running: dict[Kept, Tensor], tokens: dict[Kept, Tensor]) -> Means:
        """Put what runs over the frames behind each other, and behind it what is known of each frame."""
        blocks = [
            Means.of(sizes, {k: part[k] for k in wanted if k in part}, batch + 1).blocks
            for part in (running, tokens)
            if any(k in part for k in wanted)
        ]
        return Means(sizes, tuple([block for each in blocks for block in each]))

    def last(tensor: Tensor) -> Tensor:
        """Return the own frames of those that sums run over."""
        return tensor if part is None else tensor.narrow(batch, len(part.cuts[mode]), part.lengths[mode])

    def own(tensor: Tensor) -> Tensor:
        """Return the own frames of all."""
        return tensor if part is None or tensor.shape[batch] == 1 else part.own(tensor, mode, batch)

    def seen(side: str, given: Family | None) -> Means:
        wanted, running, tokens = family if given is None else given, getattr(so_far.per_frame, side), {}
        means = {kept: last(so_far.running_mean(running, within[kept])) for kept in wanted if mode not in kept}
        for kept in wanted:
            if mode in kept:
                tokens[kept] = time.tokens(getattr(time.per_frame, side), kept, within[kept])
        return put_together(wanted, means, tokens)

    keys = seen("key_means", needs.keys)
    values = keys if same and needs.keys == needs.values else seen("value_means", needs.values)
    counted = {
        kept: (
            own(time.count(kept, within[kept])) if mode in kept else last(so_far.count(kept, within[kept]))
        ).unsqueeze(-1)
        for kept in family
    }
    counts = put_together(
        family,
        {kept: count for kept, count in counted.items() if mode not in kept},
        {kept: count for kept, count in counted.items() if mode in kept},
    )
    vectors: Vectors | None = None
    if per_frame.mode_weights is not None:
        vectors = (*per_frame.mode_weights[:mode], own(time.visible), *per_frame.mode_weights[mode:])
    covariance = key_covariance = None
    if per_frame.covariance is not None and per_frame.key_covariance is not None:
        dtype = per_frame.key_covariance.dtype
        covariance = key_covariance = last(so_far.running_moments(of_keys=True).covariance(dtype))
        if not same:
            covariance = last(so_far.running_moments(of_keys=False).covariance(dtype))
    found = Summary(sizes, family, keys, values, counts, vectors, covariance, key_covariance, weights.indices)
    return found, functools.partial(time.past, family, within)


def frames_beside(
    x: Tensor, weights: Weights, mode: int, *, past: Past | None, window: int | None
) -> tuple[Tensor, Weights, Past]:
    """Put a tensor beside the frames before it that its frames see, unchecked.

    Args:
        x: Tensor over the grid.
        weights: Checked weights, a product over modes.
        mode: The causal mode.
        past: The frames before, or None for none.
        window: How many frames are seen, the own one included; None for all. With a window, one frame at a time.

    Returns:
        The frames seen, their weights, and the past of the frames to come.
    """
    batch = x.dim() - weights.order - 1
    moved = x.movedim(batch + mode, batch)
    everything = tuple(range(weights.order - 1))
    per_frame = make_summary(moved, moved, Needs((everything,)), Weights((None,) * (weights.order - 1)))
    time = _Time(per_frame, weights, mode, batch, past, window)
    seen = time.beside(moved, 0)
    if past is not None or weights.vectors[mode] is not None:
        weights = weights.with_vector(mode, time.weights)
    held = time.last(seen, batch)
    after = Past(time.frames, time.last(time.weights, -1), time.total, (None,), (held,), (), time.other_vectors())
    return seen.movedim(batch, batch + mode), weights, after


def _within(needs: Needs, within: Mapping[Kept, Kept]) -> Needs:
    """Return what is needed of each frame: the causal mode left out of the kept subsets, each once."""

    def inner(family: Family | None) -> Family | None:
        return None if family is None else tuple(dict.fromkeys([within[kept] for kept in family]))

    kept = inner(needs.held)
    assert kept is not None
    return Needs(kept, needs.second_moment, inner(needs.keys), inner(needs.values))


def _of_all_frames(per_frame: Summary, weights: Weights, mode: int, batch: int) -> tuple[Summary, Weights]:
    """Put the frames that other parts hold beside those of a part."""
    part, vector = weights.part, weights.vectors[mode]
    assert part is not None
    if vector is not None:
        weights = weights.with_vector(mode, part.every(vector, mode, -1))
    found = _each(per_frame, lambda tensor: part.every(tensor, mode, batch))
    return (found if weights.grid is not None else dataclasses.replace(found, counts=per_frame.counts)), weights


def _after_earlier(per_frame: Summary, weights: Weights, mode: int, batch: int) -> tuple[Summary, Weights]:
    """Put one frame for each part before those of a part: the mean of its frames, of no weight unless it is earlier.

    So a part sends as much as one frame, however many it has.
    """
    part, vector = weights.part, weights.vectors[mode]
    assert part is not None
    split, rows = part.cuts[mode], per_frame.key_means.blocks[0][1]
    ends = [sum(split[: place + 1]) for place in range(len(split))]
    earlier = torch.tensor([end <= part.start[mode] for end in ends], device=rows.device)
    if vector is None:
        vector = rows.new_ones(part.lengths[mode], dtype=accumulation_dtype(rows.dtype))
        known = vector.new_tensor(split)
    else:
        every = part.every(vector, mode, -1)
        known = torch.stack([of_part.sum(-1) for of_part in every.split([*split], -1)], -1)
    if part.lengths[mode] == 0:  # one frame of no weight stands for none
        per_frame = _each(
            per_frame, lambda t: F.pad(t, (*(0, 0) * (t.dim() - batch - 1), 0, 1)) if t.shape[batch] == 0 else t
        )
        vector = F.pad(vector, (0, 1))
    time = _Time(per_frame, weights.with_vector(mode, vector), mode, batch, None, None)

    def whole(tensor: Tensor) -> Tensor:
        """Return what is known of all own frames, from what is known of those up to each."""
        return tensor.narrow(batch, tensor.shape[batch] - 1, 1)

    def means(of: Means) -> Means:
        found = {inner: whole(time.running_mean(of, inner)) for inner in of.family}
        return Means.of(per_frame.sizes, found, batch + 1)

    mine = per_frame.with_means(means)
    if weights.grid is not None and per_frame.counts is not None:
        counts = per_frame.counts.map(lambda count: count.sum(batch, keepdim=True))
        mine = dataclasses.replace(mine, counts=counts)
    if per_frame.key_covariance is not None:
        dtype, alike = per_frame.key_covariance.dtype, per_frame.covariance is per_frame.key_covariance
        moment = whole(time.running_moments(of_keys=True).covariance(dtype))
        other = moment if alike else whole(time.running_moments(of_keys=False).covariance(dtype))
        mine = dataclasses.replace(mine, covariance=other, key_covariance=moment)
    assert part.gather is not None
    gather = part.gather
    before = _each(mine, lambda tensor: gather(tensor, mode, batch, True))
    before = before if weights.grid is not None else dataclasses.replace(before, counts=per_frame.counts)
    if weights.grid is not None and before.counts is not None:
        counts = before.counts.map(lambda count: count * earlier[:, None, None])
        before = dataclasses.replace(before, counts=counts)
    return _joined(before, per_frame, batch), weights.with_vector(mode, torch.cat([known * earlier, vector], -1))


def _joined(one: Summary, other: Summary, batch: int) -> Summary:
    """Put the frames of one summary before those of another, which has the same weights of modes."""

    def means(first: Means, then: Means) -> Means:
        found = {kept: torch.cat([first.get(kept), then.get(kept)], batch) for kept in then.family}
        return Means.of(other.sizes, found, batch + 1)

    keys, same = means(one.key_means, other.key_means), other.value_means is other.key_means
    values = keys if same else means(one.value_means, other.value_means)
    found = dataclasses.replace(other, key_means=keys, value_means=values)
    if one.counts is not None and other.counts is not None and one.counts is not other.counts:
        found = dataclasses.replace(found, counts=means(one.counts, other.counts))
    moments: dict[str, Any] = {}
    for name in ("covariance", "key_covariance"):
        first, then = getattr(one, name), getattr(other, name)
        moments[name] = None if first is None or then is None else torch.cat([first, then], batch)
    return dataclasses.replace(found, **moments)


def _of_family(summary: Summary, family: Family, batch: int) -> Summary:
    """Return the summary of some kept subsets of frames alone."""

    def some(means: Means) -> Means:
        held = {kept: means.get(kept) for kept in family if kept in means.family}
        return Means.of(summary.sizes, held, batch + 1) if held else means

    counts = None if summary.counts is None else some(summary.counts)
    told: dict[str, Any] = {"counts": counts, "covariance": None, "key_covariance": None}
    return dataclasses.replace(summary.with_means(some), kept=family, **told)


def _each(summary: Summary, function: Callable[[Tensor], Tensor]) -> Summary:
    """Return a summary whose frames, the last batch dimension, are other ones; weights of modes are left."""
    covariance = None if summary.covariance is None else function(summary.covariance)
    key_covariance = covariance
    if summary.covariance is not summary.key_covariance and summary.key_covariance is not None:
        key_covariance = function(summary.key_covariance)
    return dataclasses.replace(
        summary.with_means(lambda means: means.map(function)),
        counts=None if summary.counts is None else summary.counts.map(function),
        covariance=covariance,
        key_covariance=key_covariance,
    )


def _of_others(weights: Weights, mode: int, batch: int) -> Weights:
    """Return the weights of the positions of each frame, with the frames as last batch dimension."""
    part = None if weights.part is None else weights.part.without(mode)
    if weights.grid is not None:
        grid = weights.grid.movedim(weights.grid.dim() - weights.order + mode, weights.grid.dim() - weights.order)
        return Weights((None,) * (weights.order - 1), grid, None, weights.binary, weights.indices, part)
    vectors = [vector for k, vector in enumerate(weights.vectors) if k != mode]
    vectors = [v if v is None or v.dim() == 1 else v.unsqueeze(-2) for v in vectors]
    return Weights(tuple(vectors), part=part)


class _Time:
    """Sums over the frames so far, or over those of a window.

    Attributes:
        per_frame: Summaries of the frames, which are their last batch dimension.
        mode: The causal mode.
        batch: Number of batch dimensions, without the frames.
        before: The frames before, or None for none.
        window: How many frames are seen, or None for all.
        weight: Weight of each frame, ``(*batch, frames)`` with batch dimensions that may be 1.
        weights: The same of all frames that are seen, those before too.
        band: Whether each frame sees each of those that are seen, ``(frames, seen)``.
    """

    def __init__(
        self, per_frame: Summary, weights: Weights, mode: int, batch: int, before: Past | None, window: int | None
    ) -> None:
        self.per_frame, self.mode, self.batch, self.before, self.window = per_frame, mode, batch, before, window
        rows = per_frame.key_means.blocks[0][1]
        weight, self.vectors, self.by_position = weights.vectors[mode], weights.vectors, weights.grid is not None
        if weight is None:
            weight = rows.new_ones(rows.shape[batch], dtype=accumulation_dtype(rows.dtype))
        self.weight = weight[(None,) * (batch + 1 - weight.dim())]
        self.weights = self.weight
        if before is not None:
            self.weights = torch.cat(_same_batch([before.weight.to(self.weight.dtype), self.weight], -1), -1)
        own, self.seen = self.weight.shape[-1], self.weights.shape[-1]
        band = torch.ones(own, self.seen, dtype=torch.bool, device=self.weight.device).tril(self.seen - own)
        self.band = band if window is None else band.triu(self.seen - own - window + 1)
        self.frames = self.weight.shape[-1] + (0 if before is None else before.frames)

    @property
    def visible(self) -> Tensor:
        """Weight of each frame as each frame sees it, ``(*batch, frames, seen)``: zero while it lies ahead."""
        return torch.where(self.band, self.weights.unsqueeze(-2), 0.0)

    @property
    def total(self) -> Tensor | None:
        """Weight of all frames so far, ``(*batch,)``; None with a window, which forgets them."""
        if self.window is not None:
            return None
        total = self.weight.to(counting_dtype(self.weight.device)).sum(-1)
        return total if self.before is None or self.before.total is None else total + self.before.total

    def beside(self, of_frames: Tensor, place: int | None) -> Tensor:
        """Put what is known of each frame beside what is held of those before."""
        held = None
        if self.before is not None:
            held = self.before.moments[0] if place is None else self.before.means[place]
        return of_frames if held is None else torch.cat([held.to(of_frames.dtype), of_frames], self.batch)

    def last(self, seen: Tensor, dim: int) -> Tensor:
        """Return what later frames see, in memory of its own: all but one of the frames of a window, or all."""
        count = seen.shape[dim] if self.window is None else min(self.window - 1, seen.shape[dim])
        return seen.narrow(dim, seen.shape[dim] - count, count).clone()

    def other_vectors(self) -> Vectors:
        """Return weights of the other modes, in memory of their own."""
        return tuple([None if k == self.mode or v is None else v.clone() for k, v in enumerate(self.vectors)])

    def frame_count(self, inner: Kept) -> Tensor:
        """Return how often each frame counts in a mean over frames."""
        if not self.by_position:
            return self.weight
        count = self.per_frame.count(inner)
        assert count is not None
        return count

    def windowed(self, sums: Sums) -> Sums:
        """Return sums over the window of each frame, of those of all frames that are seen."""
        assert self.window is not None
        missing = self.window - 1 + self.weight.shape[-1] - self.seen
        padded = [F.pad(part, (*(0, 0) * (part.dim() - self.batch - 1), missing, 0)) for part in sums]
        return Sums(*padded).windowed(self.batch, self.window)

    def running_mean(self, means: Means, inner: Kept) -> Tensor:
        """Turn frame means ``(*batch, frames, *n, D)`` into means over the frames that each sees."""
        mean, place = means.get(inner), self.per_frame.kept.index(inner)
        if self.window is not None:
            sums = self.windowed(Sums.of(self.beside(mean, place), self.weights))
        else:
            sums = Sums.of(mean, self.frame_count(inner)).running(self.batch, self.sums_before(place))
        return sums.mean(accumulation_dtype(mean.dtype))

    def sums_before(self, place: int) -> Sums | None:
        """Return the sums over the frames before, if there are any."""
        if self.before is None or self.before.total is None or self.before.sums[place] is None:
            return None
        wide = counting_dtype(self.weight.device)
        return Sums(self.before.total.to(wide), self.before.sums[place].to(wide))  # type: ignore[union-attr]

    def tokens(self, means: Means, kept: Kept, inner: Kept) -> Tensor:
        """Put the means of all frames that are seen beside each other, the same for each frame that sees them."""
        seen = self.beside(means.get(inner), self.per_frame.kept.index(inner))
        return seen.movedim(self.batch, self.batch + kept.index(self.mode)).unsqueeze(self.batch)

    def count(self, kept: Kept, inner: Kept) -> Tensor:
        """Return the positions behind running means ``(*batch, frames, *n)``, or behind tokens of each frame."""
        count = self.per_frame.count(inner)
        if count is None:
            sizes = self.per_frame.sizes
            count = self.weights.new_full([sizes[k] for k in inner], positions_behind(sizes, inner))
            count = count[(None,) * (self.batch + 1)]
        count = count.to(counting_dtype(count.device))
        if not self.by_position:
            count = count * self.weights[(..., *(None,) * len(inner))]
        seen = torch.where(self.band[(..., *(None,) * len(inner))], count.unsqueeze(self.batch), 0.0)
        if self.mode not in kept:
            return seen.sum(self.batch + 1)
        return seen.movedim(self.batch + 1, self.batch + 1 + kept.index(self.mode))

    def frame_moments(self, of_keys: bool) -> Moments:
        """Return the moments of each frame, or with a window of all frames that are seen, about one origin."""
        summary, wide = self.per_frame, counting_dtype(self.weight.device)
        within = summary.key_covariance if of_keys else summary.covariance
        assert within is not None
        value, key = (summary.key(()) if of_keys else summary.value(())), summary.key(())
        if self.window is not None:  # a frame that is no longer seen must not be an origin: it may hold NaN
            place = summary.kept.index(())
            within, value, key = self.beside(within, None), self.beside(value, place), self.beside(key, place)
            origins = (value.new_zeros((), dtype=wide), key.new_zeros((), dtype=wide))
            return Moments.of(within.to(wide), value.to(wide), key.to(wide), self.weights, origins)
        count = self.frame_count(())
        first = (count > 0).to(torch.uint8).argmax(-1, keepdim=True).unsqueeze(-1)
        at_first = [m.gather(-2, first.expand(*m.shape[:-2], 1, m.shape[-1])).to(wide) for m in (value, key)]
        known = (count.cumsum(-1) > 0).unsqueeze(-1)  # before the first frame that is present there is nothing to know
        if self.before is not None and self.before.moments and self.before.total is not None:
            earlier, origin = (self.before.total > 0)[..., None, None], self.before.moments[0].to(wide).unsqueeze(-2)
            at_first, known = [torch.where(earlier, origin, own) for own in at_first], known | earlier
        origins = (torch.where(known, at_first[0], 0.0), torch.where(known, at_first[1], 0.0))
        return Moments.of(within.to(wide), value.to(wide), key.to(wide), count, origins)

    def running_moments(self, of_keys: bool) -> Moments:
        """Return the moments over the frames that each frame sees."""
        moments = self.frame_moments(of_keys)
        if self.window is not None:
            return Moments(moments.origins, *[self.windowed(sums) for sums in moments[1:]])
        before = None
        if self.before is not None and self.before.moments and self.before.total is not None:
            wide = counting_dtype(self.weight.device)
            _, shift, second = (part.to(wide) for part in self.before.moments)
            total = self.before.total.to(wide)
            before = Moments(moments.origins, Sums(total, shift), Sums(total, shift), Sums(total, second))
        return moments.running(self.batch, before)

    def past(self, family: Family, within: Mapping[Kept, Kept]) -> Past:
        """Put together what later frames need to know."""
        summary, sums, means = self.per_frame, [], []
        for place, inner in enumerate(summary.kept):
            held = inner in [within[kept] for kept in family if self.mode in kept] or self.window is not None
            summed = inner in [within[kept] for kept in family if self.mode not in kept] and self.window is None
            known = inner in summary.key_means.family
            mean = summary.key(inner) if known else None
            total = None
            if summed and mean is not None:
                running = Sums.of(mean, self.frame_count(inner)).running(self.batch, self.sums_before(place))
                total = running.total.select(self.batch, -1).clone()
            sums.append(total)
            means.append(self.last(self.beside(mean, place), self.batch) if held and mean is not None else None)
        moments: tuple[Tensor, ...] = ()
        if summary.key_covariance is not None and self.window is not None:
            moments = (self.last(self.beside(summary.key_covariance, None), self.batch),)
        elif summary.key_covariance is not None:
            found = self.running_moments(of_keys=True)
            parts = (found.origins[1], found.keys.total, found.products.total)
            moments = tuple([part.select(self.batch, -1).clone() for part in parts])
        weight = self.last(self.weights, -1)
        return Past(self.frames, weight, self.total, tuple(sums), tuple(means), moments, self.other_vectors())


def _same_batch(parts: list[Tensor], dim: int) -> list[Tensor]:
    """Expand tensors to the same sizes but for one dimension, counted from the end."""
    common = torch.broadcast_shapes(*[part.shape[:dim] for part in parts])
    return [part.expand(*common, *part.shape[dim:]) for part in parts]


def frames_first(tensor: Tensor, mode: int, batch: int) -> Tensor:
    """Make the frames the last batch dimension and leave a mode of size 1: ``(*batch, n_mode, …, 1, …, D)``.

    Args:
        tensor: Tensor over the grid.
        mode: The causal mode.
        batch: Number of batch dimensions.
    """
    return tensor.movedim(batch + mode, batch).unsqueeze(batch + 1 + mode)


def frames_last(tensor: Tensor, mode: int, batch: int) -> Tensor:
    """Undo `frames_first`.

    Args:
        tensor: Result of `frames_first`.
        mode: The causal mode.
        batch: Number of batch dimensions, without the frames.
    """
    return tensor.squeeze(batch + 1 + mode).movedim(batch, batch + mode)
