"""Embeddings of positions: one vector for each index of each mode, joined by outer sum."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorattn.averages import outer_sum
from tensorattn.errors import ModesError, ShapeError, check, retells
from tensorattn.masks import Part
from tensorattn.modes import GridShape, ModeSpec
from tensorattn.nn.coordinates import Coordinates, ModeCoordinates, Periodic, Spacing, pairs_a_mode
from tensorattn.nn.layout import check_input, check_parameters, show_modes

__all__ = ["LearnedPositions", "SinCosPositions"]


class _Positions(nn.Module):
    """What both embeddings share: vectors of the modes are added to the input."""

    __call__: Callable[..., Tensor]  # a module says Any

    counted = False  # whether coordinates along a circle without a period count its indices

    def __init__(self, embed_dim: int, axes: ModeCoordinates, channels_first: bool) -> None:
        super().__init__()
        check(embed_dim, "embed_dim", "integer", least=1)
        self.embed_dim, self.axes, self.modes, self.channels_first = embed_dim, axes, axes.modes, channels_first

    @retells
    def forward(self, x: Tensor, *, coordinates: Coordinates | None = None, part: Part | None = None) -> Tensor:
        """Add the embedding of its positions to an input.

        Args:
            x: Input, channels last or first as the module was told.
            coordinates: Where the indices lie: one vector ``(n_m,)`` or ``(B, n_m)`` a mode, or None for evenly spaced
                ones; or a mapping from names or indices of modes to vectors. None for evenly spaced ones everywhere.
            part: Where the input stands in a larger one, whose coordinates are given; None where it is whole.

        Returns:
            The sum, of the shape and type of the input.

        Raises:
            ShapeError: If the input has the wrong number of dimensions or channels, or an empty mode, or
                coordinates have another length than their mode.
            DtypeError: If the input is not floating point.
            ModesError: If coordinates are not one a mode, or name a mode that does not exist.
            OptionError: If coordinates are not finite, or those of a circle are given without its period.
        """
        grid = check_input(x, self.modes, self.embed_dim, channels_first=self.channels_first, part=part)
        vectors = self._vectors(grid if part is None else grid._replace(sizes=part.sizes), coordinates, x)
        if part is not None:
            vectors = tuple([part.own(vector, mode, -2) for mode, vector in enumerate(vectors)])
        batch = torch.broadcast_shapes(*(vector.shape[:-2] for vector in vectors))
        embedding = outer_sum([vector.to(x.dtype).expand(*batch, *vector.shape[-2:]) for vector in vectors])
        return x + (embedding.movedim(-1, -1 - self.modes.order) if self.channels_first else embedding)

    @retells
    def vectors(self, sizes: Sequence[int], *, coordinates: Coordinates | None = None) -> tuple[Tensor, ...]:
        """Return the vectors of the indices of each mode, ``(n_m, C)``; their outer sum is the embedding.

        Args:
            sizes: Sizes of the modes.
            coordinates: One vector ``(n_m,)`` a mode, or None; or a mapping from modes.

        Raises:
            ShapeError: If a size is below 1, or coordinates have another length than their mode.
            ModesError: If sizes or coordinates are not one a mode, or a mode does not exist.
            OptionError: If coordinates are not finite, or those of a circle are given without its period.
        """
        grid = GridShape((), _check_sizes(sizes, self.modes), self.embed_dim)
        return self._vectors(grid, coordinates, next(self.parameters(), torch.empty(0)))

    def _vectors(self, grid: GridShape, coordinates: Coordinates | None, like: Tensor) -> tuple[Tensor, ...]:
        """Return the vectors of each mode on the device of a tensor."""
        checked = self.axes.check(coordinates, grid, like, counted=self.counted)
        places = zip(grid.sizes, checked, strict=True)
        return tuple(self._vector(mode, size, place, like) for mode, (size, place) in enumerate(places))

    def _vector(self, mode: int, size: int, coordinates: Tensor | None, like: Tensor) -> Tensor:
        """Return the vectors of one mode, ``(n_m, C)`` or ``(B, n_m, C)``."""
        raise NotImplementedError

    def _show(self, *settings: str) -> str:
        """Describe settings, and what both embeddings share where it is not the default."""
        shown = [f"embed_dim={self.embed_dim}", *settings, *["channels_first=True"] * self.channels_first]
        return ", ".join(shown)


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
        ModesError: If modes are missing or named badly, or an option names one that does not exist.
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

    @retells
    def __init__(
        self,
        embed_dim: int,
        *,
        modes: int | str | Sequence[str] | None = None,
        periodic: Periodic = (),
        spacing: Spacing | None = None,
        base: float = 10_000.0,
        channels_first: bool = False,
    ) -> None:
        super().__init__(embed_dim, ModeCoordinates.parse(modes, periodic, spacing), channels_first)
        self.pairs = pairs_a_mode(embed_dim, self.modes, "embed_dim", base)
        self.base = base

    def extra_repr(self) -> str:
        """Describe the settings that are not the default ones."""
        base = [f"base={self.base}"] * (self.base != 10_000)
        return self._show(f"modes={show_modes(self.modes)}", *self.axes.shown(), *base)

    def _vector(self, mode: int, size: int, coordinates: Tensor | None, like: Tensor) -> Tensor:
        """Put the sines and cosines of a mode into its share of the channels."""
        start, count = 2 * sum(self.pairs[:mode]), self.pairs[mode]
        angles = self.axes.angles(mode, size, coordinates, like, count, self.base)
        waves = torch.cat([angles.sin(), angles.cos()], -1).to(torch.promote_types(like.dtype, torch.float32))
        return F.pad(waves, (start, self.embed_dim - start - 2 * count))


class LearnedPositions(_Positions):
    r"""Add a learned embedding of positions to a tensor of any order: one table a mode, joined by outer sum.

    S = n_1 + … + n_N vectors in place of P = n_1 ⋯ n_N. On another size than that of its table the table is
    stretched: its mode covers the same extent, in finer or coarser steps, and values between entries are
    interpolated linearly. A periodic mode is interpolated around its circle, where index 0 stays at index 0.

    Coordinates count entries of the table, the first at 0, or parts of the period where a circle has one. Beyond the
    ends of a table its last values hold. As `SinCosPositions`, the embedding keeps additive tensors additive.

    Args:
        embed_dim: Channels C of the input.
        sizes: Size of the table of each mode.
        modes: Modes of the input: their number, or their names as in ``"t h w"``.
        periodic: Modes that are circles, by name or index: ``("lon",)``. Or a mapping to their periods in the unit of
            their coordinates: ``{"lon": 360.0}``.
        channels_first: Whether inputs are ``(B, C, n_1, …, n_N)`` instead of ``(B, n_1, …, n_N, C)``.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Raises:
        ModesError: If modes are missing or named badly, an option names one that does not exist, or sizes are not one
            a mode.
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
        >>> positions.resized((8, 20, 10)).sizes
        (8, 20, 10)
    """

    counted = True

    @retells
    def __init__(
        self,
        embed_dim: int,
        sizes: Sequence[int],
        *,
        modes: int | str | Sequence[str] | None = None,
        periodic: Periodic = (),
        channels_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(embed_dim, ModeCoordinates.parse(modes, periodic), channels_first)
        checked = _check_sizes(sizes, self.modes)
        self.tables = nn.ParameterList(torch.empty(size, embed_dim, device=device, dtype=dtype) for size in checked)
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
        return self._show(f"sizes={self.sizes}", f"modes={show_modes(self.modes)}", *self.axes.shown())

    @retells
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
        with torch.no_grad():
            vectors = self._vectors(
                GridShape((), _check_sizes(sizes, self.modes), self.embed_dim), None, self.tables[0]
            )
        twin = copy.deepcopy(self)
        pairs = zip(vectors, self.tables, strict=True)
        twin.tables = nn.ParameterList(nn.Parameter(vector, requires_grad=old.requires_grad) for vector, old in pairs)
        return twin

    def _vector(self, mode: int, size: int, coordinates: Tensor | None, like: Tensor) -> Tensor:
        """Read the table of a mode between its entries, in one way for all sizes, so that one graph serves them."""
        table, circle, period = self.tables[mode], self.axes.periodic[mode], self.axes.periods[mode]
        check_parameters(like, table)
        entries = table.shape[0]
        if coordinates is not None:
            places = (coordinates if period is None else coordinates * (entries / period)).to(table.device)
        else:
            indices = torch.arange(size, device=table.device, dtype=torch.promote_types(table.dtype, torch.float32))
            # An index is a cell of the extent, so places of cells agree in the middle, but on a circle at index 0.
            places = indices * (entries / size) if circle else (indices + 0.5) * (entries / size) - 0.5
        places = torch.remainder(places, entries) if circle else places.clamp(0, entries - 1)
        below = places.floor()
        first, part = below.long(), (places - below).to(table.dtype).unsqueeze(-1)
        # Rounding may lift the remainder to a whole circle; the entry after the last is the first, or none.
        first = first % entries if circle else first
        second = (first + 1) % entries if circle else (first + 1).clamp(max=entries - 1)
        return torch.lerp(table[first], table[second], part)


def _check_sizes(sizes: Sequence[int], modes: ModeSpec) -> tuple[int, ...]:
    """Check that there is a size of at least one for every mode."""
    if len(sizes) != modes.order:
        raise ModesError(f"modes names {modes.order} modes, but sizes has {len(sizes)}.")
    for name, size in zip(modes.names, sizes, strict=True):
        if size < 1:
            raise ShapeError(f"mode {name!r} has size {size} in sizes, but every mode needs at least 1 index.")
    return tuple(sizes)
