"""What can go wrong, each as one sentence: what, where, why, and how to fix it.

Every error that graphprune raises on purpose derives from :class:`GraphPruneError`, so that callers (and the command line, which
turns it into exit code 2) can tell a clear "no" from a defect.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GraphPruneError(Exception):
    """Base of all errors that graphprune raises on purpose.

    Args:
        what: what is wrong and where, as a sentence without its final period.
        fix: what to do about it, as an imperative sentence without its final period, or a question (see `nearest`).
    """

    def __init__(self, what: str, fix: str = "") -> None:
        self.what = what
        self.fix = fix
        super().__init__(f"{what}; {fix}" if fix.endswith("?") else f"{what}. {fix}." if fix else f"{what}.")

    def __reduce__(self) -> tuple[type[GraphPruneError], tuple[str, str]]:
        """How it is sent from one process to another."""
        return type(self), (self.what, self.fix)


class InputError(GraphPruneError):
    """The example inputs are missing or the model cannot be run on them."""


class ConfigError(GraphPruneError):
    """A config list, a sparsity or an option is not usable."""


class TraceError(GraphPruneError):
    """The forward pass could not be recorded."""


class ModelChangedError(GraphPruneError):
    """Another thread changed a model while this one was at work on it."""


class MaskError(GraphPruneError):
    """Masks do not fit the model that they are applied to."""


class VerificationError(GraphPruneError):
    """The shrunk model does not compute what the masked model computes."""


class ExportError(GraphPruneError):
    """A model could not be written as ONNX, or ONNX Runtime disagrees with it."""


class FileError(GraphPruneError):
    """A file or folder could not be read or written."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns a phrase that suggests the known name closest to `name`, or an empty string when none is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else ""
