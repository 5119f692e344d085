"""The inside of an attention layer: its parameters, and the ways from checked inputs to outputs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tensorattn.causal import causal_summary
from tensorattn.contraction import expand
from tensorattn.contraction_tree import main_effects
from tensorattn.errors import OptionError, ShapeError, TensorAttentionError
from tensorattn.modes import GridShape, ModeSpec, mode_subsets
from tensorattn.nn.absorption import absorbed, absorbs
from tensorattn.nn.context import check_crossing
from tensorattn.nn.position_bias import PositionBias
from tensorattn.nn.projections import (
    added,
    apply_norm,
    check_heads,
    join_heads,
    mapped,
    project_means,
    project_summary,
)
from tensorattn.nn.rotary import RotaryEmbedding
from tensorattn.operators import get_operator
from tensorattn.operators.maps import base_of, indices_of
from tensorattn.operators.operator import AttentionResult, Needs, Operator, default_scale
from tensorattn.operators.position import Bias, frames_first, frames_last
from tensorattn.operators.spreading import place_on
from tensorattn.options import check_count, check_probability, check_switch
from tensorattn.positionwise import map_positions
from tensorattn.running import Past, continued_frames, continued_summary
from tensorattn.summarizing import self_summary
from tensorattn.summary import Summary, apply_linear, split_heads
from tensorattn.tokens import join_tokens
from tensorattn.weights import GridWeights, Vectors, Weights, accumulation_dtype, beside, in_type

__all__ = ["AttentionCore"]


class AttentionCore(nn.Module):
    """Parameters of a layer, and what it does with inputs that are checked and have their channels last.

    `TensorAttention` tells the arguments.
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
        position_bias: PositionBias | None = None,
        rotary: RotaryEmbedding | None = None,
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
            if position_bias is not None:
                _check_position_bias(position_bias, record, self.modes, num_heads)
            if rotary is not None:
                _check_rotary(rotary, record, self.options, self.modes, embed_dim // num_heads)
                if qk_norm:
                    raise OptionError("rotary has no meaning with qk_norm: pooled queries are turned before a norm.")
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
        self.position_bias, self.rotary = position_bias, rotary
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

    def attend(self, x: Tensor, grid: GridShape, weights: Weights, skip: Tensor | None, out: Tensor | None) -> Tensor:
        """Attend from an input to itself.

        Args:
            x: The input.
            grid: Its shape.
            weights: Checked weights of its positions.
            skip: What is added to the output, or None.
            out: Where to write it, or None.
        """
        operator = get_operator(self.operator)
        if operator.query == "positions" and self.position_bias is None and self.rotary is None:
            if self.causal is not None:
                summary = causal_summary(x, x, self._needs(), weights, self.causal)
                return self._attend_frames(x, summary, self.causal, skip, out)
            summary, passed = self_summary(x, self._needs(), weights)
            return self.attend_from(passed, summary, passed if skip is x else skip, out)
        result, passed = self._attend_at_once(x, weights)
        skip = passed if skip is x else skip
        if not isinstance(result.output, Tensor):
            effects = main_effects(self.modes.order)
            return expand(
                self._project_parts(result.output, grid.sizes), effects, grid, dtype=x.dtype, skip=skip, out=out, like=x
            )
        return added(self.out_proj(join_heads(result.output, 1)), skip, out)

    def attention_weights(self, x: Tensor, weights: Weights, summary: Summary | None) -> Any:
        """Return the attention weights of an input to itself, or to a context.

        Args:
            x: The input.
            weights: Checked weights of its positions.
            summary: Summary of a context, or None.
        """
        if summary is None:
            return self._attend_at_once(x, weights, return_attention=True)[0].attention
        query, settings = self._heads(self.q_proj(x), 1), {**self._settings(), "return_attention": True}
        operator = get_operator(self.operator)
        return operator.attend(query, self._project(summary), **settings, **self._gain()).attention

    def map_of(self, attention: Any, weights: Weights, sizes: tuple[int, ...], at: Sequence[int]) -> Tensor:
        """Spread the attention weights of one query over the grid; where it is causal, over the frames that it sees.

        Args:
            attention: What `attention_weights` returned.
            weights: Checked weights of the positions.
            sizes: Sizes of the modes.
            at: The query, one index a mode.

        Raises:
            OptionError: If ``at`` does not have one index a mode, or one is out of range.
        """
        record, place = get_operator(self.operator), place_on(sizes, indices_of(at))
        if record.spread is None:
            raise OptionError(f"operator {record.name!r} has no map.")
        first = attention[0] if isinstance(attention[0], Tensor) else attention[0][0]
        base = base_of(weights, sizes, first)
        counts = base.weights
        if self.causal is not None:
            seen = torch.arange(sizes[self.causal], device=first.device) <= place[self.causal]
            counts = counts * beside(seen, self.causal, len(sizes))
        heads = counts.unsqueeze(-len(sizes) - 1) if counts.dim() > len(sizes) else counts
        return record.spread(attention, sizes, place, base._replace(weights=heads), **self.options)

    def _attend_at_once(
        self, x: Tensor, weights: Weights, *, return_attention: bool = False
    ) -> tuple[AttentionResult, Tensor]:
        """Attend from all positions at once, up to the heads; return the input passed through too."""
        operator, causal = get_operator(self.operator), self.causal
        settings = self._settings()
        settings["return_attention"] = return_attention
        if operator.takes_means(**self.options):
            summary, passed = self_summary(x, self._needs(), weights)
            return self._attend_means(summary, settings), passed
        if self.rotary is not None:
            return self._attend_turned(x, weights, self.rotary, settings), x
        settings |= self._gain()
        frames = operator.query == "positions" and causal is not None
        if frames:
            assert causal is not None
            summary, passed = causal_summary(x, x, self._needs(), weights, causal), x
            source = frames_first(x, causal, 1)
        else:
            summary, passed = self_summary(x, self._needs(), weights)
            settings |= {} if causal is None else {"causal": causal}
            source = passed
        batch = 1 + frames
        if self.position_bias is not None:
            settings["bias"] = self._bias(x, causal if frames else None)
        if self.options.get("include_self"):
            settings["own"] = tuple(self._heads(linear(source), batch) for linear in (self.k_proj, self.v_proj))
        result = operator.attend(self._heads(self.q_proj(source), batch), self._project(summary), **settings)
        if frames:
            attention = None if result.attention is None else tuple(map(self._frames_in_place, result.attention))
            result = AttentionResult(self._frames_in_place(result.output), None, attention)
        return result, passed

    def _attend_turned(
        self, x: Tensor, weights: Weights, rotary: RotaryEmbedding, settings: dict[str, Any]
    ) -> AttentionResult:
        """Attend from turned queries to turned keys of all positions, as the function of the operator does."""
        query, key, value = (self._heads(linear(x), 1) for linear in (self.q_proj, self.k_proj, self.v_proj))
        if self.position_bias is not None:
            settings["bias"] = self._bias(x, None)
        if self.causal is not None:
            settings["causal"] = self.causal
        if isinstance(weights, GridWeights):
            whole = weights.tensor.unsqueeze(1)
            settings |= {"mask": whole > 0} if weights.binary else {"weights": whole}
        else:
            settings["weights"] = [w if w is None or w.dim() == 1 else w.unsqueeze(1) for w in weights]
        function = get_operator(self.operator).function
        result = function(rotary(query), rotary(key), value, order=self.modes.order, **settings)
        return result if settings["return_attention"] else AttentionResult(result)

    def _bias(self, x: Tensor, frames: int | None) -> Bias:
        """Bias of each mode, ``(1, H, n, n)``, or ``(1, T, H, P, n)`` where frames are a batch dimension."""
        assert self.position_bias is not None
        dtype, parts = accumulation_dtype(x.dtype), self.position_bias(x.shape[1:-1])
        found: list[Tensor | None] = []
        for mode, (part, size) in enumerate(zip(parts, x.shape[1:-1], strict=True)):
            if part is not None:
                if part.dim() != 3 or part.shape[0] not in (1, self.num_heads) or part.shape[1:] != (size, size):
                    raise ShapeError(
                        f"the bias of mode {self.modes.label(mode)} has shape {tuple(part.shape)}, but needs "
                        f"{(self.num_heads, size, size)} or {(1, size, size)}."
                    ).retold(type(self.position_bias).__name__)
                part = part.to(dtype)
                if frames is not None:
                    part = part.movedim(1, 0).unsqueeze(-2) if mode == frames else part.unsqueeze(0)
                part = part.unsqueeze(0)
            found.append(part)
        return tuple(found)

    def _frames_in_place(self, tensor: Tensor) -> Tensor:
        """Bring ``(B, T, H, …, 1, …)`` to ``(B, H, …, T, …)``."""
        assert self.causal is not None
        return tensor.squeeze(3 + self.causal).movedim(1, 2 + self.causal)

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
        if operator.query == "positions":
            summary, past = continued_summary(x, self._needs(), weights, mode, past=past, window=window)
            return self._attend_frames(x, summary, mode, skip, out), past
        whole = 1 if window is not None else x.shape[1 + mode]
        outputs = []
        for start in range(0, x.shape[1 + mode], whole):  # with a window, each frame sees other frames
            part = x.narrow(1 + mode, start, whole)
            own = tuple(w.narrow(-1, start, whole) if k == mode and w is not None else w for k, w in enumerate(weights))
            seen, vectors, past = continued_frames(part, own, mode, past=past, window=window)
            projected = self._project(self_summary(seen, self._needs(), vectors)[0])
            query = self._heads(self.q_proj(part), 1)
            result = operator.attend(query, projected, **self._settings(), **self._gain(), causal=mode)
            outputs.append(self.out_proj(join_heads(result.output, 1)))
        assert past is not None
        return added(outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1 + mode), skip, out), past

    def _needs(self) -> Needs:
        """What the operator needs to know of keys and values."""
        return get_operator(self.operator).needs(self.modes.order, **self.options)

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
        return frames_last(self.attend_from(frames, summary, added, target), mode, 1)

    def attend_from(self, x: Tensor, summary: Summary, skip: Tensor | None, out: Tensor | None) -> Tensor:
        """Attend from each position by itself: project it, attend, project back, for a slab of positions at a time.

        Args:
            x: Where the queries are made of.
            summary: Summary of the input, or of a context.
            skip: What is added to the output, or None.
            out: Where to write it, or None.
        """
        settings = self._settings()
        operator, batch = get_operator(self.operator), len(summary.batch)
        summary, owns = self._project(summary), bool(self.options.get("include_self"))
        q_proj, out_proj = self.q_proj, self.out_proj
        named: dict[str, Tensor | None] = {"bias of outputs": out_proj.bias, **self._gain()}
        if absorbs(operator, self.options, summary, x, self.num_heads, q_proj):
            summary = absorbed(summary, q_proj, out_proj, settings["scale"])
        else:
            named |= {"outputs": out_proj.weight, "queries": q_proj.weight, "bias of queries": q_proj.bias}
        if owns:
            for name, own in (("keys", self.k_proj), ("values", self.v_proj)):
                named |= {name: own.weight, f"bias of {name}": own.bias}
        held, parameters = summary.tensors, {name: each for name, each in named.items() if each is not None}

        def attend(part: Tensor, *tensors: Tensor) -> Tensor:
            given = summary.with_tensors(tensors[: len(held)])
            here = dict(zip(parameters, tensors[len(held) :], strict=True))

            def linear(tensor: Tensor, name: str) -> Tensor:
                return mapped(tensor, here.get(name), here.get(f"bias of {name}"))

            extra: dict[str, Any] = {"gain": here["gain"]} if "gain" in here else {}
            if owns:
                extra["own"] = tuple(self._heads(linear(part, name), batch) for name in ("keys", "values"))
            query = self._heads(linear(part, "queries"), batch)
            output = operator.attend(query, given, **settings, **extra).output
            return linear(join_heads(output, batch), "outputs")

        tensors, random = (*held, *parameters.values()), settings["dropout_p"] > 0
        return map_positions(attend, x, tensors, batch=batch, random=random, skip=skip, out=out)

    def _gain(self) -> dict[str, Tensor]:
        """Factor of the interaction correction a head, if there is one."""
        gain = self.interaction_gain
        return {} if gain is None else {"gain": gain.to(accumulation_dtype(gain.dtype))}

    def _attend_means(self, summary: Summary, settings: dict[str, Any]) -> AttentionResult:
        """Attend from averages: queries are projected in S rows."""
        kept = (*main_effects(self.modes.order), *((),) * (() in summary.kept))
        if self.q_norm is not None and self.k_norm is not None:
            settings |= {
                "query_norm": functools.partial(apply_norm, self.q_norm),
                "key_norm": functools.partial(apply_norm, self.k_norm),
            }
        maps = self.q_proj, self.k_proj, self.v_proj
        queries, projected = project_means(summary, kept, *maps, self.num_heads)
        if self.rotary is not None:
            queries = tuple(self.rotary.rotate_mode(part, mode) for mode, part in enumerate(queries))
            keys = list(projected.keys)
            for mode in range(self.modes.order):
                keys[projected.place((mode,))] = self.rotary.rotate_mode(projected.key((mode,)), mode)
            projected = dataclasses.replace(projected, keys=tuple(keys))
        return get_operator(self.operator).attend(queries, projected, **settings)

    def _project_parts(self, parts: Sequence[Tensor], sizes: Sequence[int]) -> tuple[Tensor, ...]:
        """Project an output that is an outer sum in S rows; its bias counts once."""
        out_proj = self.out_proj
        rows = apply_linear(join_heads(join_tokens(parts), 1), out_proj.weight, None)
        first, *others = rows.split_with_sizes(sizes, -2)
        return (first if out_proj.bias is None else first + in_type(out_proj.bias, first.dtype)), *others

    def _project(self, summary: Summary) -> Summary:
        """Project a summary of the input to that of keys and values, with heads as last batch dimension."""
        return project_summary(summary, self.k_proj, self.v_proj, self.num_heads)

    def _heads(self, tensor: Tensor, batch: int) -> Tensor:
        """Split channels into heads."""
        return split_heads(tensor, self.num_heads, batch)


def _check_position_bias(position_bias: Any, record: Operator, modes: ModeSpec, num_heads: int) -> None:
    """Check that a position bias fits the layer."""
    if "bias" in record.lacks:
        raise OptionError(f"position_bias has no meaning for operator {record.name!r}: {record.lacks['bias']}.")
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
