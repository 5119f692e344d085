r"""Running summaries: what a query in one frame may know of the frames up to its own.

Frames are the indices of one mode, time as a rule. The summary of all positions up to frame i is a running sum of the
summaries of the frames, so one pass over the tensor gives all of them: marginal means that do not keep the causal mode
become running means, and those that keep it become one token a frame, absent while it lies ahead. Nothing that is known
at frame i depends on a later frame, whatever the data.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tensorattn.contraction_tree import Family, Kept
from tensorattn.summarizing import Needs, attention_summary
from tensorattn.summary import Summary
from tensorattn.weights import Vector, Vectors

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
    frames = key.shape[batch + mode]
    others = [k for k in range(order) if k != mode]

    def within(family: Family | None) -> Family | None:
        """Kept subsets of a frame: the causal mode left out, the others renumbered."""
        if family is None:
            return None
        renumbered = (tuple(others.index(k) for k in kept if k != mode) for kept in family)
        return tuple(dict.fromkeys(renumbered))

    family = needs.kept if () in needs.kept or not needs.second_moment else (*needs.kept, ())
    inner = within(family)
    assert inner is not None
    moved_key = key.movedim(batch + mode, batch)
    moved_value = moved_key if value is key else value.movedim(batch + mode, batch)
    of_frames = Needs(inner, needs.second_moment, within(needs.keys), within(needs.values))
    per_frame = attention_summary(moved_key, moved_value, of_frames, tuple(_for_frames(weights[k]) for k in others))

    weight = weights[mode]
    like = per_frame._any_mean()[1]
    if weight is None:
        weight = like.new_ones(frames)
    weight = weight.reshape(*(1,) * (batch + 1 - weight.dim()), *weight.shape)
    total = weight.cumsum(-1)  # (*batch, frames)
    safe_total = torch.where(total > 0, total, 1)
    visible = weight.unsqueeze(-2) * torch.ones(frames, frames, dtype=weight.dtype, device=weight.device).tril()

    def through_time(mean: Tensor | None, kept: Kept) -> Tensor | None:
        """Turn frame means ``(*batch, frames, *others, D)`` into running means, or into tokens beside each other."""
        if mean is None:
            return None
        if mode in kept:
            tokens = mean.movedim(batch, batch + kept.index(mode)).unsqueeze(batch)
            past = torch.ones(frames, frames, dtype=torch.bool, device=mean.device).tril()
            past = past.reshape(frames, *(frames if k == mode else 1 for k in kept), 1)
            return torch.where(past, tokens, 0.0)  # a later frame must not even multiply a zero: it may hold NaN
        spread = (1,) * (mean.dim() - batch - 1)
        sums = (mean * weight.reshape(*weight.shape, *spread)).cumsum(batch)
        return sums / safe_total.reshape(*safe_total.shape, *spread)

    keys, values, counts = [], [], []
    for kept in family:
        place = inner.index(tuple(others.index(k) for k in kept if k != mode))
        keys.append(through_time(per_frame.keys[place], kept))
        values.append(through_time(per_frame.values[place], kept))
        count = per_frame.weights[place]
        if count is None:
            inside = [key.shape[batch + k] for k in kept if k != mode]
            outside = math.prod([key.shape[batch + k] for k in others]) // math.prod(inside)
            count = like.new_full([1] * (batch + 1) + inside, outside)
        if mode in kept:
            dim = batch + 1 + kept.index(mode)
            counts.append(
                count.unsqueeze(dim) * visible.reshape(*visible.shape[:-1], *(frames if k == mode else 1 for k in kept))
            )
        else:
            counts.append(count * total.reshape(*total.shape, *(1 for _ in kept)))

    mode_weights: list[Vector] = []
    for k, own in enumerate(weights):
        if k == mode:
            mode_weights.append(visible)
        else:
            spread = None if own is None else own.reshape(*(1,) * (batch + 1 - own.dim()), *own.shape)
            mode_weights.append(None if spread is None else spread.unsqueeze(-2))
    covariance = key_covariance = None
    if per_frame.covariance is not None and per_frame.key_covariance is not None:
        mean_key, mean_value = per_frame.key(()), per_frame.value(())
        covariance = _running_covariance(per_frame.covariance, mean_value, mean_key, weight, safe_total)
        key_covariance = _running_covariance(per_frame.key_covariance, mean_key, mean_key, weight, safe_total)
    sizes = tuple(key.shape[batch:-1])
    return Summary(
        sizes, family, tuple(keys), tuple(values), tuple(counts), tuple(mode_weights), covariance, key_covariance
    )


def _for_frames(weight: Vector) -> Vector:
    """Let weights with batch dimensions be the same for all frames."""
    return weight if weight is None or weight.dim() == 1 else weight.unsqueeze(-2)


def _running_covariance(within: Tensor, left: Tensor, right: Tensor, weight: Tensor, total: Tensor) -> Tensor:
    """Second central moment of all frames so far: within frames, and between their means.

    Means are taken relative to the first frame that is present, which every later frame may know.
    """
    first = (weight > 0).to(torch.uint8).argmax(-1, keepdim=True)

    def shifted(mean: Tensor) -> Tensor:
        index = first.unsqueeze(-1).expand(*mean.shape[:-2], 1, mean.shape[-1])
        return mean - mean.gather(-2, index)

    left, right = shifted(left), shifted(right)
    moments = within + left.unsqueeze(-1) * right.unsqueeze(-2)
    sums = (moments * weight[..., None, None]).cumsum(-3) / total[..., None, None]
    mean_left = (left * weight.unsqueeze(-1)).cumsum(-2) / total.unsqueeze(-1)
    mean_right = (right * weight.unsqueeze(-1)).cumsum(-2) / total.unsqueeze(-1)
    return sums - mean_left.unsqueeze(-1) * mean_right.unsqueeze(-2)
