"""The notebooks: stored as they ran, from top to bottom, and they run."""

from __future__ import annotations

import time
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def cells(path: Path) -> list[nbformat.NotebookNode]:
    """The cells of code."""
    return [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]


def test_there_are_notebooks():
    names = ["01_video", "02_volume", "03_theorems", "04_streaming_and_masks", "05_swap", "06_networks"]
    assert [path.stem for path in NOTEBOOKS] == names


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_stored_is_what_ran(path):
    code = cells(path)
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert any("image/jpeg" in output.get("data", {}) for output in outputs)
    assert "assert" in code[-1].source
    assert path.stat().st_size < 400_000


@pytest.mark.thorough
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore")  # of the client, not of what it runs
def test_it_runs(path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook, start = nbformat.read(path, 4), time.monotonic()
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(path.parent)}}).execute()
    assert time.monotonic() - start < 240
