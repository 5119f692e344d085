"""Plain layers: what one would write in a few lines of PyTorch in place of `TensorAttention`, with its parameters.

They are what the library is measured against. Means are taken in two steps, attention is one call of the fused kernel a
mode, maps are `torch.nn.Linear`; there are no masks, no options and no checks.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorattn.nn import TensorAttention

__all__ = ["PLAIN", "PlainLayer", "PooledLayer"]

Split = Callable[[Tensor], Tensor]  # (B, *, C) to (B, H, *, D)


class PlainLayer(nn.Module):
    """The layer of an operator with its default options.

    Args:
        layer: The layer that it is the plain form of; its parameters are shared.
    """

    def __init__(self, layer: TensorAttention) -> None:
        super().__init__()
        self.layer, self.attend = layer, PLAIN[layer.operator]

    def forward(self, x: Tensor) -> Tensor:
        """Attend."""
        x = x.movedim(1, -1) if self.layer.channels_first else x
        y = self.attend(self, x)
        return y.movedim(-1, 1) if self.layer.channels_first else y

    def heads(self, projection: nn.Module, x: Tensor) -> Tensor:
        """Project, and split heads: ``(B, *, C)`` to ``(B, H, *, D)``."""
        return projection(x).unflatten(-1, (self.layer.num_heads, -1)).movedim(-2, 1)

    def queries(self, x: Tensor) -> Tensor:
        """Queries of all positions, ``(B, H, P, D)``."""
        return self.heads(self.layer.q_proj, x.flatten(1, -2))

    def tokens(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values."""
        return self.heads(self.layer.k_proj, x), self.heads(self.layer.v_proj, x)

    def joined(self, output: Tensor, x: Tensor) -> Tensor:
        """Join the heads of ``(B, H, P, D)``, project back, and give the positions their modes back."""
        return self.layer.out_proj(output.movedim(1, -2).flatten(-2)).view_as(x)


def averages(x: Tensor) -> list[Tensor]:
    """Average over all modes but one, for every mode: the first by itself, the others from the mean over it."""
    if x.dim() == 3:
        return [x]
    return [x.mean(tuple(range(2, x.dim() - 1))), *averages(x.mean(1))]


def beside(x: Tensor, parts: Sequence[Tensor]) -> list[Tensor]:
    """View one tensor ``(B, n_m, C)`` a mode beside all other modes of ``x``."""
    order = x.dim() - 2
    return [part.unflatten(1, [-1 if k == mode else 1 for k in range(order)]) for mode, part in enumerate(parts)]


def kao_kv(layer: PlainLayer, x: Tensor) -> Tensor:
    """Attention from all positions to all averages."""
    key, value = layer.tokens(torch.cat(averages(x), 1))
    return layer.joined(F.scaled_dot_product_attention(layer.queries(x), key, value), x)


def kao_qkv(layer: PlainLayer, x: Tensor) -> Tensor:
    """Attention among the averages, and an outer sum."""
    tokens, project = torch.cat(averages(x), 1), layer.layer.out_proj
    key, value = layer.tokens(tokens)
    output = F.scaled_dot_product_attention(layer.heads(layer.layer.q_proj, tokens), key, value)
    first, *others = F.linear(output.movedim(1, -2).flatten(-2), project.weight).split(x.shape[1:-1], 1)
    return functools.reduce(torch.add, beside(x, [first + project.bias, *others]))


def counted(layer: PlainLayer, x: Tensor, means: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """Attention to sets of means, each counted; the last set is the grand mean alone."""
    query, sizes = layer.queries(x), [mean.shape[1] for mean in means]
    key, value = (part.split(sizes, 2) for part in layer.tokens(torch.cat(list(means), 1)))
    output = counts[-1] * value[-1]
    for k, v, count in zip(key[:-1], value[:-1], counts[:-1], strict=True):
        output = torch.add(output, F.scaled_dot_product_attention(query, k, v), alpha=count)
    return layer.joined(output.expand_as(query), x)


def additive(layer: PlainLayer, x: Tensor) -> Tensor:
    """Attention to the averages of each mode, less all but one of the grand means."""
    means = averages(x)
    return counted(layer, x, [*means, means[0].mean(1, keepdim=True)], [*(1 for _ in means), 1 - len(means)])


def truncated(layer: PlainLayer, x: Tensor) -> Tensor:
    """The same with pairs of modes: inclusion and exclusion."""
    order = x.dim() - 2
    if order < 3:
        return flattened(layer, x)
    pairs, singles = (list(itertools.combinations(range(order), size)) for size in (2, 1))
    means = [x.mean([1 + k for k in range(order) if k not in kept]).flatten(1, -2) for kept in (*pairs, *singles)]
    grand = means[-1].mean(1, keepdim=True)
    counts = [*(1 for _ in pairs), *(2 - order for _ in singles), 1 - math.comb(order, 2) - order * (2 - order)]
    return counted(layer, x, [*means, grand], counts)


def flattened(layer: PlainLayer, x: Tensor) -> Tensor:
    """Attention among all positions."""
    return layer.joined(F.scaled_dot_product_attention(layer.queries(x), *layer.tokens(x.flatten(1, -2))), x)


def axial(layer: PlainLayer, x: Tensor) -> Tensor:
    """Attention along each mode with all others as batch, and the mean over modes."""
    parts = [layer.heads(layer.layer.q_proj, x), *layer.tokens(x)]
    outputs = []
    for mode in range(2, x.dim()):
        moved = [part.movedim(mode, -2) for part in parts]
        query, key, value = (part.flatten(1, -3) for part in moved)
        output = F.scaled_dot_product_attention(query, key, value)
        outputs.append(output.view(moved[0].shape).movedim(-2, mode))
    return layer.joined((functools.reduce(torch.add, outputs) / len(outputs)).flatten(2, -2), x)


def along_modes(layer: PlainLayer, x: Tensor) -> tuple[Tensor, list[Callable[[Tensor], Tensor]]]:
    """Values, and for each mode the product with its attention matrix."""

    def product(mode: int, weights: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda value: (
            (weights @ value.movedim(mode, 2).flatten(3)).view(value.movedim(mode, 2).shape).movedim(2, mode)
        )

    maps = []
    for mode, mean in enumerate(averages(x)):
        query, key = (layer.heads(projection, mean) for projection in (layer.layer.q_proj, layer.layer.k_proj))
        maps.append(product(2 + mode, torch.softmax(query @ key.mT * query.shape[-1] ** -0.5, -1)))
    return layer.heads(layer.layer.v_proj, x), maps


def kronecker_product(layer: PlainLayer, x: Tensor) -> Tensor:
    """One attention matrix a mode, one after the other."""
    value, maps = along_modes(layer, x)
    for product in maps:
        value = product(value)
    return layer.joined(value.flatten(2, -2), x)


def kronecker_sum(layer: PlainLayer, x: Tensor) -> Tensor:
    """One attention matrix a mode, added up."""
    value, maps = along_modes(layer, x)
    return layer.joined(functools.reduce(torch.add, [product(value) for product in maps]).flatten(2, -2), x)


PLAIN: Mapping[str, Callable[[PlainLayer, Tensor], Tensor]] = {
    each.__name__: each
    for each in (additive, truncated, kao_kv, kao_qkv, kronecker_product, kronecker_sum, axial, flattened)
}


class PooledLayer(PlainLayer):
    """Attention to the means of blocks of the grid, at most as many as there are mode averages; up to three modes."""

    def forward(self, x: Tensor) -> Tensor:
        """Attend."""
        x = x.movedim(1, -1) if self.layer.channels_first else x
        query = self.queries(x)
        y = self.joined(F.scaled_dot_product_attention(query, *self.tokens(self.pooled(x).flatten(1, -2))), x)
        return y.movedim(-1, 1) if self.layer.channels_first else y

    @staticmethod
    def pooled(x: Tensor) -> Tensor:
        """Means of blocks, ``(B, m_1, …, m_N, C)``."""
        sizes, edge = x.shape[1:-1], 1
        while math.prod(math.ceil(size / edge) for size in sizes) > sum(sizes):
            edge += 1
        pool = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[len(sizes)]
        return pool(x.movedim(-1, 1), [min(edge, size) for size in sizes], ceil_mode=True).movedim(1, -1)
