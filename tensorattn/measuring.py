"""Measuring a call: operations counted on the meta device, CPU time, and the memory that it takes at its peak."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

__all__ = ["PeakMemory", "Spent", "count_flops", "measure"]

ENOUGH_SECONDS = 0.3  # calls are repeated up to this much CPU time, and at most REPEATS times
REPEATS = 5

aten = torch.ops.aten
MOVES = {aten.clone, aten.alias, aten.detach, aten.fill, aten.zero}  # tagged pointwise, but they compute nothing
VECTOR_PRODUCTS = {aten.mv, aten.addmv, aten.dot}  # the registry knows products of matrices only
REDUCTIONS = {aten.sum, aten.mean, aten.amax, aten.amin, aten.logsumexp, aten.var, aten.cumsum, aten.logcumsumexp}
SOFTMAX = {aten._softmax, aten._safe_softmax, aten._log_softmax}
SOFTMAX_FLOPS = 5  # an element: maximum, difference, exponential, sum, quotient


class Spent(NamedTuple):
    """What one call took.

    Attributes:
        seconds: CPU time, the median of the calls.
        peak_bytes: Most memory held at once beyond what was held before the call, its result included; None where
            the system does not tell.
    """

    seconds: float
    peak_bytes: int | None


class _FlopCount(TorchDispatchMode):
    """Counts the operations of the tensor functions called inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one primitive function and add up what it computes."""
        kwargs = kwargs or {}
        packet = func._overloadpacket
        if packet not in flop_registry:
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=out)
        elif packet in VECTOR_PRODUCTS:
            self.flops += 2 * _largest(args)
        elif packet in SOFTMAX:
            self.flops += SOFTMAX_FLOPS * _largest(out)
        elif packet in REDUCTIONS:
            self.flops += _largest(args)
        elif torch.Tag.pointwise in func.tags and packet not in MOVES:
            self.flops += _largest(out)
        return out


def _largest(values: Any) -> int:
    """Return the number of elements of the largest tensor among some values."""
    return max((leaf.numel() for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)), default=0)


def count_flops(function: Callable[..., Any], *tensors: torch.Tensor, **options: Any) -> int:
    """Count the operations of a call from the sizes of its tensors, without computing anything.

    Matrix products count two operations a multiply-add. Everything else counts too, so that averages, softmax and
    outer sums are included: one operation an element written by an elementwise function, one an element read by a
    sum or a mean, five an element of a softmax. The call runs on the meta device, where no kernel hides its inside.

    Args:
        function: What to call.
        *tensors: Tensors of any device; only shapes, strides and types are used.
        **options: Passed on; tensors among them are moved to the meta device too.

    Returns:
        The number of operations.

    Examples:
        >>> count_flops(torch.matmul, torch.ones(3, 5), torch.ones(5, 7))
        210
        >>> count_flops(torch.softmax, torch.ones(3, 5), dim=-1)
        75
    """
    shapes = [tensor.detach().to("meta") for tensor in tensors]
    options = {
        name: option.to("meta") if isinstance(option, torch.Tensor) else option for name, option in options.items()
    }
    with torch.no_grad(), _FlopCount() as counted:
        function(*shapes, **options)
    return counted.flops


class PeakMemory:
    """Measures the most memory that the process holds at once, above what it held at the start.

    On Linux the kernel keeps the high-water mark of resident memory and resets it on request
    (``/proc/self/clear_refs``), so buffers of every library count, whether Python knows them or not. Free memory is
    handed back to the system first: otherwise the call would reuse it unseen. Elsewhere ``bytes`` stays None.
    """

    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def __init__(self) -> None:
        self.bytes: int | None = None
        self._before: int | None = None

    def __enter__(self) -> Self:
        try:
            ctypes.CDLL(None).malloc_trim(0)
        except (OSError, AttributeError, TypeError):
            return self
        try:
            self.reset.write_text("5")
            self._before = self._read("VmRSS")
        except OSError:
            self._before = None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        highest = None if self._before is None else self._read("VmHWM")
        self.bytes = None if self._before is None or highest is None else max(0, highest - self._before)

    def _read(self, field: str) -> int | None:
        """Return one line of the status of the process, in bytes."""
        for line in self.status.read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
        return None


def measure(call: Callable[[], Any]) -> tuple[Any, Spent]:
    """Call a function a few times on one thread, and return its result, its CPU time and its peak memory.

    One thread, because threads that wait for each other burn CPU time, the more the busier the machine is. A call of
    less than 0.3 seconds is repeated, up to five times, after a first one that does not count: it also loads code and
    fills caches.

    Args:
        call: What to call.

    Returns:
        The result of the last call, and what a call took.

    Examples:
        >>> result, spent = measure(lambda: torch.ones(8).sum())
        >>> float(result), spent.seconds < 1
        (8.0, True)
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        result, seconds, peak = _once(call)
        timed = [seconds]
        while sum(timed) < ENOUGH_SECONDS and len(timed) <= REPEATS:
            result = None  # let go of the result before, or two would be held at once
            start = time.process_time()
            result = call()
            timed.append(time.process_time() - start)
        if len(timed) > 1:  # the first call warmed up, for time and for memory
            result, timed = None, timed[1:]
            result, _, peak = _once(call)
    finally:
        torch.set_num_threads(threads)
    return result, Spent(statistics.median(timed), peak)


def _once(call: Callable[[], Any]) -> tuple[Any, float, int | None]:
    """Call a function once; return its result, CPU time and peak memory."""
    with PeakMemory() as memory:
        start = time.process_time()
        result = call()
        seconds = time.process_time() - start
    return result, seconds, memory.bytes
