"""Timing: calls run in turn, so that whatever else the machine does meets all of them alike; medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

__all__ = ["Timed", "interleaved"]

LEAST = 3  # samples of a call, however long it takes
PATIENCE = 4.0  # seconds of a call after which it is sampled no more than that


class Timed(NamedTuple):
    """Seconds of a call.

    Attributes:
        median: The median of its samples.
        quartiles: First and third quartile.
        samples: How many there are.
    """

    median: float
    quartiles: tuple[float, float]
    samples: int


def interleaved(
    calls: Mapping[str, Callable[[], Any]], *, repeats: int, threads: int, progress: Callable[[], object] = lambda: None
) -> dict[str, Timed]:
    """Time calls in turn: one sample of each, then again.

    With one thread it is the CPU time of the thread, which waiting for the machine does not enter; with several it is
    the wall clock. The first sample of each call does not count. A result is let go before the next call.

    Args:
        calls: What to time, by name.
        repeats: Samples of each.
        threads: Threads that torch uses.
        progress: Called after every sample.

    Returns:
        Seconds of each call.

    Examples:
        >>> interleaved({"nothing": lambda: None}, repeats=5, threads=1)["nothing"].samples
        5
    """
    clock = time.thread_time if threads == 1 else time.perf_counter
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    try:
        for _ in range(repeats + 1):
            for name, call in calls.items():
                known = samples[name]
                if len(known) <= LEAST or sum(known) < PATIENCE:
                    start = clock()
                    result = call()
                    known.append(clock() - start)
                    del result
                progress()
    finally:
        torch.set_num_threads(before)
    return {name: _summary(known[1:]) for name, known in samples.items()}


def _summary(samples: list[float]) -> Timed:
    """Median and quartiles."""
    if len(samples) == 1:
        return Timed(samples[0], (samples[0], samples[0]), 1)
    first, middle, third = statistics.quantiles(samples, n=4, method="inclusive")
    return Timed(middle, (first, third), len(samples))
