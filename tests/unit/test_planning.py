"""Plans: every step a valid contraction, every family covered, few reads, and results as from scratch."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import pickle
import random

import numpy as np
import opt_einsum
import pytest
import torch
from numpy.testing import assert_allclose

import tensorattn as ta
from tensorattn import contraction
from tensorattn.contraction_tree import main_effects, primitive_for
from tensorattn.execution import memory_order
from tensorattn.planning import ITEM_SIZES, make_plan, order_of_strides

ORDERS = range(1, 9)
LAYOUTS = ("channels_last", "channels_first")
LARGEST = {1: 9, 2: 7, 3: 5, 4: 4, 5: 4, 6: 3, 7: 3, 8: 2}  # sizes drawn for each order: a few thousand elements


def subsets(order):
    modes = range(order)
    return [kept for size in range(order + 1) for kept in itertools.combinations(modes, size)]


def random_plan(order, seed):
    """Sizes, batch, channels, memory order and family drawn at random."""
    rng = random.Random(f"{order} {seed}")
    sizes = tuple(rng.randint(1, LARGEST[order]) for _ in range(order))
    batch = tuple(rng.randint(1, 3) for _ in range(rng.randint(0, 2)))
    permutation = list(range(len(batch) + order + 1))
    if seed % 2:
        rng.shuffle(permutation)
    family = tuple(rng.sample(subsets(order), rng.randint(1, min(2**order, 6))))
    return make_plan(batch, sizes, rng.randint(1, 4), tuple(permutation), rng.choice([2, 4, 8]), family)


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
        lost = [letter[len(plan.batch) + mode] for mode in step.reduced]
        run = [place for place, c in enumerate(c for c in inputs if c in lost or extent[c] > 1) if c in lost]
        rules = {
            "reads what was not made": step.source in made,
            "makes nothing new": step.target not in made,
            "keeps the wrong modes": step.reduced and sorted((*step.target, *step.reduced)) == list(step.source),
            "is not the contraction it says": (inputs, output) == (node(step.source), node(step.target)),
            "loses other letters": sorted(set(inputs) - set(output)) == sorted(lost),
            "reduces modes apart in memory": run == list(range(run[0], run[0] + len(lost))) if run else False,
            "miscounts reads": step.read == math.prod(extent[c] for c in inputs),
            "miscounts writes": step.written == math.prod(extent[c] for c in output),
            "has no primitive": step.primitive in ("view", "mv", "matmul", "sum"),
        }
        wrong.extend(f"{step.equation} {rule}" for rule, kept in rules.items() if not kept)
        made.add(step.target)
        used.add(step.source)
    wrong.extend(f"{kept} is never made" for kept in plan.family if kept not in made)
    idle = made - used - set(plan.family) - {root}
    return [*wrong, *(f"{kept} is made for nothing" for kept in idle)]


def from_scratch(array, plan, weights=None):
    """Each marginal mean by one contraction of the whole array with normalised weights."""
    first = len(plan.batch)
    operands = [array, list(range(array.ndim))]
    results = []
    for kept in plan.family:
        factors = []
        for mode in set(range(len(plan.sizes))) - set(kept):
            vector = np.ones(plan.sizes[mode]) if weights is None else weights[mode]
            factors += [vector / vector.sum(), [first + mode]]
        out = [d for d in range(array.ndim) if not first <= d < first + len(plan.sizes) or d - first in kept]
        results.append(np.einsum(*operands, *factors, out))
    return results


@pytest.mark.parametrize("order", ORDERS)
def test_every_step_is_a_contraction_and_every_mean_is_made(order):
    for seed in range(20):
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


@pytest.mark.parametrize("order", ORDERS)
def test_the_default_family_is_the_mode_averages(order):
    assert ta.plan((2,) * order).family == main_effects(order) == tuple((mode,) for mode in range(order))


@pytest.mark.parametrize("layout", LAYOUTS)
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


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("order", ORDERS)
def test_numpy_execution(order, layout):
    rng = np.random.default_rng(order)
    sizes = [LARGEST[order]] * order
    sizes[order // 2] = 1 if order > 1 else 5
    plan = ta.plan(sizes, dim=2, batch=(3,), kept=[*main_effects(order), ()], layout=layout)
    array = rng.standard_normal((3, *sizes, 2))
    weights = [rng.uniform(0.1, 2, size) for size in sizes]
    for given in (None, weights):
        results = plan.execute(array, given)
        assert [r.shape for r in results] == [(3, *(sizes[m] for m in kept), 2) for kept in plan.family]
        for result, kept, expected in zip(results, plan.family, from_scratch(array, plan, given), strict=True):
            assert_allclose(result, expected, rtol=1e-11, atol=1e-13)
            average = array
            for mode in reversed([m for m in range(order) if m not in kept]):
                average = np.average(average, axis=1 + mode, weights=None if given is None else given[mode])
            assert_allclose(result, average, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("order", ORDERS)
def test_numpy_execution_of_random_plans(order):
    for seed in range(8):
        plan = random_plan(order, seed)
        rng = np.random.default_rng(seed)
        array = rng.standard_normal((*plan.batch, *plan.sizes, plan.dim))
        weights = [rng.uniform(0.1, 2, size) for size in plan.sizes]
        for given in (None, weights):
            results = plan.execute(array, given)
            for result, expected in zip(results, from_scratch(array, plan, given), strict=True):
                assert_allclose(result, expected, rtol=1e-11, atol=1e-13)


def test_execution_leaves_its_arguments_alone():
    array, weights = np.arange(24.0).reshape(2, 3, 4), [np.array([1.0, 2]), np.array([1.0, 0, 3])]
    before = copy.deepcopy((array, weights))
    ta.plan((2, 3), dim=4, kept=[(0,), (0, 1)]).execute(array, weights)
    assert_allclose(array, before[0])
    for vector, kept in zip(weights, before[1], strict=True):
        assert_allclose(vector, kept)


def test_execution_on_torch_tensors():
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = [torch.tensor([1.0, 2, 0], dtype=torch.float64), torch.tensor([1.0, 1, 3, 2], dtype=torch.float64)]
    plan = ta.plan((3, 4), dim=5, batch=(2,), dtype="float64")
    for given in (None, weights):
        pairs = zip(plan.execute(x, given), ta.mode_averages(x, order=2, weights=given), strict=True)
        for ours, theirs in pairs:
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_execution_on_jax_arrays():
    numpy = pytest.importorskip("jax.numpy")
    array = np.random.default_rng(0).standard_normal((2, 3, 4, 5)).astype(np.float32)
    weights = [np.arange(1.0, 4, dtype=np.float32), np.arange(1.0, 5, dtype=np.float32)]
    plan = ta.plan((3, 4), dim=5, batch=(2,))
    for given in (None, weights):
        results = plan.execute(numpy.asarray(array), None if given is None else [numpy.asarray(w) for w in given])
        for result, expected in zip(results, from_scratch(array, plan, given), strict=True):
            assert type(result) is type(numpy.asarray(array))
            assert_allclose(np.asarray(result), expected, rtol=1e-5, atol=1e-6)


LIBRARIES = {
    "numpy": lambda array: array,
    "torch": lambda array: torch.from_numpy(np.asarray(array)),
    "jax": lambda array: pytest.importorskip("jax.numpy").asarray(array),
}
every_library = pytest.mark.parametrize("library", LIBRARIES)


@every_library
def test_half_precision_is_accumulated_in_single(library):
    array = np.full((64, 64, 2), 60000, dtype=np.float16)
    array[:, 7] = 0.5
    plan = ta.plan((64, 64), dim=2, dtype="float16", kept=[(0,), (1,), ()])
    given = LIBRARIES[library](array)
    for weights in (None, [None, [1.0] * 64]):
        results = plan.execute(given, weights)
        for result, expected in zip(results, from_scratch(array.astype(np.float64), plan), strict=True):
            assert type(result) is type(given) and result.dtype == given.dtype
            assert_allclose(np.asarray(result).astype(np.float64), expected, rtol=2**-11)


def test_bfloat16_is_accumulated_in_single():
    x = torch.full((300, 300, 1), 1.0, dtype=torch.bfloat16)
    x[5] = 257
    plan = ta.plan((300, 300), dtype="bfloat16")
    for ours, theirs in zip(plan.execute(x), ta.mode_averages(x, order=2), strict=True):
        assert ours.dtype == torch.bfloat16
        assert torch.equal(ours, theirs)


@every_library
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_weights_of_every_kind(library, dtype):
    """Lists, None, batch dimensions, integers and truth values weigh as they do in mode averages."""
    if library == "jax" and dtype == "float64":
        pytest.skip("JAX has no float64 by default")
    convert = LIBRARIES[library]
    array = np.random.default_rng(0).standard_normal((2, 3, 4, 5, 6)).astype(dtype)
    tensor, plan = torch.from_numpy(array), ta.plan((4, 5), dim=6, batch=(2, 3), kept=[(0,), (1,)])
    draw = np.random.default_rng(1).uniform(0, 3, (2, 3, 4))
    given = [
        [None, None],
        [None, [1, 0, 2, 0, 1]],
        [draw.astype(np.float32), None],
        [draw[:, :1].astype(np.float32), np.array([True, False, True, True, False])],
        (draw[0].astype(np.float32), np.arange(5)),
        [draw[0, 0].tolist(), draw[:, :, [0]].repeat(5, -1).astype(np.float32)],
    ]
    for weights in given:
        own = [convert(vector) if isinstance(vector, np.ndarray) else vector for vector in weights]
        of_torch = [torch.from_numpy(vector) if isinstance(vector, np.ndarray) else vector for vector in weights]
        expected = ta.mode_averages(tensor, order=2, weights=of_torch)
        for mixed in (own, weights):
            for ours, theirs in zip(plan.execute(convert(array), mixed), expected, strict=True):
                tolerance = {"float16": 2e-3, "float32": 1e-5, "float64": 1e-11}[dtype]
                assert type(ours) is type(convert(array)) and str(ours.dtype).endswith(dtype)
                assert_allclose(np.asarray(ours), theirs.numpy(), rtol=tolerance, atol=tolerance)


def test_a_sample_of_no_weight_has_means_of_zero():
    array = np.ones((2, 3, 4, 5))
    weights = [np.array([[1.0, 2, 3], [0, 0, 0]]), None]
    rows, columns = ta.plan((3, 4), dim=5, batch=(2,)).execute(array, weights)
    assert_allclose(columns, ta.mode_averages(torch.from_numpy(array), order=2, weights=weights)[1])
    assert_allclose(rows[1], 1)
    assert_allclose(columns[1], 0)


def test_gradients_reach_the_weights_of_a_plan():
    x, w = torch.randn(3, 4, 2, dtype=torch.float64), torch.rand(3, dtype=torch.float64, requires_grad=True)
    plan = ta.plan((3, 4), dim=2, dtype="float64")
    assert torch.autograd.gradcheck(lambda w: plan.execute(x, [w, None]), (w,))


LAID_OUT = {
    "as it is": lambda x: x,
    "permuted": lambda x: x.permute(0, 3, 1, 2, 4),
    "channels first": lambda x: x.movedim(1, -1),
    "batch inside": lambda x: x.movedim(0, -1),
    "reversed": lambda x: x.permute(4, 3, 2, 1, 0),
    "expanded": lambda x: x[:, :1].expand(-1, 7, -1, -1, -1),
    "sliced": lambda x: x[:, ::2, 1:],
    "of size one": lambda x: x[:, :, :1].transpose(2, 3),
}


@pytest.mark.parametrize("case", LAID_OUT)
def test_strides_give_the_plan_that_averages_use(case, monkeypatch):
    x, used = LAID_OUT[case](torch.randn(2, 3, 4, 5, 6)), []

    def recorded(*arguments):
        used.append(make_plan(*arguments))
        return used[-1]

    monkeypatch.setattr(contraction, "make_plan", recorded)
    ta.mode_averages(x, order=3)
    batch, *sizes, dim = x.shape
    assert used[0] == ta.plan(sizes, dim=dim, batch=(batch,), layout=x.stride())
    assert order_of_strides(x.stride()) == memory_order(x)
    plan = ta.plan(sizes, dim=dim, batch=(batch,), layout=np.array(x.stride()))
    for ours, theirs in zip(plan.execute(x), ta.mode_averages(x, order=3), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_layouts_by_name_are_those_of_their_strides():
    x = torch.empty(2, 3, 4, 5, 6)
    assert ta.plan((3, 4, 5), dim=6, batch=(2,), layout=x.stride()) is ta.plan((3, 4, 5), dim=6, batch=(2,))
    strides = x.movedim(1, -1).stride()
    first = ta.plan((4, 5, 6), dim=3, batch=(2,), layout="channels_first")
    assert ta.plan((4, 5, 6), dim=3, batch=(2,), layout=strides) is first


def test_integers_of_numpy_are_integers():
    sizes = np.array([3, 4])
    plan = ta.plan(sizes, dim=np.int32(5), batch=[np.int64(2)], modes=np.int8(2))
    assert plan is ta.plan((3, 4), dim=5, batch=(2,)) and "np." not in str(plan)


@pytest.mark.parametrize("order", ORDERS)
def test_operations_are_those_that_opt_einsum_counts(order):
    plan = random_plan(order, 3 * order)
    shape = (*plan.batch, *plan.sizes, plan.dim)
    for step in plan.steps:
        inputs = step.equation.split("->")[0]
        extents = tuple(shape[ord(letter) - ord("a")] for letter in inputs)
        assert step.flops == opt_einsum.contract_path(step.equation, extents, shapes=True)[1].opt_cost
    assert plan.flops == sum(step.flops for step in plan.steps if step.primitive != "view")


def test_sizes_of_one_cost_nothing():
    plan = ta.plan((1, 6, 1), dim=4)
    assert [step.primitive for step in plan.steps if step.read == step.written] != []
    assert all(step.primitive == "view" for step in plan.steps if step.read == step.written)
    assert ta.plan((1, 1, 1), dim=4).read == 0
    assert ta.plan((7,), dim=4).steps == ()  # order 1: the tensor is its own mode average


def test_plans_are_frozen_and_cached():
    arguments = {"dim": 4, "batch": (2,), "kept": [(0,), (1, 2)], "dtype": "float64", "layout": "channels_first"}
    plan = ta.plan((3, 4, 5), modes="t h w", **arguments)
    assert plan is ta.plan([3, 4, 5], modes=("t", "h", "w"), **arguments)
    assert plan is ta.plan(torch.Size([3, 4, 5]), modes="t h w", **{**arguments, "kept": (("t",), ("w", "h", "w"))})
    assert plan != ta.plan((3, 4, 5), modes="t h w", **{**arguments, "batch": (3,)})
    for name in ("sizes", "steps", "invented"):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(plan, name, ())
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.steps[0].read = 0
    for twin in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        assert twin is not plan
        assert (twin, hash(twin), str(twin)) == (plan, hash(plan), str(plan))


@pytest.mark.parametrize("dtype", ITEM_SIZES)
def test_element_sizes_are_those_of_torch(dtype):
    assert ta.plan((4, 4), dtype=dtype).itemsize == getattr(torch, dtype).itemsize


@pytest.mark.parametrize(
    ("extents", "primitive"),
    [
        ((8, 1, 9), "view"),
        ((1, 1, 1), "view"),
        ((8, 9, 1), "sum"),
        ((8, 4096, 1), "mv"),
        ((7, 4096, 1), "sum"),
        ((1, 9, 4096), "mv"),
        ((8, 9, 512), "matmul"),
        ((8, 9, 511), "sum"),
        ((8, 9, 455), "sum"),  # little to read
        ((8, 256, 128), "matmul"),  # 16 rows at a time
        ((8, 255, 128), "sum"),
        ((8, 512, 63), "sum"),
        ((8, 1056, 63), "matmul"),
    ],
)
def test_primitives(extents, primitive):
    assert primitive_for(*extents) == primitive


TABLE = """\
plan for batch=(2,) t=3 h=4 w=5 D=2: 240 elements, 0.0 MB
  from    to    equation      read   written   primitive
  t h w   t h   aebcd->aebc    240        48   sum
  t h     ()    aebc->ae        48         4   sum
  t h w   w     aebcd->aed     240        20   sum
total: 528 elements read and 72 written, 2.50 times one read of the tensor"""


def test_the_printed_table():
    kept = [("t", "h"), ("w",), ()]
    plan = ta.plan((3, 4, 5), dim=2, batch=(2,), kept=kept, layout="channels_first", dtype="bfloat16", modes="t h w")
    assert str(plan) == TABLE


def test_an_empty_plan_prints():
    assert str(ta.plan((1234,), dim=1000)) == (
        "plan for batch=() 0=1234 D=1000: 1,234,000 elements, 4.9 MB\n"
        "  from   to   equation   read   written   primitive\n"
        "total: 0 elements read and 0 written, 0.00 times one read of the tensor"
    )
