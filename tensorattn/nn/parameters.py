"""Parameters of a module: drawn anew together with those of its parts, and what type they have."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["draw_linear", "parameter_of", "reset_parts"]


def reset_parts(module: nn.Module) -> None:
    """Draw the parameters of all parts of a module anew: each part by its own ``reset_parameters``, or by its parts.

    Args:
        module: The module. Parameters that are its own and of no part are left as they are.
    """
    for part in module.children():
        reset = getattr(part, "reset_parameters", None)
        if callable(reset):
            reset()
        else:
            reset_parts(part)


def draw_linear(linear: nn.Linear, maps: int = 1) -> None:
    """Draw a linear map, Xavier uniform, and set its bias to zero.

    Args:
        linear: The map.
        maps: How many maps lie below each other in it; each is drawn by itself.
    """
    for weight in linear.weight.chunk(maps):
        nn.init.xavier_uniform_(weight)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


def parameter_of(module: nn.Module) -> Tensor | None:
    """Return the first floating-point parameter of a module, which tells its type and device; None if there is none.

    No part is asked for its weight by name: it may be any module that does the same, quantised or with adapters.

    Args:
        module: The module.
    """
    return next((parameter for parameter in module.parameters() if parameter.is_floating_point()), None)
