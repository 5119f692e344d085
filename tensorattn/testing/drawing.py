"""Drawing numbers, and laying them out in memory: what all strategies for tensors are made of."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from torch import Tensor

__all__ = ["canonical", "generators", "is_canonical", "laid_out", "layouts", "numbers", "one_a_mode"]


def is_canonical(tensor: Tensor) -> bool:
    """Whether a tensor has the strides of a new one of its shape, also in the dimensions of size one.

    Torch calls a tensor contiguous whatever the strides of its dimensions of size one are, though products of matrices
    may then be computed in another order, and so differ in the last bit.

    Args:
        tensor: Any tensor.

    Examples:
        >>> odd = torch.empty_strided((1, 3), (7, 1))
        >>> odd.is_contiguous(), is_canonical(odd)
        (True, False)
    """
    stride, expected = tensor.stride(), 1
    for size, step in zip(reversed(tensor.shape), reversed(stride), strict=True):
        if step != expected:
            return False
        expected *= max(1, size)
    return True


def canonical(tensor: Tensor) -> Tensor:
    """Return a copy with the strides of a new tensor, also in the dimensions of size one.

    Args:
        tensor: Any tensor.

    Examples:
        >>> canonical(torch.empty_strided((1, 3), (7, 1))).stride()
        (3, 1)
    """
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


@functools.cache
def generators(stream: int = 0) -> SearchStrategy[torch.Generator]:
    """Draw a source of random numbers.

    Args:
        stream: Number of a stream: the same drawn seed gives different numbers in different streams.
    """
    return st.integers(0, 2**16).map(lambda seed: torch.Generator().manual_seed(seed + (stream << 20)))


def numbers(
    generator: torch.Generator, shape: Sequence[int], dtype: torch.dtype = torch.float64, *, addable: bool = False
) -> Tensor:
    """Return standard normal numbers.

    Args:
        generator: Source of random numbers.
        shape: Shape of the result.
        dtype: Type of the result.
        addable: Whether a few of them must add up without rounding: in half precision they are then multiples of 1/8
            of at most 2.
    """
    drawn = torch.randn(*shape, generator=generator, dtype=torch.float64)
    if addable and dtype.itemsize < 4:
        drawn = drawn.mul(8).round().div(8).clamp(-2, 2)
    return drawn.to(dtype)


def one_a_mode(terms: Sequence[Tensor]) -> Tensor:
    """Add one term a mode into a tensor, by plain broadcasting.

    Args:
        terms: For each mode a tensor ``(*batch, n_m, D)``.
    """
    order = len(terms)
    spread = (
        term.reshape(*term.shape[:-2], *(term.shape[-2] if m == mode else 1 for m in range(order)), term.shape[-1])
        for mode, term in enumerate(terms)
    )
    total = next(spread)
    for term in spread:
        total = total + term
    return total


def laid_out(tensor: Tensor, permutation: Sequence[int], sliced: int | None = None) -> Tensor:
    """Return the same tensor with another order of dimensions in memory, or as every second slice of a wider one.

    Args:
        tensor: Any tensor.
        permutation: Its dimensions from the outermost to the innermost in memory.
        sliced: Place in memory of a dimension that skips every second element, which is NaN.

    Examples:
        >>> laid_out(torch.zeros(2, 3, 5), (0, 2, 1), sliced=2).stride()
        (30, 2, 6)
    """
    shape = [tensor.shape[d] for d in permutation]
    step = [slice(None, None, 2) if place == sliced else slice(None) for place in range(len(shape))]
    wide = [2 * size if place == sliced else size for place, size in enumerate(shape)]
    view = tensor.new_full(wide, math.nan)[tuple(step)].permute([list(permutation).index(d) for d in range(len(shape))])
    return view.copy_(tensor)


@st.composite
def layouts(draw: DrawFn, tensor: Tensor) -> Tensor:
    """Draw a layout in memory for a tensor: dense, channels first, permuted, or sliced."""
    dims = list(range(tensor.dim()))
    kind = draw(st.sampled_from(["dense", "channels first", "permuted", "sliced"])) if dims else "dense"
    if kind == "dense":
        return tensor
    if kind == "channels first":
        dims.insert(draw(st.integers(0, len(dims) - 1)), dims.pop())
    elif kind == "permuted":
        dims = draw(st.permutations(dims))
    return laid_out(tensor, dims, draw(st.sampled_from(dims)) if kind == "sliced" else None)
