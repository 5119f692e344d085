"""The input of a module: checked against its layout before any work, and read through the modes for messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from tensorattn.errors import DtypeError, ModesError, ShapeError, describe
from tensorattn.modes import GridShape, ModeSpec
from tensorattn.presence import Presence, check_presence
from tensorattn.weights import check_floating, in_autocast

__all__ = [
    "channels_last",
    "check_grid",
    "check_input",
    "check_layer_presence",
    "check_parameters",
    "one_a_mode",
    "reading",
    "show_modes",
]


def check_input(
    x: Tensor,
    modes: ModeSpec,
    channels: int,
    *,
    channels_first: bool,
    called: str = "embed_dim",
    argument: str = "x",
) -> GridShape:
    """Check the input of a module and read its shape.

    Args:
        x: Input ``(B, n_1, …, n_N, C)``, or ``(B, C, n_1, …, n_N)``.
        modes: Modes of the module.
        channels: Channels that it must have.
        channels_first: Which of the layouts.
        called: Name of the argument that set the channels.
        argument: Name of the input, for messages.

    Returns:
        The shape, read.

    Raises:
        DtypeError: If the input is not a floating-point tensor.
        ShapeError: If it has the wrong number of dimensions or channels, or an empty mode.
    """
    check_floating(**{argument: x})
    if x.dim() != modes.order + 2:
        layout = " ".join(("B", "C", *modes.names) if channels_first else ("B", *modes.names, "C"))
        raise ShapeError(f"{argument} has {x.dim()} dimensions, but the layout ({layout}) has {modes.order + 2}.")
    found = x.shape[1 if channels_first else -1]
    if found != channels:
        raise ShapeError(f"{argument} has {found} channels, but {called} is {channels}.")
    sizes = tuple(x.shape[2:] if channels_first else x.shape[1:-1])
    _check_sizes(sizes, modes, argument)
    return GridShape((x.shape[0],), sizes, channels)


def check_grid(tensor: Tensor, modes: ModeSpec, argument: str) -> GridShape:
    """Check a tensor over a grid with any batch dimensions and read its shape.

    Args:
        tensor: Values ``(*batch, n_1, …, n_N, D)``.
        modes: Its modes.
        argument: Its name, for messages.

    Returns:
        The shape, read.

    Raises:
        DtypeError: If it is not a floating-point tensor.
        ShapeError: If it has too few dimensions, or an empty mode.
    """
    check_floating(**{argument: tensor})
    order = modes.order
    if tensor.dim() < order + 1:
        raise ShapeError(
            f"{argument} has {tensor.dim()} dimensions, but order {order} needs at least {order + 1}.",
            hint="The layout is (*batch, n_1, ..., n_N, D).",
        )
    sizes = tuple(tensor.shape[-order - 1 : -1])
    _check_sizes(sizes, modes, argument)
    return GridShape(tuple(tensor.shape[: -order - 1]), sizes, tensor.shape[-1])


def check_layer_presence(
    grid: GridShape,
    like: Tensor,
    modes: ModeSpec,
    *,
    of: str = "x",
    weights: Any = None,
    mask: Any = None,
    lengths: Any = None,
    part_of: int | None = None,
) -> Presence:
    """Check what is said of the positions of the input of a module, or of its context.

    Args:
        grid: Its shape.
        like: A tensor of the type and device wanted.
        modes: Its modes.
        of: Its name, for messages.
        weights: As in `check_presence`.
        mask: As in `check_presence`.
        lengths: As in `check_presence`, or a mapping from modes.
        part_of: A mode of which the tensor is a part.

    Returns:
        What is said of them.

    Raises:
        ModesError: If lengths name a mode that does not exist.
    """
    if isinstance(lengths, Mapping):
        lengths = one_a_mode(modes, lengths, "lengths")
    return check_presence(weights, mask, lengths, grid, like, modes, of=of, part_of=part_of)


def channels_last(tensor: Tensor, channels_first: bool) -> Tensor:
    """View the input of a module with its channels last.

    Args:
        tensor: The input.
        channels_first: Whether its channels come first.
    """
    return tensor.movedim(1, -1) if channels_first else tensor


def check_parameters(x: Tensor, parameter: Tensor, argument: str = "x") -> None:
    """Check that the input is where the parameters are, and of their type, unless autocast brings them together.

    Args:
        x: Input.
        parameter: One of the parameters.
        argument: Name of the input, for messages.

    Raises:
        DtypeError: If it does not.
    """
    if x.dtype != parameter.dtype and not in_autocast(x.device):
        raise DtypeError(f"the type is {x.dtype} in {argument} but {parameter.dtype} in the parameters.")
    if x.device != parameter.device:
        raise DtypeError(f"the device is {x.device} in {argument} but {parameter.device} in the parameters.")


def reading(x: Any, modes: ModeSpec, *, channels_first: bool) -> str:
    """Read the input of a module through its modes; nothing of what is no tensor.

    Args:
        x: Input.
        modes: Modes of the module.
        channels_first: Whether its channels come first.
    """
    if not isinstance(x, Tensor):
        return ""
    return describe(modes.names, {"x": tuple(x.shape)}, channels_first=channels_first)


def show_modes(modes: ModeSpec) -> str:
    """Show modes as they were given: names, or a number."""
    return repr(str(modes)) if modes.named else str(modes.order)


def one_a_mode(modes: ModeSpec, given: Any, argument: str) -> list[Any]:
    """Spell out what was given for some modes or for all: by mode, one a mode, or one thing for every mode.

    Args:
        modes: The modes.
        given: A mapping from names or indices of modes, a sequence of N things, or one thing.
        argument: Its name, for messages.

    Returns:
        A list of N things, None for modes that a mapping leaves out.

    Raises:
        ModesError: If a mapping names a mode that does not exist, or one mode twice, or a sequence is too short or
            too long.

    Examples:
        >>> one_a_mode(ModeSpec.parse("t h w"), {"w": 3}, "patch"), one_a_mode(ModeSpec.parse(2), 3, "patch")
        ([None, None, 3], [3, 3])
    """
    if isinstance(given, Mapping):
        found: dict[int, Any] = {}
        for mode, thing in given.items():
            index = modes.index(mode)
            if index in found:
                raise ModesError(f"{argument} names mode {modes.names[index]!r} twice.")
            found[index] = thing
        return [found.get(index) for index in range(modes.order)]
    if isinstance(given, Sequence) and not isinstance(given, str):
        if len(given) != modes.order:
            raise ModesError(f"{argument} has {len(given)} entries, but order {modes.order} needs one a mode.")
        return list(given)
    return [given] * modes.order


def _check_sizes(sizes: Sequence[int], modes: ModeSpec, argument: str) -> None:
    """Refuse an empty mode."""
    for mode, size in enumerate(sizes):
        if size == 0:
            label = modes.label(mode)
            raise ShapeError(f"mode {label} has size 0 in {argument}, but every mode needs at least 1 index.")
