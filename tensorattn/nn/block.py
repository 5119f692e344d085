"""A transformer block around attention of any operator: norms, gated MLP, skip connections, drop-path."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from tensorattn.errors import OptionError, check, retells
from tensorattn.masks import read_weights, without_absent
from tensorattn.modes import ModeSpec
from tensorattn.nn.attention import TensorAttention
from tensorattn.nn.checks import check_sharding
from tensorattn.nn.layout import channels_last, check_input, check_parameters
from tensorattn.nn.mixers import make_mixer
from tensorattn.nn.parameters import draw_linear, parameter_of, reset_parts
from tensorattn.nn.prefix import check_prefix
from tensorattn.sharding import call_shared_out, in_common, is_shared_out

__all__ = ["DropPath", "GatedMLP", "TensorTransformerBlock"]


class DropPath(nn.Module):
    """Drop whole samples of a branch in training: stochastic depth. What stays is scaled to keep the mean.

    Args:
        p: Probability of dropping a sample.

    Raises:
        OptionError: If it is not a probability.

    Shape:
        - input and output: :math:`(B, *)`

    Examples:
        >>> import torch, tensorattn as ta
        >>> x = torch.ones(1000, 2, 3)
        >>> dropped = ta.DropPath(0.2)(x)
        >>> sorted({round(float(sample.mean()), 4) for sample in dropped}), torch.equal(ta.DropPath(0.2).eval()(x), x)
        ([0.0, 1.25], True)

    References:
        Huang, Sun, Liu, Sedra and Weinberger, "Deep Networks with Stochastic Depth", ECCV 2016, arXiv 1603.09382.
    """

    __call__: Callable[..., Tensor]  # a module says Any

    @retells
    def __init__(self, p: float) -> None:
        super().__init__()
        check(p, "p", "probability")
        self.p = p

    def extra_repr(self) -> str:
        """Describe the probability."""
        return f"p={self.p}"

    def forward(self, x: Tensor) -> Tensor:
        """Drop samples.

        Args:
            x: Output of a branch; its first dimension is the batch.

        Returns:
            The same with samples set to zero in training, the others divided by ``1 - p``.
        """
        if self.p == 0 or not self.training:
            return x
        kept = torch.rand(x.shape[0], *(1,) * (x.dim() - 1), device=x.device) >= self.p
        return torch.where(kept, x * (1 / (1 - self.p) if self.p < 1 else 0.0), 0)


class GatedMLP(nn.Module):
    r"""Map each position by itself: :math:`W_3 (\mathrm{silu}(W_1 x) \odot W_2 x)`, known as SwiGLU.

    Args:
        embed_dim: Channels C of input and output.
        hidden_dim: Channels between. Two thirds of those of an ordinary MLP have as many weights as it.
        bias: Whether the linear maps have a bias.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Raises:
        OptionError: If there are no channels.

    Shape:
        - input and output: :math:`(*, C)`

    Examples:
        >>> import torch, tensorattn as ta
        >>> ta.GatedMLP(96, 256)(torch.randn(2, 5, 7, 96)).shape
        torch.Size([2, 5, 7, 96])

    References:
        Shazeer, "GLU Variants Improve Transformer", 2020, arXiv 2002.05202.
    """

    __call__: Callable[..., Tensor]  # a module says Any

    @retells
    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check(embed_dim, "embed_dim", "integer")
        check(hidden_dim, "hidden_dim", "integer")
        if embed_dim < 1 or hidden_dim < 1:
            raise OptionError(f"embed_dim and hidden_dim must be at least 1, got {embed_dim} and {hidden_dim}.")
        self.in_proj = nn.Linear(embed_dim, 2 * hidden_dim, bias, device=device, dtype=dtype)
        self.out_proj = nn.Linear(hidden_dim, embed_dim, bias, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew, Xavier uniform, and set biases to zero."""
        draw_linear(self.in_proj, maps=2)
        draw_linear(self.out_proj)

    def forward(self, x: Tensor) -> Tensor:
        """Map each position.

        Args:
            x: Input ``(*, C)``.

        Returns:
            The output, of the shape of the input.
        """
        gate, value = self.in_proj(x).chunk(2, -1)
        return self.out_proj(F.silu(gate) * value)


class TensorTransformerBlock(nn.Module):
    r"""Attend over a tensor of any order, then map each position, each with a norm before and a skip around it.

    .. math:: x \leftarrow x + \gamma_1 \odot \mathrm{attention}(\mathrm{norm}(x)), \qquad
        x \leftarrow x + \gamma_2 \odot \mathrm{mlp}(\mathrm{norm}(x))

    The norms are over channels, position by position. They stand between the input and the keys, so exactness on
    additive tensors, which attention itself has, is not a property of the block.

    Args:
        embed_dim: Channels C of input and output.
        num_heads: Number of heads; they divide the channels.
        modes: Modes of the input: their number, or their names as in ``"t h w"``.
        mixer: What mixes positions: an operator of attention, ``"mean"`` of all positions, ``"local"`` filters,
            ``"pointwise"`` for no mixing with about as many weights, or ``"identity"`` for none; `TensorAttention` with
            its own default if None.
        mlp_ratio: Hidden channels of the gated MLP over ``embed_dim``, rounded. 8/3 has as many weights as an ordinary
            MLP with 4. None for a block without MLP.
        drop_path: Probability of dropping each of the two branches of a sample in training.
        layer_scale: First value of the factors :math:`\gamma` of the branches, one a channel; None for no factors.
        checkpoint: Whether the backward pass computes the block again instead of keeping what is inside.
        channels_first: Whether inputs are ``(B, C, n_1, …, n_N)`` instead of ``(B, n_1, …, n_N, C)``.
        bias: Whether the linear maps have a bias.
        device: Device of the parameters.
        dtype: Type of the parameters.
        **attention: Options of `TensorAttention`, such as ``operator="truncated"``, ``causal="t"`` or ``dropout=0.1``.

    Raises:
        OptionError: If an option is out of its range, or has no meaning for the operator.
        ModesError: If modes are missing or named badly, or an option names a mode that does not exist.

    Shape:
        - input and output: :math:`(B, n_1, \dots, n_N, C)`, or :math:`(B, C, n_1, \dots, n_N)` with
          ``channels_first``

    Examples:
        >>> import torch, tensorattn as ta
        >>> block = ta.TensorTransformerBlock(96, 4, modes="t h w", causal="t", drop_path=0.1)
        >>> block(torch.randn(2, 4, 14, 14, 96), weights=[None, None, torch.arange(14) < 10]).shape
        torch.Size([2, 4, 14, 14, 96])
    """

    __call__: Callable[..., Tensor]  # a module says Any

    @retells
    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        modes: int | str | Sequence[str] | None = None,
        mixer: str | None = None,
        mlp_ratio: float | None = 8 / 3,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        checkpoint: bool = False,
        channels_first: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **attention: Any,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        if mlp_ratio is not None:
            check(mlp_ratio, "mlp_ratio", "number", rule="a number or None")
            if not math.isfinite(mlp_ratio):
                raise OptionError(f"mlp_ratio must be finite, got {mlp_ratio}.")
        if layer_scale is not None:
            check(layer_scale, "layer_scale", "number", rule="a number or None")
        check(drop_path, "drop_path", "probability")
        check(checkpoint, "checkpoint", "switch")
        check(channels_first, "channels_first", "switch")
        if mixer is not None and "operator" in attention:
            raise OptionError("operator has no meaning with mixer, which names it.")
        make = TensorAttention if mixer is None else functools.partial(make_mixer, mixer)
        # What is inside is computed again by the block as a whole, so the layer does not do it by itself once more.
        self.attention = make(embed_dim, num_heads, modes=modes, bias=bias, **factory, **attention)
        hidden_dim = None if mlp_ratio is None else round(mlp_ratio * embed_dim)
        if hidden_dim is not None and hidden_dim < 1:
            raise OptionError(f"mlp_ratio leaves no hidden channels, got {mlp_ratio} with embed_dim {embed_dim}.")
        self.modes, self.embed_dim, self.mlp_ratio = ModeSpec.parse(modes), embed_dim, mlp_ratio
        self.layer_scale, self.checkpoint, self.channels_first = layer_scale, checkpoint, channels_first
        self.attention_norm = nn.LayerNorm(embed_dim, bias=bias, **factory)
        has_mlp = hidden_dim is not None
        self.mlp_norm = nn.LayerNorm(embed_dim, bias=bias, **factory) if has_mlp else None
        self.mlp = None if hidden_dim is None else GatedMLP(embed_dim, hidden_dim, bias=bias, **factory)
        self.drop_path = DropPath(drop_path)
        scaled = layer_scale is not None
        self.attention_scale = nn.Parameter(torch.empty(embed_dim, **factory)) if scaled else None
        self.mlp_scale = nn.Parameter(torch.empty(embed_dim, **factory)) if scaled and has_mlp else None
        self._reset_scales()

    def reset_parameters(self) -> None:
        """Draw all weights anew, and set norms and factors to their first values."""
        reset_parts(self)
        self._reset_scales()

    def _reset_scales(self) -> None:
        """Set the factors to their first value."""
        for scale in (self.attention_scale, self.mlp_scale):
            if scale is not None and self.layer_scale is not None:
                nn.init.constant_(scale, self.layer_scale)

    def extra_repr(self) -> str:
        """Describe the settings that its parts do not show."""
        parts = [f"layer_scale={self.layer_scale}"] * (self.layer_scale is not None)
        parts += ["checkpoint=True"] * self.checkpoint + ["channels_first=True"] * self.channels_first
        return ", ".join(parts)

    @in_common
    def forward(self, x: Tensor, *, prefix: Tensor | None = None, **attention: Any) -> Tensor | tuple[Tensor, Tensor]:
        """Attend, then map each position.

        Args:
            x: Input, channels last or first as the module was told.
            prefix: Class and register tokens beside the input ``(B, R, C)``, as `TensorAttention` takes them; norms,
                skips and the map of each position are theirs too.
            **attention: What `TensorAttention` is told of the input, such as ``weights``, ``mask`` or ``lengths``; or
                with a ``context``, of that.

        Returns:
            The output, of the shape of the input; with ``prefix`` that of the tokens too. Where a mask or lengths leave
            a position of the input out, it is what the block makes of zeros, whatever the input holds there.

        Raises:
            ShapeError: If the input has the wrong number of dimensions or channels, or an empty mode, or the mask or
                lengths do not fit.
            DtypeError: If the input is not floating point, or not of the type of the parameters, the mask is not bool,
                or lengths are not integers.
            WeightsError: If weights have the wrong length, are negative, not finite, or all zero, or a length is
                negative or longer than its mode.
            OptionError: If one of them has no meaning for the operator.
        """
        if is_shared_out(x):
            told = {**attention, **({} if prefix is None else {"prefix": prefix})}
            return call_shared_out(self, x, told.pop("sharding", None), told, channels_first=self.channels_first)
        last = self._checked(x, prefix, attention)
        if self.checkpoint and torch.is_grad_enabled():
            y, *tokens = recompute(self._run, last, prefix, attention, use_reentrant=False)
        else:
            y, *tokens = self._run(last, prefix, attention)
        y = y.movedim(-1, 1) if self.channels_first else y
        return (y, tokens[0]) if tokens else y

    @retells
    def _checked(self, x: Tensor, prefix: Tensor | None, attention: Mapping[str, Any]) -> Tensor:
        """Check the input, and return it with its channels last and zeros where positions are absent."""
        sharding, part = attention.get("sharding"), None
        if sharding is not None:
            part = check_sharding(self.attention, sharding, context=attention.get("context"), prefix=prefix)
            if self.training and self.drop_path.p > 0:
                told = "each process would drop samples of its own"
                raise OptionError(f"sharding has no meaning with drop_path in training: {told}.")
        grid = check_input(x, self.modes, self.embed_dim, channels_first=self.channels_first, part=part)
        check_parameters(x, parameter_of(self))
        if prefix is not None:
            check_prefix(prefix, x, self.embed_dim)
        last = channels_last(x, self.channels_first)
        if attention.get("context") is not None:
            return last
        spoken: dict[str, Any] = {name: attention.get(name) for name in ("mask", "lengths")}
        spoken.update(of="x", part=part)
        present = read_weights(None, grid=grid, like=last, modes=self.modes, **spoken).present
        return without_absent(last, present)

    def _run(self, x: Tensor, prefix: Tensor | None, attention: dict[str, Any]) -> tuple[Tensor, ...]:
        """Add both branches, channels last, to the input and to tokens beside it."""
        if prefix is None:
            parts: tuple[Tensor, ...] = (x,)
            attended: tuple[Tensor, ...] = (self.attention(self.attention_norm(x), **attention),)
        else:
            parts = (x, prefix)
            attended = tuple(self.attention(self.attention_norm(x), prefix=self.attention_norm(prefix), **attention))
        parts = self._added(parts, attended, self.attention_scale)
        if self.mlp is None or self.mlp_norm is None:
            return parts
        return self._added(parts, [self.mlp(self.mlp_norm(part)) for part in parts], self.mlp_scale)

    def _added(self, parts: Sequence[Tensor], branch: Sequence[Tensor], scale: Tensor | None) -> tuple[Tensor, ...]:
        """Scale and drop the output of a branch, of a sample all or nothing, and add it."""
        branch = [y if scale is None else y * scale for y in branch]
        if len(branch) == 1:
            return (parts[0] + self.drop_path(branch[0]),)
        rows = self.drop_path(torch.cat([y.flatten(1, -2) for y in branch], 1))
        dropped = rows.split_with_sizes([math.prod(y.shape[1:-1]) for y in branch], 1)
        return tuple([x + y.reshape(x.shape) for x, y in zip(parts, dropped, strict=True)])
