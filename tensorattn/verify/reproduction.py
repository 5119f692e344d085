"""Reproductions: the smallest failing case of a statement as lines that can be pasted into Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tensorattn.testing import Subject
from tensorattn.testing.reproduction import pasted
from tensorattn.verify.statement import THEOREM, Law

__all__ = ["reproduction"]


def reproduction(
    law: Law, subject: Subject, operator: str | None, options: Mapping[str, Any], case: Any, drawn: Sequence[Any]
) -> str:
    """Write a trial of one case as Python that raises as it did.

    Args:
        law: What the case breaks.
        subject: What was tried.
        operator: Name of the operator; None for a theorem that is not about one.
        options: Its options.
        case: The case.
        drawn: What the law drew, in order.

    Returns:
        The lines.
    """
    if operator is None:
        return pasted(law, "THEOREM", case, drawn, imports=[f"from {type(THEOREM).__module__} import THEOREM"])
    resolved = f"resolve({operator!r}, {dict(options)!r}, on_grid={subject.on_grid})"
    return pasted(law, resolved, case, drawn)
