"""Attention weights and maps of a layer, and biases of its logits: what its function gives on the projected heads."""

from __future__ import annotations

import itertools

import pytest
import torch

import tensorattn as ta
from tensorattn import slabs

CLOSE = {"rtol": 1e-10, "atol": 1e-12}
SIZES = (3, 4, 2, 3)
BIASED = [name for name, record in ta.OPERATORS.items() if "bias" not in record.lacks]
CAUSAL = [name for name, record in ta.OPERATORS.items() if "causal" not in record.lacks]

every_operator = pytest.mark.parametrize("operator", ta.OPERATORS)
orders = pytest.mark.parametrize("order", range(1, 5))
layouts = pytest.mark.parametrize("channels_first", [False, True])


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def maps_of(module):
    return module.q_proj, module.k_proj, module.v_proj


def layer(operator, order, embed=8, **changed):
    torch.manual_seed(1)
    module = ta.TensorAttention(embed, 2, **{"modes": order, "operator": operator, "dtype": torch.float64, **changed})
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return module


def given_to(module, x):
    return x.movedim(-1, 1) if module.channels_first else x


def apart(module, x, **settings):
    """The function of the operator on projected heads, and what the layer makes of its output."""
    q, k, v = (linear(x).unflatten(-1, (2, -1)).movedim(-2, 1) for linear in maps_of(module))
    function = ta.OPERATORS[module.operator].function
    settings |= module.options | ({} if module.causal is None else {"causal": module.causal})
    result = function(q, k, v, order=x.dim() - 2, return_attention=True, **settings)
    return module.out_proj(result.output.movedim(1, -2).flatten(-2)), result.attention


def assert_same(ours, theirs):
    """Compare nested tuples of tensors."""
    if isinstance(ours, torch.Tensor):
        torch.testing.assert_close(ours, theirs, **CLOSE)
        return
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert_same(one, other)


def headed(weights):
    return [None if w is None or w.dim() == 1 else w.unsqueeze(1) for w in weights]


class TestAttention:
    @layouts
    @orders
    @every_operator
    def test_weights_are_those_of_the_function(self, operator, order, channels_first):
        module, x = layer(operator, order, channels_first=channels_first), draw(2, *SIZES[:order], 8)
        assert_same(module.attention(given_to(module, x)), apart(module, x)[1])

    @orders
    @pytest.mark.parametrize("operator", CAUSAL)
    def test_causal(self, operator, order):
        for causal in range(order):
            module, x = layer(operator, order, causal=causal), draw(2, *SIZES[:order], 8)
            assert_same(module.attention(x), apart(module, x)[1])

    @pytest.mark.parametrize("options", [{"centered": True}, {"centered": True, "interaction": "linear"}], ids=str)
    def test_options(self, options):
        module, x = layer("kao_qkv", 3, **options), draw(2, *SIZES[:3], 8)
        assert_same(module.attention(x), apart(module, x)[1])

    @every_operator
    def test_weights_of_modes_and_a_mask(self, operator):
        module, x = layer(operator, 2), draw(2, 3, 4, 8)
        weights = [None, torch.arange(8.0).view(2, 4).double() + 1]
        assert_same(module.attention(x, weights=weights), apart(module, x, weights=[None, weights[1][:, None]])[1])
        mask = torch.tensor([[True] * 4, [True, True, False, False], [False] * 4])
        poisoned = x.masked_fill(~mask[..., None], torch.nan)
        assert_same(
            module.attention(poisoned, mask=mask), module.attention(x.masked_fill(~mask[..., None], 0), mask=mask)
        )

    @pytest.mark.parametrize("operator", ["additive", "truncated", "kao_kv", "flattened"])
    def test_a_context(self, operator):
        module, x, context = layer(operator, 2), draw(2, 3, 4, 8), draw(2, 2, 3, 2, 8, seed=1)
        q = module.q_proj(x).unflatten(-1, (2, -1)).movedim(-2, 1)
        k, v = (linear(context).unflatten(-1, (2, -1)).movedim(-2, 1) for linear in (module.k_proj, module.v_proj))
        expected = ta.OPERATORS[operator].function(q, k, v, order=3, return_attention=True).attention
        assert_same(module.attention(x, context), expected)
        assert_same(module.attention(x, module.summarize(context)), expected)

    def test_nothing_is_dropped(self):
        module, x = layer("additive", 2, dropout=0.9), draw(2, 3, 4, 8)
        assert_same(module.attention(x), module.eval().attention(x))


class TestMaps:
    @layouts
    @every_operator
    def test_maps_are_those_of_the_function(self, operator, channels_first):
        sizes = SIZES[:3]
        module, x = layer(operator, 3, channels_first=channels_first), draw(2, *sizes, 8)
        attention = apart(module, x)[1]
        for at in itertools.product(*map(range, sizes)):
            expected = ta.attention_map(attention, sizes, operator=operator, at=at)
            torch.testing.assert_close(module.attention_map(given_to(module, x), at), expected, **CLOSE)

    @every_operator
    def test_weights_of_samples(self, operator):
        module, x = layer(operator, 2), draw(2, 3, 4, 8)
        weights = [torch.tensor([1.0, 0, 2]).double(), torch.arange(8.0).view(2, 4).double()]
        headed = [weights[0], weights[1][:, None].expand(2, 2, 4)]
        attention = apart(module, x, weights=headed)[1]
        expected = ta.attention_map(attention, (3, 4), operator=operator, at=(2, 1), weights=headed)
        torch.testing.assert_close(module.attention_map(x, (2, 1), weights=weights), expected, **CLOSE)

    @pytest.mark.parametrize("operator", CAUSAL)
    def test_a_causal_query_sees_no_later_frame(self, operator):
        """The map of a query is that of the same layer without a causal mode on the frames up to its own."""
        module, free, x = layer(operator, 3, causal=1), layer(operator, 3), draw(2, *SIZES[:3], 8)
        for at in ((0, 0, 0), (2, 1, 1), (1, 3, 0)):
            found = module.attention_map(x, at)
            frames = at[1] + 1
            assert found[:, :, :, frames:].eq(0).all()
            torch.testing.assert_close(found[:, :, :, :frames], free.attention_map(x[:, :, :frames], at), **CLOSE)

    def test_a_mask_of_any_shape(self):
        mask = draw(2, 3, 4, seed=3) > -0.3
        for operator in ("flattened", "axial"):
            module, x = layer(operator, 2), draw(2, 3, 4, 8)
            found = module.attention_map(x, (1, 1), mask=mask)
            assert found.masked_select(mask[:, None].logical_not()).eq(0).all()

    def test_messages(self):
        module, x = layer("additive", 2), draw(2, 3, 4, 8)
        for at, message in (((3, 0), "at has index 3 at place 0"), ((1,), "at has 1 indices"), ((0.5, 0), "integers")):
            with pytest.raises(ta.OptionError, match=message):
                module.attention_map(x, at)
        with pytest.raises(ta.ShapeError, match=r"TensorAttention\.attention"):
            module.attention(draw(2, 3, 8))


class TestPositionBias:
    def biases(self, order):
        torch.manual_seed(2)
        relative = ta.RelativePositionBias(2, modes=order, max_distance=2).double()
        with torch.no_grad():
            for table in relative.tables:
                table.normal_()
        return [relative, ta.AlibiBias(2, modes=order).double(), ta.AxisWindow(modes=order, window=1)]

    @layouts
    @orders
    @pytest.mark.parametrize("operator", BIASED)
    def test_the_layer_is_the_function_with_the_bias(self, operator, order, channels_first, monkeypatch):
        x = draw(2, *SIZES[:order], 8)
        for bias in self.biases(order):
            module = layer(operator, order, channels_first=channels_first, position_bias=bias)
            expected, attention = apart(module, x, bias=bias(x.shape[1:-1]))
            skip = draw(*x.shape, seed=4)
            for positions in (1 << 12, 4):
                monkeypatch.setattr(slabs, "POSITIONS", positions)
                y = module(given_to(module, x), skip=given_to(module, skip))
                torch.testing.assert_close(y, given_to(module, expected + skip), **CLOSE)
            assert_same(module.attention(given_to(module, x)), attention)

    @orders
    @pytest.mark.parametrize("operator", [name for name in CAUSAL if name in BIASED])
    def test_causal(self, operator, order):
        x, bias = draw(2, *SIZES[:order], 8), self.biases(order)[0]
        for causal in range(order):
            module = layer(operator, order, causal=causal, position_bias=bias)
            expected, attention = apart(module, x, bias=bias(x.shape[1:-1]))
            torch.testing.assert_close(module(x), expected, **CLOSE)
            assert_same(module.attention(x), attention)

    @pytest.mark.parametrize("operator", ["additive", "truncated"])
    def test_with_a_correction_and_the_own_token(self, operator):
        x, bias = draw(2, *SIZES[:3], 8), self.biases(3)[0]
        for options in ({"interaction": "linear"}, {"include_self": True}):
            module = layer(operator, 3, position_bias=bias, **options)
            torch.testing.assert_close(module(x), apart(module, x, bias=bias(x.shape[1:-1]))[0], **CLOSE)

    def test_it_is_trained_saved_and_shown(self):
        bias = self.biases(2)[0]
        module, x = layer("additive", 2, position_bias=bias), draw(2, 3, 4, 8)
        module(x).square().sum().backward()
        assert all(table.grad.abs().sum() > 0 for table in bias.tables)
        assert "position_bias.tables.1" in module.state_dict()
        assert "(position_bias): RelativePositionBias(" in repr(module)

    @pytest.mark.parametrize("operator", [name for name in ta.OPERATORS if name not in BIASED])
    def test_operators_that_average_their_queries_refuse_it(self, operator):
        with pytest.raises(ta.OptionError, match=f"position_bias has no meaning for operator '{operator}'"):
            layer(operator, 2, position_bias=ta.AxisWindow(modes=2, window=1))

    @pytest.mark.parametrize(
        ("bias", "message"),
        [
            (ta.AxisWindow(modes=3, window=1), "position_bias has the modes"),
            (ta.AlibiBias(4, modes=2), "position_bias has 4 heads, but the layer has 2"),
            (torch.zeros(2, 3, 3), "position_bias must be a PositionBias, got Tensor"),
        ],
    )
    def test_messages(self, bias, message):
        with pytest.raises(ta.OptionError, match=message):
            layer("additive", 2, position_bias=bias)

    @pytest.mark.parametrize("shape", [(3, 4, 4), (1, 4, 5), (4, 4)])
    def test_a_bias_of_your_own_is_checked(self, shape):
        class Mine(ta.PositionBias):
            def bias(self, mode, size):
                return None if mode == 0 else torch.zeros(shape)

        module = layer("additive", 2, position_bias=Mine("h w"), modes="h w")
        with pytest.raises(ta.ShapeError, match=r"Mine: the bias of mode 'w' has shape .*, but needs \(2, 4, 4\)"):
            module(draw(2, 3, 4, 8))

    def test_neither_a_context_nor_a_stream_has_its_positions(self):
        module, x = layer("additive", 2, position_bias=ta.AlibiBias(2, modes=2)), draw(2, 3, 4, 8)
        with pytest.raises(ta.OptionError, match="context has no meaning with position_bias"):
            module(x, x)
        causal = layer("additive", 2, causal=0, position_bias=ta.AlibiBias(2, modes=2))
        with pytest.raises(ta.OptionError, match="position_bias"):
            ta.AttentionStream(causal)


class TestRotary:
    TURNED = ("flattened", "axial", "kronecker_product", "kronecker_sum")

    @layouts
    @orders
    @pytest.mark.parametrize("operator", ["flattened", "axial"])
    def test_queries_and_keys_are_turned(self, operator, order, channels_first):
        rotary = ta.RotaryEmbedding(8, modes=order, base=3.0)
        module = layer(operator, order, embed=16, rotary=rotary, channels_first=channels_first)
        x = draw(2, *SIZES[:order], 16)
        for weights in (None, [torch.arange(2.0 * n).view(2, n).double() + 1 for n in SIZES[:order]]):
            q, k, v = (linear(x).unflatten(-1, (2, -1)).movedim(-2, 1) for linear in maps_of(module))
            given = None if weights is None else headed(weights)
            function = ta.OPERATORS[operator].function
            expected = function(rotary(q), rotary(k), v, order=order, weights=given, return_attention=True)
            y = module(given_to(module, x), weights=weights)
            output = module.out_proj(expected.output.movedim(1, -2).flatten(-2))
            torch.testing.assert_close(y, given_to(module, output), **CLOSE)
            assert_same(module.attention(given_to(module, x), weights=weights), expected.attention)
        assert not torch.allclose(
            y, layer(operator, order, embed=16, channels_first=channels_first)(given_to(module, x))
        )

    @pytest.mark.parametrize("pool", ["mean", "sum"])
    @pytest.mark.parametrize("operator", ["kronecker_product", "kronecker_sum"])
    def test_pooled_queries_and_keys_are_turned_by_mode(self, operator, pool):
        rotary = ta.RotaryEmbedding(8, modes=2, base=3.0)
        module, x = layer(operator, 2, embed=16, rotary=rotary, pool=pool), draw(2, 3, 4, 16)
        q, k, _ = (linear(x).unflatten(-1, (2, -1)).movedim(-2, 1) for linear in maps_of(module))
        for mode, found in enumerate(module.attention(x)):
            pooled = [getattr(part, pool)(3 - mode) for part in (q, k)]
            turned = [rotary.rotate_mode(part, mode) for part in pooled]
            torch.testing.assert_close(found, torch.softmax(turned[0] @ turned[1].mT / 8**0.5, -1), **CLOSE)

    @pytest.mark.parametrize("operator", TURNED)
    def test_a_mask(self, operator):
        module, x = layer(operator, 2, embed=16, rotary=ta.RotaryEmbedding(8, modes=2)), draw(2, 3, 4, 16)
        mask = draw(2, 3, 4, seed=3) > -0.3
        poisoned = x.masked_fill(~mask[..., None], torch.nan)
        y = module(poisoned, mask=mask)
        assert y[~mask].eq(0).all()
        torch.testing.assert_close(y, module(x, mask=mask), **CLOSE)
        padded = torch.cat([x, torch.full_like(x, torch.inf)], 1)
        torch.testing.assert_close(module(padded, lengths=[3, None])[:, :3], module(x), **CLOSE)

    @pytest.mark.parametrize("operator", ["flattened", "axial"])
    def test_causal(self, operator):
        module = layer(operator, 2, embed=16, causal=0, rotary=ta.RotaryEmbedding(8, modes=2))
        x = draw(2, 3, 4, 16)
        torch.testing.assert_close(module(x)[:, :2], module(x[:, :2]), **CLOSE)

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"operator": "additive"}, "averages keys of different turns"),
            ({"rotary": ta.RotaryEmbedding(8, modes=3)}, "rotary has the modes"),
            ({"rotary": ta.RotaryEmbedding(4, modes=2)}, "rotary has head_dim 4, but the heads of the layer have 8"),
            ({"rotary": torch.zeros(2)}, "rotary must be a RotaryEmbedding, got Tensor"),
            ({"operator": "kronecker_sum", "qk_norm": True}, "rotary has no meaning with qk_norm"),
        ],
    )
    def test_messages(self, changed, message):
        given = {"operator": "flattened", "rotary": ta.RotaryEmbedding(8, modes=2), **changed}
        with pytest.raises(ta.OptionError, match=message):
            layer(given.pop("operator"), 2, embed=16, **given)

    def test_neither_a_context_nor_a_stream_has_its_positions(self):
        rotary, x = ta.RotaryEmbedding(8, modes=2), draw(2, 3, 4, 16)
        with pytest.raises(ta.OptionError, match="context has no meaning with rotary"):
            layer("flattened", 2, embed=16, rotary=rotary)(x, x)
        with pytest.raises(ta.OptionError, match="layer has rotary"):
            ta.AttentionStream(layer("axial", 2, embed=16, causal=0, rotary=rotary))


AT_ONCE = {
    "bias": ("additive", lambda: {"position_bias": ta.RelativePositionBias(2, modes=2, max_distance=3)}),
    "causal bias": ("additive", lambda: {"causal": 0, "position_bias": ta.AlibiBias(2, modes=2)}),
    "rotary": ("flattened", lambda: {"rotary": ta.RotaryEmbedding(8, modes=2)}),
    "pooled rotary": ("kronecker_product", lambda: {"rotary": ta.RotaryEmbedding(8, modes=2)}),
}


@pytest.mark.parametrize("case", AT_ONCE)
class TestEverywhere:
    """Types, compilers and second derivatives."""

    x = draw(2, 3, 4, 16)
    mask = draw(2, 3, 4, seed=2) > -0.5

    def module(self, case, dtype=torch.float64):
        operator, made = AT_ONCE[case]
        torch.manual_seed(0)
        return layer(operator, 2, embed=16, **made()).to(dtype)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, case, dtype):
        expected = self.module(case)(self.x)
        y = self.module(case, dtype)(self.x.to(dtype))
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), expected, rtol=0.05, atol=0.05)

    def test_autocast(self, case):
        expected, module = self.module(case)(self.x), self.module(case, torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(module(self.x.float()).double(), expected, rtol=0.05, atol=0.05)

    def test_compiled_and_exported(self, case):
        torch._dynamo.reset()
        module = self.module(case)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(self.x), module(self.x), **CLOSE)
        torch.testing.assert_close(compiled(self.x, mask=self.mask), module(self.x, mask=self.mask), **CLOSE)
        exported = torch.export.export(module, (self.x,), strict=False).module()
        torch.testing.assert_close(exported(self.x), module(self.x), **CLOSE)

    def test_derivatives(self, case):
        module, x = self.module(case), self.x[:1, :2, :2].clone().requires_grad_()
        assert torch.autograd.gradcheck(module, (x,))
        assert torch.autograd.gradgradcheck(module, (x,), atol=1e-4)
        torch.testing.assert_close(torch.func.vmap(module)(self.x[:, None]), module(self.x)[:, None], **CLOSE)
