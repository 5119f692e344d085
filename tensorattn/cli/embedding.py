r"""Embedding: queries, keys and values of a recording, by fixed random maps.

Nothing is trained. A recording is cut into patches, one vector of numbers each; every entry of a patch is standardised
over the recording; a random affine map takes it to ``dim`` channels, which are layer-normalised; three independent
random maps then give queries, keys and values of every head. (Layer normalisation of the patch itself would take its
brightness away.)

The scale of the logits is set so that the logits :math:`s\, q \cdot k_j` of a query have a wanted standard deviation
over the keys, in root mean square over queries and heads: what comes close to soft attention need not come close to
sharp attention, so a ranking means nothing without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tensorattn.cli.recordings import RecordingError
from tensorattn.nn.patches import grid_of

__all__ = [
    "Embedding",
    "Tokens",
    "choose_patch",
    "embed",
    "grid_of",
    "logit_scale",
    "make_embedding",
    "patchify",
    "scale_of_moments",
]

CUT_ELEMENTS = 2**22  # elements cut at a time, so that a long recording is never held twice

Array = np.ndarray[Any, Any]


class Tokens(NamedTuple):
    """Queries, keys and values ``(H, g_1, …, g_N, d)`` of a recording, and the scale of their logits."""

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float


def choose_patch(sizes: Sequence[int], max_positions: int) -> tuple[int, ...]:
    """Choose the finest patch of powers of two that leaves few enough positions.

    The mode with the most positions is halved again and again: short modes stay whole.

    Args:
        sizes: Sizes of the modes.
        max_positions: Largest number of patches wanted.

    Returns:
        Sizes of the patch, one a mode.

    Examples:
        >>> choose_patch((30, 240, 320), 600_000), choose_patch((128, 96, 24), 40_000), choose_patch((5,), 100)
        ((1, 2, 2), (4, 2, 1), (1,))
    """
    patch = [1] * len(sizes)
    while math.prod(grid := grid_of(sizes, patch)) > max_positions:
        patch[grid.index(max(grid))] *= 2
    return tuple(patch)


def patchify(array: Array, patch: Sequence[int]) -> Array:
    """Cut an array into patches. Sizes that are not divisible are padded at the end with the last entries.

    Args:
        array: Values ``(n_1, …, n_N, C)``.
        patch: Sizes of a patch, one a mode.

    Returns:
        One vector a patch, ``(g_1, …, g_N, F)`` with ``F`` = channels times elements of a patch.

    Examples:
        >>> patchify(np.arange(5)[:, None], (2,)).tolist()
        [[0, 1], [2, 3], [4, 4]]
        >>> patchify(np.zeros((30, 241, 320, 3)), (1, 2, 2)).shape
        (30, 121, 160, 12)
    """
    sizes, order = array.shape[:-1], len(patch)
    grid = grid_of(sizes, patch)
    missing = [(0, g * p - n) for g, p, n in zip(grid, patch, sizes, strict=True)]
    padded = np.pad(array, [*missing, (0, 0)], mode="edge")
    blocks = padded.reshape(*(part for pair in zip(grid, patch, strict=True) for part in pair), array.shape[-1])
    return blocks.transpose(*range(0, 2 * order, 2), *range(1, 2 * order, 2), 2 * order).reshape(*grid, -1)


def _patches(array: Array, patch: Sequence[int], elements: int = CUT_ELEMENTS) -> Iterator[Tensor]:
    """Cut an array into patches ``(positions, F)`` in float64, some rows of the first mode at a time."""
    rows = grid_of(array.shape[:-1], patch)[0]
    step = max(1, elements * rows // array.size) * patch[0]
    for start in range(0, array.shape[0], step):
        cut = patchify(array[start : start + step], patch)
        yield torch.from_numpy(cut.astype(np.float64, copy=False)).flatten(0, -2)


def embed(array: Array, patch: Sequence[int], *, dim: int, heads: int, logit_std: float, seed: int) -> Tokens:
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
        RecordingError: If every patch is the same.
    """
    cuts, grid = partial(_patches, array, patch), grid_of(array.shape[:-1], patch)
    embedding = make_embedding(cuts, math.prod(grid), dim=dim, seed=seed)
    embedded = torch.cat([embedding(cut) for cut in cuts()])
    query, key, value = (
        (embedded @ each).reshape(*grid, heads, -1).movedim(-2, 0).contiguous() for each in embedding.maps
    )
    return Tokens(query, key, value, logit_scale(query, key, logit_std))


class Embedding(NamedTuple):
    """Random maps of patches ``(positions, F)`` in float64: to channels, and from those to queries, keys and values."""

    centre: Tensor
    spread: Tensor
    weight: Tensor
    bias: Tensor
    maps: Tensor

    def __call__(self, cut: Tensor) -> Tensor:
        """Return the channels ``(positions, dim)`` of patches."""
        features, dim = self.weight.shape
        piece = ((cut - self.centre) / self.spread).float() @ self.weight + self.bias
        return torch.nn.functional.layer_norm(piece / features**0.5, (dim,))


def make_embedding(cuts: Callable[[], Iterator[Tensor]], count: int, *, dim: int, seed: int) -> Embedding:
    """Draw the random maps of a recording, and find what its patches are standardised by.

    Args:
        cuts: Gives all patches, some ``(positions, F)`` at a time; it is called twice.
        count: How many there are.
        dim: Channels, all heads together.
        seed: Seed of the random maps.

    Raises:
        RecordingError: If every patch is the same.
    """
    generator = torch.Generator().manual_seed(seed)
    centre, spread = _feature_statistics(cuts, count)
    features = centre.numel()
    weight, bias = (2 * torch.rand(n, dim, generator=generator) - 1 for n in (features, 1))  # as torch.nn.Linear starts
    return Embedding(centre, spread, weight, bias, torch.randn(3, dim, dim, generator=generator) / dim**0.5)


def _feature_statistics(cuts: Callable[[], Iterator[Tensor]], count: int) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of every entry of a patch, in float64; 1 where an entry never changes."""
    low = high = None
    for cut in cuts():  # what is kept is written in place: small tensors between large ones would keep memory apart
        least, most = cut.aminmax(dim=0)
        if low is None or high is None:
            low, high = least, most
        torch.minimum(low, least, out=low)
        torch.maximum(high, most, out=high)
    assert low is not None and high is not None
    still = low == high
    if bool(still.all()):
        raise RecordingError("every patch is the same to double precision, there is nothing to attend to")
    width = torch.where(still, 1.0, high - low)
    shares = ((cut - low) / width for cut in cuts())  # between 0 and 1: their squares do not cancel
    sums = torch.zeros(2, len(low), dtype=torch.float64)
    for share in shares:
        sums[0] += share.sum(dim=0)
        sums[1] += share.square().sum(dim=0)
    mean, square = sums / count
    return low + width * mean, torch.where(still, 1.0, width * (square - mean**2).sqrt())


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
    return scale_of_moments(covariance, second_moment, logit_std)


def scale_of_moments(covariance: Tensor, second_moment: Tensor, logit_std: float) -> float:
    """Return what `logit_scale` does, from the covariance of keys and the second moment of queries ``(H, d, d)``."""
    variance = float((covariance * second_moment).sum(dim=(-2, -1)).mean())
    if not variance > 0:
        raise RecordingError("all keys are the same, there is nothing to attend to: take another --seed or --dim")
    return float(logit_std / variance**0.5)
