"""The joint softmax over the averages of all modes sees how long modes are beside each other, and nothing else."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

import tensorattn as ta
from tensorattn.testing import Subject, cases
from tensorattn.testing.tolerances import exact

TOLD = Subject("theorem", lambda: None)  # compares, and tells a failure with its case


@given(cases(max_positions=16), st.integers(2, 3))
def test_repeating_the_indices_of_all_modes_equally_often_only_counts_tokens(case, times):
    """Every token of the one softmax is there as many times: the same output, log(times) in the log-sum-exp."""
    key, value = case.key, case.value
    for mode in range(len(case.batch), len(case.batch) + case.order):
        key, value = (tensor.repeat_interleave(times, mode) for tensor in (key, value))
    weights = None
    if case.weights is not None:
        weights = tuple(None if w is None else w.repeat_interleave(times, -1) for w in case.weights)
    finer = case.replace(key=key, value=value, weights=weights)
    (before, lse, _), (after, moved, _) = (
        ta.kao_kv(c.query, c.key, c.value, order=c.order, scale=c.scale, weights=c.weights, return_lse=True)
        for c in (case, finer)
    )
    TOLD.expect_close(after, before, case.allowed(), "repeating all indices must have no effect", case)
    told = "repeating all indices must count the tokens in the log-sum-exp"
    TOLD.expect_close(moved, exact(lse) + math.log(times), case.allowed_lse, told, case)
