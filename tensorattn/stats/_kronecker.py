"""Kronecker products: applied to a tensor one dimension at a time, and formed only when a user asks to see one."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tensorattn.errors import ShapeError

__all__ = ["DENSE_ENTRIES", "apply_along", "dense_kronecker", "outer_product"]

DENSE_ENTRIES = 1 << 24  # of a dense Kronecker product: 128 MB in float64


def apply_along(
    operate: Callable[[Tensor], Tensor], tensor: Tensor, dim: int, *, event_dims: int, batch_dims: int
) -> Tensor:
    """Map one event dimension of ``(*sample, *batch, *event)`` linearly: ``x ×_m A``.

    ``operate`` maps rows, ``(*batch, rows, r)`` to ``(*batch, rows, n)``; sample dimensions are rows too, so that a
    batch of matrices is never repeated for every sample.
    """
    first = tensor.dim() - event_dims
    target = first + dim
    batch = list(range(first - batch_dims, first))
    rows = [d for d in range(tensor.dim()) if d not in batch and d != target]
    layout = [*batch, *rows, target]
    moved = tensor.permute(layout)  # (*batch, *sample, *others, r)
    count = math.prod(tensor.shape[d] for d in rows)
    result = operate(moved.reshape(*moved.shape[:batch_dims], count, moved.shape[-1]))
    back = [layout.index(d) for d in range(tensor.dim())]
    return result.reshape(*moved.shape[:-1], result.shape[-1]).permute(back)


def outer_product(vectors: Sequence[Tensor]) -> Tensor:
    """Multiply vectors ``(*batch, n_k)``, one an event dimension, into ``(*batch, n_1, …, n_E)``."""
    last = len(vectors) - 1
    shaped = [v.reshape(*v.shape[:-1], *[1] * k, v.shape[-1], *[1] * (last - k)) for k, v in enumerate(vectors)]
    return functools.reduce(torch.mul, shaped)


def dense_kronecker(factors: Sequence[Tensor]) -> Tensor:
    """Multiply matrices ``(*batch, p_k, q_k)`` out; the last one varies fastest, as in ``torch.kron``."""
    batch = torch.broadcast_shapes(*(f.shape[:-2] for f in factors))
    rows, columns = (math.prod(f.shape[d] for f in factors) for d in (-2, -1))
    entries = math.prod(batch) * rows * columns
    if entries > DENSE_ENTRIES:
        raise ShapeError(
            f"the dense matrix would be {rows} by {columns}, in all {entries} entries, "
            f"more than the {DENSE_ENTRIES} that are allowed.",
            hint="Its factors are small: work with those.",
        )
    return functools.reduce(_kron, factors)


def _kron(left: Tensor, right: Tensor) -> Tensor:
    """Return the Kronecker product of two batches of matrices."""
    product = left[..., :, None, :, None] * right[..., None, :, None, :]
    return product.flatten(-4, -3).flatten(-2, -1)
