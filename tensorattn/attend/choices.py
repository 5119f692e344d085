"""Choices: operators with their options, as the command line names them: ``kao_qkv:centered=True``."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tensorattn.diagnose import takes_any_positions
from tensorattn.errors import OptionError
from tensorattn.operators import OPERATORS, Operator, get_operator

__all__ = ["Choice", "default_choices", "parse_choice", "parse_choices"]

VARIANTS = (
    "additive:interaction=linear",
    "kao_qkv:centered=True",
)  # run by default beside every operator with its default options


@dataclass(frozen=True, eq=False)  # told apart by identity, so that it can be a key
class Choice:
    """An operator with some of its options.

    Attributes:
        label: What the user called it.
        record: The operator.
        options: Options that differ from the defaults.
    """

    label: str
    record: Operator
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def any_positions(self) -> bool:
        """Whether it takes any list of queries, not only the grid of the keys."""
        return takes_any_positions(self.record, self.options)

    def bind(self, *, order: int, scale: float) -> Callable[..., Any]:
        """Return the functional form with everything settled but queries, keys and values.

        Args:
            order: Number of modes.
            scale: Factor of the logits.
        """

        def call(*tensors: Any, **more: Any) -> Any:
            return self.record.function(*tensors, order=order, scale=scale, **self.options, **more)

        return call


def parse_choice(text: str) -> Choice:
    """Read an operator and its options.

    Args:
        text: A name, then each option after a colon: ``"truncated:interaction_order=2"``.

    Returns:
        The choice.

    Raises:
        OptionError: If there is no such operator or no such option, or an option is no switch and should be one.

    Examples:
        >>> parse_choice("kao_qkv:centered=True").options
        {'centered': True}
    """
    name, *settings = text.strip().split(":")
    if name not in OPERATORS:
        raise OptionError(f"--operator {name!r} is not one of: {', '.join(OPERATORS)}.")
    record, options = get_operator(name), {}
    for setting in settings:
        option, equals, value = setting.partition("=")
        if not equals:
            raise OptionError(f"--operator {text!r}: an option is written name=value, got {setting!r}.")
        options[option] = _literal(value)
    try:
        record.with_defaults(options)
    except OptionError as cause:
        raise OptionError(f"--operator {text.strip()!r}: {cause.rule}") from None
    return Choice(text.strip(), record, options)


def _literal(text: str) -> Any:
    """Read a number, True, False, None or a tuple; anything else is a word."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def parse_choices(texts: Iterable[str]) -> tuple[Choice, ...]:
    """Read several choices, each once.

    Args:
        texts: Operators with their options.

    Returns:
        The choices, in the order they were first named.

    Examples:
        >>> [choice.label for choice in parse_choices(["additive", "kao_kv", "additive"])]
        ['additive', 'kao_kv']
    """
    return tuple(parse_choice(text) for text in dict.fromkeys(text.strip() for text in texts))


def default_choices() -> tuple[Choice, ...]:
    """Return every registered operator, each followed by its variants."""
    return parse_choices(
        text for name in OPERATORS for text in (name, *(each for each in VARIANTS if each.split(":")[0] == name))
    )
