"""The command line: ``python -m tensorattn COMMAND``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from tensorattn.attend import command as attend
from tensorattn.bench import command as bench
from tensorattn.errors import TensorAttentionError
from tensorattn.verify import command as verify

__all__ = ["main"]

COMMANDS = (attend.register, bench.register, verify.register)  # one line a command: each adds a parser, and sets `run`


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
    parser = _Parser(prog="python -m tensorattn", description="Attention over tensors of any order.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for register in COMMANDS:
        register(commands)
    chosen = parser.parse_args(arguments)
    try:
        return int(chosen.run(chosen))
    except TensorAttentionError as cause:
        line = " ".join(f"{cause.rule} {cause.hint}".split())  # without the tensors read, of which the user made none
        print(f"{parser.prog} {chosen.command}: {line}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
