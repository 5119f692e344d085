"""Traps that other attention packages have fallen into, one test each, for every operator."""

from __future__ import annotations

import itertools

import pytest
import torch

import tensorattn as ta

CLOSE = {"rtol": 1e-10, "atol": 1e-12}

every_operator = pytest.mark.parametrize("operator", ta.OPERATORS)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def layer(operator, order=3, **changed):
    torch.manual_seed(1)
    return ta.TensorAttention(8, 2, **{"modes": order, "operator": operator, "dtype": torch.float64, **changed})


@every_operator
def test_dropout_stops_in_evaluation(operator):
    module, x = layer(operator, dropout=0.9), draw(2, 3, 4, 5, 8)
    trained = [module(x) for _ in range(2)]
    assert not torch.equal(*trained)
    module.eval()
    torch.testing.assert_close(module(x), layer(operator)(x), **CLOSE)


@every_operator
def test_modes_of_different_sizes_in_every_order(operator):
    """The modes of the input permuted are the modes of the output permuted."""
    module, x = layer(operator), draw(2, 2, 3, 5, 8)
    y = module(x)
    for order in itertools.permutations(range(3)):
        dims = (0, *(1 + mode for mode in order), 4)
        torch.testing.assert_close(module(x.permute(dims)), y.permute(dims), **CLOSE)
        torch.testing.assert_close(module(x.permute(dims).contiguous()), y.permute(dims), **CLOSE)


@every_operator
@pytest.mark.parametrize("order", range(1, 5))
def test_an_empty_batch(operator, order):
    module, x = layer(operator, order), draw(0, *(2, 3, 4, 5)[:order], 8).requires_grad_()
    y = module(x)
    assert y.shape == x.shape
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert all(parameter.grad is None or parameter.grad.eq(0).all() for parameter in module.parameters())


@every_operator
def test_one_position(operator):
    """The only position is attended to with weight one, as often as the operator counts values."""
    module, x = layer(operator), draw(2, 1, 1, 1, 8)
    times = 3 if operator in ("kao_qkv", "kronecker_sum") else 1
    torch.testing.assert_close(module(x), module.out_proj(times * module.v_proj(x)), **CLOSE)


@every_operator
def test_inputs_of_other_sizes_than_before(operator):
    """A module knows nothing of sizes: parameters and results are those of one that saw no other input."""
    module = layer(operator)
    for sizes in ((4, 4, 4), (2, 7, 3), (9, 1, 2)):
        x = draw(2, *sizes, 8)
        torch.testing.assert_close(module(x), layer(operator)(x), rtol=0, atol=0)


@every_operator
def test_samples_do_not_see_each_other(operator):
    module, x = layer(operator), draw(3, 3, 4, 5, 8)
    y = module(x)
    for sample in range(3):
        torch.testing.assert_close(module(x[sample : sample + 1]), y[sample : sample + 1], **CLOSE)


@every_operator
def test_asking_for_more_changes_nothing(operator):
    """What the fused kernel gives is what is written out with the attention weights."""
    function = ta.OPERATORS[operator].function
    q, k, v = (draw(2, 3, 4, 5, 8, seed=seed) for seed in range(3))
    for weights in (None, [torch.tensor([1.0, 0, 2]), None, torch.arange(10.0).view(2, 5) + 1]):
        given = None if weights is None else [None if w is None else w.double() for w in weights]
        plain = function(q, k, v, order=3, weights=given)
        more = function(q, k, v, order=3, weights=given, return_attention=True)
        torch.testing.assert_close(more.output, plain, **CLOSE)


@every_operator
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_type_is_kept(operator, dtype):
    x = draw(2, 3, 4, 5, 8, dtype=dtype)
    y = layer(operator, dtype=dtype)(x)
    assert y.dtype == dtype
    exact = layer(operator, dtype=torch.float32 if dtype.itemsize < 4 else torch.float64)
    exact.load_state_dict(layer(operator, dtype=dtype).state_dict())
    expected = exact(x.to(exact.q_proj.weight.dtype))
    tolerance = {8: 1e-12, 4: 1e-5, 2: 3e-2}[dtype.itemsize]
    torch.testing.assert_close(y.to(expected.dtype), expected, rtol=tolerance, atol=tolerance)


@every_operator
def test_large_logits_overflow_nowhere(operator):
    for dtype in (torch.float32, torch.float16):
        q = 100 * draw(2, 3, 4, 5, 8, dtype=dtype).clamp(-3, 3)
        result = ta.OPERATORS[operator].function(q, q, draw(2, 3, 4, 5, 8, dtype=dtype), order=3, scale=1.0)
        assert result.isfinite().all()


@every_operator
def test_more_elements_than_32_bits_count(operator):
    """2³² elements, without memory for one of them."""
    x = torch.empty(1, 16, 16, 16, 1 << 20, device="meta")
    assert x.numel() == 1 << 32
    y = ta.OPERATORS[operator].function(x, x, x, order=3)
    assert (y.shape, y.numel()) == (x.shape, 1 << 32)
    cost = ta.cost(operator, (16, 16, 16), dim=1 << 20)
    assert cost.flops > 1 << 40
    means = ta.mode_averages(x, order=3)
    assert ta.outer_sum(means).shape == x.shape


@pytest.mark.parametrize("operator", ["kao_qkv", "kronecker_product", "kronecker_sum"])
def test_a_layer_over_more_positions_than_32_bits_count(operator):
    """2³² positions of one sample, known by their shape alone; layers that work slab by slab would take long."""
    module = ta.TensorAttention(8, 2, modes=3, operator=operator, device="meta")
    x = torch.empty(1, 1 << 12, 1 << 10, 1 << 10, 8, device="meta")
    assert module(x).shape == x.shape
    assert module(x, skip=x).numel() == 1 << 35
