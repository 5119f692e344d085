"""Timing: calls run in turn, so that whatever else the machine does meets all of them alike; medians."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

__all__ = ["Timed", "interleaved", "on_threads"]

LEAST = 3  # samples of a call, however long it takes
PATIENCE = 3.0  # seconds of a call after which it is sampled no more than that
SHORTEST = 2e-3  # seconds of a sample; shorter calls are repeated within it
MOST_CALLS = 100  # within a sample
TRIES = 4  # samples on several threads are taken up to this many times as often, until enough are undisturbed
DISTURBED = 0.03  # share of a sample that threads may wait for a processor


class Timed(NamedTuple):
    """Seconds of a call.

    Attributes:
        median: The median of its samples.
        quartiles: First and third quartile.
        samples: How many there are.
        undisturbed: Whether no thread waited for a processor in them, as far as the system tells.
    """

    median: float
    quartiles: tuple[float, float]
    samples: int
    undisturbed: bool


@dataclass
class _Samples:
    """Samples of a call, those apart in which threads had to wait for a processor."""

    calls: int = 1
    clean: list[float] = field(default_factory=list)
    disturbed: list[float] = field(default_factory=list)

    def wanting(self, repeats: int) -> bool:
        """Tell whether more are wanted."""
        taken = len(self.clean) + len(self.disturbed)
        if taken >= LEAST and self.calls * (sum(self.clean) + sum(self.disturbed)) > PATIENCE:
            return False
        return len(self.clean) < repeats and taken < TRIES * repeats

    def summary(self) -> Timed:
        """Take the median and quartiles of the clean ones; of all, where these are too few."""
        enough = len(self.clean) >= min(LEAST, len(self.clean) + len(self.disturbed))
        samples = self.clean if enough else self.clean + self.disturbed
        if len(samples) == 1:
            return Timed(samples[0], (samples[0], samples[0]), 1, enough)
        first, middle, third = statistics.quantiles(samples, n=4, method="inclusive")
        return Timed(middle, (first, third), len(samples), enough)


def interleaved(
    calls: Mapping[str, Callable[[], Any]],
    *,
    repeats: int,
    threads: int,
    before: Callable[[], object] = lambda: None,
) -> dict[str, Timed]:
    """Time calls in turn: one sample of each, then again.

    With one thread it is the CPU time of the thread, which waiting for a processor does not enter; with several it is
    the wall clock, and samples in which a thread waited are taken again, whatever time they show. The first run of each
    call does not count. A result is let go before the next call.

    Args:
        calls: What to time, by name.
        repeats: Samples of each; fewer of what takes long.
        threads: Threads that torch uses.
        before: Called before every sample, so that all find the caches alike.

    Returns:
        Seconds of each call.

    Examples:
        >>> interleaved({"nothing": lambda: None}, repeats=5, threads=1)["nothing"].samples
        5
    """
    clock = time.thread_time if threads == 1 else time.perf_counter
    known = {name: _Samples() for name in calls}
    with on_threads(threads):
        for name, call in calls.items():
            call()
            start = clock()
            call()
            known[name].calls = min(MOST_CALLS, math.ceil(SHORTEST / max(clock() - start, 1e-7)))
        while wanting := [name for name, samples in known.items() if samples.wanting(repeats)]:
            for name in wanting:
                before()
                _sample(calls[name], known[name], clock, alone=threads == 1)
    return {name: samples.summary() for name, samples in known.items()}


@contextlib.contextmanager
def on_threads(count: int) -> Iterator[None]:
    """Let torch use a number of threads for a while.

    Args:
        count: The number.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _sample(call: Callable[[], Any], known: _Samples, clock: Callable[[], float], *, alone: bool) -> None:
    """Take one sample."""
    waited, start = 0.0 if alone else _waited(), clock()
    for _ in range(known.calls):
        result = call()
        del result
    seconds = clock() - start
    clean = alone or _waited() - waited <= DISTURBED * seconds
    (known.clean if clean else known.disturbed).append(seconds / known.calls)


def _waited() -> float:
    """Seconds that the threads of this process have waited for a processor; 0 where the system does not tell."""
    nanoseconds = 0
    for task in Path("/proc/self/task").glob("*/schedstat"):
        try:
            nanoseconds += int(task.read_text().split()[1])
        except (OSError, IndexError):  # the thread has ended
            continue
    return nanoseconds / 1e9
