"""Recordings: arrays over named modes with one axis of channels, from a file or from the packaged samples."""

from __future__ import annotations

import contextlib
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tensorattn.cli.common import MissingPackageError, require
from tensorattn.cli.readers.arrays import read_hdf5, read_npy, read_npz, read_zarr
from tensorattn.cli.readers.contents import MAX_BYTES, FileArray, RecordingError, Request, Slices, Step, one_line
from tensorattn.cli.readers.dicom import is_dicom, read_dicom, read_series
from tensorattn.cli.readers.nifti import read_nifti
from tensorattn.cli.readers.pictures import read_frames, read_picture, read_tiff
from tensorattn.cli.readers.video import read_video
from tensorattn.errors import ModesError
from tensorattn.modes import ModeSpec

__all__ = [
    "LARGEST",
    "MAX_ORDER",
    "FileArray",
    "Recording",
    "RecordingError",
    "load",
    "make_recording",
    "parse_modes",
    "sample_video",
    "sample_volume",
]

CUT_SHORT = "invalid page offset"  # what tifffile logs of a file that ends too early, and reads on
LARGEST = 1e100  # squares of larger numbers may overflow
LONGEST = 100  # letters of a name: more is added to it for the names of files
MAX_ORDER = 6  # figures and patches are made for one to six modes


@dataclass(frozen=True)
class Recording:
    """Numbers over a grid, ready to be cut into patches.

    Attributes:
        name: Short name, safe in a file name.
        source: Where it comes from, in words.
        array: Values ``(n_1, …, n_N, C)``, real, of the type they were stored in; or `Slices` of them.
        modes: Names of the modes.
        notes: What was done or assumed on the way, one sentence each.
        steps: How far apart neighbours lie, one a mode, None where it is not known; empty where nothing is.
        inverted: Whether the smallest number is meant to be white.
    """

    name: str
    source: str
    array: Any
    modes: ModeSpec
    notes: tuple[str, ...] = ()
    steps: tuple[Step | None, ...] = ()
    inverted: bool = False

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes of the modes, in elements."""
        return tuple(self.array.shape[:-1])

    @property
    def channels(self) -> int:
        """Number of channels."""
        return int(self.array.shape[-1])

    def describe(self) -> str:
        """Return sizes and channels in words.

        Examples:
            >>> film = FileArray(np.arange(360.0).reshape(4, 5, 6, 3), ("t", "h", "w"), channels=True)
            >>> make_recording(film, name="film", source="an example").describe()
            't=4 h=5 w=6, 3 channels, float64'
        """
        sizes = " ".join(f"{mode}={size}" for mode, size in zip(self.modes.names, self.sizes, strict=True))
        return f"{sizes}, {self.channels} channel{'' if self.channels == 1 else 's'}, {self.array.dtype}"


def parse_modes(text: str) -> ModeSpec:
    """Read the modes as the command line gives them: names, or how many there are.

    Args:
        text: ``"t h w"`` or ``"3"``.

    Returns:
        The modes.

    Raises:
        ModesError: If the names are not names, are repeated, or are too many.

    Examples:
        >>> parse_modes("t h w").names, parse_modes("2").names
        (('t', 'h', 'w'), ('0', '1'))
    """
    spec = ModeSpec.parse(int(text) if re.fullmatch(r"\s*[+-]?\d{1,3}\s*", text) else text)
    if spec.order > MAX_ORDER:
        raise ModesError(f"modes has order {spec.order}, but at most {MAX_ORDER} modes are drawn.")
    return spec


def load(
    path: Path,
    *,
    modes: ModeSpec | None = None,
    key: str | None = None,
    max_bytes: int = MAX_BYTES,
    sliced: bool = False,
    limit: str = "--max-bytes",
) -> Recording:
    """Read a recording from a file, or from a folder that holds a DICOM series, pictures or a zarr store.

    Args:
        path: A file of one of the kinds in ``READERS``, told by its suffix or else by its first bytes; or a folder.
        modes: Names of the modes. Without them, what the format says its axes are; where it does not say
            (``.npy``, ``.npz``), every axis is a mode.
        key: Name of the array, or of the series, where there are several.
        max_bytes: How much memory the array may take; what a header promises is checked before it is unpacked.
        sliced: Whether the array stays in its file, where it can: it is `Slices` then, of unseen numbers.
        limit: What the user gave as the limit.

    Returns:
        The recording.

    Raises:
        RecordingError: If the file is missing or cannot be read, is too large, or holds no real numbers.
        MissingPackageError: If the package that reads such files is not installed.
    """
    try:
        if not path.exists():
            raise RecordingError("there is no such file")
        suffix, kind = _kind_of(path)
        if key is not None and not kind.several:
            raise RecordingError(f"--key chooses one of several arrays or series, but {kind.name} holds one")
    except RecordingError as cause:
        raise RecordingError(f"{path}: {cause.rule}") from None
    except OSError as cause:
        raise RecordingError(f"{path}: cannot be read ({one_line(cause)})") from cause
    with _listening() as heard:
        try:
            contents = kind.read(path, Request(key, max_bytes, sliced, limit))
        except RecordingError as cause:
            raise RecordingError(f"{path}: {cause.rule}") from None
        except MissingPackageError:
            raise
        except Exception as cause:  # many packages read files here, and each has its own errors for bad bytes
            raise RecordingError(f"{path}: cannot be read as {kind.name} ({one_line(cause)})") from cause
    if cut := next((each for each in heard if CUT_SHORT in each), None):
        raise RecordingError(f"{path}: cannot be read as {kind.name} ({cut})")
    notes = tuple(dict.fromkeys(f"while reading: {each}" for each in heard))
    stem = path.resolve().name
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", stem[: len(stem) - len(suffix)])[:LONGEST].strip("-.") or "recording"
    return make_recording(contents, name=name, source=str(path), modes=modes, notes=notes)


@contextlib.contextmanager
def _listening() -> Iterator[list[str]]:
    """Collect what packages warn of and log while they read a file, one line each, but not what is of their code."""
    heard: list[str] = []
    listener = logging.Handler(logging.WARNING)
    listener.emit = lambda record: heard.append(one_line(record.getMessage()))  # type: ignore[method-assign]
    logging.getLogger().addHandler(listener)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            for about_code in (ResourceWarning, DeprecationWarning, PendingDeprecationWarning):
                warnings.simplefilter("ignore", about_code)
            yield heard
    finally:
        logging.getLogger().removeHandler(listener)
        heard += [one_line(each.message) for each in warned]


def make_recording(
    contents: FileArray,
    *,
    name: str,
    source: str,
    modes: ModeSpec | None = None,
    notes: tuple[str, ...] = (),
) -> Recording:
    """Check an array, settle which of its axes are modes, add a missing channel axis, and fill gaps.

    Args:
        contents: The array, and what its format says of the axes.
        name: Short name, safe in a file name.
        source: Where it comes from, for messages.
        modes: Names of the modes that the user gave.
        notes: What was done to the array already.

    Returns:
        The recording. Entries that are not finite are filled with the mean of their channel.

    Raises:
        RecordingError: If the array is empty, constant, not real, or has no finite entry.
        ModesError: If the modes do not fit the array.

    Examples:
        >>> made = make_recording(FileArray(np.arange(6.0).reshape(2, 3)), name="grid", source="an example")
        >>> made.modes.order, made.array.shape
        (2, (2, 3, 1))
    """
    array, said, channels, steps, inverted, told = contents
    if array.dtype.kind not in "biuf":
        raise RecordingError(f"{source}: its numbers must be real, but its type is {array.dtype}")
    if array.ndim == 0:
        raise RecordingError(f"{source}: it holds a single number, not an array")
    if array.size == 0:
        raise RecordingError(f"{source}: there is nothing in it, its shape is {array.shape}")
    if modes is None:
        order = array.ndim - channels
        if order > MAX_ORDER or order < 1 or (said and order != len(said)):
            raise ModesError(
                f"{source}: the array {array.shape} has {order} modes, but at most "
                f"{min(len(said) or MAX_ORDER, MAX_ORDER)} are drawn; say which are modes with --modes"
            )
        modes = ModeSpec.parse(said or order)
        steps = steps if len(steps) == order else ()
    elif array.ndim not in (modes.order, modes.order + 1):
        raise ModesError(
            f"{source}: --modes gives {modes.order} modes ({modes}), but the array {array.shape} has {array.ndim} "
            f"dimensions; they must be {modes.order}, or {modes.order + 1} with channels last"
        )
    else:  # an axis keeps its step, whatever it is called
        steps = (*steps, *(None,) * array.ndim)[: modes.order] if steps else ()
        if said and modes.names != said:
            told = (
                *told,
                f"the file calls its axes {' '.join(said)}{' and channels' * channels}, you call them {modes}",
            )
    steps = tuple([step if step and 0 < step.size < math.inf else None for step in steps])
    if isinstance(array, Slices):  # what its numbers are is seen when they are read
        array = array.with_channel() if array.ndim == modes.order else array
        return Recording(name, source, array, modes, notes + told, steps, inverted)
    if array.ndim == modes.order:
        array = array[..., None]
    array, filled = _fill_gaps(array, source)
    if bool(np.all(array == array[(0,) * (array.ndim - 1)])):
        raise RecordingError(f"{source}: the recording is constant, there is nothing to attend to")
    return Recording(name, source, array, modes, notes + told + filled, steps, inverted)


def _fill_gaps(array: Any, source: str) -> tuple[Any, tuple[str, ...]]:
    """Fill what is not finite with the mean of its channel, and say how much that was."""
    if array.dtype.kind != "f":
        return array, ()
    finite = np.isfinite(array)
    highest = float(np.abs(array).max(where=finite, initial=0))
    if highest > LARGEST:
        raise RecordingError(f"{source}: its numbers reach {highest:.0e}; divide them by a constant first")
    gaps = array.size - int(np.count_nonzero(finite))
    if gaps == 0:
        return array, ()
    if gaps == array.size:
        raise RecordingError(f"{source}: none of its {array.size} numbers is finite")
    array = array.copy()
    for channel in range(array.shape[-1]):
        kept = finite[..., channel]
        values = array[..., channel]  # a view: assignment fills the copy
        values[~kept] = values[kept].mean(dtype=np.float64) if kept.any() else 0.0
    return array, (f"{gaps} of {array.size} numbers are not finite and were filled with the mean",)


# ---- the packaged recordings ---------------------------------------------------------------------------------


def sample_video() -> Recording:
    """Load the packaged video: an echocardiogram of 30 frames, a test file of pydicom.

    Raises:
        RecordingError: If pydicom was installed without it.
    """
    examples = require("pydicom.examples", extra="examples", purpose="the packaged video")
    video = _load_packaged("video", "pydicom", Path(examples.get_path("ybr_color")))
    return replace(video, name="echocardiogram", source="echocardiogram (pydicom, ybr_color)")


def sample_volume() -> Recording:
    """Load the packaged volume: the first of two magnetic resonance images of a brain, a test file of nibabel.

    Raises:
        RecordingError: If nibabel was installed without its test data.
    """
    require("nibabel", extra="examples", purpose="the packaged volume")
    series = _load_packaged("volume", "nibabel", Path(str(files("nibabel") / "tests" / "data" / "example4d.nii.gz")))
    return replace(
        series,
        name="brain",
        source="magnetic resonance image of a brain (nibabel, example4d, first volume)",
        array=np.ascontiguousarray(series.array[..., 0, :]),
        modes=ModeSpec.parse(series.modes.names[:3]),
        steps=series.steps[:3],
    )


def _load_packaged(what: str, package: str, path: Path) -> Recording:
    """Load a file that a package brings along."""
    if not path.is_file():
        raise RecordingError(f"the packaged {what} is missing, give a FILE: {package} was installed without {path}")
    return load(path)


# ---- kinds of files ------------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """A kind of file.

    Attributes:
        name: What it is called.
        read: Its reader.
        several: Whether it may hold several arrays or series, of which ``--key`` chooses one.
    """

    name: str
    read: Callable[[Path, Request], FileArray]
    several: bool = False


NIFTI, TIFF, DICOM = Kind("NIfTI", read_nifti), Kind("TIFF", read_tiff, True), Kind("DICOM", read_dicom)
PICTURE, VIDEO = Kind("a picture", read_picture), Kind("video", read_video)
NPY, NPZ = Kind("a NumPy array", read_npy), Kind("a NumPy archive", read_npz, True)
HDF5, ZARR = Kind("HDF5", read_hdf5, True), Kind("zarr", read_zarr, True)

READERS: dict[str, Kind] = {
    **dict.fromkeys((".nii", ".nii.gz", ".mgz", ".mgh", ".hdr", ".hdr.gz", ".img", ".img.gz"), NIFTI),
    **dict.fromkeys((".dcm", ".dicom", ".ima"), DICOM),
    **dict.fromkeys((".tif", ".tiff"), TIFF),
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif"), PICTURE),
    **dict.fromkeys((".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg"), VIDEO),
    **{".npy": NPY, ".npz": NPZ, ".zarr": ZARR, ".zarr.zip": ZARR},
    **dict.fromkeys((".h5", ".hdf5"), HDF5),
}

BEGINNINGS = (  # first bytes of files without a suffix, where a dot stands for any byte
    (rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF....WEBP", PICTURE),
    (rb"II[*+]\0|MM\0[*+]", TIFF),
    (rb"....ftyp|\x1aE\xdf\xa3|RIFF....AVI", VIDEO),
    (rb"\x93NUMPY", NPY),
    (rb"\x89HDF", HDF5),
)


def _suffix(path: Path) -> str:
    """Return the suffix of a file that tells its kind, the longest one, or nothing."""
    return max((each for each in READERS if path.name.lower().endswith(each)), key=len, default="")


def _kind_of(path: Path) -> tuple[str, Kind]:
    """Return the suffix of a file and its kind."""
    suffix = _suffix(path)
    if path.is_dir():
        return (suffix if READERS.get(suffix) is ZARR else ""), _kind_of_folder(path)
    if not path.is_file():
        raise RecordingError("this is neither a file nor a folder")
    if suffix:
        return suffix, READERS[suffix]
    if is_dicom(path):
        return suffix, DICOM
    with path.open("rb") as file:
        first = file.read(12)
    kind = next((kind for beginning, kind in BEGINNINGS if re.match(beginning, first, re.DOTALL)), None)
    if kind is None:
        raise RecordingError(f"no reader for this kind of file; these are read: {', '.join(READERS)}")
    return suffix, kind


def _kind_of_folder(path: Path) -> Kind:
    """Return the kind of a folder: a zarr store, else DICOM files at any depth, else pictures."""
    if any((path / name).exists() for name in (".zarray", ".zgroup", "zarr.json")):
        return ZARR
    held = [each for each in sorted(path.rglob("*")) if each.is_file() and not each.name.startswith(".")]
    dicom = [each for each in held if is_dicom(each)] or [
        each
        for each in held
        if READERS.get(each.suffix.lower()) is DICOM  # from before files began with DICM
    ]
    if dicom:
        return Kind(
            "a folder of DICOM files", lambda _, request: _without(len(held), dicom, read_series(dicom, request)), True
        )
    pictures = [each for each in held if each.parent == path and READERS.get(each.suffix.lower()) in (PICTURE, TIFF)]
    if not pictures:
        alone = next((each for each in held if READERS.get(_suffix(each)) not in (None, PICTURE, TIFF)), None)
        deeper = next((each.parent for each in held if READERS.get(_suffix(each)) in (PICTURE, TIFF)), None)
        told = next((f"; did you mean {each}?" for each in (alone, deeper) if each), "")
        raise RecordingError(f"this folder holds no DICOM file, no picture and no zarr store{told}")

    def read(_: Path, request: Request) -> FileArray:
        """Read the pictures."""
        frames = read_frames(pictures, request, lambda each, one: READERS[each.suffix.lower()].read(each, one))
        return _without(len(held), pictures, frames)

    return Kind("a folder of pictures", read)


def _without(count: int, taken: list[Path], contents: FileArray) -> FileArray:
    """Tell how many files of a folder were left out."""
    left = count - len(taken)
    told = (f"{left} other file{'' if left == 1 else 's'} of the folder left out",) if left else ()
    return contents._replace(notes=contents.notes + told)
