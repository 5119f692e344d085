"""Where operators equal full attention: groups of modes, all modes, degenerate laws, orthogonal channels."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tensorattn.averages import interaction_residual
from tensorattn.operators.additive import additive_attention
from tensorattn.operators.kao_kv import kao_kv
from tensorattn.operators.kao_qkv import kao_qkv
from tensorattn.operators.kronecker_product import kronecker_product_attention
from tensorattn.operators.truncated import truncated_attention
from tensorattn.testing import Case, Subject, allowed, cases, mode_partitions, tensor_normals
from tensorattn.testing.definitions import attention
from tensorattn.testing.drawing import generators, numbers
from tensorattn.testing.tolerances import LARGEST_LOGIT, exact, largest
from tensorattn.truncation import counting_numbers, kept_family
from tensorattn.verify.means import at_most, expectation, for_queries, mean, product, summed
from tensorattn.verify.statement import Asked, Statement, called, drawn_cases, st

__all__ = ["STATEMENTS"]

SYMMETRIC = 36  # positions of a grid whose modes are all of one size


def independent_groups(subject: Subject, case: Case, draw: Any) -> None:
    """Keys and values are sums of one term a group of modes; the truncation keeps the groups, or all sets as large."""
    groups, generator = draw(mode_partitions(case.order)), draw(generators(9))
    key, value = (summed(groups, case, t.shape[-1], generator, case.dtype) for t in (case.key, case.value))
    case = case.replace(key=key, value=value)
    _equals_full(subject, case, f"truncation to the groups {groups}", kept=groups)
    largest_group = max(map(len, groups))
    _equals_full(subject, case, f"truncation at {largest_group}", interaction_order=largest_group)


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


def groups_as_modes(subject: Subject, case: Case, draw: Any) -> None:
    """Keys and values are sums of one term a group of modes, and each group is flattened to one mode."""
    groups, generator = draw(mode_partitions(case.order)), draw(generators(9))
    key, value = (summed(groups, case, t.shape[-1], generator, case.dtype) for t in (case.key, case.value))
    batch = len(case.batch)
    order = [mode for group in groups for mode in group]
    sizes = [math.prod(case.sizes[mode] for mode in group) for group in groups]

    def joined(tensor: Tensor) -> Tensor:
        dims = [*range(batch), *(batch + mode for mode in order), batch + case.order]
        return tensor.permute(dims).reshape(*case.batch, *sizes, tensor.shape[-1])

    weights = None
    if case.weights is not None:
        device = case.key.device
        wide = torch.float32 if device.type == "mps" else torch.float64
        parts = ([case.mode_weights(mode) for mode in group] for group in groups)
        kron = (functools.reduce(lambda x, y: (x.unsqueeze(-1) * y.unsqueeze(-2)).flatten(-2), part) for part in parts)
        weights = tuple(weight.to(device, wide) for weight in kron)
    case = case.replace(key=key, value=value)
    fewer = case.replace(key=joined(key), value=joined(value), order=len(groups), weights=weights)
    output, lse, _ = called(additive_attention, fewer, return_lse=True)
    expected, expected_lse = attention(case)
    statement = f"with the groups {groups} as modes additive attention must be full attention"
    subject.expect_close(output, expected, case.allowed(), statement, case)
    subject.expect_close(lse, expected_lse, case.allowed_lse, f"{statement} in its log-sum-exp", case)


def additive_keys(subject: Subject, case: Case, draw: Any) -> None:
    """Additive keys, and values of interactions of at most r modes: truncation at r, and its formula in softmaxes."""
    degree, generator = draw(st.integers(1, case.order)), draw(generators(9))
    subsets = tuple(itertools.combinations(range(case.order), degree))
    case = case.replace(value=summed(subsets, case, case.value.shape[-1], generator, case.dtype))
    expected, tolerance = attention(case)[0], 2**case.order * case.allowed()
    output = called(truncated_attention, case, interaction_order=degree)
    statement = f"truncation at {degree} must be exact for additive keys and values of that order"
    subject.expect_close(output, expected, tolerance, statement, case)
    law = product(called(additive_attention, case, return_attention=True).attention, case)
    counts = counting_numbers(kept_family(case.order, None, degree))
    means = ((n, mean(case.value, case, kept).expand(case.value.shape)) for kept, n in counts.items() if n)
    formula = sum((n * expectation(law, marginal, case) for n, marginal in means), torch.zeros(()).double())
    statement = f"means of the values of at most {degree} modes must do under the product of softmaxes"
    subject.expect_close(formula, expected, tolerance, statement, case)


def missing_interaction(subject: Subject, case: Case, draw: Any) -> None:
    """Additive keys, any values: full less additive attention is the mean residual under the product of softmaxes."""
    value = numbers(draw(generators(9)), case.value.shape, case.dtype).to(case.value.device)
    case = case.replace(value=value)
    output, _, weights = called(additive_attention, case, return_attention=True)
    residual = interaction_residual(exact(value), order=case.order, weights=_on_cpu(case))
    missing = torch.from_numpy(attention(case)[0]) - exact(output)
    expected = expectation(product(weights, case), residual, case)
    statement = "with additive keys the error must be the mean interaction residual of the values"
    # Both are differences of outputs, which are as large as values.
    tolerance = 4 * case.order * case.allowed()
    subject.expect_close(missing, expected, tolerance, statement, case, size=case.magnitude)


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


def overlapping_groups(subject: Subject, case: Case, draw: Any) -> None:
    """Pairs of modes that share the first: additive attention at each index of it, merged by log-sum-exps.

    Of the means alone no formula is exact there, since the log-sum-exp of a mean is not its mean.
    """
    pairs, generator = [(0, mode) for mode in range(1, case.order)], draw(generators(9))
    key, value = (summed(pairs, case, t.shape[-1], generator, case.dtype) for t in (case.key, case.value))
    case = case.replace(key=key, value=value)
    weights = None if case.weights is None else case.weights[1:]
    outputs, lses = [], []
    for index, weight in enumerate(case.mode_weights(0).unbind(-1)):
        parts = {name: getattr(case, name).select(len(case.batch), index) for name in ("key", "value")}
        slice_of = case.replace(**parts, order=case.order - 1, weights=weights)
        output, lse, _ = called(additive_attention, slice_of, return_lse=True)
        outputs.append(exact(output))
        lses.append(exact(lse) + for_queries(weight.log().unsqueeze(-1), case).squeeze(-1))
    shares = torch.softmax(torch.stack(lses), 0).unsqueeze(-1)
    expected, expected_lse = attention(case)
    # A share errs by as much as its log-sum-exp.
    tolerance = case.allowed() + 2 * case.allowed_lse * case.magnitude
    statement = "additive attention at each index of the shared mode, merged, must be full attention"
    subject.expect_close((shares * torch.stack(outputs)).sum(0), expected, tolerance, statement, case)
    merged = torch.logsumexp(torch.stack(lses), 0)
    subject.expect_close(merged, expected_lse, case.allowed_lse, f"{statement} in its log-sum-exp", case)


def orthogonal_channels(subject: Subject, case: Case, draw: Any) -> None:
    """Queries and keys in which each mode has channels of its own, then rotated; any values."""
    case, logit = _in_own_channels(case, draw)
    tolerance = allowed("output", case.dtype, logit=logit, magnitude=case.magnitude)
    statement = "where modes live in orthogonal channels the Kronecker product must be full attention"
    subject.expect_close(called(kronecker_product_attention, case), attention(case)[0], tolerance, statement, case)


def orthogonal_outer_sums(subject: Subject, case: Case, draw: Any) -> None:
    """The same queries and keys, and additive values: averaged queries do, with one softmax a mode."""
    case, logit = _in_own_channels(case, draw)
    modes = [(mode,) for mode in range(case.order)]
    case = case.replace(value=summed(modes, case, case.value.shape[-1], draw(generators(10)), case.dtype))
    output = called(kao_qkv, case, centered=True)
    tolerance = (2 * case.order - 1) * allowed("output", case.dtype, logit=logit, magnitude=case.magnitude)
    statement = "where modes live in orthogonal channels centred outer sums must be full attention to additive values"
    subject.expect_close(output, attention(case)[0], tolerance, statement, case)


def _in_own_channels(case: Case, draw: Any) -> tuple[Case, float]:
    """Give each mode channels of its own in queries and keys, then rotate, with a logit that bounds what is rounded."""
    generator, widths = draw(generators(9)), [draw(st.integers(1, 3)) for _ in case.sizes]

    def blocks() -> Tensor:
        parts = []
        for mode, (size, width) in enumerate(zip(case.sizes, widths, strict=True)):
            shape = [*case.batch, *(size if m == mode else 1 for m in range(case.order)), width]
            parts.append(numbers(generator, shape).expand(*case.batch, *case.sizes, width))
        return torch.cat(parts, -1)

    rotation = torch.linalg.qr(numbers(generator, (sum(widths), sum(widths)))).Q
    query, key = ((blocks() @ rotation).to(case.key) for _ in range(2))
    # Rotated channels are rounded, which moves a logit by a part of |q| |k|, however small the logit is.
    case = case.replace(query=query, key=key, scale=min(abs(case.factor), 1.0))
    return case, case.factor * largest(exact(query).norm(dim=-1)) * largest(exact(key).norm(dim=-1))


def symmetric_modes(subject: Subject, case: Case, draw: Any) -> None:
    """Tensors that do not change when modes are swapped, and operators that treat all modes alike."""
    widest = next((size for size in range(6, 2, -1) if size**case.order <= SYMMETRIC), 2)
    size, generator, batch = draw(st.integers(2, widest)), draw(generators(9)), len(case.batch)
    # Every index in ascending order: what is read there is the same for all orders of an index.
    index = torch.cartesian_prod(*[torch.arange(size)] * case.order).sort(-1).values
    place = (index * size ** torch.arange(case.order)).sum(-1)

    def symmetric(tensor: Tensor) -> Tensor:
        grid = (*case.batch, *[size] * case.order, tensor.shape[-1])
        drawn = numbers(generator, (*case.batch, len(place), tensor.shape[-1]), case.dtype)
        return drawn[..., place, :].reshape(grid).to(case.key.device)

    tensors = {name: symmetric(getattr(case, name)) for name in ("query", "key", "value")}
    alike = at_most(case.replace(**tensors), LARGEST_LOGIT.get(case.dtype, 1.0))
    for function in (additive_attention, kao_kv, kao_qkv, truncated_attention, kronecker_product_attention):
        output = called(function, alike)
        tolerance = 2**case.order * alike.allowed(largest(output))
        for mode in range(batch, batch + case.order - 1):
            statement = f"{function.__name__} of tensors that are symmetric in all modes must be symmetric"
            subject.expect_close(output, output.transpose(mode, mode + 1), tolerance, statement, alike)


def _two_modes_at_least(**supposed: Any) -> Callable[[Asked, Subject], Any]:
    """Return where cases come from that have two modes or more, whatever the user asks for."""

    def strategy(asked: Asked, subject: Subject) -> Any:
        order = None if asked.order is None else max(2, asked.order)
        return cases(**{**asked.cases, "order": order}, min_order=2, **supposed)

    return strategy


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
        "additive attention is exact with independent groups of modes as its modes",
        "A over groups = F where k, v = Σ_g a^g[j_g]",
        groups_as_modes,
        drawn_cases(max_positions=40),
    ),
    Statement(
        "where pairs of modes share one, additive attention at each of its indices merges to full attention",
        "F = Σ_a P(a) A(q; k[a], v[a]), P(a) ∝ e^(LSE_a), k, v = Σ_m a^m[j_0, j_m]",
        overlapping_groups,
        _two_modes_at_least(max_positions=40),
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
    Statement(
        "centred averaged queries are exact where modes live in orthogonal channels, for additive values",
        "Σ_m A(Q^m) − (N−1) A(q̄) = F",
        orthogonal_outer_sums,
        drawn_cases(on_grid=True, max_positions=36),
    ),
    Statement(
        "tensors that are symmetric in all modes have symmetric outputs",
        "x[π j] = x[j]: O[π j] = O[j]",
        symmetric_modes,
        _two_modes_at_least(on_grid=True, max_positions=36, weighted=False),
    ),
)
