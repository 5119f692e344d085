"""Goals: what is to be reached, in units of one read, one copy, or of another contender; and the verdicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tensorattn.bench.contenders import contender
from tensorattn.bench.examine import Row, examine
from tensorattn.bench.report import aligned
from tensorattn.bench.workload import Workload

__all__ = [
    "Goal",
    "Lookup",
    "Numbers",
    "Outcome",
    "Piece",
    "Works",
    "as_records",
    "carry_out",
    "judge",
    "pieces",
    "verdicts",
]

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
        undisturbed: Whether all times that they come from are.
    """

    goal: Goal
    threads: int
    numbers: Numbers
    undisturbed: bool

    @property
    def worst(self) -> tuple[str, float]:
        """The worst case and its number; one that is missing is worst of all."""
        sign = -1 if self.goal.at_least else 1
        return max(self.numbers, key=lambda pair: (math.isnan(pair[1]), sign * pair[1]))

    @property
    def reached(self) -> bool:
        """Whether even the worst number is good enough."""
        return self.goal.meets(self.worst[1], self.goal.limits[self.threads])

    @property
    def verdict(self) -> str:
        """Whether it was reached, in words; with a mark where the machine was too busy to tell."""
        words = "reached" if self.reached else "NOT REACHED"
        if self.goal.stretch is not None and self.goal.meets(self.worst[1], self.goal.stretch):
            words = "stretch"
        return words if self.undisturbed else f"{words} !"


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
    """Collect what the goals need: what is compared is timed together, and each memory is measured once.

    Args:
        goals: The goals.

    Returns:
        What is to be examined.
    """
    found: dict[tuple[Workload, tuple[int, ...]], Piece] = {}
    for goal in sorted(goals, key=lambda goal: goal.memory):
        for work in goal.works:
            fits = [key for key, piece in found.items() if key[0] == work and set(goal.names) <= set(piece.names)]
            key = fits[0] if goal.memory and fits else (work, tuple(sorted(goal.limits)))
            known = found.get(key, Piece(work, (), key[1], False))
            names = tuple(dict.fromkeys((*known.names, *goal.names)))
            found[key] = Piece(work, names, known.threads, known.memory or goal.memory)
    return list(found.values())


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
            seen: list[Row] = []

            def row(work: Workload, name: str, threads: int = threads, seen: list[Row] = seen) -> Row:
                seen.append(known[work, name, threads])
                return seen[-1]

            numbers = goal.numbers(goal, row)
            calm = goal.memory or all(each.timed is None or each.timed.undisturbed for each in seen)
            outcomes.append(Outcome(goal, threads, numbers, calm))
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
            "undisturbed": calm,
            "numbers": dict(numbers),
        }
        for outcome in outcomes
        for goal, threads, numbers, calm in [outcome]
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
        if not outcome.reached:
            missed.append(f"{goal.title}, {words}, {limit} {goal.unit}:")
            missed += [f"  {value:.2f}  {case}" for case, value in outcome.numbers]
    reached = sum(outcome.reached for outcome in outcomes)
    lines = [
        *aligned(cells, left=2),
        "",
        f"{reached} of {len(outcomes)} reached; each number is the worst of its cases.",
    ]
    if any(not outcome.undisturbed for outcome in outcomes):
        lines.append("!: the machine was too busy for times on several threads; run it again when it is not.")
    return "\n".join([*lines, *(["", "Not reached, all cases:", *missed] if missed else [])])
