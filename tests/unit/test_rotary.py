"""The rotary embedding: values by their definition, circles, coordinates, types, tools of torch."""

from __future__ import annotations

import cmath
import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim

import tensorattn as ta
from tensorattn.testing.strategies import mode_sizes

CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


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
    always = {"flattened", "axial", "kronecker_product", "kronecker_sum"}
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
    assert torch.autograd.gradcheck(run, (x, places))
    assert torch.autograd.gradgradcheck(run, (x, places))


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


def test_export():
    rotary = ta.RotaryEmbedding(12, modes=3)
    dims = ({place: Dim.DYNAMIC for place in range(4)},)
    program = torch.export.export(rotary, (draw(2, 3, 5, 7, 12, dtype=torch.float32),), dynamic_shapes=dims)
    for sizes in ((3, 7, 4, 6), (1, 2, 9, 3)):
        x = draw(*sizes, 12, dtype=torch.float32)
        torch.testing.assert_close(program.module()(x), rotary(x), rtol=1e-5, atol=1e-6)
