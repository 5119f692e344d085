"""Cost of all mode averages, and of the outer sum, against one read and one copy of the tensor in the same run.

    python tests/benchmarks/averages.py [THREADS]

Parity with plain means comes first. Times are medians of interleaved runs: CPU time of the thread with one thread, else
wall clock. Extra memory is the growth of the peak resident set, where Linux tells it.
"""

import ctypes
import gc
import math
import statistics
import sys
import time
from pathlib import Path

import torch

import tensorattn as ta

SHAPES = {
    "order 2": ((1,), (256, 256), 64),
    "order 3, video": ((2,), (16, 56, 56), 96),
    "order 3, clip": ((1,), (32, 112, 112), 64),
    "order 3, volume": ((1,), (96, 96, 96), 32),
    "order 4": ((2,), (8, 24, 24, 24), 32),
    "order 5": ((1,), (12, 12, 12, 12, 12), 32),
}


def medians(functions, clock, repeats=9):
    """Median time of each function, run in turn."""
    times = [[] for _ in functions]
    for _ in range(repeats + 1):
        for function, record in zip(functions, times, strict=True):
            start = clock()
            function()
            record.append(clock() - start)
    return [statistics.median(record[1:]) for record in times]


def resident(field):
    """Resident bytes of this process, or None where Linux does not tell."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), None)


def extra_memory(function):
    """Growth of the peak while a function runs, without what it returns."""
    if resident("VmHWM") is None:
        return math.nan
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    kept = function()
    return resident("VmHWM") - before - sum(part.numel() * part.element_size() for part in kept)


def main(threads=1):
    """Print one line a shape and layout."""
    torch.set_num_threads(threads)
    clock = time.thread_time if threads == 1 else time.perf_counter
    print(f"torch {torch.__version__}, {threads} thread(s); R = one read (sum), M = one copy into an existing buffer")
    for name, (batch, sizes, dim) in SHAPES.items():
        order = len(sizes)
        for layout in ("channels last", "channels first"):
            shape = (*batch, *sizes, dim) if layout == "channels last" else (*batch, dim, *sizes)
            x = torch.randn(shape)
            x = x if layout == "channels last" else x.movedim(len(batch), -1)
            averages = ta.mode_averages(x, order=order)
            for mode, average in enumerate(averages):
                others = [d - order - 1 for d in range(order) if d != mode]
                torch.testing.assert_close(average, x.double().mean(others).float(), rtol=1e-4, atol=1e-5)
            memory = extra_memory(lambda x=x, order=order: ta.mode_averages(x, order=order))
            buffer, total = torch.empty_like(x), x.numel() * 4
            read, copy, average, outer = medians(
                [
                    x.sum,
                    lambda buffer=buffer, x=x: buffer.copy_(x),
                    lambda x=x, order=order: ta.mode_averages(x, order=order),
                    lambda averages=averages: ta.outer_sum(averages),
                ],
                clock,
            )
            print(
                f"{name:<16} {layout:<14} {total / 1e6:6.1f} MB   averages {average / read:4.2f} R   "
                f"outer sum {outer / copy:4.2f} M   extra memory {memory / 1e6:5.1f} MB"
            )


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))
