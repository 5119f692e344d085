"""The command `bench`: its arguments, and what it prints and writes."""

from __future__ import annotations

import argparse
import itertools
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tensorattn.attend.choices import parse_choices
from tensorattn.attend.optional import MissingPackageError
from tensorattn.attend.output import check_directory, png_bytes, write_files
from tensorattn.bench import goals, report, scaling, targets
from tensorattn.bench.contenders import PEERS, PRIMITIVES, Contender, operator_contender
from tensorattn.bench.examine import Row, examine, predicted
from tensorattn.bench.machine import machine
from tensorattn.bench.workload import DTYPES, LAYOUTS, Workload, parse_shape
from tensorattn.errors import OptionError
from tensorattn.operators import OPERATORS
from tensorattn.progress import progress

__all__ = ["register"]

SHAPES = ("1,96,96,64", "1,16,40,40,64")  # an image and a video
CUBES = (8, 16, 24, 32, 48, 64)
SCALED = ("kao_qkv", "kao_kv", "additive", "axial by SDPA", "flattened SDPA")  # and a copy beside them
MOST_THREADS = 256

DESCRIPTION = """\
Time and memory of operators and of their peers on your shapes, after parity.

Every contender is first compared with a plain definition in float64, outputs and, with --backward, gradients; whoever
fails is not timed. Times are medians of runs in turn: CPU time on one thread, wall clock on several. They are given as
multiples of one read (R), one copy (M) and one copy into a fresh buffer (Ma) of the tensor in the same run. Peak memory
is measured in processes of their own, beside what `tensorattn.cost` predicts.

Writes a table, the same as CSV and JSON, and a log-log plot of time against positions with fitted exponents.
"""

EPILOG = """\
Large tensors: glibc maps every block of 32 MB and more afresh, so that a fresh result costs as much as two copies. With
  MALLOC_MMAP_THRESHOLD_=8589934592 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=67108864
in the environment it costs one. The setting is told with the numbers.
"""


class _Asked(NamedTuple):
    """What the user asked for, checked."""

    works: list[Workload]
    contenders: list[Contender]
    threads: int
    repeats: int
    layout: str


def register(commands: Any) -> None:
    """Add the command to the commands of the package.

    Args:
        commands: What `argparse.ArgumentParser.add_subparsers` returns.
    """
    parser = commands.add_parser(
        "bench",
        help="time and memory of every operator and of its peers, after parity",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--shape", action="append", metavar="B,n_1,...,n_N,C", help="may be given again (default: an image, a video)"
    )
    parser.add_argument(
        "--operator",
        action="append",
        metavar="NAME[:OPTION=VALUE]",
        help=f"time this one only, and no peers but where --peers is given; may be given again: {', '.join(OPERATORS)}",
    )
    parser.add_argument("--peers", action="store_true", help="time the peers too, where --operator is given")
    parser.add_argument("--heads", type=_positive, help="heads (default 4)")
    parser.add_argument("--dtype", help=f"{', '.join(DTYPES)} (default float32)")
    parser.add_argument("--layout", help=f"{', '.join(LAYOUTS)} or both (default channels_last)")
    parser.add_argument("--threads", type=_positive, help="threads (default 1)")
    parser.add_argument("--backward", action="store_true", help="forward and backward")
    parser.add_argument("--skip", action="store_true", help="add the input to the output")
    parser.add_argument("--compile", action="store_true", help="time each operator compiled by torch.compile too")
    parser.add_argument("--repeats", type=_positive, help="samples of each time (default 5)")
    parser.add_argument("--goals", action="store_true", help="the goals of this package, with verdicts (20 minutes)")
    parser.add_argument("--out", type=Path, default=Path("bench-out"), help="directory of the files (bench-out)")
    parser.set_defaults(run=run)


def _positive(text: str) -> int:
    """Read a positive whole number."""
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _asked(arguments: argparse.Namespace) -> _Asked:
    """Check the arguments, and complete them."""
    layout = "channels_last" if arguments.layout is None else arguments.layout
    dtype = "float32" if arguments.dtype is None else arguments.dtype
    for name, value, known in (("dtype", dtype, tuple(DTYPES)), ("layout", layout, (*LAYOUTS, "both"))):
        if value not in known:
            raise OptionError(f"--{name} must be one of {', '.join(known)}, got {value!r}.")
    heads = 4 if arguments.heads is None else arguments.heads
    works = []
    for text in SHAPES if arguments.shape is None else arguments.shape:
        batch, sizes, dim = parse_shape(text)
        if dim % heads:
            raise OptionError(f"--heads must divide the channels, but {heads} do not divide {dim} of {text}.")
        for each in LAYOUTS if layout == "both" else (layout,):
            works.append(Workload(batch, sizes, dim, heads, dtype, each, arguments.backward, arguments.skip))
    names = OPERATORS if arguments.operator is None else arguments.operator
    choices = parse_choices(names)
    contenders = [operator_contender(choice) for choice in choices]
    for each, work in itertools.product(contenders, works):
        predicted(each, work)  # refuses options that have no meaning for the shape
    if arguments.compile:
        contenders += [operator_contender(choice, compiled=True) for choice in choices]
    if arguments.operator is None or arguments.peers:
        contenders += PEERS
    if arguments.operator is None and not arguments.backward:
        contenders = [*(each for each in PRIMITIVES if each.name in ("averages", "outer sum")), *contenders]
    threads = 1 if arguments.threads is None else arguments.threads
    if threads > MOST_THREADS:
        raise OptionError(f"--threads must be at most {MOST_THREADS}, got {threads}.")
    return _Asked(works, contenders, threads, 5 if arguments.repeats is None else arguments.repeats, layout)


def run(arguments: argparse.Namespace) -> int:
    """Run the command.

    Args:
        arguments: What the parser read.

    Returns:
        The exit status.
    """
    check_directory(arguments.out)
    if arguments.goals:
        for name in (
            "shape",
            "operator",
            "peers",
            "heads",
            "dtype",
            "layout",
            "threads",
            "backward",
            "skip",
            "compile",
        ):
            if getattr(arguments, name):
                raise OptionError(f"--{name} has no meaning with --goals, which has its own.")
        return _run_goals(arguments.out, 7 if arguments.repeats is None else arguments.repeats)
    return _run_shapes(_asked(arguments), arguments.out)


def _run_goals(out: Path, repeats: int) -> int:
    """Measure the goals, and print the verdicts."""
    where = machine()
    work = goals.pieces(targets.GOALS)
    count = sum(len(piece.names) + len(piece.threads) + 1 for piece in work)
    with progress(count, unit="step") as started:
        rows, outcomes = goals.carry_out(targets.GOALS, repeats=repeats, started=started)
    found = scaling.curves([row for row in rows if row.workload in targets.SCALED and row.threads == 1])
    text = "\n\n".join([_heading(where), report.tables(rows), _losses(rows), goals.verdicts(outcomes)])
    _write(out, "goals", where, rows, found, text, goals=goals.as_records(outcomes))
    return 0


def _run_shapes(asked: _Asked, out: Path) -> int:
    """Measure what was asked for."""
    where = machine()
    cubes = scaling.cubes(CUBES, layout="channels_last" if asked.layout == "both" else asked.layout)
    names = [name for name in SCALED if any(each.name == name for each in asked.contenders)]
    names += ["fresh copy"] if names else []
    count = len(asked.works) * (len(asked.contenders) + 2) + len(cubes) * (len(names) + 2)
    with progress(count, unit="step") as started:
        found = [
            examine(work, asked.contenders, threads=(asked.threads,), repeats=asked.repeats, started=started)
            for work in asked.works
        ]
        scaled = scaling.measure_scaling(names, cubes, repeats=3, started=started) if names else []
    rows = list(itertools.chain.from_iterable(found))
    text = "\n\n".join([_heading(where), report.tables(rows), _losses(rows), _exponents(scaled)])
    _write(out, "bench", where, [*rows, *scaled], scaling.curves(scaled), text)
    return 0


def _heading(where: dict[str, str]) -> str:
    """Say where it was measured, and what the columns are."""
    lines = [f"{name}: {words}" for name, words in where.items()]
    notes = [textwrap.fill(note, 110, subsequent_indent="  ") for note in report.NOTES]
    return "\n".join([*lines, "", *notes])


def _losses(rows: Sequence[Row]) -> str:
    """Say where someone else is faster."""
    lines = report.losses(rows)
    return "\n".join(["Where others are faster:", *(f"  {line}" for line in lines or ["nowhere on these shapes"])])


def _exponents(rows: Sequence[Row]) -> str:
    """Write the exponents of time in positions."""
    cells = [(f"scaling: {scaling.SETTING}, 1 thread", "positions", f"exponent, last {scaling.LAST}")]
    for name, curve in scaling.curves(rows).items():
        cells.append((name, f"{curve.positions[0]:,} to {curve.positions[-1]:,}", f"{curve.exponent:.2f}"))
    return "\n".join(report.aligned(cells))


def _write(
    out: Path,
    name: str,
    where: dict[str, str],
    rows: Sequence[Row],
    found: dict[str, scaling.Curve],
    text: str,
    **more: Any,
) -> None:
    """Write all files, then print what they say."""
    files = {
        f"{name}.txt": f"{text}\n".encode(),
        f"{name}.csv": report.as_csv(rows),
        f"{name}.json": report.as_json(
            where, rows, scaling={key: curve._asdict() for key, curve in found.items()}, **more
        ),
    }
    if found:
        title = f"One thread, {where['processor']}, torch {where['torch']}, {where['date']}"
        try:
            files[f"{name}-scaling.png"] = png_bytes(scaling.plot(found, title))
        except MissingPackageError as cause:
            text = f"{text}\n\nno plot: {cause}"
    written = write_files(out, files)
    print(text)
    print("\nwritten:", *(f"  {path}" for path in written), sep="\n")
