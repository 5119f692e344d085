"""Hypothesis strategy for position weights: how often each index of a mode counts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from torch import Tensor

from tensorattn.testing.drawing import generators
from tensorattn.testing.strategies import Sizes

__all__ = ["Weights", "weights"]

Weights = tuple[Tensor | None, ...] | None


def weights(
    sizes: Sequence[int],
    *,
    batch: Sequence[int] = (),
    integer: bool = False,
    empty: bool = False,
    device: torch.device | str = "cpu",
) -> SearchStrategy[Weights]:
    """Draw position weights: none at all, or for each mode none or a vector with zeros, for all or a part of the batch.

    Real weights are multiples of 1/8, which every type represents exactly.

    Args:
        sizes: Sizes of the modes.
        batch: Batch dimensions.
        integer: Whether they must be whole numbers; they are then integers, booleans or floats.
        empty: Whether a batch entry may have only zeros in a mode, so that no position of it is present.
        device: Their device.

    Returns:
        The strategy of weights.

    Examples:
        >>> from hypothesis import find
        >>> rows, columns = find(weights((2, 3)), lambda drawn: drawn is not None and drawn[1] is not None)
        >>> rows, columns.shape
        (None, torch.Size([3]))
    """
    return _weights(tuple(sizes), tuple(batch), integer, empty, device)


@st.composite
def _weights(
    draw: DrawFn, sizes: Sizes, batch: Sizes, integer: bool, empty: bool, device: torch.device | str
) -> Weights:
    """Draw weights."""
    if draw(st.integers(0, 3)) == 0:
        return None
    return tuple([draw(_mode_weights(size, batch, integer, empty, device)) for size in sizes])


@st.composite
def _mode_weights(
    draw: DrawFn, size: int, batch: Sizes, integer: bool, empty: bool, device: torch.device | str
) -> Tensor | None:
    """Draw the weights of one mode."""
    floating = torch.float32 if torch.device(device).type == "mps" else torch.float64
    dtype = draw(st.sampled_from([None, torch.int64, torch.bool, floating]))
    if dtype is None:
        return None
    dims = draw(st.integers(0, len(batch)))
    rows = [n if draw(st.booleans()) else 1 for n in batch[len(batch) - dims :]]
    generator = draw(generators())
    drawn = torch.randint(0, 4, (*rows, size), generator=generator)  # a quarter of zeros
    present = torch.randint(0, size, (*rows, 1), generator=generator)
    drawn = drawn.scatter(-1, present, drawn.gather(-1, present).clamp(min=1))
    if empty and dims:
        absent = torch.randint(0, 2, (*rows, 1), generator=generator) == 1
        absent.reshape(-1)[0] = False  # all zero for the whole batch is an error
        drawn = drawn.where(~absent, 0)
    if not integer and dtype.is_floating_point:
        eighths = torch.randint(1, 17, drawn.shape, generator=generator) / 8
        return (drawn * eighths).to(device, dtype)
    return drawn.to(device, dtype)
