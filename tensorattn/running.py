r"""Running summaries: what a query in one frame may know of the frames up to its own.

Frames are the indices of one mode, time as a rule. The summary of all positions up to frame i is a running sum of the
summaries of the frames, so one pass over the tensor gives all of them: marginal means that do not keep the causal mode
become running means, and those that keep it become one token a frame, absent while it lies ahead. Nothing that is known
at frame i depends on a later frame, whatever the data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tensorattn.contraction_tree import Family, Kept
from tensorattn.summarizing import Needs, attention_summary
from tensorattn.summary import Summary
from tensorattn.weights import Vector, Vectors, accumulation_dtype

__all__ = ["running_summary"]


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
    order = len(weights)
    batch = key.dim() - order - 1
    others = [k for k in range(order) if k != mode]
    family = needs.kept if () in needs.kept or not needs.second_moment else (*needs.kept, ())
    of_frames = Needs(
        _within_frames(family, others),
        needs.second_moment,
        None if needs.keys is None else _within_frames(needs.keys, others),
        None if needs.values is None else _within_frames(needs.values, others),
    )
    moved = key.movedim(batch + mode, batch)
    moved_value = moved if value is key else value.movedim(batch + mode, batch)
    per_frame = attention_summary(moved, moved_value, of_frames, tuple(_for_frames(weights[k]) for k in others))

    own = weights[mode]
    if own is None:
        own = moved.new_ones(key.shape[batch + mode], dtype=accumulation_dtype(key.dtype))
    time = _Time(mode, batch, own.reshape(*(1,) * (batch + 1 - own.dim()), *own.shape))
    keys, values, counts = [], [], []
    for kept in family:
        place = per_frame.place(_within_frames((kept,), others)[0])
        keys.append(time.means(per_frame.keys[place], kept))
        values.append(time.means(per_frame.values[place], kept))
        count = per_frame.weights[place]
        if count is None:
            grid = [key.shape[batch + k] for k in kept if k != mode]
            count = own.new_full([1] * (batch + 1) + grid, per_frame.positions / math.prod(grid))
        counts.append(time.counts(count, kept))
    mode_weights: list[Vector] = []
    for k, weight in enumerate(weights):
        if k != mode and weight is not None:
            weight = weight.reshape(*(1,) * (batch + 1 - weight.dim()), *weight.shape).unsqueeze(-2)
        mode_weights.append(time.visible if k == mode else weight)
    covariance = key_covariance = None
    if per_frame.covariance is not None and per_frame.key_covariance is not None:
        mean_key, mean_value = per_frame.key(()), per_frame.value(())
        covariance = time.covariance(per_frame.covariance, mean_value, mean_key)
        key_covariance = time.covariance(per_frame.key_covariance, mean_key, mean_key)
    sizes = tuple(key.shape[batch:-1])
    return Summary(
        sizes, family, tuple(keys), tuple(values), tuple(counts), tuple(mode_weights), covariance, key_covariance
    )


def _within_frames(family: Family, others: list[int]) -> Family:
    """Kept subsets of a frame: the causal mode left out, the others renumbered, each once."""
    renumbered = (tuple(others.index(k) for k in kept if k in others) for kept in family)
    return tuple(dict.fromkeys(renumbered))


def _for_frames(weight: Vector) -> Vector:
    """Let weights with batch dimensions be the same for all frames."""
    return weight if weight is None or weight.dim() == 1 else weight.unsqueeze(-2)


@dataclass(frozen=True)
class _Time:
    """Sums over the frames so far.

    Attributes:
        mode: The causal mode.
        batch: Number of batch dimensions, without the frames.
        weight: Weight of each frame, ``(*batch, frames)`` with batch dimensions that may be 1.
    """

    mode: int
    batch: int
    weight: Tensor

    @property
    def total(self) -> Tensor:
        """Weight of all frames so far."""
        return self.weight.cumsum(-1)

    @property
    def visible(self) -> Tensor:
        """Weight of each frame as each frame sees it, ``(*batch, frames, frames)``: zero while it lies ahead."""
        frames = self.weight.shape[-1]
        return self.weight.unsqueeze(-2) * self.weight.new_ones(frames, frames).tril()

    def means(self, mean: Tensor | None, kept: Kept) -> Tensor | None:
        """Turn frame means ``(*batch, frames, *others, D)`` into running means, or into tokens beside each other."""
        if mean is None:
            return None
        if self.mode in kept:
            tokens = mean.movedim(self.batch, self.batch + kept.index(self.mode)).unsqueeze(self.batch)
            seen = self.visible > 0
            seen = seen.reshape(*seen.shape[:-1], *(seen.shape[-1] if k == self.mode else 1 for k in kept), 1)
            return torch.where(seen, tokens, 0.0)  # what is not seen must not even multiply a zero: it may be NaN
        return self.average(mean, mean.dim() - self.batch - 1)

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

    def average(self, of_frames: Tensor, dims: int) -> Tensor:
        """Average over the frames so far what has a number of further dimensions; zero while there is none."""
        spread = [*self.weight.shape, *(1,) * dims]
        total, weight = self.total, self.weight.reshape(spread)
        sums = (torch.where(weight > 0, of_frames, 0.0) * weight).cumsum(self.batch)
        return sums / torch.where(total > 0, total, 1).reshape(spread)

    def covariance(self, within: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """Second central moment over the frames so far: within frames, and between their means.

        Means are taken relative to the first frame that is present, which every later frame may know; before it there
        is nothing to know.
        """
        first = (self.weight > 0).to(torch.uint8).argmax(-1, keepdim=True).unsqueeze(-1)
        known = (self.total > 0).unsqueeze(-1)
        left, right = (
            torch.where(known, m - m.gather(-2, first.expand(*m.shape[:-2], 1, m.shape[-1])), 0.0)
            for m in (left, right)
        )
        moments = self.average(within + left.unsqueeze(-1) * right.unsqueeze(-2), 2)
        return moments - self.average(left, 1).unsqueeze(-1) * self.average(right, 1).unsqueeze(-2)
