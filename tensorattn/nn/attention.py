"""One module for every operator: project, attend, project back."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorattn.averages import check_whole
from tensorattn.contraction import expand
from tensorattn.contraction_tree import main_effects
from tensorattn.errors import OptionError, TensorAttentionError
from tensorattn.modes import GridShape, ModeSpec, mode_subsets
from tensorattn.nn.layout import channels_last, check_input, check_parameters, reading
from tensorattn.operators import get_operator
from tensorattn.operators.operator import default_scale
from tensorattn.operators.position import frames_first, frames_last
from tensorattn.options import check_count, check_probability, check_switch
from tensorattn.positionwise import map_positions
from tensorattn.running import Past, continued_frames, continued_summary, running_summary
from tensorattn.summarizing import self_summary
from tensorattn.summary import Summary
from tensorattn.weights import Vector, Vectors, accumulation_dtype, check_weights

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
            _check_heads(embed_dim, num_heads)
            check_probability(dropout, "dropout")
            for name, given in (("mode_projections", mode_projections), ("qk_norm", qk_norm)):
                if given and not record.pools:
                    raise OptionError(f"{name} has no meaning for operator {operator!r}: it does not pool its queries.")
            if self.causal is not None and "causal" in record.lacks:
                raise OptionError(f"causal has no meaning for operator {operator!r}: {record.lacks['causal']}.")
        except TensorAttentionError as cause:
            raise cause.retold("TensorAttention") from None
        embed_dim, num_heads = int(embed_dim), int(num_heads)
        self.embed_dim, self.num_heads, self.operator = embed_dim, num_heads, operator
        self.channels_first, self.dropout, self.mode_projections = channels_first, dropout, mode_projections
        rows = embed_dim * (self.modes.order if mode_projections else 1)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(embed_dim, rows, bias, **factory)
        self.k_proj = nn.Linear(embed_dim, rows, bias, **factory)
        self.v_proj = nn.Linear(embed_dim, embed_dim, bias, **factory)
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
        if self.causal is not None:
            parts.append(f"causal={self.modes.names[self.causal]!r}")
        if self.mode_projections:
            parts.append("mode_projections=True")
        return ", ".join(parts)

    def forward(
        self,
        x: Tensor,
        *,
        weights: Sequence[Vector] | None = None,
        skip: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: Input, channels last or first as the module was told.
            weights: One non-negative vector a mode, ``(n_m,)`` or ``(B, n_m)``, or None for equal weights:
                multiplicities, so 2 counts an index twice and 0 leaves it out.
            skip: A tensor of the shape of the input that is added to the output while that is written, as for a skip
                connection; ``x`` itself or another one.
            out: Where to write the output, of the shape and type of the input. No derivative goes through it.

        Returns:
            The output, of the shape of the input: ``out`` where it is given.

        Raises:
            ShapeError: If the input has the wrong number of dimensions or channels, or an empty mode, or if ``skip`` or
                ``out`` has another shape.
            DtypeError: If a tensor is not floating point, or the types differ.
            WeightsError: If weights have the wrong length, are negative, not finite, or all zero.
            OptionError: If ``out`` is given where derivatives are asked for.
        """
        try:
            grid = check_input(x, self.modes, self.embed_dim, channels_first=self.channels_first)
            check_parameters(x, self.q_proj.weight)
            if skip is not None or out is not None:
                check_whole(x.shape, (x, *self.parameters()), skip, out)
            last = channels_last(x, self.channels_first)
            checked = check_weights(weights, grid, last, self.modes)
        except TensorAttentionError as cause:
            told = reading(x, self.modes, channels_first=self.channels_first)
            raise cause.retold("TensorAttention", told) from None
        added = last if skip is x else None if skip is None else channels_last(skip, self.channels_first)
        y = self._attend(last, grid, checked, added, None if out is None else channels_last(out, self.channels_first))
        if out is not None:
            return out
        return y.movedim(-1, 1) if self.channels_first else y

    def _attend(self, x: Tensor, grid: GridShape, weights: Vectors, skip: Tensor | None, out: Tensor | None) -> Tensor:
        """Summarise the input once, project the summary, attend, project back."""
        operator, settings = get_operator(self.operator), self._settings()
        needs = operator.needs(self.modes.order, **self.options)
        if self.causal is not None and operator.query == "positions":
            summary = running_summary(x, x, needs, weights, self.causal)
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
            query, projected = self._split(self.q_proj(passed), 1), self._project(summary)
            output = operator.attend(query, projected, **settings, **self._gain(), **self._causality()).output
        return _added(self.out_proj(self._join(output, 1)), skip, out)

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
            query = self._split(self.q_proj(part), 1)
            result = operator.attend(query, projected, **self._settings(), **self._gain(), causal=mode)
            outputs.append(self.out_proj(self._join(result.output, 1)))
        assert past is not None
        return _added(outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1 + mode), skip, out), past

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
                self._split(F.linear(part, *pair), batch)
                for pair, linear in zip(pairs, maps, strict=True)
                if linear is not self.out_proj
            )
            extra = {**dict(zip(gain, rest, strict=True)), **({"own": tuple(own)} if own else {})}
            output = operator.attend(query, given, **settings, **extra).output
            return F.linear(self._join(output, batch), *pairs[1])

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
                "query_norm": functools.partial(_norm, self.q_norm),
                "key_norm": functools.partial(_norm, self.k_norm),
            }
        queries = tuple(
            self._split(_linear(summary.key(subset), *self._rows(self.q_proj, mode)), 1)
            for mode, subset in enumerate(kept)
        )
        output = get_operator(self.operator).attend(queries, self._project(summary), **settings).output
        if isinstance(output, Tensor):
            return output
        weight, bias = self.out_proj.weight, self.out_proj.bias
        return tuple(
            _linear(self._join(part, 1), weight, bias if mode == 0 else None) for mode, part in enumerate(output)
        )

    def _project(self, summary: Summary) -> Summary:
        """Project a summary of the input to that of keys and values, with heads as last batch dimension."""

        def projected(of: Summary, mode: int) -> Summary:
            weight, bias = self._rows(self.k_proj, mode)
            value = self.v_proj
            return of.project(weight, value.weight, key_bias=bias, value_bias=value.bias, num_heads=self.num_heads)

        first = projected(summary, 0)
        if not self.mode_projections:
            return first
        nothing = (None,) * len(summary.kept)
        keys = list(first.keys)
        for mode in range(1, self.modes.order):
            place = summary.place((mode,))
            alone = (*nothing[:place], summary.keys[place], *nothing[place + 1 :])
            keys[place] = projected(dataclasses.replace(summary, keys=alone, values=nothing), mode).keys[place]
        return dataclasses.replace(first, keys=tuple(keys))

    def _rows(self, linear: nn.Linear, mode: int) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the linear map of one mode; all modes share it unless each has its own."""
        start = mode * self.embed_dim if self.mode_projections and mode < self.modes.order else 0
        rows = slice(start, start + self.embed_dim)
        return linear.weight[rows], None if linear.bias is None else linear.bias[rows]

    def _split(self, tensor: Tensor, batch: int) -> Tensor:
        """Split channels into heads, the last batch dimension: ``(B, *, C)`` to ``(B, H, *, D)``."""
        return tensor.unflatten(-1, (self.num_heads, -1)).movedim(-2, batch)

    @staticmethod
    def _join(tensor: Tensor, batch: int) -> Tensor:
        """Join heads into channels: ``(B, H, *, D)`` to ``(B, *, C)``."""
        return tensor.movedim(batch, -2).flatten(-2)


def _linear(mean: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply a linear map to averages in their own type."""
    return F.linear(mean, weight.to(mean.dtype), None if bias is None else bias.to(mean.dtype))


def _added(y: Tensor, skip: Tensor | None, out: Tensor | None) -> Tensor:
    """Add what is skipped, and write to where it is wanted."""
    if out is not None:
        return out.copy_(y) if skip is None else torch.add(y, skip, out=out)
    return y if skip is None else y + skip


def _norm(norm: nn.LayerNorm, pooled: Tensor) -> Tensor:
    """Apply a LayerNorm to pooled queries or keys in their own type."""
    weight, bias = norm.weight.to(pooled.dtype), norm.bias.to(pooled.dtype)
    return F.layer_norm(pooled, norm.normalized_shape, weight, bias, norm.eps)


def _check_heads(embed_dim: int, num_heads: int) -> None:
    """Check that heads divide the channels."""
    for name, count in (("embed_dim", embed_dim), ("num_heads", num_heads)):
        check_count(count, name)
    if embed_dim < 1 or num_heads < 1:
        raise OptionError(f"embed_dim and num_heads must be at least 1, got {embed_dim} and {num_heads}.")
    if embed_dim % num_heads:
        raise OptionError(f"embed_dim must be divisible by num_heads, got {embed_dim} and {num_heads}.")
