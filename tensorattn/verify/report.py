"""Report: one table of all statements, and what is told of one that fails."""

from __future__ import annotations

import math
import textwrap
import unicodedata
from collections.abc import Sequence

import torch

from tensorattn.testing.tolerances import ALLOWED, HALF_ALLOWED, LARGEST_LOGIT, epsilon
from tensorattn.verify.work import Verdict

__all__ = ["conditions", "failure", "summary", "table"]

HEADINGS = ("statement", "formula", "tried for, worst", "cases", "error", "verdict")
WIDTHS = (39, 30, 20, 5, 7, 7)  # with two spaces between, 118 columns
GAP = "  "
RIGHT = (3, 4)  # columns of numbers


def table(verdicts: Sequence[Verdict]) -> str:
    """Write the table, at most 120 columns wide.

    Args:
        verdicts: What became of the statements.

    Returns:
        The lines, with a heading.
    """
    lines = [_line(HEADINGS), GAP.join("-" * width for width in WIDTHS)]
    for verdict in verdicts:
        cells = [textwrap.wrap(text, width) or [""] for text, width in zip(_cells(verdict), WIDTHS, strict=True)]
        for row in range(max(map(len, cells))):
            lines.append(_line([cell[row] if row < len(cell) else "" for cell in cells]))
    return "\n".join(lines)


def _cells(verdict: Verdict) -> tuple[str, ...]:
    """Texts of the columns of a row."""
    words = f"{verdict.statement.words} (float64)" if verdict.statement.double else verdict.statement.words
    subjects = ""
    if verdict.subjects:
        subjects = f"{verdict.subjects}: {verdict.worst_subject}" if verdict.subjects > 1 else verdict.worst_subject
    worst = "" if verdict.worst == 0 and not verdict.holds else _number(verdict.worst)
    mark = "holds" if verdict.holds else "FAILS"
    return words, verdict.statement.formula, subjects, str(verdict.cases), worst, mark


def _number(ratio: float) -> str:
    """Write an error in units of its tolerance."""
    if ratio == 0 or math.isinf(ratio):
        return f"{ratio:.0f}"
    return f"{ratio:.3f}" if 0.001 <= ratio < 100 else f"{ratio:.0e}"


def _line(cells: Sequence[str]) -> str:
    """Put cells beside each other."""
    padded = []
    for column, (cell, width) in enumerate(zip(cells, WIDTHS, strict=True)):
        space = " " * (width - sum(not unicodedata.combining(letter) for letter in cell))
        padded.append(space + cell if column in RIGHT else cell + space)
    return GAP.join(padded).rstrip()


def summary(verdicts: Sequence[Verdict], dtype: str, device: str) -> str:
    """Tell in a sentence or two how many statements hold.

    Args:
        verdicts: What became of the statements.
        dtype: Type that was asked for.
        device: Device of the tensors.

    Returns:
        The lines, below the table.
    """
    held, cases = sum(verdict.holds for verdict in verdicts), sum(verdict.cases for verdict in verdicts)
    lines = [
        "",
        "error: the largest, in units of the tolerance; a statement fails where it is above 1.",
        f"{held} of {len(verdicts)} statements hold in {dtype} on {device}, in {cases} cases.",
    ]
    if held < len(verdicts):
        lines.append(f"{len(verdicts) - held} fail:")
        for verdict in verdicts:
            if not verdict.holds:
                broken = ", ".join(name for name, *_ in verdict.failures if name)
                lines.append(f"  {verdict.statement.words}{': ' if broken else ''}{broken}")
    return "\n".join(lines)


def conditions(dtype: torch.dtype) -> str:
    """Tell what a type was tried with: the largest logit, additive tensors, and what rounding is allowed.

    Args:
        dtype: The type.

    Examples:
        >>> print(conditions(torch.float64))
        float64: logits of at most 10000; outputs within 32 * 2.2e-16 (1 + L) max|V|, L the largest logit of a case.
    """
    name, half = str(dtype).removeprefix("torch."), dtype.itemsize < 4
    units = f"{ALLOWED['output']:g} * {epsilon(torch.float32 if half else dtype):.1e}"
    if half:
        units = f"({HALF_ALLOWED} * {epsilon(dtype):.1e} + {units})"
    told = f"{name}: logits of at most {LARGEST_LOGIT[dtype]:g}; outputs within {units}"
    told += " (1 + L) max|V|, L the largest logit of a case."
    return (
        f"{told}\nTerms of additive tensors are multiples of 1/8 of at most 2: their sums are exact." if half else told
    )


def failure(verdict: Verdict) -> str:
    """Tell what broke a statement, with the smallest case as Python.

    Args:
        verdict: A statement that does not hold.

    Returns:
        A heading and what was found, as comments, and the lines to paste.
    """
    _, found, lines = verdict.failures[0]
    told = [f"FAILS: {verdict.statement.words}", *found.message.splitlines()]
    return "\n".join([*(f"# {line}" for line in told), lines])
