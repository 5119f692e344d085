r"""The additive fraction: how much of a tensor, or of the logits it gives, its mode averages can express."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tensorattn.diagnose.effects import scaled_queries, shares_of, split
from tensorattn.errors import OptionError, ShapeError, retells
from tensorattn.masks import check_floating, nonzero
from tensorattn.modes import GridShape, grid_shape

__all__ = ["AdditiveFraction", "additive_fraction"]

ROUNDING = 64  # units; logits that vary less than this, relative to what they are sums of, do not vary


@dataclass(frozen=True, eq=False)
class AdditiveFraction:
    r"""Shares of a variance over positions: of the main effect of each mode, and of the interactions.

    The shares of a batch entry, or of a query, add up to 1. Where nothing varies there is nothing to share, and all of
    them are 0.

    Attributes:
        modes: Share of the main effect of each mode, ``(*, N)``.
        interaction: Share of the interaction residual :math:`\eta`, ``(*)``.
        variance: The variance that is shared, ``(*)``.

    Examples:
        >>> rows, columns = torch.tensor([1.0, -1.0]).view(2, 1, 1), torch.tensor([3.0, -3.0]).view(2, 1)
        >>> print(additive_fraction(rows + columns, order=2))
        mode 0: 0.100, mode 1: 0.900, interaction: 0.000
    """

    modes: Tensor
    interaction: Tensor
    variance: Tensor

    @property
    def additive(self) -> Tensor:
        r"""What additive attention sees, :math:`1 - \eta`, ``(*)``: 1 where nothing varies."""
        return 1 - self.interaction

    def pooled(self) -> AdditiveFraction:
        """Return the shares of all batch entries, or of all queries, together: means weighted by the variances.

        Returns:
            The same with no dimension but that of the modes.

        Examples:
            >>> flat, varied = torch.zeros(3, 4, 5), torch.randn(3, 4, 5)
            >>> apart = additive_fraction(torch.stack([flat, varied]), order=2)
            >>> bool(torch.isclose(apart.pooled().interaction, apart.interaction[1]))
            True
        """
        parts = torch.cat([self.modes, self.interaction.unsqueeze(-1)], -1) * self.variance.unsqueeze(-1)
        return _divided(parts.reshape(-1, parts.shape[-1]).sum(0), self.variance.sum() / max(1, self.variance.numel()))

    def __str__(self) -> str:
        whole = self.pooled()
        modes = [f"mode {mode}: {share:.3f}" for mode, share in enumerate(whole.modes.tolist())]
        return ", ".join([*modes, f"interaction: {whole.interaction.item():.3f}"])


@retells
@torch.no_grad()
def additive_fraction(
    tensor: Tensor,
    *,
    order: int,
    weights: Sequence[Tensor | None] | None = None,
    query: Tensor | None = None,
    scale: float | None = None,
) -> AdditiveFraction:
    r"""Measure how additive a tensor is: what its modes, and what their interactions, contribute to its variance.

    .. math:: \sum_j u_j \|x_j - \bar x\|^2
        = \sum_m \sum_a u^m[a]\, \|\bar x^m[a] - \bar x\|^2 + \sum_j u_j \|R_j\|^2

    for any tensor, with shares :math:`u_j = \prod_m u^m[j_m]` of the weight, mode averages :math:`\bar x^m`, and the
    interaction residual R. A tensor is additive, and additive attention exact on it, where the last term is 0. Given
    queries, the same is measured of the logits :math:`s\, q \cdot x_j` that each has with the tensor as keys, which
    is what attention depends on: interactions in channels that no query looks at do no harm. Costs one reading of the
    tensor; with queries, 2PD² operations for P positions and 2(N+1)D² a query.

    Args:
        tensor: Keys, values, or what they are projected from.
        order: Number of modes N.
        weights: One non-negative vector a mode, or None for equal weights: multiplicities, so 2 counts an index as if
            it were repeated, and 0 as if it were absent.
        query: Queries to measure the logits of, or None.
        scale: Factor of the logits; 1/√D if None. It changes their variance, not the shares.

    Returns:
        Shares in float64, for each batch entry on its own, its channels together; or, given queries, for each query.
        `AdditiveFraction.pooled` puts them together.

    Raises:
        ShapeError: If shapes disagree, or a mode is empty.
        DtypeError: If a tensor is not floating point, or the types differ.
        WeightsError: If weights have the wrong length, are negative, not finite, or all zero.
        OptionError: If there is a scale but no query.

    Shape:
        - tensor: :math:`(*, n_1, \dots, n_N, D)`, query: :math:`(*, P_1, \dots, P_M, D)`
        - modes: :math:`(*, N)`, interaction and variance: :math:`(*)`; each with :math:`P_1, \dots, P_M` after the
          batch dimensions if there are queries

    Examples:
        >>> exclusive_or = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])[..., None]
        >>> additive_fraction(exclusive_or, order=2).interaction
        tensor(1., dtype=torch.float64)
        >>> keys = torch.cat([exclusive_or, torch.tensor([0.0, 2.0]).expand(2, 2)[..., None]], -1)
        >>> additive_fraction(keys, order=2, query=torch.eye(2)).interaction
        tensor([1., 0.], dtype=torch.float64)
    """
    if query is None and scale is not None:
        raise OptionError("scale is a factor of logits, but there is no query.")
    if query is None:
        check_floating(tensor=tensor)
        grid_shape(tensor.shape, order, "tensor")
        rows = split(tensor, shares_of(tensor, order, weights)).rows()
        return _divided(torch.stack([part.square().sum((-2, -1)) for part in rows], -1))
    check_floating(tensor=tensor, query=query)
    grid = grid_shape(tensor.shape, order, "tensor")
    _check_query(query, grid)
    rows = split(tensor, shares_of(tensor, order, weights)).rows()
    queries = scaled_queries(query, grid, scale)
    parts = torch.stack([(queries @ _root(part).mT).square().sum(-1) for part in rows], -1)
    spread = torch.cat(rows, -2).square().sum((-2, -1))
    least = (ROUNDING * torch.finfo(parts.dtype).eps) ** 2 * spread.unsqueeze(-1) * queries.square().sum(-1)
    parts = parts * torch.where(parts.sum(-1) > least, 1.0, 0.0).unsqueeze(-1)
    return _divided(parts.reshape(*query.shape[:-1], parts.shape[-1]))


def _divided(parts: Tensor, variance: Tensor | None = None) -> AdditiveFraction:
    """Divide variances ``(*, N + 1)``, the interaction last, by their sum."""
    total = parts.sum(-1)
    shares = parts / nonzero(total).unsqueeze(-1)
    return AdditiveFraction(shares[..., :-1], shares[..., -1], total if variance is None else variance)


def _check_query(query: Tensor, grid: GridShape) -> None:
    """Check that queries belong to keys."""
    batch = tuple(query.shape[: len(grid.batch)])
    if query.dim() < len(grid.batch) + 1:
        raise ShapeError(f"query has {query.dim()} dimensions, but needs at least {len(grid.batch) + 1}.")
    if batch != grid.batch:
        raise ShapeError(f"batch dimensions are {batch} in query but {grid.batch} in tensor.")
    if query.shape[-1] != grid.dim:
        raise ShapeError(f"head size is {query.shape[-1]} in query but {grid.dim} in tensor.")


def _root(rows: Tensor) -> Tensor:
    """Return at most D rows with the same products ``rowsᵀ rows``."""
    return rows if rows.shape[-2] <= rows.shape[-1] else torch.linalg.qr(rows, mode="r").R
