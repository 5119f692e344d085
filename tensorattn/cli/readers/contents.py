"""What every reader gets and gives: a request with a limit of memory, and an array with what its axes are."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tensorattn.cli.common import amount
from tensorattn.errors import TensorAttentionError

__all__ = [
    "MAX_BYTES",
    "Array",
    "FileArray",
    "RecordingError",
    "Request",
    "Slices",
    "Step",
    "as_bytes",
    "choose",
    "natural",
    "one_line",
]

MAX_BYTES = 512 * 10**6  # an array is held whole in memory

Array = np.ndarray[Any, Any]


class RecordingError(TensorAttentionError):
    """A recording is missing, cannot be read, or does not hold numbers over a grid."""


class Step(NamedTuple):
    """How far apart neighbours of a mode lie.

    Attributes:
        size: The distance.
        unit: Its unit, as in ``"mm"``; empty where only ratios are known.
    """

    size: float
    unit: str = ""


class Slices:
    """An array that stays in its file: its axes may change their places, and a part of it is read by slices.

    Args:
        stored: What has ``shape``, ``dtype`` and slices.
        dtype: Type of what is read; that of the file if None.

    Examples:
        >>> array = Slices(np.arange(6).reshape(2, 1, 3)).squeeze((1,)).transpose(1, 0)
        >>> array.shape, array[1:, :1].tolist()
        ((3, 2), [[1], [2]])
    """

    def __init__(self, stored: Any, dtype: Any = None, axes: tuple[int | None, ...] | None = None) -> None:
        self.stored = stored
        self.dtype = np.dtype(stored.dtype if dtype is None else dtype)
        self.axes = tuple(range(len(stored.shape))) if axes is None else axes  # None is an axis that was added
        self.shape = tuple([1 if axis is None else int(stored.shape[axis]) for axis in self.axes])
        self.ndim, self.size = len(self.shape), math.prod(self.shape)

    def transpose(self, *order: int) -> Slices:
        """Return it with its axes in another order."""
        return Slices(self.stored, self.dtype, tuple([self.axes[axis] for axis in order]))

    def squeeze(self, axes: tuple[int, ...]) -> Slices:
        """Return it without axes of size 1."""
        return self.transpose(*(axis for axis in range(self.ndim) if axis not in axes))

    def with_channel(self) -> Slices:
        """Return it with an axis of one channel at the end."""
        return Slices(self.stored, self.dtype, (*self.axes, None))

    def __getitem__(self, places: tuple[slice, ...]) -> Array:
        """Read a part."""
        cut = [slice(0, 1)] * len(self.stored.shape)
        for axis, place in zip(self.axes, places, strict=True):
            if axis is not None:
                cut[axis] = place
        part = np.asarray(self.stored[tuple(cut)], dtype=self.dtype)
        kept = [axis for axis in self.axes if axis is not None]
        part = part.transpose(*kept, *(axis for axis in range(part.ndim) if axis not in kept))
        sizes = iter(part.shape)
        return part.reshape([1 if axis is None else next(sizes) for axis in self.axes])


class FileArray(NamedTuple):
    """What a file holds.

    Attributes:
        array: The numbers, in the type of the file; or `Slices` of them.
        modes: Names of the modes; empty where the format does not say what the axes are.
        channels: Whether the last axis holds channels.
        steps: How far apart neighbours lie, one a mode, None where the file does not say; empty where it never does.
        inverted: Whether the smallest number is meant to be white.
        notes: What was done or assumed, one sentence each.
    """

    array: Any
    modes: tuple[str, ...] = ()
    channels: bool = False
    steps: tuple[Step | None, ...] = ()
    inverted: bool = False
    notes: tuple[str, ...] = ()


class Request(NamedTuple):
    """What is asked of a reader.

    Attributes:
        key: Which of several arrays or series, or None.
        max_bytes: How much memory the array may take.
        sliced: Whether a reader that can leaves the array in its file.
        limit: What the user gave as the limit.
    """

    key: str | None = None
    max_bytes: int = MAX_BYTES
    sliced: bool = False
    limit: str = "--max-bytes"

    def allow(self, shape: Sequence[int], dtype: Any) -> None:
        """Refuse an array that is too large. Readers call it with what a header says, before anything is unpacked.

        Args:
            shape: Its sizes.
            dtype: Its type.

        Raises:
            RecordingError: If it would take more than ``max_bytes``.

        Examples:
            >>> Request(max_bytes=10**6).allow((1000, 500), "float32")
            Traceback (most recent call last):
            tensorattn.cli.readers.contents.RecordingError: unpacked it takes 2.00 MB (1000×500 of float32), \
but --max-bytes allows 1.00 MB
        """
        dtype = np.dtype(dtype)
        needed = math.prod(map(int, shape)) * dtype.itemsize
        if needed > self.max_bytes:
            raise RecordingError(
                f"unpacked it takes {amount(needed, 'B')} ({'×'.join(map(str, shape))} of {dtype.name}), "
                f"but {self.limit} allows {amount(self.max_bytes, 'B')}"
                f"{', and it cannot be read by slices' if self.sliced else ''}"
            )


def as_bytes(colours: Array) -> Array:
    """Return 16-bit colours as bytes where they are no more than that: all low bytes are 0, or repeat the high ones.

    Args:
        colours: Unsigned 16-bit colours, or bytes.

    Examples:
        >>> as_bytes(np.array([0, 257, 65535], np.uint16)).tolist()
        [0, 1, 255]
    """
    if colours.dtype == np.uint16 and ((colours % 257 == 0).all() or (colours % 256 == 0).all()):
        return (colours >> 8).astype(np.uint8)
    return colours


def choose(held: Mapping[str, str], key: str | None, what: str = "array") -> str:
    """Return the name of the only array of a file, or the one that was asked for.

    Args:
        held: Words for each, by name.
        key: The name that was asked for.
        what: What one of them is called.

    Raises:
        RecordingError: If there is no such name, or none was asked for and there is not just one.

    Examples:
        >>> choose({"image": ""}, None)
        'image'
    """
    names = [f"{name} ({words})" if words else name for name, words in held.items()]
    listed = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
    plural = what if len(names) == 1 or what == "series" else f"{what}s"
    told = f"it holds {len(names)} {plural}: {listed or 'none'}"
    if key is None:
        if len(held) != 1:
            raise RecordingError(f"{told}; choose one with --key" if held else told)
        return next(iter(held))
    if key not in held:
        raise RecordingError(f"there is no {what} {key!r} in it; {told}")
    return key


def natural(name: str) -> list[str | int]:
    """Return what sorts names by the numbers in them, large letters as small ones: frame2 before Frame10.

    Args:
        name: The name.

    Examples:
        >>> sorted(["Frame10", "frame2"], key=natural)
        ['frame2', 'Frame10']
    """
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.casefold())]


def one_line(cause: Any) -> str:
    r"""Return the first line of an error or a warning, with what follows its colon; or its type where it says nothing.

    Args:
        cause: The error.

    Examples:
        >>> one_line("no decoder:\n\tgdcm - not installed\n\tpylibjpeg - not installed")
        'no decoder: gdcm - not installed, pylibjpeg - not installed'
    """
    first, *rest = [line.strip() for line in str(cause).strip().splitlines()] or [""]
    if first.endswith(":"):
        first = f"{first} {', '.join(filter(None, rest))}"
    return first or type(cause).__name__
