"""Report: one table of all statements, and what is told of one that fails."""

from __future__ import annotations

import math
import textwrap
import unicodedata
from collections.abc import Sequence

import torch

from tensorattn.testing.tolerances import ALLOWED, HALF_ALLOWED, LARGEST_LOGIT, epsilon
from tensorattn.verify.work import COARSE, Verdict

__all__ = ["conditions", "failure", "summary", "table"]

HEADINGS = ("statement", "formula", "tried for, worst", "cases", "allowed", "error", "verdict")
WIDTHS = (36, 28, 17, 5, 7, 5, 9)  # with two spaces between, 119 columns
GAP = "  "
RIGHT = (3, 4, 5)  # columns of numbers


def table(verdicts: Sequence[Verdict], dtype: torch.dtype) -> str:
    """Write the table, at most 120 columns wide.

    Args:
        verdicts: What became of the statements.
        dtype: Type that was asked for; rows that were tried in others say so.

    Returns:
        The lines, with a heading.
    """
    lines = [_line(HEADINGS), GAP.join("-" * width for width in WIDTHS)]
    for verdict in verdicts:
        cells = [textwrap.wrap(text, width) or [""] for text, width in zip(_cells(verdict, dtype), WIDTHS, strict=True)]
        for row in range(max(map(len, cells))):
            lines.append(_line([cell[row] if row < len(cell) else "" for cell in cells]))
    return "\n".join(lines)


def _cells(verdict: Verdict, dtype: torch.dtype) -> tuple[str, ...]:
    """Texts of the columns of a row."""
    words = verdict.statement.words
    if verdict.statement.double or verdict.dtypes not in ([], [dtype]):
        words = f"{words} ({', '.join(map(_short, verdict.dtypes or [torch.float64]))})"
    subjects = ""
    if verdict.subjects:
        subjects = f"{verdict.subjects}: {verdict.worst_subject}" if verdict.subjects > 1 else verdict.worst_subject
    allowed = "" if verdict.share is None else _number(verdict.share)
    worst = "" if not verdict.tried or (verdict.worst == 0 and verdict.fails) else _number(verdict.worst)
    return words, verdict.statement.formula, subjects, str(verdict.cases), allowed, worst, _mark(verdict)


def _mark(verdict: Verdict) -> str:
    """Name what became of a statement."""
    if verdict.fails:
        return "FAILS"
    if not verdict.tried:
        return "not tried"
    return "coarse" if verdict.coarse else "holds"


def _short(dtype: torch.dtype) -> str:
    """Name a type."""
    return str(dtype).removeprefix("torch.")


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


def summary(verdicts: Sequence[Verdict], dtype: torch.dtype, device: str) -> str:
    """Tell in a few sentences how many statements hold in the type asked for, and how many in another one.

    Args:
        verdicts: What became of the statements.
        dtype: Type that was asked for.
        device: Device of the tensors.

    Returns:
        The lines, below the table.
    """
    lines = [
        "",
        "allowed: the tolerance in units of the size of what is compared, the median of all comparisons.",
        "error: the largest, in units of the tolerance; a statement fails where it is above 1.",
    ]
    asked = [verdict for verdict in verdicts if dtype in verdict.dtypes]
    others = [verdict for verdict in verdicts if dtype not in verdict.dtypes]
    if asked:
        lines.append(_counted(asked, f"tried in {_short(dtype)} on {device}"))
    for types in sorted({tuple(map(_short, verdict.dtypes)) for verdict in others}):
        same = [verdict for verdict in others if tuple(map(_short, verdict.dtypes)) == types]
        lines.append(_counted(same, f"tried in {', '.join(types)} instead"))
    if any(verdict.coarse for verdict in verdicts):
        lines.append(
            f"coarse: too coarse to tell. Nothing above the tolerance was found, but that is more than {COARSE:g} of "
            "what is compared."
        )
    if failed := [verdict for verdict in verdicts if verdict.fails]:
        lines.append(f"{len(failed)} fail:")
        for verdict in failed:
            broken = ", ".join(name for name, *_ in verdict.failures if name)
            lines.append(f"  {verdict.statement.words}{': ' if broken else ''}{broken}")
    return "\n".join(lines)


def _counted(verdicts: Sequence[Verdict], where: str) -> str:
    """Count what became of statements that were tried in the same way."""
    held, cases = sum(verdict.holds for verdict in verdicts), sum(verdict.cases for verdict in verdicts)
    line = f"{held} of {len(verdicts)} statements {where} hold, in {cases} cases"
    coarse, idle = sum(verdict.coarse for verdict in verdicts), sum(not verdict.tried for verdict in verdicts)
    if coarse:
        line += f"; for {coarse} the tolerance is too coarse to tell"
    if idle:
        line += f"; for {idle} there was nothing to compare"
    return f"{line}."


def conditions(dtype: torch.dtype) -> str:
    """Tell what a type was tried with: the largest logit, additive tensors, and what rounding is allowed.

    Args:
        dtype: The type.

    Examples:
        >>> print(conditions(torch.float64))
        float64: logits of at most 10000; outputs within 32 * 2.2e-16 (1 + L) max|V|, L the largest logit of a case.
    """
    name, half = _short(dtype), dtype.itemsize < 4
    units = f"{ALLOWED['output']:g} * {epsilon(torch.float32 if half else dtype):.1e}"
    if half:
        units = f"({HALF_ALLOWED} * {epsilon(dtype):.1e} + {units})"
    told = f"{name}: logits of at most {LARGEST_LOGIT[dtype]:g}; outputs within {units}"
    told += " (1 + L) max|V|, L the largest logit of a case."
    if not half:
        return told
    return (
        f"{told}\nTerms of additive tensors are multiples of 1/8 of at most 2: their sums are exact.\n"
        "In half precision that a statement holds means that no error above its tolerance was found, and no more."
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
