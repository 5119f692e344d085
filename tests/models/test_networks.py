"""KANet and TensorUNet: every order, size and layout, mixers, costs, graphs, and what they refuse."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from modules import MISSING, all_drawn_anew, by_way_of_meta, draw, reading, refused
from torch.export import Dim

import tensorattn as ta
from tensorattn.errors import DtypeError, ModesError, OptionError, ShapeError
from tensorattn.models.convolution import InvertedResidual, WindowEmbedding
from tensorattn.nn.mixers import mixer_names

NETWORKS = {"KANet": ta.KANet, "TensorUNet": ta.TensorUNet}
SIZES = (5, 7, 6, 3, 4)


def make(name, order=2, **options):
    """A small network with all parameters drawn, always the same."""
    network = NETWORKS[name](2, 3, modes=order, **{"widths": (8, 16), "num_heads": 2, **options}).double()
    with torch.no_grad():
        for seed, parameter in enumerate(network.parameters()):
            parameter.copy_(0.3 * draw(*parameter.shape, seed=seed))
    return network.eval()


def shape_of(name, batch, sizes):
    """Shape of an output, channels first."""
    return (batch, 3) if name == "KANet" else (batch, 3, *sizes)


def test_windows_are_a_convolution():
    for order, convolve in ((1, F.conv1d), (2, F.conv2d), (3, F.conv3d)):
        for stride in (1, 2):
            windows = WindowEmbedding(2, 4, modes=order, stride=stride, dtype=torch.float64)
            x = draw(2, *SIZES[:order], 2)
            kernel = windows.proj.weight.reshape(4, 2, *(3,) * order)
            y = convolve(x.movedim(-1, 1), kernel, windows.proj.bias, stride=stride, padding=1)
            torch.testing.assert_close(windows(x), y.movedim(1, -1))


def test_inverted_residuals_skip_where_they_can():
    for width, stride, skips in ((4, 1, True), (5, 1, False), (4, 2, False)):
        each = InvertedResidual(4, width, modes=2, stride=stride, dtype=torch.float64).eval()
        torch.nn.init.zeros_(each.out_proj.weight)
        x = draw(2, 5, 4, 4)
        y = each(x)
        assert y.shape == (2, -(-5 // stride), -(-4 // stride), width)
        assert torch.equal(y, x) if skips else not y.any()


@pytest.mark.parametrize("name", NETWORKS)
class TestBoth:
    @pytest.mark.parametrize("order", [1, 2, 3, 4])
    def test_every_order_and_size(self, name, order):
        network = make(name, order)
        for sizes in (SIZES[:order], (8,) * order, (1,) * order, (3, 1, 2, 1)[:order]):
            assert network(draw(2, 2, *sizes)).shape == shape_of(name, 2, sizes)
        assert network(draw(0, 2, *SIZES[:order])).shape == shape_of(name, 0, SIZES[:order])

    @pytest.mark.thorough
    @pytest.mark.parametrize("mixer", mixer_names())
    @pytest.mark.parametrize("order", [1, 3])
    def test_every_mixer_is_trained(self, name, order, mixer):
        network = make(name, order, mixer=mixer).train()
        network(draw(2, 2, *SIZES[:order])).square().sum().backward()
        for parameter in network.parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all()

    def test_both_layouts(self, name):
        first, last, x = make(name), make(name, channels_first=False), draw(2, 2, 5, 7)
        y = last(x.movedim(1, -1))
        torch.testing.assert_close(first(x), y if name == "KANet" else y.movedim(-1, 1))

    @pytest.mark.parametrize("widths", [(8,), (8, 8, 16)])
    def test_other_depths(self, name, widths):
        assert make(name, widths=widths)(draw(2, 2, 9, 5)).shape == shape_of(name, 2, (9, 5))

    def test_mixers_mix(self, name):
        """What is far away matters with a global mixer, and does not without."""
        x = draw(1, 2, 96)
        other = x.clone()
        other[..., -1] += 1

        def changed(mixer):
            network = make("TensorUNet", 1, mixer=mixer)
            return (network(other) - network(x))[..., 0].abs().max() > 1e-9

        assert [changed(mixer) for mixer in ("identity", "mean", "flattened", "kao_kv")] == [False, True, True, True]

    def test_options_reach_attention(self, name):
        network = make(name, mixer="clustered", tokens=5, drop_path=0.25)
        layers = [part for part in network.modules() if isinstance(part, ta.TensorAttention)]
        assert len(layers) == (2 if name == "KANet" else 3)
        assert {layer.options["tokens"] for layer in layers} == {5}
        assert {part.p for part in network.modules() if isinstance(part, ta.DropPath)} == {0.25}

    def test_cost_tells_attention_apart(self, name):
        counted = {
            mixer: ta.cost(make(name, 3, mixer=mixer), (1, 2, 16, 16, 16))
            for mixer in ("identity", "flattened", "kao_kv")
        }
        assert counted["identity"].attention_flops == 0
        assert counted["flattened"].attention_flops > 5 * counted["kao_kv"].attention_flops > 0
        assert counted["flattened"].flops > counted["kao_kv"].flops > counted["identity"].flops
        positions = 8**3  # of the first stage, which has 8 channels
        assert counted["flattened"].attention_flops > 4 * positions**2 * 8
        assert all(each.peak > 0 for each in counted.values())

    def test_state(self, name):
        all_drawn_anew(make(name))
        network, x = make(name), draw(2, 2, 5, 7)
        twin = by_way_of_meta(
            lambda: NETWORKS[name](2, 3, modes=2, widths=(8, 16), num_heads=2, dtype=torch.float64), network
        ).eval()
        assert torch.equal(twin(x), network(x))

    @pytest.mark.thorough
    @pytest.mark.parametrize(
        ("order", "mixer", "options"),
        [(1, "flattened", {}), (2, "mean", {}), (3, "kao_qkv", {"centered": True}), (4, "local", {})],
    )
    def test_export_for_all_sizes(self, name, order, mixer, options):
        network = make(name, order, mixer=mixer, **options)
        dims = ({place: Dim.DYNAMIC for place in (0, *range(2, 2 + order))},)
        program = torch.export.export(network, (draw(3, 2, *(9, 8, 11, 7)[:order]),), dynamic_shapes=dims)
        x = draw(2, 2, *(6, 13, 5, 8)[:order])
        torch.testing.assert_close(program.module()(x), network(x))

    def test_messages(self, name):
        make_network, known = NETWORKS[name], ", ".join(mixer_names())
        for message, options in (
            (f"there is no mixer 'conv'; there are: {known}.", {"mixer": "conv"}),
            (f"there is no mixer None; there are: {known}.", {"mixer": None}),
            ("mixer 'local' has no option 'tokens'; it has none.", {"mixer": "local", "tokens": 4}),
            ("embed_dim must be divisible by num_heads, got 16 and 3.", {"num_heads": 3}),
            ("widths must be one number a stage, got ().", {"widths": ()}),
            ("widths must be one number a stage, got 16.", {"widths": 16}),
            ("widths must be one number a stage, got tensor([8, 8]).", {"widths": torch.tensor([8, 8])}),
            ("every one of widths must be at least 1, got 0.", {"widths": (16, 0)}),
            ("expansion must be a positive number, got 0.", {"expansion": 0}),
            ("mlp_ratio is set by the network, so it is no option of its attention.", {"mlp_ratio": 2}),
            ("channels_first must be True or False, got 'yes'.", {"channels_first": "yes"}),
        ):
            with pytest.raises(OptionError) as error:
                make_network(1, 3, modes=2, **options)
            assert error.value.rule == message and str(error.value).split(":")[0] in (name, "TensorTransformerBlock")
        refused(ModesError, MISSING.format(name), make_network, 1, 3)
        refused(OptionError, f"{name}: in_channels must be at least 1, got 0.", make_network, 0, 3, modes=2)
        network = NETWORKS[name](2, 3, modes="h w", widths=(8,), num_heads=2)
        x = torch.empty(2, 3, 5, 7)
        told = f"{name}: x has 3 channels, but in_channels is 2.{reading(2, 3, 5, 7, first=True)}"
        refused(ShapeError, told, network, x)
        told = f"{name}: mode 'w' has size 0 in x, but every mode needs at least 1 index."
        refused(ShapeError, told + reading(2, 2, 5, 0, first=True), network, torch.empty(2, 2, 5, 0))
        told = f"{name}: the type is torch.float64 in x but torch.float32 in the parameters."
        refused(DtypeError, told + reading(2, 2, 5, 7, first=True), network, torch.empty(2, 2, 5, 7).double())


def test_a_unet_is_its_parts():
    network, x = make("TensorUNet", widths=(8, 16), channels_first=False), draw(2, 5, 7, 2)
    fine = network.encoders[0](network.down[0](x))
    assert fine.shape == (2, 3, 4, 8)
    coarse = network.bottom(network.down[1](fine))
    assert coarse.shape == (2, 2, 2, 16)
    up = network.up[1](coarse)[:, :3, :4]
    up = network.decoders[0](network.joins[0](torch.cat([up, fine], -1)))
    both = torch.cat([network.up[0](up)[:, :5, :7], network.local(x)], -1)
    y = network.head(F.relu6(network.norm(network.features(both))))
    torch.testing.assert_close(network(x), y)


def test_depths():
    network = ta.KANet(1, 3, modes=2, widths=(8, 16), depths=(2, 3))
    assert len(network.stages) == 2 * 5 and network.depths == (2, 3)
    strides = [part.filter.stride for part in network.stages if isinstance(part, InvertedResidual)]
    assert strides == [1, 1, 2, 1, 1]
    told = "KANet: depths has 1 entries, but widths has 2."
    refused(OptionError, told, ta.KANet, 1, 3, modes=2, widths=(8, 16), depths=(2,))


def test_sizes_of_the_paper():
    """The networks that the tasks train are small: tens of thousands of parameters."""
    for make_network, order in itertools.product((ta.KANet, ta.TensorUNet), (1, 2, 3, 4)):
        count = sum(parameter.numel() for parameter in make_network(1, 10, modes=order).parameters())
        assert 15_000 < count < 120_000
