"""What works in which host, printed: `pytest -m thorough tests/integrations/test_table.py`.

A training step shows by how much the loss fell, LoRA how many of its matrices have gradients.
"""

from __future__ import annotations

import importlib

import pytest
from contract import CHECKS, Case

pytestmark = [pytest.mark.thorough, pytest.mark.filterwarnings("ignore")]
HOSTS = ("torch", "timm", "transformers", "monai", "diffusers")


def cases(name: str) -> dict[str, Case]:
    """The cases of a host; none where it is not installed."""
    try:
        return importlib.import_module(f"test_{name}").CASES
    except pytest.skip.Exception:
        return {}


def shown(value: object) -> str:
    return f"{value:.0e}" if isinstance(value, float) else "yes" if value is True else str(value)


def test_hosts(capsys):
    table = [("host", "model", *CHECKS)]
    for name in HOSTS:
        for model, case in list(cases(name).items())[:1]:
            table.append((name, model, *(shown(check(case)) for check in CHECKS.values())))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    with capsys.disabled():
        for row in [
            "",
            *("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in table),
        ]:
            print(row)
    assert len(table) > 1
