"""Masks of the layer under the tools of PyTorch: compilation, export, autocast, derivatives, checkpoints of steps."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.export import Dim

import tensorattn as ta

CLOSE = {"rtol": 1e-10, "atol": 1e-12}
QUICK = ("additive", "axial")  # one that takes any queries, one that needs their grid


def operators(quick):
    marked = [pytest.param(name, marks=() if name in quick else pytest.mark.thorough) for name in ta.OPERATORS]
    return pytest.mark.parametrize("name", marked)


every_operator = operators(QUICK)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def holes(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.4


def make(name="additive", **settings):
    torch.manual_seed(0)
    return ta.TensorAttention(8, 2, modes="h w", operator=name, dtype=torch.float64, **settings)


@operators(QUICK[:1])
def test_compiles_in_one_graph(name):
    layer, x, mask = make(name), draw(2, 3, 4, 8), holes(2, 3, 4)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, mask=mask), layer(x, mask=mask), **CLOSE)
    lengths = torch.tensor([[2, 4], [3, 1]])
    torch.testing.assert_close(compiled(x, lengths=lengths), layer(x, lengths=lengths), **CLOSE)


@pytest.mark.thorough
def test_compiles_causal_and_blocks():
    x, mask = draw(2, 3, 4, 8), holes(2, 3, 4)
    block = ta.TensorTransformerBlock(8, 2, modes="h w", causal="h", dtype=torch.float64)
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, mask=mask), block(x, mask=mask), **CLOSE)


@pytest.mark.thorough
def test_is_exported_with_sizes_that_vary():
    class Masked(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = make()

        def forward(self, x, mask):
            return self.layer(x, mask=mask)

    module = Masked()
    batch, height = Dim("batch", min=2, max=64), Dim("height", min=2, max=64)
    shapes = {"x": {0: batch, 1: height}, "mask": {0: batch, 1: height}}
    program = torch.export.export(module, (draw(2, 3, 4, 8), holes(2, 3, 4)), dynamic_shapes=shapes)
    other = draw(3, 5, 4, 8), holes(3, 5, 4)
    torch.testing.assert_close(program.module()(*other), module(*other), **CLOSE)


@operators(QUICK[:1])
def test_second_derivatives(name):
    layer, x, mask = make(name), draw(1, 2, 3, 8).requires_grad_(), holes(1, 2, 3)
    mask[0, 0, 0], mask[0, 1, 1] = True, False
    call = lambda x: layer(x, mask=mask).tanh()[..., :2]  # noqa: E731
    assert gradcheck(call, (x,))
    assert gradgradcheck(call, (x,))


@every_operator
def test_samples_by_vmap(name):
    layer, x, mask = make(name), draw(3, 1, 3, 4, 8), holes(3, 1, 3, 4)
    ours = torch.vmap(lambda x, mask: layer(x, mask=mask))(x, mask)
    theirs = torch.stack([layer(part, mask=one) for part, one in zip(x, mask, strict=True)])
    torch.testing.assert_close(ours, theirs, **CLOSE)


@every_operator
def test_skip_and_layouts(name):
    layer, x, mask = make(name), draw(2, 3, 4, 8), holes(2, 3, 4)
    x = x.masked_fill(~mask.unsqueeze(-1), float("nan"))
    skip = draw(2, 3, 4, 8, seed=2)
    with torch.no_grad():
        y = layer(x, mask=mask)
        torch.testing.assert_close(layer(x, mask=mask, skip=skip), y + skip, **CLOSE)
        residual = layer(x, mask=mask, skip=x)
        torch.testing.assert_close(residual[mask], (x + y)[mask], **CLOSE)
        assert residual[~mask].isnan().all()  # the skip connection is the caller's
        first = make(name, channels_first=True)
        first.load_state_dict(layer.state_dict())
        torch.testing.assert_close(first(x.movedim(-1, 1), mask=mask).movedim(1, -1), y, **CLOSE)


def test_autocast():
    layer, x, mask = make().float(), draw(2, 3, 4, 8).float(), holes(2, 3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        near = layer(x, mask=mask)
    torch.testing.assert_close(near.float(), layer(x, mask=mask), rtol=0.05, atol=0.05)
    assert (near[~mask] == 0).all()


@every_operator
def test_dropout_leaves_absent_positions_alone(name):
    layer, x, mask = make(name, dropout=0.5).train(), draw(2, 3, 4, 8), holes(2, 3, 4)
    y = layer(x.masked_fill(~mask.unsqueeze(-1), float("inf")), mask=mask)
    assert y.isfinite().all()
    assert (y[~mask] == 0).all()
