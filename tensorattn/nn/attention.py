"""One module for every operator: project, attend, project back."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from tensorattn.averages.means import check_same_shape
from tensorattn.averages.plan import memory_order
from tensorattn.errors import OptionError, ShapeError, check, check_scale, retells
from tensorattn.functional.causal import Past, causal_summary, frames_beside, frames_first, frames_last
from tensorattn.functional.cells import Cells, draw_queries, find_cells
from tensorattn.functional.flattened import FLATTENED
from tensorattn.functional.maps import base_of, indices_of, place_on
from tensorattn.functional.operator import (
    AttentionResult,
    Bias,
    Operator,
    attend_beside,
    attend_condensed,
    check_indices,
    default_scale,
    get_operator,
    spread_parts,
)
from tensorattn.functional.softmax import CHUNK, in_chunks
from tensorattn.functional.summary import Needs, Summary, make_summary
from tensorattn.masks import (
    GivenWeights,
    Lengths,
    Mask,
    Weights,
    accumulation_dtype,
    beside,
    is_recorded,
    read_weights,
    without_absent,
)
from tensorattn.modes import ModeSpec, mode_subsets
from tensorattn.nn.bias import PositionBias
from tensorattn.nn.context import Context, ContextReader, check_crossing
from tensorattn.nn.layout import channels_last, check_input, check_parameters
from tensorattn.nn.parameters import draw_linear, parameter_of, reset_parts
from tensorattn.nn.prefix import Prefix, check_prefix, check_prefix_meaning
from tensorattn.nn.rotary import RotaryEmbedding
from tensorattn.nn.sources import Sources, join_heads, normed, split_heads, unchanged
from tensorattn.nn.weights import settings_of, unpack

__all__ = ["TensorAttention"]


class TensorAttention(nn.Module):
    r"""Multi-head attention over a tensor of any order, without flattening it: to itself, or to a context.

    Queries, keys and values are linear maps of the input. As averages of a linear map are the linear map of the
    averages, the module averages its input once and calls its projections with the averages: S = n_1 + … + n_N rows
    instead of P = n_1 ⋯ n_N, wherever the operator works on averages. The four projections are modules that are called,
    so adapters, hooks and quantisation act on them; of one that is no affine map (dropout inside an adapter, dynamic
    quantisation) the output is that of the averages. The layer keeps nothing that depends on the sizes of the modes, so
    one takes inputs of any size.

    State dicts of `torch.nn.MultiheadAttention` and of the attention of timm and MONAI are read as they are.

    Given a context, which may be on another grid and of another order, keys and values are made of that: once for each
    context, by `summarize`. Operators whose queries may stand anywhere take one.

    Args:
        embed_dim: Channels C of input and output.
        num_heads: Number of heads H; they divide the channels unless ``head_dim`` is given.
        modes: Modes of the input: their number, or their names as in ``"t h w"``.
        operator: Name of the operator in `OPERATORS`.
        channels_first: Whether inputs are ``(B, C, n_1, …, n_N)`` instead of ``(B, n_1, …, n_N, C)``.
        bias: Whether the four linear maps have a bias.
        qkv_bias: Whether those to queries, keys and values have one; as ``bias`` if None.
        out_bias: Whether that of the output has one; as ``bias`` if None.
        head_dim: Head size D; C/H if None.
        num_kv_heads: Number of heads of keys and values, each of which serves a group of H over as many heads of
            queries; H if None. Cells of ``clustered`` are those of a key head, found for its whole group.
        scale: Factor of the logits; 1/√D if None.
        dropout: Probability of dropping an attention weight in training.
        proj_drop: Probability of dropping an element of the output in training.
        kdim: Channels of a context that keys are made of; C if None.
        vdim: Channels of a context that values are made of; C if None.
        causal: A mode, by name or index, whose frames see their past and themselves only; None for none.
        position_bias: A bias of the logits by position, one matrix a mode: a `RelativePositionBias`, `AlibiBias` or
            `AxisWindow`, or your own `PositionBias`.
        rotary: A `RotaryEmbedding` that turns queries and keys by their places; for full, clustered and axial
            attention, and for the Kronecker operators, which turn pooled queries and keys by their mode. Where there is
            a norm too, it comes first.
        mode_projections: Whether queries and keys have a linear map of their own for each mode; for the Kronecker
            operators.
        qk_norm: Whether queries and keys of each head go through a LayerNorm each; or what makes a norm of the head
            size, such as ``nn.RMSNorm``. An operator that averages queries or keys norms the averages.
        project: ``"averages"`` to project averages where the operator works on them, ``"positions"`` to project all
            positions and average afterwards, which is another thing only where a projection is no affine map.
        checkpoint: Whether the backward pass attends again instead of keeping what is between input and output.
        device: Device of the parameters.
        dtype: Type of the parameters.
        **options: Options of the operator, such as ``centered=True`` for ``"kao_qkv"``, or
            ``kept=[("t",), ("h", "w")]`` for ``"truncated"``. With ``interaction="linear"`` the correction has a
            learnable factor a head, which starts at one.

    Raises:
        OptionError: If ``num_heads`` does not divide ``embed_dim``, ``dropout`` is not a probability, there is no
            such operator or option, or an argument has no meaning for the operator.
        ModesError: If modes are missing or named badly, or an option names a mode that does not exist.

    Shape:
        - input and output: :math:`(B, n_1, \dots, n_N, C)`, or :math:`(B, C, n_1, \dots, n_N)` with
          ``channels_first``
        - context: :math:`(B, m_1, \dots, m_M, C)` with any order M, or :math:`(B, C, m_1, \dots, m_M)`

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

    __call__: Callable[..., Tensor]  # a module says Any

    @retells
    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        modes: int | str | Sequence[str] | None = None,
        operator: str = "additive",
        channels_first: bool = False,
        bias: bool = True,
        qkv_bias: bool | None = None,
        out_bias: bool | None = None,
        head_dim: int | None = None,
        num_kv_heads: int | None = None,
        scale: float | None = None,
        dropout: float = 0.0,
        proj_drop: float = 0.0,
        kdim: int | None = None,
        vdim: int | None = None,
        causal: int | str | None = None,
        position_bias: PositionBias | None = None,
        rotary: RotaryEmbedding | None = None,
        mode_projections: bool = False,
        qk_norm: bool | Callable[..., nn.Module] = False,
        project: str = "averages",
        checkpoint: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.modes = ModeSpec.parse(modes)
        record = get_operator(operator)
        switches = {"channels_first": channels_first, "bias": bias, "checkpoint": checkpoint}
        for name, value in {**switches, "mode_projections": mode_projections}.items():
            check(value, name, "switch")
        for name, switch in (("qkv_bias", qkv_bias), ("out_bias", out_bias)):
            if switch is not None:
                check(switch, name, "switch")
        if not callable(qk_norm):
            check(qk_norm, "qk_norm", "switch")
        check_scale(scale)
        if project not in ("averages", "positions"):
            raise OptionError(f"project must be 'averages' or 'positions', got {project!r}.")
        self.causal = None if causal is None else self.modes.index(causal)
        if options.get("kept") is not None:
            subsets = mode_subsets(options["kept"])
            options["kept"] = tuple(tuple(self.modes.index(mode) for mode in kept) for kept in subsets)
        self.head_dim, self.num_kv_heads = _check_heads(embed_dim, num_heads, head_dim, num_kv_heads)
        self.embed_dim, self.num_heads, self.operator = int(embed_dim), int(num_heads), operator
        self.scale = None if scale is None else float(scale)
        cells = options.get("cells")
        self._options = record.with_defaults({**options, "cells": "keys"} if isinstance(cells, Cells) else options)
        if isinstance(cells, Cells):
            self.hold_cells(cells)
        record.needs(self.modes.order, **self.options)  # refuses values out of range
        check(dropout, "dropout", "probability")
        check(proj_drop, "proj_drop", "probability")
        if mode_projections and project == "positions":
            raise OptionError(
                "mode_projections has no meaning with project='positions': it maps the averages of a mode."
            )
        if mode_projections and not record.pools:
            raise OptionError(
                f"mode_projections has no meaning for operator {operator!r}: it does not pool its queries."
            )
        for name, reason in (("interaction", "covariances"), ("additive_control", "averages")):
            if qk_norm and self.options.get(name):
                told = f"{name}={self.options[name]!r}: {reason} of normed keys are not those of linear maps"
                raise OptionError(f"qk_norm has no meaning with {told}.")
        lacking = record.lacking(self.options)
        for name, given in (("causal", self.causal is not None), ("dropout_p", dropout > 0)):
            if given and name in lacking:
                name, reason = name.removesuffix("_p"), lacking[name]
                raise OptionError(f"{name} has no meaning for operator {operator!r}: {reason}.")
        if position_bias is not None:
            _check_position_bias(position_bias, record, self.options, self.modes, num_heads)
        if rotary is not None:
            _check_rotary(rotary, record, self.options, self.modes, self.head_dim)
        for name, dim in (("kdim", kdim), ("vdim", vdim)):
            if dim is not None:
                check(dim, name, "integer")
                check_crossing(record, self.options, self.causal, name)
                if dim < 1:
                    raise OptionError(f"{name} must be at least 1, got {dim}.")
        embed_dim, num_heads = self.embed_dim, self.num_heads
        self.channels_first, self.dropout, self.mode_projections = channels_first, dropout, mode_projections
        self.proj_drop = proj_drop
        self.kdim, self.vdim = (embed_dim if dim is None else int(dim) for dim in (kdim, vdim))
        maps = self.modes.order if mode_projections else 1
        width, kv_width = num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        of_qkv, of_output = (bias if given is None else given for given in (qkv_bias, out_bias))
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(embed_dim, width * maps, of_qkv, **factory)
        self.k_proj = nn.Linear(self.kdim, kv_width * maps, of_qkv, **factory)
        self.v_proj = nn.Linear(self.vdim, kv_width, of_qkv, **factory)
        self.out_proj = nn.Linear(width, embed_dim, of_output, **factory)
        make_norm = nn.LayerNorm if qk_norm is True else qk_norm
        self.q_norm = make_norm(self.head_dim, **factory) if make_norm else None
        self.k_norm = make_norm(self.head_dim, **factory) if make_norm else None
        gain = torch.ones(num_heads, **factory) if self.options.get("interaction") else None
        self.interaction_gain = None if gain is None else nn.Parameter(gain)
        self.position_bias, self.rotary = position_bias, rotary
        self.project, self.checkpoint = project, checkpoint
        self.register_load_state_dict_pre_hook(unpack)
        self._draw()

    @classmethod
    @retells
    def from_module(
        cls,
        module: nn.Module,
        *,
        modes: int | str | Sequence[str] | None = None,
        operator: str = "additive",
        **options: Any,
    ) -> TensorAttention:
        """Make a layer of an attention module of another library: a copy of its weights, with its settings.

        With ``operator="flattened"`` the layer gives what the module gives for the positions one behind the other. What
        it cannot keep (``add_bias_kv``, relative positions, gates, a causal order of positions) is refused by name.

        Args:
            module: A `torch.nn.MultiheadAttention`, or one like the ``Attention`` of timm or the ``SABlock`` of MONAI:
                with ``num_heads``, linear maps ``qkv`` (or ``to_q``, ``to_k`` and ``to_v``, or ``q_proj``, ``k_proj``
                and ``v_proj``) and ``proj`` or ``out_proj``.
            modes: Modes of the grid.
            operator: Name of the operator.
            **options: Further arguments of the layer; they take the place of what the module says, as ``dropout=0.0``.

        Raises:
            OptionError: If it is no such module or has what the layer has not, or an option is refused.
            ModesError: If modes are missing or named badly.

        Examples:
            >>> import torch, tensorattn as ta
            >>> host = torch.nn.MultiheadAttention(16, 4, batch_first=True)
            >>> layer = ta.TensorAttention.from_module(host, modes="h w", operator="flattened")
            >>> x = torch.randn(2, 3, 5, 16)
            >>> rows = x.flatten(1, 2)
            >>> torch.allclose(layer(x).flatten(1, 2), host(rows, rows, rows)[0], atol=1e-6)
            True
        """
        layer = cls(modes=modes, operator=operator, **{**settings_of(module), **options})
        layer.load_state_dict({**layer.state_dict(), **module.state_dict()})
        return layer.train(module.training)

    @property
    def options(self) -> dict[str, Any]:
        """All options of the operator."""
        if "cell_centres" not in self._buffers:
            return self._options
        return {**self._options, "cells": Cells(self.get_buffer("cell_centres"), self.get_buffer("cell_metric"))}

    def reset_parameters(self) -> None:
        """Draw the weights anew, Xavier uniform, those of a position bias too; set biases to zero and gains to one."""
        reset_parts(self)
        self._draw()

    def _draw(self) -> None:
        """Draw what is its own."""
        maps = self.modes.order if self.mode_projections else 1
        for linear, count in ((self.q_proj, maps), (self.k_proj, maps), (self.v_proj, 1), (self.out_proj, 1)):
            draw_linear(linear, count)
        if self.interaction_gain is not None:
            nn.init.ones_(self.interaction_gain)

    def extra_repr(self) -> str:
        """Describe the settings that are not the default ones of every layer."""
        modes = repr(str(self.modes)) if self.modes.named else self.modes.order
        parts = [f"embed_dim={self.embed_dim}", f"num_heads={self.num_heads}", f"modes={modes}"]
        parts.append(f"operator={self.operator!r}")
        defaults = get_operator(self.operator).options
        told = {name: value for name, value in self.options.items() if value != defaults[name]}
        if "kept" in told and self.modes.named:
            told["kept"] = tuple(tuple(self.modes.names[mode] for mode in kept) for kept in told["kept"])
        parts.extend(f"{name}={value!r}" for name, value in told.items())
        if self.channels_first:
            parts.append("channels_first=True")
        sizes = {"head_dim": self.embed_dim // self.num_heads, "num_kv_heads": self.num_heads, "scale": None}
        usual = {**sizes, "dropout": 0, "proj_drop": 0}
        parts += [f"{name}={value}" for name, common in usual.items() if (value := getattr(self, name)) != common]
        parts += [f"{name}={dim}" for name in ("kdim", "vdim") if (dim := getattr(self, name)) != self.embed_dim]
        if self.causal is not None:
            parts.append(f"causal={self.modes.names[self.causal]!r}")
        if self.mode_projections:
            parts.append("mode_projections=True")
        parts += ["project='positions'"] * (self.project != "averages") + ["checkpoint=True"] * self.checkpoint
        return ", ".join(parts)

    @retells
    def forward(
        self,
        x: Tensor,
        context: Context | None = None,
        *,
        weights: GivenWeights = None,
        mask: Mask = None,
        lengths: Lengths | Mapping[Any, Any] = None,
        skip: Tensor | None = None,
        prefix: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend: from each position of the input to the input itself, or to a context.

        Without a context, weights, mask and lengths speak of the input: where a mask or lengths leave a position out,
        it may hold anything, and the output is zero before ``skip`` is added. With a context they speak of the context,
        and a sample without any position gives what the output map makes of zero: its bias.

        Tokens of no place, such as class and register tokens, go beside the input as ``prefix``. They attend and are
        attended to, and count once each where each position does; weights, masks, lengths, biases and turns speak of
        the grid alone. What the operators make of them:

        - ``flattened``: full attention over tokens and positions together. ``kao_kv``: they join its one softmax with
          the logarithm of S/P, as its S averages stand for P positions.
        - ``additive`` and ``truncated`` are joined with full attention to the tokens by their log-sum-exp, which for
          ``additive`` is exact where keys are additive; ``clustered`` likewise, whose log-sum-exp is an approximation
          as its output is. With ``include_self`` tokens have no average of their own.
        - ``axial``, ``kao_qkv``, ``kronecker_product`` and ``kronecker_sum``, whose queries stand on the grid: the
          tokens see themselves and all positions by full attention, for which all of these are projected; the grid
          sees the grid, and not the tokens.

        Args:
            x: Input, channels last or first as the module was told.
            context: What keys and values are made of, in the same layout, on another grid or even of another order; or
                a pair of tensors, for keys and for values; or what `summarize` returned. The input itself if None.
            weights: One non-negative vector a mode, ``(n_m,)`` or ``(B, n_m)``, or None for equal weights, or one
                tensor over the grid ``(B, n_1, …, n_N)``: multiplicities, so 2 counts an index or a position twice and
                0 leaves it out.
            mask: True where a position takes part, ``(n_1, …, n_N)`` or ``(B, n_1, …, n_N)`` in either layout. A mask
                that is a product over modes gives what each sample gives when it is cropped. Another one is an
                approximation for operators that work on averages, as their functions tell.
            lengths: How many leading indices of each mode take part: integers ``(B, N)``, or one entry a mode, None
                for all, or a mapping from modes as in ``{"t": torch.tensor([5, 7])}``.
            skip: A tensor of the shape of the input that is added to the output, as for a skip connection; ``x`` itself
                or another one.
            prefix: Tokens beside the input ``(B, R, C)``, in either layout.

        Returns:
            The output, of the shape of the input; with ``prefix`` that of the tokens too, ``(B, R, C)``.

        Raises:
            ShapeError: If a tensor has the wrong number of dimensions or channels, or an empty mode, if ``skip`` has
                another shape than the input, or the mask or lengths do not fit.
            DtypeError: If a tensor is not floating point, the types differ, the mask is not bool, or lengths are not
                integers.
            WeightsError: If weights have the wrong length, are negative, not finite, or all zero, or a length is
                negative or longer than its mode.
            OptionError: If an argument has no meaning for the operator or with another one.

        Examples:
            >>> import torch, tensorattn as ta
            >>> layer, image = ta.TensorAttention(8, 2, modes="h w"), torch.randn(2, 5, 6, 8)
            >>> mask = torch.ones(2, 5, 6, dtype=torch.bool)
            >>> mask[0, 3:] = False
            >>> padded, cropped = layer(image, mask=mask)[:1, :3], layer(image[:1, :3])
            >>> torch.allclose(padded, cropped, atol=1e-6)
            True
            >>> summary = layer.summarize(torch.randn(2, 3, 4, 4, 8), lengths=[3, 4, [2, 4]])
            >>> layer(image, summary).shape
            torch.Size([2, 5, 6, 8])
            >>> y, class_token = layer(image, prefix=torch.randn(2, 1, 8))
            >>> y.shape, class_token.shape
            (torch.Size([2, 5, 6, 8]), torch.Size([2, 1, 8]))
        """
        weights_of_x, summary = self._read(x, context, weights=weights, mask=mask, lengths=lengths)
        last, present = channels_last(x, self.channels_first), weights_of_x.present
        if prefix is not None:
            check_prefix_meaning(context=context, causal=self.causal, mode_projections=self.mode_projections)
            check_prefix(prefix, x, self.embed_dim)
        if skip is not None:
            check_same_shape("skip", skip, x.shape, x)
        if present is not None:  # what an absent position holds must not meet a zero, not even that of a gradient
            last = without_absent(last, present)
        result, beside = self._attend(last, weights_of_x, summary, prefix)
        y = self.finished(result.output, present, skip)
        if beside is None:
            return y
        return y, F.dropout(beside, self.proj_drop, self.training) if self.proj_drop > 0 else beside

    @retells
    def summarize(
        self,
        context: Tensor | tuple[Tensor, Tensor],
        *,
        weights: GivenWeights = None,
        mask: Mask = None,
        lengths: Lengths | Mapping[Any, Any] = None,
    ) -> Summary:
        """Summarise a context once, to attend to it often.

        It is the summary of the context itself, before the linear maps: it stays right while they are trained, and
        serves every layer of the same operator, options and channels.

        Args:
            context: What keys and values are made of, as in `forward`.
            weights: Weights of the context, as in `forward`.
            mask: Mask of the context.
            lengths: Lengths of the context.

        Returns:
            What `forward` takes as its context.

        Raises:
            ShapeError: If a tensor has the wrong number of dimensions or channels, or an empty mode, or the mask or
                lengths do not fit.
            DtypeError: If a tensor is not floating point, the types differ, the mask is not bool, or lengths are not
                integers.
            WeightsError: If weights are refused, or a length is negative or longer than its mode.
            OptionError: If the operator takes no context, or an argument has no meaning for it.

        Examples:
            >>> import torch, tensorattn as ta
            >>> layer, volume = ta.TensorAttention(8, 2, modes="h w"), torch.randn(2, 3, 4, 5, 8)
            >>> layer.summarize(volume).sizes
            (3, 4, 5)
        """
        spoken = {"weights": weights, "mask": mask, "lengths": lengths}
        return self._context_reader().summarize(context, parameter_of(self.k_proj), **spoken)

    @retells
    def attention(
        self,
        x: Tensor,
        context: Context | None = None,
        *,
        weights: GivenWeights = None,
        mask: Mask = None,
        lengths: Lengths | Mapping[Any, Any] = None,
    ) -> Any:
        """Return the attention weights of every head, without those dropped in training.

        Args:
            x: Input, as in `forward`.
            context: Context, as in `forward`.
            weights: Weights, as in `forward`.
            mask: Mask, as in `forward`; the weights of queries that it leaves out mean nothing.
            lengths: Lengths, as in `forward`.

        Returns:
            What the function of the operator returns as ``attention``, with the heads as last batch dimension: for
            operators with one softmax a mode a tensor ``(B, H, n_1, …, n_N, n_m)`` a mode.

        Raises:
            ShapeError: If a tensor has the wrong number of dimensions or channels, or an empty mode.
            DtypeError: If a tensor is not floating point, or the types differ.
            WeightsError: If weights are refused.
            OptionError: If an argument has no meaning for the operator or with another one.

        Examples:
            >>> import torch, tensorattn as ta
            >>> layer = ta.TensorAttention(8, num_heads=2, modes="h w")
            >>> rows, columns = layer.attention(torch.randn(1, 4, 5, 8))
            >>> rows.shape, columns.shape
            (torch.Size([1, 2, 4, 5, 4]), torch.Size([1, 2, 4, 5, 5]))
        """
        weights_of_x, summary = self._read(x, context, weights=weights, mask=mask, lengths=lengths)
        last, present = channels_last(x, self.channels_first), weights_of_x.present
        last = last if present is None else without_absent(last, present)
        return self._attend(last, weights_of_x, summary, return_attention=True)[0].attention

    @retells
    def attention_map(
        self,
        x: Tensor,
        at: Sequence[int],
        *,
        weights: GivenWeights = None,
        mask: Mask = None,
        lengths: Lengths | Mapping[Any, Any] = None,
    ) -> Tensor:
        """Return what one query attends to, over the whole grid, in every head: as `tensorattn.attention_map` tells.

        Args:
            x: Input, as in `forward`.
            at: The query, one index a mode.
            weights: Weights, as in `forward`.
            mask: Mask, as in `forward`.
            lengths: Lengths, as in `forward`.

        Returns:
            The maps ``(B, H, n_1, …, n_N)``, each with sum one.

        Raises:
            ShapeError: If the input has the wrong number of dimensions or channels, or an empty mode.
            DtypeError: If a tensor is not floating point, or the types differ.
            WeightsError: If weights are refused.
            OptionError: If ``at`` does not have one index a mode, or one is out of range.

        Examples:
            >>> import torch, tensorattn as ta
            >>> layer = ta.TensorAttention(8, num_heads=2, modes="h w")
            >>> maps = layer.attention_map(torch.randn(1, 4, 5, 8), at=(1, 2))
            >>> maps.shape, torch.allclose(maps.sum((2, 3)), torch.ones(1, 2))
            (torch.Size([1, 2, 4, 5]), True)
        """
        record = get_operator(self.operator)
        weights_of_x, _ = self._read(x, None, weights=weights, mask=mask, lengths=lengths)
        last, present = channels_last(x, self.channels_first), weights_of_x.present
        sizes = tuple(last.shape[1:-1])
        place = place_on(sizes, indices_of(at))
        if record.spread is None:
            raise OptionError(f"operator {record.name!r} has no map.")
        last = last if present is None else without_absent(last, present)
        attention = self._attend(last, weights_of_x, None, return_attention=True)[0].attention
        first = attention[0] if isinstance(attention[0], Tensor) else attention[0][0]
        base = base_of(weights_of_x, sizes, first)
        counts = base.weights
        if self.causal is not None:
            seen = torch.arange(sizes[self.causal], device=first.device) <= place[self.causal]
            counts = counts * beside(seen, self.causal, len(sizes))
        heads = counts.unsqueeze(-len(sizes) - 1) if counts.dim() > len(sizes) else counts
        return record.spread(attention, sizes, place, base._replace(weights=heads), **self.options)

    @retells
    @torch.no_grad()
    def find_cells(
        self,
        x: Tensor,
        *,
        weights: GivenWeights = None,
        mask: Mask = None,
        lengths: Lengths | Mapping[Any, Any] = None,
    ) -> Cells:
        """Find cells of the keys of an input, the same for all its samples, for ``operator="clustered"``.

        `hold_cells` makes a layer use them from then on; with them it may be causal and streamed.

        Args:
            x: Input, as in `forward`.
            weights: Weights, as in `forward`.
            mask: Mask, as in `forward`.
            lengths: Lengths, as in `forward`.

        Returns:
            The cells of each head.

        Raises:
            ShapeError: If the input has the wrong number of dimensions or channels, or an empty mode.
            DtypeError: If the input is not floating point, or not of the type of the parameters.
            WeightsError: If weights are refused.
            OptionError: If the operator takes no cells.

        Examples:
            >>> import torch, tensorattn as ta
            >>> layer = ta.TensorAttention(16, 2, modes="t h w", operator="clustered", tokens=8)
            >>> layer.hold_cells(layer.find_cells(torch.randn(4, 1, 9, 9, 16)))
            >>> [name for name, _ in layer.named_buffers()]
            ['cell_centres', 'cell_metric']
        """
        if "cells" not in self._options:
            raise OptionError(f"operator {self.operator!r} takes no cells.")
        spoken, _ = self._read(x, None, weights=weights, mask=mask, lengths=lengths)
        last, present = channels_last(x, self.channels_first), spoken.present
        last = last if present is None else without_absent(last, present)
        # Samples are one more mode, so that all have the same cells.
        sources = self._projected(last)
        query, key = sources.query(sources.tensors[0], 1), sources.key_and_value(*sources.tensors[1:], 1)[0]
        query, key = self._by_group(query, 1).movedim(1, 0), key.movedim(1, 0)
        counts = spoken.over_grid()
        counts = None if counts is None else counts.expand(x.shape[0], *last.shape[1:-1])
        tokens = self.options["tokens"]
        return find_cells(query, key, order=self.modes.order + 1, tokens=tokens, weights=counts)

    @retells
    def hold_cells(self, cells: Cells) -> None:
        """Use cells that were found before, at every call; they become buffers of the layer.

        Args:
            cells: The cells of each head, or some for all heads.

        Raises:
            OptionError: If the operator takes no cells, or they do not fit the heads.
        """
        if "cells" not in self._options:
            raise OptionError(f"operator {self.operator!r} takes no cells.")
        shape, needed = tuple(cells.centres.shape), (self.num_kv_heads, cells.tokens, self.head_dim)
        if shape != needed:
            raise OptionError(f"cells have centres of shape {shape}, but the heads need {needed}.")
        self.register_buffer("cell_centres", cells.centres)
        self.register_buffer("cell_metric", cells.metric)

    # ------------------------------------------------------------------------------------------------------------ read

    def _read(self, x: Tensor, context: Context | None, **spoken: Any) -> tuple[Weights, Summary | None]:
        """Check the input and what was said of its positions, or of those of a context, and summarise that."""
        grid = check_input(x, self.modes, self.embed_dim, channels_first=self.channels_first)
        parameter = parameter_of(self.q_proj)
        if parameter is not None:
            check_parameters(x, parameter)
        if context is not None:
            for name in ("position_bias", "rotary"):
                if getattr(self, name) is not None:
                    raise OptionError(f"context has no meaning with {name}: its positions are not those of x.")
            summary = self._context_reader().read(context, x, parameter_of(self.k_proj), **spoken)
            return Weights((None,) * self.modes.order), summary
        if (self.kdim, self.vdim) != (self.embed_dim, self.embed_dim):
            raise OptionError(
                f"context is missing: keys are made of {self.kdim} channels and values of {self.vdim}, but x has "
                f"{self.embed_dim}."
            )
        weights = read_weights(spoken["weights"], spoken["mask"], spoken["lengths"], grid, x, self.modes, of="x")
        check_indices(self._needs(), weights)
        return weights, None

    def _context_reader(self) -> ContextReader:
        """Return what reads a context."""
        operator, dims = get_operator(self.operator), (self.kdim, self.vdim)
        return ContextReader(operator, self.options, self.causal, self.modes, dims, self.channels_first)

    def _needs(self) -> Needs:
        """What the operator needs to know of queries, keys and values."""
        return get_operator(self.operator).needs(self.modes.order, **self.options)

    def _settings(self, **further: Any) -> dict[str, Any]:
        """What the operator is told at every call."""
        gain = self.interaction_gain
        return {
            "scale": default_scale(self.head_dim) if self.scale is None else self.scale,
            "dropout_p": self.dropout if self.training else 0.0,
            "return_lse": False,
            "return_attention": False,
            **self.options,
            **({} if gain is None else {"gain": gain.to(accumulation_dtype(gain.dtype))}),
            **further,
        }

    def finished(self, y: Tensor, present: Tensor | None, skip: Tensor | None) -> Tensor:
        """Do what follows the output map, unchecked, and return the layout of the input.

        Args:
            y: What the output map gives, channels last.
            present: Where positions take part, or None.
            skip: What is added, in the layout of the input, or None.
        """
        y = y if present is None else without_absent(y, present)
        y = F.dropout(y, self.proj_drop, self.training) if self.proj_drop > 0 else y
        y = y if skip is None else y + channels_last(skip, self.channels_first)
        return y.movedim(-1, 1) if self.channels_first else y

    # --------------------------------------------------------------------------------------------------------- project

    def _given(self, x: Tensor) -> Sources:
        """Make queries, keys and values of an input by the projections."""
        record = get_operator(self.operator)
        return Sources(
            (x, x, x),
            (self.q_proj, self.k_proj, self.v_proj),
            (None, None) if record.pools else (self.q_norm, self.k_norm),  # an operator that pools is told of norms
            (self.num_heads, self.num_kv_heads),
            self.mode_projections,
            grouped=record.condense is not None,
        )

    def _turns_positions(self) -> bool:
        """Tell whether queries and keys are turned before the operator sees them."""
        return self.rotary is not None and not get_operator(self.operator).pools

    def _projected(self, x: Tensor) -> Sources:
        """Make queries, keys and values of an input at all its positions, and turn them by their places."""
        given = self._given(x)
        tensors = [to(x) for to in given.maps]
        norms = given.norms
        if self.rotary is not None and self._turns_positions():
            for place, (norm, heads) in enumerate(zip(given.norms, given.heads, strict=True)):
                turned = self.rotary(normed(norm, split_heads(tensors[place], heads, 1)))
                tensors[place] = join_heads(turned, 1)
            norms = (None, None)
        return dataclasses.replace(
            given, tensors=(tensors[0], tensors[1], tensors[2]), maps=(unchanged,) * 3, norms=norms
        )

    # ---------------------------------------------------------------------------------------------------------- attend

    def _attend(
        self,
        x: Tensor,
        weights: Weights,
        context: Summary | None,
        prefix: Tensor | None = None,
        *,
        return_attention: bool = False,
    ) -> tuple[AttentionResult, Tensor | None]:
        """Attend from an input with its channels last to itself, or to a context, and project back; and from tokens."""
        record = get_operator(self.operator)
        at_once = self.project == "positions" or self._turns_positions()
        at_once = at_once or self._needs().queries is not None or record.condense is not None
        attend = self._again(self._attend_to) if at_once else self._attend_to
        if prefix is not None and prefix.shape[1] == 0:  # nothing is beside the input
            return attend(x, weights, context, None, return_attention, not at_once)[0], prefix
        return attend(x, weights, context, prefix, return_attention, not at_once)

    def _again(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Make the backward pass call a function again instead of keeping what is inside, where that is wanted."""
        if self.checkpoint and torch.is_grad_enabled():
            return functools.partial(recompute, function, use_reentrant=False)
        return function

    def _attend_to(
        self,
        x: Tensor,
        weights: Weights,
        context: Summary | None,
        prefix: Tensor | None,
        return_attention: bool,
        again: bool,
    ) -> tuple[AttentionResult, Tensor | None]:
        """Summarise what is attended to, attend, and project back.

        Args:
            x: The input.
            weights: Weights of its positions.
            context: Summary of a context, or None.
            prefix: Tokens beside the input, or None.
            return_attention: Whether to return the attention weights.
            again: Whether the backward pass may attend again from some positions at a time, where that is wanted.
        """
        record, needs = get_operator(self.operator), self._needs()
        settings = self._settings(return_attention=return_attention)
        early = context is None and (self.project == "positions" or self._turns_positions())
        sources = self._projected(x) if early else self._given(x)
        frames = self.causal if record.query == "positions" else None
        if frames is None and self.causal is not None:
            settings["causal"] = self.causal
        if self.position_bias is not None and context is None:
            settings["bias"] = self._bias(self.position_bias, x, frames)
        tokens = None if prefix is None else self._tokens(prefix)
        found: Any = None
        if needs.queries is not None:
            result = self._from_averages(sources, weights, needs, settings)
        elif frames is not None and record.condense is not None:
            result, _ = self._from_condensed_frames(sources, weights, needs, settings)
        elif frames is not None:
            summary, _ = causal_summary(*sources.tensors[1:], needs, weights, frames)
            result = self._from_frames(sources, sources.project(summary), frames, settings, again)
        else:
            found = sources.project(sources.summarise(needs, weights) if context is None else context)
            found = found if record.condense is None else self._condensed(sources, found, context is None)
            joined = tokens if record.query == "positions" else None
            result = self._from_positions(sources, found, settings, again, joined)
        if tokens is None:
            return result, None
        if record.query == "positions":
            told = {name: value for name, value in settings.items() if name != "bias"}
        else:  # by full attention to all positions
            record, told = FLATTENED, {name: settings[name] for name in ("scale", "dropout_p")}
            found = found if needs == self._everything() else self._all_positions(x, weights)
        output = self._answer(record, tokens.query, found, told, 1, tokens).output
        return result, self.out_proj(join_heads(output, 1))

    def _tokens(self, prefix: Tensor) -> Prefix:
        """Project tokens beside the input; they have no place to be turned by."""
        sources = dataclasses.replace(self._given(prefix), norms=(self.q_norm, self.k_norm))
        return Prefix(sources.query(prefix, 1), *sources.key_and_value(prefix, prefix, 1))

    def _everything(self) -> Needs:
        """What is known of all positions."""
        return Needs((tuple(range(self.modes.order)),))

    def _all_positions(self, x: Tensor, weights: Weights) -> Summary:
        """Summarise all positions, which tokens beside a grid attend to where the operator averages."""
        sources = dataclasses.replace(self._given(x), norms=(self.q_norm, self.k_norm))
        summary = sources.project(sources.summarise(self._everything(), weights))
        rotary, sizes = self.rotary, tuple(x.shape[1:-1])
        if rotary is None:
            return summary
        turned = summary.key_means.map(lambda rows: rotary(rows.unflatten(-2, sizes)).flatten(2, -2))
        return dataclasses.replace(summary, key_means=turned)

    def _answer(
        self, record: Operator, query: Tensor, found: Any, settings: dict[str, Any], batch: int, tokens: Prefix | None
    ) -> AttentionResult:
        """Attend from queries to what was found of keys and values, and to tokens beside the grid.

        Where keys keep their own heads, those of a group of queries are one more dimension of positions.
        """
        grouped = record.condense is not None
        query = self._by_group(query, batch) if grouped else query
        if tokens is None:
            result = record.attend(query, found, **settings)
        else:
            result = attend_beside(record, query, found, tokens.key, tokens.value, **settings)
        return self._ungrouped(result, batch) if grouped else result

    def _condensed(self, sources: Sources, summary: Summary, of_x: bool) -> Any:
        """Condense a projected summary by some queries of an input."""
        shown = summary.count(tuple(range(summary.order))) if of_x else None
        with torch.no_grad():
            rows = sources.tensors[0].flatten(1, -2)
            rows, seen = draw_queries(rows, None if shown is None else shown.squeeze(1).flatten(1))
            query = self._by_group(sources.query(rows, 1), 1)
            if seen is not None:
                seen = seen.unsqueeze(1)
                seen = seen.repeat(1, 1, query.shape[2]) if query.dim() > 4 else seen
            query = query.flatten(2, -2)
        return get_operator(self.operator).condense(query, summary, seen, **self.options)[0]  # type: ignore[misc]

    def _by_group(self, query: Tensor, batch: int) -> Tensor:
        """Give queries the heads of the keys, those of a group as one more dimension of positions."""
        if self.num_heads == self.num_kv_heads:
            return query
        return query.unflatten(batch, (self.num_kv_heads, -1))

    def _ungrouped(self, result: AttentionResult, batch: int) -> AttentionResult:
        """Undo `_by_group`; cells are told for each head."""
        if self.num_heads == self.num_kv_heads:
            return result
        attention = result.attention
        if attention is not None:
            weights, label = attention
            group = self.num_heads // self.num_kv_heads
            attention = weights.flatten(batch, batch + 1), label.repeat_interleave(group, batch)
        return result._replace(output=result.output.flatten(batch, batch + 1), attention=attention)

    def _from_positions(
        self,
        sources: Sources,
        summary: Any,
        settings: dict[str, Any],
        again: bool = True,
        tokens: Prefix | None = None,
    ) -> AttentionResult:
        """Attend from each position by itself: project it, attend, project back; some positions at a time.

        Args:
            sources: Where the queries are made of, ``(*batch, *positions, C)``.
            summary: Projected summary of the input or of a context, with heads as last batch dimension, or what it was
                condensed to.
            settings: What the operator is told.
            again: Whether the backward pass may attend again, where that is wanted.
            tokens: What is attended to beside, or None.
        """
        operator, batch = get_operator(self.operator), len(summary.batch) - 1
        positions, owns = tuple(sources.tensors[0].shape[batch:-1]), bool(self.options.get("include_self"))
        whole = "bias" in settings or settings["return_attention"] or operator.query == "grid"
        flat = sources if whole else sources.each(lambda tensor: tensor.flatten(batch, -2))

        def attend(part: slice) -> tuple[Tensor, ...]:
            of_query, of_key, of_value = (tensor[..., part, :] for tensor in flat.tensors)
            own = {"own": flat.key_and_value(of_key, of_value, batch)} if owns else {}
            query = flat.query(of_query, batch)
            result = self._answer(operator, query, summary, {**settings, **own}, batch, tokens)
            return self.out_proj(join_heads(result.output, batch)), *(result.attention or ())

        attend_again = self._again(attend) if again else attend
        if whole:
            output, *attention = attend_again(slice(None))
            return AttentionResult(output, None, tuple(attention) or None)
        first = flat.tensors[0]
        length, width = first.shape[-2], math.prod(first.shape[:batch]) * self.num_heads * self.head_dim
        if attend_again is not attend:
            step = max(1, CHUNK // width)
            parts = [attend_again(slice(start, start + step))[0] for start in range(0, length, step)]
            return AttentionResult((parts[0] if len(parts) == 1 else torch.cat(parts, -2)).unflatten(-2, positions))
        held = [*self.parameters(), *_tensors_of(summary), *(tokens or ())]
        output, *_ = in_chunks(attend, length, 4 * width, *flat.tensors, *held)
        assert output is not None
        return AttentionResult(output.unflatten(-2, positions))

    def _from_frames(
        self, sources: Sources, summary: Summary, mode: int, settings: dict[str, Any], again: bool = True
    ) -> AttentionResult:
        """Attend from each frame to what it may know of those up to its own."""
        result = self._from_positions(sources.each(lambda x: frames_first(x, mode, 1)), summary, settings, again)
        attention = result.attention and tuple([self._frames_in_place(part, mode) for part in result.attention])
        return AttentionResult(frames_last(result.output, mode, 1), None, attention)

    def _frames_in_place(self, tensor: Tensor, mode: int) -> Tensor:
        """Bring ``(B, T, H, …, 1, …)`` to ``(B, H, …, T, …)``."""
        return tensor.squeeze(3 + mode).movedim(1, 2 + mode)

    def _from_condensed_frames(
        self, sources: Sources, weights: Weights, needs: Needs, settings: dict[str, Any], **before: Any
    ) -> tuple[AttentionResult, Any]:
        """Attend from each frame to what those up to its own are condensed to; and what returns what to keep."""
        mode = self.causal
        assert mode is not None
        summary = sources.project(sources.summarise(needs, weights))
        query = self._by_group(sources.query(sources.tensors[0], 1), 1)
        record = get_operator(self.operator)
        result, after = attend_condensed(record, query, summary, self.options, mode, settings, **before)
        result = self._ungrouped(result, 1)
        return AttentionResult(self.out_proj(join_heads(result.output, 1)), None, result.attention), after

    def _from_averages(
        self, sources: Sources, weights: Weights, needs: Needs, settings: dict[str, Any]
    ) -> AttentionResult:
        """Attend from averages: queries are projected in S rows, what is an outer sum is projected back in S rows."""
        record, (x, *_), order = get_operator(self.operator), sources.tensors, self.modes.order
        sizes = tuple(x.shape[1:-1])
        summary = sources.summarise(needs, weights)
        queries = sources.project_queries(summary, needs.queries or (), weights)
        if record.pools and (self.q_norm is not None or self.rotary is not None):
            settings.update(query_norm=self._prepared(self.q_norm), key_norm=self._prepared(self.k_norm))
        result = record.attend(queries, sources.project(summary), **settings)
        if isinstance(result.output, Tensor):
            return result._replace(output=self.out_proj(join_heads(result.output, 1)))
        parts = [join_heads(part, 1) for part in result.output]
        memory, attention = None if is_recorded() else memory_order(x.stride()), result.attention
        shape = (x.shape[0], *sizes)
        if self.project == "positions":
            spread = spread_parts(AttentionResult(tuple(parts)), shape, x.dtype, memory).output
            return AttentionResult(self.out_proj(spread), None, attention)
        zero = parts[0].new_zeros(x.shape[0], 1, parts[0].shape[-1])
        rows = torch.cat([*parts, zero], -2) if order > 1 else parts[0]
        first, *others = self.out_proj(rows).split_with_sizes([*sizes, *[1] * (order > 1)], -2)
        if order > 1:  # what the map makes of zero, its bias, counts once
            *others, zero = others
            first = torch.sub(first, zero, alpha=order - 1)
        spread = AttentionResult((first, *others))
        return spread_parts(spread, shape, first.dtype, memory)._replace(attention=attention)

    def _prepared(self, norm: nn.Module | None) -> Callable[[Tensor, int], Tensor]:
        """Return what is called with pooled queries or keys of a mode: a norm, then a turn by their places."""

        def prepared(pooled: Tensor, mode: int) -> Tensor:
            pooled = normed(norm, pooled)
            return pooled if self.rotary is None else self.rotary.rotate_mode(pooled, mode)

        return prepared

    def continued(
        self, x: Tensor, weights: Weights, past: Past | None, *, window: int | None = None
    ) -> tuple[Tensor, Past]:
        """Attend from frames of the causal mode that follow others, unchecked: a step of `AttentionStream`.

        Args:
            x: The frames, channels last.
            weights: Checked weights, a product over modes.
            past: What is known of the frames before; None for none.
            window: How many frames are seen, the own one included; None for all.

        Returns:
            The output, and what is known after these frames.
        """
        record, mode, needs = get_operator(self.operator), self.causal, self._needs()
        assert mode is not None
        sources = self._given(x)
        if record.condense is not None:
            before = {"past": past, "window": window}
            result, then = self._from_condensed_frames(sources, weights, needs, self._settings(), **before)
            held = [None if k == mode or v is None else v.clone() for k, v in enumerate(weights.vectors)]
            return result.output, dataclasses.replace(then(), mode_weights=tuple(held))
        if record.query == "positions":
            summary, after = causal_summary(x, x, needs, weights, mode, past=past, window=window)
            return self._from_frames(sources, sources.project(summary), mode, self._settings()).output, after()
        whole = 1 if window is not None else x.shape[1 + mode]  # with a window, each frame sees other frames
        outputs = []
        for start in range(0, x.shape[1 + mode], whole):
            part = x.narrow(1 + mode, start, whole)
            own = tuple(
                [
                    w.narrow(-1, start, whole) if k == mode and w is not None else w
                    for k, w in enumerate(weights.vectors)
                ]
            )
            seen, spoken, past = frames_beside(part, Weights(own), mode, past=past, window=window)
            summary = sources.project(make_summary(seen, seen, needs, spoken))
            outputs.append(self._from_positions(self._given(part), summary, self._settings(causal=mode)).output)
        assert past is not None
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1 + mode), past

    def _bias(self, position_bias: PositionBias, x: Tensor, frames: int | None) -> Bias:
        """Bias of each mode, ``(1, H, n, n)``, or ``(1, T, H, P, n)`` where frames are a batch dimension."""
        dtype, sizes = accumulation_dtype(x.dtype), tuple(x.shape[1:-1])
        found: list[Tensor | None] = []
        for mode, (part, size) in enumerate(zip(position_bias(sizes), sizes, strict=True)):
            if part is not None:
                if part.dim() != 3 or part.shape[0] not in (1, self.num_heads) or part.shape[1:] != (size, size):
                    kind, needed = type(position_bias).__name__, f"{(self.num_heads, size, size)} or {(1, size, size)}"
                    raise ShapeError(
                        f"the bias of mode {self.modes.label(mode)} has shape {tuple(part.shape)} in {kind}, but needs "
                        f"{needed}."
                    )
                part = part.to(dtype)
                if frames is not None:
                    part = part.movedim(1, 0).unsqueeze(-2) if mode == frames else part.unsqueeze(0)
                part = part.unsqueeze(0)
            found.append(part)
        return tuple(found)


def _tensors_of(summary: Any) -> list[Tensor]:
    """List the tensors of a summary, or of what it was condensed to, that may be differentiated."""
    if not isinstance(summary, Summary):
        return summary.tensors
    means = [rows for part in (summary.key_means, summary.value_means) for _, rows in part.blocks]
    return [*means, *[moment for moment in (summary.covariance, summary.key_covariance) if moment is not None]]


def _check_heads(embed_dim: int, num_heads: int, head_dim: int | None, num_kv_heads: int | None) -> tuple[int, int]:
    """Check that heads divide the channels, unless their size is given, and return their size and those of keys."""
    for name, count in (("embed_dim", embed_dim), ("num_heads", num_heads)):
        check(count, name, "integer")
    if embed_dim < 1 or num_heads < 1:
        raise OptionError(f"embed_dim and num_heads must be at least 1, got {embed_dim} and {num_heads}.")
    for name, given in (("head_dim", head_dim), ("num_kv_heads", num_kv_heads)):
        if given is not None:
            check(given, name, "integer", least=1)
    if head_dim is None and embed_dim % num_heads:
        raise OptionError(f"embed_dim must be divisible by num_heads, got {embed_dim} and {num_heads}.")
    groups = num_heads if num_kv_heads is None else num_kv_heads
    if num_heads % groups:
        raise OptionError(f"num_heads must be divisible by num_kv_heads, got {num_heads} and {groups}.")
    return int(embed_dim // num_heads if head_dim is None else head_dim), int(groups)


def _check_position_bias(
    position_bias: Any, record: Operator, options: Mapping[str, Any], modes: ModeSpec, num_heads: int
) -> None:
    """Check that a position bias fits the layer."""
    lacking = record.lacking(options)
    if "bias" in lacking:
        raise OptionError(f"position_bias has no meaning for operator {record.name!r}: {lacking['bias']}.")
    if not isinstance(position_bias, PositionBias):
        raise OptionError(f"position_bias must be a PositionBias, got {type(position_bias).__name__}.")
    if position_bias.modes.names != modes.names:
        raise OptionError(f"position_bias has the modes {position_bias.modes}, but the layer has {modes}.")
    heads = getattr(position_bias, "num_heads", num_heads)
    if heads != num_heads:
        raise OptionError(f"position_bias has {heads} heads, but the layer has {num_heads}.")


def _check_rotary(rotary: Any, record: Operator, options: Mapping[str, Any], modes: ModeSpec, head_dim: int) -> None:
    """Check that a rotary embedding fits the layer."""
    if not isinstance(rotary, RotaryEmbedding):
        raise OptionError(f"rotary must be a RotaryEmbedding, got {type(rotary).__name__}.")
    if rotary.axes.modes.names != modes.names:
        raise OptionError(f"rotary has the modes {rotary.axes.modes}, but the layer has {modes}.")
    if rotary.head_dim != head_dim:
        raise OptionError(
            f"rotary has head_dim {rotary.head_dim}, but the heads of the layer have {head_dim} channels."
        )
    rotary.check_operator(record.name, **options)
