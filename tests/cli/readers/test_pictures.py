"""Pictures: every type of TIFF, its axes and steps, colours of 16 bits, and folders of frames."""

from __future__ import annotations

import re
import struct
import zlib
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps

from tensorattn.cli.readers.contents import RecordingError, Step
from tensorattn.cli.recordings import load

RANDOM = np.random.default_rng(0)


def told(path: Path, **request: Any) -> str:
    """What is said of a file that cannot be read, without its name."""
    with pytest.raises(RecordingError) as caught:
        load(path, **request)
    return str(caught.value).removeprefix(f"{path}: ")


def write(path: Path, array: np.ndarray, **settings: Any) -> Path:
    tifffile.imwrite(path, array, **settings)
    return path


# ---- TIFF --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "f2", "f4", "f8", ">f4", "bool"])
def test_every_type_of_number(tmp_path: Path, dtype: str) -> None:
    array = RANDOM.standard_normal((3, 6, 7)).astype(dtype)
    if np.dtype(dtype).kind in "iub":
        array = RANDOM.integers(0, 2, array.shape).astype(dtype)
        array[0, 0] *= np.array(2 ** (8 * array.itemsize - 1) - 1).astype(dtype)
    recording = load(write(tmp_path / "a.tif", array, photometric="minisblack"))
    np.testing.assert_array_equal(recording.array[..., 0], array)
    assert recording.array.dtype.itemsize == array.dtype.itemsize and recording.array.dtype.kind == array.dtype.kind
    assert recording.notes == ("its 3 pages are not named, z is assumed",)


@pytest.mark.parametrize("planes", ["contig", "separate"])
def test_colours_of_16_bits(tmp_path: Path, planes: str) -> None:
    array = RANDOM.integers(0, 2**16, (6, 7, 3)).astype(np.uint16)
    stored = array if planes == "contig" else np.moveaxis(array, -1, 0)
    recording = load(write(tmp_path / "a.tif", stored, photometric="rgb", planarconfig=planes))
    assert str(recording.modes) == "h w"
    np.testing.assert_array_equal(recording.array, array)


@pytest.mark.parametrize(
    ("axes", "modes", "channels"),
    [("TZYX", "t z h w", 1), ("ZCYX", "z h w", 3), ("TZCYX", "t z h w", 2), ("TYX", "t h w", 1)],
)
def test_imagej_hyperstacks(tmp_path: Path, axes: str, modes: str, channels: int) -> None:
    sizes = {"T": 4, "Z": 3, "C": channels, "Y": 6, "X": 7}
    array = RANDOM.random([sizes[axis] for axis in axes]).astype("f4")
    said = {"axes": axes, "spacing": 2.5, "unit": "um", "finterval": 0.1}
    recording = load(write(tmp_path / "a.tif", array, imagej=True, resolution=(2, 4), metadata=said))
    assert (str(recording.modes), recording.channels, recording.notes) == (modes, channels, ())
    expected = np.moveaxis(array, axes.index("C"), -1) if "C" in axes else array[..., None]
    np.testing.assert_array_equal(recording.array, expected)
    steps = {"t": Step(0.1, "s"), "z": Step(2.5, "µm"), "h": Step(0.25, "µm"), "w": Step(0.5, "µm")}
    assert recording.steps == tuple(steps[name] for name in modes.split())


def test_ome_axes_and_steps(tmp_path: Path) -> None:
    array = RANDOM.random((2, 4, 3, 6, 7)).astype("f4")
    said = {"axes": "CTZYX", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5, "PhysicalSizeZ": 2, "TimeIncrement": 3}
    recording = load(write(tmp_path / "a.ome.tif", array, metadata=said))
    assert (str(recording.modes), recording.channels) == ("t z h w", 2)
    np.testing.assert_array_equal(recording.array, np.moveaxis(array, 0, -1))
    assert recording.steps == (Step(3, "s"), Step(2, "µm"), Step(0.5, "µm"), Step(0.5, "µm"))


def test_every_image_of_an_ome_file_has_its_own_steps(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "a.ome.tif", ome=True) as file:
        for size in (5, 3):
            said = {"axes": "ZYX", "PhysicalSizeX": size / 4, "PhysicalSizeY": size / 4}
            file.write(RANDOM.random((2, size, 7)), metadata=said)
    assert load(tmp_path / "a.ome.tif", key="0").steps[1:] == (Step(1.25, "µm"), Step(1.25, "µm"))
    assert load(tmp_path / "a.ome.tif", key="1").steps[1:] == (Step(0.75, "µm"), Step(0.75, "µm"))


@pytest.mark.parametrize("way", range(1, 9))
def test_a_tiff_is_turned_as_a_photograph_is(tmp_path: Path, way: int) -> None:
    array = RANDOM.integers(0, 9, (4, 6)).astype("u1")
    recording = load(write(tmp_path / "a.tif", array, extratags=[(274, "H", 1, way, True)]))
    photograph = Image.fromarray(array)
    photograph.getexif()[274] = way
    np.testing.assert_array_equal(recording.array[..., 0], np.asarray(ImageOps.exif_transpose(photograph)))
    assert recording.notes == (() if way == 1 else ("turned as its metadata say",))


def test_inks_are_told_and_a_file_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    Image.fromarray(RANDOM.integers(0, 255, (4, 6, 4)).astype("u1"), "CMYK").save(tmp_path / "a.tif")
    assert load(tmp_path / "a.tif").notes == ("its colours are SEPARATED, kept as stored",)
    path = write(tmp_path / "b.tif", RANDOM.integers(0, 9, (10, 16, 16)).astype("u1"), metadata=None)
    path.write_bytes(path.read_bytes()[:1500])
    assert re.fullmatch(r"cannot be read as TIFF \(.*invalid page offset \d+\)", told(path))


@pytest.mark.parametrize("compression", ["lzw", "zlib", "packbits", None])
def test_volumes_and_compression(tmp_path: Path, compression: str | None) -> None:
    array = RANDOM.integers(0, 99, (8, 32, 32)).astype("u2")
    tiled = {"tile": (4, 16, 16), "volumetric": True} if compression is None else {"compression": compression}
    recording = load(write(tmp_path / "a.tif", array, photometric="minisblack", **tiled))
    assert str(recording.modes) == "z h w"
    np.testing.assert_array_equal(recording.array[..., 0], array)


def test_white_is_zero_and_what_is_missing(tmp_path: Path) -> None:
    array = RANDOM.integers(0, 9, (6, 7)).astype("i2")
    assert load(write(tmp_path / "a.tif", array.astype("u2"), photometric="miniswhite")).inverted
    array[0, 0] = -999
    small = load(write(tmp_path / "c.tif", array.clip(0).astype("u1"), extratags=[(42113, "s", 0, "-999", True)]))
    assert small.array.dtype == np.uint8 and small.array.min() == 0  # which no byte can be
    recording = load(write(tmp_path / "b.tif", array, extratags=[(42113, "s", 0, "-999", True)]))
    assert recording.array.min() >= 0 and not recording.inverted
    assert recording.notes == (
        "-999 marks what is missing",
        "1 of 42 numbers are not finite and were filled with the mean",
    )


@pytest.mark.parametrize("words", ["1.#QNAN", "n/a", ""])
def test_words_that_mark_nothing_as_missing(tmp_path: Path, words: str) -> None:
    array = RANDOM.random((6, 7)).astype("f4")
    recording = load(write(tmp_path / "a.tif", array, extratags=[(42113, "s", 0, words, True)]))
    np.testing.assert_array_equal(recording.array[..., 0], array)


def test_colours_of_a_palette_count(tmp_path: Path) -> None:
    colours, array = RANDOM.integers(0, 2**16, (3, 256)).astype("u2"), RANDOM.integers(0, 255, (6, 7)).astype("u1")
    path = write(tmp_path / "a.tif", array, photometric="palette", colormap=colours)
    assert told(path, max_bytes=251) == "unpacked it takes 252 B (6×7×3 of uint16), but --max-bytes allows 251 B"
    np.testing.assert_array_equal(load(path, max_bytes=252).array, colours.T[array])


def test_sizes_of_pixels_that_are_none(tmp_path: Path) -> None:
    said = {"axes": "TZYX", "PhysicalSizeX": float("inf"), "PhysicalSizeY": 0.5, "PhysicalSizeZ": -1}
    recording = load(write(tmp_path / "a.ome.tif", RANDOM.random((2, 3, 4, 5)), metadata=said))
    assert recording.steps == (None, None, Step(0.5, "µm"), None)
    said = {"axes": "TYX", "unit": "um", "finterval": float("inf")}
    recording = load(write(tmp_path / "b.tif", RANDOM.random((2, 4, 5)).astype("f4"), imagej=True, metadata=said))
    assert recording.steps[0] is None


def test_a_small_file_of_a_large_image_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", np.zeros((30, 1000, 1000), "u1"), compression="zlib")
    assert path.stat().st_size < 200_000
    assert told(path, max_bytes=10**6) == (
        "unpacked it takes 30.0 MB (30×1000×1000 of uint8), but --max-bytes allows 1.00 MB"
    )


# ---- other pictures ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "channels"), [((6, 7), 1), ((6, 7, 3), 3), ((6, 7, 4), 4)])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_png(tmp_path: Path, shape: tuple[int, ...], channels: int, dtype: str) -> None:
    array = RANDOM.integers(0, np.iinfo(dtype).max, shape).astype(dtype)
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(array))
    recording = load(tmp_path / "a.png")
    assert (str(recording.modes), recording.channels, recording.array.dtype) == ("h w", channels, dtype)
    np.testing.assert_array_equal(recording.array.reshape(shape), array)
    assert "--max-bytes allows 20 B" in told(tmp_path / "a.png", max_bytes=20)


def test_a_photograph_is_turned_and_its_colours_are_told(tmp_path: Path) -> None:
    picture = Image.fromarray(RANDOM.integers(0, 255, (8, 16, 3)).astype(np.uint8))
    said = Image.Exif()
    said[0x0112] = 6  # to be turned clockwise
    picture.save(tmp_path / "a.jpg", exif=said, quality=95)
    picture.save(tmp_path / "straight.jpg", quality=95)
    picture.convert("CMYK").save(tmp_path / "c.jpg")
    turned, straight = load(tmp_path / "a.jpg"), load(tmp_path / "straight.jpg")
    np.testing.assert_array_equal(turned.array, np.rot90(straight.array, -1))
    assert turned.notes == ("turned as its metadata say",) and straight.notes == ()
    assert load(tmp_path / "c.jpg").notes == ("CMYK turned into RGB",)


def test_colours_of_16_bits_are_turned(tmp_path: Path) -> None:
    array, said = RANDOM.integers(0, 2**16, (6, 9, 3)).astype(np.uint16), Image.Exif()
    said[274] = 6
    data, words = imagecodecs.png_encode(array), b"eXIf" + said.tobytes()[6:]
    chunk = struct.pack(">I", len(words) - 4) + words + struct.pack(">I", zlib.crc32(words))
    (tmp_path / "a.png").write_bytes(data[:33] + chunk + data[33:])
    recording = load(tmp_path / "a.png")
    np.testing.assert_array_equal(recording.array, np.rot90(array, -1))
    assert recording.notes == ("turned as its metadata say",)


@pytest.mark.parametrize("thin", [1, 2])
def test_a_photograph_with_a_preview_is_no_film(tmp_path: Path, thin: int) -> None:
    array = RANDOM.integers(0, 255, (8, 16, 3)).astype(np.uint8)
    Image.fromarray(array).save(
        tmp_path / "a.mpo", save_all=True, append_images=[Image.fromarray(array[::thin, ::-thin].copy())]
    )
    (tmp_path / "a.mpo").rename(tmp_path / "a.jpg")
    recording = load(tmp_path / "a.jpg")
    with Image.open(tmp_path / "a.jpg") as photograph:
        np.testing.assert_array_equal(recording.array, np.asarray(photograph))
    assert recording.notes == ("the first of its 2 pictures, of which others are previews, depths or the other eye",)


def test_what_a_picture_becomes_counts(tmp_path: Path) -> None:
    indexed = Image.fromarray(np.eye(4, 6, dtype=np.uint8))
    indexed.putpalette([0, 0, 0, 255, 0, 10])
    indexed.save(tmp_path / "a.png", transparency=0)
    assert told(tmp_path / "a.png", max_bytes=95) == (
        "unpacked it takes 96 B (1×4×6×4 of uint8), but --max-bytes allows 95 B"
    )
    assert load(tmp_path / "a.png", max_bytes=96).channels == 4
    grey = [Image.fromarray(RANDOM.integers(0, 255, (4, 6)).astype(np.uint8)) for _ in range(3)]
    grey[0].save(tmp_path / "b.png", save_all=True, append_images=grey[1:])
    assert "3×4×6×3 of uint8" in told(tmp_path / "b.png", max_bytes=215)
    assert load(tmp_path / "b.png", max_bytes=216).array.nbytes == 216


def test_palettes_and_grey(tmp_path: Path) -> None:
    indexed = Image.fromarray(np.eye(4, dtype=np.uint8))
    indexed.putpalette([0, 0, 0, 255, 0, 10])
    indexed.save(tmp_path / "a.png")
    indexed.convert("LA").save(tmp_path / "b.png")
    np.testing.assert_array_equal(load(tmp_path / "a.png").array[0, 0], [255, 0, 10])
    assert load(tmp_path / "b.png").channels == 2


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
@pytest.mark.parametrize("durations", [[100] * 4, [100, 40, 100, 100]])
def test_animated_pictures(tmp_path: Path, suffix: str, durations: list[int]) -> None:
    frames = [Image.fromarray(np.full((6, 8, 3), 60 * k, np.uint8)) for k in range(4)]
    path = tmp_path / f"a{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, lossless=True)
    recording = load(path)
    assert (str(recording.modes), recording.array.shape) == ("t h w", (4, 6, 8, 3))
    assert recording.array[:, 0, 0, 0].tolist() == [0, 60, 120, 180]
    assert recording.steps[0] == Step(sum(durations) / 4000, "s")
    assert bool(recording.notes) == (durations[1] != 100)
    assert "4×6×8" in told(path, max_bytes=500)


# ---- folders of pictures -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
def test_a_folder_of_frames_in_the_order_of_their_numbers(tmp_path: Path, suffix: str) -> None:
    for k in range(12):
        Image.fromarray(np.full((6, 8), 20 * k, np.uint8)).save(tmp_path / f"f{k}{suffix}")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".hidden.png").write_text("not a picture")
    recording = load(tmp_path)
    assert (str(recording.modes), recording.sizes) == ("t h w", (12, 6, 8))
    np.testing.assert_allclose(recording.array[:, 0, 0, 0], 20 * np.arange(12), atol=2)
    assert recording.notes == (
        f"12 pictures in the order of their names, f0{suffix} to f11{suffix}; time t is assumed",
        "1 other file of the folder left out",
    )
    assert "12×6×8" in told(tmp_path, max_bytes=500)
    Image.fromarray(np.zeros((5, 8), np.uint8)).save(tmp_path / f"f2{suffix}")
    assert told(tmp_path) == f"its pictures differ: f0{suffix} is 6×8 of uint8 and f2{suffix} is 5×8 of uint8"


@pytest.mark.parametrize(
    "names",
    [("img", "img (1)", "img (2)", "img (10)"), ("scan", "scan1", "scan2", "scan10"), ("a1", "A2", "a3", "A10")],
)
def test_names_are_ordered_as_people_order_them(tmp_path: Path, names: tuple[str, ...]) -> None:
    for value, name in enumerate(names):
        Image.fromarray(np.full((6, 8), value, np.uint8)).save(tmp_path / f"{name}.png")
    assert load(tmp_path).array[:, 0, 0, 0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(("dtype", "word"), [(bool, "bool"), (np.uint16, "uint16")])
def test_frames_of_another_type_are_not_mixed(tmp_path: Path, dtype: type, word: str) -> None:
    Image.fromarray(np.eye(6, 8, dtype=np.uint8)).save(tmp_path / "a1.png")
    Image.fromarray(np.eye(6, 8).astype(dtype)).save(tmp_path / "a2.png")
    assert told(tmp_path) == f"its pictures differ: a1.png is 6×8 of uint8 and a2.png is 6×8 of {word}"


def test_a_folder_of_nothing_and_a_stack_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("mine")
    assert told(tmp_path) == "this folder holds no DICOM file, no picture and no zarr store"
    write(tmp_path / "a.tif", np.zeros((3, 6, 7), "u1"), photometric="minisblack")
    assert told(tmp_path) == "a.tif holds more than one image; give it alone"
    assert told(tmp_path, key="1") == (
        "--key chooses one of several arrays or series, but a folder of pictures holds one"
    )


def test_a_folder_with_odd_names_or_a_broken_picture_or_none(tmp_path: Path) -> None:
    (tmp_path / "frames").mkdir()
    for name in ("a²", "a10", "a9"):
        Image.fromarray(RANDOM.integers(0, 9, (4, 6)).astype("u1")).save(tmp_path / "frames" / f"{name}.png")
    ends = load(tmp_path / "frames").notes[0]
    assert ends == "3 pictures in the order of their names, a9.png to a².png; time t is assumed"
    assert told(tmp_path) == (
        f"this folder holds no DICOM file, no picture and no zarr store; did you mean {tmp_path / 'frames'}?"
    )
    (tmp_path / "frames" / "b.png").write_bytes(b"rubbish")
    assert told(tmp_path / "frames").startswith("b.png cannot be read (cannot identify image file")
    (tmp_path / "other").mkdir()
    np.save(tmp_path / "other" / "a.npy", np.eye(3))
    assert told(tmp_path / "other") == (
        f"this folder holds no DICOM file, no picture and no zarr store; did you mean {tmp_path / 'other' / 'a.npy'}?"
    )


def test_the_still_of_an_animated_png_is_no_frame(tmp_path: Path) -> None:
    frames = [Image.fromarray(RANDOM.integers(0, 255, (4, 6, 3)).astype("u1")) for _ in range(4)]
    frames[0].save(tmp_path / "a.png", save_all=True, append_images=frames[1:], default_image=True, duration=50)
    recording = load(tmp_path / "a.png")
    np.testing.assert_array_equal(recording.array, np.stack([np.asarray(each) for each in frames[1:]]))
    assert recording.steps[0] == Step(pytest.approx(0.05), "s")
