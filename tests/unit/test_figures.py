"""Figures: the right numbers in the right place, any order, and nothing left behind."""

from __future__ import annotations

import itertools
import math
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorattn.attend import views
from tensorattn.attend.choices import default_choices, parse_choices
from tensorattn.attend.embedding import embed
from tensorattn.attend.figures import Place, input_figure, maps_figure, weights_figure
from tensorattn.attend.output import png_bytes
from tensorattn.attend.readers import FileArray
from tensorattn.attend.recordings import Recording, make_recording, parse_modes
from tensorattn.attend.slices import display_values, frame_indices, planes_through
from tensorattn.errors import OptionError

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
        words += [axes.get_title(), axes.get_xlabel(), axes.get_ylabel(), *(each.get_text() for each in axes.texts)]
    for legend in (*figure.legends, *filter(None, (axes.get_legend() for axes in figure.axes))):
        words += [each.get_text() for each in legend.get_texts()]
    return " | ".join(words)


def uniform(*shape: int) -> np.ndarray:
    return np.full(shape, 1 / math.prod(shape))


# ---- whole figures -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("order", "named"), [*((order, True) for order in range(1, 7)), (3, False)])
def test_figures_of_every_order(order: int, named: bool) -> None:
    modes = " ".join("abcdef"[:order]) if named else str(order)
    of = recording(*SIZES[:order], 2, modes=modes)
    patch = (2,) * order
    tokens = embed(of.array, patch, dim=8, heads=2, logit_std=1.0, seed=0)
    where = place(of, patch, views.choose_query(None, of.sizes, patch))
    figures = views.draw(of, where, tokens, default_choices())
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
        np.testing.assert_allclose(third.get_ydata(), expected / 2)
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
    figure = views.draw(of, where, additive, parse_choices(["additive"]))["ramp-maps.png"]
    np.testing.assert_allclose(images(figure.axes[1]), images(figure.axes[2]), atol=1e-5)


def test_operators_with_the_same_map_share_a_row() -> None:
    of = recording(5, 6, 3, modes="h w")
    tokens = embed(of.array, (1, 1), dim=8, heads=2, logit_std=1.0, seed=0)
    figure = views.draw(
        of,
        place(of, (1, 1), (2, 3)),
        tokens,
        parse_choices(["additive", "truncated:interaction_order=1", "kao_kv", "axial"]),
    )
    words = texts(figure["noise-maps.png"])
    assert "additive, truncated:interaction_order=1 |" in words and "axial" not in words


# ---- slices --------------------------------------------------------------------------------------------------


@given(st.integers(2, 6), st.randoms(use_true_random=False))
def test_a_plane_cuts_what_a_loop_finds(order: int, random: Any) -> None:
    sizes = [random.randint(1, 4) for _ in range(order)]
    names = random.sample(["t", "h", "w", "x", "y", "z"], order)
    array = np.arange(math.prod(sizes) * 2).reshape(*sizes, 2)
    position = [random.randrange(size) for size in sizes]
    planes = planes_through(sizes, names)
    assert len(planes) == len({frozenset((p.across, p.along)) for p in planes}) == min(3, math.comb(order, 2))
    for plane in planes:
        cut = plane.cut(array, position)
        assert cut.shape == (sizes[plane.along], sizes[plane.across], 2)
        for row, column in itertools.product(*map(range, cut.shape[:2])):
            index = list(position)
            index[plane.along], index[plane.across] = row, column
            np.testing.assert_array_equal(cut[row, column], array[tuple(index)])


def test_the_first_plane_has_no_time() -> None:
    (plane,) = planes_through((40, 4, 5), ("t", "h", "w"), largest=1)
    assert (plane.along, plane.across) == (1, 2)


@given(st.integers(1, 100), st.integers(1, 10), st.data())
def test_frames_are_in_order_and_hold_the_query(size: int, shown: int, data: st.DataObject) -> None:
    include = data.draw(st.integers(0, size - 1))
    frames = frame_indices(size, shown, include)
    assert include in frames and len(frames) == min(shown, size)
    assert list(frames) == sorted(set(frames)) and 0 <= frames[0] and frames[-1] < size
    steps = {after - before for before, after in itertools.pairwise(frames)}
    assert len(steps) <= 1
    for step in range(max(steps, default=0) + 1, size if len(frames) > 1 else 0):  # nor could they be farther apart
        starts = [include - n * step for n in range(len(frames))]
        assert not any(0 <= start and start + (len(frames) - 1) * step < size for start in starts)


def test_what_is_displayed() -> None:
    colours = np.random.default_rng(0).integers(0, 255, (4, 5, 4)).astype(np.uint8)
    shown, words = display_values(colours)
    np.testing.assert_array_equal(shown, colours[..., :3])
    assert words == "colours as stored"
    dark = colours // 4
    shown, words = display_values(dark)
    assert words == "colours 4.1 times as bright, the 99.5th percentile is white"
    np.testing.assert_allclose(shown, np.minimum(dark[..., :3] / np.percentile(dark[..., :3], 99.5), 1), rtol=1e-6)
    assert display_values(np.zeros((3, 3, 3), np.uint8))[1] == "colours as stored"
    grey, words = display_values(np.linspace(-5, 5, 400).reshape(20, 20, 1))
    assert grey.min() == 0 and grey.max() == 1 and words == "grey from the 0.5th to the 99.5th percentile"
    mean, words = display_values(colours.astype(np.int32))
    assert mean.shape == (4, 5) and words.startswith("mean of 4 channels, grey")
    assert display_values(np.zeros((3, 3, 1), bool))[0].max() == 0


def test_a_query_is_told_with_the_patch_that_contains_it() -> None:
    of = recording(4, 6, modes="h w")
    assert place(of, (2, 3), (1, 1)).words() == "the query, the 2×3 patch that contains h=2 w=4"
    assert place(of, (1, 1), (1, 2)).words() == "the query h=1 w=2"
    where = place(recording(4, 6, modes="2"), (2, 1), (1, 2))
    assert where.words() == "the query, the 2×1 patch that contains (2, 2)"
    exact, where = uniform(2, 2), place(of, (2, 3), (1, 1))
    figures = (
        input_figure(of, where),
        maps_figure(of, where, "head 1", {"exact attention": exact}),
        weights_figure(of, where, exact[None], {}),
    )
    for figure in figures:
        assert "the 2×3 patch that contains h=2 w=4" in " ".join(figure.get_suptitle().split())


def test_the_lines_of_a_legend_are_of_about_the_same_length() -> None:
    of = recording(2, 2, 2, 2, 2, 2, modes="a b c d e f")
    exact, where = uniform(*(2,) * 6)[None], place(of, (1,) * 6, (0,) * 6)
    for count in range(1, 10):
        figure = weights_figure(of, where, exact, {f"operator {k}": [uniform(1, 2)] * 6 for k in range(count)})
        (legend,) = figure.legends
        lines = -(-(count + 1) // legend._ncols)
        assert lines * legend._ncols - (count + 1) < lines
        assert legend._ncols > 1 or count == 0


# ---- the query to draw ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1,2", "--query must be 3 whole numbers, one index a mode, got '1,2'."),
        ("1,2,x", "--query must be 3 whole numbers, one index a mode, got '1,2,x'."),
        ("1,2,-3", "--query must be 3 whole numbers, one index a mode, got '1,2,-3'."),
        ("1,240,3", "--query has index 240 in mode 1, but its size is 240."),
    ],
)
def test_bad_queries(text: str, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        views.choose_query(text, (30, 240, 320), (1, 8, 8))
    assert str(caught.value) == message
