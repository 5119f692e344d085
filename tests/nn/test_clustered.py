"""The layer of clustered attention: cells that it holds, streams, graphs, types, kernel calls, and what it refuses."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from modules import draw, refused
from torch.export import Dim

import tensorattn as ta
from nn.layers import GRADIENTS, compare, gradients_of, heads_of, joined, make
from tensorattn.diagnose.cost import count_calls
from tensorattn.errors import OptionError
from tensorattn.functional import cells

thorough = pytest.mark.thorough
KINDS = ("blocks", "keys", "Cells")
every_kind = pytest.mark.parametrize("kind", KINDS)
every_fixed_kind = pytest.mark.parametrize("kind", ["blocks", "Cells"])

# Kernel calls of the layer that are wanted, forwards, and forwards and backwards, and those of today.
WANTED = {"keys": (550, 650), "blocks": (40, 110)}
TODAY = {"keys": (630, 740), "blocks": (135, 300)}


def clustered(kind, modes=2, tokens=4, **settings):
    """A layer, which holds cells that were found in another tensor, or not."""
    given = {"cells": kind} if kind != "Cells" else {}
    if kind != "Cells":
        return make("clustered", modes, tokens=tokens, **given, **settings)
    layer = make("clustered", modes, tokens=tokens, **{n: v for n, v in settings.items() if n != "causal"})
    order = layer.modes.order
    x = draw(3, *[4] * order, 8, seed=7, dtype=layer.q_proj.weight.dtype)
    cells = layer.find_cells(x.movedim(-1, 1) if layer.channels_first else x)
    return make("clustered", modes, tokens=tokens, **(settings | {"cells": cells}))


class TestLayer:
    @every_kind
    def test_is_the_function_between_linear_maps(self, kind):
        layer, x = clustered(kind), draw(2, 4, 5, 8)
        output = ta.clustered_attention(*heads_of(layer, x), order=2, **layer.options)
        compare(layer(x), joined(layer, output))

    @pytest.mark.parametrize("kind", KINDS)
    def test_of_a_context(self, kind):
        layer, x, context = clustered(kind), draw(2, 3, 8), draw(2, 4, 5, 8, seed=1)
        x = x.unsqueeze(1)
        output = ta.clustered_attention(*heads_of(layer, x, context), order=2, **layer.options)
        compare(layer(x, context), joined(layer, output))

    def test_finds_the_cells_of_all_samples(self):
        layer, x = clustered("keys"), draw(3, 4, 5, 8)
        cells = layer.find_cells(x)
        query, key, _ = heads_of(layer, x)
        expected = ta.find_cells(query.movedim(1, 0), key.movedim(1, 0), order=3, tokens=4)
        assert cells.centres.shape == (2, 4, 4) and cells.metric.shape == (2, 4, 4)
        compare((cells.centres, cells.metric), (expected.centres, expected.metric))

    def test_never_finds_what_is_absent(self):
        layer, x, mask = clustered("keys"), draw(3, 4, 5, 8), draw(3, 4, 5, seed=5) > -0.3
        expected = layer.find_cells(x, mask=mask)
        x[~mask] = torch.nan
        found = layer.find_cells(x, mask=mask)
        compare((found.centres, found.metric), (expected.centres, expected.metric))

    def test_holds_cells_as_buffers(self):
        layer, x = clustered("keys"), draw(2, 4, 5, 8)
        cells, before = layer.find_cells(x), layer(x)
        assert "cell_centres" not in layer.state_dict()
        layer.hold_cells(cells)
        assert {"cell_centres", "cell_metric"} <= set(layer.state_dict())
        output = ta.clustered_attention(*heads_of(layer, x), order=2, cells=cells)
        compare(layer(x), joined(layer, output))
        assert before.shape == layer(x).shape and not torch.equal(before, layer(x))
        twin = copy.deepcopy(layer)
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        file.seek(0)
        for buffer in twin.buffers():
            buffer.zero_()
        twin.load_state_dict(torch.load(file))
        compare(twin(x), layer(x))
        assert layer.to(torch.float32).options["cells"].centres.dtype == torch.float32

    @pytest.mark.parametrize("shared", [True, False])
    def test_reads_the_cells_of_another_layer(self, shared):
        layer, twin, x = clustered("keys"), clustered("keys"), draw(2, 4, 5, 8)
        if shared:
            layer.hold_cells(ta.Cells(draw(4, 4), torch.eye(4).double()))
        else:
            layer.hold_cells(layer.find_cells(x))
        twin.load_state_dict(layer.state_dict())
        compare(twin(x), layer(x))
        assert twin.cell_centres.data_ptr() != layer.cell_centres.data_ptr()
        other = ta.TensorAttention(8, 2, modes=2, operator="clustered", tokens=3)
        with pytest.raises(RuntimeError, match="cell_centres does not fit: tokens is 3, but cells has 4"):
            other.load_state_dict(layer.state_dict())
        with pytest.raises(RuntimeError, match="Unexpected key"):
            ta.TensorAttention(8, 2, modes=2, operator="kao_kv").load_state_dict(layer.state_dict())

    def test_cells_of_all_heads(self):
        layer, x, cells = clustered("keys"), draw(2, 4, 5, 8), ta.Cells(draw(4, 4), torch.eye(4).double())
        layer.hold_cells(cells)
        compare(layer(x), joined(layer, ta.clustered_attention(*heads_of(layer, x), order=2, cells=cells)))
        before = cells.centres.clone()
        layer.cell_centres.zero_()
        assert torch.equal(cells.centres, before)

    def test_holds_cells_anew(self):
        layer, x = clustered("Cells"), draw(2, 4, 5, 8)
        before = layer(x)
        layer.hold_cells(layer.find_cells(x))
        assert not torch.equal(layer(x), before)
        assert len(list(layer.buffers())) == 2

    @every_kind
    def test_in_a_block(self, kind):
        options = {"tokens": 4} | ({"cells": "blocks"} if kind == "blocks" else {})
        block = ta.TensorTransformerBlock(8, 2, modes=2, operator="clustered", **options).double()
        x = draw(2, 4, 5, 8)
        if kind == "Cells":
            block.attention.hold_cells(block.attention.find_cells(x))
        assert block(x).isfinite().all()

    @every_kind
    def test_where_positions_are_absent(self, kind):
        layer, x, mask = clustered(kind), draw(2, 4, 5, 8), draw(2, 4, 5, seed=5) > -0.3
        expected = layer(x, mask=mask)
        x[~mask] = torch.nan
        compare(layer(x, mask=mask), expected)
        assert expected[~mask].eq(0).all()


def feed(stream, x, sizes):
    return torch.cat([stream(chunk) for chunk in x.split(sizes, 2)], 2)


@every_fixed_kind
class TestStreams:
    def test_are_the_batch(self, kind):
        layer, x = clustered(kind, "h t", causal="t"), draw(2, 3, 6, 8)
        for sizes in (1, [2, 1, 3], 6):
            compare(feed(ta.AttentionStream(layer), x, sizes), layer(x))

    @pytest.mark.parametrize("window", [1, 2, 4, 9])
    def test_of_the_last_frames(self, kind, window):
        layer, x = clustered(kind, "h t", causal="t"), draw(2, 3, 6, 8)
        frames = [layer(x[:, :, max(0, end - window) : end])[:, :, -1:] for end in range(1, 7)]
        for sizes in (1, [2, 1, 3]):
            compare(feed(ta.AttentionStream(layer, window=window), x, sizes), torch.cat(frames, 2))

    @pytest.mark.parametrize("window", [None, 3])
    def test_gradients(self, kind, window):
        layer, x = clustered(kind, "h t", causal="t"), draw(2, 3, 5, 8).requires_grad_()
        wanted = [x, *layer.parameters()]
        gradients = []
        for sizes in (5, [1, 2, 2]):
            y = feed(ta.AttentionStream(layer, window=window), x, sizes)
            gradients.append(torch.autograd.grad((y * draw(*x.shape, seed=1)).sum(), wanted))
        compare(*gradients, rtol=1e-8, atol=1e-10)

    @pytest.mark.parametrize("window", [None, 2])
    def test_no_frame_sees_a_later_one(self, kind, window):
        layer, x = clustered(kind, "h t", causal="t"), draw(2, 3, 6, 8)
        expected = ta.AttentionStream(layer, window=window)(x)[:, :, :4]
        x[:, :, 4:] = torch.nan
        assert torch.equal(ta.AttentionStream(layer, window=window)(x)[:, :, :4], expected)
        assert torch.equal(clustered(kind, "h t", causal="t")(x)[:, :, :4], layer(x)[:, :, :4])

    @pytest.mark.parametrize("window", [None, 3])
    def test_state_round_trip(self, kind, window):
        layer, x = clustered(kind, "h t", causal="t"), draw(2, 3, 6, 8)
        stream = ta.AttentionStream(layer, window=window)
        expected = feed(ta.AttentionStream(layer, window=window), x, [4, 2])[:, :, 4:]
        stream(x[:, :, :4])
        file = io.BytesIO()
        torch.save(stream.state_dict(), file)
        file.seek(0)
        other = ta.AttentionStream(layer, window=window)
        other.load_state_dict(torch.load(file))
        compare(other(x[:, :, 4:]), expected)

    def test_the_state_does_not_grow(self, kind):
        layer, x = clustered(kind, "h t", causal="t"), draw(2, 3, 6, 8)
        stream, sizes = ta.AttentionStream(layer), set()
        for frame in range(6):
            stream(x[:, :, frame : frame + 1])
            sizes.add(sum(t.numel() for t in stream.state_dict().values() if isinstance(t, torch.Tensor)))
        assert len(sizes) == 1


@pytest.mark.usefixtures("fresh_compiler")
class TestGraphs:
    @thorough
    @every_kind
    @pytest.mark.parametrize("control", [False, True])
    def test_compiles_in_one_graph(self, kind, control):
        layer, x = clustered(kind, additive_control=control), draw(2, 3, 4, 8).requires_grad_()
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        for given in ({}, {"mask": draw(2, 3, 4, seed=7) > -0.5})[: 1 + (kind != "keys")]:
            compare(gradients_of(compiled, layer, x, **given), gradients_of(layer, layer, x, **given), **GRADIENTS)

    @thorough
    @every_fixed_kind
    def test_causal_layers_compile(self, kind):
        layer, x = clustered(kind, causal=0), draw(2, 3, 4, 8).requires_grad_()
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        compare(gradients_of(compiled, layer, x), gradients_of(layer, layer, x), **GRADIENTS)

    @thorough
    @pytest.mark.parametrize("strict", [False, True])
    @every_kind
    def test_is_exported_for_all_sizes(self, kind, strict):
        cut = {"blocks": (2, 2)} if kind == "blocks" else {}  # by default that depends on the sizes
        layer = clustered(kind, **cut).eval()
        shapes = ({place: Dim.DYNAMIC for place in range(3)},)
        program = torch.export.export(layer, (draw(2, 3, 5, 8),), dynamic_shapes=shapes, strict=strict)
        for sizes in ((3, 7, 4), (2, 6, 9)):
            compare(program.module()(draw(*sizes, 8)), layer(draw(*sizes, 8)))

    @thorough
    def test_is_exported_for_more_positions_than_are_searched_and_than_a_slab_has(self):
        layer = make("clustered", 2, tokens=4, dtype=torch.float32).eval()
        shapes = ({1: Dim.DYNAMIC, 2: Dim.DYNAMIC},)
        program = torch.export.export(layer, (draw(1, 30, 50, 8, dtype=torch.float32),), dynamic_shapes=shapes)
        for sizes in ((60, 50), (130, 140)):
            x = draw(1, *sizes, 8, dtype=torch.float32)
            compare(program.module()(x), layer(x), rtol=1e-4, atol=1e-5)


class TestTypes:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @every_kind
    def test_half_precision(self, kind, dtype):
        layer, x = clustered(kind, dtype=dtype), draw(2, 4, 5, 8, dtype=dtype).requires_grad_()
        exact = copy.deepcopy(layer).double()(x.double())
        y = layer(x)
        assert y.dtype == dtype
        if kind == "blocks":  # elsewhere keys between two cells may fall into the other
            compare(y.double(), exact, rtol=0.05, atol=0.05)
        assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()

    @every_kind
    def test_autocast(self, kind):
        layer, x = clustered(kind, dtype=torch.float32), draw(2, 4, 5, 8, dtype=torch.float32).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        if kind == "blocks":
            compare(y.float(), layer(x), rtol=0.05, atol=0.05)
        assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()

    @every_kind
    def test_channels_first(self, kind):
        layer, x = clustered(kind), draw(2, 4, 5, 8)
        first = clustered(kind, channels_first=True)
        if kind == "Cells":
            first.hold_cells(layer.options["cells"])
        compare(first(x.movedim(-1, 1)), layer(x).movedim(-1, 1))


class TestCost:
    @pytest.fixture(autouse=True)
    def where_nothing_is_read(self, monkeypatch):
        """As on an accelerator, where a search does all its rounds."""
        monkeypatch.setattr(cells, "readable", lambda tensor: False)

    @pytest.mark.parametrize("kind", ["blocks", "keys"])
    def test_is_counted_on_the_meta_device(self, kind):
        less, more = (
            ta.cost("clustered", sizes, dim=32, modes="t h w", tokens=8, cells=kind)
            for sizes in ((4, 8, 8), (4, 16, 16))
        )
        assert less.calls == more.calls and 3 < more.flops / less.flops < 5

    @staticmethod
    def calls(kind, sizes, **given):
        layer = make("clustered", 3, 32, 4, torch.float32, cells=kind, tokens=64, **given)
        x = draw(2, *sizes, 32, dtype=torch.float32).requires_grad_()
        leaves, above = [x, *layer.parameters()], torch.ones_like(x)
        forward = count_calls(lambda: layer(x))
        return forward, count_calls(lambda: torch.autograd.grad(layer(x), leaves, above))

    @pytest.mark.parametrize("kind", ["blocks", "keys"])
    def test_calls_are_as_many_at_every_size_and_no_more_than_today(self, kind):
        small, large = (self.calls(kind, sizes) for sizes in ((4, 5, 6), (6, 8, 7)))
        assert small == large
        assert large[0] <= TODAY[kind][0] and large[1] <= TODAY[kind][1]

    def test_causal_calls_are_as_many_at_every_size(self):
        small, large = (self.calls("blocks", sizes, causal=0) for sizes in ((4, 5, 6), (6, 8, 7)))
        assert small == large

    @thorough
    @pytest.mark.xfail(reason="each statistic takes many small calls")
    @pytest.mark.parametrize("kind", ["blocks", "keys"])
    def test_calls_are_few(self, kind):
        forward, both = self.calls(kind, (4, 5, 6))
        assert forward <= WANTED[kind][0] and both <= WANTED[kind][1]


class TestRefusals:
    def test_of_options(self):
        cells = ta.Cells(draw(2, 4, 4), torch.eye(4).double().expand(2, 4, 4))
        name = "TensorAttention: "
        for message, given in {
            "tokens must be at least 1, got 0.": {"tokens": 0},
            "cells must be 'keys', 'blocks' or Cells, got 'trees'.": {"cells": "trees"},
            "blocks has no meaning with cells='keys': it needs cells='blocks'.": {"blocks": (2, 2)},
            "dropout has no meaning for operator 'clustered': a cell stands for many positions, which would be "
            "dropped together.": {"dropout": 0.1},
            "causal has no meaning for operator 'clustered': the search among keys would see later frames; take "
            "cells='blocks', or those of find_cells.": {"causal": 0},
            "causal has no meaning for operator 'clustered': additive_control takes averages over all frames.": {
                "cells": cells,
                "causal": 0,
                "additive_control": True,
            },
            "cells have centres of shape (3, 4, 4), but the heads need (2, 4, 4).": {
                "cells": ta.Cells(draw(3, 4, 4), cells.metric)
            },
            "cells have centres of shape (2, 4, 5), but the heads need (2, 4, 4).": {
                "cells": ta.Cells(draw(2, 4, 5), torch.eye(5).double())
            },
        }.items():
            refused(OptionError, name + message, ta.TensorAttention, 8, 2, modes=2, operator="clustered", **given)

    def test_of_a_position_bias(self):
        with pytest.raises(
            OptionError, match="position_bias has no meaning for operator 'clustered': keys of one cell"
        ):
            bias = ta.RelativePositionBias(2, modes=2, max_distance=3)
            ta.TensorAttention(8, 2, modes=2, operator="clustered", position_bias=bias)

    def test_of_cells_by_other_operators(self):
        layer, cells = ta.TensorAttention(8, 2, modes=2), ta.Cells(draw(2, 4, 4), draw(2, 4, 4))
        message = f"operator {layer.operator!r} takes no cells."
        refused(OptionError, f"TensorAttention.find_cells: {message}", layer.find_cells, draw(2, 4, 4, 8))
        refused(OptionError, f"TensorAttention.hold_cells: {message}", layer.hold_cells, cells)

    def test_of_cells_that_do_not_fit(self):
        eye = torch.eye(4).double()
        for message, options, given in (
            ("cells must be Cells, got NoneType.", {}, None),
            ("cells have centres of shape (3, 4, 4), but the heads need (2, 4, 4).", {}, ta.Cells(draw(3, 4, 4), eye)),
            (
                "cells have metric of shape (3, 4, 4), but the heads need (2, 4, 4).",
                {},
                ta.Cells(draw(4, 4), draw(3, 4, 4)),
            ),
            ("cells have centres of shape (4, 5), but the heads need (2, 4, 4).", {}, ta.Cells(draw(4, 5), draw(5, 5))),
            ("tokens is 7, but cells has 4.", {"tokens": 7}, ta.Cells(draw(4, 4), eye)),
            (
                "blocks has no meaning with cells=Cells(4 centres of 4 channels): it needs cells='blocks'.",
                {"cells": "blocks", "blocks": (2, 2)},
                ta.Cells(draw(4, 4), eye),
            ),
        ):
            layer = ta.TensorAttention(8, 2, modes=2, operator="clustered", **options)
            with pytest.raises(OptionError) as error:
                layer.hold_cells(given)
            assert str(error.value).startswith(f"TensorAttention.hold_cells: {message}")
            assert not list(layer.buffers())
