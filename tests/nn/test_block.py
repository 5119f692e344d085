"""The block against its definition, for every operator; drop-path, factors, checkpoints, layouts, types, tools."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from modules import MISSING, all_drawn_anew, by_way_of_meta, draw, reading, refused
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim

import tensorattn as ta
from nn.layers import every_variant
from tensorattn.errors import DtypeError, ModesError, OptionError, ShapeError
from tensorattn.functional import OPERATORS
from tensorattn.nn.parameters import reset_parts
from tensorattn.testing.variants import variants

VARIANTS = variants()

CLOSE = {"rtol": 1e-10, "atol": 1e-12}
DEFAULTS = VARIANTS[: len(OPERATORS)]
HALVES = [torch.bfloat16, torch.float16]

every_operator = pytest.mark.parametrize("variant", DEFAULTS, ids=str)


pytestmark = pytest.mark.usefixtures("fresh_compiler")


def make(variant=VARIANTS[0], modes=2, embed_dim=8, dtype=torch.float64, **settings):
    """A block with all parameters drawn, always the same."""
    block = ta.TensorTransformerBlock(
        embed_dim, 2, modes=modes, operator=variant.name, dtype=dtype, **variant.options, **settings
    )
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(block.named_parameters()):
            if "gain" not in name:
                parameter.copy_(0.5 * draw(*parameter.shape, seed=seed))
    return block


def written_out(block, x, **attention):
    """The definition of a block, channels last."""
    norms = [F.layer_norm(x, (x.shape[-1],), block.attention_norm.weight, block.attention_norm.bias)]
    first = block.attention(norms[0], **attention)
    x = x + (first if block.attention_scale is None else block.attention_scale * first)
    y = F.layer_norm(x, (x.shape[-1],), block.mlp_norm.weight, block.mlp_norm.bias)
    weight, bias = block.mlp.in_proj.weight.chunk(2), block.mlp.in_proj.bias.chunk(2)
    gate = F.linear(y, weight[0], bias[0])
    hidden = gate * gate.sigmoid() * F.linear(y, weight[1], bias[1])
    second = F.linear(hidden, block.mlp.out_proj.weight, block.mlp.out_proj.bias)
    return x + (second if block.mlp_scale is None else block.mlp_scale * second)


def run_seeded(block, x):
    """Output and gradients with random numbers always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        y = block(x)
        return y, torch.autograd.grad((y * draw(*y.shape, seed=9, dtype=y.dtype)).sum(), [x, *block.parameters()])


class TestValues:
    @every_variant
    @pytest.mark.parametrize("layer_scale", [None, 0.1])
    def test_is_the_definition(self, variant, layer_scale):
        block, x = make(variant, layer_scale=layer_scale), draw(2, 3, 4, 8)
        for weights in (None, [draw(3).sigmoid(), None]):
            expected = written_out(block, x, weights=weights)
            torch.testing.assert_close(block(x, weights=weights), expected, **CLOSE)

    @every_operator
    def test_absent_positions_are_zeros(self, variant):
        block, x, mask = make(variant), draw(2, 3, 4, 8), draw(2, 3, 4, seed=1) > -0.5
        zeros, nothing = (x.masked_fill(~mask.unsqueeze(-1), fill) for fill in (0, torch.nan))
        torch.testing.assert_close(block(nothing, mask=mask), written_out(block, zeros, mask=mask), **CLOSE)

    @every_operator
    def test_channels_first(self, variant):
        last, first = make(variant, 3), make(variant, 3, channels_first=True)
        x, weights = draw(2, 3, 2, 4, 8), [None, None, draw(2, 4).sigmoid()]
        y = last(x, weights=weights)
        for moved in (x.movedim(-1, 1), x.movedim(-1, 1).contiguous()):
            torch.testing.assert_close(first(moved, weights=weights), y.movedim(-1, 1), **CLOSE)

    @pytest.mark.thorough
    @pytest.mark.parametrize("order", range(1, 9))
    def test_every_order(self, order):
        sizes = tuple(2 if mode % 3 else 1 for mode in range(order))
        block, x = make(modes=order), draw(2, *sizes, 8)
        torch.testing.assert_close(block(x), written_out(block, x), **CLOSE)
        assert block(x[:0]).shape == (0, *sizes, 8)

    def test_options_reach_the_attention(self):
        block = make(modes="t h", causal="t", dropout=0.5)
        assert (block.attention.causal, block.attention.dropout) == (0, 0.5)
        block.eval()
        x = draw(2, 5, 4, 8)
        y, later = block(x), x.clone()
        later[:, 3:] = 1e3 * draw(2, 2, 4, 8, seed=1)
        torch.testing.assert_close(block(later)[:, :3], y[:, :3], **CLOSE)
        assert torch.equal(block(x), block(x))
        assert not torch.equal(block.train()(x), block(x))

    def test_gradients(self):
        block, x = make(layer_scale=0.5, embed_dim=4), draw(1, 2, 3, 4).requires_grad_()
        names, parameters = zip(*block.named_parameters(), strict=True)
        run = lambda x, *values: torch.func.functional_call(block, dict(zip(names, values, strict=True)), (x,))  # noqa: E731
        assert torch.autograd.gradcheck(run, (x, *parameters), fast_mode=True)
        assert torch.autograd.gradgradcheck(run, (x, *parameters), fast_mode=True)

    def test_without_biases(self):
        block = make(bias=False)
        assert not [name for name in block.state_dict() if "bias" in name]
        assert block(draw(2, 3, 4, 8)).isfinite().all()


class TestDropPath:
    def test_drops_samples_and_keeps_the_mean(self):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            drop, x = ta.DropPath(0.25), draw(4000, 2, 3).abs() + 1
            y = drop(x)
        kept = y.flatten(1).ne(0)
        assert kept.all(1).eq(kept.any(1)).all()
        torch.testing.assert_close(y[kept.all(1)], x[kept.all(1)] / 0.75, **CLOSE)
        share = kept.all(1).double().mean()
        assert (share - 0.75).abs() <= 5 * (0.25 * 0.75 / 4000) ** 0.5

    def test_off_in_eval_and_at_zero(self):
        x = draw(5, 2)
        assert ta.DropPath(0.9).eval()(x) is x
        assert ta.DropPath(0.0)(x) is x

    def test_dropping_everything_leaves_no_trace(self):
        x = draw(5, 2).requires_grad_()
        y = ta.DropPath(1.0)(x)
        y.sum().backward()
        assert y.eq(0).all() and x.grad.eq(0).all()
        poisoned = ta.DropPath(1.0)(torch.full((3, 2), torch.nan))
        assert poisoned.eq(0).all()
        block, x = make(drop_path=1.0), draw(2, 3, 4, 8)
        assert torch.equal(block(x), x)
        torch.testing.assert_close(block.eval()(x), written_out(block, x), **CLOSE)

    def test_both_branches_of_a_sample_drop_each_for_itself(self):
        block, x = make(drop_path=0.5), draw(1, 3, 4, 8).expand(64, 3, 4, 8)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            found = block(x).detach().flatten(1)
        assert len(torch.unique(found.round(decimals=6), dim=0)) == 4

    @pytest.mark.parametrize("dtype", HALVES)
    def test_half_precision(self, dtype):
        y = ta.DropPath(0.5)(torch.ones(64, 2, dtype=dtype))
        assert y.dtype == dtype and set(y.flatten().tolist()) == {0.0, 2.0}
        assert ta.DropPath(0.5)(torch.ones(0, 2, dtype=dtype)).shape == (0, 2)

    def test_what_it_shows(self):
        assert repr(ta.DropPath(0.5)) == "DropPath(p=0.5)"


class TestLayerScale:
    def test_at_zero_the_block_does_nothing(self):
        block = ta.TensorTransformerBlock(8, 2, modes=2, layer_scale=0.0)
        x = draw(2, 3, 4, 8, dtype=torch.float32)
        assert torch.equal(block(x), x)

    def test_first_values_and_names(self):
        block = ta.TensorTransformerBlock(8, 2, modes=2, layer_scale=1e-4)
        for scale in (block.attention_scale, block.mlp_scale):
            torch.testing.assert_close(scale.detach(), torch.full((8,), 1e-4))
        assert {"attention_scale", "mlp_scale"} <= set(block.state_dict())
        assert not {"attention_scale", "mlp_scale"} & set(ta.TensorTransformerBlock(8, 2, modes=2).state_dict())


class TestCheckpoint:
    @every_operator
    def test_changes_no_number(self, variant):
        """Not even random ones: dropout and drop-path are the same when a block is computed again."""
        dropout = 0.0 if "dropout_p" in variant.lacks else 0.2
        plain, again = (make(variant, drop_path=0.3, dropout=dropout, checkpoint=c) for c in (False, True))
        x = draw(6, 3, 4, 8).requires_grad_()
        (y, gradients), (z, others) = run_seeded(plain, x), run_seeded(again, x)
        assert torch.equal(y, z)
        for ours, theirs in zip(gradients, others, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        with torch.no_grad():
            assert again.eval()(x).shape == x.shape

    def test_keeps_the_input_alone(self):
        x = draw(2, 3, 4, 8).requires_grad_()
        kept = {}
        for checkpoint in (False, True):
            numbers = []
            with torch.autograd.graph.saved_tensors_hooks(lambda t: numbers.append(t.numel()) or t, lambda t: t):  # noqa: B023
                make(checkpoint=checkpoint)(x)
            kept[checkpoint] = sum(numbers)
        assert kept[True] <= x.numel() < kept[False] / 4

    def test_passes_weights_on(self):
        x, weights = draw(2, 3, 4, 8).requires_grad_(), [torch.tensor([1.0, 0, 2]), None]
        plain, again = (make(checkpoint=checkpoint)(x, weights=weights) for checkpoint in (False, True))
        assert torch.equal(plain, again)
        assert not torch.equal(plain, make()(x))


class TestState:
    @every_variant
    def test_is_the_same_whatever_was_seen(self, variant):
        block = make(variant, layer_scale=0.1)
        names, values = list(block.state_dict()), copy.deepcopy(block.state_dict())
        for sizes in ((3, 4), (5, 2), (1, 1)):
            x = draw(2, *sizes, 8)
            torch.testing.assert_close(block(x), make(variant, layer_scale=0.1)(x), rtol=0, atol=0)
        assert list(block.state_dict()) == names
        for name, value in block.state_dict().items():
            assert torch.equal(value, values[name])
        assert list(block.buffers()) == []

    def test_names(self):
        proj = [f"{name}.{part}" for name in ("in_proj", "out_proj") for part in ("weight", "bias")]
        expected = [
            *(f"attention.{name}_proj.{part}" for name in ("q", "k", "v", "out") for part in ("weight", "bias")),
            *(f"{name}_norm.{part}" for name in ("attention", "mlp") for part in ("weight", "bias")),
            *(f"mlp.{name}" for name in proj),
        ]
        assert list(make().state_dict()) == expected

    def test_copies_and_files(self):
        block, x = make(modes="h w", drop_path=0.5, layer_scale=0.1).eval(), draw(2, 3, 4, 8)
        for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
            assert repr(twin) == repr(block)
            assert twin.training is False
            assert torch.equal(twin(x), block(x))
        file = io.BytesIO()
        torch.save(block.state_dict(), file)
        file.seek(0)
        other = ta.TensorTransformerBlock(8, 2, modes=2, layer_scale=0.1, dtype=torch.float64)
        assert str(other.load_state_dict(torch.load(file, weights_only=True))) == "<All keys matched successfully>"
        assert torch.equal(other(x), block(x))

    def test_drawn_anew(self):
        block = make(embed_dim=64, layer_scale=0.1)
        before = copy.deepcopy(block.state_dict())
        block.reset_parameters()
        for name, value in block.state_dict().items():
            assert not torch.equal(value, before[name]), name
            if "bias" in name:
                assert value.eq(0).all()
            elif "norm" in name:
                assert value.eq(1).all()
            elif "scale" in name:
                assert value.eq(0.1).all()
            else:
                halves = value.chunk(2) if "in_proj" in name else (value,)
                for half in halves:
                    bound = (6 / sum(half.shape)) ** 0.5  # Xavier, uniform
                    assert half.abs().max() <= bound
                    assert abs(half.std() / (bound / 3**0.5) - 1) < 0.1

    def test_what_it_shows(self):
        block = ta.TensorTransformerBlock(
            8, 2, modes="t h", layer_scale=0.1, checkpoint=True, channels_first=True, drop_path=0.5
        )
        assert block.extra_repr() == "layer_scale=0.1, checkpoint=True, channels_first=True"
        assert "operator='additive'" in repr(block) and "DropPath(p=0.5)" in repr(block)
        assert make().extra_repr() == ""

    def test_weights_as_many_as_of_an_ordinary_mlp(self):
        mlp = ta.TensorTransformerBlock(96, 4, modes=2, bias=False).mlp
        assert sum(p.numel() for p in mlp.parameters()) == 2 * 96 * 4 * 96


class TestTypes:
    @every_operator
    @pytest.mark.parametrize("dtype", HALVES)
    def test_half_precision(self, variant, dtype):
        block, x = make(variant, dtype=dtype, layer_scale=0.5), draw(2, 3, 4, 8, dtype=dtype)
        exact = copy.deepcopy(block).double()(x.double())
        y = block(x)
        assert y.dtype == dtype
        assert (y.double() - exact).abs().max() <= 32 * torch.finfo(dtype).eps * exact.abs().max()
        y.float().square().sum().backward()
        for parameter in block.parameters():
            assert parameter.grad.dtype == dtype and parameter.grad.isfinite().all()

    @every_operator
    def test_autocast(self, variant):
        block, x = make(variant, dtype=torch.float32, layer_scale=0.5), draw(2, 3, 4, 8, dtype=torch.float32)
        exact = block(x)
        with torch.autocast("cpu", torch.bfloat16):
            y = block(x)
        assert y.dtype == torch.float32  # the skip connections are in full precision
        error = (y - exact).abs().max()
        assert 0 < error <= 0.1 * exact.abs().max()
        y.square().sum().backward()
        assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in block.parameters())

    def test_where_parameters_live(self):
        block = ta.TensorTransformerBlock(8, 2, modes=2, layer_scale=0.1, device="meta", dtype=torch.bfloat16)
        assert {(p.device.type, p.dtype) for p in block.parameters()} == {("meta", torch.bfloat16)}
        x = torch.empty(2, 3, 4, 8, device="meta", dtype=torch.bfloat16)
        assert block(x).shape == x.shape
        alive = block.to_empty(device="cpu")
        alive.reset_parameters()
        assert alive(torch.ones(2, 3, 4, 8, dtype=torch.bfloat16)).isfinite().all()


class TestTools:
    @pytest.mark.thorough
    def test_one_graph_for_all_sizes(self):
        block = make(layer_scale=0.5).eval()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(block, backend=counter, fullgraph=True, dynamic=True)
        with torch.no_grad():
            counts = []
            for sizes in ((2, 3, 5), (3, 6, 4), (5, 9, 11)):
                x = draw(*sizes, 8)
                torch.testing.assert_close(compiled(x), block(x), **CLOSE)
                counts.append(counter.frame_count)
        assert 1 <= counts[0] <= 2  # a graph with floats made of sizes is handed to the backend twice
        assert counts[-1] == counts[0]

    @pytest.mark.thorough
    @pytest.mark.parametrize("checkpoint", [False, True])
    def test_training_compiled(self, checkpoint):
        block, x = make(checkpoint=checkpoint, channels_first=True), draw(2, 8, 3, 5).requires_grad_()
        compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
        weights = [torch.tensor([1.0, 0, 2], dtype=torch.float64), None]
        leaves = [x, *block.parameters()]
        ours, theirs = (
            torch.autograd.grad((function(x, weights=weights) ** 2).sum(), leaves) for function in (compiled, block)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)

    @pytest.mark.thorough
    def test_drop_path_compiles(self):
        block, x = make(drop_path=0.5), draw(8, 3, 5, 8)
        compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
        found, plain = compiled(x), written_out(block, x)
        assert found.shape == x.shape and not torch.equal(found, plain)

    @pytest.mark.thorough
    @pytest.mark.parametrize("checkpoint", [False, True])
    def test_export(self, checkpoint):
        block = make(modes=3, dtype=torch.float32, checkpoint=checkpoint).eval()
        dims = ({place: Dim.DYNAMIC for place in range(4)},)
        with torch.no_grad():
            program = torch.export.export(block, (draw(2, 3, 5, 7, 8, dtype=torch.float32),), dynamic_shapes=dims)
            for sizes in ((3, 7, 4, 6), (1, 2, 9, 3)):
                x = draw(*sizes, 8, dtype=torch.float32)
                torch.testing.assert_close(program.module()(x), block(x), rtol=1e-4, atol=1e-5)


class TestParts:
    def test_every_part_is_called(self):
        block, seen = make(layer_scale=0.5), []
        parts = {name: part for name, part in block.named_modules() if not list(part.children()) and name}
        for name, part in parts.items():
            if not name.startswith("attention."):  # those of the layer are its own
                part.register_forward_hook(lambda *_, name=name: seen.append(name))
        block(draw(2, 3, 4, 8))
        assert set(seen) == {name for name in parts if not name.startswith("attention.")}

    def test_norms_of_another_kind(self):
        block, x = make(), draw(2, 3, 4, 8)
        block.attention_norm = block.mlp_norm = torch.nn.Identity()
        expected = x + block.attention(x)
        torch.testing.assert_close(block(x), expected + block.mlp(expected), **CLOSE)

    def test_all_parameters_are_drawn_anew(self):
        """Those of a bias that the layer holds too, of norms, and of a module that the user put there."""
        bias = ta.RelativePositionBias(2, modes=2, max_distance=3)
        block = ta.TensorTransformerBlock(8, 2, modes=2, layer_scale=0.1, interaction="linear", position_bias=bias)
        block.mlp.out_proj = torch.nn.Sequential(torch.nn.Linear(21, 8), torch.nn.LayerNorm(8))
        block.mlp.reset_parameters = lambda: reset_parts(block.mlp)
        all_drawn_anew(block)

    def test_the_way_from_the_meta_device(self):
        settings = {"modes": 2, "layer_scale": 0.1, "dtype": torch.float64}
        block, x = make(layer_scale=0.1), draw(2, 3, 4, 8)
        assert torch.equal(by_way_of_meta(lambda: ta.TensorTransformerBlock(8, 2, **settings), block)(x), block(x))


# Messages.


BLOCKS = {
    "heads": ({"num_heads": 3}, "embed_dim must be divisible by num_heads, got 8 and 3."),
    "operator": (
        {"operator": "nope"},
        f"there is no operator 'nope'; the operators are: {', '.join(ta.OPERATORS)}.",
    ),
    "option": (
        {"centred": True},
        "operator 'additive' has no option 'centred'; its options are: interaction, saturation, include_self.",
    ),
    "dropout": ({"dropout": 2.0}, "dropout must be between 0 and 1, got 2.0."),
    "causal": (
        {"causal": 0, "operator": "kronecker_sum"},
        "causal has no meaning for operator 'kronecker_sum': its queries are pooled over positions.",
    ),
    "drop path": ({"drop_path": -0.5}, "drop_path must be between 0 and 1, got -0.5."),
    "no mlp": ({"mlp_ratio": float("nan")}, "mlp_ratio must be finite, got nan."),
    "mlp": ({"mlp_ratio": 0.0}, "mlp_ratio leaves no hidden channels, got 0.0 with embed_dim 8."),
    "checkpoint": ({"checkpoint": "no"}, "checkpoint must be True or False, got 'no'."),
    "layout": ({"channels_first": 1}, "channels_first must be True or False, got 1."),
}


@pytest.mark.parametrize("case", BLOCKS)
def test_bad_blocks(case):
    options, rule = BLOCKS[case]
    options = {"num_heads": 2, "modes": "h w", **options}
    refused(OptionError, f"TensorTransformerBlock: {rule}", ta.TensorTransformerBlock, 8, **options)


def test_modes_of_blocks():
    for options, rule in (
        ({"modes": "h h"}, "mode names must differ, but 'h' appears 2 times in 'h h'."),
        ({"modes": "h w", "causal": "t"}, "there is no mode 't' among 'h w' (order 2)."),
    ):
        refused(ModesError, f"TensorTransformerBlock: {rule}", ta.TensorTransformerBlock, 8, 2, **options)
    refused(ModesError, MISSING.format("TensorTransformerBlock"), ta.TensorTransformerBlock, 32, 4)


def test_parts_of_blocks():
    refused(OptionError, "DropPath: p must be between 0 and 1, got 1.5.", ta.DropPath, 1.5)
    told = "GatedMLP: embed_dim and hidden_dim must be at least 1, got 8 and 0."
    refused(OptionError, told, ta.GatedMLP, 8, 0)


INPUTS = {
    "dimensions": ((2, 30, 40), ShapeError, "x has 3 dimensions, but the layout (B h w C) has 4."),
    "channels": ((2, 30, 40, 7), ShapeError, "x has 7 channels, but embed_dim is 8."),
    "empty mode": ((2, 30, 0, 8), ShapeError, "mode 'w' has size 0 in x, but every mode needs at least 1 index."),
}


@pytest.mark.parametrize("case", INPUTS)
def test_inputs(case):
    shape, error, rule = INPUTS[case]
    block = ta.TensorTransformerBlock(8, 2, modes="h w")
    refused(error, f"TensorTransformerBlock: {rule}{reading(*shape)}", block, torch.ones(shape))


def test_inputs_of_other_layouts_and_types():
    block, x = ta.TensorTransformerBlock(8, 2, modes="h w"), torch.ones(2, 30, 40, 8)
    told = f"the type is torch.float64 in x but torch.float32 in the parameters.{reading(2, 30, 40, 8)}"
    refused(DtypeError, f"TensorTransformerBlock: {told}", block, x.double())
    first = ta.TensorTransformerBlock(8, 2, modes="h w", channels_first=True)
    told = f"TensorTransformerBlock: x has 30 channels, but embed_dim is 8.{reading(2, 30, 40, 8, first=True)}"
    refused(ShapeError, told, first, x)
