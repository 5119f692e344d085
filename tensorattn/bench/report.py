"""Report: a table a workload, where we lose, and the same as CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tensorattn.attend.report import bytes_in_words, seconds_in_words
from tensorattn.bench.examine import Row

__all__ = ["NOTES", "aligned", "as_csv", "as_json", "losses", "record", "tables"]

HEADINGS = ("", "parity", "time", "± half IQR", "R", "M", "Ma", "extra memory", "peak", "predicted")
SAME = {  # who computes the same, or what would be taken in its place
    "kao_qkv": ("naive kao_qkv", "kronecker-attention-pytorch"),
    "kao_kv": ("naive kao_kv", "linear-SDPA-linear"),
    "additive": ("axial by SDPA", "axial-attention", "flattened SDPA"),
    "axial": ("axial by SDPA", "axial-attention"),
    "flattened": ("flattened SDPA",),
}
NOTES = (
    "R: one read, the sum of the tensor; M: one copy into a buffer that is there; Ma: one copy into a fresh buffer. "
    "All in the same interleaved run.",
    "parity: largest error of outputs (and gradients) as a share of the largest entry, against float64.",
    "!: on a busy machine, too few samples on several threads in which none of them waited for a processor; not to be "
    "relied on.",
    "extra memory: the most held beyond input, parameters and results; peak: results included; predicted: the peak "
    "that tensorattn.cost foresees. Measured in a process of its own, on one thread, every block of 64 KB and more "
    "mapped by itself, so that the heap holds nothing back.",
)


def aligned(rows: Sequence[Sequence[str]], *, left: int = 1) -> list[str]:
    """Lay cells out in columns.

    Args:
        rows: Cells, the first row being headings.
        left: Number of first columns that hold words.

    Returns:
        One line a row.

    Examples:
        >>> aligned([("", "time"), ("sum", "3 ms")])
        ['      time', 'sum   3 ms']
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "   ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def tables(rows: Sequence[Row]) -> str:
    """Write one table for each workload and number of threads.

    Args:
        rows: What was measured.

    Returns:
        The lines.
    """
    parts = []
    for (work, threads), group in _grouped(rows).items():
        clock = "CPU time of 1 thread" if threads == 1 else f"wall clock of {threads} threads"
        read, copy, fresh = (seconds_in_words(unit) for unit in group[0].units)
        lines = [f"{work}, {work.heads} heads; {clock}", f"  R {read}, M {copy}, Ma {fresh}"]
        cells = [HEADINGS, *(_cells(row) for row in group if row.timed is not None)]
        lines += [f"  {line}" for line in aligned(cells)] if len(cells) > 1 else []
        lines += [f"  {row.name}: {row.note}" for row in group if row.note]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _grouped(rows: Iterable[Row]) -> dict[Any, list[Row]]:
    """Put rows of one workload and number of threads together."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault((row.workload, row.threads), []).append(row)
    return groups


def _cells(row: Row) -> tuple[str, ...]:
    """Texts of one row."""
    assert row.timed is not None and row.parity is not None
    first, third = row.timed.quartiles
    missing = "-"
    return (
        row.name,
        f"{row.parity.error:.0e}",
        ("" if row.share == 1 else "about ") + seconds_in_words(row.seconds) + ("" if row.timed.undisturbed else " !"),
        f"{100 * (third - first) / 2 / max(row.timed.median, 1e-12):.0f} %",
        *(_short(row.ratio(unit)) for unit in range(3)),
        missing if row.peak is None or row.peak.extra is None else bytes_in_words(row.peak.extra),
        missing if row.peak is None or row.peak.bytes is None else bytes_in_words(row.peak.bytes),
        missing if row.predicted is None else bytes_in_words(row.predicted),
    )


def _short(ratio: float) -> str:
    """Write a ratio with three digits."""
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.1f}" if ratio < 100 else f"{ratio:,.0f}"


def losses(rows: Sequence[Row]) -> list[str]:
    """Say where someone else is faster than an operator of this package, computing the same or in its place.

    Args:
        rows: What was measured.

    Returns:
        One line for each; none where there is none.
    """
    lines = []
    for (work, threads), group in _grouped(rows).items():
        seconds = {row.name: row.seconds for row in group if not math.isnan(row.seconds)}
        for ours, others in SAME.items():
            for other in others:
                if ours in seconds and seconds.get(other, math.inf) < seconds[ours]:
                    factor = seconds[ours] / seconds[other]
                    words = "1 thread" if threads == 1 else f"{threads} threads"
                    lines.append(f"{ours} takes {factor:.2f} times as long as {other} on {work}, {words}")
    return lines


def record(row: Row) -> dict[str, Any]:
    """Return a row as plain numbers and words by name.

    Args:
        row: What was measured.
    """
    timed, peak = row.timed, row.peak
    return {
        **{name: "x".join(map(str, v)) if isinstance(v, tuple) else v for name, v in row.workload.as_record().items()},
        "contender": row.name,
        "threads": row.threads,
        "parity_error": None if row.parity is None else row.parity.error,
        "parity_tolerance": None if row.parity is None else row.parity.tolerance,
        "seconds": None if timed is None else row.seconds,
        "first_quartile": None if timed is None else timed.quartiles[0] / row.share,
        "third_quartile": None if timed is None else timed.quartiles[1] / row.share,
        "samples": None if timed is None else timed.samples,
        "undisturbed": None if timed is None else timed.undisturbed,
        "share_run": row.share,
        **{f"{name}_seconds": unit for name, unit in zip(("read", "copy", "fresh_copy"), row.units, strict=True)},
        "peak_bytes": None if peak is None else peak.bytes,
        "extra_bytes": None if peak is None else peak.extra,
        "predicted_peak_bytes": row.predicted,
        "note": row.note,
    }


def as_csv(rows: Sequence[Row]) -> bytes:
    """Write rows as CSV.

    Args:
        rows: What was measured.

    Returns:
        The bytes of the file.
    """
    text = io.StringIO()
    records = [record(row) for row in rows]
    writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue().encode()


def as_json(machine: Mapping[str, str], rows: Sequence[Row], **more: Any) -> bytes:
    """Write all that was found as JSON.

    Args:
        machine: Where it was found.
        rows: What was measured.
        **more: What else was found, by name.

    Returns:
        The bytes of the file.
    """
    found = {"machine": dict(machine), "rows": [record(row) for row in rows], **more}
    return (json.dumps(found, indent=1) + "\n").encode()
