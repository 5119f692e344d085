"""A stream is the whole tensor: for any order, causal mode, operator, weights, and any way to cut time into chunks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tensorattn as ta
from tensorattn.testing import mode_sizes
from tensorattn.testing.strategies import tensors
from tensorattn.testing.variants import variants


@st.composite
def streamed(draw, variant):
    """A layer, an input, weights of its modes or None, the sizes of chunks, and a window or None."""
    at_least = max((mode for kept in variant.options.get("kept", ()) for mode in kept), default=0) + 1
    sizes = draw(st.integers(at_least, 4).flatmap(lambda order: mode_sizes(order=order, max_positions=40)))
    causal = draw(st.integers(0, len(sizes) - 1))
    first = draw(st.booleans())
    layer = ta.TensorAttention(
        4, 2, modes=len(sizes), causal=causal, operator=variant.name, channels_first=first, dtype=torch.float64,
        **variant.options,
    )  # fmt: skip
    with torch.no_grad():
        for stream, parameter in enumerate(layer.parameters()):
            parameter.copy_(draw(tensors(parameter.shape, stream=stream)))
    x = draw(tensors((2, *((4, *sizes) if first else (*sizes, 4))), stream=100))
    weights = None
    if draw(st.booleans()):
        entries = st.sampled_from([0.0, 0.5, 1.0, 3.0])
        vectors = [draw(st.none() | st.lists(entries, min_size=n, max_size=n).filter(any)) for n in sizes]
        weights = [None if v is None else torch.tensor(v, dtype=torch.float64) for v in vectors]
    cuts = sorted(draw(st.sets(st.integers(1, sizes[causal] - 1), max_size=3))) if sizes[causal] > 1 else []
    chunks = [end - start for start, end in zip([0, *cuts], [*cuts, sizes[causal]], strict=True)]
    return layer, x, weights, chunks, draw(st.none() | st.integers(1, 5))


FEW = ("additive interaction=linear", "axial")  # by default
SOME = [
    pytest.param(v, id=str(v), marks=() if str(v) in FEW else pytest.mark.thorough)
    for v in variants()
    if "causal" not in v.lacks
]


@pytest.mark.parametrize("variant", SOME)
@given(data=st.data())
def test_a_stream_is_the_whole_tensor(variant, data):
    layer, x, weights, chunks, window = data.draw(streamed(variant))
    dim, mode = layer.causal + (2 if layer.channels_first else 1), layer.causal

    def cut(start, count):
        own = weights and [
            w[start : start + count] if k == mode and w is not None else w for k, w in enumerate(weights)
        ]
        return x.narrow(dim, start, count), own

    stream, outputs, start = ta.AttentionStream(layer, window=window), [], 0
    for count in chunks:
        chunk, own = cut(start, count)
        outputs.append(stream(chunk, weights=own))
        start += count
    if window is None:
        expected = layer(x, weights=weights)
    else:
        parts = []
        for end in range(1, start + 1):
            chunk, own = cut(max(0, end - window), min(window, end))
            parts.append(ta.AttentionStream(layer)(chunk, weights=own).narrow(dim, -1, 1))
        expected = torch.cat(parts, dim)
    torch.testing.assert_close(torch.cat(outputs, dim), expected, rtol=1e-9, atol=1e-9)
