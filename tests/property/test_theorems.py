"""The theorems behind the laws, each a test under its own name, on the package as it is."""

from __future__ import annotations

import pytest
import torch

import tensorattn as ta
from tensorattn.testing.check import Asked
from tensorattn.testing.theorems import THEOREMS


@pytest.mark.parametrize(
    "theorem",
    [pytest.param(t, id=t.__name__, marks=pytest.mark.thorough if t.once else ()) for t in THEOREMS],
)
def test_it_holds(theorem):
    found = theorem.tried(ta, Asked(examples=5))
    assert found.failure is None, found.failure.message
    assert found.cases >= (1 if theorem.once else round(5 * theorem.share))


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("theorem", THEOREMS, ids=lambda theorem: theorem.__name__)
def test_it_holds_on_many_cases(theorem, dtype):
    failure = theorem.tried(ta, Asked(dtype, examples=40, seed=1)).failure
    assert failure is None, failure.message
