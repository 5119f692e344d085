"""The layer against the functional forms, for every operator: values, gradients, sizes, state, types, messages."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from modules import MISSING, all_drawn_anew, by_way_of_meta, draw, refused

import tensorattn as ta
from nn.layers import (
    CAUSAL,
    DEFAULTS,
    GRADIENTS,
    HALVES,
    PARAMETERS,
    VARIANTS,
    apart,
    compare,
    every_causal,
    every_operator,
    every_variant,
    headed,
    heads_of,
    joined,
    make,
    more,
    some,
)
from tensorattn.errors import DtypeError, ModesError, OptionError, ShapeError, WeightsError
from tensorattn.functional import OPERATORS

a_few = pytest.mark.parametrize("variant", more(VARIANTS[0], *VARIANTS[3:5], *VARIANTS[8:], quick=3), ids=str)
BIASED = [name for name, record in OPERATORS.items() if "bias" not in record.lacking(record.options)]
SIZES = (3, 4, 2, 3)


def keys(variant):
    """Names of the parameters of a layer."""
    return ["interaction_gain"] * (variant.options.get("interaction") is not None) + PARAMETERS


def test_every_option_has_a_variant():
    for name, operator in OPERATORS.items():
        tried = set().union(*(variant.options for variant in VARIANTS if variant.name == name))
        tried |= {"blocks"} & set(operator.options)  # counts of modes, so of one order: functional/test_clustered.py
        assert tried == set(operator.options), f"give each option of {name!r} a line in OPTIONS of testing/variants.py"


class TestValues:
    @every_variant
    @pytest.mark.parametrize("sizes", more((2, 3, 4), (3, 4), (1, 5), (5,), (2, 3, 2, 2), (3, 1, 2, 2, 2)), ids=str)
    def test_is_the_function_of_everything_projected(self, variant, sizes):
        """Values, and gradients of the input and of every parameter."""
        if len(sizes) == 1 and "kept" in variant.options:
            return
        layer, x = make(variant, len(sizes)), draw(2, *sizes, 8).requires_grad_()
        leaves = [x, *(parameter for name, parameter in layer.named_parameters() if "proj" in name)]
        rows = torch.tensor([0.5, 0, 2, 1, 3][: sizes[0]], dtype=torch.float64)
        for weights in (None, [rows, *(draw(2, n, seed=n).sigmoid() for n in sizes[1:])]):
            results = []
            for y in (layer(x, weights=weights), apart(layer, x, weights)[0]):
                results.append([y, *torch.autograd.grad((y * draw(*y.shape, seed=1)).sum(), leaves)])
            compare(*results, **GRADIENTS)
        for name, gradient in zip(["y", "x", *PARAMETERS], results[0], strict=True):
            assert name in ("q_proj.bias", "k_proj.bias") or gradient.abs().max() > 1e-6, name

    @every_operator
    @pytest.mark.parametrize("sizes", more((9, 3), (6, 1), (6, 6)), ids=str)
    def test_heads(self, variant, sizes):
        layer, x = make(variant, 2, *sizes), draw(2, 3, 4, sizes[0])
        compare(layer(x), apart(layer, x)[0])

    @every_variant
    def test_channels_first(self, variant):
        last, first, x = make(variant), make(variant, channels_first=True), draw(2, 3, 4, 8)
        weights = [None, draw(2, 4).sigmoid()]
        expected = last(x, weights=weights).movedim(-1, 1)
        for moved in (x.movedim(-1, 1), x.movedim(-1, 1).contiguous()):
            compare(first(moved, weights=weights), expected)

    @every_variant
    def test_modes_in_any_order(self, variant):
        """Sizes all different: the modes are permuted, and nothing else changes."""
        if "kept" in variant.options:
            return  # they name modes
        layer, x = make(variant, 3), draw(2, 2, 3, 5, 8)
        weights = [None, draw(3).sigmoid(), draw(2, 5).sigmoid()]
        y = layer(x, weights=weights)
        for order in ((2, 0, 1), (1, 0, 2)):
            dims, own = [0, *(1 + mode for mode in order), 4], [weights[mode] for mode in order]
            for permuted in (x.permute(dims), x.permute(dims).contiguous()):
                compare(layer(permuted, weights=own), y.permute(dims))

    @every_variant
    def test_strides_do_not_matter(self, variant):
        layer, x = make(variant), draw(2, 3, 4, 8)
        sliced = torch.full((4, 7, 9, 16), torch.nan, dtype=x.dtype)[::2, 1::2, 1::2, ::2]
        sliced.copy_(x)
        row = x[:, :1].expand(2, 3, 4, 8)
        for strided in (sliced, x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0), row):
            compare(layer(strided), layer(strided.contiguous()))

    @some([v for v in VARIANTS if not v.by_place])
    def test_weights_repeat(self, variant):
        """A weight of 2 is a repetition, 0 an absence: the positions that are there see the same."""
        layer, x = make(variant), draw(2, 3, 4, 8)
        rows, columns = torch.tensor([1, 0, 2]), torch.tensor([2, 1, 1, 3])
        repeated = x.repeat_interleave(rows, 1).repeat_interleave(columns, 2)
        y = layer(x, weights=[rows, columns]).repeat_interleave(rows, 1).repeat_interleave(columns, 2)
        compare(y, layer(repeated))

    @every_variant
    def test_the_bias_of_the_output_counts_once(self, variant):
        """It is all that a sample without any weight gets, and all that values of zero give."""
        layer, x = make(variant), draw(2, 3, 4, 8)
        if not variant.options.get("include_self"):  # then a query always sees itself
            y = layer(x, weights=[torch.tensor([[1.0, 1, 1], [0, 0, 0]]), None])
            compare(y, torch.stack([layer(x)[0], layer.out_proj.bias.expand(3, 4, 8)]))
        with torch.no_grad():
            layer.v_proj.weight.zero_()
            layer.v_proj.bias.zero_()
        compare(layer(x), layer.out_proj.bias.expand(2, 3, 4, 8))

    @every_operator
    def test_without_biases(self, variant):
        layer, x = make(variant, bias=False), draw(2, 3, 4, 8)
        assert list(layer.state_dict()) == [name for name in PARAMETERS if "weight" in name]
        compare(layer(x), apart(layer, x)[0])

    @every_variant
    def test_samples_do_not_see_each_other(self, variant):
        layer, x = make(variant), draw(3, 3, 4, 8)
        compare(layer(x), torch.cat([layer(sample) for sample in x.split(1)]))
        for each in (layer, make(variant, checkpoint=True)):
            none = x[:0].clone().requires_grad_()
            each(none).sum().backward()
            assert none.grad.shape == (0, 3, 4, 8)
            assert all(parameter.grad is None or parameter.grad.eq(0).all() for parameter in each.parameters())

    @every_operator
    def test_one_position(self, variant):
        """The only position is attended to with weight one, as often as the operator counts values."""
        layer, x = make(variant, 3), draw(2, 1, 1, 1, 8)
        times = 3 if variant.name in ("kao_qkv", "kronecker_sum") else 1
        compare(layer(x), layer.out_proj(times * layer.v_proj(x)))

    @a_few
    def test_any_size_after_any_other(self, variant):
        layer = make(variant)
        state = {name: value for name, value in vars(layer).items() if not name.startswith("_")}
        for sizes in ((3, 4), (5, 2), (1, 1), (7, 3), (3, 4)):
            x = draw(2, *sizes, 8)
            assert torch.equal(layer(x), make(variant)(x))
        assert {name: value for name, value in vars(layer).items() if not name.startswith("_")} == state

    @a_few
    def test_more_positions_than_32_bits_count(self, variant):
        """2³² positions of one sample, without memory for one of them."""
        if variant.name == "flattened":
            return  # the square of them has no address
        layer = make(variant, 3, device="meta")
        x = torch.empty(1, 1 << 12, 1 << 10, 1 << 10, 8, device="meta", dtype=torch.float64)
        assert layer(x, skip=x).shape == x.shape


class TestSkip:
    @every_operator
    @pytest.mark.parametrize("channels_first", more(False, True))
    def test_is_added_to_the_output(self, variant, channels_first):
        layer, shape = make(variant, channels_first=channels_first), (2, 8, 3, 8) if channels_first else (2, 3, 4, 8)
        x, other = draw(*shape).requires_grad_(), draw(*shape, seed=1).requires_grad_()
        for skip in (x, other):
            results = []
            for y in (layer(x, skip=skip), layer(x) + skip):
                results.append([y, *torch.autograd.grad((y * draw(*shape, seed=2)).sum(), [x, skip])])
            compare(*results, **GRADIENTS)


def curved(layer):
    """The layer with maps that are not affine."""
    for name in ("q_proj", "k_proj", "v_proj"):
        setattr(layer, name, torch.nn.Sequential(getattr(layer, name), torch.nn.Tanh()))
    return layer


@every_variant
class TestProjectedPositions:
    def test_is_the_same_where_maps_are_affine(self, variant):
        for causal in (None, 1):
            if causal is not None and "causal" in variant.lacks:
                continue
            settings = {"causal": causal, "channels_first": True}
            layer, other = make(variant, **settings), make(variant, project="positions", **settings)
            x, mask = draw(2, 8, 3, 4), draw(2, 3, 4) > -0.5
            for given in ({}, {"mask": mask}, {"lengths": [None, [2, 4]]}):
                compare(other(x, **given), layer(x, **given))
        assert "project='positions'" in other.extra_repr() and "project" not in layer.extra_repr()

    def test_is_the_function_whatever_the_maps(self, variant):
        layer, x = curved(make(variant, project="positions")), draw(2, 3, 4, 8)
        weights = [draw(3).sigmoid(), draw(2, 4).sigmoid()]
        compare(layer(x, weights=weights), apart(layer, x, weights)[0])
        averaged = curved(make(variant))
        if variant.operator.needs(2, **layer.options).held != ((0, 1),) or variant.operator.pools:
            assert not torch.allclose(averaged(x), layer(x))
        else:
            compare(averaged(x), layer(x))


@every_causal
class TestCausal:
    @pytest.mark.parametrize("causal", more("h", "t", -1))
    def test_is_the_function(self, variant, causal):
        layer, x = make(variant, "t h w", causal=causal), draw(2, 3, 2, 4, 8)
        for weights in (None, [draw(3).sigmoid(), None, draw(2, 4).sigmoid()]):
            compare(layer(x, weights=weights), apart(layer, x, weights)[0])
        assert layer.causal == {"t": 0, "h": 1, -1: 2}[causal]

    def test_no_frame_sees_a_later_one(self, variant):
        layer, x = make(variant, "h t", causal="t", channels_first=True), draw(2, 8, 3, 5)
        y, later = layer(x), x.clone()
        later[..., 3:] = torch.nan
        compare(layer(later)[..., :3], y[..., :3])
        assert layer(later)[..., 3:].isnan().all()
        compare(layer(x[..., :3]), y[..., :3])

    @pytest.mark.parametrize("absent", more(1, 0, 3))
    def test_absent_frames_may_hold_anything(self, variant, absent):
        layer, x = make(variant, "t h", causal="t"), draw(2, 4, 3, 8)
        weights = [torch.ones(4, dtype=torch.float64).index_fill(0, torch.tensor(absent), 0), None]
        there = [frame for frame in range(4) if frame != absent]
        poisoned = x.clone()
        poisoned[:, absent] = torch.nan
        compare(layer(poisoned, weights=weights)[:, there], layer(x[:, there]))

    def test_with_a_mask_of_any_shape(self, variant):
        layer, x, mask = make(variant, "t h", causal="t"), draw(2, 3, 4, 8), draw(2, 3, 4, seed=1) > -0.5
        x = x.masked_fill(~mask.unsqueeze(-1), torch.nan).requires_grad_()
        y = layer(x, mask=mask)
        assert (y[~mask] == 0).all()
        for frame in range(3):
            compare(layer(x[:, : frame + 1], mask=mask[:, : frame + 1])[:, frame], y[:, frame])
        for gradient in torch.autograd.grad(y.sum(), [x, *layer.parameters()]):
            assert gradient.isfinite().all()
        (early,) = torch.autograd.grad(layer(x, mask=mask)[:, 0].sum(), x)
        assert (early[:, 1:] == 0).all()


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.options.get("interaction")], ids=str)
def test_an_interaction_has_a_gain_a_head(variant):
    layer, x = make(variant, 3), draw(2, 3, 4, 2, 8)
    assert layer.interaction_gain.eq(1).all()
    outputs = {}
    for gain in ((0.0, 0.0), (1.0, 1.0), (3.0, 1.0), (1.0, 3.0)):
        with torch.no_grad():
            layer.interaction_gain.copy_(torch.tensor(gain))
        outputs[gain] = layer(x)
    plain = {name: value for name, value in variant.options.items() if name not in ("interaction", "saturation")}
    compare(outputs[0, 0], make(variant._replace(options=plain), 3)(x))
    by_head = [outputs[gain] - outputs[1, 1] for gain in ((3.0, 1.0), (1.0, 3.0))]
    assert all(part.abs().max() > 1e-3 for part in by_head)
    compare(by_head[0] + by_head[1], 2 * (outputs[1, 1] - outputs[0, 0]), **GRADIENTS)
    layer(x).square().sum().backward()
    assert layer.interaction_gain.grad.ne(0).all()


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.operator.pools], ids=str)
class TestPooled:
    """The Kronecker operators pool queries and keys, with maps of their own for each mode and norms if asked for."""

    @staticmethod
    def written_out(layer, variant, x):
        (_, rows, columns, _), size = x.shape, layer.embed_dim // layer.num_heads
        heads = lambda t: t.unflatten(-1, (layer.num_heads, -1)).movedim(-2, 1)  # noqa: E731
        matrices = []
        for mode, count in ((0, columns), (1, rows)):
            pooled = []
            for linear, norm in ((layer.q_proj, layer.q_norm), (layer.k_proj, layer.k_norm)):
                own = (p.chunk(2)[mode] if layer.mode_projections else p for p in (linear.weight, linear.bias))
                mean = heads(torch.nn.functional.linear(x.mean(2 - mode), *own))
                mean = mean * count if variant.options.get("pool") == "sum" else mean
                pooled.append(mean if norm is None else norm(mean))
            matrices.append((pooled[0] @ pooled[1].mT / size**0.5).softmax(-1))
        value = heads(layer.v_proj(x))
        if variant.name == "kronecker_product":
            return joined(layer, torch.einsum("bhij,bhkl,bhjld->bhikd", *matrices, value))
        output = torch.einsum("bhij,bhjkd->bhikd", matrices[0], value)
        return joined(layer, output + torch.einsum("bhkl,bhild->bhikd", matrices[1], value))

    @pytest.mark.parametrize("mode_projections", [False, True])
    @pytest.mark.parametrize("qk_norm", [False, True])
    def test_against_the_definition(self, variant, mode_projections, qk_norm):
        layer, x = make(variant, mode_projections=mode_projections, qk_norm=qk_norm), draw(2, 3, 4, 8)
        norms = [f"{name}_norm.{part}" for name in "qk" for part in ("weight", "bias")] if qk_norm else []
        with torch.no_grad():
            for seed, name in enumerate(norms):
                layer.get_parameter(name).copy_(draw(4, seed=seed))
        compare(layer(x), self.written_out(layer, variant, x))
        assert layer.q_proj.out_features == layer.k_proj.out_features == (16 if mode_projections else 8)
        assert list(layer.state_dict()) == PARAMETERS + norms
        assert ("mode_projections=True" in layer.extra_repr()) == mode_projections

    def test_maps_of_modes_are_drawn_each_for_itself(self, variant):
        layer = ta.TensorAttention(64, 4, modes=3, operator=variant.name, mode_projections=True, **variant.options)
        for block in layer.q_proj.weight.split(64):
            assert abs(block.std() / ((6 / 128) ** 0.5 / 3**0.5) - 1) < 0.1


every_dropping = pytest.mark.parametrize("variant", [v for v in VARIANTS if "dropout_p" not in v.lacks], ids=str)


class TestDropout:
    @every_dropping
    def test_in_training_only(self, variant):
        layer, plain, x = make(variant, dropout=0.5), make(variant), draw(2, 3, 4, 8)
        assert not torch.equal(layer(x), layer(x))
        assert torch.equal(layer.eval()(x), plain(x))
        assert torch.equal(plain(x), plain(x))

    @every_dropping
    def test_is_that_of_the_function(self, variant):
        layer, x = make(variant, dropout=1.0), draw(2, 3, 4, 8)
        output = variant.function(*heads_of(layer, x), order=2, dropout_p=1.0)
        compare(layer(x), joined(layer, output))

    @every_dropping
    def test_is_the_same_in_both_passes(self, variant):
        layer, x = make(variant, dropout=0.5), draw(2, 5, 6, 8)
        direction, step = draw(*x.shape, seed=1), 1e-6

        def loss(x):
            with torch.random.fork_rng():
                torch.manual_seed(0)
                return layer(x).square().sum() / 2

        (gradient,) = torch.autograd.grad(loss(leaf := x.clone().requires_grad_()), leaf)
        slope = (loss(x + step * direction) - loss(x - step * direction)) / (2 * step)
        compare((gradient * direction).sum(), slope.detach(), rtol=1e-5, atol=1e-6)


class TestState:
    @a_few
    def test_copies(self, variant):
        dropout = {} if "dropout_p" in variant.lacks else {"dropout": 0.5}
        layer, x = make(variant, modes="h w", **dropout).eval(), draw(2, 3, 4, 8)
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert repr(twin) == repr(layer) and twin.training is False
            assert torch.equal(twin(x), layer(x))
            with torch.no_grad():
                twin.v_proj.weight.add_(1)
            assert not torch.equal(twin(x), layer(x))

    @every_variant
    def test_is_four_linear_maps(self, variant):
        layer, x, file = make(variant), draw(2, 3, 4, 8), io.BytesIO()
        layer(x)
        assert list(layer.state_dict()) == keys(variant) and list(layer.buffers()) == []
        torch.save(layer.state_dict(), file)
        file.seek(0)
        other = ta.TensorAttention(8, 2, modes=2, operator=variant.name, dtype=torch.float64, **variant.options)
        assert not torch.equal(other(x), layer(x))
        other.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(other(x), layer(x))

    def test_one_state_serves_every_operator(self):
        state = make(VARIANTS[0]).state_dict()
        for variant in VARIANTS:
            loaded = make(variant).load_state_dict(state, strict=variant.options.get("interaction") is None)
            assert loaded.missing_keys == keys(variant)[: -len(PARAMETERS)] and loaded.unexpected_keys == []

    def test_parameters_are_drawn(self):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layer = ta.TensorAttention(64, 4, modes=3)
            torch.manual_seed(0)
            twin = ta.TensorAttention(64, 4, modes=3)
        for name, value in layer.state_dict().items():
            assert torch.equal(value, twin.state_dict()[name])
            if "bias" in name:
                assert value.eq(0).all()
            else:
                bound = (6 / 128) ** 0.5  # Xavier, uniform
                assert value.abs().max() <= bound and abs(value.std() / (bound / 3**0.5) - 1) < 0.1

    def test_all_parameters_are_drawn_anew(self):
        bias = ta.RelativePositionBias(2, modes=2, max_distance=3)
        all_drawn_anew(ta.TensorAttention(8, 2, modes=2, interaction="linear", position_bias=bias))
        pooled = ta.TensorAttention(8, 2, modes=2, operator="kronecker_sum", mode_projections=True, qk_norm=True)
        all_drawn_anew(pooled)

    def test_the_way_from_the_meta_device(self):
        layer, x = make("additive", position_bias=ta.AlibiBias(2, modes=2).double()), draw(2, 3, 4, 8)
        build = lambda: make("additive", position_bias=ta.AlibiBias(2, modes=2).double())  # noqa: E731
        for reset in (False, True):
            assert torch.equal(by_way_of_meta(build, layer, reset)(x), layer(x))

    def test_what_it_shows(self):
        layer = ta.TensorAttention(8, 2, modes="t h", operator="kao_kv", channels_first=True, dropout=0.25)
        told = "embed_dim=8, num_heads=2, modes='t h', operator='kao_kv', channels_first=True, dropout=0.25"
        assert layer.extra_repr() == told
        told = "embed_dim=8, num_heads=2, modes=3, operator='kao_qkv', centered=True, checkpoint=True"
        layer = ta.TensorAttention(8, 2, modes=3, operator="kao_qkv", centered=True, checkpoint=True)
        assert layer.extra_repr() == told
        for modes, kept in (("t h w", [("t",), ("h", "w")]), (3, [(0,), (1, 2)])):
            layer = ta.TensorAttention(8, 2, modes=modes, operator="truncated", kept=kept)
            assert f"kept={tuple(kept)!r}" in layer.extra_repr()
        assert "causal='w'" in ta.TensorAttention(8, 2, modes="h w", causal=-1).extra_repr()

    @a_few
    def test_names_of_modes_are_names_only(self, variant):
        x = draw(2, 3, 4, 8)
        named, tuples, numbered = (make(variant, modes) for modes in ("h w", ("h", "w"), 2))
        assert torch.equal(named(x), numbered(x)) and torch.equal(tuples(x), numbered(x))

    @a_few
    def test_integers_of_numpy(self, variant):
        layer = ta.TensorAttention(np.int64(8), np.int32(2), modes=np.int16(2), operator=variant.name)
        assert (type(layer.embed_dim), type(layer.num_heads), layer.modes.order) == (int, int, 2)
        assert layer(torch.ones(2, 3, 4, 8)).shape == (2, 3, 4, 8)


class TestTypes:
    def test_where_parameters_live(self):
        for dtype in (torch.float64, *HALVES):
            layer = ta.TensorAttention(8, 2, modes=2, device="meta", dtype=dtype)
            assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", dtype)}
        assert {p.dtype for p in ta.TensorAttention(8, 2, modes=2).parameters()} == {torch.get_default_dtype()}

    @a_few
    def test_without_values(self, variant):
        layer = make(variant, 3, 16, 4, torch.bfloat16, device="meta")
        x = torch.empty(2, 5, 6, 7, 16, device="meta", dtype=torch.bfloat16)
        for weights in (None, [torch.ones(5), None, torch.ones(2, 7)]):
            y = layer(x, weights=weights)
            assert (y.shape, y.dtype, y.device.type) == (x.shape, torch.bfloat16, "meta")

    @every_variant
    @pytest.mark.parametrize("dtype", more(*HALVES))
    def test_half_precision_is_no_worse_than_projecting_everything(self, variant, dtype):
        layer, x = make(variant, 2, 16, 4, dtype=dtype), draw(2, 6, 7, 16, dtype=dtype)
        exact, leaf = copy.deepcopy(layer).double()(x.double()), x.clone().requires_grad_()
        y = layer(leaf)
        assert y.dtype == dtype
        ours, theirs = ((z.double() - exact).abs().max() for z in (y, apart(layer, x)[0]))
        assert ours <= 2 * theirs + torch.finfo(dtype).eps * exact.abs().max()
        y.float().square().sum().backward()
        for gradient in (leaf.grad, *(p.grad for p in layer.parameters())):
            assert gradient.dtype == dtype and gradient.isfinite().all()


class TestAttention:
    @every_variant
    @pytest.mark.parametrize("order", more(3, 1, 2, 4))
    @pytest.mark.parametrize("channels_first", more(False, True))
    def test_weights_are_those_of_the_function(self, variant, order, channels_first):
        if order == 1 and "kept" in variant.options:
            return
        dropout = 0.0 if "dropout_p" in variant.lacks else 0.9
        layer, x = make(variant, order, channels_first=channels_first, dropout=dropout), draw(2, *SIZES[:order], 8)
        weights = [draw(2, n, seed=n).sigmoid() for n in SIZES[:order]]
        given = x.movedim(-1, 1) if channels_first else x
        compare(layer.attention(given, weights=weights), apart(layer, x, weights)[1])  # nothing is dropped

    @every_causal
    def test_causal(self, variant):
        for causal in range(2):
            layer, x = make(variant, causal=causal), draw(2, 3, 4, 8)
            compare(layer.attention(x), apart(layer, x)[1])

    @every_operator
    def test_what_a_mask_leaves_out_is_not_looked_at(self, variant):
        layer, x = make(variant), draw(3, 3, 4, 8)
        mask = torch.tensor([[True] * 4, [True, True, False, False], [False] * 4])
        hidden = [x.masked_fill(~mask[..., None], fill) for fill in (torch.nan, 0)]
        compare(*(layer.attention(part, mask=mask) for part in hidden))

    @pytest.mark.parametrize("name", ["additive", "truncated", "kao_kv", "flattened"])
    def test_of_a_context(self, name):
        layer, x, context = make(name), draw(2, 3, 4, 8), draw(2, 2, 3, 2, 8, seed=1)
        heads = heads_of(layer, x, context)
        expected = OPERATORS[name].function(*heads, order=3, return_attention=True).attention
        compare(layer.attention(x, context), expected)
        compare(layer.attention(x, layer.summarize(context)), expected)


class TestMaps:
    @every_operator
    @pytest.mark.parametrize("channels_first", more(False, True))
    def test_are_those_of_the_function(self, variant, channels_first):
        layer, x = make(variant, 3, channels_first=channels_first), draw(2, 3, 4, 2, 8)
        weights = [torch.tensor([1.0, 0, 2]).double(), None, draw(2, 2).sigmoid()]
        attention, given = apart(layer, x, weights)[1], x.movedim(-1, 1) if channels_first else x
        wide = [w if w is None or w.dim() < 3 else w.expand(2, 2, -1) for w in headed(weights)]
        for at in ((0, 0, 0), (2, 1, 1), (1, 3, 0)):
            expected = ta.attention_map(attention, (3, 4, 2), operator=variant.name, at=at, weights=wide)
            compare(layer.attention_map(given, at, weights=weights), expected)

    @pytest.mark.parametrize("variant", [v for v in CAUSAL if v in DEFAULTS], ids=str)
    def test_a_causal_query_sees_no_later_frame(self, variant):
        """The map of a query is that of the same layer without a causal mode on the frames up to its own."""
        layer, free, x = make(variant, 3, causal=1), make(variant, 3), draw(2, 3, 4, 2, 8)
        for at in ((0, 0, 0), (2, 1, 1), (1, 3, 0)):
            found, frames = layer.attention_map(x, at), at[1] + 1
            assert found[:, :, :, frames:].eq(0).all()
            compare(found[:, :, :, :frames], free.attention_map(x[:, :, :frames], at))

    @pytest.mark.parametrize("name", ["flattened", "axial"])
    def test_a_mask_of_any_shape(self, name):
        mask = draw(2, 3, 4, seed=3) > -0.3
        mask[:, 1, 1] = True
        found = make(name).attention_map(draw(2, 3, 4, 8), (1, 1), mask=mask)
        assert found.masked_select(~mask[:, None]).eq(0).all()
        compare(found.sum((2, 3)), torch.ones(2, 2, dtype=torch.float64))


class TestPositionBias:
    @staticmethod
    def biases(order):
        relative = ta.RelativePositionBias(2, modes=order, max_distance=2).double()
        with torch.no_grad():
            for seed, table in enumerate(relative.tables):
                table.copy_(draw(*table.shape, seed=seed))
        return [relative, ta.AlibiBias(2, modes=order).double(), ta.AxisWindow(modes=order, window=1)]

    @pytest.mark.parametrize("name", BIASED)
    @pytest.mark.parametrize("order", more(3, 1, 2, 4))
    @pytest.mark.parametrize("channels_first", more(False, True))
    def test_is_the_function_with_the_bias(self, name, order, channels_first):
        x = draw(2, *SIZES[:order], 8)
        given = x.movedim(-1, 1) if channels_first else x
        for bias in self.biases(order):
            layer = make(name, order, channels_first=channels_first, position_bias=bias)
            expected, attention = apart(layer, x, bias=bias(x.shape[1:-1]))
            compare(layer(given), expected.movedim(-1, 1) if channels_first else expected)
            compare(layer.attention(given), attention)
            positions = make(name, order, position_bias=bias, project="positions")
            compare(positions(x), expected)

    @pytest.mark.parametrize(
        "name", [name for name in BIASED if "causal" not in OPERATORS[name].lacking(OPERATORS[name].options)]
    )
    def test_causal(self, name):
        x, bias = draw(2, *SIZES[:3], 8), self.biases(3)[0]
        for causal in range(3):
            for project in ("averages", "positions"):
                layer = make(name, 3, causal=causal, position_bias=bias, project=project)
                compare((layer(x), layer.attention(x)), apart(layer, x, bias=bias(x.shape[1:-1])))

    @pytest.mark.parametrize("options", [{"interaction": "linear"}, {"include_self": True}], ids=str)
    @pytest.mark.parametrize("name", ["additive", "truncated"])
    def test_with_a_correction_and_the_own_token(self, name, options):
        x, bias = draw(2, *SIZES[:3], 8), self.biases(3)[0]
        layer = make(name, 3, position_bias=bias, **options)
        compare(layer(x), apart(layer, x, bias=bias(x.shape[1:-1]))[0])

    def test_is_trained_saved_and_shown(self):
        bias = self.biases(2)[0]
        layer = make("additive", position_bias=bias)
        layer(draw(2, 3, 4, 8)).square().sum().backward()
        assert all(table.grad.abs().sum() > 0 for table in bias.tables)
        assert "position_bias.tables.1" in layer.state_dict()
        assert "(position_bias): RelativePositionBias(" in repr(layer)

    @pytest.mark.parametrize("shape", [(3, 4, 4), (1, 4, 5), (4, 4)])
    def test_one_of_your_own_is_checked(self, shape):
        class Mine(ta.PositionBias):
            def bias(self, mode, size):
                return None if mode == 0 else torch.zeros(shape)

        layer = ta.TensorAttention(8, 2, modes="h w", position_bias=Mine("h w"))
        told = f"the bias of mode 'w' has shape {shape} in Mine, but needs (2, 4, 4) or (1, 4, 4)."
        told += "\n  modes    h w\n  x        (2, 3, 4, 8)   batch=(2,) h=3 w=4 C=8"
        with pytest.raises(ShapeError) as error:
            layer(torch.ones(2, 3, 4, 8))
        assert str(error.value) == f"TensorAttention: {told}"


class TestRotary:
    @pytest.mark.parametrize("name", ["flattened", "axial"])
    @pytest.mark.parametrize("order", more(3, 1, 2, 4))
    @pytest.mark.parametrize("channels_first", more(False, True))
    def test_queries_and_keys_are_turned(self, name, order, channels_first):
        rotary, x = ta.RotaryEmbedding(8, modes=order, base=3.0), draw(2, *SIZES[:order], 16)
        layer = make(name, order, 16, rotary=rotary, channels_first=channels_first)
        given = x.movedim(-1, 1) if channels_first else x
        for weights in (None, [draw(2, n, seed=n).sigmoid() for n in SIZES[:order]]):
            q, k, v = heads_of(layer, x)
            function = OPERATORS[name].function
            expected = function(rotary(q), rotary(k), v, order=order, weights=headed(weights), return_attention=True)
            y = joined(layer, expected.output)
            compare(layer(given, weights=weights), y.movedim(-1, 1) if channels_first else y)
            compare(layer.attention(given, weights=weights), expected.attention)

    @pytest.mark.parametrize("project", ["averages", "positions"])
    @pytest.mark.parametrize("pool", ["mean", "sum"])
    @pytest.mark.parametrize("name", ["kronecker_product", "kronecker_sum"])
    def test_pooled_queries_and_keys_are_turned_by_mode(self, name, pool, project):
        rotary, x = ta.RotaryEmbedding(8, modes=2, base=3.0), draw(2, 3, 4, 16)
        layer = make(name, 2, 16, rotary=rotary, pool=pool, project=project)
        q, k, _ = heads_of(layer, x)
        for mode, found in enumerate(layer.attention(x)):
            turned = [rotary.rotate_mode(getattr(part, pool)(3 - mode), mode) for part in (q, k)]
            compare(found, torch.softmax(turned[0] @ turned[1].mT / 8**0.5, -1))

    @pytest.mark.parametrize("name", ["flattened", "axial", "kronecker_product", "kronecker_sum"])
    def test_a_mask(self, name):
        layer, x = make(name, 2, 16, rotary=ta.RotaryEmbedding(8, modes=2)), draw(2, 3, 4, 16)
        mask = draw(2, 3, 4, seed=3) > -0.3
        y = layer(x.masked_fill(~mask[..., None], torch.nan), mask=mask)
        assert y[~mask].eq(0).all()
        compare(y, layer(x, mask=mask))
        padded = torch.cat([x, torch.full_like(x, torch.inf)], 1)
        compare(layer(padded, lengths=[3, None])[:, :3], layer(x))

    @pytest.mark.parametrize("name", ["flattened", "axial"])
    def test_causal(self, name):
        layer, x = make(name, 2, 16, causal=0, rotary=ta.RotaryEmbedding(8, modes=2)), draw(2, 3, 4, 16)
        compare(layer(x)[:, :2], layer(x[:, :2]))


# ---- messages ------------------------------------------------------------------------------------------------


def no_operator(name):
    return f"there is no operator {name!r}; the operators are: {', '.join(OPERATORS)}."


CONSTRUCTION = {
    "operator": ({"operator": "nope"}, no_operator("nope")),
    "heads": ({"num_heads": 5}, "embed_dim must be divisible by num_heads, got 96 and 5."),
    "no heads": ({"num_heads": 0}, "embed_dim and num_heads must be at least 1, got 96 and 0."),
    "no channels": ({"embed_dim": 0}, "embed_dim and num_heads must be at least 1, got 0 and 4."),
    "dropout": ({"dropout": 1.5}, "dropout must be between 0 and 1, got 1.5."),
    "dropout of no number": ({"dropout": "a"}, "dropout must be between 0 and 1, got 'a'."),
    "no order": ({"modes": 0}, "modes must be at least 1, got 0."),
    "heads of no integer": ({"num_heads": 4.0}, "num_heads must be an integer, got 4.0."),
    "a truth value of heads": ({"num_heads": True}, "num_heads must be an integer, got True."),
    "channels of no integer": ({"embed_dim": "96"}, "embed_dim must be an integer, got '96'."),
    "channels first": ({"channels_first": "no"}, "channels_first must be True or False, got 'no'."),
    "bias": ({"bias": 0}, "bias must be True or False, got 0."),
    "checkpoint": ({"checkpoint": 1}, "checkpoint must be True or False, got 1."),
    "mode projections": ({"mode_projections": "no"}, "mode_projections must be True or False, got 'no'."),
    "norm": ({"qk_norm": "no"}, "qk_norm must be True or False, got 'no'."),
    "norm that is made": (
        {"qk_norm": torch.nn.LayerNorm(4)},
        "qk_norm must be what makes a norm of the head size, got a module: LayerNorm.",
    ),
    "project": ({"project": "all"}, "project must be 'averages' or 'positions', got 'all'."),
    "averages of modes": (
        {"project": "positions", "mode_projections": True, "operator": "kronecker_sum"},
        "mode_projections has no meaning with project='positions': it maps the averages of a mode.",
    ),
    "own token": ({"include_self": "no"}, "include_self must be True or False, got 'no'."),
    "interaction": (
        {"operator": "kao_qkv", "interaction": "linear"},
        "interaction needs centered=True: the published form has no first order to correct.",
    ),
    "saturation": (
        {"saturation": 0.5},
        "saturation has no effect without interaction, got 0.5.\n"
        "  Give interaction='linear' too, or leave saturation out.",
    ),
    "modes of a bias": (
        {"position_bias": ta.AxisWindow(modes=2, window=1)},
        "position_bias has the modes 0 1, but the layer has 0 1 2.",
    ),
    "heads of a bias": (
        {"position_bias": ta.AlibiBias(2, modes=3)},
        "position_bias has 2 heads, but the layer has 4.",
    ),
    "no bias": ({"position_bias": torch.zeros(2)}, "position_bias must be a PositionBias, got Tensor."),
    "modes of turns": (
        {"operator": "axial", "rotary": ta.RotaryEmbedding(24, modes=2)},
        "rotary has the modes 0 1, but the layer has 0 1 2.",
    ),
    "channels of turns": (
        {"operator": "axial", "rotary": ta.RotaryEmbedding(8, modes=3)},
        "rotary has head_dim 8, but the heads of the layer have 24 channels.",
    ),
    "no turns": ({"operator": "axial", "rotary": 1}, "rotary must be a RotaryEmbedding, got int."),
    "a norm and covariances": (
        {"interaction": "linear", "qk_norm": True},
        "qk_norm has no meaning with interaction='linear': covariances of normed keys are not those of linear maps.",
    ),
    "a norm and averages": (
        {"operator": "clustered", "additive_control": True, "qk_norm": True},
        "qk_norm has no meaning with additive_control=True: averages of normed keys are not those of linear maps.",
    ),
    "heads of keys": ({"num_kv_heads": 3}, "num_heads must be divisible by num_kv_heads, got 4 and 3."),
    "no heads of keys": ({"num_kv_heads": 0}, "num_kv_heads must be at least 1, got 0."),
    "no head size": ({"head_dim": 0}, "head_dim must be at least 1, got 0."),
    "a head size of no integer": ({"head_dim": 8.0}, "head_dim must be an integer, got 8.0."),
    "scale": ({"scale": "a"}, "scale must be a number or None, got 'a'."),
    "no finite scale": ({"scale": float("inf")}, "scale must be finite, got inf."),
    "dropout of the output": ({"proj_drop": -1}, "proj_drop must be between 0 and 1, got -1."),
    "bias of queries": ({"qkv_bias": 1}, "qkv_bias must be True or False, got 1."),
    "bias of the output": ({"out_bias": "no"}, "out_bias must be True or False, got 'no'."),
    "averaged turns": (
        {"rotary": ta.RotaryEmbedding(24, modes=3)},
        "rotary has no meaning for operator 'additive', which averages keys of different turns.\n"
        "  Add positions instead, which keeps exactness: SinCosPositions or LearnedPositions.",
    ),
    "no kdim": ({"kdim": 0}, "kdim must be at least 1, got 0."),
    "no vdim": ({"vdim": 0}, "vdim must be at least 1, got 0."),
    "vdim of no integer": ({"vdim": "a"}, "vdim must be an integer, got 'a'."),
    "causal kdim": (
        {"causal": 0, "kdim": 4},
        "kdim has no meaning with causal: frames of x are not those of a context.",
    ),
}


@pytest.mark.parametrize("case", CONSTRUCTION)
def test_construction(case):
    arguments, rule = CONSTRUCTION[case]
    arguments = {"embed_dim": 96, "num_heads": 4, "modes": 3, **arguments}
    refused(OptionError, f"TensorAttention: {rule}", ta.TensorAttention, **arguments)


@pytest.mark.parametrize("name", OPERATORS)
def test_settings_without_a_meaning_for_the_operator(name):
    lacks, build = OPERATORS[name].lacking(OPERATORS[name].options), {"modes": 3, "operator": name}
    if not OPERATORS[name].pools:
        rule = f"mode_projections has no meaning for operator {name!r}: it does not pool its queries."
        refused(OptionError, f"TensorAttention: {rule}", ta.TensorAttention, 96, 4, **build, mode_projections=True)
    window = ta.AxisWindow(modes=3, window=1)
    for setting, reason, value in (("causal", "causal", 0), ("position_bias", "bias", window)):
        if reason in lacks:
            rule = f"{setting} has no meaning for operator {name!r}: {lacks[reason]}."
            refused(OptionError, f"TensorAttention: {rule}", ta.TensorAttention, 96, 4, **build, **{setting: value})
    known = ", ".join(OPERATORS[name].options) or "none"
    told = f"TensorAttention: operator {name!r} has no option 'centred'; its options are: {known}."
    refused(OptionError, told, ta.TensorAttention, 96, 4, **build, centred=True)


def test_modes():
    refused(ModesError, MISSING.format("TensorAttention"), ta.TensorAttention, 32, 4)
    told = "TensorAttention: mode names must differ, but 'h' appears 2 times in 'h w h'."
    refused(ModesError, told, ta.TensorAttention, 8, 2, modes="h w h")
    told = "TensorAttention: there is no mode {} among 't h w' (order 3)."
    for causal in ("c", 3, True):
        refused(ModesError, told.format(repr(causal)), ta.TensorAttention, 96, 4, modes="t h w", causal=causal)
    kept = {"operator": "truncated", "kept": [("t", "h"), ("c",)]}
    refused(ModesError, told.format("'c'"), ta.TensorAttention, 96, 4, modes="t h w", **kept)


READING = "\n  modes    t h\n  x        (2, 30, 40, 8)   batch=(2,) t=30 h=40 C=8"
INPUTS = {
    "too few dimensions": (
        (2, 40, 8),
        ShapeError,
        "x has 3 dimensions, but the layout (B t h C) has 4.\n  modes    t h\n  x        (2, 40, 8)",
    ),
    "too many dimensions": (
        (2, 4, 3, 5, 8),
        ShapeError,
        "x has 5 dimensions, but the layout (B t h C) has 4.\n  modes    t h\n  x        (2, 4, 3, 5, 8)",
    ),
    "channels": (
        (2, 30, 40, 9),
        ShapeError,
        "x has 9 channels, but embed_dim is 8.\n  modes    t h\n  x        (2, 30, 40, 9)   batch=(2,) t=30 h=40 C=9",
    ),
    "empty mode": (
        (2, 30, 0, 8),
        ShapeError,
        "mode 'h' has size 0 in x, but every mode needs at least 1 index.\n"
        "  modes    t h\n  x        (2, 30, 0, 8)   batch=(2,) t=30 h=0 C=8",
    ),
    "device": (
        torch.empty(2, 30, 40, 8, device="meta"),
        DtypeError,
        f"the device is meta in x but cpu in the parameters.{READING}",
    ),
    "integers": (
        torch.ones(2, 30, 40, 8, dtype=torch.int64),
        DtypeError,
        f"x must be floating point, got torch.int64.{READING}",
    ),
    "type": (
        torch.ones(2, 30, 40, 8, dtype=torch.float64),
        DtypeError,
        f"the type is torch.float64 in x but torch.float32 in the parameters.{READING}",
    ),
    "no tensor": (None, DtypeError, "x must be a torch.Tensor, got NoneType."),
}


@pytest.mark.parametrize("case", INPUTS)
def test_inputs(case):
    x, kind, rule = INPUTS[case]
    x = torch.ones(x) if isinstance(x, tuple) else x
    refused(kind, f"TensorAttention: {rule}", ta.TensorAttention(8, 2, modes="t h"), x)
    if case == "channels":
        rule = rule.partition("\n")[0]
        refused(kind, f"TensorAttention.attention: {rule}", ta.TensorAttention(8, 2, modes="t h").attention, x)


GIVEN = {
    "length of weights": (
        {"weights": [torch.ones(2), None]},
        WeightsError,
        "weights of mode 't' have length 2, but the mode has size 30.",
    ),
    "weights of zero": (
        {"weights": [None, torch.zeros(40)]},
        WeightsError,
        "weights of mode 'h' are all zero, so no index takes part.",
    ),
    "mode of lengths": ({"lengths": {"w": 3}}, ModesError, "there is no mode 'w' among 't h' (order 2)."),
    "a mode twice": ({"lengths": {"h": 3, 1: 3}}, ModesError, "lengths names mode 'h' twice."),
    "lengths": ({"lengths": {"h": 50}}, WeightsError, "lengths of mode 'h' must be from 0 to its size 40, got 50."),
    "mask": (
        {"mask": torch.ones(30, 5, dtype=torch.bool, device="meta")},
        ShapeError,
        "mode 'h' has size 5 in mask but 40 in x.",
    ),
    "skip": (
        {"skip": torch.ones(2, 30, 40, 9, device="meta")},
        DtypeError,
        "the device is cpu in the result but meta in skip.",
    ),
    "shape of skip": (
        {"skip": torch.ones(2, 30, 41, 8)},
        ShapeError,
        "skip has shape (2, 30, 41, 8), but the result has (2, 30, 40, 8).",
    ),
}


@pytest.mark.parametrize("case", GIVEN)
def test_what_is_said_of_positions(case):
    given, kind, rule = GIVEN[case]
    layer, x = ta.TensorAttention(8, 2, modes="t h"), torch.ones(2, 30, 40, 8)
    refused(kind, f"TensorAttention: {rule}{READING}", layer, x, **given)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.operator.needs(2, **make(v).options).indices], ids=str)
def test_operators_that_count_indices(variant):
    rule = "weights of whole positions have no meaning for this operator: it counts the indices of each mode."
    x = torch.ones(2, 30, 40, 8)
    layer = ta.TensorAttention(8, 2, modes="t h", operator=variant.name, **variant.options)
    told = f"TensorAttention: {rule}{READING}\n  Give one vector a mode, or a mask alone."
    with pytest.raises(OptionError) as error:  # the values of weights are looked at first
        layer(x, weights=torch.ones(30, 40))
    assert str(error.value) == told


def test_places_of_maps():
    layer, x = ta.TensorAttention(8, 2, modes="t h"), torch.ones(2, 30, 40, 8)
    for at, rule in (
        ((30, 0), "at has index 30 at place 0, but the size there is 30."),
        ((1,), "at has 1 indices, but there are 2 modes."),
        ((0.5, 0), "at must be integers, got (0.5, 0)."),
    ):
        refused(OptionError, f"TensorAttention.attention_map: {rule}", layer.attention_map, x, at)
