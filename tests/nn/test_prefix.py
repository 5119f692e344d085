"""Class and register tokens beside the grid: they attend and are attended to, as each operator tells."""

from __future__ import annotations

import math

import pytest
import torch
from modules import draw, refused

import tensorattn as ta
from nn.layers import GRADIENTS, compare, every_operator, every_variant, heads_of, joined, make, more
from tensorattn.diagnose.cost import count_calls
from tensorattn.errors import DtypeError, OptionError, ShapeError
from tensorattn.functional import OPERATORS

SIZES = (2, 3, 4)
GRID = [name for name, record in OPERATORS.items() if record.query == "grid"]


def given(order=3, tokens=2, channels=8):
    return draw(2, *SIZES[:order], channels), draw(2, tokens, channels, seed=5)


def full(layer, x, prefix, mask=None):
    """Full attention over tokens and positions one behind the other: the outputs of positions and of tokens."""
    rows, count = torch.cat([x.flatten(1, -2), prefix], 1), prefix.shape[1]
    seen = None if mask is None else torch.cat([mask.flatten(1), mask.new_ones(len(x), count)], 1).unsqueeze(1)
    scale = layer.scale
    found = joined(layer, ta.flattened_attention(*heads_of(layer, rows), order=1, mask=seen, scale=scale))
    y = found[:, :-count].reshape(x.shape) if count else found.reshape(x.shape)
    return (y if mask is None else y * mask.unsqueeze(-1)), found[:, found.shape[1] - count :]


class TestFlattened:
    @pytest.mark.parametrize("tokens", [1, 5])
    @pytest.mark.parametrize("order", more(3, 1, 2))
    def test_is_full_attention_over_all_together(self, order, tokens):
        layer, (x, prefix) = make("flattened", order), given(order, tokens)
        compare(layer(x, prefix=prefix), full(layer, x, prefix))
        with torch.no_grad():
            compare(layer(x, prefix=prefix), full(layer, x, prefix))

    def test_gradients_are_its_gradients(self):
        layer, inputs = make("flattened"), [part.requires_grad_() for part in given(2)]
        leaves, found = [*inputs, *layer.parameters()], []
        for outputs in (layer(inputs[0], prefix=inputs[1]), full(layer, *inputs)):
            loss = sum((part * draw(*part.shape, seed=9)).sum() for part in outputs)
            found.append(torch.autograd.grad(loss, leaves))
        compare(*found, **GRADIENTS)

    def test_masks_speak_of_the_grid_alone(self):
        layer, (x, prefix) = make("flattened"), given(2)
        mask = draw(*x.shape[:-1], seed=3) > -0.3
        mask[1] = False  # a sample without any position
        hidden = x.masked_fill(~mask.unsqueeze(-1), torch.nan)
        compare(layer(hidden, prefix=prefix, mask=mask), full(layer, x, prefix, mask))

    def test_weights_speak_of_the_grid_alone(self):
        layer, (x, prefix) = make("flattened"), given(2)
        doubled = layer(x, prefix=prefix, weights=[None, torch.tensor([1.0, 2.0, 1.0], dtype=x.dtype)])
        y, out = layer(torch.cat([x, x[:, :, 1:2]], 2), prefix=prefix)
        compare(doubled, (y[:, :, :3], out))

    def test_a_bias_speaks_of_the_grid_alone(self):
        class Mine(ta.PositionBias):
            def bias(self, mode, size):
                return draw(2, size, size, seed=mode)

        layer, (x, prefix) = make("flattened", position_bias=Mine(2)), given(2)
        q, k, v = heads_of(layer, torch.cat([x.flatten(1, 2), prefix], 1))
        parts = [draw(2, n, n, seed=mode) for mode, n in enumerate(SIZES[:2])]
        bias = (parts[0][:, :, None, :, None] + parts[1][:, None, :, None, :]).reshape(2, 6, 6)
        bias = torch.nn.functional.pad(bias, (0, 2, 0, 2))
        found = joined(layer, ((q @ k.mT / 2 + bias).softmax(-1) @ v))
        compare(layer(x, prefix=prefix), (found[:, :6].reshape(x.shape), found[:, 6:]))

    def test_turns_speak_of_the_grid_alone(self):
        rotary, (x, prefix) = ta.RotaryEmbedding(8, modes=2, base=3.0), given(2, channels=16)
        layer = make("flattened", 2, 16, rotary=rotary, qk_norm=True)
        heads, of_tokens = heads_of(layer, x), heads_of(layer, prefix)
        norms = (layer.q_norm, layer.k_norm, lambda v: v)
        heads = [norm(part) for norm, part in zip(norms, heads, strict=True)]
        heads = [part.flatten(2, 3) for part in (rotary(heads[0]), rotary(heads[1]), heads[2])]
        of_tokens = [norm(part) for norm, part in zip(norms, of_tokens, strict=True)]
        rows = [torch.cat(pair, 2) for pair in zip(heads, of_tokens, strict=True)]
        found = joined(layer, ta.flattened_attention(*rows, order=1))
        compare(layer(x, prefix=prefix), (found[:, :6].reshape(x.shape), found[:, 6:]))

    def test_heads_of_every_kind(self):
        layer, (x, prefix) = make("flattened", 2, 8, 4, head_dim=3, num_kv_heads=2, scale=0.3), given(2)
        rows = torch.cat([x.flatten(1, 2), prefix], 1)
        q, k, v = (to(rows).unflatten(-1, (-1, 3)).transpose(1, 2) for to in (layer.q_proj, layer.k_proj, layer.v_proj))
        k, v = (part.repeat_interleave(2, 1) for part in (k, v))
        found = joined(layer, (0.3 * q @ k.mT).softmax(-1) @ v)
        compare(layer(x, prefix=prefix), (found[:, :6].reshape(x.shape), found[:, 6:]))


class TestJoined:
    """Operators whose queries may stand anywhere are joined with full attention to the tokens."""

    def test_additive_is_exact_on_additive_tensors(self):
        parts = draw(2, 3, 1, 1, 8), draw(2, 1, 4, 1, 8, seed=2), draw(2, 1, 1, 2, 8, seed=3)
        x, prefix = sum(parts), given()[1]
        for variant in ("additive", "truncated"):
            layer = make(variant, 3)
            compare(layer(x, prefix=prefix), full(layer, x, prefix))
        lengths = torch.tensor([[2, 4, 1], [3, 1, 2]])
        mask = torch.stack([_within(x.shape[1:4], own) for own in lengths])
        layer = make("additive", 3)
        compare(layer(x, prefix=prefix, lengths=lengths), full(layer, x, prefix, mask))

    @pytest.mark.parametrize("num_kv_heads", [1, 2])
    @pytest.mark.parametrize("tokens", [23, 24, 100])
    def test_clustered_is_exact_with_a_cell_for_each_position(self, tokens, num_kv_heads):
        layer, (x, prefix) = make("clustered", 3, tokens=tokens, num_kv_heads=num_kv_heads), given()
        x[:, 0, 0, 0] = x[:, 0, 0, 1]  # 23 of them differ
        other = make("flattened", 3, num_kv_heads=num_kv_heads)
        compare(layer(x, prefix=prefix), other(x, prefix=prefix), rtol=1e-6, atol=1e-8)

    def test_clustered_is_near_to_full_attention_where_keys_are(self):
        kinds = draw(2, 4, 8)
        place = torch.arange(24).reshape(SIZES) % 4
        x, prefix = kinds[:, place], given()[1]
        layer = make("clustered", 3, tokens=4)
        compare(layer(x, prefix=prefix), full(layer, x, prefix), rtol=1e-6, atol=1e-8)

    @pytest.mark.parametrize("weights", [None, [None, [1.0, 0.0, 2.0], [0.5, 1.0, 1.0, 3.0]]], ids=str)
    def test_kao_counts_a_token_as_a_position(self, weights):
        layer, (x, prefix) = make("kao_kv", 3), given()
        count = [torch.ones(n, dtype=x.dtype) for n in SIZES]
        for mode, own in enumerate(weights or ()):
            count[mode] = count[mode] if own is None else torch.tensor(own, dtype=x.dtype)
        q, k, v = heads_of(layer, x)
        grid = count[0][:, None, None] * count[1][:, None] * count[2]
        means = []
        for part in (k, v):
            sums = [(part * grid.unsqueeze(-1)).sum([m + 2 for m in range(3) if m != k]) for k in range(3)]
            behind = [grid.sum([m for m in range(3) if m != k]) for k in range(3)]
            pairs = zip(sums, behind, strict=True)
            means.append(torch.cat([s / torch.where(n > 0, n, 1).unsqueeze(-1) for s, n in pairs], 2))
        level = torch.cat(count).log() + math.log(grid.sum() / sum(c.sum() for c in count))
        own = heads_of(layer, prefix)
        key, value = (torch.cat([mean, part], 2) for mean, part in zip(means, own[1:], strict=True))
        level = torch.cat([level, torch.zeros(2, dtype=x.dtype)])

        def attend(query):
            return joined(layer, (query @ key.mT / 2 + level).softmax(-1) @ value)

        told = weights and [None if own is None else torch.tensor(own, dtype=x.dtype) for own in weights]
        y, out = layer(x, prefix=prefix, weights=told)
        compare((y.flatten(1, 3), out), (attend(q.flatten(2, 4)), attend(own[0])))

    @every_variant
    def test_without_logits_a_token_counts_as_a_position(self, variant):
        if variant.operator.query != "positions" or variant.options.get("include_self"):
            return
        layer, (_, prefix) = make(variant, 3, scale=0.0, bias=False), given()
        mask = draw(2, *SIZES, seed=3) > -0.3
        x, product = torch.zeros(2, *SIZES, 8, dtype=prefix.dtype), _within(SIZES, (2, 1, 3)).expand(mask.shape)
        for told in (None, mask, product):
            count = 24 if told is None else told.sum((1, 2, 3)).view(2, 1, 1)
            expected = layer.out_proj(layer.v_proj(prefix).sum(1, keepdim=True) / (count + 2))
            y, out = layer(x, prefix=prefix, mask=told)
            compare(out, expected.expand(2, 2, 8))
            seen = torch.ones_like(mask) if told is None else told
            compare(y, expected.view(2, 1, 1, 1, 8) * seen.unsqueeze(-1))

    @every_variant
    def test_by_the_log_sum_exp_of_the_function(self, variant):
        record = variant.operator
        layer, (x, prefix) = make(variant), given(2)
        if record.query != "positions" or record.joins:
            return
        (q, k, v), (own_q, own_k, own_v) = heads_of(layer, x), heads_of(layer, prefix)
        options = {n: value for n, value in layer.options.items() if n != "include_self"}
        found = []
        for query, told in ((q, layer.options), (own_q, options)):
            grid = record.function(query, k, v, order=2, return_lse=True, **told)
            logits = torch.einsum("bh...d,bhrd->bh...r", query, own_k) / 2
            of_tokens = torch.einsum("bh...r,bhrd->bh...d", logits.softmax(-1), own_v), logits.logsumexp(-1)
            output, _ = ta.merge_attention([(grid.output, grid.lse), of_tokens])
            found.append(joined(layer, output))
        rtol = {"rtol": 1e-7, "atol": 1e-8} if variant.name == "clustered" and "cells" not in variant.options else {}
        compare(layer(x, prefix=prefix)[0], found[0], **rtol)
        if not rtol:  # cells are found for the queries of the grid
            compare(layer(x, prefix=prefix)[1], found[1])

    def test_averages_weigh_tokens_more_than_full_attention_does(self):
        """Of what they hide, the variance of logits, a correction knows."""
        sizes, weight = (8, 10, 10), {}
        x, prefix = draw(2, *sizes, 16), draw(2, 2, 16, seed=5)
        for name, options in (
            ("flattened", {}),
            ("additive", {}),
            ("kao_kv", {}),
            ("additive", {"interaction": "linear"}),
        ):
            layer = ta.TensorAttention(
                16, 1, modes=3, operator=name, dtype=torch.float64, scale=0.3, bias=False, **options
            )
            with torch.no_grad():
                for linear in (layer.q_proj, layer.k_proj, layer.v_proj, layer.out_proj):
                    linear.weight.copy_(torch.eye(16))
                layer.v_proj.weight.zero_()[0, 15] = 1.0  # the value tells whether it is of a token
                y, _ = layer(x * torch.arange(16).lt(15), prefix=torch.cat([prefix[..., :15], torch.ones(2, 2, 1)], -1))
            weight[name, *options] = y[..., 0].mean()
        full = weight.pop(("flattened",))
        assert abs(weight.pop(("additive", "interaction")) / full - 1) < 0.1
        assert all(1.5 < each / full < 4 for each in weight.values())

    def test_an_operator_without_a_log_sum_exp_is_refused(self):
        def attend(query, summary, **_):
            return ta.AttentionResult(summary.value(())[..., None, :].expand(*query.shape[:-1], -1))

        mean = ta.Operator("mean", None, lambda order: ta.Needs(((),)), attend, frozenset)
        ta.register_operator(mean)
        try:
            layer, (x, prefix) = make("mean"), given(2)
            rule = "TensorAttention: prefix has no meaning for operator 'mean': it gives no log-sum-exp."
            with pytest.raises(OptionError) as error:
                layer(x, prefix=prefix)
            assert str(error.value).partition("\n")[0] == rule
        finally:
            del ta.OPERATORS["mean"]


def _within(sizes, lengths):
    """Where positions are within lengths."""
    parts = [torch.arange(n) < own for n, own in zip(sizes, lengths, strict=True)]
    return parts[0][:, None, None] & parts[1][:, None] & parts[2]


@pytest.mark.parametrize("name", GRID)
class TestGrids:
    """Where queries stand on the grid, it sees itself alone; tokens see all positions by full attention."""

    @pytest.mark.parametrize("settings", more({}, {"num_kv_heads": 1}, {"project": "positions"}), ids=str)
    def test_the_grid_sees_the_grid_and_tokens_see_all(self, name, settings):
        layer, (x, prefix) = make(name, 3, **settings), given()
        other = make("flattened", 3, **settings)
        other.load_state_dict(layer.state_dict())
        mask = torch.stack([_within(SIZES, own) for own in ((2, 3, 2), (1, 2, 4))])
        for told in ({}, {"mask": mask}):
            y, out = layer(x, prefix=prefix, **told)
            compare(y, layer(x, **told))
            compare(out, other(x, prefix=prefix, **told)[1])

    def test_with_norms_and_turns(self, name):
        if name == "kao_qkv":
            return
        settings = {"rotary": ta.RotaryEmbedding(8, modes=3, base=3.0), "qk_norm": True}
        layer, (x, prefix) = make(name, 3, 16, **settings), given(channels=16)
        other = make("flattened", 3, 16, **settings)
        other.load_state_dict(layer.state_dict())
        compare(layer(x, prefix=prefix)[1], other(x, prefix=prefix)[1])


class TestAny:
    @every_variant
    def test_none_and_no_tokens_change_nothing(self, variant):
        layer, (x, prefix) = make(variant, 3), given()
        y, out = layer(x, prefix=prefix[:, :0])
        compare(y, layer(x))
        assert out.shape == (2, 0, 8)
        assert isinstance(layer(x), torch.Tensor)

    @every_variant
    @pytest.mark.parametrize("settings", more({}, {"project": "positions"}, {"qk_norm": True}), ids=str)
    def test_gradients_reach_everything(self, variant, settings):
        if "qk_norm" in settings and (variant.options.get("interaction") or variant.options.get("additive_control")):
            return
        layer, (x, prefix) = make(variant, 3, **settings), given()
        outputs, leaves = [], [x.requires_grad_(), prefix.requires_grad_(), *layer.parameters()]
        for again in (False, True):
            layer.checkpoint = again
            y, out = layer(x, prefix=prefix)
            outputs.append([y, out, *torch.autograd.grad(y.square().sum() + out.square().sum(), leaves)])
        compare(*outputs, **GRADIENTS)
        assert all(part.isfinite().all() and part.ne(0).any() for part in outputs[0])

    @every_operator
    def test_channels_first_skips_and_half_precision(self, variant):
        layer, (x, prefix) = make(variant, 3), given()
        first = make(variant, 3, channels_first=True)
        y, out = layer(x, prefix=prefix, skip=x)
        moved = first(x.movedim(-1, 1), prefix=prefix, skip=x.movedim(-1, 1))
        compare((y.movedim(-1, 1), out), moved)
        compare(y - x, layer(x, prefix=prefix)[0])
        half = make(variant, 3, dtype=torch.bfloat16)
        assert [part.dtype for part in half(x.bfloat16(), prefix=prefix.bfloat16())] == [torch.bfloat16] * 2

    @every_operator
    def test_positions_that_are_left_out_hold_anything(self, variant):
        layer, (x, prefix) = make(variant, 3), given()
        mask = torch.stack([_within(SIZES, own) for own in ((2, 2, 3), (0, 0, 0))])
        y, out = layer(x.masked_fill(~mask.unsqueeze(-1), torch.inf), prefix=prefix, mask=mask)
        assert y[~mask].eq(0).all()
        compare((y, out), layer(x.masked_fill(~mask.unsqueeze(-1), 0.0), prefix=prefix, mask=mask))
        alone = make("flattened", 1)  # without any position tokens see each other
        alone.load_state_dict(layer.state_dict())
        compare(out[1], alone(prefix)[1])

    @pytest.mark.parametrize("name", more("additive", "flattened", "axial", "kao_kv"))
    def test_dropout(self, name):
        layer, (x, prefix) = make(name, 3, dropout=0.5, proj_drop=0.5), given()
        y, out = layer(x, prefix=prefix)
        assert abs(torch.cat([y.flatten(), out.flatten()]).eq(0).double().mean() - 0.5) < 0.2
        compare(layer.eval()(x, prefix=prefix), make(name, 3)(x, prefix=prefix))

    @pytest.mark.parametrize("name", more("additive", "kao_kv", "kao_qkv", "flattened"))
    def test_calls_are_as_many_at_every_size(self, name):
        layer = make(name, 3, 8, 2, torch.float32)
        shapes = [(3, 5, 5), (6, 8, 7)]
        counts = [
            count_calls(lambda s=s: layer(torch.ones(2, *s, 8, requires_grad=True), prefix=torch.ones(2, 3, 8)))
            for s in shapes
        ]
        assert counts[0] == counts[1]

    @pytest.mark.parametrize("name", more("additive", "clustered", "axial"))
    def test_is_exported(self, name):
        class Both(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = make(name, 3)

            def forward(self, x, prefix):
                return self.layer(x, prefix=prefix)

        module, (x, prefix) = Both(), given()
        compare(torch.export.export(module, (x, prefix)).module()(x, prefix), module(x, prefix))


class TestBlock:
    @pytest.mark.parametrize("settings", more({}, {"checkpoint": True}, {"channels_first": True}), ids=str)
    def test_is_a_block_over_all_together(self, settings):
        x, prefix = given(2)
        block = ta.TensorTransformerBlock(
            8, 2, modes=2, operator="flattened", layer_scale=0.5, dtype=torch.float64, **settings
        )
        other = ta.TensorTransformerBlock(8, 2, modes=1, operator="flattened", layer_scale=0.5, dtype=torch.float64)
        other.load_state_dict(block.state_dict())
        first = "channels_first" in settings
        y, out = block(x.movedim(-1, 1) if first else x, prefix=prefix)
        y = y.movedim(1, -1) if first else y
        compare(torch.cat([y.flatten(1, 2), out], 1), other(torch.cat([x.flatten(1, 2), prefix], 1)))

    def test_drops_samples_with_their_tokens(self):
        block = ta.TensorTransformerBlock(8, 2, modes=2, drop_path=0.5, dtype=torch.float64)
        x, prefix = draw(64, 2, 3, 8), draw(64, 2, 8, seed=2)
        y, out = block(x, prefix=prefix)
        kept, kept_tokens = ((after == before).flatten(1).all(1) for after, before in ((y, x), (out, prefix)))
        assert torch.equal(kept, kept_tokens)
        assert 0 < kept.sum() < 64


READING = "\n  modes    0 1\n  x        (2, 2, 3, 8)   batch=(2,) 0=2 1=3 C=8"
BAD = {
    "dimensions": ((2, 8), ShapeError, "prefix has 2 dimensions, but the layout (B R C) has 3."),
    "batch": ((3, 1, 8), ShapeError, "the batch is 2 in x but 3 in prefix."),
    "channels": ((2, 1, 9), ShapeError, "prefix has 9 channels, but embed_dim is 8."),
    "no tensor": (1, DtypeError, "prefix must be a torch.Tensor, got int."),
    "type": (
        torch.ones(2, 1, 8, dtype=torch.float64),
        DtypeError,
        "the type is torch.float32 in x but torch.float64 in prefix.",
    ),
    "device": (torch.ones(2, 1, 8, device="meta"), DtypeError, "the device is cpu in x but meta in prefix."),
}


@pytest.mark.parametrize("module", [ta.TensorAttention, ta.TensorTransformerBlock])
@pytest.mark.parametrize("case", BAD)
def test_tokens_that_do_not_fit(case, module):
    prefix, kind, rule = BAD[case]
    prefix = torch.ones(prefix) if isinstance(prefix, tuple) else prefix
    told = f"{module.__name__}: {rule}{READING}"
    refused(kind, told, module(8, 2, modes=2), torch.ones(2, 2, 3, 8), prefix=prefix)


def test_where_they_have_no_meaning():
    x, prefix = torch.ones(2, 2, 3, 8), torch.ones(2, 1, 8)
    rule = "TensorAttention: prefix has no meaning with {}" + READING
    told = rule.format("causal: they see all frames, and would tell earlier ones of later ones.")
    refused(OptionError, told, ta.TensorAttention(8, 2, modes=2, causal=0), x, prefix=prefix)
    layer = ta.TensorAttention(8, 2, modes=2)
    refused(OptionError, rule.format("a context: they are of x."), layer, x, x, prefix=prefix)
    layer = ta.TensorAttention(8, 2, modes=2, operator="kronecker_sum", mode_projections=True)
    refused(OptionError, rule.format("mode_projections: they are of no mode."), layer, x, prefix=prefix)


def test_a_stream_takes_none():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = ta.TensorAttention(8, 2, modes="t h", causal="t")

        def forward(self, x):
            return self.layer(x, prefix=x[:, 0])

    with pytest.raises(OptionError) as error:
        ta.ModuleStream(Model())(torch.ones(2, 1, 3, 8))
    assert "prefix has no meaning in a stream." in str(error.value)
