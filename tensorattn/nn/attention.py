"""One module for every operator: project, attend, project back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tensorattn.contraction import contract, expand
from tensorattn.errors import DtypeError, OptionError, ShapeError, TensorAttentionError, describe
from tensorattn.modes import GridShape, ModeSpec
from tensorattn.operators import get_operator
from tensorattn.operators.operator import default_scale
from tensorattn.planning import main_effects
from tensorattn.summary import Summary, attention_summary
from tensorattn.weights import Vector, Vectors, check_weights, normalized

__all__ = ["TensorAttention"]


class TensorAttention(nn.Module):
    r"""Multi-head self-attention over a tensor of any order, without flattening it.

    Queries, keys and values are linear maps of the input. As averages of a linear map are the linear map of the
    averages, the module averages its input once and projects the averages: S = n_1 + … + n_N rows instead of
    P = n_1 ⋯ n_N, wherever the operator works on averages. It keeps nothing that depends on the sizes of the modes, so
    one module takes inputs of any size.

    Args:
        embed_dim: Channels C of input and output.
        num_heads: Number of heads H; they divide the channels.
        modes: Modes of the input: their number, or their names as in ``"t h w"``.
        operator: Name of the operator in `OPERATORS`.
        channels_first: Whether inputs are ``(B, C, n_1, …, n_N)`` instead of ``(B, n_1, …, n_N, C)``.
        bias: Whether the four linear maps have a bias.
        dropout: Probability of dropping an attention weight in training.
        device: Device of the parameters.
        dtype: Type of the parameters.
        **options: Options of the operator, such as ``centered=True`` for ``"kao_qkv"``.

    Raises:
        OptionError: If ``num_heads`` does not divide ``embed_dim``, ``dropout`` is not a probability, or there is no
            such operator or option.
        ModesError: If modes are named badly.

    Shape:
        - input and output: :math:`(B, n_1, \dots, n_N, C)`, or :math:`(B, C, n_1, \dots, n_N)` with
          ``channels_first``

    Examples:
        >>> import torch, tensorattn as ta
        >>> layer = ta.TensorAttention(96, num_heads=4, modes="t h w")
        >>> layer(torch.randn(2, 4, 14, 14, 96)).shape
        torch.Size([2, 4, 14, 14, 96])
        >>> layer
        TensorAttention(
          embed_dim=96, num_heads=4, modes='t h w', operator='additive'
          (q_proj): Linear(in_features=96, out_features=96, bias=True)
          (k_proj): Linear(in_features=96, out_features=96, bias=True)
          (v_proj): Linear(in_features=96, out_features=96, bias=True)
          (out_proj): Linear(in_features=96, out_features=96, bias=True)
        )
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        modes: int | str | Sequence[str],
        operator: str = "additive",
        channels_first: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        try:
            self.modes = ModeSpec.parse(modes)
            self.options = get_operator(operator).with_defaults(options)
            _check_heads(embed_dim, num_heads)
            if not 0 <= dropout <= 1:
                raise OptionError(f"dropout must be between 0 and 1, got {dropout}.")
        except TensorAttentionError as cause:
            raise cause.retold("TensorAttention") from None
        self.embed_dim, self.num_heads, self.operator = embed_dim, num_heads, operator
        self.channels_first, self.dropout = channels_first, dropout
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias, device, dtype)
        self.k_proj = nn.Linear(embed_dim, embed_dim, bias, device, dtype)
        self.v_proj = nn.Linear(embed_dim, embed_dim, bias, device, dtype)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew, Xavier uniform, and set the biases to zero."""
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            nn.init.xavier_uniform_(linear.weight)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def extra_repr(self) -> str:
        """Describe the settings that are not the default ones of every layer."""
        modes = repr(str(self.modes)) if self.modes.named else self.modes.order
        parts = [f"embed_dim={self.embed_dim}", f"num_heads={self.num_heads}", f"modes={modes}"]
        parts.append(f"operator={self.operator!r}")
        parts.extend(f"{name}={value!r}" for name, value in self.options.items())
        if self.channels_first:
            parts.append("channels_first=True")
        if self.dropout:
            parts.append(f"dropout={self.dropout}")
        return ", ".join(parts)

    def forward(self, x: Tensor, *, weights: Sequence[Vector] | None = None) -> Tensor:
        """Attend.

        Args:
            x: Input, channels last or first as the module was told.
            weights: One non-negative vector a mode, ``(n_m,)`` or ``(B, n_m)``, or None for equal weights:
                multiplicities, so 2 counts an index twice and 0 leaves it out.

        Returns:
            The output, of the shape of the input.

        Raises:
            ShapeError: If the input has the wrong number of dimensions or channels, or an empty mode.
            DtypeError: If the input is not floating point.
            WeightsError: If weights have the wrong length, are negative, not finite, or all zero.
        """
        try:
            grid = self._check(x)
            last = x.movedim(1, -1) if self.channels_first else x
            checked = check_weights(weights, grid, last)
        except TensorAttentionError as cause:
            reading = "" if self.channels_first else describe(self.modes.names, {"tensor": tuple(x.shape)})
            raise cause.retold("TensorAttention", reading.replace("tensor", "x     ")) from None
        y = self._attend(last, grid, checked)
        return y.movedim(-1, 1) if self.channels_first else y

    def _check(self, x: Tensor) -> GridShape:
        """Check the input and read its shape; modes go by their names."""
        order = self.modes.order
        if not x.is_floating_point():
            raise DtypeError(f"x must be floating point, got {x.dtype}.")
        if x.dim() != order + 2:
            layout = " ".join(("B", "C", *self.modes.names) if self.channels_first else ("B", *self.modes.names, "C"))
            raise ShapeError(f"x has {x.dim()} dimensions, but the layout ({layout}) has {order + 2}.")
        channels = x.shape[1 if self.channels_first else -1]
        if channels != self.embed_dim:
            raise ShapeError(f"x has {channels} channels, but embed_dim is {self.embed_dim}.")
        sizes = tuple(x.shape[2:] if self.channels_first else x.shape[1:-1])
        for name, size in zip(self.modes.names, sizes, strict=True):
            if size == 0:
                raise ShapeError(f"mode {name!r} has size 0 in x, but every mode needs at least 1 index.")
        return GridShape((x.shape[0],), sizes, channels)

    def _attend(self, x: Tensor, grid: GridShape, weights: Vectors) -> Tensor:
        """Summarise the input once, project the summary, attend, project back."""
        operator = get_operator(self.operator)
        needs = operator.needs(self.modes.order, **self.options)
        summary = attention_summary(x, x, needs, weights).project(
            self.k_proj.weight,
            self.v_proj.weight,
            key_bias=self.k_proj.bias,
            value_bias=self.v_proj.bias,
            num_heads=self.num_heads,
        )
        settings = {
            "scale": default_scale(self.embed_dim // self.num_heads),
            "dropout_p": self.dropout if self.training else 0.0,
            "return_lse": False,
            "return_attention": False,
            **self.options,
        }
        if operator.takes_means(**self.options):
            return self._attend_means(x, grid, weights, summary, settings)
        output = operator.attend(self._split(self.q_proj(x)), summary, **settings).output
        return self.out_proj(self._join(output))

    def _attend_means(
        self, x: Tensor, grid: GridShape, weights: Vectors, summary: Summary, settings: dict[str, Any]
    ) -> Tensor:
        """Attend from averages: queries are projected in S rows, and so is an output that is an outer sum."""
        order = self.modes.order
        means = contract(x, (*main_effects(order), ()), normalized(weights))
        queries = tuple(self._split(self._linear(self.q_proj, mean)) for mean in means)
        output = get_operator(self.operator).attend(queries, summary, **settings).output
        if isinstance(output, Tensor):
            return self.out_proj(self._join(output))
        parts = [self._linear(self.out_proj, self._join(part), bias=mode == 0) for mode, part in enumerate(output)]
        return expand(parts, main_effects(order), grid).to(x.dtype)

    @staticmethod
    def _linear(linear: nn.Linear, mean: Tensor, bias: bool = True) -> Tensor:
        """Apply a linear map to averages in their own type."""
        offset = linear.bias.to(mean.dtype) if bias and linear.bias is not None else None
        return nn.functional.linear(mean, linear.weight.to(mean.dtype), offset)

    def _split(self, tensor: Tensor) -> Tensor:
        """Split channels into heads: ``(B, *, C)`` to ``(B, H, *, D)``."""
        return tensor.unflatten(-1, (self.num_heads, -1)).movedim(-2, 1)

    @staticmethod
    def _join(tensor: Tensor) -> Tensor:
        """Join heads into channels: ``(B, H, *, D)`` to ``(B, *, C)``."""
        return tensor.movedim(1, -2).flatten(-2)


def _check_heads(embed_dim: int, num_heads: int) -> None:
    """Check that heads divide the channels."""
    if embed_dim < 1 or num_heads < 1:
        raise OptionError(f"embed_dim and num_heads must be at least 1, got {embed_dim} and {num_heads}.")
    if embed_dim % num_heads:
        raise OptionError(f"embed_dim must be divisible by num_heads, got {embed_dim} and {num_heads}.")
