"""What a statement is: words, a formula, a law that every case obeys, and where its cases come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tensorattn.attend.optional import require
from tensorattn.testing import Case, Subject
from tensorattn.testing.cases import cases
from tensorattn.testing.definitions import Array, as_array

__all__ = [
    "THEOREM",
    "Asked",
    "Law",
    "Record",
    "Statement",
    "Watched",
    "called",
    "drawn_cases",
    "drawn_orders",
    "of_subject",
    "st",
]

st = require("hypothesis.strategies", extra="verify", purpose="the command verify")

Law = Callable[[Subject, Any, Any], None]  # of a subject, a case and a function that draws; raises AssertionError


@dataclass(frozen=True)
class Asked:
    """What the user asked for.

    Attributes:
        dtype: Type of the tensors.
        device: Device of the tensors.
        order: Number of modes; None for drawn ones.
        examples: Number of cases a statement and operator.
        seed: Moves the random cases.
    """

    dtype: torch.dtype = torch.float64
    device: str = "cpu"
    order: int | None = None
    examples: int = 16
    seed: int = 0

    @property
    def cases(self) -> dict[str, Any]:
        """The same as arguments of `cases`."""
        return {"dtype": self.dtype, "device": self.device, "order": self.order}


@dataclass(frozen=True)
class Statement:
    """A theorem that can be tried.

    Attributes:
        words: What it says, a clause.
        formula: The same as a formula.
        law: Raises AssertionError where a case breaks it.
        strategy: From what the user asked for and the subject to the strategy of its cases.
        share: Share of the examples that it takes.
        dtypes: From the type asked for to the types that it is tried in.
        double: Whether it is of float64 whatever the type.
        once: Whether its sizes are fixed: its only case is then a seed.
    """

    words: str
    formula: str
    law: Law
    strategy: Callable[[Asked, Subject], Any]
    share: float = 1.0
    dtypes: Callable[[torch.dtype], tuple[torch.dtype, ...]] = lambda dtype: (dtype,)
    double: bool = False
    once: bool = False


@dataclass
class Record:
    """What the comparisons of a statement came to.

    Attributes:
        worst: Largest error in units of its tolerance.
        made: Number of comparisons.
        shares: Tolerances in units of the size of what was compared, where that is known.
    """

    worst: float = 0.0
    made: int = 0
    shares: list[float] = field(default_factory=list)

    def add(self, error: float, tolerance: float, size: float) -> None:
        """Take note of the error of a comparison.

        Args:
            error: Largest difference.
            tolerance: Difference that is allowed.
            size: How large what is compared is; 0 where that is not known.
        """
        if error > 0:
            self.worst = max(self.worst, error / tolerance if tolerance > 0 else float("inf"))
        if size > 0:
            self.shares.append(tolerance / size)


@dataclass(frozen=True)
class Watched(Subject):
    """A subject whose comparisons are recorded.

    Attributes:
        record: Where they are.
    """

    record: Record = field(default_factory=Record, compare=False)

    def expect(self, holds: bool, statement: str, case: Case, found: str = "") -> None:
        """Record that something was looked at, and raise unless a statement holds.

        Args:
            holds: Whether it does.
            statement: The statement.
            case: Arguments for which it was tried.
            found: What was found instead.
        """
        self.record.made += 1
        super().expect(holds, statement, case, found)

    def _call(self, case: Case, *, return_lse: bool) -> tuple[Tensor, Any]:
        """Call the operator; that its results have the right form is not what a statement says."""
        before = self.record.made
        returned = super()._call(case, return_lse=return_lse)
        self.record.made = before
        return returned

    def expect_close(
        self,
        got: Tensor | Array,
        expected: Tensor | Array,
        tolerance: float,
        statement: str,
        case: Case,
        *,
        size: float | None = None,
    ) -> None:
        """Record how far two results are apart, and raise unless they agree.

        Args:
            got: Result.
            expected: What it should be.
            tolerance: Largest difference allowed.
            statement: What is checked, a clause.
            case: Arguments.
            size: How large what is compared is; by default as large as the two results.
        """
        left, right = as_array(got), as_array(expected)
        before = self.record.made
        if left.shape == right.shape and left.size:
            with np.errstate(invalid="ignore"):
                error = np.where(left == right, 0.0, np.abs(left - right))
            seen = max(float(np.abs(side[np.isfinite(side)]).max(initial=0.0)) for side in (left, right))
            worst = float(np.where(np.isnan(error), np.inf, error).max())
            self.record.add(worst, tolerance, seen if size is None else size)
        super().expect_close(got, expected, tolerance, statement, case)
        self.record.made = before + (left.size > 0)  # two results without any entry agree whatever the operator does


def _nothing(*arguments: object) -> None:
    """Stand for the function of a theorem that is not about one operator."""


THEOREM = Watched("theorem", _nothing)


def of_subject(subject: Subject) -> dict[str, Any]:
    """Return what the cases of a subject are like, as arguments of `cases`.

    Args:
        subject: The subject.
    """
    return {"on_grid": subject.on_grid, "pooled": subject.pooled, "min_order": subject.least_order}


def drawn_cases(*, wide: int = 0, **supposed: Any) -> Callable[[Asked, Subject], Any]:
    """Return where the cases of a theorem come from.

    Args:
        wide: Least number of modes with more than one index, as far as there are so many modes: with fewer, the
            theorem says next to nothing.
        **supposed: Arguments of `cases`: what the theorem supposes.
    """

    def wide_enough(case: Case) -> bool:
        return sum(size > 1 for size in case.sizes) >= min(wide, case.order)

    def strategy(asked: Asked, subject: Subject) -> Any:
        drawn = cases(**{**of_subject(subject), **asked.cases, **supposed})
        return drawn.filter(wide_enough) if wide else drawn

    return strategy


def drawn_orders(least: int, most: int) -> Callable[[Asked, Subject], Any]:
    """Return where cases come from that are just a number of modes.

    Args:
        least: Smallest number.
        most: Largest number that is drawn; the user may ask for more.
    """

    def strategy(asked: Asked, subject: Subject) -> Any:
        return st.integers(least, most) if asked.order is None else st.just(max(least, asked.order))

    return strategy


def called(function: Callable[..., Any], case: Case, **how: Any) -> Any:
    """Call an operator, or any function with its signature, on a case.

    Args:
        function: The operator.
        case: Arguments.
        **how: More arguments, or others.
    """
    given = {"order": case.order, "scale": case.scale, "weights": case.weights, **how}
    return function(case.query, case.key, case.value, **given)
