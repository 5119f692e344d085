"""The command `attend`: what it prints and writes for every kind of file, and what it tells where it cannot."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image

import tensorattn as ta
from tensorattn.__main__ import main
from tensorattn.attend import command, job, output
from tensorattn.attend.choices import default_choices, parse_choices
from tensorattn.attend.optional import MissingPackageError
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
        (".npy", write_npy),
        (".npz", write_npz),
        (".nii", write_nifti),
        (".nii.gz", write_nifti),
        (".tif", write_tiff),
        (".dcm", write_dicom),
        (".mp4", write_film),
        (".avi", write_film),
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


def test_gaps_and_series_and_six_modes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    series = numbers(50).astype(float)
    series[[3, 7]] = np.nan
    for name, array in (("series", series), ("six", numbers(3, 2, 3, 2, 1, 2))):
        np.save(tmp_path / f"{name}.npy", array)
        assert attend(tmp_path / f"{name}.npy", *SMALL, "--out", tmp_path / name) == 0
        printed = capsys.readouterr().out
        check_written(tmp_path / name, name, printed)
        assert ("2 of 50 numbers are not finite and were filled with the mean" in printed) == (name == "series")


def test_chosen_operators_run_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "a.npy", numbers(6, 7))
    words = ("--operator", "kao_kv", "--operator", "kao_qkv:centered=True", "--operator", "kao_kv")
    assert attend(tmp_path / "a.npy", *words, *SMALL, "--out", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert list(table_of(printed)) == ["kao_kv", "kao_qkv:centered=True", "13 random keys", "mean of the values"]
    assert "Full attention over all 42 queries would have needed " in printed


def test_an_operator_that_is_too_slow_is_estimated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "BUDGET_SECONDS", 0.0)
    np.save(tmp_path / "a.npy", numbers(6, 7))
    assert attend(tmp_path / "a.npy", *SMALL, "--out", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    rows = table_of(printed)
    for name in ta.OPERATORS:
        assert rows[name][1].startswith("about ") and rows[name][2] == "not run *"
    assert rows["axial"][-1] == "-"  # it takes whole grids only
    assert rows["flattened"][-1] == "0"
    words = " ".join(printed.split())
    assert "Full attention over all 42 queries would have needed " in words
    assert "14.1 kB in all, in an implementation that stores them." in words  # 2 heads, 42² weights of 4 bytes


def test_seed_and_sharpness_decide_the_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "a.npy", numbers(16, 17))
    errors, scales = [], []
    for seed, width in ((1, 1), (1, 1), (2, 1), (1, 4)):
        words = ("--seed", str(seed), "--logit-std", str(width), "--operator", "additive", "--out", tmp_path / "out")
        assert attend(tmp_path / "a.npy", *SMALL, *words) == 0
        printed = capsys.readouterr().out
        errors.append(table_of(printed)["additive"][-1])
        scales.append(float(printed.split("(scale ")[1].split(")")[0]))
    assert errors[0] == errors[1] and len(set(errors)) == 3
    assert scales[3] == pytest.approx(4 * scales[0], rel=0.01)


@pytest.mark.parametrize("width", ["1e4", "1e6"])
def test_attention_to_one_key_alone_is_measured_and_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], width: str
) -> None:
    np.save(tmp_path / "a.npy", numbers(12, 13, 4))
    assert attend(tmp_path / "a.npy", *SMALL, "--logit-std", width, "--out", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    check_written(tmp_path / "out", "a", printed)
    assert "nan" not in printed and "not a number" not in printed


def test_operations_are_counted_as_the_formulas_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "a.npy", numbers(20, 30))
    assert attend(tmp_path / "a.npy", "--dim", "64", "--heads", "4", "--out", tmp_path / "out") == 0
    rows = table_of(capsys.readouterr().out)
    units = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}

    def flops(name: str) -> float:
        number, unit = (*rows[name][0].split(), "")[:2]
        return float(number) * units[unit]

    positions, averages, heads, dim = 600, 50, 4, 16
    for name, tokens in (("flattened", positions), ("kao_kv", averages), ("additive", averages), ("axial", averages)):
        products = 4 * positions * tokens * dim * heads
        assert products <= flops(name) <= 1.4 * products, name
    assert flops("kao_qkv") < flops("kao_kv") / 5


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
        (("--query", "1,2,9"), "--query has index 9 in mode 2, but its size is 4."),
        (("--key", "x"), "{path}: --key chooses an array of an .npz archive, but this is .npy"),
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
        (("--dim", "wide"), "argument --dim: must be a whole number, got 'wide'"),
        (("--dim", "0"), "argument --dim: must be at least 1, got 0"),
        (("--logit-std", "wide"), "argument --logit-std: must be positive and at most 1,000,000, got wide"),
        (("--logit-std", "nan"), "argument --logit-std: must be positive and at most 1,000,000, got nan"),
        (("--logit-std", "-1"), "argument --logit-std: must be positive and at most 1,000,000, got -1"),
        (("--logit-std", "1e300"), "argument --logit-std: must be positive and at most 1,000,000, got 1e300"),
        (("--seed", "-1"), "argument --seed: must be at least 0 and below 2**63, got -1"),
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
    ("words", "message"),
    [
        ((), "the following arguments are required: COMMAND"),
        (("attend", "--unknown"), "unrecognized arguments: --unknown"),
    ],
)
def test_bad_words_are_told_in_one_line(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"python -m tensorattn: {message} (see python -m tensorattn --help)\n"


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


def test_a_constant_recording_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "a.npy", np.ones((5, 6)))
    assert attend(tmp_path / "a.npy", "--out", tmp_path / "out") == 2
    assert capsys.readouterr().err == (
        f"{PROGRAM}: {tmp_path / 'a.npy'}: the recording is constant, there is nothing to attend to\n"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--modes", "--key", "--query"])
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


def test_a_missing_package_is_told_in_one_line(
    grid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(module: str, *, extra: str, purpose: str) -> None:
        raise MissingPackageError(f"{purpose} needs {module}: pip install 'tensorattn[{extra}]'")

    monkeypatch.setattr(command, "require", missing)
    assert attend(grid, "--out", tmp_path / "out") == 2
    assert capsys.readouterr().err == (
        f"{PROGRAM}: drawing figures needs matplotlib.figure: pip install 'tensorattn[examples]'\n"
    )


def test_files_appear_together_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(output.os, "replace", broken)
    with pytest.raises(OptionError, match="No space left on device"):
        output.write_files(tmp_path / "out", {"a.png": b"1", "b.png": b"2"})
    assert list(tmp_path.iterdir()) == []


def test_files_replace_older_ones_and_leave_others_alone(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"old")
    (tmp_path / "mine.txt").write_bytes(b"mine")
    output.write_files(tmp_path, {"a.png": b"new"})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a.png": b"new", "mine.txt": b"mine"}


def test_choices_carry_their_options() -> None:
    (choice,) = parse_choices([" kao_qkv:centered=True "])
    assert (choice.label, choice.options, choice.any_positions) == ("kao_qkv:centered=True", {"centered": True}, False)
    labels = [choice.label for choice in default_choices()]
    assert [label for label in labels if ":" not in label] == list(ta.OPERATORS)


def test_the_exit_status_of_the_process(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tensorattn", "attend", str(tmp_path / "no.nii")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr == f"{PROGRAM}: {tmp_path / 'no.nii'}: there is no such file\n"
    assert done.stdout == "" and list(tmp_path.iterdir()) == []


def test_help_says_how_the_data_are_embedded(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["attend", "--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    for words in ("nothing is trained", "standard deviation", "layer-normalised", "centred error", *ta.OPERATORS):
        assert words in printed
