"""One head: the maps of queries and outputs, absorbed in averages, against the same layer that maps all positions."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

import tensorattn as ta
from tensorattn.nn import absorption, core

SIZES = (4, 5, 3)
OPERATORS = [("additive", {}), ("kao_kv", {}), ("truncated", {}), ("truncated", {"kept": ((0,), (1, 2))})]


def layer(operator: str, *, bias: bool, dim: int = 64, heads: int = 1, **given: Any) -> ta.TensorAttention:
    """A layer whose parameters, biases included, are all drawn."""
    module = ta.TensorAttention(dim, heads, modes=3, operator=operator, bias=bias, dtype=torch.float64, **given)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 4)
    return module


def draw(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """What absorbs, watched."""
    spy = Mock(wraps=absorption.absorbed)
    monkeypatch.setattr(core, "absorbed", spy)
    return spy


def both_ways(call: Any, spied: Mock, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """What a call returns with the maps absorbed, and without."""
    absorbing = call()
    assert spied.called
    with monkeypatch.context() as patch:
        patch.setattr(core, "absorbs", lambda *given: False)
        plain = call()
    return absorbing, plain


def presence(name: str) -> dict[str, Any]:
    """What may be said of positions."""
    mask = draw(2, *SIZES, seed=3) > -0.5
    mask[1] = False  # a sample without any position
    vectors = [draw(4, seed=4).abs(), None, draw(2, 3, seed=5).abs()]
    said = {
        "mask": {"mask": mask},
        "lengths": {"lengths": [3, torch.tensor([5, 2]), None]},
        "weights": {"weights": vectors},
    }
    return said.get(name, {})


@pytest.mark.parametrize("said", ["nothing", "weights", "lengths", "mask"])
@pytest.mark.parametrize("first", [False, True], ids=["last", "first"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(("operator", "options"), OPERATORS, ids=str)
def test_equals_the_layer_that_maps_all_positions(operator, options, bias, first, said, spied, monkeypatch):
    module = layer(operator, bias=bias, channels_first=first, **options)
    x = draw(2, 64, *SIZES) if first else draw(2, *SIZES, 64)
    with torch.no_grad():
        absorbing, plain = both_ways(lambda: module(x, skip=x, **presence(said)), spied, monkeypatch)
    torch.testing.assert_close(absorbing, plain, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("operator", ["additive", "kao_kv"])
def test_frames_see_the_past_alone(operator, spied, monkeypatch):
    module, x = layer(operator, bias=True, causal=0), draw(2, *SIZES, 64)
    with torch.no_grad():
        absorbing, plain = both_ways(lambda: module(x), spied, monkeypatch)
    torch.testing.assert_close(absorbing, plain, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("operator", ["additive", "kao_kv"])
def test_gradients_are_the_same(operator, frozen, spied, monkeypatch):
    """Without a bias all of them; with one that is frozen, those of everything else."""
    module, x = layer(operator, bias=frozen), draw(2, *SIZES, 64).requires_grad_()
    if frozen:
        module.q_proj.bias.requires_grad_(False)
    wanted = [x, *(parameter for parameter in module.parameters() if parameter.requires_grad)]

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(module(x).square().sum(), wanted)

    for absorbing, plain in zip(*both_ways(gradients, spied, monkeypatch), strict=True):
        torch.testing.assert_close(absorbing, plain, rtol=1e-9, atol=1e-9)


def test_slab_by_slab_too(spied, monkeypatch):
    monkeypatch.setattr("tensorattn.slabs.POSITIONS", 8)
    module, x = layer("additive", bias=True), draw(2, *SIZES, 64)
    with torch.no_grad():
        absorbing, plain = both_ways(lambda: module(x, out=torch.empty_like(x)), spied, monkeypatch)
    torch.testing.assert_close(absorbing, plain, rtol=1e-11, atol=1e-11)


def test_it_compiles_in_one_piece():
    module, x = layer("kao_kv", bias=True), draw(2, *SIZES, 64)
    with torch.no_grad():
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), module(x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_narrow_types_are_as_precise(dtype, spied, monkeypatch):
    module, x = layer("additive", bias=True), draw(2, *SIZES, 64)
    with torch.no_grad():
        exact = module(x)
        absorbing, plain = both_ways(lambda: module.to(dtype)(x.to(dtype)), spied, monkeypatch)
    assert (absorbing - exact).abs().max() <= 2 * (plain - exact).abs().max()


@pytest.mark.parametrize(
    ("operator", "given"),
    [
        ("additive", {"heads": 4}),
        ("additive", {"dim": 32}),
        ("additive", {"interaction": "linear"}),
        ("additive", {"include_self": True}),
        ("flattened", {}),
        ("truncated", {"kept": ((0, 1, 2),)}),
        ("axial", {}),
    ],
)
def test_where_it_does_not_pay_or_apply(operator, given, spied):
    with torch.no_grad():
        module = layer(operator, bias=True, **given)
        module(draw(2, *SIZES, given.get("dim", 64)))
    assert not spied.called


def test_a_bias_that_is_trained_keeps_the_fused_kernel(spied):
    layer("additive", bias=True)(draw(2, *SIZES, 64))
    assert not spied.called
    layer("additive", bias=False)(draw(2, *SIZES, 64))
    assert spied.called
