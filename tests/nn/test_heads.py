"""Heads as hosts have them: of any size, fewer of keys than of queries, with norms, turns, scales and biases apart."""

from __future__ import annotations

import pytest
import torch
from modules import draw
from torch import nn

import tensorattn as ta
from nn.layers import CAUSAL, GRADIENTS, VARIANTS, compare, every_variant, heads_of, joined, make, more
from tensorattn.functional import OPERATORS

SIZES = (2, 3, 4)
FIXED = [v for v in VARIANTS if v.name != "clustered" or v.options.get("cells") == "blocks"]  # cells of no search


def repeated(layer):
    """The same layer with as many heads of keys as of queries, each a copy."""
    group, settings = layer.num_heads // layer.num_kv_heads, {}
    settings |= {} if layer.causal is None else {"causal": layer.causal}
    other = ta.TensorAttention(
        layer.embed_dim,
        layer.num_heads,
        modes=layer.modes.order,
        operator=layer.operator,
        head_dim=layer.head_dim,
        dtype=torch.float64,
        project=layer.project,
        **layer.options,
        **settings,
    )
    state = dict(layer.state_dict())
    for name in ("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias"):
        state[name] = state[name].unflatten(0, (-1, layer.head_dim)).repeat_interleave(group, 0).flatten(0, 1)
    other.load_state_dict(state)
    return other


class TestSizes:
    @every_variant
    @pytest.mark.parametrize("head_dim", more(3, 8))
    def test_other_than_the_share_of_the_channels(self, variant, head_dim):
        layer, x = make(variant, head_dim=head_dim), draw(2, *SIZES[1:], 8)
        assert layer.q_proj.out_features == layer.out_proj.in_features == 2 * head_dim
        function = OPERATORS[variant.name].function
        output = function(*heads_of(layer, x), order=2, **layer.options)
        compare(layer(x), joined(layer, output))
        assert f"head_dim={head_dim}" in layer.extra_repr()

    def test_heads_need_not_divide_the_channels(self):
        assert ta.TensorAttention(10, 4, modes=2, head_dim=6)(torch.randn(2, 3, 4, 10)).shape == (2, 3, 4, 10)

    @every_variant
    def test_scale(self, variant):
        layer, x = make(variant, scale=0.125), draw(2, *SIZES[1:], 8)
        output = OPERATORS[variant.name].function(*heads_of(layer, x), order=2, scale=0.125, **layer.options)
        compare(layer(x), joined(layer, output))
        assert "scale=0.125" in layer.extra_repr()


class TestBiases:
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("qkv_bias", [None, True, False])
    @pytest.mark.parametrize("out_bias", [None, True, False])
    def test_apart(self, bias, qkv_bias, out_bias):
        layer = ta.TensorAttention(8, 2, modes=2, bias=bias, qkv_bias=qkv_bias, out_bias=out_bias)
        wanted = [bias if qkv_bias is None else qkv_bias] * 3 + [bias if out_bias is None else out_bias]
        maps = (layer.q_proj, layer.k_proj, layer.v_proj, layer.out_proj)
        assert [linear.bias is not None for linear in maps] == wanted
        layer(torch.randn(2, 3, 4, 8)).sum().backward()


class TestDropoutOfTheOutput:
    @pytest.mark.parametrize("settings", more({}, {"operator": "kao_qkv"}, {"channels_first": True}), ids=str)
    def test_before_what_is_skipped(self, settings):
        layer = make(settings.pop("operator", "additive"), proj_drop=0.5, **settings)
        x = draw(2, *((8, 30, 40) if settings else (30, 40, 8)))
        dropped = layer(x, skip=x) - x
        plain = layer.eval()(x)
        kept = dropped.abs() > 1e-12
        compare(dropped, 2 * plain * kept, **GRADIENTS)
        assert abs(kept.double().mean() - 0.5) < 0.05
        assert "proj_drop=0.5" in layer.extra_repr()

    def test_in_a_stream_too(self):
        layer, x = make("additive", causal=0, proj_drop=0.5), draw(2, 3, 40, 8)
        y = ta.AttentionStream(layer)(x)
        assert abs(y.eq(0).double().mean() - 0.5) < 0.1
        layer.eval()
        compare(ta.AttentionStream(layer)(x), layer(x))


def some_fixed(variants):
    return pytest.mark.parametrize("variant", more(*variants, quick=6), ids=str)


class TestGroups:
    @pytest.mark.parametrize("settings", more({}, {"project": "positions"}, {"head_dim": 3}), ids=str)
    @some_fixed(
        [v._replace(options={**v.options, "cells": "blocks"}) if v.name == "clustered" else v for v in VARIANTS]
    )
    def test_are_heads_of_keys_repeated(self, variant, settings):
        layer = make(variant, 3, 16, 4, num_kv_heads=2, **settings)
        other, x = repeated(layer), draw(2, *SIZES, 16)
        assert layer.k_proj.out_features == layer.v_proj.out_features == 2 * layer.head_dim
        compare(layer(x), other(x))
        weights = [None, torch.tensor([1.0, 0.0, 2.0], dtype=x.dtype), None]
        compare(layer(x, weights=weights), other(x, weights=weights))
        mask = draw(2, *SIZES, seed=3) > -0.5
        if not OPERATORS[variant.name].needs(3, **layer.options).indices or "cells" in layer.options:
            compare(layer(x, mask=mask), other(x, mask=mask))
        compare(layer.attention(x), other.attention(x))
        assert "num_kv_heads=2" in layer.extra_repr()

    @some_fixed([v for v in CAUSAL if v in FIXED])
    def test_causal_and_streamed(self, variant):
        layer, x = make(variant, 2, 16, 4, num_kv_heads=2, causal=0), draw(2, 3, 4, 16)
        compare(layer(x), repeated(layer)(x))
        stream = ta.AttentionStream(layer)
        compare(torch.cat([stream(frame) for frame in x.split(1, 1)], 1), layer(x))
        again = ta.AttentionStream(layer)
        again.load_state_dict(stream.state_dict())
        compare(again(x), stream(x))

    @pytest.mark.parametrize("num_kv_heads", [1, 2])
    def test_cells_of_a_head_of_keys_are_found_for_its_group(self, num_kv_heads):
        layer, x = make("clustered", 2, 16, 4, num_kv_heads=num_kv_heads, tokens=5), draw(2, 6, 7, 16)
        group = 4 // num_kv_heads
        heads = [
            linear(x).unflatten(-1, (-1, 4)).movedim(-2, 1) for linear in (layer.q_proj, layer.k_proj, layer.v_proj)
        ]
        query, key, value = heads[0].unflatten(1, (-1, group)), *heads[1:]
        found = ta.clustered_attention(query, key, value, order=2, tokens=5, return_attention=True)
        compare(layer(x), joined(layer, found.output.flatten(1, 2)))
        weights, label = layer.attention(x)
        compare(weights, found.attention[0].flatten(1, 2))
        assert torch.equal(label, found.attention[1].repeat_interleave(group, 1))
        assert layer.attention_map(x, (0, 1)).shape == (2, 4, 6, 7)
        cells = layer.find_cells(x)
        assert cells.centres.shape == (num_kv_heads, 5, 4)
        layer.hold_cells(cells)
        expected = ta.clustered_attention(query, key, value, order=2, cells=cells).flatten(1, 2)
        compare(layer(x), joined(layer, expected))

    @pytest.mark.parametrize("cells", ["keys", "blocks"])
    def test_positions_that_a_mask_leaves_out_hold_anything(self, cells):
        layer, x = make("clustered", 2, 16, 4, num_kv_heads=2, tokens=5, cells=cells), draw(2, 6, 7, 16)
        mask = draw(2, 6, 7, seed=3) > -0.3
        compare(layer(x.masked_fill(~mask[..., None], torch.nan), mask=mask), layer(x, mask=mask))

    @every_variant
    def test_in_cross_attention(self, variant):
        if variant.operator.query != "positions" or variant.options.keys() & {"include_self", "kept"}:
            return
        layer, x, context = make(variant, 2, 16, 4, num_kv_heads=2), draw(2, 3, 4, 16), draw(2, 3, 3, 5, 16, seed=2)
        if variant in FIXED:
            compare(layer(x, context), repeated(layer)(x, context))
        assert layer(x, context).shape == x.shape


class TestNorms:
    """Queries and keys are normed in every head; where they are averaged, their averages are."""

    @staticmethod
    def layer(name, norm=True, modes=2, **settings):
        layer = make(name, modes, 16, 2, qk_norm=norm, **settings)
        with torch.no_grad():
            for seed, parameter in enumerate([*layer.q_norm.parameters(), *layer.k_norm.parameters()]):
                parameter.copy_(draw(8, seed=seed))
        return layer

    @staticmethod
    def parts(layer, x):
        q, k, v = heads_of(layer, x)
        means = [layer.k_norm(k.mean(3)), layer.k_norm(k.mean(2))], [v.mean(3), v.mean(2)]
        return q, *means, v.mean((2, 3), keepdim=True)

    @pytest.mark.parametrize("project", ["averages", "positions"])
    @pytest.mark.parametrize("norm", more(True, nn.RMSNorm), ids=str)
    @pytest.mark.parametrize("name", ["flattened", "axial", "clustered"])
    def test_of_positions(self, name, norm, project):
        layer, x = self.layer(name, norm, project=project), draw(2, 3, 4, 16)
        q, k, v = heads_of(layer, x)
        expected = OPERATORS[name].function(layer.q_norm(q), layer.k_norm(k), v, order=2)
        compare(layer(x), joined(layer, expected))

    @pytest.mark.parametrize("project", ["averages", "positions"])
    def test_of_additive_attention(self, project):
        layer, x = self.layer("additive", project=project), draw(2, 3, 4, 16)
        q, keys, values, mean = self.parts(layer, x)
        output = -mean
        for key, value in zip(keys, values, strict=True):
            logits = torch.einsum("bhijd,bhnd->bhijn", layer.q_norm(q), key) / 8**0.5
            output = output + torch.einsum("bhijn,bhnd->bhijd", logits.softmax(-1), value)
        compare(layer(x), joined(layer, output))

    @pytest.mark.parametrize("project", ["averages", "positions"])
    def test_of_kao(self, project):
        for name in ("kao_kv", "kao_qkv"):
            layer, x = self.layer(name, project=project), draw(2, 3, 4, 16)
            q, keys, values, _ = self.parts(layer, x)
            key, value = torch.cat(keys, 2), torch.cat(values, 2)
            if name == "kao_kv":
                weights = (torch.einsum("bhijd,bhnd->bhijn", layer.q_norm(q), key) / 8**0.5).softmax(-1)
                output = torch.einsum("bhijn,bhnd->bhijd", weights, value)
            else:
                rows, columns = (
                    (layer.q_norm(mean) @ key.mT / 8**0.5).softmax(-1) @ value for mean in (q.mean(3), q.mean(2))
                )
                output = rows.unsqueeze(3) + columns.unsqueeze(2)
            compare(layer(x), joined(layer, output))

    def test_of_pairs_of_modes(self):
        layer = self.layer("truncated", interaction_order=2)
        flattened = self.layer("flattened")
        x = draw(2, 3, 4, 16)
        compare(layer(x), flattened(x))

    @pytest.mark.parametrize("name", ["flattened", "axial", "clustered"])
    def test_come_before_turns(self, name):
        rotary, x = ta.RotaryEmbedding(8, modes=2, base=3.0), draw(2, 3, 4, 16)
        layer = self.layer(name, rotary=rotary)
        q, k, v = heads_of(layer, x)
        expected = OPERATORS[name].function(rotary(layer.q_norm(q)), rotary(layer.k_norm(k)), v, order=2)
        compare(layer(x), joined(layer, expected))

    @pytest.mark.parametrize("pool", ["mean", "sum"])
    def test_come_before_turns_of_pooled_queries(self, pool):
        rotary, x = ta.RotaryEmbedding(8, modes=2, base=3.0), draw(2, 3, 4, 16)
        layer = self.layer("kronecker_product", rotary=rotary, pool=pool)
        q, k, _ = heads_of(layer, x)
        for mode, found in enumerate(layer.attention(x)):
            pooled = [getattr(part, pool)(3 - mode) for part in (q, k)]
            pairs = zip((layer.q_norm, layer.k_norm), pooled, strict=True)
            turned = [rotary.rotate_mode(norm(part), mode) for norm, part in pairs]
            compare(found, torch.softmax(turned[0] @ turned[1].mT / 8**0.5, -1))

    @pytest.mark.parametrize("name", OPERATORS)
    def test_a_mask_gradients_and_half_precision(self, name):
        layer, x = self.layer(name), draw(2, 3, 4, 16)
        mask = torch.ones(2, 3, 4, dtype=torch.bool)
        mask[0, 2:] = False
        y = layer(x.masked_fill(~mask[..., None], torch.nan), mask=mask)
        compare(y[0, :2], layer(x[:1, :2])[0])
        layer(x).square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
        half = self.layer(name, dtype=torch.bfloat16)
        assert half(x.bfloat16()).dtype == torch.bfloat16

    @pytest.mark.parametrize("name", ["additive", "kao_kv", "flattened"])
    def test_in_a_stream(self, name):
        layer, x = self.layer(name, causal=0), draw(2, 4, 3, 16)
        stream = ta.AttentionStream(layer)
        compare(torch.cat([stream(frame) for frame in x.split(1, 1)], 1), layer(x))


@pytest.mark.parametrize("settings", more({}, {"checkpoint": True}), ids=str)
@pytest.mark.parametrize("name", ["flattened", "clustered"])
def test_all_of_it_together(name, settings):
    """Grouped heads of another size, normed and turned, causal: against the function of the operator."""
    rotary, x = ta.RotaryEmbedding(6, modes=2, base=3.0), draw(2, 3, 4, 16)
    options = {"cells": "blocks", "tokens": 6} if name == "clustered" else {}
    layer = make(
        name,
        2,
        16,
        4,
        head_dim=6,
        num_kv_heads=2,
        qk_norm=True,
        rotary=rotary,
        scale=0.3,
        causal=0,
        **settings,
        **options,
    )
    q, k, v = (linear(x).unflatten(-1, (-1, 6)).movedim(-2, 1) for linear in (layer.q_proj, layer.k_proj, layer.v_proj))
    k, v = (part.repeat_interleave(2, 1) for part in (layer.k_norm(k), v))
    expected = OPERATORS[name].function(rotary(layer.q_norm(q)), rotary(k), v, order=2, causal=0, scale=0.3, **options)
    compare(layer(x), joined(layer, expected))
    layer(x).square().sum().backward()
    assert layer.k_proj.weight.grad.ne(0).any()


def test_blocks_and_models_pass_them_on():
    settings = {"num_kv_heads": 2, "head_dim": 6, "qk_norm": True, "qkv_bias": False, "proj_drop": 0.1, "scale": 0.5}
    block = ta.TensorTransformerBlock(16, 4, modes=2, **settings)
    config = {"modes": 2, "in_channels": 3, "embed_dim": 16, "depth": 1, "options": settings}
    model = ta.TensorTransformer.from_config(config)
    for layer in (block.attention, model.blocks[0].attention):
        told = "head_dim=6, num_kv_heads=2, scale=0.5, proj_drop=0.1"
        assert layer.extra_repr().endswith(told)
        assert layer.q_norm is not None
        assert (layer.q_proj.bias, layer.out_proj.bias is None) == (None, False)
    assert model(torch.randn(2, 3, 4, 3)).shape == (2, 3, 4, 16)
