"""Keeps PyTorch's exporters from talking to the user's console, while other threads may go on talking."""

from __future__ import annotations

import io
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import get_ident
from typing import Any

from graphprune.torch_private import graph_printers
from graphprune.trace.threads import Asked, patched, warning_filters


@contextmanager
def quiet(*raised: type[Warning]) -> Iterator[list[warnings.WarningMessage]]:
    """Holds back warnings, log records and what is printed to `sys.stderr`, of this thread; yields the list of the warnings.

    Args:
        raised: kinds of warnings that are raised as errors instead.
    """
    caught: list[warnings.WarningMessage] = []
    with ExitStack() as stack:
        stack.enter_context(patched(warnings, "showwarning", lambda _, *args: caught.append(warnings.WarningMessage(*args))))
        stack.enter_context(warning_filters(("always", Warning, ""), *(("error", kind, "") for kind in raised)))
        stack.enter_context(patched(logging.Logger, "handle", lambda *_: None))
        if sys.stderr is not None:
            stack.enter_context(patched(sys, "stderr", io.StringIO(), _Stream))
        for owner, name in graph_printers():
            stack.enter_context(patched(owner, name, lambda *_: None))
        yield caught


class _Stream:
    """A stream that is another one for threads that have asked for it."""

    def __init__(self, original: Any, asked: Asked) -> None:
        self._original, self._asked = original, asked

    def __getattr__(self, name: str) -> Any:
        mine = self._asked.get(get_ident())
        return getattr(self._original if mine is None else mine[-1], name)
