"""What a layer makes queries, keys and values of, and by which maps: of its input, or of what is projected already.

Averages of a linear map are the linear map of the averages, so the maps are called with averages wherever the operator
works on them. Where positions are projected first, the maps that are left change nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tensorattn.functional.parts import means_of_parts, summary_of_parts
from tensorattn.functional.summary import Means, Needs, Summary
from tensorattn.masks import Weights, matmul
from tensorattn.modes import Family
from tensorattn.nn.parameters import parameter_of

__all__ = ["Sources", "join_heads", "normed", "split_heads", "unchanged"]

Map = Callable[[Tensor], Tensor]
Norm = Callable[[Tensor], Tensor] | None


def unchanged(tensor: Tensor) -> Tensor:
    """Return what was given: the map of what is projected already."""
    return tensor


def split_heads(tensor: Tensor, heads: int, batch: int) -> Tensor:
    """Split channels into heads, the last batch dimension: ``(*batch, *, H D)`` to ``(*batch, H, *, D)``."""
    return tensor.unflatten(-1, (heads, -1)).movedim(-2, batch)


def join_heads(tensor: Tensor, batch: int) -> Tensor:
    """Join heads into channels: ``(*batch, H, *, D)`` to ``(*batch, *, H D)``."""
    return tensor.movedim(batch, -2).flatten(-2)


def normed(norm: Norm, tensor: Tensor) -> Tensor:
    """Call a norm in the type of its parameters, and return the type that was given; nothing is done without one."""
    if norm is None:
        return tensor
    parameter = parameter_of(norm) if isinstance(norm, nn.Module) else None
    return norm(tensor if parameter is None else tensor.to(parameter.dtype)).to(tensor.dtype)


@dataclass(frozen=True, eq=False)
class Sources:
    """What queries, keys and values are made of.

    Attributes:
        tensors: What each of the three is made of, channels last; one tensor three times, as a rule.
        maps: The linear maps to queries, keys and values.
        norms: What is called with queries and with keys of each head; None for nothing.
        heads: Number of heads of the queries, and of keys and values.
        by_mode: Whether queries and keys have one map a mode, below each other.
        grouped: Whether keys and values keep fewer heads than the queries; else each is repeated for its group.
    """

    tensors: tuple[Tensor, Tensor, Tensor]
    maps: tuple[Map, Map, Map]
    norms: tuple[Norm, Norm] = (None, None)
    heads: tuple[int, int] = (1, 1)
    by_mode: bool = False
    grouped: bool = False

    def each(self, function: Map) -> Sources:
        """Return them with a function applied to what they are made of."""
        query, key, value = self.tensors
        changed = function(query)
        key, value = (changed if other is query else function(other) for other in (key, value))
        return dataclasses.replace(self, tensors=(changed, key, value))

    def query(self, rows: Tensor, batch: int) -> Tensor:
        """Make queries of each position ``(*batch, H, *, D)``."""
        return normed(self.norms[0], split_heads(self.maps[0](rows), self.heads[0], batch))

    def key_and_value(self, of_keys: Tensor, of_values: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        """Make a key and a value of each position ``(*batch, H, *, D)``."""
        key = normed(self.norms[1], split_heads(self.maps[1](of_keys), self.heads[1], batch))
        return self._repeated(key, batch), self.value(of_values, batch)

    def value(self, of_values: Tensor, batch: int) -> Tensor:
        """Make a value of each position ``(*batch, H, *, D)``."""
        return self._repeated(split_heads(self.maps[2](of_values), self.heads[1], batch), batch)

    def summarise(self, needs: Needs, weights: Weights) -> Summary:
        """Summarise what keys and values are made of: of all parts, where it is one."""
        return summary_of_parts(self.tensors[1], self.tensors[2], needs, weights)

    def project(self, summary: Summary) -> Summary:
        """Call the maps with a summary; return that of keys and values, with heads as last batch dimension."""
        _, to_keys, to_values = self.maps
        if to_keys is not unchanged:
            summary = summary.in_type(self.tensors[0].dtype)
        heads = self.heads[1]
        if self.by_mode:
            keys = self._project_modes(summary.key_means, to_keys, heads)
        else:
            keys = summary.key_means.project(to_keys, heads)
        keys = keys if self.norms[1] is None else keys.map(lambda rows: normed(self.norms[1], rows))
        keys, values = (
            means.map(lambda rows: self._repeated(rows, -3))
            for means in (keys, summary.value_means.project(to_values, heads))
        )
        found = dataclasses.replace(summary.with_heads(), key_means=keys, value_means=values)
        if summary.covariance is None or summary.key_covariance is None:
            return found
        dims, dtype = summary.covariance.shape[-2:], self.tensors[0].dtype
        of_values, of_keys = (
            self._linear_part(to, dim, summary.covariance, dtype)
            for to, dim in zip((to_values, to_keys), dims, strict=True)
        )
        moments = []
        for moment, left in ((summary.covariance, of_values), (summary.key_covariance, of_keys)):
            of_left = matmul(left.mT.to(moment.dtype), moment.unsqueeze(-3))
            moments.append(self._repeated(matmul(of_left, of_keys.to(moment.dtype)), -3))
        return dataclasses.replace(found, covariance=moments[0], key_covariance=moments[1])

    def project_queries(self, summary: Summary, family: Family, weights: Weights) -> Means:
        """Average what queries are made of, and call their map with the averages."""
        source = self.tensors[0]
        means = _means_of(source, summary if source is self.tensors[1] else None, family, weights)
        means = means.map(lambda rows: rows.to(source.dtype)) if self.maps[0] is not unchanged else means
        if self.by_mode:
            found = self._project_modes(means, self.maps[0], self.heads[0])
        else:
            found = means.project(self.maps[0], self.heads[0])
        return found if self.norms[0] is None else found.map(lambda rows: normed(self.norms[0], rows))

    def _project_modes(self, means: Means, linear: Map, heads: int) -> Means:
        """Call a map that has one map a mode, below each other, and take from it what is of the mode."""
        mapped = means.project(linear, None)
        width = mapped.blocks[0][1].shape[-1] // len(means.sizes)
        found = {kept: mapped.get(kept)[..., kept[0] * width : (kept[0] + 1) * width] for kept in means.family}
        return Means.of(means.sizes, {kept: split_heads(part, heads, 1) for kept, part in found.items()}, 2)

    def _linear_part(self, linear: Map, channels: int, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the matrix of each head of an affine map ``(H, C, D)`` by calling it: f(I) − f(0)."""
        mapped = linear(torch.eye(channels + 1, channels, dtype=dtype, device=like.device))
        return (mapped[:-1] - mapped[-1:]).unflatten(-1, (self.heads[1], -1)).transpose(0, 1)

    def _repeated(self, tensor: Tensor, dim: int) -> Tensor:
        """Repeat what belongs to a head of keys for each head of its group of queries."""
        group = 1 if self.grouped else self.heads[0] // self.heads[1]
        return tensor if group == 1 else tensor.repeat_interleave(group, dim)


def _means_of(x: Tensor, summary: Summary | None, family: Sequence[tuple[int, ...]], weights: Weights) -> Means:
    """Return the means of what queries are made of: those that a summary of it holds, and the tensor itself."""
    batch, order = x.dim() - weights.order - 1, weights.order
    small = tuple([kept for kept in family if len(kept) < order or order == 1])
    if summary is not None and order > 1 and all([kept in summary.key_means.family for kept in small]):
        blocks: list[Any] = [(small, summary.key_means.joined(small))]
        if len(small) < len(family):
            blocks.append(((tuple(range(order)),), x.flatten(batch, -2)))
        return Means(summary.sizes, tuple(blocks))
    found = dict(zip(family, means_of_parts(x, tuple(family), weights), strict=True))
    return Means.of(x.shape[batch:-1] if weights.part is None else weights.part.sizes, found, batch)
