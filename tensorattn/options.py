"""Options: what a number, a probability and a switch are, told in one way everywhere."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor

from tensorattn.errors import OptionError
from tensorattn.modes import is_integer

__all__ = ["check_count", "check_number", "check_probability", "check_scale", "check_switch"]


def _is_number(value: Any) -> bool:
    """Tell whether something is a real number; while a graph is recorded, it may be a symbol of one."""
    if isinstance(value, bool):
        return False
    return isinstance(value, int | float | torch.SymFloat | torch.SymInt | numbers.Real)


def check_number(value: Any, argument: str, rule: str) -> None:
    """Check that an option is a number.

    Args:
        value: What was given.
        argument: Name of the option.
        rule: What it must be.

    Raises:
        OptionError: If it is no number.

    Examples:
        >>> check_number("1.0", "saturation", "positive or None")
        Traceback (most recent call last):
        tensorattn.errors.OptionError: saturation must be positive or None, got '1.0'.
    """
    if not _is_number(value):
        raise OptionError(f"{argument} must be {rule}, got {_shown(value)}.")


def _shown(value: Any) -> str:
    """Return a value for a message; a tensor by its shape, as its values may be many, or none."""
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def check_scale(scale: Any) -> None:
    """Check the factor of the logits.

    Args:
        scale: What was given; None for the default.

    Raises:
        OptionError: If it is no finite number.
    """
    if scale is None:
        return
    hint = "For a learned scale multiply the query by it, with scale=1.0." if isinstance(scale, Tensor) else ""
    if not _is_number(scale):
        raise OptionError(f"scale must be a number or None, got {_shown(scale)}.", hint=hint)
    if isinstance(scale, float) and not torch.compiler.is_compiling() and not math.isfinite(scale):
        raise OptionError(f"scale must be finite, got {scale}.")


def check_probability(value: Any, argument: str) -> None:
    """Check that an option is a probability.

    Args:
        value: What was given.
        argument: Name of the option.

    Raises:
        OptionError: If it is no number between 0 and 1.
    """
    check_number(value, argument, "between 0 and 1")
    if not 0 <= value <= 1:
        raise OptionError(f"{argument} must be between 0 and 1, got {value}.")


def check_switch(value: Any, argument: str) -> None:
    """Check that an option is True or False; a word would count as True, whatever it says.

    Args:
        value: What was given.
        argument: Name of the option.

    Raises:
        OptionError: If it is neither.
    """
    if not isinstance(value, bool):
        raise OptionError(f"{argument} must be True or False, got {_shown(value)}.")


def check_count(value: Any, argument: str) -> None:
    """Check that an option is an integer.

    Args:
        value: What was given.
        argument: Name of the option.

    Raises:
        OptionError: If it is not; 2.0 is not.
    """
    if not is_integer(value):
        raise OptionError(f"{argument} must be an integer, got {_shown(value)}.")
