"""Patches of a tensor of any order, each a vector, by reshaping and one linear map; and the way back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tensorattn.errors import ModesError, OptionError, ShapeError, TensorAttentionError
from tensorattn.modes import GridShape, ModeSpec
from tensorattn.nn.layout import check_input, check_parameters, one_a_mode, reading, show_modes
from tensorattn.patching import block_axes, block_shape, grid_of

__all__ = ["Patch", "PatchEmbedding", "PatchUnembedding", "check_patch"]

Patch = int | Sequence[int] | Mapping[int | str, int]


class PatchEmbedding(nn.Module):
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
        ModesError: If modes are named badly, or sizes of a patch are not one a mode.
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

    def __init__(
        self,
        in_channels: int,
        embed_dim: int,
        patch: Patch,
        *,
        modes: int | str | Sequence[str],
        pad: bool = False,
        channels_first: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        try:
            self.modes = ModeSpec.parse(modes)
            self.patch = check_patch(patch, self.modes)
            _check_channels(in_channels=in_channels, embed_dim=embed_dim)
        except TensorAttentionError as cause:
            raise cause.retold("PatchEmbedding") from None
        self.in_channels, self.embed_dim, self.pad, self.channels_first = in_channels, embed_dim, pad, channels_first
        self.proj = nn.Linear(in_channels * math.prod(self.patch), embed_dim, bias, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew, Xavier uniform, and set the bias to zero."""
        _draw(self.proj)

    def extra_repr(self) -> str:
        """Describe the settings that are not the default ones."""
        parts = [f"in_channels={self.in_channels}", f"embed_dim={self.embed_dim}", f"patch={self.patch}"]
        parts += [f"modes={show_modes(self.modes)}"] + ["pad=True"] * self.pad
        return ", ".join(parts + ["channels_first=True"] * self.channels_first)

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
        try:
            grid = self._check(x)
        except TensorAttentionError as cause:
            told = reading(x, self.modes, channels_first=self.channels_first)
            raise cause.retold("PatchEmbedding", told) from None
        last = x.movedim(1, -1) if self.channels_first else x
        count = grid_of(grid.sizes, self.patch)
        for mode, (size, patches, part) in enumerate(zip(grid.sizes, count, self.patch, strict=True)):
            if self.pad and part > 1 and (torch.compiler.is_compiling() or size % part):
                places = torch.arange(patches * part, device=x.device).clamp(max=size - 1)
                last = last.index_select(1 + mode, places)
        blocks = last.reshape(x.shape[0], *block_shape(count, self.patch), self.in_channels)
        blocks = blocks.permute(block_axes(self.modes.order, batch=1))
        y = self.proj(blocks.reshape(x.shape[0], *count, self.proj.in_features))
        return y.movedim(-1, 1) if self.channels_first else y

    def _check(self, x: Tensor) -> GridShape:
        """Check the input and read its shape."""
        grid = check_input(x, self.modes, self.in_channels, channels_first=self.channels_first, called="in_channels")
        check_parameters(x, self.proj.weight)
        for name, size, part in zip(self.modes.names, grid.sizes, self.patch, strict=True):
            if not self.pad and size % part:
                raise ShapeError(
                    f"mode {name!r} has size {size} in x, which patches of {part} do not divide.",
                    hint="Crop it, choose another patch, or repeat its last index with pad=True.",
                )
        return grid


class PatchUnembedding(nn.Module):
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
        ModesError: If modes are named badly, or sizes of a patch are not one a mode.
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

    def __init__(
        self,
        embed_dim: int,
        out_channels: int,
        patch: Patch,
        *,
        modes: int | str | Sequence[str],
        channels_first: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        try:
            self.modes = ModeSpec.parse(modes)
            self.patch = check_patch(patch, self.modes)
            _check_channels(embed_dim=embed_dim, out_channels=out_channels)
        except TensorAttentionError as cause:
            raise cause.retold("PatchUnembedding") from None
        self.embed_dim, self.out_channels, self.channels_first = embed_dim, out_channels, channels_first
        self.proj = nn.Linear(embed_dim, out_channels * math.prod(self.patch), bias, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew, Xavier uniform, and set the bias to zero."""
        _draw(self.proj)

    def extra_repr(self) -> str:
        """Describe the settings that are not the default ones."""
        parts = [f"embed_dim={self.embed_dim}", f"out_channels={self.out_channels}", f"patch={self.patch}"]
        return ", ".join([*parts, f"modes={show_modes(self.modes)}"] + ["channels_first=True"] * self.channels_first)

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
        try:
            grid = check_input(x, self.modes, self.embed_dim, channels_first=self.channels_first)
            check_parameters(x, self.proj.weight)
            if sizes is not None:
                self._check_sizes(sizes, grid)
        except TensorAttentionError as cause:
            told = reading(x, self.modes, channels_first=self.channels_first)
            raise cause.retold("PatchUnembedding", told) from None
        y = self.proj(x.movedim(1, -1) if self.channels_first else x)
        blocks = y.reshape(x.shape[0], *grid.sizes, *self.patch, self.out_channels)
        blocks = blocks.permute(block_axes(self.modes.order, batch=1, inverse=True))
        whole = [count * part for count, part in zip(grid.sizes, self.patch, strict=True)]
        y = blocks.reshape(x.shape[0], *whole, self.out_channels)
        for mode, size in enumerate(whole if sizes is None else sizes):
            y = y.narrow(1 + mode, 0, size)
        return y.movedim(-1, 1) if self.channels_first else y

    def _check_sizes(self, sizes: Sequence[int], grid: GridShape) -> None:
        """Check that sizes end in the last patch of each mode."""
        if len(sizes) != self.modes.order:
            raise ModesError(f"sizes has {len(sizes)} entries, but order {self.modes.order} needs one a mode.")
        for name, size, count, part in zip(self.modes.names, sizes, grid.sizes, self.patch, strict=True):
            if not (count - 1) * part < size <= count * part:
                raise ShapeError(
                    f"mode {name!r} has size {size} in sizes, but {count} patches of {part} in x hold "
                    f"{(count - 1) * part + 1} to {count * part}."
                )


def check_patch(patch: Patch, modes: ModeSpec) -> tuple[int, ...]:
    """Read the sizes of a patch.

    Args:
        patch: One number for every mode, one a mode, or a mapping from modes.
        modes: The modes.

    Returns:
        One size a mode.

    Raises:
        ModesError: If they are not one a mode, or name a mode that does not exist.
        OptionError: If one is not a positive whole number.
    """
    parts: list[Any] = [1 if part is None else part for part in one_a_mode(modes, patch, "patch")]
    for name, part in zip(modes.names, parts, strict=True):
        if isinstance(part, bool) or not isinstance(part, int) or part < 1:
            raise OptionError(f"patch of mode {name!r} must be a positive whole number, got {part!r}.")
    return tuple(parts)


def _check_channels(**channels: int) -> None:
    """Check that there are channels."""
    for name, count in channels.items():
        if count < 1:
            raise OptionError(f"{name} must be at least 1, got {count}.")


def _draw(linear: nn.Linear) -> None:
    """Draw a linear map."""
    nn.init.xavier_uniform_(linear.weight)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
