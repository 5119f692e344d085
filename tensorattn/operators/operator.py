"""What an operator is: what it needs to know of keys and values, and what a query does with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, NamedTuple

from torch import Tensor

from tensorattn.contraction import contract, expand
from tensorattn.errors import OptionError, ShapeError
from tensorattn.modes import GridShape, attention_shapes
from tensorattn.planning import main_effects
from tensorattn.softmax import TokenSet, attend_tokens
from tensorattn.summary import Needs, Summary, attention_summary
from tensorattn.weights import check_floating, check_weights, normalized

__all__ = ["AttentionResult", "Claim", "Needs", "Operator", "attend_means", "attend_positions", "default_scale", "run"]


class Claim(StrEnum):
    """A property that an operator may claim. What every operator has by construction is not listed."""

    EXACT = "equals flattened attention, whatever the data"
    EXACT_ON_ADDITIVE = "equals flattened attention where keys and values are additive over modes"
    KEY_SHIFT = "adding a constant to all keys changes nothing"
    VALUE_AFFINE = "an affine map of the values is the same map of the output"
    ROTATION = "rotating the channels of queries and keys together changes nothing"
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
        query: What it takes as queries: any ``positions``; the ``grid`` of the keys; or the ``means`` of a grid of
            queries, for which it returns one output a mode that an outer sum joins.
        options: Names of its options with their defaults.
        claims: From the options to the properties that hold; the test suite checks each.
    """

    name: str
    function: Callable[..., Any]
    needs: Callable[..., Needs]
    attend: Callable[..., AttentionResult]
    claims: Callable[..., frozenset[Claim]]
    query: Literal["positions", "grid", "means"] = "positions"
    options: Mapping[str, Any] = field(default_factory=dict)

    def with_defaults(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Complete options by their defaults.

        Args:
            options: Options that were given.

        Raises:
            OptionError: If the operator has no such option.
        """
        for name in options:
            if name not in self.options:
                known = ", ".join(self.options) or "none"
                raise OptionError(f"operator {self.name!r} has no option {name!r}; its options are: {known}.")
        return {**self.options, **options}


def run(
    operator: Operator,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    order: int,
    scale: float | None,
    weights: Any,
    dropout_p: float,
    return_lse: bool,
    return_attention: bool,
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
        weights: One vector a mode, or None.
        dropout_p: Probability of dropping an attention weight.
        return_lse: Whether to return the log-sum-exp.
        return_attention: Whether to return the attention weights.
        **options: Options of the operator.

    Returns:
        The output, or an `AttentionResult` where more is asked for.

    Raises:
        ShapeError: If shapes disagree, or the queries are not on the grid of the keys where they must be.
        OptionError: If ``dropout_p`` is not a probability.
    """
    check_floating(query=query, key=key, value=value)
    grid, value_dim = attention_shapes(query.shape, key.shape, value.shape, order)
    if not 0 <= dropout_p <= 1:
        raise OptionError(f"dropout_p must be between 0 and 1, got {dropout_p}.")
    checked = check_weights(weights, grid, key)
    if operator.query != "positions":
        positions = tuple(query.shape[len(grid.batch) : -1])
        if positions != grid.sizes:
            raise ShapeError(
                f"query must be on the grid of key, but has positions {positions} where key has {grid.sizes}."
            )
    summary = attention_summary(key, value, operator.needs(order, **options), checked)
    settings = {
        "scale": default_scale(grid.dim) if scale is None else scale,
        "dropout_p": dropout_p,
        "return_lse": return_lse,
        "return_attention": return_attention,
        **options,
    }
    if operator.query == "means":
        means = contract(query, (*main_effects(order), ()), normalized(checked))
        result = attend_means(operator, means, summary, GridShape(grid.batch, grid.sizes, value_dim), settings)
        result = result._replace(output=result.output.to(query.dtype))
    else:
        result = operator.attend(query, summary, **settings)
    return result if return_lse or return_attention else result.output


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
    positions = tuple(query.shape[batch:-1])
    output, lse, attention = attend_tokens(query.reshape(*query.shape[:batch], -1, query.shape[-1]), sets, **settings)
    shape = (*query.shape[:batch], *positions)
    return (
        output.reshape(*shape, output.shape[-1]),
        None if lse is None else lse.reshape(shape),
        None if attention is None else tuple(part.reshape(*shape, part.shape[-1]) for part in attention),
    )


def attend_means(
    operator: Operator, means: tuple[Tensor, ...], summary: Summary, grid: GridShape, settings: Mapping[str, Any]
) -> AttentionResult:
    """Attend from the means of a grid of queries, and join the outputs of the modes by outer sums.

    Args:
        operator: An operator that takes means.
        means: Mean queries: one tensor a mode, then the grand mean.
        summary: Summary of keys and values.
        grid: Shape of the output.
        settings: Scale, what to return, and options.
    """
    result = operator.attend(means, summary, **settings)
    family = main_effects(len(grid.sizes))
    lse = None
    if result.lse is not None:
        column = GridShape(grid.batch, grid.sizes, 1)
        lse = expand([part.unsqueeze(-1) for part in result.lse], family, column).squeeze(-1)
    return AttentionResult(expand(result.output, family, grid), lse, result.attention)


def default_scale(dim: int) -> float:
    """Return 1/√D.

    Args:
        dim: Head size D.
    """
    return 1.0 / max(1, dim) ** 0.5
