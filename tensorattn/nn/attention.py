"""One module for every operator: project, attend, project back."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from tensorattn.averages.means import check_same_shape, marginal_means
from tensorattn.averages.plan import memory_order
from tensorattn.errors import OptionError, ShapeError, check, retells
from tensorattn.functional.causal import Past, causal_summary, frames_beside, frames_first, frames_last
from tensorattn.functional.cells import Cells, draw_queries, find_cells
from tensorattn.functional.maps import base_of, indices_of, place_on
from tensorattn.functional.operator import (
    AttentionResult,
    Bias,
    Operator,
    attend_condensed,
    causal_bias,
    check_indices,
    default_scale,
    get_operator,
    spread_parts,
)
from tensorattn.functional.softmax import CHUNK, in_chunks
from tensorattn.functional.summary import Means, Needs, Summary, make_summary
from tensorattn.masks import (
    GivenWeights,
    Lengths,
    Mask,
    Weights,
    accumulation_dtype,
    beside,
    is_recorded,
    matmul,
    read_weights,
    without_absent,
)
from tensorattn.modes import ModeSpec, mode_subsets
from tensorattn.nn.bias import PositionBias
from tensorattn.nn.context import Context, ContextReader, check_crossing
from tensorattn.nn.layout import channels_last, check_input, check_parameters
from tensorattn.nn.parameters import draw_linear, parameter_of, reset_parts
from tensorattn.nn.rotary import RotaryEmbedding

__all__ = ["TensorAttention"]


class TensorAttention(nn.Module):
    r"""Multi-head attention over a tensor of any order, without flattening it: to itself, or to a context.

    Queries, keys and values are linear maps of the input. As averages of a linear map are the linear map of the
    averages, the module averages its input once and calls its projections with the averages: S = n_1 + … + n_N rows
    instead of P = n_1 ⋯ n_N, wherever the operator works on averages. The four projections are modules that are called,
    so adapters, hooks and quantisation act on them; of one that is no affine map (dropout inside an adapter, dynamic
    quantisation) the output is that of the averages. The layer keeps nothing that depends on the sizes of the modes, so
    one takes inputs of any size.

    Given a context, which may be on another grid and of another order, keys and values are made of that: once for each
    context, by `summarize`. Operators whose queries may stand anywhere take one.

    Args:
        embed_dim: Channels C of input and output.
        num_heads: Number of heads H; they divide the channels.
        modes: Modes of the input: their number, or their names as in ``"t h w"``.
        operator: Name of the operator in `OPERATORS`.
        channels_first: Whether inputs are ``(B, C, n_1, …, n_N)`` instead of ``(B, n_1, …, n_N, C)``.
        bias: Whether the four linear maps have a bias.
        dropout: Probability of dropping an attention weight in training.
        kdim: Channels of a context that keys are made of; C if None.
        vdim: Channels of a context that values are made of; C if None.
        causal: A mode, by name or index, whose frames see their past and themselves only; None for none.
        position_bias: A bias of the logits by position, one matrix a mode: a `RelativePositionBias`, `AlibiBias` or
            `AxisWindow`, or your own `PositionBias`.
        rotary: A `RotaryEmbedding` that turns queries and keys by their places; for full, clustered and axial
            attention, and for the Kronecker operators, which turn pooled queries and keys by their mode.
        mode_projections: Whether queries and keys have a linear map of their own for each mode; for the Kronecker
            operators.
        qk_norm: Whether pooled queries and keys go through a LayerNorm each; for the Kronecker operators.
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
        dropout: float = 0.0,
        kdim: int | None = None,
        vdim: int | None = None,
        causal: int | str | None = None,
        position_bias: PositionBias | None = None,
        rotary: RotaryEmbedding | None = None,
        mode_projections: bool = False,
        qk_norm: bool = False,
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
        for name, value in {**switches, "mode_projections": mode_projections, "qk_norm": qk_norm}.items():
            check(value, name, "switch")
        if project not in ("averages", "positions"):
            raise OptionError(f"project must be 'averages' or 'positions', got {project!r}.")
        self.causal = None if causal is None else self.modes.index(causal)
        if options.get("kept") is not None:
            subsets = mode_subsets(options["kept"])
            options["kept"] = tuple(tuple(self.modes.index(mode) for mode in kept) for kept in subsets)
        _check_heads(embed_dim, num_heads)
        self.embed_dim, self.num_heads, self.operator = int(embed_dim), int(num_heads), operator
        cells = options.get("cells")
        self._options = record.with_defaults({**options, "cells": "keys"} if isinstance(cells, Cells) else options)
        if isinstance(cells, Cells):
            self.hold_cells(cells)
        record.needs(self.modes.order, **self.options)  # refuses values out of range
        check(dropout, "dropout", "probability")
        if mode_projections and project == "positions":
            raise OptionError(
                "mode_projections has no meaning with project='positions': it maps the averages of a mode."
            )
        for name, given in (("mode_projections", mode_projections), ("qk_norm", qk_norm)):
            if given and not record.pools:
                raise OptionError(f"{name} has no meaning for operator {operator!r}: it does not pool its queries.")
        lacking = record.lacking(self.options)
        for name, given in (("causal", self.causal is not None), ("dropout_p", dropout > 0)):
            if given and name in lacking:
                name, reason = name.removesuffix("_p"), lacking[name]
                raise OptionError(f"{name} has no meaning for operator {operator!r}: {reason}.")
        if position_bias is not None:
            _check_position_bias(position_bias, record, self.options, self.modes, num_heads)
        if rotary is not None:
            _check_rotary(rotary, record, self.options, self.modes, embed_dim // num_heads)
            if qk_norm:
                raise OptionError("rotary has no meaning with qk_norm: pooled queries are turned before a norm.")
        for name, dim in (("kdim", kdim), ("vdim", vdim)):
            if dim is not None:
                check(dim, name, "integer")
                check_crossing(record, self.options, self.causal, name)
                if dim < 1:
                    raise OptionError(f"{name} must be at least 1, got {dim}.")
        embed_dim, num_heads = self.embed_dim, self.num_heads
        self.channels_first, self.dropout, self.mode_projections = channels_first, dropout, mode_projections
        self.kdim, self.vdim = (embed_dim if dim is None else int(dim) for dim in (kdim, vdim))
        rows = embed_dim * (self.modes.order if mode_projections else 1)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(embed_dim, rows, bias, **factory)
        self.k_proj = nn.Linear(self.kdim, rows, bias, **factory)
        self.v_proj = nn.Linear(self.vdim, embed_dim, bias, **factory)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias, **factory)
        self.q_norm = nn.LayerNorm(embed_dim // num_heads, **factory) if qk_norm else None
        self.k_norm = nn.LayerNorm(embed_dim // num_heads, **factory) if qk_norm else None
        gain = torch.ones(num_heads, **factory) if self.options.get("interaction") else None
        self.interaction_gain = None if gain is None else nn.Parameter(gain)
        self.position_bias, self.rotary = position_bias, rotary
        self.project, self.checkpoint = project, checkpoint
        self._draw()

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
        if self.dropout:
            parts.append(f"dropout={self.dropout}")
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
    ) -> Tensor:
        """Attend: from each position of the input to the input itself, or to a context.

        Without a context, weights, mask and lengths speak of the input: where a mask or lengths leave a position out,
        it may hold anything, and the output is zero before ``skip`` is added. With a context they speak of the context,
        and a sample without any position gives what the output map makes of zero: its bias.

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

        Returns:
            The output, of the shape of the input.

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
        """
        weights_of_x, summary = self._read(x, context, weights=weights, mask=mask, lengths=lengths)
        last, present = channels_last(x, self.channels_first), weights_of_x.present
        if skip is not None:
            check_same_shape("skip", skip, x.shape, x)
        if present is not None:  # what an absent position holds must not meet a zero, not even that of a gradient
            last = without_absent(last, present)
        y = self._attend(last, weights_of_x, summary).output
        y = y if present is None else without_absent(y, present)
        y = y if skip is None else y + channels_last(skip, self.channels_first)
        return y.movedim(-1, 1) if self.channels_first else y

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
        return self._attend(last, weights_of_x, summary, return_attention=True).attention

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
        attention = self._attend(last, weights_of_x, None, return_attention=True).attention
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
        query, key = (self._heads(to(last), 1).movedim(1, 0) for to in (self.q_proj, self.k_proj))
        if self.rotary is not None:
            query, key = self.rotary(query), self.rotary(key)
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
        shape, needed = tuple(cells.centres.shape), (self.num_heads, cells.tokens, self.embed_dim // self.num_heads)
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
            "scale": default_scale(self.embed_dim // self.num_heads),
            "dropout_p": self.dropout if self.training else 0.0,
            "return_lse": False,
            "return_attention": False,
            **self.options,
            **({} if gain is None else {"gain": gain.to(accumulation_dtype(gain.dtype))}),
            **further,
        }

    # ------------------------------------------------------------------------------------------- summarise, and attend

    def _attend(
        self, x: Tensor, weights: Weights, context: Summary | None, *, return_attention: bool = False
    ) -> AttentionResult:
        """Attend from an input with its channels last to itself, or to a context, and project back."""
        record, needs, settings = (
            get_operator(self.operator),
            self._needs(),
            self._settings(return_attention=return_attention),
        )
        if context is not None:
            return self._from_summary(x, context, settings, of_x=False)
        frames = self.causal if record.query == "positions" else None
        if frames is None and self.causal is not None:
            settings["causal"] = self.causal
        projected = self.project == "positions" or (self.rotary is not None and not record.pools)
        projected = projected or (record.condense is not None and frames is not None)
        if self.position_bias is not None:
            settings["bias"] = self._bias(self.position_bias, x, None if projected else frames)
        if projected:
            return self._again(self._from_projected)(x, weights, frames, settings)
        if needs.queries is not None:
            return self._again(self._from_averages)(x, weights, needs, settings)
        if frames is None:
            return self._from_summary(x, make_summary(x, x, needs, weights), settings)
        summary, _ = causal_summary(x, x, needs, weights, frames)
        return self._from_frames(x, self._project(summary, x.dtype), frames, settings)

    def _from_summary(
        self, x: Tensor, summary: Summary, settings: dict[str, Any], *, of_x: bool = True
    ) -> AttentionResult:
        """Attend from each position to a summary of the input, or of a context, which is projected."""
        record = get_operator(self.operator)
        if record.condense is None:
            return self._from_positions(x, self._project(summary, x.dtype), settings)

        def attend(x: Tensor) -> AttentionResult:
            return self._from_positions(
                x, self._condensed(x, self._project(summary, x.dtype), of_x), settings, again=False
            )

        return self._again(attend)(x)

    def _condensed(self, x: Tensor, summary: Summary, of_x: bool) -> Any:
        """Condense a projected summary by some queries of an input."""
        shown = summary.count(tuple(range(summary.order))) if of_x else None
        with torch.no_grad():
            rows, seen = draw_queries(x.flatten(1, -2), None if shown is None else shown.squeeze(1).flatten(1))
            query = self._heads(self.q_proj(rows), 1)
        seen = None if seen is None else seen.unsqueeze(1)
        return get_operator(self.operator).condense(query, summary, seen, **self.options)[0]  # type: ignore[misc]

    def _from_positions(self, x: Tensor, summary: Any, settings: dict[str, Any], again: bool = True) -> AttentionResult:
        """Attend from each position by itself: project it, attend, project back; some positions at a time.

        Args:
            x: Where the queries are made of, ``(*batch, *positions, C)``.
            summary: Projected summary of the input or of a context, with heads as last batch dimension, or what it was
                condensed to.
            settings: What the operator is told.
            again: Whether the backward pass may attend again, where that is wanted.
        """
        operator, batch = get_operator(self.operator), len(summary.batch) - 1
        positions, owns = tuple(x.shape[batch:-1]), bool(self.options.get("include_self"))
        whole = "bias" in settings or settings["return_attention"] or operator.query == "grid"
        flat = x if whole else x.flatten(batch, -2)

        def attend(chunk: Tensor) -> tuple[Tensor, ...]:
            own = {"own": tuple([self._heads(to(chunk), batch) for to in (self.k_proj, self.v_proj)])} if owns else {}
            result = operator.attend(self._heads(self.q_proj(chunk), batch), summary, **settings, **own)
            return self.out_proj(self._joined(result.output, batch)), *(result.attention or ())

        attend_again = self._again(attend) if again else attend
        if whole:
            output, *attention = attend_again(x)
            return AttentionResult(output, None, tuple(attention) or None)
        length, width = flat.shape[-2], math.prod(flat.shape[:batch]) * self.embed_dim
        if attend_again is not attend:
            parts = [attend_again(chunk)[0] for chunk in flat.split(max(1, CHUNK // width), -2)]
            return AttentionResult((parts[0] if len(parts) == 1 else torch.cat(parts, -2)).unflatten(-2, positions))
        held = [*self.parameters(), *_tensors_of(summary)]
        output, *_ = in_chunks(lambda part: attend(flat[..., part, :]), length, 4 * width, flat, *held)
        assert output is not None
        return AttentionResult(output.unflatten(-2, positions))

    def _again(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Make the backward pass call a function again instead of keeping what is inside, where that is wanted."""
        if self.checkpoint and torch.is_grad_enabled():
            return functools.partial(recompute, function, use_reentrant=False)
        return function

    def _from_frames(self, x: Tensor, summary: Summary, mode: int, settings: dict[str, Any]) -> AttentionResult:
        """Attend from each frame to what it may know of those up to its own."""
        result = self._from_positions(frames_first(x, mode, 1), summary, settings)
        attention = result.attention and tuple([self._frames_in_place(part, mode) for part in result.attention])
        return AttentionResult(frames_last(result.output, mode, 1), None, attention)

    def _frames_in_place(self, tensor: Tensor, mode: int) -> Tensor:
        """Bring ``(B, T, H, …, 1, …)`` to ``(B, H, …, T, …)``."""
        return tensor.squeeze(3 + mode).movedim(1, 2 + mode)

    def _from_averages(self, x: Tensor, weights: Weights, needs: Needs, settings: dict[str, Any]) -> AttentionResult:
        """Attend from averages: queries are projected in S rows, what is an outer sum is projected back in S rows."""
        record, sizes, order = get_operator(self.operator), tuple(x.shape[1:-1]), self.modes.order
        summary = make_summary(x, x, needs, weights).in_type(x.dtype)
        queries = self._project_queries(_means_of(x, summary, needs.queries or (), weights))
        summary = self._project(summary, x.dtype)
        if self.q_norm is not None and self.k_norm is not None:
            settings.update(query_norm=_in_type(self.q_norm), key_norm=_in_type(self.k_norm))
        if self.rotary is not None:
            turned = [self._turned(means, self.rotary) for means in (queries, summary.key_means)]
            queries, summary = turned[0], dataclasses.replace(summary, key_means=turned[1])
        result = record.attend(queries, summary, **settings)
        if isinstance(result.output, Tensor):
            return result._replace(output=self.out_proj(self._joined(result.output, 1)))
        parts = [self._joined(part, 1) for part in result.output]
        rows = torch.cat([*parts, parts[0].new_zeros(x.shape[0], 1, self.embed_dim)], -2) if order > 1 else parts[0]
        first, *others = self.out_proj(rows).split_with_sizes([*sizes, *[1] * (order > 1)], -2)
        if order > 1:  # what the map makes of zero, its bias, counts once
            *others, zero = others
            first = torch.sub(first, zero, alpha=order - 1)
        memory = None if is_recorded() else memory_order(x.stride())
        spread = AttentionResult((first, *others))
        return spread_parts(spread, (x.shape[0], *sizes), first.dtype, memory)._replace(attention=result.attention)

    def _turned(self, means: Means, rotary: RotaryEmbedding) -> Means:
        """Turn pooled queries or keys of each mode by their places."""
        found = {kept: rotary.rotate_mode(means.get(kept), kept[0]) for kept in means.family}
        return Means.of(means.sizes, found, 2)

    def _from_projected(
        self, x: Tensor, weights: Weights, frames: int | None, settings: dict[str, Any]
    ) -> AttentionResult:
        """Project all positions, and attend as the function of the operator does."""
        record, needs = get_operator(self.operator), self._needs()
        query, key, value = (self._heads(linear(x), 1) for linear in (self.q_proj, self.k_proj, self.v_proj))
        if self.rotary is not None and not record.pools:
            query, key = self.rotary(query), self.rotary(key)
        weights, heads = weights.with_batch_dim(-1), 2
        if self.options.get("include_self"):
            settings["own"] = (key, value)
        if record.condense is not None:
            summary = make_summary(key, value, needs, weights)
            result, _ = attend_condensed(record, query, summary, self.options, frames, settings)
        elif frames is not None:
            if "own" in settings:
                settings["own"] = tuple([frames_first(part, frames, heads) for part in settings["own"]])
            if "bias" in settings:
                settings["bias"] = causal_bias(settings["bias"], frames)
            if "gain" in settings:
                settings["gain"] = settings["gain"].unsqueeze(-1)
            summary, _ = causal_summary(key, value, needs, weights, frames)
            result = record.attend(frames_first(query, frames, heads), summary, **settings)
            attention = result.attention and tuple([frames_last(part, frames, heads) for part in result.attention])
            result = AttentionResult(frames_last(result.output, frames, heads), None, attention)
        else:
            summary = make_summary(key, value, needs, weights)
            queries: Any = query
            if needs.queries is not None:
                queries = _means_of(query, None, needs.queries, weights)
            if self.q_norm is not None and self.k_norm is not None:
                settings.update(query_norm=_in_type(self.q_norm), key_norm=_in_type(self.k_norm))
            if self.rotary is not None and record.pools:
                queries = self._turned(queries, self.rotary)
                summary = dataclasses.replace(summary, key_means=self._turned(summary.key_means, self.rotary))
            result = record.attend(queries, summary, **settings)
            if not isinstance(result.output, Tensor):
                result = spread_parts(result, query.shape[:-1], query.dtype, None)
        return AttentionResult(self.out_proj(self._joined(result.output, 1)), None, result.attention)

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
        if record.condense is not None:
            query, key, value = (self._heads(linear(x), 1) for linear in (self.q_proj, self.k_proj, self.v_proj))
            summary = make_summary(key, value, needs, weights.with_batch_dim(-1))
            settings = self._settings()
            result, then = attend_condensed(
                record, query, summary, self.options, mode, settings, past=past, window=window
            )
            held = [None if k == mode or v is None else v.clone() for k, v in enumerate(weights.vectors)]
            return self.out_proj(self._joined(result.output, 1)), dataclasses.replace(then(), mode_weights=tuple(held))
        if record.query == "positions":
            summary, after = causal_summary(x, x, needs, weights, mode, past=past, window=window)
            return self._from_frames(x, self._project(summary, x.dtype), mode, self._settings()).output, after()
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
            summary = self._project(make_summary(seen, seen, needs, spoken), x.dtype)
            outputs.append(self._from_positions(part, summary, self._settings(causal=mode)).output)
        assert past is not None
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1 + mode), past

    # --------------------------------------------------------------------------------------------------------- project

    def _project(self, summary: Summary, dtype: torch.dtype) -> Summary:
        """Call the projections with a summary of inputs; return that of keys and values, heads the last batch dim."""
        summary = summary.in_type(dtype)
        if self.mode_projections:
            keys = self._project_modes(summary.key_means, self.k_proj)
        else:
            keys = summary.key_means.project(self.k_proj, self.num_heads)
        values = summary.value_means.project(self.v_proj, self.num_heads)
        found = dataclasses.replace(summary.with_heads(), key_means=keys, value_means=values)
        if summary.covariance is None or summary.key_covariance is None:
            return found
        to_keys, to_values = (
            self._linear_part(to, c, dtype) for to, c in ((self.k_proj, self.kdim), (self.v_proj, self.vdim))
        )
        moments = []
        for moment, left in ((summary.covariance, to_values), (summary.key_covariance, to_keys)):
            of_left = matmul(left.mT.to(moment.dtype), moment.unsqueeze(-3))
            moments.append(matmul(of_left, to_keys.to(moment.dtype)))
        return dataclasses.replace(found, covariance=moments[0], key_covariance=moments[1])

    def _linear_part(self, linear: Callable[[Tensor], Tensor], channels: int, dtype: torch.dtype) -> Tensor:
        """Return the matrix of each head of an affine map ``(H, C, D)`` by calling it: f(I) − f(0)."""
        unit = torch.eye(channels + 1, channels, dtype=dtype, device=self._device())
        mapped = linear(unit)
        return (mapped[:-1] - mapped[-1:]).unflatten(-1, (self.num_heads, -1)).transpose(0, 1)

    def _device(self) -> torch.device | None:
        """Return where the parameters are."""
        parameter = parameter_of(self)
        return None if parameter is None else parameter.device

    def _project_queries(self, means: Means) -> Means:
        """Call the projection of the queries with averages."""
        if self.mode_projections:
            return self._project_modes(means, self.q_proj)
        return means.project(self.q_proj, self.num_heads)

    def _project_modes(self, means: Means, linear: Callable[[Tensor], Tensor]) -> Means:
        """Call a projection that has one map a mode, below each other, and take from it what is of the mode."""
        mapped, width = means.project(linear, None), self.embed_dim
        found = {kept: mapped.get(kept)[..., kept[0] * width : (kept[0] + 1) * width] for kept in means.family}
        return Means.of(means.sizes, {kept: self._heads(part, 1) for kept, part in found.items()}, 2)

    def _heads(self, tensor: Tensor, batch: int) -> Tensor:
        """Split channels into heads, the last batch dimension: ``(*batch, *, C)`` to ``(*batch, H, *, D)``."""
        return tensor.unflatten(-1, (self.num_heads, -1)).movedim(-2, batch)

    def _joined(self, tensor: Tensor, batch: int) -> Tensor:
        """Join heads into channels: ``(*batch, H, *, D)`` to ``(*batch, *, C)``."""
        return tensor.movedim(batch, -2).flatten(-2)

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


def _means_of(x: Tensor, summary: Summary | None, family: Sequence[tuple[int, ...]], weights: Weights) -> Means:
    """Return the means of what queries are made of: those that a summary of it holds, and the tensor itself."""
    batch, order = x.dim() - weights.order - 1, weights.order
    small = tuple([kept for kept in family if len(kept) < order or order == 1])
    if summary is not None and order > 1 and all([kept in summary.key_means.family for kept in small]):
        blocks = [(small, summary.key_means.joined(small))]
        if len(small) < len(family):
            blocks.append(((tuple(range(order)),), x.flatten(batch, -2)))
        return Means(tuple(x.shape[batch:-1]), tuple(blocks))
    found = dict(zip(family, marginal_means(x, tuple(family), weights), strict=True))
    return Means.of(x.shape[batch:-1], found, batch)


def _tensors_of(summary: Any) -> list[Tensor]:
    """List the tensors of a summary, or of what it was condensed to, that may be differentiated."""
    if not isinstance(summary, Summary):
        return summary.tensors
    means = [rows for part in (summary.key_means, summary.value_means) for _, rows in part.blocks]
    return [*means, *[moment for moment in (summary.covariance, summary.key_covariance) if moment is not None]]


def _in_type(norm: nn.LayerNorm) -> Callable[[Tensor], Tensor]:
    """Call a norm with what it is given in the type of its parameters, and return the type that it was given."""

    def normed(pooled: Tensor) -> Tensor:
        parameter = parameter_of(norm)
        return norm(pooled if parameter is None else pooled.to(parameter.dtype)).to(pooled.dtype)

    return normed


def _check_heads(embed_dim: int, num_heads: int) -> None:
    """Check that heads divide the channels."""
    for name, count in (("embed_dim", embed_dim), ("num_heads", num_heads)):
        check(count, name, "integer")
    if embed_dim < 1 or num_heads < 1:
        raise OptionError(f"embed_dim and num_heads must be at least 1, got {embed_dim} and {num_heads}.")
    if embed_dim % num_heads:
        raise OptionError(f"embed_dim must be divisible by num_heads, got {embed_dim} and {num_heads}.")


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
