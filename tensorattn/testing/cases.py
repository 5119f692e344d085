"""Cases: queries, keys, values and weights that belong together, which theorems are checked on."""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from torch import Tensor

from tensorattn.testing.drawing import is_canonical
from tensorattn.testing.strategies import (
    Sizes,
    additive_tensors,
    batch_sizes,
    mode_sizes,
    queries,
    tensors,
)
from tensorattn.testing.tolerances import LARGEST_LOGIT, allowed, exact, largest, largest_logit
from tensorattn.testing.weighing import Weights, weights

__all__ = ["Case", "cases", "rows"]


@dataclass(frozen=True, eq=False)
class Case:
    """Arguments of one call of an operator.

    Attributes:
        query: Queries ``(*batch, *positions, D)``.
        key: Keys ``(*batch, n_1, …, n_N, D)``.
        value: Values ``(*batch, n_1, …, n_N, D_v)``.
        order: Number of modes N.
        scale: Factor of the logits; None is the default of the operators, 1/√D.
        weights: One vector or None a mode, or None.
        on_grid: Whether queries lie on the grid of the keys because the operator wants them there.
        pooled: Whether logits are those of queries and keys summed over all modes but one.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    order: int
    scale: float | None = None
    weights: Weights = None
    on_grid: bool = False
    pooled: bool = False

    @property
    def batch(self) -> Sizes:
        """Batch dimensions."""
        return tuple(self.key.shape[: -self.order - 1])

    @property
    def sizes(self) -> Sizes:
        """Sizes of the modes."""
        return tuple(self.key.shape[-self.order - 1 : -1])

    @property
    def positions(self) -> Sizes:
        """Dimensions of the query between batch and channels."""
        return tuple(self.query.shape[len(self.batch) : -1])

    @property
    def dtype(self) -> torch.dtype:
        """Type of the tensors."""
        return self.query.dtype

    @property
    def factor(self) -> float:
        """Factor of the logits, written out."""
        return max(1, self.key.shape[-1]) ** -0.5 if self.scale is None else self.scale

    @functools.cached_property
    def logit(self) -> float:
        """Largest absolute logit of any query with any key of its batch entry."""
        batch = len(self.batch)
        if not self.pooled:
            return largest_logit(rows(self.query, batch), rows(self.key, batch), self.factor)
        counts, largest_of_all = self.position_weights().unsqueeze(-1), 0.0
        for mode in range(self.order):
            others = [batch + m for m in range(self.order) if m != mode]
            query, key = (exact(tensor) * counts for tensor in (self.query, self.key))
            if others:
                query, key = query.sum(others), key.sum(others)
            largest_of_all = max(largest_of_all, largest_logit(query, key, self.factor))
        return largest_of_all

    @functools.cached_property
    def magnitude(self) -> float:
        """Largest absolute value."""
        return largest(self.value)

    def replace(self, **changes: object) -> Case:
        """Return the same case with other arguments.

        Args:
            **changes: Attributes by name.
        """
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def allowed(self, magnitude: float = 0.0) -> float:
        """Return the error that rounding may cause in the output.

        Args:
            magnitude: Largest absolute result, where it may exceed the values.
        """
        return allowed("output", self.dtype, logit=self.logit, magnitude=max(self.magnitude, magnitude))

    @property
    def allowed_lse(self) -> float:
        """The error that rounding may cause in the log-sum-exp, which is a logit and the logarithm of a count."""
        count = math.log(max(1.0, largest(self.position_weights().sum([*range(-self.order, 0)]))))
        return allowed("log-sum-exp", self.dtype, logit=self.logit + count)

    def mode_weights(self, mode: int) -> Tensor:
        """Return the weights of a mode, ones where there are none, as float64 ``(*batch, n_m)``.

        Args:
            mode: Index of the mode.
        """
        given = None if self.weights is None else self.weights[mode]
        shape = (*self.batch, self.sizes[mode])
        return torch.ones(shape, dtype=torch.float64) if given is None else given.cpu().double().expand(shape)

    def position_weights(self) -> Tensor:
        """Return the weight of every position, as float64 ``(*batch, n_1, …, n_N)``."""
        product = torch.ones(*self.batch, *(1 for _ in self.sizes), dtype=torch.float64)
        for mode in range(self.order):
            shape = [size if m == mode else 1 for m, size in enumerate(self.sizes)]
            product = product * self.mode_weights(mode).reshape(*self.batch, *shape)
        return product

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Let Hypothesis print what `repr` says, not all numbers."""
        printer.text(repr(self))

    def __repr__(self) -> str:
        described = None
        if self.weights is not None:
            described = "[" + ", ".join("None" if w is None else str(w.tolist()) for w in self.weights) + "]"
        scale = "None" if self.scale is None else f"{self.scale:.6g}"
        tensors = {"query": self.query, "key": self.key, "value": self.value}
        strides = [f", {name} strides={t.stride()}" for name, t in tensors.items() if not is_canonical(t)]
        return (
            f"Case(batch={self.batch}, sizes={self.sizes}, positions={self.positions}, D={self.key.shape[-1]}, "
            f"D_v={self.value.shape[-1]}, scale={scale}, weights={described}, {self.dtype}{''.join(strides)})"
        )


def cases(
    *,
    order: int | None = None,
    min_order: int = 1,
    on_grid: bool = False,
    pooled: bool = False,
    additive: bool = False,
    weighted: bool = True,
    integer: bool = False,
    empty: bool = False,
    max_positions: int = 48,
    max_dim: int = 6,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> SearchStrategy[Case]:
    """Draw the arguments of one call of an operator.

    Args:
        order: Number of modes; by default drawn, up to 4.
        min_order: Smallest number of modes that is drawn.
        on_grid: Whether queries must lie on the grid of the keys.
        pooled: Whether logits are those of sums over all modes but one.
        additive: Whether keys and values are additive over the modes.
        weighted: Whether there may be position weights.
        integer: Whether weights must be whole numbers.
        empty: Whether weights may leave a batch entry without any position.
        max_positions: Largest number of positions of all batch entries together.
        max_dim: Largest number of channels.
        dtype: Type of the tensors.
        device: Device of the tensors.

    Returns:
        The strategy of cases.

    Examples:
        >>> from hypothesis import find
        >>> find(cases(order=2), lambda case: case.sizes[1] > 1 and case.query.dim() > 1)
        Case(batch=(), sizes=(1, 2), positions=(1, 2), D=1, D_v=1, scale=None, weights=None, torch.float64)
    """
    return _cases(
        order, min_order, on_grid, pooled, additive, weighted, integer, empty, max_positions, max_dim, dtype, device
    )


def rows(tensor: Tensor, batch: int) -> Tensor:
    """Put all dimensions between batch and channels in one.

    Args:
        tensor: Tensor ``(*batch, *positions, D)``.
        batch: Number of batch dimensions.

    Returns:
        The tensor ``(*batch, L, D)``.
    """
    shape = tensor.shape
    return tensor.reshape(*shape[:batch], math.prod(shape[batch:-1]), shape[-1])


@st.composite
def _cases(
    draw: DrawFn,
    order: int | None,
    min_order: int,
    on_grid: bool,
    pooled: bool,
    additive: bool,
    weighted: bool,
    integer: bool,
    empty: bool,
    max_positions: int,
    max_dim: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Case:
    """Draw cases."""
    batch = draw(batch_sizes())
    order = draw(st.integers(min_order, max(min_order, 4))) if order is None else order
    sizes = draw(mode_sizes(order=order, max_positions=max(1, max_positions // math.prod(batch))))
    dim, value_dim = draw(st.integers(1, max_dim)), draw(st.integers(1, max_dim))

    def grid(channels: int, stream: int) -> SearchStrategy[Tensor]:
        if additive:
            return additive_tensors(sizes, batch=batch, dim=channels, dtype=dtype, device=device, stream=stream)
        return tensors((*batch, *sizes, channels), dtype=dtype, device=device, stream=stream)

    query = draw(queries(sizes, batch=batch, dim=dim, on_grid=on_grid, dtype=dtype, device=device))
    key, value = draw(grid(dim, 1)), draw(grid(value_dim, 2))
    given = draw(weights(sizes, batch=batch, integer=integer, empty=empty, device=device)) if weighted else None
    exponent = draw(st.none() | st.floats(-2, 0.5) | st.floats(0.5, 1))
    scale = None if exponent is None else 10**exponent
    return _bounded(Case(query, key, value, len(sizes), scale, given, on_grid, pooled))


def _bounded(case: Case) -> Case:
    """Take the scale back to where no logit exceeds what the type of a case has digits for."""
    largest_allowed = LARGEST_LOGIT.get(case.dtype, 1.0)
    if case.logit <= largest_allowed:
        return case
    return case.replace(scale=case.factor * largest_allowed / case.logit)
