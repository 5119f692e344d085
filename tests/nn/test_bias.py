"""Biases by position: what each matrix holds, and that sums over modes stay exact where keys are additive."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from modules import MISSING, by_way_of_meta, draw, refused

import tensorattn as ta
from tensorattn.errors import ModesError, OptionError, ShapeError

CLOSE = {"rtol": 1e-11, "atol": 1e-12}
SIZES = (4, 3, 5)


def relative(**changed):
    return ta.RelativePositionBias(2, **{"modes": "t h w", "max_distance": 2, "dtype": torch.float64, **changed})


def alibi(**changed):
    return ta.AlibiBias(2, **{"modes": "t h w", **changed}).double()


def window(**changed):
    return ta.AxisWindow(**{"modes": "t h w", "window": 1, **changed}).double()


BIASES = {"relative": relative, "alibi": alibi, "window": window}


class TestMatrices:
    def test_relative(self):
        bias = relative(max_distance={"t": 2, "w": 9})
        frames, rows, columns = bias(SIZES)
        assert rows is None
        for part, table, largest in ((frames, bias.tables[0], 2), (columns, bias.tables[2], 9)):
            for i in range(part.shape[1]):
                for j in range(part.shape[2]):
                    distance = max(-largest, min(largest, j - i))
                    assert torch.equal(part[:, i, j], table[:, distance + largest])

    @pytest.mark.parametrize("slopes", [None, [3.0, 0.5]])
    def test_alibi(self, slopes):
        parts = alibi(spacing=(2.0, None, 1.0), slopes=slopes)(SIZES)
        assert parts[1] is None
        for part, spacing in ((parts[0], 2.0), (parts[2], 1.0)):
            for head, slope in enumerate(slopes or [2**-4, 2**-8]):
                for i in range(part.shape[1]):
                    for j in range(part.shape[2]):
                        assert part[head, i, j] == -slope * spacing * abs(i - j)

    @pytest.mark.parametrize("width", [0, 1, 9])
    def test_window(self, width):
        for part, size in zip(window(window=width)(SIZES), SIZES, strict=True):
            seen = [[abs(i - j) <= width for j in range(size)] for i in range(size)]
            assert torch.equal(part[0] == 0, torch.tensor(seen))
            assert torch.equal(part[0] == -math.inf, ~torch.tensor(seen))

    @pytest.mark.parametrize("name", BIASES)
    def test_any_sizes_by_one_module(self, name):
        bias = BIASES[name]()
        larger, smaller = bias((6, 6, 7)), bias((3, 2, 4))
        for part, corner in zip(larger, smaller, strict=True):
            assert torch.equal(part[:, : corner.shape[1], : corner.shape[2]], corner)


@pytest.mark.parametrize("name", BIASES)
@pytest.mark.parametrize("operator", ["additive", "truncated"])
def test_exact_on_additive_keys_and_values(operator, name):
    x = ta.outer_sum([draw(2, 1, n, 4, seed=mode) for mode, n in enumerate(SIZES)])
    q = draw(2, 2, *SIZES, 4, seed=7)
    k, v = x.expand(2, 2, *SIZES, 4), 2 * x.expand(2, 2, *SIZES, 4)
    bias = BIASES[name]()(SIZES)
    ours = ta.OPERATORS[operator].function(q, k, v, order=3, bias=bias, return_lse=True)
    exact = ta.flattened_attention(q, k, v, order=3, bias=bias, return_lse=True)
    torch.testing.assert_close(ours.output, exact.output, **CLOSE)
    torch.testing.assert_close(ours.lse, exact.lse, **CLOSE)


def test_the_bias_of_full_attention_is_the_sum_over_modes():
    q, bias = draw(2, 2, *SIZES, 4), relative()(SIZES)
    logits = q.flatten(2, 4) @ q.flatten(2, 4).mT / 2
    grids = torch.cartesian_prod(*(torch.arange(size) for size in SIZES))
    for part, index in zip(bias, grids.T, strict=True):
        logits = logits + part[:, index][:, :, index]
    expected = (torch.softmax(logits, -1) @ q.flatten(2, 4)).unflatten(2, SIZES)
    torch.testing.assert_close(ta.flattened_attention(q, q, q, order=3, bias=bias), expected, **CLOSE)


def test_tables_learn():
    bias, q = relative(), draw(2, 2, *SIZES, 4)
    ta.additive_attention(q, q, q, order=3, bias=bias(SIZES)).square().sum().backward()
    for table in bias.tables:
        assert table.grad.abs().min() > 0


@pytest.mark.parametrize("name", BIASES)
def test_saved_copied_and_moved(name):
    bias = BIASES[name]()
    stored = io.BytesIO()
    torch.save(bias.state_dict(), stored)
    stored.seek(0)
    again = BIASES[name]()
    again.load_state_dict(torch.load(stored))
    for part, other in zip(bias(SIZES), copy.deepcopy(again)(SIZES), strict=True):
        assert torch.equal(part, other)
    assert all(part.dtype == torch.float32 for part in again.float()(SIZES))
    assert all(part.device.type == "meta" for part in again.to("meta")(SIZES))
    assert "modes='t h w'" in repr(bias)


def test_tables_can_be_drawn_anew():
    torch.manual_seed(0)
    bias = ta.RelativePositionBias(64, modes=1, max_distance=500)
    before = bias.tables[0].detach().clone()
    assert abs(float(before.std()) - 0.02) < 1e-3
    bias.reset_parameters()
    assert not torch.equal(bias.tables[0], before)


def added(**told):
    return ta.TensorTransformerBlock(8, 2, modes="t h w", dtype=torch.float64, **told)


@pytest.mark.parametrize("reset", [True, False])
@pytest.mark.parametrize("name", [*BIASES, "slopes"])
def test_the_way_from_the_meta_device(name, reset):
    """By itself and within a block: no buffer holds what a state dict would have to bring."""
    make = {**BIASES, "slopes": lambda: ta.AlibiBias(2, modes="t h w", slopes=[3.0, 0.5]).double()}[name]
    bias, block = make(), added(position_bias=make())
    for part, other in zip(by_way_of_meta(make, bias, reset)(SIZES), bias(SIZES), strict=True):
        assert torch.equal(part, other)
    twin, x = by_way_of_meta(lambda: added(position_bias=make()), block, reset), draw(2, *SIZES, 8)
    assert torch.equal(twin(x), block(x))


def test_a_layer_draws_its_bias_anew_but_takes_it_as_it_is():
    bias = relative()
    with torch.no_grad():
        bias.tables[0].fill_(9)
    layer = ta.TensorAttention(8, 2, modes="t h w", position_bias=bias, dtype=torch.float64)
    assert bias.tables[0].eq(9).all()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(9)
    layer.reset_parameters()
    assert not [name for name, parameter in layer.named_parameters() if parameter.eq(9).any()]


def test_half_precision_rounds_no_slope():
    bias = ta.AlibiBias(3, modes=1).bfloat16()
    torch.testing.assert_close(bias.slopes, torch.tensor([2 ** (-8 / 3), 2 ** (-16 / 3), 2**-8]))
    assert bias((300,))[0].dtype == torch.float32


MESSAGES = [
    (lambda: relative(max_distance=0), OptionError, "RelativePositionBias: max_distance must be at least 1, got 0."),
    (
        lambda: relative(max_distance=1.5),
        OptionError,
        "RelativePositionBias: max_distance must be an integer, got 1.5.",
    ),
    (
        lambda: relative(max_distance={"x": 1}),
        ModesError,
        "RelativePositionBias: there is no mode 'x' among 't h w' (order 3).",
    ),
    (
        lambda: relative(max_distance=(1, 2)),
        ModesError,
        "RelativePositionBias: max_distance has 2 entries, but order 3 needs one a mode.",
    ),
    (
        lambda: ta.RelativePositionBias(0, modes=1, max_distance=1),
        OptionError,
        "RelativePositionBias: num_heads must be at least 1, got 0.",
    ),
    (
        lambda: relative()((4, 3)),
        ShapeError,
        "RelativePositionBias: sizes has 2 entries, but order 3 needs 3 integers, one a mode.",
    ),
    (
        lambda: relative()((4, 0, 3)),
        ShapeError,
        "RelativePositionBias: mode 'h' has size 0 in sizes, but needs at least 1.",
    ),
    (lambda: alibi(slopes=[1.0]), OptionError, "AlibiBias: slopes has 1 entries, but there are 2 heads."),
    (lambda: alibi(slopes=[1.0, -1.0]), OptionError, "AlibiBias: slopes must be finite and not negative, got -1.0."),
    (lambda: alibi(spacing="far"), OptionError, "AlibiBias: spacing must be numbers, got 'far'."),
    (lambda: alibi(spacing=math.inf), OptionError, "AlibiBias: spacing must be finite and not negative, got inf."),
    (lambda: window(window=-1), OptionError, "AxisWindow: window must be at least 0, got -1."),
    (
        lambda: window(modes="t t"),
        ModesError,
        "AxisWindow: mode names must differ, but 't' appears 2 times in 't t'.",
    ),
    (lambda: ta.RelativePositionBias(2, max_distance=1), ModesError, MISSING.format("RelativePositionBias")),
    (lambda: ta.AlibiBias(2), ModesError, MISSING.format("AlibiBias")),
    (lambda: ta.AxisWindow(window=1), ModesError, MISSING.format("AxisWindow")),
]


@pytest.mark.parametrize(("make", "error", "message"), MESSAGES, ids=range(len(MESSAGES)))
def test_messages(make, error, message):
    refused(error, message, make)
