"""What a check is: a law that a subject obeys on every case, run on drawn cases."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol, TypeVar, cast

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky
from hypothesis.strategies import SearchStrategy

from tensorattn.operators import OPERATORS
from tensorattn.testing.cases import Case, cases
from tensorattn.testing.reproduction import literal, pasted
from tensorattn.testing.subject import Checkable, Subject, resolve

__all__ = ["Check", "Draw", "Law", "check", "for_all"]

T = TypeVar("T")


class Draw(Protocol):
    """Draw one more thing that a law speaks of, such as a permutation."""

    def __call__(self, strategy: SearchStrategy[T], /) -> T:
        """Draw from a strategy."""


Law = Callable[[Subject, Case, Draw], None]  # raises AssertionError where a subject breaks it

ARGUMENTS = """

Args:
    operator: Name in the registry, an `Operator`, or a function with the signature of `additive_attention`.
    dtype: Type of the tensors.
    device: Device of the tensors.
    examples: Number of cases tried{share}; by default as the Hypothesis profile says.
    order: Number of modes N; by default drawn, from 1 to 4.
    on_grid: Whether queries must lie on the grid of the keys; by default as the operator says.
    **options: Options of the operator.

Raises:
    AssertionError: If a case breaks the statement: a sentence, and the smallest such case that was found, as Python.

"""


class Check(Protocol):
    """A statement about operators that can be checked. All checks have this signature.

    Attributes:
        statement: What is checked.
        law: The check of a single case.
        share: Share of the examples that it takes.
        drawn: Arguments of `cases`: what the law supposes.
    """

    __name__: str
    statement: str
    law: Law
    share: float
    drawn: Mapping[str, Any]

    def __call__(
        self,
        operator: Checkable,
        *,
        dtype: torch.dtype = ...,
        device: torch.device | str = ...,
        examples: int | None = ...,
        order: int | None = ...,
        on_grid: bool | None = ...,
        **options: Any,
    ) -> None:
        """Raise AssertionError if a case breaks the statement."""


def check(
    statement: str, *, default: torch.dtype = torch.float64, share: float = 1.0, **drawn: Any
) -> Callable[[Law], Check]:
    """Make a check of a law.

    Args:
        statement: What the law says, a clause; of a law that operators may claim, the claim.
        default: Default type of the tensors.
        share: Share of the examples of the profile that is tried, for laws that take long.
        **drawn: Arguments of `cases`: what the law supposes. A dtype or order here overrides that of the call.

    Returns:
        A decorator.
    """

    def decorate(law: Law) -> Check:
        @functools.wraps(law)
        def run(
            operator: Checkable,
            *,
            dtype: torch.dtype = default,
            device: torch.device | str = "cpu",
            examples: int | None = None,
            order: int | None = None,
            on_grid: bool | None = None,
            **options: Any,
        ) -> None:
            subject = resolve(operator, options, on_grid=on_grid)
            supposed = {"dtype": dtype, "device": device, "order": order, "min_order": subject.least_order}
            strategy = cases(**{**supposed, "on_grid": subject.on_grid, "pooled": subject.pooled, **drawn})
            count = max(1, round((settings().max_examples if examples is None else examples) * share))
            lines = functools.partial(_reproduction, law, operator, options, subject)
            for_all(strategy, functools.partial(law, subject), examples=count, told=lines)

        part = f", of which this check takes {share:.0%}" if share < 1 else ""
        told, title, examples = inspect.cleandoc(law.__doc__ or "").partition("Examples:")
        run.__doc__ = told.rstrip() + ARGUMENTS.format(share=part) + title + examples
        run.__dict__.update(statement=str(statement), law=law, share=share, drawn=MappingProxyType(drawn))
        run.__dict__.pop("__wrapped__")  # so that help() shows the signature of the check
        return cast(Check, run)

    return decorate


def _reproduction(
    law: Law, operator: Checkable, options: Mapping[str, Any], subject: Subject, case: Case, drawn: Sequence[Any]
) -> str:
    """Write a failing case of a check as Python; only what is no name in the registry has to be filled in."""
    named = operator if isinstance(operator, str) else None
    if named is None:
        named = next((name for name, known in OPERATORS.items() if operator in (known, known.function)), None)
    what = "operator" if named is None else repr(named)
    lines = pasted(law, f"resolve({what}, {dict(options)!r}, on_grid={subject.on_grid})", case, drawn)
    return lines if named is not None else f"operator = ...  # what was checked: {subject.name}\n{lines}"


def for_all(
    strategy: SearchStrategy[T],
    law: Callable[[T, Draw], None],
    *,
    examples: int,
    told: Callable[[T, Sequence[Any]], str] | None = None,
) -> None:
    """Try a law on drawn cases, and raise the smallest counterexample.

    Args:
        strategy: Cases.
        law: What must hold of each; it raises AssertionError where it does not.
        examples: Number of cases.
        told: From the smallest case, and what the law drew, to the note of the error; by default both as Python.

    Raises:
        AssertionError: If it does not hold, or holds only sometimes for the same case.

    Examples:
        >>> def even(number, draw):
        ...     assert number % 2 == 0, f"{number} is odd"
        >>> for_all(st.integers(0, 100), even, examples=50)
        Traceback (most recent call last):
        AssertionError: 1 is odd
        case = 1
        drawn = []
    """
    profile = settings()
    last: dict[str, Any] = {}

    @settings(
        profile,
        max_examples=examples,
        deadline=None,
        database=None,
        print_blob=False,
        report_multiple_bugs=False,
        suppress_health_check=[*profile.suppress_health_check, HealthCheck.too_slow],  # a busy machine is no failure
        phases=[phase for phase in profile.phases if phase is not Phase.explain],
    )
    @given(case=strategy, data=st.data())
    def run(case: T, data: st.DataObject) -> None:
        drawn: list[Any] = []
        last.update(case=case, drawn=drawn)

        def keep(strategy: SearchStrategy[Any]) -> Any:
            drawn.append(data.draw(strategy))
            return drawn[-1]

        try:
            law(case, keep)
        except Exception as cause:
            last["notes"] = list(getattr(cause, "__notes__", ()))
            raise

    try:
        run()
    except Flaky as cause:
        raise AssertionError(f"equal arguments do not always give equal results: {cause}") from cause
    except Exception as cause:
        if "notes" in last:  # those of Hypothesis call `run`, which nobody can
            told = told or (lambda case, drawn: f"case = {literal(case)}\ndrawn = {literal(list(drawn))}")
            cause.__notes__ = [*last["notes"], told(last["case"], last["drawn"])]
        raise
