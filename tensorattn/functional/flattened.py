"""Flattened attention: every query attends to every position. The truth that the other operators are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

from torch import Tensor

from tensorattn.functional.maps import At, Base, weights_of
from tensorattn.functional.operator import (
    AttentionResult,
    Bias,
    Claim,
    Operator,
    Shared,
    attend_positions,
    attention_function,
    biased,
    run,
)
from tensorattn.functional.summary import Needs, Summary

__all__ = ["FLATTENED", "flattened_attention"]


@attention_function
def flattened_attention(query: Tensor, key: Tensor, value: Tensor, *, order: int, **shared: Unpack[Shared]) -> Any:
    r"""Attend from each query to every position of the grid: full softmax attention.

    .. math:: F(q) = \sum_j \frac{w_j e^{s\, q \cdot k_j}}{\sum_i w_i e^{s\, q \cdot k_i}}\, v_j,
        \qquad w_j = \prod_m w^m[j_m]

    Costs 4PD operations a query for P positions.

    Args:
        query: Queries.
        key: Keys.
        value: Values.
        order: Number of modes N.
        **shared: What all operators share, as told below.

    Any mask is exact, and the biases of the modes add up.

    Returns:
        The output in the type of the query; an `AttentionResult` if more is asked for, whose ``attention`` holds one
        tensor ``(*batch, *positions, n_1, …, n_N)``.

    Examples:
        >>> import torch, tensorattn as ta
        >>> q, k, v = torch.randn(3, 2, 4, 5, 8).unbind(0)
        >>> ta.flattened_attention(q, k, v, order=2).shape
        torch.Size([2, 4, 5, 8])
    """
    return run(FLATTENED, query, key, value, order=order, options={}, **shared)


def _attend(
    query: Tensor,
    summary: Summary,
    *,
    bias: Bias | None = None,
    prefix: tuple[Tensor, Tensor] | None = None,
    **settings: Any,
) -> AttentionResult:
    """Attend to all positions as one set of tokens, and to those of a prefix."""
    everything, batch = tuple(range(summary.order)), len(summary.batch)
    tokens = summary.tokens({everything: 1})
    each = biased(tokens.sets[0], everything, bias, query.shape[batch:-1], summary.sizes)
    tokens = tokens._replace(sets=(each,))
    tokens = tokens if prefix is None else tokens.beside(*prefix)
    output, lse, attention, _ = attend_positions(query, tokens, batch, **settings)
    on_grid = attention and (attention[0][..., : summary.positions].unflatten(-1, summary.sizes),)
    return AttentionResult(output, lse, on_grid)


def _spread(attention: Sequence[Tensor], sizes: Sequence[int], at: At | None, base: Base) -> Tensor:
    """The weights themselves."""
    return weights_of(attention[0], at, sizes)


FLATTENED = Operator(
    "flattened",
    flattened_attention,
    lambda order: Needs((tuple(range(order)),)),
    _attend,
    lambda: frozenset(Claim) - {Claim.INVISIBLE_INTERACTION},
    spread=_spread,
    joins=True,
)
