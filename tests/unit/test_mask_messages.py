"""Every message about masks, lengths and weights of positions, whole and before any work."""

from __future__ import annotations

import pytest
import torch
from test_messages import READING, SIZE, VARIANTS, refused

import tensorattn as ta
from tensorattn.errors import DtypeError, ModesError, OptionError, ShapeError, WeightsError
from tensorattn.operators import OPERATORS

every_operator = pytest.mark.parametrize("variant", VARIANTS[: len(OPERATORS)], ids=str)


@pytest.fixture(params=["cpu", "meta"])
def make(request):
    """Factory of tensors: on the meta device they have no values at all."""
    return lambda *shape, dtype=torch.float32: torch.empty(shape, device=request.param, dtype=dtype).fill_(1)


def true(*shape):
    return torch.ones(shape, dtype=torch.bool)


POINTS = "\n  Numbers that say how much a position counts are weights: give them as weights."

SHAPES = {
    "float mask": (
        {"mask": torch.ones(3, 4)},
        DtypeError,
        "mask must be bool, True where a position takes part, but has the type torch.float32.",
        POINTS,
    ),
    "mask of 0 and 1": (
        {"mask": torch.ones(3, 4, dtype=torch.int64)},
        DtypeError,
        "mask must be bool, True where a position takes part, but has the type torch.int64.",
        POINTS,
    ),
    "no mask": ({"mask": "all"}, DtypeError, "mask must be a tensor of bool, got 'all'.", ""),
    "one mode": ({"mask": true(4)}, ShapeError, "mask has 1 dimensions, but order 2 needs at least 2.", ""),
    "other size": ({"mask": true(2, 3, 5)}, ShapeError, "mode 1 has size 5 in mask but 4 in {}.", ""),
    "broadcast": ({"mask": true(1, 4)}, ShapeError, "mode 0 has size 1 in mask but 3 in {}.", ""),
    "batch": (
        {"mask": true(3, 3, 4)},
        ShapeError,
        "mask has batch dimensions (3,), which do not broadcast to (2,).",
        "",
    ),
    "batches": (
        {"mask": true(1, 2, 3, 4)},
        ShapeError,
        "mask has batch dimensions (1, 2), which do not broadcast to (2,).",
        "",
    ),
    "columns": (
        {"lengths": torch.ones(2, 3, dtype=torch.int64)},
        ShapeError,
        "lengths has 3 columns, but order 2 needs one a mode.",
        "",
    ),
    "too few": ({"lengths": [3]}, ShapeError, "lengths has 1 entries, but order 2 needs 2 entries, one a mode.", ""),
    "a number": ({"lengths": 3}, ShapeError, "lengths is 3, but order 2 needs 2 entries, one a mode.", ""),
    "float lengths": (
        {"lengths": torch.ones(2, 2)},
        DtypeError,
        "lengths of mode 0 must be integers, but have the type torch.float32.",
        "",
    ),
    "bool lengths": (
        {"lengths": [None, True]},
        DtypeError,
        "lengths of mode 1 must be integers, but have the type torch.bool.",
        "",
    ),
    "words": ({"lengths": [None, "all"]}, DtypeError, "lengths of mode 1 must be integers, got 'all'.", ""),
    "samples": (
        {"lengths": [[1, 2, 3], None]},
        ShapeError,
        "lengths of mode 0 have the shape (3,), which does not broadcast to (2,).",
        "",
    ),
    "weights of other size": (
        {"weights": torch.ones(2, 4, 4)},
        WeightsError,
        "mode 0 has size 4 in weights but 3 in {}.",
        "",
    ),
    "weights of a number": (
        {"weights": torch.ones(())},
        WeightsError,
        "weights has 0 dimensions, but order 2 needs at least 2.",
        "",
    ),
    "weights of other batch": (
        {"weights": torch.ones(5, 3, 4)},
        WeightsError,
        "weights has batch dimensions (5,), which do not broadcast to (2,).",
        "",
    ),
    "complex": (
        {"weights": torch.ones(3, 4, dtype=torch.complex64)},
        WeightsError,
        "weights must be real, got torch.complex64.",
        "",
    ),
}

VALUES = {
    "too long": ({"lengths": [[3, 4], None]}, "lengths of mode 0 must be from 0 to its size 3, got 4."),
    "negative": ({"lengths": [None, -1]}, "lengths of mode 1 must be from 0 to its size 4, got -1."),
    "negative weights": ({"weights": -torch.ones(3, 4)}, "weights must not be negative, got -1."),
    "infinite weights": ({"weights": torch.ones(3, 4) / 0}, "weights must be finite, got inf to inf."),
    "no weights": ({"weights": torch.zeros(3, 4)}, "weights are all zero, so no position takes part."),
}


@every_operator
@pytest.mark.parametrize("case", SHAPES)
def test_functions(variant, case, make):
    given, kind, rule, hint = SHAPES[case]
    x, name = make(*SIZE), variant.operator.function.__name__
    refused(kind, f"{name}: {rule.format('key')}{READING}{hint}", variant.function, x, x, x, order=2, **given)


@every_operator
@pytest.mark.parametrize("case", VALUES)
def test_values(variant, case):
    given, rule = VALUES[case]
    x, name = torch.ones(SIZE), variant.operator.function.__name__
    refused(WeightsError, f"{name}: {rule}{READING}", variant.function, x, x, x, order=2, **given)


@pytest.mark.parametrize("kind", [ta.TensorAttention, ta.TensorTransformerBlock], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("case", SHAPES)
def test_layers(kind, case, make):
    given, error, rule, hint = SHAPES[case]
    layer, name = kind(8, 2, modes=2, device=make(1).device), kind.__name__
    name = "TensorAttention" if "weights" in given else name  # a block hands weights down
    told = f"{name}: {rule.format('x')}\n  modes    0 1\n  x        (2, 3, 4, 8)   batch=(2,) 0=3 1=4 C=8{hint}"
    if name == kind.__name__:
        refused(error, told, layer, make(2, 3, 4, 8), **given)
    else:
        with pytest.raises(error) as raised:
            layer(make(2, 3, 4, 8), **given)
        assert str(raised.value) == told


def test_modes_by_name():
    layer, x = ta.TensorAttention(8, 2, modes="h w"), torch.ones(2, 30, 4, 8)
    told = "\n  modes    h w\n  x        (2, 30, 4, 8)   batch=(2,) h=30 w=4 C=8"
    cases = [
        ({"lengths": {"t": 3}}, ModesError, "there is no mode 't' among 'h w' (order 2)."),
        ({"lengths": {"w": 3, 1: 3}}, ModesError, "lengths names mode 'w' twice."),
        ({"lengths": {"w": 5}}, WeightsError, "lengths of mode 'w' must be from 0 to its size 4, got 5."),
        ({"mask": true(30, 5)}, ShapeError, "mode 'w' has size 5 in mask but 4 in x."),
    ]
    for given, kind, rule in cases:
        refused(kind, f"TensorAttention: {rule}{told}", layer, x, **given)


COUNTING = [v for v in VARIANTS if v.operator.counts_indices(**v.operator.with_defaults(v.options))]


@pytest.mark.parametrize("variant", COUNTING, ids=str)
def test_operators_that_count_indices(variant):
    assert {v.name for v in COUNTING} == {"kao_kv", "kao_qkv", "kronecker_product", "kronecker_sum"}
    rule = "weights of whole positions have no meaning for this operator: it counts the indices of each mode."
    hint = "\n  Give one vector a mode, or a mask alone."
    x, name = torch.ones(SIZE), variant.operator.function.__name__
    holes = true(3, 4)
    holes[0, 0] = False
    for given in ({"weights": torch.ones(3, 4)}, {"mask": holes, "weights": [torch.ones(3), None]}):
        refused(OptionError, f"{name}: {rule}{READING}{hint}", variant.function, x, x, x, order=2, **given)
    layer = ta.TensorAttention(8, 2, modes=2, operator=variant.name, **variant.options)
    told = "\n  modes    0 1\n  x        (2, 3, 4, 8)   batch=(2,) 0=3 1=4 C=8"
    x = torch.ones(2, 3, 4, 8)
    refused(OptionError, f"TensorAttention: {rule}{told}{hint}", layer, x, weights=torch.ones(3, 4))
    variant.function(x, x, x, order=2, mask=holes)  # a mask alone has a meaning


def test_a_model_speaks_of_patches():
    config = ta.TensorTransformerConfig(modes="h w", in_channels=1, embed_dim=8, num_heads=2, depth=1, patch=2)
    model, x = ta.TensorTransformer(config), torch.ones(2, 40, 6, 1)
    told = "\n  modes    h w\n  x        (2, 40, 6, 1)   batch=(2,) h=40 w=6 C=1"
    rule = "TensorTransformer: mode 'h' has size 40 in mask but 20 in the grid of patches."
    refused(ShapeError, f"{rule}{told}", model, x, mask=true(40, 6))


def test_other_functions(make):
    x, reading = make(*SIZE), "\n  modes    0 1\n  {}(2, 3, 4, 5)   batch=(2,) 0=3 1=4 D=5"
    told = f"mode_averages: mode 1 has size 5 in mask but 4 in tensor.{reading.format('tensor   ')}"
    refused(ShapeError, told, ta.mode_averages, x, order=2, mask=true(3, 5))
    pair = reading.format("key      ") + "\n  value    (2, 3, 4, 5)   batch=(2,) 0=3 1=4 D=5"
    told = f"summarize: mode 1 has size 5 in mask but 4 in key.{pair}"
    refused(ShapeError, told, ta.summarize, x, x, order=2, mask=true(3, 5))
