"""A recording that does not fit: what is written chunk by chunk is what the whole gives, and the rest is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest
import torch
import zarr

from tensorattn import blockwise
from tensorattn.cli.common import parse_choices
from tensorattn.cli.embedding import embed
from tensorattn.cli.main import main
from tensorattn.cli.readers.contents import Slices
from tensorattn.cli.recordings import load, parse_modes

PROGRAM = "python -m tensorattn attend"
SMALL = ("--dim", "8", "--heads", "2", "--patch", "2,2,2", "--memory", "30k")
OPERATORS = ("additive:interaction=linear", "truncated", "kao_kv", "kao_qkv:centered=True", "clustered:cells=blocks")


def numbers(*shape):
    return np.random.default_rng(0).integers(0, 900, shape).astype(np.int16)


def attend(*words):
    return main(["attend", *map(str, words)])


def write_npy(path):
    np.save(path, numbers(9, 10, 12, 3))


def write_npy_of_fortran(path):
    np.save(path, np.asfortranarray(numbers(9, 10, 12, 3)))


def write_hdf5(path):
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=numbers(3, 9, 10, 12), chunks=True)
        for axis, name in enumerate(("c", "t", "h", "w")):
            file["x"].dims[axis].label = name


def write_zarr(path):
    root = zarr.open_group(path, mode="w")
    root.create_array("0", data=numbers(1, 3, 9, 10, 12))
    axes = [{"name": name, "type": "channel" if name == "c" else "space"} for name in "tczyx"]
    root.attrs["multiscales"] = [{"axes": axes, "datasets": [{"path": "0"}]}]


def write_nifti(path):
    image = nibabel.Nifti1Image(numbers(9, 16, 17), np.eye(4))
    image.header.set_slope_inter(0.5, 3)
    nibabel.save(image, path)


FILES = {
    "a.npy": (write_npy, "t h w"),
    "f.npy": (write_npy_of_fortran, "t h w"),
    "a.h5": (write_hdf5, None),
    "a.zarr": (write_zarr, None),
    "a.nii": (write_nifti, None),
}


def of_whole(path, modes, operator):
    """What an operator gives for the whole recording ``(g_1, …, g_N, channels of all heads)``."""
    array = load(path, modes=None if modes is None else parse_modes(modes)).array
    tokens = embed(array, (2, 2, 2), dim=8, heads=2, logit_std=1.0, seed=0)
    (choice,) = parse_choices([operator])
    found = choice.record.function(*tokens[:3], order=3, scale=tokens.scale, **choice.options)
    return found.movedim(0, -2).flatten(-2).numpy(), tokens.scale


@pytest.mark.parametrize("name", FILES)
def test_chunks_of_a_file_give_what_the_whole_gives(name, tmp_path, capsys):
    write, modes = FILES[name]
    write(tmp_path / name)
    spoken = () if modes is None else ("--modes", modes)
    assert attend(tmp_path / name, *spoken, *SMALL, "--json", "--out", tmp_path / "out") == 0
    told = json.loads(capsys.readouterr().out)
    whole, scale = of_whole(tmp_path / name, modes, "additive")
    assert told["chunks"] > 4 and told["scale"] == pytest.approx(scale, rel=1e-5)
    (operator,) = told["operators"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a-additive.npy".replace("a", name[0], 1)]
    np.testing.assert_allclose(np.load(operator["file"]), whole, rtol=1e-3, atol=1e-4)


def test_operators_and_the_report(tmp_path, capsys):
    write_npy(tmp_path / "a.npy")
    operators = [word for each in OPERATORS for word in ("--operator", each)]
    assert attend(tmp_path / "a.npy", "--modes", "t h w", *SMALL, *operators, "--out", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    for each in OPERATORS:
        (line,) = [line for line in printed.splitlines() if line.startswith(f"{each}: ")]
        output = np.load(line.rpartition(" into ")[2])
        np.testing.assert_allclose(output, of_whole(tmp_path / "a.npy", "t h w", each)[0], rtol=1e-3, atol=1e-4)
    assert "it and its tokens take 30.5 kB at once, but --memory allows 30.0 kB: " in printed
    assert "patches 2×2×2: 5×5×6 = 150 positions" in printed and "the figures are left out" in printed
    assert "Peak extra memory " in printed


def test_what_fits_has_its_table(tmp_path, capsys):
    np.save(tmp_path / "a.npy", numbers(6, 8))
    assert attend(tmp_path / "a.npy", "--memory", "1M", "--operator", "flattened", "--out", tmp_path / "out") == 0
    assert "centred error" in capsys.readouterr().out and (tmp_path / "out" / "a-maps.png").exists()


def test_what_was_stopped_goes_on(tmp_path, monkeypatch, capsys):
    write_npy(tmp_path / "a.npy")
    call = (tmp_path / "a.npy", "--modes", "t h w", *SMALL, "--out", tmp_path / "out")
    monkeypatch.setattr(blockwise, "SECONDS", 0)
    write, written = blockwise._Files.write, []

    def fails(self, box, y):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(box)
        write(self, box, y)

    monkeypatch.setattr(blockwise._Files, "write", fails)
    with pytest.raises(KeyboardInterrupt):
        attend(*call)
    names = {"a-additive.npy", "a-additive.npy.incomplete", "a-additive.npy.state"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    monkeypatch.setattr(blockwise._Files, "write", lambda self, box, y: (written.append(box), write(self, box, y)))
    assert attend(*call) == 0
    assert len(written) == len(set(written)) > 4
    whole = of_whole(tmp_path / "a.npy", "t h w", "additive")[0]
    np.testing.assert_allclose(np.load(tmp_path / "out" / "a-additive.npy"), whole, rtol=1e-3, atol=1e-4)


def refusals(folder):
    """Calls that are refused: words, and the message."""
    np.save(folder / "a.npy", numbers(9, 10, 12, 3))
    np.savez(folder / "a.npz", numbers(9, 10, 12, 3))
    write_nifti(folder / "a.nii.gz")
    gap = numbers(9, 10, 12, 3).astype(np.float32)
    gap[4, 4, 4] = np.nan
    np.save(folder / "gap.npy", gap)
    np.save(folder / "still.npy", np.zeros((9, 10, 12, 3), np.int16))
    np.save(folder / "complex.npy", np.zeros((9, 10, 12, 3), np.complex64))
    npy = (folder / "a.npy", "--modes", "t h w", *SMALL)
    return {
        "no file": (("--memory", "30k"), "--memory needs a FILE: the packaged recordings are small."),
        "npz": (
            (folder / "a.npz", "--modes", "t h w", "--memory", "5k"),
            f"{folder / 'a.npz'}: unpacked it takes 6.48 kB (9×10×12×3 of int16), but --memory allows 5.00 kB, "
            "and it cannot be read by slices",
        ),
        "tokens of npz": (
            (folder / "a.npz", "--modes", "t h w", *SMALL),
            f"{folder / 'a.npz'}: it and its tokens take 30.5 kB, but --memory allows 30.0 kB, and it cannot be read "
            "by slices.",
        ),
        "packed": (
            (folder / "a.nii.gz", "--memory", "1k"),
            f"{folder / 'a.nii.gz'}: unpacked it takes 9.79 kB (9×16×17 of float32), but --memory allows 1.00 kB, "
            "and it cannot be read by slices",
        ),
        "flattened": (
            (*npy, "--operator", "flattened"),
            "--memory 'flattened' has no meaning for operator 'flattened': it needs all positions at once.",
        ),
        "html": ((*npy, "--html"), "--html needs all of 30.5 kB at once, but --memory allows 30.0 kB."),
        "query": ((*npy, "--query", "1,1,1"), "--query needs all of 30.5 kB at once, but --memory allows 30.0 kB."),
        "too little": (
            (*npy[:-1], "2k"),
            "--memory allows 2.00 kB, but a single patch takes 11.2 kB to work on.",
        ),
        "gap": (
            (folder / "gap.npy", *npy[1:]),
            f"{folder / 'gap.npy'}: a number in it is not finite or larger than 1e+100; gaps are filled only where "
            "--memory holds the whole",
        ),
        "constant": (
            (folder / "still.npy", *npy[1:]),
            "every patch is the same to double precision, there is nothing to attend to",
        ),
        "complex": (
            (folder / "complex.npy", *npy[1:]),
            f"{folder / 'complex.npy'}: its numbers must be real, but its type is complex64",
        ),
    }


def test_refusals(tmp_path, capsys):
    for words, message in refusals(tmp_path).values():
        assert attend(*words, "--out", tmp_path / "out") == 2
        assert capsys.readouterr().err == f"{PROGRAM}: {message}\n"
        assert not (tmp_path / "out").exists()


def test_a_part_that_cannot_be_read_is_told(tmp_path, capsys):
    write_nifti(tmp_path / "a.nii")
    (tmp_path / "a.nii").write_bytes((tmp_path / "a.nii").read_bytes()[:-2000])
    write_zarr(tmp_path / "a.zarr")
    (tmp_path / "a.zarr" / "0" / "c" / "0" / "0" / "0" / "0" / "0").write_bytes(b"rubbish")
    for name in ("a.nii", "a.zarr"):
        assert attend(tmp_path / name, *SMALL, "--out", tmp_path / "out") == 2
        told = capsys.readouterr().err
        assert told.startswith(f"{PROGRAM}: {tmp_path / name}: a part cannot be read (") and told.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written_is_told(tmp_path, capsys):
    write_npy(tmp_path / "a.npy")
    (tmp_path / "out" / "a-additive.npy").mkdir(parents=True)
    for out, why in ((tmp_path / "out", "Is a directory"), (tmp_path / ("b" * 300), "File name too long")):
        assert attend(tmp_path / "a.npy", "--modes", "t h w", *SMALL, "--out", out) == 2
        assert capsys.readouterr().err == f"{PROGRAM}: --out {out}: {why}\n"


def test_slices_are_those_of_the_array():
    array = np.arange(2 * 3 * 4 * 1).reshape(2, 3, 1, 4)
    sliced = Slices(array).squeeze((2,)).transpose(2, 0, 1).with_channel()
    told = array[:, :, 0].transpose(2, 0, 1)[..., None]
    assert (sliced.shape, sliced.ndim, sliced.size) == (told.shape, 4, 24)
    cut = (slice(1, 3), slice(0, 1), slice(1, 3), slice(0, 1))
    np.testing.assert_array_equal(sliced[cut], told[cut])


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is that of Linux")
def test_memory_is_kept(tmp_path):
    if shutil.disk_usage(tmp_path).free < 3 << 30:
        pytest.skip("the disk has too little space")
    file = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, (48, 256, 256, 64))  # 805 MB
    for at, frame in enumerate(file):
        frame[:] = np.random.default_rng(at).standard_normal(frame.shape, dtype=np.float32)
    words = [str(tmp_path / "x.npy"), "--modes", "t h w", "--memory", "200M", "--json", "--out", str(tmp_path / "out")]
    run = subprocess.run([sys.executable, "-m", "tensorattn", "attend", *words], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout)
    (operator,) = told["operators"]
    print(told)
    assert told["peak_bytes"] - Path(operator["file"]).stat().st_size < 200e6
    assert torch.isfinite(torch.from_numpy(np.load(operator["file"]))).all()
    assert not Path(f"{operator['file']}.incomplete").exists()
