"""Who works in `bench`: every layer computes what it says, and parity finds those that do not."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tensorattn.cli.bench import examine
from tensorattn.cli.common import parse_choices
from tensorattn.cli.contenders import FULL, OTHERS, PEERS, Contender, Runner, Work, contenders
from tensorattn.cli.plain import PLAIN, PlainLayer
from tensorattn.diagnose.cost import DTYPES, count_calls
from tensorattn.functional import OPERATORS
from tensorattn.nn import TensorAttention
from tensorattn.testing import reference

PLANE = Work(2, (4, 5), 8, heads=2)


def contender(name: str) -> Contender:
    everyone = contenders(parse_choices([*OPERATORS, "clustered:tokens=8"]), peers=True, plain=True)
    (found,) = (each for each in everyone if each.name == name)
    return found


def runner(who: Contender, work: Work) -> Runner:
    x = work.tensor().requires_grad_()
    return Runner(who, work, x, work.place(torch.randn(x.shape)))


def test_who_works_beside_the_operators_that_are_asked_for():
    choices = parse_choices(["kao_kv", "flattened"])
    beside = [FULL, "pooled attention", "axial attention"]
    assert [each.name for each in contenders(choices)] == ["kao_kv", "flattened", *beside]
    names = [each.name for each in contenders(choices, plain=True, peers=True, compiled=True)]
    ours = ["kao_kv", "flattened", "kao_kv, compiled", "flattened, compiled"]
    assert names == [*ours, *beside, "plain kao_kv", *(peer.name for peer in PEERS)]


# ---- parity --------------------------------------------------------------------------------------------------


class Unseen(torch.autograd.Function):
    """Passes a tensor on, and a part of its gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 0.95 * gradient


class Wrong(TensorAttention):
    """A layer with a wrong output."""

    mistake: Callable[[Tensor], Tensor]

    def forward(self, x: Tensor, *given: Any, **told: Any) -> Tensor:
        return self.mistake(super().forward(x, *given, **told))


MISTAKES: dict[str, Callable[[Tensor], Tensor]] = {
    "a hundredth too much": lambda y: 1.01 * y,
    "not a number": lambda y: y * math.nan,
    "another shape": lambda y: y[..., :1],
    "less gradient": Unseen.apply,
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_wrong_layer_gets_no_time(name):
    class Mistaken(Wrong):
        mistake = staticmethod(MISTAKES[name])

    wrong = dataclasses.replace(contender("kao_kv"), build=lambda work: Mistaken(8, 2, modes=2, operator="kao_kv"))
    row, other = examine(PLANE, [wrong, contender("plain kao_kv")], repeats=1)
    assert row.forward is row.training is None and other.forward is not None
    assert row.note.startswith("parity fails, error ") and row.note.endswith(" above 1e-03: not timed")


def test_a_parameter_with_a_wrong_gradient_is_found():
    def build(work: Work) -> nn.Module:
        layer = TensorAttention(8, 2, modes=2, operator="kao_kv")
        layer.v_proj.weight.register_hook(lambda gradient: 1.05 * gradient)
        return layer

    (row,) = examine(PLANE, [dataclasses.replace(contender("kao_kv"), build=build)], repeats=1)
    assert row.training is None and row.note.startswith("parity fails")


@pytest.mark.parametrize("name", [each.name for each in (*OTHERS, *PEERS)])
@pytest.mark.parametrize("layout", ["channels_last", "channels_first"])
def test_others_compute_what_they_say(name, layout):
    for sizes in ((7,), (5, 6), (4, 3, 5)):
        (row,) = examine(Work(2, sizes, 8, 2, "float64", layout), [contender(name)], repeats=1)
        if "not installed" in row.note:
            pytest.skip(row.note)
        if name.startswith("kronecker") and (len(sizes) != 2 or layout == "channels_last"):
            assert row.note == "it takes images with channels first only"
        else:
            assert row.error is not None and row.error < 1e-9 and not row.note


@pytest.mark.parametrize("dtype", DTYPES)
def test_cells_are_those_that_the_layer_finds_in_its_type(dtype):
    """Found among exact keys they would be others, and every error as large as the output."""
    error = runner(contender("clustered:tokens=8"), Work(2, (9, 8), 16, 2, dtype)).parity(training=False)
    assert error < 4 * torch.finfo(DTYPES[dtype]).eps


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("channels_first", [False, True])
def test_plain_layers_are_those_of_the_operators(name, channels_first):
    for sizes in ((5,), (3, 4), (2, 3, 4), (2, 3, 2, 2)):
        layer = TensorAttention(6, 2, modes=len(sizes), operator=name, channels_first=channels_first).double()
        for parameter in layer.parameters():
            nn.init.normal_(parameter)
        x = torch.randn(2, *sizes, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        found = PlainLayer(layer)(x.movedim(-1, 1) if channels_first else x)
        found = found.movedim(1, -1) if channels_first else found
        torch.testing.assert_close(found, reference.layer(layer, x), rtol=1e-10, atol=1e-12)


def test_every_operator_has_a_plain_layer_of_few_calls():
    assert set(PLAIN) == set(OPERATORS) - {"clustered"}  # a search is no few calls
    for name, calls in {"kao_kv": 10, "additive": 17, "kao_qkv": 13}.items():
        plain = PlainLayer(TensorAttention(8, 2, modes=3, operator=name))
        for sizes in ((2, 3, 4), (9, 8, 10)):
            assert count_calls(lambda: plain(torch.zeros(2, *sizes, 8))) == calls + 1  # noqa: B023


# ---- devices -------------------------------------------------------------------------------------------------


def test_the_tensor_is_the_same_in_every_type_and_on_every_device():
    x = Work(1, (3, 4), 8, 2, "float16", "channels_first", "meta").tensor()
    assert (x.dtype, x.device.type, x.shape) == (torch.float16, "meta", (1, 8, 3, 4))
    assert torch.equal(Work(1, (3, 4), 8).tensor(), Work(1, (3, 4), 8, dtype="float64").tensor().float())
