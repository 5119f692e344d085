"""One module for every operator: project, attend, project back."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorattn.averages import check_whole
from tensorattn.causal import causal_summary
from tensorattn.contraction import expand
from tensorattn.contraction_tree import main_effects
from tensorattn.errors import OptionError, TensorAttentionError
from tensorattn.modes import GridShape, ModeSpec, mode_subsets
from tensorattn.nn.context import Context, ContextReader, check_crossing
from tensorattn.nn.layout import channels_last, check_input, check_layer_presence, check_parameters, reading
from tensorattn.nn.projections import (
    added,
    apply_linear,
    apply_norm,
    check_heads,
    join_heads,
    project_summary,
    rows_of,
    split_heads,
)
from tensorattn.operators import get_operator
from tensorattn.operators.operator import check_grid_weights, default_scale
from tensorattn.operators.position import frames_first, frames_last
from tensorattn.options import check_count, check_probability, check_switch
from tensorattn.positionwise import map_positions
from tensorattn.presence import GivenWeights, Lengths, Mask
from tensorattn.running import Past, continued_frames, continued_summary
from tensorattn.summarizing import self_summary
from tensorattn.summary import Summary
from tensorattn.weights import Vectors, Weights, accumulation_dtype, without_absent

__all__ = ["TensorAttention"]


class TensorAttention(nn.Module):
    r"""Multi-head attention over a tensor of any order, without flattening it: to itself, or to a context.

    Queries, keys and values are linear maps of the input. As averages of a linear map are the linear map of the
    averages, the module averages its input once and projects the averages: S = n_1 + … + n_N rows instead of
    P = n_1 ⋯ n_N, wherever the operator works on averages. It keeps nothing that depends on the sizes of the modes, so
    one module takes inputs of any size.

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
        mode_projections: Whether queries and keys have a linear map of their own for each mode; for the Kronecker
            operators.
        qk_norm: Whether pooled queries and keys go through a LayerNorm each; for the Kronecker operators.
        device: Device of the parameters.
        dtype: Type of the parameters.
        **options: Options of the operator, such as ``centered=True`` for ``"kao_qkv"``, or
            ``kept=[("t",), ("h", "w")]`` for ``"truncated"``. With ``interaction="linear"`` the correction has a
            learnable factor a head, which starts at one.

    Raises:
        OptionError: If ``num_heads`` does not divide ``embed_dim``, ``dropout`` is not a probability, there is no
            such operator or option, or an argument has no meaning for the operator.
        ModesError: If modes are named badly, or an option names a mode that does not exist.

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
        kdim: int | None = None,
        vdim: int | None = None,
        causal: int | str | None = None,
        mode_projections: bool = False,
        qk_norm: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        try:
            self.modes = ModeSpec.parse(modes)
            record = get_operator(operator)
            switches = {"channels_first": channels_first, "bias": bias}
            for name, value in {**switches, "mode_projections": mode_projections, "qk_norm": qk_norm}.items():
                check_switch(value, name)
            self.causal = None if causal is None else self.modes.index(causal)
            if options.get("kept") is not None:
                subsets = mode_subsets(options["kept"])
                options["kept"] = tuple(tuple(self.modes.index(mode) for mode in kept) for kept in subsets)
            self.options = record.with_defaults(options)
            record.needs(self.modes.order, **self.options)  # refuses values out of range
            check_heads(embed_dim, num_heads)
            check_probability(dropout, "dropout")
            for name, given in (("mode_projections", mode_projections), ("qk_norm", qk_norm)):
                if given and not record.pools:
                    raise OptionError(f"{name} has no meaning for operator {operator!r}: it does not pool its queries.")
            if self.causal is not None and "causal" in record.lacks:
                raise OptionError(f"causal has no meaning for operator {operator!r}: {record.lacks['causal']}.")
            for name, dim in (("kdim", kdim), ("vdim", vdim)):
                if dim is not None:
                    check_count(dim, name)
                    check_crossing(record, self.options, self.causal, name)
                    if dim < 1:
                        raise OptionError(f"{name} must be at least 1, got {dim}.")
        except TensorAttentionError as cause:
            raise cause.retold("TensorAttention") from None
        embed_dim, num_heads = int(embed_dim), int(num_heads)
        self.embed_dim, self.num_heads, self.operator = embed_dim, num_heads, operator
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
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew, Xavier uniform, and set biases to zero and gains to one."""
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            for block in linear.weight.split(self.embed_dim):
                nn.init.xavier_uniform_(block)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                norm.reset_parameters()
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
        return ", ".join(parts)

    def forward(
        self,
        x: Tensor,
        context: Context | None = None,
        *,
        weights: GivenWeights = None,
        mask: Mask = None,
        lengths: Lengths | Mapping[Any, Any] = None,
        skip: Tensor | None = None,
        out: Tensor | None = None,
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
            skip: A tensor of the shape of the input that is added to the output while that is written, as for a skip
                connection; ``x`` itself or another one.
            out: Where to write the output, of the shape and type of the input. No derivative goes through it.

        Returns:
            The output, of the shape of the input: ``out`` where it is given.

        Raises:
            ShapeError: If a tensor has the wrong number of dimensions or channels, or an empty mode, if ``skip`` or
                ``out`` has another shape than the input, or the mask or lengths do not fit.
            DtypeError: If a tensor is not floating point, the types differ, the mask is not bool, or lengths are not
                integers.
            WeightsError: If weights have the wrong length, are negative, not finite, or all zero, or a length is
                negative or longer than its mode.
            OptionError: If ``out`` is given where derivatives are asked for, or an argument has no meaning for the
                operator or with another one.

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
        operator = get_operator(self.operator)
        spoken: dict[str, Any] = {"weights": weights, "mask": mask, "lengths": lengths}
        try:
            grid = check_input(x, self.modes, self.embed_dim, channels_first=self.channels_first)
            check_parameters(x, self.q_proj.weight)
            if skip is not None or out is not None:
                check_whole(x.shape, (x, *self.parameters()), skip, out)
            last = channels_last(x, self.channels_first)
            if context is None:
                if (self.kdim, self.vdim) != (self.embed_dim, self.embed_dim):
                    raise OptionError(
                        f"context is missing: keys are made of {self.kdim} channels and values of {self.vdim}, but x "
                        f"has {self.embed_dim}."
                    )
                given = check_layer_presence(grid, last, self.modes, **spoken)
                check_grid_weights(operator, self.options, given)
            else:
                summary = self._context_reader().read(context, x, self.k_proj.weight, **spoken)
        except TensorAttentionError as cause:
            told = reading(x, self.modes, channels_first=self.channels_first)
            raise cause.retold("TensorAttention", told) from None
        added_last = last if skip is x else None if skip is None else channels_last(skip, self.channels_first)
        target = None if out is None else channels_last(out, self.channels_first)
        if context is not None:
            y = self._attend_positions(last, summary, self._settings(), added_last, target)
        elif given.present is None:
            y = self._attend(last, grid, given.weights, added_last, target)
        else:  # what an absent position holds must not meet a zero, not even that of a gradient: it may be NaN
            y = self._attend(without_absent(last, given.present), grid, given.weights, None, None)
            y = added(without_absent(y, given.present), added_last, target)
        if out is not None:
            return out
        return y.movedim(-1, 1) if self.channels_first else y

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
        try:
            spoken = {"weights": weights, "mask": mask, "lengths": lengths}
            return self._context_reader().summarize(context, self.k_proj.weight, **spoken)
        except TensorAttentionError as cause:
            raise cause.retold("TensorAttention.summarize") from None

    def _context_reader(self) -> ContextReader:
        """Return what reads a context."""
        operator, dims = get_operator(self.operator), (self.kdim, self.vdim)
        return ContextReader(operator, self.options, self.causal, self.modes, dims, self.channels_first)

    def _attend(self, x: Tensor, grid: GridShape, weights: Weights, skip: Tensor | None, out: Tensor | None) -> Tensor:
        """Summarise the input once, project the summary, attend, project back."""
        operator, settings = get_operator(self.operator), self._settings()
        needs = operator.needs(self.modes.order, **self.options)
        if self.causal is not None and operator.query == "positions":
            summary = causal_summary(x, x, needs, weights, self.causal)
            return self._attend_frames(x, summary, self.causal, skip, out)
        summary, passed = self_summary(x, needs, weights)
        skip = passed if skip is x else skip
        if operator.query == "positions":
            return self._attend_positions(passed, summary, settings, skip, out)
        if operator.takes_means(**self.options):
            output = self._attend_means(passed, summary, settings)
            if isinstance(output, tuple):
                effects = main_effects(self.modes.order)
                return expand(output, effects, grid, dtype=x.dtype, skip=skip, out=out, like=x)
        else:
            query, projected = self._heads(self.q_proj(passed), 1), self._project(summary)
            output = operator.attend(query, projected, **settings, **self._gain(), **self._causality()).output
        return added(self.out_proj(join_heads(output, 1)), skip, out)

    def continued(
        self,
        x: Tensor,
        weights: Vectors,
        past: Past | None,
        *,
        window: int | None = None,
        skip: Tensor | None = None,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Past]:
        """Attend from frames of the causal mode that follow others, unchecked: a step of `AttentionStream`.

        Args:
            x: The frames, channels last.
            weights: Checked weights of each mode, or None.
            past: What is known of the frames before; None for none.
            window: How many frames are seen, the own one included; None for all.
            skip: A tensor that is added to the output.
            out: Where to write the output.

        Returns:
            The output, and what is known after these frames.
        """
        operator, mode = get_operator(self.operator), self.causal
        assert mode is not None
        needs = operator.needs(self.modes.order, **self.options)
        if operator.query == "positions":
            summary, past = continued_summary(x, needs, weights, mode, past=past, window=window)
            return self._attend_frames(x, summary, mode, skip, out), past
        whole = 1 if window is not None else x.shape[1 + mode]
        outputs = []
        for start in range(0, x.shape[1 + mode], whole):  # with a window, each frame sees other frames
            part = x.narrow(1 + mode, start, whole)
            own = tuple(w.narrow(-1, start, whole) if k == mode and w is not None else w for k, w in enumerate(weights))
            seen, vectors, past = continued_frames(part, own, mode, past=past, window=window)
            projected = self._project(self_summary(seen, needs, vectors)[0])
            query = self._heads(self.q_proj(part), 1)
            result = operator.attend(query, projected, **self._settings(), **self._gain(), causal=mode)
            outputs.append(self.out_proj(join_heads(result.output, 1)))
        assert past is not None
        return added(outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1 + mode), skip, out), past

    def _settings(self) -> dict[str, Any]:
        """What the operator is told at every call."""
        return {
            "scale": default_scale(self.embed_dim // self.num_heads),
            "dropout_p": self.dropout if self.training else 0.0,
            "return_lse": False,
            "return_attention": False,
            **self.options,
        }

    def _attend_frames(self, x: Tensor, summary: Summary, mode: int, skip: Tensor | None, out: Tensor | None) -> Tensor:
        """Attend from each frame to what it may know of those up to its own."""
        frames = frames_first(x, mode, 1)
        added = frames if skip is x else None if skip is None else frames_first(skip, mode, 1)
        target = None if out is None else frames_first(out, mode, 1)
        return frames_last(self._attend_positions(frames, summary, self._settings(), added, target), mode, 1)

    def _attend_positions(
        self, x: Tensor, summary: Summary, settings: dict[str, Any], skip: Tensor | None, out: Tensor | None
    ) -> Tensor:
        """Attend from each position by itself: project it, attend, project back, for a slab of positions at a time."""
        operator, batch = get_operator(self.operator), len(summary.batch)
        summary = self._project(summary)
        held, gain = summary.tensors, self._gain()
        maps = [self.q_proj, self.out_proj, *((self.k_proj, self.v_proj) if self.options.get("include_self") else ())]
        matrices = [tensor for linear in maps for tensor in (linear.weight, linear.bias) if tensor is not None]

        def attend(part: Tensor, *tensors: Tensor) -> Tensor:
            given, rest = summary.with_tensors(tensors), iter(tensors[len(held) :])
            pairs = [(next(rest), None if linear.bias is None else next(rest)) for linear in maps]
            query, *own = (
                self._heads(F.linear(part, *pair), batch)
                for pair, linear in zip(pairs, maps, strict=True)
                if linear is not self.out_proj
            )
            extra = {**dict(zip(gain, rest, strict=True)), **({"own": tuple(own)} if own else {})}
            output = operator.attend(query, given, **settings, **extra).output
            return F.linear(join_heads(output, batch), *pairs[1])

        tensors = (*held, *matrices, *gain.values())
        random = settings["dropout_p"] > 0
        return map_positions(attend, x, tensors, batch=batch, random=random, skip=skip, out=out)

    def _gain(self) -> dict[str, Tensor]:
        """Factor of the interaction correction a head, if there is one."""
        gain = self.interaction_gain
        return {} if gain is None else {"gain": gain.to(accumulation_dtype(gain.dtype))}

    def _causality(self) -> dict[str, int]:
        """The causal mode, for operators over the grid, if there is one."""
        return {} if self.causal is None else {"causal": self.causal}

    def _attend_means(self, x: Tensor, summary: Summary, settings: dict[str, Any]) -> Tensor | tuple[Tensor, ...]:
        """Attend from averages: queries are projected in S rows, and so is an output that is an outer sum."""
        kept = [*main_effects(self.modes.order), *(() for _ in (0,) if () in summary.kept)]
        if self.q_norm is not None and self.k_norm is not None:
            settings |= {
                "query_norm": functools.partial(apply_norm, self.q_norm),
                "key_norm": functools.partial(apply_norm, self.k_norm),
            }
        queries = tuple(
            self._heads(apply_linear(summary.key(subset), *rows_of(self.q_proj, mode, self.embed_dim)), 1)
            for mode, subset in enumerate(kept)
        )
        output = get_operator(self.operator).attend(queries, self._project(summary), **settings).output
        if isinstance(output, Tensor):
            return output
        weight, bias = self.out_proj.weight, self.out_proj.bias
        return tuple(
            apply_linear(join_heads(part, 1), weight, bias if mode == 0 else None) for mode, part in enumerate(output)
        )

    def _project(self, summary: Summary) -> Summary:
        """Project a summary of the input to that of keys and values, with heads as last batch dimension."""
        return project_summary(summary, self.k_proj, self.v_proj, self.num_heads)

    def _heads(self, tensor: Tensor, batch: int) -> Tensor:
        """Split channels into heads."""
        return split_heads(tensor, self.num_heads, batch)
