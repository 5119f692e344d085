"""The rotary embedding: values by their definition, circles, coordinates, types, tools of torch."""

from __future__ import annotations

import cmath
import copy
import functools
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from modules import MISSING, draw, reading, refused
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim

import tensorattn as ta
from tensorattn.errors import DtypeError, ModesError, OptionError, ShapeError
from tensorattn.testing.strategies import mode_sizes

CLOSE = {"rtol": 1e-12, "atol": 1e-12}
NEAR = {"rtol": 1e-9, "atol": 1e-10}


@given(mode_sizes(max_order=8, max_size=4), st.integers(0, 7), st.data())
def test_is_what_a_loop_says(sizes, extra, data):
    """At every position, neighbouring channels are a complex number, times exp(i angle)."""
    order = len(sizes)
    dim = 2 * order + extra
    circles = data.draw(st.sets(st.integers(0, order - 1)))
    rotary = ta.RotaryEmbedding(dim, modes=order, periodic=tuple(circles), base=50.0)
    x = draw(2, *sizes, dim)
    found, numbers = rotary(x).numpy(), x.numpy()
    for position in np.ndindex(*sizes):
        turns = []
        for mode, index in enumerate(position):
            count = dim // 2 // order + (mode < dim // 2 % order)
            for k in range(count):
                turn = 2 * cmath.pi * index / sizes[mode] * (k + 1) if mode in circles else index * 50.0 ** (-k / count)
                turns.append(cmath.exp(1j * turn))
        for sample in range(2):
            vector = numbers[(sample, *position)]
            pairs = (vector[0 : 2 * len(turns) : 2] + 1j * vector[1 : 2 * len(turns) : 2]) * turns
            expected = np.stack([pairs.real, pairs.imag], -1).ravel()
            expected = np.concatenate([expected, vector[2 * len(turns) :]])
            np.testing.assert_allclose(found[(sample, *position)], expected, rtol=0, atol=1e-12)


def test_the_first_position_stays():
    x = draw(2, 3, 4, 5, 9)
    torch.testing.assert_close(ta.RotaryEmbedding(9, modes=3)(x)[:, 0, 0, 0], x[:, 0, 0, 0], rtol=0, atol=0)


def test_turning_a_mode_alone():
    rotary = ta.RotaryEmbedding(15, modes="t h w", periodic={"h": 360.0}, spacing={"w": 0.5})
    x, height = draw(2, 3, 4, 5, 15), 90 * draw(4)
    turned = x
    for mode, name in enumerate("thw"):
        fibres = turned.movedim(1 + mode, -2)
        places = height if name == "h" else None
        turned = rotary.rotate_mode(fibres, name, coordinates=places).movedim(-2, 1 + mode)
        torch.testing.assert_close(
            rotary.rotate_mode(fibres, mode - 3, coordinates=places), turned.movedim(1 + mode, -2), **CLOSE
        )
    torch.testing.assert_close(rotary(x, coordinates={"h": height}), turned, **CLOSE)


def test_a_circle_closes():
    rotary = ta.RotaryEmbedding(8, modes="lon", periodic={"lon": 360.0})
    x, degrees = draw(2, 6, 8), 60.0 * torch.arange(6, dtype=torch.float64)
    for shift in (0, 360, -720):
        torch.testing.assert_close(rotary(x, coordinates=[degrees + shift]), rotary(x), rtol=0, atol=1e-10)
    logits = (rotary(x[:, :1].expand_as(x)) * rotary(x[:, :1].expand_as(x)).roll(1, 1)).sum(-1)
    torch.testing.assert_close(logits, logits[:, :1].expand_as(logits), **CLOSE)  # the step over the seam is one as any


def test_samples_and_heads_may_lie_elsewhere():
    rotary = ta.RotaryEmbedding(8, modes=2)
    x, places = draw(2, 3, 4, 5, 8), draw(2, 1, 4)
    found = rotary(x, coordinates=[places, None])
    for sample in range(2):
        torch.testing.assert_close(found[sample], rotary(x[sample], coordinates=[places[sample, 0], None]), **CLOSE)
    assert rotary(x[:0]).shape == (0, 3, 4, 5, 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_types(dtype):
    rotary, x = ta.RotaryEmbedding(8, modes=2), draw(2, 300, 4, 8, dtype=dtype)
    y = rotary(x)
    assert y.dtype == dtype
    assert (y.double() - rotary(x.double())).abs().max() <= 4 * torch.finfo(dtype).eps * y.double().abs().max() + 1e-4
    double = rotary(x, coordinates=[torch.arange(300), None])
    assert double.dtype == dtype
    meta = rotary(x.to("meta"), coordinates=[torch.ones(300), None])
    assert (meta.shape, meta.dtype, meta.device.type) == (x.shape, dtype, "meta")


def test_operators_it_has_a_meaning_for():
    """Those that see the keys of all positions, and those that pool; at order 1 there is nothing to average over."""
    suits = {}
    for order in (1, 2, 3):
        rotary = ta.RotaryEmbedding(2 * order, modes=order)
        suits[order] = set()
        for name in ta.OPERATORS:
            try:
                rotary.check_operator(name)
                suits[order].add(name)
            except ta.OptionError:
                pass
    always = {"flattened", "clustered", "axial", "kronecker_product", "kronecker_sum"}
    # By default `truncated` keeps two modes, which are all there are at order 2: it is full attention.
    assert suits == {1: set(ta.OPERATORS), 2: {*always, "truncated"}, 3: always}


def test_averages_of_turned_keys_fade():
    """Of equal keys, turned and averaged, the share of the mode that is kept stays as long; the others get shorter."""
    rotary = ta.RotaryEmbedding(16, modes=2, periodic=1)
    means = ta.mode_averages(rotary(torch.ones(8, 9, 16).double()), order=2)
    for mode, mean in enumerate(means):
        own, other = mean.unflatten(-1, (2, 4, 2)).norm(dim=-1)[:, [mode, 1 - mode]].unbind(1)
        torch.testing.assert_close(own, torch.full_like(own, 2**0.5), **CLOSE)
        assert (other[:, 0] < 0.5).all() and other[0, 0] < other[0, -1] + 1e-9


def test_gradients():
    rotary = ta.RotaryEmbedding(5, modes="h lon", periodic={"lon": 2.0})
    x, places = draw(2, 2, 3, 5).requires_grad_(), draw(3).requires_grad_()
    run = lambda x, places: rotary(x, coordinates={"lon": places})  # noqa: E731
    assert torch.autograd.gradcheck(run, (x, places), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (x, places), fast_mode=True)


def test_copies_and_what_it_shows():
    rotary = ta.RotaryEmbedding(12, modes="t lon", periodic=("lon",), spacing={"t": 6}, base=10_000.0)
    assert repr(rotary) == (
        "RotaryEmbedding(head_dim=12, modes='t lon', periodic=('lon',), spacing={'t': 6.0}, base=10000.0)"
    )
    assert repr(ta.RotaryEmbedding(12, modes=2)) == "RotaryEmbedding(head_dim=12, modes=2)"
    assert rotary.state_dict() == {}
    x = draw(2, 3, 4, 12)
    for twin in (copy.deepcopy(rotary), pickle.loads(pickle.dumps(rotary))):
        assert repr(twin) == repr(rotary)
        assert torch.equal(twin(x), rotary(x))


@pytest.mark.thorough
def test_one_graph_for_all_sizes():
    torch._dynamo.reset()
    rotary = ta.RotaryEmbedding(9, modes="t lon", periodic=("lon",))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(rotary, backend=counter, fullgraph=True, dynamic=True)
    counts = []
    for sizes in ((2, 3, 5), (3, 6, 4), (5, 9, 11)):
        x = draw(*sizes, 9)
        torch.testing.assert_close(compiled(x), rotary(x), **CLOSE)
        counts.append(counter.frame_count)
    assert 1 <= counts[0] <= 2  # a graph with floats made of sizes is handed to the backend twice
    assert counts[-1] == counts[0]
    torch._dynamo.reset()


@pytest.mark.thorough
def test_export():
    rotary = ta.RotaryEmbedding(12, modes=3)
    dims = ({place: Dim.DYNAMIC for place in range(4)},)
    program = torch.export.export(rotary, (draw(2, 3, 5, 7, 12, dtype=torch.float32),), dynamic_shapes=dims)
    for sizes in ((3, 7, 4, 6), (1, 2, 9, 3)):
        x = draw(*sizes, 12, dtype=torch.float32)
        torch.testing.assert_close(program.module()(x), rotary(x), rtol=1e-5, atol=1e-6)


def shares(sizes, pairs, seed=0):
    """An additive tensor in which the share of every mode depends on that mode alone."""
    parts = []
    for mode, (size, count) in enumerate(zip(sizes, pairs, strict=True)):
        beside = [size if k == mode else 1 for k in range(len(sizes))]
        parts.append(draw(size, 2 * count, seed=seed + mode).reshape(*beside, 2 * count).expand(*sizes, 2 * count))
    return torch.cat(parts, -1)


@given(mode_sizes(max_order=4), st.integers(0, 3), st.integers(0, 10**6), st.data())
def test_logits_depend_on_differences(sizes, extra, seed, data):
    """Moving all queries and keys along every mode alike changes no logit, and turning keeps lengths."""
    order, dim = len(sizes), 2 * len(sizes) + extra
    circles = data.draw(st.sets(st.integers(0, order - 1)))
    rotary = ta.RotaryEmbedding(dim, modes=order, periodic=dict.fromkeys(circles, 5.0))
    q, k = (draw(*sizes, dim, seed=seed + stream) for stream in (0, 1))
    places = [3 * draw(size, seed=seed + 10 + mode) for mode, size in enumerate(sizes)]

    def logits(coordinates):
        turned = (rotary(t, coordinates=coordinates).flatten(0, -2) for t in (q, k))
        return torch.einsum("id,jd->ij", *turned)

    moved = [place + 1.75 * (mode + 1) for mode, place in enumerate(places)]
    torch.testing.assert_close(logits(moved), logits(places), **NEAR)
    torch.testing.assert_close(rotary(q, coordinates=places).norm(dim=-1), q.norm(dim=-1), **NEAR)


@given(mode_sizes(max_order=4, max_positions=36), st.integers(0, 10**6))
def test_keys_in_shares_stay_additive_and_pooled_ones_turn_by_their_own_mode(sizes, seed):
    """Keys whose share of mode m depends on mode m alone: turned, attention to additive values is exact.

    For any values, the product of one matrix a mode is full attention of turned queries and keys.
    """
    order, dim = len(sizes), 4 * len(sizes)
    rotary = ta.RotaryEmbedding(dim, modes=order)
    query, key = (shares(sizes, rotary.pairs, seed=seed + stream) for stream in (0, 10))
    value = ta.outer_sum([draw(size, 2, seed=seed + 20 + mode) for mode, size in enumerate(sizes)])
    turned = rotary(draw(*sizes, dim, seed=seed + 30)), rotary(key)
    ours, full = (operator(*turned, value, order=order) for operator in (ta.additive_attention, ta.flattened_attention))
    torch.testing.assert_close(ours, full, **NEAR)
    value = draw(*sizes, 3, seed=seed + 31)
    full, output = ta.flattened_attention(rotary(query), rotary(key), value, order=order), value
    for mode in range(order):
        q, k = (rotary.rotate_mode(ta.mode_averages(t, order=order)[mode], mode) for t in (query, key))
        output = torch.tensordot((q @ k.mT / dim**0.5).softmax(-1), output, dims=([1], [mode])).movedim(0, mode)
    torch.testing.assert_close(output, full, **NEAR)
    before = ta.kronecker_product_attention(rotary(query), rotary(key), value, order=order)
    torch.testing.assert_close(before, full, **NEAR)


def test_other_additive_keys_lose_exactness():
    """What `RotaryEmbedding` says of operators that average keys: additive is not enough once they are turned."""
    key, value = (ta.outer_sum([draw(n, dim, seed=seed + n) for n in (3, 4)]) for dim, seed in ((8, 0), (2, 10)))
    query, rotary, errors = draw(3, 4, 8), ta.RotaryEmbedding(8, modes=2), []
    for turn in (lambda t: t, rotary):
        ours, full = (
            operator(turn(query), turn(key), value, order=2)
            for operator in (ta.additive_attention, ta.flattened_attention)
        )
        errors.append(float((ours - full).norm() / (full - value.mean((0, 1))).norm()))
    assert errors[0] < 1e-12
    assert errors[1] > 0.1


@pytest.mark.parametrize("mode", [0, 1])
def test_along_a_fibre_only_its_own_mode_turns(mode):
    """Axial attention of turned queries and keys is that of ones whose other shares are left as they are."""
    q, k, v = draw(3, 3, 4, 8)
    rotary = ta.RotaryEmbedding(8, modes=2)
    whole = ta.axial_attention(rotary(q), rotary(k), v, order=2, return_attention=True).attention[mode]
    q, k = (rotary.rotate_mode(t.movedim(mode, -2), mode) for t in (q, k))
    torch.testing.assert_close(whole, (q @ k.mT / 8**0.5).softmax(-1).movedim(-2, mode), **NEAR)


# Messages.


def test_what_it_is_made_of():
    make = ta.RotaryEmbedding
    refused(ModesError, MISSING.format("RotaryEmbedding"), make, 8)
    told = "RotaryEmbedding: head_dim must be at least 6, two channels a mode, got 5."
    refused(OptionError, told, make, 5, modes="t h w")
    told = "RotaryEmbedding: there is no mode 'lon' among 'h w' (order 2)."
    refused(ModesError, told, make, 8, modes="h w", periodic="lon")
    told = "RotaryEmbedding: spacing of mode 'h' must be a positive finite number, got 0."
    refused(OptionError, told, make, 8, modes="h w", spacing=0)
    told = "RotaryEmbedding: base must be a finite number greater than 1, got 1.0."
    refused(OptionError, told, make, 8, modes="h w", base=1.0)


def test_coordinates_are_checked():
    rotary, x = ta.RotaryEmbedding(8, modes="h w", periodic="w"), torch.ones(2, 30, 40, 8)
    shown = reading(2, 30, 40, 8, argument="tensor")
    told = f"RotaryEmbedding: coordinates of mode 'h' have length 3, but the mode has size 30.{shown}"
    refused(ShapeError, told, rotary, x, coordinates={"h": torch.ones(3)})
    hint = "\n  Give it in the unit of the coordinates, such as periodic={'w': 360.0}."
    told = f"RotaryEmbedding: coordinates of periodic mode 'w' need its period.{shown}{hint}"
    refused(OptionError, told, rotary, x, coordinates={"w": torch.ones(40)})


def test_turned_tensors():
    rotary, shown = ta.RotaryEmbedding(8, modes="h w"), functools.partial(reading, argument="tensor")
    cases = [
        (torch.ones(2, 30, 40, 9), ShapeError, f"tensor has 9 channels, but head_dim is 8.{shown(2, 30, 40, 9)}"),
        (
            torch.ones(200, 8),
            ShapeError,
            "tensor has 2 dimensions, but order 2 needs at least 3.\n  modes    h w\n  tensor   (200, 8)\n"
            "  The layout is (*batch, n_1, ..., n_N, D).",
        ),
        (
            torch.ones(30, 40, 8, dtype=torch.int64),
            DtypeError,
            f"tensor must be floating point, got torch.int64.{shown(30, 40, 8)}",
        ),
        (
            torch.ones(30, 0, 8),
            ShapeError,
            f"mode 'w' has size 0 in tensor, but every mode needs at least 1 index.{shown(30, 0, 8)}",
        ),
        (None, DtypeError, "tensor must be a torch.Tensor, got NoneType."),
    ]
    for tensor, error, told in cases:
        refused(error, f"RotaryEmbedding: {told}", rotary, tensor)


def test_turned_modes():
    rotary = ta.RotaryEmbedding(8, modes="h w", periodic="h")
    cases = [
        (torch.ones(30, 8), "z", None, ModesError, "there is no mode 'z' among 'h w' (order 2)."),
        (torch.ones(30, 9), "w", None, ShapeError, "tensor has 9 channels, but head_dim is 8."),
        (
            torch.ones(30, 8),
            "w",
            torch.ones(3),
            ShapeError,
            "coordinates of mode 'w' have length 3, but the mode has size 30.",
        ),
        (
            torch.ones(30, 8),
            "h",
            torch.ones(30),
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
        refused(OptionError, f"RotaryEmbedding.check_operator: {told}", rotary.check_operator, operator, **options)
    told = "RotaryEmbedding.check_operator: operator 'axial' has no option 'pool'; its options are: none."
    refused(OptionError, told, rotary.check_operator, "axial", pool="mean")
