"""Tokens in a row: parts put together along their tokens, and cut again into parts that remember the whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, final

import torch
from torch import Tensor

__all__ = ["Row", "join_tokens", "split_tokens"]


@final
class Row(Sequence[Tensor]):
    """Consecutive parts of a tensor along its tokens, cut whenever they are asked for.

    They are not kept: parts that were cut while nothing is differentiated would have no derivatives later on.

    Attributes:
        whole: Tokens ``(*batch, S, D)``.
        lengths: Numbers of tokens of the parts.
    """

    __slots__ = ("lengths", "whole")

    def __init__(self, whole: Tensor, lengths: Sequence[int]) -> None:
        self.whole, self.lengths = whole, lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, place: Any) -> Any:
        return self.whole.split_with_sizes(self.lengths, -2)[place]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.whole.split_with_sizes(self.lengths, -2))


def join_tokens(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate tokens ``(*batch, S_i, D)``; those in a row need no copy.

    Args:
        parts: Tokens.
    """
    if type(parts) is Row:  # quicker than to ask whether it is an instance of an abstract class
        return parts.whole
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), -2)


def split_tokens(whole: Tensor, lengths: Sequence[int]) -> Sequence[Tensor]:
    """Split tokens ``(*batch, S, D)`` into consecutive parts.

    Args:
        whole: Tokens.
        lengths: Numbers of tokens S_i of the parts, which add up to S.
    """
    if torch.compiler.is_compiling():  # which sees through tuples best
        return whole.split_with_sizes(lengths, -2)
    return Row(whole, lengths)
