r"""Attention maps: what the attention weights of an operator say of every position of the grid."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from tensorattn.errors import OptionError, retells
from tensorattn.modes import GridShape, check_order, is_integer
from tensorattn.operators import get_operator
from tensorattn.operators.spreading import Base
from tensorattn.presence import GivenWeights, Lengths, Mask, check_presence
from tensorattn.weights import GridWeights, Weights, beside

__all__ = ["attention_map", "base_of", "indices_of"]


@retells
def attention_map(
    attention: Sequence[Any],
    sizes: Sequence[int],
    *,
    operator: str = "additive",
    at: Sequence[int] | None = None,
    weights: GivenWeights = None,
    mask: Mask = None,
    lengths: Lengths = None,
    **options: Any,
) -> Tensor:
    r"""Spread the attention weights of an operator over the grid: one number a position, all summing to one.

    What an operator knows of a position is what its modes say of it, so that the map has the form of the operator:

    - ``additive``: the product of the weights of its modes, :math:`\prod_m p^m[j_m]`, which is the softmax over the
      grid of additive logits; ``truncated``: the product over its subsets, each to the power of its counting number;
    - ``kao_kv``: the weights of each average shared by the positions behind it, so that the output is the mean of the
      values so weighed; ``kao_qkv``: the mean of that over the averaged queries at the place of the query, or with
      ``centered=True`` the product of their weights over those of the mean query to the power N−1;
    - ``kronecker_product``: the product of one row a mode; ``kronecker_sum`` and ``axial``: one row a mode on the
      fibre through the query, each mode counting equally;
    - ``flattened``: its weights.

    Corrections by ``interaction`` and own tokens by ``include_self`` are no part of a map.

    Args:
        attention: What the operator returned as ``attention``.
        sizes: Sizes of the modes of the keys.
        operator: Name of the operator.
        at: The query, one index a dimension of its positions; the map of every query if None, which takes as much
            memory as full attention would. Operators whose queries must be on the grid of the keys need it.
        weights: The weights that the operator was given. What differs between samples must have all batch dimensions
            here, so that dimensions of positions are not taken for one.
        mask: The mask that it was given.
        lengths: The lengths that it was given.
        **options: The options that the operator was given.

    Returns:
        The maps, of the type of the weights: not negative, each with sum one, or zero where nothing takes part.

    Raises:
        OptionError: If the operator has no map or no such option, or ``at`` is missing or out of range.
        ShapeError: If the attention weights, the mask or lengths do not fit the sizes of the modes.
        WeightsError: If the weights of the positions do not.
        DtypeError: If the mask is not bool, or lengths are not integers.

    Shape:
        - result: :math:`(*, n_1, \dots, n_N)` with the batch dimensions, and the positions of the queries if ``at`` is
          None

    Examples:
        >>> import torch, tensorattn as ta
        >>> q, x = torch.randn(7, 8), torch.randn(4, 5, 8)
        >>> rows, columns = ta.additive_attention(q, x, x, order=2, return_attention=True).attention
        >>> map_of_query_3 = ta.attention_map((rows, columns), (4, 5), at=[3])
        >>> torch.allclose(map_of_query_3, torch.outer(rows[3], columns[3]))
        True
    """
    sizes = tuple(sizes)
    check_order(len(sizes), "the number of sizes")
    record = get_operator(operator)
    if record.spread is None:
        raise OptionError(f"operator {operator!r} has no map.")
    options = record.with_defaults(options)
    record.needs(len(sizes), **options)  # refuses values out of range
    if not isinstance(attention, Sequence) or not attention:
        raise OptionError("attention must be what an operator returned as its attention, a tuple.")
    first = attention[0] if isinstance(attention[0], Tensor) else attention[0][0]
    grid = GridShape(tuple(first.shape[: _samples(weights, mask, lengths, len(sizes))]), sizes, 1)
    base = base_of(check_presence(weights, mask, lengths, grid, first, of="sizes").weights, sizes, first)
    return record.spread(attention, sizes, None if at is None else indices_of(at), base, **options)


def indices_of(at: Sequence[int]) -> tuple[int, ...]:
    """Read the place of a query.

    Args:
        at: Its indices.

    Raises:
        OptionError: If they are no integers.
    """
    found = tuple(at) if isinstance(at, Iterable) and not isinstance(at, str) else (at,)
    if not isinstance(at, Iterable) or not all(map(is_integer, found)):
        raise OptionError(f"at must be integers, got {at!r}.")
    return tuple(map(int, found))


def base_of(found: Weights, sizes: tuple[int, ...], of: Tensor) -> Base:
    """Return how often each position counts, in the type of attention weights.

    Args:
        found: Checked weights.
        sizes: Sizes of the modes.
        of: Attention weights.
    """
    if isinstance(found, GridWeights):
        return Base(found.tensor.to(of), by_mode=False)
    base = of.new_ones(sizes)
    for mode, vector in enumerate(found):
        base = base if vector is None else base * beside(vector.to(of), mode, len(sizes))
    return Base(base, by_mode=True)


def _samples(weights: GivenWeights, mask: Mask, lengths: Lengths, order: int) -> int:
    """Count the batch dimensions that weights, mask and lengths have."""
    whole = [each for each in (weights, mask) if isinstance(each, Tensor)]
    found = [each.dim() - order for each in whole]
    if not isinstance(weights, Tensor) and weights is not None:
        found += [vector.dim() - 1 for vector in weights if isinstance(vector, Tensor)]
    if isinstance(lengths, Tensor):
        found.append(lengths.dim() - 1)
    elif lengths is not None:
        found += [each.dim() for each in lengths if isinstance(each, Tensor)]
    return max([0, *found])
