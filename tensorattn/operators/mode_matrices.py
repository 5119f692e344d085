"""One attention matrix a mode, from pooled queries and keys: what the two Kronecker operators share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tensorattn.contraction_tree import main_effects
from tensorattn.errors import OptionError
from tensorattn.fused import is_differentiated
from tensorattn.summarizing import Needs
from tensorattn.summary import Summary
from tensorattn.weighing import weighted_means
from tensorattn.weights import GridWeights, accumulation_dtype, log_weights

__all__ = [
    "POOLED",
    "along_mode",
    "counts_indices",
    "matrices_needs",
    "mode_matrices",
    "over_present",
    "position_column",
    "takes_means",
]

POOLED = "its queries are pooled over positions"


def matrices_needs(order: int, pool: str) -> Needs:
    """Return what the Kronecker operators need: mean keys a mode, and the values themselves.

    Args:
        order: Number of modes N.
        pool: ``"mean"`` or ``"sum"``.

    Raises:
        OptionError: If ``pool`` is neither.
    """
    if pool not in ("mean", "sum"):
        raise OptionError(f"pool must be 'mean' or 'sum', got {pool!r}.")
    everything = tuple(range(order))
    effects = main_effects(order)
    return Needs(tuple(dict.fromkeys((*effects, everything))), keys=effects, values=(everything,))


def takes_means(**_: Any) -> bool:
    """Pooled queries are all that the Kronecker operators need of the queries."""
    return True


def counts_indices(*, pool: str) -> bool:
    """Sums over positions count them.

    Args:
        pool: ``"mean"`` or ``"sum"``.
    """
    return pool == "sum"


def mode_matrices(
    query: Tensor | Sequence[Tensor],
    summary: Summary,
    *,
    scale: float,
    pool: str,
    dropout_p: float,
    return_lse: bool,
    query_norm: Callable[[Tensor], Tensor] | None = None,
    key_norm: Callable[[Tensor], Tensor] | None = None,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor | None]:
    """Return the attention matrix of each mode, ``(*batch, n_m, n_m)``.

    Where the weights of positions are no product over modes, an index only has to have a position present: weights then
    meet the values, position by position (`over_present`).

    Args:
        query: Queries over the grid, or their mean a mode ``(*batch, n_m, D)``.
        summary: Summary with the mean keys of each mode.
        scale: Factor of the logits.
        pool: Whether queries and keys are pooled by ``"mean"`` or ``"sum"``.
        dropout_p: Probability of dropping an attention weight.
        return_lse: Whether to return the log-sum-exp, at order 1.
        query_norm: Applied to pooled queries.
        key_norm: Applied to pooled keys.

    Returns:
        The matrices; the same with dropout; and the log-sum-exp or None. Rows of absent batch entries are zero.
    """
    effects = main_effects(summary.order)
    means = weighted_means(query, effects, summary.position_weights()) if isinstance(query, Tensor) else tuple(query)
    dtype = accumulation_dtype(means[0].dtype)
    matrices, lse = [], None
    for mode, kept in enumerate(effects):
        queries, keys = means[mode].to(dtype), summary.key(kept).to(dtype)
        if pool == "sum":
            count = _others(summary, mode)
            queries, keys = queries * count, keys * count
        log_weight = _column_log_weight(summary, mode)
        if log_weight is not None:  # an absent index may hold so much that its logits overflow
            keys = keys.masked_fill((log_weight == -math.inf).unsqueeze(-1), 0.0)
        queries = queries if query_norm is None else query_norm(queries)
        keys = keys if key_norm is None else key_norm(keys)
        logits = (queries * scale) @ keys.mT
        if log_weight is None:
            matrix = torch.softmax(logits, -1)
            present = None
        else:
            logits = logits + log_weight.unsqueeze(-2)
            present = logits.amax(-1, keepdim=True) > -math.inf
            logits = torch.where(present, logits, 0.0)
            matrix = torch.softmax(logits, -1) * present
        if return_lse:
            lse = torch.logsumexp(logits, -1)
            lse = lse if present is None else torch.where(present.squeeze(-1), lse, -math.inf)
        matrices.append(matrix)
    dropped = tuple(F.dropout(matrix, dropout_p) if dropout_p > 0 else matrix for matrix in matrices)
    return tuple(matrices), dropped, lse


def _column_log_weight(summary: Summary, mode: int) -> Tensor | None:
    """Logarithm of how often each index of a mode counts."""
    if summary.mode_weights is not None:
        return summary.mode_log_weight(mode)
    return log_weights((summary.slice_count(mode) > 0).to(summary.key((mode,)).dtype))


def position_column(summary: Summary) -> Tensor | None:
    """Return the weight of each position as a column ``(*batch, n_1, …, n_N, 1)`` where it is no product over modes.

    Args:
        summary: Summary that holds the tensor itself.
    """
    weights = summary.position_weights()
    if not isinstance(weights, GridWeights):
        return None
    return weights.tensor.expand(*summary.batch, *summary.sizes).unsqueeze(-1)


def over_present(weighed: Tensor, share: Tensor) -> Tensor:
    """Divide sums over the positions present by the attention that they got; zero where there is none.

    Attention to a grid with gaps is attention to the whole grid, times the weights, made to sum to one again: full
    attention under a mask is nothing else.

    Args:
        weighed: Attention applied to values times their weights.
        share: The same attention applied to the weights.
    """
    return weighed / torch.where(share > 0, share, 1).to(weighed.dtype)


def _others(summary: Summary, mode: int) -> Tensor | int:
    """Count the positions that share an index of a mode, by weight: ``(*batch, 1 or n_mode, 1)``, or a number."""
    if summary.mode_weights is None:
        return summary.slice_count(mode).to(summary.key((mode,)).dtype).unsqueeze(-1)
    if all(weight is None for weight in summary.mode_weights):
        return summary.positions // summary.sizes[mode]
    count: Tensor | int = 1
    for k, (weight, size) in enumerate(zip(summary.mode_weights, summary.sizes, strict=True)):
        if k != mode:
            count = count * (size if weight is None else weight.sum(-1)[..., None, None])
    return count


def along_mode(matrix: Tensor, tensor: Tensor, mode: int, batch: int) -> Tensor:
    """Multiply a tensor by a matrix along one mode: the mode-k product.

    Args:
        matrix: ``(*batch, n, n_mode)``.
        tensor: ``(*batch, n_1, …, n_N, D)``.
        mode: The mode.
        batch: Number of batch dimensions.
    """
    dim, shape = batch + mode, tensor.shape
    entries, left, right = math.prod(shape[:batch]), math.prod(shape[batch:dim]), math.prod(shape[dim + 1 :])
    seen = tensor.reshape(entries, left, shape[dim], right)
    matrix = matrix.to(tensor.dtype).reshape(entries, *matrix.shape[-2:])
    rows = matrix.shape[-2]
    if left == 1:
        product = torch.bmm(matrix, seen.squeeze(1))
    elif torch.compiler.is_compiling() or entries == 0:
        product = torch.matmul(matrix.unsqueeze(1), seen)
    else:
        # One entry at a time: a product over all would first copy the matrix of an entry for each of its slices.
        pairs = [(factor.expand(left, -1, -1), slices) for factor, slices in zip(matrix, seen, strict=True)]
        product = _stacked_products(pairs) if is_differentiated(matrix, tensor) else _written_products(pairs)
    return product.reshape(*shape[:dim], rows, *shape[dim + 1 :])


def _stacked_products(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Batched products, one entry beside the other."""
    return torch.stack([torch.bmm(*pair) for pair in pairs])


def _written_products(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The same, each written to its place, so that none is held twice."""
    factor, slices = pairs[0]
    product = slices.new_empty(len(pairs), slices.shape[0], factor.shape[-2], slices.shape[-1])
    try:
        for pair, target in zip(pairs, product, strict=True):
            torch.bmm(*pair, out=target)
    except RuntimeError:  # under vmap, where nothing can be written to a place
        return _stacked_products(pairs)
    return product
