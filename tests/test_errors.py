"""Errors: classes, how a cause is told again, how arguments are read, and what an option may be."""

from __future__ import annotations

import itertools
import pickle

import numpy as np
import pytest
import torch
from modules import LARGE, Guard, draw, refused

import tensorattn as ta
from tensorattn.errors import (
    DtypeError,
    ModesError,
    OptionError,
    ShapeError,
    TensorAttentionError,
    WeightsError,
    check,
    check_scale,
    describe,
    retells,
)


def test_every_class_is_a_value_error_of_the_package():
    for kind in (DtypeError, ModesError, OptionError, ShapeError, WeightsError):
        assert kind.__mro__[1:3] == (TensorAttentionError, ValueError)
        assert getattr(ta, kind.__name__) is kind


def test_an_error_is_told_once_and_survives_pickling():
    x = torch.ones(5)
    for function in (ta.mode_averages, ta.interaction_residual):  # the second calls a function that tells too
        with pytest.raises(ShapeError) as caught:
            function(x, order=2)
        name, told = function.__name__, str(caught.value)
        assert told == (
            f"{name}: tensor has 1 dimensions, but order 2 needs at least 3.\n"
            "  modes    0 1\n  tensor   (5,)\n  The layout is (*batch, n_1, ..., n_N, D)."
        )
        assert caught.value.rule == "tensor has 1 dimensions, but order 2 needs at least 3."
        assert caught.value.hint == "The layout is (*batch, n_1, ..., n_N, D)."
        assert caught.value.__suppress_context__
        again = pickle.loads(pickle.dumps(caught.value))
        assert (type(again), str(again), again.rule, again.hint) == (
            ShapeError, told, caught.value.rule, caught.value.hint
        )  # fmt: skip


def test_who_tells():
    class Tool:
        """Refuses everything."""

        modes = None

        @retells
        def __init__(self, refuses=False):
            if refuses:
                raise OptionError("it is not made.")

        @retells
        def forward(self, x):
            raise ShapeError("x is odd.")

        @retells
        def step(self):
            raise ShapeError("it does not step.")

        @classmethod
        @retells
        def parse(cls):
            raise ModesError("it does not parse.")

    class Finer(Tool):
        """Goes by its own name."""

    for kind in (Tool, Finer):
        name = kind.__name__
        refused(OptionError, f"{name}: it is not made.", kind, True)
        refused(ShapeError, f"{name}: x is odd.", kind().forward, torch.ones(LARGE))
        refused(ShapeError, f"{name}.step: it does not step.", kind().step)
        refused(ModesError, f"{name}.parse: it does not parse.", kind.parse)


def test_other_errors_pass_through():
    with pytest.raises(TypeError, match=r"^additive_attention\(\) got an unexpected keyword argument 'centred'$"):
        ta.additive_attention(*(torch.ones(2, 3, 4),) * 3, order=1, centred=True)
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'order'"):
        ta.additive_attention(*(torch.ones(2, 3, 4),) * 3)


def test_tensors_are_read_through_the_modes():
    shapes = {"query": (2, 7, 5), "key": (2, 3, 4, 5), "value": (3, 5), "other": (2, 3, 4, 5)}
    assert describe(["h", "w"], shapes, 1) == (
        "  modes    h w\n"
        "  query    (2, 7, 5)      batch=(2,) positions=(7,) D=5\n"
        "  key      (2, 3, 4, 5)   batch=(2,) h=3 w=4 D=5\n"
        "  value    (3, 5)         batch=() h=3 w=5 D=5\n"
        "  other    (2, 3, 4, 5)"
    ).replace("value    (3, 5)         batch=() h=3 w=5 D=5", "value    (3, 5)")
    first = describe(["h", "w"], {"x": (2, 8, 3, 4)}, channels_first=True)
    assert first == "  modes    h w\n  x        (2, 8, 3, 4)   batch=(2,) C=8 h=3 w=4"
    assert describe(["h"], {"x": (2, 8)}) == "  modes    h\n  x        (2, 8)"


OPTIONS = [
    ("integer", (3, -1, np.int16(3)), {2.0: "2.0", True: "True", "3": "'3'", None: "None"}, "an integer"),
    ("number", (3, 0.5, -1.0, np.float32(2)), {True: "True", "3": "'3'", 1j: "1j"}, "a number"),
    ("probability", (0, 0.5, 1), {-0.1: "-0.1", 1.5: "1.5", "a": "'a'", True: "True"}, "between 0 and 1"),
    ("switch", (True, False), {1: "1", "no": "'no'", None: "None"}, "True or False"),
]


@pytest.mark.parametrize(("kind", "right", "wrong", "needed"), OPTIONS, ids=lambda value: str(value)[:12])
def test_options(kind, right, wrong, needed):
    for value in right:
        assert check(value, "it", kind) is None
    for value, shown in wrong.items():
        refused(OptionError, f"it must be {needed}, got {shown}.", check, value, "it", kind)
    told = "it must be {}, got a tensor of shape (2,)."
    refused(OptionError, told.format(needed), check, torch.ones(2), "it", kind)
    refused(OptionError, told.format("so"), check, torch.ones(2), "it", kind, rule="so")


def test_the_least_that_an_option_may_be():
    assert check(1, "it", "integer", least=1) is None
    refused(OptionError, "it must be at least 1, got 0.", check, 0, "it", "integer", least=1)
    refused(OptionError, "it must be at least 0, got nan.", check, float("nan"), "it", "number", least=0)


def test_scales():
    for scale in (None, 0, -1.5, np.float32(2)):
        assert check_scale(scale) is None
    for scale in (float("nan"), float("inf"), np.float64("-inf")):
        refused(OptionError, f"scale must be finite, got {scale}.", check_scale, scale)


def test_the_guard_sees_work():
    x = draw(2, 3, 4, 5)
    with Guard() as guard:
        x.transpose(1, 2).add(1)
    assert guard.work == ["aten.add.Tensor"]
    with pytest.raises(AssertionError):
        told = f"there is no operator 'none'; the operators are: {', '.join(ta.OPERATORS)}."
        refused(OptionError, told, lambda: (x.sum(), ta.get_operator("none")))


def test_all_that_the_package_raises_for_bad_input_can_be_caught_at_once():
    x = torch.ones(2, 3, 4)
    calls = [
        lambda: ta.additive_attention(x, x, x, order=4),
        lambda: ta.additive_attention(x.long(), x, x, order=1),
        lambda: ta.additive_attention(x, x, x, order=1, causal=2),
        lambda: ta.additive_attention(x, x, x, order=1, scale="a"),
        lambda: ta.additive_attention(x, x, x, order=1, weights=[-torch.ones(3)]),
    ]
    kinds = []
    for call in calls:
        with pytest.raises(TensorAttentionError) as caught:
            call()
        kinds.append(type(caught.value))
    assert all(one is not two for one, two in itertools.combinations(kinds, 2))
