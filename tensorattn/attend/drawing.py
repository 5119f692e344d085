"""Attention maps of anyone's own model, drawn over frames or slices of what they were computed from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from tensorattn.attend.figures import Place, maps_figure
from tensorattn.attend.recordings import MAX_ORDER, Recording
from tensorattn.errors import OptionError, ShapeError, retells
from tensorattn.modes import ModeSpec, is_integer

__all__ = ["draw_attention_maps"]

Array = np.ndarray[Any, Any]


@retells
def draw_attention_maps(
    maps: Mapping[str, Tensor | Array] | Tensor | Array,
    data: Tensor | Array,
    *,
    at: Sequence[int],
    modes: int | str | Sequence[str] | None = None,
    title: str = "attention",
) -> Any:
    r"""Draw attention maps of one query over the data: slices through the query, one row a map, the data on top.

    Weights are drawn relative to uniform attention, on one scale of colours that the first map sets. Maps of a grid of
    patches are stretched over the elements that each patch holds.

    Args:
        maps: Weights over the grid, by what they are; or those of one map. As `attention_map` returns them, of one
            sample and head.
        data: What the model saw: a video, a volume, an image, a series.
        at: The query, one index a mode of the grid.
        modes: Names of the modes, as in ``"t h w"``; numbers by default.
        title: What it is, in words.

    Returns:
        A ``matplotlib.figure.Figure`` that belongs to no window: save it by ``figure.savefig("maps.png")``.

    Raises:
        ShapeError: If the maps differ in size, or do not lie on the data.
        OptionError: If there is no map, or ``at`` does not name one of its places.
        ModesError: If ``modes`` does not fit.
        MissingPackageError: If matplotlib is not installed.

    Shape:
        - maps: :math:`(g_1, \dots, g_N)` with at most six modes
        - data: :math:`(n_1, \dots, n_N)` or, with channels, :math:`(n_1, \dots, n_N, C)`; :math:`n_m` indices lie in
          :math:`g_m` patches of equal size, the last of which may be smaller

    Examples:
        >>> import torch
        >>> video, weights = torch.rand(8, 32, 32, 3), torch.rand(8, 16, 16)
        >>> figure = draw_attention_maps(weights / weights.sum(), video, at=(4, 8, 8), modes="t h w")
        >>> len(figure.axes)  # three slices of the video, three of the map, and the scale
        7
    """
    named = dict(maps) if isinstance(maps, Mapping) else {"weights": maps}
    arrays = {name: _array(each, f"maps[{name!r}]") for name, each in named.items()}
    if not arrays:
        raise OptionError("maps is empty, but at least one map is needed.")
    (first, grid), *others = [(name, each.shape) for name, each in arrays.items()]
    for name, shape in others:
        if shape != grid:
            raise ShapeError(f"the map has shape {grid} in maps[{first!r}] but {shape} in maps[{name!r}].")
    order, values = len(grid), _array(data, "data")
    if not 1 <= order <= MAX_ORDER:
        raise ShapeError(f"a map has {order} modes, but 1 to {MAX_ORDER} can be drawn.")
    if values.ndim not in (order, order + 1):
        raise ShapeError(
            f"data has {values.ndim} dimensions, but {order} modes need {order}, or {order + 1} with channels."
        )
    values = values[..., None] if values.ndim == order else values
    spec = ModeSpec.parse(order if modes is None else modes)
    if spec.order != order:
        raise ShapeError(f"modes names {spec.order} modes, but the maps have {order}.")
    patch = _patch(grid, values.shape[:-1], spec)
    recording = Recording(title, title, values, spec)
    return maps_figure(recording, Place(spec, recording.sizes, patch, _place(at, grid)), "", arrays)


def _array(given: Any, what: str) -> Array:
    """Read numbers as an array of NumPy."""
    if isinstance(given, Tensor):
        given = given.detach().float().cpu().numpy()
    array = np.asarray(given)
    if array.dtype.kind not in "fiub":
        raise OptionError(f"{what} must hold real numbers, got {array.dtype}.")
    return array


def _patch(grid: Sequence[int], sizes: Sequence[int], spec: ModeSpec) -> tuple[int, ...]:
    """Sizes of the patches that a grid lies in."""
    patch = tuple(-(-size // count) for count, size in zip(grid, sizes, strict=True))
    for mode, (part, count, size) in enumerate(zip(patch, grid, sizes, strict=True)):
        if -(-size // part) != count:
            raise ShapeError(
                f"mode {spec.label(mode)} has size {size} in data, which patches of equal size do not cut into {count}."
            )
    return patch


def _place(at: Sequence[int], grid: Sequence[int]) -> tuple[int, ...]:
    """Check the place of a query."""
    indices = tuple(at)
    if len(indices) != len(grid) or not all(map(is_integer, indices)):
        raise OptionError(f"at must be {len(grid)} integers, got {at!r}.")
    for mode, (index, size) in enumerate(zip(indices, grid, strict=True)):
        if not -size <= index < size:
            raise OptionError(f"at has index {index} in mode {mode}, but the size there is {size}.")
    return tuple(int(index) % size for index, size in zip(indices, grid, strict=True))
