"""Reader of DICOM, by pydicom: files of one or many frames, and folders that hold series of files.

Every image, of whatever file, becomes a frame with a place in space. Frames are sorted by their places, and those at
the same place are taken as time.
"""

from __future__ import annotations

import contextlib
import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tensorattn.cli.common import MissingPackageError, amount, require
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

__all__ = ["is_dicom", "read_dicom", "read_series"]

PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
NEEDED = ("Rows", "Columns", "PhotometricInterpretation")
CINE = ("FrameTime", "FrameTimeVector", "CineRate", "RecommendedDisplayFrameRate")
CENTIMETRES = 3  # the code of the unit, in regions of ultrasound
PREAMBLE = 144  # bytes before those that the length of the first group counts
SAME_PLACE = 0.01  # mm; slices closer than this lie at the same place
UNEVEN = 0.05  # share of the distance of slices by which gaps may differ
ORDERED_BY = ("TemporalPositionIndex", "TemporalPositionIdentifier", "EchoTime", "TriggerTime")  # at the same place


@dataclass(frozen=True)
class _Frame:
    """One image: the file it is in, its number there, and what its header says of it."""

    path: Path
    number: int
    position: Array | None
    across: Array | None
    slope: float
    intercept: float
    instance: int
    height: float
    turn: tuple[float, ...]

    @property
    def place(self) -> float:
        """Where it lies along the normal of its plane, in mm."""
        assert self.position is not None and self.across is not None
        return float(self.position @ np.cross(self.across[:3], self.across[3:]))


def is_dicom(path: Path) -> bool:
    """Say whether a file begins as DICOM files do."""
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def read_dicom(path: Path, request: Request) -> FileArray:
    """Read a DICOM file: a cine loop ``t h w``, a stack ``z h w``, both, or an image ``h w``."""
    pydicom = require("pydicom", extra="examples", purpose="reading DICOM")
    header = _open(pydicom, request, path)
    if not any(header.get(tag) for tag in PIXELS) or not all(tag in header for tag in NEEDED):
        raise RecordingError("it holds no pixels")
    return _read_frames([(path, header)], request, lambda _: header)


def read_series(files: Sequence[Path], request: Request) -> FileArray:
    """Read one series out of DICOM files: the one called ``key``, or the only one."""
    pydicom = require("pydicom", extra="examples", purpose="reading DICOM")
    headers = []
    for path in files:
        with _naming(path):
            headers.append((path, _open(pydicom, request, path, stop_before_pixels=True)))
    images = [(path, header) for path, header in headers if all(tag in header for tag in NEEDED)]
    found = _series(images)
    if not found:
        raise RecordingError("its DICOM files hold no images")
    words = {name: _series_in_words(members) for name, members in found.items()}
    members = found[choose(words, request.key, "series")]
    unique = {str(header.get("SOPInstanceUID", path)): (path, header) for path, header in members}
    contents = _read_frames(list(unique.values()), request, partial(_open, pydicom, request))
    notes = [f"series {words[next(name for name in found if found[name] is members)]}"] if len(found) > 1 else []
    if len(images) < len(headers):
        notes.append(f"DICOM files without an image left out: {len(headers) - len(images)}")
    if len(unique) < len(members):
        notes.append(f"copies of files left out: {len(members) - len(unique)}")
    return contents._replace(notes=(*notes, *contents.notes))


def _open(pydicom: Any, request: Request, path: Path, **options: Any) -> Any:
    """Read a file, also one from before files began with DICM."""
    if is_dicom(path):
        about = pydicom.filereader.read_file_meta_info(path)
        if about.get("TransferSyntaxUID") == pydicom.uid.DeflatedExplicitVRLittleEndian:  # packed, header and all
            packed = path.read_bytes()[PREAMBLE + about.FileMetaInformationGroupLength :]
            if len(zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, request.max_bytes + 1)) > request.max_bytes:
                raise RecordingError(f"unpacked it takes more than {request.limit}, {amount(request.max_bytes, 'B')}")
        return pydicom.dcmread(path, **options)
    header = pydicom.dcmread(path, force=True, **options)
    if not all(tag in header for tag in NEEDED):
        raise RecordingError("cannot be read as DICOM (it does not begin as such a file does)")
    return header


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Put the name of a file in front of what goes wrong with it."""
    try:
        yield
    except MissingPackageError:
        raise
    except Exception as cause:  # decoders have errors of their own
        told = cause.rule if isinstance(cause, RecordingError) else one_line(cause)
        raise RecordingError(f"{path.name} cannot be read ({told})") from cause


# ---- which files belong together -------------------------------------------------------------------------------


def _series(headers: Iterable[tuple[Path, Any]]) -> dict[str, list[tuple[Path, Any]]]:
    """Tell series apart, by their number where that is enough; what differs in size or direction is no series."""
    groups: dict[Any, list[tuple[Path, Any]]] = {}
    for path, header in headers:
        direction = tuple(round(float(each), 2) for each in header.get("ImageOrientationPatient") or ())
        alone = path if int(header.get("NumberOfFrames") or 1) > 1 else None
        kind = (
            header.Rows,
            header.Columns,
            header.PhotometricInterpretation,
            tuple(map(float, header.get("PixelSpacing") or ())),
        )
        groups.setdefault((str(header.get("SeriesInstanceUID", "")), direction, kind, alone), []).append((path, header))
    ranked = sorted(groups.values(), key=lambda members: (_number(members[0][1]), str(members[0][0])))
    numbers = [_number(members[0][1]) for members in ranked]
    names, seen = [], dict.fromkeys(numbers, 0)
    for number in numbers:
        seen[number] += 1
        names.append(f"{number}" if numbers.count(number) == 1 else f"{number}.{seen[number]}")
    return dict(zip(names, ranked, strict=True))


def _number(header: Any) -> int:
    """Return the number of a series, 0 where it has none."""
    return int(header.get("SeriesNumber") or 0)


def _series_in_words(members: Sequence[tuple[Path, Any]]) -> str:
    """Describe a series."""
    header = members[0][1]
    count = sum(int(each.get("NumberOfFrames") or 1) for _, each in members)
    words = f"{count} image{'' if count == 1 else 's'} of {header.Rows}×{header.Columns}"
    told = " ".join(str(header.get("SeriesDescription") or "").split())
    return f"{told}, {words}" if told else words


# ---- how far apart elements lie ---------------------------------------------------------------------------------


def _frame_step(header: Any, notes: list[str]) -> Step | None:
    """Return the time from one frame of a cine loop to the next."""
    apart = [float(each) for each in header.get("FrameTimeVector") or ()][1:]  # the first is 0
    if apart and max(apart) - min(apart) > UNEVEN * max(apart):
        notes.append(f"frames are not evenly spaced in time; {np.mean(apart):.3g} ms is their mean distance")
    rate = float(header.get("CineRate") or header.get("RecommendedDisplayFrameRate") or 0)
    step = float(header.get("FrameTime") or 0) or (np.mean(apart) if apart else 1000 / rate if rate > 0 else 0)
    return Step(float(step) / 1000, "s") if step > 0 else None


def _pixel_steps(header: Any) -> list[Step | None]:
    """Return the steps of pixels of ultrasound, or their ratio, where there is no spacing of pixels."""
    regions: Sequence[Any] = header.get("SequenceOfUltrasoundRegions") or ()
    units = {regions[0].get(f"PhysicalUnits{axis}Direction") for axis in "XY"} if len(regions) == 1 else set()
    if units == {CENTIMETRES}:
        centimetres = (abs(float(regions[0].get(f"PhysicalDelta{axis}") or 0)) for axis in "YX")
        return [Step(10 * each, "mm") if each > 0 else None for each in centimetres]
    ratio = [float(each) for each in header.get("PixelAspectRatio") or ()]
    return [Step(each) for each in ratio] if len(ratio) == 2 and min(ratio) > 0 else [None, None]


# ---- frames, their order and their numbers ---------------------------------------------------------------------


def _read_frames(headers: Sequence[tuple[Path, Any]], request: Request, dataset: Callable[[Path], Any]) -> FileArray:
    """Read the frames of files that belong together."""
    first = headers[0][1]
    frames = [frame for path, header in headers for frame in _frames(path, header)]
    palette = first.PhotometricInterpretation == "PALETTE COLOR"
    samples = 3 if palette else int(first.get("SamplesPerPixel", 1))
    scaled = any((frame.slope, frame.intercept) != (1, 0) for frame in frames) or "ModalityLUTSequence" in first
    request.allow((len(frames), first.Rows, first.Columns, samples), _type(first, frames, scaled))
    cine = any(tag in first for tag in CINE)
    grid, modes, steps, notes = _arrange(frames, cine, from_many=len(headers) > 1)
    if modes == ("t",):
        steps = [_frame_step(first, notes)]
    if modes == ("z",) and steps == [None] and float(first.get("SpacingBetweenSlices") or 0) > 0:
        steps = [Step(float(first.SpacingBetweenSlices), "mm")]
    kept: dict[Path, Array] = {}
    for path, _ in headers:
        with _naming(path) if len(headers) > 1 else contextlib.nullcontext():
            kept[path] = _pixels(dataset(path), frames, path)
    image = np.stack([kept[frame.path][frame.number] for frame in itertools.chain(*grid)])
    array = image.reshape(*(size for size in (len(grid), len(grid[0])) if size > 1), *image.shape[1:])
    spacing = [float(each) for each in _tag(first, 0, "PixelMeasuresSequence", "PixelSpacing") or ()]
    if len(spacing) != 2 and len(imager := first.get("ImagerPixelSpacing") or ()) == 2:
        spacing = [float(each) for each in imager]
        notes.append("spacing of pixels as on the detector, not in the patient")
    plane = [Step(each, "mm") if each > 0 else None for each in spacing] if len(spacing) == 2 else _pixel_steps(first)
    if scaled:
        notes.append("numbers rescaled as the header says")
    inverted = first.PhotometricInterpretation == "MONOCHROME1"
    if inverted:
        notes.append("MONOCHROME1: small numbers are drawn bright")
    if palette:
        notes.append("colours looked up in the palette")
    return FileArray(array, (*modes, "h", "w"), samples > 1, (*steps, *plane), inverted, tuple(notes))


def _frames(path: Path, header: Any) -> list[_Frame]:
    """Return the frames of a file, in the order they are stored."""
    count = int(header.get("NumberOfFrames") or 1)
    offsets = [float(each) for each in header.get("GridFrameOffsetVector") or ()]  # of a radiotherapy dose
    found = []
    for number in range(count):
        position = _tag(header, number, "PlanePositionSequence", "ImagePositionPatient")
        across = _tag(header, number, "PlaneOrientationSequence", "ImageOrientationPatient")
        slope = _tag(header, number, "PixelValueTransformationSequence", "RescaleSlope")
        intercept = _tag(header, number, "PixelValueTransformationSequence", "RescaleIntercept")
        alone = count > 1 and "PerFrameFunctionalGroupsSequence" not in header and len(offsets) != count
        if alone or position is None or across is None or len(position) != 3 or len(across) != 6:
            where, plane = None, None
        else:
            where, plane = (np.array(each, np.float64) for each in (position, across))
            if len(offsets) == count:
                where = where + offsets[number] * np.cross(plane[:3], plane[3:])
        turn = [_tag(header, number, "FrameContentSequence", name) for name in ORDERED_BY]
        found.append(
            _Frame(
                path,
                number,
                where,
                plane,
                float(1 if slope in (None, "") else slope) * float(header.get("DoseGridScaling") or 1),
                float(0 if intercept in (None, "") else intercept),
                int(header.get("InstanceNumber") or 0),
                float(header.get("SliceLocation") or 0),
                tuple(float(each) if each not in (None, "") else 0.0 for each in turn),
            )
        )
    return found


def _tag(header: Any, number: int, sequence: str, name: str) -> Any:
    """Return what a header says of a frame: of it alone, of all of them, or of the whole file."""
    groups = [*header.get("PerFrameFunctionalGroupsSequence", ())[number : number + 1]]
    for group in (*groups, *header.get("SharedFunctionalGroupsSequence", ())):
        if group.get(sequence) and name in group[sequence][0]:
            return group[sequence][0][name].value
    return header.get(name)


def _arrange(
    frames: list[_Frame], cine: bool, *, from_many: bool
) -> tuple[list[list[_Frame]], tuple[str, ...], list[Step | None], list[str]]:
    """Lay frames out as ``[t][z]``, with the modes that are longer than one, their steps, and what was assumed."""
    notes: list[str] = []
    frames = sorted(
        frames,
        key=lambda frame: (
            frame.instance,
            frame.height if not frame.instance else 0,
            [] if frame.instance else natural(str(frame.path)),
            frame.number,
        ),
    )
    if len(frames) == 1:
        return [frames], (), [], notes
    if any(frame.position is None for frame in frames):
        if from_many:
            by = "instance numbers" if any(frame.instance for frame in frames) else "slice locations and names"
            notes.append(f"no positions in it: its images are in the order of their {by}")
        elif not cine:
            notes.append("its frames have neither times nor places; slices z in the order of the file are assumed")
        return ([[frame] for frame in frames], ("t",), [None], notes) if cine else ([frames], ("z",), [None], notes)
    ways = {tuple(np.round(frame.across, 2)) for frame in frames if frame.across is not None}
    if len(ways) > 1:  # within one file, such as the three planes of a localizer
        told = f"its {len(frames)} images lie in {len(ways)} directions"
        return [frames], ("z",), [None], [f"{told}; they are kept in the order of the file, as slices z"]
    ranked = sorted(frames, key=lambda frame: frame.place)  # keeps the order of frames at the same place
    slices: list[list[_Frame]] = [[ranked[0]]]
    for before, after in itertools.pairwise(ranked):
        if after.place - before.place > SAME_PLACE:
            slices.append([])
        slices[-1].append(after)
    counts = sorted({len(each) for each in slices})
    if len(counts) > 1:
        told = f"its {len(frames)} images lie at {len(slices)} places, {counts[0]} to {counts[-1]} at each"
        if from_many:
            raise RecordingError(f"{told}: they form no grid")
        return [frames], ("z",), [None], [f"{told}; they are kept in the order of the file, as slices z"]
    slices = [sorted(each, key=lambda frame: frame.turn) for each in slices]
    gaps = np.diff([each[0].place for each in slices])
    step = float(np.median(gaps)) if len(gaps) else 0.0
    if len(gaps) and np.ptp(gaps) > UNEVEN * step:
        notes.append(
            f"its slices lie {gaps.min():.3g} to {gaps.max():.3g} mm apart, {step:.3g} mm is taken: one may be missing"
        )
    if (aside := _shift(slices)) > UNEVEN * step:
        notes.append(f"its slices are shifted by {aside:.3g} mm from one to the next, as by a tilted gantry")
    if counts[0] > 1:
        notes.append(f"{counts[0]} images at the same place: they are taken as time t, in the order of the file")
    modes = (*(["t"] if counts[0] > 1 else []), *(["z"] if len(slices) > 1 else []))
    steps = [*([None] if counts[0] > 1 else []), *([Step(step, "mm")] if len(slices) > 1 else [])]
    return [list(each) for each in zip(*slices, strict=True)], modes, steps, notes


def _shift(slices: Sequence[Sequence[_Frame]]) -> float:
    """Return how far, in mm, a slice lies beside the one before: the median."""
    if len(slices) < 2:
        return 0.0
    across = slices[0][0].across
    assert across is not None
    moves = np.diff(np.array([each[0].position for each in slices]), axis=0)
    return float(np.median(np.linalg.norm(moves @ np.array([across[:3], across[3:]]).T, axis=1)))


def _type(header: Any, frames: Sequence[_Frame], scaled: bool) -> Any:
    """Return the type that numbers have once rescaled: whole numbers stay whole, and single precision holds 16 bits."""
    if "FloatPixelData" in header or "DoubleFloatPixelData" in header:
        return np.float32 if "FloatPixelData" in header else np.float64
    bits = int(header.get("BitsAllocated", 16))
    if not scaled:
        return np.dtype(f"{'i' if header.get('PixelRepresentation') else 'u'}{max(1, bits // 8)}")
    if bits > 16:
        return np.float64
    whole = all(float(each).is_integer() and abs(each) < 2**14 for f in frames for each in (f.slope, f.intercept))
    return np.int32 if whole else np.float32


def _pixels(dataset: Any, frames: Sequence[_Frame], path: Path) -> Array:
    """Decode all frames of one file: colours as RGB, numbers rescaled, each frame by its own slope."""
    pixels = require("pydicom.pixels", extra="examples", purpose="reading DICOM")
    try:
        array = dataset.pixel_array
    except RuntimeError as cause:
        hint = "; pip install 'tensorattn[files]' brings gdcm" if "missing dependencies" in str(cause) else ""
        raise RecordingError(f"cannot be decoded ({one_line(cause)}{hint})") from cause
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        array = as_bytes(pixels.apply_color_lut(array, dataset))
    if dataset.get("ModalityLUTSequence"):
        array = pixels.apply_modality_lut(array, dataset)
    own = [frame for frame in frames if frame.path == path]
    array = array.reshape(len(own), *array.shape[int(int(dataset.get("NumberOfFrames") or 1) > 1) :])
    if dataset.get("ModalityLUTSequence") or all((frame.slope, frame.intercept) == (1, 0) for frame in frames):
        return array
    kind = np.dtype(_type(dataset, frames, True))
    exact = array.astype(np.int64 if kind.kind == "i" else np.float64)
    for frame in own:
        exact[frame.number] = exact[frame.number] * exact.dtype.type(frame.slope) + exact.dtype.type(frame.intercept)
    return exact.astype(kind)
