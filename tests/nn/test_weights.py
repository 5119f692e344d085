"""Weights of other libraries: state dicts are read as they are, modules give their settings, nothing is lost silently."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from modules import draw, refused
from torch import nn

import tensorattn as ta
from nn.layers import compare, more
from tensorattn.errors import OptionError

SIZES = (3, 4, 5)


class Timm(nn.Module):
    """Attention as timm has it."""

    def __init__(self, dim, num_heads, *, head_dim=None, qkv_bias=False, norm=None, proj_bias=True, drop=(0.0, 0.0)):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim or dim // num_heads
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * num_heads * self.head_dim, qkv_bias)
        self.q_norm = norm(self.head_dim, eps=0.1) if norm else nn.Identity()
        self.k_norm = norm(self.head_dim, eps=0.1) if norm else nn.Identity()
        self.attn_drop, self.norm, self.proj_drop = nn.Dropout(drop[0]), nn.Identity(), nn.Dropout(drop[1])
        self.proj = nn.Linear(num_heads * self.head_dim, dim, proj_bias)

    def forward(self, x, attn_mask=None, is_causal=False):
        qkv = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        y = nn.functional.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, scale=self.scale)
        return self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))


class Monai(nn.Module):
    """Attention as MONAI has it, its rearrangements written out: "b h (qkv l d) -> qkv b l h d"."""

    def __init__(self, dim, num_heads, *, combined=True, bias=False, causal=False, kv_heads=None):
        super().__init__()
        self.num_heads, self.causal, self.save_attn, self.attention_dtype = num_heads, causal, False, None
        self.out_proj, size = nn.Linear(dim, dim), dim // num_heads * (kv_heads or num_heads)
        self.qkv = nn.Linear(dim, 3 * dim, bias) if combined else nn.Identity()
        self.to_q = nn.Identity() if combined else nn.Linear(dim, dim, bias)
        self.to_k, self.to_v = (nn.Identity() if combined else nn.Linear(dim, size, bias) for _ in range(2))
        self.drop_output, self.drop_weights = nn.Dropout(0.25), nn.Dropout(0.25)

    def forward(self, x, attn_mask=None):
        if isinstance(self.qkv, nn.Linear):
            q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        else:
            head = self.to_q.out_features // self.num_heads
            q, k, v = (to(x).unflatten(-1, (-1, head)).transpose(1, 2) for to in (self.to_q, self.to_k, self.to_v))
            k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], 1) for part in (k, v))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.drop_output(self.out_proj(y.transpose(1, 2).flatten(2)))


def drawn(module):
    """The same module in float64, all its parameters drawn."""
    with torch.no_grad():
        for seed, parameter in enumerate(module.double().parameters()):
            parameter.copy_(0.5 * draw(*parameter.shape, seed=seed))
    return module.eval()


HOSTS = {
    "timm": lambda: Timm(24, 4),
    "timm with norms and biases": lambda: Timm(24, 4, qkv_bias=True, norm=nn.LayerNorm, drop=(0.1, 0.2)),
    "timm with an rms norm": lambda: Timm(24, 4, norm=nn.RMSNorm, proj_bias=False),
    "timm with heads of another size": lambda: Timm(24, 4, head_dim=5),
    "monai": lambda: Monai(24, 4, bias=True),
    "monai with maps apart": lambda: Monai(24, 4, combined=False),
    "heads of keys": lambda: Monai(24, 4, combined=False, bias=True, kv_heads=2),
}


def told(layer):
    """Settings that differ from the usual ones."""
    return layer.extra_repr().partition("operator='flattened'")[2].removeprefix(", ")


class TestModules:
    @pytest.mark.parametrize("host", HOSTS)
    def test_give_the_same(self, host):
        module, x = drawn(HOSTS[host]()), draw(2, *SIZES, 24)
        layer = ta.TensorAttention.from_module(module, modes="t h w", operator="flattened")
        compare(layer(x).flatten(1, 3), module(x.flatten(1, 3)))
        assert not layer.training and layer.q_proj.weight.dtype == torch.float64
        before = module.state_dict()
        layer.train()(x).sum().backward()
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.add_(1.0)
        compare(list(module.state_dict().values()), list(before.values()))

    def test_give_their_settings(self):
        wanted = {
            "timm": "",
            "timm with norms and biases": "dropout=0.1, proj_drop=0.2",
            "timm with heads of another size": "head_dim=5",
            "monai": "dropout=0.25, proj_drop=0.25",
            "heads of keys": "num_kv_heads=2, dropout=0.25, proj_drop=0.25",
        }
        for host, settings in wanted.items():
            layer = ta.TensorAttention.from_module(HOSTS[host](), modes=3, operator="flattened")
            assert told(layer) == settings
        module = Timm(24, 4)
        module.scale = 0.5
        assert told(ta.TensorAttention.from_module(drawn(module), modes=3, operator="flattened")) == "scale=0.5"

    @pytest.mark.parametrize("settings", more({}, {"bias": False}, {"dropout": 0.5}), ids=str)
    def test_of_torch(self, settings):
        module, x = drawn(nn.MultiheadAttention(24, 4, batch_first=True, **settings)), draw(2, *SIZES, 24)
        layer, rows = ta.TensorAttention.from_module(module, modes=3, operator="flattened"), x.flatten(1, 3)
        compare(layer(x).flatten(1, 3), module(rows, rows, rows)[0])
        assert layer.dropout == settings.get("dropout", 0.0)
        assert [layer.q_proj.bias is None, layer.out_proj.bias is None] == [not settings.get("bias", True)] * 2

    @pytest.mark.parametrize("dims", more((5, 6), (24, 6), (5, 24)), ids=str)
    def test_of_torch_with_other_channels_of_keys(self, dims):
        module = drawn(nn.MultiheadAttention(24, 4, kdim=dims[0], vdim=dims[1], batch_first=True))
        layer = ta.TensorAttention.from_module(module, modes="h w", operator="flattened")
        x, key, value = draw(2, 3, 4, 24), draw(2, 5, 2, dims[0]), draw(2, 5, 2, dims[1])
        parts = [part.flatten(1, 2) for part in (x, key, value)]
        compare(layer(x, (key, value)).flatten(1, 2), module(*parts)[0])

    @pytest.mark.parametrize("operator", sorted(ta.OPERATORS))
    def test_become_any_operator(self, operator):
        options = {"interaction": "linear"} if operator == "additive" else {}
        layer = ta.TensorAttention.from_module(Timm(24, 4), modes=3, operator=operator, **options)
        assert layer(torch.randn(2, *SIZES, 24)).shape == (2, *SIZES, 24)

    def test_options_take_the_place_of_what_they_say(self):
        layer = ta.TensorAttention.from_module(Monai(24, 4), modes=3, operator="clustered", dropout=0.0)
        assert layer.proj_drop == 0.25
        rule = "dropout has no meaning for operator 'clustered': a cell stands for many positions, which would be "
        rule = f"TensorAttention.from_module: {rule}dropped together."
        refused(OptionError, rule, ta.TensorAttention.from_module, Monai(24, 4), modes=3, operator="clustered")


def changed(change, module=None):
    """A module after a change."""
    module = Timm(24, 4) if module is None else module
    change(module)
    return module


class Turning(Timm):
    def forward(self, x, rope=None):
        return x


class Own(nn.MultiheadAttention):
    def forward(self, *args, **kwargs):
        return args[0], None


LOST = {
    "bias of keys": (nn.MultiheadAttention(24, 4, add_bias_kv=True), "MultiheadAttention with add_bias_kv"),
    "zeros": (nn.MultiheadAttention(24, 4, add_zero_attn=True), "MultiheadAttention with add_zero_attn"),
    "own forward": (Own(24, 4), "Own with a forward of its own"),
    "causal": (Monai(24, 4, causal=True), "Monai with causal"),
    "gate": (changed(lambda m: setattr(m, "gate", nn.Linear(24, 24))), "Timm with gate"),
    "norm": (changed(lambda m: setattr(m, "norm", nn.LayerNorm(24))), "Timm with norm"),
    "table and mask": (
        changed(
            lambda m: (setattr(m, "table", nn.Parameter(torch.zeros(3))), m.register_buffer("mask", torch.ones(2)))
        ),
        "Timm with table, mask",
    ),
    "turns": (Turning(24, 4), "Turning with the argument rope of forward"),
    "output": (
        changed(lambda m: setattr(m, "proj", nn.Linear(24, 12))),
        "Timm with 12 channels of output beside 24 of input",
    ),
}


@pytest.mark.parametrize("case", LOST)
def test_what_cannot_be_kept(case):
    module, what = LOST[case]
    rule = f"TensorAttention.from_module: module is {what}, which a layer cannot keep."
    refused(OptionError, rule, ta.TensorAttention.from_module, module, modes=3)


@pytest.mark.parametrize("module", [nn.Linear(3, 4), nn.Identity(), None], ids=str)
def test_no_attention(module):
    rule = (
        "TensorAttention.from_module: module must be an nn.MultiheadAttention, or have num_heads and linear maps called "
        "qkv (or to_q, to_k, to_v, or q_proj, k_proj, v_proj) and proj or out_proj, got "
        f"{type(module).__name__}."
    )
    refused(OptionError, rule, ta.TensorAttention.from_module, module, modes=3)


class TestStates:
    @pytest.mark.parametrize("host", ["timm with norms and biases", "monai", "monai with maps apart", "heads of keys"])
    def test_are_read_as_they_are(self, host):
        module, x = drawn(HOSTS[host]()), draw(2, *SIZES, 24)
        layer = ta.TensorAttention.from_module(module, modes=3, operator="flattened")
        other = copy.deepcopy(layer)
        other.reset_parameters()
        state = module.state_dict()
        names = list(state)
        assert other.load_state_dict(state) == ([], [])
        assert list(state) == names
        compare(other(x), layer(x))

    @pytest.mark.parametrize("dims", [{}, {"kdim": 5, "vdim": 6}], ids=str)
    def test_of_torch(self, dims):
        module = drawn(nn.MultiheadAttention(24, 4, **dims))
        layer = ta.TensorAttention(24, 4, modes=3, operator="flattened", dtype=torch.float64, **dims)
        layer.load_state_dict(module.state_dict())
        other = ta.TensorAttention.from_module(module, modes=3, operator="flattened")
        compare(list(layer.state_dict().values()), list(other.state_dict().values()))

    def test_inside_of_a_model_copied_and_pickled(self):
        host, layer = nn.ModuleList([Timm(24, 4)]), ta.TensorAttention(24, 4, modes=3, qkv_bias=False)
        saved = io.BytesIO()
        torch.save(nn.ModuleList([layer]), saved)
        saved.seek(0)
        for ours in (
            nn.ModuleList([layer]),
            nn.ModuleList([copy.deepcopy(layer)]),
            torch.load(saved, weights_only=False),
        ):
            ours.load_state_dict(host.state_dict())
            compare(ours[0].v_proj.weight, host[0].qkv.weight[48:])

    def test_that_do_not_fit(self):
        layer = ta.TensorAttention(24, 4, modes=3, num_kv_heads=2)
        with pytest.raises(
            RuntimeError, match=r"in_proj_weight has 72 rows, but queries, keys and values have 24 .*12"
        ):
            layer.load_state_dict(nn.MultiheadAttention(24, 4).state_dict())
        layer = ta.TensorAttention(24, 4, modes=3, bias=False)
        with pytest.raises(RuntimeError, match=r'Unexpected key.*"q_proj.bias"'):
            layer.load_state_dict(nn.MultiheadAttention(24, 4).state_dict())

    def test_their_own_are_what_they_were(self):
        layer = ta.TensorAttention(24, 4, modes=3)
        state = layer.state_dict()
        layer.reset_parameters()
        layer.load_state_dict(state)
        compare(list(layer.state_dict().values()), list(state.values()))


@pytest.mark.parametrize("settings", [{}, {"qkv_bias": True, "dim_head": 5}, {"use_combined_linear": False}], ids=str)
def test_the_real_module_of_monai(settings):
    pytest.importorskip("einops")
    blocks = pytest.importorskip("monai.networks.blocks")
    module, x = blocks.SABlock(24, 4, **settings).eval(), torch.randn(2, *SIZES, 24)
    layer = ta.TensorAttention.from_module(module, modes=3, operator="flattened")
    torch.testing.assert_close(layer(x).flatten(1, 3), module(x.flatten(1, 3)))
    for name, given in (("causal", {"causal": True, "sequence_length": 60}), ("save_attn", {"save_attn": True})):
        with pytest.raises(OptionError, match=f"SABlock with {name}"):
            ta.TensorAttention.from_module(blocks.SABlock(24, 4, **given), modes=3)
