"""Ranges: where the output lies, and that it is a number at all."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

from tensorattn import reference
from tensorattn.operators import Claim
from tensorattn.testing.cases import Case, rows
from tensorattn.testing.checks.check import Draw, check
from tensorattn.testing.checks.symmetries import present
from tensorattn.testing.definitions import arrays
from tensorattn.testing.subject import Subject
from tensorattn.testing.tolerances import LARGEST_LOGIT, allowed, exact

__all__ = ["check_convex", "check_finite", "check_zero_scale_mean"]

FAR_LOGIT = 1e4  # the largest logit that must not overflow
FAR_VALUE = 4e3  # 48 such values add up to more than float16 holds, though their mean is far from that


@check(Claim.CONVEX)
def check_convex(subject: Subject, case: Case, draw: Draw) -> None:
    """Check that every channel of the output lies between the smallest and the largest value of present positions.

    Examples:
        >>> check_convex("kao_kv", examples=5)
        >>> check_convex("additive", order=2)
        Traceback (most recent call last):
        AssertionError: additive: the output must lie within the range of the values, but there is ...
    """
    _expect_within(subject, case)
    # The hardest case: only the position of the least logit of a query has another value, and each mode avoids it.
    reach = draw(st.sampled_from([1.0, 3.0, 10.0, 100.0]))
    reach = min(reach, LARGEST_LOGIT.get(case.dtype, 1.0))
    scale = abs(case.factor) * reach / case.logit if case.logit else case.scale
    batch = len(case.batch)
    query, key = rows(exact(case.query), batch), rows(exact(case.key), batch)
    logits = (query[..., :1, :] @ key.mT)[..., 0, :]
    absent = case.position_weights().expand(*case.batch, *case.sizes).flatten(batch) == 0
    least = logits.masked_fill(absent, math.inf).argmin(-1, keepdim=True)
    value = torch.ones_like(logits).scatter(-1, least, 0.0).reshape(*case.batch, *case.sizes, 1)
    _expect_within(subject, case.replace(value=value.expand(case.value.shape).to(case.value), scale=scale))


def _expect_within(subject: Subject, case: Case) -> None:
    """Compare the output with the range of the values of present positions."""
    output, value = exact(subject.output(case)), exact(case.value)
    dims = [len(case.batch) + mode for mode in range(case.order)]
    absent = (case.position_weights() == 0).unsqueeze(-1)
    low, high = (
        _for_each_query(case, bound)
        for bound in (value.masked_fill(absent, math.inf).amin(dims), value.masked_fill(absent, -math.inf).amax(dims))
    )
    statement = "the output must lie within the range of the values"
    inside = output.clamp(low, high)
    subject.expect_close(present(case, output), present(case, inside), case.allowed(), statement, case)


@check(Claim.ZERO_SCALE_MEAN)
def check_zero_scale_mean(subject: Subject, case: Case, draw: Draw) -> None:
    """Check that at scale zero, where all logits are zero, every query gets the weighted mean of the values.

    Examples:
        >>> check_zero_scale_mean("additive", examples=5)
    """
    still = case.replace(scale=0.0)
    given = arrays(still)
    mean = reference.marginal_mean(given["value"], (), order=case.order, weights=given["weights"])
    output = exact(subject.output(still))
    expected = _for_each_query(case, torch.from_numpy(mean)).expand_as(output)
    tolerance = subject.terms(case.order) * allowed("average", case.dtype, magnitude=case.magnitude)
    statement = "at scale zero the output must be the mean value"
    subject.expect_close(present(case, output), present(case, expected), tolerance, statement, still)


def _for_each_query(case: Case, tensor: Tensor) -> Tensor:
    """Give ``(*batch, D_v)`` a dimension of size 1 for each position dimension of the query."""
    return tensor.reshape(*case.batch, *(1 for _ in case.positions), tensor.shape[-1])


@check("no result and no gradient is infinite or NaN", empty=True)
def check_finite(subject: Subject, case: Case, draw: Draw) -> None:
    """Check that output and gradients are finite for logits up to ten thousand and values in the thousands.

    A batch entry may be without any position. Values are large enough that their sum overflows float16 where their
    mean does not.

    Examples:
        >>> check_finite("additive", examples=5)
        >>> check_finite("additive", dtype=torch.float16, examples=5)
    """
    value = case.value + (FAR_VALUE - case.magnitude)
    far = case.replace(value=value, scale=case.factor * FAR_LOGIT / case.logit if case.logit else case.scale)
    leaves = [tensor.detach().requires_grad_() for tensor in (far.query, far.key, far.value)]
    output = subject.output(far.replace(query=leaves[0], key=leaves[1], value=leaves[2]))
    subject.expect(bool(output.isfinite().all()), "the output must be finite", far, _counted(output))
    (output.to(torch.promote_types(case.dtype, torch.float32)) / FAR_VALUE).sum().backward()
    for name, leaf in zip(("query", "key", "value"), leaves, strict=True):
        if leaf.grad is not None:
            statement = f"the gradient of the {name} must be finite"
            subject.expect(bool(leaf.grad.isfinite().all()), statement, far, _counted(leaf.grad))


def _counted(tensor: Tensor) -> str:
    """Count what is not finite."""
    return f"{int((~tensor.isfinite()).sum())} of {tensor.numel()} numbers are not"
