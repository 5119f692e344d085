r"""How far two ways to compute the same may lie apart.

Rounding errors of attention grow with the logits: an error of one unit in a logit of size L moves a weight by about
:math:`\varepsilon L`, and so the output by :math:`\varepsilon L \max |v|`. Everything is therefore measured in the
unit :math:`u = \varepsilon\, (1 + L)\, M` with the machine epsilon :math:`\varepsilon` of the type, the largest logit
:math:`L = \max |s\, q \cdot k|` and the largest value :math:`M`. Over more than a thousand random cases of up to four
modes the errors reached, in these units,

====================  ========================================  ==================  =========  ========
what                  unit                                      reached in float64  float32    allowed
====================  ========================================  ==================  =========  ========
``output``            :math:`\varepsilon\, (1 + L)\, M`         6.2                 6.9        32
``log-sum-exp``       :math:`\varepsilon\, (1 + L + \log P)`    11.7                9.8        64
``average``           :math:`\varepsilon\, M`                   4.6                 5.5        16
``gradient``          :math:`\varepsilon\, (1 + L)(1 + |g|)`    4.4                             64
``slope``             :math:`\varepsilon\, |C| |q|`             1                               4500
====================  ========================================  ==================  =========  ========

for P positions, where M is the largest value that goes in or comes out, so that operators which leave the range of the
values, as one with an unsaturated interaction does, are measured by what they return.

Half precision is expected to be accumulated in float32: it is allowed the same multiple of float32 units, and four
units of its own for the rounding of averages, weights and results.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

__all__ = ["ALLOWED", "LARGEST_LOGIT", "allowed", "epsilon", "exact", "largest", "largest_logit"]

ALLOWED: Mapping[str, float] = MappingProxyType(
    {"output": 32, "log-sum-exp": 64, "average": 16, "gradient": 64, "slope": 4500}
)
HALF_ALLOWED = 4  # units of half precision, for what is rounded to it

# Logits up to which the table holds; half precision has no digits left for larger ones.
LARGEST_LOGIT: Mapping[torch.dtype, float] = MappingProxyType(
    {torch.float64: 1e4, torch.float32: 1e2, torch.float16: 4.0, torch.bfloat16: 2.0}
)


def epsilon(dtype: torch.dtype) -> float:
    """Return the machine epsilon of a type.

    Args:
        dtype: Floating-point type.

    Examples:
        >>> epsilon(torch.float32) == 2**-23
        True
    """
    return torch.finfo(dtype).eps


def allowed(what: str, dtype: torch.dtype, *, logit: float = 0.0, magnitude: float = 1.0) -> float:
    r"""Return the largest error that rounding may cause.

    Args:
        what: Row of the table: ``"output"``, ``"log-sum-exp"``, ``"average"``, ``"gradient"`` or ``"slope"``.
        dtype: Type that was computed in.
        logit: Largest logit L.
        magnitude: Largest value M, or whatever else the unit of that row contains.

    Returns:
        The allowed multiple of the unit.

    Examples:
        >>> allowed("output", torch.float64, logit=3.0, magnitude=2.0) == 32 * 2**-52 * 4 * 2
        True
        >>> allowed("average", torch.bfloat16) == 16 * 2**-23 + 4 * 2**-7
        True
    """
    accumulated = torch.float32 if dtype.itemsize < 4 else dtype
    units = ALLOWED[what] * epsilon(accumulated)
    if accumulated is not dtype:
        units += HALF_ALLOWED * epsilon(dtype)
    return units * (1 + logit) * magnitude


def exact(tensor: Tensor) -> Tensor:
    """Return a tensor in float64, on the CPU and without its graph.

    Args:
        tensor: Tensor of any type on any device.
    """
    return tensor.detach().cpu().to(torch.float64)


def largest(*tensors: Tensor) -> float:
    """Return the largest absolute finite entry of some tensors, or 0.

    Args:
        *tensors: Tensors of any shape.

    Examples:
        >>> largest(torch.tensor([1.0, -3.0]), torch.tensor([[2.0, float("inf")]]))
        3.0
    """
    return max((float(exact(t).abs().nan_to_num(0.0, 0.0, 0.0).max()) for t in tensors if t.numel()), default=0.0)


def largest_logit(query: Tensor, key: Tensor, scale: float) -> float:
    r"""Return the largest absolute logit :math:`|s\, q \cdot k|` of any query with any key of its batch entry.

    Args:
        query: Queries ``(*batch, L, D)``.
        key: Keys ``(*batch, P, D)``.
        scale: Factor of the logits s.

    Examples:
        >>> largest_logit(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 0.0], [0.0, -2.0]]), 0.5)
        2.0
    """
    if query.numel() == 0 or key.numel() == 0:
        return 0.0
    return abs(scale) * float((exact(query) @ exact(key).mT).abs().max())
