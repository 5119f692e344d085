"""Class and register tokens beside a grid: checked, and what becomes of them."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from tensorattn.errors import DtypeError, OptionError, ShapeError
from tensorattn.masks import check_floating, in_autocast

__all__ = ["Prefix", "check_prefix", "check_prefix_meaning"]


class Prefix(NamedTuple):
    """Tokens of no place, projected.

    Attributes:
        query: Their queries ``(B, H, R, D)``.
        key: Their keys, with the heads that the keys of the grid have.
        value: Their values, likewise.
    """

    query: Tensor
    key: Tensor
    value: Tensor


def check_prefix(prefix: Any, x: Tensor, channels: int) -> None:
    """Check tokens beside an input.

    Args:
        prefix: The tokens ``(B, R, C)``.
        x: The input.
        channels: Its channels C.

    Raises:
        DtypeError: If they are not floating point, or of another type or elsewhere than the input.
        ShapeError: If they are not ``(B, R, C)``.
    """
    check_floating(prefix=prefix)
    if prefix.dim() != 3:
        raise ShapeError(f"prefix has {prefix.dim()} dimensions, but the layout (B R C) has 3.")
    if prefix.shape[0] != x.shape[0]:
        raise ShapeError(f"the batch is {x.shape[0]} in x but {prefix.shape[0]} in prefix.")
    if prefix.shape[2] != channels:
        raise ShapeError(f"prefix has {prefix.shape[2]} channels, but embed_dim is {channels}.")
    if prefix.dtype != x.dtype and not in_autocast(x.device):
        raise DtypeError(f"the type is {x.dtype} in x but {prefix.dtype} in prefix.")
    if prefix.device != x.device:
        raise DtypeError(f"the device is {x.device} in x but {prefix.device} in prefix.")


def check_prefix_meaning(*, context: Any, causal: int | None, mode_projections: bool) -> None:
    """Check that tokens beside an input have a meaning.

    Args:
        context: Context of the layer, or None.
        causal: Its causal mode, or None.
        mode_projections: Whether it has one map a mode.

    Raises:
        OptionError: If they have none.
    """
    reasons = {
        "a context": (context is not None, "they are of x"),
        "causal": (causal is not None, "they see all frames, and would tell earlier ones of later ones"),
        "mode_projections": (mode_projections, "they are of no mode"),
    }
    for name, (given, reason) in reasons.items():
        if given:
            raise OptionError(f"prefix has no meaning with {name}: {reason}.")
