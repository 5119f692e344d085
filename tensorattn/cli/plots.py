"""The two figures of `bench`: time and memory of every contender on a tensor, and time against positions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tensorattn.cli.common import require
from tensorattn.cli.figures import COLOURS

__all__ = ["Bar", "Curve", "bars", "digits", "growth"]

FITTED = 3  # largest sizes that an exponent is fitted to
MARKERS, LINES = "os^Dv", ("-", "--", ":")  # of 5 and 3, so that all of 30 lines differ
PASSES = ("forward", "training")


class Bar(NamedTuple):
    """What a contender took: milliseconds, and megabytes at the peak or not a number, forwards and in training."""

    name: str
    forward: float
    training: float
    forward_memory: float
    training_memory: float


class Curve(NamedTuple):
    """Seconds of a forward pass against positions."""

    positions: tuple[int, ...]
    seconds: tuple[float, ...]

    @property
    def exponent(self) -> float:
        """Slope of log time against log positions over the largest sizes; not a number for a single size."""
        if len(self.positions) < 2:
            return math.nan
        logs = np.log(np.array([self.positions[-FITTED:], self.seconds[-FITTED:]]))
        return float(np.polyfit(logs[0], logs[1], 1)[0])


def digits(number: float) -> str:
    """Write a number with three digits, or all before its point.

    Args:
        number: The number.

    Examples:
        >>> [digits(number) for number in (0.00448, 1, 12.345, 161.2, 7024.4)]
        ['0.00448', '1.00', '12.3', '161', '7,024']
    """
    return f"{number:,.0f}" if number >= 99.95 else f"{number:.1f}" if number >= 9.995 else f"{number:#.3g}"


def bars(groups: Mapping[str, Sequence[Bar]], title: str) -> Any:
    """Draw time and memory of contenders as bars, one row of panels a tensor, the fastest in training on top.

    Args:
        groups: What each contender took, by tensor.
        title: What stands over all.

    Returns:
        The figure.
    """
    module = require("matplotlib.figure", extra="bench", purpose="the figure")
    heights = [1.2 + 0.42 * len(group) for group in groups.values()]
    figure = module.Figure(figsize=(11, 1.2 + sum(heights)), layout="constrained", dpi=120)
    panels = figure.subplots(len(groups), 2, squeeze=False, height_ratios=heights)
    for (work, group), (time, memory) in zip(groups.items(), panels, strict=True):
        ordered = sorted(group, key=lambda bar: -bar.training)
        for axes, unit in ((time, ""), (memory, "_memory")):
            for label, above, colour in zip(PASSES, (0.2, -0.2), COLOURS, strict=False):
                values = [float(getattr(bar, f"{label}{unit}")) for bar in ordered]
                places = [place + above for place in range(len(ordered))]
                drawn = axes.barh(places, values, 0.38, label=label, color=colour)
                axes.bar_label(
                    drawn, ["" if math.isnan(each) else digits(each) for each in values], padding=2, fontsize=7
                )
            axes.margins(x=0.12, y=0.02)
            axes.spines[["top", "right"]].set_visible(False)
        time.set_xscale("log")
        time.xaxis.set_major_formatter("{x:g}")
        time.set_title(work, loc="left", fontsize=10)
        time.set_yticks(range(len(ordered)), [bar.name for bar in ordered])
        time.set_xlabel("time, ms")
        memory.set_yticks([])
        memory.set_xlabel("peak memory, MB")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(f"One attention layer: time and peak memory\n{title}", fontsize=10)
    return figure


def growth(curves: Mapping[str, Curve], setting: str, title: str) -> Any:
    """Draw time against positions, both in logarithms.

    Args:
        curves: Times, by contender.
        setting: What all have in common.
        title: What stands over all.

    Returns:
        The figure.
    """
    module = require("matplotlib.figure", extra="bench", purpose="the figure")
    figure = module.Figure(figsize=(9.5, 5.8), layout="constrained", dpi=120)
    axes = figure.subplots()
    styles = zip(*map(itertools.cycle, (COLOURS, MARKERS, LINES)), strict=False)
    slowest_first = sorted(curves.items(), key=lambda item: -item[1].seconds[-1])
    for (name, curve), (colour, marker, line) in zip(slowest_first, styles, strict=False):
        words = name if math.isnan(curve.exponent) else f"{name}, exponent {curve.exponent:.2f}"
        milliseconds = [1000 * seconds for seconds in curve.seconds]
        axes.loglog(curve.positions, milliseconds, marker=marker, linestyle=line, label=words, color=colour)
    places = sorted({place for curve in curves.values() for place in curve.positions})
    axes.set_xticks(places, [f"{place:,}" for place in places], rotation=30)
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("positions")
    axes.set_ylabel("time, ms")
    axes.grid(True, which="both", color="0.9")
    figure.legend(loc="outside right center", frameon=False, fontsize=9)
    figure.suptitle(f"A forward pass of one attention layer: {setting}\n{title}", fontsize=10)
    return figure
