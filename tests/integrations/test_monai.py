"""The doors of MONAI: transformers over volumes, attention in U-Nets of any level, and the block for new ones."""

from __future__ import annotations

import pytest
import torch
from contract import Case, every_check, host, made, outputs, swap

import tensorattn as ta
from tensorattn.errors import AdapterError, OptionError
from tensorattn.integrations.doors import own_door

pytestmark = pytest.mark.filterwarnings("ignore")
host("monai")
host("einops")
nets, blocks = host("monai.networks.nets"), host("monai.networks.blocks")

SMALL = {"hidden_size": 24, "num_heads": 2}


def vit(**options):
    settings = {"in_channels": 1, "img_size": (8, 12, 16), "patch_size": 4, "mlp_dim": 32, "num_layers": 2, **SMALL}
    return lambda: nets.ViT(**{**settings, **options})


def unetr():
    return nets.UNETR(1, 2, (32, 32, 48), feature_size=2, mlp_dim=32, norm_name="instance", **SMALL)


def unet(**options):
    return nets.DiffusionModelUNet(
        3, 1, 1, channels=(8, 16), attention_levels=(False, True), num_res_blocks=1, num_head_channels=8,
        norm_num_groups=4, **options,
    )  # fmt: skip


def volume(*sizes):
    return lambda: (torch.randn(1, 1, *sizes),)


def levels(*sizes, **others):
    return lambda: {
        "x": torch.randn(1, 1, *sizes),
        "timesteps": torch.tensor([3]),
        **{k: f() for k, f in others.items()},
    }


UNET = ("down_blocks.1.attentions.0.attn", "middle_block.attention.attn", "up_blocks.0.attentions.0.attn", "up_blocks.0.attentions.1.attn")  # fmt: skip
LAYERS = ("blocks.0.attn", "blocks.1.attn")
CASES = {
    "ViT, class token": Case(vit(classification=True), volume(8, 12, 16), LAYERS, None, 1, ("qkv", "out_proj")),
    "UNETR": Case(
        unetr, volume(32, 32, 48), tuple(f"vit.blocks.{place}.attn" for place in range(12)), None, 0, ("qkv",)
    ),
    "U-Net": Case(unet, levels(8, 8, 12), UNET, None, 0, ("to_q", "to_v")),
    "ViT, perceptron": Case(
        vit(proj_type="perceptron", qkv_bias=True), volume(8, 12, 16), LAYERS, None, 0, ("qkv", "out_proj")
    ),
}


@every_check(CASES)
def test_contract(case, check):
    check(case)


def test_cross_attention_is_kept():
    case = Case(
        lambda: unet(with_conditioning=True, cross_attention_dim=12),
        levels(8, 8, 12, context=lambda: torch.randn(1, 5, 12)), (), None, 0, (),
    )  # fmt: skip
    model = made(case)
    with torch.no_grad():
        exact = outputs(model, case)
        report = swap(model, case, verify=case.inputs())
        assert len(report.layers) == len(report.kept) == 4
        assert set(report.kept.values()) == {"it attends to another sequence"}
        ta.restore_attention(model)
        ta.swap_attention(model, "flattened")
        inputs = case.inputs()
        found = model(**inputs)
        ta.restore_attention(model)
        torch.testing.assert_close(found, model(**inputs), rtol=1e-4, atol=1e-5)
        assert exact[0].shape == found.shape


def test_each_level_and_each_volume_has_its_grid():
    case = CASES["U-Net"]
    model = made(case)
    swap(model, case, "kao_kv")
    for sizes in ((8, 8, 12), (4, 8, 8)):
        model(**levels(*sizes)())
        assert own_door(model.middle_block.attention.attn).grid == tuple(size // 2 for size in sizes)


def test_a_mask_of_keys():
    attn, x = blocks.SABlock(24, 2).eval(), torch.randn(2, 24, 24)
    mask = torch.arange(24) < torch.tensor([[20], [24]])
    exact = attn(x, attn_mask=mask)
    ta.swap_attention(attn, "flattened", grid=(2, 3, 4))
    torch.testing.assert_close(attn(x, attn_mask=mask), exact)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: blocks.SABlock(24, 2, causal=True, sequence_length=8), "is causal along the list of its tokens."),
        (lambda: blocks.SABlock(24, 2, save_attn=True), "is asked for its weights (save_attn)."),
        (
            lambda: blocks.SABlock(24, 2, rel_pos_embedding="decomposed", input_size=(2, 2, 2)),
            "adds decomposed relative positions to the logits.",
        ),
    ],
    ids=["causal", "weights", "decomposed"],
)
def test_refusals(make, message):
    with pytest.raises(AdapterError) as error:
        ta.swap_attention(make(), "kao_kv", grid=(2, 2, 2))
    expected = f"swap_attention: the model (SABlock) {message}\n  Leave it out by layers=, or keep the model."
    assert str(error.value) == expected


def test_windows_are_refused():
    model = nets.SwinUNETR(in_channels=1, out_channels=2, feature_size=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1))
    with pytest.raises(AdapterError, match=r"blocks.0.attn \(WindowAttention\) attends within windows"):
        ta.swap_attention(model)


def test_fused_attention_drops_in_evaluation_too():
    attn, x = blocks.SABlock(24, 2, dropout_rate=0.5, use_flash_attention=True).eval(), torch.randn(1, 8, 24)
    assert not torch.equal(attn(x), attn(x))
    ta.swap_attention(attn, "kao_kv", grid=(2, 2, 2))
    assert not torch.equal(attn(x), attn(x))
    ta.restore_attention(attn)
    ta.swap_attention(attn, "kao_kv", grid=(2, 2, 2), attention_dropout=0.0)
    assert torch.equal(attn(x), attn(x))


def test_the_block_for_unets_stands_where_that_of_monai_does():
    settings = {"num_head_channels": 8, "norm_num_groups": 4}
    theirs = blocks.SpatialAttentionBlock(3, 16, use_combined_linear=False, **settings)
    ours = ta.ResidualAttention(3, 16, operator="flattened", **settings)
    state = theirs.state_dict()
    names = {"attn.to_q": "attn.q_proj", "attn.to_k": "attn.k_proj", "attn.to_v": "attn.v_proj"}
    for old, new in names.items():
        state = {key.replace(old, new): value for key, value in state.items()}
    ours.load_state_dict(state)
    x = torch.randn(2, 16, 3, 4, 5)
    torch.testing.assert_close(ours(x), theirs(x))
    model = made(CASES["U-Net"])  # as it is made, its last maps are zero
    model.middle_block.attention = ta.ResidualAttention(3, 16, tokens=8, **settings)
    model(**levels(8, 8, 12)())[0].square().mean().backward()
    assert all(each.grad.abs().max() > 0 for each in model.middle_block.attention.norm.parameters())


@pytest.mark.parametrize(
    "asked, message",
    [
        ({"num_head_channels": 5}, "num_head_channels is 5, which does not divide the 16 channels."),
        ({"norm_num_groups": 5}, "norm_num_groups is 5, which does not divide the 16 channels."),
    ],
)
def test_refusals_of_the_block(asked, message):
    with pytest.raises(OptionError) as error:
        ta.ResidualAttention(3, 16, **{"norm_num_groups": 4, **asked})
    assert str(error.value) == f"ResidualAttention: {message}"
