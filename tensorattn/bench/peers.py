"""Peers: the same attention as others write it, and other attention on the same tensor.

All of them project, attend and project back, as the module does. Two come from packages, and are there if those are
installed.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorattn.attend.optional import require
from tensorattn.bench.plain import Looked, Maps, attend_fibre, plain_layer
from tensorattn.nn import TensorAttention
from tensorattn.operators import get_operator

__all__ = ["AxialPackage", "KroneckerPackage", "PlainLayer", "expected_of"]


def expected_of(
    operator: str,
    heads: int,
    options: Mapping[str, Any],
    x: Tensor,
    parameters: Mapping[str, Tensor],
    index: Tensor,
) -> Tensor:
    """Say what the module has to return at some positions, by the definition of its operator.

    Args:
        operator: Name of the operator.
        heads: Number of heads.
        options: Options of the operator.
        x: Input, channels last.
        parameters: Parameters of the module, by name.
        index: The positions, ``(L, N)``.

    Returns:
        Output at the positions, ``(B, L, C)``.
    """
    query, key, value = (
        (parameters[f"{name}.weight"], parameters[f"{name}.bias"]) for name in ("q_proj", "k_proj", "v_proj")
    )
    maps = Maps(query, key, value, heads, (x.shape[-1] // heads) ** -0.5)
    back = parameters["out_proj.weight"], parameters["out_proj.bias"]
    complete = {**get_operator(operator).with_defaults(options), "gain": parameters.get("interaction_gain")}
    return plain_layer(operator, x, maps, back, index, complete)


class PlainLayer(nn.Module):
    """Attention with the parameters of the module, written plainly.

    Args:
        module: The module; its operator is one of those that have a plain way.
        way: ``"naive"`` for one mean a mode and attention written out, ``"fused"`` for the fused kernel of PyTorch.
    """

    def __init__(self, module: TensorAttention, way: str) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = module.q_proj, module.k_proj, module.v_proj
        self.out_proj, self.heads, self.first = module.out_proj, module.num_heads, module.channels_first
        self.attend, self.way = getattr(self, f"_{module.operator}"), way

    def forward(self, x: Tensor) -> Tensor:
        """Project, attend, project back."""
        x = x.movedim(1, -1) if self.first else x
        y: Tensor = self.attend(x)
        return y.movedim(-1, 1) if self.first else y

    def _split(self, x: Tensor) -> Tensor:
        """Split heads: ``(B, *, C)`` to ``(B, H, *, D)``."""
        return x.unflatten(-1, (self.heads, -1)).movedim(-2, 1)

    def _join(self, x: Tensor) -> Tensor:
        """Join heads: ``(B, H, *, D)`` to ``(B, *, C)``."""
        return x.movedim(1, -2).flatten(-2)

    def _softmax(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend."""
        if self.way == "fused":
            return F.scaled_dot_product_attention(query, key, value)
        weights = torch.softmax(query @ key.mT * query.shape[-1] ** -0.5, -1)
        return weights @ value

    def _averages(self, x: Tensor) -> list[Tensor]:
        """Average over all modes but one, one call a mode."""
        order = x.dim() - 2
        return [x.mean([1 + k for k in range(order) if k != mode]) if order > 1 else x for mode in range(order)]

    def _kao_kv(self, x: Tensor) -> Tensor:
        """Linear, attention to the averages, linear."""
        tokens = torch.cat(self._averages(x), 1)
        key, value = self._split(self.k_proj(tokens)), self._split(self.v_proj(tokens))
        query = self._split(self.q_proj(x.flatten(1, -2)))
        return self.out_proj(self._join(self._softmax(query, key, value))).unflatten(1, x.shape[1:-1])

    def _kao_qkv(self, x: Tensor) -> Tensor:
        """Attention among the averages, then one broadcast sum after the other."""
        averages = self._averages(x)
        tokens = torch.cat(averages, 1)
        query, key, value = (self._split(linear(tokens)) for linear in (self.q_proj, self.k_proj, self.v_proj))
        vectors = F.linear(self._join(self._softmax(query, key, value)), self.out_proj.weight)
        total = self.out_proj.bias
        for mode, vector in enumerate(vectors.split(list(x.shape[1:-1]), 1)):
            shape = [1 if k != mode else size for k, size in enumerate(x.shape[1:-1])]
            total = total + vector.reshape(x.shape[0], *shape, -1)
        return total

    def _flattened(self, x: Tensor) -> Tensor:
        """Attention among all positions."""
        flat = x.flatten(1, -2)
        query, key, value = (self._split(linear(flat)) for linear in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(self._join(self._softmax(query, key, value))).unflatten(1, x.shape[1:-1])

    def _axial(self, x: Tensor) -> Tensor:
        """Attention along each mode with all others as batch, and the mean over modes."""
        query, key, value = (self._split(linear(x)) for linear in (self.q_proj, self.k_proj, self.v_proj))
        total: Tensor | None = None
        for dim in range(2, x.dim()):
            moved = [part.movedim(dim, -2).flatten(1, -3) for part in (query, key, value)]
            part = self._softmax(*moved).unflatten(1, query.movedim(dim, -2).shape[1:-2]).movedim(-2, dim)
            total = part if total is None else total + part
        assert total is not None
        return self.out_proj(self._join(total / (x.dim() - 2)))


class AxialPackage(nn.Module):
    """The package ``axial-attention``: one attention a mode, each with maps of its own, added up."""

    def __init__(self, dim: int, heads: int, order: int, channels_first: bool) -> None:
        super().__init__()
        package = require("axial_attention", extra="bench", purpose="comparing with axial-attention")
        self.layer = package.AxialAttention(
            dim=dim, num_dimensions=order, heads=heads, dim_index=1 if channels_first else -1
        )
        self.heads, self.order = heads, order

    def forward(self, x: Tensor) -> Tensor:
        """Attend."""
        y: Tensor = self.layer(x)
        return y

    def expected(self, x: Tensor, parameters: Mapping[str, Tensor], index: Tensor) -> Tensor:
        """Say by the definition what it has to return at some positions, ``(B, L, C)``."""
        total = []
        for mode in range(self.order):
            prefix = f"layer.axial_attentions.{mode}.fn"
            key, value = parameters[f"{prefix}.to_kv.weight"].chunk(2)
            query = parameters[f"{prefix}.to_q.weight"]
            maps = Maps((query, None), (key, None), (value, None), self.heads, (x.shape[-1] // self.heads) ** -0.5)
            output = attend_fibre(Looked(x, maps, index, {}), mode).movedim(1, -2).flatten(-2)
            total.append(F.linear(output, parameters[f"{prefix}.to_out.weight"], parameters[f"{prefix}.to_out.bias"]))
        return functools.reduce(torch.add, total)


class KroneckerPackage(nn.Module):
    """The package ``kronecker-attention-pytorch``: `kao_qkv` of order 2, channels first, without a scale."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        name = "kronecker_attention_pytorch"
        package = require(name, extra="bench", purpose="comparing with kronecker-attention-pytorch")
        self.layer = package.KroneckerSelfAttention(dim=dim, heads=heads, dim_heads=dim // heads)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        """Attend."""
        y: Tensor = self.layer(x)
        return y

    def expected(self, x: Tensor, parameters: Mapping[str, Tensor], index: Tensor) -> Tensor:
        """Say by the definition what it has to return at some positions; it adds its bias once for each mode."""
        query, key, value = parameters["layer.to_qkv.weight"].squeeze(-1).chunk(3)
        weight, bias = parameters["layer.to_out.weight"].squeeze(-1), parameters["layer.to_out.bias"]
        maps = Maps((query, None), (key, None), (value, None), self.heads, 1.0)
        options = get_operator("kao_qkv").with_defaults({})
        return plain_layer("kao_qkv", x, maps, (weight, 2 * bias), index, options)
