"""The operators and their registry: one file an operator, one line here."""

from __future__ import annotations

from tensorattn.errors import OptionError
from tensorattn.operators import (
    additive,
    axial,
    flattened,
    kao_kv,
    kao_qkv,
    kronecker_product,
    kronecker_sum,
    truncated,
)
from tensorattn.operators.operator import AttentionResult, Claim, Operator

__all__ = ["OPERATORS", "AttentionResult", "Claim", "Operator", "get_operator", "register_operator"]

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


register_operator(additive.OPERATOR)
register_operator(truncated.OPERATOR)
register_operator(kao_kv.OPERATOR)
register_operator(kao_qkv.OPERATOR)
register_operator(kronecker_product.OPERATOR)
register_operator(kronecker_sum.OPERATOR)
register_operator(axial.OPERATOR)
register_operator(flattened.OPERATOR)
