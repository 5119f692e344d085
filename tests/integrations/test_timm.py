"""The doors of timm: class and register tokens, gates and norms, rotary embeddings, images of any size."""

from __future__ import annotations

import pytest
import torch
from contract import Case, every_check, host, made, outputs, swap

import tensorattn as ta
from tensorattn.errors import AdapterError
from tensorattn.integrations.doors import own_door

pytestmark = pytest.mark.filterwarnings("ignore")
timm = host("timm")
host("timm.models.vision_transformer_relpos")

TINY = {"embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
LAYERS = ("blocks.0.attn", "blocks.1.attn")


def vit(name="vit_tiny_patch16_224", **options):
    return lambda: timm.create_model(name, pretrained=False, **{"img_size": 64, **TINY, **options})


def eva(**options):
    settings = {"img_size": 64, "patch_size": 16, "use_rot_pos_emb": True, **TINY, **options}
    return lambda: timm.models.eva.Eva(**settings)


def images(height=64, width=64):
    return lambda: (torch.randn(2, 3, height, width),)


LORA = ("qkv", "proj")
CASES = {
    "class token": Case(vit(), images(), LAYERS, (4, 4), 1, LORA),
    "registers": Case(
        vit("vit_small_patch14_reg4_dinov2", img_size=56, patch_size=14), images(56, 56), LAYERS, (4, 4), 5, LORA
    ),
    "no prefix, norms": Case(
        vit(class_token=False, global_pool="avg", qk_norm=True, scale_attn_norm=True), images(), LAYERS, (4, 4), 0, LORA
    ),
    "any size": Case(vit(dynamic_img_size=True), images(64, 96), LAYERS, None, 1, LORA),
    "oblong": Case(vit(img_size=(64, 96)), images(64, 96), LAYERS, (4, 6), 1, LORA),
}
ROTARY = {
    "eva": Case(eva(), images(), LAYERS, (4, 4), 1, LORA),
    "registers, one map each": Case(
        eva(num_reg_tokens=4, qkv_fused=False), images(), LAYERS, (4, 4), 5, ("q_proj", "v_proj")
    ),
    "rope attention": Case(eva(attn_type="rope", scale_attn_inner=True), images(), LAYERS, (4, 4), 1, LORA),
}


@every_check(CASES)
def test_contract(case, check):
    check(case)


@pytest.mark.parametrize("name", ROTARY)
def test_rotary_embeddings(name):
    case = ROTARY[name]
    model = made(case)
    with torch.no_grad():
        exact = outputs(model, case)
        report = swap(model, case, verify=case.inputs())
        assert [(layer.grid, layer.prefix, layer.parity < 1e-5) for layer in report.layers] == [
            ((4, 4), case.prefix, True)
        ] * 2
        ta.restore_attention(model)
        swap(model, case, tokens=16)
        torch.testing.assert_close(outputs(model, case), exact, rtol=1e-4, atol=1e-5)
        ta.restore_attention(model)
    with pytest.raises(AdapterError) as error:
        swap(model, case, "kao_kv")
    kind = type(model.blocks[0].attn).__name__
    assert str(error.value) == (
        f"swap_attention: blocks.0.attn ({kind}) turns keys by their places (rotary), and operator 'kao_kv' averages "
        "keys of different turns."
    )


def test_any_size_is_told_in_each_call():
    case = CASES["any size"]
    model, plain = made(case), made(case)
    swap(model, case, "flattened")
    for height, width in ((64, 96), (32, 32), (96, 48)):
        x = torch.randn(1, 3, height, width)
        torch.testing.assert_close(model(x), plain(x))
        assert own_door(model.blocks[0].attn).grid == (height // 16, width // 16)


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: timm.create_model("swin_tiny_patch4_window7_224", pretrained=False, img_size=56, depths=(1, 1), embed_dim=8, num_heads=(1, 2)),
            "layers.0.blocks.0.attn (WindowAttention) attends within windows.",
        ),
        (
            lambda: timm.create_model("beit_base_patch16_224", pretrained=False, **TINY),
            "blocks.0.attn (Attention) adds relative positions to the logits.",
        ),
        (
            lambda: timm.create_model("vit_relpos_small_patch16_224", pretrained=False, **TINY),
            "blocks.0.attn (RelPosAttention) adds relative positions to the logits.",
        ),
        (
            lambda: timm.create_model("samvit_base_patch16", pretrained=False, img_size=64, **TINY),
            "blocks.0.attn (Attention) adds decomposed relative positions to the logits.",
        ),
        (vit(patch_drop_rate=0.5), "blocks.0.attn (Attention) sees only some of the patches in training (patch_drop_rate)."),
        (
            lambda: timm.create_model("xcit_nano_12_p16_224", pretrained=False, depth=1, cls_attn_layers=1),
            "cls_attn_blocks.0.attn (ClassAttn) is attention that no adapter knows.",
        ),
    ],
    ids=["windows", "relative", "relpos", "decomposed", "patch drop", "unknown"],
)  # fmt: skip
def test_refusals(make, message):
    model = make()
    kinds = [type(each) for each in model.modules()]
    with pytest.raises(AdapterError) as error:
        ta.swap_attention(model, "kao_kv")
    assert str(error.value) == f"swap_attention: {message}\n  Leave it out by layers=, or keep the model."
    assert [type(each) for each in model.modules()] == kinds


def test_masks_of_a_call_are_refused():
    model = made(CASES["class token"])
    swap(model, CASES["class token"])
    with pytest.raises(AdapterError, match=r"blocks\.0\.attn was called with attn_mask, which has no meaning"):
        model.blocks[0].attn(torch.randn(1, 17, 24), attn_mask=torch.zeros(17, 17))
    with pytest.raises(
        AdapterError,
        match=r"in blocks.0.attn, grid \(4, 4\) has 16 positions, but query has 4 tokens behind a prefix of 1",
    ):
        model.blocks[0].attn(torch.randn(1, 5, 24))


def test_the_report_tells_what_sees_the_prefix():
    model = vit()()
    for operator, seen in (("axial", "1 apart"), ("kao_kv", "1 seen"), ("flattened", "1 seen")):
        with ta.swapped(model, operator) as report:
            assert [seen in line for line in str(report).splitlines()[2:]] == [True, True]


def test_late_layers_alone():
    model = vit(depth=3)()
    report = ta.swap_attention(model, tokens=8, layers=lambda name, _: {} if name > "blocks.1" else None)
    assert [layer.name for layer in report.layers] == ["blocks.1.attn", "blocks.2.attn"]
    assert dict(report.kept) == {"blocks.0.attn": "layers leaves it out"}
