"""Searching: a law tried on drawn cases, until one breaks it and is made small."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tensorattn.attend.optional import require
from tensorattn.testing import Subject
from tensorattn.verify.statement import Law, st

__all__ = ["Failure", "search", "try_once"]

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


@dataclass
class _Last:
    """The case tried last, with what the law drew, and how many were tried."""

    case: Any = None
    drawn: Sequence[Any] = ()
    count: int = 0

    def attempt(self, law: Law, subject: Subject, case: Any, draw: Any) -> None:
        """Try the law on a case, and keep what it draws."""
        drawn: list[Any] = []
        self.case, self.drawn, self.count = case, drawn, self.count + 1

        def keep(strategy: Any) -> Any:
            drawn.append(draw(strategy))
            return drawn[-1]

        law(subject, case, keep)


def search(
    law: Law, subject: Subject, strategy: Any, *, examples: int, seed: int, shrink: bool = True
) -> tuple[int, Failure | None]:
    """Try a law on drawn cases.

    Args:
        law: What must hold of each.
        subject: What it is tried for.
        strategy: Cases.
        examples: Number of cases.
        seed: Moves them.
        shrink: Whether to make a failing case small.

    Returns:
        Number of cases tried, and the smallest one that breaks the law, or None.
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
        last.attempt(law, subject, case, data.draw)

    test = hypothesis.given(case=strategy, data=st.data())(run)
    return _verdict(hypothesis.seed(seed)(chosen(test)), last)


def try_once(law: Law, subject: Subject, case: Any) -> tuple[int, Failure | None]:
    """Try a law that draws nothing on one case.

    Args:
        law: What must hold.
        subject: What it is tried for.
        case: The case.

    Returns:
        One, and the case if it breaks the law, or None.
    """
    last = _Last()
    return _verdict(lambda: last.attempt(law, subject, case, None), last)


def _verdict(run: Callable[[], None], last: _Last) -> tuple[int, Failure | None]:
    """Run, and tell an error of whatever kind: an operator that raises has not kept its word either."""
    try:
        run()
    except Exception as cause:
        message = str(cause) if isinstance(cause, AssertionError) else f"{type(cause).__name__}: {cause}"
        return last.count, Failure(message, last.case, last.drawn)
    return last.count, None
