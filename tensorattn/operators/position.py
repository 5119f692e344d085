"""What depends on where a query stands: a bias of the logits by position, and causality along one mode."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tensorattn.contraction_tree import Kept
from tensorattn.errors import DtypeError, OptionError, ShapeError
from tensorattn.modes import GridShape, ModeSpec, is_integer, mode_parts
from tensorattn.softmax import TokenSet
from tensorattn.weights import accumulation_dtype, real_tensor

__all__ = ["Bias", "biased", "causal_bias", "check_bias", "check_causal", "frames_first", "frames_last"]

Bias = tuple[Tensor | None, ...]  # for each mode ``(*batch, P_m, n_m)``, or None


def check_bias(
    bias: Sequence[Tensor | None] | None, positions: tuple[int, ...], grid: GridShape, like: Tensor
) -> Bias | None:
    """Check a position bias, bring it to the type of averages, and give it as many batch dimensions as the tensor has.

    Args:
        bias: For each mode a tensor ``(P_m, n_m)`` or ``(*batch, P_m, n_m)``, or None; None for no bias.
        positions: Position dimensions of the query.
        grid: Shape of the keys.
        like: A tensor of the type and device wanted.

    Returns:
        The bias of each mode, ``(*batch, P_m, n_m)`` with batch dimensions that may be 1; None if there is none.

    Raises:
        ShapeError: If there are not N of them, the query is not on a grid of N modes, or a shape does not fit.
        DtypeError: If one is a tensor that is not floating point, or holds no real numbers.
    """
    if bias is None:
        return None
    order = len(grid.sizes)
    given = mode_parts(bias, order, "bias", "tensors", ShapeError)
    if len(positions) != order:
        raise ShapeError(f"bias needs a query over {order} modes, but query has {len(positions)} position dimensions.")
    checked: list[Tensor | None] = []
    for mode, (part, rows, size) in enumerate(zip(given, positions, grid.sizes, strict=True)):
        if part is not None:
            part = real_tensor(part, f"bias of mode {mode}", like, DtypeError)
            if not part.is_floating_point():
                raise DtypeError(f"bias of mode {mode} must be floating point, got {part.dtype}.")
            if part.dim() < 2 or tuple(part.shape[-2:]) != (rows, size):
                raise ShapeError(
                    f"bias of mode {mode} has shape {tuple(part.shape)}, but query has {rows} positions and key "
                    f"{size} along the mode."
                )
            missing = len(grid.batch) - (part.dim() - 2)
            if missing < 0 or any(a not in (1, b) for a, b in zip(part.shape[:-2], grid.batch[missing:], strict=True)):
                raise ShapeError(
                    f"bias of mode {mode} has batch dimensions {tuple(part.shape[:-2])}, "
                    f"which do not broadcast to {grid.batch}."
                )
            part = part.reshape(*(1,) * missing, *part.shape).to(accumulation_dtype(like.dtype))
        checked.append(part)
    return tuple(checked)


def check_causal(causal: int | None, positions: tuple[int, ...], grid: GridShape) -> int | None:
    """Check the causal mode.

    Args:
        causal: Index of the mode, or None.
        positions: Position dimensions of the query.
        grid: Shape of the keys.

    Returns:
        The index, from 0 to N−1, or None.

    Raises:
        ModesError: If there is no such mode.
        OptionError: If it is not an integer.
        ShapeError: If the query does not have the frames of the keys along that mode.
    """
    if causal is None:
        return None
    if not is_integer(causal):
        raise OptionError(f"causal must be the index of a mode, got {causal!r}.")
    mode = ModeSpec.parse(len(grid.sizes)).index(causal)
    if len(positions) != len(grid.sizes):
        raise ShapeError(
            f"causal needs a query over {len(grid.sizes)} modes, but query has {len(positions)} position dimensions."
        )
    if positions[mode] != grid.sizes[mode]:
        raise ShapeError(
            f"causal needs the same frames in query and key, but mode {mode} has size {positions[mode]} in query "
            f"and {grid.sizes[mode]} in key."
        )
    return mode


def frames_first(tensor: Tensor, mode: int, batch: int) -> Tensor:
    """Make the frames the last batch dimension and leave a mode of size 1: ``(*batch, n_mode, …, 1, …, D)``.

    Args:
        tensor: Tensor over the grid.
        mode: The causal mode.
        batch: Number of batch dimensions.
    """
    return tensor.movedim(batch + mode, batch).unsqueeze(batch + 1 + mode)


def frames_last(tensor: Tensor, mode: int, batch: int) -> Tensor:
    """Undo `frames_first`.

    Args:
        tensor: Result of `frames_first`.
        mode: The causal mode.
        batch: Number of batch dimensions, without the frames.
    """
    return tensor.squeeze(batch + 1 + mode).movedim(batch, batch + mode)


def causal_bias(bias: Bias, mode: int) -> Bias:
    """Rearrange a bias as `frames_first` rearranges the query.

    Args:
        bias: Checked bias.
        mode: The causal mode.
    """
    return tuple(
        part if part is None else part.unsqueeze(-2) if k == mode else part.unsqueeze(-3) for k, part in enumerate(bias)
    )


def biased(tokens: TokenSet, kept: Kept, bias: Bias | None, positions: Sequence[int], sizes: Sequence[int]) -> TokenSet:
    """Add the bias of the kept modes to a set of tokens.

    Args:
        tokens: Means over the modes that are not kept.
        kept: Modes kept.
        bias: Checked bias, or None.
        positions: Position dimensions of the query, one a mode.
        sizes: Sizes of the modes of the keys.

    Returns:
        The tokens, with one row of bias for each query position along the kept modes.
    """
    if bias is None or all(bias[mode] is None for mode in kept):
        return tokens
    parts = {mode: part for mode in kept if (part := bias[mode]) is not None}
    rows, columns = [positions[mode] for mode in kept], [sizes[mode] for mode in kept]
    spread = []
    for mode, part in parts.items():
        ones = [1 if k != mode else -1 for k in kept]
        row_shape = [part.shape[-2] if size < 0 else 1 for size in ones]
        column_shape = [part.shape[-1] if size < 0 else 1 for size in ones]
        spread.append(part.reshape(*part.shape[:-2], *row_shape, *column_shape))
    total = functools.reduce(torch.add, spread)
    batch = total.dim() - 2 * len(kept)
    total = total.expand(*total.shape[:batch], *rows, *columns)
    total = total.reshape(*total.shape[:batch], math.prod(rows), math.prod(columns))
    index = torch.arange(math.prod(rows), device=total.device)
    index = index.reshape([positions[mode] if mode in kept else 1 for mode in range(len(positions))])
    return tokens._replace(bias=total, rows=index.expand(*positions).reshape(-1))
