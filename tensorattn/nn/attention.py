"""One module for every operator: project, attend, project back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorattn.averages.means import check_same_shape
from tensorattn.errors import OptionError, check, check_scale, integers, retells
from tensorattn.functional.cells import Cells, find_cells
from tensorattn.functional.maps import base_of, place_on
from tensorattn.functional.operator import check_indices, get_operator
from tensorattn.functional.summary import Summary
from tensorattn.masks import GivenWeights, Lengths, Mask, Part, Weights, beside, read_weights, without_absent
from tensorattn.modes import ModeSpec, mode_subsets
from tensorattn.nn.bias import PositionBias
from tensorattn.nn.checks import check_heads, check_meaning, check_position_bias, check_rotary, check_sharding
from tensorattn.nn.context import Context, ContextReader, check_crossing
from tensorattn.nn.layout import channels_last, check_input, check_parameters
from tensorattn.nn.parameters import draw_linear, parameter_of, reset_parts
from tensorattn.nn.pipeline import AttentionPipeline
from tensorattn.nn.prefix import check_prefix, check_prefix_meaning
from tensorattn.nn.rotary import RotaryEmbedding
from tensorattn.nn.weights import settings_of, unpack
from tensorattn.sharding import Sharding, call_shared_out, in_common, is_shared_out

__all__ = ["TensorAttention"]


class TensorAttention(AttentionPipeline):
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
        if isinstance(qk_norm, nn.Module):
            kind = type(qk_norm).__name__
            raise OptionError(f"qk_norm must be what makes a norm of the head size, got a module: {kind}.")
        if not callable(qk_norm):
            check(qk_norm, "qk_norm", "switch")
        check_scale(scale)
        if project not in ("averages", "positions"):
            raise OptionError(f"project must be 'averages' or 'positions', got {project!r}.")
        self.causal = None if causal is None else self.modes.index(causal)
        if options.get("kept") is not None:
            subsets = mode_subsets(options["kept"])
            options["kept"] = tuple(tuple(self.modes.index(mode) for mode in kept) for kept in subsets)
        self.head_dim, self.num_kv_heads = check_heads(embed_dim, num_heads, head_dim, num_kv_heads)
        self.embed_dim, self.num_heads, self.operator = int(embed_dim), int(num_heads), operator
        self.scale = None if scale is None else float(scale)
        cells = options.get("cells")
        self._options = record.with_defaults({**options, "cells": "keys"} if isinstance(cells, Cells) else options)
        if isinstance(cells, Cells):
            self.hold_cells(cells)
        record.needs(self.modes.order, **self.options)  # refuses values out of range
        check(dropout, "dropout", "probability")
        check(proj_drop, "proj_drop", "probability")
        given = {"mode_projections": mode_projections, "project": project, "qk_norm": bool(qk_norm)}
        given.update(causal=self.causal is not None, dropout=dropout > 0)
        check_meaning(record, self.options, given)
        if position_bias is not None:
            check_position_bias(position_bias, record, self.options, self.modes, num_heads)
        if rotary is not None:
            check_rotary(rotary, record, self.options, self.modes, self.head_dim)
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
    @in_common
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
        sharding: Sharding | None = None,
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
        - ``additive`` and ``truncated`` are joined with full attention to the tokens by their log-sum-exp, for
          ``additive`` the sum of those of the modes less N − 1 times the logarithm of P, which is exact where keys are
          additive; ``clustered`` likewise, whose log-sum-exp is an approximation as its output is. With
          ``include_self`` tokens have no average of their own.
        - Averages hide a part of the variance of the logits. Where it is large, log-sum-exps of averages are too small
          by half of it, and tokens weigh more than they would in full attention: 2 to 3 times where 800 keys are noise
          and logits have a standard deviation of 1.5. ``interaction="linear"`` adds what is missing.
        - ``axial``, ``kao_qkv``, ``kronecker_product`` and ``kronecker_sum``, whose queries stand on the grid: the
          tokens see themselves and all positions by full attention, for which all of these are projected; the grid
          sees the grid, and not the tokens.

        With a ``sharding`` the input is the box of this process, and keys and values are those of all. Averages, and
        cells that are fixed, take one all-reduce; ``axial`` and the Kronecker operators exchange fibres of each mode
        that is cut, ``flattened`` gathers all, and ``causal`` along a cut mode the sums of what is earlier.
        ``clustered`` searches among the same candidates everywhere, which are added up too; with a mask the weights of
        all positions are gathered. A DTensor tells its sharding itself, and the output is one with the same placements.

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
            sharding: How the whole is shared out, of which the input is the box of this process; None for no whole.

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
        if is_shared_out(x):
            spoken = {"context": context, "weights": weights, "mask": mask, "lengths": lengths, "skip": skip}
            spoken = {name: each for name, each in {**spoken, "prefix": prefix}.items() if each is not None}
            return call_shared_out(self, x, sharding, spoken, channels_first=self.channels_first)
        part = None if sharding is None else check_sharding(self, sharding, context=context, prefix=prefix)
        weights_of_x, summary = self._read(x, context, part, weights=weights, mask=mask, lengths=lengths)
        last, present = channels_last(x, self.channels_first), weights_of_x.present
        if prefix is not None:
            check_prefix_meaning(context=context, causal=self.causal, mode_projections=self.mode_projections)
            check_prefix(prefix, x, self.embed_dim)
        if skip is not None:
            check_same_shape("skip", skip, x.shape, x)
        # What an absent position holds must not meet a zero, not even that of a gradient.
        result, beside = self._attend(without_absent(last, present), weights_of_x, summary, prefix)
        y = self.finished(result.output, present, skip)
        if beside is None:
            return y
        return y, F.dropout(beside, self.proj_drop, self.training) if self.proj_drop > 0 else beside

    @retells
    @in_common
    def summarize(
        self,
        context: Tensor | tuple[Tensor, Tensor],
        *,
        weights: GivenWeights = None,
        mask: Mask = None,
        lengths: Lengths | Mapping[Any, Any] = None,
        sharding: Sharding | None = None,
    ) -> Summary:
        """Summarise a context once, to attend to it often.

        It is the summary of the context itself, before the linear maps: it stays right while they are trained, and
        serves every layer of the same operator, options and channels.

        Args:
            context: What keys and values are made of, as in `forward`.
            weights: Weights of the context, as in `forward`.
            mask: Mask of the context.
            lengths: Lengths of the context.
            sharding: How the context is shared out, of which each process gives its box; all get the same summary.

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
        spoken = {"weights": weights, "mask": mask, "lengths": lengths, "sharding": sharding}
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
        last = without_absent(channels_last(x, self.channels_first), weights_of_x.present)
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
        last = without_absent(channels_last(x, self.channels_first), weights_of_x.present)
        sizes = tuple(last.shape[1:-1])
        place = place_on(sizes, integers(at, "at"))
        if record.spread is None:
            raise OptionError(f"operator {record.name!r} has no map.")
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
        last = without_absent(channels_last(x, self.channels_first), spoken.present)
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
            OptionError: If the operator takes no cells, or they do not fit the heads or the other options.
        """
        if "cells" not in self._options:
            raise OptionError(f"operator {self.operator!r} takes no cells.")
        if not isinstance(cells, Cells):
            raise OptionError(f"cells must be Cells, got {type(cells).__name__}.")
        held = {}
        for name, rows in (("centres", cells.tokens), ("metric", self.head_dim)):
            part, needed = getattr(cells, name), (self.num_kv_heads, rows, self.head_dim)
            shape = tuple(part.shape)
            if shape[-2:] != needed[-2:] or shape[:-2] not in ((), (1,), needed[:1]):
                raise OptionError(f"cells have {name} of shape {shape}, but the heads need {needed}.")
            held[f"cell_{name}"] = part.detach().expand(needed).clone()
        record = get_operator(self.operator)
        record.needs(self.modes.order, **{**self._options, "cells": cells})  # refuses what does not go with them
        for name, buffer in held.items():
            self.register_buffer(name, buffer)

    # ------------------------------------------------------------------------------------------------------------ read

    def _read(
        self, x: Tensor, context: Context | None, part: Part | None = None, **spoken: Any
    ) -> tuple[Weights, Summary | None]:
        """Check the input and what was said of its positions, or of those of a context, and summarise that."""
        grid = check_input(x, self.modes, self.embed_dim, channels_first=self.channels_first, part=part)
        check_parameters(x, parameter_of(self.q_proj))
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
        told = (spoken["weights"], spoken["mask"], spoken["lengths"])
        weights = read_weights(*told, grid, x, self.modes, of="x", part=part)
        check_indices(self._needs(), weights)
        return weights, None

    def _context_reader(self) -> ContextReader:
        """Return what reads a context."""
        operator, dims = get_operator(self.operator), (self.kdim, self.vdim)
        return ContextReader(operator, self.options, self.causal, self.modes, dims, self.channels_first)
