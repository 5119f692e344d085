"""A tensor that is shared out over processes: outputs and all gradients are those of the whole.

The errors, of outputs and of gradients of inputs and parameters: pytest -m thorough -s tests/test_sharding.py -k layers
"""

from __future__ import annotations

import pytest
import sharded
from sharded import KINDS, LAYERS

QUICK = {"additive interaction": KINDS, "clustered blocks": KINDS[1:3], "flattened": KINDS[:1], "kao_qkv": KINDS[5:6]}
MODELS = ({}, {"positions": "learned", "sizes": (5, 3, 4), "operator": "clustered", "options": {"cells": "blocks"}})


def layer_cases(world):
    """Cases of layers: even and uneven parts and empty ones, along one mode and two; all that is said for two."""
    found = []
    for place, name in enumerate(LAYERS):
        kinds = KINDS if world == 2 else (KINDS[0], KINDS[1 + place % 6], KINDS[1 + (place + 3) % 6])
        cuts = [("t", None), ("t", {"t": (*(0,) * (world - 2), 4, 1)}), ("w", None)] if world > 1 else [("t", None)]
        if world == 4:
            cuts = [("t", None), ("tw", None), ("wt", {"w": (0, 6)})]
        if "causal" in name:  # along the cut mode too
            cuts = [*cuts, ("h", None), *([("ht", None)] if world == 4 else [])]
            cuts += [("h", {"h": (3, *(0,) * (world - 2), 1)})] if world > 1 else []  # some have no frame
        found += [
            (f"{name} {cut} {splits}", sharded.layer_case, name, tuple(cut), splits, kinds) for cut, splits in cuts
        ]
    return found


def other_cases(world):
    """Cases of everything else."""
    names = ["traffic", "cost", "few_modes", "single_precision", "future", "block", "context", "fsdp", "dtensor"]
    names += ["refusals", "one_refuses"]
    names += ["compile", "unchecked"] if world == 2 else ["bytes"]
    found = [(name, getattr(sharded, f"{name}_case")) for name in names]
    return [*found, *((f"model {settings}", sharded.model_case, settings) for settings in MODELS)]


def check(world, cases, folder):
    """Run cases in as many processes, and show what is wrong in them."""
    found = sharded.spawn(world, cases, folder)
    wrong = [
        f"{name}, process {rank}: {each}" for name, all_ in found.items() for rank, each in enumerate(all_) if each
    ]
    if wrong:
        pytest.fail("\n".join(wrong))


def test_two_processes(tmp_path):
    cases = [(name, getattr(sharded, f"{name}_case")) for name in ("refusals", "one_refuses", "traffic")]
    cases += [(name, sharded.layer_case, name, ("t",), None, kinds) for name, kinds in QUICK.items()]
    cases += [("few_modes", sharded.few_modes_case)]
    cases += [("single_precision", sharded.single_precision_case, ("additive", "kronecker_sum"), ("weights",))]
    check(2, cases, tmp_path)


@pytest.mark.thorough
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_all_layers(world, tmp_path):
    check(world, layer_cases(world), tmp_path)


@pytest.mark.thorough
@pytest.mark.parametrize("world", [2, 4])
def test_everything_else(world, tmp_path):
    check(world, other_cases(world), tmp_path)
