"""How a layer attends: it projects, summarises, attends and projects back, for every operator in one way."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from tensorattn.averages.plan import memory_order
from tensorattn.errors import ShapeError
from tensorattn.functional.causal import Past, causal_summary, frames_beside, frames_first, frames_last
from tensorattn.functional.cells import Cells, draw_queries
from tensorattn.functional.flattened import FLATTENED
from tensorattn.functional.operator import (
    AttentionResult,
    Bias,
    Operator,
    attend_beside,
    attend_condensed,
    default_scale,
    get_operator,
    spread_parts,
)
from tensorattn.functional.softmax import CHUNK, in_chunks
from tensorattn.functional.summary import Needs, Summary, make_summary
from tensorattn.masks import Part, Weights, accumulation_dtype, is_recorded, without_absent
from tensorattn.modes import ModeSpec
from tensorattn.nn.bias import PositionBias
from tensorattn.nn.layout import channels_last
from tensorattn.nn.prefix import Prefix
from tensorattn.nn.rotary import RotaryEmbedding
from tensorattn.nn.sources import Sources, join_heads, normed, split_heads, unchanged

__all__ = ["AttentionPipeline"]


class AttentionPipeline(nn.Module):
    """What a `TensorAttention` does with checked inputs. Its projections are modules that are called."""

    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    modes: ModeSpec
    operator: str
    channels_first: bool
    causal: int | None
    scale: float | None
    dropout: float
    proj_drop: float
    mode_projections: bool
    project: str
    checkpoint: bool
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    out_proj: nn.Linear
    q_norm: nn.Module | None
    k_norm: nn.Module | None
    interaction_gain: nn.Parameter | None
    position_bias: PositionBias | None
    rotary: RotaryEmbedding | None
    _options: dict[str, Any]

    @property
    def options(self) -> dict[str, Any]:
        """All options of the operator."""
        if "cell_centres" not in self._buffers:
            return self._options
        return {**self._options, "cells": Cells(self.get_buffer("cell_centres"), self.get_buffer("cell_metric"))}

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
        y = without_absent(y, present)
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

    def _projects_positions(self) -> bool:
        """Tell whether all positions are projected before anything is averaged: if asked for, or to be turned."""
        return self.project == "positions" or self._turns_positions()

    def _projected(self, x: Tensor, part: Part | None = None) -> Sources:
        """Make queries, keys and values of an input at all its positions, and turn them by their places."""
        given = self._given(x)
        tensors = [to(x) for to in given.maps]
        norms = given.norms
        if self.rotary is not None and self._turns_positions():
            for place, (norm, heads) in enumerate(zip(given.norms, given.heads, strict=True)):
                turned = self.rotary.turned(normed(norm, split_heads(tensors[place], heads, 1)), part)
                tensors[place] = join_heads(turned, 1)
            norms = (None, None)
        return dataclasses.replace(
            given, tensors=(tensors[0], tensors[1], tensors[2]), maps=(unchanged,) * 3, norms=norms
        )

    # ---------------------------------------------------------------------------------------------------------- attend

    def add_up(self, x: Tensor, weights: Weights) -> None:
        """Make the sums that are known of a part of an input, for its ``total`` to see, and nothing else, unchecked.

        Args:
            x: The part, channels last.
            weights: Checked weights of its positions, with the part.
        """
        record, needs = get_operator(self.operator), self._needs()
        sources = self._projected(x, weights.part) if self._projects_positions() else self._given(x)
        if self.causal is not None and record.condense is not None:
            summary = self._found(sources, weights, needs)
            record.condense(None, summary, None, causal=self.causal, part=weights.part, **self.options)
        elif self.causal is not None:
            causal_summary(*sources.tensors[1:], needs, weights, self.causal)
        elif record.condense is not None:
            self._condensed(sources, self._found(sources, weights, needs), True, part=weights.part)
        else:
            summary = sources.summarise(needs, weights)
            if needs.queries is not None:
                sources.project_queries(summary, needs.queries, weights)

    def attended(self, x: Tensor, weights: Weights) -> Tensor:
        """Attend from a part of an input to all of it, unchecked.

        Args:
            x: The part, channels last.
            weights: Checked weights of its positions, with the part.
        """
        y = self._attend(without_absent(x, weights.present), weights, None)[0].output
        return without_absent(y, weights.present)

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
        at_once = self._projects_positions() or self._needs().queries is not None or record.condense is not None
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
        early = context is None and self._projects_positions()
        sources = self._projected(x, weights.part) if early else self._given(x)
        frames = self.causal if record.query == "positions" else None
        if frames is None and self.causal is not None:
            settings["causal"] = self.causal
        if self.position_bias is not None and context is None:
            settings["bias"] = self._bias(self.position_bias, x, frames, weights.part)
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
            found = self._found(sources, weights, needs) if context is None else sources.project(context)
            if record.gathers:
                settings.update(self._beside(weights))
            if record.condense is not None:
                found = self._condensed(sources, found, context is None, **self._beside(weights))
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

    def _found(self, sources: Sources, weights: Weights, needs: Needs) -> Summary:
        """Summarise keys and values, and project: of all parts, but for operators that are told of their part."""
        record = get_operator(self.operator)
        own = dataclasses.replace(weights, part=None) if record.condense is not None or record.gathers else weights
        return sources.project(sources.summarise(needs, own))

    def _beside(self, weights: Weights) -> dict[str, Any]:
        """What an operator is told of other parts, where there are any."""
        return {} if weights.part is None else {"part": weights.part}

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

    def _condensed(self, sources: Sources, summary: Summary, of_x: bool, **beside: Any) -> Any:
        """Condense a projected summary, by some queries of an input where something is searched for."""
        condense: Any = get_operator(self.operator).condense
        if beside and self.options.get("cells") != "keys":
            return condense(None, summary, None, **beside, **self.options)[0]
        shown = summary.count(tuple(range(summary.order))) if of_x else None
        with torch.no_grad():
            rows = sources.tensors[0].flatten(1, -2)
            rows, seen = draw_queries(rows, None if shown is None else shown.squeeze(1).flatten(1), **beside)
            query = self._by_group(sources.query(rows, 1), 1)
            if seen is not None:
                seen = seen.unsqueeze(1)
                seen = seen.repeat(1, 1, query.shape[2]) if query.dim() > 4 else seen
            query = query.flatten(2, -2)
        return condense(query, summary, seen, **beside, **self.options)[0]

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
            step = max(1, CHUNK // max(1, width))  # there may be no sample, and no frame
            parts = [attend_again(slice(start, start + step))[0] for start in range(0, max(1, length), step)]
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
        summary = self._found(sources, weights, needs)
        query = self._by_group(sources.query(sources.tensors[0], 1), 1)
        record, before = get_operator(self.operator), {**before, **self._beside(weights)}
        result, after = attend_condensed(record, query, summary, self.options, mode, settings, **before)
        result = self._ungrouped(result, 1)
        return AttentionResult(self.out_proj(join_heads(result.output, 1)), None, result.attention), after

    def _from_averages(
        self, sources: Sources, weights: Weights, needs: Needs, settings: dict[str, Any]
    ) -> AttentionResult:
        """Attend from averages: queries are projected in S rows, what is an outer sum is projected back in S rows."""
        record, (x, *_), order = get_operator(self.operator), sources.tensors, self.modes.order
        sizes, part = tuple(x.shape[1:-1]), weights.part
        if part is not None and record.gathers and order > 1:
            settings["own"] = (part, *self._own_values(sources, weights))
            small = tuple([kept for kept in needs.kept if len(kept) < order])
            needs = needs._replace(kept=small, keys=small, values=small)
        summary = sources.summarise(needs, weights)
        queries = sources.project_queries(summary, needs.queries or (), weights)
        if record.pools and (self.q_norm is not None or self.rotary is not None):
            settings.update(query_norm=self._prepared(self.q_norm), key_norm=self._prepared(self.k_norm))
        if part is not None and not record.gathers and tuple(range(order)) in (needs.queries or ()):
            settings["part"] = part
        result = record.attend(queries, sources.project(summary), **settings)
        if isinstance(result.output, Tensor):
            output = result.output if part is None or order > 1 else part.own(result.output, 0, 2)
            return result._replace(output=self.out_proj(join_heads(output, 1)))
        parts = [join_heads(rows, 1) for rows in result.output]
        if part is not None:
            parts = [part.own(rows, mode, 1) for mode, rows in enumerate(parts)]
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

    def _own_values(self, sources: Sources, weights: Weights) -> tuple[Tensor, Tensor | None]:
        """Project the values of a part, zero where none is; with weights of positions that are no product of modes."""
        value, shown, grid = sources.value(sources.tensors[2], 1), weights.shown(), weights.grid
        if shown is not None:
            value = torch.where(shown[(None,) * (value.dim() - 2 - shown.dim())].unsqueeze(1).unsqueeze(-1), value, 0.0)
        if grid is None:
            return value, None
        column = grid.to(accumulation_dtype(value.dtype)).unsqueeze(1).unsqueeze(-1)
        return value, column.expand(*value.shape[:-1], 1)

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
        outputs, vector = [], weights.vectors[mode]
        for start in range(0, x.shape[1 + mode], whole):
            part = x.narrow(1 + mode, start, whole)
            own = weights if vector is None else weights.with_vector(mode, vector.narrow(-1, start, whole))
            seen, spoken, past = frames_beside(part, own, mode, past=past, window=window)
            summary = sources.project(make_summary(seen, seen, needs, spoken))
            outputs.append(self._from_positions(self._given(part), summary, self._settings(causal=mode)).output)
        assert past is not None
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1 + mode), past

    def _bias(self, position_bias: PositionBias, x: Tensor, frames: int | None, own: Part | None = None) -> Bias:
        """Bias of each mode, ``(1, H, n, n)``, or ``(1, T, H, P, n)`` where frames are a batch dimension."""
        dtype, sizes = accumulation_dtype(x.dtype), tuple(x.shape[1:-1]) if own is None else own.sizes
        gathers = get_operator(self.operator).gathers
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
                if own is not None and not gathers:  # one that gathers attends along whole fibres
                    part = own.own(part, mode, 1)
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
