"""Report: what was read, and one row an operator, as text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tensorattn.diagnose import ErrorEstimate

__all__ = ["Row", "bytes_in_words", "flops_in_words", "seconds_in_words", "table"]

HEADINGS = ("operator", "FLOPs", "CPU time", "peak extra memory", "centred error")


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: Name of the operator, or of what it is compared with.
        flops: Operations over the whole grid; None where nothing is computed.
        seconds: CPU time over the whole grid, measured or extrapolated.
        peak_bytes: Peak extra memory, None where it was not measured.
        error: Centred error on the sampled queries.
        ran: Whether it ran over the whole grid; if not, the time is extrapolated.
    """

    name: str
    flops: int | None
    seconds: float | None
    peak_bytes: int | None
    error: ErrorEstimate | None
    ran: bool = True


def _with_prefix(number: float, prefixes: Sequence[str], unit: str, base: float = 1000.0) -> str:
    """Return a number with three digits and a prefix."""
    power = 0
    while number >= base * 0.9995 and power < len(prefixes) - 1:
        number, power = number / base, power + 1
    digits = 0 if number >= 99.95 or (power == 0 and number == int(number)) else 1 if number >= 9.995 else 2
    return f"{number:.{digits}f} {prefixes[power]}{unit}".rstrip()


def flops_in_words(count: float) -> str:
    """Return a number of operations.

    Args:
        count: Operations.

    Examples:
        >>> flops_in_words(84_934_656_000_000), flops_in_words(1200)
        ('84.9 T', '1.20 k')
    """
    return _with_prefix(count, ("", "k", "M", "G", "T", "P", "E"), "")


def bytes_in_words(count: float) -> str:
    """Return an amount of memory, in powers of ten.

    Args:
        count: Bytes.

    Examples:
        >>> bytes_in_words(147_456_000), bytes_in_words(9_999_000), bytes_in_words(0)
        ('147 MB', '10.0 MB', '0 B')
    """
    return _with_prefix(count, ("", "k", "M", "G", "T", "P", "E"), "B")


def seconds_in_words(seconds: float) -> str:
    """Return a duration in its natural unit.

    Args:
        seconds: Duration in seconds.

    Examples:
        >>> seconds_in_words(0.0123), seconds_in_words(8.04), seconds_in_words(600), seconds_in_words(40_000)
        ('12.3 ms', '8.04 s', '10 min', '11.1 h')
    """
    for size, unit in ((86400.0 * 2, "days"), (7200.0, "h"), (120.0, "min")):
        if seconds >= size:
            return _with_prefix(seconds / {"days": 86400.0, "h": 3600.0, "min": 60.0}[unit], ("",), unit)
    if seconds >= 0.9995:
        return f"{seconds:.3g} s" if seconds >= 100 else _with_prefix(seconds, ("",), "s")
    return f"{seconds * 1000:.1f} ms" if seconds >= 0.00995 else f"{seconds * 1000:.2f} ms"


def table(rows: Iterable[Row]) -> str:
    """Lay rows out as an aligned table.

    Args:
        rows: What to print, in this order.

    Returns:
        The lines of the table.

    Examples:
        >>> estimate = ErrorEstimate(0.5731, 0.0124, 64)
        >>> print(table([Row("additive", 10**9, 0.25, 147_000_000, estimate)]))
        operator   FLOPs    CPU time   peak extra memory   centred error
        ----------------------------------------------------------------
        additive   1.00 G   250.0 ms              147 MB   0.573 ± 0.012
    """
    cells = [HEADINGS, *(_cells(row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(HEADINGS))]
    lines = []
    for index, row in enumerate(cells):
        first, *others = zip(row, widths, strict=True)
        name = f"{first[0]:<{first[1]}}"
        right = (f"{cell:<{width}}" if index == 0 else f"{cell:>{width}}" for cell, width in others)
        lines.append("   ".join((name, *right)).rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def _cells(row: Row) -> tuple[str, ...]:
    """Return the words of one row."""
    missing = "-"
    seconds = missing if row.seconds is None else seconds_in_words(row.seconds)
    return (
        row.name,
        missing if row.flops is None else flops_in_words(row.flops),
        seconds if row.ran or row.seconds is None else f"about {seconds} *",
        ("n/a" if row.ran else "not run *") if row.peak_bytes is None else bytes_in_words(row.peak_bytes),
        missing if row.error is None else error_in_words(row.error),
    )


def error_in_words(estimate: ErrorEstimate) -> str:
    """Return an error and its standard error, or the error alone where it is exact to rounding.

    Args:
        estimate: What was estimated.

    Examples:
        >>> error_in_words(ErrorEstimate(0.5731, 0.0124, 64)), error_in_words(ErrorEstimate(3.2e-7, 1e-8, 64))
        ('0.573 ± 0.012', '3e-07')
    """
    if math.isnan(estimate.error):
        return "not a number"
    if estimate.error < 5e-4:
        return f"{estimate.error:.0e}" if estimate.error > 0 else "0"
    if estimate.standard_error < 5e-4 or math.isnan(estimate.standard_error):
        return f"{estimate.error:.3f}"
    return f"{estimate.error:.3f} ± {estimate.standard_error:.3f}"
