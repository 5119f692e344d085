"""The doors of diffusers: a processor for U-Nets of images and latents, transformers, and autoencoders."""

from __future__ import annotations

import pytest
import torch
from contract import Case, every_check, host, made, outputs, swap

import tensorattn as ta
from tensorattn.errors import AdapterError

pytestmark = pytest.mark.filterwarnings("ignore")
diffusers = host("diffusers")
UNet2DModel = host("diffusers.models.unets.unet_2d").UNet2DModel
UNet2DConditionModel = host("diffusers.models.unets.unet_2d_condition").UNet2DConditionModel
DiT = host("diffusers.models.transformers.dit_transformer_2d").DiTTransformer2DModel
AutoencoderKL = host("diffusers.models.autoencoders.autoencoder_kl").AutoencoderKL


def unet():
    return UNet2DModel(
        in_channels=3, out_channels=3, block_out_channels=(8, 16), layers_per_block=1, attention_head_dim=8, norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def latent_unet(**options):
    return UNet2DConditionModel(
        in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, attention_head_dim=2, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12, **options,
    )  # fmt: skip


def dit():
    return DiT(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        num_layers=2,
        sample_size=16,
        patch_size=2,
        norm_num_groups=4,
    )


def text(height=16, width=24):
    return lambda: (torch.randn(1, 4, height, width), torch.tensor([3]), torch.randn(1, 5, 12))


def names(*places, end):
    return tuple(f"{place}.{end}" for place in places)


LORA = ("to_q", "to_v")
CASES = {
    "text to image": Case(
        latent_unet, text(),
        names("down_blocks.1.attentions.0", "up_blocks.0.attentions.0", "up_blocks.0.attentions.1", "mid_block.attentions.0", end="transformer_blocks.0.attn1"),
        None, 0, LORA,
    ),
    "U-Net": Case(
        unet, lambda: (torch.randn(1, 3, 16, 24), torch.tensor([3])),
        ("down_blocks.1.attentions.0", "up_blocks.0.attentions.0", "up_blocks.0.attentions.1", "mid_block.attentions.0"),
        None, 0, LORA, backend="inductor",  # the host itself fails with another
    ),
    "DiT": Case(
        dit, lambda: (torch.randn(1, 4, 16, 16), torch.tensor([3]), torch.tensor([7])),
        ("transformer_blocks.0.attn1", "transformer_blocks.1.attn1"), None, 0, LORA,
    ),
}  # fmt: skip


@every_check(CASES)
def test_contract(case, check):
    check(case)


def test_cross_attention_is_kept():
    report = swap(latent_unet(), CASES["text to image"])
    assert len(report.kept) == 4 and set(report.kept.values()) == {"it attends to another sequence"}
    assert all(name.endswith("attn2") for name in report.kept)


def test_each_level_and_each_image_has_its_grid():
    case = CASES["text to image"]
    model = made(case)
    swap(model, case, "kao_kv")
    for height, width in ((16, 24), (8, 16)):
        model(*text(height, width)())
        door = model.mid_block.attentions[0].transformer_blocks[0].attn1._tensorattn_door
        assert door.grid == (height // 2, width // 2)
    model = made(CASES["DiT"])
    swap(model, CASES["DiT"], "kao_kv")
    outputs(model, CASES["DiT"])
    assert model.transformer_blocks[0].attn1._tensorattn_door.grid == (8, 8)


def test_an_autoencoder():
    model = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=2).eval()
    x = torch.randn(1, 3, 8, 12)
    exact = model(x).sample
    report = ta.swap_attention(model, "flattened", verify=(x,))
    assert [layer.name for layer in report.layers] == [
        "encoder.mid_block.attentions.0",
        "decoder.mid_block.attentions.0",
    ]
    torch.testing.assert_close(model(x).sample, exact, rtol=1e-4, atol=1e-5)


def test_the_older_processor_and_its_scale():
    case = CASES["text to image"]
    module = host("diffusers.models.attention_processor")
    model = made(case)
    model.set_attn_processor(module.AttnProcessor())
    attn = model.mid_block.attentions[0].transformer_blocks[0].attn1
    attn.scale = 0.9
    exact = outputs(model, case)
    swap(model, case, "flattened", verify=case.inputs())
    torch.testing.assert_close(outputs(model, case), exact, rtol=1e-4, atol=1e-5)
    ta.restore_attention(model)
    assert type(attn.processor) is module.AttnProcessor


def test_refusals():
    case = CASES["text to image"]
    module = host("diffusers.models.attention_processor")
    model = made(case)
    model.set_attn_processor(module.SlicedAttnProcessor(1))
    with pytest.raises(AdapterError, match=r"attn1 \(Attention\) has a processor of its own, SlicedAttnProcessor"):
        swap(model, case)
    attn = module.Attention(16, heads=2, dim_head=8, added_kv_proj_dim=12)
    with pytest.raises(AdapterError, match=r"the model \(Attention\) attends to text and image together"):
        ta.swap_attention(attn)
    alone = module.Attention(16, heads=2, dim_head=8)
    with pytest.raises(AdapterError, match=r"the model \(Attention\) does not tell its grid"):
        ta.swap_attention(alone)
    ta.swap_attention(alone, "kao_kv", grid=(2, 3))
    x = torch.randn(1, 6, 16)
    for given in ({"attention_mask": torch.zeros(1, 1, 6)}, {"encoder_hidden_states": x}):
        with pytest.raises(AdapterError, match=f"was called with {next(iter(given))}, which has no meaning"):
            alone(x, **given)
    flux = host("diffusers.models.transformers.transformer_flux").FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    with pytest.raises(AdapterError, match=r"\(FluxAttention\) is attention that no adapter knows"):
        ta.swap_attention(flux, "clustered", grid=(2, 2))
