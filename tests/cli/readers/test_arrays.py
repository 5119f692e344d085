"""Plain arrays: layouts, names, keys, and sizes that are refused before anything is unpacked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import zarr

from tensorattn.cli.readers.contents import RecordingError, Step
from tensorattn.cli.recordings import load

RANDOM = np.random.default_rng(0)


def told(path: Path, **request: Any) -> str:
    """What is said of a file that cannot be read, without its name."""
    with pytest.raises(RecordingError) as caught:
        load(path, **request)
    return str(caught.value).removeprefix(f"{path}: ")


# ---- NumPy -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [np.asfortranarray, lambda x: x[::-1, :, ::2], lambda x: x.astype(">f4")])
def test_layout_never_decides(tmp_path: Path, layout) -> None:
    array = layout(RANDOM.random((4, 5, 6)))
    np.save(tmp_path / "a.npy", array)
    np.testing.assert_array_equal(load(tmp_path / "a.npy").array[..., 0], array)


def test_a_small_archive_of_a_large_array_is_refused_unless_allowed(tmp_path: Path) -> None:
    path, array = tmp_path / "a.npz", np.zeros((400, 500))
    array[0] = 1
    np.savez_compressed(path, array)
    assert path.stat().st_size < 10_000
    assert told(path, max_bytes=10**6) == (
        "unpacked it takes 1.60 MB (400×500 of float64), but --max-bytes allows 1.00 MB"
    )
    assert load(path, max_bytes=1_600_000).sizes == (400, 500)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (b"(9, 9, 9)", "its header promises 5,832 bytes, but it holds 1,088; it is cut short"),
        (b"(99999, 99999)", "unpacked it takes 80.0 GB (99999×99999 of float64), but --max-bytes allows 512 MB"),
    ],
)
def test_a_header_that_promises_more_than_there_is(tmp_path: Path, shape: bytes, message: str) -> None:
    path = tmp_path / "a.npy"
    np.save(path, RANDOM.random((4, 5, 6)))
    old = b"(4, 5, 6), }" + b" " * 10
    path.write_bytes(path.read_bytes().replace(old, (shape + b", }").ljust(len(old))))
    assert told(path) == message


# ---- HDF5 ------------------------------------------------------------------------------------------------------


def test_hdf5_takes_the_only_array_and_its_labels(tmp_path: Path) -> None:
    array = RANDOM.integers(0, 9, (4, 2, 5))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["scan/x"], file["scan/age"], file["who"] = array, 3.0, "nobody"
        for axis, label in zip(file["scan/x"].dims, "tch", strict=True):
            axis.label = label
    recording = load(tmp_path / "a.h5")
    assert (str(recording.modes), recording.channels, recording.array.dtype) == ("t h", 2, array.dtype)
    np.testing.assert_array_equal(recording.array, np.moveaxis(array, 1, 2))


def test_hdf5_by_key(tmp_path: Path) -> None:
    path = tmp_path / "a.hdf5"
    with h5py.File(path, "w") as file:
        file["x"], file["g/y"] = np.eye(4), np.eye(3, dtype="u2")
    held = "it holds 2 arrays: g/y (3×3 uint16), x (4×4 float64)"
    assert told(path) == f"{held}; choose one with --key"
    assert told(path, key="z") == f"there is no array 'z' in it; {held}"
    assert load(path, key="/g/y").array.dtype == np.uint16


def test_hdf5_names_axes_by_their_scales_and_follows_links(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["x"], file["level"], file["hour"] = np.eye(4, 5), np.arange(4.0), np.arange(5.0)
        for axis, name in zip(file["x"].dims, ("level", "hour"), strict=True):
            file[name].make_scale(name)
            axis.attach_scale(file[name])
        file["link"] = h5py.SoftLink("/x")
    for key in (None, "x", "link"):
        assert str(load(path, key=key).modes) == "level hour"
    assert load(path, key="hour").sizes == (5,)


def test_a_large_dataset_that_was_never_written_is_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", (10_000, 10_000, 100), dtype="f4", chunks=True)
    assert told(tmp_path / "a.h5") == (
        "unpacked it takes 40.0 GB (10000×10000×100 of float32), but --max-bytes allows 512 MB"
    )


@pytest.mark.parametrize("kind", ["hdf5", "zarr"])
def test_numbers_of_netcdf_are_unpacked(tmp_path: Path, kind: str) -> None:
    packed = RANDOM.integers(0, 99, (4, 5)).astype("i2")
    packed[0, 0] = -32767
    said = {"scale_factor": 0.5, "add_offset": 273.0, "_FillValue": -32767}
    if kind == "hdf5":
        with h5py.File(tmp_path / "a.nc", "w") as file:
            file["x"], file["y"] = packed, np.where(packed < 0, 1e20, packed).astype("f4")
            file["x"].attrs.update({name: np.array([value]) for name, value in said.items()})
            file["y"].attrs.update({"missing_value": np.float32(1e20), "_FillValue": np.nan})
    else:
        group = zarr.create_group(str(tmp_path / "a.nc"), zarr_format=2)
        for name, array, words in (
            ("x", packed, said),
            ("y", np.where(packed < 0, 1e20, packed).astype("f4"), {"missing_value": 1e20, "_FillValue": "NaN"}),
        ):
            made = group.create_array(name, shape=array.shape, dtype=array.dtype)
            made[...] = array
            made.attrs.update(words)
    scaled, floats = load(tmp_path / "a.nc", key="x"), load(tmp_path / "a.nc", key="y")
    assert scaled.array.dtype == floats.array.dtype == np.float32
    np.testing.assert_array_equal(scaled.array.ravel()[1:], packed.ravel()[1:] * np.float32(0.5) + 273)
    np.testing.assert_array_equal(floats.array.ravel()[1:], packed.ravel()[1:])
    filled = "1 of 20 numbers are not finite and were filled with the mean"
    assert scaled.notes == ("numbers rescaled as its attributes say", "-32767 marks what is missing", filled)
    assert floats.notes == ("1e+20 marks what is missing", filled)
    assert "4×5 of float32" in told(tmp_path / "a.nc", key="x", max_bytes=79)
    assert told(tmp_path / "a.nc", key="x", max_bytes=79, sliced=True).endswith("and it cannot be read by slices")


# ---- zarr ------------------------------------------------------------------------------------------------------


def write_zarr(store: Any, array: np.ndarray, name: str | None = None, **settings: Any) -> None:
    made = zarr.create_array(store, name=name, shape=array.shape, dtype=array.dtype, **settings)
    made[...] = array


@pytest.mark.parametrize("version", [2, 3])
def test_zarr(tmp_path: Path, version: int) -> None:
    array, path = RANDOM.random((4, 5, 6)).astype("f4"), tmp_path / "a.zarr"
    write_zarr(str(path), array, zarr_format=version)
    recording = load(path)
    assert recording.name == "a"
    np.testing.assert_array_equal(recording.array[..., 0], array)
    assert "--max-bytes allows 100 B" in told(path, max_bytes=100)
    (tmp_path / "b").mkdir()
    assert load(path.rename(tmp_path / "b" / "plain")).sizes == (4, 5, 6)  # told by what it holds


def test_zarr_in_a_zip_with_names(tmp_path: Path) -> None:
    store = zarr.storage.ZipStore(tmp_path / "a.zarr.zip", mode="w")
    write_zarr(store, np.eye(4, 5), dimension_names=("time", "level"))
    store.close()
    assert str(load(tmp_path / "a.zarr.zip").modes) == "time level"


def test_zarr_by_key(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    group = zarr.create_group(str(path))
    for name, array in (("x", np.eye(4)), ("deep/y", np.eye(3, 2))):
        group.create_array(name, shape=array.shape, dtype=array.dtype)[...] = array
    assert (
        told(path, key="z") == "there is no array 'z' in it; it holds 2 arrays: x (4×4 float64), deep/y (3×2 float64)"
    )
    assert load(path, key="deep/y").sizes == (3, 2)


def test_zarr_leaves_out_words_and_has_no_key_for_a_single_array(tmp_path: Path) -> None:
    group = zarr.create_group(str(tmp_path / "a.zarr"), zarr_format=2)
    for name, array in (("x", np.eye(4)), ("who", np.array(["a", "b"]))):
        group.create_array(name, shape=array.shape, dtype=array.dtype)[...] = array
    assert load(tmp_path / "a.zarr").sizes == (4, 4)
    write_zarr(str(tmp_path / "b.zarr"), np.eye(4))
    assert told(tmp_path / "b.zarr", key="x") == ("there is no array 'x' in it: it is a single array, leave out --key")


def test_ome_zarr_gives_axes_spacing_and_the_finest_resolution(tmp_path: Path) -> None:
    array = RANDOM.integers(0, 9, (1, 2, 4, 5, 6)).astype("u2")
    axes = [{"name": "t", "type": "time", "unit": "second"}, {"name": "c", "type": "channel"}]
    axes += [{"name": name, "type": "space", "unit": "micrometer"} for name in "zyx"]
    scale = [{"type": "scale", "scale": [1, 1, 2, 0.5, 0.25]}]
    group = zarr.create_group(str(tmp_path / "a.zarr"), zarr_format=2)
    group.attrs["multiscales"] = [
        {"axes": axes, "datasets": [{"path": "0", "coordinateTransformations": scale}, {"path": "1"}]}
    ]
    group.create_array("0", shape=array.shape, dtype=array.dtype)[...] = array
    group.create_array("1", shape=(1, 2, 2, 2, 3), dtype="u2")
    recording = load(tmp_path / "a.zarr")
    assert (str(recording.modes), recording.channels) == ("z h w", 2)
    assert recording.steps == (Step(2, "µm"), Step(0.5, "µm"), Step(0.25, "µm"))
    assert recording.notes == ("the finest of 2 resolutions",)
    np.testing.assert_array_equal(recording.array, np.moveaxis(array[0], 0, -1))


def write_ome(
    path: Path, array: np.ndarray, axes: Sequence[str], *scales: Any, whole: Any = None, **settings: Any
) -> None:
    """Write an array as every resolution of an OME-Zarr group, each with its scale."""
    group = zarr.create_group(str(path))
    levels = []
    for number, scale in enumerate(scales):
        group.create_array(str(number), shape=array.shape, dtype=array.dtype, **settings)[...] = array
        levels.append({"path": str(number), "coordinateTransformations": [{"type": "scale", "scale": scale}]})
    named = [{"name": name, "type": "channel" if name == "c" else "space", "unit": None} for name in axes]
    scale = {"axes": named, "datasets": levels}
    if whole is not None:
        scale["coordinateTransformations"] = [{"type": "scale", "scale": whole}]
    group.attrs["ome"] = {"version": "0.5", "multiscales": [scale]}


def test_axes_that_ome_zarr_names_twice_are_ordered_once(tmp_path: Path) -> None:
    array = RANDOM.integers(0, 9, (3, 2, 4, 5)).astype("u2")
    write_ome(tmp_path / "a.zarr", array, "zcyx", [1, 1, 2, 3], dimension_names=("z", "c", "y", "x"))
    recording = load(tmp_path / "a.zarr")
    assert (str(recording.modes), recording.channels) == ("z h w", 2)
    np.testing.assert_array_equal(recording.array, np.moveaxis(array, 1, -1))
    assert recording.steps == (Step(1), Step(2), Step(3))


@pytest.mark.parametrize("axes", [["x", "x", "y"], ["x y", "1", "x"], ["c", "c", "x"], ["z", "y"]])
def test_axes_of_ome_zarr_that_are_no_names_are_left_out(tmp_path: Path, axes: list[str]) -> None:
    write_ome(tmp_path / "a.zarr", RANDOM.random((3, 4, 5)), axes, [1, 2, 3])
    recording = load(tmp_path / "a.zarr")
    assert (str(recording.modes), recording.sizes, recording.steps) == ("0 1 2", (3, 4, 5), ())


def test_scales_of_ome_zarr_follow_one_another_at_every_resolution(tmp_path: Path) -> None:
    write_ome(tmp_path / "a.zarr", RANDOM.random((3, 4, 5)), "tyx", [1, 2, 3], [1, 4, 6], whole=[0.1, 1, 1])
    assert load(tmp_path / "a.zarr").steps == (Step(0.1), Step(2), Step(3))
    coarser = load(tmp_path / "a.zarr", key="1")
    assert str(coarser.modes) == "t h w" and coarser.steps == (Step(0.1), Step(4), Step(6))
    assert coarser.notes == ("a coarser of 2 resolutions",)


@pytest.mark.parametrize("scale", [[0, -1, 2], [np.nan, np.inf, 2]])
def test_scales_that_are_none(tmp_path: Path, scale: list[float]) -> None:
    write_ome(tmp_path / "a.zarr", RANDOM.random((3, 4, 5)), "zyx", scale)
    assert load(tmp_path / "a.zarr").steps == (None, None, Step(2))
    write_ome(tmp_path / "b.zarr", RANDOM.random((3, 4, 5)), "zyx", scale[:2])
    assert load(tmp_path / "b.zarr").steps == (None, None, None)
