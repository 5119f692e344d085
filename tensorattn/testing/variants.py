"""Variants: every operator with its default options, and the other options that are worth a trial of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from tensorattn.functional import OPERATORS, Operator

__all__ = ["OPTIONS", "Variant", "variants"]


class Variant(NamedTuple):
    """An operator with options.

    Attributes:
        name: Name in the registry.
        options: Its options; those that are left out have their defaults.
    """

    name: str
    options: Mapping[str, Any]

    @property
    def operator(self) -> Operator:
        """Its record."""
        return OPERATORS[self.name]

    @property
    def function(self) -> Callable[..., Any]:
        """Its functional form with the options filled in."""
        return partial(self.operator.function, **self.options)

    @property
    def lacks(self) -> Mapping[str, str]:
        """Arguments without a meaning for it, each with the reason."""
        return self.operator.lacking(self.operator.with_defaults(self.options))

    @property
    def by_place(self) -> bool:
        """Whether it matters to it where a position stands among the others."""
        return self.operator.by_place(**self.operator.with_defaults(self.options))

    def __str__(self) -> str:
        return " ".join([self.name, *(f"{key}={value}".replace(" ", "") for key, value in self.options.items())])


OPTIONS: tuple[Variant, ...] = (
    Variant("additive", {"interaction": "linear"}),
    Variant("additive", {"interaction": "linear", "saturation": None}),
    Variant("additive", {"include_self": True}),
    Variant("truncated", {"kept": ((0,), (0, 1))}),
    Variant("truncated", {"interaction_order": 1}),
    Variant("truncated", {"interaction": "linear", "saturation": 0.5}),
    Variant("truncated", {"include_self": True}),
    Variant("kao_qkv", {"centered": True}),
    Variant("kao_qkv", {"centered": True, "interaction": "linear", "saturation": None}),
    Variant("clustered", {"cells": "blocks", "tokens": 4}),
    Variant("clustered", {"cells": "blocks", "tokens": 4, "additive_control": True}),
    Variant("kronecker_product", {"pool": "sum"}),
    Variant("kronecker_sum", {"pool": "sum"}),
)


def variants(name: str | None = None) -> list[Variant]:
    """List all registered operators, then those with options that change what they claim.

    Args:
        name: List those of this operator only.

    Examples:
        >>> [str(variant) for variant in variants("kao_qkv")][:2]
        ['kao_qkv', 'kao_qkv centered=True']
    """
    names = list(OPERATORS) if name is None else [name]
    return [
        *(Variant(known, {}) for known in names),
        *(
            variant
            for variant in OPTIONS
            if variant.name in names
            and variant.name in OPERATORS
            and variant.options.keys() <= OPERATORS[variant.name].options.keys()
        ),
    ]
