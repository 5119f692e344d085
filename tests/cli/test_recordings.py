"""Recordings: every supported file type, what its axes are taken for, and what bad files are told."""

from __future__ import annotations

import gc
import gzip
import sys
from fractions import Fraction
from pathlib import Path

import av
import h5py
import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

from tensorattn.cli.common import MissingPackageError
from tensorattn.cli.recordings import (
    READERS,
    FileArray,
    RecordingError,
    load,
    make_recording,
    parse_modes,
    sample_video,
    sample_volume,
)
from tensorattn.errors import ModesError, OptionError

RANDOM = np.random.default_rng(0)


def count(*shape: int) -> np.ndarray:
    """Numbers that all differ."""
    return np.arange(np.prod(shape), dtype=np.float64).reshape(shape)


def write_dicom(path: Path, array: np.ndarray, *, colour: bool = False, cine: bool = True) -> Path:
    """Write bytes ``(frames, rows, columns[, 3])`` or ``(rows, columns[, 3])`` as an uncompressed DICOM file."""
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    data = pydicom.Dataset()
    data.file_meta = meta
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    pixels = array.shape[:-1] if colour else array.shape
    if len(pixels) == 3:
        data.NumberOfFrames = pixels[0]
        if cine:
            data.FrameTime = "33.3"
    data.Rows, data.Columns = pixels[-2:]
    data.SamplesPerPixel = 3 if colour else 1
    data.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    if colour:
        data.PlanarConfiguration = 0
    data.BitsAllocated = data.BitsStored = 8
    data.HighBit, data.PixelRepresentation = 7, 0
    data.PixelData = array.astype(np.uint8).tobytes()
    data.save_as(path, enforce_file_format=True)
    return path


def write_film(path: Path, frames: np.ndarray) -> Path:
    """Write ``(t, h, w, 3)`` bytes as a film."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(10))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def write_tiff(path: Path, pages: list[np.ndarray]) -> Path:
    images = [Image.fromarray(page) for page in pages]
    images[0].save(path, save_all=True, append_images=images[1:])
    return path


def write_nifti(path: Path, array: np.ndarray) -> Path:
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), path)
    return path


# ---- every type of file --------------------------------------------------------------------------------------


def test_npy_takes_every_axis_as_a_mode(tmp_path: Path) -> None:
    array = RANDOM.standard_normal((4, 5, 6))
    np.save(tmp_path / "a.npy", array)
    recording = load(tmp_path / "a.npy")
    assert recording.modes.names == ("0", "1", "2")
    assert recording.name == "a"
    np.testing.assert_array_equal(recording.array, array[..., None])


def test_npy_with_modes_takes_one_axis_more_as_channels(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", count(4, 5, 3))
    recording = load(tmp_path / "a.npy", modes=parse_modes("t f"))
    assert (recording.sizes, recording.channels, recording.modes.names) == ((4, 5), 3, ("t", "f"))


def test_npz_takes_the_only_array_or_the_one_asked_for(tmp_path: Path) -> None:
    np.savez(tmp_path / "one.npz", x=count(5))
    np.savez(tmp_path / "two.npz", x=count(5), y=count(2, 3))
    assert load(tmp_path / "one.npz").sizes == (5,)
    assert load(tmp_path / "two.npz", key="y").sizes == (2, 3)


def test_npz_with_a_wrong_or_missing_key_lists_the_arrays(tmp_path: Path) -> None:
    path = tmp_path / "two.npz"
    np.savez(path, x=count(5), y=count(2, 3))
    with pytest.raises(RecordingError) as missing:
        load(path)
    assert str(missing.value) == f"{path}: it holds 2 arrays: x, y; choose one with --key"
    with pytest.raises(RecordingError) as wrong:
        load(path, key="z")
    assert str(wrong.value) == f"{path}: there is no array 'z' in it; it holds 2 arrays: x, y"


def test_a_key_for_another_type_of_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, count(4, 5))
    with pytest.raises(RecordingError) as caught:
        load(path, key="x")
    assert str(caught.value) == (f"{path}: --key chooses one of several arrays or series, but a NumPy array holds one")


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("dtype", [np.float32, np.int16, np.uint8, ">f4", ">i2"])
def test_nifti(tmp_path: Path, suffix: str, dtype: str) -> None:
    array = RANDOM.integers(0, 100, (4, 5, 6)).astype(dtype)
    recording = load(write_nifti(tmp_path / f"brain.v1{suffix}", array))
    assert recording.name == "brain.v1"
    assert recording.modes.names == ("x", "y", "z")
    np.testing.assert_array_equal(recording.array[..., 0], array)


@pytest.mark.parametrize(
    ("shape", "names", "sizes", "channels"),
    [
        ((4, 5), "x y", (4, 5), 1),
        ((4, 5, 1), "x y z", (4, 5, 1), 1),
        ((4, 5, 6, 1), "x y z", (4, 5, 6), 1),
        ((4, 5, 6, 7), "x y z t", (4, 5, 6, 7), 1),
        ((4, 5, 6, 1, 3), "x y z", (4, 5, 6), 3),
        ((4, 5, 6, 7, 3), "x y z t", (4, 5, 6, 7), 3),
    ],
)
def test_nifti_axes(tmp_path: Path, shape: tuple[int, ...], names: str, sizes: tuple[int, ...], channels: int) -> None:
    recording = load(write_nifti(tmp_path / "a.nii", RANDOM.standard_normal(shape).astype(np.float32)))
    assert (str(recording.modes), recording.sizes, recording.channels) == (names, sizes, channels)


def test_nifti_colours_are_channels(tmp_path: Path) -> None:
    colours = np.zeros((4, 5, 6), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    colours["G"] = 7
    colours["B"][2] = 9
    recording = load(write_nifti(tmp_path / "a.nii", colours))
    assert recording.array.shape == (4, 5, 6, 3)
    assert recording.array[..., 1].min() == 7


@pytest.mark.parametrize(
    ("page", "sizes", "channels"),
    [
        (np.zeros((6, 7), np.uint8), (6, 7), 1),
        (np.zeros((6, 7), np.uint16), (6, 7), 1),
        (np.zeros((6, 7), np.float32), (6, 7), 1),
        (np.zeros((6, 7), bool), (6, 7), 1),
        (np.zeros((6, 7, 3), np.uint8), (6, 7), 3),
        (np.zeros((6, 7, 4), np.uint8), (6, 7), 4),
    ],
    ids=["grey", "16 bit", "float", "bits", "RGB", "RGBA"],
)
def test_tiff(tmp_path: Path, page: np.ndarray, sizes: tuple[int, ...], channels: int) -> None:
    stack = load(write_tiff(tmp_path / "a.tif", [page, page + page.dtype.type(1), page]))
    assert (str(stack.modes), stack.sizes, stack.channels) == ("z h w", (3, *sizes), channels)
    assert stack.array[1].min() == 1
    page[2:] = 1
    single = load(write_tiff(tmp_path / "b.TIFF", [page]))
    assert (str(single.modes), single.sizes, single.channels) == ("h w", sizes, channels)


def test_tiff_with_a_palette_becomes_colours(tmp_path: Path) -> None:
    image = Image.fromarray(np.eye(4, dtype=np.uint8))
    image.putpalette([0, 0, 0, 255, 0, 10])
    image.save(tmp_path / "a.tif")
    recording = load(tmp_path / "a.tif")
    assert recording.channels == 3
    np.testing.assert_array_equal(recording.array[0, 0], [255, 0, 10])


def test_tiff_with_pages_of_different_sizes_is_chosen_from(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", [np.eye(6, 7, dtype=np.uint8), np.eye(5, 7, dtype=np.uint8)])
    with pytest.raises(RecordingError) as caught:
        load(path)
    assert str(caught.value) == f"{path}: it holds 2 series: 0 (6×7 uint8), 1 (5×7 uint8); choose one with --key"
    assert load(path, key="1").sizes == (5, 7)


@pytest.mark.parametrize(
    ("shape", "colour", "cine", "names"),
    [
        ((6, 7), False, True, "h w"),
        ((6, 7, 3), True, True, "h w"),
        ((4, 6, 7), False, True, "t h w"),
        ((4, 6, 7), False, False, "z h w"),
        ((4, 6, 8, 3), True, True, "t h w"),
    ],
)
def test_dicom(tmp_path: Path, shape: tuple[int, ...], colour: bool, cine: bool, names: str) -> None:
    array = RANDOM.integers(0, 255, shape).astype(np.uint8)
    recording = load(write_dicom(tmp_path / "a.dcm", array, colour=colour, cine=cine))
    assert str(recording.modes) == names
    np.testing.assert_array_equal(recording.array, array if colour else array[..., None])


def test_dicom_without_pixels_is_refused(tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "a.dcm", np.zeros((2, 2)))
    data = pydicom.dcmread(path)
    del data.PixelData
    data.save_as(path)
    with pytest.raises(RecordingError, match="it holds no pixels"):
        load(path)


@pytest.mark.parametrize("suffix", [".mp4", ".avi"])
def test_film(tmp_path: Path, suffix: str) -> None:
    frames = np.zeros((5, 32, 48, 3), np.uint8)
    frames[2:] = 200
    recording = load(write_film(tmp_path / f"a{suffix}", frames))
    assert (str(recording.modes), recording.array.shape) == ("t h w", frames.shape)
    assert recording.array[0].mean() < 10 and recording.array[-1].mean() > 190


def test_a_film_of_sound_alone_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    with pytest.raises(RecordingError, match="it holds no video stream"):
        load(path)


def test_the_packaged_recordings_are_what_they_are_said_to_be() -> None:
    video, volume = sample_video(), sample_volume()
    assert video.describe() == "t=30 h=240 w=320, 3 channels, uint8"
    assert volume.describe() == "x=128 y=96 z=24, 1 channel, int16"
    assert video.array.std() > 1 and volume.array.std() > 1


# ---- files that cannot be read -------------------------------------------------------------------------------

FILES = sorted(suffix for suffix in READERS if not suffix.startswith(".hdr"))  # which names two files


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # nibabel leaves .mgh files open
@pytest.mark.parametrize("contents", [b"", b"not a recording\n" * 40, bytes(range(256)) * 8])
def test_bytes_of_another_kind_are_refused(tmp_path: Path, contents: bytes) -> None:
    for suffix in FILES:
        path = tmp_path / f"a{suffix}"
        path.write_bytes(contents)
        with pytest.raises(RecordingError) as caught:
            load(path)
        message = str(caught.value)
        del caught
        assert message.startswith(f"{path}: cannot be read as {READERS[suffix].name} (")
        assert "\n" not in message
    gc.collect()


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "a.nii.gz", RANDOM.standard_normal((20, 20, 20)))
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(RecordingError, match="cannot be read as NIfTI"):
        load(path)


def test_a_nifti_of_rubbish_inside_gzip_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.nii.gz"
    path.write_bytes(gzip.compress(b"rubbish" * 100))
    with pytest.raises(RecordingError, match="cannot be read as NIfTI"):
        load(path)


def test_missing_files_and_unknown_kinds(tmp_path: Path) -> None:
    with pytest.raises(RecordingError) as missing:
        load(tmp_path / "a.nii")
    assert str(missing.value) == f"{tmp_path / 'a.nii'}: there is no such file"
    (tmp_path / "c.xyz").write_text("something else")
    with pytest.raises(RecordingError) as unknown:
        load(tmp_path / "c.xyz")
    assert str(unknown.value) == (
        f"{tmp_path / 'c.xyz'}: no reader for this kind of file; these are read: {', '.join(READERS)}"
    )


@pytest.mark.parametrize("suffix", [".npy", ".png", ".gif", ".tif", ".h5", ".dcm", ".jpg", ".webp", ".avi", ".mp4"])
def test_a_file_without_a_suffix_is_told_by_its_first_bytes(tmp_path: Path, suffix: str) -> None:
    path, array = tmp_path / f"a{suffix}", 200 * np.eye(6, 8, dtype=np.uint8)
    if suffix == ".npy":
        np.save(path, array)
    elif suffix == ".h5":
        with h5py.File(path, "w") as file:
            file["x"] = array
    elif suffix == ".dcm":
        write_dicom(path, array)
    elif suffix in (".avi", ".mp4"):
        write_film(path, np.full((3, 32, 48, 3), np.arange(3).reshape(3, 1, 1, 1), np.uint8))
    else:
        Image.fromarray(array).save(path)
    whole = load(path)
    bare = load(path.rename(tmp_path / "bare"))
    np.testing.assert_array_equal(bare.array, whole.array)
    assert bare.name == "bare"


@pytest.mark.parametrize(
    ("suffix", "module", "extra"),
    [
        (".nii", "nibabel", "examples"),
        (".dcm", "pydicom", "examples"),
        (".png", "PIL.Image", "examples"),
        (".tif", "tifffile", "files"),
        (".h5", "h5py", "files"),
        (".zarr", "zarr", "files"),
        (".mov", "av", "video"),
    ],
)
def test_a_missing_package_is_told_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, module: str, extra: str
) -> None:
    (tmp_path / f"a{suffix}").write_bytes(b"something")
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    with pytest.raises(MissingPackageError, match=rf"pip install 'tensorattn\[{extra}\]'$"):
        load(tmp_path / f"a{suffix}")


def test_a_name_that_no_file_can_have(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match=r"there is no such file|cannot be read"):
        load(tmp_path / ("a" * 5000))


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_no_pickle_is_opened(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    array = np.array([{"a": 1}], dtype=object)
    if suffix == ".npy":
        np.save(path, array, allow_pickle=True)
    else:
        np.savez(path, x=array)
    with pytest.raises(RecordingError, match="cannot be read as a NumPy"):
        load(path)


def test_an_array_under_the_name_of_an_archive_is_told_so(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones(3))
    (tmp_path / "a.npy").rename(tmp_path / "a.npz")
    with pytest.raises(RecordingError, match=r"it is a single array, not an archive; call it \.npy"):
        load(tmp_path / "a.npz")


# ---- arrays that are not recordings --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["complex64", "U3", "datetime64[s]"])
def test_numbers_must_be_real(dtype: str) -> None:
    with pytest.raises(RecordingError, match="its numbers must be real, but its type is"):
        make_recording(FileArray(np.zeros((2, 3), dtype)), name="a", source="a.npy")


@pytest.mark.parametrize("shape", [(0,), (3, 0, 2)])
def test_there_must_be_something_in_it(shape: tuple[int, ...]) -> None:
    with pytest.raises(RecordingError) as caught:
        make_recording(FileArray(np.zeros(shape)), name="a", source="a.npy")
    assert str(caught.value) == f"a.npy: there is nothing in it, its shape is {shape}"


def test_a_single_number_is_no_array() -> None:
    with pytest.raises(RecordingError) as caught:
        make_recording(FileArray(np.array(3.0)), name="a", source="a.npy")
    assert str(caught.value) == "a.npy: it holds a single number, not an array"


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int64", "float16", ">f8", ">i4", "longdouble"])
def test_every_real_type_is_taken(dtype: str) -> None:
    array = np.eye(2, 3, dtype=dtype)
    assert make_recording(FileArray(array), name="a", source="a").array.shape == (2, 3, 1)


def test_gaps_are_filled_with_the_mean_of_their_channel() -> None:
    array = np.array([[[1.0, 10.0], [3.0, np.nan]], [[np.inf, 30.0], [-np.inf, 20.0]]])
    kept = array.copy()
    recording = make_recording(FileArray(array), name="a", source="a", modes=parse_modes("h w"))
    np.testing.assert_array_equal(recording.array, [[[1, 10], [3, 20]], [[2, 30], [2, 20]]])
    np.testing.assert_array_equal(array, kept)  # the caller's array is left alone
    assert recording.notes == ("3 of 8 numbers are not finite and were filled with the mean",)


def test_an_array_of_gaps_alone_is_refused() -> None:
    with pytest.raises(RecordingError, match="none of its 6 numbers is finite"):
        make_recording(FileArray(np.full((2, 3), np.nan)), name="a", source="a")


@pytest.mark.parametrize("array", [np.zeros((3, 4)), np.ones(1), np.array([[5.0, np.nan], [5.0, 5.0]])])
def test_a_constant_recording_is_refused(array: np.ndarray) -> None:
    with pytest.raises(RecordingError, match=r"^a\.npy: the recording is constant, there is nothing to attend to$"):
        make_recording(FileArray(array), name="a", source="a.npy")


def test_numbers_beyond_single_precision_are_refused() -> None:
    with pytest.raises(RecordingError, match=r"its numbers reach 1e\+200"):
        make_recording(FileArray(np.array([1.0, 1e200])), name="a", source="a")


def test_modes_that_do_not_fit_are_told_both_numbers() -> None:
    with pytest.raises(ModesError) as caught:
        make_recording(FileArray(count(2, 3, 4, 5)), name="a", source="a.npy", modes=parse_modes("t h"))
    assert str(caught.value) == (
        "a.npy: --modes gives 2 modes (t h), but the array (2, 3, 4, 5) has 4 dimensions; "
        "they must be 2, or 3 with channels last"
    )


@pytest.mark.parametrize(
    ("names", "note"),
    [
        ("t h w", ()),
        ("t c h w", ("the file calls its axes t h w and channels, you call them t c h w",)),
        ("h w t", ("the file calls its axes t h w and channels, you call them h w t",)),
    ],
)
def test_axes_that_are_called_otherwise_than_in_the_file_are_told(names: str, note: tuple[str, ...]) -> None:
    film = FileArray(count(2, 3, 4, 5), ("t", "h", "w"), channels=True, notes=("a film",))
    made = make_recording(film, name="a", source="a", modes=parse_modes(names))
    assert made.notes == ("a film", *note)


def test_a_long_name_leaves_room_for_more(tmp_path: Path) -> None:
    np.save(tmp_path / f"{'a' * 250}.npy", count(2, 3))
    assert load(tmp_path / f"{'a' * 250}.npy").name == "a" * 100


def test_too_many_dimensions() -> None:
    said = tuple("abcdefg")
    with pytest.raises(ModesError, match="has 7 modes, but at most 6 are drawn"):
        make_recording(FileArray(count(*(2,) * 7), said), name="a", source="a.tif")
    with pytest.raises(ModesError, match="has 7 modes, but at most 6 are drawn; say which are modes with --modes"):
        make_recording(FileArray(count(*(2,) * 7)), name="a", source="a.npy")
    assert make_recording(FileArray(count(*(2,) * 7)), name="a", source="a", modes=parse_modes("6")).channels == 2


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("t h h", ModesError, "mode names must differ, but 'h' appears 2 times in 't h h'."),
        ("t,h", ModesError, "mode names must be words of letters, digits and underscores, got 't,h'."),
        ("", ModesError, "modes must name at least one mode, got ''."),
        ("0", OptionError, "modes must be at least 1, got 0."),
        ("-2", OptionError, "modes must be at least 1, got -2."),
        ("7", ModesError, "modes has order 7, but at most 6 modes are drawn."),
        ("9" * 9, ModesError, f"mode names must be words of letters, digits and underscores, got '{'9' * 9}'."),
    ],
)
def test_bad_mode_strings(text: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        parse_modes(text)
    assert str(caught.value) == message
