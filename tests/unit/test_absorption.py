"""One head: the maps of queries and outputs, absorbed in averages, against the same layer that maps all positions."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

import tensorattn as ta
from tensorattn import absorbing
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


@pytest.fixture(autouse=True)
def small_savings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let small grids pay."""
    monkeypatch.setattr(absorption, "absorbing_pays", lambda *given, **more: True)


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """What absorbs, watched."""
    spy = Mock(wraps=absorption.absorbed)
    monkeypatch.setattr(core, "absorbed", spy)
    return spy


def both_ways(call: Any, spied: Mock, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """What a call returns with the maps absorbed, and without."""
    one = call()
    assert spied.called
    with monkeypatch.context() as patch:
        patch.setattr(core, "absorbs", lambda *given: False)
        plain = call()
    return one, plain


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
        one, plain = both_ways(lambda: module(x, skip=x, **presence(said)), spied, monkeypatch)
    torch.testing.assert_close(one, plain, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("operator", ["additive", "kao_kv"])
def test_frames_see_the_past_alone(operator, spied, monkeypatch):
    module, x = layer(operator, bias=True, causal=0), draw(2, *SIZES, 64)
    with torch.no_grad():
        one, plain = both_ways(lambda: module(x), spied, monkeypatch)
    torch.testing.assert_close(one, plain, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("sizes", [SIZES, (1, 1, 60), (60, 1, 1)], ids=str)
@pytest.mark.parametrize("operator", ["additive", "kao_kv"])
def test_gradients_are_the_same_slab_by_slab_too(operator, sizes, spied, monkeypatch):
    monkeypatch.setattr("tensorattn.slabs.POSITIONS", 16)
    module, x = layer(operator, bias=False), draw(2, *sizes, 64).requires_grad_()
    wanted = [x, *module.parameters()]

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(module(x).square().sum(), wanted)

    for one, plain in zip(*both_ways(gradients, spied, monkeypatch), strict=True):
        torch.testing.assert_close(one, plain, rtol=1e-9, atol=1e-9)


def test_slab_by_slab_too(spied, monkeypatch):
    monkeypatch.setattr("tensorattn.slabs.POSITIONS", 8)
    module, x = layer("additive", bias=True), draw(2, *SIZES, 64)
    with torch.no_grad():
        one, plain = both_ways(lambda: module(x, out=torch.empty_like(x)), spied, monkeypatch)
    torch.testing.assert_close(one, plain, rtol=1e-11, atol=1e-11)


def test_it_compiles_in_one_piece_and_exports_with_any_size(spied):
    module, x = layer("kao_kv", bias=True), draw(2, *SIZES, 64)
    with torch.no_grad():
        expected = module(x)
        assert spied.call_count == 1
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected, rtol=1e-11, atol=1e-11)
        any_size = {place: torch.export.Dim(name, max=512) for place, name in ((0, "batch"), (2, "height"))}
        exported = torch.export.export(module, (x,), dynamic_shapes={"x": any_size}).module()
        torch.testing.assert_close(exported(x), expected, rtol=1e-11, atol=1e-11)
        wide = draw(1, 4, 300, 3, 64)
        torch.testing.assert_close(exported(wide), module(wide), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_narrow_types_are_as_precise(dtype, spied, monkeypatch):
    module, x = layer("additive", bias=True), draw(2, *SIZES, 64)
    with torch.no_grad():
        exact = module(x)
        one, plain = both_ways(lambda: module.to(dtype)(x.to(dtype)), spied, monkeypatch)
    assert (one - exact).abs().max() <= 2 * (plain - exact).abs().max()


@pytest.mark.parametrize(
    ("operator", "given"),
    [
        ("additive", {"heads": 4}),
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


def test_another_operator_has_to_say_that_it_can(spied):
    """Cosine attention looks at its queries in a way of its own."""
    additive = ta.get_operator("additive")

    def attend(query: Tensor, summary: ta.Summary, **settings: Any) -> Any:
        return additive.attend(torch.nn.functional.normalize(query, dim=-1), summary, **settings)

    record = ta.Operator("cosine", additive.function, additive.needs, attend, additive.claims, options=additive.options)
    ta.register_operator(record)
    try:
        with torch.no_grad():
            layer("cosine", bias=True)(draw(2, *SIZES, 64))
    finally:
        del ta.OPERATORS["cosine"]
    assert not spied.called


def test_a_bias_of_logits_that_has_a_gradient_keeps_the_fused_kernel(spied):
    module, x = layer("additive", bias=True), draw(2, *SIZES, 64)
    module(x)
    module.q_proj.bias.requires_grad_(False)
    module(x)  # the keys that it meets have one
    assert not spied.called
    for linear in (module.q_proj, module.k_proj, module.v_proj):
        linear.requires_grad_(False)
    module(x)
    assert spied.call_count == 1
    layer("additive", bias=False)(x)
    assert spied.call_count == 2


def test_autocast_makes_the_type_whether_it_absorbs_or_not(spied):
    module, x = layer("additive", bias=False).float(), draw(2, *SIZES, 64).float()
    several = layer("additive", bias=False, heads=4).float()
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == several(x).dtype
    assert not spied.called


@pytest.mark.parametrize(
    ("positions", "tokens", "dim", "biased", "pays"),
    [
        (4096, 200, 64, True, True),
        (4096, 200, 32, True, False),  # a bias of logits takes longer than narrow maps
        (8192, 200, 32, False, True),
        (196, 28, 64, False, False),  # too few for the calls that it takes
        (196, 28, 256, False, True),
        (4, 200, 512, False, False),  # more averages than queries
    ],
)
def test_where_it_pays(positions, tokens, dim, biased, pays):
    assert absorbing.absorbing_pays(positions, tokens, dim, biased=biased) is pays
