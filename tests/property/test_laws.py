"""The theorems that `verify` tries, each a test under its own words, and each seen to fail on mistakes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import settings
from mistakes import MISTAKES

from tensorattn.operators import OPERATORS
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


@pytest.mark.parametrize(
    ("law", "module", "name", "mistake"),
    [(law, *others) for law, _, *others in MISTAKES],
    ids=[f"{law}: {what} in {name}" for law, what, _, name, _ in MISTAKES],
)
def test_it_fails_on_a_mistake(monkeypatch, law, module, name, mistake):
    monkeypatch.setattr(module, name, mistake(getattr(module, name)))
    failure = attempt(work.Trial(LAWS[law], None, Asked(examples=60)), shrink=False)
    assert failure is not None, "no case shows the mistake"
    assert " must " in failure.message, failure.message  # it is the statement that fails, not the mistake that raises


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("law", ["second_order_bound", "symmetric_modes", "merging", "far_away"])
def test_as_many_cases_as_verify_tries_show_each_mistake(monkeypatch, law, seed):
    """Laws that say nothing of many a case are tried on those of which they say something."""
    mistakes = [others for known, _, *others in MISTAKES if known == law]
    for module, name, mistake in mistakes:
        with monkeypatch.context() as patched:
            patched.setattr(module, name, mistake(getattr(module, name)))
            failure = attempt(work.Trial(LAWS[law], None, Asked(seed=seed)), shrink=False)
            assert failure is not None and " must " in failure.message, name
    assert mistakes


def test_what_sees_later_frames_is_found(monkeypatch):
    record = OPERATORS["kao_kv"]

    def sees_everything(*tensors, causal, **given):
        return record.function(*tensors, **given)

    monkeypatch.setitem(OPERATORS, "kao_kv", dataclasses.replace(record, function=sees_everything))
    (trial,) = (trial for trial in work.trials(Asked(examples=60), "kao_kv") if trial.statement is CAUSAL)
    failure = attempt(trial, shrink=False)
    assert failure is not None and "nothing may leak" in failure.message


def test_every_theorem_has_a_mistake():
    assert {law for law, *_ in MISTAKES} == set(LAWS)
    assert len(LAWS) == len(work.THEOREMS)  # names are unique
