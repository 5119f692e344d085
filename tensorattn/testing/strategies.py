r"""Hypothesis strategies for tensors over grids: sizes, additive and tensor-normal tensors, queries.

Structure is drawn by Hypothesis, which shrinks it: orders from 1 to 4, sizes from 1 up, batch dimensions, the order
of dimensions in memory. Numbers come from a `torch.Generator` with a drawn seed. The terms of an
additive tensor in half precision are multiples of 1/8 of at most 2, whose sums are exact, so that it is additive to the
last bit.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from torch import Tensor

from tensorattn.testing.drawing import generators, layouts, numbers, one_a_mode

__all__ = [
    "additive_tensors",
    "batch_sizes",
    "mode_partitions",
    "mode_sizes",
    "queries",
    "tensor_normals",
    "tensors",
]

Sizes = tuple[int, ...]


def mode_sizes(
    *,
    order: int | None = None,
    max_order: int = 4,
    max_size: int = 6,
    max_positions: int = 64,
) -> SearchStrategy[Sizes]:
    """Draw the sizes of the modes of a grid.

    Args:
        order: Number of modes; by default drawn, from 1 to ``max_order``.
        max_order: Largest number of modes.
        max_size: Largest size of a mode.
        max_positions: Largest number of positions.

    Returns:
        The strategy of sizes.

    Examples:
        >>> from hypothesis import find
        >>> find(mode_sizes(), lambda sizes: len(sizes) == 3 and sizes[1] > 1)
        (1, 2, 1)
    """
    return _mode_sizes(order, max_order, max_size, max_positions)


@st.composite
def _mode_sizes(draw: DrawFn, order: int | None, max_order: int, max_size: int, max_positions: int) -> Sizes:
    """Draw mode sizes."""
    order = draw(st.integers(1, max_order)) if order is None else order
    sizes, left = [], max_positions
    for _ in range(order):
        sizes.append(draw(st.integers(1, max(1, min(max_size, left)))))
        left //= sizes[-1]
    return tuple(draw(st.permutations(sizes)))  # so that the cap falls on any mode


@functools.cache
def batch_sizes(max_dims: int = 2, max_size: int = 3) -> SearchStrategy[Sizes]:
    """Draw batch dimensions, heads among them.

    Args:
        max_dims: Largest number of dimensions.
        max_size: Largest size of one.

    Returns:
        The strategy of sizes.
    """
    return st.integers(0, max_dims).flatmap(lambda dims: st.tuples(*[st.integers(1, max_size)] * dims))


def mode_partitions(order: int) -> SearchStrategy[tuple[Sizes, ...]]:
    """Draw a partition of the modes into groups.

    Args:
        order: Number of modes N.

    Returns:
        The strategy of tuples of groups, each an ascending tuple of modes.

    Examples:
        >>> from hypothesis import find
        >>> find(mode_partitions(3), lambda groups: len(groups) == 2)
        ((0, 1), (2,))
    """
    labels = st.tuples(*(st.integers(0, order - 1) for _ in range(order)))
    return labels.map(lambda drawn: tuple(tuple(m for m in range(order) if drawn[m] == g) for g in sorted({*drawn})))


def tensors(
    shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    stream: int = 0,
) -> SearchStrategy[Tensor]:
    """Draw a tensor of normal numbers around a common mean, in any memory layout.

    Args:
        shape: Its shape.
        dtype: Its type.
        device: Its device.
        stream: Number of its random stream. Tensors of different streams differ where Hypothesis draws equal seeds.

    Returns:
        The strategy of tensors.

    Examples:
        >>> from hypothesis import find
        >>> find(tensors((2, 3, 4)), lambda tensor: not tensor.is_contiguous()).shape
        torch.Size([2, 3, 4])
    """
    return _tensors(tuple(shape), dtype, device, stream)


@st.composite
def _tensors(draw: DrawFn, shape: Sizes, dtype: torch.dtype, device: torch.device | str, stream: int) -> Tensor:
    """Draw tensors."""
    generator = draw(generators(stream))
    mean = numbers(generator, shape[-1:])
    return draw(layouts((numbers(generator, shape) + mean).to(device, dtype)))


def additive_tensors(
    sizes: Sequence[int],
    *,
    batch: Sequence[int] = (),
    dim: int = 3,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    stream: int = 0,
) -> SearchStrategy[Tensor]:
    r"""Draw an additive tensor :math:`x_j = \sum_m \kappa^m[j_m]`: one term a mode, nothing else.

    Args:
        sizes: Sizes of the modes.
        batch: Batch dimensions.
        dim: Channels D.
        dtype: Its type.
        device: Its device.
        stream: Number of its random stream. Tensors of different streams differ where Hypothesis draws equal seeds.

    Returns:
        The strategy of tensors.

    Examples:
        >>> from hypothesis import given
        >>> import tensorattn as ta
        >>> @given(additive_tensors((2, 3, 4)))
        ... def is_its_own_additive_part(tensor):
        ...     assert torch.allclose(ta.additive_part(tensor, order=3), tensor)
        >>> is_its_own_additive_part()
    """
    return _additive_tensors(tuple(sizes), tuple(batch), dim, dtype, device, stream)


@st.composite
def _additive_tensors(
    draw: DrawFn, sizes: Sizes, batch: Sizes, dim: int, dtype: torch.dtype, device: torch.device | str, stream: int
) -> Tensor:
    """Draw additive tensors."""
    generator = draw(generators(stream))
    terms = [numbers(generator, (*batch, size, dim), dtype, addable=True) for size in sizes]
    return draw(layouts(one_a_mode(terms).to(device, dtype)))


def tensor_normals(
    sizes: Sequence[int],
    *,
    batch: Sequence[int] = (),
    dim: int = 3,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    stream: int = 0,
) -> SearchStrategy[Tensor]:
    r"""Draw a sample of a tensor-normal law that is additive with probability one, or of a sum of such laws.

    The covariance of the law over mode m and channels is any :math:`\Sigma_m \otimes \Sigma_c`; over every other mode
    it is the all-ones matrix :math:`11^\top`, perfect correlation, so that the sample is constant along it. One such
    term for each of some modes, and an additive mean, are added up. The samples are taken as in the definition of the
    law: factors of its covariances times white noise.

    Args:
        sizes: Sizes of the modes.
        batch: Batch dimensions.
        dim: Channels D.
        dtype: Its type, float64 or float32.
        device: Its device.
        stream: Number of its random stream.

    Returns:
        The strategy of tensors.

    Examples:
        >>> from hypothesis import given
        >>> import tensorattn as ta
        >>> @given(tensor_normals((4, 3)))
        ... def has_no_interaction(sample):
        ...     assert ta.interaction_residual(sample, order=2).abs().max() < 1e-12
        >>> has_no_interaction()
    """
    return _tensor_normals(tuple(sizes), tuple(batch), dim, dtype, device, stream)


@st.composite
def _tensor_normals(
    draw: DrawFn, sizes: Sizes, batch: Sizes, dim: int, dtype: torch.dtype, device: torch.device | str, stream: int
) -> Tensor:
    """Draw sums of samples of tensor-normal laws."""
    order = len(sizes)
    generator = draw(generators(stream))
    correlated = draw(st.sets(st.integers(0, order - 1), min_size=1))
    sample = one_a_mode([numbers(generator, (*batch, size, dim)) for size in sizes])
    for mode in sorted(correlated):
        # Each factor L of a covariance Σ = L Lᵀ; that of 11ᵀ is one column of ones.
        noise = numbers(generator, (*batch, *(n if m == mode else 1 for m, n in enumerate(sizes)), dim))
        channels = numbers(generator, (dim, dim))
        term = noise @ channels.mT
        for m, size in enumerate(sizes):
            factor = numbers(generator, (size, size)) if m == mode else torch.ones(size, 1).double()
            term = torch.tensordot(term, factor, dims=([len(batch) + m], [1])).movedim(-1, len(batch) + m)
        sample = sample + term
    return draw(layouts(sample.to(device, dtype)))


def queries(
    sizes: Sequence[int],
    *,
    batch: Sequence[int] = (),
    dim: int = 3,
    on_grid: bool = False,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    stream: int = 0,
) -> SearchStrategy[Tensor]:
    """Draw queries: one a batch entry, a list of tokens, another grid, or the grid of the keys.

    Args:
        sizes: Sizes of the modes of the keys.
        batch: Batch dimensions.
        dim: Channels D.
        on_grid: Whether they must lie on the grid of the keys.
        dtype: Their type.
        device: Their device.
        stream: Number of their random stream.

    Returns:
        The strategy of tensors ``(*batch, *positions, D)``.

    Examples:
        >>> from hypothesis import find
        >>> find(queries((2, 3), dim=4, on_grid=True), lambda query: True).shape
        torch.Size([2, 3, 4])
    """
    return _queries(tuple(sizes), tuple(batch), dim, on_grid, dtype, device, stream)


@st.composite
def _queries(
    draw: DrawFn,
    sizes: Sizes,
    batch: Sizes,
    dim: int,
    on_grid: bool,
    dtype: torch.dtype,
    device: torch.device | str,
    stream: int,
) -> Tensor:
    """Draw queries."""
    positions = sizes if on_grid else draw(st.just(sizes) | batch_sizes(max_dims=3))
    return draw(tensors((*batch, *positions, dim), dtype=dtype, device=device, stream=stream))
