"""Definitions: what an operator of this package has to return, by its definition in NumPy."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from tensorattn import reference
from tensorattn.operators import Operator
from tensorattn.testing.cases import Case
from tensorattn.testing.tolerances import exact

__all__ = ["Array", "Definition", "arrays", "as_array", "attention", "find_definition", "with_own_token"]

Array = npt.NDArray[np.float64]
Definition = Callable[[Case], tuple[Array, Array | None]]

PACKAGE = reference.__name__.rpartition(".")[0]


def as_array(tensor: Tensor | Array) -> Array:
    """Return a tensor as a float64 array.

    Args:
        tensor: Tensor, on any device, or an array.
    """
    return exact(tensor).numpy() if isinstance(tensor, Tensor) else np.asarray(tensor, dtype=np.float64)


def arrays(case: Case) -> dict[str, Any]:
    """Return a case as the arguments of a function of the oracle, which takes everything by name.

    Args:
        case: Arguments.
    """
    return {
        "query": as_array(case.query),
        "key": as_array(case.key),
        "value": as_array(case.value),
        "order": case.order,
        "scale": case.scale,
        "weights": None if case.weights is None else [None if w is None else as_array(w) for w in case.weights],
    }


def attention(case: Case, bias: Sequence[Tensor | None] | None = None) -> tuple[Array, Array]:
    """Return full attention, the truth that everything is compared with, and its log-sum-exp.

    Args:
        case: Arguments.
        bias: Terms added to the logits, one tensor or None a mode; None for none.
    """
    tables = None if bias is None else [None if part is None else as_array(part) for part in bias]
    return reference.flattened_attention(**arrays(case), bias=tables)


def with_own_token(case: Case, output: Array, lse: Array | None) -> tuple[Array, Array]:
    """Merge the token at each query's own position into its attention.

    Args:
        case: Arguments, with queries on the grid of the keys.
        output: Attention of each query.
        lse: Its log-sum-exp.
    """
    query, key, value = (as_array(tensor) for tensor in (case.query, case.key, case.value))
    logit = case.factor * (query * key).sum(-1)
    assert lse is not None
    return reference.merge_attention([(output, lse), (value, logit)])


def find_definition(operator: Operator, options: Mapping[str, Any]) -> Definition | None:
    """Return the definition of an operator of this package with its options, if there is one.

    Args:
        operator: The operator.
        options: All its options.

    Returns:
        The definition, or None if `tensorattn.reference` does not have the operator, or not with these options.
    """
    name = getattr(operator.function, "__name__", "")
    ours = getattr(operator.function, "__module__", "").startswith(f"{PACKAGE}.")
    if not ours or name not in reference.__all__:
        return None
    function = getattr(reference, name)
    known = inspect.signature(function).parameters
    given = {key: value for key, value in options.items() if key in known}
    for key, value in options.items():
        if key not in known and key != "include_self" and value != operator.options.get(key):
            return None
    own = bool(options.get("include_self"))
    return functools.partial(_define, function, given, own)


def _define(
    function: Callable[..., tuple[Array, Array | None]], options: Mapping[str, Any], own: bool, case: Case
) -> tuple[Array, Array | None]:
    """Evaluate a definition for a case."""
    given = dict(options)
    if "interaction_order" in given and given["kept"] is None and given["interaction_order"] is None:
        given["interaction_order"] = min(2, case.order)  # the operator has a default, the definition none
    output, lse = function(**arrays(case), **given)
    return with_own_token(case, output, lse) if own else (output, lse)
