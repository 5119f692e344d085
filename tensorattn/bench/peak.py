"""Peak memory: every job in a process of its own, so that no other job has left anything in the heap.

One helper process imports torch, and forks for each job.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch

from tensorattn.bench.contenders import contender
from tensorattn.bench.workload import Workload
from tensorattn.measuring import PeakMemory

__all__ = ["Peak", "main", "peaks"]


# Every block from 64 KB on is mapped by itself: what is freed is gone, and is not counted as held by the heap.
MAPPED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


class Peak(NamedTuple):
    """Memory of a job.

    Attributes:
        bytes: Most that was held at once beyond what was held before; None where the system does not tell.
        results: Bytes of the results among them.
    """

    bytes: int | None
    results: int

    @property
    def extra(self) -> int | None:
        """Bytes beyond the results."""
        return None if self.bytes is None else max(0, self.bytes - self.results)


def peaks(jobs: Sequence[tuple[str, Workload]]) -> list[Peak | None]:
    """Measure jobs, each in a process of its own, on one thread.

    Args:
        jobs: Contenders by name, and their workloads.

    Returns:
        What each took, None where its process failed.
    """
    if not jobs or not hasattr(os, "fork"):
        return [None] * len(jobs)
    asked = [[name, work.as_record()] for name, work in jobs]
    ran = subprocess.run(
        [sys.executable, "-m", __name__],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **MAPPED},
    )
    found = [json.loads(line) for line in ran.stdout.splitlines()]
    return [None if each is None else Peak(*each) for each in found]


def measure_here(name: str, work: Workload) -> Peak:
    """Measure a job in this process, after a small one that loads code.

    Args:
        name: Name of the contender.
        work: The workload.

    Returns:
        What it took.
    """
    who, small = contender(name), work.smaller()
    who.build(small, small.tensor()).run()
    job = who.build(work, work.tensor())
    with PeakMemory() as memory:
        result = job.run()
    peak = Peak(memory.bytes, job.results)
    del result
    return peak


def main() -> None:
    """Read jobs from the standard input, and print a line for each: a pair of numbers, or null."""
    torch.set_num_threads(1)
    for name, record in json.load(sys.stdin):
        work = Workload(**{**record, "sizes": tuple(record["sizes"])})
        child = os.fork()
        if child == 0:
            try:
                print(json.dumps(list(measure_here(name, work))), flush=True)
            except BaseException as cause:  # whatever it is, the other jobs go on
                print(f"{name}: {cause}", file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        if os.waitpid(child, 0)[1] != 0:
            print("null", flush=True)


if __name__ == "__main__":
    main()
