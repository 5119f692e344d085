"""Progress: how far long work is, on standard error."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from tensorattn.attend.optional import MissingPackageError, require

__all__ = ["progress"]


@contextlib.contextmanager
def progress(count: int, *, unit: str) -> Iterator[Callable[[str], None]]:
    """Show how far work is: a bar where tqdm is installed, else a line for each kind of work.

    Args:
        count: Number of pieces of work.
        unit: What a piece is called.

    Yields:
        A function to call with the words for a piece when it starts.
    """
    try:
        tqdm = require("tqdm", extra="examples", purpose="the progress bar")
    except MissingPackageError:
        told: list[str] = []

        def tell(words: str) -> None:
            """Print words when their work starts."""
            if words not in told[-1:]:
                print(f"trying: {words}", file=sys.stderr)
            told.append(words)

        yield tell
        return
    with tqdm.tqdm(total=count, unit=unit, leave=False) as bar:
        done = 0

        def move(words: str) -> None:
            """Move on whenever a piece starts, since the one before has ended."""
            nonlocal done
            bar.update(int(done > 0))
            done += 1
            bar.set_description(words[:60])

        yield move
