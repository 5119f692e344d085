"""Every operator by its definition: whole means, one softmax after the other, in a few lines of float64.

Slow, plain, and differentiable. Outputs are computed at some positions only, which any size of tensor allows. What is
timed is compared with this first, outputs and gradients.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tensorattn.contraction_tree import Kept, main_effects
from tensorattn.truncation import counting_numbers, kept_family

__all__ = ["PLAIN", "Maps", "attend_fibre", "plain_layer"]


class Maps(NamedTuple):
    """Linear maps to queries, keys and values, and how heads meet.

    Attributes:
        query: Weight and bias of the map to queries; likewise the others.
        key: To keys.
        value: To values.
        heads: Number of heads.
        scale: Factor of the logits.
    """

    query: tuple[Tensor, Tensor | None]
    key: tuple[Tensor, Tensor | None]
    value: tuple[Tensor, Tensor | None]
    heads: int
    scale: float

    def split(self, x: Tensor, pair: tuple[Tensor, Tensor | None]) -> Tensor:
        """Map channels, and split them into heads: ``(B, *, C)`` to ``(B, H, *, D)``."""
        return F.linear(x, *pair).unflatten(-1, (self.heads, -1)).movedim(-2, 1)


class Looked(NamedTuple):
    """What an operator looks at.

    Attributes:
        x: Input ``(B, n_1, …, n_N, C)``.
        maps: Linear maps.
        positions: Indices of the positions where the output is wanted, ``(L, N)``.
        options: Options of the operator.
    """

    x: Tensor
    maps: Maps
    positions: Tensor
    options: Mapping[str, Any]

    @property
    def order(self) -> int:
        """Number of modes."""
        return self.x.dim() - 2

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes of the modes."""
        return tuple(self.x.shape[1:-1])

    def at(self, tensor: Tensor, start: int) -> Tensor:
        """Take a tensor at the positions; its modes start at a dimension: ``(…, L, …)``."""
        return tensor.flatten(start, start + self.order - 1).index_select(start, self.places)

    @property
    def places(self) -> Tensor:
        """The positions as numbers, ``(L,)``."""
        strides = [math.prod(self.sizes[mode + 1 :]) for mode in range(self.order)]
        return (self.positions * torch.tensor(strides)).sum(-1)

    def mean(self, kept: Kept) -> Tensor:
        """Mean over all modes but some, as tokens ``(B, n_U, C)``."""
        gone = [1 + mode for mode in range(self.order) if mode not in kept]
        return (self.x.mean(gone) if gone else self.x).reshape(self.x.shape[0], -1, self.x.shape[-1])

    def query(self) -> Tensor:
        """Queries at the positions, ``(B, H, L, D)``."""
        return self.maps.split(self.at(self.x, 1), self.maps.query)

    def tokens(self, kept: Kept) -> tuple[Tensor, Tensor]:
        """Keys and values of the means, ``(B, H, n_U, D)``."""
        mean = self.mean(kept)
        return self.maps.split(mean, self.maps.key), self.maps.split(mean, self.maps.value)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Softmax attention, and its log-sum-exp."""
        logits = self.maps.scale * query @ key.mT
        return torch.softmax(logits, -1) @ value, torch.logsumexp(logits, -1, keepdim=True)


def _counted(looked: Looked, query: Tensor, counts: Mapping[Kept, int]) -> Tensor:
    """One softmax a kept subset, each counted; with the correction and the own token where asked for."""
    output, lse = torch.zeros_like(query), torch.zeros_like(query[..., :1])
    for kept, count in counts.items():
        key, value = looked.tokens(kept)
        part, term = looked.attend(query, key, value)
        positions = math.prod(looked.sizes) / key.shape[-2]
        output, lse = output + count * part, lse + count * (term + math.log(positions))
    if looked.options["interaction"] is not None:
        term, tau = _correction(looked, [(query, counts)])
        output, lse = output + term, lse + tau / 2
    if looked.options.get("include_self"):
        own = looked.at(looked.x, 1)
        key, value = looked.maps.split(own, looked.maps.key), looked.maps.split(own, looked.maps.value)
        share = torch.sigmoid(looked.maps.scale * (query * key).sum(-1, keepdim=True) - lse)
        output = (1 - share) * output + share * value
    return output


def _correction(looked: Looked, sides: Sequence[tuple[Tensor, Mapping[Kept, int]]]) -> tuple[Tensor, Tensor]:
    """First order of what means do not see, for a sum of queries that see different means; and the variance of it."""
    term, tau = torch.zeros(()), torch.zeros(())
    for query, counts in sides:
        cross, square = (_missing_covariance(looked, counts, of_keys) for of_keys in (False, True))
        term = term + looked.maps.scale * query @ cross.mT
        tau = tau + looked.maps.scale**2 * ((query @ square) * query).sum(-1, keepdim=True)
    tau, saturation = tau.clamp_min(0), looked.options["saturation"]
    bound = 1 if saturation is None else (1 + tau / saturation**2).sqrt()
    return looked.options["gain"][:, None, None] * term / bound, tau


def _missing_covariance(looked: Looked, counts: Mapping[Kept, int], of_keys: bool) -> Tensor:
    """Covariance of all positions less that of the means, each counted."""

    def covariance(kept: Kept) -> Tensor:
        key, value = looked.tokens(kept)
        left = key if of_keys else value
        return (left - left.mean(-2, keepdim=True)).mT @ (key - key.mean(-2, keepdim=True)) / key.shape[-2]

    among = [count * covariance(kept) for kept, count in counts.items() if count]
    return functools.reduce(torch.sub, among, covariance(tuple(range(looked.order))))


def _additive(looked: Looked) -> Tensor:
    return _counted(looked, looked.query(), counting_numbers(main_effects(looked.order)))


def _truncated(looked: Looked) -> Tensor:
    family = kept_family(looked.order, looked.options["kept"], looked.options["interaction_order"])
    return _counted(looked, looked.query(), counting_numbers(family))


def _joint(looked: Looked, query: Tensor) -> Tensor:
    keys, values = zip(*(looked.tokens(kept) for kept in main_effects(looked.order)), strict=True)
    return looked.attend(query, torch.cat(keys, -2), torch.cat(values, -2))[0]


def _kao_kv(looked: Looked) -> Tensor:
    return _joint(looked, looked.query())


def _kao_qkv(looked: Looked) -> Tensor:
    attend = functools.partial(_joint, looked)
    if looked.options["centered"]:
        counts = counting_numbers(main_effects(looked.order))
        attend = functools.partial(_counted, looked._replace(options={"interaction": None}), counts=counts)
    modes = main_effects(looked.order)
    means = [looked.maps.split(looked.mean(kept), looked.maps.query) for kept in modes]
    parts = [attend(mean.index_select(-2, looked.positions[:, mode])) for mode, mean in enumerate(means)]
    total = functools.reduce(torch.add, parts)
    if not looked.options["centered"]:
        return total
    grand = looked.maps.split(looked.mean(()), looked.maps.query)
    total = total - (looked.order - 1) * attend(grand)
    if looked.options["interaction"] is None:
        return total
    seen = [mean.index_select(-2, looked.positions[:, mode]) for mode, mean in enumerate(means)]
    additive = functools.reduce(torch.add, seen) - (looked.order - 1) * grand
    sides = [(looked.query() - additive, {}), (additive, counting_numbers(modes))]
    return total + _correction(looked, sides)[0]


def _matrix_rows(looked: Looked, mode: int) -> Tensor:
    """Rows of the attention matrix of a mode, one for each position, ``(B, H, L, n)``."""
    mean = looked.mean((mode,))
    pooled = [looked.maps.split(mean, pair) for pair in (looked.maps.query, looked.maps.key)]
    if looked.options["pool"] == "sum":
        pooled = [part * (math.prod(looked.sizes) // looked.sizes[mode]) for part in pooled]
    logits = looked.maps.scale * pooled[0].index_select(-2, looked.positions[:, mode]) @ pooled[1].mT
    return torch.softmax(logits, -1)


def _kronecker_product(looked: Looked) -> Tensor:
    value = looked.maps.split(looked.x, looked.maps.value)
    rows = [_matrix_rows(looked, mode) for mode in range(looked.order)]
    outputs = []
    for place in range(len(looked.positions)):
        left = value
        for row in rows:  # the first mode that is left is contracted
            weight = row[:, :, place]
            left = (left * weight.reshape(*weight.shape, *(1,) * (left.dim() - 3))).sum(2)
        outputs.append(left)
    return torch.stack(outputs, -2)


def _fibre(looked: Looked, mode: int) -> Tensor:
    """Input along the fibre of a mode through each position, ``(B, L, n, C)``."""
    fibres = []
    for position in looked.positions:
        place = tuple(slice(None) if k == mode else int(i) for k, i in enumerate(position))
        fibres.append(looked.x[(slice(None), *place)])
    return torch.stack(fibres, 1)


def _kronecker_sum(looked: Looked) -> Tensor:
    total = []
    for mode in range(looked.order):
        value = looked.maps.split(_fibre(looked, mode), looked.maps.value)
        total.append((_matrix_rows(looked, mode).unsqueeze(-2) @ value).squeeze(-2))
    return functools.reduce(torch.add, total)


def attend_fibre(looked: Looked, mode: int) -> Tensor:
    """Attend from each position along its fibre of one mode.

    Args:
        looked: Input, maps and positions.
        mode: The mode.

    Returns:
        Output of each head, ``(B, H, L, D)``.
    """
    fibre = _fibre(looked, mode)
    key, value = looked.maps.split(fibre, looked.maps.key), looked.maps.split(fibre, looked.maps.value)
    return looked.attend(looked.query().unsqueeze(-2), key, value)[0].squeeze(-2)


def _axial(looked: Looked) -> Tensor:
    parts = [attend_fibre(looked, mode) for mode in range(looked.order)]
    return functools.reduce(torch.add, parts) / looked.order


def _flattened(looked: Looked) -> Tensor:
    return looked.attend(looked.query(), *looked.tokens(tuple(range(looked.order))))[0]


PLAIN: dict[str, Callable[[Looked], Tensor]] = {
    "additive": _additive,
    "truncated": _truncated,
    "kao_kv": _kao_kv,
    "kao_qkv": _kao_qkv,
    "kronecker_product": _kronecker_product,
    "kronecker_sum": _kronecker_sum,
    "axial": _axial,
    "flattened": _flattened,
}


def plain_layer(
    operator: str, x: Tensor, maps: Maps, back: tuple[Tensor, Tensor | None], index: Tensor, options: Mapping[str, Any]
) -> Tensor:
    """Project, attend by the definition of an operator, and project back.

    Args:
        operator: Name of the operator.
        x: Input ``(B, n_1, …, n_N, C)``.
        maps: Linear maps and heads.
        back: Weight and bias of the map back.
        index: Positions where the output is wanted, ``(L, N)``.
        options: Options of the operator, complete.

    Returns:
        Output at the positions, ``(B, L, C)``.
    """
    output = PLAIN[operator](Looked(x, maps, index, options))
    return F.linear(output.movedim(1, -2).flatten(-2), *back)
