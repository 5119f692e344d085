"""Cross-attention: a context on another grid and of another order, against the oracle; summaries used again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

import tensorattn as ta
from tensorattn import reference
from tensorattn.operators import OPERATORS
from tensorattn.testing.variants import variants

CLOSE = {"rtol": 1e-10, "atol": 1e-12}
CROSSING = [v for v in variants() if v.operator.query == "positions" and not v.options.get("include_self")]
GRIDS = [(4,), (3, 4), (2, 3, 4), (2, 2, 3, 2)]

every_variant = pytest.mark.parametrize("variant", CROSSING, ids=str)
every_grid = pytest.mark.parametrize("sizes", GRIDS, ids=str)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(variant=CROSSING[0], modes=2, **settings):
    options = dict(variant.options)
    layer = ta.TensorAttention(8, 2, modes=modes, operator=variant.name, dtype=torch.float64, **options | settings)
    with torch.no_grad():
        for seed, parameter in enumerate(layer.parameters()):
            parameter.copy_(0.5 * draw(*parameter.shape, seed=seed) if parameter.dim() != 1 else 1 + 0.1 * seed)
    return layer


def suits(variant, sizes):
    """Whether the options of a variant have a meaning for a context: kept modes are those of the layer."""
    return "kept" not in variant.options or len(sizes) == 2


def holes(*shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(3)) > 0.3
    mask.view(shape[0], -1)[:, 0] = True
    return mask


def by_oracle(variant, layer, x, key, value, weights=None):
    """The definition, channels last: project everything, attend by the oracle, project back."""
    heads = lambda t: t.unflatten(-1, (2, -1)).movedim(-2, 1).detach().numpy()  # noqa: E731
    order = key.dim() - 2
    options = dict(variant.options)
    if variant.name == "truncated" and not {"kept", "interaction_order"} & options.keys():
        options["interaction_order"] = min(2, order)
    function = getattr(reference, variant.operator.function.__name__)
    tensors = [
        heads(linear(t)) for linear, t in zip((layer.q_proj, layer.k_proj, layer.v_proj), (x, key, value), strict=True)
    ]
    output = function(*tensors, order=order, weights=weights, **options)[0]
    if layer.interaction_gain is not None:
        plain = function(*tensors, order=order, weights=weights, **options | {"interaction": None})[0]
        gain = layer.interaction_gain.detach().numpy().reshape(1, 2, *(1,) * (output.ndim - 2))
        output = plain + gain * (output - plain)
    return layer.out_proj(torch.from_numpy(output).movedim(1, -2).flatten(-2))


@pytest.mark.parametrize("channels_first", [False, True], ids=["last", "first"])
@every_grid
@every_variant
def test_against_the_oracle(variant, sizes, channels_first):
    if not suits(variant, sizes):
        pytest.skip("kept names the modes of the layer")
    layer = make(variant, channels_first=channels_first, kdim=5, vdim=6)
    x, key, value = draw(2, 3, 5, 8), draw(2, *sizes, 5, seed=1), draw(2, *sizes, 6, seed=2)
    mask = holes(2, *sizes)
    context = [t.masked_fill(~mask.unsqueeze(-1), float("nan")) for t in (key, value)]
    given = [x, *context]
    if channels_first:
        given = [t.movedim(-1, 1) for t in given]
    y = layer(given[0], tuple(given[1:]), mask=mask)
    y = y.movedim(1, -1) if channels_first else y
    weights = mask.numpy().astype(float)[:, None]
    if len(sizes) == 1:
        weights = [weights]
    clean = [t.masked_fill(~mask.unsqueeze(-1), 0.0) for t in (key, value)]
    torch.testing.assert_close(y, by_oracle(variant, layer, x, *clean, weights), **CLOSE)


@every_variant
def test_a_tensor_for_both(variant):
    layer, x, context = make(variant), draw(2, 3, 5, 8), draw(2, 4, 2, 8, seed=1)
    y = layer(x, context)
    torch.testing.assert_close(y, by_oracle(variant, layer, x, context, context), **CLOSE)
    torch.testing.assert_close(layer(x, (context, context.clone())), y, **CLOSE)
    torch.testing.assert_close(layer(x, x), layer(x), **CLOSE)
    assert not torch.allclose(y, layer(x))


@every_grid
@every_variant
def test_a_summary_is_the_context(variant, sizes):
    if not suits(variant, sizes):
        pytest.skip("kept names the modes of the layer")
    layer, other = make(variant), make(variant)
    context, mask = draw(2, *sizes, 8, seed=1), holes(2, *sizes)
    summary = layer.summarize(context, mask=mask)
    for seed in (5, 6):
        x = draw(2, 3, 5, 8, seed=seed)
        direct, again = layer(x, context, mask=mask), layer(x, summary)
        assert torch.equal(direct, again)
        assert torch.equal(other(x, summary), direct)


@every_variant
def test_gradients_through_a_summary(variant):
    layer, x = make(variant), draw(2, 3, 5, 8)
    contexts = [draw(2, 3, 2, 8, seed=1).requires_grad_() for _ in range(2)]
    grads = []
    for context, seen in ((contexts[0], contexts[0]), (contexts[1], layer.summarize(contexts[1]))):
        loss = sum((layer(x + step, seen) * draw(2, 3, 5, 8, seed=step)).sum() for step in (1, 2))
        grads.append(torch.autograd.grad(loss, [context, *layer.parameters()]))
    torch.testing.assert_close(*grads, **CLOSE)
    small = make(variant)
    call = lambda x, context: small(x, context, lengths=[2, 1])  # noqa: E731
    assert gradcheck(call, (draw(1, 1, 2, 8).requires_grad_(), draw(1, 2, 2, 8).requires_grad_()))


@every_variant
def test_ragged_contexts_are_cropped_ones(variant):
    layer, x, context = make(variant), draw(2, 3, 5, 8), draw(2, 4, 3, 8, seed=1)
    lengths = torch.tensor([[4, 2], [3, 3]])
    poisoned = context.clone()
    poisoned[0, :, 2:] = float("nan")
    poisoned[1, 3:] = float("inf")
    y = layer(x, poisoned, lengths=lengths)
    parts = [layer(x[b : b + 1], context[b : b + 1, :h, :w]) for b, (h, w) in enumerate(lengths.tolist())]
    torch.testing.assert_close(y, torch.cat(parts), **CLOSE)
    by_name = make(variant, modes="h w")
    torch.testing.assert_close(by_name(x, poisoned, lengths={"w": [2, 3], "h": [4, 3]}), y, **CLOSE)


@every_variant
def test_a_context_without_positions_gives_the_bias(variant):
    layer, x, context = make(variant), draw(2, 3, 5, 8), draw(2, 4, 3, 8, seed=1)
    context[0] = float("nan")
    context.requires_grad_()
    y = layer(x, context, lengths=[[0, 4], None])
    torch.testing.assert_close(y[0], layer.out_proj.bias.expand_as(y[0]), **CLOSE)
    for grad in torch.autograd.grad(y.sum(), [context, *layer.parameters()]):
        assert grad.isfinite().all()


def test_skip_and_out_and_other_types():
    layer, x, context = make(), draw(2, 3, 5, 8), draw(2, 4, 8, seed=1)
    with torch.no_grad():
        y, out = layer(x, context), torch.empty_like(x)
        torch.testing.assert_close(layer(x, context, skip=x), x + y, **CLOSE)
        assert layer(x, context, skip=x, out=out) is out
        torch.testing.assert_close(out, x + y, **CLOSE)
        half = layer.to(torch.bfloat16)
        near = half(x.bfloat16(), half.summarize(context.bfloat16()))
        assert near.dtype == torch.bfloat16
        torch.testing.assert_close(near.double(), y, rtol=0.05, atol=0.1)


def test_compiles():
    torch._dynamo.reset()
    layer, x, context = make(), draw(2, 3, 5, 8), draw(2, 4, 2, 3, 8, seed=1)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    mask = holes(2, 4, 2, 3)
    torch.testing.assert_close(compiled(x, context, mask=mask), layer(x, context, mask=mask), **CLOSE)
    torch._dynamo.reset()


def test_what_a_layer_says():
    layer = ta.TensorAttention(8, 2, modes=2, kdim=5, vdim=np.int64(6))
    assert layer.extra_repr() == "embed_dim=8, num_heads=2, modes=2, operator='additive', kdim=5, vdim=6"
    assert layer.k_proj.weight.shape == (8, 5)
    assert layer.v_proj.weight.shape == (8, 6)


GRIDDED = [name for name, operator in OPERATORS.items() if operator.query == "grid"]
READING = "\n  modes    0 1\n  x        (2, 3, 5, 8)   batch=(2,) 0=3 1=5 C=8"


@pytest.mark.parametrize("name", GRIDDED)
def test_operators_on_the_grid_of_the_keys(name):
    rule = f"has no meaning for operator {name!r}: its queries stand on the grid of the keys."
    layer = ta.TensorAttention(8, 2, modes=2, operator=name)
    refused(ta.OptionError, f"TensorAttention: context {rule}{READING}", layer, zeros(2, 3, 5, 8), zeros(2, 3, 5, 8))
    refused(ta.OptionError, f"TensorAttention.summarize: context {rule}", layer.summarize, zeros(2, 3, 5, 8))
    for dims in ("kdim", "vdim"):
        told = f"TensorAttention: {dims} {rule}"
        refused(ta.OptionError, told, ta.TensorAttention, 8, 2, modes=2, operator=name, **{dims: 8})


def refused(kind, message, function, *args, **kwargs):
    with pytest.raises(kind) as error:
        function(*args, **kwargs)
    assert str(error.value) == message


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


X = zeros(2, 3, 5, 8)
REFUSED = {
    "missing": (
        {"kdim": 5},
        None,
        {},
        ta.OptionError,
        "context is missing: keys are made of 5 channels and values of 8, but x has 8.",
    ),
    "one for two": (
        {"kdim": 5},
        zeros(2, 4, 5),
        {},
        ta.OptionError,
        "context must be a pair of tensors for keys and values, as kdim is 5 but vdim is 8.",
    ),
    "channels": ({}, zeros(2, 4, 5), {}, ta.ShapeError, "context has 5 channels, but kdim is 8."),
    "channels of values": (
        {"vdim": 5},
        (zeros(2, 4, 8), zeros(2, 4, 8)),
        {},
        ta.ShapeError,
        "context[1] has 8 channels, but vdim is 5.",
    ),
    "three": ({}, (X, X, X), {}, ta.ShapeError, "context has 3 tensors, but a pair of keys and values has 2."),
    "no mode": ({}, zeros(2, 8), {}, ta.ShapeError, "context has 2 dimensions, but one mode needs at least 3."),
    "no tensor": ({}, "words", {}, ta.DtypeError, "context must be a torch.Tensor, got str."),
    "empty": (
        {},
        zeros(2, 0, 8),
        {},
        ta.ShapeError,
        "mode 0 has size 0 in context, but every mode needs at least 1 index.",
    ),
    "batch": ({}, zeros(3, 4, 8), {}, ta.ShapeError, "the batch is 2 in x but 3 in context."),
    "batches": (
        {},
        (zeros(2, 4, 8), zeros(3, 4, 8)),
        {},
        ta.ShapeError,
        "the batch is 2 in context[0] but 3 in context[1].",
    ),
    "sizes": (
        {},
        (zeros(2, 4, 8), zeros(2, 6, 8)),
        {},
        ta.ShapeError,
        "mode 0 has size 4 in context[0] but 6 in context[1].",
    ),
    "orders": (
        {},
        (zeros(2, 4, 8), zeros(2, 6, 3, 8)),
        {},
        ta.ShapeError,
        "context[1] has 4 dimensions, but the layout (B 0 C) has 3.",
    ),
    "type": (
        {},
        zeros(2, 4, 8, dtype=torch.float64),
        {},
        ta.DtypeError,
        "the type is torch.float64 in context but torch.float32 in the parameters.",
    ),
    "own token": (
        {"include_self": True},
        zeros(2, 4, 8),
        {},
        ta.OptionError,
        "context has no meaning with include_self=True: a query has no key of its own in a context.",
    ),
    "causal": (
        {"causal": 0},
        zeros(2, 4, 8),
        {},
        ta.OptionError,
        "context has no meaning with causal: frames of x are not those of a context.",
    ),
    "kept": (
        {"operator": "truncated", "kept": [(0, 1)]},
        zeros(2, 4, 8),
        {},
        ta.OptionError,
        "kept names modes of order 2, but context has order 1.",
    ),
    "mask of x": (
        {},
        zeros(2, 4, 6, 8),
        {"mask": torch.ones(2, 3, 5, dtype=torch.bool)},
        ta.ShapeError,
        "mode 0 has size 3 in mask but 4 in context.",
    ),
    "lengths": (
        {},
        zeros(2, 4, 6, 8),
        {"lengths": [None, [3, 7]]},
        ta.WeightsError,
        "lengths of mode 1 must be from 0 to its size 6, got 7.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_messages(case):
    settings, context, given, kind, rule = REFUSED[case]
    layer = ta.TensorAttention(8, 2, modes=2, **settings)
    refused(kind, f"TensorAttention: {rule}{READING}", layer, X, context, **given)


def test_messages_of_summaries():
    layer = ta.TensorAttention(8, 2, modes=2)
    summary = layer.summarize(zeros(2, 4, 8))
    linear = ta.TensorAttention(8, 2, modes=2, interaction="linear")
    cases = [
        (layer, zeros(3, 3, 5, 8), summary, {}, ta.ShapeError, "the batch is (3,) in x but (2,) in the summary of the "
         "context."),
        (linear, X, summary, {}, ta.OptionError, "the summary of the context holds no second moments, but "
         "interaction='linear' needs them."),
        (ta.TensorAttention(8, 2, modes=2, operator="flattened"), X, layer.summarize(zeros(2, 4, 3, 8)), {},
         ta.OptionError, "the summary holds the kept modes ((0,), (1,), ()), but not (0, 1)."),
        (layer, X, ta.summarize(zeros(2, 4, 5), zeros(2, 4, 5), order=1), {}, ta.ShapeError,
         "the summary of the context has 5 channels, but kdim is 8."),
        (layer, X, ta.summarize(zeros(2, 4, 8).double(), zeros(2, 4, 8).double(), order=1), {}, ta.DtypeError,
         "the type is torch.float32 in x but torch.float64 in the summary of the context."),
    ]  # fmt: skip
    for name, given in (("mask", torch.ones(2, 4).bool()), ("lengths", [3]), ("weights", [torch.ones(4)])):
        rule = f"{name} has no meaning with a summary of the context: give it to summarize."
        cases.append((layer, X, summary, {name: given}, ta.OptionError, rule))
    for module, x, context, given, kind, rule in cases:
        shape = tuple(x.shape)
        reading = f"\n  modes    0 1\n  x        {shape}   batch={shape[:1]} 0=3 1=5 C=8"
        refused(kind, f"TensorAttention: {rule}{reading}", module, x, context, **given)


def test_messages_of_the_constructor():
    for name in ("kdim", "vdim"):
        refused(ta.OptionError, f"TensorAttention: {name} must be at least 1, got 0.", ta.TensorAttention, 8, 2,
                modes=2, **{name: 0})  # fmt: skip
        told = f"TensorAttention: {name} has no meaning with causal: frames of x are not those of a context."
        refused(ta.OptionError, told, ta.TensorAttention, 8, 2, modes=2, causal=0, **{name: 4})
