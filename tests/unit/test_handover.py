"""Gradients that are added to where they are: only those that nobody else holds, and with the same sums."""

from __future__ import annotations

import pytest
import torch

import tensorattn as ta
from tensorattn import contraction, slabs
from tensorattn.handover import hand_over, take_over

CLOSE = {"rtol": 1e-11, "atol": 1e-13}
LAYERS = {
    "additive": {},
    "truncated": {"interaction_order": 2},
    "kao_kv": {},
    "additive with interaction": {"interaction": "linear"},
    "additive with its own token": {"include_self": True},
}


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(name, *, channels_first=False):
    torch.manual_seed(3)
    options = {"channels_first": channels_first, "dtype": torch.float64, **LAYERS[name]}
    return ta.TensorAttention(6, 2, modes=3, operator=name.partition(" ")[0], **options)


@pytest.fixture
def taken(monkeypatch):
    """How often a gradient was taken over."""
    found = []

    def spy(gradient):
        found.append(take_over(gradient))
        return found[-1]

    monkeypatch.setattr(contraction, "take_over", spy)
    return found


@pytest.mark.parametrize("channels_first", [False, True])
@pytest.mark.parametrize("skipped", ["nothing", "itself", "added afterwards"])
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_in_slabs_are_those_of_the_whole(name, skipped, channels_first, taken, monkeypatch):
    module = layer(name, channels_first=channels_first)
    x = draw(*((2, 6, 3, 4, 5) if channels_first else (2, 3, 4, 5, 6))).requires_grad_()
    given = draw(*x.shape, seed=1)
    results = []
    for positions in (16, 1 << 20):
        monkeypatch.setattr(slabs, "POSITIONS", positions)
        before = given.clone()
        y = module(x, skip=x if skipped == "itself" else None)
        y = y + x if skipped == "added afterwards" else y
        results.append(torch.autograd.grad(y, [x, *module.parameters()], given))
        assert torch.equal(given, before)
    assert taken == [True, False]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


def test_one_input_of_several_layers(taken, monkeypatch):
    """Each layer adds to its own gradient; what the input has from elsewhere stays what it is."""
    first, second = layer("additive"), layer("kao_kv")
    x = draw(2, 3, 4, 5, 6).requires_grad_()
    results = []
    for positions in (16, 1 << 20):
        monkeypatch.setattr(slabs, "POSITIONS", positions)
        x.grad = None
        for _ in range(2):  # the second time, gradients are added to those there are
            (first(x) * second(x) + ta.mode_averages(x, order=3)[0].sum()).square().sum().backward()
        results.append(x.grad)
    assert taken.count(True) == 4
    torch.testing.assert_close(*results, **CLOSE)


def test_gradients_that_are_differentiated_are_not_written_to(taken, monkeypatch):
    """Second derivatives keep every gradient."""
    monkeypatch.setattr(slabs, "POSITIONS", 16)
    module, x = layer("additive"), draw(2, 3, 4, 5, 6).requires_grad_()
    torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
    assert taken == [False]


def test_a_mark_is_taken_off():
    gradient = torch.ones(2)
    assert not take_over(gradient)
    hand_over(gradient)
    assert take_over(gradient)
    assert not take_over(gradient)
    hand_over(gradient)
    assert not take_over(gradient + 1)
