"""A small classifier for tensors of any order: inverted residuals between attention, after Gao, Wang and Ji."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorattn.errors import OptionError, check, retells
from tensorattn.models.convolution import ChannelNorm, InvertedResidual, WindowEmbedding
from tensorattn.modes import ModeSpec
from tensorattn.nn import TensorTransformerBlock
from tensorattn.nn.layout import channels_last, check_input, check_parameters
from tensorattn.nn.mixers import check_mixer
from tensorattn.nn.parameters import draw_linear, parameter_of, reset_parts

__all__ = ["KANet", "check_widths"]


class KANet(nn.Module):
    r"""Classify tensors of any order: a stem, stages of inverted residuals and mixers, a mean, a linear map.

    The stem looks at windows of :math:`3^N` positions with stride 2, and each stage after the first starts with
    stride 2 too; sizes are halved and rounded up, so every size of at least one fits. A stage is inverted residuals,
    each followed by a norm and a mixer with a skip around them. Convolutions have batch norms, so train on more than
    one sample.

    Args:
        in_channels: Channels of the input.
        num_classes: Numbers of the output.
        modes: Modes of the input: their number, or their names as in ``"t h w"``.
        widths: Channels of each stage.
        depths: Pairs of an inverted residual and a mixer in each stage; one number for all stages.
        mixer: What mixes positions: an operator of attention, ``"mean"`` of all positions, ``"local"`` filters,
            ``"pointwise"`` for no mixing with about as many weights, or ``"identity"`` for none. The default learned as
            well as any that costs next to nothing (`python -m tensorattn learn`).
        num_heads: Number of heads; they divide the widths.
        expansion: Channels inside an inverted residual over those of its input.
        drop_path: Probability of dropping the mixer of a sample in training.
        channels_first: Whether inputs are ``(B, C, n_1, …, n_N)`` instead of ``(B, n_1, …, n_N, C)``.
        device: Device of the parameters.
        dtype: Type of the parameters.
        **options: Options of `TensorAttention`, such as ``centered=True`` or ``dropout=0.1``.

    Raises:
        OptionError: If an option is out of its range, there is no such mixer, or it has no such option.
        ModesError: If modes are missing or named badly, or an option names a mode that does not exist.

    Shape:
        - input: :math:`(B, C, n_1, \dots, n_N)`, or :math:`(B, n_1, \dots, n_N, C)` without ``channels_first``
        - output: :math:`(B, K)` with K the number of classes

    Examples:
        >>> import torch, tensorattn as ta
        >>> model = ta.KANet(3, 10, modes="t h w", mixer="kao_qkv", centered=True)
        >>> model(torch.randn(2, 3, 8, 30, 41)).shape
        torch.Size([2, 10])
        >>> bool(ta.cost(model, (1, 3, 8, 30, 41)).attention_flops > 0)
        True

    References:
        Gao, Wang and Ji, "Kronecker Attention Networks", KDD 2020, arXiv 2007.08442.
    """

    __call__: Callable[..., Tensor]  # a module says Any

    @retells
    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        modes: int | str | Sequence[str] | None = None,
        widths: Sequence[int] = (16, 32),
        depths: int | Sequence[int] = 1,
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
        check(num_classes, "num_classes", "integer", least=1)
        check(channels_first, "channels_first", "switch")
        check_mixer(mixer)
        check_expansion(expansion)
        check_options(options)
        self.in_channels, self.channels_first = in_channels, channels_first
        self.widths = check_widths(widths, "widths")
        repeats = (depths,) * len(self.widths) if isinstance(depths, int) else depths
        self.depths = check_widths(repeats, "depths")
        if len(self.depths) != len(self.widths):
            raise OptionError(f"depths has {len(self.depths)} entries, but widths has {len(self.widths)}.")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        first, last = self.widths[0], self.widths[-1]
        self.stem = WindowEmbedding(in_channels, first, modes=modes, stride=2, **factory)
        self.stem_norm = ChannelNorm(first, **factory)
        stages: list[nn.Module] = []
        before = first
        for stage, (width, depth) in enumerate(zip(self.widths, self.depths, strict=True)):
            for place in range(depth):
                stride = 2 if stage > 0 and place == 0 else 1
                local = InvertedResidual(before, width, modes=modes, expansion=expansion, stride=stride, **factory)
                mixing = TensorTransformerBlock(
                    width,
                    num_heads,
                    modes=modes,
                    mixer=mixer,
                    mlp_ratio=None,
                    drop_path=drop_path,
                    **factory,
                    **options,
                )
                stages += [local, mixing]
                before = width
        self.stages = nn.Sequential(*stages)
        self.features = nn.Linear(last, 4 * last, bias=False, **factory)
        self.features_norm = ChannelNorm(4 * last, **factory)
        self.head = nn.Linear(4 * last, num_classes, **factory)
        self._draw()

    def reset_parameters(self) -> None:
        """Draw all weights anew."""
        reset_parts(self)
        self._draw()

    def _draw(self) -> None:
        """Draw the last maps."""
        draw_linear(self.features)
        draw_linear(self.head)

    def forward(self, x: Tensor) -> Tensor:
        """Classify.

        Args:
            x: Input, channels first or last as the module was told.

        Returns:
            The logits of the classes.

        Raises:
            ShapeError: If the input has the wrong number of dimensions or channels, or an empty mode.
            DtypeError: If the input is not floating point, or not of the type of the parameters.
        """
        self._check(x)
        y = F.relu6(self.stem_norm(self.stem(channels_last(x, self.channels_first))))
        y = F.relu6(self.features_norm(self.features(self.stages(y))))
        return self.head(y.flatten(1, -2).mean(1))

    @retells
    def _check(self, x: Tensor) -> None:
        """Check the input."""
        check_input(x, self.modes, self.in_channels, channels_first=self.channels_first, called="in_channels")
        check_parameters(x, parameter_of(self))


def check_widths(given: Sequence[int], called: str) -> tuple[int, ...]:
    """Check numbers of stages.

    Args:
        given: One number a stage.
        called: Name of the argument.

    Returns:
        The numbers.

    Raises:
        OptionError: If there are none, or one is not a whole number of at least one.
    """
    if isinstance(given, str) or not isinstance(given, Sequence) or not given:
        raise OptionError(f"{called} must be one number a stage, got {given!r}.")
    for number in given:
        check(number, f"every one of {called}", "integer", least=1)
    return tuple(given)


def check_options(options: Iterable[str]) -> None:
    """Check that options of attention are none that a network sets by itself.

    Args:
        options: Their names.

    Raises:
        OptionError: If one of them is.
    """
    for name in {"embed_dim", "mlp_ratio"} & set(options):
        raise OptionError(f"{name} is set by the network, so it is no option of its attention.")


def check_expansion(expansion: float) -> None:
    """Check the expansion of inverted residuals.

    Args:
        expansion: What was given.

    Raises:
        OptionError: If it is not a positive number.
    """
    check(expansion, "expansion", "number", rule="a positive number")
    if not 0 < expansion < float("inf"):
        raise OptionError(f"expansion must be a positive number, got {expansion}.")
