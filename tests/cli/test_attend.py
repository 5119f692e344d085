"""The command `attend`: what it prints and writes for every kind of file, and what it tells where it cannot."""

from __future__ import annotations

import json
import os
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import nibabel
import numpy as np
import pydicom
import pytest
import torch
import zarr
from PIL import Image

import tensorattn as ta
from tensorattn.cli.attend import HEADINGS, _Row, _ruled, default_choices, examine, means_of_cells, prepare
from tensorattn.cli.common import parse_choices
from tensorattn.cli.main import main
from tensorattn.cli.readers.contents import Step
from tensorattn.cli.recordings import FileArray, make_recording
from tensorattn.cli.view import draw
from tensorattn.diagnose import ErrorEstimate
from tensorattn.errors import OptionError

FIGURES = ("input", "weights", "maps")
PROGRAM = "python -m tensorattn attend"
SMALL = ("--dim", "8", "--heads", "2")


def numbers(*shape: int) -> np.ndarray:
    """Noise on a gradient, as bytes."""
    ramp = sum(np.ix_(*(np.linspace(0, 90, size) for size in shape)))
    return (ramp / len(shape) + np.random.default_rng(0).integers(0, 90, shape)).astype(np.uint8)


def attend(*words: str | Path) -> int:
    return main(["attend", *map(str, words)])


def table_of(printed: str) -> dict[str, list[str]]:
    """The rows of the printed table, the name apart from the other columns."""
    lines = printed.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("---"))
    end = next(i for i, line in enumerate(lines) if line.startswith("centred error: "))
    rows = [[cell.strip() for cell in line.split("   ") if cell.strip()] for line in lines[start + 1 : end]]
    return {row[0]: row[1:] for row in rows}


def report_of(array: np.ndarray, operators: list[str], *, budget: float = 60.0, **settings: Any) -> str:
    """The report on an array with channels last, without drawing its figures."""
    recording = make_recording(FileArray(array, channels=True), name="a", source="a.npy")
    job = prepare(recording, parse_choices(operators), lenient=False, dim=8, heads=2, **settings)
    report = examine(job, lambda work: None, budget=budget)
    assert list(draw(report.view)) == [f"a-{figure}.png" for figure in FIGURES]
    return report.text()


def check_written(directory: Path, name: str, printed: str) -> None:
    """What was written is a report, three pictures, and nothing else; all of it is announced."""
    expected = {f"{name}-{figure}.png" for figure in FIGURES} | {"report.txt"}
    assert {path.name for path in directory.iterdir()} == expected
    for path in directory.iterdir():
        assert str(path) in printed
        if path.suffix == ".png":
            with Image.open(path) as picture:
                picture.verify()
    assert printed.startswith((directory / "report.txt").read_text())


# ---- files of every kind -------------------------------------------------------------------------------------


def write_npy(path: Path) -> tuple[str, ...]:
    np.save(path, numbers(6, 7, 3))
    return ("--modes", "h w")


def write_npz(path: Path) -> tuple[str, ...]:
    np.savez(path, mask=np.ones((2, 2)), image=numbers(6, 7).astype(">f8"))
    return ("--key", "image")


def write_nifti(path: Path) -> tuple[str, ...]:
    nibabel.save(nibabel.Nifti1Image(numbers(6, 7, 5).astype(np.int16), np.eye(4)), path)
    return ("--patch", "2")


def write_tiff(path: Path) -> tuple[str, ...]:
    pages = [Image.fromarray(page) for page in numbers(3, 6, 7, 4)]
    pages[0].save(path, save_all=True, append_images=pages[1:])
    return ()


def write_dicom(path: Path) -> tuple[str, ...]:
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    data = pydicom.Dataset()
    data.file_meta = meta
    data.NumberOfFrames, data.Rows, data.Columns = 4, 6, 8
    data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, "MONOCHROME2", 0
    data.BitsAllocated = data.BitsStored = 8
    data.HighBit = 7
    data.PixelData = numbers(4, 6, 8).tobytes()
    data.save_as(path, enforce_file_format=True)
    return ("--query", "3,0,7")


def write_film(path: Path) -> tuple[str, ...]:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(10))
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        for frame in numbers(3, 32, 48, 3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode(None))
    return ("--patch", "1,8,8")


@pytest.mark.parametrize(
    ("suffix", "write"),
    [
        (".npz", write_npz),
        *(
            pytest.param(suffix, write, marks=pytest.mark.thorough)
            for suffix, write in (
                (".npy", write_npy),
                (".nii", write_nifti),
                (".nii.gz", write_nifti),
                (".tif", write_tiff),
                (".dcm", write_dicom),
                (".mp4", write_film),
                (".avi", write_film),
            )
        ),
    ],
)
def test_every_kind_of_file(tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str, write) -> None:
    path, out = tmp_path / f"a scan{suffix}", tmp_path / "deep" / "out"
    words = write(path)
    assert attend(path, *words, *SMALL, "--out", out) == 0
    printed = capsys.readouterr().out
    check_written(out, "a-scan", printed)
    rows = table_of(printed)
    for choice in default_choices():
        assert choice.label in rows or f"{choice.label} left out: " in printed
    assert rows["flattened"][-1] == "0" or float(rows["flattened"][-1]) < 1e-4
    assert rows["mean of the values"][-1] == "1.000"


@pytest.mark.thorough
def test_the_packaged_recordings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert attend("--patch", "6,16,12", *SMALL, "--out", tmp_path) == 0
    printed = capsys.readouterr().out
    assert "t=30 h=240 w=320, 3 channels, uint8" in printed and "x=128 y=96 z=24, 1 channel, int16" in printed
    assert "patches 6×16×12: 5×15×27 = 2,025 positions, 47 mode averages" in printed
    assert "padded with its last entries: w from 320 to 324" in printed
    assert {path.name for path in tmp_path.iterdir()} == {
        *(f"{name}-{figure}.png" for name in ("echocardiogram", "brain") for figure in FIGURES),
        "report.txt",
    }


@pytest.mark.thorough
def test_gaps_and_series_and_six_modes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    series = numbers(50).astype(float)
    series[[3, 7]] = np.nan
    for name, array in (("series", series), ("six", numbers(3, 2, 3, 2, 1, 2))):
        np.save(tmp_path / f"{name}.npy", array)
        assert attend(tmp_path / f"{name}.npy", *SMALL, "--out", tmp_path / name) == 0
        printed = capsys.readouterr().out
        check_written(tmp_path / name, name, printed)
        assert ("2 of 50 numbers are not finite and were filled with the mean" in printed) == (name == "series")


def test_chosen_operators_run_alone() -> None:
    report = report_of(numbers(6, 7, 1), ["kao_kv", "kao_qkv:centered=True", " kao_kv "])
    assert list(table_of(report)) == [
        *("kao_kv", "kao_qkv:centered=True", "13 random keys"),
        *("42 blocks without moments", "42 k-means tokens with log counts", "mean of the values"),
    ]
    assert "Full attention over all 42 queries would have needed " in report


def test_tokens_may_be_as_many_as_there_are_averages_and_rho_is_shown() -> None:
    report = report_of(numbers(12, 13, 1), ["clustered:tokens=S", "clustered:tokens=25", "clustered:cells=blocks"])
    rows = table_of(report)
    assert rows["clustered:tokens=S"][-2:] == rows["clustered:tokens=25"][-2:]
    assert 0 < float(rows["clustered:tokens=S"][-2]) < float(rows["clustered:cells=blocks"][-2]) < 1
    assert rows["25 random keys"][-2] == "-"


def test_cells_without_moments_are_exact_where_keys_in_cells_are_equal() -> None:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(2, 2, 8, 8, 8, generator=generator)  # keys and values of 8×8 blocks
    key, value = coarse.repeat_interleave(2, dim=2).repeat_interleave(3, dim=3).unbind(0)
    query = torch.randn(2, 16, 24, 8, generator=generator)
    exact = ta.flattened_attention(query, key, value, order=2)
    for name, function in means_of_cells((16, 24)).items():
        torch.testing.assert_close(function(query, key, value, order=2), exact, msg=name)


def test_an_operator_that_is_too_slow_is_estimated() -> None:
    report = report_of(numbers(6, 7, 1), list(ta.OPERATORS), budget=0)
    rows = table_of(report)
    for name in ta.OPERATORS:
        assert rows[name][1].startswith("about ") and rows[name][2] == "not run *"
    assert rows["axial"][-1] == rows["clustered"][-1] == "-"  # they take whole grids, or all queries, only
    assert rows["flattened"][-1] == "0"
    words = " ".join(report.split())
    assert "Full attention over all 42 queries would have needed " in words
    assert "14.1 kB in all, in an implementation that stores them." in words  # 2 heads, 42² weights of 4 bytes
    assert "* Not run over the whole grid, it would take more than 0 s: additive, " in words


def test_seed_and_sharpness_decide_the_errors() -> None:
    errors, scales = [], []
    for seed, width in ((1, 1.0), (1, 1.0), (2, 1.0), (1, 4.0)):
        report = report_of(numbers(16, 17, 1), ["additive"], seed=seed, logit_std=width)
        errors.append(table_of(report)["additive"][-1])
        scales.append(float(report.split("(scale ")[1].split(")")[0]))
    assert errors[0] == errors[1] and len(set(errors)) == 3
    assert scales[3] == pytest.approx(4 * scales[0], rel=0.01)


@pytest.mark.parametrize("width", [1e4, pytest.param(1e6, marks=pytest.mark.thorough)])
def test_attention_to_one_key_alone_is_measured_and_drawn(width: float) -> None:
    report = report_of(numbers(6, 7, 5), [choice.label for choice in default_choices()], logit_std=width)
    assert "nan" not in report and "not a number" not in report


def test_operations_are_counted_as_the_formulas_say() -> None:
    recording = make_recording(FileArray(numbers(20, 30)), name="a", source="a.npy")
    job = prepare(recording, default_choices(), dim=64, heads=4)
    flops = {choice.label: count for choice, count in job.flops.items()}
    positions, averages, heads, dim = 600, 50, 4, 16
    for name, tokens in (("flattened", positions), ("kao_kv", averages), ("additive", averages), ("axial", averages)):
        products = 4 * positions * tokens * dim * heads
        assert products <= flops[name] <= 1.4 * products, name
    assert flops["kao_qkv"] < flops["kao_kv"] / 5


def test_an_operator_without_a_meaning_is_left_out_of_the_default_ones() -> None:
    recording = make_recording(FileArray(numbers(9)), name="a", source="a.npy")
    job = prepare(recording, parse_choices(["truncated:interaction_order=2", "additive"]))
    assert [choice.label for choice in job.flops] == ["additive"]
    assert job.notes == (
        "truncated:interaction_order=2 left out: interaction_order must be an integer between 1 and order 1, got 2.",
    )


def test_the_words_of_a_row() -> None:
    estimate = ErrorEstimate(3.2e-7, 1e-8, 64)
    row = _Row("additive", 1200, 8.04, None, estimate)
    assert row.cells() == ("additive", "1.20 k", "8.04 s", "n/a", "-", "3e-07")
    row = _Row("additive", 10**9, 0.25, 147_000_000, ErrorEstimate(0.5731, 0.0124, 64, 0.25))
    assert _ruled([HEADINGS, row.cells()]) == [
        "operator    FLOPs   CPU time   peak extra memory     rho   centred error",
        "------------------------------------------------------------------------",
        "additive   1.00 G   250.0 ms              147 MB   0.250   0.573 ± 0.012",
    ]
    rows = [_Row("a", 0, 0.0, 0, ErrorEstimate(error, 0.0001, 9), ran=False) for error in (0.0, 0.25, float("nan"))]
    assert [row.cells()[-1] for row in rows] == ["0", "0.250", "not a number"]


def test_json_is_the_report_in_numbers_and_html_is_written_beside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "a.nii", tmp_path / "out"
    write_nifti(path)
    words = ("--patch", "2", *SMALL, "--operator", "clustered:tokens=S", "--operator", "axial", "--json", "--html")
    assert attend(path, *words, "--out", out) == 0
    found = json.loads(capsys.readouterr().out)
    assert sorted(found["files"]) == sorted(str(each) for each in out.iterdir())
    assert {Path(each).name for each in found["files"]} >= {"report.html", "report.txt"}
    (recording,) = found["recordings"]
    assert recording["modes"][0] == {"name": "x", "size": 6, "patch": 2, "step": 1.0, "unit": "mm"}
    counts = [recording[name] for name in ("positions", "averages", "heads", "dim", "seed", "channels")]
    assert counts == [3 * 4 * 3, 3 + 4 + 3, 2, 8, 0, 1] and recording["dtype"] == "int16"
    assert recording["query"] == [2, 4, 2] and "mm is assumed" in recording["notes"][0]
    rows = {row["name"]: row for row in recording["operators"]}
    printed = table_of((out / "report.txt").read_text())
    assert list(rows) == list(printed)
    for name, row in rows.items():
        assert row["flops"] > 0 and row["seconds"] > 0 and row["ran"] is True
        assert row["centred_error"] < 5e-4 or f"{row['centred_error']:.3f}" in printed[name][-1]
    assert rows["clustered:tokens=S"]["rho"] > 0 and rows["axial"]["rho"] is None


def test_nothing_is_written_where_the_second_recording_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules["tensorattn.cli.attend"]
    small = [make_recording(FileArray(numbers(6, 7)), name=name, source=name) for name in "ab"]
    monkeypatch.setattr(module, "PACKAGED", [(lambda each=each: each, "2", "0,0") for each in small])

    def fails_on_b(job: Any, step: Any) -> Any:
        if job.recording.name == "b":
            raise OptionError("it fails.")
        return examine(job, step)

    words = (*SMALL, "--operator", "additive", "--html", "--out", tmp_path / "out")
    monkeypatch.setattr(module, "examine", fails_on_b)
    assert attend(*words) == 2 and not (tmp_path / "out").exists()
    assert capsys.readouterr().err.endswith(f"{PROGRAM}: it fails.\n")
    monkeypatch.setattr(module, "examine", examine)
    assert attend(*words) == 0 and len([*(tmp_path / "out").iterdir()]) == 8


def test_clustered_stands_in_front() -> None:
    labels = [choice.label for choice in default_choices()]
    assert labels[0] == "clustered" and set(ta.OPERATORS) <= set(labels)
    assert next(iter(table_of(report_of(numbers(6, 7, 2), labels[:3])))) == "clustered"


def test_steps_of_the_file_are_told() -> None:
    contents = FileArray(numbers(5, 6, 7), ("t", "h", "w"), steps=(Step(0.04, "s"), Step(1.0), None))
    recording = make_recording(contents, name="a", source="a.mp4")
    report = examine(prepare(recording, parse_choices(["additive"]), dim=8, heads=2), lambda work: None).text()
    assert "\n  steps, as the file says: t 0.04 s\n" in report


# ---- what cannot be done -------------------------------------------------------------------------------------


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    path = tmp_path / "a.npy"
    np.save(path, numbers(6, 7, 4))
    return path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--modes", "t h h"), "mode names must differ, but 'h' appears 2 times in 't h h'."),
        (("--modes", "t,h"), "mode names must be words of letters, digits and underscores, got 't,h'."),
        (("--modes", ""), "modes must name at least one mode, got ''."),
        (
            ("--modes", "t"),
            "{path}: --modes gives 1 modes (t), but the array (6, 7, 4) has 3 dimensions; "
            "they must be 1, or 2 with channels last",
        ),
        (("--operator", "nonsense"), f"--operator 'nonsense' is not one of: {', '.join(ta.OPERATORS)}."),
        (("--operator", ""), f"--operator '' is not one of: {', '.join(ta.OPERATORS)}."),
        (
            ("--operator", "kao_qkv:sharp=1"),
            "--operator 'kao_qkv:sharp=1': operator 'kao_qkv' has no option 'sharp'; its options are: "
            f"{', '.join(ta.OPERATORS['kao_qkv'].options)}.",
        ),
        (
            ("--operator", "kao_qkv:centered"),
            "--operator 'kao_qkv:centered': an option is written name=value, got 'centered'.",
        ),
        (
            ("--operator", "additive:saturation=x"),
            "--operator 'additive:saturation=x': saturation must be positive or None, got 'x'.",
        ),
        (
            ("--operator", "truncated:kept=5"),
            "--operator 'truncated:kept=5': kept must hold subsets of modes, got 5.",
        ),
        (
            ("--operator", "truncated:kept=(0,5)"),
            "--operator 'truncated:kept=(0,5)': each subset in kept must be a sequence of modes, got 0.",
        ),
        (
            ("--operator", "truncated:interaction_order=9"),
            "--operator 'truncated:interaction_order=9': "
            "interaction_order must be an integer between 1 and order 3, got 9.",
        ),
        (
            ("--operator", "kao_qkv:centered=maybe"),
            "--operator 'kao_qkv:centered=maybe': centered must be True or False, got 'maybe'.",
        ),
        (
            ("--operator", "kao_qkv:interaction=linear"),
            "--operator 'kao_qkv:interaction=linear': "
            "interaction needs centered=True: the published form has no first order to correct.",
        ),
        (
            ("--dim", "1", "--heads", "1"),
            "--dim must be at least 2, got 1: a patch of a single channel is layer-normalised to zero.",
        ),
        (
            ("--patch", "100"),
            "--patch '100' leaves a single patch, there is nothing to attend to: 0=6 1=7 2=4, 1 channel, uint8.",
        ),
        (("--heads", "5"), "--heads must divide --dim, but 5 do not divide 64."),
        (("--patch", "2,2"), "--patch has 2 numbers, but there are 3 modes: '2,2'."),
        (("--patch", "0"), "--patch must be positive whole numbers, one or one a mode, got '0'."),
        (("--patch", "2.5"), "--patch must be positive whole numbers, one or one a mode, got '2.5'."),
        (("--patch", "²"), "--patch must be positive whole numbers, one or one a mode, got '²'."),
        (("--patch", ""), "--patch must be positive whole numbers, one or one a mode, got ''."),
        (("--patch", "9" * 5000), f"--patch must be positive whole numbers, one or one a mode, got '{'9' * 5000}'."),
        (("--query", "1,2"), "--query must be 3 whole numbers, one index a mode, got '1,2'."),
        (("--query", "1,2,x"), "--query must be 3 whole numbers, one index a mode, got '1,2,x'."),
        (("--query", "1,2,-3"), "--query must be 3 whole numbers, one index a mode, got '1,2,-3'."),
        (("--query", "1,2,9"), "--query has index 9 in mode 2, but its size is 4."),
        (
            ("--max-bytes", "0.1k"),
            "{path}: unpacked it takes 168 B (6×7×4 of uint8), but --max-bytes allows 100 B",
        ),
        (("--key", "x"), "{path}: --key chooses one of several arrays or series, but a NumPy array holds one"),
    ],
)
def test_bad_choices_are_told_in_one_line(
    grid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    before = set(tmp_path.iterdir())
    assert attend(grid, *words, "--out", tmp_path / "out") == 2
    captured = capsys.readouterr()
    assert captured.err == f"{PROGRAM}: {message.format(path=grid)}\n"
    assert captured.out == "" and set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--dim", "wide"), "argument --dim: must be a whole number of at least 1, got wide"),
        (("--heads", "0"), "argument --heads: must be a whole number of at least 1, got 0"),
        (("--logit-std", "nan"), "argument --logit-std: must be positive and at most 1,000,000, got nan"),
        (("--logit-std", "1e300"), "argument --logit-std: must be positive and at most 1,000,000, got 1e300"),
        (("--max-bytes", "2 pages"), "argument --max-bytes: must be a number of bytes, as in 2G or 500M, got 2 pages"),
        (
            ("--max-bytes", "9" * 400),
            f"argument --max-bytes: must be a number of bytes, as in 2G or 500M, got {'9' * 400}",
        ),
        (("--max-bytes", "0"), "argument --max-bytes: must be a number of bytes, as in 2G or 500M, got 0"),
        (("--seed", "-1"), "argument --seed: must be a whole number of at least 0 and below 2**63, got -1"),
    ],
)
def test_bad_numbers_are_told_in_one_line(
    grid: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        attend(grid, *words)
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert err == f"{PROGRAM}: {message} (see {PROGRAM} --help)\n"


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("none.nii.gz", None, "there is no such file"),
        ("torn.nii.gz", b"\x1f\x8b rubbish", "cannot be read as NIfTI ("),
        ("torn.npy", b"rubbish", "cannot be read as a NumPy array ("),
        ("torn.mp4", b"rubbish", "cannot be read as video ("),
        ("a.docx", b"rubbish", "no reader for this kind of file; these are read: .nii, "),
    ],
)
def test_bad_files_are_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, contents: bytes | None, message: str
) -> None:
    path = tmp_path / name
    if contents is not None:
        path.write_bytes(contents)
    before = set(tmp_path.iterdir())
    assert attend(path, "--out", tmp_path / "out") == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"{PROGRAM}: {path}: {message}") and captured.err.count("\n") == 1
    assert captured.out == "" and set(tmp_path.iterdir()) == before


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are bytes on Linux")
def test_a_name_that_is_not_of_utf_8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / os.fsdecode(b"gr\xfc\xdf.npy"), tmp_path / os.fsdecode(b"\xfc")
    np.save(path, numbers(4, 5))
    assert attend(path, *SMALL, "--operator", "additive", "--html", "--out", out) == 0
    told = f"{tmp_path}/gr\\udcfc\\udcdf.npy: 0=4 1=5, 1 channel"
    assert capsys.readouterr().out.startswith(told)
    assert (out / "report.txt").read_text().startswith(told) and told in (out / "report.html").read_text()


@pytest.mark.parametrize("size", [np.nan, np.inf, 0, -1])
def test_a_step_that_is_none_is_told_as_none(tmp_path: Path, capsys: pytest.CaptureFixture[str], size: float) -> None:
    group = zarr.create_group(str(tmp_path / "a.zarr"))
    group.create_array("0", shape=(4, 5, 6), dtype="f8")[...] = numbers(4, 5, 6)
    changes = [{"type": "scale", "scale": [size, 1, 1]}]
    axes = [{"name": name, "unit": "micrometer"} for name in "zyx"]
    group.attrs["multiscales"] = [{"axes": axes, "datasets": [{"path": "0", "coordinateTransformations": changes}]}]
    words = ("--operator", "additive", "--json", "--html", "--out", tmp_path / "out")
    assert attend(tmp_path / "a.zarr", *SMALL, *words) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert [mode["step"] for mode in found["recordings"][0]["modes"]] == [None, 1, 1]


def test_a_constant_recording_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "a.npy", np.ones((5, 6)))
    assert attend(tmp_path / "a.npy", "--out", tmp_path / "out") == 2
    assert capsys.readouterr().err == (
        f"{PROGRAM}: {tmp_path / 'a.npy'}: the recording is constant, there is nothing to attend to\n"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--modes", "--key", "--max-bytes", "--query"])
def test_options_of_a_file_need_one(option: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert attend(option, "1", "--out", tmp_path / "out") == 2
    assert capsys.readouterr().err == (f"{PROGRAM}: {option} needs a FILE: the packaged recordings have their own.\n")


def test_an_output_that_is_a_file_is_refused_before_any_work(
    grid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = tmp_path / "taken"
    taken.write_text("mine")
    assert attend(grid, "--out", taken) == 2
    assert capsys.readouterr().err == f"{PROGRAM}: --out {taken}: {taken} is not a directory\n"
    assert attend(grid, "--out", taken / "deeper") == 2
    assert taken.read_text() == "mine"


def test_files_are_written_together_or_not_at_all(
    grid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    (out / "report.txt").mkdir(parents=True)
    assert attend(grid, *SMALL, "--operator", "additive", "--out", out) == 2
    told = f"{PROGRAM}: --out {out}: {out / 'report.txt'} is a directory\n"
    assert capsys.readouterr().err.endswith(told)
    assert [path.name for path in out.iterdir()] == ["report.txt"]


def test_a_missing_package_is_told_in_one_line(
    grid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if it were not installed
    assert attend(grid, "--out", tmp_path / "out") == 2
    told = f"{PROGRAM}: drawing figures needs matplotlib, which cannot be imported ("
    assert capsys.readouterr().err.startswith(told)


def test_help_says_how_the_data_are_embedded(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["attend", "--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    for words in ("nothing is trained", "standard deviation", "layer-normalised", "centred error", *ta.OPERATORS):
        assert words in printed
