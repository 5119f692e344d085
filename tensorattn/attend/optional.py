"""Optional packages: imported when they are needed, with one clear error when they are not installed."""

from __future__ import annotations

import importlib
from typing import Any

from tensorattn.errors import TensorAttentionError

__all__ = ["MissingPackageError", "require"]


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
