"""What lets positions know of each other: attention of any operator, and plain mixers beside which it is judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorattn.averages.means import marginal_means
from tensorattn.errors import OptionError, check, retells
from tensorattn.functional import OPERATORS
from tensorattn.masks import GivenWeights, Lengths, Mask, Weights, read_weights, without_absent
from tensorattn.modes import ModeSpec
from tensorattn.nn.attention import TensorAttention
from tensorattn.nn.layout import check_input, show_modes
from tensorattn.nn.parameters import draw_linear

__all__ = [
    "MIXERS",
    "DepthwiseFilter",
    "IdentityMixer",
    "LocalMixer",
    "MeanMixer",
    "PointwiseMixer",
    "check_mixer",
    "make_mixer",
    "mixer_names",
]


class DepthwiseFilter(nn.Module):
    r"""Filter each channel along each mode in turn with three weights: local mixing for every order.

    A convolution whose kernel is an outer product, :math:`3^N` positions wide with 3N weights a channel, by shifts and
    sums; outside the grid there are zeros. The first filters pass their input on, nearly.

    Args:
        channels: Channels C.
        modes: Modes of the input: their number, or their names as in ``"t h w"``.
        stride: Every how many positions of each mode there is an output.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        - input: :math:`(B, n_1, \dots, n_N, C)`
        - output: :math:`(B, g_1, \dots, g_N, C)` with :math:`g_m = \lceil n_m / \mathrm{stride} \rceil`

    Examples:
        >>> import torch
        >>> DepthwiseFilter(8, modes=4, stride=2)(torch.randn(2, 3, 4, 5, 6, 8)).shape
        torch.Size([2, 2, 2, 3, 3, 8])
    """

    __call__: Callable[..., Tensor]  # a module says Any

    def __init__(
        self,
        channels: int,
        *,
        modes: int | str | Sequence[str] | None = None,
        stride: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.modes, self.stride = ModeSpec.parse(modes), stride
        self.weight = nn.Parameter(torch.empty(self.modes.order, 3, channels, device=device, dtype=dtype))
        self.reset_parameters()

    def extra_repr(self) -> str:
        """Describe the settings."""
        stride = [f"stride={self.stride}"] * (self.stride != 1)
        return ", ".join([f"channels={self.weight.shape[-1]}", f"modes={show_modes(self.modes)}", *stride])

    def reset_parameters(self) -> None:
        """Draw the weights anew: normal with a standard deviation of 0.3, about 1 in the middle and 0 beside it."""
        with torch.no_grad():
            nn.init.normal_(self.weight, std=0.3)[:, 1].add_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        """Filter.

        Args:
            x: Input, channels last.

        Returns:
            The output.
        """
        for mode, taps in enumerate(self.weight):
            count = -(-x.shape[1 + mode] // self.stride)
            padded = F.pad(x, (0, 0) * (self.modes.order - mode) + (1, 1))
            before: tuple[slice, ...] = (slice(None),) * (1 + mode)
            shifted = [
                padded[(*before, slice(k, k + (count - 1) * self.stride + 1, self.stride))] * tap
                for k, tap in enumerate(taps)
            ]
            x = shifted[0] + shifted[1] + shifted[2]
        return x


class _Mixer(nn.Module):
    r"""What the plain mixers share: :math:`W_2\,\mathrm{gelu}(\mathrm{mix}(W_1 x))`, with the weights of attention.

    They take what `TensorAttention` takes of the grid: ``weights``, ``mask`` and ``lengths``.
    """

    __call__: Callable[..., Tensor]  # a module says Any

    def __init__(
        self,
        embed_dim: int,
        *,
        modes: int | str | Sequence[str] | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check(embed_dim, "embed_dim", "integer", least=1)
        self.embed_dim, self.modes = embed_dim, ModeSpec.parse(modes)
        self._build(bias, {"device": device, "dtype": dtype})
        self.reset_parameters()

    def _build(self, bias: bool, factory: dict[str, Any]) -> None:
        """Make the maps."""
        self._maps(2 * self.embed_dim, 2 * self.embed_dim, bias, factory)

    def _maps(self, made: int, kept: int, bias: bool, factory: dict[str, Any]) -> None:
        """Make the map in, and the map out."""
        self.in_proj = nn.Linear(self.embed_dim, made, bias, **factory)
        self.out_proj = nn.Linear(kept, self.embed_dim, bias, **factory)

    def reset_parameters(self) -> None:
        """Draw all weights anew, linear maps Xavier uniform with biases of zero."""
        for part in self.children():
            if isinstance(part, nn.Linear):
                draw_linear(part)
            elif isinstance(part, DepthwiseFilter):
                part.reset_parameters()

    def extra_repr(self) -> str:
        """Describe the settings."""
        return f"embed_dim={self.embed_dim}, modes={show_modes(self.modes)}"

    @retells
    def forward(self, x: Tensor, *, weights: GivenWeights = None, mask: Mask = None, lengths: Lengths = None) -> Tensor:
        """Mix.

        Args:
            x: Input ``(B, n_1, …, n_N, C)``.
            weights: How often positions count, as in `TensorAttention`.
            mask: True where a position takes part.
            lengths: How many leading indices of each mode take part.

        Returns:
            The output, of the shape of the input, zero where positions are absent.

        Raises:
            ShapeError: If the input has the wrong number of dimensions or channels, or the mask or lengths do not fit.
            DtypeError: If the input is not floating point, the mask is not bool, or lengths are not integers.
            WeightsError: If weights are refused, or a length is negative or longer than its mode.
            OptionError: If weights have no meaning for the mixer.
        """
        grid = check_input(x, self.modes, self.embed_dim, channels_first=False)
        read = read_weights(weights, mask, lengths, grid, x, self.modes, of="x")
        return without_absent(self._mix(without_absent(x, read.present), read), read.present)

    def _mix(self, x: Tensor, weights: Weights) -> Tensor:
        """Mix checked input."""
        return self.out_proj(F.gelu(self._between(self.in_proj(x), weights)))

    def _between(self, hidden: Tensor, weights: Weights) -> Tensor:
        """Let positions know of each other, between the maps: here, they do not."""
        return hidden


class IdentityMixer(_Mixer):
    r"""Return the input: no mixing, no weights.

    Args:
        embed_dim: Channels C of input and output.
        modes: Modes of the input: their number, or their names as in ``"t h w"``.
        bias: Whether linear maps have a bias.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        - input and output: :math:`(B, n_1, \dots, n_N, C)`

    Examples:
        >>> import torch
        >>> mixer = IdentityMixer(8, modes="h w")
        >>> mixer(torch.randn(2, 4, 5, 8)).shape, sum(p.numel() for p in mixer.parameters())
        (torch.Size([2, 4, 5, 8]), 0)
    """

    def _build(self, bias: bool, factory: dict[str, Any]) -> None:
        """Make nothing."""

    def _mix(self, x: Tensor, weights: Weights) -> Tensor:
        """Return the input."""
        return x


class PointwiseMixer(_Mixer):
    r"""Map each position by itself: no mixing, about as many weights as attention has.

    Arguments and shapes are those of `IdentityMixer`.

    Examples:
        >>> import torch
        >>> mixer = PointwiseMixer(8, modes="h w")
        >>> mixer(torch.randn(2, 4, 5, 8)).shape, sum(p.numel() for p in mixer.parameters())
        (torch.Size([2, 4, 5, 8]), 280)
    """


class MeanMixer(_Mixer):
    r"""Add to each position a map of the mean over all positions: the least that is global.

    Arguments and shapes are those of `IdentityMixer`.

    Examples:
        >>> import torch
        >>> mixer = MeanMixer(8, modes="h w")
        >>> mixer(torch.randn(2, 4, 5, 8)).shape, sum(p.numel() for p in mixer.parameters())
        (torch.Size([2, 4, 5, 8]), 294)
    """

    def _build(self, bias: bool, factory: dict[str, Any]) -> None:
        """Make a map in for the position and one for the mean, each with a third more channels."""
        hidden = -(-4 * self.embed_dim // 3)
        self._maps(2 * hidden, hidden, bias, factory)

    def _between(self, hidden: Tensor, weights: Weights) -> Tensor:
        """Add the mean of one half to the other."""
        own, shared = hidden.chunk(2, -1)
        (mean,) = marginal_means(shared, ((),), weights)
        return own + mean.to(own.dtype).reshape(mean.shape[0], *(1,) * self.modes.order, mean.shape[-1])


class LocalMixer(_Mixer):
    r"""Filter channels over the neighbours of each position: a `DepthwiseFilter` between two maps.

    Arguments and shapes are those of `IdentityMixer`.

    Examples:
        >>> import torch
        >>> mixer = LocalMixer(8, modes="h w")
        >>> mixer(torch.randn(2, 4, 5, 8)).shape, sum(p.numel() for p in mixer.parameters())
        (torch.Size([2, 4, 5, 8]), 376)
    """

    def _build(self, bias: bool, factory: dict[str, Any]) -> None:
        """Make a filter too."""
        super()._build(bias, factory)
        self.filter = DepthwiseFilter(2 * self.embed_dim, modes=self.modes.order, **factory)

    def _between(self, hidden: Tensor, weights: Weights) -> Tensor:
        """Filter what is present."""
        if not weights.binary:
            raise OptionError("weights has no meaning for mixer 'local': a filter counts each neighbour once.")
        return self.filter(without_absent(hidden, weights.present))


MIXERS: dict[str, type[_Mixer]] = {
    "identity": IdentityMixer,
    "pointwise": PointwiseMixer,
    "mean": MeanMixer,
    "local": LocalMixer,
}


def mixer_names() -> tuple[str, ...]:
    """Return the names of all mixers: the plain ones, then the operators of attention.

    Examples:
        >>> mixer_names()[:5]
        ('identity', 'pointwise', 'mean', 'local', 'additive')
    """
    return (*MIXERS, *OPERATORS)


def check_mixer(mixer: Any) -> None:
    """Check the name of a mixer.

    Args:
        mixer: What was given.

    Raises:
        OptionError: If there is no such mixer.
    """
    if not isinstance(mixer, str) or mixer not in mixer_names():
        raise OptionError(f"there is no mixer {mixer!r}; there are: {', '.join(mixer_names())}.")


def make_mixer(
    mixer: str,
    embed_dim: int,
    num_heads: int,
    *,
    modes: int | str | Sequence[str] | None = None,
    bias: bool = True,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> nn.Module:
    """Make a mixer by its name.

    Args:
        mixer: ``"identity"``, ``"pointwise"`` (no mixing, with the weights of attention), ``"mean"``, ``"local"``, or
            an operator of `TensorAttention`.
        embed_dim: Channels C of input and output.
        num_heads: Number of heads of attention.
        modes: Modes of the input: their number, or their names as in ``"t h w"``.
        bias: Whether linear maps have a bias.
        device: Device of the parameters.
        dtype: Type of the parameters.
        **options: Options of `TensorAttention`; the other mixers have none.

    Returns:
        A module from ``(B, n_1, …, n_N, C)`` to the same shape.

    Raises:
        OptionError: If there is no such mixer or option, or an option is out of its range.
        ModesError: If modes are missing or named badly.

    Examples:
        >>> import torch
        >>> make_mixer("mean", 8, 2, modes="h w")(torch.randn(2, 4, 5, 8)).shape
        torch.Size([2, 4, 5, 8])
    """
    common: dict[str, Any] = {"modes": modes, "bias": bias, "device": device, "dtype": dtype}
    if mixer in OPERATORS:
        return TensorAttention(embed_dim, num_heads, operator=mixer, **common, **options)
    check_mixer(mixer)
    if options:
        raise OptionError(f"mixer {mixer!r} has no option {min(options)!r}; it has none.")
    return MIXERS[mixer](embed_dim, **common)
