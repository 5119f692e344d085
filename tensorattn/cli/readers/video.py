"""Reader of films, by PyAV."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tensorattn.cli.common import require
from tensorattn.cli.readers.contents import Array, FileArray, RecordingError, Request, Step

__all__ = ["read_video"]

UPRIGHT = np.array([1.0, 0.0, 0.0, 1.0])
UNEVEN = 0.05  # share of a frame's duration by which frames may come early or late


def read_video(path: Path, request: Request) -> FileArray:
    """Decode the main video stream of a film, turned as it is meant to be seen: ``t h w`` and its colours."""
    av = require("av", extra="video", purpose="reading video")
    frames: list[Array] = []
    times: list[float] = []
    damaged = 0
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        if stream is None:
            raise RecordingError("it holds no video stream")
        stream.thread_type = "AUTO"
        pixels = stream.codec_context.format
        if pixels is None:
            raise RecordingError("cannot be read as video (its header does not say how frames are stored)")
        bits = max((component.bits for component in pixels.components), default=8)
        form, dtype, channels = _form(pixels.name, bits)
        size = (stream.codec_context.height, stream.codec_context.width, channels)
        expected = _expected_frames(av, container, stream)
        request.allow((expected, *size), dtype)
        turn, aspect, matrix = 0, stream.sample_aspect_ratio, UPRIGHT
        for frame in container.decode(stream):
            request.allow((len(frames) + 1, frame.height, frame.width, channels), dtype)
            turn, damaged = frame.rotation, damaged + frame.is_corrupt
            if (shown := frame.side_data.get("DISPLAYMATRIX")) is not None:
                matrix = np.frombuffer(shown, np.int32)[[0, 1, 3, 4]].astype(float)
            frames.append(_turned(frame.to_ndarray(format=form), matrix))
            if frames[-1].shape != frames[0].shape:
                raise RecordingError(f"its frames change their size: {frames[0].shape[:2]} to {frames[-1].shape[:2]}")
            if frame.time is not None:
                times.append(frame.time)
        rate = stream.average_rate
    if not frames:
        raise RecordingError("it holds no video frames")
    notes = []
    if matrix[0] * matrix[3] < matrix[1] * matrix[2]:
        notes.append("turned and mirrored as its metadata say")
    elif round(turn / 90) % 4:
        notes.append(f"turned by {abs(round(turn))}° {'anti' * (turn > 0)}clockwise, as its metadata say")
    if len(frames) < (1 - UNEVEN) * expected - 1:
        notes.append(f"{len(frames)} of the {expected} frames that its header promises could be read")
    if any(component.is_alpha for component in pixels.components):
        notes.append("its alpha is left out")
    if damaged:
        notes.append(f"{damaged} of its frames are damaged")
    if 8 < bits < 16:
        notes.append(f"numbers of {bits} bits, stretched to 16")
    step = _step(times) if len(times) == len(frames) > 1 else 1 / float(rate) if rate else 0.0
    if len(times) > 2 and (np.abs(np.diff(times) - step) > UNEVEN * step).any():
        notes.append(f"frames are not evenly spaced in time; {step * 1000:.3g} ms is their mean distance")
    wide = float(aspect) if aspect else 1.0
    pixel = [Step(1.0), Step(wide)] if round(turn / 90) % 2 == 0 else [Step(wide), Step(1.0)]
    if wide != 1:
        notes.append(f"pixels are {wide:.3g} times as wide as high")
    array = np.stack(frames)
    return FileArray(
        array, ("t", "h", "w"), array.ndim == 4, (Step(step, "s") if step else None, *pixel), False, (*notes,)
    )


def _turned(frame: Array, matrix: Array) -> Array:
    """Turn and mirror a frame by the matrix ``(a, b, c, d)`` that shows x at a x + c y and y at b x + d y."""
    a, b, c, d = matrix
    if abs(a) + abs(d) < abs(b) + abs(c):
        frame, a, d = frame.swapaxes(0, 1), c, b
    return frame[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def _form(pixels: str, bits: int) -> tuple[str, str, int]:
    """Return the form of PyAV that keeps all bits of pixels, its type, and its channels: grey stays grey."""
    if pixels.startswith("gray"):
        return ("gray16le", "uint16", 1) if bits > 8 else ("gray", "uint8", 1)
    return ("rgb48le", "uint16", 3) if bits > 8 else ("rgb24", "uint8", 3)


def _expected_frames(av: Any, container: Any, stream: Any) -> int:
    """Return how many frames a header promises, 1 where it is silent."""
    if stream.frames:
        return int(stream.frames)
    seconds = stream.duration * stream.time_base if stream.duration else (container.duration or 0) / av.time_base
    return max(1, int(seconds * (stream.average_rate or 0)))


def _step(times: Sequence[float]) -> float:
    """Return the mean distance of frames in time."""
    return (times[-1] - times[0]) / (len(times) - 1)
