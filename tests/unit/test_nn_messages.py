"""Every message of the modules around attention, whole, told before any work is done."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from test_messages import refused

import tensorattn as ta
from tensorattn.errors import DtypeError, ModesError, OptionError, ShapeError

POSITIONS = [ta.SinCosPositions, ta.LearnedPositions]
AXES = [*POSITIONS, ta.RotaryEmbedding]

every_embedding = pytest.mark.parametrize("kind", POSITIONS, ids=lambda kind: kind.__name__)
every_axes = pytest.mark.parametrize("kind", AXES, ids=lambda kind: kind.__name__)


@pytest.fixture(params=["cpu", "meta"])
def make(request):
    """Factory of tensors: on the meta device they have no values at all."""
    return lambda *shape, dtype=torch.float32: torch.empty(shape, device=request.param, dtype=dtype).fill_(1)


def build(kind, channels=8, modes="h w", **options):
    """A module of either kind."""
    return kind(channels, (3, 4), modes=modes, **options) if kind is ta.LearnedPositions else kind(
        channels, modes=modes, **options
    )  # fmt: skip


def reading(*shape, argument="x"):
    return f"\n  modes    h w\n  {argument:<8} {shape}   batch={shape[:-3]} h={shape[-3]} w={shape[-2]} D={shape[-1]}"


PERIOD = "\n  Give it in the unit of the coordinates, such as periodic={'w': 360.0}."
PERIODIC = {
    "no such mode": ("lon", ModesError, "there is no mode 'lon' among 'h w' (order 2)."),
    "one of two": ("h lon", ModesError, "there is no mode 'lon' among 'h w' (order 2)."),
    "no such index": (2, ModesError, "there is no mode 2 among 'h w' (order 2)."),
    "negative": ({"w": -1}, OptionError, "period of mode 'w' must be a positive finite number, got -1."),
    "zero": ({"w": 0.0}, OptionError, "period of mode 'w' must be a positive finite number, got 0.0."),
    "infinite": ({"w": math.inf}, OptionError, "period of mode 'w' must be a positive finite number, got inf."),
    "no number": ({"h": "3"}, OptionError, "period of mode 'h' must be a positive finite number, got '3'."),
    "twice": ({"w": 3.0, 1: 4.0}, ModesError, "periodic names mode 'w' twice."),
    "twice in a list": (("w", -1), ModesError, "periodic names mode 'w' twice."),
}


@every_axes
@pytest.mark.parametrize("case", PERIODIC)
def test_circles(kind, case):
    periodic, error, rule = PERIODIC[case]
    refused(error, f"{kind.__name__}: {rule}", build, kind, periodic=periodic)


SPACING = {
    "zero": ({"spacing": 0}, OptionError, "spacing of mode 'h' must be a positive finite number, got 0."),
    "one of two": (
        {"spacing": (1.0, math.nan)},
        OptionError,
        "spacing of mode 'w' must be a positive finite number, got nan.",
    ),
    "too many": ({"spacing": [1.0, 2, 3]}, ModesError, "spacing has 3 entries, but order 2 needs one a mode."),
    "no such mode": ({"spacing": {"z": 2.0}}, ModesError, "there is no mode 'z' among 'h w' (order 2)."),
    "circle": (
        {"spacing": {"w": 1.25}, "periodic": "w"},
        OptionError,
        f"spacing of periodic mode 'w' needs its period.{PERIOD}",
    ),
    "base": ({"base": 1.0}, OptionError, "base must be a finite number greater than 1, got 1.0."),
    "infinite base": ({"base": math.inf}, OptionError, "base must be a finite number greater than 1, got inf."),
}


@pytest.mark.parametrize("kind", [ta.SinCosPositions, ta.RotaryEmbedding], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("case", SPACING)
def test_frequencies(kind, case):
    options, error, rule = SPACING[case]
    refused(error, f"{kind.__name__}: {rule}", build, kind, **options)


def test_channels_of_modes():
    for kind, called in ((ta.SinCosPositions, "embed_dim"), (ta.RotaryEmbedding, "head_dim")):
        told = f"{kind.__name__}: {called} must be at least 6, two channels a mode, got 5."
        refused(OptionError, told, build, kind, 5, "t h w")
    refused(OptionError, "LearnedPositions: embed_dim must be at least 1, got 0.", build, ta.LearnedPositions, 0)
    for kind in AXES:
        refused(OptionError, f"{kind.__name__}: modes must be at least 1, got 0.", build, kind, modes=0)


def test_sizes_of_tables():
    table = ta.LearnedPositions(8, (3, 4), modes="h w")
    cases = [
        ((3, 4, 5), ModesError, "modes names 2 modes, but sizes has 3."),
        ((3, 0), ShapeError, "mode 'w' has size 0 in sizes, but every mode needs at least 1 index."),
    ]
    for sizes, error, rule in cases:
        refused(error, f"LearnedPositions: {rule}", ta.LearnedPositions, 8, sizes, modes="h w")
        refused(error, f"LearnedPositions.resized: {rule}", table.resized, sizes)
        for kind in POSITIONS:
            refused(error, f"{kind.__name__}.vectors: {rule}", build(kind).vectors, sizes)
    rule = "coordinates of mode 'h' have batch dimensions (2,), which do not broadcast to ()."
    for kind in POSITIONS:
        told = f"{kind.__name__}.vectors: {rule}"
        refused(ShapeError, told, build(kind).vectors, (3, 4), coordinates=[torch.ones(2, 3), None])


INPUTS = {
    "dimensions": ((2, 30, 40), ShapeError, "x has 3 dimensions, but the layout (B h w C) has 4."),
    "channels": ((2, 30, 40, 7), ShapeError, "x has 7 channels, but embed_dim is 8."),
    "empty mode": ((2, 30, 0, 8), ShapeError, "mode 'w' has size 0 in x, but every mode needs at least 1 index."),
}


@every_embedding
@pytest.mark.parametrize("case", INPUTS)
def test_inputs(kind, case, make):
    shape, error, rule = INPUTS[case]
    shown = reading(*shape) if len(shape) == 4 else "\n  modes    h w\n  x        (2, 30, 40)   batch=() h=2 w=30 D=40"
    refused(error, f"{kind.__name__}: {rule}{shown}", build(kind), make(*shape))


@every_embedding
def test_inputs_of_other_layouts_and_types(kind, make):
    name = kind.__name__
    first = build(kind, channels_first=True)
    refused(ShapeError, f"{name}: x has 30 channels, but embed_dim is 8.", first, make(2, 30, 40, 8))
    told = f"{name}: x has 3 dimensions, but the layout (B C h w) has 4."
    refused(ShapeError, told, first, make(2, 30, 40))
    told = f"{name}: x must be floating point, got torch.int64.{reading(2, 30, 40, 8)}"
    refused(DtypeError, told, build(kind), make(2, 30, 40, 8, dtype=torch.int64))
    refused(DtypeError, f"{name}: x must be a torch.Tensor, got NoneType.", build(kind), None)


def test_types_of_tables(make):
    told = (
        f"LearnedPositions: the type is torch.float64 in x but torch.float32 in the parameters.{reading(2, 30, 40, 8)}"
    )
    refused(DtypeError, told, build(ta.LearnedPositions), make(2, 30, 40, 8, dtype=torch.float64))


def vector(*shape):
    return torch.ones(shape)


COORDINATES = {
    "tensor": (
        vector(4),
        ModesError,
        "coordinates is a single tensor, but order 2 needs 2 vectors, one a mode.",
    ),
    "too few": ([vector(30)], ModesError, "coordinates has 1 entries, but order 2 needs one a mode."),
    "no such mode": ({"z": vector(4)}, ModesError, "there is no mode 'z' among 'h w' (order 2)."),
    "twice": ({"w": vector(40), 1: vector(40)}, ModesError, "coordinates names mode 'w' twice."),
    "length": (
        {"w": vector(3)},
        ShapeError,
        "coordinates of mode 'w' have length 3, but the mode has size 40.",
    ),
    "number": (
        [None, 2.0],
        ShapeError,
        "coordinates of mode 'w' have length no dimension, but the mode has size 40.",
    ),
    "batch": (
        {"w": vector(3, 40)},
        ShapeError,
        "coordinates of mode 'w' have batch dimensions (3,), which do not broadcast to (2,).",
    ),
    "batches": (
        {"w": vector(1, 2, 40)},
        ShapeError,
        "coordinates of mode 'w' have batch dimensions (1, 2), which do not broadcast to (2,).",
    ),
    "infinite": (
        {"h": torch.arange(30) / 0},
        OptionError,
        "coordinates of mode 'h' must be finite, got nan to nan.",
    ),
}


@every_axes
@pytest.mark.parametrize("case", COORDINATES)
def test_coordinates(kind, case, make):
    coordinates, error, rule = COORDINATES[case]
    shown = reading(2, 30, 40, 8, argument="tensor" if kind is ta.RotaryEmbedding else "x")
    module, x = build(kind), make(2, 30, 40, 8)
    refused(error, f"{kind.__name__}: {rule}{shown}", module, x, coordinates=coordinates)


@pytest.mark.parametrize("kind", [ta.SinCosPositions, ta.RotaryEmbedding], ids=lambda kind: kind.__name__)
def test_coordinates_of_a_circle_without_period(kind, make):
    shown = reading(2, 30, 40, 8, argument="tensor" if kind is ta.RotaryEmbedding else "x")
    told = f"{kind.__name__}: coordinates of periodic mode 'w' need its period.{shown}{PERIOD}"
    refused(OptionError, told, build(kind, periodic="w"), make(2, 30, 40, 8), coordinates={"w": vector(40)})


def test_turned_tensors(make):
    rotary, shown = ta.RotaryEmbedding(8, modes="h w"), functools.partial(reading, argument="tensor")
    cases = [
        (make(2, 30, 40, 9), ShapeError, f"tensor has 9 channels, but head_dim is 8.{shown(2, 30, 40, 9)}"),
        (
            make(200, 8),
            ShapeError,
            "tensor has 2 dimensions, but order 2 needs at least 3.\n  modes    h w\n  tensor   (200, 8)\n"
            "  The layout is (*batch, n_1, ..., n_N, D).",
        ),
        (
            make(30, 40, 8, dtype=torch.int64),
            DtypeError,
            f"tensor must be floating point, got torch.int64.{shown(30, 40, 8)}",
        ),
        (
            make(30, 0, 8),
            ShapeError,
            f"mode 'w' has size 0 in tensor, but every mode needs at least 1 index.{shown(30, 0, 8)}",
        ),
        (None, DtypeError, "tensor must be a torch.Tensor, got NoneType."),
    ]
    for tensor, error, told in cases:
        refused(error, f"RotaryEmbedding: {told}", rotary, tensor)


def test_turned_modes(make):
    rotary = ta.RotaryEmbedding(8, modes="h w", periodic="h")
    cases = [
        (make(30, 8), "z", None, ModesError, "there is no mode 'z' among 'h w' (order 2)."),
        (make(30, 9), "w", None, ShapeError, "tensor has 9 channels, but head_dim is 8."),
        (
            make(30, 8),
            "w",
            vector(3),
            ShapeError,
            "coordinates of mode 'w' have length 3, but the mode has size 30.",
        ),
        (
            make(30, 8),
            "h",
            vector(30),
            OptionError,
            "coordinates of periodic mode 'h' need its period.\n"
            "  Give it in the unit of the coordinates, such as periodic={'h': 360.0}.",
        ),
    ]
    for tensor, mode, coordinates, error, told in cases:
        refused(
            error, f"RotaryEmbedding.rotate_mode: {told}", rotary.rotate_mode, tensor, mode, coordinates=coordinates
        )
