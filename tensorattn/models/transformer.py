"""A transformer over tensors of any order: patches, positions, blocks, and patches put together again if wanted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tensorattn.averages.means import marginal_means
from tensorattn.errors import OptionError, check, retells
from tensorattn.masks import Part, read_weights, without_absent
from tensorattn.modes import GridShape, ModeSpec
from tensorattn.nn import LearnedPositions, PatchEmbedding, PatchUnembedding, SinCosPositions, TensorTransformerBlock
from tensorattn.nn.coordinates import Coordinates, Periodic, Spacing
from tensorattn.nn.layout import channels_last, check_input
from tensorattn.nn.parameters import draw_linear, parameter_of, reset_parts
from tensorattn.nn.patches import Patch, grid_of
from tensorattn.processes import meet
from tensorattn.sharding import Sharding, call_shared_out, in_common, is_shared_out

__all__ = ["TensorTransformer", "TensorTransformerConfig"]


@dataclass(frozen=True, kw_only=True)
class TensorTransformerConfig:
    """What a `TensorTransformer` is made of. `dataclasses.asdict` turns it into what JSON can hold.

    Attributes:
        modes: Modes of the input: their number, or their names as in ``"t h w"``.
        in_channels: Channels of the input.
        out_channels: Channels of an output on the grid of the input; None for one vector of ``embed_dim`` a patch.
        num_classes: Numbers of an output for the whole input: a linear map of the mean over the patches that are
            present, as often as weights say; None for one vector a patch.
        embed_dim: Channels of the blocks.
        depth: Number of blocks.
        num_heads: Number of heads; they divide ``embed_dim``.
        patch: Sizes of a patch: one number for every mode, one a mode, or a mapping from modes.
        pad: Whether sizes that a patch does not divide are padded. A circle should be divisible: padded, it is longer.
        positions: ``"sincos"``, ``"learned"``, or None for no embedding of positions.
        sizes: Sizes of the learned tables, in patches; other sizes are interpolated.
        periodic: Modes that are circles, or a mapping to their periods.
        spacing: Distance between patches, for ``"sincos"``.
        operator: Operator of the attention.
        mixer: What mixes patches in place of attention: ``"mean"``, ``"local"``, ``"pointwise"`` or ``"identity"``; or
            an operator of attention; None for ``operator``.
        options: Further options of `TensorAttention`, such as ``{"causal": "t", "dropout": 0.1}``.
        mlp_ratio: Hidden channels of the gated MLP over ``embed_dim``; None for no MLP.
        drop_path: Probability of dropping a branch in the last block; it grows from 0 in the first.
        layer_scale: First value of the factors of the branches, or None for no factors.
        bias: Whether the linear maps and norms have a bias.
        checkpoint: Whether the backward pass computes each block again instead of keeping what is inside.
        channels_first: Whether inputs and outputs have their channels before their modes.

    Raises:
        ModesError: If ``modes`` is missing.
        OptionError: If ``depth`` is below 1, there are no such positions, or an option has no meaning with others.

    Examples:
        >>> import tensorattn as ta
        >>> ta.TensorTransformerConfig(modes="h w", in_channels=3, patch=[8, 8]).patch
        (8, 8)
    """

    modes: int | str | tuple[str, ...] | None = None
    in_channels: int
    out_channels: int | None = None
    embed_dim: int = 96
    depth: int = 4
    num_heads: int = 4
    patch: Patch = field(default=1, hash=False)
    pad: bool = False
    positions: str | None = "sincos"
    sizes: tuple[int, ...] | None = None
    periodic: Periodic = field(default=(), hash=False)
    spacing: Spacing | None = field(default=None, hash=False)
    operator: str = "additive"
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    mlp_ratio: float | None = 8 / 3
    drop_path: float = 0.0
    layer_scale: float | None = None
    bias: bool = True
    checkpoint: bool = False
    channels_first: bool = False
    num_classes: int | None = None
    mixer: str | None = None

    @retells
    def __post_init__(self) -> None:
        """Turn the lists of JSON into tuples, and refuse fields that contradict each other."""
        for name, value in vars(self).items():
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        if self.modes is None:
            ModeSpec.parse(self.modes)  # which tells how modes look
        check(self.depth, "depth", "integer", least=1)
        if self.num_classes is not None:
            check(self.num_classes, "num_classes", "integer", least=1)
        if not isinstance(self.options, Mapping):
            raise OptionError(f"options must be a mapping from names, got {self.options!r}.")
        rule, told = "", {"device", "dtype", *vars(self)} & set(self.options)
        if self.positions not in ("sincos", "learned", None):
            rule = f"positions must be 'sincos', 'learned' or None, got {self.positions!r}."
        elif (self.sizes is not None) != (self.positions == "learned"):
            rule = f"sizes belongs to positions='learned', but positions is {self.positions!r} and sizes {self.sizes}."
        elif self.spacing is not None and self.positions != "sincos":
            rule = f"spacing belongs to positions='sincos', but positions is {self.positions!r}."
        elif self.periodic != () and self.positions is None:
            rule = "periodic has no meaning without positions."
        elif self.num_classes is not None and self.out_channels is not None:
            rule = (
                f"num_classes is for the whole input and out_channels for each position, so one of them must be None, "
                f"got {self.num_classes} and {self.out_channels}."
            )
        elif self.mixer is not None and self.operator != "additive":
            rule = f"operator has no meaning with mixer, got {self.operator!r} and {self.mixer!r}."
        elif told:
            rule = f"options holds {min(told)!r}, which the model is told beside them."
        if rule:
            raise OptionError(rule)


class TensorTransformer(nn.Module):
    r"""Encode a tensor of any order: patches, positions, blocks of attention and gated MLP, a last norm.

    With ``out_channels`` each vector is mapped back to its patch, so the output is on the grid of the input: a
    segmentation, a forecast. With ``num_classes`` the vectors are averaged and mapped, which knows weights, masks and
    lengths. Sizes may differ from call to call; only learned positions have sizes, and are stretched.

    Args:
        config: What it is made of.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Raises:
        OptionError: If an option is out of its range, or has no meaning for the operator.
        ModesError: If modes are named badly, or an option names a mode that does not exist.

    Shape:
        - input: :math:`(B, n_1, \dots, n_N, C)`, or :math:`(B, C, n_1, \dots, n_N)` with ``channels_first``
        - output: :math:`(B, g_1, \dots, g_N, E)` with :math:`g_m = \lceil n_m / p_m \rceil`, or with E first; with
          ``out_channels`` that of the input, with other channels; with ``num_classes`` :math:`(B, K)`

    Examples:
        >>> import torch, tensorattn as ta
        >>> config = ta.TensorTransformerConfig(
        ...     modes="time lat lon", in_channels=5, out_channels=5, patch=(1, 4, 4), embed_dim=32, depth=2,
        ...     periodic=("lon",), operator="additive", options={"interaction": "linear"}, drop_path=0.1,
        ... )
        >>> model = ta.TensorTransformer(config)
        >>> model(torch.randn(2, 6, 16, 32, 5)).shape, model(torch.randn(1, 3, 20, 40, 5)).shape
        (torch.Size([2, 6, 16, 32, 5]), torch.Size([1, 3, 20, 40, 5]))
        >>> ta.TensorTransformer(ta.TensorTransformerConfig(modes="t h w", in_channels=3, patch=(1, 8, 8)))
        TensorTransformer(modes='t h w', in_channels=3, patch=(1, 8, 8); 466,592 parameters)
    """

    __call__: Callable[..., Tensor]  # a module says Any

    @retells
    def __init__(
        self,
        config: TensorTransformerConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = c = config
        dim, self.channels_first = c.embed_dim, c.channels_first
        common: dict[str, Any] = {"modes": c.modes, "bias": c.bias, "device": device, "dtype": dtype}
        self.embedding = PatchEmbedding(
            c.in_channels, dim, c.patch, pad=c.pad, channels_first=c.channels_first, **common
        )
        self.modes = self.embedding.modes
        self.positions = _make_positions(c, device, dtype)
        mixing: dict[str, Any] = {"operator": c.operator} if c.mixer is None else {"mixer": c.mixer}
        self.blocks = nn.ModuleList(
            TensorTransformerBlock(
                dim,
                c.num_heads,
                mlp_ratio=c.mlp_ratio,
                drop_path=c.drop_path * place / max(1, c.depth - 1),
                layer_scale=c.layer_scale,
                checkpoint=c.checkpoint,
                **mixing,
                **common,
                **c.options,
            )
            for place in range(c.depth)
        )
        self.norm = nn.LayerNorm(dim, bias=c.bias, device=device, dtype=dtype)
        self.unembedding = None if c.out_channels is None else PatchUnembedding(dim, c.out_channels, c.patch, **common)
        self.head = None
        if c.num_classes is not None:
            self.head = nn.Linear(dim, c.num_classes, c.bias, device=device, dtype=dtype)
            draw_linear(self.head)

    @classmethod
    def from_config(
        cls,
        config: TensorTransformerConfig | Mapping[str, Any],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> TensorTransformer:
        """Make a model from a config, or from a mapping of its fields as it is saved beside the weights.

        Args:
            config: The config.
            device: Device of the parameters.
            dtype: Type of the parameters.

        Returns:
            The model, its weights drawn anew.

        Raises:
            OptionError: If the config has no such field, or lacks one that has no default.
        """
        if not isinstance(config, TensorTransformerConfig):
            names, rule = [entry.name for entry in dataclasses.fields(TensorTransformerConfig)], ""
            unknown, lacking = set(config) - set(names), {"modes", "in_channels"} - set(config)
            if unknown:
                rule = f"the config has no field {min(unknown)!r}; its fields are: {', '.join(names)}."
            elif lacking:
                rule = f"the config lacks the field {max(lacking)!r}."
            if rule:
                raise OptionError(rule).retold("TensorTransformer.from_config")
            config = TensorTransformerConfig(**config)
        return cls(config, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw all weights anew."""
        reset_parts(self)
        if self.head is not None:
            draw_linear(self.head)

    def __repr__(self) -> str:
        shown = [
            f"{entry.name}={value!r}"
            for entry in dataclasses.fields(self.config)
            if (value := getattr(self.config, entry.name)) != entry.default and value != {}
        ]
        count = sum(parameter.numel() for parameter in self.parameters())
        return f"{type(self).__name__}({', '.join(shown)}; {count:,} parameters)"

    @in_common
    def forward(self, x: Tensor, *, coordinates: Coordinates | None = None, **attention: Any) -> Tensor:
        """Encode.

        Args:
            x: Input, channels last or first as the config says.
            coordinates: Where patches lie: one vector a mode or None, or a mapping from modes, for the positions.
            **attention: What `TensorAttention` is told of the grid of patches, such as ``weights``, ``mask`` or
                ``lengths``.

        Returns:
            One vector a patch, or with ``out_channels`` a tensor on the grid of the input, or with ``num_classes`` one
            vector a sample, ``(B, num_classes)``. Where a mask or lengths
            leave a patch out, it is what the model makes of zeros, whatever the input holds there.

        Raises:
            ShapeError: If the input has the wrong number of dimensions or channels, an empty mode, or without ``pad``
                a size that its patch does not divide.
            DtypeError: If the input is not floating point, or not of the type of the parameters.
            OptionError: If coordinates are given to a model without positions, or are not finite.
        """
        if coordinates is not None and self.positions is None:
            raise OptionError("coordinates has no meaning without positions.").retold("TensorTransformer")
        first = self.channels_first
        if self.head is not None and (is_shared_out(x) or attention.get("sharding") is not None):
            raise OptionError(
                "sharding has no meaning with num_classes: a mean over all patches is not that of a part.",
                hint="Average the output of a model without num_classes over all processes.",
            ).retold("TensorTransformer")
        if is_shared_out(x):
            told = {**attention, **({} if coordinates is None else {"coordinates": coordinates})}
            return call_shared_out(
                self, x, told.pop("sharding", None), told, channels_first=first, shape=self._shape_of(x)
            )
        part, attention = self._shared_out(attention)
        x = self._without_absent_patches(x, attention, part)
        y = channels_last(self.embedding(x), first)
        parameter = parameter_of(self)
        y = y if parameter is None else y.to(parameter.dtype)  # autocast leaves the skip connections in full precision
        if self.positions is not None:
            y = self.positions(y, coordinates=coordinates, **({} if part is None else {"part": part}))
        meet(last=False)  # before blocks gather their parameters, where FSDP shares those out
        for block in self.blocks:
            y = block(y, **attention)
        y = self.norm(y)
        if self.head is not None:
            return self.head(self._pooled(y, attention))
        if self.unembedding is not None:
            y = self.unembedding(y, sizes=x.shape[2:] if first else x.shape[1:-1])
        return y.movedim(-1, 1) if first else y

    def _pooled(self, y: Tensor, attention: Mapping[str, Any]) -> Tensor:
        """Average the patches, each as often as it counts."""
        weights, mask, lengths = (attention.get(name) for name in ("weights", "mask", "lengths"))
        grid = GridShape(tuple(y.shape[:1]), tuple(y.shape[1:-1]), y.shape[-1])
        read = read_weights(weights, mask, lengths, grid, y, self.modes, of="the grid of patches")
        (mean,) = marginal_means(y, ((),), read)
        return mean.reshape(y.shape[0], y.shape[-1]).to(y.dtype)

    def _shape_of(self, x: Tensor) -> tuple[int, ...]:
        """Return the shape of the output for an input of all processes."""
        sizes, channels = tuple(x.shape[2:] if self.channels_first else x.shape[1:-1]), self.config.out_channels
        if channels is None:
            sizes, channels = grid_of(sizes, self.embedding.patch), self.config.embed_dim
        return (x.shape[0], channels, *sizes) if self.channels_first else (x.shape[0], *sizes, channels)

    @retells
    def _shared_out(self, attention: dict[str, Any]) -> tuple[Part | None, dict[str, Any]]:
        """Return where the patches of this process stand, and what attention is told of how they are shared out."""
        if attention.get("sharding") is None:
            return None, attention
        if not isinstance(attention["sharding"], Sharding):
            raise OptionError(f"sharding must be a Sharding, got {type(attention['sharding']).__name__}.")
        sharding = attention["sharding"].patched(self.modes, self.embedding.patch, self.config.pad)
        return sharding.part(self.modes), {**attention, "sharding": sharding}

    @retells
    def _without_absent_patches(self, x: Tensor, attention: Mapping[str, Any], part: Part | None) -> Tensor:
        """Return the input with zeros in the patches that a mask or lengths leave out."""
        spoken = {name: attention[name] for name in ("mask", "lengths") if attention.get(name) is not None}
        if not spoken:
            return x
        patch, first = self.embedding.patch, self.channels_first
        grid = check_input(x, self.modes, self.config.in_channels, channels_first=first, called="in_channels")
        last = channels_last(x, first)
        patches = GridShape(grid.batch, grid_of(grid.sizes, patch), grid.dim)
        told = (None, spoken.get("mask"), spoken.get("lengths"), patches, last, self.modes)
        present = read_weights(*told, of="the grid of patches", part=part).present
        if present is None:  # lengths may be None for every mode
            return x
        for mode, (size, side) in enumerate(zip(grid.sizes, patch, strict=True)):
            dim = present.dim() - self.modes.order + mode
            if present.shape[dim] != 1 or patches.sizes[mode] == 1:
                present = present.repeat_interleave(side, dim).narrow(dim, 0, size)
        last = without_absent(last, present)
        return last.movedim(-1, 1) if first else last


def _make_positions(
    c: TensorTransformerConfig, device: torch.device | str | None, dtype: torch.dtype | None
) -> SinCosPositions | LearnedPositions | None:
    """Make the embedding of positions."""
    if c.positions == "sincos":
        return SinCosPositions(c.embed_dim, modes=c.modes, periodic=c.periodic, spacing=c.spacing)
    if c.sizes is not None:
        return LearnedPositions(c.embed_dim, c.sizes, modes=c.modes, periodic=c.periodic, device=device, dtype=dtype)
    return None
