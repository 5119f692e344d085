"""`show`: what `attend` draws, for a layer or an operator, and what it says of input that it cannot draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tensorattn as ta
from tensorattn.cli.embedding import embed

GRID = (4, 5, 6)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def rows(figure: Any) -> list[str]:
    """What the rows of a figure are called."""
    return [name for axes in figure.axes if (name := axes.get_title(loc="left"))]


def drawn(figure: Any, row: str) -> np.ndarray:
    """The first slice of a row, as weights relative to uniform attention."""
    (axes,) = [axes for axes in figure.axes if axes.get_title(loc="left") == row]
    return 2 ** np.asarray(axes.get_images()[0].get_array())


WHAT = [
    "clustered",
    "clustered:cells=blocks:tokens=8",
    "kao_kv",
    ta.kao_kv,
    ta.OPERATORS["additive"],
    ["axial", "kao_qkv"],
]


@pytest.mark.parametrize("what", WHAT)
def test_operators_beside_full_attention(what: Any) -> None:
    figure = ta.show(what, noise(*GRID), at=(1, 2, 3), modes="t h w", heads=2, dim=8)
    names = [what] if isinstance(what, str) else getattr(what, "name", None) or getattr(what, "__name__", what)
    assert rows(figure) == ["input", "full attention", *([names] if isinstance(names, str) else names)]
    assert "what the query t=1 h=2 w=3 attends to" in figure.get_suptitle()


@pytest.mark.thorough
def test_every_operator_is_drawn() -> None:
    names = [name for name in ta.OPERATORS if name != "flattened"]
    assert {word for row in rows(ta.show(names, noise(*GRID))) for word in row.split(", ")} >= set(names)


def test_what_is_drawn_is_what_attend_draws() -> None:
    array = noise(7, 8, 2).numpy()
    figure = ta.show("clustered:tokens=4", array, at=(2, 5), modes="h w", dim=8, heads=1, seed=3)
    query, key, value, scale = embed(array, (1, 1), dim=8, heads=1, logit_std=1.0, seed=3)
    for name, options in (("flattened", {}), ("clustered", {"tokens": 4})):
        function = ta.OPERATORS[name].function
        attention = function(query, key, value, order=2, scale=scale, return_attention=True, **options).attention
        expected = ta.attention_map(attention, (7, 8), operator=name, at=(2, 5), **options)[0] * 56
        row = "full attention" if name == "flattened" else "clustered:tokens=4"
        np.testing.assert_allclose(drawn(figure, row), expected, rtol=1e-2 if options else 1e-4)


def test_options_are_compared_side_by_side() -> None:
    figure = ta.show(["clustered:tokens=2", "clustered:tokens=8", "clustered:tokens=S"], noise(6, 7))
    assert rows(figure) == ["input", "full attention", "clustered:tokens=2", "clustered:tokens=8", "clustered:tokens=S"]


@pytest.mark.parametrize("operator", ["additive", "clustered", "axial", "flattened"])
@pytest.mark.parametrize("channels_first", [False, True])
def test_a_layer_is_drawn_as_it_is(operator: str, channels_first: bool) -> None:
    layer = ta.TensorAttention(8, 2, modes="h w", operator=operator, channels_first=channels_first)
    x = noise(3, 6, 7, 8)
    given = x.movedim(-1, 1) if channels_first else x
    maps = layer.attention_map(given, at=(2, 3))[0].detach() * 42
    twin = ta.TensorAttention(8, 2, modes="h w", operator="flattened")
    twin.load_state_dict(layer.state_dict())
    exact = twin.attention_map(x, at=(2, 3))[0].detach() * 42
    for sample in (given, given[0]):
        figure = ta.show(layer, sample, at=(2, 3))
        assert rows(figure) == [
            "input",
            *dict.fromkeys(["full attention", operator.replace("flattened", "full attention")]),
        ]
        head = int(figure.get_suptitle().split("head ")[1][0]) - 1
        np.testing.assert_allclose(drawn(figure, rows(figure)[-1]), maps[head], rtol=1e-4, atol=1e-12)
        np.testing.assert_allclose(drawn(figure, "full attention"), exact[head], rtol=1e-4)


@pytest.mark.parametrize("settings", [{"scale": 3.0}, {"num_kv_heads": 2}])
def test_full_attention_beside_a_layer_has_its_scale_and_its_heads(settings: dict[str, Any]) -> None:
    x, layer = noise(5, 4, 8), ta.TensorAttention(8, 4, modes="h w", operator="additive", **settings)
    twin = ta.TensorAttention(8, 4, modes="h w", operator="flattened", **settings)
    twin.load_state_dict(layer.state_dict())
    figure = ta.show(layer, x, at=(2, 3))
    head = int(figure.get_suptitle().split("head ")[1][0]) - 1
    expected = twin.attention_map(x[None], at=(2, 3))[0, head].detach() * 20
    np.testing.assert_allclose(drawn(figure, "full attention"), expected, rtol=1e-4)


def test_a_layer_with_more_in_its_logits_is_drawn_alone() -> None:
    for settings in (
        {"causal": 0},
        {"operator": "kronecker_sum", "qk_norm": True},
        {"operator": "flattened", "rotary": ta.RotaryEmbedding(4, modes="h w")},
    ):
        layer = ta.TensorAttention(8, 2, modes="h w", **settings)
        assert rows(ta.show(layer, noise(6, 7, 8))) == ["input", layer.operator.replace("flattened", "full attention")]


def test_files_and_types(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", noise(6, 7).numpy())
    assert ta.show("additive", tmp_path / "a.npy").get_suptitle().startswith("a: what the query (3, 3)")
    assert (
        ta.show("additive", str(tmp_path / "a.npy"), at=(-1, 0)).get_suptitle().startswith("a: what the query (5, 0)")
    )
    for dtype in (torch.bfloat16, torch.uint8, torch.float64):
        ta.show("additive", (noise(5, 6) * 40).to(dtype))


LAYER = ta.TensorAttention(8, 2, modes="h w")


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"what": "kao"}, ta.OptionError, f"operator 'kao' is not one of: {', '.join(ta.OPERATORS)}."),
        ({"what": []}, ta.OptionError, "what must be an operator or a layer, got []."),
        ({"what": 3}, ta.OptionError, "what must be an operator or a layer, got 3."),
        (
            {"what": nn.Linear(2, 2)},
            ta.OptionError,
            "what must be a layer with attention_map, as TensorAttention, got Linear.",
        ),
        (
            {"what": LAYER, "data": noise(4, 8)},
            ta.ShapeError,
            "data has 2 dimensions, but the layer has 2 modes: it needs 3, or 4 with a batch in front.",
        ),
        (
            {"what": LAYER, "data": noise(4, 5, 8), "modes": "t h w"},
            ta.ModesError,
            "modes names 3 modes, but the layer has 2.",
        ),
        *(
            (
                {"what": LAYER, "data": noise(4, 5, 8), name: value},
                ta.OptionError,
                f"{name} has no meaning for a layer, which is drawn as it is, got {value!r}.",
            )
            for name, value in {"patch": (3, 3), "dim": -4, "heads": 99, "logit_std": 2.0, "seed": 1}.items()
        ),
        ({"what": LAYER, "data": None}, ta.DtypeError, "data must hold real numbers, got the type object."),
        ({"what": LAYER, "data": "x.npy"}, ta.DtypeError, "data must hold real numbers, got the type <U5."),
        (
            {"what": LAYER, "data": noise(6, 7, 8) * 1j},
            ta.DtypeError,
            "data must hold real numbers, got the type complex64.",
        ),
        (
            {"what": LAYER, "data": noise(6, 7, 8) * float("nan")},
            ta.TensorAttentionError,
            "data: 336 of its 336 numbers are not finite, so the layer has no weights",
        ),
        (
            {"what": LAYER, "data": noise(0, 6, 7, 8)},
            ta.ShapeError,
            "data has shape (0, 6, 7, 8), there is nothing in it.",
        ),
        ({"at": (1,)}, ta.OptionError, "at has 1 indices, but there are 2 modes."),
        ({"at": (0, 7)}, ta.OptionError, "at has index 7 at place 1, but the size there is 7."),
        ({"at": (0, 1.5)}, ta.OptionError, "at must be integers, got (0, 1.5)."),
        ({"patch": (2, 0)}, ta.OptionError, "patch must be one positive integer, or 2 of them, got (2, 0)."),
        (
            {"patch": 9},
            ta.OptionError,
            "patch (6, 7) leaves a single position of data (6, 7), there is nothing to attend to.",
        ),
        ({"heads": 5}, ta.OptionError, "dim must be at least 2 and a multiple of heads, got dim=64 and heads=5."),
        ({"dim": "64"}, ta.OptionError, "dim must be an integer, got '64'."),
        ({"logit_std": 0}, ta.OptionError, "logit_std must be positive and at most 1,000,000, got 0."),
        ({"seed": -1}, ta.OptionError, "seed must be at least 0 and below 2**63, got -1."),
        ({"modes": "t h w"}, ta.ShapeError, "data has 2 dimensions, but 3 modes need 3, or 4 with channels."),
        (
            {"data": np.ones((6, 7))},
            ta.TensorAttentionError,
            "data: the recording is constant, there is nothing to attend to",
        ),
        (
            {"data": np.ones((6, 7), complex)},
            ta.TensorAttentionError,
            "data: its numbers must be real, but its type is complex128",
        ),
        (
            {"data": noise(6, 7).to("meta")},
            ta.DtypeError,
            "data cannot be read as an array of numbers: Cannot copy out of meta tensor; no data!",
        ),
        (
            {"data": [[1, 2], [3]]},
            ta.DtypeError,
            "data cannot be read as an array of numbers: setting an array element with a sequence. The requested array "
            "has an inhomogeneous shape after 1 dimensions. The detected shape was (2,) + inhomogeneous part.",
        ),
        ({"data": "none.npy"}, ta.TensorAttentionError, "none.npy: there is no such file"),
    ],
)
def test_what_cannot_be_drawn(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        ta.show(**{"what": "additive", "data": noise(6, 7), **changed})
    assert str(caught.value).splitlines()[0] == f"show: {message}"
