"""Causality along a mode: each frame sees the tensor up to itself, and nothing of a later frame, whatever it holds."""

from __future__ import annotations

import math

import pytest
import torch
from grids import CAUSAL, LAYOUTS, at_sizes, close, every_causal_variant, holes, positive, tensors
from modules import draw

import tensorattn as ta
from tensorattn.functional.causal import frames_first, frames_last

SIZES = [(4,), (3, 4), (2, 3, 4)]
LATER = (math.nan, math.inf, -math.inf)


def told(sizes, kind):
    """Weights, a mask or lengths, each with something absent; or nothing."""
    vectors = [positive(size, seed=size) for size in sizes]
    vectors[-1][1:2] = 0.0
    return {
        "": {},
        "weights": {"weights": vectors},
        "weights of samples": {"weights": [positive(2, size, seed=size) for size in sizes]},
        "mask": {"mask": holes(2, *sizes)},
        "lengths": {"lengths": torch.tensor([[max(1, size - 1) for size in sizes], list(sizes)])},
    }[kind]


def cropped(given, sizes, mode, frames):
    """The same of the first frames of a mode."""
    order = len(sizes)
    found = {}
    for name, value in given.items():
        if name == "weights":
            found[name] = [w[..., :frames] if k == mode else w for k, w in enumerate(value)]
        elif name == "mask":
            found[name] = value.narrow(1 + mode, 0, frames)
        elif name == "lengths":
            found[name] = value.clamp(max=torch.tensor([frames if k == mode else sizes[k] for k in range(order)]))
        else:
            found[name] = [b[:frames, :frames] if k == mode else b for k, b in enumerate(value)]
    return found


class TestFrames:
    """A frame is the last frame of the tensor cropped behind it."""

    @pytest.mark.parametrize("kind", ["", "weights", "weights of samples", "mask", "lengths"])
    @at_sizes(*SIZES, of=CAUSAL)
    def test_see_the_tensor_up_to_themselves(self, variant, sizes, kind):
        order, leaves = len(sizes), tensors(sizes)
        for mode in range(order):
            given = told(sizes, kind)
            if order > 1 and kind == "" and "kept" not in variant.options and "bias" not in variant.lacks:
                given = {"bias": [draw(size, size, seed=size) for size in sizes]}
            # Fibres along other modes lie within a frame, so that axial attention to a cropped tensor is causal too;
            # blocks of a causal mode span all frames.
            later = {"causal": mode} if variant.name in ("axial", "clustered") else {}
            ours = variant.function(*leaves, order=order, causal=mode, **given)
            for frame in range(sizes[mode]):
                first = [tensor.narrow(1 + mode, 0, frame + 1) for tensor in leaves]
                part = variant.function(*first, order=order, **cropped(given, sizes, mode, frame + 1), **later)
                close([ours.select(1 + mode, frame)], [part.select(1 + mode, frame)])

    @at_sizes(*SIZES, of=CAUSAL)
    def test_gradients_are_those_of_the_cropped(self, variant, sizes):
        order, mode = len(sizes), len(sizes) - 1
        grads = []
        for crop in (False, True):
            leaves = [tensor.requires_grad_() for tensor in tensors(sizes)]
            total = 0.0
            for frame in range(sizes[mode]):
                length = frame + 1 if crop else sizes[mode]
                first = [tensor.narrow(1 + mode, 0, length) for tensor in leaves]
                later = {} if crop and variant.name not in ("axial", "clustered") else {"causal": mode}
                output = variant.function(*first, order=order, **later).select(1 + mode, frame)
                total = total + (output * draw(*output.shape, seed=frame)).sum()
            grads.append(torch.autograd.grad(total, leaves))
        close(*grads)

    @every_causal_variant
    def test_have_log_sum_exps_and_weights_of_their_own(self, variant):
        if "return_lse" in variant.lacks:
            pytest.skip("it has none")
        leaves = tensors((3, 4))
        whole = variant.function(*leaves, order=2, causal=0, return_lse=True, return_attention=True)
        for frame in range(3):
            first = [tensor[:, : frame + 1] for tensor in leaves]
            later = {"causal": 0} if variant.name == "clustered" else {}
            part = variant.function(*first, order=2, return_lse=True, return_attention=True, **later)
            close([whole.lse[:, frame]], [part.lse[:, frame]])
            for ours, theirs in zip(whole.attention, part.attention, strict=True):
                if ours.shape[3:] == theirs.shape[3:]:  # of a mode that all frames share
                    close([ours[:, frame]], [theirs[:, frame]])
                else:
                    close([ours[:, frame, :, : frame + 1]], [theirs[:, frame]])
                    assert ours[:, frame, :, frame + 1 :].eq(0).all()

    def test_are_seen_by_indices_that_count_from_the_end(self):
        leaves = tensors((3, 4))
        for variant in CAUSAL:
            function = variant.function
            close([function(*leaves, order=2, causal=-1)], [function(*leaves, order=2, causal=1)])

    @every_causal_variant
    def test_in_every_layout_of_memory(self, variant):
        leaves = tensors((3, 4))
        expected = variant.function(*leaves, order=2, causal=1)
        for layout in LAYOUTS.values():
            close([variant.function(*map(layout, leaves), order=2, causal=1)], [expected])


class TestLaterFrames:
    @at_sizes(*SIZES, (1, 3), (3, 1), of=CAUSAL)
    def test_reach_nothing_whatever_they_hold(self, variant, sizes):
        """To the last bit; and what is absent may hold anything too, in the first frames as well."""
        order = len(sizes)
        for mode in range(order):
            for place, kind in enumerate(("", "weights", "mask")):
                given = told(sizes, kind)
                for first in range(1, sizes[mode]):
                    outputs = []
                    for held in (0.0, LATER[(place + first) % 3]):
                        leaves = tensors(sizes)
                        for tensor in leaves:
                            tensor.narrow(1 + mode, first, sizes[mode] - first).fill_(held)
                        found = variant.function(*leaves, order=order, causal=mode, **given)
                        outputs.append(found.narrow(1 + mode, 0, first))
                    assert torch.equal(*outputs)

    @every_causal_variant
    def test_get_no_gradient_of_earlier_ones(self, variant):
        leaves = [tensor.requires_grad_() for tensor in tensors((3, 4))]
        output = variant.function(*leaves, order=2, causal=0)
        for grad in torch.autograd.grad(output[:, :2].sum(), leaves):
            assert grad[:, 2].eq(0).all() and grad[:, :2].ne(0).any()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    @every_causal_variant
    def test_reach_nothing_in_other_types(self, variant, dtype):
        outputs = []
        for held in (0.0, math.inf):
            leaves = tensors((3, 4), dtype=dtype)
            for tensor in leaves:
                tensor[:, 2:] = held
            outputs.append(variant.function(*leaves, order=2, causal=0, mask=holes(2, 3, 4))[:, :2])
        assert torch.equal(*outputs) and outputs[0].dtype == dtype

    @every_causal_variant
    @pytest.mark.parametrize("absent", [0, 1, 2])
    def test_absent_frames_are_not_looked_at(self, variant, absent):
        """As if they were left out, not even where the first frames are absent."""
        there = [frame for frame in range(4) if frame != absent]
        query, key, value = tensors((4, 3))
        weights = [torch.ones(4).double().index_fill(0, torch.tensor(absent), 0), None]
        expected = variant.function(query[:, there], key[:, there], value[:, there], order=2, causal=0)
        if not variant.options.get("include_self"):  # the own token is always there
            key[:, absent], value[:, absent] = math.nan, math.inf
        ours = variant.function(query, key, value, order=2, causal=0, weights=weights)
        close([ours[:, there]], [expected])

    def test_weights_get_finite_gradients_whatever_an_absent_frame_holds(self):
        """The frame is absent; another mode has weights that are learned."""
        for variant in CAUSAL:
            if variant.options.get("include_self"):
                continue
            grads = []
            for held in (*LATER, 0.0):
                query, key, value = tensors((4, 3))
                key[:, 3:], value[:, 3:] = held, held
                learned, frames = torch.ones(3).double().requires_grad_(), torch.tensor([1.0, 1, 1, 0]).double()
                output = variant.function(query, key, value, order=2, causal=0, weights=[frames, learned])
                grads += torch.autograd.grad((output * draw(*output.shape, seed=4)).sum(), learned)
            for grad in grads[:-1]:
                close([grad], grads[-1:])


def test_frames_as_a_batch_dimension():
    x = draw(2, 3, 4, 5)
    for mode, shape in ((0, (2, 3, 1, 4, 5)), (1, (2, 4, 3, 1, 5))):
        frames = frames_first(x, mode, 1)
        assert frames.shape == shape
        assert torch.equal(frames_last(frames, mode, 1), x)


def test_running_means_of_half_precision_are_held_in_single():
    """Means over hundreds of frames that differ by less than half precision tells apart."""
    x = torch.ones(1, 300, 2, 1, dtype=torch.bfloat16)
    x[:, ::2] = 1.0078125  # the next number after 1
    value = x[..., 0:1]
    output = ta.kao_kv(torch.zeros_like(x), x, value, order=2, causal=0)
    exact = ta.kao_kv(torch.zeros_like(x).double(), x.double(), value.double(), order=2, causal=0)
    assert (output.double() - exact).abs().max() <= 2**-8
