"""The model and its config: what it computes, other sizes, layouts, state, types, tools of torch."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle

import pytest
import torch
from modules import MISSING, all_drawn_anew, by_way_of_meta, draw, reading, refused
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim

import tensorattn as ta
from tensorattn.errors import ModesError, OptionError, ShapeError
from tensorattn.functional import OPERATORS

CLOSE = {"rtol": 1e-10, "atol": 1e-11}

SMALL = {"in_channels": 3, "embed_dim": 16, "depth": 2, "num_heads": 2}
LEARNED = {"positions": "learned", "sizes": (3, 4)}


pytestmark = pytest.mark.usefixtures("fresh_compiler")


def config(**settings):
    return ta.TensorTransformerConfig(**{"modes": "t h", **SMALL, **settings})


def make(dtype=torch.float64, **settings):
    """A model with all parameters drawn, always the same."""
    model = ta.TensorTransformer(config(**settings), dtype=dtype)
    with torch.no_grad():
        for seed, parameter in enumerate(model.parameters()):
            parameter.copy_(0.3 * draw(*parameter.shape, seed=seed))
    return model


class TestValues:
    @pytest.mark.parametrize("settings", [{}, LEARNED, {"positions": None}], ids=["sincos", "learned", "none"])
    @pytest.mark.parametrize("out_channels", [None, 5])
    def test_is_its_parts_one_after_the_other(self, settings, out_channels):
        model, x = make(patch=(1, 2), out_channels=out_channels, **settings), draw(2, 3, 8, 3)
        y = model.embedding(x)
        y = y if model.positions is None else model.positions(y)
        for block in model.blocks:
            y = block(y)
        y = model.norm(y)
        y = y if out_channels is None else model.unembedding(y)
        torch.testing.assert_close(model(x), y, rtol=0, atol=0)
        assert y.shape == ((2, 3, 4, 16) if out_channels is None else (2, 3, 8, 5))
        assert len(model.blocks) == 2

    @pytest.mark.parametrize("out_channels", [None, 5])
    def test_channels_first(self, out_channels):
        settings = {"patch": (1, 2), "out_channels": out_channels, "pad": True}
        last, first = make(**settings), make(**settings, channels_first=True)
        x, weights = draw(2, 3, 7, 3), [None, draw(4).sigmoid()]
        y = last(x, weights=weights)
        torch.testing.assert_close(first(x.movedim(-1, 1), weights=weights), y.movedim(-1, 1), **CLOSE)
        torch.testing.assert_close(first(x.movedim(-1, 1).contiguous()), last(x).movedim(-1, 1), **CLOSE)

    @pytest.mark.thorough
    @pytest.mark.parametrize("order", range(1, 9))
    def test_every_order(self, order):
        sizes = tuple(2 if mode % 3 else 1 for mode in range(order))
        model = make(modes=order, patch=2, pad=True, out_channels=2)
        assert model(draw(2, *sizes, 3)).shape == (2, *sizes, 2)
        assert model(draw(0, *sizes, 3)).shape == (0, *sizes, 2)

    @pytest.mark.thorough
    @pytest.mark.parametrize("name", OPERATORS)
    def test_every_operator(self, name):
        model = make(operator=name)
        assert {block.attention.operator for block in model.blocks} == {name}
        y = model(draw(2, 3, 4, 3))
        y.square().sum().backward()
        for parameter in model.parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all()

    def test_options_reach_the_blocks(self):
        model = make(
            options={"causal": "t", "dropout": 0.25}, drop_path=0.5, layer_scale=0.1, checkpoint=True, mlp_ratio=2.0,
            bias=False, depth=3, periodic=("h",), spacing={"t": 0.5},
        )  # fmt: skip
        assert [block.drop_path.p for block in model.blocks] == [0.0, 0.25, 0.5]
        for block in model.blocks:
            assert (block.attention.causal, block.attention.dropout) == (0, 0.25)
            assert (block.layer_scale, block.checkpoint, block.mlp.out_proj.in_features) == (0.1, True, 32)
        assert model.positions.extra_repr() == "embed_dim=16, modes='t h', periodic=('h',), spacing={'t': 0.5}"
        assert not [name for name, _ in model.named_parameters() if "bias" in name]
        assert make(depth=1, drop_path=0.5).blocks[0].drop_path.p == 0.0

    def test_causal_models_see_no_later_frame(self):
        model, x = make(options={"causal": "t"}, patch=(1, 2), out_channels=1), draw(2, 5, 4, 3)
        y, later = model(x), x.clone()
        later[:, 3:] += 10
        torch.testing.assert_close(model(later)[:, :3], y[:, :3], **CLOSE)
        assert (model(later) - y)[:, 3:].abs().min() > 0

    def test_coordinates_reach_the_positions(self):
        model, x = make(), draw(2, 3, 4, 3)
        even = {"h": torch.arange(4.0)}
        torch.testing.assert_close(model(x, coordinates=even), model(x), **CLOSE)
        assert (model(x, coordinates={"h": [0.0, 1.0, 2.0, 30.0]}) - model(x)).abs().max() > 1e-3

    def test_weights_reach_every_block(self):
        """A patch of weight zero is as if absent: what is there does not matter to the others."""
        model, x = make(patch=(1, 2)), draw(2, 3, 8, 3)
        weights, other = [None, torch.tensor([1.0, 1, 1, 0])], x.clone()
        other[:, :, 6:] += 10
        torch.testing.assert_close(
            model(other, weights=weights)[:, :, :3], model(x, weights=weights)[:, :, :3], **CLOSE
        )
        assert (model(other) - model(x))[:, :, :3].abs().max() > 1e-3

    def test_circles_reach_learned_positions(self):
        circle = make(**LEARNED, periodic={"h": 4.0}).positions
        assert circle.extra_repr() == "embed_dim=16, sizes=(3, 4), modes='t h', periodic={'h': 4.0}"

    def test_positions_tell_permuted_inputs_apart(self):
        x = draw(2, 3, 4, 3)
        for settings, blind in (({"positions": None}, True), ({}, False), (LEARNED, False)):
            model = make(**settings)
            same = torch.allclose(model(x.flip(1)), model(x).flip(1))
            assert same is blind

    def test_random_only_in_training(self):
        model, x = make(drop_path=0.5, options={"dropout": 0.5}), draw(4, 3, 4, 3)
        assert not torch.equal(model(x), model(x))
        assert torch.equal(model.eval()(x), model(x))


class TestPooling:
    def test_is_a_map_of_the_mean(self):
        model, x = make(patch=(1, 2), num_classes=5), draw(2, 3, 8, 3)
        seen = []
        model.norm.register_forward_hook(lambda *parts: seen.append(parts[2]))
        y = model(x)
        torch.testing.assert_close(y, model.head(seen[0].mean((1, 2))), **CLOSE)
        assert y.shape == (2, 5)
        first = make(patch=(1, 2), num_classes=5, channels_first=True)
        torch.testing.assert_close(first(x.movedim(-1, 1)), y, **CLOSE)

    @pytest.mark.parametrize("mixer", [None, "mean", "local", "pointwise", "identity", "flattened"])
    @pytest.mark.parametrize("poison", [100.0, float("nan")])
    def test_what_is_absent_is_as_if_cropped(self, mixer, poison):
        model, x = make(num_classes=5, mixer=mixer, patch=(1, 2)), draw(2, 5, 8, 3)
        x[0, 3:], x[1, :, 4:] = poison, poison
        y = model(x, lengths=torch.tensor([[3, 4], [5, 2]]))
        torch.testing.assert_close(y, torch.cat([model(x[:1, :3]), model(x[1:, :, :4])]), **CLOSE)
        mask = torch.ones(2, 5, 4, dtype=torch.bool)
        mask[0, 3:], mask[1, :, 2:] = False, False
        torch.testing.assert_close(model(x, mask=mask), y, **CLOSE)

    def test_lengths_of_no_mode(self):
        model, x = make(), draw(2, 5, 8, 3)
        for lengths in ([None, None], {}):
            assert torch.equal(model(x, lengths=lengths), model(x))

    def test_weights_count_in_the_mean(self):
        model, x = make(num_classes=5, positions=None), draw(1, 3, 2, 3)
        twice = torch.cat([x, x[:, 2:]], 1)
        torch.testing.assert_close(model(x, weights=[[1.0, 1.0, 2.0], None]), model(twice), **CLOSE)

    @pytest.mark.thorough
    @pytest.mark.parametrize("mixer", ["mean", "local", "pointwise", "kao_kv"])
    def test_export(self, mixer):
        model = make(torch.float32, patch=(1, 4), pad=True, num_classes=5, depth=1, mixer=mixer).eval()
        dims = ({place: Dim.DYNAMIC for place in range(3)},)
        program = torch.export.export(model, (draw(2, 3, 10, 3, dtype=torch.float32),), dynamic_shapes=dims)
        x = draw(5, 7, 21, 3, dtype=torch.float32)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("mixer", ["mean", "local", "pointwise", "identity", "axial"])
    def test_mixers_reach_the_blocks(self, mixer):
        model = make(mixer=mixer, out_channels=2, mlp_ratio=None)
        assert model(draw(2, 3, 4, 3)).shape == (2, 3, 4, 2)
        assert {getattr(block.attention, "operator", mixer) for block in model.blocks} == {mixer}
        assert {block.mlp for block in model.blocks} == {None}


class TestState:
    @pytest.mark.parametrize("settings", [{}, LEARNED], ids=["sincos", "learned"])
    def test_any_size_after_any_other(self, settings):
        model = make(patch=(1, 2), out_channels=2, **settings)
        state = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        for sizes in ((3, 8), (5, 2), (1, 4), (3, 8)):
            x = draw(2, *sizes, 3)
            torch.testing.assert_close(model(x), make(patch=(1, 2), out_channels=2, **settings)(x), rtol=0, atol=0)
        assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == state
        assert list(model.buffers()) == []

    def test_only_learned_tables_depend_on_sizes(self):
        small, large = (make(positions="learned", sizes=sizes).state_dict() for sizes in ((3, 4), (30, 40)))
        assert [n for n in small if small[n].shape != large[n].shape] == ["positions.tables.0", "positions.tables.1"]

    def test_copies(self):
        model, x = make(**LEARNED, periodic={"h": 4.0}, patch=(1, 2), drop_path=0.5).eval(), draw(2, 3, 4, 3)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert repr(twin) == repr(model)
            assert twin.config == model.config
            assert torch.equal(twin(x), model(x))

    def test_saved_as_json_beside_its_weights(self):
        settings = {"modes": ("t", "h"), "options": {"causal": "t"}, "spacing": [1.0, 2.5], "patch": {"h": 2}}
        model = make(**settings)
        written = json.dumps(dataclasses.asdict(model.config))
        other = ta.TensorTransformer.from_config(json.loads(written), dtype=torch.float64)
        assert other.config == model.config
        assert str(other.load_state_dict(model.state_dict())) == "<All keys matched successfully>"
        x = draw(2, 3, 4, 3)
        assert torch.equal(other(x), model(x))
        assert ta.TensorTransformer.from_config(model.config).config is model.config

    def test_drawn_anew(self):
        model = make(**LEARNED, layer_scale=0.1, out_channels=2, patch=2)
        before = copy.deepcopy(model.state_dict())
        model.reset_parameters()
        for name, value in model.state_dict().items():
            assert not torch.equal(value, before[name]), name
        make().reset_parameters()

    def test_configs_are_values(self):
        assert config(patch=[1, 2]) == config(patch=(1, 2)) != config(patch=(2, 1))
        assert hash(config(options={"causal": "t"})) == hash(config(options={"causal": "t"}))
        assert dataclasses.replace(config(), depth=5).depth == 5
        with pytest.raises(dataclasses.FrozenInstanceError):
            config().depth = 5

    def test_what_it_shows(self):
        model = ta.TensorTransformer(config(depth=4, num_heads=4, embed_dim=96, periodic=["h"]), device="meta")
        count = sum(parameter.numel() for parameter in model.parameters())
        assert repr(model) == f"TensorTransformer(modes='t h', in_channels=3, periodic=('h',); {count:,} parameters)"


class TestTypes:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, dtype):
        model = make(dtype, **LEARNED, out_channels=2, patch=(1, 2), layer_scale=0.1)
        x = draw(2, 3, 6, 3, dtype=dtype)
        exact = copy.deepcopy(model).double()(x.double())
        y = model(x)
        assert y.dtype == dtype
        assert (y.double() - exact).abs().max() <= 64 * torch.finfo(dtype).eps * exact.abs().max()

    @pytest.mark.parametrize("settings", [{}, LEARNED], ids=["sincos", "learned"])
    def test_autocast(self, settings):
        model = make(torch.float32, out_channels=2, patch=(1, 2), **settings)
        x = draw(2, 3, 6, 3, dtype=torch.float32)
        exact = model(x)
        seen = []
        model.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        assert seen == [torch.float32]  # the skip connections, in full precision
        assert 0 < (y - exact).abs().max() <= 0.1 * exact.abs().max()
        y.float().square().sum().backward()
        assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())

    def test_where_parameters_live(self):
        model = ta.TensorTransformer(
            config(**LEARNED, layer_scale=0.1, out_channels=2), device="meta", dtype=torch.half
        )
        assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.half)}
        x = torch.empty(2, 5, 4, 3, device="meta", dtype=torch.half)
        assert model(x).shape == (2, 5, 4, 2)

    def test_gradients(self):
        model = make(embed_dim=4, patch=(1, 2), out_channels=1, depth=1)
        assert torch.autograd.gradcheck(model, (draw(1, 2, 4, 3).requires_grad_(),), fast_mode=True)


class TestTools:
    @pytest.mark.thorough
    def test_one_graph_for_all_sizes(self):
        model = make(patch=(1, 2), pad=True, out_channels=2, depth=1, periodic=("h",)).eval()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
        with torch.no_grad():
            counts = []
            # The first sizes differ from the channels, which are fixed. A divisible size, of which nothing is cropped,
            # is a graph of its own.
            for sizes in ((2, 4, 5), (7, 6, 7), (5, 9, 11)):
                x = draw(*sizes, 3)
                torch.testing.assert_close(compiled(x), model(x), **CLOSE)
                counts.append(counter.frame_count)
        assert 1 <= counts[0] <= 2  # a graph with floats made of sizes is handed to the backend twice
        assert counts[-1] == counts[0]

    @pytest.mark.thorough
    def test_export(self):
        model = make(torch.float32, patch=(1, 4), pad=True, out_channels=2, depth=1, **LEARNED).eval()
        dims = ({place: Dim.DYNAMIC for place in range(3)},)
        program = torch.export.export(model, (draw(2, 3, 10, 3, dtype=torch.float32),), dynamic_shapes=dims)
        for sizes in ((5, 7, 21), (2, 1, 5)):
            x = draw(*sizes, 3, dtype=torch.float32)
            torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("settings", [{}, {"positions": "learned", "sizes": (4, 6)}, {"positions": None}], ids=str)
def test_learns_a_function_of_the_position(settings):
    """From an input that is the same everywhere: with positions it learns, without them it can not."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ta.TensorTransformer(config(in_channels=1, out_channels=1, **settings))
        target, x = torch.randn(1, 4, 6, 1), torch.ones(1, 4, 6, 1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(150):
            loss = (model(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    unexplained = loss.item() / target.var(correction=0).item()
    assert unexplained < 0.3 if model.positions is not None else unexplained > 0.99


def test_maps_are_called():
    """Every linear map is called, and none is asked for its weight."""
    model, x, seen = (
        ta.TensorTransformer(config(out_channels=2, patch=(1, 2))),
        draw(2, 3, 4, 3, dtype=torch.float32),
        [],
    )
    for name in ("embedding", "unembedding"):
        getattr(model, name).proj.register_forward_hook(lambda *_, name=name: seen.append(name))
    y = model(x)
    assert seen == ["embedding", "unembedding"]
    model.norm = torch.nn.Identity()
    assert model(x).shape == y.shape


@pytest.mark.parametrize("bias", [False, True])
def test_all_parameters_are_drawn_anew(bias):
    bias = {"position_bias": ta.RelativePositionBias(2, modes="t h", max_distance=3)} if bias else {}
    all_drawn_anew(ta.TensorTransformer(config(**LEARNED, layer_scale=0.1, out_channels=2, patch=2, options=bias)))
    all_drawn_anew(ta.TensorTransformer(config(num_classes=3, options=bias)))


def test_the_way_from_the_meta_device():
    settings = {**LEARNED, "layer_scale": 0.1, "out_channels": 2}
    model, x = make(**settings), draw(2, 3, 4, 3)
    twin = by_way_of_meta(lambda: ta.TensorTransformer(config(**settings), dtype=torch.float64), model)
    assert torch.equal(twin(x), model(x))


# Messages.


CONFIGS = {
    "two heads": (
        {"num_classes": 3, "out_channels": 2},
        "num_classes is for the whole input and out_channels for each position, so one of them must be None, got 3 and 2.",
    ),
    "no classes": ({"num_classes": 0}, "num_classes must be at least 1, got 0."),
    "two mixers": (
        {"mixer": "mean", "operator": "axial"},
        "operator has no meaning with mixer, got 'axial' and 'mean'.",
    ),
    "depth": ({"depth": 0}, "depth must be at least 1, got 0."),
    "positions": ({"positions": "rope"}, "positions must be 'sincos', 'learned' or None, got 'rope'."),
    "no sizes": (
        {"positions": "learned"},
        "sizes belongs to positions='learned', but positions is 'learned' and sizes None.",
    ),
    "sizes": ({"sizes": [3, 4]}, "sizes belongs to positions='learned', but positions is 'sincos' and sizes (3, 4)."),
    "spacing": (
        {"positions": "learned", "sizes": (3, 4), "spacing": 2.0},
        "spacing belongs to positions='sincos', but positions is 'learned'.",
    ),
    "periodic": ({"positions": None, "periodic": ("w",)}, "periodic has no meaning without positions."),
    "depths": ({"depth": 2.0}, "depth must be an integer, got 2.0."),
    "no options": ({"options": None}, "options must be a mapping from names, got None."),
    "options": ({"options": {"operator": "axial"}}, "options holds 'operator', which the model is told beside them."),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs(case):
    fields, rule = CONFIGS[case]
    fields = {"modes": "h w", "in_channels": 3, **fields}
    told = f"TensorTransformerConfig: {rule}"
    refused(OptionError, told, ta.TensorTransformerConfig, **fields)
    refused(OptionError, told, ta.TensorTransformer.from_config, fields)


MODELS = {
    "heads": ({"num_heads": 5}, OptionError, "embed_dim must be divisible by num_heads, got 96 and 5."),
    "option": (
        {"options": {"centred": True}},
        OptionError,
        "operator 'additive' has no option 'centred'; its options are: interaction, saturation, include_self.",
    ),
    "patch": ({"patch": 0}, OptionError, "patch of mode 'h' must be a positive whole number, got 0."),
    "channels": ({"out_channels": 0}, OptionError, "out_channels must be at least 1, got 0."),
    "drop path": ({"drop_path": 1.5}, OptionError, "drop_path must be between 0 and 1, got 1.5."),
    "periodic": ({"periodic": "lon"}, ModesError, "there is no mode 'lon' among 'h w' (order 2)."),
    "modes": ({"modes": "h h"}, ModesError, "mode names must differ, but 'h' appears 2 times in 'h h'."),
    "tables": (
        {"positions": "learned", "sizes": (3, 4, 5)},
        ModesError,
        "modes names 2 modes, but sizes has 3.",
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_bad_models(case):
    fields, error, rule = MODELS[case]
    config = ta.TensorTransformerConfig(**{"modes": "h w", "in_channels": 3, **fields})
    with pytest.raises(error) as caught:  # parts that are right are made before
        ta.TensorTransformer(config)
    assert str(caught.value) == f"TensorTransformer: {rule}"


def test_configs_from_files():
    known = ", ".join(ta.TensorTransformerConfig.__dataclass_fields__)
    told = f"TensorTransformer.from_config: the config has no field 'width'; its fields are: {known}."
    refused(OptionError, told, ta.TensorTransformer.from_config, {"modes": 2, "in_channels": 3, "width": 4})
    told = "TensorTransformer.from_config: the config lacks the field 'in_channels'."
    refused(OptionError, told, ta.TensorTransformer.from_config, {"modes": 2})


def test_configs_without_modes():
    refused(ModesError, MISSING.format("TensorTransformerConfig"), ta.TensorTransformerConfig, in_channels=3)
    told = "TensorTransformer.from_config: the config lacks the field 'modes'."
    refused(OptionError, told, ta.TensorTransformer.from_config, {"in_channels": 3})


def test_inputs_of_models():
    config = {"modes": "h w", "in_channels": 8, "depth": 1, "embed_dim": 8, "num_heads": 2, "patch": (1, 8)}
    model = ta.TensorTransformer.from_config({**config, "positions": None})
    told = f"PatchEmbedding: x has 7 channels, but in_channels is 8.{reading(2, 30, 40, 7)}"
    refused(ShapeError, told, model, torch.ones(2, 30, 40, 7))
    told = "TensorTransformer: coordinates has no meaning without positions."
    refused(OptionError, told, model, torch.ones(2, 30, 40, 8), coordinates=[None, None])
