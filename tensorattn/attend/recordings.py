"""Recordings: arrays over named modes with one axis of channels, from a file or from the packaged samples."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from tensorattn.attend.optional import MissingPackageError, require
from tensorattn.attend.readers import READERS, FileArray, RecordingError, format_of
from tensorattn.errors import ModesError
from tensorattn.modes import ModeSpec

__all__ = ["Recording", "load", "make_recording", "parse_modes", "sample_video", "sample_volume"]

LARGEST = 1e100  # squares of larger numbers may overflow
MAX_ORDER = 6  # figures and patches are made for one to six modes


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
    array: np.ndarray[Any, Any]
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
        ModesError: If the modes do not fit the array.
    """
    suffix = format_of(path)
    if key is not None and suffix != ".npz":
        raise RecordingError(f"{path}: --key chooses an array of an .npz archive, but this is {suffix}")
    if not path.exists():
        raise RecordingError(f"{path}: there is no such file")
    if not path.is_file():
        raise RecordingError(f"{path}: this is not a file")
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
        modes = ModeSpec.parse(said) if said else ModeSpec.parse(order)
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


def _fill_gaps(array: np.ndarray[Any, Any], source: str) -> tuple[np.ndarray[Any, Any], tuple[str, ...]]:
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


def sample_video() -> Recording:
    """Load the packaged video: an echocardiogram of 30 frames, a test file of pydicom.

    Raises:
        RecordingError: If pydicom was installed without it.
    """
    examples = require("pydicom.examples", extra="examples", purpose="the packaged video")
    path = Path(examples.get_path("ybr_color"))
    if not path.is_file():
        raise RecordingError(f"the packaged video is missing, give a FILE: pydicom has no {path}")
    video = load(path)
    return Recording("echocardiogram", "echocardiogram (pydicom, ybr_color)", video.array, video.modes, video.notes)


def sample_volume() -> Recording:
    """Load the packaged volume: the first of two magnetic resonance images of a brain, a test file of nibabel.

    Raises:
        RecordingError: If nibabel was installed without its test data.
    """
    require("nibabel", extra="examples", purpose="the packaged volume")
    path = Path(str(files("nibabel") / "tests" / "data" / "example4d.nii.gz"))
    if not path.is_file():
        raise RecordingError(
            f"the packaged volume is missing, give a FILE: nibabel was installed without its test data, {path}"
        )
    series = load(path)
    return Recording(
        "brain",
        "magnetic resonance image of a brain (nibabel, example4d, first volume)",
        np.ascontiguousarray(series.array[..., 0, :]),
        ModeSpec.parse(series.modes.names[:3]),
        series.notes,
    )


def describe_sizes(recording: Recording) -> str:
    """Return sizes and channels in words.

    Args:
        recording: Any recording.

    Examples:
        >>> film = FileArray(np.arange(360.0).reshape(4, 5, 6, 3), ("t", "h", "w"), channels=True)
        >>> describe_sizes(make_recording(film, name="film", source="an example"))
        't=4 h=5 w=6, 3 channels, float64'
    """
    sizes = " ".join(f"{mode}={size}" for mode, size in zip(recording.modes.names, recording.sizes, strict=True))
    plural = "" if recording.channels == 1 else "s"
    return f"{sizes}, {recording.channels} channel{plural}, {recording.array.dtype}"
