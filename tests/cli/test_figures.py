"""Figures: the right numbers in the right place, any order, and nothing left behind."""

from __future__ import annotations

import itertools
import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tensorattn as ta
from tensorattn.cli.attend import default_choices
from tensorattn.cli.common import parse_choices, png_bytes
from tensorattn.cli.embedding import embed
from tensorattn.cli.figures import (
    Place,
    _display_values,
    _extents,
    _frames,
    _planes_through,
    input_figure,
    maps_figure,
    read_numbers,
    slices,
    weights_figure,
)
from tensorattn.cli.readers.contents import Step
from tensorattn.cli.recordings import FileArray, Recording, make_recording, parse_modes
from tensorattn.cli.view import draw, look

SIZES = (7, 6, 5, 4, 3, 2)


def recording(*shape: int, modes: str, dtype: str = "float32") -> Recording:
    array = np.random.default_rng(0).integers(0, 200, shape).astype(dtype)
    return make_recording(FileArray(array), name="noise", source="noise", modes=parse_modes(modes))


def place(of: Recording, patch: tuple[int, ...], query: tuple[int, ...]) -> Place:
    return Place(of.modes, of.sizes, patch, query)


def texts(figure: Any) -> str:
    """Every word of a figure but its ticks."""
    words = [figure.get_suptitle()]
    for axes in figure.axes:
        words += [
            axes.get_title(),
            axes.get_title(loc="left"),
            axes.get_xlabel(),
            axes.get_ylabel(),
            *(each.get_text() for each in axes.texts),
        ]
    for legend in (*figure.legends, *filter(None, (axes.get_legend() for axes in figure.axes))):
        words += [each.get_text() for each in legend.get_texts()]
    return " | ".join(words)


def uniform(*shape: int) -> np.ndarray:
    return np.full(shape, 1 / math.prod(shape))


# ---- whole figures -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("order", "named"),
    [(1, True), (3, False), *(pytest.param(order, True, marks=pytest.mark.thorough) for order in range(2, 7))],
)
def test_figures_of_every_order(order: int, named: bool) -> None:
    modes = " ".join("abcdef"[:order]) if named else str(order)
    of = recording(*SIZES[:order], 2, modes=modes)
    patch = (2,) * order
    tokens = embed(of.array, patch, dim=8, heads=2, logit_std=1.0, seed=0)
    where = place(of, patch, tuple(-(-size // 2) // 2 for size in of.sizes))
    figures = draw(look(of, where, tokens, default_choices()))
    assert list(figures) == ["noise-input.png", "noise-weights.png", "noise-maps.png"]
    for figure in figures.values():
        picture = png_bytes(figure)
        assert picture.startswith(b"\x89PNG") and len(picture) > 5000
        width, height = figure.get_size_inches()
        assert 5 <= width <= 20 and 2 <= height <= 20
        words = texts(figure)
        assert "noise" in words and where.words() in words.replace("\n", " ")
    for name in where.names:
        assert name in texts(figures["noise-weights.png"])
    assert "additive" in texts(figures["noise-maps.png"])


def test_no_figure_is_left_in_pyplot() -> None:
    of = recording(5, 6, modes="h w")
    input_figure(of, place(of, (1, 1), (2, 3)))
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or pyplot.get_fignums() == []


def images(axes: Any) -> np.ndarray:
    (image,) = axes.get_images()
    return np.asarray(image.get_array())


def marks(axes: Any) -> list[tuple[float, float]]:
    """Where crosses were drawn."""
    crosses = [line for line in axes.lines if line.get_marker() == "+"]
    return [(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in crosses]


def test_the_input_shows_the_frame_of_the_query_and_marks_it() -> None:
    of = recording(9, 20, 30, modes="t h w")
    where = place(of, (2, 4, 4), (3, 2, 5))
    assert where.element == (6, 9, 21)
    figure = input_figure(of, where)
    shown = {axes.get_title(): axes for axes in figure.axes if axes.get_visible()}
    assert len(shown) == 6 and "t = 6" in shown
    marked = {title: marks(axes) for title, axes in shown.items() if marks(axes)}
    assert marked == {"t = 6": [(21, 9)] * 2}
    drawn, stored = images(shown["t = 6"]), of.array[6, ..., 0]
    assert drawn.shape == (20, 30)
    assert np.corrcoef(drawn.ravel(), stored.ravel())[0, 1] > 0.99
    assert shown["t = 6"].get_ylim() == (19.5, -0.5)  # h downwards, as in an image


def test_cartesian_modes_are_drawn_as_in_a_graph() -> None:
    of = recording(20, 30, 4, modes="x y z")
    figure = input_figure(of, place(of, (1, 1, 1), (2, 3, 1)))
    axes = figure.axes[0]
    assert (axes.get_xlim(), axes.get_ylim()) == ((-0.5, 19.5), (-0.5, 29.5))
    assert images(axes).shape == (30, 20)


def test_padding_is_not_drawn() -> None:
    of = recording(10, 14, modes="h w")
    where = place(of, (4, 4), (2, 3))
    assert where.element == (9, 13)  # the middle of a patch, but inside the recording
    figure = maps_figure(of, where, "head 1", {"exact attention": uniform(3, 4), "additive": uniform(3, 4)})
    for axes in figure.axes[:3]:
        assert axes.get_xlim() == (-0.5, 13.5) and axes.get_ylim() == (9.5, -0.5)
        (image,) = axes.get_images()
        assert tuple(image.get_extent()) == (
            (-0.5, 13.5, -0.5, 9.5) if axes is figure.axes[0] else (-0.5, 15.5, -0.5, 11.5)
        )


def test_maps_share_one_colour_scale_around_uniform_attention() -> None:
    of = recording(6, 8, modes="h w")
    random = np.random.default_rng(0)
    exact, other = (random.dirichlet(np.ones(48)).reshape(6, 8) for _ in range(2))
    figure = maps_figure(of, place(of, (1, 1), (2, 3)), "head 1", {"exact attention": exact, "other": other})
    limits = {axes.get_images()[0].get_clim() for axes in figure.axes[1:3]}
    ((low, high),) = limits
    assert low == -high and high > 1
    np.testing.assert_allclose(images(figure.axes[1]), np.log2(exact * 48))
    np.testing.assert_allclose(images(figure.axes[2]), np.log2(other * 48))


def test_weights_are_drawn_relative_to_uniform_attention() -> None:
    of = recording(4, 6, modes="h w")
    exact = np.random.default_rng(0).dirichlet(np.ones(24), size=2).reshape(2, 4, 6)
    rows, columns = exact.sum(axis=2), exact.sum(axis=1)
    weights = {"additive": [rows, columns], "kao_kv": [rows / 2, columns / 2]}
    figure = weights_figure(of, place(of, (1, 1), (2, 3)), exact, weights)
    assert len(figure.axes) == 4
    for (head, mode), axes in zip(itertools.product(range(2), range(2)), figure.axes, strict=True):
        _, _, first, second, third = axes.lines
        expected = (4, 6)[mode] * (rows, columns)[mode][head]
        np.testing.assert_allclose(first.get_ydata(), expected)
        np.testing.assert_allclose(second.get_ydata(), expected)
        np.testing.assert_allclose(third.get_ydata(), 10 * (rows, columns)[mode][head] / 2)  # of 4 + 6 averages
        low, high = axes.get_ylim()
        assert low == 0 and high >= expected.max()
    words = texts(figure)
    assert "kao_kv (one softmax for all modes)" in words and "additive (one" not in words


def test_weights_of_zero_can_be_drawn() -> None:
    of = recording(4, 6, modes="h w")
    exact = np.zeros((4, 6))
    exact[1, 2] = 1.0
    png_bytes(maps_figure(of, place(of, (1, 1), (1, 2)), "head 1", {"exact attention": exact}))


def test_the_outer_product_of_additive_weights_is_the_exact_map_of_additive_keys() -> None:
    ramp = np.add.outer(np.linspace(0, 1, 5) ** 2, np.linspace(-1, 1, 7))[..., None]
    of = make_recording(FileArray(ramp), name="ramp", source="ramp", modes=parse_modes("h w"))
    tokens = embed(of.array, (1, 1), dim=8, heads=2, logit_std=1.0, seed=0)
    rows, columns = tokens.key[:, :, :1], tokens.key[:, :1]
    additive = tokens._replace(key=rows + columns)
    where = place(of, (1, 1), (2, 3))
    figure = draw(look(of, where, additive, parse_choices(["additive"])))["ramp-maps.png"]
    np.testing.assert_allclose(images(figure.axes[1]), images(figure.axes[2]), atol=1e-5)


def test_operators_with_the_same_map_share_a_row() -> None:
    of = recording(5, 6, 3, modes="h w")
    tokens = embed(of.array, (1, 1), dim=8, heads=2, logit_std=1.0, seed=0)
    chosen = parse_choices(["additive", "truncated:interaction_order=1", "kao_kv", "axial", "clustered"])
    view = look(of, place(of, (1, 1), (2, 3)), tokens, chosen)
    assert list(view.maps) == ["full attention", "clustered", "additive, truncated:interaction_order=1", "kao_kv"]
    assert next(iter(view.weights)) == "clustered"
    words = texts(draw(view)["noise-maps.png"])
    assert "additive, truncated:interaction_order=1 |" in words and "axial" not in words


# ---- steps -------------------------------------------------------------------------------------------------------


def drawn_shape(axes: Any) -> float:
    """Height of a panel as it is drawn, for a width of one."""
    png_bytes(axes.figure)
    box = axes.get_window_extent()
    return box.height / box.width


@pytest.mark.parametrize("thick", [1.0, 5.0])
def test_slices_are_as_high_as_their_steps_say(thick: float) -> None:
    of = recording(20, 20, 10, modes="x y z")
    where = Place(of.modes, of.sizes, (1, 1, 1), (9, 9, 4), (Step(1.0, "mm"), Step(1.0, "mm"), Step(thick, "mm")))
    figure = maps_figure(of, where, "head 1", {"full attention": uniform(20, 20, 10)})
    flat, upright = figure.axes[0], figure.axes[1]
    assert (upright.get_xlabel(), figure.axes[4].get_xlabel()) == ("", "x (1 mm each)")
    assert upright.get_ylabel() == f"z ({thick:.3g} mm each)"
    assert drawn_shape(flat) == pytest.approx(1, rel=0.01)
    assert drawn_shape(upright) == pytest.approx(thick / 2, rel=0.01)
    assert _extents(_planes_through(of.sizes, where.names), where)[:2] == [
        pytest.approx((20 / max(20, 10 * thick), 20 / max(20, 10 * thick))),
        pytest.approx((20 / max(20, 10 * thick), 10 * thick / max(20, 10 * thick))),
    ]


def test_modes_without_a_unit_in_common_are_stretched() -> None:
    of = recording(40, 4, 8, modes="t h w")
    steps = (Step(0.1, "s"), Step(2.0), Step(1.0))
    assert Place(of.modes, of.sizes, (1, 1, 1), (0, 0, 0), steps).lengths(0, 1) is None
    figure = input_figure(of, Place(of.modes, of.sizes, (1, 1, 1), (0, 0, 0), steps))
    assert drawn_shape(figure.axes[0]) == pytest.approx(1, rel=0.01)  # 4 pixels of 2 by 8 pixels of 1
    assert figure.axes[0].get_ylabel() == "h"


@pytest.mark.parametrize("sizes", [(5, 16, 16), (2, 6, 6), (4, 16, 40)])
def test_nothing_is_cut_off(sizes: tuple[int, ...]) -> None:
    of = recording(*sizes, modes="z h w")
    where = Place(of.modes, sizes, (1, 1, 1), tuple(size // 2 for size in sizes), (Step(1.0, "mm"),) * 3)
    maps = {"full attention": uniform(*sizes), "clustered:cells=blocks": uniform(*sizes)}
    for figure in (input_figure(of, where), maps_figure(of, where, "head 1", maps)):
        png_bytes(figure)
        drawn, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
        assert 0 <= drawn.x0 and 0 <= drawn.y0 and drawn.x1 <= width and drawn.y1 <= height


def test_what_is_meant_to_be_inverted_is_drawn_so() -> None:
    ramp = np.linspace(0, 1, 400).reshape(20, 20, 1)
    shown, words = _display_values(ramp, inverted=True)
    assert shown[0, 0] == 1 and shown[-1, -1] == 0
    assert words == "grey from the 0.5th to the 99.5th percentile, small numbers bright"


def test_colours_of_16_bits_are_colours() -> None:
    colours = np.random.default_rng(0).integers(0, 2**16, (4, 5, 3)).astype(np.uint16)
    shown, words = _display_values(colours)
    np.testing.assert_array_equal(shown, colours >> 8)
    assert words == "colours as stored"
    shown, words = _display_values(colours // 4)
    assert shown.max() == 1 and shown.ndim == 3 and words.startswith("colours 4.")


@pytest.mark.parametrize("modes", ["t h w", "x y z"])
def test_slices_for_a_slider(modes: str) -> None:
    of = recording(9, 8, 30, modes=modes)
    where = place(of, (2, 4, 4), (3, 1, 5))
    weights = np.random.default_rng(0).dirichlet(np.ones(5 * 2 * 8)).reshape(5, 2, 8)
    cuts = slices(of, where, {"full attention": weights}, most=20, pixels=15)
    stepped, along, across = (0, 1, 2) if modes == "t h w" else (1, 2, 0)
    assert cuts.mode == stepped and len(cuts.elements) == (5, 2)[stepped]
    assert cuts.elements[cuts.chosen] == where.element[stepped]
    thin = -(-of.sizes[across] // 15), -(-of.sizes[along] // 15)
    for step, element in enumerate(cuts.elements):
        grid = np.moveaxis(weights, (along, across, stepped), (0, 1, 2))[..., element // where.patch[stepped]]
        whole = grid.repeat(where.patch[along], 0).repeat(where.patch[across], 1)
        whole = np.log2(whole * 80)[: of.sizes[along] : thin[1], : of.sizes[across] : thin[0]]
        np.testing.assert_allclose(cuts.maps["full attention"][step], whole[::-1] if modes == "x y z" else whole)
        assert cuts.images[step].shape == whole.shape
    right, down = ((where.element[mode] + 0.5) / of.sizes[mode] for mode in (across, along))
    assert cuts.cross == pytest.approx((right, 1 - down if modes == "x y z" else down))


def test_a_figure_shows_itself_in_a_notebook() -> None:
    of = recording(5, 6, modes="h w")
    assert input_figure(of, place(of, (1, 1), (2, 3)))._repr_png_().startswith(b"\x89PNG")


# ---- slices --------------------------------------------------------------------------------------------------


@given(st.integers(2, 6), st.randoms(use_true_random=False))
def test_a_plane_cuts_what_a_loop_finds(order: int, random: Any) -> None:
    sizes = [random.randint(1, 4) for _ in range(order)]
    names = random.sample(["t", "h", "w", "x", "y", "z"], order)
    array = np.arange(math.prod(sizes) * 2).reshape(*sizes, 2)
    position = [random.randrange(size) for size in sizes]
    planes = _planes_through(sizes, names)
    assert len(planes) == len({frozenset((p.across, p.along)) for p in planes}) == min(3, math.comb(order, 2))
    for plane in planes:
        cut = plane.cut(array, position)
        assert cut.shape == (sizes[plane.along], sizes[plane.across], 2)
        for row, column in itertools.product(*map(range, cut.shape[:2])):
            index = list(position)
            index[plane.along], index[plane.across] = row, column
            np.testing.assert_array_equal(cut[row, column], array[tuple(index)])


def test_the_first_plane_has_no_time() -> None:
    plane, *_ = _planes_through((40, 4, 5), ("t", "h", "w"))
    assert (plane.along, plane.across) == (1, 2)


@given(st.integers(1, 100), st.integers(1, 10), st.data())
def test_frames_are_in_order_and_hold_the_query(size: int, shown: int, data: st.DataObject) -> None:
    include = data.draw(st.integers(0, size - 1))
    frames = _frames(size, shown, include)
    count = min(shown, size)
    assert include in frames and len(frames) == count and 0 <= frames[0] and frames[-1] < size
    assert {after - before for before, after in itertools.pairwise(frames)} <= {size // count}


def test_what_is_displayed() -> None:
    colours = np.random.default_rng(0).integers(0, 255, (4, 5, 4)).astype(np.uint8)
    shown, words = _display_values(colours)
    np.testing.assert_array_equal(shown, colours[..., :3])
    assert words == "colours as stored"
    dark = colours // 4
    shown, words = _display_values(dark)
    assert words == "colours 4.1 times as bright, the 99.5th percentile is white"
    np.testing.assert_allclose(shown, np.minimum(dark[..., :3] / np.percentile(dark[..., :3], 99.5), 1), rtol=1e-6)
    assert _display_values(np.zeros((3, 3, 3), np.uint8))[1] == "colours as stored"
    grey, words = _display_values(np.linspace(-5, 5, 400).reshape(20, 20, 1))
    assert grey.min() == 0 and grey.max() == 1 and words == "grey from the 0.5th to the 99.5th percentile"
    mean, words = _display_values(colours.astype(np.int32))
    assert mean.shape == (4, 5) and words.startswith("mean of 4 channels, grey")
    assert _display_values(np.zeros((3, 3, 1), bool))[0].max() == 0
    wide = (257 * colours[..., :3].astype(np.uint16)).astype(">u2")
    np.testing.assert_array_equal(_display_values(wide)[0], colours[..., :3])


@pytest.mark.parametrize("far", [1e12, 101325 - 1e-6, -(2**53)])
def test_numbers_that_differ_little_are_displayed_as_they_differ(far: float) -> None:
    shares = np.random.default_rng(0).random((20, 20, 1))
    shown, _ = _display_values(far + (1e-6 if far == 101325 - 1e-6 else 2**10) * shares)
    assert shown.dtype == np.float32
    np.testing.assert_allclose(shown, _display_values(shares)[0], atol=1e-2)


def test_a_query_is_told_with_the_patch_that_contains_it() -> None:
    of = recording(4, 6, modes="h w")
    assert place(of, (2, 3), (1, 1)).words() == "the query h=2 w=4 (a patch of 2×3)"
    assert place(of, (1, 1), (1, 2)).words() == "the query h=1 w=2"
    where = place(recording(4, 6, modes="2"), (2, 1), (1, 2))
    assert where.words() == "the query (2, 2) (a patch of 2×1)"
    exact, where = uniform(2, 2), place(of, (2, 3), (1, 1))
    figures = (
        input_figure(of, where),
        maps_figure(of, where, "head 1", {"exact attention": exact}),
        weights_figure(of, where, exact[None], {}),
    )
    for figure in figures:
        assert "the query h=2 w=4 (a patch of 2×3)" in " ".join(figure.get_suptitle().split())


def test_the_lines_of_a_legend_are_of_about_the_same_length() -> None:
    of = recording(2, 2, 2, 2, 2, 2, modes="a b c d e f")
    exact, where = uniform(*(2,) * 6)[None], place(of, (1,) * 6, (0,) * 6)
    for count in range(1, 10):
        figure = weights_figure(of, where, exact, {f"operator {k}": [uniform(1, 2)] * 6 for k in range(count)})
        (legend,) = figure.legends
        lines = -(-(count + 1) // legend._ncols)
        assert lines * legend._ncols - (count + 1) < lines
        assert legend._ncols > 1 or count == 0


# ---- maps of anyone's own model --------------------------------------------------------------------------------


def weights(*grid: int, seed: int = 0) -> torch.Tensor:
    return torch.softmax(torch.randn(grid, generator=torch.Generator().manual_seed(seed)).flatten(), 0).reshape(grid)


@pytest.mark.parametrize("channels", [(), (3,)])
@pytest.mark.parametrize("order", [2, *(pytest.param(order, marks=pytest.mark.thorough) for order in (1, 3, 4, 5, 6))])
def test_maps_of_every_order_with_and_without_channels(order: int, channels: tuple[int, ...]) -> None:
    grid = SIZES[:order]
    data = np.random.default_rng(0).random((*(2 * size - 1 for size in grid), *channels))
    maps = {"ours": weights(*grid), "exact": weights(*grid, seed=1).numpy()}
    figure = ta.draw_attention_maps(maps, data, at=(-1,) * order, modes=" ".join("abcdef"[:order]), title="noise")
    assert png_bytes(figure).startswith(b"\x89PNG")
    words = texts(figure)
    assert words.startswith("noise: what the query ") and "ours" in words and "exact" in words


def test_the_weights_lie_where_the_data_are() -> None:
    """A map with all its weight in one patch is bright there, in the coordinates of the data."""
    spot = torch.full((4, 5), 1e-9)
    spot[1, 3] = 1.0
    figure = ta.draw_attention_maps(spot, torch.zeros(8, 15), at=(1, 3), modes="h w")
    (image,) = figure.axes[1].get_images()
    assert np.unravel_index(np.argmax(image.get_array()), (4, 5)) == (1, 3)
    assert image.get_extent() == [-0.5, 14.5, -0.5, 7.5]


def test_a_tensor_is_drawn_as_the_same_array() -> None:
    """In colour, where it holds bytes; and maps of whole numbers do not overflow."""
    colours = np.random.default_rng(0).integers(0, 255, (8, 15, 3)).astype(np.uint8)
    counts = np.full((4, 5), 200, np.uint8)
    for convert in (np.asarray, torch.as_tensor):
        figure = ta.draw_attention_maps(convert(counts), convert(colours), at=(1, 3))
        np.testing.assert_array_equal(figure.axes[0].get_images()[0].get_array(), colours)
        np.testing.assert_allclose(figure.axes[1].get_images()[0].get_array(), np.log2(4000.0))


def test_every_map_of_a_series_is_drawn() -> None:
    maps = {f"map {k}": weights(6, seed=k) for k in range(9)}
    figure = ta.draw_attention_maps(maps, torch.rand(6), at=(2,))
    assert all(name in texts(figure) for name in maps)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"maps": {}}, ta.OptionError, "maps is empty, but at least one map is needed."),
        (
            {"maps": {"a": weights(2, 3), "b": weights(2, 4)}},
            ta.ShapeError,
            "the map has shape (2, 3) in maps['a'] but (2, 4) in maps['b'].",
        ),
        ({"maps": torch.tensor(1.0)}, ta.ShapeError, "a map has 0 modes, but 1 to 6 can be drawn."),
        ({"maps": weights(*(1,) * 7)}, ta.ShapeError, "a map has 7 modes, but 1 to 6 can be drawn."),
        (
            {"maps": np.ones((2, 3), np.complex64)},
            ta.OptionError,
            "maps['weights'] must hold real numbers, got complex64.",
        ),
        (
            {"data": torch.zeros(4)},
            ta.ShapeError,
            "data has 1 dimensions, but 2 modes need 2, or 3 with channels.",
        ),
        (
            {"data": torch.zeros(4, 10)},
            ta.ShapeError,
            "mode 1 has size 10 in data, which patches of equal size do not cut into 7.",
        ),
        (
            {"data": torch.zeros(4, 2)},
            ta.ShapeError,
            "mode 1 has size 2 in data, which patches of equal size do not cut into 7.",
        ),
        (
            {"data": torch.zeros(0, 14)},
            ta.ShapeError,
            "the map has shape (2, 7) and data (0, 14), there is nothing in one of them.",
        ),
        (
            {"maps": weights(2, 7).to("meta")},
            ta.DtypeError,
            "maps['weights'] cannot be read as an array of numbers: Cannot copy out of meta tensor; no data!",
        ),
        ({"modes": "t h w"}, ta.ShapeError, "modes names 3 modes, but the maps have 2."),
        ({"at": (0,)}, ta.OptionError, "at has 1 indices, but there are 2 modes."),
        ({"at": (0, 1.5)}, ta.OptionError, "at must be integers, got (0, 1.5)."),
        ({"at": (0, 7)}, ta.OptionError, "at has index 7 at place 1, but the size there is 7."),
    ],
)
def test_maps_that_do_not_fit(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"maps": weights(2, 7), "data": torch.zeros(4, 14), "at": (0, 0), **changed}
    with pytest.raises(error) as caught:
        ta.draw_attention_maps(**given)
    assert str(caught.value) == f"draw_attention_maps: {message}"


def test_numbers_of_every_tensor_and_what_is_masked() -> None:
    x = torch.rand(4, 5)
    for made in (x.to_sparse(), torch._neg_view(-x), (1j * x).conj().imag.neg(), np.ma.masked_array(x.numpy())):
        np.testing.assert_array_equal(read_numbers(made), x.numpy())
    assert read_numbers((1j * x).conj()).dtype == np.complex64
    for small in (torch.bfloat16, torch.float8_e4m3fn):
        np.testing.assert_array_equal(read_numbers(x.to(small)), x.to(small).float().numpy())
    np.testing.assert_array_equal(read_numbers(np.ma.masked_equal([[1, 2], [3, 1]], 1)), [[np.nan, 2], [3, np.nan]])


@pytest.mark.thorough
def test_maps_of_every_operator() -> None:
    x = torch.randn(1, 4, 3, 5, 8)
    for name, record in ta.OPERATORS.items():
        attention = record.function(x, x, x, order=3, return_attention=True).attention
        spread = ta.attention_map(attention, (4, 3, 5), operator=name, at=(1, 2, 3))[0]
        for data in (x[0, ..., :1], torch.rand(8, 9, 5)):
            assert ta.draw_attention_maps({name: spread}, data, at=(1, 2, 3)).axes


def test_the_stack_of_a_scanner_stands_upright() -> None:
    planes = _planes_through((24, 90, 128), ("z", "h", "w"))
    assert [(plane.across, plane.along, plane.upwards) for plane in planes] == [
        (2, 1, False),
        (2, 0, True),
        (1, 0, True),
    ]


def test_slices_tell_every_mode_that_is_held() -> None:
    of = recording(3, 4, 5, 6, modes="t x y z")
    figure = maps_figure(of, place(of, (1, 1, 1, 1), (1, 2, 3, 4)), "", {"full attention": uniform(3, 4, 5, 6)})
    assert [axes.get_title() for axes in figure.axes[:3]] == ["t = 1, x = 2", "t = 1, y = 3", "t = 1, z = 4"]
