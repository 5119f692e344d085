"""Gradients that one backward pass hands over to another, which may then be added to where they are.

A backward pass must not write to a gradient that it is given, as others may hold it too. One that was written for the
next backward pass alone is marked. Where automatic differentiation adds a second gradient to it, the sum is either
written over it, and is nobody else's either, or is a new tensor without the mark.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["hand_over", "take_over"]

MARK = "_tensorattn_handed_over"


def hand_over(gradient: Tensor) -> None:
    """Mark a gradient that nobody else holds.

    Args:
        gradient: A tensor that was made to be returned by a backward pass.
    """
    setattr(gradient, MARK, True)


def take_over(gradient: Tensor) -> bool:
    """Tell whether a gradient may be written to, and take the mark off.

    Args:
        gradient: What a backward pass is given.
    """
    return vars(gradient).pop(MARK, False)
