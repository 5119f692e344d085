"""Examination of a workload: parity of every contender first, then their times in turn, then their memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from tensorattn.bench.contenders import UNITS, Contender
from tensorattn.bench.job import Job, Parity
from tensorattn.bench.peak import Peak, peaks
from tensorattn.bench.timing import Timed, interleaved, on_threads
from tensorattn.bench.workload import Workload
from tensorattn.cost import cost

__all__ = ["Row", "examine", "predicted"]


@dataclass(frozen=True)
class Row:
    """What became of one contender on one workload.

    Attributes:
        workload: The workload.
        name: The contender.
        threads: Threads that it ran on.
        parity: How far it is from its definition; None if it did not run.
        timed: Its time; None unless parity holds.
        units: Seconds of one read, one copy and one fresh copy in the same run.
        share: Part of the work that was run; the time is that of all of it.
        peak: Its memory, if it was measured.
        predicted: Peak memory that `cost` predicts, for operators of this package.
        note: Why something is missing.
    """

    workload: Workload
    name: str
    threads: int
    parity: Parity | None = None
    timed: Timed | None = None
    units: tuple[float, float, float] = (math.nan, math.nan, math.nan)
    share: float = 1.0
    peak: Peak | None = None
    predicted: int | None = None
    note: str = ""

    @property
    def seconds(self) -> float:
        """Seconds of the whole work; not a number where there is no time."""
        return math.nan if self.timed is None else self.timed.median / self.share

    def ratio(self, unit: int) -> float:
        """Return the time in units.

        Args:
            unit: 0 for one read, 1 for one copy, 2 for one fresh copy.
        """
        return self.seconds / self.units[unit]


def examine(
    workload: Workload,
    contenders: Sequence[Contender],
    *,
    threads: Sequence[int] = (1,),
    repeats: int = 7,
    memory: bool = True,
    started: Callable[[str], object] = lambda words: None,
) -> list[Row]:
    """Check, time and measure contenders on one workload.

    Args:
        workload: The workload.
        contenders: Who works on it.
        threads: Numbers of threads, one after the other.
        repeats: Samples of each time.
        memory: Whether peak memory is measured.
        started: Called with words for each piece of work when it starts.

    Returns:
        One row for each contender and number of threads. Who fails parity has no time.
    """
    x, jobs, parities, notes = workload.tensor(), {}, {}, {}
    with on_threads(threads[0]):
        for each in contenders:
            started(f"parity of {each.name}")
            job, parity, note = _checked(each, workload, x)
            parities[each.name], notes[each.name] = parity, note
            if job is not None:
                jobs[each.name] = job
    units = {unit.name: unit.build(workload, x) for unit in UNITS}
    rows = []
    for count in threads:
        started(f"time of {workload}, {count} threads")
        calls = {**units, **{name: job for name, job in jobs.items() if name not in units}}
        runs = {name: job.run for name, job in calls.items()}
        times = interleaved(runs, repeats=repeats, threads=count, before=units["read"].run)
        of_units = tuple(times[unit.name].median for unit in UNITS)
        rows += [
            Row(
                workload,
                each.name,
                count,
                parities[each.name],
                times.get(each.name),
                (of_units[0], of_units[1], of_units[2]),
                jobs[each.name].share if each.name in jobs else 1.0,
                note=notes[each.name],
            )
            for each in contenders
        ]
    del x, units
    jobs.clear()
    started(f"memory on {workload}")
    return _with_memory(rows, contenders) if memory else rows


def _checked(who: Contender, workload: Workload, x: torch.Tensor) -> tuple[Job | None, Parity | None, str]:
    """Build a job and check it: the job if parity holds, the parity, and what went wrong."""
    if absence := who.absence(workload):
        return None, None, absence
    try:
        job = who.build(workload, x)
        parity = job.check()
    except (RuntimeError, ValueError, AssertionError) as cause:  # of a peer that does not take such a tensor
        return None, None, f"fails: {str(cause).splitlines()[0] if str(cause) else type(cause).__name__}"
    if not parity.holds:
        return None, parity, f"parity fails, error {parity.error:.0e} above {parity.tolerance:.0e}: not timed"
    return job, parity, ""


def _with_memory(rows: Sequence[Row], contenders: Sequence[Contender]) -> list[Row]:
    """Add measured and predicted memory to the rows that have a time."""
    weighed = {each.name for each in contenders if each.weighed}
    measured = {row.name: row.workload for row in rows if row.timed and row.share == 1 and row.name in weighed}
    found = dict(zip(measured, peaks(list(measured.items())), strict=True))
    known = {each.name: predicted(each, measured[each.name]) for each in contenders if each.name in measured}
    return [replace(row, peak=found.get(row.name), predicted=known.get(row.name)) for row in rows]


def predicted(who: Contender, work: Workload) -> int | None:
    """Predict the peak memory of a module of this package.

    Args:
        who: The contender.
        work: The workload.

    Returns:
        Bytes, as `cost` has them; None for others.
    """
    if who.choice is None:
        return None
    foreseen = cost(
        who.choice.record.name,
        work.sizes,
        dim=work.dim,
        batch=work.batch,
        num_heads=work.heads,
        skip=work.skip,
        out=work.into,
        dtype=work.dtype,
        layout=work.layout,
        backward=work.backward,
        **who.choice.options,
    )
    return foreseen.peak
