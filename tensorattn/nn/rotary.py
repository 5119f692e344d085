"""Rotary embedding: channels of queries and keys turned by the positions, a share of them for each mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tensorattn.errors import OptionError, ShapeError, retells
from tensorattn.functional import get_operator
from tensorattn.masks import Part
from tensorattn.nn.coordinates import Coordinates, ModeCoordinates, Periodic, Spacing, pairs_a_mode
from tensorattn.nn.layout import check_grid, show_modes

__all__ = ["RotaryEmbedding"]


class RotaryEmbedding(nn.Module):
    r"""Turn the channels of queries and keys by their positions, so that logits see differences of positions alone.

    Every mode has its own share of the channels of a head. The pairs of channels in the share of mode m turn by the
    place along it times a frequency each; then :math:`q_i \cdot k_j` depends on the places through
    :math:`i_m - j_m` only, :math:`m = 1 \dots N`. Along a periodic mode the frequencies are whole multiples of the
    turn: only the way around the circle counts.

    What it means for the operators, with queries and keys turned before they are called:

    - ``flattened``: what it is made for. ``clustered`` comes close to it, with more tokens than without turns.
    - ``axial``: along a fibre only its own mode differs, so only its share counts.
    - ``kronecker_product`` and ``kronecker_sum`` pool first: turn pooled queries and keys with `rotate_mode`. Turned
      before, they are averaged over turns of the other modes, whose shares fade.
    - ``additive``, ``truncated``, ``kao_kv`` and ``kao_qkv`` average turned keys, in which the shares of the other
      modes fade, and so do positions with them. Turned keys are additive only if the share of every mode depends on
      that mode alone; for other additive keys, exactness is lost. `check_operator` refuses these operators. Additive
      positions keep exactness: `SinCosPositions`.

    Args:
        head_dim: Channels D of a head: at least two a mode. A last odd channel is left as it is.
        modes: Modes of the grid: their number, or their names as in ``"t h w"``.
        periodic: Modes that are circles, by name or index: ``("lon",)``; the indices then cover the circle evenly,
            once. Or a mapping to their periods in the unit of their coordinates: ``{"lon": 360.0}``.
        spacing: Distance between the indices: one number, one a mode, or a mapping as in ``{"z": 2.5}``; 1 where there
            is none. Coordinates take its place.
        base: Ratio of the fastest frequency to a little below the slowest.

    Raises:
        ModesError: If modes are missing or named badly, or an option names one that does not exist.
        OptionError: If there are less than two channels a mode, a number is not positive and finite, or a periodic
            mode has a spacing but no period.

    Shape:
        - input and output: :math:`(*, n_1, \dots, n_N, D)`
        - coordinates: :math:`(n_m)` or :math:`(*, n_m)`

    Examples:
        >>> import torch, tensorattn as ta
        >>> rotary = ta.RotaryEmbedding(24, modes="t h w")
        >>> q, k, v = torch.randn(3, 2, 4, 3, 5, 6, 24).unbind(0)
        >>> ta.axial_attention(rotary(q), rotary(k), v, order=3).shape
        torch.Size([2, 4, 3, 5, 6, 24])

    References:
        Su, Lu, Pan, Murtadha, Wen and Liu, "RoFormer", 2021, arXiv 2104.09864. Heo, Park, Han and Yun, "Rotary Position
        Embedding for Vision Transformer", 2024, arXiv 2403.13298, for the default of ``base``.
    """

    __call__: Callable[..., Tensor]  # a module says Any

    @retells
    def __init__(
        self,
        head_dim: int,
        *,
        modes: int | str | Sequence[str] | None = None,
        periodic: Periodic = (),
        spacing: Spacing | None = None,
        base: float = 100.0,
    ) -> None:
        super().__init__()
        self.axes = ModeCoordinates.parse(modes, periodic, spacing)
        self.modes = self.axes.modes
        self.pairs = pairs_a_mode(head_dim, self.modes, "head_dim", base)
        self.head_dim, self.base = head_dim, base

    def extra_repr(self) -> str:
        """Describe the settings that are not the default ones."""
        parts = [f"head_dim={self.head_dim}", f"modes={show_modes(self.modes)}", *self.axes.shown()]
        return ", ".join(parts + [f"base={self.base}"] * (self.base != 100))

    @retells
    def forward(self, tensor: Tensor, *, coordinates: Coordinates | None = None) -> Tensor:
        """Turn queries or keys over a grid, the share of every mode by its own places.

        Args:
            tensor: Queries or keys over a grid. Half precision is turned in float32.
            coordinates: Where the indices lie: one vector ``(n_m,)`` or ``(*batch, n_m)`` a mode, or None for evenly
                spaced ones; or a mapping from names or indices of modes to vectors.

        Returns:
            The turned tensor, of the same shape and type.

        Raises:
            ShapeError: If the tensor has too few dimensions, other channels or an empty mode, or coordinates have
                another length than their mode.
            DtypeError: If the tensor is not floating point.
            ModesError: If coordinates are not one a mode, or name a mode that does not exist.
            OptionError: If coordinates are not finite, or those of a circle are given without its period.
        """
        grid = check_grid(tensor, self.modes, "tensor")
        self._check_channels(grid.dim)
        return self.turned(tensor, None, self.axes.check(coordinates, grid, tensor))

    def turned(self, tensor: Tensor, part: Part | None, coordinates: Sequence[Tensor | None] | None = None) -> Tensor:
        """Turn queries or keys, unchecked: over a grid, or over a part of one.

        Args:
            tensor: Queries or keys ``(*batch, n_1, …, n_N, D)``.
            part: Where it stands in a larger grid, or None.
            coordinates: One checked vector or None a mode; None for none.

        Returns:
            The turned tensor.
        """
        order = self.modes.order
        sizes = tuple(tensor.shape[-order - 1 : -1])
        *shares, odd = tensor.tensor_split([2 * sum(self.pairs[: mode + 1]) for mode in range(order)], -1)
        turned = []
        for mode, places in enumerate(coordinates or (None,) * order):
            whole = sizes[mode] if part is None else part.sizes[mode]
            angles = self.axes.angles(mode, whole, places, tensor, self.pairs[mode], self.base)
            angles = angles if part is None else part.own(angles, mode, -2)
            beside = (sizes[mode] if k == mode else 1 for k in range(order))
            turned.append(_turn(shares[mode], angles.reshape(*angles.shape[:-2], *beside, angles.shape[-1])))
        return torch.cat([*turned, odd], -1)

    @retells
    def rotate_mode(self, tensor: Tensor, mode: int | str, *, coordinates: Tensor | None = None) -> Tensor:
        """Turn queries or keys pooled over all modes but one, in the share of that mode.

        Attention from pooled queries to pooled keys of mode m, both turned, then depends on differences of its places
        alone. Where the share of every mode depends on that mode alone, `kronecker_product_attention` of queries
        and keys turned so equals flattened attention of queries and keys turned by all modes, for any values.

        Args:
            tensor: Pooled queries or keys ``(*batch, n_m, D)``. Half precision is turned in float32.
            mode: The mode, by name or index.
            coordinates: Where its indices lie, ``(n_m,)`` or ``(*batch, n_m)``; None for evenly spaced ones.

        Returns:
            The turned tensor, of the same shape and type.

        Raises:
            ShapeError: If the tensor has too few dimensions, other channels or an empty mode, or coordinates have
                another length than the mode.
            DtypeError: If the tensor is not floating point.
            ModesError: If the mode does not exist.
            OptionError: If coordinates are not finite, or those of a circle are given without its period.
        """
        index = self.modes.index(mode)
        alone = self.axes.alone(index)
        grid = check_grid(tensor, alone.modes, "tensor")
        self._check_channels(grid.dim)
        (places,) = alone.check(None if coordinates is None else [coordinates], grid, tensor)
        angles = alone.angles(0, grid.sizes[0], places, tensor, self.pairs[index], self.base)
        start, width = 2 * sum(self.pairs[:index]), 2 * self.pairs[index]
        before, share, after = tensor.tensor_split([start, start + width], -1)
        return torch.cat([before, _turn(share, angles), after], -1)

    @retells
    def check_operator(self, operator: str, **options: Any) -> None:
        """Refuse an operator that averages keys of different turns.

        What is left are operators that see the keys of all positions, and those that turn what they pool for each mode.

        Args:
            operator: Its name in `OPERATORS`.
            **options: Its options, modes by their indices.

        Raises:
            OptionError: If turned keys have no meaning for it, or there is no such operator or option.
        """
        record, order = get_operator(operator), self.modes.order
        needs = record.needs(order, **record.with_defaults(options))
        if not record.pools and needs.averages_keys(order):
            raise OptionError(
                f"rotary has no meaning for operator {operator!r}, which averages keys of different turns.",
                hint="Add positions instead, which keeps exactness: SinCosPositions or LearnedPositions.",
            )

    def _check_channels(self, channels: int) -> None:
        """Refuse other channels than those of a head."""
        if channels != self.head_dim:
            raise ShapeError(f"tensor has {channels} channels, but head_dim is {self.head_dim}.")


def _turn(share: Tensor, angles: Tensor) -> Tensor:
    """Turn neighbouring channels ``(*, 2K)`` as points of a plane by angles ``(*, K)``."""
    dtype = torch.promote_types(share.dtype, torch.float32)  # half precision is multiplied in float32
    x, y = share.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.stack([x * cos - y * sin, x * sin + y * cos], -1).flatten(-2).to(share.dtype)
