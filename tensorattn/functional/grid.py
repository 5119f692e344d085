"""Attention over lists of tokens that stand for a grid, behind class and register tokens: as other models have them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tensorattn.errors import DtypeError, OptionError, ShapeError, check, check_scale, is_integer, retells
from tensorattn.functional.flattened import FLATTENED
from tensorattn.functional.operator import (
    AttentionResult,
    Claim,
    Operator,
    attend_positions,
    default_scale,
    get_operator,
)
from tensorattn.functional.softmax import Tokens, TokenSet, merge_attention
from tensorattn.masks import accumulation_dtype, check_floating, counting_dtype, log_weights

__all__ = ["attend_grid", "check_grid", "grid_attention", "index_shift", "join_prefix", "joins_prefix"]


@retells
def grid_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    grid: Sequence[int],
    prefix: int = 0,
    operator: str,
    scale: float | None = None,
    dropout_p: float = 0.0,
    key_mask: Tensor | None = None,
    **options: Any,
) -> Tensor:
    r"""Attend over a list of tokens: some prefix tokens, then the positions of a grid in row-major order.

    It stands where a model calls `torch.nn.functional.scaled_dot_product_attention` on class tokens, register tokens
    and patches. What prefix tokens and the grid see is a rule for each operator:

    - The queries of the prefix see all tokens, by full attention, whatever the operator: they are few.
    - ``flattened``: every query sees all tokens. This is full attention.
    - ``clustered``, ``additive``, ``truncated``: a query of the grid sees the prefix and, by the operator, the grid.
      Both join in one softmax by their log-sum-exps. That of the grid is as good as the operator is: of ``additive``
      it is exact for additive keys, of ``clustered`` it is exact with as many cells as distinct keys.
    - ``kao_kv``: the same, where the S averages of the modes weigh as much as the P positions that they stand for: the
      logarithm of P/S is added to their log-sum-exp. The prefix tokens would otherwise weigh too much.
    - ``axial``, ``kronecker_product``, ``kronecker_sum``, ``kao_qkv``: no log-sum-exp joins several softmaxes, so a
      query of the grid sees the grid alone.

    Args:
        query: Queries.
        key: Keys, whose heads may be fewer: each serves as many heads of the query, one behind the other.
        value: Values, with the heads of the keys.
        grid: Sizes of the modes :math:`(n_1, \dots, n_N)`; the last mode runs fastest.
        prefix: Number of tokens before the grid.
        operator: Name in the registry.
        scale: Factor of the logits; 1/√D if None.
        dropout_p: Probability of dropping an attention weight, whenever it is not 0.
        key_mask: True where a key takes part: of all tokens, or of the grid alone, where the prefix takes part.
            Operators whose queries are on the grid of the keys give zero where a position takes no part.
        **options: Options of the operator.

    Returns:
        The output in the type of the query.

    Raises:
        ShapeError: If a tensor has not four dimensions, the grid does not fill the tokens behind the prefix, heads of
            the keys do not divide those of the query, or batch, tokens, head sizes or the mask disagree.
        DtypeError: If a tensor is not floating point, types differ, or the mask is not bool.
        OptionError: If there is no such operator or option, or an argument is out of its range or has no meaning for
            the operator.

    Shape:
        - query: :math:`(B, H, L, D)`, key: :math:`(B, H_k, L, D)`, value: :math:`(B, H_k, L, D_v)`, where L is
          prefix + P, and P the product of the sizes
        - key_mask: :math:`(B, L)` or :math:`(B, P)`
        - output: :math:`(B, H, L, D_v)`

    Examples:
        >>> import torch, tensorattn as ta
        >>> q, k, v = torch.randn(3, 2, 4, 1 + 6 * 7, 8).unbind(0)  # a class token and 6×7 patches
        >>> full = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        >>> torch.allclose(ta.grid_attention(q, k, v, grid=(6, 7), prefix=1, operator="flattened"), full, atol=1e-6)
        True
        >>> ta.grid_attention(q, k, v, grid=(6, 7), prefix=1, operator="clustered", tokens=8).shape
        torch.Size([2, 4, 43, 8])
        >>> ta.grid_attention(q, k, v, grid=(6, 6), prefix=1, operator="clustered")
        Traceback (most recent call last):
        tensorattn.errors.ShapeError: ...36 positions, but query has 42 tokens behind a prefix of 1.
    """
    get_operator(operator).with_defaults(options)  # refuses what is an argument of `attend_grid` alone
    asked: dict[str, Any] = {"scale": scale, "dropout_p": dropout_p, "key_mask": key_mask}
    return attend_grid(query, key, value, grid=grid, prefix=prefix, operator=operator, **asked, **options).output


def attend_grid(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    grid: Sequence[int],
    prefix: int,
    operator: str,
    scale: float | None = None,
    dropout_p: float = 0.0,
    key_mask: Tensor | None = None,
    return_rho: bool = False,
    **options: Any,
) -> AttentionResult:
    """Attend as `grid_attention` does, and tell ``rho`` where the operator has one and it is asked for.

    Args:
        query: Queries.
        key: Keys.
        value: Values.
        grid: Sizes of the modes.
        prefix: Number of tokens before the grid.
        operator: Name in the registry.
        scale: Factor of the logits.
        dropout_p: Probability of dropping an attention weight.
        key_mask: Mask of the keys.
        return_rho: Whether ``rho`` is asked for.
        **options: Options of the operator.
    """
    record = get_operator(operator)
    chosen = record.with_defaults(options)
    check_scale(scale)
    sizes = check_grid(grid, prefix)
    _check_tensors(query, key, value, sizes, prefix)
    first, rest = _split_mask(key_mask, query, sizes, prefix)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    shared: dict[str, Any] = {"scale": scale, "dropout_p": dropout_p}
    order, mask = len(sizes), None if rest is None else rest.unsqueeze(1).unflatten(-1, sizes)
    everything = rest if rest is None or prefix == 0 else _whole(first, rest, prefix)
    if prefix > 0 and Claim.EXACT in record.claims(**chosen):
        return AttentionResult(FLATTENED.function(query, key, value, order=1, mask=everything, **shared))
    own, *others = (each[..., prefix:, :].unflatten(-2, sizes) for each in (query, key, value))
    joins = prefix > 0 and joins_prefix(record)
    with_lse = joins or (return_rho and record.condense is not None)
    found = record.function(own, *others, order=order, mask=mask, return_lse=with_lse, **shared, **chosen)
    result = found if isinstance(found, AttentionResult) else AttentionResult(found)
    output = result.output
    if joins:
        if result.lse is None:
            raise OptionError(f"prefix has no meaning for operator {operator!r}: it returns no log-sum-exp.")
        shift = index_shift(record, chosen, sizes, mask)
        before = key[..., :prefix, :], value[..., :prefix, :]
        shown = None if first is None else first.unsqueeze(1)
        output = join_prefix(result, own, *before, mask=shown, shift=shift, **shared)
    output = output.flatten(-order - 1, -2)
    if prefix > 0:
        few = FLATTENED.function(query[..., :prefix, :], key, value, order=1, mask=everything, **shared)
        output = torch.cat([few, output], -2)
    return AttentionResult(output, rho=result.rho)


def joins_prefix(record: Operator) -> bool:
    """Tell whether the grid sees prefix tokens: whether an operator has one log-sum-exp to join them by.

    Args:
        record: The operator.

    Examples:
        >>> joins_prefix(get_operator("kao_kv")), joins_prefix(get_operator("axial"))
        (True, False)
    """
    return record.query == "positions"


def index_shift(
    record: Operator, options: Mapping[str, Any], sizes: Sequence[int], mask: Tensor | None = None
) -> Tensor | float:
    r"""Return what is added to a log-sum-exp so that the tokens behind it weigh as many as there are positions.

    An operator that counts the indices of each mode attends to S averages that stand for P positions: the logarithm of
    P/S is added. All others count positions: nothing is added.

    Args:
        record: The operator.
        options: All its options.
        sizes: Sizes of the modes.
        mask: True where a position takes part ``(*batch, n_1, …, n_N)``, or None.

    Returns:
        The logarithm: a number, or with a mask ``(*batch, 1, …, 1)``.

    Examples:
        >>> round(index_shift(get_operator("kao_kv"), {}, (4, 4)), 3), index_shift(get_operator("flattened"), {}, (4,))
        (0.693, 0.0)
    """
    order = len(sizes)
    if not record.needs(order, **options).indices:
        return 0.0
    if mask is None:
        return math.log(math.prod(sizes) / sum(sizes))
    modes = range(-order, 0)
    positions = mask.sum(tuple(modes), keepdim=True)
    indices = [mask.any([k for k in modes if k != mode], keepdim=True) if order > 1 else mask for mode in modes]
    total = torch.stack([each.sum(tuple(modes), keepdim=True) for each in indices]).sum(0)
    return (positions.clamp_min(1).to(counting_dtype(mask.device)) / total.clamp_min(1)).log()


def join_prefix(
    result: AttentionResult,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    mask: Tensor | None = None,
    shift: Tensor | float = 0.0,
) -> Tensor:
    """Join attention to a grid with attention of the same queries to prefix tokens, in one softmax.

    Args:
        result: Attention to the grid, with its log-sum-exp.
        query: The queries ``(*batch, *positions, D)``.
        key: Keys of the prefix ``(*batch, T, D)``.
        value: Values of the prefix ``(*batch, T, D_v)``.
        scale: Factor of the logits; 1/√D if None.
        dropout_p: Probability of dropping an attention weight.
        mask: True where a prefix token takes part, broadcastable to ``(*batch, T)``; None for all.
        shift: What is added to the log-sum-exp of the grid: see `index_shift`.

    Returns:
        The output of both, ``(*batch, *positions, D_v)``.

    Examples:
        >>> q, k, v = torch.randn(3, 2, 9, 8, dtype=torch.float64).unbind(0)
        >>> grid = FLATTENED.function(q, k[:, 2:], v[:, 2:], order=1, return_lse=True)
        >>> whole = FLATTENED.function(q, k, v, order=1)
        >>> torch.allclose(join_prefix(grid, q, k[:, :2], v[:, :2]), whole)
        True
    """
    scale = default_scale(query.shape[-1]) if scale is None else scale
    weight = None
    if mask is not None:
        key, value = (torch.where(mask.unsqueeze(-1), each, 0.0) for each in (key, value))
        weight = log_weights(mask.to(accumulation_dtype(key.dtype)))
    tokens = Tokens(key, value, weight, (TokenSet(key.shape[-2]),))
    few = attend_positions(query, tokens, key.dim() - 2, scale=scale, dropout_p=dropout_p, return_lse=True)
    assert few.lse is not None
    lse = result.lse + (shift.to(result.lse.dtype) if isinstance(shift, Tensor) else shift)
    return merge_attention([(result.output, lse), (few.output, few.lse)])[0]


def check_grid(grid: Any, prefix: Any) -> tuple[int, ...]:
    """Check the sizes of a grid and the number of tokens before it; return the sizes.

    Args:
        grid: The sizes.
        prefix: The number of tokens.

    Raises:
        OptionError: If the sizes are no sequence of integers of at least 1, or the number is none of at least 0.
    """
    if isinstance(grid, str) or not isinstance(grid, Sequence) or len(grid) == 0:
        raise OptionError(f"grid must be one size a mode, got {grid!r}.")
    for mode, size in enumerate(grid):
        if not is_integer(size) and not isinstance(size, torch.SymInt):
            raise OptionError(f"grid must be one size a mode, but the size of mode {mode} is {size!r}.")
        if size < 1:
            raise OptionError(f"every mode needs at least 1 index, but grid has size {size} for mode {mode}.")
    check(prefix, "prefix", "integer", least=0)
    return tuple(grid)


def _check_tensors(query: Tensor, key: Tensor, value: Tensor, sizes: tuple[int, ...], prefix: int) -> None:
    """Check queries, keys and values against each other and against the grid."""
    check_floating(query=query, key=key, value=value)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4:
            raise ShapeError(f"{name} has {tensor.dim()} dimensions, but (B, H, L, D) needs 4.")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.shape[0] != query.shape[0]:
            raise ShapeError(f"the batch is {query.shape[0]} in query but {tensor.shape[0]} in {name}.")
        if tensor.shape[2] != query.shape[2]:
            raise ShapeError(f"query has {query.shape[2]} tokens, but {name} has {tensor.shape[2]}.")
    if key.shape[1] != value.shape[1]:
        raise ShapeError(f"key has {key.shape[1]} heads, but value has {value.shape[1]}.")
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise ShapeError(f"key has {key.shape[1]} heads, which do not divide the {query.shape[1]} heads of query.")
    if key.shape[-1] != query.shape[-1]:
        raise ShapeError(f"query has head size {query.shape[-1]}, but key has {key.shape[-1]}.")
    length, positions = query.shape[2], math.prod(sizes)
    if positions != length - prefix:
        more, behind = length - prefix - positions, f" behind a prefix of {prefix}" if prefix else ""
        hint = f"Class and register tokens are a prefix: prefix={prefix + more}." if 0 < more < positions / 8 else ""
        raise ShapeError(
            f"grid {sizes} has {positions} positions, but query has {length - prefix} tokens{behind}.", hint=hint
        )


def _split_mask(mask: Any, query: Tensor, sizes: tuple[int, ...], prefix: int) -> tuple[Tensor | None, Tensor | None]:
    """Check a mask of keys; return that of the prefix, None if all of it takes part, and that of the grid."""
    if mask is None:
        return None, None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise DtypeError(f"key_mask must be bool, True where a key takes part, but has the type {got}.")
    batch, _, length, _ = query.shape
    if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] not in (length, length - prefix):
        shapes = dict.fromkeys(((batch, length), (batch, math.prod(sizes))))
        raise ShapeError(
            f"key_mask has shape {tuple(mask.shape)}, but must have {' or '.join(map(str, map(tuple, shapes)))}."
        )
    if prefix == 0 or mask.shape[1] != length:
        return None, mask
    return mask[:, :prefix], mask[:, prefix:]


def _whole(first: Tensor | None, rest: Tensor, prefix: int) -> Tensor:
    """Return the mask of all tokens ``(B, 1, L)``."""
    first = rest.new_ones(rest.shape[0], prefix) if first is None else first
    return torch.cat([first, rest], -1).unsqueeze(1)
