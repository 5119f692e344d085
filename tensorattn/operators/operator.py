"""What an operator is: what it needs to know of keys and values, and what a query does with it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from tensorattn.causal import causal_summary
from tensorattn.errors import OptionError, ShapeError
from tensorattn.modes import attention_shapes
from tensorattn.operators.position import causal_bias, check_bias, check_causal, frames_first, frames_last
from tensorattn.options import check_probability, check_scale, check_switch
from tensorattn.presence import GivenWeights, Lengths, Mask, Presence, check_presence
from tensorattn.softmax import TokenSet, attend_tokens
from tensorattn.summarizing import Needs, attention_summary
from tensorattn.summary import Summary
from tensorattn.weights import GridWeights, accumulation_dtype, check_floating, without_absent

__all__ = [
    "AttentionResult",
    "Claim",
    "Needs",
    "Operator",
    "attend_positions",
    "check_grid_weights",
    "default_scale",
    "run",
]


class Claim(StrEnum):
    """A property that an operator may claim. What every operator has by construction is not listed."""

    EXACT = "equals flattened attention, whatever the data"
    EXACT_ON_ADDITIVE = "equals flattened attention where keys and values are additive over modes"
    KEY_SHIFT = "adding a constant to all keys changes nothing"
    VALUE_AFFINE = "an affine map of the values is the same map of the output"
    ROTATION = "rotating the channels of queries and keys together changes nothing"
    FIRST_ORDER = "agrees with flattened attention to first order in the scale, whatever the data"
    CONSTANT_MODE = "a mode along which keys and values are constant can be left out"
    REFINEMENT = "repeating every index of a mode equally often changes nothing"
    INVISIBLE_INTERACTION = "the interaction residual of keys and values has no effect"
    CONVEX = "the output lies within the range of the values"
    ZERO_SCALE_MEAN = "at scale zero the output is the mean value"
    LOG_SUM_EXP = "the log-sum-exp is that of the logits, so the output merges with other token sets"


def _never(**_: Any) -> bool:
    """Tell that something does not hold for an operator, whatever its options."""
    return False


SYMMETRIES = frozenset({Claim.KEY_SHIFT, Claim.VALUE_AFFINE, Claim.ROTATION})


class AttentionResult(NamedTuple):
    """What an operator returns when more than the output is asked for.

    Attributes:
        output: Output ``(*batch, *positions, D_v)``.
        lse: Log-sum-exp of the logits ``(*batch, *positions)``, if asked for.
        attention: Attention weights, if asked for, a tuple; its layout is told by each operator.
    """

    output: Any
    lse: Any = None
    attention: Any = None


@dataclass(frozen=True)
class Operator:
    """Record of one operator.

    Attributes:
        name: Name in the registry.
        function: Its functional form, with the signature of `additive_attention`.
        needs: From the order and the options to what it needs of keys and values.
        attend: From queries, a summary, a scale and the options to an `AttentionResult`.
        claims: From the options to the properties that hold; the test suite checks each.
        query: What it takes as queries: any ``positions``, or the ``grid`` of the keys.
        takes_means: From the options to whether `attend` also takes the mean queries of a grid, one tensor a mode and
            the grand mean, in place of all queries.
        pools: Whether it pools queries and keys over positions before they meet, so that each mode can have linear
            maps of its own, and a norm.
        counts_indices: From the options to whether it counts how often each index of a mode is there, in a softmax over
            modes or a sum over positions, which weights of whole positions do not tell.
        absorbs: From the options to whether its output is a sum of softmaxes of queries over `Summary.tokens` alone, so
            that a layer of one head can absorb its linear maps in them.
        options: Names of its options with their defaults.
        spread: From the attention weights, the sizes of the modes, a query or None, the weights of the positions
            and the options to weights over the grid; None if they have no such form.
        lacks: Arguments without a meaning for it, each with the reason.
    """

    name: str
    function: Callable[..., Any]
    needs: Callable[..., Needs]
    attend: Callable[..., AttentionResult]
    claims: Callable[..., frozenset[Claim]]
    query: Literal["positions", "grid"] = "positions"
    takes_means: Callable[..., bool] = _never
    pools: bool = False
    counts_indices: Callable[..., bool] = _never
    absorbs: Callable[..., bool] = _never
    options: Mapping[str, Any] = field(default_factory=dict)
    spread: Callable[..., Tensor] | None = None
    lacks: Mapping[str, str] = field(default_factory=dict)

    def with_defaults(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Complete options by their defaults.

        Args:
            options: Options that were given.

        Raises:
            OptionError: If the operator has no such option, or one that is True or False by default is neither.
        """
        for name in options:
            if name not in self.options:
                known = ", ".join(self.options) or "none"
                raise OptionError(f"operator {self.name!r} has no option {name!r}; its options are: {known}.")
            if isinstance(self.options[name], bool):
                check_switch(options[name], name)
        return {**self.options, **options}


def check_grid_weights(operator: Operator, options: Mapping[str, Any], given: Presence) -> None:
    """Check that weights which are no product over modes have a meaning.

    Args:
        operator: The operator.
        options: All its options.
        given: What was said of the positions.

    Raises:
        OptionError: If they have none.
    """
    if isinstance(given.weights, GridWeights) and not given.indices and operator.counts_indices(**options):
        raise OptionError(
            "weights of whole positions have no meaning for this operator: it counts the indices of each mode.",
            hint="Give one vector a mode, or a mask alone.",
        )


def run(
    operator: Operator,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    order: int,
    scale: float | None = None,
    weights: GivenWeights = None,
    mask: Mask = None,
    lengths: Lengths = None,
    bias: Sequence[Tensor | None] | None = None,
    causal: int | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    return_attention: bool = False,
    **options: Any,
) -> Any:
    """Check, summarise, attend: the functional form of every operator.

    Args:
        operator: The operator.
        query: Queries ``(*batch, *positions, D)``.
        key: Keys ``(*batch, n_1, …, n_N, D)``.
        value: Values ``(*batch, n_1, …, n_N, D_v)``.
        order: Number of modes N.
        scale: Factor of the logits, 1/√D if None.
        weights: One vector a mode, or a tensor over the grid of the keys, or None.
        mask: True where a key and its value take part, or None.
        lengths: How many leading indices of each mode take part, or None.
        bias: One tensor a mode, or None.
        causal: The causal mode, or None.
        dropout_p: Probability of dropping an attention weight.
        return_lse: Whether to return the log-sum-exp.
        return_attention: Whether to return the attention weights.
        **options: Options of the operator.

    Returns:
        The output, or an `AttentionResult` where more is asked for.

    Raises:
        ShapeError: If shapes disagree, or the queries are not on the grid of the keys where they must be.
        OptionError: If an argument has no meaning for the operator, or ``dropout_p`` is not a probability.
    """
    check_floating(query=query, key=key, value=value)
    grid, _ = attention_shapes(query.shape, key.shape, value.shape, order)
    batch, positions = len(grid.batch), tuple(query.shape[len(grid.batch) : -1])
    for name, value_of in (("return_lse", return_lse), ("return_attention", return_attention)):
        check_switch(value_of, name)
    given = {"bias": bias is not None, "causal": causal is not None, "return_lse": return_lse and order > 1}
    for name, reason in operator.lacks.items():
        if given[name]:
            raise OptionError(f"{name} has no meaning for this operator: {reason}.")
    check_scale(scale)
    check_probability(dropout_p, "dropout_p")
    options = operator.with_defaults(options)
    if operator.query == "grid" and positions != grid.sizes:
        raise ShapeError(f"query must be on the grid of key, but has positions {positions} where key has {grid.sizes}.")
    if options.get("include_self") and positions != grid.sizes:
        raise ShapeError(
            f"include_self needs the query on the grid of key, but query has positions {positions} where key has "
            f"{grid.sizes}."
        )
    needs = operator.needs(order, **options)
    given_weights = check_presence(weights, mask, lengths, grid, key)
    check_grid_weights(operator, options, given_weights)
    checked, present = given_weights.weights, given_weights.present
    checked_bias = check_bias(bias, positions, grid, key)
    mode = check_causal(causal, positions, grid)
    settings: dict[str, Any] = {
        "scale": default_scale(grid.dim) if scale is None else scale,
        "dropout_p": dropout_p,
        "return_lse": return_lse,
        "return_attention": return_attention,
        **options,
    }
    if options.get("include_self"):
        settings["own"] = _own_tokens(key, value, present)
    if present is not None and tuple(range(order)) in needs.kept:  # absent keys could give infinite logits
        key, value = without_absent(key, present), without_absent(value, present)
    hides_queries = present is not None and operator.query == "grid"
    if present is not None and hides_queries:
        query = without_absent(query, present)
    if mode is None or operator.query == "grid":
        if checked_bias is not None:
            settings["bias"] = checked_bias
        if mode is not None:
            settings["causal"] = mode
        result = operator.attend(query, attention_summary(key, value, needs, checked), **settings)
    else:
        if checked_bias is not None:
            settings["bias"] = causal_bias(checked_bias, mode)
        if "own" in settings:
            settings["own"] = tuple(frames_first(part, mode, batch) for part in settings["own"])
        summary = causal_summary(key, value, needs, checked, mode)
        result = operator.attend(frames_first(query, mode, batch), summary, **settings)
        last = functools.partial(frames_last, mode=mode, batch=batch)
        result = AttentionResult(
            last(result.output),
            None if result.lse is None else last(result.lse),
            None if result.attention is None else tuple(map(last, result.attention)),
        )
    if present is not None and hides_queries:
        lse = None if result.lse is None else result.lse.masked_fill(~present, -math.inf)
        result = AttentionResult(without_absent(result.output, present), lse, result.attention)
    return result if return_lse or return_attention else result.output


def _own_tokens(key: Tensor, value: Tensor, present: Tensor | None) -> tuple[Tensor, ...]:
    """Return the own key and value of each position, and where positions take part the logit that is added: 0 or −∞."""
    if present is None:
        return key, value
    hidden = torch.zeros(key.shape[:-1], dtype=accumulation_dtype(key.dtype), device=key.device)
    hidden = hidden.masked_fill(~present, -math.inf).unsqueeze(-1)
    return without_absent(key, present), without_absent(value, present), hidden


def attend_positions(
    query: Tensor, summary: Summary, sets: Sequence[TokenSet], **settings: Any
) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...] | None]:
    """Attend from queries at any positions to sets of tokens.

    Args:
        query: Queries ``(*batch, *positions, D)``.
        summary: Summary that the tokens come from.
        sets: The tokens.
        **settings: Scale, dropout and what to return.

    Returns:
        Output, log-sum-exp and attention weights with the positions of the query.
    """
    batch = len(summary.batch)
    shape = tuple(query.shape[:-1])
    flat = query.reshape(*shape[:batch], math.prod(shape[batch:]), query.shape[-1])
    output, lse, attention = attend_tokens(flat, sets, **settings)
    return (
        output.reshape(*shape, output.shape[-1]),
        None if lse is None else lse.reshape(shape),
        None if attention is None else tuple(part.reshape(*shape, part.shape[-1]) for part in attention),
    )


def default_scale(dim: int) -> float:
    """Return 1/√D.

    Args:
        dim: Head size D.
    """
    return 1.0 / max(1, dim) ** 0.5
