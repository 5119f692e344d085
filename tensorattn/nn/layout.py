"""The input of a module: checked against its layout before any work, and read through the modes for messages."""

from __future__ import annotations

from torch import Tensor

from tensorattn.errors import DtypeError, ShapeError
from tensorattn.masks import Part, check_floating, in_autocast
from tensorattn.modes import GridShape, ModeSpec, grid_shape

__all__ = ["channels_last", "check_grid", "check_input", "check_parameters", "show_modes"]


def check_input(
    x: Tensor,
    modes: ModeSpec,
    channels: int,
    *,
    channels_first: bool,
    called: str = "embed_dim",
    argument: str = "x",
    part: Part | None = None,
) -> GridShape:
    """Check the input of a module and read its shape.

    Args:
        x: Input ``(B, n_1, …, n_N, C)``, or ``(B, C, n_1, …, n_N)``.
        modes: Modes of the module.
        channels: Channels that it must have.
        channels_first: Which of the layouts.
        called: Name of the argument that set the channels.
        argument: Name of the input, for messages.
        part: Where it stands in a larger input, or None; a part may be empty.

    Returns:
        The shape, read.

    Raises:
        DtypeError: If the input is not a floating-point tensor.
        ShapeError: If it has the wrong number of dimensions or channels, an empty mode, or another size than its part.
    """
    check_floating(**{argument: x})
    if x.dim() != modes.order + 2:
        layout = " ".join(("B", "C", *modes.names) if channels_first else ("B", *modes.names, "C"))
        raise ShapeError(f"{argument} has {x.dim()} dimensions, but the layout ({layout}) has {modes.order + 2}.")
    shape = (x.shape[0], *x.shape[2:], x.shape[1]) if channels_first else tuple(x.shape)
    if shape[-1] != channels:
        raise ShapeError(f"{argument} has {shape[-1]} channels, but {called} is {channels}.")
    if part is None:
        return grid_shape(shape, modes, argument)
    grid = GridShape(shape[:1], shape[1:-1], shape[-1])
    for mode, (size, own, whole) in enumerate(zip(grid.sizes, part.lengths, part.sizes, strict=True)):
        if size != own:
            label = modes.label(mode)
            raise ShapeError(f"mode {label} has size {size} in {argument}, but this process holds {own} of {whole}.")
    return grid


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
    return grid_shape(tensor.shape, modes, argument)


def channels_last(tensor: Tensor, channels_first: bool) -> Tensor:
    """View the input of a module with its channels last.

    Args:
        tensor: The input.
        channels_first: Whether its channels come first.
    """
    return tensor.movedim(1, -1) if channels_first else tensor


def check_parameters(x: Tensor, parameter: Tensor | None, argument: str = "x") -> None:
    """Check that the input is where the parameters are, and of their type, unless autocast brings them together.

    Args:
        x: Input.
        parameter: One of the parameters; None where there are none.
        argument: Name of the input, for messages.

    Raises:
        DtypeError: If it is not.
    """
    if parameter is None:
        return
    if x.dtype != parameter.dtype and not in_autocast(x.device):
        raise DtypeError(f"the type is {x.dtype} in {argument} but {parameter.dtype} in the parameters.")
    if x.device != parameter.device:
        raise DtypeError(f"the device is {x.device} in {argument} but {parameter.device} in the parameters.")


def show_modes(modes: ModeSpec) -> str:
    """Show modes as they were given: names, or a number."""
    return repr(str(modes)) if modes.named else str(modes.order)
