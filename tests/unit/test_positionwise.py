"""Functions of each position, slab by slab, against the same function of all positions at once."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import tensorattn as ta
from tensorattn import slabs
from tensorattn.positionwise import map_positions

CLOSE = {"rtol": 1e-10, "atol": 1e-12}

# torch scripts some decompositions the first time that it differentiates forward.
forward_mode = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def body(part, matrix, shift):
    return torch.tanh(part @ matrix) * shift


LAYOUTS = {
    "channels last": lambda x: x,
    "channels first": lambda x: x.movedim(-1, 1).contiguous().movedim(1, -1),
    "every second": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
    "expanded": lambda x: x[:, :1].expand(x.shape),
}


@pytest.fixture
def small(monkeypatch):
    """Slabs of a few positions."""
    monkeypatch.setattr(slabs, "POSITIONS", 10)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("skipped", ["nothing", "itself", "another"])
def test_values_and_derivatives(layout, skipped, small):
    x = LAYOUTS[layout](draw(2, 3, 4, 5, 6))
    other = draw(2, 3, 4, 5, 6, seed=1)
    leaves = [tensor.requires_grad_() for tensor in (x, other, draw(6, 6, seed=2), draw(6, seed=3))]
    skip = {"nothing": None, "itself": x, "another": other}[skipped]
    results = []
    for ours in (True, False):
        if ours:
            y = map_positions(body, x, leaves[2:], batch=1, skip=skip)
        else:
            y = body(x, *leaves[2:]) + (0 if skip is None else skip)
        kept = [leaf for leaf in leaves if leaf is not other or skip is other]
        loss = (y * y * draw(*y.shape, seed=4)).sum()
        first = torch.autograd.grad(loss, kept, retain_graph=True)
        again = torch.autograd.grad(loss, kept, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in again), kept)
        with torch.no_grad():
            out = torch.full_like(y, torch.nan)
            assert map_positions(body, x, leaves[2:], batch=1, skip=skip, out=out) is out
        results.append((y, out, *first, *again, *second))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, **CLOSE)


def test_the_result_lies_in_memory_as_the_input(small):
    x = LAYOUTS["channels first"](draw(2, 3, 4, 6))
    for grad in (False, True):
        y = map_positions(body, x.detach().requires_grad_(grad), (draw(6, 6), draw(6)), batch=1)
        assert y.stride() == x.stride()


def test_one_source_may_be_a_function_of_another(small):
    x, matrix = draw(3, 4, 6).requires_grad_(), draw(6, 6, seed=1)
    results = []
    for ours in (True, False):
        mean = x.mean((0, 1))
        y = map_positions(body, x, (matrix, mean), batch=0) if ours else body(x, matrix, mean)
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        results.append((first, *torch.autograd.grad(first.square().sum(), x)))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, **CLOSE)


@forward_mode
def test_transforms(small):
    xs, matrix, shift = draw(3, 2, 5, 4, 6), draw(6, 6, seed=1), draw(6, seed=2)
    results = []
    for ours in (True, False):

        def function(x, ours=ours):
            return map_positions(body, x, (matrix, shift), batch=1, skip=x) if ours else body(x, matrix, shift) + x

        def loss(x, function=function):
            return function(x).square().sum()

        results.append(
            (
                torch.vmap(function)(xs),
                torch.vmap(torch.func.grad(loss))(xs),
                torch.func.jvp(function, (xs[0],), (xs[1],))[1],
                torch.func.jvp(torch.func.grad(loss), (xs[0],), (xs[1],))[1],
                torch.func.grad(lambda x, f=loss: torch.func.grad(f)(x).square().sum())(xs[0]),
            )
        )
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, **CLOSE)


def test_the_same_random_numbers_are_drawn_again(small):
    x, ones = draw(2, 5, 4, 6).requires_grad_(), torch.ones(6, dtype=torch.float64, requires_grad=True)

    def noisy(part, scale):
        return torch.nn.functional.dropout(part, 0.5) * scale

    y = map_positions(noisy, x, (ones,), batch=1, random=True)
    state = torch.get_rng_state()
    of_x, of_scale = torch.autograd.grad(y.sum(), (x, ones))
    torch.testing.assert_close(of_x * x, y, **CLOSE)
    torch.testing.assert_close(of_scale, y.sum((0, 1, 2)), **CLOSE)
    assert torch.equal(torch.get_rng_state(), state)
    assert 0.2 < y.eq(0).double().mean() < 0.8


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("sizes", [(1, 1, 60), (1, 60, 1), (60, 1, 1)], ids=str)
def test_gradients_that_share_memory_are_not_added_to(sizes, heads, monkeypatch):
    """Values of two modes of size 1 have one gradient in common, and that of the output may be it."""
    module = ta.TensorAttention(8, heads, modes=3, bias=heads > 1, dtype=torch.float64)
    x, grad = draw(1, *sizes, 8).requires_grad_(), torch.ones(1, *sizes, 8, dtype=torch.float64)
    wanted = [x, *module.parameters()]
    expected = torch.autograd.grad(module(x), wanted, grad)
    monkeypatch.setattr(slabs, "POSITIONS", 10)
    found = torch.autograd.grad(module(x), wanted, grad)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
    assert torch.equal(grad, torch.ones_like(grad))


def test_types_are_chosen_again_as_they_were(small):
    x, linear = draw(2, 5, 4, 6, dtype=torch.float32).requires_grad_(), torch.nn.Linear(6, 6)
    seen = []

    def project(part, weight, bias):
        y = torch.nn.functional.linear(part, weight, bias)
        seen.append(y.dtype)
        return y

    with torch.autocast("cpu", torch.bfloat16):
        y = map_positions(project, x, (linear.weight, linear.bias), batch=1)
    y.float().sum().backward()
    assert set(seen) == {y.dtype} == {torch.bfloat16}
    assert linear.weight.grad.dtype == torch.float32
    torch.testing.assert_close(x.grad, linear.weight.sum(0).expand_as(x), rtol=2e-2, atol=2e-2)


def test_derivatives_in_half_precision_add_up_in_single(small):
    x = torch.ones(1, 4000, 2, dtype=torch.bfloat16)
    shift = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
    map_positions(lambda part, shift: part * shift, x, (shift,), batch=1).sum().backward()
    torch.testing.assert_close(shift.grad.float(), torch.full((2,), 4000.0), rtol=5e-3, atol=0)


@pytest.mark.parametrize("batch", [0, 1, 2])
@pytest.mark.parametrize("positions", [1, 7, 10, 10**6])
def test_every_position_is_computed_once(batch, positions, monkeypatch):
    monkeypatch.setattr(slabs, "POSITIONS", positions)
    x, seen = torch.zeros(2, 3, 4, 5, 1), []
    map_positions(lambda part: seen.append(part.numel()) or part + 1, x, (), batch=batch, out=(out := x.clone()))
    assert out.eq(1).all()
    assert sum(seen) == x.numel()
    assert max(seen) <= max(positions, torch.Size(x.shape[:batch]).numel())


def test_memory_is_that_of_a_slab(monkeypatch):
    monkeypatch.setattr(slabs, "POSITIONS", 1 << 10)
    x = torch.ones(1, 1 << 16, 64).requires_grad_()
    matrix, shift = torch.ones(64, 64).requires_grad_(), torch.ones(64).requires_grad_()
    size = x.numel() * x.element_size()
    gradient = torch.ones_like(x)

    def train(ours):
        y = map_positions(body, x, (matrix, shift), batch=1) if ours else body(x, matrix, shift)
        torch.autograd.grad(y, (x, matrix, shift), gradient)

    def peak(ours):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            train(ours)
        events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
        levels = itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
        return max(levels)

    assert peak(True) < 2.2 * size  # the output and the gradient, and little else
    assert peak(False) > 3 * size


@pytest.mark.usefixtures("small")
def test_slabs_run_on_the_meta_device():
    """Where there is no autocast, and operations are counted."""
    x = torch.empty(2, 4, 5, 3, device="meta", requires_grad=True)
    matrix, shift = torch.empty(3, 3, device="meta"), torch.empty(3, device="meta")
    map_positions(body, x, (matrix, shift), batch=1).sum().backward()
    assert x.grad.shape == x.shape
