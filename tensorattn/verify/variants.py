"""Variants: every operator with its default options, and the other options that change what it claims."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tensorattn.operators import OPERATORS

__all__ = ["Variant", "title", "variants"]

Variant = tuple[str, Mapping[str, Any]]

OPTIONS: tuple[Variant, ...] = (
    ("additive", {"interaction": "linear"}),
    ("additive", {"interaction": "linear", "saturation": None}),
    ("additive", {"include_self": True}),
    ("truncated", {"kept": ((0,), (0, 1))}),
    ("truncated", {"interaction_order": 1}),
    ("truncated", {"interaction": "linear", "saturation": 0.5}),
    ("truncated", {"include_self": True}),
    ("kao_qkv", {"centered": True}),
    ("kao_qkv", {"centered": True, "interaction": "linear", "saturation": None}),
    ("kronecker_product", {"pool": "sum"}),
    ("kronecker_sum", {"pool": "sum"}),
)


def variants(name: str | None = None) -> list[Variant]:
    """List all registered operators with their options worth a trial.

    Args:
        name: List those of this operator only.

    Examples:
        >>> variants("kao_qkv")[:2]
        [('kao_qkv', {}), ('kao_qkv', {'centered': True})]
    """
    names = list(OPERATORS) if name is None else [name]
    return [
        *((known, {}) for known in names),
        *((known, options) for known, options in OPTIONS if known in names and known in OPERATORS),
    ]


def title(variant: Variant) -> str:
    """Name an operator with its options, briefly.

    Args:
        variant: The operator.

    Examples:
        >>> title(("additive", {"interaction": "linear", "saturation": None}))
        'additive interaction=linear saturation=None'
    """
    name, options = variant
    return " ".join([name, *(f"{key}={value}".replace(" ", "") for key, value in options.items())])
