"""Keeps PyTorch's exporters from talking to the user's console."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

from graphprune.torch_private import graph_printer, set_graph_printer


@contextmanager
def quiet() -> Iterator[list[warnings.WarningMessage]]:
    """Holds back warnings, log records and what is printed to `sys.stderr`; yields the list that the warnings are collected in."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(record=True) as caught, redirect_stderr(io.StringIO()), _no_graph_dump():
            warnings.simplefilter("always")
            yield caught
    finally:
        logging.disable(before)


@contextmanager
def _no_graph_dump() -> Iterator[None]:
    """Holds back the graph that the recording exporter prints past Python's own streams when it fails.

    PyTorch switches that on in every export; the function that prints is all that can be reached.
    """
    printer = graph_printer()
    if printer is None:
        yield
        return
    set_graph_printer(lambda *_: None)
    try:
        yield
    finally:
        set_graph_printer(printer)
