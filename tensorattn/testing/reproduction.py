"""Reproductions: a case as lines that can be pasted into Python."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tensorattn.testing.cases import Case
from tensorattn.testing.drawing import is_canonical

__all__ = ["literal", "pasted"]

TENSORS = ("query", "key", "value")
BARE = ("inf", "nan")  # numbers that print as names


def literal(value: Any) -> str:
    """Write a value as Python.

    Args:
        value: Number, text, tensor, generator that was just seeded, case, or tuple, list or set of such.

    Examples:
        >>> literal((1, torch.tensor([0.5]), None))
        '(1, torch.tensor([0.5], dtype=torch.float32), None)'
    """
    if isinstance(value, Tensor):
        return _tensor(value)
    if isinstance(value, torch.Generator):
        return f"torch.Generator().manual_seed({value.initial_seed()})"
    if isinstance(value, Case):
        names = [*TENSORS, "order", "scale", "weights", "on_grid", *(["pooled"] if value.pooled else [])]
        return "Case(\n" + "".join(f"    {name}={literal(getattr(value, name))},\n" for name in names) + ")"
    if isinstance(value, tuple):
        return f"({', '.join(map(literal, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, list):
        return "[" + ", ".join(map(literal, value)) + "]"
    return repr(value)


def pasted(
    law: Callable[..., None], subject: str, case: Any, drawn: Sequence[Any], *, imports: Sequence[str] = ()
) -> str:
    """Write a trial of one case as Python that raises as it did.

    Args:
        law: What the case breaks: a function of a module, or the law of a check there.
        subject: What was tried, as Python.
        case: The case.
        drawn: What the law drew, in order.
        imports: Lines that ``subject`` needs.

    Returns:
        The lines.
    """
    at_hand = getattr(sys.modules[law.__module__], law.__name__, None) is law
    lines = ["import torch", "from tensorattn.testing import Case, resolve", *imports]
    lines.append(f"from {law.__module__} import {law.__name__}")
    values = [f"case = {literal(case)}", f"drawn = iter({literal(list(drawn))})"]
    if any(word in "".join(values) for word in BARE):
        lines.insert(0, f"from math import {', '.join(BARE)}")
    call = law.__name__ if at_hand else f"{law.__name__}.law"
    return "\n".join([*lines, "", *values, f"{call}({subject}, case, lambda strategy: next(drawn))"])


def _tensor(tensor: Tensor) -> str:
    """Write a tensor, with its strides wherever a new tensor would have others."""
    device = "" if tensor.device.type == "cpu" else f", device={str(tensor.device)!r}"
    typed = f"dtype={tensor.dtype}{device}"
    dense = f"torch.tensor({tensor.tolist()}, {typed})"
    if tensor.numel() == 0:
        return f"torch.zeros({tuple(tensor.shape)}, {typed})"
    if is_canonical(tensor) or 0 in tensor.stride():
        return dense
    return f"torch.empty_strided({tuple(tensor.shape)}, {tensor.stride()}, {typed}).copy_({dense})"
