"""The module against the functional forms, for every operator: values, gradients, sizes, types, tools of torch."""

from __future__ import annotations

import copy
import io
import itertools
import pickle

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim

import tensorattn as ta
from tensorattn import slabs
from tensorattn.operators import OPERATORS
from tensorattn.testing.variants import variants

VARIANTS = variants()

CLOSE = {"rtol": 1e-10, "atol": 1e-12}
PARAMETERS = [f"{name}_proj.{part}" for name in ("q", "k", "v", "out") for part in ("weight", "bias")]
HALVES = [torch.bfloat16, torch.float16]
DEFAULTS = VARIANTS[: len(OPERATORS)]

every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=str)
every_operator = pytest.mark.parametrize("variant", DEFAULTS, ids=str)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make(variant, modes=2, embed_dim=8, num_heads=2, dtype=torch.float64, **settings):
    """A module with linear maps all drawn, biases too, always the same; gains are one, as in the functional form."""
    layer = ta.TensorAttention(
        embed_dim, num_heads, modes=modes, operator=variant.name, dtype=dtype, **variant.options, **settings
    )
    with torch.no_grad():
        linear = {name: parameter for name, parameter in layer.named_parameters() if "proj" in name}
        for seed, parameter in enumerate(linear.values()):
            parameter.copy_(0.5 * draw(*parameter.shape, seed=seed))
    return layer


def keys(variant):
    """Names of the parameters of a module."""
    return ["interaction_gain"] * (variant.options.get("interaction") is not None) + PARAMETERS


def apart(layer, variant, x, weights=None, **settings):
    """Project everything, then attend by the functional form, then project back."""
    heads = (
        linear(x).unflatten(-1, (layer.num_heads, -1)).movedim(-2, 1)
        for linear in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    weights = weights and [None if w is None else w if w.dim() == 1 else w.unsqueeze(1) for w in weights]
    output = variant.function(*heads, order=layer.modes.order, weights=weights, **settings)
    return layer.out_proj(output.movedim(1, -2).flatten(-2))


def test_every_option_has_a_variant():
    for name, operator in OPERATORS.items():
        tried = set().union(*(variant.options for variant in VARIANTS if variant.name == name))
        assert tried == set(operator.options), f"give each option of {name!r} a line in OPTIONS of testing/variants.py"


class TestValues:
    @every_variant
    @pytest.mark.parametrize("sizes", [(3, 4), (1, 5), (2, 3, 4)], ids=str)
    def test_equals_the_functional_form_after_projecting_everything(self, variant, sizes):
        layer, x = make(variant, len(sizes)), draw(2, *sizes, 8)
        rows = draw(sizes[0]).sigmoid()
        for weights in (None, [rows, *(None for _ in sizes[1:])], [draw(2, n, seed=n).sigmoid() for n in sizes]):
            torch.testing.assert_close(layer(x, weights=weights), apart(layer, variant, x, weights), **CLOSE)

    @every_operator
    @pytest.mark.parametrize("order", [1, 4, 5])
    def test_other_orders(self, variant, order):
        layer, x = make(variant, order), draw(2, *range(2, 2 + order), 8)
        torch.testing.assert_close(layer(x), apart(layer, variant, x), **CLOSE)

    @every_operator
    @pytest.mark.parametrize(("embed_dim", "num_heads"), [(6, 1), (6, 6), (9, 3)])
    def test_heads(self, variant, embed_dim, num_heads):
        layer, x = make(variant, 2, embed_dim, num_heads), draw(2, 3, 4, embed_dim)
        torch.testing.assert_close(layer(x), apart(layer, variant, x), **CLOSE)

    @every_variant
    def test_gradients_reach_every_parameter(self, variant):
        layer, x = make(variant), draw(2, 3, 4, 8).requires_grad_()
        weights = [torch.tensor([1.0, 0, 2], dtype=torch.float64), None]
        leaves = [x, *(parameter for name, parameter in layer.named_parameters() if "proj" in name)]
        gradients = [
            torch.autograd.grad((y * draw(*y.shape, seed=1)).sum(), leaves)
            for y in (layer(x, weights=weights), apart(layer, variant, x, weights))
        ]
        for name, ours, theirs in zip(["x", *PARAMETERS], *gradients, strict=True):
            torch.testing.assert_close(
                ours, theirs, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}"
            )
            assert name == "k_proj.bias" or ours.abs().max() > 1e-6, name

    @every_variant
    @pytest.mark.parametrize("channels_first_in_memory", [False, True])
    def test_channels_first(self, variant, channels_first_in_memory):
        last, first = make(variant), make(variant, channels_first=True)
        x = draw(2, 3, 4, 8)
        moved = x.movedim(-1, 1)
        moved = moved.contiguous() if channels_first_in_memory else moved
        weights = [None, draw(2, 4).sigmoid()]
        assert first(moved).shape == (2, 8, 3, 4)
        torch.testing.assert_close(first(moved, weights=weights), last(x, weights=weights).movedim(-1, 1), **CLOSE)

    @every_variant
    def test_modes_in_any_order(self, variant):
        """Sizes all different, in every permutation: the modes are permuted, and nothing else changes."""
        if "kept" in variant.options:
            pytest.skip("kept subsets name modes")
        layer, x = make(variant, 3), draw(2, 2, 3, 5, 8)
        weights = [None, draw(3).sigmoid(), draw(2, 5).sigmoid()]
        y = layer(x, weights=weights)
        for order in itertools.permutations(range(3)):
            dims = [0, *(1 + mode for mode in order), 4]
            permuted = layer(x.permute(dims), weights=[weights[mode] for mode in order])
            torch.testing.assert_close(permuted, y.permute(dims), **CLOSE)
            torch.testing.assert_close(
                layer(x.permute(dims).contiguous(), weights=[weights[m] for m in order]), permuted, **CLOSE
            )

    @every_variant
    def test_weights_repeat(self, variant):
        """A weight of 2 is a repetition, 0 an absence: the positions that are there see the same."""
        layer, x = make(variant), draw(2, 3, 4, 8)
        rows, columns = torch.tensor([1, 0, 2]), torch.tensor([2, 1, 1, 3])
        repeated = x.repeat_interleave(rows, 1).repeat_interleave(columns, 2)
        y = layer(x, weights=[rows, columns]).repeat_interleave(rows, 1).repeat_interleave(columns, 2)
        torch.testing.assert_close(y, layer(repeated), **CLOSE)

    @every_variant
    def test_a_sample_without_any_weight_gets_the_bias_of_the_output(self, variant):
        layer, x = make(variant), draw(2, 3, 4, 8)
        weights = [torch.tensor([[1.0, 1, 1], [0, 0, 0]]), None]
        if variant.options.get("include_self"):
            pytest.skip("a query always sees itself")
        y = layer(x, weights=weights)
        torch.testing.assert_close(y[0], layer(x)[0], **CLOSE)
        torch.testing.assert_close(y[1], layer.out_proj.bias.expand(3, 4, 8), **CLOSE)

    @every_variant
    def test_the_bias_of_the_output_is_added_once(self, variant):
        layer = make(variant)
        with torch.no_grad():
            layer.v_proj.weight.zero_()
            layer.v_proj.bias.zero_()
        torch.testing.assert_close(layer(draw(2, 3, 4, 8)), layer.out_proj.bias.expand(2, 3, 4, 8), **CLOSE)

    @every_operator
    def test_without_biases(self, variant):
        layer, x = make(variant, bias=False), draw(2, 3, 4, 8)
        assert list(layer.state_dict()) == [name for name in PARAMETERS if "weight" in name]
        torch.testing.assert_close(layer(x), apart(layer, variant, x), **CLOSE)

    @every_variant
    def test_samples_do_not_see_each_other(self, variant):
        layer, x = make(variant), draw(3, 3, 4, 8)
        torch.testing.assert_close(layer(x), torch.cat([layer(sample) for sample in x.split(1)]), **CLOSE)
        assert layer(x[:0]).shape == (0, 3, 4, 8)

    @every_variant
    def test_strides_do_not_matter(self, variant):
        layer, x = make(variant), draw(2, 3, 4, 8)
        larger = torch.full((4, 7, 9, 16), torch.nan, dtype=x.dtype)
        sliced = larger[::2, 1::2, 1::2, ::2]
        sliced.copy_(x)
        torch.testing.assert_close(layer(sliced), layer(x), **CLOSE)
        torch.testing.assert_close(layer(x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)), layer(x), **CLOSE)
        row = x[:, :1].expand(2, 3, 4, 8)
        torch.testing.assert_close(layer(row), layer(row.contiguous()), **CLOSE)


class TestSkipAndOut:
    """What is added to the output while it is written, and where that goes; with slabs of a few positions too."""

    @pytest.fixture(autouse=True, params=["whole", "slabs"])
    def _slabs(self, request, monkeypatch):
        if request.param == "slabs":
            monkeypatch.setattr(slabs, "POSITIONS", 14)

    @every_variant
    @pytest.mark.parametrize("channels_first", [False, True])
    @pytest.mark.parametrize("causal", [None, 1])
    def test_equal_adding_afterwards(self, variant, channels_first, causal):
        if causal is not None and "causal" in variant.operator.lacks:
            return
        layer = make(variant, 3, channels_first=channels_first, causal=causal)
        shape = (2, 8, 3, 4, 5) if channels_first else (2, 3, 4, 5, 8)
        x, other = draw(*shape).requires_grad_(), draw(*shape, seed=1).requires_grad_()
        for skip in (x, other):
            leaves = [x, *layer.parameters(), *([other] if skip is other else [])]
            results = []
            for y in (layer(x, skip=skip), layer(x) + skip):
                results.append([y, *torch.autograd.grad((y * draw(*shape, seed=2)).sum(), leaves, allow_unused=True)])
            for ours, theirs in zip(*results, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
            with torch.no_grad():
                out = torch.full_like(x, torch.nan)
                assert layer(x, skip=skip, out=out) is out
                torch.testing.assert_close(out, results[0][0], **CLOSE)
        with torch.no_grad():
            assert layer(x, out=out) is out
            torch.testing.assert_close(out, layer(x), **CLOSE)

    @every_operator
    def test_layout_in_memory(self, variant, monkeypatch):
        monkeypatch.setattr(slabs, "POSITIONS", 14)
        layer, x = make(variant, 3, channels_first=True), draw(2, 8, 3, 4, 5)
        if variant.operator.query == "positions" or variant.name == "kao_qkv":
            assert layer(x, skip=x).is_contiguous()

    @every_operator
    def test_dropout_is_the_same_in_both_passes(self, variant):
        layer, x = make(variant, 2, dropout=0.5), draw(2, 5, 6, 8).requires_grad_()
        y = layer(x)
        direction = draw(*x.shape, seed=1)
        (gradient,) = torch.autograd.grad((y * y.detach()).sum(), x)
        assert gradient.isfinite().all()
        step = 1e-6
        losses = []
        for sign in (1, -1):
            torch.manual_seed(0)
            losses.append((layer(x.detach() + sign * step * direction) ** 2).sum() / 2)
        torch.manual_seed(0)
        y = layer(x)
        (gradient,) = torch.autograd.grad((y**2).sum() / 2, x)
        slope = (losses[0] - losses[1]) / (2 * step)
        torch.testing.assert_close((gradient * direction).sum(), slope.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if "causal" not in v.operator.lacks], ids=str)
class TestCausal:
    @pytest.mark.parametrize(("causal", "mode"), [("t", 0), ("h", 1), (-1, 2), (0, 0)])
    def test_equals_the_functional_form(self, variant, causal, mode):
        layer, x = make(variant, "t h w", causal=causal), draw(2, 3, 2, 4, 8)
        for weights in (None, [draw(3).sigmoid(), None, draw(2, 4).sigmoid()]):
            torch.testing.assert_close(
                layer(x, weights=weights), apart(layer, variant, x, weights, causal=mode), **CLOSE
            )

    def test_no_frame_sees_a_later_one(self, variant):
        layer, x = make(variant, "h t", causal="t", channels_first=True), draw(2, 8, 3, 5)
        y = layer(x)
        later = x.clone()
        later[..., 3:] = 1e3 * draw(2, 8, 3, 2, seed=1)
        torch.testing.assert_close(layer(later)[..., :3], y[..., :3], **CLOSE)
        assert (layer(later)[..., 3:] - y[..., 3:]).abs().amin(dim=(0, 1, 2)).min() > 0
        torch.testing.assert_close(layer(x[..., :3]), y[..., :3], **CLOSE)


def test_kept_modes_are_told_by_their_names():
    layer = ta.TensorAttention(8, 2, modes="t h w", operator="truncated", kept=[("t",), ("h", "w")])
    assert "kept=(('t',), ('h', 'w'))" in layer.extra_repr()
    assert (
        "kept=((0,), (1, 2))"
        in ta.TensorAttention(8, 2, modes=3, operator="truncated", kept=[(0,), (1, 2)]).extra_repr()
    )


def test_which_modes_are_causal():
    assert "causal='w'" in ta.TensorAttention(8, 2, modes="h w", causal=-1).extra_repr()
    assert "causal" not in ta.TensorAttention(8, 2, modes="h w").extra_repr()


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.options.get("interaction")], ids=str)
class TestInteractionGain:
    def test_scales_the_correction_of_each_head(self, variant):
        layer, x = make(variant, 3), draw(2, 3, 4, 2, 8)
        torch.testing.assert_close(layer.interaction_gain.detach(), torch.ones(2, dtype=torch.float64))
        outputs = {}
        for gain in ((0.0, 0.0), (1.0, 1.0), (3.0, 1.0), (1.0, 3.0)):
            with torch.no_grad():
                layer.interaction_gain.copy_(torch.tensor(gain))
            outputs[gain] = layer(x)
        plain = {name: value for name, value in variant.options.items() if name not in ("interaction", "saturation")}
        torch.testing.assert_close(outputs[0, 0], make(variant._replace(options=plain), 3)(x), **CLOSE)
        correction = outputs[1, 1] - outputs[0, 0]
        by_head = outputs[3, 1] - outputs[1, 1], outputs[1, 3] - outputs[1, 1]
        assert all(part.abs().max() > 1e-3 for part in by_head)
        torch.testing.assert_close(by_head[0] + by_head[1], 2 * correction, rtol=1e-9, atol=1e-11)

    def test_learns(self, variant):
        layer = make(variant, 3)
        layer(draw(2, 3, 4, 2, 8)).square().sum().backward()
        assert layer.interaction_gain.grad.ne(0).all()
        layer.reset_parameters()
        assert layer.interaction_gain.eq(1).all()


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
                weight, bias = (
                    (p.chunk(2)[mode] if layer.mode_projections else p) for p in (linear.weight, linear.bias)
                )
                mean = heads(x.mean(2 - mode) @ weight.T + bias)
                mean = mean * count if variant.options.get("pool") == "sum" else mean
                pooled.append(mean if norm is None else norm(mean))
            matrices.append((pooled[0] @ pooled[1].mT / size**0.5).softmax(-1))
        value = heads(layer.v_proj(x))
        if variant.name == "kronecker_product":
            output = torch.einsum("bhij,bhkl,bhjld->bhikd", *matrices, value)
        else:
            output = torch.einsum("bhij,bhjkd->bhikd", matrices[0], value)
            output = output + torch.einsum("bhkl,bhild->bhikd", matrices[1], value)
        return layer.out_proj(output.movedim(1, -2).flatten(-2))

    @pytest.mark.parametrize("variant", [v for v in VARIANTS if v.operator.pools], ids=str)
    @pytest.mark.parametrize("mode_projections", [False, True])
    @pytest.mark.parametrize("qk_norm", [False, True])
    def test_against_the_definition(self, variant, mode_projections, qk_norm):
        layer, x = make(variant, mode_projections=mode_projections, qk_norm=qk_norm), draw(2, 3, 4, 8)
        if qk_norm:
            with torch.no_grad():
                for seed, parameter in enumerate([*layer.q_norm.parameters(), *layer.k_norm.parameters()]):
                    parameter.copy_(draw(4, seed=seed))
        torch.testing.assert_close(layer(x), self.written_out(layer, variant, x), **CLOSE)
        assert layer.q_proj.out_features == layer.k_proj.out_features == (16 if mode_projections else 8)
        norms = [f"{name}_norm.{part}" for name in "qk" for part in ("weight", "bias")] if qk_norm else []
        assert list(layer.state_dict()) == PARAMETERS + norms
        assert ("mode_projections=True" in layer.extra_repr()) == mode_projections

    @pytest.mark.parametrize("variant", [v for v in VARIANTS if v.operator.pools], ids=str)
    def test_maps_of_modes_are_drawn_each_for_itself(self, variant):
        layer = ta.TensorAttention(64, 4, modes=3, operator=variant.name, mode_projections=True, **variant.options)
        for block in layer.q_proj.weight.split(64):
            assert abs(block.std() / ((6 / 128) ** 0.5 / 3**0.5) - 1) < 0.1


class TestSizes:
    @every_variant
    def test_any_size_after_any_other(self, variant):
        layer = make(variant)
        state = {name: value for name, value in vars(layer).items() if not name.startswith("_")}
        for sizes in ((3, 4), (5, 2), (1, 1), (7, 3), (3, 4)):
            x = draw(2, *sizes, 8)
            torch.testing.assert_close(layer(x), make(variant)(x), rtol=0, atol=0)
        assert list(layer.buffers()) == []
        assert {name: value for name, value in vars(layer).items() if not name.startswith("_")} == state
        assert list(layer.state_dict()) == keys(variant)


class TestDropout:
    @every_variant
    def test_in_training_only(self, variant):
        layer, x = make(variant, dropout=0.5), draw(2, 3, 4, 8)
        plain = make(variant)
        assert layer.training
        assert not torch.equal(layer(x), layer(x))
        assert torch.equal(plain(x), plain(x))
        layer.eval()
        assert torch.equal(layer(x), plain(x))

    @every_variant
    def test_is_that_of_the_functional_form(self, variant):
        layer, x = make(variant, dropout=1.0), draw(2, 3, 4, 8)
        q, k, v = (
            linear(x).unflatten(-1, (2, -1)).movedim(-2, 1) for linear in (layer.q_proj, layer.k_proj, layer.v_proj)
        )
        output = variant.function(q, k, v, order=2, dropout_p=1.0).movedim(1, -2).flatten(-2)
        torch.testing.assert_close(layer(x), layer.out_proj(output), **CLOSE)


class TestState:
    @every_variant
    def test_copies(self, variant):
        layer, x = make(variant, modes="h w", dropout=0.5).eval(), draw(2, 3, 4, 8)
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert repr(twin) == repr(layer)
            assert twin.training is False
            assert torch.equal(twin(x), layer(x))
            with torch.no_grad():
                twin.v_proj.weight.add_(1)
            assert not torch.equal(twin(x), layer(x))

    @every_variant
    def test_the_state_is_four_linear_maps(self, variant):
        layer, x = make(variant), draw(2, 3, 4, 8)
        assert list(layer.state_dict()) == keys(variant)
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        file.seek(0)
        other = ta.TensorAttention(8, 2, modes=2, operator=variant.name, dtype=torch.float64, **variant.options)
        assert not torch.equal(other(x), layer(x))
        assert (
            str(other.load_state_dict(torch.load(file, weights_only=True), strict=True))
            == "<All keys matched successfully>"
        )
        assert torch.equal(other(x), layer(x))

    def test_one_state_serves_every_operator(self):
        state = make(VARIANTS[0]).state_dict()
        for variant in VARIANTS:
            loaded = make(variant).load_state_dict(state, strict=variant.options.get("interaction") is None)
            assert loaded.missing_keys == keys(variant)[: -len(PARAMETERS)]
            assert loaded.unexpected_keys == []

    def test_parameters_are_drawn_anew(self):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layer = ta.TensorAttention(64, 4, modes=3)
            torch.manual_seed(0)
            twin = ta.TensorAttention(64, 4, modes=3)
            before = copy.deepcopy(layer.state_dict())
            for name, value in before.items():
                assert torch.equal(value, twin.state_dict()[name])
            with torch.no_grad():
                layer.out_proj.bias.fill_(7)
            layer.reset_parameters()
        for name, value in layer.state_dict().items():
            if "bias" in name:
                assert value.eq(0).all()
            else:
                assert not torch.equal(value, before[name])
                bound = (6 / 128) ** 0.5  # Xavier, uniform
                assert value.abs().max() <= bound
                assert abs(value.std() / (bound / 3**0.5) - 1) < 0.1

    def test_what_it_shows(self):
        layer = ta.TensorAttention(8, 2, modes="t h", operator="kao_kv", channels_first=True, dropout=0.25)
        assert layer.extra_repr() == (
            "embed_dim=8, num_heads=2, modes='t h', operator='kao_kv', channels_first=True, dropout=0.25"
        )
        assert ta.TensorAttention(8, 2, modes=3, operator="axial").extra_repr() == (
            "embed_dim=8, num_heads=2, modes=3, operator='axial'"
        )
        assert "centered=True" in ta.TensorAttention(8, 2, modes=3, operator="kao_qkv", centered=True).extra_repr()

    @every_operator
    def test_names_of_modes_are_names_only(self, variant):
        x = draw(2, 3, 4, 8)
        named, tuples, numbered = (make(variant, modes) for modes in ("h w", ("h", "w"), 2))
        assert torch.equal(named(x), numbered(x))
        assert torch.equal(tuples(x), numbered(x))


class TestTypes:
    def test_where_parameters_live(self):
        for dtype in (torch.float64, *HALVES):
            layer = ta.TensorAttention(8, 2, modes=2, device="meta", dtype=dtype)
            assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", dtype)}
        assert {p.dtype for p in ta.TensorAttention(8, 2, modes=2).parameters()} == {torch.get_default_dtype()}
        layer = ta.TensorAttention(8, 2, modes=2, device="meta").to_empty(device="cpu")
        layer.reset_parameters()
        assert layer(draw(1, 2, 3, 8, dtype=torch.float32)).isfinite().all()

    @every_variant
    def test_without_values(self, variant):
        layer = ta.TensorAttention(
            16, 4, modes=3, operator=variant.name, device="meta", dtype=torch.bfloat16, **variant.options
        )
        x = torch.empty(2, 5, 6, 7, 16, device="meta", dtype=torch.bfloat16)
        for weights in (None, [torch.ones(5), None, torch.ones(2, 7)]):
            y = layer(x, weights=weights)
            assert (y.shape, y.dtype, y.device.type) == (x.shape, torch.bfloat16, "meta")

    @every_variant
    @pytest.mark.parametrize("dtype", HALVES)
    def test_half_precision_is_no_worse_than_projecting_everything(self, variant, dtype):
        layer, x = make(variant, 2, 16, 4, dtype=dtype), draw(2, 6, 7, 16, dtype=dtype)
        exact = copy.deepcopy(layer).double()(x.double())
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        assert y.dtype == dtype
        ours, theirs = ((z.double() - exact).abs().max() for z in (y, apart(layer, variant, x)))
        assert ours <= 2 * theirs + torch.finfo(dtype).eps * exact.abs().max()
        y.float().square().sum().backward()
        for gradient in (leaf.grad, *(p.grad for p in layer.parameters())):
            assert gradient.dtype == dtype
            assert gradient.isfinite().all()

    @every_variant
    def test_autocast(self, variant):
        layer = make(variant, 2, 16, 4, dtype=torch.float32)
        x = (0.3 * draw(2, 6, 7, 16, dtype=torch.float32)).requires_grad_()  # no softmax so sharp that rounding rules
        exact = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
            ours, theirs = ((z.float() - exact).abs().max() for z in (y, apart(layer, variant, x)))
        assert y.dtype in (torch.bfloat16, torch.float32)
        assert 0 < ours <= 2 * theirs + 1e-2 * exact.abs().max()  # not exact: something ran in bfloat16
        y.float().square().sum().backward()
        for gradient in (x.grad, *(p.grad for p in layer.parameters())):
            assert gradient.dtype == torch.float32
            assert gradient.isfinite().all()


class TestTools:
    @pytest.fixture(autouse=True)
    def fresh_compiler(self):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    @every_operator
    def test_one_graph_for_all_sizes(self, variant):
        layer = make(variant).eval()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
        with torch.no_grad():
            counts = []
            for sizes in ((2, 3, 5), (3, 6, 4), (5, 9, 11)):
                x = draw(*sizes, 8)
                torch.testing.assert_close(compiled(x), layer(x), **CLOSE)
                counts.append(counter.frame_count)
        assert 1 <= counts[0] <= 2  # a graph with floats made of sizes is handed to the backend twice
        assert counts[-1] == counts[0]

    @pytest.mark.parametrize("variant", [v for v in VARIANTS if v not in DEFAULTS], ids=str)
    def test_options_compile(self, variant):
        layer, x = make(variant).eval(), draw(2, 3, 5, 8)
        compiled = torch.compile(layer, backend="eager", fullgraph=True, dynamic=True)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), layer(x), **CLOSE)

    def test_training_compiled_with_weights(self):
        layer, x = make(VARIANTS[0], channels_first=True), draw(2, 8, 3, 5).requires_grad_()
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        weights = [torch.tensor([1.0, 0, 2], dtype=torch.float64), None]
        leaves = [x, *layer.parameters()]
        ours, theirs = (
            torch.autograd.grad((function(x, weights=weights) ** 2).sum(), leaves) for function in (compiled, layer)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)

    @every_operator
    def test_export(self, variant):
        layer = make(variant, 3, dtype=torch.float32).eval()
        dims = ({place: Dim.DYNAMIC for place in range(4)},)
        program = torch.export.export(layer, (draw(2, 3, 5, 7, 8, dtype=torch.float32),), dynamic_shapes=dims)
        for sizes in ((3, 7, 4, 6), (1, 2, 9, 3)):
            x = draw(*sizes, 8, dtype=torch.float32)
            torch.testing.assert_close(program.module()(x), layer(x), rtol=1e-5, atol=1e-6)

    def test_export_names_its_dimensions(self):
        layer = ta.TensorAttention(8, 2, modes="h w").eval()
        batch, height, width = Dim("batch", max=64), Dim("height", min=2, max=512), Dim("width", min=2, max=512)
        program = torch.export.export(
            layer, (torch.randn(2, 5, 7, 8),), dynamic_shapes={"x": {0: batch, 1: height, 2: width}}
        )
        for sizes in ((4, 20, 3), (1, 100, 60)):  # in one slab, and in several
            x = draw(*sizes, 8, dtype=torch.float32)
            torch.testing.assert_close(program.module()(x), layer(x), rtol=1e-5, atol=1e-6)

    @every_operator
    @pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # the fused kernel, sample by sample
    def test_per_sample_gradients(self, variant):
        layer, x = make(variant), draw(3, 2, 4, 8)
        parameters = dict(layer.named_parameters())

        def loss(parameters, sample):
            return torch.func.functional_call(layer, parameters, (sample[None],)).square().sum()

        expected = [torch.func.grad(loss)(parameters, sample) for sample in x]
        together = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
        for name in parameters:
            torch.testing.assert_close(together[name], torch.stack([e[name] for e in expected]), rtol=1e-9, atol=1e-11)
