"""What commands share: choices, amounts in words, progress, and files that appear together or not at all."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import tensorattn as ta
from tensorattn.cli.attend import default_choices
from tensorattn.cli.common import MissingPackageError, amount, duration, parse_choices, progress, require, write_files


def test_choices_carry_their_options() -> None:
    (choice,) = parse_choices([" kao_qkv:centered=True "])
    assert (choice.label, choice.record.name, choice.options) == (
        "kao_qkv:centered=True",
        "kao_qkv",
        {"centered": True},
    )
    labels = [choice.label for choice in default_choices()]
    plain = [label for label in labels if ":" not in label]
    assert plain == ["clustered", *(name for name in ta.OPERATORS if name != "clustered")]


def test_amounts_have_three_digits() -> None:
    counts = (0, 7, 999, 999.6, 1200, 99_950, 9_999_000, 84_934_656_000_000)
    assert [amount(count) for count in counts] == [
        "0", "7", "999", "1.00 k", "1.20 k", "100 k", "10.0 M", "84.9 T"
    ]  # fmt: skip
    assert [duration(seconds) for seconds in (0.00123, 0.0123, 1.0, 119.0, 600.0, 400_000.0)] == [
        "1.23 ms", "12.3 ms", "1 s", "119 s", "10 min", "4.63 days"
    ]  # fmt: skip


def test_a_missing_package_is_told_with_the_extra_that_installs_it() -> None:
    with pytest.raises(MissingPackageError) as caught:
        require("no_such_package.part", extra="video", purpose="reading video")
    assert str(caught.value) == (
        "reading video needs no_such_package, which cannot be imported (No module named 'no_such_package'): "
        "pip install 'tensorattn[video]'"
    )


def test_progress_is_told_line_by_line_without_a_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for terminal, missing in ((True, False), (False, False), (True, True)):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        if missing:
            monkeypatch.setitem(sys.modules, "tqdm", None)  # as if it were not installed
        with progress(3, unit="step") as step:
            for words in ("one", "one", "two"):
                step(words)
        printed = capsys.readouterr()
        assert printed.out == ""
        if missing or not terminal:
            assert printed.err == "trying: one\ntrying: two\n"
        else:
            assert "two" in printed.err and "2/3" in printed.err


def test_files_replace_older_ones_and_leave_others_alone(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"old")
    (tmp_path / "mine.txt").write_bytes(b"mine")
    assert write_files(tmp_path, {"a.png": b"new"}) == (tmp_path / "a.png",)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a.png": b"new", "mine.txt": b"mine"}


def test_files_appear_together_or_not_at_all(tmp_path: Path) -> None:
    too_long = "b" * 300
    for directory in (tmp_path / "new", tmp_path):
        with pytest.raises(ta.OptionError) as caught:
            write_files(directory, {"a.png": b"1", too_long: b"2"})
        assert str(caught.value) == f"--out {directory}: File name too long"
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(ta.OptionError, match=r"File name too long$"):
        write_files(tmp_path / too_long, {"a.png": b"1"})


def test_an_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(path: Path, target: Path) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_files(tmp_path / "new" / "nested", {"a.png": b"1"})
    assert list(tmp_path.iterdir()) == []


def test_files_that_cannot_be_put_in_their_places_leave_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.png").write_bytes(b"old")
    replace = Path.replace

    def fails_at_c(path: Path, target: Path) -> Any:
        if target.name == "c.png":
            raise OSError(5, "Input/output error")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", fails_at_c)
    for directory in (tmp_path, tmp_path / "new" / "nested"):
        with pytest.raises(ta.OptionError) as caught:
            write_files(directory, {"a.png": b"1", "b.png": b"2", "c.png": b"3"})
        assert str(caught.value) == f"--out {directory}: Input/output error"
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a.png": b"old"}
