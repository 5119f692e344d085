"""Figures of a recording and of what one of its queries attends to. Every function returns one matplotlib figure.

Weights are drawn relative to uniform attention: 1 is what every position would get if all got the same. Slices are as
wide and high as the steps of their modes say. Figures are made without pyplot, so no state outlives them; a notebook
shows them by themselves.
"""

from __future__ import annotations

import functools
import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tensorattn.cli.common import png_bytes, require
from tensorattn.cli.readers.contents import Step, one_line
from tensorattn.cli.recordings import MAX_ORDER, Recording
from tensorattn.errors import DtypeError, OptionError, ShapeError, integers, retells
from tensorattn.functional.maps import place_on
from tensorattn.modes import ModeSpec

__all__ = [
    "Place",
    "Slices",
    "draw_attention_maps",
    "input_figure",
    "maps_figure",
    "read_numbers",
    "slices",
    "times_uniform",
    "weights_figure",
    "weights_label",
]

FRAMES = 6  # frames of a long mode that are drawn
HEADS = 4  # heads whose weights are drawn
PANEL = 2.5  # inches, height of a panel
NARROWEST, WIDEST = 6.5, 20.0  # inches: room for a title, and what a page can hold
LETTERS = 12  # letters of a title to an inch
CARTESIAN = ("x", "y", "z")  # drawn as in a graph: the first to the right, the second upwards
DARK = 0.6  # colours whose 99.5th percentile is below this share of white are brightened
LARGEST_STRETCH = 2.0  # a panel is at most this much longer than wide, or wider than long, where steps are unknown
LARGEST_ASPECT = 6.0  # and where they are known
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # told apart by the colour-blind
MARK = {"marker": "+", "markersize": 11, "markeredgewidth": 1.6, "linestyle": "none"}
GREY = {"cmap": "gray", "vmin": 0, "vmax": 1}

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Place:
    """Where the query is, and how the grid of patches lies on the recording.

    Attributes:
        modes: The modes.
        sizes: Sizes of the modes, in elements of the recording.
        patch: Sizes of a patch.
        query: Patch of the query, one index a mode.
        steps: How far apart elements lie, one a mode, None where it is not known; empty where nothing is.
    """

    modes: ModeSpec
    sizes: tuple[int, ...]
    patch: tuple[int, ...]
    query: tuple[int, ...]
    steps: tuple[Step | None, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """What the modes are called on an axis."""
        return self.modes.names if self.modes.named else tuple(f"mode {name}" for name in self.modes.names)

    @property
    def labels(self) -> tuple[str, ...]:
        """What is written at an axis: its name, and how far apart its elements lie, as in ``z (2.2 mm each)``."""
        steps = self.steps or (None,) * len(self.sizes)
        return tuple(
            f"{name} ({step.size:.3g} {step.unit} each)" if step and step.unit else name
            for name, step in zip(self.names, steps, strict=True)
        )

    def lengths(self, *modes: int) -> tuple[float, ...] | None:
        """Return how long modes are in a unit that they share, or None where there is none.

        Args:
            *modes: Their indices.
        """
        found = [self.steps[mode] if self.steps else None for mode in modes]
        if len({step.unit if step else None for step in found}) > 1 or None in found:
            return None
        return tuple(self.sizes[mode] * step.size for mode, step in zip(modes, found, strict=True) if step)

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
        """Return the query in words: ``the query t=14 h=121 (a patch of 1×8)``."""
        element = f"({', '.join(map(str, self.element))})"
        if self.modes.named:
            element = " ".join(f"{name}={index}" for name, index in zip(self.names, self.element, strict=True))
        if math.prod(self.patch) == 1:
            return f"the query {element}"
        return f"the query {element} (a patch of {'×'.join(map(str, self.patch))})"


# ---- what is drawn of a grid -----------------------------------------------------------------------------------


class _Plane(NamedTuple):
    """Two modes of a grid that are drawn, the others held at the query; the second downwards, or ``upwards``."""

    across: int
    along: int
    upwards: bool

    def cut(self, array: Array, position: Sequence[int]) -> Array:
        """Return the slice of an array ``(n_1, …, n_N, ...)`` through a position, ``(along, across, ...)``."""
        index: list[int | slice] = list(position)
        index[self.across] = index[self.along] = slice(None)
        plane = array[tuple(index)]
        return plane if self.along < self.across else plane.swapaxes(0, 1)

    def shape(self, place: Place) -> tuple[float, bool]:
        """Return the width of the panel for a height of one, and whether it is true: long slices are stretched."""
        lengths = place.lengths(self.across, self.along)
        across, along = lengths or (place.sizes[self.across], place.sizes[self.along])
        most = LARGEST_ASPECT if lengths else LARGEST_STRETCH
        width = min(most, max(1 / most, across / along))
        return width, math.isclose(width, across / along)

    def others(self, order: int) -> list[int]:
        """Return the modes that are held."""
        return [mode for mode in range(order) if mode not in (self.across, self.along)]


def _extents(planes: Sequence[_Plane], place: Place) -> list[tuple[float, float]]:
    """Return widths and heights of panels in a row: on one scale where they share a unit, else each of height one."""
    modes = sorted({mode for plane in planes for mode in (plane.across, plane.along)})
    lengths = dict(zip(modes, place.lengths(*modes) or (), strict=False))
    if not lengths or not all(plane.shape(place)[1] for plane in planes):
        return [(plane.shape(place)[0], 1.0) for plane in planes]
    highest = max(lengths[plane.along] for plane in planes)
    return [(lengths[plane.across] / highest, lengths[plane.along] / highest) for plane in planes]


def _planes_through(sizes: Sequence[int], names: Sequence[str]) -> list[_Plane]:
    """Choose at most three planes: the largest one without time ``t``, then the largest others; z goes upwards."""
    pairs = itertools.combinations(range(len(sizes)), 2)
    ranked = sorted(pairs, key=lambda pair: -math.prod(sizes[mode] for mode in pair))
    still = next((pair for pair in ranked if all(names[mode] != "t" for mode in pair)), None)
    ranked.sort(key=lambda pair: pair != still)
    planes = []
    for first, second in ranked[:3]:
        graph = names[first] in CARTESIAN and names[second] in CARTESIAN
        planes.append(_Plane(first, second, True) if graph else _Plane(second, first, names[first] == "z"))
    return planes


def _frames(size: int, shown: int, include: int) -> tuple[int, ...]:
    """Choose evenly spaced indices of a mode, at most so many, with a given one near their middle."""
    count = min(shown, size)
    step = size // count
    every = range(include % step, size, step)
    first = min(max(0, every.index(include) - count // 2), len(every) - count)
    return tuple(every[first : first + count])


def _display_values(array: Array, inverted: bool = False) -> tuple[Array, str]:
    """Turn values ``(n_1, …, n_N, C)`` into grey or colours between 0 and 1, and say in words what they show."""
    channels = array.shape[-1]
    if channels in (3, 4) and array.dtype.newbyteorder("=") in (np.uint8, np.uint16):
        colours, most = array[..., :3], np.iinfo(array.dtype).max
        (white,) = _percentiles(colours, 99.5)
        if not 0 < white < DARK * most:
            return colours if most == 255 else (colours >> 8).astype(np.uint8), "colours as stored"
        brightened = np.minimum(colours.astype(np.float32) / white, 1)
        return brightened, f"colours {most / white:.1f} times as bright, the 99.5th percentile is white"
    grey = array[..., 0] if channels == 1 else array.mean(axis=-1, dtype=np.float64)
    low, high = _percentiles(grey, 0.5, 99.5)
    wide = np.result_type(grey.dtype, np.float32)  # which holds every number, so that none is rounded to another
    shown = np.clip((grey.astype(wide) - low) / (high - low or 1.0), 0, 1).astype(np.float32, copy=False)
    words = "grey from the 0.5th to the 99.5th percentile"
    if inverted:
        shown, words = 1 - shown, f"{words}, small numbers bright"
    return shown, words if channels == 1 else f"mean of {channels} channels, {words}"


def _percentiles(array: Array, *shares: float) -> list[float]:
    """Return percentiles of an array, of about a million of its numbers where it holds more."""
    some = array.reshape(-1)[:: max(1, array.size // 10**6)]
    return [float(each) for each in np.percentile(some.astype(np.float64), shares)]


# ---- parts of figures ------------------------------------------------------------------------------------------


def _new_figure(width: float, height: float, *title: str) -> Any:
    """Return a figure that draws on its own canvas, wide enough for the lines of its title."""
    figure_module = require("matplotlib.figure", extra="examples", purpose="drawing figures")
    width, height = min(WIDEST, max(NARROWEST, width)), min(WIDEST, height)
    figure = figure_module.Figure(figsize=(width, height), layout="constrained", dpi=120)
    figure.suptitle("\n".join(textwrap.fill(line, int(width * LETTERS)) for line in title), fontsize=11)
    figure._repr_png_ = functools.partial(png_bytes, figure)  # what a notebook asks for
    return figure


def _panel_height(widths: float, margin: float) -> float:
    """Return the height of panels whose widths, for a height of one, sum to ``widths``: larger where they are few."""
    return max(PANEL, min(2 * PANEL, (NARROWEST - margin) / widths))


def _draw_plane(axes: Any, image: Array, plane: _Plane, place: Place, patch: Sequence[int], **options: Any) -> Any:
    """Draw one slice in the coordinates of the recording."""
    extent = (-0.5, image.shape[1] * patch[plane.across] - 0.5, -0.5, image.shape[0] * patch[plane.along] - 0.5)
    width, true = plane.shape(place)
    aspect = place.sizes[plane.across] / place.sizes[plane.along] / width if true else "auto"
    drawn = axes.imshow(image, origin="lower", extent=extent, aspect=aspect, interpolation="nearest", **options)
    axes.set_xlim(-0.5, place.sizes[plane.across] - 0.5)
    limits = (-0.5, place.sizes[plane.along] - 0.5)
    axes.set_ylim(limits if plane.upwards else limits[::-1])
    axes.set_xlabel(place.labels[plane.across])
    axes.set_ylabel(place.labels[plane.along])
    axes.locator_params(nbins=5, integer=True, min_n_ticks=1)
    return drawn


def _mark_query(axes: Any, plane: _Plane, place: Place) -> None:
    """Mark the query with a cross that is seen on black and on white."""
    point = ([place.element[plane.across]], [place.element[plane.along]])
    axes.plot(*point, **{**MARK, "markersize": 14, "markeredgewidth": 3.6}, color="white")
    axes.plot(*point, **MARK, color="black")


def _draw_series(axes: Any, recording: Recording, place: Place) -> None:
    """Draw the channels of a series, up to six of them, and mark the query."""
    channels = min(recording.channels, len(COLOURS))
    for channel in range(channels):
        axes.plot(recording.array[:, channel].astype(np.float64), color=COLOURS[channel], linewidth=1)
    axes.axvline(place.element[0], color="black", linewidth=1, linestyle=":")
    axes.set_xlabel(place.labels[0])
    axes.set_ylabel("value" if recording.channels == 1 else f"channels 1 to {channels} of {recording.channels}")
    axes.margins(x=0.01)


# ---- the figures -----------------------------------------------------------------------------------------------


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
    values, words = _display_values(recording.array, recording.inverted)
    plane = _planes_through(place.sizes, names)[0]
    rest = plane.others(order)
    stepped = max(rest, key=lambda mode: place.sizes[mode], default=None)
    steps = (0,) if stepped is None else _frames(place.sizes[stepped], FRAMES, place.element[stepped])
    rows = math.ceil(len(steps) / 3)
    columns = math.ceil(len(steps) / rows)
    fixed = ", ".join(f"{names[mode]} = {place.element[mode]}" for mode in rest if mode != stepped)
    shown = "" if stepped is None else f"{len(steps)} of {place.sizes[stepped]} slices along {names[stepped]}"
    width, _ = plane.shape(place)
    panel = _panel_height(columns * width, 0.8)
    figure = _new_figure(
        columns * panel * width + 0.8,
        rows * (panel + 0.5) + 1.1 + 0.4 * (len(steps) < rows * columns),
        f"{recording.name}: {shown or 'the whole image'}{f', at {fixed}' if fixed else ''}",
        f"cross: {place.words()}",
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
        _draw_plane(axes, plane.cut(values, position), plane, place, (1,) * order, **GREY)
        axes.label_outer()
        if index + columns >= len(steps):  # nothing below it, not even where the last row is not full
            axes.tick_params(labelbottom=True)
            axes.set_xlabel(place.labels[plane.across])
        if tuple(position) == place.element:
            _mark_query(axes, plane, place)
    return figure


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
        f"{recording.name}: attention along each mode, {which}",
        f"1 = what each would get if all got the same; dotted: {place.words()}",
    )
    figure.supylabel("times uniform attention", fontsize=10)
    grid = figure.subplots(heads, order, squeeze=False, sharex="col", sharey="row")
    for head, mode in itertools.product(range(heads), range(order)):
        axes, centres = grid[head, mode], place.centres(mode)
        size, others = len(centres), tuple(m for m in range(order) if m != mode)
        style = {"marker": "o", "markersize": 3} if size <= 24 else {}
        axes.axhline(1, color="0.75", linewidth=0.8)
        axes.axvline(place.element[mode], color="black", linewidth=1, linestyle=":")
        axes.plot(centres, size * exact[head].sum(axis=others), color="black", linewidth=2.2, alpha=0.55, **style)
        for colour, each in zip(itertools.cycle(COLOURS), weights.values(), strict=False):
            axes.plot(centres, times_uniform(each, mode)[head], color=colour, linewidth=1.3, **style)
        axes.set_xlim(-0.5, place.sizes[mode] - 0.5)
        axes.locator_params(axis="x", nbins=6, integer=True, min_n_ticks=1)
        if head == heads - 1:
            axes.set_xlabel(place.labels[mode])
    for head in range(heads):  # once the rows are drawn, whose panels share a scale
        grid[head, 0].set_ylabel(f"head {head + 1}")
        grid[head, 0].set_ylim(bottom=0)
    labels = ["full attention, summed over the other modes", *(weights_label(*each) for each in weights.items())]
    columns = _legend_columns([len(label) for label in labels], int(figure.get_figwidth() * LETTERS))
    figure.legend(grid[-1, -1].lines[2:], labels, loc="outside lower center", ncols=columns, frameon=False)
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


def times_uniform(weights: Sequence[Array], mode: int) -> Array:
    """Return the weights along a mode relative to what every average that they share a softmax with would get.

    Args:
        weights: Weights ``(H, g_m)`` along every mode.
        mode: The mode.

    Examples:
        >>> times_uniform([np.full((1, 2), 0.5), np.full((1, 3), 1 / 3)], 1)
        array([[1., 1., 1.]])
        >>> times_uniform([np.full((1, 2), 0.2), np.full((1, 3), 0.2)], 1)  # one softmax over five
        array([[1., 1., 1.]])
    """
    shared = sum(vector.shape[1] for vector in weights) if _share_a_softmax(weights) else weights[mode].shape[1]
    found: Array = shared * weights[mode]
    return found


def _share_a_softmax(weights: Sequence[Array]) -> bool:
    """Say whether the weights along all modes together sum to one."""
    return len(weights) > 1 and abs(sum(float(vector[0].sum()) for vector in weights) - 1) < 1e-3


def weights_label(name: str, weights: Sequence[Array]) -> str:
    """Name an operator, and say so where its modes share one softmax.

    Args:
        name: The operator.
        weights: Weights ``(H, g_m)`` along every mode.

    Examples:
        >>> weights_label("kao_kv", [np.full((1, 2), 0.2), np.full((1, 3), 0.2)])
        'kao_kv (one softmax for all modes)'
    """
    return f"{name} (one softmax for all modes)" if _share_a_softmax(weights) else name


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
    order = len(place.sizes)
    title = f"{recording.name}: what {place.words()} attends to"
    if order == 1:
        return _series_maps(recording, place, maps, f"{title}{head and ', '}{head}")
    planes = _planes_through(place.sizes, place.names)
    values, words = _display_values(recording.array, recording.inverted)
    widths = [width for width, _ in _extents(planes, place)]
    margin = 1.2 + 0.9 * len(planes)
    panel = _panel_height(sum(widths), margin)
    figure = _new_figure(
        panel * sum(widths) + margin,
        (len(maps) + 1) * (panel + 0.35) + 0.7,
        title,
        "; ".join(filter(None, (head, "slices through the query" * (order > 2), "one colour scale for all"))),
        f"input: {words}",
    )
    grid = figure.subplots(len(maps) + 1, len(planes), squeeze=False, width_ratios=widths)
    ratios = list(_ratios(maps).values())
    limit = _limit(np.concatenate([plane.cut(ratios[0], place.query).ravel() for plane in planes]))
    for (row, column), axes in np.ndenumerate(grid):
        plane = planes[column]
        if row == 0:
            _draw_plane(axes, plane.cut(values, place.element), plane, place, (1,) * order, **GREY)
            held = ", ".join(f"{place.names[mode]} = {place.element[mode]}" for mode in plane.others(order))
            axes.set_title(held, fontsize=10)
        else:
            image = plane.cut(ratios[row - 1], place.query)
            drawn = _draw_plane(axes, image, plane, place, place.patch, cmap="RdBu_r", vmin=-limit, vmax=limit)
        _mark_query(axes, plane, place)
        axes.set_anchor("NW")
        if row < len(maps):
            axes.set_xlabel("")
            axes.tick_params(labelbottom=False)
    for axes, label in zip(grid[:, 0], ["input", *maps], strict=True):
        axes.set_title(label, loc="left", fontsize=10, fontweight="bold")
    bar = figure.colorbar(drawn, ax=list(grid.flat), extend="both", shrink=0.8, aspect=30)
    ticks = _ratio_ticks(limit)
    labels = [f"{ratio:.3g}×" if ratio >= 1 else f"1/{1 / ratio:.3g}" for ratio in ticks]
    bar.set_ticks([math.log2(ratio) for ratio in ticks], labels=labels)
    bar.set_label("less attention than the average position gets  ←  →  more")
    return figure


def _ratios(maps: Mapping[str, Array]) -> dict[str, Array]:
    """Return weights relative to uniform attention, in powers of two."""
    return {name: np.log2(np.maximum(each * each.size, 1e-30)) for name, each in maps.items()}


class Slices(NamedTuple):
    """Slices of a recording and of maps, for a page that steps through them. All have the pixels of the recording.

    Attributes:
        mode: The mode that is stepped along, or None where there is one slice.
        elements: Index of each slice along it.
        chosen: Which slice holds the query.
        images: Grey or colours ``(h, w)`` or ``(h, w, 3)``, between 0 and 1 or bytes.
        maps: Weights relative to uniform attention, in powers of two, by map.
        limit: Where the scale of colours ends.
        width: Width of a slice for a height of one.
        cross: Where the query is, shares of width and height from the upper left.
    """

    mode: int | None
    elements: tuple[int, ...]
    chosen: int
    images: list[Array]
    maps: dict[str, list[Array]]
    limit: float
    width: float
    cross: tuple[float, float]


def slices(recording: Recording, place: Place, maps: Mapping[str, Array], *, most: int, pixels: int) -> Slices:
    """Cut a recording of two or more modes, and maps over it, into slices along its longest remaining mode.

    Args:
        recording: What was read.
        place: Where the query is.
        maps: Weights over the grid, by map; the first sets the scale of colours.
        most: Largest number of slices.
        pixels: Larger slices are thinned to about so many pixels a side.

    Returns:
        The slices.
    """
    plane = _planes_through(place.sizes, place.names)[0]
    stepped = max(plane.others(len(place.sizes)), key=lambda mode: place.sizes[mode], default=None)
    patches = (
        (0,)
        if stepped is None
        else _frames(-(-place.sizes[stepped] // place.patch[stepped]), most, place.query[stepped])
    )
    across, along = plane.across, plane.along
    thin = [np.arange(0, place.sizes[mode], -(-place.sizes[mode] // pixels)) for mode in (along, across)]
    values, _ = _display_values(recording.array, recording.inverted)
    ratios = _ratios(maps)

    def shown(array: Array, position: Sequence[int], patch: tuple[int, int]) -> Array:
        """Cut one slice, and thin it."""
        image = plane.cut(array, position)[np.ix_(*(each // part for each, part in zip(thin, patch, strict=True)))]
        return image[::-1] if plane.upwards else image

    elements, images = [], []
    cuts: dict[str, list[Array]] = {name: [] for name in maps}
    for patch in patches:
        query, element = list(place.query), list(place.element)
        if stepped is not None:
            query[stepped] = patch
            middle = patch * place.patch[stepped] + (place.patch[stepped] - 1) // 2
            element[stepped] = min(middle, place.sizes[stepped] - 1)
        elements.append(0 if stepped is None else element[stepped])
        images.append(shown(values, element, (1, 1)))
        for name, each in ratios.items():
            cuts[name].append(shown(each, query, (place.patch[along], place.patch[across])))
    down = (place.element[along] + 0.5) / place.sizes[along]
    return Slices(
        stepped,
        tuple(elements),
        0 if stepped is None else patches.index(place.query[stepped]),
        images,
        cuts,
        _limit(next(iter(ratios.values()))),
        plane.shape(place)[0],
        ((place.element[across] + 0.5) / place.sizes[across], 1 - down if plane.upwards else down),
    )


def _limit(ratios: Array) -> float:
    """Return where a scale of colours ends, in powers of two."""
    return max(0.5, float(np.percentile(np.abs(ratios), 99.5)))


def _ratio_ticks(limit: float) -> list[float]:
    """Return ratios to mark on a scale from ``-limit`` to ``limit`` in powers of two."""
    if limit < 1:
        ratios = [1 / 1.9, 1 / 1.6, 1 / 1.4, 1 / 1.2, 1, 1.2, 1.4, 1.6, 1.9]
        return [ratio for ratio in ratios if abs(math.log2(ratio)) <= limit]
    step = math.ceil(limit / 4)
    return [2.0**power for power in range(-4 * step, 4 * step + 1, step) if abs(power) <= limit]


def _series_maps(recording: Recording, place: Place, maps: Mapping[str, Array], title: str) -> Any:
    """Draw the attention of a query over a series, under the series."""
    figure = _new_figure(9.0, 2 * PANEL + 1.2, title)
    upper, lower = figure.subplots(2, 1, sharex=True)
    _draw_series(upper, recording, place)
    upper.set_xlabel("")
    for index, (label, each) in enumerate(maps.items()):
        exact = {"linewidth": 2.4, "alpha": 0.55, "color": "black"}
        style = exact if index == 0 else {"color": COLOURS[(index - 1) % len(COLOURS)]}
        lower.plot(place.centres(0), each * each.size, label=label, **style)
    lower.axvline(place.element[0], color="black", linewidth=1, linestyle=":")
    lower.axhline(1, color="0.75", linewidth=0.8)
    lower.set_xlabel(place.labels[0])
    lower.set_ylabel("times uniform attention")
    lower.set_xlim(-0.5, place.sizes[0] - 0.5)
    lower.legend(frameon=False)
    return figure


# ---- maps of anyone's own model ---------------------------------------------------------------------------------


@retells
def draw_attention_maps(
    maps: Mapping[str, Tensor | Array] | Tensor | Array,
    data: Tensor | Array,
    *,
    at: Sequence[int],
    modes: int | str | Sequence[str] | None = None,
    title: str = "attention",
) -> Any:
    r"""Draw attention maps of one query over the data: slices through the query, one row a map, the data on top.

    Weights are drawn relative to uniform attention, on one scale of colours that the first map sets. Maps of a grid of
    patches are stretched over the elements that each patch holds.

    Args:
        maps: Weights over the grid, by what they are; or those of one map. As `attention_map` returns them, of one
            sample and head.
        data: What the model saw: a video, a volume, an image, a series.
        at: The query, one index a mode of the grid.
        modes: Names of the modes, as in ``"t h w"``; numbers by default.
        title: What it is, in words.

    Returns:
        A ``matplotlib.figure.Figure`` that belongs to no window: save it by ``figure.savefig("maps.png")``.

    Raises:
        ShapeError: If the maps differ in size, do not lie on the data, or are empty.
        DtypeError: If no array can be made of the maps or the data.
        OptionError: If there is no map, or ``at`` does not name one of its places.
        ModesError: If ``modes`` does not fit.
        MissingPackageError: If matplotlib is not installed.

    Shape:
        - maps: :math:`(g_1, \dots, g_N)` with at most six modes
        - data: :math:`(n_1, \dots, n_N)` or, with channels, :math:`(n_1, \dots, n_N, C)`; :math:`n_m` indices lie in
          :math:`g_m` patches of equal size, the last of which may be smaller

    Examples:
        >>> import torch
        >>> video, weights = torch.rand(8, 32, 32, 3), torch.rand(8, 16, 16)
        >>> figure = draw_attention_maps(weights / weights.sum(), video, at=(4, 8, 8), modes="t h w")
        >>> len(figure.axes)  # three slices of the video, three of the map, and the scale
        7
    """
    named = dict(maps) if isinstance(maps, Mapping) else {"weights": maps}
    arrays = {name: _real(each, f"maps[{name!r}]").astype(float) for name, each in named.items()}
    if not arrays:
        raise OptionError("maps is empty, but at least one map is needed.")
    (first, grid), *others = [(name, each.shape) for name, each in arrays.items()]
    for name, shape in others:
        if shape != grid:
            raise ShapeError(f"the map has shape {grid} in maps[{first!r}] but {shape} in maps[{name!r}].")
    order, values = len(grid), _real(data, "data")
    if not 1 <= order <= MAX_ORDER:
        raise ShapeError(f"a map has {order} modes, but 1 to {MAX_ORDER} can be drawn.")
    if values.ndim not in (order, order + 1):
        raise ShapeError(
            f"data has {values.ndim} dimensions, but {order} modes need {order}, or {order + 1} with channels."
        )
    if 0 in (*grid, *values.shape):
        raise ShapeError(f"the map has shape {grid} and data {values.shape}, there is nothing in one of them.")
    values = values[..., None] if values.ndim == order else values
    spec = ModeSpec.parse(order if modes is None else modes)
    if spec.order != order:
        raise ShapeError(f"modes names {spec.order} modes, but the maps have {order}.")
    patch = _patch(grid, values.shape[:-1], spec)
    recording = Recording(title, title, values, spec)
    return maps_figure(recording, Place(spec, recording.sizes, patch, place_on(grid, integers(at, "at"))), "", arrays)


def read_numbers(data: Any, what: str = "data") -> Array:
    """Read numbers as an array of NumPy, in their own type where NumPy has it. What is masked becomes NaN.

    Args:
        data: A tensor, an array, or what NumPy makes one of.
        what: What it is called.

    Raises:
        DtypeError: If no array can be made of it.

    Examples:
        >>> read_numbers(torch.tensor([1, 2], dtype=torch.uint8))
        array([1, 2], dtype=uint8)
    """
    try:
        if isinstance(data, Tensor):
            data = data.detach().cpu().to_dense().resolve_conj().resolve_neg()
            known = not data.is_floating_point() or data.dtype in (torch.float16, torch.float32, torch.float64)
            return (data if known else data.float()).numpy()
        if np.ma.is_masked(data):
            return np.ma.filled(data.astype(np.result_type(data.dtype, np.float32)), np.nan)
        return np.asarray(data)
    except (TypeError, ValueError, RuntimeError) as cause:
        raise DtypeError(f"{what} cannot be read as an array of numbers: {one_line(cause)}") from cause


def _real(given: Any, what: str) -> Array:
    """Read real numbers."""
    array = read_numbers(given, what)
    if array.dtype.kind not in "fiub":
        raise OptionError(f"{what} must hold real numbers, got {array.dtype}.")
    return array


def _patch(grid: Sequence[int], sizes: Sequence[int], spec: ModeSpec) -> tuple[int, ...]:
    """Sizes of the patches that a grid lies in."""
    patch = tuple(-(-size // count) for count, size in zip(grid, sizes, strict=True))
    for mode, (part, count, size) in enumerate(zip(patch, grid, sizes, strict=True)):
        if -(-size // part) != count:
            raise ShapeError(
                f"mode {spec.label(mode)} has size {size} in data, which patches of equal size do not cut into {count}."
            )
    return patch
