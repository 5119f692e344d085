"""Figures of a recording and of what one of its queries attends to. Every function returns one matplotlib figure.

Weights are drawn relative to uniform attention: 1 is what every position would get if all got the same. Figures are
made without pyplot, so no state outlives them.
"""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tensorattn.attend.optional import require
from tensorattn.attend.recordings import Recording
from tensorattn.attend.slices import Plane, display_values, frame_indices, planes_through
from tensorattn.modes import ModeSpec

__all__ = ["Place", "input_figure", "maps_figure", "weights_figure"]

FRAMES = 6  # frames of a long mode that are drawn
HEADS = 4  # heads whose weights are drawn
PANEL = 2.5  # inches, height of a panel
NARROWEST, WIDEST = 6.5, 20.0  # inches: room for a title, and what a page can hold
LETTERS = 12  # letters of a title to an inch
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # told apart by the colour-blind
MARK = {"marker": "+", "markersize": 11, "markeredgewidth": 1.6, "linestyle": "none"}

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Place:
    """Where the query is, and how the grid of patches lies on the recording.

    Attributes:
        modes: The modes.
        sizes: Sizes of the modes, in elements of the recording.
        patch: Sizes of a patch.
        query: Patch of the query, one index a mode.
    """

    modes: ModeSpec
    sizes: tuple[int, ...]
    patch: tuple[int, ...]
    query: tuple[int, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """What the modes are called on an axis."""
        return self.modes.names if self.modes.named else tuple(f"mode {name}" for name in self.modes.names)

    @property
    def element(self) -> tuple[int, ...]:
        """The element in the middle of the query's patch."""
        middles = (q * p + (p - 1) // 2 for q, p in zip(self.query, self.patch, strict=True))
        return tuple(min(middle, size - 1) for middle, size in zip(middles, self.sizes, strict=True))

    def centres(self, mode: int) -> Array:
        """Return the coordinate of the middle of every patch along a mode, in elements.

        Args:
            mode: Index of the mode.
        """
        count = -(-self.sizes[mode] // self.patch[mode])
        return np.arange(count) * self.patch[mode] + (self.patch[mode] - 1) / 2

    def words(self) -> str:
        """Return the query in words: ``the query, the 1×8 patch that contains t=14 h=121``."""
        element = f"({', '.join(map(str, self.element))})"
        if self.modes.named:
            element = " ".join(f"{name}={index}" for name, index in zip(self.names, self.element, strict=True))
        if math.prod(self.patch) == 1:
            return f"the query {element}"
        return f"the query, the {'×'.join(map(str, self.patch))} patch that contains {element}"


def _new_figure(width: float, height: float, *title: str) -> Any:
    """Return a figure that draws on its own canvas, wide enough for the lines of its title."""
    figure_module = require("matplotlib.figure", extra="examples", purpose="drawing figures")
    width, height = min(WIDEST, max(NARROWEST, width)), min(WIDEST, height)
    figure = figure_module.Figure(figsize=(width, height), layout="constrained", dpi=120)
    figure.suptitle("\n".join(textwrap.fill(line, int(width * LETTERS)) for line in title), fontsize=11)
    return figure


def _panel_height(widths: float, margin: float) -> float:
    """Return the height of panels whose widths, for a height of one, sum to ``widths``: larger where they are few."""
    return max(PANEL, min(2 * PANEL, (NARROWEST - margin) / widths))


def _draw_plane(axes: Any, image: Array, plane: Plane, place: Place, patch: Sequence[int], **options: Any) -> Any:
    """Draw one slice in the coordinates of the recording, and mark the query."""
    extent = (-0.5, image.shape[1] * patch[plane.across] - 0.5, -0.5, image.shape[0] * patch[plane.along] - 0.5)
    drawn = axes.imshow(image, origin="lower", extent=extent, aspect="auto", interpolation="nearest", **options)
    axes.set_xlim(-0.5, place.sizes[plane.across] - 0.5)
    limits = (-0.5, place.sizes[plane.along] - 0.5)
    axes.set_ylim(limits if plane.upwards else limits[::-1])
    axes.set_xlabel(place.names[plane.across])
    axes.set_ylabel(place.names[plane.along])
    axes.locator_params(nbins=5, integer=True, min_n_ticks=1)
    return drawn


def _mark_query(axes: Any, plane: Plane, place: Place) -> None:
    """Mark the query with a cross that is seen on black and on white."""
    point = ([place.element[plane.across]], [place.element[plane.along]])
    axes.plot(*point, **{**MARK, "markersize": 14, "markeredgewidth": 3.6}, color="white")
    axes.plot(*point, **MARK, color="black")


def input_figure(recording: Recording, place: Place) -> Any:
    """Draw the recording: a curve, an image, or frames along its longest remaining mode.

    Args:
        recording: What was read.
        place: Where the query is.

    Returns:
        The figure.
    """
    order, names = len(place.sizes), place.names
    if order == 1:
        title = f"{recording.name}: all {recording.sizes[0]} values; dotted: {place.words()}"
        figure = _new_figure(9.0, PANEL + 0.8, title)
        _draw_series(figure.add_subplot(), recording, place)
        return figure
    values, words = display_values(recording.array)
    plane = planes_through(place.sizes, names, largest=1)[0]
    rest = [mode for mode in range(order) if mode not in (plane.across, plane.along)]
    stepped = max(rest, key=lambda mode: place.sizes[mode], default=None)
    steps = (0,) if stepped is None else frame_indices(place.sizes[stepped], FRAMES, place.element[stepped])
    rows = math.ceil(len(steps) / 3)
    columns = math.ceil(len(steps) / rows)
    fixed = ", ".join(f"{names[mode]} = {place.element[mode]}" for mode in rest if mode != stepped)
    shown = "" if stepped is None else f"{len(steps)} of {place.sizes[stepped]} slices along {names[stepped]}"
    panel = _panel_height(columns * plane.width(place.sizes), 0.8)
    figure = _new_figure(
        columns * panel * plane.width(place.sizes) + 0.8,
        rows * (panel + 0.5) + 0.6,
        f"{recording.name}: {shown or 'the whole image'}{f', at {fixed}' if fixed else ''}",
        f"the cross marks {place.words()}",
        words,
    )
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes in grid.flat[len(steps) :]:
        axes.set_visible(False)
    for index, (axes, step) in enumerate(zip(grid.flat, steps, strict=False)):
        position = list(place.element)
        if stepped is not None:
            position[stepped] = step
            axes.set_title(f"{names[stepped]} = {step}", fontsize=10)
        _draw_plane(axes, plane.cut(values, position), plane, place, (1,) * order, cmap="gray", vmin=0, vmax=1)
        axes.label_outer()
        if index + columns >= len(steps):  # nothing below it, not even where the last row is not full
            axes.tick_params(labelbottom=True)
            axes.set_xlabel(names[plane.across])
        if tuple(position) == place.element:
            _mark_query(axes, plane, place)
    return figure


def _draw_series(axes: Any, recording: Recording, place: Place) -> None:
    """Draw the channels of a series, up to six of them, and mark the query."""
    channels = min(recording.channels, len(COLOURS))
    for channel in range(channels):
        axes.plot(recording.array[:, channel].astype(np.float64), color=COLOURS[channel], linewidth=1)
    axes.axvline(place.element[0], color="black", linewidth=1, linestyle=":")
    axes.set_xlabel(place.names[0])
    axes.set_ylabel("value" if recording.channels == 1 else f"channels 1 to {channels} of {recording.channels}")
    axes.margins(x=0.01)


def weights_figure(recording: Recording, place: Place, exact: Array, weights: Mapping[str, Sequence[Array]]) -> Any:
    """Draw the attention of the query along each mode: one row a head, one column a mode.

    Args:
        recording: What was read.
        place: Where the query is.
        exact: Weights of full attention ``(H, g_1, …, g_N)``; each column shows their sum over the other modes.
        weights: For every operator, its weights ``(H, g_m)`` along each mode.

    Returns:
        The figure.
    """
    order, heads = len(place.sizes), min(HEADS, exact.shape[0])
    which = f"all {heads} heads" if heads == exact.shape[0] else f"heads 1 to {heads} of {exact.shape[0]}"
    figure = _new_figure(
        3.3 * order + 0.6,
        1.75 * heads + 1.3,
        f"{recording.name}: attention of {place.words()}",
        f"along each mode, {which}; 1 = uniform attention; dotted: the query",
    )
    grid = figure.subplots(heads, order, squeeze=False, sharex="col", sharey="row")
    for head in range(heads):
        for mode in range(order):
            axes, centres = grid[head, mode], place.centres(mode)
            others = tuple(m for m in range(order) if m != mode)
            size = len(centres)
            style = {"marker": "o", "markersize": 3} if size <= 24 else {}
            axes.axhline(1, color="0.75", linewidth=0.8)
            axes.axvline(place.element[mode], color="black", linewidth=1, linestyle=":")
            axes.plot(centres, size * exact[head].sum(axis=others), color="black", linewidth=2.2, alpha=0.55, **style)
            for colour, each in zip(_cycle(COLOURS, len(weights)), weights.values(), strict=True):
                axes.plot(centres, size * each[mode][head], color=colour, linewidth=1.3, **style)
            axes.set_xlim(-0.5, place.sizes[mode] - 0.5)
            axes.locator_params(axis="x", nbins=6, integer=True, min_n_ticks=1)
            if head == heads - 1:
                axes.set_xlabel(place.names[mode])
        grid[head, 0].set_ylabel(f"head {head + 1}")
        grid[head, 0].set_ylim(bottom=0)  # once the whole row is drawn: its panels share the scale
    lines = [axes.lines[2 + i] for i in range(1 + len(weights))]
    labels = ["exact attention, summed over the other modes", *(_weights_label(*each) for each in weights.items())]
    columns = _legend_columns([len(label) for label in labels], int(figure.get_figwidth() * LETTERS))
    figure.legend(lines, labels, loc="outside lower center", ncols=columns, frameon=False)
    return figure


def _legend_columns(widths: Sequence[int], room: int) -> int:
    """Return the number of columns of a legend: as few lines as there is room for, of about the same length."""
    count = len(widths)
    for rows in range(1, count):
        columns = math.ceil(count / rows)
        cuts = [(count * column) // columns for column in range(columns + 1)]
        if sum(max(widths[start:end]) + 8 for start, end in itertools.pairwise(cuts)) <= room:
            return columns
    return 1


def _weights_label(name: str, weights: Sequence[Array]) -> str:
    """Name an operator, and say so where its modes share one softmax."""
    total = sum(float(vector[0].sum()) for vector in weights)
    return f"{name} (one softmax for all modes)" if len(weights) > 1 and abs(total - 1) < 1e-3 else name


def _cycle(colours: Sequence[str], count: int) -> list[str]:
    """Return as many colours as asked for, from the start again when they run out."""
    return [colours[i % len(colours)] for i in range(count)]


def maps_figure(recording: Recording, place: Place, head: str, maps: Mapping[str, Array]) -> Any:
    """Draw attention maps of the query over the grid, under the recording: one row a map, one column a slice.

    Args:
        recording: What was read.
        place: Where the query is.
        head: Which head it is, in words, or nothing.
        maps: Weights ``(g_1, …, g_N)`` that sum to one, by what they are; the first is the exact one.

    Returns:
        The figure.
    """
    title = f"{recording.name}: attention of {place.words()}{head and '; '}{head}"
    if len(place.sizes) == 1:
        return _series_maps(recording, place, maps, title)
    planes = planes_through(place.sizes, place.names)
    values, words = display_values(recording.array)
    widths = [plane.width(place.sizes) for plane in planes]
    panel = _panel_height(sum(widths), 2.0)
    figure = _new_figure(
        panel * sum(widths) + 2.0,
        (len(maps) + 1) * (panel + 0.35) + 0.7,
        f"{title}{'; slices through the query' if len(place.sizes) > 2 else ''}",
        f"each weight relative to uniform attention, one colour scale; input: {words}",
    )
    grid = figure.subplots(len(maps) + 1, len(planes), squeeze=False, width_ratios=widths)
    cuts = {
        label: [plane.cut(np.log2(np.maximum(each * each.size, 1e-30)), place.query) for plane in planes]
        for label, each in maps.items()
    }
    exact = np.concatenate([cut.ravel() for cut in next(iter(cuts.values()))])
    limit = max(0.5, float(np.percentile(np.abs(exact), 99.5)))
    for column, plane in enumerate(planes):
        _draw_plane(
            grid[0, column],
            plane.cut(values, place.element),
            plane,
            place,
            (1,) * len(place.sizes),
            cmap="gray",
            vmin=0,
            vmax=1,
        )
        held = [mode for mode in range(len(place.sizes)) if mode not in (plane.across, plane.along)]
        if len(held) == 1:
            grid[0, column].set_title(f"{place.names[held[0]]} = {place.element[held[0]]}", fontsize=10)
        for row, label in enumerate(cuts, start=1):
            drawn = _draw_plane(
                grid[row, column],
                cuts[label][column],
                plane,
                place,
                place.patch,
                cmap="RdBu_r",
                vmin=-limit,
                vmax=limit,
            )
        for row in range(len(maps) + 1):
            _mark_query(grid[row, column], plane, place)
            if row < len(maps):
                grid[row, column].set_xlabel("")
                grid[row, column].tick_params(labelbottom=False)
    for row, label in enumerate(["input", *cuts]):
        grid[row, 0].annotate(
            label,
            (0, 0.5),
            xytext=(-52, 0),
            xycoords="axes fraction",
            textcoords="offset points",
            rotation=90,
            ha="right",
            va="center",
            fontsize=10,
            fontweight="bold",
        )
    bar = figure.colorbar(drawn, ax=list(grid[1:].flat), extend="both", shrink=0.8, aspect=30)
    ticks = _ratio_ticks(limit)
    bar.set_ticks([math.log2(ratio) for ratio in ticks], labels=[_ratio_in_words(ratio) for ratio in ticks])
    bar.set_label("weight / uniform weight")
    return figure


def _ratio_ticks(limit: float) -> list[float]:
    """Return ratios to mark on a scale from ``-limit`` to ``limit`` in powers of two."""
    if limit < 1:
        ratios = [1 / 1.9, 1 / 1.6, 1 / 1.4, 1 / 1.2, 1, 1.2, 1.4, 1.6, 1.9]
        return [ratio for ratio in ratios if abs(math.log2(ratio)) <= limit]
    step = math.ceil(limit / 4)
    return [2.0**power for power in range(-4 * step, 4 * step + 1, step) if abs(power) <= limit]


def _ratio_in_words(ratio: float) -> str:
    """Return ``4`` for 4 and ``1/4`` for a quarter."""
    return f"{ratio:.3g}" if ratio >= 1 else f"1/{1 / ratio:.3g}"


def _series_maps(recording: Recording, place: Place, maps: Mapping[str, Array], title: str) -> Any:
    """Draw the attention of a query over a series, under the series."""
    figure = _new_figure(9.0, 2 * PANEL + 1.2, title, "each weight relative to uniform attention")
    upper, lower = figure.subplots(2, 1, sharex=True)
    _draw_series(upper, recording, place)
    upper.set_xlabel("")
    styles: list[dict[str, Any]] = [
        {"linewidth": 2.4, "alpha": 0.55, "color": "black"},
        *({"color": c} for c in COLOURS),
    ]
    for (label, each), style in zip(maps.items(), styles, strict=False):
        lower.plot(place.centres(0), each * each.size, label=label, **style)
    lower.axvline(place.element[0], color="black", linewidth=1, linestyle=":")
    lower.axhline(1, color="0.75", linewidth=0.8)
    lower.set_xlabel(place.names[0])
    lower.set_ylabel("weight / uniform")
    lower.set_xlim(-0.5, place.sizes[0] - 0.5)
    lower.legend(frameon=False)
    return figure
