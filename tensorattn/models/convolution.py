"""Convolutions for every order: windows with a linear map, and the inverted residual of mobile networks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorattn.modes import ModeSpec
from tensorattn.nn.mixers import DepthwiseFilter
from tensorattn.nn.parameters import draw_linear, reset_parts

__all__ = ["ChannelNorm", "InvertedResidual", "WindowEmbedding"]

SIZE = 3  # of a window along each mode


class WindowEmbedding(nn.Module):
    r"""Map the window of :math:`3^N` positions around each position linearly: a convolution, for every order.

    Outside the grid there are zeros.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        modes: Modes of the input: their number, or their names.
        stride: Every how many positions of each mode there is an output.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        - input: :math:`(B, n_1, \dots, n_N, C)`
        - output: :math:`(B, g_1, \dots, g_N, E)` with :math:`g_m = \lceil n_m / \mathrm{stride} \rceil`

    Examples:
        >>> import torch
        >>> WindowEmbedding(1, 8, modes=4, stride=2)(torch.randn(2, 3, 4, 5, 6, 1)).shape
        torch.Size([2, 2, 2, 3, 3, 8])
    """

    __call__: Callable[..., Tensor]  # a module says Any

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        modes: int | str | Sequence[str] | None,
        stride: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.order, self.stride = ModeSpec.parse(modes).order, stride
        self.proj = nn.Linear(in_channels * SIZE**self.order, out_channels, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew, Xavier uniform, and set the bias to zero."""
        draw_linear(self.proj)

    def forward(self, x: Tensor) -> Tensor:
        """Map windows.

        Args:
            x: Input, channels last.

        Returns:
            The output.
        """
        windows = F.pad(x, (0, 0, *(1, 1) * self.order))
        for mode in range(self.order):
            windows = windows.unfold(1 + mode, SIZE, self.stride)
        return self.proj(windows.flatten(1 + self.order))


class ChannelNorm(nn.BatchNorm1d):
    r"""Standardise each channel over the batch and all positions: batch norm for every order, channels last.

    Shape:
        - input and output: :math:`(B, n_1, \dots, n_N, C)`

    Examples:
        >>> import torch
        >>> y = ChannelNorm(8)(3 + torch.randn(2, 3, 4, 5, 6, 8))
        >>> bool(y.flatten(0, -2).mean(0).abs().max() < 1e-5)
        True
    """

    __call__: Callable[..., Tensor]  # a module says Any

    def forward(self, input: Tensor) -> Tensor:
        """Standardise.

        Args:
            input: Input, channels last.

        Returns:
            The output, of the shape of the input.
        """
        return super().forward(input.reshape(-1, input.shape[-1])).reshape(input.shape)


class InvertedResidual(nn.Module):
    r"""Widen each position, filter every channel over its neighbours, and narrow it again, with a skip around.

    Without stride, and with as many channels as before, the input is added. Each of the three maps is followed by a
    batch norm, the first two by relu6.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        modes: Modes of the input: their number, or their names.
        expansion: Channels between over those of the input.
        stride: Every how many positions of each mode there is an output.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        - input: :math:`(B, n_1, \dots, n_N, C)`
        - output: :math:`(B, g_1, \dots, g_N, E)` with :math:`g_m = \lceil n_m / \mathrm{stride} \rceil`

    Examples:
        >>> import torch
        >>> InvertedResidual(8, 16, modes=3, stride=2)(torch.randn(2, 3, 4, 5, 8)).shape
        torch.Size([2, 2, 2, 3, 16])

    References:
        Sandler, Howard, Zhu, Zhmoginov and Chen, "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018,
        arXiv 1801.04381.
    """

    __call__: Callable[..., Tensor]  # a module says Any

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        modes: int | str | Sequence[str] | None,
        expansion: float = 4,
        stride: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = max(1, math.floor(expansion * in_channels))
        self.skips = stride == 1 and in_channels == out_channels
        self.in_proj = nn.Linear(in_channels, hidden, bias=False, device=device, dtype=dtype)
        self.filter = DepthwiseFilter(hidden, modes=modes, stride=stride, device=device, dtype=dtype)
        self.out_proj = nn.Linear(hidden, out_channels, bias=False, device=device, dtype=dtype)
        self.norms = nn.ModuleList(ChannelNorm(c, device=device, dtype=dtype) for c in (hidden, hidden, out_channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights anew, linear maps Xavier uniform, and forget what the norms have seen."""
        for linear in (self.in_proj, self.out_proj):
            draw_linear(linear)
        reset_parts(self.norms)
        self.filter.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Widen, filter and narrow.

        Args:
            x: Input, channels last.

        Returns:
            The output.
        """
        widened, filtered, narrowed = self.norms
        y = F.relu6(filtered(self.filter(F.relu6(widened(self.in_proj(x))))))
        y = narrowed(self.out_proj(y))
        return x + y if self.skips else y
