"""Readers of plain arrays: NumPy, HDF5 and zarr."""

from __future__ import annotations

import contextlib
import math
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tensorattn.cli.common import require
from tensorattn.cli.readers.contents import FileArray, RecordingError, Request, Slices, Step, choose

__all__ = ["read_hdf5", "read_npy", "read_npz", "read_zarr"]

GAPS, SCALES = ("_FillValue", "missing_value"), ("scale_factor", "add_offset")
UNITS = {"millimeter": "mm", "micrometer": "µm", "nanometer": "nm", "centimeter": "cm", "meter": "m"}
UNITS |= {"second": "s", "millisecond": "ms", "microsecond": "µs", "minute": "min"}


def read_npy(path: Path, request: Request) -> FileArray:
    """Read a NumPy array of any layout. Object arrays are refused: no pickle is ever opened."""
    with path.open("rb") as file:
        _check_header(file, path.stat().st_size, None if request.sliced else request)
        if request.sliced:
            return FileArray(Slices(_Mapped(path)))
        file.seek(0)
        return FileArray(np.lib.format.read_array(file, allow_pickle=False))


class _Mapped:
    """An array of NumPy in its file, which is mapped anew for each part, so that no more than that is held."""

    def __init__(self, path: Path) -> None:
        self.path = path
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)
        self.shape, self.dtype = mapped.shape, mapped.dtype

    def __getitem__(self, places: tuple[slice, ...]) -> Any:
        """Read a part."""
        return np.array(np.load(self.path, mmap_mode="r", allow_pickle=False)[places])


def read_npz(path: Path, request: Request) -> FileArray:
    """Read one array of a NumPy archive: the one called ``key``, or the only one."""
    with path.open("rb") as file:
        if file.read(6) == np.lib.format.MAGIC_PREFIX:
            raise RecordingError("it is a single array, not an archive; call it .npy")
    with zipfile.ZipFile(path) as archive:
        members = {name.removesuffix(".npy"): name for name in archive.namelist() if name.endswith(".npy")}
        member = members[choose(dict.fromkeys(members, ""), request.key)]
        with archive.open(member) as file:
            _check_header(file, archive.getinfo(member).file_size, request)
        with archive.open(member) as file:
            return FileArray(np.lib.format.read_array(file, allow_pickle=False))


def _check_header(file: Any, length: int, request: Request | None) -> None:
    """Refuse an array that is too large, where it is to be read whole, or that promises more bytes than there are."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if request is not None:
        request.allow(shape, dtype)
    promised = int(np.prod(shape, dtype=object)) * dtype.itemsize
    if not dtype.hasobject and promised > length:
        raise RecordingError(f"its header promises {promised:,} bytes, but it holds {length:,}; it is cut short")


def read_hdf5(path: Path, request: Request) -> FileArray:
    """Read one dataset of an HDF5 file: the one called ``key``, or the only one that is an array of numbers."""
    h5py = require("h5py", extra="files", purpose="reading HDF5")
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(h5py.File(path, "r"))
        held: dict[str, str] = {}
        key = None if request.key is None else request.key.strip("/")

        def note(name: str, item: Any) -> None:
            """Remember an array of numbers."""
            is_array = isinstance(item, h5py.Dataset) and item.ndim and item.dtype.kind in "biufc"
            if is_array and (not item.is_scale or name == key):  # the ticks of an axis are no recording
                held[name] = _shape_in_words(item)

        file.visititems(note)
        if key and isinstance(linked := file.get(key), h5py.Dataset):  # a visit does not follow links
            note(key, linked)
        dataset = file[choose(held, key)]
        found = _unpacked(dataset, [axis.label or next(iter(axis.keys()), "") for axis in dataset.dims], request)
        if isinstance(found.array, Slices):
            stack.pop_all()  # it stays open
        return found


def read_zarr(path: Path, request: Request) -> FileArray:
    """Read one array of a zarr store, a directory or a zip: the one called ``key``, or the only or finest one."""
    zarr = require("zarr", extra="files", purpose="reading zarr")
    store = zarr.storage.ZipStore(path, mode="r") if path.is_file() else str(path)
    root = zarr.open(store, mode="r")
    if isinstance(root, zarr.Array):
        if request.key is not None:
            raise RecordingError(f"there is no array {request.key!r} in it: it is a single array, leave out --key")
        return _from_zarr(root, request)
    arrays = {name: item for name, item in root.members(max_depth=None) if _is_numbers(zarr, item)}
    scales = (root.attrs.get("ome") or root.attrs).get("multiscales")  # OME-Zarr
    key = None if request.key is None else request.key.strip("/")
    for level in scales[0]["datasets"] if scales else ():  # the finest is the first
        if level["path"] in arrays and key in (None, level["path"]):
            return _with_ome_axes(_unpacked(arrays[level["path"]], (), request), scales[0], level)
    return _from_zarr(arrays[choose({name: _shape_in_words(each) for name, each in arrays.items()}, key)], request)


def _is_numbers(zarr: Any, item: Any) -> bool:
    """Say whether a member of a store is an array of numbers."""
    return isinstance(item, zarr.Array) and item.ndim > 0 and item.dtype.kind in "biufc"


def _from_zarr(array: Any, request: Request) -> FileArray:
    """Read an array of zarr."""
    names = getattr(array.metadata, "dimension_names", None) or array.attrs.get("_ARRAY_DIMENSIONS")
    return _unpacked(array, names or (), request)


def _unpacked(stored: Any, names: Iterable[str | None], request: Request) -> FileArray:
    """Read an array of HDF5 or zarr. Attributes of netCDF say what marks gaps, and how whole numbers are scaled."""
    said = {name: value for name in (*GAPS, *SCALES) if not math.isnan(value := _number(stored.attrs.get(name)))}
    if request.sliced and not said:
        return _named(Slices(stored), names)
    scaled = any(name in said for name in SCALES)
    kind = np.result_type(stored.dtype, np.float32) if scaled else stored.dtype
    request.allow(stored.shape, kind)
    packed, notes = np.asarray(stored[...]), []
    array = packed
    if scaled:
        array = packed.astype(kind) * said.get("scale_factor", 1.0) + said.get("add_offset", 0.0)
        notes.append("numbers rescaled as its attributes say")
    for value in {said[name]: name for name in GAPS if name in said}:
        if value in packed:
            array = np.where(packed == value, np.nan, array)
            notes.append(f"{value:g} marks what is missing")
    return _named(array, names)._replace(notes=tuple(notes))


def _number(value: Any) -> float:
    """Return the number of an attribute, NaN where it holds none."""
    try:
        return float(np.ravel(value)[0])
    except (TypeError, ValueError, IndexError):
        return math.nan


def _with_ome_axes(found: FileArray, scale: Mapping[str, Any], level: Mapping[str, Any]) -> FileArray:
    """Name the axes as OME-Zarr does; channels go last, axes of size 1 are left out."""
    axes = scale.get("axes") or []
    changes = [each for of in (level, scale) for each in of.get("coordinateTransformations") or ()]
    sizes = [each["scale"] for each in changes if len(each.get("scale", ())) == len(axes)]  # they follow one another
    named = [{"name": each} if isinstance(each, str) else dict(each) for each in axes]
    is_channel = [each.get("type") == "channel" or each["name"] == "c" for each in named]
    if not _are_names([each["name"] for each in named], found.array.ndim) or sum(is_channel) > 1:
        return found
    array, kept = found.array, [n for n, size in enumerate(found.array.shape) if size > 1]
    order = [*(n for n in kept if not is_channel[n]), *(n for n in kept if is_channel[n])]
    steps = [
        Step(math.prod(float(each[n]) for each in sizes), UNITS.get(unit, unit)) if sizes else None
        for n in order
        for unit in (named[n].get("unit") or "",)
    ]
    count = sum(is_channel[n] for n in order)
    array = array.transpose(*order, *(n for n in range(array.ndim) if n not in order))
    array = array.squeeze(tuple(range(len(order), array.ndim)))
    names = tuple({"y": "h", "x": "w"}.get(named[n]["name"], named[n]["name"]) for n in order)
    modes = len(order) - count
    levels = scale["datasets"]
    which = "the finest" if level is levels[0] else "a coarser"
    notes = (f"{which} of {len(levels)} resolutions",) if len(levels) > 1 else ()
    return FileArray(array, names[:modes], bool(count), tuple(steps[:modes]), notes=(*notes, *found.notes))


def _are_names(words: Sequence[str], count: int) -> bool:
    """Say whether words can be the names of so many modes."""
    return len(words) == len(set(words)) == count and all(map(str.isidentifier, words))


def _named(array: Any, names: Iterable[str | None]) -> FileArray:
    """Take the names of the axes that a file gives, where they can be names of modes; those called c are channels."""
    words = [name or "" for name in names]
    if not _are_names(words, array.ndim):
        return FileArray(array)
    channels = [n for n, word in enumerate(words) if word in ("c", "channel", "channels", "band")]
    if len(channels) != 1 or array.ndim == 1:
        return FileArray(array, tuple(words))
    (axis,) = channels
    array = array.transpose(*(n for n in range(array.ndim) if n != axis), axis)
    return FileArray(array, tuple(words[:axis] + words[axis + 1 :]), channels=True)


def _shape_in_words(array: Any) -> str:
    """Return sizes and type of an array that is not read yet."""
    return f"{'×'.join(map(str, array.shape))} {array.dtype}"
