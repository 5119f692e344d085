"""Modes: names and numbers, shapes read through them, and every message about either."""

from __future__ import annotations

import numpy as np
import pytest
from modules import refused

from tensorattn.errors import ModesError, OptionError, ShapeError, WeightsError
from tensorattn.modes import GridShape, ModeSpec, attention_shape, check_order, grid_shape, mode_parts, mode_subsets


def test_names_and_numbers():
    for given in ("t h w", ("t", "h", "w"), ["t", "h", "w"], " t  h\tw "):
        spec = ModeSpec.parse(given)
        assert (spec.names, spec.order, spec.named, str(spec)) == (("t", "h", "w"), 3, True, "t h w")
        assert [spec.index(mode) for mode in ("t", "w", 1, -1, np.int64(-3))] == [0, 2, 1, 2, 0]
        assert spec.label(1) == "'h'"
    for given in (3, np.int8(3)):
        spec = ModeSpec.parse(given)
        assert (spec.names, spec.order, spec.named, spec.label(1)) == (("0", "1", "2"), 3, False, "1")
        assert [spec.index(mode) for mode in ("2", 2, -1)] == [2, 2, 2]
    assert ModeSpec.parse("t h") == ModeSpec.parse(("t", "h")) != ModeSpec.parse("h t")
    assert hash(ModeSpec.parse("t h")) == hash(ModeSpec.parse(["t", "h"]))


MISSING = 'modes is missing.\n  Give their names, as in modes="t h w", or their number, as in modes=3.'
WORDS = "mode names must be words of letters, digits and underscores, got"
REFUSED = [
    (None, ModesError, MISSING),
    (0, OptionError, "modes must be at least 1, got 0."),
    (-1, OptionError, "modes must be at least 1, got -1."),
    (2.0, ModesError, "modes must be a number or names, got 2.0."),
    (True, ModesError, "modes must be a number or names, got True."),
    ("", ModesError, "modes must name at least one mode, got ''."),
    ((), ModesError, "modes must name at least one mode, got ()."),
    ("t 2h", ModesError, f"{WORDS} '2h'."),
    (("t", 3), ModesError, f"{WORDS} 3."),
    (("t", ""), ModesError, f"{WORDS} ''."),
    ("t h t", ModesError, "mode names must differ, but 't' appears 2 times in 't h t'."),
]


@pytest.mark.parametrize(("given", "kind", "message"), REFUSED, ids=lambda value: repr(value)[:20])
def test_modes_that_are_none(given, kind, message):
    refused(kind, message, ModeSpec.parse, given)


@pytest.mark.parametrize("mode", ["c", 3, -4, True, 1.0, None], ids=str)
def test_a_mode_that_is_not_there(mode):
    refused(ModesError, f"there is no mode {mode!r} among 't h w' (order 3).", ModeSpec.parse("t h w").index, mode)


@pytest.mark.parametrize("order", ["3", 2.0, True, None], ids=str)
def test_an_order_that_is_none(order):
    refused(OptionError, f"order must be an integer, got {order!r}.", check_order, order)
    refused(OptionError, "order must be at least 1, got 0.", check_order, 0)
    assert check_order(np.int64(1)) is None


def test_shapes():
    assert grid_shape((3, 4, 5), 2, "key") == GridShape((), (3, 4), 5)
    assert grid_shape((0, 7, 3, 4, 0), 2, "key") == GridShape((0, 7), (3, 4), 0)
    named = ModeSpec.parse("h w")
    refused(
        ShapeError,
        "mode 'w' has size 0 in x, but every mode needs at least 1 index.",
        grid_shape,
        (3, 0, 5),
        named,
        "x",
    )
    assert attention_shape((2, 9, 5), (2, 3, 4, 5), (2, 3, 4, 7), 2) == GridShape((2,), (3, 4), 5)


def test_one_part_a_mode():
    needs = "order 2 needs 2 parts, one a mode."
    for given in ([None, 1.0], (None, 1.0), iter([None, 1.0])):
        assert mode_parts(given, 2, "it", "parts", WeightsError) == (None, 1.0)
    cases = [
        (np.ones((2, 3)), "it has a single tensor, but "),
        (np.float64(1), "it is np.float64(1.0), but "),
        ("ab", "it is 'ab', but "),
        ({0: 1, 1: 2}, "it is {0: 1, 1: 2}, but "),
        (5, "it is 5, but "),
        ([None], "it has 1 entries, but "),
    ]
    for given, told in cases:
        refused(WeightsError, told + needs, mode_parts, given, 2, "it", "parts", WeightsError)


def test_subsets():
    hint = "\n  Write [(0,), (1, 2)] for the modes 0, 1 and 2, the last two together."
    assert mode_subsets([(0,), [1, 2], {"t"}, ()]) == ((0,), (1, 2), ("t",), ())
    for given in (1, "t"):
        refused(ModesError, f"kept must hold subsets of modes, got {given!r}.{hint}", mode_subsets, given)
    for given in (1, "t"):
        told = f"each subset in kept must be a sequence of modes, got {given!r}.{hint}"
        refused(ModesError, told, mode_subsets, [(0,), given])
