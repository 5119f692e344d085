"""Scaling: time against the number of positions, with fitted exponents, as a log-log plot."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tensorattn.attend.optional import require
from tensorattn.bench.contenders import contender
from tensorattn.bench.examine import Row, examine
from tensorattn.bench.workload import Workload

__all__ = ["LAST", "SETTING", "Curve", "cubes", "curves", "measure_scaling", "plot"]

CHANNELS = 32
SETTING = "order 3, equal modes, 32 channels, 4 heads, float32, forward"
LAST = 3  # sizes that an exponent is fitted to
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # for the colour-blind


class Curve(NamedTuple):
    """Time of one contender against positions.

    Attributes:
        positions: Numbers of positions, ascending.
        seconds: The time of each.
    """

    positions: tuple[int, ...]
    seconds: tuple[float, ...]

    @property
    def exponent(self) -> float:
        """Slope of log time against log positions over the largest sizes; not a number for a single size."""
        if len(self.positions) < 2:
            return math.nan
        logs = np.log(np.array([self.positions[-LAST:], self.seconds[-LAST:]]))
        return float(np.polyfit(logs[0], logs[1], 1)[0])


def cubes(sizes: Sequence[int], **options: Any) -> list[Workload]:
    """Return workloads of order 3 with equal modes.

    Args:
        sizes: Sizes of the modes.
        **options: More of the workload.
    """
    return [Workload(1, (size, size, size), CHANNELS, **options) for size in sizes]


def measure_scaling(
    names: Sequence[str], works: Sequence[Workload], *, repeats: int, started: Callable[[str], object]
) -> list[Row]:
    """Measure contenders on workloads of growing size, on one thread.

    Args:
        names: Who works.
        works: The workloads.
        repeats: Samples of each time.
        started: Called with words for each piece of work.

    Returns:
        The rows.
    """
    who = [contender(name) for name in names]
    found = [examine(work, who, repeats=repeats, memory=False, started=started) for work in works]
    return [row for rows in found for row in rows]


def curves(rows: Sequence[Row]) -> dict[str, Curve]:
    """Turn rows into one curve for each contender that has times.

    Args:
        rows: What was measured, on one thread.

    Returns:
        The curves, by contender.
    """
    points: dict[str, dict[int, float]] = {}
    for row in rows:
        if row.timed is not None:
            points.setdefault(row.name, {})[row.workload.positions] = row.seconds
    return {
        name: Curve(*(tuple(column) for column in zip(*sorted(known.items()), strict=True)))
        for name, known in points.items()
    }


def plot(found: Mapping[str, Curve], title: str) -> Any:
    """Draw time against positions, both in logarithms.

    Args:
        found: The curves.
        title: What was measured, and where.

    Returns:
        The figure.
    """
    module = require("matplotlib.figure", extra="bench", purpose="the scaling plot")
    figure = module.Figure(figsize=(8.5, 5.8), layout="constrained", dpi=120)
    axes = figure.subplots()
    for number, (name, curve) in enumerate(sorted(found.items(), key=lambda item: -item[1].seconds[-1])):
        words = name if math.isnan(curve.exponent) else f"{name}: exponent {curve.exponent:.2f}"
        style = {"color": COLOURS[number % len(COLOURS)], "linestyle": ("-", "--", ":")[number // len(COLOURS) % 3]}
        axes.loglog(curve.positions, [1000 * second for second in curve.seconds], marker="o", label=words, **style)
    axes.set_xlabel(f"positions ({SETTING})")
    axes.set_ylabel("time, ms")
    axes.grid(True, which="both", color="0.9")
    axes.legend(frameon=False, loc="upper left", fontsize=9)
    figure.suptitle(title, fontsize=10)
    return figure
