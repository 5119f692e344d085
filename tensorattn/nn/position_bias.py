r"""Biases of the logits by position, one matrix a mode: relative tables, slopes of distance, windows.

A bias :math:`b_{ij} = \sum_m b^m[i_m, j_m]` that is a sum over modes keeps logits additive where keys are, so operators
that are exact on additive data stay so: the softmax over the grid is still a product over modes. Each of the modules
here returns such matrices for a grid, and `TensorAttention` adds them to its logits.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tensorattn.errors import OptionError, ShapeError, TensorAttentionError
from tensorattn.modes import ModeSpec, mode_parts
from tensorattn.nn.layout import one_a_mode, show_modes
from tensorattn.options import check_count, check_number

__all__ = ["AlibiBias", "AxisWindow", "PositionBias", "RelativePositionBias"]

Mode = int | str


class PositionBias(nn.Module, abc.ABC):
    """What the biases share: from the sizes of a grid to one matrix of logits a mode.

    Derive from it to give `TensorAttention` a bias of your own: write `bias` for one mode.

    Args:
        modes: Modes: their number, or their names as in ``"t h w"``.
    """

    def __init__(self, modes: int | str | Sequence[str]) -> None:
        super().__init__()
        self.modes = ModeSpec.parse(modes)

    @abc.abstractmethod
    def bias(self, mode: int, size: int) -> Tensor | None:
        """Return the bias of one mode.

        Args:
            mode: Index of the mode.
            size: Its size.

        Returns:
            The bias ``(H, n, n)`` of each query along the mode for each index, H being 1 or the number of heads; minus
            infinity hides an index. None for no bias.
        """

    def forward(self, sizes: Sequence[int]) -> tuple[Tensor | None, ...]:
        """Return the bias of every mode.

        Args:
            sizes: Sizes of the modes.

        Returns:
            One tensor ``(H, n_m, n_m)`` or None a mode, as the argument ``bias`` of the operators takes them.

        Raises:
            ShapeError: If there is not one size a mode, or one is below 1.
        """
        try:
            for mode, size in enumerate(mode_parts(sizes, self.modes.order, "sizes", "integers", ShapeError)):
                if size < 1:
                    raise ShapeError(f"mode {self.modes.label(mode)} has size {size} in sizes, but needs at least 1.")
        except TensorAttentionError as cause:
            raise cause.retold(type(self).__name__) from None
        return tuple(self.bias(mode, int(size)) for mode, size in enumerate(sizes))


class RelativePositionBias(PositionBias):
    r"""A learned bias for every signed distance along every mode, for every head.

    :math:`b^m[i, j] = T^m[\mathrm{clip}(j - i, -R_m, R_m)]`: distances beyond the largest share its entry, so one
    module takes inputs of any size.

    Args:
        num_heads: Number of heads H.
        modes: Modes: their number, or their names.
        max_distance: Largest distance :math:`R_m` with an entry of its own: one number for every mode, one a mode (None
            for a mode without a bias), or a mapping from names or indices of modes; modes left out have none.
        device: Device of the tables.
        dtype: Type of the tables.

    Raises:
        OptionError: If a number is not a positive integer.
        ModesError: If modes are named badly, or one that is named does not exist.

    Shape:
        - table m: :math:`(H, 2 R_m + 1)`, drawn from a normal distribution of standard deviation 0.02

    Examples:
        >>> bias = RelativePositionBias(4, modes="t h w", max_distance={"t": 7, "h": 13, "w": 13})
        >>> [tuple(part.shape) for part in bias((8, 14, 14))]
        [(4, 8, 8), (4, 14, 14), (4, 14, 14)]
    """

    def __init__(
        self,
        num_heads: int,
        *,
        modes: int | str | Sequence[str],
        max_distance: int | Sequence[int | None] | Mapping[Mode, int],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        try:
            super().__init__(modes)
            self.num_heads = _count(num_heads, "num_heads", least=1)
            self.max_distances = _whole(max_distance, self.modes, "max_distance", least=1)
        except TensorAttentionError as cause:
            raise cause.retold("RelativePositionBias") from None
        self.tables = nn.ParameterList(
            torch.empty(self.num_heads, 0 if distance is None else 2 * distance + 1, device=device, dtype=dtype)
            for distance in self.max_distances
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the tables anew."""
        for table in self.tables:
            nn.init.normal_(table, std=0.02)

    def bias(self, mode: int, size: int) -> Tensor | None:
        """Look up the distances of one mode.

        Args:
            mode: Index of the mode.
            size: Its size.
        """
        largest, table = self.max_distances[mode], self.tables[mode]
        if largest is None:
            return None
        return table[:, _distances(size, table.device).clamp(-largest, largest) + largest]

    def extra_repr(self) -> str:
        """Describe the settings."""
        return f"num_heads={self.num_heads}, modes={show_modes(self.modes)}, max_distance={self.max_distances}"


class AlibiBias(PositionBias):
    r"""A bias that falls with distance, by a slope for every head: attention with linear biases, over several modes.

    :math:`b^m[i, j] = -a_h\, \delta_m |i - j|`, so that all modes together give minus :math:`a_h` times the weighted
    city-block distance. It has no parameters and goes beyond the sizes seen in training.

    Args:
        num_heads: Number of heads H.
        modes: Modes: their number, or their names.
        spacing: Distance :math:`\delta_m` of neighbours: one number for every mode, one a mode (None for a mode without
            a bias), or a mapping; modes left out have none.
        slopes: One :math:`a_h` a head; :math:`2^{-8 (h + 1) / H}` if None.

    Raises:
        OptionError: If a number is negative or not finite, or there is not one slope a head.
        ModesError: If modes are named badly, or one that is named does not exist.

    Examples:
        >>> bias = AlibiBias(2, modes="t h w", spacing={"t": 1.0})
        >>> frames, rows, columns = bias((3, 4, 4))
        >>> frames[0], rows, columns
        (tensor([[-0.0000, -0.0625, -0.1250],
                [-0.0625, -0.0000, -0.0625],
                [-0.1250, -0.0625, -0.0000]]), None, None)

    References:
        Press, Smith and Lewis, "Train Short, Test Long: Attention with Linear Biases", ICLR 2022, arXiv 2108.12409.
    """

    slopes: Tensor

    def __init__(
        self,
        num_heads: int,
        *,
        modes: int | str | Sequence[str],
        spacing: float | Sequence[float | None] | Mapping[Mode, float] = 1.0,
        slopes: Sequence[float] | None = None,
    ) -> None:
        try:
            super().__init__(modes)
            self.num_heads = _count(num_heads, "num_heads", least=1)
            self.spacings = one_a_mode(self.modes, spacing, "spacing")
            for given in self.spacings:
                _check_factor(given, "spacing")
            if slopes is None:
                slopes = [2 ** (-8 * (head + 1) / self.num_heads) for head in range(self.num_heads)]
            if len(slopes) != self.num_heads:
                raise OptionError(f"slopes has {len(slopes)} entries, but there are {self.num_heads} heads.")
            for slope in slopes:
                _check_factor(slope, "slopes")
        except TensorAttentionError as cause:
            raise cause.retold("AlibiBias") from None
        self.register_buffer("slopes", torch.tensor(slopes, dtype=torch.float32), persistent=False)

    def bias(self, mode: int, size: int) -> Tensor | None:
        """Multiply the distances of one mode by the slopes.

        Args:
            mode: Index of the mode.
            size: Its size.
        """
        spacing = self.spacings[mode]
        if spacing is None:
            return None
        return -(self.slopes * spacing)[:, None, None] * _distances(size, self.slopes.device).abs()

    def extra_repr(self) -> str:
        """Describe the settings."""
        return f"num_heads={self.num_heads}, modes={show_modes(self.modes)}, spacing={self.spacings}"


class AxisWindow(PositionBias):
    """A window along each mode: a query sees indices up to a distance only, and all of the other modes.

    All modes together leave a box around each query.

    Args:
        modes: Modes: their number, or their names.
        window: Largest distance that is seen: one number for every mode, one a mode (None for all of a mode), or a
            mapping; of modes left out all is seen.

    Raises:
        OptionError: If a number is not a non-negative integer.
        ModesError: If modes are named badly, or one that is named does not exist.

    Examples:
        >>> frames, rows = AxisWindow(modes="t h", window={"t": 1})((3, 5))
        >>> frames, rows
        (tensor([[[0., 0., -inf],
                 [0., 0., 0.],
                 [-inf, 0., 0.]]]), None)
    """

    def __init__(
        self,
        *,
        modes: int | str | Sequence[str],
        window: int | Sequence[int | None] | Mapping[Mode, int],
    ) -> None:
        try:
            super().__init__(modes)
            self.windows = _whole(window, self.modes, "window", least=0)
        except TensorAttentionError as cause:
            raise cause.retold("AxisWindow") from None
        self.register_buffer("like", torch.zeros(()), persistent=False)

    def bias(self, mode: int, size: int) -> Tensor | None:
        """Hide what is too far along one mode.

        Args:
            mode: Index of the mode.
            size: Its size.
        """
        window, like = self.windows[mode], self.get_buffer("like")
        if window is None:
            return None
        return like.expand(1, size, size).masked_fill(_distances(size, like.device).abs() > window, -math.inf)

    def extra_repr(self) -> str:
        """Describe the settings."""
        return f"modes={show_modes(self.modes)}, window={self.windows}"


def _distances(size: int, device: torch.device) -> Tensor:
    """Signed distance from each query to each index of a mode."""
    places = torch.arange(size, device=device)
    return places - places[:, None]


def _count(number: Any, argument: str, *, least: int) -> int:
    """Check an integer."""
    check_count(number, argument)
    if number < least:
        raise OptionError(f"{argument} must be at least {least}, got {number}.")
    return int(number)


def _whole(given: Any, modes: ModeSpec, argument: str, *, least: int) -> tuple[int | None, ...]:
    """Read one integer or None a mode."""
    found = one_a_mode(modes, given, argument)
    return tuple(None if number is None else _count(number, argument, least=least) for number in found)


def _check_factor(number: Any, argument: str) -> None:
    """Check a number that distances are multiplied by."""
    if number is not None:
        check_number(number, argument, "numbers")
        if not math.isfinite(number) or number < 0:
            raise OptionError(f"{argument} must be finite and not negative, got {number}.")
