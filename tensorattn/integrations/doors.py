"""What a swapped layer knows, and how it is entered and left: the part of a swap that stays in the model.

A door is an attribute of the module whose attention it computes. It is no parameter, buffer or submodule, so the
state dict never changes; it is copied and saved with the module; and whatever holds the module can restore it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from tensorattn.errors import AdapterError, TensorAttentionError
from tensorattn.functional.grid import grid_attention

__all__ = [
    "BESIDE",
    "DOOR",
    "Beside",
    "Door",
    "Site",
    "Way",
    "above",
    "attend",
    "by_forward",
    "class_name",
    "door_of",
    "leave",
    "own_door",
    "refuse",
    "tell",
]

DOOR, BESIDE = "_tensorattn_door", "_tensorattn_beside"
Enter = Callable[[nn.Module, Any], None]


@dataclass(frozen=True)
class Way:
    """How a module is changed, and changed back.

    Attributes:
        enter: From the module, and what it keeps, to nothing.
        leave: Likewise.
    """

    enter: Enter
    leave: Enter


@dataclass
class Door:
    """What a swapped layer knows.

    Attributes:
        name: Name of the module in the model.
        way: How it is entered and left.
        operator: Name of the operator.
        options: Its options.
        grid: Sizes of the modes; None until a module above tells them.
        prefix: Number of tokens before the grid.
        dropout: Probability of dropping an attention weight in training; None for that of the host.
        told: Whether each call tells the grid.
        probe: What computes instead, while a swap is verified.
        before: What the way in has to remember for the way out.
    """

    name: str
    way: Way
    operator: str
    options: Mapping[str, Any]
    grid: tuple[int, ...] | None
    prefix: int
    dropout: float | None = None
    told: bool = False
    probe: Callable[..., Tensor] | None = None
    before: Any = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, dropout_p: float = 0.0, **asked: Any) -> Tensor:
        """Attend as `grid_attention` does.

        Args:
            query: Queries ``(B, H, L, D)``.
            key: Keys.
            value: Values.
            dropout_p: Probability of dropping an attention weight.
            **asked: Scale and mask of the keys.

        Raises:
            AdapterError: If the tokens are not those of the grid.
        """
        if self.grid is None:
            raise AdapterError(f"{self.name} does not know its grid: no module above it has been called.")
        attention = grid_attention if self.probe is None else self.probe
        asked.update(grid=self.grid, prefix=self.prefix, operator=self.operator, dropout_p=dropout_p)
        try:
            return attention(query, key, value, **asked, **self.options)
        except AdapterError:
            raise
        except TensorAttentionError as cause:
            raise AdapterError(f"in {self.name}, {cause.rule}", hint=cause.hint) from None


@dataclass
class Beside:
    """What a module that is no attention layer but is changed with it knows.

    Attributes:
        way: How it is entered and left.
        doors: The doors that it tells of the grid.
        before: What the way in has to remember for the way out.
    """

    way: Way
    doors: list[Door] = field(default_factory=list)
    before: Any = None


@dataclass(frozen=True)
class Site:
    """One attention layer of a model, as the adapter of its host reads it.

    Attributes:
        name: Name of the module in the model.
        module: The module.
        way: How it is entered and left.
        grid: Sizes of the modes; None where the host does not tell, or where a module above tells them in each call.
        prefix: Number of tokens before the grid; None where the host does not tell.
        dropout: Probability with which the host drops attention weights in training.
        rotary: Whether queries and keys are turned by their places.
        beside: Modules that are changed too, with their ways.
        tells: Whether each call tells the grid, to those or to the layer itself.
        refused: Why it cannot be replaced; empty where it can.
        kept: Why it is left as it is; empty where it is not.
    """

    name: str
    module: nn.Module
    way: Way | None = None
    grid: tuple[int, ...] | None = None
    prefix: int | None = 0
    dropout: float = 0.0
    rotary: bool = False
    beside: tuple[tuple[nn.Module, Way], ...] = ()
    tells: bool = False
    refused: str = ""
    kept: str = ""


def door_of(module: nn.Module) -> Door | None:
    """Return the door of a module, or None.

    Args:
        module: Any module.
    """
    return vars(module).get(DOOR)


def own_door(module: nn.Module) -> Door:
    """Return the door of a module that is swapped.

    Args:
        module: A swapped module.
    """
    return vars(module)[DOOR]


def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **asked: Any) -> Tensor:
    """Attend through the door of a module.

    Args:
        module: A swapped module.
        query: Queries ``(B, H, L, D)``.
        key: Keys.
        value: Values.
        **asked: Scale, dropout and mask of the keys.
    """
    door = own_door(module)
    if door.dropout is not None:
        asked["dropout_p"] = door.dropout if module.training else 0.0
    return door.attend(query, key, value, **asked)


def refuse(module: nn.Module, **asked: Any) -> None:
    """Refuse what a call asks of a layer and what has no meaning for an operator.

    Args:
        module: A swapped module.
        **asked: What was given, by its name; nothing where it is None or False.

    Raises:
        AdapterError: If something was given.
    """
    for name, given in asked.items():
        if given is not None and given is not False:
            called = f"{own_door(module).name} was called with {name}"
            raise AdapterError(f"{called}, which has no meaning for operators over a grid.")


def above(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """Yield the modules that contain a module, from the nearest to the model.

    Args:
        model: The model.
        name: Name of the module in it.
    """
    while name:
        name = name.rpartition(".")[0]
        yield model.get_submodule(name)


def class_name(module: nn.Module) -> str:
    """Return the full name of the class of a module.

    Args:
        module: Any module.
    """
    kind = type(module)
    return f"{kind.__module__}.{kind.__qualname__}"


def tell(module: nn.Module, grid: tuple[int, ...]) -> None:
    """Tell the attention layers below a module the grid of this call.

    Args:
        module: The module.
        grid: Sizes of the modes.
    """
    for door in vars(module)[BESIDE].doors:
        door.grid = grid


def leave(model: nn.Module) -> int:
    """Leave all doors of a model.

    Args:
        model: The model.

    Returns:
        How many layers were restored.
    """
    return sum(1 for _ in _left(model))


def _left(model: nn.Module) -> Iterator[Door]:
    """Leave every module, and yield the doors that were entered."""
    for module in model.modules():
        beside, door = vars(module).pop(BESIDE, None), vars(module).pop(DOOR, None)
        if beside is not None:
            beside.way.leave(module, beside)
        if door is not None:
            door.way.leave(module, door)
            yield door


def by_forward(forward: Callable[..., Any]) -> Way:
    """Return the way of a module whose forward is another one: its class becomes a subclass that differs in it alone.

    Args:
        forward: The method.
    """
    return Way(functools.partial(_enter_class, forward), _leave_class)


def _enter_class(forward: Callable[..., Any], module: nn.Module, _: Any) -> None:
    kind: Any = type(module)
    module.__class__ = _subclass(kind, forward)


def _leave_class(module: nn.Module, _: Any) -> None:
    if isinstance(module, _Swapped):
        module.__class__ = type(module).swapped_from  # type: ignore[assignment]


class _Swapped:
    """Mixed into the class of a swapped module, which is made when it is needed: how to make it again."""

    swapped_from: type[nn.Module]
    swapped_by: Callable[..., Any]

    def __reduce_ex__(self, protocol: Any) -> Any:
        kind = type(self)
        return _revived, (kind.swapped_from, kind.swapped_by), vars(self)


@functools.cache
def _subclass(kind: Any, forward: Callable[..., Any]) -> Any:
    """Return the subclass."""
    own = {"swapped_from": kind, "swapped_by": staticmethod(forward), "forward": forward, "__module__": kind.__module__}
    return type(f"Swapped{kind.__name__}", (_Swapped, kind), own)


def _revived(kind: Any, forward: Callable[..., Any]) -> Any:
    """Return an empty module of the subclass, for what copies or loads it."""
    made = _subclass(kind, forward)
    return made.__new__(made)
