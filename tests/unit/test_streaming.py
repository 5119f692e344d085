"""Streams against whole tensors: every operator and option, chunks of any size, weights, windows, states."""

from __future__ import annotations

import functools
import io

import pytest
import torch
from test_messages import refused
from test_nn import CLOSE, draw, make

import tensorattn as ta
from tensorattn.errors import DtypeError, OptionError, ShapeError, WeightsError
from tensorattn.testing.variants import Variant, variants

CAUSAL = [variant for variant in variants() if "causal" not in variant.operator.lacks]
LIGHT = [v for v in CAUSAL if v.name in ("additive", "kao_kv")]
NEWER = [Variant("additive", {"interaction": "linear", "include_self": True})]

every_variant = pytest.mark.parametrize("variant", [*CAUSAL, *NEWER], ids=str)
one_a_kind = pytest.mark.parametrize("variant", [*CAUSAL[:5], Variant("additive", {"interaction": "linear"})], ids=str)


def feed(stream, x, dim, sizes, weights=None):
    """Feed chunks, the weights of frames along with them."""
    mode, outputs, start = stream.layer.causal, [], 0
    for chunk in x.split(sizes, dim):
        count = chunk.shape[dim]
        own = weights and [
            w[..., start : start + count] if k == mode and w is not None else w for k, w in enumerate(weights)
        ]
        outputs.append(stream(chunk, weights=own))
        start += count
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


@every_variant
class TestEqualsTheWholeTensor:
    @pytest.mark.parametrize("sizes", [1, 3, 6, [2, 1, 3]], ids=str)
    @pytest.mark.parametrize("weighed", [False, True], ids=["equal", "weighed"])
    def test_in_chunks(self, variant, sizes, weighed):
        layer, x = video(variant)
        weights = None
        if weighed:
            frames = draw(2, 6).sigmoid()
            frames[0, 0], frames[1, :2], frames[:, 3] = (
                0,
                0,
                0,
            )  # absent first frames, of one sample more than of another
            weights = [draw(2, 3).sigmoid(), frames]
        torch.testing.assert_close(
            feed(ta.AttentionStream(layer), x, 2, sizes, weights), layer(x, weights=weights), **CLOSE
        )

    @pytest.mark.parametrize(
        ("modes", "causal"), [("t", 0), ("t h", 0), ("h t", 1), ("t h w", 0), ("h t w", 1), ("a b c t", 3)]
    )
    @pytest.mark.parametrize("first", [False, True], ids=["last", "first"])
    def test_of_any_order_and_layout(self, variant, modes, causal, first):
        kept = variant.options.get("kept")
        if kept and len(modes.split()) < 2:
            pytest.skip("keeps two modes")
        layer = make(variant, modes, causal="t", channels_first=first)
        x, dim = draw(2, *(5 if k == causal else 2 + k % 2 for k in range(layer.modes.order)), 8), 1 + causal
        x, dim = (x.movedim(-1, 1), dim + 1) if first else (x, dim)
        for sizes in (1, [2, 3]):
            torch.testing.assert_close(feed(ta.AttentionStream(layer), x, dim, sizes), layer(x), **CLOSE)

    @pytest.mark.parametrize("window", [1, 2, 4, 9])
    @pytest.mark.parametrize("weighed", [False, True], ids=["equal", "weighed"])
    def test_of_the_last_frames(self, variant, window, weighed):
        layer, x = video(variant)
        weights = [None, draw(2, 6).sigmoid() + 0.1] if weighed else None
        expected = windowed(layer, x, 2, window, weights)
        for sizes in (1, 3, 6, [2, 1, 3]):
            stream = ta.AttentionStream(layer, window=window)
            torch.testing.assert_close(feed(stream, x, 2, sizes, weights), expected, **CLOSE)

    @pytest.mark.parametrize("window", [None, 3])
    def test_gradients(self, variant, window):
        layer, x = video(variant)
        x.requires_grad_()
        wanted = [x, *layer.parameters()]
        whole = layer(x) if window is None else windowed(layer, x, 2, window)
        expected = torch.autograd.grad((whole * draw(*x.shape, seed=1)).sum(), wanted)
        y = feed(ta.AttentionStream(layer, window=window), x, 2, [1, 2, 3])
        found = torch.autograd.grad((y * draw(*x.shape, seed=1)).sum(), wanted)
        for own, other in zip(found, expected, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-8, atol=1e-10)

    @pytest.mark.parametrize("window", [None, 2])
    def test_no_frame_sees_a_later_one(self, variant, window):
        layer, x = video(variant)
        poisoned = x.clone()
        poisoned[:, :, 4:] = torch.nan
        y = ta.AttentionStream(layer, window=window)(poisoned)
        torch.testing.assert_close(y[:, :, :4], ta.AttentionStream(layer, window=window)(x[:, :, :4]), **CLOSE)

    def test_forgets_what_leaves_the_window(self, variant):
        layer, x = video(variant)
        x[:, :, 0] = torch.nan
        y = feed(ta.AttentionStream(layer, window=2), x, 2, 1)
        assert y[:, :, 2:].isfinite().all()

    def test_with_skip_and_out(self, variant):
        layer, x = video(variant)
        stream, other = ta.AttentionStream(layer), draw(*x.shape, seed=3)
        with torch.no_grad():
            first = stream(x[:, :, :2], skip=x[:, :, :2])
            rest = torch.empty_like(x[:, :, 2:])
            assert stream(x[:, :, 2:], skip=other[:, :, 2:], out=rest) is rest
            y = layer(x)
        torch.testing.assert_close(first, y[:, :, :2] + x[:, :, :2], **CLOSE)
        torch.testing.assert_close(rest, y[:, :, 2:] + other[:, :, 2:], **CLOSE)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_in_other_types(self, variant, dtype):
        layer, x = make(variant, "h t", causal="t", dtype=dtype), draw(2, 3, 6, 8, dtype=dtype)
        y = feed(ta.AttentionStream(layer), x, 2, [1, 2, 3])
        assert y.dtype == dtype
        truth = make(variant, "h t", causal="t")
        truth.load_state_dict({name: value.double() for name, value in layer.state_dict().items()})
        whole = truth(x.double())
        error, usual = (y.double() - whole).abs().max(), (layer(x).double() - whole).abs().max()
        assert error <= 2 * usual + 4 * torch.finfo(dtype).eps * whole.abs().max()


@one_a_kind
@pytest.mark.parametrize("window", [None, 3])
class TestState:
    def test_saved_and_loaded(self, variant, window):
        layer, x = video(variant)
        weights = [draw(2, 3).sigmoid(), draw(2, 6).sigmoid()]
        early, late = ([weights[0], weights[1][:, part]] for part in (slice(4), slice(4, 6)))
        stream, file = ta.AttentionStream(layer, window=window), io.BytesIO()
        stream(x[:, :, :4], weights=early)
        torch.save(stream.state_dict(), file)
        file.seek(0)
        twin = ta.AttentionStream(layer, window=window)
        twin.load_state_dict(torch.load(file))
        assert (twin.frames, twin.nbytes) == (4, stream.nbytes)
        torch.testing.assert_close(twin(x[:, :, 4:], weights=late), stream(x[:, :, 4:], weights=late), rtol=0, atol=0)

    def test_reset(self, variant, window):
        layer, x = video(variant)
        stream = ta.AttentionStream(layer, window=window)
        first = stream(x)
        assert stream.frames == 6
        stream.reset()
        assert (stream.frames, stream.nbytes) == (0, 0)
        twin = ta.AttentionStream(layer, window=window)
        twin.load_state_dict(stream.state_dict())
        assert twin.frames == 0
        stream(draw(1, 2, 1, 8))
        stream.reset()
        torch.testing.assert_close(stream(x), first, rtol=0, atol=0)

    def test_detach(self, variant, window):
        layer, x = video(variant)
        early, late = x[:, :, :2].clone().requires_grad_(), x[:, :, 2:3].clone().requires_grad_()
        stream = ta.AttentionStream(layer, window=window)
        stream(early)
        assert torch.autograd.grad(stream(late).sum(), early)[0].abs().sum() > 0
        stream.detach()
        found = torch.autograd.grad(stream(x[:, :, 3:4]).sum(), [early, layer.v_proj.weight], allow_unused=True)
        assert found[0] is None and found[1] is not None

    def test_moves(self, variant, window):
        layer, x = video(variant)
        stream = ta.AttentionStream(layer, window=window)
        stream(x[:, :, :4])
        assert stream.to("meta") is stream
        assert all(tensor.is_meta for tensor in stream.state_dict()["tensors"].values())
        stream.reset()
        stream(x[:, :, :4])
        stream.to("cpu", torch.float32)
        layer.float()
        narrow = stream(x[:, :, 4:].float())
        wide = video(variant)[0]
        expected = feed(ta.AttentionStream(wide, window=window), x, 2, [4, 2])[:, :, 4:]
        torch.testing.assert_close(narrow.double(), expected, rtol=1e-3, atol=1e-4)

    def test_is_its_own(self, variant, window):
        layer, x = video(variant)
        y = feed(ta.AttentionStream(layer, window=window), x, 2, [2, 4])
        stream, buffer = ta.AttentionStream(layer, window=window), x[:, :, :2].clone()
        stream(buffer)
        buffer.fill_(torch.nan)
        torch.testing.assert_close(stream(x[:, :, 2:]), y[:, :, 2:], rtol=0, atol=0)


@pytest.mark.parametrize("variant", [*LIGHT, *NEWER], ids=str)
def test_bytes_beyond_the_averages_of_frames_stay(variant):
    layer, x = make(variant, "t h w", causal="t", dtype=torch.float32), draw(2, 40, 5, 3, 8, dtype=torch.float32)
    stream, taken = ta.AttentionStream(layer), []
    with torch.no_grad():
        for frame in x.split(1, 1):
            stream(frame)
            taken.append(stream.nbytes - stream.frames * 4 * (2 * 8 + 1))  # an average a sample and frame, and a weight
    assert len(set(taken)) == 1
    moment = 2 * 4 * (8 + 8 + 64) if variant.options.get("interaction") else 0
    grand = 2 * 4 * 8 * (variant.name == "additive")
    assert taken[0] == 2 * 4 * 8 * (5 + 3) + grand + moment + 4
    stream = ta.AttentionStream(layer, window=4)
    sizes = [stream.nbytes for frame in x.split(1, 1) if stream(frame) is not None]
    assert sizes[2:] == sizes[2:3] * 38


def test_prints_itself():
    layer = ta.TensorAttention(8, 2, modes="t h", causal="t")
    stream = ta.AttentionStream(layer, window=3)
    assert repr(stream) == "AttentionStream(operator='additive', causal='t', window=3; 0 frames, 0 bytes)"
    stream(torch.randn(1, 1, 2, 8))
    assert repr(stream) == f"AttentionStream(operator='additive', causal='t', window=3; 1 frame, {stream.nbytes} bytes)"


class TestMessages:
    def make(self, **settings):
        layer = ta.TensorAttention(8, 2, modes="t h", causal="t")
        stream = ta.AttentionStream(layer, **settings)
        stream(torch.ones(2, 3, 4, 8), weights=[None, torch.arange(4)])
        return stream

    def test_layers(self):
        refused(
            OptionError,
            "AttentionStream: layer has no causal mode to stream along.\n"
            "  Make it with one of its modes, such as causal='t'.",
            ta.AttentionStream, ta.TensorAttention(8, 2, modes="t h"),
        )  # fmt: skip
        refused(
            OptionError, "AttentionStream: layer must be a TensorAttention, got Linear.",
            ta.AttentionStream, torch.nn.Linear(2, 2),
        )  # fmt: skip
        for window in (0, 1.5, True):
            refused(
                OptionError, f"AttentionStream: window must be a number of frames from 1 up, or None, got {window!r}.",
                self.make, window=window,
            )  # fmt: skip

    MOVE = "\n  Move the state of the stream with its method to, or forget it with reset."

    @pytest.mark.parametrize(
        ("shape", "dtype", "error", "rule", "hint"),
        [
            ((3, 1, 4), None, ShapeError, "x has a batch of 3, but the frames before had one of 2.", ""),
            ((2, 1, 5), None, ShapeError, "mode 'h' has size 5 in x but 4 in the frames before.", ""),
            ((2, 0, 4), None, ShapeError, "mode 't' has size 0 in x, but every mode needs at least 1 index.", ""),
            ((2, 1, 4), "meta", OptionError, "x is on meta, but the frames before are on cpu.", MOVE),
        ],
    )
    def test_frames(self, shape, dtype, error, rule, hint):
        stream = self.make()
        stream.layer.to(dtype)
        state, x = stream._state, torch.ones(*shape, 8, device=dtype)
        told = f"AttentionStream: {rule}\n  modes    t h\n"
        told += f"  x        {(*shape, 8)}   batch=({shape[0]},) t={shape[1]} h={shape[2]} C=8{hint}"
        weights = None if dtype is None and shape != (2, 1, 4) else [None, torch.arange(4)]
        refused(error, told, stream, x, weights=weights)
        assert stream._state is state

    def test_types(self):
        stream = self.make()
        stream.layer.double()
        told = (
            "AttentionStream: the type is torch.float64 in x but torch.float32 in the frames before.\n  modes    t h\n"
        )
        told += "  x        (2, 1, 4, 8)   batch=(2,) t=1 h=4 C=8" + self.MOVE
        refused(DtypeError, told, stream, torch.ones(2, 1, 4, 8, dtype=torch.float64))
        refused(
            DtypeError,
            "AttentionStream.to: dtype must be floating point, got torch.int64.",
            stream.to,
            dtype=torch.int64,
        )

    @pytest.mark.parametrize("weights", [None, [None, torch.ones(4)]], ids=["none", "others"])
    def test_weights(self, weights):
        told = "AttentionStream: weights of mode 'h' are not those of the frames before.\n  modes    t h\n"
        told += "  x        (2, 1, 4, 8)   batch=(2,) t=1 h=4 C=8\n"
        told += "  Give the same at every call; only the weights of frames may differ."
        refused(WeightsError, told, self.make(), torch.ones(2, 1, 4, 8), weights=weights)

    def test_states(self):
        stream, load = self.make(), "AttentionStream.load_state_dict: "
        state, saved = stream._state, stream.state_dict()
        other = ta.TensorAttention(8, 2, modes="t h", causal="t", operator="kao_kv")
        refused(
            OptionError, load + "operator is 'additive' in state_dict but 'kao_kv' in the stream.",
            ta.AttentionStream(other).load_state_dict, saved,
        )  # fmt: skip
        wide = ta.TensorAttention(16, 2, modes="t h", causal="t")
        refused(
            OptionError, load + "embed_dim is 8 in state_dict but 16 in the stream.",
            ta.AttentionStream(wide).load_state_dict, saved,
        )  # fmt: skip
        refused(
            OptionError, load + "window is None in state_dict but 2 in the stream.",
            self.make(window=2).load_state_dict, saved,
        )  # fmt: skip
        refused(OptionError, load + "state_dict is not the state of a stream of attention.", stream.load_state_dict, {})
        saved["tensors"]["means.0"] = torch.ones(2, 2, 8)
        refused(
            ShapeError, load + "means.0 has shape (2, 2, 8) in state_dict, but (2, 3, 8) fits the stream.",
            stream.load_state_dict, saved,
        )  # fmt: skip
        del saved["tensors"]["means.0"]
        refused(ShapeError, load + "means.0 is missing in state_dict.", stream.load_state_dict, saved)
        assert stream._state is state


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
        built = model(**MODELS[case])
        dim, x = 1, draw(2, 6, 4, 4, 3)
        if built.config.channels_first:
            dim, x = 2, x.movedim(-1, 1)
        weights = [None, torch.tensor([1.0, 2.0], dtype=torch.float64), None]
        step = built.config.patch[0]
        for sizes in (step, 6, [2, 4]):
            stream = ta.ModuleStream(built)
            y = torch.cat([stream(chunk, weights=weights) for chunk in x.split(sizes, dim)], dim)
            torch.testing.assert_close(y, built(x, weights=weights), **CLOSE)
            assert stream.frames == 6 // step

    def test_gradients_of_checkpointed_blocks(self):
        built, x = model(checkpoint=True).train(), draw(2, 6, 4, 4, 3)
        expected = torch.autograd.grad(built(x).square().sum(), list(built.parameters()))
        stream = ta.ModuleStream(built)
        y = torch.cat([stream(chunk) for chunk in x.split(2, 1)], 1)
        for own, other in zip(torch.autograd.grad(y.square().sum(), list(built.parameters())), expected, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-8, atol=1e-10)

    def test_leaves_the_module_alone(self):
        built, x = model(), draw(1, 3, 4, 4, 3)
        before = {name: id(part) for name, part in built.named_modules()}
        y, stream = built(x), ta.ModuleStream(built)
        stream(x)
        assert {name: id(part) for name, part in built.named_modules()} == before
        torch.testing.assert_close(built(x), y, rtol=0, atol=0)

    def test_one_layer_at_two_places(self):
        layer = make(CAUSAL[0], "t h", causal="t")
        both, x = torch.nn.Sequential(layer, torch.nn.GELU(), layer), draw(2, 5, 3, 8)
        stream = ta.ModuleStream(both)
        torch.testing.assert_close(torch.cat([stream(f) for f in x.split(1, 1)], 1), both(x), **CLOSE)
        alone = ta.ModuleStream(layer)
        torch.testing.assert_close(torch.cat([alone(f) for f in x.split(2, 1)], 1), layer(x), **CLOSE)

    def test_state(self):
        built, x, file = model(), draw(1, 6, 4, 4, 3), io.BytesIO()
        stream, twin = ta.ModuleStream(built, window=2), ta.ModuleStream(built, window=2)
        stream(x[:, :4])
        torch.save(stream.state_dict(), file)
        file.seek(0)
        twin.load_state_dict(torch.load(file))
        assert (
            repr(twin)
            == repr(stream)
            == f"ModuleStream(TensorTransformer, 2 layers; 4 frames, {stream.nbytes:,} bytes)"
        )
        stream.detach()
        torch.testing.assert_close(twin(x[:, 4:]), stream(x[:, 4:]), rtol=0, atol=0)
        assert stream.to(dtype=torch.float32) is stream
        stream.reset()
        assert stream.nbytes == stream.frames == 0

    def test_nothing_moves_where_a_later_part_fails(self):
        layer = make(CAUSAL[0], "t h", causal="t")
        broken = torch.nn.Sequential(layer, torch.nn.Linear(8, 7).double())
        stream = ta.ModuleStream(torch.nn.Sequential(broken, torch.nn.LayerNorm(8).double()))
        with pytest.raises(RuntimeError):
            stream(draw(1, 2, 3, 8))
        assert stream.frames == 0

    def test_messages(self):
        told, attention = functools.partial(refused, OptionError), functools.partial(ta.TensorAttention, 8, 2)
        told(
            "ModuleStream: module has no TensorAttention with a causal mode.\n  Make it with causal=....",
            ta.ModuleStream, torch.nn.Linear(2, 2),
        )  # fmt: skip
        stack = torch.nn.Sequential
        told(
            "ModuleStream: attention '1' has no causal mode, so it may see later frames.",
            ta.ModuleStream, stack(attention(modes="t h", causal="t"), attention(modes="t h")),
        )  # fmt: skip
        told(
            "ModuleStream: attention '1' is not causal along the same mode of the same modes as '0'.",
            ta.ModuleStream, stack(attention(modes="t h", causal="t"), attention(modes="t h", causal="h")),
        )  # fmt: skip
        ta.ModuleStream(stack(attention(modes="t h w", causal="t"), attention(modes="h w")))
        first, second = (ta.ModuleStream(stack(*[attention(modes=2, causal=0)] * count)) for count in (1, 2))
        told(
            "ModuleStream.load_state_dict: state_dict has the layers ['0'], but the module has ['0', '1'].",
            second.load_state_dict, first.state_dict(),
        )  # fmt: skip

    def test_calls(self):
        class Twice(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.attention = ta.TensorAttention(8, 2, modes="t", causal="t")

            def forward(self, x):
                return self.attention(self.attention(x))

        class Recomputed(Twice):
            def forward(self, x):
                return torch.utils.checkpoint.checkpoint(self.attention, x, use_reentrant=False)

        x = torch.ones(1, 2, 8, requires_grad=True)
        refused(
            OptionError,
            "ModuleStream: attention 'attention' is called twice, but one stream follows one sequence of frames.",
            ta.ModuleStream(Twice()), x,
        )  # fmt: skip
        refused(
            OptionError,
            "ModuleStream: attention 'attention' is called after the module has returned, as when activations are "
            "recomputed.\n  A stream cannot be checkpointed.",
            ta.ModuleStream(Recomputed())(x).sum().backward,
        )  # fmt: skip

    def test_positions(self):
        def told(kind, message, stream, x):  # told in the midst of the module, after its first maps
            with pytest.raises(kind) as error:
                stream(x)
            assert str(error.value) == message

        x = draw(1, 6, 4, 4, 3)
        stream = ta.ModuleStream(model(positions="learned", sizes=(3, 2, 2)))
        stream(x[:, :3])
        told(
            ShapeError,
            "ModuleStream: mode 't' has 3 learned positions, but this is frame 4.\n"
            "  Give coordinates, or stretch the table with resized.",
            stream, x[:, 3:4],
        )  # fmt: skip
        assert stream.frames == 3
        circle = model(periodic=("t",))
        told(
            OptionError,
            "ModuleStream: positions along mode 't' close a circle of a number of frames that a stream cannot know.\n"
            "  Give coordinates.",
            ta.ModuleStream(circle), x,
        )  # fmt: skip
        timed = model(periodic={"t": 24.0})
        stream = ta.ModuleStream(timed)
        hours = torch.tensor([0.0, 1.0, 3.0, 7.0, 30.0, 31.0], dtype=torch.float64)
        parts = [stream(x[:, p], coordinates={"t": hours[p]}) for p in (slice(2), slice(2, 6))]
        torch.testing.assert_close(torch.cat(parts, 1), timed(x, coordinates={"t": hours}), **CLOSE)
        told(
            ShapeError,
            "ModuleStream: mode 't' has size 3 in x, which patches of 2 do not divide.\n"
            "  A stream cannot pad in the middle; give whole patches.",
            ta.ModuleStream(model(patch=(2, 2, 2), pad=True)), x[:, :3],
        )  # fmt: skip
