"""Films: turned as they are meant to be seen, all their bits, and limits of memory."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from tensorattn.cli.readers.contents import RecordingError, Step
from tensorattn.cli.recordings import load

FRAMES = np.zeros((5, 32, 48, 3), np.uint8)
FRAMES[:, :16, :24] = np.arange(40, 240, 40)[:, None, None, None]  # a corner that grows brighter
FLIPS = {  # a, b, c, d: x is shown at a x + c y, y at b x + d y
    (-1, 0, 0, 1): lambda film: film[:, :, ::-1],
    (1, 0, 0, -1): lambda film: film[:, ::-1],
    (0, 1, 1, 0): lambda film: film.swapaxes(1, 2),
    (0, -1, -1, 0): lambda film: film.swapaxes(1, 2)[:, ::-1, ::-1],
}
TURNS = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), -90: (0, -1, 1, 0)}  # clockwise, as telephones write it


def write(path: Path, codec: str = "mpeg4", form: str = "yuv420p", aspect: Fraction | None = None) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(10))
        stream.height, stream.width, stream.pix_fmt = *FRAMES.shape[1:3], form
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        for frame in FRAMES:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("suffix", [".mov", ".mkv", ".avi"])
def test_containers(tmp_path: Path, suffix: str) -> None:
    recording = load(write(tmp_path / f"a{suffix}"))
    assert recording.array.shape == FRAMES.shape and recording.steps[0].unit == "s"
    assert recording.steps[0].size == pytest.approx(0.1) and recording.notes == ()
    assert np.abs(recording.array.astype(int) - FRAMES).mean() < 5


def with_matrix(film: bytearray, matrix: tuple[int, ...]) -> bytearray:
    a, b, c, d = (65536 * each for each in matrix)  # x' = a x + c y, y' = b x + d y, with y downwards
    struct.pack_into(">9i", film, film.find(b"tkhd") + 44, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    return film


@pytest.mark.parametrize("matrix", FLIPS)
def test_a_film_is_mirrored_as_its_metadata_say(tmp_path: Path, matrix: tuple[int, ...]) -> None:
    straight = write(tmp_path / "a.mp4")
    (tmp_path / "b.mp4").write_bytes(with_matrix(bytearray(straight.read_bytes()), matrix))
    mirrored = load(tmp_path / "b.mp4")
    np.testing.assert_array_equal(mirrored.array, FLIPS[matrix](load(straight).array))
    assert mirrored.notes == ("turned and mirrored as its metadata say",)


def test_a_film_without_its_alpha_and_one_without_a_picture(tmp_path: Path) -> None:
    assert load(write(tmp_path / "a.mov", "png", "rgba")).notes == ("its alpha is left out",)
    path = write(tmp_path / "b.mkv", "libx264")
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(RecordingError) as caught:
        load(path)
    told = "cannot be read as video (its header does not say how frames are stored)"
    assert str(caught.value) == f"{path}: {told}"


@pytest.mark.parametrize("degrees", TURNS)
def test_a_film_is_turned_as_its_metadata_say(tmp_path: Path, degrees: int) -> None:
    straight = write(tmp_path / "a.mp4")
    film = bytearray(straight.read_bytes())
    (tmp_path / "turned.mp4").write_bytes(with_matrix(film, TURNS[degrees]))
    turned = load(tmp_path / "turned.mp4")
    np.testing.assert_array_equal(turned.array, np.rot90(load(straight).array, -degrees // 90, axes=(1, 2)))
    way = "anticlockwise" if degrees == -90 else "clockwise"
    assert turned.notes == (f"turned by {abs(degrees)}° {way}, as its metadata say",)


@pytest.mark.parametrize(
    ("form", "dtype", "channels", "notes"),
    [
        ("gray", "uint8", 1, ()),
        ("gray16le", "uint16", 1, ()),
        ("yuv420p10le", "uint16", 3, ("numbers of 10 bits, stretched to 16",)),
    ],
)
def test_no_bit_is_cut(tmp_path: Path, form: str, dtype: str, channels: int, notes: tuple[str, ...]) -> None:
    recording = load(write(tmp_path / "a.mkv", "ffv1", form))
    assert (recording.array.dtype, recording.channels, recording.notes) == (dtype, channels, notes)
    bright = recording.array[:, 4, 4, 0] / (257 if dtype == "uint16" else 1)
    np.testing.assert_allclose(bright, FRAMES[:, 4, 4, 0], atol=2)


def test_pixels_that_are_not_square(tmp_path: Path) -> None:
    recording = load(write(tmp_path / "a.mkv", aspect=Fraction(4, 3)))
    assert recording.steps[1] == Step(1) and recording.steps[2].size == pytest.approx(4 / 3)
    assert recording.notes == ("pixels are 1.33 times as wide as high",)


def test_a_long_film_is_refused_before_it_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.mp4")
    with pytest.raises(RecordingError) as caught:
        load(path, max_bytes=2 * FRAMES[0].nbytes)
    assert str(caught.value) == (
        f"{path}: unpacked it takes 23.0 kB (5×32×48×3 of uint8), but --max-bytes allows 9.22 kB"
    )
    assert load(path, max_bytes=FRAMES.nbytes).array.nbytes == FRAMES.nbytes
    monkeypatch.setattr("tensorattn.cli.readers.video._expected_frames", lambda *_: 1)  # as of a header that is silent
    with pytest.raises(RecordingError, match=r"4×32×48×3"):
        load(path, max_bytes=3 * FRAMES[0].nbytes)


def test_a_film_that_is_cut_short_or_damaged_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(10))
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
        for frame in np.random.default_rng(0).integers(0, 255, (20, 64, 64, 3)).astype(np.uint8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    assert load(path).notes == ()
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    recording = load(path)
    assert recording.notes == (f"{recording.sizes[0]} of the 20 frames that its header promises could be read",)
