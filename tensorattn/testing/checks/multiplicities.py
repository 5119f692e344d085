"""Weights: how often a position counts."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from tensorattn.operators import Claim
from tensorattn.testing.cases import Case
from tensorattn.testing.checks.check import Draw, check
from tensorattn.testing.subject import Subject

__all__ = ["check_weights_are_multiplicities"]

POISON = 1e6  # what absent positions hold


@check("weights are multiplicities: 2 repeats an index, 0 leaves it out", integer=True, max_positions=16)
def check_weights_are_multiplicities(subject: Subject, case: Case, draw: Draw) -> None:
    """Check that whole weights act as repeating indices, and zeros as cropping them.

    Positions of weight zero are filled with a million: nothing may leak from them. Each batch entry is compared with
    the operator on a tensor that is really repeated and cropped, without weights.

    Examples:
        >>> check_weights_are_multiplicities("kao_kv", examples=5)
    """
    absent = (case.position_weights() == 0).to(case.key.device)
    poison = min(POISON, torch.finfo(case.dtype).max / 8)

    def poisoned(tensor: Tensor) -> Tensor:
        return tensor.masked_fill(absent.unsqueeze(-1), poison)

    query = poisoned(case.query) if case.on_grid else case.query
    full = case.replace(query=query, key=poisoned(case.key), value=poisoned(case.value))
    with_lse = Claim.LOG_SUM_EXP in subject.claims
    output, lse = subject.with_lse(full) if with_lse else (subject.output(full), None)
    statement = "weights must act as repetition and cropping"
    for b in itertools.product(*map(range, case.batch)):
        counts = [case.mode_weights(mode)[b].long() for mode in range(case.order)]
        single = case.replace(
            query=_repeated(case.query[b], counts) if case.on_grid else case.query[b],
            key=_repeated(case.key[b], counts),
            value=_repeated(case.value[b], counts),
            weights=None,
        )
        found = _repeated(output[b], counts) if case.on_grid else output[b]
        expected, expected_lse = subject.with_lse(single) if with_lse else (subject.output(single), None)
        subject.expect_close(found, expected, case.allowed(), statement, case)
        if lse is not None and expected_lse is not None and not case.on_grid:
            subject.expect_close(lse[b], expected_lse, case.allowed_lse, f"{statement} in the log-sum-exp", case)


def _repeated(tensor: Tensor, counts: list[Tensor]) -> Tensor:
    """Repeat the indices of each mode of ``(n_1, …, n_N, D)`` as often as told."""
    for mode, count in enumerate(counts):
        tensor = tensor.repeat_interleave(count.to(tensor.device), dim=mode)
    return tensor
