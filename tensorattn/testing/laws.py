"""The laws of operators: what every operator has, what it has if it claims it, and checking all of it."""

from __future__ import annotations

import contextlib
import itertools
import math
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError, gradcheck, gradgradcheck
from torch.nn.attention import SDPBackend, sdpa_kernel

from tensorattn.functional import Claim
from tensorattn.testing import reference
from tensorattn.testing.check import Checkable, Comparison, Comparisons, Draw, Law, Subject, holds, law, resolve
from tensorattn.testing.strategies import (
    LARGEST_LOGIT,
    Case,
    allowed,
    biases,
    epsilon,
    exact,
    generators,
    largest,
    masks,
    numbers,
    rows,
    tensors,
    weights,
)

__all__ = [
    "CLAIMED",
    "UNIVERSAL",
    "along_queries",
    "check_causal",
    "check_constant_mode",
    "check_convex",
    "check_equals_flattened",
    "check_equals_flattened_on_additive",
    "check_equals_reference",
    "check_finite",
    "check_first_order_law",
    "check_gradients",
    "check_invisible_interaction",
    "check_key_shift",
    "check_log_sum_exp",
    "check_masks",
    "check_operator",
    "check_order_one",
    "check_permutation_equivariance",
    "check_positions",
    "check_precision",
    "check_refinement",
    "check_rotation",
    "check_scale_exchange",
    "check_value_affine",
    "check_weights_are_multiplicities",
    "check_zero_scale_mean",
    "checks_of",
    "full_attention",
    "marginal_covariance",
    "slope",
]

MODEST_LOGIT = 5.0  # finite differences lose digits for larger ones
FAR_LOGIT = 1e4  # the largest logit that must not overflow
FAR_VALUE = 4e3  # 48 such values add up to more than float16 holds, though their mean is far from that
FLOOR = 8  # units of the type that is accumulated in; 1.4 were reached
POISON = (1e6, math.inf, math.nan)  # what absent positions hold


def full_attention(case: Case, **how: Any) -> tuple[Tensor, Tensor]:
    """Return full attention by definition, the truth that everything is compared with, and its log-sum-exp.

    Args:
        case: Arguments.
        **how: More arguments.
    """
    tensors, named = case.given(**how)
    with torch.no_grad():
        output, lse = reference.attention("flattened", *tensors, **named)
    assert lse is not None
    return output, lse


def marginal_covariance(case: Case, kept: Sequence[int]) -> Tensor:
    """Return the weighted covariance of the means of values and keys over all modes but the kept ones.

    Args:
        case: Values, keys and weights.
        kept: Modes, ascending; all of them for the covariance of the values and keys themselves.

    Returns:
        Float64 ``(*batch, D_v, D)``.
    """
    batch = len(case.batch)
    told: dict[str, Any] = {"order": case.order, "weights": case.all_weights()}

    def centred(tensor: Tensor) -> Tensor:
        means = reference.marginal_mean(exact(tensor), tuple(kept), **told)
        means = means.reshape(*case.batch, -1, means.shape[-1])
        return means - reference.marginal_mean(exact(tensor), (), **told).unsqueeze(-2)

    dropped = [batch + mode for mode in range(case.order) if mode not in kept]
    share = case.position_weights()
    share = (share.sum(dropped) if dropped else share).reshape(*case.batch, -1, 1)
    return (share / share.sum(-2, keepdim=True) * centred(case.value)).mT @ centred(case.key)


def along_queries(case: Case, matrix: Tensor) -> Tensor:
    """Apply a matrix ``(*batch, D_v, D)`` to every query.

    Args:
        case: Queries.
        matrix: The matrix.

    Returns:
        Float64 ``(*batch, *positions, D_v)``.
    """
    return (rows(exact(case.query), len(case.batch)) @ matrix.mT).reshape(*case.query.shape[:-1], matrix.shape[-2])


def slope(case: Case, expected: Tensor, draw: Draw, told: str, output: Callable[[Case], Tensor]) -> Comparison:
    """Compare the derivative of an output by the scale, at scale zero, with what it should be.

    The scale only ever multiplies queries, so that is the derivative along the queries at zero; it is taken by
    reverse-mode differentiation against a random cotangent.

    Args:
        case: Arguments.
        expected: What the derivative should be, float64 ``(*batch, *positions, D_v)``.
        draw: Source of the cotangent.
        told: What is checked, a clause.
        output: From a case to the output.
    """
    query = torch.zeros_like(case.query, memory_format=torch.contiguous_format, requires_grad=True)
    cotangent = numbers(draw(generators(3)), expected.shape)
    made = output(case.replace(query=query, scale=1.0))
    (gradient,) = torch.autograd.grad(made, query, cotangent.to(made), allow_unused=True)
    found = torch.zeros(()) if gradient is None else (exact(gradient) * exact(case.query)).sum()
    reach = float((cotangent.abs().sum(-1) * exact(case.query).abs().sum(-1)).sum())
    tolerance = allowed("slope", case.dtype, magnitude=reach * case.magnitude * largest(case.key))
    return Comparison(told, found, (cotangent * expected).sum(), tolerance)


def _where_present(case: Case, made: Comparison) -> Comparison:
    """Put zeros where results are over the grid of the keys, at positions that are absent: there may be anything."""
    if not case.on_grid:
        return made
    absent = (case.position_weights() == 0).unsqueeze(-1)
    found, expected = (exact(result).masked_fill(absent, 0.0) for result in (made.found, made.expected))
    return made._replace(found=found, expected=expected)


# What every operator has.


@law("equals its definition, written in float64 for one query after the other", "torch = definition", empty=True)
def check_equals_reference(subject: Subject, case: Case, draw: Draw) -> Comparisons:
    """Check that an operator of this package equals its definition, with its log-sum-exp wherever that has one."""
    yield from _defined(subject, case)


def _defined(subject: Subject, case: Case, more: float = 1.0, **how: Any) -> Comparisons:
    """Compare with the definition; what is added to logits makes ``more`` rounding."""
    expected, expected_lse = subject.definition(case, **how)
    asked = {"return_lse": True} if expected_lse is not None else {}
    output = subject.called(case, **asked, **how)
    if expected_lse is not None:
        output, lse = output
        yield Comparison("the log-sum-exp must equal its definition", lse, expected_lse, case.allowed_lse * more)
    yield Comparison("the output must equal its definition", output, expected, case.allowed(largest(expected)) * more)


@law("sees a position by the biases of its modes, and no frame after its own", "= definition with b_m, t", on_grid=True)
def check_positions(subject: Subject, case: Case, draw: Draw) -> Comparisons:
    """Check that an operator of this package equals its definition with a bias by position, along a causal mode."""
    how: dict[str, Any] = {}
    if draw(st.booleans()):
        how["causal"] = draw(st.integers(0, case.order - 1))
    bias = draw(biases(case.sizes, case.positions, batch=case.batch, dtype=case.dtype, device=case.key.device))
    named = {mode for subset in subject.options.get("kept") or [range(case.order)] for mode in subset}
    how["bias"] = [part if mode in named else None for mode, part in enumerate(bias)]
    more = 2 + sum(largest(part) for part in bias if part is not None)
    yield from _defined(subject, case, more, **how)


@law("causal attention sees nothing of later frames, whatever the data", "∂O[i] / ∂x_j = 0 for j_t > i_t, to the bit",
     on_grid=True, max_positions=32)  # fmt: skip
def check_causal(subject: Subject, case: Case, draw: Draw) -> Comparisons:
    """Check that earlier outputs are the same to the last bit whatever stands in later frames."""
    causal = draw(st.integers(0, case.order - 1))
    frame = draw(st.integers(0, case.sizes[causal] - 1))
    later = (torch.arange(case.sizes[causal]) > frame).reshape(-1, *(1 for _ in range(case.order - causal)))
    later = later.to(case.key.device)
    anything = _fitting(draw(st.sampled_from(POISON)), case.dtype)
    key, value = (torch.empty(t.shape, dtype=t.dtype, device=t.device).copy_(t) for t in (case.key, case.value))
    both = [case.replace(key=key, value=value)]  # laid out alike, so that both are read alike
    both.append(case.replace(key=key.masked_fill(later, anything), value=value.masked_fill(later, -anything)))
    before, after = (
        subject.called(each, causal=causal).narrow(len(case.batch) + causal, 0, frame + 1) for each in both
    )
    yield Comparison(f"nothing must leak from frames of mode {causal} after {frame}", after, before)


@law("is attention where there is a single mode", "N = 1: O = F", order=1, empty=True)
def check_order_one(subject: Subject, case: Case, draw: Draw) -> Comparisons:
    """Check that an operator is plain attention, on any data, where there is a single mode.

    With the token at the query's own position once more, if it has an option for that.
    """
    yield from _equals_flattened(subject, case, "at order 1 the output must equal attention")


@law("weights are multiplicities: 2 repeats an index, 0 leaves it out", "O(w) = O(j repeated w_j times)",
     integer=True, max_positions=16)  # fmt: skip
def check_weights_are_multiplicities(subject: Subject, case: Case, draw: Draw) -> Comparisons:
    """Check that whole weights act as repeating indices, and zeros as cropping them: nothing leaks from what is absent.

    Each batch entry is compared with the operator on a tensor that is really repeated and cropped, without weights.
    What is absent holds large numbers, in operators of this package infinities and NaN too.
    """
    absent = (case.position_weights() == 0).to(case.key.device).unsqueeze(-1)
    poison = _fitting(draw(st.sampled_from(POISON if subject.defined else POISON[:1])), case.dtype)
    key, value = (tensor.masked_fill(absent, poison) for tensor in (case.key, case.value))
    query = case.query.masked_fill(absent, poison) if case.on_grid else case.query
    full = case.replace(query=query, key=key, value=value)
    output, lse = subject.with_lse(full)
    told = "weights must act as repetition and cropping"
    for b in itertools.product(*map(range, case.batch)):
        counts = [case.mode_weights(mode)[b].long() for mode in range(case.order)]
        single = case.replace(
            query=_repeated(case.query[b], counts) if case.on_grid else case.query[b],
            key=_repeated(case.key[b], counts),
            value=_repeated(case.value[b], counts),
            weights=None,
        )
        found = _repeated(output[b], counts) if case.on_grid else output[b]
        expected, expected_lse = subject.with_lse(single)
        yield Comparison(told, found, expected, case.allowed())
        if lse is not None and expected_lse is not None and not case.on_grid:
            yield Comparison(f"{told} in the log-sum-exp", lse[b], expected_lse, case.allowed_lse)


def _fitting(poison: float, dtype: torch.dtype) -> float:
    """Return what absent positions hold, as large as the type allows."""
    return min(poison, torch.finfo(dtype).max / 8) if math.isfinite(poison) else poison


def _repeated(tensor: Tensor, counts: list[Tensor]) -> Tensor:
    """Repeat the indices of each mode of ``(n_1, …, n_N, D)`` as often as told."""
    for mode, count in enumerate(counts):
        tensor = tensor.repeat_interleave(count.to(tensor.device), dim=mode)
    return tensor


@law("what a mask leaves out is absent, whatever it holds: to outputs and to gradients", "O(x; mask) = O(0; mask)",
     weighted=False, max_positions=32)  # fmt: skip
def check_masks(subject: Subject, case: Case, draw: Draw) -> Comparisons:
    """Check that no number in a position that a mask leaves out reaches an output or a gradient.

    An operator of this package equals its definition, too.
    """
    mask = draw(masks(case.sizes, batch=case.batch, device=case.key.device))
    wanted = numbers(draw(generators(5)), (*case.query.shape[:-1], case.value.shape[-1]), case.dtype)
    gone, own_queries = ~mask.unsqueeze(-1), case.on_grid and not subject.options.get("include_self")
    found = []
    for filled in (0.0, draw(st.sampled_from([-math.inf, *POISON[1:]]))):
        query = case.query.masked_fill(gone, filled) if own_queries else case.query
        parts = (query, case.key.masked_fill(gone, filled), case.value.masked_fill(gone, filled))
        leaves = [part.detach().requires_grad_() for part in parts]
        output = subject.called(case.replace(query=leaves[0], key=leaves[1], value=leaves[2]), mask=mask)
        gradients = torch.autograd.grad(output, leaves, wanted.to(output), allow_unused=True)
        found.append([output, *(t if g is None else g for t, g in zip(leaves, gradients, strict=True))])
    for name, plain, poisoned in zip(
        ("output", "gradient of the query", "gradient of the key", "gradient of the value"), *found, strict=True
    ):
        yield Comparison(f"no absent position must reach the {name}", poisoned, plain)
    if subject.defined is not None:
        yield from _defined(subject, case, mask=mask)


@law("treats indices, modes, batch entries and queries alike, whatever their order", "O(π x) = π O(x)")
def check_permutation_equivariance(subject: Subject, case: Case, draw: Draw) -> Comparisons:
    """Check that permuting indices, modes, batch entries or queries does nothing but permute.

    Reordering the indices of each mode, or the modes themselves, leaves the output for given queries as it is, and
    permutes it for queries on the grid of the keys, unless it matters where a position stands. Batch entries, and
    queries that need no grid, do not see each other: any selection of them gives that selection of the output. Where
    the option ``kept`` names modes, it is reordered with them.
    """
    output, batch, given = subject.called(case), len(case.batch), case.weights
    tolerance = case.allowed(largest(output))

    def compared(
        told: str, change: Callable[[Tensor], Tensor], weights: Any, how: dict[str, Any] | None = None
    ) -> Comparison:
        query, expected = (change(t) if case.on_grid else t for t in (case.query, output))
        changed = case.replace(query=query, key=change(case.key), value=change(case.value), weights=weights)
        return Comparison(told, subject.called(changed, **(how or {})), expected, tolerance)

    if not subject.by_place:
        orders = [torch.tensor(draw(st.permutations(range(size))), device=case.key.device) for size in case.sizes]
        told = "permuting the indices of the modes must only permute the output"
        pairs = zip(given or (), orders, strict=False)
        permuted = (
            None if given is None else tuple(None if w is None else w.index_select(-1, order) for w, order in pairs)
        )
        yield compared(told, lambda t: _selected(t, orders, batch), permuted)

        modes = draw(st.permutations(range(case.order)))
        dims = [*range(batch), *(batch + mode for mode in modes), batch + case.order]
        kept, how = subject.options.get("kept"), {}
        if kept is not None:
            how["kept"] = tuple(tuple(modes.index(mode) for mode in subset) for subset in kept)
        told = "reordering the modes must only reorder the output"
        yield compared(told, lambda t: t.permute(dims), None if given is None else tuple(given[m] for m in modes), how)

    picks = [torch.tensor(draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=3))) for n in case.batch]
    picks = [pick.to(case.key.device) for pick in picks]
    query, key, value, expected = (_selected(t, picks, 0) for t in (case.query, case.key, case.value, output))
    wide = None if given is None else tuple(
        None if w is None else _selected(w.expand(*case.batch, w.shape[-1]), picks, 0) for w in given
    )  # fmt: skip
    chosen = case.replace(query=query, key=key, value=value, weights=wide)
    yield Comparison("batch entries must not see each other", subject.called(chosen), expected, tolerance)

    if not case.on_grid:
        query, expected = case.query, output
        for size in case.positions:
            index = draw(st.integers(0, size - 1))
            query, expected = query.select(batch, index), expected.select(batch, index)
        alone = subject.called(case.replace(query=query))
        yield Comparison("queries must not see each other", alone, expected, tolerance)


def _selected(tensor: Tensor, picks: Sequence[Tensor], start: int) -> Tensor:
    """Take indices of dimensions that follow each other."""
    for dim, index in enumerate(picks, start):
        tensor = tensor.index_select(dim, index)
    return tensor


@law("scaling the queries up and the scale down changes nothing", "O(c q, s / c) = O(q, s)")
def check_scale_exchange(subject: Subject, case: Case, draw: Draw) -> Comparisons:
    """Check that c times the queries with the c-th part of the scale change nothing."""
    power = 2.0 ** draw(st.integers(-4, 4))
    exchanged, before = case.replace(query=case.query * power, scale=case.factor / power), subject.called(case)
    told = "scaling the queries up and the scale down must change nothing"
    yield Comparison(told, subject.called(exchanged), before, case.allowed(largest(before)))


@law("first and second derivatives are those of the output", "∂O, ∂²O = finite differences",
     share=0.15, double=True, dtype=torch.float64, max_positions=6, max_dim=2)  # fmt: skip
def check_gradients(subject: Subject, case: Case, draw: Draw) -> Comparisons:
    """Check the gradients of query, key and value, and their gradients, against finite differences in float64.

    Second derivatives are checked with the written-out kernel of torch, as its fused kernels have none.
    """
    case = case.at_most(MODEST_LOGIT)
    parts = (case.query, case.key, case.value)
    leaves = [t.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for t in parts]

    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return subject.called(case.replace(query=query, key=key, value=value))

    for told, test, kernels in (
        ("the gradient must be that of the output", gradcheck, contextlib.nullcontext()),
        ("the second derivative must be that of the output", gradgradcheck, sdpa_kernel(SDPBackend.MATH)),
    ):
        found = ""
        try:
            with warnings.catch_warnings(), kernels:
                warnings.simplefilter("ignore", UserWarning)
                test(function, leaves)
        except GradcheckError as cause:
            found = f"gradcheck finds: {' '.join(str(cause).split())}"
        yield holds(told, not found, found)


@law("is as precise as attention written out in the same type", "|O − O_64| ≤ 2 |F − F_64| + floor",
     default=torch.float32, share=0.5, max_positions=64)  # fmt: skip
def check_precision(subject: Subject, case: Case, draw: Draw) -> Comparisons:
    r"""Check that the error is at most twice that of attention written out in the same type, plus a floor.

    Both errors are against float64 on the same numbers: that of the operator against its definition, or against itself
    where it has none; that of full attention, by its formula, against the same formula. The floor is one unit of half
    precision for the rounding of the result, and eight units :math:`\varepsilon\, (1 + L)\, M` of the type that half
    precision is accumulated in, float32.
    """
    double = case.replace(query=exact(case.query), key=exact(case.key), value=exact(case.value))
    truth = subject.called(double) if subject.defined is None else subject.definition(case)[0]
    yardstick = largest(exact(_dense(case)) - _dense(double))
    magnitude = max(case.magnitude, largest(truth))
    accumulated = torch.float32 if case.dtype.itemsize < 4 else case.dtype
    floor = FLOOR * epsilon(accumulated) * (1 + case.logit) * magnitude
    floor += epsilon(case.dtype) * magnitude if accumulated is not case.dtype else 0.0
    told = f"the error in {case.dtype} must be at most twice that of attention written out"
    yield Comparison(told, subject.called(case), truth, 2 * yardstick + floor)


def _dense(case: Case) -> Tensor:
    """Return full attention in the type of a case, by the formula: softmax of the logits, times the values."""
    batch = len(case.batch)
    query, key, value = (rows(tensor, batch) for tensor in (case.query, case.key, case.value))
    bias = case.position_weights().flatten(batch).log()
    logits = query @ key.mT * case.factor + bias.to(query).unsqueeze(-2)
    return (torch.softmax(logits, -1) @ value).reshape(*case.query.shape[:-1], -1)


@law("no result and no gradient is infinite or NaN", "|O|, |∂O| < ∞ at logits of 10⁴", empty=True)
def check_finite(subject: Subject, case: Case, draw: Draw) -> Comparisons:
    """Check that output and gradients are finite for logits up to ten thousand and values in the thousands.

    A batch entry may be without any position. Values are large enough that their sum overflows float16 where their
    mean does not.
    """
    value = case.value + (FAR_VALUE - case.magnitude)
    far = case.replace(value=value, scale=case.factor * FAR_LOGIT / case.logit if case.logit else case.scale)
    leaves = [tensor.detach().requires_grad_() for tensor in (far.query, far.key, far.value)]
    output = subject.called(far.replace(query=leaves[0], key=leaves[1], value=leaves[2]))
    (output.to(torch.promote_types(case.dtype, torch.float32)) / FAR_VALUE).sum().backward()
    gradients = zip(("gradient of the query", "gradient of the key", "gradient of the value"), leaves, strict=True)
    for name, tensor in [("output", output), *((name, leaf.grad) for name, leaf in gradients)]:
        if tensor is not None:
            bad = int((~tensor.isfinite()).sum())
            yield holds(f"the {name} must be finite", not bad, f"{bad} of {tensor.numel()} numbers are not")


# What some claim.


@law(Claim.EXACT, "O = F = Σ_j softmax_j(s q·k_j) v_j", empty=True)
def check_equals_flattened(subject: Subject, case: Case, draw: Draw) -> Comparisons:
    """Check that an operator equals full attention on any data."""
    yield from _equals_flattened(subject, case, "the output must equal flattened attention")


@law(Claim.EXACT_ON_ADDITIVE, "Σ_m Attn_m − (N−1)v̄ = F where k_j = Σ_m κ^m[j_m], v_j = Σ_m ν^m[j_m]", additive=True)
def check_equals_flattened_on_additive(subject: Subject, case: Case, draw: Draw) -> Comparisons:
    """Check that an operator equals full attention on keys and values that are sums of one term a mode.

    For every query, on the grid or not, with position weights that are products over modes, and including the
    log-sum-exp if the operator claims one. The logits are then additive, so the softmax over the grid is the product of
    softmaxes over modes, and the mean of additive values under a product is the sum of means under its factors.
    """
    yield from _equals_flattened(subject, case, "on additive keys and values the output must equal flattened attention")


def _equals_flattened(subject: Subject, case: Case, told: str) -> Comparisons:
    """Compare with full attention, and the log-sum-exps if the subject claims one."""
    own = bool(subject.options.get("include_self")) and case.order == 1
    expected, expected_lse = full_attention(case, include_self=own)
    output, lse = subject.with_lse(case)
    if lse is not None:
        yield Comparison(f"{told} in its log-sum-exp", lse, expected_lse, case.allowed_lse)
    yield Comparison(told, output, expected, case.allowed())


@law(Claim.KEY_SHIFT, "O(k + c) = O(k), LSE + s q·c")
def check_key_shift(subject: Subject, case: Case, draw: Draw) -> Comparisons:
    r"""Check that keys :math:`k + c` give what k gives, c being constant over positions.

    All logits of a query change by the same :math:`s\, q \cdot c`, which the log-sum-exp, if claimed, has to follow.
    """
    shape = (*case.batch, *(1 for _ in case.sizes), case.key.shape[-1])
    shift = numbers(draw(generators(3)), shape, case.dtype, addable=True)
    shifted = case.replace(key=case.key + shift.to(case.key.device))
    (before, lse), (after, moved) = subject.with_lse(case), subject.with_lse(shifted)
    if lse is not None and moved is not None:
        constant = case.for_queries(exact(shift).reshape(*case.batch, -1))
        follow = exact(lse) + case.factor * (exact(case.query) * constant).sum(-1)
        told = "adding a constant c to all keys must add s q·c to the log-sum-exp"
        yield Comparison(told, moved, follow, max(case.allowed_lse, shifted.allowed_lse))
    magnitude = largest(before)
    told = "adding a constant to all keys must change nothing"
    yield Comparison(told, after, before, max(case.allowed(magnitude), shifted.allowed(magnitude)))


@law(Claim.VALUE_AFFINE, "O(v W + b) = O(v) W + b")
def check_value_affine(subject: Subject, case: Case, draw: Draw) -> Comparisons:
    """Check that values ``v W + b`` give the output ``o W + b``: the weights of the values sum to one."""
    generator, dim = draw(generators(3)), draw(st.integers(1, 4))
    matrix, offset = (numbers(generator, shape) for shape in ((case.value.shape[-1], dim), (dim,)))
    mapped = case.replace(value=(exact(case.value) @ matrix + offset).to(case.value))
    before, after = subject.called(case), subject.called(mapped)
    expected = exact(before) @ matrix + offset
    tolerance = case.allowed(largest(before)) * float(matrix.abs().sum(0).max()) + mapped.allowed(largest(expected))
    told = "an affine map of the values must be the same map of the output"
    yield _where_present(case, Comparison(told, after, expected, tolerance))


@law(Claim.ROTATION, "O(q R, k R) = O(q, k), R Rᵀ = 1")
def check_rotation(subject: Subject, case: Case, draw: Draw) -> Comparisons:
    """Check that an orthogonal map of the channels of queries and keys changes nothing: only products count."""
    dim = case.key.shape[-1]
    rotation = torch.linalg.qr(numbers(draw(generators(3)), (dim, dim))).Q
    query, key = exact(case.query), exact(case.key)
    rotated = case.replace(query=(query @ rotation).to(case.query), key=(key @ rotation).to(case.key))
    before = subject.called(case)
    # Rotated channels are rounded, which moves a logit by a part of |q| |k|, however small the logit is.
    bound = abs(case.factor) * largest(query.norm(dim=-1)) * largest(key.norm(dim=-1))
    tolerance = allowed("output", case.dtype, logit=bound, magnitude=max(case.magnitude, largest(before)))
    told = "rotating the channels of queries and keys together must change nothing"
    yield Comparison(told, subject.called(rotated), before, tolerance)


@law(Claim.FIRST_ORDER, "dO/ds at s = 0 is C_vk q = dF/ds")
def check_first_order_law(subject: Subject, case: Case, draw: Draw) -> Comparisons:
    r"""Check that the derivative of the output by the scale, at scale zero, is that of full attention.

    .. math:: \frac{\partial}{\partial s} F(q) \Big|_{s = 0} = C_{vk}\, q, \qquad
        C_{vk} = \sum_j w_j (v_j - \bar v)(k_j - \bar k)^\top \Big/ \sum_j w_j
    """
    expected = along_queries(case, marginal_covariance(case, range(case.order)))
    told = "the derivative by the scale at zero must be that of full attention"
    yield slope(case, expected, draw, told, subject.called)


@law(Claim.CONSTANT_MODE, "O(k ⊗ 1, v ⊗ 1) = O(k, v)", max_positions=24)
def check_constant_mode(subject: Subject, case: Case, draw: Draw) -> Comparisons:
    """Check that a mode along which keys and values are constant, of size one or more, can be left out.

    It may be weighted. The log-sum-exp, if claimed, counts its positions. Queries on the grid are constant along it.
    """
    mode, size = draw(st.integers(0, case.order)), draw(st.integers(1, 4))
    dim, extra = len(case.batch) + mode, draw(weights((size,), device=case.key.device))
    own = None if extra is None else extra[0]
    given = (None,) * case.order if case.weights is None else case.weights
    wider = None if case.weights is None and extra is None else (*given[:mode], own, *given[mode:])

    def stretched(tensor: Tensor) -> Tensor:
        return tensor.unsqueeze(dim).expand(*tensor.shape[:dim], size, *tensor.shape[dim:])

    larger = case.replace(key=stretched(case.key), value=stretched(case.value), order=case.order + 1, weights=wider)
    count = size if own is None else float(exact(own).sum())
    told = "a mode along which keys and values are constant must have no effect"
    yield from _same(subject, case, larger, stretched, math.log(count), told)


@law(Claim.REFINEMENT, "each index r times: O same, LSE + log r", max_positions=24)
def check_refinement(subject: Subject, case: Case, draw: Draw) -> Comparisons:
    """Check that repeating every index of one mode equally often changes nothing but the number of positions."""
    mode, times = draw(st.integers(0, case.order - 1)), draw(st.integers(2, 3))

    def repeated(tensor: Tensor) -> Tensor:
        return tensor.repeat_interleave(times, dim=len(case.batch) + mode)

    finer = None
    if case.weights is not None:
        finer = tuple(
            w if w is None or m != mode else w.repeat_interleave(times, -1) for m, w in enumerate(case.weights)
        )
    larger = case.replace(key=repeated(case.key), value=repeated(case.value), weights=finer)
    told = "repeating every index of a mode equally often must have no effect"
    yield from _same(subject, case, larger, repeated, math.log(times), told)


def _same(
    subject: Subject, case: Case, larger: Case, enlarge: Callable[[Tensor], Tensor], log_count: float, told: str
) -> Comparisons:
    """Compare a larger tensor with the smaller one that it stands for."""
    larger = larger.replace(query=enlarge(case.query)) if case.on_grid else larger
    (before, lse), (after, moved) = subject.with_lse(case), subject.with_lse(larger)
    if lse is not None and moved is not None and not case.on_grid:
        counted = f"{told} but to count the positions in the log-sum-exp"
        yield Comparison(counted, moved, exact(lse) + log_count, case.allowed_lse)
    yield Comparison(told, after, enlarge(before) if case.on_grid else before, case.allowed(largest(before)))


@law(Claim.INVISIBLE_INTERACTION, "O(k + R) = O(k) if all slice means of R are 0")
def check_invisible_interaction(subject: Subject, case: Case, draw: Draw) -> Comparisons:
    """Check that adding an interaction, whose mean over every slice is zero, to keys and values changes nothing.

    Queries are left as they are.
    """
    generator = draw(generators(3))

    def disturbed(tensor: Tensor) -> Tensor:
        noise = 3 * numbers(generator, tensor.shape)
        additive = reference.additive_part(noise, order=case.order, weights=case.all_weights())
        return (exact(tensor) + noise - additive).to(tensor)

    with_interaction = case.replace(key=disturbed(case.key), value=disturbed(case.value))
    tolerance = max(case.allowed(), with_interaction.allowed())
    told = "the interaction residual of keys and values must have no effect"
    yield Comparison(told, subject.called(with_interaction), subject.called(case), tolerance)


@law(Claim.CONVEX, "min_j v_j ≤ O ≤ max_j v_j")
def check_convex(subject: Subject, case: Case, draw: Draw) -> Comparisons:
    """Check that every channel of the output lies between the smallest and the largest value of present positions."""
    yield _within(subject, case)
    # The hardest case: only the position of the least logit of a query has another value, and each mode avoids it.
    reach = min(draw(st.sampled_from([1.0, 3.0, 10.0, 100.0])), LARGEST_LOGIT.get(case.dtype, 1.0))
    scale = abs(case.factor) * reach / case.logit if case.logit else case.scale
    batch = len(case.batch)
    query, key = rows(exact(case.query), batch), rows(exact(case.key), batch)
    logits = (query[..., :1, :] @ key.mT)[..., 0, :]
    absent = case.position_weights().flatten(batch) == 0
    least = logits.masked_fill(absent, math.inf).argmin(-1, keepdim=True)
    value = torch.ones_like(logits).scatter(-1, least, 0.0).reshape(*case.batch, *case.sizes, 1)
    yield _within(subject, case.replace(value=value.expand(case.value.shape).to(case.value), scale=scale))


def _within(subject: Subject, case: Case) -> Comparison:
    """Compare the output with the range of the values of present positions."""
    output, value = exact(subject.called(case)), exact(case.value)
    dims = [len(case.batch) + mode for mode in range(case.order)]
    absent = (case.position_weights() == 0).unsqueeze(-1)
    low = case.for_queries(value.masked_fill(absent, math.inf).amin(dims))
    high = case.for_queries(value.masked_fill(absent, -math.inf).amax(dims))
    told = "the output must lie within the range of the values"
    return _where_present(case, Comparison(told, output, output.clamp(low, high), case.allowed()))


@law(Claim.ZERO_SCALE_MEAN, "s = 0: O = v̄")
def check_zero_scale_mean(subject: Subject, case: Case, draw: Draw) -> Comparisons:
    """Check that at scale zero, where all logits are zero, every query gets the weighted mean of the values."""
    mean = reference.marginal_mean(exact(case.value), (), order=case.order, weights=case.all_weights())
    output = exact(subject.called(case.replace(scale=0.0)))
    expected = case.for_queries(mean).expand_as(output)
    tolerance = subject.terms(case.order) * allowed("average", case.dtype, magnitude=case.magnitude)
    told = "at scale zero the output must be the mean value"
    yield _where_present(case, Comparison(told, output, expected, tolerance))


@law(Claim.LOG_SUM_EXP, "log Σ_j e^(s q·k_j) = Σ_m LSE_m − (N−1) s q·k̄", additive=True, empty=True)
def check_log_sum_exp(subject: Subject, case: Case, draw: Draw) -> Comparisons:
    r"""Check that the log-sum-exp is :math:`\log \sum_j w_j e^{s\, q \cdot k_j}` on additive keys.

    Output and log-sum-exp then merge with attention to any other set of tokens into attention to the union of both,
    which is checked for none to three more tokens a batch entry.
    """
    output, lse = subject.called(case, return_lse=True)
    told = "the log-sum-exp must be that of the logits"
    yield Comparison(told, lse, full_attention(case)[1], case.allowed_lse)
    count, batch = draw(st.integers(0, 3)), len(case.batch)
    key, value = (
        draw(tensors((*case.batch, count, full.shape[-1]), dtype=case.dtype, device=full.device, stream=stream))
        for stream, full in ((3, case.key), (4, case.value))
    )
    more = case.replace(key=key, value=value, order=1, weights=None)
    counts = torch.cat([case.position_weights().flatten(batch), torch.ones(*case.batch, count)], -1)
    union = more.replace(
        key=torch.cat([rows(case.key, batch), key], -2),
        value=torch.cat([rows(case.value, batch), value], -2),
        weights=(counts,),
    )
    merged, _ = reference.merge_attention([(exact(output), exact(lse)), full_attention(more)])
    # An error of one log-sum-exp moves the share of its part, and so the output by its multiple of the values.
    tolerance = max(case.allowed(more.magnitude), more.allowed(case.magnitude))
    tolerance += max(case.allowed_lse, more.allowed_lse) * (case.magnitude + more.magnitude)
    yield Comparison("the output must merge with other token sets", merged, full_attention(union)[0], tolerance)


# All of it.

UNIVERSAL: tuple[Law, ...] = (
    check_order_one,
    check_weights_are_multiplicities,
    check_permutation_equivariance,
    check_scale_exchange,
    check_gradients,
    check_precision,
    check_finite,
)

CLAIMED: Mapping[Claim, Law] = MappingProxyType(
    {
        Claim.EXACT: check_equals_flattened,
        Claim.EXACT_ON_ADDITIVE: check_equals_flattened_on_additive,
        Claim.KEY_SHIFT: check_key_shift,
        Claim.VALUE_AFFINE: check_value_affine,
        Claim.ROTATION: check_rotation,
        Claim.FIRST_ORDER: check_first_order_law,
        Claim.CONSTANT_MODE: check_constant_mode,
        Claim.REFINEMENT: check_refinement,
        Claim.INVISIBLE_INTERACTION: check_invisible_interaction,
        Claim.CONVEX: check_convex,
        Claim.ZERO_SCALE_MEAN: check_zero_scale_mean,
        Claim.LOG_SUM_EXP: check_log_sum_exp,
    }
)

OTHER_ORDERS = (check_order_one, check_constant_mode)  # what is said of tensors of another order than asked for
OF_ANY_PLACE = (check_order_one, check_weights_are_multiplicities)  # what is said of counts, wherever positions stand
NARROWER = (torch.float32, torch.bfloat16, torch.float16)  # what float64 is narrowed to
LAWS = (check_equals_reference, *CLAIMED.values(), *UNIVERSAL, check_masks, check_causal, check_positions)


def checks_of(operator: Checkable, **options: Any) -> tuple[Law, ...]:
    """List the checks that an operator has to pass.

    Args:
        operator: Name in the registry, an `Operator`, or a function with the signature of `additive_attention`; a
            function that is not registered claims nothing.
        **options: Options of the operator.

    Returns:
        The checks: its definition, if it has one in `tensorattn.testing.reference`; what every operator has; what it
        claims; and for one that is registered masks, and what depends on positions.

    Examples:
        >>> [check.__name__ for check in checks_of("kronecker_sum")][:3]
        ['check_equals_reference', 'check_key_shift', 'check_rotation']
    """
    subject = resolve(operator, options)
    has = {
        check_equals_reference: subject.defined is not None,
        **{claimed: claim in subject.claims for claim, claimed in CLAIMED.items()},
        **dict.fromkeys(UNIVERSAL, True),
        check_masks: subject.registered,
        check_causal: subject.registered and not {"bias", "causal"} & {*subject.lacks, *options},
        check_positions: subject.defined is not None and not {"bias", "causal"} & {*subject.lacks, *options},
    }
    if subject.by_place:
        has |= dict.fromkeys(OF_ANY_PLACE, False)
    return tuple(check for check in LAWS if has[check] and (subject.least_order == 1 or check not in OTHER_ORDERS))


def types_of(check: Law, dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """List the types that a check is made in: in float64 no precision is lost.

    Args:
        check: The check.
        dtype: Type that is asked for.
    """
    return NARROWER if check is check_precision and dtype is torch.float64 else (dtype,)


def check_operator(
    operator: Checkable,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    examples: int | None = None,
    order: int | None = None,
    on_grid: bool | None = None,
    skip: Collection[Law] = (),
    report: Callable[[str, str], None] | None = None,
    **options: Any,
) -> None:
    """Check everything that an operator claims, and what every operator has by construction.

    In float64, precision and finiteness are checked in float32 and half precision too.

    Args:
        operator: Name in the registry, an `Operator`, or a function with the signature of `additive_attention`.
        dtype: Type of the tensors. Gradients are checked in float64 whatever it is.
        device: Device of the tensors.
        examples: Number of cases tried in each check; by default as the Hypothesis profile says.
        order: Number of modes N; by default drawn, from 1 to 4. With a given number, what is said of tensors of
            another order is not checked.
        on_grid: Whether queries must lie on the grid of the keys; by default as the operator says.
        skip: Checks to leave out.
        report: Called with the name of the operator and the words of each check after it has passed.
        **options: Options of the operator.

    Raises:
        AssertionError: If a check fails: a sentence, and the smallest case that was found.

    Examples:
        A new operator gets all that it claims once it is registered.

        >>> check_operator("kao_kv", examples=2, report=lambda name, words: print(words))
        equals its definition, written in float64 for one query after the other
        adding a constant to all keys changes nothing
        ...
    """
    subject = resolve(operator, options)
    given: dict[str, Any] = {"device": device, "examples": examples, "order": order, "on_grid": on_grid, **options}
    for check in checks_of(operator, **options):
        if check in skip or (order is not None and check in OTHER_ORDERS):
            continue
        narrower = NARROWER if check is check_finite and dtype is torch.float64 else ()
        for narrow in (*types_of(check, dtype), *narrower):
            check(operator, dtype=narrow, **given)
        if report is not None:
            report(subject.name, check.words)
