"""The cost of a call from sizes alone, and the measure of one that computes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import tensorattn as ta
from tensorattn.cli.plain import PlainLayer
from tensorattn.diagnose.cost import DTYPES, PeakMemory, count, count_calls, measure

B, H, L, S, D = 2, 3, 10, 7, 4


def part(cost: ta.Cost, name: str, phase: str = "forward") -> tuple[int, int, int, int]:
    """FLOPs, bytes read, bytes written and calls of one kind of work."""
    (found,) = (each for each in cost.parts if (each.name, each.phase) == (name, phase))
    return found.flops, found.read, found.written, found.calls


# ---- operations and traffic ----------------------------------------------------------------------------------


BY_HAND: dict[str, tuple[Callable[..., Any], str, tuple[int, int, int, int]]] = {
    "one matrix": (lambda x: x @ x.new_empty(4, 6), "linear maps", (2 * 5 * 3 * 4 * 6, 4 * (60 + 24), 4 * 90, 1)),
    "stacks of matrices": (lambda x: x @ x.mT, "attention", (2 * 5 * 3 * 4 * 3, 4 * 2 * 60, 4 * 45, 1)),
    "a softmax": (lambda x: x.softmax(-1), "softmax", (5 * 60, 4 * 60, 4 * 60, 1)),
    "a mean reads": (lambda x: x.mean((0, 1)), "sums", (60, 4 * 60, 4 * 4, 1)),
    "a vector is multiplied": (lambda x: x[0] @ x.new_empty(4), "sums", (2 * 12, 4 * (12 + 4), 4 * 3, 1)),
    "a broadcast sum writes": (lambda x: x[:, :1] + x[:1], "elementwise", (60, 4 * (20 + 12), 4 * 60, 1)),
    "what is expanded is read once": (lambda x: x[:1].expand(5, 3, 4).exp(), "elementwise", (60, 4 * 12, 4 * 60, 1)),
    "a copy computes nothing": (lambda x: x.mT.contiguous(), "moves", (0, 4 * 60, 4 * 60, 1)),
    "what is overwritten is not read": (
        lambda x: torch.empty(5, 3, 4, device="meta").copy_(x[:1]),
        "moves",
        (0, 48, 240, 1),
    ),
    "views cost nothing": (lambda x: x.mT.flatten(0, 1)[:1].detach().exp(), "moves", (0, 240, 240, 1)),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_work_is_counted_as_by_hand(name: str) -> None:
    call, kind, expected = BY_HAND[name]
    for inside in (torch.no_grad, torch.inference_mode):  # where operators arrive in parts, and whole
        found = ta.cost(inside()(call), (5, 3, 4))
        assert part(found, kind) == expected


@pytest.mark.parametrize("training", [False, True])
def test_fused_attention_is_counted_without_logits_in_memory(training: bool) -> None:
    shapes = (B, H, L, D), (B, H, S, D), (B, H, S, D)
    fused = ta.cost(F.scaled_dot_product_attention, *shapes, training=training)
    plain = ta.cost(F.scaled_dot_product_attention, *shapes, training=training, dropout_p=0.5)
    product, logits = 2 * B * H * L * S * D, B * H * L * S
    assert part(fused, "attention")[0] == part(plain, "attention")[0] == 2 * product
    assert part(fused, "softmax")[0] == part(plain, "softmax")[0] == 5 * logits
    results = 4 * B * H * (L * D + training * (L + 2 * S) * D)
    assert fused.results == plain.results == results
    assert fused.peak < results + 4 * logits < plain.peak
    if training:  # the logits are computed again
        assert (part(fused, "attention", "backward")[0], part(plain, "attention", "backward")[0]) == (
            5 * product,
            4 * product,
        )
        assert part(fused, "softmax", "backward")[0] == 5 * logits


@pytest.mark.parametrize("name", ta.OPERATORS)
def test_products_are_those_that_pytorch_counts(name: str) -> None:
    layer = ta.TensorAttention(12, 3, modes=3, operator=name, device="meta")
    x = torch.empty(2, 4, 5, 3, 12, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        layer(x)
    found = ta.cost(layer, x)
    assert found.product_flops == counter.get_total_flops() > 0
    assert found.attention_flops < found.flops


def test_a_call_costs_what_the_table_of_operators_says() -> None:
    """4SD a query for the products of `kao_kv`, and the maps of queries, outputs, keys and values."""
    sizes, dim = (20, 24, 28), 32
    positions, averages = math.prod(sizes), sum(sizes)
    found = ta.cost("kao_kv", sizes, dim=dim, num_heads=2)
    assert part(found, "attention")[0] == 4 * positions * averages * dim
    assert found.product_flops == (4 * positions * averages + 4 * (positions + averages) * dim) * dim
    assert found.attention_flops == 4 * positions * averages * dim + 5 * 2 * positions * averages


def test_masks_causality_and_operators_of_your_own_are_counted() -> None:
    layer, shape = ta.TensorAttention(8, 2, modes="t h"), (2, 5, 6, 8)
    plain = ta.cost(layer, shape).flops
    assert ta.cost(layer, shape, mask=torch.ones(5, 6, dtype=torch.bool)).flops > plain
    assert ta.cost(layer, shape, lengths={"t": 3}).flops > plain  # a number, which lies on no device
    assert ta.cost(layer, shape, weights=[torch.ones(5), None]).flops > plain
    assert ta.cost(layer, shape, (2, 9, 6, 8)).flops != plain  # a context
    assert ta.cost("additive", (5, 6), dim=8, batch=2, num_heads=2, modes="t h", causal="t").flops != plain
    assert (
        ta.cost(lambda x: ta.kao_kv(x, x, x, order=2).exp(), shape).flops
        > ta.cost(lambda x: ta.kao_kv(x, x, x, order=2), shape).flops
    )


def test_two_ways_to_the_same_cost() -> None:
    layer = ta.TensorAttention(8, 2, modes="h w", channels_first=True)
    for training in (False, True):
        by_name = ta.cost("additive", (5, 6), dim=8, batch=2, num_heads=2, layout="channels_first", training=training)
        by_layer = ta.cost(layer, torch.randn(2, 8, 5, 6, requires_grad=training), training=training)
        assert (by_name.parts, by_name.peak, by_name.results) == (by_layer.parts, by_layer.peak, by_layer.results)


def test_kept_modes_go_by_their_names() -> None:
    by_name = ta.cost("truncated", (3, 4), dim=4, modes="h w", kept=[("h",), ("w",)])
    assert by_name.flops == ta.cost("truncated", (3, 4), dim=4, kept=[(0,), (1,)]).flops


# ---- memory --------------------------------------------------------------------------------------------------


def test_what_lives_at_once() -> None:
    """Of three functions in a row two results live at a time; in training all that is kept."""

    def chain(x: Tensor) -> Tensor:
        return (x + 1).exp().sin()

    forward, training = ta.cost(chain, (1000,)), ta.cost(chain, (1000,), training=True)
    assert (forward.peak, forward.results, forward.extra) == (8000, 4000, 4000)
    # the output, that of exp, its own gradient, and the cosine that multiplies it; x has the last gradient
    assert (training.peak, training.results) == (16000, 8000)


def test_what_the_caller_holds_does_not_count() -> None:
    weight = torch.randn(1000, 1000)
    assert ta.cost(lambda x: x, (1000,)).peak == ta.cost(lambda x: x.view(10, 100)[0], (1000,)).results == 0
    assert ta.cost(F.linear, (1, 1000), weight).peak == 4000
    assert ta.cost(F.linear, (1, 1000), weight, training=True).results == 8000  # the weight requires no gradient
    assert ta.cost(F.linear, (1, 1000), weight.requires_grad_(), training=True).results == 4_008_000


class Attends(nn.Module):
    """Attention and a wide map, which may be run again for the backward pass."""

    def __init__(self, checkpoint: bool) -> None:
        super().__init__()
        self.wide, self.back, self.checkpoint = nn.Linear(16, 64), nn.Linear(64, 16), checkpoint

    def _run(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*(self.back(self.wide(x).exp()).unsqueeze(1),) * 3).squeeze(1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self._run, x, use_reentrant=False) if self.checkpoint else self._run(x)


def test_checkpoints_hold_less_and_compute_more() -> None:
    kept, again = (
        ta.cost(nn.Sequential(*(Attends(checkpoint) for _ in range(6))), (2, 256, 16), training=True)
        for checkpoint in (False, True)
    )
    assert again.peak < 0.5 * kept.peak and again.flops > 1.2 * kept.flops and again.results == kept.results
    block = ta.TensorTransformerBlock(16, 2, modes="h w", checkpoint=True)
    assert ta.cost(block, (2, 8, 8, 16), training=True).flops > ta.cost(block, (2, 8, 8, 16)).flops


def test_a_module_stays_as_it_is() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    found = ta.cost(module, (2, 3, 8, 8), training=True, dtype="float32")
    assert found.results == 4 * (2 * 4 * 36 + 2 * 3 * 64 + 4 * 27 + 4 + 4 + 4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert module.training and all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.parametrize("dtype", DTYPES)
def test_types_are_those_of_the_parameters_or_those_asked_for(dtype: str) -> None:
    size = DTYPES[dtype].itemsize
    assert ta.cost(nn.Linear(4, 4, dtype=DTYPES[dtype]), (3, 4)).results == 12 * size
    assert ta.cost(torch.exp, (3, 4), dtype=dtype).results == 12 * size
    assert ta.cost("kao_kv", (3,), dim=4, dtype=dtype).results == 12 * size


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["kao_kv", "additive", "axial"])
def test_the_peak_is_that_of_a_call_that_computes(name: str, training: bool) -> None:
    layer = PlainLayer(ta.TensorAttention(16, 4, modes=3, operator=name))
    x, gradient = (torch.randn(2, 5, 6, 7, 16, requires_grad=training) for _ in range(2))

    def call() -> Tensor:
        with torch.set_grad_enabled(training):
            y = layer(x)
        if training:
            y.backward(gradient)
        return y

    found, expected = ta.cost(layer, x, training=training), count(call)
    assert (found.parts, found.peak, found.results) == (expected.parts, expected.peak, expected.results)


@pytest.mark.thorough
@pytest.mark.parametrize("training", [False, True])
def test_the_peak_is_close_to_what_the_system_tells(training: bool) -> None:
    """Of blocks so large that the heap maps each by itself."""
    layer = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    x, gradient = torch.randn(160_000, 64, requires_grad=training), torch.randn(160_000, 64)
    peaks = []
    for _ in range(4):  # what the heap held before only adds to it
        x.grad = None
        layer.zero_grad()
        with torch.set_grad_enabled(training), PeakMemory() as memory:
            y = layer(x)
            if training:
                y.backward(gradient)
        del y
        if memory.bytes is None:
            pytest.skip("this system does not tell")
        peaks.append(memory.bytes)
    assert ta.cost(layer, x, training=training).peak == pytest.approx(min(peaks), rel=0.1)


# ---- what is printed, and what is refused --------------------------------------------------------------------


def test_a_cost_prints_itself() -> None:
    cost = ta.cost(nn.Linear(64, 8), (2, 100, 64), dtype="float32")
    assert str(cost).splitlines() == [
        "cost of Linear of 2×100×64",
        "                           FLOPs   bytes read   bytes written   kernel calls",
        "  linear maps, forward   204,800       53,280           6,400              1",
        "  total                  204,800       53,280           6,400              1",
        "peak memory: 0.0 MB beyond what is given, 0.0 MB of it the results and 0.0 MB extra",
    ]
    assert cost == ta.cost(nn.Linear(64, 8), [2, 100, 64]) and len({cost, cost}) == 1
    assert (cost.flops, cost.read, cost.written, cost.calls) == (204_800, 53_280, 6400, 1)


def test_titles() -> None:
    named = ta.cost("kao_qkv", (8, 4), dim=8, batch=2, num_heads=2, modes="h w", centered=True, dtype="bfloat16")
    assert named.title == "kao_qkv, centered=True: batch=2 h=8 w=4 C=8 heads=2, bfloat16, channels last, 0.0 MB"
    functional = ta.cost(functools.partial(ta.kao_kv, order=1), (7, 4), (5, 4), (5, 4), training=True)
    assert functional.title == "kao_kv of 7×4, 5×4, 5×4, training"


REFUSED: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
    (("kao_kv", (3,)), {"centered": True}, "operator 'kao_kv' has no option 'centered'; its options are: none."),
    (("kao_kv", ()), {}, "the number of sizes must be at least 1, got 0."),
    (("kao_kv", (3, 0)), {}, "every size must be a whole number of at least 1, got 0."),
    (("kao_kv", (3, 2.0)), {}, "every size must be a whole number of at least 1, got 2.0."),
    (("kao_kv", (3,)), {"batch": 0}, "batch must be a whole number of at least 1, got 0."),
    (("kao_kv", (3,)), {"dim": None}, "dim must be a whole number of at least 1, got None."),
    (("kao_kv", (3,)), {"num_heads": 3}, "dim must be divisible by num_heads, got 4 and 3."),
    (("kao_kv", (3,)), {"dtype": "int8"}, "dtype must be one of float64, float32, bfloat16, float16, got 'int8'."),
    (("kao_kv", (3,)), {"layout": "nhwc"}, "layout must be one of channels_last, channels_first, got 'nhwc'."),
    (("kao_kv", (3,)), {"modes": "h w"}, "modes names 2 modes, but sizes has 1."),
]


@pytest.mark.parametrize(("given", "options", "message"), REFUSED, ids=lambda part: str(part)[:40])
def test_what_has_no_cost_is_refused(given: tuple[Any, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ta.TensorAttentionError) as refused:
        ta.cost(*given, **{"dim": 4, **options})
    assert str(refused.value) == f"cost: {message}"


def test_training_needs_a_gradient() -> None:
    with pytest.raises(ta.OptionError) as refused:
        ta.cost(torch.exp, torch.ones(3), training=True)
    assert str(refused.value) == "cost: training=True has no meaning: nothing that is returned has a gradient."


def test_attention_elsewhere_stays_as_it_is() -> None:
    x = torch.empty(1, 2, 3, 4, device="meta")
    before = count_calls(lambda: F.scaled_dot_product_attention(x, x, x))
    ta.cost(F.scaled_dot_product_attention, x, x, x)
    assert count_calls(lambda: F.scaled_dot_product_attention(x, x, x)) == before > 1


# ---- what is measured ----------------------------------------------------------------------------------------


def test_calls_are_neither_views_nor_detach_nor_empty() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    assert count_calls(lambda: x.T[1:].reshape(3, 3).detach().flatten()) == 1  # reshape copies
    assert count_calls(lambda: torch.empty_like(x).new_empty(3).view(3)) == 0
    assert count_calls(lambda: F.linear(x.detach(), x.detach()).add_(1)) == 2
    forward = count_calls(lambda: x.exp().sum())
    assert forward == 2 and count_calls(lambda: x.exp().sum().backward()) == 4  # ones, and a product


def test_calls_are_those_of_the_cost() -> None:
    layer, x = ta.TensorAttention(8, 2, modes="h w", operator="kronecker_product"), torch.randn(2, 4, 5, 8)
    assert count_calls(lambda: layer(x)) == ta.cost(layer, x).calls > 10


def test_a_call_is_measured() -> None:
    done = []

    def call() -> Tensor:
        done.append(torch.get_num_threads())
        return torch.ones(2_000_000)

    before = torch.get_num_threads()
    result, spent = measure(call)
    assert result.sum() == 2_000_000 and 0 < spent.seconds < 1
    assert len(done) > 2 and set(done) == {1} and torch.get_num_threads() == before
    assert spent.peak_bytes is None or spent.peak_bytes == pytest.approx(8e6, abs=4e6)  # as the system sees it


def test_threads_are_those_before_when_a_call_fails() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        measure(lambda: 1 / 0)
    assert torch.get_num_threads() == before
