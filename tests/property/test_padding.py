"""A padded batch is each of its samples cropped: outputs and gradients, whatever the padding holds.

For every operator, orders 1 to 4, both layouts, and the mask said in three ways. A mask that is no product over modes
is no crop; of it holds that nothing of the padding gets anywhere.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tensorattn as ta
from tensorattn.testing.variants import variants

VARIANTS = variants()
CHANNELS, HEADS = 4, 2
EXACT = {"rtol": 1e-9, "atol": 1e-11}
POISONS = (1e6, -1e300, math.inf, -math.inf, math.nan)

FEW = ("additive interaction=linear", "kronecker_sum pool=sum")  # by default
SOME = [pytest.param(v, id=str(v), marks=() if str(v) in FEW else pytest.mark.thorough) for v in VARIANTS]
every_variant = pytest.mark.parametrize("variant", SOME)
# Of a padded grid blocks are others than those of the cropped one.
of_any_place = pytest.mark.parametrize("variant", [v for v in SOME if not v.values[0].by_place])


@st.composite
def batches(draw, ragged=True):
    """Sizes of a padded batch, the lengths of its samples, and a seed."""
    sizes = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    samples = draw(st.integers(1, 3))
    lengths = [[draw(st.integers(1, size)) for size in sizes] for _ in range(samples)]
    return sizes, torch.tensor(lengths), draw(st.integers(0, 10**6))


def make(variant, order, seed, channels_first, kind=ta.TensorAttention):
    """A layer with all parameters drawn, biases too."""
    layer = kind(
        CHANNELS,
        HEADS,
        modes=order,
        operator=variant.name,
        dtype=torch.float64,
        channels_first=channels_first,
        **variant.options,
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return layer


def fits(variant, order):
    return all(mode < order for kept in variant.options.get("kept", ()) for mode in kept)


def drawn(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(layer, x, **told):
    """Run a layer on channels last, whatever its layout."""
    if not layer.channels_first:
        return layer(x, **told)
    return layer(x.movedim(-1, 1), **told).movedim(1, -1)


def told_as(way, mask, lengths, sizes):
    if way == "lengths":
        return {"lengths": lengths}
    if way == "one a mode":
        return {"lengths": dict(enumerate(lengths.unbind(-1)))}
    return {"mask": mask}


@of_any_place
@given(batches(), st.sampled_from(POISONS), st.booleans(), st.sampled_from(["lengths", "one a mode", "mask"]))
def test_padded_is_cropped(variant, batch, poison, channels_first, way):
    sizes, lengths, seed = batch
    if not fits(variant, len(sizes)):
        return
    layer = make(variant, len(sizes), seed, channels_first)
    x, wanted = (drawn(len(lengths), *sizes, CHANNELS, seed=seed + place) for place in (1, 2))
    boxes = [(sample, *(slice(0, length) for length in row)) for sample, row in enumerate(lengths.tolist())]
    mask = torch.zeros(len(lengths), *sizes, dtype=torch.bool)
    for box in boxes:
        mask[box] = True
    cropped = [x[box].unsqueeze(0).requires_grad_() for box in boxes]
    outputs = [run(layer, part)[0] for part in cropped]
    padded = x.masked_fill(~mask.unsqueeze(-1), poison).requires_grad_()
    output = run(layer, padded, **told_as(way, mask, lengths, sizes))
    assert (output[~mask] == 0).all()
    for box, part in zip(boxes, outputs, strict=True):
        torch.testing.assert_close(output[box], part, **EXACT)
    loss = sum((part * wanted[box]).sum() for box, part in zip(boxes, outputs, strict=True))
    theirs = torch.autograd.grad(loss, [*cropped, *layer.parameters()], allow_unused=True)
    ours = torch.autograd.grad((output * wanted).sum(), [padded, *layer.parameters()], allow_unused=True)
    assert (ours[0][~mask] == 0).all()
    for box, grad in zip(boxes, theirs, strict=False):
        torch.testing.assert_close(ours[0][box], grad[0], **EXACT)
    for our, their in zip(ours[1:], theirs[len(boxes) :], strict=True):
        assert (our is None) == (their is None)
        if our is not None:
            torch.testing.assert_close(our, their, rtol=1e-8, atol=1e-9 * (1 + their.abs().max().item()))


@every_variant
@given(st.data(), batches(), st.sampled_from(POISONS), st.booleans())
def test_nothing_of_the_padding_gets_anywhere(variant, data, batch, poison, channels_first):
    sizes, lengths, seed = batch
    if not fits(variant, len(sizes)):
        return
    layer = make(variant, len(sizes), seed, channels_first)
    shape = (len(lengths), *sizes)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < data.draw(
        st.sampled_from([0.2, 0.5, 0.9])
    )
    x, wanted = (drawn(*shape, CHANNELS, seed=seed + place) for place in (1, 2))
    results = []
    for filled in (0.0, poison):
        padded = x.masked_fill(~mask.unsqueeze(-1), filled).requires_grad_()
        output = run(layer, padded, mask=mask)
        grads = torch.autograd.grad((output * wanted).sum(), [padded, *layer.parameters()], allow_unused=True)
        results.append([output, *(grad for grad in grads if grad is not None)])
    for one, two in zip(*results, strict=True):
        assert two.isfinite().all()
        assert torch.equal(one, two)
    assert (results[0][0][~mask] == 0).all()
    empty = ~mask.flatten(1).any(-1)
    assert (results[0][0][empty] == 0).all()


@pytest.mark.parametrize("checkpoint", [False, True])
@of_any_place
@settings(max_examples=5)
@given(batches(), st.sampled_from(POISONS), st.booleans())
def test_blocks(variant, checkpoint, batch, poison, channels_first):
    sizes, lengths, seed = batch
    if not fits(variant, len(sizes)):
        return
    block = make(variant, len(sizes), seed, channels_first, ta.TensorTransformerBlock)
    block.checkpoint = checkpoint
    x = drawn(len(lengths), *sizes, CHANNELS, seed=seed + 1)
    boxes = [(sample, *(slice(0, length) for length in row)) for sample, row in enumerate(lengths.tolist())]
    mask = torch.zeros(len(lengths), *sizes, dtype=torch.bool)
    for box in boxes:
        mask[box] = True
    output = run(block, x.masked_fill(~mask.unsqueeze(-1), poison), lengths=lengths)
    parts = [run(block, x[box].unsqueeze(0))[0] for box in boxes]
    for box, part in zip(boxes, parts, strict=True):
        torch.testing.assert_close(output[box], part, **EXACT)
    ours = torch.autograd.grad(output[mask].sum(), list(block.parameters()), allow_unused=True)
    theirs = torch.autograd.grad(sum(part.sum() for part in parts), list(block.parameters()), allow_unused=True)
    for our, their in zip(ours, theirs, strict=True):
        assert (our is None) == (their is None)
        if our is not None:
            torch.testing.assert_close(our, their, rtol=1e-8, atol=1e-9 * (1 + their.abs().max().item()))


@pytest.mark.parametrize("channels_first", [False, True])
@pytest.mark.parametrize("poison", POISONS)
def test_models(poison, channels_first):
    config = ta.TensorTransformerConfig(
        modes="h w", in_channels=2, embed_dim=8, num_heads=2, depth=2, patch=(2, 3), pad=True, out_channels=1,
        channels_first=channels_first,
    )  # fmt: skip
    model = ta.TensorTransformer(config, dtype=torch.float64)
    x = drawn(2, 7, 9, 2, seed=1)  # four patches by three
    padded = x.clone()
    padded[0, 4:], padded[1, :, 6:] = poison, poison
    model.channels_first = channels_first
    output = run(model, padded, lengths={"h": [2, 4], "w": [3, 2]})
    first, second = run(model, x[:1, :4])[0], run(model, x[1:, :, :6])[0]
    torch.testing.assert_close(output[0, :4], first, **EXACT)
    torch.testing.assert_close(output[1, :, :6], second, **EXACT)
    ours = torch.autograd.grad(output[0, :4].sum() + output[1, :, :6].sum(), list(model.parameters()))
    theirs = torch.autograd.grad(first.sum() + second.sum(), list(model.parameters()))
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-8, atol=1e-9 * (1 + their.abs().max().item()))


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("variant", [v for v in SOME if "causal" not in v.values[0].lacks])
def test_streams(variant, window):
    layer = ta.TensorAttention(
        CHANNELS, HEADS, modes="t w", operator=variant.name, causal="t", dtype=torch.float64, **variant.options
    )
    x = drawn(2, 5, 4, CHANNELS, seed=3)
    frames, columns = torch.tensor([5, 3]), torch.tensor([2, 4])
    here = (torch.arange(5) < frames[:, None]).unsqueeze(-1) & (torch.arange(4) < columns[:, None]).unsqueeze(1)
    x = x.masked_fill(~here.unsqueeze(-1), math.nan)
    stream, outputs = ta.AttentionStream(layer, window=window), []
    for start in range(0, 5, 2):
        part = x[:, start : start + 2]
        left = (frames - start).clamp(0, part.shape[1])
        outputs.append(stream(part, lengths={"t": left, "w": columns}))
    ours = torch.cat(outputs, 1)
    assert (ours[~here] == 0).all()
    for sample, (t, w) in enumerate(zip(frames.tolist(), columns.tolist(), strict=True)):
        alone = ta.AttentionStream(layer, window=window)(x[sample : sample + 1, :t, :w])
        torch.testing.assert_close(ours[sample : sample + 1, :t, :w], alone, **EXACT)
    if window is None:
        torch.testing.assert_close(ours, layer(x, lengths=torch.stack([frames, columns], -1)), **EXACT)
    for name, given_ in (("mask", {"mask": here}), ("context", {"context": x})):
        with pytest.raises(ta.OptionError, match=f"{name} has no meaning in a stream"):
            ta.ModuleStream(layer)(x, **given_)


def test_the_test_can_fail():
    variant = VARIANTS[0]
    layer = make(variant, 2, 0, False)
    x = drawn(1, 3, 4, CHANNELS, seed=1)
    assert not torch.allclose(layer(x, lengths=[2, 3])[:, :2, :3], layer(x)[:, :2, :3])
    assert not layer(x.masked_fill(torch.arange(4)[:, None] > 2, math.nan)).isfinite().all()
