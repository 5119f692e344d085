"""Where the indices of a mode lie: evenly, on a circle, or where the user says; and the angles of places."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tensorattn.errors import ModesError, OptionError, ShapeError, check
from tensorattn.masks import broadcasts_to, one_a_mode, readable
from tensorattn.modes import GridShape, ModeSpec

__all__ = ["Coordinates", "Mode", "ModeCoordinates", "Periodic", "Spacing", "pairs_a_mode"]

Mode = int | str
Periodic = Mode | Sequence[Mode] | Mapping[Mode, float]
Spacing = float | Sequence[float | None] | Mapping[Mode, float]
Coordinates = Sequence[Tensor | None] | Mapping[Mode, Tensor]


@dataclass(frozen=True)
class ModeCoordinates:
    """What is known of the places of indices before any input is seen.

    Attributes:
        modes: The modes.
        periodic: Whether each mode is a circle.
        periods: Circumference of each circle in the unit of its coordinates, or None.
        spacings: Distance between indices of each mode, or None.
    """

    modes: ModeSpec
    periodic: tuple[bool, ...]
    periods: tuple[float | None, ...]
    spacings: tuple[float | None, ...]

    @classmethod
    def parse(
        cls, modes: int | str | Sequence[str] | None, periodic: Periodic, spacing: Spacing | None = None
    ) -> ModeCoordinates:
        """Read the modes, those that are circles, and how far apart their indices are."""
        spec = ModeSpec.parse(modes)
        given: Mapping[Mode, float | None]
        if isinstance(periodic, Mapping):
            given = periodic
        else:
            named = periodic.split() if isinstance(periodic, str) else periodic
            given = dict.fromkeys(named if isinstance(named, Iterable) else (named,))
        circles = {spec.index(mode) for mode in given}
        periods = _positive(one_a_mode(spec, given, "periodic"), spec, "period")
        spacings = _positive(one_a_mode(spec, spacing, "spacing"), spec, "spacing")
        for mode, name in enumerate(spec.names):
            if mode in circles and spacings[mode] is not None and periods[mode] is None:
                raise OptionError(f"spacing of periodic mode {name!r} needs its period.", hint=_with_period(name))
        return cls(spec, tuple(mode in circles for mode in range(spec.order)), periods, spacings)

    def alone(self, mode: int) -> ModeCoordinates:
        """Return what is known of one mode."""
        spec = ModeSpec((self.modes.names[mode],), self.modes.named)
        return ModeCoordinates(spec, (self.periodic[mode],), (self.periods[mode],), (self.spacings[mode],))

    def check(
        self, coordinates: Coordinates | None, grid: GridShape, like: Tensor, *, counted: bool = False
    ) -> tuple[Tensor | None, ...]:
        """Check the coordinates of a call, and bring them to a type fit for angles.

        Values are only looked at where they can be: not while tracing, under ``vmap`` or on the meta device.

        Args:
            coordinates: One vector a mode or None, or a mapping from modes to vectors; None for no vector at all.
            grid: Shape of the tensor whose indices they place.
            like: A tensor of its type.
            counted: Whether coordinates along a circle without a period count its indices.

        Returns:
            One vector or None a mode.

        Raises:
            ModesError: If there are not N vectors, or a mode does not exist.
            ShapeError: If a vector has the wrong length, or batch dimensions that do not broadcast.
            OptionError: If a value is not finite, or a circle has coordinates but no period.
        """
        names = self.modes.names
        if coordinates is None:
            return (None,) * len(names)
        if isinstance(coordinates, Tensor):
            needed = f"order {len(names)} needs {len(names)} vectors, one a mode"
            raise ModesError(f"coordinates is a single tensor, but {needed}.")
        given = one_a_mode(self.modes, coordinates, "coordinates")
        for mode, name in enumerate(names):
            if given[mode] is not None and self.periodic[mode] and self.periods[mode] is None and not counted:
                raise OptionError(f"coordinates of periodic mode {name!r} need its period.", hint=_with_period(name))
        return tuple(
            None if vector is None else _vector(vector, name, size, grid.batch, like.dtype)
            for name, vector, size in zip(names, given, grid.sizes, strict=True)
        )

    def angles(self, mode: int, size: int, coordinates: Tensor | None, like: Tensor, count: int, base: float) -> Tensor:
        r"""Return the angles of the indices of a mode: of evenly spaced ones, or of those that lie at coordinates.

        On a circle they are the whole multiples 1 … K of the turn, else places times :math:`\mathrm{base}^{-k/K}`.

        Args:
            mode: The mode.
            size: Its size.
            coordinates: Checked coordinates, or None.
            like: A tensor of the type and device of the input.
            count: Number of frequencies K.
            base: Ratio between the fastest and the slowest frequency, nearly.

        Returns:
            Angles ``(n_m, K)`` or ``(*batch, n_m, K)``, at least in float32.
        """
        circle, period, spacing = self.periodic[mode], self.periods[mode], self.spacings[mode]
        places = coordinates
        if places is None:
            places = torch.arange(size, device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))
            if spacing is not None:
                places = places * spacing
            elif circle:
                places, period = places / size, None
        if circle and period is not None:
            places = places / period
        steps = torch.arange(count, device=places.device, dtype=places.dtype)
        rates = 2 * math.pi * (steps + 1) if circle else base ** (-steps / count)
        return (places.unsqueeze(-1) * rates).to(like.device)

    def shown(self) -> list[str]:
        """Describe what is not the default, for the representation of a module."""
        names, parts = self.modes.names, []
        circles = {name: self.periods[mode] for mode, name in enumerate(names) if self.periodic[mode]}
        if circles:
            parts.append(f"periodic={circles if any(circles.values()) else tuple(circles)}")
        spacings = {name: spacing for name, spacing in zip(names, self.spacings, strict=True) if spacing is not None}
        if spacings:
            parts.append(f"spacing={spacings}")
        return parts


def pairs_a_mode(channels: int, modes: ModeSpec, called: str, base: float) -> tuple[int, ...]:
    """Share pairs of channels out among the modes, one frequency each; the first modes get what is left over.

    Args:
        channels: Number of channels.
        modes: The modes.
        called: Name of the argument, for messages.
        base: Ratio of the frequencies, which is checked.

    Returns:
        Number of pairs a mode.

    Raises:
        OptionError: If there is not a pair for every mode, or the base is not a finite number above 1.

    Examples:
        >>> pairs_a_mode(96, ModeSpec.parse("t h w"), "embed_dim", 100.0), pairs_a_mode(9, ModeSpec.parse(3), "C", 2.0)
        ((16, 16, 16), (2, 1, 1))
    """
    check(channels, called, "integer")
    pairs, order = channels // 2, modes.order
    if pairs < order:
        raise OptionError(f"{called} must be at least {2 * order}, two channels a mode, got {channels}.")
    if not (_is_number(base) and base > 1):
        raise OptionError(f"base must be a finite number greater than 1, got {base!r}.")
    return tuple(pairs // order + (mode < pairs % order) for mode in range(order))


def _positive(given: Sequence[Any], modes: ModeSpec, called: str) -> tuple[float | None, ...]:
    """Check numbers that must be positive, or None."""
    for name, number in zip(modes.names, given, strict=True):
        if number is not None and not (_is_number(number) and number > 0):
            raise OptionError(f"{called} of mode {name!r} must be a positive finite number, got {number!r}.")
    return tuple(None if number is None else float(number) for number in given)


def _is_number(number: Any) -> bool:
    """Tell whether something is a finite number."""
    return isinstance(number, (int, float)) and not isinstance(number, bool) and math.isfinite(number)


def _with_period(name: str) -> str:
    """Tell how to give a period."""
    return f"Give it in the unit of the coordinates, such as periodic={{{name!r}: 360.0}}."


def _vector(vector: Any, name: str, size: int, batch: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Check the coordinates of one mode; whole numbers become double: seconds since 1970 do not fit into float32."""
    if not isinstance(vector, Tensor):
        vector = torch.as_tensor(vector, dtype=torch.float64)
    elif not vector.is_floating_point():
        vector = vector.double()
    if vector.dim() == 0 or vector.shape[-1] != size:
        got = vector.shape[-1] if vector.dim() else "no dimension"
        raise ShapeError(f"coordinates of mode {name!r} have length {got}, but the mode has size {size}.")
    own = tuple(vector.shape[:-1])
    if not broadcasts_to(own, batch):
        raise ShapeError(
            f"coordinates of mode {name!r} have batch dimensions {own}, which do not broadcast to {batch}."
        )
    _check_finite(vector, name)
    return vector.to(torch.promote_types(vector.dtype, torch.promote_types(dtype, torch.float32)))


def _check_finite(vector: Tensor, name: str) -> None:
    """Refuse coordinates that are not finite, where values can be read."""
    if readable(vector) and not vector.isfinite().all():
        lowest, highest = vector.detach().aminmax()
        raise OptionError(f"coordinates of mode {name!r} must be finite, got {lowest:g} to {highest:g}.")
