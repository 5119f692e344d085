"""Plain mixers, the filter for every order, and the block around them."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from modules import MISSING, all_drawn_anew, draw, refused

import tensorattn as ta
from tensorattn.errors import ModesError, OptionError
from tensorattn.functional import OPERATORS
from tensorattn.nn.mixers import MIXERS, DepthwiseFilter, make_mixer, mixer_names

CLOSE = {"rtol": 1e-10, "atol": 1e-11}
SIZES = (5, 4, 3, 2, 2)


def make(name, order=2, dim=8, **options):
    """A mixer with all parameters drawn, always the same."""
    mixer = make_mixer(name, dim, 2, modes=order, dtype=torch.float64, **options)
    with torch.no_grad():
        for seed, parameter in enumerate(mixer.parameters()):
            parameter.copy_(0.5 * draw(*parameter.shape, seed=seed))
    return mixer


def filtered(x, weight, stride):
    """The definition: a sum over all 3^N neighbours, zeros outside."""
    order, padded = len(weight), F.pad(x, (0, 0, *(1, 1) * len(weight)))
    total = torch.zeros_like(x)
    for taps in itertools.product(range(3), repeat=order):
        window, factor = padded, torch.ones_like(weight[0, 0])
        for mode, tap in enumerate(taps):
            window, factor = window.narrow(1 + mode, tap, x.shape[1 + mode]), factor * weight[mode, tap]
        total = total + window * factor
    return total[:, *(slice(None, None, stride),) * order]


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_a_filter_is_the_sum_over_neighbours(order, stride):
    each = DepthwiseFilter(3, modes=order, stride=stride, dtype=torch.float64)
    x = draw(2, *SIZES[:order], 3)
    y = each(x)
    torch.testing.assert_close(y, filtered(x, each.weight, stride), **CLOSE)
    assert y.shape == (2, *(-(-size // stride) for size in SIZES[:order]), 3)


def test_a_filter_is_a_convolution_of_torch():
    each, x = DepthwiseFilter(3, modes=3, stride=2, dtype=torch.float64), draw(2, 5, 4, 3, 3)
    kernel = torch.einsum("ic,jc,kc->cijk", *each.weight)
    y = F.conv3d(x.movedim(-1, 1), kernel.unsqueeze(1), stride=2, padding=1, groups=3).movedim(1, -1)
    torch.testing.assert_close(each(x), y, **CLOSE)
    assert repr(each) == "DepthwiseFilter(channels=3, modes=3, stride=2)"


class TestMixers:
    @pytest.mark.parametrize("name", MIXERS)
    @pytest.mark.parametrize("order", [1, 2, 3, 4])
    def test_every_order(self, name, order):
        for batch in (2, 0):
            assert make(name, order)(draw(batch, *SIZES[:order], 8)).shape == (batch, *SIZES[:order], 8)

    @pytest.mark.parametrize(("name", "reach"), [("identity", 0), ("pointwise", 0), ("local", 1), ("mean", 5)])
    def test_how_far_positions_see(self, name, reach):
        mixer, x = make(name), draw(1, 7, 9, 8)
        other = x.clone()
        other[:, 3, 4] += 1
        changed = (mixer(other) - mixer(x)).abs().sum(-1)[0] > 1e-9
        rows, columns = torch.arange(7)[:, None], torch.arange(9)
        assert torch.equal(changed, ((rows - 3).abs() <= reach) & ((columns - 4).abs() <= reach))

    def test_the_mean_is_global(self):
        mixer, x = make("mean"), draw(2, 3, 4, 8)
        own, shared = mixer.in_proj(x).chunk(2, -1)
        y = mixer.out_proj(F.gelu(own + shared.mean((1, 2), keepdim=True)))
        torch.testing.assert_close(mixer(x), y, **CLOSE)

    @pytest.mark.parametrize("name", ["pointwise", "mean", "local"])
    def test_about_as_many_weights_as_attention(self, name):
        count, attention = (
            sum(parameter.numel() for parameter in make(each, 3, dim=32).parameters()) for each in (name, "additive")
        )
        assert 0.99 < count / attention < 1.15

    @pytest.mark.parametrize("name", MIXERS)
    @pytest.mark.parametrize("poison", [100.0, float("nan")])
    def test_what_is_absent_is_as_if_cropped(self, name, poison):
        mixer, x = make(name), draw(2, 5, 4, 8)
        x[0, 3:], x[1, :, 2:] = poison, poison
        y = mixer(x, lengths=torch.tensor([[3, 4], [5, 2]]))
        torch.testing.assert_close(y[:1, :3], mixer(x[:1, :3]), **CLOSE)
        torch.testing.assert_close(y[1:, :, :2], mixer(x[1:, :, :2]), **CLOSE)
        assert not y[0, 3:].any() and not y[1, :, 2:].any()

    def test_weights_are_multiplicities_of_the_mean(self):
        mixer, x = make("mean"), draw(1, 3, 2, 8)
        twice = torch.cat([x, x[:, 2:]], 1)
        weights = [torch.tensor([1.0, 1.0, 2.0], dtype=torch.float64), None]
        torch.testing.assert_close(mixer(x, weights=weights), mixer(twice)[:, :3], **CLOSE)

    @pytest.mark.parametrize("name", ["pointwise", "mean", "local"])
    def test_gradients_and_parameters(self, name):
        mixer = make(name, dim=3)
        assert torch.autograd.gradcheck(mixer, (draw(2, 3, 2, 3).requires_grad_(),), fast_mode=True)
        all_drawn_anew(mixer)

    def test_options_reach_attention(self):
        layer = make("kao_qkv", centered=True, dropout=0.5)
        assert (layer.operator, layer.options["centered"], layer.dropout) == ("kao_qkv", True, 0.5)
        assert mixer_names() == (*MIXERS, *OPERATORS)


class TestBlock:
    @pytest.mark.parametrize("name", [*MIXERS, "kao_kv"])
    def test_a_block_without_mlp(self, name):
        block = ta.TensorTransformerBlock(8, 2, modes="h w", mixer=name, mlp_ratio=None, layer_scale=0.5)
        x = draw(2, 3, 4, 8, dtype=torch.float32)
        torch.testing.assert_close(block(x), x + 0.5 * block.attention(block.attention_norm(x)))
        assert block.mlp is block.mlp_norm is block.mlp_scale is None
        first = ta.TensorTransformerBlock(8, 2, modes="h w", mixer=name, mlp_ratio=None, channels_first=True)
        assert first(x.movedim(-1, 1)).shape == (2, 8, 3, 4)

    def test_an_operator_is_a_mixer(self):
        block, other = (
            ta.TensorTransformerBlock(8, 2, modes=2, **how) for how in ({"mixer": "axial"}, {"operator": "axial"})
        )
        other.load_state_dict(block.state_dict())
        x = draw(2, 3, 4, 8, dtype=torch.float32)
        assert torch.equal(block(x), other(x))


def test_messages():
    block = ta.TensorTransformerBlock
    known = ", ".join(mixer_names())
    for message, options in (
        (f"there is no mixer 'conv'; there are: {known}.", {"mixer": "conv"}),
        ("mixer 'mean' has no option 'causal'; it has none.", {"mixer": "mean", "causal": 0}),
        ("operator has no meaning with mixer, which names it.", {"mixer": "mean", "operator": "axial"}),
        ("mlp_ratio must be a number or None, got 'none'.", {"mlp_ratio": "none"}),
        (
            "operator 'kao_kv' has no option 'centered'; its options are: none.",
            {"mixer": "kao_kv", "centered": True},
        ),
    ):
        refused(OptionError, f"TensorTransformerBlock: {message}", block, 8, 2, modes=2, **options)
    refused(ModesError, MISSING.format("TensorTransformerBlock"), block, 8, 2, mixer="mean")
    local = make("local")
    with pytest.raises(OptionError) as error:
        local(draw(2, 3, 4, 8), weights=[torch.arange(1.0, 4.0), None])
    told = "LocalMixer: weights has no meaning for mixer 'local': a filter counts each neighbour once."
    assert str(error.value).splitlines()[0] == told
