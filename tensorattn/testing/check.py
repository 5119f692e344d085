"""What a law is, and how it is tried: on drawn cases, until one breaks it, which is made small and told as Python."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import types
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from hypothesis import HealthCheck, Phase, assume, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky, HypothesisException, Unsatisfiable
from hypothesis.strategies import SearchStrategy
from torch import Tensor

import tensorattn
from tensorattn.functional import OPERATORS, Claim, Operator, get_operator
from tensorattn.testing import reference
from tensorattn.testing.strategies import Case, cases, exact, is_canonical, largest

__all__ = [
    "Asked",
    "Checkable",
    "Comparison",
    "Comparisons",
    "Draw",
    "Failure",
    "Found",
    "Law",
    "Subject",
    "again",
    "holds",
    "law",
    "literal",
    "resolve",
    "search",
]

T = TypeVar("T")
Checkable = str | Operator | Callable[..., Any]
PACKAGE = tensorattn.__name__


class Draw(Protocol):
    """Draw one more thing that a law speaks of, such as a permutation."""

    def __call__(self, strategy: SearchStrategy[T], /) -> T:
        """Draw from a strategy."""


class Comparison(NamedTuple):
    """One comparison that a law makes.

    Attributes:
        told: What must hold, a clause with "must".
        found: What there is.
        expected: What there should be.
        tolerance: Largest difference allowed.
        size: How large what is compared is, where the two do not show it, as where zero is expected.
        otherwise: What to tell in place of the numbers.
    """

    told: str
    found: Tensor
    expected: Tensor
    tolerance: float = 0.0
    size: float | None = None
    otherwise: str = ""


def holds(told: str, condition: bool, otherwise: str = "") -> Comparison:
    """Make a comparison of a condition.

    Args:
        told: What must hold, a clause.
        condition: Whether it does.
        otherwise: What was found instead.
    """
    return Comparison(
        told, torch.tensor(float(condition)), torch.ones(()), size=0.0, otherwise=otherwise or "it is not"
    )


Comparisons = Iterator[Comparison]
# Of what is tried, a case and a function that draws; raises AssertionError where there is nothing to compare at all.
Compare = Callable[[Any, Any, Draw], Comparisons]


@dataclass(frozen=True)
class Asked:
    """How a law is to be tried.

    Attributes:
        dtype: Type of the tensors.
        device: Device of the tensors.
        order: Number of modes; None for drawn ones.
        examples: Number of cases.
        seed: Moves the random cases; None for those of the Hypothesis profile.
    """

    dtype: torch.dtype = torch.float64
    device: torch.device | str = "cpu"
    order: int | None = None
    examples: int = 16
    seed: int | None = 0


@dataclass(eq=False)
class Law:
    """A statement that can be tried: words, a formula, the comparisons that a case makes, and where cases come from.

    A law of operators is called with one: that is a check of it.

    Attributes:
        words: What it says, a clause; of a law that operators may claim, the claim.
        formula: The same as a formula.
        compare: From what is tried, a case and a function that draws to comparisons.
        supposed: Arguments of `cases` that it supposes, or from what is asked and tried to a strategy of its cases.
        wide: Least number of modes with more than one index: with fewer, it says next to nothing.
        share: Share of the examples that it takes.
        double: Whether it is of float64 whatever the type.
        default: Type that it is tried in unless another one is asked for.
        once: Whether its sizes are fixed: ``supposed`` then makes its only case.
    """

    words: str
    formula: str
    compare: Compare
    supposed: Mapping[str, Any] | Callable[[Asked, Any], Any]
    wide: int = 0
    share: float = 1.0
    double: bool = False
    default: torch.dtype = torch.float64
    once: bool = False

    def __post_init__(self) -> None:
        self.__name__, self.__doc__ = self.compare.__name__, self.compare.__doc__

    def cases(self, asked: Asked, subject: Any) -> Any:
        """Return the strategy of its cases; its only case where there is one only.

        Args:
            asked: How it is to be tried.
            subject: What it is tried for.
        """
        if callable(self.supposed):
            return self.supposed(asked, subject)
        told = subject.cases if isinstance(subject, Subject) else {}
        drawn = cases(**{**told, "dtype": asked.dtype, "device": asked.device, "order": asked.order, **self.supposed})
        return drawn.filter(lambda case: sum(n > 1 for n in case.sizes) >= min(self.wide, case.order))

    def tried(self, subject: Any, asked: Asked, *, shrink: bool = True) -> Found:
        """Try it.

        Args:
            subject: A `Subject`; for a law that is not about operators, a namespace with the names of the package.
            asked: How.
            shrink: Whether to make a failing case small.
        """
        if self.double:
            asked = dataclasses.replace(asked, dtype=torch.float64)
        number = asked.seed
        if number is not None:
            title = subject.name if isinstance(subject, Subject) else ""
            number = zlib.crc32(f"{number} {asked.dtype} {self.words} {title}".encode())
        examples = 1 if self.once else max(1, round(asked.examples * self.share))
        drawn = self.cases(asked, subject)
        return search(self, subject, st.just(drawn) if self.once else drawn, examples, number, shrink=shrink)

    def __call__(
        self,
        operator: Checkable,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        examples: int | None = None,
        order: int | None = None,
        on_grid: bool | None = None,
        **options: Any,
    ) -> None:
        """Check it of an operator.

        Args:
            operator: Name in the registry, an `Operator`, or a function with the signature of `additive_attention`.
            dtype: Type of the tensors.
            device: Device of the tensors.
            examples: Number of cases; by default as the Hypothesis profile says.
            order: Number of modes N; by default drawn, from 1 to 4.
            on_grid: Whether queries must lie on the grid of the keys; by default as the operator says.
            **options: Options of the operator.

        Raises:
            AssertionError: If a case breaks it: a sentence, and the smallest such case that was found, as Python.
        """
        subject = resolve(operator, options, on_grid=on_grid)
        count = settings().max_examples if examples is None else examples
        failure = self.tried(subject, Asked(dtype or self.default, device, order, count, None)).failure
        if failure is not None:
            raised = AssertionError(failure.message)
            raised.add_note(failure.python(self, operator, options))
            raise raised from failure.cause


def law(words: str, formula: str, *, strategy: Any = None, **how: Any) -> Callable[[Compare], Law]:
    """Make a law of a function that compares.

    Args:
        words: What it says, a clause.
        formula: The same as a formula.
        strategy: From what is asked and tried to its cases, where they are not those of `cases`.
        **how: Attributes of `Law`, and arguments of `cases` that it supposes.
    """
    own = {entry.name for entry in dataclasses.fields(Law)}
    supposed = {name: value for name, value in how.items() if name not in own}

    def decorate(compare: Compare) -> Law:
        attributes = {name: value for name, value in how.items() if name in own}
        return Law(words, formula, compare, strategy or types.MappingProxyType(supposed), **attributes)

    return decorate


@dataclass(frozen=True)
class Subject:
    """An operator with its options, ready to be checked.

    Attributes:
        name: What messages call it.
        function: Its functional form.
        options: Arguments that every call gets.
        on_grid: Whether it takes queries on the grid of the keys only.
        claims: Properties that it claims.
        registered: Whether it has a record, and so all arguments that operators have.
        defined: Its name in `tensorattn.testing.reference`, or None.
        lacks: Arguments without a meaning for it.
        by_place: Whether it matters to it where a position stands among the others.
    """

    name: str
    function: Callable[..., Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    on_grid: bool = False
    claims: frozenset[Claim] = frozenset()
    registered: bool = False
    defined: str | None = None
    lacks: frozenset[str] = frozenset()
    by_place: bool = False

    @property
    def cases(self) -> dict[str, Any]:
        """What its cases are like, as arguments of `cases`."""
        pooled = self.options.get("pool") == "sum"
        return {"on_grid": self.on_grid, "pooled": pooled, "min_order": self.least_order}

    @property
    def least_order(self) -> int:
        """Number of modes that the options ask for: those that are named must exist."""
        named = [mode + 1 for subset in self.options.get("kept") or () for mode in subset]
        causal, together = self.options.get("causal"), self.options.get("interaction_order")
        return max([1, *named, 1 if causal is None else causal + 1, 1 if together is None else together])

    def terms(self, order: int) -> int:
        """Return how many means the output may be a signed sum of: the sum of the absolute counting numbers.

        Each has an error of its own, which stays where the means themselves cancel.

        Args:
            order: Number of modes N.

        Examples:
            >>> resolve("additive", {}).terms(3), resolve("truncated", {"interaction_order": 2}).terms(6)
            (5, 49)
        """
        if "kept" not in self.options:
            return 2 * order - 1
        together = self.options["interaction_order"] or min(2, order)
        kept = self.options["kept"] or itertools.combinations(range(order), together)
        return sum(map(abs, reference.counting_numbers(kept, order).values()))

    def called(self, case: Case, **how: Any) -> Any:
        """Return what the operator returns for a case, after having checked its form.

        Args:
            case: Arguments.
            **how: More arguments.

        Returns:
            The output; output and log-sum-exp where ``return_lse`` is asked for.

        Raises:
            AssertionError: If the output has the wrong shape or type, or an argument was changed in place.
        """
        tensors, named = case.given(**{**self.options, **how})
        before = [tensor._version for tensor in tensors]
        returned = self.function(*tensors, **named)
        assert before == [t._version for t in tensors], "no argument may be changed in place"
        output, lse = returned[:2] if how.get("return_lse") else (returned, None)
        shape = (*case.query.shape[:-1], case.value.shape[-1])
        right = isinstance(output, Tensor) and output.shape == shape and output.dtype == case.dtype
        assert right, f"the output must be a tensor {shape} of {case.dtype}"
        if not how.get("return_lse"):
            return output
        assert lse is not None, "return_lse=True must return a log-sum-exp"
        assert lse.shape == shape[:-1], f"the log-sum-exp must have the shape {shape[:-1]}"
        return output, lse

    def with_lse(self, case: Case, **how: Any) -> tuple[Tensor, Tensor | None]:
        """Return the output for a case, and the log-sum-exp if it is claimed to be that of the logits.

        Args:
            case: Arguments.
            **how: More arguments.
        """
        if Claim.LOG_SUM_EXP in self.claims:
            output, lse = self.called(case, return_lse=True, **how)
            return output, lse
        return self.called(case, **how), None

    def definition(self, case: Case, **how: Any) -> tuple[Tensor, Tensor | None]:
        """Return output and log-sum-exp by definition.

        Args:
            case: Arguments.
            **how: More arguments.
        """
        assert self.defined is not None, "there is no definition to compare with"
        tensors, named = case.given(**{**self.options, **how})
        with torch.no_grad():
            return reference.attention(self.defined, *tensors, **named)


COMMON = ("bias", "causal")  # arguments of all operators that a check may be made with
GRIDDED = ("include_self", "causal", "bias")  # arguments that want queries on the grid of the keys


def resolve(operator: Checkable, options: Mapping[str, Any], *, on_grid: bool | None = None) -> Subject:
    """Read what the user wants checked.

    Args:
        operator: Name in the registry, record of an operator, or a function with the signature of
            `additive_attention`; the function of a registered operator stands for that operator.
        options: Options of the operator. Arguments that all operators have, such as ``causal``, may be among them; what
            an operator claims, it claims without them.
        on_grid: Whether queries must lie on the grid of the keys; by default as the operator says.

    Returns:
        The subject.

    Raises:
        OptionError: If there is no such operator or option.

    Examples:
        >>> resolve("kao_qkv", {"centered": True}).name
        'kao_qkv(centered=True)'
    """
    if isinstance(operator, str):
        operator = get_operator(operator)
    if not isinstance(operator, Operator):
        operator = next((known for known in OPERATORS.values() if known.function is operator), operator)
    titled = f"({', '.join(f'{key}={value!r}' for key, value in options.items())})" if options else ""
    if not isinstance(operator, Operator):
        named = operator.func if isinstance(operator, functools.partial) else operator
        name = getattr(named, "__name__", None) or type(named).__name__
        return Subject(name + titled, operator, dict(options), bool(on_grid))
    common = {name: value for name, value in options.items() if name in COMMON}
    own = operator.with_defaults({name: value for name, value in options.items() if name not in COMMON})
    asked = [{**own, **common}.get(name) for name in GRIDDED]
    needs_grid = operator.query != "positions" or any(value is not None and value is not False for value in asked)
    ours = operator.function.__module__.startswith(f"{PACKAGE}.") and operator.name in reference.OPERATORS
    ours = ours and own.get("cells") != "keys"  # what a search finds among keys alike is a matter of rounding
    return Subject(
        operator.name + titled,
        operator.function,
        {**own, **common},
        needs_grid if on_grid is None else on_grid,
        frozenset() if common else operator.claims(**own),
        True,
        operator.name if ours else None,
        frozenset(operator.lacking(own)),
        operator.by_place(**own),
    )


class Failure(NamedTuple):
    """A case that breaks a law.

    Attributes:
        message: What was found, in a sentence with the case.
        case: The case.
        drawn: What the law drew, in order.
        cause: What was raised.
    """

    message: str
    case: Any
    drawn: Sequence[Any]
    cause: BaseException | None = None

    def python(self, law: Law, operator: Checkable | None = None, options: Mapping[str, Any] | None = None) -> str:
        """Write the trial as Python that raises as it did; what has no name in the registry has to be filled in.

        Args:
            law: What the case breaks.
            operator: What was tried; None for a law that is not about one.
            options: Its options.
        """
        lines = [
            "import torch",
            f"from {__name__} import again",
            f"from {law.compare.__module__} import {law.__name__}",
            "from tensorattn.testing import Case",
        ]
        values = [f"case = {literal(self.case)}", f"drawn = {literal(list(self.drawn))}"]
        told, call = [], [law.__name__, "case", "drawn"]
        if operator is not None:
            known = (n for n, record in OPERATORS.items() if operator in (n, record, record.function))
            name = operator if isinstance(operator, str) else next(known, None)
            told = ["operator = ...  # what was checked"] if name is None else []
            call += ["operator" if name is None else repr(name)]
            call += [f"{option}={literal(value)}" for option, value in (options or {}).items()]
        if any(word in "".join(values) for word in ("inf", "nan")):
            lines.insert(0, "from math import inf, nan")
        return "\n".join([*told, *lines, "", *values, f"again({', '.join(call)})"])


@dataclass
class Found:
    """What trying a law came to.

    Attributes:
        cases: Number of cases that it made a comparison on.
        skipped: Number of cases that it made none on, as they do not meet what it supposes.
        worst: Largest error in units of its tolerance.
        shares: Tolerances in units of the size of what was compared, where that is known.
        failure: The smallest case that breaks it, or None.
    """

    cases: int = 0
    skipped: int = 0
    worst: float = 0.0
    shares: list[float] = field(default_factory=list)
    failure: Failure | None = None

    def attempt(self, law: Law, subject: Any, case: Any, draw: Draw) -> bool:
        """Make the comparisons of a law on one case, and tell whether there was anything to compare.

        Args:
            law: The law.
            subject: What it is tried for.
            case: The case.
            draw: Draws what the law speaks of.

        Raises:
            AssertionError: If the case breaks the law, in a sentence with the case.
        """
        compared, title = False, subject.name if isinstance(subject, Subject) else "theorem"
        try:
            for comparison in law.compare(subject, case, draw):
                compared |= comparison.found.numel() > 0  # two results without any entry agree whatever is done
                self._judge(comparison)
        except Exception as cause:
            self.cases += not isinstance(cause, HypothesisException)  # nor what stops a draw
            if isinstance(cause, AssertionError):
                raise AssertionError(f"{title}: {cause}.\n  {case!r}") from None
            raise
        self.cases, self.skipped = self.cases + compared, self.skipped + (not compared)
        return compared

    def _judge(self, comparison: Comparison) -> None:
        """Raise unless two results agree, NaN never agreeing with anything."""
        told, found, expected = comparison.told, exact(comparison.found), exact(comparison.expected)
        assert found.shape == expected.shape, f"{told}, but the shapes are {(*found.shape,)} and {(*expected.shape,)}"
        if found.numel() == 0:
            return
        errors = torch.where(found == expected, 0.0, (found - expected).abs()).nan_to_num(math.inf, math.inf)
        error, tolerance = float(errors.max()), comparison.tolerance
        if error > 0:
            self.worst = max(self.worst, error / tolerance if tolerance > 0 else math.inf)
        size = largest(found, expected) if comparison.size is None else comparison.size
        if size > 0:
            self.shares.append(tolerance / size)
        if not error <= tolerance:
            place = tuple(int(i) for i in torch.unravel_index(errors.argmax(), errors.shape))
            otherwise = comparison.otherwise or (
                f"there is {found[place]:.6g} instead of {expected[place]:.6g} at {place}, a difference of "
                f"{error:.3g} where rounding allows {tolerance:.3g}"
            )
            raise AssertionError(f"{told}, but {otherwise}")


def search(
    law: Law, subject: Any, strategy: SearchStrategy[Any], examples: int, number: int | None, *, shrink: bool = True
) -> Found:
    """Try a law on drawn cases.

    Args:
        law: What must hold of each.
        subject: What it is tried for.
        strategy: Cases.
        examples: Number of cases.
        number: Seed of the cases; None for those of the Hypothesis profile.
        shrink: Whether to make a failing case small.

    Returns:
        How many cases were tried, how far results were apart, and the smallest case that breaks the law. An error of
        whatever kind breaks it: an operator that raises has not kept its word either.
    """
    found = Found()
    last: list[tuple[Any, list[Any]]] = [(None, [])]
    profile = settings()
    phases = {Phase.generate, *([Phase.shrink] if shrink else [])} & {*profile.phases, Phase.generate}
    chosen = settings(
        profile,
        max_examples=examples,
        deadline=None,
        database=None,
        print_blob=False,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        phases=[phase for phase in Phase if phase in phases],
        derandomize=profile.derandomize and number is None,
    )

    @chosen
    @given(case=strategy, data=st.data())
    def run(case: Any, data: st.DataObject) -> None:
        drawn: list[Any] = []
        last[:] = [(case, drawn)]

        def keep(strategy: SearchStrategy[Any]) -> Any:
            drawn.append(data.draw(strategy))
            return drawn[-1]

        assume(found.attempt(law, subject, case, keep))  # or another case is drawn

    try:
        (run if number is None else seed(number)(run))()
    except Unsatisfiable:
        pass  # too few cases, or none, on which the law compares anything: their number tells
    except Flaky as cause:
        found.failure = Failure(f"equal arguments do not always give equal results: {cause}", *last[0], cause)
    except Exception as cause:
        message = str(cause) if isinstance(cause, AssertionError) else f"{type(cause).__name__}: {cause}"
        found.failure = Failure(message, *last[0], cause)
    return found


def again(law: Law, case: Any, drawn: Sequence[Any] = (), operator: Checkable | None = None, **options: Any) -> None:
    """Try a law on one case.

    Args:
        law: The law.
        case: The case.
        drawn: What the law draws, in order.
        operator: What it is tried for; left out where the law is not about one operator.
        **options: Options of the operator.

    Raises:
        AssertionError: If the case breaks the law.

    Examples:
        >>> from tensorattn.testing import check_zero_scale_mean
        >>> ones = torch.ones(1, 2, 1)
        >>> again(check_zero_scale_mean, Case(ones, ones, ones, 2, on_grid=True), [], "kao_qkv")
        Traceback (most recent call last):
        AssertionError: kao_qkv: at scale zero the output must be the mean value, but there is 2 instead of 1 at ...
    """
    answers = list(drawn)
    subject = tensorattn if operator is None else resolve(operator, options)
    Found().attempt(law, subject, case, lambda strategy: answers.pop(0))


def literal(value: Any) -> str:
    """Write a value as Python.

    Args:
        value: Number, text, tensor, generator that was just seeded, case, or tuple, list or set of such.

    Examples:
        >>> literal((1, torch.tensor([0.5]), None))
        '(1, torch.tensor([0.5], dtype=torch.float32), None)'
    """
    if isinstance(value, Tensor):
        device = "" if value.device.type == "cpu" else f", device={str(value.device)!r}"
        typed = f"dtype={value.dtype}{device}"
        if value.numel() == 0:
            return f"torch.zeros({tuple(value.shape)}, {typed})"
        dense = f"torch.tensor({value.tolist()}, {typed})"
        if is_canonical(value) or 0 in value.stride():
            return dense
        return f"torch.empty_strided({tuple(value.shape)}, {value.stride()}, {typed}).copy_({dense})"
    if isinstance(value, torch.Generator):
        return f"torch.Generator().manual_seed({value.initial_seed()})"
    if isinstance(value, Case):
        shown = [entry for entry in dataclasses.fields(value) if getattr(value, entry.name) is not entry.default]
        told = (f"    {entry.name}={literal(getattr(value, entry.name))},\n" for entry in shown)
        return f"Case(\n{''.join(told)})"
    if isinstance(value, tuple):
        return f"({', '.join(map(literal, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, list):
        return "[" + ", ".join(map(literal, value)) + "]"
    return repr(value)
