"""Kernel calls of a layer: few, as many at every size, and none that reads a number from the device."""

from __future__ import annotations

import pytest
import torch
from modules import draw
from torch._subclasses.fake_tensor import FakeTensorMode

import tensorattn as ta
from nn.layers import DEFAULTS, VARIANTS, make, more
from tensorattn.diagnose.cost import count_calls
from tensorattn.functional import cells

# Forward alone with gradients enabled, and with the backward pass, at order 3.
LIMITS = {"kao_kv": (16, 60), "additive": (24, 80), "kao_qkv": (20, 70), "clustered": (630, 740)}
OTHERS = (48, 120)
SIZES = ((3, 5, 5), (6, 8, 7))  # more positions than tokens
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
COUNTED = [(v, f) for f in FLOATS for v in VARIANTS]
QUICK = [(v, f) for v, f in COUNTED if (v in DEFAULTS and f == FLOATS[0]) or (v.name in LIMITS and not v.options)]


@pytest.fixture(autouse=True)
def where_nothing_is_read(monkeypatch):
    """As on an accelerator, where a search does all its rounds."""
    monkeypatch.setattr(cells, "readable", lambda tensor: False)


def calls(layer, x, **given):
    """Kernel calls forwards, and forwards and backwards."""
    leaves, gradient = [x, *layer.parameters()], torch.ones_like(x)
    forward = count_calls(lambda: layer(x, **given))
    return forward, count_calls(lambda: torch.autograd.grad(layer(x, **given), leaves, gradient))


@pytest.mark.parametrize(
    "case",
    more(*QUICK, *(c for c in COUNTED if c not in QUICK), quick=len(QUICK)),
    ids=lambda case: " ".join(map(str, case)),
)
def test_are_few_and_as_many_at_every_size(case):
    variant, dtype = case
    layer = make(variant, 3, 32, 4, dtype)
    small, large = (calls(layer, draw(2, *sizes, 32, dtype=dtype).requires_grad_()) for sizes in SIZES)
    assert small == large
    if variant in DEFAULTS:
        most = LIMITS.get(variant.name, OTHERS)
        assert small[0] <= most[0] and small[1] <= most[1]


@pytest.mark.parametrize("settings", [{"channels_first": True}, {"causal": 0}, {"project": "positions"}], ids=str)
@pytest.mark.parametrize("variant", more(*DEFAULTS), ids=str)
def test_are_as_many_at_every_size_in_other_settings(variant, settings):
    if "causal" in settings and "causal" in variant.lacks:
        return
    layer = make(variant, 3, 32, 4, torch.float32, **settings)
    first = layer.channels_first
    small, large = (
        calls(layer, draw(2, *((32, *s) if first else (*s, 32)), dtype=torch.float32).requires_grad_()) for s in SIZES
    )
    assert small == large


@pytest.mark.parametrize("settings", more({}, {"channels_first": True, "dropout": 0.5}, {"causal": 1}), ids=str)
@pytest.mark.parametrize("variant", more(*VARIANTS), ids=str)
def test_read_no_number_from_the_device(variant, settings):
    """Tensors without values, on the CPU as it seems: whoever asks for a value is told that there is none."""
    if "causal" in settings and "causal" in variant.lacks:
        return
    settings = {
        name: value for name, value in settings.items() if name != "dropout" or "dropout_p" not in variant.lacks
    }
    with FakeTensorMode():
        layer = ta.TensorAttention(8, 2, modes=3, operator=variant.name, **variant.options, **settings)
        x = torch.randn((2, 8, 3, 4, 5) if layer.channels_first else (2, 3, 4, 5, 8), requires_grad=True)
        layer(x, skip=x).sum().backward()
        crosses = variant.operator.query == "positions" and not variant.options.keys() & {"include_self", "kept"}
        if crosses and not settings:
            layer(x, torch.randn(2, 6, 7, 8)).sum().backward()


def test_a_number_that_is_read_is_noticed():
    with FakeTensorMode():
        layer, x = ta.TensorAttention(8, 2, modes=3), torch.randn(2, 3, 4, 5, 8)
        layer.v_proj.register_forward_hook(lambda module, args, output: output if output.sum() > 0 else None)
        with pytest.raises(torch._subclasses.fake_tensor.DataDependentOutputException):
            layer(x)
