"""Tokens in a row: parts put together along their tokens, and cut again into parts that remember the whole."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["join_tokens", "split_tokens"]


class _Parts(tuple[Tensor, ...]):
    """Consecutive parts of a tensor along its tokens, and the tensor."""

    whole: Tensor


def join_tokens(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate tokens ``(*batch, S_i, D)``; parts that `split_tokens` made need no copy.

    Args:
        parts: Tokens.
    """
    if isinstance(parts, _Parts):
        return parts.whole
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), -2)


def split_tokens(whole: Tensor, lengths: Sequence[int]) -> tuple[Tensor, ...]:
    """Split tokens ``(*batch, S, D)`` into consecutive parts.

    Args:
        whole: Tokens.
        lengths: Numbers of tokens S_i of the parts, which add up to S.
    """
    parts = _Parts(whole.split_with_sizes(lengths, -2))
    parts.whole = whole
    return parts
