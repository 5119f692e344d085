"""Machine: what the numbers depend on beyond the code, to be told with them."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path

import numpy as np
import torch

__all__ = ["machine"]

SETTINGS = ("MALLOC_", "GLIBC_TUNABLES", "THP_MEM_ALLOC_ENABLE", "LD_PRELOAD", "OMP_", "MKL_", "KMP_")


def machine() -> dict[str, str]:
    """Describe processor, versions, and the settings of the environment that decide about time and memory.

    Returns:
        Words by what they describe.

    Examples:
        >>> sorted(machine())
        ['cores', 'date', 'load', 'malloc and threads', 'numpy', 'processor', 'python', 'system', 'torch']
    """
    set_here = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(SETTINGS)]
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "load": " ".join(f"{load:.1f}" for load in os.getloadavg()) if hasattr(os, "getloadavg") else "not known",
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "malloc and threads": " ".join(set_here) or "nothing set: the default heap",
    }


def _processor() -> str:
    """Name of the processor."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
