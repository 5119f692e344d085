"""Layers that tests share: drawn always the same, and apart, as linear maps and the function of an operator."""

from __future__ import annotations

import pytest
import torch
from grids import CAUSAL, CLOSE, VARIANTS
from modules import draw

import tensorattn as ta
from tensorattn.functional import OPERATORS

GRADIENTS = {"rtol": 1e-9, "atol": 1e-11}
HALVES = [torch.bfloat16, torch.float16]
DEFAULTS = VARIANTS[: len(OPERATORS)]
QUICK = [*DEFAULTS, *(v for v in VARIANTS if str(v) in ("additive interaction=linear", "additive include_self=True"))]
PARAMETERS = [f"{name}_proj.{part}" for name in ("q", "k", "v", "out") for part in ("weight", "bias")]


def more(*values, quick=1):
    """The first values by default, the others where all is tried."""
    return [*values[:quick], *(pytest.param(value, marks=pytest.mark.thorough) for value in values[quick:])]


def some(variants):
    """Variants of an operator by default, with their options where all is tried."""
    quick = [variant for variant in variants if variant in QUICK]
    every = more(*quick, *(variant for variant in variants if variant not in QUICK), quick=len(quick))
    return pytest.mark.parametrize("variant", every, ids=str)


every_variant, every_causal = some(VARIANTS), some(CAUSAL)
every_operator = pytest.mark.parametrize("variant", DEFAULTS, ids=str)


def make(variant, modes=2, embed_dim=8, num_heads=2, dtype=torch.float64, **settings):
    """A layer with linear maps all drawn, biases too; gains are one, as in the functional form."""
    options = {"operator": variant, **settings} if isinstance(variant, str) else {"operator": variant.name, **settings}
    options |= {} if isinstance(variant, str) else variant.options
    layer = ta.TensorAttention(embed_dim, num_heads, modes=modes, dtype=dtype, **options)
    with torch.no_grad():
        for seed, (_, parameter) in enumerate((n, p) for n, p in layer.named_parameters() if "proj" in n):
            parameter.copy_(0.5 * draw(*parameter.shape, seed=seed))
    return layer


def heads_of(layer, *tensors):
    """Queries, keys and values of every head, of one tensor or of two."""
    given = tensors * 3 if len(tensors) == 1 else (tensors[0], *tensors[-1:] * 2)
    maps = (layer.q_proj, layer.k_proj, layer.v_proj)
    return [m(t).unflatten(-1, (layer.num_heads, -1)).movedim(-2, 1) for m, t in zip(maps, given, strict=True)]


def headed(weights):
    """Weights of modes, with a dimension for the heads behind that of the samples."""
    return weights and [w if w is None or w.dim() == 1 else w.unsqueeze(1) for w in weights]


def joined(layer, output):
    """Join heads, and project back."""
    return layer.out_proj(output.movedim(1, -2).flatten(-2))


def apart(layer, x, weights=None, **settings):
    """Project everything, attend by the function of the operator, project back; and the attention weights."""
    settings |= layer.options | ({} if layer.causal is None else {"causal": layer.causal})
    function = OPERATORS[layer.operator].function
    order = x.dim() - 2
    result = function(*heads_of(layer, x), order=order, weights=headed(weights), return_attention=True, **settings)
    return joined(layer, result.output), result.attention


def compare(ours, theirs, **tolerance):
    """Compare nested tuples of tensors."""
    if isinstance(ours, torch.Tensor):
        torch.testing.assert_close(ours, theirs, **tolerance or CLOSE)
        return
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        compare(one, other, **tolerance)


def gradients_of(function, layer, x, **given):
    """An output, and gradients of the input and of every parameter."""
    y = function(x, **given)
    return y, torch.autograd.grad((y * draw(*y.shape, seed=9, dtype=y.dtype)).sum(), [x, *layer.parameters()])
