"""Attention maps drawn over data: any order, patches, several maps, and what does not fit."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from matplotlib.text import Text

import tensorattn as ta
from tensorattn.attend.output import png_bytes

SIZES = (7, 6, 5, 4, 3, 2)


def weights(*grid, seed=0):
    logits = torch.randn(grid, generator=torch.Generator().manual_seed(seed))
    return torch.softmax(logits.flatten(), 0).reshape(grid)


@pytest.mark.parametrize("channels", [(), (3,)])
@pytest.mark.parametrize("order", range(1, 7))
def test_every_order_with_and_without_channels(order, channels):
    grid = SIZES[:order]
    data = np.random.default_rng(0).random((*(2 * size - 1 for size in grid), *channels))
    maps = {"ours": weights(*grid), "exact": weights(*grid, seed=1).numpy()}
    figure = ta.draw_attention_maps(maps, data, at=(-1,) * order, modes=" ".join("abcdef"[:order]), title="noise")
    assert png_bytes(figure).startswith(b"\x89PNG")
    assert figure.get_suptitle().startswith("noise: attention of the query, the")
    words = [text.get_text() for text in figure.findobj(Text)]
    assert all(any(name == word for word in words) for name in maps)


def test_the_weights_lie_where_the_data_are():
    """A map with all its weight in one patch is bright there, in the coordinates of the data."""
    spot = torch.full((4, 5), 1e-9)
    spot[1, 3] = 1.0
    figure = ta.draw_attention_maps(spot, torch.zeros(8, 15), at=(1, 3), modes="h w")
    image = next(axes.images[0] for axes in figure.axes if axes.images and axes.images[0].get_array().shape == (4, 5))
    assert np.unravel_index(np.argmax(image.get_array()), (4, 5)) == (1, 3)
    assert image.get_extent() == [-0.5, 14.5, -0.5, 7.5]


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"maps": {}}, ta.OptionError, "maps is empty"),
        ({"maps": {"a": weights(2, 3), "b": weights(2, 4)}}, ta.ShapeError, r"\(2, 3\) in maps\['a'\] but \(2, 4\)"),
        ({"maps": torch.tensor(1.0)}, ta.ShapeError, "a map has 0 modes, but 1 to 6 can be drawn"),
        ({"maps": weights(*(1,) * 7)}, ta.ShapeError, "a map has 7 modes, but 1 to 6 can be drawn"),
        ({"maps": torch.ones(2, 3, dtype=torch.complex64).numpy()}, ta.OptionError, "maps.*must hold real numbers"),
        ({"data": torch.zeros(4)}, ta.ShapeError, "data has 1 dimensions, but 2 modes need 2, or 3 with channels"),
        ({"data": torch.zeros(4, 10)}, ta.ShapeError, "mode 1 has size 10 in data.* do not cut into 7"),
        ({"data": torch.zeros(4, 2)}, ta.ShapeError, "mode 1 has size 2 in data"),
        ({"modes": "t h w"}, ta.ShapeError, "modes names 3 modes, but the maps have 2"),
        ({"at": (0,)}, ta.OptionError, "at must be 2 integers"),
        ({"at": (0, 1.5)}, ta.OptionError, "at must be 2 integers"),
        ({"at": (0, 7)}, ta.OptionError, "at has index 7 in mode 1, but the size there is 7"),
    ],
)
def test_messages(changed, error, message):
    given = {"maps": weights(2, 7), "data": torch.zeros(4, 14), "at": (0, 0), **changed}
    maps, data = given.pop("maps"), given.pop("data")
    with pytest.raises(error, match=message):
        ta.draw_attention_maps(maps, data, **given)


def test_maps_of_every_operator():
    x = torch.randn(1, 4, 3, 5, 8)
    for name, record in ta.OPERATORS.items():
        attention = record.function(x, x, x, order=3, return_attention=True).attention
        spread = ta.attention_map(attention, (4, 3, 5), operator=name, at=(1, 2, 3))[0]
        for data in (x[0, ..., :1], torch.rand(8, 9, 5)):
            assert ta.draw_attention_maps({name: spread}, data, at=(1, 2, 3)).axes
    assert len(list(itertools.combinations(range(3), 2))) == 3
