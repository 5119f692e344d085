"""Embeddings of positions: one vector for each index of each mode, joined by outer sum."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorattn.contraction import expand
from tensorattn.contraction_tree import main_effects
from tensorattn.errors import ModesError, OptionError, ShapeError, TensorAttentionError
from tensorattn.modes import GridShape
from tensorattn.nn.coordinates import Coordinates, ModeCoordinates, Periodic, Spacing, check_base, pairs_a_mode
from tensorattn.nn.layout import check_input, check_parameters, reading, show_modes
from tensorattn.weights import Vector, accumulation_dtype

__all__ = ["LearnedPositions", "SinCosPositions"]


class _Positions(nn.Module):
    """What both embeddings share: vectors of the modes are added to the input."""

    counted = False  # whether coordinates along a circle without a period count its indices

    def __init__(self, embed_dim: int, axes: ModeCoordinates, channels_first: bool) -> None:
        super().__init__()
        if embed_dim < 1:
            raise OptionError(f"embed_dim must be at least 1, got {embed_dim}.")
        self.embed_dim, self.axes, self.channels_first = embed_dim, axes, channels_first

    def forward(self, x: Tensor, *, coordinates: Coordinates | None = None) -> Tensor:
        """Add the embedding of its positions to an input.

        Args:
            x: Input, channels last or first as the module was told.
            coordinates: Where the indices lie: one vector ``(n_m,)`` or ``(B, n_m)`` a mode, or None for evenly spaced
                ones; or a mapping from names or indices of modes to vectors. None for evenly spaced ones everywhere.

        Returns:
            The sum, of the shape and type of the input.

        Raises:
            ShapeError: If the input has the wrong number of dimensions or channels, or an empty mode, or
                coordinates have another length than their mode.
            DtypeError: If the input is not floating point.
            ModesError: If coordinates are not one a mode, or name a mode that does not exist.
            OptionError: If coordinates are not finite, or those of a circle are given without its period.
        """
        modes = self.axes.modes
        try:
            grid = check_input(x, modes, self.embed_dim, channels_first=self.channels_first)
            vectors = self._vectors(grid, self.axes.check(coordinates, grid, x, counted=self.counted), x)
        except TensorAttentionError as cause:
            told = reading(x, modes, channels_first=self.channels_first)
            raise cause.retold(type(self).__name__, told) from None
        batch = torch.broadcast_shapes(*(vector.shape[:-2] for vector in vectors))
        parts = [vector.to(x.dtype).expand(*batch, *vector.shape[-2:]) for vector in vectors]
        embedding = expand(parts, main_effects(modes.order), GridShape(tuple(batch), grid.sizes, self.embed_dim))
        return x + (embedding.movedim(-1, -1 - modes.order) if self.channels_first else embedding)

    def vectors(self, sizes: Sequence[int], *, coordinates: Coordinates | None = None) -> tuple[Tensor, ...]:
        """Return the vectors of the indices of each mode; their outer sum is the embedding.

        Args:
            sizes: Sizes of the modes.
            coordinates: One vector ``(n_m,)`` a mode, or None; or a mapping from modes.

        Returns:
            One tensor ``(n_m, C)`` a mode.

        Raises:
            ShapeError: If a size is below 1, or coordinates have another length than their mode.
            ModesError: If sizes or coordinates are not one a mode, or a mode does not exist.
            OptionError: If coordinates are not finite, or those of a circle are given without its period.
        """
        try:
            checked = _check_sizes(sizes, self.axes)
            like = next(self.parameters(), torch.empty(0))
            grid = GridShape((), checked, self.embed_dim)
            return self._vectors(grid, self.axes.check(coordinates, grid, like, counted=self.counted), like)
        except TensorAttentionError as cause:
            raise cause.retold(f"{type(self).__name__}.vectors") from None

    def _vectors(self, grid: GridShape, coordinates: tuple[Vector, ...], like: Tensor) -> tuple[Tensor, ...]:
        """Return the vectors of each mode on the device of a tensor."""
        raise NotImplementedError


class SinCosPositions(_Positions):
    r"""Add sines and cosines of positions to a tensor of any order: no parameters, any size.

    Every mode has its own share of the channels, half sines and half cosines of K frequencies. Along an ordinary mode
    they are :math:`\mathrm{base}^{-k/K}` for :math:`k = 0 \dots K-1` per unit of its coordinates; along a
    periodic one they are the whole multiples 1 … K of the turn, so the embedding is continuous where the circle closes.

    The embedding is an outer sum of one vector a mode. An additive tensor plus it is additive, so every operator that
    is exact on additive tensors stays exact.

    Args:
        embed_dim: Channels C of the input: at least two a mode.
        modes: Modes of the input: their number, or their names as in ``"t h w"``.
        periodic: Modes that are circles, by name or index: ``("lon",)``; the indices then cover the circle evenly,
            once. Or a mapping to their periods in the unit of their coordinates: ``{"lon": 360.0}``.
        spacing: Distance between the indices: one number, one a mode, or a mapping as in ``{"z": 2.5}``; 1 where there
            is none. Coordinates take its place.
        base: Ratio of the fastest frequency to a little below the slowest.
        channels_first: Whether inputs are ``(B, C, n_1, …, n_N)`` instead of ``(B, n_1, …, n_N, C)``.

    Raises:
        ModesError: If modes are named badly, or an option names one that does not exist.
        OptionError: If there are less than two channels a mode, a number is not positive and finite, or a periodic
            mode has a spacing but no period.

    Shape:
        - input and output: :math:`(B, n_1, \dots, n_N, C)`, or :math:`(B, C, n_1, \dots, n_N)` with
          ``channels_first``
        - coordinates: :math:`(n_m)` or :math:`(B, n_m)`

    Examples:
        >>> import torch, tensorattn as ta
        >>> positions = ta.SinCosPositions(96, modes="lat lon time", periodic={"lon": 360.0})
        >>> hours = torch.tensor([0.0, 6.0, 24.0])
        >>> positions(torch.randn(2, 8, 16, 3, 96), coordinates={"time": hours}).shape
        torch.Size([2, 8, 16, 3, 96])
        >>> positions
        SinCosPositions(embed_dim=96, modes='lat lon time', periodic={'lon': 360.0})
    """

    def __init__(
        self,
        embed_dim: int,
        *,
        modes: int | str | Sequence[str],
        periodic: Periodic = (),
        spacing: Spacing | None = None,
        base: float = 10_000.0,
        channels_first: bool = False,
    ) -> None:
        try:
            super().__init__(embed_dim, ModeCoordinates.parse(modes, periodic, spacing), channels_first)
            self.pairs = pairs_a_mode(embed_dim, self.axes.modes, "embed_dim")
            check_base(base)
        except TensorAttentionError as cause:
            raise cause.retold("SinCosPositions") from None
        self.base = base

    def extra_repr(self) -> str:
        """Describe the settings that are not the default ones."""
        parts = [f"embed_dim={self.embed_dim}", f"modes={show_modes(self.axes.modes)}", *self.axes.shown()]
        parts += [f"base={self.base}"] * (self.base != 10_000) + ["channels_first=True"] * self.channels_first
        return ", ".join(parts)

    def _vectors(self, grid: GridShape, coordinates: tuple[Vector, ...], like: Tensor) -> tuple[Tensor, ...]:
        """Put the sines and cosines of each mode into its share of the channels."""
        vectors, start = [], 0
        for mode, (size, count) in enumerate(zip(grid.sizes, self.pairs, strict=True)):
            places = self.axes.places(mode, size, coordinates[mode], like)
            angles = self.axes.angles(mode, places, count, self.base)
            waves = torch.cat([angles.sin(), angles.cos()], -1).to(like.device, accumulation_dtype(like.dtype))
            vectors.append(F.pad(waves, (start, self.embed_dim - start - 2 * count)))
            start += 2 * count
        return tuple(vectors)


class LearnedPositions(_Positions):
    r"""Add a learned embedding of positions to a tensor of any order: one table a mode, joined by outer sum.

    S = n_1 + … + n_N vectors in place of P = n_1 ⋯ n_N. On another size than that of its table the table is
    stretched: its mode covers the same extent, in finer or coarser steps, and values between entries are
    interpolated linearly. A periodic mode is interpolated around its circle, where index 0 stays at index 0.

    The embedding is an outer sum of one vector a mode. An additive tensor plus it is additive, so every operator that
    is exact on additive tensors stays exact.

    Args:
        embed_dim: Channels C of the input.
        sizes: Size of the table of each mode.
        modes: Modes of the input: their number, or their names as in ``"t h w"``.
        periodic: Modes that are circles, by name or index: ``("lon",)``. Or a mapping to their periods in the unit of
            their coordinates: ``{"lon": 360.0}``.
        channels_first: Whether inputs are ``(B, C, n_1, …, n_N)`` instead of ``(B, n_1, …, n_N, C)``.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Coordinates count entries of the table, the first at 0, or parts of the period where a circle has one. Beyond the
    ends of a table its last values hold.

    Raises:
        ModesError: If modes are named badly, an option names one that does not exist, or sizes are not one a mode.
        ShapeError: If a size is below 1.
        OptionError: If there are no channels, or a period is not positive and finite.

    Shape:
        - input and output: :math:`(B, n_1, \dots, n_N, C)`, or :math:`(B, C, n_1, \dots, n_N)` with
          ``channels_first``
        - coordinates: :math:`(n_m)` or :math:`(B, n_m)`

    Examples:
        >>> import torch, tensorattn as ta
        >>> positions = ta.LearnedPositions(96, (16, 14, 14), modes="t h w")
        >>> positions(torch.randn(2, 16, 14, 14, 96)).shape, positions(torch.randn(2, 8, 20, 10, 96)).shape
        (torch.Size([2, 16, 14, 14, 96]), torch.Size([2, 8, 20, 10, 96]))
        >>> positions.resized((8, 20, 10))
        LearnedPositions(
          embed_dim=96, sizes=(8, 20, 10), modes='t h w'
          (tables): ParameterList(
              (0): Parameter containing: [torch.float32 of size 8x96]
              (1): Parameter containing: [torch.float32 of size 20x96]
              (2): Parameter containing: [torch.float32 of size 10x96]
          )
        )
    """

    counted = True

    def __init__(
        self,
        embed_dim: int,
        sizes: Sequence[int],
        *,
        modes: int | str | Sequence[str],
        periodic: Periodic = (),
        channels_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        try:
            super().__init__(embed_dim, ModeCoordinates.parse(modes, periodic, None), channels_first)
            checked = _check_sizes(sizes, self.axes)
        except TensorAttentionError as cause:
            raise cause.retold("LearnedPositions") from None
        tables = (torch.empty(size, embed_dim, device=device, dtype=dtype) for size in checked)
        self.tables = nn.ParameterList(map(nn.Parameter, tables))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the tables anew, normal with a standard deviation of 0.02."""
        for table in self.tables:
            nn.init.normal_(table, std=0.02)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes of the tables, one a mode."""
        return tuple(table.shape[0] for table in self.tables)

    def extra_repr(self) -> str:
        """Describe the settings that are not the default ones."""
        parts = [f"embed_dim={self.embed_dim}", f"sizes={self.sizes}", f"modes={show_modes(self.axes.modes)}"]
        return ", ".join(parts + self.axes.shown() + ["channels_first=True"] * self.channels_first)

    def resized(self, sizes: Sequence[int]) -> LearnedPositions:
        """Return the same embedding with tables of other sizes, interpolated: to go on training there.

        Args:
            sizes: New size of each mode.

        Returns:
            A new module. At these sizes it gives what this one gives.

        Raises:
            ModesError: If sizes are not one a mode.
            ShapeError: If a size is below 1.
        """
        try:
            checked = _check_sizes(sizes, self.axes)
        except TensorAttentionError as cause:
            raise cause.retold("LearnedPositions.resized") from None
        twin = copy.deepcopy(self)
        grid = GridShape((), checked, self.embed_dim)
        with torch.no_grad():
            vectors = self._vectors(grid, (None,) * len(checked), self.tables[0])
        pairs = zip(vectors, self.tables, strict=True)
        twin.tables = nn.ParameterList(
            nn.Parameter(vector.to(table.dtype), requires_grad=table.requires_grad) for vector, table in pairs
        )
        return twin

    def _vectors(self, grid: GridShape, coordinates: tuple[Vector, ...], like: Tensor) -> tuple[Tensor, ...]:
        """Interpolate the table of each mode."""
        check_parameters(like, self.tables[0])
        return tuple(self._interpolated(mode, size, coordinates[mode]) for mode, size in enumerate(grid.sizes))

    def _interpolated(self, mode: int, size: int, coordinates: Vector) -> Tensor:
        """Read the table of a mode between its entries, in one way for all sizes, so that one graph serves them."""
        table, circle, period = self.tables[mode], self.axes.periodic[mode], self.axes.periods[mode]
        entries = table.shape[0]
        if coordinates is None:
            indices = torch.arange(size, device=table.device, dtype=accumulation_dtype(table.dtype))
            # An index is a cell of the extent, so places of cells agree in the middle, but on a circle at index 0.
            places = indices * (entries / size) if circle else (indices + 0.5) * (entries / size) - 0.5
        else:
            places = coordinates if period is None else coordinates * (entries / period)
            places = places.to(table.device)
        places = torch.remainder(places, entries) if circle else places.clamp(0, entries - 1)
        below = places.floor()
        part = (places - below).to(table.dtype).unsqueeze(-1)
        first = below.long()
        # Rounding may lift the remainder to a whole circle; the entry after the last is the first, or none.
        first, second = (
            (first % entries, (first + 1) % entries) if circle else (first, (first + 1).clamp(max=entries - 1))
        )
        return torch.lerp(table[first], table[second], part)


def _check_sizes(sizes: Sequence[int], axes: ModeCoordinates) -> tuple[int, ...]:
    """Check that there is a size of at least one for every mode."""
    names = axes.modes.names
    if len(sizes) != len(names):
        raise ModesError(f"modes names {len(names)} modes, but sizes has {len(sizes)}.")
    for name, size in zip(names, sizes, strict=True):
        if size < 1:
            raise ShapeError(f"mode {name!r} has size {size} in sizes, but every mode needs at least 1 index.")
    return tuple(sizes)
