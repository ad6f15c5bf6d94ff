"""Keeps PyTorch's exporters from talking to the user's console."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

import torch


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
    name = "_jit_onnx_log"
    printer = getattr(torch._C, name, None)  # noqa: SLF001 - the printing is done in C++, and has no public switch
    if printer is None:
        yield
        return
    setattr(torch._C, name, lambda *_: None)  # noqa: SLF001
    try:
        yield
    finally:
        setattr(torch._C, name, printer)  # noqa: SLF001
