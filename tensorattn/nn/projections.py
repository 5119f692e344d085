"""The linear maps of an attention layer: heads, summaries projected in place of tensors, what is added at the end."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorattn.contraction_tree import Family
from tensorattn.errors import OptionError
from tensorattn.options import check_count
from tensorattn.summary import Summary, apply_linear, picked, projected, projected_with_queries, split_heads

__all__ = [
    "added",
    "apply_norm",
    "check_heads",
    "join_heads",
    "mapped",
    "project_means",
    "project_summary",
]


def check_heads(embed_dim: int, num_heads: int) -> None:
    """Check that heads divide the channels.

    Args:
        embed_dim: Channels.
        num_heads: Heads.

    Raises:
        OptionError: If they do not, or one is no positive integer.
    """
    for name, count in (("embed_dim", embed_dim), ("num_heads", num_heads)):
        check_count(count, name)
    if embed_dim < 1 or num_heads < 1:
        raise OptionError(f"embed_dim and num_heads must be at least 1, got {embed_dim} and {num_heads}.")
    if embed_dim % num_heads:
        raise OptionError(f"embed_dim must be divisible by num_heads, got {embed_dim} and {num_heads}.")


def join_heads(tensor: Tensor, batch: int) -> Tensor:
    """Join heads into channels: ``(B, H, *, D)`` to ``(B, *, C)``.

    Args:
        tensor: Output of an operator.
        batch: Number of batch dimensions, without the heads.
    """
    return tensor.movedim(batch, -2).flatten(-2)


def _rows_of(linear: nn.Linear, mode: int, rows: int) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the linear map of one mode, where each has its own; all rows where they share one."""
    start = mode * rows if (mode + 1) * rows <= linear.out_features else 0
    part = slice(start, start + rows)
    return linear.weight[part], None if linear.bias is None else linear.bias[part]


def project_summary(summary: Summary, k_proj: nn.Linear, v_proj: nn.Linear, num_heads: int) -> Summary:
    """Project a summary of inputs to that of keys and values, with heads as last batch dimension.

    Args:
        summary: Summary of the inputs.
        k_proj: Linear map to keys, of all modes or of one mode below the other.
        v_proj: Linear map to values.
        num_heads: Heads.
    """
    rows, of_values = v_proj.out_features, (v_proj.weight, v_proj.bias)
    if k_proj.out_features == rows:
        return projected(summary, (k_proj.weight, k_proj.bias), of_values, num_heads)
    first = projected(summary, _rows_of(k_proj, 0, rows), of_values, num_heads)
    nothing = (None,) * len(summary.kept)
    keys = list(first.keys)
    for mode in range(1, summary.order):
        place = summary.place((mode,))
        alone = (*nothing[:place], summary.keys[place], *nothing[place + 1 :])
        part = dataclasses.replace(summary, keys=alone, values=nothing)
        keys[place] = projected(part, _rows_of(k_proj, mode, rows), of_values, num_heads).keys[place]
    return dataclasses.replace(first, keys=tuple(keys))


def project_means(
    summary: Summary, kept: Family, q_proj: nn.Linear, k_proj: nn.Linear, v_proj: nn.Linear, num_heads: int
) -> tuple[Sequence[Tensor], Summary]:
    """Project a summary of inputs as `project_summary` does, and its means to mean queries.

    Args:
        summary: Summary of the inputs.
        kept: Kept subsets of the mean queries, those of one mode first.
        q_proj: Linear map to queries, of all modes or of one mode below the other.
        k_proj: Linear map to keys, likewise.
        v_proj: Linear map to values.
        num_heads: Heads.
    """
    rows = v_proj.out_features
    if q_proj.out_features == rows:
        of_queries, of_keys, of_values = [(linear.weight, linear.bias) for linear in (q_proj, k_proj, v_proj)]
        found, queries = projected_with_queries(summary, [of_queries], of_keys, of_values, num_heads)
        return picked(queries, found.kept, kept), found
    maps = (_rows_of(q_proj, mode, rows) for mode in range(len(kept)))
    parts = (apply_linear(summary.key(subset), *to) for subset, to in zip(kept, maps, strict=True))
    return tuple(split_heads(part, num_heads, 1) for part in parts), project_summary(summary, k_proj, v_proj, num_heads)


def mapped(tensor: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Apply a linear map.

    Args:
        tensor: What is mapped.
        weight: Its matrix; None for the identity.
        bias: Its bias, or None.
    """
    if weight is not None:
        return F.linear(tensor, weight, bias)
    return tensor if bias is None else tensor + bias


def apply_norm(norm: nn.LayerNorm, pooled: Tensor) -> Tensor:
    """Apply a LayerNorm to pooled queries or keys in their own type.

    Args:
        norm: The norm.
        pooled: Pooled queries or keys.
    """
    weight, bias = norm.weight.to(pooled.dtype), norm.bias.to(pooled.dtype)
    return F.layer_norm(pooled, norm.normalized_shape, weight, bias, norm.eps)


def added(y: Tensor, skip: Tensor | None, out: Tensor | None) -> Tensor:
    """Add what is skipped, and write to where it is wanted.

    Args:
        y: Output.
        skip: What is added, or None.
        out: Where it goes, or None.
    """
    if out is not None:
        return out.copy_(y) if skip is None else torch.add(y, skip, out=out)
    return y if skip is None else y + skip
