"""Readers of pictures: TIFF by tifffile, others by Pillow, and folders of frames."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from tensorattn.cli.common import require
from tensorattn.cli.readers.contents import (
    Array,
    FileArray,
    RecordingError,
    Request,
    Step,
    as_bytes,
    choose,
    natural,
    one_line,
)

__all__ = ["read_frames", "read_picture", "read_tiff"]

NAMES = {"X": "w", "Y": "h", "Z": "z", "T": "t"}  # what tifffile calls an axis, and what it is called here
CHANNELS = "CS"
NODATA, TURN = 42113, 274  # tags: how geographic data mark what is missing, and the orientation
TURNED = "turned as its metadata say"
INKS = ("SEPARATED", "YCBCR", "CIELAB", "ICCLAB", "ITULAB")
UNKNOWN = "IQR"  # pages that the file says nothing of
UNITS = {"\\u00B5m": "µm", "micron": "µm", "um": "µm", "sec": "s"}
PLAIN = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "F", "RGB", "RGBA")  # modes of Pillow whose numbers are values


# ---- TIFF --------------------------------------------------------------------------------------------------------


def read_tiff(path: Path, request: Request) -> FileArray:
    """Read one series of a TIFF file, of any type of numbers, with the axes that ImageJ and OME give."""
    tifffile = require("tifffile", extra="files", purpose="reading TIFF")
    with tifffile.TiffFile(path) as file:
        held = {str(n): f"{'×'.join(map(str, each.shape))} {each.dtype}" for n, each in enumerate(file.series)}
        number = int(choose(held, request.key, "series"))
        series = file.series[number]
        page, axes = series.keyframe, series.axes
        palette = page.photometric == tifffile.PHOTOMETRIC.PALETTE and page.colormap is not None and not file.is_imagej
        colours = np.ascontiguousarray(as_bytes(page.colormap.T)) if palette else None
        request.allow(*((series.shape, series.dtype) if colours is None else ((*series.shape, 3), colours.dtype)))
        array, notes = series.asarray(), []
        if colours is not None:
            array, axes = colours[array], f"{axes}S"
            notes.append("colours looked up in the palette")
        with contextlib.suppress(ValueError):  # words that are no number mark nothing
            if NODATA in page.tags and (missing := float(page.tags[NODATA].value)) in array:
                array = np.where(array == missing, np.nan, array)
                notes.append(f"{missing:g} marks what is missing")
        if page.photometric.name in INKS and page.compression != tifffile.COMPRESSION.JPEG:
            notes.append(f"its colours are {page.photometric.name}, kept as stored")
        steps = _tiff_steps(file, page, number)
        if TURN in page.tags and (way := page.tags[TURN].value) in range(2, 9) and "Y" in axes and "X" in axes:
            array, steps = _turned(array, axes, way, steps)
            notes.append(TURNED)
        inverted = page.photometric == tifffile.PHOTOMETRIC.MINISWHITE
        return _named_axes(array, axes, steps, inverted, notes)


def _turned(array: Array, axes: str, way: int, steps: dict[str, Step]) -> tuple[Array, dict[str, Step]]:
    """Turn and mirror planes as the orientation tag says; the numbers are those of EXIF."""
    down, across = axes.index("Y"), axes.index("X")
    if way >= 5:
        array = array.swapaxes(down, across)
        steps = {{"X": "Y", "Y": "X"}.get(axis, axis): step for axis, step in steps.items()}
    mirrored = [axis for axis, ways in ((down, (3, 4, 7, 8)), (across, (2, 3, 6, 7))) if way in ways]
    turned: Array = np.flip(array, tuple(mirrored))
    return turned, steps


def _named_axes(array: Array, axes: str, steps: dict[str, Step], inverted: bool, notes: list[str]) -> FileArray:
    """Put channels last and name the other axes."""
    own = [n for n, axis in enumerate(axes) if axis in CHANNELS]
    rest = [n for n in range(len(axes)) if n not in own]
    free = [name for name in ("z", "t", "p", "q", "r") if name.upper() not in axes]
    names: list[str] = []
    for n in reversed(rest):  # unknown pages are slices first
        names.insert(0, free.pop(0) if axes[n] in UNKNOWN and free else NAMES.get(axes[n], axes[n].lower()))
        if axes[n] in UNKNOWN:
            notes.append(f"its {array.shape[n]} pages are not named, {names[0]} is assumed")
    array = array.transpose(*rest, *own).reshape(*(array.shape[n] for n in rest), *([-1] if own else []))
    if len(set(names)) < len(names):
        names = []
    return FileArray(array, tuple(names), bool(own), tuple(steps.get(axes[n]) for n in rest), inverted, tuple(notes))


def _tiff_steps(file: Any, page: Any, number: int) -> dict[str, Step]:
    """Return how far apart neighbours lie, by axis, where ImageJ or OME say so."""
    if file.is_ome:
        images = [each for each in ElementTree.fromstring(file.ome_metadata).iter() if each.tag.endswith("}Pixels")]
        if len(images) <= number:
            return {}
        pixels = images[number]
        sizes = {axis: (f"PhysicalSize{axis}", f"PhysicalSize{axis}Unit", "µm") for axis in "XYZ"}
        sizes["T"] = ("TimeIncrement", "TimeIncrementUnit", "s")
        return {
            axis: Step(float(pixels.attrib[size]), pixels.attrib.get(unit, usual))
            for axis, (size, unit, usual) in sizes.items()
            if float(pixels.attrib.get(size, 0)) > 0
        }
    if not file.is_imagej:
        return {}
    found, said = {}, file.imagej_metadata or {}
    unit = str(said.get("unit", "")).strip()
    unit = "" if unit in ("pixel", "pixels") else UNITS.get(unit, unit)
    for axis, tag in (("X", "XResolution"), ("Y", "YResolution")):
        count, size = page.tags[tag].value if tag in page.tags else (0, 0)
        if count and size and unit:
            found[axis] = Step(size / count, unit)
    if unit and float(said.get("spacing", 0)) > 0:
        found["Z"] = Step(float(said["spacing"]), unit)
    if float(said.get("finterval", 0)) > 0:
        found["T"] = Step(float(said["finterval"]), UNITS.get(said.get("tunit", "s"), said.get("tunit", "s")))
    return found


# ---- pictures, and films of pictures -----------------------------------------------------------------------------


def read_picture(path: Path, request: Request) -> FileArray:
    """Read a picture ``h w``, turned as it is meant to be seen, or an animated one ``t h w``."""
    pillow = require("PIL.Image", extra="examples", purpose="reading pictures")
    operations = require("PIL.ImageOps", extra="examples", purpose="reading pictures")
    with _any_size(pillow), pillow.open(path) as image:
        count, notes = getattr(image, "n_frames", 1), []
        if image.format == "MPO":  # of telephones and stereo cameras
            notes.append(f"the first of its {count} pictures, of which others are previews, depths or the other eye")
            count = 1
        if image.format == "PNG" and _png_bits(path) > 8 and image.mode in ("RGB", "RGBA", "LA"):
            # of which Pillow would keep 8 bits
            request.allow((image.height, image.width, len(image.getbands())), np.uint16)
            codecs = require("imagecodecs", extra="files", purpose="reading colours of 16 bits")
            way = image.getexif().get(TURN, 1)
            array, _ = _turned(codecs.png_decode(path.read_bytes()), "YXS", way, {})
            return FileArray(array, ("h", "w"), channels=True, notes=(TURNED,) if way in range(2, 9) else ())
        kind = image.mode
        if count > 1 or kind not in PLAIN:
            kind = "RGBA" if count == 1 and "transparency" in image.info else "RGB"
        request.allow((count, image.height, image.width, pillow.getmodebands(kind)), _bits_of(kind))
        frames, times = [], []
        for number in range(int(getattr(image, "default_image", False)), count):  # which no film of an APNG shows
            image.seek(number)
            turned = operations.exif_transpose(image)
            if turned.size != image.size or turned.getexif() != image.getexif():
                notes.append(TURNED)
            if image.mode != kind:
                turned = turned.convert(kind)
                if image.mode not in ("P", "PA"):
                    notes.append(f"{image.mode} turned into {kind}")
            frames.append(np.asarray(turned))
            times.append(image.info.get("duration", 0) / 1000)
    channels = frames[0].ndim == 3
    if count == 1:
        return FileArray(frames[0], ("h", "w"), channels, notes=tuple(notes))
    if len(set(times)) > 1:
        notes.append(f"its frames last {min(times):g} to {max(times):g} s: they are not evenly spaced in time")
    steps = (Step(sum(times) / len(times), "s") if all(times) else None, None, None)
    return FileArray(np.stack(frames), ("t", "h", "w"), channels, steps, notes=tuple(dict.fromkeys(notes)))


@contextlib.contextmanager
def _any_size(pillow: Any) -> Iterator[None]:
    """Let pictures be as large as the request allows, in place of the limit of Pillow."""
    usual, pillow.MAX_IMAGE_PIXELS = pillow.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        pillow.MAX_IMAGE_PIXELS = usual


def _png_bits(path: Path) -> int:
    """Return the bits of a number in a PNG file."""
    with path.open("rb") as file:
        return file.read(25)[24]


def _bits_of(mode: str) -> str:
    """Return the type of the numbers of a picture of Pillow."""
    return {"I": "int32", "F": "float32"}.get(mode, "uint16" if mode.startswith("I;16") else "uint8")


def read_frames(files: Sequence[Path], request: Request, read: Callable[[Path, Request], FileArray]) -> FileArray:
    """Read pictures of one size as the frames of a film ``t h w``, in the order of the numbers in their names."""
    ordered = sorted(files, key=lambda path: natural(path.stem))
    frames: list[FileArray] = []
    kinds: list[str] = []
    for path in ordered:
        try:
            frame = read(path, request)
        except (OSError, RecordingError) as cause:
            told = cause.rule if isinstance(cause, RecordingError) else one_line(cause)
            raise RecordingError(f"{path.name} cannot be read ({told})") from cause
        request.allow((len(ordered), *frame.array.shape), frame.array.dtype)
        if len(frame.modes) != 2:
            raise RecordingError(f"{path.name} holds more than one image; give it alone")
        kinds.append(f"{'×'.join(map(str, frame.array.shape))} of {frame.array.dtype.name}")
        if kinds[-1] != kinds[0]:
            raise RecordingError(f"its pictures differ: {ordered[0].name} is {kinds[0]} and {path.name} is {kinds[-1]}")
        frames.append(frame)
    notes = (note for frame in frames for note in frame.notes)
    ends = f"{ordered[0].name} to {ordered[-1].name}"
    told = f"{len(frames)} pictures in the order of their names, {ends}; time t is assumed"
    first = frames[0]
    if len(frames) == 1:
        return first
    return FileArray(
        np.stack([frame.array for frame in frames]),
        ("t", *first.modes),
        first.channels,
        (None, *(first.steps or (None, None))),
        first.inverted,
        tuple(dict.fromkeys((told, *notes))),
    )
