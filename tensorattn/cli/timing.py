"""How `bench` measures: on which device, by which clock, how much memory, and calls in turn.

On a CPU the clock is the CPU time of the thread, which waiting for a processor does not enter. Another device works on
while its caller goes on: there it is wall time, read when the device has done all that it was told.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tensorattn import __version__
from tensorattn.diagnose.cost import count, one_thread
from tensorattn.errors import OptionError

__all__ = ["devices", "find_device", "interleaved", "machine", "memory", "one_thread", "seconds", "synchronize"]

CPU = torch.device("cpu")
SHORTEST = 2e-3  # seconds of a sample; shorter calls are repeated within it
PATIENCE, FEWEST = 3.0, 3  # what has taken so many seconds is sampled so many times only
SETTINGS = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD", "OMP_", "MKL_", "KMP_", "PYTORCH_", "CUDA_")  # they decide


# ---- devices -------------------------------------------------------------------------------------------------


def devices() -> dict[str, torch.device]:
    """Return the devices that there are, by name."""
    found = {"cpu": CPU}
    found |= {f"cuda:{index}": torch.device("cuda", index) for index in range(torch.cuda.device_count())}
    return found | ({"mps": torch.device("mps")} if torch.backends.mps.is_available() else {})


def find_device(text: str) -> torch.device:
    """Read a device: ``cpu``, ``cuda``, ``cuda:1`` or ``mps``.

    Args:
        text: What the user called it.

    Returns:
        The device.

    Raises:
        OptionError: If it is not there.

    Examples:
        >>> find_device("cpu:0")
        device(type='cpu')
    """
    here = devices()
    found = here.get(text) or here.get(f"{text}:0") or here.get(text.removesuffix(":0"))
    if found is None:
        raise OptionError(f"--device must be one of those that are here, {', '.join(here)}, got {text!r}.")
    return found


def synchronize(device: torch.device) -> None:
    """Wait until a device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def seconds(device: torch.device) -> float:
    """Read the clock of a device, when it has done what it was told."""
    synchronize(device)
    return time.thread_time() if device.type == "cpu" else time.perf_counter()


def machine(device: torch.device) -> dict[str, str]:
    """Describe what the numbers depend on beyond the code: device, processor, versions, settings of the environment."""
    named: list[str] = []
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    settings = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(SETTINGS)]
    model = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": f"{device}{model}, {'CPU time of one thread' if device == CPU else 'wall time, synchronised'}",
        "processor": f"{named[0] if named else platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "load": " ".join(f"{load:.1f}" for load in os.getloadavg()) if hasattr(os, "getloadavg") else "not known",
        "versions": f"tensorattn {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        "system": platform.platform(),
        "environment": " ".join(settings) or "the default heap and threads",
    }


# ---- time and memory -----------------------------------------------------------------------------------------


def interleaved(
    calls: Mapping[str, Callable[[], Any]],
    *,
    repeats: int,
    before: Callable[[], Any],
    device: torch.device = CPU,
    started: Callable[[], Any] = lambda: None,
) -> dict[str, tuple[float, float]]:
    """Time calls in turn: one sample of each, then again, so that disturbances meet all alike.

    The first runs do not count.

    Args:
        calls: What to time, by name.
        repeats: Samples of each; three of what takes seconds.
        before: Called before every sample, so that all find the caches alike.
        device: Where they work.
        started: Called before the first runs and before every round of samples.

    Returns:
        Seconds of each call: the median of its samples, and half the distance of their quartiles.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    counts = {name: 1 for name in calls}
    started()
    for name, call in calls.items():
        call()
        counts[name] = math.ceil(SHORTEST / max(_seconds(call, 1, device), SHORTEST / 100))
    for _ in range(repeats):
        started()
        for name, call in calls.items():
            if len(times[name]) < FEWEST or counts[name] * sum(times[name]) < PATIENCE:
                before()
                times[name].append(_seconds(call, counts[name], device))
    return {name: _summary(samples) for name, samples in times.items()}


def _seconds(call: Callable[[], Any], times: int, device: torch.device) -> float:
    """Time of a call, the mean of a few."""
    start = seconds(device)
    for _ in range(times):
        call()
    return (seconds(device) - start) / times


def _summary(samples: Sequence[float]) -> tuple[float, float]:
    """Median, and half the distance of the quartiles."""
    first, middle, third = np.quantile(samples, (0.25, 0.5, 0.75)).tolist()
    return middle, (third - first) / 2


def memory(call: Callable[[], Any], device: torch.device) -> tuple[int, int]:
    """Call a function, and return the most bytes that it holds in tensors at once, and the number of its kernel calls.

    On CUDA the bytes are those of the allocator, buffers of libraries included; elsewhere all tensors are followed.

    Args:
        call: What to call.
        device: Where it works.

    Returns:
        Bytes beyond what was held before, and kernel calls.
    """
    if device.type != "cuda":
        found = count(call)
        return found.peak, found.calls
    synchronize(device)
    held = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - held, count(call).calls
