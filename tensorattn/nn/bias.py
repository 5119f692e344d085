r"""Biases of the logits by position, one matrix a mode: relative tables, slopes of distance, windows.

A bias :math:`b_{ij} = \sum_m b^m[i_m, j_m]` that is a sum over modes keeps logits additive where keys are, so operators
that are exact on additive data stay so: the softmax over the grid is still a product over modes. Each of the modules
here returns such matrices for a grid, and `TensorAttention` adds them to its logits.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tensorattn.errors import OptionError, ShapeError, check, retells
from tensorattn.masks import one_a_mode
from tensorattn.modes import ModeSpec, mode_parts
from tensorattn.nn.coordinates import Mode
from tensorattn.nn.layout import show_modes

__all__ = ["AlibiBias", "AxisWindow", "PositionBias", "RelativePositionBias"]


class PositionBias(nn.Module, abc.ABC):
    """What the biases share: from the sizes of a grid to one matrix of logits a mode.

    Derive from it to give `TensorAttention` a bias of your own: write `bias` for one mode.

    Args:
        modes: Modes: their number, or their names as in ``"t h w"``.

    Attributes:
        like: A tensor whose type and device a bias without parameters takes; its value means nothing.

    Raises:
        ModesError: If modes are missing or named badly.

    Examples:
        >>> import torch, tensorattn as ta
        >>> class Later(ta.PositionBias):
        ...     def bias(self, mode, size):
        ...         return self.like.new_ones(1, size, size).triu() if mode == 0 else None
        >>> layer = ta.TensorAttention(32, num_heads=4, modes="t h", position_bias=Later("t h"))
        >>> layer(torch.randn(2, 3, 5, 32)).shape
        torch.Size([2, 3, 5, 32])
    """

    __call__: Callable[..., tuple[Tensor | None, ...]]  # a module says Any
    like: Tensor

    @retells
    def __init__(self, modes: int | str | Sequence[str] | None = None) -> None:
        super().__init__()
        self.modes = ModeSpec.parse(modes)
        # What a buffer that is not saved holds is lost on the way from the meta device, so nothing reads it.
        self.register_buffer("like", torch.zeros(()), persistent=False)

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
        return tuple(self.bias(mode, size) for mode, size in enumerate(self._checked(sizes)))

    @retells
    def _checked(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Check the sizes of a grid."""
        parts = mode_parts(sizes, self.modes.order, "sizes", "integers", ShapeError)
        for mode, size in enumerate(parts):
            if size < 1:
                raise ShapeError(f"mode {self.modes.label(mode)} has size {size} in sizes, but needs at least 1.")
        return parts


class _ByDistance(PositionBias):
    """A bias by the signed distance from query to index, with one setting a mode, None where a mode has no bias."""

    settings: tuple[Any, ...] = ()

    def bias(self, mode: int, size: int) -> Tensor | None:
        """Return the bias of one mode, by its distances."""
        if self.settings[mode] is None:
            return None
        places = torch.arange(size, device=next(self.parameters(), self.like).device)
        return self._at(places - places[:, None], mode)

    def _at(self, distances: Tensor, mode: int) -> Tensor:
        """Return the bias at distances along a mode."""
        raise NotImplementedError


class RelativePositionBias(_ByDistance):
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
        ModesError: If modes are missing or named badly, or one that is named does not exist.

    Shape:
        - table m: :math:`(H, 2 R_m + 1)`, drawn from a normal distribution of standard deviation 0.02

    Examples:
        >>> import torch, tensorattn as ta
        >>> bias = ta.RelativePositionBias(4, modes="t h w", max_distance={"t": 7, "h": 13, "w": 13})
        >>> [tuple(part.shape) for part in bias((8, 14, 14))]
        [(4, 8, 8), (4, 14, 14), (4, 14, 14)]
        >>> layer = ta.TensorAttention(32, num_heads=4, modes="t h w", position_bias=bias)
        >>> layer(torch.randn(2, 8, 6, 6, 32)).shape
        torch.Size([2, 8, 6, 6, 32])
    """

    @retells
    def __init__(
        self,
        num_heads: int,
        *,
        modes: int | str | Sequence[str] | None = None,
        max_distance: int | Sequence[int | None] | Mapping[Mode, int],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(modes)
        check(num_heads, "num_heads", "integer", least=1)
        self.num_heads = int(num_heads)
        self.settings = self.max_distances = _whole(max_distance, self.modes, "max_distance", least=1)
        entries = (0 if largest is None else 2 * largest + 1 for largest in self.max_distances)
        self.tables = nn.ParameterList(torch.empty(self.num_heads, n, device=device, dtype=dtype) for n in entries)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the tables anew."""
        for table in self.tables:
            nn.init.normal_(table, std=0.02)

    def _at(self, distances: Tensor, mode: int) -> Tensor:
        """Look distances up in the table of a mode."""
        largest = self.settings[mode]
        return self.tables[mode][:, distances.clamp(-largest, largest) + largest]

    def extra_repr(self) -> str:
        """Describe the settings."""
        return f"num_heads={self.num_heads}, modes={show_modes(self.modes)}, max_distance={self.max_distances}"


class AlibiBias(_ByDistance):
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
        ModesError: If modes are missing or named badly, or one that is named does not exist.

    Examples:
        >>> import torch, tensorattn as ta
        >>> bias = ta.AlibiBias(2, modes="t h w", spacing={"t": 1.0})
        >>> frames, rows, columns = bias((3, 4, 4))
        >>> frames[0], rows, columns
        (tensor([[-0.0000, -0.0625, -0.1250],
                [-0.0625, -0.0000, -0.0625],
                [-0.1250, -0.0625, -0.0000]]), None, None)

    References:
        Press, Smith and Lewis, "Train Short, Test Long: Attention with Linear Biases", ICLR 2022, arXiv 2108.12409.
    """

    @retells
    def __init__(
        self,
        num_heads: int,
        *,
        modes: int | str | Sequence[str] | None = None,
        spacing: float | Sequence[float | None] | Mapping[Mode, float] = 1.0,
        slopes: Sequence[float] | None = None,
    ) -> None:
        super().__init__(modes)
        check(num_heads, "num_heads", "integer", least=1)
        self.num_heads = int(num_heads)
        self.settings = self.spacings = tuple(one_a_mode(self.modes, spacing, "spacing"))
        _check_factors((given for given in self.spacings if given is not None), "spacing")
        if slopes is not None:
            if len(slopes) != num_heads:
                raise OptionError(f"slopes has {len(slopes)} entries, but there are {num_heads} heads.")
            _check_factors(slopes, "slopes")
        self._slopes = None if slopes is None else tuple(map(float, slopes))

    @property
    def slopes(self) -> Tensor:
        """One slope a head, on the device of the module, at least in float32."""
        device, dtype = self.like.device, torch.promote_types(self.like.dtype, torch.float32)
        if self._slopes is not None:
            return torch.tensor(self._slopes, device=device, dtype=dtype)
        return torch.exp2(torch.arange(1, self.num_heads + 1, device=device, dtype=dtype) * (-8 / self.num_heads))

    def _at(self, distances: Tensor, mode: int) -> Tensor:
        """Multiply distances by the slopes."""
        return -(self.slopes * self.settings[mode])[:, None, None] * distances.abs()

    def extra_repr(self) -> str:
        """Describe the settings."""
        return f"num_heads={self.num_heads}, modes={show_modes(self.modes)}, spacing={self.spacings}"


class AxisWindow(_ByDistance):
    """A window along each mode: a query sees indices up to a distance only, and all of the other modes.

    All modes together leave a box around each query.

    Args:
        modes: Modes: their number, or their names.
        window: Largest distance that is seen: one number for every mode, one a mode (None for all of a mode), or a
            mapping; of modes left out all is seen.

    Raises:
        OptionError: If a number is not a non-negative integer.
        ModesError: If modes are missing or named badly, or one that is named does not exist.

    Examples:
        >>> import torch, tensorattn as ta
        >>> frames, rows = ta.AxisWindow(modes="t h", window={"t": 1})((3, 5))
        >>> frames, rows
        (tensor([[[0., 0., -inf],
                 [0., 0., 0.],
                 [-inf, 0., 0.]]]), None)
    """

    @retells
    def __init__(
        self,
        *,
        modes: int | str | Sequence[str] | None = None,
        window: int | Sequence[int | None] | Mapping[Mode, int],
    ) -> None:
        super().__init__(modes)
        self.settings = self.windows = _whole(window, self.modes, "window", least=0)

    def _at(self, distances: Tensor, mode: int) -> Tensor:
        """Hide what is too far."""
        hidden = distances.abs() > self.settings[mode]
        return self.like.new_zeros(()).expand(1, *hidden.shape).masked_fill(hidden, -math.inf)

    def extra_repr(self) -> str:
        """Describe the settings."""
        return f"modes={show_modes(self.modes)}, window={self.windows}"


def _whole(given: Any, modes: ModeSpec, argument: str, *, least: int) -> tuple[int | None, ...]:
    """Read one integer or None a mode."""
    found = one_a_mode(modes, given, argument)
    for number in found:
        if number is not None:
            check(number, argument, "integer", least=least)
    return tuple(None if number is None else int(number) for number in found)


def _check_factors(numbers: Iterable[Any], argument: str) -> None:
    """Check numbers that distances are multiplied by."""
    for number in numbers:
        check(number, argument, "number", rule="numbers")
        if not math.isfinite(number) or number < 0:
            raise OptionError(f"{argument} must be finite and not negative, got {number}.")
