"""Refuses a PyTorch that is older than promised, without importing it."""

from __future__ import annotations

import re
import sys
from importlib import metadata
from typing import Final

OLDEST: Final = (2, 6)
"""The oldest release that the test suite has passed with; pyproject.toml promises the same."""


def require_torch() -> None:
    """Does nothing where the installed PyTorch is recent enough, or where there is none: importing it says so then.

    Raises:
        ImportError: it is older, as one line that says which version there is and which is needed.
    """
    version = _version()
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is not None and (int(found[1]), int(found[2])) < OLDEST:
        needed = ".".join(map(str, OLDEST))
        message = f"graphprune needs PyTorch {needed} or later, and this is {version}; run: pip install 'torch>={needed}'"
        raise ImportError(message, name="torch")


def _version() -> str:
    """Returns the version of PyTorch: of the one that is imported already, else of the one that is installed; empty without any."""
    if "torch" in sys.modules:
        return str(getattr(sys.modules["torch"], "__version__", ""))
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return ""
