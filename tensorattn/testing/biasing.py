"""Hypothesis strategy for biases by position: what is added to the logits, one term a mode."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from torch import Tensor

from tensorattn.testing.drawing import generators, numbers

__all__ = ["Bias", "biases"]

Bias = list[Tensor | None]


def biases(
    sizes: Sequence[int],
    positions: Sequence[int],
    *,
    batch: Sequence[int] = (),
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> SearchStrategy[Bias]:
    """Draw for each mode no bias, or terms for each place of the query and index; minus infinity hides, at times all.

    Args:
        sizes: Sizes of the modes of the keys.
        positions: Sizes of the modes of the queries.
        batch: Batch dimensions; some terms differ between batch entries.
        dtype: Their type.
        device: Their device.

    Returns:
        The strategy of biases, one tensor or None a mode.

    Examples:
        >>> from hypothesis import find
        >>> (table,) = find(biases((3,), (2,)), lambda drawn: drawn[0] is not None)
        >>> table.shape
        torch.Size([2, 3])
    """
    return _biases(tuple(sizes), tuple(positions), tuple(batch), dtype, device)


@st.composite
def _biases(
    draw: DrawFn,
    sizes: Sequence[int],
    positions: Sequence[int],
    batch: Sequence[int],
    dtype: torch.dtype,
    device: torch.device | str,
) -> Bias:
    """Draw biases."""
    found: Bias = []
    for mode, (places, size) in enumerate(zip(positions, sizes, strict=True)):
        kind = draw(st.sampled_from(["none", "table", "window", "batched"]))
        if kind == "none":
            found.append(None)
            continue
        shape = (*(batch if kind == "batched" else ()), places, size)
        table = numbers(draw(generators(30 + mode)), shape, dtype)
        if kind == "window":
            distance = torch.arange(places)[:, None] - torch.arange(size)
            table = table.masked_fill(distance.abs() > draw(st.integers(-1, size)), -math.inf)
        found.append(table.to(device))
    return found
