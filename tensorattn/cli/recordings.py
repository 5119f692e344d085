"""Recordings: arrays over named modes with one axis of channels, from a file or from the packaged samples."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tensorattn.cli.common import MissingPackageError, require
from tensorattn.errors import ModesError, TensorAttentionError
from tensorattn.modes import ModeSpec

__all__ = [
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

LARGEST = 1e100  # squares of larger numbers may overflow
MAX_DECODED_BYTES = 4 * 10**9  # a clip is decoded whole into memory
MAX_ORDER = 6  # figures and patches are made for one to six modes

Array = np.ndarray[Any, Any]


class RecordingError(TensorAttentionError):
    """A recording is missing, cannot be read, or does not hold numbers over a grid."""


class FileArray(NamedTuple):
    """What a file holds: the array, the names of its modes, and whether its last axis holds channels.

    Names are empty where the format does not say what the axes are.
    """

    array: Array
    modes: tuple[str, ...] = ()
    channels: bool = False


@dataclass(frozen=True)
class Recording:
    """Numbers over a grid, ready to be cut into patches.

    Attributes:
        name: Short name, safe in a file name.
        source: Where it comes from, in words.
        array: Values ``(n_1, …, n_N, C)``, real, of the type they were stored in.
        modes: Names of the modes.
        notes: What was done to the array on the way, one sentence each.
    """

    name: str
    source: str
    array: Array
    modes: ModeSpec
    notes: tuple[str, ...] = ()

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes of the modes, in elements."""
        return self.array.shape[:-1]

    @property
    def channels(self) -> int:
        """Number of channels."""
        return self.array.shape[-1]

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
    spec = ModeSpec.parse(int(text) if re.fullmatch(r"\s*[+-]?\d+\s*", text) else text)
    if spec.order > MAX_ORDER:
        raise ModesError(f"modes has order {spec.order}, but at most {MAX_ORDER} modes are drawn.")
    return spec


def load(path: Path, *, modes: ModeSpec | None = None, key: str | None = None) -> Recording:
    """Read a recording from a file.

    Args:
        path: A file of one of the kinds in ``READERS``.
        modes: Names of the modes. Without them, what the format says its axes are; where it does not say
            (``.npy``, ``.npz``), every axis is a mode.
        key: Name of the array in an ``.npz`` archive.

    Returns:
        The recording.

    Raises:
        RecordingError: If the file is missing or cannot be read, or holds no real numbers.
        MissingPackageError: If the package that reads such files is not installed.
    """
    suffix = next((suffix for suffix in READERS if path.name.lower().endswith(suffix)), None)
    if suffix is None:
        raise RecordingError(f"{path}: no reader for this kind of file; these are read: {', '.join(READERS)}")
    if key is not None and suffix != ".npz":
        raise RecordingError(f"{path}: --key chooses an array of an .npz archive, but this is {suffix}")
    if not path.is_file():
        raise RecordingError(f"{path}: {'this is not a file' if path.exists() else 'there is no such file'}")
    kind, reader = READERS[suffix]
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            contents = reader(path, key)
        except RecordingError as cause:
            raise RecordingError(f"{path}: {cause.rule}") from None
        except MissingPackageError:
            raise
        except Exception as cause:  # six packages read files here, and each has its own errors for bad bytes
            raise RecordingError(f"{path}: cannot be read as {kind} ({_first_line(cause)})") from cause
    notes = tuple(dict.fromkeys(f"while reading: {_first_line(warning.message)}" for warning in heard))
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", path.name[: -len(suffix)]).strip("-.") or "recording"
    return make_recording(contents, name=name, source=str(path), modes=modes, notes=notes)


def _first_line(cause: Any) -> str:
    """Return the first line of an error or a warning, or its type where it says nothing."""
    return next(iter(str(cause).strip().splitlines()), "") or type(cause).__name__


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
    array, said, channels = contents
    if array.dtype.kind not in "biuf":
        raise RecordingError(f"{source}: its numbers must be real, but its type is {array.dtype}")
    if array.ndim == 0 or array.size == 0:
        raise RecordingError(f"{source}: there is nothing in it, its shape is {array.shape}")
    if modes is None:
        order = array.ndim - channels
        if order > MAX_ORDER or order < 1 or (said and order != len(said)):
            raise ModesError(
                f"{source}: the array {array.shape} has {order} modes, but at most {len(said) or MAX_ORDER} are drawn; "
                "say which are modes with --modes"
            )
        modes = ModeSpec.parse(said or order)
    elif array.ndim not in (modes.order, modes.order + 1):
        raise ModesError(
            f"{source}: --modes gives {modes.order} modes ({modes}), but the array {array.shape} has {array.ndim} "
            f"dimensions; they must be {modes.order}, or {modes.order + 1} with channels last"
        )
    if array.ndim == modes.order:
        array = array[..., None]
    array, filled = _fill_gaps(array, source)
    if bool(np.all(array == array[(0,) * (array.ndim - 1)])):
        raise RecordingError(f"{source}: the recording is constant, there is nothing to attend to")
    return Recording(name, source, array, modes, notes + filled)


def _fill_gaps(array: Array, source: str) -> tuple[Array, tuple[str, ...]]:
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
    )


def _load_packaged(what: str, package: str, path: Path) -> Recording:
    """Load a file that a package brings along."""
    if not path.is_file():
        raise RecordingError(f"the packaged {what} is missing, give a FILE: {package} was installed without {path}")
    return load(path)


# ---- readers: one function a format, from a path to an array and what its axes are ----------------------------


def _read_npy(path: Path, key: str | None) -> FileArray:
    """Read a NumPy array. Object arrays are refused: no pickle is ever opened."""
    with path.open("rb") as file:
        return FileArray(np.lib.format.read_array(file, allow_pickle=False))


def _read_npz(path: Path, key: str | None) -> FileArray:
    """Read one array of a NumPy archive: the one called ``key``, or the only one."""
    archive = np.load(path, allow_pickle=False)
    if isinstance(archive, np.ndarray):
        raise RecordingError("it is a single array, not an archive; call it .npy")
    with archive:
        names = list(archive.files)
        held = f"it holds {len(names)} array{'' if len(names) == 1 else 's'}: {', '.join(names) or 'none'}"
        if key is None and len(names) != 1:
            raise RecordingError(f"{held}; choose one with --key")
        if key is not None and key not in names:
            raise RecordingError(f"there is no array {key!r} in it; {held}")
        return FileArray(archive[names[0] if key is None else key])


def _read_nifti(path: Path, key: str | None) -> FileArray:
    """Read a NIfTI volume, or a series of volumes. Time and channel axes of size 1 are left out."""
    nibabel = require("nibabel", extra="examples", purpose="reading NIfTI")
    array = np.asarray(nibabel.load(path).dataobj)
    if array.dtype.names is not None:  # the RGB types of NIfTI
        array = np.stack([array[name] for name in array.dtype.names], axis=-1)
        return FileArray(array, ("x", "y", "z", "t")[: array.ndim - 1], channels=True)
    channels = array.ndim == 5 and array.shape[4] > 1
    array = array.squeeze(tuple(axis for axis in range(3, array.ndim) if array.shape[axis] == 1))
    return FileArray(array, ("x", "y", "z", "t")[: array.ndim - channels], channels)


def _read_tiff(path: Path, key: str | None) -> FileArray:
    """Read the pages of a TIFF file: a stack ``z h w``, or ``h w`` where there is one page."""
    pillow = require("PIL.Image", extra="examples", purpose="reading TIFF")
    pages: list[Array] = []
    with pillow.open(path) as image:
        for page in range(image.n_frames):
            image.seek(page)
            plain = image if image.mode not in ("P", "PA", "YCbCr", "LAB", "HSV") else image.convert("RGB")
            pages.append(np.asarray(plain))
            if pages[-1].shape != pages[0].shape:
                raise RecordingError(
                    f"its pages differ: page 0 is {pages[0].shape} and page {page} is {pages[-1].shape}"
                )
    channels = pages[0].ndim == 3
    if len(pages) == 1:
        return FileArray(pages[0], ("h", "w"), channels)
    return FileArray(np.stack(pages), ("z", "h", "w"), channels)


def _read_dicom(path: Path, key: str | None) -> FileArray:
    """Read the pixels of a DICOM file: a cine loop ``t h w``, a stack ``z h w`` or an image ``h w``."""
    pydicom = require("pydicom", extra="examples", purpose="reading DICOM")
    dataset = pydicom.dcmread(path)
    if not any(tag in dataset for tag in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise RecordingError("it holds no pixels")
    array = dataset.pixel_array
    channels = int(dataset.SamplesPerPixel) > 1
    cine = any(tag in dataset for tag in ("FrameTime", "FrameTimeVector", "CineRate"))
    frames = ("t" if cine else "z",) if array.ndim - channels == 3 else ()
    return FileArray(array, (*frames, "h", "w"), channels)


def _read_video(path: Path, key: str | None, *, limit: int = MAX_DECODED_BYTES) -> FileArray:
    """Decode the first video stream of a film: ``t h w`` and three channels."""
    av = require("av", extra="video", purpose="reading video")
    frames: list[Array] = []
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise RecordingError("it holds no video stream")
        for frame in container.decode(video=0):
            frames.append(frame.to_ndarray(format="rgb24"))
            if len(frames) * frames[0].nbytes > limit:
                raise RecordingError(f"decoded it takes more than {limit / 1e9:.0f} GB; give a shorter or smaller clip")
    if not frames:
        raise RecordingError("it holds no video frames")
    return FileArray(np.stack(frames), ("t", "h", "w"), channels=True)


READERS: dict[str, tuple[str, Callable[[Path, str | None], FileArray]]] = {
    ".nii": ("NIfTI", _read_nifti),
    ".nii.gz": ("NIfTI", _read_nifti),
    ".npy": ("a NumPy array", _read_npy),
    ".npz": ("a NumPy archive", _read_npz),
    ".tif": ("TIFF", _read_tiff),
    ".tiff": ("TIFF", _read_tiff),
    ".dcm": ("DICOM", _read_dicom),
    ".mp4": ("video", _read_video),
    ".avi": ("video", _read_video),
}
