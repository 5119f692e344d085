"""Reader of volumes and series of volumes: NIfTI, MGH and Analyze, by nibabel."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np

from tensorattn.cli.common import require
from tensorattn.cli.readers.contents import FileArray, RecordingError, Request, Slices, Step

__all__ = ["read_nifti"]

SPACE = {"meter": "m", "mm": "mm", "micron": "µm"}
FOURTH = {"sec": ("t", "s"), "msec": ("t", "ms"), "usec": ("t", "µs"), "hz": ("f", "Hz"), "ppm": ("f", "ppm")}
WAYS = dict(L="left", R="right", A="anterior", P="posterior", S="superior", I="inferior")


def read_nifti(path: Path, request: Request) -> FileArray:
    """Read a volume ``x y z``, or a series of volumes. Axes of size 1 beyond the third are left out."""
    nibabel = require("nibabel", extra="examples", purpose="reading NIfTI")
    image = nibabel.load(path)
    stored, proxy = image.get_data_dtype(), image.dataobj
    if not hasattr(image.header, "get_zooms"):
        raise RecordingError("it holds numbers on a surface (CIFTI), not over a grid")
    scaled = (getattr(proxy, "slope", 1), getattr(proxy, "inter", 0)) not in ((1, 0), (None, None))
    small = stored.kind in "iu" and stored.itemsize <= 2  # single precision holds them, scaled too
    kind = (np.float32 if small else np.float64) if scaled else stored
    if request.sliced and stored.names is None and path.suffix.lower() not in (".gz", ".mgz"):
        array: Any = Slices(proxy, kind)
    else:
        request.allow(image.shape, kind)
        array = np.asarray(proxy, dtype=np.float32 if scaled and small else None)
    channels = array.ndim == 5 and array.shape[4] > 1
    if array.dtype.names is not None:  # the colours of NIfTI
        array, channels = np.stack([array[name] for name in array.dtype.names], axis=-1), True
    order = array.ndim - channels
    array = array.squeeze(tuple(axis for axis in range(3, order) if array.shape[axis] == 1))
    modes, steps, notes = _axes(nibabel, image, array.ndim - channels)
    if scaled:
        notes = (*notes, "numbers scaled by slope and intercept of the header")
    return FileArray(array, modes, channels, steps, notes=notes)


def _states_directions(image: Any) -> bool:
    """Say whether a file tells where its axes point: a header of NIfTI or MGH, or a .mat file beside one of Analyze."""
    codes = [image.header[name] for name in ("qform_code", "sform_code", "goodRASFlag") if name in image.header]
    if codes:
        return any(map(bool, codes))
    return Path(image.get_filename()).with_suffix(".mat").exists()


def _axes(nibabel: Any, image: Any, order: int) -> tuple[tuple[str, ...], tuple[Step | None, ...], tuple[str, ...]]:
    """Return names and steps of the modes, and what is to be told of them."""
    header, notes = image.header, []
    space, time = "unknown", "unknown"
    with contextlib.suppress(KeyError):  # a code without a meaning
        space, time = header.get_xyzt_units() if hasattr(header, "get_xyzt_units") else ("mm", "msec")
    if space not in SPACE:
        notes.append("the unit of its voxels is not stated, mm is assumed")
    fourth, unit = FOURTH.get(time, ("t", ""))
    if order > 3 and time not in FOURTH:
        notes.append("its fourth axis is not named, time t is assumed")
    units = (*(SPACE.get(space, "mm"),) * 3, unit)
    zooms = [*map(float, header.get_zooms()), *(0.0,) * order][:order]
    steps = tuple(Step(zoom, of) for zoom, of in zip(zooms, (*units, *("",) * order), strict=False))
    if order >= 3 and np.isfinite(image.affine).all():
        codes = nibabel.aff2axcodes(image.affine)
        if None not in codes:
            ways = ", ".join(f"{axis} towards {WAYS[code]}" for axis, code in zip("xyz", codes, strict=True))
            stated = _states_directions(image)
            notes.append(f"axes in the order of the file: {ways}{'' if stated else ' (assumed, it does not say)'}")
    return ("x", "y", "z", fourth)[:order], steps, tuple(notes)
