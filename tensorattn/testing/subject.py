"""Subjects: what is checked, however the user names it; calling it, and comparing what it returns."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from tensorattn.operators import OPERATORS, Claim, Operator, get_operator
from tensorattn.summarizing import Needs
from tensorattn.testing.cases import Case
from tensorattn.testing.definitions import Array, Definition, as_array, find_definition
from tensorattn.truncation import counting_numbers

__all__ = ["Checkable", "Subject", "resolve"]

Checkable = str | Operator | Callable[..., Any]


@dataclass(frozen=True)
class Subject:
    """An operator with its options, ready to be checked.

    Attributes:
        name: What messages call it.
        function: Its functional form.
        options: Arguments that every call gets.
        on_grid: Whether it takes queries on the grid of the keys only.
        claims: Properties that it claims.
        definition: From a case to what output and log-sum-exp are by definition, the latter None where there is none;
            None if no definition is known.
        needs: From the number of modes to the means that it attends to; None if they are not known.
    """

    name: str
    function: Callable[..., Any]
    options: Mapping[str, Any] = field(default_factory=lambda: types.MappingProxyType({}))
    on_grid: bool = False
    claims: frozenset[Claim] = frozenset()
    definition: Definition | None = None
    needs: Callable[[int], Needs] | None = None

    @property
    def least_order(self) -> int:
        """Number of modes that the options ask for: those that are named must exist."""
        named = [mode + 1 for subset in self.options.get("kept") or () for mode in subset]
        causal, together = self.options.get("causal"), self.options.get("interaction_order")
        return max([1, *named, 1 if causal is None else causal + 1, 1 if together is None else together])

    @property
    def own_token(self) -> bool:
        """Whether each query sees the token at its own position once more."""
        return bool(self.options.get("include_self"))

    @property
    def pooled(self) -> bool:
        """Whether queries and keys are summed over positions before they meet."""
        return self.options.get("pool") == "sum"

    def terms(self, order: int) -> int:
        """Return how many means the output may be a signed sum of: the sum of the absolute counting numbers.

        Each has an error of its own, which stays where the means themselves cancel.

        Args:
            order: Number of modes N.

        Examples:
            >>> resolve("additive", {}).terms(3), resolve("truncated", {"interaction_order": 2}).terms(6)
            (5, 49)
        """
        if self.needs is None:
            return 1
        kept = self.needs(order).kept
        counts = counting_numbers(kept)
        return max(1, sum(abs(counts[subset]) for subset in kept))

    def reordered(self, modes: Sequence[int]) -> Subject:
        """Return the operator for tensors whose modes were reordered: options that name modes name the same ones.

        Args:
            modes: For each mode after, its index before.
        """
        if self.options.get("kept") is None:
            return self
        kept = tuple(tuple(list(modes).index(mode) for mode in subset) for subset in self.options["kept"])
        return dataclasses.replace(self, options={**self.options, "kept": kept})

    def output(self, case: Case) -> Tensor:
        """Return the output for a case, after having checked its form.

        Args:
            case: Arguments.

        Raises:
            AssertionError: If the output has the wrong shape or type, or an argument was changed in place.
        """
        return self._call(case, return_lse=False)[0]

    def with_lse(self, case: Case) -> tuple[Tensor, Tensor]:
        """Return output and log-sum-exp for a case.

        Args:
            case: Arguments.

        Raises:
            AssertionError: If they have the wrong shape or type, or an argument was changed in place.
        """
        output, lse = self._call(case, return_lse=True)
        self.expect(lse is not None, "return_lse=True must return a log-sum-exp", case)
        return output, lse

    def _call(self, case: Case, *, return_lse: bool) -> tuple[Tensor, Any]:
        """Call the operator and check the form of what it returns."""
        tensors = (case.query, case.key, case.value)
        before = [tensor._version for tensor in tensors]
        asked = {"return_lse": True} if return_lse else {}
        given = {"order": case.order, "scale": case.scale, "weights": case.weights}
        returned = self.function(*tensors, **given, **asked, **self.options)
        self.expect(before == [t._version for t in tensors], "no argument may be changed in place", case)
        output, lse = returned[:2] if return_lse else (returned, None)
        shape = (*case.query.shape[:-1], case.value.shape[-1])
        form = f"the output must be a tensor {shape} of {case.dtype}"
        self.expect(isinstance(output, Tensor) and output.shape == shape and output.dtype == case.dtype, form, case)
        form = f"the log-sum-exp must have the shape {shape[:-1]}"
        self.expect(lse is None or lse.shape == shape[:-1], form, case)
        return output, lse

    def expect(self, holds: bool, statement: str, case: Case, found: str = "") -> None:
        """Raise unless a statement holds.

        Args:
            holds: Whether it does.
            statement: The statement.
            case: Arguments for which it was tried.
            found: What was found instead.

        Raises:
            AssertionError: If it does not hold, in one sentence with the case.
        """
        if not holds:
            raise AssertionError(f"{self.name}: {statement}{', but ' if found else ''}{found}.\n  {case!r}")

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
        """Raise unless two results agree, NaN never agreeing with anything.

        Args:
            got: Result.
            expected: What it should be.
            tolerance: Largest difference allowed.
            statement: What is checked, a clause.
            case: Arguments.
            size: How large what is compared is, where the two results do not show it, as where zero is expected; the
                verdict does not depend on it.

        Raises:
            AssertionError: If they differ, telling by how much, where, and what was allowed.
        """
        left, right = as_array(got), as_array(expected)
        self.expect(left.shape == right.shape, statement, case, f"the shapes are {left.shape} and {right.shape}")
        if left.size == 0:
            return
        with np.errstate(invalid="ignore"):
            error = np.where(left == right, 0.0, np.abs(left - right))
        error = np.where(np.isnan(error), np.inf, error)
        worst = np.unravel_index(int(error.argmax()), error.shape)
        if not error[worst] <= tolerance:
            place = tuple(int(i) for i in worst)
            found = (
                f"there is {left[worst]:.6g} instead of {right[worst]:.6g} at {place}, a difference of "
                f"{error[worst]:.3g} where rounding allows {tolerance:.3g}"
            )
            self.expect(False, statement, case, found)


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
    if not isinstance(operator, Operator):
        named = operator.func if isinstance(operator, functools.partial) else operator
        name = getattr(named, "__name__", None) or type(named).__name__
        return Subject(_titled(name, options), operator, types.MappingProxyType(dict(options)), bool(on_grid))
    common = {name: value for name, value in options.items() if name in COMMON}
    own = operator.with_defaults({name: value for name, value in options.items() if name not in COMMON})
    complete = types.MappingProxyType({**own, **common})
    asked = [complete.get(name) for name in GRIDDED]
    needs_grid = operator.query != "positions" or any(value is not None and value is not False for value in asked)
    return Subject(
        _titled(operator.name, options),
        operator.function,
        complete,
        needs_grid if on_grid is None else on_grid,
        frozenset() if common else operator.claims(**own),
        find_definition(operator, complete),
        functools.partial(operator.needs, **own),
    )


COMMON = ("bias", "causal")  # arguments of all operators that a check may be made with
GRIDDED = ("include_self", "causal", "bias")  # arguments that want queries on the grid of the keys


def _titled(name: str, options: Mapping[str, Any]) -> str:
    """Name an operator with the options that were given."""
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in options.items())})" if options else name
