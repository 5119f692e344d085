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


def reading(*shape, argument="x", first=False):
    """How an input is read: not at all where it lacks a dimension."""
    line = f"\n  modes    h w\n  {argument:<8} {shape}"
    if argument == "x" and len(shape) < 4:
        return line
    letter = "C" if argument == "x" else "D"
    grid = f"h={shape[-2]} w={shape[-1]}" if first else f"h={shape[-3]} w={shape[-2]}"
    channels = f"{letter}={shape[-3 if first else -1]}"
    return f"{line}   batch={shape[:-3]} {f'{channels} {grid}' if first else f'{grid} {channels}'}"


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
    shown = reading(*shape)
    refused(error, f"{kind.__name__}: {rule}{shown}", build(kind), make(*shape))


@every_embedding
def test_inputs_of_other_layouts_and_types(kind, make):
    name = kind.__name__
    first = build(kind, channels_first=True)
    told = f"{name}: x has 30 channels, but embed_dim is 8.{reading(2, 30, 40, 8, first=True)}"
    refused(ShapeError, told, first, make(2, 30, 40, 8))
    told = f"{name}: x has 3 dimensions, but the layout (B C h w) has 4.{reading(2, 30, 40)}"
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


def test_operators_that_average_turned_keys():
    rotary = ta.RotaryEmbedding(8, modes="h w")
    hint = "\n  Add positions instead, which keeps exactness: SinCosPositions or LearnedPositions."
    for operator in ("additive", "truncated", "kao_kv", "kao_qkv"):
        told = f"rotary has no meaning for operator {operator!r}, which averages keys of different turns.{hint}"
        options = {"interaction_order": 1} if operator == "truncated" else {}
        refused(OptionError, f"RotaryEmbedding: {told}", rotary.check_operator, operator, **options)
    told = "RotaryEmbedding: operator 'axial' has no option 'pool'; its options are: none."
    refused(OptionError, told, rotary.check_operator, "axial", pool="mean")


# Patches.


PATCHES = {
    "zero": (0, OptionError, "patch of mode 'h' must be a positive whole number, got 0."),
    "part": ((2, 2.5), OptionError, "patch of mode 'w' must be a positive whole number, got 2.5."),
    "truth value": ((True, 2), OptionError, "patch of mode 'h' must be a positive whole number, got True."),
    "word": ("2", OptionError, "patch of mode 'h' must be a positive whole number, got '2'."),
    "too many": ((1, 2, 3), ModesError, "patch has 3 entries, but order 2 needs one a mode."),
    "no such mode": ({"t": 2}, ModesError, "there is no mode 't' among 'h w' (order 2)."),
    "twice": ({"w": 2, 1: 2}, ModesError, "patch names mode 'w' twice."),
}


@pytest.mark.parametrize("kind", [ta.PatchEmbedding, ta.PatchUnembedding], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("case", PATCHES)
def test_patches(kind, case):
    patch, error, rule = PATCHES[case]
    refused(error, f"{kind.__name__}: {rule}", kind, 3, 4, patch, modes="h w")


def test_channels_of_patches():
    for kind, names in (
        (ta.PatchEmbedding, ("in_channels", "embed_dim")),
        (ta.PatchUnembedding, ("embed_dim", "out_channels")),
    ):
        for place, name in enumerate(names):
            channels = [4, 4]
            channels[place] = 0
            refused(OptionError, f"{kind.__name__}: {name} must be at least 1, got 0.", kind, *channels, 2, modes=2)


def test_sizes_that_patches_do_not_divide(make):
    device = make(1).device
    module = ta.PatchEmbedding(8, 4, (2, 8), modes="h w", device=device)
    hint = "\n  Crop it, choose another patch, or repeat its last index with pad=True."
    told = f"PatchEmbedding: mode 'w' has size 30 in x, which patches of 8 do not divide.{reading(2, 4, 30, 8)}{hint}"
    refused(ShapeError, told, module, make(2, 4, 30, 8))
    first = ta.PatchEmbedding(8, 4, (2, 8), modes="h w", channels_first=True, device=device)
    told = "PatchEmbedding: mode 'h' has size 3 in x, which patches of 2 do not divide."
    told += reading(2, 8, 3, 32, first=True) + hint
    refused(ShapeError, told, first, make(2, 8, 3, 32))


def test_inputs_of_patches(make):
    device = make(1).device
    embedding, unembedding = (
        ta.PatchEmbedding(8, 8, 1, modes="h w", device=device),
        ta.PatchUnembedding(8, 4, (2, 8), modes="h w", device=device),
    )
    for module, called in ((embedding, "in_channels"), (unembedding, "embed_dim")):
        name = type(module).__name__
        cases = [
            (make(2, 30, 4, 7), ShapeError, f"x has 7 channels, but {called} is 8.{reading(2, 30, 4, 7)}"),
            (
                make(2, 30, 0, 8),
                ShapeError,
                f"mode 'w' has size 0 in x, but every mode needs at least 1 index.{reading(2, 30, 0, 8)}",
            ),
            (
                make(2, 30, 4, 8, dtype=torch.float64),
                DtypeError,
                f"the type is torch.float64 in x but torch.float32 in the parameters.{reading(2, 30, 4, 8)}",
            ),
        ]
        for x, error, told in cases:
            refused(error, f"{name}: {told}", module, x)
    cases = [
        ((60, 24), "mode 'w' has size 24 in sizes, but 4 patches of 8 in x hold 25 to 32."),
        ((61, 32), "mode 'h' has size 61 in sizes, but 30 patches of 2 in x hold 59 to 60."),
    ]
    for sizes, rule in cases:
        told = f"PatchUnembedding: {rule}{reading(2, 30, 4, 8)}"
        refused(ShapeError, told, unembedding, make(2, 30, 4, 8), sizes=sizes)
    told = f"PatchUnembedding: sizes has 1 entries, but order 2 needs one a mode.{reading(2, 30, 4, 8)}"
    refused(ModesError, told, unembedding, make(2, 30, 4, 8), sizes=(60,))


# Blocks and models.


BLOCKS = {
    "heads": ({"num_heads": 3}, "embed_dim must be divisible by num_heads, got 8 and 3."),
    "operator": (
        {"operator": "nope"},
        f"there is no operator 'nope'; the operators are: {', '.join(ta.OPERATORS)}.",
    ),
    "option": (
        {"centred": True},
        "operator 'additive' has no option 'centred'; its options are: interaction, saturation, include_self.",
    ),
    "dropout": ({"dropout": 2.0}, "dropout must be between 0 and 1, got 2.0."),
    "causal": (
        {"causal": 0, "operator": "kronecker_sum"},
        "causal has no meaning for operator 'kronecker_sum': its queries are pooled over positions.",
    ),
}  # fmt: skip
OWN = {
    "drop path": ({"drop_path": -0.5}, "drop_path must be between 0 and 1, got -0.5."),
    "mlp": ({"mlp_ratio": 0.0}, "mlp_ratio leaves no hidden channels, got 0.0 with embed_dim 8."),
}


@pytest.mark.parametrize("case", [*BLOCKS, *OWN])
def test_blocks(case):
    options, rule = {**BLOCKS, **OWN}[case]
    options = {"num_heads": 2, "modes": "h w", **options}
    refused(OptionError, f"TensorTransformerBlock: {rule}", ta.TensorTransformerBlock, 8, **options)


def test_modes_of_blocks():
    for options, rule in (
        ({"modes": "h h"}, "mode names must differ, but 'h' appears 2 times in 'h h'."),
        ({"modes": "h w", "causal": "t"}, "there is no mode 't' among 'h w' (order 2)."),
    ):
        refused(ModesError, f"TensorTransformerBlock: {rule}", ta.TensorTransformerBlock, 8, 2, **options)


def test_parts_of_blocks():
    refused(OptionError, "DropPath: p must be between 0 and 1, got 1.5.", ta.DropPath, 1.5)
    told = "GatedMLP: embed_dim and hidden_dim must be at least 1, got 8 and 0."
    refused(OptionError, told, ta.GatedMLP, 8, 0)


@pytest.mark.parametrize("case", INPUTS)
def test_inputs_of_blocks(case, make):
    shape, error, rule = INPUTS[case]
    shown = reading(*shape)
    block = ta.TensorTransformerBlock(8, 2, modes="h w")
    refused(error, f"TensorTransformerBlock: {rule}{shown}", block, make(*shape))
    told = f"the type is torch.float64 in x but torch.float32 in the parameters.{reading(2, 30, 40, 8)}"
    refused(DtypeError, f"TensorTransformerBlock: {told}", block, make(2, 30, 40, 8, dtype=torch.float64))
    first = ta.TensorTransformerBlock(8, 2, modes="h w", channels_first=True)
    told = f"TensorTransformerBlock: x has 30 channels, but embed_dim is 8.{reading(2, 30, 40, 8, first=True)}"
    refused(ShapeError, told, first, make(2, 30, 40, 8))


CONFIGS = {
    "depth": ({"depth": 0}, "depth must be at least 1, got 0."),
    "positions": ({"positions": "rope"}, "positions must be 'sincos', 'learned' or None, got 'rope'."),
    "no sizes": (
        {"positions": "learned"},
        "sizes belongs to positions='learned', but positions is 'learned' and sizes None.",
    ),
    "sizes": ({"sizes": [3, 4]}, "sizes belongs to positions='learned', but positions is 'sincos' and sizes (3, 4)."),
    "spacing": (
        {"positions": "learned", "sizes": (3, 4), "spacing": 2.0},
        "spacing belongs to positions='sincos', but positions is 'learned'.",
    ),
    "periodic": ({"positions": None, "periodic": ("w",)}, "periodic has no meaning without positions."),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs(case):
    fields, rule = CONFIGS[case]
    fields = {"modes": "h w", "in_channels": 3, **fields}
    told = f"TensorTransformerConfig: {rule}"
    refused(OptionError, told, ta.TensorTransformerConfig, **fields)
    refused(OptionError, told, ta.TensorTransformer.from_config, fields)


MODELS = {
    "heads": ({"num_heads": 5}, OptionError, "embed_dim must be divisible by num_heads, got 96 and 5."),
    "option": (
        {"options": {"centred": True}},
        OptionError,
        "operator 'additive' has no option 'centred'; its options are: interaction, saturation, include_self.",
    ),
    "patch": ({"patch": 0}, OptionError, "patch of mode 'h' must be a positive whole number, got 0."),
    "channels": ({"out_channels": 0}, OptionError, "out_channels must be at least 1, got 0."),
    "drop path": ({"drop_path": 1.5}, OptionError, "drop_path must be between 0 and 1, got 1.5."),
    "periodic": ({"periodic": "lon"}, ModesError, "there is no mode 'lon' among 'h w' (order 2)."),
    "modes": ({"modes": "h h"}, ModesError, "mode names must differ, but 'h' appears 2 times in 'h h'."),
    "tables": (
        {"positions": "learned", "sizes": (3, 4, 5)},
        ModesError,
        "modes names 2 modes, but sizes has 3.",
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_models(case):
    fields, error, rule = MODELS[case]
    config = ta.TensorTransformerConfig(**{"modes": "h w", "in_channels": 3, **fields})
    with pytest.raises(error) as caught:  # parts that are right are made before
        ta.TensorTransformer(config)
    assert str(caught.value) == f"TensorTransformer: {rule}"


def test_configs_from_files():
    known = ", ".join(ta.TensorTransformerConfig.__dataclass_fields__)
    told = f"TensorTransformer.from_config: the config has no field 'width'; its fields are: {known}."
    refused(OptionError, told, ta.TensorTransformer.from_config, {"modes": 2, "in_channels": 3, "width": 4})
    told = "TensorTransformer.from_config: the config lacks the field 'in_channels'."
    refused(OptionError, told, ta.TensorTransformer.from_config, {"modes": 2})


def test_inputs_of_models(make):
    config = {"modes": "h w", "in_channels": 8, "depth": 1, "embed_dim": 8, "num_heads": 2, "patch": (1, 8)}
    model = ta.TensorTransformer.from_config({**config, "positions": None})
    told = f"PatchEmbedding: x has 7 channels, but in_channels is 8.{reading(2, 30, 40, 7)}"
    refused(ShapeError, told, model, make(2, 30, 40, 7))
    told = "TensorTransformer: coordinates has no meaning without positions."
    refused(OptionError, told, model, make(2, 30, 40, 8), coordinates=[None, None])
