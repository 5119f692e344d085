"""Symmetries: changes of the arguments that change nothing, or change the output likewise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

from tensorattn.operators import Claim
from tensorattn.testing.cases import Case
from tensorattn.testing.checks.check import Draw, check
from tensorattn.testing.drawing import generators, numbers
from tensorattn.testing.subject import Subject
from tensorattn.testing.tolerances import allowed, exact, largest
from tensorattn.testing.weighing import Weights

__all__ = [
    "check_key_shift",
    "check_permutation_equivariance",
    "check_rotation",
    "check_scale_exchange",
    "check_value_affine",
]


@check("treats indices, modes, batch entries and queries alike, whatever their order")
def check_permutation_equivariance(subject: Subject, case: Case, draw: Draw) -> None:
    """Check that permuting indices, modes, batch entries or queries does nothing but permute.

    Reordering the indices of each mode, or the modes themselves, leaves the output for given queries as it is, and
    permutes it for queries on the grid of the keys. Batch entries, and queries that need no grid, do not see each
    other: any selection of them gives that selection of the output. Where the option ``kept`` names modes, it is
    reordered with them.

    Examples:
        >>> check_permutation_equivariance("axial", examples=5)
    """
    output = subject.output(case)
    tolerance = case.allowed(largest(output))
    for change in (_permute_indices, _select_batch, _select_queries):
        changed, expected, statement = change(case, output, draw)
        subject.expect_close(subject.output(changed), expected, tolerance, statement, case)
    modes = draw(st.permutations(range(case.order)))
    changed, expected, statement = _reorder_modes(case, output, modes)
    subject.expect_close(subject.reordered(modes).output(changed), expected, tolerance, statement, case)


def _permute_indices(case: Case, output: Tensor, draw: Draw) -> tuple[Case, Tensor, str]:
    """Permute the indices of every mode."""
    orders = [torch.tensor(draw(st.permutations(range(size))), device=case.key.device) for size in case.sizes]

    def permuted(tensor: Tensor) -> Tensor:
        for mode, index in enumerate(orders):
            tensor = tensor.index_select(len(case.batch) + mode, index)
        return tensor

    weights: Weights = None
    if case.weights is not None:
        pairs = zip(case.weights, orders, strict=True)
        weights = tuple(None if w is None else w.index_select(-1, index) for w, index in pairs)
    query = permuted(case.query) if case.on_grid else case.query
    changed = case.replace(query=query, key=permuted(case.key), value=permuted(case.value), weights=weights)
    statement = "permuting the indices of the modes must only permute the output"
    return changed, permuted(output) if case.on_grid else output, statement


def _reorder_modes(case: Case, output: Tensor, modes: Sequence[int]) -> tuple[Case, Tensor, str]:
    """Reorder the modes."""
    batch = len(case.batch)
    dims = [*range(batch), *(batch + mode for mode in modes), batch + case.order]
    changed = case.replace(
        query=case.query.permute(dims) if case.on_grid else case.query,
        key=case.key.permute(dims),
        value=case.value.permute(dims),
        weights=None if case.weights is None else tuple(case.weights[mode] for mode in modes),
    )
    statement = "reordering the modes must only reorder the output"
    return changed, output.permute(dims) if case.on_grid else output, statement


def _select_batch(case: Case, output: Tensor, draw: Draw) -> tuple[Case, Tensor, str]:
    """Select entries along each batch dimension."""
    picks = [
        torch.tensor(draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=3)), device=case.key.device)
        for size in case.batch
    ]

    def selected(tensor: Tensor) -> Tensor:
        for dim, index in enumerate(picks):
            tensor = tensor.index_select(dim, index)
        return tensor

    weights: Weights = None
    if case.weights is not None:
        chosen: list[Tensor | None] = []
        for given in case.weights:
            for dim, index in enumerate(reversed(picks), start=2):
                if given is not None and given.dim() >= dim and given.shape[-dim] > 1:
                    given = given.index_select(-dim, index)
            chosen.append(given)
        weights = tuple(chosen)
    changed = case.replace(
        query=selected(case.query), key=selected(case.key), value=selected(case.value), weights=weights
    )
    return changed, selected(output), "batch entries must not see each other"


def _select_queries(case: Case, output: Tensor, draw: Draw) -> tuple[Case, Tensor, str]:
    """Select one index along each position dimension of the query."""
    statement = "queries must not see each other"
    if case.on_grid:
        return case, output, statement
    query = case.query
    for size in case.positions:
        index = draw(st.integers(0, size - 1))
        query, output = query.select(len(case.batch), index), output.select(len(case.batch), index)
    return case.replace(query=query), output, statement


@check(Claim.KEY_SHIFT)
def check_key_shift(subject: Subject, case: Case, draw: Draw) -> None:
    r"""Check that keys :math:`k + c` give what k gives, c being constant over positions.

    All logits of a query change by the same :math:`s\, q \cdot c`, which the log-sum-exp, if claimed, has to follow.

    Examples:
        >>> check_key_shift("kao_kv", examples=5)
    """
    shift = numbers(
        draw(generators(3)), (*case.batch, *(1 for _ in case.sizes), case.key.shape[-1]), case.dtype, addable=True
    )
    shifted = case.replace(key=case.key + shift.to(case.key.device))
    statement = "adding a constant to all keys must change nothing"
    if Claim.LOG_SUM_EXP in subject.claims:
        (before, lse), (after, moved) = subject.with_lse(case), subject.with_lse(shifted)
        constant = exact(shift).reshape(*case.batch, *(1 for _ in case.positions), -1)
        move = case.factor * (exact(case.query) * constant).sum(-1)
        tolerance = max(case.allowed_lse, shifted.allowed_lse)
        told = "adding a constant c to all keys must add s q·c to the log-sum-exp"
        subject.expect_close(moved, exact(lse) + move, tolerance, told, case)
    else:
        before, after = subject.output(case), subject.output(shifted)
    magnitude = largest(before)
    subject.expect_close(after, before, max(case.allowed(magnitude), shifted.allowed(magnitude)), statement, case)


@check(Claim.VALUE_AFFINE)
def check_value_affine(subject: Subject, case: Case, draw: Draw) -> None:
    """Check that values ``v W + b`` give the output ``o W + b``: the weights of the values sum to one.

    Examples:
        >>> check_value_affine("additive", examples=5)
    """
    generator, dim = draw(generators(3)), draw(st.integers(1, 4))
    matrix, offset = (numbers(generator, shape) for shape in ((case.value.shape[-1], dim), (dim,)))
    mapped = case.replace(value=(exact(case.value) @ matrix + offset).to(case.value))
    before, after = subject.output(case), subject.output(mapped)
    expected = exact(before) @ matrix + offset
    gain = float(matrix.abs().sum(0).max())
    tolerance = case.allowed(largest(before)) * gain + mapped.allowed(largest(expected))
    statement = "an affine map of the values must be the same map of the output"
    subject.expect_close(present(case, after), present(case, expected), tolerance, statement, case)


@check(Claim.ROTATION)
def check_rotation(subject: Subject, case: Case, draw: Draw) -> None:
    """Check that an orthogonal map of the channels of queries and keys changes nothing: only products count.

    Examples:
        >>> check_rotation("kao_qkv", examples=5)
    """
    dim = case.key.shape[-1]
    rotation = torch.linalg.qr(numbers(draw(generators(3)), (dim, dim))).Q
    query, key = exact(case.query), exact(case.key)
    rotated = case.replace(query=(query @ rotation).to(case.query), key=(key @ rotation).to(case.key))
    before = subject.output(case)
    # Rotated channels are rounded, which moves a logit by a part of |q| |k|, however small the logit is.
    bound = abs(case.factor) * largest(query.norm(dim=-1)) * largest(key.norm(dim=-1))
    tolerance = allowed("output", case.dtype, logit=bound, magnitude=max(case.magnitude, largest(before)))
    statement = "rotating the channels of queries and keys together must change nothing"
    subject.expect_close(subject.output(rotated), before, tolerance, statement, case)


@check("scaling the queries up and the scale down changes nothing")
def check_scale_exchange(subject: Subject, case: Case, draw: Draw) -> None:
    """Check that c times the queries with the c-th part of the scale change nothing: the scale is that of the logits.

    Examples:
        >>> check_scale_exchange("flattened", examples=5)
    """
    power = 2.0 ** draw(st.integers(-4, 4))
    exchanged = case.replace(query=case.query * power, scale=case.factor / power)
    before = subject.output(case)
    statement = "scaling the queries up and the scale down must change nothing"
    subject.expect_close(subject.output(exchanged), before, case.allowed(largest(before)), statement, case)


def present(case: Case, result: Tensor) -> Tensor:
    """Put zeros where a result is over the grid of the keys, at positions that are absent: there it may be anything."""
    return exact(result).masked_fill((case.position_weights() == 0).unsqueeze(-1), 0.0) if case.on_grid else result
