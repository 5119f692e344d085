r"""Cases and the strategies that draw them: sizes, tensors, weights, masks, biases; and what rounding may cause.

Structure is drawn by Hypothesis, which shrinks it: orders from 1 to 4, sizes from 1 up, batch dimensions, the order of
dimensions in memory. Numbers come from a `torch.Generator` with a drawn seed. The terms of an additive tensor in half
precision are multiples of 1/8 of at most 2, whose sums are exact, so that it is additive to the last bit.

Rounding errors of attention grow with the logits: an error of one unit in a logit of size L moves a weight by about
:math:`\varepsilon L`, and so the output by :math:`\varepsilon L \max |v|`. Over more than a thousand random cases of up
to four modes the errors reached, in these units,

====================  ========================================  ==================  =========  ========
what                  unit                                      reached in float64  float32    allowed
====================  ========================================  ==================  =========  ========
``output``            :math:`\varepsilon\, (1 + L)\, M`         6.2                 6.9        32
``log-sum-exp``       :math:`\varepsilon\, (1 + L + \log P)`    11.7                9.8        64
``average``           :math:`\varepsilon\, M`                   4.6                 5.5        16
``gradient``          :math:`\varepsilon\, (1 + L)(1 + |g|)`    4.4                             64
``slope``             :math:`\varepsilon\, |C| |q|`             1                               4500
====================  ========================================  ==================  =========  ========

for P positions, where M is the largest value that goes in or comes out. Half precision is expected to be accumulated in
float32: it is allowed the same multiple of float32 units, and four units of its own for the rounding of averages,
weights and results.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from torch import Tensor

__all__ = [
    "ALLOWED",
    "LARGEST_LOGIT",
    "Case",
    "additive_tensors",
    "allowed",
    "batch_sizes",
    "biases",
    "cases",
    "epsilon",
    "exact",
    "generators",
    "is_canonical",
    "largest",
    "layouts",
    "masks",
    "mode_partitions",
    "mode_sizes",
    "numbers",
    "one_a_mode",
    "queries",
    "rows",
    "tensor_normals",
    "tensors",
    "weights",
]

Sizes = tuple[int, ...]
Weights = tuple[Tensor | None, ...] | None

ALLOWED: Mapping[str, float] = MappingProxyType(
    {"output": 32, "log-sum-exp": 64, "average": 16, "gradient": 64, "slope": 4500}
)
HALF_ALLOWED = 4  # units of half precision, for what is rounded to it

# Logits up to which the table holds; half precision has no digits left for larger ones.
LARGEST_LOGIT: Mapping[torch.dtype, float] = MappingProxyType(
    {torch.float64: 1e4, torch.float32: 1e2, torch.float16: 4.0, torch.bfloat16: 2.0}
)


def epsilon(dtype: torch.dtype) -> float:
    """Return the machine epsilon of a type.

    Args:
        dtype: Floating-point type.
    """
    return torch.finfo(dtype).eps


def allowed(what: str, dtype: torch.dtype, *, logit: float = 0.0, magnitude: float = 1.0) -> float:
    r"""Return the largest error that rounding may cause.

    Args:
        what: Row of the table: ``"output"``, ``"log-sum-exp"``, ``"average"``, ``"gradient"`` or ``"slope"``.
        dtype: Type that was computed in.
        logit: Largest logit L.
        magnitude: Largest value M, or whatever else the unit of that row contains.

    Returns:
        The allowed multiple of the unit.

    Examples:
        >>> allowed("output", torch.float64, logit=3.0, magnitude=2.0) == 32 * 2**-52 * 4 * 2
        True
        >>> allowed("average", torch.bfloat16) == 16 * 2**-23 + 4 * 2**-7
        True
    """
    accumulated = torch.float32 if dtype.itemsize < 4 else dtype
    units = ALLOWED[what] * epsilon(accumulated)
    if accumulated is not dtype:
        units += HALF_ALLOWED * epsilon(dtype)
    return units * (1 + logit) * magnitude


def exact(tensor: Tensor) -> Tensor:
    """Return a tensor in float64, on the CPU and without its graph.

    Args:
        tensor: Tensor of any type on any device.
    """
    return tensor.detach().cpu().to(torch.float64)


def largest(*tensors: Tensor) -> float:
    """Return the largest absolute finite entry of some tensors, or 0.

    Args:
        *tensors: Tensors of any shape.

    Examples:
        >>> largest(torch.tensor([1.0, -3.0]), torch.tensor([[2.0, float("inf")]]))
        3.0
    """
    return max((float(exact(t).abs().nan_to_num(0.0, 0.0, 0.0).max()) for t in tensors if t.numel()), default=0.0)


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
        query, key, batch = exact(self.query), exact(self.key), len(self.batch)
        pairs = [(rows(query, batch), rows(key, batch))]
        if self.pooled:
            counts, dims = self.position_weights().unsqueeze(-1), range(batch, batch + self.order)
            others = [[dim for dim in dims if dim != own] for own in dims]
            query, key = query * counts, key * counts
            pairs = [(query.sum(gone), key.sum(gone)) if gone else (query, key) for gone in others]
        return max(abs(self.factor) * largest(left @ right.mT) for left, right in pairs)

    @functools.cached_property
    def magnitude(self) -> float:
        """Largest absolute value."""
        return largest(self.value)

    def replace(self, **changes: Any) -> Case:
        """Return the same case with other arguments.

        Args:
            **changes: Attributes by name.
        """
        return dataclasses.replace(self, **changes)

    def at_most(self, logit: float) -> Case:
        """Return the case with its scale taken back to where no logit is larger.

        Args:
            logit: Largest logit.
        """
        return self if self.logit <= logit else self.replace(scale=self.factor * logit / self.logit)

    def given(self, **how: Any) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
        """Return the tensors of the case, and what else an operator takes.

        Args:
            **how: More arguments, or others.
        """
        named = {"order": self.order, "scale": self.scale, "weights": self.weights}
        return (self.query, self.key, self.value), {**named, **how}

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
        return torch.ones(shape, dtype=torch.float64) if given is None else exact(given).expand(shape)

    def all_weights(self) -> list[Tensor] | None:
        """Return the weights of all modes in float64 on the CPU, or None where there are none."""
        return None if self.weights is None else [self.mode_weights(mode) for mode in range(self.order)]

    def position_weights(self) -> Tensor:
        """Return the weight of every position, as float64 ``(*batch, n_1, …, n_N)``."""
        return one_a_mode([self.mode_weights(mode).unsqueeze(-1) for mode in range(self.order)], torch.mul).squeeze(-1)

    def for_queries(self, tensor: Tensor) -> Tensor:
        """Give ``(*batch, D)``, whatever sizes of 1 it has between, a dimension for each of the query's positions.

        Args:
            tensor: What all queries of a batch entry share.
        """
        return tensor.reshape(*self.batch, *(1 for _ in self.positions), tensor.shape[-1])

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
    return tensor.stride() == torch.empty(tensor.shape, device="meta").stride()


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


def one_a_mode(terms: Sequence[Tensor], join: Any = torch.add) -> Tensor:
    """Join one term a mode into a tensor, by plain broadcasting.

    Args:
        terms: For each mode a tensor ``(*batch, n_m, D)``.
        join: What joins two of them, by default their sum.
    """
    order = len(terms)
    spread = (
        term.reshape(*term.shape[:-2], *(term.shape[-2] if m == mode else 1 for m in range(order)), term.shape[-1])
        for mode, term in enumerate(terms)
    )
    return functools.reduce(join, spread)


@st.composite
def layouts(draw: DrawFn, tensor: Tensor) -> Tensor:
    """Draw a layout in memory for a tensor: dense, channels first, permuted, or every second slice of a wider one.

    What is skipped is NaN.

    Args:
        draw: Source of choices.
        tensor: Any tensor.
    """
    dims = list(range(tensor.dim()))
    kind = draw(st.sampled_from(["dense", "channels first", "permuted", "sliced"])) if dims else "dense"
    if kind == "dense":
        return tensor
    if kind == "channels first":
        dims.insert(draw(st.integers(0, len(dims) - 1)), dims.pop())
    elif kind == "permuted":
        dims = draw(st.permutations(dims))
    sliced = draw(st.sampled_from(dims)) if kind == "sliced" else None
    wide = [tensor.shape[dim] * (1 + (dim == sliced)) for dim in dims]
    step = [slice(None, None, 2) if dim == sliced else slice(None) for dim in dims]
    view = tensor.new_full(wide, math.nan)[tuple(step)].permute([dims.index(dim) for dim in range(len(dims))])
    return view.copy_(tensor)


@st.composite
def mode_sizes(
    draw: DrawFn, *, order: int | None = None, max_order: int = 4, max_size: int = 6, max_positions: int = 64
) -> Sizes:
    """Draw the sizes of the modes of a grid.

    Args:
        draw: Source of choices.
        order: Number of modes; by default drawn, from 1 to ``max_order``.
        max_order: Largest number of modes.
        max_size: Largest size of a mode.
        max_positions: Largest number of positions.

    Examples:
        >>> from hypothesis import find
        >>> find(mode_sizes(), lambda sizes: len(sizes) == 3 and sizes[1] > 1)
        (1, 2, 1)
    """
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
    """
    return st.integers(0, max_dims).flatmap(lambda dims: st.tuples(*[st.integers(1, max_size)] * dims))


def mode_partitions(order: int) -> SearchStrategy[tuple[Sizes, ...]]:
    """Draw a partition of the modes into groups, each an ascending tuple of modes.

    Args:
        order: Number of modes N.

    Examples:
        >>> from hypothesis import find
        >>> find(mode_partitions(3), lambda groups: len(groups) == 2)
        ((0, 1), (2,))
    """
    labels = st.tuples(*(st.integers(0, order - 1) for _ in range(order)))
    return labels.map(lambda drawn: tuple(tuple(m for m in range(order) if drawn[m] == g) for g in sorted({*drawn})))


@st.composite
def tensors(
    draw: DrawFn,
    shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    stream: int = 0,
) -> Tensor:
    """Draw a tensor of normal numbers around a common mean, in any memory layout.

    Args:
        draw: Source of choices.
        shape: Its shape.
        dtype: Its type.
        device: Its device.
        stream: Number of its random stream. Tensors of different streams differ where Hypothesis draws equal seeds.

    Examples:
        >>> from hypothesis import find
        >>> find(tensors((2, 3, 4)), lambda tensor: not tensor.is_contiguous()).shape
        torch.Size([2, 3, 4])
    """
    generator = draw(generators(stream))
    mean = numbers(generator, shape[-1:])
    return draw(layouts((numbers(generator, shape) + mean).to(device, dtype)))


@st.composite
def additive_tensors(
    draw: DrawFn,
    sizes: Sequence[int],
    *,
    batch: Sequence[int] = (),
    dim: int = 3,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    stream: int = 0,
) -> Tensor:
    """Draw a tensor that is a sum of one term a mode.

    Args:
        draw: Source of choices.
        sizes: Sizes of the modes.
        batch: Batch dimensions.
        dim: Channels D.
        dtype: Its type.
        device: Its device.
        stream: Number of its random stream.

    Examples:
        >>> from hypothesis import given
        >>> import tensorattn as ta
        >>> @given(additive_tensors((2, 3, 4)))
        ... def is_its_own_additive_part(tensor):
        ...     assert torch.allclose(ta.additive_part(tensor, order=3), tensor)
        >>> is_its_own_additive_part()
    """
    generator = draw(generators(stream))
    terms = [numbers(generator, (*batch, size, dim), dtype, addable=True) for size in sizes]
    return draw(layouts(one_a_mode(terms).to(device, dtype)))


@st.composite
def tensor_normals(
    draw: DrawFn,
    sizes: Sequence[int],
    *,
    batch: Sequence[int] = (),
    dim: int = 3,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    stream: int = 0,
) -> Tensor:
    r"""Draw a sample of a tensor-normal law that is additive with probability one, or of a sum of such laws.

    The covariance of the law over mode m and channels is any :math:`\Sigma_m \otimes \Sigma_c`; over every other mode
    it is the all-ones matrix :math:`11^\top`, perfect correlation, so that the sample is constant along it. One such
    term for each of some modes, and an additive mean, are added up.

    Args:
        draw: Source of choices.
        sizes: Sizes of the modes.
        batch: Batch dimensions.
        dim: Channels D.
        dtype: Its type, float64 or float32.
        device: Its device.
        stream: Number of its random stream.

    Examples:
        >>> from hypothesis import given
        >>> import tensorattn as ta
        >>> @given(tensor_normals((4, 3)))
        ... def has_no_interaction(sample):
        ...     assert ta.interaction_residual(sample, order=2).abs().max() < 1e-12
        >>> has_no_interaction()
    """
    generator = draw(generators(stream))
    terms = [numbers(generator, (*batch, size, dim)) for size in sizes]
    for mode in sorted(draw(st.sets(st.integers(0, len(sizes) - 1), min_size=1))):
        # Each covariance Σ = L Lᵀ of the mode and of the channels; along the other modes L is one column of ones.
        noise = numbers(generator, (*batch, sizes[mode], dim)) @ numbers(generator, (dim, dim)).mT
        terms[mode] = terms[mode] + numbers(generator, (sizes[mode], sizes[mode])) @ noise
    return draw(layouts(one_a_mode(terms).to(device, dtype)))


@st.composite
def queries(
    draw: DrawFn,
    sizes: Sequence[int],
    *,
    batch: Sequence[int] = (),
    dim: int = 3,
    on_grid: bool = False,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    stream: int = 0,
) -> Tensor:
    """Draw queries: one a batch entry, a list of tokens, another grid, or the grid of the keys.

    Args:
        draw: Source of choices.
        sizes: Sizes of the modes of the keys.
        batch: Batch dimensions.
        dim: Channels D.
        on_grid: Whether they must lie on the grid of the keys.
        dtype: Their type.
        device: Their device.
        stream: Number of their random stream.

    Examples:
        >>> from hypothesis import find
        >>> find(queries((2, 3), dim=4, on_grid=True), lambda query: True).shape
        torch.Size([2, 3, 4])
    """
    positions = tuple(sizes) if on_grid else draw(st.just(tuple(sizes)) | batch_sizes(max_dims=3))
    return draw(tensors((*batch, *positions, dim), dtype=dtype, device=device, stream=stream))


@st.composite
def weights(
    draw: DrawFn,
    sizes: Sequence[int],
    *,
    batch: Sequence[int] = (),
    integer: bool = False,
    empty: bool = False,
    device: torch.device | str = "cpu",
) -> Weights:
    """Draw position weights: none at all, or for each mode none or a vector with zeros, for all or a part of the batch.

    Real weights are multiples of 1/8, which every type represents exactly.

    Args:
        draw: Source of choices.
        sizes: Sizes of the modes.
        batch: Batch dimensions.
        integer: Whether they must be whole numbers; they are then integers, booleans or floats.
        empty: Whether a batch entry may have only zeros in a mode, so that no position of it is present.
        device: Their device.

    Examples:
        >>> from hypothesis import find
        >>> rows, columns = find(weights((2, 3)), lambda drawn: drawn is not None and drawn[1] is not None)
        >>> rows, columns.shape
        (None, torch.Size([3]))
    """
    floating = torch.float32 if torch.device(device).type == "mps" else torch.float64

    def of_mode(size: int) -> Tensor | None:
        dtype = draw(st.sampled_from([None, torch.int64, torch.bool, floating]))
        if dtype is None:
            return None
        dims = draw(st.integers(0, len(batch)))
        shape = [n if draw(st.booleans()) else 1 for n in batch[len(batch) - dims :]]
        generator = draw(generators())
        drawn = torch.randint(0, 4, (*shape, size), generator=generator)  # a quarter of zeros
        present = torch.randint(0, size, (*shape, 1), generator=generator)
        drawn = drawn.scatter(-1, present, drawn.gather(-1, present).clamp(min=1))
        if empty and dims:
            absent = torch.randint(0, 2, (*shape, 1), generator=generator) == 1
            absent.reshape(-1)[0] = False  # all zero for the whole batch is an error
            drawn = drawn.where(~absent, 0)
        if not integer and dtype.is_floating_point:
            return (drawn * (torch.randint(1, 17, drawn.shape, generator=generator) / 8)).to(device, dtype)
        return drawn.to(device, dtype)

    return None if draw(st.integers(0, 3)) == 0 else tuple(of_mode(size) for size in sizes)


@st.composite
def masks(
    draw: DrawFn, sizes: Sequence[int], *, batch: Sequence[int] = (), device: torch.device | str = "cpu"
) -> Tensor:
    """Draw which positions take part: leading indices, a product over modes, or any; at times none of an entry.

    Args:
        draw: Source of choices.
        sizes: Sizes of the modes.
        batch: Batch dimensions; some masks are shared by them.
        device: Their device.

    Examples:
        >>> from hypothesis import find
        >>> find(masks((2, 3)), lambda mask: not mask.all()).shape
        torch.Size([2, 3])
    """
    kind, generator = draw(st.sampled_from(["lengths", "product", "any"])), draw(generators(40))
    shared = tuple(batch) if draw(st.booleans()) else ()
    if kind == "any":
        there = torch.rand((*shared, *sizes), generator=generator) < draw(st.sampled_from([0.2, 0.5, 0.9]))
        return there.to(device)
    parts = []
    for size in sizes:
        length = torch.randint(0, size + 1, (*shared, 1), generator=generator).clamp(min=draw(st.integers(0, 1)))
        seen = (
            torch.arange(size) < length if kind == "lengths" else torch.rand(*shared, size, generator=generator) < 0.7
        )
        parts.append(seen.unsqueeze(-1))
    return one_a_mode(parts, torch.logical_and).squeeze(-1).to(device)


@st.composite
def biases(
    draw: DrawFn,
    sizes: Sequence[int],
    positions: Sequence[int],
    *,
    batch: Sequence[int] = (),
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> list[Tensor | None]:
    """Draw for each mode no bias, or terms for each place of the query and index; minus infinity hides, at times all.

    Args:
        draw: Source of choices.
        sizes: Sizes of the modes of the keys.
        positions: Sizes of the modes of the queries.
        batch: Batch dimensions; some terms differ between batch entries.
        dtype: Their type.
        device: Their device.

    Examples:
        >>> from hypothesis import find
        >>> (table,) = find(biases((3,), (2,)), lambda drawn: drawn[0] is not None)
        >>> table.shape
        torch.Size([2, 3])
    """
    found: list[Tensor | None] = []
    for mode, (places, size) in enumerate(zip(positions, sizes, strict=True)):
        kind = draw(st.sampled_from(["none", "table", "window", "batched"]))
        if kind == "none":
            found.append(None)
            continue
        table = numbers(draw(generators(30 + mode)), (*(batch if kind == "batched" else ()), places, size), dtype)
        if kind == "window":
            distance = torch.arange(places)[:, None] - torch.arange(size)
            table = table.masked_fill(distance.abs() > draw(st.integers(-1, size)), -math.inf)
        found.append(table.to(device))
    return found


@st.composite
def cases(
    draw: DrawFn,
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
) -> Case:
    """Draw the arguments of one call of an operator.

    Args:
        draw: Source of choices.
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

    Examples:
        >>> from hypothesis import find
        >>> find(cases(order=2), lambda case: case.sizes[1] > 1 and case.query.dim() > 1)
        Case(batch=(), sizes=(1, 2), positions=(1, 2), D=1, D_v=1, scale=None, weights=None, torch.float64)
    """
    batch = draw(batch_sizes())
    order = draw(st.integers(min_order, max(min_order, 4))) if order is None else order
    sizes = draw(mode_sizes(order=order, max_positions=max(1, max_positions // math.prod(batch))))
    dim, value_dim = draw(st.integers(1, max_dim)), draw(st.integers(1, max_dim))
    how: dict[str, Any] = {"dtype": dtype, "device": device}

    def grid(channels: int, stream: int) -> Tensor:
        if additive:
            return draw(additive_tensors(sizes, batch=batch, dim=channels, stream=stream, **how))
        return draw(tensors((*batch, *sizes, channels), stream=stream, **how))

    query = draw(queries(sizes, batch=batch, dim=dim, on_grid=on_grid, **how))
    key, value = grid(dim, 1), grid(value_dim, 2)
    given = draw(weights(sizes, batch=batch, integer=integer, empty=empty, device=device)) if weighted else None
    exponent = draw(st.none() | st.floats(-2, 0.5) | st.floats(0.5, 1))
    scale = None if exponent is None else 10**exponent
    case = Case(query, key, value, len(sizes), scale, given, on_grid, pooled)
    return case.at_most(LARGEST_LOGIT.get(dtype, 1.0))  # beyond, the type has no digits
