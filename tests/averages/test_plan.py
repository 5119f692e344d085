"""Plans: every step a valid contraction, every family covered, few reads, and what is done is what they say."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import math
import pickle
import random

import numpy as np
import opt_einsum
import pytest
import torch
from grids import LAYOUTS
from modules import draw, refused
from torch.utils._python_dispatch import TorchDispatchMode

import tensorattn as ta
from tensorattn.averages.plan import make_plan
from tensorattn.errors import ModesError, OptionError
from tensorattn.modes import main_effects

ORDERS = range(1, 9)
LARGEST = {1: 9, 2: 7, 3: 5, 4: 4, 5: 4, 6: 3, 7: 3, 8: 2}  # sizes drawn for each order: a few thousand elements


def random_plan(order, seed):
    """Sizes, batch, channels, memory order and family drawn at random."""
    rng = random.Random(f"{order} {seed}")
    sizes = tuple(rng.randint(1, LARGEST[order]) for _ in range(order))
    batch = tuple(rng.randint(1, 3) for _ in range(rng.randint(0, 2)))
    permutation = list(range(len(batch) + order + 1))
    if seed % 2:
        rng.shuffle(permutation)
    subsets = [kept for size in range(order + 1) for kept in itertools.combinations(range(order), size)]
    family = tuple(rng.sample(subsets, rng.randint(1, min(2**order, 6))))
    names = tuple(map(str, range(order)))
    return make_plan(batch, sizes, rng.randint(1, 4), tuple(permutation), rng.choice([2, 4, 8]), family, names)


def broken_rules(plan):
    """What is wrong with a plan, by its shapes alone."""
    shape = (*plan.batch, *plan.sizes, plan.dim)
    modes = range(len(plan.batch), len(plan.batch) + len(plan.sizes))
    letter = {d: opt_einsum.get_symbol(d) for d in range(len(shape))}
    extent = {letter[d]: size for d, size in enumerate(shape)}

    def node(kept):
        present = [d for d in plan.permutation if d not in modes or d - len(plan.batch) in kept]
        return "".join(letter[d] for d in present)

    root, wrong = tuple(range(len(plan.sizes))), []
    made, used = {root}, set()
    for step in plan.steps:
        inputs, output = step.equation.split("->")
        lost = [letter[len(plan.batch) + mode] for mode in step.source if mode not in step.target]
        places = [place for place, c in enumerate(c for c in inputs if c in lost or c in map(letter.get, modes))
                  if [c for c in inputs if c in lost or c in map(letter.get, modes)][place] in lost]  # fmt: skip
        rules = {
            "reads what was not made": step.source in made,
            "makes nothing new": step.target not in made,
            "keeps the wrong modes": set(step.target) < set(step.source),
            "is not the contraction it says": (inputs, output) == (node(step.source), node(step.target)),
            "reduces modes apart in memory": places == list(range(places[0], places[0] + len(lost))),
            "miscounts reads": step.read == math.prod(extent[c] for c in inputs),
            "miscounts writes": step.written == math.prod(extent[c] for c in output),
        }
        wrong.extend(f"{step.equation} {rule}" for rule, kept in rules.items() if not kept)
        made.add(step.target)
        used.add(step.source)
    wrong.extend(f"{kept} is never made" for kept in plan.family if kept not in made)
    idle = made - used - set(plan.family) - {root}
    return [*wrong, *(f"{kept} is made for nothing" for kept in idle)]


@pytest.mark.parametrize("order", ORDERS)
def test_every_step_is_a_contraction_and_every_mean_is_made(order):
    for seed in range(10):
        assert broken_rules(random_plan(order, seed)) == []


def test_the_checker_of_plans_can_fail():
    plan = ta.plan((3, 4, 5), dim=2, kept=[(0,), (2,)])
    assert broken_rules(plan) == []
    assert broken_rules(dataclasses.replace(plan, family=((0,), (1,)))) == [
        "(1,) is never made",
        "(2,) is made for nothing",
    ]
    first, *others = plan.steps
    doubled = dataclasses.replace(first, read=2 * first.read)
    assert broken_rules(dataclasses.replace(plan, steps=(doubled, *others))) == [f"{first.equation} miscounts reads"]
    turned = dataclasses.replace(plan, permutation=(1, 0, 2, 3))
    assert any("is not the contraction it says" in rule for rule in broken_rules(turned))


class Means(TorchDispatchMode):
    """Elements that each mean reads and writes."""

    def __init__(self):
        super().__init__()
        self.counted = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mean.dim:
            self.counted.append((args[0].numel(), result.numel()))
        return result


@pytest.mark.parametrize("layout", LAYOUTS)
def test_averages_take_the_steps_of_the_plan_for_their_strides(layout):
    for sizes in ((3, 4, 5), (5, 2, 9), (2, 3, 2, 4)):
        x = LAYOUTS[layout](draw(2, *sizes, 6))
        with Means() as means:
            ta.mode_averages(x, order=len(sizes))
        plan = ta.plan(sizes, dim=6, batch=(2,), dtype="float64", layout=x.stride())
        assert means.counted == [(step.read, step.written) for step in plan.steps]


def test_layouts_by_name_are_those_of_their_strides():
    x = torch.empty(2, 3, 4, 5, 6)
    assert ta.plan((3, 4, 5), dim=6, batch=(2,), layout=x.stride()) is ta.plan((3, 4, 5), dim=6, batch=(2,))
    strides = np.array(x.movedim(1, -1).stride())
    first = ta.plan((4, 5, 6), dim=3, batch=(2,), layout="channels_first")
    assert ta.plan((4, 5, 6), dim=3, batch=(2,), layout=strides) is first


@pytest.mark.parametrize("layout", ["channels_last", "channels_first"])
def test_big_tensors_are_read_little_more_than_twice(layout):
    rng = random.Random(layout)
    shapes = [((16, 56, 56), 96, (2,)), ((64, 64, 64), 64, ()), ((24,) * 4, 16, ()), ((8,) * 6, 4, (2, 4))]
    while len(shapes) < 60:
        sizes = tuple(rng.randint(8, 64) for _ in range(rng.randint(2, 5)))
        dim, batch = rng.choice([1, 3, 16, 64]), rng.choice([(), (2,), (2, 4)])
        if 1e5 < math.prod(sizes) * dim * math.prod(batch) < 1e9:
            shapes.append((sizes, dim, batch))
    for sizes, dim, batch in shapes:
        plan = ta.plan(sizes, dim=dim, batch=batch, layout=layout)
        assert plan.elements == math.prod((*sizes, *batch, dim))
        assert plan.read <= 2.6 * plan.elements, str(plan)
        assert plan.read + plan.written == pytest.approx(plan.passes * plan.elements)


def test_sharing_saves_reads():
    plan = ta.plan((24, 24, 24, 24), dim=16)
    alone = [ta.plan((24, 24, 24, 24), dim=16, kept=[(mode,)]) for mode in range(4)]
    assert plan.read < 0.55 * sum(single.read for single in alone)


@pytest.mark.parametrize("order", ORDERS)
def test_operations_are_those_that_opt_einsum_counts(order):
    plan = random_plan(order, 3 * order)
    shape = (*plan.batch, *plan.sizes, plan.dim)
    for step in plan.steps:
        inputs = step.equation.split("->")[0]
        extents = tuple(shape[ord(letter) - ord("a")] for letter in inputs)
        assert step.flops == opt_einsum.contract_path(step.equation, extents, shapes=True)[1].opt_cost
    assert plan.flops == sum(step.flops for step in plan.steps)


def test_the_default_family_is_the_mode_averages():
    for order in ORDERS:
        assert ta.plan((2,) * order).family == main_effects(order) == tuple((mode,) for mode in range(order))
    assert ta.plan((7,), dim=4).steps == ()  # order 1: the tensor is its own mode average


def test_plans_are_frozen_and_cached():
    arguments = {"dim": 4, "batch": (2,), "kept": [(0,), (1, 2)], "dtype": "float64", "layout": "channels_first"}
    plan = ta.plan((3, 4, 5), modes="t h w", **arguments)
    assert plan is ta.plan([3, 4, 5], modes=("t", "h", "w"), **arguments)
    assert plan is ta.plan(torch.Size([3, 4, 5]), modes="t h w", **{**arguments, "kept": (("t",), ("w", "h", "w"))})
    assert plan != ta.plan((3, 4, 5), modes="t h w", **{**arguments, "batch": (3,)})
    numbers = ta.plan(np.array([3, 4]), dim=np.int32(5), batch=[np.int64(2)], modes=np.int8(2))
    assert numbers is ta.plan((3, 4), dim=5, batch=(2,)) and "np." not in str(numbers)
    for name in ("sizes", "steps", "invented"):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(plan, name, ())
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.steps[0].read = 0
    for twin in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        assert twin is not plan
        assert (twin, hash(twin), str(twin)) == (plan, hash(plan), str(plan))


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_element_sizes_are_those_of_torch(dtype):
    assert ta.plan((4, 4), dtype=dtype).itemsize == getattr(torch, dtype).itemsize


TABLE = """\
plan for batch=(2,) t=3 h=4 w=5 D=2: 240 elements, 0.0 MB
  from    to    equation      read   written
  t h w   t h   aebcd->aebc    240        48
  t h w   w     aebcd->aed     240        20
  w       ()    aed->ae         20         4
total: 500 elements read and 72 written, 2.38 times one read of the tensor"""

EMPTY = """\
plan for batch=() 0=1234 D=1000: 1,234,000 elements, 4.9 MB
  from   to   equation   read   written
total: 0 elements read and 0 written, 0.00 times one read of the tensor"""


def test_the_printed_table():
    kept = [("t", "h"), ("w",), ()]
    plan = ta.plan((3, 4, 5), dim=2, batch=(2,), kept=kept, layout="channels_first", dtype="bfloat16", modes="t h w")
    assert str(plan) == TABLE
    assert str(ta.plan((1234,), dim=1000)) == EMPTY
    nothing = str(ta.plan((3, 4), dim=2, batch=(0,)))
    assert nothing.endswith("0 elements read and 0 written, 0.00 times one read of the tensor")


SUBSETS = "\n  Write [(0,), (1, 2)] for the modes 0, 1 and 2, the last two together."
TYPES = "float64, float32, bfloat16, float16"
LAYOUT = "layout must be 'channels_last', 'channels_first' or strides, got"
REFUSED = [
    ({"dtype": "int8"}, OptionError, f"dtype must be one of {TYPES}, got 'int8'."),
    (
        {"dtype": torch.float32},
        OptionError,
        f"dtype must be one of {TYPES}, got torch.float32.\n  Write the name of the type, such as 'float32'.",
    ),
    ({"layout": "NHWC"}, OptionError, f"{LAYOUT} 'NHWC'."),
    ({"layout": None}, OptionError, f"{LAYOUT} None."),
    ({"layout": (4, 1)}, OptionError, "layout has 2 strides, but the tensor has 3 dimensions."),
    ({"layout": (4.0, 1, 1)}, OptionError, "the strides in layout must be integers, got (4.0, 1, 1)."),
    ({"layout": (4, -1, 1)}, OptionError, "the strides in layout must not be negative, got (4, -1, 1)."),
    ({"sizes": (3, 4.0)}, OptionError, "sizes must be integers, got (3, 4.0)."),
    ({"sizes": (3, True)}, OptionError, "sizes must be integers, got (3, True)."),
    ({"sizes": 3}, OptionError, "sizes must be integers, got 3."),
    ({"sizes": ()}, OptionError, "the number of sizes must be at least 1, got 0."),
    ({"sizes": (3, 0)}, OptionError, "mode 1 has size 0 in sizes, but every mode needs at least 1 index."),
    (
        {"sizes": (-3, 2), "modes": "h w"},
        OptionError,
        "mode 'h' has size -3 in sizes, but every mode needs at least 1 index.",
    ),
    ({"dim": -1}, OptionError, "dim and batch must not be negative, got -1 and ()."),
    ({"batch": (2, -2)}, OptionError, "dim and batch must not be negative, got 1 and (2, -2)."),
    ({"modes": "t h w"}, OptionError, "modes names 3 modes, but sizes has 2."),
    ({"modes": 3}, OptionError, "modes names 3 modes, but sizes has 2."),
    ({"modes": "h h"}, ModesError, "mode names must differ, but 'h' appears 2 times in 'h h'."),
    ({"kept": [(0,), (2,)]}, ModesError, "there is no mode 2 among '0 1' (order 2)."),
    ({"kept": [("c",)], "modes": "h w"}, ModesError, "there is no mode 'c' among 'h w' (order 2)."),
    ({"kept": 1}, ModesError, f"kept must hold subsets of modes, got 1.{SUBSETS}"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "kind", "rule"), REFUSED, ids=lambda value: str(value)[:30])
def test_messages(given, kind, rule):
    refused(kind, f"plan: {rule}", functools.partial(ta.plan, **{"sizes": (3, 4), **given}))
