"""Where the indices of a mode lie: evenly, on a circle, or where the user says; and the angles of places."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tensorattn.errors import ModesError, OptionError, ShapeError
from tensorattn.modes import GridShape, ModeSpec
from tensorattn.nn.layout import one_a_mode
from tensorattn.weights import Vector, accumulation_dtype

__all__ = ["Coordinates", "ModeCoordinates", "Periodic", "Spacing", "check_base", "pairs_a_mode"]

Mode = int | str
Periodic = Mode | Sequence[Mode] | Mapping[Mode, float]
Spacing = float | Sequence[float | None] | Mapping[Mode, float]
Coordinates = Sequence[Vector] | Mapping[Mode, Tensor]


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
    def parse(cls, modes: int | str | Sequence[str], periodic: Periodic, spacing: Spacing | None) -> ModeCoordinates:
        """Read the modes, those that are periodic, and their spacing.

        Args:
            modes: Modes: their number, or their names.
            periodic: Modes that are circles, by name or index, or a mapping from them to their periods.
            spacing: One number for every mode, one a mode, or a mapping from modes.

        Returns:
            What they say.

        Raises:
            ModesError: If modes are named badly, or one that is named does not exist.
            OptionError: If a number is not positive and finite, or a periodic mode has a spacing but no period.
        """
        spec = ModeSpec.parse(modes)
        given: Mapping[Mode, float | None]
        if isinstance(periodic, Mapping):
            given = periodic
        else:
            named = periodic.split() if isinstance(periodic, str) else periodic
            given = dict.fromkeys(named if isinstance(named, Sequence) else (named,))
        circles = {spec.index(mode) for mode in given}
        periods = _positive(one_a_mode(spec, given, "periodic"), spec, "period")
        spacings = _positive(one_a_mode(spec, spacing, "spacing"), spec, "spacing")
        for mode, name in enumerate(spec.names):
            if mode in circles and spacings[mode] is not None and periods[mode] is None:
                raise OptionError(f"spacing of periodic mode {name!r} needs its period.", hint=_with_period(name))
        return cls(spec, tuple(mode in circles for mode in range(spec.order)), periods, spacings)

    def alone(self, mode: int) -> ModeCoordinates:
        """Return what is known of one mode.

        Args:
            mode: Its index.
        """
        spec = ModeSpec((self.modes.names[mode],), self.modes.named)
        return ModeCoordinates(spec, (self.periodic[mode],), (self.periods[mode],), (self.spacings[mode],))

    def check(
        self, coordinates: Coordinates | None, grid: GridShape, like: Tensor, *, counted: bool = False
    ) -> tuple[Vector, ...]:
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
        order = self.modes.order
        if coordinates is None:
            return (None,) * order
        if isinstance(coordinates, Tensor):
            raise ModesError(f"coordinates is a single tensor, but order {order} needs {order} vectors, one a mode.")
        given = one_a_mode(self.modes, coordinates, "coordinates")
        for mode, name in enumerate(self.modes.names):
            if given[mode] is not None and self.periodic[mode] and self.periods[mode] is None and not counted:
                raise OptionError(f"coordinates of periodic mode {name!r} need its period.", hint=_with_period(name))
        return tuple(
            None if vector is None else self._check_vector(vector, mode, size, grid.batch, like.dtype)
            for mode, (vector, size) in enumerate(zip(given, grid.sizes, strict=True))
        )

    def _check_vector(self, vector: Any, mode: int, size: int, batch: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Check the coordinates of one mode."""
        name = self.modes.names[mode]
        fit = accumulation_dtype(dtype)
        if not isinstance(vector, Tensor):
            vector = torch.as_tensor(vector, dtype=torch.float64)
        elif not vector.is_floating_point():
            vector = vector.double()  # whole seconds since 1970 do not fit into float32
        if vector.dim() == 0 or vector.shape[-1] != size:
            got = vector.shape[-1] if vector.dim() else "no dimension"
            raise ShapeError(f"coordinates of mode {name!r} have length {got}, but the mode has size {size}.")
        own = tuple(vector.shape[:-1])
        aligned = zip(reversed(own), reversed(batch), strict=False)
        if len(own) > len(batch) or any(mine not in (1, theirs) for mine, theirs in aligned):
            raise ShapeError(
                f"coordinates of mode {name!r} have batch dimensions {own}, which do not broadcast to {batch}."
            )
        _check_finite(vector, name)
        return vector.to(torch.promote_types(vector.dtype, fit))

    def places(self, mode: int, size: int, coordinates: Vector, like: Tensor) -> Tensor:
        """Return where the indices of a mode lie: in turns on a circle, else in the unit of its coordinates.

        Args:
            mode: The mode.
            size: Its size.
            coordinates: Checked coordinates, or None for evenly spaced indices.
            like: A tensor of the type and device that evenly spaced places get.

        Returns:
            Places ``(n_m,)`` or ``(*batch, n_m)``.
        """
        places = coordinates
        period, spacing = self.periods[mode], self.spacings[mode]
        if places is None:
            places = torch.arange(size, device=like.device, dtype=accumulation_dtype(like.dtype))
            if self.periodic[mode] and spacing is None:
                return places / size
            places = places if spacing is None else places * spacing
        return places / period if self.periodic[mode] and period is not None else places

    def angles(self, mode: int, places: Tensor, count: int, base: float) -> Tensor:
        r"""Return angles of places: whole multiples of the turn on a circle, else geometric frequencies.

        Args:
            mode: The mode.
            places: What `places` returns.
            count: Number of frequencies K.
            base: Ratio between the fastest and the slowest frequency, nearly: the frequencies are
                :math:`\mathrm{base}^{-k/K}`.

        Returns:
            Angles ``(*places, K)``.
        """
        steps = torch.arange(count, device=places.device, dtype=places.dtype)
        if self.periodic[mode]:
            return places.unsqueeze(-1) * (2 * math.pi * (steps + 1))
        return places.unsqueeze(-1) * base ** (-steps / count)

    def shown(self) -> list[str]:
        """Describe what is not the default, for the representation of a module."""
        names, parts = self.modes.names, []
        circles = {names[mode]: self.periods[mode] for mode in range(len(names)) if self.periodic[mode]}
        if circles:
            parts.append(f"periodic={circles if any(circles.values()) else tuple(circles)}")
        spacings = {name: spacing for name, spacing in zip(names, self.spacings, strict=True) if spacing is not None}
        if spacings:
            parts.append(f"spacing={spacings}")
        return parts


def pairs_a_mode(channels: int, modes: ModeSpec, called: str) -> tuple[int, ...]:
    """Split channels into pairs, and share the pairs out among the modes; the first modes get what is left over.

    Args:
        channels: Number of channels.
        modes: The modes.
        called: Name of the argument, for messages.

    Returns:
        Number of pairs a mode.

    Raises:
        OptionError: If there is not a pair for every mode.

    Examples:
        >>> pairs_a_mode(96, ModeSpec.parse("t h w"), "embed_dim"), pairs_a_mode(9, ModeSpec.parse(3), "embed_dim")
        ((16, 16, 16), (2, 1, 1))
    """
    pairs, order = channels // 2, modes.order
    if pairs < order:
        raise OptionError(f"{called} must be at least {2 * order}, two channels a mode, got {channels}.")
    return tuple(pairs // order + (mode < pairs % order) for mode in range(order))


def check_base(base: float) -> None:
    """Check the ratio of frequencies.

    Args:
        base: The ratio.

    Raises:
        OptionError: If it is not a finite number above 1.
    """
    if not (_is_number(base) and base > 1):
        raise OptionError(f"base must be a finite number greater than 1, got {base!r}.")


def _positive(numbers: Sequence[Any], modes: ModeSpec, called: str) -> tuple[float | None, ...]:
    """Check numbers that must be positive, or None."""
    for name, number in zip(modes.names, numbers, strict=True):
        if number is not None and not (_is_number(number) and number > 0):
            raise OptionError(f"{called} of mode {name!r} must be a positive finite number, got {number!r}.")
    return tuple(None if number is None else float(number) for number in numbers)


def _is_number(number: Any) -> bool:
    """Tell whether something is a finite number."""
    return isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)


def _with_period(name: str) -> str:
    """Tell how to give a period."""
    return f"Give it in the unit of the coordinates, such as periodic={{{name!r}: 360.0}}."


def _check_finite(vector: Tensor, name: str) -> None:
    """Refuse coordinates that are not finite, where values can be read."""
    if torch.compiler.is_compiling() or vector.is_meta or vector.numel() == 0:
        return
    try:
        lowest, highest = (bound.item() for bound in torch.aminmax(vector.detach()))
    except RuntimeError:  # under vmap, and for fake tensors, no value can be read
        return
    if not (math.isfinite(lowest) and math.isfinite(highest)):
        raise OptionError(f"coordinates of mode {name!r} must be finite, got {lowest:g} to {highest:g}.")
