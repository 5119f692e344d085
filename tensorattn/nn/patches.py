"""Patches of a tensor of any order, each a vector, by reshaping and one linear map; and the way back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from tensorattn.errors import ModesError, OptionError, ShapeError, check, retells
from tensorattn.masks import is_recorded, one_a_mode
from tensorattn.modes import GridShape, ModeSpec
from tensorattn.nn.layout import channels_last, check_input, check_parameters, show_modes
from tensorattn.nn.parameters import draw_linear, parameter_of

__all__ = ["Patch", "PatchEmbedding", "PatchUnembedding", "block_axes", "block_shape", "grid_of"]

Patch = int | Sequence[int] | Mapping[int | str, int]


def grid_of(sizes: Sequence[int], patch: Sequence[int]) -> tuple[int, ...]:
    """Return how many patches cover each mode, the last one padded where the size is not divisible.

    Args:
        sizes: Sizes of the modes.
        patch: Sizes of a patch.

    Examples:
        >>> grid_of((30, 240, 322), (4, 8, 8))
        (8, 30, 41)
    """
    return tuple(-(-size // part) for size, part in zip(sizes, patch, strict=True))


def block_shape(grid: Sequence[int], patch: Sequence[int]) -> tuple[int, ...]:
    """Return the shape that shows each mode as patches and places within a patch: ``(g_1, p_1, …, g_N, p_N)``.

    Args:
        grid: Number of patches of each mode.
        patch: Sizes of a patch.
    """
    return tuple(part for pair in zip(grid, patch, strict=True) for part in pair)


def block_axes(order: int, *, batch: int = 0, inverse: bool = False) -> tuple[int, ...]:
    """Return the permutation from ``(*batch, g_1, p_1, …, g_N, p_N, C)`` to ``(*batch, g_1 … g_N, p_1 … p_N, C)``.

    Args:
        order: Number of modes N.
        batch: Number of batch dimensions.
        inverse: Whether to return the permutation back.

    Examples:
        >>> block_axes(3), block_axes(3, inverse=True)
        ((0, 2, 4, 1, 3, 5, 6), (0, 3, 1, 4, 2, 5, 6))
    """
    modes = range(order)
    inner = [part for m in modes for part in (m, order + m)] if inverse else [2 * m + k for k in (0, 1) for m in modes]
    return (*range(batch), *(batch + axis for axis in inner), batch + 2 * order)


class _Patches(nn.Module):
    """What both ways share: a patch, a linear map to or from its numbers, and a layout."""

    __call__: Callable[..., Tensor]  # a module says Any

    proj: nn.Linear

    def __init__(self, modes: int | str | Sequence[str] | None, patch: Patch, channels_first: bool) -> None:
        super().__init__()
        self.modes = ModeSpec.parse(modes)
        self.patch = tuple(1 if part is None else part for part in one_a_mode(self.modes, patch, "patch"))
        for name, part in zip(self.modes.names, self.patch, strict=True):
            if isinstance(part, bool) or not isinstance(part, int) or part < 1:
                raise OptionError(f"patch of mode {name!r} must be a positive whole number, got {part!r}.")
        self.channels_first = channels_first

    def reset_parameters(self) -> None:
        """Draw the weights anew, Xavier uniform, and set the bias to zero."""
        draw_linear(self.proj)

    def _check(self, x: Tensor, channels: int, called: str) -> GridShape:
        """Check the input and read its shape."""
        grid = check_input(x, self.modes, channels, channels_first=self.channels_first, called=called)
        check_parameters(x, parameter_of(self))
        return grid

    def _placed(self, y: Tensor) -> Tensor:
        """Return an output, whose channels are last, in the layout of the module."""
        return y.movedim(-1, 1) if self.channels_first else y

    def _show(self, *settings: str) -> str:
        """Describe settings, and those that both ways share."""
        shown = [f"patch={self.patch}", f"modes={show_modes(self.modes)}"]
        return ", ".join([*settings[:2], *shown, *settings[2:], *["channels_first=True"] * self.channels_first])


class PatchEmbedding(_Patches):
    r"""Cut a tensor of any order into patches, and map each linearly to a vector.

    A patch is the block of numbers :math:`p_1 \times \dots \times p_N \times C`, its channels fastest. What a
    convolution does whose stride is its kernel, for every order.

    Args:
        in_channels: Channels C of the input.
        embed_dim: Channels of the output.
        patch: Sizes of a patch: one number for every mode, one a mode, or a mapping from names or indices of modes, 1
            where it has none.
        modes: Modes of the input: their number, or their names as in ``"t h w"``.
        pad: Whether sizes that a patch does not divide are padded, by repeating the last index of the mode.
        channels_first: Whether input and output are ``(B, C, n_1, …, n_N)`` instead of ``(B, n_1, …, n_N, C)``.
        bias: Whether the linear map has a bias.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Raises:
        ModesError: If modes are missing or named badly, or sizes of a patch are not one a mode.
        OptionError: If channels or sizes of a patch are not positive.

    Shape:
        - input: :math:`(B, n_1, \dots, n_N, C)`, or :math:`(B, C, n_1, \dots, n_N)` with ``channels_first``
        - output: :math:`(B, g_1, \dots, g_N, E)` with :math:`g_m = \lceil n_m / p_m \rceil`, or with E first

    Examples:
        >>> import torch, tensorattn as ta
        >>> embedding = ta.PatchEmbedding(3, 96, {"h": 8, "w": 8}, modes="t h w")
        >>> embedding(torch.randn(2, 5, 64, 48, 3)).shape
        torch.Size([2, 5, 8, 6, 96])
        >>> embedding
        PatchEmbedding(
          in_channels=3, embed_dim=96, patch=(1, 8, 8), modes='t h w'
          (proj): Linear(in_features=192, out_features=96, bias=True)
        )
    """

    @retells
    def __init__(
        self,
        in_channels: int,
        embed_dim: int,
        patch: Patch,
        *,
        modes: int | str | Sequence[str] | None = None,
        pad: bool = False,
        channels_first: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(modes, patch, channels_first)
        check(in_channels, "in_channels", "integer", least=1)
        check(embed_dim, "embed_dim", "integer", least=1)
        self.in_channels, self.embed_dim, self.pad = in_channels, embed_dim, pad
        self.proj = nn.Linear(in_channels * math.prod(self.patch), embed_dim, bias, device=device, dtype=dtype)
        self.reset_parameters()

    def extra_repr(self) -> str:
        """Describe the settings that are not the default ones."""
        return self._show(f"in_channels={self.in_channels}", f"embed_dim={self.embed_dim}", *["pad=True"] * self.pad)

    def forward(self, x: Tensor) -> Tensor:
        """Embed patches.

        Args:
            x: Input, channels last or first as the module was told.

        Returns:
            One vector a patch.

        Raises:
            ShapeError: If the input has the wrong number of dimensions or channels, an empty mode, or without ``pad``
                a size that its patch does not divide.
            DtypeError: If the input is not floating point, or not of the type of the parameters.
        """
        grid = self._checked(x)
        last, count = channels_last(x, self.channels_first), grid_of(grid.sizes, self.patch)
        for mode, (size, patches, part) in enumerate(zip(grid.sizes, count, self.patch, strict=True)):
            if self.pad and part > 1 and (is_recorded() or size % part):
                places = torch.arange(patches * part, device=x.device).clamp(max=size - 1)
                last = last.index_select(1 + mode, places)
        blocks = last.reshape(x.shape[0], *block_shape(count, self.patch), self.in_channels)
        blocks = blocks.permute(block_axes(self.modes.order, batch=1))
        return self._placed(self.proj(blocks.reshape(x.shape[0], *count, self.in_channels * math.prod(self.patch))))

    @retells
    def _checked(self, x: Tensor) -> GridShape:
        """Check the input and read its shape."""
        grid = self._check(x, self.in_channels, "in_channels")
        for name, size, part in zip(self.modes.names, grid.sizes, self.patch, strict=True):
            if not self.pad and size % part:
                raise ShapeError(
                    f"mode {name!r} has size {size} in x, which patches of {part} do not divide.",
                    hint="Crop it, choose another patch, or repeat its last index with pad=True.",
                )
        return grid


class PatchUnembedding(_Patches):
    r"""Map vectors linearly to patches, and put the patches together to a tensor: the shapes of `PatchEmbedding` back.

    Args:
        embed_dim: Channels E of the input.
        out_channels: Channels of the output.
        patch: Sizes of a patch: one number for every mode, one a mode, or a mapping from names or indices of modes, 1
            where it has none.
        modes: Modes of the input: their number, or their names as in ``"t h w"``.
        channels_first: Whether input and output are ``(B, C, n_1, …, n_N)`` instead of ``(B, n_1, …, n_N, C)``.
        bias: Whether the linear map has a bias.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Raises:
        ModesError: If modes are missing or named badly, or sizes of a patch are not one a mode.
        OptionError: If channels or sizes of a patch are not positive.

    Shape:
        - input: :math:`(B, g_1, \dots, g_N, E)`, or :math:`(B, E, g_1, \dots, g_N)` with ``channels_first``
        - output: :math:`(B, n_1, \dots, n_N, C)` with :math:`n_m = g_m p_m` unless ``sizes`` crops it, or with C first

    Examples:
        >>> import torch, tensorattn as ta
        >>> unembedding = ta.PatchUnembedding(96, 3, (1, 8, 8), modes="t h w")
        >>> x = torch.randn(2, 5, 8, 6, 96)
        >>> unembedding(x).shape, unembedding(x, sizes=(5, 60, 48)).shape
        (torch.Size([2, 5, 64, 48, 3]), torch.Size([2, 5, 60, 48, 3]))
    """

    @retells
    def __init__(
        self,
        embed_dim: int,
        out_channels: int,
        patch: Patch,
        *,
        modes: int | str | Sequence[str] | None = None,
        channels_first: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(modes, patch, channels_first)
        check(embed_dim, "embed_dim", "integer", least=1)
        check(out_channels, "out_channels", "integer", least=1)
        self.embed_dim, self.out_channels = embed_dim, out_channels
        self.proj = nn.Linear(embed_dim, out_channels * math.prod(self.patch), bias, device=device, dtype=dtype)
        self.reset_parameters()

    def extra_repr(self) -> str:
        """Describe the settings that are not the default ones."""
        return self._show(f"embed_dim={self.embed_dim}", f"out_channels={self.out_channels}")

    def forward(self, x: Tensor, *, sizes: Sequence[int] | None = None) -> Tensor:
        """Put patches together.

        Args:
            x: One vector a patch, channels last or first as the module was told.
            sizes: Sizes to crop the modes to, within their last patch; None for whole patches.

        Returns:
            The tensor.

        Raises:
            ShapeError: If the input has the wrong number of dimensions or channels, an empty mode, or ``sizes`` asks
                for another number of patches.
            ModesError: If ``sizes`` is not one a mode.
            DtypeError: If the input is not floating point, or not of the type of the parameters.
        """
        grid = self._checked(x, sizes)
        blocks = self.proj(channels_last(x, self.channels_first))
        blocks = blocks.reshape(x.shape[0], *grid.sizes, *self.patch, self.out_channels)
        blocks = blocks.permute(block_axes(self.modes.order, batch=1, inverse=True))
        whole = [count * part for count, part in zip(grid.sizes, self.patch, strict=True)]
        y = blocks.reshape(x.shape[0], *whole, self.out_channels)
        for mode, size in enumerate(sizes or ()):
            y = y.narrow(1 + mode, 0, size)
        return self._placed(y)

    @retells
    def _checked(self, x: Tensor, sizes: Sequence[int] | None) -> GridShape:
        """Check the input, and that sizes end in the last patch of each mode."""
        grid = self._check(x, self.embed_dim, "embed_dim")
        if sizes is None:
            return grid
        if len(sizes) != self.modes.order:
            raise ModesError(f"sizes has {len(sizes)} entries, but order {self.modes.order} needs one a mode.")
        for name, size, count, part in zip(self.modes.names, sizes, grid.sizes, self.patch, strict=True):
            if not (count - 1) * part < size <= count * part:
                raise ShapeError(
                    f"mode {name!r} has size {size} in sizes, but {count} patches of {part} in x hold "
                    f"{(count - 1) * part + 1} to {count * part}."
                )
        return grid
