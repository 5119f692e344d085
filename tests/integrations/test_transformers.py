"""The doors of transformers: video and vision transformers through its interface for attention, TimeSformer beside it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from contract import Case, every_check, host, made, outputs, swap

import tensorattn as ta
from tensorattn.errors import AdapterError

pytestmark = pytest.mark.filterwarnings("ignore")
transformers = host("transformers")
if not hasattr(transformers, "AttentionInterface"):
    pytest.skip("needs transformers 5", allow_module_level=True)

TINY = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 32}


def model(name, implementation="sdpa", kind="Model", **options):
    def make():
        config = getattr(transformers, f"{name}Config")(**{**TINY, "patch_size": 8, **options})
        config._attn_implementation = implementation
        return getattr(transformers, f"{name}{kind}")(config)

    return make


def video(frames, size=32):
    return lambda: {"pixel_values": torch.randn(1, frames, 3, size, size)}


def image(size=32):
    return lambda: {"pixel_values": torch.randn(2, 3, size, size)}


def names(pattern):
    return tuple(pattern.format(place) for place in range(2))


CASES = {
    "VideoMAE": Case(
        model("VideoMAE", num_frames=6, tubelet_size=2, kind="ForVideoClassification"),
        video(6), names("videomae.encoder.layer.{}.attention.attention"), (3, 4, 4), 0, ("query", "value"),
    ),
    "ViViT": Case(
        model("Vivit", num_frames=4, tubelet_size=[2, 8, 16], attention_probs_dropout_prob=0.1),
        video(4), names("layers.{}.attention"), (2, 4, 2), 1, ("q_proj", "v_proj"),
    ),
    "DINOv2, registers": Case(
        model("Dinov2WithRegisters", num_register_tokens=3), image(), names("encoder.layer.{}.attention"), (4, 4), 4, ("q_proj", "v_proj"),
    ),
    "DINOv2, eager": Case(model("Dinov2", "eager"), image(), names("encoder.layer.{}.attention"), (4, 4), 1, ("q_proj", "v_proj")),
    "ViT": Case(model("ViT"), image(), names("layers.{}.attention"), (4, 4), 1, ("q_proj", "v_proj")),
    "DeiT": Case(model("DeiT"), image(), names("layers.{}.attention"), (4, 4), 2, ("q_proj", "v_proj")),
    "CLIP": Case(model("CLIPVision"), image(), names("encoder.layers.{}.self_attn"), (4, 4), 1, ("q_proj", "v_proj")),
    "SigLIP": Case(model("SiglipVision"), image(), names("encoder.layers.{}.self_attn"), (4, 4), 0, ("q_proj", "v_proj")),
    "TimeSformer, joint": Case(
        model("Timesformer", "eager", num_frames=3, attention_type="joint_space_time"),
        video(3), names("encoder.layer.{}.attention.attention"), (4, 4, 3), 1, ("qkv",),
    ),
}  # fmt: skip


def test_names_of_layers():
    for case in CASES.values():
        found = [layer.name for layer in swap(made(case), case).layers]
        assert found == list(case.layers)


@every_check(CASES)
def test_contract(case, check):
    check(case)


def test_tokens_lie_as_the_adapter_says():
    """Where the positions of one mode alone differ, so do the averages of that mode alone."""
    for name, mode, moved in (("VideoMAE", 0, (0, 1)), ("TimeSformer, joint", 2, (0, 1)), ("ViViT", 0, (0, 1))):
        case = CASES[name]
        net, seen = made(case), []
        swap(net, case, "kao_kv")
        door = net.get_submodule(case.layers[0])._tensorattn_door
        door.probe = lambda q, k, v, seen=seen, **asked: seen.append(k) or F.scaled_dot_product_attention(q, k, v)
        clip = case.inputs()["pixel_values"]
        other = clip.clone()
        other[:, moved[0] * clip.shape[1] // 3 : clip.shape[1] // 3] += 1.0  # the first frames, or the first tubelet
        with torch.no_grad():
            for each in (clip, other):
                net(pixel_values=each)
        change = (seen[1] - seen[0])[:, :, case.prefix :].abs().sum((0, 1, 3)).unflatten(0, case.grid)
        places = change.sum([k for k in range(3) if k != mode])
        assert places[0] > 0 and places[-1] < 1e-3 * places[0], name


def test_layers_that_are_left_out_keep_full_attention():
    case = CASES["DINOv2, eager"]
    net = made(case)
    with torch.no_grad():
        exact = outputs(net, case)
        report = swap(net, case, layers=lambda name, _: {} if ".1." in name else None, verify=case.inputs())
        assert [layer.name for layer in report.layers] == ["encoder.layer.1.attention"]
        assert net.config._attn_implementation == "tensorattn"
        x = torch.randn(1, 17, 24)
        kept = net.encoder.layer[0].attention(x)[0]
        ta.restore_attention(net)
        assert net.config._attn_implementation == "eager"
        torch.testing.assert_close(kept, net.encoder.layer[0].attention(x)[0])
        torch.testing.assert_close(outputs(net, case), exact)


def test_rotary_embeddings_and_registers():
    case = Case(model("DINOv3ViT", num_register_tokens=2), image(), (), (4, 4), 3, ())
    net = made(case)
    with torch.no_grad():
        exact = outputs(net, case)
        report = swap(net, case, verify=case.inputs())
        assert [(layer.grid, layer.prefix, layer.parity < 1e-5) for layer in report.layers] == [((4, 4), 3, True)] * 2
        ta.restore_attention(net)
        swap(net, case, tokens=16)
        torch.testing.assert_close(outputs(net, case), exact, rtol=1e-4, atol=1e-5)
        ta.restore_attention(net)
    with pytest.raises(
        AdapterError, match=r"turns keys by their places \(rotary\), and operator 'additive' averages keys"
    ):
        swap(net, case, "additive")


def test_of_two_towers_the_one_is_left_out():
    small = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.CLIPConfig(
        text_config={**small, "vocab_size": 9},
        vision_config={**small, "image_size": 32, "patch_size": 8},
        projection_dim=4,
    )
    net = transformers.CLIPModel(config).eval()
    inputs = {"input_ids": torch.tensor([[1, 2, 3]]), "pixel_values": torch.randn(1, 3, 32, 32)}
    with pytest.raises(AdapterError, match=r"text_model.*self_attn \(CLIPAttention\) belongs to 'clip_text_model'"):
        ta.swap_attention(net)
    with torch.no_grad():
        exact = net(**inputs)
        report = ta.swap_attention(
            net, "flattened", layers=lambda name, _: {} if "vision" in name else None, verify=inputs
        )
        assert [layer.name for layer in report.layers] == ["vision_model.encoder.layers.0.self_attn"]
        torch.testing.assert_close(net(**inputs).logits_per_image, exact.logits_per_image)


def test_saving_a_swapped_model_saves_a_plain_one(tmp_path):
    case = CASES["DINOv2, registers"]
    net = made(case)
    with torch.no_grad():
        exact = outputs(net, case)
        swap(net, case)
        net.save_pretrained(tmp_path)
        loaded = transformers.Dinov2WithRegistersModel.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(outputs(loaded, case), exact)
        assert loaded.config._attn_implementation != "tensorattn"
        report = ta.swap_attention(loaded, "flattened")
        torch.testing.assert_close(outputs(loaded, case), exact)
        assert report.layers[0].prefix == 4


def test_a_mask_of_keys_is_one():
    case = CASES["ViT"]
    net, x = made(case), torch.randn(1, 17, 24)
    attention, mask = net.layers[0].attention, torch.ones(1, 1, 1, 17, dtype=torch.bool)
    mask[..., 3:6] = False
    exact = attention(x, attention_mask=mask)[0]
    swap(net, case, "flattened")
    torch.testing.assert_close(attention(x, attention_mask=mask)[0], exact)
    with pytest.raises(AdapterError, match=r"called with an attention_mask of shape \(1, 1, 17, 17\), which is P×P"):
        attention(x, attention_mask=mask.expand(1, 1, 17, 17))
    with pytest.raises(
        AdapterError, match=r"layers\.0\.attention was called with output_attentions, which has no meaning"
    ):
        attention(x, output_attentions=True)
    with pytest.raises(AdapterError, match=r"grid \(4, 4\) has 16 positions, but query has 4 tokens"):
        net(torch.randn(1, 3, 16, 16), interpolate_pos_encoding=True)


@pytest.mark.parametrize(
    "make, message",
    [
        (
            model("VideoMAE", num_frames=4, kind="ForPreTraining", decoder_hidden_size=24, decoder_num_hidden_layers=1, decoder_num_attention_heads=2),
            "videomae.encoder.layer.0.attention.attention (VideoMAESelfAttention) sees only some positions of the grid in pre-training.",
        ),
        (
            model("Timesformer", "eager", num_frames=2),
            "encoder.layer.0.attention.attention (TimesformerSelfAttention) does not attend over space and time together, but has 'divided_space_time'.",
        ),
        (
            model("Dinov2", "eager", output_attentions=True),
            "encoder.layer.0.attention (Dinov2Attention) is asked for its weights (output_attentions).",
        ),
        (
            lambda: transformers.GPT2Model(transformers.GPT2Config(n_embd=24, n_layer=1, n_head=2, vocab_size=9)),
            "h.0.attn (GPT2Attention) belongs to 'gpt2', which no adapter knows.",
        ),
        (
            lambda: transformers.SwinModel(transformers.SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1], num_heads=[2], window_size=4)),
            "encoder.layers.0 (SwinStage) belongs to 'swin', which no adapter knows.",
        ),
    ],
    ids=["pretraining", "divided", "weights", "causal", "windows"],
)  # fmt: skip
def test_refusals(make, message):
    net = make()
    before = [(type(each), sorted(vars(each))) for each in net.modules()]
    with pytest.raises(AdapterError) as error:
        ta.swap_attention(net, "kao_kv")
    assert str(error.value) == f"swap_attention: {message}\n  Leave it out by layers=, or keep the model."
    assert [(type(each), sorted(vars(each))) for each in net.modules()] == before
    assert net.config._attn_implementation != "tensorattn"


def test_the_dropout_of_the_host():
    net = made(CASES["ViViT"], train=True)
    with pytest.raises(
        AdapterError, match=r"layers.0.attention \(VivitAttention\) drops attention weights with probability 0.1"
    ):
        ta.swap_attention(net)
    ta.swap_attention(net, "kao_kv")
    clip = torch.randn(1, 4, 3, 32, 32)
    net.config.hidden_dropout_prob = 0.0
    assert not torch.equal(net(clip)[0], net(clip)[0])
    assert torch.equal(net.eval()(clip)[0], net(clip)[0])
