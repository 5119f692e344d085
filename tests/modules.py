"""What tests of modules share: tensors that are always the same, calls that are refused, ways from the meta device."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tensorattn.errors import TensorAttentionError

LARGE = 100  # elements: inputs of calls that are refused have more, coordinates and weights fewer


def draw(*shape, seed=0, dtype=torch.float64):
    """Standard normal numbers, always the same."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class Guard(TorchDispatchMode):
    """Collect the operations that read or write a large tensor; views do neither."""

    def __init__(self):
        super().__init__()
        self.work = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        leaves = tree_leaves((args, kwargs))
        if not func.is_view and any(isinstance(leaf, torch.Tensor) and leaf.numel() >= LARGE for leaf in leaves):
            self.work.append(str(func))
        return func(*args, **(kwargs or {}))


def refused(kind, message, function, *args, **kwargs):
    """Check that a call is refused with a whole message, before any work; arguments are made before the call."""
    with Guard() as guard, pytest.raises(kind) as error:
        function(*args, **kwargs)
    assert str(error.value) == message
    assert isinstance(error.value, TensorAttentionError)
    assert guard.work == []


def reading(*shape, argument="x", first=False):
    """How an input over the modes ``h w`` is read: not at all where it lacks a dimension."""
    line = f"\n  modes    h w\n  {argument:<8} {shape}"
    if argument == "x" and len(shape) < 4:
        return line
    letter = "C" if argument == "x" else "D"
    grid = f"h={shape[-2]} w={shape[-1]}" if first else f"h={shape[-3]} w={shape[-2]}"
    channels = f"{letter}={shape[-3 if first else -1]}"
    return f"{line}   batch={shape[:-3]} {f'{channels} {grid}' if first else f'{grid} {channels}'}"


MISSING = '{}: modes is missing.\n  Give their names, as in modes="t h w", or their number, as in modes=3.'


def by_way_of_meta(make, module, reset=True):
    """A module made on the meta device, given memory that holds NaN, perhaps drawn anew, and then loaded strictly."""
    with torch.device("meta"):
        twin = make()
    assert all(tensor.is_meta for tensor in (*twin.parameters(), *twin.buffers()))
    twin = twin.to_empty(device="cpu")
    for buffer in twin.buffers():
        buffer.fill_(torch.nan if buffer.is_floating_point() else 9)
    if reset and hasattr(twin, "reset_parameters"):
        twin.reset_parameters()
    twin.load_state_dict(copy.deepcopy(module.state_dict()), strict=True)
    return twin


def all_drawn_anew(module):
    """Check that every parameter is another one after `reset_parameters`."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(9)
    module.reset_parameters()
    left = [name for name, parameter in module.named_parameters() if parameter.eq(9).any()]
    assert left == []
