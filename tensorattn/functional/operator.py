r"""What an operator is, and the one way through it: read, summarise, attend.

All operators share these arguments.

Args:
    query: Queries :math:`(*, P_1, \dots, P_M, D)`: the grid of the keys, another grid, or a list of tokens. Some
        operators take queries on the grid of the keys only.
    key: Keys over the grid :math:`(*, n_1, \dots, n_N, D)`.
    value: Values over the grid :math:`(*, n_1, \dots, n_N, D_v)`; their head size may differ.
    order: Number of modes N.
    scale: Factor of the logits; 1/√D if None.
    weights: One non-negative vector a mode or None for equal weights, or one tensor over the grid: multiplicities, so 2
        counts an index, or a position, as if it were repeated, and 0 as if it were absent.
    mask: True where a position takes part, ``(*batch, n_1, …, n_N)`` or broadcastable in the batch. Operators whose
        queries are on the grid of the keys give zero where a position takes no part.
    lengths: How many leading indices of each mode take part, a mask that is a product over modes: integers
        ``(*batch, N)``, or one entry a mode, None for all.
    bias: One tensor ``(P_m, n_m)`` or ``(*batch, P_m, n_m)`` a mode, or None for no bias: added to the logits of a
        query at place :math:`i_m` of mode m for the indices of that mode. Minus infinity hides an index.
    causal: A mode whose frames a query sees up to its own only, whatever the data; the query is then on a grid with the
        frames of the keys.
    dropout_p: Probability of dropping an attention weight, whenever it is not 0.
    return_lse: Whether to return the log-sum-exp too, ``(*batch, *positions)``.
    return_attention: Whether to return the attention weights too.

Returns:
    The output :math:`(*, P_1, \dots, P_M, D_v)` in the type of the query; an `AttentionResult` if more is asked for. A
    query that sees nothing gets zeros, and a log-sum-exp of minus infinity.

Raises:
    ShapeError: If batch dimensions, mode sizes or head sizes disagree, a mode is empty, the mask or lengths do not fit
        the grid, or the queries are not on the grid of the keys where they must be.
    DtypeError: If a tensor is not floating point, the types differ, the mask is not bool, or lengths are not integers.
    WeightsError: If weights have the wrong length, are negative, not finite, or all zero, or a length is negative or
        longer than its mode.
    OptionError: If an argument is out of its range or has no meaning for the operator.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, NamedTuple, Protocol, TypedDict, overload

import torch
from torch import Tensor

from tensorattn.averages.means import broadcast_sum, marginal_means
from tensorattn.averages.plan import memory_order
from tensorattn.errors import DtypeError, OptionError, ShapeError, check, check_scale, is_integer, retells
from tensorattn.functional.causal import causal_summary, frames_first, frames_last
from tensorattn.functional.softmax import Attended, Tokens, TokenSet, attend_tokens, merge_attention
from tensorattn.functional.summary import Means, Needs, Summary, make_summary
from tensorattn.masks import (
    GivenWeights,
    Lengths,
    Mask,
    Weights,
    accumulation_dtype,
    broadcasts_to,
    check_floating,
    is_recorded,
    read_weights,
    real_tensor,
    without_absent,
)
from tensorattn.modes import GridShape, Kept, ModeSpec, attention_shape, main_effects, mode_parts

__all__ = [
    "OPERATORS",
    "AttentionResult",
    "Bias",
    "Claim",
    "Operator",
    "Shared",
    "attend_beside",
    "attend_condensed",
    "attend_positions",
    "attention_function",
    "biased",
    "causal_bias",
    "check_indices",
    "default_scale",
    "get_operator",
    "register_operator",
    "run",
    "spread_parts",
]

Bias = tuple[Tensor | None, ...]  # for each mode ``(*batch, P_m, n_m)``, or None


class Claim(StrEnum):
    """A property that an operator may claim. What every operator has by construction is not listed.

    Examples:
        >>> import tensorattn as ta
        >>> ta.Claim.CONVEX in ta.get_operator("kao_kv").claims(), ta.Claim.CONVEX.value
        (True, 'the output lies within the range of the values')
    """

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


SYMMETRIES = frozenset({Claim.KEY_SHIFT, Claim.VALUE_AFFINE, Claim.ROTATION})


class AttentionResult(NamedTuple):
    """What an operator returns when more than the output is asked for.

    Attributes:
        output: Output ``(*batch, *positions, D_v)``.
        lse: Log-sum-exp of the logits ``(*batch, *positions)``, if asked for.
        attention: Attention weights, if asked for, a tuple; its layout is told by each operator.
        rho: Of `clustered_attention`, the share of the variance of the logits that is left inside cells; None of
            others.

    Examples:
        >>> import torch, tensorattn as ta
        >>> q, k, v = torch.randn(3, 2, 4, 5, 8).unbind(0)
        >>> output, lse, attention, _ = ta.additive_attention(q, k, v, order=2, return_lse=True)
        >>> output.shape, lse.shape, attention
        (torch.Size([2, 4, 5, 8]), torch.Size([2, 4, 5]), None)
    """

    output: Any
    lse: Any = None
    attention: Any = None
    rho: Any = None


def _nowhere(**options: Any) -> bool:
    """Tell that it matters nowhere."""
    return False


@dataclass(frozen=True)
class Operator:
    """Record of one operator.

    Attributes:
        name: Name in the registry.
        function: Its functional form, with the signature of `additive_attention`.
        needs: From the order and the options to what it needs of queries, keys and values.
        attend: From queries, a summary, a scale and the options to an `AttentionResult`. Queries are a tensor, or the
            means that it needs of them; the output is a tensor over the positions, or one part a mode whose outer sum
            is the output.
        claims: From the options to the properties that hold; the test suite checks each.
        query: What it takes as queries: any ``positions``, or the ``grid`` of the keys.
        pools: Whether it pools queries and keys over positions before they meet, so that each mode can have linear
            maps of its own, and a norm.
        options: Names of its options with their defaults.
        condense: From queries ``(*batch, L, D)``, the summary, which queries take part ``(*batch, L)`` or None,
            ``causal``, ``past`` and ``window`` where frames follow each other, and the options, to what is attended to
            in place of the summary, and to what returns what later frames need to know (None without frames). The
            former has ``batch``, ``sizes`` and ``tensors``, with frames as last batch dimension where a mode is causal.
            None if the summary itself is attended to.
        spread: From the attention weights, the sizes of the modes, a query or None, the weights of the positions
            and the options to weights over the grid; None if they have no such form.
        lacks: Arguments without a meaning for it, each with the reason; or what returns them for its options.
        by_place: From the options to whether it matters where a position stands among the others, as where a grid is
            cut into blocks: repeating, cropping and permuting indices then change more than counts.
        joins: Whether it is one softmax, and takes a ``prefix`` into it: keys and values of tokens beside the grid.
            Others are joined with such tokens by their log-sum-exp.
        gathers: Whether it takes a ``part``, where its grid is part of a larger one: it works along one mode at a time,
            and exchanges the fibres of that mode.

    Examples:
        One file, one record: an operator that answers every query with the mean of the values, as function and layer.

        >>> import torch, tensorattn as ta
        >>> from tensorattn.functional.operator import attention_function, run
        >>> @attention_function
        ... def mean_attention(query, key, value, *, order, **shared):
        ...     return run(MEAN, query, key, value, order=order, options={}, **shared)
        >>> def attend(query, summary, **settings):
        ...     mean = summary.value(())
        ...     places = (1,) * (query.dim() - mean.dim())  # queries are (*batch, *positions, D)
        ...     return ta.AttentionResult(mean.reshape(*summary.batch, *places, -1).expand(*query.shape[:-1], -1))
        >>> claims = frozenset({ta.Claim.CONVEX, ta.Claim.ZERO_SCALE_MEAN})
        >>> MEAN = ta.Operator("mean", mean_attention, lambda order: ta.Needs(((),)), attend, lambda: claims)
        >>> layer = ta.TensorAttention(8, 2, modes="h w", operator=ta.register_operator(MEAN).name)
        >>> layer(torch.randn(2, 4, 5, 8), lengths={"h": torch.tensor([4, 3])}).shape
        torch.Size([2, 4, 5, 8])
        >>> del ta.OPERATORS["mean"]
    """

    name: str
    function: Callable[..., Any]
    needs: Callable[..., Needs]
    attend: Callable[..., AttentionResult]
    claims: Callable[..., frozenset[Claim]]
    query: Literal["positions", "grid"] = "positions"
    pools: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    condense: Callable[..., tuple[Any, Any]] | None = None
    spread: Callable[..., Tensor] | None = None
    lacks: Mapping[str, str] | Callable[..., Mapping[str, str]] = field(default_factory=dict)
    by_place: Callable[..., bool] = _nowhere
    joins: bool = False
    gathers: bool = False

    def lacking(self, options: Mapping[str, Any]) -> Mapping[str, str]:
        """Return the arguments without a meaning for some options, each with the reason.

        Args:
            options: All its options.
        """
        return self.lacks(**options) if callable(self.lacks) else self.lacks

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
                check(options[name], name, "switch")
        return {**self.options, **options}


OPERATORS: dict[str, Operator] = {}


def register_operator(operator: Operator) -> Operator:
    """Add an operator to the registry, so that modules, commands and tests find it by name.

    Args:
        operator: The operator.

    Returns:
        The operator.

    Raises:
        OptionError: If another operator has the name.

    Examples:
        >>> import dataclasses, tensorattn as ta
        >>> mine = dataclasses.replace(ta.get_operator("additive"), name="mine")
        >>> ta.register_operator(mine).name, ta.OPERATORS.pop("mine").name
        ('mine', 'mine')
    """
    if OPERATORS.get(operator.name, operator) is not operator:
        raise OptionError(f"there is already an operator {operator.name!r}.")
    OPERATORS[operator.name] = operator
    return operator


def get_operator(name: str) -> Operator:
    """Return the operator of a name.

    Args:
        name: Name in the registry.

    Returns:
        Its record.

    Raises:
        OptionError: If there is none.

    Examples:
        >>> import tensorattn as ta
        >>> sorted(ta.get_operator("additive").options)
        ['include_self', 'interaction', 'saturation']
    """
    if name not in OPERATORS:
        raise OptionError(f"there is no operator {name!r}; the operators are: {', '.join(OPERATORS)}.")
    return OPERATORS[name]


class Shared(TypedDict, total=False):
    """Arguments that all operators share beside queries, keys, values and the order; this module tells them."""

    scale: float | None
    weights: GivenWeights
    mask: Mask
    lengths: Lengths
    bias: Sequence[Tensor | None] | None
    causal: int | None
    dropout_p: float
    return_lse: bool
    return_attention: bool


class AttentionFunction(Protocol):
    """What the functional form of an operator is to a type checker: more than a tensor only where it is asked for."""

    __name__: str

    @overload
    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        order: int,
        return_lse: Literal[False] = False,
        return_attention: Literal[False] = False,
        **options: Any,
    ) -> Tensor: ...

    @overload
    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *, order: int, **options: Any) -> AttentionResult: ...


def attention_function(function: Callable[..., Any]) -> AttentionFunction:
    """Make a public function of the functional form of an operator: its errors, its signature and its help.

    Args:
        function: The function, which takes what all operators share as ``**shared``.
    """
    told = retells(function)
    own = [each for name, each in inspect.signature(function).parameters.items() if name != "shared"]
    shared = [each for name, each in inspect.signature(run).parameters.items() if name in Shared.__annotations__]
    vars(told)["__signature__"] = inspect.Signature([*own, *shared])
    told.__doc__ = f"{inspect.cleandoc(function.__doc__ or '')}\n\nWhat all operators share:\n\n{_SHARED}"
    return told


_SHARED = (__doc__ or "").partition("Args:\n")[2]


def run(
    operator: Operator,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    order: int,
    options: Mapping[str, Any],
    scale: float | None = None,
    weights: GivenWeights = None,
    mask: Mask = None,
    lengths: Lengths = None,
    bias: Sequence[Tensor | None] | None = None,
    causal: int | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    return_attention: bool = False,
    **unknown: Any,
) -> Any:
    """Read, summarise, attend: the functional form of every operator, whose arguments this module tells.

    Args:
        operator: The operator.
        query: Queries.
        key: Keys.
        value: Values.
        order: Number of modes N.
        options: Options of the operator.
        scale: Factor of the logits.
        weights: Weights of the positions.
        mask: Mask of the positions.
        lengths: Lengths of the modes.
        bias: Bias of the logits.
        causal: The causal mode.
        dropout_p: Probability of dropping an attention weight.
        return_lse: Whether to return the log-sum-exp.
        return_attention: Whether to return the attention weights.
        **unknown: What no operator takes.
    """
    for name in unknown:
        raise TypeError(f"{operator.function.__name__}() got an unexpected keyword argument {name!r}")
    check_floating(query=query, key=key, value=value)
    grid = attention_shape(query.shape, key.shape, value.shape, order)
    batch, positions = len(grid.batch), tuple(query.shape[len(grid.batch) : -1])
    for name, switch in (("return_lse", return_lse), ("return_attention", return_attention)):
        check(switch, name, "switch")
    check_scale(scale)
    check(dropout_p, "dropout_p", "probability")
    options = operator.with_defaults(options)
    needs = operator.needs(order, **options)
    given = {
        "bias": bias is not None,
        "causal": causal is not None,
        "dropout_p": dropout_p > 0,
        "return_lse": return_lse and order > 1,
    }
    for name, reason in operator.lacking(options).items():
        if given.get(name):
            raise OptionError(f"{name} has no meaning for this operator: {reason}.")
    own = bool(options.get("include_self"))
    if operator.query == "grid" and positions != grid.sizes:
        raise ShapeError(f"query must be on the grid of key, but has positions {positions} where key has {grid.sizes}.")
    if own and positions != grid.sizes:
        raise ShapeError(
            f"include_self needs the query on the grid of key, but query has positions {positions} where key has "
            f"{grid.sizes}."
        )
    spoken = read_weights(weights, mask, lengths, grid, key)
    check_indices(needs, spoken)
    checked_bias = _check_bias(bias, positions, grid, key)
    mode = _check_causal(causal, positions, grid)
    settings: dict[str, Any] = {
        "scale": default_scale(grid.dim) if scale is None else scale,
        "dropout_p": dropout_p,
        "return_lse": return_lse,
        "return_attention": return_attention,
        **options,
    }
    if checked_bias is not None:
        settings["bias"] = checked_bias
    if own:
        settings["own"] = _own_tokens(key, value, spoken)
    present = spoken.present if operator.query == "grid" else None
    query = without_absent(query, present)
    if operator.condense is not None:
        summary = make_summary(key, value, needs, spoken)
        result, _ = attend_condensed(operator, query, summary, options, mode, settings)
    elif mode is not None and operator.query == "positions":
        result = _run_causally(operator, query, key, value, needs, spoken, mode, settings)
    else:
        if mode is not None:
            settings["causal"] = mode
        summary = make_summary(key, value, needs, spoken)
        queries: Any = query
        if needs.queries is not None:
            means = marginal_means(query, needs.queries, spoken)
            queries = Means.of(grid.sizes, dict(zip(needs.queries, means, strict=True)), batch)
        result = operator.attend(queries, summary, **settings)
        if not isinstance(result.output, Tensor):
            memory = memory_order(query.stride()) if not is_recorded() else None
            result = spread_parts(result, (*grid.batch, *grid.sizes), query.dtype, memory)
    output, lse = result.output.to(query.dtype), result.lse  # in between autocast may choose types of its own
    lse = None if lse is None else lse.to(accumulation_dtype(query.dtype))
    output = without_absent(output, present)
    if lse is not None and present is not None:
        lse = lse.masked_fill(~present, -math.inf)
    if not return_lse and not return_attention:
        return output
    return AttentionResult(output, lse, result.attention, result.rho)


def attend_condensed(
    operator: Operator,
    query: Tensor,
    summary: Summary,
    options: Mapping[str, Any],
    mode: int | None,
    settings: Mapping[str, Any],
    **before: Any,
) -> tuple[AttentionResult, Any]:
    """Condense a summary of all positions, and attend to what that gives.

    Args:
        operator: An operator that condenses.
        query: Queries ``(*batch, *positions, D)``.
        summary: The summary.
        options: All options of the operator.
        mode: The causal mode, or None.
        settings: What the operator is told.
        **before: The frames before, and how many of them are seen.

    Returns:
        The result, and what returns what later frames need to know.
    """
    batch, sizes = len(summary.batch), summary.sizes
    further = query.dim() - 1 - batch - len(sizes)  # positions beside those of the grid, as heads of a group are
    shown, count = None, summary.count(tuple(range(summary.order)))
    if count is not None and further >= 0 and tuple(query.shape[batch + further : -1]) == sizes:
        shape = (*count.shape[:batch], *query.shape[batch : batch + further], *count.shape[batch:])
        shown = count[(slice(None),) * batch + (None,) * further].expand(shape).flatten(batch)
    flat = query.reshape(*summary.batch, math.prod(query.shape[batch:-1]), query.shape[-1])
    found, after = operator.condense(flat, summary, shown, causal=mode, **before, **options)  # type: ignore[misc]
    if mode is None:
        return operator.attend(query, found, **settings), after
    result = operator.attend(frames_first(query, mode + further, batch), found, **settings)
    last = functools.partial(frames_last, mode=mode + further, batch=batch)
    lse = None if result.lse is None else last(result.lse)
    attention = result.attention
    if attention is not None:  # labels of positions are those of the grid alone
        attention = last(attention[0]), *[frames_last(part, mode, batch) for part in attention[1:]]
    return AttentionResult(last(result.output), lse, attention, result.rho), after


def _run_causally(
    operator: Operator,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    needs: Needs,
    weights: Weights,
    mode: int,
    settings: dict[str, Any],
) -> AttentionResult:
    """Attend from each frame, a batch dimension, to what it may know of those up to its own."""
    batch = key.dim() - weights.order - 1
    if "bias" in settings:
        settings["bias"] = causal_bias(settings["bias"], mode)
    if "own" in settings:
        settings["own"] = tuple([frames_first(part, mode, batch) for part in settings["own"]])
    summary, _ = causal_summary(key, value, needs, weights, mode)
    result = operator.attend(frames_first(query, mode, batch), summary, **settings)
    last = functools.partial(frames_last, mode=mode, batch=batch)
    lse = None if result.lse is None else last(result.lse)
    return AttentionResult(last(result.output), lse, result.attention and tuple(map(last, result.attention)))


def spread_parts(
    result: AttentionResult, shape: Sequence[int], dtype: torch.dtype, memory: Sequence[int] | None
) -> AttentionResult:
    """Join a result that has one part a mode by outer sums.

    Args:
        result: The result.
        shape: Shape of the output without its channels ``(*batch, n_1, …, n_N)``.
        dtype: Type of the output.
        memory: Dimensions of the output from the outermost to the innermost in memory, or None for their order.
    """
    parts, lse = result.output, None
    family = main_effects(len(parts))
    output = broadcast_sum(parts, family, (*shape, parts[0].shape[-1]), memory).to(dtype)
    if result.lse is not None:
        lse = broadcast_sum([part.unsqueeze(-1) for part in result.lse], family, (*shape, 1)).squeeze(-1)
    return AttentionResult(output, lse, result.attention)


def _own_tokens(key: Tensor, value: Tensor, weights: Weights) -> tuple[Tensor, ...]:
    """Return the own key and value of each position, and where positions take part the logit that is added: 0 or −∞."""
    present = weights.present
    if present is None:
        return key, value
    hidden = torch.zeros(key.shape[:-1], dtype=accumulation_dtype(key.dtype), device=key.device)
    hidden = hidden.masked_fill(~present, -math.inf).unsqueeze(-1)
    return without_absent(key, present), without_absent(value, present), hidden


def attend_positions(query: Tensor, tokens: Tokens, batch: int, **settings: Any) -> Attended:
    """Attend from queries at any positions to sets of tokens.

    Args:
        query: Queries ``(*batch, *positions, D)``.
        tokens: The tokens.
        batch: Number of batch dimensions.
        **settings: Scale, dropout and what to return.

    Returns:
        Output, log-sum-exp, attention weights and who is alive, with the positions of the query.
    """
    shape = query.shape[:-1]
    flat = query.reshape(*shape[:batch], math.prod(shape[batch:]), query.shape[-1])
    found = attend_tokens(flat, tokens, **settings)
    alive = found.alive
    if alive is not None:
        alive = alive.expand(*alive.shape[:-1], flat.shape[-2]).reshape((*alive.shape[:-1], *shape[batch:]))
    return Attended(
        found.output.reshape(*shape, found.output.shape[-1]),
        None if found.lse is None else found.lse.reshape(shape),
        None if found.attention is None else tuple([part.reshape(*shape, part.shape[-1]) for part in found.attention]),
        alive,
    )


def attend_beside(
    operator: Operator, query: Tensor, summary: Any, key: Tensor, value: Tensor, **settings: Any
) -> AttentionResult:
    """Attend to a summary, or to what it was condensed to, and to tokens of no place beside the grid.

    The tokens count once each where each position does. An operator of one softmax takes them into it; others are
    joined with them by their log-sum-exp, which is that of all positions: exactly as far as it is.

    Args:
        operator: An operator whose queries are any positions.
        query: Queries ``(*batch, *positions, D)``.
        summary: What is attended to.
        key: Keys of the tokens ``(*batch, R, D)``.
        value: Their values ``(*batch, R, D_v)``.
        **settings: What the operator is told.

    Returns:
        The result, its attention weights those of the operator alone unless it is one softmax.

    Raises:
        OptionError: If the operator gives no log-sum-exp.
    """
    if operator.joins:
        return operator.attend(query, summary, prefix=(key, value), **settings)
    result = operator.attend(query, summary, **{**settings, "return_lse": True})
    if result.lse is None:
        raise OptionError(f"prefix has no meaning for operator {operator.name!r}: it gives no log-sum-exp.")
    tokens = Tokens(key, value, None, (TokenSet(key.shape[-2]),))
    told = {name: settings[name] for name in ("scale", "dropout_p")}
    there = attend_positions(query, tokens, len(summary.batch), return_lse=True, **told)
    output, lse = merge_attention([result[:2], there[:2]])  # type: ignore[list-item]
    return result._replace(output=output, lse=lse if settings.get("return_lse") else None)


def default_scale(dim: int) -> float:
    """Return 1/√D.

    Args:
        dim: Head size D.
    """
    return 1.0 / max(1, dim) ** 0.5


def check_indices(needs: Needs, weights: Weights) -> None:
    """Check that weights which are no product over modes have a meaning.

    Args:
        needs: What an operator needs.
        weights: What was said of the positions.

    Raises:
        OptionError: If they have none.
    """
    if needs.indices and not weights.indices and weights.grid is not None:
        raise OptionError(
            "weights of whole positions have no meaning for this operator: it counts the indices of each mode.",
            hint="Give one vector a mode, or a mask alone.",
        )


def _check_bias(
    bias: Sequence[Tensor | None] | None, positions: tuple[int, ...], grid: GridShape, like: Tensor
) -> Bias | None:
    """Check a position bias, bring it to the type of averages, and give it as many batch dimensions as the tensor has.

    Args:
        bias: For each mode a tensor ``(P_m, n_m)`` or ``(*batch, P_m, n_m)``, or None; None for no bias.
        positions: Position dimensions of the query.
        grid: Shape of the keys.
        like: A tensor of the type and device wanted.

    Returns:
        The bias of each mode, ``(*batch, P_m, n_m)`` with batch dimensions that may be 1; None if there is none.

    Raises:
        ShapeError: If there are not N of them, the query is not on a grid of N modes, or a shape does not fit.
        DtypeError: If one is a tensor that is not floating point, or holds no real numbers.
    """
    if bias is None:
        return None
    order = len(grid.sizes)
    given = mode_parts(bias, order, "bias", "tensors", ShapeError)
    if len(positions) != order:
        raise ShapeError(f"bias needs a query over {order} modes, but query has {len(positions)} position dimensions.")
    checked: list[Tensor | None] = []
    for mode, (part, rows, size) in enumerate(zip(given, positions, grid.sizes, strict=True)):
        if part is not None:
            part = real_tensor(part, f"bias of mode {mode}", like, DtypeError)
            if not part.is_floating_point():
                raise DtypeError(f"bias of mode {mode} must be floating point, got {part.dtype}.")
            if part.dim() < 2 or tuple(part.shape[-2:]) != (rows, size):
                raise ShapeError(
                    f"bias of mode {mode} has shape {tuple(part.shape)}, but query has {rows} positions and key "
                    f"{size} along the mode."
                )
            if not broadcasts_to(part.shape[:-2], grid.batch):
                raise ShapeError(
                    f"bias of mode {mode} has batch dimensions {tuple(part.shape[:-2])}, "
                    f"which do not broadcast to {grid.batch}."
                )
            part = part[(None,) * (len(grid.batch) - part.dim() + 2)].to(accumulation_dtype(like.dtype))
        checked.append(part)
    return tuple(checked)


def _check_causal(causal: int | None, positions: tuple[int, ...], grid: GridShape) -> int | None:
    """Check the causal mode.

    Args:
        causal: Index of the mode, or None.
        positions: Position dimensions of the query.
        grid: Shape of the keys.

    Returns:
        The index, from 0 to N−1, or None.

    Raises:
        ModesError: If there is no such mode.
        OptionError: If it is not an integer.
        ShapeError: If the query does not have the frames of the keys along that mode.
    """
    if causal is None:
        return None
    if not is_integer(causal):
        raise OptionError(f"causal must be the index of a mode, got {causal!r}.")
    mode = ModeSpec.parse(len(grid.sizes)).index(causal)
    if len(positions) != len(grid.sizes):
        raise ShapeError(
            f"causal needs a query over {len(grid.sizes)} modes, but query has {len(positions)} position dimensions."
        )
    if positions[mode] != grid.sizes[mode]:
        raise ShapeError(
            f"causal needs the same frames in query and key, but mode {mode} has size {positions[mode]} in query "
            f"and {grid.sizes[mode]} in key."
        )
    return mode


def causal_bias(bias: Bias, mode: int) -> Bias:
    """Rearrange a bias as `frames_first` rearranges the query.

    Args:
        bias: Checked bias.
        mode: The causal mode.
    """
    return tuple(
        part if part is None else part.unsqueeze(-2) if k == mode else part.unsqueeze(-3) for k, part in enumerate(bias)
    )


def biased(each: TokenSet, kept: Kept, bias: Bias | None, positions: Sequence[int], sizes: Sequence[int]) -> TokenSet:
    """Add the bias of the kept modes to a set of tokens.

    Args:
        each: Means over the modes that are not kept.
        kept: Modes kept.
        bias: Checked bias, or None.
        positions: Position dimensions of the query, one a mode.
        sizes: Sizes of the modes of the keys.

    Returns:
        The set, with one row of bias for each query position along the kept modes.
    """
    if bias is None or all([bias[mode] is None for mode in kept]):
        return each
    rows, columns = [positions[mode] for mode in kept], [sizes[mode] for mode in kept]
    spread = []
    for place, mode in enumerate(kept):
        part = bias[mode]
        if part is not None:
            ones = (1,) * len(kept)
            row = (*ones[:place], part.shape[-2], *ones[place + 1 :])
            spread.append(part.reshape(*part.shape[:-2], *row, *ones[:place], part.shape[-1], *ones[place + 1 :]))
    total = functools.reduce(torch.add, spread)
    batch = total.shape[: total.dim() - 2 * len(kept)]
    total = total.expand(*batch, *rows, *columns).reshape(*batch, math.prod(rows), math.prod(columns))
    index = torch.arange(math.prod(rows), device=total.device)
    index = index.reshape([positions[mode] if mode in kept else 1 for mode in range(len(positions))])
    return each._replace(bias=total, rows=index.expand(*positions).reshape(-1))
