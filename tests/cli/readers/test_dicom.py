"""DICOM: series told apart and put in order, frames with their own slopes, tables of colours, and what is missing."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels import apply_color_lut, apply_rescale
from pydicom.sequence import Sequence as Items
from pydicom.uid import CTImageStorage, DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, generate_uid

from tensorattn.cli.readers.contents import RecordingError, Step
from tensorattn.cli.recordings import load

DATA = Path(pydicom.__file__).parent / "data" / "test_files"
AXIAL = [1, 0, 0, 0, 1, 0]
RANDOM = np.random.default_rng(0)
SERIES = generate_uid()


def dataset(array: np.ndarray, *, samples: int = 1, **tags: Any) -> Dataset:
    """An image, or frames of one."""
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = CTImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = generate_uid()
    data.SeriesInstanceUID = SERIES
    pixels = array.shape[:-1] if samples > 1 else array.shape
    if len(pixels) == 3:
        data.NumberOfFrames = pixels[0]
    data.Rows, data.Columns = pixels[-2:]
    data.SamplesPerPixel, data.PhotometricInterpretation = samples, "RGB" if samples > 1 else "MONOCHROME2"
    if samples > 1:
        data.PlanarConfiguration = 0
    data.BitsAllocated = data.BitsStored = 8 * array.dtype.itemsize
    data.HighBit, data.PixelRepresentation = data.BitsStored - 1, int(array.dtype.kind == "i")
    data.PixelData = array.tobytes()
    for name, value in tags.items():
        setattr(data, name, value)
    return data


def write(path: Path, array: np.ndarray, **tags: Any) -> Path:
    dataset(array, **tags).save_as(path, enforce_file_format=True)
    return path


def image(value: int) -> np.ndarray:
    made = np.full((4, 5), value, np.int16)
    made[-1, -1] = -1
    return made


def write_series(folder: Path, places: Sequence[float], *, name: str = "IM", **tags: Any) -> None:
    """Write one file a place, without suffix, in a random order; the first number of each tells its place."""
    folder.mkdir(exist_ok=True)
    for number, index in enumerate(RANDOM.permutation(len(places))):
        where = {"ImagePositionPatient": [0, 0, float(places[index])], "ImageOrientationPatient": AXIAL}
        write(folder / f"{name}{number}", image(int(index)), InstanceNumber=number + 1, **{**where, **tags})


def told(path: Path, **request: Any) -> str:
    """What is said of a file that cannot be read, without its name."""
    with pytest.raises(RecordingError) as caught:
        load(path, **request)
    return str(caught.value).removeprefix(f"{path}: ")


# ---- series ------------------------------------------------------------------------------------------------------


def test_a_series_is_sorted_by_position(tmp_path: Path) -> None:
    write_series(tmp_path, [-5, 0, 5, 10, 15], PixelSpacing=[1, 0.5])
    recording = load(tmp_path)
    assert (str(recording.modes), recording.sizes, recording.array.dtype) == ("z h w", (5, 4, 5), np.int16)
    assert recording.array[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
    assert recording.steps == (Step(5, "mm"), Step(1, "mm"), Step(0.5, "mm")) and recording.notes == ()
    assert load(tmp_path / "IM0").sizes == (4, 5)  # one file of it, without a suffix


def test_positions_count_along_the_normal_of_the_slices(tmp_path: Path) -> None:
    for index, x in enumerate((7.0, -2.0, 2.5)):
        where = {"ImagePositionPatient": [x, 3 * index, 0], "ImageOrientationPatient": [0, 1, 0, 0, 0, -1]}
        write(tmp_path / f"{index}.dcm", image(index), **where)  # normal towards -x
    recording = load(tmp_path)
    assert recording.array[:, 0, 0, 0].tolist() == [0, 2, 1] and recording.steps[0] == Step(4.5, "mm")


def test_series_are_told_apart(tmp_path: Path) -> None:
    write_series(tmp_path, [0, 1, 2], SeriesNumber=3, SeriesDescription="T1")
    write_series(tmp_path / "other", [0, 1], SeriesNumber=7, SeriesInstanceUID=generate_uid())
    scout = {"ImagePositionPatient": [0, 0, 0], "ImageOrientationPatient": [0, 1, 0, 0, 0, -1], "SeriesNumber": 3}
    write(tmp_path / "scout", image(9), **scout)
    (tmp_path / "report.pdf").write_text("mine")
    held = "it holds 3 series: 3.1 (T1, 3 images of 4×5), 3.2 (1 image of 4×5), 7 (2 images of 4×5)"
    assert told(tmp_path) == f"{held}; choose one with --key"
    assert told(tmp_path, key="5") == f"there is no series '5' in it; {held}"
    recording = load(tmp_path, key="3.1")
    assert recording.array[:, 0, 0, 0].tolist() == [0, 1, 2]
    assert recording.notes[0] == "series T1, 3 images of 4×5"
    assert load(tmp_path, key="7").sizes == (2, 4, 5)


def test_images_at_the_same_place_are_time(tmp_path: Path) -> None:
    for time in (1, 0):
        write_series(tmp_path, [0, 3, 6], name=f"t{time}-", TemporalPositionIdentifier=time + 1, EchoTime=None)
    recording = load(tmp_path)
    assert (str(recording.modes), recording.sizes) == ("t z h w", (2, 3, 4, 5))
    assert recording.array[..., 0, 0, 0].tolist() == [[0, 1, 2]] * 2
    assert recording.notes == ("2 images at the same place: they are taken as time t, in the order of the file",)
    write(tmp_path / "more", image(9), ImagePositionPatient=[0, 0, 9], ImageOrientationPatient=AXIAL)
    assert told(tmp_path) == "its 7 images lie at 4 places, 1 to 2 at each: they form no grid"


def test_a_missing_slice_a_copy_and_no_positions_are_told(tmp_path: Path) -> None:
    write_series(tmp_path / "gap", [0, 1, 2, 4])
    assert load(tmp_path / "gap").notes == ("its slices lie 1 to 2 mm apart, 1 mm is taken: one may be missing",)
    (tmp_path / "gap" / "copy").write_bytes((tmp_path / "gap" / "IM0").read_bytes())
    assert load(tmp_path / "gap").notes[0] == "copies of files left out: 1"
    (tmp_path / "bare").mkdir()
    for number in (2, 1, 3):
        write(tmp_path / "bare" / f"f{5 - number}", image(number), InstanceNumber=number)
    bare = load(tmp_path / "bare")
    assert bare.array[:, 0, 0, 0].tolist() == [1, 2, 3]
    assert bare.notes == ("no positions in it: its images are in the order of their instance numbers",)


def test_without_positions_names_count_as_people_count(tmp_path: Path) -> None:
    for number in (7, 8, 10):
        write(tmp_path / f"im{number}", image(number))
    bare = load(tmp_path)
    assert bare.array[:, 0, 0, 0].tolist() == [7, 8, 10]
    assert bare.notes == ("no positions in it: its images are in the order of their slice locations and names",)
    for number in (7, 8, 10):
        write(tmp_path / f"im{number}", image(number), SliceLocation=-number)
    assert load(tmp_path).array[:, 0, 0, 0].tolist() == [10, 8, 7]


def test_what_a_folder_holds_beside_images_is_told(tmp_path: Path) -> None:
    write_series(tmp_path, [0, 1, 2])
    (tmp_path / "IM1").write_bytes((tmp_path / "IM1").read_bytes()[:300])  # a copy that was interrupted
    (tmp_path / "report").write_bytes((DATA / "test-SR.dcm").read_bytes())
    assert load(tmp_path).notes[0] == "DICOM files without an image left out: 2"


def test_pixels_of_no_length_are_none(tmp_path: Path) -> None:
    assert told(write(tmp_path / "a.dcm", image(3), PixelData=b"")) == "it holds no pixels"


def test_slices_of_a_tilted_gantry_are_told(tmp_path: Path) -> None:
    for number in range(3):
        write(
            tmp_path / f"{number}",
            image(number),
            ImagePositionPatient=[0, number, 3 * number],
            ImageOrientationPatient=AXIAL,
        )
    recording = load(tmp_path)
    assert recording.steps[0] == Step(3, "mm")
    assert recording.notes == ("its slices are shifted by 1 mm from one to the next, as by a tilted gantry",)


@pytest.mark.parametrize("tags", [{"PixelSpacing": [2, 2]}, {"PhotometricInterpretation": "MONOCHROME1"}])
def test_images_of_other_pixels_are_another_series(tmp_path: Path, tags: dict[str, Any]) -> None:
    write_series(tmp_path, [0, 1], SeriesDescription="a\nb", PixelSpacing=[1, 1])
    write_series(tmp_path, [2, 3, 4], name="other", **{"PixelSpacing": [1, 1], **tags})
    assert told(tmp_path) == (
        "it holds 2 series: 0.1 (a b, 2 images of 4×5), 0.2 (3 images of 4×5); choose one with --key"
    )


def test_a_file_from_before_files_began_with_dicm(tmp_path: Path) -> None:
    whole = write(tmp_path / "a.dcm", image(3), InstanceNumber=1)
    whole.write_bytes(whole.read_bytes()[132:])
    assert load(whole).array[0, 0, 0] == 3
    assert load(tmp_path).array[0, 0, 0] == 3
    (tmp_path / "b.dcm").write_bytes(b"rubbish" * 99)
    assert told(tmp_path) == "b.dcm cannot be read (cannot be read as DICOM (it does not begin as such a file does))"


def test_the_file_of_a_series_that_is_cut_short_is_named(tmp_path: Path) -> None:
    write_series(tmp_path, [0, 1, 2])
    (tmp_path / "IM1").write_bytes((tmp_path / "IM1").read_bytes()[:-9])
    assert told(tmp_path).startswith("IM1 cannot be read (The number of bytes of pixel data is less than expected")


def test_every_slice_has_its_own_slope(tmp_path: Path) -> None:
    for index in range(3):
        where = {"ImagePositionPatient": [0, 0, index], "ImageOrientationPatient": AXIAL}
        write(tmp_path / f"{index}", image(100), RescaleSlope=0.5 + index, RescaleIntercept=index, **where)
    recording = load(tmp_path)
    assert recording.array[:, 0, 0, 0].tolist() == [50, 151, 252] and recording.array.dtype == np.float32
    assert recording.notes == ("numbers rescaled as the header says",)
    assert "3×4×5×1 of float32" in told(tmp_path, max_bytes=239)
    assert load(tmp_path, max_bytes=240).sizes == (3, 4, 5)


def test_real_series() -> None:
    scan = load(DATA / "dicomdirtests" / "98892001" / "CT5N")
    assert (str(scan.modes), scan.sizes, scan.array.dtype) == ("z h w", (5, 16, 16), np.int32)
    assert scan.steps[0] == Step(2.5, "mm") and scan.array.min() < -800
    assert told(DATA / "dicomdirtests" / "98892001").startswith("it holds 3 series: 4.1 (Scout, 1 image of 16×16), ")


# ---- frames of one file ------------------------------------------------------------------------------------------


def group(**sequences: Dataset) -> Dataset:
    made = Dataset()
    for name, item in sequences.items():
        setattr(made, name, Items([item]))
    return made


def item(**tags: Any) -> Dataset:
    made = Dataset()
    for name, value in tags.items():
        setattr(made, name, value)
    return made


def test_frames_of_an_enhanced_object_have_places_and_slopes(tmp_path: Path) -> None:
    frames = np.stack([image(10), image(20), image(30)])
    per_frame = [
        group(
            PlanePositionSequence=item(ImagePositionPatient=[0, 0, place]),
            PixelValueTransformationSequence=item(RescaleSlope=slope, RescaleIntercept=-1, RescaleType="US"),
        )
        for place, slope in ((4, 1), (0, 2), (2, 3))
    ]
    shared = group(
        PlaneOrientationSequence=item(ImageOrientationPatient=AXIAL),
        PixelMeasuresSequence=item(PixelSpacing=[0.5, 0.25], SliceThickness=9),
    )
    groups = {"PerFrameFunctionalGroupsSequence": Items(per_frame), "SharedFunctionalGroupsSequence": Items([shared])}
    recording = load(write(tmp_path / "a.dcm", frames, **groups))
    assert recording.array[:, 0, 0, 0].tolist() == [39, 89, 9]
    assert recording.steps == (Step(2, "mm"), Step(0.5, "mm"), Step(0.25, "mm")) and str(recording.modes) == "z h w"


def test_frames_in_several_directions_are_no_stack(tmp_path: Path) -> None:
    planes = [
        group(
            PlanePositionSequence=item(ImagePositionPatient=[0, 0, 0]),
            PlaneOrientationSequence=item(ImageOrientationPatient=way),
        )
        for way in (AXIAL, [1, 0, 0, 0, 0, -1])
    ]
    frames = np.stack([image(10), image(20)])
    recording = load(write(tmp_path / "a.dcm", frames, PerFrameFunctionalGroupsSequence=Items(planes)))
    assert recording.array[:, 0, 0, 0].tolist() == [10, 20] and recording.steps[0] is None
    assert recording.notes == ("its 2 images lie in 2 directions; they are kept in the order of the file, as slices z",)


def test_a_cine_loop_and_frames_of_nothing_known(tmp_path: Path) -> None:
    frames = np.stack([image(1), image(2)])
    cine = load(write(tmp_path / "a.dcm", frames, FrameTime="40"))
    assert str(cine.modes) == "t h w" and cine.steps[0] == Step(0.04, "s") and cine.notes == ()
    stack = load(write(tmp_path / "b.dcm", frames))
    assert str(stack.modes) == "z h w"
    assert stack.notes == ("its frames have neither times nor places; slices z in the order of the file are assumed",)


@pytest.mark.parametrize(
    ("tags", "steps"),
    [
        ({"CineRate": 25}, (Step(0.04, "s"), None, None)),
        ({"FrameTimeVector": [0, 30, 30]}, (Step(0.03, "s"), None, None)),
        ({"FrameTime": 50, "PixelAspectRatio": [2, 1]}, (Step(0.05, "s"), Step(2), Step(1))),
        ({"SpacingBetweenSlices": 3, "PixelSpacing": [1, 2]}, (Step(3, "mm"), Step(1, "mm"), Step(2, "mm"))),
    ],
)
def test_steps_of_frames(tmp_path: Path, tags: dict[str, Any], steps: tuple[Step | None, ...]) -> None:
    assert load(write(tmp_path / "a.dcm", RANDOM.integers(0, 9, (3, 4, 5)).astype(np.uint8), **tags)).steps == steps


def test_frames_that_come_at_uneven_times_are_told(tmp_path: Path) -> None:
    frames = RANDOM.integers(0, 9, (3, 4, 5)).astype(np.uint8)
    recording = load(write(tmp_path / "a.dcm", frames, FrameTimeVector=[0, 30, 50]))
    assert recording.steps[0] == Step(0.04, "s")
    assert recording.notes == ("frames are not evenly spaced in time; 40 ms is their mean distance",)


def test_pixels_of_ultrasound_have_a_size() -> None:
    steps = load(DATA / "examples_ybr_color.dcm").steps
    assert [(round(step.size, 4), step.unit) for step in steps if step] == [
        (0.0333, "s"),
        (0.5105, "mm"),
        (0.5105, "mm"),
    ]


def test_a_dose_has_places_and_a_scale() -> None:
    dose, header = load(DATA / "rtdose.dcm"), pydicom.dcmread(DATA / "rtdose.dcm")
    assert str(dose.modes) == "z h w" and dose.steps[0] == Step(5, "mm")
    np.testing.assert_allclose(dose.array[..., 0], header.pixel_array * float(header.DoseGridScaling))


# ---- what numbers mean -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "slope", "intercept", "read"),
    [("u2", 1, -1024, "i4"), ("i2", 2, 0, "i4"), ("u2", 0.5, 3, "f4"), ("u4", 1, -1, "f8"), ("i1", 1, 0, "i1")],
)
def test_rescaled_numbers(tmp_path: Path, dtype: str, slope: float, intercept: float, read: str) -> None:
    array = RANDOM.integers(0, 120, (4, 6)).astype(dtype)
    path = write(tmp_path / "a.dcm", array, RescaleSlope=slope, RescaleIntercept=intercept)
    recording = load(path)
    assert recording.array.dtype == read
    np.testing.assert_array_equal(recording.array[..., 0], apply_rescale(array, pydicom.dcmread(path)))


def test_a_table_of_values_is_looked_up(tmp_path: Path) -> None:
    table = item(LUTDescriptor=[4, 0, 16], ModalityLUTType="US", LUTData=struct.pack("<4H", 5, 70, 900, 20))
    array = np.array([[0, 1], [2, 3]], np.uint8)
    recording = load(write(tmp_path / "a.dcm", array, ModalityLUTSequence=Items([table])))
    assert recording.array[..., 0].tolist() == [[5, 70], [900, 20]]


def test_monochrome1_is_drawn_inverted_and_keeps_its_numbers(tmp_path: Path) -> None:
    recording = load(write(tmp_path / "a.dcm", np.eye(4, dtype=np.uint8), PhotometricInterpretation="MONOCHROME1"))
    assert recording.inverted and recording.array[0, 0, 0] == 1
    assert recording.notes == ("MONOCHROME1: small numbers are drawn bright",)
    assert not load(DATA / "CT_small.dcm").inverted


def test_palette_colours() -> None:
    header, recording = pydicom.dcmread(DATA / "examples_palette.dcm"), load(DATA / "examples_palette.dcm")
    assert recording.channels == 3 and recording.array.dtype == np.uint8
    np.testing.assert_array_equal(recording.array, apply_color_lut(header.pixel_array, header) >> 8)
    assert recording.notes == ("colours looked up in the palette",)


@pytest.mark.parametrize("name", ["SC_ybr_full_422_uncompressed", "SC_rgb_dcmtk_+eb+cy+np", "SC_rgb_jpeg_lossy_gdcm"])
def test_ybr_becomes_rgb(name: str) -> None:
    recording, rgb = load(DATA / f"{name}.dcm"), load(DATA / "SC_rgb_rle.dcm")
    assert recording.channels == 3
    assert np.abs(recording.array.astype(int) - rgb.array).mean() < 3  # the same picture


# ---- what cannot be read -----------------------------------------------------------------------------------------


def test_a_missing_decoder_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    message = "Unable to decompress 'JPEG 2000' pixel data because all plugins are missing dependencies:"
    monkeypatch.setattr(
        pydicom.dataset.Dataset,
        "pixel_array",
        property(lambda _: (_ for _ in ()).throw(RuntimeError(f"{message}\n\tgdcm - requires gdcm>=3.0.10\n\tpillow"))),
    )
    assert told(DATA / "JPEG2000.dcm") == (
        f"cannot be decoded ({message} gdcm - requires gdcm>=3.0.10, pillow; pip install 'tensorattn[files]' brings gdcm)"
    )


@pytest.mark.parametrize("name", ["MR_small_jpeg_ls_lossless", "JPEGLSNearLossless_16", "SC_rgb_jpeg_gdcm"])
def test_compressed_pixels_are_those_of_gdcm(name: str) -> None:
    pytest.importorskip("gdcm")
    stored = pydicom.dcmread(DATA / f"{name}.dcm")
    read = load(DATA / f"{name}.dcm").array
    np.testing.assert_array_equal(read.reshape(stored.pixel_array.shape), stored.pixel_array)
    if name.startswith("MR"):
        np.testing.assert_array_equal(read, load(DATA / "MR_small.dcm").array)  # without loss


def test_a_folder_of_reports_alone(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes((DATA / "test-SR.dcm").read_bytes())
    assert told(tmp_path) == "its DICOM files hold no images"


def test_an_object_that_is_too_large_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.dcm", np.zeros((30, 40, 50), np.uint16))
    assert (
        told(path, max_bytes=10**5) == "unpacked it takes 120 kB (30×40×50×1 of uint16), but --max-bytes allows 100 kB"
    )


def test_a_deflated_file_that_is_too_large_is_refused_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = dataset(np.eye(300, dtype=np.uint8))
    made.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    made.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    np.testing.assert_array_equal(load(tmp_path / "a.dcm").array[..., 0], np.eye(300))
    monkeypatch.setattr(pydicom, "dcmread", lambda *_, **__: pytest.fail("it was unpacked"))
    assert told(tmp_path / "a.dcm", max_bytes=80_000) == "unpacked it takes more than --max-bytes, 80.0 kB"
