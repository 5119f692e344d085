"""Streams against whole tensors: every operator and option, chunks of any size, weights, windows, states, modules."""

from __future__ import annotations

import copy
import functools
import io
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from modules import draw, refused

import tensorattn as ta
from nn.layers import CAUSAL, DEFAULTS, compare, make, more, some
from tensorattn.errors import DtypeError, OptionError, ShapeError, WeightsError
from tensorattn.testing import mode_sizes
from tensorattn.testing.strategies import tensors
from tensorattn.testing.variants import Variant

OLD = Path(__file__).parent / "data" / "streams_0_1.pt"
BOTH = Variant("additive", {"interaction": "linear", "include_self": True})
LIGHT = [v for v in CAUSAL if v in DEFAULTS and v.name in ("additive", "kao_kv")]

every_causal = some([*CAUSAL, BOTH])
one_a_kind = some([v for v in CAUSAL if v in DEFAULTS or v.options == {"interaction": "linear"}])


def feed(stream, x, dim, sizes, weights=None):
    """Feed chunks, the weights of frames along with them."""
    mode, outputs, start = stream.layer.causal, [], 0
    for chunk in x.split(sizes, dim):
        end = start + chunk.shape[dim]
        own = weights and [w[..., start:end] if k == mode and w is not None else w for k, w in enumerate(weights)]
        outputs.append(stream(chunk, weights=own))
        start = end
    return torch.cat(outputs, dim)


def windowed(layer, x, dim, window, weights=None):
    """The layer on the last frames alone, for each frame."""
    outputs = []
    for end in range(1, x.shape[dim] + 1):
        start = max(0, end - window)
        own = weights and [
            w[..., start:end] if k == layer.causal and w is not None else w for k, w in enumerate(weights)
        ]
        outputs.append(layer(x.narrow(dim, start, end - start), weights=own).narrow(dim, -1, 1))
    return torch.cat(outputs, dim)


def video(variant, seed=0, **settings):
    return make(variant, "h t", causal="t", **settings), draw(2, 3, 6, 8, seed=seed)


@every_causal
class TestEqualsTheWholeTensor:
    def test_in_chunks(self, variant):
        layer, x = video(variant)
        frames = draw(2, 6).sigmoid()
        frames[0, 0], frames[1, :2], frames[:, 3] = 0, 0, 0  # absent first frames, of one sample more than of another
        for weights in (None, [draw(2, 3).sigmoid(), frames]):
            expected = layer(x, weights=weights)
            for sizes in (1, [2, 1, 3], 6):
                compare(feed(ta.AttentionStream(layer), x, 2, sizes, weights), expected)

    @pytest.mark.parametrize("modes", more("h t w", "t", "t h", "h t", "t h w", "a b c t"))
    @pytest.mark.parametrize("first", [False, True], ids=["last", "first"])
    def test_of_any_order_and_layout(self, variant, modes, first):
        if variant.options.get("kept") and modes == "t":
            return  # it keeps two modes
        layer = make(variant, modes, causal="t", channels_first=first)
        x, dim = (
            draw(2, *(5 if name == "t" else 2 + k % 2 for k, name in enumerate(modes.split())), 8),
            layer.causal + 1,
        )
        x, dim = (x.movedim(-1, 1), dim + 1) if first else (x, dim)
        for sizes in (1, [2, 3]):
            compare(feed(ta.AttentionStream(layer), x, dim, sizes), layer(x))

    @pytest.mark.parametrize("window", more(2, 1, 4, 9))
    def test_of_the_last_frames(self, variant, window):
        layer, x = video(variant)
        for weights in (None, [None, draw(2, 6).sigmoid() + 0.1]):
            expected = windowed(layer, x, 2, window, weights)
            for sizes in (1, [2, 1, 3]):
                compare(feed(ta.AttentionStream(layer, window=window), x, 2, sizes, weights), expected)

    @pytest.mark.parametrize("window", [None, 3])
    def test_gradients(self, variant, window):
        layer, x = video(variant)
        wanted = [x.requires_grad_(), *layer.parameters()]
        whole = layer(x) if window is None else windowed(layer, x, 2, window)
        fed = feed(ta.AttentionStream(layer, window=window), x, 2, [1, 2, 3])
        gradients = (torch.autograd.grad((y * draw(*x.shape, seed=1)).sum(), wanted) for y in (whole, fed))
        compare(*gradients, rtol=1e-8, atol=1e-10)

    def test_no_frame_sees_a_later_one(self, variant):
        layer, x = video(variant)
        poisoned = x.clone()
        poisoned[:, :, 4:] = torch.nan
        for window in (None, 2):
            y = ta.AttentionStream(layer, window=window)(poisoned)
            compare(y[:, :, :4], ta.AttentionStream(layer, window=window)(x[:, :, :4]))

    def test_forgets_what_leaves_the_window(self, variant):
        layer, x = video(variant)
        x[:, :, 0] = torch.nan
        assert feed(ta.AttentionStream(layer, window=2), x, 2, 1)[:, :, 2:].isfinite().all()

    def test_with_lengths_and_a_skip(self, variant):
        layer, x, other = video(variant, channels_first=True)[0], draw(2, 8, 3, 6), draw(2, 8, 3, 6, seed=3)
        stream, lengths = ta.AttentionStream(layer), {"h": torch.tensor([2, 3])}
        parts = [stream(x[..., p], lengths=lengths, skip=other[..., p]) for p in (slice(2), slice(2, 6))]
        compare(torch.cat(parts, -1), layer(x, lengths=lengths) + other)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_in_other_types(self, variant, dtype):
        layer, x = make(variant, "h t", causal="t", dtype=dtype), draw(2, 3, 6, 8, dtype=dtype)
        y, whole = feed(ta.AttentionStream(layer), x, 2, [1, 2, 3]), copy.deepcopy(layer).double()(x.double())
        assert y.dtype == dtype
        error, usual = ((z.double() - whole).abs().max() for z in (y, layer(x)))
        assert error <= 2 * usual + 4 * torch.finfo(dtype).eps * whole.abs().max()


@one_a_kind
@pytest.mark.parametrize("window", [None, 3])
class TestState:
    def test_saved_and_loaded(self, variant, window):
        layer, x = video(variant)
        weights, file = [draw(2, 3).sigmoid(), draw(2, 6).sigmoid()], io.BytesIO()
        early, late = ([weights[0], weights[1][:, part]] for part in (slice(4), slice(4, 6)))
        stream, twin = (ta.AttentionStream(layer, window=window) for _ in range(2))
        stream(x[:, :, :4], weights=early)
        torch.save(stream.state_dict(), file)
        file.seek(0)
        twin.load_state_dict(torch.load(file, weights_only=True))
        assert (twin.frames, twin.nbytes) == (4, stream.nbytes)
        assert torch.equal(twin(x[:, :, 4:], weights=late), stream(x[:, :, 4:], weights=late))

    def test_reset(self, variant, window):
        layer, x = video(variant)
        stream, twin = (ta.AttentionStream(layer, window=window) for _ in range(2))
        first = stream(x)
        assert stream.frames == 6
        stream.reset()
        assert (stream.frames, stream.nbytes) == (0, 0)
        twin.load_state_dict(stream.state_dict())
        assert twin.frames == 0
        stream(draw(1, 2, 1, 8))
        stream.reset()
        assert torch.equal(stream(x), first)

    def test_detach(self, variant, window):
        layer, x = video(variant)
        early, stream = x[:, :, :2].clone().requires_grad_(), ta.AttentionStream(layer, window=window)
        stream(early)
        assert torch.autograd.grad(stream(x[:, :, 2:3]).sum(), early)[0].abs().sum() > 0
        stream.detach()
        found = torch.autograd.grad(stream(x[:, :, 3:4]).sum(), [early, layer.v_proj.weight], allow_unused=True)
        assert found[0] is None and found[1] is not None

    def test_moves(self, variant, window):
        layer, x = video(variant)
        expected = feed(ta.AttentionStream(layer, window=window), x, 2, [4, 2])[:, :, 4:]
        stream = ta.AttentionStream(layer, window=window)
        stream(x[:, :, :4])
        assert stream.to("meta") is stream
        assert all(tensor.is_meta for tensor in stream.state_dict()["tensors"].values())
        stream.reset()
        stream(x[:, :, :4])
        layer.float()
        narrow = stream.to("cpu", torch.float32)(x[:, :, 4:].float())
        assert narrow.dtype == torch.float32
        compare(narrow.double(), expected, rtol=1e-3, atol=1e-4)

    def test_is_its_own(self, variant, window):
        layer, x = video(variant)
        y = feed(ta.AttentionStream(layer, window=window), x, 2, [2, 4])
        stream, buffer = ta.AttentionStream(layer, window=window), x[:, :, :2].clone()
        stream(buffer)
        buffer.fill_(torch.nan)
        assert torch.equal(stream(x[:, :, 2:]), y[:, :, 2:])


@pytest.mark.parametrize("case", torch.load(OLD, weights_only=True))
def test_states_that_version_0_1_saved(case):
    """Layer and stream continue as they did: the sums of then, in the type of averages, are read as those of now."""
    old = torch.load(OLD, weights_only=True)[case]
    state, options = old["state"], {"operator": old["operator"], **old["options"]}
    dtype = getattr(torch, state["dtype"])
    layer = ta.TensorAttention(4, 2, modes="h t", causal="t", dtype=dtype, **options)
    layer.load_state_dict(old["layer"])
    stream, weights = ta.AttentionStream(layer, window=old["window"]), [torch.tensor([1.0, 2]), torch.tensor([2.0, 1])]
    stream.load_state_dict(state)
    assert stream.frames == 3
    with torch.no_grad():
        y = stream(draw(2, 2, 5, 4, seed=9, dtype=dtype)[:, :, 3:], weights=weights)
    error = 1e-5 if dtype == torch.float32 else 0.05
    compare(y, old["output"], rtol=error, atol=error)


@pytest.mark.parametrize("variant", [*LIGHT, BOTH], ids=str)
def test_bytes_beyond_the_averages_of_frames_stay(variant):
    layer, x = make(variant, "t h w", causal="t", dtype=torch.float32), draw(2, 20, 5, 3, 8, dtype=torch.float32)
    stream, taken = ta.AttentionStream(layer), []
    with torch.no_grad():
        for frame in x.split(1, 1):
            stream(frame)
            taken.append(stream.nbytes - stream.frames * 4 * (2 * 8 + 1))  # an average a sample and frame, and a weight
        assert len(set(taken)) == 1
        stream = ta.AttentionStream(layer, window=4)
        sizes = [stream.nbytes for frame in x.split(1, 1) if stream(frame) is not None]
    assert sizes[2:] == sizes[2:3] * 18


def test_sums_are_in_float64():
    """Hundreds of frames far from zero are added up no worse than at once."""
    layer = make("additive", "t h", causal="t", dtype=torch.float32)
    x, stream = draw(1, 400, 2, 8, dtype=torch.float32) + 100, ta.AttentionStream(layer)
    with torch.no_grad():
        parts = [stream(chunk) for chunk in x.split(50, 1)]
        sums = {name: t.dtype for name, t in stream.state_dict()["tensors"].items() if name.startswith(("sums", "tot"))}
        exact = copy.deepcopy(layer).double()(x.double())
    assert set(sums.values()) == {torch.float64}
    assert (parts[-1] - exact[:, -50:]).abs().max() <= 2 * (layer(x) - exact)[:, -50:].abs().max() + 1e-5


def test_prints_itself():
    layer = ta.TensorAttention(8, 2, modes="t h", causal="t")
    stream = ta.AttentionStream(layer, window=3)
    assert repr(stream) == "AttentionStream(operator='additive', causal='t', window=3; 0 frames, 0 bytes)"
    stream(torch.randn(1, 1, 2, 8))
    assert repr(stream) == f"AttentionStream(operator='additive', causal='t', window=3; 1 frame, {stream.nbytes} bytes)"


@st.composite
def streamed(draw_, variant):
    """A layer, an input, weights of its modes or None, the sizes of chunks, and a window or None."""
    at_least = max((mode for kept in variant.options.get("kept", ()) for mode in kept), default=0) + 1
    sizes = draw_(st.integers(at_least, 4).flatmap(lambda order: mode_sizes(order=order, max_positions=40)))
    causal, first = draw_(st.integers(0, len(sizes) - 1)), draw_(st.booleans())
    layer = make(variant, len(sizes), 4, causal=causal, channels_first=first)
    x = draw_(tensors((2, *((4, *sizes) if first else (*sizes, 4))), stream=100))
    weights = None
    if draw_(st.booleans()):
        entries = st.sampled_from([0.0, 0.5, 1.0, 3.0])
        vectors = [draw_(st.none() | st.lists(entries, min_size=n, max_size=n).filter(any)) for n in sizes]
        weights = [None if v is None else torch.tensor(v, dtype=torch.float64) for v in vectors]
    cuts = sorted(draw_(st.sets(st.integers(1, sizes[causal] - 1), max_size=3))) if sizes[causal] > 1 else []
    chunks = [end - start for start, end in zip([0, *cuts], [*cuts, sizes[causal]], strict=True)]
    return layer, x, weights, chunks, draw_(st.none() | st.integers(1, 5))


@pytest.mark.thorough
@pytest.mark.parametrize("variant", CAUSAL, ids=str)
@given(data=st.data())
def test_any_way_to_cut_time(variant, data):
    layer, x, weights, chunks, window = data.draw(streamed(variant))
    dim, mode = layer.causal + (2 if layer.channels_first else 1), layer.causal
    y = feed(ta.AttentionStream(layer, window=window), x, dim, chunks, weights)
    if window is None:
        expected = layer(x, weights=weights)
    else:  # a stream of the last frames, whose weights may all be zero
        parts = []
        for end in range(1, x.shape[dim] + 1):
            start = max(0, end - window)
            own = weights and [w[start:end] if k == mode and w is not None else w for k, w in enumerate(weights)]
            chunk = x.narrow(dim, start, end - start)
            parts.append(ta.AttentionStream(layer)(chunk, weights=own).narrow(dim, -1, 1))
        expected = torch.cat(parts, dim)
    compare(y, expected, rtol=1e-9, atol=1e-9)


# ---- modules -------------------------------------------------------------------------------------------------


def model(**settings):
    options = {"causal": "t", **settings.pop("options", {})}
    config = {"modes": "t h w", "in_channels": 3, "embed_dim": 12, "depth": 2, "num_heads": 2, "patch": (1, 2, 2)}
    built = ta.TensorTransformer(ta.TensorTransformerConfig(**config | settings, options=options), dtype=torch.float64)
    return built.eval()


MODELS = {
    "default": {},
    "unembedded": {"out_channels": 5, "channels_first": True},
    "interaction": {"options": {"interaction": "linear"}},
    "axial": {"operator": "axial"},
    "factors": {"layer_scale": 0.5, "checkpoint": True},
    "learned": {"positions": "learned", "sizes": (6, 2, 2)},
    "spaced": {"spacing": (0.5, 1.0, 1.0)},
    "patches in time": {"patch": (2, 2, 2), "out_channels": 3},
    "none": {"positions": None},
}


class TestModules:
    @pytest.mark.parametrize("case", MODELS)
    def test_equals_the_whole_tensor(self, case):
        built, x = model(**MODELS[case]), draw(2, 6, 4, 4, 3)
        dim, x = (2, x.movedim(-1, 1)) if built.config.channels_first else (1, x)
        weights, step = [None, torch.tensor([1.0, 2.0], dtype=torch.float64), None], built.config.patch[0]
        expected = built(x, weights=weights)
        for sizes in (step, 6, [2, 4]):
            stream = ta.ModuleStream(built)
            compare(torch.cat([stream(chunk, weights=weights) for chunk in x.split(sizes, dim)], dim), expected)
            assert stream.frames == 6 // step

    def test_gradients_of_checkpointed_blocks(self):
        built, x = model(checkpoint=True).train(), draw(2, 6, 4, 4, 3)
        stream = ta.ModuleStream(built)
        y = torch.cat([stream(chunk) for chunk in x.split(2, 1)], 1)
        gradients = (torch.autograd.grad(z.square().sum(), list(built.parameters())) for z in (y, built(x)))
        compare(*gradients, rtol=1e-8, atol=1e-10)

    def test_leaves_the_module_alone(self):
        built, x = model(), draw(1, 3, 4, 4, 3)
        before, y = {name: id(part) for name, part in built.named_modules()}, built(x)
        ta.ModuleStream(built)(x)
        assert {name: id(part) for name, part in built.named_modules()} == before
        assert torch.equal(built(x), y)

    def test_one_layer_at_two_places(self):
        layer, x = make("additive", "t h", causal="t"), draw(2, 5, 3, 8)
        for module in (torch.nn.Sequential(layer, torch.nn.GELU(), layer), layer):
            stream = ta.ModuleStream(module)
            compare(torch.cat([stream(frame) for frame in x.split(1, 1)], 1), module(x))

    def test_state(self):
        built, x, file = model(), draw(1, 6, 4, 4, 3), io.BytesIO()
        stream, twin = ta.ModuleStream(built, window=2), ta.ModuleStream(built, window=2)
        stream(x[:, :4])
        torch.save(stream.state_dict(), file)
        file.seek(0)
        twin.load_state_dict(torch.load(file, weights_only=True))
        told = f"ModuleStream(TensorTransformer, 2 layers; 4 frames, {stream.nbytes:,} bytes)"
        assert repr(twin) == repr(stream) == told
        stream.detach()
        assert torch.equal(twin(x[:, 4:]), stream(x[:, 4:]))
        assert stream.to(dtype=torch.float32) is stream
        stream.reset()
        assert stream.nbytes == stream.frames == 0

    def test_nothing_moves_where_a_later_part_fails(self):
        layer = make("additive", "t h", causal="t")
        stream = ta.ModuleStream(torch.nn.Sequential(layer, torch.nn.Linear(7, 7).double()))
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            stream(draw(1, 2, 3, 8))
        assert stream.frames == 0

    def test_coordinates(self):
        timed = model(periodic={"t": 24.0})
        stream, x = ta.ModuleStream(timed), draw(1, 6, 4, 4, 3)
        hours = torch.tensor([0.0, 1.0, 3.0, 7.0, 30.0, 31.0], dtype=torch.float64)
        parts = [stream(x[:, p], coordinates={"t": hours[p]}) for p in (slice(2), slice(2, 6))]
        compare(torch.cat(parts, 1), timed(x, coordinates={"t": hours}))


# ---- messages ------------------------------------------------------------------------------------------------


def begun(**settings):
    """A stream after three frames."""
    stream = ta.AttentionStream(ta.TensorAttention(8, 2, modes="t h", causal="t"), **settings)
    stream(torch.ones(2, 3, 4, 8), weights=[None, torch.arange(4)])
    return stream


STREAMS = {
    "no causal mode": (
        (ta.TensorAttention(8, 2, modes="t h"),),
        "layer has no causal mode to stream along.\n  Make it with one of its modes, such as causal='t'.",
    ),
    "no layer": ((torch.nn.Linear(2, 2),), "layer must be a TensorAttention, got Linear."),
    "bias": (
        (ta.TensorAttention(8, 2, modes=2, causal=0, position_bias=ta.AlibiBias(2, modes=2)),),
        "layer has position_bias, which would need the place of every frame so far.",
    ),
    "turns": (
        (ta.TensorAttention(8, 2, modes=2, causal=0, operator="axial", rotary=ta.RotaryEmbedding(4, modes=2)),),
        "layer has rotary, which would need the place of every frame so far.",
    ),
}


@pytest.mark.parametrize("case", STREAMS)
def test_layers_that_do_not_stream(case):
    arguments, rule = STREAMS[case]
    refused(OptionError, f"AttentionStream: {rule}", ta.AttentionStream, *arguments)


@pytest.mark.parametrize("window", [0, 1.5, True])
def test_windows(window):
    told = f"AttentionStream: window must be a number of frames from 1 up, or None, got {window!r}."
    refused(OptionError, told, begun, window=window)


MOVE = "\n  Move the state of the stream with its method to, or forget it with reset."
FRAMES = {
    "batch": ((3, 1, 4), {}, ShapeError, "x has a batch of 3, but the frames before had one of 2.", ""),
    "sizes": ((2, 1, 5), {}, ShapeError, "mode 'h' has size 5 in x but 4 in the frames before.", ""),
    "none": ((2, 0, 4), {}, ShapeError, "mode 't' has size 0 in x, but every mode needs at least 1 index.", ""),
    "device": ((2, 1, 4), {"device": "meta"}, OptionError, "x is on meta, but the frames before are on cpu.", MOVE),
    "type": (
        (2, 1, 4),
        {"dtype": torch.float64},
        DtypeError,
        "the type is torch.float64 in x but torch.float32 in the frames before.",
        MOVE,
    ),
}


@pytest.mark.parametrize("case", FRAMES)
def test_frames_that_do_not_follow(case):
    shape, moved, error, rule, hint = FRAMES[case]
    stream = begun()
    stream.layer.to(**moved)
    saved, x = stream.state_dict(), torch.ones(*shape, 8, **moved)
    told = f"AttentionStream: {rule}\n  modes    t h\n"
    told += f"  x        {(*shape, 8)}   batch=({shape[0]},) t={shape[1]} h={shape[2]} C=8{hint}"
    refused(error, told, stream, x, weights=[None, torch.arange(4)] if shape == (2, 1, 4) else None)
    compare(list(stream.state_dict()["tensors"].values()), list(saved["tensors"].values()))


READING = "\n  modes    t h\n  x        (2, 1, 4, 8)   batch=(2,) t=1 h=4 C=8"
SAME = "weights of mode 'h' are not those of the frames before."
ONCE = "\n  Give the same at every call; only the weights of frames may differ."
GIVEN = {
    "no weights": ({}, WeightsError, SAME, ONCE),
    "other weights": ({"weights": [None, torch.ones(4)]}, WeightsError, SAME, ONCE),
    "weights over the grid": (
        {"weights": torch.ones(1, 4)},
        WeightsError,
        "weights has a single tensor, but order 2 needs 2 vectors, one a mode.",
        "",
    ),
    "skip": (
        {"skip": torch.ones(2, 1, 4, 9)},
        ShapeError,
        "skip has shape (2, 1, 4, 9), but the result has (2, 1, 4, 8).",
        "",
    ),
}


@pytest.mark.parametrize("case", GIVEN)
def test_what_is_said_of_frames(case):
    given, error, rule, hint = GIVEN[case]
    refused(error, f"AttentionStream: {rule}{READING}{hint}", begun(), torch.ones(2, 1, 4, 8), **given)


def test_types_of_states():
    told = "AttentionStream.to: dtype must be floating point, got torch.int64."
    refused(DtypeError, told, begun().to, dtype=torch.int64)


NO_STATE = "state_dict is not the state of a stream of attention."
STATES = {
    "empty": ({}, OptionError, NO_STATE),
    "no mapping": (3, OptionError, NO_STATE),
    "stream": ({"stream": 3}, OptionError, NO_STATE),
    "frames": ({"frames": 1.5}, OptionError, NO_STATE),
    "negative frames": ({"frames": -1}, OptionError, NO_STATE),
    "tensors": ({"tensors": [1]}, OptionError, NO_STATE),
    "complex": (
        {"dtype": "complex64"},
        OptionError,
        "dtype is 'complex64' in state_dict, which is no floating-point type of torch.",
    ),
    "no type": ({"dtype": "nn"}, OptionError, "dtype is 'nn' in state_dict, which is no floating-point type of torch."),
    "a number for a type": (
        {"dtype": 3},
        OptionError,
        "dtype is 3 in state_dict, which is no floating-point type of torch.",
    ),
    "negative size": ({"sizes": (3, -4)}, OptionError, "sizes must be at least 1 in state_dict, got (3, -4)."),
    "sizes of another order": ({"sizes": (3,)}, OptionError, "sizes must be 2 integers in state_dict, got (3,)."),
    "a word for sizes": ({"sizes": "ab"}, OptionError, "sizes must be 2 integers in state_dict, got 'ab'."),
    "a number for sizes": ({"sizes": 3}, OptionError, "sizes must be 2 integers in state_dict, got 3."),
    "a word for the batch": (
        {"batch": "x"},
        OptionError,
        "batch must be a number of samples in state_dict, got 'x'.",
    ),
    "negative batch": ({"batch": -2}, OptionError, "batch must be a number of samples in state_dict, got -2."),
    "integers": (
        {"sums.0": torch.ones(2, 4, 8, dtype=torch.int64)},
        DtypeError,
        "sums.0 must be a floating-point tensor in state_dict, got torch.int64.",
    ),
    "complex numbers": (
        {"sums.1": torch.ones(2, 8, dtype=torch.complex64)},
        DtypeError,
        "sums.1 must be a floating-point tensor in state_dict, got torch.complex64.",
    ),
    "no tensor": ({"total": 3.0}, DtypeError, "total must be a floating-point tensor in state_dict, got float."),
    "shape": (
        {"means.0": torch.ones(2, 2, 8)},
        ShapeError,
        "means.0 has shape (2, 2, 8) in state_dict, but (2, 3, 8) fits the stream.",
    ),
    "missing": ({"means.0": None}, ShapeError, "means.0 is missing in state_dict."),
    "another": ({"sums.7": torch.ones(2)}, OptionError, "state_dict has a tensor 'sums.7', which the stream has not."),
    "weights of a mode": (
        {"mode_weights.1": torch.ones(5)},
        ShapeError,
        "mode_weights.1 has shape (5,) in state_dict, but (4,) fits the stream.",
    ),
}


@pytest.mark.parametrize("case", STATES)
def test_states_that_do_not_fit(case):
    changed, error, rule = STATES[case]
    stream = begun()
    saved = stream.state_dict()
    bad = changed if not isinstance(changed, dict) or not changed else copy.deepcopy(saved)
    for name, value in changed.items() if isinstance(bad, dict) else ():
        place = bad["tensors"] if "." in name or name == "total" else bad
        if value is None:
            del place[name]
        else:
            place[name] = value
    refused(error, f"AttentionStream.load_state_dict: {rule}", stream.load_state_dict, bad)
    compare(list(stream.state_dict()["tensors"].values()), list(saved["tensors"].values()))


def test_states_of_other_streams():
    saved, load = begun().state_dict(), "AttentionStream.load_state_dict: "
    for settings, rule in (
        ({"operator": "kao_kv"}, "operator is 'additive' in state_dict but 'kao_kv' in the stream."),
        ({"embed_dim": 16}, "embed_dim is 8 in state_dict but 16 in the stream."),
        ({"interaction": "linear"}, "second_moment is False in state_dict but True in the stream."),
    ):
        layer = ta.TensorAttention(**{"embed_dim": 8, "num_heads": 2, "modes": "t h", "causal": "t", **settings})
        refused(OptionError, load + rule, ta.AttentionStream(layer).load_state_dict, saved)
    rule = "window is None in state_dict but 2 in the stream."
    refused(OptionError, load + rule, begun(window=2).load_state_dict, saved)


def attention(**settings):
    return ta.TensorAttention(8, 2, **settings)


MODULES = {
    "no module": (3, "module must be a torch.nn.Module, got int."),
    "no attention": (
        torch.nn.Linear(2, 2),
        "module has no TensorAttention with a causal mode.\n  Make it with causal=....",
    ),
    "one that is not causal": (
        torch.nn.Sequential(attention(modes="t h", causal="t"), attention(modes="t h")),
        "attention '1' has no causal mode, so it may see later frames.",
    ),
    "another mode": (
        torch.nn.Sequential(attention(modes="t h", causal="t"), attention(modes="t h", causal="h")),
        "attention '1' is not causal along the same mode of the same modes as '0'.",
    ),
}


@pytest.mark.parametrize("case", MODULES)
def test_modules_that_do_not_stream(case):
    module, rule = MODULES[case]
    refused(OptionError, f"ModuleStream: {rule}", ta.ModuleStream, module)


def test_states_of_modules():
    told = functools.partial(refused, OptionError)
    ta.ModuleStream(torch.nn.Sequential(attention(modes="t h w", causal="t"), attention(modes="h w")))
    one, two = (ta.ModuleStream(torch.nn.Sequential(*[attention(modes=2, causal=0)] * count)) for count in (1, 2))
    rule = "state_dict has the layers ['0'], but the module has ['0', '1']."
    told(f"ModuleStream.load_state_dict: {rule}", two.load_state_dict, one.state_dict())
    for nothing in (3, {}, {"layers": 3}):
        with pytest.raises(OptionError) as error:
            two.load_state_dict(nothing)
        assert str(error.value).startswith("ModuleStream.load_state_dict: state_dict ")


class Twice(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = ta.TensorAttention(8, 2, modes="t", causal="t")

    def forward(self, x):
        return self.attention(self.attention(x))


class Recomputed(Twice):
    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.attention, x, use_reentrant=False)


def test_calls_of_a_layer():
    x = torch.ones(1, 2, 8, requires_grad=True)
    told = "attention 'attention' is called twice, but one stream follows one sequence of frames."
    refused(OptionError, f"ModuleStream: {told}", ta.ModuleStream(Twice()), x)
    told = "attention 'attention' is called after the module has returned, as when activations are recomputed."
    backward = ta.ModuleStream(Recomputed())(x).sum().backward
    refused(OptionError, f"ModuleStream: {told}\n  A stream cannot be checkpointed.", backward)


POSITIONS = {
    "learned": (
        {"positions": "learned", "sizes": (3, 2, 2)},
        4,
        ShapeError,
        "mode 't' has 3 learned positions, but this is frame 4.\n"
        "  Give coordinates, or stretch the table with resized.",
    ),
    "a circle": (
        {"periodic": ("t",)},
        6,
        OptionError,
        "positions along mode 't' close a circle of a number of frames that a stream cannot know.\n  Give coordinates.",
    ),
    "patches": (
        {"patch": (2, 2, 2), "pad": True},
        3,
        ShapeError,
        "mode 't' has size 3 in x, which patches of 2 do not divide.\n"
        "  A stream cannot pad in the middle; give whole patches.",
    ),
}


@pytest.mark.parametrize("case", POSITIONS)
def test_positions(case):
    settings, frames, error, rule = POSITIONS[case]
    stream = ta.ModuleStream(model(**settings))
    with pytest.raises(error) as raised:  # in the midst of the module, after its first maps
        stream(draw(1, frames, 4, 4, 3))
    assert str(raised.value) == f"ModuleStream: {rule}"
    assert stream.frames == 0
