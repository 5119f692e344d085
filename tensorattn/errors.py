"""Errors: the exception classes, and the one place that composes their messages.

The floors below the public functions raise a bare cause (`ShapeError("mode 2 has size 16 in key but 15 in
value.")`). A public function wears `retells`, which tells the cause again under the name that the user called,
followed by every tensor argument read through the modes.
"""

from __future__ import annotations

import functools
import inspect
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

__all__ = [
    "DtypeError",
    "ModesError",
    "OptionError",
    "ShapeError",
    "TensorAttentionError",
    "WeightsError",
    "describe",
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
    """Make a public function tell the causes raised below it in its own name and with its own arguments."""

    @functools.wraps(function)
    def told(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except TensorAttentionError as cause:
            reading = _read_call(function, args, kwargs)
            name = function.__qualname__.rpartition("<locals>.")[2]
            raise cause.retold(name, reading) from None

    return told


def _read_call(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """Read the tensors of one call through its modes, where it has both."""
    arguments = inspect.signature(function).bind(*args, **kwargs).arguments
    names = (*GRID_ARGUMENTS, QUERY_ARGUMENT)
    tensors = {name: tuple(a.shape) for name, a in arguments.items() if name in names and hasattr(a, "shape")}
    order = arguments.get("order")
    if not tensors or not isinstance(order, numbers.Integral) or isinstance(order, bool) or order < 1:
        return ""
    order = int(order)
    key = next((tensors[name] for name in ("key", "tensor", "value") if name in tensors), ())
    batch_dims = len(key) - order - 1
    return describe([str(k) for k in range(order)], tensors, batch_dims if batch_dims >= 0 else None)
