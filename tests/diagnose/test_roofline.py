"""The roofline of many processes; that what it counts is what is sent, `tests/test_sharding.py` says."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import tensorattn as ta
from tensorattn.diagnose.roofline import imagined_sharding
from tensorattn.diagnose.traffic import sent_by_others

RATES = {"bandwidth": 40e9, "flop_rate": 543e12, "memory_bandwidth": 3.35e12}  # of a device as there are many
VIDEO = (64, 1024, 1024)


def video(operator, world, **options):
    return ta.cost(operator, VIDEO, dim=1024, modes="t h w", dtype="bfloat16", world=world, **RATES, **options).roofline


@pytest.mark.parametrize("world", [64, 1024])
def test_sums_of_a_large_video_take_half_a_millisecond(world):
    rows, share = sum(VIDEO), 2 * (world - 1) / world
    found = video("kao_qkv", world)
    assert found.world == world and found.sent == (2, share * (4 * rows * 1024 + 24))  # in float32; and one to meet
    assert 0.42e-3 < found.communication_seconds < 0.44e-3
    assert 0.42e-3 < video("additive", world).communication_seconds < 0.44e-3


def test_full_attention_to_a_large_video_takes_minutes():
    own = math.prod(VIDEO) / 64
    seconds = video("flattened", 64).compute_seconds
    assert seconds == pytest.approx(4 * own * math.prod(VIDEO) * 1024 / 543e12, rel=0.01)  # 530 s
    ring = sent_by_others(1, VIDEO, 1024, 2, 64)["ring attention"].nbytes / 40e9
    assert ring == pytest.approx(6.8, rel=0.01)


def test_where_sending_takes_longer():
    # Queries and outputs of additive attention are maps of positions; all of kao_qkv is S rows, but reading and writing.
    assert [video(name, 64).crossing for name in ("additive", "kao_qkv")] == [4096, 512]
    slow = {**RATES, "bandwidth": 1e3}
    assert ta.cost("additive", (4, 6), dim=8, world=1, **slow).roofline.crossing == 2
    fast = {**RATES, "bandwidth": 1e20}
    assert ta.cost("additive", (4, 6), dim=8, world=1, **fast).roofline.crossing is None
    found = ta.cost("additive", (64, 64), dim=32, world=2, **RATES)
    before, at = (
        ta.cost("additive", (64, 64), dim=32, world=found.roofline.crossing // factor, **RATES).roofline
        for factor in (2, 1)
    )
    assert before.communication_seconds <= before.compute_seconds and at.communication_seconds > at.compute_seconds


def test_one_process_sends_nothing_and_costs_what_it_costs():
    alone, one = ta.cost("axial", (4, 6), dim=8), ta.cost("axial", (4, 6), dim=8, world=1, **RATES)
    assert alone.parts == one.parts and alone.roofline is None
    assert one.roofline.sent == (0, 0) and one.roofline.world == 1
    work = max(one.flops / 543e12, (one.read + one.written) / 3.35e12)
    assert one.roofline.compute_seconds == work


def test_it_is_printed():
    text = str(ta.cost("kao_kv", (8, 6), dim=8, modes="h w", world=4, training=True, **RATES))
    assert text.startswith(
        "cost of kao_kv: batch=1 h=8 w=6 C=8 heads=1, float32, channels last, 0.0 MB, one of 4 processes,"
    )
    *_, process, crossing = text.splitlines()
    assert process.startswith("one of 4 processes (h÷2 w÷2): computes ")
    assert process.endswith(" µs, sends 1,380 bytes in 3 calls for 0.0345 µs")  # 14 rows there and back, 24 bytes
    assert crossing == "sending takes longer than computing: from 2 processes on"
    assert str(ta.cost("kao_kv", (8, 6), dim=8, world=1, **RATES)).splitlines()[-2].startswith("one process: computes ")


@pytest.mark.parametrize("world", [2, 6, 12, 35, 64, 240])
def test_parts_are_as_even_as_can_be(world):
    sizes, sides = (31, 24, 64), (1, 8, 2)
    sharding = imagined_sharding(ta.ModeSpec.parse("t h w"), sizes, sides, world)
    assert math.prod(sharding.mesh.counts.values()) == world == sharding.mesh.size()
    for mode, split in sharding.splits.items():
        assert sum(split) == sizes[mode] and split[0] == max(split)
        assert max(split) - min(split) <= 2 * sides[mode] and all(length % sides[mode] == 0 for length in split[:-1])


def test_models_blocks_and_layers_share_out():
    config = ta.TensorTransformerConfig(modes="t h w", in_channels=3, patch=(1, 8, 8), embed_dim=16, num_heads=2)
    model, block = ta.TensorTransformer(config), ta.TensorTransformerBlock(8, 2, modes="h w", channels_first=True)
    assert ta.cost(model, torch.zeros(1, 6, 32, 32, 3), world=8, **RATES).roofline.cuts == {"t": 2, "h": 2, "w": 2}
    found = ta.cost(block, (1, 8, 5, 12), world=2, training=True, **RATES)
    assert found.roofline.cuts == {"w": 2} and found.roofline.sent.calls == 3
    assert found.flops < ta.cost(block, (1, 8, 5, 12), training=True).flops


def test_what_has_no_meaning_is_refused():
    for call, rule in (
        (lambda: ta.cost("kao_kv", (8, 6), dim=8, world=2), "world, bandwidth, flop_rate, memory_bandwidth go together, but bandwidth is missing."),
        (lambda: ta.cost("kao_kv", (8, 6), dim=8, bandwidth=1e9), "world, bandwidth, flop_rate, memory_bandwidth go together, but world is missing."),
        (lambda: ta.cost("kao_kv", (8, 6), dim=8, world=0, **RATES), "world must be at least 1, got 0."),
        (lambda: ta.cost("kao_kv", (8, 6), dim=8, world=2, **{**RATES, "flop_rate": 0.0}), "flop_rate must be positive and finite, got 0.0."),
        (lambda: ta.cost("kao_kv", (8, 6), dim=8, world=2, **{**RATES, "bandwidth": "fast"}), "bandwidth must be a number, got 'fast'."),
        (lambda: ta.cost("kao_kv", (8, 6), dim=8, world=11, **RATES), "world is 11, which does not divide a grid of 8×6 into so many parts."),
        (lambda: ta.cost("clustered", (8, 6), dim=8, additive_control=True, world=2, **RATES), "sharding has no meaning for operator 'clustered': additive_control needs the cells of all positions at once."),
        (lambda: ta.cost("kao_kv", 8, 6, dim=8), "an operator needs the sizes of its modes as one tuple (n_1, …, n_N), got 8, 6."),
        (lambda: ta.cost(ta.TensorTransformerBlock(8, 2, modes=2, mixer="mean"), (1, 8, 6, 8), world=2, **RATES), "sharding has no meaning for MeanMixer, which is no attention."),
        (lambda: ta.cost(nn.Linear(8, 8), (8, 8), world=2, **RATES), "world has no meaning for Linear: it takes no sharding."),
        (lambda: ta.cost(ta.TensorAttention(8, 2, modes="h w"), (1, 5, 8), world=2, **RATES), "world needs one input of order 2, got TensorAttention of 1×5×8."),
    ):  # fmt: skip
        with pytest.raises(ta.TensorAttentionError) as caught:
            call()
        assert caught.value.rule == rule
