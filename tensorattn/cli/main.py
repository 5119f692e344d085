"""The command line: ``python -m tensorattn COMMAND``.

Every command is a module of this package with two functions: `add_arguments(parser)` describes the command, and
`run(arguments)` runs it and returns the exit status. Only the module of the command that is asked for is imported.
"""

from __future__ import annotations

import argparse
import importlib
import io
import sys
from collections.abc import Sequence
from typing import NoReturn

from tensorattn.errors import TensorAttentionError

__all__ = ["main"]

COMMANDS = {
    "attend": "run every operator on a video, a volume or any array, with a table and figures",
    "bench": "time, memory and FLOPs of every operator beside full attention, on your shape and device",
    "learn": "train networks with every mixer on real data, with a table of metrics and FLOPs, and figures",
    "verify": "try claims and theorems on random cases of a type and device, with a table of errors and verdicts",
}


class _Parser(argparse.ArgumentParser):
    """A parser that tells an error in one line."""

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with status 2."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: The words after the name of the program; without them, those of the process.

    Returns:
        The exit status: 0, 1 where what was to be verified fails, or 2 where the input was bad.
    """
    words = sys.argv[1:] if arguments is None else arguments
    if isinstance(sys.stdout, io.TextIOWrapper):  # a console, or the name of a file, may not be of UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    parser = _Parser(prog="python -m tensorattn", description="Attention over tensors of any order.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter)
        if name in words[:1]:
            module = importlib.import_module(f"tensorattn.cli.{name}")
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    chosen = parser.parse_args(words)
    try:
        return int(chosen.run(chosen))
    except TensorAttentionError as cause:
        line = " ".join(f"{cause.rule} {cause.hint}".split())  # without the tensors read, of which the user made none
        print(f"{parser.prog} {chosen.command}: {line}", file=sys.stderr)
        return 2
