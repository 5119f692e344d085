"""Readers: one function a file format, from a path to an array and what its axes are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tensorattn.attend.optional import require
from tensorattn.errors import TensorAttentionError

__all__ = ["READERS", "FileArray", "RecordingError", "format_of"]

MAX_DECODED_BYTES = 4 * 10**9  # a clip is decoded whole into memory


class RecordingError(TensorAttentionError):
    """A recording is missing, cannot be read, or does not hold numbers over a grid."""


class FileArray(NamedTuple):
    """What a file holds: the array, the names of its modes, and whether its last axis holds channels.

    Names are empty where the format does not say what the axes are.
    """

    array: np.ndarray[Any, Any]
    modes: tuple[str, ...] = ()
    channels: bool = False


def read_npy(path: Path, key: str | None) -> FileArray:
    """Read a NumPy array. Object arrays are refused: no pickle is ever opened."""
    with path.open("rb") as file:
        return FileArray(np.lib.format.read_array(file, allow_pickle=False))


def read_npz(path: Path, key: str | None) -> FileArray:
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


def read_nifti(path: Path, key: str | None) -> FileArray:
    """Read a NIfTI volume, or a series of volumes. Time and channel axes of size 1 are left out."""
    nibabel = require("nibabel", extra="examples", purpose="reading NIfTI")
    array = np.asarray(nibabel.load(path).dataobj)
    if array.dtype.names is not None:  # the RGB types of NIfTI
        array = np.stack([array[name] for name in array.dtype.names], axis=-1)
        return FileArray(array, ("x", "y", "z", "t")[: array.ndim - 1], channels=True)
    channels = array.ndim == 5 and array.shape[4] > 1
    for axis in range(array.ndim - 1, 2, -1):
        if array.shape[axis] == 1:
            array = array.squeeze(axis)
    names = ("x", "y", "z", "t")[: array.ndim - channels]
    return FileArray(array, names, channels)


def read_tiff(path: Path, key: str | None) -> FileArray:
    """Read the pages of a TIFF file: a stack ``z h w``, or ``h w`` where there is one page."""
    pillow = require("PIL.Image", extra="examples", purpose="reading TIFF")
    pages = []
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


def read_dicom(path: Path, key: str | None) -> FileArray:
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


def read_video(path: Path, key: str | None) -> FileArray:
    """Decode the first video stream of a film: ``t h w`` and three channels."""
    av = require("av", extra="video", purpose="reading video")
    frames, size = [], 0
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise RecordingError("it holds no video stream")
        for frame in container.decode(video=0):
            frames.append(frame.to_ndarray(format="rgb24"))
            size += frames[-1].nbytes
            if size > MAX_DECODED_BYTES:
                raise RecordingError(
                    f"decoded it takes more than {MAX_DECODED_BYTES / 1e9:.0f} GB; give a shorter or smaller clip"
                )
    if not frames:
        raise RecordingError("it holds no video frames")
    return FileArray(np.stack(frames), ("t", "h", "w"), channels=True)


Reader = Callable[[Path, str | None], FileArray]

READERS: dict[str, tuple[str, Reader]] = {
    ".nii": ("NIfTI", read_nifti),
    ".nii.gz": ("NIfTI", read_nifti),
    ".npy": ("a NumPy array", read_npy),
    ".npz": ("a NumPy archive", read_npz),
    ".tif": ("TIFF", read_tiff),
    ".tiff": ("TIFF", read_tiff),
    ".dcm": ("DICOM", read_dicom),
    ".mp4": ("video", read_video),
    ".avi": ("video", read_video),
}


def format_of(path: Path) -> str:
    """Return the suffix, a key of ``READERS``, that decides how a file is read.

    Args:
        path: The file; it need not exist.

    Raises:
        RecordingError: If no reader knows the suffix.

    Examples:
        >>> format_of(Path("brain.T1.NII.GZ")), format_of(Path("clip.mp4"))
        ('.nii.gz', '.mp4')
    """
    name = path.name.lower()
    for suffix in sorted(READERS, key=len, reverse=True):
        if name.endswith(suffix):
            return suffix
    raise RecordingError(f"{path}: no reader for this kind of file; these are read: {', '.join(READERS)}")
