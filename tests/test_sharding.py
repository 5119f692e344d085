"""A tensor that is shared out over processes: outputs and all gradients are those of the whole."""

from __future__ import annotations

import pytest
import sharded
from sharded import KINDS, LAYERS, layer_case

QUICK = {"additive interaction", "kao_qkv interaction", "clustered blocks", "flattened", "additive causal"}


def layer_cases(world):
    """Cases of layers: (name, function, arguments)."""
    found = []
    for name in LAYERS:
        cuts = [("t", None), ("t", {"t": (*(0,) * (world - 2), 4, 1)}), ("w", None)] if world > 1 else [("t", None)]
        if world == 4:
            cuts = [("t", None), ("tw", None), ("wt", {"w": (0, 6)})]
        for cut, splits in cuts:
            found.append((f"{name} {cut} {splits}", layer_case, name, tuple(cut), splits, KINDS))
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    cases = [case for case in layer_cases(2) if case[2] in QUICK]
    return sharded.spawn(2, cases, tmp_path_factory.mktemp("two"))


def test_two_processes(two):
    wrong = {name: found for name, found in two.items() if any(found)}
    print("\n".join(f"{name}: {found[0]} {found[-1]}" for name, found in wrong.items()))
    assert list(wrong) == []


@pytest.mark.thorough
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_all_layers(world, tmp_path):
    found = sharded.spawn(world, layer_cases(world), tmp_path)
    wrong = {name: found for name, found in found.items() if any(found)}
    print("\n".join(f"{name}: {found[0]} {found[-1]}" for name, found in wrong.items()))
    assert list(wrong) == []
