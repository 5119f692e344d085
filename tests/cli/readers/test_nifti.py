"""Volumes of nibabel: scaled numbers, spacing, directions, and formats beside NIfTI."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import nibabel
import numpy as np
import pytest

from tensorattn.cli.readers.contents import RecordingError, Step
from tensorattn.cli.recordings import load

DATA = Path(str(files("nibabel") / "tests" / "data"))
ARRAY = np.random.default_rng(0).integers(0, 1000, (4, 5, 6)).astype(np.int16)


def test_steps_and_directions_come_from_the_header(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(ARRAY, np.diag([-1.0, 2.0, 5.0, 1.0]))
    image.header.set_xyzt_units("mm", "sec")
    nibabel.save(image, tmp_path / "a.nii")
    recording = load(tmp_path / "a.nii")
    assert recording.steps == (Step(1, "mm"), Step(2, "mm"), Step(5, "mm"))
    assert recording.notes == ("axes in the order of the file: x towards left, y towards anterior, z towards superior",)


@pytest.mark.parametrize("code", [4, 7, 56, 255])
def test_a_code_of_units_without_a_meaning_is_not_stated(tmp_path: Path, code: int) -> None:
    nibabel.save(nibabel.Nifti1Image(np.stack([ARRAY, ARRAY], -1), np.eye(4)), tmp_path / "a.nii")
    data = bytearray((tmp_path / "a.nii").read_bytes())
    data[123] = code
    (tmp_path / "a.nii").write_bytes(data)
    recording = load(tmp_path / "a.nii")
    assert recording.notes[0] == "the unit of its voxels is not stated, mm is assumed"
    assert recording.steps == (*(Step(1, "mm"),) * 3, Step(1))


@pytest.mark.parametrize("zoom", [np.nan, np.inf])
def test_voxels_of_no_size(tmp_path: Path, zoom: float) -> None:
    image = nibabel.Nifti1Image(ARRAY, None)
    image.header["pixdim"][1] = zoom
    nibabel.save(image, tmp_path / "a.nii")
    assert load(tmp_path / "a.nii").steps == (None, Step(1, "mm"), Step(1, "mm"))


def test_units_that_are_not_stated_are_told(tmp_path: Path) -> None:
    nibabel.save(nibabel.Nifti1Image(np.stack([ARRAY, ARRAY], -1), np.eye(4)), tmp_path / "a.nii")
    recording = load(tmp_path / "a.nii")
    assert recording.notes[:2] == (
        "the unit of its voxels is not stated, mm is assumed",
        "its fourth axis is not named, time t is assumed",
    )


@pytest.mark.parametrize(("dtype", "read"), [(np.int16, np.float32), (np.int32, np.float64)])
def test_slope_and_intercept(tmp_path: Path, dtype: type, read: type) -> None:
    image = nibabel.Nifti1Image(ARRAY.astype(dtype), np.eye(4))
    image.header.set_slope_inter(0.25, -7)
    nibabel.save(image, tmp_path / "a.nii.gz")
    stored = nibabel.Nifti1Image.from_filename(tmp_path / "a.nii.gz")
    recording = load(tmp_path / "a.nii.gz")
    assert recording.array.dtype == read and "numbers scaled by slope and intercept of the header" in recording.notes
    np.testing.assert_allclose(recording.array[..., 0], stored.get_fdata(), rtol=1e-6)
    with pytest.raises(RecordingError, match="unpacked it takes "):
        load(tmp_path / "a.nii.gz", max_bytes=ARRAY.size * 2)


def test_mgh_and_analyze(tmp_path: Path) -> None:
    nibabel.save(nibabel.MGHImage(ARRAY.astype(np.int32), np.diag([3.0, 1, 1, 1])), tmp_path / "a.mgz")
    nibabel.save(nibabel.AnalyzeImage(ARRAY, np.diag([1, 1, 2.5, 1])), tmp_path / "b.img")
    mgh, analyze, header = (load(tmp_path / name) for name in ("a.mgz", "b.img", "b.hdr"))
    for recording in (mgh, analyze, header):
        assert (str(recording.modes), recording.sizes) == ("x y z", (4, 5, 6))
        np.testing.assert_array_equal(recording.array[..., 0], ARRAY)
    assert mgh.steps[0] == Step(3, "mm") and analyze.steps[2] == Step(2.5, "mm")
    assert mgh.array.dtype == ">i4" and analyze.array.dtype.kind == "i"


def test_real_volumes() -> None:
    brain, functional = load(DATA / "anatomical.nii"), load(DATA / "functional.nii")
    assert brain.steps == (Step(2, "mm"),) * 3 and brain.array.min() < 0
    assert (str(functional.modes), functional.sizes) == ("x y z t", (17, 21, 3, 20))
    assert load(DATA / "test.mgz").steps[3] == Step(2, "ms")


def test_surfaces_are_refused() -> None:
    with pytest.raises(RecordingError, match=r"it holds numbers on a surface \(CIFTI\), not over a grid$"):
        load(DATA / "row_major.dconn.nii")


def test_directions_that_are_not_stated_are_told(tmp_path: Path) -> None:
    nibabel.save(nibabel.Nifti1Image(ARRAY, None), tmp_path / "a.nii")
    nibabel.save(nibabel.AnalyzeImage(ARRAY, np.eye(4)), tmp_path / "b.img")
    nibabel.save(nibabel.Spm99AnalyzeImage(ARRAY, np.eye(4)), tmp_path / "c.img")  # writes c.mat beside it
    nibabel.save(nibabel.MGHImage(ARRAY, np.eye(4)), tmp_path / "d.mgz")
    ends = [load(tmp_path / name).notes[-1].endswith(" (assumed, it does not say)") for name in ("a.nii", "b.img")]
    assert ends == [True, True]
    assert not any("assumed" in load(tmp_path / name).notes[-1] for name in ("c.img", "d.mgz"))


def test_a_pair_of_compressed_files(tmp_path: Path) -> None:
    nibabel.save(nibabel.Nifti1Pair(ARRAY, np.eye(4)), tmp_path / "a.img.gz")
    for suffix in (".img.gz", ".hdr.gz"):
        np.testing.assert_array_equal(load(tmp_path / f"a{suffix}").array[..., 0], ARRAY)


def test_what_a_package_logs_is_told_and_what_is_of_its_code_is_not(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(ARRAY, None)
    image.header["pixdim"][1:4] = 0
    nibabel.save(image, tmp_path / "a.nii")
    assert load(tmp_path / "a.nii").notes[0] == ("while reading: pixdim[1,2,3] should be non-zero; setting 0 dims to 1")
    nibabel.save(nibabel.MGHImage(ARRAY, np.eye(4)), tmp_path / "a.mgh")  # which nibabel leaves open
    assert [note for note in load(tmp_path / "a.mgh").notes if "while reading" in note] == []
