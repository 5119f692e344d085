r"""Embedding: queries, keys and values of a recording, by fixed random maps.

Nothing is trained. Every patch is a vector of numbers; every one of its entries is standardised over the recording;
a random affine map takes it to ``dim`` channels, which are layer-normalised; three independent random maps then give
queries, keys and values of every head. (Layer normalisation of the patch itself would take its brightness away.)

The scale of the logits is set so that the logits :math:`s\, q \cdot k_j` of a query have a wanted standard deviation
over the keys, in root mean square over queries and heads: what comes close to soft attention need not come close to
sharp attention, so a ranking means nothing without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tensorattn.attend.patches import patch_rows
from tensorattn.attend.readers import RecordingError
from tensorattn.errors import OptionError
from tensorattn.patching import grid_of

__all__ = ["Tokens", "embed", "logit_scale"]


class Tokens(NamedTuple):
    """Queries, keys and values ``(H, g_1, …, g_N, d)`` of a recording, and the scale of their logits."""

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float


def embed(
    array: np.ndarray[Any, Any],
    patch: Sequence[int],
    *,
    dim: int,
    heads: int,
    logit_std: float,
    seed: int,
) -> Tokens:
    """Turn a recording into queries, keys and values.

    Args:
        array: Values ``(n_1, …, n_N, C)``, finite.
        patch: Sizes of a patch, one a mode.
        dim: Channels, all heads together.
        heads: Number of heads; it divides ``dim``.
        logit_std: Standard deviation that the logits of a query get over the keys.
        seed: Seed of the random maps.

    Returns:
        Queries, keys, values and scale.

    Raises:
        OptionError: If ``heads`` does not divide ``dim``.
        RecordingError: If the recording is constant.

    Examples:
        >>> tokens = embed(np.arange(24.0).reshape(4, 6, 1), (1, 2), dim=8, heads=2, logit_std=1.0, seed=0)
        >>> tokens.query.shape
        torch.Size([2, 4, 3, 4])
    """
    if dim % heads:
        raise OptionError(f"--heads must divide --dim, but {heads} heads do not divide {dim} channels.")
    generator = torch.Generator().manual_seed(seed)
    centre, spread = _feature_statistics(array, patch)
    features, grid = centre.numel(), grid_of(array.shape[:-1], patch)
    weight, bias = (2 * torch.rand(n, dim, generator=generator) - 1 for n in (features, 1))  # as torch.nn.Linear starts
    embedded = torch.empty(*grid, dim)
    for rows, cut in patch_rows(array, patch):
        standard = ((torch.from_numpy(cut) - centre) / spread).float()
        embedded[rows] = torch.nn.functional.layer_norm((standard @ weight + bias) / features**0.5, (dim,))
    maps = [torch.randn(dim, dim, generator=generator) / dim**0.5 for _ in range(3)]
    query, key, value = (_split_heads(embedded @ each, heads) for each in maps)
    return Tokens(query, key, value, logit_scale(query, key, logit_std))


def _feature_statistics(array: np.ndarray[Any, Any], patch: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of every entry of a patch, in float64; 1 where an entry never changes."""
    _, first = next(patch_rows(array, patch))
    shift = torch.from_numpy(first).flatten(0, -2).mean(dim=0)  # near the mean, so that squares do not cancel
    count, total, squares = 0, torch.zeros_like(shift), torch.zeros_like(shift)
    for _, cut in patch_rows(array, patch):
        moved = torch.from_numpy(cut).flatten(0, -2) - shift
        count, total, squares = count + len(moved), total + moved.sum(dim=0), squares + moved.square().sum(dim=0)
    mean = total / count
    variance = (squares / count - mean**2).clamp(min=0)
    still = variance <= 1e-20 * (squares / count + (shift + mean) ** 2)
    if bool(still.all()):
        raise RecordingError("the recording is constant: every patch is the same, there is nothing to attend to")
    return shift + mean, torch.where(still, 1.0, variance.sqrt())


def _split_heads(tokens: Tensor, heads: int) -> Tensor:
    """Return ``(H, *grid, d)`` from ``(*grid, H d)``, contiguous."""
    return tokens.unflatten(-1, (heads, -1)).movedim(-2, 0).contiguous()


def logit_scale(query: Tensor, key: Tensor, logit_std: float) -> float:
    r"""Return the scale at which logits have a given standard deviation over the keys.

    The variance of :math:`q \cdot k_j` over j is :math:`q^\top \mathrm{Cov}(k)\, q`, so no logit is computed. The part
    of a logit that all keys of a query share does not count: softmax does not see it.

    Args:
        query: Queries ``(H, *positions, d)``.
        key: Keys ``(H, *positions, d)``.
        logit_std: Root mean square, over queries and heads, of the wanted standard deviation.

    Raises:
        RecordingError: If the logits of no query vary.

    Examples:
        >>> q, k = torch.randn(2, 50, 8), torch.randn(2, 60, 8)
        >>> logits = logit_scale(q, k, 1.5) * q @ k.mT
        >>> round(float(logits.var(dim=-1, correction=0).mean() ** 0.5), 4)
        1.5
    """
    queries, keys = query.flatten(1, -2), key.flatten(1, -2)
    mean = keys.mean(dim=1).double()
    covariance = (keys.mT @ keys / keys.shape[1]).double() - mean[:, :, None] * mean[:, None, :]
    second_moment = (queries.mT @ queries / queries.shape[1]).double()
    variance = float((covariance * second_moment).sum(dim=(-2, -1)).mean())
    if not variance > 0:
        raise RecordingError("all keys are the same, there is nothing to attend to: take another --seed or --dim")
    return float(logit_std / variance**0.5)
