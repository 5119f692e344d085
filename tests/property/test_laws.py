"""The theorems that `verify` tries, each a test under its own words."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import settings

from tensorattn.verify import work
from tensorattn.verify.statement import Asked
from tensorattn.verify.theorems.positions import CAUSAL

LAWS = {statement.law.__name__: statement for statement in work.THEOREMS}
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def attempt(trial, *, shrink=True):
    """Try a statement; what breaks it, or None. It has something to compare in every case that is counted."""
    found = work.attempt(trial, trial.subject, shrink=shrink)
    wanted = 1 if trial.statement.once else max(1, round(trial.asked.examples * trial.statement.share))
    assert found.failure is not None or found.cases >= min(wanted, 3)  # there are three orders that are drawn
    return found.failure


def asked(dtype, share=1.0):
    return Asked(dtype=dtype, examples=max(1, round(settings().max_examples * share)))


@pytest.mark.parametrize("statement", LAWS.values(), ids=lambda statement: statement.words)
def test_it_holds(statement):
    failure = attempt(work.Trial(statement, None, asked(torch.float64)))
    assert failure is None, failure.message


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("statement", [s for s in LAWS.values() if not s.double], ids=lambda statement: statement.words)
def test_it_holds_in_other_types(statement, dtype):
    failure = attempt(work.Trial(statement, None, asked(dtype, 0.25)))
    assert failure is None, failure.message


CAUSAL_TRIALS = [trial for trial in work.trials(Asked()) if trial.statement is CAUSAL]


@pytest.mark.parametrize("trial", CAUSAL_TRIALS, ids=lambda trial: trial.name)
def test_nothing_leaks_from_later_frames(trial):
    failure = attempt(dataclasses.replace(trial, asked=asked(torch.float64)))
    assert failure is None, failure.message
