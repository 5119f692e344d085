"""The command line: which command runs, and what the process returns."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tensorattn.cli.main import COMMANDS, main

PROGRAM = "python -m tensorattn"


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
    assert capsys.readouterr().err == f"{PROGRAM}: {message} (see {PROGRAM} --help)\n"


def test_the_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    words = " ".join(capsys.readouterr().out.split())
    for name, summary in COMMANDS.items():
        assert f"{name} {summary}" in words


@pytest.mark.thorough
def test_the_exit_status_of_the_process(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tensorattn", "attend", str(tmp_path / "no.nii")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr == f"{PROGRAM} attend: {tmp_path / 'no.nii'}: there is no such file\n"
    assert done.stdout == "" and list(tmp_path.iterdir()) == []
