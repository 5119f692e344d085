"""Few elements: what small tensors go through gives what large ones get, derivatives and order in memory included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

import tensorattn as ta
from tensorattn import contraction, slabs
from tensorattn.testing.variants import variants

SIZES = (4, 5, 3, 2)
CLOSE = {"rtol": 1e-10, "atol": 1e-12}

every_variant = pytest.mark.parametrize("variant", variants(), ids=str)
layouts = pytest.mark.parametrize("first", [False, True], ids=["last", "first"])


def draw(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def said_of(name: str, order: int) -> dict[str, Any]:
    """What may be said of positions."""
    sizes = SIZES[:order]
    said = {
        "mask": {"mask": draw(2, *sizes, seed=3) > -0.5},
        "lengths": {"lengths": [torch.tensor([3, 2]), *(None,) * (order - 1)]},
        "weights": {"weights": [draw(size, seed=4).abs() for size in sizes]},
    }
    return said.get(name, {})


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], tuple[Any, Any]]:
    """Run a call as for few elements, and as for many."""

    def run(call: Callable[[], Any]) -> tuple[Any, Any]:
        many = call()
        with monkeypatch.context() as patch:
            spies = [Mock(wraps=getattr(contraction, name)) for name in ("_contract_at_once", "_expand_at_once")]
            patch.setattr(contraction, "_contract_at_once", spies[0])
            patch.setattr(contraction, "_expand_at_once", spies[1])
            patch.setattr(slabs, "SMALL", 1 << 15)
            few = call()
        run.seen = [spy.called for spy in spies]  # type: ignore[attr-defined]
        return few, many

    return run


def with_gradients(function: Callable[..., Tensor], *leaves: Tensor) -> tuple[Tensor, ...]:
    """Output, and the derivatives of an inner product with it."""
    y = function()
    weight = draw(*y.shape, seed=9)
    return y.detach(), *torch.autograd.grad((y * weight).sum(), leaves, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("said", ["nothing", "weights", "lengths", "mask"])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
@every_variant
def test_functions(variant, order, said, both):
    leaves = [draw(2, *SIZES[:order], 6, seed=seed).requires_grad_() for seed in range(3)]
    options = dict(variant.options)
    if "kept" in options:
        options["kept"] = [subset for subset in options["kept"] if max(subset) < order]

    def call() -> tuple[Tensor, ...]:
        function = variant.operator.function
        return with_gradients(lambda: function(*leaves, order=order, **said_of(said, order), **options), *leaves)

    few, many = both(call)
    torch.testing.assert_close(few, many, **CLOSE)


@pytest.mark.parametrize("given", ["nothing", "skip", "itself"])
@layouts
@pytest.mark.parametrize("order", [2, 3])
@every_variant
def test_layers(variant, order, first, given, both):
    torch.manual_seed(1)
    settings = {"modes": order, "operator": variant.name, "channels_first": first, **variant.options}
    module = ta.TensorAttention(8, 2, dtype=torch.float64, **settings)
    x = draw(2, *SIZES[:order], 8)
    x = (x.movedim(-1, 1).contiguous() if first else x).requires_grad_()
    skip = {"nothing": None, "skip": torch.ones_like(x), "itself": x}[given]
    few, many = both(lambda: with_gradients(lambda: module(x, skip=skip), x, *module.parameters()))
    torch.testing.assert_close(few, many, **CLOSE)
    assert few[0].stride() == many[0].stride()
    with torch.no_grad():
        few, many = both(lambda: module(x, skip=skip))
        assert both.seen[0] or variant.name not in ("additive", "kao_kv", "kao_qkv")
        assert few.stride() == many.stride()
        torch.testing.assert_close(few, many, **CLOSE)
        into, _ = both(lambda: module(x, skip=skip, out=torch.empty_like(x)))
        torch.testing.assert_close(into, many, **CLOSE)


@layouts
@pytest.mark.parametrize("order", [2, 3])
def test_gradients_lie_as_the_input(order, first, both):
    module = ta.TensorAttention(8, 2, modes=order, operator="kao_qkv", channels_first=first, dtype=torch.float64)
    x = draw(2, 8, *SIZES[:order]) if first else draw(2, *SIZES[:order], 8)
    few, many = both(lambda: torch.autograd.grad(module(x.requires_grad_()).sum(), x)[0])
    assert few.stride() == many.stride() == x.stride()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_in_half_precision_are_rounded_once(dtype, both):
    def call() -> Tensor:
        x = draw(2, 5, 6, 7, 16).to(dtype).requires_grad_()
        parts = [(mean * weight).sum() for mean, weight in zip(ta.mode_averages(x, order=3), weights, strict=True)]
        return torch.autograd.grad(sum(parts), x)[0]

    weights = [draw(2, size, 16, seed=size).float() for size in (5, 6, 7)]
    few, many = both(call)
    assert torch.equal(few, many)


@pytest.mark.parametrize("kind", ["kao_qkv", "kao_qkv centred"])
def test_both_ends_are_at_once(kind, both):
    module = ta.TensorAttention(8, 2, modes=2, operator="kao_qkv", centered=kind != "kao_qkv")
    with torch.no_grad():
        both(lambda: module(torch.ones(1, 4, 5, 8)))
    assert both.seen == [True, True]


def test_only_few_elements_are(monkeypatch):
    spies = {name: Mock(wraps=getattr(contraction, name)) for name in ("_contract_at_once", "_expand_at_once")}
    for name, spy in spies.items():
        monkeypatch.setattr(contraction, name, spy)
    monkeypatch.setattr(slabs, "SMALL", 2 * 4 * 5 * 3)
    ta.additive_part(draw(2, 4, 5, 3), order=2)
    assert [spy.call_count for spy in spies.values()] == [1, 1]
    ta.additive_part(draw(2, 4, 5, 4), order=2)
    assert [spy.call_count for spy in spies.values()] == [1, 1]
