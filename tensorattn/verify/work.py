"""Work: which statements are tried for which operators, and what becomes of each."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from tensorattn.operators import get_operator
from tensorattn.testing import checks_of, resolve
from tensorattn.testing.variants import Variant, variants
from tensorattn.verify.claims import CHECKS, OTHER_ORDERS, statement_of
from tensorattn.verify.reproduction import reproduction
from tensorattn.verify.searching import Failure, Found, search, try_once
from tensorattn.verify.statement import THEOREM, Asked, Record, Statement, Watched
from tensorattn.verify.theorems import averages, bounds, exactness, gradients, laws, limits, positions, softmaxes

__all__ = ["COARSE", "THEOREMS", "Asked", "Trial", "Verdict", "attempt", "carry_out", "trials"]

COARSE = 0.3  # tolerance in units of what is compared, from which on a comparison can hardly tell right from wrong

SUBJECTS = (exactness, positions, softmaxes, bounds, gradients, limits, averages, laws)
THEOREMS: tuple[Statement, ...] = tuple(statement for subject in SUBJECTS for statement in subject.STATEMENTS)


@dataclass(frozen=True)
class Trial:
    """A statement to be tried, for an operator if it is about one.

    Attributes:
        statement: The statement.
        variant: Operator and options, or None.
        asked: What the user asked for, with the type to try it in.
    """

    statement: Statement
    variant: Variant | None
    asked: Asked

    @property
    def subject(self) -> Watched:
        """What is tried, its comparisons recorded anew."""
        if self.variant is None:
            return dataclasses.replace(THEOREM, record=Record())
        resolved = resolve(self.variant[0], self.variant[1])
        fields = {entry.name: getattr(resolved, entry.name) for entry in dataclasses.fields(resolved)}
        return Watched(**fields, record=Record())

    @property
    def name(self) -> str:
        """What the table calls the subject; nothing for a theorem that is not about one operator."""
        return "" if self.variant is None else str(self.variant)


@dataclass
class Verdict:
    """What became of a statement.

    Attributes:
        statement: The statement.
        subjects: Number of operators that it was tried for; 0 if it is not about operators.
        cases: Number of cases on which anything was compared.
        dtypes: Types that it was tried in.
        worst: Largest error in units of its tolerance.
        worst_subject: The operator that it was of.
        failures: For each subject that broke it, its name, what was found, and the case as Python.
        shares: Tolerances of its comparisons, in units of the size of what was compared.
    """

    statement: Statement
    subjects: int = 0
    cases: int = 0
    dtypes: list[torch.dtype] = field(default_factory=list)
    worst: float = 0.0
    worst_subject: str = ""
    failures: list[tuple[str, Failure, str]] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)

    @property
    def share(self) -> float | None:
        """The median tolerance in units of the size of what was compared; None if no size is known."""
        return statistics.median(self.shares) if self.shares else None

    @property
    def fails(self) -> bool:
        """Whether a case broke it."""
        return bool(self.failures)

    @property
    def tried(self) -> bool:
        """Whether there was anything to compare in any case."""
        return self.fails or self.cases > 0

    @property
    def coarse(self) -> bool:
        """Whether no case broke it, but half of the comparisons would have let pass an error as large as `COARSE`."""
        return self.tried and not self.fails and self.share is not None and self.share > COARSE

    @property
    def holds(self) -> bool:
        """Whether it was tried, no case broke it, and most comparisons were fine enough to tell."""
        return self.tried and not self.fails and not self.coarse


def trials(asked: Asked, operator: str | None = None) -> list[Trial]:
    """List what is to be tried.

    Args:
        asked: What the user asked for.
        operator: Try only what is said of this operator.

    Examples:
        >>> asked = Asked(examples=2)
        >>> [trial.name for trial in trials(asked, "kronecker_sum")][:2]
        ['kronecker_sum', 'kronecker_sum pool=sum']
    """
    wanted = [variant for variant in variants(operator) if _fits(variant, asked)]
    having = {check: [v for v in wanted if check in checks_of(v[0], **v[1])] for check in CHECKS}
    found = []
    for check, subjects in having.items():
        if asked.order is not None and check in OTHER_ORDERS:
            continue
        statement = statement_of(check)
        found += [_trial(statement, subject, asked, dtype) for subject, dtype in _pairs(statement, subjects, asked)]
    causal = [variant for variant in wanted if "causal" not in get_operator(variant[0]).lacks]
    found += [_trial(positions.CAUSAL, variant, asked, asked.dtype) for variant in causal]
    if operator is None:
        found += [_trial(statement, None, asked, asked.dtype) for statement in THEOREMS]
    return found


def _fits(variant: Variant, asked: Asked) -> bool:
    """Whether the options of an operator make sense for the number of modes."""
    return asked.order is None or resolve(variant[0], variant[1]).least_order <= asked.order


def _pairs(statement: Statement, subjects: Sequence[Variant], asked: Asked) -> list[tuple[Variant, torch.dtype]]:
    """Every subject in every type that the statement is tried in."""
    return list(itertools.product(subjects, statement.dtypes(asked.dtype)))


def _trial(statement: Statement, variant: Variant | None, asked: Asked, dtype: torch.dtype) -> Trial:
    """Make a trial in a type."""
    return Trial(statement, variant, dataclasses.replace(asked, dtype=torch.float64 if statement.double else dtype))


def carry_out(work: Sequence[Trial], started: Callable[[str], None]) -> list[Verdict]:
    """Try everything.

    Args:
        work: What to try.
        started: Called with the words of a statement when a trial of it starts.

    Returns:
        One verdict a statement, in the order of the trials. Only the first failing case of each was made small.
    """
    verdicts: dict[str, Verdict] = {}
    names: dict[str, set[str]] = {}
    for trial in work:
        words = trial.statement.words
        started(words)
        verdict = verdicts.setdefault(words, Verdict(trial.statement))
        names.setdefault(words, set()).add(trial.name)
        verdict.subjects = len(names[words] - {""})
        subject = trial.subject
        found = attempt(trial, subject, shrink=not verdict.fails)
        verdict.cases += found.cases
        verdict.shares += subject.record.shares
        if trial.asked.dtype not in verdict.dtypes:
            verdict.dtypes.append(trial.asked.dtype)
        if subject.record.worst > verdict.worst or not verdict.worst_subject:
            verdict.worst, verdict.worst_subject = max(verdict.worst, subject.record.worst), trial.name
        if found.failure is not None:
            name, options = (None, {}) if trial.variant is None else trial.variant
            lines = reproduction(trial.statement.law, subject, name, options, found.failure.case, found.failure.drawn)
            verdict.failures.append((trial.name, found.failure, lines))
    return list(verdicts.values())


def attempt(trial: Trial, subject: Watched, *, shrink: bool = True) -> Found:
    """Try one statement for one subject.

    Args:
        trial: What to try.
        subject: What it is tried for, where its comparisons are recorded.
        shrink: Whether to make a failing case small.

    Returns:
        How many cases were tried, and the one that breaks the statement, if any.
    """
    statement, asked = trial.statement, trial.asked
    cases = statement.strategy(asked, subject)
    if statement.once:
        return try_once(statement.law, subject, cases)
    examples = max(1, round(asked.examples * statement.share))
    seed = zlib.crc32(f"{asked.seed} {asked.dtype} {statement.words} {trial.name}".encode())
    return search(statement.law, subject, cases, examples=examples, seed=seed, shrink=shrink)
