"""Searching: a law tried on drawn cases, until one breaks it and is made small."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tensorattn.attend.optional import require
from tensorattn.verify.statement import Law, Watched, st

__all__ = ["Failure", "Found", "search", "try_once"]

hypothesis = require("hypothesis", extra="verify", purpose="the command verify")


@dataclass(frozen=True)
class Failure:
    """A case that breaks a law.

    Attributes:
        message: What was found, in a sentence.
        case: The case.
        drawn: What the law drew, in order.
    """

    message: str
    case: Any
    drawn: Sequence[Any]


@dataclass(frozen=True)
class Found:
    """What trying a law came to.

    Attributes:
        cases: Number of cases that it made a comparison on.
        skipped: Number of cases that it made none on, as they do not meet what it supposes.
        failure: The smallest case that breaks it, or None.
    """

    cases: int
    skipped: int
    failure: Failure | None


@dataclass
class _Last:
    """The case tried last, with what the law drew, and how many were tried."""

    case: Any = None
    drawn: Sequence[Any] = ()
    cases: int = 0
    skipped: int = 0

    def attempt(self, law: Law, subject: Watched, case: Any, draw: Any) -> bool:
        """Try the law on a case, and keep what it draws; whether it compared anything."""
        drawn: list[Any] = []
        self.case, self.drawn = case, drawn

        def keep(strategy: Any) -> Any:
            drawn.append(draw(strategy))
            return drawn[-1]

        before = subject.record.made
        try:
            law(subject, case, keep)
        except Exception as cause:
            self.cases += not isinstance(cause, hypothesis.errors.HypothesisException)  # nor what stops a draw
            raise
        compared = subject.record.made > before
        self.cases, self.skipped = self.cases + compared, self.skipped + (not compared)
        return compared


def search(law: Law, subject: Watched, strategy: Any, *, examples: int, seed: int, shrink: bool = True) -> Found:
    """Try a law on drawn cases. In place of one on which it compares nothing, another one is drawn.

    Args:
        law: What must hold of each.
        subject: What it is tried for.
        strategy: Cases.
        examples: Number of cases.
        seed: Moves them.
        shrink: Whether to make a failing case small.

    Returns:
        How many cases were tried, and the smallest one that breaks the law.
    """
    last = _Last()
    phases = [hypothesis.Phase.generate, *([hypothesis.Phase.shrink] if shrink else [])]

    chosen = hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=False,
        print_blob=False,
        report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=phases,
    )

    def run(case: Any, data: Any) -> None:
        hypothesis.assume(last.attempt(law, subject, case, data.draw))

    test = hypothesis.given(case=strategy, data=st.data())(run)
    return _verdict(hypothesis.seed(seed)(chosen(test)), last)


def try_once(law: Law, subject: Watched, case: Any) -> Found:
    """Try a law that draws nothing on one case.

    Args:
        law: What must hold.
        subject: What it is tried for.
        case: The case.

    Returns:
        One case, which is the failure if it breaks the law.
    """
    last = _Last()
    return _verdict(lambda: last.attempt(law, subject, case, None), last)


def _verdict(run: Callable[[], Any], last: _Last) -> Found:
    """Run, and tell an error of whatever kind: an operator that raises has not kept its word either."""
    failure = None
    try:
        run()
    except hypothesis.errors.Unsatisfiable:
        pass  # too few cases, or none, on which the law compares anything: their number tells
    except Exception as cause:
        message = str(cause) if isinstance(cause, AssertionError) else f"{type(cause).__name__}: {cause}"
        failure = Failure(message, last.case, last.drawn)
    return Found(last.cases, last.skipped, failure)
