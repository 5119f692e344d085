"""Every operator with its default options, and the other options worth a run of their own: the one list of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from tensorattn.operators import OPERATORS, Operator

__all__ = ["OPTIONS", "VARIANTS", "Variant"]

OPTIONS: list[tuple[str, Mapping[str, Any]]] = [
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
]


class Variant(NamedTuple):
    """An operator with options."""

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

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{name}={value}" for name, value in self.options.items())])


VARIANTS = [
    *(Variant(name, {}) for name in OPERATORS),
    *(
        Variant(name, options)
        for name, options in OPTIONS
        if name in OPERATORS and options.keys() <= OPERATORS[name].options.keys()
    ),
]
