"""Derivatives: gradients, and what attention is to first order in the scale."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError, gradcheck, gradgradcheck
from torch.nn.attention import SDPBackend, sdpa_kernel

from tensorattn import reference
from tensorattn.operators import Claim
from tensorattn.testing.cases import Case, rows
from tensorattn.testing.checks.check import Draw, check
from tensorattn.testing.definitions import Array, arrays
from tensorattn.testing.drawing import generators, numbers
from tensorattn.testing.subject import Subject
from tensorattn.testing.tolerances import allowed, exact, largest

__all__ = ["along_queries", "check_first_order_law", "check_gradients", "expect_slope", "marginal_covariance"]

MODEST_LOGIT = 5.0  # finite differences lose digits for larger ones


@check(
    "first and second derivatives are those of the output", share=0.15, dtype=torch.float64, max_positions=6, max_dim=2
)
def check_gradients(subject: Subject, case: Case, draw: Draw) -> None:
    """Check the gradients of query, key and value, and their gradients, against finite differences in float64.

    Second derivatives are checked with the written-out kernel of torch, as its fused kernels have none.

    Examples:
        >>> check_gradients("additive", examples=2)
    """
    if case.logit > MODEST_LOGIT:
        case = case.replace(scale=case.factor * MODEST_LOGIT / case.logit)
    leaves = [
        tensor.detach().clone(memory_format=torch.contiguous_format) for tensor in (case.query, case.key, case.value)
    ]
    for leaf in leaves:
        leaf.requires_grad_()

    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return subject.output(case.replace(query=query, key=key, value=value))

    _passes(subject, case, "the gradient must be that of the output", gradcheck, function, leaves)
    statement = "the second derivative must be that of the output"
    with sdpa_kernel(SDPBackend.MATH):
        _passes(subject, case, statement, gradgradcheck, function, leaves)


def _passes(
    subject: Subject,
    case: Case,
    statement: str,
    test: Callable[..., bool],
    function: Callable[..., Tensor],
    leaves: list[Tensor],
) -> None:
    """Run one of the tests of torch, and tell its verdict in our words."""
    found = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            test(function, leaves)
    except GradcheckError as cause:
        found = f"gradcheck finds: {' '.join(str(cause).split())}"
    subject.expect(not found, statement, case, found)


@check(Claim.FIRST_ORDER)
def check_first_order_law(subject: Subject, case: Case, draw: Draw) -> None:
    r"""Check that the derivative of the output with respect to the scale, at scale zero, is that of full attention.

    .. math:: \frac{\partial}{\partial s} F(q) \Big|_{s = 0} = C_{vk}\, q, \qquad
        C_{vk} = \sum_j w_j (v_j - \bar v)(k_j - \bar k)^\top \Big/ \sum_j w_j

    which holds of full attention for every tensor. The scale only ever multiplies queries, so the derivative is that
    along the queries at zero; it is taken by reverse-mode differentiation against a random cotangent.

    Examples:
        >>> check_first_order_law("flattened", examples=5)
    """
    slope = along_queries(case, marginal_covariance(case, range(case.order)))
    expect_slope(subject, case, slope, draw, "the derivative by the scale at zero must be that of full attention")


def expect_slope(subject: Subject, case: Case, slope: Tensor, draw: Draw, statement: str) -> None:
    """Compare the derivative of the output by the scale, at scale zero, with what it should be.

    Args:
        subject: What is checked.
        case: Arguments.
        slope: What the derivative should be, float64 ``(*batch, *positions, D_v)``.
        draw: Source of the cotangent.
        statement: What is checked, a clause.
    """
    query = torch.zeros_like(case.query, memory_format=torch.contiguous_format, requires_grad=True)
    cotangent = numbers(draw(generators(3)), (*case.query.shape[:-1], case.value.shape[-1]))
    output = subject.output(case.replace(query=query, scale=1.0))
    (gradient,) = torch.autograd.grad(output, query, cotangent.to(output), allow_unused=True)
    found = 0.0 if gradient is None else float((exact(gradient) * exact(case.query)).sum())
    expected = float((cotangent.reshape(slope.shape) * slope).sum())
    reach = cotangent.abs().sum(-1) * exact(case.query).abs().sum(-1)
    size = float(reach.sum()) * case.magnitude * largest(case.key)
    tolerance = allowed("slope", case.dtype, magnitude=size)
    ours, theirs = (torch.tensor(number, dtype=torch.float64) for number in (found, expected))
    subject.expect_close(ours, theirs, tolerance, statement, case)


def marginal_covariance(case: Case, kept: Iterable[int]) -> Tensor:
    r"""Return the weighted covariance of the means of values and keys over all modes but the kept ones.

    Args:
        case: Values, keys and weights.
        kept: Modes; all of them for the covariance of the values and keys themselves.

    Returns:
        Float64 ``(*batch, D_v, D)``.
    """
    modes, given, batch = tuple(sorted(kept)), arrays(case), len(case.batch)

    def centred(tensor: Array) -> Tensor:
        mean, grand = (
            torch.from_numpy(reference.marginal_mean(tensor, part, order=case.order, weights=given["weights"]))
            for part in (modes, ())
        )
        return rows(mean - grand.reshape(*case.batch, *(1 for _ in modes), -1), batch)

    dropped = [batch + mode for mode in range(case.order) if mode not in modes]
    share = case.position_weights()
    share = (share.sum(dropped) if dropped else share).reshape(*case.batch, -1, 1)
    share = share / share.sum(-2, keepdim=True)
    return (share * centred(given["value"])).mT @ centred(given["key"])


def along_queries(case: Case, matrix: Tensor) -> Tensor:
    """Apply a matrix ``(*batch, D_v, D)`` to every query.

    Args:
        case: Queries.
        matrix: The matrix.

    Returns:
        Float64 ``(*batch, *positions, D_v)``.
    """
    return (rows(exact(case.query), len(case.batch)) @ matrix.mT).reshape(*case.query.shape[:-1], matrix.shape[-2])
