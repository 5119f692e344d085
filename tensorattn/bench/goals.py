"""Goals: what is to be reached, in units of one read, one copy, or of another contender; and the verdicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from tensorattn.bench.contenders import contender
from tensorattn.bench.examine import Row, examine
from tensorattn.bench.report import aligned
from tensorattn.bench.scaling import curves
from tensorattn.bench.workload import LAYOUTS, Workload

__all__ = ["GOALS", "SCALED", "Goal", "Outcome", "Piece", "as_records", "carry_out", "judge", "pieces", "verdicts"]

LARGE = (  # beyond the caches, 48 MB and more
    Workload(1, (512, 512), 64),
    Workload(1, (32, 112, 112), 64),
    Workload(1, (16, 24, 32, 32), 32),
    Workload(1, (12, 12, 12, 12, 12), 64),
)
MEDIUM = (Workload(4, (56, 56), 96), Workload(8, (56, 56), 96), Workload(1, (8, 24, 24, 24), 32))
HALF = (Workload(1, (512, 512), 64, dtype="bfloat16"), Workload(1, (32, 112, 112), 64, dtype="bfloat16"))
ATTENDED = (Workload(1, (448, 448), 64), Workload(1, (32, 112, 112), 64), Workload(1, (16, 24, 32, 32), 32))
CUBES = tuple(Workload(1, (size,) * 3, 32) for size in (32, 48, 64, 96))
TRAINED = (Workload(1, (32, 112, 112), 64),)
FLAT = Workload(1, (16, 64, 64), 64)  # 65 536 positions
PLAIN, AXIAL, FLAT_SDPA = "linear-SDPA-linear", "axial by SDPA", "flattened SDPA, 1/64 of the queries"


Lookup = Callable[[Workload, str], Row]  # the row of a contender on a workload
Works = tuple[Workload, ...]
Numbers = list[tuple[str, float]]  # one number for each case, with the case in words


@dataclass(frozen=True)
class Goal:
    """A goal.

    Attributes:
        title: What it is about.
        unit: What its numbers are in.
        limits: By number of threads, what is to be reached.
        stretch: What would be better still, if anything.
        works: Workloads that it is about.
        names: Contenders that it needs.
        numbers: From the rows to one number a case, of which the worst counts.
        at_least: Whether numbers are to be at least the limit; at most, otherwise.
        memory: Whether it needs the memory of the contenders.
    """

    title: str
    unit: str
    limits: Mapping[int, float]
    stretch: float | None
    works: Works
    names: tuple[str, ...]
    numbers: Callable[[Goal, Lookup], Numbers]
    at_least: bool = False
    memory: bool = False

    def meets(self, value: float, limit: float) -> bool:
        """Tell whether a number is good enough; one that is missing is not.

        Args:
            value: The number.
            limit: What is to be reached.
        """
        return value >= limit if self.at_least else value <= limit


class Outcome(NamedTuple):
    """The numbers of a goal on some threads.

    Attributes:
        goal: The goal.
        threads: Number of threads.
        numbers: One number a case.
    """

    goal: Goal
    threads: int
    numbers: Numbers

    @property
    def worst(self) -> tuple[str, float]:
        """The worst case and its number; one that is missing is worst of all."""
        sign = -1 if self.goal.at_least else 1
        return max(self.numbers, key=lambda pair: (math.isnan(pair[1]), sign * pair[1]))

    @property
    def verdict(self) -> str:
        """Whether it was reached."""
        _, value = self.worst
        if self.goal.stretch is not None and self.goal.meets(value, self.goal.stretch):
            return "stretch"
        return "reached" if self.goal.meets(value, self.goal.limits[self.threads]) else "NOT REACHED"


def _ratios(goal: Goal, row: Lookup) -> Numbers:
    """Time of every contender but the last as a multiple of that of the last, or how many times as fast it is."""
    *ours, other = goal.names
    found = []
    for work in goal.works:
        for name in ours:
            ratio = row(work, name).seconds / row(work, other).seconds
            found.append((f"{name} on {work}", 1 / ratio if goal.at_least else ratio))
    return found


def _extra(goal: Goal, row: Lookup, *, free: float = 0.0) -> Numbers:
    """Extra memory as a share of the tensor, some bytes being free."""
    found = []
    for work in goal.works:
        for name in goal.names:
            peak = row(work, name).peak
            extra = math.nan if peak is None or peak.extra is None else peak.extra
            found.append((f"{name} on {work}", max(0.0, extra - free) / work.bytes if extra == extra else extra))
    return found


def _overhead(goal: Goal, row: Lookup) -> Numbers:
    """Microseconds more than another."""
    ours, other = goal.names
    return [(str(work), 1e6 * (row(work, ours).seconds - row(work, other).seconds)) for work in goal.works]


def _exponents(goal: Goal, row: Lookup) -> Numbers:
    """Exponent of time in positions, a layout."""
    found = []
    for layout in LAYOUTS:
        rows = [row(work, goal.names[0]) for work in goal.works if work.layout == layout]
        exponent = curves(rows)[goal.names[0]].exponent if all(each.timed for each in rows) else math.nan
        found.append(
            (
                f"{layout.replace('_', ' ')}, {rows[0].workload.positions:,} to "
                f"{rows[-1].workload.positions:,} positions",
                exponent,
            )
        )
    return found


def _both(works: Sequence[Workload], *, skip: bool = False, into: bool = False, backward: bool = False) -> Works:
    """Every workload in both layouts."""
    return tuple(
        replace(work, layout=layout, skip=skip, into=into, backward=backward) for work in works for layout in LAYOUTS
    )


KAO = ("kao_kv", "additive")
SCALED = tuple(replace(work, layout=LAYOUTS[0]) for work in CUBES)  # what is drawn
GOALS = (
    Goal("all averages, orders 2-5", "R", {1: 2.2, 2: 2.5}, 1.5, _both(LARGE), ("averages", "read"), _ratios),
    Goal("all averages, from 4 MB", "R", {1: 3.0, 2: 3.0}, 1.5, _both(MEDIUM), ("averages", "read"), _ratios),
    Goal("all averages, bfloat16 in, float32 out", "R", {1: 2.7}, 1.6, _both(HALF), ("averages", "read"), _ratios),
    Goal(
        "outer sum with skip, into out",
        "M",
        {1: 1.55, 2: 1.8},
        1.1,
        _both(LARGE, skip=True, into=True),
        ("outer sum", "copy"),
        _ratios,
    ),
    Goal("outer sum, into out", "M", {1: 1.1, 2: 1.2}, 0.9, _both(LARGE, into=True), ("outer sum", "copy"), _ratios),
    Goal(
        "kao_qkv forward with skip, into out",
        "M",
        {1: 2.6, 2: 3.2},
        1.75,
        _both(LARGE, skip=True, into=True),
        ("kao_qkv", "copy"),
        _ratios,
    ),
    Goal(
        "kao_qkv forward with skip, fresh output",
        "Ma",
        {1: 1.7, 2: 1.9},
        None,
        _both(LARGE, skip=True),
        ("kao_qkv", "fresh copy"),
        _ratios,
    ),
    Goal(
        "kao_qkv forward and backward with skip",
        "Ma",
        {1: 3.2, 2: 3.5},
        2.6,
        _both(LARGE, skip=True, backward=True),
        ("kao_qkv", "fresh copy"),
        _ratios,
    ),
    Goal(
        "extra memory of kao_qkv beyond 8 MB",
        "|X|",
        {1: 0.05},
        0.0,
        (*_both(LARGE, skip=True), *_both(LARGE, skip=True, backward=True)),
        ("kao_qkv",),
        partial(_extra, free=8e6),
        memory=True,
    ),
    Goal("forward against linear-SDPA-linear", "x its time", {1: 1.0}, 0.8, _both(ATTENDED), (*KAO, PLAIN), _ratios),
    Goal("extra memory forward", "|X|", {1: 0.08}, None, _both(ATTENDED), KAO, _extra, memory=True),
    Goal("additive against kao_kv", "x its time", {1: 1.3}, 1.1, _both(ATTENDED), ("additive", "kao_kv"), _ratios),
    Goal(
        "against axial by SDPA, order 2",
        "x as fast",
        {1: 1.3},
        5.0,
        _both(ATTENDED[:1]),
        (*KAO, AXIAL),
        _ratios,
        at_least=True,
    ),
    Goal(
        "against axial by SDPA, orders 3 and 4",
        "x as fast",
        {1: 3.0},
        5.0,
        _both(ATTENDED[1:]),
        (*KAO, AXIAL),
        _ratios,
        at_least=True,
    ),
    Goal(
        "training against linear-SDPA-linear",
        "x its time",
        {1: 1.2},
        None,
        _both(TRAINED, backward=True),
        (*KAO, PLAIN),
        _ratios,
    ),
    Goal("extra memory in training", "|X|", {1: 0.2}, None, _both(TRAINED, backward=True), KAO, _extra, memory=True),
    Goal(
        "kao_kv against flattened SDPA, 65 536 positions",
        "x as fast",
        {1: 100.0},
        None,
        _both((FLAT,)),
        ("kao_kv", FLAT_SDPA),
        _ratios,
        at_least=True,
    ),
    Goal(
        "kao_qkv against flattened SDPA, 65 536 positions",
        "x as fast",
        {1: 2000.0},
        None,
        _both((FLAT,)),
        ("kao_qkv", FLAT_SDPA),
        _ratios,
        at_least=True,
    ),
    Goal("scaling exponent of kao_qkv, order 3", "", {1: 1.0}, None, _both(CUBES), ("kao_qkv",), _exponents),
    Goal("scaling exponent of kao_kv, order 3", "", {1: 1.35}, None, _both(CUBES), ("kao_kv",), _exponents),
    Goal(
        "small input: kao_qkv more than plain operations",
        "µs",
        {1: 60.0},
        None,
        _both((Workload(1, (14, 14), 64),)),
        ("kao_qkv", "naive kao_qkv"),
        _overhead,
    ),
)


class Piece(NamedTuple):
    """What is examined at once: all contenders of all goals on one workload.

    Attributes:
        workload: The workload.
        names: The contenders.
        threads: Numbers of threads.
        memory: Whether memory is measured.
    """

    workload: Workload
    names: tuple[str, ...]
    threads: tuple[int, ...]
    memory: bool


def pieces(goals: Sequence[Goal]) -> list[Piece]:
    """Collect what the goals need, each workload once.

    Args:
        goals: The goals.

    Returns:
        What is to be examined.
    """
    works = dict.fromkeys(work for goal in goals for work in goal.works)
    found = []
    for work in works:
        wanting = [goal for goal in goals if work in goal.works]
        names = tuple(dict.fromkeys(name for goal in wanting for name in goal.names))
        threads = tuple(sorted({count for goal in wanting for count in goal.limits}))
        found.append(Piece(work, names, threads, any(goal.memory for goal in wanting)))
    return found


def carry_out(
    goals: Sequence[Goal], *, repeats: int, started: Callable[[str], object]
) -> tuple[list[Row], list[Outcome]]:
    """Measure all that the goals need, and judge them.

    Args:
        goals: The goals.
        repeats: Samples of each time.
        started: Called with words for each piece of work.

    Returns:
        The rows, and the numbers of each goal.
    """
    rows: list[Row] = []
    for piece in pieces(goals):
        who = [contender(name) for name in piece.names]
        rows += examine(
            piece.workload, who, threads=piece.threads, repeats=repeats, memory=piece.memory, started=started
        )
    return rows, judge(goals, rows)


def judge(goals: Sequence[Goal], rows: Sequence[Row]) -> list[Outcome]:
    """Work out the numbers of each goal.

    Args:
        goals: The goals.
        rows: What was measured.

    Returns:
        One outcome for each goal and number of threads.
    """
    known = {(row.workload, row.name, row.threads): row for row in rows}
    outcomes = []
    for goal in goals:
        for threads in sorted(goal.limits):

            def row(work: Workload, name: str, threads: int = threads) -> Row:
                return known[work, name, threads]

            outcomes.append(Outcome(goal, threads, goal.numbers(goal, row)))
    return outcomes


def as_records(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Return outcomes as plain numbers and words by name.

    Args:
        outcomes: The numbers.
    """
    return [
        {
            "goal": goal.title,
            "threads": threads,
            "unit": goal.unit,
            "limit": goal.limits[threads],
            "stretch": goal.stretch,
            "at_least": goal.at_least,
            "worst": outcome.worst[1],
            "verdict": outcome.verdict,
            "numbers": dict(numbers),
        }
        for outcome in outcomes
        for goal, threads, numbers in [outcome]
    ]


def verdicts(outcomes: Sequence[Outcome]) -> str:
    """Write the table of goals, and every number of those that are not reached.

    Args:
        outcomes: The numbers.

    Returns:
        The lines.
    """
    cells = [("goal", "on", "to reach", "stretch", "worst", "unit", "verdict")]
    missed = []
    for outcome in outcomes:
        goal, sign = outcome.goal, ">=" if outcome.goal.at_least else "<="
        stretch = "" if goal.stretch is None else f"{sign} {goal.stretch:g}"
        words = "1 thread, CPU" if outcome.threads == 1 else f"{outcome.threads} threads, wall"
        _, worst = outcome.worst
        limit = f"{sign} {goal.limits[outcome.threads]:g}"
        cells.append((goal.title, words, limit, stretch, f"{worst:.2f}", goal.unit, outcome.verdict))
        if outcome.verdict == "NOT REACHED":
            missed.append(f"{goal.title}, {words}, {limit} {goal.unit}:")
            missed += [f"  {value:.2f}  {case}" for case, value in outcome.numbers]
    reached = sum(outcome.verdict != "NOT REACHED" for outcome in outcomes)
    lines = [
        *aligned(cells, left=2),
        "",
        f"{reached} of {len(outcomes)} reached; each number is the worst of its cases.",
    ]
    return "\n".join([*lines, *(["", "Not reached, all cases:", *missed] if missed else [])])
