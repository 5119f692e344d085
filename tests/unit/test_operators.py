"""What all operators share and no theorem says: extreme weights, derivatives of every kind, types, export."""

from __future__ import annotations

import pytest
import torch
from torch.export import Dim

import tensorattn as ta
from tensorattn.testing.variants import variants

VARIANTS = variants()

every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=str)

# torch scripts some decompositions the first time that it differentiates forward.
forward_mode = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@every_variant
@pytest.mark.parametrize("size", [1e5, 1e-5, 1e15, 1e-16])
@pytest.mark.parametrize("order", [2, 3, 8])
def test_only_the_ratios_of_weights_count(variant, size, order):
    """Products of the weights of many modes leave the range of single precision long before their ratios do."""
    if variant.options.get("pool") == "sum" or variant.options.get("include_self"):
        return  # where weights count as they are
    x = draw(*(2,) * order, 4, dtype=torch.float32)
    weights = [torch.tensor([1.0, 3.0]) for _ in range(order)]
    cheap = variant.name == "truncated" and order == 8 and "interaction_order" not in variant.options
    options = {"kept": ((0,), (0, 1))} if cheap else {}
    function = lambda w: variant.function(x, x, x, order=order, weights=w, **options)  # noqa: E731
    torch.testing.assert_close(function([size * w for w in weights]), function(weights), rtol=1e-3, atol=1e-3)


@every_variant
@forward_mode
def test_derivatives_of_every_kind_and_vmap(variant):
    function = lambda x: variant.function(x, x, x, order=2)  # noqa: E731
    loss = lambda x: function(x).square().sum()  # noqa: E731
    xs = draw(3, 2, 3, 4, 4)
    torch.testing.assert_close(torch.vmap(function)(xs), torch.stack([function(x) for x in xs]))
    gradients = torch.stack([torch.func.grad(loss)(x) for x in xs])
    torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(xs), gradients)
    step = 1e-6
    tangent = (function(xs[0] + step * xs[1]) - function(xs[0] - step * xs[1])) / (2 * step)
    torch.testing.assert_close(torch.func.jvp(function, (xs[0],), (xs[1],))[1], tangent, rtol=1e-6, atol=1e-8)
    slope = torch.func.grad(loss)(xs[0] + step * xs[1]) - torch.func.grad(loss)(xs[0] - step * xs[1])
    product = torch.func.jvp(torch.func.grad(loss), (xs[0],), (xs[1],))[1]
    torch.testing.assert_close(product, slope / (2 * step), rtol=1e-5, atol=1e-7)
    assert torch.autograd.gradgradcheck(function, (xs[0, :1, :2, :2, :3].clone().requires_grad_(),))


@every_variant
def test_large_values_do_not_overflow_in_half_precision(variant):
    if variant.name in ("kronecker_sum", "kao_qkv") and not variant.options.get("centered"):
        return  # their outputs are sums of as many means as there are modes
    value = torch.full((4, 4, 4, 8), 40000.0, dtype=torch.float16)
    output = variant.function(0 * value, 0 * value, value, order=3)
    torch.testing.assert_close(output, value, rtol=2e-3, atol=0)


@pytest.mark.parametrize("name", ["additive", "kao_qkv", "truncated"])
def test_the_interaction_term_exports_with_any_size(name):
    options = {"centered": True} if name == "kao_qkv" else {}
    layer = ta.TensorAttention(8, 2, modes=2, operator=name, interaction="linear", **options)
    dims = {0: Dim("batch", min=1, max=64), 1: Dim("rows", min=1, max=512), 2: Dim("columns", min=1, max=512)}
    program = torch.export.export(layer, (torch.randn(2, 3, 4, 8),), dynamic_shapes={"x": dims})
    x = torch.randn(3, 7, 5, 8)
    torch.testing.assert_close(program.module()(x), layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if "causal" not in v.operator.lacks], ids=str)
@pytest.mark.parametrize("absent", [0, 1, 2])
def test_causal_frames_see_no_absent_and_no_later_frame_whatever_is_there(variant, absent):
    """Not even NaN, and not even where the first frames are absent."""
    clean = draw(4, 3, 4)
    weights = [torch.ones(4), None]
    weights[0][absent] = 0
    function = lambda x: variant.function(clean, x, x, order=2, causal=0, weights=weights)  # noqa: E731
    expected = function(clean)
    for first_dirty in range(1, 5):
        dirty = clean.clone()
        dirty[first_dirty:] = torch.nan
        if not variant.options.get("include_self"):  # the own token is always there
            dirty[absent] = torch.nan
        seen = slice(0, first_dirty)
        torch.testing.assert_close(function(dirty)[seen], expected[seen], rtol=1e-12, atol=1e-13)


@every_variant
def test_whole_numbers_as_weights_leave_single_precision_as_it_is(variant):
    """Also where values are narrower than keys, so that the softmax is written out."""
    x, weights = torch.ones(1, 1, 3), (None, torch.tensor([1]))
    output = variant.function(x, x, x[..., :2], order=2, weights=weights)
    assert output.dtype == torch.float32 and output.isfinite().all()
