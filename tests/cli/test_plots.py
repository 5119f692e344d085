"""The figures of `bench`: what is drawn, in which units, and exponents."""

from __future__ import annotations

import math

import pytest

from tensorattn.cli.common import png_bytes
from tensorattn.cli.plots import Bar, Curve, bars, growth

NAN = math.nan


def test_exponents_are_those_of_a_power():
    sizes = (8, 27, 64, 125)
    assert Curve(sizes, tuple(3e-6 * n**1.25 for n in sizes)).exponent == pytest.approx(1.25)
    assert math.isnan(Curve((8,), (1.0,)).exponent)


def test_bars_are_times_and_memory_of_each_tensor():
    groups = {"a tensor": [Bar("slow", 20.0, 60.0, 1.0, 2.0), Bar("fast", 1.0, 1.5, 3.0, NAN)],
              "another": [Bar("slow", 2.0, 6.0, 1.0, 2.0)]}  # fmt: skip
    figure = bars(groups, "a machine")
    assert figure.get_suptitle() == "One attention layer: time and peak memory\na machine"
    time, memory, *_ = figure.axes
    assert len(figure.axes) == 4 and time.get_title(loc="left") == "a tensor"
    assert [axes.get_xlabel() for axes in (time, memory)] == ["time, ms", "peak memory, MB"]
    assert [label.get_text() for label in time.get_yticklabels()] == ["slow", "fast"]  # from below
    assert [[bar.get_width() for bar in drawn] for drawn in time.containers] == [[20.0, 1.0], [60.0, 1.5]]
    assert [text.get_text() for text in time.texts] == ["20.0", "1.00", "60.0", "1.50"]
    assert [text.get_text() for text in memory.texts] == ["1.00", "3.00", "2.00", ""]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.texts] == ["forward", "training"]
    assert png_bytes(figure).startswith(b"\x89PNG")


def test_curves_are_milliseconds_against_positions_and_told_apart():
    found = {f"operator {k}": Curve((8, 64), (1e-3 * k, 8e-3 * k)) for k in range(1, 14)}
    figure = growth(found, "cubes", "a machine")
    (axes,) = figure.axes
    assert figure.get_suptitle() == "A forward pass of one attention layer: cubes\na machine"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("positions", "time, ms")
    first, *_ = axes.lines
    assert list(first.get_ydata()) == pytest.approx([13.0, 104.0]) and first.get_label() == "operator 13, exponent 1.00"
    styles = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in axes.lines}
    assert len(styles) == len(found)
    assert png_bytes(figure).startswith(b"\x89PNG")
