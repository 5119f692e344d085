"""What a query in one frame may know of the frames up to its own, under weights of every kind.

Weights of positions that are no product over modes differ from frame to frame. A running mean is then the running sum
of the frames' means times the positions behind them, over the running count of those.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tensorattn.contraction_tree import Kept
from tensorattn.running import Time, running_family, running_summary, within_frames
from tensorattn.summarizing import Needs, attention_summary
from tensorattn.summary import Summary
from tensorattn.weights import GridWeights, Weights

__all__ = ["causal_summary"]


def causal_summary(key: Tensor, value: Tensor, needs: Needs, weights: Weights, mode: int) -> Summary:
    """Summarise keys and values up to each frame, unchecked.

    Args:
        key: Keys over the grid ``(*batch, n_1, …, n_N, D)``.
        value: Values over the grid.
        needs: What is wanted.
        weights: Checked weights.
        mode: The causal mode, whose indices are the frames.

    Returns:
        A summary with the frames as last batch dimension: ``(*batch, n_mode)``.
    """
    if not isinstance(weights, GridWeights):
        return running_summary(key, value, needs, weights, mode)
    order, batch = weights.order, key.dim() - weights.order - 1
    others = [k for k in range(order) if k != mode]
    family = running_family(needs)
    of_keys, of_values = (None if side is None else within_frames(side, others) for side in (needs.keys, needs.values))
    of_frames = Needs(within_frames(family, others), needs.second_moment, of_keys, of_values)
    frames = key.movedim(batch + mode, batch)
    values = frames if value is key else value.movedim(batch + mode, batch)
    own = GridWeights(weights.tensor.movedim(batch + mode, batch), order - 1, weights.binary)
    per_frame = attention_summary(frames, values, of_frames, own)
    time = Time.of(key, None, mode, batch, None, None)
    keys, means, counts = [], [], []
    for kept in family:
        place = per_frame.place(within_frames((kept,), others)[0])
        count = per_frame.weights[place]
        assert count is not None
        keys.append(_running(per_frame.keys[place], count, kept, time))
        same = per_frame.values[place] is per_frame.keys[place]
        means.append(keys[-1] if same else _running(per_frame.values[place], count, kept, time))
        column = count.unsqueeze(-1)
        counts.append(time.tokens(column, None, kept).squeeze(-1) if mode in kept else count.cumsum(batch))
    covariance = key_covariance = None
    if per_frame.covariance is not None and per_frame.key_covariance is not None:
        place = per_frame.place(())
        behind = per_frame.weights[place]
        assert behind is not None
        mean_key, mean_value = per_frame.key(()), per_frame.value(())
        weighed = Time.of(key, behind.to(mean_key.dtype), mode, batch, None, None)
        key_covariance = weighed.covariance(per_frame.key_covariance, mean_key, mean_key, None, place)
        covariance = key_covariance
        if value is not key:
            covariance = weighed.covariance(per_frame.covariance, mean_value, mean_key, None, place)
    sizes = tuple(key.shape[batch:-1])
    return Summary(sizes, family, tuple(keys), tuple(means), tuple(counts), None, covariance, key_covariance)


def _running(mean: Tensor | None, count: Tensor, kept: Kept, time: Time) -> Tensor | None:
    """Turn frame means into running means, or into tokens beside each other where they keep the causal mode."""
    if mean is None:
        return None
    if time.mode in kept:
        return time.tokens(mean, None, kept)
    sums = (mean * count.to(mean.dtype).unsqueeze(-1)).cumsum(time.batch)
    total = count.cumsum(time.batch).to(mean.dtype).unsqueeze(-1)
    return sums / torch.where(total > 0, total, 1)
