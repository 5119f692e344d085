"""Where operators equal full attention: groups of modes, all modes, degenerate laws, orthogonal channels."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from tensorattn.averages import interaction_residual
from tensorattn.operators.additive import additive_attention
from tensorattn.operators.kronecker_product import kronecker_product_attention
from tensorattn.operators.truncated import truncated_attention
from tensorattn.testing import Case, Subject, allowed, mode_partitions, tensor_normals
from tensorattn.testing.definitions import attention
from tensorattn.testing.drawing import generators, numbers
from tensorattn.testing.tolerances import exact, largest
from tensorattn.verify.means import expectation, product, summed
from tensorattn.verify.statement import Statement, called, drawn_cases, st

__all__ = ["STATEMENTS"]


def independent_groups(subject: Subject, case: Case, draw: Any) -> None:
    """Keys and values are sums of one term a group of modes, and the truncation keeps the groups."""
    groups, generator = draw(mode_partitions(case.order)), draw(generators(9))
    key, value = (summed(groups, case, t.shape[-1], generator, case.dtype) for t in (case.key, case.value))
    case = case.replace(key=key, value=value)
    _equals_full(subject, case, f"truncation to the groups {groups}", kept=groups)


def all_modes(subject: Subject, case: Case, draw: Any) -> None:
    """Truncation at as many modes as there are, on any data."""
    _equals_full(subject, case, "truncation at all modes", interaction_order=case.order)


def _equals_full(subject: Subject, case: Case, what: str, **options: Any) -> None:
    """Compare output and log-sum-exp of truncated attention with those of full attention."""
    expected, expected_lse = attention(case)
    output, lse, _ = called(truncated_attention, case, return_lse=True, **options)
    terms = 2**case.order  # counting numbers alternate in sign: as many terms as there are subsets cancel
    subject.expect_close(output, expected, terms * case.allowed(), f"{what} must equal full attention", case)
    subject.expect_close(lse, expected_lse, terms * case.allowed_lse, f"{what} must have its log-sum-exp", case)


def additive_keys(subject: Subject, case: Case, draw: Any) -> None:
    """Additive keys, and values of interactions of at most r modes: truncation at r."""
    degree, generator = draw(st.integers(1, case.order)), draw(generators(9))
    subsets = tuple(itertools.combinations(range(case.order), degree))
    case = case.replace(value=summed(subsets, case, case.value.shape[-1], generator, case.dtype))
    output = called(truncated_attention, case, interaction_order=degree)
    statement = f"truncation at {degree} must be exact for additive keys and values of that order"
    subject.expect_close(output, attention(case)[0], 2**case.order * case.allowed(), statement, case)


def missing_interaction(subject: Subject, case: Case, draw: Any) -> None:
    """Additive keys, any values: full less additive attention is the mean residual under the product of softmaxes."""
    value = numbers(draw(generators(9)), case.value.shape, case.dtype).to(case.value.device)
    case = case.replace(value=value)
    output, _, weights = called(additive_attention, case, return_attention=True)
    residual = interaction_residual(exact(value), order=case.order, weights=_on_cpu(case))
    missing = torch.from_numpy(attention(case)[0]) - exact(output)
    expected = expectation(product(weights, case), residual, case)
    statement = "with additive keys the error must be the mean interaction residual of the values"
    subject.expect_close(missing, expected, 4 * case.order * case.allowed(), statement, case)


def degenerate_laws(subject: Subject, case: Case, draw: Any) -> None:
    """Keys and values from sums of tensor-normal laws whose covariances but one are all ones."""
    wide = torch.float32 if case.dtype is torch.float32 else torch.float64
    key, value = (
        draw(tensor_normals(case.sizes, batch=case.batch, dim=t.shape[-1], dtype=wide, stream=stream)).to(t)
        for stream, t in ((1, case.key), (2, case.value))
    )
    case = case.replace(key=key, value=value, scale=min(abs(case.factor), 1.0))
    # Samples are additive before they are rounded, which moves a logit by a part of |q| |k|.
    bound = case.factor * largest(exact(case.query).norm(dim=-1)) * largest(exact(case.key).norm(dim=-1))
    tolerance = allowed("output", case.dtype, logit=bound, magnitude=case.magnitude)
    statement = "on samples of degenerate tensor-normal laws additive attention must be full attention"
    subject.expect_close(called(additive_attention, case), attention(case)[0], tolerance, statement, case)


def orthogonal_channels(subject: Subject, case: Case, draw: Any) -> None:
    """Queries and keys in which each mode has channels of its own, then rotated; any values."""
    generator, widths = draw(generators(9)), [draw(st.integers(1, 3)) for _ in case.sizes]

    def blocks() -> Tensor:
        parts = []
        for mode, (size, width) in enumerate(zip(case.sizes, widths, strict=True)):
            shape = [*case.batch, *(size if m == mode else 1 for m in range(case.order)), width]
            parts.append(numbers(generator, shape).expand(*case.batch, *case.sizes, width))
        return torch.cat(parts, -1)

    rotation = torch.linalg.qr(numbers(generator, (sum(widths), sum(widths)))).Q
    query, key = ((blocks() @ rotation).to(case.key) for _ in range(2))
    case = case.replace(query=query, key=key, scale=min(abs(case.factor), 1.0))
    # Rotated channels are rounded, which moves a logit by a part of |q| |k|, however small the logit is.
    bound = case.factor * largest(exact(query).norm(dim=-1)) * largest(exact(key).norm(dim=-1))
    tolerance = allowed("output", case.dtype, logit=bound, magnitude=case.magnitude)
    statement = "where modes live in orthogonal channels the Kronecker product must be full attention"
    subject.expect_close(called(kronecker_product_attention, case), attention(case)[0], tolerance, statement, case)


def _on_cpu(case: Case) -> list[Tensor] | None:
    """The weights of all modes in float64 on the CPU, or None."""
    return None if case.weights is None else [case.mode_weights(mode) for mode in range(case.order)]


STATEMENTS = (
    Statement(
        "truncation to kept groups of modes is exact where the groups are independent",
        "A_K = F, LSE_K = LSE where k, v = Σ_g a^g[j_g], g ∈ K",
        independent_groups,
        drawn_cases(max_positions=40),
    ),
    Statement(
        "truncation at all modes is full attention, whatever the data",
        "A_r = F, r = N",
        all_modes,
        drawn_cases(empty=True),
    ),
    Statement(
        "additive keys need the means up to the order of the values only",
        "F = Σ_(|U|≤r) c_U ⟨⊗p_m, V^U⟩",
        additive_keys,
        drawn_cases(additive=True, max_positions=40),
    ),
    Statement(
        "with additive keys, what additive attention lacks is the mean interaction residual of the values",
        "F − A = ⟨⊗p_m, R^v⟩",
        missing_interaction,
        drawn_cases(additive=True, max_positions=40),
    ),
    Statement(
        "additive attention is exact on samples of tensor-normal laws with all-ones covariances but one",
        "Σ_l = 11ᵀ for l ≠ m: A = F",
        degenerate_laws,
        drawn_cases(max_positions=40),
    ),
    Statement(
        "the Kronecker product is exact where modes live in orthogonal channels, for any values",
        "α^l·κ^m = 0 for l ≠ m: A¹⊗…⊗A^N v = F",
        orthogonal_channels,
        drawn_cases(on_grid=True, max_positions=36),
    ),
)
