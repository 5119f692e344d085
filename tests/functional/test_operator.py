"""Every operator: what is refused, whole and before any work; and what none of them may do."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math

import numpy as np
import pytest
import torch
from grids import LAYOUTS, VARIANTS, close, every_variant, fits, forward_mode, holes, positive, tensors
from modules import draw, refused
from torch.export import Dim

import tensorattn as ta
from tensorattn.errors import DtypeError, ModesError, OptionError, ShapeError, WeightsError
from tensorattn.functional import OPERATORS, get_operator, register_operator

SIZE = (2, 3, 4, 5)  # batch, two modes, channels
READING = """
  modes    0 1
  query    (2, 3, 4, 5)   batch=(2,) positions=(3, 4) D=5
  key      (2, 3, 4, 5)   batch=(2,) 0=3 1=4 D=5
  value    (2, 3, 4, 5)   batch=(2,) 0=3 1=4 D=5"""


@pytest.fixture(params=["cpu", "meta"])
def make(request):
    """Factory of tensors: on the meta device they have no values at all."""
    return lambda *shape, dtype=torch.float32: torch.empty(shape, device=request.param, dtype=dtype).fill_(1)


def ones(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype)


def all_refuse(kind, rule, query, key=None, value=None, *, reading=READING, of=OPERATORS, **given):
    """Check that operators refuse arguments in the same words, each in its own name."""
    key = query if key is None else key
    value = key if value is None else value
    for name in of:
        function = OPERATORS[name].function
        refused(kind, f"{function.__name__}: {rule}{reading}", function, query, key, value, **{"order": 2, **given})


def without(argument):
    """Operators for which an argument has a meaning."""
    return [name for name, operator in OPERATORS.items() if argument not in operator.lacking(operator.options)]


SHAPES = {
    "key of too few dimensions": (
        [SIZE, (4, 5), SIZE],
        "key has 2 dimensions, but order 2 needs at least 3.",
        """
  modes    0 1
  query    (2, 3, 4, 5)
  key      (4, 5)
  value    (2, 3, 4, 5)   batch=(2,) 0=3 1=4 D=5
  The layout is (*batch, n_1, ..., n_N, D).""",
    ),
    "value of too few dimensions": (
        [SIZE, SIZE, (4, 5)],
        "value has 2 dimensions, but order 2 needs at least 3.",
        """
  modes    0 1
  query    (2, 3, 4, 5)   batch=(2,) positions=(3, 4) D=5
  key      (2, 3, 4, 5)   batch=(2,) 0=3 1=4 D=5
  value    (4, 5)
  The layout is (*batch, n_1, ..., n_N, D).""",
    ),
    "query of too few dimensions": (
        [(2,), (2, 7, 3, 4, 5), (2, 7, 3, 4, 5)],
        "query has 1 dimensions, but key has 2 batch dimensions, so query needs at least 3.",
        """
  modes    0 1
  query    (2,)
  key      (2, 7, 3, 4, 5)   batch=(2, 7) 0=3 1=4 D=5
  value    (2, 7, 3, 4, 5)   batch=(2, 7) 0=3 1=4 D=5""",
    ),
    "mode sizes": (
        [SIZE, SIZE, (2, 3, 6, 7)],
        "mode 1 has size 4 in key but 6 in value.",
        """
  modes    0 1
  query    (2, 3, 4, 5)   batch=(2,) positions=(3, 4) D=5
  key      (2, 3, 4, 5)   batch=(2,) 0=3 1=4 D=5
  value    (2, 3, 6, 7)   batch=(2,) 0=3 1=6 D=7""",
    ),
    "batch of key and value": (
        [SIZE, SIZE, (1, 3, 4, 5)],
        "batch dimensions are (2,) in key but (1,) in value.",
        """
  modes    0 1
  query    (2, 3, 4, 5)   batch=(2,) positions=(3, 4) D=5
  key      (2, 3, 4, 5)   batch=(2,) 0=3 1=4 D=5
  value    (1, 3, 4, 5)   batch=(1,) 0=3 1=4 D=5""",
    ),
    "batch of query and key": (
        [(7, 3, 4, 5), SIZE, SIZE],
        "batch dimensions are (7,) in query but (2,) in key.",
        """
  modes    0 1
  query    (7, 3, 4, 5)   batch=(7,) positions=(3, 4) D=5
  key      (2, 3, 4, 5)   batch=(2,) 0=3 1=4 D=5
  value    (2, 3, 4, 5)   batch=(2,) 0=3 1=4 D=5""",
    ),
    "head sizes": (
        [(2, 3, 4, 8), SIZE, SIZE],
        "head size is 8 in query but 5 in key.",
        """
  modes    0 1
  query    (2, 3, 4, 8)   batch=(2,) positions=(3, 4) D=8
  key      (2, 3, 4, 5)   batch=(2,) 0=3 1=4 D=5
  value    (2, 3, 4, 5)   batch=(2,) 0=3 1=4 D=5""",
    ),
    "empty mode": (
        [(2, 3, 0, 5), (2, 3, 0, 5), (2, 3, 0, 5)],
        "mode 1 has size 0 in key, but every mode needs at least 1 index.",
        """
  modes    0 1
  query    (2, 3, 0, 5)   batch=(2,) positions=(3, 0) D=5
  key      (2, 3, 0, 5)   batch=(2,) 0=3 1=0 D=5
  value    (2, 3, 0, 5)   batch=(2,) 0=3 1=0 D=5""",
    ),
}

TRUE = ones(3, 4).bool()
POINTS = "\n  Numbers that say how much a position counts are weights: give them as weights."
WEIGHTS = [  # what is given, the class of the error, the rule, the hint
    ({"weights": [None]}, WeightsError, "weights has 1 entries, but order 2 needs 2 vectors, one a mode.", ""),
    ({"weights": 5}, WeightsError, "weights is 5, but order 2 needs 2 vectors, one a mode.", ""),
    ({"weights": "no"}, WeightsError, "weights is 'no', but order 2 needs 2 vectors, one a mode.", ""),
    (
        {"weights": [["a", "b", "c"], None]},
        WeightsError,
        "weights of mode 0 must be a tensor or numbers, got ['a', 'b', 'c'].",
        "",
    ),
    (
        {"weights": [ones(3, dtype=torch.complex64), None]},
        WeightsError,
        "weights of mode 0 must be real, got torch.complex64.",
        "",
    ),
    ({"weights": [ones(2), None]}, WeightsError, "weights of mode 0 have length 2, but the mode has size 3.", ""),
    ({"weights": [None, ones(2, 6)]}, WeightsError, "weights of mode 1 have length 6, but the mode has size 4.", ""),
    (
        {"weights": [None, ones()]},
        WeightsError,
        "weights of mode 1 have length no dimension, but the mode has size 4.",
        "",
    ),
    (
        {"weights": [ones(7, 3), None]},
        WeightsError,
        "weights of mode 0 have batch dimensions (7,), which do not broadcast to (2,).",
        "",
    ),
    (
        {"weights": [None, ones(1, 2, 4)]},
        WeightsError,
        "weights of mode 1 have batch dimensions (1, 2), which do not broadcast to (2,).",
        "",
    ),
    ({"weights": ones(2, 3)}, WeightsError, "mode 0 has size 2 in weights but 3 in {}.", ""),
    ({"weights": ones()}, WeightsError, "weights has 0 dimensions, but order 2 needs at least 2.", ""),
    (
        {"weights": ones(5, 3, 4)},
        WeightsError,
        "weights has batch dimensions (5,), which do not broadcast to (2,).",
        "",
    ),
    ({"weights": ones(3, 4, dtype=torch.complex64)}, WeightsError, "weights must be real, got torch.complex64.", ""),
    (
        {"mask": ones(3, 4)},
        DtypeError,
        "mask must be bool, True where a position takes part, but has the type torch.float32.",
        POINTS,
    ),
    ({"mask": "all"}, DtypeError, "mask must be a tensor of bool, got 'all'.", ""),
    ({"mask": TRUE[0]}, ShapeError, "mask has 1 dimensions, but order 2 needs at least 2.", ""),
    ({"mask": ones(2, 3, 5).bool()}, ShapeError, "mode 1 has size 5 in mask but 4 in {}.", ""),
    ({"mask": TRUE[:1]}, ShapeError, "mode 0 has size 1 in mask but 3 in {}.", ""),
    (
        {"mask": ones(3, 3, 4).bool()},
        ShapeError,
        "mask has batch dimensions (3,), which do not broadcast to (2,).",
        "",
    ),
    (
        {"lengths": ones(2, 3, dtype=torch.int64)},
        ShapeError,
        "lengths has 3 columns, but order 2 needs one a mode.",
        "",
    ),
    ({"lengths": [3]}, ShapeError, "lengths has 1 entries, but order 2 needs 2 entries, one a mode.", ""),
    ({"lengths": 3}, ShapeError, "lengths is 3, but order 2 needs 2 entries, one a mode.", ""),
    (
        {"lengths": ones(2, 2)},
        DtypeError,
        "lengths of mode 0 must be integers, but have the type torch.float32.",
        "",
    ),
    ({"lengths": [None, True]}, DtypeError, "lengths of mode 1 must be integers, but have the type torch.bool.", ""),
    ({"lengths": [None, "all"]}, DtypeError, "lengths of mode 1 must be integers, got 'all'.", ""),
    (
        {"lengths": [[1, 2, 3], None]},
        ShapeError,
        "lengths of mode 0 have the shape (3,), which does not broadcast to (2,).",
        "",
    ),
    ({"lengths": {"t": 3}}, ModesError, "there is no mode 't' among '0 1' (order 2).", ""),
]
VALUES = [  # rules of values, which are read where there are any
    ({"weights": [None, torch.tensor([1, -2.5, 1, 1])]}, "weights of mode 1 must not be negative, got -2.5."),
    ({"weights": [torch.zeros(3), None]}, "weights of mode 0 are all zero, so no index takes part."),
    ({"weights": [torch.zeros(2, 3).bool(), None]}, "weights of mode 0 are all zero, so no index takes part."),
    ({"weights": [None, torch.tensor([1, 1, math.inf, 1])]}, "weights of mode 1 must be finite, got 1 to inf."),
    ({"weights": [torch.tensor([1, -math.inf, 1]), None]}, "weights of mode 0 must be finite, got -inf to 1."),
    ({"weights": [None, torch.tensor([1, 1, math.nan, 1])]}, "weights of mode 1 must be finite, got nan to nan."),
    ({"weights": -ones(3, 4)}, "weights must not be negative, got -1."),
    ({"weights": ones(3, 4) / 0}, "weights must be finite, got inf to inf."),
    ({"weights": torch.zeros(3, 4)}, "weights are all zero, so no position takes part."),
    ({"lengths": [[3, 4], None]}, "lengths of mode 0 must be from 0 to its size 3, got 4."),
    ({"lengths": [None, -1]}, "lengths of mode 1 must be from 0 to its size 4, got -1."),
]


class TestRefused:
    @pytest.mark.parametrize("case", SHAPES)
    def test_shapes_that_do_not_belong_together(self, case, make):
        shapes, rule, reading = SHAPES[case]
        all_refuse(ShapeError, rule, *(make(*s) for s in shapes), reading=reading)

    def test_orders_that_are_none(self, make):
        x = make(*SIZE)
        all_refuse(OptionError, "order must be at least 1, got 0.", x, order=0, reading="")
        for order in ("3", 2.0, True, None):
            all_refuse(OptionError, f"order must be an integer, got {order!r}.", x, order=order, reading="")
        all_refuse(OptionError, "order must be an integer, got '3'.", x, order="3", return_lse=True, reading="")

    def test_types_and_devices(self, make):
        x, told = make(*SIZE), "must be floating point, got"
        all_refuse(DtypeError, f"query {told} torch.int64.", x.long(), x)
        all_refuse(DtypeError, f"key {told} torch.bool.", x, x.bool())
        all_refuse(DtypeError, f"value {told} torch.complex64.", x, x, make(*SIZE, dtype=torch.complex64))
        all_refuse(DtypeError, "the type is torch.float32 in query but torch.float64 in key.", x, x.double())
        all_refuse(DtypeError, "the type is torch.float32 in query but torch.bfloat16 in value.", x, x, x.bfloat16())
        reading = "\n".join(line for line in READING.split("\n") if "key" not in line)
        all_refuse(DtypeError, "key must be a torch.Tensor, got list.", x, [[1.0]], x, reading=reading)
        far = torch.empty(SIZE, device="cpu" if x.is_meta else "meta")
        kinds = x.device.type, far.device.type
        all_refuse(DtypeError, "the device is {} in query but {} in value.".format(*kinds), x, x, far)

    def test_queries_off_the_grid(self, make):
        key, grids = make(*SIZE), [name for name, operator in OPERATORS.items() if operator.query == "grid"]
        owners = [name for name, operator in OPERATORS.items() if "include_self" in operator.options]
        assert len(grids) == 4 and len(owners) == 2
        for positions in ((4, 3), (12,), (3, 5), ()):
            query, width = make(2, *positions, 5), len(str(SIZE))
            lines = [
                "\n  modes    0 1",
                f"  query    {tuple(query.shape)!s:<{width}}   batch=(2,) positions={positions} D=5",
            ]
            lines += [f"  {each:<8} {SIZE!s:<{width}}   batch=(2,) 0=3 1=4 D=5" for each in ("key", "value")]
            reading = "\n".join(lines)
            rule = f"query must be on the grid of key, but has positions {positions} where key has (3, 4)."
            all_refuse(ShapeError, rule, query, key, reading=reading, of=grids)
            rule = "include_self needs the query on the grid of key, but query has positions "
            rule += f"{positions} where key has (3, 4)."
            all_refuse(ShapeError, rule, query, key, reading=reading, of=owners, include_self=True)

    def test_numbers(self, make):
        x, hint = make(*SIZE), "\n  For a learned scale multiply the query by it, with scale=1.0."
        for dropout_p in (-0.1, 1.5, math.nan):
            all_refuse(OptionError, f"dropout_p must be between 0 and 1, got {dropout_p}.", x, dropout_p=dropout_p)
        for dropout_p in ("a", None, True, [0.5]):
            all_refuse(OptionError, f"dropout_p must be between 0 and 1, got {dropout_p!r}.", x, dropout_p=dropout_p)
        for scale in ("a", True, 1j, [0.5]):
            all_refuse(OptionError, f"scale must be a number or None, got {scale!r}.", x, scale=scale)
        for shape in ((), (2, 1)):
            rule = f"scale must be a number or None, got a tensor of shape {shape}."
            all_refuse(OptionError, rule, x, scale=make(*shape), reading=f"{READING}{hint}")
        for scale in (math.nan, math.inf):
            all_refuse(OptionError, f"scale must be finite, got {scale}.", x, scale=scale)

    def test_switches_that_are_words(self, make):
        x = make(*SIZE)
        for value in ("no", 1, None):
            all_refuse(
                OptionError, f"return_attention must be True or False, got {value!r}.", x, return_attention=value
            )
        plain = [name for name in without("return_lse") if name != "kao_qkv"]  # which needs centered=True first
        all_refuse(OptionError, "return_lse must be True or False, got 'no'.", x, return_lse="no", of=plain)
        for name, operator in OPERATORS.items():
            for switch in (option for option, value in operator.options.items() if isinstance(value, bool)):
                all_refuse(OptionError, f"{switch} must be True or False, got 1.", x, of=[name], **{switch: 1})

    def test_arguments_without_a_meaning(self, make):
        x = make(*SIZE)
        lacks = [
            (name, argument) for name, operator in OPERATORS.items() for argument in operator.lacking(operator.options)
        ]
        assert {("axial", "return_lse"), ("kao_qkv", "bias"), ("kao_qkv", "causal")} <= set(lacks)
        for name, argument in lacks:
            given = {"bias": [None, make(4, 4)], "causal": 1, "return_lse": True, "dropout_p": 0.5}[argument]
            rule = f"{argument} has no meaning for this operator: {OPERATORS[name].lacking(OPERATORS[name].options)[argument]}."
            all_refuse(OptionError, rule, x, of=[name], **{argument: given})

    def test_a_log_sum_exp_that_is_none(self, make):
        rule = "return_lse needs centered=True without interaction: otherwise the output is not that of one softmax."
        reading = f"{READING}\n  Use additive_attention."
        for options in ({}, {"centered": True, "interaction": "linear"}, {"interaction": "linear"}):
            all_refuse(OptionError, rule, make(*SIZE), reading=reading, of=["kao_qkv"], return_lse=True, **options)

    def test_values_of_options(self, make):
        x, tried = make(*SIZE), []
        order = "interaction_order must be an integer between 1 and order 2, got"
        cases = [
            ("interaction", "cubic", "interaction must be None or 'linear', got 'cubic'."),
            *(("saturation", v, f"saturation must be positive or None, got {v}.") for v in (0, -1.5, math.nan, True)),
            ("saturation", "x", "saturation must be positive or None, got 'x'."),
            ("pool", "max", "pool must be 'mean' or 'sum', got 'max'."),
            *(("interaction_order", value, f"{order} {value!r}.") for value in (0, 3, 1.0)),
        ]
        for name, operator in OPERATORS.items():
            more = {"centered": True} if name == "kao_qkv" else {}
            for option, value, rule in cases:
                if option in operator.options:
                    tried.append((name, option))
                    all_refuse(OptionError, rule, x, of=[name], **{option: value}, **more)
        assert {option for _, option in tried} == {"interaction", "saturation", "pool", "interaction_order"}

    def test_options_that_have_no_effect_or_no_meaning(self, make):
        x, hint = make(*SIZE), "\n  Give interaction='linear' too, or leave saturation out."
        some = [name for name, operator in OPERATORS.items() if "saturation" in operator.options]
        for value in (0.5, None):
            rule = f"saturation has no effect without interaction, got {value}."
            all_refuse(OptionError, rule, x, saturation=value, of=some, reading=f"{READING}{hint}")
        for name in some:
            OPERATORS[name].function(x, x, x, order=2, saturation=1.0)  # the default may be said
        rule = "interaction needs centered=True: the published form has no first order to correct."
        all_refuse(OptionError, rule, x, of=["kao_qkv"], interaction="linear")

    def test_subsets_that_are_kept(self, make):
        x, hint = make(*SIZE), "\n  Write [(0,), (1, 2)] for the modes 0, 1 and 2, the last two together."
        rule = "kept and interaction_order exclude each other, but both are given."
        all_refuse(OptionError, rule, x, of=["truncated"], kept=[(0,)], interaction_order=1)
        twice = "each subset in kept must name modes, none of them twice, got"
        cases = [
            ([], "kept is empty, but at least one subset of modes must be kept.", ""),
            ([(0,), ()], f"{twice} ().", ""),
            ([(1, -1)], f"{twice} (1, 1).", ""),
            ([(0, 2)], "there is no mode 2 among '0 1' (order 2).", ""),
            ([1], "each subset in kept must be a sequence of modes, got 1.", hint),
            ("t", "kept must hold subsets of modes, got 't'.", hint),
        ]
        for kept, rule, more in cases:
            all_refuse(ModesError, rule, x, of=["truncated"], kept=kept, reading=READING + more)
        rule = "bias of mode 1 has no effect, as no subset in kept has the mode."
        all_refuse(OptionError, rule, x, of=["truncated"], kept=[(0,)], bias=[None, make(4, 4)])

    def test_weights_masks_and_lengths(self, make):
        x = make(*SIZE)
        for given, kind, rule, hint in WEIGHTS:
            all_refuse(kind, rule.format("key"), x, reading=READING + hint, **given)

    def test_values_of_weights_and_lengths(self):
        for given, rule in VALUES:
            all_refuse(WeightsError, rule, ones(*SIZE), **given)

    def test_weights_of_positions_where_indices_are_counted(self):
        rule = "weights of whole positions have no meaning for this operator: it counts the indices of each mode."
        reading, gaps = f"{READING}\n  Give one vector a mode, or a mask alone.", TRUE.clone()
        gaps[0, 0] = False
        counting = [
            ("kao_kv", {}),
            ("kao_qkv", {}),
            ("kronecker_product", {"pool": "sum"}),
            ("kronecker_sum", {"pool": "sum"}),
        ]
        for name, options in counting:
            for given in ({"weights": ones(3, 4)}, {"mask": gaps, "weights": [ones(3), None]}):
                all_refuse(OptionError, rule, ones(*SIZE), of=[name], reading=reading, **given, **options)
            x = ones(*SIZE)
            OPERATORS[name].function(x, x, x, order=2, mask=gaps, **options)  # a mask alone has a meaning

    def test_biases_that_do_not_fit(self, make):
        shape = "bias of mode {} has shape {}, but query has {} positions and key {} along the mode."
        batch = "bias of mode 0 has batch dimensions {}, which do not broadcast to (2,)."
        cases = [
            ([None], ShapeError, "bias has 1 entries, but order 2 needs 2 tensors, one a mode."),
            (make(2, 4), ShapeError, "bias has a single tensor, but order 2 needs 2 tensors, one a mode."),
            ([None, make(3, 3)], ShapeError, shape.format(1, (3, 3), 4, 4)),
            ([make(3), None], ShapeError, shape.format(0, (3,), 3, 3)),
            ([make(7, 3, 3), None], ShapeError, batch.format((7,))),
            ([make(1, 2, 3, 3), None], ShapeError, batch.format((1, 2))),
            (
                [make(3, 3, dtype=torch.int64), None],
                DtypeError,
                "bias of mode 0 must be floating point, got torch.int64.",
            ),
            (
                [make(3, 3, dtype=torch.complex64), None],
                DtypeError,
                "bias of mode 0 must be real, got torch.complex64.",
            ),
            (5, ShapeError, "bias is 5, but order 2 needs 2 tensors, one a mode."),
            ("no", ShapeError, "bias is 'no', but order 2 needs 2 tensors, one a mode."),
            ([[["a"]], None], DtypeError, "bias of mode 0 must be a tensor or numbers, got [['a']]."),
            ([[[1.0], [1, 2]], None], DtypeError, "bias of mode 0 must be a tensor or numbers, got [[1.0], [1, 2]]."),
            ([5, None], ShapeError, shape.format(0, (), 3, 3)),
        ]
        for bias, kind, rule in cases:
            all_refuse(kind, rule, make(*SIZE), of=without("bias"), bias=bias)

    def test_causal_modes_and_queries_without_a_place(self, make):
        key, of = make(*SIZE), without("causal")
        for causal in (2, -3):
            rule = f"there is no mode {causal} among '0 1' (order 2)."
            all_refuse(ModesError, rule, key, of=of, causal=causal)
        for causal in ("t", True, 1.0):
            all_refuse(OptionError, f"causal must be the index of a mode, got {causal!r}.", key, of=of, causal=causal)
        frames, keys = "causal needs the same frames in query and key", READING.split("\n")[3:]
        cases = [
            ((2, 12, 5), (12,), "causal needs a query over 2 modes, but query has 1 position dimensions.", {"causal": 1}),
            ((2, 3, 7, 5), (3, 7), f"{frames}, but mode 1 has size 7 in query and 4 in key.", {"causal": 1}),
            (
                (2, 12, 5), (12,), "bias needs a query over 2 modes, but query has 1 position dimensions.",
                {"bias": [None, make(4, 4)]},
            ),
        ]  # fmt: skip
        for shape, positions, rule, given in cases:
            where = f"({positions[0]},)" if len(positions) == 1 else str(positions)
            line = f"  query    {shape!s:<12}   batch=(2,) positions={where} D=5"
            reading = "\n".join(["", "  modes    0 1", line, *keys])
            all_refuse(ShapeError, rule, make(*shape), key, of=["flattened", "additive"], reading=reading, **given)

    def test_unknown_arguments(self):
        x = ones(*SIZE)
        for operator in OPERATORS.values():
            with pytest.raises(
                TypeError, match=rf"{operator.function.__name__}\(\) got an unexpected keyword argument"
            ):
                operator.function(x, x, x, order=2, centred=True)

    @pytest.mark.parametrize("function", [ta.mode_averages, ta.additive_part, ta.interaction_residual])
    def test_of_one_tensor(self, function, make):
        name, x, reading = (
            function.__name__,
            make(*SIZE),
            "\n  modes    0 1\n  tensor   (2, 3, 4, 5)   batch=(2,) 0=3 1=4 D=5",
        )
        cases = [
            (
                (make(*SIZE, dtype=torch.int32),),
                {},
                DtypeError,
                f"tensor must be floating point, got torch.int32.{reading}",
            ),
            (
                (torch.sparse_coo_tensor(size=SIZE, check_invariants=True),),
                {},
                DtypeError,
                f"tensor must be a dense tensor, got the layout torch.sparse_coo.{reading}",
            ),
            ((x,), {"order": 0}, OptionError, "order must be at least 1, got 0."),
            (([[1.0]],), {}, DtypeError, "tensor must be a torch.Tensor, got list."),
        ]
        if function is ta.mode_averages:
            told = "dtype must be a torch.dtype such as torch.float32, got"
            cases += [
                ((x,), {"dtype": "float32"}, DtypeError, f"{told} 'float32'.{reading}"),
                ((x,), {"dtype": np.float32}, DtypeError, f"{told} <class 'numpy.float32'>.{reading}"),
                ((x,), {"dtype": torch.int32}, DtypeError, f"dtype must be floating point, got torch.int32.{reading}"),
            ]
        for args, given, kind, rule in cases:
            refused(kind, f"{name}: {rule}", function, *args, **{"order": 2, **given})
        for given, kind, rule, hint in WEIGHTS if function is ta.mode_averages else WEIGHTS[:10]:
            refused(kind, f"{name}: {rule.format('tensor')}{reading}{hint}", function, x, order=2, **given)
        if not x.is_meta:
            for given, rule in VALUES if function is ta.mode_averages else VALUES[:6]:
                refused(WeightsError, f"{name}: {rule}{reading}", function, x, order=2, **given)

    def test_of_outer_sums(self, make):
        rows, columns = make(2, 30, 5), make(2, 40, 5)
        batch, size = (
            "batch dimensions are (2,) in vectors[0] but {} in vectors[1].",
            "every mode needs at least 1 index.",
        )
        cases = [
            ([], ShapeError, "vectors is empty, but every mode needs one."),
            (3, ShapeError, "vectors must hold one tensor a mode, got 3."),
            ([rows, make(3, 40, 5)], ShapeError, batch.format((3,))),
            ([rows, make(40, 5)], ShapeError, batch.format(())),
            ([rows, columns, make(2, 4, 6)], ShapeError, "channels are 5 in vectors[0] but 6 in vectors[2]."),
            ([rows, make(2, 0, 5)], ShapeError, f"mode 0 has size 0 in vectors[1], but {size}"),
            (
                [rows, rows.double()],
                DtypeError,
                "the type is torch.float32 in vectors[0] but torch.float64 in vectors[1].",
            ),
            ([rows, rows.long()], DtypeError, "vectors[1] must be floating point, got torch.int64."),
            ([None, rows], DtypeError, "vectors[0] must be a torch.Tensor, got NoneType."),
            (
                [make(100)],
                ShapeError,
                "vectors[0] has 1 dimensions, but order 1 needs at least 2.\n  The layout is (*batch, n_1, ..., n_N, D).",
            ),
        ]
        for vectors, kind, rule in cases:
            refused(kind, f"outer_sum: {rule}", ta.outer_sum, vectors)
        double = make(2, 30, 40, 5, dtype=torch.float64)
        whole = [
            (
                {"skip": make(2, 30, 41, 5)},
                ShapeError,
                "skip has shape (2, 30, 41, 5), but the result has (2, 30, 40, 5).",
            ),
            ({"out": make(2, 30, 5)}, ShapeError, "out has shape (2, 30, 5), but the result has (2, 30, 40, 5)."),
            ({"out": double}, DtypeError, "the type is torch.float32 in the result but torch.float64 in out."),
        ]
        for arguments, kind, rule in whole:
            refused(kind, f"outer_sum: {rule}", ta.outer_sum, [rows, columns], **arguments)
        rule = "out is given where derivatives are asked for, but none goes through it.\n  Use torch.no_grad(), or leave out."
        learned, out = [rows.clone().requires_grad_(), columns], make(2, 30, 40, 5)
        refused(OptionError, f"outer_sum: {rule}", ta.outer_sum, learned, out=out)


class TestRegistry:
    def test_names(self):
        rule = f"there is no operator 'none'; the operators are: {', '.join(OPERATORS)}."
        refused(OptionError, rule, get_operator, "none")
        twin = dataclasses.replace(get_operator("additive"))
        refused(OptionError, "there is already an operator 'additive'.", register_operator, twin)
        assert register_operator(get_operator("additive")) is get_operator("additive")
        rule = "operator 'additive' has no option 'centred'; its options are: interaction, saturation, include_self."
        refused(OptionError, rule, get_operator("additive").with_defaults, {"centred": True})
        rule = "operator 'kao_kv' has no option 'pool'; its options are: none."
        refused(OptionError, rule, get_operator("kao_kv").with_defaults, {"pool": "sum"})

    def test_signatures_and_help_name_all_arguments(self):
        shared = [
            "scale",
            "weights",
            "mask",
            "lengths",
            "bias",
            "causal",
            "dropout_p",
            "return_lse",
            "return_attention",
        ]
        for operator in OPERATORS.values():
            parameters = inspect.signature(operator.function).parameters
            own = ["query", "key", "value", "order", *operator.options]
            assert list(parameters) == [*own, *shared]
            assert {name: parameters[name].default for name in operator.options} == dict(operator.options)
            for name in shared:
                assert f"\n    {name}: " in operator.function.__doc__, name


class TestTraps:
    """What other attention packages have got wrong."""

    @every_variant
    def test_modes_of_different_sizes_in_every_order(self, variant):
        """The modes of the input permuted are the modes of the output permuted, whatever their layout in memory."""
        if "kept" in variant.options:
            pytest.skip("its option names modes")
        x = draw(2, 2, 3, 5, 4)
        y = variant.function(x, 2 * x, x - 1, order=3)
        for order in itertools.permutations(range(3)):
            dims = (0, *(1 + mode for mode in order), 4)
            for turned in (x.permute(dims), x.permute(dims).contiguous()):
                close([variant.function(turned, 2 * turned, turned - 1, order=3)], [y.permute(dims)])

    @every_variant
    def test_every_layout_of_memory(self, variant):
        query, key, value = tensors((3, 4))
        expected = variant.function(query, key, value, order=2)
        for layout in LAYOUTS.values():
            close([variant.function(layout(query), layout(key), layout(value), order=2)], [expected])
        close([variant.function(query, key[:1].expand(2, -1, -1, -1), value, order=2)[:1]], [expected[:1]])

    @every_variant
    def test_empty_batches_and_sizes_of_one(self, variant):
        for sizes in ((1,), (2, 1), (1, 1, 1)):
            if not fits(variant, len(sizes)):
                continue
            for batch in ((0,), (2, 0), ()):
                x = draw(*batch, *sizes, 4).requires_grad_()
                mask = torch.ones(sizes, dtype=torch.bool)
                for given in (
                    {},
                    {"mask": mask},
                    {"weights": [positive(n) for n in sizes]},
                    {"return_attention": True},
                ):
                    y = variant.function(x, x, x, order=len(sizes), **given)
                    y = y.output if given.get("return_attention") else y
                    assert y.shape == x.shape and y.isfinite().all()
                    (grad,) = torch.autograd.grad(y.sum(), x)
                    assert grad.shape == x.shape

    @every_variant
    def test_one_position_is_attended_to_with_weight_one(self, variant):
        query, key, value = tensors((1, 1, 1))
        times = 3 if variant.name == "kronecker_sum" or (variant.name == "kao_qkv" and not variant.options) else 1
        close([variant.function(query, key, value, order=3)], [times * value])

    @every_variant
    def test_results_share_no_memory_with_what_is_given(self, variant):
        for sizes in ((1,), (1, 1), (3, 4)):
            if not fits(variant, len(sizes)):
                continue
            leaves = tensors(sizes)
            before = [tensor.clone() for tensor in leaves]
            variant.function(*leaves, order=len(sizes)).zero_()
            assert all(map(torch.equal, leaves, before))
            variant.function(leaves[0], leaves[0], leaves[0], order=len(sizes)).zero_()
            assert torch.equal(leaves[0], before[0])

    @every_variant
    def test_samples_do_not_see_each_other(self, variant):
        query, key, value = tensors((3, 4), batch=3)
        y = variant.function(query, key, value, order=2)
        for sample in range(3):
            alone = (tensor[sample : sample + 1] for tensor in (query, key, value))
            close([variant.function(*alone, order=2)], [y[sample : sample + 1]])

    @every_variant
    def test_what_is_not_a_number_shows_in_its_sample(self, variant):
        """On every path alike, however few tokens there are and whoever holds it; elsewhere nothing changes."""
        for sizes in ((3, 4), (1, 1), (1, 20)):
            for place in range(3):
                leaves = tensors(sizes)
                expected = variant.function(*leaves, order=2)
                leaves[place][(0, *(0 for _ in sizes), 0)] = math.nan
                plain = variant.function(*leaves, order=2)
                more = variant.function(*leaves, order=2, return_attention=True).output
                assert torch.equal(plain.isfinite(), more.isfinite())
                assert not plain[0].isfinite().all()
                close([plain[1], more[1]], [expected[1]] * 2)

    @every_variant
    def test_asking_for_more_changes_nothing(self, variant):
        """What the fused kernel gives is what is written out with the attention weights."""
        query, key, value = tensors((3, 4))
        more = [{"weights": [torch.tensor([1.0, 0, 2]), positive(2, 4)]}, {"mask": holes(2, 3, 4)}]
        more += [] if "causal" in variant.lacks else [{"causal": 1}]
        for given in ({}, *more):
            plain = variant.function(query, key, value, order=2, **given)
            close([variant.function(query, key, value, order=2, return_attention=True, **given).output], [plain])

    def test_integers_of_numpy(self):
        for variant in VARIANTS:
            x = draw(2, 3, 4, 5)
            expected = variant.function(x, x, x, order=2)
            close([variant.function(x, x, x, order=np.int64(2))], [expected], rtol=0, atol=0)

    @pytest.mark.parametrize("name", OPERATORS)
    def test_more_elements_than_32_bits_count(self, name):
        """2³² elements, without memory for one of them."""
        x = torch.empty(1, 16, 16, 16, 1 << 20, device="meta")
        y = OPERATORS[name].function(x, x, x, order=3)
        assert (y.shape, y.numel()) == (x.shape, 1 << 32)

    @every_variant
    def test_queries_that_see_nothing_get_nothing(self, variant):
        """Rows of a bias that hide all of a mode, whatever the option, and on every path."""
        if "bias" in variant.lacks or variant.name in ("kao_kv", "axial"):
            pytest.skip("another mode is still seen")
        query, key, value = tensors((3, 4))
        bias = draw(3, 3)
        bias[2] = -math.inf
        leaf = query.requires_grad_()
        lse = variant.function(leaf, key, value, order=2, bias=[bias, None], return_lse=True)
        plain = variant.function(leaf, key, value, order=2, bias=[bias, None])
        own = variant.options.get("include_self")
        expected = value[:, 2] if own else torch.zeros_like(value[:, 2])
        close([plain[:, 2], lse.output[:, 2]], [expected] * 2)
        assert plain[:, :2].ne(0).all()
        if not own:
            assert lse.lse[:, 2].eq(-math.inf).all() and lse.lse[:, :2].isfinite().all()
        (grad,) = torch.autograd.grad(plain.sum() + lse.lse[:, :2].sum(), leaf)
        assert grad.isfinite().all()


class TestDerivatives:
    @forward_mode
    @pytest.mark.parametrize(
        "variant",
        [
            pytest.param(v, id=str(v), marks=() if str(v) in ("additive", "kao_qkv") else pytest.mark.thorough)
            for v in VARIANTS
        ],
    )
    def test_of_every_kind_and_vmap(self, variant):
        function = lambda x: variant.function(x, x, x, order=2)  # noqa: E731
        loss = lambda x: function(x).square().sum()  # noqa: E731
        xs = draw(3, 2, 3, 4, 4)
        close([torch.vmap(function)(xs)], [torch.stack([function(x) for x in xs])])
        gradients = torch.stack([torch.func.grad(loss)(x) for x in xs])
        close([torch.vmap(torch.func.grad(loss))(xs)], [gradients])
        step = 1e-6
        tangent = (function(xs[0] + step * xs[1]) - function(xs[0] - step * xs[1])) / (2 * step)
        close([torch.func.jvp(function, (xs[0],), (xs[1],))[1]], [tangent], rtol=1e-6, atol=1e-8)
        slope = torch.func.grad(loss)(xs[0] + step * xs[1]) - torch.func.grad(loss)(xs[0] - step * xs[1])
        product = torch.func.jvp(torch.func.grad(loss), (xs[0],), (xs[1],))[1]
        close([product], [slope / (2 * step)], rtol=1e-5, atol=1e-7)
        assert torch.autograd.gradgradcheck(function, (xs[0, :1, :2, :2, :3].clone().requires_grad_(),))

    @pytest.mark.parametrize("strict", [pytest.param(False, marks=pytest.mark.thorough), True])
    def test_a_scale_may_be_a_symbol_while_a_graph_is_recorded(self, strict):
        class BySize(torch.nn.Module):
            """Attention whose scale is a symbol where sizes are; kernels want a number, what is written out does not."""

            def forward(self, x):
                return ta.additive_attention(x, x, x, order=2, scale=1 / x.shape[-2], return_lse=True).output

        x = draw(2, 3, 7, 8, dtype=torch.float32)
        dims, small = ({2: Dim("w", min=3, max=100)},), draw(2, 3, 4, 8, dtype=torch.float32)
        program = torch.export.export(BySize(), (small,), dynamic_shapes=dims, strict=strict)
        torch.testing.assert_close(program.module()(x), BySize()(x))


@pytest.mark.parametrize("name", without("bias"))
def test_biases_of_other_types_are_brought_to_that_of_the_averages(name):
    function, x = OPERATORS[name].function, draw(2, 3, 4, 5, dtype=torch.float32)
    bias = [draw(3, 3), draw(2, 4, 4, dtype=torch.float32)]
    expected = function(x, x, x, order=2, bias=[bias[0].float(), bias[1]])
    for given in (bias, [bias[0].tolist(), bias[1].numpy()], (bias[0].float(), bias[1].double())):
        output = function(x, x, x, order=2, bias=given)
        assert output.dtype == torch.float32
        torch.testing.assert_close(output, expected)
    for dtype in (torch.float16, torch.bfloat16):
        half = x.to(dtype)
        output = function(half, half, half, order=2, bias=bias)
        assert output.dtype == dtype
        torch.testing.assert_close(output.float(), expected, rtol=3e-2, atol=3e-2)
