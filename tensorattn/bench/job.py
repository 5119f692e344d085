"""Job: one contender set to work on one tensor; it is checked, and then timed."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorattn.averages import mode_averages, outer_sum
from tensorattn.bench.workload import DTYPES, Workload

__all__ = ["AveragesJob", "Job", "LayerJob", "OuterSumJob", "Parity", "SomeQueriesJob", "UnitJob", "distance"]

PROBES = 12  # positions at which outputs are compared
TOLERANCES = {"float64": 1e-9, "float32": 1e-3, "bfloat16": 3e-2, "float16": 1e-2}  # of the largest entry

Expected = Callable[[Tensor, Mapping[str, Tensor], Tensor], Tensor]  # from input, parameters and positions, in float64


class Parity(NamedTuple):
    """How far a contender is from what it should return.

    Attributes:
        error: Largest error of outputs and gradients, as a share of the largest entry.
        tolerance: What rounding in the type may cause.
    """

    error: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether it returns what it should."""
        return self.error <= self.tolerance  # not of a NaN


class Job(ABC):
    """A contender with all that it works on.

    Attributes:
        share: Part of the work that a run does; 1 for nearly all.
    """

    share = 1.0

    def __init__(self, workload: Workload, x: Tensor) -> None:
        self.workload, self.x = workload, x

    @abstractmethod
    def run(self) -> Any:
        """Do what is timed."""

    @abstractmethod
    def check(self) -> Parity:
        """Compare with float64."""

    @property
    @abstractmethod
    def results(self) -> int:
        """Bytes of what it returns and leaves behind."""


def distance(found: Tensor, expected: Tensor) -> float:
    """Largest difference, as a share of the largest entry that is expected.

    Args:
        found: What was computed.
        expected: What it should be, of the same shape.

    Returns:
        The share; not a number where something found is not, infinite for a wrong shape.
    """
    if found.shape != expected.shape:
        return math.inf
    size = expected.abs().max().item()
    error = (found.detach().double() - expected).abs().max().item()
    return error if size == 0 else error / size


def probes(sizes: Sequence[int], seed: int) -> Tensor:
    """Draw positions, the first and the last one among them, each once: indices ``(L, N)``."""
    generator = torch.Generator().manual_seed(seed)
    some = torch.stack([torch.randint(size, (PROBES,), generator=generator) for size in sizes], -1)
    ends = torch.tensor([[0] * len(sizes), [size - 1 for size in sizes]])
    return torch.unique(torch.cat([ends, some]), dim=0)


class UnitJob(Job):
    """One read, or one copy: what every other time is compared with."""

    def __init__(self, workload: Workload, x: Tensor, kind: str) -> None:
        super().__init__(workload, x)
        buffer = torch.empty_like(x) if kind == "copy" else None
        calls: dict[str, Callable[[], Tensor]] = {
            "read": x.sum,
            "copy": lambda: x if buffer is None else buffer.copy_(x),
            "fresh copy": lambda: torch.empty_like(x).copy_(x),
        }
        self.call = calls[kind]

    def run(self) -> Tensor:
        """Read or copy."""
        with torch.no_grad():
            return self.call()

    def check(self) -> Parity:
        """There is nothing to compare."""
        return Parity(0.0, 0.0)

    @property
    def results(self) -> int:
        """A copy is as large as the tensor."""
        return self.x.nbytes


class AveragesJob(Job):
    """All mode averages, in float32 for half precision."""

    def run(self) -> tuple[Tensor, ...]:
        """Average."""
        dtype = torch.float32 if self.x.dtype.itemsize < 4 else self.x.dtype
        return mode_averages(last(self.x, self.workload), order=self.workload.order, dtype=dtype)

    def check(self) -> Parity:
        """Compare with plain means in float64; half precision is accumulated in float32, and held to that."""
        x = last(self.x, self.workload).double()
        order = self.workload.order
        expected = [x.mean([1 + k for k in range(order) if k != mode]) if order > 1 else x for mode in range(order)]
        errors = map(distance, self.run(), expected)
        return Parity(max(errors), TOLERANCES["float64" if self.x.dtype == torch.float64 else "float32"])

    @property
    def results(self) -> int:
        """Bytes of the averages."""
        work = self.workload
        return work.batch * sum(work.sizes) * work.dim * max(4, self.x.dtype.itemsize)


class OuterSumJob(Job):
    """The outer sum of one vector a mode, with a skip connection or without."""

    def __init__(self, workload: Workload, x: Tensor) -> None:
        super().__init__(workload, x)
        generator = torch.Generator().manual_seed(1)
        shapes = [(workload.batch, size, workload.dim) for size in workload.sizes]
        self.vectors = [torch.randn(shape, generator=generator).to(x.dtype) for shape in shapes]
        self.out = last(torch.empty_like(x).fill_(0), workload) if workload.into else None

    def run(self) -> Tensor:
        """Add up."""
        skip = last(self.x, self.workload) if self.workload.skip else None
        with torch.no_grad():
            return outer_sum(self.vectors, skip=skip, out=self.out)

    def check(self) -> Parity:
        """Compare with a plain broadcast sum in float64."""
        expected = last(self.x, self.workload).double() if self.workload.skip else torch.zeros((), dtype=torch.float64)
        for mode, vector in enumerate(self.vectors):
            ones = [1 if k != mode else size for k, size in enumerate(self.workload.sizes)]
            expected = expected + vector.double().reshape(self.workload.batch, *ones, self.workload.dim)
        return Parity(distance(self.run(), expected), TOLERANCES[self.workload.dtype])

    @property
    def results(self) -> int:
        """Bytes of the sum."""
        return 0 if self.workload.into else self.x.nbytes


class SomeQueriesJob(Job):
    """Attention among all positions by the fused kernel, from some of them only; without projections, in its favour."""

    share = 1 / 64

    def __init__(self, workload: Workload, x: Tensor) -> None:
        super().__init__(workload, x)
        tokens = last(x, workload).flatten(1, -2).unflatten(-1, (workload.heads, -1)).transpose(1, 2).contiguous()
        self.query, self.key = tokens[:, :, :: round(1 / self.share)].contiguous(), tokens

    def run(self) -> Tensor:
        """Attend."""
        with torch.no_grad():
            return F.scaled_dot_product_attention(self.query, self.key, self.key)

    def check(self) -> Parity:
        """Compare a few queries with float64."""
        query, key = (tensor.double() for tensor in (self.query[:, :, :PROBES], self.key))
        expected = torch.softmax(query @ key.mT * query.shape[-1] ** -0.5, -1) @ key
        return Parity(distance(self.run()[:, :, :PROBES], expected), TOLERANCES[self.workload.dtype])

    @property
    def results(self) -> int:
        """Bytes of the output."""
        return self.query.nbytes


class LayerJob(Job):
    """A layer with parameters, forwards, or forwards and backwards.

    Args:
        workload: What is done.
        x: The input, as the layer takes it.
        layer: The layer.
        expected: Its definition.
        fuses: Whether the layer takes ``skip`` and ``out`` itself.
        compiled: Whether the layer is compiled.
    """

    def __init__(
        self,
        workload: Workload,
        x: Tensor,
        layer: nn.Module,
        expected: Expected,
        *,
        fuses: bool,
        compiled: bool = False,
    ) -> None:
        super().__init__(workload, x.detach().requires_grad_(workload.backward))
        self.layer, self.expected = layer.to(DTYPES[workload.dtype]), expected
        self.call: Callable[..., Tensor] = torch.compile(self.layer) if compiled else self.layer
        self.extra: dict[str, Tensor] = {}
        if fuses and workload.skip:
            self.extra["skip"] = self.x
        if fuses and workload.into:
            self.extra["out"] = torch.empty_like(x).fill_(0)  # touched, so that its memory is there
        self.adds = workload.skip and not fuses
        self.gradient = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(x.dtype)

    def run(self) -> Tensor:
        """Run the layer, and its backward pass if asked for."""
        return self._run(self.gradient)

    def _run(self, gradient: Tensor) -> Tensor:
        """Run; gradients are those of the output's inner product with a tensor."""
        self.x.grad = None
        self.layer.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(self.workload.backward):
            y = self.call(self.x, **self.extra)
            y = y + self.x if self.adds else y
            if self.workload.backward:
                y.backward(gradient)
        return y

    def check(self) -> Parity:
        """Compare outputs at some positions, and all gradients of what depends on these, with float64."""
        work = self.workload
        index = probes(work.sizes, seed=3)
        places: Any = (slice(None), *index.unbind(-1))
        weight = torch.zeros_like(self.gradient)
        last(weight, work)[places] = last(self.gradient, work)[places]
        found = last(self._run(weight).detach(), work)[places]
        x = last(self.x.detach(), work).double().requires_grad_(work.backward)
        parameters = {
            name: parameter.detach().double().requires_grad_(work.backward)
            for name, parameter in self.layer.named_parameters()
        }
        with torch.set_grad_enabled(work.backward):
            expected = self.expected(x, parameters, index)
            expected = expected + x[places] if work.skip else expected
        errors = [distance(found, expected.detach())]
        if work.backward:
            expected.backward(last(weight, work)[places].double())
            errors += self._gradient_errors(x, parameters, places)
        self.x.grad = None
        self.layer.zero_grad(set_to_none=True)
        return Parity(max(errors, key=lambda error: (math.isnan(error), error)), TOLERANCES[work.dtype])

    def _gradient_errors(self, x: Tensor, parameters: Mapping[str, Tensor], places: Any) -> list[float]:
        """Compare gradients of the input, at the positions and elsewhere, and of all parameters."""
        assert self.x.grad is not None and x.grad is not None
        of_input = [last(self.x.grad, self.workload).clone(), x.grad]
        errors = [distance(*(gradient[places] for gradient in of_input))]
        for gradient in of_input:
            gradient[places] = 0
        errors.append(distance(*of_input))
        pairs = [
            (torch.zeros_like(p) if p.grad is None else p.grad, e.grad if e.grad is not None else torch.zeros_like(e))
            for p, e in zip(self.layer.parameters(), parameters.values(), strict=True)
        ]
        return [*errors, distance(*(torch.cat([part.flatten() for part in side]) for side in zip(*pairs, strict=True)))]

    @property
    def results(self) -> int:
        """Bytes of the output, and of the gradients of input and parameters."""
        output = 0 if "out" in self.extra else self.x.nbytes
        given = self.x.nbytes + sum(parameter.nbytes for parameter in self.layer.parameters())
        return output + (given if self.workload.backward else 0)


def last(x: Tensor, workload: Workload) -> Tensor:
    """View a tensor with its channels last.

    Args:
        x: Tensor in the layout of the workload.
        workload: What it is of.
    """
    return x.movedim(1, -1) if workload.channels_first else x
