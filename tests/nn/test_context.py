"""Cross-attention: a context on another grid and of another order, against the oracle; summaries used again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from modules import draw, refused
from torch.autograd import gradcheck

import tensorattn as ta
from nn.layers import GRADIENTS, VARIANTS, compare, make, more, some
from tensorattn.errors import DtypeError, OptionError, ShapeError, WeightsError
from tensorattn.functional import OPERATORS
from tensorattn.testing import reference

CROSSING = [v for v in VARIANTS if v.operator.query == "positions" and not v.options.get("include_self")]
GRIDS = [(2, 3, 4), (4,), (3, 4), (2, 2, 3, 2)]

every_crossing = some(CROSSING)
every_grid = pytest.mark.parametrize("sizes", more(*GRIDS), ids=str)


def suits(variant, sizes):
    """Whether the options of a variant have a meaning for a context: kept modes are those of the layer."""
    return "kept" not in variant.options or len(sizes) == 2


def holes(*shape):
    mask = draw(*shape, seed=3) > -0.5
    mask.view(shape[0], -1)[:, 0] = True
    return mask


@every_grid
@every_crossing
@pytest.mark.parametrize("channels_first", [False, True], ids=["last", "first"])
def test_against_the_oracle(variant, sizes, channels_first):
    if not suits(variant, sizes):
        return
    layer = make(variant, channels_first=channels_first, kdim=5, vdim=6)
    with torch.no_grad():
        if layer.interaction_gain is not None:
            layer.interaction_gain.copy_(torch.tensor([0.5, 2.0]))
    x, key, value, mask = draw(2, 3, 5, 8), draw(2, *sizes, 5, seed=1), draw(2, *sizes, 6, seed=2), holes(2, *sizes)
    given = [x, *(t.masked_fill(~mask.unsqueeze(-1), torch.nan) for t in (key, value))]
    expected = reference.layer(layer, given[0], tuple(given[1:]), mask=mask)
    given = [t.movedim(-1, 1) for t in given] if channels_first else given
    y = layer(given[0], tuple(given[1:]), mask=mask)
    compare(y.movedim(1, -1) if channels_first else y, expected)


@every_crossing
def test_a_tensor_for_both(variant):
    layer, x, context = make(variant), draw(2, 3, 5, 8), draw(2, 4, 2, 8, seed=1)
    y = layer(x, context)
    compare(y, reference.layer(layer, x, context))
    compare(layer(x, (context, context.clone())), y)
    compare(layer(x, x), layer(x))
    assert not torch.allclose(y, layer(x))


@every_grid
@every_crossing
def test_a_summary_is_the_context(variant, sizes):
    if not suits(variant, sizes):
        return
    layer, other, context, mask = make(variant), make(variant), draw(2, *sizes, 8, seed=1), holes(2, *sizes)
    summary = layer.summarize(context, mask=mask)
    for seed in (5, 6):
        x = draw(2, 3, 5, 8, seed=seed)
        direct = layer(x, context, mask=mask)
        assert torch.equal(direct, layer(x, summary)) and torch.equal(direct, other(x, summary))


@every_crossing
def test_summaries_of_parts_merge(variant):
    """A context that comes in parts, as frames do, is summarised part by part: its merged sums are in float64."""
    layer, x, context = make(variant), draw(2, 3, 5, 8), draw(2, 4, 6, 8, seed=1)
    parts = [layer.summarize(part) for part in context.split([1, 3, 2], 2)]
    whole = parts[0].merge(parts[1], mode=1).merge(parts[2], mode=1)
    compare(layer(x, whole), layer(x, context))
    half = layer.float()
    first, second = (half.summarize(part.float()) for part in context.split(3, 2))
    merged = first.merge(second, mode=1)
    assert half(x.float(), merged).dtype == torch.float32
    compare(half(x.float(), merged), half(x.float(), context.float()), rtol=1e-4, atol=1e-5)


@every_crossing
def test_gradients_through_a_summary(variant):
    layer, x = make(variant), draw(2, 3, 5, 8)
    found = []
    for summarised in (False, True):
        context = draw(2, 3, 2, 8, seed=1).requires_grad_()
        seen = layer.summarize(context) if summarised else context
        loss = sum((layer(x + step, seen) * draw(2, 3, 5, 8, seed=step)).sum() for step in (1, 2))
        found.append(torch.autograd.grad(loss, [context, *layer.parameters()]))
    compare(*found, **GRADIENTS)


@pytest.mark.parametrize("variant", CROSSING, ids=str)
@pytest.mark.thorough
def test_derivatives(variant):
    small = make(variant)
    call = lambda x, context: small(x, context, lengths=[2, 1])  # noqa: E731
    assert gradcheck(call, (draw(1, 1, 2, 8).requires_grad_(), draw(1, 2, 2, 8).requires_grad_()))


@some([v for v in CROSSING if not v.by_place])
def test_ragged_contexts_are_cropped_ones(variant):
    layer, x, context = make(variant), draw(2, 3, 5, 8), draw(2, 4, 3, 8, seed=1)
    lengths, poisoned = torch.tensor([[4, 2], [3, 3]]), context.clone()
    poisoned[0, :, 2:], poisoned[1, 3:] = torch.nan, torch.inf
    y = layer(x, poisoned, lengths=lengths)
    parts = [layer(x[b : b + 1], context[b : b + 1, :h, :w]) for b, (h, w) in enumerate(lengths.tolist())]
    compare(y, torch.cat(parts))
    compare(make(variant, "h w")(x, poisoned, lengths={"w": [2, 3], "h": [4, 3]}), y)


@every_crossing
def test_a_context_without_positions_gives_the_bias(variant):
    layer, x, context = make(variant), draw(2, 3, 5, 8), draw(2, 4, 3, 8, seed=1)
    context[0] = torch.nan
    context.requires_grad_()
    for given in ({"lengths": [[0, 4], None]}, {"weights": [torch.tensor([[0.0] * 4, [1.0] * 4]), None]}):
        y = layer(x, context, **given)
        compare(y[0], layer.out_proj.bias.expand_as(y[0]))
        for gradient in torch.autograd.grad(y.sum(), [context, *layer.parameters()]):
            assert gradient.isfinite().all()


def test_skip_and_other_types():
    layer, x, context = make("additive"), draw(2, 3, 5, 8), draw(2, 4, 8, seed=1)
    y = layer(x, context)
    compare(layer(x, context, skip=x), x + y)
    half = layer.to(torch.bfloat16)
    near = half(x.bfloat16(), half.summarize(context.bfloat16()))
    assert near.dtype == torch.bfloat16
    compare(near.double(), y, rtol=0.05, atol=0.1)


def test_what_a_layer_says():
    layer = ta.TensorAttention(8, 2, modes=2, kdim=5, vdim=np.int64(6))
    assert layer.extra_repr() == "embed_dim=8, num_heads=2, modes=2, operator='additive', kdim=5, vdim=6"
    assert (layer.k_proj.weight.shape, layer.v_proj.weight.shape) == ((8, 5), (8, 6))


# ---- messages ------------------------------------------------------------------------------------------------


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


X = zeros(2, 3, 5, 8)
READING = "\n  modes    0 1\n  x        (2, 3, 5, 8)   batch=(2,) 0=3 1=5 C=8"
REFUSED = {
    "missing": (
        {"kdim": 5},
        None,
        {},
        OptionError,
        "context is missing: keys are made of 5 channels and values of 8, but x has 8.",
    ),
    "one for two": (
        {"kdim": 5},
        zeros(2, 4, 5),
        {},
        OptionError,
        "context must be a pair of tensors for keys and values, as kdim is 5 but vdim is 8.",
    ),
    "channels": ({}, zeros(2, 4, 5), {}, ShapeError, "context has 5 channels, but kdim is 8."),
    "channels of values": (
        {"vdim": 5},
        (zeros(2, 4, 8), zeros(2, 4, 8)),
        {},
        ShapeError,
        "context[1] has 8 channels, but vdim is 5.",
    ),
    "three": ({}, (X, X, X), {}, ShapeError, "context has 3 tensors, but a pair of keys and values has 2."),
    "no mode": ({}, zeros(2, 8), {}, ShapeError, "context has 2 dimensions, but one mode needs at least 3."),
    "no tensor": ({}, "words", {}, DtypeError, "context must be a torch.Tensor, got str."),
    "empty": (
        {},
        zeros(2, 0, 8),
        {},
        ShapeError,
        "mode 0 has size 0 in context, but every mode needs at least 1 index.",
    ),
    "batch": ({}, zeros(3, 4, 8), {}, ShapeError, "the batch is 2 in x but 3 in context."),
    "batches": (
        {},
        (zeros(2, 4, 8), zeros(3, 4, 8)),
        {},
        ShapeError,
        "the batch is 2 in context[0] but 3 in context[1].",
    ),
    "sizes": (
        {},
        (zeros(2, 4, 8), zeros(2, 6, 8)),
        {},
        ShapeError,
        "mode 0 has size 4 in context[0] but 6 in context[1].",
    ),
    "orders": (
        {},
        (zeros(2, 4, 8), zeros(2, 6, 3, 8)),
        {},
        ShapeError,
        "context[1] has 4 dimensions, but the layout (B 0 C) has 3.",
    ),
    "type": (
        {},
        zeros(2, 4, 8, dtype=torch.float64),
        {},
        DtypeError,
        "the type is torch.float64 in context but torch.float32 in the parameters.",
    ),
    "own token": (
        {"include_self": True},
        zeros(2, 4, 8),
        {},
        OptionError,
        "context has no meaning with include_self=True: a query has no key of its own in a context.",
    ),
    "causal": (
        {"causal": 0},
        zeros(2, 4, 8),
        {},
        OptionError,
        "context has no meaning with causal: frames of x are not those of a context.",
    ),
    "bias": (
        {"position_bias": ta.AlibiBias(2, modes=2)},
        zeros(2, 4, 8),
        {},
        OptionError,
        "context has no meaning with position_bias: its positions are not those of x.",
    ),
    "turns": (
        {"operator": "flattened", "rotary": ta.RotaryEmbedding(4, modes=2)},
        zeros(2, 4, 8),
        {},
        OptionError,
        "context has no meaning with rotary: its positions are not those of x.",
    ),
    "kept": (
        {"operator": "truncated", "kept": [(0, 1)]},
        zeros(2, 4, 8),
        {},
        OptionError,
        "kept names modes of order 2, but context has order 1.",
    ),
    "mask of x": (
        {},
        zeros(2, 4, 6, 8),
        {"mask": torch.ones(2, 3, 5, dtype=torch.bool)},
        ShapeError,
        "mode 0 has size 3 in mask but 4 in context.",
    ),
    "lengths": (
        {},
        zeros(2, 4, 6, 8),
        {"lengths": [None, [3, 7]]},
        WeightsError,
        "lengths of mode 1 must be from 0 to its size 6, got 7.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_contexts_that_do_not_fit(case):
    settings, context, given, kind, rule = REFUSED[case]
    layer = ta.TensorAttention(8, 2, modes=2, **settings)
    refused(kind, f"TensorAttention: {rule}{READING}", layer, X, context, **given)


SUMMARY = ta.TensorAttention(8, 2, modes=2).summarize(zeros(2, 4, 8))
SUMMARIES = {
    "batch": (
        {},
        zeros(3, 3, 5, 8),
        SUMMARY,
        ShapeError,
        "the batch is (3,) in x but (2,) in the summary of the context.",
    ),
    "moments": (
        {"interaction": "linear"},
        X,
        SUMMARY,
        OptionError,
        "the summary of the context holds no second moments, but interaction='linear' needs them.",
    ),
    "means": (
        {"operator": "flattened"},
        X,
        ta.TensorAttention(8, 2, modes=2).summarize(zeros(2, 4, 3, 8)),
        OptionError,
        "the summary does not hold the means of the kept modes (0, 1).",
    ),
    "channels": (
        {},
        X,
        ta.summarize(zeros(2, 4, 5), zeros(2, 4, 5), order=1),
        ShapeError,
        "the summary of the context has 5 channels, but kdim is 8.",
    ),
}


@pytest.mark.parametrize("case", SUMMARIES)
def test_summaries_that_do_not_fit(case):
    settings, x, summary, kind, rule = SUMMARIES[case]
    shape = tuple(x.shape)
    reading = f"\n  modes    0 1\n  x        {shape}   batch={shape[:1]} 0=3 1=5 C=8"
    refused(kind, f"TensorAttention: {rule}{reading}", ta.TensorAttention(8, 2, modes=2, **settings), x, summary)


def test_what_belongs_to_the_summary():
    layer = ta.TensorAttention(8, 2, modes=2)
    for name, given in (("mask", torch.ones(2, 4).bool()), ("lengths", [3]), ("weights", [torch.ones(4)])):
        rule = f"{name} has no meaning with a summary of the context: give it to summarize."
        refused(OptionError, f"TensorAttention: {rule}{READING}", layer, X, SUMMARY, **{name: given})
    wide = layer.summarize(zeros(2, 4, 3, 8)).merge(layer.summarize(zeros(2, 4, 3, 8)), mode=1)
    assert layer(X, wide).dtype == torch.float32  # what is merged is in float64
    narrow = ta.TensorAttention(8, 2, modes=2, dtype=torch.bfloat16)
    assert narrow(X.bfloat16(), SUMMARY).dtype == torch.bfloat16


@pytest.mark.parametrize("name", [name for name, operator in OPERATORS.items() if operator.query == "grid"])
def test_operators_on_the_grid_of_the_keys(name):
    rule = f"has no meaning for operator {name!r}: its queries stand on the grid of the keys."
    layer = ta.TensorAttention(8, 2, modes=2, operator=name)
    refused(OptionError, f"TensorAttention: context {rule}{READING}", layer, X, X)
    refused(OptionError, f"TensorAttention.summarize: context {rule}", layer.summarize, X)
    for dims in ("kdim", "vdim"):
        told = f"TensorAttention: {dims} {rule}"
        refused(OptionError, told, ta.TensorAttention, 8, 2, modes=2, operator=name, **{dims: 8})
