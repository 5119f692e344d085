"""What commands share: optional packages, arguments, a progress bar, amounts in words, and files written together."""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import io
import itertools
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from tensorattn.errors import OptionError, TensorAttentionError
from tensorattn.functional import OPERATORS, Operator

__all__ = [
    "Choice",
    "MissingPackageError",
    "aligned",
    "amount",
    "check_directory",
    "duration",
    "number",
    "parse_choices",
    "png_bytes",
    "positive",
    "progress",
    "require",
    "write_files",
]

N = TypeVar("N", int, float)


class MissingPackageError(TensorAttentionError):
    """A package outside the requirements is needed for what was asked, and is not installed."""


def require(module: str, *, extra: str, purpose: str) -> Any:
    """Import an optional package, or say which extra installs it.

    Args:
        module: Dotted name of the module.
        extra: Extra of this package that installs it.
        purpose: What it is needed for, as the subject of a sentence.

    Returns:
        The module. Its attributes are untyped: optional packages are a boundary.

    Raises:
        MissingPackageError: If it cannot be imported.

    Examples:
        >>> require("json", extra="examples", purpose="reading JSON").dumps([1, 2])
        '[1, 2]'
    """
    try:
        return importlib.import_module(module)
    except ImportError as cause:
        package = module.partition(".")[0]
        raise MissingPackageError(
            f"{purpose} needs {package}, which cannot be imported ({cause}): pip install 'tensorattn[{extra}]'"
        ) from cause


# ---- arguments -----------------------------------------------------------------------------------------------


def number(kind: Callable[[str], N], holds: Callable[[N], bool], rule: str) -> Callable[[str], N]:
    """Return a reader of one number, for `argparse.ArgumentParser.add_argument`.

    Args:
        kind: The type of the number.
        holds: Whether a number is allowed.
        rule: What it must be.

    Returns:
        A function from text to the number.

    Examples:
        >>> number(int, lambda n: n >= 0, "a whole number of at least 0")("-3")
        Traceback (most recent call last):
        argparse.ArgumentTypeError: must be a whole number of at least 0, got -3
    """

    def read(text: str) -> N:
        """Read the number."""
        with contextlib.suppress(ValueError):
            if holds(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"must be {rule}, got {text}")

    return read


positive = number(int, lambda n: n >= 1, "a whole number of at least 1")


@dataclass(frozen=True, eq=False)  # told apart by identity, so that it can be a key
class Choice:
    """An operator with some of its options, as the command line names it: ``kao_qkv:centered=True``.

    The value ``S`` stands for the number of mode averages, which a recording decides: ``clustered:tokens=S``.

    Attributes:
        label: What the user called it.
        record: The operator.
        options: Options that differ from the defaults.
    """

    label: str
    record: Operator
    options: Mapping[str, Any]

    def settled(self, averages: int) -> Choice:
        """Return it with the number of mode averages in place of S.

        Args:
            averages: The number.

        Examples:
            >>> parse_choices(["clustered:cells=blocks:tokens=S"])[0].settled(295).options
            {'cells': 'blocks', 'tokens': 295}
        """
        return replace(self, options={name: averages if of == "S" else of for name, of in self.options.items()})


def parse_choices(texts: Iterable[str]) -> tuple[Choice, ...]:
    """Read operators with their options, each once.

    Args:
        texts: For each a name, then each option after a colon: ``"truncated:interaction_order=2"``.

    Returns:
        The choices, in the order they were first named.

    Raises:
        OptionError: If there is no such operator or no such option, or an option is no switch and should be one.

    Examples:
        >>> [choice.options for choice in parse_choices(["kao_qkv:centered=True", "kao_kv", "kao_kv"])]
        [{'centered': True}, {}]
    """
    return tuple(_choice(text) for text in dict.fromkeys(text.strip() for text in texts))


def _choice(text: str) -> Choice:
    """Read one operator with its options."""
    name, *settings = text.split(":")
    if name not in OPERATORS:
        raise OptionError(f"--operator {name!r} is not one of: {', '.join(OPERATORS)}.")
    options: dict[str, Any] = {}
    for setting in settings:
        option, equals, value = setting.partition("=")
        if not equals:
            raise OptionError(f"--operator {text!r}: an option is written name=value, got {setting!r}.")
        options[option] = value
        with contextlib.suppress(ValueError, SyntaxError):  # no number, True, False, None or tuple: a word
            options[option] = ast.literal_eval(value)
    try:
        OPERATORS[name].with_defaults(options)
    except OptionError as cause:
        raise OptionError(f"--operator {text!r}: {cause.rule}") from None
    return Choice(text, OPERATORS[name], options)


# ---- what is shown -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def progress(count: int, *, unit: str) -> Iterator[Callable[[str], None]]:
    """Show how far work is: a bar on a terminal, where tqdm is installed, else a line for each kind of work.

    Args:
        count: Number of pieces of work.
        unit: What a piece is called.

    Yields:
        A function to call with the words for a piece when it starts.
    """
    try:
        tqdm = require("tqdm", extra="examples", purpose="the progress bar") if sys.stderr.isatty() else None
    except MissingPackageError:
        tqdm = None
    if tqdm is None:
        told = ""

        def tell(words: str) -> None:
            """Print words when their work starts."""
            nonlocal told
            if words != told:
                print(f"trying: {words}", file=sys.stderr)
            told = words

        yield tell
        return
    with tqdm.tqdm(total=count, unit=unit, leave=False) as bar:

        def move(words: str) -> None:
            """Say what starts now; the piece before has ended, where there was one."""
            bar.update(int(bool(bar.desc)))
            bar.set_description(words[:60])

        yield move


def amount(count: float, unit: str = "") -> str:
    """Return a number with three digits and a prefix, in powers of ten.

    Args:
        count: The number.
        unit: What is counted.

    Examples:
        >>> amount(84_934_656_000_000), amount(147_456_000, "B"), amount(0, "B")
        ('84.9 T', '147 MB', '0 B')
    """
    prefixes = ["", "k", "M", "G", "T", "P", "E"]
    while count >= 999.5 and len(prefixes) > 1:
        count, prefixes = count / 1000, prefixes[1:]
    digits = f"{count:.0f}" if count == int(count) and prefixes[0] == "" else f"{count:#.3g}".rstrip(".")
    return f"{digits} {prefixes[0]}{unit}".rstrip()


def duration(seconds: float) -> str:
    """Return a duration in its natural unit.

    Args:
        seconds: Duration in seconds.

    Examples:
        >>> [duration(seconds) for seconds in (0.0123, 8.04, 600, 40_000, 300_000)]
        ['12.3 ms', '8.04 s', '10 min', '11.1 h', '3.47 days']
    """
    for least, size, unit in ((172_800, 86_400, "days"), (7200, 3600, "h"), (120, 60, "min"), (0.9995, 1, "s")):
        if seconds >= least:
            return amount(seconds / size, unit)
    return f"{seconds * 1000:.{1 if seconds >= 0.00995 else 2}f} ms"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lay cells out in columns, the first to the left; a row of one cell stands by itself.

    Args:
        rows: Cells, the first row being headings.

    Returns:
        One line a row.

    Examples:
        >>> aligned([("", "time"), ("on a table",), ("sum", "3 ms")])
        ['      time', 'on a table', 'sum   3 ms']
    """
    full = [row for row in rows if len(row) > 1]
    widths = [max(len(row[column]) for row in full) for column in range(len(rows[0]))]
    cells = (
        [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=False))] for row in rows
    )
    return ["   ".join(line).rstrip() for line in cells]


# ---- what is written -----------------------------------------------------------------------------------------


def check_directory(directory: Path) -> None:
    """Check, without creating anything, that files can be written into a directory.

    Args:
        directory: Where the files would go; it need not exist.

    Raises:
        OptionError: If it is not a directory, or must not be written to.
    """
    existing = directory
    while not os.path.lexists(existing) and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise OptionError(f"--out {directory}: {existing} is not a directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise OptionError(f"--out {directory}: {existing} cannot be written to")


def write_files(directory: Path, contents: Mapping[str, bytes]) -> tuple[Path, ...]:
    """Write files into a directory, creating it: all of them, or none.

    First all are written beside their places, then each goes into its place; if one cannot, the others go back.

    Args:
        directory: Where they go.
        contents: Bytes by file name.

    Returns:
        The files written.

    Raises:
        OptionError: If that fails. What was there is left as it was, without a new file or directory.
    """
    new = [*itertools.takewhile(lambda folder: not os.path.lexists(folder), (directory, *directory.parents))]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=directory) as aside:
            made, kept = Path(aside, "made"), Path(aside, "kept")
            for folder in (made, kept):
                folder.mkdir()
            for name, data in contents.items():
                (made / name).write_bytes(data)
            for taken in filter(Path.is_dir, (directory / name for name in contents)):
                raise OptionError(f"--out {directory}: {taken} is a directory")
            with contextlib.ExitStack() as back:
                for name in contents:
                    place = directory / name
                    if os.path.lexists(place):
                        place.replace(kept / name)
                        back.callback((kept / name).replace, place)
                    else:
                        back.callback(place.unlink, missing_ok=True)
                    (made / name).replace(place)
                back.pop_all()
            return tuple(directory / name for name in contents)
    except BaseException as cause:  # an interrupt, too
        for folder in new:
            with contextlib.suppress(OSError):
                folder.rmdir()
        if isinstance(cause, OSError):
            raise OptionError(f"--out {directory}: {cause.strerror or cause}") from cause
        raise


def png_bytes(figure: Any) -> bytes:
    """Draw a matplotlib figure as a PNG picture.

    Args:
        figure: The figure.

    Returns:
        The bytes of the file.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
