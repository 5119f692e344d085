"""Errors: the exception classes, the one place that composes their messages, and what an option may be.

What lies below a public function raises a bare cause (`ShapeError("mode 2 has size 16 in key but 15 in value.")`). A
public function wears `retells`, which tells the cause again under the name that the user called, followed by every
tensor argument read through the modes.
"""

from __future__ import annotations

import functools
import inspect
import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, ParamSpec, TypeGuard, TypeVar

import torch
from torch import Tensor

__all__ = [
    "AdapterError",
    "DtypeError",
    "ModesError",
    "OptionError",
    "ShapeError",
    "TensorAttentionError",
    "WeightsError",
    "check",
    "check_scale",
    "describe",
    "integers",
    "is_integer",
    "retells",
]

P = ParamSpec("P")
R = TypeVar("R")

GRID_ARGUMENTS = ("tensor", "key", "value")  # (*batch, n_1, …, n_N, D)
QUERY_ARGUMENT = "query"  # (*batch, *positions, D)
LAYER_ARGUMENT = "x"  # (B, n_1, …, n_N, C), or (B, C, n_1, …, n_N)


class TensorAttentionError(ValueError):
    """Base of every error that the package raises for bad input.

    Attributes:
        rule: The rule that was broken, one sentence, without the name of any function.
        hint: What to do about it, or an empty string.

    Examples:
        >>> import torch, tensorattn as ta
        >>> try:
        ...     ta.mode_averages(torch.zeros(4, 0, 8), order=2)
        ... except ta.TensorAttentionError as error:
        ...     print(type(error).__name__, error.rule)
        ShapeError mode 1 has size 0 in tensor, but every mode needs at least 1 index.
    """

    def __init__(self, rule: str, *, hint: str = "", teller: str = "", reading: str = "") -> None:
        self.rule, self.hint = rule, hint
        first = f"{teller}: {rule}" if teller else rule
        super().__init__("\n".join(part for part in (first, reading, f"  {hint}" if hint else "") if part))

    def retold(self, teller: str, reading: str = "") -> TensorAttentionError:
        """Return the same error, told by the function that the user called.

        Args:
            teller: Name of the function.
            reading: Its arguments read through the modes.

        Returns:
            The error to raise.
        """
        return type(self)(self.rule, hint=self.hint, teller=teller, reading=reading)


class ShapeError(TensorAttentionError):
    """A tensor has the wrong number of dimensions, or two sizes disagree."""


class DtypeError(TensorAttentionError):
    """A tensor is not of a floating-point type, or two types disagree."""


class WeightsError(TensorAttentionError):
    """Position weights are negative, all zero, not finite, or of the wrong length."""


class ModesError(TensorAttentionError):
    """Modes are named badly, or a mode that is asked for does not exist."""


class OptionError(TensorAttentionError):
    """An option has a value outside its range, or has no meaning for this operator."""


class AdapterError(TensorAttentionError):
    """The attention of a model cannot be replaced without changing what nobody asked to change."""


def describe(
    modes: Sequence[str],
    tensors: Mapping[str, Sequence[int]],
    batch_dims: int | None = None,
    *,
    channels_first: bool = False,
) -> str:
    """Read tensors through the modes, a line each.

    Args:
        modes: Names of the modes, in order.
        tensors: Shape of each tensor argument, by name.
        batch_dims: Number of batch dimensions of a query; without it a query is shown by its shape alone.
        channels_first: Whether the input ``x`` of a layer, which has one batch dimension, has its channels next.

    Returns:
        Lines indented by two spaces, the first naming the modes.

    Examples:
        >>> print(describe("t h w".split(), {"key": (2, 4, 8, 16, 16, 24)}))
          modes    t h w
          key      (2, 4, 8, 16, 16, 24)   batch=(2, 4) t=8 h=16 w=16 D=24
    """
    shapes = {name: str(tuple(shape)) for name, shape in tensors.items()}
    width = max(map(len, shapes.values()), default=0)
    lines = [f"  {'modes':<8} {' '.join(modes)}"]
    for name, shape in tensors.items():
        reading = " ".join(_read(name, tuple(shape), modes, batch_dims, channels_first))
        lines.append(f"  {name:<8} {shapes[name]:<{width}}   {reading}".rstrip())
    return "\n".join(lines)


def _read(
    name: str, shape: tuple[int, ...], modes: Sequence[str], batch_dims: int | None, channels_first: bool
) -> Iterable[str]:
    """Name the dimensions of one tensor argument; nothing where there are not as many as there should be."""
    if name == LAYER_ARGUMENT and len(shape) == len(modes) + 2:
        sizes = shape[2:] if channels_first else shape[1:-1]
        grid = [f"{mode}={size}" for mode, size in zip(modes, sizes, strict=True)]
        channels = [f"C={shape[1 if channels_first else -1]}"]
        return [f"batch={shape[:1]}", *(channels + grid if channels_first else grid + channels)]
    if name in GRID_ARGUMENTS and len(shape) > len(modes):
        batch, sizes = shape[: -len(modes) - 1], shape[-len(modes) - 1 : -1]
        grid = [f"{mode}={size}" for mode, size in zip(modes, sizes, strict=True)]
        return [f"batch={batch}", *grid, f"D={shape[-1]}"]
    if name == QUERY_ARGUMENT and batch_dims is not None and len(shape) > batch_dims:
        return [f"batch={shape[:batch_dims]}", f"positions={shape[batch_dims:-1]}", f"D={shape[-1]}"]
    return []


def retells(function: Callable[P, R]) -> Callable[P, R]:
    """Make a public function tell the causes raised below it in its own name and with its own arguments.

    A method is told by the class of its object: ``Class.method``, or ``Class`` alone where it is made or called. What a
    module is called with is read through its modes.

    Args:
        function: The function or method.
    """

    @functools.wraps(function)
    def told(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except TensorAttentionError as cause:
            owner, _, name = function.__qualname__.rpartition("<locals>.")[2].rpartition(".")
            if not owner:
                raise cause.retold(name, _read_call(function, args, kwargs)) from None
            teller = args[0].__name__ if isinstance(args[0], type) else type(args[0]).__name__
            if name[0] != "_" and name != "forward":
                raise cause.retold(f"{teller}.{name}") from None
            raise cause.retold(teller, _read_module_call(function, args, kwargs)) from None

    return told


def _read_call(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """Read the tensors of one call through its modes, where it has both."""
    arguments = inspect.signature(function).bind(*args, **kwargs).arguments
    names = (*GRID_ARGUMENTS, QUERY_ARGUMENT)
    tensors = {name: tuple(a.shape) for name, a in arguments.items() if name in names and hasattr(a, "shape")}
    order = arguments.get("order")
    if not tensors or not is_integer(order) or order < 1:
        return ""
    order = int(order)
    key = next((tensors[name] for name in ("key", "tensor", "value") if name in tensors), ())
    batch_dims = len(key) - order - 1
    return describe([str(k) for k in range(order)], tensors, batch_dims if batch_dims >= 0 else None)


def _read_module_call(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """Read the tensor that a module is called with through the modes of the module."""
    arguments, modes = inspect.signature(function).bind(*args, **kwargs).arguments, getattr(args[0], "modes", None)
    tensors = {name: tuple(arguments[name].shape) for name in ("x", "tensor") if hasattr(arguments.get(name), "shape")}
    if modes is None or not tensors:
        return ""
    return describe(modes.names, tensors, channels_first=getattr(args[0], "channels_first", False))


def is_integer(number: object) -> TypeGuard[int]:
    """Tell whether something is an integer, of Python or of NumPy, and no truth value.

    Args:
        number: What was given.

    Examples:
        >>> is_integer(3), is_integer(True), is_integer(3.0)
        (True, False, False)
    """
    return isinstance(number, (int, numbers.Integral)) and not isinstance(number, bool)


def integers(given: Any, argument: str) -> tuple[int, ...]:
    """Read integers, of Python or of NumPy.

    Args:
        given: A sequence of them.
        argument: Name of the argument.

    Raises:
        OptionError: If it is none.

    Examples:
        >>> integers([3, 0], "at")
        (3, 0)
    """
    found = tuple(given) if isinstance(given, Iterable) and not isinstance(given, str) else (given,)
    if not isinstance(given, Iterable) or not all(map(is_integer, found)):
        raise OptionError(f"{argument} must be integers, got {given!r}.")
    return tuple(map(int, found))


def _is_number(value: Any) -> bool:
    """Tell whether something is a real number; while a graph is recorded, it may be a symbol of one."""
    kinds = (int, float, torch.SymFloat, torch.SymInt, numbers.Real)
    return isinstance(value, kinds) and not isinstance(value, bool)


def check(
    value: Any,
    argument: str,
    kind: Literal["integer", "number", "probability", "switch"],
    *,
    least: float | None = None,
    rule: str | None = None,
) -> None:
    """Check an option.

    Args:
        value: What was given.
        argument: Name of the option.
        kind: What it must be: an integer (2.0 is none), a number, a number from 0 to 1, or True or False (a word would
            count as True, whatever it says).
        least: The least that it may be, if there is such a limit.
        rule: What it must be in words, where the kind alone does not tell.

    Raises:
        OptionError: If it is something else.

    Examples:
        >>> check("1.0", "saturation", "number", rule="positive or None")
        Traceback (most recent call last):
        tensorattn.errors.OptionError: saturation must be positive or None, got '1.0'.
    """
    needed = {
        "integer": "an integer",
        "number": "a number",
        "probability": "between 0 and 1",
        "switch": "True or False",
    }
    right = (
        isinstance(value, bool) if kind == "switch" else is_integer(value) if kind == "integer" else _is_number(value)
    )
    if not right or (kind == "probability" and not 0 <= value <= 1):
        shown = (
            f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else value if right else repr(value)
        )
        raise OptionError(f"{argument} must be {rule or needed[kind]}, got {shown}.")
    if least is not None and not value >= least:
        raise OptionError(f"{argument} must be at least {least}, got {value}.")


def check_scale(scale: Any) -> None:
    """Check the factor of the logits.

    Args:
        scale: What was given; None for the default.

    Raises:
        OptionError: If it is no finite number.
    """
    if scale is None:
        return
    if isinstance(scale, Tensor):
        hint = "For a learned scale multiply the query by it, with scale=1.0."
        raise OptionError(f"scale must be a number or None, got a tensor of shape {tuple(scale.shape)}.", hint=hint)
    check(scale, "scale", "number", rule="a number or None")
    if isinstance(scale, float) and not torch.compiler.is_compiling() and not math.isfinite(scale):
        raise OptionError(f"scale must be finite, got {scale}.")
