"""The command `verify`: its arguments, and what it prints."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from tensorattn.attend.optional import require
from tensorattn.errors import OptionError
from tensorattn.operators import OPERATORS, get_operator
from tensorattn.progress import progress

__all__ = ["register"]

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
MOST_MODES = 6

DESCRIPTION = """\
Try statements on random cases: what the operators claim, what every operator has, and what they are made of.

Prints one table: each statement in words and as a formula, for how many operators and in how many cases it was tried,
the tolerance in units of what is compared, the largest error in units of the tolerance, and the verdict. The tolerance
is what rounding may cause in the type; where it is so large that hardly any error would be noticed, the verdict is
"coarse". Statements about exact derivatives, dense algebra or limits are of float64, say so and are counted apart.
Cases on which a statement has nothing to compare are not counted; where all are such, it is "not tried". A statement
that fails is followed by the smallest case that was found, to be pasted into Python.

Exit status: 0 if nothing fails, 1 if anything does, 2 where the input is bad.
"""


def register(commands: Any) -> None:
    """Add the command to the commands of the package.

    Args:
        commands: What `argparse.ArgumentParser.add_subparsers` returns.
    """
    parser = commands.add_parser(
        "verify",
        help="try claims and theorems on random cases of a type and device, with a table of errors and verdicts",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dtype", default="float64", help=f"{', '.join(DTYPES)} (default float64)")
    parser.add_argument("--device", default="cpu", help="device of the tensors (default cpu)")
    parser.add_argument("--order", type=_whole, help="number of modes (default: drawn, from 1 to 4)")
    parser.add_argument(
        "--examples", type=_whole, default=16, help="cases a statement and operator (default 16; gradients fewer)"
    )
    parser.add_argument("--seed", type=_whole, default=0, help="moves the random cases (default 0)")
    parser.add_argument(
        "--operator", metavar="NAME", help=f"only what is said of this operator: {', '.join(OPERATORS)}"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command.

    Args:
        arguments: What the parser read.

    Returns:
        The exit status: 0 if nothing fails, 1 if anything does.
    """
    if arguments.dtype not in DTYPES:
        raise OptionError(f"--dtype must be one of {', '.join(DTYPES)}, got {arguments.dtype!r}.")
    if arguments.order is not None and not 1 <= arguments.order <= MOST_MODES:
        raise OptionError(f"--order must be between 1 and {MOST_MODES}, got {arguments.order}.")
    for name, least in (("examples", 1), ("seed", 0)):
        if getattr(arguments, name) < least:
            raise OptionError(f"--{name} must be at least {least}, got {getattr(arguments, name)}.")
    if arguments.operator is not None:
        get_operator(arguments.operator)
    _check_device(arguments.device)
    require("hypothesis", extra="verify", purpose="the command verify")
    work = require("tensorattn.verify.work", extra="verify", purpose="the command verify")
    report = require("tensorattn.verify.report", extra="verify", purpose="the command verify")
    asked = work.Asked(
        dtype=DTYPES[arguments.dtype],
        device=arguments.device,
        order=arguments.order,
        examples=arguments.examples,
        seed=arguments.seed,
    )
    trials = work.trials(asked, arguments.operator)
    with progress(len(trials), unit="trial") as started:
        verdicts = work.carry_out(trials, started)
    print(report.table(verdicts, asked.dtype))
    print(report.summary(verdicts, asked.dtype, arguments.device))
    print(report.conditions(asked.dtype))
    failed = [verdict for verdict in verdicts if verdict.fails]
    for verdict in failed:
        print(f"\n{report.failure(verdict)}")
    return 1 if failed else 0


def _check_device(name: str) -> None:
    """Put a number on the device, to see that it is there."""
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as cause:
        first = str(cause).split("\n")[0]
        raise OptionError(f"--device {name!r} cannot be used: {first}") from None


def _whole(text: str) -> int:
    """Read a whole number."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
