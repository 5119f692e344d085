"""The command `verify`: every law tried for every operator that has it, every theorem, and a table of what came out."""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import textwrap
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

import tensorattn
from tensorattn.cli.common import progress, require
from tensorattn.diagnose.cost import DTYPES
from tensorattn.errors import OptionError
from tensorattn.functional import OPERATORS, get_operator

__all__ = ["Verdict", "add_arguments", "carry_out", "report", "run", "trials"]

MOST_MODES = 6
UNCLEAR = 0.3  # tolerance in units of what is compared, from which on a comparison can hardly tell right from wrong

DESCRIPTION = """\
Try statements on random cases: what the operators claim, what every operator has, and what they are made of.

Prints one table: each statement in words and as a formula, for how many operators and in how many cases it was tried,
the error that is allowed, as a share of what is compared, how much of that was used, and the verdict. Allowed is what
rounding may cause in the type; where that is so much that hardly any mistake would be noticed, the verdict is
"unclear". Statements about exact derivatives, dense algebra or limits are of float64, say so and are counted apart.
Cases on which a statement has nothing to compare are not counted; where all are such, it is "not tried". A statement
that fails is followed by the smallest case that was found, to be pasted into Python.

Exit status: 0 if nothing fails, 1 if anything does, 2 where the input is bad.
"""

HEADINGS = ("statement", "formula", "tried for, worst", "cases", "allowed", "used", "verdict")
WIDTHS = (36, 28, 17, 5, 7, 6, 9)  # with two spaces between, 120 columns
GAP = "  "
RIGHT = (3, 4, 5)  # columns of numbers

Trial = tuple[Any, Any, Any]  # a law, the variant of an operator that it is tried for or None, and how


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to its parser.

    Args:
        parser: The parser.
    """
    parser.description = DESCRIPTION
    parser.add_argument("--dtype", default="float64", help=f"{', '.join(DTYPES)} (default float64)")
    parser.add_argument("--device", default="cpu", help="device of the tensors (default cpu)")
    parser.add_argument("--order", type=_whole, help="number of modes (default: drawn, from 1 to 4)")
    parser.add_argument(
        "--examples", type=_whole, default=16, help="cases a statement and operator (default 16; gradients fewer)"
    )
    parser.add_argument("--seed", type=_whole, default=0, help="moves the random cases (default 0)")
    parser.add_argument(
        "--operator", metavar="NAME", help=f"only what is said of this operator: {', '.join(OPERATORS)}"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command.

    Args:
        arguments: What the parser read.

    Returns:
        The exit status: 0 if nothing fails, 1 if anything does.

    Raises:
        OptionError: If an argument is out of its range.
    """
    if arguments.dtype not in DTYPES:
        raise OptionError(f"--dtype must be one of {', '.join(DTYPES)}, got {arguments.dtype!r}.")
    if arguments.order is not None and not 1 <= arguments.order <= MOST_MODES:
        raise OptionError(f"--order must be between 1 and {MOST_MODES}, got {arguments.order}.")
    for name, least in (("examples", 1), ("seed", 0)):
        if getattr(arguments, name) < least:
            raise OptionError(f"--{name} must be at least {least}, got {getattr(arguments, name)}.")
    if arguments.operator is not None:
        get_operator(arguments.operator)
    try:
        torch.zeros(1, device=arguments.device).item()  # the device meta holds no numbers
    except (RuntimeError, AssertionError, ImportError) as cause:  # as torch says it of each kind of device
        raise OptionError(f"--device {arguments.device!r} cannot be used: {str(cause).splitlines()[0]}") from None
    dtype = DTYPES[arguments.dtype]
    require("hypothesis", extra="verify", purpose="the command verify")
    check = require("tensorattn.testing.check", extra="verify", purpose="the command verify")
    asked = check.Asked(dtype, arguments.device, arguments.order, arguments.examples, arguments.seed)
    work = trials(asked, arguments.operator)
    with progress(len(work), unit="trial") as started:
        verdicts = carry_out(work, started)
    print(report(verdicts, dtype, arguments.device))
    return 1 if any(verdict.failures for verdict in verdicts) else 0


def _whole(text: str) -> int:
    """Read a whole number."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None


@dataclasses.dataclass
class Verdict:
    """What became of a statement.

    Attributes:
        law: The statement.
        subjects: The operators that it was tried for; none if it is not about operators.
        cases: Number of cases on which anything was compared.
        dtypes: Types that it was tried in.
        worst: Largest error in units of its tolerance.
        worst_subject: The operator that it was of.
        failures: For each subject that broke it, its name, what was found, and the case as Python.
        shares: Tolerances of its comparisons, in units of the size of what was compared.
    """

    law: Any
    subjects: list[str] = dataclasses.field(default_factory=list)
    cases: int = 0
    dtypes: list[torch.dtype] = dataclasses.field(default_factory=list)
    worst: float = 0.0
    worst_subject: str = ""
    failures: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)
    shares: list[float] = dataclasses.field(default_factory=list)

    @property
    def share(self) -> float | None:
        """The median tolerance in units of the size of what was compared; None if no size is known."""
        return statistics.median(self.shares) if self.shares else None

    @property
    def mark(self) -> str:
        """What became of it.

        It is "unclear" where no case broke it, but half of the comparisons would have let pass an error as large as
        `UNCLEAR`.
        """
        if self.failures:
            return "FAILS"
        if not self.cases:
            return "not tried"
        return "unclear" if self.share is not None and self.share > UNCLEAR else "holds"


def trials(asked: Any, operator: str | None = None) -> list[Trial]:
    """List what is to be tried.

    Args:
        asked: What the user asked for.
        operator: Try only what is said of this operator.

    Returns:
        Laws, each with an operator and options, or None for a theorem, and how to try it.

    Examples:
        >>> from tensorattn.testing.check import Asked
        >>> [str(variant) for _, variant, _ in trials(Asked(examples=2), "kronecker_sum")][:2]
        ['kronecker_sum', 'kronecker_sum pool=sum']
    """
    from tensorattn.testing import laws
    from tensorattn.testing.check import resolve
    from tensorattn.testing.theorems import THEOREMS
    from tensorattn.testing.variants import variants

    known = [(variant, laws.checks_of(variant.name, **variant.options)) for variant in variants(operator)]
    if asked.order is not None:
        known = [pair for pair in known if resolve(pair[0].name, pair[0].options).least_order <= asked.order]
    found: list[Trial] = [
        (law, variant, dataclasses.replace(asked, dtype=dtype))
        for law in laws.LAWS
        if asked.order is None or law not in laws.OTHER_ORDERS
        for variant, checks in known
        if law in checks
        for dtype in laws.types_of(law, asked.dtype)
    ]
    return found if operator is not None else [*found, *((theorem, None, asked) for theorem in THEOREMS)]


def carry_out(work: Sequence[Trial], started: Callable[[str], None] = lambda words: None) -> list[Verdict]:
    """Try everything.

    Args:
        work: What to try.
        started: Called with the words of a statement when a trial of it starts.

    Returns:
        One verdict a statement, in the order of the trials. Only the first failing case of each was made small.
    """
    from tensorattn.testing.check import resolve

    verdicts: dict[str, Verdict] = {}
    for law, variant, asked in work:
        started(law.words)
        verdict = verdicts.setdefault(law.words, Verdict(law))
        name, options = ("", {}) if variant is None else (str(variant), variant.options)
        subject = tensorattn if variant is None else resolve(variant.name, options)
        found = law.tried(subject, asked, shrink=not verdict.failures)
        verdict.cases += found.cases
        verdict.shares += found.shares
        dtype = torch.float64 if law.double else asked.dtype
        if dtype not in verdict.dtypes:
            verdict.dtypes.append(dtype)
        if name and name not in verdict.subjects:
            verdict.subjects.append(name)
        if found.worst > verdict.worst or not verdict.worst_subject:
            verdict.worst, verdict.worst_subject = max(verdict.worst, found.worst), name
        if found.failure is not None:
            lines = found.failure.python(law, None if variant is None else variant.name, options)
            verdict.failures.append((name, found.failure.message, lines))
    return list(verdicts.values())


def report(verdicts: Sequence[Verdict], dtype: torch.dtype, device: str) -> str:
    """Write the table, at most 120 columns wide, how many statements hold, and what broke those that do not.

    Args:
        verdicts: What became of the statements.
        dtype: Type that was asked for; rows that were tried in others say so.
        device: Device of the tensors.

    Returns:
        The lines. A smallest failing case is Python to paste, below comments.
    """
    lines = [_line(HEADINGS), GAP.join("-" * width for width in WIDTHS)]
    for verdict in verdicts:
        cells = [textwrap.wrap(text, width) or [""] for text, width in zip(_cells(verdict, dtype), WIDTHS, strict=True)]
        for row in range(max(map(len, cells))):
            lines.append(_line([cell[row] if row < len(cell) else "" for cell in cells]))
    lines += [*_summary(verdicts, dtype, device), _conditions(dtype)]
    for verdict in verdicts:
        for _, message, python in verdict.failures[:1]:
            told = [f"FAILS: {verdict.law.words}", *message.splitlines()]
            lines += ["", *(f"# {line}" for line in told), python]
    return "\n".join(lines)


def _cells(verdict: Verdict, dtype: torch.dtype) -> tuple[str, ...]:
    """Texts of the columns of a row."""
    words, many = verdict.law.words, len(verdict.subjects)
    if verdict.law.double or verdict.dtypes not in ([], [dtype]):
        words = f"{words} ({', '.join(map(_short, verdict.dtypes))})"
    subjects = f"{many}: {verdict.worst_subject}" if many > 1 else verdict.worst_subject
    allowed = "" if verdict.share is None else _number(verdict.share)
    untold = verdict.mark == "not tried" or (verdict.worst == 0 and verdict.failures)
    worst = "" if untold else _percent(verdict.worst)
    return words, verdict.law.formula, subjects, str(verdict.cases), allowed, worst, verdict.mark


def _short(dtype: torch.dtype) -> str:
    """Name a type."""
    return str(dtype).removeprefix("torch.")


def _percent(ratio: float) -> str:
    """Write an error as a percentage of what is allowed, or as a multiple of it, in six letters."""
    if ratio > 1:
        return f"{ratio:.0e}×" if ratio >= 100 and math.isfinite(ratio) else f"{ratio:.3g}×"
    return "<0.01%" if 0 < ratio < 1e-4 else f"{100 * ratio:.2g}%"


def _number(ratio: float) -> str:
    """Write an error as a share of what is compared."""
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


def _summary(verdicts: Sequence[Verdict], dtype: torch.dtype, device: str) -> Iterator[str]:
    """Tell how many statements hold in the type asked for, how many in another one, and which fail."""
    yield ""
    yield "allowed: the error that rounding may cause, as a share of what is compared, the median of all comparisons."
    yield "used: how much of what is allowed the largest error took; a statement fails above 100 %."
    yield "q, k, v: queries, keys, values. O: output of the operator, F: of flattened, that is full, attention, A: of"
    yield "additive attention. v̄: mean of the values. LSE: log-sum-exp of the logits. s: scale. N: number of modes."
    groups: dict[str, list[Verdict]] = {}
    for verdict in sorted(verdicts, key=lambda verdict: dtype not in verdict.dtypes):
        types = ", ".join(map(_short, verdict.dtypes))
        where = f"in {_short(dtype)} on {device}" if dtype in verdict.dtypes else f"in {types} instead"
        groups.setdefault(where, []).append(verdict)
    for where, group in groups.items():
        marks = [verdict.mark for verdict in group]
        line = f"{marks.count('holds')} of {len(group)} statements tried {where} hold"
        line += f", in {sum(verdict.cases for verdict in group)} cases"
        if "unclear" in marks:
            line += f"; {marks.count('unclear')} are unclear"
        if "not tried" in marks:
            line += f"; for {marks.count('not tried')} there was nothing to compare"
        yield f"{line}."
    if any(verdict.mark == "unclear" for verdict in verdicts):
        yield (
            f"unclear: no error above what is allowed was found, but more than {UNCLEAR:.0%} is allowed: a mistake "
            "could hide. More precision (--dtype float64) may tell."
        )
    if failed := [verdict for verdict in verdicts if verdict.failures]:
        yield f"{len(failed)} fail:"
        for verdict in failed:
            broken = ", ".join(name for name, *_ in verdict.failures if name)
            yield f"  {verdict.law.words}{': ' if broken else ''}{broken}"


def _conditions(dtype: torch.dtype) -> str:
    """Tell what a type was tried with: the largest logit, additive tensors, and what rounding is allowed."""
    from tensorattn.testing.strategies import ALLOWED, HALF_ALLOWED, LARGEST_LOGIT, epsilon

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
