"""The command `bench`: which operator is fast, and what it takes, on your shape and your device, after parity."""

from __future__ import annotations

import argparse
import csv
import functools
import io
import itertools
import json
import math
import shlex
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tensorattn.cli import gain, plots
from tensorattn.cli.common import (
    Choice,
    MissingPackageError,
    aligned,
    check_directory,
    parse_choices,
    png_bytes,
    positive,
    progress,
    write_files,
)
from tensorattn.cli.contenders import FULL, Contender, Runner, Work, contenders
from tensorattn.cli.plots import digits
from tensorattn.cli.timing import find_device, interleaved, machine, memory, one_thread
from tensorattn.cli.traffic import traffic
from tensorattn.diagnose.cost import DTYPES, LAYOUTS, cost
from tensorattn.errors import OptionError
from tensorattn.functional import OPERATORS

__all__ = ["Phase", "Row", "add_arguments", "answer", "examine", "run"]

SHAPES = ("8,14,14,64", "8,56,56,96", "1,16,40,40,64")
CUBES = "8,16,24,32,48,64"
CHANNELS = 8  # of each head in a cube
TOLERANCES = {"float64": 1e-9, "float32": 1e-3, "bfloat16": 5e-2, "float16": 1e-2}  # of the largest entry
LIMITS = {"cpu": 100, "cuda": 10_000, "mps": 2_000}  # GFLOP of a forward pass, of seconds where devices are slow
BESIDE_GAIN = ("gain", "operator", "repeats", "device")  # options that have a meaning there

DESCRIPTION = """\
Time, memory and FLOPs of the layer of each operator on your shape and your device, forwards and in training, beside
full, pooled and axial attention in plain PyTorch (linear maps, scaled_dot_product_attention, a linear map).

Every layer is first compared with the definition of its operator in float64, outputs and gradients; whoever fails is
not timed. Times are medians of runs in turn: CPU time of one thread, or wall time of a GPU, synchronised.

Writes the tables, the same as CSV and JSON, and a figure.
"""
NOTES = (
    "× full: how many times as fast as full attention. MB: most memory in tensors at once, beyond input and "
    "parameters, with the results. GFLOP: as tensorattn.cost counts them. parity: largest error of outputs and "
    "gradients against float64, as a share of the largest entry. ±: half the distance of the quartiles.",
    "How close an operator comes to full attention depends on the data: python -m tensorattn attend FILE.",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command.

    Args:
        parser: The parser of the command.
    """
    parser.description, add = DESCRIPTION, parser.add_argument
    add("--shape", action="append", metavar="B,n_1,...,n_N,C", help=f"may be given again (default {' '.join(SHAPES)})")
    add(
        "--operator",
        action="append",
        metavar="NAME[:OPTION=VALUE]",
        help=f"this one only; may be given again: {', '.join(OPERATORS)}",
    )
    add("--device", default="cpu", help="cpu, cuda, cuda:1 or mps (default cpu)")
    add("--dtype", default="float32", help=f"{', '.join(DTYPES)} (default float32)")
    add("--layout", default="channels_last", help=f"{', '.join(LAYOUTS)} or both (default channels_last)")
    add("--heads", type=positive, default=4, help="heads (default 4)")
    add("--peers", action="store_true", help="layers of other packages too, of the extra bench")
    add("--plain", action="store_true", help="each operator in a few lines of plain PyTorch too")
    add("--compile", action="store_true", help="each operator compiled by torch.compile too")
    add("--repeats", type=positive, default=5, help="samples of each time (default 5)")
    add("--limit", type=positive, metavar="GFLOP", help=f"a layer that takes more is not run (default {_limits()})")
    add("--cubes", nargs="?", const=CUBES, metavar="SIZES", help=f"time against positions, on cubes ({CUBES})")
    add("--gain", action="store_true", help="what full attention takes longer than operators, on grids of known models")
    add("--world", type=positive, default=1, help="processes that share each tensor out: count what they send")
    add("--out", type=Path, default=Path("bench-out"), help="directory of the files (bench-out)")


def _limits() -> str:
    """The limits of devices in words."""
    return ", ".join(f"{limit:,} on {kind}" for kind, limit in LIMITS.items())


# ---- what is measured ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Phase:
    """What a pass took: forwards without gradients, or forwards and backwards.

    Attributes:
        seconds: Median of its times.
        spread: Half the distance of their quartiles.
        flops: Operations, as `tensorattn.cost` counts them.
        peak: Most bytes at once beyond input and parameters; None if compiled.
        calls: Kernel calls; None if compiled.
    """

    seconds: float
    spread: float
    flops: int
    peak: int | None = None
    calls: int | None = None


@dataclass(frozen=True)
class Row:
    """What became of one contender on one tensor.

    Attributes:
        work: The tensor.
        name: The contender.
        group: Whose it is.
        error: How far it is from its definition; None if it did not run.
        forward: Its pass without gradients; None unless parity holds.
        training: Its pass with gradients, likewise.
        note: Why something is missing.
    """

    work: Work
    name: str
    group: str = ""
    error: float | None = None
    forward: Phase | None = None
    training: Phase | None = None
    note: str = ""


def steps(who: Sequence[Contender], repeats: int) -> int:
    """Number of steps that `examine` tells."""
    return 2 * len(who) + 1 + repeats


@one_thread()
def examine(
    work: Work,
    who: Sequence[Contender],
    *,
    repeats: int,
    limit: float | None = None,
    whole: bool = True,
    started: Callable[[str], Any] = lambda words: None,
) -> list[Row]:
    """Check, time and measure contenders on one tensor, on one thread.

    Args:
        work: The tensor.
        who: Who works on it.
        repeats: Samples of each time.
        limit: GFLOP of a forward pass above which a layer is not run; by default that of the device.
        whole: Whether training and memory are part of it; otherwise only the time of a forward pass.
        started: Called with words for each step when it starts.

    Returns:
        A row for each contender. Who fails parity has no time.
    """
    device, passes = torch.device(work.device), ("forward", "training") if whole else ("forward",)
    x, most = work.tensor().requires_grad_(), LIMITS[device.type] if limit is None else limit
    gradient = work.place(torch.randn(x.shape, generator=torch.Generator().manual_seed(2)))
    rows, runners = {}, {}
    for each in who:
        started(f"parity on {work}")
        note, runner, error = each.absence(work), None, None
        if not note:
            runner = Runner(each, work, x, gradient)
            note, error = _checked(runner, most, TOLERANCES[work.dtype], training=whole)
        rows[each.name] = Row(work, each.name, each.group, error, note=note)
        if runner is not None and not note:
            runners[each.name] = runner
    calls = {f"{name} {kind}": getattr(runner, kind) for name, runner in runners.items() for kind in passes}
    telling = functools.partial(started, f"time on {work}")
    times = interleaved(calls, repeats=repeats, before=x.detach().sum, device=device, started=telling)
    for name, runner in runners.items():
        started(f"memory on {work}")
        phases: dict[str, Any] = {}
        for kind in passes:
            runner.clear()
            counted = memory(getattr(runner, kind), device) if whole and not runner.who.compiled else ()
            phases[kind] = Phase(*times[f"{name} {kind}"], runner.cost(kind).flops, *counted)
        runner.clear()
        rows[name] = replace(rows[name], **phases)
    return list(rows.values())


def _checked(runner: Runner, limit: float, tolerance: float, *, training: bool) -> tuple[str, float | None]:
    """Say why a contender is not timed, or nothing, and how far it is from its definition."""
    if (needed := runner.cost("forward").flops / 1e9) > limit:
        return f"not run: a forward pass takes {needed:,.0f} GFLOP, --limit is {limit:,.0f}", None
    try:
        error = runner.parity(training=training)
    except (torch.OutOfMemoryError, NotImplementedError) as cause:
        runner.clear()
        return textwrap.shorten(f"not run: {cause}", 110), None
    passed = error <= tolerance  # not so if it is not a number
    return "" if passed else f"parity fails, error {error:.0e} above {tolerance:.0e}: not timed", error


def curves(rows: Sequence[Row]) -> dict[str, plots.Curve]:
    """Turn rows of growing size into one curve for each contender that has times."""
    timed = [(row.name, row.work.positions, row.forward.seconds) for row in rows if row.forward is not None]
    points = {name: sorted(point[1:] for point in timed if point[0] == name) for name, *_ in timed}
    return {name: plots.Curve(*zip(*found, strict=True)) for name, found in points.items()}


# ---- what is told --------------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> list[str]:
    """Write what was measured on one tensor as the lines of a table, with the answer below.

    Args:
        rows: One for each contender.
    """
    work = rows[0].work
    full = next((row for row in rows if row.name == FULL), None)
    cells: list[tuple[str, ...]] = [
        ("", *("forward", "", "", ""), *("training", "", "", ""), "parity"),
        ("", *(("ms", "× full", "MB", "GFLOP") * 2), "error"),
    ]
    for group, members in itertools.groupby(rows, key=lambda row: row.group):
        cells.append((group,))
        for row in members:
            if row.note:
                cells.append((f"  {row.name}: {row.note}",))
                continue
            told = [_told(getattr(row, kind), getattr(full, kind, None)) for kind in ("forward", "training")]
            cells.append((f"  {row.name}", *told[0], *told[1], f"{row.error:.0e}"))
    title = f"{work}: {work.positions:,} positions, {digits(work.bytes / 1e6)} MB"
    return [title, "", *aligned(cells), "", *textwrap.wrap(answer(rows), 110, subsequent_indent="  ")]


def _told(phase: Phase | None, full: Phase | None) -> tuple[str, ...]:
    """Write a pass: milliseconds, how many times as fast as full attention, megabytes, GFLOP."""
    if phase is None:
        return ("-",) * 4
    time = f"{digits(1e3 * phase.seconds)} ±{100 * phase.spread / max(phase.seconds, 1e-12):2.0f}%"
    faster = "-" if full is None else digits(full.seconds / phase.seconds)
    return time, faster, "-" if phase.peak is None else digits(phase.peak / 1e6), digits(phase.flops / 1e9)


def answer(rows: Sequence[Row]) -> str:
    """Say in a sentence who is fastest on a tensor: all whose quartiles meet those of the smallest median.

    Args:
        rows: One for each contender on the tensor.

    Examples:
        >>> work = Work(1, (14, 14), 64)
        >>> answer([Row(work, "additive", forward=Phase(2e-3, 0, 1)), Row(work, FULL, forward=Phase(8e-3, 0, 1))])
        'Fastest here: forwards additive (4.00 × full attention).'
    """
    full, said = next((row for row in rows if row.name == FULL), None), []
    for kind, words in (("forward", "forwards"), ("training", "in training")):
        timed = {row.name: getattr(row, kind) for row in rows if getattr(row, kind) is not None}
        if not timed:
            continue
        best = min(timed.values(), key=lambda phase: phase.seconds)
        names = [name for name, each in timed.items() if each.seconds - each.spread <= best.seconds + best.spread]
        whole = getattr(full, kind, None)
        gain = "" if whole is None else " (nothing is gained)"
        if whole is not None and FULL not in names:
            gain = f" ({digits(whole.seconds / best.seconds)} × full attention)"
        said.append(f"{words} {' and '.join(names)}{gain}")
    beside = "" if full is not None and full.forward is not None else " Full attention was not timed."
    return f"Fastest here: {', '.join(said)}.{beside}" if said else "Nothing was timed."


def _sent(work: Work, choices: Sequence[Choice], world: int) -> list[str]:
    """What each operator sends where processes share a tensor out."""
    layers = [(choice.label, choice.record.name, dict(choice.options)) for choice in choices]
    headings, *rows = traffic(work.batch, work.sizes, work.dim, work.heads, DTYPES[work.dtype], layers, world)
    return aligned([headings, (str(work),), *rows])


def _record(row: Row) -> dict[str, Any]:
    """Plain numbers and words by name."""
    record = {"contender": row.name, "group": row.group, **asdict(row.work)}
    record |= {"sizes": "x".join(map(str, row.work.sizes)), "error": row.error}
    for kind in ("forward", "training"):
        phase = getattr(row, kind)
        record |= {f"{kind}_{name}": getattr(phase, name, None) for name in Phase.__dataclass_fields__}
    return {**record, "note": row.note}


def _as_csv(records: Sequence[Mapping[str, Any]]) -> bytes:
    """Write records as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue().encode()


def _figures(
    rows: Sequence[Row], found: Mapping[str, plots.Curve], cubes: Sequence[Work], title: str
) -> dict[str, bytes]:
    """Draw what was measured; nothing where nothing was."""
    groups: dict[str, list[plots.Bar]] = {}
    for row in rows:
        if row.forward and row.training:
            peaks = [math.nan if each.peak is None else each.peak / 1e6 for each in (row.forward, row.training)]
            bar = plots.Bar(row.name, 1e3 * row.forward.seconds, 1e3 * row.training.seconds, *peaks)
            groups.setdefault(str(row.work), []).append(bar)
    files = {"bench.png": png_bytes(plots.bars(groups, title))} if groups else {}
    if found:
        one = cubes[0]
        setting = f"cubes, {one.dim} channels, {one.heads} heads, {one.dtype}, {one.layout.replace('_', ' ')}"
        files["bench-scaling.png"] = png_bytes(plots.growth(found, setting, title))
    return files


# ---- the command ---------------------------------------------------------------------------------------------


def _parse_shape(text: str) -> tuple[int, tuple[int, ...], int]:
    """Read a shape ``B,n_1,…,n_N,C``."""
    try:
        batch, *sizes, dim = (int(number) for number in text.split(","))
    except ValueError:
        raise OptionError(f"--shape must be B,n_1,...,n_N,C in whole numbers, got {text!r}.") from None
    if not sizes or min(batch, dim, *sizes) < 1:
        raise OptionError(f"--shape must be B,n_1,...,n_N,C with at least one mode and no size below 1, got {text!r}.")
    return batch, tuple(sizes), dim


def _parse_cubes(text: str | None) -> list[int]:
    """Read the sizes of the cubes."""
    try:
        sizes = [int(number) for number in text.split(",")] if text is not None else []
        if min(sizes, default=1) >= 1:
            return sizes
    except ValueError:
        pass
    raise OptionError(f"--cubes must be whole numbers of at least 1, got {text!r}.")


def _works(arguments: argparse.Namespace) -> tuple[list[Work], list[Work]]:
    """Read the tensors to work on, and the cubes."""
    device, heads = str(find_device(arguments.device)), arguments.heads
    for name, known in (("dtype", tuple(DTYPES)), ("layout", (*LAYOUTS, "both"))):
        if getattr(arguments, name) not in known:
            raise OptionError(f"--{name} must be one of {', '.join(known)}, got {getattr(arguments, name)!r}.")
    if device == "mps" and arguments.dtype == "float64":
        raise OptionError("--dtype float64 is not there on mps.")
    if device != "cpu" and arguments.world > 1:
        raise OptionError(f"--world counts what processes on the CPU send; --device {device} has no meaning beside it.")
    layouts = LAYOUTS if arguments.layout == "both" else (arguments.layout,)
    told: dict[str, Any] = {"heads": heads, "dtype": arguments.dtype, "device": device}
    works = []
    for text in arguments.shape or SHAPES:
        batch, sizes, dim = _parse_shape(text)
        if dim % heads:
            raise OptionError(f"--heads must divide the channels, but {heads} do not divide {dim} of {text}.")
        if arguments.world > sizes[0]:
            cut = f"--world {arguments.world} processes cut the first mode, but it has size {sizes[0]} in {text}."
            raise OptionError(cut)
        works += [Work(batch, sizes, dim, layout=layout, **told) for layout in layouts]
    edges = _parse_cubes(arguments.cubes)
    return works, [Work(1, (edge,) * 3, CHANNELS * heads, layout=layouts[0], **told) for edge in edges]


def _changed(arguments: argparse.Namespace) -> dict[str, Any]:
    """Options that are not those by default."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    defaults = vars(parser.parse_args([]))
    return {name: value for name, value in vars(arguments).items() if name in defaults and value != defaults[name]}


def _command(arguments: argparse.Namespace) -> str:
    """Write the command with the arguments that decide."""
    words = ["python", "-m", "tensorattn", "bench"]
    for name, value in _changed(arguments).items():
        for each in [] if name == "out" else value if isinstance(value, list) else [value]:
            words += [f"--{name}"] if each is True else [f"--{name}", str(each)]
    return shlex.join(words)


def run(arguments: argparse.Namespace) -> int:
    """Run the command.

    Args:
        arguments: What the parser read.

    Returns:
        The exit status.
    """
    device = find_device(arguments.device)
    where = {"command": _command(arguments), **machine(device)}
    if arguments.gain:
        if without := [name for name in _changed(arguments) if name not in BESIDE_GAIN]:
            raise OptionError(f"--gain has grids and settings of its own: --{without[0]} has no meaning beside it.")
        return gain.run(arguments.operator, arguments.repeats, device, where)
    check_directory(arguments.out)
    works, cubes = _works(arguments)
    choices = parse_choices(arguments.operator or OPERATORS)
    for choice, work in itertools.product(choices, works):  # refuses options that have no meaning for a shape
        cost(choice.record.name, work.sizes, dim=work.dim, num_heads=work.heads, **choice.options)
    who = contenders(choices, peers=arguments.peers, plain=arguments.plain, compiled=arguments.compile)
    options = {"repeats": arguments.repeats, "limit": arguments.limit}
    with progress((len(works) + len(cubes)) * steps(who, arguments.repeats), unit="step") as started:
        groups = [examine(work, who, **options, started=started) for work in works]
        growing = [row for work in cubes for row in examine(work, who, **options, whole=False, started=started)]
    parts = [[f"{name}: {words}" for name, words in where.items()], *map(table, groups)]
    parts += [_sent(work, choices, arguments.world) for work in works if arguments.world > 1]
    found, rows = curves(growing), [row for group in groups for row in group]
    if found:
        exponents = [("time against positions, on cubes", "positions", f"exponent, last {plots.FITTED}")]
        for name, curve in found.items():
            exponents.append((name, f"{curve.positions[0]:,} to {curve.positions[-1]:,}", f"{curve.exponent:.2f}"))
        parts.append(aligned(exponents))
    parts.append([textwrap.fill(note, 110, subsequent_indent="  ") for note in NOTES])
    text = "\n\n".join("\n".join(part) for part in parts)
    records = [_record(row) for row in (*rows, *growing)]
    shown = {"machine": where, "rows": records, "scaling": {name: curve._asdict() for name, curve in found.items()}}
    files = {
        "bench.txt": f"{text}\n".encode(),
        "bench.csv": _as_csv(records),
        "bench.json": (json.dumps(shown, indent=1) + "\n").encode(),
    }
    try:
        title = f"{where['device']}; {where['processor']}; torch {torch.__version__}, {where['date']}"
        files |= _figures(rows, found, cubes, title)
    except MissingPackageError as cause:
        text = f"{text}\n\nno plot: {cause}"
    written = write_files(arguments.out, files)
    print(text)
    print("\nwritten:", *(f"  {path}" for path in written), sep="\n")
    return 0
