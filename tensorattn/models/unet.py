"""A U-Net for tensors of any order: an output at every position, attention on coarser grids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorattn.errors import check, retells
from tensorattn.masks import is_recorded
from tensorattn.models.convolution import ChannelNorm, InvertedResidual, WindowEmbedding
from tensorattn.models.kanet import check_expansion, check_options, check_widths
from tensorattn.modes import ModeSpec
from tensorattn.nn import PatchEmbedding, PatchUnembedding, TensorTransformerBlock
from tensorattn.nn.layout import channels_last, check_input, check_parameters
from tensorattn.nn.mixers import check_mixer
from tensorattn.nn.parameters import draw_linear, parameter_of, reset_parts

__all__ = ["TensorUNet"]


class TensorUNet(nn.Module):
    r"""Map tensors of any order to tensors on the same grid: segmentation, reconstruction, a forecast.

    On the way down patches of 2 positions a mode become vectors, once for each width, and are followed by an inverted
    residual and a mixer; the coarsest grid has a mixer, an inverted residual and a mixer. On the way up vectors become
    patches again, beside what the way down held there, and last beside windows of :math:`3^N` positions of the input.
    A size that 2 does not divide is padded by its last index on the way down and cropped on the way up.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        modes: Modes of the input: their number, or their names as in ``"t h w"``.
        widths: Channels of each grid, from the finest, which has half the sizes of the input, to the coarsest.
        mixer: What mixes positions: an operator of attention, ``"mean"`` of all positions, ``"local"`` filters,
            ``"pointwise"`` for no mixing with about as many weights, or ``"identity"`` for none. The default learned as
            well as any that costs next to nothing (`python -m tensorattn learn`).
        num_heads: Number of heads; they divide the widths.
        expansion: Channels inside an inverted residual over those of its input.
        drop_path: Probability of dropping a mixer of a sample in training.
        channels_first: Whether inputs and outputs are ``(B, C, n_1, …, n_N)`` instead of ``(B, n_1, …, n_N, C)``.
        device: Device of the parameters.
        dtype: Type of the parameters.
        **options: Options of `TensorAttention`, such as ``centered=True`` or ``dropout=0.1``.

    Raises:
        OptionError: If an option is out of its range, there is no such mixer, or it has no such option.
        ModesError: If modes are missing or named badly, or an option names a mode that does not exist.

    Shape:
        - input: :math:`(B, C, n_1, \dots, n_N)`, or :math:`(B, n_1, \dots, n_N, C)` without ``channels_first``
        - output: the same with other channels

    Examples:
        >>> import torch, tensorattn as ta
        >>> model = ta.TensorUNet(1, 19, modes="x y z", widths=(16, 32), mixer="clustered", tokens=16)
        >>> model(torch.randn(2, 1, 16, 13, 7)).shape
        torch.Size([2, 19, 16, 13, 7])

    References:
        Ronneberger, Fischer and Brox, "U-Net: Convolutional Networks for Biomedical Image Segmentation", MICCAI 2015,
        arXiv 1505.04597.
    """

    __call__: Callable[..., Tensor]  # a module says Any

    @retells
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        modes: int | str | Sequence[str] | None = None,
        widths: Sequence[int] = (16, 32),
        mixer: str = "kronecker_product",
        num_heads: int = 4,
        expansion: float = 4,
        drop_path: float = 0.0,
        channels_first: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.modes = ModeSpec.parse(modes)
        check(in_channels, "in_channels", "integer", least=1)
        check(out_channels, "out_channels", "integer", least=1)
        check(channels_first, "channels_first", "switch")
        check_mixer(mixer)
        check_expansion(expansion)
        check_options(options)
        self.in_channels, self.channels_first = in_channels, channels_first
        self.widths = check_widths(widths, "widths")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}

        def residual(width: int) -> nn.Module:
            return InvertedResidual(width, width, modes=modes, expansion=expansion, **factory)

        def mixing(width: int) -> nn.Module:
            return TensorTransformerBlock(
                width, num_heads, modes=modes, mixer=mixer, mlp_ratio=None, drop_path=drop_path, **factory, **options
            )

        finer = (in_channels, *self.widths[:-1])
        self.down = nn.ModuleList(
            PatchEmbedding(before, width, 2, modes=modes, pad=True, **factory)
            for before, width in zip(finer, self.widths, strict=True)
        )
        self.encoders = nn.ModuleList(nn.Sequential(residual(width), mixing(width)) for width in self.widths[:-1])
        coarsest = self.widths[-1]
        self.bottom = nn.Sequential(mixing(coarsest), residual(coarsest), mixing(coarsest))
        fine = self.widths[0]
        self.up = nn.ModuleList(
            PatchUnembedding(width, before, 2, modes=modes, **factory)
            for before, width in zip((fine, *finer[1:]), self.widths, strict=True)
        )
        self.joins = nn.ModuleList(nn.Linear(2 * width, width, **factory) for width in finer[1:])
        self.decoders = nn.ModuleList(residual(width) for width in self.widths[:-1])
        self.local = WindowEmbedding(in_channels, fine, modes=modes, **factory)
        self.features = nn.Linear(2 * fine, 2 * fine, bias=False, **factory)
        self.norm = ChannelNorm(2 * fine, **factory)
        self.head = nn.Linear(2 * fine, out_channels, **factory)
        self._draw()

    def reset_parameters(self) -> None:
        """Draw all weights anew."""
        reset_parts(self)
        self._draw()

    def _draw(self) -> None:
        """Draw the maps that are of no part."""
        for linear in (*self.joins, self.features, self.head):
            draw_linear(linear)

    def forward(self, x: Tensor) -> Tensor:
        """Map.

        Args:
            x: Input, channels first or last as the module was told.

        Returns:
            The output, on the grid of the input.

        Raises:
            ShapeError: If the input has the wrong number of dimensions or channels, or an empty mode.
            DtypeError: If the input is not floating point, or not of the type of the parameters.
        """
        self._check(x)
        last = channels_last(x, self.channels_first)
        kept = []
        y = self.down[0](last)
        for encoder, down in zip(self.encoders, self.down[1:], strict=True):
            y = encoder(y)
            kept.append(y)
            y = down(y)
        y = self.bottom(y)
        steps = list(zip(kept, self.up[1:], self.joins, self.decoders, strict=True))
        for held, up, join, decoder in reversed(steps):
            y = decoder(join(torch.cat([_cropped(up(y), held), held], -1)))
        y = torch.cat([_cropped(self.up[0](y), last), self.local(last)], -1)
        y = self.head(F.relu6(self.norm(self.features(y))))
        return y.movedim(-1, 1) if self.channels_first else y

    @retells
    def _check(self, x: Tensor) -> None:
        """Check the input."""
        check_input(x, self.modes, self.in_channels, channels_first=self.channels_first, called="in_channels")
        check_parameters(x, parameter_of(self))


def _cropped(y: Tensor, like: Tensor) -> Tensor:
    """Crop the modes of a tensor to the sizes of another, in a graph in one way for all sizes."""
    for mode, size in enumerate(like.shape[1:-1], 1):
        if is_recorded():
            y = y.index_select(mode, torch.arange(size, device=y.device))
        else:
            y = y.narrow(mode, 0, size)
    return y
