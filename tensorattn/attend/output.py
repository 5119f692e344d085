"""Output: files that appear together at the end, or not at all."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorattn.errors import OptionError

__all__ = ["check_directory", "png_bytes", "write_files"]


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


def png_bytes(figure: Any) -> bytes:
    """Draw a figure as a PNG picture.

    Args:
        figure: A matplotlib figure.

    Returns:
        The bytes of the file.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def write_files(directory: Path, contents: Mapping[str, bytes]) -> tuple[Path, ...]:
    """Write files into a directory, creating it: first all under other names, then all under their own.

    Args:
        directory: Where they go.
        contents: Bytes by file name.

    Returns:
        The files written.

    Raises:
        OptionError: If that fails. No half-written file is left, and no empty directory.
    """
    new = not directory.exists()
    staged: dict[Path, Path] = {}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, data in contents.items():
            handle, temporary = tempfile.mkstemp(prefix=".", suffix=".part", dir=directory)
            staged[directory / name] = Path(temporary)
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.chmod(temporary, 0o644)
        for target, source in staged.items():
            os.replace(source, target)
    except OSError as cause:
        for source in staged.values():
            source.unlink(missing_ok=True)
        if new:
            with contextlib.suppress(OSError):
                directory.rmdir()
        raise OptionError(f"--out {directory}: {cause.strerror or cause}") from cause
    return tuple(staged)
