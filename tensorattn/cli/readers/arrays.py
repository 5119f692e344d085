"""Readers of plain arrays: NumPy, HDF5 and zarr."""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tensorattn.cli.common import require
from tensorattn.cli.readers.contents import FileArray, RecordingError, Request, Slices, Step, choose

__all__ = ["read_hdf5", "read_npy", "read_npz", "read_zarr"]

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
        names = [axis.label or next(iter(axis.keys()), "") for axis in dataset.dims]
        if request.sliced:
            stack.pop_all()  # it stays open
            return _named(Slices(dataset), names)
        request.allow(dataset.shape, dataset.dtype)
        return _named(dataset[()], names)


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
    if scales and (finest := scales[0]["datasets"][0])["path"] in arrays and key in (None, finest["path"]):
        found = _from_zarr(arrays[finest["path"]], request)
        return _with_ome_axes(found, scales[0], finest)
    return _from_zarr(arrays[choose({name: _shape_in_words(each) for name, each in arrays.items()}, key)], request)


def _is_numbers(zarr: Any, item: Any) -> bool:
    """Say whether a member of a store is an array of numbers."""
    return isinstance(item, zarr.Array) and item.ndim > 0 and item.dtype.kind in "biufc"


def _from_zarr(array: Any, request: Request) -> FileArray:
    """Read an array of zarr."""
    names = getattr(array.metadata, "dimension_names", None) or array.attrs.get("_ARRAY_DIMENSIONS")
    if request.sliced:
        return _named(Slices(array), names or ())
    request.allow(array.shape, array.dtype)
    return _named(np.asarray(array[...]), names or ())


def _with_ome_axes(found: FileArray, scale: Mapping[str, Any], finest: Mapping[str, Any]) -> FileArray:
    """Name the axes as OME-Zarr does; channels go last, axes of size 1 are left out."""
    axes = scale.get("axes") or []
    sizes = next((each["scale"] for each in finest.get("coordinateTransformations", ()) if "scale" in each), None)
    named = [{"name": each} if isinstance(each, str) else dict(each) for each in axes]
    if len(named) != found.array.ndim:
        return found
    array, kept = found.array, [n for n, size in enumerate(found.array.shape) if size > 1]
    is_channel = [each.get("type") == "channel" or each["name"] == "c" for each in named]
    order = [*(n for n in kept if not is_channel[n]), *(n for n in kept if is_channel[n])]
    steps = [
        Step(float(sizes[n]), UNITS.get(named[n].get("unit", ""), named[n].get("unit", ""))) if sizes else None
        for n in order
    ]
    count = sum(is_channel[n] for n in order)
    array = array.transpose(*order, *(n for n in range(array.ndim) if n not in order))
    array = array.squeeze(tuple(range(len(order), array.ndim)))
    names = tuple({"y": "h", "x": "w"}.get(named[n]["name"], named[n]["name"]) for n in order)
    modes = len(order) - count
    notes = (f"the finest of {len(scale['datasets'])} resolutions",) if len(scale["datasets"]) > 1 else ()
    return FileArray(array, names[:modes], bool(count), tuple(steps[:modes]), notes=notes)


def _named(array: Any, names: Iterable[str | None]) -> FileArray:
    """Take the names of the axes that a file gives, where they can be names of modes; those called c are channels."""
    words = [name or "" for name in names]
    if len(words) != array.ndim or not all(map(str.isidentifier, words)) or len(set(words)) != len(words):
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
